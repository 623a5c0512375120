"""The toy world: drawn scenes with captions, and the scores that tell whether an image shows what it should.

A scene is one or two flat-coloured shapes on a flat background. All coordinates are in units of the canvas' short
side, so one scene can be drawn at any size. Every drawing function is deterministic given a `random.Random`.

    python examples/toy/world.py glyph data/glyph --count 6      # six images of the subject, with captions
    python examples/toy/world.py style data/style --count 12     # shapes in the style
    python examples/toy/world.py scenes data/scenes --count 512  # images of what the toy FLUX knows
"""

import math
import random
import re
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image


sys.path.insert(0, str(Path(__file__).parents[2]))

from common.arguments import Parser, check_folder, in_range, positive_int, seed_number


COLORS = {
    "red": (222, 41, 48),
    "orange": (255, 145, 20),
    "yellow": (255, 230, 50),
    "green": (30, 150, 60),
    "blue": (35, 80, 225),
    "violet": (140, 50, 185),
    "white": (245, 245, 245),
    "black": (20, 20, 20),
}
COLOR_NAMES = list(COLORS)
KINDS = ("circle", "square", "triangle", "cross", "diamond")
SIZES = {"small": 10 / 64, "big": 17 / 64}  # half of a shape's height
MARGINS = {"small": 1 / 4, "big": 3 / 8}  # of a shape's centre to the canvas' border
SUBJECTS = {"glyph": "sks glyph", "totem": "zwx totem"}  # words the pretraining captions never use
STYLE = "sks style"  # every shape is violet, on orange


@dataclass(frozen=True)
class Shape:
    """`kind` of KINDS or a subject's name, centre (x, y) and half height r in units of the canvas' short side."""

    kind: str
    color: str
    x: float
    y: float
    r: float
    outline: bool = False


@dataclass(frozen=True)
class Scene:
    background: str
    shapes: tuple[Shape, ...]


# ---------------------------------------------------------------------------------------------------------------------
# Drawing
# ---------------------------------------------------------------------------------------------------------------------


def distance(kind, x, y):
    """Signed distance (negative inside) to a shape of half height 1 at the origin; y points down."""
    box = lambda half_width, half_height: np.maximum(np.abs(x) - half_width, np.abs(y) - half_height)  # noqa: E731
    if kind == "circle":
        return np.hypot(x, y) - 1
    if kind == "square":
        return box(0.9, 0.9)
    if kind == "diamond":
        return (np.abs(x) + np.abs(y) - 1.1) / math.sqrt(2)
    if kind == "cross":
        return np.minimum(box(0.36, 1), box(1, 0.36))
    if kind == "triangle":
        return np.maximum((2 * np.abs(x) - y - 1) / math.sqrt(5), y - 1)
    raise ValueError(f"unknown shape {kind!r}: one of {', '.join(KINDS)}")


def layers(shape):
    """(colour, signed distance function) pairs, painted in order, of a shape or a subject."""
    if shape.kind == "glyph":  # a violet ring around a yellow dot
        return [
            ("violet", lambda x, y: np.abs(np.hypot(x, y) - 0.78) - 0.22),
            ("yellow", lambda x, y: np.hypot(x, y) - 0.34),
        ]
    if shape.kind == "totem":  # a green disc on a red block
        return [
            ("red", lambda x, y: np.maximum(np.abs(x) - 0.8, np.abs(y - 0.5) - 0.5)),
            ("green", lambda x, y: np.hypot(x, y + 0.45) - 0.55),
        ]
    if shape.outline:
        return [(shape.color, lambda x, y: np.abs(distance(shape.kind, x, y)) - 0.02 / shape.r)]
    return [(shape.color, lambda x, y: distance(shape.kind, x, y))]


def coverage(inside, shape, width, height):
    """How much of each pixel [height, width] lies inside, 0 to 1, with anti-aliased edges."""
    side = min(width, height)
    ys, xs = np.mgrid[0:height, 0:width].astype(np.float32)
    x = ((xs + 0.5) / side - shape.x) / shape.r
    y = ((ys + 0.5) / side - shape.y) / shape.r
    return np.clip(0.5 - inside(x, y) * shape.r * side, 0, 1)


def draw(scene, width=64, height=64):
    """A scene as a PIL image."""
    pixels = np.full((height, width, 3), COLORS[scene.background], dtype=np.float32)
    for shape in scene.shapes:
        for color, inside in layers(shape):
            alpha = coverage(inside, shape, width, height)[..., None]
            pixels = pixels * (1 - alpha) + np.float32(COLORS[color]) * alpha
    return Image.fromarray(pixels.round().astype(np.uint8))


def mask_of(scene, width=64, height=64):
    """Boolean [height, width]: the pixels that the scene's shapes fill (an outline's inside included)."""
    filled = np.zeros((height, width), dtype=bool)
    for shape in scene.shapes:
        for _, inside in layers(Shape(shape.kind, shape.color, shape.x, shape.y, shape.r)):
            filled |= coverage(inside, shape, width, height) > 0.5
    return filled


# ---------------------------------------------------------------------------------------------------------------------
# Scenes and captions
# ---------------------------------------------------------------------------------------------------------------------


def random_shape(rng, color, aspect=1.0, size=None, kind=None, left=0.0, right=None, outline=False, places=4):
    """A shape anywhere on a canvas `aspect` times as wide as high, between x = `left` and x = `right`.

    Centres lie on a grid of 1 / `places`.
    """
    size = size or rng.choice(list(SIZES))
    margin, right = MARGINS[size], max(aspect, 1) if right is None else right
    x = left + margin + rng.randint(0, round(places * (right - left - 2 * margin))) / places
    y = margin + rng.randint(0, round(places * (max(1 / aspect, 1) - 2 * margin))) / places
    return Shape(kind or rng.choice(KINDS), color, x, y, SIZES[size], outline)


def random_scene(rng, aspect=1.0, pair=0.15, outline=0.08, places=4):
    """One shape, or with probability `pair` two small ones side by side; outlines with probability `outline`."""
    background, first, second = rng.sample(COLOR_NAMES, 3)
    as_outline = rng.random() < outline
    if rng.random() < pair:
        middle = max(aspect, 1) / 2
        shapes = (
            random_shape(rng, first, aspect, "small", right=middle, outline=as_outline, places=places),
            random_shape(rng, second, aspect, "small", left=middle, outline=as_outline, places=places),
        )
    else:
        shapes = (random_shape(rng, first, aspect, outline=as_outline, places=places),)
    return Scene(background, shapes)


def side_of(shape, aspect=1.0):
    """ "left", "right" or "centre", by thirds of the canvas' width."""
    third = shape.x / max(aspect, 1) * 3
    return "left" if third < 1.15 else "right" if third > 1.85 else "centre"


def caption(scene, rng=None, aspect=1.0):
    """A caption of the scene: "a red circle on a blue background" without `rng`; with it, words vary and details
    are left out at random, and one caption in ten is empty."""
    chance = (lambda p: rng.random() < p) if rng else (lambda p: p == 1)
    if chance(0.1):
        return ""
    pick = rng.choice if rng else (lambda options: options[0])
    nouns = []
    for shape in scene.shapes:
        size = "small" if shape.r < 0.21 else "big"
        color = shape.color if rng is None or chance(0.85) else ""
        kind = shape.kind if rng is None or chance(0.92) else "shape"
        words = [size if chance(0.35) else "", color, kind]
        article = pick(["a", "a", "a", "one", ""])
        outline = "outline of " if shape.outline else ""
        article = f"{pick(['the', 'an'])} {outline}a" if shape.outline else article
        nouns.append(" ".join(word for word in [article, *words] if word))
    text = pick([" and ", " and ", ", "]).join(nouns)
    if len(scene.shapes) == 1 and chance(0.35):
        side = side_of(scene.shapes[0], aspect)
        text += pick([" in the centre", " at the centre"]) if side == "centre" else f" on the {side}"
    if rng is None or chance(0.85):
        text += pick([" on a {} background", " with {} background", ", {} background", " on {}"]).format(
            scene.background
        )
    text = with_article(text)
    return (pick(["", "", "", "a photo of ", "an image of ", "a picture of "]) if rng else "") + text


def with_article(text):
    """ "an" in place of "a" where the next word is orange."""
    return re.sub(r"\ba (?=orange)", "an ", text)


def subject_backgrounds(name):
    """The colours that the subject itself does not have."""
    used = {color for color, _ in layers(Shape(name, "white", 0, 0, 1))}
    return [color for color in COLOR_NAMES if color not in used]


def random_subject(rng, name, aspect=1.0, background=None):
    """The subject somewhere on `background`, by default a random one of its own, and its caption."""
    background = background or rng.choice(subject_backgrounds(name))
    shape = random_shape(rng, "white", aspect, size="big", kind=name)
    return Scene(background, (shape,)), with_article(f"{SUBJECTS[name]} on a {background} background")


def random_in_style(rng):
    """A shape in the style, and its caption, which names the shape alone."""
    shape = random_shape(rng, "violet")
    return Scene("orange", (shape,)), f"a {shape.kind}, {STYLE}"


# ---------------------------------------------------------------------------------------------------------------------
# Scores
# ---------------------------------------------------------------------------------------------------------------------


def labels(image, names=COLOR_NAMES):
    """Index into `names` of the nearest colour of each pixel [height, width]."""
    pixels = np.asarray(image.convert("RGB"), dtype=np.float32)
    palette = np.float32([COLORS[name] for name in names])
    return np.square(pixels[..., None, :] - palette).sum(-1).argmin(-1)


def iou(a, b):
    """Intersection over union of two boolean arrays, 0 for two empty ones."""
    return float((a & b).sum() / max((a | b).sum(), 1))


def background_of(image):
    """Name of the most frequent colour along the image's border."""
    index = labels(image)
    border = np.concatenate([index[:2].ravel(), index[-2:].ravel(), index[:, :2].ravel(), index[:, -2:].ravel()])
    return COLOR_NAMES[np.bincount(border, minlength=len(COLORS)).argmax()]


def foreground_of(image):
    """Name of the most frequent colour that is not the background's, None in an empty image."""
    count = np.bincount(labels(image).ravel(), minlength=len(COLORS))
    count[COLOR_NAMES.index(background_of(image))] = 0
    return COLOR_NAMES[count.argmax()] if count.max() > 0.01 * count.sum() + 4 else None


def kind_of(mask):
    """The kind that `best_silhouette` finds in a mask."""
    reach = {kind: {"square": 0.9, "diamond": 1.1}.get(kind, 1) for kind in KINDS}
    return best_silhouette(mask, distance, {kind: (r, r) for kind, r in reach.items()}, smallest=5, least=0.7)


def best_silhouette(mask, distance, reach, smallest, least):
    """The name whose silhouette, stretched to the mask's box, overlaps it best; None if none does by `least`, or if
    the box has fewer than `smallest` pixels on a side.

    distance(name, x, y) is the signed distance to a silhouette, {name: (x, y)} `reach` half of its width and height.
    """
    rows, columns = np.flatnonzero(mask.sum(1) > 1), np.flatnonzero(mask.sum(0) > 1)
    if len(rows) < smallest or len(columns) < smallest:
        return None
    mask = mask[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
    height, width = mask.shape
    ys, xs = np.mgrid[0:height, 0:width].astype(np.float32)
    overlaps = {}
    for name, (reach_x, reach_y) in reach.items():
        x = (2 * (xs + 0.5) / width - 1) * reach_x
        y = (2 * (ys + 0.5) / height - 1) * reach_y
        overlaps[name] = iou(mask, distance(name, x, y) <= 0)
    best = max(overlaps, key=overlaps.get)
    return best if overlaps[best] >= least else None


def score_scene(image, scene):
    """How much of a scene of filled shapes an image shows: background, foreground and shape, each 0 to 1.

    With one shape the foreground is the colour that stands out most, and the shape is judged whatever its colour;
    with two, each is looked for by its colour, and both scores are shares of the two.
    """
    background = float(background_of(image) == scene.background)
    if len(scene.shapes) == 1:
        found = foreground_of(image)
        shape = scene.shapes[0]
        kind = kind_of(foreground_mask(image))
        return {
            "background": background,
            "foreground": float(found == shape.color),
            "shape": float(kind == shape.kind),
        }
    index = labels(image, [scene.background, *(shape.color for shape in scene.shapes)])
    masks = [index == 1, index == 2]
    found = {COLOR_NAMES[i] for i in np.flatnonzero(np.bincount(labels(image).ravel()) > 0.01 * index.size)}
    kinds = [kind_of(mask) == shape.kind for mask, shape in zip(masks, scene.shapes, strict=True)]
    return {
        "background": background,
        "foreground": float(np.mean([shape.color in found for shape in scene.shapes])),
        "shape": float(np.mean(kinds)),
    }


def all_right(images, scenes, score=score_scene):
    """Share of images, 0 to 100, in which background, foreground and shape of their scenes are all as asked."""
    return 100 * float(np.mean([min(score(*pair).values()) for pair in zip(images, scenes, strict=True)]))


def foreground_mask(image):
    """Boolean [height, width]: pixels nearer to the foreground's colour than to the background's."""
    foreground = foreground_of(image)
    if foreground is None:
        return np.zeros((image.height, image.width), dtype=bool)
    pixels = np.asarray(image.convert("RGB"), dtype=np.float32)
    to_color = lambda name: np.square(pixels - np.float32(COLORS[name])).sum(-1)  # noqa: E731
    return to_color(foreground) < to_color(background_of(image))


def score_subject(image, name):
    """0 to 1: mean overlap of the subject's parts with the best-fitting drawing of it; 0 if a part is missing.

    A drawing of the subject scores about 0.95 (edges are anti-aliased), one sent through the toy VAE about 0.9.
    """
    index = labels(image)
    parts = layers(Shape(name, "white", 0, 0, 1))
    masks = [index == COLOR_NAMES.index(color) for color, _ in parts]
    everything = np.logical_or.reduce(masks)
    if min(mask.sum() for mask in masks) < 4:
        return 0.0
    side = min(image.size)
    ys, xs = np.nonzero(everything)
    centre_x, centre_y = np.median(xs + 0.5) / side, np.median(ys + 0.5) / side
    steps = np.linspace(-0.06, 0.06, 7)
    best = 0.0
    for r in np.arange(0.12, 0.36, 0.015):
        for dx in steps:
            for dy in steps:
                shape = Shape(name, "white", centre_x + dx, centre_y + dy, r)
                drawn = [coverage(inside, shape, *image.size) > 0.5 for _, inside in parts]
                for upper in range(1, len(drawn)):
                    for lower in range(upper):
                        drawn[lower] &= ~drawn[upper]
                best = max(best, float(np.mean([iou(a, b) for a, b in zip(masks, drawn, strict=True)])))
    return best


def edges(image, threshold=30):
    """Boolean [height, width]: pixels whose colour differs from the next one's to the right or below."""
    pixels = np.asarray(image.convert("RGB"), dtype=np.float32)
    across = np.abs(np.diff(pixels, axis=1, append=pixels[:, -1:])).max(-1)
    down = np.abs(np.diff(pixels, axis=0, append=pixels[-1:])).max(-1)
    return np.maximum(across, down) > threshold


def edge_overlap(image, reference):
    """0 to 1: F1 score of the image's edges against the reference's, one pixel of slack."""
    a, b = edges(image), edges(reference)
    grow = lambda mask: np.any(  # noqa: E731
        [np.roll(mask, (dy, dx), (0, 1)) for dy in (-1, 0, 1) for dx in (-1, 0, 1)], axis=0
    )
    precision = (a & grow(b)).sum() / max(a.sum(), 1)
    recall = (b & grow(a)).sum() / max(b.sum(), 1)
    return float(2 * precision * recall / max(precision + recall, 1e-9))


def sliced_wasserstein(a, b, projections=128, seed=0):
    """Sliced Wasserstein-2 distance of two sets of as many vectors [n, d] each: 0 for equal sets."""
    directions = np.random.default_rng(seed).standard_normal((a.shape[1], projections))
    directions /= np.linalg.norm(directions, axis=0)
    return float(np.sqrt(np.square(np.sort(a @ directions, axis=0) - np.sort(b @ directions, axis=0)).mean()))


def pictures_of(subject, count, rng):
    """(scene, caption) pairs of a subject, of the "style" or of "scenes"."""
    backgrounds = []
    for _ in range(count):
        if subject == "scenes":
            scene = random_scene(rng)
            yield scene, caption(scene)
        elif subject == "style":
            yield random_in_style(rng)
        else:
            # what all photos share is learned with the subject: each background comes once before one comes again
            if not backgrounds:
                backgrounds = subject_backgrounds(subject)
                rng.shuffle(backgrounds)
            yield random_subject(rng, subject, background=backgrounds.pop())


def main(
    argv=None, *, description=__doc__, subjects=(*SUBJECTS, "style", "scenes"), pictures_of=pictures_of, draw=draw
):
    """The command line of this world, or of another."""
    parser = Parser(description=description.split("\n")[0], takes="SUBJECT FOLDER")
    parser.add_argument("subject", choices=subjects, help="what is drawn")
    parser.add_argument("folder", metavar="FOLDER", type=Path, help="where the images and their captions go")
    parser.add_argument("--count", type=positive_int, default=6, help="images to draw")
    parser.add_argument("--size", type=in_range(int, 16, 2048), default=64, help="side in pixels")
    parser.add_argument("--seed", type=seed_number, default=0, help="random seed of the images")
    args = parser.parse_args(argv)
    problems = check_folder("FOLDER", args.folder)
    if args.folder.is_dir() and any(args.folder.iterdir()):
        problems.append(f"{args.folder} exists and is not empty: name a new folder")
    parser.refuse(problems)
    args.folder.mkdir(parents=True, exist_ok=True)
    for i, (scene, text) in enumerate(pictures_of(args.subject, args.count, random.Random(args.seed))):
        draw(scene, args.size, args.size).save(args.folder / f"{i}.png")
        (args.folder / f"{i}.txt").write_text(text + "\n")
    names = SUBJECTS | {"style": STYLE}
    print(f"{args.count} images of {names.get(args.subject, args.subject)!r} with captions in {args.folder}")


if __name__ == "__main__":
    main()
