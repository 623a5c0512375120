"""train_dreambooth_flux_advanced.py on FLUX.2-klein: latents, target layers, exact resume, caches, files."""

import argparse
import json
import os
import shutil
import subprocess
import sys

from common.latents import encode_moments, pack_latents, to_tensor
from common.lora import add_lora, target_layers
from common.validation import generate_images

import numpy as np
import pytest
import tiny_backbones
import torch
from conftest import ROOT
from diffusers import Flux2KleinPipeline, Flux2Pipeline, FluxKontextPipeline
from PIL import Image
from safetensors.torch import load_file
from test_train_dreambooth import quickstart_flags, toy_pipeline, train_on_the_toy

import train_dreambooth_flux_advanced as dreambooth


SCRIPT = "train_dreambooth_flux_advanced"
LORA = "pytorch_lora_weights.safetensors"
PROMPT = "a red circle"


@pytest.fixture
def flags(distilled_folder, pictures):
    """A short run on tiny things; later flags override earlier ones."""
    return [
        *("--pretrained_model_name_or_path", distilled_folder, "--instance_data_dir", pictures, "--resolution", 32),
        *("--max_sequence_length", 48, "--train_batch_size", 2, "--rank", 2, "--learning_rate", 1e-2),
        *("--caption_dropout", 0.3, "--report_to", "none", "--max_train_steps", 4),
    ]


def klein_family(is_distilled=False):
    return dreambooth.Flux2Klein({"is_distilled": is_distilled})


def weights(folder):
    return load_file(folder / LORA)


def assert_equal(a, b):
    assert a.keys() == b.keys()
    assert not [key for key in a if not torch.equal(a[key], b[key])]


def some_pixels():
    rng = np.random.default_rng(0)
    image = Image.fromarray(rng.integers(0, 255, (4, 6, 3), dtype=np.uint8)).resize((48, 32), Image.Resampling.BICUBIC)
    return to_tensor(image)[None]  # [1, 3, 32, 48]


@torch.no_grad()
def test_latents_and_tokens_are_those_of_the_pipeline(klein):
    pixels = some_pixels()
    latents = klein_family().sample_latents(encode_moments(klein.vae, pixels), klein.vae, torch.Generator())
    tokens = pack_latents(latents)
    theirs = klein._encode_vae_image(pixels, generator=None)  # [1, 4C, h/2, w/2]
    torch.testing.assert_close(tokens, klein._pack_latents(theirs), rtol=0, atol=1e-6)
    assert abs(tokens.std() - 1) > 0.01  # the statistics are not those of this image alone

    ids = klein._prepare_latent_ids(theirs)
    patches = klein._unpack_latents_with_ids(tokens, ids)
    std = torch.sqrt(klein.vae.bn.running_var + klein.vae.config.batch_norm_eps).view(1, -1, 1, 1)
    patches = patches * std + klein.vae.bn.running_mean.view(1, -1, 1, 1)
    decoded = klein.vae.decode(klein._unpatchify_latents(patches)).sample
    expected = klein.vae.decode(klein.vae.encode(pixels).latent_dist.mode()).sample
    torch.testing.assert_close(decoded, expected, rtol=0, atol=1e-5)


@torch.no_grad()
def test_the_transformer_is_called_as_the_pipeline_calls_it(klein):
    calls = []
    hook = klein.transformer.register_forward_hook(
        lambda module, args, kwargs, output: calls.append((kwargs, output[0])), with_kwargs=True
    )
    klein.set_progress_bar_config(disable=True)
    try:
        klein(prompt=PROMPT, height=32, width=48, num_inference_steps=2, guidance_scale=1, max_sequence_length=48)
    finally:
        hook.remove()
    theirs, expected = calls[-1]
    embeds = theirs["encoder_hidden_states"]
    tokens = theirs["hidden_states"]
    ours = klein_family().predict(
        klein.transformer,
        tokens,
        theirs["timestep"],
        embeds,
        embeds.new_zeros(1, 0),
        guidance=None,
        height=4,
        width=6,
    )
    assert torch.equal(ours, expected)


def test_the_loss_at_fixed_noise_falls(klein):
    torch.manual_seed(0)
    model = tiny_backbones.flux2_klein().transformer.requires_grad_(False)
    family = klein_family()
    with torch.no_grad():
        moments = encode_moments(klein.vae, some_pixels())
        latents = family.sample_latents(moments, klein.vae, torch.Generator())
        embeds = klein.encode_prompt(PROMPT, max_sequence_length=32)[0]
    parameters = add_lora(model, rank=8, alpha=8, dropout=0.0, target_modules=family.target_modules(model))
    optimizer = torch.optim.AdamW(parameters, lr=2e-2)
    noise = torch.randn(latents.shape, generator=torch.Generator().manual_seed(0))
    losses = []
    for _ in range(60):
        loss = dreambooth.compute_loss(
            model,
            latents,
            noise,
            torch.tensor([0.5]),
            embeds,
            embeds.new_zeros(1, 0),
            family=family,
            guidance=None,
            weighting_scheme="none",
        ).mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0] / 2


def test_every_linear_layer_of_the_blocks_gets_a_lora(klein):
    names = klein_family().target_modules(klein.transformer)
    assert "single_transformer_blocks.1.attn.to_qkv_mlp_proj" in names
    assert "single_transformer_blocks.1.attn.to_out" in names
    assert "transformer_blocks.0.ff_context.linear_in" in names
    outside = [name for name in names if "transformer_blocks." not in name]
    assert not outside
    args = argparse.Namespace(lora_layers="attn.to_out,attn.to_q")
    chosen = dreambooth.lora_targets(args, klein_family(), klein.transformer)
    assert chosen == [
        *(f"single_transformer_blocks.{i}.attn.to_out" for i in range(2)),
        "transformer_blocks.0.attn.to_q",
    ]
    assert len(target_layers(klein.transformer, chosen)) == 3


def test_caches_validation_and_an_interruption_do_not_change_training(train, flags, tmp_path):
    runs = {
        "plain": ["--checkpointing_steps", 2],
        "cached": [
            *("--cache_latents", "--cache_latents_to_disk", "--cache_text_encoder_outputs_to_disk"),
            *("--disk_cache_dir", tmp_path / "cache", "--validation_prompt", PROMPT, "--num_validation_images", 1),
            *("--validation_steps", 2, "--offload"),
        ],
    }
    for name, extra in runs.items():
        train(SCRIPT, *flags, *extra, "--output_dir", tmp_path / name)
    plain = weights(tmp_path / "plain")
    assert max(value.abs().max() for key, value in plain.items() if "lora_B" in key) > 0
    assert_equal(plain, weights(tmp_path / "cached"))

    shutil.rmtree(tmp_path / "plain" / "checkpoint-4")
    (tmp_path / "plain" / LORA).unlink()
    resume = ["--checkpointing_steps", 2, "--resume_from_checkpoint", "latest"]
    train(SCRIPT, *flags, *resume, "--output_dir", tmp_path / "plain")
    assert_equal(plain, weights(tmp_path / "plain"))


@pytest.mark.parametrize("is_distilled", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_the_file_draws_in_diffusers_what_validation_drew(
    train, run_program, flags, klein_folder, distilled_folder, tmp_path, monkeypatch, is_distilled
):
    folder = distilled_folder if is_distilled else klein_folder
    drawn = []

    def keep(*args, **kwargs):
        drawn[:] = generate_images(*args, **kwargs)
        return list(drawn)

    monkeypatch.setattr(dreambooth, "generate_images", keep)
    run = tmp_path / "run"
    extra = ["--pretrained_model_name_or_path", folder, "--lora_alpha", 4, "--max_train_steps", 2]
    extra += ["--validation_prompt", PROMPT, "--num_validation_images", 1, "--output_dir", run]
    train(SCRIPT, *flags, *extra)

    pipeline = Flux2KleinPipeline.from_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    steps = {"num_inference_steps": 4, "guidance_scale": 1.0} if is_distilled else {}
    call = {"prompt": PROMPT, "height": 32, "width": 32, "max_sequence_length": 48, **steps}
    without = pipeline(**call, generator=torch.Generator().manual_seed(0)).images[0]
    pipeline.load_lora_weights(run)
    wrapped = [name for name, module in pipeline.transformer.named_modules() if getattr(module, "lora_A", {})]
    assert len(wrapped) == len(weights(run)) // 2
    image = pipeline(**call, generator=torch.Generator().manual_seed(0)).images[0]
    assert np.abs(np.asarray(image, int) - np.asarray(drawn[0], int)).max() <= 1  # another batch of prompts rounds
    assert np.abs(np.asarray(image, int) - np.asarray(without, int)).max() > 1

    run_program("examples/dreambooth/generate.py", run, "--prompt", PROMPT, "--output", tmp_path)
    generated = np.asarray(Image.open(tmp_path / "0.png"), int)
    assert np.abs(generated - np.asarray(image, int)).max() <= 1
    card = (run / "README.md").read_text()
    assert "Flux2KleinPipeline" in card
    assert ("num_inference_steps=4" in card) == is_distilled


@pytest.mark.parametrize(
    ("extra", "words"),
    [
        (["--train_text_encoder"], "CLIP"),
        (["--train_text_encoder_ti", "--token_abstraction", "a"], "new tokens"),
        (["--output_name", "x", "--save_format", "kohya"], "FLUX.1"),
        (["--lora_layers", "attn.to_x"], "attn.to_x"),
        (["--network_module", "networks.lora_flux"], "networks.lora_flux is for FLUX.1"),
    ],
)
def test_what_only_flux1_has_is_refused(flags, tmp_path, capsys, extra, words):
    with pytest.raises(SystemExit, match="2"):
        dreambooth.parse_args([str(flag) for flag in [*flags, *extra, "--output_dir", tmp_path / "run"]])
    assert words in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_guidance_that_klein_does_not_read_is_named(flags, tmp_path, capsys):
    dreambooth.parse_args([str(flag) for flag in [*flags, "--guidance_scale", 2, "--output_dir", tmp_path / "run"]])
    assert "--guidance_scale (it needs a model with a guidance embedding)" in capsys.readouterr().err


def test_guidance_that_a_distilled_klein_does_not_draw_with_is_named(flags, klein_folder, tmp_path, capsys):
    prompts = tmp_path / "prompts.txt"
    prompts.write_text(f"{PROMPT} --g 3\n")
    flags = [*flags, "--validation_guidance_scale", 3, "--output_dir", tmp_path / "run"]
    drawn = ["--validation_prompt", PROMPT]
    dreambooth.parse_args([str(flag) for flag in [*flags, *drawn]])
    said = "--validation_guidance_scale (it needs a model that draws with guidance)"
    assert said in capsys.readouterr().err
    args = dreambooth.parse_args([str(flag) for flag in [*flags, "--validation_prompts", prompts]])
    *_, problems = dreambooth.validation_prompts(args, klein_family(is_distilled=True))
    assert "--g 3" in problems[0]
    capsys.readouterr()

    base = ["--pretrained_model_name_or_path", klein_folder]
    dreambooth.parse_args([str(flag) for flag in [*flags, *base, *drawn]])
    assert said not in capsys.readouterr().err
    *_, problems = dreambooth.validation_prompts(args, klein_family())
    assert not problems


def test_a_transformer_of_another_model_is_refused_by_what_was_found(flags, tiny_model, tmp_path, capsys):
    folder = tmp_path / "mixed"
    shutil.copytree(flags[1], folder)
    shutil.rmtree(folder / "transformer")
    shutil.copytree(tiny_model / "transformer", folder / "transformer")
    with pytest.raises(SystemExit, match="2"):
        dreambooth.parse_args([str(flag) for flag in [*flags, "--pretrained_model_name_or_path", folder]])
    assert "FluxTransformer2DModel" in capsys.readouterr().err


def test_a_run_continues_from_a_file(train, flags, tmp_path):
    train(SCRIPT, *flags, "--max_train_steps", 1, "--output_dir", tmp_path / "first")
    file = tmp_path / "first" / LORA
    train(SCRIPT, *flags, "--max_train_steps", 1, "--lora_path", file, "--output_dir", tmp_path / "second")
    first, second = weights(tmp_path / "first"), weights(tmp_path / "second")
    moved = max((first[key] - second[key]).abs().max() for key in first)
    assert 0 < moved < 0.05  # one step of 1e-2 away, not from new random matrices


def test_flux2_dev_trains_and_its_pipeline_loads_the_file(train, run_program, flags, tmp_path):
    torch.manual_seed(0)
    tiny_backbones.flux2_dev().save_pretrained(tmp_path / "dev")
    run = tmp_path / "run"
    extra = ["--pretrained_model_name_or_path", tmp_path / "dev", "--max_sequence_length", 512]
    train(SCRIPT, *flags, *extra, "--max_train_steps", 2, "--output_dir", run)
    assert json.loads((run / "args.json").read_text())["args"]["guidance_scale"] == 3.5

    pipeline = Flux2Pipeline.from_pretrained(tmp_path / "dev")
    pipeline.set_progress_bar_config(disable=True)
    pipeline.load_lora_weights(run)
    call = {"prompt": PROMPT, "height": 32, "width": 32, "num_inference_steps": 2}
    image = pipeline(**call, generator=torch.Generator().manual_seed(0)).images[0]
    run_program(
        "examples/dreambooth/generate.py", run, "--prompt", PROMPT, "--num_inference_steps", 2, "--output", tmp_path
    )
    generated = np.asarray(Image.open(tmp_path / "0.png"), int)
    assert np.abs(generated - np.asarray(image, int)).max() <= 1


def test_kontext_is_trained_as_flux1_from_prompts(train, tiny_pipeline, tiny_model, pictures, tmp_path):
    parts = {name: part for name, part in tiny_pipeline.components.items() if part is not None}
    FluxKontextPipeline(**parts).save_pretrained(tmp_path / "kontext")
    run = ["--instance_data_dir", pictures, "--resolution", 32, "--max_sequence_length", 8, "--rank", 2]
    run += ["--train_batch_size", 2, "--max_train_steps", 2, "--report_to", "none", "--learning_rate", 1e-2]
    for name, folder in (("kontext", tmp_path / "kontext"), ("dev", tiny_model)):
        train(SCRIPT, *run, "--pretrained_model_name_or_path", folder, "--output_dir", tmp_path / f"{name}-lora")
    assert_equal(weights(tmp_path / "kontext-lora"), weights(tmp_path / "dev-lora"))
    pipeline = FluxKontextPipeline.from_pretrained(tmp_path / "kontext")
    pipeline.load_lora_weights(tmp_path / "kontext-lora")
    wrapped = [name for name, module in pipeline.transformer.named_modules() if getattr(module, "lora_A", {})]
    assert len(wrapped) == len(weights(tmp_path / "kontext-lora")) // 2


def test_a_4_bit_base_keeps_prior_and_outputs(train, flags, tmp_path):
    """Quantized, checkpointed, with class images and preserved prompts."""
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a blue square\na star\n")
    run = tmp_path / "run"
    extra = ["--quantize_base", "nf4", "--gradient_checkpointing", "--aspect_ratio_buckets", "32,32;32,48;48,32"]
    extra += ["--with_prior_preservation", "--class_prompt", "a shape", "--class_data_dir", tmp_path / "class"]
    extra += ["--num_class_images", 2, "--preserve_outputs", 1, "--preserve_prompts", prompts, "--max_train_steps", 2]
    train(SCRIPT, *flags, *extra, "--output_dir", run)
    assert len(list((tmp_path / "class").glob("*.png"))) == 2
    trained = weights(run)
    assert all(torch.isfinite(value).all() for value in trained.values())
    assert max(value.abs().max() for key, value in trained.items() if "lora_B" in key) > 0


@pytest.mark.slow
def test_masks_and_a_file_of_prompts(train, flags, pictures, tmp_path):
    masks = tmp_path / "masks"
    masks.mkdir()
    for path in pictures.glob("*.png"):
        size = Image.open(path).size
        mask = Image.new("L", size)
        mask.paste(255, (0, 0, size[0] // 2, size[1]))
        mask.save(masks / path.name)
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a circle --w 48 --d 5 --am 0.5\nred --s 2\n")
    runs = {
        "plain": [],
        "shown": ["--mask_data_dir", masks, "--validation_prompts", prompts, "--checkpointing_steps", 1],
        "cached": ["--mask_data_dir", masks, "--cache_latents"],
    }
    flags = [*flags, "--max_train_steps", 2, "--output_dir"]
    for name, extra in runs.items():
        train(SCRIPT, *flags, tmp_path / name, *extra)
    assert_equal(weights(tmp_path / "shown"), weights(tmp_path / "cached"))
    assert (tmp_path / "shown" / "validation" / "step-000002.png").exists()
    plain, shown = weights(tmp_path / "plain"), weights(tmp_path / "shown")
    assert any(not torch.equal(plain[key], shown[key]) for key in plain)

    # the prompts are no part of what a run is
    prompts.write_text("blue --h 48\n")
    resumed = [*runs["shown"], "--resume_from_checkpoint", tmp_path / "shown" / "checkpoint-1"]
    train(SCRIPT, *flags, tmp_path / "resumed", *resumed)
    assert_equal(weights(tmp_path / "shown"), weights(tmp_path / "resumed"))


@pytest.mark.slow
def test_two_processes_train(flags, tmp_path):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    command += [ROOT / f"{SCRIPT}.py", *flags, "--max_train_steps", 2, "--output_dir", tmp_path / "run"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    subprocess.run([str(word) for word in command], env=environment, cwd=ROOT, check=True, capture_output=True)
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").open()]
    assert [row["step"] for row in rows] == [1, 2]
    assert max(value.abs().max() for key, value in weights(tmp_path / "run").items() if "lora_B" in key) > 0


@pytest.mark.slow
@pytest.mark.learning
def test_klein_learns_a_subject_and_keeps_the_rest(train, glyph_pictures, tmp_path):
    from examples.toy.compare import evaluate

    flags = quickstart_flags(tmp_path)
    layers = flags.index("--lora_layers")  # FLUX.1's names
    del flags[layers : layers + 2]
    unknown, before, _ = evaluate(toy_pipeline("flux2"), "glyph")
    pipeline, seconds = train_on_the_toy(train, glyph_pictures, tmp_path / "run", *flags, model="flux2")
    subject, after, _ = evaluate(pipeline, "glyph")
    print(f"subject: {unknown:.0f} -> {subject:.0f} of 100 (bar 60), trained in {seconds:.0f} s of a processor")
    print(f"ordinary prompts: {before:.0f} -> {after:.0f} of 100 (bar {0.85 * before:.0f})")
    assert subject >= 60
    assert after >= 0.85 * before
