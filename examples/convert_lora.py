"""Rewrites a FLUX.1 LoRA in another program's form; the strength stays what it was, alpha included.

    python examples/convert_lora.py in.safetensors out.safetensors --to comfyui

comfyui    diffusers' names, with alpha where it is not the rank: ComfyUI, Forge and diffusers read it
kohya      the names of kohya's sd-scripts, fused layers fused
diffusers  diffusers' names, alpha in the header

What the input is shows by itself. Also read: names that start with diffusion_model.
"""

import argparse
import sys
from pathlib import Path

import torch


sys.path.insert(0, str(Path(__file__).parents[1]))

from common.lora_formats import LORA_FORMS, read_lora, write_lora


DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def main(argv=None):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("input", type=Path)
    parser.add_argument("output", type=Path)
    parser.add_argument("--to", choices=LORA_FORMS, default="comfyui")
    parser.add_argument("--dtype", choices=DTYPES, help="of the weights (default: as they are)")
    args = parser.parse_args(argv)
    try:
        layers, header = read_lora(args.input)
        write_lora(args.output, layers, args.to, header, DTYPES.get(args.dtype))
    except Exception as error:  # damaged files raise of all kinds
        reason = str(error) or repr(error)
        parser.error(reason if str(args.input) in reason else f"{args.input}: cannot be converted ({reason})")
    ranks = sorted({len(down) for down, _, _ in layers.values()})
    print(f"{len(layers)} layers of rank {', '.join(map(str, ranks))} in {args.output}, as {args.to}")


if __name__ == "__main__":
    main()
