"""examples/influxedit/generate.py: it reads what training reads, keeps what it is told to, and refuses the rest."""

import json
from pathlib import Path

from common.data import Size
from common.latents import to_tensor
from common.lora import add_lora, save_lora

import numpy as np
import pytest
import torch
from diffusers import FluxTransformer2DModel
from PIL import Image
from safetensors.torch import save_file
from test_influxedit_input import dataset_of

import train_influxedit as influxedit
from examples.influxedit import generate


LORA = "pytorch_lora_weights.safetensors"


@pytest.fixture(scope="session")
def lora(tiny_fill, tmp_path_factory):
    """A LoRA file without a run."""
    transformer = FluxTransformer2DModel.from_pretrained(tiny_fill, subfolder="transformer")
    add_lora(transformer, rank=1, alpha=1, dropout=0.0, target_modules=["attn.to_q"])
    folder = tmp_path_factory.mktemp("lora")
    save_lora(folder, {"transformer": transformer})
    return folder / LORA


def make_run(folder, lora, **flags):
    """A run's folder that holds a LoRA and the flags it was trained with."""
    folder.mkdir()
    (folder / LORA).write_bytes(lora.read_bytes())
    (folder / "args.json").write_text(json.dumps({"args": generate.WITHOUT_RUN | flags}, default=str))
    return folder


@pytest.fixture(scope="session")
def pipeline(tiny_fill, lora):
    return generate.load_pipeline(lora, tiny_fill)[0]


# ---------------------------------------------------------------------------------------------------------------------
# What the model sees
# ---------------------------------------------------------------------------------------------------------------------


def picture(width=48, height=32):
    pixels = np.random.default_rng(0).integers(0, 256, (height // 4, width // 4, 3), dtype=np.uint8)
    return Image.fromarray(pixels).resize((width, height), Image.Resampling.BICUBIC)


def hole(width=48, height=32):
    mask = Image.new("L", (width, height))
    mask.paste(255, (5, 6, 30, 20))
    return mask


def with_transparency(image):
    image = image.convert("RGBA")
    alpha = np.full((image.height, image.width), 255, np.uint8)
    alpha[10:16, 20:44] = 0
    image.putalpha(Image.fromarray(alpha))
    return image


def in_16_bits(image):
    return Image.fromarray(np.asarray(image.convert("L")).astype(np.uint16) * 257)


def turned(image):
    """The image as a camera on its side stores it, with the turn in its EXIF."""
    image = image.transpose(Image.Transpose.ROTATE_90)
    image.getexif()[0x0112] = 6
    return image


MODES_OF_IMAGES = {
    "RGB": lambda image: image,
    "transparent": with_transparency,
    "palette": lambda image: image.convert("P"),
    "1 bit": lambda image: image.convert("1"),
    "16 bits": in_16_bits,
    "grey": lambda image: image.convert("L"),
    "turned": turned,
}
SIZES = {"RGB": (48, 32), "another size": (75, 50), "another shape": (50, 40)}


def save(image, path):
    image.save(path, exif=image.getexif())
    return path


@pytest.mark.parametrize("kind", [*MODES_OF_IMAGES, *list(SIZES)[1:]])
def test_training_validation_and_generation_see_the_same(tiny_fill, lora, pipeline, tmp_path, monkeypatch, kind):
    change = MODES_OF_IMAGES.get(kind, MODES_OF_IMAGES["RGB"])
    size = SIZES.get(kind, (48, 32))
    files = {}
    for name, image in (("images", picture(*size)), ("masks", hole(*size))):
        (tmp_path / name).mkdir()
        files[name] = save(change(image), tmp_path / name / "0.png")
    flags = ("--instance_data_dir", tmp_path / "images", "--mask_data_dir", tmp_path / "masks")
    flags += ("--instance_prompt", "x", "--resolution", 48, "--center_crop", "--validation_prompt", "x")
    flags += ("--validation_image", files["images"], "--validation_mask", files["masks"])
    drawn_size = influxedit.size_at(48, Size(*size[::-1]))
    flags += ("--validation_width", drawn_size.width, "--validation_height", drawn_size.height)
    dataset, args = dataset_of(tiny_fill, *flags)
    ((sample,),) = dataset.__getitems__([(0, 0)])
    shown, mask = sample["pixel_values"][1], sample["mask"]
    assert 0.05 < mask.mean() < 0.9

    (case,) = influxedit.validation_cases(args, dataset.examples)
    assert torch.equal(to_tensor(case.image) * (1 - to_tensor(case.mask.convert("RGB"))[:1].gt(0).float()), shown)

    seen = []

    def see(mask, masked_image, *rest):
        seen.extend((mask, masked_image))
        raise InterruptedError

    run = make_run(tmp_path / "run", lora, mode="mask", use_split_mask=False, resolution=[48])
    monkeypatch.setattr(pipeline, "prepare_mask_latents", see, raising=False)
    monkeypatch.setattr(
        generate, "load_pipeline", lambda *_: (pipeline, json.loads((run / "args.json").read_text())["args"])
    )
    words = [run, "--image", files["images"], "--mask", files["masks"], "--prompt", "x", "--output", tmp_path]
    words += ["--pretrained_model_name_or_path", tiny_fill, "--max_sequence_length", 8]
    with pytest.raises(InterruptedError):
        generate.main([str(word) for word in words])
    assert torch.equal(seen[0][0], mask)
    assert torch.allclose(seen[1][0], shown, atol=1e-6)


def test_the_card_and_the_generator_draw_the_trained_long_edge_in_the_images_shape(tiny_fill, lora, pairs, tmp_path):
    flags = ("--mode", "edit", "--instance_data_dir", pairs / "images", "--target_data_dir", pairs / "targets")
    flags += ("--instance_prompt", "x", "--resolution", "64,128", "--output_dir", tmp_path)
    _, args = dataset_of(tiny_fill, *flags)
    influxedit.save_model_card(args, torch.float32, "x")
    lines = (tmp_path / "README.md").read_text().splitlines()
    size_lines = [line for line in lines if line.startswith(("scale =", "width, height ="))]
    for shape, expected in (((300, 200), (80, 128)), ((32, 32), (128, 128)), ((10, 500), (128, 16))):
        names = {"input_image": Image.new("RGB", shape)}
        exec("\n".join(size_lines), names)
        assert (names["height"], names["width"]) == expected
    run = make_run(tmp_path / "run", lora, mode="edit", resolution=[64, 128], pretrained_model_name_or_path=tiny_fill)
    image = save(picture(300, 200), tmp_path / "image.png")
    assert generate.parse_args([str(run), "--prompt", "x", "--image", str(image)]).sizes == [Size(80, 128)]


@pytest.mark.parametrize("mode", ["edit", "mask"])
def test_the_card_on_the_hub_loads_the_file_from_there(tiny_fill, pairs, tmp_path, mode):
    data = {"edit": ("--target_data_dir", pairs / "targets"), "mask": ("--mask_data_dir", pairs / "masks")}[mode]
    flags = ("--mode", mode, "--instance_data_dir", pairs / "images", *data, "--instance_prompt", "x")
    _, args = dataset_of(tiny_fill, *flags, "--output_dir", tmp_path)
    influxedit.save_model_card(args, torch.float32, "x", "me/my-lora")
    card = (tmp_path / "README.md").read_text()
    assert "load_lora_weights('me/my-lora', weight_name=" in card
    assert str(tmp_path) not in card.split("```python")[1].split("```")[0]


def test_kept_pixels_are_the_images_own(tiny_fill, lora, pipeline, tmp_path, monkeypatch):
    monkeypatch.setattr(generate, "load_pipeline", lambda *_: (pipeline, generate.WITHOUT_RUN))
    run = make_run(tmp_path / "run", lora, mode="mask", resolution=[32], pretrained_model_name_or_path=tiny_fill)
    image = save(picture(75, 50), tmp_path / "image.png")
    mask = save(hole(75, 50), tmp_path / "mask.png")
    words = [run, "--prompt", "x", "--image", image, "--mask", mask, "--keep_unmasked", "--output", tmp_path]
    words += ["--num_inference_steps", 1, "--max_sequence_length", 8]
    generate.main([str(word) for word in words])
    result, original = np.asarray(Image.open(tmp_path / "image-edited.png")), np.asarray(Image.open(image))
    is_drawn = np.asarray(Image.open(mask)) > 0
    assert result.shape == original.shape
    assert np.array_equal(result[~is_drawn], original[~is_drawn])
    assert (result[is_drawn] != original[is_drawn]).any(axis=-1).mean() > 0.9


# ---------------------------------------------------------------------------------------------------------------------
# Wrong input
# ---------------------------------------------------------------------------------------------------------------------

BAD = [
    ("nowhere --image 0.png", "nowhere: no such file"),
    ("gone --image 0.png", f"{LORA}: no such file"),
    ("dreambooth --image 0.png", "a run of another trainer"),
    ("bare.safetensors --image 0.png", "--pretrained_model_name_or_path is needed"),
    ("bare.safetensors --image 0.png --pretrained_model_name_or_path x", "--mode is needed"),
    ("cut.safetensors --image 0.png", "not a readable LoRA file"),
    ("edit --image absent.png", "absent.png: not a readable image"),
    ("edit --image edit/args.json", "args.json: not a readable image"),
    ("edit --image 0.png --size 0 0", "0 is out of range"),
    ("edit --image 0.png --size 24 32", "must be multiples of 16"),
    ("edit --image 0.png --mask hole.png", "trained in edit mode, which has no masks"),
    ("edit --image 0.png --mode mask", "trained in edit mode"),
    ("edit --image 0.png --keep_unmasked", "--keep_unmasked needs --mask"),
    ("mask --image 0.png", "--mask is needed"),
    ("mask --image 0.png --mask square.png", "a mask must have the shape of its image, 48 x 32, not 32 x 32"),
    ("mask --image 0.png --mask black.png", "nothing in this mask is white"),
    ("mask --image 0.png --mask absent.png", "absent.png: not a readable image"),
]


@pytest.fixture
def place(lora, tiny_fill, tmp_path, monkeypatch):
    """The working folder, with what the table below names."""
    monkeypatch.chdir(tmp_path)
    for name, flags in (("edit", {"mode": "edit"}), ("mask", {"mode": "mask", "use_split_mask": False}), ("gone", {})):
        make_run(Path(name), lora, pretrained_model_name_or_path=tiny_fill, resolution=[32], **flags)
    Path("gone", LORA).unlink()
    Path("dreambooth").mkdir()
    Path("dreambooth", "args.json").write_text(json.dumps({"args": {"token_abstraction": "TOK"}}))
    save_file({"transformer.x.lora_A.weight": torch.zeros(1, 1)}, Path("dreambooth", LORA))
    Path("bare.safetensors").write_bytes(lora.read_bytes())
    Path("cut.safetensors").write_bytes(lora.read_bytes()[:-1])
    picture().save("0.png")
    hole().save("hole.png")
    Image.new("L", (48, 32)).save("black.png")
    Image.new("L", (32, 32), "white").save("square.png")


@pytest.mark.parametrize(("words", "message"), BAD, ids=[words for words, _ in BAD])
def test_wrong_input_is_one_line(place, monkeypatch, capsys, words, message):
    monkeypatch.setattr(generate, "load_pipeline", None)
    before = sorted(Path().rglob("*"))
    with pytest.raises(SystemExit) as stop:
        generate.main([*words.split(), "--prompt", "x"])
    error = capsys.readouterr().err.split("error: ")[1]
    assert stop.value.code == 2
    assert message in error
    assert error.count("\n") == 1
    assert sorted(Path().rglob("*")) == before


def test_a_lora_of_another_model_or_a_model_that_was_moved_is_one_line(place, tiny_fill, capsys):
    save_file({"transformer.x.lora_A.weight": torch.zeros(1, 1)}, "other.safetensors")
    for lora, model in (("other.safetensors", tiny_fill), ("bare.safetensors", "nothing/here")):
        with pytest.raises(SystemExit) as stop:
            generate.load_pipeline(lora, model)
        assert stop.value.code == 2
        assert "cannot be loaded" in capsys.readouterr().err


def test_a_checkpoint_and_a_file_draw_as_the_run_does(place, lora, tiny_fill):
    Path("edit", "checkpoint-4").mkdir()
    Path("edit", "checkpoint-4", LORA).write_bytes(lora.read_bytes())
    for path in ("edit", "edit/checkpoint-4", f"edit/checkpoint-4/{LORA}", f"edit/{LORA}"):
        args = generate.parse_args([path, "--image", "0.png", "--prompt", "x"])
        assert (args.mode, args.sizes) == ("edit", [Size(16, 32)])
    bare = ["bare.safetensors", "--mode", "mask", "--pretrained_model_name_or_path", str(tiny_fill)]
    args = generate.parse_args([*bare, "--image", "0.png", "--prompt", "x"])
    assert args.sizes == [Size(32, 48)]  # its own size, of each half
