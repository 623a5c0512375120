"""Makes a small fill50k: outlines of circles, the same circles filled and captions, in one zip file.

    python examples/influxedit/toy_circles.py toy_circles.zip --count 500

The archive has the layout of fill50k.zip, so prepare_fill_circles.py reads it. `score` measures how well a model
turned outlines into filled circles.
"""

import io
import json
import random
import sys
import zipfile
from pathlib import Path

import numpy as np


sys.path.insert(0, str(Path(__file__).parents[2]))

from common.arguments import Parser, check_file, in_range, positive_int, seed_number

from examples.toy.world import (
    COLOR_NAMES,
    Scene,
    Shape,
    background_of,
    draw,
    foreground_mask,
    foreground_of,
    iou,
    mask_of,
)


def random_circle(rng):
    """(outline, filled): a white outline on black and the same circle in two colors, as scenes of the toy world."""
    r = rng.uniform(0.15, 0.3)
    x, y = rng.uniform(r + 0.02, 0.98 - r), rng.uniform(r + 0.02, 0.98 - r)
    color, background = rng.sample(COLOR_NAMES, 2)
    outline = Scene("black", (Shape("circle", "white", x, y, r, outline=True),))
    return outline, Scene(background, (Shape("circle", color, x, y, r),))


def prompt_of(scene):
    """ "violet circle with orange background", as fill50k has it."""
    return f"{scene.shapes[0].color} circle with {scene.background} background"


def score(images, scenes):
    """{"circle", "background": share of images with the right color, "outline": mean IoU of the discs}, 0 to 100."""
    right_circles = []
    right_backgrounds = []
    overlaps = []
    for image, scene in zip(images, scenes, strict=True):
        right_circles.append(foreground_of(image) == scene.shapes[0].color)
        right_backgrounds.append(background_of(image) == scene.background)
        overlaps.append(iou(foreground_mask(image), mask_of(scene, *image.size)))
    return {
        "circle": 100 * float(np.mean(right_circles)),
        "background": 100 * float(np.mean(right_backgrounds)),
        "outline": 100 * float(np.mean(overlaps)),
    }


def write_archive(path, *, count, size=64, seed=0):
    """A zip file of `count` image pairs with their prompts, in the layout of fill50k.zip."""
    rng = random.Random(seed)
    lines = []
    with zipfile.ZipFile(path, "w") as archive:
        for i in range(count):
            scenes = random_circle(rng)
            for folder, scene in zip(("source", "target"), scenes, strict=True):
                buffer = io.BytesIO()
                draw(scene, size, size).save(buffer, "PNG")
                archive.writestr(f"fill50k/{folder}/{i}.png", buffer.getvalue())
            names = {"source": f"source/{i}.png", "target": f"target/{i}.png"}
            lines.append(json.dumps({**names, "prompt": prompt_of(scenes[1])}))
        archive.writestr("fill50k/prompt.json", "\n".join(lines) + "\n")


def main(argv=None):
    parser = Parser(description=__doc__.split("\n")[0], takes="ARCHIVE")
    parser.add_argument("archive", metavar="ARCHIVE", type=Path, help="the zip file to write")
    parser.add_argument("--count", type=positive_int, default=500, help="circles to draw")
    parser.add_argument("--size", type=in_range(int, 16, 2048), default=64, help="side in pixels")
    parser.add_argument("--seed", type=seed_number, default=0, help="random seed of the circles")
    args = parser.parse_args(argv)
    problems = check_file("ARCHIVE", args.archive)
    if args.archive.is_file():
        problems.append(f"{args.archive} exists: name a new file")
    parser.refuse(problems)
    args.archive.parent.mkdir(parents=True, exist_ok=True)
    write_archive(args.archive, count=args.count, size=args.size, seed=args.seed)
    print(f"{args.count} circles in {args.archive}")


if __name__ == "__main__":
    main()
