"""Edits images with a LoRA that train_influxedit.py saved, in the mode it was trained in (see its args.json).

    python examples/influxedit/generate.py FOLDER --image outline.png --prompt "violet circle with white background"
    python examples/influxedit/generate.py FOLDER --image photo.png --mask mask.png --prompt "a red hat"

In edit mode the model sees the input image and generates all of the result. In mask mode it generates what is white in
--mask. Without --mask, after training on side-by-side images, the input image becomes the left half of an image twice
as wide, and the right half that the model generates is the result.
"""

import argparse
import json
import sys
from pathlib import Path

import torch
from PIL import Image, ImageOps


sys.path.insert(0, str(Path(__file__).parents[2]))

from common.arguments import expanded_path
from common.checkpoints import unused_path
from common.data import Size, fit, open_image, upright

from train_influxedit import FillPipeline, size_at, split_mask


def load_pipeline(folder, dtype=None):
    """(pipeline with the LoRA, the training's flags) from a trainer's output folder."""
    trained_args = json.loads((Path(folder) / "args.json").read_text())["args"]
    if dtype is None:
        dtype = torch.bfloat16 if trained_args["mixed_precision"] == "bf16" else torch.float32
    pipeline = FillPipeline.from_pretrained(trained_args["pretrained_model_name_or_path"], dtype=dtype)
    pipeline.load_lora_weights(folder)
    pipeline.edit_mode = trained_args["mode"] == "edit"
    return pipeline, trained_args


def edit(pipeline, prompts, images, **options):
    """Edits PIL images of one size with a pipeline in edit mode; the results have their size."""
    width, height = images[0].size
    masks = [Image.new("L", (width, height), "black")] * len(images)
    return pipeline(prompts, image=images, mask_image=masks, width=width, height=height, **options).images


def paint_beside(pipeline, prompts, images, **options):
    """Generates a right half beside each of PIL images of one size; the results have their size."""
    width, height = images[0].size
    wide_size = Size(height, 2 * width)
    wide_images = [ImageOps.pad(image, (2 * width, height), centering=(0, 0)) for image in images]
    masks = [split_mask(wide_size, "right")] * len(images)
    results = pipeline(prompts, image=wide_images, mask_image=masks, width=2 * width, height=height, **options).images
    return [result.crop((width, 0, 2 * width, height)) for result in results]


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.register("type", Path, expanded_path)
    parser.add_argument("folder", type=Path, help="a trainer's output folder")
    parser.add_argument("--prompt", required=True)
    parser.add_argument("--image", type=Path, required=True, nargs="+", help="input images, each is edited by itself")
    parser.add_argument("--mask", type=Path, help="mask for all of them, white where to generate")
    parser.add_argument(
        "--size",
        type=int,
        nargs=2,
        metavar=("WIDTH", "HEIGHT"),
        help="size of the results (default: the input's shape at the largest resolution of the training)",
    )
    parser.add_argument("--num_inference_steps", type=int, default=28)
    parser.add_argument("--guidance_scale", type=float, help="(default: that of the training)")
    parser.add_argument("--max_sequence_length", type=int, help="(default: that of the training)")
    parser.add_argument("--seed", type=int, default=0, help="seed of the first image; each next one has the next seed")
    parser.add_argument("--output", type=Path, default=Path(), help="folder for the results")
    args = parser.parse_args()

    pipeline, trained_args = load_pipeline(args.folder)
    if args.mask and trained_args["mode"] == "edit":
        parser.error(f"--mask {args.mask}: {args.folder} was trained in edit mode, which has no masks")
    if not args.mask and trained_args["mode"] == "mask" and not trained_args["use_split_mask"]:
        parser.error(f"--mask is needed: {args.folder} was trained with masks")
    if args.guidance_scale is None:
        args.guidance_scale = trained_args["guidance_scale"]
    if args.max_sequence_length is None:
        args.max_sequence_length = trained_args["max_sequence_length"]
    if torch.accelerator.is_available():
        pipeline.to(torch.accelerator.current_accelerator())
    args.output.mkdir(parents=True, exist_ok=True)

    side_by_side = trained_args["mode"] == "mask" and not args.mask
    for i, path in enumerate(args.image):
        image = upright(open_image(path))
        if args.size:
            size = Size(height=args.size[1], width=args.size[0])
        elif side_by_side:  # the long edge that was trained is that of both halves
            wide_size = size_at(max(trained_args["resolution"]), Size(image.height, 2 * image.width))
            size = Size(wide_size.height, wide_size.width // 2)
        else:
            size = size_at(max(trained_args["resolution"]), Size(image.height, image.width))
        image = fit(image, size, "bicubic")
        options = {
            "num_inference_steps": args.num_inference_steps,
            "guidance_scale": args.guidance_scale,
            "max_sequence_length": args.max_sequence_length,
            "generator": torch.Generator().manual_seed(args.seed + i),
        }
        if args.mask:
            mask = fit(upright(open_image(args.mask)).convert("L"), size, "nearest")
            result = pipeline(
                args.prompt, image=image, mask_image=mask, height=size.height, width=size.width, **options
            ).images[0]
        elif side_by_side:
            (result,) = paint_beside(pipeline, [args.prompt], [image], **options)
        else:
            (result,) = edit(pipeline, [args.prompt], [image], **options)
        output = unused_path(args.output / f"{path.stem}-edited.png")
        result.save(output)
        print(output)


if __name__ == "__main__":
    main()
