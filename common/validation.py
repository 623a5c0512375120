"""Sampling while training, without a trace in the training: images, grids, metrics, trackers."""

import importlib.metadata
import json
import math
import random
import resource
import sys
import textwrap
from contextlib import contextmanager, suppress
from pathlib import Path

import numpy as np
import torch
from accelerate.utils import gather_object
from PIL import Image, ImageDraw, ImageFont
from tqdm.auto import tqdm


@contextmanager
def undisturbed(*models, device):
    """Evaluation mode without gradients; afterwards all random states and each module's mode are as before."""
    modes = [(module, module.training) for model in models for module in model.modules()]
    python_state, numpy_state = random.getstate(), np.random.get_state()
    accelerators = [] if device.type == "cpu" else [device]
    try:
        with torch.no_grad(), torch.random.fork_rng(accelerators, device_type=device.type):
            for model in models:
                model.eval()
            yield
    finally:
        random.setstate(python_state)
        np.random.set_state(numpy_state)
        for module, mode in modes:
            module.training = mode


def generate_images(accelerator, pipeline, calls, *, seed, desc="Validation"):
    """One image per dictionary of pipeline arguments in `calls`, image i from a generator seeded with `seed` + i.

    The processes share the work; each returns all images, in order.
    """
    pipeline.set_progress_bar_config(disable=True)
    images = []
    with accelerator.split_between_processes(list(enumerate(calls))) as share, accelerator.autocast():
        for i, call in tqdm(share, desc=desc, unit="image", leave=False, disable=not accelerator.is_main_process):
            generator = torch.Generator().manual_seed(seed + i)  # on the CPU: the same image on every device
            images += pipeline(**call, generator=generator).images
    return gather_object(images)


def image_grid(images, captions, columns=4, min_width=192):
    """PIL images in rows of `columns`, each with its caption below; small ones are enlarged to `min_width` pixels."""
    scale = max(1, math.ceil(min_width / max(image.width for image in images)))
    images = [image.resize((image.width * scale, image.height * scale), Image.Resampling.NEAREST) for image in images]
    width, height = max(image.width for image in images), max(image.height for image in images)
    font_size = max(12, width // 24)
    captions = [textwrap.fill(caption, width=2 * width // font_size) for caption in captions]
    lines = max(caption.count("\n") + 1 for caption in captions)
    gap = font_size // 2
    cell_width, cell_height = width + gap, height + int(lines * font_size * 1.3) + gap
    columns = min(columns, len(images))
    grid = Image.new("RGB", (columns * cell_width + gap, -(-len(images) // columns) * cell_height + gap), "white")
    draw, font = ImageDraw.Draw(grid), ImageFont.load_default(font_size)
    for i, (image, caption) in enumerate(zip(images, captions, strict=True)):
        x, y = gap + i % columns * cell_width, gap + i // columns * cell_height
        grid.paste(image, (x, y))
        draw.multiline_text((x, y + height + gap // 2), caption, fill="black", font=font)
    return grid


def log_images(accelerator, images, captions, *, name, step):
    """Sends images with their captions to every tracker of the run."""
    for tracker in accelerator.trackers:
        if tracker.name == "tensorboard":
            tracker.log_images(
                {name: np.stack([np.asarray(image) for image in images])}, step=step, dataformats="NHWC"
            )
        elif tracker.name == "wandb":
            import wandb

            pictures = [wandb.Image(image, caption=text) for image, text in zip(images, captions, strict=True)]
            tracker.log({name: pictures}, step=step)


# ---------------------------------------------------------------------------------------------------------------------
# Logging
# ---------------------------------------------------------------------------------------------------------------------


def start_logging(accelerator, args, project):
    """Writes args.json with the versions of the libraries, and starts the trackers under the name of `project`."""
    values = {name: value for name, value in vars(args).items() if name != "hub_token"}
    values = {name: str(value) if isinstance(value, Path) else value for name, value in values.items()}
    if accelerator.is_main_process:
        libraries = ("torch", "diffusers", "transformers", "peft", "accelerate")
        versions = {name: importlib.metadata.version(name) for name in libraries}
        text = json.dumps({"args": values, "versions": versions}, indent=2, default=str)
        (args.output_dir / "args.json").write_text(text + "\n")
    if accelerator.log_with:
        if token := getattr(args, "hub_token", None):  # wandb keeps the command
            sys.argv = [word.replace(token, "***") for word in sys.argv]
        values = {name: "" if value is None else value for name, value in values.items()}
        plain = (bool, int, float, str)  # all that TensorBoard takes
        accelerator.init_trackers(project, {n: v if isinstance(v, plain) else str(v) for n, v in values.items()})


def peak_memory(device):
    """Most memory in use so far, in GiB: the accelerator's, or the process' on a CPU."""
    if device.type == "cpu":
        unit = 2**10 if sys.platform == "linux" else 1  # macOS counts bytes
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30
    return torch.accelerator.max_memory_allocated(device) / 2**30


def open_metrics(path, last_step):
    """Opens the run's metrics, a JSON object per line, to be continued after `last_step`; later lines are dropped."""
    kept = [row for row in read_metrics(path) if row["step"] <= last_step]
    path.write_text("".join(json.dumps(row) + "\n" for row in kept))
    return path.open("a", buffering=1)


def read_metrics(path):
    """The rows of a file of metrics; lines that a crash of the machine left torn are passed over."""
    rows = []
    for line in path.read_text(errors="replace").splitlines() if path.exists() else []:
        with suppress(ValueError, TypeError, KeyError, RecursionError):
            row = json.loads(line)
            rows += [row] if {type(row[name]) for name in ("step", "loss", "lr")} <= {int, float} else []
    return rows


def log_step(accelerator, progress_bar, metrics, step, logs):
    """Sends one step's numbers to the progress bar, the trackers and, on the main process, `open_metrics`' file."""
    progress_bar.update()
    progress_bar.set_postfix({name: f"{logs[name]:.3g}" for name in ("loss", "lr", "images_per_second")})
    accelerator.log(logs, step=step)
    if metrics:
        metrics.write(json.dumps({"step": step, **logs}) + "\n")


def plot_metrics(metrics_path, picture_path, title):
    """Draws loss (faint) and its running mean, with the learning rate below, over the steps of `metrics_path`."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    rows = read_metrics(metrics_path)
    if not rows:
        return
    steps, losses = [row["step"] for row in rows], np.array([row["loss"] for row in rows])
    decay = 1 - 1 / max(1, min(50, len(rows) // 10))
    smooth = [losses[0]]
    for loss in losses[1:]:
        smooth.append(decay * smooth[-1] + (1 - decay) * loss if math.isfinite(loss) else smooth[-1])
    figure, (upper, lower) = plt.subplots(
        2, 1, figsize=(8, 6), sharex=True, height_ratios=(3, 1), layout="constrained"
    )
    upper.plot(steps, losses, alpha=0.25)
    upper.plot(steps, smooth, color="C0", label="loss, running mean")
    upper.set(title=title, ylabel="loss")
    upper.legend()
    lower.plot(steps, [row["lr"] for row in rows], color="C1")
    lower.set(xlabel="step", ylabel="learning rate")
    figure.savefig(picture_path, dpi=100)
    plt.close(figure)
