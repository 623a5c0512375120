"""From files to what transformers read: pictures and captions, VAE latents, packed tokens, position ids, caches."""

import contextlib
import difflib
import functools
import hashlib
import importlib.util
import io
import itertools
import json
import math
import os
import re
import sys
import tomllib
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from accelerate.utils import gather_object
from diffusers import AutoencoderDC, AutoencoderKLQwenImage, FluxPipeline
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
from PIL import EpsImagePlugin, Image, ImageOps
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch.utils.data import IterableDataset, Sampler, default_collate
from tqdm.auto import tqdm

from common.lora import writing


PATCH = 16  # pixels per token of FLUX.1
IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")
UNREAD_SUFFIXES = (".heic", ".heif", ".avif", ".tif", ".tiff", ".gif")
INTERPOLATION = [mode.name.lower() for mode in Image.Resampling]
# What a value in --dataset_config must be, and whether one is.
OPTION_KINDS = {
    "true or false": lambda value: isinstance(value, bool),
    "text": lambda value: isinstance(value, str),
    "text that is not empty": lambda value: isinstance(value, str) and value != "",
    "an extension such as .txt": lambda value: isinstance(value, str) and re.fullmatch(r"\.?\w[\w.-]*", value),
    "a whole number from 0 to 10,000": lambda value: type(value) is int and 0 <= value <= 10_000,
    "a whole number from 1 to 10,000": lambda value: type(value) is int and 1 <= value <= 10_000,
    "a number from 0 to 1": lambda value: type(value) in (int, float) and 0 <= value <= 1,
    "a multiple of 16 to 8192": lambda value: type(value) is int and 16 <= value <= 8192 and value % 16 == 0,
    "a side or [width, height], multiples of 16 to 8192": lambda value: (
        all(OPTION_KINDS["a multiple of 16 to 8192"](side) for side in (value if isinstance(value, list) else [value]))
        and (not isinstance(value, list) or len(value) == 2)
    ),
    "lanczos, nearest, bilinear, linear, bicubic, cubic, area or box": lambda value: value in [*KOHYA_INTERPOLATION],
}
KOHYA_INTERPOLATION = {name: name for name in INTERPOLATION} | {
    "linear": "bilinear",
    "cubic": "bicubic",
    "area": "box",
}
SWITCH, TEXT, SOME_TEXT, EXTENSION, FROM_0, FROM_1, SHARE, SIDE, SIZE, METHOD = OPTION_KINDS
TABLES = {"general": "[general]", "datasets": "[[datasets]]", "subsets": "[[datasets.subsets]]"}
ABOVE, ANYWHERE = ("general", "datasets"), tuple(TABLES)
DATASET_OPTIONS = {  # in which tables, what, default; None: the command line's or derived
    "resolution": (ABOVE, SIZE, None),
    "batch_size": (ABOVE, FROM_1, None),
    "enable_bucket": (ABOVE, SWITCH, False),
    "min_bucket_reso": (ABOVE, FROM_1, None),
    "max_bucket_reso": (ABOVE, FROM_1, None),
    "bucket_reso_steps": (ABOVE, SIDE, 64),
    "bucket_no_upscale": (ABOVE, SWITCH, False),
    "resize_interpolation": (ANYWHERE, METHOD, None),
    "num_repeats": (ANYWHERE, FROM_0, None),
    "flip_aug": (ANYWHERE, SWITCH, None),
    "random_crop": (ANYWHERE, SWITCH, False),
    "caption_extension": (ANYWHERE, EXTENSION, None),
    "class_tokens": (ANYWHERE, TEXT, None),
    "caption_prefix": (ANYWHERE, TEXT, ""),
    "caption_suffix": (ANYWHERE, TEXT, ""),
    "enable_wildcard": (ANYWHERE, SWITCH, False),
    "caption_separator": (ANYWHERE, SOME_TEXT, ","),
    "secondary_separator": (ANYWHERE, TEXT, ""),
    "keep_tokens": (ANYWHERE, FROM_0, 0),
    "keep_tokens_separator": (ANYWHERE, TEXT, ""),
    "shuffle_caption": (ANYWHERE, SWITCH, False),
    "caption_tag_dropout_rate": (ANYWHERE, SHARE, 0.0),
    "caption_dropout_rate": (ANYWHERE, SHARE, None),
    "caption_dropout_every_n_epochs": (ANYWHERE, FROM_0, 0),
    "image_dir": (("subsets",), SOME_TEXT, None),
    "is_reg": (("subsets",), SWITCH, False),
}
REFUSED_OPTIONS = {  # the value that says what happens anyway, and why no other is taken
    "alpha_mask": (False, "transparent parts become white"),
    "cache_info": (False, "captions and sizes are read from the files every time"),
    "color_aug": (False, "colours are kept as they are"),
    "conditioning_data_dir": (None, "loss masks are not supported"),
    "custom_attributes": ({}, "keep the class as it was with an is_reg subset"),
    "debug_dataset": (None, "it is a flag of another trainer"),
    "face_crop_aug_range": (None, "use random_crop, or crop the pictures beforehand"),
    "metadata_file": (None, "give image_dir, with a caption file beside each picture"),
    "network_multiplier": (1.0, "the adapter counts the same for all data"),
    "prior_loss_weight": (None, "it is a flag: --prior_loss_weight"),
    "token_warmup_min": (1, "captions do not grow with the steps"),
    "token_warmup_step": (0, "captions do not grow with the steps"),
    "validation_seed": (None, "no pictures are held out: judge by --validation_prompt"),
    "validation_split": (0.0, "no pictures are held out: judge by --validation_prompt"),
}

EpsImagePlugin.gs_binary = False  # PIL would run Ghostscript on PostScript under a picture's name


# ---------------------------------------------------------------------------------------------------------------------
# Pictures and captions
# ---------------------------------------------------------------------------------------------------------------------


@dataclass
class Example:
    """A picture and its caption; `read` opens the picture as a PIL image."""

    name: str
    read: Callable[[], Image.Image]
    caption: str | None = None

    def image(self):
        return upright(self.read())


def upright(image):
    """A PIL image as its owner sees it: upright (EXIF), transparent parts white, RGB."""
    image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I"):  # 16-bit grey, which PIL would clip to white
        image = Image.fromarray((np.asarray(image) / 257).astype(np.uint8))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


def fit(image, size, args):
    """A picture resized to cover (height, width), its middle cropped."""
    return ImageOps.fit(image, size[::-1], Image.Resampling[args.image_interpolation_mode.upper()])


def picture_files(folder):
    """(the pictures in a folder, sorted paths; problems of those of a kind that is not read)."""
    paths = sorted(folder.iterdir())
    unread = [path for path in paths if path.suffix.lower() in UNREAD_SUFFIXES]
    problems = [f"{path}: save it as PNG or JPEG, {path.suffix} is not read" for path in unread]
    return [path for path in paths if path.suffix.lower() in IMAGE_SUFFIXES], problems


def read_text_file(path, problems):
    """The text of a file, without space around it; None if there is no file, and a problem if it holds no text."""
    try:
        return path.read_text("utf-8-sig").strip() if path.exists() else None
    except (OSError, ValueError):
        problems.append(f"{path}: not UTF-8 text")
        return None


def read_captions(folder, paths, args):
    """({name of a picture: caption} in metadata.jsonl of a folder with pictures `paths`, problems)."""
    captions, metadata = {}, folder / "metadata.jsonl"
    try:
        lines = metadata.read_text("utf-8-sig").splitlines() if metadata.exists() else []
        rows = [json.loads(line) for line in lines if line.strip()]
        column = args.caption_column or next((c for c in ("text", "prompt", "caption") if rows and c in rows[0]), None)
        captions = {str(row["file_name"]): row[column] for row in rows}
        json.dumps(rows, ensure_ascii=False).encode()  # half of a surrogate pair is no text
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        return captions, [
            f"{metadata}: each line must be JSON with file_name and a caption, see --caption_column ({error!r})"
        ]
    problems = [
        f"{metadata}: no picture {name} in this folder" for name in sorted(captions.keys() - {p.name for p in paths})
    ]
    if args.caption_column and not rows:
        problems.append(f"--caption_column {args.caption_column}: no {metadata} that has columns")
    return captions, problems


def check_captions(examples, args):
    """Problems of examples without caption, to which --instance_prompt is given, or with one that is no text."""
    problems, bare = [], [example.name for example in examples if example.caption is None]
    if bare and args.instance_prompt is None:
        names = ", ".join(bare[:3]) + (f" and {len(bare) - 3} more" if len(bare) > 3 else "")
        problems.append(f"no caption for {names}: give --instance_prompt, captions in .txt files, or --caption_column")
    for example in examples:
        example.caption = args.instance_prompt if example.caption is None else example.caption
        if example.caption is not None and not (isinstance(example.caption, str) and example.caption.strip()):
            problems.append(f"{example.name}: its caption must be text and not empty, not {example.caption!r}")
    return problems


def check_pictures(examples, look):
    """Problems of the pictures of examples: what look(example) returns (None: nothing is wrong) or raises."""

    def defect(example):
        try:
            return look(example)
        except Exception as error:  # PIL's readers of formats raise of all kinds
            return f"{example.name}: not a readable picture ({error})"

    with ThreadPoolExecutor() as pool:
        checks = pool.map(defect, examples)
        checks = tqdm(checks, total=len(examples), desc="Reading pictures", unit="image", leave=False)
        return [problem for problem in checks if problem]


def open_dataset(args, columns, *, flag=None, source=None, data_files=None, streaming=False):
    """(dataset, problems): the train split of --dataset_name, or of what `flag` names, `source` and `data_files` say.

    columns([name, ...]) returns those of pictures and of captions, (list, list), among the names of all. Pictures are
    decoded when their row is read, those of a stream are {"bytes": ..., "path": ...}.
    """
    import datasets

    datasets.disable_progress_bars()
    flag = flag or f"--dataset_name {args.dataset_name}"
    try:
        dataset = datasets.load_dataset(
            source or args.dataset_name,
            args.dataset_config_name,
            data_files=data_files,
            split="train",
            cache_dir=args.cache_dir,
            streaming=streaming,
        )
        found = dataset.column_names or list(next(iter(dataset)))
        pictures, texts = columns(found)
        absent = [name for name in (*pictures, *texts) if name not in found]
        if absent:
            return None, [f"{flag}: no column {', '.join(absent)}; it has {', '.join(found)}"]
        for column in pictures:
            dataset = dataset.cast_column(column, datasets.Image(decode=not streaming))
    except Exception as error:  # a missing, gated, empty or malformed dataset each raises its own kind
        return None, [f"{flag}: cannot be loaded ({error})"]
    return dataset, []


def to_tensor(image):
    """An RGB picture as [3, H, W] in [-1, 1]."""
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).float() / 127.5 - 1


def collate(examples):
    """Tensors stacked and prompts as a list: first the pictures, then, if there are, the class pictures."""
    samples = [sample for kind in zip(*examples, strict=True) for sample in kind]
    return {
        name: torch.stack([sample[name] for sample in samples]) if name != "prompt" else [s[name] for s in samples]
        for name in samples[0]
    }


def read_batches(dataloader):
    """What a DataLoader gives; a picture that can be read no more ends the run with one message."""
    try:
        yield from dataloader
    except (OSError, ValueError, SyntaxError, SafetensorError, Image.DecompressionBombError) as error:
        reason = (str(error).strip() or repr(error)).splitlines()[-1]  # after a worker's traceback
        raise SystemExit(
            f"\n{Path(sys.argv[0]).name}: error: the data can be read no more: {reason}. Checkpoints are intact: mend "
            "this and go on with --resume_from_checkpoint latest"
        ) from None


def read_row(dataset, row, column):
    """A picture of a dataset; those in other columns are not decoded."""
    return dataset.select_columns(column)[row][column]


class StepSampler(Sampler):
    """Batches of (epoch, index) for the micro-steps `start` to `stop` of one process.

    Every epoch is a new order of all samples, drawn from (seed, epoch) and cut into batches, each of one of the
    `groups` (the bucket of each sample), that go round the processes; what a micro-step trains on is the same however
    often training was interrupted before it. `batch_size` is a number, or {group: number}.
    """

    def __init__(self, groups, batch_size, *, seed, process_index, num_processes, start=0, stop=None):
        self.groups, self.batch_size, self.seed = groups, batch_size, seed
        self.start, self.stop = start, stop
        self.process_index, self.num_processes = process_index, num_processes
        self.steps_per_epoch = math.ceil(len(self.batches(0)) / num_processes)

    def batches(self, epoch):
        """The batches of an epoch, for all processes together."""
        rng = np.random.default_rng((self.seed, epoch))
        order = rng.permutation(len(self.groups)).tolist()
        batches = []
        for group in dict.fromkeys(self.groups):
            members = [index for index in order if self.groups[index] == group]
            size = self.batch_size[group] if isinstance(self.batch_size, dict) else self.batch_size
            batches += [members[i : i + size] for i in range(0, len(members), size)]
        return [batches[i] for i in rng.permutation(len(batches))]

    def __iter__(self):
        for step in range(self.start, self.stop):
            epoch, step_of_epoch = divmod(step, self.steps_per_epoch)
            if step == self.start or step_of_epoch == 0:
                batches = self.batches(epoch)
            batch = step_of_epoch * self.num_processes + self.process_index
            yield [(epoch, index) for index in batches[batch % len(batches)]]

    def __len__(self):
        return self.stop - self.start


# ---------------------------------------------------------------------------------------------------------------------
# Dataset files of kohya's sd-scripts
# ---------------------------------------------------------------------------------------------------------------------


@dataclass
class ConfiguredExample(Example):
    """An example with what --dataset_config says of it."""

    options: dict = field(default_factory=dict)  # DATASET_OPTIONS
    repeats: int = 1  # times in an epoch
    dataset: int = 0  # batches keep to one
    bucket: tuple[int, int] | None = None  # (height, width)

    def sides(self):
        """(width, height) of the resolution."""
        return sides(self.options["resolution"])

    def varies(self):
        """Whether `prompt` is drawn anew for each sample."""
        return any(self.options[name] for name in ("shuffle_caption", "enable_wildcard", "caption_tag_dropout_rate"))

    def prompt(self, rng=None):
        """The caption as a sample has it; without `rng` the first of all choices, unshuffled and whole."""
        options, separator = self.options, self.options["caption_separator"]
        pick = (lambda choices: choices[rng.integers(len(choices))]) if rng else (lambda choices: choices[0])
        lines = self.caption.split("\n") if options["enable_wildcard"] else [self.caption]
        caption = " ".join(filter(None, (options["caption_prefix"], pick(lines), options["caption_suffix"])))
        if options["enable_wildcard"]:  # {a|b} is one of the two, {{ and }} are braces
            choose = lambda match: pick(match[1].split("|")) if match[1] else match[0][0]  # noqa: E731
            caption = re.sub(r"\{\{|\}\}|\{([^{}]+)\}", choose, caption)
        keep, mark = options["keep_tokens"], options["keep_tokens_separator"]
        shuffled, dropped = options["shuffle_caption"], options["caption_tag_dropout_rate"]
        if shuffled or dropped or mark and mark in caption:
            pieces = caption.split(mark, 2) if mark and mark in caption else [caption]
            fixed, *others = [[p.strip() for p in piece.split(separator) if p.strip()] for piece in pieces]
            fixed, flexible, tail = (fixed, *others, [])[:3] if others else (fixed[:keep], fixed[keep:], [])
            if rng and shuffled:
                flexible = [flexible[i] for i in rng.permutation(len(flexible))]
            if rng and dropped:
                flexible = [part for part in flexible if rng.random() >= dropped]
            caption = ", ".join([*fixed, *flexible, *tail])
        second = options["secondary_separator"]
        return caption.replace(second, separator) if second else caption


def default_options(args):
    """DATASET_OPTIONS where --dataset_config is silent."""
    return {name: default for name, (_, _, default) in DATASET_OPTIONS.items()} | {
        "resolution": args.resolution,
        "batch_size": args.train_batch_size,
        "resize_interpolation": args.image_interpolation_mode,
        "num_repeats": args.repeats,
        "flip_aug": args.random_flip,
        "random_crop": not (args.center_crop or args.dataset_config),
        "caption_dropout_rate": args.caption_dropout,
        "class_tokens": args.instance_prompt,
    }


def read_dataset_config(args):
    """Examples of --dataset_config; an option is the subset's, else its dataset's, [general]'s, the command line's."""
    path = args.dataset_config
    try:
        config = (json.loads if path.suffix == ".json" else tomllib.loads)(path.read_text("utf-8-sig"))
        if path.suffix == ".json":
            json.dumps(config, ensure_ascii=False).encode()  # half of a surrogate pair is no text
    except (OSError, ValueError, RecursionError) as error:
        return [], [f"--dataset_config {path}: cannot be read ({error})"]
    if not isinstance(config, dict):
        return [], [f"--dataset_config {path}: must hold general and datasets, not a {type(config).__name__}"]
    general, datasets = config.get("general", {}), tables_in(config.get("datasets"))
    problems = [f"{path}: {key} is neither [general] nor [[datasets]]" for key in config if key not in ABOVE]
    problems += option_problems(f"{path}, [general]", general, "general")
    if not datasets:
        problems.append(f"{path}: no [[datasets]] table in it")
    blocks = []
    for count, dataset in enumerate(datasets, 1):
        where, subsets = f"{path}, [[datasets]] {count}", tables_in(dataset.pop("subsets", None))
        problems += option_problems(where, dataset, "datasets")
        if not subsets:
            problems.append(f"{where}: no [[datasets.subsets]] table in it")
        subsets = [(f"{where}, subset {place}", subset) for place, subset in enumerate(subsets, 1)]
        problems += [problem for subset in subsets for problem in option_problems(*subset, "subsets")]
        blocks.append((where, dataset, subsets))
    examples = []
    for count, (where, dataset, subsets) in enumerate(blocks if not problems else []):
        shared = default_options(args) | general | dataset
        names = [subset["image_dir"] for _, subset in subsets]
        problems += [f"{where}: image_dir {name} twice: use num_repeats" for name in {*names} if names.count(name) > 1]
        problems += bucket_problems(where, shared)
        found = []
        for table, subset in subsets:
            if (shared | subset)["num_repeats"] == 0:
                continue
            read, wrong = read_subset(table, shared | subset, path.parent)
            found, problems = found + read, problems + wrong
        if found and all(example.options["is_reg"] for example in found):
            problems.append(f"{where}: is_reg pictures need a subset of others in the same dataset")
        for example in balance(found):
            example.dataset = count
            examples.append(example)
    return ([] if problems else examples), problems


def tables_in(value):
    """The tables of a list of tables, [] for anything else."""
    return value if isinstance(value, list) and all(isinstance(table, dict) for table in value) else []


def option_problems(where, table, level):
    """What is wrong with the names and values in a table of --dataset_config."""
    if not isinstance(table, dict):
        return [f"{where} must be a table, not {table!r}"]
    problems, allowed = [], [name for name, (levels, *_) in DATASET_OPTIONS.items() if level in levels]
    for name, value in table.items():
        if name in REFUSED_OPTIONS:
            harmless, reason = REFUSED_OPTIONS[name]
            problems += [f"{where}: {name} = {value!r} is not supported: {reason}"] if value != harmless else []
        elif name not in allowed:
            near = difflib.get_close_matches(name, DATASET_OPTIONS, 1)
            hint = f"did you mean {near[0]}?" if near else "no option has this name"
            if name in DATASET_OPTIONS:
                hint = f"it belongs in {' or '.join(TABLES[place] for place in DATASET_OPTIONS[name][0])}"
            problems.append(f"{where}: {name}: {hint} (allowed here: {', '.join(allowed)})")
        elif not OPTION_KINDS[DATASET_OPTIONS[name][1]](value):
            problems.append(f"{where}: {name} = {value!r} must be {DATASET_OPTIONS[name][1]}")
    if level == "subsets" and "image_dir" not in table:
        problems.append(f"{where}: image_dir is missing")
    return problems


def read_subset(where, options, beside):
    """Examples of one subset; image_dir is relative to the working folder, or else to the file's, `beside`."""
    named = Path(options["image_dir"])
    with contextlib.suppress(RuntimeError):  # no such user
        named = named.expanduser()
    folder = next((path for path in (named, beside / named) if path.is_dir()), None)
    if folder is None:
        return [], [f"{where}: image_dir {named}: no such folder here or in {beside}"]
    paths, problems = picture_files(folder)
    problems += [] if paths else [f"{where}: image_dir {named}: no pictures ({', '.join(IMAGE_SUFFIXES)}) in it"]
    suffix = "." + (options["caption_extension"] or "caption").lstrip(".")
    strays = [path.with_suffix(".txt") for path in paths if not path.with_suffix(suffix).exists()]
    strays = [] if options["caption_extension"] else [path for path in strays if path.exists()]
    problems += [f'{path}: is it a caption? Say caption_extension = ".txt" or "{suffix}"' for path in strays[:1]]
    examples = []
    for path in paths:
        caption, text_file = options["class_tokens"], path.with_suffix(suffix)
        if text_file.exists():
            text = read_text_file(text_file, problems)
            if text is None:
                continue
            lines = [line.strip() for line in text.splitlines() if line.strip()]
            caption = "\n".join(lines if options["enable_wildcard"] else lines[:1])
            problems += [] if lines else [f"{text_file}: empty; delete it to use class_tokens"]
        elif not caption:
            problems.append(f"{path}: no caption: write {text_file.name}, or give class_tokens")
        read = functools.partial(Image.open, path)
        examples.append(ConfiguredExample(str(path), read, caption, options, repeats=options["num_repeats"]))
    return (examples if not problems else []), problems


def balance(examples):
    """Regularisation pictures as often as the others together: in order, with their repeats, then all round again."""
    own, others = ([e for e in examples if e.options["is_reg"] == kind] for kind in (False, True))
    order = itertools.chain((e for e in others for _ in range(e.repeats)), itertools.cycle(others))
    taken = Counter(map(id, itertools.islice(order, sum(example.repeats for example in own))))
    for example in others:
        example.repeats = taken[id(example)]
    return [example for example in examples if example.repeats]


def sides(resolution):
    """(width, height) of a resolution in --dataset_config."""
    return tuple(resolution) if isinstance(resolution, list) else (resolution, resolution)


def bucket_problems(where, options):
    """Limits of buckets that contradict the resolution."""
    width, height = sides(options["resolution"])
    low, high, step = (options[name] for name in ("min_bucket_reso", "max_bucket_reso", "bucket_reso_steps"))
    if not options["enable_bucket"]:
        return []
    problems = [f"bucket_reso_steps {step} is more than the resolution"] if step > math.isqrt(width * height) else []
    if not options["bucket_no_upscale"]:
        problems += [f"min_bucket_reso {low} is more than the resolution"] if low and low > min(width, height) else []
        problems += (
            [f"max_bucket_reso {high} is less than the resolution"] if high and high < max(width, height) else []
        )
    return [f"{where}: {problem} {options['resolution']}" for problem in problems]


@functools.cache
def bucket_sizes(width, height, low, high, step):
    """Sorted (height, width) in steps of `step` with about the area of width x height and sides from `low` to `high`.

    Without limits, sides start at 256 (half of a smaller resolution) and go as far as the area does.
    """
    area, side = width * height, math.isqrt(width * height)
    low = max((low or min(256, side // 2)) // step, 1) * step
    high = math.ceil((high or area / low) / step) * step
    sizes = {(side // step * step, side // step * step)}
    for across in range(low, high + 1, step):
        down = min(high, area // across // step * step)
        sizes |= {(down, across), (across, down)} if down >= low else set()
    return sorted(sizes)


def dataset_bucket(size, options):
    """The (height, width) that a picture of (width, height) `size` is resized to cover and cropped to."""
    (width, height), (across, down), step = size, sides(options["resolution"]), options["bucket_reso_steps"]
    if not options["enable_bucket"]:
        return down, across
    if not options["bucket_no_upscale"]:
        sizes = bucket_sizes(across, down, options["min_bucket_reso"], options["max_bucket_reso"], step)
        return min(sizes, key=lambda b: (b != (height, width), abs(b[1] / b[0] - width / height)))
    if width * height > across * down:  # one side becomes a multiple of the step: the one that distorts less
        ratio = width / height
        wide, high = (round(math.sqrt(across * down * r)) // step * step for r in (ratio, 1 / ratio))
        fits = [(wide, int(wide / ratio + 0.5)), (int(high * ratio + 0.5), high)]
        width, height = min(fits, key=lambda s: abs(max(s[0] // step, 0.1) / max(s[1] // step, 0.1) - ratio))
    if min(width, height) < step:
        raise ValueError(f"{width} x {height} pixels are less than bucket_reso_steps {step}")
    return height // step * step, width // step * step


# ---------------------------------------------------------------------------------------------------------------------
# Pictures with several captions, prompts without pictures
# ---------------------------------------------------------------------------------------------------------------------


@dataclass
class PromptExample:
    """A picture and its captions; `read` and `read_reference` open the picture and the one it was edited from.

    `stamp` changes when the files do: what was encoded of others is then not used.
    """

    name: str
    captions: list[str]
    read: Callable[[], Image.Image] | None = None
    read_reference: Callable[[], Image.Image] | None = None
    stamp: str = ""


def read_prompts(path):
    """Examples of --prompts_file."""
    if not path.is_file():
        return [], [f"--prompts_file {path}: no such file"]
    try:
        lines = [line.strip() for line in path.read_text("utf-8-sig").splitlines()]
    except (OSError, ValueError):
        return [], [f"--prompts_file {path}: not UTF-8 text"]
    return [PromptExample(f"{path}:{i + 1}", [line]) for i, line in enumerate(lines) if line], []


def has_parquet(args):
    """Whether --train_data_dir holds parquet files, not pictures."""
    return args.train_data_dir is not None and any(args.train_data_dir.glob("*.parquet"))


def read_captioned_folder(args):
    """Examples of --train_data_dir, with captions from the .txt file beside each picture."""
    folder, examples = args.train_data_dir, []
    paths, problems = picture_files(folder)
    for path in paths:
        text_file, read_reference, files = path.with_suffix(".txt"), None, [path]
        if not path.is_file():
            problems.append(f"{path}: not a readable picture (no file)")
            continue
        text = read_text_file(text_file, problems)
        if text is None and text_file.exists():
            continue
        if args.reference_data_dir:
            reference = args.reference_data_dir / path.name
            read_reference = functools.partial(Image.open, reference)
            if not reference.is_file():
                problems.append(f"--reference_data_dir: no {reference} for {path}")
                continue
            files.append(reference)
        stamp = " ".join(f"{file} {file.stat().st_size} {file.stat().st_mtime_ns}" for file in files)
        captions = [line.strip() for line in (text or "").splitlines() if line.strip()]
        examples.append(PromptExample(str(path), captions, functools.partial(Image.open, path), read_reference, stamp))
    return examples, problems


def read_captioned_dataset(args):
    """Examples of --dataset_name, or of the parquet files in --train_data_dir."""
    flag = f"--dataset_name {args.dataset_name}" if args.dataset_name else f"--train_data_dir {args.train_data_dir}"
    if args.train_data_dir and not args.train_data_dir.is_dir():
        return [], [f"{flag}: no such folder"]
    caption_column = args.caption_column or "text"

    def columns(names):
        bytes_alone = args.image_column not in names and "image_bytes" in names
        pictures = ["image_bytes" if bytes_alone else args.image_column, args.reference_column]
        return [name for name in pictures if name], [caption_column]

    source = {}
    if not args.dataset_name:
        source = {"source": "parquet", "data_files": sorted(map(str, args.train_data_dir.glob("*.parquet")))}
    dataset, problems = open_dataset(args, columns, flag=flag, **source)
    if problems:
        return [], problems
    pictures, _ = columns(dataset.column_names)
    examples = []
    for row, caption in enumerate(dataset[caption_column]):
        readers = [functools.partial(read_row, dataset, row, column) for column in pictures]
        name = f"{args.dataset_name or args.train_data_dir}[{row}]"
        captions = caption if isinstance(caption, list) else [caption]
        examples.append(PromptExample(name, captions, *readers, stamp=f"{dataset._fingerprint} {row}"))
    return examples, []


# ---------------------------------------------------------------------------------------------------------------------
# Pictures with further pictures: conditions and masks
# ---------------------------------------------------------------------------------------------------------------------


@dataclass
class ControlExample(Example):
    """An example with the pictures of its subject or custom conditions, and its mask.

    `places` are (position_delta, position_scale) of the conditions, if the data says so.
    """

    conditions: list[Example] = field(default_factory=list)
    mask: Example | None = None
    places: tuple = ()


def source_of(args):
    """The flag that names the data, as it was given."""
    sources = ("instance_data_dir", "dataset_name", "data_files", "dataset_class")
    name, value = next((name, getattr(args, name)) for name in sources if getattr(args, name) is not None)
    return f"--{name} {' '.join(value) if isinstance(value, list) else value}"


def read_rows(args):
    """[(name, row)] and problems; a row is {column: value}, in which pictures are functions that open them."""
    if args.instance_data_dir:
        return read_folder_rows(args)
    return read_dataset_class(args) if args.dataset_class else read_dataset_rows(args)


def read_folder_rows(args):
    """Rows of --instance_data_dir: captions and more from metadata.jsonl, else captions from the .txt file beside."""
    folder, rows, problems, listed = args.instance_data_dir, [], [], {}
    if not folder.is_dir():
        return [], [f"--instance_data_dir {folder}: no such folder"]
    metadata = folder / "metadata.jsonl"
    try:
        lines = metadata.read_text("utf-8-sig").splitlines() if metadata.exists() else []
        listed = {str(row.pop("file_name")): row for row in (json.loads(line) for line in lines if line.strip())}
        json.dumps(listed, ensure_ascii=False).encode()  # half of a surrogate pair is no text
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        problems.append(f"{metadata}: each line must be JSON with file_name ({error!r})")
    others = {str(row.get(column)) for row in listed.values() for column in picture_columns(args)[1:]}
    paths, unread = picture_files(folder)
    paths = [path for path in paths if path.name not in others]
    problems += [f"{metadata}: no picture {n} in this folder" for n in sorted(listed.keys() - {p.name for p in paths})]
    problems += unread
    for path in paths:
        row, text_file = dict(listed.get(path.name, {})), path.with_suffix(".txt")
        for column in picture_columns(args)[1:]:
            if not isinstance(row.get(column), str):
                return [], [f"{metadata}: column {column} names no file for {path.name}"]
            row[column] = functools.partial(Image.open, folder / row[column])
        if path.name not in listed:
            row["text"] = read_text_file(text_file, problems)
        rows.append((str(path), {**row, "image": functools.partial(Image.open, path)}))
    return rows, problems


def read_dataset_rows(args):
    """Rows of --dataset_name or --data_files."""
    dataset, problems = open_rows(args)
    if problems:
        return [], problems
    pictures = picture_columns(args, dataset.column_names)
    texts = dataset.remove_columns([c for c, f in dataset.features.items() if type(f).__name__ == "Image"])
    texts = texts.to_list() if texts.column_names else [{}] * len(dataset)
    name = args.dataset_name or "--data_files"
    return [
        (f"{name}[{i}]", {**row, **{column: functools.partial(read_row, dataset, i, column) for column in pictures}})
        for i, row in enumerate(texts)
    ], []


def open_rows(args):
    """(dataset, problems) of --dataset_name or --data_files; with --streaming one of undecoded files."""

    def columns(names):
        return picture_columns(args, names), [name.split(".")[0] for name in [caption_column(args)] if name]

    source = "webdataset" if args.data_files else args.dataset_name
    return open_dataset(
        args, columns, flag=source_of(args), source=source, data_files=args.data_files, streaming=args.streaming
    )


def read_dataset_class(args):
    """Rows of the user's own dataset, whose items are dictionaries."""
    path, _, name = args.dataset_class.partition(":")
    try:
        spec = importlib.util.spec_from_file_location(Path(path).stem, path)
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        dataset = getattr(module, name)()
        read = functools.lru_cache(maxsize=1)(dataset.__getitem__)  # image and conditions of one and the same call
        rows, number_of = [], len(args.condition_type)
        for i in range(len(dataset)):
            item = read(i)
            found = sum(re.fullmatch(r"condition_\d+", key) is not None for key in item)
            if found != number_of:
                return [], [
                    f"--dataset_class {args.dataset_class}: item {i} has {found} conditions for {number_of} "
                    "of --condition_type"
                ]
            row = {key: functools.partial(read_item, read, i, key) for key in ("image", *condition_keys(number_of))}
            places = tuple(
                (tuple(map(float, item[f"position_delta_{n}"])), float(item.get(f"position_scale_{n}", 1.0)))
                for n in range(number_of)
            )
            rows.append((f"{args.dataset_class}[{i}]", {**row, "description": item["description"], "places": places}))
    except Exception as error:  # whatever the user's file raises
        return [], [f"--dataset_class {args.dataset_class}: cannot be read ({error!r})"]
    return rows, []


def read_item(read, i, key):
    """A picture of the user's own dataset."""
    return read(i)[key]


def condition_keys(number_of):
    return [f"condition_{i}" for i in range(number_of)]


def open_bytes(file):
    """A picture of a stream, {"bytes": ..., "path": ...}."""
    return Image.open(io.BytesIO(file["bytes"]) if file["bytes"] else file["path"])


def picture_columns(args, columns=()):
    """The columns that hold pictures: image, conditions, mask. Tars have jpg, png or webp where there is no image."""
    image = args.image_column
    if args.data_files and image not in columns:
        image = next((name for name in ("jpg", "jpeg", "png", "webp") if name in columns), image)
    if args.instance_data_dir:
        image = "image"
    return [image, *(args.condition_column or ()), *([args.mask_column] if args.mask_column else ())]


def caption_column(args):
    return args.caption_column or ("json.prompt" if args.data_files else None)


def lookup(row, column):
    """The value of "a.b" in {"a": {"b": value}} or of a column of that whole name, None if there is none."""
    if column in row:
        return row[column]
    for part in column.split("."):
        row = row.get(part) if isinstance(row, dict) else None
    return row


def caption_of(row, columns, args):
    """What the first of `columns` that there is says, else --instance_prompt."""
    texts = (lookup(row, column) for column in columns)
    return next((text for text in texts if text is not None), args.instance_prompt)


def examples_of(name, row, args):
    """The examples of a row: one, or for pairs of a subject side by side two, each picture once the condition."""
    if args.dataset_class:
        pictures = [Example(f"{name}, {key}", row[key]) for key in condition_keys(len(args.condition_type))]
        return [ControlExample(name, row["image"], row["description"], pictures, places=row["places"])]
    columns = picture_columns(args, row)
    image = row[columns[0]]
    mask = Example(f"{name}, {args.mask_column}", row[args.mask_column]) if args.mask_column else None
    pictures = [Example(f"{name}, {column}", row[column]) for column in args.condition_column or ()]
    needed = sum(kind in ("subject", "custom") for kind in args.condition_type)
    if needed == len(pictures):
        names = [caption_column(args)] if caption_column(args) else ["text", "prompt", "caption"]
        return [ControlExample(name, image, caption_of(row, names, args), pictures, mask)]
    examples, place = [], args.condition_type[: args.condition_type.index("subject")].count("custom")
    for side in (0, 1):
        names = (f"description.description_{side}", f"description_{side}", args.caption_column or "text")
        halves = [functools.partial(half_of, image, half, args.image_size, args.padding) for half in (side, 1 - side)]
        others = [*pictures[:place], Example(f"{name}, other side", halves[1]), *pictures[place:]]
        examples.append(ControlExample(f"{name}, side {side}", halves[0], caption_of(row, names, args), others, mask))
    return examples


def half_of(read, side, image_size, padding):
    """The left (0) or right (1) picture, `image_size` square, of a pair with `padding` around and between."""
    image, left = read(), padding + side * (image_size + padding)
    if image.width < left + image_size or image.height < padding + image_size:
        raise ValueError(
            f"{image.width} x {image.height} pixels hold no pair of --image_size {image_size} and --padding {padding}"
        )
    return image.crop((left, padding, left + image_size, padding + image_size))


def streamed_examples(row, name, args):
    """The examples of a row of a stream, whose pictures are files not yet decoded."""
    pictures = picture_columns(args, row)
    return examples_of(name, {**row, **{c: functools.partial(open_bytes, row[c]) for c in pictures}}, args)


class StreamedBatches(IterableDataset):
    """Batches of a stream for the micro-steps `start` to `stop` of one process.

    Every epoch is the stream, shuffled anew within a buffer, from (seed, epoch). Its samples are cut into batches that
    go round the processes; those of earlier micro-steps are passed over undecoded.
    """

    def __init__(self, stream, sample, args, *, process_index, num_processes):
        self.stream = stream.shuffle(seed=args.seed, buffer_size=args.shuffle_buffer)
        self.sample, self.args = sample, args  # sample(example, epoch, index)
        self.process_index, self.num_processes = process_index, num_processes
        self.start = self.stop = 0

    def rows(self):
        """(example, epoch, index) without end."""
        epoch = 0
        while True:
            self.stream.set_epoch(epoch)
            index = 0
            for row in self.stream:
                for example in streamed_examples(row, f"epoch {epoch}, sample {index} of the stream", self.args):
                    yield example, epoch, index
                    index += 1
            epoch += 1

    def __iter__(self):
        batch, size = [], self.args.train_batch_size
        for n, position in enumerate(self.rows()):
            micro_step, process = divmod(n // size, self.num_processes)
            if micro_step == self.stop:
                return
            if micro_step < self.start or process != self.process_index:
                continue
            batch.append(self.sample(*position))
            if len(batch) == size:
                yield default_collate(batch)
                batch = []


# ---------------------------------------------------------------------------------------------------------------------
# Latents and tokens
# ---------------------------------------------------------------------------------------------------------------------


@torch.no_grad()
def encode_moments(vae, pixel_values):
    """The VAE posterior of images [B, 3, H, W] in [-1, 1]: mean and log-variance [B, 2C, H/f, W/f], float32.

    Images go through the VAE one at a time: batched convolutions round differently, and a latent must not depend
    on whether it was cached or on what else was in its batch.
    """
    images = pixel_values.to(vae.device, vae.dtype).split(1)
    return torch.cat([vae.encode(image).latent_dist.parameters for image in images]).float()


def cache_moments(accelerator, vae, keys, load_pixels, folder=None):
    """The VAE posterior of every picture of a run: {key: `encode_moments` of load_pixels(key), on the CPU}.

    `load_pixels` returns an image [3, H, W] in [-1, 1]. The processes share the work; each returns all. With `folder`,
    posteriors are kept there for later runs, by the pixels and the VAE they were made of.
    """
    model = fingerprint(vae) if folder else b""

    def moments(key):
        pixels = load_pixels(key)
        key = model + str(tuple(pixels.shape)).encode() + pixels.numpy().tobytes() if folder else b""
        return disk_cached(folder, key, lambda: encode_moments(vae, pixels[None])[0].cpu())

    with accelerator.split_between_processes(list(keys)) as share:
        progress_bar = tqdm(share, desc="Caching latents", unit="image", disable=not accelerator.is_main_process)
        found = [(key, moments(key)) for key in progress_bar]
    return dict(gather_object(found))


def disk_cached(folder, key, compute):
    """The tensor that `compute` returns, kept in `folder` (None: nowhere) under the SHA-256 of `key` (bytes).

    A file is whole or absent, also if the process is killed; one that the disk damaged is written anew. Whatever the
    tensor depends on belongs in the key.
    """
    if folder is None:
        return compute()
    path = Path(folder) / f"{hashlib.sha256(key).hexdigest()}.safetensors"
    if not is_whole(path):
        partial, value = path.with_suffix(f".{os.getpid()}.partial"), compute().contiguous()
        with writing(path, partial):
            path.parent.mkdir(parents=True, exist_ok=True)
            save_file({"value": value}, partial)
            partial.replace(path)
    return load_file(path)["value"]


def is_whole(path):
    """Whether a safetensors file is there and as long as its header says: a crash of the machine can leave it cut."""
    try:
        with safe_open(path, "pt"):
            return True
    except (OSError, SafetensorError):
        return False


def fingerprint(model):
    """Bytes that tell models apart: a hash of names, shapes, dtypes and 256 values of each of the weights."""
    digest = hashlib.sha256()
    for name, tensor in model.state_dict().items():
        values = tensor.flatten()[:: max(1, tensor.numel() // 256)][:256].float().cpu()
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode() + values.numpy().tobytes())
    return digest.digest()


def sample_latents(moments, vae_config, generator=None):
    """Latents [B, C, h, w], normalised as the transformer expects them, drawn from posteriors [B, 2C, h, w]."""
    latents = DiagonalGaussianDistribution(moments).sample(generator)
    return (latents - vae_config.shift_factor) * vae_config.scaling_factor


def mean_latents(moments, vae_config):
    """The means [B, C, h, w] of posteriors [B, 2C, h, w], normalised as by `sample_latents`, without its chance."""
    return (moments.chunk(2, dim=1)[0] - vae_config.shift_factor) * vae_config.scaling_factor


def decode_latents(vae, latents):
    """Images [B, 3, H, W] in about [-1, 1] from normalised latents [B, C, h, w]."""
    latents = latents / vae.config.scaling_factor + vae.config.shift_factor
    return vae.decode(latents.to(vae.dtype)).sample


def latent_statistics(vae):
    """(shift, scale) that normalise a VAE's latents, (latents - shift) * scale: numbers, or tensors [C, 1, 1]."""
    if isinstance(vae, AutoencoderKLQwenImage):
        mean, std = vae.config.latents_mean, vae.config.latents_std
        return tuple(torch.tensor(value, device=vae.device).view(-1, 1, 1) for value in (mean, [1 / s for s in std]))
    return getattr(vae.config, "shift_factor", None) or 0.0, vae.config.scaling_factor


@torch.no_grad()
def encode_images(vae, pixel_values):
    """Normalised latents [B, C, h, w], float32, of images [B, 3, H, W] in [-1, 1]: the mean of the posterior.

    For AutoencoderKL (FLUX.1, SD3), AutoencoderDC (Sana) and AutoencoderKLQwenImage; one image at a time, as above.
    """
    latents = []
    for image in pixel_values.to(vae.device, vae.dtype).split(1):
        if isinstance(vae, AutoencoderKLQwenImage):  # to which an image is a video of one frame
            latents.append(vae.encode(image.unsqueeze(2)).latent_dist.mode().squeeze(2))
        else:
            encoded = vae.encode(image)
            latents.append(encoded.latent if isinstance(vae, AutoencoderDC) else encoded.latent_dist.mode())
    shift, scale = latent_statistics(vae)
    return (torch.cat(latents).float() - shift) * scale


@torch.no_grad()
def decode_images(vae, latents):
    """Images [B, 3, H, W] in about [-1, 1] from what `encode_images` returns."""
    shift, scale = latent_statistics(vae)
    latents = (latents / scale + shift).to(vae.dtype)
    if isinstance(vae, AutoencoderKLQwenImage):
        return vae.decode(latents.unsqueeze(2)).sample.squeeze(2)
    return vae.decode(latents).sample


def pack_latents(latents):
    """[B, C, h, w] to tokens [B, h/2 * w/2, 4C], each a 2 x 2 patch."""
    return FluxPipeline._pack_latents(latents, *latents.shape)


def unpack_latents(packed, height, width):
    """Tokens [B, h/2 * w/2, 4C] to [B, C, h, w], where `height` and `width` are h and w in latents."""
    return FluxPipeline._unpack_latents(packed, height, width, vae_scale_factor=1)


def image_ids(height, width, device=None):
    """Position ids [h/2 * w/2, 3] of packed latents: (0, row, column)."""
    return FluxPipeline._prepare_latent_image_ids(None, height // 2, width // 2, device, torch.float32)


def select_tokens(tokens, ids, keep):
    """The tokens [B, N, C] where keep [B, N] is true, in order, with their ids [N, D]: [B, M, C] and [B, M, D].

    M is the largest count in the batch. Samples with fewer are padded: `valid` [B, M] is False there, and None
    if nothing is padded.
    """
    counts = keep.sum(dim=1)
    length = int(counts.max())
    order = torch.argsort(~keep, dim=1, stable=True)[:, :length]
    chosen = tokens.gather(1, order[..., None].expand(-1, -1, tokens.shape[-1]))
    valid = torch.arange(length, device=keep.device) < counts[:, None]
    return chosen, ids[order], None if valid.all() else valid


def token_hole(hole):
    """The tokens of which any pixel is in the hole: boolean [H, W] to [H / 16, W / 16]."""
    height, width = hole.shape
    return hole.reshape(height // PATCH, PATCH, width // PATCH, PATCH).any(axis=(1, 3))


def pack_fill_condition(masked_image_latents, mask):
    """The channels FLUX.1-Fill reads beside the noisy latents: tokens [B, h/2 * w/2, 4C + 4f²].

    masked_image_latents [B, C, h, w] are normalised latents; mask [B, 1, H, W] is 1 where the image is to be
    generated, f = H / h. The mask keeps its full resolution: each token carries its 2f x 2f pixels.
    """
    pixels_per_latent = mask.shape[-1] // masked_image_latents.shape[-1]
    mask = F.pixel_unshuffle(mask.to(masked_image_latents), pixels_per_latent)
    return torch.cat([pack_latents(masked_image_latents), pack_latents(mask)], dim=-1)


def to_image(pixels):
    """A PIL image of pixels [1, 3, H, W] in about [-1, 1]."""
    pixels = ((pixels[0].float().clamp(-1, 1) + 1) * 127.5).round().byte()
    return Image.fromarray(pixels.permute(1, 2, 0).cpu().numpy())


class TensorCache:
    """What text encoder and VAE made of prompts and pictures: files in a folder, which a later run finds again.

    A file is named by what was encoded, `what` (JSON), and by `about` (JSON), which is all else that goes into it.
    """

    def __init__(self, folder, about):
        self.folder, self.about = Path(folder), about

    def path(self, *what):
        digest = hashlib.sha256(json.dumps([self.about, what]).encode()).hexdigest()
        return self.folder / f"{digest[:40]}.safetensors"

    def load(self, *what):
        """{name: tensor}."""
        return load_file(self.path(*what))

    def fill(self, accelerator, items, encode, desc):
        """Writes encode(*what), {name: tensor}, of each `what` in `items` that is missing; the processes share it."""
        self.folder.mkdir(parents=True, exist_ok=True)
        missing = [what for what in items if not is_whole(self.path(*what))]
        accelerator.wait_for_everyone()
        with accelerator.split_between_processes(missing) as share:
            for what in tqdm(share, desc=desc, disable=not accelerator.is_main_process or not missing):
                tensors = {name: value.cpu().contiguous() for name, value in encode(*what).items()}
                partial = self.path(*what).with_suffix(f".{accelerator.process_index}")
                with writing(self.path(*what), partial):
                    save_file(tensors, partial)
                    partial.replace(self.path(*what))
        accelerator.wait_for_everyone()
