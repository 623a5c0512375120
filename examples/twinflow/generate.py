"""Generates images from prompts in a few steps with what train_twinflow.py trained.

    python examples/twinflow/generate.py flux-twinflow --prompt "a dog on the beach" --steps 2
    python examples/twinflow/generate.py flux-twinflow --lora sks-dog --prompt "sks dog on the beach" --steps 2

The folder's args.json records which model was trained, and how. Instead of the folder a checkpoint or a LoRA file in
it can be given, or a pipeline with a second time embedding, as the authors publish them.
"""

import argparse
import functools
import sys
from collections.abc import Sequence
from pathlib import Path


sys.path.insert(0, str(Path(__file__).parents[2]))


# isort: split
from common.arguments import (
    Parser,
    check_folder,
    exit_if_unreadable,
    fraction,
    image_seed,
    in_range,
    non_negative_float,
)
from common.checkpoints import TENSORS_FILE, read_run_args
from common.data import MAX_SIDE, Size, file_example, fit, read_sizes, save_image
from common.latents import decode_images, encode_images, to_image, to_tensor
from common.lora import check_applied, find_lora, run_of
from common.lora_formats import LOKR_MARK, file_tensors, folded, read_lora
from common.models import DTYPES
from common.placement import PLACEMENT_HELP, PLACEMENTS, check_placement, find_device, place
from common.text_encoders import encoder_dtype

import torch
from diffusers import DiffusionPipeline
from diffusers.training_utils import free_memory
from safetensors import safe_open

from train_twinflow import (
    BACKBONES,
    STYLES,
    drawn_size,
    latent_shape,
    predict_velocity,
    sampling_loop,
    stack_conditions,
)


def trained_args(source):
    """The arguments of the run that made `source`; of a pipeline with a second time embedding, which no run of ours
    made, those to draw with it."""
    source = Path(source)
    run = run_of(source if source.is_file() else source / TENSORS_FILE)
    if run is not None:
        defaults = {"aspect_ratio_buckets": None, "openuni_checkpoint": None, "quantize_text_encoders": "none"}
        args = defaults | read_run_args(run, ["model_type"])  # those of a run that did not have these flags
        args["openuni_checkpoint"] = args["openuni_checkpoint"] and Path(args["openuni_checkpoint"])
        args["offload"] = False  # `place` chooses
        return argparse.Namespace(**args)
    if not (source / "model_index.json").is_file():
        raise ValueError(f"{source}: neither a result of train_twinflow.py (no args.json) nor a folder of a pipeline")
    pipeline = DiffusionPipeline.load_config(source)["_class_name"]
    model_types = [name for name, backbone in BACKBONES.items() if backbone.pipeline_class.__name__ == pipeline]
    if not model_types:
        raise ValueError(f"{source}: a {pipeline}, which is none of {', '.join(BACKBONES)}")
    backbone = BACKBONES[model_types[0]]
    transformer = backbone.transformer_class.load_config(source, subfolder="transformer").get("_class_name")
    if transformer not in backbone.transformer_names():
        raise ValueError(f"{source}: holds a {transformer}, {model_types[0]} a {backbone.transformer_class.__name__}")
    return argparse.Namespace(
        pretrained_model_name_or_path=str(source),
        model_type=model_types[0],
        training="full",
        openuni_checkpoint=None,
        revision=None,
        variant=None,
        cache_dir=None,
        mixed_precision="bf16" if torch.accelerator.is_available() else "no",
        max_sequence_length=backbone.max_sequence_length,
        uncond_prompt=backbone.uncond_prompt,
        guidance_scale=3.5,
        resolution=1024,
        aspect_ratio_buckets=None,
        image_interpolation_mode="lanczos",
        offload=False,
        quantize_text_encoders="none",
    )


def check_source(source, args):
    """Raises ValueError or FileNotFoundError if there is nothing to draw with."""
    if args.training == "lora":
        find_lora(source)
    elif not (source / "transformer").is_dir():
        raise ValueError(f"{source / 'transformer'}: no such folder")


def find_loras(paths, scales=None):
    """([(LoRA file, its strength)], problems) of run folders, checkpoints or files, whose LoRAs are added to a model.

    `scales`: a strength for each of them, or one for all.
    """
    if scales and len(scales) not in (1, len(paths)):
        return [], [f"--lora_scale has {len(scales)} numbers for {len(paths)} of --lora: give one, or one for each"]
    if scales and not paths:
        return [], [f"--lora_scale {scales[0]:g} needs --lora"]
    scales = scales or [1.0]
    scales = scales * len(paths) if len(scales) == 1 else scales
    files = []
    problems = []
    for path, scale in zip(paths, scales, strict=True):
        try:
            file, run = find_lora(path)
            trained = read_run_args(run, []) if run else {}
        except (OSError, ValueError) as error:
            problems.append(f"--lora {error}")
            continue
        with safe_open(file, "pt") as opened:
            keys = list(opened.keys())
        if trained.get("train_text_encoder_ti") or any(key.startswith(("text_encoder.", "lora_te")) for key in keys):
            problems.append(
                f"--lora {path}: its training changed the text encoder, too, which is not drawn with here: use "
                "diffusers' pipeline with the scheduler of the few-step model"
            )
        elif "model_type" in trained and trained["training"] == "lora":
            problems.append(f"--lora {path}: a few-step LoRA, which is FOLDER; --lora is what is added to it")
        files.append((file, scale))
    return files, problems


def load_adapter(transformer, file, model_type, adapter_name):
    """Loads a LoRA file in any form that `read_lora` takes."""
    with exit_if_unreadable(file):
        with safe_open(file, "pt") as opened:
            keys = list(opened.keys())
        keys = [key for key in keys if key != LOKR_MARK]
        is_plain = all(key.startswith("transformer.") and not key.endswith(".alpha") for key in keys)
        is_flux = model_type == "flux"
        is_dora = any(key.endswith(".dora_scale") for key in keys)
        options = {"prefix": "transformer", "adapter_name": adapter_name}
        if (is_flux and not is_plain) or is_dora:  # other names or alphas of another program, or ComfyUI's DoRA
            layers = read_lora(file, flux=is_flux)[0]
            tensors = file_tensors({name: folded(layer) for name, layer in layers.items()}, "diffusers")
            tensors = {key: value for key, value in tensors.items() if not key.endswith(".dora_scale")}
            transformer.load_lora_adapter(tensors, **options)
        else:
            transformer.load_lora_adapter(file.parent, weight_name=file.name, use_safetensors=True, **options)
        check_applied(file, [transformer], adapter_name=adapter_name)


def load_transformer(source, backbone, args, dtype, loras: Sequence[tuple[Path, float]] = ()):
    """(transformer, its backbone) of a run's folder, its checkpoint or LoRA file, or a pipeline's folder, with the
    LoRAs of `find_loras` on top."""
    strengths = {}  # of its adapters
    if args.training == "lora":
        transformer = backbone.load_transformer(dtype)
        load_adapter(transformer, find_lora(source)[0], args.model_type, "twinflow")
        strengths["twinflow"] = 1.0
    else:
        place = {"pretrained_model_name_or_path": str(source), "revision": None, "variant": None}
        backbone = type(backbone)(argparse.Namespace(**vars(args) | place | {"openuni_checkpoint": None}))
        transformer = backbone.load_transformer(dtype)
        if not backbone.embeds_target_time(transformer):
            raise ValueError(f"{source}: its transformer has no second time embedding {backbone.target_time_module}")
    for i, (file, scale) in enumerate(loras):
        load_adapter(transformer, file, args.model_type, f"lora_{i}")
        strengths[f"lora_{i}"] = scale
    if loras:
        transformer.set_adapters(list(strengths), list(strengths.values()))
    return transformer, backbone


def load_velocity(source, backbone, args, dtype, device, loras=(), **placing):
    """predict(x, t, t', cond) of what `source` is with `loras` on top, see `load_transformer` and `sampling_loop`;
    `placing` are `place`'s options."""
    transformer, backbone = load_transformer(Path(source), backbone, args, dtype, loras)
    transformer.to(dtype).eval()
    place({"transformer": transformer}, torch.device(device), **placing)
    return functools.partial(
        predict_velocity,
        transformer=transformer,
        backbone=backbone,
        dtype=dtype,
        two_times=backbone.embeds_target_time(transformer),
    )


def few_step_transformer(folder, dtype=torch.float32):
    """The transformer of a training of all weights for diffusers' own pipelines, which tell it one time t: it jumps
    from there to the end, t' = 0.

    It needs a scheduler whose `timesteps` are t: `TwinFlowScheduler(style="few", two_times=True)`.
    """
    args = trained_args(folder)
    check_source(Path(folder), args)
    transformer, backbone = load_transformer(Path(folder), BACKBONES[args.model_type](args), args, dtype)

    def tell_both(time_embedding, inputs):
        t = inputs[0]
        end = torch.full_like(t, backbone.embedded_times(torch.zeros(())).item())
        return torch.stack([t, end], dim=-1), *inputs[1:]

    if backbone.embeds_target_time(transformer):  # an adapter is told t - t' / 2, which is t
        transformer.get_submodule(backbone.time_module).register_forward_pre_hook(tell_both)
    return transformer.to(dtype).eval()


@torch.no_grad()
def generate(folder, prompts, *, seed=0, image=None, batch_size=1, size=None, placement=None, loras=(), **sampling):
    """One PIL image per prompt, image i from a generator seeded with `seed` + i; `sampling` is for `sampling_loop`.

    `folder` is a run's folder, its checkpoint or LoRA file, or a pipeline with a second time embedding; `loras` are
    added to it, see `find_loras`.
    size: (height, width), default as trained. `image` is the one to edit, cropped to the same size. `placement`: see
    `place`.
    """
    args = trained_args(folder)
    check_source(Path(folder), args)
    size = Size(*size) if size else drawn_size(args, Size.of(image) if image else None)
    if image:
        image = fit(image, size, args.image_interpolation_mode)
    device = find_device()
    placing = {"pixels": size.height * size.width, "placement": placement}
    dtype = DTYPES.get(args.mixed_precision, torch.float32)
    backbone = BACKBONES[args.model_type](args)
    # a quantized one fits as it did in training; OpenUni's is no pipeline
    is_whole = args.quantize_text_encoders != "none" or args.model_type == "openuni"
    prompt_encoder = backbone.load_prompt_encoder(encoder_dtype(dtype), device if is_whole else torch.device("cpu"))
    if not is_whole:
        place(prompt_encoder.components, device, **placing)
    conditions = [backbone.encode_prompt(prompt_encoder, prompt, image) for prompt in prompts]
    uncond = backbone.encode_prompt(prompt_encoder, args.uncond_prompt, image)
    del prompt_encoder
    free_memory()
    vae = backbone.load_vae(dtype).to(device)
    predict = load_velocity(folder, backbone, args, dtype, device, loras, **placing)
    place({"vae": vae}, device, pixels=placing["pixels"])

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
    return text if text == "SDE" else fraction(text)


stochast_ratio.__name__ = "number"


def check_flags(args, model_type):
    """Problems of --size, of --image, and of a sampler that does not go with --order 2."""
    multiple = BACKBONES[model_type].resolution_multiple
    problems = []
    if (args.image is None) == (model_type == "qwenimage-edit"):
        problems.append(f"--image, the image to edit, is for a model trained as qwenimage-edit; this is {model_type}")
    elif args.image:
        _, unreadable = read_sizes([file_example(args.image)])
        problems += unreadable
    if args.size and (args.size[0] % multiple or args.size[1] % multiple):
        width, height = args.size
        problems.append(f"--size {width} {height}: both must be multiples of {multiple}")
    if args.gaps and sum(args.gaps) >= 1:
        problems.append(f"--gaps {args.gaps[0]:g} {args.gaps[1]:g}: together they must be less than 1")
    if args.order == 2 and args.style != "mul":
        problems.append(f"--order 2 is for --style mul, which follows the path, not {args.style}")
    if args.order == 2 and args.stochast_ratio:
        problems.append(f"--order 2 renews no noise: leave out --stochast_ratio {args.stochast_ratio}")
    return problems


def main(argv=None):
    parser = Parser(description=__doc__.split("\n")[0], takes="FOLDER")
    parser.add_argument(
        "folder",
        metavar="FOLDER",
        type=Path,
        help="the trainer's output folder, a checkpoint or LoRA file in it, or a pipeline with a second time "
        "embedding, such as the published TwinFlow-Qwen-Image",
    )
    parser.add_argument("--prompt", required=True, nargs="+", help="prompts, one image each")
    parser.add_argument("--image", type=Path, help="the image to edit, for qwenimage-edit")
    parser.add_argument(
        "--lora",
        type=Path,
        nargs="+",
        default=[],
        help="LoRAs that are added, such as a subject's: run folders, checkpoints in them or files",
    )
    parser.add_argument(
        "--lora_scale",
        type=in_range(float, -10, 10),
        nargs="+",
        metavar="SCALE",
        help="strength of each --lora, or of all (default: 1)",
    )
    parser.add_argument("--steps", type=in_range(int, 1, 1000), default=2, help="forward passes per image")
    parser.add_argument(
        "--style",
        choices=STYLES,
        help="few: jump to the end in each step; any: to the next time; mul: follow the path (default: few up to 2 "
        "steps, any up to 8, mul above)",
    )
    parser.add_argument(
        "--cfg_scale", type=non_negative_float, default=0.0, help="classifier-free guidance scale; 0: off, as usual"
    )
    parser.add_argument(
        "--stochast_ratio", type=stochast_ratio, help="share of the noise renewed in each step, 0 to 1, or SDE"
    )
    parser.add_argument(
        "--extrapol_ratio", type=in_range(float, -10, 10), default=0.0, help="extrapolate from the previous step"
    )
    parser.add_argument("--order", type=int, choices=(1, 2), default=1, help="2: Heun's rule, for style mul")
    parser.add_argument("--gaps", type=fraction, nargs=2, help="part of the times left out at the noise and data ends")
    parser.add_argument(
        "--time_dist_ctrl",
        type=in_range(float, 0, 100, above=True),
        nargs=3,
        metavar=("A", "B", "C"),
        help="bend the time grid",
    )
    parser.add_argument(
        "--size",
        type=in_range(int, 16, MAX_SIDE),
        nargs=2,
        metavar=("WIDTH", "HEIGHT"),
        help="size of the images in pixels (default: as trained)",
    )
    parser.add_argument(
        "--seed", type=image_seed, default=0, help="random seed of the first image; image i has seed + i"
    )
    parser.add_argument("--placement", choices=PLACEMENTS, help=PLACEMENT_HELP)
    parser.add_argument("--output", type=Path, default=Path(), help="folder of the images")
    args = parser.parse_args(argv)
    args.style = args.style or default_style(args.steps)
    try:
        trained = trained_args(args.folder)
        problems = check_flags(args, trained.model_type) + check_placement(args.placement)
        loras, unusable = find_loras(args.lora, args.lora_scale)
        parser.refuse(problems + unusable + check_folder("--output", args.output))
        check_source(args.folder, trained)
    except (OSError, ValueError) as error:
        parser.error(str(error))
    try:
        images = generate(
            args.folder,
            args.prompt,
            seed=args.seed,
            image=file_example(args.image).image() if args.image else None,
            placement=args.placement,
            loras=loras,
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
    except (OSError, ValueError) as error:
        parser.error(str(error))
    for i, image in enumerate(images):
        print(save_image(image, args.output / f"{i}.png"))


if __name__ == "__main__":
    main()
