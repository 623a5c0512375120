"""The second toy world, letters on textures: settings that were found on the first are tried on it.

A scene is a capital letter of one colour, at one of nine places, on a texture of another colour and white. Colours,
subjects and the names of functions are those of world.py.

    python examples/toy/letters.py glyph data/glyph --count 6      # six images of the subject, with captions
    python examples/toy/letters.py scenes data/scenes --count 512  # images of what the toy model knows
"""

import sys
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
from PIL import Image


sys.path.insert(0, str(Path(__file__).parents[2]))

from examples.toy import world
from examples.toy.world import COLOR_NAMES, COLORS, SUBJECTS, Shape, coverage, labels, layers, with_article


INKS = [name for name in COLOR_NAMES if name != "white"]  # of letters and textures, whose other colour is white
TEXTURES = ("stripes", "bands", "checks", "dots")
PERIOD = 1 / 4  # of a texture, in units of the canvas' short side, as are all coordinates
RADIUS = 0.3  # half the height of a letter or a subject
PEN = 0.3  # half the width of a stroke; the strokes' middle lines reach from -1 to 1
# from (x, y) to (x, y); y points down
STROKES = {
    "L": [((-0.7, -1), (-0.7, 1)), ((-0.7, 1), (0.7, 1))],
    "T": [((-0.8, -1), (0.8, -1)), ((0, -1), (0, 1))],
    "X": [((-0.8, -1), (0.8, 1)), ((0.8, -1), (-0.8, 1))],
    "H": [((-0.7, -1), (-0.7, 1)), ((0.7, -1), (0.7, 1)), ((-0.7, 0), (0.7, 0))],
    "Z": [((-0.7, -1), (0.7, -1)), ((0.7, -1), (-0.7, 1)), ((-0.7, 1), (0.7, 1))],
    "V": [((-0.8, -1), (0, 1)), ((0.8, -1), (0, 1))],
}


@dataclass(frozen=True)
class Scene:
    """`thing` is a letter of STROKES or a subject's name, with its centre (x, y)."""

    texture: str
    background: str
    thing: str
    color: str
    x: float
    y: float


def distance(letter, x, y):
    """Signed distance (negative inside) to a letter of half height 1 at the origin."""
    x, y = x * (1 + PEN), y * (1 + PEN)
    nearest = np.inf
    for (x1, y1), (x2, y2) in STROKES[letter]:
        along = ((x - x1) * (x2 - x1) + (y - y1) * (y2 - y1)) / ((x2 - x1) ** 2 + (y2 - y1) ** 2)
        along = np.clip(along, 0, 1)
        nearest = np.minimum(nearest, np.hypot(x - x1 - along * (x2 - x1), y - y1 - along * (y2 - y1)))
    return (nearest - PEN) / (1 + PEN)


def is_colored(texture, x, y):
    """Where a texture at the origin has its colour; elsewhere it is white."""
    across, down = x / PERIOD % 1, y / PERIOD % 1
    if texture == "stripes":
        return across < 0.5
    if texture == "bands":
        return down < 0.5
    if texture == "checks":
        return (across < 0.5) ^ (down < 0.5)
    if texture == "dots":
        return np.hypot(across - 0.5, down - 0.5) < 0.36
    raise ValueError(f"unknown texture {texture!r}: one of {', '.join(TEXTURES)}")


def parts_of(scene):
    """(place and size as a Shape, its (colour, signed distance function) pairs) of a letter or a subject."""
    shape = Shape(scene.thing, scene.color, scene.x, scene.y, RADIUS)
    if scene.thing in SUBJECTS:
        return shape, layers(shape)
    return shape, [(scene.color, lambda x, y: distance(scene.thing, x, y))]


def draw(scene, width=64, height=64):
    """A scene as a PIL image; edges are those of four times as many pixels, averaged."""
    wide, high = 4 * width, 4 * height
    ys, xs = (np.mgrid[0:high, 0:wide].astype(np.float32) + 0.5) / min(wide, high)
    colored = is_colored(scene.texture, xs, ys)[..., None]
    pixels = np.where(colored, np.float32(COLORS[scene.background]), np.float32(COLORS["white"]))
    shape, parts = parts_of(scene)
    for color, inside in parts:
        alpha = coverage(inside, shape, wide, high)[..., None]
        pixels = pixels * (1 - alpha) + np.float32(COLORS[color]) * alpha
    return Image.fromarray(pixels.round().astype(np.uint8)).resize((width, height), Image.Resampling.BOX)


def mask_of(scene, width=64, height=64):
    """Boolean [height, width]: the pixels of the letter, or of the subject."""
    shape, parts = parts_of(scene)
    return np.any([coverage(inside, shape, width, height) > 0.5 for _, inside in parts], axis=0)


def random_scene(rng, aspect=1.0):
    """A letter on a texture, on a canvas `aspect` times as wide as high."""
    background, color = rng.sample(INKS, 2)
    return place(rng, aspect, rng.choice(TEXTURES), background, rng.choice(list(STROKES)), color)


def place(rng, aspect, texture, background, thing, color):
    """A scene of these, at a random place on a grid of 1/8."""
    x, y = (3 / 8 + rng.randint(0, round(8 * (max(side, 1) - 3 / 4))) / 8 for side in (aspect, 1 / aspect))
    return Scene(texture, background, thing, color, x, y)


def subject_backgrounds(name):
    """The inks that the subject itself does not have."""
    return [color for color in world.subject_backgrounds(name) if color != "white"]


def random_subject(rng, name, aspect=1.0, texture=None, background=None):
    """The subject somewhere on a texture, by default a random one in a random ink, and its caption."""
    texture = texture or rng.choice(TEXTURES)
    background = background or rng.choice(subject_backgrounds(name))
    scene = place(rng, aspect, texture, background, name, "white")
    return scene, with_article(f"{SUBJECTS[name]} on {scene.background} {scene.texture}")


def caption(scene, rng=None, aspect=1.0):
    """A caption of the scene: "a red T on blue stripes" without `rng`; with it, words vary and details are left out at
    random, and one caption in ten is empty."""
    chance = (lambda p: rng.random() < p) if rng else (lambda p: p == 1)
    if chance(0.1):
        return ""
    pick = rng.choice if rng else (lambda options: options[0])
    thing = f"{scene.color} {scene.thing}" if rng is None or chance(0.85) else scene.thing
    texture = f"{scene.background} {scene.texture}" if rng is None or chance(0.85) else scene.texture
    if chance(0.1):
        return f"{pick(['a', 'one'])} {thing}"
    text = pick(["a {} on {}", "a {} on {}", "one {} with {}", "{}, {}"]).format(thing, texture)
    return (pick(["", "", "", "a picture of "]) if rng else "") + with_article(text)


# ---------------------------------------------------------------------------------------------------------------------
# Scores
# ---------------------------------------------------------------------------------------------------------------------


@cache
def textures_of(width, height):
    """[4, height * width]: the textures, of -1 and 1."""
    ys, xs = (np.mgrid[0:height, 0:width].astype(np.float32) + 0.5) / min(width, height)
    return np.stack([np.where(is_colored(name, xs, ys), 1.0, -1.0).ravel() for name in TEXTURES])


def letter_of(mask):
    """The letter that `world.best_silhouette` finds in a mask."""
    reach = {}
    for letter, strokes in STROKES.items():
        reach[letter] = ((max(abs(x) for stroke in strokes for x, _ in stroke) + PEN) / (1 + PEN), 1)
    return world.best_silhouette(mask, distance, reach, smallest=8, least=0.6)


def patches(mask):
    """A mask [height, width] without what is narrower than three pixels, as the mixed colours along edges are."""
    windows = lambda a: np.lib.stride_tricks.sliding_window_view(np.pad(a, 1), (3, 3))  # noqa: E731
    return windows(windows(mask).all((2, 3))).any((2, 3))


def score_scene(image, scene):
    """How much of a scene an image shows: background (texture and its colour), foreground (the letter's colour) and
    shape (the letter), each 0 or 1."""
    by_color = labels(image)
    shows = lambda color: patches(by_color == COLOR_NAMES.index(color)).mean() >= 0.02  # noqa: E731
    index = labels(image, ["white", scene.background, scene.color])
    letter = patches(index == 2)
    signs = np.where(index == 1, 1.0, -1.0) * ~letter
    agreement = textures_of(*image.size) @ signs.ravel() / max((~letter).sum(), 1)  # 1: all pixels beside the letter
    texture = TEXTURES[agreement.argmax()] if agreement.max() >= 0.5 else None
    return {
        "background": float(shows(scene.background) and texture == scene.texture),
        "foreground": float(shows(scene.color)),
        "shape": float(letter_of(letter) == scene.thing),
    }


def pictures_of(subject, count, rng):
    """(scene, caption) pairs of a subject or of "scenes"."""
    textures, backgrounds = [], []
    for _ in range(count):
        if subject == "scenes":
            scene = random_scene(rng)
            yield scene, caption(scene)
        else:  # each texture and each ink comes once before one comes again, as in world.py
            textures = textures or rng.sample(TEXTURES, len(TEXTURES))
            backgrounds = backgrounds or rng.sample(subject_backgrounds(subject), len(subject_backgrounds(subject)))
            yield random_subject(rng, subject, texture=textures.pop(), background=backgrounds.pop())


def main(argv=None):
    world.main(argv, description=__doc__, subjects=(*SUBJECTS, "scenes"), pictures_of=pictures_of, draw=draw)


if __name__ == "__main__":
    main()
