"""train_dreambooth_flux_advanced.py on a folder of real photos as they come from a camera or a phone."""

from pathlib import Path

import numpy as np
import skimage.data
from PIL import Image
from safetensors.torch import load_file

import train_dreambooth_flux_advanced as dreambooth


def photo_folder(folder):
    """Photos of many sizes: JPEG turned by EXIF, PNG with alpha, palette, grey and 16-bit ones, an upper-case name."""
    folder.mkdir()
    packaged = Path(skimage.data.__file__).parent
    astronaut, chelsea, coffee = (
        Image.fromarray(getattr(skimage.data, n)()) for n in ("astronaut", "chelsea", "coffee")
    )
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was turned: show it rotated by 90 degrees
    chelsea.transpose(Image.Transpose.ROTATE_90).save(folder / "turned.jpg", exif=exif, quality=95)
    astronaut.save(folder / "UPPER.JPG")
    cut_out = coffee.convert("RGBA")
    cut_out.putalpha(Image.linear_gradient("L").resize(coffee.size))
    cut_out.save(folder / "cut out.png")
    coffee.convert("P").save(folder / "palette.png")
    Image.fromarray(skimage.data.camera()).resize((301, 57)).save(folder / "grey and wide.webp")
    Image.fromarray(skimage.data.coins().astype(np.uint16) * 257).save(folder / "16 bit.png")
    astronaut.resize((19, 23)).save(folder / "tiny.bmp")
    (folder / "notes.docx").write_bytes((packaged / "README.txt").read_bytes())
    (folder / ".hidden").write_text("")
    return chelsea


def test_photos_train_without_a_manual_step(train, tiny_model, tmp_path):
    photo_folder(tmp_path / "photos")
    train(
        "train_dreambooth_flux_advanced",
        *("--pretrained_model_name_or_path", tiny_model, "--instance_data_dir", tmp_path / "photos"),
        *("--instance_prompt", "a photo of sks things", "--output_dir", tmp_path / "run", "--report_to", "none"),
        *("--resolution", 64, "--max_sequence_length", 8, "--max_train_steps", 4, "--cache_latents"),
    )
    weights = load_file(tmp_path / "run" / "pytorch_lora_weights.safetensors")
    assert max(value.abs().max() for key, value in weights.items() if "lora_B" in key) > 0


def test_photos_are_upright_opaque_and_as_bright_as_they_were(tiny_model, tmp_path):
    chelsea = photo_folder(tmp_path / "photos")
    args = dreambooth.parse_args(
        [
            *("--pretrained_model_name_or_path", str(tiny_model), "--instance_data_dir", str(tmp_path / "photos")),
            *("--instance_prompt", "a cat", "--resolution", "64", "--center_crop"),
        ]
    )
    examples, problems = dreambooth.find_examples(args)
    assert not problems
    images = {Path(example.name).name: example.image() for example in examples}
    assert len(images) == 7
    assert all(image.mode == "RGB" for image in images.values())
    assert images["turned.jpg"].size == chelsea.size
    assert np.abs(np.asarray(images["turned.jpg"], float) - np.asarray(chelsea, float)).mean() < 4
    assert np.asarray(images["cut out.png"])[0].min() > 250  # transparent there: white
    mean = skimage.data.coins().mean()
    assert abs(np.asarray(images["16 bit.png"]).mean() - mean) < 2
    dataset = dreambooth.DreamBoothDataset(examples, args)
    for key in dataset.image_keys():
        pixels = dataset.pixel_values(key)
        assert pixels.shape == (3, 64, 64)
        assert -1 <= pixels.min() < pixels.max() <= 1
