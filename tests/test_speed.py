"""What makes a run faster or smaller works in every trainer and computes the same, or as near as it can."""

import copy
import importlib
import json

from common import models
from common.models import compile_blocks

import numpy as np
import pytest
import torch


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


def predict(model, batch_size, num_tokens):
    """What a tiny FLUX.1 predicts of noise."""
    return model(
        hidden_states=torch.randn(batch_size, num_tokens, model.config.in_channels),
        encoder_hidden_states=torch.randn(batch_size, 3, model.config.joint_attention_dim),
        pooled_projections=torch.randn(batch_size, model.config.pooled_projection_dim),
        timestep=torch.rand(batch_size),
        guidance=torch.ones(batch_size),
        img_ids=torch.zeros(num_tokens, 3),
        txt_ids=torch.zeros(3, 3),
        return_dict=False,
    )[0]


SIZES = [(1, 4), (2, 4), (2, 6), (3, 9), (1, 12), (4, 16)]  # samples of a batch, tokens of an image


@pytest.fixture
def fresh_compiler():
    torch._dynamo.reset()
    with torch._dynamo.config.patch(recompile_limit=8):
        yield
    torch._dynamo.reset()


def test_a_block_that_is_compiled_no_more_is_one_line(tiny, fresh_compiler, monkeypatch, capsys):
    monkeypatch.setattr(models, "RECOMPILE_LIMIT", 1)
    model = copy.deepcopy(tiny.transformer)
    with torch._dynamo.config.patch(recompile_limit=1):
        compile_blocks(model, backend="eager")
        for size in SIZES:
            predict(model, *size)
    said = [line for line in capsys.readouterr().err.splitlines() if line]
    assert said
    assert all(line.startswith("--compile: ") and "uncompiled" in line for line in said)


@pytest.mark.parametrize("script", SCRIPTS)
def test_the_attention_that_a_flag_names_computes_the_transformers(train, short_runs, script, tmp_path, monkeypatch):
    trainer = importlib.import_module(script)
    attention = torch.nn.functional.scaled_dot_product_attention
    compute_loss = trainer.compute_loss
    in_a_step = []
    kernels = []

    def watched_attention(*args, **kwargs):
        if in_a_step:
            kernels.append("any" if torch.backends.cuda.flash_sdp_enabled() else "math")
        return attention(*args, **kwargs)

    def watched_loss(*args, **kwargs):
        in_a_step.append(True)
        loss = compute_loss(*args, **kwargs)
        in_a_step.clear()
        return loss

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", watched_attention)
    monkeypatch.setattr(trainer, "compute_loss", watched_loss)
    for name, extra, expected in (("plain", [], "any"), ("math", ["--attention_backend", "_native_math"], "math")):
        train(script, *short_runs[script], "--max_train_steps", 1, *extra, "--output_dir", tmp_path / name)
        assert set(kernels) == {expected}
        kernels.clear()
    np.testing.assert_allclose(losses(tmp_path / "math"), losses(tmp_path / "plain"), rtol=1e-4)


def test_attention_of_a_gpu_is_refused_without_one(train, short_runs, tmp_path, capsys):
    flags = [*short_runs[SCRIPTS[0]], "--attention_backend", "_native_flash", "--output_dir", tmp_path / "run"]
    with pytest.raises(SystemExit) as stop:
        train(SCRIPTS[0], *flags)
    assert stop.value.code == 2
    message = capsys.readouterr().err
    assert "--attention_backend _native_flash needs a CUDA GPU" in message
    assert "--mixed_precision bf16" in message
    assert not (tmp_path / "run").exists()
