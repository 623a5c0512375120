"""Converts a FLUX.1 LoRA to the form of another program, at the same strength.

    python examples/convert_lora.py in.safetensors out.safetensors --to comfyui

diffusers  diffusers' names with the scale in the weights, as the trainers write it: ComfyUI, Forge, diffusers and peft
           read it at the same strength
comfyui    the same
kohya      the names of kohya's sd-scripts, with query, key and value fused as in FLUX.1's own weights; diffusers reads
           it at FLUX.1's size alone, and neither it nor sd-scripts the layers outside the blocks

The input's form is detected: one of these, or the names of PEFT, ComfyUI, OneTrainer or XLabs. What is no LoRA for
FLUX.1's transformer and CLIP, such as T5's layers or LoKr, is refused by name. A DoRA keeps its magnitudes; kohya's
form has none.
"""

import sys
from pathlib import Path

import torch


sys.path.insert(0, str(Path(__file__).parents[1]))

from common.arguments import Parser, check_file
from common.lora_formats import LORA_FORMS, LokrLayer, read_lora, write_lora


DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def main(argv=None):
    parser = Parser(description=__doc__, takes="INPUT OUTPUT")
    parser.add_argument("input", metavar="INPUT", type=Path, help="a LoRA in any of these forms")
    parser.add_argument(
        "output", metavar="OUTPUT", type=Path, help="the file to write; none of this name may be there"
    )
    parser.add_argument("--to", choices=LORA_FORMS, default="comfyui", help="form to write")
    parser.add_argument("--dtype", choices=DTYPES, help="of the weights written (default: that of the input)")
    args = parser.parse_args(argv)
    problems = check_file("OUTPUT", args.output)
    if args.output.exists():
        problems = [f"{args.output} exists: name a new file"]
    parser.refuse(problems)
    try:
        layers, header = read_lora(args.input)
        if any(isinstance(layer, LokrLayer) for layer in layers.values()):
            raise ValueError("a LoKr, which diffusers and ComfyUI read as it is and which no LoRA equals")
        write_lora(args.output, layers, args.to, header, DTYPES.get(args.dtype))
    except Exception as error:  # a damaged file can raise anything
        reason = str(error) or repr(error)
        parser.error(reason if str(args.input) in reason else f"{args.input}: cannot be converted ({reason})")
    if any(layer.magnitude is not None and layer.dora_scale is None for layer in layers.values()):
        print("Without the tensors dora_scale, which need the model, ComfyUI applies it as a LoRA.", file=sys.stderr)
    ranks = sorted({layer.rank for layer in layers.values()})
    outside_blocks = [name for name in layers if name.startswith("transformer.") and "_blocks." not in name]
    if args.to == "kohya" and outside_blocks:
        print(f"In this form neither diffusers nor sd-scripts reads {', '.join(outside_blocks)}.", file=sys.stderr)
    print(f"{len(layers)} layers of rank {', '.join(map(str, ranks))} in {args.output}, as {args.to}")


if __name__ == "__main__":
    main()
