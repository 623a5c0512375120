"""Images and captions from folders and datasets, and the order in which training sees them."""

import json
import math
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import EpsImagePlugin, Image, ImageOps
from safetensors import SafetensorError
from torch.utils.data import IterableDataset, Sampler, default_collate
from tqdm.auto import tqdm


IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")

UNREAD_SUFFIXES = (".heic", ".heif", ".avif", ".tif", ".tiff", ".gif")

INTERPOLATION = [mode.name.lower() for mode in Image.Resampling]


EpsImagePlugin.gs_binary = False  # PIL would run Ghostscript on PostScript under a picture's name


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


def read_row(dataset, row, column):
    """A picture of a dataset; those in other columns are not decoded."""
    return dataset.select_columns(column)[row][column]


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


class StreamedBatches(IterableDataset):
    """Batches of a stream for the micro-steps `start` to `stop` of one process.

    Every epoch is the stream, shuffled anew within a buffer, from (seed, epoch). Its samples are cut into batches that
    go round the processes; those of earlier micro-steps are passed over undecoded.
    """

    def __init__(self, stream, examples_of, sample, args, *, process_index, num_processes):
        self.stream = stream.shuffle(seed=args.seed, buffer_size=args.shuffle_buffer)
        self.examples_of = examples_of  # examples_of(row, name, args)
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
                for example in self.examples_of(row, f"epoch {epoch}, sample {index} of the stream", self.args):
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
