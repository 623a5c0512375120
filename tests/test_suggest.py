"""examples/suggest.py: what it sees in photos, and that the command it prints fits the card and runs."""

import argparse
import dataclasses
import json
import os
import random
import shlex
import shutil
import subprocess
from pathlib import Path

from common.data import read_folder

import numpy as np
import pytest
import tiny_backbones
import torch
from conftest import ROOT
from diffusers import AutoencoderKL
from PIL import ExifTags, Image, ImageFilter
from test_estimate_memory import model_like

import train_dreambooth_flux_advanced as dreambooth
import train_influxedit
import train_omini
from examples import estimate_memory, suggest
from examples.estimate_memory import MODELS, clip_l, estimate, needed, training_step


FLUX1, FILL = "FLUX.1-dev", "FLUX.1-Fill-dev"


def photo(seed, width=300, height=300):
    """Squares of many colours, and noise: sharp, and unlike that of another seed."""
    generator = np.random.default_rng(seed)
    squares = Image.fromarray(generator.integers(0, 255, (6, 6, 3), np.uint8)).resize((width, height), 0)
    noise = generator.integers(-20, 20, (height, width, 1))
    return Image.fromarray((np.asarray(squares) + noise).clip(0, 255).astype(np.uint8))


def write_photos(folder, count, *, captions=False, sides=(300,)):
    folder.mkdir()
    for i in range(count):
        photo(i, random.Random(i).choice(sides), random.Random(-i).choice(sides)).save(folder / f"{i:02}.jpg")
        if captions:
            (folder / f"{i:02}.txt").write_text(f"a hill in summer, number {i}")
    return folder


def looked_at(folder):
    """{name: Photo} of a folder, and the problems."""
    examples, _ = read_folder(folder)
    found = suggest.map_examples(suggest.look, examples)
    photos = {Path(e.name).name: seen for e, (seen, problem) in zip(examples, found, strict=True) if not problem}
    return photos, [problem for _, problem in found if problem]


def tiny_vae():
    kinds = {"down_block_types": ("DownEncoderBlock2D",) * 4, "up_block_types": ("UpDecoderBlock2D",) * 4}
    return AutoencoderKL(**kinds, block_out_channels=(8, 8, 16, 16), latent_channels=16, norm_num_groups=4)


THREE_BLOCKS = model_like(FLUX1, 1)
THREE_BLOCKS = dataclasses.replace(
    THREE_BLOCKS,
    config=THREE_BLOCKS.config | {"num_attention_heads": 24},
    text_encoders=(clip_l,),
    vae=tiny_vae,
)
STEPS = {}  # what steps of this model need, by their flags


def known_step(model, args):
    flags = str(sorted(vars(args).items()))
    if flags not in STEPS:
        STEPS[flags] = training_step(model, args)
    return STEPS[flags]


@pytest.fixture
def small_model(monkeypatch):
    """A FLUX.1 of three blocks in the place of the real one, whose estimates take a minute."""
    monkeypatch.setitem(MODELS, FLUX1, THREE_BLOCKS)
    config = THREE_BLOCKS.config | {"in_channels": 384, "out_channels": 64}
    conditions = THREE_BLOCKS.conditions | {"encoder_hidden_states": (512, 256)}
    fill = dataclasses.replace(THREE_BLOCKS, config=config, channels=96, conditions=conditions)
    monkeypatch.setitem(MODELS, FILL, fill)
    monkeypatch.setattr(estimate_memory, "training_step", known_step)
    monkeypatch.setattr(suggest, "SWAP_STEP", 1)


def suggested(capsys, folder, *flags):
    """(words of the printed command after the script, all that was printed)."""
    capsys.readouterr()
    suggest.main([*map(str, folder if isinstance(folder, list) else [folder]), *flags])
    printed = capsys.readouterr().out
    command = printed.split("Train with:\n\n")[1].split("\n\nExpected")[0]
    return shlex.split(command.replace("\\\n", ""))[2:], printed


def trainer_args(words, model, capsys, trainer=dreambooth):
    """What the trainer reads in a command, which has no flag without effect; `model` is tiny and may have fewer blocks
    than are swapped."""
    swap = [word for word in words if word.startswith("--blocks_to_swap=")]
    words = [word for word in words if word not in swap]
    capsys.readouterr()
    args = trainer.parse_args([*words, "--pretrained_model_name_or_path", str(model)])
    assert capsys.readouterr().err == ""
    args.blocks_to_swap = int(swap[0].partition("=")[2]) if swap else None
    return args


def estimated_gigabytes(args, model_name):
    """What the flags that a trainer has read need of a card."""
    known = vars(estimate_memory.parse_args(["--model", model_name]))
    flags = known | {name: value for name, value in vars(args).items() if name in known}
    flags["blocks_to_swap"] = args.blocks_to_swap or 0
    if args.with_prior_preservation:
        flags["train_batch_size"] *= 2
    return needed(max(estimate(MODELS[model_name], argparse.Namespace(**flags)).peaks.values()))


# ---------------------------------------------------------------------------------------------------------------------
# Photos
# ---------------------------------------------------------------------------------------------------------------------


def test_photos_are_looked_at(tmp_path):
    folder = write_photos(tmp_path / "photos", 4)
    photo(1).resize((200, 200)).save(folder / "copy.jpg", quality=80)
    photo(5).filter(ImageFilter.GaussianBlur(6)).save(folder / "soft.png")
    turned = Image.Exif()
    turned[ExifTags.Base.Orientation] = 6
    photo(6, 500, 300).save(folder / "turned.jpg", exif=turned)
    see_through = photo(7)
    see_through.putalpha(100)
    see_through.save(folder / "see_through.png")
    (folder / "broken.jpg").write_bytes((folder / "00.jpg").read_bytes()[:1000])

    photos, problems = looked_at(folder)
    assert len(problems) == 1 and "broken.jpg" in problems[0]
    assert photos["turned.jpg"].size == (500, 300)  # height, width
    lines = suggest.describe_photos(photos)
    assert lines["shorter sides"].startswith("200 to 300 pixels")
    assert all(lines[label].startswith("1") for label in ("turned by EXIF", "transparent", "long"))
    alike, small, blurred = suggest.doubts(photos, 256)
    assert "01.jpg" in alike and "copy.jpg" in alike
    assert "copy.jpg" in small and "256" in small
    assert "soft.png" in blurred


def test_different_photos_are_not_alike(tmp_path):
    photos, _ = looked_at(write_photos(tmp_path / "photos", 40))
    assert suggest.look_alike(photos) == []


# ---------------------------------------------------------------------------------------------------------------------
# Commands
# ---------------------------------------------------------------------------------------------------------------------


def test_eight_photos_are_a_subject(small_model, tiny_model, tmp_path, monkeypatch, capsys):
    folder = write_photos(tmp_path / "my photos", 8)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "sks-toy-cat").mkdir()
    words, printed = suggested(capsys, folder, "--gpu", "8GB", "--class_word", "toy cat")
    args = trainer_args(words, tiny_model, capsys)
    assert args.instance_prompt == "a photo of TOK" and args.class_prompt.startswith("TOK=>toy cat,dog,")
    assert args.with_prior_preservation and args.prior_target == "base"
    assert args.resolution == 256  # those of 300 pixels are not enlarged
    assert str(args.output_dir) == "sks-toy-cat-1"
    assert "2000 steps, each of 2 images and 2 class images" in printed.replace("\n" + " " * 22, " ")


@pytest.mark.slow
@pytest.mark.parametrize(("card", "quantization"), [(8, "none"), (3.6, "none"), (2.2, "nf4")])
def test_the_command_runs(small_model, train, tiny_model, tmp_path, monkeypatch, capsys, card, quantization):
    folder = write_photos(tmp_path / "my photos", 8)
    monkeypatch.chdir(tmp_path)
    words, _ = suggested(capsys, folder, "--gpu", f"{card}GB", "--class_word", "toy cat")
    args = trainer_args(words, tiny_model, capsys)
    assert args.quantize_base == quantization and estimated_gigabytes(args, FLUX1) <= card
    small = ["--resolution", 32, "--num_class_images", 2, "--num_validation_images", 1, "--max_sequence_length", 8]
    small += ["--pretrained_model_name_or_path", tiny_model, "--report_to", "none", "--max_train_steps", 2]
    torch.compiler.set_stance("force_eager")
    try:
        train("train_dreambooth_flux_advanced", *words, *small)
    finally:
        torch.compiler.set_stance("default")
    assert (tmp_path / "sks-toy-cat" / "pytorch_lora_weights.safetensors").exists()


def test_many_photos_with_captions_are_a_style(small_model, tiny_model, tmp_path, monkeypatch, capsys):
    folder = write_photos(tmp_path / "photos", 40, captions=True)
    words, printed = suggested(capsys, folder, "--gpu", "8GB")
    args = trainer_args(words, tiny_model, capsys)
    assert args.instance_prompt == "sks style" and args.caption_dropout_to == "instance_prompt"
    assert not args.with_prior_preservation and "--preserve_prompts" in printed
    assert args.caption_dropout == 0.2 and not args.train_text_encoder_ti
    assert "more than 20" in printed
    few, _ = suggested(capsys, folder, "--gpu", "8GB", "--kind", "subject")
    args = trainer_args(few, tiny_model, capsys)
    assert args.instance_prompt == "sks thing" and not args.with_prior_preservation  # no caption has these words
    for file in folder.glob("*.txt"):
        file.write_text("sks thing on a hill")
    few, _ = suggested(capsys, folder, "--gpu", "8GB", "--kind", "subject")
    assert trainer_args(few, tiny_model, capsys).class_prompt.startswith("sks thing=>")


def test_what_the_trainer_refuses_is_named_and_the_rest_is_used(small_model, tiny_model, tmp_path, capsys):
    folder = write_photos(tmp_path / "photos", 6, sides=(280, 400, 520))
    (folder / "broken.jpg").write_bytes(b"no image")
    (folder / "phone.heic").write_bytes(b"")
    (folder / "02.txt").write_text("")
    words, printed = suggested(capsys, folder, "--gpu", "8GB")
    mend = printed.split("Mend this first")[1].split("\n\n")[0]
    assert all(name in mend for name in ("broken.jpg", "phone.heic", "02.jpg"))
    for name in ("broken.jpg", "phone.heic", "02.txt"):
        (folder / name).unlink()
    trainer_args(words, tiny_model, capsys)


def write_pairs(folder, column):
    """Photos with captions and a partner of each, named in a column of metadata.jsonl."""
    write_photos(folder, 6)
    write_photos(folder / "partners", 6)
    rows = []
    for i in range(6):
        rows.append({"file_name": f"{i:02}.jpg", "text": f"a hill, {i}", column: f"partners/{i:02}.jpg"})
    (folder / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def test_a_column_of_conditions_leads_to_omini(small_model, tiny_model, tmp_path, monkeypatch, capsys):
    folder = write_pairs(tmp_path / "poses", "pose")
    monkeypatch.chdir(tmp_path)
    words, printed = suggested(capsys, folder, "--gpu", "8GB")
    args = trainer_args(words, tiny_model, capsys, train_omini)
    assert (args.condition_type, args.condition_column) == (["custom"], ["pose"])
    assert args.target_size == (256, 256) and str(args.output_dir) == "pose"
    assert args.validation_prompt == "a hill, 0" and args.validation_image == [Path("poses/partners/00.jpg")]
    assert "pose" in printed.split("Why")[1] and "examples/omini/README.md" in printed
    command = printed.split("Train with:\n\n")[1].split("\n\nExpected")[0].replace("\\\n", "")
    read = estimate_memory.parse_args(shlex.split(command))
    assert read.condition_tokens > 0 and read.model == FLUX1


def test_a_condition_that_is_not_there_is_named(small_model, tiny_model, tmp_path, monkeypatch, capsys):
    folder = write_pairs(tmp_path / "poses", "pose")
    monkeypatch.chdir(tmp_path)
    (folder / "partners" / "00.jpg").unlink()
    words, printed = suggested(capsys, folder, "--gpu", "8GB")
    assert "partners/00.jpg" in printed.split("Mend this first")[1]
    assert "--validation_image poses/partners/01.jpg" in " ".join(words)
    shutil.rmtree(folder / "partners")
    with pytest.raises(SystemExit) as stop:
        suggest.main([str(folder), "--gpu", "8GB"])
    assert stop.value.code == 2 and "names files that are not there" in capsys.readouterr().err


def test_a_caption_that_ends_like_a_file_is_no_condition(tmp_path):
    rows = [{"file_name": f"{i}.png", "text": "a hill, as in hill.png" if i == 1 else "a hill"} for i in range(3)]
    (tmp_path / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert suggest.image_columns(tmp_path) == []


def test_a_first_row_without_a_condition_hides_no_column(small_model, tiny_model, tmp_path, monkeypatch, capsys):
    folder = write_pairs(tmp_path / "poses", "pose")
    monkeypatch.chdir(tmp_path)
    first, *others = (folder / "metadata.jsonl").read_text().splitlines()
    row = {name: value for name, value in json.loads(first).items() if name != "pose"}
    (folder / "metadata.jsonl").write_text("\n".join([json.dumps(row), *others]) + "\n")
    words, printed = suggested(capsys, folder, "--gpu", "8GB")
    assert "--condition_column pose" in " ".join(words)
    assert "00.jpg" in printed.split("Mend this first")[1]
    assert "--validation_image poses/partners/01.jpg" in " ".join(words)


@pytest.mark.parametrize("form", ["two folders", "a column"])
def test_edited_images_lead_to_influxedit(small_model, tiny_fill, tmp_path, monkeypatch, capsys, form):
    monkeypatch.chdir(tmp_path)
    if form == "two folders":
        folder = [write_photos(tmp_path / "before", 6, captions=True), write_photos(tmp_path / "after", 6)]
    else:
        folder = write_pairs(tmp_path / "pairs", "edited_file_name")
    words, printed = suggested(capsys, folder, "--gpu", "8GB")
    args = trainer_args(words, tiny_fill, capsys, train_influxedit)
    assert args.mode == "edit" and args.resolution == (256,) and args.validation_width == 256
    assert "Mend this" not in printed and "measured on no card" in " ".join(printed.split())
    if form == "two folders":
        assert args.target_data_dir == tmp_path / "after" and args.instance_data_dir == tmp_path / "before"
    else:
        assert (args.dataset_name, args.target_column) == (str(tmp_path / "pairs"), "edited")
        rows = (tmp_path / "pairs" / "metadata.jsonl").read_text()
        for column in ("caption", "note"):  # the second is none that holds captions
            (tmp_path / "pairs" / "metadata.jsonl").write_text(rows.replace('"text"', f'"{column}"'))
            words, _ = suggested(capsys, folder, "--gpu", "8GB")
            args = trainer_args(words, tiny_fill, capsys, train_influxedit)
            expected = ("caption", None) if column == "caption" else (None, "sks edit")
            assert (args.caption_column, args.instance_prompt) == expected
        rows = rows.replace("edited_file_name", "edited")
        (tmp_path / "pairs" / "metadata.jsonl").write_text(rows)
        _, printed = suggested(capsys, folder, "--gpu", "8GB")
        assert "edited_file_name" in printed.split("Mend this first")[1]


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["condition", "edit"])
def test_the_command_for_pairs_runs(small_model, train, tiny_model, tiny_fill, tmp_path, monkeypatch, capsys, kind):
    monkeypatch.chdir(tmp_path)
    folder = write_pairs(tmp_path / "pairs", {"condition": "pose", "edit": "edited_file_name"}[kind])
    words, _ = suggested(capsys, folder, "--gpu", "8GB")
    small = ["--report_to", "none", "--max_train_steps", 2, "--max_sequence_length", 8, "--lr_warmup_steps", 0]
    if kind == "condition":
        train("train_omini", *words, *small, "--pretrained_model_name_or_path", tiny_model, "--target_size", 32)
    else:
        small += ["--resolution", 32, "--validation_width", 32, "--validation_height", 32]
        torch.compiler.set_stance("force_eager")
        try:
            train("train_influxedit", *words, *small, "--pretrained_model_name_or_path", tiny_fill)
        finally:
            torch.compiler.set_stance("default")
    (output,) = tmp_path.glob("*/validation")
    assert len(list(output.iterdir())) == 2


def test_few_steps_have_a_page(tmp_path, capsys):
    suggest.main([str(tmp_path), "--kind", "few_steps"])
    printed = capsys.readouterr().out
    assert (ROOT / printed.split()[0]).is_file() and "train_twinflow.py" in printed


@pytest.mark.parametrize(
    "flags, message",
    [
        ("--kind condition", "a column with the file of each image's condition"),
        ("--kind edit", "give two folders"),
        ("photos --kind style", "takes one folder"),
        ("--model FLUX.1-Fill-dev", "train_dreambooth_flux_advanced.py trains FLUX.1-dev"),
        ("--kind edit --model FLUX.1-dev", "train_influxedit.py trains FLUX.1-Fill-dev"),
    ],
)
def test_what_does_not_go_together_is_refused(tmp_path, monkeypatch, capsys, flags, message):
    monkeypatch.chdir(tmp_path)
    write_photos(tmp_path / "photos", 5)
    with pytest.raises(SystemExit) as stop:
        suggest.main(["photos", *flags.split(), "--gpu", "12GB"])
    assert stop.value.code == 2 and message in capsys.readouterr().err


@pytest.mark.slow
def test_slower_ways_need_smaller_cards(small_model, tiny_model, tmp_path, capsys):
    """The printed command needs no more than the card by the estimator, and no way before it fits."""
    folder = write_photos(tmp_path / "photos", 5, sides=(520,))
    presets = []
    for card in (8.0, 3.5, 3.2, 2.4, 2.25, 1.9):
        words, printed = suggested(capsys, folder, "--gpu", f"{card}GB")
        needs = estimated_gigabytes(trainer_args(words, tiny_model, capsys), FLUX1)
        print(card, round(needs, 3), words[:4])
        assert needs <= card
        assert f"GPU                 {needs:.1f} GB of {card:.4g}" in printed
        presets.append(words[0])
    assert presets[0].endswith("best_quality.args") and presets[-1].endswith("low_memory.args")


def test_a_card_is_needed_and_must_be_large_enough(small_model, tmp_path, monkeypatch, capsys):
    folder = write_photos(tmp_path / "photos", 5)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for flags, words in (([], ("no GPU", "--gpu")), (["--gpu", "1GB"], ("needs", "klein"))):
        with pytest.raises(SystemExit) as stop:
            suggest.main([str(folder), *flags])
        assert stop.value.code == 2
        message = capsys.readouterr().err
        assert all(word in message for word in words)


@pytest.mark.parametrize("lacks", ["Python", "venv", "GB of disk", "network", "a folder that may be written"])
def test_the_quickstart_names_what_is_missing_before_it_installs(tmp_path, lacks):
    """With programs that say what those of such a machine would."""
    (tmp_path / "examples").mkdir()
    script = shutil.copy(ROOT / "examples" / "quickstart.sh", tmp_path / "examples")
    pip = 'mkdir -p .venv/bin; printf "#!/bin/sh\\nexit 1" > .venv/bin/python; chmod +x .venv/bin/python'
    programs = {
        "python3": f'case "$*" in *{"version_info" if lacks == "Python" else "nothing"}*) exit 1;; '
        f'*{"ensurepip" if lacks == "venv" else "nothing"}*) exit 1;; *"-m venv"*) {pip};; esac',
        "df": f"echo x; echo / 9 9 {2**20 if lacks == 'GB of disk' else 2**24} 9% /",
    }
    for name, code in programs.items():
        (tmp_path / name).write_text(f"#!/bin/bash\n{code}\n")
        (tmp_path / name).chmod(0o755)
    environment = {"PATH": f"{tmp_path}:{os.environ['PATH']}"}
    (tmp_path / "file").write_text("")
    output = ["file/quickstart"] if lacks.startswith("a folder") else []
    done = subprocess.run(
        ["/bin/bash", script, *output], env=environment, cwd=tmp_path, capture_output=True, text=True
    )
    assert done.returncode == 2 and done.stdout == ""
    assert lacks in done.stderr and done.stderr.count("\n") == 2
    assert not (tmp_path / "quickstart").exists()


@pytest.mark.parametrize("text", ["12GB", "12 gb", "12", "12G", "12GiB", "12.0"])
def test_spellings_of_a_card(text):
    assert suggest.gigabytes(text) == 12


@pytest.mark.slow
@pytest.mark.parametrize("model", [FLUX1, "FLUX.2-klein-4B"])
@pytest.mark.parametrize("card", [8, 12, 16, 24, 80])
def test_real_models_on_real_cards(model, card, tiny_model, tmp_path, capsys, record_property):
    folder = write_photos(tmp_path / "photos", 8, sides=(1100, 1500))
    base = tiny_model
    if "FLUX.2" in model:
        base = tmp_path / "model"
        tiny_backbones.flux2_klein().save_pretrained(base)
    words, _ = suggested(capsys, folder, "--gpu", f"{card}GB", "--model", model)
    needs = estimated_gigabytes(trainer_args(words, base, capsys), model)
    assert needs <= card
    record_property(f"{model} on {card} GB: {words[0]} {' '.join(words[1:3])}", f"{needs:.1f} GB")
