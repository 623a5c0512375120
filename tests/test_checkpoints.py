"""common/checkpoints.py: a folder is one run's, what a killed run leaves is swept, what is drawn replaces nothing."""

import errno
import fcntl
import importlib
import json
import os
import shutil
import signal
import socket
import threading
from argparse import Namespace
from contextlib import contextmanager, suppress
from pathlib import Path

from common.checkpoints import (
    FILLED,
    NOT_READ,
    catch_signals,
    check_taken,
    is_in_use,
    lock_folder,
    release_lock,
    remove_partial,
    run_settings,
    unused_path,
    writing,
)
from common.metrics import read_metrics
from common.tracking import Metrics

import pytest
from PIL import Image
from processes import SCRIPTS
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file


SWEPT = [".checkpoint-6.partial/state", "encoded/.a.safetensors.0123abcd.partial", ".loss.png.ffffffff.partial"]
SWEPT += [".tmpAb12cd"]  # of safetensors
KEPT = [
    *("checkpoint-4/state", "encoded/a.safetensors", ".notes.partial", ".checkpoint-x.partial/state"),
    *("film.partial", ".download.0123abcz.partial", "checkpoint-6.partial/state", ".tmpAb12cde", "tmpAb12cd"),
]


@pytest.fixture
def killed(tmp_path):
    """A folder with what a killed run left, beside files of others with names that are almost the same."""
    for name in SWEPT + KEPT:
        path = tmp_path / "run" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("x")
    (tmp_path / ".beside.png.0123abcd.partial").write_text("x")
    return tmp_path / "run"


def test_what_a_killed_run_was_writing_is_swept_and_nothing_else(killed):
    remove_partial(killed)
    files = {path.relative_to(killed).as_posix() for path in killed.rglob("*") if path.is_file()}
    assert files == {*KEPT}
    assert not (killed / ".checkpoint-6.partial").exists()
    assert (killed.parent / ".beside.png.0123abcd.partial").exists()


def test_what_a_killed_run_was_writing_beside_its_folder_is_swept(tmp_path):
    swept = [".a.b.safetensors.0123abcd.partial", ".a.b-000010.safetensors.0123abcd.partial"]
    kept = [".a.b-2.safetensors.0123abcd.partial", ".axb.safetensors.0123abcd.partial", ".a.b.safetensors.partial"]
    kept += [".a.b-251127.safetensors.0123abcd.partial", "a.b-251127/args.json"]  # of a run with a date as its name
    (tmp_path / "a.b-251127").mkdir()
    for name in swept + kept:
        (tmp_path / name).write_text("x")
    remove_partial(tmp_path / "a.b", [tmp_path / "a.b.safetensors"])
    assert {path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*") if path.is_file()} == {*kept}


def test_a_run_in_the_folder_of_another_goes_on_writing(tmp_path):
    """--output_dir out beside a run of --output_dir out/second, or --output_name second."""
    live = [tmp_path / "second" / name for name in (".checkpoint-6.partial/state", "encoded/.a.0123abcd.partial")]
    for path in live:
        path.parent.mkdir(parents=True)
        path.write_text("x")
    with another_run(tmp_path / "second"):
        remove_partial(tmp_path)
        assert all(path.exists() for path in live)
        remove_partial(tmp_path / "second")  # its own
    assert not any(path.exists() for path in live)


def test_settings_that_differ_are_named_without_pythons_types():
    args = Namespace(folders=[Path("a b"), Path("c")], condition_type=["fill"], model=Path("x"), seed=0)
    settings = run_settings(args, 1, data=[], models={})
    assert settings["folders"] == "['a b', 'c']"
    assert (settings["condition_type"], settings["model"], settings["seed"]) == ("['fill']", "x", "0")


def test_a_run_sweeps_at_its_start_and_at_its_end(train, short_runs, tmp_path, monkeypatch):
    script = "train_dreambooth_flux_advanced"
    left = [tmp_path / ".checkpoint-6.partial", tmp_path / ".checkpoint-7.partial"]
    left[0].mkdir()
    seen = []

    def leave_another(*args, **kwargs):
        seen.append(left[0].exists())
        left[1].mkdir()

    monkeypatch.setattr(f"{script}.print_header", leave_another)
    train(script, *short_runs[script], "--max_train_steps", 1, "--output_dir", tmp_path)
    assert seen == [False]
    assert not left[1].exists()


def test_what_is_drawn_gets_a_name_that_no_file_has(tmp_path):
    path = tmp_path / "0.png"
    for name in ("0.png", "0-1.png", "0-2.png"):
        assert unused_path(path) == tmp_path / name
        (tmp_path / name).write_text("x")
    assert unused_path(tmp_path / "new" / "0.png") == tmp_path / "new" / "0.png"


@contextmanager
def another_run(folder):
    """The id of another process that writes in a folder; killed at the end, if not earlier."""
    folder.mkdir(exist_ok=True)
    reading, writing = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.write(writing, b"1" if lock_folder(folder) else b"0")
        signal.pause()
    assert os.read(reading, 1) == b"1"
    try:
        yield pid
    finally:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)


def refused(script, words, capsys):
    """The message of flags that a trainer refuses."""
    with pytest.raises(SystemExit) as stop:
        importlib.import_module(script).parse_args([str(word) for word in words])
    assert stop.value.code == 2
    return capsys.readouterr().err


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_folder_of_others_is_no_output_dir(script, short_runs, tmp_path, capsys):
    words = [*short_runs[script], "--output_dir"]
    assert "empty" in refused(script, [*words, ""], capsys)
    for name in ("README.md", "args.json", "validation", "loss.png", "model_index.json", ".git", "transformer"):
        folder = tmp_path / f"with-{name}"
        folder.mkdir()
        if name in ("validation", ".git", "transformer"):
            (folder / name).mkdir()
            (folder / name / "a.txt").write_text("of another")
        else:
            (folder / name).write_text('{"name": "a project"}')
        before = files_of(tmp_path)
        assert f"holds {name}," in refused(script, [*words, folder], capsys)
        assert files_of(tmp_path) == before
        (folder / "args.json").write_text('{"args": {"rank": 4}}')  # of a trainer
        importlib.import_module(script).parse_args([str(word) for word in [*words, folder]])
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "log.txt").write_text("a shell's > notes/log.txt")
    importlib.import_module(script).parse_args([str(word) for word in [*words, tmp_path / "notes"]])


@pytest.mark.parametrize("script", SCRIPTS)
def test_no_output_lies_in_what_is_read(script, short_runs, tmp_path, capsys):
    """Whatever flag names the folder: under its own name, through a link or .., and folders in it."""
    words = short_runs[script]
    folders = {flag: path for flag, path in zip(words, words[1:], strict=False) if Path(str(path)).is_dir()}
    assert len(folders) >= 2
    (tmp_path / "link").symlink_to(tmp_path / "data")
    for flag, path in folders.items():
        if (tmp_path / "data").exists():
            shutil.rmtree(tmp_path / "data")
        shutil.copytree(path, tmp_path / "data")
        before = files_of(tmp_path)
        for output in ("data", "data/../link", "link/a/b"):
            message = refused(script, [*words, flag, tmp_path / "data", "--output_dir", tmp_path / output], capsys)
            assert f"--output_dir {tmp_path / output}" in message
            assert f"{flag} {tmp_path / 'data'}, which is read" in message
        assert files_of(tmp_path) == before
        (tmp_path / "run").mkdir(exist_ok=True)
        shutil.copytree(path, tmp_path / "run" / "validation" / "images")
        inside = [*words, flag, tmp_path / "run" / "validation" / "images", "--output_dir", tmp_path / "run"]
        assert "lies where this run writes" in refused(script, inside, capsys)
        shutil.move(tmp_path / "run" / "validation" / "images", tmp_path / "run" / "data")
        shutil.rmtree(tmp_path / "run" / "validation")
        importlib.import_module(script).parse_args(
            [str(word) for word in [*words, flag, tmp_path / "run" / "data", "--output_dir", tmp_path / "run"]]
        )
        shutil.rmtree(tmp_path / "run")


@pytest.mark.parametrize("script", SCRIPTS)
def test_every_flag_of_a_path_is_compared_with_the_output(script, short_runs, tmp_path, capsys):
    words = [str(word) for word in short_runs[script]]
    names = importlib.import_module(script).parse_args(words).paths
    compared = [name for name in names if name not in (*NOT_READ, *FILLED, "resume_from_checkpoint")]
    assert len(compared) >= 4
    for name in compared:
        message = refused(script, [*words, f"--{name}", tmp_path, "--output_dir", tmp_path / "run"], capsys)
        assert f"--output_dir {tmp_path / 'run'} lies in --{name} {tmp_path}" in message


@pytest.mark.parametrize("script", ["train_dreambooth_flux_advanced", "train_influxedit"])
def test_class_images_are_not_drawn_among_the_users(script, short_runs, tmp_path, capsys):
    words = [*short_runs[script], "--output_dir", tmp_path / "run", "--with_prior_preservation", "--class_prompt", "x"]
    images = words[words.index("--instance_data_dir") + 1]
    for folder in (images, images / "class"):
        message = refused(script, [*words, "--class_data_dir", folder], capsys)
        assert f"--class_data_dir {folder}" in message
        assert "--instance_data_dir" in message
    refused(script, [*words, "--class_data_dir", tmp_path / "run" / "validation"], capsys)
    message = refused(
        script, [*words, "--class_data_dir", tmp_path / "class", "--output_dir", tmp_path / "class"], capsys
    )
    assert "--output_dir" in message


def files_of(folder):
    return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_second_run_in_a_folder_is_refused_until_the_first_has_ended(script, short_runs, tmp_path, capsys):
    trainer = importlib.import_module(script)
    words = [str(word) for word in [*short_runs[script], "--output_dir", tmp_path / "run"]]
    with another_run(tmp_path / "run") as pid:
        (tmp_path / "run" / "checkpoint-2").mkdir()
        before = files_of(tmp_path)
        for more in ([], ["--resume_from_checkpoint", "latest"]):
            with pytest.raises(SystemExit) as stop:
                trainer.parse_args(words + more)
            assert stop.value.code == 2
            message = capsys.readouterr().err
            owner = json.loads((tmp_path / "run" / ".run.json").read_text())
            assert owner["pid"] == pid
            assert f"process {pid} on {socket.gethostname()}, started {owner['started']}" in message
            assert "delete" not in message
        assert files_of(tmp_path) == before
    (tmp_path / "run" / "checkpoint-2").rmdir()
    assert trainer.parse_args(words)


def test_of_two_runs_that_start_together_one_is_refused(train, short_runs, tmp_path, capsys, monkeypatch):
    """Both have looked at the empty folder; the other one is the first to write."""
    script = SCRIPTS[0]
    with another_run(tmp_path / "run") as pid:
        before = files_of(tmp_path)
        monkeypatch.setattr("common.checkpoints.is_in_use", lambda folder: False)
        with pytest.raises(SystemExit) as stop:
            train(script, *short_runs[script], "--output_dir", tmp_path / "run")
        assert stop.value.code == 2
        assert f"process {pid} on" in capsys.readouterr().err
        assert files_of(tmp_path) == before


def test_a_lock_ends_with_its_process_and_a_notebook_can_train_again(tmp_path):
    with another_run(tmp_path):
        assert is_in_use(tmp_path)
        assert not lock_folder(tmp_path)
    assert not is_in_use(tmp_path)
    assert lock_folder(tmp_path)
    assert lock_folder(tmp_path)  # a second run of this process, after one that ended in an error
    assert seen_by_another(tmp_path)
    release_lock()
    assert not seen_by_another(tmp_path)


def seen_by_another(folder):
    """Whether another process finds a folder in use."""
    pid = os.fork()
    if pid == 0:
        os._exit(is_in_use(folder))
    return bool(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))


def test_a_run_holds_its_folder_and_leaves_it(train, short_runs, tmp_path, monkeypatch):
    script = SCRIPTS[0]
    seen = []
    monkeypatch.setattr(f"{script}.print_header", lambda *args, **kwargs: seen.append(seen_by_another(tmp_path)))
    train(script, *short_runs[script], "--max_train_steps", 1, "--output_dir", tmp_path)
    assert seen == [True]
    assert not seen_by_another(tmp_path)


@pytest.mark.parametrize("error", [ValueError, SystemExit, KeyboardInterrupt])
@pytest.mark.parametrize("in_thread", [False, True])
def test_a_folder_is_free_when_a_run_in_a_notebook_has_failed(tmp_path, error, in_thread):
    """The process lives on, and the next run may be one of another process."""

    def fail_while_training():
        with suppress(error, SystemExit), catch_signals(tmp_path):
            assert lock_folder(tmp_path)
            raise error

    if in_thread:
        thread = threading.Thread(target=fail_while_training)
        thread.start()
        thread.join()
    else:
        fail_while_training()
    assert not seen_by_another(tmp_path)


def test_a_file_system_without_locks_is_one_line(tmp_path, monkeypatch, capsys):
    def no_locks(file, operation):
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "lockf", no_locks)
    assert lock_folder(tmp_path)
    assert len(capsys.readouterr().out.splitlines()) == 1
    assert not is_in_use(tmp_path)
    release_lock()


@pytest.mark.slow
def test_both_of_two_processes_end_where_another_run_writes(runs, short_runs, tmp_path):
    script = SCRIPTS[0]
    flags = [*short_runs[script], "--output_dir", tmp_path]
    with another_run(tmp_path) as pid:
        assert runs.run(script, flags, claimed_late, processes=2) != 0
        assert f"process {pid} on" in runs.output()
        assert "Traceback" not in runs.output().partition(f"process {pid} on")[0]
    assert runs.run(script, flags, processes=2) == 0, runs.output()


def claimed_late(trainer):
    """The other run was not there when the flags were read."""
    checkpoints = importlib.import_module("common.checkpoints")
    checkpoints.is_in_use = lambda folder: False


def test_an_error_of_writing_says_what_the_system_said_and_no_more(tmp_path):
    path = tmp_path / "file"
    full = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "/elsewhere/temporary")
    denied = PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))
    for error, said, unsaid in (
        (full, ["No space left on device: /elsewhere/temporary", "MiB are free there"], ["checkpoint"]),
        (denied, ["(Permission denied)"], ["MiB", "checkpoint"]),
        (SafetensorError("I/O error: Input/output error (os error 5)"), ["Input/output error"], ["checkpoint"]),
    ):
        with pytest.raises(SystemExit) as end, writing(path):
            raise error
        assert all(text in end.value.code for text in [str(path), *said]), end.value.code
        assert not any(text in end.value.code for text in unsaid), end.value.code
    with catch_signals(tmp_path):
        with pytest.raises(SystemExit, match="no checkpoint was saved"), writing(path):
            raise denied
        (tmp_path / "checkpoint-7").mkdir()
        with pytest.raises(SystemExit, match="the last checkpoint is .*checkpoint-7"), writing(path):
            raise denied


def test_a_folder_that_is_deleted_meanwhile_is_locked_again_or_left_to_the_run_that_has_it(tmp_path):
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "args.json").write_text("{}")
    assert lock_folder(folder)
    metrics = Metrics(folder / "metrics.jsonl", 0)
    metrics.write({"step": 1, "loss": 1.0, "lr": 1.0})
    shutil.rmtree(folder)
    metrics.write({"step": 2, "loss": 1.0, "lr": 1.0})
    assert [row["step"] for row in read_metrics(folder / "metrics.jsonl")] == [1, 2]
    assert (folder / "args.json").read_text() == "{}"
    assert seen_by_another(folder)
    shutil.rmtree(folder)
    with another_run(folder) as pid:
        before = files_of(folder)
        with pytest.raises(SystemExit, match=f"process {pid} on"):
            metrics.write({"step": 3, "loss": 1.0, "lr": 1.0})
        assert files_of(folder) == before
    release_lock()


def test_steps_by_which_a_scaler_finds_its_scale_are_no_failure(tmp_path):
    taken = [False] * 3 + [True] * 17
    check_taken(taken, tmp_path, has_scaler=True)
    with pytest.raises(SystemExit, match="3 of 20 steps"):
        check_taken(taken, tmp_path, has_scaler=False)
    with pytest.raises(SystemExit, match="30 of 100 steps"):
        check_taken([True, True, True, False] * 20 + [False, True] * 10, tmp_path, has_scaler=True)


# ---- what a run computes ----


@pytest.fixture
def started(train, short_runs, tmp_path):
    """started(script, *flags): (flags of a run with a checkpoint, {flag: copy of its folder})."""

    def start(script, *more):
        words = [*short_runs[script], *more, "--checkpointing_steps", 1]
        folders = {}
        for i, flag in enumerate(words[:-1]):
            if Path(str(words[i + 1])).is_dir():
                folders[flag] = shutil.copytree(words[i + 1], tmp_path / "first" / flag.strip("-"), dirs_exist_ok=True)
                words[i + 1] = folders[flag]
        train(script, *words, "--max_train_steps", 1, "--output_dir", tmp_path / "run")
        return [*words, "--output_dir", tmp_path / "run", "--resume_from_checkpoint", "latest"], folders

    return start


DATA = {script: "--train_data_dir" if script == "train_twinflow" else "--instance_data_dir" for script in SCRIPTS}


@pytest.mark.parametrize("script", SCRIPTS)
def test_other_data_or_weights_are_not_resumed_and_moved_ones_are(train, started, tmp_path, capsys, script):
    words, folders = started(script)

    def message(*more):
        capsys.readouterr()
        with pytest.raises(SystemExit) as stop:
            train(script, *words, *more)
        assert stop.value.code == 2
        return capsys.readouterr().err

    images = folders[DATA[script]]
    captions = folders.get("--caption_data_dir", images)
    was = (images / "1.png").read_bytes(), (captions / "2.txt").read_text()
    Image.new("RGB", (32, 32), "red").save(images / "1.png")
    (captions / "2.txt").write_text("another caption")
    before = files_of(tmp_path / "run")
    refusal = message()
    assert "1 of 5 images (1.png)" in refusal
    assert "1 of 5 captions (2.png)" in refusal
    assert "--lora_path" in refusal
    (images / "1.png").write_bytes(was[0])
    (captions / "2.txt").write_text(was[1])

    model = folders["--pretrained_model_name_or_path"]
    for part in ("transformer", "vae", "text_encoder"):
        (file,) = (model / part).glob("*.safetensors")
        honest = file.read_bytes()
        save_file({name: value + 0.001 for name, value in load_file(file).items()}, file)
        assert f"weights or files of {part}." in message()
        file.write_bytes(honest)
    after = files_of(tmp_path / "run")
    for name in (".run.json", "args.json"):
        before.pop(Path(name))
        after.pop(Path(name))
    assert after == before

    for flag, folder in folders.items():
        words[words.index(folder)] = shutil.copytree(folder, tmp_path / "moved" / flag.strip("-"))
    shutil.rmtree(tmp_path / "first")
    train(script, *words, "--max_train_steps", 2)
    train(script, *words[:-4], "--max_train_steps", 2, "--output_dir", tmp_path / "whole")
    weights = [path for path in files_of(tmp_path / "whole" / "checkpoint-2") if path.suffix == ".safetensors"]
    assert weights
    for path in weights:
        one, other = (load_file(tmp_path / run / "checkpoint-2" / path) for run in ("run", "whole"))
        assert one.keys() == other.keys()
        assert all(one[name].equal(other[name]) for name in one)


def test_what_is_encoded_belongs_to_the_weights_not_to_their_path(train, started, tmp_path):
    """A run begins again where an earlier one left its encoded/, with other weights at the same path."""
    script = "train_twinflow"
    words, folders = started(script, "--cache_latents")
    entries = set((tmp_path / "run" / "encoded").iterdir())
    shutil.rmtree(tmp_path / "run" / "checkpoint-1")
    for part in ("vae", "text_encoder_2"):
        (file,) = (folders["--pretrained_model_name_or_path"] / part).glob("*.safetensors")
        save_file({name: value * 1.5 for name, value in load_file(file).items()}, file)
    train(script, *words[:-2], "--max_train_steps", 1)
    encoded = {path.name: load_file(path) for path in (tmp_path / "run" / "encoded").iterdir()}
    assert len(encoded) == 2 * len(entries)
    contents = {str({name: value.tolist() for name, value in tensors.items()}) for tensors in encoded.values()}
    assert len(contents) == len(encoded)
