"""train_influxedit.py on FLUX.1-Kontext and FLUX.2: references as tokens, data, exact resume, caches, files."""

import argparse
import copy
import json
import random
import re
import shutil

from common.data import Size
from common.latents import encode_moments, pack_latents, to_tensor
from common.lora import add_lora
from common.tracking import flux2_klein_architecture
from common.validation import generate_images

import numpy as np
import pytest
import tiny_backbones
import torch
from conftest import ROOT
from diffusers import Flux2KleinPipeline, Flux2Pipeline, FluxKontextPipeline
from PIL import Image
from safetensors import safe_open
from safetensors.torch import save_file
from test_train_influxedit import assert_equal, circles, toy_commands, weights  # noqa: F401

import train_influxedit as influxedit
from examples.influxedit import generate
from examples.influxedit.toy_circles import prompt_of, random_circle, score
from examples.toy.world import caption, draw, random_scene


SCRIPT = "train_influxedit"
LORA = "pytorch_lora_weights.safetensors"
PROMPT = "a red circle"


@pytest.fixture(scope="session")
def kontext(tiny_pipeline):
    parts = {name: copy.deepcopy(part) for name, part in tiny_pipeline.components.items() if part is not None}
    return FluxKontextPipeline(**parts)


@pytest.fixture(scope="session")
def kontext_folder(kontext, tmp_path_factory):
    folder = tmp_path_factory.mktemp("kontext")
    kontext.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def edits(tmp_path_factory):
    """Folders of four pictures of two shapes: images, targets of other shapes, captions, and further references: one
    of each image in `first`, of two of them in `second`."""
    root = tmp_path_factory.mktemp("edits")
    rng = random.Random(0)
    for name in ("images", "targets", "captions", "first", "second"):
        (root / name).mkdir()
    for i, size in enumerate([(48, 32), (32, 32), (48, 32), (32, 32)]):
        scene = random_scene(rng)
        draw(scene, *size).save(root / "images" / f"{i}.png")
        draw(random_scene(rng), 32, 48).save(root / "targets" / f"{i}.png")
        draw(random_scene(rng), 32, 32).save(root / "first" / f"{i}.png")
        if i < 2:
            draw(random_scene(rng), 48, 48).save(root / "second" / f"{i}.png")
        (root / "captions" / f"{i}.txt").write_text(caption(scene))
    return root


@pytest.fixture
def flags(edits):
    """A short run on tiny things without a model; later flags override earlier ones."""
    return [
        *("--mode", "edit", "--instance_data_dir", edits / "images", "--target_data_dir", edits / "targets"),
        *("--caption_data_dir", edits / "captions", "--resolution", 48, "--max_sequence_length", 48, "--rank", 2),
        *("--train_batch_size", 2, "--learning_rate", 1e-2, "--seed", 0, "--report_to", "none"),
        *("--max_train_steps", 4),
    ]


@pytest.fixture
def runs_of(flags, edits, kontext_folder, distilled_folder):
    """{family: flags of a short run}; FLUX.2's with further references."""
    more = ["--additional_data_dir", edits / "first", edits / "second"]
    return {
        "kontext": [*flags, "--max_sequence_length", 8, "--pretrained_model_name_or_path", kontext_folder],
        "klein": [*flags, *more, "--pretrained_model_name_or_path", distilled_folder],
    }


def parsed(words):
    return influxedit.parse_args([str(word) for word in words])


def picture(width, height, seed=0):
    pixels = np.random.default_rng(seed).integers(0, 255, (4, 4, 3), dtype=np.uint8)
    return Image.fromarray(pixels).resize((width, height), Image.Resampling.BICUBIC)


def klein_family(is_distilled=False):
    return influxedit.Flux2Klein({"is_distilled": is_distilled})


def condition_of(family, images, vae):
    references = [encode_moments(vae, to_tensor(image)[None]) for image in images]
    return family.condition({"references": references}, vae, torch.Generator())


# ---------------------------------------------------------------------------------------------------------------------
# The transformer's input
# ---------------------------------------------------------------------------------------------------------------------


def last_call(pipeline, **arguments):
    """(keyword arguments, output) of the transformer's last call while a pipeline draws."""
    calls = []
    hook = pipeline.transformer.register_forward_hook(
        lambda module, args, kwargs, output: calls.append((kwargs, output[0])), with_kwargs=True
    )
    pipeline.set_progress_bar_config(disable=True)
    try:
        pipeline(prompt=PROMPT, num_inference_steps=1, output_type="latent", **arguments)
    finally:
        hook.remove()
    return calls[-1]


@torch.no_grad()
def test_kontext_is_called_as_its_pipeline_calls_it(kontext):
    image = picture(64, 32)
    size = {"height": 32, "width": 48, "max_area": 32 * 48, "_auto_resize": False}
    theirs, expected = last_call(kontext, image=image, max_sequence_length=8, guidance_scale=2.5, **size)
    family = influxedit.Kontext({})
    condition = condition_of(family, [image], kontext.vae)
    seen = {}
    hook = kontext.transformer.register_forward_pre_hook(
        lambda module, args, kwargs: seen.update(kwargs), with_kwargs=True
    )
    ours = family.predict(
        kontext.transformer,
        theirs["hidden_states"][:, :6],
        condition,
        theirs["timestep"],
        theirs["encoder_hidden_states"],
        theirs["pooled_projections"],
        guidance=theirs["guidance"],
        height=4,
        width=6,
    )
    hook.remove()
    assert theirs["hidden_states"].shape == (1, 6 + 8, 64)
    torch.testing.assert_close(seen["hidden_states"], theirs["hidden_states"], rtol=0, atol=1e-5)
    for name in ("img_ids", "txt_ids"):
        assert torch.equal(seen[name], theirs[name])
    torch.testing.assert_close(ours, expected[:, :6], rtol=0, atol=1e-5)
    arguments = family.image_arguments(influxedit.ValidationCase(PROMPT, image, image, None, (image,)), Size(32, 48))
    assert arguments == {"image": image, "max_area": 32 * 48, "_auto_resize": False}


@torch.no_grad()
@pytest.mark.parametrize("count", [1, 3])
def test_flux2_is_called_as_its_pipeline_calls_it(klein, count):
    images = [picture(64 + 16 * i, 64, seed=i) for i in range(count)]
    family = klein_family()
    case = influxedit.ValidationCase(PROMPT, images[0], images[0], None, tuple(images))
    arguments = family.image_arguments(case, Size(32, 48))
    theirs, expected = last_call(klein, height=32, width=48, guidance_scale=1, max_sequence_length=48, **arguments)
    seen = {}
    hook = klein.transformer.register_forward_pre_hook(
        lambda module, args, kwargs: seen.update(kwargs), with_kwargs=True
    )
    embeds = theirs["encoder_hidden_states"]
    ours = family.predict(
        klein.transformer,
        theirs["hidden_states"][:, :6],
        condition_of(family, images, klein.vae),
        theirs["timestep"],
        embeds,
        embeds.new_zeros(1, 0),
        guidance=None,
        height=4,
        width=6,
    )
    hook.remove()
    torch.testing.assert_close(seen["hidden_states"], theirs["hidden_states"], rtol=0, atol=1e-5)
    for name in ("img_ids", "txt_ids"):
        assert torch.equal(seen[name], theirs[name])
    torch.testing.assert_close(ours, expected[:, :6], rtol=0, atol=1e-5)


@torch.no_grad()
def test_class_images_beside_edits_are_predicted_without_references(klein):
    generator = torch.Generator().manual_seed(0)
    family = klein_family()
    (reference,) = condition_of(family, [picture(32, 32)], klein.vae)
    latents = torch.randn(3, 4, 4, 4, generator=generator)
    embeds = torch.randn(3, 5, 48, generator=generator)
    sigmas = torch.tensor([0.2, 0.5, 0.9])

    def predict(rows, condition):
        return family.predict(
            klein.transformer,
            pack_latents(latents[rows]),
            condition,
            sigmas[rows],
            embeds[rows],
            embeds[rows][:, 0, :0],
            guidance=None,
            height=4,
            width=4,
        )

    together = predict(slice(3), [reference.expand(2, -1, -1, -1)])
    torch.testing.assert_close(together[:2], predict(slice(2), [reference.expand(2, -1, -1, -1)]))
    torch.testing.assert_close(together[2:], predict(slice(2, 3), []))
    assert (predict(slice(2), []) - together[:2]).abs().max() > 1e-3


@pytest.mark.parametrize("name", ["kontext", "klein"])
def test_the_loss_at_fixed_noise_falls(request, name):
    pipeline = request.getfixturevalue(name)
    family = influxedit.Kontext({}) if name == "kontext" else klein_family()
    model = copy.deepcopy(pipeline.transformer).requires_grad_(False)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        moments = encode_moments(pipeline.vae, to_tensor(picture(32, 32, seed=1))[None])
        latents = family.sample_latents(moments, pipeline.vae, generator)
        condition = condition_of(family, [picture(32, 32)], pipeline.vae)
    torch.manual_seed(0)
    parameters = add_lora(model, rank=8, alpha=8, dropout=0.0, target_modules=family.target_modules(model))
    optimizer = torch.optim.AdamW(parameters, lr=2e-2)
    noise = torch.randn(latents.shape, generator=generator)
    embeds = torch.randn(1, 8, model.config.joint_attention_dim, generator=generator)
    pooled = torch.randn(1, 32, generator=generator)
    guidance = torch.ones(1) if model.config.guidance_embeds else None
    losses = []
    for _ in range(30):
        velocity = influxedit.predict_velocity(
            *(model, latents, noise, torch.tensor([0.5]), condition, embeds, pooled), family=family, guidance=guidance
        )
        loss = (velocity - pack_latents(noise - latents)).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < 0.6 * losses[0]


# ---------------------------------------------------------------------------------------------------------------------
# Data
# ---------------------------------------------------------------------------------------------------------------------


def dataset_of(words):
    args = parsed(words)
    examples, problems = influxedit.find_examples(args)
    assert not problems
    return influxedit.EditDataset(examples, args)


def test_references_keep_their_order_and_shape_and_batches_their_number(runs_of, edits):
    dataset = dataset_of([*runs_of["klein"], "--center_crop"])
    ((sample,),) = dataset.__getitems__([(0, 0)])
    assert sample["pixel_values"].shape == (1, 3, 48, 32)  # the target's
    assert [tuple(image.shape) for image in sample["references"]] == [(3, 32, 48), (3, 48, 48), (3, 48, 48)]
    for name, image in zip(("images", "first", "second"), sample["references"], strict=True):
        file = Image.open(edits / name / "0.png").convert("RGB")
        expected = to_tensor(file.resize(image.shape[:0:-1], Image.Resampling.LANCZOS))
        torch.testing.assert_close(image, expected, rtol=0, atol=0.02)

    assert len(set(dataset.groups())) == 4  # two shapes, with two or three references
    assert set(dataset.sizes()) == {(Size(48, 32),)}
    doubled = dataset_of([*runs_of["klein"], "--repeats", 2])
    sampler = influxedit.StepSampler(doubled.groups(), 2, seed=0, process_index=0, num_processes=1, stop=8)
    for positions in sampler:
        batch = influxedit.collate_edits(doubled.__getitems__(positions))
        assert {len(image) for image in batch["references"]} == {2}
        assert len(batch["pixel_values"]) == 2


def test_two_resolutions_and_mirrored_references_are_cached_as_they_are_read(runs_of):
    dataset = dataset_of([*runs_of["klein"], "--resolution", "32,48", "--random_flip"])
    keys = set(dataset.image_keys())
    asked = []
    for epoch in range(20):
        for index in range(4):
            dataset.pixel_values = lambda key: asked.append(key) or torch.zeros(1)
            dataset.__getitems__([(epoch, index)])
    assert set(asked) == keys
    assert {key.view for key in keys} == {"target", "image", "reference_2", "reference_3"}


def test_large_references_are_as_small_as_the_pipeline_makes_them():
    family = klein_family()
    assert influxedit.check_reference("x", Size(64, 1024), family)
    assert not influxedit.check_reference("x", Size(64, 512), family)
    for size in (Size(2048, 2048), Size(1000, 3000), Size(300, 200)):
        height, width = influxedit.reference_size(2048, size)
        assert height * width <= 1024**2
        assert abs(height / width / (size.height / size.width) - 1) < 0.05


def test_held_out_images_have_their_references_in_folders_of_the_same_names(runs_of, edits, tmp_path):
    args = parsed([*runs_of["klein"], "--validation_data_dir", edits, "--output_dir", tmp_path / "run"])
    examples, problems = influxedit.find_examples(args)
    _, held_out, held_out_problems = influxedit.find_held_out(args, examples)
    assert not problems + held_out_problems
    assert [len(influxedit.reference_roles(example)) for example in held_out] == [2, 2, 1, 1]
    dataset = influxedit.EditDataset(held_out, args)
    views = [key.view for key in dataset.held_out_keys(0)]
    assert views == ["target", "image", "reference_2", "reference_3"]
    assert influxedit.describe_references(held_out) == "2 images with 2, 2 images with 3"
    assert influxedit.generate_command(args, "x").endswith("--image IMAGE --reference IMAGE IMAGE")


def test_references_of_a_dataset_have_columns(flags, distilled_folder, tmp_path):
    from datasets import Dataset, Features
    from datasets import Image as ImageFeature

    names = ("image", "target", "style", "face")
    columns = {name: [picture(32, 32, seed=i)] * 2 for i, name in enumerate(names)}
    dataset = Dataset.from_dict(columns, features=Features(dict.fromkeys(names, ImageFeature())))
    dataset.to_parquet(tmp_path / "data" / "train.parquet")
    words = [
        "--pretrained_model_name_or_path",
        distilled_folder,
        "--dataset_name",
        tmp_path / "data",
        "--mode",
        "edit",
    ]
    words += ["--target_column", "target", "--additional_column", "face", "style", "--instance_prompt", "x"]
    words += ["--resolution", 32, "--seed", 0, "--cache_dir", tmp_path / "cache", "--output_dir", tmp_path / "run"]
    ((sample,),) = dataset_of(words).__getitems__([(0, 0)])
    for image, seed in zip(sample["references"], (0, 3, 2), strict=True):
        torch.testing.assert_close(image, to_tensor(picture(32, 32, seed=seed)))


@pytest.mark.parametrize(
    ("name", "extra", "words"),
    [
        ("kontext", ["--mode", "mask", "--use_split_mask"], "give --mode edit"),
        ("kontext", ["--train_embedder"], "--train_embedder"),
        ("kontext", ["--additional_data_dir", "FIRST"], "reads one input image"),
        ("fill", ["--additional_data_dir", "FIRST"], "reads one input image"),
        ("klein", ["--train_text_encoder"], "CLIP"),
        ("klein", ["--lora_layers", "attn.to_x"], "attn.to_x"),
        ("klein", ["--additional_column", "style"], "--additional_column style needs --dataset_name"),
        ("klein", ["--additional_data_dir", "FIRST", "FIRST"], "folder 1 of --additional_data_dir"),
    ],
)
def test_flags_that_a_family_has_no_use_for_are_refused(
    runs_of, short_runs, edits, tmp_path, capsys, name, extra, words
):
    flags = {**runs_of, "fill": short_runs[SCRIPT]}[name]
    extra = [edits / "first" if word == "FIRST" else word for word in extra]
    if "mask" in extra:
        flags = flags[: flags.index("--target_data_dir")] + flags[flags.index("--caption_data_dir") :]
    with pytest.raises(SystemExit, match="2"):
        parsed([*flags, *extra, "--output_dir", tmp_path / "run"])
    assert words in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_another_model_is_refused_by_what_was_found(flags, tiny_model, distilled_folder, tmp_path, capsys):
    mixed = tmp_path / "mixed"
    shutil.copytree(distilled_folder, mixed)
    shutil.rmtree(mixed / "transformer")
    shutil.copytree(tiny_model / "transformer", mixed / "transformer")
    for model in (tiny_model, mixed):
        with pytest.raises(SystemExit, match="2"):
            parsed([*flags, "--pretrained_model_name_or_path", model, "--output_dir", tmp_path / "run"])
        error = capsys.readouterr().err
        assert "holds a FluxTransformer2DModel with 64 input channels" in error
        assert "FluxKontextPipeline" in error


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda folder: (folder / "0.png").rename(folder / "x.png"), "none of its images is named like"),
        (lambda folder: (folder / "0.png").write_text("no image"), "0.png"),
        (lambda folder: picture(32, 32).save(folder / "0.jpg"), "needs one image 0.*"),
        (lambda folder: shutil.rmtree(folder), "no such folder"),
    ],
)
def test_bad_references_are_named(flags, distilled_folder, tmp_path, change, words):
    folder = tmp_path / "more"
    folder.mkdir()
    picture(32, 32).save(folder / "0.png")
    change(folder)
    words_of_run = ["--pretrained_model_name_or_path", distilled_folder, "--additional_data_dir", folder]
    args = parsed([*flags, *words_of_run, "--output_dir", tmp_path / "run"])
    _, problems = influxedit.find_examples(args)
    assert any(words in problem for problem in problems)


def test_validation_images_that_the_pipeline_does_not_take_are_refused(runs_of, edits, tmp_path):
    prompts = tmp_path / "prompts.txt"
    prompts.write_text(f"{PROMPT} --cn {edits / 'images' / '0.png'} --cn {edits / 'first' / '0.png'}\n")
    size = ("--validation_prompts", prompts, "--validation_width", 80, "--validation_height", 80)
    args = parsed([*runs_of["klein"], *size])
    _, (problem,) = influxedit.find_examples(args)
    assert "80 x 48 pixels" in problem  # the second is 80 x 80
    args = parsed([*runs_of["klein"], *size, "--validation_width", 128])
    examples, problems = influxedit.find_examples(args)
    assert not problems
    (case,) = influxedit.validation_cases(args, examples)
    assert [image.size for image in case.references] == [(128, 80), (128, 128)]
    assert case.image.size == (128, 80)
    args = parsed([*runs_of["kontext"], *size])
    _, problems = influxedit.find_examples(args)
    assert "give one --cn" in problems[0]


# ---------------------------------------------------------------------------------------------------------------------
# Runs
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [pytest.param("kontext", marks=pytest.mark.slow), "klein"])
def test_caches_validation_and_an_interruption_do_not_change_training(train, runs_of, edits, tmp_path, name):
    flags = [*runs_of[name], "--caption_dropout", 0.3, "--checkpointing_steps", 2]
    train(SCRIPT, *flags, "--output_dir", tmp_path / "plain")
    plain = weights(tmp_path / "plain")
    assert max(value.abs().max() for key, value in plain.items() if "lora_B" in key) > 0
    extra = ["--cache_latents", "--offload", "--validation_prompt", PROMPT, "--validation_steps", 2]
    extra += ["--validation_width", 128, "--validation_height", 128, "--validation_num_inference_steps", 1]
    extra += ["--validation_image", edits / "first" / "0.png"]
    train(SCRIPT, *flags, *extra, "--output_dir", tmp_path / "cached")
    assert_equal(plain, weights(tmp_path / "cached"))

    shutil.rmtree(tmp_path / "plain" / "checkpoint-4")
    (tmp_path / "plain" / LORA).unlink()
    train(SCRIPT, *flags, "--resume_from_checkpoint", "latest", "--output_dir", tmp_path / "plain")
    assert_equal(plain, weights(tmp_path / "plain"))


@pytest.mark.parametrize("name", ["kontext", "klein"])
def test_the_file_draws_in_diffusers_what_validation_drew(
    train, run_program, runs_of, edits, tmp_path, monkeypatch, name
):
    drawn = []

    def keep(*args, **kwargs):
        drawn[:] = generate_images(*args, **kwargs)
        return list(drawn)

    monkeypatch.setattr(influxedit, "generate_images", keep)
    run = tmp_path / "run"
    prompts = tmp_path / "prompts.txt"
    files = [edits / "first" / "0.png", edits / "second" / "0.png"][: 1 if name == "kontext" else 2]
    prompts.write_text(f"{PROMPT} {' '.join(f'--cn {file}' for file in files)} --w 64 --h 64 --s 2 --d 5\n")
    extra = ["--lora_alpha", 4, "--max_train_steps", 2, "--validation_prompts", prompts, "--output_dir", run]
    train(SCRIPT, *runs_of[name], *extra)
    folder = runs_of[name][-1]

    pipeline_class = FluxKontextPipeline if name == "kontext" else Flux2KleinPipeline
    pipeline = pipeline_class.from_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    images = [Image.open(file).convert("RGB").resize((64, 64), Image.Resampling.LANCZOS) for file in files]
    call = {"prompt": PROMPT, "height": 64, "width": 64, "num_inference_steps": 2}
    if name == "kontext":
        call |= {"image": images[0], "max_sequence_length": 8, "max_area": 64**2, "_auto_resize": False}
    else:
        call |= {"image": images, "max_sequence_length": 48, "guidance_scale": 1.0}
    without = pipeline(**call, generator=torch.Generator().manual_seed(5)).images[0]
    pipeline.load_lora_weights(run)
    image = pipeline(**call, generator=torch.Generator().manual_seed(5)).images[0]
    assert np.abs(np.asarray(image, int) - np.asarray(drawn[0], int)).max() <= 1  # another batch of prompts rounds
    assert np.abs(np.asarray(image, int) - np.asarray(without, int)).max() > 1
    words = ["--num_inference_steps", 2, "--size", 64, 64, "--seed", 5, "--output", tmp_path]
    more = ["--reference", files[1]] if name == "klein" else []
    run_program("examples/influxedit/generate.py", run, "--image", files[0], *more, "--prompt", PROMPT, *words)
    generated = np.asarray(Image.open(tmp_path / "0-edited.png"), int)
    assert np.abs(generated - np.asarray(image, int)).max() <= 1

    with safe_open(run / LORA, "pt") as file:
        header = file.metadata()
    architecture = {"kontext": "flux-1-kontext-dev/lora", "klein": "Flux.2-klein-4b/lora"}[name]
    assert header["modelspec.architecture"] == architecture

    card = (run / "README.md").read_text()
    (code,) = re.findall(r"```python\n(.*?)```", card, re.S)
    monkeypatch.chdir(tmp_path)
    picture(64, 64).save("input.png")
    exec(code.replace("= 48 /", "= 64 /"), {})
    assert Image.open("image.png").size == (64, 64)


def test_a_base_that_draws_with_guidance_and_prior_and_preservation(train, runs_of, klein, tmp_path):
    """FLUX.2-klein that is not distilled, in 4 bits: class images are drawn and trained without references."""
    klein.save_pretrained(tmp_path / "base")
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a blue square\na star\n")
    run = tmp_path / "run"
    flags = [*runs_of["klein"], "--pretrained_model_name_or_path", tmp_path / "base", "--max_train_steps", 2]
    flags += ["--quantize_base", "nf4", "--gradient_checkpointing", "--preserve_outputs", 1]
    flags += ["--preserve_prompts", prompts, "--validation_split", 0.3, "--validation_loss_steps", 2]
    flags += ["--with_prior_preservation", "--class_prompt", "a shape", "--class_data_dir", tmp_path / "class"]
    flags += ["--num_class_images", 2, "--cache_latents"]
    train(SCRIPT, *flags, "--output_dir", run)
    assert len(list((tmp_path / "class").iterdir())) == 2
    rows = [json.loads(line) for line in (run / "metrics.jsonl").open()]
    assert {"validation_loss", "distance_from_base"} <= rows[-1].keys()
    assert max(value.abs().max() for key, value in weights(run).items() if "lora_B" in key) > 0


@pytest.mark.slow
def test_a_run_continues_from_a_file(train, runs_of, tmp_path):
    flags = [*runs_of["klein"], "--max_train_steps", 1]
    train(SCRIPT, *flags, "--output_dir", tmp_path / "first")
    train(SCRIPT, *flags, "--lora_path", tmp_path / "first" / LORA, "--output_dir", tmp_path / "second")
    first, second = weights(tmp_path / "first"), weights(tmp_path / "second")
    moved = max((first[key] - second[key]).abs().max() for key in first)
    assert 0 < moved < 0.05  # one step of 1e-2 away, not from new random matrices


def test_flux2_dev_trains_and_its_pipeline_loads_the_file(train, runs_of, tmp_path):
    torch.manual_seed(0)
    tiny_backbones.flux2_dev().save_pretrained(tmp_path / "dev")
    run = tmp_path / "run"
    extra = ["--pretrained_model_name_or_path", tmp_path / "dev", "--max_sequence_length", 512]
    train(SCRIPT, *runs_of["klein"], *extra, "--max_train_steps", 1, "--output_dir", run)
    pipeline = Flux2Pipeline.from_pretrained(tmp_path / "dev")
    pipeline.load_lora_weights(run)
    wrapped = [name for name, module in pipeline.transformer.named_modules() if getattr(module, "lora_A", {})]
    assert len(wrapped) == len(weights(run)) // 2


@pytest.mark.parametrize(
    ("name", "extra", "words"),
    [
        ("kontext", ["--reference", "b.png"], "FLUX.1-Kontext reads at most 1"),
        ("klein", ["--mode", "mask"], "give --mode edit"),
        ("klein", ["--size", 64, 32], "at least 64 pixels"),
    ],
)
def test_what_a_family_does_not_draw_is_refused(
    kontext_folder, distilled_folder, tmp_path, capsys, name, extra, words
):
    for file in ("a.png", "b.png"):
        picture(64, 32).save(tmp_path / file)
    folder = kontext_folder if name == "kontext" else distilled_folder
    (tmp_path / "run").mkdir()
    save_file({"transformer.x.lora_A.weight": torch.zeros(1, 1)}, tmp_path / "run" / LORA)
    args = generate.WITHOUT_RUN | {"pretrained_model_name_or_path": str(folder)}
    (tmp_path / "run" / "args.json").write_text(json.dumps({"args": args}))
    extra = [tmp_path / word if str(word).endswith(".png") else word for word in extra]
    words_of_run = [tmp_path / "run", "--image", tmp_path / "a.png", "--prompt", PROMPT, *extra]
    with pytest.raises(SystemExit, match="2"):
        generate.parse_args([str(word) for word in words_of_run])
    assert words in capsys.readouterr().err


def test_guidance_that_klein_does_not_read_is_named(runs_of, tmp_path, capsys):
    parsed([*runs_of["klein"], "--guidance_scale", 2, "--output_dir", tmp_path / "run"])
    assert "--guidance_scale (it needs a model with a guidance embedding)" in capsys.readouterr().err


def test_the_code_of_a_card_says_where_further_images_stand(runs_of, tmp_path):
    for name in ("kontext", "klein"):
        args = parsed([*runs_of[name], "--output_dir", tmp_path / name])
        args.output_dir.mkdir(exist_ok=True)
        influxedit.save_model_card(args, torch.float32, PROMPT)
        code = (args.output_dir / "README.md").read_text().split("```python\n")[1].split("```")[0]
        compile(code, name, "exec")
        assert not [line for line in code.splitlines() if line.isspace()]
        assert ("further input images" in code) == bool(args.additional_data_dir)


@pytest.mark.parametrize(("heads", "name"), [(24, "Flux.2-klein-4b"), (32, "Flux.2-klein-9b")])
def test_the_header_tells_the_two_sizes_of_klein_apart(heads, name):
    assert flux2_klein_architecture({"num_attention_heads": heads}) == name


# ---------------------------------------------------------------------------------------------------------------------
# Learning
# ---------------------------------------------------------------------------------------------------------------------


def figures(folder, *, base=False, count=64):
    """Scores of edited outlines that were not trained on."""
    pipeline, trained = generate.load_pipeline(folder)
    if base:
        pipeline.unload_lora_weights()
    pipeline.set_progress_bar_config(disable=True)
    family = influxedit.find_family(argparse.Namespace(**trained))
    call = {"num_inference_steps": 20, "max_sequence_length": trained["max_sequence_length"]}
    if family.reads_guidance:
        call["guidance_scale"] = trained["guidance_scale"]
    rng = random.Random("test")
    outlines, scenes = zip(*(random_circle(rng) for _ in range(count)), strict=True)
    images = []
    for outline, scene in zip(outlines, scenes, strict=True):
        call["generator"] = torch.Generator().manual_seed(0)
        references = [draw(outline)]
        size = Size.of(references[0])
        images.append(generate.edit_references(pipeline, family, prompt_of(scene), references, size, **call))
    return score(images, scenes)


def learn(train, circles, run, model, *extra):  # noqa: F811
    """(figures before, after) of the page's command for edit mode on another model, its FLUX.1 layers left out."""
    flags = [flag for flag in toy_commands(circles)["edit"] if not flag.startswith("--lora_layers")]
    train(SCRIPT, *flags, "--pretrained_model_name_or_path", model, *extra, "--output_dir", run)
    before, after = figures(run, base=True), figures(run)
    for name in before:
        print(f"reference, {name}: {before[name]:.0f} -> {after[name]:.0f}")
    return before, after


@pytest.mark.slow
@pytest.mark.learning
def test_it_learns_circles_from_a_reference(train, circles, tmp_path):  # noqa: F811
    """The toy FLUX.1, which has never seen a reference, as FLUX.1-Kontext."""
    model = shutil.copytree(ROOT / "examples" / "toy" / "flux", tmp_path / "kontext")
    index = (model / "model_index.json").read_text()
    (model / "model_index.json").write_text(index.replace("FluxPipeline", "FluxKontextPipeline"))
    (layers,) = (flag for flag in toy_commands(circles)["edit"] if flag.startswith("--lora_layers"))
    before, after = learn(train, circles, tmp_path / "run", model, layers)
    print("bars: 90, 90, 80")
    assert before["outline"] < 45
    assert min(after["circle"], after["background"]) >= 90
    assert after["outline"] >= 80


@pytest.mark.slow
@pytest.mark.learning
def test_flux2_learns_circles_from_a_reference(train, circles, tmp_path):  # noqa: F811
    extra = ["--guidance_scale=3.5", "--caption_dropout=0.1", "--max_train_steps=1000"]
    before, after = learn(train, circles, tmp_path / "run", ROOT / "examples" / "toy" / "flux2", *extra)
    print("bars: 90, 90, 80")
    assert before["outline"] < 45
    assert min(after["circle"], after["background"]) >= 90
    assert after["outline"] >= 80
