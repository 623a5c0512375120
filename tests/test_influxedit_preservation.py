"""train_influxedit.py --preserve_outputs: the edit is learned, and what other prompts do stays as it is."""

import json
import re

from common.lora import add_lora

import pytest
import torch
from diffusers import FluxTransformer2DModel
from safetensors.torch import load_file
from test_train_influxedit import assert_equal

import train_influxedit as influxedit


SCRIPT = "train_influxedit"
LORA = "pytorch_lora_weights.safetensors"
FILL = influxedit.Fill({})


@pytest.fixture
def prompts_file(tmp_path):
    path = tmp_path / "prompts.txt"
    path.write_text("a red shape\n\na blue shape on the left\nan empty picture\n")
    return path


@pytest.fixture
def flags(short_runs, prompts_file):
    return [*short_runs[SCRIPT], "--preserve_outputs", 2, "--preserve_prompts", prompts_file]


def losses_of(folder):
    return [json.loads(line)["loss"] for line in (folder / "metrics.jsonl").open()]


def weights(folder):
    return load_file(folder / LORA)


def random_inputs():
    """Arguments of `predict_velocity`, and CLIP's pooled embeddings before it was trained."""
    generator = torch.Generator().manual_seed(0)
    latents, noise, input_latents = torch.randn(3, 2, 16, 4, 4, generator=generator)
    condition = influxedit.pack_fill_condition(input_latents, torch.ones(2, 1, 32, 32))
    prompt_embeds = torch.randn(2, 8, 32, generator=generator)
    pooled, base_pooled = torch.randn(2, 2, 32, generator=generator)
    return (latents, noise, torch.tensor([0.2, 0.9]), condition, prompt_embeds), pooled, base_pooled


@pytest.mark.parametrize("modules_to_save", [None, ["x_embedder"]])
def test_the_preservation_loss_is_the_distance_to_the_model_without_adapter(tiny_fill, modules_to_save):
    transformer = FluxTransformer2DModel.from_pretrained(tiny_fill, subfolder="transformer")
    inputs, pooled, base_pooled = random_inputs()
    guidance = torch.ones(2)
    with torch.no_grad():
        base = influxedit.predict_velocity(transformer, *inputs, base_pooled, family=FILL, guidance=guidance)
    parameters = add_lora(
        transformer,
        rank=2,
        alpha=2,
        dropout=0.0,
        target_modules=["attn.to_q", "ff.net.2"],
        modules_to_save=modules_to_save,
    )
    for parameter in parameters:
        torch.nn.init.normal_(parameter, std=0.1)
    adapted = influxedit.predict_velocity(transformer, *inputs, pooled, family=FILL, guidance=guidance)
    losses = influxedit.compute_preservation_loss(
        transformer, *inputs, pooled, base_pooled, family=FILL, guidance=guidance, weighting_scheme="none"
    )
    torch.testing.assert_close(losses, (adapted - base).square().mean(dim=(1, 2)))
    losses.sum().backward()
    gradients = [parameter.grad.clone() for parameter in parameters]
    for parameter in parameters:
        parameter.grad = None
    (adapted - base).square().mean(dim=(1, 2)).sum().backward()
    for parameter, gradient in zip(parameters, gradients, strict=True):
        torch.testing.assert_close(gradient, parameter.grad)


def test_preserved_prompts_move_less(train, short_runs, tiny_fill, prompts_file, tmp_path, capsys):
    flags = [*short_runs[SCRIPT], "--learning_rate", 1e-2, "--max_train_steps", 8, "--cache_latents", "--output_dir"]
    train(SCRIPT, *flags, tmp_path / "plain")
    assert "  preserved  " not in capsys.readouterr().out
    train(SCRIPT, *flags, tmp_path / "kept", "--preserve_outputs", 30, "--preserve_prompts", prompts_file)
    assert re.search(r"  preserved +outputs for 3 prompts, every step", capsys.readouterr().out)
    # at the first step the adapter changes nothing
    assert losses_of(tmp_path / "plain")[0] == losses_of(tmp_path / "kept")[0]

    pipeline = influxedit.FillPipeline.from_pretrained(tiny_fill)
    inputs, _, _ = random_inputs()
    distances = []
    with torch.no_grad():
        prompts = ["a red shape", "an empty picture"]
        prompt_embeds, pooled, _ = pipeline.encode_prompt(prompts, prompts, max_sequence_length=8)
        call = (*inputs[:4], prompt_embeds, pooled)
        base = influxedit.predict_velocity(pipeline.transformer, *call, family=FILL, guidance=torch.full((2,), 3.5))
        for run in ("plain", "kept"):
            pipeline.load_lora_weights(tmp_path / run)
            adapted = influxedit.predict_velocity(
                pipeline.transformer, *call, family=FILL, guidance=torch.full((2,), 3.5)
            )
            distances.append((adapted - base).square().mean().item())
            pipeline.unload_lora_weights()
    assert 0 < distances[1] < distances[0] / 2


def test_preservation_resumes_bit_for_bit_and_does_not_depend_on_caches(train, flags, prompts_file, tmp_path):
    flags = [*flags, "--preserve_every", 2, "--lora_dropout", 0.1, "--train_text_encoder", "--train_embedder"]
    flags += ["--gradient_accumulation_steps", 2, "--checkpointing_steps", 2, "--max_train_steps", 4]
    train(SCRIPT, *flags, "--output_dir", tmp_path / "a" / "run")
    resumed = ["--resume_from_checkpoint", tmp_path / "a" / "run" / "checkpoint-2"]
    for name, extra in {"resumed": resumed, "other ways": ["--cache_latents", "--gradient_checkpointing"]}.items():
        train(SCRIPT, *flags, *extra, "--output_dir", tmp_path / name / "run")
        assert_equal(weights(tmp_path / "a" / "run"), weights(tmp_path / name / "run"))
    prompts_file.write_text("a green shape\n")
    with pytest.raises(SystemExit) as ended:
        train(SCRIPT, *flags, *resumed, "--output_dir", tmp_path / "changed" / "run")
    assert ended.value.code == 2


@pytest.mark.slow
@pytest.mark.parametrize("extra", [["--quantize_base", "nf4"], ["--with_prior_preservation"]], ids=["nf4", "prior"])
def test_preservation_goes_with(train, flags, tmp_path, extra):
    if extra == ["--with_prior_preservation"]:
        extra = [*extra, "--class_data_dir", tmp_path / "class", "--class_prompt", "a shape", "--num_class_images", 2]
    train(SCRIPT, *flags, *extra, "--output_dir", tmp_path / "run")
    assert all(torch.isfinite(value).all() for value in weights(tmp_path / "run").values())


@pytest.mark.slow
def test_two_processes_preserve_alike_with_and_without_caches(runs, flags, tmp_path):
    for name, extra in (("read", []), ("cached", ["--cache_latents"])):
        code = runs.run(SCRIPT, [*flags, *extra, "--output_dir", tmp_path / name / "run"], processes=2)
        assert code == 0, runs.output()[-3000:]
    assert_equal(weights(tmp_path / "read" / "run"), weights(tmp_path / "cached" / "run"))


def test_a_sample_is_preserved_for_its_own_caption_with_other_words(train, short_runs, tmp_path, monkeypatch):
    honest = influxedit.PromptEncoder.encode_prompts
    seen = []
    monkeypatch.setattr(
        influxedit.PromptEncoder, "encode_prompts", lambda self, prompts: seen.append(prompts) or honest(self, prompts)
    )
    words = ("--preserve_outputs", 1, "--preserve_prompts", "background=>wall,sky", "--output_dir", tmp_path / "run")
    train(SCRIPT, *short_runs[SCRIPT], *words)
    for own, others in (seen[-4:-2], seen[-2:]):  # of the two steps
        for prompt, other in zip(own, others, strict=True):
            if "background" in prompt:
                assert other in (prompt.replace("background", "wall"), prompt.replace("background", "sky"))
            else:
                assert "background" not in other


BAD = [
    ("--preserve_outputs 1", "--preserve_outputs needs --preserve_prompts"),
    ("--preserve_prompts x", "--preserve_prompts x needs --preserve_outputs"),
    ("--preserve_every 2", "--preserve_every 2 needs --preserve_outputs"),
    ("--preserve_outputs -1 --preserve_prompts x", "--preserve_outputs: -1 is out of range"),
    ("--preserve_outputs 1 --preserve_prompts nowhere.txt", "--preserve_prompts nowhere.txt: no such file"),
    ("--preserve_outputs 1 --preserve_prompts sks=>dog", "no caption has the words 'sks'"),
]


@pytest.mark.parametrize(("wrong", "message"), BAD)
def test_wrong_use_is_one_line(train, short_runs, tmp_path, capsys, wrong, message):
    with pytest.raises(SystemExit) as ended:
        train(SCRIPT, *short_runs[SCRIPT], "--output_dir", tmp_path / "run", *wrong.split())
    assert ended.value.code == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
