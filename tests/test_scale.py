"""Several processes compute what one does: DDP and FSDP2, in every trainer."""

import ctypes
import gc
import hashlib
import importlib
import json
import os
import random
import re
import shlex
import shutil
import signal
import subprocess
import sys
import threading
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

from common.checkpoints import (
    CHECKSUMS,
    checkpoint_conflicts,
    checkpoint_damage,
    checksums,
    find_checkpoints,
    match_processes,
    register_sharded_checkpointing,
    save_checkpoint,
)
from common.data import StepSampler, place_in_run
from common.flow_matching import step_generator
from common.models import full_tensor, shard

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.commands.launch import launch_command_parser
from accelerate.utils import DistributedType
from conftest import ROOT
from diffusers import SD3Transformer2DModel
from safetensors.torch import load_file, save_file

import train_twinflow
from examples.toy.world import caption, draw, random_scene


SCRIPTS = ["train_dreambooth_flux_advanced", "train_omini", "train_influxedit", "train_twinflow"]
ACCELERATE = ROOT / "examples" / "accelerate"


def losses(folder):
    return [json.loads(line)["loss"] for line in (folder / "metrics.jsonl").open()]


def result(folder):
    files = sorted([*folder.glob("*.safetensors"), *folder.glob("transformer/*.safetensors")])
    return {f"{file.stem}.{key}": value for file in files for key, value in load_file(file).items()}


def one_stream(module):
    """Lets rank r of two draw what micro-step r of one process draws, as both then see the same samples."""
    honest, initialized = module.step_generator, torch.distributed.is_initialized
    processes = lambda: torch.distributed.get_world_size() if initialized() else 1  # noqa: E731
    return lambda seed, step, micro=0, rank=0: honest(seed, step, micro * processes() + rank)


def draw_as_one(trainer):
    trainer.step_generator = one_stream(trainer)


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


def drawn(script, folder):
    """Flags for a picture before and after training."""
    flags = ["--validation_prompt", "a circle", "--num_validation_images", 1]
    small = ["--validation_width", 32, "--validation_height", 32]  # else 1024
    own = {"train_omini": ["--validation_image", folder / "data/images/0.png"], "train_influxedit": small}
    return [*flags, *own.get(script, [])]


WAYS = ["FSDP2", *(pytest.param(way, marks=pytest.mark.slow) for way in ("DDP", "FSDP2, all", "DoRA", "LoKr"))]
KINDS = {"DoRA": ["--use_dora"], "LoKr": ["--lora_type", "lokr"]}
EXTRA = {
    "DDP": [],
    "FSDP2": ["--fsdp"],
    "FSDP2, all": ["--fsdp", "--gradient_checkpointing", "--compile"],
    "DoRA": ["--fsdp"],
    "LoKr": ["--fsdp"],
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize(
    "script", [pytest.param(s, marks=[] if s == "train_omini" else pytest.mark.slow) for s in SCRIPTS]
)
def test_two_processes_compute_what_one_does(train, runs, flags_of, tmp_path, monkeypatch, script, way):
    module = importlib.import_module(script)
    monkeypatch.setattr(module, "step_generator", one_stream(module))
    average = ["--use_ema"] if way != "FSDP2" and script != "train_twinflow" else []
    flags = [*flags_of[script], *average, *KINDS.get(way, []), "--max_train_steps", 3, "--output_dir"]
    train(script, *flags, tmp_path / "one", "--gradient_accumulation_steps", 2)
    flags += [tmp_path / "two", *EXTRA[way], *drawn(script, tmp_path)]
    assert runs.run(script, flags, draw_as_one, processes=2) == 0, runs.output()[-3000:]
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
@pytest.mark.parametrize("script", SCRIPTS)
def test_a_sharded_run_resumes_bit_for_bit_on_as_many_processes(runs, flags_of, tmp_path, script):
    flags = [*flags_of[script], "--fsdp", "--checkpointing_steps", 2, "--lr_scheduler", "cosine"]
    flags += ["--use_ema"] if script != "train_twinflow" else []
    flags += ["--lr_warmup_steps", 1, "--max_train_steps", 4, "--output_dir"]
    assert runs.run(script, [*flags, tmp_path / "whole"], processes=2) == 0, runs.output()[-3000:]
    shutil.copytree(tmp_path / "whole", tmp_path / "parts", ignore=shutil.ignore_patterns("checkpoint-4"))
    again = [*flags, tmp_path / "parts", "--resume_from_checkpoint", "latest"]
    assert runs.run(script, again, processes=3) != 0
    assert "the number of processes was 2 there and is 3 now" in runs.output()
    assert runs.run(script, again, processes=2) == 0, runs.output()[-3000:]
    whole, parts = result(tmp_path / "whole"), result(tmp_path / "parts")
    assert whole.keys() == parts.keys()
    assert all(torch.equal(whole[key], parts[key]) for key in whole)
    assert losses(tmp_path / "whole") == losses(tmp_path / "parts")
    loadable = result(tmp_path / "whole" / "checkpoint-4")
    assert loadable.keys() == whole.keys()
    assert all(torch.equal(loadable[key], whole[key]) for key in whole)


def begun(number_of_batches, processes, accumulation, begun_with, steps):
    """What each step of a run on `processes` trains on, [(batch, seed of its draws)]."""
    found = [[] for _ in range(steps)]
    for rank in range(processes):
        sampler = StepSampler(
            [0] * number_of_batches, 1, seed=3, process_index=rank, num_processes=processes, stop=steps * accumulation
        )
        sampler.begun_with = begun_with
        for micro_step, batch in enumerate(sampler):
            step, accumulated = divmod(micro_step, accumulation)
            draws = step_generator(3, step, *place_in_run(accumulated, rank, processes, begun_with)).initial_seed()
            found[step].append((batch, draws))
    return [sorted(samples) for samples in found]


@pytest.mark.parametrize("number_of_batches", [8, 7, 1])
def test_another_number_of_processes_sees_and_draws_the_same_in_each_step(number_of_batches):
    """Also where an epoch ends within a step, and those it began with repeat batches to be all busy."""
    whole = begun(number_of_batches, 2, 2, 2, steps=6)
    assert whole == begun(number_of_batches, 1, 4, 2, steps=6)
    assert whole == begun(number_of_batches, 4, 1, 2, steps=6)


def test_processes_and_accumulation_change_together_or_are_refused(tmp_path):
    def problems(processes, accumulation):
        run = {"the number of processes": processes, "gradient_accumulation_steps": str(accumulation)}
        first = match_processes(tmp_path, run)
        return first, run, checkpoint_conflicts(tmp_path, run)

    saved = {"global_step": 5, "the number of processes": 2, "gradient_accumulation_steps": "2"}
    (tmp_path / "trainer_state.json").write_text(json.dumps(saved))
    (tmp_path / CHECKSUMS).write_text(json.dumps(checksums(tmp_path)))
    began = {name: value for name, value in saved.items() if name != "global_step"}
    for processes, accumulation in [(2, 2), (1, 4), (4, 1)]:
        assert problems(processes, accumulation) == (2, began, [])
    first, _, refusals = problems(8, 1)
    assert first == 8
    assert "number of processes was 2 there and is 8 now" in "".join(refusals)
    assert "4 batches" in "".join(refusals)
    first, _, refusals = problems(2, 1)
    assert "gradient_accumulation_steps was 2 there and is 1 now" in "".join(refusals)
    (tmp_path / "trainer_state.json").write_text("{")
    first, _, refusals = problems(1, 4)
    assert first == 1
    assert "trainer_state.json" in "".join(refusals)


@pytest.mark.slow
@pytest.mark.parametrize("way", ["DDP", "FSDP2"])
@pytest.mark.parametrize("script", [*SCRIPTS, "train_twinflow, all weights"])
def test_a_run_goes_on_with_another_number_of_processes(runs, flags_of, tmp_path, script, way):
    script, all_weights, _ = script.partition(",")
    flags = [*flags_of[script], *EXTRA[way], *(["--training", "full", "--recipe", "twinflow"] if all_weights else [])]
    flags += ["--checkpointing_steps", 1, "--lr_scheduler", "constant_with_warmup", "--lr_warmup_steps", 2]
    flags += ["--max_train_steps", 4]
    flags += ["--use_ema"] if script != "train_twinflow" else []
    flags += ["--validation_split", 0.2, "--validation_loss_steps", 1, "--load_best_model_at_end"]

    def run(folder, processes, accumulation, *more):
        words = [*flags, "--output_dir", folder, "--gradient_accumulation_steps", accumulation, *more]
        return runs.run(script, words, processes=processes)

    assert run(tmp_path / "whole", 2, 2) == 0, runs.output()[-3000:]
    folders = ("", "checkpoint-4")  # the weights of the best step, and those of the last
    whole = [result(tmp_path / "whole" / folder) for folder in folders]
    largest = 0.0
    for processes, accumulation in [(1, 4), (4, 1)]:
        folder = tmp_path / str(processes)
        shutil.copytree(tmp_path / "whole", folder, ignore=shutil.ignore_patterns("checkpoint-[34]"))
        resume = ["--resume_from_checkpoint", "latest"]
        assert run(folder, processes, 2, *resume) != 0
        assert "the number of processes was 2 there" in runs.output()
        assert run(folder, processes, accumulation, *resume, "--max_train_steps", 3) == 0, runs.output()[-3000:]
        assert f"The run began with 2 processes and goes on with {processes}" in runs.output()
        assert (folder / "checkpoint-3").is_dir()
        assert run(folder, 2, 2, *resume) == 0, runs.output()[-3000:]
        np.testing.assert_allclose(losses(folder), losses(tmp_path / "whole"), rtol=1e-5)
        for expected, name in zip(whole, folders, strict=True):
            found = result(folder / name)
            assert found.keys() == expected.keys()
            for key, value in expected.items():
                torch.testing.assert_close(found[key], value, atol=1e-4, rtol=1e-3)
                largest = max(largest, (found[key] - value).abs().max().item())
    print(f"{script}, {way}: largest difference of a weight to the run on two processes {largest:.1e}")


def die_while_hashing(trainer, rank):
    checkpoints = importlib.import_module("common.checkpoints")
    honest = checkpoints.checksums

    def checksums(*arguments):
        if os.environ["RANK"] == str(rank):
            os.kill(os.getpid(), signal.SIGKILL)
        return honest(*arguments)

    checkpoints.checksums = checksums


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 1])
def test_no_checkpoint_is_left_by_a_killed_process_and_all_refuse_a_damaged_one(runs, flags_of, tmp_path, rank):
    script = "train_omini"
    flags = [*flags_of[script], "--fsdp", "--checkpointing_steps", 1, "--output_dir", tmp_path / "run"]
    assert runs.run(script, flags, die_while_hashing, rank, processes=2) != 0
    assert find_checkpoints(tmp_path / "run") == []
    assert runs.run(script, flags, processes=2) == 0, runs.output()[-3000:]
    damaged = sorted((tmp_path / "run" / "checkpoint-2" / "sharded").iterdir())[rank]
    content = bytearray(damaged.read_bytes())
    content[-1] ^= 1
    damaged.write_bytes(content)
    again = [*flags, "--resume_from_checkpoint", "latest", "--max_train_steps", 3]
    assert runs.run(script, again, processes=2) != 0
    assert runs.output().count(f"{damaged.name} missing or damaged") == 1
    assert "continue from checkpoint-1" in runs.output()
    assert runs.seconds < 100


@pytest.mark.slow
@pytest.mark.parametrize("script", SCRIPTS)
def test_a_sharded_run_keeps_its_best_step_also_when_resumed(runs, flags_of, tmp_path, script):
    flags = [*flags_of[script], "--fsdp", "--checkpointing_steps", 1, "--learning_rate", 0.05, "--max_train_steps", 4]
    flags += ["--validation_split", 0.3, "--validation_loss_steps", 1, "--load_best_model_at_end"]
    flags += ["--use_ema", "--ema_decay", 0.3] if script != "train_twinflow" else []
    assert runs.run(script, [*flags, "--output_dir", tmp_path / "whole"], processes=2) == 0, runs.output()[-3000:]
    rows = [json.loads(line) for line in (tmp_path / "whole" / "metrics.jsonl").open()]
    held_out = {row["step"]: row["validation_loss"] for row in rows}
    best = min(held_out, key=lambda step: held_out[step])
    whole = result(tmp_path / "whole")
    kept = result(tmp_path / "whole" / f"checkpoint-{best}")
    assert whole.keys() <= kept.keys()
    assert all(torch.equal(kept[key], whole[key]) for key in whole)
    words = ["--resume_from_checkpoint", tmp_path / "whole" / "checkpoint-3", "--output_dir", tmp_path / "parts"]
    assert runs.run(script, [*flags, *words], processes=2) == 0, runs.output()[-3000:]
    parts = result(tmp_path / "parts")
    assert whole.keys() == parts.keys()
    assert all(torch.equal(whole[key], parts[key]) for key in whole)


def reshard(trainer, folder, processes, steps):
    """Trains a small sharded model for `steps`, or loads the checkpoint in `folder`, and then takes one more step.

    The main process of `processes` writes the weights to a file in `folder`.
    """
    torch.manual_seed(0)
    folder = Path(folder)
    model = torch.nn.Sequential(torch.nn.Linear(5, 7), torch.nn.Linear(7, 3))
    model._repeated_blocks = ["Linear"]
    model[0].bias.requires_grad_(False)
    unused = "1.bias"  # it never has a gradient, nor the optimizer a state for it
    accelerator = Accelerator(cpu=True)
    shard(model, accelerator.device, torch.float32)
    trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    teacher = {name: parameter.detach() * 2 for name, parameter in trained.items()}
    optimizer = torch.optim.AdamW(trained.values(), lr=0.1)
    register_sharded_checkpointing(accelerator, model, optimizer, teacher)
    if steps is None:
        for tensor in (*trained.values(), *teacher.values()):
            tensor.detach().zero_()
        accelerator.load_state(folder / "checkpoint-3")

    def step():
        for name, parameter in trained.items():
            if name != unused:
                parameter.grad = parameter.detach().clone()
        optimizer.step()

    for _ in range(steps or 0):
        step()
    if steps is not None:
        save_checkpoint(accelerator, folder, 3, {})
    step()
    assert trained[unused] not in optimizer.state
    tensors = {name: full_tensor(parameter) for name, parameter in trained.items()}
    tensors |= {f"teacher.{name}": full_tensor(tensor) for name, tensor in teacher.items()}
    if accelerator.is_main_process:
        save_file(tensors, folder / f"{processes}-{steps}.safetensors")
    accelerator.wait_for_everyone()
    accelerator.end_training()  # gloo can abort a process that ends with its group


@pytest.mark.parametrize("steps", [3, pytest.param(0, marks=pytest.mark.slow)])  # 0: the optimizer has no state yet
def test_a_sharded_checkpoint_loads_bit_for_bit_on_any_number_of_processes(runs, tmp_path, steps):
    assert runs.run(None, [], reshard, str(tmp_path), 2, steps, processes=2) == 0, runs.output()[-3000:]
    files = [path.relative_to(tmp_path / "checkpoint-3") for path in (tmp_path / "checkpoint-3").rglob("*")]
    assert sum(path.suffix == ".safetensors" for path in files) == 2
    assert {path.suffix for path in files if path.parent.name == "sharded"} == {".safetensors"}
    saved = load_file(tmp_path / f"2-{steps}.safetensors")
    assert len(saved) == 6
    for processes in (1, 2, 3):
        loading = runs.run(None, [], reshard, str(tmp_path), processes, None, processes=processes)
        assert loading == 0, runs.output()[-3000:]
        loaded = load_file(tmp_path / f"{processes}-None.safetensors")
        assert all(torch.equal(loaded[name], value) for name, value in saved.items())


def say_timeout(trainer):
    """Ends a run where its processes have met, and says how long they will wait for one another."""

    def say(*args, **kwargs):
        group = torch.distributed.distributed_c10d._get_default_group()
        print(f"waits for {group._get_backend(torch.device('cpu')).options._timeout}")
        torch.distributed.destroy_process_group()
        raise SystemExit(0)

    trainer.set_seed = say


@pytest.mark.parametrize("script", SCRIPTS)
def test_processes_wait_for_one_that_caches_or_writes_for_hours(runs, short_runs, tmp_path, script):
    flags = [*short_runs[script], "--output_dir", tmp_path, *(["--seed", 0] if "influxedit" not in script else [])]
    assert runs.run(script, flags, say_timeout, processes=1) == 0, runs.output()[-3000:]
    hours = int(re.search(r"waits for (\d+):", runs.output())[1])
    assert hours >= 6


def count_reads(trainer, folder):
    """Saves a sharded model and resumes it; says what this process holds, hashes and reads."""
    folder = Path(folder)
    accelerator = Accelerator(cpu=True)
    rank = accelerator.process_index
    with torch.device("meta"):
        model = torch.nn.Sequential(*(torch.nn.Linear(1024, 1024, bias=False) for _ in range(8)))
    model._repeated_blocks = ["Linear"]
    model.to_empty(device="cpu")
    torch.nn.init.normal_(model[0].weight)
    shard(model, accelerator.device, torch.float32)
    optimizer = torch.optim.AdamW(model.parameters())
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    optimizer.zero_grad()
    register_sharded_checkpointing(accelerator, model, optimizer)
    honest = hashlib.file_digest
    read = []

    def file_digest(file, kind):
        read.append(Path(file.name))
        return honest(file, kind)

    hashlib.file_digest = file_digest
    with anonymous_memory(folder / f"memory-{rank}.txt"):
        checkpoint = save_checkpoint(accelerator, folder, 3, {})
    written = [path.name for path in read]
    read.clear()
    whole = checkpoint_damage(checkpoint, accelerator)
    verified = [path.name for path in read]
    accelerator.wait_for_everyone()
    shards = sorted((checkpoint / "sharded").iterdir())
    if accelerator.is_main_process:
        shards[-1].write_bytes(shards[-1].read_bytes()[:-4] + b"1234")
    accelerator.wait_for_everyone()
    state = {
        "written": written,
        "verified": verified,
        "whole": whole,
        "damage": checkpoint_damage(checkpoint, accelerator),
    }
    (folder / f"state-{rank}.json").write_text(json.dumps(state))
    accelerator.wait_for_everyone()
    accelerator.end_training()


def small_files(trainer, *arguments):
    checkpoints = importlib.import_module("common.checkpoints")
    checkpoints.FILE_BYTES = 2**22
    count_reads(trainer, *arguments)


def test_each_process_writes_hashes_and_verifies_its_share_of_a_checkpoint(runs, tmp_path):
    """And holds no second copy of it; all end with the same message where one has found damage."""
    peaks = {}
    for name, function in (("one file", count_reads), ("small files", small_files)):
        folder = tmp_path / name
        folder.mkdir()
        assert runs.run(None, [], function, str(folder), processes=2) == 0, runs.output()[-3000:]
        peaks[name] = max(float((folder / f"memory-{rank}.txt").read_text()) for rank in range(2))
        states = [json.loads((folder / f"state-{rank}.json").read_text()) for rank in range(2)]
        files = {path.name for path in (folder / "checkpoint-3").rglob("*") if path.is_file()} - {CHECKSUMS}
        shards = {path.name for path in (folder / "checkpoint-3" / "sharded").iterdir()}
        for step in ("written", "verified"):
            shares = [set(state[step]) for state in states]
            assert set.union(*shares) == files
            assert set.intersection(*shares) <= {"trainer_state.json"}
            assert all(len(share & shards) == len(shards) / 2 for share in shares)
        assert states[0]["whole"] == states[1]["whole"] == []
        assert states[0]["damage"] == states[1]["damage"]
        assert sorted(shards)[-1] in states[0]["damage"][0]
    part = 3 * 32 / 2  # MiB of weights and two moments, on each of two processes
    print(f"\n{part:.0f} MiB on each process; most of its memory while it saves: {peaks} MiB")
    assert peaks["one file"] > 0.9 * part
    assert peaks["small files"] < 0.5 * part


def test_all_weights_are_loaded_in_the_precision_that_their_files_have(tmp_path):
    assert train_twinflow.stored_dtype(tmp_path) == torch.bfloat16
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        save_file({"a": torch.ones(2, dtype=dtype), "b": torch.ones(2, dtype=dtype)}, tmp_path / "1.safetensors")
        assert train_twinflow.stored_dtype(tmp_path) == dtype
        save_file({"c": torch.ones(2, dtype=torch.float16)}, tmp_path / "2.safetensors")
        assert train_twinflow.stored_dtype(tmp_path) == (dtype if dtype == torch.float16 else torch.float32)
        (tmp_path / "2.safetensors").unlink()


@contextmanager
def anonymous_memory(file):
    """Writes the most memory of its own, without mapped files, that this process takes within it, in MiB."""

    def now():
        status = Path("/proc/self/status").read_text()
        return int(re.search(r"RssAnon:\s+(\d+) kB", status)[1]) / 1024

    def watch():
        while not done.wait(0.001):
            taken.append(now())

    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    before = now()
    taken, done = [before], threading.Event()
    thread = threading.Thread(target=watch)
    thread.start()
    yield
    done.set()
    thread.join()
    file.write_text(f"{max(taken) - before:.1f}")


def load_and_shard(trainer, folder, way):
    """Loads the transformer in `folder` for full training and splits it over two processes."""
    accelerator = Accelerator(cpu=True)
    folder = Path(folder)
    args = SimpleNamespace(
        pretrained_model_name_or_path=str(folder), revision=None, variant=None, cache_dir=None, openuni_checkpoint=None
    )
    backbone = train_twinflow.StableDiffusion3(args)
    with anonymous_memory(folder / f"{accelerator.process_index}.txt"):
        transformer = backbone.load_transformer(torch.float32 if way == "whole" else None)
        shard(transformer, accelerator.device, torch.bfloat16, kept_in=torch.float32)
        accelerator.wait_for_everyone()
    tensors = {name: full_tensor(parameter) for name, parameter in transformer.named_parameters()}
    if accelerator.is_main_process:
        save_file(tensors, folder / f"{way}.safetensors")
    accelerator.wait_for_everyone()
    accelerator.end_training()


@pytest.mark.slow
def test_no_process_holds_a_whole_float32_model_that_is_split(runs, tmp_path):
    torch.manual_seed(0)
    with torch.device("meta"):
        model = SD3Transformer2DModel(
            num_layers=8, num_attention_heads=6, attention_head_dim=64, caption_projection_dim=384
        )
    model = model.to_empty(device="cpu").to(torch.bfloat16)
    for tensor in [*model.parameters(), *model.buffers()]:
        tensor.data.normal_(std=0.02)
    model.save_pretrained(tmp_path / "transformer")
    size = sum(parameter.numel() for parameter in model.parameters()) * 4 / 2**20
    block = sum(parameter.numel() for parameter in model.transformer_blocks[0].parameters()) * 4 / 2**20
    peaks = {}
    for way in ("whole", "by block"):
        assert runs.run(None, [], load_and_shard, str(tmp_path), way, processes=2) == 0, runs.output()[-3000:]
        peaks[way] = max(float((tmp_path / f"{rank}.txt").read_text()) for rank in range(2))
    whole, by_block = (load_file(tmp_path / f"{way}.safetensors") for way in peaks)
    assert whole.keys() == by_block.keys() and all(torch.equal(by_block[name], whole[name]) for name in whole)
    assert {value.dtype for value in by_block.values()} == {torch.float32}
    print(f"\nfloat32 {size:.0f} MiB, a block {block:.0f}; most of a process: {peaks} MiB")
    assert peaks["whole"] > size
    assert peaks["by block"] < size / 2 + 4 * block


@pytest.mark.slow
def test_torchrun_of_the_readme_starts_as_many_processes_and_goes_on_with_fewer(tmp_path):
    page = (ACCELERATE / "README.md").read_text()
    blocks = re.findall(r"```bash\n(.*?)```", page, re.DOTALL)
    blocks = [block for block in blocks if "torchrun" in block and "--nnodes" not in block]  # those of one machine
    for name in (*(f"{script}.py" for script in SCRIPTS), "common", "examples"):
        (tmp_path / name).symlink_to(ROOT / name)
    environment = os.environ | {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}", "OMP_NUM_THREADS": "1"}
    output = ""
    for block in blocks:
        done = subprocess.run(
            ["/bin/bash", "-euc", block], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=600
        )
        assert done.returncode == 0, done.stderr[-3000:]
        output += done.stdout + done.stderr
    assert "2 cpu" in output and "1 cpu" in output
    assert len(losses(tmp_path / "two")) == 9
    assert "Resuming from two/checkpoint-6" in output
    assert len(list((tmp_path / "two" / "checkpoint-6" / "sharded").iterdir())) == 2
    assert len(list((tmp_path / "two" / "checkpoint-9" / "sharded").iterdir())) == 1


@pytest.mark.parametrize("name", ["8_gpus", "8_gpus_fsdp2"])
def test_accelerate_reads_the_config_files(name):
    config = load_config_from_file(str(ACCELERATE / f"{name}.yaml"))
    assert (config.distributed_type, config.num_processes, config.num_machines) == ("MULTI_GPU", 8, 1)
    assert config.mixed_precision == "bf16"


@pytest.mark.parametrize("script", SCRIPTS)
@pytest.mark.parametrize("kind", [DistributedType.DEEPSPEED, DistributedType.FSDP])
def test_what_splits_weights_otherwise_is_refused(short_runs, tmp_path, script, kind):
    module = importlib.import_module(script)
    args = module.parse_args([str(flag) for flag in [*short_runs[script], "--output_dir", tmp_path / "out"]])
    accelerator = SimpleNamespace(distributed_type=kind, mixed_precision="no", num_processes=2, scaler=None)
    said = module.check_run(accelerator, args, max_train_steps=2, checkpoint=None, run={})
    assert len(said) == 1
    assert kind.value in said[0] and "--fsdp" in said[0]


def test_the_commands_of_the_readme_and_config_files_parse(short_runs, tmp_path):
    pages = [path.read_text().replace("\\\n", " ") for path in sorted(ACCELERATE.iterdir())]
    commands = [line for page in pages for line in re.findall(r"accelerate (launch [^`\n]*?) \.\.\.", page)]
    named = set()
    for command in commands:
        launched = launch_command_parser().parse_args(shlex.split(command)[1:])
        if launched.config_file:
            config = load_config_from_file(str(ROOT / launched.config_file))
            named.add(Path(launched.config_file).name)
            processes = launched.num_processes or config.num_processes
            assert processes == 8 * (launched.num_machines or 1)
            assert ("--fsdp" in launched.training_script_args) == ("fsdp2" in launched.config_file)
        script = launched.training_script.removesuffix(".py")
        flags = [*short_runs[script], "--output_dir", tmp_path, *launched.training_script_args]
        importlib.import_module(script).parse_args([str(flag) for flag in flags])
    assert named == {path.name for path in ACCELERATE.glob("*.yaml")}
    ranks = {c for c in commands if "--num_machines 2" in c}
    assert {re.search(r"--machine_rank (\d)", command)[1] for command in ranks} == {"0", "1"}
