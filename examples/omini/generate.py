"""Generates images that follow conditions, with the adapters of train_omini.py.

    python examples/omini/generate.py canny/canny.safetensors --prompt "a cat on a sofa" --image cat.png
    python examples/omini/generate.py fill --prompt "a hat" --image cat.png --mask mask.png

An adapter is a file, a run's folder or a checkpoint. The files' headers say what was trained: condition types, sizes,
positions and the attention rule need not be repeated. Files of OminiControl's own code have no such header:

    python examples/omini/generate.py subject_512.safetensors --condition_type subject --prompt "a cup" --image cup.png

--image is an image to make each condition from, as in training; --condition is the condition itself.
"""

import sys
from argparse import Namespace
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import torch


sys.path.insert(0, str(Path(__file__).parents[2]))

from common.arguments import (
    Parser,
    exit_if_unreadable,
    image_seed,
    in_range,
    name_or_path,
    non_negative_float,
    positive_float,
    positive_int,
)
from common.data import (
    Size,
    check_image_file,
    file_example,
    fit,
    fit_mask,
    open_image,
    read_sizes,
    save_image,
    upright,
)
from common.latents import PATCH
from common.lora import check_applied, find_lora
from common.placement import PLACEMENT_HELP, PLACEMENTS, check_placement, find_device, place

from train_omini import (
    CONDITION_TYPES,
    DEPTH_MODEL,
    MASKED_CONDITIONS,
    ConditionSpec,
    check_reference_sizes,
    check_shapes,
    condition_specs,
    convert_to_condition,
    find_family,
    image_size,
    offset,
    read_header,
    to_latent_mask,
    to_pixel_mask,
)


# what the headers of train_omini.py say, and flags of files without
PLAIN_FLAGS = ("condition_type", "condition_size", "position_delta", "position_scale", "independent_condition")

HEADER_FIELDS = {"base_model", "target_size", "max_sequence_length", "independent_condition", "conditions"}


def parse_args(argv=None):
    parser = Parser(
        description="Generates images that follow conditions, with the adapters of train_omini.py.",
        epilog="The adapters' headers say what was trained: types, sizes and positions of the conditions.",
        takes="ADAPTER ...",
    )
    parser.add_argument(
        "adapters", metavar="ADAPTER", nargs="+", type=Path, help="adapters: files, run folders or checkpoints"
    )
    parser.add_argument("--prompt", required=True, nargs="+", help="prompts, one image each")
    parser.add_argument("--image", nargs="+", type=Path, help="image to make all conditions from, or one for each")
    parser.add_argument("--condition", nargs="+", type=Path, help="the conditions themselves, one for each")
    parser.add_argument("--mask", type=Path, help="mask of fill or token_integration: white where to generate")
    parser.add_argument(
        "--pretrained_model_name_or_path", type=name_or_path, metavar="MODEL", help="base model (default: as trained)"
    )
    parser.add_argument(
        "--size", nargs=2, type=in_range(int, 16, 8192), metavar=("WIDTH", "HEIGHT"), help="(default: as trained)"
    )
    plain = parser.add_argument_group("adapter files without a header of train_omini.py, such as OminiControl's own")
    plain.add_argument("--condition_type", nargs="+", choices=CONDITION_TYPES, help="types of their conditions")
    plain.add_argument(
        "--condition_size",
        nargs="+",
        type=image_size,
        metavar="SIZE",
        help="SIDE or WIDTHxHEIGHT, of all or of each (default: that of the image, half of it for sr)",
    )
    plain.add_argument(
        "--position_delta",
        nargs="+",
        type=offset,
        metavar="DOWN,RIGHT",
        help="shift in tokens of 16 pixels, of all or of each (default: 0,0; subject and sr: to the left)",
    )
    plain.add_argument(
        "--position_scale",
        nargs="+",
        type=positive_float,
        metavar="SCALE",
        help="image tokens per condition token, of all or of each (default: from the sizes)",
    )
    plain.add_argument("--independent_condition", action="store_true", help="trained with independent_condition")
    parser.add_argument("--style_lora", type=Path, help="LoRA that text and image pass, beside the conditions' own")
    parser.add_argument("--depth_model", type=name_or_path, help="depth estimation model (default: as trained)")
    parser.add_argument(
        "--num_inference_steps",
        type=positive_int,
        help="denoising steps; 4 for schnell (default: FLUX.1 28, FLUX.2-klein 50, distilled 4)",
    )
    parser.add_argument(
        "--guidance_scale", type=non_negative_float, help="value passed to the guidance embedding (default: 3.5)"
    )
    parser.add_argument(
        "--image_guidance_scale", type=non_negative_float, default=1.0, help="above 1: away from black conditions"
    )
    parser.add_argument("--kv_cache", action="store_true", help="compute independent conditions only once")
    parser.add_argument("--force", action="store_true", help="kv_cache also for adapters not trained for it")
    parser.add_argument(
        "--dtype", choices=("float32", "float16", "bfloat16"), help="(default: bfloat16 on an accelerator)"
    )
    parser.add_argument(
        "--max_sequence_length", type=in_range(int, 1, 512), help="tokens per prompt (default: as trained)"
    )
    parser.add_argument("--seed", type=image_seed, default=0, help="random seed of the first image; the next adds 1")
    parser.add_argument("--placement", choices=PLACEMENTS, help=PLACEMENT_HELP)
    parser.add_argument("--output", type=Path, default=Path("image.png"), help="several prompts: image-0.png, ...")
    args = parser.parse_args(argv)
    try:
        args.adapters = [file for path in args.adapters for file in lora_files(path)]
        args.run_info, args.specs = read_metadata(args.adapters, args)
        args.family = find_family(base_model(args))
        check_args(args)
        check_family(args)
        args.style_lora = args.style_lora and find_lora(args.style_lora)[0]
        args.height, args.width = args.size[::-1] if args.size else args.run_info["target_size"]
        args.pixel_mask = read_mask(args) if args.mask else None
    except (ValueError, OSError) as error:
        parser.error(str(error))
    parser.refuse(check_placement(args.placement) + check_image_file("--output", args.output))
    return args


def lora_files(path):
    """The files that a path means: itself, or those of a run's folder or a checkpoint, several if each condition was
    trained with an adapter of its own, in the order of the conditions. Raises OSError or ValueError if there is none.
    """
    folder = path.resolve()
    if folder.is_dir():
        files = [file for file in sorted(folder.glob("*.safetensors")) if read_header(file)]
        one_adapter = folder.with_name(f"{folder.name}.safetensors").is_file()
        if not files and not one_adapter and (folder / "args.json").is_file():
            files = files_beside(folder)
        if files:
            return sorted(files, key=lambda file: read_header(file).get("place", 0))
    return [find_lora(path)[0]]


def files_beside(folder):
    """The files NAME-ADAPTER.safetensors of a run with --output_name NAME, whose folder is NAME/.

    One of another run that is named alike has a folder of its own, or another adapter in it.
    """
    files = []
    for file in sorted(folder.parent.glob("*.safetensors")):
        if file.name.startswith(f"{folder.name}-") and not file.with_suffix("").is_dir():
            header = read_header(file)
            if header and file.stem == f"{folder.name}-{header['conditions'][0]['adapter']}":
                files.append(file)
    return files


def plain_headers(args, num_files, first_header):
    """What train_omini.py would say in the headers of files that have none, from the flags: all of --condition_type is
    one file's, or of several files one each."""
    types = args.condition_type
    for name in ("condition_size", "position_delta", "position_scale"):
        given = getattr(args, name)
        if given and len(given) not in (1, len(types)):
            raise ValueError(
                f"--{name} has {len(given)} values for the {len(types)} of --condition_type: give 1 or each"
            )
    if num_files not in (1, len(types)):
        raise ValueError(f"--condition_type names {len(types)} types for {num_files} files without a header")
    header = first_header or {
        "base_model": "black-forest-labs/FLUX.1-dev",
        "target_size": (512, 512),
        "max_sequence_length": 512,
        "depth_model": DEPTH_MODEL,
    }
    target_size = args.size[::-1] if args.size else header["target_size"]
    flags = {**vars(args), "target_size": target_size, "adapter_per_condition": num_files > 1}
    header = {**header, "target_size": target_size, "independent_condition": args.independent_condition}
    conditions = [asdict(spec) for spec in condition_specs(Namespace(**flags))]
    if num_files == 1:
        return [{**header, "conditions": conditions}]
    return [{**header, "conditions": [fields]} for fields in conditions]


def read_metadata(paths, args=None):
    """What the adapters were trained for: (what the first header says, the specs of all conditions in the order of the
    files). For files without a header, the flags in `args` say it.

    Conditions of an adapter that was trained at another target_size than the first are scaled to it. Adapters of the
    same name get different ones.
    """
    headers = [read_header(path) for path in paths]
    for path, header in zip(paths, headers, strict=True):
        if header is not None and not (isinstance(header, dict) and header.keys() >= HEADER_FIELDS):
            raise ValueError(f"{path}: its header is damaged: it says not what it was trained for")
    without = [path for path, header in zip(paths, headers, strict=True) if header is None]
    flags = [name for name in PLAIN_FLAGS if args and vars(args)[name]]
    if without and "condition_type" not in flags:
        raise ValueError(
            f"{without[0]}: its header names no conditions: say what it was trained for, --condition_type"
        )
    if flags and not without:
        raise ValueError(f"--{flags[0]} has no effect: the adapters' headers say it of their conditions")
    if without:
        made = plain_headers(args, len(without), next((header for header in headers if header), None))
        headers = [header or made.pop(0) for header in headers]
    run_info = headers[0]
    specs = []
    names = set()
    for path, own_info in zip(paths, headers, strict=True):
        if own_info["independent_condition"] != run_info["independent_condition"]:
            raise ValueError(f"{path}: trained with another --independent_condition than {paths[0]}")
        name = own_info["conditions"][0]["adapter"]
        while name in names:
            name += "_2"
        names.add(name)
        for fields in own_info["conditions"]:
            fields = {key: tuple(value) if isinstance(value, list) else value for key, value in fields.items()}
            spec = ConditionSpec(**{**fields, "adapter": name})
            specs.append(scaled(spec, own_info["target_size"], run_info["target_size"]))
    return run_info, specs


def check_args(args):
    """Raises ValueError for flags that contradict each other or the adapters, and for files that are not there."""
    types = [spec.type for spec in args.specs]
    if args.kv_cache and not args.run_info["independent_condition"] and not args.force:
        raise ValueError(
            "--kv_cache needs adapters trained with --independent_condition: these look at the image as it changes; "
            "leave it out, or --force an approximation"
        )
    if (args.image is None) == (args.condition is None):
        raise ValueError("exactly one of --image and --condition is needed")
    paths = args.image or args.condition
    is_shared = args.image is not None and len(paths) == 1
    if len(paths) != len(types) and not is_shared:
        raise ValueError(f"{len(paths)} images for {len(types)} conditions: {', '.join(types)}")
    is_masked = any(condition_type in MASKED_CONDITIONS for condition_type in types)
    if args.mask and not is_masked:
        raise ValueError("--mask has no effect: no adapter is of fill or token_integration")
    if not args.mask and ("token_integration" in types or (is_masked and args.image)):
        raise ValueError("--mask is needed: white where the image is to be generated")
    files = [*paths, args.mask] if args.mask else paths
    sizes, unreadable = read_sizes([file_example(path) for path in files])
    if unreadable:
        raise ValueError(unreadable[0])
    if len(paths) == len(args.specs):
        problems = check_shapes(paths, sizes, args.specs, args.run_info["target_size"])
        if problems:
            raise ValueError(problems[0])
    if args.size and any(side % PATCH for side in args.size):
        raise ValueError(f"--size {args.size[0]} {args.size[1]}: both must be multiples of {PATCH}")


def base_model(args):
    """What the trainer's functions read of the flags that name the base model."""
    model = args.pretrained_model_name_or_path or args.run_info["base_model"]
    return Namespace(pretrained_model_name_or_path=model, revision=None, variant=None, cache_dir=None)


def check_family(args):
    """Raises ValueError for flags that FLUX.2-klein has no counterpart for."""
    if args.family.has_clip:
        return
    if len(args.adapters) > 1:
        raise ValueError(f"{args.adapters[1]}: FLUX.2-klein draws with one adapter, which all tokens pass")
    for name in ("style_lora", "guidance_scale", "force"):
        if vars(args)[name]:
            raise ValueError(f"--{name} is for FLUX.1: leave it out for FLUX.2-klein")
    if args.image_guidance_scale != 1:
        raise ValueError("--image_guidance_scale is for FLUX.1: leave it out for FLUX.2-klein")
    if args.size:
        specs = [scaled(spec, args.run_info["target_size"], args.size[::-1]) for spec in args.specs]
        problems = check_reference_sizes(specs)
        if problems:
            raise ValueError(f"--size {args.size[0]} {args.size[1]}: {problems[0]}")


def read_mask(args):
    """--mask at the size of the image, boolean [H, W]: whole tokens for token_integration. Raises ValueError."""
    paths = args.image or args.condition
    masked = next(i for i, spec in enumerate(args.specs) if spec.type in MASKED_CONDITIONS)
    image_path = paths[masked] if len(paths) > 1 else paths[0]
    mask = upright(open_image(args.mask))
    image = upright(open_image(image_path))
    if mask.size != image.size:
        raise ValueError(f"--mask {args.mask} is {Size.of(mask)} pixels, {image_path} {Size.of(image)}")
    pixel_mask = fit_mask(mask, (args.height, args.width))
    if "token_integration" in [spec.type for spec in args.specs]:
        pixel_mask = to_pixel_mask(to_latent_mask(pixel_mask))
    if pixel_mask.all():
        raise ValueError(f"--mask {args.mask} is all white")
    if not pixel_mask.any():
        raise ValueError(f"--mask {args.mask} is all black")
    return pixel_mask


def scaled(spec, trained_size, size):
    """The spec of a condition trained for an image of `trained_size`, for one of another (height, width): it covers
    the same part of the image."""
    if tuple(trained_size) == tuple(size):
        return spec
    height, width = (
        round(side * new / old / PATCH) * PATCH for side, new, old in zip(spec.size, size, trained_size, strict=True)
    )
    down, right = (delta * new / old for delta, new, old in zip(spec.position_delta, size, trained_size, strict=True))
    return replace(spec, size=(height, width), position_delta=(down, right))


def read_condition_images(args, specs):
    """The image (PIL) of each condition."""
    paths = args.image or args.condition
    if len(paths) == 1:
        paths = paths * len(specs)
    interpolation = args.run_info.get("image_interpolation_mode", "lanczos")  # older headers do not say it
    rng = np.random.default_rng(args.seed)
    images = []
    for spec, path in zip(specs, paths, strict=True):
        original = upright(open_image(path))
        image = fit(original, spec.size, interpolation)
        if args.image and spec.type == "depth":  # of the image at its own size, as in training
            whole = fit(original, (args.height, args.width), interpolation)
            depth = estimate_depth(whole, args.depth_model or args.run_info["depth_model"])
            image = depth.resize(image.size)
        elif args.image and spec.type != "token_integration":  # the pipeline takes that one's image as it is
            image = convert_to_condition(spec.type, image, rng=rng, mask=args.pixel_mask)
        images.append(image)
    return images


def estimate_depth(image, model):
    """The depth map of an image, of its size."""
    from transformers import pipeline

    with exit_if_unreadable(f"--depth_model {model}"):
        estimator = pipeline("depth-estimation", model=model)
    depth = estimator(image)["depth"]
    return depth.convert("RGB").resize(image.size)


def load_adapter(pipeline, path, name):
    """Loads a LoRA file as the adapter `name`; ends the run if the transformer gets nothing of it."""
    with exit_if_unreadable(path):
        pipeline.load_lora_weights(path.parent, weight_name=path.name, adapter_name=name)
        check_applied(path, [pipeline.transformer, pipeline.text_encoder], adapter_name=name)


def load_pipeline(args):
    """(the base model with all adapters, on the CPU, the name of the one that text and image pass)."""
    dtype = getattr(torch, args.dtype or ("bfloat16" if torch.accelerator.is_available() else "float32"))
    base = base_model(args)
    with exit_if_unreadable(f"--pretrained_model_name_or_path {base.pretrained_model_name_or_path}"):
        pipeline = args.family.load_pipeline(base, dtype)
    names = list(dict.fromkeys(spec.adapter for spec in args.specs))
    for path, name in zip(args.adapters, names, strict=True):
        load_adapter(pipeline, path, name)
    if args.style_lora is None:
        return pipeline, None

    path = args.style_lora
    load_adapter(pipeline, path, "style")
    pipeline.transformer.set_adapter([*names, "style"])
    for name, layer in pipeline.transformer.named_modules():
        adapters = getattr(layer, "lora_A", None) or getattr(layer, "lokr_w1", ())
        if name.startswith("time_text_embed") and "style" in adapters:
            print(
                f"{Path(sys.argv[0]).name}: error: --style_lora {path}: {name} is shared with the conditions, a style "
                "cannot change it",
                file=sys.stderr,
            )
            raise SystemExit(2)
    return pipeline, "style"


def main(argv=None):
    args = parse_args(argv)
    size = (args.height, args.width)
    specs = [scaled(spec, args.run_info["target_size"], size) for spec in args.specs]
    condition_images = read_condition_images(args, specs)
    is_integrated = "token_integration" in [spec.type for spec in specs]
    pipeline, main_adapter = load_pipeline(args)
    place(pipeline.components, find_device(), pixels=args.width * args.height, placement=args.placement)
    call = {
        "height": args.height,
        "width": args.width,
        "num_inference_steps": args.num_inference_steps or args.family.num_inference_steps,
        "max_sequence_length": args.max_sequence_length or args.run_info["max_sequence_length"],
    }
    if args.family.has_clip:
        call |= {
            "specs": specs,
            "condition_images": condition_images,
            "mask": args.pixel_mask if is_integrated else None,
            "guidance_scale": 3.5 if args.guidance_scale is None else args.guidance_scale,
            "image_guidance_scale": args.image_guidance_scale,
            "independent_condition": args.run_info["independent_condition"],
            "main_adapter": main_adapter,
            "kv_cache": args.kv_cache,
        }
    else:  # which always computes conditions once
        call["image"] = condition_images
    for i, prompt in enumerate(args.prompt):
        generator = torch.Generator().manual_seed(args.seed + i)
        image = pipeline(prompt=[prompt], **call, generator=generator).images[0]
        path = args.output if len(args.prompt) == 1 else args.output.with_stem(f"{args.output.stem}-{i}")
        print(save_image(image, path))


if __name__ == "__main__":
    main()
