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

import base64
import csv
import filecmp
import functools
import glob
import hashlib
import io
import itertools
import json
import math
import os
import re
import sys
from collections import Counter, deque
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import KW_ONLY, dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple

from common.arguments import check_file
from common.checkpoints import atomic_write, remedy, unused_path, writing
from common.models import gather_objects

import fsspec
import numpy as np
import torch
import torch.distributed as dist
from accelerate import Accelerator
from diffusers.training_utils import parse_buckets_string
from PIL import ExifTags, Image, ImageCms, ImageOps, PngImagePlugin
from safetensors import SafetensorError
from torch.utils.data import IterableDataset, Sampler, default_collate
from tqdm.contrib.concurrent import thread_map


IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".jpe", ".jfif", ".webp", ".bmp")

UNREAD_SUFFIXES = (".heic", ".heif", ".avif", ".tif", ".tiff", ".gif")

ARCHIVE_SUFFIXES = (".zip", ".rar", ".7z", ".tar", ".gz", ".tgz")

MAX_SIDE = 8192  # pixels of an image that is trained on

# nearest_exact is torchvision's name for PIL's nearest, which takes the pixel at the centre
INTERPOLATION = [*(mode.name.lower() for mode in Image.Resampling), "nearest_exact"]

CAPTION_SUFFIXES = (".txt", ".caption")

SAVED_DATASETS = ("state.json", "dataset_dict.json")  # of datasets' save_to_disk

METADATA_FILES = ("metadata.jsonl", "metadata.csv")  # the first of them that there is

MACOS_PREFIX = "._"  # of the files in which macOS keeps what another system's disk has no place for

MAX_CAPTION = 20_000  # characters of a caption that are read; 512 tokens of T5 are about 3,000

TINY = 16  # pixels, a token's side: an image that small shows nothing

MAX_SAMPLES = 10_000_000  # of an epoch, which are held in memory as numbers

SYSTEM_FILES = ("thumbs.db", "desktop.ini")

# Those of UTF-16 read as UTF-8, of binary data and of terminals; tabs and line ends of all kinds are text.
CONTROL_CHARACTER = re.compile(r"[\x00-\x08\x0e-\x1b\x7f]")

CAPTION_COLUMNS = ("text", "prompt", "caption")  # of metadata.jsonl, where no column is named

# Of datasets, tars of the webdataset kind among them, whose columns are the endings of a sample's files.
DATASET_CAPTIONS = (*CAPTION_COLUMNS, "json.prompt", "json.caption", "json.text", "txt")

TAR_IMAGES = ("jpg", "jpeg", "png", "webp")

TAR_NAMES = (
    "in tars, all samples have the same endings, and these begin at the first dot of a name: 0001.jpg and 0001.txt, "
    "0002.jpg and 0002.txt"
)

# PIL hands PostScript to Ghostscript, and reads what an IPTC file contains in any format, PostScript too.
UNSAFE_FORMATS = ("EPS", "IPTC")

MAX_TRIED = 10  # samples of a stream, before training, of which one must be usable

MAX_UNUSABLE = 100  # samples of a stream at the beginning, of which one must be usable

# Of a stream, in a row, without a sample that a process can use. The parts of one epoch may all be damaged; the next
# epoch deals them anew.
MAX_EMPTY_EPOCHS = 20

MAX_PIXELS = 2**28  # 268 megapixels, of an image that is read: 800 MB in memory

STAMP_BYTES = 2**14  # of the beginning and of the end of a file

MAX_CHUNK = 2**24  # bytes of a text or a colour profile in a PNG file, unpacked

# What a PNG file contains, perhaps after its pixels, where it says how to turn them: EXIF, ImageMagick's EXIF, XMP.
PNG_ORIENTATION = (b"eXIf", b"Raw profile type", b"XML:com.adobe.xmp")


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

    The content decides on the format, not the name. Raises OSError for what is no image, ValueError for one of more
    than MAX_PIXELS.
    """
    if not isinstance(file, io.BytesIO) and Path(file).exists() and not Path(file).is_file():
        raise OSError("no file but a folder, a pipe or a device")
    Image.MAX_IMAGE_PIXELS = MAX_PIXELS  # Pillow warns above it, see common/__init__.py, and refuses twice as many
    PngImagePlugin.MAX_TEXT_CHUNK = MAX_CHUNK
    Image.preinit()  # PNG, JPEG, ... are tried first
    Image.init()
    too_large = ValueError(f"it has more than {MAX_PIXELS // 10**6} megapixels: save it smaller")
    try:
        image = Image.open(file, formats=[name for name in Image.ID if name not in UNSAFE_FORMATS])
    except Image.DecompressionBombError:
        raise too_large from None
    if image.width * image.height > MAX_PIXELS:
        raise too_large
    return image


def upright(image: Image.Image) -> Image.Image:
    """The RGB image that a viewer shows.

    It is rotated as EXIF says, transparent parts are white, 16-bit grey is scaled to 8, and the colours of an ICC
    profile are sRGB's.
    """
    profile = image.info.get("icc_profile")
    image = ImageOps.exif_transpose(image)
    if image.mode == "F":  # 0 to 1, 0 to 255, metres: nothing says which, and PIL would clip it
        raise ValueError("its pixels are floating-point numbers: save it with 8 or 16 bits")
    if image.mode == "P":
        image = image.convert("RGBA" if image.has_transparency_data else "RGB")
    if image.mode.startswith("I"):  # 16-bit grey, which PIL would clip to white
        image = Image.fromarray((np.asarray(image) / 257).astype(np.uint8))
    alpha = image.convert("RGBA").getchannel("A") if image.has_transparency_data else None
    image = to_srgb(image, profile) if profile else image.convert("RGB")
    if alpha is not None:
        image.putalpha(alpha)
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


def alpha_channel(image: Image.Image) -> Image.Image:
    """How opaque `upright(image)` was before its transparent parts became white: grey, 255 where it was opaque."""
    image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I") or not image.has_transparency_data:
        return Image.new("L", image.size, 255)
    alpha = image.convert("RGBA").getchannel("A")
    alpha.info = {}  # the colour profile is that of the other channels
    return alpha


def upright_size(image: Image.Image) -> Size:
    """The size of `upright(image)`; a file's header says it, the file is not decoded."""
    size = Size.of(image)
    if image.format == "PNG" and not may_be_turned(image):  # else PIL decodes it to look for more
        return size
    if image.getexif().get(ExifTags.Base.Orientation, 1) >= 5:  # the camera was turned by a quarter
        size = Size(size.width, size.height)
    return size


def may_be_turned(image: Any) -> bool:
    """Whether an open PNG file says how to turn it, before its pixels or, as exiftool writes it, after them."""
    if {"exif", "Raw profile type exif", "xmp"} & image.info.keys():
        return True
    if getattr(image, "fp", None) is None:
        return False
    place = image.fp.tell()
    image.fp.seek(0, io.SEEK_END)
    image.fp.seek(max(0, image.fp.tell() - 2**16))
    end = image.fp.read()
    image.fp.seek(place)
    return any(mark in end for mark in PNG_ORIENTATION)


def to_srgb(image: Image.Image, profile: bytes) -> Image.Image:
    """The RGB image whose sRGB values look as those of `image`, without its transparency, do by an ICC profile.

    A profile that cannot be read, or that is of another kind of image, changes nothing.
    """
    grey = image.mode in ("1", "L", "LA", "La")
    try:
        source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
        mode = {"RGB": "RGB", "GRAY": "L", "CMYK": "CMYK"}[source.profile.xcolor_space.strip()]  # type: ignore[union-attr]
        if (mode == "L") == grey and (mode == "CMYK") == (image.mode == "CMYK"):
            srgb = ImageCms.createProfile("sRGB")
            converted = ImageCms.profileToProfile(image.convert(mode), source, srgb, outputMode="RGB")
            return converted or image.convert("RGB")
    except (ImageCms.PyCMSError, OSError, ValueError, KeyError):
        pass
    return image.convert("RGB")


def check_image_file(flag: str, file: Path) -> list[str]:
    """A problem of a file that an image is to be written to."""
    Image.init()
    if Image.registered_extensions().get(file.suffix.lower()) not in Image.SAVE:
        return [f"{flag} {file}: name an image file, such as {file.stem or 'image'}.png"]
    return check_file(flag, file)


def save_image(image: Image.Image, path: Path) -> Path:
    """Writes an image in the format that its path ends with; returns the path, another one if there is a file of this
    name."""
    path = unused_path(path)
    with atomic_write(path, durable=False) as partial:
        image.save(partial, Image.registered_extensions()[path.suffix.lower()])
    return path


def resampling(interpolation: str) -> Image.Resampling:
    """PIL's name for one of INTERPOLATION."""
    return Image.Resampling[interpolation.removesuffix("_exact").upper()]


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
    image = ImageOps.fit(image, (width, height), resampling(interpolation), centering=(centering[0], centering[1]))
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
    stamp    text that tells its images from others, see `file_stamp`; "" where nothing is known of them
    files    its image and the file of its caption, where these are files
    source   where its caption was found: .txt, metadata.jsonl, the dataset; "" where it was not
    size     of the upright image, once it is assigned
    """

    name: str
    read: Callable[[], Image.Image] | None = None
    caption: Any = None
    _: KW_ONLY
    images: "dict[str, Example]" = field(default_factory=dict)
    columns: dict[str, Any] = field(default_factory=dict)
    stamp: str = ""
    files: tuple[Path, ...] = ()
    source: str = ""
    size: Size | None = None

    def __post_init__(self) -> None:
        self.caption = cut_caption(self.caption)

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


def cut_caption(caption: Any) -> Any:
    """The first MAX_CAPTION characters of a caption, or of each of a list: all that encoders read, and more."""
    if isinstance(caption, str):
        return caption[:MAX_CAPTION]
    return [cut_caption(text) for text in caption] if isinstance(caption, list) else caption


def file_example(path: Path, caption: Any = None, *, name: str | None = None) -> Example:
    """The example of an image file, which need not be there yet."""
    return Example(
        name or str(path), functools.partial(open_image, path), caption, stamp=file_stamp(path), files=(path,)
    )


def file_stamp(path: Path) -> str:
    """The `content_stamp` of a file, which is the same wherever it lies; "" of one that cannot be read."""
    try:
        if not path.is_file():  # reading a pipe waits for what writes there
            return ""
        with path.open("rb", buffering=0) as file:
            return content_stamp(file)
    except (OSError, ValueError):
        return ""


def content_stamp(file: Any) -> str:
    """A hash of an image file, open to be read: of its length, its first 16 KiB and its last; of a BMP file, which is
    not compressed, all of it.

    PNG files end with a checksum of all pixels, and two JPEG or WebP files of different pictures differ in length or
    in how they end. So thousands of files take a second.
    """
    size = file.seek(0, io.SEEK_END)
    digest = hashlib.blake2b(str(size).encode(), digest_size=8)
    file.seek(0)
    beginning = file.read(STAMP_BYTES)
    digest.update(beginning)
    if beginning[:2] == b"BM":
        while part := file.read(2**20):
            digest.update(part)
    elif size > STAMP_BYTES:
        file.seek(max(STAMP_BYTES, size - STAMP_BYTES))
        digest.update(file.read(STAMP_BYTES))
    return digest.hexdigest()


def data_record(examples: Iterable[Example]) -> list[list[str]]:
    """[name, stamp, hash of the caption] of each example: what is compared when a run is resumed."""
    record = []
    for example in examples:
        caption = json.dumps(example.caption, default=str)
        record.append(
            [
                Path(example.name).name,
                example.stamp,
                hashlib.blake2b(caption.encode(), digest_size=8).hexdigest(),
            ]
        )
    return record


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


def first_ten(problems: Sequence[str]) -> list[str]:
    """The first ten problems of a kind, and how many more there are."""
    if len(problems) <= 10:
        return list(problems)
    return [*problems[:10], f"and {len(problems) - 10:,} more like these"]


def same_shape(size: Size, other: Size) -> bool:
    """Whether two sizes have nearly the same aspect ratio, so that `fit` crops the same part of both."""
    aspect = size.width / size.height
    other_aspect = other.width / other.height
    return max(aspect, other_aspect) <= 1.02 * min(aspect, other_aspect)


def check_shape(name: str, kind: str, size: Size, image_size: Size) -> list[str]:
    """A problem of an image, a mask or whatever `kind` says, whose sides are to each other as those of the image that
    it belongs to are not: the two would be cropped apart."""
    if same_shape(size, image_size):
        return []
    return [f"{name}: {kind} must have the shape of its image, {image_size}, not {size}"]


def check_roles(places: Mapping[str, Path | str | None]) -> list[str]:
    """Problems of {flag: folder or column} that are one and the same, though each holds other images than the rest."""
    problems = []
    given = [(flag, place) for flag, place in places.items() if place is not None]
    for (flag, place), (other_flag, other) in itertools.combinations(given, 2):
        is_same = place == other
        if isinstance(place, Path) and isinstance(other, Path) and place.exists() and other.exists():
            is_same = place.samefile(other)
        if is_same:
            problems.append(f"{other_flag} {other} is {flag}, too: every image would belong to itself")
    return problems


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
    refused = {}  # {name: why}
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
            refused[example.name] = f"its caption must be text and not empty, not {quoted(wrong)}"
            continue
        garbled = [text for text in texts if CONTROL_CHARACTER.search(text)]
        if garbled:
            problems.append(f"{example.name}: its caption holds control characters: {garbled[0][:80]!r}")
    if refused:
        first, *others = refused
        so = f"; so must those of {shortened(others)}" if others else ""
        problems.append(f"{first}: {refused[first]}{so}")
    return problems


def check_num_samples(count: int) -> list[str]:
    """A problem of more samples in an epoch than memory has room for."""
    if count <= MAX_SAMPLES:
        return []
    return [f"{count:,} samples per epoch, at most {MAX_SAMPLES:,}: give fewer repeats"]


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
    results = map_examples(decoded_size if decode else verified_size, examples)
    return [size for size, _ in results], [error for _, error in results if error]


def map_examples(function: Callable[[Example], Any], examples: Sequence[Example]) -> list[tuple[Any, str | None]]:
    """[(function(example), None), or (None, problem) where it raises], by a pool of threads, with a progress bar.

    The processes of a run share the examples, and each returns all results; to be called by all of them.
    """

    def attempt(example: Example) -> tuple[Any, str | None]:
        try:
            return function(example), None
        except Exception as error:  # PIL's decoders raise many exception types
            return None, f"{example.name}: not a readable image ({str(error)[:200]})"

    process, num_processes = 0, 1
    if dist.is_initialized():
        process, num_processes = dist.get_rank(), dist.get_world_size()
    share = examples[process::num_processes]
    hidden = process != 0 or not share
    results = thread_map(attempt, share, desc="Reading images", unit="image", leave=False, disable=hidden)
    if num_processes == 1:
        return results
    names = [example.name for example in share]
    found = dict(gather_objects(list(zip(names, results, strict=True))))
    # an example that no other process has, as on machines whose folders differ, is read here
    return [found[each.name] if each.name in found else attempt(each) for each in examples]


def map_ahead(function: Callable[[Any], Any], items: Iterable, num_threads: int) -> Iterator:
    """function(item) of each item, in their order, made by threads that are at most 2 x `num_threads` items ahead."""
    waiting: deque[Future] = deque()
    with ThreadPoolExecutor(num_threads) as threads:
        for item in items:
            waiting.append(threads.submit(function, item))
            if len(waiting) > 2 * num_threads:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()


def read_ahead(items: Iterator) -> Iterator:
    """The items, none of which is None; a thread makes the next one while the last is used."""
    with ThreadPoolExecutor(1) as thread:
        waiting = thread.submit(next, items, None)
        while (item := waiting.result()) is not None:
            waiting = thread.submit(next, items, None)
            yield item


def header_size(example: Example) -> Size:
    """The size of an upright image by its file's header alone; raises what PIL raises for what is no image."""
    if example.size is not None:
        return example.size
    assert example.read is not None
    return upright_size(example.read())


def decoded_size(example: Example) -> Size:
    """The size of an image that is decoded whole."""
    return Size.of(example.image())


def verified_size(example: Example) -> Size:
    """The size of an image whose file is read whole, without decoding all of it; raises what PIL raises."""
    assert example.read is not None
    image = example.read()
    size = upright_size(image)
    is_decoded = getattr(image, "fp", None) is None or getattr(image, "png", True) is None
    if image.format == "PNG" and not is_decoded:
        image.verify()
        return size
    image.draft(None, (1, 1))
    upright(image)
    return size


# ---------------------------------------------------------------------------------------------------------------------
# Folders
# ---------------------------------------------------------------------------------------------------------------------


def image_files(folder: Path) -> tuple[list[Path], list[str]]:
    """(the image files in a folder, sorted; problems of those in a format that is not read)."""
    paths = [path for path in sorted(folder.iterdir()) if not path.name.startswith(MACOS_PREFIX)]
    problems = []
    unread = [path for path in paths if path.suffix.lower() in UNREAD_SUFFIXES]
    suffixes = ", ".join(dict.fromkeys(path.suffix for path in unread))
    if len(unread) == 1:
        problems = [f"{unread[0]}: save it as PNG or JPEG, {suffixes} is not read"]
    elif unread:
        names = shortened([path.name for path in unread])
        problems = [f"{folder}: {suffixes} is not read, save as PNG or JPEG: {names}"]
    return [path for path in paths if path.suffix.lower() in IMAGE_SUFFIXES], problems


def check_folders(folders: Mapping[str, Path | None]) -> list[str]:
    """Problems of folders {flag: folder or None} that are not there."""
    problems = []
    for flag, folder in folders.items():
        if folder and folder.is_file():
            remedy = (
                "unpack it and give the folder" if folder.suffix in ARCHIVE_SUFFIXES else "give the folder it is in"
            )
            problems.append(f"{flag} {visible(folder)}: a file, not a folder of images: {remedy}")
        elif folder and not folder.is_dir():
            problems.append(f"{flag} {visible(folder)}: no such folder")
    return problems


def describe_folder(folder: Path) -> str:
    """What a folder without images holds, for a message: folders with images, or else the names of its files."""
    names = left_out(folder, [])
    if not names:
        return "it is empty"
    folders = [name for name in names if "/ with " in name]
    if folders:
        return f"it holds {shortened(folders)}: give the folder that has the images"
    return f"it holds {shortened(names)}"


def visible(path: Path | str) -> str:
    """A path as messages show it: in quotes, with a hint, where it holds backslashes or what cannot be seen."""
    text = str(path)
    if "\\" in text:
        return f"{text!r} (with backslashes: write /)"
    if not text.isprintable() or text != text.strip():
        return f"{text!r} (with an invisible character or a space at its end)"
    return text


def read_text(path: Path) -> str | None:
    """The text of a file, without space around it; None if there is no file. Raises ValueError if it holds no text."""
    if path.exists() and not path.is_file():
        raise ValueError(f"{path}: not UTF-8 text but a folder, a pipe or a device")
    try:
        text = path.read_text("utf-8-sig").strip() if path.exists() else None
    except (OSError, ValueError):
        raise ValueError(f"{path}: not UTF-8 text") from None
    if text and CONTROL_CHARACTER.search(text):
        raise ValueError(f"{path}: not UTF-8 text, it holds control characters")
    return text


def read_lines(path: Path) -> list[str]:
    """The lines of a text file; [] without one. Raises ValueError as `read_text`.

    A line ends where a text editor ends it; str.splitlines would cut at U+2028, U+0085 and form feeds too.
    """
    text = read_text(path)
    return text.split("\n") if text else []


def read_prompts(flag: str, text: str | None, captions: Iterable[str] = ()) -> tuple[list[str], list[str]]:
    """(the different prompts that `text`, the value of a flag, stands for, problems).

    It is one prompt; or a .txt file with one on each line; or WORDS=>A,B: the captions that have these words, with A
    and with B in their place.
    """
    if text is None:
        return [], []
    words, arrow, replacements = text.partition("=>")
    if arrow:
        words = words.strip()
        others = [other.strip() for other in replacements.split(",") if other.strip()]
        if not words or not others:
            return [], [f"{flag} {text!r}: words, => and what stands in their place: 'sks dog=>dog,cat'"]
        templates = [caption for caption in captions if match_any([words]).search(caption)]
        if not templates:
            return [], [f"{flag} {text!r}: no caption has the words {words!r}"]
        prompts = [replace_words(caption, {words: other}) for caption in templates for other in others]
    elif text.endswith(".txt"):
        path = Path(text).expanduser()
        if not path.is_file():
            return [], [f"{flag} {visible(path)}: no such file"]
        try:
            prompts = [line.strip() for line in read_lines(path) if line.strip()]
        except ValueError as error:
            return [], [f"{flag}: {error}"]
        if not prompts:
            return [], [f"{flag} {path}: no prompts in it"]
    else:
        prompts = [text]
    return list(dict.fromkeys(prompts)), []


LETTER = r"[^\W\u2e80-\u9fff\uac00-\ud7af]"  # of scripts with spaces between words, unlike Chinese; also digits and _


def match_any(words):
    """A regular expression for any of the words where it stands alone: TOK is not in TOKYO, `man` not in woman."""
    patterns = []
    for word in sorted(words, key=len, reverse=True):
        before = rf"(?<!{LETTER})" if re.match(LETTER, word[0]) else ""
        after = rf"(?!{LETTER})" if re.match(LETTER, word[-1]) else ""
        patterns.append(before + re.escape(word) + after)
    return re.compile("|".join(patterns))


def replace_words(prompt, replacements):
    """The prompt with {word: replacement} wherever a word stands alone."""
    if not replacements:
        return prompt
    return match_any(replacements).sub(lambda match: replacements[match[0]], prompt)


def metadata_file(folder: Path) -> Path:
    """The first of METADATA_FILES that is in a folder, or its path in one that has none."""
    return next((folder / name for name in METADATA_FILES if (folder / name).exists()), folder / METADATA_FILES[0])


def read_metadata(path: Path) -> tuple[dict[str, dict], list[str]]:
    """({file_name: the other columns of its row} of a metadata.jsonl or .csv, problems); nothing without a file."""
    rows = {}
    twice = []
    is_table = path.suffix == ".csv"
    try:
        if is_table:
            found = []
            for row in csv.DictReader(io.StringIO(read_text(path) or "")):
                found.append({column: cell or None for column, cell in row.items()})
        else:
            found = [json.loads(line) for line in read_lines(path) if line.strip()]
        for row in found:
            name = str(row.pop("file_name"))
            if name in rows:
                twice.append(name)
            rows[name] = row
        json.dumps(rows, ensure_ascii=False).encode()  # half of a surrogate pair is not text
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError, csv.Error) as error:
        kind = "have a column" if is_table else "be JSON with"
        return {}, [f"{path}: each line must {kind} file_name ({error!r})"]
    if twice:
        names = list(dict.fromkeys(twice))
        return rows, [f"{path}: names {len(names)} files twice: {shortened(names)}"]
    return rows, []


def check_caption_column(path: Path, rows: Mapping[str, dict], column: str | None) -> list[str]:
    """A problem if --caption_column names a column that no row of metadata.jsonl has."""
    if column is None or any(column in row for row in rows.values()):
        return []
    if not rows:
        return [f"--caption_column {column}: no {path} that has columns"]
    first = next(iter(rows))
    return [f"{path}: no column {column} for {first}, see --caption_column"]


def caption_files(folder: Path) -> dict[tuple[str, str], Path]:
    """{(name before its ending, .txt or .caption): path} of the files of captions in a folder."""
    found = {}
    for path in sorted(folder.iterdir()):
        if path.suffix.lower() in CAPTION_SUFFIXES and not path.name.startswith(MACOS_PREFIX):
            found.setdefault((path.stem, path.suffix.lower()), path)
    return found


def find_caption_file(image: Path, captions: Mapping[tuple[str, str], Path]) -> Path | None:
    """The caption of a.png among `caption_files`: a.txt, a.png.txt, a.caption or a.png.caption, in this order."""
    for suffix in CAPTION_SUFFIXES:
        for name in (image.stem, image.name):
            if (name, suffix) in captions:
                return captions[name, suffix]
    return None


def left_out(folder: Path, examples: Iterable[Example]) -> list[str]:
    """What lies in a folder that is read and belongs to none of the examples: files, and folders with their images."""
    used = {file for image in all_images(examples) for file in image.files}
    used.add(metadata_file(folder))
    names = []
    for path in sorted(folder.iterdir()):
        if path in used or path.name.startswith(".") or path.name.lower() in SYSTEM_FILES:
            continue
        name = path.name if path.name.isprintable() else repr(path.name)
        if path.is_dir():
            images = [file for file in path.glob("*") if file.suffix.lower() in IMAGE_SUFFIXES and file not in used]
            if images:
                names.append(f"{name}/ with {len(images)} images")
        else:
            names.append(name)
    return names


def describe_data(examples: Sequence[Example], folders: Iterable[Path | None], default: str) -> dict[str, str]:
    """What the header says of captions and of what was not read, {label: text}.

    `default` says where the captions come from that were found nowhere. At most ten names are said, and a count.
    """
    counts = Counter(example.source or default for example in examples)
    lines = {}
    if counts:
        lines["captions"] = ", ".join(f"{count} from {source}" for source, count in sorted(counts.items()))
    lines |= describe_copies(examples)
    tiny = [f"{example.name} ({example.size})" for example in examples if example.size and min(example.size) < TINY]
    if tiny:
        lines["tiny images"] = f"{len(tiny)} of less than {TINY} pixels a side: {shortened(tiny)}"
    unread = []
    for folder in dict.fromkeys(folders):
        if folder is not None and folder.is_dir():
            unread += [f"{folder.name}/{name}" for name in left_out(folder, examples)]
    if unread:
        lines["not read"] = f"{len(unread)}: {shortened(unread)}"
    return lines


def describe_copies(examples: Sequence[Example]) -> dict[str, str]:
    """What the header says if the targets, the references, ... of most examples are the images themselves.

    {role: text}. At most 16 examples are compared, evenly spaced.
    """
    compared = examples[:: math.ceil(len(examples) / 16) or 1]
    lines = {}
    for role in dict.fromkeys(role for example in compared for role in example.images):
        pairs = [(example, example.images[role]) for example in compared if role in example.images]
        copies = sum(is_copy(image, other) for image, other in pairs)
        if copies > len(pairs) / 2:
            lines[role] = f"equal to its image in {copies} of {len(pairs)} examples that were compared"
    return lines


def is_copy(image: Example, other: Example) -> bool:
    """Whether two images are the same, byte for byte where both are files, else pixel for pixel."""
    if image.files and other.files:
        return filecmp.cmp(image.files[0], other.files[0], shallow=False)
    first = image.image()
    second = other.image()
    return first.size == second.size and first.tobytes() == second.tobytes()


def shortened(names: Sequence[str]) -> str:
    """The first ten of some names, and how many others there are."""
    more = f" and {len(names) - 10} more" if len(names) > 10 else ""
    return f"{', '.join(names[:10])}{more}"


def count_sizes(sizes: Iterable[Hashable]) -> str:
    """How many images have which size, as the header says it, the commonest first; at most ten sizes and a count."""
    counts = Counter(map(size_text, sizes)).most_common()
    texts = [f"{count} at {text}" for text, count in counts[:10]]
    if len(counts) > 10:
        texts.append(f"{sum(count for _, count in counts[10:])} at {len(counts) - 10} more sizes")
    return f"{', '.join(texts)} px"


def size_text(size: Any) -> str:
    """A size as text, or several of one image: 512 x 768 and 1024 x 1536."""
    return str(size) if isinstance(size, Size) else " and ".join(map(str, size))


def describe_small_groups(
    groups: Iterable[Hashable],
    batch_size: "int | Mapping[Any, int]",
    size_of: Callable[[Any], Any] = lambda group: group,
    consequence: str = "too few for a batch, trained in smaller ones",
) -> dict[str, str]:
    """What the header says of sizes with fewer samples than a batch, {label: text}.

    `groups` and `batch_size` are those of `StepSampler`, size_of(group) a size, or several of one image.
    """
    small = []
    for group, count in Counter(groups).items():
        if count < (batch_size[group] if isinstance(batch_size, Mapping) else batch_size):
            small.append(f"{count} at {size_text(size_of(group))}")
    if not small:
        return {}
    more = f" and {len(small) - 10} more sizes" if len(small) > 10 else ""
    return {"small batches": f"{', '.join(small[:10])}{more} px: {consequence}"}


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
    missing = {}
    for path in paths:
        wanted = path.name if match == "name" else f"{path.stem}.*"
        found = candidates.get(path.name if match == "name" else path.stem, [])
        if len(found) == 1:
            partners[path] = found[0]
        elif found:
            names = " and ".join(file.name for file in found)
            problems.append(f"{path}: needs one image {wanted} in {folder}, which has {names}")
        else:
            missing[path] = wanted
    if len(missing) == 1:
        (path,) = missing
        problems.append(f"{path}: needs one image {missing[path]} in {folder}, which has none")
    elif missing:
        of = f"{len(missing)} of {len(paths)} images in {paths[0].parent}"
        problems.append(f"{folder}: needs one image for each, has none for {of}: {shortened(list(missing.values()))}")
    return partners, problems


def is_table(path: Path) -> bool:
    """Whether a file belongs to a dataset, which `read_dataset` reads and `read_folder` does not."""
    return path.suffix in (".parquet", ".arrow", ".tar") or path.name in SAVED_DATASETS


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
    whole_rows: bool = False,
    sort_by_stem: bool = False,
) -> tuple[list[Example], list[str]]:
    """Examples of the images in a folder, sorted by path, and problems.

    A caption is in `caption_dir`, see `find_caption_file`; else in `caption_column` (default: the first of
    CAPTION_COLUMNS that says anything) of the image's line in metadata.jsonl or metadata.csv; else in the .txt file
    beside the image.

    partner_dirs {role: folder}: each image has one partner there, by the stem or the whole name (`partner_match`); the
    flag of such a folder is --ROLE_data_dir.
    partner_columns {role: column}: metadata.jsonl names the image's partner, a file that is no example itself.

    caption_per_line: each line of a .txt file is one of several captions (TwinFlow).
    whole_rows: the caption may be in further columns, so a .txt file is the column "text" of its image (OminiControl).
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
        problem = f"{flag} {folder}: no images ({', '.join(IMAGE_SUFFIXES)}) in it; {describe_folder(folder)}"
        if any(is_table(path) for path in folder.iterdir()):
            problem += ": a dataset is named by --dataset_name"
        return [], [problem]

    metadata = metadata_file(folder)
    rows, unread = read_metadata(metadata)
    problems += unread
    listed_partners = {str(row.get(column)) for row in rows.values() for column in partner_columns.values()}
    paths = [path for path in paths if path.name not in listed_partners]
    absent = sorted(rows.keys() - {path.name for path in paths})
    if absent:
        problems.append(f"{metadata}: no image {shortened(absent)} in this folder")
    if not whole_rows and not unread:
        problems += check_caption_column(metadata, rows, caption_column)
    columns = [caption_column] if caption_column else list(CAPTION_COLUMNS)

    partners = {}
    for role, partner_dir in partner_dirs.items():
        partners[role], unmatched = find_partners(paths, partner_dir, partner_match)
        problems += unmatched
    if caption_dir or (partner_dirs and partner_match == "stem"):
        problems += check_stems(folder, paths)

    captions = caption_files(caption_dir or folder)
    examples = []
    unnamed = {column: [] for column in partner_columns.values()}  # {column: names of images whose row has no file}
    not_there = {column: [] for column in partner_columns.values()}  # {column: files}
    for path in paths:
        row = rows.get(path.name, {})
        caption = None if caption_dir else first_value(row, columns)
        source = metadata.name
        text_file = find_caption_file(path, captions) if caption is None else None
        if text_file:
            try:
                caption = cut_caption(read_text(text_file) or "")
            except ValueError as error:
                problems.append(str(error))
                continue
            source = text_file.suffix.lower()
            if whole_rows:
                row = {**row, "text": caption}
            elif caption_per_line:
                lines = [line.strip() for line in caption.split("\n")]
                caption = [line for line in lines if line]
        example = file_example(path, caption)
        if caption is not None:
            example.source = source
        if text_file:
            example.files += (text_file,)
        example.columns = {name: value for name, value in row.items() if name not in partner_columns.values()}
        for role in partner_dirs:
            if path in partners[role]:
                example.images[role] = file_example(partners[role][path])
        for role, column in partner_columns.items():
            file_name = row.get(column)
            if not isinstance(file_name, str):
                unnamed[column].append(path.name)
            elif not os.path.exists(folder / file_name):  # noqa: PTH110  # Path's raises if a name is too long
                not_there[column].append(file_name)
            else:
                example.images[role] = file_example(folder / file_name, name=f"{path}, {column}")
        example.stamp = " ".join(image.stamp for image in all_images([example]))
        examples.append(example)
    problems += [] if unread else check_partner_columns(metadata, unnamed, not_there)
    return examples, problems


def check_partner_columns(
    metadata: Path, unnamed: Mapping[str, Sequence[str]], not_there: Mapping[str, Sequence[str]]
) -> list[str]:
    """A problem for each column of metadata.jsonl with images for which it names no file, and with files that are not
    there; one for all columns if there is no metadata.jsonl, with a line of it as an example."""
    problems = []
    images = next((names for names in unnamed.values() if names), [])
    if images and not metadata.exists():
        row = {"file_name": images[0], "text": "its caption"}
        row |= {column: f"{column}/{images[0]}" for column in unnamed}
        line = json.dumps(row, ensure_ascii=False)
        return [f"{metadata}: no such file; write a line for each image, with the path from its folder: {line}"]
    for column, names in unnamed.items():
        if names:
            problems.append(f"{metadata}: column {column} names no file for {shortened(names)}")
    for column, files in not_there.items():
        if files:
            problems.append(f"{metadata}: column {column} names files that are not there: {shortened(files)}")
    return problems


def read_class_images(folder: Path | None, prompts: Sequence[str], limit: int) -> list[Example]:
    """Examples of the first `limit` images of --class_data_dir, as far as there are any.

    The caption of an image is in the .txt or .caption file beside it; or it is the prompt that a run drew it for, see
    `drawn_class_image`; else the one prompt that there is. None: none of these.
    """
    if folder is None or not folder.is_dir():
        return []
    paths, _ = image_files(folder)
    captions = caption_files(folder)
    examples = []
    for path in paths[:limit]:
        caption = None
        caption_file = find_caption_file(path, captions)
        if caption_file:
            with suppress(ValueError):  # among the problems of `check_class_images`
                caption = read_text(caption_file) or None
        elif len(prompts) == 1:
            caption = prompts[0]
        else:
            caption = drawn_class_image(path).get("class_prompt")
        examples.append(file_example(path, caption))
    return examples


def check_class_images(
    folder: Path | None, limit: int, *, prompts: Sequence[str], model: str, size: Size
) -> list[str]:
    """Problems of the images in --class_data_dir, if there is one.

    Those in a format that is not read, and those of the first `limit` that have no caption, or that a run drew, see
    `drawn_class_image`, for none of `prompts`, by a model other than `model`, or at another size. Other images are the
    user's own.
    """
    if folder is None or not folder.is_dir():
        return []
    paths, problems = image_files(folder)
    uncaptioned = [example.name for example in read_class_images(folder, prompts, limit) if not example.caption]
    if uncaptioned:
        problems.append(
            f"--class_data_dir {folder}: {len(uncaptioned)} images have no caption that can be read, such as "
            f"{uncaptioned[0]}: write it to the .txt file beside it, or give --class_prompt one prompt for all"
        )
    different = {}  # {name: how}
    for path in paths[:limit]:
        drawn = drawn_class_image(path)
        if not drawn:
            continue
        differences = []
        if drawn["class_prompt"] not in prompts:
            differences.append(f"for the prompt {drawn['class_prompt'][:80]!r}")
        if drawn["class_model"] != model:
            differences.append("by another model")
        if drawn["size"] != str(size):
            differences.append(f"at {drawn['size']} pixels, not {size}")
        if differences:
            different[path.name] = " and ".join(differences)
    if different:
        name, how = next(iter(different.items()))
        problems.append(
            f"--class_data_dir {folder}: {len(different)} of its images are not of this run's class, such as {name}, "
            f"drawn {how}: choose another folder, delete them to have them drawn anew, or give the flags that they "
            "were drawn with"
        )
    return problems


def drawn_class_image(path: Path) -> dict[str, str]:
    """{"class_prompt", "class_model", "size"} of an image that a run drew, the first two from the texts of its PNG; {}
    of others, and of files that cannot be read."""
    try:
        with open_image(path) as image:
            drawn = {name: image.info[name] for name in ("class_prompt", "class_model")}
            return drawn | {"size": str(Size.of(image))}
    except Exception:  # PIL's decoders raise many exception types
        return {}


def describe_class_images(class_examples: Sequence[Example]) -> dict[str, str]:
    """What the header says of class images, {label: text}."""
    if not class_examples:
        return {}
    num_own = sum(not drawn_class_image(example.files[0]) for example in class_examples)
    own = f" ({num_own} of your own)" if num_own else ""
    num_captions = len({example.caption for example in class_examples})
    captions = f", with {num_captions} captions" if num_captions > 1 else ""
    return {"class images": f"{len(class_examples)}{own}{captions}"}


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


def read_encoded(file: Any) -> Image.Image:
    """The image, not decoded yet, of {"bytes": ..., "path": ...}, a file of a dataset, or of a list of one.

    The "path" may be one, an address, or the file itself as base64 text.
    """
    if isinstance(file, list):
        if len(file) != 1:
            raise ValueError(f"a list of {len(file)} images: one is needed, choose another column")
        file = file[0]
    if file is None or not (file["bytes"] or file["path"]):
        raise ValueError("there is no image")
    data = file["bytes"]
    path = file["path"]
    if not data:
        data = base64_bytes(path)
    if not data and "://" in path:
        remote: Any = fsspec.open(path, "rb")
        with remote as opened:
            data = opened.read()
    elif not data:
        data = Path(path).read_bytes()
    return open_image(io.BytesIO(data))


def base64_bytes(text: str) -> bytes:
    """What base64 text, perhaps behind "data:image/png;base64,", stands for; nothing for other text and for paths."""
    if len(text) < 100:
        return b""
    try:
        return base64.b64decode("".join(text.split("base64,")[-1].split()), validate=True)
    except ValueError:
        return b""


def quoted(value: object) -> str:
    """A value as messages quote it: at most 80 characters of its representation."""
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


def read_cell(dataset: Any, row: int, column: str) -> Image.Image:
    """An image of a dataset; those in other columns are not read."""
    return read_encoded(dataset.select_columns(column)[row][column])


def literal_pattern(file: str) -> str:
    """A pattern of `datasets`; of a file that has this very name, one that means the file alone.

    Its folder is the real one: where a name has brackets, `datasets` looks through no links.
    """
    path = Path(file)
    return glob.escape(str(path.parent.resolve() / path.name)) if path.is_file() else file


def cell_stamps(dataset: Any, column: str) -> list[str]:
    """The stamps of the images in a column of a dataset, whose bytes are not copied."""
    stamps = []
    for rows in dataset.select_columns(column).with_format("arrow").iter(1000):
        for cell in rows[column]:
            stamps.append(cell_stamp(cell))
    return stamps


def cell_stamp(cell: Any) -> str:
    """The stamp of the image in a cell of an Arrow table: of its bytes, of its file, or of its address or base64 text.
    "" of a cell without one."""
    import pyarrow

    if isinstance(cell, pyarrow.ListScalar):
        if not cell.is_valid or len(cell.values) != 1:
            return ""
        cell = cell.values[0]
    if not cell.is_valid:
        return ""
    if cell["bytes"].is_valid:
        return content_stamp(pyarrow.BufferReader(cell["bytes"].as_buffer()))
    path = cell["path"].as_py()
    if not path:
        return ""
    address = path.partition("::")[0]  # what follows says where an archive lies
    return file_stamp(Path(path)) or content_stamp(io.BytesIO(address.encode()))


def load_rows(
    path: str,
    *,
    source: str,
    image_columns: Mapping[str, str | Sequence[str]],
    caption_column: str | Sequence[str] | None = None,
    config_name: str | None = None,
    data_files: Sequence[str] | None = None,
    cache_dir: str | Path | None = None,
    streaming: bool = False,
) -> tuple[Any, dict[str, str], list[str]]:
    """(dataset, {role: its column of images}, problems); no dataset if there are problems.

    For the arguments see `read_dataset`. Images are not decoded: they are {"bytes": ..., "path": ...}, or lists of it.
    """
    import datasets

    datasets.disable_progress_bars()
    if data_files:
        data_files = [literal_pattern(file) for file in data_files]
    try:
        if any((Path(path) / name).is_file() for name in SAVED_DATASETS):
            splits: Any = datasets.load_from_disk(path)
        else:
            splits = datasets.load_dataset(
                path,
                config_name,
                data_files=data_files,
                cache_dir=None if cache_dir is None else str(cache_dir),
                streaming=streaming,
            )
        dataset: Any = splits
        if isinstance(splits, dict):
            if "train" not in splits and len(splits) > 1:
                return None, {}, [f"{source}: no split train; it has {', '.join(splits)}: give a dataset of one split"]
            dataset = splits["train"] if "train" in splits else next(iter(splits.values()))
        if streaming and isinstance(dataset, datasets.Dataset):
            dataset = dataset.to_iterable_dataset(num_shards=max(1, len(dataset.cache_files)))
        found = dataset.column_names or list(next(iter(dataset)))
    except IndexError:  # tars
        return None, {}, [f"{source}: cannot be loaded (no samples in it)"]
    except Exception as error:  # a missing, gated, empty or malformed dataset each raises its own exception
        reason = str(error)
        if "don't share the same prefix or the same types" in reason:
            reason = TAR_NAMES
        return None, {}, [f"{source}: cannot be loaded ({reason[:500]})"]

    columns = {}
    for role, names in image_columns.items():
        names = [names] if isinstance(names, str) else list(names)
        if role == "image" and "__key__" in found:  # of tars
            names += tar_images(found)
        columns[role] = next((name for name in names if name in found), names[0])
    absent = [name for name in columns.values() if name not in found]
    wanted = [caption_column] if isinstance(caption_column, str) else list(caption_column or [])
    if wanted and not any(caption_root(name, found) in found for name in wanted):
        absent.append(caption_root(wanted[0], found))
    if absent:
        remedy = "see --image_column and --caption_column"
        if any("." in name for name in found):
            remedy += f"; {TAR_NAMES}"
        return None, {}, [f"{source}: no column {', '.join(absent)}; it has {', '.join(found)}: {remedy}"]

    features = dataset.features or {}
    others = [name for name, feature in features.items() if holds_images(feature) and name not in columns.values()]
    try:
        for column in [*columns.values(), *others]:
            encoded: Any = datasets.Image(decode=False)
            feature: Any = features.get(column)
            if isinstance(feature, datasets.List) and feature.feature in (datasets.Image(), datasets.Value("binary")):
                encoded = datasets.List(encoded)
            dataset = dataset.cast_column(column, encoded)
        if streaming:
            next(iter(dataset))  # it is cast when it is read
    except Exception as error:  # by pyarrow or datasets, by the kind of the column
        names = ", ".join(columns.values())
        return None, {}, [f"{source}: column {names} holds no images ({str(error)[:200]}): see --image_column"]
    return dataset, columns, []


def tar_images(columns: Sequence[str]) -> list[str]:
    """The columns of a dataset of tars that hold the image of a sample: jpg, JPG, png, or else the one x.jpg."""
    images = [name for name in columns if name.lower().rpartition(".")[2] in TAR_IMAGES]
    plain = [name for name in images if "." not in name]
    if plain or len(images) > 1:
        return plain
    return images


def holds_images(feature: Any) -> bool:
    """Whether a column of a dataset holds images, or lists of them."""
    return type(getattr(feature, "feature", feature)).__name__ == "Image"


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
    if example.caption is not None:
        example.source = "the dataset"
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
    caption_column: str | Sequence[str] | None = None,
    whole_rows: bool = False,
    **loading: Any,
) -> tuple[list[Example], list[str]]:
    """Examples of a dataset's train split, or its only one, in its order, and problems.

    path            hub id or folder of a dataset, of save_to_disk too; "parquet" or "webdataset" with `data_files`
    source          the flag and its value, as messages name the data; `name` (default: path) as examples do: NAME[row]
    image_columns   {"image": column, role: column, ...}; of several names for a role the first that there is. In tars
                    the image may also be in one of TAR_IMAGES, in any case
    caption_column  "a.b" is b within column a; of several, the first that says anything; without it there are no
                    captions
    whole_rows      all columns but images are read, and without `caption_column` the caption is in the first of
                    DATASET_CAPTIONS that has one (OminiControl)
    loading         config_name, data_files, cache_dir: as in `load_rows`
    """
    dataset, columns, problems = load_rows(
        path, source=source, image_columns=image_columns, caption_column=caption_column, **loading
    )
    if problems:
        return [], problems
    caption_columns = caption_names(caption_column, whole_rows)
    texts = [column for column in dataset.column_names if column not in columns.values()]
    if whole_rows:
        texts = [column for column in texts if not holds_images(dataset.features[column])]
    else:
        roots = [caption_root(column, dataset.column_names) for column in caption_columns]
        texts = [column for column in texts if column in roots]
    rows = dataset.select_columns(texts).to_list() if texts else [{}] * len(dataset)
    stamps = [""] * len(dataset)
    if columns:
        stamps_of_columns = [cell_stamps(dataset, column) for column in columns.values()]
        stamps = [" ".join(row) for row in zip(*stamps_of_columns, strict=True)]
    examples = []
    for i, row in enumerate(rows):
        readers = {role: functools.partial(read_cell, dataset, i, column) for role, column in columns.items()}
        examples.append(
            row_example(
                row,
                f"{name or path}[{i}]",
                readers=readers,
                image_columns=columns,
                caption_columns=caption_columns,
                stamp=stamps[i],
            )
        )
    return examples, [] if examples else [f"{source}: no images in it"]


def caption_root(caption_column: str, columns: Sequence[str]) -> str:
    """The column that holds a caption: "a" for "a.b", unless there is a column of that whole name."""
    return caption_column if caption_column in columns else caption_column.split(".")[0]


def caption_names(caption_column: str | Sequence[str] | None, whole_rows: bool) -> Sequence[str]:
    """The columns of a dataset that may hold a caption, see `read_dataset`."""
    if caption_column is None:
        return DATASET_CAPTIONS if whole_rows else ()
    return [caption_column] if isinstance(caption_column, str) else caption_column


def dataset_settings(
    args: Any, image_columns: Mapping[str, str | Sequence[str]], caption_column: str | Sequence[str] | None
) -> dict[str, Any]:
    """What `read_dataset` and `open_stream` read by --dataset_name or --data_files and the flags beside them."""
    if args.data_files:
        path = "parquet" if args.data_files[0].endswith(".parquet") else "webdataset"
        source = f"--data_files {args.data_files[0]}"
        if len(args.data_files) > 1:
            source += f" and {len(args.data_files) - 1} more"
    else:
        path = args.dataset_name
        source = f"--dataset_name {path}"
    return {
        "path": path,
        "source": source,
        "image_columns": image_columns,
        "caption_column": caption_column,
        "config_name": args.dataset_config_name,
        "data_files": args.data_files,
        "cache_dir": args.cache_dir,
    }


def check_dataset_flags(args: Any) -> list[str]:
    """Problems of --data_files and --streaming, and of what needs all samples before training."""
    problems = []
    if args.dataset_config_name and not args.dataset_name:
        problems.append(f"--dataset_config_name {args.dataset_config_name} needs --dataset_name")
    kinds = {file.endswith(".parquet") for file in args.data_files or []}
    if len(kinds) > 1:
        problems.append("--data_files: name either parquet files or tars")
    if not args.streaming:
        return problems
    if not (args.dataset_name or args.data_files):
        problems.append("--streaming needs --dataset_name or --data_files")
    if not args.max_train_steps:
        problems.append("--streaming needs --max_train_steps: the length of a stream is not known")
    if args.cache_latents:
        problems.append("--cache_latents needs all images before training: leave out --streaming")
    if args.cache_text_encoder_outputs_to_disk:
        problems.append(
            "--cache_text_encoder_outputs_to_disk keeps prompts that are embedded before training: leave out "
            "--streaming"
        )
    if args.precompute_only:
        problems.append("--precompute_only encodes all samples before training: leave out --streaming")
    if args.validation_split:
        problems.append("--validation_split needs all images before training: leave out --streaming")
    if (args.validation_prompt or args.validation_prompts) and not args.validation_steps:
        problems.append("--validation_prompt and --validation_prompts need --validation_steps with --streaming")
    return problems


@dataclass
class Stream:
    """A dataset that is read as it comes.

    rows             datasets' IterableDataset of one split, whose images are not decoded
    image_columns    {role: column}
    caption_columns  of these the first that says anything holds the caption
    files            the paths and addresses that it is read from
    """

    rows: Any
    image_columns: Mapping[str, str]
    caption_columns: Sequence[str]
    files: Sequence[str]

    def example(self, row: dict, name: str) -> Example:
        """The example of a row; `name` is what messages call one that is of no tar."""
        if "__key__" in row:
            name = f"{row['__key__']} of {row['__url__']}"
        readers = {role: functools.partial(read_encoded, row[column]) for role, column in self.image_columns.items()}
        return row_example(
            row, name, readers=readers, image_columns=self.image_columns, caption_columns=self.caption_columns
        )

    def examples(self, row: dict, name: str) -> list[Example]:
        """`example` in a list."""
        return [self.example(row, name)]

    @property
    def num_parts(self) -> int:
        """How many parts can each be read from its beginning: tars, parquet files; of folders of images one."""
        return self.rows.num_shards

    def part_name(self, number: int) -> str:
        """What messages call a part."""
        return self.files[number] if len(self.files) == self.num_parts else f"part {number} of the stream"

    def part(self, number: int, start: int) -> Iterator[tuple[int, Any]]:
        """(number, row) of the rows of a part from `start` on; what comes before is read, and not decoded.

        In the place of a row that cannot be read is the exception; if the next one cannot be read either, that of the
        last pair, whose number is None, is of all that follow.
        """
        rows = self.part_rows(number, start)
        row = start
        while True:
            try:
                content = next(rows, None)
            except Exception as error:  # tarfile's, pyarrow's, fsspec's, those of datasets' casts
                rows = self.part_rows(number, row + 1)
                try:
                    following = next(rows, None)
                except Exception:
                    yield row, EndOfPart(error)
                    return
                yield row, error
                row += 1
                content = following
            if content is None:
                return
            yield row, content
            row += 1

    def part_rows(self, number: int, start: int) -> Iterator[dict]:
        read_on_after_bad_cells()  # here, as a reader's process may begin with nothing but this object
        part = self.rows.shard(num_shards=self.num_parts, index=number)
        return iter(part.skip(start) if start else part)

    def record(self) -> list[list[str]]:
        """[name, stamp] of each file, in their order: what is compared when a run is resumed.

        Of files on other machines the names are compared alone.
        """
        with ThreadPoolExecutor(16) as threads:  # each waits for its disk
            stamps = list(threads.map(lambda file: file_stamp(Path(file)), self.files))
        return [[Path(file).name, stamp] for file, stamp in zip(self.files, stamps, strict=True)]


class EndOfPart(Exception):
    """Nothing can be read behind this place in a part of a stream."""


def open_stream(
    path: str,
    *,
    source: str,
    image_columns: Mapping[str, str | Sequence[str]],
    caption_column: str | Sequence[str] | None = None,
    whole_rows: bool = True,
    **loading: Any,
) -> tuple[Stream | None, list[str]]:
    """(stream of a dataset that is read as it comes, problems); None if there are any.

    Arguments as those of `read_dataset`; rows are read whole in any case.
    """
    read_on_after_bad_cells()
    rows, columns, problems = load_rows(
        path, source=source, image_columns=image_columns, caption_column=caption_column, streaming=True, **loading
    )
    if problems:
        return None, problems
    return Stream(rows, columns, caption_names(caption_column, whole_rows), dataset_files(path, **loading)), []


def read_on_after_bad_cells() -> None:
    """Makes a cell of a tar that cannot be decoded an empty one, or text that `check_captions` refuses.

    `datasets` would end the tar there, with all samples behind it.
    """
    from datasets.packaged_modules.webdataset import webdataset

    def read_text_cell(data: bytes) -> str:
        try:
            return data.decode("utf-8")
        except ValueError:
            return "\0" + data.decode("utf-8", errors="replace")

    def read_cell_with(decode: Callable[[bytes], Any], data: bytes) -> Any:
        try:
            return decode(data)
        except Exception:  # each format's own exceptions
            return None

    decoders = {ending: functools.partial(read_cell_with, decode) for ending, decode in webdataset.DECODERS.items()}
    webdataset.WebDataset.DECODERS = decoders | dict.fromkeys(("txt", "text", "transcript"), read_text_cell)


def dataset_files(
    path: str,
    *,
    config_name: str | None = None,
    data_files: Sequence[str] | None = None,
    cache_dir: str | Path | None = None,
) -> list[str]:
    """The paths or addresses of the files that `load_rows` reads, in its order."""
    import datasets

    if any((Path(path) / name).is_file() for name in SAVED_DATASETS):
        return [str(file) for file in sorted(Path(path).rglob("*.arrow"))]
    if data_files:
        data_files = [literal_pattern(file) for file in data_files]
    cache = None if cache_dir is None else str(cache_dir)
    builder = datasets.load_dataset_builder(path, config_name, data_files=data_files, cache_dir=cache)
    splits: Any = builder.config.data_files or {}
    return [str(file) for file in splits.get("train") or next(iter(splits.values()), [])]


def read_stream_start(
    settings: Mapping[str, Any],
    check: Callable[[Example], str | None],
    examples_of: Callable[[Stream, dict, str], list[Example]] = Stream.examples,
) -> tuple[list[Example], list[str]]:
    """(examples of a row, problems) of what `open_stream` opens by `settings`: what flags and columns are checked by
    before training. For `check` and `examples_of` see `first_of_stream`."""
    stream, problems = open_stream(**settings)
    if stream is None:
        return [], problems
    examples = first_of_stream(stream, functools.partial(examples_of, stream), check)
    return examples, [] if examples else [f"{settings['source']}: no samples in it"]


def first_of_stream(
    stream: Stream, examples_of: Callable[[dict, str], list[Example]], check: Callable[[Example], str | None]
) -> list[Example]:
    """The examples of a row; [] of an empty stream.

    It is the first row with examples, or if check(example) says what is wrong with one, the first of the next few
    where it says nothing.
    """
    tried = []
    for part in range(stream.num_parts):
        for number, row in stream.part(part, 0):
            if isinstance(row, Exception):
                continue
            examples = examples_of(row, f"row {number} of {stream.part_name(part)}")
            if examples and not any(attempt(check, example) for example in examples):
                return examples
            if examples:
                tried.append(examples)
            if len(tried) == MAX_TRIED:
                return tried[0]
    return tried[0] if tried else []


def attempt(check: Callable[[Example], str | None], example: Example) -> str | None:
    """What check(example) returns, or what it raises, as text."""
    try:
        return check(example)
    except Exception as error:  # PIL's decoders raise many exception types
        return str(error).strip() or repr(error)


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


def choose_num_workers(requested: int | None, *, has_gpu: bool, num_cores: int, num_processes: int) -> int:
    """--dataloader_num_workers of a run: as requested, else 4 for a GPU that would wait for images, or fewer where the
    `num_processes` of this machine have fewer cores each. 0, the process that trains, on a CPU."""
    if requested is not None:
        return requested
    return max(1, min(4, num_cores // num_processes)) if has_gpu else 0


def resolve_num_workers(requested: int | None) -> int:
    """`choose_num_workers` for this machine."""
    return choose_num_workers(
        requested,
        has_gpu=torch.accelerator.is_available(),
        num_cores=os.cpu_count() or 1,
        num_processes=int(os.environ.get("LOCAL_WORLD_SIZE", 1)),
    )


def read_batches(dataloader: Iterable, accelerator: Accelerator, save: Callable[[], Any]) -> Iterator:
    """What a DataLoader yields; a file that can no longer be read ends the run with one message, after save().

    Not where other processes would have to take part, and not while gradients are accumulated, which are not saved.
    """
    started = False
    try:
        for batch in dataloader:
            yield batch
            started = True
    except (OSError, ValueError, SyntaxError, SafetensorError, Image.DecompressionBombError) as error:
        reason = (str(error).strip() or repr(error)).splitlines()[-1][:300]  # after a worker's traceback
        if started and accelerator.num_processes == 1 and accelerator.sync_gradients:
            save()
        raise SystemExit(
            f"\n{Path(sys.argv[0]).name}: error: the data can no longer be read: {reason}{remedy()}"
        ) from None


def place_in_run(micro_step: int, process_index: int, num_processes: int, begun_with: int) -> tuple[int, int]:
    """(micro-step, process) of a run on `begun_with` processes that trains on what this process does at `micro_step`.

    Batches go round the processes, so another number of them takes the same batches in other micro-steps.
    """
    return divmod(micro_step * num_processes + process_index, begun_with)


class StepSampler(Sampler):
    """Batches of (epoch, index) for the micro-steps `start` to `stop` of one process.

    Every epoch is a new random order of all samples, from (seed, epoch), cut into batches, each of one of the
    `groups` (the bucket of each sample), that go round the processes; what a micro-step trains on is the same however
    often training was interrupted before it. `batch_size` is a number, or {group: number}. A run that began with
    another number of processes, `begun_with`, keeps their order, see `place_in_run`.
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
        self.begun_with = num_processes
        self.num_batches = len(self.batches(0))  # of every epoch
        self.steps_per_epoch = math.ceil(self.num_batches / num_processes)

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
        last_epoch = None
        steps_per_epoch = math.ceil(self.num_batches / self.begun_with)
        for micro_step in range(self.start, self.stop):
            step, process = place_in_run(micro_step, self.process_index, self.num_processes, self.begun_with)
            epoch, step_of_epoch = divmod(step, steps_per_epoch)
            if epoch != last_epoch:
                batches = self.batches(epoch)
                last_epoch = epoch
            batch = step_of_epoch * self.begun_with + process
            yield [(epoch, index) for index in batches[batch % len(batches)]]

    def __len__(self) -> int:
        return self.stop - self.start


UNUSABLE = object()  # in the place of a group


class StreamedBatches(IterableDataset):
    """Batches of a stream for the micro-steps `start` to `stop` of one process.

    Every epoch is the stream in a new order, by (seed, epoch) alone: its parts (tars, parquet files) are dealt to as
    many lanes as the run began with processes, a lane shuffles its rows in blocks of `shuffle_buffer`, and cuts each
    block into batches. So a process reads parts of its own, once per epoch, and a lane that is through with them
    begins its next epoch. Of parts that do not go round, several lanes read one and take turns at its rows.

    A batch has, beside its samples, "stream": {lane: its place after this batch}, as few numbers. With these of all
    processes as `places`, see `gather_places`, reading goes on there with the same samples in the same order: the part
    is read from its beginning and the rows before the block are passed over, undecoded. (datasets' own shuffling keeps
    rows in a buffer that its state does not hold: after load_state_dict they are never seen.) On another number of
    processes the lanes stay, see `place_in_run`.

    A sample that cannot be read or used is left out, and its batch smaller; "left_out" of the batch says which and
    why. ValueError is raised where nothing can be used at all.

    Args:
        sample: sample(example, epoch, index) is what `collate_fn` gets a list of; it raises an exception for an
            example that cannot be used. What is random in it depends on (seed, epoch, index).
        examples_of: examples_of(row, name) are the examples of a row, one unless it says otherwise.
        group_of: group_of(example, epoch, index) is what the samples of a batch have in common, by the headers of
            image files alone.
        fills_batches: a batch with too few samples has its first ones again.
        num_threads: that read and decode ahead; 0: a sample is made when it is asked for.
    """

    def __init__(
        self,
        stream: Stream,
        sample: Callable[[Example, int, int], Any],
        *,
        batch_size: int,
        shuffle_buffer: int,
        seed: int,
        process_index: int,
        num_processes: int,
        num_threads: int = 0,
        examples_of: Callable[[dict, str], list[Example]] | None = None,
        group_of: Callable[[Example, int, int], Hashable] | None = None,
        collate_fn: Callable[[list], dict[str, Any]] = default_collate,
        fills_batches: bool = False,
    ):
        self.stream = stream
        self.sample = sample
        self.batch_size = batch_size
        self.shuffle_buffer = shuffle_buffer
        self.seed = seed
        self.process_index = process_index
        self.num_processes = num_processes
        self.begun_with = num_processes
        self.num_threads = num_threads
        # no lambdas: where the operating system does not fork, this object is pickled for the process that reads
        self.examples_of = examples_of or stream.examples
        self.group_of = group_of
        self.collate_fn = collate_fn
        self.fills_batches = fills_batches
        self.start = 0
        self.stop = 0
        self.places: dict[str, dict[str, int]] = {}

    def share(self, epoch: int, lane: int) -> list[tuple[int, int, int]]:
        """[(part, n, i)] that a lane reads in an epoch: of each n rows of the part the i-th."""
        rng = np.random.default_rng((self.seed, epoch))
        parts = rng.permutation(self.stream.num_parts).tolist()
        lane = int(rng.permutation(self.begun_with)[lane])
        num_dealt = len(parts) - len(parts) % self.begun_with
        share = [(part, 1, 0) for part in parts[lane : num_dealt : self.begun_with]]
        rest = parts[num_dealt:]
        if rest:
            turn, number = divmod(lane, len(rest))
            share.append((rest[number], len(range(number, self.begun_with, len(rest))), turn))
        return share

    def rows(self, lane: int, epoch: int, part: int, row: int) -> Iterator[tuple[int, int, str, Any]]:
        """(part, row) to go on with, name and content of each row of a lane in an epoch, from a row of a part on.

        Parts are counted in the lane's share. In the place of a row that cannot be read is what was raised.
        """
        share = self.share(epoch, lane)
        for place in range(part, len(share)):
            number, num_turns, turn = share[place]
            for own, content in self.stream.part(number, row if place == part else 0):
                name = f"row {own} of {self.stream.part_name(number)}"
                if isinstance(content, EndOfPart):
                    yield place + 1, 0, f"{name} and all that follow", content
                elif own % num_turns == turn:
                    yield place, own + 1, name, content

    def blocks(self, lane: int) -> Iterator[tuple[dict[str, int], list[list[tuple]], list[str]]]:
        """(place of the block, its batches of (example, epoch, index), what was left out) of a lane, without end.

        An epoch ends with a block of nothing.
        """
        place = self.places.get(str(lane)) or {
            "epoch": 0,
            "part": 0,  # of the lane's share
            "row": 0,  # of the part
            "block": 0,  # of the epoch
            "index": 0,  # of its first example in the lane's epoch
            "batch": 0,  # of the block, the first that is still to come
            "number": 0,  # of the lane's batches before it
        }
        while True:
            rows = self.rows(lane, place["epoch"], place["part"], place["row"])
            while block := list(itertools.islice(rows, self.shuffle_buffer)):
                examples, left_out = self.read_block(block, lane, place)
                yield place, self.cut(examples, lane, place), left_out
                part, row, *_ = block[-1]
                place = place | {
                    "part": part,
                    "row": row,
                    "block": place["block"] + 1,
                    "index": place["index"] + len(examples),
                    "batch": 0,
                }
            place = dict.fromkeys(place, 0) | {"epoch": place["epoch"] + 1}
            yield place, [], []

    def read_block(self, block: list[tuple], lane: int, place: dict[str, int]) -> tuple[list[tuple], list[str]]:
        """([(example, epoch, index, group)], what was left out) of the rows of a block."""
        examples = []
        left_out = []
        for _, _, name, row in block:
            try:
                if isinstance(row, Exception):
                    raise row
                found = self.examples_of(row, name)
            except Exception as error:
                left_out.append(why_left_out(name, error))
                continue
            for example in found:
                index = (place["index"] + len(examples)) * self.begun_with + lane  # lanes share no index
                try:
                    group = self.group_of(example, place["epoch"], index) if self.group_of else None
                except Exception as error:  # PIL's decoders raise many exception types
                    left_out.append(why_left_out(example.name, error))
                    group = UNUSABLE
                examples.append((example, place["epoch"], index, group))
        return examples, left_out

    def cut(self, examples: list[tuple], lane: int, place: dict[str, int]) -> list[list[tuple]]:
        """The batches of a block, each of one group, in a random order of the examples and of the batches."""
        rng = np.random.default_rng((self.seed, place["epoch"], lane, place["block"]))
        members: dict[Hashable, list] = {}
        for i in rng.permutation(len(examples)):
            *example, group = examples[i]
            if group is not UNUSABLE:
                members.setdefault(group, []).append(tuple(example))
        batches = []
        for group in members.values():
            batches += [group[i : i + self.batch_size] for i in range(0, len(group), self.batch_size)]
        if len(members) < 2:
            return batches
        return [batches[i] for i in rng.permutation(len(batches))]

    def planned(self, lane: int) -> Iterator[tuple[dict[str, int], list[tuple], list[str]]]:
        """(place after it, its examples, what was left out before it) of each batch of a lane, without end.

        There is one without examples at the end of an epoch and for a block that has none.
        """
        blocks = self.blocks(lane)
        for place, batches, left_out in read_ahead(blocks) if self.num_threads else blocks:
            if place["batch"]:
                left_out = []  # which a batch before the place has told
            if not batches:
                yield place, [], left_out
            for number in range(place["batch"], len(batches)):
                yield place | {"batch": number + 1}, batches[number], left_out
                left_out = []

    def read_batch(
        self, planned: tuple[dict[str, int], list[tuple], list[str]]
    ) -> tuple[dict, dict | None, list[str]]:
        """(place, batch, what was left out) of what `planned` names; None where there is nothing to train on."""
        place, examples, left_out = planned
        left_out = list(left_out)
        samples = []
        for example, epoch, index in examples:
            try:
                samples.append(self.sample(example, epoch, index))
            except Exception as error:  # PIL's decoders raise many exception types
                left_out.append(why_left_out(example.name, error))
        if not samples:
            return place, None, left_out
        while self.fills_batches and len(samples) < self.batch_size:
            samples += samples[: self.batch_size - len(samples)]
        return place, self.collate_fn(samples), left_out

    def lane_batches(self, lane: int) -> Iterator[dict[str, Any]]:
        """The batches of a lane, with the lane's place after each, without end."""
        number = self.places.get(str(lane), {}).get("number", 0)
        planned = self.planned(lane)
        read: Iterator = map(self.read_batch, planned)
        if self.num_threads:
            read = map_ahead(self.read_batch, planned, self.num_threads)
        left_out: list[str] = []
        has_batch = number > 0
        usable_epoch = None  # the last one that had a batch
        for place, batch, unusable in read:
            left_out += unusable
            usable_epoch = place["epoch"] if usable_epoch is None else usable_epoch
            if batch is None:
                self.check_usable(left_out, has_batch, place["epoch"] - usable_epoch)
                continue
            has_batch = True
            usable_epoch = place["epoch"]
            number += 1
            yield {**batch, "stream": {str(lane): place | {"number": number}}, "left_out": left_out}
            left_out = []

    def check_usable(self, left_out: Sequence[str], has_batch: bool, num_epochs: int) -> None:
        """Raises ValueError if too much was left out since the last batch, `num_epochs` ago, or since the start."""
        if num_epochs < MAX_EMPTY_EPOCHS and (has_batch or len(left_out) < MAX_UNUSABLE):
            return
        if not left_out:
            raise ValueError("the stream has no samples for this process: use fewer processes")
        raise ValueError(f"none of {len(left_out)} samples of the stream can be used, the last one: {left_out[-1]}")

    def __iter__(self) -> Iterator[dict[str, Any]]:
        lanes: dict[int, Iterator[dict]] = {}
        places = dict(self.places)
        for micro_step in range(self.start, self.stop):
            number, lane = place_in_run(micro_step, self.process_index, self.num_processes, self.begun_with)
            if lane not in lanes:
                lanes[lane] = self.lane_batches(lane)
            batch = next(batch for batch in lanes[lane] if batch["stream"][str(lane)]["number"] > number)
            places |= batch["stream"]
            yield {**batch, "stream": dict(places)}


class SkippedSamples:
    """What was left out of a stream: in skipped_samples.jsonl of the run's folder, and with a count.

    A line is of one sample, with the step that it was left out of; those behind `last_step` are dropped, as a resumed
    run takes these steps again. All processes write to the file; `is_first`: of those that see this folder.
    """

    def __init__(self, folder: Path, last_step: int, *, is_first: bool):
        self.path = folder / "skipped_samples.jsonl"
        self.count = 0
        if not is_first or not self.path.is_file():
            return
        lines = []
        for line in self.path.read_text("utf-8", errors="replace").split("\n"):
            with suppress(ValueError, KeyError, TypeError):  # of lines that a crash of the machine left torn
                if json.loads(line)["step"] <= last_step:
                    lines.append(f"{line}\n")
        with atomic_write(self.path) as partial:
            partial.write_text("".join(lines), "utf-8")

    def add(self, step: int, left_out: Sequence[str]) -> Sequence[str]:
        """Writes the "left_out" of a batch; returns those to be said now, the first ten of a process."""
        if not left_out:
            return []
        lines = [json.dumps({"step": step, "skipped": text}, ensure_ascii=False) + "\n" for text in left_out]
        with writing(self.path):
            self.path.parent.mkdir(parents=True, exist_ok=True)  # it may have been deleted during the run
            with self.path.open("a", encoding="utf-8") as file:
                file.write("".join(lines))
        told = left_out[: max(0, 10 - self.count)]
        self.count += len(left_out)
        return told

    def summary(self) -> str:
        """How many all processes have left out since they started; "" for none. To be called by all of them."""
        count = sum(gather_objects([self.count]))
        return f"{count:,} samples of the stream could not be used: they are in {self.path}" if count else ""


def why_left_out(name: str, error: Exception) -> str:
    """What cannot be used, and why, in one line."""
    reason = (str(error).strip() or repr(error)).replace("\n", " ")[:300]
    reason = re.sub(r" <_io\.BytesIO object at \w+>", "", reason)  # PIL's name of the file, another in each run
    return reason if name in reason else f"{name}: {reason}"


def gather_places(places: Mapping[str, dict[str, int]]) -> dict[str, dict[str, int]]:
    """The places of all lanes of a stream, those that lie behind the last micro-step of all processes.

    `places` is "stream" of the process' last batch. To be called by all processes.
    """
    latest: dict[str, dict[str, int]] = {}
    for own in gather_objects([dict(places)]):
        for lane, place in own.items():
            if lane not in latest or place["number"] > latest[lane]["number"]:
                latest[lane] = place
    return latest
