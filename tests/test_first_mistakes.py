"""What someone with a folder of photos is told at the first try: one line or a few, the flag or file, the remedy."""

import importlib
import json
import zipfile

import pytest
import torch
import wandb
from PIL import Image
from safetensors.torch import save_file


TRAINERS = {
    "train_dreambooth_flux_advanced": ["--instance_data_dir", "{photos}", "--resolution", "32"],
    "train_omini": ["--instance_data_dir", "{photos}", "--target_size", "32", "--condition_type", "canny"],
    "train_influxedit": [
        *("--instance_data_dir", "{photos}", "--target_data_dir", "{others}", "--mode", "edit"),
        *("--resolution", "32"),
    ],
    "train_twinflow": ["--train_data_dir", "{photos}", "--resolution", "32", "--training", "lora"],
}
PROMPT = ["--instance_prompt", "a photo of sks dog"]

# {a folder: what it has}
FOLDERS = {
    "photos": ("a.jpg", "a.txt", "b.jpg", "b.txt"),
    "others": ("a.png", "b.png"),
    "empty": (),
    "nested": ("a/1.jpg", "a/2.jpg", "b/1.jpg"),
    "kohya": ("10_sks dog/1.jpg",),
    "heic": tuple(f"{i}.HEIC" for i in range(30)),
    "raw": tuple(f"{i}.CR2" for i in range(30)),
    "broken": tuple(f"{i}.png" for i in range(40)),
    "utf16": ("a.jpg", "a.txt"),
}


@pytest.fixture(scope="module")
def place(tiny_model, tiny_fill, tmp_path_factory):
    """Folders of photos and models as people have them; the working folder."""
    root = tmp_path_factory.mktemp("home")
    for folder, names in FOLDERS.items():
        (root / folder).mkdir()
        for name in names:
            path = root / folder / name
            path.parent.mkdir(exist_ok=True)
            if path.suffix in (".jpg", ".png") and folder != "broken":
                Image.new("RGB", (48, 32), "red").save(path)
            else:
                path.write_text("a photo of sks dog", "utf-16" if folder == "utf16" else "utf-8")
    with zipfile.ZipFile(root / "photos.zip", "w") as archive:
        archive.write(root / "photos" / "a.jpg")
    (root / "lora").mkdir()
    for name in ("lora.safetensors", "lora/pytorch_lora_weights.safetensors"):
        save_file({"transformer.x.lora_A.weight": torch.zeros(2, 2)}, root / name)
    save_file({"model.diffusion_model.input_blocks.0.0.weight": torch.zeros(1)}, root / "sdxl.safetensors")
    (root / "sd15" / "unet").mkdir(parents=True)
    (root / "sd15" / "model_index.json").write_text(json.dumps({"_class_name": "StableDiffusionPipeline"}))
    (root / "model").symlink_to(tiny_model)
    (root / "fill").symlink_to(tiny_fill)
    return root


def message(script, flags, place, capsys, monkeypatch):
    """What a command that cannot run says."""
    monkeypatch.chdir(place)
    model = "fill" if script == "train_influxedit" else "model"
    words = ["--pretrained_model_name_or_path", model, "--max_sequence_length", "8", "--output_dir", "out"]
    words += TRAINERS[script] + ([] if script == "train_twinflow" else PROMPT) + flags
    words = [word.replace("{photos}", "photos").replace("{others}", "others") for word in words]
    trainer = importlib.import_module(script)
    before = sorted(place.rglob("*"))
    try:
        args = trainer.parse_args(words)
        problems = trainer.find_examples(args)[1]
    except SystemExit as stop:
        assert stop.code == 2
        text = capsys.readouterr().err.split("error: ", 1)[1]
    else:
        from common.arguments import join_problems

        text = join_problems(problems)
    assert sorted(place.rglob("*")) == before
    return text


def data(script, folder):
    return ["--train_data_dir" if script == "train_twinflow" else "--instance_data_dir", folder]


# (the mistake, its flags, the words of the answer), in all four
DATA = [
    ("a folder that is not there", "fotos", ["fotos: no such folder"]),
    ("an archive", "photos.zip", ["photos.zip: a file", "unpack it"]),
    ("one photo", "photos/a.jpg", ["photos/a.jpg: a file", "give the folder it is in"]),
    ("an empty folder", "empty", ["empty: no images", "it is empty"]),
    ("a folder of folders", "nested", ["a/ with 2 images, b/ with 1 images", "give the folder that has the images"]),
    ("kohya's folder of folders", "kohya", ["10_sks dog/ with 1 images", "give the folder that has the images"]),
    ("an iPhone's photos", "heic", [".HEIC is not read", "PNG or JPEG", "and 20 more"]),
    ("a camera's raw files", "raw", ["no images (.png, .jpg", "0.CR2", "and 20 more"]),
    ("files that are no images", "broken", ["not a readable image", "and 30 more of this kind"]),
    ("captions in UTF-16", "utf16", ["a.txt: not UTF-8 text"]),
]


@pytest.mark.parametrize("script", TRAINERS)
def test_a_folder_that_does_not_serve(script, place, capsys, monkeypatch):
    for mistake, folder, words in DATA:
        text = message(script, data(script, folder), place, capsys, monkeypatch)
        if script == "train_influxedit" and folder == "broken":  # whose targets are missing, first of all
            words = ["needs one image", "more of this kind"]
        assert all(word in text for word in words), (mistake, text)
        assert len(text.splitlines()) <= 25, (mistake, text)


MODELS = [
    ("a LoRA", "lora.safetensors", ["a LoRA, which belongs to --lora_path"]),
    ("the folder of a LoRA", "lora", ["holds a LoRA, which belongs to --lora_path"]),
    ("Stable Diffusion 1.5", "sd15", ["holds a StableDiffusionPipeline", "needed is"]),
    ("a folder of photos", "photos", ["neither a folder with", "it has no transformer/config.json"]),
    ("a folder that is not there", "flux", ["neither a folder with", "nor a Hub id like black-forest-labs/"]),
    (
        "a gated model",
        "black-forest-labs/FLUX.9",
        ["accept its terms at https://huggingface.co/black-forest-labs/FLUX.9"],
    ),
]


@pytest.mark.parametrize("script", TRAINERS)
def test_a_model_that_does_not_serve(script, place, capsys, monkeypatch):
    for mistake, model, words in MODELS:
        text = message(script, ["--pretrained_model_name_or_path", model], place, capsys, monkeypatch)
        assert all(word in text for word in words), (mistake, text)
        assert len(text.splitlines()) == 1, (mistake, text)
    text = message(script, ["--pretrained_model_name_or_path", "sdxl.safetensors"], place, capsys, monkeypatch)
    expected = "not the file of FLUX.1" if script == "train_dreambooth_flux_advanced" else "a single file; needed is"
    assert expected in text


FLAGS = [
    (
        "results among the photos",
        "--output_dir photos",
        ["--output_dir photos is --", "which is read"],
    ),
    ("a short name", "--lr 1e-4", ["--lr: no flag has this name; did you mean --learning_rate"]),
    ("a dash", "--learning-rate 1e-4", ["did you mean --learning_rate?"]),
    ("no rank", "--rank 0", ["--rank", "0 is out of range", "at least 1"]),
    ("no checkpoint", "--resume_from_checkpoint checkpoint-5", ["no checkpoint there; use latest"]),
    ("two prompts", "--validation_prompt dog cat", ["'cat' belongs to no flag: --validation_prompt takes one"]),
    ("no quotes", "--validation_prompt a red dog", ["'red dog' belongs to no flag", "in quotes"]),
]


@pytest.mark.parametrize("script", TRAINERS)
def test_flags_that_do_not_serve(script, place, capsys, monkeypatch):
    for mistake, flags, words in FLAGS:
        text = message(script, flags.split(), place, capsys, monkeypatch)
        assert all(word in text for word in words), (mistake, text)
    if script in ("train_dreambooth_flux_advanced", "train_twinflow"):
        text = message(script, ["--resolution", "512x768"], place, capsys, monkeypatch)
        assert "512x768: expected one side" in text
        assert "--aspect_ratio_buckets" in text


@pytest.mark.parametrize("script", TRAINERS)
def test_wandb_without_a_key_is_said_before_a_model_is_loaded(script, place, capsys, monkeypatch, tmp_path, wandb_dir):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.delenv("WANDB_MODE", raising=False)
    wandb.teardown()  # it reads the environment once
    text = message(script, ["--report_to", "wandb"], place, capsys, monkeypatch)
    assert "--report_to wandb: not logged in" in text
    assert "wandb login" in text


def test_latest_without_a_checkpoint_is_said(train, short_runs, tmp_path, capsys):
    script = "train_dreambooth_flux_advanced"
    flags = ["--resume_from_checkpoint", "latest", "--max_train_steps", 1, "--output_dir", tmp_path / "run"]
    train(script, *short_runs[script], *flags)
    assert "this run starts at step 0" in capsys.readouterr().out


@pytest.mark.parametrize("script", TRAINERS)
def test_a_configuration_for_deepspeed_is_said(script, place, capsys, monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    text = message(script, [], place, capsys, monkeypatch)
    assert "DEEPSPEED: not supported" in text
    assert "--fsdp" in text
