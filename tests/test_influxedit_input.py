"""train_influxedit.py: the published flags, bad input, and what the data set makes of good input."""

import json
import time
from pathlib import Path

from common.checkpoints import CHECKSUMS, checksums

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps
from test_family import flags_of

import train_influxedit as influxedit


SCRIPT = "train_influxedit"
# InFluxEdit's ten argument tables, without those switches that are off.
PUBLISHED = {
    "image_column": "image",
    "mode": "mask",
    "repeats": 1,
    "resolution": "512",
    "size": "512",
    "num_validation_images": 1,
    "validation_steps": 50,
    "validation_width": 1024,
    "validation_height": 1024,
    "max_sequence_length": 512,
    "train_batch_size": 4,
    "sample_batch_size": 4,
    "num_train_epochs": 1,
    "gradient_accumulation_steps": 1,
    "learning_rate": 1e-4,
    "guidance_scale": 3.5,
    "text_encoder_lr": 5e-6,
    "lr_scheduler": "constant",
    "lr_warmup_steps": 500,
    "lr_num_cycles": 1,
    "lr_power": 1.0,
    "optimizer": "AdamW",
    "adam_beta1": 0.9,
    "adam_beta2": 0.999,
    "prodigy_decouple": True,
    "adam_weight_decay": 1e-4,
    "adam_weight_decay_text_encoder": 1e-3,
    "adam_epsilon": 1e-8,
    "prodigy_use_bias_correction": True,
    "prodigy_safeguard_warmup": True,
    "max_grad_norm": 1.0,
    "output_dir": Path("flux-dreambooth-lora"),
    "checkpointing_steps": 500,
    "logging_dir": Path("logs"),
    "report_to": "tensorboard",
    "weighting_scheme": "none",
    "logit_mean": 0.0,
    "logit_std": 1.0,
    "mode_scale": 1.29,
    "local_rank": -1,
}
PUBLISHED_SWITCHES = {
    *("train_embedder", "train_text_encoder", "center_crop", "random_flip", "use_split_mask", "mask_only_right"),
    *("gradient_checkpointing", "scale_lr", "use_8bit_adam", "push_to_hub", "allow_tf32", "cache_latents"),
    "upcast_before_saving",
}
PUBLISHED_WITHOUT_DEFAULT = {
    *("pretrained_model_name_or_path", "revision", "variant", "dataset_name", "dataset_config_name", "cache_dir"),
    *("instance_data_dir", "mask_data_dir", "target_data_dir", "caption_data_dir", "caption_column", "mask_column"),
    *("target_column", "instance_prompt", "validation_prompt", "validation_image", "validation_mask", "seed"),
    *("max_train_steps", "prodigy_beta3", "lora_layers", "checkpoints_total_limit", "resume_from_checkpoint"),
    *("hub_token", "hub_model_id", "mixed_precision", "dataloader_num_workers"),
}


def test_the_published_flags_and_defaults():
    expected = PUBLISHED | dict.fromkeys(PUBLISHED_SWITCHES, False) | dict.fromkeys(PUBLISHED_WITHOUT_DEFAULT)
    assert len(expected) == 80
    defaults = {name[2:]: action.default for action in flags_of(SCRIPT) for name in action.option_strings}
    assert {name: defaults.get(name, "no such flag") for name in expected} == expected


# ---------------------------------------------------------------------------------------------------------------------
# Bad input
# ---------------------------------------------------------------------------------------------------------------------


def copy_of(folder, destination, *, without=(), **changes):
    """A copy of a folder; `changes` are new contents of files, bytes or pictures, by stem."""
    destination.mkdir(parents=True)
    for path in folder.iterdir():
        if path.stem not in without:
            (destination / path.name).write_bytes(path.read_bytes())
    for stem, value in changes.items():
        path = destination / stem.replace("__", ".").lstrip("_")
        value.save(path) if isinstance(value, Image.Image) else path.write_bytes(value)
    return destination


@pytest.fixture
def world(tiny_fill, tiny_model, pairs, tmp_path):
    """Names that stand for paths in the table below."""
    small = Image.new("RGB", (16, 16))
    folders = {
        "missing": copy_of(pairs / "targets", tmp_path / "missing", without=("2",)),
        "doubled": copy_of(pairs / "targets", tmp_path / "doubled", _0__jpg=small),
        "broken": copy_of(pairs / "targets", tmp_path / "broken", _3__png=b"\x89PNG and then nothing"),
        "cut": copy_of(pairs / "targets", tmp_path / "cut", _1__jpg=(pairs / "targets" / "1.jpg").read_bytes()[:-300]),
        "small": copy_of(pairs / "targets", tmp_path / "small", _0__png=small),
        "oblong": copy_of(pairs / "masks", tmp_path / "oblong", _0__png=small),
        "silent": copy_of(pairs / "captions", tmp_path / "silent", without=("1",)),
        "blank": copy_of(pairs / "captions", tmp_path / "blank", _2__txt=b"\n"),
        "latin": copy_of(pairs / "captions", tmp_path / "latin", _2__txt=b"\xff\xfe\xff"),
        "twins": copy_of(pairs / "images", tmp_path / "twins", _0__jpg=small),
        "empty": tmp_path / "empty",
        "earlier": tmp_path / "earlier",
    }
    folders["empty"].mkdir()
    (folders["earlier"] / "checkpoint-5").mkdir(parents=True)
    state = {"global_step": 5, "seed": "1", "mode": "mask"}
    (folders["earlier"] / "checkpoint-5" / "trainer_state.json").write_text(json.dumps(state))
    earlier = folders["earlier"] / "checkpoint-5"
    (earlier / CHECKSUMS).write_text(json.dumps(checksums(earlier)))
    (tmp_path / "file").write_text("")
    Image.new("L", (32, 32)).save(tmp_path / "black.png")
    paths = {name: tmp_path / name for name in ("nowhere", "file", "out")}
    own = {name: pairs / name for name in ("images", "targets", "masks", "captions", "combined")}
    return {**folders, **paths, **own, "model": tiny_fill, "flux": tiny_model, "black": tmp_path / "black.png"}


MASK = "--instance_data_dir {images} --caption_data_dir {captions}"
COMMANDS = {"mask": MASK, "split": f"{MASK} --use_split_mask", "edit": f"{MASK} --mode edit"}
# flags that follow the model's and the output's, and what the message must say
BAD = [
    ("{edit}", "--mode edit needs --target_data_dir, or --target_column of a dataset"),
    ("{mask}", "--mode mask needs one of --mask_data_dir (or --mask_column of a dataset) and --use_split_mask"),
    ("{mask} --mask_data_dir {masks} --use_split_mask", "--mode mask needs one of --mask_data_dir"),
    ("{split} --target_data_dir {targets}", "--target_data_dir needs --mode edit"),
    ("{split} --train_embedder", "--train_embedder needs --mode edit"),
    ("{edit} --target_data_dir {targets} --use_split_mask", "--use_split_mask needs --mode mask"),
    (
        "{edit} --target_data_dir {targets} --mask_data_dir {masks}",
        "--mask_data_dir needs --mode mask",
    ),
    (
        "{edit} --target_data_dir {targets} --loss_mask_weight 2",
        "--loss_mask_weight 2 needs --mode mask",
    ),
    ("{mask} --mask_data_dir {masks} --mask_only_right", "--mask_only_right needs --use_split_mask"),
    ("{mask} --mask_column m --use_split_mask", "--mask_column m needs --dataset_name"),
    ("{split} --caption_column c", "--caption_data_dir and --caption_column exclude each other"),
    ("--dataset_name x --mask_data_dir {masks}", "--mask_data_dir goes with --instance_data_dir, not with"),
    ("{split} --mode paint", "--mode: invalid choice: 'paint'"),
    ("{split} --resolution 512,8", "--resolution/--size: 8 is out of range"),
    ("{split} --size 512,big", "invalid resolutions value: '512,big'"),
    ("{split} --validation_width 40", "--validation_width 40 must be a multiple of 16, such as 32"),
    ("{split} --validation_image a.png", "--validation_image needs --validation_prompt"),
    (
        "{split} --validation_prompt a --validation_image {nowhere}",
        "--validation_image {nowhere}: not a readable image",
    ),
    (
        "{split} --validation_prompt a;b --validation_image x,y,z",
        "2 in --validation_prompt, 3 in --validation_image: these lists must be equally long, or hold one entry for",
    ),
    (
        "{mask} --mask_data_dir {masks} --validation_prompt a --validation_image {images}/0.png",
        "--validation_image needs --validation_mask",
    ),
    (
        "{mask} --mask_data_dir {masks} --validation_prompt a --validation_image {images}/0.png "
        "--validation_mask {masks}/1.png",
        "--validation_mask {masks}/1.png: a mask must have the shape of its image, 48 x 32, not 32 x 32",
    ),
    (
        "{mask} --mask_data_dir {masks} --validation_prompt a --validation_image {images}/1.png "
        "--validation_mask {black}",
        "--validation_mask {black}: nothing in this mask is white",
    ),
    ("{split} --pretrained_model_name_or_path {flux}", "with 64 input channels, not FLUX.1-Fill"),
    ("{split} --lora_layers attn.to_z", "the transformer has no linear layer attn.to_z"),
    (
        "{edit} --target_data_dir {targets} --train_embedder --lora_layers attn.to_q,x_embedder",
        "--lora_layers x_embedder: --train_embedder trains all of this layer",
    ),
    (
        "{split} --loss_mask_weight 0 --with_prior_preservation --class_data_dir {targets} --class_prompt x",
        "--loss_mask_weight 0 leaves nothing of the class images",
    ),
    ("{split} --seed 4294967296", "--seed: 4294967296 is out of range"),
    ("{split} --rank 1000000000", "MiB free, which one checkpoint takes"),
    ("{split} --output_dir {earlier}", "holds checkpoint-5 of an earlier run"),
    (
        "{edit} --target_data_dir {targets} --output_dir {earlier} --resume_from_checkpoint latest",
        "checkpoint-5: mode was mask there and is edit now",
    ),
    (
        "{split} --output_dir {earlier} --resume_from_checkpoint latest --seed 2",
        "checkpoint-5: seed was 1 there and is 2 now",
    ),
    ("{split} --with_prior_preservation", "--with_prior_preservation needs --class_data_dir and"),
    ("{split} --instance_data_dir {empty}", "--instance_data_dir {empty}: no images (.png, "),
    ("{split} --caption_data_dir {nowhere}", "--caption_data_dir {nowhere}: no such folder"),
    ("{edit} --target_data_dir {missing}", "{images}/2.png: needs one image 2.* in {missing}, which has none"),
    ("{edit} --target_data_dir {doubled}", "{images}/0.png: needs one image 0.* in {doubled}, which has 0.jpg"),
    ("{edit} --target_data_dir {broken}", "{broken}/3.png: not a readable image"),
    ("{edit} --target_data_dir {cut}", "{cut}/1.jpg: not a readable image"),
    ("{edit} --target_data_dir {small}", "{small}/0.png: a target must have the size of its image, 48 x 32, not"),
    ("{mask} --mask_data_dir {oblong}", "{oblong}/0.png: a mask must have the shape of its image, 48 x 32, not"),
    ("{edit} --target_data_dir {images}", "--target_data_dir {images} is --instance_data_dir, too"),
    ("{mask} --mask_data_dir {images}", "--mask_data_dir {images} is --instance_data_dir, too"),
    (
        "--dataset_name x --mode edit --target_column image",
        "--target_column image is --image_column, too",
    ),
    ("{split} --caption_data_dir {silent}", "no caption for {images}/1.png: give"),
    (
        "{split} --caption_data_dir {blank}",
        "{images}/2.png: its caption must be text and not empty",
    ),
    ("{split} --caption_data_dir {latin}", "{latin}/2.txt: not UTF-8 text"),
    ("{split} --instance_data_dir {twins}", "{twins}: 0.jpg and 0.png differ only in their ending"),
]


@pytest.fixture
def no_models(monkeypatch):
    """Loading a model is an error."""

    def load(*args, **kwargs):
        raise AssertionError("a model was loaded")

    monkeypatch.setattr(influxedit, "load_model", load)
    monkeypatch.setattr(influxedit, "PromptEncoder", load)


@pytest.mark.parametrize(("flags", "message"), BAD, ids=[flags for flags, _ in BAD])
def test_bad_input_is_one_clear_error(train, world, no_models, capsys, flags, message):
    command = "--pretrained_model_name_or_path {model} --output_dir {out} --report_to none --resolution 32"
    commands = {name: flags.format(**world) for name, flags in COMMANDS.items()}
    before = sorted(world["out"].parent.rglob("*"))
    with pytest.raises(SystemExit) as stop:
        train(SCRIPT, *f"{command} {flags}".format(**world, **commands).split())
    error = capsys.readouterr().err.split("error: ")[1]
    assert stop.value.code == 2
    assert message.format(**world) in error
    assert sorted(world["out"].parent.rglob("*")) == before


def test_all_flaws_of_the_data_come_in_one_message(train, world, no_models, capsys, pairs, tmp_path):
    targets = copy_of(
        *(pairs / "targets", tmp_path / "all"),
        without=("2",),
        _0__jpg=Image.new("RGB", (16, 16)),
        _3__png=b"\x89PNG and then nothing",
        _4__png=Image.new("RGB", (16, 16)),
    )
    captions = copy_of(pairs / "captions", tmp_path / "words", _1__txt=b" ")
    flags = "--pretrained_model_name_or_path {model} --output_dir {out} --mode edit --instance_data_dir {images}"
    warmup = ("--lr_scheduler", "cosine", "--max_train_steps", 9, "--lr_warmup_steps", 9)
    with pytest.raises(SystemExit):
        train(
            SCRIPT,
            *flags.format(**world).split(),
            "--target_data_dir",
            targets,
            "--caption_data_dir",
            captions,
            *warmup,
        )
    error = capsys.readouterr().err.split("error:")[1]
    for problem in (
        *("0.* in", "which has 0.jpg and 0.png", "2.* in", "3.png: not a readable image"),
        *("4.png: a target must have the size", "1.png: its caption must be text and not empty"),
        "--lr_warmup_steps 9 must be less than the 9 steps",
    ):
        assert problem in error


def test_ten_thousand_pictures_are_checked_in_seconds(train, tiny_fill, no_models, tmp_path, capsys):
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    picture = Image.fromarray(noise).resize((512, 512))
    for kind, suffix in (("a", "png"), ("b", "jpg")):
        (tmp_path / kind).mkdir()
        picture.save(tmp_path / f"source.{suffix}")
        data = (tmp_path / f"source.{suffix}").read_bytes()
        for i in range(1000):
            (tmp_path / kind / f"{i}.{suffix}").write_bytes(data)
    (tmp_path / "b" / "999.jpg").unlink()
    flags = ["--pretrained_model_name_or_path", tiny_fill, "--mode", "edit", "--instance_prompt", "x"]
    started = time.process_time()
    with pytest.raises(SystemExit):
        train(SCRIPT, *flags, "--instance_data_dir", tmp_path / "a", "--target_data_dir", tmp_path / "b")
    seconds = 10 * (time.process_time() - started)
    error = capsys.readouterr().err
    print(f"10,000 pairs of 512 px would take {seconds:.0f} s (bar 60)")
    assert "999.png: needs one image" in error
    assert "Reading images" in error
    assert seconds < 60


# ---------------------------------------------------------------------------------------------------------------------
# Good input
# ---------------------------------------------------------------------------------------------------------------------


def dataset_of(tiny_fill, *flags):
    """The data set that flags make, and its arguments."""
    args = influxedit.parse_args([str(f) for f in ("--pretrained_model_name_or_path", tiny_fill, "--seed", 0, *flags)])
    examples, problems = influxedit.find_examples(args)
    assert not problems
    return influxedit.EditDataset(examples, args), args


def partner_of(example):
    """Its target or its mask."""
    (partner,) = example.images.values()
    return partner


def fitted(example, shape):
    """A picture [3, H, W], its centre cropped to `shape`."""
    return influxedit.to_tensor(ImageOps.fit(example.image(), (shape[2], shape[1]), Image.Resampling.LANCZOS))


def samples_of(dataset, epochs=4):
    """All samples of some epochs, each drawn alone."""
    count = len(dataset)
    return [dataset.__getitems__([(epoch, index)])[0][0] for epoch in range(epochs) for index in range(count)]


def test_partners_are_found_by_name_whatever_their_type(tiny_fill, pairs):
    folders = ("--instance_data_dir", pairs / "images", "--target_data_dir", pairs / "targets")
    dataset, _ = dataset_of(tiny_fill, "--mode", "edit", *folders, "--caption_data_dir", pairs / "captions")
    for example in dataset.examples:
        stem = Path(example.name).stem
        assert Path(partner_of(example).name).stem == stem
        assert example.caption == (pairs / "captions" / f"{stem}.txt").read_text()


def test_crops_and_flips_hit_picture_target_and_mask_alike(tiny_fill, tmp_path):
    rng = np.random.default_rng(0)
    for name in ("images", "targets", "masks"):
        (tmp_path / name).mkdir()
    for i in range(3):
        pattern = Image.fromarray(rng.integers(0, 2, (50, 83), dtype=np.uint8) * 255)
        for name in ("images", "targets", "masks"):
            pattern.convert("L" if name == "masks" else "RGB").save(tmp_path / name / f"{i}.png")
    shared = ("--instance_data_dir", tmp_path / "images", "--instance_prompt", "x", "--resolution", "83")
    shared += ("--random_flip", "--image_interpolation_mode", "nearest")
    dataset, _ = dataset_of(tiny_fill, *shared, "--mode", "edit", "--target_data_dir", tmp_path / "targets")
    for sample in samples_of(dataset):
        assert torch.equal(*sample["pixel_values"])
    dataset, _ = dataset_of(tiny_fill, *shared, "--mask_data_dir", tmp_path / "masks")
    samples = samples_of(dataset)
    for sample in samples:
        result, shown = sample["pixel_values"]
        mask = sample["mask"]
        assert 0.3 < mask.mean() < 0.7
        assert torch.equal(result == 1, mask.expand_as(result) == 1)  # the picture is the mask
        assert torch.equal(shown, result * (1 - mask))
    assert (
        len({sample["mask"].numpy().tobytes() for sample in samples_of(dataset, epochs=12)}) == 6
    )  # three pictures, mirrored or not


def test_split_masks_are_halves_and_follow_the_content(tiny_fill, pairs):
    shared = ("--instance_data_dir", pairs / "combined", "--instance_prompt", "x", "--resolution", 64, "--center_crop")
    left, right = torch.ones(64), torch.ones(64)
    left[32:], right[:32] = 0, 0

    def columns(*flags):
        """The rows of all masks as tuples, and the results [3, H, W]."""
        dataset, _ = dataset_of(tiny_fill, *shared, "--use_split_mask", *flags)
        samples = samples_of(dataset, epochs=8)
        assert all(torch.equal(s["mask"], s["mask"][:, :1].expand_as(s["mask"])) for s in samples)
        return {tuple(s["mask"][0, 0].tolist()) for s in samples}, dataset, samples

    assert columns()[0] == {tuple(left.tolist()), tuple(right.tolist())}
    assert columns("--mask_only_right")[0] == {tuple(right.tolist())}
    _, dataset, samples = columns("--mask_only_right", "--random_flip")
    pictures = [
        fitted(example, (3, *group[0])) for example, group in zip(dataset.examples, dataset.groups(), strict=True)
    ]
    for sample in samples:  # mirrored, the mask is on the left and still hides the right half of the picture
        result, mirrored = sample["pixel_values"][0], bool(sample["mask"][0, 0, 0])
        upright = result.flip(-1) if mirrored else result
        assert any(torch.equal(upright, picture) for picture in pictures)
    assert {bool(sample["mask"][0, 0, 0]) for sample in samples} == {True, False}


def test_in_edit_mode_the_mask_is_white_and_all_is_shown(tiny_fill, pairs):
    folders = ("--instance_data_dir", pairs / "images", "--target_data_dir", pairs / "targets")
    shared = ("--instance_prompt", "x", "--resolution", 32, "--center_crop")
    dataset, _ = dataset_of(tiny_fill, "--mode", "edit", *folders, *shared)
    for example, sample in zip(dataset.examples, samples_of(dataset, epochs=1), strict=True):
        assert torch.equal(sample["mask"], torch.ones_like(sample["mask"]))
        result, shown = sample["pixel_values"]
        assert torch.equal(shown, fitted(example, shown.shape))
        assert torch.equal(result, fitted(partner_of(example), shown.shape))


@pytest.mark.parametrize("flag", ["--resolution", "--size"])
def test_one_size_is_drawn_per_batch(tiny_fill, pairs, flag):
    folders = ("--instance_data_dir", pairs / "images", "--target_data_dir", pairs / "targets")
    dataset, args = dataset_of(
        tiny_fill, "--mode", "edit", *folders, "--instance_prompt", "x", flag, "32,64,100", "--train_batch_size", 2
    )
    sampler = influxedit.StepSampler(dataset.groups(), 2, seed=0, process_index=0, num_processes=1, stop=60)
    shapes = set()
    for positions in sampler:
        batch = influxedit.collate(dataset.__getitems__(positions))
        shapes.add(tuple(batch["mask"].shape[2:]))
        again = influxedit.collate(dataset.__getitems__(positions))
        assert torch.equal(batch["pixel_values"], again["pixel_values"])
    assert shapes == {(32, 32), (64, 64), (96, 96), (16, 32), (48, 64), (64, 96)}
    assert influxedit.size_at(1024, influxedit.Size(1024, 1536)) == (688, 1024)
    assert influxedit.size_at(512, influxedit.Size(1000, 10)) == (512, 16)


def test_validation_lists_are_broadcast(tiny_fill, pairs):
    images, masks = ([pairs / name / "0.png", pairs / name / "2.png"] for name in ("images", "masks"))  # of one shape
    listed = ";".join(map(str, images))
    size = ("--validation_width", 32, "--validation_height", 16)
    shared = ("--instance_data_dir", pairs / "images", "--instance_prompt", "x", "--resolution", 32, *size)

    def cases(*flags):
        dataset, args = dataset_of(tiny_fill, *shared, *flags)
        return influxedit.validation_cases(args, dataset.examples)

    mask = ("--mask_data_dir", pairs / "masks")
    drawn = cases(*mask, "--validation_prompt", "a, b; c", "--validation_image", listed, "--validation_mask", masks[0])
    assert [prompt for prompt, *_ in drawn] == ["a, b", "c"]
    assert np.array_equal(drawn[0][2], drawn[1][2])
    assert not np.array_equal(drawn[0][1], drawn[1][1])
    assert {image.size for case in drawn for image in case[1:3]} == {(32, 16)}
    drawn = cases(*mask, "--validation_prompt", "a;b;c")
    assert [prompt for prompt, *_ in drawn] == ["a", "b", "c"]
    assert np.array_equal(drawn[0][1], drawn[2][1])
    many = ("--validation_image", listed.replace(";", ","), "--validation_mask", ",".join(map(str, masks)))
    for prompt, expected in (
        ("a red hat, studio photo", ["a red hat", "studio photo"]),  # one for each of two images
        ("a hat, red, studio photo", ["a hat, red, studio photo"] * 2),
        ("a red hat, studio photo;", ["a red hat, studio photo"] * 2),
    ):
        assert [case.prompt for case in cases(*mask, *many, "--validation_prompt", prompt)] == expected
    alone = ("--validation_image", images[0], "--validation_mask", masks[0])
    for files in ((), alone):
        drawn = cases(*mask, *files, "--validation_prompt", "a red hat, studio photo")
        assert [case.prompt for case in drawn] == ["a red hat, studio photo"]
    drawn = cases("--use_split_mask", "--validation_prompt", "a", "--validation_image", listed.replace(";", ","))
    assert [np.asarray(mask)[0, 0] for _, _, mask, *_ in drawn] == [255, 0, 255, 0]  # left and right
    drawn = cases("--use_split_mask", "--mask_only_right", "--validation_prompt", "a", "--validation_image", listed)
    assert [np.asarray(mask)[0, 0] for _, _, mask, *_ in drawn] == [0, 0]
    edit = ("--mode", "edit", "--target_data_dir", pairs / "targets", "--validation_prompt", "a")
    assert [np.asarray(mask).max() for _, _, mask, *_ in cases(*edit)] == [0]  # hides nothing
    assert cases(*mask) == []


def test_a_file_with_a_comma_in_its_name_is_one_file(tmp_path):
    name = tmp_path / "hat, red.png"
    assert influxedit.split_files(str(name)) == [str(tmp_path / "hat"), "red.png"]
    name.write_text("")
    assert influxedit.split_files(str(name)) == [str(name)]
    assert influxedit.split_files("x," * 3000) == ["x"] * 3000


def test_a_dataset_brings_partners_and_captions_in_columns(tiny_fill, pairs, tmp_path):
    import datasets

    columns = {
        "image": [str(path) for path in sorted((pairs / "images").iterdir())],
        "after": [str(path) for path in sorted((pairs / "targets").iterdir())],
        "hole": [str(path) for path in sorted((pairs / "masks").iterdir())],
        "words": [path.read_text() for path in sorted((pairs / "captions").iterdir())],
    }
    dataset = datasets.Dataset.from_dict(columns)
    for column in ("image", "after", "hole"):
        dataset = dataset.cast_column(column, datasets.Image())
    dataset.to_parquet(tmp_path / "data" / "train.parquet")
    source = ("--dataset_name", tmp_path / "data", "--caption_column", "words", "--resolution", 32)
    source += ("--cache_dir", tmp_path / "cache")
    folder = ("--instance_data_dir", pairs / "images", "--caption_data_dir", pairs / "captions", "--resolution", 32)
    for from_dataset, from_folder in (
        (("--mode", "edit", "--target_column", "after"), ("--mode", "edit", "--target_data_dir", pairs / "targets")),
        (("--mask_column", "hole"), ("--mask_data_dir", pairs / "masks")),
    ):
        a, _ = dataset_of(tiny_fill, *source, *from_dataset)
        b, _ = dataset_of(tiny_fill, *folder, *from_folder)
        for left, right in zip(samples_of(a), samples_of(b), strict=True):
            assert left.keys() == right.keys()
            assert left["prompt"] == right["prompt"]
            assert torch.equal(left["pixel_values"], right["pixel_values"])
            assert torch.equal(left["mask"], right["mask"])
