"""Edits pictures with a LoRA that train_influxedit.py saved, in the way it was trained, which args.json tells.

    python examples/influxedit/generate.py FOLDER --image outline.png --prompt "violet circle with white background"
    python examples/influxedit/generate.py FOLDER --image photo.png --mask mask.png --prompt "a red hat"

Edit mode shows the picture to the model and generates all of the result. Mask mode paints anew where --mask is white;
without --mask, as trained on pictures side by side, the picture is put on the left of an empty one twice as wide and
the right half, painted by the model, is the result.
"""

import argparse
import json
import sys
from pathlib import Path

import torch
from PIL import Image, ImageOps


sys.path.insert(0, str(Path(__file__).parents[2]))

from train_influxedit import FillPipeline, sides, split_mask


def load_pipeline(folder, dtype=None):
    """(pipeline with the LoRA, arguments of the training) of a trainer's output folder."""
    args = json.loads((Path(folder) / "args.json").read_text())["args"]
    dtype = dtype or (torch.bfloat16 if args["mixed_precision"] == "bf16" else torch.float32)
    pipeline = FillPipeline.from_pretrained(args["pretrained_model_name_or_path"], dtype=dtype)
    pipeline.load_lora_weights(folder)
    pipeline.edit_mode = args["mode"] == "edit"
    return pipeline, args


def edit(pipeline, prompts, images, **options):
    """Pictures of the size of `images`, PIL ones of one size, in edit mode: with `pipeline.edit_mode`."""
    width, height = images[0].size
    masks = [Image.new("L", (width, height))] * len(images)
    return pipeline(prompts, image=images, mask_image=masks, width=width, height=height, **options).images


def paint_beside(pipeline, prompts, images, **options):
    """Pictures of the size of `images`, PIL ones of one size, painted on the right of each."""
    width, height = images[0].size
    wide = [ImageOps.pad(image, (2 * width, height), centering=(0, 0)) for image in images]
    masks = [split_mask((2 * width, height), "right")] * len(images)
    painted = pipeline(prompts, image=wide, mask_image=masks, width=2 * width, height=height, **options).images
    return [image.crop((width, 0, 2 * width, height)) for image in painted]


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("folder", type=Path, help="a trainer's output folder")
    parser.add_argument("--prompt", required=True)
    parser.add_argument("--image", type=Path, required=True, nargs="+", help="pictures, each edited by itself")
    parser.add_argument("--mask", type=Path, help="mask for all of them, white where to paint")
    parser.add_argument("--size", type=int, nargs=2, metavar=("WIDTH", "HEIGHT"), help="(default: as trained)")
    parser.add_argument("--num_inference_steps", type=int, default=28)
    parser.add_argument("--guidance_scale", type=float, help="(default: that of the training)")
    parser.add_argument("--max_sequence_length", type=int, help="(default: that of the training)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, default=Path(), help="folder of the pictures")
    args = parser.parse_args()
    pipeline, trained = load_pipeline(args.folder)
    if args.mask and trained["mode"] == "edit":
        parser.error(f"--mask {args.mask}: {args.folder} was trained in edit mode, which has none")
    if not args.mask and trained["mode"] == "mask" and not trained["use_split_mask"]:
        parser.error(f"--mask is needed: {args.folder} was trained with masks")
    if torch.accelerator.is_available():
        pipeline.to(torch.accelerator.current_accelerator())
    args.output.mkdir(parents=True, exist_ok=True)
    beside = 2 if trained["mode"] == "mask" and not args.mask else 1  # pictures in what was trained
    for i, path in enumerate(args.image):
        image = ImageOps.exif_transpose(Image.open(path)).convert("RGB")
        height, width = sides((beside * image.width, image.height), max(trained["resolution"]))
        size = tuple(args.size or (width // beside, height))
        image = ImageOps.fit(image, size)
        options = {
            "num_inference_steps": args.num_inference_steps,
            "guidance_scale": trained["guidance_scale"] if args.guidance_scale is None else args.guidance_scale,
            "max_sequence_length": args.max_sequence_length or trained["max_sequence_length"],
            "generator": torch.Generator().manual_seed(args.seed + i),
        }
        if args.mask:
            mask = ImageOps.fit(Image.open(args.mask).convert("L"), size, Image.Resampling.NEAREST)
            size_of = {"width": size[0], "height": size[1]}
            result = pipeline(args.prompt, image=image, mask_image=mask, **size_of, **options).images[0]
        else:
            draw = edit if trained["mode"] == "edit" else paint_beside
            (result,) = draw(pipeline, [args.prompt], [image], **options)
        result.save(args.output / f"{path.stem}-edited.png")
        print(args.output / f"{path.stem}-edited.png")


if __name__ == "__main__":
    main()
