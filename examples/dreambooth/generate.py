"""Draws prompts with a LoRA and the new tokens that train_dreambooth_flux_advanced.py saved.

    python examples/dreambooth/generate.py 3d-icon-Flux-LoRA --prompt "a TOK icon of an orange llama eating ramen"

The folder's args.json says which model was trained and which words the new tokens stand for.
"""

import argparse
import json
from pathlib import Path

import torch
from diffusers import FluxPipeline
from safetensors import safe_open


def load_pipeline(folder, dtype=None):
    """(pipeline, {abstraction: its tokens}) of a trainer's output folder."""
    args = json.loads((folder / "args.json").read_text())["args"]
    dtype = dtype or (torch.bfloat16 if args["mixed_precision"] == "bf16" else torch.float32)
    pipeline = FluxPipeline.from_pretrained(args["pretrained_model_name_or_path"], dtype=dtype)
    name = args.get("output_name")
    lora = folder.with_name(f"{name}.safetensors") if name else folder / "pytorch_lora_weights.safetensors"
    if lora.exists():
        pipeline.load_lora_weights(lora.parent, weight_name=lora.name)
    abstractions = {}
    for path in folder.glob("*_emb.safetensors"):
        with safe_open(path, "pt") as file:
            abstractions, rows = file.metadata(), {kind: file.get_tensor(kind) for kind in file.keys()}  # noqa: SIM118
        tokens = [f"<s{i}>" for i in range(len(rows["clip_l"]))]
        encoders = {
            "clip_l": (pipeline.text_encoder, pipeline.tokenizer),
            "t5": (pipeline.text_encoder_2, pipeline.tokenizer_2),
        }
        for kind, vectors in rows.items():
            text_encoder, tokenizer = encoders[kind]
            pipeline.load_textual_inversion(vectors, token=tokens, text_encoder=text_encoder, tokenizer=tokenizer)
    return pipeline, abstractions


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("folder", type=Path, help="a trainer's output folder")
    parser.add_argument("--prompt", required=True, nargs="+", help="prompts, one picture each")
    parser.add_argument("--size", type=int, nargs=2, default=(1024, 1024), metavar=("WIDTH", "HEIGHT"))
    parser.add_argument("--num_inference_steps", type=int, default=28)
    parser.add_argument("--guidance_scale", type=float, default=3.5)
    parser.add_argument("--max_sequence_length", type=int, default=512)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, default=Path(), help="folder of the pictures")
    args = parser.parse_args()
    pipeline, abstractions = load_pipeline(args.folder)
    if torch.accelerator.is_available():
        pipeline.to(torch.accelerator.current_accelerator())
    args.output.mkdir(parents=True, exist_ok=True)
    for i, prompt in enumerate(args.prompt):
        for name, tokens in abstractions.items():
            prompt = prompt.replace(name, tokens)
        image = pipeline(
            prompt,
            width=args.size[0],
            height=args.size[1],
            num_inference_steps=args.num_inference_steps,
            guidance_scale=args.guidance_scale,
            max_sequence_length=args.max_sequence_length,
            generator=torch.Generator().manual_seed(args.seed + i),
        ).images[0]
        image.save(args.output / f"{i}.png")
        print(args.output / f"{i}.png")


if __name__ == "__main__":
    main()
