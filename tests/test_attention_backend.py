"""--attention_backend: the kernels that compute attention, in training and validation of all trainers."""

import importlib
import json

from common.models import ATTENTION_BACKENDS, use_attention

import pytest
from diffusers.models.attention_dispatch import AttentionBackendName, _AttentionBackendRegistry


SCRIPTS = ["train_dreambooth_flux_advanced", "train_omini", "train_influxedit", "train_twinflow"]


@pytest.fixture
def calls(monkeypatch):
    """{name: number of times that attention was computed by it}."""
    found = {}

    def counted(name, function):
        def attend(*args, **kwargs):
            found[name] = found.get(name, 0) + 1
            return function(*args, **kwargs)

        return attend

    for name in ("native", "_native_math"):
        key = AttentionBackendName(name)
        monkeypatch.setitem(
            _AttentionBackendRegistry._backends, key, counted(name, _AttentionBackendRegistry._backends[key])
        )
    return found


@pytest.mark.parametrize("script", SCRIPTS)
def test_training_and_validation_compute_attention_by_the_backend(train, short_runs, tmp_path, calls, script):
    flags = [*short_runs[script], "--max_train_steps", 1, "--validation_split", 0.4]
    train(script, *flags, "--output_dir", tmp_path / "plain")
    assert calls.keys() == {"native"}
    calls.clear()
    train(script, *flags, "--attention_backend", "_native_math", "--output_dir", tmp_path / "out")
    assert calls.keys() == {"_native_math"}
    losses = [json.loads((tmp_path / run / "metrics.jsonl").read_text())["loss"] for run in ("out", "plain")]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)
    assert json.loads((tmp_path / "out" / "args.json").read_text())["args"]["attention_backend"] == "_native_math"
    assert _AttentionBackendRegistry.get_active_backend()[0] == "native"  # for what the process does next


def test_every_backend_is_one_of_diffusers():
    for name in ATTENTION_BACKENDS:
        assert AttentionBackendName(name) in _AttentionBackendRegistry._backends
    with use_attention(None):
        assert _AttentionBackendRegistry.get_active_backend()[0] == "native"


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_backend_that_cannot_work_is_refused_with_the_reason(short_runs, tmp_path, capsys, script):
    def error_of(*flags):
        with pytest.raises(SystemExit) as end:
            module.parse_args([str(flag) for flag in [*short_runs[script], "--output_dir", tmp_path / "out", *flags]])
        assert end.value.code == 2
        return capsys.readouterr().err

    module = importlib.import_module(script)
    assert "--attention_backend _native_cudnn needs a CUDA GPU" in error_of("--attention_backend", "_native_cudnn")
    error = error_of("--attention_backend", "_native_flash", "--mixed_precision", "no")
    assert "--attention_backend _native_flash needs a CUDA GPU" in error
    assert "--mixed_precision bf16" in error
    assert "flash-attn" in error_of("--attention_backend", "flash")  # the package that is not installed
    assert "invalid choice: 'sage'" in error_of("--attention_backend", "sage")  # has no backward pass
    if script == "train_omini":
        error = error_of("--attention_backend", "_native_flash", "--condition_type", "token_integration")
        assert "takes no mask" in error
    if script == "train_twinflow":
        assert "no effect on sana" in error_of("--attention_backend", "_native_math", "--model_type", "sana")
        assert "takes no mask" in error_of("--attention_backend", "_native_flash", "--model_type", "qwenimage")
    assert not (tmp_path / "out").exists()
