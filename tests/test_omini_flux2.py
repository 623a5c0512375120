"""train_omini.py on FLUX.2-klein: the forward pass of its KV pipeline, exact resume, caches, files, refusals."""

import argparse
import json
import os
import shutil
import subprocess
import sys

from common.latents import encode_moments, to_tensor
from common.lora import add_lora, target_layers
from common.text_encoders import load_text_pipeline
from common.validation import generate_images

import numpy as np
import pytest
import tiny_backbones
import torch
from conftest import ROOT
from diffusers import Flux2KleinKVPipeline
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import train_omini as omini
from examples.omini import generate


SCRIPT = "train_omini"
PROMPT = "a red circle"


@pytest.fixture(scope="session")
def klein_folder(tmp_path_factory):
    """A tiny FLUX.2-klein, distilled."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("klein")
    pipeline = tiny_backbones.flux2_klein(is_distilled=True)
    for name, parameter in pipeline.transformer.named_parameters():
        if "norm_" in name and "norm_out" not in name:  # of queries and keys: attention chooses
            parameter.data.fill_(2.0)
    pipeline.save_pretrained(folder)
    return folder


@pytest.fixture
def klein(klein_folder):
    """Its KV pipeline, with a LoRA of random weights."""
    pipeline = Flux2KleinKVPipeline.from_pretrained(klein_folder)
    pipeline.set_progress_bar_config(disable=True)
    torch.manual_seed(1)
    pipeline.transformer.requires_grad_(False)
    targets = omini.Flux2Klein.target_modules
    for parameter in add_lora(pipeline.transformer, rank=2, alpha=2, dropout=0.0, target_modules=targets):
        parameter.data.normal_(std=0.2)
    return pipeline


@pytest.fixture
def flags(klein_folder, pictures):
    """A short run on tiny things; later flags override earlier ones."""
    return [
        *("--pretrained_model_name_or_path", klein_folder, "--instance_data_dir", pictures, "--target_size", 64),
        *("--max_sequence_length", 32, "--train_batch_size", 2, "--rank", 2, "--optimizer", "adamw"),
        *("--learning_rate", 1e-2, "--condition_type", "canny", "--drop_text_prob", 0.3, "--drop_image_prob", 0.3),
        *("--report_to", "none", "--max_train_steps", 4),
    ]


def weights(folder):
    return load_file(folder / "canny.safetensors")


def assert_equal(a, b):
    assert a.keys() == b.keys()
    assert not [key for key in a if not torch.equal(a[key], b[key])]


def some_image(width, height, seed=0):
    rng = np.random.default_rng(seed)
    image = Image.fromarray(rng.integers(0, 255, (4, 4, 3), dtype=np.uint8))
    return image.resize((width, height), Image.Resampling.BICUBIC)


def latents_of(images, vae):
    family = omini.Flux2Klein({})
    moments = [encode_moments(vae, to_tensor(image)[None]) for image in images]
    return [family.sample_latents(each, vae, torch.Generator()) for each in moments]


def predict(transformer, x_t, t, prompt_embeds, condition_latents, height, width):
    """The velocity that training computes."""
    return omini.Flux2Klein({}).predict(
        transformer,
        x_t,
        t,
        prompt_embeds,
        None,
        condition_latents,
        specs=[],
        latent_masks=[None],
        independent_condition=True,
        guidance=None,
        height=height,
        width=width,
    )


@torch.no_grad()
def test_training_computes_what_the_kv_pipeline_computes_with_references_and_from_its_cache(klein):
    images = [some_image(64, 80), some_image(96, 64, seed=1)]
    calls = []
    hook = klein.transformer.register_forward_hook(
        lambda module, args, kwargs, output: calls.append((kwargs, output[0])), with_kwargs=True
    )
    call = {"prompt": PROMPT, "height": 64, "width": 96, "num_inference_steps": 3, "max_sequence_length": 32}
    klein(image=images, **call, generator=torch.Generator().manual_seed(0))
    hook.remove()
    assert [kwargs["kv_cache_mode"] for kwargs, _ in calls] == ["extract", "cached", "cached"]

    condition_latents = latents_of(images, klein.vae)
    for kwargs, expected in calls:
        x_t = kwargs["hidden_states"][:, -24:]
        embeds = kwargs["encoder_hidden_states"]
        velocity = predict(klein.transformer, x_t, kwargs["timestep"], embeds, condition_latents, 8, 12)
        torch.testing.assert_close(velocity, expected, rtol=0, atol=2e-5 * expected.abs().max().item())
        other = predict(klein.transformer, x_t, kwargs["timestep"], embeds, condition_latents[::-1], 8, 12)
        assert (other - expected).abs().max() > 1e-3 * expected.abs().max()


@torch.no_grad()
def test_keys_and_values_of_a_condition_depend_on_nothing_but_conditions(klein):
    condition = latents_of([some_image(64, 64)], klein.vae)
    other_condition = latents_of([some_image(64, 64, seed=1)], klein.vae)
    caches = []
    hook = klein.transformer.register_forward_hook(lambda module, args, output: caches.append(output[1]))
    for seed, t, latents in ((0, 1.0, condition), (1, 0.3, condition), (1, 0.3, other_condition)):
        generator = torch.Generator().manual_seed(seed)
        x_t = torch.randn(1, 24, 16, generator=generator)
        embeds = torch.randn(1, 7, 48, generator=generator)
        predict(klein.transformer, x_t, torch.tensor([t]), embeds, latents, 8, 12)
    hook.remove()
    first, second, third = ([*each.double_block_caches, *each.single_block_caches] for each in caches)
    for one, same, other in zip(first, second, third, strict=True):
        torch.testing.assert_close(torch.stack(one.get()), torch.stack(same.get()), rtol=0, atol=1e-6)
        assert (torch.stack(one.get()) - torch.stack(other.get())).abs().max() > 1e-3


def test_checkpointing_changes_neither_loss_nor_gradient(klein):
    transformer = klein.transformer
    condition = latents_of([some_image(64, 64)], klein.vae)
    generator = torch.Generator().manual_seed(0)
    x_t = torch.randn(1, 24, 16, generator=generator)
    embeds = torch.randn(1, 7, 48, generator=generator)
    gradients = []
    for enable in (lambda: None, transformer.enable_gradient_checkpointing):
        enable()
        transformer.zero_grad()
        predict(transformer, x_t, torch.tensor([0.5]), embeds, condition, 8, 12).square().mean().backward()
        gradients.append({name: p.grad for name, p in transformer.named_parameters() if p.requires_grad})
    plain, checkpointed = gradients
    assert len(plain) == 2 * len(target_layers(transformer, omini.Flux2Klein.target_modules))
    assert not [name for name, gradient in plain.items() if not gradient.abs().max() > 0]
    assert_equal(plain, checkpointed)


def test_caches_validation_and_an_interruption_do_not_change_training(train, flags, pictures, tmp_path):
    drawn = ["--validation_prompt", PROMPT, "--validation_image", pictures / "0.png", "--num_validation_images", 1]
    runs = {
        "plain": ["--checkpointing_steps", 2, "--no-cache_prompts"],
        "cached": ["--cache_latents", *drawn, "--validation_steps", 2, "--offload"],
    }
    for name, extra in runs.items():
        train(SCRIPT, *flags, *extra, "--output_dir", tmp_path / name)
    plain = weights(tmp_path / "plain")
    assert max(value.abs().max() for key, value in plain.items() if "lora_B" in key) > 0
    assert_equal(plain, weights(tmp_path / "cached"))
    assert (tmp_path / "cached" / "validation" / "step-000002.png").exists()

    shutil.rmtree(tmp_path / "plain" / "checkpoint-4")
    (tmp_path / "plain" / "canny.safetensors").unlink()
    train(SCRIPT, *flags, *runs["plain"], "--resume_from_checkpoint", "latest", "--output_dir", tmp_path / "plain")
    assert_equal(plain, weights(tmp_path / "plain"))


def test_the_file_draws_in_diffusers_what_validation_drew(
    train, run_program, flags, klein_folder, pictures, tmp_path, monkeypatch
):
    drawn = []

    def keep(accelerator, pipeline, calls, **settings):
        drawn[:] = generate_images(accelerator, pipeline, calls, **settings)
        drawn.append(calls[0]["image"][0])
        return drawn[:-1]

    monkeypatch.setattr(omini, "generate_images", keep)
    run = tmp_path / "run"
    extra = ["--lora_alpha", 4, "--max_train_steps", 2, "--output_dir", run, "--num_validation_images", 1]
    train(SCRIPT, *flags, *extra, "--validation_prompt", PROMPT, "--validation_image", pictures / "0.png")
    image, condition = (np.asarray(each, int) for each in drawn)
    with safe_open(run / "canny.safetensors", "pt") as file:
        header = file.metadata()
    about = json.loads(header["omini"])
    assert about["independent_condition"] is True
    assert about["conditions"][0]["position_scale"] == 1
    assert header["modelspec.architecture"].startswith("Flux.2-klein")

    pipeline = Flux2KleinKVPipeline.from_pretrained(klein_folder)
    pipeline.set_progress_bar_config(disable=True)
    call = {"prompt": PROMPT, "image": drawn[1], "height": 64, "width": 64, "max_sequence_length": 32}
    without = pipeline(**call, generator=torch.Generator().manual_seed(0)).images[0]
    pipeline.load_lora_weights(run, weight_name="canny.safetensors")
    wrapped = [name for name, module in pipeline.transformer.named_modules() if getattr(module, "lora_A", {})]
    assert len(wrapped) == len(weights(run)) // 2
    stock = np.asarray(pipeline(**call, generator=torch.Generator().manual_seed(0)).images[0], int)
    assert np.abs(stock - image).max() <= 1  # another batch of prompts rounds
    assert np.abs(stock - np.asarray(without, int)).max() > 1

    path = tmp_path / "image.png"
    words = [run, "--prompt", PROMPT, "--image", pictures / "0.png", "--output", path]
    run_program("examples/omini/generate.py", *words)
    assert np.abs(np.asarray(Image.open(path), int) - stock).max() <= 1
    Image.fromarray(condition.astype(np.uint8)).save(tmp_path / "edges.png")
    words = [run, "--prompt", PROMPT, "--condition", tmp_path / "edges.png", "--kv_cache", "--output", path]
    run_program("examples/omini/generate.py", *words)
    assert np.abs(np.asarray(Image.open(path), int) - stock).max() <= 1


def test_what_generation_cannot_do_is_refused(klein_folder, pictures, tmp_path, capsys):
    flags = ["--pretrained_model_name_or_path", klein_folder, "--instance_data_dir", pictures, "--target_size", 64]
    files = []
    for name in ("canny", "coloring"):
        args = parsed(flags, "--condition_type", name, "--output_dir", tmp_path / name)
        header = omini.adapter_metadata(args, omini.condition_specs(args), name)
        files.append(tmp_path / f"{name}.safetensors")
        save_file({"transformer.x_embedder.lora_A.weight": torch.zeros(1, 16)}, files[-1], header)
    for words, named in (
        (files, str(files[1])),
        ([files[0], "--style_lora", files[1]], "--style_lora"),
        ([files[0], "--guidance_scale", 2], "--guidance_scale"),
        ([files[0], "--image_guidance_scale", 2], "--image_guidance_scale"),
        ([files[0], "--size", 32, 64], "32x64 of canny"),
        ([files[0], "--size", 2048, 1024], "2048x1024 of canny"),
    ):
        images = [pictures / "0.png"] * (2 if words is files else 1)
        with pytest.raises(SystemExit, match="2"):
            generate.parse_args([str(word) for word in [*words, "--prompt", "x", "--image", *images]])
        assert named in capsys.readouterr().err


def test_a_model_of_the_kv_pipeline_is_the_same_family(klein, tmp_path):
    """As FLUX.2-klein-9b-kv is; and a base model draws in more steps."""
    klein.save_pretrained(tmp_path / "kv")
    args = argparse.Namespace(pretrained_model_name_or_path=tmp_path / "kv", revision=None, cache_dir=None)
    family = omini.find_family(args)
    assert isinstance(family, omini.Flux2Klein)
    assert family.num_inference_steps == 4
    index = json.loads((tmp_path / "kv" / "model_index.json").read_text()) | {"is_distilled": False}
    (tmp_path / "kv" / "model_index.json").write_text(json.dumps(index))
    assert omini.find_family(args).num_inference_steps == 50
    args.variant = None
    assert load_text_pipeline(family.text_pipeline_class, args, torch.float32).text_encoder is not None


def parsed(flags, *extra):
    return omini.parse_args([str(flag) for flag in [*flags, *extra]])


@pytest.mark.parametrize(
    ("extra", "words"),
    [
        (["--position_delta", "0,-4"], ["--position_delta", "rows and columns"]),
        (["--position_scale", 2], ["--position_scale", "rows and columns"]),
        (["--condition_type", "canny", "fill", "--adapter_per_condition"], ["--adapter_per_condition"]),
        (["--condition_type", "token_integration"], ["token_integration", "fill"]),
        (["--target_size", 128, "--condition_size", 64], ["--condition_size 64x64 of canny", "--target_size 128x128"]),
        (["--target_size", 32], ["32x32 of canny", "64 pixels"]),
        (["--target_size", "2048x1024"], ["2048x1024 of canny", "1024 x 1024"]),
        (["--target_size", 64, "--condition_type", "sr"], ["32x32 of sr"]),
        (["--target_modules", "transformer_blocks.0.ff_context.linear_in"], ["ff_context", "do not pass"]),
        (["--target_modules", "transformer_blocks.0.norm1.linear"], ["matches no linear layer"]),
    ],
)
def test_what_its_pipeline_cannot_draw_is_refused(flags, tmp_path, capsys, extra, words):
    with pytest.raises(SystemExit, match="2"):
        parsed(flags, *extra, "--output_dir", tmp_path / "run")
    error = capsys.readouterr().err
    assert not [word for word in words if word not in error]
    assert not (tmp_path / "run").exists()


def test_a_class_of_ones_own_is_refused(flags, tmp_path, capsys):
    at = flags.index("--instance_data_dir")
    own = [*flags[:at], *flags[at + 2 :], "--dataset_class", "data.py:Mine", "--condition_type", "custom"]
    with pytest.raises(SystemExit, match="2"):
        parsed(own)
    assert "--dataset_class is for FLUX.1" in capsys.readouterr().err


def test_another_model_is_refused_by_what_was_found(flags, tmp_path, capsys):
    folder = tmp_path / "dev"
    parts = tiny_backbones.flux2_parts(joint_attention_dim=48, guidance_embeds=True)
    for name in ("transformer", "vae"):
        parts[name].save_pretrained(folder / name)
    (folder / "model_index.json").write_text(json.dumps({"_class_name": "Flux2Pipeline"}))
    with pytest.raises(SystemExit, match="2"):
        parsed(flags, "--pretrained_model_name_or_path", folder)
    error = capsys.readouterr().err
    assert "holds a Flux2Transformer2DModel" in error
    assert "FLUX.2-klein" in error


def test_guidance_that_klein_does_not_read_is_named(flags, pictures, tmp_path, capsys):
    prompts = tmp_path / "prompts.txt"
    prompts.write_text(f"{PROMPT} --g 3\n{PROMPT} --n dark --l 4\n{PROMPT} --d 1 --am 0.5 --s 2\n")
    extra = ["--guidance_scale", 2, "--validation_guidance_scale", 3, "--validation_prompts", prompts]
    args = parsed(flags, *extra, "--validation_image", pictures / "0.png", "--output_dir", tmp_path / "run")
    said = capsys.readouterr().err
    assert "--guidance_scale" in said
    assert "--validation_guidance_scale" in said
    drawn, _, problems = omini.validation_prompts(args)
    assert "--g 3" in problems[0]
    assert drawn[-1].guidance_scale is None
    assert drawn[-1].lora_scale == 0.5


def test_a_subject_need_not_have_the_images_shape(flags, pictures, tmp_path):
    """It stands in the rows and columns of the image, but shows something else."""
    folder = tmp_path / "data"
    folder.mkdir()
    some_image(96, 64).save(folder / "a.png")
    some_image(64, 128).save(folder / "a-subject.jpg")
    (folder / "metadata.jsonl").write_text(json.dumps({"file_name": "a.png", "text": "x", "shown": "a-subject.jpg"}))
    extra = ["--instance_data_dir", folder, "--condition_type", "subject", "--condition_column", "shown"]
    args = parsed(flags, *extra, "--output_dir", tmp_path / "run")
    examples, problems = omini.find_examples(args)
    assert problems == []
    spec = omini.condition_specs(args)[0]
    assert (spec.position_delta, spec.position_scale) == ((0, 0), 1)
    with pytest.raises(SystemExit, match="2"):
        parsed(flags, *extra, "--condition_size", 32)


@pytest.mark.slow
def test_several_conditions_on_a_4_bit_base_with_held_out_images(train, flags, tmp_path):
    run = tmp_path / "run"
    extra = ["--condition_type", "canny", "deblurring", "fill", "sr", "--target_size", 128, "--quantize_base", "nf4"]
    extra += ["--gradient_checkpointing", "--validation_split", 0.3, "--use_ema", "--optimizer", "prodigy"]
    train(SCRIPT, *flags, *extra, "--learning_rate", 1, "--max_train_steps", 2, "--output_dir", run)
    trained = load_file(run / "canny_deblurring_fill_sr.safetensors")
    assert all(torch.isfinite(value).all() for value in trained.values())
    rows = [json.loads(line) for line in (run / "metrics.jsonl").open()]
    assert "validation_loss" in rows[-1]


@pytest.mark.slow
def test_a_run_continues_from_a_file(train, flags, tmp_path):
    train(SCRIPT, *flags, "--max_train_steps", 1, "--output_dir", tmp_path / "first")
    file = tmp_path / "first" / "canny.safetensors"
    train(SCRIPT, *flags, "--max_train_steps", 1, "--lora_path", file, "--output_dir", tmp_path / "second")
    first, second = weights(tmp_path / "first"), weights(tmp_path / "second")
    moved = max((first[key] - second[key]).abs().max() for key in first)
    assert 0 < moved < 0.05  # one step of 1e-2 away, not from new random matrices


@pytest.mark.slow
def test_two_processes_train(flags, tmp_path):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    command += [ROOT / f"{SCRIPT}.py", *flags, "--max_train_steps", 2, "--output_dir", tmp_path / "run"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    subprocess.run([str(word) for word in command], env=environment, cwd=ROOT, check=True, capture_output=True)
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").open()]
    assert [row["step"] for row in rows] == [1, 2]
    assert max(value.abs().max() for key, value in weights(tmp_path / "run").items() if "lora_B" in key) > 0
