"""Generates images of the same prompts with the toy FLUX before and after a LoRA, or several, and scores them.

python examples/toy/compare.py OUTPUT_DIR --subject glyph --output before_after.png
python examples/toy/compare.py OUTPUT_DIR --scales 0.6 0.8 1 1.2 --output scales.png
python examples/toy/compare.py OUTPUT_DIR --model flux2
"""

import random
import sys
from pathlib import Path


sys.path.insert(0, str(Path(__file__).parents[2]))


# isort: split
from common.arguments import Parser, exit_if_unreadable, in_range
from common.data import check_image_file, save_image
from common.lora import check_applied, find_lora
from common.validation import image_grid

import numpy as np
import torch
from diffusers import DiffusionPipeline

from examples.toy.world import (
    STYLE,
    SUBJECTS,
    all_right,
    caption,
    foreground_mask,
    random_in_style,
    random_scene,
    random_subject,
    score_subject,
)


HERE = Path(__file__).parent


def sample(pipeline, prompts, seed):
    """One 64 x 64 image per prompt, in 20 steps."""
    generators = [torch.Generator().manual_seed(seed + i) for i in range(len(prompts))]
    return pipeline(
        prompt=prompts, height=64, width=64, num_inference_steps=20, max_sequence_length=32, generator=generators
    ).images


def evaluate(pipeline, subject, *, count=64, seed=0, replace=lambda prompt: prompt):
    """Subject score, the share of known scenes that are right (both 0 to 100), and some (image, prompt) pairs of each.

    The score of the subject "style" is the share of shapes that are right and in the style. `replace` puts trained
    tokens in the place of the subject's name.
    """
    rng = random.Random(seed)
    asked = [random_in_style(rng) if subject == "style" else random_subject(rng, subject) for _ in range(count)]
    prompts = [prompt for _, prompt in asked]
    scenes = [random_scene(rng, pair=0, outline=0) for _ in range(count)]
    subjects = sample(pipeline, [replace(prompt) for prompt in prompts], seed)
    others = sample(pipeline, [caption(scene) for scene in scenes], seed)
    if subject == "style":
        subject_score = all_right(subjects, [scene for scene, _ in asked])
    else:
        subject_score = 100 * float(np.mean([score_subject(image, subject) for image in subjects]))
    shown = list(zip(subjects[:4], prompts[:4], strict=True))
    shown += [(image, caption(scene)) for image, scene in zip(others[:4], scenes[:4], strict=True)]
    return subject_score, all_right(others, scenes), shown


def in_other_words(scene, rng):
    """A caption that shares no template with those of the subject: "a photo of one red circle, blue background"."""
    shape = scene.shapes[0]
    beginning = rng.choice(["a photo of", "an image of", "a picture of"])
    size = rng.choice(["", "small " if shape.r < 0.21 else "big "])
    ending = rng.choice([" with {} background", ", {} background", " on {}"]).format(scene.background)
    return f"{beginning} one {size}{shape.color} {shape.kind}{ending}"


def evaluate_other_words(pipeline, *, count=64, seed=0):
    """The share of known scenes, 0 to 100, that are right where their prompts are `in_other_words`."""
    rng = random.Random(seed)
    scenes = [random_scene(rng, pair=0, outline=0) for _ in range(count)]
    return all_right(sample(pipeline, [in_other_words(scene, rng) for scene in scenes], seed), scenes)


def variety(pipeline, prompt, *, count=32, seed=0):
    """In how many different ways `count` seeds draw a prompt: places on a grid of 1/8, and heights."""
    found = set()
    for image in sample(pipeline, [prompt] * count, seed):
        ys, xs = np.nonzero(foreground_mask(image))
        if len(ys):
            found.add((round(xs.mean() / 8), round(ys.mean() / 8), round(np.ptp(ys) / 8)))
    return len(found)


def main(argv=None):
    parser = Parser(description=__doc__.split("\n")[0], takes="OUTPUT_DIR ...")
    parser.add_argument("lora", metavar="OUTPUT_DIR", type=Path, nargs="+", help="a trainer's output folder")
    parser.add_argument("--model", choices=["flux", "flux2"], default="flux", help="what the LoRA was trained on")
    parser.add_argument("--subject", choices=[*SUBJECTS, "style"], default="glyph")
    parser.add_argument(
        "--scales",
        metavar="SCALE",
        type=in_range(float, -10, 10),
        nargs="+",
        default=[1.0],
        help="strengths at which each LoRA is drawn and scored",
    )
    parser.add_argument("--output", type=Path, default=Path("before_after.png"))
    args = parser.parse_args(argv)
    problems = check_image_file("--output", args.output)
    files = []
    for folder in args.lora:
        try:
            files.append(find_lora(folder)[0])
        except (OSError, ValueError) as error:
            problems.append(str(error))
    parser.refuse(problems)
    pipeline = DiffusionPipeline.from_pretrained(HERE / args.model)
    pipeline.set_progress_bar_config(desc="Sampling", leave=False)
    names = SUBJECTS | {"style": STYLE}
    rows = []
    ways = [("before", None, 1.0)]
    for folder, file in zip(args.lora, files, strict=True):
        name = "after" if len(args.lora) == 1 else folder.name
        for scale in args.scales:
            ways.append((name if args.scales == [1] else f"{name} x {scale:g}", file, scale))
    for when, file, scale in ways:
        pipeline.unload_lora_weights()
        if file:
            with exit_if_unreadable(file):
                pipeline.load_lora_weights(file.parent, weight_name=file.name, adapter_name="lora")
                check_applied(file, [pipeline.transformer, pipeline.text_encoder])
            pipeline.set_adapters("lora", scale)
        subject_score, ordinary, shown = evaluate(pipeline, args.subject)
        reworded = evaluate_other_words(pipeline)
        print(
            f"{when:6}  {names[args.subject]}: {subject_score:.0f} of 100   "
            f"ordinary prompts: {ordinary:.0f} of 100, reworded: {reworded:.0f}"
        )
        rows += [(image, f"{when}: {prompt}") for image, prompt in shown]
    print(save_image(image_grid([image for image, _ in rows], [text for _, text in rows], columns=8), args.output))


if __name__ == "__main__":
    main()
