"""Looks at a folder of photos and at the GPU, and prints the command that trains on them, its memory, and why.

    python examples/suggest.py photos/ --gpu 12GB --class_word dog     # a subject, or a style
    python examples/suggest.py poses/ --gpu 12GB                       # its metadata.jsonl names a condition of each
    python examples/suggest.py before/ after/ --gpu 12GB               # an edit

Nothing is trained or written. Memory is what examples/estimate_memory.py estimates, which takes half a minute for each
way to train that is tried.
"""

import argparse
import os
import re
import shlex
import statistics
import sys
import textwrap
from dataclasses import dataclass
from pathlib import Path


sys.path.insert(0, str(Path(__file__).parents[1]))


# isort: split
from common.arguments import Parser
from common.checkpoints import unused_path
from common.data import (
    CAPTION_COLUMNS,
    IMAGE_SUFFIXES,
    Size,
    check_captions,
    describe_data,
    fit,
    map_examples,
    metadata_file,
    read_folder,
    read_metadata,
    read_prompts,
    upright,
)
from common.tracking import FORECAST_STEP, python

import cv2
import numpy as np
import torch
from PIL import ExifTags, Image

from examples import estimate_memory
from examples.estimate_memory import GIB, MODELS, needed


ROOT = Path(__file__).parents[1]
KINDS = {  # {--kind: (script, models)}
    "subject": (
        "train_dreambooth_flux_advanced.py",
        ("FLUX.1-dev", "FLUX.2-klein-4B", "FLUX.2-klein-9B", "FLUX.2-dev"),
    ),
    "style": ("train_dreambooth_flux_advanced.py", ("FLUX.1-dev", "FLUX.2-klein-4B", "FLUX.2-klein-9B", "FLUX.2-dev")),
    "condition": ("train_omini.py", ("FLUX.1-dev", "FLUX.2-klein-4B", "FLUX.2-klein-9B")),
    "edit": (
        "train_influxedit.py",
        ("FLUX.1-Fill-dev", "FLUX.1-Kontext-dev", "FLUX.2-klein-4B", "FLUX.2-klein-9B", "FLUX.2-dev"),
    ),
    "few_steps": ("train_twinflow.py", ()),
}
EDITED = ("target", "edit", "after", "output", "result")  # how columns of edited images begin
HUB_IDS = {  # {name in estimate_memory.py: what is trained}
    "FLUX.1-dev": "black-forest-labs/FLUX.1-dev",
    "FLUX.1-Fill-dev": "black-forest-labs/FLUX.1-Fill-dev",
    "FLUX.1-Kontext-dev": "black-forest-labs/FLUX.1-Kontext-dev",
    "FLUX.2-klein-4B": "black-forest-labs/FLUX.2-klein-base-4B",
    "FLUX.2-klein-9B": "black-forest-labs/FLUX.2-klein-base-9B",
    "FLUX.2-dev": "black-forest-labs/FLUX.2-dev",
}
CLASS_WORDS = ("dog", "cat", "person", "car", "house")  # whose images keep what the model knows
NUM_CLASS_IMAGES = 200
ENOUGH = range(5, 21)  # photos of a subject, as the page says; more, with captions, are taken for a style
LEAST_SIDE = 256  # pixels that are trained at least, in steps of 64
SWAP_STEP = 4  # blocks, from one number of --blocks_to_swap that is tried to the next
ALIKE = 4  # of 64 bits: photos that differ in no more are said to look alike
BLURRED = 100  # variance of the Laplacian of grey, 0 to 255; a usual value, not measured here
LONG = 1.5  # times the shorter side: of a longer photo, a third is not in the square that is trained
TRIED_STEPS = 20  # that tell how long a step takes
COLUMNS = 100  # of a line


# ---------------------------------------------------------------------------------------------------------------------
# Photos
# ---------------------------------------------------------------------------------------------------------------------


@dataclass
class Photo:
    """What is seen in an image: its size (upright), whether EXIF turns it and whether it has transparent parts; 64
    bits in which images that look alike differ little; the variance of its Laplacian."""

    size: Size
    is_turned: bool
    is_transparent: bool
    bits: np.ndarray
    sharpness: float


def look(example):
    """The Photo of an example; raises what PIL raises for a damaged file."""
    image = example.read()
    is_turned = image.getexif().get(ExifTags.Base.Orientation, 1) != 1
    is_transparent = image.has_transparency_data
    image = upright(image)
    grey = image.convert("L")
    return Photo(Size.of(image), is_turned, is_transparent, difference_hash(grey), sharpness(grey))


def difference_hash(grey):
    """Whether each of 8 x 8 places is brighter than the one to its left: booleans [64]."""
    places = np.asarray(grey.resize((9, 8), Image.Resampling.BOX))
    return (places[:, 1:] > places[:, :-1]).flatten()


def sharpness(grey):
    """The variance of the Laplacian of the square in the middle, at most 512 pixels wide: low if an image is blurred,
    and if it shows smooth things."""
    side = min(512, *grey.size)
    return float(cv2.Laplacian(np.asarray(fit(grey, (side, side))), cv2.CV_64F).var())


def look_alike(photos):
    """[(name of the first, name of another that looks like it)] of {name: Photo}."""
    firsts = {}
    pairs = []
    for name, photo in photos.items():
        alike = [first for first, bits in firsts.items() if np.count_nonzero(bits != photo.bits) <= ALIKE]
        if alike:
            pairs.append((alike[0], name))
        else:
            firsts[name] = photo.bits
    return pairs


def middle_side(photos):
    """The median of the shorter sides in pixels."""
    return int(statistics.median_low(min(photo.size) for photo in photos.values()))


def describe_photos(photos):
    """What is seen in {name: Photo}, {label: text}."""
    sides = [min(photo.size) for photo in photos.values()]
    turned = sum(photo.is_turned for photo in photos.values())
    transparent = sum(photo.is_transparent for photo in photos.values())
    long = sum(max(photo.size) > LONG * min(photo.size) for photo in photos.values())
    lines = {"shorter sides": f"{min(sides)} to {max(sides)} pixels, the median is {middle_side(photos)}"}
    if turned:
        lines["turned by EXIF"] = f"{turned}: trained as a viewer shows them"
    if transparent:
        lines["transparent"] = f"{transparent}: transparent parts become white"
    if long:
        lines["long"] = f"{long} longer than {LONG} times the shorter side: a random square of each is trained"
    return lines


def doubts(photos, resolution):
    """What a person should look at in {name: Photo}, a sentence each."""
    found = [f"{first} and {name} look alike: keep the better one" for first, name in look_alike(photos)]
    for name, photo in photos.items():
        if min(photo.size) < resolution:
            found.append(f"{name}, {photo.size}, is too small: it is enlarged to {resolution} pixels")
        if photo.sharpness < BLURRED:
            found.append(f"{name} may be blurred: look at it")
    return found


# ---------------------------------------------------------------------------------------------------------------------
# What is learned, and what is kept
# ---------------------------------------------------------------------------------------------------------------------


def style_flags(why):
    """(the flags of a style, {flag: why}); `why` it is taken for one."""
    flags = ["--instance_prompt=sks style", "--validation_prompt=a house on a hill, sks style"]
    keep = "prompts of your own in a file keep others as they are: --preserve_outputs=1 --preserve_prompts=prompts.txt"
    return flags, {"--instance_prompt": why, "not given": keep}


def subject_flags(words, class_word, captions):
    """(the flags of a subject that prompts call `words`, {flag: why}); a photo's caption is None if it has none."""
    prompt = f"a photo of {words}" if not any(captions) else words
    flags = [f"--instance_prompt={prompt}", f"--validation_prompt={words} on the beach"]
    reasons = {"--instance_prompt": f"prompts call the subject {words!r}"}
    others = ",".join(dict.fromkeys([class_word, *CLASS_WORDS]))
    class_prompt = f"{words}=>{others}"
    _, problems = read_prompts("--class_prompt", class_prompt, [caption or prompt for caption in captions])
    if problems:
        keep = f"no caption says {words!r}: write it into them, then class images can keep what the model knows"
        return flags, reasons | {"not given": keep}
    flags += ["--with_prior_preservation", f"--class_data_dir={class_word}-class-images"]
    flags += [f"--class_prompt={class_prompt}", f"--num_class_images={NUM_CLASS_IMAGES}", "--prior_target=base"]
    flags += ["--timestep_sampling=shift"]
    keep = "class images keep what the model knows: on the toy, ordinary prompts stay at 92 of 94, not at 12"
    shift = "more steps at high noise, as in that measurement"
    return flags, reasons | {"--class_prompt": keep, "--timestep_sampling": shift}


def task_flags(args, captions, words):
    """(the flags of what is learned and kept, {flag: why}); prompts call a subject `words`."""
    if args.kind == "condition":
        return condition_flags(args, captions)
    if args.kind == "edit":
        return edit_flags(args, captions)
    if args.kind == "style":
        flags, reasons = style_flags(args.why)
    else:
        flags, reasons = subject_flags(words, args.class_word, captions)
    if any(captions):
        flags += ["--caption_dropout=0.2", "--caption_dropout_to=instance_prompt"]
        reasons["--caption_dropout"] = "the prompt alone works, too: on the toy, a score of 59, not of 28"
    return flags, reasons


def condition_flags(args, captions):
    """(the flags of train_omini.py for the columns of metadata.jsonl, {flag: why})."""
    example = next(example for example in args.examples if example.images.keys() >= {*args.columns})
    prompt = example.caption or f"a photo of a {args.class_word}"
    files = [os.path.relpath(example.images[column].files[0]) for column in args.columns]
    flags = ["--condition_type", *["custom"] * len(args.columns), "--condition_column", *args.columns]
    flags += [f"--validation_prompt={prompt}", "--validation_image", *files, "--validation_steps=500"]
    if not all(captions):
        flags.append(f"--instance_prompt={prompt}")
    reasons = {"--condition_type": args.why}
    reasons["position"] = "a condition lies on its image; one beside it, as a subject, takes --position_delta"
    return flags, reasons


def edit_flags(args, captions):
    """(the flags of train_influxedit.py for a folder of edited images or a column of them, {flag: why})."""
    caption_column = None
    if args.columns:  # `datasets` reads captions of metadata.jsonl alone, and of a column that is named
        rows = [example.columns for example in args.examples]
        caption_column = next((name for name in CAPTION_COLUMNS if any(row.get(name) for row in rows)), None)
        captions = [value if isinstance(value := row.get(caption_column), str) else None for row in rows]
    prompt = (captions[0] or "sks edit").replace(";", ",")  # which separates prompts
    flags = ["--mode=edit", f"--validation_prompt={prompt}", "--validation_steps=500"]
    if not all(captions):
        flags.append(f"--instance_prompt={prompt}")
    if args.columns:
        flags += [f"--target_column={args.columns[0].removesuffix('_file_name')}"]
        flags += [f"--caption_column={caption_column}"] if caption_column else []
    else:
        flags.append(f"--target_data_dir={args.edited}")
    return flags, {"--mode": args.why}


# ---------------------------------------------------------------------------------------------------------------------
# What fits
# ---------------------------------------------------------------------------------------------------------------------


@dataclass
class Way:
    """A way to train: a preset, the flags that change it, why; and the Estimate of the command, once there is one."""

    preset: str
    flags: list[str]
    why: str
    command: list[str] | None = None  # the script and its words
    estimate: estimate_memory.Estimate | None = None

    @property
    def words(self):
        return shlex.split((ROOT / self.preset).read_text(), comments=True) + self.flags

    @property
    def peak(self):
        """(GiB of a card, the phase that needs them)"""
        phase = max(self.estimate.peaks, key=self.estimate.peaks.get)
        return needed(self.estimate.peaks[phase]), phase


def settings_of(words):
    """The values of some flags among a command's words."""
    parser = argparse.ArgumentParser(allow_abbrev=False)
    parser.add_argument("--resolution", "--target_size", type=int)
    for flag in ("--max_train_steps", "--train_batch_size"):
        parser.add_argument(flag, type=int)
    parser.add_argument("--gradient_accumulation_steps", type=int, default=1)
    parser.add_argument("--with_prior_preservation", action="store_true")
    parser.add_argument("--quantize_base", default="none")
    return parser.parse_known_args(words)[0]


def command_of(args, way, task):
    """The words of a training command, less --output_dir; `task` are the flags of what is learned."""
    source = "--dataset_name" if args.kind == "edit" and args.columns else "--instance_data_dir"
    words = [from_here(KINDS[args.kind][0]), f"@{from_here(way.preset)}", *way.flags]
    return [*words, f"--pretrained_model_name_or_path={HUB_IDS[args.model]}", f"{source}={args.photos}", *task]


def side_flags(args, side):
    """The flags with which images have `side` pixels."""
    if args.kind == "edit":
        return [f"--resolution={side}", f"--validation_width={side}", f"--validation_height={side}"]
    if args.kind == "condition":
        condition = [] if args.model.startswith("FLUX.2") else [f"--condition_size={side // 2}"]
        return [f"--target_size={side}", *condition]
    return [f"--resolution={side}"]


def ways(args, can_have_token, side):
    """Ways to train a model, each slower than the one before, or further from the base model; images have at most
    `side` pixels a side."""
    is_flux2 = args.model.startswith("FLUX.2")
    if args.kind == "condition":
        folder, small = "examples/omini", "flux2_klein.args" if is_flux2 else "low_memory.args"
    elif args.kind == "edit":
        folder, small = "examples/influxedit", "flux2_klein_low_memory.args" if is_flux2 else "low_memory.args"
    else:
        folder, small = "examples/dreambooth", "flux2_klein_low_memory.args" if is_flux2 else "low_memory.args"
    if args.model == "FLUX.1-dev" and can_have_token:
        why = "a LoRA and new tokens, trained on large images: the most of the presets, and it fits"
        yield Way(f"{folder}/best_quality.args", [], why)
    if args.kind != "condition":  # whose fast.args is for --kv_cache
        drawn = side_flags(args, 512)[1:]
        why = "the least time per step: nothing is recomputed or quantized, and it fits"
        yield Way(f"{folder}/fast.args", drawn, why)
    small = f"{folder}/{small}"
    drawn = side_flags(args, 512)[1:] if args.kind == "edit" else []
    recomputed = "it fits if activations are recomputed"
    yield Way(small, [*drawn, "--quantize_base=none"], f"{recomputed}; weights stay as they are")
    yield Way(small, [*drawn, "--quantize_base=int8"], f"{recomputed} and weights have 8 bits, which need not be 4")
    scores = "on the toy, a LoRA on such weights scores 57, on whole ones 62"
    yield Way(small, drawn, f"{recomputed} and weights have 4 bits; {scores}")
    if side > LEAST_SIDE:
        least = side_flags(args, LEAST_SIDE)
        yield Way(small, least, f"only small images fit, with weights in 4 bits; {scores}")


def is_hopeless(args, way):
    """Whether already the weights are more than the card, which takes no time to find out."""
    least = {"none": 1, "int8": 1 / 2, "nf4": 0}[settings_of(way.words).quantize_base]  # nf4: they can lie in RAM
    model = MODELS[args.model]
    transformer = estimate_memory.on_meta(lambda: model.transformer(**model.config))
    return needed(least * estimate_memory.size_of(transformer, torch.bfloat16)) > args.gpu


def estimated(args, way, task, *more_flags, step=None):
    """The way with more flags and the Estimate of its command."""
    changed = Way(way.preset, [*way.flags, *more_flags], way.why)
    changed.command = command_of(args, changed, task)
    known = estimate_memory.parse_args(changed.command)
    changed.estimate = estimate_memory.estimate(MODELS[args.model], known, step)
    return changed


def with_ram(args, way, task):
    """An estimated way of quantized weights that does not fit, with what helps: text encoders in 4 bits, blocks in
    RAM."""
    step = way.estimate.step
    if needed(way.estimate.peaks["encoding prompts"]) > args.gpu:
        way = estimated(args, way, task, "--quantize_text_encoders=nf4", step=step)
        way.why += ". The model that reads prompts has 4 bits, too"
    smaller = way
    for count in range(SWAP_STEP, len(step["blocks"]) + 1, SWAP_STEP):
        if smaller.peak[0] <= args.gpu:
            break
        smaller = estimated(args, way, task, f"--blocks_to_swap={count}", step=step)
        smaller.why += f". {count} of {len(step['blocks'])} blocks wait in RAM, which takes time in each step"
    return smaller


def find_way(args, photos, captions):
    """(the first of `ways` that fits, or the last; {flag: why} of what is learned)."""
    side = max(LEAST_SIDE, middle_side(photos) // 64 * 64)
    for way in ways(args, args.kind == "subject" and not any(captions), side):
        words = "TOK" if "--train_text_encoder_ti" in way.words else f"sks {args.class_word}"
        task, reasons = task_flags(args, captions, words)
        if side < settings_of(way.words).resolution:
            way.flags += side_flags(args, side)
            reasons[way.flags[-1].partition("=")[0]] = f"half of the photos have at most {middle_side(photos)} pixels"
        if is_hopeless(args, way):
            continue
        print("estimating the memory of", way.preset, *way.flags, file=sys.stderr, flush=True)
        way = estimated(args, way, task)
        if way.peak[0] > args.gpu and settings_of(way.words).quantize_base == "nf4":
            way = with_ram(args, way, task)
        if way.peak[0] <= args.gpu:
            break
    return way, reasons


# ---------------------------------------------------------------------------------------------------------------------
# Command line
# ---------------------------------------------------------------------------------------------------------------------


def gigabytes(text):
    """An argparse type: the memory of a card, such as 12GB or 12."""
    found = re.fullmatch(r"(\d{1,4}(?:\.\d+)?) ?(?:GB?|GiB)?", text.strip(), re.IGNORECASE)
    if not found or float(found[1]) == 0:
        raise argparse.ArgumentTypeError(f"{text}: expected the card's memory, such as 12GB")
    return float(found[1])


def class_word(text):
    """An argparse type: a word or two that name a kind of thing."""
    if not re.fullmatch(r"\w[\w -]*", text):
        raise argparse.ArgumentTypeError(f"{text}: expected a word for what the photos show, such as dog")
    return text


def parse_args(argv=None):
    parser = Parser(description=__doc__, takes="PHOTOS [EDITED]")
    parser.add_argument("photos", metavar="PHOTOS", type=Path, help="folder of images, captions beside them if any")
    parser.add_argument("edited", metavar="EDITED", type=Path, nargs="?", help="folder of them after an edit")
    parser.add_argument("--gpu", type=gigabytes, metavar="12GB", help="memory of the card (default: of the one here)")
    parser.add_argument(
        "--model", choices=HUB_IDS, help="what is trained (default: FLUX.1-dev, for edits FLUX.1-Fill-dev)"
    )
    parser.add_argument("--class_word", type=class_word, default="thing", help="what the photos show: dog, man, cup")
    parser.add_argument(
        "--kind",
        choices=KINDS,
        help="what is learned; few_steps: to draw in 1 to 4 steps (default: an edit, of two folders; of a column of "
        f"images in metadata.jsonl an edit if its name begins with {', '.join(EDITED)}, else a condition; a style, of "
        f"more than {ENOUGH[-1]} images of which most have captions; else a subject)",
    )
    args = parser.parse_args(argv)
    args.parser = parser
    if args.kind == "few_steps":
        return args
    problems = []
    args.card = "by --gpu"
    if args.gpu is None and torch.cuda.is_available():
        properties = torch.cuda.get_device_properties(0)
        args.gpu = properties.total_memory / GIB
        args.card = properties.name
    elif args.gpu is None:
        problems.append("no GPU is found here: say which one will train, such as --gpu 12GB")
    args.columns = image_columns(args.photos) if args.photos.is_dir() and not args.edited else []
    args.examples, args.unread = read_folder(
        args.photos,
        flag="PHOTOS",
        partner_dirs={"target": args.edited},
        partner_columns={column: column for column in args.columns},
    )
    if not args.examples:
        problems += args.unread
    parser.refuse(problems)
    args.why = "by --kind"
    choose_kind(args)
    models = KINDS[args.kind][1]
    args.model = args.model or models[0]
    if args.model not in models:
        problems.append(f"--model {args.model}: {KINDS[args.kind][0]} trains {', '.join(models)} here")
    if args.kind == "condition" and not args.columns:
        problems.append("--kind condition: metadata.jsonl must have a column with the file of each image's condition")
    if args.kind == "edit" and not (args.edited or args.columns):
        problems.append("--kind edit: give two folders, PHOTOS and EDITED, with files of equal names")
    if args.edited and args.kind != "edit":
        problems.append(f"--kind {args.kind} takes one folder, not {args.edited} too")
    is_complete = [example.images.keys() >= {*args.columns} for example in args.examples]
    if args.kind in ("condition", "edit") and not any(is_complete):
        problems += args.unread
    parser.refuse(problems)
    return args


def image_columns(folder):
    """The columns of a folder's metadata.jsonl that name images in most of the rows that have them."""
    rows, _ = read_metadata(metadata_file(folder))
    named = {}  # {column: whether each of its values names an image}
    for row in rows.values():
        for column, value in row.items():
            if value:
                named.setdefault(column, []).append(str(value).lower().endswith(IMAGE_SUFFIXES))
    return [column for column, values in named.items() if sum(values) > len(values) / 2]


def choose_kind(args):
    """Sets --kind, if it was not given, and why, by the images and what belongs to them; the column of an edit."""
    captioned = sum(example.caption is not None for example in args.examples)
    edited = [column for column in args.columns if column.lower().startswith(EDITED)]
    if args.kind == "edit":
        args.columns = (edited or args.columns)[:1]
    elif args.kind:
        return
    elif args.edited:
        args.kind, args.why = "edit", "two folders: before and after an edit"
    elif edited:
        args.kind, args.why = "edit", f"the column {edited[0]} names edited images"
        args.columns = edited[:1]
    elif args.columns:
        args.kind, args.why = "condition", f"columns name a condition of each image: {', '.join(args.columns)}"
    elif captioned > len(args.examples) / 2 and len(args.examples) > ENOUGH[-1]:
        args.kind, args.why = "style", f"more than {ENOUGH[-1]} images, with captions: a style"
    else:
        args.kind = "subject"


def print_lines(title, lines):
    """{label: text} below a title, wrapped."""
    print(title)
    for label, text in lines.items():
        print(textwrap.fill(text, COLUMNS, initial_indent=f"  {label:20}", subsequent_indent=" " * 22))


def command_text(program, words):
    """A command as a shell reads it, in lines."""
    lines = [program]
    for word in words:
        flag, equals, value = word.partition("=")
        quoted = f"{flag}={shlex.quote(value)}" if equals and flag.startswith("--") else shlex.quote(word)
        if len(lines[-1]) + len(quoted) > COLUMNS - 4:
            lines.append(" ")
        lines[-1] += f" {quoted}"
    return " \\\n".join(lines)


def from_here(name):
    """The path of a file of this project, as short as it is from the working folder."""
    return os.path.relpath(ROOT / name)


def print_suggestion(args, way, reasons):
    names = {"style": "sks-style", "subject": f"sks-{args.class_word.replace(' ', '-')}", "edit": "edit"}
    name = names.get(args.kind) or "-".join(args.columns)
    settings = settings_of([*way.words, *way.command])
    print("Train with:\n")
    print(f"{command_text(python(), [*way.command, f'--output_dir={unused_path(Path(name))}'])}\n")

    gib, phase = way.peak
    found = way.estimate
    images = settings.train_batch_size * settings.gradient_accumulation_steps
    steps = f"{settings.max_train_steps} steps, each of {images} images"
    before = ""
    if settings.with_prior_preservation:
        steps += f" and {images} class images"
        before = f" Before that, {NUM_CLASS_IMAGES} class images are drawn."
    lines = {
        "GPU": f"{gib:.1f} GB of {args.gpu:.4g}, at the peak: {phase}",
        "RAM": f"{sum(found.ram.values()) / GIB:.0f} GiB; besides, {found.files / GIB:.0f} GiB of files are mapped, "
        "which take what is free of the rest",
        "disk": f"{found.disk['model'] / GIB:.0f} GiB for the model",
        "time": f"{steps}.{before} How long a step takes was measured on no card: with --max_train_steps "
        f"{TRIED_STEPS} behind the command, the progress bar says its seconds, times {settings.max_train_steps}; "
        f"validation comes on top. A whole run says after {FORECAST_STEP} steps how long the rest will take",
    }
    print_lines("Expected:", lines)
    estimator = from_here("examples/estimate_memory.py")
    print(f"\nThe memory is estimated, by {estimator} with all of this command behind it\n")
    why = {"preset": way.why, **reasons}
    if args.class_word == "thing" and args.kind == "subject":
        why["thing"] = "say what the photos show, such as --class_word dog"
    page = (Path(way.preset).parent / "README.md").as_posix()
    print_lines(f"Why ({page} has the figures):", why)


def main(argv=None):
    args = parse_args(argv)
    if args.kind == "few_steps":
        print(
            "examples/twinflow/README.md has the commands of train_twinflow.py, by model, card and number of images,"
        )
        print("and a table of how many steps draw how well. It teaches few steps and no subject: train one first.")
        return
    found = map_examples(look, args.examples)
    photos = {}
    readable = []
    problems = list(args.unread)
    for example, (photo, problem) in zip(args.examples, found, strict=True):
        if problem:
            problems.append(problem)
        else:
            example.size = photo.size
            photos[Path(example.name).name] = photo
            readable.append(example)
    if not photos:
        args.parser.refuse(problems)
    problems += check_captions(readable, default="")
    captions = [example.caption if isinstance(example.caption, str) else None for example in readable]
    for column in args.columns if args.kind == "edit" else []:
        if not column.endswith("_file_name"):
            problems.append(
                f"{metadata_file(args.photos)}: call the column {column} {column}_file_name, as `datasets` does"
            )

    lines = describe_photos(photos)
    folders = [args.photos, args.edited] if args.edited else [args.photos]
    lines |= describe_data(args.examples, folders, "--instance_prompt, as they have none")
    if args.kind == "subject" and len(photos) < ENOUGH[0]:
        lines["few"] = f"better {ENOUGH[0]} to {ENOUGH[-1]} photos, in different places and light"
    print_lines(f"{len(args.examples)} images in {args.photos}", lines)
    args.examples = readable
    way, reasons = find_way(args, photos, captions)
    look_at = doubts(photos, settings_of(way.words).resolution)
    if look_at:
        print("Look at\n  " + "\n  ".join(look_at))
    if problems:
        print("Mend this first, the trainer refuses it\n  " + "\n  ".join(problems))
    print(f"{args.model} on a GPU of {args.gpu:.4g} GB ({args.card})\n")
    gib, phase = way.peak
    if gib > args.gpu:
        remedy = "" if args.model == "FLUX.2-klein-4B" else ": --model FLUX.2-klein-4B needs less"
        args.parser.refuse([f"--gpu {args.gpu:.4g}GB: {args.model} needs {gib:.1f} GB at the peak ({phase}){remedy}"])
    print_suggestion(args, way, reasons)


if __name__ == "__main__":
    main()
