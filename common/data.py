"""Images and captions from folders and datasets, and the order in which training sees them.

A script reads, then checks, then assigns; nothing but the last step changes an example:

    examples, problems = read_folder(args.instance_data_dir, caption_column=args.caption_column,
                                     partner_dirs={"mask": args.mask_data_dir})       # or read_dataset(...)
    images = all_images(examples)                                                     # masks among them
    sizes, unreadable = read_sizes(images)                                            # upright, in pixels
    problems += unreadable + check_captions(examples, default=args.instance_prompt)
    for image, size in zip(images, sizes, strict=True):
        image.size = size
    for example in examples:
        example.caption = args.instance_prompt if example.caption is None else example.caption

and a sample is `fit(example.image(), Size(height, width), args.image_interpolation_mode)`, its mask
`fit_mask(example.images["mask"].image(), size)`. A generator reads a file as `upright(open_image(path))`.

`load_dataset("imagefolder")` does not read folders here: it drops images that metadata.jsonl does not list, accepts
rows of files that are not there, knows no .txt captions, and copies every folder into its cache.
"""

import functools
import io
import json
import math
import sys
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import KW_ONLY, dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple

import fsspec
import numpy as np
import torch
from diffusers.training_utils import parse_buckets_string
from PIL import ExifTags, Image, ImageOps
from safetensors import SafetensorError
from torch.utils.data import IterableDataset, Sampler, default_collate
from tqdm.contrib.concurrent import thread_map


IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")

UNREAD_SUFFIXES = (".heic", ".heif", ".avif", ".tif", ".tiff", ".gif")

MAX_SIDE = 8192  # pixels of an image that is trained on

# nearest_exact is torchvision's name for PIL's nearest, which takes the pixel at the centre
INTERPOLATION = [*(mode.name.lower() for mode in Image.Resampling), "nearest_exact"]

CAPTION_COLUMNS = ("text", "prompt", "caption")  # of metadata.jsonl, where no column is named

# PIL hands PostScript to Ghostscript, and reads what an IPTC file contains in any format, PostScript too.
UNSAFE_FORMATS = ("EPS", "IPTC")


# ---------------------------------------------------------------------------------------------------------------------
# Images
# ---------------------------------------------------------------------------------------------------------------------


class Size(NamedTuple):
    """Height and width in pixels, the order of tensors; PIL's is `size[::-1]`."""

    height: int
    width: int

    @classmethod
    def of(cls, image: Image.Image) -> "Size":
        return cls(image.height, image.width)

    def __str__(self) -> str:
        return f"{self.width} x {self.height}"


def open_image(file: Path | str | io.BytesIO) -> Image.Image:
    """A PIL image, not decoded yet, of any format that PIL reads without running another program.

    The content decides on the format, not the name. Raises OSError for what is no image.
    """
    Image.preinit()  # PNG, JPEG, ... are tried first
    Image.init()
    return Image.open(file, formats=[name for name in Image.ID if name not in UNSAFE_FORMATS])


def upright(image: Image.Image) -> Image.Image:
    """The RGB image that a viewer shows: rotated as EXIF says, transparent parts white, 16-bit grey scaled to 8."""
    image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I"):  # 16-bit grey, which PIL would clip to white
        image = Image.fromarray((np.asarray(image) / 257).astype(np.uint8))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


def fit(
    image: Image.Image,
    size: tuple[int, int],
    interpolation: str = "lanczos",
    *,
    centering: Sequence[float] = (0.5, 0.5),
    mirrored: bool = False,
) -> Image.Image:
    """The image resized to cover `size` (height, width), cropped at `centering` (x, y in [0, 1]), perhaps mirrored."""
    height, width = size
    method = Image.Resampling[interpolation.removesuffix("_exact").upper()]
    image = ImageOps.fit(image, (width, height), method, centering=(centering[0], centering[1]))
    return ImageOps.mirror(image) if mirrored else image


def parse_buckets(aspect_ratio_buckets: str | None, resolution: int) -> list[Size]:
    """The sizes of "height,width;height,width", or the square of `resolution`. Raises ValueError for other text."""
    if aspect_ratio_buckets is None:
        return [Size(resolution, resolution)]
    return [Size(height, width) for height, width in parse_buckets_string(aspect_ratio_buckets)]


def check_buckets(aspect_ratio_buckets: str | None, multiple: int) -> list[str]:
    """Problems of --aspect_ratio_buckets, whose sides must be multiples of `multiple` and at most MAX_SIDE."""
    if aspect_ratio_buckets is None:
        return []
    try:
        sizes = parse_buckets_string(aspect_ratio_buckets)
    except ValueError:
        return [f"--aspect_ratio_buckets {aspect_ratio_buckets}: expected height,width;height,width"]
    return [
        f"--aspect_ratio_buckets: {height},{width} must be two multiples of {multiple}, at most {MAX_SIDE}"
        for height, width in sizes
        if height % multiple or width % multiple or max(height, width) > MAX_SIDE
    ]


def nearest_bucket(size: Size, buckets: Sequence[Size]) -> Size:
    """The bucket nearest to an image in aspect ratio, then in area."""

    def distance(bucket: Size) -> tuple[float, float]:
        width_ratio = math.log(size.width / bucket.width)
        height_ratio = math.log(size.height / bucket.height)
        return round(abs(width_ratio - height_ratio), 6), abs(width_ratio + height_ratio)

    return min(buckets, key=distance)


def fit_mask(mask: Image.Image, size: tuple[int, int], **crop: Any) -> np.ndarray:
    """What is white in a mask, cropped as `fit` crops its image: boolean [H, W], True from 128 of 255."""
    return np.asarray(fit(mask.convert("L"), size, "nearest", **crop)) >= 128


# ---------------------------------------------------------------------------------------------------------------------
# Examples
# ---------------------------------------------------------------------------------------------------------------------


@dataclass
class Example:
    """An image and what belongs to it.

    name     what messages call it: its path, or DATASET[row]
    read     opens the image, PIL; None for a prompt without image
    caption  as it was found: text, None, a list of texts, or what a check refuses
    images   examples of its other images by role: mask, target, reference, condition_0, ...
    columns  its row of metadata.jsonl or of the dataset, less images
    stamp    text that changes when its files change
    size     of the upright image, once it is assigned
    """

    name: str
    read: Callable[[], Image.Image] | None = None
    caption: Any = None
    _: KW_ONLY
    images: "dict[str, Example]" = field(default_factory=dict)
    columns: dict[str, Any] = field(default_factory=dict)
    stamp: str = ""
    size: Size | None = None

    @property
    def captions(self) -> list:
        """The caption, or those of a list of them, in a list."""
        if self.caption is None:
            return []
        return self.caption if isinstance(self.caption, list) else [self.caption]

    def image(self) -> Image.Image:
        """The image, upright, RGB. Raises what PIL raises for a damaged file."""
        if self.read is None:
            raise ValueError(f"{self.name} has no image")
        return upright(self.read())


def file_example(path: Path, caption: Any = None, *, name: str | None = None) -> Example:
    """The example of an image file, which need not be there yet."""
    return Example(name or str(path), functools.partial(open_image, path), caption, stamp=file_stamp(path))


def file_stamp(path: Path) -> str:
    """Path, bytes and time of a file's last change; nothing of one that cannot be looked at."""
    try:
        status = path.stat()
    except (OSError, ValueError):
        return ""
    return f"{path} {status.st_size} {status.st_mtime_ns}"


def all_images(examples: Iterable[Example]) -> list[Example]:
    """Each example, followed by the examples of its other images."""
    images = []
    for example in examples:
        images.append(example)
        images.extend(example.images.values())
    return images


# ---------------------------------------------------------------------------------------------------------------------
# Checks: they return problems, and assign nothing
# ---------------------------------------------------------------------------------------------------------------------


def check_captions(
    examples: Sequence[Example],
    default: str | None = None,
    *,
    several: bool = False,
    remedy: str = "give --instance_prompt, captions in .txt files, or --caption_column",
) -> list[str]:
    """Problems of captions: missing ones without a `default`, and those that are empty or not text.

    With `several`, a caption may be a list of texts, one of which is taken each time (TwinFlow).
    """
    problems = []
    missing = [example.name for example in examples if example.caption is None]
    if missing and default is None:
        more = f" and {len(missing) - 3} more" if len(missing) > 3 else ""
        problems.append(f"no caption for {', '.join(missing[:3])}{more}: {remedy}")
    for example in examples:
        if example.caption is None:
            continue
        texts = example.captions if several else [example.caption]
        invalid = [text for text in texts if not isinstance(text, str) or not text.strip()]
        if invalid or not texts:
            wrong = invalid[0] if invalid else example.caption
            problems.append(f"{example.name}: its caption must be text and not empty, not {wrong!r}")
    return problems


def check_images(examples: Sequence[Example], check: Callable[[Example], str | None]) -> list[str]:
    """Problems of images, in order of the examples: what check(example) returns (None: none) or raises."""
    problems = []
    for problem, error in map_examples(check, examples):
        if problem or error:
            problems.append(problem or error)
    return problems


def read_sizes(examples: Sequence[Example], *, decode: bool = True) -> tuple[list[Size | None], list[str]]:
    """The size of each upright image, None of one that cannot be read, and problems.

    Without `decode`, PNG files are verified by their checksums and JPEG files decoded at an eighth of their size: a
    folder of thousands of images is checked in seconds.
    """
    results = map_examples(upright_size if decode else verified_size, examples)
    return [size for size, _ in results], [error for _, error in results if error]


def map_examples(function: Callable[[Example], Any], examples: Sequence[Example]) -> list[tuple[Any, str | None]]:
    """[(function(example), None), or (None, problem) where it raises], by a pool of threads, with a progress bar."""

    def attempt(example: Example) -> tuple[Any, str | None]:
        try:
            return function(example), None
        except Exception as error:  # PIL's decoders raise many exception types
            return None, f"{example.name}: not a readable image ({error})"

    return thread_map(attempt, examples, desc="Reading images", unit="image", leave=False)


def upright_size(example: Example) -> Size:
    """The size of an image that is decoded whole."""
    return Size.of(example.image())


def verified_size(example: Example) -> Size:
    """The size of an image whose file is read whole, without decoding all of it; raises what PIL raises."""
    assert example.read is not None
    image = example.read()
    size = Size.of(image)
    is_decoded = getattr(image, "fp", None) is None
    if image.format == "PNG" and not is_decoded and "exif" not in image.info:
        image.verify()
        return size
    if image.getexif().get(ExifTags.Base.Orientation, 1) >= 5:  # the camera was turned by a quarter
        size = Size(size.width, size.height)
    image.draft(None, (1, 1))
    upright(image)
    return size


# ---------------------------------------------------------------------------------------------------------------------
# Folders
# ---------------------------------------------------------------------------------------------------------------------


def image_files(folder: Path) -> tuple[list[Path], list[str]]:
    """(the image files in a folder, sorted; problems of those in a format that is not read)."""
    paths = sorted(folder.iterdir())
    problems = [
        f"{path}: save it as PNG or JPEG, {path.suffix} is not read"
        for path in paths
        if path.suffix.lower() in UNREAD_SUFFIXES
    ]
    return [path for path in paths if path.suffix.lower() in IMAGE_SUFFIXES], problems


def check_folders(folders: Mapping[str, Path | None]) -> list[str]:
    """Problems of folders {flag: folder or None} that are not there."""
    return [f"{flag} {folder}: no such folder" for flag, folder in folders.items() if folder and not folder.is_dir()]


def read_text(path: Path) -> str | None:
    """The text of a file, without space around it; None if there is no file. Raises ValueError if it holds no text."""
    try:
        return path.read_text("utf-8-sig").strip() if path.exists() else None
    except (OSError, ValueError):
        raise ValueError(f"{path}: not UTF-8 text") from None


def read_metadata(path: Path) -> tuple[dict[str, dict], list[str]]:
    """({file_name: the other columns of its row} of a metadata.jsonl, problems); nothing if there is no file."""
    rows = {}
    try:
        lines = path.read_text("utf-8-sig").splitlines() if path.exists() else []
        for line in lines:
            if line.strip():
                row = json.loads(line)
                rows[str(row.pop("file_name"))] = row
        json.dumps(rows, ensure_ascii=False).encode()  # half of a surrogate pair is not text
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        return {}, [f"{path}: each line must be JSON with file_name ({error!r})"]
    return rows, []


def check_caption_column(path: Path, rows: Mapping[str, dict], column: str | None) -> list[str]:
    """Problems of rows of metadata.jsonl, all of which need a caption in the same column."""
    if not rows:
        return [f"--caption_column {column}: no {path} that has columns"] if column else []
    column = column or first_column(rows)
    if column is None:
        names = f"{', '.join(CAPTION_COLUMNS[:-1])} or {CAPTION_COLUMNS[-1]}"
        return [f"{path}: no column {names} in its first line: name the captions with --caption_column"]
    missing = [name for name, row in rows.items() if column not in row]
    return [f"{path}: no column {column} for {name}, see --caption_column" for name in missing[:1]]


def first_column(rows: Mapping[str, dict]) -> str | None:
    """The first of CAPTION_COLUMNS that the first row has."""
    first_row = next(iter(rows.values()))
    return next((column for column in CAPTION_COLUMNS if column in first_row), None)


def find_partners(
    paths: Sequence[Path], folder: Path, match: Literal["stem", "name"]
) -> tuple[dict[Path, Path], list[str]]:
    """({image: the one image in `folder` with its stem, or with its whole name}, problems)."""
    candidates: dict[str, list[Path]] = {}
    problems = []
    if match == "name":
        candidates = {path.name: [folder / path.name] for path in paths if (folder / path.name).is_file()}
    else:
        files, problems = image_files(folder)
        for file in files:
            candidates.setdefault(file.stem, []).append(file)
    partners = {}
    for path in paths:
        found = candidates.get(path.name if match == "name" else path.stem, [])
        if len(found) == 1:
            partners[path] = found[0]
        else:
            wanted = path.name if match == "name" else f"{path.stem}.*"
            names = " and ".join(file.name for file in found) or "none"
            problems.append(f"{path}: needs one image {wanted} in {folder}, which has {names}")
    return partners, problems


def check_stems(folder: Path, paths: Sequence[Path]) -> list[str]:
    """Problems of images that differ only in their ending, where partners are found by the stem."""
    names: dict[str, list[str]] = {}
    for path in paths:
        names.setdefault(path.stem, []).append(path.name)
    return [
        f"{folder}: {' and '.join(same)} differ only in their ending, and so have the same partners"
        for same in names.values()
        if len(same) > 1
    ]


def read_folder(
    folder: Path,
    *,
    flag: str = "--instance_data_dir",
    caption_column: str | None = None,
    caption_dir: Path | None = None,
    caption_per_line: bool = False,
    partner_dirs: Mapping[str, Path | None] | None = None,
    partner_match: Literal["stem", "name"] = "stem",
    partner_columns: Mapping[str, str] | None = None,
    use_metadata: bool = True,
    whole_rows: bool = False,
    sort_by_stem: bool = False,
) -> tuple[list[Example], list[str]]:
    """Examples of the images in a folder, sorted by path, and problems.

    A caption is in `caption_dir` in STEM.txt; else in `caption_column` (default: the first of CAPTION_COLUMNS in the
    first line) of metadata.jsonl, where every line needs one; else in the .txt file beside the image.

    partner_dirs {role: folder}: each image has one partner there, by the stem or the whole name (`partner_match`); the
    flag of such a folder is --ROLE_data_dir.
    partner_columns {role: column}: metadata.jsonl names the image's partner, a file that is no example itself.

    caption_per_line: each line of a .txt file is one of several captions (TwinFlow).
    use_metadata=False: metadata.jsonl is not looked at (TwinFlow).
    whole_rows: lines of metadata.jsonl may lack a caption, for it may be in further columns. A .txt file stands in for
    a whole line, {"text": its text}, and not for a caption that a line lacks (OminiControl).
    sort_by_stem: "a.png" comes before "a-b.png" (InFluxEdit).
    """
    partner_columns = partner_columns or {}
    partner_dirs = {role: path for role, path in (partner_dirs or {}).items() if path}
    partner_flags = {f"--{role}_data_dir": path for role, path in partner_dirs.items()}
    problems = check_folders({flag: folder, **partner_flags, "--caption_data_dir": caption_dir})
    if problems:
        return [], problems
    paths, problems = image_files(folder)
    if sort_by_stem:
        paths.sort(key=lambda path: path.stem)
    if not paths and not problems:
        return [], [f"{flag} {folder}: no images ({', '.join(IMAGE_SUFFIXES)}) in it"]

    metadata = folder / "metadata.jsonl"
    rows, unread = read_metadata(metadata) if use_metadata else ({}, [])
    problems += unread
    listed_partners = {str(row.get(column)) for row in rows.values() for column in partner_columns.values()}
    paths = [path for path in paths if path.name not in listed_partners]
    absent = sorted(rows.keys() - {path.name for path in paths})
    problems += [f"{metadata}: no image {name} in this folder" for name in absent]
    if use_metadata and not whole_rows and not unread:
        problems += check_caption_column(metadata, rows, caption_column)
    columns = list(CAPTION_COLUMNS)
    if caption_column:
        columns = [caption_column]
    elif rows and not whole_rows:  # every line has its caption in the column that the first line uses
        columns = [first_column(rows) or CAPTION_COLUMNS[0]]

    partners = {}
    for role, partner_dir in partner_dirs.items():
        partners[role], unmatched = find_partners(paths, partner_dir, partner_match)
        problems += unmatched
    if caption_dir or (partner_dirs and partner_match == "stem"):
        problems += check_stems(folder, paths)

    examples = []
    for path in paths:
        row = rows.get(path.name, {})
        text_file = caption_dir / f"{path.stem}.txt" if caption_dir else path.with_suffix(".txt")
        caption = None if caption_dir else first_value(row, columns)
        has_whole_row = whole_rows and path.name in rows  # its caption may be in a further column
        if caption is None and not has_whole_row:
            try:
                text = read_text(text_file)
            except ValueError as error:
                problems.append(str(error))
                continue
            if whole_rows:  # the file stands in for a line of metadata.jsonl
                row = {"text": text}
                caption = first_value(row, columns)
            elif caption_per_line and text is not None:
                lines = [line.strip() for line in text.splitlines()]
                caption = [line for line in lines if line]
            else:
                caption = text
        example = file_example(path, caption)
        example.columns = {name: value for name, value in row.items() if name not in partner_columns.values()}
        for role in partner_dirs:
            if path in partners[role]:
                example.images[role] = file_example(partners[role][path])
        for role, column in partner_columns.items():
            file_name = row.get(column)
            if isinstance(file_name, str):
                example.images[role] = file_example(folder / file_name, name=f"{path}, {column}")
            else:
                problems.append(f"{metadata}: column {column} names no file for {path.name}")
        example.stamp = " ".join(image.stamp for image in all_images([example]))
        examples.append(example)
    return examples, problems


def read_class_images(folder: Path | None, prompt: str, limit: int) -> list[Example]:
    """Examples of the first `limit` images of --class_data_dir, as far as there are any."""
    if folder is None or not folder.is_dir():
        return []
    paths, _ = image_files(folder)
    return [file_example(path, prompt) for path in paths[:limit]]


# ---------------------------------------------------------------------------------------------------------------------
# Datasets
# ---------------------------------------------------------------------------------------------------------------------


def lookup(row: Any, column: str) -> Any:
    """The value of "a.b" in {"a": {"b": value}} or of a column of that whole name, None if there is none."""
    if column in row:
        return row[column]
    for part in column.split("."):
        row = row.get(part) if isinstance(row, dict) else None
    return row


def first_value(row: dict, columns: Iterable[str]) -> Any:
    """What the first of `columns` says that says anything; None if none does."""
    values = (lookup(row, column) for column in columns)
    return next((value for value in values if value is not None), None)


def read_encoded(file: Mapping[str, Any] | None) -> Image.Image:
    """The decoded image of {"bytes": ..., "path": ...}, a file of a dataset, turned as EXIF says."""
    if file is None:
        raise ValueError("there is no image")
    data, path = file["bytes"], file["path"]
    if not data and "://" in str(path):
        remote: Any = fsspec.open(path, "rb")
        with remote as opened:
            data = opened.read()
    elif not data:
        data = Path(path).read_bytes()
    return ImageOps.exif_transpose(open_image(io.BytesIO(data)))


def read_cell(dataset: Any, row: int, column: str) -> Image.Image:
    """An image of a dataset; those in other columns are not read."""
    return read_encoded(dataset.select_columns(column)[row][column])


def load_rows(
    path: str,
    *,
    source: str,
    image_columns: Mapping[str, str | Sequence[str]],
    caption_column: str | None = None,
    config_name: str | None = None,
    data_files: Sequence[str] | None = None,
    cache_dir: str | Path | None = None,
    streaming: bool = False,
) -> tuple[Any, dict[str, str], list[str]]:
    """(dataset, {role: its column of images}, problems); no dataset if there are problems.

    For the arguments see `read_dataset`. Images are not decoded: they are {"bytes": ..., "path": ...}.
    """
    import datasets

    datasets.disable_progress_bars()
    columns = {}
    try:
        dataset: Any = datasets.load_dataset(
            path,
            config_name,
            data_files=data_files,
            split="train",
            cache_dir=None if cache_dir is None else str(cache_dir),
            streaming=streaming,
        )
        found = dataset.column_names or list(next(iter(dataset)))
        for role, names in image_columns.items():
            names = [names] if isinstance(names, str) else names
            columns[role] = next((name for name in names if name in found), names[0])
        needed = list(columns.values())
        if caption_column is not None:
            needed.append(caption_root(caption_column, found))
        absent = [name for name in needed if name not in found]
        if absent:
            return None, {}, [f"{source}: no column {', '.join(absent)}; it has {', '.join(found)}"]
        features = dataset.features or {}
        others = [name for name, feature in features.items() if isinstance(feature, datasets.Image)]
        for column in dict.fromkeys([*columns.values(), *others]):
            dataset = dataset.cast_column(column, datasets.Image(decode=False))
    except Exception as error:  # a missing, gated, empty or malformed dataset each raises its own exception
        return None, {}, [f"{source}: cannot be loaded ({error})"]
    return dataset, columns, []


def row_example(
    row: dict,
    name: str,
    *,
    readers: Mapping[str, Callable[[], Image.Image]],
    image_columns: Mapping[str, str],
    caption_columns: Iterable[str],
    stamp: str = "",
) -> Example:
    """The example of a row of a dataset; `readers` {role: function that opens an image}."""
    example = Example(name, readers.get("image"), first_value(row, caption_columns), stamp=stamp)
    example.columns = {column: value for column, value in row.items() if column not in image_columns.values()}
    for role, column in image_columns.items():
        if role != "image":
            example.images[role] = Example(f"{name}, {column}", readers[role], stamp=stamp)
    return example


def read_dataset(
    path: str,
    *,
    source: str,
    name: str | None = None,
    image_columns: Mapping[str, str | Sequence[str]],
    caption_column: str | None = None,
    whole_rows: bool = False,
    **loading: Any,
) -> tuple[list[Example], list[str]]:
    """Examples of a dataset's train split, in its order, and problems.

    path            hub id or folder of a dataset; "parquet" or "webdataset" with `data_files`
    source          the flag and its value, as messages name the data; `name` (default: path) as examples do: NAME[row]
    image_columns   {"image": column, role: column, ...}; of several names for a role the first that there is
    caption_column  "a.b" is b within column a; without it there are no captions
    whole_rows      all columns but images are read, and without `caption_column` the caption is in the first of
                    CAPTION_COLUMNS that has one (OminiControl)
    loading         config_name, data_files, cache_dir: as in `load_rows`
    """
    dataset, columns, problems = load_rows(
        path, source=source, image_columns=image_columns, caption_column=caption_column, **loading
    )
    if problems:
        return [], problems
    texts = []
    if whole_rows:
        features = dataset.features.items()
        texts = [column for column, feature in features if type(feature).__name__ != "Image"]
    elif caption_column is not None:
        texts = [caption_root(caption_column, dataset.column_names)]
    rows = dataset.select_columns(texts).to_list() if texts else [{}] * len(dataset)
    examples = []
    for i, row in enumerate(rows):
        readers = {role: functools.partial(read_cell, dataset, i, column) for role, column in columns.items()}
        examples.append(
            row_example(
                row,
                f"{name or path}[{i}]",
                readers=readers,
                image_columns=columns,
                caption_columns=caption_names(caption_column, whole_rows),
                stamp=f"{dataset._fingerprint} {i}",
            )
        )
    return examples, [] if examples else [f"{source}: no images in it"]


def caption_root(caption_column: str, columns: Sequence[str]) -> str:
    """The column that holds a caption: "a" for "a.b", unless there is a column of that whole name."""
    return caption_column if caption_column in columns else caption_column.split(".")[0]


def caption_names(caption_column: str | None, whole_rows: bool) -> Sequence[str]:
    """The columns of a dataset that may hold a caption, see `read_dataset`."""
    if caption_column is not None:
        return [caption_column]
    return CAPTION_COLUMNS if whole_rows else ()


def open_stream(
    path: str,
    *,
    source: str,
    image_columns: Mapping[str, str | Sequence[str]],
    caption_column: str | None = None,
    **loading: Any,
) -> tuple[Any, Callable[[dict, str], Example] | None, list[str]]:
    """(stream, function (row, name) -> example, problems) of a dataset that is read as it comes.

    Arguments as those of `read_dataset` with `whole_rows`.
    """
    stream, columns, problems = load_rows(
        path, source=source, image_columns=image_columns, caption_column=caption_column, streaming=True, **loading
    )
    if problems:
        return None, None, problems
    to_example = functools.partial(
        streamed_example, image_columns=columns, caption_columns=caption_names(caption_column, whole_rows=True)
    )
    return stream, to_example, []


def streamed_example(
    row: dict, name: str, *, image_columns: Mapping[str, str], caption_columns: Iterable[str]
) -> Example:
    """The example of a row of a stream, whose images are files that are not decoded yet."""
    readers = {role: functools.partial(read_encoded, row[column]) for role, column in image_columns.items()}
    return row_example(row, name, readers=readers, image_columns=image_columns, caption_columns=caption_columns)


# ---------------------------------------------------------------------------------------------------------------------
# Batches
# ---------------------------------------------------------------------------------------------------------------------


def collate(examples: Sequence[Sequence[dict[str, Any]]]) -> dict[str, Any]:
    """A batch of examples, each a list [sample] or [sample, class sample]: first all samples, then all class samples.

    Tensors are stacked, prompts are a list.
    """
    samples = [sample for group in zip(*examples, strict=True) for sample in group]
    batch = {}
    for name in samples[0]:
        values = [sample[name] for sample in samples]
        batch[name] = values if name == "prompt" else torch.stack(values)
    return batch


def read_batches(dataloader: Iterable) -> Iterator:
    """What a DataLoader yields; a file that can no longer be read ends the run with one message."""
    try:
        yield from dataloader
    except (OSError, ValueError, SyntaxError, SafetensorError, Image.DecompressionBombError) as error:
        reason = (str(error).strip() or repr(error)).splitlines()[-1]  # after a worker's traceback
        raise SystemExit(
            f"\n{Path(sys.argv[0]).name}: error: the data can no longer be read: {reason}. Checkpoints are intact: "
            "fix it, then continue with --resume_from_checkpoint latest"
        ) from None


class StepSampler(Sampler):
    """Batches of (epoch, index) for the micro-steps `start` to `stop` of one process.

    Every epoch is a new random order of all samples, from (seed, epoch), cut into batches, each of one of the
    `groups` (the bucket of each sample), that go round the processes; what a micro-step trains on is the same however
    often training was interrupted before it. `batch_size` is a number, or {group: number}.
    """

    def __init__(
        self,
        groups: Sequence[Hashable],
        batch_size: "int | dict[Any, int]",
        *,
        seed: int,
        process_index: int,
        num_processes: int,
        start: int = 0,
        stop: int = 0,
    ):
        self.groups = groups
        self.batch_size = batch_size
        self.seed = seed
        self.start = start
        self.stop = stop
        self.process_index = process_index
        self.num_processes = num_processes
        self.steps_per_epoch = math.ceil(len(self.batches(0)) / num_processes)

    def batches(self, epoch: int) -> list[list[int]]:
        """The batches of an epoch, for all processes together."""
        rng = np.random.default_rng((self.seed, epoch))
        order = rng.permutation(len(self.groups)).tolist()
        batches = []
        for group in dict.fromkeys(self.groups):
            members = [index for index in order if self.groups[index] == group]
            size = self.batch_size[group] if isinstance(self.batch_size, dict) else self.batch_size
            batches += [members[i : i + size] for i in range(0, len(members), size)]
        return [batches[i] for i in rng.permutation(len(batches))]

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        batches = []
        for step in range(self.start, self.stop):
            epoch, step_of_epoch = divmod(step, self.steps_per_epoch)
            if step == self.start or step_of_epoch == 0:
                batches = self.batches(epoch)
            batch = step_of_epoch * self.num_processes + self.process_index
            yield [(epoch, index) for index in batches[batch % len(batches)]]

    def __len__(self) -> int:
        return self.stop - self.start


class StreamedBatches(IterableDataset):
    """Batches of a stream for the micro-steps `start` to `stop` of one process.

    Every epoch is the stream, shuffled anew within a buffer, from (seed, epoch). Its samples are cut into batches that
    go round the processes; those of earlier micro-steps are passed over undecoded.
    examples_of(row, name) returns the examples of a row, sample(example, epoch, index) a sample, {name: tensor}.
    """

    def __init__(
        self,
        stream: Any,
        examples_of: Callable[[dict, str], list[Example]],
        sample: Callable[[Example, int, int], dict],
        *,
        batch_size: int,
        shuffle_buffer: int,
        seed: int,
        process_index: int,
        num_processes: int,
    ):
        self.stream = stream.shuffle(seed=seed, buffer_size=shuffle_buffer)
        self.examples_of = examples_of
        self.sample = sample
        self.batch_size = batch_size
        self.process_index = process_index
        self.num_processes = num_processes
        self.start = 0
        self.stop = 0

    def examples(self) -> Iterator[tuple[Example, int, int]]:
        """(example, epoch, index) without end."""
        epoch = 0
        while True:
            self.stream.set_epoch(epoch)
            index = 0
            for row in self.stream:
                for example in self.examples_of(row, f"epoch {epoch}, sample {index} of the stream"):
                    yield example, epoch, index
                    index += 1
            epoch += 1

    def __iter__(self) -> Iterator[dict[str, Any]]:
        batch = []
        for count, (example, epoch, index) in enumerate(self.examples()):
            micro_step, process = divmod(count // self.batch_size, self.num_processes)
            if micro_step == self.stop:
                return
            if micro_step < self.start or process != self.process_index:
                continue
            batch.append(self.sample(example, epoch, index))
            if len(batch) == self.batch_size:
                yield default_collate(batch)
                batch = []
