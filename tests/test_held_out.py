"""common/held_out.py and what the trainers make of it: loss at fixed noise, keep-best, early stopping, plots."""

import json
import math
import re
import shutil

from common.data import Example
from common.held_out import NOISE_LEVELS, NOISE_SEED, BestStep, fixed_noise, hold_out
from common.latents import encode_moments, image_ids, pack_latents, sample_latents
from common.metrics import held_out_losses, held_out_summary, read_metrics
from common.tracking import plot_metrics

import pytest
import torch
from accelerate import Accelerator
from conftest import ROOT
from PIL import Image
from safetensors.torch import load_file
from test_pivotal import MODES, results
from test_train_dreambooth import LORA, SCRIPT, assert_equal

import train_dreambooth_flux_advanced as dreambooth
from examples.report import charts_of


LEVELS = [f"_{level:g}" for level in NOISE_LEVELS]


def rows_of(folder):
    return read_metrics(folder / "metrics.jsonl")


def evaluations(folder):
    """{step: {name: value}} of what is computed on held-out data."""
    found = {}
    for row in rows_of(folder):
        values = {name: value for name, value in row.items() if name.startswith(("validation_", "distance_"))}
        if values:
            found[row["step"]] = values
    return found


@pytest.fixture
def flags(tiny_model, pictures):
    return [
        *("--pretrained_model_name_or_path", tiny_model, "--instance_data_dir", pictures, "--resolution", 32),
        *("--max_sequence_length", 16, "--train_batch_size", 2, "--rank", 2, "--learning_rate", 1e-3),
        *("--report_to", "none", "--max_train_steps", 6, "--cache_latents"),
    ]


@pytest.fixture
def others(pictures, tmp_path):
    """A folder of two pictures that are held out."""
    folder = tmp_path / "others"
    folder.mkdir()
    for i in (1, 3):
        shutil.copy(pictures / f"{i}.png", folder / f"{i}.png")
        shutil.copy(pictures / f"{i}.txt", folder / f"{i}.txt")
    return folder


# ---------------------------------------------------------------------------------------------------------------------
# The parts
# ---------------------------------------------------------------------------------------------------------------------


def test_the_same_pictures_are_held_out_in_any_order_and_copies_stay_together():
    examples = [Example(f"a/{i}.png", stamp=f"stamp {i // 2}") for i in range(40)]  # two copies of each
    training, held_out = hold_out(examples, 0.2)
    assert 8 <= len(held_out) <= 9
    assert {example.stamp for example in training}.isdisjoint(example.stamp for example in held_out)
    moved = [Example(f"b/x{i}.png", stamp=example.stamp) for i, example in enumerate(reversed(examples))]
    assert {example.stamp for example in hold_out(moved, 0.2)[1]} == {example.stamp for example in held_out}
    assert hold_out(examples, 0) == (examples, [])
    assert len(hold_out(examples[:2], 0.1)[0]) == 0  # copies of one
    assert len(hold_out(examples[:3], 0.01)[1]) >= 1
    unknown = [Example(f"{folder}/{i}.png") for folder in ("a", "b") for i in range(5)]
    names = [example.name[2:] for example in hold_out(unknown, 0.2)[1]]
    assert len(names) == 2 and names[0] == names[1]


def test_fixed_noise_depends_on_the_place_and_the_level_alone():
    latents = torch.randn(1, 2, 4, 4)
    torch.manual_seed(1)
    repeated, noise, sigmas = fixed_noise(latents, 3)
    torch.manual_seed(2)
    again = fixed_noise(2 * latents, 3)
    assert torch.equal(noise, again[1])
    assert repeated.shape == noise.shape == (len(NOISE_LEVELS), 2, 4, 4)
    assert sigmas.tolist() == pytest.approx(NOISE_LEVELS)
    others = torch.cat([noise, fixed_noise(latents, 4)[1]])
    assert len({tuple(values.flatten().tolist()) for values in others}) == 2 * len(NOISE_LEVELS)
    expected = dreambooth.step_generator(NOISE_SEED, 3, 2)
    assert torch.equal(noise[2], torch.randn(2, 4, 4, generator=expected))


def test_the_lowest_loss_its_step_and_its_weights_are_kept():
    layer = torch.nn.Linear(2, 1)
    best = BestStep(layer, layer.parameters(), keeps_weights=True, patience=2)
    weights = {}
    losses = {1: 3.0, 2: 2.0, 3: 2.0, 4: 1.5, 5: math.nan}
    for step, loss in losses.items():
        layer.weight.data.fill_(step)
        weights[step] = layer.weight.detach().clone()
        best.update(step, loss)
        assert not best.is_over
    assert (best.step, best.loss, best.num_worse) == (4, 1.5, 1)
    with best.weights():
        assert torch.equal(layer.weight, weights[4])
    assert torch.equal(layer.weight, weights[5])
    best.update(6, 1.6)
    assert best.is_over
    assert "step 4" in best.summary() and "1.6" in best.summary()
    plain = BestStep(layer, layer.parameters())
    plain.update(1, 1.0)
    plain.update(2, 2.0)
    with plain.weights():
        assert torch.equal(layer.weight, weights[5])
    assert plain.result_step is None and not plain.is_over


@pytest.mark.parametrize(
    ("losses", "words"),
    [
        ({}, ""),
        ({1: 2.0, 5: 1.0}, "no overfitting"),
        ({1: 2.0, 5: 1.0, 9: 1.25}, "25.0% higher: the run overfits since step 5"),
        ({1: 1.0, 5: 1.001}, "hardly any"),
        ({1: 1.0, 5: math.nan}, "no overfitting"),
        ({1: 0.0, 5: 0.0}, "hardly any"),
    ],
)
def test_words_for_overfitting(losses, words):
    assert words in held_out_summary(losses)
    assert bool(held_out_summary(losses)) == bool(losses)


def test_a_run_without_a_finite_loss_so_far_resumes_with_its_count(tmp_path):
    layer = torch.nn.Linear(2, 1)
    found = []
    for _ in range(2):
        accelerator = Accelerator(cpu=True)
        best = BestStep(layer, layer.parameters(), keeps_weights=True, patience=2)
        best.register_checkpointing(accelerator)
        found.append((accelerator, best))
    found[0][1].update(1, math.nan)
    found[0][0].save_state(tmp_path)
    found[1][0].load_state(tmp_path)
    assert found[1][1].num_worse == 1
    found[1][1].update(2, math.nan)
    assert found[1][1].is_over


@pytest.mark.parametrize(
    "script", ["train_dreambooth_flux_advanced", "train_omini", "train_influxedit", "train_twinflow"]
)
def test_the_disk_needs_room_for_the_best_step(train, short_runs, tmp_path, capsys, script):
    flags = [*short_runs[script], "--rank", 10**9, "--output_dir", tmp_path / "run", "--validation_split", 0.4]
    needed = []
    for more in ([], ["--load_best_model_at_end"]):
        with pytest.raises(SystemExit):
            train(script, *flags, *more)
        (found,) = re.findall(r"(\d+) MiB free", capsys.readouterr().err)
        needed.append(int(found))
    assert needed[1] > 1.1 * needed[0]


# ---------------------------------------------------------------------------------------------------------------------
# DreamBooth
# ---------------------------------------------------------------------------------------------------------------------


def test_the_loss_is_what_one_computes_by_hand(train, flags, tiny, tiny_model, others, tmp_path):
    """With a learning rate of nothing, the adapter changes nothing: the loss is that of the base model."""
    words = ["--validation_data_dir", others, "--learning_rate", 1e-30, "--max_train_steps", 1]
    words += ["--weighting_scheme", "sigma_sqrt", "--guidance_scale", 2, "--seed"]
    for seed in (0, 1):
        train(SCRIPT, *flags, *words, seed, "--output_dir", tmp_path / str(seed))
    values = evaluations(tmp_path / "0")[1]
    assert values == evaluations(tmp_path / "1")[1]

    args = dreambooth.parse_args(
        [str(word) for word in [*flags, "--instance_data_dir", others, "--output_dir", tmp_path / "x"]]
    )
    pipeline = dreambooth.FluxPipeline.from_pretrained(tiny_model)
    dataset = dreambooth.DreamBoothDataset(dreambooth.find_examples(args)[0], args)
    means = dict.fromkeys(NOISE_LEVELS, 0.0)
    for i, example in enumerate(dataset.examples):
        example.options["random_crop"] = False
        pixels = dataset.pixel_values((i, example.bucket, False))
        generator = dreambooth.step_generator(NOISE_SEED, i, len(NOISE_LEVELS))
        latents = sample_latents(encode_moments(pipeline.vae, pixels[None]), pipeline.vae.config, generator)
        with torch.no_grad():
            embeds, pooled, _ = pipeline.encode_prompt(example.caption, example.caption, max_sequence_length=16)
            for j, level in enumerate(NOISE_LEVELS):
                noise = torch.randn(latents.shape, generator=dreambooth.step_generator(NOISE_SEED, i, j))
                velocity = pipeline.transformer(
                    hidden_states=pack_latents((1 - level) * latents + level * noise),
                    timestep=torch.tensor([level]),
                    guidance=torch.tensor([2.0]),
                    pooled_projections=pooled,
                    encoder_hidden_states=embeds,
                    txt_ids=torch.zeros(embeds.shape[1], 3),
                    img_ids=image_ids(4, 4, torch.device("cpu")),
                )[0]
                error = (velocity - pack_latents(noise - latents)).square().mean().item()
                means[level] += error / len(dataset.examples)
    for level, mean in means.items():
        assert values[f"validation_loss_{level:g}"] == pytest.approx(mean, rel=1e-4)
    assert values["validation_loss"] == pytest.approx(sum(means.values()) / len(means), rel=1e-4)


def test_held_out_loss_changes_nothing_in_training(train, flags, others, tmp_path):
    flags = [*flags, *MODES["CLIP LoRA"], "--lora_dropout", 0.2, "--max_train_steps", 4]
    train(SCRIPT, *flags, "--output_dir", tmp_path / "a" / "run")
    words = ["--validation_data_dir", others, "--validation_loss_steps", 2, "--preserve_prompts", "background=>sky"]
    train(SCRIPT, *flags, *words, "--output_dir", tmp_path / "b" / "run")
    assert_equal(results(tmp_path / "a" / "run"), results(tmp_path / "b" / "run"))
    assert not evaluations(tmp_path / "a" / "run")
    found = evaluations(tmp_path / "b" / "run")
    assert list(found) == [1, 2, 4]
    names = [f"{kind}{level}" for kind in ("validation_loss", "distance_from_base") for level in ("", *LEVELS)]
    assert all(sorted(values) == sorted(names) for values in found.values())
    assert found[1]["distance_from_base"] < found[4]["distance_from_base"]


def test_a_share_is_not_trained(train, flags, tmp_path, capsys):
    args = dreambooth.parse_args([str(word) for word in [*flags, "--validation_split", 0.4]])
    training, held_out, problems = dreambooth.find_held_out(args, dreambooth.find_examples(args)[0])
    assert not problems and len(training) == 3 and len(held_out) == 2
    train(SCRIPT, *flags, "--validation_split", 0.4, "--max_train_steps", 1, "--output_dir", tmp_path / "run")
    said = capsys.readouterr().out
    assert re.search(r"data +3 images", said) and re.search(r"held out +2 images", said)
    assert "not read" not in said
    assert evaluations(tmp_path / "run")


def test_a_held_out_image_is_masked_as_those_of_training(train, flags, pictures, tmp_path):
    words = ["--validation_split", 0.4, "--learning_rate", 1e-30, "--max_train_steps", 1]
    train(SCRIPT, *flags, *words, "--output_dir", tmp_path / "plain")
    (tmp_path / "masks").mkdir()
    for path in pictures.glob("*.png"):
        with Image.open(path) as image:
            mask = Image.new("L", image.size)
            mask.paste(255, (0, 0, image.width, image.height // 2))
        mask.save(tmp_path / "masks" / path.name)
    train(SCRIPT, *flags, *words, "--mask_data_dir", tmp_path / "masks", "--output_dir", tmp_path / "masked")
    plain, masked = (evaluations(tmp_path / name)[1]["validation_loss"] for name in ("plain", "masked"))
    assert masked != pytest.approx(plain, rel=1e-3)


def test_with_a_data_toml_class_images_are_not_held_out(pictures, tiny_model, tmp_path):
    for name in ("subject", "class"):
        shutil.copytree(pictures, tmp_path / name)
    subset = '[[datasets.subsets]]\nimage_dir = "{}"\ncaption_extension = ".txt"\n'
    config = "[[datasets]]\nresolution = 32\n" + subset.format(tmp_path / "subject") + "num_repeats = 2\n"
    config += subset.format(tmp_path / "class") + "is_reg = true\n"
    (tmp_path / "data.toml").write_text(config)
    words = ["--pretrained_model_name_or_path", tiny_model, "--dataset_config", tmp_path / "data.toml"]
    args = dreambooth.parse_args([str(word) for word in [*words, "--validation_split", 0.2]])
    training, (held_out,), problems = dreambooth.find_held_out(args, dreambooth.find_examples(args)[0])
    assert not problems and "subject" in held_out.name
    repeats = {is_reg: sum(e.repeats for e in training if e.options["is_reg"] == is_reg) for is_reg in (True, False)}
    assert repeats == {True: 8, False: 8}


@pytest.mark.parametrize(
    "mode", ["CLIP LoRA", pytest.param("pivotal CLIP+T5", marks=pytest.mark.slow), "textual inversion"]
)
def test_the_best_step_is_kept_and_all_of_it_survives_a_resume(train, flags, others, tmp_path, mode):
    """At a rate that is far too high an early step is mostly the best; its weights are those of its checkpoint."""
    rate = 0.3 if mode == "CLIP LoRA" else 1000
    flags = [*flags, *MODES[mode], "--token_abstraction", "background", "--learning_rate", rate]
    flags += ["--checkpointing_steps", 1]
    flags += ["--validation_data_dir", others, "--validation_loss_steps", 1, "--load_best_model_at_end"]
    flags += ["--text_encoder_lr", 10 * rate, "--validation_prompt", "a circle", "--num_validation_images", 1]
    whole = tmp_path / "a" / "run"
    train(SCRIPT, *flags, "--output_dir", whole)
    losses = held_out_losses(rows_of(whole))
    best = min(losses, key=losses.get)
    assert len(losses) == 6
    kept = whole / f"checkpoint-{best}"
    if (whole / LORA).exists():
        assert_equal(load_file(whole / LORA), load_file(kept / LORA))
    else:
        rows = load_file(whole / "run_emb.safetensors")
        assert_equal(rows, load_file(kept / "learned_emb.safetensors"))
    assert f"step {best}" in (whole / "README.md").read_text()
    for step in {max(best, 3), 5}:  # the best lies behind
        resumed = tmp_path / str(step) / "run"
        words = ["--resume_from_checkpoint", whole / f"checkpoint-{step}", "--output_dir", resumed]
        train(SCRIPT, *flags, *words)
        assert_equal(results(whole), results(resumed))
        assert f"step {best}" in (resumed / "README.md").read_text()
        assert {step: losses[step] for step in range(step + 1, 7)} == held_out_losses(rows_of(resumed))
        images = [folder / "validation" / "step-000006.png" for folder in (whole, resumed)]
        assert images[0].read_bytes() == images[1].read_bytes()


def test_a_run_ends_early_and_stays_ended(train, flags, others, tmp_path, capsys):
    """At a rate of nothing the loss never becomes lower than at the first step."""
    flags = [*flags, "--learning_rate", 1e-30, "--max_train_steps", 10, "--output_dir", tmp_path / "run"]
    flags += ["--validation_data_dir", others, "--validation_loss_steps", 1, "--checkpointing_steps", 1]
    train(SCRIPT, *flags, "--early_stopping_patience", 2)
    assert list(held_out_losses(rows_of(tmp_path / "run"))) == [1, 2, 3]
    assert len(rows_of(tmp_path / "run")) == 3
    assert "2 times in a row" in capsys.readouterr().out
    flags += ["--resume_from_checkpoint", "latest"]
    train(SCRIPT, *flags, "--early_stopping_patience", 2)
    assert len(rows_of(tmp_path / "run")) == 3
    train(SCRIPT, *flags, "--early_stopping_patience", 4)
    assert list(held_out_losses(rows_of(tmp_path / "run"))) == [1, 2, 3, 4, 5]


@pytest.mark.slow
@pytest.mark.parametrize(
    "words", ["--quantize_base nf4", "--compile", "--offload --optimizer prodigy --learning_rate 1"]
)
def test_held_out_loss_goes_with(train, flags, others, tmp_path, words):
    flags = [*flags, *words.split(), "--validation_data_dir", others, "--preserve_prompts", "background=>sky"]
    flags += ["--load_best_model_at_end", "--max_train_steps", 2, "--validation_loss_steps", 1]
    train(SCRIPT, *flags, "--output_dir", tmp_path)
    assert all(math.isfinite(value) for values in evaluations(tmp_path).values() for value in values.values())
    assert list(evaluations(tmp_path)) == [1, 2]


def test_two_processes_take_their_shares_and_get_the_same_mean(train, runs, flags, others, tmp_path):
    """At a rate of nothing both compute the base model's loss; a third picture makes the shares uneven."""
    shutil.copy(others / "1.png", others / "5.png")
    shutil.copy(others / "1.txt", others / "5.txt")
    flags = [*flags, "--learning_rate", 1e-30, "--max_train_steps", 1, "--validation_data_dir", others]
    train(SCRIPT, *flags, "--output_dir", tmp_path / "one")
    assert runs.run(SCRIPT, [*flags, "--output_dir", tmp_path / "two"], processes=2) == 0, runs.output()
    one = evaluations(tmp_path / "one")[1]
    two = evaluations(tmp_path / "two")[1]
    assert one.keys() == two.keys()
    for name, value in one.items():
        assert two[name] == pytest.approx(value, rel=1e-5)


# ---------------------------------------------------------------------------------------------------------------------
# The other trainers
# ---------------------------------------------------------------------------------------------------------------------


@pytest.fixture
def held_out_data(pairs, others, tmp_path):
    """{trainer: a folder for --validation_data_dir}."""
    edits = tmp_path / "edits"
    for name in ("images", "targets", "captions"):
        (edits / name).mkdir(parents=True)
        for path in (pairs / name).glob("[02].*"):
            shutil.copy(path, edits / name)
    return {"train_omini": others, "train_influxedit": edits, "train_twinflow": others}


def adapters(folder):
    """All tensors of the LoRA files of a run or a checkpoint."""
    files = [file for file in folder.glob("*.safetensors") if not file.name.startswith(("resume_", "state."))]
    return {f"{file.name}/{key}": value for file in files for key, value in load_file(file).items()}


@pytest.mark.parametrize(
    "script",
    ["train_twinflow", *(pytest.param(s, marks=pytest.mark.slow) for s in ("train_omini", "train_influxedit"))],
)
def test_other_trainers_keep_the_best_step_too(train, short_runs, held_out_data, tmp_path, capsys, script):
    flags = [*short_runs[script], "--lora_dropout", 0.2, "--learning_rate", 0.05, "--max_train_steps", 5]
    flags += ["--checkpointing_steps", 1, "--max_grad_norm", 100]
    train(script, *flags, "--output_dir", tmp_path / "plain")
    flags += ["--validation_data_dir", held_out_data[script], "--validation_loss_steps", 1]
    flags += ["--load_best_model_at_end"]
    whole = tmp_path / "whole"
    capsys.readouterr()
    train(script, *flags, "--output_dir", whole)
    assert re.search(r"held out +2 images", capsys.readouterr().out)
    losses = held_out_losses(rows_of(whole))
    best = min(losses, key=losses.get)
    assert list(losses) == [1, 2, 3, 4, 5]
    assert [row["loss"] for row in rows_of(whole)] == [row["loss"] for row in rows_of(tmp_path / "plain")]
    assert_equal(adapters(tmp_path / "plain"), adapters(whole / "checkpoint-5"))
    assert_equal(adapters(whole), adapters(whole / f"checkpoint-{best}"))
    assert f"step {best}" in (whole / "README.md").read_text()
    resumed = tmp_path / "resumed"
    train(script, *flags, "--output_dir", resumed, "--resume_from_checkpoint", whole / "checkpoint-4")
    assert_equal(adapters(whole), adapters(resumed))
    assert held_out_losses(rows_of(resumed)) == {5: losses[5]}


@pytest.mark.parametrize("script", ["train_omini", "train_influxedit", "train_twinflow"])
def test_other_trainers_hold_out_a_share(train, short_runs, tmp_path, capsys, script):
    flags = [*short_runs[script], "--validation_split", 0.4, "--max_train_steps", 1]
    train(script, *flags, "--output_dir", tmp_path / "run")
    said = capsys.readouterr().out
    assert re.search(r"data +3 ", said) and re.search(r"held out +2 images", said)
    assert "not read" not in said
    assert evaluations(tmp_path / "run")
    for wrong in (["--validation_data_dir", "nowhere"], ["--early_stopping_patience", "2"]):
        with pytest.raises(SystemExit) as ended:
            train(script, *short_runs[script], *wrong, "--output_dir", tmp_path / "new")
        assert ended.value.code == 2
        assert wrong[0] in capsys.readouterr().err
        assert not (tmp_path / "new").exists()


BAD = [
    ("--validation_loss_steps 2", "--validation_loss_steps needs --validation_data_dir or --validation_split"),
    ("--load_best_model_at_end", "--load_best_model_at_end needs --validation_data_dir or --validation_split"),
    ("--early_stopping_patience 2", "--early_stopping_patience needs --validation_data_dir or --validation_split"),
    ("--validation_split 0.2 --validation_data_dir {others}", "exclude each other"),
    ("--validation_split 1.5", "--validation_split: 1.5 is out of range"),
    ("--validation_split 0", "--validation_split: 0 is out of range"),
    ("--validation_data_dir nowhere", "--validation_data_dir nowhere: no such folder"),
    ("--validation_split 0.5 --instance_data_dir {one}", "--validation_split 0.5: nothing is left to train on"),
]


@pytest.mark.parametrize(("wrong", "message"), BAD)
def test_wrong_use_is_one_line(train, flags, others, tmp_path, capsys, wrong, message):
    one = tmp_path / "one"
    one.mkdir()
    shutil.copy(others / "1.png", one)
    shutil.copy(others / "1.txt", one)
    words = wrong.format(others=others, one=one).split()
    with pytest.raises(SystemExit) as ended:
        train(SCRIPT, *flags, "--output_dir", tmp_path / "run", *words)
    assert ended.value.code == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


# ---------------------------------------------------------------------------------------------------------------------
# Plots
# ---------------------------------------------------------------------------------------------------------------------


def overfitted(folder):
    """A run whose held-out loss rises from step 20 on."""
    with (folder / "metrics.jsonl").open("w") as file:
        for step in range(1, 61):
            row = {"step": step, "loss": 1 / step, "lr": 1e-3}
            if step == 1 or step % 10 == 0:
                for kind, value in (("validation_loss", 0.2 + abs(step - 20) / 100), ("distance_from_base", step / 9)):
                    row |= {kind: value} | {f"{kind}{level}": value * (i + 1) for i, level in enumerate(LEVELS)}
            file.write(json.dumps(row) + "\n")


def test_the_plot_has_a_panel_of_each_kind(tmp_path):
    overfitted(tmp_path)
    plot_metrics(tmp_path)
    with Image.open(tmp_path / "loss.png") as image:
        assert image.size == (800, 1200)


def test_the_plot_shows_levels_whose_mean_is_not_finite(tmp_path):
    row = {"step": 1, "loss": 1.0, "lr": 1e-3, "validation_loss": math.nan, "validation_loss_0.1": 0.3}
    (tmp_path / "metrics.jsonl").write_text(json.dumps(row) + "\n")
    plot_metrics(tmp_path)
    assert (tmp_path / "loss.png").exists()


def test_words_on_a_run_resumed_elsewhere_are_of_its_own_steps():
    assert "From step 5 on" in held_out_summary({6: 1.0, 8: 1.5}, first_step=5)
    assert "overfits since step 6" in held_out_summary({6: 1.0, 8: 1.5}, first_step=5)


def test_the_report_has_a_chart_of_each_kind(tmp_path):
    overfitted(tmp_path)
    charts = {chart["name"]: chart for chart in charts_of(rows_of(tmp_path))["charts"]}
    assert list(charts)[:3] == ["loss", "held-out loss", "distance from the base model"]
    chart = charts["held-out loss"]
    assert chart["steps"] == [1, 10, 20, 30, 40, 50, 60]
    assert list(chart["lines"]) == ["mean", *(f"σ {level:g}" for level in NOISE_LEVELS)]
    assert chart["lines"]["mean"][2] == 0.2


def test_the_report_says_in_words_when_it_began_to_overfit(tmp_path, run_program):
    overfitted(tmp_path)
    run_program("examples/report.py", tmp_path)
    assert "overfits since step 20" in (tmp_path / "report.html").read_text()


# ---------------------------------------------------------------------------------------------------------------------
# On the toy world
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_overfitting_is_seen_and_the_best_step_is_kept(train, glyph_pictures, tmp_path, capsys):
    words = ["--pretrained_model_name_or_path", ROOT / "examples" / "toy" / "flux", "--max_sequence_length", 32]
    words += ["--instance_data_dir", glyph_pictures, "--resolution", 64, "--train_batch_size", 4, "--cache_latents"]
    words += ["--rank", 16, "--learning_rate", 3e-3, "--max_train_steps", 300, "--report_to", "none"]
    words += ["--validation_split", 0.3, "--validation_loss_steps", 10, "--load_best_model_at_end"]
    words += ["--checkpointing_steps", 10]
    words += ["--preserve_prompts", "sks glyph=>circle,square", "--output_dir", tmp_path / "run"]
    train(SCRIPT, *words)
    losses = held_out_losses(rows_of(tmp_path / "run"))
    best = min(losses, key=losses.get)
    said = capsys.readouterr().out
    with capsys.disabled():
        print(f"held-out loss {losses[1]:.3f}, lowest {losses[best]:.3f} at step {best}, {losses[300]:.3f} at the end")
    assert 1 < best < 200
    assert losses[best] < losses[1]
    assert losses[300] > 1.1 * losses[best]
    distances = [values["distance_from_base"] for values in evaluations(tmp_path / "run").values()]
    assert distances[-1] > distances[0]
    assert f"overfits since step {best}" in said
    kept = load_file(tmp_path / "run" / LORA)
    assert_equal(kept, load_file(tmp_path / "run" / f"checkpoint-{best}" / LORA))
    resumed = tmp_path / "resumed"
    train(SCRIPT, *words, "--output_dir", resumed, "--resume_from_checkpoint", tmp_path / "run" / "checkpoint-290")
    assert_equal(kept, load_file(resumed / LORA))
