"""Generates images from prompts in a few steps with what train_twinflow.py trained.

    python examples/twinflow/generate.py flux-twinflow --prompt "a dog on the beach" --steps 2

The folder's args.json records which model was trained, and how.
"""

import argparse
import functools
import json
import sys
from pathlib import Path


sys.path.insert(0, str(Path(__file__).parents[2]))


# isort: split
from common.arguments import expanded_path, in_range, join_problems
from common.checkpoints import unused_path
from common.data import MAX_SIDE, Size, fit, open_image, upright
from common.latents import decode_images, encode_images, to_image, to_tensor

import torch
from diffusers.training_utils import free_memory

from train_twinflow import (
    BACKBONES,
    STYLES,
    drawn_size,
    latent_shape,
    load_target_time,
    predict_velocity,
    sampling_loop,
    stack_conditions,
)


def trained_args(folder):
    """The arguments that a trainer's output folder was made with."""
    args = {"aspect_ratio_buckets": None, **json.loads((Path(folder) / "args.json").read_text())["args"]}
    args["openuni_checkpoint"] = args["openuni_checkpoint"] and Path(args["openuni_checkpoint"])
    return argparse.Namespace(**args)


def load_velocity(folder, backbone, args, dtype, device):
    """predict(x, t, t', cond) of the model in a trainer's output folder, see `sampling_loop`."""
    transformer = backbone.load_transformer(dtype)
    if args.training == "lora":
        name = "pytorch_lora_weights.safetensors"
        transformer.load_lora_adapter(folder, prefix="transformer", weight_name=name, use_safetensors=True)
    else:
        transformer = backbone.transformer_class.from_pretrained(folder / "transformer", dtype=dtype)
        load_target_time(transformer, backbone.time_module, folder / "transformer")
    transformer.to(device, dtype).eval()
    return functools.partial(
        predict_velocity,
        transformer=transformer,
        backbone=backbone,
        dtype=dtype,
        embeds_target_time=args.training == "full",
    )


@torch.no_grad()
def generate(folder, prompts, *, seed=0, image=None, batch_size=1, size=None, **sampling):
    """One PIL image per prompt, image i from a generator seeded with `seed` + i; `sampling` is for `sampling_loop`.

    size: (height, width), default as trained. `image` is the one to edit, cropped to the same size.
    """
    folder = Path(folder)
    args = trained_args(folder)
    size = Size(*size) if size else drawn_size(args, Size.of(image) if image else None)
    if image:
        image = fit(image, size, args.image_interpolation_mode)
    device = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else torch.device("cpu")
    dtype = torch.bfloat16 if args.mixed_precision == "bf16" else torch.float32
    backbone = BACKBONES[args.model_type](args)
    prompt_encoder = backbone.load_prompt_encoder(dtype, device)
    conditions = [backbone.encode_prompt(prompt_encoder, prompt, image) for prompt in prompts]
    uncond = backbone.encode_prompt(prompt_encoder, args.uncond_prompt, image)
    del prompt_encoder
    free_memory()
    vae = backbone.load_vae(dtype).to(device)
    predict = load_velocity(folder, backbone, args, dtype, device)

    shape = latent_shape(backbone, size)
    images = []
    for start in range(0, len(prompts), batch_size):
        batch = conditions[start : start + batch_size]
        count = len(batch)
        stacked = stack_conditions(batch + [uncond] * count)  # padded to one length: guidance runs both at once
        if image:
            reference = encode_images(vae, to_tensor(image)[None])
            stacked["reference"] = reference.expand(2 * count, -1, -1, -1)
        stacked = {name: value.to(device) for name, value in stacked.items()}
        generators = [torch.Generator().manual_seed(seed + start + i) for i in range(count)]
        noise = torch.stack([torch.randn(shape, generator=generator) for generator in generators]).to(device)
        latents = sampling_loop(
            predict,
            noise,
            cond={name: value[:count] for name, value in stacked.items()},
            uncond={name: value[count:] for name, value in stacked.items()},
            generators=generators,
            **sampling,
        )
        images += [to_image(decode_images(vae, one)) for one in latents.split(1)]
    return images


def default_style(steps):
    """The sampling style that suits a number of steps."""
    if steps <= 2:
        return "few"
    if steps <= 8:
        return "any"
    return "mul"


def stochast_ratio(text):
    """An argparse type: a number, or SDE."""
    return text if text == "SDE" else float(text)


def check_flags(args):
    """Problems of --size, of --image, and of a sampler that does not go with --order 2."""
    model_type = trained_args(args.folder).model_type
    multiple = BACKBONES[model_type].resolution_multiple
    problems = []
    if (args.image is None) == (model_type == "qwenimage-edit"):
        problems.append(f"--image, the image to edit, is for a model trained as qwenimage-edit; this is {model_type}")
    if args.size and (args.size[0] % multiple or args.size[1] % multiple):
        width, height = args.size
        problems.append(f"--size {width} {height}: both must be multiples of {multiple}")
    if args.order == 2 and args.style != "mul":
        problems.append(f"--order 2 is for --style mul, which follows the path, not {args.style}")
    if args.order == 2 and args.stochast_ratio:
        problems.append(f"--order 2 renews no noise: leave out --stochast_ratio {args.stochast_ratio}")
    return problems


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.register("type", Path, expanded_path)
    parser.add_argument("folder", type=Path, help="a trainer's output folder")
    parser.add_argument("--prompt", required=True, nargs="+", help="prompts, one image each")
    parser.add_argument("--image", type=Path, help="the image to edit, for qwenimage-edit")
    parser.add_argument("--steps", type=int, default=2, help="forward passes per image")
    parser.add_argument(
        "--style",
        choices=STYLES,
        help="few: jump to the end in each step; any: to the next time; mul: follow the path (default: few up to 2 "
        "steps, any up to 8, mul above)",
    )
    parser.add_argument(
        "--cfg_scale", type=float, default=0.0, help="classifier-free guidance scale; 0: off, as usual"
    )
    parser.add_argument(
        "--stochast_ratio", type=stochast_ratio, help="share of the noise renewed in each step, 0 to 1, or SDE"
    )
    parser.add_argument("--extrapol_ratio", type=float, default=0.0, help="extrapolate from the previous step")
    parser.add_argument("--order", type=int, choices=(1, 2), default=1, help="2: Heun's rule, for style mul")
    parser.add_argument("--gaps", type=float, nargs=2, help="part of the times left out at the noise and data ends")
    parser.add_argument("--time_dist_ctrl", type=float, nargs=3, metavar=("A", "B", "C"), help="bend the time grid")
    parser.add_argument(
        "--size",
        type=in_range(int, 16, MAX_SIDE),
        nargs=2,
        metavar=("WIDTH", "HEIGHT"),
        help="size of the images in pixels (default: as trained)",
    )
    parser.add_argument("--seed", type=int, default=0, help="random seed of the first image; image i has seed + i")
    parser.add_argument("--output", type=Path, default=Path(), help="folder of the images")
    args = parser.parse_args()
    args.style = args.style or default_style(args.steps)
    problems = check_flags(args)
    if problems:
        parser.error(join_problems(problems))
    images = generate(
        args.folder,
        args.prompt,
        seed=args.seed,
        image=upright(open_image(args.image)) if args.image else None,
        size=args.size[::-1] if args.size else None,
        steps=args.steps,
        style=args.style,
        cfg_scale=args.cfg_scale,
        stochast_ratio=args.stochast_ratio,
        extrapol_ratio=args.extrapol_ratio,
        order=args.order,
        gaps=args.gaps,
        time_dist_ctrl=args.time_dist_ctrl,
    )
    args.output.mkdir(parents=True, exist_ok=True)
    for i, image in enumerate(images):
        path = unused_path(args.output / f"{i}.png")
        image.save(path)
        print(path)


if __name__ == "__main__":
    main()
