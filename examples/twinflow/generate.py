"""Draws prompts in a few steps with what train_twinflow.py made.

    python examples/twinflow/generate.py flux-twinflow --prompt "a dog on the beach" --steps 2

The folder's args.json says which model was trained, and how.
"""

import argparse
import functools
import json
import sys
from pathlib import Path


sys.path.insert(0, str(Path(__file__).parents[2]))


# isort: split
from common.data import upright
from common.latents import decode_images, encode_images, to_image

import diffusers
import torch
from diffusers.training_utils import free_memory
from PIL import Image

from train_twinflow import (
    BACKBONES,
    STYLES,
    load_two_times,
    predict_velocity,
    sample_flow,
    stack_conditions,
    to_pixels,
)


def trained_args(folder):
    """The arguments that a trainer's output folder was made with."""
    args = json.loads((Path(folder) / "args.json").read_text())["args"]
    args["openuni_checkpoint"] = args["openuni_checkpoint"] and Path(args["openuni_checkpoint"])
    return argparse.Namespace(**args)


def load_velocity(folder, backbone, args, dtype, device):
    """predict(x, t, t', cond) of the model in a trainer's output folder, see `sample_flow`."""
    transformer = backbone.load_transformer(dtype)
    if args.training == "lora":
        name = "pytorch_lora_weights.safetensors"
        transformer.load_lora_adapter(folder, prefix="transformer", weight_name=name, use_safetensors=True)
    else:
        transformer = getattr(diffusers, backbone.transformer).from_pretrained(folder / "transformer", dtype=dtype)
        load_two_times(transformer, backbone.time_module, folder / "transformer")
    transformer.to(device, dtype).eval()
    two_times = args.training == "full"
    return functools.partial(
        predict_velocity, transformer=transformer, backbone=backbone, dtype=dtype, two_times=two_times
    )


@torch.no_grad()
def draw(folder, prompts, *, seed=0, image=None, batch_size=1, size=None, **sampling):
    """One PIL image per prompt, picture i from a generator seeded with `seed` + i; `sampling` is for `sample_flow`."""
    folder, args = Path(folder), trained_args(folder)
    device = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else torch.device("cpu")
    dtype = torch.bfloat16 if args.mixed_precision == "bf16" else torch.float32
    backbone = BACKBONES[args.model_type](args)
    args.resolution = size or args.resolution
    text = backbone.load_text(dtype, device)
    conditions = [backbone.encode_prompt(text, prompt, image) for prompt in (*prompts, args.uncond_prompt)]
    del text
    free_memory()
    vae = backbone.load_vae(dtype).to(device)
    predict = load_velocity(folder, backbone, args, dtype, device)
    side, images = args.resolution // backbone.factor, []
    for start in range(0, len(prompts), batch_size):
        part = conditions[:-1][start : start + batch_size]
        count = len(part)
        stacked = stack_conditions(part + [conditions[-1]] * count)  # one length, for guidance runs both at once
        if image:
            reference = encode_images(vae, to_pixels(image, args)[None])
            stacked["reference"] = reference.expand(2 * count, -1, -1, -1)
        stacked = {name: value.to(device) for name, value in stacked.items()}
        cond, uncond = ({name: v.chunk(2)[half] for name, v in stacked.items()} for half in (0, 1))
        generators = [torch.Generator().manual_seed(seed + start + i) for i in range(count)]
        noise = torch.stack([torch.randn(backbone.channels, side, side, generator=g) for g in generators]).to(device)
        latents = sample_flow(predict, noise, cond, uncond, generators=generators, **sampling)
        images += [to_image(decode_images(vae, one)) for one in latents.split(1)]
    return images


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("folder", type=Path, help="a trainer's output folder")
    parser.add_argument("--prompt", required=True, nargs="+", help="prompts, one picture each")
    parser.add_argument("--image", type=Path, help="the picture to edit, for qwenimage-edit")
    parser.add_argument("--steps", type=int, default=2, help="forward passes per picture")
    parser.add_argument(
        "--style",
        choices=STYLES,
        help="few: jump to the end each time; any: to the next time; mul: "
        "follow the path (default: few to 2 steps, any to 8, mul above)",
    )
    parser.add_argument(
        "--cfg_scale", type=float, default=0.0, help="classifier-free guidance; 0: none, the normal case"
    )
    parser.add_argument("--stochast_ratio", help="share of the noise renewed in each step, 0 to 1 or SDE")
    parser.add_argument("--extrapol_ratio", type=float, default=0.0, help="step beyond each prediction")
    parser.add_argument("--order", type=int, choices=(1, 2), default=1, help="2: Heun's rule, for style mul")
    parser.add_argument("--gaps", type=float, nargs=2, help="what is left out of the times, at noise and at data")
    parser.add_argument("--time_dist_ctrl", type=float, nargs=3, metavar=("A", "B", "C"), help="bends the times")
    parser.add_argument("--size", type=int, help="side in pixels (default: that of the training)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, default=Path(), help="folder of the pictures")
    args = parser.parse_args()
    ratio = args.stochast_ratio
    images = draw(
        args.folder,
        args.prompt,
        seed=args.seed,
        image=upright(Image.open(args.image)) if args.image else None,
        size=args.size,
        steps=args.steps,
        style=args.style or ("few" if args.steps <= 2 else "any" if args.steps <= 8 else "mul"),
        cfg_scale=args.cfg_scale,
        stochast_ratio=ratio if ratio in (None, "SDE") else float(ratio),
        extrapol_ratio=args.extrapol_ratio,
        order=args.order,
        gaps=args.gaps,
        time_dist_ctrl=args.time_dist_ctrl,
    )
    args.output.mkdir(parents=True, exist_ok=True)
    for i, picture in enumerate(images):
        picture.save(args.output / f"{i}.png")
        print(args.output / f"{i}.png")


if __name__ == "__main__":
    main()
