"""Generates images with the LoRA and the new tokens that train_dreambooth_flux_advanced.py saved.

    python examples/dreambooth/generate.py 3d-icon-Flux-LoRA --prompt "a TOK icon of an orange llama eating ramen"

The first argument is a run's output folder, a checkpoint in it or a LoRA file. The model is named in the run's
args.json, the words that new tokens stand for in the header of their file. With the validation prompt, the first image
is that of the last validation.
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
from common.data import save_image
from common.lora import check_applied, find_lora, run_of, scaled_adapters
from common.models import DTYPES
from common.placement import PLACEMENT_HELP, PLACEMENTS, check_placement, find_device, place

import torch
from safetensors import safe_open
from safetensors.torch import load_file

from train_dreambooth_flux_advanced import (
    FAMILIES,
    find_family,
    load_text_encoders,
    load_transformer,
    load_vae,
    replace_words,
)


# What is read of a run's args.json, and what it is without a run, unless a flag says otherwise.
WITHOUT_RUN = {
    "cache_dir": None,
    "max_sequence_length": 512,
    "mixed_precision": "no",
    "pretrained_model_name_or_path": None,
    "resolution": 1024,
    "revision": None,
    "token_abstraction": None,
    "train_text_encoder": False,
    "train_text_encoder_ti": False,
    "train_transformer_frac": 1.0,
    "variant": None,
}


def find_files(path):
    """(LoRA file, file of the new tokens, the training's flags) of a run's folder, a checkpoint or a LoRA file.

    The LoRA is None of a run that trained new tokens alone, the tokens are None of one that trained none. Raises
    OSError or ValueError for what is missing.
    """
    path = path.absolute()
    run = run_of(path / "tokens") if path.is_dir() else None
    trained = read_run_args(run, WITHOUT_RUN) if run else None
    if trained and trained["train_transformer_frac"] == 0 and not trained["train_text_encoder"]:
        lora = None
        folder = path
    else:
        lora, run = find_lora(path)
        trained = read_run_args(run, WITHOUT_RUN) if run else WITHOUT_RUN | {"pool_at_eos": True}
        folder = lora.parent
    if not folder.name.startswith(("checkpoint-", "step-")):
        folder = run or folder
    embeddings = sorted(folder.glob("*_emb.safetensors"), key=lambda file: file.stat().st_mtime)
    if run is None:
        embeddings = [
            file for file in embeddings if file.name in (f"{lora.stem}_emb.safetensors", "learned_emb.safetensors")
        ]
    if trained["train_text_encoder_ti"] and not embeddings:
        raise FileNotFoundError(f"{folder}: no file *_emb.safetensors in it, which has the new tokens")
    return lora, embeddings[-1] if embeddings else None, trained


def single_files(trained):
    """The paths of the single files and tokenizers that were trained from, relative to the folder of the training."""
    if not str(trained["pretrained_model_name_or_path"]).endswith(".safetensors"):
        return []
    return [trained.get(name) for name in ("pretrained_model_name_or_path", "ae", "clip_l", "t5xxl", "tokenizer_dir")]


def load_base(trained, dtype):
    """The pipeline that was trained from, from a folder, the Hub or `single_files`."""
    base = argparse.Namespace(**trained)
    if single_files(trained):
        base.tokenizer_dir = Path(base.tokenizer_dir)
    family = find_family(base)
    parts = load_text_encoders(base, dtype).components
    parts |= {"vae": load_vae(base, dtype), "transformer": load_transformer(base, dtype)}
    return family.pipeline_class(**parts, **family.settings)


def load_pipeline(path, model=None):
    """(pipeline, {abstraction: its tokens}) of what `find_files` takes; `model` replaces the trained one."""
    lora, embeddings_file, trained = find_files(Path(path))
    without_run = trained["token_abstraction"] is None
    dtype = DTYPES.get(trained["mixed_precision"], torch.float32)
    if without_run and torch.accelerator.is_available():
        dtype = torch.bfloat16
    base = trained
    if model is not None:
        base = WITHOUT_RUN | {"pretrained_model_name_or_path": model}
    with exit_if_unreadable(f"--pretrained_model_name_or_path {base['pretrained_model_name_or_path']}"):
        pipeline = load_base(base, dtype)
    if lora:
        with exit_if_unreadable(lora):
            pipeline.load_lora_weights(lora.parent, weight_name=lora.name)
            check_applied(lora, [pipeline.transformer, pipeline.text_encoder])
    from_single_files = str(trained["pretrained_model_name_or_path"]).endswith(".safetensors")
    if trained.get("pool_at_eos") or from_single_files:  # else at the last new token, as older runs were trained
        pipeline.text_encoder.eos_token_id = pipeline.tokenizer.eos_token_id
    if embeddings_file is None:
        return pipeline, {}
    with exit_if_unreadable(embeddings_file):
        with safe_open(embeddings_file, "pt") as file:
            abstractions = file.metadata() or {}
        embeddings = load_file(embeddings_file)
        tokens = [f"<s{i}>" for i in range(len(embeddings["clip_l"]))]
        pipeline.load_textual_inversion(
            embeddings["clip_l"], token=tokens, text_encoder=pipeline.text_encoder, tokenizer=pipeline.tokenizer
        )
        if "t5" in embeddings:
            pipeline.load_textual_inversion(
                embeddings["t5"], token=tokens, text_encoder=pipeline.text_encoder_2, tokenizer=pipeline.tokenizer_2
            )
    return pipeline, abstractions


def parse_args(argv=None):
    """The flags; `args.trained` are those that the LoRA was trained with."""
    parser = Parser(description=__doc__.split("\n")[0], takes="LORA")
    parser.add_argument(
        "lora", metavar="LORA", type=Path, help="a run's output folder, a checkpoint in it, or a LoRA file"
    )
    parser.add_argument("--prompt", required=True, nargs="+", help="prompts, one image each")
    parser.add_argument(
        "--pretrained_model_name_or_path",
        "--model",
        type=name_or_path,
        metavar="MODEL",
        help="folder or Hub id of FLUX.1 or FLUX.2 (default: what was trained)",
    )
    parser.add_argument(
        "--size", type=in_range(int, 16, 8192), nargs=2, metavar=("WIDTH", "HEIGHT"), help="(default: as trained)"
    )
    parser.add_argument(
        "--num_inference_steps", type=positive_int, help="(default: FLUX.1 28, FLUX.2 50, distilled FLUX.2-klein 4)"
    )
    parser.add_argument(
        "--guidance_scale", type=non_negative_float, help="(default: FLUX.1 3.5, FLUX.2 4, distilled FLUX.2-klein 1)"
    )
    parser.add_argument(
        "--max_sequence_length", type=in_range(int, 1, 512), help="tokens per prompt (default: as trained)"
    )
    parser.add_argument("--lora_scale", type=in_range(float, -10, 10), default=1.0, help="strength of the LoRA")
    parser.add_argument("--seed", type=image_seed, default=0)
    parser.add_argument("--placement", choices=PLACEMENTS, help=PLACEMENT_HELP)
    parser.add_argument("--output", type=Path, default=Path(), help="folder for the images")
    args = parser.parse_args(argv)
    try:
        lora, _, args.trained = find_files(args.lora)
    except (OSError, ValueError) as error:
        parser.error(str(error))
    problems = check_placement(args.placement)
    model = args.pretrained_model_name_or_path
    if not model and args.trained["pretrained_model_name_or_path"] is None:
        problems.append(f"--pretrained_model_name_or_path is needed: no args.json near {lora} says what was trained")
    missing = [str(file) for file in single_files(args.trained) if not (file and Path(file).exists())]
    if not model and missing:
        problems.append(
            f"the run was trained from single files, and {missing[0]} is not there: start in the folder where it was "
            "trained, or give --pretrained_model_name_or_path, such as black-forest-labs/FLUX.1-dev"
        )
    if args.size and any(side % 16 for side in args.size):
        problems.append(f"--size {args.size[0]} {args.size[1]}: both must be multiples of 16")
    if model and model.endswith(".safetensors"):
        problems.append(f"--pretrained_model_name_or_path {model}: name a folder or a model on the Hub, not a file")
    parser.refuse(problems + check_folder("--output", args.output))
    return args


def main(argv=None):
    args = parse_args(argv)
    width, height = args.size or [args.trained["resolution"]] * 2
    pipeline, abstractions = load_pipeline(args.lora, args.pretrained_model_name_or_path)
    place(pipeline.components, find_device(), pixels=width * height, placement=args.placement)
    call = dict(FAMILIES[type(pipeline).__name__](pipeline.config).sampling)
    for name in ("num_inference_steps", "guidance_scale"):
        if vars(args)[name] is not None:
            call[name] = vars(args)[name]
    with (
        scaled_adapters(pipeline.transformer, args.lora_scale),
        scaled_adapters(pipeline.text_encoder, args.lora_scale),
    ):
        for i, prompt in enumerate(args.prompt):
            image = pipeline(
                prompt=replace_words(prompt, abstractions),
                width=width,
                height=height,
                **call,
                max_sequence_length=args.max_sequence_length or args.trained["max_sequence_length"],
                generator=torch.Generator().manual_seed(args.seed + i),
            ).images[0]
            print(save_image(image, args.output / f"{i}.png"))


if __name__ == "__main__":
    main()
