"""Counts how often a program waits for its device: on a GPU by what torch says, on a CPU by a stand-in.

with count_syncs(device) as syncs:
    ...
print(len(syncs), syncs)
"""

import traceback
import warnings
from contextlib import contextmanager
from pathlib import Path

import torch
from torch.overrides import TorchFunctionMode
from torch.utils.weak import WeakIdKeyDictionary


ROOT = Path(__file__).parent.parent


@contextmanager
def count_syncs(device):
    """Within it, the list that it gives grows by one text each time that the program waits for the device.

    On a CPU those tensors count as on the device that are moved to it, or made there, inside of it: by `to(device)` or
    `device=device` with a torch.device. What is made without a device, or moved to "cpu" by this word, is not there.
    """
    syncs = []
    if device.type == "cuda":
        before = torch.cuda.get_sync_debug_mode()
        with warnings.catch_warnings(record=True) as found:
            warnings.simplefilter("always")
            torch.cuda.set_sync_debug_mode("warn")
            try:
                yield syncs
            finally:
                torch.cuda.set_sync_debug_mode(before)
                for warning in found:
                    if "synchronizing CUDA operation" in str(warning.message):
                        syncs.append(f"{warning.filename}:{warning.lineno}")
        return
    with DeviceStandIn(syncs):
        yield syncs


READS = {"item", "tolist", "numpy", "cpu", "__bool__", "__int__", "__float__", "__index__", "__array__"}
READS |= {"nonzero", "masked_select", "unique", "equal", "allclose", "is_nonzero", "bincount", "argwhere"}
FROM_VALUES = {"tensor", "as_tensor", "new_tensor", "asarray"}


class DeviceStandIn(TorchFunctionMode):
    """Takes a CPU for two devices and notes what would hold up the program on one of them.

    A tensor on the CPU that meets one on the device in an operation is an error, as it is with a GPU, unless it is a
    single number.
    """

    def __init__(self, syncs):
        super().__init__()
        self.syncs = syncs
        self.on_device = WeakIdKeyDictionary()

    def is_on_device(self, value):
        return isinstance(value, torch.Tensor) and value in self.on_device

    def note(self, what):
        frames = [frame for frame in traceback.extract_stack() if frame.filename.startswith(str(ROOT))]
        frames = [frame for frame in frames if frame.filename != __file__ and "/site-packages/" not in frame.filename]
        place = f"{Path(frames[-1].filename).name}:{frames[-1].lineno}" if frames else "a library"
        self.syncs.append(f"{what} at {place}")

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        name = getattr(function, "__name__", "")
        tensors = list(tensors_in((args, kwargs)))
        there = [tensor for tensor in tensors if self.is_on_device(tensor)]
        if name == "__set__":  # of an attribute: parameter.data, .grad
            result = function(*args, **kwargs)
            if self.is_on_device(args[1]):
                self.on_device[args[0]] = True
            return result
        if name in ("to", "cuda"):
            return self.move(function, args, kwargs)
        if name in READS and there:
            self.note(name)
            result = function(*args, **kwargs)
            return result.view(result.shape) if result is args[0] else result  # which is on the CPU
        if name in ("__getitem__", "__setitem__") and there:
            self.check_index(args)
        result = function(*args, **kwargs)
        device = kwargs.get("device")
        made_there = isinstance(device, torch.device) and device.type != "meta"
        if name in FROM_VALUES and (made_there or (name == "new_tensor" and there)):
            self.note(name)
        if name == "copy_" and there and len(there) < len(tensors) and not kwargs.get("non_blocking"):
            self.note(name)
        exempt = ("__getitem__", "__setitem__", "copy_", "__get__", "_has_compatible_shallow_copy_type", "backward")
        if there and name not in exempt:
            for tensor in tensors:
                if tensor.ndim and not self.is_on_device(tensor):
                    self.note(f"MIX {name} {list(tensor.shape)}")
        if there or made_there:
            for tensor in tensors_in(result):
                self.on_device[tensor] = True
        return result

    def move(self, function, args, kwargs):
        source, *targets = args
        targets += [value for key, value in kwargs.items() if key in ("device", "other")]
        result = function(*args, **kwargs)
        goes = leaves = False
        for target in targets:
            goes = goes or isinstance(target, torch.device) or self.is_on_device(target)
            leaves = leaves or target == "cpu" or (isinstance(target, torch.Tensor) and not self.is_on_device(target))
        blocks = not kwargs.get("non_blocking") and True not in args[2:]
        was_there = self.is_on_device(source)
        if was_there and leaves and blocks:
            self.note("to the CPU")
        if goes and not was_there and blocks:
            self.note("to the device")
        if result is source and (leaves if was_there else goes):
            result = source.view(source.shape)
        if goes or (was_there and not leaves):
            self.on_device[result] = True
        return result

    def check_index(self, args):
        values, index = args[:2]
        for part in index if isinstance(index, tuple) else (index,):
            if isinstance(part, list):
                self.note("an index from a list")
            elif isinstance(part, torch.Tensor) and part.ndim and not self.is_on_device(part):
                self.note("an index from the CPU")
            elif isinstance(part, torch.Tensor) and part.dtype == torch.bool:
                self.note("an index of bools")
            elif isinstance(part, torch.Tensor) and not part.ndim and self.is_on_device(part):
                self.note("an index of one number")


def tensors_in(value):
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, (list, tuple)):
        for each in value:
            yield from tensors_in(each)
    elif isinstance(value, dict):
        for each in value.values():
            yield from tensors_in(each)
