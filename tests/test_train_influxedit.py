"""train_influxedit.py: the model's input, exact resume, neutral caching and validation, files, learning."""

import json
import os
import random
import re
import shlex
import shutil
import signal
import subprocess
import sys

from common import validation
from common.latents import encode_moments, sample_latents

import numpy as np
import pytest
import torch
from conftest import ROOT
from diffusers import FlowMatchEulerDiscreteScheduler, FluxFillPipeline
from PIL import Image
from safetensors.torch import load_file

import train_influxedit as influxedit
from examples.influxedit import generate
from examples.influxedit.generate import edit, load_pipeline, paint_beside
from examples.influxedit.prepare_fill_circles import prepare
from examples.influxedit.toy_circles import prompt_of, random_circle, score, write_archive
from examples.toy.world import draw
from train_influxedit import pack_fill_condition


SCRIPT = "train_influxedit"
LORA = "pytorch_lora_weights.safetensors"
README = (ROOT / "examples" / "influxedit" / "README.md").read_text()


@pytest.fixture
def modes(tiny_fill, pairs):
    """Flags of a short run on tiny things in each mode; later flags override earlier ones."""
    shared = [
        *("--pretrained_model_name_or_path", tiny_fill, "--resolution", "32,48", "--max_sequence_length", 8),
        *("--caption_data_dir", pairs / "captions", "--train_batch_size", 2, "--rank", 2, "--learning_rate", 1e-3),
        *("--random_flip", "--caption_dropout", 0.3, "--report_to", "none", "--max_train_steps", 5, "--seed", 0),
        *("--validation_width", 48, "--validation_height", 32),
    ]
    edit = ["--mode", "edit", "--instance_data_dir", pairs / "images", "--target_data_dir", pairs / "targets"]
    mask = ["--instance_data_dir", pairs / "images", "--mask_data_dir", pairs / "masks", "--loss_mask_weight", 3]
    return {
        "edit": [*shared, *edit],
        "mask": [*shared, *mask],
        "split": [*shared, "--instance_data_dir", pairs / "combined", "--use_split_mask"],
    }


def weights(folder):
    return load_file(folder / LORA)


def losses_of(folder):
    return [json.loads(line)["loss"] for line in (folder / "metrics.jsonl").open()]


def assert_equal(a, b):
    assert a.keys() == b.keys()
    assert not [key for key in a if not torch.equal(a[key], b[key])]


# ---------------------------------------------------------------------------------------------------------------------
# The model's input
# ---------------------------------------------------------------------------------------------------------------------


def samples_of(flags):
    """The data set of some flags and its samples of the first epoch."""
    args = influxedit.parse_args([str(flag) for flag in flags])
    dataset = influxedit.EditDataset(influxedit.find_examples(args)[0], args)
    return dataset, [dataset.__getitems__([(0, index)])[0][0] for index in range(len(dataset))]


def test_training_reads_what_the_stock_pipeline_prepares(tiny_fill, modes):
    pipeline = FluxFillPipeline.from_pretrained(tiny_fill)
    dataset, samples = samples_of([*modes["mask"], "--resolution", 32, "--center_crop"])
    checked = 0
    for example, sample in zip(dataset.examples, samples, strict=True):
        if example.size != (32, 32):  # others are resized, which the pipeline does without cropping
            continue
        flip = Image.Transpose.FLIP_LEFT_RIGHT
        upright = torch.equal(sample["pixel_values"][0], influxedit.to_tensor(example.image()))
        picture, mask = (
            p.image() if upright else p.image().transpose(flip) for p in (example, example.images["mask"])
        )
        pixels = pipeline.image_processor.preprocess(picture, 32, 32)
        mask = pipeline.mask_processor.preprocess(mask, 32, 32)
        generator = torch.Generator().manual_seed(0)
        tokens = pipeline.prepare_mask_latents(
            mask, pixels * (1 - mask), 1, 16, 1, 32, 32, torch.float32, "cpu", generator
        )
        moments = encode_moments(pipeline.vae, sample["pixel_values"][1:])
        shown = sample_latents(moments, pipeline.vae.config, torch.Generator().manual_seed(0))
        ours = pack_fill_condition(shown, sample["mask"][None])
        assert ours.shape == (1, 4, 320)
        torch.testing.assert_close(ours, torch.cat(tokens[::-1], dim=-1), atol=1e-5, rtol=0)
        checked += 1
    assert checked == 2


def test_in_mask_mode_our_pipeline_is_the_stock_one(tiny_fill, pairs):
    call = {
        "prompt": "a red circle",
        "image": Image.open(pairs / "images" / "1.png"),
        "mask_image": Image.open(pairs / "masks" / "1.png"),
        "width": 32,
        "height": 32,
        "num_inference_steps": 2,
        "max_sequence_length": 8,
    }
    images = [
        pipeline_class.from_pretrained(tiny_fill)(**call, generator=torch.Generator().manual_seed(0)).images[0]
        for pipeline_class in (FluxFillPipeline, influxedit.FillPipeline)
    ]
    assert np.array_equal(*images)


def test_in_edit_mode_validation_reads_what_training_reads(train, tiny_fill, pairs, modes, tmp_path, monkeypatch):
    seen = {"training": [], "sampling": []}
    honest = influxedit.FluxTransformer2DModel.forward

    def forward(self, **inputs):
        seen["training" if torch.is_grad_enabled() else "sampling"].append(inputs["hidden_states"].detach())
        return honest(self, **inputs)

    monkeypatch.setattr(influxedit.FluxTransformer2DModel, "forward", forward)
    one = tmp_path / "one"
    for name in ("images", "targets", "captions"):
        (one / name).mkdir(parents=True)
        (path,) = (pairs / name).glob("1.*")
        (one / name / path.name).write_bytes(path.read_bytes())
    flags = [*modes["edit"], "--instance_data_dir", one / "images", "--target_data_dir", one / "targets"]
    flags += ["--caption_data_dir", one / "captions", "--resolution", 32]
    flags = [flag for flag in flags if flag != "--random_flip"]
    size = ("--validation_width", 32, "--validation_height", 32)
    train(SCRIPT, *flags, "--max_train_steps", 2, "--validation_prompt", "x", *size, "--output_dir", tmp_path / "run")
    training, sampling = (seen[name][0][..., 64:] for name in ("training", "sampling"))
    assert training.shape == sampling.shape == (1, 4, 320)
    assert torch.equal(training[..., 64:], torch.ones(1, 4, 256))
    assert torch.equal(sampling[..., 64:], torch.ones(1, 4, 256))
    vae = influxedit.AutoencoderKL.from_pretrained(tiny_fill, subfolder="vae")
    picture = influxedit.to_tensor(Image.open(one / "images" / "1.png"))[None]
    posterior = vae.encode(picture).latent_dist
    spread = vae.config.scaling_factor * posterior.std.max().item()
    mean = pack_fill_condition((posterior.mean - vae.config.shift_factor) * vae.config.scaling_factor, picture[:, :1])
    for tokens in (training, sampling):
        assert (tokens[..., :64] - mean[..., :64]).abs().max() < 6 * spread


def test_the_loss_is_that_of_flow_matching_and_counts_tokens_under_the_mask(tiny_fill, modes):
    args = influxedit.parse_args([str(flag) for flag in modes["mask"]])
    scheduler = FlowMatchEulerDiscreteScheduler.from_pretrained(tiny_fill, subfolder="scheduler")
    latents, mask = torch.randn(2, 16, 4, 6), torch.zeros(2, 1, 32, 48)
    mask[:, :, :, 24:] = 1  # of 3 columns of tokens, half of the second and all of the third
    condition = pack_fill_condition(torch.randn(2, 16, 4, 6), mask)
    inputs, velocity = {}, torch.randn(2, 6, 64)

    def transformer(**given):
        inputs.update(given)
        return (velocity,)

    def loss(weight):
        args.loss_mask_weight = weight
        noise, sigmas = influxedit.sample_noise(
            latents, args=args, noise_scheduler=scheduler, generator=torch.Generator().manual_seed(0)
        )
        return influxedit.compute_loss(
            *(transformer, latents, noise, sigmas, condition, torch.zeros(2, 8, 32), torch.zeros(2, 32)),
            args=args,
            family=influxedit.Fill({}),
            guidance=None,
        )

    plain = loss(1)
    noisy, sigmas = inputs["hidden_states"][..., :64], inputs["timestep"].view(2, 1, 1)
    packed = influxedit.pack_latents(latents)
    noise = (noisy - (1 - sigmas) * packed) / sigmas
    error = (velocity - (noise - packed)).square().mean(-1)  # [2, 6]
    torch.testing.assert_close(plain, error.mean(1), rtol=1e-3, atol=0)
    assert torch.equal(inputs["hidden_states"][..., 64:], condition)
    for weight in (0, 5):
        by_token = torch.tensor([1, (1 + weight) / 2, weight] * 2)
        torch.testing.assert_close(loss(weight), (error * by_token).sum(1) / by_token.sum(), rtol=1e-3, atol=0)


# ---------------------------------------------------------------------------------------------------------------------
# Runs
# ---------------------------------------------------------------------------------------------------------------------


class Killed(Exception):
    pass


def kill_at(monkeypatch, step_to_die):
    """Lets the next run end after the metrics of a step, before its checkpoint."""
    honest = influxedit.log_step

    def killed(accelerator, progress_bar, metrics, step, logs):
        honest(accelerator, progress_bar, metrics, step, logs)
        if step == step_to_die:
            monkeypatch.setattr(influxedit, "log_step", honest)
            raise Killed

    monkeypatch.setattr(influxedit, "log_step", killed)


RESUMES = {
    "edit, embedder, CLIP": ("edit", "--train_embedder", "--train_text_encoder", "--text_encoder_lr", "1e-3"),
    "mask, Prodigy": ("mask", "--optimizer", "prodigy", "--learning_rate", "1", "--dataloader_num_workers", "2"),
    "split, 8 bit": ("split", "--use_8bit_adam", "--lr_scheduler", "cosine", "--lr_warmup_steps", "2"),
}


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.slow if "8 bit" in name else []) for name in RESUMES]
)
def test_resume_is_exact(train, modes, tmp_path, monkeypatch, name):
    mode, *extra = RESUMES[name]
    flags = [
        *(*modes[mode], *extra, "--gradient_accumulation_steps", 2, "--lora_dropout", 0.1, "--cache_latents"),
        *("--checkpointing_steps", 2, "--validation_prompt", "a red circle", "--validation_steps", 3),
    ]
    train(SCRIPT, *flags, "--output_dir", tmp_path / "whole")
    kill_at(monkeypatch, 3)
    with pytest.raises(Killed):
        train(SCRIPT, *flags, "--output_dir", tmp_path / "parts")
    train(SCRIPT, *flags, "--output_dir", tmp_path / "parts", "--resume_from_checkpoint", "latest")
    assert_equal(weights(tmp_path / "whole"), weights(tmp_path / "parts"))
    losses = [
        [json.loads(line)["loss"] for line in (tmp_path / run / "metrics.jsonl").open()] for run in ("whole", "parts")
    ]
    assert losses[0] == losses[1]
    assert len(losses[0]) == 5


def test_a_run_killed_without_a_seed_resumes_bit_for_bit(train, runs, modes, tmp_path):
    flags = [*modes["edit"], "--max_train_steps", 9, "--checkpointing_steps", 3, "--output_dir", tmp_path / "run"]
    seed = flags.index("--seed")
    unseeded = flags[:seed] + flags[seed + 2 :]
    runs.start(SCRIPT, [*unseeded, "--max_train_steps", 100000])
    runs.wait_for((tmp_path / "run" / "checkpoint-3").exists)
    os.killpg(runs.pid, signal.SIGKILL)
    assert runs.end() == -signal.SIGKILL
    steps = max(int(path.name[11:]) for path in (tmp_path / "run").glob("checkpoint-*")) + 2
    train(SCRIPT, *unseeded, "--max_train_steps", steps, "--resume_from_checkpoint", "latest")
    drawn = json.loads((tmp_path / "run" / "args.json").read_text())["args"]["seed"]
    assert drawn > 0
    train(SCRIPT, *flags, "--seed", drawn, "--max_train_steps", steps, "--output_dir", tmp_path / "whole")
    assert_equal(weights(tmp_path / "whole"), weights(tmp_path / "run"))


@pytest.mark.parametrize("mode", ["edit", *(pytest.param(m, marks=pytest.mark.slow) for m in ("mask", "split"))])
def test_caching_and_validation_do_not_change_training(train, modes, tmp_path, mode):
    runs = {
        "plain": [],
        "cached": ["--cache_latents", "--dataloader_num_workers", 2],
        "validated": ["--validation_prompt", "a red circle;blue", "--validation_steps", 2, "--offload"],
        "checkpointed": ["--checkpointing_steps", 2, "--gradient_checkpointing"],
    }
    for name, extra in runs.items():
        train(SCRIPT, *modes[mode], "--repeats", 2, *extra, "--output_dir", tmp_path / name)
    plain = weights(tmp_path / "plain")
    assert max(value.abs().max() for key, value in plain.items() if "lora_B" in key) > 0
    for name in runs:
        assert_equal(plain, weights(tmp_path / name))


KINDS = {
    "edit": ("edit",),
    "edit, embedder": ("edit", "--train_embedder"),
    "mask": ("mask",),
    "split, CLIP": ("split", "--mask_only_right", "--train_text_encoder", "--text_encoder_lr", "1e-2"),
}


@pytest.mark.parametrize("kind", KINDS)
def test_the_files_alone_draw_the_last_validation_image(
    train, modes, tiny_fill, pairs, tmp_path, monkeypatch, capsys, kind
):
    drawn, (mode, *extra) = [], KINDS[kind]
    honest = validation.log_images
    monkeypatch.setattr(validation, "log_images", lambda a, b, *c, **d: drawn.append(b) or honest(a, b, *c, **d))
    image, mask = pairs / "images" / "0.png", pairs / "masks" / "0.png"
    extra += ["--validation_prompt", "a circle", "--validation_image", image]
    extra += ["--validation_mask", mask] if mode == "mask" else []
    run = tmp_path / "run"
    train(SCRIPT, *modes[mode], *extra, "--learning_rate", 1e-2, "--lora_alpha", 4, "--output_dir", run)
    saved = weights(run)
    assert any(key.startswith("transformer.x_embedder") for key in saved) == ("embedder" in kind)
    assert any(key.startswith("text_encoder.") for key in saved) == ("CLIP" in kind)
    pipeline = FluxFillPipeline.from_pretrained(tiny_fill)
    for trained in (False, True):
        if trained:
            pipeline.load_lora_weights(run)
        holes = {"mask": Image.open(mask), "split": influxedit.split_mask(influxedit.Size(32, 48), "right")}
        with monkeypatch.context() as patch:
            if mode == "edit":  # as the model card says
                prepare_mask_latents = pipeline.prepare_mask_latents
                white = lambda mask, *rest, f=prepare_mask_latents: f(torch.ones_like(mask), *rest)  # noqa: E731
                patch.setattr(pipeline, "prepare_mask_latents", white, raising=False)
            result = pipeline(
                *("a circle",),
                image=Image.open(image),
                mask_image=holes.get(mode, Image.new("L", (48, 32))),
                width=48,
                height=32,
                max_sequence_length=8,
                guidance_scale=3.5,
                generator=torch.Generator().manual_seed(0),
            ).images[0]
        difference = np.abs(np.asarray(result, int) - np.asarray(drawn[-1 if trained else 0][0], int)).max()
        assert difference <= 2, f"trained: {trained}"
    assert np.abs(np.asarray(drawn[-1][0], int) - np.asarray(drawn[0][0], int)).max() > 10
    snippet = (run / "README.md").read_text().split("```python\n")[1].split("```")[0]
    for name, path in (("input.png", image), ("mask.png", mask)):
        (tmp_path / name).write_bytes(path.read_bytes())
    if kind in ("edit, embedder", "mask"):
        monkeypatch.chdir(tmp_path)
        exec(compile(snippet, "README.md", "exec"), {})
        assert Image.open("image.png").size == (48, 32)
    words = shlex.split(capsys.readouterr().out.split("Generate with it:\n")[1])[1:]
    more = ["--num_inference_steps", "50", "--output", str(tmp_path / "edited")]
    monkeypatch.setattr("sys.argv", [*words, *more])
    generate.main()
    result = Image.open(tmp_path / "edited" / "0-edited.png")
    assert result.size == ((48, 32) if mode != "split" else (24, 16))  # of two side by side
    if mode != "split":  # the example paints the right half of another picture there
        assert np.abs(np.asarray(result, int) - np.asarray(drawn[-1][0], int)).max() <= 2


def test_what_lands_in_output_dir_and_what_trains(train, modes, tmp_path, tiny_fill):
    run = tmp_path / "run"
    extra = ("--train_embedder", "--validation_prompt", "a;b", "--num_validation_images", 2, "--validation_steps", 3)
    extra += ("--report_to", "tensorboard", "--checkpointing_steps", 2, "--checkpoints_total_limit", 1)
    train(SCRIPT, *modes["edit"], *extra, "--output_dir", run)
    assert sorted(path.name for path in run.iterdir()) == [
        *(
            ".run.json",
            "README.md",
            "args.json",
            "checkpoint-4",
            "logs",
            "loss.png",
            "metrics.jsonl",
            LORA,
            "validation",
        )
    ]
    assert sorted(path.name for path in (run / "validation").iterdir()) == [f"step-00000{n}.png" for n in (0, 3, 5)]
    base = load_file(tiny_fill / "transformer" / "diffusion_pytorch_model.safetensors")
    exact = load_file(run / "checkpoint-4" / f"resume_{LORA}")  # it resumes with the embedder's own weights
    change, bias_change = [exact[f"transformer.x_embedder.{k}"] - base[f"x_embedder.{k}"] for k in ("weight", "bias")]
    assert change.any()
    assert bias_change.any()
    change[:, -256:] += bias_change[:, None] / 256  # inputs of a mask that is 1 everywhere
    saved = weights(run / "checkpoint-4")
    product = saved["transformer.x_embedder.lora_B.weight"] @ saved["transformer.x_embedder.lora_A.weight"]
    assert torch.equal(product, change)
    assert weights(run)["transformer.x_embedder.lora_B.weight"].any()
    rows = [json.loads(line) for line in (run / "metrics.jsonl").open()]
    assert all(np.isfinite(row["loss"]) and row["grad_norm"] > 0 for row in rows)


def test_the_transformer_comes_last_and_each_model_once(train, modes, tmp_path, monkeypatch):
    events = []
    for name in ("load_model", "cache_moments"):
        honest = getattr(influxedit, name)

        def recorded(first, *rest, name=name, honest=honest):
            events.append(getattr(first, "__name__", name))
            return honest(first, *rest)

        monkeypatch.setattr(influxedit, name, recorded)
    honest_cache = influxedit.PromptEncoder.cache_prompts
    monkeypatch.setattr(
        influxedit.PromptEncoder,
        "cache_prompts",
        lambda text, prompts: events.append("prompts") or honest_cache(text, prompts),
    )
    train(SCRIPT, *modes["edit"], "--cache_latents", "--max_train_steps", 1, "--output_dir", tmp_path)
    assert events == ["prompts", "AutoencoderKL", "cache_moments", "FluxTransformer2DModel"]


@pytest.mark.parametrize("mode", ["edit", "split"])
def test_prior_preservation(train, modes, tmp_path, mode):
    losses, folder = {}, tmp_path / "class"
    prior = ("--with_prior_preservation", "--class_prompt", "a square", "--num_class_images", 3)
    prior += ("--sample_batch_size", 2, "--class_data_dir", folder, "--max_train_steps", 1)
    for weight, extra in ((0, []), (1, ["--cache_latents"]), (2, [])):
        run = tmp_path / str(weight)
        train(SCRIPT, *modes[mode], *prior, *extra, "--prior_loss_weight", weight, "--output_dir", run)
        (losses[weight],) = losses_of(run)
    assert len(list(folder.iterdir())) == 3
    assert losses[1] - losses[0] > 1e-3
    assert losses[2] - losses[1] == pytest.approx(losses[1] - losses[0], rel=1e-4)
    with pytest.raises(SystemExit) as ended:
        train(SCRIPT, *modes[mode], *prior, "--class_prompt", "a dog", "--output_dir", tmp_path / "other")
    assert ended.value.code == 2 and not (tmp_path / "other").exists()


@pytest.mark.slow
def test_two_processes_resume_bit_for_bit(modes, tmp_path):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    flags = [*modes["edit"], "--train_text_encoder", "--train_embedder", "--cache_latents"]

    def run(name, steps, *extra):
        steps = ("--checkpointing_steps", 2, "--max_train_steps", steps)
        arguments = [*flags, *steps, "--output_dir", tmp_path / name]
        script = [str(ROOT / f"{SCRIPT}.py"), *map(str, [*arguments, *extra])]
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        result = subprocess.run([*command, *script], cwd=ROOT, env=environment, capture_output=True, text=True)
        assert result.returncode == 0, result.stderr

    run("whole", 4)
    shutil.copytree(tmp_path / "whole" / "checkpoint-2", tmp_path / "parts" / "checkpoint-2")
    run("parts", 4, "--resume_from_checkpoint", "latest")
    assert_equal(weights(tmp_path / "whole"), weights(tmp_path / "parts"))


@pytest.mark.parametrize(
    "extra",
    [
        ["--mixed_precision", "bf16", "--train_embedder", "--validation_prompt", "x"],
        ["--timestep_sampling", "flux_shift", "--weighting_scheme", "cosmap", "--scale_lr"],
        ["--weighting_scheme", "sigma_sqrt", "--lora_layers", "attn.to_q,proj_mlp", "--upcast_before_saving"],
    ],
    ids=lambda extra: extra[1],
)
def test_other_ways_to_train(train, modes, tmp_path, extra):
    train(SCRIPT, *modes["edit"], *extra, "--max_train_steps", 3, "--output_dir", tmp_path)
    assert np.isfinite(losses_of(tmp_path)).all()
    dtype = torch.bfloat16 if "bf16" in extra else torch.float32
    assert {value.dtype for value in weights(tmp_path).values()} == {dtype}


# ---------------------------------------------------------------------------------------------------------------------
# Learning
# ---------------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def circles(tmp_path_factory):
    """Toy circles, prepared as fill50k is."""
    root = tmp_path_factory.mktemp("circles")
    write_archive(root / "circles.zip", count=500)
    prepare(root / "circles.zip", root, prefix="")
    write_archive(root / "held_out.zip", count=3, seed=1)
    prepare(root / "held_out.zip", root / "held_out", prefix="")
    return root


def toy_commands(circles):
    """{mode: flags} of the commands that the example's page gives for the toy world, with the images of `circles`."""
    blocks = re.findall(r"```bash\n(python train_influxedit.py .*?)```", README, re.S)
    commands = {}
    for block in blocks:
        block = block.replace("data/toy_circles", str(circles)).replace("data/held_out", str(circles / "held_out"))
        flags = shlex.split(block.replace("\\\n", " "))[2:]
        commands["edit" if "--mode=edit" in flags else "mask"] = flags
    return commands


def figures(folder, *, base=False, count=64, steps=20):
    """Scores of edited outlines that were not trained on."""
    pipeline, args = load_pipeline(folder)
    if base:
        pipeline.unload_lora_weights()
    pipeline.set_progress_bar_config(disable=True)
    rng = random.Random("test")
    outlines, scenes = zip(*(random_circle(rng) for _ in range(count)), strict=True)
    call = edit if args["mode"] == "edit" else paint_beside
    images = call(
        *(pipeline, [prompt_of(scene) for scene in scenes], [draw(outline) for outline in outlines]),
        num_inference_steps=steps,
        guidance_scale=args["guidance_scale"],
        max_sequence_length=32,
        generator=torch.Generator().manual_seed(0),
    )
    return score(images, scenes)


def learn(train, circles, run, mode, *extra, sampling_steps=20):
    """(figures of the base model, figures with the LoRA) of the example's command for a mode."""
    flags = toy_commands(circles)[mode]
    train(SCRIPT, *flags, *extra, "--output_dir", run)
    results = figures(run, base=True, steps=sampling_steps), figures(run, steps=sampling_steps)
    for name in results[0]:
        print(f"{mode} mode, {name}: {results[0][name]:.0f} -> {results[1][name]:.0f}")
    return results


@pytest.mark.learning
@pytest.mark.parametrize(
    ("steps", "batch", "color_bar", "outline_bar"),
    [
        pytest.param(200, 8, 85, 45, marks=pytest.mark.slow, id="short"),
        pytest.param(400, 16, 90, 60, marks=pytest.mark.slow),
    ],
)
def test_it_learns_an_edit(train, circles, tmp_path, steps, batch, color_bar, outline_bar):
    short = ("--max_train_steps", steps, "--train_batch_size", batch, "--learning_rate", 3e-3, "--lr_warmup_steps", 10)
    before, after = learn(train, circles, tmp_path, "edit", *short, sampling_steps=8)
    print(f"bars: {color_bar}, {color_bar}, {outline_bar}")
    assert before["outline"] < 45
    assert min(after["circle"], after["background"]) >= color_bar
    assert after["outline"] >= outline_bar


@pytest.mark.slow
@pytest.mark.learning
@pytest.mark.parametrize("mode", ["edit", "mask"])
def test_it_learns_circles_in_both_modes(train, circles, tmp_path, mode):
    before, after = learn(train, circles, tmp_path, mode)
    print("bars: 90, 90, 80")
    assert before["outline"] < 45
    assert min(after["circle"], after["background"]) >= 90
    assert after["outline"] >= 80
