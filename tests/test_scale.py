"""Several processes compute what one does: DDP and FSDP2, in every trainer."""

import importlib
import json
import os
import random
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from accelerate.utils import InitProcessGroupKwargs
from conftest import ROOT
from safetensors.torch import load_file

from examples.toy.world import caption, draw, random_scene


SCRIPTS = ["train_dreambooth_flux_advanced", "train_omini", "train_influxedit", "train_twinflow"]


def losses(folder):
    return [json.loads(line)["loss"] for line in (folder / "metrics.jsonl").open()]


def result(folder):
    files = sorted(folder.glob("*.safetensors"))
    return {f"{file.stem}.{key}": value for file in files for key, value in load_file(file).items()}


def one_stream(module):
    """Lets rank r of two draw what micro-step r of one process draws, as both then see the same samples."""
    honest, initialized = module.step_generator, torch.distributed.is_initialized
    processes = lambda: torch.distributed.get_world_size() if initialized() else 1  # noqa: E731
    return lambda seed, step, micro=0, rank=0: honest(seed, step, micro * processes() + rank)


def accelerator_of_deepspeed(cpu, **kwargs):
    """An Accelerator as on GPUs: told that it is on CPUs, it leaves DeepSpeed out."""
    return Accelerator(kwargs_handlers=[InitProcessGroupKwargs(backend="gloo")], **kwargs)


def launch(script, flags, processes=2, zero_stage=None):
    """Runs a trainer, whose processes draw as `one_stream` says, in several processes."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
    paths = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": paths}
    if zero_stage:  # what accelerate launch sets
        environment |= {"ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DEEPSPEED_ZERO_STAGE": str(zero_stage)}
        environment |= {"ACCELERATE_DEEPSPEED_ZERO3_INIT": "false", "DS_ACCELERATOR": "cpu"}
    return subprocess.run(
        [*command, __file__, script, *map(str, flags)], cwd=ROOT, env=environment, capture_output=True, text=True
    )


@pytest.fixture
def flags_of(short_runs, tmp_path):
    """{trainer: flags} for eight pictures of one size: as many batches on one process as on two."""
    rng, data = random.Random(0), {}
    for name in ("images", "targets"):
        folder = tmp_path / "data" / name
        folder.mkdir(parents=True)
        for i in range(8):
            scene = random_scene(rng)
            draw(scene, 32, 32).save(folder / f"{i}.png")
            (folder / f"{i}.txt").write_text(caption(scene))
        data[name] = folder
    own = {
        "train_influxedit": ["--target_data_dir", data["targets"], "--caption_data_dir", data["targets"]],
    }
    folders = {script: "--train_data_dir" if "twinflow" in script else "--instance_data_dir" for script in SCRIPTS}
    return {s: [*short_runs[s], folders[s], data["images"], *own.get(s, ())] for s in SCRIPTS}


WAYS = [pytest.param("DDP", marks=pytest.mark.slow), "FSDP2", pytest.param("FSDP2, all", marks=pytest.mark.slow)]
EXTRA = {
    "DDP": [],
    "FSDP2": ["--fsdp"],
    "FSDP2, all": ["--fsdp", "--gradient_checkpointing", "--compile"],
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("script", SCRIPTS)
def test_two_processes_compute_what_one_does(train, flags_of, tmp_path, monkeypatch, script, way):
    module = importlib.import_module(script)
    monkeypatch.setattr(module, "step_generator", one_stream(module))
    flags = [*flags_of[script], "--max_train_steps", 3, "--output_dir"]
    train(script, *flags, tmp_path / "one", "--gradient_accumulation_steps", 2)
    drawn = ("--validation_prompt", "a circle", "--num_validation_images", 1)
    if script == "train_omini":
        drawn += ("--validation_image", tmp_path / "data" / "images" / "0.png")
    run = launch(script, [*flags, tmp_path / "two", *EXTRA[way], *drawn])
    assert run.returncode == 0, run.stderr[-3000:]
    one, two = losses(tmp_path / "one"), losses(tmp_path / "two")
    print(f"{way}: largest difference of a loss {np.abs(np.subtract(one, two)).max():.1e} (bar 1e-5)")
    np.testing.assert_allclose(two, one, rtol=1e-5)
    alone, together = result(tmp_path / "one"), result(tmp_path / "two")
    assert alone.keys() == together.keys()
    assert alone
    for key, value in alone.items():
        torch.testing.assert_close(together[key], value, atol=1e-4, rtol=1e-3)
    assert len(list((tmp_path / "two" / "validation").glob("*.png"))) == 2


@pytest.mark.slow
@pytest.mark.parametrize("zero_stage", [2, 3])
@pytest.mark.parametrize("script", ["train_dreambooth_flux_advanced", "train_influxedit"])
def test_two_processes_of_deepspeed_compute_what_one_does(train, flags_of, tmp_path, monkeypatch, script, zero_stage):
    pytest.importorskip("deepspeed")
    module = importlib.import_module(script)
    monkeypatch.setattr(module, "step_generator", one_stream(module))
    flags = [*flags_of[script], "--max_train_steps", 4, "--checkpointing_steps", 2, "--lr_scheduler", "cosine"]
    flags += ["--lr_warmup_steps", 1, "--output_dir"]
    train(script, *flags, tmp_path / "one", "--gradient_accumulation_steps", 4)
    flags += [tmp_path / "two", "--gradient_accumulation_steps", 2]
    drawn = ("--validation_prompt", "a circle", "--num_validation_images", 1)
    run = launch(script, [*flags, *drawn], zero_stage=zero_stage)
    assert run.returncode == 0, run.stderr[-3000:]
    one, two = losses(tmp_path / "one"), losses(tmp_path / "two")
    print(f"ZeRO-{zero_stage}: largest difference of a loss {np.abs(np.subtract(one, two)).max():.1e} (bar 1e-5)")
    np.testing.assert_allclose(two, one, rtol=1e-5)
    alone, together = result(tmp_path / "one"), result(tmp_path / "two")
    assert alone.keys() == together.keys()
    assert alone
    for key, value in alone.items():
        torch.testing.assert_close(together[key], value, atol=1e-4, rtol=1e-3)
    assert len(list((tmp_path / "two" / "validation").glob("*.png"))) == 2

    shutil.rmtree(tmp_path / "two" / "checkpoint-4")
    (tmp_path / "two" / "pytorch_lora_weights.safetensors").unlink()
    again = launch(script, [*flags, *drawn, "--resume_from_checkpoint", "latest"], zero_stage=zero_stage)
    assert again.returncode == 0, again.stderr[-3000:]
    assert all(torch.equal(together[key], value) for key, value in result(tmp_path / "two").items())
    assert losses(tmp_path / "two") == two
    saved = [path.name for path in (tmp_path / "two" / "checkpoint-4").iterdir()]
    assert {"state-0.safetensors", "state-1.safetensors"} <= set(saved)
    assert not any(path.is_dir() for path in (tmp_path / "two" / "checkpoint-4").iterdir())  # no pickles of DeepSpeed


@pytest.mark.parametrize("script", [SCRIPTS[0], *(pytest.param(s, marks=pytest.mark.slow) for s in SCRIPTS[1:])])
def test_a_sharded_run_resumes_bit_for_bit_on_as_many_processes(flags_of, tmp_path, script):
    flags = [*flags_of[script], "--fsdp", "--checkpointing_steps", 2, "--lr_scheduler", "cosine"]
    flags += ["--lr_warmup_steps", 1, "--max_train_steps", 4, "--output_dir"]
    assert launch(script, [*flags, tmp_path / "whole"]).returncode == 0
    shutil.copytree(tmp_path / "whole", tmp_path / "parts", ignore=shutil.ignore_patterns("checkpoint-4"))
    again = [*flags, tmp_path / "parts", "--resume_from_checkpoint", "latest"]
    other = launch(script, again, processes=3)
    assert other.returncode != 0
    assert "the number of processes was 2 there and is 3 now" in other.stderr
    assert launch(script, again).returncode == 0
    whole, parts = result(tmp_path / "whole"), result(tmp_path / "parts")
    assert whole.keys() == parts.keys()
    assert all(torch.equal(whole[key], parts[key]) for key in whole)
    assert losses(tmp_path / "whole") == losses(tmp_path / "parts")


if __name__ == "__main__":
    trainer = importlib.import_module(sys.argv[1])
    trainer.step_generator = one_stream(trainer)
    if "ACCELERATE_USE_DEEPSPEED" in os.environ:
        trainer.Accelerator = accelerator_of_deepspeed
    trainer.main(trainer.parse_args(sys.argv[2:]))
