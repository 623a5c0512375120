"""What runs survive: kills at any moment, full disks, lost pictures, losses that are no numbers, signals.

Runs are processes of their own: processes.py.
"""

import atexit
import builtins
import contextlib
import errno
import functools
import hashlib
import importlib
import io
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tarfile
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import psutil
import pyarrow.parquet
import pytest
import safetensors.torch
import torch
from conftest import ROOT
from PIL import Image
from processes import PROGRAM, SCRIPTS, group_of, request_of


ONE_QUICK = [SCRIPTS[0], *(pytest.param(script, marks=pytest.mark.slow) for script in SCRIPTS[1:])]
FILE_EVENTS = ("open", "os.mkdir", "os.rename", "os.remove", "os.rmdir", "shutil.rmtree")


# ---------------------------------------------------------------------------------------------------------------------
# Faults: called in a run's process
# ---------------------------------------------------------------------------------------------------------------------


def slow_writer(trainer):
    """Each flush to the disk takes 50 ms more: a checkpoint is being written for most of the training."""
    from common import checkpoints

    honest = checkpoints.flush_to_disk
    checkpoints.flush_to_disk = lambda path: (time.sleep(0.05), honest(path))


def at_file_event(trainer, folder, number, count_file=None):
    """SIGKILL at the `number`th time that Python opens, makes, renames or deletes a file in `folder`; 0: never."""
    main, count = os.getpid(), 0

    def hook(event, arguments):
        nonlocal count
        if event not in FILE_EVENTS or os.getpid() != main:
            return
        path = arguments[0]
        inside = isinstance(path, str) and (path.startswith(folder) or event in ("os.remove", "os.rmdir"))
        if isinstance(path, Path):
            inside = str(path).startswith(folder)
        count += inside
        if inside and count == number:
            os.kill(main, signal.SIGKILL)

    sys.addaudithook(hook)
    if count_file:
        atexit.register(lambda: Path(count_file).write_text(str(count)))


def failing_write(trainer, folder, number, code, count_file=None):
    """The `number`th time that something in `folder` is written, made, flushed, renamed or deleted the system's error
    `code` comes instead; 0: never. A file that is opened to be written with a full disk fails when it is written."""
    main, count = os.getpid(), 0

    def is_due(path, *args, **kwargs):
        nonlocal count
        inside = kwargs.get("dir_fd") is not None  # of shutil.rmtree: names within a folder
        if isinstance(path, int):
            path = Path(f"/proc/self/fd/{path}").readlink()
        inside = inside or str(path).startswith(folder)
        count += inside and os.getpid() == main
        return inside and os.getpid() == main and count == number

    def wrap(module, name, writes=lambda *args, **kwargs: True):
        honest = getattr(module, name)

        def fails_once(path, *args, **kwargs):
            if not writes(path, *args, **kwargs) or not is_due(path, *args, **kwargs):
                return honest(path, *args, **kwargs)
            appends = name == "open" and "a" in kwargs.get("mode", "".join(map(str, args[:1])))
            if name != "open" or module is os or code != errno.ENOSPC or appends:
                raise OSError(code, os.strerror(code), str(path))
            file = honest(path, *args, **kwargs)
            os.dup2(os.open("/dev/full", os.O_WRONLY), file.fileno())
            return file

        setattr(module, name, fails_once)

    def opens_to_write(path, mode="r", *args, **kwargs):
        return not isinstance(path, int) and bool(set("wax+").intersection(mode))

    for name in ("mkdir", "rename", "replace", "unlink", "rmdir", "chmod", "fsync"):
        wrap(os, name)
    wrap(os, "open", lambda path, flags, *args, **kwargs: flags & (os.O_WRONLY | os.O_RDWR))
    for module in (builtins, io):
        wrap(module, "open", opens_to_write)
    # these two do not write by Python
    failed = safetensors.SafetensorError(f"Error while serializing: I/O error: {os.strerror(code)} (os error {code})")
    wrap_second(safetensors.torch, "serialize_file", is_due, failed)
    wrap_second(torch, "save", is_due, RuntimeError("PytorchStreamWriter failed writing file data.pkl"))
    if count_file:
        atexit.register(lambda: Path(count_file).write_text(str(count)))


def wrap_second(module, name, is_due, error):
    """The function of a module raises the error when it is due by its second argument, a path."""
    honest = getattr(module, name)

    def fails_once(data, path, *args, **kwargs):
        if is_due(path):
            raise error
        return honest(data, path, *args, **kwargs)

    setattr(module, name, fails_once)


def vanishing(trainer, name, nth, path):
    """Before the trainer's function `name` is called the `nth` time the file `path` gets another name."""
    honest, calls = getattr(trainer, name), 0

    def rename(*args, **kwargs):
        nonlocal calls
        calls += 1
        if calls == nth:
            Path(path).rename(f"{path}.away")
        return honest(*args, **kwargs)

    setattr(trainer, name, rename)


def full_disk(trainer, name, nth, filler, room):
    """Before the trainer's function `name` is called the `nth` time, a file fills the disk but for `room` bytes."""
    honest, calls = getattr(trainer, name), 0

    def fill(*args, **kwargs):
        nonlocal calls
        calls += 1
        if calls == nth and os.environ.get("RANK", "0") == "0":
            with Path(filler).open("wb", buffering=0) as file, contextlib.suppress(OSError):
                while file.write(bytes(4096)):
                    pass
            with Path(filler).open("r+b") as file:
                file.truncate(max(0, Path(filler).stat().st_size - room))
        return honest(*args, **kwargs)

    setattr(trainer, name, fill)


def pause(trainer, name, nth, marker, seconds):
    """The trainer's function `name`, called the `nth` time, makes the file `marker` and takes `seconds` longer."""
    honest, calls = getattr(trainer, name), 0

    def wait(*args, **kwargs):
        nonlocal calls
        calls += 1
        if calls == nth:
            Path(marker).touch()
            time.sleep(seconds)
        return honest(*args, **kwargs)

    setattr(trainer, name, wait)


def slow_images(trainer, marker, seconds, nth):
    """Each image of a validation takes some `seconds` longer; the file `marker` is made with the `nth`."""
    from common import validation

    honest, calls = validation.torch.Generator, 0

    class Generator(honest):  # one for each image
        def __init__(self, *args):
            nonlocal calls
            super().__init__()
            calls += 1
            if calls >= nth:
                Path(marker).touch()
                time.sleep(seconds)

    validation.torch = SimpleNamespace(**vars(torch) | {"Generator": Generator})


def slow_steps(trainer, seconds, marker):
    """Each step takes some `seconds`; the second makes the file `marker`."""
    honest, calls = trainer.compute_loss, 0

    def compute_loss(*args, **kwargs):
        nonlocal calls
        calls += 1
        if calls == 2:
            Path(marker).touch()
        if calls > 1:
            time.sleep(seconds)
        return honest(*args, **kwargs)

    trainer.compute_loss = compute_loss


def not_finite(trainer, bad):
    """The losses of the steps in `bad` are no numbers."""
    honest, calls = trainer.compute_loss, 0

    def compute_loss(*args, **kwargs):
        nonlocal calls
        calls += 1
        found, factor = honest(*args, **kwargs), float("nan") if calls in bad else 1.0
        return (found[0] * factor, found[1]) if isinstance(found, tuple) else found * factor

    trainer.compute_loss = compute_loss


def be_a_notebook(trainer, script, flags, marker, log, seconds=None):
    """Calls main() in a process that lives on, which has a handler of its own. Its third step lasts, or all."""
    trainer = importlib.import_module(script)
    kernel = signal.getsignal(signal.SIGINT)
    if seconds is None:
        pause(trainer, "compute_loss", 3, marker, 60)
    else:
        slow_steps(trainer, seconds, marker)
    try:
        trainer.main(trainer.parse_args(flags))
    except SystemExit as end:
        same = "the kernel's" if signal.getsignal(signal.SIGINT) is kernel else "another"
        Path(log).write_text(f"main ended with {end.code}, the handler is {same}")


def interrupted(trainer):
    """Ctrl-C before main() begins: while libraries are imported and flags read."""
    raise KeyboardInterrupt


def removed(trainer, name, nth, path):
    """Before the trainer's function `name` is called the `nth` time, somebody deletes `path`."""
    honest, calls = getattr(trainer, name), 0

    def remove(*args, **kwargs):
        nonlocal calls
        calls += 1
        if calls == nth:
            shutil.rmtree(path) if Path(path).is_dir() else Path(path).unlink()
        return honest(*args, **kwargs)

    setattr(trainer, name, remove)


def without_temporary_folder(trainer, path):
    """The system's temporary folder takes no file."""
    tempfile.tempdir = os.environ["TMPDIR"] = path


def watch_memory(trainer, path):
    """Each step's memory, less the cache of files, goes to `path`. It is the data's that counts: pixels stand for
    latents, and a prompt is encoded once."""

    def encode(channels):
        def encode_pixels(vae, pixels):
            means = torch.nn.functional.avg_pool2d(pixels, 8)
            return means.repeat(1, 11, 1, 1)[:, :channels]

        return encode_pixels

    if hasattr(trainer, "encode_moments"):
        trainer.encode_moments = encode(32)
    else:
        trainer.encode_images = encode(16)
    if trainer.__name__ == "train_omini":
        embed = trainer.PromptEncoder.encode_with
        once = functools.cache(lambda text, kind, prompt: embed(text, kind, [prompt]))
        trainer.PromptEncoder.encode_with = lambda text, kind, prompts: once(text, kind, *prompts)
    honest = trainer.log_step

    def log_step(*args):
        status = Path("/proc/self/status").read_text()
        with Path(path).open("a") as file:
            print(re.search(r"RssAnon:\s+(\d+)", status)[1], file=file)
        honest(*args)

    trainer.log_step = log_step


# ---------------------------------------------------------------------------------------------------------------------
# What is left
# ---------------------------------------------------------------------------------------------------------------------


def losses(folder):
    return [json.loads(line)["loss"] for line in (folder / "metrics.jsonl").open()]


def checkpoints(folder):
    """{step: folder} of what a run would resume from."""
    found = {int(path.name[11:]): path for path in folder.glob("checkpoint-*")}
    return dict(sorted(found.items()))


def content(path):
    """The bytes of a file, but for the order in which safetensors writes its metadata, and the run's name in it."""
    data = path.read_bytes()
    if path.suffix != ".safetensors":
        return data
    after = 8 + int.from_bytes(data[:8], "little")
    header = json.loads(data[8:after])
    for name in ("modelspec.title", "ss_output_name"):
        header.get("__metadata__", {}).pop(name, None)
    return json.dumps(header, sort_keys=True).encode() + data[after:]


def contents(folder):
    """{name: content} of a checkpoint, less the checksums of its files, which resuming checks."""
    files = [path for path in folder.rglob("*") if path.is_file()]
    return {path.relative_to(folder).as_posix(): content(path) for path in files if path.name != "checksums.json"}


def results(folder):
    return {path.name: content(path) for path in folder.glob("*.safetensors")}


# ---------------------------------------------------------------------------------------------------------------------
# Kills
# ---------------------------------------------------------------------------------------------------------------------


KILLS = [pytest.param(SCRIPTS[0], 3, id="3 kills")]
KILLS += [pytest.param(script, 20, id=f"{script}, 20 kills", marks=pytest.mark.slow) for script in SCRIPTS]


@pytest.mark.parametrize(("script", "kills"), KILLS)
def test_kills_at_random_moments_lose_nothing(runs, short_runs, tmp_path, count, script, kills):
    flags = [*short_runs[script], "--max_train_steps", 12, "--checkpointing_steps", 2, "--lr_scheduler", "linear"]
    flags += ["--lr_warmup_steps", 2]
    whole, count_file = tmp_path / "whole", tmp_path / "count"
    every = [*flags, "--output_dir", whole]
    assert runs.run(script, every, at_file_event, str(whole), 0, str(count_file)) == 0, runs.output()
    seconds, events = runs.seconds, int(count_file.read_text())
    rng, folder, moments, done, finished = random.Random(script), tmp_path / "killed", [], 0, 0
    while done < kills:
        again = [*flags, "--output_dir", folder, "--resume_from_checkpoint", "latest", "--checkpoints_total_limit", 2]
        before = list(checkpoints(folder))
        if done % 2:
            number = rng.randint(1, events)
            runs.start(script, again, at_file_event, str(folder), number)
        else:
            runs.start(script, again, slow_writer)
            if not runs.ends_within(rng.uniform(0.3, 1.8) * seconds):
                os.kill(runs.pid, signal.SIGKILL)
        code = runs.end()
        assert code in (0, -signal.SIGKILL), runs.output()[-3000:]
        after = checkpoints(folder)
        for step, checkpoint in after.items():
            assert contents(checkpoint) == contents(whole / f"checkpoint-{step}")
        assert len(after) >= min(2, len(before))
        assert len(list(folder.glob(".checkpoint-*"))) <= 1
        assert max(after, default=0) >= max(before, default=0)
        if code:
            partial = sorted(path.name for path in folder.glob(".*.partial"))
            moments.append(f"{'event' if done % 2 else 'time'} at {list(after)} {''.join(partial)}")
            done += 1
        else:
            assert results(folder) == results(whole)
            assert losses(folder) == losses(whole)
            finished += 1
            seconds = min(seconds, runs.seconds)  # the machine may have been busier at first
            shutil.rmtree(folder)
    assert runs.run(script, again) == 0, runs.output()
    assert results(folder) == results(whole) != {}
    assert losses(folder) == losses(whole)
    assert len(losses(whole)) == 12
    count("kills", kills)
    print(f"{kills} kills, {finished + 1} runs finished, {seconds:.1f} s and {events} file events for one: {moments}")


# ---------------------------------------------------------------------------------------------------------------------
# Full disks
# ---------------------------------------------------------------------------------------------------------------------


@pytest.fixture
def small_disk(tmp_path):
    """A disk of 16 MiB in memory."""
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=16m", "tmpfs", disk], capture_output=True).returncode:
        pytest.skip("no right to mount a small disk")
    yield disk
    subprocess.run(["umount", disk], check=True)


def only_error(runs, tracked=False):
    """The one message of a run that failed; TensorBoard's thread shows the traceback of its own error besides."""
    output = runs.output()
    for noise in () if tracked else ("Traceback", "Exception ignored", "terminate called"):
        assert noise not in output, output[-5000:]
    (error,) = [line for line in output.replace("\r", "\n").splitlines() if ": error: " in line]
    return error


# function, its call, bytes that are left, what the message names
FULL = [
    *(("save_checkpoint", 3, room, "checkpoint-6") for room in (0, 8192, 16384, 32768, 49152, 65536, 81920)),
    ("start_logging", 1, 0, "args.json"),
    ("start_logging", 1, 8192, "logs"),  # args.json takes two blocks
    ("Metrics", 1, 0, "step-000000.png"),  # an empty metrics.jsonl takes no room
    ("log_step", 1, 0, "metrics.jsonl"),  # later lines find room in the block of the first
    ("save_images", 2, 0, "step-000004.png"),
    ("save_lora", 1, 0, ".safetensors"),
    ("save_lora", 1, 8192, ".safetensors"),
    ("plot_metrics", 1, 8192, "loss.png"),
    ("write_model_card", 1, 0, "README.md"),
]
VALIDATION = {
    SCRIPTS[0]: ["--validation_prompt", "a circle", "--validation_steps", 4],
    SCRIPTS[1]: ["--validation_prompt", "a circle", "--validation_steps", 4, "--validation_image"],
    SCRIPTS[2]: ["--validation_prompt", "a circle", "--validation_steps", 4, "--validation_image"],
    SCRIPTS[3]: ["--validation_prompt", "a circle", "--validation_steps", 4],
}


@pytest.fixture
def flags_of(short_runs, pictures):
    """{trainer: flags} of runs that validate at step 4."""
    flags = {}
    for script, own in VALIDATION.items():
        image = [pictures / "0.png"] if own[-1] == "--validation_image" else []
        size = ["--validation_height", 32, "--validation_width", 32] if script == "train_influxedit" else []
        flags[script] = [*short_runs[script], *own, *image, *size, "--num_validation_images", 1]
    return flags


SOME = [pytest.param(SCRIPTS[0], [FULL[3]], id="one case")]
SOME += [pytest.param(script, FULL, id=script, marks=pytest.mark.slow) for script in SCRIPTS]


@pytest.mark.parametrize(("script", "cases"), SOME)
def test_a_full_disk_is_one_message_and_costs_nothing(runs, flags_of, small_disk, tmp_path, script, cases):
    flags = [*flags_of[script], "--max_train_steps", 7, "--checkpointing_steps", 2, "--output_dir"]
    assert runs.run(script, [*flags, tmp_path / "whole"]) == 0, runs.output()
    folder, filler = small_disk / "run", small_disk / "filler"
    for name, nth, room, named in cases:
        where = f"{name}, {room} bytes left"
        tracked = ["--report_to", "tensorboard"] if named == "logs" else []
        code = runs.run(script, [*flags, folder, *tracked], full_disk, name, nth, str(filler), room)
        if code == 0 and room:  # enough room
            print(f"{where}: enough")
            shutil.rmtree(folder)
            filler.unlink()
            continue
        assert code == 1, (where, runs.output()[-3000:])
        error = only_error(runs, bool(tracked))
        print(f"{where}: {error}")
        assert named in error.split(" cannot be written")[0]
        assert " MiB are free there" in error
        kept = checkpoints(folder)
        for step, checkpoint in kept.items():
            assert contents(checkpoint) == contents(tmp_path / "whole" / f"checkpoint-{step}")
        expected = {"start_logging": 0, "Metrics": 0, "log_step": 0, "save_checkpoint": 2, "save_images": 2}
        assert len(kept) == expected.get(name, 3)
        assert not list(folder.glob(".*.partial"))
        filler.unlink()
        assert runs.run(script, [*flags, folder, "--resume_from_checkpoint", "latest"]) == 0, runs.output()
        assert results(folder) == results(tmp_path / "whole")
        assert losses(folder) == losses(tmp_path / "whole")
        shutil.rmtree(folder)


PRIOR = ["--with_prior_preservation", "--class_prompt", "a circle", "--num_class_images", 2]
ALSO_FULL = [  # trainer, function, what the message names, flags
    (SCRIPTS[0], "cache_moments", ".safetensors", ["--cache_latents_to_disk", "--disk_cache_dir", "{disk}/cache"]),
    (SCRIPTS[0], "generate_class_images", "class-0000", [*PRIOR, "--class_data_dir", "{disk}/class"]),
    (SCRIPTS[2], "generate_class_images", "class-0000", [*PRIOR, "--class_data_dir", "{disk}/class"]),
    (SCRIPTS[0], "save_result", "name.safetensors", ["--output_name", "name", "--output_dir", "{disk}"]),
    (SCRIPTS[3], "encode_prompts", "encoded", []),
    (SCRIPTS[3], "save_model", "transformer", ["--training", "full", "--output_dir", "{disk}/run"]),
]


@pytest.mark.slow
@pytest.mark.parametrize(("script", "function", "named", "extra"), ALSO_FULL)
def test_a_full_disk_elsewhere_is_one_message(runs, short_runs, small_disk, script, function, named, extra):
    filler = small_disk / "filler"
    flags = [*short_runs[script], "--output_dir", small_disk / "run"]
    flags += [part.replace("{disk}", str(small_disk)) if isinstance(part, str) else part for part in extra]
    assert runs.run(script, flags, full_disk, function, 1, str(filler), 0) == 1, runs.output()[-3000:]
    error = only_error(runs)
    print(error)
    assert named in error.split(" cannot be written")[0]
    assert not [path for path in small_disk.rglob("*") if "partial" in path.name]
    filler.unlink()
    assert runs.run(script, flags) == 0, runs.output()


@pytest.mark.parametrize("script", ONE_QUICK)
def test_nothing_goes_through_the_systems_temporary_folder(runs, flags_of, tmp_path, script):
    """It may be full, and is on another disk."""
    flags = [*flags_of[script], "--report_to", "tensorboard", "--checkpointing_steps", 1, *CACHES[script]]
    flags += [tmp_path / "cache"] if flags[-1] == "--disk_cache_dir" else []
    flags += ["--output_dir", tmp_path / "run"]
    assert runs.run(script, flags, without_temporary_folder, str(tmp_path / "none")) == 0, runs.output()[-3000:]


# ---------------------------------------------------------------------------------------------------------------------
# Pictures that are lost
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("script", SCRIPTS)
def test_a_picture_removed_meanwhile_is_one_message(runs, short_runs, pictures, pairs, tmp_path, script, workers):
    source = pairs / "images" if script == "train_influxedit" else pictures
    data, folder, marker = tmp_path / "data", tmp_path / "run", tmp_path / "marker"
    shutil.copytree(source, data)
    option = "--train_data_dir" if script == "train_twinflow" else "--instance_data_dir"
    flags = [*short_runs[script], option, data, "--max_train_steps", 40, "--checkpointing_steps", 2]
    flags += ["--dataloader_num_workers", workers, "--output_dir"]
    runs.start(script, [*flags, folder], pause, "save_checkpoint", 2, str(marker), 1)
    runs.wait_for(marker.exists)
    (data / "3.png").rename(data / "3.away")
    assert runs.end() == 1, runs.output()[-3000:]
    error = only_error(runs)
    print(error)
    assert str(data / "3.png") in error
    assert f"the last checkpoint is {folder / 'checkpoint-'}" in error
    last = max(checkpoints(folder))
    assert last == len(losses(folder)) >= 4  # no step is lost
    (data / "3.away").rename(data / "3.png")
    flags += [folder, "--resume_from_checkpoint", "latest", "--max_train_steps", last + 1]
    assert runs.run(script, flags) == 0, runs.output()


# ---------------------------------------------------------------------------------------------------------------------
# An output folder that is deleted
# ---------------------------------------------------------------------------------------------------------------------


DELETED = [("log_step", 3, ""), ("log_step", 5, "args.json")]  # function, its call, file; "": the whole folder


@pytest.mark.parametrize("script", ONE_QUICK)
def test_what_a_deleted_output_folder_had_is_written_again_or_told(runs, short_runs, tmp_path, script):
    flags = [*short_runs[script], "--max_train_steps", 6, "--checkpointing_steps", 2, "--output_dir"]
    assert runs.run(script, [*flags, tmp_path / "whole"]) == 0, runs.output()
    for function, nth, name in DELETED:
        folder = tmp_path / f"{function}-{nth}"
        code = runs.run(script, [*flags, folder], removed, function, nth, str(folder / name))
        output = runs.output()
        assert "Traceback" not in output, output[-3000:]
        assert code == 0, output[-3000:]
        assert "was deleted or moved" in output
        assert losses(folder) == losses(tmp_path / "whole")
        assert results(folder) == results(tmp_path / "whole") != {}
        assert json.loads((folder / "args.json").read_text())["args"]["max_train_steps"] == 6
        assert max(checkpoints(folder)) == 6


def removed_while_none_is_mapped(trainer, path):
    """A data set of more prompts and images than a process has mapped loses what was encoded at the third step."""
    from common import latents

    latents.NUM_MAPPED = 0
    removed(trainer, "log_step", 3, path)


@pytest.mark.parametrize("cached", [False, pytest.param(True, marks=pytest.mark.slow)])
@pytest.mark.parametrize("script", ONE_QUICK)
def test_lost_embeddings_and_latents_are_one_message_and_the_run_goes_on(runs, short_runs, tmp_path, script, cached):
    flags = [*short_runs[script], "--max_train_steps", 4, "--checkpointing_steps", 1]
    flags += ["--cache_latents"] if cached else []
    folder = tmp_path / "run"
    again = [*flags, "--output_dir", folder, "--resume_from_checkpoint", "latest"]
    assert runs.run(script, again, removed_while_none_is_mapped, str(folder / "encoded")) == 1, runs.output()[-3000:]
    error = only_error(runs)
    print(error)
    assert str(folder / "encoded") in error
    assert f"the last checkpoint is {folder / 'checkpoint-'}" in error
    assert runs.run(script, again) == 0, runs.output()[-3000:]
    assert runs.run(script, [*flags, "--output_dir", tmp_path / "whole"]) == 0, runs.output()[-3000:]
    assert results(folder) == results(tmp_path / "whole") != {}
    assert (folder / "encoded").exists() == (script == "train_twinflow")  # which keeps them for later runs


# ---------------------------------------------------------------------------------------------------------------------
# Losses that are no numbers
# ---------------------------------------------------------------------------------------------------------------------


def sometimes_nan(trainer, monkeypatch, bad):
    monkeypatch.setattr(trainer, "compute_loss", trainer.compute_loss)  # undone afterwards
    not_finite(trainer, bad)


@pytest.mark.parametrize("script", [pytest.param(script, marks=pytest.mark.slow) for script in SCRIPTS])
def test_a_step_without_a_finite_loss_changes_no_weight(train, short_runs, tmp_path, monkeypatch, script):
    trainer, folder = importlib.import_module(script), tmp_path / "run"
    flags = [*short_runs[script], "--checkpointing_steps", 1, "--output_dir"]
    with monkeypatch.context() as patch:
        sometimes_nan(trainer, patch, {3})
        with pytest.raises(SystemExit, match="1 of 5 steps were skipped"):  # more than a tenth
            train(script, *flags, folder, "--max_train_steps", 5)
    kept = {step: contents(checkpoint) for step, checkpoint in checkpoints(folder).items()}
    moving = [name for name in kept[2] if name.endswith(".safetensors") or name == "optimizer.bin"]
    moving = [name for name in moving if f"resume_{name}" not in kept[2]]  # whose header holds the step
    assert len(moving) > 1
    for name in moving:
        assert kept[2][name] == kept[3][name] != kept[4][name]
        assert kept[1][name] != kept[2][name]
    assert [loss == loss for loss in losses(folder)] == [True, True, False, True, True]

    folder = tmp_path / "always"
    sometimes_nan(trainer, monkeypatch, range(4, 99))
    with pytest.raises(SystemExit, match="step 13: the last 10 losses .* not finite.*checkpoint-12") as end:
        train(script, *flags, folder, "--max_train_steps", 50, "--checkpointing_steps", 3)
    assert isinstance(end.value.code, str)  # which Python prints and makes exit code 1
    assert list(checkpoints(folder)) == [3, 6, 9, 12]
    kept = {step: contents(checkpoint) for step, checkpoint in checkpoints(folder).items()}
    for name in moving:
        assert kept[3][name] == kept[12][name]


NOT_FINITE = [  # steps that are not finite, steps, what the run ends with, counts that it says before
    ([1, 2, 3], 3, "Stopped at step 3: the last 3 losses.*no checkpoint was saved.*--learning_rate", [1, 2]),
    ([1, 3, 5, 7, 9], 10, "5 of 10 steps were skipped.*--learning_rate", [1, 2, 4]),
    ([1], 10, "Trained 10 steps", [1]),
]


@pytest.mark.parametrize("script", ONE_QUICK)
def test_skipped_steps_are_counted_and_too_many_are_an_error(runs, short_runs, tmp_path, script):
    for bad, steps, end, said in NOT_FINITE:
        folder = tmp_path / str(len(bad))
        flags = [*short_runs[script], "--output_dir", folder, "--max_train_steps", steps]
        code = runs.run(script, flags, not_finite, bad)
        output = runs.output()
        assert code == ("Trained" not in end), output
        assert re.search(end, output), output
        assert ("Trained 10 steps" in output) == (code == 0)
        found = re.findall(r"Step \d+ was skipped.*: (\d+) of \d+ steps so far", output)
        assert [int(number) for number in found] == said
        assert "lr_scheduler" not in output  # torch's warning
        assert "Traceback" not in output
        assert bool(results(folder)) == (steps == 10)


# ---------------------------------------------------------------------------------------------------------------------
# Signals
# ---------------------------------------------------------------------------------------------------------------------


SIGNALS = [("SIGTERM", "run"), ("SIGTERM", "group"), ("SIGINT", "group"), ("SIGHUP", "run")]
MOMENTS = [("log_step", 3, 4), ("save_images", 2, 4), ("save_images", 4, 9)]  # function, its call, step that is saved


@pytest.mark.parametrize(("name", "whom"), SIGNALS)
@pytest.mark.parametrize("script", [pytest.param(script, marks=pytest.mark.slow) for script in SCRIPTS])
def test_a_signal_while_training_or_drawing_saves_and_ends(runs, flags_of, tmp_path, script, name, whom):
    number, marker = getattr(signal, name), tmp_path / "marker"
    flags = [*flags_of[script], "--max_train_steps", 9, "--dataloader_num_workers", 2, "--output_dir"]
    assert runs.run(script, [*flags, tmp_path / "whole"]) == 0, runs.output()
    for function, nth, step in MOMENTS:  # between two steps; within the validation after step 4, and the last one
        folder = tmp_path / f"{function}-{nth}"
        runs.start(script, [*flags, folder], pause, function, nth, str(marker), 1)
        runs.wait_for(marker.exists)
        marker.unlink()
        (os.kill if whom == "run" else os.killpg)(runs.pid, number)
        runs.wait_for(lambda: "once more to stop at once" in runs.output(), timeout=1)
        assert runs.end() == 128 + number, runs.output()[-3000:]
        output = runs.output()
        assert "Traceback" not in output, output[-3000:]
        assert f"Interrupted at step {step}, saved {folder / f'checkpoint-{step}'}; continue with" in output
        assert list(checkpoints(folder)) == [step]
        assert runs.run(script, [*flags, folder, "--resume_from_checkpoint", "latest"]) == 0, runs.output()
        assert results(folder) == results(tmp_path / "whole")
        assert losses(folder) == losses(tmp_path / "whole")
        assert (folder / "validation" / "step-000009.png").is_file()


def test_validation_stops_between_images(runs, flags_of, tmp_path):
    marker, folder = tmp_path / "marker", tmp_path / "run"
    flags = [*flags_of[SCRIPTS[0]], "--num_validation_images", 8, "--output_dir", folder]
    runs.start(SCRIPTS[0], [*flags, "--max_train_steps", 5], slow_images, str(marker), 2, 9)
    runs.wait_for(marker.exists)
    os.kill(runs.pid, signal.SIGINT)
    began = time.monotonic()
    assert runs.end() == 130, runs.output()[-3000:]
    assert time.monotonic() - began < 5  # all would take 16
    assert list(checkpoints(folder)) == [4]
    assert sorted(path.name for path in (folder / "validation").iterdir()) == ["step-000000.png"]


def test_a_second_signal_ends_at_once_and_a_notebook_goes_on(runs, short_runs, tmp_path):
    flags = [*short_runs[SCRIPTS[0]], "--max_train_steps", 50, "--checkpointing_steps", 1, "--output_dir"]
    marker, folder, log = tmp_path / "marker", tmp_path / "run", tmp_path / "kernel"
    flags = [*map(str, flags), str(folder)]
    runs.start(None, [], be_a_notebook, SCRIPTS[0], flags, str(marker), str(log))
    runs.wait_for(marker.exists)
    os.kill(runs.pid, signal.SIGINT)
    runs.wait_for(lambda: "once more to stop at once" in runs.output(), timeout=1)
    time.sleep(2.1)
    os.kill(runs.pid, signal.SIGINT)
    assert runs.end(timeout=10) == 0
    assert log.read_text() == "main ended with 130, the handler is the kernel's"
    assert "the last checkpoint is" in runs.output()
    assert "Traceback" not in runs.output()
    assert list(checkpoints(folder)) == [1, 2]


def test_ctrl_c_before_main_begins_shows_no_traceback(runs):
    assert runs.run(None, [], interrupted) == -signal.SIGINT
    assert runs.output().strip() == "Interrupted"


STEPS = [0.0, pytest.param(20.0, marks=pytest.mark.slow)]


@pytest.mark.parametrize("seconds", STEPS)
def test_a_notebooks_interrupt_and_a_schedulers_grace_period_end_with_a_checkpoint(
    runs, short_runs, tmp_path, seconds
):
    """30 seconds after SIGTERM a scheduler kills."""
    flags = [*short_runs[SCRIPTS[0]], "--max_train_steps", 5000, "--output_dir", tmp_path / "scheduler"]
    runs.start(SCRIPTS[0], flags, slow_steps, seconds, str(tmp_path / "step"))
    runs.wait_for((tmp_path / "step").exists)
    os.kill(runs.pid, signal.SIGTERM)
    assert runs.end(timeout=30) == 143, runs.output()[-3000:]
    assert len(checkpoints(tmp_path / "scheduler")) == 1

    log, words = tmp_path / "kernel", [*map(str, flags[:-1]), str(tmp_path / "notebook")]
    runs.start(None, [], be_a_notebook, SCRIPTS[0], words, str(tmp_path / "marker"), str(log), seconds)
    runs.wait_for((tmp_path / "marker").exists)
    os.kill(runs.pid, signal.SIGINT)
    assert runs.end(timeout=30) == 0, runs.output()[-3000:]
    assert log.read_text() == "main ended with 130, the handler is the kernel's"
    assert len(checkpoints(tmp_path / "notebook")) == 1


@pytest.mark.slow
def test_a_terminal_that_is_closed_and_a_pipe_that_ends_lose_no_step(short_runs, tmp_path):
    """`| tee` ends at Ctrl-C, too; to write to it afterwards is an error, and so it is to a closed terminal."""
    flags = [*short_runs[SCRIPTS[0]], "--max_train_steps", 5000]
    for number, (reader, writer) in ((signal.SIGINT, os.pipe()), (signal.SIGHUP, os.openpty())):
        folder = tmp_path / number.name
        environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
        request = json.dumps(request_of(SCRIPTS[0], [*flags, "--output_dir", folder]))
        process = subprocess.Popen(
            [sys.executable, PROGRAM, request], stdout=writer, stderr=writer, stdin=subprocess.DEVNULL, env=environment
        )
        os.close(writer)
        seen = b""
        while not (folder / "metrics.jsonl").exists() or not losses(folder):
            seen += os.read(reader, 65536)
        os.close(reader)
        process.send_signal(number)
        assert process.wait(60) == 128 + number
        assert len(checkpoints(folder)) == 1


EARLY = [
    *((script, "cache_moments", ["--cache_latents"]) for script in SCRIPTS[:3]),
    (SCRIPTS[3], "cache_latents", ["--cache_latents"]),
    *((script, "generate_class_images", []) for script in (SCRIPTS[0], SCRIPTS[2])),
    *((script, "load_checkpoint", []) for script in SCRIPTS),
    *((script, "Metrics", []) for script in SCRIPTS),
]


@pytest.mark.slow
@pytest.mark.parametrize(("script", "function", "extra"), EARLY)
def test_a_signal_before_training_ends_at_once(runs, short_runs, tmp_path, script, function, extra):
    flags = [*short_runs[script], *extra, "--output_dir", tmp_path / "run"]
    if function == "generate_class_images":
        flags += [*PRIOR, "--class_data_dir", tmp_path / "class"]
    for number in (signal.SIGTERM, signal.SIGINT):
        runs.start(script, flags, pause, function, 1, str(tmp_path / "marker"), 200)
        runs.wait_for((tmp_path / "marker").exists)
        (tmp_path / "marker").unlink()
        os.kill(runs.pid, number)
        assert runs.end(timeout=100) == 128 + number
        assert "Interrupted at once; no checkpoint was saved" in runs.output()
        assert "Traceback" not in runs.output()
    assert not checkpoints(tmp_path / "run")
    assert runs.run(script, flags) == 0, runs.output()


@contextlib.contextmanager
def two_processes(*request):
    """A trainer in two processes, by torchrun: (the launcher, the two as they are listed); none may be left."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", PROGRAM]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    launcher = subprocess.Popen(
        [*command, json.dumps(request_of(*request))],
        env=environment,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        start_new_session=True,
    )
    try:
        yield launcher
        deadline = time.monotonic() + 300
        while any(group_of(process.pid) == launcher.pid for process in psutil.process_iter()):
            assert time.monotonic() < deadline
            time.sleep(0.05)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(launcher.pid, signal.SIGKILL)


def rank(launcher, number):
    """The id of the process of rank `number`."""
    children = psutil.Process(launcher.pid).children(recursive=True)
    return next(child.pid for child in children if child.environ().get("RANK") == str(number))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("script", "whom"), [*((script, 1) for script in SCRIPTS), (SCRIPTS[0], 0), (SCRIPTS[0], "launcher and both")]
)
def test_a_signal_to_one_of_two_processes_ends_both(short_runs, tmp_path, script, whom):
    flags = [*short_runs[script], "--max_train_steps", 7, "--train_batch_size", 4, "--output_dir"]
    with two_processes(script, [*flags, tmp_path / "whole"]) as launcher:
        output = launcher.communicate(timeout=300)[0]
        assert launcher.returncode == 0, output[-3000:]
    folder, marker = tmp_path / "run", tmp_path / "marker"
    with two_processes(script, [*flags, folder], pause, "log_step", 3, str(marker), 1) as launcher:
        deadline = time.monotonic() + 300
        while not marker.exists():
            assert time.monotonic() < deadline
            time.sleep(0.005)
        if whom in (0, 1):
            os.kill(rank(launcher, whom), signal.SIGTERM)
        else:
            os.killpg(launcher.pid, signal.SIGINT)
        output = launcher.communicate(timeout=300)[0]
    assert launcher.returncode != 0
    assert f"Interrupted at step 4, saved {folder / 'checkpoint-4'}" in output, output[-3000:]
    assert list(checkpoints(folder)) == [4]
    with two_processes(script, [*flags, folder, "--resume_from_checkpoint", "latest"]) as launcher:
        output = launcher.communicate(timeout=300)[0]
        assert launcher.returncode == 0, output[-3000:]
    assert results(folder) == results(tmp_path / "whole") != {}
    assert losses(folder) == losses(tmp_path / "whole")


@pytest.mark.slow
@pytest.mark.parametrize("script", SCRIPTS[:1])
def test_a_full_disk_ends_both_of_two_processes(short_runs, small_disk, script):
    folder, filler = small_disk / "run", small_disk / "filler"
    flags = [*short_runs[script], "--max_train_steps", 7, "--checkpointing_steps", 2, "--output_dir", folder]
    with two_processes(script, flags, full_disk, "save_checkpoint", 2, str(filler), 16384) as launcher:
        output = launcher.communicate(timeout=300)[0]
    assert launcher.returncode != 0
    assert 1 <= output.count(" cannot be written (") <= 2, output[-3000:]  # either process may meet the full disk
    assert list(checkpoints(folder)) == [2]
    filler.unlink()
    with two_processes(script, [*flags, "--resume_from_checkpoint", "latest"]) as launcher:
        output = launcher.communicate(timeout=300)[0]
        assert launcher.returncode == 0, output[-3000:]


# ---------------------------------------------------------------------------------------------------------------------
# Every write, every file of the input, signals at random moments; beside files of others
# ---------------------------------------------------------------------------------------------------------------------


ERRORS = (errno.ENOSPC, errno.EIO, errno.EPERM)
DATA_FLAGS = ("--instance_data_dir", "--train_data_dir", "--target_data_dir", "--caption_data_dir")
CACHES = {
    SCRIPTS[0]: ["--cache_latents", "--cache_latents_to_disk", "--disk_cache_dir"],
    SCRIPTS[1]: ["--cache_latents"],
    SCRIPTS[2]: ["--cache_latents"],
    SCRIPTS[3]: ["--cache_latents"],
}


@pytest.fixture
def count(record_property):
    """count(what, number=1): the sums over all tests are printed below pytest's results."""

    def add(what, number=1):
        record_property(f"fault injection, {what}", number)

    return add


class Home:
    """A folder with the data of a run and with files of others: runs fail in it, and are continued."""

    def __init__(self, folder, flags, runs, script, count):
        self.folder, self.runs, self.script, self.count = folder, runs, script, count
        self.flags = list(flags)
        for i, flag in enumerate(self.flags):
            if flag in DATA_FLAGS:
                copy = shutil.copytree(self.flags[i + 1], folder / "data" / flag.strip("-"))
                self.flags[i + 1] = copy
        for name in ("notes.txt", "other/checkpoint-2/state", "other/args.json", ".checkpoint-2.partial/x"):
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_text(f"of another: {name}")
        self.run = folder / "run"
        self.whole = folder.with_name("whole")
        self.flags += ["--max_train_steps", 5, "--checkpointing_steps", 2, "--checkpoints_total_limit", 1]
        self.before = self.others()
        assert runs.run(script, [*self.flags, "--output_dir", self.whole]) == 0, runs.output()
        self.losses, self.results = losses(self.whole), results(self.whole)
        self.resumed = {}  # what lies in `run`: whether a run from there was continued

    def others(self):
        """{file: hash} of all but what the runs write."""
        own = (self.folder / "run", self.folder / "cache")
        files = [path for path in self.folder.rglob("*") if path.is_file()]
        files = [path for path in files if not any(path.is_relative_to(folder) for folder in own)]
        return {path: hashlib.sha256(path.read_bytes()).hexdigest() for path in files}

    def start(self, *fault, more=()):
        return self.runs.start(self.script, [*self.flags, *more, "--output_dir", self.run], *fault)

    def check_end(self, code, *, of_signal=None):
        """A run that failed says so in one line; nothing but its own files has changed."""
        output = self.runs.output()
        assert "Traceback" not in output and "Exception ignored" not in output, output[-4000:]
        if code == 0:
            self.check_finished()
        elif of_signal is None:
            assert code == 1, output[-3000:]
            assert only_error(self.runs)
        assert self.others() == self.before
        self.count("files of others compared", len(self.before))

    def check_finished(self):
        assert results(self.run) == self.results != {}
        assert losses(self.run) == self.losses
        self.count("results compared", len(self.results))

    def resume(self):
        """Continues the run that failed, unless one that left files of the same names was continued before."""
        names = frozenset(path.relative_to(self.run) for path in self.run.rglob("*") if "partial" not in path.name)
        if names not in self.resumed:
            assert (
                self.runs.run(
                    self.script, [*self.flags, "--output_dir", self.run, "--resume_from_checkpoint", "latest"]
                )
                == 0
            ), self.runs.output()[-3000:]
            self.check_finished()
            self.count("runs resumed")
            self.resumed[names] = True

    def clear(self):
        shutil.rmtree(self.run, ignore_errors=True)
        shutil.rmtree(self.folder / "cache", ignore_errors=True)


@pytest.fixture
def home_of(runs, flags_of, tmp_path, count):
    """home_of(script, cached): a `Home` of the trainer's runs, which validate at step 4."""

    def make(script, cached):
        folder = tmp_path / "home"
        folder.mkdir()
        flags = list(flags_of[script])
        if cached:
            flags += CACHES[script]
            flags += [folder / "cache"] if flags[-1] == "--disk_cache_dir" else []
        return Home(folder, flags, runs, script, count)

    return make


EVERY_WRITE = [pytest.param(SCRIPTS[0], 100, id="some")]
EVERY_WRITE += [pytest.param(script, 1, id=script, marks=pytest.mark.slow) for script in SCRIPTS]


@pytest.mark.parametrize(("script", "stride"), EVERY_WRITE)
def test_every_write_may_fail(runs, home_of, tmp_path, count, script, stride):
    home, count_file = home_of(script, cached=True), tmp_path / "count"
    home.clear()  # of the cache that the whole run has filled
    home.start(failing_write, str(home.folder), 0, 0, str(count_file))
    assert runs.end() == 0, runs.output()
    home.check_finished()
    home.clear()
    writes, wrong = int(count_file.read_text()), []
    for number in range(1, writes + 1, stride):
        code = ERRORS[number % len(ERRORS)]
        home.start(failing_write, str(home.folder), number, code)
        ended = runs.end()
        try:
            home.check_end(ended)
            if ended:
                error = only_error(runs)
                assert os.strerror(code) in error or "PytorchStreamWriter" in error, error
                assert str(home.folder) in error
                home.resume()
        except AssertionError as found:
            wrong.append(f"write {number} of {writes}, {os.strerror(code)}: {str(found)[-1500:]}")
        count("writes failed")
        home.clear()
    assert not wrong, "\n\n".join(wrong)


@pytest.mark.slow
@pytest.mark.parametrize("script", SCRIPTS)
def test_every_file_of_the_input_may_vanish(runs, home_of, count, script):
    home = home_of(script, cached=False)
    for number, path in enumerate(sorted((home.folder / "data").rglob("*.*"))):
        moment = ("start_logging", 1) if number % 2 else ("log_step", 2)
        home.start(vanishing, *moment, str(path))
        ended = runs.end()
        away = path.with_name(f"{path.name}.away")
        if away.exists():
            away.rename(path)
        home.check_end(ended)
        if ended:
            assert str(path) in only_error(runs)
            home.resume()
        count("files of the input that vanished")
        home.clear()


@pytest.mark.slow
@pytest.mark.parametrize("script", SCRIPTS)
def test_signals_at_random_moments_lose_nothing(runs, home_of, count, script):
    home = home_of(script, cached=True)
    rng, seconds, sent = random.Random(script), runs.seconds, 0
    while sent < 13:
        number = rng.choice((signal.SIGINT, signal.SIGTERM, signal.SIGHUP))
        home.start(more=["--resume_from_checkpoint", "latest"])
        if not runs.ends_within(rng.uniform(0.05, 1.0) * seconds):
            os.kill(runs.pid, number)
            sent += 1
        code = runs.end()
        assert code in (0, 128 + number, -number), runs.output()[-3000:]
        if code == -number:  # before main() began, or when it was over
            assert "Training" not in runs.output() or "Trained 5 steps" in runs.output()
        home.check_end(code, of_signal=number)
        if code == 128 + number:
            assert "Interrupted at " in runs.output()
            count("runs that a signal ended")
        if code != 128 + number:
            home.clear()
    home.resume()
    count("signals", sent)


# ---------------------------------------------------------------------------------------------------------------------
# More samples than memory
# ---------------------------------------------------------------------------------------------------------------------


SAMPLES, BATCH = 20_000, 100


@pytest.fixture(scope="module")
def many(tmp_path_factory):
    """20,000 pictures of 32 x 32 pixels as ten tars and ten parquet files; fifty captions."""
    folder, rng = tmp_path_factory.mktemp("many"), np.random.default_rng(0)
    (folder / "tars").mkdir()
    (folder / "parquet").mkdir()
    for shard in range(10):
        images, texts = [], []
        with tarfile.open(folder / "tars" / f"{shard}.tar", "w") as tar:
            for i in range(SAMPLES // 10):
                buffer = io.BytesIO()
                Image.fromarray(rng.integers(256, size=(32, 32, 3), dtype=np.uint8)).save(buffer, format="PNG")
                images.append({"bytes": buffer.getvalue(), "path": None})
                texts.append(f"picture {i % 50}")
                record = json.dumps({"prompt": texts[-1]}).encode()
                for suffix, data in (("png", images[-1]["bytes"]), ("json", record)):
                    info = tarfile.TarInfo(f"{shard}{i:05d}.{suffix}")
                    info.size = len(data)
                    tar.addfile(info, io.BytesIO(data))
        table = pyarrow.table({"image": images, "text": texts})
        pyarrow.parquet.write_table(table, folder / "parquet" / f"{shard}.parquet", row_group_size=200)
    return folder


@pytest.mark.slow
@pytest.mark.parametrize(
    ("script", "source"),
    [
        ("train_omini", "tars, streamed"),
        ("train_omini", "parquet, streamed"),
        ("train_dreambooth_flux_advanced", "parquet"),
        ("train_twinflow", "parquet"),
    ],
)
def test_20_000_samples_hold_flat_memory(runs, short_runs, many, tmp_path, script, source):
    flags, report = list(short_runs[script]), tmp_path / "memory"
    place = flags.index("--train_data_dir" if script == "train_twinflow" else "--instance_data_dir")
    del flags[place : place + 2]
    parquet = ["--dataset_name", many / "parquet"]
    flags += ["--data_files", *sorted((many / "tars").glob("*.tar"))] if "tars" in source else parquet
    flags += ["--caption_column", "json.prompt" if "tars" in source else "text", "--cache_dir", tmp_path / "cache"]
    flags += ["--target_size" if script == "train_omini" else "--resolution", 32, "--train_batch_size", BATCH]
    steps = SAMPLES // BATCH
    flags += ["--max_train_steps", steps + 20, "--checkpointing_steps", steps - 10, "--output_dir", tmp_path / "run"]
    flags += ["--streaming"] if "streamed" in source else []
    assert runs.run(script, flags, watch_memory, str(report), timeout=1800) == 0, runs.output()[-3000:]
    memory = [int(line) / 1024 for line in report.read_text().splitlines()]
    tenth, half, all_of_it = memory[steps // 10 - 1], memory[steps // 2 - 1], memory[steps - 1]
    print(
        f"{script}, {source}: {tenth:.0f} MiB after 10 %, {half:.0f} after 50 %, {all_of_it:.0f} after 100 % of "
        f"{SAMPLES} samples (bar: 16 MiB more); {runs.seconds:.0f} s"
    )
    assert all_of_it - tenth < 16  # the files themselves are 62 MiB, their pixels as float32 234
    whole = results(tmp_path / "run")
    (tmp_path / "run" / "pytorch_lora_weights.safetensors").unlink(missing_ok=True)
    again = [*flags, "--resume_from_checkpoint", "latest"]  # 10 steps before the second epoch
    assert runs.run(script, again, watch_memory, str(report), timeout=1800) == 0, runs.output()[-3000:]
    assert results(tmp_path / "run") == whole != {}
    assert len(losses(tmp_path / "run")) == steps + 20
