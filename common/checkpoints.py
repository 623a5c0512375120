"""The folder of a run: whose it is, what may change on resume, whole checkpoints or none, signals, atomic files."""

import argparse
import errno
import fcntl
import hashlib
import json
import os
import re
import secrets
import select
import shutil
import signal
import socket
import sys
import threading
import time
import traceback
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType
from typing import IO, Any

from common.arguments import check_folder, exit_if_unreadable, fail, nearest_folder
from common.metrics import read_metrics
from common.models import (
    check_processes,
    choose_precision,
    disk_group,
    gather_objects,
    own_part,
    place_on_disk,
    writes_files,
)

import torch
import torch.distributed.checkpoint as dcp
from accelerate import Accelerator
from accelerate.scheduler import AcceleratedScheduler
from accelerate.utils import broadcast_object_list
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_optimizer_state_dict


# ---------------------------------------------------------------------------------------------------------------------
# Identity of a run: what must be the same when it is resumed
# ---------------------------------------------------------------------------------------------------------------------

# Every other flag belongs to the identity of a run: with another value the resumed run would not end in the weights
# of the uninterrupted one.
CHANGEABLE = frozenset(
    {
        # Where and how fast the same numbers are computed
        "allow_tf32",
        "attention_backend",
        "cache_dir",
        "cache_latents",
        "cache_latents_to_disk",
        "cache_prompts",
        "cache_text_encoder_outputs_to_disk",
        "dataloader_num_workers",
        "depth_batch_size",
        "disk_cache_dir",
        "gradient_checkpointing",
        "local_rank",
        "offload",
        "blocks_to_swap",
        "precompute_only",
        "prior_generation_precision",
        "sample_batch_size",
        # How long the run is and when it saves
        "checkpointing_steps",
        "checkpoints_total_limit",
        "early_stopping_patience",
        "load_best_model_at_end",
        "max_train_steps",
        "num_train_epochs",
        "resume_from_checkpoint",
        "save_on_each_node",
        "save_every_n_epochs",
        # Validation: it leaves no trace in training
        "final_validation_prompt",
        "num_validation_images",
        "skip_final_inference",
        "validation_epochs",
        "validation_guidance_scale",
        "validation_loss_steps",
        "validation_height",
        "validation_image",
        "validation_mask",
        "validation_num_inference_steps",
        "validation_prompt",
        "validation_prompts",
        "validation_samplers",
        "validation_steps",
        "validation_width",
        # Where results go and in which form
        "hub_model_id",
        "hub_token",
        "logging_dir",
        "metadata_author",
        "metadata_description",
        "metadata_license",
        "metadata_tags",
        "metadata_title",
        "metadata_usage_hint",
        "output_dir",
        "output_name",
        "push_to_hub",
        "report_to",
        "save_format",
        "upcast_before_saving",
        "verbose",
        # Where data and models lie: their content is compared, see `run_settings`
        "ae",
        "caption_data_dir",
        "clip_l",
        "data_files",
        "dataset_config",
        "instance_data_dir",
        "mask_data_dir",
        "openuni_checkpoint",
        "openuni_llm",
        "pretrained_model_name_or_path",
        "prompts_file",
        "reference_data_dir",
        "t5xxl",
        "target_data_dir",
        "tokenizer_dir",
        "train_data_dir",
        "validation_data_dir",
    }
)


def read_run_args(folder: Path, flags: Collection[str]) -> dict[str, Any]:
    """The flags of the run whose folder this is, from its args.json.

    Raises ValueError if one of `flags` is not among them: they were written by another trainer, or are damaged.
    """
    path = folder / "args.json"
    args = read_json(path).get("args")
    if not isinstance(args, dict):
        raise ValueError(f"{path}: holds no flags of a run, it is damaged or of another program")
    missing = [flag for flag in flags if flag not in args]
    if missing:
        raise ValueError(f"{folder}: a run of another trainer, its args.json has no {', '.join(missing)}")
    return args


def run_settings(
    args: argparse.Namespace, num_processes: int, *, data: list[list[str]], models: dict[str, str]
) -> dict[str, Any]:
    """{name: value} of all that must be the same when the run is resumed: flags as text, and the content of the data
    and of the models, from `data_record` (data.py) and `model_identities` (models.py)."""
    settings: dict[str, Any] = {}
    for name, value in vars(args).items():
        if isinstance(value, list):  # a Path in it would be PosixPath(...)
            value = [str(part) if isinstance(part, Path) else part for part in value]
        if name not in CHANGEABLE:
            settings[name] = str(value)
    settings["the number of processes"] = num_processes
    settings["data"] = data
    settings["models"] = models
    return settings


def match_processes(checkpoint: Path | None, run: dict[str, Any]) -> int:
    """The number of processes that a run, whose `run_settings` these are, began with: the order of samples is theirs.

    On another number it can be resumed if --gradient_accumulation_steps makes a step of as many batches: then `run`
    gets the two numbers that it began with, to be saved again. What does not fit stays, for `check_run` to refuse.
    """
    saved = checkpoint_state(checkpoint) if checkpoint else {}
    names = ("the number of processes", "gradient_accumulation_steps")
    began = {name: saved.get(name) for name in names}
    if batches_of_step(began) == batches_of_step(run):
        run.update(began)
    return run["the number of processes"]


def batches_of_step(settings: Mapping[str, Any]) -> int:
    """How many batches a step takes from all processes together; 0 if the settings do not tell."""
    with suppress(KeyError, TypeError, ValueError):
        return int(settings["gradient_accumulation_steps"]) * int(settings["the number of processes"])
    return 0


# ---------------------------------------------------------------------------------------------------------------------
# Checks before a run: they write nothing and return problems as sentences
# ---------------------------------------------------------------------------------------------------------------------


def check_disk(args: argparse.Namespace, needed: int) -> list[str]:
    """A problem if the disk of --output_dir has less free than `needed`, the bytes of a checkpoint and the result."""
    if shutil.disk_usage(nearest_folder(args.output_dir)).free >= needed:
        return []
    return [f"--output_dir {args.output_dir}: less than {needed / 2**20:.0f} MiB free, which one checkpoint takes"]


# What a run writes into its folder, beside its LoRA, checkpoints and the trackers' files
WRITTEN = (
    *("README.md", "args.json", "encoded", "loss.png", "metrics.jsonl", "scheduler", "skipped_samples.jsonl"),
    *("transformer", "validation"),
)

FOREIGN = (".git", "model_index.json")  # what no run writes: the folder is a project or a model

FILLED = ("output_dir", "class_data_dir", "disk_cache_dir")  # flags of folders that a run writes into

NOT_READ = ("output_dir", "disk_cache_dir", "cache_dir", "logging_dir", "resume_from_checkpoint")


def is_run(folder: Path) -> bool:
    """Whether a run of one of the trainers has written in a folder."""
    has_args = isinstance(read_json(folder / "args.json").get("args"), dict)
    return has_args or (folder / RUN_FILE).is_file() or bool(find_checkpoints(folder))


def check_places(filled: Mapping[str, Path], read: Iterable[tuple[str, Path]]) -> list[str]:
    """Problems of folders {flag: folder} that the run fills: those that are, or lie in, one that it reads.

    `read` are (flag, folder).
    """
    problems = []
    for read_flag, read_folder in read:
        for flag, folder in filled.items():
            if flag != read_flag and lies_in(folder, read_folder):
                where = "is" if lies_in(read_folder, folder) else "lies in"
                problems.append(
                    f"{flag} {folder} {where} {read_flag} {read_folder}, which is read: choose another folder"
                )
    return problems


def lies_in(path: Path, folder: Path) -> bool:
    """Whether a path is a folder or lies in it, through links and mounts too."""
    try:
        path = path.resolve()
        folder = folder.resolve()
        if not folder.exists():
            return path.is_relative_to(folder)
        return any(above.exists() and above.samefile(folder) for above in (path, *path.parents))
    except (OSError, ValueError):  # no folder can have such a name
        return False


def check_output_dir(args: argparse.Namespace) -> list[str]:
    """Problems of the folders that flags name, and of --resume_from_checkpoint."""
    filled = {f"--{name}": vars(args)[name] for name in FILLED if vars(args).get(name)}
    read = []
    for name in args.paths:
        value = vars(args)[name]
        for path in value if isinstance(value, list) else [value]:
            if path is not None and name not in NOT_READ and (name in FILLED or Path(path).is_dir()):
                read.append((f"--{name}", Path(path)))
    problems = check_places(filled, read)
    for flag, folder in read:
        for name in WRITTEN:
            if lies_in(folder, args.output_dir / name):
                problems.append(f"{flag} {folder} lies where this run writes: choose another --output_dir")
    return problems + check_run_folder(args)


def check_run_folder(args: argparse.Namespace) -> list[str]:
    """Problems of --output_dir itself and of --resume_from_checkpoint."""
    folder = args.output_dir
    problems = check_folder("--output_dir", folder) or names_in_the_way(folder, args.logging_dir)
    if problems:
        return problems
    if is_in_use(folder):
        return [in_use(folder)]
    others = [name for name in (*WRITTEN, *FOREIGN) if (folder / name).exists()]
    if others and not is_run(folder):
        return [
            f"--output_dir {folder} holds {', '.join(others)}, which no run of a trainer wrote there: choose another "
            "folder"
        ]
    checkpoints = find_checkpoints(folder)
    checkpoint = checkpoint_to_resume(folder, args.resume_from_checkpoint)
    if checkpoint is None:
        if not checkpoints:
            return []
        return [
            f"--output_dir {folder} holds {checkpoints[-1].name} of an earlier run: continue it with "
            "--resume_from_checkpoint latest, delete it, or choose another folder"
        ]
    if not (checkpoint / STATE_FILE).is_file():
        if checkpoint in checkpoints:
            return checkpoint_damage(checkpoint)
        return [f"--resume_from_checkpoint {checkpoint}: no checkpoint there; use latest, or a checkpoint-N folder"]
    if checkpoints and checkpoint.resolve() != checkpoints[-1].resolve():
        return [
            f"--output_dir {folder} holds {checkpoints[-1].name}, later than {checkpoint}: delete what is later, or "
            "choose another folder"
        ]
    return []


def names_in_the_way(folder: Path, logging_dir: Path) -> list[str]:
    """Problems of what a run writes into its folder: files where a folder is, and folders where a file is."""
    problems = []
    files = ("args.json", "metrics.jsonl", "skipped_samples.jsonl", "loss.png", "README.md")
    for name in (*files, "pytorch_lora_weights.safetensors"):
        if (folder / name).is_dir():
            problems.append(f"--output_dir {folder}: the folder {name} in it is in the way of a file")
    for name in ("validation", "encoded", "embeddings", logging_dir):
        if (folder / name).exists() and not (folder / name).is_dir():
            problems.append(f"--output_dir {folder}: the file {name} in it is in the way of a folder")
    return problems


def check_results(args: argparse.Namespace, results: Iterable[Path], sources: Sequence[Path]) -> list[str]:
    """Problems of the files `results` that the run will write: one that another run wrote, or one of `sources`, the
    files or folders of --lora_path, would be lost.

    A run that starts again, or is resumed, replaces its own, see `is_run`.
    """
    is_own = is_run(args.output_dir)
    problems = []
    for file in results:
        own = [path for path in (file, args.output_dir) if path.exists()]
        if any(source.exists() and source.samefile(path) for source in sources for path in own):
            problems.append(f"--lora_path {file}: this run would write over it; choose another {place(args)}")
        elif file.exists() and not is_own:
            problems.append(f"{file} exists and is of another run: move it, or choose another {place(args)}")
    return problems


def place(args: argparse.Namespace) -> str:
    """The flag that names a run's results."""
    return "--output_name" if args.output_name else "--output_dir"


def check_run(
    accelerator: Accelerator,
    args: argparse.Namespace,
    max_train_steps: int,
    checkpoint: Path | None,
    run: Mapping[str, Any],
) -> list[str]:
    """Problems that show once the data and the processes are known; `run` are its `run_settings`."""
    problems = check_processes(accelerator, args)
    if args.lr_scheduler != "constant" and args.lr_warmup_steps >= max_train_steps > 0:
        problems.append(
            f"--lr_warmup_steps {args.lr_warmup_steps} must be less than the {max_train_steps} steps of the run"
        )
    return problems + check_same_data(run) + checkpoint_conflicts(checkpoint, run, accelerator)


def check_same_data(run: Mapping[str, Any]) -> list[str]:
    """A problem if a process found more examples than another, whose steps would end sooner: that would wait for it.

    To be called by all processes.
    """
    counts = gather_objects([(socket.gethostname(), len(run.get("data", ())))])
    first_host, first_count = counts[0]
    for process, (host, count) in enumerate(counts):
        if count != first_count:
            return [
                f"process {process} on {host} finds {count} examples, process 0 on {first_host} {first_count}: put "
                "the same images on all machines"
            ]
    return []


def checkpoint_conflicts(
    checkpoint: Path | None, run: Mapping[str, Any], accelerator: Accelerator | None = None
) -> list[str]:
    """What keeps a run with these settings from continuing the checkpoint exactly. None: nothing to continue.

    With an `accelerator` its processes share the reading, see `checkpoint_damage`.
    """
    if checkpoint is None:
        return []
    damage = checkpoint_damage(checkpoint, accelerator)
    if damage:
        return damage
    saved = checkpoint_state(checkpoint)
    changes = []
    problems = []
    for name, value in run.items():
        if name not in saved or saved[name] == value:
            continue
        launched_with = choose_precision(None, os.environ.get("ACCELERATE_MIXED_PRECISION"), has_bf16=False)
        if name == "mixed_precision" and (saved[name], value) == ("None", launched_with):
            continue  # older runs recorded the flag, not what it meant
        if name == "data":
            changes += data_changes(saved[name], value)
        elif name == "files":
            changes += file_changes(saved[name], value)
        elif name == "models":
            changes += model_changes(saved[name], value)
        else:
            problems.append(
                f"--resume_from_checkpoint {checkpoint}: {name} was {saved[name]} there and is {value} now"
            )
            if name == "the number of processes":
                problems[-1] += (
                    "; with another number give the --gradient_accumulation_steps by which it makes "
                    f"{batches_of_step(saved)} batches per step, as there"
                )
    if changes:
        problems.append(
            f"--resume_from_checkpoint {checkpoint} is of a run with others of these: {'; '.join(changes)}. Put back "
            "what was there, or start a new run in another --output_dir: the LoRA of this one can be its --lora_path"
        )
    return problems


def data_changes(saved: Sequence[Sequence[str]], record: Sequence[Sequence[str]]) -> list[str]:
    """What differs between two `data_record`s, in words: "2 of 12 images (a.png, b.png)"."""
    if len(saved) != len(record):
        names = sorted({row[0] for row in saved} ^ {row[0] for row in record})
        return [f"{len(record)} examples for {len(saved)}{first_five(names)}"]
    changes = []
    for kind, position in (("images", 1), ("captions", 2)):
        names = []
        for old, new in zip(saved, record, strict=True):
            if old[position] != new[position] and old[position] and new[position]:
                names.append(new[0])
        if names:
            changes.append(f"{len(names)} of {len(record)} {kind}{first_five(names)}")
    return changes


def file_changes(saved: Sequence[Sequence[str]], files: Sequence[Sequence[str]]) -> list[str]:
    """What differs between the files that a stream was and is read from, in words; see `Stream.record`."""
    if len(saved) != len(files):
        names = sorted({row[0] for row in saved} ^ {row[0] for row in files})
        return [f"{len(files)} files of data for {len(saved)}{first_five(names)}"]
    names = []
    for (old_name, old_stamp), (name, stamp) in zip(saved, files, strict=True):
        if old_name != name or (old_stamp != stamp and old_stamp and stamp):
            names.append(name)
    return [f"{len(names)} of {len(files)} files of data{first_five(names)}"] if names else []


def first_five(names: Sequence[str]) -> str:
    """Some names in brackets, and how many others there are; nothing of none."""
    if not names:
        return ""
    more = f" and {len(names) - 5} more" if len(names) > 5 else ""
    return f" ({', '.join(names[:5])}{more})"


def model_changes(saved: Mapping[str, str], models: Mapping[str, str]) -> list[str]:
    """The parts of a run's models that differ, in words."""
    changed = [part for part in sorted({*saved, *models}) if saved.get(part) != models.get(part)]
    return [f"weights or files of {', '.join(changed)}"] if changed else []


# ---------------------------------------------------------------------------------------------------------------------
# One run at a time in a folder
# ---------------------------------------------------------------------------------------------------------------------

RUN_FILE = ".run.json"  # the process that writes in a folder; it holds a lock on this file

held_locks: list[IO[str]] = []  # of this process' run, at most one


def claim_output_dir(accelerator: Accelerator, output_dir: Path, results: Iterable[Path]) -> None:
    """Makes the folder of a run, which no other run writes in until this one ends, and sweeps it.

    A folder in use ends the run with exit code 2. For `results` see `remove_partial`. To be called by all processes.
    """
    with writing(output_dir):
        output_dir.mkdir(parents=True, exist_ok=True)
    check_shared_folder(accelerator, output_dir)
    problems = []
    if writes_files(accelerator):
        if lock_folder(output_dir):
            remove_partial(output_dir, results)
        else:
            problems = [in_use(output_dir)]
    problems = gather_objects(problems)
    if problems:
        fail(accelerator, problems)


SHARED_WITHIN = 30.0  # seconds after which a file is seen on other machines, whose systems keep lists of files


def check_shared_folder(accelerator: Accelerator, output_dir: Path) -> None:
    """Ends the run with exit code 2 if `output_dir` is another folder on other machines: each process writes its part
    of a checkpoint, and reads what others have written. With --save_on_each_node it must be another one on each
    machine. To be called by all processes."""
    if accelerator.num_processes == 1:
        return
    (token,) = broadcast_object_list([secrets.token_hex(4)])
    probe = output_dir / f".shared.{token}.partial"  # a name that `remove_partial` sweeps
    is_taken = False  # by another machine
    if writes_files(accelerator):
        with writing(probe):
            try:
                probe.touch(exist_ok=False)
            except FileExistsError:
                is_taken = True
    accelerator.wait_for_everyone()
    deadline = time.monotonic() + SHARED_WITHIN
    while not probe.exists() and time.monotonic() < deadline:
        time.sleep(0.2)
    hosts = gather_objects([(socket.gethostname(), probe.exists(), is_taken)])
    if writes_files(accelerator) and not is_taken:
        probe.unlink()
    for process, (host, is_seen, is_taken) in enumerate(hosts):
        if is_taken:
            message = (
                f"--save_on_each_node: process {process} on {host} and another machine have one --output_dir "
                f"{output_dir}: leave the flag out, or choose a folder on each machine's own disk"
            )
            fail(accelerator, [message])
        if not is_seen:
            message = (
                f"--output_dir {output_dir} of process {process} on {host} is not that of process 0 on {hosts[0][0]}, "
                "and every process writes its part of a checkpoint: choose a folder on a disk that all machines "
                "share, or give --save_on_each_node"
            )
            fail(accelerator, [message])


def lock_folder(output_dir: Path) -> bool:
    """Locks RUN_FILE for this process and writes who it is into it; False if another process has it locked.

    The system unlocks it when the process ends, however that happens. Processes that are forked do not have the lock.
    Where the file system has no locks, it says so in one line.
    """
    release_lock()  # of an earlier run of this process, a notebook's
    path = output_dir / RUN_FILE
    with writing(path):
        file = path.open("a")
        held_locks.append(file)
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            release_lock()
            return False
        except OSError as error:
            print(f"{output_dir}: no locks there ({error.strerror}), nothing keeps another run from writing there too")
        owner = {"pid": os.getpid(), "host": socket.gethostname(), "started": time.strftime("%Y-%m-%d %H:%M:%S")}
        file.truncate(0)
        file.write(json.dumps(owner) + "\n")
        file.flush()
    return True


def release_lock() -> None:
    """Lets other processes write in the folder of this one's run, which is over."""
    while held_locks:
        held_locks.pop().close()


def is_in_use(output_dir: Path) -> bool:
    """Whether another process is writing in a folder; False where nobody can tell."""
    try:
        with (output_dir / RUN_FILE).open() as file:
            fcntl.lockf(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:
        pass
    return False


def in_use(output_dir: Path) -> str:
    """The problem of a folder in which another process writes."""
    owner = {"pid": "?", "host": "?", "started": "?", **read_json(output_dir / RUN_FILE)}
    return (
        f"--output_dir {output_dir}: another run writes there, process {owner['pid']} on {owner['host']}, started "
        f"{owner['started']}: wait for its end, or choose another folder"
    )


# ---------------------------------------------------------------------------------------------------------------------
# Finding and verifying checkpoints
# ---------------------------------------------------------------------------------------------------------------------

STATE_FILE = "trainer_state.json"  # the step and the settings of the run
CHECKSUMS = "checksums.json"  # {file: SHA-256} of all other files
# Files of `register_tensor_checkpointing`, which has more than one where there is much
TENSORS_FILE = "state.safetensors"
TENSORS_FILES = re.compile(r"state(-\d{5})?\.safetensors")


def find_checkpoints(output_dir: Path | str) -> list[Path]:
    """The folders checkpoint-N in `output_dir`, oldest first. What has this name was complete when it got it."""
    folders = [folder for folder in Path(output_dir).glob("checkpoint-*") if folder.name[11:].isdecimal()]
    return sorted(folders, key=lambda folder: int(folder.name[11:]))


def checkpoint_to_resume(output_dir: Path | str, resume_from_checkpoint: str | None) -> Path | None:
    """The folder that --resume_from_checkpoint names: None without the flag, or for "latest" without a checkpoint."""
    if not resume_from_checkpoint:
        return None
    if resume_from_checkpoint == "latest":
        checkpoints = find_checkpoints(output_dir)
        return checkpoints[-1] if checkpoints else None
    inside = Path(output_dir) / resume_from_checkpoint  # diffusers' scripts take the name alone
    return inside if inside.is_dir() else Path(resume_from_checkpoint)


def agreed_checkpoint(
    accelerator: Accelerator, output_dir: Path, resume_from_checkpoint: str | None
) -> tuple[Path | None, list[str]]:
    """`checkpoint_to_resume`, and problems. With --save_on_each_node "latest" is the last one that every machine has.

    A run that is killed while it saves leaves one more on some machines, which is passed over, and deleted by
    `load_checkpoint`. Where a machine lacks more, as a new one with an empty disk does, or has another one of this
    name, whose settings are damaged or those of another run, that is a problem: a run does not go back by more, nor
    begin anew, while a machine has checkpoints. To be called by all processes.
    """
    checkpoint = checkpoint_to_resume(output_dir, resume_from_checkpoint)
    if not accelerator.project_configuration.save_on_each_node or not resume_from_checkpoint:
        return checkpoint, []
    folders = find_checkpoints(output_dir) if resume_from_checkpoint == "latest" else [checkpoint]
    # by "saved_as" it is told from that of another run which is named by the same step
    own = {folder: checkpoint_state(folder).get("saved_as") for folder in folders if folder is not None}
    named = {folder.name: saved_as for folder, saved_as in own.items()}
    machines = gather_objects([(socket.gethostname(), output_dir, named)] if writes_files(accelerator) else [])

    def is_everywhere(folder: Path) -> bool:
        return all(found.get(folder.name, "") == own[folder] for *_, found in machines)

    common = [folder for folder in own if is_everywhere(folder)]
    names = {name for *_, found in machines for name in found}
    order = sorted(names, key=lambda name: (len(name), name))  # by their steps
    later = order[order.index(common[-1].name) + 1 :] if common else order
    if not later:
        return (common[-1] if common else None), []
    is_lacking = any(later[0] not in found for *_, found in machines)  # else it is damaged, or of another run
    if common and len(later) == 1 and is_lacking:
        accelerator.print(
            f"{later[0]} is not on every machine, as the run was killed while it saved: going on from "
            f"{common[-1].name}; {later[0]} is deleted where it is"
        )
        return common[-1], []
    newest = later[-1]
    # one whose settings can be read, if there is one
    owner, found_in, found = max(machines, key=lambda machine: (bool(machine[2].get(newest)), newest in machine[2]))
    lacking = [f"{folder} on {host}" for host, folder, names in machines if names.get(newest, "") != found[newest]]
    return None, [
        f"--resume_from_checkpoint {resume_from_checkpoint}: {', '.join(lacking)} lacks the {newest} that "
        f"{owner} has in {found_in}: copy the folder {newest} there, or delete what not all machines have"
    ]


def read_json(path: Path) -> dict[str, Any]:
    """The object in a file; {} if it is absent, damaged or something else."""
    try:
        value = json.loads(path.read_text())
    except (OSError, ValueError, RecursionError):
        return {}
    return value if isinstance(value, dict) else {}


def checkpoint_state(checkpoint: Path) -> dict[str, Any]:
    """The run's settings as `save_checkpoint` got them, with global_step; {} if the file is damaged."""
    state = read_json(checkpoint / STATE_FILE)
    if type(state.get("global_step")) is not int:
        return {}
    digest = read_json(checkpoint / CHECKSUMS).get(STATE_FILE)
    if digest is not None and checksums(checkpoint, [STATE_FILE]) != {STATE_FILE: digest}:
        return {}
    return state


def checkpoint_damage(checkpoint: Path, accelerator: Accelerator | None = None) -> list[str]:
    """The files of a checkpoint that are not as `save_checkpoint` left them, in one sentence; [] if all are.

    With an `accelerator` each process reads its share of the files, and all get the same answer: to be called by all
    of them.
    """
    place, number = place_on_disk(accelerator) if accelerator else (0, 1)
    saved = read_json(checkpoint / CHECKSUMS)
    damaged = []
    if STATE_FILE not in saved:  # the list itself is damaged: nothing else can be said
        damaged = [CHECKSUMS]
    else:
        names = list(saved)[place::number]
        found = checksums(checkpoint, set(names).intersection(file_names(checkpoint)))
        damaged = [name for name in names if found.get(name) != saved[name]]
    if not checkpoint_state(checkpoint) and STATE_FILE not in damaged:
        damaged.append(STATE_FILE)
    if accelerator:
        if accelerator.project_configuration.save_on_each_node:
            damaged = [f"{name} on {socket.gethostname()}" for name in damaged]
        damaged = gather_objects(damaged)
    damaged = sorted(set(damaged))
    if not damaged:
        return []
    others = [folder.name for folder in find_checkpoints(checkpoint.parent) if folder.name != checkpoint.name]
    remedy = f"continue from {others[-1]}" if others else "start again"
    return [
        f"--resume_from_checkpoint {checkpoint}: {', '.join(damaged)} missing or damaged; delete {checkpoint} and "
        f"{remedy} with --resume_from_checkpoint latest"
    ]


def file_names(folder: Path) -> list[str]:
    """The names of the files in a folder and below, the largest first."""
    paths = sorted(path for path in folder.rglob("*") if path.is_file())
    paths.sort(key=lambda path: path.stat().st_size, reverse=True)
    return [path.relative_to(folder).as_posix() for path in paths]


def checksums(folder: Path, names: Iterable[str] | None = None) -> dict[str, str]:
    """{name: SHA-256} of these files in a folder and below, without `names` of all."""
    digests = {}
    for name in file_names(folder) if names is None else names:
        with (folder / name).open("rb") as file:
            digests[name] = hashlib.file_digest(file, "sha256").hexdigest()
    return digests


# ---------------------------------------------------------------------------------------------------------------------
# Saving and loading
# ---------------------------------------------------------------------------------------------------------------------


def save_checkpoint(
    accelerator: Accelerator,
    output_dir: Path | str,
    step: int,
    run: Mapping[str, Any],
    total_limit: int | None = None,
) -> Path:
    """Saves the run as `output_dir`/checkpoint-`step`, then deletes the oldest ones beyond `total_limit`.

    `step` counts the updates of the optimizer, those that were skipped included: a resumed run begins with update
    `step` + 1. `run` are its `run_settings`, compared on resume, with more that a script wants back (JSON).

    Guaranteed whenever the process or the machine stops: a folder named checkpoint-N is complete, because it is
    written under another name, flushed to the disk and renamed; and no checkpoint is deleted before a newer one is
    complete. One of this step that is there is that of this run, and is kept. To be called by all processes, each of
    which writes its part and hashes its share of the files. With --save_on_each_node each machine has all of it in
    its own `output_dir`, and deletes nothing before all machines have the newer one.
    """
    output_dir = Path(output_dir)
    checkpoint = output_dir / f"checkpoint-{step}"
    if checkpoint.is_dir():
        return checkpoint
    partial = output_dir / f".checkpoint-{step}.partial"
    place, number = place_on_disk(accelerator)
    state = {"global_step": step, **run}
    if accelerator.project_configuration.save_on_each_node:  # the same in all copies of one checkpoint
        (state["saved_as"],) = broadcast_object_list([secrets.token_hex(8)])
    try:
        with writing(checkpoint):
            if place == 0:
                for leftover in output_dir.glob(".checkpoint-*.partial"):  # of a run that was killed
                    shutil.rmtree(leftover)
                partial.mkdir(parents=True)
                (partial / STATE_FILE).write_text(json.dumps(state, indent=2))
            accelerator.wait_for_everyone()
            accelerator.save_state(str(partial))
            accelerator.wait_for_everyone()  # all have written their part
            # as the process at place 0 sees the folder
            names = gather_objects(file_names(partial) if place == 0 else [], disk_group(accelerator))
            share = names[place::number]
            found = checksums(partial, share)
            for name in share:
                flush_to_disk(partial / name)
            digests = dict(gather_objects(list(found.items()), disk_group(accelerator)))
            if place == 0:
                ordered = {name: digests[name] for name in names}
                (partial / CHECKSUMS).write_text(json.dumps(ordered, indent=2))
                follow_umask(partial)
                flush_to_disk(partial / CHECKSUMS)
                for path in [*(path for path in partial.rglob("*") if path.is_dir()), partial]:
                    flush_to_disk(path)
                partial.rename(checkpoint)
                flush_to_disk(output_dir)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    accelerator.wait_for_everyone()
    if place == 0 and total_limit:
        delete_checkpoints(find_checkpoints(output_dir)[:-total_limit])
    accelerator.wait_for_everyone()
    return checkpoint


def delete_checkpoints(folders: Iterable[Path]) -> None:
    """Deletes checkpoints; one that is deleted in part has another name already."""
    for folder in folders:
        with writing(folder):
            to_delete = folder.rename(folder.with_name(f".{folder.name}.partial"))
            shutil.rmtree(to_delete)


def load_checkpoint(accelerator: Accelerator, checkpoint: Path | None, lr_scheduler: AcceleratedScheduler) -> int:
    """Restores what `save_checkpoint` saved and returns its step; 0 for None.

    Ends the run with exit code 2 if the files do not fit the models and the optimizer.
    """
    if checkpoint is None:
        return 0
    with exit_if_unreadable(checkpoint):
        accelerator.load_state(str(checkpoint))
    accelerator.print(f"Resuming from {checkpoint}")
    scheduler = lr_scheduler.scheduler
    saved_rates = scheduler.get_last_lr()
    # by the schedule of this run, which may be longer than the one that was saved
    rates = [
        base * schedule(scheduler.last_epoch)
        for base, schedule in zip(scheduler.base_lrs, scheduler.lr_lambdas, strict=True)
    ]
    if rates != saved_rates:
        accelerator.print(
            f"The schedule of this run has another length: its learning rate goes on at {rates[0]:.3g}, where the "
            f"saved run's would be {saved_rates[0]:.3g}"
        )
    scheduler._last_lr = rates
    for group, rate in zip(scheduler.optimizer.param_groups, rates, strict=True):
        group["lr"] = rate  # no tensor of the optimizer's state, so not restored with a sharded one
    state = checkpoint_state(checkpoint)
    begun_with = state.get("the number of processes", accelerator.num_processes)
    if begun_with != accelerator.num_processes:
        accelerator.print(
            f"The run began with {begun_with} processes and goes on with {accelerator.num_processes}: its steps see "
            "and draw the same, up to rounding"
        )
    step = state["global_step"]
    accelerator.wait_for_everyone()
    if accelerator.project_configuration.save_on_each_node and writes_files(accelerator):
        folders = find_checkpoints(accelerator.project_configuration.project_dir)
        delete_checkpoints(folder for folder in folders if int(folder.name[11:]) > step)  # not every machine has these
    accelerator.step = step * accelerator.gradient_accumulation_steps  # saved per process, of which there may be more
    return step


def register_tensor_checkpointing(accelerator: Accelerator, tensors: Mapping[str, Mapping[str, torch.Tensor]]) -> None:
    """Makes checkpoints hold these tensors, {prefix: {name: tensor}}, instead of the models that were prepared.

    They go to TENSORS_FILE, from FILE_BYTES on to several files, and come back in place. Every process has all of
    them, so one on each disk writes them; a file that reshards, as that of `register_sharded_checkpointing`, would be
    a folder of parts with one part. The optimizer's state is saved by accelerate.
    """

    def live_tensors() -> dict[str, torch.Tensor]:
        found = {}
        for prefix, named in tensors.items():
            for name, tensor in named.items():
                found[f"{prefix}/{name}"] = tensor.detach()
        return found

    def save(models: list, weights: list, output_dir: str) -> None:
        found = live_tensors()
        numbers = file_numbers(found)
        if writes_files(accelerator):
            for number in set(numbers.values()):
                file_name = TENSORS_FILE if number == 1 else f"state-{number:05d}.safetensors"
                part = {name: value.cpu().contiguous() for name, value in found.items() if numbers[name] == number}
                save_file(part, Path(output_dir) / file_name)
        weights.clear()  # accelerate would save them too

    @torch.no_grad()
    def load(models: list, input_dir: str) -> None:
        found = live_tensors()
        saved = {}
        for path in Path(input_dir).iterdir():
            if TENSORS_FILES.fullmatch(path.name):
                saved |= load_file(path)
        for name, value in found.items():
            value.copy_(saved[name])
        models.clear()

    accelerator.register_save_state_pre_hook(save)
    accelerator.register_load_state_pre_hook(load)


def register_sharded_checkpointing(
    accelerator: Accelerator,
    model: torch.nn.Module,
    optimizer: torch.optim.Optimizer,
    teacher: Mapping[str, torch.Tensor] | None = None,
) -> None:
    """Makes checkpoints hold a model that is split over the processes, as far as it is trained, and its optimizer.

    `teacher` {name: tensor}, split like the model, is saved with it. Each process writes its part as safetensors to
    the folder sharded/, by torch.distributed.checkpoint, whose parts any number of processes can read. All tensors
    come back in place.
    """
    trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}

    def model_tensors() -> dict[str, torch.Tensor]:
        found = {f"model.{name}": parameter.detach() for name, parameter in trained.items()}
        for name, tensor in (teacher or {}).items():
            found[f"teacher.{name}"] = tensor
        return found

    def optimizer_tensors() -> dict[str, torch.Tensor]:
        options = StateDictOptions(flatten_optimizer_state_dict=True)
        flat = get_optimizer_state_dict(model, optimizer, options=options)
        return {f"optimizer.{name}": value for name, value in flat.items() if isinstance(value, torch.Tensor)}

    def save(models: list, weights: list, output_dir: str) -> None:
        found = model_tensors()
        if optimizer.state:  # it is empty before the first step, and asking for it would take one
            found |= optimizer_tensors()
        save_sharded(found, Path(output_dir) / "sharded", disk_group(accelerator))
        weights.clear()

    def load(models: list, input_dir: str) -> None:
        folder = Path(input_dir) / "sharded"
        if not folder.is_dir():
            raise ValueError(f"no folder {folder.name} in it: it was saved without --fsdp, or by an earlier version")
        saved = dcp.HuggingFaceStorageReader(str(folder)).read_metadata().state_dict_metadata
        found = model_tensors()
        if any(name.startswith("optimizer.") for name in saved):
            found |= {name: tensor for name, tensor in optimizer_tensors().items() if name in saved}
        load_sharded(found, folder, disk_group(accelerator))
        for name, parameter in trained.items():  # asking for the state made one for those that never had a gradient
            if not any(key.startswith(f"optimizer.state.{name}.") for key in saved):
                optimizer.state.pop(parameter, None)
        models.clear()

    accelerator.register_save_state_pre_hook(save)
    accelerator.register_load_state_pre_hook(load)


FILE_BYTES = 2**30  # of a process' part in one file: as much is in memory twice while it is written


def file_numbers(tensors: Mapping[str, torch.Tensor]) -> dict[str, int]:
    """{name: number, from 1, of the file that a tensor goes to}: about FILE_BYTES of this process in each."""
    numbers = {}
    num_bytes = 0
    for name, tensor in tensors.items():
        numbers[name] = 1 + num_bytes // FILE_BYTES
        num_bytes += own_part(tensor).nbytes
    return numbers


def save_sharded(tensors: Mapping[str, torch.Tensor], folder: Path, group: Any) -> None:
    """Writes tensors that are split over the processes to safetensors files in `folder`, each process its parts.

    All processes of a `group` that holds all parts call it. A process holds copies of about FILE_BYTES at a time.
    """
    with own_errors():
        writer = dcp.HuggingFaceStorageWriter(
            str(folder), fqn_to_index_mapping=file_numbers(tensors), save_distributed=True
        )
        dcp.save(dict(tensors), storage_writer=writer, process_group=group)


def load_sharded(tensors: Mapping[str, torch.Tensor], folder: Path, group: Any) -> None:
    """Reads what `save_sharded` wrote on any number of processes into tensors of the same names, in place.

    All processes of the `group` call it.
    """
    with own_errors():
        reader = dcp.HuggingFaceStorageReader(str(folder))
        dcp.load(dict(tensors), storage_reader=reader, process_group=group)


@contextmanager
def own_errors() -> Iterator[None]:
    """Raises a process' own error, where torch.distributed.checkpoint packs those of all into a BaseException."""
    try:
        yield
    except dcp.CheckpointException as error:
        wrapped = next(iter(error.failures.values()))
        raise wrapped[0] from None


# ---------------------------------------------------------------------------------------------------------------------
# Stopping before the end
# ---------------------------------------------------------------------------------------------------------------------

MAX_SKIPPED_STEPS = 10  # in a row, because the loss or the gradient was not finite


# Ctrl-C or a notebook's button; a scheduler; Slurm before a job's time is over; a terminal that was closed
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP)
SAME_SIGNAL = 2.0  # seconds: Ctrl-C reaches torchrun and its processes, and torchrun sends them another signal


class Interruption:
    """What signals ask of the run in this process.

    Where there is nothing to save, the first one ends it at once. Between `start_saving` and `stop_saving` the first
    one is a request: the training loop, which asks `stop_agreed`, saves and stops after its step; another one ends the
    run at once.
    """

    def __init__(self) -> None:
        self.reset(None)

    def reset(self, output_dir: Path | None) -> None:
        """A run begins that writes to `output_dir`, or has ended (None)."""
        self.output_dir = output_dir
        self.number: int | None = None  # of the first signal
        self.time = 0.0  # of the last one that counted
        self.pid = os.getpid()
        self.saves = False
        self.is_trained = False

    def install(self) -> None:
        """Makes this the handler of SIGNALS; only a main thread can."""
        if threading.current_thread() is not threading.main_thread():
            return
        for number in SIGNALS:
            if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN:  # which nohup asks for
                signal.signal(number, self.handle)

    def handle(self, number: int, frame: FrameType | None) -> None:
        if os.getpid() != self.pid:  # forked, to read data: it lives as long as its parent wants
            if number == signal.SIGTERM:
                signal.signal(number, signal.SIG_DFL)
                signal.raise_signal(number)
            return
        now = time.monotonic()
        if self.number is not None and now - self.time < SAME_SIGNAL:
            return
        at_once = self.number is not None or not self.saves
        self.number = self.number or number
        self.time = now
        if at_once:
            raise KeyboardInterrupt

    def start_saving(self) -> None:
        """From here on a run has something to save. A handler that a library has put in place of this one goes.

        An interrupt that came while Python cleared something up was lost, and comes here.
        """
        if self.number is not None:
            raise KeyboardInterrupt
        self.saves = True
        self.install()

    def stop_saving(self) -> None:
        """From here on all is saved."""
        self.saves = False
        self.is_trained = True
        if self.number is not None:
            raise KeyboardInterrupt

    def is_requested(self) -> bool:
        """Whether a signal has come to this process."""
        if self.number is None:
            return False
        drop_closed_outputs()
        return True

    def announce(self, wakeups: int) -> None:
        """A thread that says what the first signal does, whatever the main thread waits for: an accelerator's step.

        The file `wakeups` gets the number of each signal when it comes, and 0 at the end.
        """
        is_said = False
        while number := ord(os.read(wakeups, 1)):
            if number in SIGNALS and self.saves and not is_said:
                print_once("Saving after this step; once more to stop at once")
                is_said = True


interruption = Interruption()  # a process has one handler of each signal


class LostFileError(OSError):
    """A file that a run has written, and needs, can no longer be read."""


@contextmanager
def catch_signals(output_dir: Path) -> Iterator[None]:
    """Within it SIGNALS end the run as `interruption` says, with one line and exit code 128 + their number, and a
    `LostFileError` ends it with one message.

    Afterwards they mean what they meant before, and the folder is free for other processes, whatever ended the run: a
    notebook goes on.
    """
    interruption.reset(output_dir)
    if threading.current_thread() is not threading.main_thread():  # which gets no signal, and may handle none
        try:
            yield
        except LostFileError as error:
            raise lost_file(error) from None
        finally:
            interruption.reset(None)
            release_lock()
        return
    handlers = {number: signal.getsignal(number) for number in SIGNALS}
    wakeups, wakeup_writer = os.pipe()
    os.set_blocking(wakeup_writer, False)
    thread = threading.Thread(target=interruption.announce, args=[wakeups], daemon=True)
    thread.start()
    previous_writer = signal.set_wakeup_fd(wakeup_writer, warn_on_full_buffer=False)
    try:
        interruption.install()
        yield
    except KeyboardInterrupt:
        print_once(f"Interrupted at once; {what_is_saved()}")
        raise SystemExit(128 + (interruption.number or signal.SIGINT)) from None
    except LostFileError as error:
        raise lost_file(error) from None
    finally:
        release_frames(sys.exc_info()[1])
        for number, handler in handlers.items():
            signal.signal(number, handler)
        signal.set_wakeup_fd(previous_writer)
        os.write(wakeup_writer, bytes(1))
        thread.join()
        os.close(wakeups)
        os.close(wakeup_writer)
        interruption.reset(None)
        release_lock()


def release_frames(error: BaseException | None) -> None:
    """Lets go of what the functions held that a SystemExit ended: a DataLoader ends its workers then.

    Otherwise they are asked to end by SIGTERM when Python ends, which `outlive_signals` puts off for half a minute.
    """
    if isinstance(error, SystemExit):
        while error is not None:
            traceback.clear_frames(error.__traceback__)
            error = error.__context__


def what_is_saved() -> str:
    """The end of a sentence: what the run in this process has left."""
    if interruption.is_trained:
        return f"what was trained is saved in {interruption.output_dir}"
    checkpoints = find_checkpoints(interruption.output_dir or Path())
    if not checkpoints:
        return "no checkpoint was saved"
    return f"the last checkpoint is {checkpoints[-1]}: continue with --resume_from_checkpoint latest"


def lost_file(error: LostFileError) -> SystemExit:
    """The end of a run that needs the file."""
    return SystemExit(f"\n{Path(sys.argv[0]).name}: error: {error}{remedy()}")


def print_once(text: str) -> None:
    """Prints a line, in one of several processes, below a progress bar."""
    drop_closed_outputs()
    if os.environ.get("RANK", "0") == "0":
        with suppress(OSError):
            print(f"\n{text}", file=sys.stderr, flush=True)


def drop_closed_outputs() -> None:
    """What is printed goes nowhere if its reader has gone: a terminal, or a `| tee` that Ctrl-C has ended as well.

    Else printing would end the run before it is saved.
    """
    for descriptor in (1, 2):
        poll = select.poll()
        poll.register(descriptor, 0)
        if any(event & (select.POLLERR | select.POLLHUP) for _, event in poll.poll(0)):
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, descriptor)
            os.close(nowhere)


def stop_agreed(accelerator: Accelerator) -> bool:
    """Whether a signal has come to any of the processes, all of which call this."""
    requested = torch.tensor(float(interruption.is_requested()), device=accelerator.device)
    return bool(accelerator.reduce(requested, reduction="sum"))


def stops_alone(accelerator: Accelerator) -> bool:
    """Whether a signal has come to this process and no other one has to agree."""
    return accelerator.num_processes == 1 and interruption.is_requested()


def outlive_signals(worker: int) -> None:
    """A DataLoader's worker_init_fn: a signal to all processes leaves its workers to the one that trains.

    It ends them when it has saved. One that is asked to end and is not ended so dies after half a minute.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda number, frame: signal.alarm(30))


REMEDY_NOT_FINITE = (
    "try a lower --learning_rate, --max_grad_norm 1, --mixed_precision bf16 or no instead of fp16, and look for "
    "damaged images or weights"
)


def check_steps(taken: Sequence[bool], step: int, *, done: bool) -> None:
    """Says that the last step was skipped, the first, second, fourth, eighth ... time; ends the run if all are.

    `taken` says of each step of this process whether it changed weights; one whose loss or gradient is not finite does
    not. The run ends after MAX_SKIPPED_STEPS in a row, or when it is `done` and none was taken.
    """
    if taken[-1]:
        return
    num_skipped = taken.count(False)
    if num_skipped.bit_count() == 1:
        print_once(
            f"Step {step} was skipped, its loss or gradient is not finite: {num_skipped} of {len(taken)} steps so far"
        )
    last = taken[-MAX_SKIPPED_STEPS:]
    if any(last) or (len(last) < MAX_SKIPPED_STEPS and not done):
        return
    raise SystemExit(
        f"\nStopped at step {step}: the last {len(last)} losses or gradients were not finite, nothing was trained by "
        f"them; {what_is_saved()}. First {REMEDY_NOT_FINITE}"
    )


def check_taken(taken: Sequence[bool], output_dir: Path, *, has_scaler: bool) -> None:
    """Ends a run, whose results are written, as failed if more than a tenth of its steps was skipped.

    A gradient scaler (fp16) finds its scale by steps that it skips: up to 16, from 65,536 down to 1.
    """
    num_skipped = taken.count(False)
    if num_skipped > len(taken) / 10 + (16 if has_scaler else 0):
        raise SystemExit(
            f"\n{num_skipped} of {len(taken)} steps were skipped, their losses or gradients were not finite: what is "
            f"in {output_dir} is trained less than was asked for; {REMEDY_NOT_FINITE}"
        )


def stop_interrupted(accelerator: Accelerator, step: int, checkpoint: Path) -> None:
    """Ends a run that a signal interrupted, on this process (128 + its number) or another (1), after it was saved."""
    accelerator.free_memory()
    accelerator.end_training()
    print_once(f"Interrupted at step {step}, saved {checkpoint}; continue with --resume_from_checkpoint latest")
    raise SystemExit(128 + interruption.number if interruption.number else 1)


# ---------------------------------------------------------------------------------------------------------------------
# Writing files
# ---------------------------------------------------------------------------------------------------------------------


PARTIAL_CHECKPOINT = re.compile(r"\.checkpoint-\d+\.partial")  # of `save_checkpoint`
PARTIAL_FILE = re.compile(r"\..+\.[0-9a-f]{8}\.partial|\.tmp[0-9A-Za-z]{6}")  # of `atomic_write`, of safetensors


@contextmanager
def atomic_write(path: Path | str, *, durable: bool = True) -> Iterator[Path]:
    """Writes a file as a whole or not at all: `with atomic_write(path) as partial:` fill the file `partial`.

    `partial` is a hidden file beside `path`, whose folder is created. At the end it is flushed to the disk and
    renamed, so `path` is the old file or the complete new one whenever the machine stops. Its name is its own, so
    several processes may write the same `path`. After an error it is removed, and where the disk is full or read-only
    the run ends with one message, see `writing`.

    Files that can be made again, such as a cache's, need not be `durable`: these are not flushed.
    """
    path = Path(path)
    partial = path.with_name(f".{path.name}.{secrets.token_hex(4)}.partial")
    try:
        with writing(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            partial.touch()
            mode = partial.stat().st_mode  # by the umask; safetensors' save_file makes files for their owner alone
            yield partial
            partial.chmod(mode)
            if durable:
                flush_to_disk(partial)
            partial.replace(path)
    finally:
        with suppress(OSError):
            partial.unlink(missing_ok=True)


def remove_partial(output_dir: Path, results: Iterable[Path] = ()) -> None:
    """Deletes what a killed run was writing: partial files of `atomic_write` and partial checkpoints.

    Runs with a folder in `output_dir` are left alone. `results` are the files of its LoRAs, which may stand beside
    `output_dir`, with others' there; NAME.safetensors stands for NAME-000010.safetensors, of an epoch, too, unless
    that is a run with a folder of its own. To be called by one process, while no other one writes.
    """
    with writing(output_dir):
        for result in results:
            own = re.compile(
                rf"\.({re.escape(result.stem)}(-\d{{6}})?){re.escape(result.suffix)}\.[0-9a-f]{{8}}\.partial"
            )
            for path in list(result.parent.glob(".*.partial")):
                name = own.fullmatch(path.name)
                if name is None:
                    continue
                is_other_run = name[2] and path.with_name(name[1]).is_dir()
                if not is_other_run:
                    path.unlink()
        for folder, folder_names, file_names in os.walk(output_dir):
            own = Path(folder)
            if own != output_dir and (own / RUN_FILE).exists():  # of another run, which may be writing
                folder_names.clear()
                continue
            for name in filter(PARTIAL_CHECKPOINT.fullmatch, folder_names):
                shutil.rmtree(own / name)
            for name in filter(PARTIAL_FILE.fullmatch, file_names):
                (own / name).unlink()


def keep_earlier_results(
    accelerator: Accelerator, output_dir: Path, results: Iterable[Path], *, first_step: int, max_train_steps: int
) -> None:
    """Moves what an earlier run left in `output_dir` to `output_dir`/step-NNNNNN, its last step, and says so.

    That is `results`, files and folders, of a run that ended sooner than this one that continues it after `first_step`
    steps. For a run that begins anew (0) it is its validation images, too: they are none of this run's. To be called
    before metrics.jsonl, which tells the last step, is written.
    """
    rows = read_metrics(output_dir / "metrics.jsonl") if accelerator.is_main_process else []
    (last_step,) = broadcast_object_list([rows[-1]["step"] if rows else 0])
    if not writes_files(accelerator):
        return
    is_redone = first_step > 0 and last_step >= max_train_steps
    if last_step == 0 or is_redone:
        return
    if first_step == 0:
        results = [*results, output_dir / "validation"]
    found = [path for path in results if path.exists()]
    if not found:
        return
    kept = unused_path(output_dir / f"step-{last_step:06d}")
    with writing(kept):
        kept.mkdir()
        for path in found:
            path.rename(kept / path.name)
    accelerator.print(f"  {'kept':15}results of the run that ended at step {last_step}, in {kept.name}/")


def unused_path(path: Path) -> Path:
    """The path itself, or if there is a file already, NAME-1, NAME-2, ...: what a program draws replaces nothing."""
    candidate = path
    number = 0
    while candidate.exists():
        number += 1
        candidate = path.with_stem(f"{path.stem}-{number}")
    return candidate


@contextmanager
def writing(path: Path | str) -> Iterator[None]:
    """Ends the run with one message if `path`, a file or a folder, cannot be written within the context.

    For what `atomic_write` cannot replace as one file: folders, files that grow, and those that trackers write.
    """
    path = Path(path).absolute()
    try:
        yield
    except (OSError, SafetensorError, RuntimeError) as error:
        reason = write_error(error)
        if reason is None:
            raise
        other = getattr(error, "filename", None)
        if other and not Path(str(other)).absolute().is_relative_to(path.parent):
            reason += f": {other}"
        raise SystemExit(
            f"\n{Path(sys.argv[0]).name}: error: {path} cannot be written ({reason}){room(path, error)}{remedy()}"
        ) from None


def write_error(error: Exception) -> str | None:
    """Why a file could not be written, as the system says it; None for an error that has another cause."""
    if isinstance(error, OSError | SafetensorError):
        return getattr(error, "strerror", None) or str(error)
    if re.search("PytorchStreamWriter|iostream|unexpected pos", str(error)):  # torch.save's RuntimeError
        return str(error).splitlines()[0]
    return None


def room(path: Path, error: Exception) -> str:
    """What is free where `path` is, as a part of a sentence, unless the system gave another reason for the error."""
    if isinstance(error, OSError) and error.errno not in (None, errno.ENOSPC, errno.EDQUOT):
        return ""
    return f"; {shutil.disk_usage(nearest_folder(path.parent)).free / 2**20:.1f} MiB are free there"


def remedy() -> str:
    """The end of a message of an error while files are read or written: what a run has left, nothing without a run."""
    if interruption.output_dir is None:
        return ""
    return f"; {what_is_saved()}"


def follow_umask(folder: Path) -> None:
    """Gives all files in a folder and below the mode of a new one: safetensors' save_file makes them 0600."""
    new = folder / f".{secrets.token_hex(4)}"
    new.touch()
    mode = new.stat().st_mode
    new.unlink()
    for path in folder.rglob("*"):
        if path.is_file():
            path.chmod(mode)


def flush_to_disk(path: Path) -> None:
    """fsync of a file or folder."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
