"""Measures models that train_twinflow.py trained from the toy FLUX, beside the toy FLUX, at 1, 2, 4 and 20 steps.

    python examples/twinflow/compare.py --make_data scenes     # images to train on
    python examples/twinflow/compare.py OUTPUT_DIR [OUTPUT_DIR ...] --output compare.png

Per number of steps: images whose background, foreground and shape match the prompt (percent); sharpness, the mean of
the largest 5 % of differences between neighbouring pixels; sliced Wasserstein distance of VAE latents to those of
rendered scenes of the same prompts. One can improve while another gets worse: blurred images still satisfy a
classifier, and guidance raises scores but narrows the spread.
"""

import random
import sys
from pathlib import Path


sys.path.insert(0, str(Path(__file__).parents[2]))


# isort: split
from common.arguments import Parser, check_folder, positive_int, seed_number
from common.data import check_image_file, save_image
from common.validation import image_grid

import numpy as np
import torch
from diffusers import FluxPipeline

from examples.toy.pretrain import encode, to_tensor
from examples.toy.world import all_right, caption, random_scene, sliced_wasserstein
from examples.toy.world import draw as draw_scene
from examples.twinflow.generate import check_source, generate, trained_args


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


def generate_with_base(prompts, steps, seed=0):
    """Images of the toy FLUX itself in `steps` steps of its own scheduler."""
    pipeline = FluxPipeline.from_pretrained(TOY)
    pipeline.set_progress_bar_config(disable=True)
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


def check_args(args):
    """Problems of the folders and files that are named."""
    problems = []
    if args.make_data:
        if args.folders or args.output:
            problems.append("--make_data only renders scenes: leave out the folders and --output")
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
    parser.add_argument("--count", type=positive_int, help="images per cell (default: 256), or scenes (default: 1500)")
    parser.add_argument("--seed", type=seed_number, default=0, help="random seed of prompts and images")
    parser.add_argument(
        "--steps", type=int, nargs="+", default=list(STYLES), choices=list(STYLES), help="numbers of steps"
    )
    parser.add_argument("--output", type=Path, help="file for a grid of some of the images")
    args = parser.parse_args(argv)
    parser.refuse(check_args(args))
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
    for folder in (None, *args.folders):
        name = folder.name if folder else "base"
        cells = []
        for steps in args.steps:
            if folder:
                images = generate(folder, prompts, seed=args.seed, batch_size=64, steps=steps, style=STYLES[steps])
            else:
                images = generate_with_base(prompts, steps, args.seed)
            percent, sharp, distance = measure(images, scenes, vae)
            cells.append(f"{percent:.0f} / {sharp:.1f} / {distance:.3f}")
            for image, prompt in zip(images[:8], prompts, strict=False):
                grid_images.append(image)
                grid_captions.append(f"{name}, {steps}: {prompt}")
        print(f"| {name} | {' | '.join(cells)} |", flush=True)
    if args.output:
        print(save_image(image_grid(grid_images, grid_captions, columns=8, min_width=96), args.output))


if __name__ == "__main__":
    main()
