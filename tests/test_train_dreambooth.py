"""train_dreambooth_flux_advanced.py: exact resume, neutral caching and validation, files, real pictures."""

import json
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from conftest import ROOT
from diffusers import FluxPipeline
from PIL import Image
from safetensors.torch import load_file

import train_dreambooth_flux_advanced as dreambooth


SCRIPT = "train_dreambooth_flux_advanced"
LORA = "pytorch_lora_weights.safetensors"


@pytest.fixture
def flags(tiny_model, pictures):
    """A short run on tiny things; later flags override earlier ones."""
    return [
        *("--pretrained_model_name_or_path", tiny_model, "--instance_data_dir", pictures, "--resolution", 32),
        *("--max_sequence_length", 8, "--train_batch_size", 2, "--rank", 2, "--learning_rate", 1e-3),
        *("--random_flip", "--caption_dropout", 0.3, "--report_to", "none", "--max_train_steps", 6),
    ]


def weights(folder):
    return load_file(folder / LORA)


def assert_equal(a, b):
    assert a.keys() == b.keys()
    different = [key for key in a if not torch.equal(a[key], b[key])]
    assert not different


def launch(*flags):
    command = [sys.executable, str(ROOT / f"{SCRIPT}.py"), *map(str, flags)]
    return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def wait_for(path, process, timeout=120):
    deadline = time.monotonic() + timeout
    while not path.exists():
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < deadline, f"{path} did not appear"
        time.sleep(0.005)


OPTIMIZERS = {
    "AdamW": [],
    "AdamW8bit": ["--use_8bit_adam"],
    "Prodigy": ["--optimizer", "prodigy", "--learning_rate", 1, "--lr_scheduler", "cosine", "--lr_warmup_steps", 2],
}


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_a_killed_run_resumes_bit_for_bit(train, flags, tmp_path, optimizer):
    flags = [
        *flags,
        *OPTIMIZERS[optimizer],
        *("--gradient_accumulation_steps", 2, "--dataloader_num_workers", 2, "--lora_dropout", 0.1),
        *("--checkpointing_steps", 2, "--max_train_steps", 7),
    ]
    train(SCRIPT, *flags, "--output_dir", tmp_path / "whole")
    process = launch(*flags, "--output_dir", tmp_path / "killed")
    wait_for(tmp_path / "killed" / "checkpoint-4", process)
    process.kill()
    process.communicate()
    assert process.returncode == -signal.SIGKILL
    for folder in (tmp_path / "killed").glob("checkpoint-*"):
        if int(folder.name[11:]) > 4:  # the process was faster than this test
            for file in folder.iterdir():
                file.unlink()
            folder.rmdir()
    train(SCRIPT, *flags, "--output_dir", tmp_path / "killed", "--resume_from_checkpoint", "latest")
    assert_equal(weights(tmp_path / "whole"), weights(tmp_path / "killed"))
    losses = [
        [json.loads(line)["loss"] for line in (tmp_path / run / "metrics.jsonl").open()] for run in ("whole", "killed")
    ]
    assert losses[0] == losses[1]
    assert len(losses[0]) == 7


def test_caching_and_validation_do_not_change_training(train, flags, tmp_path):
    runs = {
        "plain": [],
        "cached": ["--cache_latents"],
        "offloaded": ["--cache_latents", "--offload"],
        "workers": ["--dataloader_num_workers", 2],
        "validated": ["--validation_prompt", "a red circle", "--validation_steps", 2, "--num_validation_images", 2],
        "checkpointed": ["--checkpointing_steps", 1, "--gradient_checkpointing"],
    }
    for name, extra in runs.items():
        train(SCRIPT, *flags, "--lora_dropout", 0.2, *extra, "--output_dir", tmp_path / name)
    plain = weights(tmp_path / "plain")
    assert max(value.abs().max() for key, value in plain.items() if "lora_B" in key) > 0
    for name in runs:
        assert_equal(plain, weights(tmp_path / name))


def test_another_seed_is_another_run(train, flags, tmp_path):
    for seed in (0, 1):
        train(SCRIPT, *flags, "--seed", seed, "--output_dir", tmp_path / str(seed))
    a, b = (weights(tmp_path / str(seed)) for seed in (0, 1))
    assert all(not torch.equal(a[key], b[key]) for key in a)


def test_sigterm_saves_says_where_and_exits(train, flags, tmp_path):
    flags = [*flags, "--output_dir", tmp_path / "run"]
    process = launch(*flags, "--max_train_steps", 100000)
    wait_for(tmp_path / "run" / "metrics.jsonl", process)
    while len((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()) < 3:
        time.sleep(0.01)
    process.send_signal(signal.SIGTERM)
    output = process.communicate(timeout=60)[0]
    (checkpoint,) = (tmp_path / "run").glob("checkpoint-*")
    assert process.returncode == 128 + signal.SIGTERM
    assert f"saved {checkpoint}" in output
    assert "Traceback" not in output
    steps = int(checkpoint.name[11:]) + 2
    train(SCRIPT, *flags, "--max_train_steps", steps, "--resume_from_checkpoint", "latest")
    train(SCRIPT, *flags, "--max_train_steps", steps, "--output_dir", tmp_path / "whole")
    assert_equal(weights(tmp_path / "whole"), weights(tmp_path / "run"))


def test_one_bad_loss_is_skipped_and_ten_end_the_run(train, flags, tmp_path, monkeypatch, capsys):
    honest, calls = dreambooth.compute_loss, []

    def sometimes_nan(bad, *args, **kwargs):
        calls.append(1)
        return honest(*args, **kwargs) * (float("nan") if len(calls) in bad else 1)

    monkeypatch.setattr(dreambooth, "compute_loss", lambda *a, **k: sometimes_nan({3}, *a, **k))
    train(SCRIPT, *flags, "--output_dir", tmp_path / "once")
    assert all(torch.isfinite(value).all() for value in weights(tmp_path / "once").values())
    rows = [json.loads(line) for line in (tmp_path / "once" / "metrics.jsonl").open()]
    assert [np.isfinite(row["loss"]) for row in rows] == [True, True, False, True, True, True]

    calls.clear()
    monkeypatch.setattr(dreambooth, "compute_loss", lambda *a, **k: sometimes_nan(range(4, 99), *a, **k))
    with pytest.raises(SystemExit, match="step 13.*last 10 losses were not finite"):
        train(SCRIPT, *flags, "--max_train_steps", 50, "--checkpointing_steps", 3, "--output_dir", tmp_path / "always")
    assert sorted(path.name for path in (tmp_path / "always").glob("checkpoint-*"))[-1] == "checkpoint-9"
    assert all(torch.isfinite(v).all() for v in weights(tmp_path / "always" / "checkpoint-9").values())


def test_what_lands_in_output_dir(train, flags, tmp_path, capsys):
    run = tmp_path / "run"
    train(
        SCRIPT,
        *flags,
        *(
            "--output_dir",
            run,
            "--report_to",
            "tensorboard",
            "--checkpointing_steps",
            2,
            "--checkpoints_total_limit",
            2,
        ),
        *("--validation_prompt", "a red circle", "--validation_steps", 4, "--num_validation_images", 2),
        *("--lora_alpha", 4),
    )
    assert sorted(path.name for path in run.iterdir()) == [
        *("README.md", "args.json", "checkpoint-4", "checkpoint-6", "logs", "loss.png", "metrics.jsonl"),
        *(LORA, "validation"),
    ]
    assert sorted(path.name for path in (run / "validation").iterdir()) == [
        f"step-{step:06d}.png" for step in (0, 4, 6)
    ]
    record = json.loads((run / "args.json").read_text())
    assert record["args"]["rank"] == 2
    assert "diffusers" in record["versions"]
    pipeline = FluxPipeline.from_pretrained(flags[1])
    pipeline.load_lora_weights(run)
    layer = pipeline.transformer.transformer_blocks[0].attn.to_q
    assert layer.scaling["default_0"] == 2  # alpha 4, rank 2

    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(run / "logs" / "dreambooth-flux"))
    events.Reload()
    assert {"loss", "lr", "grad_norm", "images_per_second", "peak_memory_gb"} <= set(events.Tags()["scalars"])
    assert len(events.Scalars("loss")) == 6
    assert events.Tags()["images"]
    snippet = (run / "README.md").read_text().split("```python\n")[1].split("```")[0]
    assert run_snippet(snippet, tmp_path).size == (32, 32)


def run_snippet(snippet, folder):
    subprocess.run([sys.executable, "-c", snippet], cwd=folder, check=True, env=os.environ, capture_output=True)
    return Image.open(folder / "image.png")


def test_wandb_offline_gets_curves_and_pictures(train, flags, tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_DIR", str(tmp_path))
    monkeypatch.setenv("WANDB_SILENT", "true")
    prompt = ("--validation_prompt", "a red circle", "--num_validation_images", 1)
    train(SCRIPT, *flags, "--max_train_steps", 2, "--output_dir", tmp_path / "run", "--report_to", "wandb", *prompt)
    assert list(tmp_path.glob("wandb/offline-run-*/*.wandb"))
    assert list(tmp_path.glob("wandb/offline-run-*/files/media/images/*.png"))


@pytest.fixture(scope="session")
def glyph_pictures(tmp_path_factory):
    """Six captioned pictures of the toy subject, as `world.py glyph` draws them."""
    folder = tmp_path_factory.mktemp("glyph")
    command = [sys.executable, ROOT / "examples" / "toy" / "world.py", "glyph", folder, "--count", "6"]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    return folder


def test_it_learns_a_subject(train, glyph_pictures, tmp_path):
    from examples.toy.compare import HERE, evaluate

    pipeline = FluxPipeline.from_pretrained(HERE / "flux")
    pipeline.set_progress_bar_config(disable=True)
    before, ordinary_before, _ = evaluate(pipeline, "glyph")
    started = time.perf_counter()
    train(
        SCRIPT,
        *("--pretrained_model_name_or_path", HERE / "flux", "--max_sequence_length", 32, "--report_to", "none"),
        *("--instance_data_dir", glyph_pictures, "--resolution", 64, "--cache_latents", "--output_dir", tmp_path),
        *QUICKSTART,
    )
    seconds = time.perf_counter() - started
    pipeline.load_lora_weights(tmp_path)
    after, ordinary_after, _ = evaluate(pipeline, "glyph")
    print(f"subject {before:.0f} -> {after:.0f} (bar 60) in {seconds:.0f} s, ordinary {ordinary_before:.0f} -> {ordinary_after:.0f}")
    assert before < 20
    assert after >= 60
