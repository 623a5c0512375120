"""The loss on examples that are not trained, at fixed noise: its mean, its lowest and the weights then.

It is computed at the levels of NOISE_LEVELS, with a noise that depends on the example's place among the held-out
ones and on the level alone. So the values of two steps, or of two runs, differ by what was trained only.
"""

import copy
import hashlib
import json
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any, TypeVar

from common.checkpoints import load_sharded, read_json, save_sharded
from common.data import Example, data_record
from common.flow_matching import step_generator
from common.metrics import held_out_summary
from common.models import disk_group, gather_objects, is_sharded, reshard, writes_files
from common.validation import undisturbed

import torch
from accelerate import Accelerator
from safetensors.torch import load_file, save_file
from torch.distributed.tensor import DTensor


NOISE_LEVELS = (0.1, 0.3, 0.5, 0.7, 0.9)  # σ itself, without a shift, whatever noise levels a run trains on

NOISE_SEED = 20_260_901  # in the place of --seed, so that runs of other seeds compare

DEFAULT_STEPS = 100  # from one evaluation to the next, without --validation_loss_steps and --validation_steps

STATE_FILE = "held_out.json"  # in checkpoints

SomeExample = TypeVar("SomeExample", bound=Example)


# ---------------------------------------------------------------------------------------------------------------------
# Which examples
# ---------------------------------------------------------------------------------------------------------------------


def check_held_out(args: Any) -> list[str]:
    """Problems of the flags of held-out data, which all trainers have."""
    problems = []
    if args.validation_data_dir and args.validation_split:
        problems.append("--validation_data_dir and --validation_split exclude each other: choose one")
    if not (args.validation_data_dir or args.validation_split):
        for flag in ("validation_loss_steps", "load_best_model_at_end", "early_stopping_patience"):
            if vars(args)[flag]:
                problems.append(f"--{flag} needs --validation_data_dir or --validation_split")
    return problems


def held_out_args(args: Any, **values: Any) -> Any:
    """The flags with other values, by which a trainer reads --validation_data_dir as it does its training data."""
    changed = copy.copy(args)
    for name, value in {"validation_split": None, **values}.items():
        setattr(changed, name, value)
    return changed


def hold_out(examples: Sequence[SomeExample], share: float) -> tuple[list[SomeExample], list[SomeExample]]:
    """(examples to train on, held-out ones): about `share` of them, at least one; all are to train on if it is 0.

    They are chosen by a hash of their images, or of their names where nothing is known of these: in whatever order and
    folder they come, the same ones are held out, and copies of an image stay together. If all are copies of one,
    nothing is left to train on.
    """
    if not share:
        return list(examples), []
    groups: dict[str, list[SomeExample]] = {}
    for example in examples:
        key = example.stamp or Path(example.name).name
        groups.setdefault(hashlib.sha256(key.encode()).hexdigest(), []).append(example)
    wanted = max(1, round(share * len(examples)))
    chosen: set[int] = set()
    for _, group in sorted(groups.items()):
        if len(chosen) < wanted:
            chosen.update(id(example) for example in group)
    training = [example for example in examples if id(example) not in chosen]
    return training, [example for example in examples if id(example) in chosen]


def check_split(training: Sequence[Example], share: float) -> list[str]:
    """A problem of --validation_split that leaves nothing to train on."""
    if training or not share:
        return []
    return [f"--validation_split {share:g}: nothing is left to train on, it takes two different images at least"]


def describe_held_out(held_out: Sequence[Example], examples: Sequence[Example], steps: int) -> dict[str, str]:
    """What a run's header says of its held-out examples, {label: text}, with those that are trained on as well."""
    if not held_out:
        return {}
    images = "image" if len(held_out) == 1 else "images"
    text = f"{len(held_out)} {images}, their loss every {steps} steps"
    trained = {example.stamp for example in examples if example.stamp}
    num_both = sum(example.stamp in trained for example in held_out)
    if num_both:
        text += f"; {num_both} of them are among the training images, too: their loss tells nothing"
    return {"held out": text}


def held_out_record(held_out: Sequence[Example]) -> dict[str, str]:
    """What must be the same when a run is resumed, as of `run_settings` (checkpoints.py); {} without such examples."""
    if not held_out:
        return {}
    record = json.dumps(data_record(held_out))
    return {"the hash of the held-out data": hashlib.sha256(record.encode()).hexdigest()[:16]}


# ---------------------------------------------------------------------------------------------------------------------
# Their loss
# ---------------------------------------------------------------------------------------------------------------------


def fixed_generator(index: int) -> torch.Generator:
    """What the latents of the held-out example `index` are drawn from."""
    return step_generator(NOISE_SEED, index, len(NOISE_LEVELS))


def fixed_noise(latents: torch.Tensor, index: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(latents, noise [L, ...], sigmas [L]) of the held-out example `index`, one for each of the L NOISE_LEVELS.

    `latents` [1, ...] are repeated. The noise of a level comes from (NOISE_SEED, index, level).
    """
    draws = []
    for level in range(len(NOISE_LEVELS)):
        generator = step_generator(NOISE_SEED, index, level)
        draws.append(torch.randn(latents.shape, generator=generator))
    noise = torch.cat(draws).to(latents.device)
    sigmas = torch.tensor(NOISE_LEVELS, device=latents.device)
    return latents.expand(len(NOISE_LEVELS), *latents.shape[1:]), noise, sigmas


def held_out_means(
    accelerator: Accelerator,
    model: torch.nn.Module,
    num_examples: int,
    losses_of: Callable[[int], Mapping[str, torch.Tensor]],
) -> dict[str, float]:
    """The means over all held-out examples of what losses_of(index) returns: {name: [L]}, a loss of each noise level.

    {name: mean, name_0.1: mean at this level, ...}. `losses_of` is called without gradients and leaves no trace in
    training. The processes share the examples, and all get the same means. All processes compute each example of a
    sharded model; the last one's values count for all, so that all stop alike.
    """
    indices = list(range(num_examples))
    sharing: Any = nullcontext(indices) if is_sharded(model) else accelerator.split_between_processes(indices)
    found = []
    with undisturbed(model, device=accelerator.device), accelerator.autocast(), sharing as share:
        for index in share:
            losses = losses_of(index)
            found.append((index, {name: values.tolist() for name, values in losses.items()}))
    of_example = dict(gather_objects(found))
    means = {}
    for name in of_example[0]:
        rows = [of_example[index][name] for index in indices]
        at_levels = [math.fsum(values) / num_examples for values in zip(*rows, strict=True)]
        means[name] = math.fsum(at_levels) / len(NOISE_LEVELS)
        for level, value in zip(NOISE_LEVELS, at_levels, strict=True):
            means[f"{name}_{level:g}"] = value
    return means


# ---------------------------------------------------------------------------------------------------------------------
# Its lowest
# ---------------------------------------------------------------------------------------------------------------------


class BestStep:
    """The step with the lowest held-out loss so far and, with `keeps_weights`, what it had in `parameters` of `model`.

    Within `with best_step.weights():` the parameters have these values. `update` is called within `result_weights()`,
    that of a moving average, whose values are kept then. `is_over` once the loss has not become lower `patience` times
    in a row.
    """

    def __init__(
        self,
        model: torch.nn.Module,
        parameters: Iterable[torch.nn.Parameter],
        *,
        keeps_weights: bool = False,
        patience: int | None = None,
        result_weights: Callable[[], AbstractContextManager] = nullcontext,
    ) -> None:
        self.model = model
        self.parameters = list(parameters)
        self.keeps_weights = keeps_weights
        self.patience = patience
        self.result_weights = result_weights
        self.step = 0
        self.loss = math.inf
        self.last_step = 0
        self.last_loss = math.inf
        self.num_worse = 0  # evaluations since the lowest
        self.kept: list[torch.Tensor] = []  # on the CPU

    def update(self, step: int, loss: float) -> None:
        """Takes note of an evaluation; all processes call it with the same loss."""
        self.last_step = step
        self.last_loss = loss
        if loss >= self.loss or math.isnan(loss):
            self.num_worse += 1
            return
        self.step = step
        self.loss = loss
        self.num_worse = 0
        if self.keeps_weights:
            self.kept = [values.cpu().clone() for values in self.live_values()]

    def live_values(self) -> list[torch.Tensor]:
        """The parameters' values on this process, of sharded ones its part."""
        values = []
        for parameter in self.parameters:
            value = parameter.detach()
            values.append(value.to_local() if isinstance(value, DTensor) else value)
        return values

    @property
    def is_over(self) -> bool:
        return self.patience is not None and self.num_worse >= self.patience

    @property
    def result_step(self) -> int | None:
        """The step whose weights are the result; None if it is the last one."""
        return self.step if self.kept else None

    @contextmanager
    def weights(self) -> Iterator[None]:
        """Within it the parameters are those of the best step, or without these as within `result_weights`."""
        with self.result_weights():
            self.swap()
            try:
                yield
            finally:
                self.swap()

    @torch.no_grad()
    def swap(self) -> None:
        if not self.kept:
            return
        for value, kept in zip(self.live_values(), self.kept, strict=True):
            current = value.cpu().clone()
            value.copy_(kept)
            kept.copy_(current)
        reshard(self.model)

    def summary(self) -> str:
        """What the held-out loss tells of the run, and whose weights are its result; "" without an evaluation."""
        text = held_out_summary({self.step: self.loss, self.last_step: self.last_loss} if self.last_step else {})
        if text and self.result_step:
            text += f" The result has the weights of step {self.result_step}."
        if self.is_over:
            text += f" The run ended because the loss had not become lower {self.patience} times in a row."
        return text

    def register_checkpointing(self, accelerator: Accelerator) -> None:
        """Makes `accelerator.save_state` and `load_state` handle all this."""

        def weights_file(folder: str) -> Path:
            """The weights' file, which is none to draw with, see `find_lora`; for a sharded model a folder."""
            return Path(folder) / ("resume_best" if is_sharded(self.model) else "resume_best.safetensors")

        def split_tensors() -> dict[str, torch.Tensor]:
            return {str(i): parameter.detach() for i, parameter in enumerate(self.parameters)}

        def save(models: list, weights: list, output_dir: str) -> None:
            if writes_files(accelerator):
                names = ("step", "loss", "last_step", "last_loss", "num_worse")
                state = {name: getattr(self, name) for name in names}
                (Path(output_dir) / STATE_FILE).write_text(json.dumps(state))
            if self.kept and is_sharded(self.model):
                self.swap()
                save_sharded(split_tensors(), weights_file(output_dir), disk_group(accelerator))
                self.swap()
            elif self.kept and writes_files(accelerator):
                tensors = {str(i): values.contiguous() for i, values in enumerate(self.kept)}
                save_file(tensors, weights_file(output_dir))

        def load(models: list, input_dir: str) -> None:
            state = read_json(Path(input_dir) / STATE_FILE)
            has_weights = weights_file(input_dir).exists()
            if self.keeps_weights and state.get("step") and not has_weights:
                return  # of a run that did not keep weights: the best step is one of those to come
            for name, value in state.items():
                setattr(self, name, value)
            if self.keeps_weights and has_weights and is_sharded(self.model):
                self.kept = [values.cpu().clone() for values in self.live_values()]
                load_sharded(split_tensors(), weights_file(input_dir), disk_group(accelerator))
                self.swap()
            elif self.keeps_weights and has_weights:
                tensors = load_file(weights_file(input_dir))
                self.kept = [tensors[str(i)] for i in range(len(tensors))]

        accelerator.register_save_state_pre_hook(save)
        accelerator.register_load_state_pre_hook(load)
