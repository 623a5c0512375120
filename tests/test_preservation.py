"""train_dreambooth_flux_advanced.py: what keeps other prompts as they are, --preserve_outputs and class prompts."""

import json
import re
import shutil

from common.data import read_class_images, read_prompts
from common.lora import add_lora

import pytest
import torch
from conftest import imported
from PIL import Image
from safetensors.torch import load_file
from test_pivotal import MODES, flags, results  # noqa: F401  # flags is a fixture
from test_train_dreambooth import SCRIPT, assert_equal

import train_dreambooth_flux_advanced as dreambooth


PRESERVE = ("--preserve_outputs", 2, "--preserve_prompts")


@pytest.fixture
def prompts_file(tmp_path):
    path = tmp_path / "prompts.txt"
    path.write_text("a red shape\n\na blue shape on the left\n a red shape \nan empty picture\n")
    return path


def losses_of(folder):
    return [json.loads(line)["loss"] for line in (folder / "metrics.jsonl").open()]


def test_prompts_are_one_or_the_lines_of_a_file_or_captions_with_other_words(prompts_file):
    captions = ["sks dog on a lawn", "a photo of sks dog", "a lawn", "sks dogs"]
    assert read_prompts("--x", None) == ([], [])
    assert read_prompts("--x", "a photo of a dog") == (["a photo of a dog"], [])
    assert read_prompts("--x", str(prompts_file))[0] == ["a red shape", "a blue shape on the left", "an empty picture"]
    found, problems = read_prompts("--x", "sks dog => dog, big cat", captions)
    assert found == ["dog on a lawn", "big cat on a lawn", "a photo of dog", "a photo of big cat"]
    assert problems == []
    for text in ("sks cat=>cat", "=>cat", "sks dog=>", "nowhere.txt"):
        found, (problem,) = read_prompts("--x", text, captions)
        assert found == [] and "--x" in problem and text.partition("=>")[0] in problem
    for content, words in ((b"\n \n", "no prompts"), (b"\xff\xfe\xff", "UTF-8")):
        prompts_file.write_bytes(content)
        assert words in read_prompts("--x", str(prompts_file))[1][0]


def test_the_preservation_loss_is_the_distance_to_the_model_without_adapter(tiny):
    transformer = tiny.transformer
    generator = torch.Generator().manual_seed(0)
    latents, noise = torch.randn(2, 2, 16, 4, 4, generator=generator)
    sigmas = torch.tensor([0.2, 0.9])
    prompt_embeds = torch.randn(2, 8, 32, generator=generator)
    pooled, base_pooled = torch.randn(2, 2, 32, generator=generator)
    inputs = {
        "hidden_states": dreambooth.pack_latents(
            (1 - sigmas.view(2, 1, 1, 1)) * latents + sigmas.view(2, 1, 1, 1) * noise
        ),
        "timestep": sigmas,
        "guidance": torch.ones(2),
        "encoder_hidden_states": prompt_embeds,
        "txt_ids": torch.zeros(8, 3),
        "img_ids": dreambooth.image_ids(4, 4, "cpu"),
        "return_dict": False,
    }
    with torch.no_grad():
        base = transformer(**inputs, pooled_projections=base_pooled)[0]
    parameters = add_lora(transformer, rank=2, alpha=2, dropout=0.0, target_modules=["attn.to_q", "ff.net.2"])
    for parameter in parameters:
        torch.nn.init.normal_(parameter, generator=generator)
    adapted = transformer(**inputs, pooled_projections=pooled)[0]
    losses = dreambooth.compute_preservation_loss(
        transformer,
        latents,
        noise,
        sigmas,
        prompt_embeds,
        pooled,
        base_pooled,
        family=dreambooth.Flux({}),
        guidance=torch.ones(2),
        weighting_scheme="none",
    )
    torch.testing.assert_close(losses, (adapted - base).square().mean(dim=(1, 2)))
    losses.sum().backward()
    gradients = [parameter.grad.clone() for parameter in parameters]
    for parameter in parameters:
        parameter.grad = None
    (adapted - base).square().mean(dim=(1, 2)).sum().backward()
    for parameter, gradient in zip(parameters, gradients, strict=True):
        torch.testing.assert_close(gradient, parameter.grad)


def distance_to_base(tiny_model, run, prompts):
    """The mean squared change of predictions for prompts by the LoRA of a run."""
    pipeline = dreambooth.FluxPipeline.from_pretrained(tiny_model)
    generator = torch.Generator().manual_seed(0)
    latents, noise = torch.randn(2, len(prompts), 16, 4, 4, generator=generator)
    with torch.no_grad():
        prompt_embeds, pooled, _ = pipeline.encode_prompt(prompts, prompts, max_sequence_length=16)
        rest = (latents, noise, torch.linspace(0.1, 0.9, len(prompts)), prompt_embeds, pooled)
        given = {"family": dreambooth.Flux({}), "guidance": torch.full((len(prompts),), 3.5)}
        base = dreambooth.predict_velocity(pipeline.transformer, *rest, **given)
        pipeline.load_lora_weights(run)
        adapted = dreambooth.predict_velocity(pipeline.transformer, *rest, **given)
    return (adapted - base).square().mean().item()


def test_preserved_prompts_move_less(train, flags, tiny_model, prompts_file, tmp_path, capsys):  # noqa: F811
    flags = [*flags, "--learning_rate", 1e-2, "--max_train_steps", 8]
    train(SCRIPT, *flags, "--output_dir", tmp_path / "plain")
    strong = ("--preserve_outputs", 30, "--preserve_prompts", prompts_file)
    assert "  preserved  " not in capsys.readouterr().out
    train(SCRIPT, *flags, *strong, "--output_dir", tmp_path / "kept")
    assert re.search(r"  preserved +outputs for \d prompts, every step", capsys.readouterr().out)
    plain, kept = (
        distance_to_base(tiny_model, tmp_path / run, ["a red shape", "an empty picture"] * 2)
        for run in ("plain", "kept")
    )
    assert 0 < kept < plain / 2
    # at the first step the adapter changes nothing
    assert losses_of(tmp_path / "plain")[0] == losses_of(tmp_path / "kept")[0]


def test_preservation_resumes_bit_for_bit_and_does_not_depend_on_caches(train, flags, prompts_file, tmp_path):  # noqa: F811
    flags = [*flags, *PRESERVE, prompts_file, "--preserve_every", 2, "--lora_dropout", 0.1]
    flags += ["--gradient_accumulation_steps", 2, "--checkpointing_steps", 2, *MODES["CLIP LoRA"]]
    flags += ["--max_train_steps", 4]
    train(SCRIPT, *flags, "--output_dir", tmp_path / "a" / "run")
    variants = {
        "resumed": ["--resume_from_checkpoint", tmp_path / "a" / "run" / "checkpoint-2"],
        "other ways": ["--cache_latents", "False", "--gradient_checkpointing", "--offload"],
    }
    for name, extra in variants.items():
        train(SCRIPT, *flags, *extra, "--output_dir", tmp_path / name / "run")
        assert_equal(results(tmp_path / "a" / "run"), results(tmp_path / name / "run"))
    prompts_file.write_text("a green shape\n")
    with pytest.raises(SystemExit) as ended:
        train(SCRIPT, *flags, *variants["resumed"], "--output_dir", tmp_path / "changed" / "run")
    assert ended.value.code == 2


@pytest.mark.parametrize(
    "mode",
    [
        "pivotal CLIP+T5",
        *(pytest.param(mode, marks=pytest.mark.slow) for mode in ("nf4", "compile")),
    ],
)
def test_preservation_goes_with(train, flags, prompts_file, tmp_path, mode):  # noqa: F811
    modes = MODES | {"nf4": ["--quantize_base", "nf4"], "compile": ["--compile"]}
    flags = [*flags, *modes[mode], "--max_train_steps", 2, "--output_dir"]
    train(SCRIPT, *flags, tmp_path / "plain")
    train(SCRIPT, *flags, tmp_path / "kept", *PRESERVE, prompts_file)
    plain, kept = (losses_of(tmp_path / run) for run in ("plain", "kept"))
    assert plain[0] == pytest.approx(kept[0], rel=1e-4)
    assert all(torch.isfinite(value).all() for value in results(tmp_path / "kept").values())
    assert plain[1:] != kept[1:]


def test_dropped_captions_become_the_instance_prompt(tiny_model, pictures, tmp_path):
    words = ["--pretrained_model_name_or_path", tiny_model, "--instance_data_dir", pictures, "--output_dir", tmp_path]
    words += ["--caption_dropout", 0.5, "--instance_prompt", "sks"]
    prompts = {}
    for to in ("empty", "instance_prompt"):
        args = dreambooth.parse_args([*map(str, words), "--caption_dropout_to", to])
        examples, problems = dreambooth.find_examples(args)
        assert problems == []
        dataset = dreambooth.DreamBoothDataset(examples, args)
        dataset.pixel_values = lambda key: None
        prompts[to] = [dataset[epoch, index][0]["prompt"] for epoch in range(40) for index in range(len(dataset))]
    assert set(prompts["empty"]) == {example.caption for example in examples} | {""}
    assert [prompt or "sks" for prompt in prompts["empty"]] == prompts["instance_prompt"]
    assert 70 < prompts["instance_prompt"].count("sks") < 130


def test_bare_prompts_resume_bit_for_bit_and_do_not_depend_on_caches(train, flags, tmp_path):  # noqa: F811
    flags = [*flags, *MODES["pivotal CLIP"], "--instance_prompt", "a circle", "--caption_dropout", 0.5]
    flags += ["--checkpointing_steps", 2, "--max_train_steps", 4, "--with_prior_preservation", "--class_prompt", "red"]
    flags += ["--class_data_dir", tmp_path / "class", "--num_class_images", 2]
    flags += ["--preserve_outputs", 1, "--preserve_prompts", "circle=>square"]
    bare = ["--caption_dropout_to", "instance_prompt"]
    train(SCRIPT, *flags, "--output_dir", tmp_path / "empty" / "run")
    train(SCRIPT, *flags, *bare, "--output_dir", tmp_path / "a" / "run")
    variants = {
        "resumed": ["--resume_from_checkpoint", tmp_path / "a" / "run" / "checkpoint-2"],
        "other ways": ["--cache_latents", "False"],
    }
    for name, extra in variants.items():
        train(SCRIPT, *flags, *bare, *extra, "--output_dir", tmp_path / name / "run")
        assert_equal(results(tmp_path / "a" / "run"), results(tmp_path / name / "run"))
    assert losses_of(tmp_path / "empty" / "run") != losses_of(tmp_path / "a" / "run")
    with pytest.raises(SystemExit) as ended:
        train(SCRIPT, *flags, *variants["resumed"], "--output_dir", tmp_path / "changed" / "run")
    assert ended.value.code == 2


BAD = [
    ("--preserve_outputs 1", "--preserve_outputs needs --preserve_prompts"),
    ("--preserve_prompts x", "--preserve_prompts x needs --preserve_outputs"),
    ("--preserve_every 2", "--preserve_every 2 needs --preserve_outputs"),
    ("--preserve_outputs -1 --preserve_prompts x", "--preserve_outputs: -1 is out of range"),
    ("--preserve_outputs 1 --preserve_prompts nowhere.txt", "--preserve_prompts nowhere.txt: no such file"),
    ("--preserve_outputs 1 --preserve_prompts sks=>dog", "no caption has the words 'sks'"),
    (
        "--instance_prompt x --caption_dropout 0.5 --caption_dropout_to instance_prompt --instance_data_dir {bare}",
        "--caption_dropout_to instance_prompt has no effect",
    ),
    (
        "--preserve_outputs 1 --preserve_prompts red --train_text_encoder_ti --token_abstraction red",
        "--preserve_prompts: 'red' holds red, which stands for new tokens",
    ),
]


@pytest.mark.parametrize(("wrong", "message"), BAD)
def test_wrong_use_is_one_line(train, flags, pictures, tmp_path, capsys, wrong, message):  # noqa: F811
    bare = tmp_path / "bare"
    shutil.copytree(pictures, bare, ignore=shutil.ignore_patterns("*.txt"))
    with pytest.raises(SystemExit) as ended:
        train(SCRIPT, *flags, "--output_dir", tmp_path / "run", *wrong.format(bare=bare).split())
    assert ended.value.code == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def class_images(folder):
    """{name: (caption in its PNG, bytes)}."""
    return {
        path.name: (Image.open(path).info["class_prompt"], path.read_bytes()) for path in sorted(folder.glob("*.png"))
    }


def test_class_images_of_several_prompts_are_trained_with_their_own(
    train,
    flags,  # noqa: F811
    prompts_file,
    tmp_path,
    monkeypatch,
):
    folder = tmp_path / "class"
    prior = ["--with_prior_preservation", "--class_data_dir", folder, "--num_class_images", 5]
    prior += ["--sample_batch_size", 2, "--max_train_steps", 2]
    honest = dreambooth.PromptEncoder.encode_prompts
    seen = []
    monkeypatch.setattr(
        dreambooth.PromptEncoder, "encode_prompts", lambda self, prompts: seen.append(prompts) or honest(self, prompts)
    )
    train(SCRIPT, *flags, *prior, "--class_prompt", prompts_file, "--output_dir", tmp_path / "a")
    drawn = class_images(folder)
    prompts = ["a red shape", "a blue shape on the left", "an empty picture"]
    assert [prompt for prompt, _ in drawn.values()] == [*prompts, *prompts[:2]]
    assert len({image for _, image in drawn.values()}) == 5
    for batch in seen[-2:]:  # of the two steps; class images follow the others
        classes = batch[len(batch) // 2 :]
        assert classes and set(classes) <= set(prompts)

    # what is drawn again is the same; an image of one's own brings its caption
    (folder / "class-00003.png").unlink()
    shutil.copy(folder / "class-00000.png", folder / "zoo.png")
    (folder / "zoo.txt").write_text("a picture of mine")
    prior += ["--num_class_images", 6, "--class_prompt", prompts_file]
    train(SCRIPT, *flags, *prior, "--output_dir", tmp_path / "b")
    assert drawn.items() <= class_images(folder).items()
    assert read_class_images(folder, prompts, 6)[5].caption == "a picture of mine"
    with pytest.raises(SystemExit) as ended:
        train(SCRIPT, *flags, *prior, "--output_dir", tmp_path / "c", "--class_prompt", "a red shape")
    assert ended.value.code == 2


def test_a_sample_is_preserved_for_its_own_caption_with_other_words(train, flags, tmp_path, monkeypatch):  # noqa: F811
    honest = dreambooth.PromptEncoder.encode_prompts
    seen = []
    monkeypatch.setattr(
        dreambooth.PromptEncoder, "encode_prompts", lambda self, prompts: seen.append(prompts) or honest(self, prompts)
    )
    words = ("--preserve_outputs", 1, "--preserve_prompts", "background=>wall,sky", "--max_train_steps", 2)
    train(SCRIPT, *flags, *words, "--output_dir", tmp_path / "run")
    for own, others in (seen[-4:-2], seen[-2:]):  # of the two steps
        for prompt, other in zip(own, others, strict=True):
            if "background" in prompt:
                assert other in (prompt.replace("background", "wall"), prompt.replace("background", "sky"))
            else:
                assert "background" not in other


def prior_preservation(folder, *words):
    return ["--with_prior_preservation", "--class_data_dir", folder, "--num_class_images", 4, *words]


def test_class_images_held_to_the_base_cost_nothing_until_it_moves(
    train,
    flags,  # noqa: F811
    tiny_model,
    prompts_file,
    tmp_path,
):
    flags = [*flags, *prior_preservation(tmp_path / "class", "--class_prompt", prompts_file)]
    flags += ["--learning_rate", 1e-2, "--max_train_steps", 8, "--prior_target"]
    losses = {}
    for target, weight in (("image", 30), ("base", 0), ("base", 30)):
        run = tmp_path / f"{target}{weight}"
        train(SCRIPT, *flags, target, "--prior_loss_weight", weight, "--output_dir", run)
        losses[target, weight] = losses_of(run)
    assert losses["base", 30][0] == pytest.approx(losses["base", 0][0], rel=1e-4)
    assert losses["image", 30][0] > 2 * losses["base", 0][0]
    prompts = ["a red shape", "an empty picture"] * 2
    moved = {run: distance_to_base(tiny_model, tmp_path / run, prompts) for run in ("base0", "base30")}
    assert 0 < moved["base30"] < moved["base0"] / 2


@pytest.mark.parametrize("mode", ["CLIP LoRA", "pivotal CLIP"])
def test_base_targets_resume_bit_for_bit_and_do_not_depend_on_caches(train, flags, tmp_path, mode):  # noqa: F811
    flags = [*flags, *prior_preservation(tmp_path / "class", "--class_prompt", "red"), "--prior_target", "base"]
    flags += [*MODES[mode], "--lora_dropout", 0.1, "--checkpointing_steps", 2, "--max_train_steps", 4]
    train(SCRIPT, *flags, "--output_dir", tmp_path / "a" / "run")
    variants = {
        "resumed": ["--resume_from_checkpoint", tmp_path / "a" / "run" / "checkpoint-2"],
        "other ways": ["--cache_latents", "False", "--gradient_checkpointing", "--offload"],
    }
    for name, extra in variants.items():
        train(SCRIPT, *flags, *extra, "--output_dir", tmp_path / name / "run")
        assert_equal(results(tmp_path / "a" / "run"), results(tmp_path / name / "run"))
    with pytest.raises(SystemExit) as ended:
        train(SCRIPT, *flags, *variants["resumed"], "--prior_target", "image", "--output_dir", tmp_path / "b" / "run")
    assert ended.value.code == 2


def test_regularization_images_of_a_data_toml_are_held_to_the_base(train, flags, pictures, tmp_path, capsys):  # noqa: F811
    where = flags.index("--instance_data_dir")
    flags = [*flags[:where], *flags[where + 2 :], "--prior_target", "base", "--prior_loss_weight"]
    config = tmp_path / "data.toml"
    shutil.copytree(pictures, tmp_path / "class")
    config.write_text(
        f"""[[datasets]]
resolution = 32
batch_size = 2
caption_extension = ".txt"
  [[datasets.subsets]]
  image_dir = "{pictures}"
  [[datasets.subsets]]
  image_dir = "{tmp_path / "class"}"
  is_reg = true
  shuffle_caption = true
"""
    )
    data = ["--dataset_config", config, "--max_train_steps", 2, "--output_dir"]
    for weight in (0, 30):
        train(SCRIPT, *flags, weight, *data, tmp_path / f"{weight}")
    without, with_weight = (losses_of(tmp_path / run) for run in ("0", "30"))
    assert with_weight[0] == pytest.approx(without[0], rel=1e-4)
    refused = {  # sharded processes must take the same forward passes, and is_reg images are not in all batches
        "--train_text_encoder takes is_reg images": MODES["CLIP LoRA"],
        "does not work with --fsdp and --dataset_config": ["--fsdp"],
    }
    for message, extra in refused.items():
        with pytest.raises(SystemExit) as ended:
            train(SCRIPT, *flags, 1, *data, tmp_path / "refused", *extra)
        assert ended.value.code == 2
        assert message in capsys.readouterr().err
    config.write_text(config.read_text().replace("is_reg = true", ""))
    with pytest.raises(SystemExit) as ended:
        train(SCRIPT, *flags, 1, *data, tmp_path / "none")
    assert ended.value.code == 2
    assert "has no is_reg images" in capsys.readouterr().err


@pytest.mark.parametrize("script", ["train_dreambooth_flux_advanced", "train_influxedit"])
def test_class_images_are_drawn_by_the_quantized_model_and_load_none_once_they_are_there(
    train, short_runs, tmp_path, monkeypatch, script
):
    module = imported(script)
    generate_class_images = module.generate_class_images
    quantized = []

    def watched(accelerator, pipeline, *args, **kwargs):
        quantized.append(any(type(part).__name__ == "Linear4bit" for part in pipeline.transformer.modules()))
        generate_class_images(accelerator, pipeline, *args, **kwargs)

    monkeypatch.setattr(module, "generate_class_images", watched)
    prior = ("--with_prior_preservation", "--class_data_dir", tmp_path / "class", "--class_prompt", "a shape")
    prior += ("--num_class_images", 1, "--quantize_base", "nf4", "--max_train_steps", 1)
    for name in ("draws", "finds"):
        train(script, *short_runs[script], *prior, "--output_dir", tmp_path / name)
    assert quantized == [True]
    weights = [load_file(tmp_path / name / "pytorch_lora_weights.safetensors") for name in ("draws", "finds")]
    for name, value in weights[0].items():
        assert torch.equal(value, weights[1][name])
