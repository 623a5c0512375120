"""Generates images with the LoRA and the new tokens that train_dreambooth_flux_advanced.py saved.

    python examples/dreambooth/generate.py 3d-icon-Flux-LoRA --prompt "a TOK icon of an orange llama eating ramen"

The model is named in the folder's args.json, the words that new tokens stand for in the header of their file. With the
validation prompt, the first image is that of the last validation.
"""

import argparse
import json
import re
import sys
from pathlib import Path


sys.path.insert(0, str(Path(__file__).parents[2]))


# isort: split
from common.arguments import expanded_path
from common.checkpoints import unused_path

import torch
from diffusers import FluxPipeline
from safetensors import safe_open
from safetensors.torch import load_file


def read_args(folder):
    """The flags that a trainer's output folder was made with."""
    return json.loads((folder / "args.json").read_text())["args"]


def load_pipeline(folder, model=None):
    """(pipeline, {abstraction: its tokens}) of a trainer's output folder; `model` replaces the trained one."""
    folder = folder.resolve()
    args = read_args(folder)
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(args["mixed_precision"], torch.float32)
    if model is None:
        pipeline = FluxPipeline.from_pretrained(
            args["pretrained_model_name_or_path"],
            revision=args["revision"],
            variant=args["variant"],
            cache_dir=args["cache_dir"],
            dtype=dtype,
        )
    else:
        pipeline = FluxPipeline.from_pretrained(model, dtype=dtype)
    lora = folder / "pytorch_lora_weights.safetensors"
    if args.get("output_name"):
        lora = folder.with_name(f"{args['output_name']}.safetensors")
    if lora.exists():
        pipeline.load_lora_weights(lora.parent, weight_name=lora.name)
    if args["pretrained_model_name_or_path"].endswith(".safetensors"):
        # training from single files pools CLIP at the end of the prompt, not at the last new token
        pipeline.text_encoder.eos_token_id = pipeline.tokenizer.eos_token_id
    embedding_files = sorted(folder.glob("*_emb.safetensors"), key=lambda path: path.stat().st_mtime)
    if not embedding_files:
        return pipeline, {}
    with safe_open(embedding_files[-1], "pt") as file:
        abstractions = file.metadata()
    embeddings = load_file(embedding_files[-1])
    tokens = [f"<s{i}>" for i in range(len(embeddings["clip_l"]))]
    pipeline.load_textual_inversion(
        embeddings["clip_l"], token=tokens, text_encoder=pipeline.text_encoder, tokenizer=pipeline.tokenizer
    )
    if "t5" in embeddings:
        pipeline.load_textual_inversion(
            embeddings["t5"], token=tokens, text_encoder=pipeline.text_encoder_2, tokenizer=pipeline.tokenizer_2
        )
    return pipeline, abstractions


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.register("type", Path, expanded_path)
    parser.add_argument("folder", type=Path, help="a trainer's output folder")
    parser.add_argument("--prompt", required=True, nargs="+", help="prompts, one image each")
    parser.add_argument("--model", help="folder or hub id of FLUX.1 (default: what was trained)")
    parser.add_argument("--size", type=int, nargs=2, metavar=("WIDTH", "HEIGHT"), help="(default: as trained)")
    parser.add_argument("--num_inference_steps", type=int, default=28)
    parser.add_argument("--guidance_scale", type=float, default=3.5)
    parser.add_argument("--max_sequence_length", type=int, help="T5 tokens per prompt (default: as trained)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, default=Path(), help="folder for the images")
    args = parser.parse_args()
    if not (args.folder / "args.json").is_file():
        parser.error(f"{args.folder}: no args.json in it, so it is not a trainer's output folder")
    trained = read_args(args.folder)
    if trained["pretrained_model_name_or_path"].endswith(".safetensors") and not args.model:
        parser.error("the model was trained from single files: give --model, such as black-forest-labs/FLUX.1-dev")
    width, height = args.size or [trained["resolution"]] * 2
    pipeline, abstractions = load_pipeline(args.folder, args.model)
    words = sorted(abstractions, key=len, reverse=True)  # TOK2 before TOK
    if torch.accelerator.is_available():
        pipeline.to(torch.accelerator.current_accelerator())
    args.output.mkdir(parents=True, exist_ok=True)
    for i, prompt in enumerate(args.prompt):
        if words:
            prompt = re.sub("|".join(map(re.escape, words)), lambda word: abstractions[word[0]], prompt)
        image = pipeline(
            prompt,
            width=width,
            height=height,
            num_inference_steps=args.num_inference_steps,
            guidance_scale=args.guidance_scale,
            max_sequence_length=args.max_sequence_length or trained["max_sequence_length"],
            generator=torch.Generator().manual_seed(args.seed + i),
        ).images[0]
        path = unused_path(args.output / f"{i}.png")
        image.save(path)
        print(path)


if __name__ == "__main__":
    main()
