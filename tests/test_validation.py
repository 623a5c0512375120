"""common/validation.py: sampling leaves no trace, grids and metrics are right."""

import json
import math
import random

import numpy as np
import torch
from accelerate import Accelerator
from diffusers import FluxPipeline
from PIL import Image

from common.validation import generate_images, image_grid, open_metrics, plot_metrics, undisturbed


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
        images = generate_images(accelerator, pipeline, [call] * 3, seed=5)
        second = generate_images(accelerator, pipeline, [call], seed=6)
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


def test_metrics_continue_after_a_resume_and_are_drawn(tmp_path):
    path = tmp_path / "metrics.jsonl"
    with open_metrics(path, 0) as metrics:
        for step in range(1, 31):
            loss = 1 / step if step != 7 else math.nan
            metrics.write(json.dumps({"step": step, "loss": loss, "lr": 1e-4}).encode() + b"\n")
        metrics.write(b'{"step": 31, "lo')  # killed here
    with open_metrics(path, 20) as metrics:
        metrics.write(json.dumps({"step": 21, "loss": 0.5, "lr": 1e-4}).encode() + b"\n")
    assert [json.loads(line)["step"] for line in path.read_text().splitlines()] == list(range(1, 22))
    plot_metrics(path, tmp_path / "loss.png", "title")
    assert Image.open(tmp_path / "loss.png").size == (800, 600)
