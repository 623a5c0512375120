"""common/data.py: what its readers find in folders, metadata.jsonl, datasets, parquet files and tars."""

import base64
import functools
import io
import json
import multiprocessing
import os
import shutil
import struct
import tarfile
import time
import zlib
from types import SimpleNamespace

from common.checkpoints import data_changes
from common.data import (
    DATASET_CAPTIONS,
    Example,
    Size,
    all_images,
    check_captions,
    check_class_images,
    check_images,
    check_roles,
    check_shape,
    choose_num_workers,
    collate,
    count_sizes,
    describe_class_images,
    describe_data,
    describe_small_groups,
    file_example,
    file_stamp,
    first_ten,
    fit,
    fit_mask,
    header_size,
    image_files,
    left_out,
    map_ahead,
    open_image,
    open_stream,
    read_class_images,
    read_dataset,
    read_folder,
    read_metadata,
    read_sizes,
    read_text,
    upright,
)
from common.models import content_hash, model_identity

import datasets
import numpy as np
import pytest
import torch
import torch.distributed as dist
from PIL import Image, ImageOps, UnidentifiedImageError
from PIL.PngImagePlugin import PngInfo
from safetensors.torch import load_file, save_file


COLORS = {"a": "red", "b": "blue", "c": "green"}


def encoded(color, size=(6, 4), format="PNG"):
    file = io.BytesIO()
    Image.new("RGB", size, color).save(file, format)
    return file.getvalue()


def color_of(example):
    """The colour of an example's image, by name."""
    pixel = example.image().getpixel((0, 0))
    return next(name for name in ("red", "blue", "green", "white", "black") if is_near(pixel, name))


def is_near(pixel, name):
    return np.abs(np.array(pixel) - np.array(Image.new("RGB", (1, 1), name).getpixel((0, 0)))).max() < 8


@pytest.fixture
def folder(tmp_path):
    """Three images, a.png with a caption beside it."""
    path = tmp_path / "data"
    path.mkdir()
    for stem, color in COLORS.items():
        (path / f"{stem}.png").write_bytes(encoded(color))
    (path / "a.txt").write_text("\ufeff a red image\n", "utf-8")
    return path


def write_rows(path, *rows):
    path.write_text("\n".join(json.dumps(row) for row in rows))


def stems(examples):
    return [os.path.basename(example.name) for example in examples]  # noqa: PTH119


# ---- images ----


def test_the_content_decides_on_the_format(tmp_path):
    for i, format in enumerate(("JPEG", "GIF", "TIFF", "WEBP", "PPM", "TGA", "ICO")):
        path = tmp_path / f"{i}.png"
        path.write_bytes(encoded("red", (16, 16), format))
        assert open_image(path).format == format
        assert is_near(upright(open_image(path)).getpixel((1, 1)), "red")


# Display P3: its primaries adapted to D50, white, sRGB's curve; and one of grey with gamma 1
def icc_profile(space, **curves_and_colors):
    """A small ICC profile, version 2: {tag: gamma or XYZ}."""
    tags, body = b"", b""
    offset = 128 + 4 + 12 * (len(curves_and_colors) + 1)
    description = b"test\0"
    description = b"desc" + bytes(4) + struct.pack(">I", len(description)) + description + bytes(78)
    for name, value in [("desc", description), *curves_and_colors.items()]:
        if isinstance(value, float):
            value = b"curv" + bytes(4) + struct.pack(">IH", 1, round(value * 256))
        elif isinstance(value, tuple):
            value = b"XYZ " + bytes(4) + b"".join(struct.pack(">i", round(number * 65536)) for number in value)
        value += bytes(-len(value) % 4)
        tags += name.encode() + struct.pack(">II", offset + len(body), len(value))
        body += value
    header = bytes(8) + b"\x02\x40\0\0" + b"mntr" + space + b"XYZ " + bytes(12) + b"acsp" + bytes(28)
    header += b"".join(struct.pack(">i", round(number * 65536)) for number in (0.9642, 1, 0.8249)) + bytes(48)
    count = struct.pack(">I", len(curves_and_colors) + 1)
    data = header + count + tags + body
    return struct.pack(">I", len(data)) + data[4:]


DISPLAY_P3 = icc_profile(
    b"RGB ",
    rXYZ=(0.5151, 0.2412, -0.0011),
    gXYZ=(0.2919, 0.6922, 0.0419),
    bXYZ=(0.1571, 0.0666, 0.7841),
    wtpt=(0.9642, 1.0, 0.8249),
    **dict.fromkeys(("rTRC", "gTRC", "bTRC"), 2.2),
)
LINEAR_GREY = icc_profile(b"GRAY", wtpt=(0.9642, 1.0, 0.8249), kTRC=1.0)


@pytest.mark.parametrize("suffix", ["png", "jpg", "webp"])
def test_colours_of_a_profile_become_srgb(suffix, tmp_path):
    options = {} if suffix == "png" else {"quality": 100}
    Image.new("RGB", (8, 8), (50, 200, 60)).save(tmp_path / f"a.{suffix}", icc_profile=DISPLAY_P3, **options)
    red, green, blue = upright(open_image(tmp_path / f"a.{suffix}")).getpixel((4, 4))
    assert max(red, blue) < 5  # green beyond sRGB's
    assert abs(green - 205) < 4
    assert file_example(tmp_path / f"a.{suffix}").image().getpixel((4, 4)) == (red, green, blue)


def test_profiles_with_transparency_grey_and_broken(tmp_path):
    def color(image, profile):
        image.save(tmp_path / "a.png", icc_profile=profile)
        return upright(open_image(tmp_path / "a.png")).getpixel((1, 1))

    assert color(Image.new("RGBA", (4, 4), (0, 0, 0, 0)), DISPLAY_P3) == (255, 255, 255)
    assert color(Image.new("RGBA", (4, 4), (50, 200, 60, 255)), DISPLAY_P3)[0] < 5
    assert color(Image.new("RGB", (4, 4), (50, 200, 60)).quantize(4), DISPLAY_P3)[0] < 5
    assert color(Image.new("L", (4, 4), 55), LINEAR_GREY)[0] == pytest.approx(127, abs=3)
    for image, profile in [
        (Image.new("RGB", (4, 4), (50, 200, 60)), b"broken"),
        (Image.new("RGB", (4, 4), (50, 200, 60)), DISPLAY_P3[:200]),
        (Image.new("RGB", (4, 4), (50, 200, 60)), LINEAR_GREY),
    ]:
        assert color(image, profile) == (50, 200, 60)
    assert color(Image.new("L", (4, 4), 55), DISPLAY_P3) == (55, 55, 55)


def test_images_have_a_bound_in_pixels_and_large_profiles_are_read(tmp_path, recwarn):
    def png(width, height):
        data = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
        content = b"\x89PNG\r\n\x1a\n"
        for chunk in (b"IHDR" + data, b"IDAT"):
            content += struct.pack(">I", len(chunk) - 4) + chunk + struct.pack(">I", zlib.crc32(chunk))
        return content

    assert open_image(io.BytesIO(png(16320, 12240))).size == (16320, 12240)  # a telephone of 200 megapixels
    assert not recwarn.list
    with pytest.raises(ValueError, match="268 megapixels.*smaller"):
        open_image(io.BytesIO(png(20000, 20000)))
    text = PngInfo()
    text.add_text("workflow", "x" * 3_000_000, zip=True)
    Image.new("RGB", (4, 4), "red").save(tmp_path / "a.png", pnginfo=text)
    assert upright(open_image(tmp_path / "a.png")).getpixel((1, 1)) == (255, 0, 0)


@pytest.mark.parametrize("format", ["EPS", "IPTC"])
def test_no_program_is_run_for_an_image(format, tmp_path, monkeypatch):
    """PostScript under the name of an image, and within a format that PIL opens once more."""
    (tmp_path / "gs").write_text(f"#!/bin/sh\nmkdir {tmp_path / 'marker'}\n")
    (tmp_path / "gs").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.setattr("PIL.EpsImagePlugin.gs_binary", None)  # as PIL has it
    data = encoded("red", format="EPS")
    if format == "IPTC":
        fields = {(3, 60): b"\x01\x01", (3, 20): b"\0\x06", (3, 30): b"\0\x04", (3, 120): b"\x01"}
        header = b"".join(bytes((0x1C, *tag, 0, len(value))) + value for tag, value in fields.items())
        data = header + b"\x1c\x08\x0a\x84\0\0" + len(data).to_bytes(2, "big") + data
    path = tmp_path / "image.png"
    path.write_bytes(data)
    with pytest.raises(UnidentifiedImageError):
        open_image(path)
    table = datasets.Dataset.from_dict({"image": [{"bytes": data, "path": None}], "text": ["x"]})
    table.to_parquet(tmp_path / "rows.parquet")
    examples, problems = read_dataset(
        "parquet",
        source="rows",
        image_columns={"image": "image"},
        data_files=[str(tmp_path / "rows.parquet")],
        cache_dir=tmp_path / "cache",
    )
    assert not problems
    assert "rows" not in read_sizes(examples)[1]
    assert len(read_sizes(examples)[1]) == 1
    assert not (tmp_path / "marker").exists()


def test_fit_covers_and_crops():
    rng = np.random.default_rng(0)
    image = Image.fromarray(rng.integers(0, 256, (30, 50, 3), dtype=np.uint8))
    plain = ImageOps.fit(image, (32, 16), Image.Resampling.LANCZOS)
    assert fit(image, Size(16, 32)) == plain
    turned = ImageOps.mirror(ImageOps.fit(image, (32, 16), Image.Resampling.BILINEAR, centering=(0.2, 0.9)))
    assert fit(image, (16, 32), "bilinear", centering=np.array([0.2, 0.9]), mirrored=True) == turned


def turned_file(path, orientation):
    """A file of 6 x 4 pixels, whose metadata say how the camera was turned: EXIF, or for *.xmp.png XMP alone."""
    image = Image.new("RGB", (6, 4))
    exif = Image.Exif()
    exif[0x0112] = orientation
    info = PngInfo()
    if path.name.endswith(".xmp.png"):
        info.add_itxt("XML:com.adobe.xmp", f'<x tiff:Orientation="{orientation}"/>')
        image.save(path, pnginfo=info)
    else:
        image.save(path, exif=exif)


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("suffix", [".jpg", ".png", ".xmp.png", ".webp"])
def test_a_header_tells_the_size_that_is_seen(tmp_path, suffix, orientation):
    turned_file(tmp_path / f"a{suffix}", orientation)
    example = file_example(tmp_path / f"a{suffix}")
    assert header_size(example) == Size.of(example.image())
    assert read_sizes([example], decode=False)[0] == [header_size(example)]


def test_sizes_are_read_from_headers_alone(tmp_path):
    Image.effect_noise((600, 400), 99).save(tmp_path / "a.png")
    (tmp_path / "a.png").write_bytes((tmp_path / "a.png").read_bytes()[:200])  # no pixels are left
    assert header_size(file_example(tmp_path / "a.png")) == Size(400, 600)
    table = datasets.Dataset.from_dict({"image": [{"bytes": (tmp_path / "a.png").read_bytes(), "path": None}]})
    table.cast_column("image", datasets.Image()).to_parquet(tmp_path / "a.parquet")
    (row,), problems = read_dataset(
        "parquet", source="x", image_columns={"image": "image"}, data_files=[str(tmp_path / "a.parquet")]
    )
    assert not problems
    assert header_size(row) == Size(400, 600)


def test_what_belongs_together_has_one_shape_and_two_places(tmp_path):
    image = Size(400, 600)
    for size in (Size(400, 600), Size(200, 300), Size(400, 611), Size(407, 600)):
        assert not check_shape("a.png", "a mask", size, image)
    for size in (Size(600, 400), Size(400, 613), Size(409, 600), Size(400, 400)):
        assert check_shape("a.png", "a mask", size, image) == [
            f"a.png: a mask must have the shape of its image, 600 x 400, not {size}"
        ]
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "a")
    assert not check_roles({"--a": tmp_path / "a", "--b": tmp_path / "b", "--c": None, "--d": None})
    for other in (tmp_path / "a", tmp_path / "b" / ".." / "a", tmp_path / "link"):
        assert check_roles({"--a": tmp_path / "a", "--b": other})[0].startswith(f"--b {other} is --a, too")
    assert check_roles({"--a": "image", "--b": "image", "--c": "mask"})[0].startswith("--b image is --a, too")


def test_of_many_problems_ten_and_a_count_are_said():
    problems = [f"{i}.png" for i in range(10_000)]
    assert first_ten(problems[:10]) == problems[:10]
    assert first_ten(problems) == [*problems[:10], "and 9,990 more like these"]


@pytest.mark.parametrize("source", ["folder", "dataset"])
def test_targets_that_are_their_images_are_said(tmp_path, source):
    for name in ("images", "targets"):
        (tmp_path / name).mkdir()
    cells = {"image": [], "target": []}
    for i in range(40):
        image = encoded((6 * i, 0, 0))
        target = image if i % 4 else encoded((6 * i, 255, 0))
        (tmp_path / "images" / f"{i:02}.png").write_bytes(image)
        (tmp_path / "targets" / f"{i:02}.png").write_bytes(target)
        cells["image"].append({"bytes": image, "path": None})
        cells["target"].append({"bytes": target, "path": None})
    if source == "folder":
        examples, _ = read_folder(tmp_path / "images", partner_dirs={"target": tmp_path / "targets"})
    else:
        table = datasets.Dataset.from_dict(cells)
        table = table.cast_column("image", datasets.Image()).cast_column("target", datasets.Image())
        table.to_parquet(tmp_path / "a.parquet")
        columns = {"image": "image", "target": "target"}
        examples, _ = read_dataset(
            "parquet", source="x", image_columns=columns, data_files=[str(tmp_path / "a.parquet")]
        )
    lines = describe_data(examples, [], "x")
    compared = range(0, 40, 3)
    assert f"{sum(i % 4 > 0 for i in compared)} of {len(compared)} examples" in lines["target"]
    assert "target" not in describe_data(examples[::4], [], "x")


def test_a_mask_is_white_from_128():
    mask = Image.fromarray(np.array([[0, 127, 128, 255]], dtype=np.uint8))
    assert fit_mask(mask, Size(1, 4)).tolist() == [[False, False, True, True]]
    assert fit_mask(mask.convert("RGB"), Size(1, 4), mirrored=True).tolist() == [[True, True, False, False]]
    assert fit_mask(mask, Size(2, 8)).dtype == bool


# ---- folders ----


def test_captions_beside_images(folder):
    examples, problems = read_folder(folder)
    assert not problems
    assert stems(examples) == ["a.png", "b.png", "c.png"]
    assert [example.caption for example in examples] == ["a red image", None, None]
    assert [color_of(example) for example in examples] == list(COLORS.values())


def test_captions_in_metadata(folder):
    rows = [{"file_name": f"{stem}.png", "words": f"{stem}!", "prompt": "p", "n": 1} for stem in "cba"]
    rows[1]["prompt"] = None
    write_rows(folder / "metadata.jsonl", *rows)
    examples, problems = read_folder(folder)
    assert not problems
    assert [example.caption for example in examples] == ["p", None, "p"]
    assert examples[0].columns == {"words": "a!", "prompt": "p", "n": 1}
    examples, problems = read_folder(folder, caption_column="words")
    assert not problems
    assert [example.caption for example in examples] == ["a!", "b!", "c!"]


@pytest.mark.parametrize("row", [{"text": None}, {}])
def test_a_row_without_caption_leaves_the_text_file(folder, row):
    write_rows(folder / "metadata.jsonl", {"file_name": "a.png", **row})
    for whole_rows in (False, True):
        examples, problems = read_folder(folder, whole_rows=whole_rows)
        assert not problems
        assert examples[0].caption == "a red image"
    (folder / "b.txt").write_text("blue")
    assert read_folder(folder, whole_rows=True)[0][1].caption == "blue"


@pytest.mark.parametrize(
    ("content", "options", "message"),
    [
        ("{", {}, "{metadata}: each line must be JSON with file_name (JSONDecodeError"),
        ("5", {}, "{metadata}: each line must be JSON with file_name ("),
        ('{"text": "x"}', {}, "{metadata}: each line must be JSON with file_name (KeyError"),
        (
            r'{"file_name": "a.png", "text": "\ud800"}',
            {},
            "{metadata}: each line must be JSON with file_name (Unicode",
        ),
        ('{"file_name": "a.png"}', {"caption_column": "x"}, "{metadata}: no column x for a.png, see --caption_column"),
        ('{"file_name": "z.png", "text": "x"}', {}, "{metadata}: no image z.png in this folder"),
        ("", {"caption_column": "x"}, "--caption_column x: no {metadata} that has columns"),
    ],
)
def test_bad_metadata_is_one_problem(folder, content, options, message):
    (folder / "metadata.jsonl").write_text(content)
    _, problems = read_folder(folder, **options)
    assert len(problems) == 1
    assert problems[0].startswith(message.format(metadata=folder / "metadata.jsonl"))


def test_captions_by_other_names_and_what_is_left_out(folder):
    for name in ("d.png", "e.jfif", "f.jpe", "Thumbs.db", ".hidden"):
        (folder / name).write_bytes(encoded("red", format="JPEG"))
    (folder / "picture").write_bytes(encoded("red"))
    (folder / "10_sks dog").mkdir()
    (folder / "10_sks dog" / "z.png").write_bytes(encoded("red"))
    for name in ("b.TXT", "c.png.txt", "d.caption", "e.txt", "e.caption", "nobody.txt"):
        (folder / name).write_text(name)
    table = 'file_name,text\nf.jpe,"in a table, with a comma"\n'
    (folder / "metadata.csv").write_text(table, "utf-8-sig")
    examples, problems = read_folder(folder)
    assert not problems
    captions = {os.path.basename(example.name): example.caption for example in examples}  # noqa: PTH119
    assert captions == {
        "a.png": "a red image",
        "b.png": "b.TXT",
        "c.png": "c.png.txt",
        "d.png": "d.caption",
        "e.jfif": "e.txt",
        "f.jpe": "in a table, with a comma",
    }
    assert left_out(folder, examples) == ["10_sks dog/ with 1 images", "e.caption", "nobody.txt", "picture"]
    examples[0].source = ""
    lines = describe_data(examples, [folder, None, folder], "--instance_prompt")
    assert lines["captions"] == "1 from --instance_prompt, 1 from .caption, 3 from .txt, 1 from metadata.csv"
    assert lines["not read"].startswith("4: ")
    assert lines["not read"].count("picture") == 1
    for i in range(9):
        (folder / f"{i}.md").write_text("x")
    assert describe_data(examples, [folder], "")["not read"].endswith(" and 3 more")


def test_metadata_rows_come_whole(folder):
    write_rows(folder / "metadata.jsonl", {"file_name": "a.png", "n": {"m": 1}}, {"file_name": "b.png"})
    assert read_metadata(folder / "metadata.jsonl") == ({"a.png": {"n": {"m": 1}}, "b.png": {}}, [])
    assert read_metadata(folder / "none.jsonl") == ({}, [])


def test_partners_by_stem(folder, tmp_path):
    targets, captions = tmp_path / "targets", tmp_path / "captions"
    targets.mkdir()
    captions.mkdir()
    for stem, color in COLORS.items():
        (targets / f"{stem}.jpg").write_bytes(encoded(color, format="JPEG"))
        (captions / f"{stem}.txt").write_text(f"{color} now")
    options = {"partner_dirs": {"target": targets, "mask": None}, "caption_dir": captions}
    examples, problems = read_folder(folder, **options)
    assert not problems
    assert [color_of(example.images["target"]) for example in examples] == list(COLORS.values())
    assert [example.caption for example in examples] == ["red now", "blue now", "green now"]
    assert all("mask" not in example.images for example in examples)
    assert stems(all_images(examples)) == ["a.png", "a.jpg", "b.png", "b.jpg", "c.png", "c.jpg"]

    (targets / "a.png").write_bytes(encoded("red"))
    (targets / "b.jpg").unlink()
    (folder / "c.bmp").write_bytes(encoded("green"))
    (targets / "x.heic").write_bytes(b"")
    _, problems = read_folder(folder, **options)
    assert sorted(problems) == sorted(
        [
            f"{folder}/a.png: needs one image a.* in {targets}, which has a.jpg and a.png",
            f"{folder}/b.png: needs one image b.* in {targets}, which has none",
            f"{folder}: c.bmp and c.png differ only in their ending, and so have the same partners",
            f"{targets}/x.heic: save it as PNG or JPEG, .heic is not read",
        ]
    )


def test_partners_by_name(folder, tmp_path):
    references = tmp_path / "references"
    references.mkdir()
    for stem, color in COLORS.items():
        (references / f"{stem}.png").write_bytes(encoded(color))
    (folder / "a.jpg").write_bytes(encoded("red"))
    (references / "a.jpg").write_bytes(encoded("blue"))
    options = {"partner_dirs": {"reference": references}, "partner_match": "name"}
    examples, problems = read_folder(folder, **options)
    assert not problems
    assert stems(examples) == ["a.jpg", "a.png", "b.png", "c.png"]
    assert color_of(examples[0].images["reference"]) == "blue"
    stamps = [example.stamp for example in examples]
    (references / "b.png").write_bytes(encoded("red", (9, 9)))
    changed = [example.stamp for example in read_folder(folder, **options)[0]]
    assert [new != old for new, old in zip(changed, stamps, strict=True)] == [False, False, True, False]
    (references / "c.png").unlink()
    _, problems = read_folder(folder, **options)
    assert problems == [f"{folder}/c.png: needs one image c.png in {references}, which has none"]


def test_a_changed_pixel_in_the_middle_of_a_bmp_file_changes_its_stamp(tmp_path):
    picture = Image.new("RGB", (160, 160))
    picture.save(tmp_path / "1.bmp")
    before = file_stamp(tmp_path / "1.bmp")
    picture.putpixel((80, 80), (255, 0, 0))
    picture.save(tmp_path / "1.bmp")
    assert file_stamp(tmp_path / "1.bmp") != before


def test_partners_in_columns_of_metadata(folder):
    (folder / "deep").mkdir()
    (folder / "deep" / "m.png").write_bytes(encoded("white"))
    write_rows(
        folder / "metadata.jsonl",
        {"file_name": "a.png", "pose": "b.png", "m": "deep/m.png", "text": "x", "n": 1},
        {"file_name": "c.png", "pose": "b.png", "m": "deep/none.png"},
    )
    examples, problems = read_folder(folder, whole_rows=True, partner_columns={"condition_0": "pose", "mask": "m"})
    assert problems == [f"{folder}/metadata.jsonl: column m names files that are not there: deep/none.png"]
    assert stems(examples) == ["a.png", "c.png"]
    assert [color_of(image) for image in examples[0].images.values()] == ["blue", "white"]
    assert examples[0].columns == {"text": "x", "n": 1}
    (folder / "deep" / "none.png").write_bytes(b"no image")
    examples, problems = read_folder(folder, whole_rows=True, partner_columns={"condition_0": "pose", "mask": "m"})
    assert not problems
    sizes, problems = read_sizes(all_images(examples))
    assert sizes == [Size(4, 6)] * 5 + [None]
    assert problems[0].startswith(f"{folder}/c.png, m: not a readable image (")
    _, problems = read_folder(folder, whole_rows=True, partner_columns={"mask": "k"})
    assert problems == [f"{folder}/metadata.jsonl: column k names no file for a.png, b.png, c.png"]


def test_what_lacks_in_all_images_is_one_line_with_its_remedy(folder, tmp_path):
    columns = {"partner_columns": {"condition_0": "pose", "mask": "m"}}
    _, (problem,) = read_folder(folder, whole_rows=True, **columns)
    head, _, line = problem.partition(": {")
    assert head.startswith(f"{folder}/metadata.jsonl: no such file")
    row = json.loads("{" + line)
    assert row["file_name"] == "a.png" and row.keys() == {"file_name", "text", "pose", "m"}

    names = ("a.png", "b.png", "c.png")
    write_rows(folder / "metadata.jsonl", *({"file_name": name, "pose": f"p/{name}", "m": name} for name in names))
    (folder / "a.png").rename(folder / "x.png")
    (folder / "b.png").rename(folder / "y.png")
    _, problems = read_folder(folder, whole_rows=True, partner_columns={"condition_0": "pose"})
    assert problems == [
        f"{folder}/metadata.jsonl: no image a.png, b.png in this folder",
        f"{folder}/metadata.jsonl: column pose names no file for x.png, y.png",
        f"{folder}/metadata.jsonl: column pose names files that are not there: p/c.png",
    ]
    (folder / "metadata.jsonl").unlink()
    (tmp_path / "targets").mkdir()
    examples, (problem,) = read_folder(folder, partner_dirs={"target": tmp_path / "targets"})
    assert "none for 3 of 3 images" in problem and "c.*, x.*, y.*" in problem
    for example in examples:
        example.caption = ""
    (problem,) = check_captions(examples)
    assert all(str(folder / name) in problem for name in ("c.png", "x.png", "y.png"))


def test_one_caption_per_line(folder):
    (folder / "a.txt").write_text("one\n\n two \n")
    (folder / "b.txt").write_text("\n")
    examples, problems = read_folder(folder, caption_per_line=True)
    assert not problems
    assert [example.captions for example in examples] == [["one", "two"], [], []]
    problems = check_captions(examples, several=True, remedy="write a.txt")
    assert problems == [
        f"no caption for {folder}/c.png: write a.txt",
        f"{folder}/b.png: its caption must be text and not empty, not []",
    ]


def test_order_by_path_or_by_stem(folder):
    (folder / "a-b.png").write_bytes(encoded("red"))
    assert stems(read_folder(folder)[0]) == ["a-b.png", "a.png", "b.png", "c.png"]
    assert stems(read_folder(folder, sort_by_stem=True)[0]) == ["a.png", "a-b.png", "b.png", "c.png"]


def test_problems_of_a_folder(folder, tmp_path):
    nowhere, empty = tmp_path / "nowhere", tmp_path / "empty"
    empty.mkdir()
    assert read_folder(nowhere, flag="--train_data_dir")[1] == [f"--train_data_dir {nowhere}: no such folder"]
    _, problems = read_folder(folder, partner_dirs={"mask": nowhere}, caption_dir=nowhere)
    assert problems == [f"--{name}_data_dir {nowhere}: no such folder" for name in ("mask", "caption")]
    _, problems = read_folder(empty)
    assert problems[0].startswith(f"--instance_data_dir {empty}: no images (.png, ")
    (folder / "a.txt").write_bytes(b"\xff\xfe\xff")
    (folder / "x.HEIC").write_bytes(b"")
    examples, problems = read_folder(folder)
    assert problems == [
        f"{folder}/x.HEIC: save it as PNG or JPEG, .HEIC is not read",
        f"{folder}/a.txt: not UTF-8 text",
    ]
    assert stems(examples) == ["b.png", "c.png"]
    assert image_files(folder)[0] == [folder / f"{stem}.png" for stem in "abc"]
    with pytest.raises(ValueError, match="not UTF-8 text"):
        read_text(folder / "a.txt")


def test_class_images(folder):
    examples = read_class_images(folder, ["a thing"], 2)
    assert stems(examples) == ["a.png", "b.png"]
    assert [example.caption for example in examples] == ["a red image", "a thing"]
    assert read_class_images(folder / "none", ["a thing"], 2) == read_class_images(None, ["a thing"], 2) == []


def test_class_images_of_another_prompt_model_or_size_are_refused(tmp_path):
    drawn = {"class_prompt": "a café", "class_model": "m"}

    def save(name, **texts):
        info = PngInfo()
        for key, text in texts.items():
            info.add_text(key, text)
        Image.new("RGB", (32, 48)).save(tmp_path / name, pnginfo=info)

    def check(prompt="a café", model="m", size=(48, 32), limit=9):
        return check_class_images(tmp_path, limit, prompts=[prompt], model=model, size=Size(*size))

    save("class-00000.png", **drawn)
    save("class-00001.png", **drawn)
    save("comfyui.png", prompt='{"3": {"class_type": "KSampler"}}', workflow="{}")
    Image.new("RGB", (64, 64)).save(tmp_path / "photo.jpg")
    (tmp_path / "torn.png").write_bytes((tmp_path / "class-00000.png").read_bytes()[:20])
    assert check() == []
    several = ["a café", "a bar"]
    assert [example.caption for example in read_class_images(tmp_path, several, 3)] == ["a café", "a café", None]
    (problem,) = check_class_images(tmp_path, 9, prompts=several, model="m", size=Size(48, 32))
    assert "3 images have no caption" in problem and "comfyui.png" in problem
    examples = read_class_images(tmp_path, ["a café"], 4)
    assert describe_class_images(examples) == {"class images": "4 (2 of your own)"}
    assert describe_class_images(examples[:2]) == {"class images": "2"}
    for changed, named in (
        ({"prompt": "a dog"}, "'a café'"),
        ({"model": "n"}, "by another model"),
        ({"size": (64, 64)}, "at 32 x 48 pixels, not 64 x 64"),
    ):
        (problem,) = check(**changed)
        assert "2 of its images" in problem and "class-00000.png" in problem and named in problem
    assert "1 of its images" in check("a dog", limit=1)[0]


def test_a_model_is_told_by_its_weights_wherever_they_lie(tiny_model, tmp_path):
    def identity(path):
        return model_identity(SimpleNamespace(pretrained_model_name_or_path=str(path), revision=None, cache_dir=None))

    shutil.copytree(tiny_model / "transformer", tmp_path / "moved" / "transformer")
    (weights,) = (tmp_path / "moved" / "transformer").glob("*.safetensors")
    assert identity(tmp_path / "moved") == identity(tiny_model)
    single = identity(weights)
    tensors = {name: value * 1.01 for name, value in load_file(weights).items()}
    save_file(tensors, weights)
    assert identity(tmp_path / "moved") != identity(tiny_model)
    assert identity(weights) != single

    on_hub = SimpleNamespace(pretrained_model_name_or_path="black-forest-labs/FLUX.1-dev", revision=None)
    by_default = model_identity(on_hub)  # without a look at the hub, where a commit may change a page alone
    assert model_identity(SimpleNamespace(**vars(on_hub) | {"revision": "main"})) == by_default
    assert model_identity(SimpleNamespace(**vars(on_hub) | {"revision": "refs/pr/1"})) != by_default


def test_sizes_are_counted_and_those_that_fill_no_batch_are_named():
    square, wide = Size(512, 512), Size(512, 768)
    sizes = [square, wide, square, square]
    assert count_sizes(sizes) == "3 at 512 x 512, 1 at 768 x 512 px"
    assert describe_small_groups(sizes, 1) == {}
    (line,) = describe_small_groups(sizes, 3).values()
    assert "1 at 768 x 512" in line and "3 at" not in line
    (line,) = describe_small_groups(
        [(0, square), (0, wide), (1, wide)],
        {(0, square): 1, (0, wide): 2, (1, wide): 1},
        size_of=lambda group: group[1],
    ).values()  # batches of several sets of images
    assert "1 at 768 x 512 px" in line and "512 x 512" not in line
    assert count_sizes([(square, wide)] * 2) == "2 at 512 x 512 and 768 x 512 px"  # an image at several resolutions
    many = [Size(16, 16 * i) for i in range(1, 15)]
    assert count_sizes(many).count(" at ") == 11 and "4 at 4 more sizes" in count_sizes(many)


# ---- checks ----


def test_checks_assign_nothing(folder):
    (folder / "c.png").write_bytes(b"\x89PNG and then nothing")
    examples, _ = read_folder(folder)
    before = repr(examples)
    assert check_captions(examples, "a thing") == []
    assert check_captions(examples) == [
        f"no caption for {folder}/b.png, {folder}/c.png: give --instance_prompt, captions in .txt files, or "
        "--caption_column"
    ]
    problems = check_images(examples, lambda example: example.image() and f"{example.name}: seen")
    assert problems[:2] == [f"{folder}/a.png: seen", f"{folder}/b.png: seen"]
    assert problems[2].startswith(f"{folder}/c.png: not a readable image (")
    assert repr(examples) == before


@pytest.mark.parametrize("caption", ["", " \n", 5, ["x"], {}, [], False])
def test_what_is_no_caption(caption):
    assert check_captions([Example("a", caption=caption)], "default") == [
        f"a: its caption must be text and not empty, not {caption!r}"
    ]


def test_sizes_of_turned_and_of_cut_files(tmp_path):
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 60, 3), dtype=np.uint8))
    exif = Image.Exif()
    exif[0x0112] = 6
    examples = []
    for name, options in {"a.png": {}, "b.jpg": {}, "c.jpg": {"exif": exif}, "d.png": {"exif": exif}}.items():
        noise.save(tmp_path / name, **options)
        examples.append(file_example(tmp_path / name))
    for decode in (True, False):
        sizes, problems = read_sizes(examples, decode=decode)
        assert not problems
        assert sizes == [Size(40, 60), Size(40, 60), Size(60, 40), Size(60, 40)]
        assert str(sizes[0]) == "60 x 40"
    for name in ("a.png", "b.jpg"):
        (tmp_path / name).write_bytes((tmp_path / name).read_bytes()[:-300])
    for decode in (True, False):
        sizes, problems = read_sizes(examples, decode=decode)
        assert sizes[:2] == [None, None]
        assert len(problems) == 2


def read_in_a_group(rank, folder, queue):
    """Reads the sizes of a folder's images as one of two processes, and tells which of them were opened here."""
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    opened = []
    examples, _ = read_folder(folder)
    for example in examples:
        example.read = functools.partial(lambda name, read: opened.append(name) or read(), example.name, example.read)
    if rank == 1:
        examples.append(file_example(folder / "nowhere.png"))  # only this machine has it
    sizes, problems = read_sizes(examples)
    queue.put((rank, sorted(opened), sizes, problems))
    dist.destroy_process_group()


def test_processes_share_the_reading_of_images(tmp_path, capfd):
    for i in range(5):
        Image.new("RGB", (10 + i, 8)).save(tmp_path / f"{i}.png")
    (tmp_path / "3.png").write_bytes(b"no picture")
    context = multiprocessing.get_context("fork")
    queue = context.Queue()
    processes = [context.Process(target=read_in_a_group, args=(rank, tmp_path, queue)) for rank in range(2)]
    for process in processes:
        process.start()
    (_, opened, sizes, problems), (_, others, other_sizes, other_problems) = sorted(queue.get() for _ in processes)
    for process in processes:
        process.join()
    assert len(opened) + len(others) == 5
    assert not set(opened) & set(others)
    assert sizes == other_sizes[:5] == [Size(8, 10), Size(8, 11), Size(8, 12), None, Size(8, 14)]
    assert problems == other_problems[:1]
    assert "3.png" in problems[0]
    assert "nowhere.png" in other_problems[1]
    assert capfd.readouterr().err.count("Reading images") <= 2  # one bar, drawn twice


def test_map_ahead_keeps_the_order_and_its_distance():
    started = []

    def double(number):
        started.append(number)
        time.sleep(0.01 * (number % 3))
        return 2 * number

    results = map_ahead(double, iter(range(20)), num_threads=2)
    assert next(results) == 0
    assert len(started) <= 5
    assert list(results) == [2 * number for number in range(1, 20)]


@pytest.mark.parametrize("separator", ["\u2028", "\x85", "\x0b", "\x0c", "\x1c"])
def test_only_line_ends_end_a_line(tmp_path, separator):
    text = f"a dog{separator}on grass"
    for name in ("a", "b"):
        Image.new("RGB", (8, 8)).save(tmp_path / f"{name}.png")
    (tmp_path / "a.txt").write_text(text)
    (tmp_path / "b.txt").write_bytes(f"{text}\r\ntwo\n".encode())
    examples, problems = read_folder(tmp_path, caption_per_line=True)
    assert not problems
    assert [example.caption for example in examples] == [[text], [text, "two"]]
    lines = [json.dumps({"file_name": f"{name}.png", "text": text}, ensure_ascii=False) for name in ("a", "b")]
    (tmp_path / "metadata.jsonl").write_text("\n".join(lines))
    if separator != "\x1c":
        assert [example.caption for example in read_folder(tmp_path)[0]] == [text, text]


def test_utf_16_is_no_caption(tmp_path):
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    (tmp_path / "a.txt").write_bytes("a dog".encode("utf-16-le"))
    _, (problem,) = read_folder(tmp_path)
    assert "a.txt: not UTF-8 text" in problem
    assert "control characters" in check_captions([Example("row", caption="a\0 dog")])[0]
    assert not check_captions([Example("row", caption="a\tdog\nand\u2028a cat")])


@pytest.mark.parametrize("name", ["pictures\u200b", "C:\\photos", "photos "])
def test_a_message_shows_what_cannot_be_seen(tmp_path, name):
    _, (problem,) = read_folder(tmp_path / name)
    assert repr(str(tmp_path / name)) in problem
    assert "backslashes" in problem or "invisible" in problem


# ---- datasets ----


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "datasets"))


@pytest.fixture
def parquet(tmp_path):
    """A parquet file of images as bytes, a second image column, and captions."""
    path = tmp_path / "set" / "train.parquet"
    path.parent.mkdir()
    colors = list(COLORS.values())
    rows = {
        "image_bytes": [encoded(color) for color in colors],
        "mask": [encoded("white"), encoded("black"), None],
        "text": colors,
        "lists": [[color, f"a {color} image"] for color in colors],
        "deep": [{"prompt": f"deep {color}"} for color in colors],
    }
    datasets.Dataset.from_dict(rows).to_parquet(path)
    return path


def test_a_dataset_with_several_image_columns(parquet, tmp_path):
    read = functools.partial(
        read_dataset,
        "parquet",
        source="--train_data_dir set",
        name="set",
        image_columns={"image": ["image", "image_bytes"], "mask": "mask"},
        data_files=[str(parquet)],
        cache_dir=tmp_path / "cache",
    )
    examples, problems = read(caption_column="text")
    assert not problems
    assert [example.name for example in examples] == ["set[0]", "set[1]", "set[2]"]
    assert [example.caption for example in examples] == list(COLORS.values())
    assert [color_of(example) for example in examples] == list(COLORS.values())
    assert [color_of(example.images["mask"]) for example in examples[:2]] == ["white", "black"]
    assert len({example.stamp for example in examples}) == 3
    assert [e.stamp for e in read(caption_column="text")[0]] == [e.stamp for e in examples]
    assert read_sizes(all_images(examples))[1] == ["set[2], mask: not a readable image (there is no image)"]

    assert [example.caption for example in read()[0]] == [None] * 3
    assert read(caption_column="lists")[0][1].captions == ["blue", "a blue image"]
    assert read(caption_column="deep.prompt")[0][1].caption == "deep blue"
    (whole, *_), _ = read(whole_rows=True)
    assert whole.caption == "red"
    assert whole.columns == {"text": "red", "lists": ["red", "a red image"], "deep": {"prompt": "deep red"}}


def test_a_row_is_told_by_its_images_wherever_the_dataset_lies(parquet, tmp_path):
    def stamps(path):
        options = {"image_columns": {"image": "image_bytes", "mask": "mask"}, "cache_dir": tmp_path / "cache"}
        examples, problems = read_dataset("parquet", source="set", data_files=[str(path)], **options)
        assert not problems
        return [example.stamp for example in examples]

    moved = tmp_path / "moved.parquet"
    shutil.copy(parquet, moved)
    os.utime(moved, (1, 1))
    assert stamps(moved) == stamps(parquet)
    table = datasets.Dataset.from_parquet(str(parquet), cache_dir=tmp_path / "cache").to_dict()
    table["mask"][1] = encoded("white")
    datasets.Dataset.from_dict(table).to_parquet(moved)
    assert [new != old for new, old in zip(stamps(moved), stamps(parquet), strict=True)] == [False, True, False]


@pytest.mark.parametrize("name", ["a.png", "a.webp", "a.jpg"])
def test_a_file_is_told_by_its_content(tmp_path, name):
    """One point of many differs, in the middle of the picture."""
    pixels = np.random.default_rng(0).integers(0, 256, (400, 400, 3), np.uint8)
    Image.fromarray(pixels).save(tmp_path / name)
    assert (tmp_path / name).stat().st_size > 32768
    (tmp_path / "moved").mkdir()
    moved = tmp_path / "moved" / f"b{name}"
    shutil.copy(tmp_path / name, moved)
    os.utime(moved, (1, 1))
    assert file_stamp(moved) == file_stamp(tmp_path / name) != ""
    pixels[196:204, 196:204] = 255
    Image.fromarray(pixels).save(moved)
    assert file_stamp(moved) != file_stamp(tmp_path / name)
    assert file_stamp(tmp_path / "none.png") == ""
    os.mkfifo(tmp_path / "pipe.png")
    assert file_stamp(tmp_path / "pipe.png") == ""


def test_what_changed_is_named():
    saved = [[f"{i}.png", f"s{i}", f"c{i}"] for i in range(12)]
    record = [list(row) for row in saved]
    assert data_changes(saved, record) == []
    for i in range(7):
        record[i][1] = "another"
    record[3][2] = "another"
    record[8][1] = ""  # of which nothing is known
    images, captions = data_changes(saved, record)
    assert images == "7 of 12 images (0.png, 1.png, 2.png, 3.png, 4.png and 2 more)"
    assert captions == "1 of 12 captions (3.png)"
    assert data_changes(saved, saved[:-1]) == ["11 examples for 12 (11.png)"]


def test_a_model_is_told_by_all_of_its_files(tmp_path):
    tensors = {"large.weight": torch.zeros(1000, 100), "small.bias": torch.zeros(7)}
    save_file(tensors, tmp_path / "a.safetensors")
    before = content_hash(tmp_path / "a.safetensors")
    for name, value in tensors.items():
        save_file({**tensors, name: value + 1e-3}, tmp_path / "a.safetensors")
        assert content_hash(tmp_path / "a.safetensors") != before
    (tmp_path / "tokenizers" / "t5").mkdir(parents=True)
    (tmp_path / "tokenizers" / "t5" / "words.json").write_text("[]")
    before = content_hash(tmp_path / "tokenizers")
    (tmp_path / "tokenizers" / "t5" / "words.json").write_text("{}")
    assert content_hash(tmp_path / "tokenizers") != before


def test_problems_of_a_dataset(parquet, tmp_path):
    read = functools.partial(
        read_dataset, str(parquet.parent), source="--dataset_name set", cache_dir=tmp_path / "cache"
    )
    _, problems = read(image_columns={"image": "photo", "mask": "mask"}, caption_column="words")
    (problem,) = problems
    assert "--dataset_name set: no column photo, words; it has image_bytes, mask, text, lists, deep" in problem
    assert "--image_column" in problem and "--caption_column" in problem
    _, (problem,) = read(image_columns={"image": "lists"})
    assert problem.startswith("--dataset_name set: column lists holds no images (") and len(problem) < 400
    _, problems = read_dataset(str(tmp_path / "none"), source="--dataset_name none", image_columns={"image": "image"})
    assert problems[0].startswith("--dataset_name none: cannot be loaded (")


def test_only_the_asked_image_of_a_row_is_decoded(folder, tmp_path, monkeypatch):
    rows = {"image": [str(folder / "a.png")], "target": [str(folder / "b.png")], "other": [str(folder / "c.png")]}
    table = datasets.Dataset.from_dict(rows)
    for column in rows:
        table = table.cast_column(column, datasets.Image())
    table.to_parquet(tmp_path / "rows.parquet")
    examples, problems = read_dataset(
        "parquet",
        source="rows",
        image_columns={"image": "image", "target": "target"},
        whole_rows=True,
        data_files=[str(tmp_path / "rows.parquet")],
        cache_dir=tmp_path / "cache",
    )
    assert not problems
    opened = []
    monkeypatch.setattr("common.data.open_image", lambda file: opened.append(file) or open_image(file))
    monkeypatch.setattr(datasets.Image, "decode_example", None)
    assert color_of(examples[0].images["target"]) == "blue"
    assert len(opened) == 1


def test_an_image_folder_is_a_dataset(folder, tmp_path):
    write_rows(folder / "metadata.jsonl", *({"file_name": f"{stem}.png", "text": stem} for stem in COLORS))
    examples, problems = read_dataset(
        str(folder),
        source=f"--dataset_name {folder}",
        image_columns={"image": "image"},
        caption_column="text",
        cache_dir=tmp_path / "cache",
    )
    assert not problems
    assert {example.caption: color_of(example) for example in examples} == COLORS
    assert examples[0].name == f"{folder}[0]"


@pytest.fixture
def tars(tmp_path):
    """Two webdataset tars, of two images and of one."""
    paths = []
    for shard in ("ab", "c"):
        path = tmp_path / f"{shard}.tar"
        with tarfile.open(path, "w") as tar:
            for stem in shard:
                record = json.dumps({"prompt": f"a {COLORS[stem]} image"}).encode()
                for suffix, data in (("jpg", encoded(COLORS[stem], format="JPEG")), ("json", record)):
                    member = tarfile.TarInfo(f"{stem}.{suffix}")
                    member.size = len(data)
                    tar.addfile(member, io.BytesIO(data))
        paths.append(str(path))
    return paths


def write_tar(path, members):
    with tarfile.open(path, "w") as tar:
        for name, data in members.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))


def samples(image, caption):
    """Three samples of a tar: `image` and `caption` are the endings of their files."""
    members = {}
    for stem, color in COLORS.items():
        words = f"a {color} image"
        text = json.dumps({"caption": words}) if caption == "json" else words
        members |= {f"{stem}.{image}": encoded(color), f"{stem}.{caption}": text.encode()}
    return members


def table(images, feature):
    """A dataset of three images, each given in the way of images(file) and of the datasets `feature`."""
    rows = {"image": [images(encoded(color)) for color in COLORS.values()]}
    rows["text"] = [f"a {color} image" for color in COLORS.values()]
    features = datasets.Features({"image": feature, "text": datasets.Value("string")})
    return datasets.Dataset.from_dict(rows, features=features)


def write_dataset(kind, folder):
    """Writes a dataset of COLORS in one of the forms that people have theirs in; what names it, in `load_rows`."""
    folder.mkdir()
    image, text = datasets.Image(), datasets.Value("string")
    if kind.startswith("tar"):
        write_tar(folder / "0.tar", samples(*kind.split()[1:]))
    elif kind == "save_to_disk":
        table(bytes, image).save_to_disk(folder)
    elif kind == "save_to_disk of splits":
        datasets.DatasetDict({"train": table(bytes, image), "test": table(bytes, image)}).save_to_disk(folder)
    elif kind == "only a test split":
        table(bytes, image).to_parquet(folder / "test-0.parquet")
    elif kind == "lists of one image":
        table(lambda file: [file], datasets.List(image)).to_parquet(folder / "train.parquet")
    elif kind == "base64":
        table(lambda file: base64.encodebytes(file).decode(), text).to_parquet(folder / "train.parquet")
    elif kind == "data URLs":
        prefix = "data:image/png;base64,"
        table(lambda file: prefix + base64.b64encode(file).decode(), text).to_parquet(folder / "train.parquet")


DATASETS = ["tar jpg txt", "tar JPG json", "tar final.Png json", "save_to_disk", "save_to_disk of splits"]
DATASETS += ["only a test split", "lists of one image", "base64", "data URLs"]


@pytest.mark.parametrize("kind", DATASETS)
def test_forms_of_datasets_are_read_stored_and_streamed(kind, tmp_path):
    write_dataset(kind, tmp_path / "set")
    settings = {"source": "--dataset_name", "image_columns": {"image": "image"}, "cache_dir": tmp_path / "cache"}
    path = str(tmp_path / "set")
    whole, problems = read_dataset(path, **settings, whole_rows=True)
    assert not problems
    with_default, problems = read_dataset(path, **settings, caption_column=DATASET_CAPTIONS)  # TwinFlow
    assert not problems
    stream, problems = open_stream(path, **settings)
    assert stream and not problems
    streamed = [stream.example(row, str(i)) for i, row in enumerate(stream.rows)]
    for examples in (whole, with_default, streamed):
        assert [example.caption for example in examples] == [f"a {color} image" for color in COLORS.values()]
        assert [color_of(example) for example in examples] == list(COLORS.values())


@pytest.mark.parametrize("streaming", [False, True])
def test_forms_of_datasets_that_are_not_read_name_the_flag(streaming, tmp_path):
    def problems_of(path):
        settings = {
            "source": "--dataset_name set",
            "image_columns": {"image": "image"},
            "cache_dir": tmp_path / "cache",
        }
        if streaming:
            return open_stream(str(path), **settings)[1]
        return read_dataset(str(path), **settings)[1]

    for name in ("two splits", "mixed", "dotted", "numbers", "empty"):
        (tmp_path / name).mkdir()
    for split in ("test", "validation"):
        table(bytes, datasets.Image()).to_parquet(tmp_path / "two splits" / f"{split}.parquet")
    write_tar(tmp_path / "mixed" / "0.tar", {"a.jpg": encoded("red"), "a.txt": b"a", "b.png": encoded("red")})
    write_tar(tmp_path / "dotted" / "0.tar", {"my.a.jpg": encoded("red"), "my.b.jpg": encoded("red")})
    datasets.Dataset.from_dict({"image": [1, 2]}).to_parquet(tmp_path / "numbers" / "train.parquet")
    for name, words in {
        "two splits": "no split train; it has validation, test",
        "mixed": "the same endings",
        "dotted": "first dot",
        "numbers": "--image_column",
        "empty": "cannot be loaded",
    }.items():
        (problem,) = problems_of(tmp_path / name)
        assert problem.startswith("--dataset_name set: ") and words in problem and len(problem) < 500


def test_what_is_no_image_in_a_dataset_is_said_in_a_line(tmp_path):
    texts = ["no path! " * 10**5, "none.png", None]
    datasets.Dataset.from_dict({"image": texts, "text": ["x" * 10**5] * 3}).to_parquet(tmp_path / "a.parquet")
    two = [[encoded("red"), encoded("red")], [], [encoded("red")]]
    features = datasets.Features({"image": datasets.List(datasets.Image())})
    datasets.Dataset.from_dict({"image": two}, features=features).to_parquet(tmp_path / "b.parquet")
    for name, num_problems in (("a", 3), ("b", 2)):
        examples, problems = read_dataset(
            "parquet",
            source="--dataset_name",
            image_columns={"image": "image"},
            data_files=[str(tmp_path / f"{name}.parquet")],
            cache_dir=tmp_path / "cache",
        )
        assert not problems
        _, problems = read_sizes(examples)
        assert len(problems) == num_problems and max(map(len, problems)) < 300
    (problem,) = check_captions([Example("row", caption=["x" * 10**6])])
    assert len(problem) < 200


def test_a_folder_of_tables_or_tars_is_sent_to_dataset_name(tmp_path):
    for kind in ("tar jpg txt", "save_to_disk", "only a test split"):
        write_dataset(kind, tmp_path / kind)
        _, (problem,) = read_folder(tmp_path / kind)
        assert "--dataset_name" in problem


TARS = {"source": "--data_files", "image_columns": {"image": ("image", "jpg", "png")}, "caption_column": "json.prompt"}


def test_tars_stored_and_streamed(tars, tmp_path):
    files = {"data_files": tars, "cache_dir": tmp_path / "cache"}
    stored, problems = read_dataset("webdataset", **TARS, name="--data_files", whole_rows=True, **files)
    assert not problems
    assert [example.name for example in stored] == [f"--data_files[{i}]" for i in range(3)]
    stream, problems = open_stream("webdataset", **TARS, **files)
    assert stream and not problems
    streamed = [stream.example(row, str(i)) for i, row in enumerate(stream.rows)]
    for examples in (stored, streamed):
        assert [example.caption for example in examples] == [f"a {color} image" for color in COLORS.values()]
        assert [color_of(example) for example in examples] == list(COLORS.values())
        assert examples[0].columns["__key__"].endswith("a")
    _, problems = open_stream("webdataset", **TARS | {"caption_column": "txt"}, **files)
    assert problems[0].startswith("--data_files: no column txt; it has ")


# ---- batches ----


def test_class_samples_come_after_the_others():
    def sample(i):
        return {"prompt": str(i), "x": torch.tensor([i])}

    batch = collate([[sample(0), sample(10)], [sample(1), sample(11)]])
    assert batch["prompt"] == ["0", "1", "10", "11"]
    assert batch["x"].tolist() == [[0], [1], [10], [11]]


def test_images_are_read_ahead_where_a_gpu_would_wait_for_them():
    choose = functools.partial(choose_num_workers, num_cores=16, num_processes=1)
    assert choose(None, has_gpu=True) == 4
    assert choose(None, has_gpu=False) == 0
    assert [choose(requested, has_gpu=True) for requested in (0, 1, 7)] == [0, 1, 7]
    assert choose(None, has_gpu=True, num_cores=16, num_processes=8) == 2
    assert choose(None, has_gpu=True, num_cores=2, num_processes=8) == 1
