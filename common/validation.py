"""Sampling while training, without a trace in the training: images, grids, metrics, trackers."""

import errno
import importlib.metadata
import json
import math
import os
import random
import resource
import sys
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

from common.flow_matching import step_generator
from common.lora import find_checkpoints, is_sharded, writing


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


def wrap(text, font, width):
    """The text in lines of at most `width` pixels, broken at spaces or within words that are wider."""
    lines = []
    for paragraph in text.splitlines() or [""]:
        line = ""
        for word in paragraph.split():
            if line and font.getlength(f"{line} {word}") > width:
                lines.append(line)
                line = ""
            line = f"{line} {word}" if line else word
            while len(line) > 1 and font.getlength(line) > width:
                fits = next(n for n in range(len(line) - 1, 0, -1) if n == 1 or font.getlength(line[:n]) <= width)
                lines.append(line[:fits])
                line = line[fits:]
        lines.append(line)
    return "\n".join(lines)


def image_grid(images, captions, columns=4, min_width=192, title=""):
    """PIL images in rows of `columns`, each with its caption below, under a title; small ones are enlarged to
    `min_width` pixels."""
    import matplotlib

    scale = max(1, math.ceil(min_width / max(image.width for image in images)))
    images = [image.resize((image.width * scale, image.height * scale), Image.Resampling.NEAREST) for image in images]
    width, height = max(image.width for image in images), max(image.height for image in images)
    font_size = max(13, width // 28)
    gap, columns = font_size // 2, min(columns, len(images))
    font = ImageFont.truetype(Path(matplotlib.get_data_path()) / "fonts" / "ttf" / "DejaVuSans.ttf", font_size)
    draw = ImageDraw.Draw(Image.new("RGB", (1, 1)))
    style = {"font": font, "spacing": font_size // 4}
    tall = lambda text: math.ceil(draw.multiline_textbbox((0, 0), text, **style)[3]) + gap if text else 0  # noqa: E731
    captions = [wrap(caption, font, width) for caption in captions]
    cell_width, cell_height = width + gap, height + max(map(tall, captions)) + gap
    title = wrap(title, font, columns * cell_width - gap)
    top = tall(title) + gap
    grid = Image.new("RGB", (columns * cell_width + gap, -(-len(images) // columns) * cell_height + top), "white")
    draw = ImageDraw.Draw(grid)
    draw.multiline_text((gap, gap // 2), title, fill="black", **style)
    for i, (image, caption) in enumerate(zip(images, captions, strict=True)):
        x, y = gap + i % columns * cell_width, top + i // columns * cell_height
        grid.paste(image, (x, y))
        draw.multiline_text((x, y + height + gap // 2), caption, fill="#444444", **style)
    return grid


def log_images(accelerator, images, captions, *, name, step, grid):
    """Sends images with their captions to every tracker of the run; TensorBoard, which has none, gets the grid."""
    for tracker in accelerator.trackers:
        if tracker.name == "tensorboard":
            tracker.log_images({name: np.asarray(grid)[None]}, step=step, dataformats="NHWC")
            tracker.log({name: "\n".join(f"1. {caption}" for caption in captions)}, step=step)
        elif tracker.name == "wandb":
            import wandb

            pictures = [wandb.Image(image, caption=text) for image, text in zip(images, captions, strict=True)]
            tracker.log({name: pictures}, step=step)


def save_images(accelerator, args, images, captions, *, step, prompt="", columns=4, grid=None):
    """Sends pictures to validation/step-N.png, there as `grid` if given, and to the trackers.

    `prompt` is that of all of them, `captions` say what differs.
    """
    if accelerator.is_main_process:
        path = args.output_dir / "validation" / f"step-{step:06d}.png"
        grid = grid or image_grid(images, captions, columns, title=f"{prompt}\nstep {step}")
        with writing(path):
            path.parent.mkdir(exist_ok=True)
            grid.save(path)
        captions = [f"{prompt} | {caption}, step {step}".removeprefix(" | ") for caption in captions]
        with writing(args.output_dir / args.logging_dir):
            log_images(accelerator, images, captions, name="validation", step=step, grid=grid)


# ---------------------------------------------------------------------------------------------------------------------
# Logging
# ---------------------------------------------------------------------------------------------------------------------


def start_logging(accelerator, args, project, last_step, marks=None):
    """Writes args.json with the versions of the libraries, and starts the trackers under the name of `project`.

    What TensorBoard has of steps after `last_step`, from which the run goes on, is dropped as by `open_metrics`.
    `marks` are {what happens: the step after which it does}, 0 for never, for plots.
    """
    values = {name: value for name, value in vars(args).items() if name != "hub_token"}
    values = {name: str(value) if isinstance(value, Path) else value for name, value in values.items()}
    if accelerator.is_main_process:
        libraries = ("torch", "diffusers", "transformers", "peft", "accelerate")
        versions = {name: importlib.metadata.version(name) for name in libraries}
        marks = {what: step for what, step in (marks or {}).items() if step}
        text = json.dumps({"args": values, "versions": versions, "marks": marks}, indent=2, default=str)
        with writing(args.output_dir / "args.json"):
            (args.output_dir / "args.json").write_text(text + "\n")
    if accelerator.log_with:
        if token := getattr(args, "hub_token", None):  # wandb keeps the command
            sys.argv = [word.replace(token, "***") for word in sys.argv]
        values = {name: "" if value is None else value for name, value in values.items()}
        plain = (bool, int, float, str)  # all that TensorBoard takes
        with writing(args.output_dir / args.logging_dir):
            config = {n: v if isinstance(v, plain) else str(v) for n, v in values.items()}
            purge = {"tensorboard": {"purge_step": last_step + 1}} if last_step else {}
            accelerator.init_trackers(project, config, init_kwargs=purge)


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


def learning_rates(optimizer):
    """lr, what a step is multiplied with; of Prodigy, whose lr is a factor of its estimate d, also that d."""
    group = optimizer.param_groups[0]
    return {"lr": group["lr"] * group["d"], "prodigy_d": group["d"]} if "d" in group else {"lr": group["lr"]}


def running_mean(values, window):
    """The exponential mean of about `window` values before each; those that are not finite are passed over."""
    decay, mean, weight, means = 1 - 1 / window, 0.0, 0.0, []
    for value in values:
        if math.isfinite(value):
            mean, weight = decay * mean + (1 - decay) * value, decay * weight + 1 - decay
        means.append(mean / weight if weight else math.nan)
    return means


def plot_metrics(output_dir):
    """Draws loss.png from metrics.jsonl: the loss (faint) and its running mean over the learning rate, and with lines
    the checkpoints that are there and what args.json marks."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    rows, marks = read_metrics(output_dir / "metrics.jsonl"), {}
    if not rows:
        return
    with suppress(OSError, ValueError, TypeError, KeyError):
        marks = json.loads((output_dir / "args.json").read_text())["marks"]
    steps, losses = [row["step"] for row in rows], np.array([row["loss"] for row in rows], float)
    figure, (upper, lower) = plt.subplots(
        2, 1, figsize=(8, 6), sharex=True, height_ratios=(3, 1), layout="constrained"
    )
    window = max(1, min(50, len(rows) // 10))
    mean = running_mean(losses, window)
    upper.plot(steps, losses, color="C0", alpha=0.25, linewidth=0.8 if len(rows) > 500 else 1.5, label="loss")
    upper.plot(steps, mean, color="C0", linewidth=2, label=f"running mean of {window} steps")
    shown = losses[np.isfinite(losses)]
    if len(shown) > 200:  # a few outliers would flatten the rest
        low, high = np.percentile(shown, (0, 99.5))
        upper.set_ylim(low - 0.05 * (high - low), high + 0.05 * (high - low))
    upper.set(title=output_dir.resolve().name, ylabel="loss")
    checkpoints = [int(folder.name[11:]) for folder in find_checkpoints(output_dir)]
    checkpoints = [step for step in checkpoints if steps[0] <= step <= steps[-1]]
    if checkpoints:
        named = checkpoints[:: -max(1, len(checkpoints) // 8)]  # from the last one
        ticks = upper.secondary_xaxis("top")
        ticks.set_xticks(checkpoints, [step if step in named else "" for step in checkpoints], color="0.4")
        ticks.set_xlabel("checkpoints", color="0.4")
        for step in checkpoints:
            upper.axvline(step, color="0.85", linewidth=0.8, zorder=0)
    for i, (what, step) in enumerate(marks.items()):
        if steps[0] <= step < steps[-1]:
            lower.axvline(step, color=f"C{3 + i}", linestyle="--")
            upper.axvline(step, color=f"C{3 + i}", linestyle="--", label=f"{what}, step {step}")
    prodigy = "prodigy_d" in rows[-1]
    name, width = ("learning rate x d", 3) if prodigy else ("learning rate", 1.5)
    lower.plot(steps, [row["lr"] for row in rows], color="C1", linewidth=width, label=name)
    if prodigy:
        lower.plot(steps, [row.get("prodigy_d", math.nan) for row in rows], color="black", label="Prodigy's d")
    lower.set(xlabel="step", ylabel="learning rate", yscale="log" if prodigy else "linear")
    lower.xaxis.get_major_locator().set_params(integer=True)
    figure.legend(loc="outside lower center", ncols=3, frameon=False)
    with writing(output_dir / "loss.png"):
        figure.savefig(output_dir / "loss.png", dpi=100)
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


def create_hub_repo(args):
    """The id of the repository that --push_to_hub uploads to, made now so that a wrong token shows before training."""
    name = args.hub_model_id or args.output_dir.resolve().name
    return HfApi(token=args.hub_token).create_repo(name, exist_ok=True).repo_id


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
