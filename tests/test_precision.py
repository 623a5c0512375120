"""The precision of a run: what resolves it, and what is recorded, for the generators, of it."""

import json

from common.checkpoints import CHECKSUMS, STATE_FILE, checkpoint_conflicts, checksums
from common.models import DTYPES, choose_precision

import pytest
import torch
from conftest import imported

from examples.dreambooth.generate import load_pipeline


@pytest.mark.parametrize(
    ("requested", "launched_with", "has_bf16", "expected"),
    [
        (None, None, True, "bf16"),
        (None, None, False, "no"),
        (None, "no", True, "no"),
        (None, "fp16", True, "fp16"),
        ("no", "bf16", True, "no"),
        ("bf16", None, False, "bf16"),
    ],
)
def test_a_flag_comes_before_the_launcher_and_both_before_what_the_device_computes_in(
    requested, launched_with, has_bf16, expected
):
    assert choose_precision(requested, launched_with, has_bf16=has_bf16) == expected


def test_the_precision_of_the_launcher_is_recorded_and_the_result_is_drawn_in_it(
    train, short_runs, tmp_path, monkeypatch
):
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    flags = [*short_runs["train_dreambooth_flux_advanced"], "--max_train_steps", 1, "--output_dir", tmp_path]
    train("train_dreambooth_flux_advanced", *flags)
    monkeypatch.undo()
    assert json.loads((tmp_path / "args.json").read_text())["args"]["mixed_precision"] == "bf16"
    pipeline, _ = load_pipeline(tmp_path)
    assert {pipeline.transformer.dtype, pipeline.text_encoder_2.dtype, pipeline.vae.dtype} == {torch.bfloat16}


@pytest.mark.parametrize(
    "script", ["train_dreambooth_flux_advanced", "train_influxedit", "train_omini", "train_twinflow"]
)
def test_a_precision_of_the_launcher_that_is_not_supported_is_refused(script, short_runs, monkeypatch, capsys):
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "fp8")
    module = imported(script)
    with pytest.raises(SystemExit) as error:
        module.parse_args([str(flag) for flag in short_runs[script]])
    assert error.value.code == 2
    assert "fp8" in capsys.readouterr().err
    assert module.parse_args([*map(str, short_runs[script]), "--mixed_precision=bf16"]).mixed_precision == "bf16"


def test_a_run_on_the_cpu_that_names_none_is_in_float32(short_runs):
    args = imported("train_omini").parse_args([str(flag) for flag in short_runs["train_omini"]])
    assert DTYPES[args.mixed_precision] == torch.float32


def test_checkpoints_that_recorded_no_precision_are_continued_in_the_same_one_alone(tmp_path, monkeypatch):
    (tmp_path / STATE_FILE).write_text(json.dumps({"global_step": 1, "mixed_precision": "None"}))
    (tmp_path / CHECKSUMS).write_text(json.dumps(checksums(tmp_path)))
    assert checkpoint_conflicts(tmp_path, {"mixed_precision": "no"}) == []
    assert "mixed_precision" in checkpoint_conflicts(tmp_path, {"mixed_precision": "bf16"})[0]
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    assert checkpoint_conflicts(tmp_path, {"mixed_precision": "bf16"}) == []
