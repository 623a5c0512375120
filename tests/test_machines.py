"""Several machines: a torchrun for each, on the loopback, and Slurm's script with stand-ins for Slurm's commands."""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path

import common.checkpoints
from common.arguments import fail
from common.checkpoints import (
    CHECKSUMS,
    STATE_FILE,
    agreed_checkpoint,
    check_shared_folder,
    claim_output_dir,
    find_checkpoints,
    save_checkpoint,
)
from common.models import gather_problems

import psutil
import pytest
from accelerate import Accelerator
from accelerate.utils import ProjectConfiguration
from conftest import ROOT
from safetensors.torch import load_file

from examples.estimate_memory import parse_args, sent_bytes


SLURM = ROOT / "examples" / "accelerate" / "slurm.sh"
SCRIPT = "train_omini"
SCRIPTS = [SCRIPT, "train_dreambooth_flux_advanced", "train_influxedit", "train_twinflow"]


def result(folder):
    files = sorted([*folder.glob("*.safetensors"), *folder.glob("transformer/*.safetensors")])
    return {f"{file.stem}.{key}": value for file in files for key, value in load_file(file).items()}


def free_port():
    with socket.socket() as free:
        free.bind(("localhost", 0))
        return free.getsockname()[1]


def environment():
    quiet = {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "GLOO_SOCKET_IFNAME": "lo", "HF_HUB_OFFLINE": "1"}
    # as the page says: else a machine that is started again waits for an address that only the first round is told
    return os.environ | quiet | {"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}


@contextmanager
def machines(log, flags, *, count, processes, script=SCRIPT, more=()):
    """Starts torchrun on so many machines; `start(i)` starts that of one again, in a process group of its own.

    MACHINE in a flag is the number of the machine.
    """
    port = free_port()
    words = [sys.executable, "-m", "torch.distributed.run", "--nnodes", count, "--nproc_per_node", processes]
    words += ["--rdzv_backend", "c10d", "--rdzv_endpoint", f"localhost:{port}", "--rdzv_id", "test"]
    words += [*more, "--local_addr", "localhost"]
    started = []

    def start(machine):
        is_host = ["--rdzv_conf", f"is_host={str(machine == 0).lower()},read_timeout=120"]
        own_flags = [str(flag).replace("MACHINE", str(machine)) for flag in flags]
        command = map(str, [*words, *is_host, ROOT / f"{script}.py", *own_flags])
        with (log / f"{machine}.txt").open("a") as file:
            process = subprocess.Popen(
                list(command), cwd=ROOT, env=environment(), stdout=file, stderr=file, start_new_session=True
            )
        started.append(process)
        return process

    try:
        yield [start(machine) for machine in range(count)], start
    finally:
        for process in started:
            kill_group(process)


def kill_group(process):
    """SIGKILL to a torchrun and its workers, which have sessions of their own: the machine is gone."""
    with_workers = []
    if process.poll() is None:
        with_workers = [*psutil.Process(process.pid).children(recursive=True), process]
    for each in with_workers:
        try:
            each.kill()
        except psutil.NoSuchProcess:
            continue
    process.wait()


def wait_for(condition, log, timeout=400):
    deadline = time.monotonic() + timeout
    while not condition():
        assert time.monotonic() < deadline, text_of(log)
        time.sleep(0.05)


def text_of(log):
    return "\n".join(file.read_text()[-3000:] for file in sorted(log.glob("?.txt")))


def run(log, flags, **kwargs):
    with machines(log, flags, **kwargs) as (processes, _):
        codes = [process.wait(600) for process in processes]
    assert codes == [0] * len(codes), text_of(log)


@pytest.fixture
def flags_of(short_runs, pictures, tmp_path):
    """{trainer: flags} of steps of one image on each of four processes."""
    more = ["--train_batch_size", 1, "--max_train_steps", 3, "--output_dir"]
    flags = {script: [*words, *more] for script, words in short_runs.items()}
    flags["train_twinflow"] = [*short_runs["train_twinflow"], *more[2:]]
    return flags


@pytest.mark.slow
@pytest.mark.parametrize("way", ["DDP", "hybrid"])
@pytest.mark.parametrize(
    "script, more",
    [("train_omini", []), ("train_twinflow", []), ("train_twinflow", ["--training", "full", "--recipe", "twinflow"])],
    ids=["train_omini", "train_twinflow", "full"],
)
def test_two_machines_compute_what_one_does(flags_of, tmp_path, script, more, way):
    flags = flags_of[script]
    together = ["--fsdp", "--hybrid_shard"] if way == "hybrid" else []
    run(tmp_path, [*flags, tmp_path / "one", *more, *together[:1]], count=1, processes=4, script=script)
    run(tmp_path, [*flags, tmp_path / "two", *more, *together], count=2, processes=2, script=script)
    one, two = result(tmp_path / "one"), result(tmp_path / "two")
    assert one.keys() == two.keys()
    assert one
    largest = max((two[key] - value).abs().max().item() for key, value in one.items())
    print(f"{script}, {way}: weights differ by at most {largest:.1e} (bar {'0' if way == 'DDP' else '1e-4'})")
    assert largest <= (0 if way == "DDP" else 1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("way", ["DDP", "hybrid"])
def test_a_machine_that_is_killed_and_comes_back_ends_in_the_same_bits(flags_of, tmp_path, way):
    flags = [*flags_of[SCRIPT], tmp_path / "run", "--max_train_steps", 40, "--checkpointing_steps", 4]
    flags += ["--fsdp", "--hybrid_shard"] if way == "hybrid" else []
    whole = [tmp_path / "whole" if word == tmp_path / "run" else word for word in flags]
    run(tmp_path, whole, count=2, processes=2)
    # without a checkpoint `latest` begins anew: the first start has this flag, too
    flags += ["--resume_from_checkpoint", "latest"]
    more = ["--max_restarts", 3]
    with machines(tmp_path, flags, count=2, processes=2, more=more) as (processes, start):
        wait_for(lambda: find_checkpoints(tmp_path / "run"), tmp_path)
        kill_group(processes[1])
        assert not result(tmp_path / "run")
        again = start(1)
        assert processes[0].wait(600) == 0, text_of(tmp_path)
        assert again.wait(60) == 0, text_of(tmp_path)
    said = text_of(tmp_path)
    assert "Resuming from" in said
    found, expected = result(tmp_path / "run"), result(tmp_path / "whole")
    assert found.keys() == expected.keys()
    assert all(found[key].equal(value) for key, value in expected.items())


# ---------------------------------------------------------------------------------------------------------------------
# --save_on_each_node
# ---------------------------------------------------------------------------------------------------------------------


def on_two_machines(trainer):
    """A fault: the processes are those of two machines; returns the number of this one's."""
    per_machine = int(os.environ["WORLD_SIZE"]) // 2
    machine, local_rank = divmod(int(os.environ["RANK"]), per_machine)
    os.environ.update(LOCAL_RANK=str(local_rank), LOCAL_WORLD_SIZE=str(per_machine))
    return machine


def on_own_disks(trainer, folder):
    """A fault: two machines, each with its own --output_dir, folder/0 and folder/1."""
    machine = on_two_machines(trainer)
    honest = trainer.parse_args
    trainer.parse_args = lambda argv: honest([*argv, "--output_dir", f"{folder}/{machine}"])


def names_of(folder):
    return [path.name for path in find_checkpoints(folder)]


def same(found, expected):
    return found.keys() == expected.keys() and all(found[key].equal(value) for key, value in expected.items())


@pytest.mark.slow
@pytest.mark.parametrize("script", SCRIPTS)
def test_machines_with_disks_of_their_own_end_in_the_bits_of_those_with_one(runs, flags_of, tmp_path, script):
    flags = [*flags_of[script], tmp_path / "shared", "--checkpointing_steps", 1, "--checkpoints_total_limit", 2]
    assert runs.run(script, flags, on_two_machines, processes=2) == 0, runs.output()[-3000:]
    own = [*flags, "--save_on_each_node"]
    assert runs.run(script, own, on_own_disks, str(tmp_path), processes=2) == 0, runs.output()[-3000:]
    expected = result(tmp_path / "shared")
    assert expected
    for machine in "01":
        assert same(result(tmp_path / machine), expected)
        assert names_of(tmp_path / machine) == names_of(tmp_path / "shared") == ["checkpoint-2", "checkpoint-3"]
        assert (tmp_path / machine / "encoded").exists() == (tmp_path / "shared" / "encoded").exists()
    assert (tmp_path / "0" / "metrics.jsonl").exists()


@pytest.mark.slow
@pytest.mark.parametrize("way", ["DDP", "hybrid"])
def test_machines_that_were_killed_between_their_writes_go_on_at_what_all_have(runs, flags_of, tmp_path, way):
    """A machine that lacks the last checkpoint takes the others back to the one before; one with none is refused."""
    number, flags = 2, [*flags_of[SCRIPT], tmp_path / "whole", "--checkpointing_steps", 1]
    if way == "hybrid":
        number, flags = 4, [*flags, "--fsdp", "--hybrid_shard", "--optimizer", "adamw", "--use_ema"]
    whole = [*flags, "--max_train_steps", 5]
    assert runs.run(SCRIPT, whole, on_two_machines, processes=number) == 0, runs.output()[-3000:]
    own = [*flags, "--save_on_each_node", "--resume_from_checkpoint", "latest"]
    arguments = (on_own_disks, str(tmp_path))
    assert runs.run(SCRIPT, own, *arguments, processes=number) == 0, runs.output()[-3000:]
    shutil.rmtree(tmp_path / "0" / "checkpoint-3")
    assert runs.run(SCRIPT, [*own, "--max_train_steps", 5], *arguments, processes=number) == 0, runs.output()[-3000:]
    assert "checkpoint-3 is not on every machine" in runs.output()
    assert f"Resuming from {tmp_path}/0/checkpoint-2" in runs.output()
    for machine in "01":
        assert same(result(tmp_path / machine), result(tmp_path / "whole"))
        assert names_of(tmp_path / machine) == names_of(tmp_path / "whole")

    shutil.rmtree(tmp_path / "1")
    assert runs.run(SCRIPT, [*own, "--max_train_steps", 6], *arguments, processes=number) != 0
    assert f"{tmp_path}/1 on {socket.gethostname()} lacks the checkpoint-5" in runs.output()
    assert names_of(tmp_path / "0") == names_of(tmp_path / "whole")
    shutil.copytree(tmp_path / "0" / "checkpoint-5", tmp_path / "1" / "checkpoint-5")
    shutil.rmtree(tmp_path / "0")  # the second machine's folder is as good as the first's
    shutil.copytree(tmp_path / "1", tmp_path / "0")
    assert runs.run(SCRIPT, [*own, "--max_train_steps", 6], *arguments, processes=number) == 0, runs.output()[-3000:]
    assert f"Resuming from {tmp_path}/0/checkpoint-5" in runs.output()


def with_own_class_images(trainer, folder):
    machine = on_two_machines(trainer)
    honest = trainer.parse_args
    own = ["--output_dir", f"{folder}/{machine}", "--class_data_dir", f"{folder}/class-{machine}"]
    trainer.parse_args = lambda argv: honest([*argv, *own])


@pytest.mark.slow
@pytest.mark.parametrize("script", ["train_dreambooth_flux_advanced", "train_influxedit"])
def test_each_machine_draws_the_class_images_that_its_own_disk_lacks(runs, flags_of, tmp_path, script):
    flags = [
        *flags_of[script],
        tmp_path,
        "--save_on_each_node",
        "--with_prior_preservation",
        "--class_prompt",
        "a dog",
    ]
    flags += ["--num_class_images", 4, "--cache_latents", "--max_train_steps", 1]
    for lacking in ("[01]", "1"):
        for folder in [*tmp_path.glob("[01]"), *tmp_path.glob(f"class-{lacking}")]:
            shutil.rmtree(folder)
        assert runs.run(script, flags, with_own_class_images, str(tmp_path), processes=2) == 0, runs.output()[-3000:]
        first, second = ({path.name: path.read_bytes() for path in tmp_path.glob(f"class-{i}/*.png")} for i in "01")
        assert len(first) == 4
        assert first == second
        assert same(result(tmp_path / "0"), result(tmp_path / "1"))


@pytest.mark.slow
@pytest.mark.parametrize("way", ["DDP", "hybrid"])
def test_a_machine_with_its_own_disk_is_killed_and_comes_back(flags_of, tmp_path, way):
    per_machine = 2 if way == "hybrid" else 1
    flags = [*flags_of[SCRIPT], tmp_path / "whole", "--max_train_steps", 30, "--checkpointing_steps", 3]
    flags += ["--fsdp", "--hybrid_shard"] if way == "hybrid" else []
    run(tmp_path, flags, count=2, processes=per_machine)
    own = ["--output_dir", tmp_path / "run-MACHINE", "--save_on_each_node", "--checkpoints_total_limit", 1]
    own += ["--resume_from_checkpoint", "latest"]
    more = ["--max_restarts", 3]
    with machines(tmp_path, [*flags, *own], count=2, processes=per_machine, more=more) as (processes, start):
        # between the writes of the first checkpoint a machine would have none, which is refused
        wait_for(lambda: all(find_checkpoints(tmp_path / f"run-{machine}") for machine in "01"), tmp_path)
        kill_group(processes[1])
        assert not result(tmp_path / "run-0")
        again = start(1)
        assert processes[0].wait(600) == 0, text_of(tmp_path)
        assert again.wait(60) == 0, text_of(tmp_path)
    assert "Resuming from" in text_of(tmp_path)
    for machine in "01":
        assert same(result(tmp_path / f"run-{machine}"), result(tmp_path / "whole"))
        assert names_of(tmp_path / f"run-{machine}") == ["checkpoint-30"]


def machines_that_agree(trainer, folder):
    machine = on_two_machines(trainer)
    output_dir = Path(folder, str(machine))
    accelerator = Accelerator(
        cpu=True,
        project_config=ProjectConfiguration(folder, save_on_each_node=True),
        step_scheduler_with_optimizer=False,
    )

    def agree(*left_out, resume="latest"):
        """What a machine answers where checkpoints (machine, name) are gone."""
        for at, name in left_out:
            if at == machine:
                (output_dir / name).rename(output_dir / f".{name}")
        accelerator.wait_for_everyone()
        checkpoint, problems = agreed_checkpoint(accelerator, output_dir, resume)
        accelerator.wait_for_everyone()
        for hidden in output_dir.glob(".checkpoint-*"):
            hidden.rename(output_dir / hidden.name[1:])
        assert checkpoint is None or checkpoint.parent == output_dir
        return checkpoint and checkpoint.name, problems

    output_dir.mkdir()
    assert agree() == (None, [])
    for step in (5, 10, 15):
        save_checkpoint(accelerator, output_dir, step, {})
    assert agree() == ("checkpoint-15", [])
    assert agree(resume=None) == (None, [])
    assert agree(resume="checkpoint-15") == ("checkpoint-15", [])
    assert agree((0, "checkpoint-15")) == ("checkpoint-10", [])
    assert agree((1, "checkpoint-15"), (0, "checkpoint-10")) == agree((1, "checkpoint-15"), (1, "checkpoint-10"))
    checkpoint, (problem,) = agree((1, "checkpoint-15"), (1, "checkpoint-10"))
    assert checkpoint is None
    assert f"{folder}/1 on {socket.gethostname()} lacks the checkpoint-15" in problem
    checkpoint, (problem,) = agree(*((0, f"checkpoint-{step}") for step in (5, 10, 15)))
    assert checkpoint is None
    assert f"{folder}/0 on {socket.gethostname()} lacks the checkpoint-15" in problem
    newest = output_dir / "checkpoint-15"
    if machine == 1:  # of the same step of another run: it must not be deleted
        state = json.loads((newest / STATE_FILE).read_text())
        (newest / STATE_FILE).write_text(json.dumps(state | {"saved_as": "other"}))
        (newest / CHECKSUMS).unlink()
    for resume in ("latest", "checkpoint-15"):
        checkpoint, (problem,) = agree(resume=resume)
        assert checkpoint is None
    if machine == 0:  # damaged: the other machine's is whole
        (newest / STATE_FILE).write_text("damaged")
    checkpoint, (problem,) = agree()
    assert checkpoint is None
    assert f"{folder}/0 on {socket.gethostname()} lacks the checkpoint-15" in problem
    assert f"has in {folder}/1" in problem
    accelerator.end_training()


def test_machines_agree_on_the_last_checkpoint_that_all_have(runs, tmp_path):
    assert runs.run(None, [], machines_that_agree, str(tmp_path), processes=2) == 0, runs.output()[-3000:]


def problems_of_machines(trainer):
    machine = on_two_machines(trainer)
    accelerator = Accelerator(cpu=True)
    socket.gethostname = lambda: f"node-{machine}"
    assert gather_problems([]) == []
    problems = gather_problems(["of both", "disk full"] if machine else ["of both"])
    assert problems == ["of both", "disk full (on node-1)"]
    assert gather_problems(["own"] if machine else []) == ["own (on node-1)"]
    fail(accelerator, problems)


def test_what_is_wrong_on_one_machine_ends_all_with_its_name(runs):
    assert runs.run(None, [], problems_of_machines, processes=2) != 0
    assert "of both\n" in runs.output()
    assert "disk full (on node-1)" in runs.output()


def with_own_images(trainer, folder):
    if on_two_machines(trainer):
        honest = trainer.parse_args
        trainer.parse_args = lambda argv: honest([*argv, "--instance_data_dir", folder])


def test_machines_with_other_images_are_refused(runs, flags_of, pictures, tmp_path):
    shutil.copytree(pictures, tmp_path / "own")
    next((tmp_path / "own").glob("*.png")).unlink()
    flags = [*flags_of[SCRIPT], tmp_path / "run", "--instance_prompt", "x"]
    assert runs.run(SCRIPT, flags, with_own_images, str(tmp_path / "own"), processes=2) != 0
    count = len(list(pictures.glob("*.png")))
    assert f"process 1 on {socket.gethostname()} finds {count - 1} examples" in runs.output()
    assert f"{count}: put the same images on all machines" in runs.output()
    assert not (tmp_path / "run").exists()


def one_folder(trainer, folder):
    on_two_machines(trainer)
    accelerator = Accelerator(cpu=True, project_config=ProjectConfiguration(folder, save_on_each_node=True))
    claim_output_dir(accelerator, Path(folder, "run"), [])


def test_a_folder_that_machines_share_is_refused_with_save_on_each_node(runs, tmp_path):
    assert runs.run(None, [], one_folder, str(tmp_path), processes=2) != 0
    assert f"another machine have one --output_dir {tmp_path / 'run'}" in runs.output()
    assert not list((tmp_path / "run").iterdir())


def test_parts_of_weights_on_each_machine_are_refused(runs, flags_of, tmp_path):
    flags = [*flags_of[SCRIPT], tmp_path / "run", "--fsdp", "--save_on_each_node", "--optimizer", "adamw"]
    assert runs.run(SCRIPT, flags, on_own_disks, str(tmp_path), processes=2) != 0
    assert "add --hybrid_shard" in runs.output()
    assert not list(tmp_path.glob("[01]"))


# ---------------------------------------------------------------------------------------------------------------------
# One disk, and Slurm
# ---------------------------------------------------------------------------------------------------------------------


def other_folder(trainer, folder):
    common.checkpoints.SHARED_WITHIN = 0.2
    accelerator = Accelerator(cpu=True)
    own = Path(folder, str(accelerator.process_index))
    own.mkdir()
    check_shared_folder(accelerator, Path(folder))
    check_shared_folder(accelerator, own)


def test_an_output_dir_that_machines_do_not_share_is_refused(runs, tmp_path):
    assert runs.run(None, [], other_folder, str(tmp_path), processes=2) != 0
    assert f"--output_dir {tmp_path / '0'} of process 1 on {socket.gethostname()}" in runs.output()
    assert "a disk that all machines share" in runs.output()
    assert not list(tmp_path.rglob(".*"))


def test_the_slurm_script_passes_bash_and_shellcheck():
    checker = Path(sys.executable).with_name("shellcheck")
    for command in (["bash", "-n", SLURM], [checker, SLURM]):
        found = subprocess.run(command, capture_output=True, text=True)
        assert found.returncode == 0, found.stdout + found.stderr
    assert os.access(SLURM, os.X_OK)
    page = SLURM.with_name("README.md").read_text()
    for name in ("GPUS_PER_NODE", "RDZV_PORT", "MAX_RESTARTS", "SAVE_SECONDS", "VENV"):
        assert f"`{name}`" in page


STAND_INS = {
    "srun": 'shift; echo $$ > "$STATE/step"; exec "$@"',  # --kill-on-bad-exit
    "scontrol": 'if [ "$1" = show ]; then echo localhost; else echo "$@" >> "$STATE/requeued"; fi',
    "scancel": 'kill -TERM "$(cat "$STATE/step")"',
}


@pytest.mark.slow
def test_a_slurm_job_saves_before_its_time_is_over_and_goes_on_when_it_is_queued_again(flags_of, tmp_path):
    """Slurm's commands are stand-ins: one node, whose step is a process of this machine."""
    commands = tmp_path / "bin"
    commands.mkdir()
    for name, body in STAND_INS.items():
        (commands / name).write_text(f"#!/bin/bash\n{body}\n")
        (commands / name).chmod(0o755)
    venv = tmp_path / "venv" / "bin"
    venv.mkdir(parents=True)
    (venv / "torchrun").write_text(f'#!/bin/bash\nexec {sys.executable} -m torch.distributed.run "$@"\n')
    (venv / "torchrun").chmod(0o755)
    slurm = {"SLURM_JOB_ID": "7", "SLURM_JOB_NODELIST": "n[1]", "SLURM_NNODES": "1", "STATE": str(tmp_path)}
    own = {"GPUS_PER_NODE": "2", "RDZV_PORT": str(free_port()), "VENV": str(venv.parent), "SAVE_SECONDS": "100"}
    env = environment() | slurm | own | {"PATH": f"{commands}:{os.environ['PATH']}"}
    flags = [*flags_of[SCRIPT], tmp_path / "run", "--max_train_steps", 200, "--checkpointing_steps", 5]

    def job(words):
        command = list(map(str, ["bash", SLURM, ROOT / f"{SCRIPT}.py", *words]))
        with (tmp_path / "0.txt").open("a") as log:
            return subprocess.Popen(command, cwd=ROOT, env=env, stdout=log, stderr=log)

    first = job(flags)
    wait_for(lambda: find_checkpoints(tmp_path / "run"), tmp_path)
    first.send_signal(signal.SIGUSR1)
    assert first.wait(300) == 0, text_of(tmp_path)
    assert (tmp_path / "requeued").read_text() == "requeue 7\n", text_of(tmp_path)
    saved = int(find_checkpoints(tmp_path / "run")[-1].name.removeprefix("checkpoint-"))
    assert 5 <= saved < 200
    (tmp_path / "requeued").unlink()
    assert job([*flags, "--max_train_steps", saved + 3]).wait(300) == 0, text_of(tmp_path)
    assert not (tmp_path / "requeued").exists()
    assert f"Resuming from {tmp_path / 'run'}/checkpoint-{saved}" in (tmp_path / "0.txt").read_text()
    assert result(tmp_path / "run")


@pytest.mark.slow
def test_sigusr1_saves_and_the_run_goes_on(runs, flags_of, tmp_path):
    flags = [*flags_of[SCRIPT], tmp_path / "run", "--max_train_steps", 300, "--dataloader_num_workers", 1]
    runs.start(SCRIPT, flags)
    runs.wait_for(lambda: (tmp_path / "run" / "metrics.jsonl").exists() and "loss" in runs.output())
    os.killpg(runs.pid, signal.SIGUSR1)
    assert runs.end() == 128 + signal.SIGUSR1, runs.output()[-3000:]
    assert "Interrupted at step" in runs.output()
    (checkpoint,) = find_checkpoints(tmp_path / "run")
    assert int(checkpoint.name.removeprefix("checkpoint-")) < 300


# ---------------------------------------------------------------------------------------------------------------------
# What is sent
# ---------------------------------------------------------------------------------------------------------------------


def sent(words, weights=1000, gradients=100):
    return sent_bytes(parse_args(words.split()), weights=weights, gradients=gradients)


def test_what_a_step_sends():
    assert sent("") == {"each GPU": 0, "each machine": 0}
    assert sent("--num_processes 4") == {"each GPU": 150, "each machine": 0}  # 2 (4 - 1) / 4 of 100
    assert sent("--num_processes 4 --num_machines 2") == {"each GPU": 150, "each machine": 150}
    split = sent("--num_processes 4 --num_machines 2 --fsdp")  # 3/4 of 2 x 1000 and of 100
    assert split == {"each GPU": 1575, "each machine": 1575}
    # 1/2 of 2 x 1000 and of 100 within a machine, and an all-reduce of half of 100 by each of its two GPUs
    hybrid = sent("--num_processes 4 --num_machines 2 --fsdp --hybrid_shard")
    assert hybrid == {"each GPU": 1100, "each machine": 100}


def test_machines_have_equally_many_processes(capsys):
    with pytest.raises(SystemExit) as stop:
        parse_args(["--num_processes", "5", "--num_machines", "2"])
    assert stop.value.code == 2
    assert "--num_processes 5" in capsys.readouterr().err
