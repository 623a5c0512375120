"""--use_ema: the moving average of what is trained is saved and drawn, and training does not know of it."""

import itertools
import json
from contextlib import nullcontext

from common.lora import averaged_weights
from common.lora_formats import full_name

import pytest
import torch
from diffusers.training_utils import EMAModel
from safetensors.torch import load_file
from test_pivotal import MODES, flags, new_prompt_encoder, results  # noqa: F401  # flags is a fixture
from test_train_dreambooth import SCRIPT, assert_equal

import train_dreambooth_flux_advanced as dreambooth


EMA = ("--use_ema", "--ema_decay", 0.3)
TRAINERS = ["train_dreambooth_flux_advanced", "train_omini", "train_influxedit"]


def checkpoints(run):
    """Of each checkpoint, the tensors (to be drawn with, in training), by the same names."""
    found = []
    for folder in sorted(run.glob("checkpoint-*"), key=lambda folder: int(folder.name[11:])):
        live = {}
        average = {}
        for file in folder.glob("*.safetensors"):
            if file.name == "resume_tokens.safetensors":
                live |= load_file(file)
            elif file.name == "learned_emb.safetensors":
                average |= load_file(file)
            elif file.name.startswith("resume_"):
                live |= {f"{file.name[7:]}/{full_name(key)}": value for key, value in load_file(file).items()}
            elif file.name != "state.safetensors":
                average |= {f"{file.name}/{key}": value for key, value in load_file(file).items()}
        found.append((average, live))
    return found


def averaged(values, decay):
    """The average after each of some steps' values, from the definition: the decay grows as n / (9 + n)."""
    averages = values[:1]
    for n, value in enumerate(values[1:], 2):
        share = min(decay, n / (9 + n))
        averages.append({key: share * averages[-1][key] + (1 - share) * value[key] for key in value})
    return averages


@pytest.mark.parametrize(
    "script", [TRAINERS[0], *(pytest.param(script, marks=pytest.mark.slow) for script in TRAINERS[1:])]
)
def test_files_hold_the_average_and_training_goes_on_as_without(train, short_runs, tmp_path, capsys, script):
    words = [*short_runs[script], "--max_train_steps", 4, "--checkpointing_steps", 1, "--output_dir"]
    train(script, *words, tmp_path / "plain")
    assert "  average  " not in capsys.readouterr().out
    train(script, *words, tmp_path / "run", *EMA)
    assert "  average  " in capsys.readouterr().out
    assert [json.loads(line)["loss"] for line in (tmp_path / "plain" / "metrics.jsonl").open()] == [
        json.loads(line)["loss"] for line in (tmp_path / "run" / "metrics.jsonl").open()
    ]
    found = checkpoints(tmp_path / "run")
    assert len(found) == 4
    for (_, live), (drawn, plain) in zip(found, checkpoints(tmp_path / "plain"), strict=True):
        assert_equal(live, plain)
        assert_equal(drawn, plain)  # without an average, the scale of alpha = rank is 1
    expected = averaged([live for _, live in found], 0.3)
    for (average, _), wanted in zip(found, expected, strict=True):
        assert average.keys() == wanted.keys()
        for key, value in wanted.items():
            torch.testing.assert_close(average[key], value, atol=1e-7, rtol=1e-5)
    (file,) = (tmp_path / "run").glob("*.safetensors")
    assert_equal({f"{file.name}/{key}": value for key, value in load_file(file).items()}, found[-1][0])
    assert any(not torch.equal(found[-1][0][key], found[-1][1][key]) for key in found[-1][0])


@pytest.mark.parametrize("mode", ["pivotal CLIP+T5", pytest.param("CLIP LoRA", marks=pytest.mark.slow)])
def test_what_is_frozen_at_the_pivot_stays_as_it_is_and_resumes(train, flags, tmp_path, mode):  # noqa: F811
    words = [*flags, *MODES[mode], *EMA, "--checkpointing_steps", 1, "--lora_dropout", 0.1, "--output_dir"]
    train(SCRIPT, *words, tmp_path / "a" / "run")
    found = checkpoints(tmp_path / "a" / "run")
    text = [key for key in found[0][1] if "transformer." not in key]
    for step, (average, live) in enumerate(found, 1):
        same = {torch.equal(average[key], live[key]) for key in text}
        assert same == ({True} if step in (1, 3, 4, 5, 6) else {False})  # the pivot is at step 3
    for step in (2, 3):
        checkpoint = tmp_path / "a" / "run" / f"checkpoint-{step}"
        train(SCRIPT, *words, tmp_path / str(step) / "run", "--resume_from_checkpoint", checkpoint)
        assert_equal(results(tmp_path / "a" / "run"), results(tmp_path / str(step) / "run"))
        resumed = checkpoints(tmp_path / str(step) / "run")
        for ours, theirs in zip(itertools.chain(*found[step:]), itertools.chain(*resumed), strict=True):
            assert_equal(ours, theirs)


def test_new_tokens_trained_to_the_end_are_saved_on_average(train, flags, tmp_path):  # noqa: F811
    words = [*flags, *MODES["textual inversion"], *EMA, "--checkpointing_steps", 1, "--max_train_steps", 4]
    train(SCRIPT, *words, "--output_dir", tmp_path / "run")
    found = checkpoints(tmp_path / "run")
    expected = averaged([live for _, live in found], 0.3)
    rows = load_file(tmp_path / "run" / "run_emb.safetensors")
    assert rows.keys() == {"clip_l", "t5"}
    for name, value in rows.items():
        torch.testing.assert_close(value, expected[-1][name], atol=1e-7, rtol=1e-5)
        assert not torch.equal(value, found[-1][1][name])
    exported = load_file(tmp_path / "run" / "embeddings" / "comfyui" / "circle.safetensors")
    assert torch.equal(exported["clip_l"], rows["clip_l"])


@pytest.mark.parametrize(
    "mode", ["nf4", "CLIP LoRA", *(pytest.param(mode, marks=pytest.mark.slow) for mode in ("compile", "rslora"))]
)
def test_an_average_goes_with(train, flags, tmp_path, mode):  # noqa: F811
    modes = MODES | {
        "nf4": ["--quantize_base", "nf4"],
        "compile": ["--compile"],
        "rslora": ["--use_rslora", "--init_lora_weights", "default", "--mixed_precision", "bf16"],
    }
    words = [*flags, *modes[mode], "--max_train_steps", 3, "--checkpointing_steps", 1, "--output_dir"]
    train(SCRIPT, *words, tmp_path / "plain")
    train(SCRIPT, *words, tmp_path / "run", *EMA)
    for (_, live), (_, plain) in zip(checkpoints(tmp_path / "run"), checkpoints(tmp_path / "plain"), strict=True):
        assert_equal(live, plain)
    plain, average = results(tmp_path / "plain"), results(tmp_path / "run")
    assert plain.keys() == average.keys()
    assert any(not torch.equal(plain[key], average[key]) for key in plain)


def test_weights_come_back_bit_for_bit_also_after_an_error():
    layer = torch.nn.Linear(5, 7)
    parameters = list(layer.parameters())
    ema = EMAModel(parameters, foreach=True)
    kept = [parameter.detach().clone() for parameter in parameters]
    for parameter in parameters:
        parameter.data += torch.randn_like(parameter)
    live = [parameter.detach().clone() for parameter in parameters]
    with pytest.raises(KeyboardInterrupt), averaged_weights(ema, parameters, layer):
        assert all(torch.equal(parameter, value) for parameter, value in zip(parameters, kept, strict=True))
        raise KeyboardInterrupt
    assert all(torch.equal(parameter, value) for parameter, value in zip(parameters, live, strict=True))


def test_tokens_of_an_earlier_version_are_resumed(tiny_model, pictures, tmp_path):
    args = dreambooth.parse_args(
        [str(word) for word in ("--pretrained_model_name_or_path", tiny_model, "--instance_data_dir", pictures)]
        + ["--instance_prompt", "TOK", "--train_text_encoder_ti", "--output_dir", str(tmp_path / "run")]
    )
    encoder, handler = new_prompt_encoder(args)
    handler.register_checkpointing(encoder.accelerator, nullcontext)
    (rows,) = handler.parameters()
    before = rows.detach().clone()
    encoder.accelerator.save_state(tmp_path / "checkpoint")
    for name in ("resume_tokens", "learned_emb"):
        rows.data.zero_()
        encoder.accelerator.load_state(tmp_path / "checkpoint")
        assert torch.equal(rows, before), name
        (tmp_path / "checkpoint" / f"{name}.safetensors").unlink()


def test_twinflow_names_its_own_flag(train, short_runs, tmp_path, capsys):
    for flag in ("--use_ema", "--ema_decay=0.9"):
        with pytest.raises(SystemExit) as stop:
            train("train_twinflow", *short_runs["train_twinflow"], flag, "--output_dir", tmp_path / "run")
        assert stop.value.code == 2
        assert "--ema_decay_rate" in capsys.readouterr().err
