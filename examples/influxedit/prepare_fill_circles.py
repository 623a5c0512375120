"""Sorts fill50k, ControlNet's 50,000 circles, into training folders: outlines, filled circles and prompts.

    python examples/influxedit/prepare_fill_circles.py                                  # downloads the archive
    python examples/influxedit/prepare_fill_circles.py --zip fill50k.zip --count 2000   # takes a file, part of it

    data/my_fill50k/train_A/0.png             outline                                  edit mode: --instance_data_dir
    data/my_fill50k/train_B/0.png             filled                                   edit mode: --target_data_dir
    data/my_fill50k/train_combined/0.png      outline left, filled right                mask mode: --instance_data_dir
    data/my_fill50k/prompts/0.txt             "pale golden rod circle with old lace background"
    data/my_fill50k/prompts_combined/0.txt    the same after --prefix

Running the command again continues an interrupted download or preparation.
"""

import argparse
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


URL = "https://huggingface.co/lllyasviel/ControlNet/resolve/main/training/fill50k.zip"
PREFIX = "Two pictures side by side, the outline of a circle on the left and on the right a "


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
    """The rows {"source", "target", "prompt"} of the archive's prompt.json; the paths are names of members."""
    names = set(archive.namelist())
    lists = [name for name in names if PurePosixPath(name).name == "prompt.json"]
    if len(lists) != 1:
        raise BadArchive(f"holds {len(lists)} files prompt.json, not one")
    try:
        lines = archive.read(lists[0]).decode().splitlines()
    except (UnicodeDecodeError, RuntimeError, zlib.error, zipfile.BadZipFile) as error:  # RuntimeError: encrypted
        raise BadArchive(f"{lists[0]}: not readable ({error})") from error
    folder = PurePosixPath(lists[0]).parent
    rows = []
    for number, line in enumerate(lines, start=1):
        try:
            row = json.loads(line)
            paths = {key: str(folder / row[key]) for key in ("source", "target")}
            rows.append({**paths, "prompt": str(row["prompt"])})
        except (ValueError, KeyError, TypeError) as error:
            raise BadArchive(f"{lists[0]}, line {number}: not JSON with source, target and prompt") from error
        absent = [path for path in paths.values() if path not in names]
        if absent:
            raise BadArchive(f"{lists[0]}, line {number}: the archive has no {absent[0]}")
    return rows


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


def prepare(zip_path, output, *, count=None, prefix=PREFIX, max_bytes=10 * 2**30):
    """Writes the folders and returns the number of samples; finished samples of an earlier run are kept."""
    try:
        archive = zipfile.ZipFile(zip_path)
    except zipfile.BadZipFile as error:
        raise BadArchive("is damaged, or no zip file") from error
    with archive:
        check_members(archive, max_bytes)
        rows = rows_of(archive)[:count]
        names = ("train_A", "train_B", "train_combined", "prompts", "prompts_combined")
        folders = {name: output / name for name in names}
        for folder in folders.values():
            folder.mkdir(parents=True, exist_ok=True)
        for row in tqdm(rows, desc="Preparing", unit="sample"):
            stem = PurePosixPath(row["source"]).stem
            last = folders["prompts_combined"] / f"{stem}.txt"
            if last.exists() and last.read_text() == prefix + row["prompt"]:
                continue
            try:
                outline = Image.open(archive.open(row["source"])).convert("RGB")
                filled = Image.open(archive.open(row["target"])).convert("RGB")
            except (OSError, SyntaxError, zlib.error, zipfile.BadZipFile, Image.DecompressionBombError) as error:
                raise BadArchive(f"{row['source']} or {row['target']}: not a readable image ({error})") from error
            images = {"train_A": outline, "train_B": filled, "train_combined": combine(outline, filled)}
            for name, image in images.items():
                write(folders[name] / f"{stem}.png", lambda path, image=image: image.save(path, "PNG"))
            write(folders["prompts"] / f"{stem}.txt", lambda path, row=row: path.write_text(row["prompt"]))
            write(last, lambda path, row=row: path.write_text(prefix + row["prompt"]))
    return len(rows)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.register("type", Path, lambda text: Path(text).expanduser())
    parser.add_argument("--zip", type=Path, help="archive to use; without it, --url is downloaded into --output")
    parser.add_argument("--url", default=URL)
    parser.add_argument("--output", type=Path, default=Path("data/my_fill50k"))
    parser.add_argument("--count", type=int, help="take only the first samples")
    parser.add_argument("--prefix", default=PREFIX, help="text before the prompts of side-by-side images")
    parser.add_argument("--max_gigabytes", type=float, default=10.0, help="refuse archives that unpack to more")
    args = parser.parse_args()
    path = args.zip or args.output / "fill50k.zip"
    try:
        if not args.zip and not path.exists():
            args.output.mkdir(parents=True, exist_ok=True)
            download(args.url, path)
        done = prepare(
            path, args.output, count=args.count, prefix=args.prefix, max_bytes=int(args.max_gigabytes * 2**30)
        )
    except (OSError, BadArchive) as error:  # URLError is an OSError
        print(f"{Path(sys.argv[0]).name}: error: {path}: {error}", file=sys.stderr)
        return 2
    print(f"{done} samples in {args.output}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
