"""Measures models that train_twinflow.py trained from the toy FLUX, beside the toy FLUX, at 1, 2, 4 and 20 steps.

    python examples/twinflow/compare.py --make_data scenes     # images to train on
    python examples/twinflow/compare.py OUTPUT_DIR [OUTPUT_DIR ...] --output compare.png
    python examples/twinflow/compare.py OUTPUT_DIR --lora SUBJECT --subject glyph --output subject.png

Per number of steps: images whose background, foreground and shape match the prompt (percent); sharpness, the mean of
the largest 5 % of differences between neighbouring pixels; sliced Wasserstein distance of VAE latents to those of
rendered scenes of the same prompts. One can improve while another gets worse: blurred images still satisfy a
classifier, and guidance raises scores but narrows the spread. With --subject, the subject's score (0 to 100) stands
before them; with --lora, a second row of each model has the LoRAs on top.
"""

import random
import sys
from pathlib import Path


sys.path.insert(0, str(Path(__file__).parents[2]))


# isort: split
from common.arguments import Parser, check_folder, in_range, positive_int, seed_number
from common.data import check_image_file, save_image
from common.validation import image_grid

import numpy as np
import torch
from diffusers import FluxPipeline

from examples.toy.pretrain import encode, to_tensor
from examples.toy.world import (
    SUBJECTS,
    all_right,
    caption,
    random_scene,
    random_subject,
    score_subject,
    sliced_wasserstein,
)
from examples.toy.world import draw as draw_scene
from examples.twinflow.generate import check_source, find_loras, generate, load_adapter, trained_args


TOY = Path(__file__).parents[1] / "toy" / "flux"
STYLES = {1: "few", 2: "few", 4: "any", 20: "mul"}


def make_data(folder, count=1500, seed=5):
    """Rendered scenes with captions, as the toy FLUX was pretrained on."""
    folder.mkdir(parents=True)
    rng = random.Random(seed)
    for i in range(count):
        scene = random_scene(rng, pair=0.1, outline=0.05)
        draw_scene(scene).save(folder / f"{i:04d}.png")
        (folder / f"{i:04d}.txt").write_text((caption(scene, rng) or caption(scene)) + "\n")


def scenes_and_prompts(count, seed):
    rng = random.Random(f"twinflow/{seed}")
    scenes = [random_scene(rng, pair=0, outline=0) for _ in range(count)]
    return scenes, [caption(scene) for scene in scenes]


def subject_prompts(subject, count, seed):
    rng = random.Random(f"twinflow/{subject}/{seed}")
    return [random_subject(rng, subject)[1] for _ in range(count)]


def generate_with_base(prompts, steps, seed=0, loras=()):
    """Images of the toy FLUX itself in `steps` steps of its own scheduler, with the LoRAs of `find_loras` on top."""
    pipeline = FluxPipeline.from_pretrained(TOY)
    pipeline.set_progress_bar_config(disable=True)
    for i, (file, _) in enumerate(loras):
        load_adapter(pipeline.transformer, file, "flux", f"lora_{i}")
    if loras:
        pipeline.transformer.set_adapters([f"lora_{i}" for i in range(len(loras))], [scale for _, scale in loras])
    generators = [torch.Generator().manual_seed(seed + i) for i in range(len(prompts))]
    size = {"height": 64, "width": 64, "max_sequence_length": 32}
    return pipeline(prompts, num_inference_steps=steps, generator=generators, **size).images


def sharpness(images):
    """Mean of the largest 5 % of differences between neighbouring pixels, 0 to 255."""
    values = []
    for image in images:
        pixels = np.asarray(image.convert("L"), dtype=np.float32)
        steps = np.concatenate([np.abs(np.diff(pixels, axis=axis)).ravel() for axis in (0, 1)])
        values.append(np.sort(steps)[-len(steps) // 20 :].mean())
    return float(np.mean(values))


def measure(images, scenes, vae, seed=0):
    """(percent all right, sharpness, distance of latents) of images generated for scenes.

    The distance is to scenes of the same colours and kinds of shapes, at other places and sizes: prompts name neither.
    """
    rng = random.Random(f"reference/{seed}")
    rendered = []
    for scene in scenes:
        prompted = scene.shapes[0]
        placed = random_scene(rng, pair=0, outline=0).shapes[0]
        shape = type(prompted)(prompted.kind, prompted.color, placed.x, placed.y, placed.r)
        rendered.append(draw_scene(type(scene)(scene.background, (shape,))))
    image_latents = encode(vae, to_tensor(images)).flatten(1).double().numpy()
    rendered_latents = encode(vae, to_tensor(rendered)).flatten(1).double().numpy()
    return all_right(images, scenes), sharpness(images), sliced_wasserstein(image_latents, rendered_latents)


def generate_with(folder, prompts, steps, seed=0, loras=()):
    """Images of a run's folder, or of the toy FLUX itself (None), in the style that suits `steps`."""
    if folder is None:
        return generate_with_base(prompts, steps, seed, loras)
    return generate(folder, prompts, seed=seed, batch_size=64, steps=steps, style=STYLES[steps], loras=loras)


def mean_subject_score(images, subject):
    """0 to 100."""
    return 100 * float(np.mean([score_subject(image, subject) for image in images]))


def check_args(args):
    """Problems of the folders and files that are named."""
    problems = []
    if args.make_data:
        if args.folders or args.output or args.lora or args.subject:
            problems.append("--make_data only renders scenes: leave out the folders, --lora, --subject and --output")
        if args.make_data.exists():
            problems.append(f"--make_data {args.make_data} exists: name a new folder")
        return problems + check_folder("--make_data", args.make_data)
    for folder in args.folders:
        try:
            check_source(folder, trained_args(folder))
        except (OSError, ValueError) as error:
            problems.append(str(error))
    return problems + (check_image_file("--output", args.output) if args.output else [])


def main(argv=None):
    parser = Parser(description=__doc__.split("\n")[0], takes="FOLDER ...")
    parser.add_argument("folders", metavar="FOLDER", type=Path, nargs="*", help="output folders of train_twinflow.py")
    parser.add_argument("--make_data", type=Path, metavar="FOLDER", help="only render scenes into this folder")
    parser.add_argument("--lora", type=Path, nargs="+", default=[], help="LoRAs on top, such as a subject's")
    parser.add_argument(
        "--lora_scale", type=in_range(float, -10, 10), nargs="+", metavar="SCALE", help="strength of each (default: 1)"
    )
    parser.add_argument("--subject", choices=tuple(SUBJECTS), help="what is scored beside ordinary prompts")
    parser.add_argument("--count", type=positive_int, help="images per cell (default: 256), or scenes (default: 1500)")
    parser.add_argument("--seed", type=seed_number, default=0, help="random seed of prompts and images")
    parser.add_argument(
        "--steps", type=int, nargs="+", default=list(STYLES), choices=list(STYLES), help="numbers of steps"
    )
    parser.add_argument("--output", type=Path, help="file for a grid of some of the images")
    args = parser.parse_args(argv)
    loras, problems = find_loras(args.lora, args.lora_scale)
    parser.refuse(check_args(args) + problems)
    if args.make_data:
        make_data(args.make_data, args.count or 1500)
        return
    vae = FluxPipeline.from_pretrained(TOY).vae.float()
    scenes, prompts = scenes_and_prompts(args.count or 256, args.seed)
    headings = ["1 step" if steps == 1 else f"{steps} steps" for steps in args.steps]
    print(f"| model | {' | '.join(headings)} |")
    print("| --- |" + " --- |" * len(args.steps))
    grid_images = []
    grid_captions = []
    wanted = subject_prompts(args.subject, len(prompts), args.seed) if args.subject else []
    ways = []
    for folder in (None, *args.folders):
        name = folder.name if folder else "base"
        ways.append((name, folder, []))
        if loras:
            ways.append((" + ".join([name, *(path.name for path in args.lora)]), folder, loras))
    for name, folder, added in ways:
        cells = []
        for steps in args.steps:
            images = generate_with(folder, prompts, steps, args.seed, added)
            percent, sharp, distance = measure(images, scenes, vae)
            cell = f"{percent:.0f} / {sharp:.1f} / {distance:.3f}"
            shown = list(zip(images, prompts, strict=True))[:8]
            if wanted:
                subjects = generate_with(folder, wanted, steps, args.seed, added)
                cell = f"{mean_subject_score(subjects, args.subject):.0f} / {cell}"
                shown = list(zip(subjects, wanted, strict=True))[:4] + shown[:4]
            cells.append(cell)
            for image, prompt in shown:
                grid_images.append(image)
                grid_captions.append(f"{name}, {steps}: {prompt}")
        print(f"| {name} | {' | '.join(cells)} |", flush=True)
    if args.output:
        print(save_image(image_grid(grid_images, grid_captions, columns=8, min_width=96), args.output))


if __name__ == "__main__":
    main()
