"""Learning rates as they are used, clipping that is off, and models whose sizes or limits differ from FLUX.1-dev's."""

import json
import math
import shutil

import pytest
import torch
from safetensors.torch import load_file

import train_dreambooth_flux_advanced as dreambooth
import train_omini as omini
import train_twinflow as twinflow
from examples.toy import pretrain


COSINE = ("--lr_scheduler", "cosine", "--lr_warmup_steps", 0, "--checkpointing_steps", 2)


def rates(folder):
    return [json.loads(line)["lr"] for line in (folder / "metrics.jsonl").open()]


def cosine(num_steps):
    return [1e-3 * 0.5 * (1 + math.cos(math.pi * step / num_steps)) for step in range(num_steps)]


@pytest.mark.parametrize(
    ("script", "extra"),
    [
        (
            "train_dreambooth_flux_advanced",
            ["--output_name", "tok", "--train_text_encoder_ti", "--token_abstraction", "circle"],
        ),
        *(pytest.param(s, [], marks=pytest.mark.slow) for s in ("train_omini", "train_influxedit", "train_twinflow")),
        pytest.param("train_twinflow", ["--training", "full"], marks=pytest.mark.slow),
    ],
)
def test_a_longer_run_goes_on_by_its_own_schedule_and_keeps_the_shorter_ones_results(
    train, short_runs, tmp_path, capsys, script, extra
):
    run = tmp_path / "tok"
    flags = [*short_runs[script], *COSINE, *extra, "--output_dir", tmp_path if "--output_name" in extra else run]
    train(script, *flags, "--max_train_steps", 2)
    assert rates(run) == pytest.approx(cosine(2))
    assert "another length" not in capsys.readouterr().out
    results = [path.name for path in run.glob("*.safetensors")]
    if extra:
        results = ["transformer/diffusion_pytorch_model.safetensors"]
    if "--output_name" in extra:
        results = ["../tok.safetensors", "tok_emb.safetensors", "embeddings/comfyui/circle.safetensors"]
    shorter = {name: (run / name).read_bytes() for name in results}
    train(script, *flags, "--max_train_steps", 4, "--resume_from_checkpoint", "latest")
    assert rates(run) == pytest.approx([*cosine(2), *cosine(4)[2:]])
    printed = capsys.readouterr().out
    assert "another length" in printed and "step-000002/" in printed
    for name, content in shorter.items():
        assert (run / "step-000002" / name.removeprefix("../")).read_bytes() == content
        assert (run / name).read_bytes() != content or "emb" in name  # tokens are trained in the first half
    train(script, *flags, "--max_train_steps", 4, "--resume_from_checkpoint", "latest")  # nothing is left to train
    assert sorted(path.name for path in run.glob("step-*")) == ["step-000002"]


def test_a_run_that_begins_anew_keeps_what_is_in_its_folder(train, short_runs, tmp_path, capsys):
    script = "train_dreambooth_flux_advanced"
    flags = [*short_runs[script], "--max_train_steps", 2, "--output_dir", tmp_path / "run"]
    drawing = ["--validation_prompt", "a red circle", "--validation_steps", 1, "--num_validation_images", 1]
    train(script, *flags, *drawing)
    names = ["pytorch_lora_weights.safetensors", "validation/step-000001.png", "validation/step-000002.png"]
    earlier = {name: (tmp_path / "run" / name).read_bytes() for name in names}
    capsys.readouterr()
    train(script, *flags, "--seed", 1)
    assert "ended at step 2, in step-000002/" in capsys.readouterr().out
    for name, content in earlier.items():
        assert (tmp_path / "run" / "step-000002" / name).read_bytes() == content
    assert (tmp_path / "run" / names[0]).read_bytes() != earlier[names[0]]
    assert not (tmp_path / "run" / "validation").exists()
    assert "validation/" not in (tmp_path / "run" / "README.md").read_text()
    train(script, *flags, "--seed", 2)
    assert sorted(path.name for path in (tmp_path / "run").glob("step-*")) == ["step-000002", "step-000002-1"]


@pytest.mark.slow
@pytest.mark.parametrize("script", ["train_influxedit", "train_omini", "train_twinflow"])
def test_the_rate_in_the_log_is_the_one_of_the_step(train, short_runs, tmp_path, script):
    train(script, *short_runs[script], *COSINE[:4], "--output_dir", tmp_path / "run")
    assert rates(tmp_path / "run") == pytest.approx(cosine(2))


def test_clipping_can_be_off(train, short_runs, tmp_path):
    script = "train_dreambooth_flux_advanced"
    flags = [*short_runs[script], "--max_train_steps", 1, "--skip_final_inference", "--max_grad_norm"]
    weights = {}
    for norm in (0, 1e9, 1e-9):
        train(script, *flags, norm, "--output_dir", tmp_path / str(norm))
        weights[norm] = load_file(tmp_path / str(norm) / "pytorch_lora_weights.safetensors")
    assert all(torch.equal(value, weights[1e9][name]) for name, value in weights[0].items())
    assert any(not torch.equal(value, weights[1e-9][name]) for name, value in weights[0].items())


@pytest.mark.parametrize("module", [dreambooth, omini, twinflow])
def test_a_model_says_how_long_its_prompts_are(module, short_runs, tiny_model, tmp_path, capsys):
    flags = [str(flag) for flag in [*short_runs[module.__name__], "--output_dir", tmp_path / "out"]]
    place = flags.index("--max_sequence_length")
    del flags[place : place + 2]
    assert module.parse_args(flags).max_sequence_length == 512
    schnell = tmp_path / "schnell"
    shutil.copytree(tiny_model, schnell)
    config = json.loads((schnell / "transformer" / "config.json").read_text())
    (schnell / "transformer" / "config.json").write_text(json.dumps({**config, "guidance_embeds": False}))
    flags += ["--pretrained_model_name_or_path", str(schnell)]
    assert module.parse_args(flags).max_sequence_length == 256
    assert module.parse_args([*flags, "--max_sequence_length", "32"]).max_sequence_length == 32
    with pytest.raises(SystemExit):
        module.parse_args([*flags, "--max_sequence_length", "512"])
    assert "schnell takes at most 256" in capsys.readouterr().err


def test_a_flux_of_few_channels_is_trained(train, short_runs, tiny_pipeline, tmp_path):
    """That of diffusers' tests has tokens of 4 numbers; the VAE's channels count."""
    parts = {name: part for name, part in tiny_pipeline.components.items() if name not in ("scheduler", "vae")}
    torch.manual_seed(0)
    vae = pretrain.AutoencoderKL.from_config({**tiny_pipeline.vae.config, "latent_channels": 1})
    parts["transformer"] = pretrain.FluxTransformer2DModel.from_config(
        {**tiny_pipeline.transformer.config, "in_channels": 4, "out_channels": 4}
    )
    parts = {name: part for name, part in parts.items() if part is not None}
    pretrain.new_pipeline(vae=vae, **parts).save_pretrained(tmp_path / "model")
    script = "train_dreambooth_flux_advanced"
    flags = [
        *short_runs[script],
        "--pretrained_model_name_or_path",
        tmp_path / "model",
        "--output_dir",
        tmp_path / "out",
    ]
    train(script, *flags, "--max_train_steps", 1)
    assert load_file(tmp_path / "out" / "pytorch_lora_weights.safetensors")
