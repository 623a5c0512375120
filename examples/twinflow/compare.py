"""Measures what train_twinflow.py made of the toy FLUX, beside the toy FLUX itself, at 1, 2, 4 and 20 steps.

    python examples/twinflow/compare.py --make_data scenes     # pictures to train on
    python examples/twinflow/compare.py OUTPUT_DIR [OUTPUT_DIR ...] --output compare.png

Per number of steps: pictures in which background, foreground and shape are as the prompt says (percent); sharpness,
the mean of the largest 5 % of differences between neighbouring pixels; sliced Wasserstein distance of VAE latents to
those of drawn scenes of the same prompts. One can rise while another falls: blurred pictures please a classifier,
guidance raises scores and narrows the spread.
"""

import argparse
import random
import sys
from pathlib import Path


sys.path.insert(0, str(Path(__file__).parents[2]))


# isort: split
from common.validation import image_grid

import numpy as np
import torch
from diffusers import FluxPipeline

from examples.toy.pretrain import encode, to_tensor
from examples.toy.world import all_right, caption, random_scene, sliced_wasserstein
from examples.toy.world import draw as draw_scene
from examples.twinflow.generate import generate


TOY = Path(__file__).parents[1] / "toy" / "flux"
STYLES = {1: "few", 2: "few", 4: "any", 20: "mul"}


def make_data(folder, count=1500, seed=5):
    """Drawn scenes with captions, as the toy FLUX was pretrained on."""
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


def draw_base(prompts, steps, seed=0):
    """The toy FLUX' own pictures in `steps` steps of its own scheduler."""
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
    """(percent all right, sharpness, distance of latents) of pictures drawn for scenes."""
    rng = random.Random(f"reference/{seed}")
    drawn = []
    for scene in scenes:  # the prompt names colours and kind; size and place are free
        shape = scene.shapes[0]
        other = random_scene(rng, pair=0, outline=0).shapes[0]
        drawn.append(draw_scene(type(scene)(scene.background, (type(other)(shape.kind, shape.color, *place(other)),))))
    latents = [encode(vae, to_tensor(part)).flatten(1).double().numpy() for part in (images, drawn)]
    return all_right(images, scenes), sharpness(images), sliced_wasserstein(*latents)


def place(shape):
    return shape.x, shape.y, shape.r


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("folders", type=Path, nargs="*", help="output folders of train_twinflow.py")
    parser.add_argument("--make_data", type=Path, metavar="FOLDER", help="only draw scenes into this folder")
    parser.add_argument("--count", type=int, help="pictures per cell (default: 256), or scenes (default: 1500)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, nargs="+", default=list(STYLES), choices=list(STYLES))
    parser.add_argument("--output", type=Path, help="picture of some of them")
    args = parser.parse_args()
    if args.make_data:
        make_data(args.make_data, args.count or 1500)
        return
    vae = FluxPipeline.from_pretrained(TOY).vae.float()
    scenes, prompts = scenes_and_prompts(args.count or 256, args.seed)
    print("| model | " + " | ".join(f"{n} step{'s' * (n > 1)}" for n in args.steps) + " |")
    print("| --- |" + " --- |" * len(args.steps))
    shown = []
    for folder in (None, *args.folders):
        cells = []
        for steps in args.steps:
            if folder:
                images = generate(folder, prompts, seed=args.seed, batch_size=64, steps=steps, style=STYLES[steps])
            else:
                images = draw_base(prompts, steps, args.seed)
            cells.append("{:.0f} / {:.1f} / {:.3f}".format(*measure(images, scenes, vae)))
            name = folder.name if folder else "base"
            shown += [
                (image, f"{name}, {steps}: {prompt}") for image, prompt in zip(images[:8], prompts, strict=False)
            ]
        print(f"| {folder.name if folder else 'base'} | " + " | ".join(cells) + " |", flush=True)
    if args.output:
        image_grid([image for image, _ in shown], [text for _, text in shown], columns=8, min_width=96).save(
            args.output
        )


if __name__ == "__main__":
    main()
