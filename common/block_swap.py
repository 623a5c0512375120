"""Block swap: frozen blocks of a transformer wait in the computer's memory, and are on the device to compute."""

import functools
import mmap
import sys
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from common.models import repeated_blocks

import torch
from accelerate import PartialState
from torch.nn.parallel import DistributedDataParallel
from torch.utils._pytree import tree_leaves


ALIGNMENT = 256  # bytes between the beginnings of weights, as the CUDA allocator and its kernels have it


@dataclass(eq=False)
class SwappedBlock:
    """A block's frozen weights, one after the other: `host`, bytes in the computer's memory, and `device`, of the same
    length, whose storage is empty while the block waits.

    The block's `parameters` are views of `device`. The attribute `waiting` of each is its view of `host`.
    """

    parameters: Sequence[torch.nn.Parameter]
    host: torch.Tensor
    device: torch.Tensor
    arrival: torch.Event | None = None  # of the weights, on a GPU


class BlockSwap:
    """Moves a model to its device without `number` of its repeated blocks, of which at most two are there at a time.

    auto: without all of them, until `keep_what_fits`. The weights of the next block are copied on a CUDA stream of
    their own while one computes, in the forward pass and, backwards, in the backward pass. They are frozen, so nothing
    is ever copied back; what is trained stays on the device. On other devices the copies are plain ones. No number
    that the model computes changes.

    What autograd keeps of a weight for the backward pass is a view of the block's storage, whose memory is given back
    and taken again under such views (as FSDP does): they hold the weights whenever the block computes. Outside of that
    nothing may read swapped weights.
    """

    def __init__(self, model: torch.nn.Module, number: int | str, device: torch.device):
        blocks = repeated_blocks(model)
        self.torch_device = device
        self.stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self.blocks: list[SwappedBlock] = []  # in the order in which they compute
        self.loaded: set[SwappedBlock] = set()
        self.current: SwappedBlock | None = None  # the last that computed
        self.is_settled = False
        self.swapped_names: list[str] = []
        names = {id(parameter): name for name, parameter in model.named_parameters()}
        places = spread(len(blocks) if number == "auto" else int(number), len(blocks))
        for i in places:
            frozen = [parameter for parameter in blocks[i].parameters() if not parameter.requires_grad]
            self.swapped_names += [names[id(parameter)] for parameter in frozen]
            block = swap_out(frozen, device)
            self.blocks.append(block)
            swap_around(blocks[i], functools.partial(self.around, block))
        # what is swapped has this device already; "cpu:0", which accelerate gives, is another one
        model.to("cpu" if device.type == "cpu" else device)
        for i in places:
            blocks[i]._apply = functools.partial(stay, blocks[i])  # type: ignore[method-assign]
        # they are the same in all processes, and cannot be read now
        DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(model, self.swapped_names)
        if number == "auto" and device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)  # text encoders took more before they were freed

    def around(self, block: SwappedBlock, forward: Callable, *args, **kwargs):
        """What a block's forward returns, with its weights on the device, now and in the backward pass."""
        if block not in self.blocks:  # it stays on the device, see `keep`
            return forward(*args, **kwargs)
        self.before_forward(block)
        outputs = forward(*args, **kwargs)
        inputs = {id(each) for each in tree_leaves((args, kwargs))}
        for output in tree_leaves(outputs):
            if isinstance(output, torch.Tensor) and output.requires_grad and id(output) not in inputs:
                # autograd comes to a block's output before all else of the block, and after all blocks that computed
                # later: it takes what was computed last first
                output.register_hook(lambda gradient: self.before_backward(block))
        return outputs

    def before_forward(self, block: SwappedBlock) -> None:
        """Has the block's weights on the device and the next block's on their way."""
        if block is self.current:  # computed again in the backward pass, by gradient checkpointing
            return
        i = self.blocks.index(block)
        if i + 1 < len(self.blocks):
            following = self.blocks[i + 1]
        elif torch.is_grad_enabled():  # the backward pass begins here
            following = self.blocks[max(i - 1, 0)]
        else:
            following = self.blocks[0]
        self.load(block, following)

    def before_backward(self, block: SwappedBlock) -> None:
        """The same in the backward pass, where the previous block is next."""
        i = self.blocks.index(block)
        following = self.blocks[i - 1] if i > 0 else self.blocks[min(1, len(self.blocks) - 1)]  # the next pass's
        self.load(block, following)

    def load(self, block: SwappedBlock, following: SwappedBlock) -> None:
        """Frees the weights of all blocks but two, and copies those of the two that are not on the device."""
        released = self.loaded - {block, following}
        if released and self.stream is not None:
            # copies reuse their memory: only after all that reads it
            self.stream.wait_stream(torch.cuda.current_stream(self.torch_device))
        for other in released:
            other.device.untyped_storage().resize_(0)
        for each in dict.fromkeys((block, following)):
            if each not in self.loaded:
                self.copy(each)
        self.loaded = {block, following}
        self.current = block
        if block.arrival is not None:
            torch.cuda.current_stream(self.torch_device).wait_event(block.arrival)

    def copy(self, block: SwappedBlock) -> None:
        """Starts the copy of a block's weights to the device."""
        with torch.cuda.stream(self.stream):  # None: no stream
            block.device.untyped_storage().resize_(len(block.host))
            block.device.copy_(block.host, non_blocking=True)
            if self.stream is not None:
                block.arrival = self.stream.record_event()

    def keep(self, number: int) -> None:
        """From here on only `number` blocks are swapped; the others stay on the device."""
        swapped = [self.blocks[i] for i in spread(number, len(self.blocks))]
        staying = [block for block in self.blocks if block not in swapped]
        for block in staying:
            if block not in self.loaded:
                self.copy(block)
        if self.stream is not None:
            self.stream.synchronize()
        for block in staying:  # gives its RAM back
            for parameter in block.parameters:
                del parameter.waiting  # type: ignore[attr-defined]
            block.host = torch.empty(0, dtype=torch.uint8)
        self.blocks = swapped
        self.loaded.intersection_update(swapped)
        self.current = None

    def keep_what_fits(self, *step: Any) -> None:
        """From here on swaps only as many blocks as do not fit at the peak of memory since they are swapped.

        Without a GPU all fit.

        A hook for an optimizer, whose first step decides.
        """
        if self.is_settled:
            return
        self.is_settled = True
        number = 0
        if self.torch_device.type == "cuda":
            free, total = torch.cuda.mem_get_info(self.torch_device)
            unused = torch.cuda.memory_reserved(self.torch_device) - torch.cuda.max_memory_allocated(self.torch_device)
            number = blocks_to_swap([len(block.host) for block in self.blocks], free + unused, total)
        if PartialState().is_main_process:
            found = f"{number} of {len(self.blocks)} blocks do not fit and are swapped"
            print(f"\n--blocks_to_swap auto: {found}", file=sys.stderr, flush=True)
        self.keep(number)


def blocks_to_swap(sizes: Sequence[int], free: int, total: int) -> int:
    """How many of some blocks must be swapped on a device with `free` of `total` bytes at its peak, with all swapped.

    sizes  bytes of the blocks. A tenth of the device stays free, for larger images, validation and fragments.
    """
    number = len(sizes)
    room = free - total / 10
    kept = sorted(sizes, reverse=True)  # any of them may be those that stay
    while number and sum(kept[: len(sizes) - number + 1]) <= room:
        number -= 1
    return number


@contextmanager
def readable(parameter: torch.Tensor) -> Iterator[None]:
    """Within it the numbers of a parameter can be read, which may be one of a block that waits."""
    if not hasattr(parameter, "waiting") or parameter.untyped_storage().nbytes():
        yield
        return
    place = parameter.data
    parameter.data = parameter.waiting.to(place.device, copy=True)  # type: ignore[attr-defined]
    try:
        yield
    finally:
        parameter.data = place


def check_block_count(number: int | str | None, model: torch.nn.Module) -> list[str]:
    """A problem of --blocks_to_swap where it is more than the model's blocks."""
    if not isinstance(number, int) or number <= len(repeated_blocks(model)):
        return []
    found = f"{type(model).__name__} has {len(repeated_blocks(model))} blocks"
    return [f"--blocks_to_swap {number}: {found}; auto swaps what does not fit"]


def spread(number: int, count: int) -> list[int]:
    """`number` of the places 0 ... count - 1, at even distances: the blocks between them hide the copies."""
    return [i * count // number for i in range(number)]


def swap_out(parameters: Sequence[torch.nn.Parameter], device: torch.device) -> SwappedBlock:
    """Moves parameters into pinned memory, and makes them views of memory on the device that is not yet taken."""
    starts = []
    length = 0
    for parameter in parameters:
        starts.append(length)
        length += -(-parameter.nbytes // ALIGNMENT) * ALIGNMENT
    host = torch.frombuffer(mmap.mmap(-1, length), dtype=torch.uint8)  # pages of its own, which can be pinned
    block = SwappedBlock(parameters, host, torch.empty(length, dtype=torch.uint8, device=device))

    def view(memory, start, parameter):
        return memory[start : start + parameter.nbytes].view(parameter.dtype).view(parameter.shape)

    for start, parameter in zip(starts, parameters, strict=True):
        parameter.waiting = view(host, start, parameter)  # type: ignore[attr-defined]
        parameter.waiting.copy_(parameter.data)  # type: ignore[attr-defined]
        parameter.data = view(block.device, start, parameter)
    if device.type == "cuda":
        pin(host)
    block.device.untyped_storage().resize_(0)
    return block


def pin(host: torch.Tensor) -> None:
    """Pins the memory of a tensor while it lives. Tensor.pin_memory would take the next power of two of bytes."""
    cudart: Any = torch.cuda.cudart()
    error = int(cudart.cudaHostRegister(host.data_ptr(), host.nbytes, 0))
    if error:
        raise SystemExit(
            f"\n{Path(sys.argv[0]).name}: error: --blocks_to_swap: no more RAM can be pinned (CUDA error {error}): "
            "swap fewer blocks, or give --quantize_base"
        )
    weakref.finalize(host, cudart.cudaHostUnregister, host.data_ptr()).atexit = False


def stay(module: torch.nn.Module, change: Callable, recurse: bool = True) -> torch.nn.Module:
    """A module's `_apply`, by which `to` and the like move and convert: of a module that is to be left as it is."""
    return module


def swap_around(module: torch.nn.Module, around: Callable) -> None:
    """Calls around(forward, ...) where the module's forward was called, compiled or not.

    Not by forward hooks: the module's compiled code contains them.
    """
    if module._compiled_call_impl is not None:
        module._compiled_call_impl = functools.partial(around, module._compiled_call_impl)
    else:
        module.forward = functools.partial(around, module.forward)
