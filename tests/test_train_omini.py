"""train_omini.py: exact resume, neutral caching and validation, files, data sources, other ways to train."""

import io
import json
import os
import random
import shlex
import shutil
import signal
import subprocess
import sys
import tarfile
from contextlib import suppress

from common.data import open_stream
from common.lora import save_lora

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from conftest import ROOT
from datasets import Dataset
from diffusers import FluxPipeline
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file
from test_faults import slow_writer

import train_omini as omini
from examples.omini import generate
from examples.toy.world import caption, draw, random_scene


SCRIPT = "train_omini"
ADAM = ("--optimizer", "adamw", "--learning_rate", 1e-3)


@pytest.fixture
def flags(tiny_model, pictures):
    """A short run on tiny things; later flags override earlier ones."""
    return [
        *("--pretrained_model_name_or_path", tiny_model, "--instance_data_dir", pictures, "--target_size", 32),
        *("--max_sequence_length", 8, "--train_batch_size", 2, "--rank", 2, *ADAM),
        *("--drop_text_prob", 0.3, "--drop_image_prob", 0.3, "--report_to", "none", "--max_train_steps", 6),
    ]


def weights(folder):
    return {
        f"{file.stem}.{key}": v for file in sorted(folder.glob("*.safetensors")) for key, v in load_file(file).items()
    }


def losses(folder):
    return [json.loads(line)["loss"] for line in (folder / "metrics.jsonl").open()]


def assert_equal(a, b):
    assert a.keys() == b.keys()
    assert not [key for key in a if not torch.equal(a[key], b[key])]


# ---------------------------------------------------------------------------------------------------------------------
# What always holds
# ---------------------------------------------------------------------------------------------------------------------


RESUMED = {
    "AdamW, two adapters, cached": [
        *("--condition_type", "canny", "fill", "--adapter_per_condition", "--cache_latents", "--lora_dropout", 0.1),
    ],
    "Prodigy, token integration": [
        *("--condition_type", "token_integration", "--optimizer", "prodigy", "--learning_rate", 1),
        *("--lr_scheduler", "cosine", "--lr_warmup_steps", 2),
    ],
}


@pytest.mark.parametrize(
    "case", [pytest.param(case, marks=pytest.mark.slow if "Prodigy" in case else []) for case in RESUMED]
)
def test_a_killed_run_resumes_bit_for_bit(train, runs, flags, pictures, tmp_path, case):
    flags = [
        *flags,
        *RESUMED[case],
        *("--gradient_accumulation_steps", 2, "--dataloader_num_workers", 2, "--checkpointing_steps", 2),
        *("--validation_prompt", "a red circle", "--validation_image", pictures / "1.png", "--validation_steps", 3),
        *("--num_validation_images", 1, "--max_train_steps", 7),
    ]
    train(SCRIPT, *flags, "--output_dir", tmp_path / "whole")
    runs.start(SCRIPT, [*flags, "--output_dir", tmp_path / "killed"], slow_writer)
    runs.wait_for((tmp_path / "killed" / "checkpoint-4").exists)
    os.killpg(runs.pid, signal.SIGKILL)
    assert runs.end() == -signal.SIGKILL
    for folder in (tmp_path / "killed").glob("checkpoint-*"):
        if int(folder.name[11:]) > 4:  # the process was faster than this test
            shutil.rmtree(folder)
    train(SCRIPT, *flags, "--output_dir", tmp_path / "killed", "--resume_from_checkpoint", "latest")
    assert_equal(weights(tmp_path / "whole"), weights(tmp_path / "killed"))
    assert losses(tmp_path / "whole") == losses(tmp_path / "killed")
    assert len(losses(tmp_path / "whole")) == 7


def test_caching_and_validation_do_not_change_training(train, flags, pictures, tmp_path):
    validation = ("--validation_prompt", "a red circle", "--validation_image", pictures / "1.png")
    runs = {
        "plain": [],
        "cached": ["--cache_latents"],
        "prompts as they come": ["--no-cache_prompts", "--offload"],
        "workers": ["--dataloader_num_workers", 2],
        "validated": [*validation, "--validation_steps", 2, "--num_validation_images", 1],
        "checkpointed": ["--checkpointing_steps", 1, "--gradient_checkpointing"],
    }
    conditions = ("--condition_type", "canny", "deblurring", "--lora_dropout", 0.2)
    for name, extra in runs.items():
        train(SCRIPT, *flags, *conditions, *extra, "--output_dir", tmp_path / name)
    plain = weights(tmp_path / "plain")
    assert max(value.abs().max() for key, value in plain.items() if "lora_B" in key) > 0
    for name in runs:
        assert_equal(plain, weights(tmp_path / name))


def test_sigterm_saves_says_where_and_exits(train, runs, flags, tmp_path):
    flags = [*flags, "--condition_type", "coloring", "--output_dir", tmp_path / "run"]
    metrics = tmp_path / "run" / "metrics.jsonl"
    runs.start(SCRIPT, [*flags, "--max_train_steps", 100000])
    runs.wait_for(lambda: metrics.exists() and len(metrics.read_text().splitlines()) >= 3)
    os.kill(runs.pid, signal.SIGTERM)
    assert runs.end() == 128 + signal.SIGTERM
    (checkpoint,) = (tmp_path / "run").glob("checkpoint-*")
    assert f"saved {checkpoint}" in runs.output()
    steps = int(checkpoint.name[11:]) + 2
    train(SCRIPT, *flags, "--max_train_steps", steps, "--resume_from_checkpoint", "latest")
    train(SCRIPT, *flags, "--max_train_steps", steps, "--output_dir", tmp_path / "whole")
    assert_equal(weights(tmp_path / "whole"), weights(tmp_path / "run"))


def test_one_bad_loss_is_skipped_and_ten_end_the_run(train, flags, tmp_path, monkeypatch):
    flags = [*flags, "--condition_type", "coloring"]
    honest, calls = omini.compute_loss, []

    def sometimes_nan(bad, *args, **kwargs):
        calls.append(1)
        return honest(*args, **kwargs) * (float("nan") if len(calls) in bad else 1)

    monkeypatch.setattr(omini, "compute_loss", lambda *a, **k: sometimes_nan({3}, *a, **k))
    with pytest.raises(SystemExit, match="1 of 6 steps were skipped"):  # more than a tenth
        train(SCRIPT, *flags, "--output_dir", tmp_path / "once")
    assert all(torch.isfinite(value).all() for value in weights(tmp_path / "once").values())
    assert np.isfinite(losses(tmp_path / "once")).tolist() == [True, True, False, True, True, True]
    calls.clear()
    monkeypatch.setattr(omini, "compute_loss", lambda *a, **k: sometimes_nan(range(4, 99), *a, **k))
    with pytest.raises(SystemExit, match="step 13.*last 10 losses or gradients were not finite"):
        train(SCRIPT, *flags, "--max_train_steps", 50, "--checkpointing_steps", 3, "--output_dir", tmp_path / "always")
    assert (tmp_path / "always" / "checkpoint-9").is_dir()


@pytest.mark.slow
def test_two_processes_resume_bit_for_bit(flags, tmp_path):
    flags = [*flags, "--condition_type", "canny"]
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}

    def run(name, steps, *extra):
        arguments = [*flags, "--checkpointing_steps", 2, "--max_train_steps", steps, "--output_dir", tmp_path / name]
        script = [str(ROOT / f"{SCRIPT}.py"), *map(str, [*arguments, *extra])]
        result = subprocess.run([*command, *script], cwd=ROOT, env=environment, capture_output=True, text=True)
        assert result.returncode == 0, result.stderr

    run("whole", 4)
    run("parts", 2)
    run("parts", 4, "--resume_from_checkpoint", "latest")
    assert_equal(weights(tmp_path / "whole"), weights(tmp_path / "parts"))


def average_of_two(trainer):
    """Each process has its own gradient; after average_gradients both have the mean."""
    accelerator = Accelerator(cpu=True)
    parameters = [torch.nn.Parameter(torch.zeros(shape)) for shape in ((2, 3), 4, 1)]
    for i, parameter in enumerate(parameters[:2]):
        parameter.grad = torch.full_like(parameter, 10.0 * i + accelerator.process_index)
    omini.average_gradients(accelerator, parameters)
    assert [p.grad.unique().tolist() for p in parameters[:2]] == [[0.5], [10.5]], [p.grad for p in parameters]
    assert parameters[2].grad is None
    accelerator.wait_for_everyone()  # gloo aborts a process that still talks to one that has left
    accelerator.end_training()


def test_the_mean_gradient_of_two_processes(runs):
    assert runs.run(None, [], average_of_two, processes=2) == 0, runs.output()


# ---------------------------------------------------------------------------------------------------------------------
# Files
# ---------------------------------------------------------------------------------------------------------------------


def test_what_lands_in_output_dir(train, run_program, flags, pictures, tmp_path):
    run = tmp_path / "run"
    train(
        SCRIPT,
        *flags,
        *("--output_dir", run, "--report_to", "tensorboard", "--checkpointing_steps", 2),
        *("--checkpoints_total_limit", 2, "--condition_type", "canny", "coloring", "--adapter_per_condition"),
        *("--validation_prompt", "a red circle", "--validation_image", pictures / "1.png", "--validation_steps", 4),
        *("--num_validation_images", 2, "--condition_size", 32, 16, "--lora_alpha", 4, "--independent_condition"),
    )
    assert sorted(path.name for path in run.iterdir()) == [
        *(
            ".run.json",
            "README.md",
            "args.json",
            "canny.safetensors",
            "checkpoint-4",
            "checkpoint-6",
            "coloring.safetensors",
        ),
        *("logs", "loss.png", "metrics.jsonl", "validation"),
    ]
    assert sorted(p.name for p in (run / "validation").iterdir()) == [f"step-{step:06d}.png" for step in (0, 4, 6)]
    with safe_open(run / "coloring.safetensors", "pt") as file:
        about = json.loads(file.metadata()["omini"])
    expected = {
        "type": "coloring",
        "size": [16, 16],
        "position_delta": [0, 0],
        "position_scale": 2.0,
        "adapter": "coloring",
    }
    assert about["conditions"] == [expected]
    assert about["independent_condition"] is True
    pipeline = FluxPipeline.from_pretrained(flags[1])
    pipeline.load_lora_weights(run, weight_name="canny.safetensors")
    layer = pipeline.transformer.transformer_blocks[0].attn.to_q
    assert layer.scaling["default_0"] == 1  # alpha / rank = 2 is in lora_B
    saved = load_file(run / "canny.safetensors")["transformer.transformer_blocks.0.attn.to_q.lora_A.weight"]
    assert torch.equal(layer.lora_A["default_0"].weight, saved)

    command = (run / "README.md").read_text().split("```bash\n")[1].split("```")[0].replace("\\\n", " ")
    command = [part.replace("$IMAGE", str(pictures / "1.png")) for part in shlex.split(command)]
    output = tmp_path / "image.png"
    assert command[0] == "python"
    run_program(*command[1:-1], output, "--num_inference_steps", 2)
    assert Image.open(output).size == (32, 32)


def test_going_on_from_a_saved_adapter(train, flags, tmp_path):
    flags = [*flags, "--condition_type", "canny", "--learning_rate", 1e-12]
    train(SCRIPT, *flags, "--learning_rate", 1e-2, "--output_dir", tmp_path / "first")
    path = tmp_path / "first" / "canny.safetensors"
    train(SCRIPT, *flags, "--lora_path", path, "--max_train_steps", 1, "--output_dir", tmp_path / "second")
    first, second = weights(tmp_path / "first"), weights(tmp_path / "second")
    assert max(float((first[key] - second[key]).abs().max()) for key in first) < 1e-9
    assert max(float(value.abs().max()) for key, value in first.items() if "lora_B" in key) > 1e-3


def test_saved_adapters_find_their_conditions(flags, tmp_path):
    """--lora_path in another order, and of another task: each file goes to the conditions that its header names."""
    flags = [*flags, "--output_dir", tmp_path / "run"]

    def parse(*more):
        return omini.parse_args([str(flag) for flag in [*flags, *more]])

    def write(*types):
        args = parse("--condition_type", *types)
        specs = omini.condition_specs(args)
        transformer = omini.OminiTransformer2DModel.from_pretrained(flags[1], subfolder="transformer")
        omini.add_adapters(transformer, specs, args)
        (name,) = omini.adapter_names(specs)
        header = omini.adapter_metadata(args, specs, name)
        path = tmp_path / f"{name}.safetensors"
        save_lora(tmp_path, {"transformer": transformer}, adapter_name=name, weight_name=path.name, header=header)
        return path

    canny, coloring, depth = write("canny"), write("coloring"), write("deblurring")
    for paths, expected, said in (
        ([canny, coloring], [canny, coloring], None),
        ([coloring, canny], [canny, coloring], None),
        ([depth, canny], [canny, depth], "type deblurring instead of coloring"),
    ):
        args = parse("--condition_type", "canny", "coloring", "--adapter_per_condition", "--lora_path", *paths)
        specs = omini.condition_specs(args)
        assert omini.match_lora_paths(args, specs) == dict(zip(("canny", "coloring"), expected, strict=True))
        nothing = omini.OminiDataset([], specs, args)
        run_info = omini.describe_run(args, nothing, nothing)
        assert run_info["canny from"] == str(canny)
        assert run_info["coloring from"] == (f"{depth}, trained with {said}" if said else str(coloring))


def test_a_checkpoint_draws_as_the_result(train, flags, pictures, tmp_path):
    """Its LoRA files have the header of the run's own."""
    run = tmp_path / "run"
    conditions = ("--condition_type", "coloring", "subject", "--condition_column", "pose", "--adapter_per_condition")
    folder = tmp_path / "data"
    folder.mkdir()
    for name in ("a", "b"):
        shutil.copy(pictures / "1.png", folder / f"{name}.png")
    (folder / "metadata.jsonl").write_text(json.dumps({"file_name": "a.png", "pose": "b.png", "text": "x"}))
    conditions = (*conditions, "--instance_data_dir", folder, "--checkpointing_steps", 2, "--max_train_steps", 2)
    train(SCRIPT, *flags, *conditions, "--output_dir", run)
    images = []
    for source in (run, run / "checkpoint-2"):
        output = tmp_path / f"{source.name}.png"
        command = [source, "--prompt", "x", "--image", pictures / "1.png", "--num_inference_steps", 1]
        generate.main([str(word) for word in [*command, "--output", output]])
        images.append(np.asarray(Image.open(output)))
    assert np.array_equal(*images)


# ---------------------------------------------------------------------------------------------------------------------
# Data
# ---------------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def tars(tmp_path_factory):
    """Two webdataset tars, of three and two pictures."""
    folder, rng = tmp_path_factory.mktemp("tars"), random.Random(0)
    for shard, numbers in enumerate([(0, 1, 2), (3, 4)]):
        with tarfile.open(folder / f"{shard:05d}.tar", "w") as tar:
            for i in numbers:
                scene, buffer = random_scene(rng), io.BytesIO()
                draw(scene, 40, 32).save(buffer, format="JPEG")
                record = json.dumps({"prompt": caption(scene)}).encode()
                for suffix, data in (("jpg", buffer.getvalue()), ("json", record)):
                    info = tarfile.TarInfo(f"{i:04d}.{suffix}")
                    info.size = len(data)
                    tar.addfile(info, io.BytesIO(data))
    return folder


def without_source(flags):
    """The flags less --instance_data_dir."""
    place = flags.index("--instance_data_dir")
    return [*flags[:place], *flags[place + 2 :]]


def test_tars_stored_and_streamed(train, flags, tars, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    flags = [
        *without_source(flags),
        "--condition_type",
        "canny",
        "--data_files",
        tars / "00000.tar",
        tars / "00001.tar",
    ]
    flags += ["--cache_dir", tmp_path / "datasets"]
    train(SCRIPT, *flags, "--output_dir", tmp_path / "stored", "--max_train_steps", 2)
    assert np.isfinite(losses(tmp_path / "stored")).all()
    stream = [*flags, "--streaming", "--shuffle_buffer", 3, "--checkpointing_steps", 2, "--max_train_steps", 5]
    train(SCRIPT, *stream, "--output_dir", tmp_path / "whole")
    train(SCRIPT, *stream, "--max_train_steps", 2, "--output_dir", tmp_path / "parts")
    resumed = [*stream, "--dataloader_num_workers", 2, "--resume_from_checkpoint", "latest"]
    train(SCRIPT, *resumed, "--output_dir", tmp_path / "parts")
    assert_equal(weights(tmp_path / "whole"), weights(tmp_path / "parts"))


def stream_of(folder, num_samples, damaged):
    """A parquet file of `num_samples`, of which those in `damaged` {number: the bytes of its image} are no images."""
    rows = []
    for i in range(num_samples):
        file = io.BytesIO()
        Image.new("RGB", (32, 32), (i, 0, 0)).save(file, "PNG")
        rows.append({"image": {"bytes": damaged.get(i, file.getvalue()), "path": None}, "text": str(i)})
    folder.mkdir()
    Dataset.from_list(rows).to_parquet(folder / "train.parquet")
    return ("--condition_type", "canny", "--dataset_name", folder, "--streaming")


def test_a_bad_sample_of_a_stream_is_left_out_and_named(train, flags, tmp_path, capfd, monkeypatch):
    monkeypatch.setattr("datasets.config.SLEEP_TIME_ON_THREADS_SHUTDOWN", 0, raising=False)  # older ones have none
    source = stream_of(tmp_path / "data", 9, {0: b"", 4: b"no image"})
    flags = [*without_source(flags), *source, "--shuffle_buffer", 4, "--checkpointing_steps", 2]
    train(SCRIPT, *flags, "--output_dir", tmp_path / "whole")  # 12 samples: more than an epoch
    text = capfd.readouterr().out
    assert "samples of the stream could not be used" in text
    lines = (tmp_path / "whole" / "skipped_samples.jsonl").read_text().splitlines()
    assert len({json.loads(line)["skipped"] for line in lines}) == 2
    shutil.copytree(tmp_path / "whole" / "checkpoint-2", tmp_path / "parts" / "checkpoint-2")
    train(SCRIPT, *flags, "--output_dir", tmp_path / "parts", "--resume_from_checkpoint", "latest")
    assert_equal(weights(tmp_path / "whole"), weights(tmp_path / "parts"))
    assert losses(tmp_path / "whole")[2:] == losses(tmp_path / "parts")


@pytest.mark.parametrize("source", ["--instance_data_dir", "--dataset_name"])
def test_subject_pairs_give_two_samples_each(flags, tmp_path, source):
    folder = tmp_path / "pairs"
    folder.mkdir()
    image = Image.new("RGB", (2 * 32 + 3 * 4, 32 + 2 * 4), "black")
    image.paste("red", (4, 4, 36, 36))
    image.paste("blue", (40, 4, 72, 36))
    image.save(folder / "a.png")
    record = {"file_name": "a.png", "description": {"description_0": "left", "description_1": "right"}}
    (folder / "metadata.jsonl").write_text(json.dumps(record) + "\n")
    pair = ("--condition_type", "subject", "--image_size", 32, "--padding", 4, source, folder)
    args = omini.parse_args([str(flag) for flag in [*without_source(flags), *pair]])
    examples, problems = omini.find_examples(args)
    assert not problems
    dataset = omini.OminiDataset(examples, omini.condition_specs(args), args)
    red, blue = (255, 0, 0), (0, 0, 255)
    assert [example.caption for example in examples] == ["left", "right"]
    for example, target, condition in zip(examples, (red, blue), (blue, red), strict=True):
        assert dataset.target_image(example).getcolors() == [(32 * 32, target)]
        assert dataset.condition_image(example, "condition_0").getcolors() == [(32 * 32, condition)]
    assert dataset.specs[0].position_delta == (0, -2)


def graded_pairs(path, grades):
    """A parquet file as Subjects200K's: pairs with descriptions, of which quality_assessment may be absent."""
    import datasets

    image = Image.new("RGB", (2 * 32 + 3 * 4, 32 + 2 * 4), "red")
    names = ("compositeStructure", "imageQuality", "objectConsistency")
    rows = {
        "image": [image] * len(grades),
        "description": [{"description_0": f"{i}, left", "description_1": f"{i}, right"} for i in range(len(grades))],
        "quality_assessment": [grade and dict(zip(names, grade, strict=True)) for grade in grades],
    }
    path.mkdir()
    datasets.Dataset.from_dict(rows).cast_column("image", datasets.Image()).to_parquet(path / "train.parquet")


@pytest.mark.slow
def test_pairs_of_lower_quality_are_left_out(flags, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    graded_pairs(tmp_path / "pairs", [(5, 4, 5), (5, 5, 5), None, (5, 5, None)])
    pairs = ["--condition_type", "subject", "--image_size", 32, "--padding", 4, "--dataset_name", tmp_path / "pairs"]

    def dataset_of(*more):
        args = omini.parse_args([str(flag) for flag in [*without_source(flags), *pairs, *more]])
        examples, problems = omini.find_examples(args)
        assert not problems
        return args, omini.OminiDataset(examples, omini.condition_specs(args), args)

    args, dataset = dataset_of()
    assert [example.caption for example in dataset.examples] == ["1, left", "1, right"]
    nothing = omini.OminiDataset([], dataset.specs, args)
    assert omini.describe_run(args, dataset, nothing)["left out"].startswith("6 samples")
    args, everything = dataset_of("--no-quality_filter")
    assert len(everything) == 8
    assert "left out" not in omini.describe_run(args, everything, nothing)
    args, first = dataset_of("--streaming")
    assert first.examples[0].caption == "1, left"
    stream, _ = open_stream(**omini.own_dataset(args))
    batches = omini.streamed_batches(stream, first, args, process_index=0, num_processes=1)
    batches.stop = 1
    (batch,) = batches
    assert set(batch["prompt"]) <= {"1, left", "1, right", ""}

    graded_pairs(tmp_path / "bad", [(1, 1, 1)])
    args = omini.parse_args([str(flag) for flag in [*without_source(flags), *pairs[:-1], tmp_path / "bad"]])
    assert "--no-quality_filter" in omini.find_examples(args)[1][0]


def test_each_condition_is_validated_with_its_own_image(flags, pictures, tmp_path):
    """One image makes all conditions, or the i-th makes the i-th condition, as when generating."""
    for color in ("red", "blue"):
        Image.new("RGB", (32, 32), color).save(tmp_path / f"{color}.png")
    flags = [*flags, "--condition_type", "coloring", "deblurring", "--validation_prompt", "x", "--validation_image"]
    rng = np.random.default_rng(0)
    for colors, expected in ((["red", "blue"], [(76,) * 3, (0, 0, 255)]), (["red"], [(76,) * 3, (255, 0, 0)])):
        args = omini.parse_args([str(flag) for flag in flags] + [str(tmp_path / f"{color}.png") for color in colors])
        dataset = omini.OminiDataset([], omini.condition_specs(args), args)
        (example,) = omini.validation_examples(args)
        images = [dataset.condition_image(example, role, rng) for role in dataset.roles[1:]]
        assert [image.getpixel((0, 0)) for image in images] == expected


def test_a_stored_dataset_finds_its_captions_without_a_caption_column(flags, pictures, tmp_path):
    folder = tmp_path / "stored"
    folder.mkdir()
    shutil.copy(pictures / "1.png", folder / "a.png")
    (folder / "metadata.jsonl").write_text(json.dumps({"file_name": "a.png", "text": "a circle"}) + "\n")
    source = ("--condition_type", "canny", "--dataset_name", folder)
    args = omini.parse_args([str(flag) for flag in [*without_source(flags), *source]])
    examples, problems = omini.find_examples(args)
    assert not problems
    assert [example.caption for example in examples] == ["a circle"]


def posed(folder, pose_size, count=12, image_size=(32, 48), exif=None):
    """A folder of images, each with a pose that metadata.jsonl names."""
    folder.mkdir()
    rows = []
    for i in range(count):
        Image.new("RGB", image_size).save(folder / f"{i:02}.png")
        Image.new("RGB", pose_size).save(folder / f"pose-{i:02}.jpg", **({"exif": exif} if exif else {}))
        rows.append({"file_name": f"{i:02}.png", "text": "x", "pose": f"pose-{i:02}.jpg"})
    (folder / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


@pytest.fixture
def problems_of(flags):
    """problems_of(*flags): what a run with further flags says of its data."""

    def find(*more):
        args = omini.parse_args([str(flag) for flag in [*without_source(flags), "--target_size", "32x48", *more]])
        return omini.find_examples(args)[1]

    return find


def test_conditions_on_the_image_have_its_shape(problems_of, tmp_path, monkeypatch):
    custom = ["--condition_type", "custom", "--condition_column", "pose", "--instance_data_dir"]
    square = posed(tmp_path / "square", (32, 32))
    monkeypatch.setattr(omini, "MAX_CHECKED", 3)  # the pixels of few are read, the sizes of all
    problems = problems_of(*custom, square)
    assert len(problems) == 11
    assert problems[0].startswith(f"{square}/00.png, pose: a condition that lies on it must have the shape of")
    assert problems[-1] == "and 2 more like these"
    assert not problems_of(*custom, square, "--position_delta", "0,-2")  # beside the image
    assert not problems_of(*custom, square, "--condition_size", "32x16")  # over its upper part
    assert not problems_of(*custom, posed(tmp_path / "larger", (64, 97)))
    lying = Image.Exif()
    lying[0x0112] = 6
    assert not problems_of(*custom, posed(tmp_path / "turned", (96, 64), exif=lying))
    assert len(problems_of(*custom, posed(tmp_path / "upset", (64, 96), exif=lying))) == 11


def test_conditions_of_a_dataset_have_the_shape_too(flags, tmp_path, monkeypatch):
    import datasets

    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    images = [Image.new("RGB", (32, 48))] * 3
    poses = [Image.new("RGB", size) for size in ((32, 48), (32, 48), (32, 32))]
    table = datasets.Dataset.from_dict({"image": images, "text": ["x"] * 3, "pose": poses})
    table = table.cast_column("image", datasets.Image()).cast_column("pose", datasets.Image())
    (tmp_path / "data").mkdir()
    table.to_parquet(tmp_path / "data" / "train.parquet")
    own = ["--condition_type", "custom", "--condition_column", "pose", "--dataset_name", tmp_path / "data"]
    args = omini.parse_args([str(flag) for flag in [*without_source(flags), *own, "--target_size", "32x48"]])
    examples, (problem,) = omini.find_examples(args)
    assert f"{tmp_path / 'data'}[2], pose: a condition that lies on it" in problem
    dataset = omini.OminiDataset(examples, omini.condition_specs(args), args)
    dataset.checked_sample(examples[1], 0, 1)  # as those of a stream
    with pytest.raises(ValueError, match="a condition that lies on it"):
        dataset.checked_sample(examples[2], 0, 2)


def test_a_damaged_condition_of_a_stream_is_left_out_where_it_is_not_dropped(flags, tmp_path):
    """In the same epochs each time, as a resumed run needs it."""
    own = ["--condition_type", "custom", "--condition_column", "pose", "--drop_image_prob", 0.5]
    own += ["--instance_data_dir", posed(tmp_path / "data", (32, 32), image_size=(32, 32))]
    args = omini.parse_args([str(flag) for flag in [*without_source(flags), *own]])
    examples, problems = omini.find_examples(args)
    assert not problems
    dataset = omini.OminiDataset(examples, omini.condition_specs(args), args)

    def used_epochs():
        used = []
        for epoch in range(12):
            with suppress(OSError):
                used.append((epoch, dataset.checked_sample(examples[0], epoch, 0)["pixel_values"]["condition_0"]))
        return used

    content = io.BytesIO()
    Image.effect_noise((32, 32), 50).save(content, "PNG")
    noise = content.getvalue()
    examples[0].images["condition_0"].read = lambda: Image.open(io.BytesIO(noise))
    whole = used_epochs()
    dropped = [epoch for epoch, pixels in whole if (pixels == -1).all()]
    assert len(whole) == 12
    assert 0 < len(dropped) < 12
    examples[0].images["condition_0"].read = lambda: Image.open(io.BytesIO(noise[:-300]))
    assert [epoch for epoch, _ in used_epochs()] == dropped == [epoch for epoch, _ in used_epochs()]


@pytest.mark.parametrize("kind", ["picture", "tensor"])
def test_conditions_of_a_class_of_ones_own_have_the_shape_too(problems_of, tmp_path, kind):
    code = "import torch\nfrom PIL import Image\nclass Own:\n    def __len__(self): return 2\n"
    code += "    def __getitem__(self, i):\n"
    code += "        pose = Image.new('RGB', (32, 32 + 16 * i))\n"
    if kind == "tensor":
        code += "        pose = torch.zeros(3, 32 + 16 * i, 32)\n"
    code += "        return {'image': Image.new('RGB', (32, 48)), 'description': 'x', 'condition_0': pose}\n"
    (tmp_path / "own.py").write_text(code)
    (problem,) = problems_of("--condition_type", "custom", "--dataset_class", f"{tmp_path / 'own.py'}:Own")
    assert ":Own[0], condition_0: a condition that lies on it" in problem


def test_pairs_of_other_sizes_are_refused_with_the_size_that_fits(problems_of, flags, tmp_path):
    sizes = {
        "given": ((76, 40), True),  # 2 x 32 and 3 x 4 wide
        "no border behind": ((72, 36), True),
        "a border around each": ((80, 40), True),  # as in Subjects200K
        "larger": ((140, 72), "give --image_size 64 --padding 4"),
        "no padding": ((128, 64), "give --image_size 64 --padding 0 or --image_size 56 --padding 4"),
        "smaller": ((44, 24), "give --image_size 16 --padding 4"),
        "one square": ((64, 64), "two squares side by side are needed"),
        "upright": ((40, 76), "two squares side by side are needed"),
    }
    pair = ["--condition_type", "subject", "--image_size", 32, "--padding", 4, "--instance_data_dir"]
    for name, (size, expected) in sizes.items():
        folder = tmp_path / name
        folder.mkdir()
        for i in range(12):
            Image.new("RGB", size).save(folder / f"{i:02}.png")
            (folder / f"{i:02}.txt").write_text("x")
        problems = problems_of(*pair, folder)
        if expected is True:
            assert not problems, name
            continue
        assert problems[0].startswith(f"{folder}/00.png: {size[0]} x {size[1]} pixels hold no pair of --image_size 32")
        assert problems[0].endswith(f": {expected}")
        assert (len(problems), problems[-1]) == (11, "and 2 more like these")
    lying = Image.Exif()
    lying[0x0112] = 6
    image = Image.new("RGB", (76, 40))
    image.paste("red", (4, 4, 36, 36))
    image.paste("blue", (40, 4, 72, 36))
    (tmp_path / "turned").mkdir()
    image.transpose(Image.Transpose.ROTATE_90).save(tmp_path / "turned" / "a.png", exif=lying)
    (tmp_path / "turned" / "a.txt").write_text("x")
    args = omini.parse_args([str(flag) for flag in [*without_source(flags), *pair, tmp_path / "turned"]])
    examples, problems = omini.find_examples(args)
    assert not problems
    assert [example.image().getcolors() for example in examples] == [
        [(32 * 32, (255, 0, 0))],
        [(32 * 32, (0, 0, 255))],
    ]


def test_custom_columns_keep_their_order_around_a_subject(flags, tmp_path):
    """canny, subject, custom: the column is the third condition's, the other side of the pair the second's."""
    image = Image.new("RGB", (64, 32), "red")
    image.paste("blue", (32, 0, 64, 32))
    image.save(tmp_path / "a.png")
    Image.new("RGB", (32, 32), "white").save(tmp_path / "pose.png")
    (tmp_path / "metadata.jsonl").write_text(json.dumps({"file_name": "a.png", "text": "x", "pose": "pose.png"}))
    kinds = ("--condition_type", "canny", "subject", "custom", "--condition_column", "pose")
    kinds = (*kinds, "--image_size", 32, "--padding", 0, "--instance_data_dir", tmp_path)
    args = omini.parse_args([str(flag) for flag in [*without_source(flags), *kinds]])
    examples, problems = omini.find_examples(args)
    assert not problems
    dataset = omini.OminiDataset(examples, omini.condition_specs(args), args)
    for example, other in zip(examples, ((0, 0, 255), (255, 0, 0)), strict=True):
        assert dataset.condition_image(example, "condition_1").getcolors() == [(32 * 32, other)]
        assert dataset.condition_image(example, "condition_2").getcolors() == [(32 * 32, (255, 255, 255))]


def test_a_random_items_image_and_condition_are_of_one_call(flags, tmp_path):
    code = "import random\nfrom PIL import Image\nclass Random:\n    def __len__(self): return 3\n"
    code += "    def __getitem__(self, i):\n"
    code += "        image = Image.new('RGB', (32, 32), tuple(random.randrange(256) for _ in range(3)))\n"
    code += "        return {'image': image, 'description': 'x', 'condition_0': image, 'position_delta_0': (0, 0)}\n"
    (tmp_path / "own.py").write_text(code)
    own = ("--condition_type", "custom", "--dataset_class", f"{tmp_path / 'own.py'}:Random", "--drop_image_prob", 0)
    args = omini.parse_args([str(flag) for flag in [*without_source(flags), *own]])
    examples, problems = omini.find_examples(args)
    assert not problems
    dataset = omini.OminiDataset(examples, omini.condition_specs(args), args)
    for index in range(3):
        values = dataset[0, index]["pixel_values"]
        assert torch.equal(values["image"], values["condition_0"])


CLASS = """
from PIL import Image

class Pairs:
    def __len__(self):
        return 3

    def __getitem__(self, i):
        return {
            "image": Image.new("RGB", (32, 32), (80 * i, 0, 0)),
            "description": f"picture {i}",
            "condition_0": Image.new("RGB", (16, 16), (0, 80 * i, 0)),
            "position_delta_0": (0, -1),
            "condition_1": Image.new("RGB", (16, 16), (0, 0, 80 * i)),
            "position_delta_1": (1, 0.5),
            "position_scale_1": 2,
        }
"""


def test_a_class_of_ones_own_and_columns_of_a_folder(train, flags, pictures, tmp_path):
    (tmp_path / "pairs.py").write_text(CLASS)
    own = [*without_source(flags), "--condition_type", "custom", "custom", "--condition_size", 16]
    train(SCRIPT, *own, "--dataset_class", f"{tmp_path / 'pairs.py'}:Pairs", "--output_dir", tmp_path / "class")
    with safe_open(tmp_path / "class" / "custom_custom.safetensors", "pt") as file:
        places = [
            (each["position_delta"], each["position_scale"])
            for each in json.loads(file.metadata()["omini"])["conditions"]
        ]
    assert places == [([0, -1], 1), ([1, 0.5], 2)]
    folder = tmp_path / "columns"
    shutil.copytree(pictures, folder)
    rows = []
    for path in sorted(pictures.glob("*.png")):
        shutil.copy(path, folder / f"pose-{path.name}")
        rows.append({"file_name": path.name, "prompt": f"picture {path.stem}", "pose": f"pose-{path.name}"})
    (folder / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    columns = ("--condition_type", "custom", "--condition_column", "pose", "--position_delta", "0,-2")
    train(SCRIPT, *flags, *columns, "--instance_data_dir", folder, "--output_dir", tmp_path / "folder")
    assert (tmp_path / "folder" / "custom.safetensors").exists()
    args = omini.parse_args([str(f) for f in [*flags, *columns, "--instance_data_dir", folder]])
    examples, problems = omini.find_examples(args)
    assert not problems
    assert len(examples) == 5
    assert all(np.array_equal(example.image(), example.images["condition_0"].image()) for example in examples)


TENSORS = """
import torch

class Integrated:
    def __len__(self):
        return 2

    def __getitem__(self, i):
        mask = torch.tensor([True, False, False, i == 0])
        image = torch.linspace(0, 1, 3 * 32 * 32).reshape(3, 32, 32)
        return {
            "image": image,
            "image_latent_mask": ~mask,
            "condition_0": image,
            "condition_type_0": "custom",
            "condition_latent_mask_0": mask,
            "description": f"picture {i}",
        }

class Short(Integrated):
    def __getitem__(self, i):
        return super().__getitem__(i) | {"condition_latent_mask_0": torch.ones(3)}

class Wrong(Integrated):
    def __getitem__(self, i):
        return super().__getitem__(i) | {"condition_0": -torch.ones(3, 32, 32)}
"""


def test_a_class_of_tensors_with_latent_masks(train, flags, tmp_path, monkeypatch):
    """Items as those of OminiControl's datasets: tensors in [0, 1], no position_delta, masks of tokens."""
    (tmp_path / "own.py").write_text(TENSORS)
    own = [*without_source(flags), "--condition_type", "custom", "--drop_image_prob", 1, "--max_train_steps", 1]

    def of_class(name):
        return [*own, "--dataset_class", f"{tmp_path / 'own.py'}:{name}", "--output_dir", tmp_path / name]

    args = omini.parse_args([str(flag) for flag in of_class("Integrated")])
    examples, problems = omini.find_examples(args)
    assert not problems
    specs = omini.condition_specs(args, examples[0].columns["positions"])
    assert specs[0].position_delta == (0, 0)
    sample = omini.OminiDataset(examples, specs, args)[0, 1]
    assert sample["latent_masks"]["image"].tolist() == [False, True, True, True]
    assert sample["latent_masks"]["condition_0"].tolist() == [True, False, False, False]
    values = sample["pixel_values"]
    assert torch.equal(values["image"], values["condition_0"])  # a part of the image is never dropped
    wanted = torch.linspace(0, 1, 3 * 32 * 32).reshape(3, 32, 32)
    assert ((values["image"] + 1) / 2 - wanted).abs().max() <= 0.5 / 255 + 1e-6

    seen, honest = [], omini.OminiTransformer2DModel.transformer_forward
    monkeypatch.setattr(
        omini.OminiTransformer2DModel, "transformer_forward", lambda self, **k: seen.append(k) or honest(self, **k)
    )
    train(SCRIPT, *of_class("Integrated"))
    assert sorted(seen[0]["latent_mask"].sum(dim=1).tolist()) == [2, 3]
    assert seen[0]["conditions"][0].hidden_states.shape[1] == 2
    for name, message in (("Short", "3 of 3 tokens"), ("Wrong", "from -1 to -1: expected [3, H, W] in [0, 1]")):
        args = omini.parse_args([str(flag) for flag in of_class(name)])
        assert message in " ".join(omini.find_examples(args)[1])


def test_what_is_dropped_and_masked_for_token_integration(flags, pictures):
    """As OminiControl: the text may be dropped, the kept part of the image never; holes of 12 % or all but that."""
    flags = [*flags, "--condition_type", "token_integration", "canny", "--drop_image_prob", 1]
    args = omini.parse_args([str(flag) for flag in flags])
    examples, _ = omini.find_examples(args)
    dataset = omini.OminiDataset(examples, omini.condition_specs(args), args)
    sample = dataset[0, 1]
    assert sample["pixel_values"]["condition_1"].max() == -1
    assert sample["pixel_values"]["condition_0"].max() > -1
    assert torch.equal(sample["latent_masks"]["image"], ~sample["latent_masks"]["condition_0"])

    rng = np.random.default_rng(0)
    shares = np.array([omini.random_mask(rng, 32, 32).mean() for _ in range(4000)])
    assert 0 < shares.min() < shares.max() < 1
    assert abs(shares.mean() - 0.5) < 0.02
    assert 0.115 < np.minimum(shares, 1 - shares).mean() < 0.13


def test_a_datasets_folder_with_masks_of_any_shape(train, flags, pictures, tmp_path):
    """Parquet with image, prompt and mask; not square; token integration with holes of different sizes in a batch."""
    import datasets

    rng, rows = np.random.default_rng(0), {"image": [], "prompt": [], "hole": []}
    for i, path in enumerate(sorted(pictures.glob("*.png"))):
        image = Image.open(path)
        mask = np.zeros((image.height, image.width), dtype=np.uint8)
        mask[rng.integers(0, image.height, 3), rng.integers(0, image.width, 3)] = 255
        rows["image"].append(image)
        rows["prompt"].append(f"picture {i}")
        rows["hole"].append(Image.fromarray(mask))
    (tmp_path / "data").mkdir()
    dataset = datasets.Dataset.from_dict(rows)
    for column in ("image", "hole"):
        dataset = dataset.cast_column(column, datasets.Image())
    dataset.to_parquet(tmp_path / "data" / "train.parquet")
    source = ("--dataset_name", tmp_path / "data", "--caption_column", "prompt", "--mask_column", "hole")
    train(
        SCRIPT,
        *without_source(flags),
        *source,
        *("--condition_type", "token_integration", "--target_size", "64x48", "--train_batch_size", 5),
        *("--cache_dir", tmp_path / "cache", "--output_dir", tmp_path / "run"),
    )
    assert np.isfinite(losses(tmp_path / "run")).all()


# ---------------------------------------------------------------------------------------------------------------------
# Other ways to train
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "extra",
    [
        "--condition_type canny --mixed_precision bf16 --gradient_checkpointing",
        "--condition_type sr --quantize_base nf4 --optimizer sgd --learning_rate 0.1",
        pytest.param("--condition_type canny --compile --use_8bit_adam", marks=pytest.mark.slow),
        "--condition_type canny deblurring fill --condition_size 16 --timestep_sampling flux_shift",
    ],
)
def test_other_ways_to_train(train, flags, tmp_path, extra):
    train(SCRIPT, *flags, *extra.split(), "--max_train_steps", 3, "--output_dir", tmp_path)
    assert np.isfinite(losses(tmp_path)).all()
    dtype = torch.bfloat16 if "bf16" in extra else torch.float32
    assert {value.dtype for value in weights(tmp_path).values()} == {dtype}


def test_schnell_has_no_guidance(train, flags, tiny_pipeline, tmp_path):
    from diffusers import FluxTransformer2DModel

    model = tmp_path / "schnell"
    tiny_pipeline.save_pretrained(model)
    config = dict(tiny_pipeline.transformer.config) | {"guidance_embeds": False}
    FluxTransformer2DModel.from_config(config).save_pretrained(model / "transformer")
    train(
        SCRIPT,
        *flags,
        "--pretrained_model_name_or_path",
        model,
        "--condition_type",
        "canny",
        "--output_dir",
        tmp_path / "o",
    )
    assert np.isfinite(losses(tmp_path / "o")).all()


@pytest.mark.slow  # test_omini_forward.py compares outputs and gradients
def test_compiling_and_checkpointing_do_not_change_the_loss(train, flags, tmp_path):
    runs = {"plain": [], "checkpointed": ["--gradient_checkpointing"], "compiled": ["--compile"]}
    for name, extra in runs.items():
        train(SCRIPT, *flags, "--condition_type", "canny", *extra, "--output_dir", tmp_path / name)
    plain = np.array(losses(tmp_path / "plain"))
    assert np.abs(plain - losses(tmp_path / "checkpointed")).max() == 0
    assert np.abs(plain - losses(tmp_path / "compiled")).max() < 1e-4


def test_the_transformer_is_loaded_after_the_others_are_gone(train, flags, tmp_path, monkeypatch):
    events = []
    honest_load, honest_cache = omini.load_model, omini.cache_moments
    monkeypatch.setattr(omini, "load_model", lambda c, *rest: events.append(c.__name__) or honest_load(c, *rest))
    monkeypatch.setattr(omini, "cache_moments", lambda *a, **b: events.append("cached") or honest_cache(*a, **b))
    train(SCRIPT, *flags, "--condition_type", "canny", "--cache_latents", "--output_dir", tmp_path)
    assert events == ["AutoencoderKL", "cached", "OminiTransformer2DModel"]
