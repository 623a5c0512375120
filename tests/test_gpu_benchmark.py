"""tests/benchmarks/gpu.py: its results file, its tables, and all of its rows with tiny models."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKL, FluxTransformer2DModel
from transformers import T5EncoderModel


sys.path.insert(0, str(Path(__file__).parents[1]))
sys.path.insert(0, str(Path(__file__).parent / "benchmarks"))
sys.path.insert(0, str(Path(__file__).parent / "benchmarks" / "on_gpu"))

import gpu
from random_models import random_weights, save_pipelines


HERE = {"card": "NVIDIA H100 80GB HBM3", "torch": "2.11", "commit": "1"}


class Answers:
    """A worker whose answers are given: {row's name: reply}."""

    ended = False

    def __init__(self, replies):
        self.replies = replies
        self.asked = []

    def ask(self, topic, options, limit):
        self.asked.append(options["name"])
        return self.replies[options["name"]]


def measured(path, replies, environment=HERE, seconds=60):
    """(Results, the rows that were measured) of rows named as in `replies`."""
    results = gpu.Results(path, environment)
    worker = Answers(replies)
    args = gpu.parse_args([])
    rows = [("step", name, {"name": name}) for name in replies]
    gpu.measure(rows, results, worker, args, gpu.time.monotonic() + seconds)
    return results, worker.asked


def test_rows_are_written_one_by_one_and_those_that_are_there_are_not_measured_again(tmp_path, capsys):
    path = tmp_path / "results.json"
    replies = {"a": {"values": {"seconds": 1.0}}, "b": {"error": "out of memory"}, "c": {"values": {"seconds": 2.0}}}
    results, asked = measured(path, replies)
    assert asked == ["a", "b", "c"]
    assert "b: FAILED: out of memory" in capsys.readouterr().out
    assert [row["name"] for row in json.loads(path.read_text())] == ["a", "b", "c"]
    assert results.values("step", "c") == {"seconds": 2.0} and results.values("step", "b") == {}
    _, asked = measured(path, replies)
    assert asked == ["b"]  # what failed is tried again
    _, asked = measured(path, replies, environment=HERE | {"commit": "2"})
    assert asked == ["a", "b", "c"]
    assert len(json.loads(path.read_text())) == 6
    assert measured(tmp_path / "late.json", replies, seconds=0)[1] == []


def test_the_bars_are_held_to_what_was_measured(tmp_path, capsys):
    results = gpu.Results(tmp_path / "results.json", HERE)
    name = "dreambooth, 1024 px, compile"
    results.add("step", name, {"values": {"seconds": 0.5, "it/s": 2.0, "images/s": 2.0, "syncs": 1.5}}, 1)
    results.add("operations", "1024 px", {"values": {"operations": 0.25 * 989e12}}, 1)
    plain = "dreambooth, 512 px, plain"
    step = {"seconds": 0.5, "it/s": 2.0, "images/s": 2.0, "syncs": 1.0, "GiB": 25.0, "card": 27.0}
    results.add("step", plain, {"values": step}, 1)
    estimated = {"in a step": 24.0, "at most": 24.0, "card for a step": 26.9}
    results.add("memory", plain, {"values": estimated}, 1)
    found = {what: (value, met) for what, value, met in gpu.bars(results)}
    assert found["share of bf16 peak at 1024 px: 0.5 or more"] == (0.5, True)
    assert found[f"syncs per step, {name}: 1 or fewer"] == (1.5, False)
    assert found[f"memory to its estimate, {plain}: 0.92 to 1.08"][1]
    assert not found[f"memory of the card to its estimate, {plain}: 1 or less"][1]
    gpu.print_tables(results)
    printed = capsys.readouterr().out
    assert "26-30 GB" in printed and "| NO |" in printed and "H100" in printed


def test_models_of_random_weights_take_the_memory_of_one_tensor(tmp_path):
    save_pipelines(tmp_path, is_tiny=True)
    with random_weights():
        transformer = FluxTransformer2DModel.from_pretrained(
            tmp_path / "fill", subfolder="transformer", dtype=torch.bfloat16
        )
        text_encoder, loaded = T5EncoderModel.from_pretrained(
            tmp_path / "flux", subfolder="text_encoder_2", dtype=torch.bfloat16, output_loading_info=True
        )
        vae = AutoencoderKL.from_pretrained(tmp_path / "flux" / "vae")
    assert transformer.config.in_channels == 384 and not loaded["missing_keys"]
    assert len({parameter.untyped_storage().data_ptr() for parameter in transformer.parameters()}) <= 2
    assert text_encoder.shared.weight is text_encoder.encoder.embed_tokens.weight
    assert {parameter.dtype for parameter in vae.parameters()} == {torch.float32}
    for model in (transformer, text_encoder, vae):
        assert all(parameter.isfinite().all() and parameter.any() for parameter in model.parameters())


@pytest.mark.slow
def test_every_row_runs_on_a_cpu_and_a_second_run_measures_nothing(tmp_path):
    def run():
        command = [
            sys.executable,
            gpu.__file__,
            "--results",
            tmp_path / "results.json",
            "--time_limit",
            "3600",
        ]
        env = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
        output = subprocess.run(command, env=env, check=True, capture_output=True, text=True).stdout
        measured_lines, tables = output.split("\ncard ", 1)
        return measured_lines, tables

    lines, tables = run()
    rows = json.loads((tmp_path / "results.json").read_text())
    assert {row["name"]: row["error"] for row in rows if "error" in row} == {}
    assert len(rows) == len(lines.splitlines()) == len(gpu.ROWS) + len(gpu.estimates())
    for topic in {topic for topic, _, _ in gpu.ROWS}:
        assert f"| {topic} |" in tables
    assert run() == ("", tables)
