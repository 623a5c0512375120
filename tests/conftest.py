"""Fixtures: a tiny pipeline of real classes with random weights, drawn pictures, and trainers run in this process."""

import copy
import functools
import gc
import importlib
import json
import os
import random
import runpy
import shutil
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch


ROOT = Path(__file__).parent.parent
STARTED = time.monotonic()
os.environ.update(HF_HUB_OFFLINE="1", WANDB_MODE="offline", TOKENIZERS_PARALLELISM="false")


def pytest_addoption(parser):
    parser.addoption("--minutes", type=float, help="start no test after so many minutes; those left over are skipped")


def pytest_runtest_setup(item):
    minutes = item.config.getoption("minutes")
    if minutes is not None and time.monotonic() - STARTED > 60 * minutes:
        pytest.skip(f"left over: --minutes {minutes:g} are up")


@pytest.fixture(scope="session")
def tiny_pipeline():
    """A FluxPipeline with one block of each kind and random weights."""
    import tiny_backbones

    return tiny_backbones.flux()


@pytest.fixture
def tiny(tiny_pipeline):
    """Copies of the tiny pipeline's parts, for a test to do with as it likes."""
    parts = {name: copy.deepcopy(part) for name, part in tiny_pipeline.components.items() if part is not None}
    return SimpleNamespace(**parts, components_but_image=lambda: {n: copy.deepcopy(p) for n, p in parts.items()})


@pytest.fixture(scope="session")
def tiny_model(tiny_pipeline, tmp_path_factory):
    """The tiny pipeline as a folder."""
    folder = tmp_path_factory.mktemp("tiny")
    tiny_pipeline.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def klein():
    """A tiny FLUX.2-klein, not distilled."""
    import tiny_backbones

    torch.manual_seed(0)
    return tiny_backbones.flux2_klein()


@pytest.fixture(scope="session")
def klein_folder(klein, tmp_path_factory):
    """It as a folder."""
    folder = tmp_path_factory.mktemp("klein")
    klein.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def distilled_folder(klein_folder, tmp_path_factory):
    """The same model, said to be distilled."""
    folder = tmp_path_factory.mktemp("distilled") / "klein"
    shutil.copytree(klein_folder, folder)
    index = json.loads((folder / "model_index.json").read_text())
    (folder / "model_index.json").write_text(json.dumps(index | {"is_distilled": True}))
    return folder


@pytest.fixture(scope="session")
def pictures(tmp_path_factory):
    """A folder of five small pictures of different shapes with captions."""
    from examples.toy.world import caption, draw, random_scene

    folder, rng = tmp_path_factory.mktemp("pictures"), random.Random(0)
    for i, size in enumerate([(48, 32), (32, 32), (40, 64), (64, 48), (33, 37)]):
        scene = random_scene(rng)
        draw(scene, *size).save(folder / f"{i}.png")
        (folder / f"{i}.txt").write_text(caption(scene))
    return folder


@pytest.fixture(scope="session")
def tiny_fill(tiny_pipeline, tmp_path_factory):
    """A folder with the tiny pipeline as a FluxFillPipeline: 384 input channels, all of them with weights."""
    import tiny_backbones

    folder = tmp_path_factory.mktemp("fill")
    tiny_backbones.flux_fill(tiny_pipeline).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def pairs(tmp_path_factory):
    """Folders of five pictures of two shapes: images, targets, masks and captions, and both in one, side by side."""
    from PIL import Image, ImageDraw

    from examples.influxedit.prepare_fill_circles import combine
    from examples.toy.world import caption, draw, random_scene

    root, rng = tmp_path_factory.mktemp("pairs"), random.Random(0)
    for name in ("images", "targets", "masks", "captions", "combined"):
        (root / name).mkdir()
    for i, size in enumerate([(48, 32), (32, 32), (48, 32), (32, 32), (33, 31)]):
        before, after = random_scene(rng), random_scene(rng)
        images = draw(before, *size), draw(after, *size)
        images[0].save(root / "images" / f"{i}.png")
        images[1].save(root / "targets" / f"{i}.{'jpg' if i == 1 else 'png'}")
        combine(*images).save(root / "combined" / f"{i}.png")
        mask = Image.new("L", size)
        ImageDraw.Draw(mask).rectangle((4 + i, 6, 20, 25), fill=255)
        mask.save(root / "masks" / f"{i}.png")
        (root / "captions" / f"{i}.txt").write_text(caption(after))
    return root


@pytest.fixture(scope="session")
def glyph_pictures(tmp_path_factory):
    """Six captioned pictures of the toy subject, as `world.py glyph` draws them."""
    folder = tmp_path_factory.mktemp("glyph")
    command = [sys.executable, ROOT / "examples" / "toy" / "world.py", "glyph", folder, "--count", "6"]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    return folder


@pytest.fixture
def wandb_dir(tmp_path, monkeypatch):
    """Where wandb's offline runs of one test go."""
    import wandb

    monkeypatch.setenv("WANDB_DIR", str(tmp_path))
    monkeypatch.setenv("WANDB_SILENT", "true")
    yield tmp_path
    wandb.teardown()  # it reads the environment once


@pytest.fixture(scope="session")
def server(tmp_path_factory):
    from processes import Runs

    runs = Runs(tmp_path_factory.mktemp("runs") / "log.txt")
    yield runs
    runs.server.stdin.close()
    assert runs.server.wait(60) == 0


@pytest.fixture
def runs(server):
    """Starts trainers as processes that take signals and kills; none may be left."""
    yield server
    left = server.processes()
    if left:
        server.kill()
    assert not left


@functools.cache
def imported(script):
    module = importlib.import_module(script)
    gc.freeze()  # what is imported stays: to look through it for garbage takes longer than a short run
    return module


@pytest.fixture
def train():
    """train(script, *flags): runs a trainer's parse_args and main in this process."""

    def run(script, *flags):
        from accelerate.state import AcceleratorState, GradientState, PartialState

        def forget():
            for state in (AcceleratorState, GradientState, PartialState):
                state._reset_state()

        module = imported(script)
        forget()  # an Accelerator of another test
        try:
            module.main(module.parse_args([str(flag) for flag in flags]))
        finally:
            forget()

    return run


@pytest.fixture
def run_program(monkeypatch):
    """run_program(path, *words): what `python path words` does, in this process, without its imports of seconds."""

    def run(path, *words):
        with monkeypatch.context() as patch:
            patch.setattr(sys, "argv", [str(path), *map(str, words)])
            patch.setattr(sys, "path", [*sys.path])
            runpy.run_path(str(ROOT / path), run_name="__main__")

    return run


@pytest.fixture
def short_runs(tiny_model, tiny_fill, pictures, pairs):
    """{trainer: flags of a run of a few steps on tiny things}; later flags override these."""
    shared = ["--max_sequence_length", 8, "--train_batch_size", 2, "--report_to", "none", "--max_train_steps", 2]
    shared += ["--learning_rate", 1e-3, "--rank", 2]
    flux = ["--pretrained_model_name_or_path", tiny_model, *shared]
    fill = ["--pretrained_model_name_or_path", tiny_fill, *shared, "--instance_data_dir", pairs / "images"]
    return {
        "train_dreambooth_flux_advanced": [*flux, "--instance_data_dir", pictures, "--resolution", 32],
        "train_omini": [
            *(*flux, "--instance_data_dir", pictures, "--target_size", 32, "--condition_type", "canny"),
            *("--optimizer", "adamw"),
        ],
        "train_influxedit": [
            *(*fill, "--target_data_dir", pairs / "targets", "--caption_data_dir", pairs / "captions"),
            *("--mode", "edit", "--seed", 0, "--resolution", 32),
        ],
        "train_twinflow": [
            *(*flux, "--train_data_dir", pictures, "--resolution", 32, "--train_batch_size", 4),
            *("--training", "lora", "--model_type", "flux"),
        ],
    }


def pytest_terminal_summary(terminalreporter):
    """Prints what tests have counted with `record_property`: the sum of the numbers of a name."""
    found = {}
    for report in terminalreporter.stats.get("passed", []):
        for name, value in report.user_properties:
            found.setdefault(name, []).append(value)
    for name, values in found.items():
        numbers = all(isinstance(value, int) for value in values)
        for value in [sum(values)] if numbers else values:
            terminalreporter.write_line(f"{name}: {value}")
