"""The folder of a run: atomic files, checkpoints that are whole or absent, resume, signals."""

import hashlib
import json
import math
import os
import re
import secrets
import shutil
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from common.arguments import reading
from common.models import check_processes, local

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch.distributed.tensor import DTensor


MAX_SKIPPED_STEPS = 10  # in a row, for want of a finite loss

# Flags that a resumed run may change: they do not touch what a step computes, or only how many there are.
CHANGEABLE = {
    *("allow_tf32", "cache_dir", "gradient_checkpointing", "offload", "dataloader_num_workers", "depth_batch_size"),
    *("cache_latents", "cache_latents_to_disk", "cache_text_encoder_outputs_to_disk", "disk_cache_dir"),
    *("cache_prompts", "prior_generation_precision", "sample_batch_size"),
    *("max_train_steps", "num_train_epochs", "checkpointing_steps", "checkpoints_total_limit", "local_rank"),
    *("validation_prompt", "validation_image", "validation_mask", "validation_steps", "validation_epochs"),
    *("num_validation_images", "validation_width", "validation_height", "validation_samplers"),
    *("final_validation_prompt", "skip_final_inference", "resume_from_checkpoint"),
    *("output_dir", "output_name", "save_format", "save_every_n_epochs", "logging_dir", "report_to", "verbose"),
    *("upcast_before_saving", "push_to_hub", "hub_token", "hub_model_id"),
}

CHECKSUMS = "checksums.json"  # of a checkpoint's files


def run_settings(args, num_samples, num_processes):
    """{name: text} of all that must be the same when the run is resumed."""
    run = {name: str(value) for name, value in vars(args).items() if name not in CHANGEABLE}
    return run | {"the number of samples": num_samples, "the number of processes": num_processes}


def check_disk(args, needed):
    """Problems of --output_dir if its disk has less free than the bytes that a checkpoint and the result take."""
    parent = next(path for path in [args.output_dir, *args.output_dir.absolute().parents] if path.exists())
    if shutil.disk_usage(parent).free >= needed:
        return []
    return [f"--output_dir {args.output_dir}: less than {needed / 2**20:.0f} MiB free, which one checkpoint takes"]


def check_output_dir(args):
    """Problems of --output_dir and --resume_from_checkpoint."""
    folder, checkpoint = args.output_dir, checkpoint_to_resume(args.output_dir, args.resume_from_checkpoint)
    if folder.exists() and not folder.is_dir():
        return [f"--output_dir {folder}: a file of this name is in the way"]
    parent = next(path for path in [folder, *folder.absolute().parents] if path.exists())
    if not os.access(parent, os.W_OK):
        return [f"--output_dir {folder}: no permission to write there"]
    found = find_checkpoints(folder)
    if checkpoint is None and found:
        return [
            f"--output_dir {folder} holds {found[-1].name} of an earlier run: continue it with "
            "--resume_from_checkpoint latest, delete it, or choose another folder"
        ]
    if checkpoint is None:
        return []
    if checkpoint in found and not (checkpoint / "trainer_state.json").is_file():
        return checkpoint_damage(checkpoint)
    if not (checkpoint / "trainer_state.json").is_file():
        return [f"--resume_from_checkpoint {checkpoint}: no checkpoint there; use latest, or a checkpoint-N folder"]
    if found and checkpoint.resolve() != found[-1].resolve():
        return [
            f"--output_dir {folder} holds {found[-1].name}, later than {checkpoint}: delete what is later, or choose "
            "another folder"
        ]
    return []


def check_run(accelerator, args, max_train_steps, checkpoint, run):
    """Problems that show once the data and the processes are known."""
    problems = check_processes(accelerator, args)
    if args.lr_scheduler != "constant" and args.lr_warmup_steps >= max_train_steps > 0:
        warmup = args.lr_warmup_steps
        problems.append(f"--lr_warmup_steps {warmup} must be less than the {max_train_steps} steps of the run")
    return problems + checkpoint_conflicts(checkpoint, run)


def checkpoint_conflicts(checkpoint, state):
    """What keeps a run with this `state` from continuing the checkpoint (or None) exactly, as a list of sentences."""
    if checkpoint is None:
        return []
    damage, saved = checkpoint_damage(checkpoint), checkpoint_state(checkpoint)
    return damage or [
        f"--resume_from_checkpoint {checkpoint}: {name} was {saved.get(name)} there and is {value} now"
        for name, value in state.items()
        if saved.get(name, value) != value
    ]


def checkpoint_damage(checkpoint):
    """The files of a checkpoint that are not as `save_checkpoint` left them, in a sentence; [] if all are."""
    try:
        saved = json.loads((checkpoint / CHECKSUMS).read_text())
    except (OSError, ValueError, RecursionError):
        saved = None
    found = checksums(checkpoint)
    if not isinstance(saved, dict) or "trainer_state.json" not in saved:
        saved = {CHECKSUMS: ""}
    damaged = [name for name, digest in saved.items() if found.get(name) != digest]
    if not checkpoint_state(checkpoint) and "trainer_state.json" not in damaged:
        damaged.append("trainer_state.json")
    if not damaged:
        return []
    folders = find_checkpoints(checkpoint.parent)
    earlier = [folder.name for folder in folders if folder.name != checkpoint.name]
    remedy = f"go on from {earlier[-1]}" if earlier else "start anew"
    return [
        f"--resume_from_checkpoint {checkpoint}: {', '.join(damaged)} missing or damaged; delete {checkpoint} and "
        f"{remedy} with --resume_from_checkpoint latest"
    ]


def checkpoint_state(checkpoint):
    """What `save_checkpoint` was given as `state`, with global_step; {} if trainer_state.json is damaged."""
    try:
        state = json.loads((checkpoint / "trainer_state.json").read_text())
    except (OSError, ValueError, RecursionError):
        return {}
    return state if isinstance(state, dict) and type(state.get("global_step")) is int else {}


def checkpoint_to_resume(output_dir, resume_from_checkpoint):
    """The folder that --resume_from_checkpoint means: None without the flag, or for "latest" without a checkpoint."""
    if resume_from_checkpoint == "latest":
        return next(reversed(find_checkpoints(output_dir)), None)
    if not resume_from_checkpoint:
        return None
    inside = Path(output_dir) / resume_from_checkpoint  # diffusers' scripts take the name alone
    return inside if inside.is_dir() else Path(resume_from_checkpoint)


def find_checkpoints(output_dir):
    """The complete checkpoints in `output_dir`, oldest first."""
    folders = [folder for folder in Path(output_dir).glob("checkpoint-*") if folder.name[11:].isdecimal()]
    return sorted(folders, key=lambda folder: int(folder.name[11:]))


def checksums(folder):
    """{name: SHA-256} of the files in a folder."""
    digests = {}
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        with path.open("rb") as file:
            digests[path.relative_to(folder).as_posix()] = hashlib.file_digest(file, "sha256").hexdigest()
    return digests


def save_checkpoint(accelerator, output_dir, step, state, total_limit=None):
    """Saves the run to `output_dir`/checkpoint-`step`, then deletes the oldest beyond `total_limit`.

    The folder is written beside its place, flushed to the disk and renamed: it is complete or absent whenever the
    machine stops. `state` (JSON) says what a step means in this run, see `checkpoint_conflicts`. To be called by all
    processes.
    """
    output_dir = Path(output_dir)
    checkpoint, partial = output_dir / f"checkpoint-{step}", output_dir / f".checkpoint-{step}.partial"
    with writing(checkpoint, partial):
        if accelerator.is_main_process:
            for left in output_dir.glob(".checkpoint-*.partial"):  # by a run that was killed
                shutil.rmtree(left)
            partial.mkdir(parents=True)
            (partial / "trainer_state.json").write_text(json.dumps({"global_step": step, **state}, indent=2))
        accelerator.wait_for_everyone()
        accelerator.save_state(partial)
        accelerator.wait_for_everyone()
        if accelerator.is_main_process:
            (partial / CHECKSUMS).write_text(json.dumps(checksums(partial), indent=2))
            for path in [*partial.rglob("*"), partial]:
                flush_to_disk(path)
            partial.rename(checkpoint)
            flush_to_disk(output_dir)
    if accelerator.is_main_process:
        for folder in find_checkpoints(output_dir)[: -total_limit if total_limit else 0]:
            doomed = folder.rename(folder.with_name(f".{folder.name}.partial"))
            shutil.rmtree(doomed)
    accelerator.wait_for_everyone()
    return checkpoint


def load_checkpoint(accelerator, checkpoint, lr_scheduler):
    """Restores what `save_checkpoint` saved and returns its step; step 0 for None.

    Ends the run with exit code 2 if the files do not fit the models and the optimizer.
    """
    if checkpoint is None:
        return 0
    with reading(checkpoint):
        accelerator.load_state(checkpoint)
    optimizer = lr_scheduler.scheduler.optimizer
    for group, rate in zip(optimizer.param_groups, lr_scheduler.get_last_lr(), strict=True):
        group["lr"] = rate  # a sharded optimizer is restored without it
    accelerator.print(f"Resuming from {checkpoint}")
    return checkpoint_state(checkpoint)["global_step"]


def register_tensor_checkpointing(accelerator, sets, parameters, optimizer=None):
    """Makes checkpoints hold tensors of a run, not the models that were prepared: state.safetensors.

    sets {kind: function} return one tensor for each of `parameters` {name: parameter}, to be restored in place. With
    sharded parameters, or DeepSpeed's `zero_parts`, each process writes its part, and that of the optimizer's state,
    to state-N.safetensors.
    """
    sharded = any(isinstance(parameter, DTensor) for parameter in parameters.values())
    file_name = f"state-{accelerator.process_index}.safetensors" if sharded else "state.safetensors"

    def save(models, weights, output_dir):
        tensors = {
            f"{kind}/{name}": value for kind in sets for name, value in zip(parameters, sets[kind](), strict=True)
        }
        for name, parameter in parameters.items() if sharded else ():
            tensors |= {f"optimizer/{name}/{key}": local(v) for key, v in optimizer.state[parameter].items()}
        if tensors and (sharded or accelerator.is_main_process):
            tensors = {name: value.detach().cpu().contiguous() for name, value in tensors.items()}
            save_file(tensors, Path(output_dir) / file_name)
        weights.clear()

    @torch.no_grad()
    def load(models, input_dir):
        tensors = load_file(Path(input_dir) / file_name) if sets else {}
        for kind in sets:
            for name, value in zip(parameters, sets[kind](), strict=True):
                value.copy_(tensors.pop(f"{kind}/{name}"))
        for key, value in tensors.items():
            _, name, entry = key.split("/")
            value = value if entry == "step" else like_parameter(value, parameters[name])
            optimizer.state[parameters[name]][entry] = value
        models.clear()

    accelerator.register_save_state_pre_hook(save)
    accelerator.register_load_state_pre_hook(load)


def like_parameter(value, parameter):
    """This process' part of a tensor that is sharded as `parameter` is, or one of `zero_parts`."""
    if not isinstance(parameter, DTensor):
        return value.to(parameter.device)
    shape = {"shape": parameter.shape, "stride": parameter.stride()}
    return DTensor.from_local(value.to(local(parameter).device), parameter.device_mesh, parameter.placements, **shape)


def catch_signals():
    """The list that SIGINT and SIGTERM append themselves to; another one, two seconds later, ends the process at once.

    Until then it is the same one: of a signal to all processes, torchrun sends each of its own another.
    """
    signals, first = [], math.inf

    def catch(number, frame):
        nonlocal first
        first = min(first, time.monotonic())
        signals.append(number)
        if time.monotonic() > first + 2:
            signal.signal(number, signal.SIG_DFL)
            signal.raise_signal(number)

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, catch)
    return signals


def count_skipped(skipped, step):
    """One more step in a row without a finite loss; ends the run after MAX_SKIPPED_STEPS of them."""
    skipped += 1
    if skipped == MAX_SKIPPED_STEPS:
        raise SystemExit(
            f"\nStopped at step {step}: the last {skipped} losses were not finite. Checkpoints are intact."
        )
    return skipped


def stop_interrupted(accelerator, step, checkpoint, signals):
    """Ends a run that a signal interrupted, on this process or another."""
    accelerator.free_memory()
    accelerator.end_training()
    accelerator.print(f"\nInterrupted at step {step}, saved {checkpoint}; go on with --resume_from_checkpoint latest")
    raise SystemExit(128 + signals[0] if signals else 1)


@contextmanager
def writing(path, partial=None):
    """Ends the run with one message if `path` cannot be written within it.

    `partial`, the file or folder that was to become it, does not outlive an error of any kind.
    """
    path = Path(path).absolute()
    try:
        yield
    except BaseException as error:
        free = shutil.disk_usage(next(folder for folder in path.parents if folder.exists())).free
        if partial:
            shutil.rmtree(partial, ignore_errors=True)
            with suppress(OSError):
                partial.unlink()
        of_torch_save = re.search("PytorchStreamWriter|iostream|unexpected pos", str(error))
        if not (of_torch_save or isinstance(error, OSError | SafetensorError)):
            raise
        reason = "writing failed" if of_torch_save else getattr(error, "strerror", None) or str(error)
        raise SystemExit(
            f"\n{Path(sys.argv[0]).name}: error: {path} cannot be written ({reason}); {free / 2**20:.1f} MiB are free "
            "there. Checkpoints are intact: make room and go on with --resume_from_checkpoint latest"
        ) from None


@contextmanager
def atomic_write(path: Path | str) -> Iterator[Path]:
    """Writes a file as a whole or not at all: `with atomic_write(path) as partial:` fill the file `partial`.

    `partial` is a hidden file beside `path`, whose folder is created. At the end it is flushed to the disk and
    renamed, so `path` is the old file or the complete new one whenever the machine stops. Its name is its own, so
    several processes may write the same `path`. After an error it is removed, and where the disk is full or read-only
    the run ends with one message, see `writing`.
    """
    path = Path(path)
    partial = path.with_name(f".{path.name}.{secrets.token_hex(4)}.partial")
    try:
        with writing(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            yield partial
            flush_to_disk(partial)
            partial.replace(path)
    finally:
        with suppress(OSError):
            partial.unlink(missing_ok=True)


def flush_to_disk(path):
    """fsync of a file or folder."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
