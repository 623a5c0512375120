"""Several processes compute what one does: DDP and FSDP2, in every trainer."""

import importlib
import json
import random
import re
import shlex
import shutil
from pathlib import Path
from types import SimpleNamespace

from common.checkpoints import register_sharded_checkpointing, save_checkpoint
from common.models import full_tensor, shard

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.commands.launch import launch_command_parser
from accelerate.utils import DistributedType
from conftest import ROOT
from safetensors.torch import load_file, save_file

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
