"""Sampling while training, without a trace in the training: images, grids, metrics, trackers."""

import errno
import importlib.metadata
import json
import math
import os
import random
import resource
import sys
import textwrap
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path

import numpy as np
import torch
from accelerate.utils import gather_object
from diffusers import FlowMatchEulerDiscreteScheduler
from huggingface_hub import HfApi, ModelCard, ModelCardData
from huggingface_hub.errors import HTTPError
from PIL import Image, ImageDraw, ImageFont
from tqdm.auto import tqdm

from common import fail
from common.flow_matching import step_generator
from common.lora import is_sharded, writing


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


def sampling_pipeline(pipeline_class, transformer, vae, noise_scheduler):
    """A pipeline around the models in training, without text encoders and with a scheduler of its own."""
    return pipeline_class(
        scheduler=FlowMatchEulerDiscreteScheduler.from_config(noise_scheduler.config),
        vae=vae,
        text_encoder=None,
        tokenizer=None,
        text_encoder_2=None,
        tokenizer_2=None,
        transformer=transformer,
    )


def generate_images(accelerator, pipeline, calls, *, seed, desc="Validation"):
    """One image per dictionary of pipeline arguments in `calls`, image i from a generator seeded with `seed` + i.

    The processes share the work, but for a sharded model, which needs all of them for each image; each process
    returns all images, in order.
    """
    sharded = is_sharded(pipeline.transformer)
    pipeline.set_progress_bar_config(disable=True)
    images = []
    numbered = list(enumerate(calls))
    sharing = nullcontext(numbered) if sharded else accelerator.split_between_processes(numbered)
    with sharing as share, accelerator.autocast():
        for i, call in tqdm(share, desc=desc, unit="image", leave=False, disable=not accelerator.is_main_process):
            generator = torch.Generator().manual_seed(seed + i)  # on the CPU: the same image on every device
            images += pipeline(**call, generator=generator).images
    return images if sharded else gather_object(images)


def draw_class_images(accelerator, pipeline, call, args, present):
    """Fills --class_data_dir up to --num_class_images with what the untrained model draws, where `present`
    pictures are already; `call` are the pipeline's arguments for --class_prompt.

    Image i comes from (seed, i) and appears whole or not at all: an interrupted run goes on where it was. A batch is
    drawn as a whole also for one absent image, for rounding depends on the size of a batch.
    """
    args.class_data_dir.mkdir(parents=True, exist_ok=True)
    paths = [args.class_data_dir / f"class-{i:05d}.png" for i in range(args.num_class_images)]
    absent = [path for path in paths if not path.exists()]
    absent = set(absent[: args.num_class_images - present])
    batches = [range(len(paths))[i : i + args.sample_batch_size] for i in range(0, len(paths), args.sample_batch_size)]
    batches = [batch for batch in batches if any(paths[i] in absent for i in batch)]
    accelerator.wait_for_everyone()  # all have listed what is absent
    dtype = {"fp16": torch.float16, "bf16": torch.bfloat16}.get(args.prior_generation_precision)
    device = accelerator.device
    pipeline.set_progress_bar_config(disable=True)
    precision = torch.autocast(device.type, dtype) if dtype else accelerator.autocast()
    quiet = not absent or not accelerator.is_main_process
    sharing = accelerator.split_between_processes(batches)
    with undisturbed(pipeline.transformer, device=device), precision, sharing as share:
        for batch in tqdm(share, desc="Drawing class images", unit="batch", disable=quiet):
            generators = [step_generator(args.seed, i) for i in batch]
            images = pipeline(**call, num_images_per_prompt=len(batch), generator=generators).images
            for path, image in zip([paths[i] for i in batch], images, strict=True):
                if path in absent:
                    partial = path.with_suffix(".partial")
                    with writing(path, partial):
                        image.save(partial, format="PNG")
                        partial.replace(path)
    accelerator.wait_for_everyone()


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


def save_images(accelerator, args, images, captions, *, step, grid=None):
    """Sends pictures with their captions to validation/step-N.png, there as `grid` if given, and to the trackers."""
    if accelerator.is_main_process:
        path = args.output_dir / "validation" / f"step-{step:06d}.png"
        with writing(path):
            path.parent.mkdir(exist_ok=True)
            (grid or image_grid(images, captions)).save(path)
        with writing(args.output_dir / args.logging_dir):
            log_images(accelerator, images, captions, name="validation", step=step)


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
        with writing(args.output_dir / "args.json"):
            (args.output_dir / "args.json").write_text(text + "\n")
    if accelerator.log_with:
        if token := getattr(args, "hub_token", None):  # wandb keeps the command
            sys.argv = [word.replace(token, "***") for word in sys.argv]
        values = {name: "" if value is None else value for name, value in values.items()}
        plain = (bool, int, float, str)  # all that TensorBoard takes
        with writing(args.output_dir / args.logging_dir):
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
    partial = path.with_name(f".{path.name}.partial")
    with writing(path, partial):
        partial.write_text("".join(json.dumps(row) + "\n" for row in kept))
        partial.replace(path)
    return path.open("ab", buffering=0)  # what a full disk does not take is not kept to be tried again at the end


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
    with writing(accelerator.logging_dir or "."):
        accelerator.log(logs, step=step)
    if metrics:
        line = (json.dumps({"step": step, **logs}) + "\n").encode()
        with writing(metrics.name):
            if metrics.write(line) < len(line):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


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
    with writing(picture_path):
        figure.savefig(picture_path, dpi=100)
    plt.close(figure)


# ---------------------------------------------------------------------------------------------------------------------
# What the run leaves behind
# ---------------------------------------------------------------------------------------------------------------------


def save_model_card(args, text, tags, base_model, **data):
    """README.md in the output folder: `text`, under the header that the hub reads."""
    base_model = None if Path(base_model).exists() else base_model  # the hub refuses cards with a folder here
    tags = [*tags, "diffusers-training"]
    metadata = ModelCardData(library_name="diffusers", tags=tags, base_model=base_model, **data)
    with writing(args.output_dir / "README.md"):
        ModelCard(f"---\n{metadata.to_yaml()}\n---\n\n{text.strip()}\n").save(args.output_dir / "README.md")


def check_hub(args):
    """Problems of the flags for the hub."""
    problems, token = [], args.hub_token or ""
    if (args.hub_token or args.hub_model_id) and not args.push_to_hub:
        problems.append("--hub_token and --hub_model_id have no effect without --push_to_hub")
    if " " in token or not token.isprintable():  # the library's errors would show it
        problems.append("--hub_token: is no token, for it has spaces or line ends")
    return problems


def create_hub_repo(accelerator, args):
    """The id of the repository that --push_to_hub uploads to, made now so that a wrong token shows before training.

    None without the flag, and in all processes but the main one.
    """
    if not (args.push_to_hub and accelerator.is_main_process):
        return None
    try:
        name = args.hub_model_id or args.output_dir.resolve().name
        return HfApi(token=args.hub_token).create_repo(name, exist_ok=True).repo_id
    except (HTTPError, OSError, ValueError) as error:
        fail(accelerator, [f"--push_to_hub: {error}"])


def push_to_hub(args, repo_id, unwanted=(), beside=None):
    """Uploads the output folder, without checkpoints, logs and what is `unwanted` (patterns), and a file beside it."""
    hub, unwanted = HfApi(token=args.hub_token), ["checkpoint-*/**", ".*", f"{args.logging_dir}/**", *unwanted]
    try:
        hub.upload_folder(repo_id=repo_id, folder_path=args.output_dir, ignore_patterns=unwanted)
        if beside:
            hub.upload_file(repo_id=repo_id, path_or_fileobj=beside, path_in_repo=beside.name)
    except (HTTPError, OSError, ValueError) as error:
        raise SystemExit(
            f"--push_to_hub: {error}\nNothing is lost. Try again: hf upload {repo_id} {args.output_dir}"
        ) from None


def print_results(accelerator, args, step, results):
    """What lies where: results {what: path in the output folder}, as far as they are there."""
    files = {what: args.output_dir / name for what, name in results.items() if (args.output_dir / name).exists()}
    accelerator.print(f"Trained {step} steps. In {args.output_dir}:")
    width = max([7, *map(len, files)]) + 2
    accelerator.print("\n".join(f"  {what:{width}}{path}" for what, path in files.items()))
