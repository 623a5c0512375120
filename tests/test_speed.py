"""What makes a run faster or smaller works in every trainer and computes the same, or as near as it can."""

import json

import numpy as np
import pytest


SCRIPTS = ["train_dreambooth_flux_advanced", "train_omini", "train_influxedit", "train_twinflow"]
ONE_QUICK = [SCRIPTS[0], *(pytest.param(script, marks=pytest.mark.slow) for script in SCRIPTS[1:])]


def losses(folder):
    return np.array([json.loads(line)["loss"] for line in (folder / "metrics.jsonl").open()])


def difference(folder, other):
    """Largest difference between the losses of two runs, as a share of the loss."""
    return float((np.abs(losses(folder) - losses(other)) / losses(other)).max())


@pytest.mark.parametrize("script", ONE_QUICK)
def test_checkpointing_offload_and_8_bit_states_compute_nearly_the_same(train, short_runs, script, tmp_path):
    for name, extra, bar in (
        ("plain", (), 0),
        ("checkpointing", ("--gradient_checkpointing",), 1e-5),
        ("offload", ("--offload",), 0),
        ("adam8bit", ("--use_8bit_adam",), 1e-2),
        ("bf16", ("--mixed_precision", "bf16"), 0.2),
    ):
        train(script, *short_runs[script], *extra, "--output_dir", tmp_path / name)
        found = difference(tmp_path / name, tmp_path / "plain")
        print(f"{name}: losses differ by {found:.1e} (bar {bar:g})")
        assert found <= bar


@pytest.mark.parametrize("script", ONE_QUICK)
def test_a_quantized_base_trains_near_the_plain_one(train, short_runs, script, tmp_path):
    for kind, bar in (("none", 0), ("int8", 0.01), ("fp8", 0.03), ("nf4", 0.1)):
        train(script, *short_runs[script], "--quantize_base", kind, "--output_dir", tmp_path / kind)
        found = difference(tmp_path / kind, tmp_path / "none")
        print(f"{kind}: losses differ by {found:.1e} (bar {bar:g})")
        assert found <= bar
        assert (found > 0) == (kind != "none")


@pytest.mark.slow
@pytest.mark.parametrize("script", SCRIPTS)
def test_compiled_blocks_compute_the_same(train, short_runs, script, tmp_path):
    for name, extra in (("plain", ()), ("compiled", ("--compile",))):
        train(script, *short_runs[script], *extra, "--output_dir", tmp_path / name)
    np.testing.assert_allclose(losses(tmp_path / "compiled"), losses(tmp_path / "plain"), atol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("script", SCRIPTS)
@pytest.mark.parametrize("kind", ["int8", "fp8"])
def test_a_compiled_checkpointed_8_bit_base_computes_the_same(train, short_runs, script, kind, tmp_path):
    for name, extra in (("plain", ()), ("all", ("--compile", "--gradient_checkpointing", "--offload"))):
        train(script, *short_runs[script], "--quantize_base", kind, *extra, "--output_dir", tmp_path / name)
    np.testing.assert_allclose(losses(tmp_path / "all"), losses(tmp_path / "plain"), atol=1e-4)


@pytest.mark.parametrize("script", [SCRIPTS[0], SCRIPTS[2]])
def test_offload_leaves_a_trained_text_encoder_where_it_is(train, short_runs, script, tmp_path):
    for name, extra in (("plain", ()), ("offload", ("--offload",))):
        train(script, *short_runs[script], "--train_text_encoder", *extra, "--output_dir", tmp_path / name)
    assert difference(tmp_path / "offload", tmp_path / "plain") == 0
