"""Sampling while training, which leaves no trace in the training; its prompts; class images; grids of images."""

import argparse
import json
import math
import random
import re
import tempfile
import textwrap
import tomllib
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from common.arguments import expanded_path, image_seed, in_range, non_negative_float
from common.checkpoints import atomic_write, interruption, stop_agreed, writing
from common.data import first_ten, read_lines, read_text, visible
from common.flow_matching import step_generator
from common.lora import scaled_adapters
from common.models import gather_objects, is_sharded, own_items
from common.placement import decodes_in_tiles

import numpy as np
import torch
from accelerate import Accelerator
from PIL import Image, ImageDraw, ImageFont
from PIL.PngImagePlugin import PngInfo
from tqdm.auto import tqdm


@contextmanager
def undisturbed(*models: torch.nn.Module, device: torch.device) -> Iterator[None]:
    """Evaluation mode without gradients; afterwards all random states and each module's mode are as before.

    What is compiled runs uncompiled: each size of an image that is drawn would be compiled for.
    """
    modes = [(module, module.training) for model in models for module in model.modules()]
    is_compiled = any(module._compiled_call_impl is not None for module, _ in modes)
    uncompiled: Any = torch.compiler.set_stance("force_eager") if is_compiled else nullcontext()
    python_state = random.getstate()
    numpy_state = np.random.get_state()
    accelerators = [] if device.type == "cpu" else [device]
    try:
        with torch.no_grad(), uncompiled, torch.random.fork_rng(accelerators, device_type=device.type):
            for model in models:
                model.eval()
            yield
    finally:
        random.setstate(python_state)
        np.random.set_state(numpy_state)
        for module, mode in modes:
            module.training = mode


@dataclass(frozen=True)
class ValidationPrompt:
    """An image to generate at each validation; where a value is None, it is the trainer's own.

    width, height     in pixels
    seed              of the image's noise
    guidance_scale    what the guidance embedding is given
    true_cfg_scale    of classifier-free guidance away from `negative_prompt`, at twice the time; above 1
    lora_scale        the strength of the adapter, 1 as it is trained
    image, mask       the images that the result is made from, for trainers that have some
    """

    prompt: str
    width: int | None = None
    height: int | None = None
    seed: int | None = None
    num_inference_steps: int | None = None
    guidance_scale: float | None = None
    true_cfg_scale: float | None = None
    negative_prompt: str | None = None
    lora_scale: float = 1.0
    image: tuple[Path, ...] = ()
    mask: Path | None = None

    @property
    def negative(self) -> str | None:
        """The prompt to guide away from; None without classifier-free guidance."""
        return (self.negative_prompt or "") if (self.true_cfg_scale or 0) > 1 else None

    def described(self, *, seed: int) -> str:
        """The settings that the prompt has of its own and its seed, `seed` if it has none, for the image's caption."""
        parts = [f"seed {seed if self.seed is None else self.seed}"]
        if self.width:
            parts.append(f"width {self.width}")
        if self.height:
            parts.append(f"height {self.height}")
        if self.num_inference_steps:
            parts.append(f"{self.num_inference_steps} steps")
        if self.guidance_scale is not None:
            parts.append(f"guidance {self.guidance_scale:g}")
        if self.negative is not None:
            parts.append(f"CFG {self.true_cfg_scale:g} from {self.negative!r}")
        if self.lora_scale != 1:
            parts.append(f"LoRA scale {self.lora_scale:g}")
        return ", ".join(parts)


image_edge = in_range(int, 16, 8192)
PROMPT_OPTION_TYPES: dict[str, Callable[[str], Any]] = {
    "width": image_edge,
    "height": image_edge,
    "seed": image_seed,
    "num_inference_steps": in_range(int, 1, 1000),
    "guidance_scale": non_negative_float,
    "true_cfg_scale": non_negative_float,
    "negative_prompt": str,
    "lora_scale": in_range(float, -10, 10),
    "image": expanded_path,
    "mask": expanded_path,
}
# What kohya's sd-scripts call them in a line and in .toml, musubi-tuner's --ci among them; all but --mask are theirs.
PROMPT_OPTION_NAMES = {
    "w": "width",
    "h": "height",
    "d": "seed",
    "s": "num_inference_steps",
    "g": "guidance_scale",
    "l": "true_cfg_scale",
    "n": "negative_prompt",
    "am": "lora_scale",
    "cn": "image",
    "ci": "image",
    "mask": "mask",
    "sample_steps": "num_inference_steps",
    "scale": "true_cfg_scale",
    "controlnet_image": "image",
} | {name: name for name in PROMPT_OPTION_TYPES}


def read_validation_prompts(
    flag: str, path: Path | None, *, options: Collection[str], multiple: int = 16
) -> tuple[list[ValidationPrompt], list[str]]:
    """(the prompts of a file that `flag` names, problems); ([], []) without a file.

    A text file has a prompt per line with options as for sd-scripts' --sample_prompts: "a dog --w 512 --h 768 --d 1";
    empty lines and those that begin with # are passed over. A .json file is a list of objects with the fields of
    `ValidationPrompt`; a .toml file is sd-scripts', [prompt] with [[prompt.subset]]. `options` are the fields that
    this run makes use of, others are problems; width and height are a `multiple` of pixels.
    """
    if path is None:
        return [], []
    if not path.is_file():
        return [], [f"{flag} {visible(path)}: no such file"]
    try:
        entries = read_prompt_entries(path)
    except (ValueError, RecursionError) as error:
        return [], [f"{flag}: {error}" if str(path) in str(error) else f"{flag} {path}: {error}"]
    if not entries:
        return [], [f"{flag} {path}: no prompts in it"]
    prompts = []
    problems = []
    for where, prompt, values in entries:
        parsed, wrong = parse_validation_prompt(prompt, values, options, multiple)
        prompts.append(parsed)
        problems += [f"{path}, {where}: {text}" for text in wrong]
    return prompts, first_ten(problems)


def read_prompt_entries(path: Path) -> list[tuple[str, str, list[tuple[str, Any]]]]:
    """(where it stands, the prompt, [(name of an option as it is written, its value)]) of each prompt in a file.

    Raises ValueError for a file that is of another form.
    """
    entries = []
    if path.suffix.lower() not in (".json", ".toml"):
        for number, line in enumerate(read_lines(path), start=1):
            if line.strip() and not line.strip().startswith("#"):
                entries.append((f"line {number}", *split_prompt_line(line)))
        return entries
    text = read_text(path) or ""
    if path.suffix.lower() == ".json":
        rows = json.loads(text)
        common_values = {}
    else:
        table = tomllib.loads(text).get("prompt")
        if not isinstance(table, dict):
            raise ValueError("no table [prompt] in it")
        common_values = {name: value for name, value in table.items() if name != "subset"}
        rows = table.get("subset", [{}])
    if not isinstance(rows, list):
        raise ValueError("expected a list of prompts")
    for number, row in enumerate(rows, start=1):
        if isinstance(row, str):
            entries.append((f"prompt {number}", *split_prompt_line(row)))
            continue
        if not isinstance(row, dict):
            raise ValueError(f"prompt {number} must be an object such as {{'prompt': 'a dog'}}, not {row!r:.80}")
        values = common_values | row
        prompt = values.pop("prompt", "")
        pairs = []
        for name, value in values.items():
            for each in value if isinstance(value, list) else [value]:
                if each is not None:
                    pairs.append((name, each))
        entries.append((f"prompt {number}", prompt, pairs))
    return entries


def split_prompt_line(line: str) -> tuple[str, list[tuple[str, Any]]]:
    """The prompt of a line and its options: "a dog --w 512" has the option ("--w", "512")."""
    prompt, *parts = re.split(r"(?:^|\s+)(?=--\w)", line.strip())
    pairs = []
    for part in parts:
        name, *value = part.split(maxsplit=1)
        pairs.append((name, "".join(value).strip()))
    return prompt.strip(), pairs


def parse_validation_prompt(
    prompt: Any, pairs: Iterable[tuple[str, Any]], options: Collection[str], multiple: int
) -> tuple[ValidationPrompt, list[str]]:
    """(the prompt with its options, problems), see `read_validation_prompts`."""
    problems = []
    fields: dict[str, Any] = {}
    if not isinstance(prompt, str) or not prompt.strip():
        problems.append("no prompt")
    for written, value in pairs:
        shown = f"{written} {value}".strip()[:80]
        name = PROMPT_OPTION_NAMES.get(written.removeprefix("--").lower())
        if name is None:
            known = [letter for letter, name in PROMPT_OPTION_NAMES.items() if name in options and len(letter) < 5]
            problems.append(f"{shown}: no such option, there are --{', --'.join(known)}")
            continue
        if name not in options:
            problems.append(f"{shown}: has no effect in this run, leave it out")
            continue
        try:
            parsed = PROMPT_OPTION_TYPES[name](value if name == "negative_prompt" else str(value))
        except (ValueError, argparse.ArgumentTypeError) as error:
            reason = str(error) if isinstance(error, argparse.ArgumentTypeError) else "not a number of its kind"
            problems.append(f"{shown}: {reason}")
            continue
        if name in ("width", "height") and parsed % multiple:
            nearest = max(1, parsed // multiple) * multiple
            problems.append(f"{shown}: must be a multiple of {multiple}, such as {nearest}")
        if name in ("image", "mask") and not parsed.is_file():
            problems.append(f"{written} {visible(parsed)}: no such file")
        if name in fields and name != "image":
            problems.append(f"{shown}: given twice")
        fields[name] = (*fields.get(name, ()), parsed) if name == "image" else parsed
    validation_prompt = ValidationPrompt(prompt, **fields)
    if validation_prompt.negative_prompt and validation_prompt.negative is None and not problems:
        problems.append("a negative prompt (--n) needs a classifier-free guidance scale (--l) above 1, such as 2")
    return validation_prompt, problems


def repeated_prompt(prompt: str | None, count: int, *, seed: int) -> list[ValidationPrompt]:
    """One prompt for `count` images, the first with `seed`, the second with the next one; [] without a prompt."""
    return [ValidationPrompt(prompt, seed=seed + i) for i in range(count)] if prompt else []


def with_defaults(
    prompts: Sequence[ValidationPrompt], *, guidance_scale: float | None, num_inference_steps: int | None
) -> list[ValidationPrompt]:
    """The prompts with these values where they have none of their own."""
    filled = []
    for prompt in prompts:
        if prompt.guidance_scale is None:
            prompt = replace(prompt, guidance_scale=guidance_scale)
        if prompt.num_inference_steps is None:
            prompt = replace(prompt, num_inference_steps=num_inference_steps)
        filled.append(prompt)
    return filled


def texts_of(prompts: Iterable[ValidationPrompt]) -> set[str]:
    """All that must be encoded to generate these prompts."""
    texts = set()
    for prompt in prompts:
        texts.add(prompt.prompt)
        if prompt.negative is not None:
            texts.add(prompt.negative)
    return texts


def sampling_arguments(prompt: ValidationPrompt) -> dict[str, Any]:
    """The arguments of a FLUX pipeline's call that the prompt has of its own, without text and size."""
    arguments: dict[str, Any] = {}
    if prompt.num_inference_steps is not None:
        arguments["num_inference_steps"] = prompt.num_inference_steps
    if prompt.guidance_scale is not None:
        arguments["guidance_scale"] = prompt.guidance_scale
    if prompt.negative is not None:
        arguments["true_cfg_scale"] = prompt.true_cfg_scale
    return arguments


@contextmanager
def frugal_decoding(vae: Any, num_pixels: int, device: torch.device) -> Iterator[None]:
    """Within it the VAE decodes in its own precision, not under autocast, which computes its group norms in float32
    for half as much memory again; and in tiles, where a GPU lacks the memory for `num_pixels` at once."""
    decode = vae.decode

    def decode_without_autocast(latents, *args, **kwargs):
        with torch.autocast(device.type, enabled=False):
            return decode(latents.to(vae.dtype), *args, **kwargs)

    in_tiles = decodes_in_tiles(vae, num_pixels, device)
    if in_tiles:
        vae.enable_slicing()
        vae.enable_tiling()
    vae.decode = decode_without_autocast
    try:
        yield
    finally:
        del vae.decode  # the class has the one that was there
        if in_tiles:
            vae.disable_slicing()
            vae.disable_tiling()


def generate_images(
    accelerator: Accelerator,
    pipeline: Any,
    calls: Sequence[Mapping[str, Any]],
    *,
    seeds: Sequence[int],
    lora_scales: Sequence[float] | None = None,
) -> list[Image.Image]:
    """One image per dictionary of pipeline arguments in `calls`, each from a generator of its seed and, where
    `lora_scales` says so, with the transformer's adapter at another strength than 1.

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
            generator = torch.Generator().manual_seed(seeds[i])  # on the CPU: the same noise on every device
            num_pixels = arguments["height"] * arguments["width"]
            with (
                scaled_adapters(pipeline.transformer, lora_scales[i] if lora_scales else 1.0),
                frugal_decoding(pipeline.vae, num_pixels, accelerator.device),
            ):
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
    share = own_items(accelerator, batches)
    quiet = not missing or not accelerator.is_main_process
    with undisturbed(pipeline.transformer, device=device), autocast:
        for batch in tqdm(share, desc="Generating class images", unit="batch", disable=quiet):
            generators = [step_generator(seed, i) for i in batch]
            batch_prompts = [prompts[i % len(prompts)] for i in batch]
            call = pipeline_call(batch_prompts)
            num_pixels = len(batch) * call["height"] * call["width"]
            with frugal_decoding(pipeline.vae, num_pixels, device):
                images = pipeline(**call, generator=generators).images
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

    `prompt` is that of all images, "" if each has its own; `captions` say what differs; `grid` replaces the usual one.
    `weights_of` is the step whose weights have drawn them, if it is another one.
    """
    if not accelerator.is_main_process:
        return
    if grid is None:
        grid = image_grid(images, captions, columns, title=f"{prompt}\n{step_title(step, weights_of)}".strip())
    with atomic_write(args.output_dir / "validation" / f"step-{step:06d}.png") as partial:
        grid.save(partial, format="PNG")
    prefix = f"{prompt} | " if prompt else ""
    captions = [f"{prefix}{caption}, {step_title(step, weights_of)}" for caption in captions]
    with writing(args.output_dir / args.logging_dir):
        folder = args.output_dir / "validation"
        log_images(accelerator, images, captions, name="validation", step=step, grid=grid, folder=folder)


def step_title(step: int, weights_of: int | None) -> str:
    """The step at which images were drawn, in words, with the one whose weights they show if it is another one."""
    other = weights_of is not None and weights_of != step
    return f"step {step}, weights of step {weights_of}" if other else f"step {step}"


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
