"""common/validation.py: sampling leaves no trace, grids and metrics are right."""

import io
import json
import math
import random
import re
import time
from contextlib import closing

from common.metrics import running_mean
from common.tracking import Metrics, log_step, plot_metrics
from common.validation import generate_images, image_grid, undisturbed, wrap

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from diffusers import FluxPipeline
from PIL import Image, ImageFont
from tqdm.auto import tqdm


def states():
    return random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()


def test_random_states_and_modes_are_left_as_found():
    model = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.Dropout())
    model.train()
    model[1].eval()
    before = states()
    with undisturbed(model, device=torch.device("cpu")):
        assert not model.training
        assert not torch.is_grad_enabled()
        random.random(), np.random.rand(), torch.rand(1)
    assert states() == before
    assert torch.is_grad_enabled()
    assert (model.training, model[0].training, model[1].training) == (True, True, False)


def test_images_depend_on_the_seed_alone_and_change_nothing(tiny):
    pipeline = FluxPipeline(**tiny.components_but_image())
    weights = {name: value.clone() for name, value in pipeline.transformer.state_dict().items()}
    call = {"prompt": "a circle", "height": 32, "width": 48, "num_inference_steps": 2, "max_sequence_length": 8}
    accelerator = Accelerator()
    before = states()
    with undisturbed(pipeline.transformer, device=accelerator.device):
        images = generate_images(accelerator, pipeline, [call] * 3, seeds=[5, 6, 7])
        second = generate_images(accelerator, pipeline, [call], seeds=[6])
    assert states() == before
    assert [image.size for image in images] == [(48, 32)] * 3
    assert np.array_equal(np.array(images[1]), np.array(second[0]))  # image i of seed s is image 0 of seed s + i
    assert not np.array_equal(np.array(images[0]), np.array(images[1]))
    assert all(torch.equal(value, weights[name]) for name, value in pipeline.transformer.state_dict().items())


def test_grid_shows_every_image_above_its_caption():
    images = [Image.new("RGB", (100, 60), color) for color in ("red", "green", "blue", "black", "white")]
    grid = np.array(image_grid(images, [f"a caption that is rather long, number {i}" for i in range(5)], columns=2))
    for color in ((255, 0, 0), (0, 128, 0), (0, 0, 255)):
        assert (grid == color).all(-1).sum() == 4 * 100 * 60  # doubled to fit the caption
    assert grid.shape[1] > 2 * 200
    assert grid.shape[0] > 3 * 120 + 3 * 2 * 12
    titled = np.array(image_grid(images, [""] * 5, columns=2, title="a red circle\nstep 20"))
    assert (titled[:40] < 100).any()
    assert not (titled[-10:] < 100).any()


@pytest.mark.parametrize("text", ["a word " * 60, "W" * 300, "one\ntwo\n\nthree", "", "ein Wort " + "ä" * 99 + " b"])
def test_lines_are_as_wide_as_the_picture_and_lose_nothing(text):
    font = ImageFont.load_default(16)
    lines = wrap(text, font, 192).split("\n")
    assert max(map(font.getlength, lines)) <= 192
    assert "".join("".join(lines).split()) == "".join(text.split())
    assert len(lines) >= len(text.splitlines())
    assert [wrap(letter, font, 1) for letter in ("W", "WW")] == ["W", "W\nW"]  # a letter per line at the least


def test_metrics_continue_after_a_resume_and_are_drawn(tmp_path):
    path = tmp_path / "metrics.jsonl"
    with closing(Metrics(path, 0)) as metrics:
        for step in range(1, 31):
            loss = 1 / step if step != 7 else math.nan
            metrics.write({"step": step, "loss": loss, "lr": 1e-4})
    with path.open("a") as file:
        file.write('{"step": 31, "lo')  # killed here
    with closing(Metrics(path, 20)) as metrics:
        metrics.write({"step": 21, "loss": 0.5, "lr": 1e-4})
    assert [json.loads(line)["step"] for line in path.read_text().splitlines()] == list(range(1, 22))
    plot_metrics(tmp_path)
    assert Image.open(tmp_path / "loss.png").size == (800, 600)


def colors_in(path):
    """How many pixels of each color of matplotlib's cycle (C0, C1, ...) and of black a picture has."""
    from matplotlib.colors import to_rgb

    pixels = np.asarray(Image.open(path).convert("RGB"), int)
    names = ["black", *(f"C{i}" for i in range(6))]
    return {name: (abs(pixels - 255 * np.array(to_rgb(name))).max(-1) < 3).sum() for name in names}


def test_the_plot_marks_checkpoints_the_pivot_and_prodigys_d(tmp_path):
    """Each is drawn when it is there and not when it is not, with losses that are no numbers and outliers."""
    (tmp_path / "metrics.jsonl").write_text(
        "".join(
            json.dumps({"step": step, "loss": {1: math.nan, 9: 1e6}.get(step, 1 / step), "lr": 1e-4}) + "\n"
            for step in range(1, 301)
        )
    )
    plot_metrics(tmp_path)
    plain, before = colors_in(tmp_path / "loss.png"), np.asarray(Image.open(tmp_path / "loss.png"))
    assert plain["C0"] > 500  # the running mean, which neither nan nor the outlier has flattened or broken
    assert plain["C1"] > 500  # the learning rate
    assert plain["C3"] == plain["C4"] == 0
    for step in (100, 200, 400):  # the last one is of no step in the plot
        (tmp_path / f"checkpoint-{step}").mkdir()
    plot_metrics(tmp_path)
    assert (np.asarray(Image.open(tmp_path / "loss.png")) != before).any()
    (tmp_path / "args.json").write_text(json.dumps({"marks": {"pivot": 150, "transformer frozen": 300}}))
    plot_metrics(tmp_path)
    marked = colors_in(tmp_path / "loss.png")
    assert marked["C3"] > 100
    assert marked["C4"] == 0  # at the end of the run nothing ends that goes on otherwise
    rows = [json.loads(line) | {"prodigy_d": 1e-6} for line in (tmp_path / "metrics.jsonl").open()]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    plot_metrics(tmp_path)
    assert colors_in(tmp_path / "loss.png")["black"] > marked["black"] + 500


def test_the_time_that_is_left_is_that_of_steps_after_the_first(capsys):
    """Which may compile; and at 80 columns the bar leaves room for all it says."""
    terminal, logs = io.StringIO(), {"loss": 0.6824, "lr": 1e-4, "images_per_second": 100.0, "peak_memory_gb": 1.0}
    bar = tqdm(total=1000, desc="Training", unit="step", file=terminal, ncols=80, mininterval=0)
    for step in range(1, 6):
        time.sleep(0.5 if step == 1 else 0.001)
        log_step(Accelerator(), bar, None, step, logs)
    bar.refresh()
    minutes, seconds = re.search(r"expected (\d\d):(\d\d) more, .* 1.0 GiB", capsys.readouterr().out).groups()
    assert 60 * int(minutes) + int(seconds) < 60  # with the first step at least 99
    assert terminal.getvalue().split("\r")[-1].rstrip().endswith("step/s, loss=0.682, lr=0.0001]")


@pytest.mark.parametrize("window", [1, 2, 50])
def test_the_running_mean(window):
    values = np.random.default_rng(0).normal(3, 1, 2000)
    mean = np.array(running_mean([math.nan, *values[:5], math.inf, *values[5:]], window))
    assert np.isnan(mean[0])
    assert mean[1] == pytest.approx(values[0])
    assert mean[6] == mean[5]
    assert mean[500:].mean() == pytest.approx(3, abs=0.1)
    assert mean[500:].std() == pytest.approx((2 * window - 1) ** -0.5, rel=0.25)  # of independent values
