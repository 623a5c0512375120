"""Generates images of the same prompts with the toy FLUX before and after a LoRA, or several, and scores them.

python examples/toy/compare.py OUTPUT_DIR --subject glyph --output before_after.png
"""

import random
import sys
from pathlib import Path


sys.path.insert(0, str(Path(__file__).parents[2]))


# isort: split
from common.arguments import Parser, exit_if_unreadable
from common.data import check_image_file, save_image
from common.lora import check_applied, find_lora
from common.validation import image_grid

import numpy as np
import torch
from diffusers import FluxPipeline

from examples.toy.world import SUBJECTS, all_right, caption, random_scene, random_subject, score_subject


HERE = Path(__file__).parent


def sample(pipeline, prompts, seed):
    """One 64 x 64 image per prompt, in 20 steps."""
    generators = [torch.Generator().manual_seed(seed + i) for i in range(len(prompts))]
    return pipeline(
        prompts, height=64, width=64, num_inference_steps=20, max_sequence_length=32, generator=generators
    ).images


def evaluate(pipeline, subject, *, count=64, seed=0, replace=lambda prompt: prompt):
    """Subject score, the share of known scenes that are right (both 0 to 100), and some (image, prompt) pairs of each.

    `replace` puts trained tokens in the place of the subject's name.
    """
    rng = random.Random(seed)
    prompts = [random_subject(rng, subject)[1] for _ in range(count)]
    scenes = [random_scene(rng, pair=0, outline=0) for _ in range(count)]
    subjects = sample(pipeline, [replace(prompt) for prompt in prompts], seed)
    others = sample(pipeline, [caption(scene) for scene in scenes], seed)
    subject_score = np.mean([score_subject(image, subject) for image in subjects])
    shown = list(zip(subjects[:4], prompts[:4], strict=True))
    shown += [(image, caption(scene)) for image, scene in zip(others[:4], scenes[:4], strict=True)]
    return 100 * float(subject_score), all_right(others, scenes), shown


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


def main(argv=None):
    parser = Parser(description=__doc__.split("\n")[0], takes="OUTPUT_DIR ...")
    parser.add_argument("lora", metavar="OUTPUT_DIR", type=Path, nargs="+", help="a trainer's output folder")
    parser.add_argument("--subject", choices=SUBJECTS, default="glyph")
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
    pipeline = FluxPipeline.from_pretrained(HERE / "flux")
    pipeline.set_progress_bar_config(desc="Sampling", leave=False)
    rows = []
    names = ["after"] if len(args.lora) == 1 else [folder.name for folder in args.lora]
    for when, file in zip(["before", *names], [None, *files], strict=True):
        pipeline.unload_lora_weights()
        if file:
            with exit_if_unreadable(file):
                pipeline.load_lora_weights(file.parent, weight_name=file.name)
                check_applied(file, [pipeline.transformer, pipeline.text_encoder])
        subject_score, ordinary, shown = evaluate(pipeline, args.subject)
        reworded = evaluate_other_words(pipeline)
        print(
            f"{when:6}  {SUBJECTS[args.subject]}: {subject_score:.0f} of 100   "
            f"ordinary prompts: {ordinary:.0f} of 100, in other words {reworded:.0f}"
        )
        rows += [(image, f"{when}: {prompt}") for image, prompt in shown]
    print(save_image(image_grid([image for image, _ in rows], [text for _, text in rows], columns=8), args.output))


if __name__ == "__main__":
    main()
