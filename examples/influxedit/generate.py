"""Edits images with a LoRA that train_influxedit.py saved, in the mode it was trained in (see its args.json).

    python examples/influxedit/generate.py FOLDER --image outline.png --prompt "violet circle with white background"
    python examples/influxedit/generate.py FOLDER --image photo.png --mask mask.png --prompt "a red hat"
    python examples/influxedit/generate.py FOLDER --image photo.png --reference hat.png --prompt "wear this hat"

FOLDER is a run's output folder or a checkpoint in it; a LoRA file does as well, with --mode and the model if no
args.json is near it.

In edit mode the model sees the input image and generates all of the result. In mask mode it generates what is white in
--mask. Without --mask, after training on side-by-side images, the input image becomes the left half of an image twice
as wide, and the right half that the model generates is the result. FLUX.2 reads further images, --reference.
"""

import argparse
import sys
from pathlib import Path


sys.path.insert(0, str(Path(__file__).parents[2]))


# isort: split
from common.arguments import (
    Parser,
    check_folder,
    exit_if_unreadable,
    image_seed,
    in_range,
    name_or_path,
    non_negative_float,
    positive_int,
)
from common.checkpoints import read_run_args
from common.data import Size, check_shape, file_example, fit, read_sizes, resampling, save_image
from common.lora import check_applied, find_lora
from common.models import DTYPES, load_model
from common.placement import PLACEMENT_HELP, PLACEMENTS, check_placement, find_device, place
from common.text_encoders import load_whole_pipeline

import torch
from diffusers import FluxTransformer2DModel
from PIL import Image, ImageOps

from train_influxedit import (
    Fill,
    FillPipeline,
    ValidationCase,
    check_reference,
    find_family,
    fit_reference,
    read_mask,
    reference_size,
    size_at,
    split_mask,
)


# What is read of a run's args.json, and what it is without a run, unless a flag says otherwise.
WITHOUT_RUN = {
    "cache_dir": None,
    "guidance_scale": 3.5,
    "image_interpolation_mode": "lanczos",
    "max_sequence_length": 512,
    "mixed_precision": "no",
    "mode": None,
    "pretrained_model_name_or_path": None,
    "resolution": None,
    "revision": None,
    "use_split_mask": True,
    "variant": None,
}


def parse_args(argv=None):
    """The flags; `args.lora` is the LoRA's file, `args.trained` the flags that it was trained with, `args.family` the
    model's, and `args.sizes` the size at which each image is drawn."""
    parser = Parser(description=__doc__.split("\n")[0], takes="LORA")
    parser.add_argument(
        "lora", metavar="LORA", type=Path, help="a run's output folder, a checkpoint in it, or a LoRA file"
    )
    parser.add_argument("--prompt", required=True)
    parser.add_argument("--image", type=Path, required=True, nargs="+", help="input images, each is edited by itself")
    parser.add_argument(
        "--reference",
        type=Path,
        nargs="+",
        default=[],
        help="further input images of all of them, in order, for FLUX.2",
    )
    parser.add_argument("--mask", type=Path, help="mask for all of them, white where to generate")
    parser.add_argument(
        "--keep_unmasked",
        action="store_true",
        help="with --mask: the result has the image's own size, and its pixels wherever the mask is black",
    )
    parser.add_argument(
        "--pretrained_model_name_or_path", type=name_or_path, metavar="MODEL", help="base model (default: as trained)"
    )
    parser.add_argument("--mode", choices=("mask", "edit"), help="how the LoRA was trained, if no args.json says it")
    parser.add_argument(
        "--size",
        type=in_range(int, 16, 8192),
        nargs=2,
        metavar=("WIDTH", "HEIGHT"),
        help="size of the results, multiples of 16 (default: the input's shape at the largest resolution of the "
        "training)",
    )
    parser.add_argument(
        "--num_inference_steps", type=positive_int, help="(default: 28, FLUX.2 50, distilled FLUX.2-klein 4)"
    )
    parser.add_argument(
        "--guidance_scale",
        type=non_negative_float,
        help="(default: that of the training, FLUX.2-klein 4, distilled 1)",
    )
    parser.add_argument("--max_sequence_length", type=in_range(int, 1, 512), help="(default: that of the training)")
    parser.add_argument(
        "--seed", type=image_seed, default=0, help="seed of the first image; each next one has the next seed"
    )
    parser.add_argument("--placement", choices=PLACEMENTS, help=PLACEMENT_HELP)
    parser.add_argument("--output", type=Path, default=Path(), help="folder for the results")
    args = parser.parse_args(argv)
    try:
        args.lora, run = find_lora(args.lora)
        args.trained = read_run_args(run, WITHOUT_RUN) if run else dict(WITHOUT_RUN)
    except (OSError, ValueError) as error:
        parser.error(str(error))
    for name in ("max_sequence_length", "mode", "pretrained_model_name_or_path"):
        if vars(args)[name] is None:
            setattr(args, name, args.trained[name])
    args.family = Fill({})
    if args.pretrained_model_name_or_path is not None:
        args.family = find_family(base_of(args.trained, args.pretrained_model_name_or_path))
    if args.family.max_references and args.mode is None:
        args.mode = "edit"
    if args.guidance_scale is None and args.family.reads_guidance:
        args.guidance_scale = args.trained["guidance_scale"]
    parser.refuse(check_args(args) + check_folder("--output", args.output))
    return args


def check_args(args):
    """Problems of the flags, and of the images and the mask that they name."""
    for name in ("pretrained_model_name_or_path", "mode"):
        if vars(args)[name] is None:
            return [f"--{name} is needed: no args.json near {args.lora} says how it was trained"]
    problems = check_placement(args.placement)
    if args.trained["mode"] not in (None, args.mode):
        problems.append(f"--mode {args.mode}: {args.lora} was trained in {args.trained['mode']} mode")
    if args.mask and args.mode == "edit":
        problems.append(f"--mask {args.mask}: {args.lora} was trained in edit mode, which has no masks")
    if not args.mask and args.mode == "mask" and not args.trained["use_split_mask"]:
        problems.append(f"--mask is needed: {args.lora} was trained with masks")
    if args.keep_unmasked and not args.mask:
        problems.append("--keep_unmasked needs --mask: without it nothing is kept")
    if args.keep_unmasked and args.size:
        problems.append("--keep_unmasked: the result has the image's size, leave --size out")
    if args.size and any(side % 16 for side in args.size):
        problems.append(f"--size {args.size[0]} {args.size[1]}: both must be multiples of 16")

    family = args.family
    most = max(1, family.max_references)
    if 1 + len(args.reference) > most:
        problems.append(
            f"--reference: with --image {1 + len(args.reference)} images, {family.kind} reads at most {most}"
        )
    if family.max_references and args.mode == "mask":
        problems.append(f"--mode mask is for FLUX.1-Fill, {family.kind} has no mask: give --mode edit")

    images = [file_example(path) for path in [*args.image, *args.reference]]
    if args.mask:
        images.append(file_example(args.mask))
    sizes, unreadable = read_sizes(images)
    problems += unreadable
    if unreadable:
        return problems
    image_sizes = sizes[: len(args.image)]
    if args.mask:
        for size in image_sizes:
            problems += check_shape(f"--mask {args.mask}", "a mask", sizes[-1], size)
    if problems:
        return problems
    args.sizes = [drawn_size(args, size) for size in image_sizes]
    if family.max_references:
        references = list(zip(args.reference, sizes[len(args.image) :], strict=True))
        for i, drawn in enumerate(args.sizes):
            for path, size in [(args.image[i], image_sizes[i]), *references]:
                problems += check_reference(path, reference_size(max(drawn), size), family)
    if args.mask:
        try:
            for size in args.sizes:
                read_mask(file_example(args.mask), size)
        except ValueError as error:
            problems.append(f"--mask {error}")
    return problems


def drawn_size(args, image_size):
    """--size, or the shape of an image with the long edge that was trained, in multiples of 16."""
    if args.size:
        return Size(height=args.size[1], width=args.size[0])
    if args.mode == "edit" or args.mask:
        return size_at(max(args.trained["resolution"] or image_size), image_size)
    both_halves = Size(image_size.height, 2 * image_size.width)  # they were trained as one image
    wide_size = size_at(max(args.trained["resolution"] or both_halves), both_halves)
    return Size(wide_size.height, wide_size.width // 2)


def left_half(image, size, interpolation):
    """An image at `size` (height, width), cut as the left half of an image twice as wide is in training."""
    wide = Image.new("RGB", (2 * image.width, image.height))
    for left in (0, image.width):  # beside itself: at the seam nothing black shines through
        wide.paste(image, (left, 0))
    return fit(wide, (size.height, 2 * size.width), interpolation).crop((0, 0, size.width, size.height))


def base_of(trained, model):
    """The flags that name a model, `trained`'s own where it was trained from `model`."""
    if model == trained["pretrained_model_name_or_path"]:
        return argparse.Namespace(**trained)
    return argparse.Namespace(**(WITHOUT_RUN | {"pretrained_model_name_or_path": model}))


def load_base(base, dtype):
    """The pipeline of the model that was trained from."""
    family = find_family(base)
    if family.max_references == 0:
        return load_whole_pipeline(FillPipeline, FluxTransformer2DModel, base, dtype)
    parts = family.load_text_encoders(base, dtype).components
    parts["vae"] = load_model(family.vae_class, "vae", base, dtype)
    parts["transformer"] = load_model(family.transformer_class, "transformer", base, dtype)
    return family.pipeline_class(**parts, **family.settings)


def load_pipeline(path, model=None, edit_mode=None):
    """(pipeline with the LoRA, the training's flags) of a run's folder, a checkpoint or a LoRA file."""
    lora, run = find_lora(path)
    trained = read_run_args(run, WITHOUT_RUN) if run else dict(WITHOUT_RUN)
    model = model or trained["pretrained_model_name_or_path"]
    dtype = DTYPES.get(trained["mixed_precision"], torch.float32)
    if run is None and torch.accelerator.is_available():
        dtype = torch.bfloat16
    with exit_if_unreadable(f"--pretrained_model_name_or_path {model}"):
        pipeline = load_base(base_of(trained, model), dtype)
    with exit_if_unreadable(lora):
        pipeline.load_lora_weights(lora.parent, weight_name=lora.name)
        check_applied(lora, [pipeline.transformer, pipeline.text_encoder])
    if isinstance(pipeline, FillPipeline):
        pipeline.edit_mode = trained["mode"] == "edit" if edit_mode is None else edit_mode
    return pipeline, trained


def edit(pipeline, prompts, images, **options):
    """Edits PIL images of one size with a pipeline in edit mode; the results have their size."""
    width, height = images[0].size
    masks = [Image.new("L", (width, height), "black")] * len(images)
    return pipeline(prompts, image=images, mask_image=masks, width=width, height=height, **options).images


def edit_references(pipeline, family, prompt, references, size, **options):
    """Makes an image of `size` (height, width) from PIL images that a model reads as references."""
    case = ValidationCase(prompt, references[0], references[0], None, tuple(references))
    call = family.sampling | family.image_arguments(case, size) | {"height": size.height, "width": size.width}
    return pipeline(prompt=prompt, **(call | options)).images[0]


def paint_beside(pipeline, prompts, images, **options):
    """Generates a right half beside each of PIL images of one size; the results have their size."""
    width, height = images[0].size
    wide_size = Size(height, 2 * width)
    wide_images = [ImageOps.pad(image, (2 * width, height), centering=(0, 0)) for image in images]
    masks = [split_mask(wide_size, "right")] * len(images)
    results = pipeline(prompts, image=wide_images, mask_image=masks, width=2 * width, height=height, **options).images
    return [result.crop((width, 0, 2 * width, height)) for result in results]


def fill(pipeline, prompt, image, mask, size, **options):
    """Generates what a mask selects of an image, both PIL and of `size` (height, width)."""
    height, width = size
    return pipeline(prompt, image=image, mask_image=mask, height=height, width=width, **options).images[0]


def keep_unmasked(result, image, mask):
    """The result at the size of `image`, with its pixels where `mask` (PIL, of the image's size) is black."""
    return Image.composite(result.resize(image.size, Image.Resampling.LANCZOS), image, mask)


def main(argv=None):
    args = parse_args(argv)
    pipeline, trained = load_pipeline(args.lora, args.pretrained_model_name_or_path, args.mode == "edit")
    family = args.family
    side_by_side = args.mode == "mask" and not args.mask
    pixels = max(size.height * size.width for size in args.sizes) * (2 if side_by_side else 1)
    place(pipeline.components, find_device(), pixels=pixels, placement=args.placement)
    for i, (path, size) in enumerate(zip(args.image, args.sizes, strict=True)):
        original = file_example(path).image()
        interpolation = trained["image_interpolation_mode"]
        image = fit(original, size, interpolation)
        options = {
            "max_sequence_length": args.max_sequence_length,
            "generator": torch.Generator().manual_seed(args.seed + i),
        }
        if args.guidance_scale is not None:
            options["guidance_scale"] = args.guidance_scale
        if args.num_inference_steps or family.has_clip:  # of FLUX.2 the pipeline's, or those of a distilled model
            options["num_inference_steps"] = args.num_inference_steps or 28
        if family.max_references:
            examples = [file_example(path), *map(file_example, args.reference)]
            references = [fit_reference(example, max(size), interpolation) for example in examples]
            result = edit_references(pipeline, family, args.prompt, references, size, **options)
        elif args.mask and args.keep_unmasked:
            # stretched by less than 16 pixels instead of cropped: every pixel of the result has its place in the image
            image = original.resize((size.width, size.height), resampling(interpolation))
            mask = read_mask(file_example(args.mask), Size.of(original))
            small_mask = mask.resize(image.size, Image.Resampling.NEAREST)
            result = keep_unmasked(fill(pipeline, args.prompt, image, small_mask, size, **options), original, mask)
        elif args.mask:
            mask = read_mask(file_example(args.mask), size)
            result = fill(pipeline, args.prompt, image, mask, size, **options)
        elif side_by_side:
            image = left_half(original, size, interpolation)
            (result,) = paint_beside(pipeline, [args.prompt], [image], **options)
        else:
            (result,) = edit(pipeline, [args.prompt], [image], **options)
        print(save_image(result, args.output / f"{path.stem}-edited.png"))


if __name__ == "__main__":
    main()
