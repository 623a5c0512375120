"""Settings that were found on the toy FLUX, tried on another small world: letters on textures."""

import random
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import FluxPipeline
from test_omini_learns import COUNT, Toy, compare, report, train_on
from test_train_dreambooth import quickstart_flags

from examples.toy import letters
from examples.toy.world import COLOR_NAMES, all_right, iou, labels, score_subject
from examples.twinflow.compare import STYLES
from examples.twinflow.generate import generate
from train_omini import convert_to_condition


LETTERS = Toy(Path(letters.__file__).parent / "letters", side=64)
SCORED = 64


def test_a_drawing_shows_its_scene_and_no_other():
    rng = random.Random(0)
    scenes = [letters.random_scene(rng) for _ in range(100)]
    drawn = [letters.draw(scene) for scene in scenes]
    assert all_right(drawn, scenes, letters.score_scene) == 100
    assert all_right(drawn, scenes[1:] + scenes[:1], letters.score_scene) <= 2
    for scene, image in zip(scenes, drawn, strict=True):
        other = replace(scene, thing="T" if scene.thing == "L" else "L")
        assert letters.score_scene(image, other)["shape"] == 0


def test_captions_name_what_is_drawn():
    scene = letters.Scene("dots", "orange", "T", "red", 0.5, 0.5)
    assert letters.caption(scene) == "a red T on orange dots"
    rng = random.Random(0)
    texts = [letters.caption(scene, rng) for _ in range(200)]
    assert 5 < texts.count("") < 40
    assert all("T" in text for text in texts if text)


def captions(count=SCORED, seed="scored"):
    """Scenes and captions of a template that no prompt for class images has."""
    rng = random.Random(seed)
    scenes = [letters.random_scene(rng) for _ in range(count)]
    return scenes, [letters.caption(scene) for scene in scenes]


def sample(pipeline, prompts, steps=20):
    """One image per prompt."""
    generators = [torch.Generator().manual_seed(i) for i in range(len(prompts))]
    call = {"height": 64, "width": 64, "num_inference_steps": steps, "max_sequence_length": 32}
    return pipeline(prompt=prompts, generator=generators, **call).images


def load():
    pipeline = FluxPipeline.from_pretrained(LETTERS.folder)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@pytest.mark.slow
@pytest.mark.learning
def test_the_quickstarts_flags_teach_a_subject_and_keep_the_rest(train, tmp_path):
    letters.main(["glyph", str(tmp_path / "images")])
    rng = random.Random("class prompts")
    templates = ("{1} in {0}, {3} in {2}", "{2} {3}, {0} {1}")  # in another order than the prompts that are scored
    prompts = [
        rng.choice(templates).format(scene.color, scene.thing, scene.background, scene.texture)
        for scene in (letters.random_scene(rng) for _ in range(80))
    ]
    (tmp_path / "prompts.txt").write_text("\n".join(prompts))
    flags = quickstart_flags(tmp_path)
    flags[flags.index("--class_prompt") + 1] = tmp_path / "prompts.txt"
    rng = random.Random("subjects")
    wanted = [letters.random_subject(rng, "glyph")[1] for _ in range(SCORED)]
    scenes, ordinary = captions()
    before = all_right(sample(load(), ordinary), scenes, letters.score_scene)
    rows = []
    for seed in range(3):
        train(
            "train_dreambooth_flux_advanced",
            *("--pretrained_model_name_or_path", LETTERS.folder, "--max_sequence_length", 32, "--report_to", "none"),
            *("--instance_data_dir", tmp_path / "images", "--resolution", 64, "--cache_latents"),
            *(*flags, "--seed", seed, "--output_dir", tmp_path / f"{seed}"),
        )
        pipeline = load()
        pipeline.load_lora_weights(tmp_path / f"{seed}")
        subject = 100 * np.mean([score_subject(image, "glyph") for image in sample(pipeline, wanted)])
        after = all_right(sample(pipeline, ordinary), scenes, letters.score_scene)
        print(f"seed {seed}: subject {subject:.0f}, ordinary prompts {before:.0f} -> {after:.0f}")
        rows.append((subject, after))
    subject, after = np.mean(rows, axis=0)
    print(f"mean: subject {subject:.0f}, ordinary prompts {before:.0f} -> {after:.0f}")
    assert subject >= 35
    assert after >= before - 6


@pytest.mark.slow
@pytest.mark.learning
@pytest.mark.parametrize(("kind", "bar"), [("canny", 60), ("coloring", 60)])
def test_omini_follows_its_condition(train, tmp_path, kind, bar):
    """With the flags of examples/omini/toy.args: the letter in its colour is where the condition has it."""
    letters.main(["scenes", str(tmp_path / "scenes"), "--count", "512"])
    files = train_on(train, tmp_path / "scenes", tmp_path / "run", kind, "--rank 16 --max_train_steps 600", LETTERS)
    scenes, prompts = captions(COUNT, "conditions")
    pictures = [letters.draw(scene) for scene in scenes]
    make = lambda c: [convert_to_condition(c.type, picture) for picture in pictures]  # noqa: E731

    def score(i, image):
        return iou(labels(image) == COLOR_NAMES.index(scenes[i].color), letters.mask_of(scenes[i]))

    scores = compare(files, prompts, make, score, toy=LETTERS)
    report(f"{kind}, overlap with the letter, in its colour", scores, bar, over_untrained=10)


@pytest.mark.slow
@pytest.mark.learning
def test_twinflow_draws_in_few_steps(train, tmp_path):
    letters.main(["scenes", str(tmp_path / "scenes"), "--count", "1500"])
    train(
        "train_twinflow",
        *("--pretrained_model_name_or_path", LETTERS.folder, "--train_data_dir", tmp_path / "scenes"),
        *("--resolution", 64, "--max_sequence_length", 32, "--cache_latents", "--train_batch_size", 24),
        *("--learning_rate", 3e-4, "--max_train_steps", 590, "--report_to", "none", "--output_dir", tmp_path / "run"),
    )
    scenes, prompts = captions()
    scores = {}
    for steps in (1, 2, 4):
        before = all_right(sample(load(), prompts, steps=steps), scenes, letters.score_scene)
        images = generate(tmp_path / "run", prompts, batch_size=SCORED, steps=steps, style=STYLES[steps])
        scores[steps] = all_right(images, scenes, letters.score_scene)
        print(f"{steps} steps: all right {before:.0f} -> {scores[steps]:.0f}")
        assert scores[steps] >= before + 20
    assert scores[1] >= 40
    assert scores[2] >= 55
