"""Sampling while training, which leaves no trace in the training; class images; grids of images."""

import math
import random
import tempfile
import textwrap
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

from common.checkpoints import atomic_write, interruption, stop_agreed, writing
from common.flow_matching import step_generator
from common.models import gather_objects, is_sharded

import numpy as np
import torch
from accelerate import Accelerator
from PIL import Image, ImageDraw, ImageFont
from PIL.PngImagePlugin import PngInfo
from tqdm.auto import tqdm


@contextmanager
def undisturbed(*models: torch.nn.Module, device: torch.device) -> Iterator[None]:
    """Evaluation mode without gradients; afterwards all random states and each module's mode are as before."""
    modes = [(module, module.training) for model in models for module in model.modules()]
    python_state = random.getstate()
    numpy_state = np.random.get_state()
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


def generate_images(
    accelerator: Accelerator, pipeline: Any, calls: Sequence[Mapping[str, Any]], *, seed: int
) -> list[Image.Image]:
    """One image per dictionary of pipeline arguments in `calls`, image i from a generator seeded with `seed` + i.

    The processes share the images; with a sharded model, which needs all processes for each image, they generate the
    same ones together. Each process returns all images, in order; none if a signal came before the last.
    """
    pipeline.set_progress_bar_config(disable=True)
    numbered = list(enumerate(calls))
    sharded = is_sharded(pipeline.transformer)
    sharing: Any = nullcontext(numbered) if sharded else accelerator.split_between_processes(numbered)
    quiet = not accelerator.is_main_process
    images = []
    with sharing as share, accelerator.autocast():
        for i, arguments in tqdm(share, desc="Validation", unit="image", leave=False, disable=quiet):
            if stop_agreed(accelerator) if sharded else interruption.is_requested():
                break
            generator = torch.Generator().manual_seed(seed + i)  # on the CPU: the same noise on every device
            images += pipeline(**arguments, generator=generator).images
    images = images if sharded else gather_objects(images)
    return images if len(images) == len(calls) else []


def generate_class_images(
    accelerator: Accelerator,
    pipeline: Any,
    pipeline_call: Callable[[list[str]], Mapping[str, Any]],
    *,
    prompts: list[str],
    model: str,
    folder: Path,
    num_images: int,
    num_present: int,
    batch_size: int,
    seed: int,
    precision: str | None = None,
) -> None:
    """Generates class images for prior preservation, until `folder`, which holds `num_present`, has `num_images`.

    `pipeline_call` returns the pipeline's arguments for a batch of prompts; `precision` is fp16, bf16 or that of
    training. The PNG files say for which prompt and by which model they were drawn, see data.py's
    `check_class_images`. Image i depends on (seed, i) and its prompt alone, the prompts being taken in turn, and is
    written whole or not at all, so an interrupted run continues where it was. A batch with one missing image is
    generated as a whole, because rounding depends on the batch size.
    """
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / f"class-{i:05d}.png" for i in range(num_images)]
    missing = [path for path in paths if not path.exists()]
    missing = set(missing[: num_images - num_present])
    batches = []
    for start in range(0, num_images, batch_size):
        batch = range(start, min(start + batch_size, num_images))
        if any(paths[i] in missing for i in batch):
            batches.append(batch)
    accelerator.wait_for_everyone()  # every process has listed what is missing

    pipeline.set_progress_bar_config(disable=True)
    device = accelerator.device
    autocast = accelerator.autocast()
    dtypes = {"fp16": torch.float16, "bf16": torch.bfloat16}
    if precision in dtypes:
        autocast = torch.autocast(device.type, dtypes[precision])
    sharing: Any = accelerator.split_between_processes(batches)
    quiet = not missing or not accelerator.is_main_process
    with undisturbed(pipeline.transformer, device=device), autocast, sharing as share:
        for batch in tqdm(share, desc="Generating class images", unit="batch", disable=quiet):
            generators = [step_generator(seed, i) for i in batch]
            batch_prompts = [prompts[i % len(prompts)] for i in batch]
            images = pipeline(**pipeline_call(batch_prompts), generator=generators).images
            for i, prompt, image in zip(batch, batch_prompts, images, strict=True):
                if paths[i] in missing:
                    texts = PngInfo()
                    texts.add_text("class_prompt", prompt)
                    texts.add_text("class_model", model)
                    with atomic_write(paths[i]) as partial:
                        image.save(partial, format="PNG", pnginfo=texts)
    accelerator.wait_for_everyone()


def save_images(
    accelerator: Accelerator,
    args: Any,
    images: Sequence[Image.Image],
    captions: Sequence[str],
    *,
    step: int,
    prompt: str = "",
    columns: int = 4,
    grid: Image.Image | None = None,
    weights_of: int | None = None,
) -> None:
    """Writes the images as a grid to validation/step-N.png and sends them to the trackers.

    `prompt` is that of all images, `captions` say what differs; `grid` replaces the usual one. `weights_of` is the
    step whose weights have drawn them, if it is another one.
    """
    if not accelerator.is_main_process:
        return
    if grid is None:
        grid = image_grid(images, captions, columns, title=f"{prompt}\n{step_title(step, weights_of)}")
    with atomic_write(args.output_dir / "validation" / f"step-{step:06d}.png") as partial:
        grid.save(partial, format="PNG")
    prefix = f"{prompt} | " if prompt else ""
    captions = [f"{prefix}{caption}, {step_title(step, weights_of)}" for caption in captions]
    with writing(args.output_dir / args.logging_dir):
        folder = args.output_dir / "validation"
        log_images(accelerator, images, captions, name="validation", step=step, grid=grid, folder=folder)


def step_title(step: int, weights_of: int | None) -> str:
    """The step at which images were drawn, in words, with the one whose weights they show if it is another one."""
    return f"step {step}, weights of step {weights_of}" if weights_of else f"step {step}"


def log_images(
    accelerator: Accelerator,
    images: Sequence[Image.Image],
    captions: Sequence[str],
    *,
    name: str,
    step: int,
    grid: Image.Image,
    folder: Path,
) -> None:
    """Sends images with their captions to every tracker; TensorBoard has no captions and gets the grid and a list.

    `folder` is where files may be written on the way.
    """
    for tracker in accelerator.trackers:
        if tracker.name == "tensorboard":
            tracker.log_images({name: np.asarray(grid)[None]}, step=step, dataformats="NHWC")
            tracker.log({name: "\n".join(f"1. {caption}" for caption in captions)}, step=step)
        elif tracker.name == "wandb":
            import wandb

            # given an image, wandb would write its file to the system's temporary folder, on another disk
            with tempfile.TemporaryDirectory(prefix=".", dir=folder) as temporary:
                captioned = []
                for i, (image, text) in enumerate(zip(images, captions, strict=True)):
                    image.save(Path(temporary) / f"{i}.png")
                    captioned.append(wandb.Image(str(Path(temporary) / f"{i}.png"), caption=text))
                tracker.log({name: captioned}, step=step)


def image_grid(
    images: Sequence[Image.Image], captions: Sequence[str], columns: int = 4, min_width: int = 192, title: str = ""
) -> Image.Image:
    """Images in rows of `columns`, each with its caption below, under a title; small ones are enlarged so that the
    widest has `min_width` pixels or more."""
    scale = max(1, math.ceil(min_width / max(image.width for image in images)))
    images = [image.resize((image.width * scale, image.height * scale), Image.Resampling.NEAREST) for image in images]
    width = max(image.width for image in images)
    height = max(image.height for image in images)
    columns = min(columns, len(images))
    rows = math.ceil(len(images) / columns)

    font = caption_font(size=max(13, width // 28))
    gap = int(font.size) // 2
    captions = [wrap(caption, font, width) for caption in captions]
    title = wrap(title, font, columns * (width + gap) - gap)
    title_height = text_height(title, font, gap)
    caption_height = max(text_height(caption, font, gap) for caption in captions)
    cell_width = width + gap
    cell_height = height + caption_height + gap
    top = title_height + gap

    grid = Image.new("RGB", (columns * cell_width + gap, rows * cell_height + top), "white")
    canvas = ImageDraw.Draw(grid)
    spacing = int(font.size) // 4
    canvas.multiline_text((gap, gap // 2), title, fill="black", font=font, spacing=spacing)
    for i, (image, caption) in enumerate(zip(images, captions, strict=True)):
        row, column = divmod(i, columns)
        x = gap + column * cell_width
        y = top + row * cell_height
        grid.paste(image, (x, y))
        canvas.multiline_text((x, y + height + gap // 2), caption, fill="#444444", font=font, spacing=spacing)
    return grid


def caption_font(size: int) -> ImageFont.FreeTypeFont:
    """DejaVu Sans, which comes with matplotlib."""
    import matplotlib

    return ImageFont.truetype(Path(matplotlib.get_data_path()) / "fonts" / "ttf" / "DejaVuSans.ttf", size)


def text_height(text: str, font: ImageFont.FreeTypeFont, gap: int) -> int:
    """The height in pixels of wrapped text and the gap below it; 0 without text."""
    if not text:
        return 0
    canvas = ImageDraw.Draw(Image.new("RGB", (1, 1)))
    bottom = canvas.multiline_textbbox((0, 0), text, font=font, spacing=int(font.size) // 4)[3]
    return math.ceil(bottom) + gap


def wrap(text: str, font: Any, width: int) -> str:
    """The text in lines of at most `width` pixels, broken at spaces, or within a word that is wider."""
    lines = []
    for paragraph in text.splitlines():
        wrapped = []
        most_characters = min(len(paragraph), int(width / font.getlength("i")))
        for num_characters in range(max(1, most_characters), 0, -1):
            wrapped = textwrap.wrap(paragraph, num_characters)
            if all(font.getlength(line) <= width for line in wrapped):
                break
        lines += wrapped or [""]
    return "\n".join(lines)
