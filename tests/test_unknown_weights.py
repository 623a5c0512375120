"""A model folder whose files hold other weights than the model has is refused by name, in every trainer."""

import shutil
from types import SimpleNamespace

from common.text_encoders import load_text_pipeline

import pytest
import torch
from diffusers import FluxPipeline
from safetensors.torch import load_file, save_file


def changed_copy(model, folder, part, change):
    """A copy of a model's folder in which `change` was made to the tensors {name: value} of one part."""
    shutil.copytree(model, folder)
    (file,) = (folder / part).glob("*.safetensors")
    weights = load_file(file)
    change(weights)
    save_file(weights, file, metadata={"format": "pt"})
    return folder


def add_a_tensor(weights):
    weights["second_clock.weight"] = torch.ones(2)


def lose_a_tensor(weights):
    (name,) = (name for name in weights if name.endswith("final_layer_norm.bias"))
    del weights[name]


@pytest.mark.parametrize(
    "script", ["train_dreambooth_flux_advanced", "train_omini", "train_influxedit", "train_twinflow"]
)
def test_every_trainer_refuses_weights_that_its_transformer_does_not_have(train, short_runs, tmp_path, capsys, script):
    flags = list(short_runs[script])
    model = flags[flags.index("--pretrained_model_name_or_path") + 1]
    folder = changed_copy(model, tmp_path / "model", "transformer", add_a_tensor)
    with pytest.raises(SystemExit) as stop:
        train(script, *flags, "--pretrained_model_name_or_path", folder, "--output_dir", tmp_path / "run")
    assert stop.value.code == 2
    error = capsys.readouterr().err
    assert "second_clock.weight" in error
    assert str(folder) in error


@pytest.mark.parametrize(
    ("change", "name"), [(add_a_tensor, "second_clock.weight"), (lose_a_tensor, "final_layer_norm.bias")]
)
def test_text_encoders_are_checked_too(tiny_model, tmp_path, capsys, change, name):
    folder = changed_copy(tiny_model, tmp_path / "model", "text_encoder", change)
    args = SimpleNamespace(pretrained_model_name_or_path=folder, revision=None, variant=None, cache_dir=None)
    with pytest.raises(SystemExit) as stop:
        load_text_pipeline(FluxPipeline, args, torch.float32)
    assert stop.value.code == 2
    assert name in capsys.readouterr().err


def test_encoders_without_files_of_the_variant_are_loaded_from_their_plain_ones(tiny_model, tmp_path):
    folder = shutil.copytree(tiny_model, tmp_path / "model")
    file = folder / "transformer" / "diffusion_pytorch_model.safetensors"
    file.rename(file.with_suffix(".fp16.safetensors"))
    args = SimpleNamespace(pretrained_model_name_or_path=folder, revision=None, variant="fp16", cache_dir=None)
    assert load_text_pipeline(FluxPipeline, args, torch.float32).text_encoder is not None
