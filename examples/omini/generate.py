"""Draws pictures that follow conditions, with the adapters of train_omini.py.

    python examples/omini/generate.py canny/canny.safetensors --prompt "a cat on a sofa" --image cat.png
    python examples/omini/generate.py fill/fill.safetensors --prompt "a hat" --image cat.png --mask mask.png

The files' headers say what was trained, so the condition types, sizes, positions and attention rule need not be
repeated. --image is a picture to make each condition of, as in training; --condition is the condition itself.
"""

import argparse
import functools
import json
import sys
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from safetensors import safe_open


sys.path.insert(0, str(Path(__file__).parents[2]))

from common.data import Example
from common.latents import PATCH

from train_omini import (
    ConditionSpec,
    OminiPipeline,
    OminiTransformer2DModel,
    convert_to_condition,
    to_latent_mask,
    to_pixel_mask,
)


def parse_args(argv=None):
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n\n")[0],
        epilog=__doc__.split("\n\n")[1],
        formatter_class=argparse.RawTextHelpFormatter,
    )
    parser.add_argument("adapters", nargs="+", type=Path, help="adapter files of train_omini.py")
    parser.add_argument("--prompt", required=True, nargs="+", help="prompts, one picture each")
    parser.add_argument("--image", nargs="+", type=Path, help="picture to make all conditions of, or one for each")
    parser.add_argument("--condition", nargs="+", type=Path, help="the conditions themselves, one for each")
    parser.add_argument("--mask", type=Path, help="hole of fill or token_integration: white where to draw")
    parser.add_argument("--pretrained_model_name_or_path", help="base model (default: the one that was trained on)")
    parser.add_argument("--size", nargs=2, type=int, metavar=("WIDTH", "HEIGHT"), help="default: as trained")
    parser.add_argument("--style_lora", type=Path, help="LoRA that text and image pass, beside the conditions' own")
    parser.add_argument("--depth_model", help="depth estimator (default: the one that was trained with)")
    parser.add_argument("--num_inference_steps", type=int, default=28, help="4 for schnell")
    parser.add_argument("--guidance_scale", type=float, default=3.5)
    parser.add_argument("--image_guidance_scale", type=float, default=1.0, help="above 1: away from black conditions")
    parser.add_argument("--kv_cache", action="store_true", help="compute the conditions once: for independent ones")
    parser.add_argument("--force", action="store_true", help="kv_cache also for adapters not trained for it")
    parser.add_argument(
        "--dtype", choices=("float32", "float16", "bfloat16"), help="default: bfloat16 on an accelerator"
    )
    parser.add_argument("--max_sequence_length", type=int, help="default: as trained")
    parser.add_argument("--seed", type=int, default=0, help="of the first picture; the next adds 1")
    parser.add_argument("--output", type=Path, default=Path("image.png"), help="several prompts: image-0.png, ...")
    args = parser.parse_args(argv)
    try:
        args.about = read_metadata(args.adapters)
        check(args)
    except ValueError as error:
        parser.error(str(error))
    return args


def read_metadata(paths):
    """What the adapters' headers say, as one: the conditions of all, in the order of the files."""
    about = None
    for path in paths:
        try:
            with safe_open(path, "pt") as file:
                text = (file.metadata() or {}).get("omini")
        except Exception as error:  # safetensors raises a kind of its own beside OSError
            raise ValueError(f"{path}: not a readable LoRA file ({error})") from None
        if text is None:
            raise ValueError(f"{path}: its header names no conditions, it is not an adapter of train_omini.py")
        own = json.loads(text)
        own["conditions"] = [
            ConditionSpec(**{k: tuple(v) if isinstance(v, list) else v for k, v in each.items()})
            for each in own["conditions"]
        ]
        if about is None:
            about = {**own, "conditions": []}
        if own["independent_condition"] != about["independent_condition"]:
            raise ValueError(f"{path}: trained with another --independent_condition than {paths[0]}")
        sizes = own["target_size"], about["target_size"]
        about["conditions"] += [scaled(condition, *sizes) for condition in own["conditions"]]
    names = [condition.adapter for condition in about["conditions"]]
    if len(set(names)) != len(paths):
        raise ValueError(f"two of the adapters have the same name: {', '.join(names)}")
    return about


def upright(path):
    """A picture (PIL, RGB) as its owner sees it."""
    return Example(str(path), functools.partial(Image.open, path)).image()


def check(args):
    """Raises ValueError for what cannot be drawn."""
    conditions = args.about["conditions"]
    kinds = [condition.type for condition in conditions]
    if args.kv_cache and not args.about["independent_condition"] and not args.force:
        raise ValueError(
            "--kv_cache needs adapters trained with --independent_condition: these look at the image as it changes; "
            "leave it out, or --force an approximation"
        )
    if (args.image is None) == (args.condition is None):
        raise ValueError("exactly one of --image and --condition is needed")
    given = args.image or args.condition
    if len(given) != len(kinds) and not (args.image and len(given) == 1):
        raise ValueError(f"{len(given)} pictures for {len(kinds)} conditions: {', '.join(kinds)}")
    holes = {"fill", "token_integration"} & set(kinds)
    if args.mask and not holes:
        raise ValueError("--mask has no effect: no adapter is of fill or token_integration")
    if not args.mask and ("token_integration" in kinds or (holes and args.image)):
        raise ValueError("--mask is needed: white where the picture is to be drawn")
    for path in [*given, *([args.mask] if args.mask else []), *([args.style_lora] if args.style_lora else [])]:
        if not path.exists():
            raise ValueError(f"{path}: no such file")
    args.height, args.width = args.size[::-1] if args.size else args.about["target_size"]
    if args.height % PATCH or args.width % PATCH:
        raise ValueError(f"--size {args.width} {args.height}: both must be multiples of {PATCH}")
    if args.mask:
        mask, size = upright(args.mask), upright(given[0]).size
        if mask.size != size:
            raise ValueError(f"--mask {args.mask} is {mask.size} pixels, {given[0]} {size}")
        mask = ImageOps.fit(mask.convert("L"), (args.width, args.height), Image.Resampling.NEAREST)
        args.pixel_mask = np.asarray(mask) > 127
        if "token_integration" in kinds:
            args.pixel_mask = to_pixel_mask(to_latent_mask(args.pixel_mask))
        if args.pixel_mask.all() or not args.pixel_mask.any():
            raise ValueError(f"--mask {args.mask} is all {'white' if args.pixel_mask.all() else 'black'}")


def scaled(condition, trained, size):
    """A condition trained with an image of size `trained`, for one of another (height, width): as large in it."""
    if tuple(trained) == tuple(size):
        return condition
    across = tuple(
        round(own * new / old / PATCH) * PATCH for own, new, old in zip(condition.size, size, trained, strict=True)
    )
    down, right = (delta * new / old for delta, new, old in zip(condition.position_delta, size, trained, strict=True))
    return ConditionSpec(condition.type, across, (down, right), condition.position_scale, condition.adapter)


def condition_pictures(args, conditions):
    """The picture (PIL) of each condition."""
    given = args.image or args.condition
    given = given * len(conditions) if len(given) == 1 else given
    rng, pictures = np.random.default_rng(args.seed), []
    for condition, path in zip(conditions, given, strict=True):
        picture = ImageOps.fit(upright(path), condition.size[::-1], Image.Resampling.LANCZOS)
        if args.condition is None and condition.type == "depth":
            from transformers import pipeline

            estimator = pipeline("depth-estimation", model=args.depth_model or args.about["depth_model"])
            picture = estimator(picture)["depth"].convert("RGB")
            picture = picture.resize(condition.size[::-1])
        elif args.condition is None or condition.type == "token_integration":
            picture = convert_to_condition(condition.type, picture, rng=rng, mask=getattr(args, "pixel_mask", None))
        pictures.append(picture)
    return pictures


def load_pipeline(args):
    """The base model with all adapters, and the names of those that text and image pass."""
    device = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else torch.device("cpu")
    dtype = getattr(torch, args.dtype or ("float32" if device.type == "cpu" else "bfloat16"))
    model = args.pretrained_model_name_or_path or args.about["base_model"]
    transformer = OminiTransformer2DModel.from_pretrained(model, subfolder="transformer", dtype=dtype)
    pipeline = OminiPipeline.from_pretrained(model, transformer=transformer, dtype=dtype)
    names = list(dict.fromkeys(condition.adapter for condition in args.about["conditions"]))
    for path, name in zip(args.adapters, names, strict=True):
        pipeline.load_lora_weights(path.parent, weight_name=path.name, adapter_name=name)
    if args.style_lora:
        path = args.style_lora
        file = {"weight_name": path.name} if path.is_file() else {}
        pipeline.load_lora_weights(path.parent if path.is_file() else path, **file, adapter_name="style")
        pipeline.transformer.set_adapter([*names, "style"])
        layers = [
            name for name, layer in pipeline.transformer.named_modules() if "style" in getattr(layer, "lora_A", ())
        ]
        unread = [name for name in layers if name.startswith("time_text_embed")]
        if unread:
            raise SystemExit(
                f"--style_lora {path}: {unread[0]} is shared with the conditions, a style cannot change it"
            )
    return pipeline.to(device), "style" if args.style_lora else None


def main(argv=None):
    args = parse_args(argv)
    about, size = args.about, (args.height, args.width)
    conditions = [scaled(condition, about["target_size"], size) for condition in about["conditions"]]
    pictures = condition_pictures(args, conditions)
    pipeline, main_adapter = load_pipeline(args)
    for i, prompt in enumerate(args.prompt):
        image = pipeline(
            [prompt],
            specs=conditions,
            condition_images=pictures,
            mask=args.pixel_mask if "token_integration" in [condition.type for condition in conditions] else None,
            height=args.height,
            width=args.width,
            num_inference_steps=args.num_inference_steps,
            guidance_scale=args.guidance_scale,
            image_guidance_scale=args.image_guidance_scale,
            independent_condition=about["independent_condition"],
            main_adapter=main_adapter,
            kv_cache=args.kv_cache,
            max_sequence_length=args.max_sequence_length or about["max_sequence_length"],
            generator=torch.Generator().manual_seed(args.seed + i),
        ).images[0]
        path = args.output if len(args.prompt) == 1 else args.output.with_stem(f"{args.output.stem}-{i}")
        path.parent.mkdir(parents=True, exist_ok=True)
        image.save(path)
        print(path)


if __name__ == "__main__":
    main()
