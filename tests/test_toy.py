"""examples/toy: the scores tell right from wrong, the weights fit the repository and draw what they are asked for."""

import random

import numpy as np
import pytest
import torch
from conftest import ROOT
from diffusers import Flux2KleinPipeline, FluxFillPipeline, FluxPipeline
from PIL import Image

from examples.toy import letters
from examples.toy.world import (
    COLOR_NAMES,
    KINDS,
    SUBJECTS,
    Scene,
    Shape,
    caption,
    draw,
    edge_overlap,
    foreground_mask,
    iou,
    mask_of,
    random_scene,
    random_subject,
    score_scene,
    score_subject,
    sliced_wasserstein,
)


TOY = ROOT / "examples" / "toy"
SIZES = [(64, 64), (96, 64), (64, 96), (128, 128)]


@pytest.mark.parametrize("size", SIZES)
def test_real_drawings_score_full_marks(size):
    rng = random.Random(0)
    for _ in range(100):
        scene = random_scene(rng, size[0] / size[1], pair=0, outline=0)
        image = draw(scene, *size)
        assert score_scene(image, scene) == {"background": 1, "foreground": 1, "shape": 1}
        assert iou(foreground_mask(image), mask_of(scene, *size)) > 0.85
        assert edge_overlap(image, draw(scene, *size)) == 1


def test_two_shapes_score_at_least_ninety():
    rng = random.Random(1)
    scenes = [random_scene(rng, pair=1, outline=0) for _ in range(100)]
    scores = [score_scene(draw(scene), scene) for scene in scenes]
    assert np.mean([score["background"] for score in scores]) == 1
    assert np.mean([score["foreground"] for score in scores]) == 1
    assert np.mean([score["shape"] for score in scores]) > 0.9


def test_each_fault_costs_its_own_score():
    right = Scene("blue", (Shape("circle", "red", 0.5, 0.5, 0.2),))
    wrong = {
        "background": Scene("green", right.shapes),
        "foreground": Scene("blue", (Shape("circle", "white", 0.5, 0.5, 0.2),)),
        "shape": Scene("blue", (Shape("triangle", "red", 0.5, 0.5, 0.2),)),
    }
    for fault, scene in wrong.items():
        assert score_scene(draw(scene), right) == {"background": 1, "foreground": 1, "shape": 1} | {fault: 0}
    assert sum(score_scene(Image.new("RGB", (64, 64), "gray"), right).values()) <= 1
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8))
    assert score_scene(noise, right)["shape"] == 0


def test_no_kind_passes_for_another():
    for kind in KINDS:
        for other in KINDS:
            scene = Scene("white", (Shape(kind, "black", 0.5, 0.5, 0.2),))
            asked = Scene("white", (Shape(other, "black", 0.5, 0.5, 0.2),))
            assert score_scene(draw(scene), asked)["shape"] == (kind == other)


@pytest.mark.parametrize("name", SUBJECTS)
def test_only_the_subject_scores_as_the_subject(name):
    rng = random.Random(2)
    subjects = [draw(random_subject(rng, name)[0]) for _ in range(12)]
    others = [draw(random_scene(rng)) for _ in range(12)]
    others += [draw(random_subject(rng, other)[0]) for other in SUBJECTS if other != name for _ in range(6)]
    assert np.mean([score_subject(image, name) for image in subjects]) > 0.9
    assert np.mean([score_subject(image, name) for image in others]) < 0.1


def test_a_caption_alone_tells_little_of_the_place():
    rng = random.Random(3)
    pairs = [[random_scene(rng, pair=0, outline=0) for _ in range(2)] for _ in range(200)]
    assert np.mean([iou(mask_of(a), mask_of(b)) for a, b in pairs]) < 0.35
    assert np.mean([edge_overlap(draw(a), draw(b)) for a, b in pairs]) < 0.2


def test_captions_never_name_the_subjects():
    rng = random.Random(4)
    words = set(" ".join(caption(random_scene(rng), rng) for _ in range(2000)).split())
    assert not words & set(" ".join(SUBJECTS.values()).split())
    assert set(COLOR_NAMES) | set(KINDS) <= {word.strip(",") for word in words}


def test_sets_of_images_are_near_themselves_and_far_from_others():
    rng = np.random.default_rng(0)
    a, b = rng.normal(size=(500, 8)), rng.normal(size=(500, 8))
    assert sliced_wasserstein(a, a) == 0
    assert sliced_wasserstein(a, b) < 0.2 < sliced_wasserstein(a, b + 1)


@pytest.mark.parametrize(
    ("folders", "megabytes"), [(("flux", "flux-fill"), 16), (("flux-128",), 8), (("letters",), 8), (("flux2",), 9)]
)
def test_weights_are_small(folders, megabytes):
    files = [path for folder in folders for path in (TOY / folder).rglob("*") if path.is_file()]
    assert 10**6 < sum(path.stat().st_size for path in files) <= megabytes * 10**6


def sample(pipeline, scenes, side=64, caption=caption, **inputs):
    """A picture of each scene's caption, in 12 steps."""
    return pipeline(
        prompt=[caption(scene) for scene in scenes],
        height=side,
        width=side,
        num_inference_steps=12,
        max_sequence_length=32,
        generator=torch.Generator().manual_seed(0),
        **inputs,
    ).images


def mean_scores(images, scenes, score_scene=score_scene):
    """{measure: 0..100}, which are printed too."""
    scores = [score_scene(image, scene) for image, scene in zip(images, scenes, strict=True)]
    means = {name: 100 * np.mean([score[name] for score in scores]) for name in scores[0]}
    print({name: f"{mean:.0f}" for name, mean in means.items()})
    return means


def assert_draws(pipeline, scenes, bars, score_scene=score_scene, **drawing):
    """What the captions of the scenes say; bars: of background, foreground and shape."""
    pipeline.set_progress_bar_config(disable=True)
    means = mean_scores(sample(pipeline, scenes, **drawing), scenes, score_scene)
    print("bars:", *bars)
    for name, bar in zip(("background", "foreground", "shape"), bars, strict=True):
        assert means[name] >= bar


def test_flux_draws_what_the_caption_says():
    rng = random.Random(5)
    scenes = [random_scene(rng, pair=0, outline=0) for _ in range(64)]
    assert_draws(FluxPipeline.from_pretrained(TOY / "flux"), scenes, (97, 95, 85))


def test_flux_128_draws_what_the_caption_says():
    rng = random.Random(5)
    scenes = [random_scene(rng, pair=0, outline=0, places=8) for _ in range(64)]
    assert_draws(FluxPipeline.from_pretrained(TOY / "flux-128"), scenes, (95, 95, 60), side=128)


def test_the_second_world_is_drawn_as_the_caption_says():
    rng = random.Random(5)
    scenes = [letters.random_scene(rng) for _ in range(32)]
    pipeline = FluxPipeline.from_pretrained(TOY / "letters")
    assert_draws(pipeline, scenes, (90, 90, 75), letters.score_scene, caption=letters.caption)


def test_flux2_draws_what_the_caption_says():
    pipeline = Flux2KleinPipeline.from_pretrained(TOY / "flux2")
    assert not pipeline.config.is_distilled
    rng = random.Random(7)
    scenes = [random_scene(rng, pair=0, outline=0) for _ in range(32)]
    assert_draws(pipeline, scenes, (95, 90, 60))


def test_fill_keeps_what_it_sees():
    pipeline = FluxFillPipeline.from_pretrained(TOY / "flux-fill")
    pipeline.set_progress_bar_config(disable=True)
    rng = random.Random(6)
    scenes = [random_scene(rng, pair=0, outline=0) for _ in range(32)]
    drawn, mask = [draw(scene) for scene in scenes], Image.new("L", (64, 64))
    mask.paste(255, (32, 0, 64, 64))
    error = {}
    for name, shown in (("own", drawn), ("wrong", drawn[1:] + drawn[:1])):
        images = sample(pipeline, scenes, image=shown, mask_image=[mask] * len(shown))
        halves = [
            (np.asarray(a, float)[:, :32], np.asarray(b, float)[:, :32]) for a, b in zip(images, drawn, strict=True)
        ]
        error[name] = np.mean([np.square(a - b).mean() for a, b in halves])
    print(f"error of the visible half: {error['own']:.0f}, with another picture {error['wrong']:.0f}")
    assert error["own"] < error["wrong"] / 10
