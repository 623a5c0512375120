"""What train_omini.py teaches the toy FLUX: the picture follows its condition, by a number.

Each test prints three: the base model with the caption alone, the untrained adapter, the trained one; and its bar.
"""

import functools
import json
import random
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import safe_open

import train_omini as omini
from common.lora import add_lora
from common.validation import image_grid
from examples.toy.world import (
    COLOR_NAMES,
    Scene,
    caption,
    draw,
    edge_overlap,
    iou,
    labels,
    mask_of,
    random_scene,
    random_shape,
    score_scene,
)


HERE = Path(__file__).parents[1] / "examples" / "toy"
SIDE, COUNT = 64, 24
LEARN = (
    *("--pretrained_model_name_or_path", HERE / "flux", "--max_sequence_length", 16, "--report_to", "none"),
    *("--target_size", SIDE, "--cache_latents", "--train_batch_size", 16, "--drop_image_prob", 0),
    *("--optimizer", "adamw", "--learning_rate", 1e-3, "--timestep_sampling", "shift"),
)


@pytest.fixture(scope="session")
def scenes(tmp_path_factory):
    """A folder of 512 scenes with captions."""
    folder, rng = tmp_path_factory.mktemp("scenes"), random.Random(1)
    for i in range(512):
        scene = random_scene(rng)
        draw(scene, SIDE, SIDE).save(folder / f"{i:03d}.png")
        (folder / f"{i:03d}.txt").write_text(caption(scene))
    return folder


def unseen():
    """Scenes of another seed: (scenes, pictures)."""
    rng = random.Random(99)
    drawn = [random_scene(rng, outline=0) for _ in range(COUNT)]
    return drawn, [draw(scene, SIDE, SIDE) for scene in drawn]


def load(files):
    """The toy pipeline with trained adapters, and what their headers say."""
    pipeline = omini.OminiPipeline.from_pretrained(HERE / "flux")
    pipeline.set_progress_bar_config(disable=True)
    conditions = []
    for path in files:
        with safe_open(path, "pt") as file:
            about = json.loads(file.metadata()["omini"])
        conditions += [
            omini.Condition(**{k: tuple(v) if isinstance(v, list) else v for k, v in each.items()})
            for each in about["conditions"]
        ]
        pipeline.load_lora_weights(path.parent, weight_name=path.name, adapter_name=conditions[-1].adapter)
    return pipeline, conditions, about


def sample(pipeline, prompts, conditions, images, hole=None, independent=False):
    return pipeline(
        prompts,
        conditions=conditions,
        condition_images=images,
        hole=hole,
        height=SIDE,
        width=SIDE,
        num_inference_steps=12,
        guidance_scale=1.0,
        independent_condition=independent,
        max_sequence_length=16,
        generator=torch.Generator().manual_seed(0),
    ).images


def compare(files, prompts, make, score, *, hole=None, record=None):
    """Mean scores, 0 to 100, of the base model, the untrained and the trained adapter; and a picture of them.

    make(condition) returns the COUNT pictures of a condition, score(i, image) judges image i.
    """
    pipeline, conditions, about = load(files)
    images = [make(condition) for condition in conditions]
    integrated = "token_integration" in [condition.type for condition in conditions]
    independent = about["independent_condition"]
    trained = sample(pipeline, prompts, conditions, images, hole if integrated else None, independent)
    pipeline.unload_lora_weights()
    for name in dict.fromkeys(condition.adapter for condition in conditions):
        add_lora(
            pipeline.transformer, rank=4, alpha=4, dropout=0.0, target_modules=omini.TARGET_MODULES, adapter_name=name
        )
    untrained = sample(pipeline, prompts, conditions, images, hole if integrated else None, independent)
    base = sample(pipeline, prompts, [], [])
    rows = [*images, base, untrained, trained]
    grid = [image for row in rows for image in row[:8]]
    image_grid(grid, [""] * len(grid), columns=8, min_width=96).save(files[0].parent / "compared.png")
    return tuple(100 * float(np.mean([score(i, image) for i, image in enumerate(row)])) for row in rows[-3:])


def report(name, scores, bar):
    base, untrained, trained = scores
    print(f"{name}: base {base:.0f}, untrained {untrained:.0f}, trained {trained:.0f} (bar {bar})")
    assert trained >= bar
    assert trained >= max(base, untrained) + 20


def agreement(image, picture, where=None):
    """Share of pixels (of `where`) with the same nearest colour."""
    same = labels(image) == labels(picture)
    return same.mean() if where is None else same[where].mean()


def train_on(train, folder, output, kinds, *flags):
    train(
        "train_omini",
        *LEARN,
        "--instance_data_dir",
        folder,
        "--condition_type",
        *kinds,
        "--output_dir",
        output,
        *flags,
    )
    return sorted(output.glob("*.safetensors"))


def test_it_learns_coloring(train, scenes, tmp_path):
    """The quick one: edges and places from the grey picture, colours from the caption."""
    files = train_on(
        train, scenes, tmp_path, ["coloring"], "--rank", 8, "--drop_text_prob", 0.5, "--max_train_steps", 320
    )
    drawn, pictures = unseen()
    make = lambda c: [omini.make_condition(c.type, picture) for picture in pictures]  # noqa: E731
    prompts = [caption(scene) for scene in drawn]
    scores = compare(files, prompts, make, lambda i, image: edge_overlap(image, pictures[i]))
    report("coloring, edge overlap", scores, 85)
    colors = compare(files, prompts, make, lambda i, image: agreement(image, pictures[i]))
    print("coloring, colour match: base {:.0f}, untrained {:.0f}, trained {:.0f} (bar 95)".format(*colors))
    assert colors[2] >= 95
