"""Sorts fill50k, ControlNet's 50,000 circles, into training folders: outlines, filled circles and prompts.

    python examples/influxedit/prepare_fill_circles.py                                  # downloads the archive
    python examples/influxedit/prepare_fill_circles.py --zip fill50k.zip --count 2000   # takes a file, part of it

    data/my_fill50k/train_A/0.png             outline                                  edit mode: --instance_data_dir
    data/my_fill50k/train_B/0.png             filled                                   edit mode: --target_data_dir
    data/my_fill50k/train_combined/0.png      outline left, filled right                mask mode: --instance_data_dir
    data/my_fill50k/prompts/0.txt             "pale golden rod circle with old lace background"
    data/my_fill50k/prompts_combined/0.txt    the same after --prefix
    data/my_fill50k/test_A, test_B, ...       the same of images that are held out: test_A, test_B, test_combined,
                                              test_prompts, test_prompts_combined

Two layouts of archives are read: ControlNet's (source/, target/ and prompt.json, lines of source, target and prompt;
--test_count holds some out), and that of my_fill50k.zip, which InFluxEdit's commands take: train_A/, train_B/ and
train_prompts.json, {file name: prompt}, and the same with test.

Running the command again continues an interrupted download or preparation.
"""

import json
import stat
import sys
import urllib.error
import urllib.request
import zipfile
import zlib
from pathlib import Path, PurePosixPath

from PIL import Image
from tqdm.auto import tqdm


sys.path.insert(0, str(Path(__file__).parents[2]))

from common.arguments import Parser, check_folder, in_range, positive_float, positive_int


URL = "https://huggingface.co/lllyasviel/ControlNet/resolve/main/training/fill50k.zip"
PREFIX = "Two pictures side by side, the outline of a circle on the left and on the right a "


SPLIT_LISTS = {"train_prompts.json": "train", "test_prompts.json": "test"}

# Where the images and prompts of each split go.
FOLDERS = {
    "train": ("train_A", "train_B", "train_combined", "prompts", "prompts_combined"),
    "test": ("test_A", "test_B", "test_combined", "test_prompts", "test_prompts_combined"),
}


class BadArchive(ValueError):
    """An archive that is damaged, not fill50k's, or not safe to read."""


def download(url, path):
    """Downloads to `path`; an interrupted download leaves `path`.partial, which the next one continues."""
    partial = path.with_name(f"{path.name}.partial")
    done = partial.stat().st_size if partial.exists() else 0
    request = urllib.request.Request(url, headers={"Range": f"bytes={done}-"} if done else {})
    try:
        response = urllib.request.urlopen(request, timeout=60)
    except urllib.error.HTTPError as error:
        if error.code != 416:  # nothing after what is there
            raise
        partial.replace(path)
        return
    with response:
        resumed = response.status == 206
        done = done if resumed else 0  # a server without ranges starts again
        if "Content-Length" not in response.headers:
            raise ConnectionError(f"{url}: the server does not say how long the file is")
        total = done + int(response.headers["Content-Length"])
        with (
            partial.open("ab" if resumed else "wb") as file,
            tqdm(total=total, initial=done, desc=path.name, unit="B", unit_scale=True) as bar,
        ):
            while block := response.read(2**20):
                file.write(block)
                bar.update(len(block))
    if partial.stat().st_size != total:
        raise ConnectionError(f"{url}: the connection ended after {partial.stat().st_size} of {total} bytes")
    partial.replace(path)


def check_members(archive, max_bytes):
    """Raises BadArchive for members that are not safe to unpack, before anything is written."""
    total = sum(member.file_size for member in archive.infolist())
    if total > max_bytes:
        raise BadArchive(f"unpacks to {total:,} bytes, more than the {max_bytes:,} of --max_gigabytes")
    for member in archive.infolist():
        name = PurePosixPath(member.filename.replace("\\", "/"))
        if name.is_absolute() or ".." in name.parts or ":" in member.filename:
            raise BadArchive(f"holds {member.filename!r}, a path outside of the archive")
        kind = stat.S_IFMT(member.external_attr >> 16)
        if kind not in (0, stat.S_IFREG, stat.S_IFDIR):
            raise BadArchive(f"holds {member.filename!r}, which is neither a file nor a folder")


def rows_of(archive):
    """The rows {"split": train or test, "source", "target", "prompt"} of an archive; paths are names of members."""
    names = set(archive.namelist())
    lists = [name for name in names if PurePosixPath(name).name in ("prompt.json", *SPLIT_LISTS)]
    rows = []
    for name in sorted(lists):
        split = SPLIT_LISTS.get(PurePosixPath(name).name)
        rows += pair_rows(archive, name, split) if split else controlnet_rows(archive, name)
    if not any(row["split"] == "train" for row in rows):
        raise BadArchive(f"holds {len(lists)} files prompt.json or train_prompts.json with prompts, not one")
    if len({(row["split"], PurePosixPath(row["source"]).stem) for row in rows}) < len(rows):
        raise BadArchive(f"two images of {' and '.join(sorted(lists))} have the same name")
    for row in rows:
        absent = [row[key] for key in ("source", "target") if row[key] not in names]
        if absent:
            raise BadArchive(f"the archive has no {absent[0]}, which its list of prompts names")
    return rows


def controlnet_rows(archive, name):
    """The rows of ControlNet's prompt.json: each line is JSON with source, target and prompt."""
    folder = PurePosixPath(name).parent
    rows = []
    for number, line in enumerate(read_member(archive, name).splitlines(), start=1):
        try:
            row = json.loads(line)
            paths = {key: str(folder / row[key]) for key in ("source", "target")}
            rows.append({"split": "train", **paths, "prompt": str(row["prompt"])})
        except (ValueError, KeyError, TypeError) as error:
            raise BadArchive(f"{name}, line {number}: not JSON with source, target and prompt") from error
    return rows


def pair_rows(archive, name, split):
    """The rows of train_prompts.json, {file name: prompt}, beside the folders train_A and train_B; or of test."""
    folder = PurePosixPath(name).parent
    try:
        prompts = json.loads(read_member(archive, name)).items()
    except (ValueError, AttributeError, RecursionError) as error:
        raise BadArchive(f"{name}: not JSON, {{file name: prompt}}") from error
    rows = []
    for file, prompt in prompts:
        paths = {"source": str(folder / f"{split}_A" / file), "target": str(folder / f"{split}_B" / file)}
        rows.append({"split": split, **paths, "prompt": str(prompt)})
    return rows


def read_member(archive, name):
    """The text of a member."""
    try:
        return archive.read(name).decode()
    except (UnicodeDecodeError, RuntimeError, zlib.error, zipfile.BadZipFile) as error:  # RuntimeError: encrypted
        raise BadArchive(f"{name}: not readable ({error})") from error


def combine(left, right):
    """Two images side by side, the right one resized to the size of the left one."""
    combined = Image.new("RGB", (2 * left.width, left.height))
    combined.paste(left, (0, 0))
    combined.paste(right.resize(left.size), (left.width, 0))
    return combined


def write(path, save):
    """Calls `save` with a path beside `path`, then renames: the file is whole or absent."""
    partial = path.with_name(f"{path.name}.partial")
    save(partial)
    partial.replace(path)


def prepare(zip_path, output, *, count=None, test_count=0, prefix=PREFIX, max_bytes=10 * 2**30):
    """Writes the folders and returns the number of samples; finished samples of an earlier run are kept.

    `count` limits the samples of each split; the last `test_count` of the training's become test samples.
    """
    try:
        archive = zipfile.ZipFile(zip_path)
    except zipfile.BadZipFile as error:
        raise BadArchive("is damaged, or no zip file") from error
    with archive:
        check_members(archive, max_bytes)
        rows = rows_of(archive)
        train = [row for row in rows if row["split"] == "train"][:count]
        test = [row for row in rows if row["split"] == "test"][:count]
        if test_count >= len(train):
            raise BadArchive(f"--test_count {test_count} leaves nothing of {len(train)} samples to train on")
        first_held_out = len(train) - test_count
        test = [{**row, "split": "test"} for row in train[first_held_out:]] + test
        rows = train[:first_held_out] + test
        for row in tqdm(rows, desc="Preparing", unit="sample"):
            write_sample(archive, row, [output / name for name in FOLDERS[row["split"]]], prefix)
    return len(rows)


def write_sample(archive, row, folders, prefix):
    """Writes the images and the prompts of a row into `folders`, see FOLDERS."""
    for folder in folders:
        folder.mkdir(parents=True, exist_ok=True)
    stem = PurePosixPath(row["source"]).stem
    outlines, filled_circles, combined, prompts, prompts_combined = folders
    last = prompts_combined / f"{stem}.txt"
    if last.exists() and last.read_text() == prefix + row["prompt"]:
        return
    try:
        outline = Image.open(archive.open(row["source"])).convert("RGB")
        filled = Image.open(archive.open(row["target"])).convert("RGB")
    except Exception as error:  # RuntimeError: encrypted; NotImplementedError: packed in an unknown way; PIL's many
        raise BadArchive(f"{row['source']} or {row['target']}: not a readable image ({error})") from error
    images = {outlines: outline, filled_circles: filled, combined: combine(outline, filled)}
    for folder, image in images.items():
        check_same(folder / f"{stem}.png", image)
    for folder, image in images.items():
        write(folder / f"{stem}.png", lambda path, image=image: image.save(path, "PNG"))
    write(prompts / f"{stem}.txt", lambda path: path.write_text(row["prompt"]))
    write(last, lambda path: path.write_text(prefix + row["prompt"]))


def check_same(path, image):
    """Raises BadArchive if there is a file of this name that holds another image: it is not of an earlier run."""
    if not path.exists():
        return
    with Image.open(path) as found:
        if found.size == image.size and found.convert("RGB").tobytes() == image.tobytes():
            return
    raise BadArchive(f"{path} exists and is another image than that of the archive: name another folder, --output")


def main(argv=None):
    parser = Parser(description=__doc__.split("\n")[0])
    parser.add_argument("--zip", type=Path, help="archive to use; without it, --url is downloaded into --output")
    parser.add_argument("--url", default=URL)
    parser.add_argument("--output", type=Path, default=Path("data/my_fill50k"))
    parser.add_argument("--count", type=positive_int, help="take only the first samples, of train and of test")
    parser.add_argument(
        "--test_count", type=in_range(int, 0), default=0, help="hold the last samples out, as test_A, test_B, ..."
    )
    parser.add_argument("--prefix", default=PREFIX, help="text before the prompts of side-by-side images")
    parser.add_argument(
        "--max_gigabytes", type=positive_float, default=10.0, help="refuse archives that unpack to more"
    )
    args = parser.parse_args(argv)
    path = args.zip or args.output / "fill50k.zip"
    problems = check_folder("--output", args.output)
    if args.zip and not args.zip.is_file():
        problems.append(f"--zip {args.zip}: no such file")
    parser.refuse(problems)
    try:
        if not args.zip and not path.exists():
            args.output.mkdir(parents=True, exist_ok=True)
            download(args.url, path)
        done = prepare(
            path,
            args.output,
            count=args.count,
            test_count=args.test_count,
            prefix=args.prefix,
            max_bytes=int(args.max_gigabytes * 2**30),
        )
    except (OSError, ValueError) as error:  # URLError is an OSError, BadArchive a ValueError
        print(f"{Path(sys.argv[0]).name}: error: {path}: {error}", file=sys.stderr)
        return 2
    print(f"{done} samples in {args.output}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
