"""What a run reports: header, metrics, trackers, loss.png, model card, hub."""

import base64
import collections
import errno
import importlib.metadata
import io
import json
import math
import os
import resource
import secrets
import shlex
import shutil
import sys
import textwrap
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from common.arguments import fail
from common.checkpoints import (
    atomic_write,
    find_checkpoints,
    in_use,
    lock_folder,
    print_once,
    read_json,
    remove_partial,
    writing,
)
from common.metrics import (
    HELD_OUT,
    held_out_lines,
    held_out_losses,
    held_out_summary,
    mean_window,
    read_metrics,
    running_mean,
)
from common.models import gather_objects, writes_files

import numpy as np
import torch
from accelerate import Accelerator
from huggingface_hub import HfApi, ModelCard, ModelCardData
from huggingface_hub.errors import HTTPError
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tqdm.auto import tqdm


# The flags in a model card, as far as the trainer has them.
SETTINGS = (
    "recipe",
    "condition_type",
    "mode",
    "resolution",
    "target_size",
    "rank",
    "lora_alpha",
    "quantize_base",
    "mixed_precision",
    "optimizer",
    "learning_rate",
    "lr_scheduler",
    "train_batch_size",
    "gradient_accumulation_steps",
    "max_train_steps",
    "num_train_epochs",
    "guidance_scale",
    "seed",
)

FORECAST_STEP = 5  # after this many steps of a run, `log_step` says how long the rest will take


def print_header(
    accelerator: Accelerator,
    args: Any,
    run_info: Mapping[str, str],
    params: Iterable[torch.nn.Parameter],
    base_size: int,
    max_train_steps: int,
    steps_per_epoch: int | None,
    batch: str | int | None = None,
) -> None:
    """Prints what a run trains: `params` beside a model of `base_size` parameters, `run_info` {label: text}, steps.

    `batch` is the number of images per forward pass where it is not --train_batch_size.
    """
    num_trained = sum(parameter.numel() for parameter in params)
    share = min(1, num_trained / base_size)  # a full fine-tuning that adds layers trains more than the base has
    accumulation = args.gradient_accumulation_steps
    devices = f"{accelerator.num_processes} {accelerator.device.type}"
    step = f"batch {batch or args.train_batch_size} x accumulation {accumulation} x {devices}"
    lines = {
        "model": args.pretrained_model_name_or_path,
        "trained": f"{num_trained:,} parameters, {share:.2%} of all",
        **run_info,
        "steps": f"{max_train_steps}, {steps_per_epoch or 'unknown'} per epoch; a step is {step}",
        "precision": f"mixed precision {precision_text(args, accelerator.device.type)}, seed {args.seed}",
        "memory": memory_text(args),
        "output": args.output_dir,
    }
    if accelerator.device.type != "cpu":
        lines["reading"] = f"{args.dataloader_num_workers} processes read images ahead of the steps"
    if args.resume_from_checkpoint == "latest" and not find_checkpoints(args.output_dir):
        lines["resume"] = f"no checkpoint in {args.output_dir}: this run starts at step 0"
    for label, text in lines.items():
        if text:
            accelerator.print(f"  {label:15}{text}")


def precision_text(args: Any, device_type: str) -> str:
    """The mixed precision of a run, on a GPU with what it means where no flag has chosen it."""
    if device_type == "cpu" or "mixed_precision" in args.changed:
        return args.mixed_precision
    if args.mixed_precision == "no":
        return "no (float32: bf16 needs half of the memory, where the GPU computes in it)"
    return f"{args.mixed_precision} (as no flag says otherwise)"


def memory_text(args: Any) -> str:
    """What a run does to need less memory, "" if nothing."""
    parts = []
    if args.quantize_base != "none":
        parts.append(f"base {args.quantize_base}")
    if args.quantize_text_encoders != "none":
        parts.append(f"text encoders {args.quantize_text_encoders}")
    if args.blocks_to_swap:
        parts.append(f"swap {args.blocks_to_swap}")
    if args.gradient_checkpointing:
        parts.append("checkpointing")
    if args.offload:
        parts.append("offload")
    return ", ".join(parts)


def start_logging(
    accelerator: Accelerator, args: Any, project: str, last_step: int, events: Mapping[str, int] | None = None
) -> None:
    """Writes args.json and starts the trackers under the name of `project`.

    args.json holds the flags, which of them were changed, the versions of the libraries and, as "marks", `events`
    {label: step}, which plots mark; step 0 means never. Where a run resumes, TensorBoard drops what it has of steps
    after `last_step`, and wandb goes on with the run whose id args.json has.
    """
    flags = {name: value for name, value in vars(args).items() if name != "hub_token"}
    wandb_id = None
    if args.report_to in ("wandb", "all"):
        before = read_json(args.output_dir / "args.json") if last_step else {}
        wandb_id = before.get("wandb_id") or secrets.token_hex(4)
    if accelerator.is_main_process:
        libraries = ("torch", "diffusers", "transformers", "peft", "accelerate")
        record = {
            "args": flags,
            "changed": args.changed,
            "versions": {name: importlib.metadata.version(name) for name in libraries},
            "marks": {label: step for label, step in (events or {}).items() if step},
        }
        if wandb_id:
            record["wandb_id"] = wandb_id
        with atomic_write(args.output_dir / "args.json") as partial:
            partial.write_text(json.dumps(record, indent=2, default=str) + "\n")
    if not accelerator.log_with:
        return
    if args.hub_token:  # wandb records the command line
        sys.argv = [word.replace(args.hub_token, "***") for word in sys.argv]
    tracker_settings: dict[str, dict] = {}
    if wandb_id:
        tracker_settings["wandb"] = {"id": wandb_id, "resume": "allow"}
    if last_step:
        tracker_settings["tensorboard"] = {"purge_step": last_step + 1}
    with writing(args.output_dir / args.logging_dir):
        accelerator.init_trackers(project, tracker_config(flags), init_kwargs=tracker_settings)


def tracker_config(flags: Mapping[str, Any]) -> dict[str, bool | int | float | str]:
    """The flags as TensorBoard takes them: numbers and text."""
    config = {}
    for name, value in flags.items():
        if value is None:
            config[name] = ""
        elif isinstance(value, (bool, int, float, str)):
            config[name] = value
        else:
            config[name] = str(value)
    return config


class StepReads:
    """The numbers of steps, copied from the device while it goes on: they are read when the next step was started.

    On a CPU, which nothing waits for, they are read at once.
    """

    def __init__(self, device: torch.device) -> None:
        self.num_waiting = 0 if device.type == "cpu" else 1
        self.waiting: collections.deque = collections.deque()

    def put(self, step: int, numbers: Mapping[str, torch.Tensor], logs: Mapping[str, float]) -> None:
        """Starts to copy the `numbers` [] of a step; `logs` are those that the CPU knows."""
        values = torch.stack([number.float() for number in numbers.values()])
        on_cpu = values.to("cpu", non_blocking=True)  # in pinned memory
        copied = None
        if values.device.type != "cpu":
            copied = torch.Event(values.device)
            copied.record()
        self.waiting.append((step, list(numbers), on_cpu, copied, logs))

    def read(self, *, wait: bool) -> Iterator[tuple[int, dict[str, float]]]:
        """(step, {name: number}) of the steps that are to be read now: all with `wait`, else the last one may wait."""
        while len(self.waiting) > (0 if wait else self.num_waiting):
            step, names, on_cpu, copied, logs = self.waiting.popleft()
            if copied is not None:
                copied.synchronize()
            yield step, {**dict(zip(names, on_cpu.tolist(), strict=True)), **logs}


def step_logs(
    optimizer: torch.optim.Optimizer, num_images: int, started: float, device: torch.device
) -> dict[str, float]:
    """What is logged of a step besides the numbers that are on the device.

    `num_images` is the nominal number of images of a step, over all processes, and `started` the time.perf_counter()
    at its begin.
    With Prodigy, lr is the step size: its learning rate, a factor, times its estimate d, which is logged too.
    """
    group = optimizer.param_groups[0]
    logs = {"lr": group["lr"]}
    if "d" in group:
        logs = {"lr": group["lr"] * group["d"], "prodigy_d": group["d"]}
    logs["images_per_second"] = num_images / (time.perf_counter() - started)
    logs["peak_memory_gb"] = peak_memory(device)
    return logs


def log_step(accelerator: Accelerator, progress_bar: tqdm, metrics: Any, step: int, logs: Mapping[str, float]) -> None:
    """Sends the numbers of one step to the progress bar, the trackers and `Metrics`.

    `metrics` is None on all processes but the main one.
    """
    progress_bar.set_postfix({name: f"{logs[name]:.3g}" for name in ("loss", "lr")}, refresh=False)
    progress_bar.update()  # tqdm prints ten times a second at most
    if not progress_bar.disable:
        print_forecast(progress_bar, step, logs["peak_memory_gb"])
    with writing(accelerator.logging_dir or "."):
        accelerator.log(dict(logs), step=step)
    if metrics:
        metrics.write({"step": step, **logs})


def print_forecast(progress_bar: Any, step: int, memory_gb: float) -> None:
    """Says once how long the rest of the steps will take, whose times alone are known then. tqdm's own estimate counts
    the first step, which may compile the model."""
    done = step - progress_bar.initial
    elapsed = progress_bar.format_dict["elapsed"]
    if done == 1:
        progress_bar.first_step_seconds = elapsed
    if done == FORECAST_STEP:
        seconds_per_step = (elapsed - progress_bar.first_step_seconds) / (FORECAST_STEP - 1)
        remaining = progress_bar.format_interval((progress_bar.total - step) * seconds_per_step)
        left = f"{remaining} more, validation aside"
        progress_bar.write(f"  expected {left}, {memory_gb:.1f} GiB of memory, by first steps")


def peak_memory(device: torch.device) -> float:
    """Most memory in use so far, in GiB: the accelerator's, or the process' on a CPU."""
    if device.type != "cpu":
        return torch.accelerator.max_memory_allocated(device) / 2**30
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 2**20 if sys.platform == "linux" else peak / 2**30  # KiB on Linux, bytes on macOS


class Metrics:
    """The file metrics.jsonl, open to append the rows of steps after `last_step`; what it has of those is dropped.

    It is unbuffered: what a full disk did not take must not be tried again when the file is closed. A run cannot be
    told, drawn with or plotted without it and args.json beside it, so they are written again if they are deleted.
    """

    def __init__(self, path: Path, last_step: int) -> None:
        self.path = path
        self.args_file = path.with_name("args.json")
        self.args = self.args_file.read_bytes() if self.args_file.exists() else None
        rows = [row for row in read_metrics(path) if row["step"] <= last_step]
        self.open("".join(json.dumps(row) + "\n" for row in rows).encode())

    def open(self, rows: bytes) -> None:
        with atomic_write(self.path) as partial:
            partial.write_bytes(rows)
        with writing(self.path):
            self.file = self.path.open("a+b", buffering=0)

    def write(self, row: Mapping[str, float]) -> None:
        self.restore()
        line = (json.dumps(row) + "\n").encode()
        with writing(self.path):
            if self.file.write(line) < len(line):  # an unbuffered write to a full disk may take a part
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def restore(self) -> None:
        """Writes both files again if they are no longer there, or in a folder of another name."""
        status = os.fstat(self.file.fileno())
        is_there = self.path.exists() and os.path.samestat(self.path.stat(), status)
        if not is_there:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            if not lock_folder(self.path.parent):  # deleted with the folder, which another run has made again
                raise SystemExit(f"\n{in_use(self.path.parent)}")
            rows = os.pread(self.file.fileno(), status.st_size, 0)  # of the file that has no name any more
            self.file.close()
            self.open(rows)
        lacks_args = self.args is not None and not self.args_file.exists()
        if lacks_args:
            with atomic_write(self.args_file) as partial:
                partial.write_bytes(self.args or b"")
        if not is_there or lacks_args:
            print_once(
                f"{self.path.parent} was deleted or moved, or files in it: metrics.jsonl and args.json are written "
                "again, earlier checkpoints, images and logs are not"
            )

    def close(self) -> None:
        self.restore()
        self.file.close()


def plot_metrics(output_dir: Path) -> None:
    """Plots metrics.jsonl as loss.png: loss and learning rate, the run's checkpoints and the events of args.json; with
    held-out data its loss, how far the model moved from its base, and in words whether the run overfits."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    rows = read_metrics(output_dir / "metrics.jsonl")
    if not rows:
        return
    first_step = rows[0]["step"]
    last_step = rows[-1]["step"]
    held_out = held_out_lines(rows)  # a panel for each of its kinds, between loss and learning rate
    ratios = (3, *[2] * len(held_out), 1)
    figure, (upper, *middle, lower) = plt.subplots(
        len(ratios), 1, figsize=(8, 1.5 * sum(ratios)), sharex=True, height_ratios=ratios, layout="constrained"
    )
    summary = textwrap.fill(held_out_summary(held_out_losses(rows), first_step), 95)
    upper.set_title(output_dir.resolve().name)
    if summary:
        figure.suptitle(summary, fontsize="medium")
    plot_loss(upper, rows)
    for axes, (name, lines) in zip(middle, held_out.items(), strict=True):
        plot_held_out(axes, name, lines)
    plot_learning_rate(lower, rows)

    checkpoints = [int(folder.name.removeprefix("checkpoint-")) for folder in find_checkpoints(output_dir)]
    checkpoints = [step for step in checkpoints if first_step <= step <= last_step]
    if checkpoints:
        mark_checkpoints(upper, checkpoints)
    for i, (label, step) in enumerate(read_events(output_dir).items()):
        if first_step <= step < last_step:
            color = f"C{3 + i}"
            upper.axvline(step, color=color, linestyle="--", label=f"{label}, step {step}")
            lower.axvline(step, color=color, linestyle="--")
    handles = [*upper.get_legend_handles_labels()[0], *lower.get_legend_handles_labels()[0]]
    figure.legend(handles=handles, loc="outside lower center", ncols=3, frameon=False)
    with atomic_write(output_dir / "loss.png") as partial:
        figure.savefig(partial, dpi=100, format="png")
    plt.close(figure)


def plot_loss(axes: Any, rows: Sequence[Mapping[str, float]]) -> None:
    """The loss of each step, faint, and its running mean."""
    steps = [row["step"] for row in rows]
    losses = np.array([row["loss"] for row in rows], float)
    window = mean_window(len(rows))
    linewidth = 0.8 if len(rows) > 500 else 1.5
    axes.plot(steps, losses, color="C0", alpha=0.25, linewidth=linewidth, label="loss")
    axes.plot(steps, running_mean(losses, window), color="C0", linewidth=2, label=f"running mean of {window} steps")
    axes.set_ylabel("loss")
    finite = losses[np.isfinite(losses)]
    if len(finite) > 200:  # a few outliers would flatten the rest
        low, high = np.percentile(finite, (0, 99.5))
        margin = 0.05 * (high - low)
        axes.set_ylim(low - margin, high + margin)


def plot_held_out(axes: Any, name: str, lines: Mapping[str, Mapping[int, float]]) -> None:
    """What is computed on held-out examples, {"mean": {step: value}, "σ 0.1": ...}; of a loss, whose levels differ
    much, on a logarithmic scale with the lowest mean marked."""
    for i, (label, values) in enumerate(lines.items()):
        is_mean = label == "mean"
        style = {"color": "black", "linewidth": 2} if is_mean else {"color": f"C{i + 4}", "linewidth": 1}
        axes.plot(list(values), list(values.values()), marker=".", label=label, **style)
    if name == HELD_OUT["validation_loss"]:
        mean = lines.get("mean")  # None where a level was never finite
        if mean:
            best = min(mean, key=lambda step: mean[step])
            axes.plot(best, mean[best], marker="o", markersize=9, fillstyle="none", color="black")
        axes.set_yscale("log")
    axes.set_ylabel(name)
    axes.legend(ncols=len(lines), fontsize="x-small", frameon=False, loc="best")


def plot_learning_rate(axes: Any, rows: Sequence[Mapping[str, float]]) -> None:
    """The learning rate; of Prodigy its product with the estimate d, and d, on a logarithmic scale."""
    steps = [row["step"] for row in rows]
    learning_rates = [row["lr"] for row in rows]
    if "prodigy_d" in rows[-1]:
        axes.plot(steps, learning_rates, color="C1", linewidth=3, label="learning rate x d")
        estimates = [row.get("prodigy_d", math.nan) for row in rows]
        axes.plot(steps, estimates, color="black", label="Prodigy's d")
        axes.set_yscale("log")
    else:
        axes.plot(steps, learning_rates, color="C1", label="learning rate")
    axes.set(xlabel="step", ylabel="learning rate")
    axes.xaxis.get_major_locator().set_params(integer=True)


def mark_checkpoints(axes: Any, checkpoints: Sequence[int]) -> None:
    """A line at each checkpoint's step; about eight of them are labelled, counted from the last."""
    labelled = checkpoints[:: -max(1, len(checkpoints) // 8)]
    labels = [str(step) if step in labelled else "" for step in checkpoints]
    ticks = axes.secondary_xaxis("top")
    ticks.set_xticks(checkpoints, labels, color="0.4")
    ticks.set_xlabel("checkpoints", color="0.4")
    for step in checkpoints:
        axes.axvline(step, color="0.85", linewidth=0.8, zorder=0)


def read_events(output_dir: Path) -> dict[str, int]:
    """The events {label: step} that `start_logging` wrote to args.json."""
    try:
        return json.loads((output_dir / "args.json").read_text())["marks"]
    except (OSError, ValueError, TypeError, KeyError):
        return {}


# Entries of ModelSpec, by the flags --metadata_...
METADATA = ("title", "author", "description", "license", "tags", "usage_hint")

THUMBNAIL_SIZE = (256, 256)  # pixels at most, about 10 KB


def flux2_klein_architecture(config: Mapping[str, Any]) -> str:
    """The name in the header of a LoRA file of FLUX.2-klein, by its transformer's config: 4B has 24 heads, 9B 32."""
    return "Flux.2-klein-4b" if config["num_attention_heads"] <= 24 else "Flux.2-klein-9b"


def lora_header(
    args: Any,
    *,
    architecture: str,
    resolution: tuple[int, int],
    step: int,
    steps_per_epoch: int | None,
    trigger_words: Iterable[str] = (),
    captions: Mapping[str, Mapping[str, int]] | None = None,
) -> dict[str, str]:
    """The header by which Forge, ComfyUI's managers and Civitai describe a file: ModelSpec 1.0.1 and kohya's entries.

    `architecture` is the model's, such as flux-1-dev, `resolution` (width, height), `captions` {folder: {tag: count}}.
    `trigger_words` are what calls the trained subject in a prompt of these programs. There is no date in it: a run
    that is repeated or resumed ends in the same file.
    """
    name = args.output_name or args.output_dir.resolve().name
    width, height = resolution
    is_flux = architecture.startswith("flux-1")
    header = {
        "modelspec.sai_model_spec": "1.0.1",
        "modelspec.architecture": f"{architecture}/lora",
        "modelspec.implementation": "https://github.com/black-forest-labs/flux" if is_flux else "diffusers",
        "modelspec.title": name,
        "modelspec.resolution": f"{width}x{height}",
        "ss_output_name": name,
        "ss_base_model_version": "flux1" if is_flux else architecture,
        "ss_sd_model_name": Path(args.pretrained_model_name_or_path).name,
        "ss_steps": str(step),
    }
    if args.use_dora or args.lora_type == "lokr":  # as LyCORIS calls it: kohya's own module has neither
        network_args = {"algo": "lora", "dora_wd": "True"}
        if args.lora_type == "lokr":
            network_args = {"algo": "lokr", "factor": str(args.lokr_factor or -1)}
        header["ss_network_module"] = "lycoris.kohya"
        header["ss_network_args"] = json.dumps(network_args)
    elif is_flux:
        header["ss_network_module"] = "networks.lora_flux"
    if steps_per_epoch:
        header["ss_epoch"] = str(math.ceil(step / steps_per_epoch))
    if captions:
        header["ss_tag_frequency"] = json.dumps(captions)
    trigger_phrase = ", ".join(trigger_words)
    if trigger_phrase:
        header["modelspec.trigger_phrase"] = trigger_phrase
    for entry in METADATA:
        value = vars(args)[f"metadata_{entry}"]
        if value:
            header[f"modelspec.{entry}"] = value
    return header


def add_thumbnail(accelerator: Accelerator, files: Iterable[Path], image: Image.Image) -> None:
    """Puts an image into the header of LoRA files, small, where ModelSpec's readers look for what they show of a file.

    Their weights stay as they are. All processes call it, one on each disk writes.
    """
    if not writes_files(accelerator):
        return
    small = image.convert("RGB")
    small.thumbnail(THUMBNAIL_SIZE)
    jpeg = io.BytesIO()
    small.save(jpeg, format="JPEG")
    url = f"data:image/jpeg;base64,{base64.b64encode(jpeg.getvalue()).decode()}"
    for path in files:
        with safe_open(path, "pt") as file:
            header = file.metadata() or {}
        tensors = load_file(path)
        with atomic_write(path) as partial:
            save_file(tensors, partial, {**header, "modelspec.thumbnail": url})


def write_model_card(
    args: Any, text: str, tags: Sequence[str], base_model: str, trigger_words: Iterable[str] = (), **data: Any
) -> None:
    """README.md in the output folder: metadata for the hub, `text`, trigger words, validation images, settings.

    `data` is further metadata.
    """
    folder = args.output_dir
    sections = [text.strip()]
    trigger_words = list(trigger_words)
    if trigger_words:
        sections.append("## Trigger words\n\n" + "\n".join(f"- `{word}`" for word in trigger_words))
    grids = sorted((folder / "validation").glob("step-*.png"))
    if grids:
        sections.append("## Images")
        for grid in dict.fromkeys([grids[0], grids[-1]]):  # before and after training
            step = int(grid.stem.removeprefix("step-"))
            sections.append(f"Step {step}:\n\n![step {step}](validation/{grid.name})")
        example = {"text": args.validation_prompt or folder.name, "output": {"url": f"validation/{grids[-1].name}"}}
        data["widget"] = [example]
    sections.append("## Settings\n\nAll are in `args.json`.\n\n" + settings_table(args))

    local = Path(base_model).exists()  # the hub refuses a card whose base model is a folder
    metadata = ModelCardData(
        library_name="diffusers",
        tags=[*tags, "diffusers-training"],
        base_model=None if local else base_model,
        **data,
    )
    card = ModelCard(f"---\n{metadata.to_yaml()}\n---\n\n" + "\n\n".join(sections) + "\n")
    with atomic_write(folder / "README.md") as partial:
        card.save(partial)


def settings_table(args: Any) -> str:
    """The flags of SETTINGS as a table in Markdown."""
    rows = ["| flag | value |", "| --- | --- |"]
    for name in SETTINGS:
        value = vars(args).get(name)
        overridden = name == "num_train_epochs" and args.max_train_steps  # which wins
        if value is not None and not overridden:
            rows.append(f"| {name} | {value} |")
    return "\n".join(rows)


def check_trackers(args: Any) -> list[str]:
    """A problem of --report_to, where wandb would ask for a key that nobody can type."""
    if args.report_to not in ("wandb", "all") or os.environ.get("WANDB_MODE", "online") != "online":
        return []
    try:
        import wandb
        from wandb.errors import UsageError
    except ImportError:  # which another check says
        return []
    if sys.stdin.isatty():
        return []
    try:
        wandb.login()
    except UsageError:
        return [
            f"--report_to {args.report_to}: not logged in to wandb: run `wandb login`, set WANDB_MODE=offline, or "
            "give --report_to tensorboard"
        ]
    return []


def check_hub(args: Any) -> list[str]:
    """Problems of the flags for the hub."""
    problems = []
    if (args.hub_token or args.hub_model_id) and not args.push_to_hub:
        problems.append("--hub_token and --hub_model_id have no effect without --push_to_hub")
    token = args.hub_token or ""
    if " " in token or not token.isprintable():  # the hub's library would quote the token in its error
        problems.append("--hub_token: not a valid token, it contains spaces or line breaks")
    return problems


def create_hub_repo(accelerator: Accelerator, args: Any) -> str | None:
    """The id of the repository that --push_to_hub uploads to, created before training so that a wrong token shows.

    None without the flag, and in all processes but the main one. If the hub refuses it, all processes end.
    """
    if not args.push_to_hub:
        return None
    repo_id = None
    problems = []
    if accelerator.is_main_process:
        name = args.hub_model_id or args.output_dir.resolve().name
        try:
            repo_id = HfApi(token=args.hub_token).create_repo(name, exist_ok=True).repo_id
        except (HTTPError, OSError, ValueError) as error:
            problems.append(f"--push_to_hub: {error}")
    problems = gather_objects(problems)
    if problems:
        fail(accelerator, problems)
    return repo_id


def push_to_hub(args: Any, repo_id: str, unwanted: Sequence[str] = (), files_beside: Sequence[Path] = ()) -> None:
    """Uploads the output folder without checkpoints, results of shorter runs, logs and the patterns `unwanted`, and
    `files_beside` it."""
    ignored = ["checkpoint-*/**", "step-*/**", ".*", "*/.*", f"{args.logging_dir}/**", *unwanted]
    hub = HfApi(token=args.hub_token)
    try:
        hub.upload_folder(repo_id=repo_id, folder_path=args.output_dir, ignore_patterns=ignored)
        for path in files_beside:
            hub.upload_file(repo_id=repo_id, path_or_fileobj=path, path_in_repo=path.name)
    except (HTTPError, OSError, ValueError) as error:
        raise SystemExit(
            f"--push_to_hub: {error}\nNothing is lost. Try again: hf upload {repo_id} {args.output_dir}"
        ) from None


def finish(
    accelerator: Accelerator,
    args: Any,
    step: int,
    results: Mapping[str, str],
    command: str,
    hub_repo: str | None = None,
    unwanted: Sequence[str] = (),
    files_beside: Sequence[Path] = (),
) -> None:
    """Says where the results are and how to look at them, and uploads them.

    `results` {label: path in the output folder} are listed as far as they exist; `command` is one of examples/ that
    generates with them. `unwanted` and `files_beside` are as in `push_to_hub`.
    """
    if accelerator.is_main_process:
        remove_partial(args.output_dir, files_beside)
    found = {label: args.output_dir / name for label, name in results.items() if (args.output_dir / name).exists()}
    width = max([len("results"), *map(len, found)]) + 2  # nothing is found by a process that is ahead of the main one
    accelerator.print(f"Trained {step} steps. In {args.output_dir}:")
    for label, path in found.items():
        accelerator.print(f"  {label:{width}}{path}")
    examples = shlex.quote(str(Path(sys.argv[0]).parent / "examples"))
    accelerator.print(f"See how it went:\n  {python()} {examples}/report.py {shlex.quote(str(args.output_dir))}")
    accelerator.print(f"Generate with it:\n  {python()} {examples}/{command}")
    if hub_repo:
        push_to_hub(args, hub_repo, unwanted, files_beside)


def python() -> str:
    """The command that starts this interpreter: `python` if its environment is activated, else its path; or what
    whoever started a container says in PYTHON_COMMAND, a command of the machine that it runs on."""
    if "PYTHON_COMMAND" in os.environ:
        return os.environ["PYTHON_COMMAND"]
    found = shutil.which("python")
    if found and Path(found).parent == Path(sys.executable).parent:
        return "python"
    return shlex.quote(sys.executable)
