"""What train_omini.py teaches the toy FLUX: the picture follows its condition, by a number.

Each test prints three: the base model with the caption alone, the untrained adapter, the trained one; and its bar.
"""

import json
import random
from pathlib import Path
from typing import NamedTuple

from common.lora import add_lora
from common.validation import image_grid

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from diffusers import Flux2KleinKVPipeline
from PIL import Image
from safetensors import safe_open

import train_omini as omini
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
from train_omini import ConditionSpec


pytestmark = pytest.mark.learning

HERE = Path(__file__).parents[1] / "examples" / "toy"
COUNT = 24


class Toy(NamedTuple):
    """A model of examples/toy, the side of its images, and the grid of 1 / places on which its shapes lie."""

    folder: Path
    side: int
    places: int = 4


SMALL = Toy(HERE / "flux", side=64)
LARGE = Toy(HERE / "flux-128", side=128, places=8)
SIDE = SMALL.side
LEARN = (
    *("--max_sequence_length", 16, "--report_to", "none"),
    *("--cache_latents", "--train_batch_size", 16, "--drop_image_prob", 0),
    *("--optimizer", "adamw", "--learning_rate", 1e-3),
    # at high noise the caption tells little of where things are: there the condition is worth reading
    *("--timestep_sampling", "shift", "--discrete_flow_shift", 6, "--drop_text_prob", 0.1),
)


def make_scenes(folder, toy=SMALL, count=512):
    """A folder of scenes with captions."""
    rng = random.Random(1)
    for i in range(count):
        scene = random_scene(rng, places=toy.places)
        draw(scene, toy.side, toy.side).save(folder / f"{i:03d}.png")
        (folder / f"{i:03d}.txt").write_text(caption(scene))
    return folder


@pytest.fixture(scope="session")
def scenes(tmp_path_factory):
    return make_scenes(tmp_path_factory.mktemp("scenes"))


def unseen(toy=SMALL):
    """Scenes of another seed, one filled shape each: (scenes, pictures)."""
    rng = random.Random(99)
    drawn = [random_scene(rng, pair=0, outline=0, places=toy.places) for _ in range(COUNT)]
    return drawn, [draw(scene, toy.side, toy.side) for scene in drawn]


def load(files, toy=SMALL):
    """The toy pipeline with trained adapters, and what their headers say."""
    transformer = omini.OminiTransformer2DModel.from_pretrained(toy.folder, subfolder="transformer")
    pipeline = omini.OminiPipeline.from_pretrained(toy.folder, transformer=transformer)
    pipeline.set_progress_bar_config(disable=True)
    conditions = []
    for path in files:
        with safe_open(path, "pt") as file:
            about = json.loads(file.metadata()["omini"])
        conditions += [
            ConditionSpec(**{k: tuple(v) if isinstance(v, list) else v for k, v in each.items()})
            for each in about["conditions"]
        ]
        pipeline.load_lora_weights(path.parent, weight_name=path.name, adapter_name=conditions[-1].adapter)
    return pipeline, conditions, about


def sample(pipeline, prompts, conditions, images, mask=None, independent=False, side=SIDE):
    return pipeline(
        prompts,
        specs=conditions,
        condition_images=images,
        mask=mask,
        height=side,
        width=side,
        num_inference_steps=12,
        guidance_scale=1.0,
        independent_condition=independent,
        max_sequence_length=16,
        generator=torch.Generator().manual_seed(0),
    ).images


def compare(files, prompts, make, score, *, mask=None, toy=SMALL):
    """Mean scores, 0 to 100, of the base model, the untrained and the trained adapter; and a picture of them.

    make(condition) returns the COUNT pictures of a condition, score(i, image) judges image i.
    """
    pipeline, conditions, about = load(files, toy)
    images = [make(condition) for condition in conditions]
    integrated = "token_integration" in [condition.type for condition in conditions]
    settings = {"independent": about["independent_condition"], "side": toy.side}
    trained = sample(pipeline, prompts, conditions, images, mask if integrated else None, **settings)
    pipeline.unload_lora_weights()
    for name in dict.fromkeys(condition.adapter for condition in conditions):
        add_lora(
            pipeline.transformer, rank=4, alpha=4, dropout=0.0, target_modules=omini.TARGET_MODULES, adapter_name=name
        )
    untrained = sample(pipeline, prompts, conditions, images, mask if integrated else None, **settings)
    base = sample(pipeline, prompts, [], [], side=toy.side)
    rows = [*images, base, untrained, trained]
    grid = [image for row in rows for image in row[:8]]
    image_grid(grid, [""] * len(grid), columns=8, min_width=96).save(files[0].parent / "compared.png")
    return tuple(100 * float(np.mean([score(i, image) for i, image in enumerate(row)])) for row in rows[-3:])


def report(name, scores, bar, over_untrained=20):
    base, untrained, trained = scores
    print(f"{name}: base {base:.0f}, untrained {untrained:.0f}, trained {trained:.0f} (bar {bar})")
    assert trained >= bar
    assert trained >= base + 20
    assert trained >= untrained + over_untrained


def agreement(image, picture, where):
    """Share of the pixels of `where` with the same nearest colour."""
    return (labels(image) == labels(picture))[where].mean()


def overlap(image, scene):
    """Of the pixels in the shape's colour and of the shape's own, the share that is both."""
    shape = scene.shapes[0]
    return iou(labels(image) == COLOR_NAMES.index(shape.color), mask_of(scene, *image.size))


def train_on(train, folder, output, kinds, flags, toy=SMALL):
    """The adapters of a run on `folder`; kinds and flags are words of the command line."""
    data = ("--instance_data_dir", folder, "--output_dir", output, "--target_size", toy.side)
    model = ("--pretrained_model_name_or_path", toy.folder)
    train("train_omini", *LEARN, *model, *data, "--condition_type", *kinds.split(), *flags.split())
    return sorted(output.glob("*.safetensors"))


@pytest.mark.slow
@pytest.mark.parametrize(("steps", "bar"), [pytest.param(100, 50, id="short"), (320, 75)])
def test_it_learns_coloring(train, scenes, tmp_path, steps, bar):
    """Edges and places from the grey image, colours from the caption."""
    files = train_on(
        train,
        scenes,
        tmp_path,
        "coloring",
        f"--rank 8 --drop_text_prob 0.5 --discrete_flow_shift 3 --max_train_steps {steps}",
    )
    drawn, pictures = unseen()
    make = lambda c: [omini.convert_to_condition(c.type, picture) for picture in pictures]  # noqa: E731
    prompts = [caption(scene) for scene in drawn]
    scores = compare(files, prompts, make, lambda i, image: overlap(image, drawn[i]))
    report("coloring, shape in its colour", scores, bar)


@pytest.mark.slow
def test_it_learns_canny(train, scenes, tmp_path):
    files = train_on(train, scenes, tmp_path, "canny", "--rank 16 --max_train_steps 600")
    drawn, pictures = unseen()
    make = lambda c: [omini.convert_to_condition(c.type, picture) for picture in pictures]  # noqa: E731
    prompts = [caption(scene) for scene in drawn]
    scores = compare(files, prompts, make, lambda i, image: overlap(image, drawn[i]))
    report("canny, shape in its colour", scores, 75)


@pytest.mark.slow
def test_canny_places_edges_at_128_pixels(train, tmp_path):
    """Over three seeds, where a scene has more places. An untrained adapter copies the condition, edges and all."""
    (tmp_path / "scenes").mkdir()
    folder = make_scenes(tmp_path / "scenes", LARGE)
    drawn, pictures = unseen(LARGE)
    make = lambda c: [omini.convert_to_condition(c.type, picture) for picture in pictures]  # noqa: E731
    prompts = [caption(scene) for scene in drawn]
    score = lambda i, image: edge_overlap(image, pictures[i])  # noqa: E731
    rows = []
    for seed in range(3):
        flags = f"--rank 16 --max_train_steps 600 --seed {seed}"
        files = train_on(train, folder, tmp_path / f"{seed}", "canny", flags, LARGE)
        rows.append(compare(files, prompts, make, score, toy=LARGE))
        print(f"seed {seed}: {rows[-1][-1]:.0f}")
    report("canny at 128 pixels, edge overlap, mean of three seeds", np.mean(rows, axis=0), 80, over_untrained=10)


@pytest.mark.slow
def test_flux2_klein_learns_coloring(train, scenes, tmp_path):
    """As above, and drawn by diffusers' own pipeline, with the condition from its cache in all steps but the first."""
    model, length = HERE / "flux2", 32
    flags = f"--pretrained_model_name_or_path {model} --max_sequence_length {length} --rank 16"
    flags += " --discrete_flow_shift 3 --max_train_steps 600"
    (file,) = train_on(train, scenes, tmp_path, "coloring", flags)
    drawn, pictures = unseen()
    greys = [omini.convert_to_condition("coloring", picture) for picture in pictures]
    pipeline = Flux2KleinKVPipeline.from_pretrained(model, dtype=torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    call = {"height": SIDE, "width": SIDE, "num_inference_steps": 12, "max_sequence_length": length}

    def sample(images):
        generator = torch.Generator().manual_seed(0)
        return [
            pipeline(prompt=caption(scene), image=image, **call, generator=generator).images[0]
            for scene, image in zip(drawn, images, strict=True)
        ]

    rows = [sample([None] * COUNT), sample(greys)]
    pipeline.load_lora_weights(tmp_path, weight_name=file.name)
    rows.append(sample(greys))
    grid = [image for row in [greys, *rows] for image in row[:8]]
    image_grid(grid, [""] * len(grid), columns=8, min_width=96).save(tmp_path / "compared.png")
    scores = [100 * np.mean([overlap(image, scene) for image, scene in zip(row, drawn, strict=True)]) for row in rows]
    report("coloring with FLUX.2-klein, shape in its colour", scores, 80)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "steps", "bar", "over_untrained"), [("deblurring", 500, 90, 10), ("sr", 900, 60, 20)]
)
def test_it_learns_to_sharpen(train, scenes, tmp_path, kind, steps, bar, over_untrained):
    """The untrained model copies a blurred picture as it is, edges and all; for sr, it stands beside the image and has
    four tokens."""
    files = train_on(train, scenes, tmp_path, kind, f"--rank 16 --max_train_steps {steps}")
    drawn, pictures = unseen()
    rng = np.random.default_rng(0)
    make = lambda c: [  # noqa: E731
        omini.convert_to_condition(c.type, picture.resize(c.size[::-1]), rng=rng) for picture in pictures
    ]
    prompts = [caption(scene) for scene in drawn]
    scores = compare(files, prompts, make, lambda i, image: edge_overlap(image, pictures[i]))
    report(f"{kind}, edge overlap", scores, bar, over_untrained)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["fill", "token_integration"])
def test_it_learns_to_fill(train, scenes, tmp_path, kind):
    """The right half without a caption: what is in it must go on from what is left of it.

    Clean tokens in the image's own places are next to nothing new for the base model, so that token integration
    nearly works untrained: the adapter has only to be better.
    """
    files = train_on(train, scenes, tmp_path, kind, "--rank 8 --drop_text_prob 0.5 --max_train_steps 300")
    _, pictures = unseen()
    mask = np.zeros((SIDE, SIDE), dtype=bool)
    mask[:, SIDE // 2 :] = True
    make = lambda c: [omini.convert_to_condition(c.type, picture, mask=mask) for picture in pictures]  # noqa: E731
    scores = compare(files, [""] * COUNT, make, lambda i, image: agreement(image, pictures[i], mask), mask=mask)
    report(f"{kind}, colours in the mask", scores, 75, over_untrained=2 if kind == "token_integration" else 20)


@pytest.mark.slow
def test_it_learns_canny_and_coloring_together(train, scenes, tmp_path):
    files = train_on(
        train,
        scenes,
        tmp_path,
        "canny coloring",
        "--adapter_per_condition --rank 8 --drop_text_prob 0.5 --max_train_steps 400",
    )
    assert [file.name for file in files] == ["canny.safetensors", "coloring.safetensors"]
    drawn, pictures = unseen()
    make = lambda c: [omini.convert_to_condition(c.type, picture) for picture in pictures]  # noqa: E731
    prompts = [caption(scene) for scene in drawn]
    scores = compare(files, prompts, make, lambda i, image: overlap(image, drawn[i]))
    report("canny and coloring, shape in its colour", scores, 80)


def pair(rng, toy=SMALL):
    """Two scenes with the same shape in the same colour, elsewhere and on other backgrounds."""
    color, first, second = rng.sample(COLOR_NAMES, 3)
    shape = random_shape(rng, color, places=toy.places)
    other = random_shape(rng, color, kind=shape.kind, places=toy.places)
    return Scene(first, (shape,)), Scene(second, (other,))


def make_pairs(folder, toy=SMALL, count=400):
    """A folder of sheets with both pictures of a pair; the captions say nothing of the thing but "a shape"."""
    rng, rows, side = random.Random(1), [], toy.side
    folder.mkdir()
    for i in range(count):
        scenes = pair(rng, toy)
        sheet = Image.new("RGB", (2 * side + 3 * 8, side + 2 * 8), "black")
        for k, scene in enumerate(scenes):
            sheet.paste(draw(scene, side, side), (8 + k * (side + 8), 8))
        sheet.save(folder / f"{i:03d}.png")
        texts = {f"description_{k}": f"a shape on a {scene.background} background" for k, scene in enumerate(scenes)}
        rows.append(json.dumps({"file_name": f"{i:03d}.png", "description": texts}) + "\n")
    (folder / "metadata.jsonl").write_text("".join(rows))
    return folder


def score_subjects(files, parts, toy=SMALL):
    """As `compare`: the share of pictures in which all `parts` of a scene's scores are as the condition shows."""
    rng = random.Random(99)
    pairs = [pair(rng, toy) for _ in range(COUNT)]
    make = lambda c: [draw(shown, toy.side, toy.side) for shown, _ in pairs]  # noqa: E731
    prompts = [f"a shape on a {wanted.background} background" for _, wanted in pairs]
    score = lambda i, image: min(score_scene(image, pairs[i][1])[part] for part in parts)  # noqa: E731
    return compare(files, prompts, make, score, toy=toy)


@pytest.mark.slow
def test_it_learns_a_subject_it_is_shown(train, tmp_path):
    """Its colour and form come from the condition."""
    flags = f"--image_size {SIDE} --padding 8 --rank 16 --max_train_steps 700"
    files = train_on(train, make_pairs(tmp_path / "pairs"), tmp_path / "run", "subject", flags)
    scores = score_subjects(files, ("background", "foreground"))
    report("subject, its colour on the asked background", scores, 60)


@pytest.mark.slow
def test_it_learns_a_subjects_shape(train, tmp_path):
    """Which takes a larger adapter and batch, more pairs and longer: six minutes of one core."""
    flags = (
        f"--image_size {SIDE} --padding 8 --rank 64 --train_batch_size 32 --max_train_steps 2500 --drop_text_prob 0"
    )
    flags += " --learning_rate 2e-3 --lr_scheduler cosine --lr_warmup_steps 50"
    files = train_on(train, make_pairs(tmp_path / "pairs", count=1000), tmp_path / "run", "subject", flags)
    report("subject, its shape", score_subjects(files, ("shape",)), 45)


@pytest.fixture(scope="session")
def depth_model(tmp_path_factory):
    """A folder with a small depth estimator, trained here for 40 seconds: shapes are near (1), the background is
    far (0)."""
    from transformers import DepthAnythingConfig, DepthAnythingForDepthEstimation, DPTImageProcessorPil

    torch.manual_seed(0)
    config = DepthAnythingConfig(
        backbone_config={
            "model_type": "dinov2",
            "image_size": SIDE,
            "patch_size": 8,
            "hidden_size": 64,
            "num_hidden_layers": 4,
            "num_attention_heads": 4,
            "out_indices": [1, 2, 3, 4],
            "reshape_hidden_states": False,
            "apply_layernorm": True,
        },
        patch_size=8,
        reassemble_hidden_size=64,
        neck_hidden_sizes=[24, 24, 24, 24],
        fusion_hidden_size=24,
        head_in_index=-1,
        head_hidden_size=16,
        depth_estimation_type="metric",  # ends in a sigmoid; the other's ReLU dies where most of a picture is far
        max_depth=1,
    )
    model = DepthAnythingForDepthEstimation(config)
    for name, parameter in model.named_parameters():
        if name.startswith(("neck", "head")) and parameter.ndim == 4:  # its own, of 0.02, lets nothing through
            torch.nn.init.normal_(parameter, std=parameter[0].numel() ** -0.5)
    model.head.conv3.weight.data *= 0.1
    processor = DPTImageProcessorPil(size={"height": SIDE, "width": SIDE}, keep_aspect_ratio=False)
    steps, rng = 300, random.Random(5)
    optimizer = torch.optim.AdamW(model.parameters())
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=steps)
    for _ in range(steps):
        scenes = [random_scene(rng) for _ in range(16)]
        inputs = processor([draw(scene, SIDE, SIDE) for scene in scenes], return_tensors="pt")
        masks = torch.from_numpy(np.stack([mask_of(scene, SIDE, SIDE) for scene in scenes])).float()
        loss = F.binary_cross_entropy(model(**inputs).predicted_depth, masks)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    folder = tmp_path_factory.mktemp("depth-model")
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


@pytest.mark.slow
def test_it_learns_to_draw_depth(train, scenes, depth_model, tmp_path):
    flags = f"--depth_model {depth_model} --rank 16 --drop_text_prob 1 --max_train_steps 400"
    files = train_on(train, scenes, tmp_path, "depth_pred", flags)
    drawn, pictures = unseen()
    make = lambda c: pictures  # noqa: E731

    def score(i, image):
        return iou(np.asarray(image.convert("L")) > 127, mask_of(drawn[i], SIDE, SIDE))

    report("depth_pred, overlap with the shapes", compare(files, [""] * COUNT, make, score), 70)


@pytest.mark.slow
def test_it_learns_to_follow_depth(train, scenes, depth_model, tmp_path):
    """The condition is the true depth, what is drawn is measured against the scene."""
    files = train_on(train, scenes, tmp_path, "depth", f"--depth_model {depth_model} --rank 16 --max_train_steps 400")
    drawn, _ = unseen()
    make = lambda c: [Image.fromarray(mask_of(scene, SIDE, SIDE)).convert("RGB") for scene in drawn]  # noqa: E731
    prompts = [caption(scene) for scene in drawn]
    scores = compare(files, prompts, make, lambda i, image: overlap(image, drawn[i]))
    report("depth, shape in its colour", scores, 75)
