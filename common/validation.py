"""Sampling while training, without a trace in the training; class images; grids."""

import math
import random
from contextlib import contextmanager, nullcontext
from pathlib import Path

from common.checkpoints import atomic_write, writing
from common.flow_matching import step_generator
from common.models import is_sharded

import numpy as np
import torch
from accelerate.utils import gather_object
from diffusers import FlowMatchEulerDiscreteScheduler
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


def generate_images(accelerator, pipeline, calls, *, seed):
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
        quiet = not accelerator.is_main_process
        for i, call in tqdm(share, desc="Validation", unit="image", leave=False, disable=quiet):
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
                    with atomic_write(path) as partial:
                        image.save(partial, format="PNG")
    accelerator.wait_for_everyone()


def save_images(accelerator, args, images, captions, *, step, prompt="", columns=4, grid=None):
    """Sends pictures to validation/step-N.png, there as `grid` if given, and to the trackers.

    `prompt` is that of all of them, `captions` say what differs.
    """
    if accelerator.is_main_process:
        path = args.output_dir / "validation" / f"step-{step:06d}.png"
        grid = grid or image_grid(images, captions, columns, title=f"{prompt}\nstep {step}")
        with atomic_write(path) as partial:
            grid.save(partial, format="PNG")
        captions = [f"{prompt} | {caption}, step {step}".removeprefix(" | ") for caption in captions]
        with writing(args.output_dir / args.logging_dir):
            log_images(accelerator, images, captions, name="validation", step=step, grid=grid)


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
