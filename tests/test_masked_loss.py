"""train_dreambooth_flux_advanced.py: masks of what is learned, in a folder or as the images' alpha channel."""

import json
import random
import re

from common.data import alpha_channel

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from diffusers import FluxPipeline
from PIL import Image, ImageDraw
from test_pivotal import MODES, flags, results  # noqa: F401  # flags is a fixture
from test_train_dreambooth import SCRIPT, assert_equal, quickstart_flags

import train_dreambooth_flux_advanced as dreambooth
from examples.toy import world
from examples.toy.compare import HERE, sample


@pytest.fixture
def masks(pictures, tmp_path):
    """A folder with a mask for each of the pictures, in several formats."""
    folder = tmp_path / "masks"
    folder.mkdir()
    for i, suffix in enumerate(("png", "jpg", "webp", "bmp", "png")):
        size = Image.open(pictures / f"{i}.png").size
        mask = Image.new("L", size)
        ImageDraw.Draw(mask).rectangle((0, 0, size[0] // 2, size[1] - 9), fill=255)
        mask.save(folder / f"{i}.{suffix}")
    return folder


def dataset_of(*words):
    args = dreambooth.parse_args([str(word) for word in words])
    examples, problems = dreambooth.find_examples(args)
    assert problems == []
    return dreambooth.DreamBoothDataset(examples, args)


def losses_of(folder):
    return [json.loads(line)["loss"] for line in (folder / "metrics.jsonl").open()]


def test_a_mask_weights_the_error_of_each_latent(tiny):
    generator = torch.Generator().manual_seed(0)
    latents, noise = torch.randn(2, 2, 16, 4, 6, generator=generator)
    loss_mask = torch.rand(2, 1, 4, 6, generator=generator)
    inputs = {
        "family": dreambooth.Flux({}),
        "sigmas": torch.tensor([0.2, 0.9]),
        "prompt_embeds": torch.randn(2, 8, 32, generator=generator),
        "pooled_prompt_embeds": torch.randn(2, 32, generator=generator),
        "guidance": torch.ones(2),
    }
    with torch.no_grad():
        model_pred = dreambooth.predict_velocity(tiny.transformer, latents, noise, **inputs)
        inputs |= {"weighting_scheme": "none"}
        plain, whole, masked = (
            dreambooth.compute_loss(tiny.transformer, latents, noise, **inputs, loss_mask=weights)
            for weights in (None, torch.ones(2, 1, 4, 6), loss_mask)
        )
    error = (FluxPipeline._unpack_latents(model_pred, 4, 6, 1) - (noise - latents)).square()
    torch.testing.assert_close(whole, plain)
    expected = (error.mean(1) * loss_mask[:, 0]).sum(dim=(1, 2)) / loss_mask.sum(dim=(1, 2, 3))
    torch.testing.assert_close(masked, expected)


@pytest.mark.parametrize("more", [[], ["--center_crop"], ["--aspect_ratio_buckets", "32,64;64,32"]])
def test_a_mask_is_cropped_and_mirrored_as_its_image(tiny_model, tmp_path, more):
    for name, scale in (("images", 1), ("masks", 2)):
        (tmp_path / name).mkdir()
        for i, (width, height) in enumerate([(256, 128), (128, 320), (200, 200)]):
            shape = Image.new("L", (width * scale, height * scale))
            ImageDraw.Draw(shape).ellipse((0, 0, width * scale * 0.7, height * scale * 0.5), fill=255)
            shape.save(tmp_path / name / f"{i}.png")
    dataset = dataset_of(
        *(
            "--pretrained_model_name_or_path",
            tiny_model,
            "--instance_prompt",
            "x",
            "--resolution",
            64,
            "--random_flip",
        ),
        *("--instance_data_dir", tmp_path / "images", "--mask_data_dir", tmp_path / "masks", "--repeats", 2),
        *("--unmasked_weight", 0.25, *more),
    )
    keys = dataset.image_keys()
    assert len(keys) == (6 if "--center_crop" in more else 12)
    for key in keys:
        mask = dataset.loss_mask(key)
        assert mask.shape == (1, key[1].height // 8, key[1].width // 8)
        seen = F.avg_pool2d((dataset.pixel_values(key)[:1] + 1) / 2, 8)
        assert (mask - (0.25 + 0.75 * seen)).abs().max() < 0.2
        assert (mask - (0.25 + 0.75 * seen)).abs().mean() < 0.03
        mirrored = dataset.loss_mask((*key[:2], not key[2]))
        assert torch.equal(mask, mirrored.flip(-1)) == (more != []) or not torch.equal(mask, mirrored)
    sample = dataset[(0, 0)][0]
    assert sample["loss_mask"].shape[1:] == tuple(side // 8 for side in sample["pixel_values"].shape[1:])


def test_a_crop_without_anything_of_the_mask_teaches_nothing(tiny_model, tmp_path):
    for name in ("images", "masks"):
        (tmp_path / name).mkdir()
    Image.new("RGB", (96, 32)).save(tmp_path / "images" / "0.png")
    mask = Image.new("L", (96, 32))
    mask.paste(255, (0, 0, 8, 32))
    mask.save(tmp_path / "masks" / "0.png")
    dataset = dataset_of(
        *(
            "--pretrained_model_name_or_path",
            tiny_model,
            "--instance_prompt",
            "x",
            "--resolution",
            32,
            "--center_crop",
        ),
        *("--instance_data_dir", tmp_path / "images", "--mask_data_dir", tmp_path / "masks"),
        *("--unmasked_weight", 0.5),
    )
    assert dataset[(0, 0)][0]["loss_mask"].sum() == 0


def test_alpha_is_how_opaque_an_image_is():
    alpha = np.arange(48, dtype=np.uint8).reshape(6, 8) * 5
    image = Image.fromarray(np.dstack([np.full((6, 8, 3), 90, np.uint8), alpha]))
    assert np.array_equal(np.asarray(alpha_channel(image)), alpha)
    turned = image.copy()
    turned.getexif()[0x0112] = 6  # the camera was turned by a quarter
    turned.info["exif"] = turned.getexif().tobytes()
    assert np.array_equal(np.asarray(alpha_channel(turned)), np.rot90(alpha, -1))
    palette = Image.new("P", (2, 1))
    palette.putpalette([0, 0, 0, 255, 255, 255])
    palette.putpixel((1, 0), 1)
    palette.info["transparency"] = 1
    assert np.asarray(alpha_channel(palette)).tolist() == [[255, 0]]
    for mode in ("RGB", "L", "I;16", "CMYK"):
        assert np.asarray(alpha_channel(Image.new(mode, (2, 1)))).tolist() == [[255, 255]]


@pytest.fixture
def cut_out(pictures, masks, tmp_path):
    """The pictures, transparent outside of their masks, with captions; but for the last, which is opaque."""
    folder = tmp_path / "cut_out"
    folder.mkdir()
    for i in range(5):
        image = Image.open(pictures / f"{i}.png").convert("RGB")
        mask = Image.open(next(masks.glob(f"{i}.*"))).convert("L")
        if i < 4:
            image.putalpha(mask)
        image.save(folder / f"{i}.png")
        (folder / f"{i}.txt").write_text((pictures / f"{i}.txt").read_text())
    return folder


def test_an_alpha_channel_is_a_mask(train, flags, cut_out, tmp_path, capsys):  # noqa: F811
    (tmp_path / "alpha").mkdir()
    (tmp_path / "white").mkdir()
    for file in cut_out.iterdir():
        if file.suffix == ".txt":
            (tmp_path / "white" / file.name).write_text(file.read_text())
            continue
        with Image.open(file) as image:
            alpha_channel(image).save(tmp_path / "alpha" / file.name)
            dreambooth.Example("", lambda: image).image().save(tmp_path / "white" / file.name)  # noqa: B023
    flags = [*flags, "--max_train_steps", 3, "--random_flip", "--unmasked_weight", 0.1, "--output_dir"]
    train(SCRIPT, *flags, tmp_path / "a" / "run", "--alpha_mask", "--instance_data_dir", cut_out)
    said = capsys.readouterr().out
    found = re.search(r"  masks +for 5 of 5 images, 1 of them whole, (\d+)% of an image, weight 0.1 outside", said)
    assert found and 30 < int(found[1]) < 60
    folders = ("--instance_data_dir", tmp_path / "white", "--mask_data_dir", tmp_path / "alpha")
    train(SCRIPT, *flags, tmp_path / "b" / "run", *folders)
    assert_equal(results(tmp_path / "a" / "run"), results(tmp_path / "b" / "run"))


def test_masks_resume_bit_for_bit_and_do_not_depend_on_caches(
    train,
    flags,  # noqa: F811
    masks,
    tmp_path,
    capsys,
):
    flags = [*flags, "--mask_data_dir", masks, "--random_flip", "--repeats", 2, "--lora_dropout", 0.1]
    flags += ["--gradient_accumulation_steps", 2, "--checkpointing_steps", 2, "--max_train_steps", 4]
    train(SCRIPT, *flags, "--output_dir", tmp_path / "a" / "run")
    resumed = ["--resume_from_checkpoint", tmp_path / "a" / "run" / "checkpoint-2"]
    variants = {
        "resumed": [*resumed, "--cache_latents", "False", "--dataloader_num_workers", 1],
        "on disk": ["--cache_latents_to_disk", "--disk_cache_dir", tmp_path / "cache"],
    }
    for name, extra in variants.items():
        train(SCRIPT, *flags, *extra, "--output_dir", tmp_path / name / "run")
        assert_equal(results(tmp_path / "a" / "run"), results(tmp_path / name / "run"))

    # a latent that is found on the disk brings no mask with it, and another mask makes another run
    Image.new("L", (48, 32), 255).save(masks / "0.png")
    train(SCRIPT, *flags, *variants["on disk"], "--output_dir", tmp_path / "other" / "run")
    assert losses_of(tmp_path / "other" / "run") != losses_of(tmp_path / "a" / "run")
    capsys.readouterr()
    with pytest.raises(SystemExit) as ended:
        train(SCRIPT, *flags, *resumed, "--output_dir", tmp_path / "changed" / "run")
    assert ended.value.code == 2
    assert "1 of 5 images (0.png)" in capsys.readouterr().err


def test_class_images_count_whole_and_preservation_is_not_masked(train, flags, masks, tmp_path, monkeypatch):  # noqa: F811
    seen = []
    honest = dreambooth.compute_loss

    def compute_loss(*inputs, loss_mask, **more):
        seen.append(loss_mask)
        return honest(*inputs, loss_mask=loss_mask, **more)

    monkeypatch.setattr(dreambooth, "compute_loss", compute_loss)
    prior = ["--with_prior_preservation", "--class_data_dir", tmp_path / "class", "--class_prompt", "a shape"]
    prior += ["--num_class_images", 2, "--mask_data_dir", masks, "--max_train_steps", 2]
    preserve = ["--preserve_outputs", 1, "--preserve_prompts", "a shape"]
    train(SCRIPT, *flags, *prior, *preserve, "--output_dir", tmp_path / "run")
    for loss_mask in seen:
        own, classes = loss_mask.chunk(2)
        assert (classes == 1).all() and not (own == 1).all()
    assert len(seen) == 2  # preservation has a loss of its own, see test_preservation.py


@pytest.mark.parametrize(
    "mode",
    ["pivotal CLIP", *(pytest.param(mode, marks=pytest.mark.slow) for mode in ("CLIP LoRA", "nf4"))],
)
def test_masks_go_with(train, flags, masks, tmp_path, mode):  # noqa: F811
    modes = MODES | {"nf4": ["--quantize_base", "nf4"]}
    flags = [*flags, *modes[mode], "--max_train_steps", 2, "--output_dir"]
    train(SCRIPT, *flags, tmp_path / "plain")
    train(SCRIPT, *flags, tmp_path / "masked", "--mask_data_dir", masks)
    assert all(torch.isfinite(value).all() for value in results(tmp_path / "masked").values())
    assert losses_of(tmp_path / "plain") != losses_of(tmp_path / "masked")


@pytest.mark.slow
def test_masks_go_with_two_processes(runs, flags, masks, tmp_path):  # noqa: F811
    flags = [*flags, "--mask_data_dir", masks, "--max_train_steps", 2, "--output_dir"]
    for name, extra in (("cached", []), ("read", ["--cache_latents", "False"])):
        code = runs.run(SCRIPT, [*flags, tmp_path / name / "run", *extra], processes=2)
        assert code == 0, runs.output()[-3000:]
    assert_equal(results(tmp_path / "cached" / "run"), results(tmp_path / "read" / "run"))


TOML = """
[[datasets]]
resolution = 32
[[datasets.subsets]]
image_dir = "{pictures}"
conditioning_data_dir = "{masks}"
caption_extension = ".txt"
num_repeats = 2
[[datasets.subsets]]
image_dir = "{cut_out}"
alpha_mask = true
caption_extension = ".txt"
"""


def test_data_toml_names_masks_as_sd_scripts_does(train, flags, pictures, masks, cut_out, tmp_path, capsys):  # noqa: F811
    place = flags.index("--instance_data_dir")
    flags = [*flags[:place], *flags[place + 2 :], "--masked_loss", "--max_train_steps", 2]
    config = tmp_path / "data.toml"
    config.write_text(TOML.format(pictures=pictures, masks="masks", cut_out=cut_out))
    dataset = dataset_of(*flags, "--dataset_config", config)
    keys = {example.name: (index, example.bucket, False) for index, example in enumerate(dataset.examples)}
    by_folder = dataset.loss_mask(keys[str(pictures / "0.png")])
    assert torch.equal(by_folder, dataset.loss_mask(keys[str(cut_out / "0.png")]))
    assert 0 < by_folder.mean() < 1
    train(SCRIPT, *flags, "--dataset_config", config, "--output_dir", tmp_path / "run")
    assert "for 10 of 10 images" in capsys.readouterr().out

    wrong = {
        'alpha_mask = true\nconditioning_data_dir = "masks"': "alpha_mask and conditioning_data_dir exclude",
        'conditioning_data_dir = "nowhere"': "conditioning_data_dir nowhere: no such folder",
        f'conditioning_data_dir = "{cut_out}"': "every image would belong to itself",
        "": "--unmasked_weight 0.5 needs masks",
    }
    for options, message in wrong.items():
        config.write_text(
            TOML.format(pictures=pictures, masks="masks", cut_out=cut_out).replace("alpha_mask = true", options)
        )
        if not options:
            config.write_text(config.read_text().replace('conditioning_data_dir = "masks"', ""))
        with pytest.raises(SystemExit) as ended:
            train(SCRIPT, *flags, "--dataset_config", config, "--unmasked_weight", 0.5, "--output_dir", tmp_path / "x")
        assert ended.value.code == 2
        assert message in capsys.readouterr().err


def break_masks(masks, how):
    if how == "missing":
        (masks / "2.webp").unlink()
    if how == "twice":
        Image.new("L", (8, 8)).save(masks / "2.png")
    if how == "shape":
        Image.new("L", (99, 32), 255).save(masks / "0.png")
    if how == "black":
        Image.new("L", (48, 32), 100).save(masks / "0.png")
    if how == "unreadable":
        (masks / "0.png").write_bytes(b"\x89PNG and then nothing")
    if how == "white":
        for file in masks.iterdir():
            Image.new("L", Image.open(file).size, 255).save(file)


WRONG_MASKS = {
    "missing": "2.png: needs one image 2.* in",
    "twice": "which has 2.png and 2.webp",
    "shape": "masks/0.png: a mask must have the shape of its image, 48 x 32, not 99 x 32",
    "black": "masks/0.png: nothing in this mask is white",
    "unreadable": "masks/0.png: not a readable image",
    "white": "all masks are white",
}


@pytest.mark.parametrize("how", WRONG_MASKS)
def test_a_wrong_mask_is_named_before_a_model_is_loaded(
    train,
    flags,  # noqa: F811
    masks,
    tmp_path,
    capsys,
    monkeypatch,
    how,
):
    break_masks(masks, how)
    monkeypatch.setattr(dreambooth, "load_text_encoders", None)
    with pytest.raises(SystemExit) as ended:
        train(SCRIPT, *flags, "--mask_data_dir", masks, "--output_dir", tmp_path / "run")
    assert ended.value.code == 2
    assert WRONG_MASKS[how] in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


BAD = [
    ("--mask_data_dir {masks} --alpha_mask", "--mask_data_dir and --alpha_mask exclude each other"),
    ("--mask_data_dir {pictures}", "every image would belong to itself"),
    ("--mask_data_dir nowhere", "--mask_data_dir nowhere: no such folder"),
    ("--mask_data_dir {masks} --unmasked_weight 1", "--unmasked_weight 1 leaves masks without effect"),
    ("--mask_data_dir {masks} --unmasked_weight 2", "--unmasked_weight: 2 is out of range"),
    ("--alpha_mask", "--alpha_mask: all masks are white (or opaque)"),
]


@pytest.mark.parametrize(("wrong", "message"), BAD)
def test_wrong_use_is_one_line(train, flags, pictures, masks, tmp_path, capsys, wrong, message):  # noqa: F811
    words = wrong.format(masks=masks, pictures=pictures).split()
    with pytest.raises(SystemExit) as ended:
        train(SCRIPT, *flags, "--output_dir", tmp_path / "run", *words)
    assert ended.value.code == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_masks_of_other_data_are_refused_and_a_weight_without_masks_is_named(flags, masks, capsys):  # noqa: F811
    place = flags.index("--instance_data_dir")
    words = [str(word) for word in [*flags[:place], *flags[place + 2 :]]]
    for source in ("--dataset_name x", "--dataset_config data.toml"):
        with pytest.raises(SystemExit):
            dreambooth.parse_args([*words, *source.split(), "--mask_data_dir", str(masks)])
        assert "--mask_data_dir" in capsys.readouterr().err
    dreambooth.parse_args([str(word) for word in [*flags, "--unmasked_weight", 0.5]])
    assert "--unmasked_weight" in capsys.readouterr().err


def test_held_out_images_without_transparent_parts_count_whole(flags, cut_out, pictures):  # noqa: F811
    words = [*flags, "--instance_data_dir", cut_out, "--alpha_mask", "--validation_data_dir", pictures]
    args = dreambooth.parse_args([str(word) for word in words])
    examples, problems = dreambooth.find_examples(args)
    training, held_out, held_out_problems = dreambooth.find_held_out(args, examples)
    assert problems + held_out_problems + dreambooth.check_effects(training, args) == []
    dataset = dreambooth.DreamBoothDataset(held_out, args)
    assert all((dataset.loss_mask(key) == 1).all() for key in dataset.image_keys())


# ---------------------------------------------------------------------------------------------------------------------
# Learning
# ---------------------------------------------------------------------------------------------------------------------


def draw_confounded(folder):
    """Six images of the toy subject, all on green, which no caption says; and their masks."""
    rng = random.Random(0)
    for name in ("images", "masks"):
        (folder / name).mkdir(parents=True)
    for i in range(6):
        scene = world.Scene("green", world.random_subject(rng, "glyph")[0].shapes)
        world.draw(scene).save(folder / "images" / f"{i}.png")
        (folder / "images" / f"{i}.txt").write_text("sks glyph")
        Image.fromarray(world.mask_of(scene).astype(np.uint8) * 255).save(folder / "masks" / f"{i}.png")


def backgrounds_and_subject(run, count=32):
    """(share of images, 0 to 100, that have the background of their prompt, which is not green; score of the subject,
    0 to 100, for its bare prompt)."""
    pipeline = FluxPipeline.from_pretrained(HERE / "flux")
    pipeline.set_progress_bar_config(disable=True)
    pipeline.load_lora_weights(run)
    rng = random.Random(1)
    drawn = [world.random_subject(rng, "glyph") for _ in range(2 * count)]
    asked = [(scene.background, prompt) for scene, prompt in drawn if scene.background != "green"][:count]
    images = sample(pipeline, [prompt for _, prompt in asked], 0)
    right = [world.background_of(image) == background for image, (background, _) in zip(images, asked, strict=True)]
    bare = sample(pipeline, ["sks glyph"] * count, 100)
    return 100 * np.mean(right), 100 * np.mean([world.score_subject(image, "glyph") for image in bare])


@pytest.mark.slow
@pytest.mark.learning
@pytest.mark.parametrize("seed", range(3))
def test_what_all_images_share_is_not_learned_with_masks(train, tmp_path, seed):
    draw_confounded(tmp_path)
    words = [*quickstart_flags(), "--max_train_steps", 200, "--seed", seed, "--report_to", "none"]
    words += ["--pretrained_model_name_or_path", HERE / "flux", "--max_sequence_length", 32, "--cache_latents"]
    words += ["--resolution", 64, "--instance_data_dir", tmp_path / "images", "--output_dir"]
    train(SCRIPT, *words, tmp_path / "plain")
    train(SCRIPT, *words, tmp_path / "masked", "--mask_data_dir", tmp_path / "masks")
    plain, plain_subject = backgrounds_and_subject(tmp_path / "plain")
    masked, masked_subject = backgrounds_and_subject(tmp_path / "masked")
    print(
        f"backgrounds as asked: {plain:.0f} -> {masked:.0f} with masks; subject: {plain_subject:.0f} -> "
        f"{masked_subject:.0f} (seed {seed})"
    )
    assert masked >= plain + 20
