"""train_omini.py: bad input is one clear message, exit code 2, before any model is loaded, and nothing written."""

import json
from types import SimpleNamespace

import common.latents
from common.checkpoints import CHECKSUMS, checksums

import numpy as np
import pytest
from conftest import ROOT
from PIL import Image

import train_omini as omini


@pytest.fixture
def world(tiny_model, pictures, tmp_path):
    """Names that stand for paths in the table below."""
    folders = {
        name: tmp_path / name
        for name in ("empty", "bare", "masks", "white", "black", "small", "pairs", "posed", "listed", "wide")
    }
    for name, folder in folders.items():
        folder.mkdir()
        if name != "empty":
            Image.new("RGB", (32, 32), "red").save(folder / "a.png")
    for name, size, value in (("masks", 32, 99), ("white", 32, 255), ("black", 32, 0), ("small", 16, 255)):
        mask = np.full((size, size), value, dtype=np.uint8)
        mask[:16] = value if name in ("white", "black") else 255
        Image.fromarray(mask).save(folders[name] / "m.png")
        record = {"file_name": "a.png", "text": "x", "hole": "m.png"}
        (folders[name] / "metadata.jsonl").write_text(json.dumps(record))
    (folders["posed"] / "metadata.jsonl").write_text(
        json.dumps({"file_name": "a.png", "pose": "none.png", "text": "x"})
    )
    Image.new("RGB", (48, 32)).save(folders["wide"] / "p.png")
    (folders["wide"] / "metadata.jsonl").write_text(json.dumps({"file_name": "a.png", "pose": "p.png", "text": "x"}))
    (folders["listed"] / "metadata.jsonl").write_text(json.dumps({"file_name": "a.png", "text": ["x"]}))
    (tmp_path / "fill" / "transformer").mkdir(parents=True)
    config = {"_class_name": "FluxTransformer2DModel", "in_channels": 384}
    (tmp_path / "fill" / "transformer" / "config.json").write_text(json.dumps(config))
    checkpoint = tmp_path / "earlier" / "checkpoint-5"
    checkpoint.mkdir(parents=True)
    (checkpoint / "trainer_state.json").write_text(json.dumps({"global_step": 5, "condition_type": "['fill']"}))
    (checkpoint / CHECKSUMS).write_text(json.dumps(checksums(checkpoint)))
    items = "class Items:\n    def __len__(self): return 1\n    def __getitem__(self, i): return {}\n"
    items += "class Moving:\n    def __len__(self): return 2\n    def __getitem__(self, i):\n"
    items += "        from PIL import Image\n        image = Image.new('RGB', (32, 32))\n"
    items += "        return {'image': image, 'description': 'x', 'condition_0': image, 'position_delta_0': (0, i)}\n"
    items += "class Arrays(Moving):\n    def __getitem__(self, i):\n"
    items += "        import torch\n        return {**super().__getitem__(0), 'condition_0': torch.zeros(5, 32, 32)}\n"
    (tmp_path / "data.py").write_text(items)
    (tmp_path / "file").write_text("")
    (tmp_path / "truncated.tar").write_bytes(b"nothing of a tar")
    names = ("nowhere", "file", "fill", "out", "earlier", "data.py", "truncated.tar")
    return {
        **folders,
        **{name.replace(".", "_"): tmp_path / name for name in names},
        "model": tiny_model,
        "pictures": pictures,
    }


# flags that follow a working command, and what the message must say
BAD = [
    ("--condition_type cany", "--condition_type: invalid choice: 'cany'"),
    ("--target_size 40", "--target_size: 40: expected SIDE or WIDTHxHEIGHT"),
    ("--condition_size 32x40", "--condition_size: 32x40: expected SIDE or WIDTHxHEIGHT"),
    ("--condition_size 32,48", "--condition_size: 32,48: expected SIDE or WIDTHxHEIGHT, such as 768x512"),
    ("--condition_size 32 32", "--condition_size has 2 values for the 1 of --condition_type"),
    ("--target_size 64 --condition_size 32x16", "--condition_size 32x16 of canny is not --target_size 64x64 scaled"),
    ("--position_delta 4", "--position_delta: 4: expected a pair DOWN,RIGHT in tokens of 16 pixels"),
    ("--position_delta 0,1 0,2", "--position_delta has 2 values for the 1 of --condition_type"),
    ("--position_scale 0", "--position_scale: 0 is out of range: it must be above 0"),
    ("--condition_type custom", "--condition_column names 0 columns for 1 custom conditions"),
    ("--condition_column pose", "--condition_column names 1 columns for 0 custom conditions"),
    ("--condition_type custom --condition_column pose", "metadata.jsonl: no such file; write a line for each image"),
    (
        "--condition_type custom --condition_column pose --instance_data_dir {posed}",
        "{posed}/metadata.jsonl: column pose names files that are not there",
    ),
    ("--mask_column hole", "--mask_column hole needs --condition_type fill or token_integration"),
    ("--condition_type fill --mask_column x --dataset_name d --image_column x", "--mask_column x is --image_column"),
    (
        "--condition_type custom --condition_column image --dataset_name d",
        "--condition_column image is --image_column",
    ),
    (
        "--condition_type custom fill --condition_column pose --mask_column pose",
        "--condition_column pose is --mask_column, too",
    ),
    (
        "--condition_type canny coloring --validation_prompt x --validation_image {wide}/a.png {wide}/p.png",
        "conditions that lie on one image must have one shape",
    ),
    (
        "--condition_type custom --condition_column pose --instance_data_dir {wide}",
        "{wide}/a.png, pose: a condition that lies on it must have the shape of its image, 32 x 32, not 48 x 32",
    ),
    (
        "--condition_type token_integration --mask_column hole --instance_data_dir {white}",
        "{white}/a.png, hole: the mask is all white",
    ),
    (
        "--condition_type token_integration --mask_column hole --instance_data_dir {black}",
        "{black}/a.png, hole: the mask is all black",
    ),
    (
        "--condition_type fill --mask_column hole --instance_data_dir {small}",
        "{small}/a.png, hole: the mask is 16 x 16 pixels, its image 32 x 32",
    ),
    ("--condition_type token_integration --condition_size 16", "token_integration shares the image's tokens"),
    ("--condition_type token_integration --position_delta 0,-2", "token_integration shares the image's tokens"),
    ("--condition_type token_integration --target_size 16", "--target_size 16 is too small for a mask"),
    ("--condition_type depth_pred canny", "depth_pred generates depth maps: it goes with no other condition"),
    ("--condition_type subject --image_size 32 --padding 4 --instance_prompt x", "hold no pair of --image_size 32"),
    ("--pretrained_model_name_or_path {fill}", "holds a FluxTransformer2DModel with 384 input channels"),
    ("--pretrained_model_name_or_path {nowhere}", "neither a folder with a FLUX pipeline nor a Hub id"),
    ("--condition_type subject subject", "--condition_type subject can be given once"),
    ("--condition_type depth --depth_model {nowhere}", "--depth_model {nowhere}: cannot be loaded"),
    ("--condition_type depth --depth_model {model}/text_encoder_2", "is a t5, which estimates no depth"),
    ("--instance_data_dir {listed}", "{listed}/a.png: its caption must be text and not empty, not ['x']"),
    ("--target_modules .*nothing", "--target_modules .*nothing: matches no linear layer"),
    ("--target_modules (", "--target_modules (: not a regular expression"),
    (
        r"--target_modules (.*x_embedder|.*(?<!single_)transformer_blocks\\.[0-9]+\\.attn\\.to_k)",
        "its part .*(?<!single_)transformer_blocks",
    ),
    ("--target_modules x_embedder|.*atn.to_q", "its part .*atn.to_q matches no linear layer"),
    ("--target_modules .*attn.*", "condition tokens do not pass transformer_blocks.0.attn.add_"),
    ("--lora_path {file}", "--lora_path {file}: not a readable LoRA file"),
    ("--lora_path {file} {file}", "--lora_path names 2 files for 1 adapters: canny"),
    ("--optimizer adamw --learning_rate 1", "--learning_rate 1 is Prodigy's: AdamW wants about 1e-4"),
    ("--learning_rate 1e-4", "--learning_rate 0.0001: Prodigy finds the rate itself and wants about 1"),
    ("--use_8bit_adam", "--use_8bit_adam has no effect on --optimizer prodigy"),
    ("--prodigy_beta3 0.9 --optimizer sgd --learning_rate 0.1", "--prodigy_beta3 has no effect on --optimizer sgd"),
    ("--drop_text_prob 2", "--drop_text_prob: 2 is out of range"),
    ("--streaming", "--streaming needs --dataset_name or --data_files"),
    ("--validation_prompt x", "--validation_prompt and --validation_image need each other"),
    ("--validation_prompt x --validation_image {nowhere}", "--validation_image {nowhere}: no such file"),
    ("--instance_data_dir {empty}", "--instance_data_dir {empty}: no images"),
    ("--instance_data_dir {bare}", "no caption for {bare}/a.png"),
    ("--instance_data_dir {nowhere}", "--instance_data_dir {nowhere}: no such folder"),
    ("--dataset_name x/y", "exactly one of --instance_data_dir, --dataset_name, --data_files, --dataset_class"),
    ("--output_dir {file}", "a file of this name is in the way"),
    ("--output_dir {earlier}", "holds checkpoint-5 of an earlier run"),
    (
        "--output_dir {earlier} --resume_from_checkpoint latest",
        "condition_type was ['fill'] there and is ['canny'] now",
    ),
    ("--lr_scheduler cosine --max_train_steps 300", "--lr_warmup_steps 500 must be less than the 300 steps"),
    ("--rank 1000000000", "less than "),
]
OWN_SOURCE = [
    ("--data_files {truncated_tar}", "--data_files {truncated_tar}: cannot be loaded"),
    ("--data_files {nowhere}", "--data_files {nowhere}: cannot be loaded"),
    ("--data_files {nowhere} --streaming", "--streaming needs --max_train_steps"),
    ("--data_files {nowhere} --streaming --max_train_steps 1 --cache_latents", "--cache_latents needs all images"),
    (
        "--data_files {nowhere} --streaming --max_train_steps 1 --condition_type depth",
        "depth and depth_pred estimate depth before training",
    ),
    ("--dataset_name {bare} --image_column photo", "--dataset_name {bare}: no column photo; it has image"),
    (
        "--dataset_name {bare} --condition_type custom --condition_column pose",
        "--dataset_name {bare}: no column pose; it has image",
    ),
    ("--dataset_class {nowhere}.py:A --condition_type custom", "{nowhere}.py:A: cannot be read"),
    ("--dataset_class {data_py}:Items", "--dataset_class brings its own conditions"),
    ("--dataset_class {data_py}:Items --condition_type custom", "item 0 has 0 conditions for 1 of --condition_type"),
    (
        "--dataset_class {data_py}:Moving --condition_type custom",
        "position_delta and position_scale differ between its items",
    ),
    (
        "--dataset_class {data_py}:Arrays --condition_type custom",
        "{data_py}:Arrays[0], condition_0: not a readable image",
    ),
    (
        "--dataset_class {data_py}:Moving --condition_type custom --position_delta 0,1",
        "--position_delta and --position_scale have no effect with --dataset_class",
    ),
]


@pytest.fixture
def no_models(monkeypatch):
    """Loading a model is an error."""

    def load(*args, **kwargs):
        raise AssertionError("a model was loaded")

    monkeypatch.setattr(omini, "load_model", load)
    monkeypatch.setattr(omini, "PromptEncoder", load)


@pytest.mark.parametrize(("flags", "message"), BAD + OWN_SOURCE, ids=[flags for flags, _ in BAD + OWN_SOURCE])
def test_bad_input_is_one_clear_error(train, world, no_models, capsys, monkeypatch, tmp_path_factory, flags, message):
    source = "" if (flags, message) in OWN_SOURCE else "--instance_data_dir {pictures} "
    command = "--pretrained_model_name_or_path {model} --output_dir {out} --report_to none --condition_type canny "
    command += f"--cache_dir {tmp_path_factory.mktemp('cache')} --target_size 32 {source}"
    before = sorted(world["out"].parent.rglob("*"))
    with pytest.raises(SystemExit) as stop:
        train("train_omini", *f"{command} {flags}".format(**world).split())
    error = capsys.readouterr().err
    assert stop.value.code == 2
    assert message.format(**world) in error
    assert ": error: " in error
    written = {path for path in world["out"].parent.rglob("*") if "__pycache__" not in path.parts}
    assert sorted(written) == before


def test_all_problems_come_in_one_message(world, no_models, train, capsys):
    flags = "--pretrained_model_name_or_path {nowhere} --condition_type custom --output_dir {file} --use_8bit_adam"
    with pytest.raises(SystemExit):
        train("train_omini", *flags.format(**world).split())
    error = capsys.readouterr().err.split("error:")[1]
    for problem in ("exactly one of", "nor a Hub id", "--condition_column names 0", "in the way", "has no effect"):
        assert problem in error


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("--dataset_class {data_py}:Missing --condition_type custom", "cannot be read"),
        ("--dataset_name {nowhere} --streaming --max_train_steps 5 --condition_type canny", "--dataset_name"),
        ("--instance_data_dir {nowhere} --condition_type canny", "--instance_data_dir"),
    ],
)
def test_problems_of_data_and_run_come_in_one_message(world, no_models, train, capsys, source, message):
    flags = "--pretrained_model_name_or_path {model} --output_dir {out} --report_to none --target_size 32 "
    flags += f"--lr_scheduler linear --lr_warmup_steps 500 --max_train_steps 5 {source}"
    with pytest.raises(SystemExit):
        train("train_omini", *flags.format(**world).split())
    error = capsys.readouterr().err.split("error:")[1]
    assert message in error
    assert "--lr_warmup_steps 500 must be less than the 5 steps" in error


def test_defaults_of_places_and_sizes(world):
    command = "--pretrained_model_name_or_path {model} --instance_data_dir {pictures} --target_size 96x64"
    parse = lambda flags: omini.condition_specs(omini.parse_args(f"{command} {flags}".format(**world).split()))  # noqa: E731
    (canny,) = parse("--condition_type canny")
    assert (canny.size, canny.position_delta, canny.position_scale) == ((64, 96), (0, 0), 1)
    (compact,) = parse("--condition_type canny --condition_size 48x32")
    assert (compact.size, compact.position_scale) == ((32, 48), 2)
    (subject,) = parse("--condition_type subject --condition_size 32")
    assert (subject.position_delta, subject.position_scale) == ((0, -2), 1)
    (sr,) = parse("--condition_type sr")
    assert (sr.size, sr.position_delta) == ((32, 48), (0, -3))
    several = parse("--condition_type canny fill --adapter_per_condition --position_delta 0,0 0,-6")
    assert [(c.adapter, c.position_delta) for c in several] == [("canny", (0, 0)), ("fill", (0, -6))]
    assert {condition.adapter for condition in parse("--condition_type canny fill")} == {"canny_fill"}


def test_images_beside_the_generated_one_stand_side_by_side(world):
    command = "--pretrained_model_name_or_path {model} --instance_data_dir {pictures} --target_size 64"
    flags = "--condition_type subject subject sr --condition_column a b --condition_size 64 32 32"
    specs = omini.condition_specs(omini.parse_args(f"{command} {flags}".format(**world).split()))
    assert [spec.position_delta for spec in specs] == [(0, -4), (0, -6), (0, -8)]


def test_the_alternatives_of_a_pattern():
    for pattern, parts in {
        "a|b": ["a", "b"],
        r"(a|b\|c|[|)]|(d|e)f)": ["a", r"b\|c", "[|)]", "(d|e)f"],
        "(?:a|b)": ["a", "b"],
        "(a|b)(c|d)": ["(a|b)(c|d)"],
        "(a)|(b)": ["(a)", "(b)"],
    }.items():
        assert omini.alternatives_of(pattern) == parts


def test_a_doubled_backslash_is_explained(world, no_models, train, capsys):
    flags = (
        "--pretrained_model_name_or_path {model} --instance_data_dir {pictures} --output_dir {out} --target_size 32"
    )
    doubled = r"(.*x_embedder|.*transformer_blocks\\.[0-9]+\\.attn\\.to_q)"
    with pytest.raises(SystemExit):
        train("train_omini", *flags.format(**world).split(), "--condition_type", "canny", "--target_modules", doubled)
    assert "write a single one" in capsys.readouterr().err


def test_prompts_that_do_not_fit_on_the_disk_are_refused(world, no_models, train, capsys, monkeypatch):
    monkeypatch.setattr(common.latents, "shutil", SimpleNamespace(disk_usage=lambda folder: SimpleNamespace(free=100)))
    flags = (
        "--pretrained_model_name_or_path {model} --instance_data_dir {pictures} --output_dir {out} --target_size 32"
    )
    with pytest.raises(SystemExit):
        train("train_omini", *f"{flags} --condition_type canny --report_to none".format(**world).split())
    assert "or give --no-cache_prompts" in capsys.readouterr().err


def test_the_reference_regex_and_adapters_of_another_rank(world, tmp_path):
    """The pattern that OminiControl's configuration files have is taken as it stands, and means the default."""
    kinds = {
        r".*(?<!single_)transformer_blocks\.[0-9]+": [
            "norm1.linear",
            "attn.to_k",
            "attn.to_q",
            "attn.to_v",
            "attn.to_out.0",
            "ff.net.2",
        ],
        r".*single_transformer_blocks\.[0-9]+": [
            "norm.linear",
            "proj_mlp",
            "proj_out",
            "attn.to_k",
            "attn.to_q",
            "attn.to_v",
            "attn.to_out",
        ],
    }
    parts = [".*x_embedder", *(rf"{b}\.{name}" for b, names in kinds.items() for name in names)]
    from diffusers import FluxTransformer2DModel

    transformer = FluxTransformer2DModel.from_pretrained(world["model"], subfolder="transformer")
    names = lambda pattern: [name for name, _ in omini.target_layers(transformer, pattern)]  # noqa: E731
    assert names(f"({'|'.join(parts)})") == names(omini.TARGET_MODULES)
    assert omini.check_alternatives(transformer, f"({'|'.join(parts)})") == []  # it names a layer that FLUX lacks
    attention_only = "|".join(part for part in parts if part[-1] in "qkv")
    assert omini.check_alternatives(transformer, f"({attention_only})") == []
    assert {name.rpartition(".")[2] for name in names(f"({attention_only})")} == {"to_q", "to_k", "to_v"}


# The values of the six published configurations; other values are the same in all of them.
PUBLISHED = {
    "subject": {"condition_type": ["subject"], "image_size": 512, "padding": 8, "rank": 16, "lora_alpha": 16},
    "spatial_alignment": {"condition_type": ["canny"]},
    "multi_condition": {"condition_type": ["canny", "deblurring", "depth", "fill"]},
    "feature_reuse": {"condition_type": ["canny"], "independent_condition": True},
    "compact_token_representation": {
        "condition_type": ["canny"],
        "condition_size": [(256, 256)],
        "position_scale": [2.0],
    },
    "token_integration": {"condition_type": ["token_integration"]},
}
IN_ALL = {
    "mixed_precision": "bf16",
    "independent_condition": False,
    "train_batch_size": 1,
    "gradient_accumulation_steps": 1,
    "dataloader_num_workers": 5,
    "checkpointing_steps": 1000,
    "validation_steps": 100,
    "max_train_steps": None,
    "num_train_epochs": 1000000,
    "gradient_checkpointing": True,
    "condition_size": [(512, 512)],
    "target_size": (512, 512),
    "drop_text_prob": 0.1,
    "drop_image_prob": 0.1,
    "rank": 4,
    "lora_alpha": 4,
    "target_modules": None,
    "optimizer": "prodigy",
    "learning_rate": 1,
    "prodigy_use_bias_correction": True,
    "prodigy_safeguard_warmup": True,
    "adam_weight_decay": 0.01,
    "max_grad_norm": 0.5,
    "guidance_scale": 1,
    "timestep_sampling": "sigmoid",
    "lr_scheduler": "constant",
    "position_scale": None,
    "position_delta": None,
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_the_published_configurations(world, tmp_path, name):
    """examples/omini/NAME.args has the values of OminiControl's NAME.yaml."""
    from transformers import DepthAnythingConfig

    DepthAnythingConfig().save_pretrained(tmp_path / "depth-model")
    flags = [f"@{ROOT}/examples/omini/{name}.args", "--pretrained_model_name_or_path", world["model"]]
    flags += ["--instance_data_dir", world["pictures"], "--depth_model", tmp_path / "depth-model"]
    flags += ["--validation_prompt", "x", "--validation_image", world["pictures"] / "1.png"]
    args = omini.parse_args([str(flag) for flag in [*flags, "--output_dir", tmp_path / "run"]])
    expected = IN_ALL | PUBLISHED[name]
    assert {flag: vars(args)[flag] for flag in expected} == expected
    places = [(spec.position_delta, spec.position_scale) for spec in omini.condition_specs(args)]
    scale = 2 if name == "compact_token_representation" else 1
    assert places == [((0, -32) if name == "subject" else (0, 0), scale)] * len(args.condition_type)
