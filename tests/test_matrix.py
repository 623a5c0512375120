"""Every kind of input through every program that reads it: images, captions, paths, and headers of LoRA files.

What one program takes otherwise than another fails here, also for kinds that no report has named. Each test counts
what it compared, and the counts are printed below pytest's results.
"""

import argparse
import importlib
import io
import json
import re
import shlex
import struct
import sys
import tarfile
import unicodedata
import zlib
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

from common.arguments import Parser, expanded_path, name_or_path
from common.data import INTERPOLATION, Size, file_example, fit, read_dataset, read_sizes
from common.latents import TensorCache, to_tensor
from common.lora import add_lora, check_lora_file, layer_shapes, start_from_lora
from common.lora_formats import LORA_FORMS, LoraLayer, read_lora, write_lora
from common.tracking import METADATA

import datasets
import numpy as np
import pytest
import tiny_backbones
import torch
import transformers
from accelerate import Accelerator
from conftest import ROOT
from diffusers import FluxPipeline
from PIL import Image, ImageCms, ImageOps, PngImagePlugin
from safetensors import safe_open
from safetensors.torch import save_file
from test_data import DISPLAY_P3, LINEAR_GREY, icc_profile
from test_family import parser_of
from test_influxedit_generate import lora, make_run  # noqa: F401
from test_lora_files import block_layers

import train_dreambooth_flux_advanced as dreambooth
import train_influxedit as influxedit
import train_omini as omini
import train_twinflow as twinflow
from examples import convert_lora
from examples.dreambooth import generate as dreambooth_generate
from examples.influxedit import generate as influxedit_generate
from examples.omini import generate as omini_generate
from examples.twinflow import generate as twinflow_generate


ADOBE_RGB = icc_profile(
    b"RGB ",
    rXYZ=(0.6097, 0.3111, 0.0195),
    gXYZ=(0.2053, 0.6257, 0.0609),
    bXYZ=(0.1492, 0.0632, 0.7446),
    wtpt=(0.9642, 1.0, 0.8249),
    **dict.fromkeys(("rTRC", "gTRC", "bTRC"), 2.2),
)
SRGB = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
LAB = ImageCms.ImageCmsProfile(ImageCms.createProfile("LAB")).tobytes()

TRANSPARENT = (100, 100, 100)  # a colour of `scene` and `hole` that some kinds make transparent


def strings(*words):
    return [str(word) for word in words]


# ---------------------------------------------------------------------------------------------------------------------
# Kinds of images
# ---------------------------------------------------------------------------------------------------------------------


def scene(width=48, height=32):
    """A picture of few colours without symmetry."""
    pixels = np.random.default_rng(0).integers(0, 3, (height // 4 + 1, width // 4 + 1, 3)) * 100
    image = Image.fromarray(pixels.astype(np.uint8).repeat(4, 0).repeat(4, 1)[:height, :width])
    image.paste(TRANSPARENT, (20, 8, 28, 16))
    return image


def hole(width=48, height=32):
    """A mask, as a picture."""
    image = Image.new("RGB", (width, height))
    image.paste("white", (width // 8, height // 6, width * 5 // 8, height * 2 // 3))
    image.paste(TRANSPARENT, (36, 20, 44, 28))
    return image


def stored_turned(image, orientation):
    """(pixels as a camera stores them, the EXIF that says how to turn them back)."""
    turns = {
        2: Image.Transpose.FLIP_LEFT_RIGHT,
        3: Image.Transpose.ROTATE_180,
        4: Image.Transpose.FLIP_TOP_BOTTOM,
        5: Image.Transpose.TRANSPOSE,
        6: Image.Transpose.ROTATE_90,
        7: Image.Transpose.TRANSVERSE,
        8: Image.Transpose.ROTATE_270,
    }
    exif = Image.Exif()
    exif[0x0112] = orientation
    return (image.transpose(turns[orientation]) if orientation > 1 else image), exif


def png_chunks(data):
    chunks = []
    place = 8
    while place < len(data):
        end = place + 12 + struct.unpack(">I", data[place : place + 4])[0]
        chunks.append(data[place:end])
        place = end
    return chunks


def with_exif_after_the_pixels(image):
    """A PNG file whose EXIF follows the image data, as exiftool writes it."""
    pixels, exif = stored_turned(image, 6)
    file = io.BytesIO()
    pixels.save(file, "PNG", exif=exif)
    chunks = png_chunks(file.getvalue())
    moved = [chunk for chunk in chunks if chunk[4:8] == b"eXIf"]
    others = [chunk for chunk in chunks if chunk[4:8] != b"eXIf"]
    return b"".join([file.getvalue()[:8], *others[:-1], *moved, others[-1]])


def with_xmp(image):
    """A PNG file whose XMP says how to turn it."""
    pixels, _ = stored_turned(image, 6)
    info = PngImagePlugin.PngInfo()
    info.add_itxt("XML:com.adobe.xmp", '<x:xmpmeta><rdf:Description tiff:Orientation="6"/></x:xmpmeta>')
    file = io.BytesIO()
    pixels.save(file, "PNG", pnginfo=info)
    return file.getvalue()


def grey_16_with_alpha(image, alpha):
    """A PNG file of grey and alpha in 16 bits each, which PIL does not write."""
    grey = np.asarray(image.convert("L")).astype(">u2") * 257
    rows = np.stack([grey, np.asarray(alpha).astype(">u2") * 257], axis=-1)
    data = b"".join(b"\0" + row.tobytes() for row in rows.astype(">u2"))

    def chunk(name, content):
        return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))

    header = struct.pack(">IIBBBBB", image.width, image.height, 16, 4, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(data)) + chunk(b"IEND", b"")


def kinds(image):
    """{kind: (file's bytes, its suffix, the picture that a viewer shows or None)} of one picture."""
    found = {}

    def add(kind, stored, shown=None, suffix=".png", **options):
        if not isinstance(stored, bytes):
            file = io.BytesIO()
            stored.save(file, options.pop("format", Image.registered_extensions()[suffix]), **options)
            stored = file.getvalue()
        found[kind] = stored, suffix, shown

    white = Image.new("RGB", image.size, "white")
    grey = image.convert("L")
    few = image.quantize(64)
    cut_out = Image.fromarray(~(np.asarray(image) == TRANSPARENT).all(-1))  # False where transparent
    faded = Image.composite(Image.new("L", image.size, 255), Image.new("L", image.size, 64), cut_out.convert("L"))
    see_through = Image.alpha_composite(white.convert("RGBA"), Image.merge("RGBA", [*image.split(), faded]))
    on_white = Image.composite(image, white, cut_out)
    grey_on_white = Image.composite(grey.convert("RGB"), white, cut_out)

    add("RGB", image, image)
    add("JPEG", image, suffix=".jpg", quality=95)
    add("WebP", image, image, suffix=".webp", lossless=True)
    add("BMP", image, image, suffix=".bmp")
    add("GIF by another name", few, image, suffix=".jpg", format="GIF")
    add("several frames", image, image, save_all=True, append_images=[white])
    add("several photos", image, suffix=".jpg", format="MPO", save_all=True, append_images=[white])
    add("grey", grey, grey.convert("RGB"))
    add("grey JPEG", grey, suffix=".jpg")
    add("1 bit", image.convert("1"), image.convert("1").convert("RGB"))
    add("16 bits", Image.fromarray(np.asarray(grey).astype(np.uint16) * 257), grey.convert("RGB"))
    add("palette", few, image)
    add("CMYK", image.convert("CMYK"), suffix=".jpg")
    # transparency
    add("RGBA", Image.merge("RGBA", [*image.split(), faded]), see_through.convert("RGB"))
    add("LA", Image.merge("LA", [grey, faded]))
    add("16 bits and alpha", grey_16_with_alpha(image, cut_out.convert("L")), grey_on_white)
    add("a transparent colour", image, on_white, transparency=TRANSPARENT)
    add("a transparent grey", grey, grey_on_white, transparency=TRANSPARENT[0])
    index = few.getpixel((22, 10))
    add("palette, transparent", few, on_white, transparency=index)
    add("palette, half transparent", few, transparency=bytes(64 if i == index else 255 for i in range(256)))
    # turned
    for orientation in range(1, 9):
        pixels, exif = stored_turned(image, orientation)
        add(f"turn {orientation}", pixels, image, exif=exif)
    pixels, exif = stored_turned(image, 6)
    add("turned JPEG", pixels, suffix=".jpg", exif=exif, quality=95)
    add("turned RGBA", pixels.convert("RGBA"), image, suffix=".webp", lossless=True, exif=exif)
    add("turned after the pixels", with_exif_after_the_pixels(image), image)
    add("turned by XMP", with_xmp(image), image)
    pixels, exif = stored_turned(Image.fromarray(np.asarray(grey).astype(np.uint16) * 257), 6)
    add("16 bits, turned", pixels, grey.convert("RGB"), exif=exif)
    # colours
    for name, profile in {"Display P3": DISPLAY_P3, "Adobe RGB": ADOBE_RGB}.items():
        add(name, image, icc_profile=profile)
        add(f"{name}, JPEG", image, suffix=".jpg", icc_profile=profile)
        add(f"{name}, palette", few, icc_profile=profile)
        add(f"{name}, RGBA", Image.merge("RGBA", [*image.split(), faded]), icc_profile=profile)
        pixels, exif = stored_turned(image, 8)
        add(f"{name}, turned", pixels, icc_profile=profile, exif=exif)
    add("sRGB", image, icc_profile=SRGB)
    add("linear grey", grey, icc_profile=LINEAR_GREY)
    add("grey as RGB", grey, grey.convert("RGB"), icc_profile=DISPLAY_P3)
    add("a profile of Lab", image, image, icc_profile=LAB)
    add("a broken profile", image, image, icc_profile=DISPLAY_P3[:200])
    return found


KINDS = list(kinds(scene()))


def write_kinds(folder, image):
    """{kind: file in a new folder}."""
    folder.mkdir()
    files = {}
    for i, (kind, (data, suffix, _)) in enumerate(kinds(image).items()):
        files[kind] = folder / f"{i}{suffix}"
        files[kind].write_bytes(data)
    return files


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    return write_kinds(tmp_path_factory.mktemp("kinds") / "images", scene())


@pytest.fixture(scope="module")
def masks(images):
    return write_kinds(images["RGB"].parent.parent / "masks", hole())


@pytest.fixture(scope="module")
def others(images):
    """Targets and references: other pictures of the same names."""
    return write_kinds(images["RGB"].parent.parent / "others", ImageOps.mirror(scene()))


def test_every_kind_is_read_as_a_viewer_shows_it(images, tmp_path, record_property):
    """From folders and datasets alike, and its size is known before it is decoded."""
    examples = [file_example(path) for path in images.values()]
    rows = {"image": [{"bytes": path.read_bytes(), "path": None} for path in images.values()]}
    features = datasets.Features({"image": datasets.Image(decode=False)})
    datasets.Dataset.from_dict(rows, features=features).to_parquet(tmp_path / "a.parquet")
    of_dataset, problems = read_dataset(
        "parquet",
        source="a.parquet",
        image_columns={"image": "image"},
        data_files=[str(tmp_path / "a.parquet")],
        cache_dir=tmp_path / "cache",
    )
    assert not problems
    for decode in (True, False):
        sizes, problems = read_sizes(examples, decode=decode)
        assert not problems
        assert dict(zip(KINDS, sizes, strict=True)) == dict.fromkeys(KINDS, Size(32, 48))
    for (kind, (_, _, shown)), example, row in zip(kinds(scene()).items(), examples, of_dataset, strict=True):
        image = example.image()
        assert image.mode == "RGB"
        assert np.array_equal(image, row.image()), kind
        if shown is not None:
            assert np.array_equal(image, shown), kind
    record_property("kinds of images, in folders and datasets", len(KINDS))


# ---------------------------------------------------------------------------------------------------------------------
# Images: every trainer and every generator
# ---------------------------------------------------------------------------------------------------------------------


def expected(path, size=None, interpolation="lanczos"):
    """A file as all programs prepare it, of `size` (height, width)."""
    image = file_example(path).image()
    method = Image.Resampling[interpolation.removesuffix("_exact").upper()]
    return to_tensor(ImageOps.fit(image, size[::-1], method) if size else image)


def test_dreambooth_trains_on_every_kind(tiny_model, images, record_property):
    flags = ("--pretrained_model_name_or_path", tiny_model, "--instance_data_dir", images["RGB"].parent)
    flags += ("--instance_prompt", "x", "--resolution", 32, "--center_crop")
    args = dreambooth.parse_args(strings(*flags))
    examples, problems = dreambooth.find_examples(args)
    assert not problems
    dataset = dreambooth.DreamBoothDataset(examples, args)
    for key in dataset.image_keys():
        path = Path(examples[key[0]].name)
        assert torch.equal(dataset.pixel_values(key), expected(path, (32, 32))), path
    record_property("kinds of images in train_dreambooth_flux_advanced.py", len(dataset))


@pytest.fixture(scope="module")
def fill_pipeline(tiny_fill, lora):  # noqa: F811
    return influxedit_generate.load_pipeline(lora, tiny_fill)[0]


class InfluxEdit:
    """What train_influxedit.py and its generator prepare of images and masks."""

    def __init__(self, model, lora, pipeline, folder, monkeypatch):  # noqa: F811
        self.model = model
        self.lora = lora
        self.pipeline = pipeline
        self.folder = folder
        self.monkeypatch = monkeypatch

    def trained(self, *flags):
        """{file: ([image with what is masked set to 0], mask)} of a folder, and that of validation."""
        words = ("--pretrained_model_name_or_path", self.model, "--seed", 0, "--instance_prompt", "x", "--center_crop")
        words += ("--train_batch_size", 1, "--validation_prompt", "x", *flags)
        args = influxedit.parse_args(strings(*words))
        examples, problems = influxedit.find_examples(args)
        assert not problems
        dataset = influxedit.EditDataset(examples, args)
        samples = {}
        for index, example in enumerate(dataset.examples):
            ((sample,),) = dataset.__getitems__([(0, index)])
            samples[Path(example.name)] = sample["pixel_values"][1], sample["mask"]
        cases = [
            (to_tensor(case.image), to_tensor(case.mask.convert("RGB"))[:1])
            for case in influxedit.validation_cases(args, examples)
        ]
        return samples, cases

    def generated(self, run, *words):
        """[(image with what is masked set to 0, mask)] that the pipeline encodes."""
        seen = []

        def see(mask, masked_image, *rest):
            seen.append((masked_image[0], mask[0]))
            raise InterruptedError

        def stopped(function):
            def run(pipeline, prompts, images, *rest, **options):
                with pytest.raises(InterruptedError):
                    function(pipeline, prompts, images, *rest, **options)
                image = images[0] if isinstance(images, list) else images
                return [image] if isinstance(images, list) else image

            return run

        trained = json.loads((run / "args.json").read_text())["args"]
        with self.monkeypatch.context() as patch:
            patch.setattr(self.pipeline, "prepare_mask_latents", see, raising=False)
            self.pipeline.edit_mode = trained["mode"] == "edit"
            patch.setattr(influxedit_generate, "load_pipeline", lambda *_: (self.pipeline, trained))
            for name in ("edit", "fill", "paint_beside"):
                patch.setattr(influxedit_generate, name, stopped(getattr(influxedit_generate, name)))
            words = (run, "--prompt", "x", "--output", self.folder / "out", "--max_sequence_length", 8, *words)
            influxedit_generate.main(strings(*words, "--pretrained_model_name_or_path", self.model))
        return seen

    def run(self, name, **flags):
        return make_run(self.folder / name, self.lora, **flags)


@pytest.fixture
def influx(tiny_fill, lora, fill_pipeline, tmp_path, monkeypatch):  # noqa: F811
    return InfluxEdit(tiny_fill, lora, fill_pipeline, tmp_path, monkeypatch)


def is_same(image, other):
    return torch.allclose(image, other, atol=1e-6)


def test_influxedit_edits_every_kind(influx, images, others, record_property):
    folders = ("--instance_data_dir", images["RGB"].parent, "--target_data_dir", others["RGB"].parent)
    paths = ",".join(map(str, images.values()))
    samples, cases = influx.trained(
        *("--mode", "edit", *folders, "--resolution", 48),
        *("--validation_image", paths, "--validation_width", 48, "--validation_height", 32),
    )
    shown = influx.generated(influx.run("run", mode="edit", resolution=[48]), "--image", *images.values())
    for (kind, path), (image, mask), (validated, _) in zip(images.items(), shown, cases, strict=True):
        assert is_same(samples[path][0], expected(path)), kind
        assert is_same(image, samples[path][0]), kind
        assert is_same(validated, samples[path][0]), kind
        assert torch.equal(mask, samples[path][1]) or not mask.any(), kind
    record_property("kinds of images in train_influxedit.py, its validation and generate.py, edit", len(images))


def test_influxedit_fills_every_kind_of_image_and_mask(influx, images, masks, record_property):
    flags = ("--instance_data_dir", images["RGB"].parent, "--mask_data_dir", masks["RGB"].parent, "--resolution", 48)
    flags += ("--validation_width", 48, "--validation_height", 32)
    lists = (",".join(map(str, files.values())) for files in (images, masks))
    samples, cases = influx.trained(*flags, "--validation_image", next(lists), "--validation_mask", next(lists))
    run = influx.run("run", mode="mask", use_split_mask=False, resolution=[48])
    for (kind, path), (case_image, case_mask) in zip(images.items(), cases, strict=True):
        ((image, mask),) = influx.generated(run, "--image", path, "--mask", masks[kind])
        trained_image, trained_mask = samples[path]
        assert 0 < trained_mask.mean() < 1, kind
        assert torch.equal(mask, trained_mask), kind
        assert is_same(image, trained_image), kind
        assert torch.equal((case_mask > 0).float(), trained_mask), kind
        assert is_same(case_image * (1 - trained_mask), trained_image), kind
    record_property("kinds of masks in train_influxedit.py, its validation and generate.py", len(masks))


@pytest.mark.slow
def test_influxedit_at_every_interpolation_size_and_shape(influx, record_property):
    cases = [(interpolation, 33, (75, 50)) for interpolation in INTERPOLATION]
    for resolution in (16, 33, 48, 80):
        cases += [("lanczos", resolution, shape) for shape in ((48, 32), (75, 50), (31, 64), (90, 17))]
    for i, (interpolation, resolution, shape) in enumerate(cases):
        pictures = {"images": scene(*shape), "targets": ImageOps.mirror(scene(*shape)), "masks": hole(*shape)}
        files = {}
        for name, image in pictures.items():
            folder = influx.folder / str(i) / name
            folder.mkdir(parents=True)
            files[name] = folder / "a.png"
            image.save(files[name])
        shared = ("--instance_data_dir", files["images"].parent, "--resolution", resolution)
        shared += ("--image_interpolation_mode", interpolation)
        settings = {"resolution": [resolution], "image_interpolation_mode": interpolation}
        for mode, partner in (("edit", "target"), ("mask", "mask")):
            samples, _ = influx.trained(*shared, "--mode", mode, f"--{partner}_data_dir", files[f"{partner}s"].parent)
            run = influx.run(f"run-{i}-{mode}", mode=mode, use_split_mask=False, **settings)
            words = ["--mask", files["masks"]] if mode == "mask" else []
            ((image, mask),) = influx.generated(run, "--image", files["images"], *words)
            trained_image, trained_mask = samples[files["images"]]
            assert is_same(image, trained_image), (interpolation, resolution, shape, mode)
            assert mode == "edit" or torch.equal(mask, trained_mask), (interpolation, resolution, shape)
    record_property("interpolation, size and shape in train_influxedit.py and generate.py", 2 * len(cases))


def test_influxedit_paints_beside_what_training_shows(influx, images, record_property):
    """The left half as in training, but for the seam, where the wide image goes on with its right half."""
    count = 0
    kinds_of_size = [(kind, images[kind], 96) for kind in ("RGBA", "16 bits", "turn 6", "Display P3")]
    shapes = [((33, 40), 48), ((66, 31), 64), ((50, 50), 80), ((40, 90), 96)]
    for shape, resolution in shapes:
        path = influx.folder / f"{shape}.png"
        scene(*shape).save(path)
        kinds_of_size.append((shape, path, resolution))
    runs = {size: influx.run(f"run-{size}", mode="mask", resolution=[size]) for size in {48, 64, 80, 96}}
    for kind, path, resolution in kinds_of_size:
        half = file_example(path).image()
        folder = influx.folder / f"wide-{count}"
        folder.mkdir()
        wide = Image.new("RGB", (2 * half.width, half.height), "white")
        wide.paste(half, (0, 0))
        wide.paste(ImageOps.invert(half), (half.width, 0))
        wide.save(folder / "a.png")
        flags = ("--instance_data_dir", folder, "--use_split_mask", "--mask_only_right", "--resolution", resolution)
        samples, _ = influx.trained(*flags, "--validation_width", 96, "--validation_height", 32)
        ((image, mask),) = influx.generated(runs[resolution], "--image", path)
        trained_image, trained_mask = samples[folder / "a.png"]
        assert torch.equal(mask, trained_mask), kind
        seam = image.shape[-1] // 2
        assert is_same(image[..., : seam - 4], trained_image[..., : seam - 4]), kind
        count += 1
    record_property("kinds and shapes of images beside which train_influxedit.py and generate.py paint", count)


class Omini:
    """What train_omini.py and its generator prepare of an image and a mask."""

    def __init__(self, model, folder):
        self.model = model
        self.folder = folder

    def trained(self, folder, *flags):
        """(dataset, args) of a folder, and an adapter's file in self.folder whose header says what was trained."""
        words = (
            "--pretrained_model_name_or_path",
            self.model,
            "--instance_data_dir",
            folder,
            "--instance_prompt",
            "x",
        )
        words += ("--drop_image_prob", 0, "--drop_text_prob", 0, "--output_dir", self.folder / "run", *flags)
        args = omini.parse_args(strings(*words))
        examples, problems = omini.find_examples(args)
        assert not problems
        specs = omini.condition_specs(args)
        (name,) = omini.adapter_names(specs)
        metadata = omini.adapter_metadata(args, specs, name)
        save_file({"a.lora_A.weight": torch.zeros(1)}, self.folder / "a.safetensors", metadata=metadata)
        return omini.OminiDataset(examples, specs, args), args

    def generated(self, image, mask=None):
        """[each condition's image] and the mask of the generator."""
        words = (self.folder / "a.safetensors", "--prompt", "x", "--image", image)
        words += ("--mask", mask) if mask else ()
        args = omini_generate.parse_args(strings(*words))
        conditions = []
        for spec, condition in zip(args.specs, omini_generate.read_condition_images(args, args.specs), strict=True):
            if spec.type == "token_integration":  # which its pipeline masks
                condition = omini.convert_to_condition(spec.type, condition, mask=args.pixel_mask)
            conditions.append(to_tensor(condition))
        return conditions, args.pixel_mask


CONDITIONS = {
    "several": ("canny", "coloring", "custom", "sr", "deblurring"),
    "fill": ("fill",),
    "token_integration": ("token_integration",),
    "depth": ("depth",),
}


@pytest.fixture
def depth_of_grey(monkeypatch):
    """An estimator whose depth is the image in grey, turned to its negative."""

    def estimate(images, batch_size=None):
        if not isinstance(images, list):
            return {"depth": ImageOps.invert(images.convert("L"))}
        return [estimate(image) for image in images]

    monkeypatch.setattr(transformers, "pipeline", lambda *_, **__: estimate)
    monkeypatch.setattr(omini, "check_depth_model", lambda args: [])


@pytest.mark.parametrize("name", CONDITIONS)
def test_omini_makes_conditions_of_every_kind(tiny_model, masks, depth_of_grey, tmp_path, record_property, name):
    images = write_kinds(tmp_path / "images", scene())
    rows = [
        {"file_name": path.name, "pose": f"../images/{path.name}", "hole": str(masks[kind])}
        for kind, path in images.items()
    ]
    (tmp_path / "images" / "metadata.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    program = Omini(tiny_model, tmp_path)
    types = CONDITIONS[name]
    flags = ["--condition_type", *types, "--target_size", "64x48"]
    flags += ["--condition_column", "pose"] if "custom" in types else []
    flags += ["--mask_column", "hole"] if name in omini.MASKED_CONDITIONS else []
    flags += ["--condition_size", "32x16" if name == "several" else "64x48", "--validation_image", images["RGB"]]
    flags += ["--position_scale", 2] if name == "several" else []
    dataset, args = program.trained(tmp_path / "images", *flags, "--validation_prompt", "x")
    if name == "depth":
        accelerator = Accelerator(cpu=True)
        for path in images.values():
            args.validation_image = [path]
            omini.estimate_depth(accelerator, omini.validation_examples(args), args)
    by_path = {Path(example.name): index for index, example in enumerate(dataset.examples)}
    for kind, path in images.items():
        index = by_path[path]
        example = dataset.examples[index]
        sample = dataset.sample(example, 0, index)
        mask = masks[kind] if name in omini.MASKED_CONDITIONS else None
        conditions, pixel_mask = program.generated(path, mask)
        args.validation_image = [path]
        (validated,) = omini.validation_examples(args)
        rng = np.random.default_rng(args.seed)
        for i, (condition_type, condition) in enumerate(zip(types, conditions, strict=True)):
            role = f"condition_{i}"
            trained = sample["pixel_values"][role]
            if condition_type == "deblurring":  # blurred by another radius in each epoch
                trained = to_tensor(dataset.condition_image(example, role, np.random.default_rng(args.seed)))
            assert torch.equal(condition, trained), (kind, condition_type)
            if mask is None:
                shown = to_tensor(dataset.condition_image(validated, role, rng))
                assert torch.equal(shown, trained), (kind, condition_type)
        if mask:
            assert np.array_equal(pixel_mask, dataset.mask(example, None)), kind
        image = fit(file_example(path).image(), args.target_size)
        assert torch.equal(sample["pixel_values"]["image"], to_tensor(image)), kind
    record_property(
        f"kinds of images in train_omini.py, its validation and generate.py, {name}", len(images) * len(types)
    )


def test_omini_at_every_interpolation_and_size(tiny_model, depth_of_grey, tmp_path, record_property):
    program = Omini(tiny_model, tmp_path)
    (tmp_path / "images").mkdir()
    path = tmp_path / "images" / "a.png"
    scene(75, 50).save(path)
    types = ("canny", "coloring", "depth", "sr")
    count = 0
    for interpolation in INTERPOLATION:
        for target, conditions in (("32", "32"), ("64x48", "64x48"), ("96x32", "48x16"), ("16x80", "32x160")):
            flags = ("--condition_type", *types, "--target_size", target, "--condition_size", conditions)
            flags += ("--position_scale", 1, "--image_interpolation_mode", interpolation)
            dataset, args = program.trained(tmp_path / "images", *flags)
            omini.estimate_depth(Accelerator(cpu=True), dataset.examples, args)
            sample = dataset.sample(dataset.examples[0], 0, 0)
            for i, condition in enumerate(program.generated(path)[0]):
                where = (interpolation, target, types[i])
                assert torch.equal(condition, sample["pixel_values"][f"condition_{i}"]), where
                count += 1
    record_property("interpolation, size and type in train_omini.py and generate.py", count)


class TwinFlow:
    """What train_twinflow.py, its validation and its generator prepare of an image to edit."""

    def __init__(self, model, folder, monkeypatch):
        self.model = model
        self.folder = folder
        self.monkeypatch = monkeypatch

    def trained(self, *flags):
        words = ("--pretrained_model_name_or_path", self.model, "--model_type", "qwenimage-edit", "--center_crop")
        words += ("--training", "lora", "--output_dir", self.folder / "run", *flags)
        args = twinflow.parse_args(strings(*words))
        examples, problems = twinflow.find_examples(args)
        assert not problems
        (self.folder / "run").mkdir(exist_ok=True)
        (self.folder / "run" / "args.json").write_text(json.dumps({"args": vars(args)}, default=str))
        save_file({"a.lora_A.weight": torch.zeros(1)}, self.folder / "run" / "pytorch_lora_weights.safetensors")
        cache = TensorCache(self.folder / "cache", twinflow.encoder_settings(args, twinflow.model_record(args)))
        return twinflow.TwinFlowDataset(examples, cache, args), args

    def validated(self, path, args):
        """The image of --validation_image that the prompt's encoder is shown."""
        seen = []
        backbone = twinflow.QwenImageEdit(args)
        backbone.load_prompt_encoder = lambda *_: None

        def encode(encoder, prompt, image):
            seen.append(to_tensor(image))
            return {"a": torch.zeros(1)}

        backbone.encode_prompt = encode
        args.validation_image = path
        args.validation_prompt = "x"
        reference, problems = twinflow.find_validation_image(args)
        assert not problems
        cache = TensorCache(self.folder / "cache", twinflow.encoder_settings(args, twinflow.model_record(args)))
        dataset = twinflow.TwinFlowDataset([], cache, args)
        accelerator = Accelerator(cpu=True)
        twinflow.encode_prompts(
            accelerator,
            backbone,
            [dataset],
            cache,
            twinflow.validation_prompts(args)[0],
            reference,
            args,
            torch.float32,
        )
        return seen[0]

    def generated(self, path):
        seen = []

        def see(self, encoder, prompt, image):
            seen.append(to_tensor(image))
            raise InterruptedError

        with self.monkeypatch.context() as patch:
            patch.setattr(twinflow.QwenImageEdit, "load_prompt_encoder", lambda *_: SimpleNamespace(components={}))
            patch.setattr(twinflow.QwenImageEdit, "encode_prompt", see)
            patch.setattr(sys, "argv", strings("x", self.folder / "run", "--prompt", "x", "--image", path))
            with pytest.raises((InterruptedError, SystemExit)):
                twinflow_generate.main()
        return seen[0]


@pytest.fixture(scope="module")
def tiny_edit(tmp_path_factory):
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("edit")
    tiny_backbones.qwenimage(edit=True).save_pretrained(folder)
    return folder


def test_twinflow_edits_every_kind(tiny_edit, others, tmp_path, monkeypatch, record_property):
    images = write_kinds(tmp_path / "images", scene())
    for path in images.values():
        path.with_suffix(".txt").write_text("a caption")
    program = TwinFlow(tiny_edit, tmp_path, monkeypatch)
    folders = ("--train_data_dir", tmp_path / "images", "--reference_data_dir", others["RGB"].parent)
    dataset, args = program.trained(*folders, "--aspect_ratio_buckets", "32,48;48,32;32,32")
    for index, example in enumerate(dataset.examples):
        path = Path(example.images["reference"].name)
        trained = dataset.pixel_values(example.images["reference"], index, False)
        assert torch.equal(dataset.pixel_values(example, index, False), expected(Path(example.name), (32, 48)))
        assert torch.equal(trained, expected(path, (32, 48))), path
        assert torch.equal(program.validated(path, args), trained), path
        assert torch.equal(program.generated(path), trained), path
    record_property("kinds of images in train_twinflow.py, its validation and generate.py", len(dataset.examples))


@pytest.mark.slow
def test_twinflow_at_every_interpolation_size_and_shape(tiny_edit, tmp_path, monkeypatch, record_property):
    program = TwinFlow(tiny_edit, tmp_path, monkeypatch)
    count = 0
    for shape in ((48, 32), (75, 50), (31, 64)):
        folders = [tmp_path / f"{name}-{shape[0]}" for name in ("images", "references")]
        for folder, image in zip(folders, (scene(*shape), ImageOps.mirror(scene(*shape))), strict=True):
            folder.mkdir()
            image.save(folder / "a.png")
        (folders[0] / "a.txt").write_text("a caption")
        for interpolation in INTERPOLATION:
            for sizes in (("--resolution", 16), ("--resolution", 64), ("--aspect_ratio_buckets", "32,48;64,32")):
                flags = ("--train_data_dir", folders[0], "--reference_data_dir", folders[1], *sizes)
                dataset, args = program.trained(*flags, "--image_interpolation_mode", interpolation)
                trained = dataset.pixel_values(dataset.examples[0].images["reference"], 0, False)
                where = (shape, interpolation, sizes)
                assert torch.equal(program.validated(folders[1] / "a.png", args), trained), where
                assert torch.equal(program.generated(folders[1] / "a.png"), trained), where
                count += 1
    record_property("interpolation, size and shape in train_twinflow.py, its validation and generate.py", count)


# ---------------------------------------------------------------------------------------------------------------------
# Captions: every source in every trainer
# ---------------------------------------------------------------------------------------------------------------------


def write_captions(folder, *sources):
    """Writes "from SOURCE" for a.png to each of some sources."""
    rows = {"file_name": "a.png"}
    for source in sources:
        text = f"from {source}"
        if source in ("text", "prompt", "caption", "own"):
            rows[source] = text
        elif source == "metadata.csv":
            (folder / source).write_text(f"file_name,text\na.png,{text}\n")
        elif source == "BOM":
            (folder / "a.txt").write_text(text, "utf-8-sig")
        elif source == "folder":
            (folder.parent / "captions").mkdir()
            (folder.parent / "captions" / "a.txt").write_text(text)
        else:
            (folder / source).write_text(text)
    if len(rows) > 1:
        (folder / "metadata.jsonl").write_text(json.dumps(rows) + "\n")


# (what there is, the flags, the one that is taken, what the header says)
CAPTIONS = [
    (["a.txt"], [], "a.txt", ".txt"),
    (["a.TXT"], [], "a.TXT", ".txt"),
    (["a.png.txt"], [], "a.png.txt", ".txt"),
    (["a.caption"], [], "a.caption", ".caption"),
    (["a.png.caption"], [], "a.png.caption", ".caption"),
    (["BOM"], [], "BOM", ".txt"),
    (["a.caption", "a.txt"], [], "a.txt", ".txt"),
    (["text"], [], "text", "metadata.jsonl"),
    (["prompt"], [], "prompt", "metadata.jsonl"),
    (["caption"], [], "caption", "metadata.jsonl"),
    (["caption", "text"], [], "text", "metadata.jsonl"),
    (["metadata.csv"], [], "metadata.csv", "metadata.csv"),
    (["text", "metadata.csv"], [], "text", "metadata.jsonl"),
    (["text", "a.txt"], [], "text", "metadata.jsonl"),
    (["own", "a.txt"], [], "a.txt", ".txt"),
    (["own", "text"], ["--caption_column", "own"], "own", "metadata.jsonl"),
    (["own", "a.txt"], ["--caption_column", "own"], "own", "metadata.jsonl"),
    (["folder", "a.txt", "text"], ["--caption_data_dir", "captions"], "folder", ".txt"),
    ([], ["--instance_prompt", "from flag"], "flag", "--instance_prompt"),
    (["a.txt"], ["--instance_prompt", "from flag"], "a.txt", ".txt"),
    (["text"], ["--instance_prompt", "from flag"], "text", "metadata.jsonl"),
    (["a.json"], ["--instance_prompt", "from flag"], "flag", "--instance_prompt"),
    (["A.txt", "captions.txt"], ["--instance_prompt", "from flag"], "flag", "--instance_prompt"),
    ([], [], None, None),
    (["a.json"], [], None, None),
    (["own"], [], None, None),
]

DATA_FLAGS = {
    "train_dreambooth_flux_advanced": ["--instance_data_dir", "images", "--resolution", 32],
    "train_omini": ["--instance_data_dir", "images", "--target_size", 32, "--condition_type", "canny"],
    "train_influxedit": [
        *("--instance_data_dir", "images", "--target_data_dir", "targets", "--mode", "edit", "--resolution", 32),
        *("--seed", 0),
    ],
    "train_twinflow": ["--train_data_dir", "images", "--model_type", "flux", "--training", "lora", "--resolution", 32],
}


def read_run(script, model, *flags, cache):
    """(examples, problems, what the header says) of a trainer's flags."""
    trainer = importlib.import_module(script)
    args = trainer.parse_args(strings("--pretrained_model_name_or_path", model, "--max_sequence_length", 8, *flags))
    examples, problems = trainer.find_examples(args)
    if problems:
        return examples, problems, {}
    if script == "train_twinflow":
        cache = TensorCache(cache, twinflow.encoder_settings(args, twinflow.model_record(args)))
        dataset, held_out = (twinflow.TwinFlowDataset(which, cache, args) for which in (examples, []))
        return examples, [], trainer.describe_run(args, dataset, held_out)
    if script == "train_omini":
        dataset, held_out = (omini.OminiDataset(which, omini.condition_specs(args), args) for which in (examples, []))
        return examples, [], trainer.describe_run(args, dataset, held_out)
    if script == "train_influxedit":
        return examples, [], trainer.describe_run(args, examples, [], [], [])
    return examples, [], trainer.describe_run(args, examples, [], [], SimpleNamespace(abstractions={}), [], 0)


@pytest.mark.parametrize("script", DATA_FLAGS)
def test_every_source_of_captions(script, tiny_model, tiny_fill, tmp_path, monkeypatch, capsys, record_property):
    """Which one is taken, that the header says so, and that it names the files that were not."""
    model = tiny_fill if script == "train_influxedit" else tiny_model
    taken = Counter()
    for i, (sources, flags, expected_source, label) in enumerate(CAPTIONS):
        place = tmp_path / str(i)
        for name in ("images", "targets"):
            (place / name).mkdir(parents=True)
            (scene() if name == "images" else ImageOps.mirror(scene())).save(place / name / "a.png")
        write_captions(place / "images", *sources)
        monkeypatch.chdir(place)
        case = (sources, flags)
        parser = parser_of(script)
        known = {flag for action in parser._actions for flag in action.option_strings}
        if not known.issuperset(flag for flag in flags if flag.startswith("--")):
            with pytest.raises(SystemExit):
                read_run(script, model, *DATA_FLAGS[script], *flags, cache=tmp_path / "cache")
            assert flags[0] in capsys.readouterr().err
            taken["refused"] += 1
            continue
        examples, problems, header = read_run(script, model, *DATA_FLAGS[script], *flags, cache=tmp_path / "cache")
        is_another = script == "train_twinflow" and expected_source == "flag"  # there it is of --instance_data_dir
        if expected_source is None or is_another:
            assert "a.png" in problems[0], case
            assert ".txt" in problems[0], case
            taken["refused"] += 1
            continue
        assert not problems, case
        assert examples[0].captions == [f"from {expected_source}"], case
        assert header["captions"] == f"1 from {label}", case
        for source in sources:
            file = Path("images") / source
            if file.exists() and source not in (expected_source, "metadata.csv"):
                assert source in header["not read"], case
        taken["taken"] += 1
    assert sum(taken.values()) == len(CAPTIONS)
    record_property(f"sources of captions in {script}.py", f"{taken['taken']} taken, {taken['refused']} refused")


# ---------------------------------------------------------------------------------------------------------------------
# Paths: every spelling in every flag
# ---------------------------------------------------------------------------------------------------------------------


# {what is unlike in it: the name of a folder}
NAMES = {
    "plain": "plain",
    "spaces": "my photos (2)",
    "composed": unicodedata.normalize("NFC", "Übung é"),
    "decomposed": unicodedata.normalize("NFD", "Übung é"),
    "other scripts": "写真 собака 🐕",
    "percent": "100%20",
    "hash": "#1 a#b",
    "brackets": "[a]{b}",
    "glob": "a*b?",
    "quotes": 'it\'s "mine"',
    "dollar": "$HOME",
    "tilde inside": "a~b",
    "comma": "a,b",
    "colon": "a:b",
    "at": "a@b",
    "plus": "a+b=c&d",
    "everything": 'a b (2) 100% #1 [a]{b} *? "it\'s" $x ~ ,:@+=& ü写🐕',
}

# flags that go together, by trainer; of every flag of a path the file or folder in `place` that it is given
PATHS = {
    "train_dreambooth_flux_advanced": [
        {"pretrained_model_name_or_path": "model", "instance_data_dir": "images", "lora_path": "lora.safetensors"},
        {
            "pretrained_model_name_or_path": "model",
            "instance_data_dir": "images",
            "class_data_dir": "classes",
            "validation_data_dir": "images",
            "validation_prompts": "prompts.txt",
            "output_dir": "out",
            "logging_dir": "logs",
            "cache_dir": "cache",
            "disk_cache_dir": "cache",
        },
        {"pretrained_model_name_or_path": "model", "instance_data_dir": "images", "mask_data_dir": "masks"},
        {"pretrained_model_name_or_path": "model", "dataset_name": "dataset", "output_dir": "out"},
        {"pretrained_model_name_or_path": "model", "data_files": "images.tar"},
        {"pretrained_model_name_or_path": "model", "dataset_config": "data.toml", "output_dir": "out"},
        {
            "pretrained_model_name_or_path": "model.safetensors",
            "instance_data_dir": "images",
            "ae": "lora.safetensors",
            "clip_l": "lora.safetensors",
            "t5xxl": "lora.safetensors",
            "tokenizer_dir": "images",
            "output_dir": "out",
        },
        {"pretrained_model_name_or_path": "model", "instance_data_dir": "images", "resume_from_checkpoint": "images"},
    ],
    "train_influxedit": [
        {
            "pretrained_model_name_or_path": "fill",
            "instance_data_dir": "images",
            "validation_data_dir": "images",
            "lora_path": "lora.safetensors",
        },
        {
            "pretrained_model_name_or_path": "fill",
            "instance_data_dir": "images",
            "mask_data_dir": "masks",
            "caption_data_dir": "captions",
            "class_data_dir": "classes",
            "validation_image": "images/a.png",
            "validation_mask": "masks/a.png",
            "output_dir": "out",
            "logging_dir": "logs",
            "cache_dir": "cache",
            "disk_cache_dir": "cache",
        },
        {"pretrained_model_name_or_path": "fill", "instance_data_dir": "images", "target_data_dir": "targets"},
        {
            "pretrained_model_name_or_path": "klein",
            "instance_data_dir": "images",
            "target_data_dir": "targets",
            "additional_data_dir": "classes",
        },
        {"pretrained_model_name_or_path": "fill", "dataset_name": "dataset"},
        {"pretrained_model_name_or_path": "fill", "data_files": "images.tar"},
        {
            "pretrained_model_name_or_path": "fill",
            "instance_data_dir": "images",
            "mask_data_dir": "masks",
            "validation_prompts": "fills.txt",
        },
        {"pretrained_model_name_or_path": "fill", "instance_data_dir": "images", "resume_from_checkpoint": "images"},
    ],
    "train_omini": [
        {"pretrained_model_name_or_path": "model", "instance_data_dir": "images", "lora_path": "lora.safetensors"},
        {
            "pretrained_model_name_or_path": "model",
            "instance_data_dir": "images",
            "validation_image": "images/a.png",
            "validation_data_dir": "images",
            "output_dir": "out",
            "logging_dir": "logs",
            "cache_dir": "cache",
            "disk_cache_dir": "cache",
            "depth_model": "model",
        },
        {"pretrained_model_name_or_path": "model", "dataset_name": "dataset"},
        {"pretrained_model_name_or_path": "model", "data_files": "images.tar"},
        {"pretrained_model_name_or_path": "model", "instance_data_dir": "images", "validation_prompts": "lines.txt"},
        {"pretrained_model_name_or_path": "model", "dataset_class": "dataset.py:Pictures"},
        {"pretrained_model_name_or_path": "model", "instance_data_dir": "images", "resume_from_checkpoint": "images"},
    ],
    "train_twinflow": [
        {"pretrained_model_name_or_path": "model", "train_data_dir": "images", "lora_path": "lora.safetensors"},
        {
            "pretrained_model_name_or_path": "model",
            "train_data_dir": "images",
            "validation_data_dir": "images",
            "validation_prompts": "prompts.txt",
            "output_dir": "out",
            "logging_dir": "logs",
            "cache_dir": "cache",
            "disk_cache_dir": "cache",
        },
        {"pretrained_model_name_or_path": "model", "train_data_dir": "dataset"},
        {"pretrained_model_name_or_path": "model", "dataset_name": "dataset"},
        {"pretrained_model_name_or_path": "model", "data_files": "images.tar"},
        {"pretrained_model_name_or_path": "model", "train_data_dir": "dataset", "instance_data_dir": "images"},
        {"pretrained_model_name_or_path": "model", "prompts_file": "prompts.txt"},
        {"pretrained_model_name_or_path": "model", "prompts_file": "dataset"},
        {
            "pretrained_model_name_or_path": "edit",
            "train_data_dir": "images",
            "reference_data_dir": "targets",
            "validation_image": "images/a.png",
        },
        {
            "pretrained_model_name_or_path": "model",
            "train_data_dir": "images",
            "openuni_checkpoint": "lora.safetensors",
            "openuni_llm": "model",
        },
        {"pretrained_model_name_or_path": "model", "train_data_dir": "images", "resume_from_checkpoint": "images"},
    ],
}


REFUSED = ("lora_path", "ae", "resume_from_checkpoint", "openuni_llm")  # for what is in `place`: their messages count


def is_path(action):
    """Whether a flag of a parser takes a path, by its type, or by its name if it has none."""
    if action.type in (Path, expanded_path, name_or_path):
        return True
    is_text = action.type is None and action.nargs != "?"
    return is_text and action.dest.endswith(("_dir", "_file", "_image", "_mask", "_path", "_checkpoint"))


@pytest.fixture(scope="module")
def place(tiny_model, tiny_fill, tiny_edit, tmp_path_factory):
    """A folder of one thing for every flag, by the names of PATHS, which is reached through each of NAMES."""
    root = tmp_path_factory.mktemp("places") / "plain"
    for name in ("images", "targets", "masks", "classes", "captions", "dataset"):
        (root / name).mkdir(parents=True)
    for name, image in {"images": scene(), "targets": ImageOps.mirror(scene()), "masks": hole()}.items():
        image.save(root / name / "a.png")
    scene().save(root / "classes" / "a.png")
    for name in ("images", "captions"):
        (root / name / "a.txt").write_text("a caption")
    (root / "prompts.txt").write_text("a caption")
    line = f"a caption --cn {root / 'images' / 'a.png'}"
    (root / "lines.txt").write_text(line)
    (root / "fills.txt").write_text(f"{line} --mask {root / 'masks' / 'a.png'}")
    encoded = (root / "images" / "a.png").read_bytes()
    rows = {"image": [{"bytes": encoded, "path": None}], "text": ["a caption"]}
    features = datasets.Features({"image": datasets.Image(decode=False), "text": datasets.Value("string")})
    datasets.Dataset.from_dict(rows, features=features).to_parquet(root / "dataset" / "a.parquet")
    with tarfile.open(root / "images.tar", "w") as tar:
        tar.add(root / "images" / "a.png", "0.png")
        (root / "0.json").write_text('{"prompt": "a caption"}')
        tar.add(root / "0.json", "0.json")
    (root / "dataset.py").write_text(
        "from PIL import Image\n"
        "class Pictures:\n"
        "    __len__ = lambda self: 1\n"
        "    def __getitem__(self, i):\n"
        "        if i: raise IndexError\n"
        "        image = Image.new('RGB', (48, 32))\n"
        "        return {'image': image, 'description': 'a caption', 'condition_0': image}\n"
    )
    (root / "data.toml").write_text("[[datasets]]\nresolution = 32\n[[datasets.subsets]]\nimage_dir = 'images'\n")
    (root / "images" / "a.caption").write_text("a caption")
    save_file({"x.lora_A.weight": torch.zeros(1, 1)}, root / "lora.safetensors")
    save_file({"x": torch.zeros(1)}, root / "model.safetensors")
    for name, model in {"model": tiny_model, "fill": tiny_fill, "edit": tiny_edit}.items():
        (root / name).symlink_to(model)
    tiny_backbones.flux2_klein().save_pretrained(root / "klein")
    for name in NAMES.values():
        if name != "plain":
            (root.parent / name).symlink_to(root)
    return root


def outcome(script, flags, capsys, *, place, root):
    """What a command reads, (captions and pixels by example), or its message, with paths as `place` spells them."""
    trainer = importlib.import_module(script)
    words = {
        "train_dreambooth_flux_advanced": ["--resolution", 32, "--instance_prompt", "x"],
        "train_omini": ["--target_size", 32, "--condition_type", "canny"],
        "train_influxedit": ["--resolution", 32, "--seed", 0, "--instance_prompt", "x"],
        "train_twinflow": ["--resolution", 32],
    }[script]
    words += ["--max_sequence_length", 8, "--rank", 2]
    if script == "train_influxedit":
        words += ["--mode", "edit"] if "target_data_dir" in flags else []
        words += ["--use_split_mask"] if not flags.keys() & {"target_data_dir", "mask_data_dir"} else []
    if "class_data_dir" in flags:
        words += ["--with_prior_preservation", "--class_prompt", "x", "--num_class_images", 1]
    if "dataset_name" in flags and script != "train_twinflow":
        words += ["--caption_column", "text"]
    if script == "train_twinflow":
        kind = "qwenimage-edit" if flags["pretrained_model_name_or_path"].rstrip("/").endswith("edit") else "flux"
        kind = "openuni" if "openuni_llm" in flags else kind
        words += [
            "--model_type",
            kind,
            *(["--recipe", "image-free"] if "prompts_file" in flags else ["--training", "lora"]),
        ]
    if "dataset_class" in flags:
        words += ["--condition_type", "custom"]
    if "validation_image" in flags:
        words += ["--validation_prompt", "x"]
    for flag, value in flags.items():
        words += [f"--{flag}", value]
    capsys.readouterr()
    try:
        args = trainer.parse_args(strings(*words))
    except SystemExit:
        problems = [capsys.readouterr().err.split("error: ")[-1]]
        examples = []
    else:
        examples, problems = trainer.find_examples(args)
        if script == "train_twinflow":
            instances, more = trainer.find_instances(args)
            examples, problems = examples + instances, problems + more
    read = []
    for example in examples:
        pixels = np.asarray(example.image()).tobytes() if example.read else b""
        others = [np.asarray(other.image()).tobytes() for other in example.images.values()]
        read.append((example.captions, pixels, others))
    text = "\n".join(problems)
    for spelling in (root, str(Path(root).expanduser())):
        text = re.sub(rf"(?<![\w/]){re.escape(spelling)}(?=/)", str(place), text)
    return read, text.replace("/:", ":").replace("/ ", " ").replace("/)", ")")


@pytest.mark.parametrize("kinds", [["everything", "decomposed"], pytest.param([*NAMES], marks=pytest.mark.slow)])
@pytest.mark.parametrize("script", PATHS)
def test_every_spelling_of_a_path_in_every_flag(script, kinds, place, monkeypatch, capsys, record_property):
    """A command reads, or says, what it does with the same things in a folder of a plain name."""
    covered = {flag for flags in PATHS[script] for flag in flags}
    assert covered == {action.dest for action in parser_of(script)._actions if is_path(action)}
    monkeypatch.chdir(place.parent)
    monkeypatch.setenv("HOME", str(place.parent))
    roots = {kind: str(place.parent / NAMES[kind]) for kind in kinds}
    roots |= {
        "relative": "plain",
        "dotted": "./plain/../plain",
        "home": "~/plain",
        "home in a link": "~/my photos (2)",
    }
    count = 0
    for flags in PATHS[script]:
        usual = {flag: f"{place}/{name}" for flag, name in flags.items()}
        expected = outcome(script, usual, capsys, place=place, root=str(place))
        is_refused = not flags.keys().isdisjoint(REFUSED)
        assert bool(expected[1]) == is_refused, expected[1]
        assert bool(expected[0]) != is_refused
        for kind, root in {**roots, "slash": str(place)}.items():
            spelled = {}
            for flag, name in flags.items():
                end = "/" if kind == "slash" and (place / name).is_dir() else ""
                spelled[flag] = f"{root}/{name}{end}"
            assert outcome(script, spelled, capsys, place=place, root=root) == expected, (kind, flags)
            count += len(flags)
    assert not [path.name for path in place.parent.iterdir() if path.name not in NAMES.values()]  # such as "~"
    record_property(f"spellings of paths by flags of {script}.py", count)


@pytest.mark.parametrize("script", PATHS)
def test_files_of_flags_take_every_spelling(script, place, tmp_path, monkeypatch, record_property):
    """In an @file, whose own path may be spelled so too."""
    monkeypatch.setenv("HOME", str(tmp_path))
    parser = parser_of(script)
    paths = [action for action in parser._actions if is_path(action)]
    count = 0
    for kind, name in NAMES.items():
        (tmp_path / name).mkdir()
        value = f"{place.parent}/{name}/x"
        lines = [f"{action.option_strings[0]} {shlex.quote(value)}  # {kind}" for action in paths]
        (tmp_path / name / "a.args").write_text("\n".join(lines) + "\n", "utf-8-sig")
        for file in (tmp_path / name / "a.args", f"~/{name}/a.args"):
            with monkeypatch.context() as patch:
                patch.setattr(parser, "error", pytest.fail)
                args = Parser.parse_args(parser, [f"@{file}", *required_of(parser)])
            for action in paths:
                found = getattr(args, action.dest)
                assert str(found[0] if isinstance(found, list) else found) == value, (kind, action.dest)
                count += 1
    for line, words in {
        "--output_dir runs/#1": ["--output_dir", "runs/#1"],
        "--output_dir a#b # a comment": ["--output_dir", "a#b"],
        "# --output_dir a": [],
        "--instance_prompt 'a # b' # it's a comment": ["--instance_prompt", "a # b"],
        '--instance_prompt "a \'# b"': ["--instance_prompt", "a '# b"],
    }.items():
        assert parser.convert_arg_line_to_args(line) == words
    record_property(f"spellings of paths in @files by flags of {script}.py", count)


def required_of(parser):
    """Words for the required flags of a parser that are no paths."""
    words = []
    for action in parser._actions:
        if action.required and not is_path(action):
            words += [action.option_strings[0], (action.choices or ["1"])[0]]
    return strings(*words)


def test_a_dataset_config_takes_every_spelling(place, capsys, monkeypatch, record_property):
    """As image_dir, from the root, from its own folder and from the home folder."""
    monkeypatch.setenv("HOME", str(place.parent))
    usual = {"pretrained_model_name_or_path": f"{place}/model", "dataset_config": f"{place}/data.toml"}
    expected = outcome("train_dreambooth_flux_advanced", usual, capsys, place=place, root=str(place))
    assert expected[0]
    count = 0
    for kind, name in NAMES.items():
        for folder in (f"{place.parent}/{name}/images", f"~/{name}/images", f"../{name}/images/"):
            config = place / "other.toml"
            lines = ["[[datasets]]", "resolution = 32", "[[datasets.subsets]]"]
            lines.append(f"image_dir = {json.dumps(folder, ensure_ascii=False)}")
            config.write_text("\n".join(lines), "utf-8-sig")
            flags = usual | {"dataset_config": str(config)}
            found = outcome("train_dreambooth_flux_advanced", flags, capsys, place=place, root=str(place))
            assert found == expected, (kind, folder)
            count += 1
    record_property("spellings of paths in a dataset config", count)


PROGRAMS = sorted(
    str(path.relative_to(ROOT)) for path in (ROOT / "examples").rglob("*.py") if "Parser(" in path.read_text()
)


@pytest.mark.parametrize("program", PROGRAMS)
def test_a_tilde_is_the_home_folder_in_every_example(program, run_program, monkeypatch, tmp_path, record_property):
    monkeypatch.setenv("HOME", str(tmp_path))
    parsers = []

    def stop(parser, *_):
        parsers.append(parser)
        raise InterruptedError

    with monkeypatch.context() as patch:
        patch.setattr(argparse.ArgumentParser, "parse_args", stop)
        patch.setattr(Parser, "parse_args", stop)
        with pytest.raises(InterruptedError):
            run_program(program)
    paths = [action for action in parsers[0]._actions if is_path(action)]
    for action in paths:
        assert str(parsers[0]._get_value(action, "~/a")) == f"{tmp_path}/a", f"{program} --{action.dest}"
    record_property(f"flags of paths in {program}", len(paths))


# ---------------------------------------------------------------------------------------------------------------------
# Headers: what a LoRA file says, in every loader
# ---------------------------------------------------------------------------------------------------------------------

FORMS = ("diffusers", "comfyui", "kohya", "header of peft", "alpha tensors", "bare")
# rank, alpha, type of the file, and how near a product of two such numbers is
STRENGTHS = [(2, 4.0, torch.float32, 1e-5), (3, 1.5, torch.bfloat16, 2**-6)]
OTHER_STRENGTHS = [
    *((2, 2.0, torch.float32, 1e-5), (2, 1.0, torch.float32, 1e-5), (2, 4.0, torch.float16, 2**-9)),
    *((2, 2.0, torch.bfloat16, 2**-6), (2, 1.0, torch.float16, 2**-9), (3, 3.0, torch.float16, 2**-9)),
]


def random_layers(transformer, rank, alpha):
    generator = torch.Generator().manual_seed(0)
    layers = {}
    for name in block_layers(transformer):
        out_features, in_features = transformer.get_submodule(name).weight.shape
        down = torch.randn(rank, in_features, generator=generator)
        layers[f"transformer.{name}"] = LoraLayer(down, torch.randn(out_features, rank, generator=generator), alpha)
    return layers


def write_form(path, layers, form, dtype):
    """Writes layers as one of FORMS; of bare files the strength is 1."""
    if form in LORA_FORMS:
        write_lora(path, layers, form, dtype=dtype)
        return
    tensors = {}
    for name, layer in layers.items():
        tensors[f"{name}.lora_A.weight"] = layer.down.to(dtype)
        tensors[f"{name}.lora_B.weight"] = layer.up.to(dtype)
        if form == "alpha tensors":
            tensors[f"{name}.alpha"] = torch.tensor(layer.alpha)
    (rank,) = {layer.rank for layer in layers.values()}
    (alpha,) = {layer.alpha for layer in layers.values()}
    names = sorted({name.removeprefix("transformer.") for name in layers})
    settings = {"r": rank, "lora_alpha": alpha, "target_modules": names}
    settings = {f"transformer.{name}": value for name, value in settings.items()}
    save_file(tensors, path, {"lora_adapter_metadata": json.dumps(settings)} if form == "header of peft" else None)


@pytest.fixture(scope="module")
def flux_pipeline(tiny_model):
    return FluxPipeline.from_pretrained(tiny_model)


@pytest.fixture(scope="module")
def omini_pipeline(tiny_model):
    transformer = omini.OminiTransformer2DModel.from_pretrained(tiny_model, subfolder="transformer")
    return omini.OminiPipeline.from_pretrained(tiny_model, transformer=transformer)


def unload(transformer):
    if getattr(transformer, "peft_config", None):
        transformer.unload_lora()


def read_by_dreambooth(file, request, monkeypatch):
    pipeline = request.getfixturevalue("flux_pipeline")
    pipeline.unload_lora_weights()
    monkeypatch.setattr(dreambooth_generate, "load_base", lambda *_: pipeline)
    return dreambooth_generate.load_pipeline(file, "model")[0].transformer


def read_by_influxedit(file, request, monkeypatch):
    pipeline = request.getfixturevalue("fill_pipeline")
    pipeline.unload_lora_weights()
    monkeypatch.setattr(influxedit_generate, "load_whole_pipeline", lambda *_: pipeline)
    return influxedit_generate.load_pipeline(file, "model", edit_mode=True)[0].transformer


def read_by_omini(file, request, monkeypatch):
    pipeline = request.getfixturevalue("omini_pipeline")
    pipeline.unload_lora_weights()
    omini_generate.load_adapter(pipeline, file, "style")
    return pipeline.transformer


def read_by_twinflow(file, request, monkeypatch):
    transformer = request.getfixturevalue("flux_pipeline").transformer
    unload(transformer)
    backbone = SimpleNamespace(load_transformer=lambda dtype: transformer)
    args = SimpleNamespace(training="lora", model_type="flux")
    return twinflow_generate.load_transformer(file, backbone, args, torch.float32)[0]


def read_by_lora_path(file, request, monkeypatch):
    """As all four trainers start from it."""
    transformer = request.getfixturevalue("flux_pipeline").transformer
    unload(transformer)
    with safe_open(file, "pt") as opened:
        ranks = {min(opened.get_slice(key).get_shape()) for key in opened.keys() if ".weight" in key}  # noqa: SIM118
    rank = 3 if 3 in ranks else 2
    shapes = layer_shapes("transformer", transformer, block_layers(transformer))
    assert check_lora_file(file, shapes, rank) == []
    add_lora(transformer, rank=rank, alpha=1, dropout=0.0, target_modules=block_layers(transformer))
    start_from_lora(file, {"transformer": transformer})
    return transformer


def read_by_convert_lora(file, request, monkeypatch):
    """Into every form and back."""
    for form in LORA_FORMS:
        other = file.with_name(f"{file.stem}-{form}.safetensors")
        convert_lora.main(strings(file, other, "--to", form))
        file = other
    return {name: layer.scale * layer.up.float() @ layer.down.float() for name, layer in read_lora(file)[0].items()}


LOADERS = {
    "dreambooth/generate.py": read_by_dreambooth,
    "influxedit/generate.py": read_by_influxedit,
    "omini/generate.py": read_by_omini,
    "twinflow/generate.py": read_by_twinflow,
    "--lora_path": read_by_lora_path,
    "convert_lora.py": read_by_convert_lora,
}


def weights_of_adapters(transformer):
    """{layer: what its adapter adds to its weight}."""
    weights = {}
    for name, module in transformer.named_modules():
        if hasattr(module, "lora_A"):
            weights[f"transformer.{name}"] = module.get_delta_weight(module.active_adapters[0])
    return weights


@pytest.mark.parametrize("strengths", [STRENGTHS, pytest.param(OTHER_STRENGTHS, marks=pytest.mark.slow)])
@pytest.mark.parametrize("loader", LOADERS)
def test_every_form_has_its_strength_in_every_loader(
    loader, strengths, request, flux_pipeline, tmp_path, record_property
):
    count = 0
    converts_by_diffusers = loader in ("dreambooth/generate.py", "influxedit/generate.py", "omini/generate.py")
    for rank, alpha, dtype, nearness in strengths:
        unload(flux_pipeline.transformer)
        layers = random_layers(flux_pipeline.transformer, rank, alpha)
        for form in FORMS:
            if form == "kohya" and converts_by_diffusers:  # which splits layers at FLUX.1's own width only
                continue
            file = tmp_path / f"{count}.safetensors"
            write_form(file, layers, form, dtype)
            with pytest.MonkeyPatch.context() as patch:
                found = LOADERS[loader](file, request, patch)
            if not isinstance(found, dict):
                found = weights_of_adapters(found)
            assert found.keys() == layers.keys(), (form, rank, alpha)
            scale = 1 if form == "bare" else alpha / rank
            for name, layer in layers.items():
                expected_delta = scale * layer.up @ layer.down
                error = (found[name] - expected_delta).norm() / expected_delta.norm()
                assert error < nearness, (name, form, rank, alpha, dtype)
            count += 1
    record_property(f"form, rank, alpha and type of LoRA files in {loader}", count)


def test_every_word_of_a_header_survives_every_conversion(flux_pipeline, tmp_path, record_property):
    unload(flux_pipeline.transformer)
    layers = random_layers(flux_pipeline.transformer, 2, 4.0)
    words = {f"modelspec.{name}": f"{name} of mine" for name in METADATA}
    words |= {"modelspec.trigger_phrase": "sks dog", "modelspec.architecture": "flux-1-dev/lora", "ss_steps": "5"}
    words |= {"ss_base_model_version": "flux1", "omini": '{"target_size": [32, 32]}'}
    count = 0
    for source in LORA_FORMS:
        write_lora(tmp_path / f"{source}.safetensors", layers, source, header=words)
        for target in LORA_FORMS:
            converted = tmp_path / f"{source}-{target}.safetensors"
            convert_lora.main(strings(tmp_path / f"{source}.safetensors", converted, "--to", target))
            with safe_open(converted, "pt") as file:
                header = file.metadata()
            assert words.items() <= header.items(), (source, target)
            assert (header["ss_network_dim"], header["ss_network_alpha"]) == ("2", "4"), (source, target)
            count += len(words)
    record_property("words of headers that convert_lora.py keeps", count)
