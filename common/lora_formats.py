"""LoRA files for FLUX.1 in the names of diffusers, ComfyUI and kohya's sd-scripts."""

import datetime
import hashlib
import json
import math
import re
from pathlib import Path

from common.checkpoints import atomic_write
from common.lora import adapter_weights

import torch
from safetensors import safe_open
from safetensors.torch import save_file


# FLUX.1's layers as its authors name them and, after them, as diffusers does, # for a block's number. Where
# diffusers has several, their outputs are rows of the one. norm_out has (scale, shift) where the authors' has the
# halves the other way round.
FLUX_LAYERS = {
    "img_in": ("x_embedder",),
    "txt_in": ("context_embedder",),
    "time_in.in_layer": ("time_text_embed.timestep_embedder.linear_1",),
    "time_in.out_layer": ("time_text_embed.timestep_embedder.linear_2",),
    "vector_in.in_layer": ("time_text_embed.text_embedder.linear_1",),
    "vector_in.out_layer": ("time_text_embed.text_embedder.linear_2",),
    "guidance_in.in_layer": ("time_text_embed.guidance_embedder.linear_1",),
    "guidance_in.out_layer": ("time_text_embed.guidance_embedder.linear_2",),
    "double_blocks.#.img_attn.qkv": tuple(f"transformer_blocks.#.attn.to_{part}" for part in "qkv"),
    "double_blocks.#.txt_attn.qkv": tuple(f"transformer_blocks.#.attn.add_{part}_proj" for part in "qkv"),
    "double_blocks.#.img_attn.proj": ("transformer_blocks.#.attn.to_out.0",),
    "double_blocks.#.txt_attn.proj": ("transformer_blocks.#.attn.to_add_out",),
    "double_blocks.#.img_mlp.0": ("transformer_blocks.#.ff.net.0.proj",),
    "double_blocks.#.img_mlp.2": ("transformer_blocks.#.ff.net.2",),
    "double_blocks.#.txt_mlp.0": ("transformer_blocks.#.ff_context.net.0.proj",),
    "double_blocks.#.txt_mlp.2": ("transformer_blocks.#.ff_context.net.2",),
    "double_blocks.#.img_mod.lin": ("transformer_blocks.#.norm1.linear",),
    "double_blocks.#.txt_mod.lin": ("transformer_blocks.#.norm1_context.linear",),
    "single_blocks.#.linear1": (
        *(f"single_transformer_blocks.#.attn.to_{part}" for part in "qkv"),
        "single_transformer_blocks.#.proj_mlp",
    ),
    "single_blocks.#.linear2": ("single_transformer_blocks.#.proj_out",),
    "single_blocks.#.modulation.lin": ("single_transformer_blocks.#.norm.linear",),
    **{
        f"double_blocks.#.{side}_attn.norm.{old}_norm": (f"transformer_blocks.#.attn.norm_{new}{old[0]}",)
        for side, new in (("img", ""), ("txt", "added_"))
        for old in ("query", "key")
    },
    **{
        f"single_blocks.#.norm.{old}_norm": (f"single_transformer_blocks.#.attn.norm_{old[0]}",)
        for old in ("query", "key")
    },
    "final_layer.linear": ("proj_out",),
    "final_layer.adaLN_modulation.1": ("norm_out.linear",),
}

# of a file that is written again
STALE_HEADER = ("format", "sshs_model_hash", "sshs_legacy_hash", "modelspec.hash_sha256")

LORA_FORMS = ("comfyui", "kohya", "diffusers")


def lora_layers(modules):
    """The adapters of {"transformer": model, "text_encoder": model} as {layer: (down, up, alpha)}.

    down [r, in] and up [out, r] are on the CPU; an adapter adds alpha / r * up @ down to its layer's weight. Layers
    are named as ComfyUI, Forge and diffusers all know them: transformer.transformer_blocks.0.attn.to_q,
    text_encoder.text_model.encoder.layers.0.self_attn.q_proj.
    """
    layers = {}
    for name, model in modules.items():
        weights, alpha = adapter_weights(model), float(model.peft_config["default"].lora_alpha)
        for key in [key for key in weights if key.endswith(".lora_A.weight")]:
            pair = weights[key].cpu(), weights[key.replace("lora_A", "lora_B")].cpu()
            layers[full_name(f"{name}.{key.removesuffix('.lora_A.weight')}")] = (*pair, alpha)
    return layers


def full_name(layer):
    """A layer's name with the level text_model, which transformers 5 has no more and ComfyUI and Forge insist on."""
    return re.sub(r"^text_encoder\.(?!text_model\.)", "text_encoder.text_model.", layer)


def write_lora(path, layers, form="comfyui", header=None, dtype=None):
    """Writes `lora_layers` to one safetensors file, whole or not at all, in one of LORA_FORMS:

    comfyui    diffusers' names; a tensor `alpha` beside each pair if any alpha is not the rank. ComfyUI, Forge and
               diffusers read it at the right strength.
    kohya      the names of kohya's sd-scripts; layers that FLUX.1's authors fused are fused, exactly.
    diffusers  diffusers' names; alpha stands in the header, which ComfyUI ignores. For one alpha and one rank.

    `header` {str: str} is added to the file's metadata, and sshs_model_hash, the SHA-256 of all after the header.
    """
    layers = {name: (*(t.to(dtype or t.dtype) for t in pair), alpha) for name, (*pair, alpha) in layers.items()}
    metadata, tensors = {"format": "pt", **(header or {})}, {}
    down_name, up_name = ("lora_down", "lora_up") if form == "kohya" else ("lora_A", "lora_B")
    if form == "diffusers":
        metadata["lora_adapter_metadata"] = json.dumps(adapter_metadata(layers), sort_keys=True)
    with_alpha = form == "kohya" or form == "comfyui" and any(alpha != len(down) for down, _, alpha in layers.values())
    for name, (down, up, alpha) in (fused_layers(layers) if form == "kohya" else layers).items():
        tensors[f"{name}.{down_name}.weight"], tensors[f"{name}.{up_name}.weight"] = down.contiguous(), up.contiguous()
        if with_alpha:
            tensors[f"{name}.alpha"] = torch.tensor(float(alpha))
    path, placeholder = Path(path), "0" * 64
    with atomic_write(path) as partial:
        save_file(tensors, partial, metadata | {"sshs_model_hash": placeholder})
        with partial.open("r+b") as file:
            start = file.read(int.from_bytes(file.read(8), "little"))
            digest = hashlib.file_digest(file, "sha256").hexdigest()
            file.seek(8)
            file.write(start.replace(placeholder.encode(), digest.encode()))


def read_lora(path):
    """(`lora_layers`, header) of a FLUX.1 LoRA in any of LORA_FORMS, or with the prefix diffusion_model.

    Raises ValueError for keys that are none of these.
    """
    with safe_open(path, "pt") as file:
        header, tensors = file.metadata() or {}, {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    adapter = json.loads(header.pop("lora_adapter_metadata", "{}"))
    layers = {}
    for down_name, up_name in (("lora_A", "lora_B"), ("lora_down", "lora_up")):
        for key in [key for key in tensors if key.endswith(f".{down_name}.weight")]:
            name = key.removesuffix(f".{down_name}.weight")
            up = tensors.pop(f"{name}.{up_name}.weight", None)
            if up is None:
                raise ValueError(f"{path}: {key} has no {up_name}")
            down, part = tensors.pop(key), name.partition(".")[0]
            alpha = adapter.get(f"{part}.alpha_pattern", {}).get(name.partition(".")[2])
            alpha = alpha or adapter.get(f"{part}.lora_alpha", len(down))
            alpha *= math.sqrt(len(down)) if adapter.get(f"{part}.use_rslora") else 1
            layers |= split_layer(name, down, up, float(tensors.pop(f"{name}.alpha", alpha)))
    known = {f"transformer.{part}" for parts in FLUX_LAYERS.values() for part in parts}
    strangers = [name for name in layers if re.sub(r"\.\d+\.", ".#.", name, count=1) not in known]
    unknown = [*tensors, *(name for name in strangers if not name.startswith("text_encoder.text_model."))]
    if unknown or not layers:
        raise ValueError(f"{path}: not a LoRA for FLUX.1 in a known form: {', '.join(unknown[:5]) or 'nothing in it'}")
    return layers, {key: value for key, value in header.items() if key not in STALE_HEADER}


def fused_layers(layers):
    """`lora_layers` as kohya names and fuses them: {lora_unet_...: (down [R, in], up [out, R], alpha)}.

    The downs of the parts are stacked and the ups stand on the diagonal, so R is the sum of their ranks; rows of parts
    without an adapter are zero. Scales alpha / r that differ go into the ups.
    """
    homes = {part: home for home, parts in FLUX_LAYERS.items() for part in parts}
    groups, fused = {}, {}
    for layer, triple in layers.items():
        part, _, name = layer.partition(".")
        template = re.sub(r"\.\d+\.", ".#.", name, count=1)
        if part != "transformer":
            fused[f"lora_te1_{name.replace('.', '_')}"] = triple
        else:
            number = next(iter(re.findall(r"\.(\d+)\.", name)), "")
            groups.setdefault((homes[template], number), {})[template] = triple
    for (home, number), parts in groups.items():
        names = FLUX_LAYERS[home]
        (width,) = {down.shape[1] for down, _, _ in parts.values()}
        sizes = [len(parts[name][1]) if name in parts else width * (4 if "mlp" in name else 1) for name in names]
        scales = {alpha / len(down) for down, _, alpha in parts.values()}
        downs = torch.cat([parts[name][0] for name in names if name in parts])
        up, row, column = downs.new_zeros(sum(sizes), len(downs)), 0, 0
        for name, size in zip(names, sizes, strict=True):
            if name in parts:
                down, part, alpha = parts[name]
                factor = 1 if len(scales) == 1 else alpha / len(down)
                up[row : row + size, column : column + len(down)] = swap_halves(name, part) * factor
                column += len(down)
            row += size
        key = f"lora_unet_{home.replace('.', '_').replace('#', number)}"
        fused[key] = downs, up, len(downs) * (scales.pop() if len(scales) == 1 else 1.0)
    return fused


def split_layer(name, down, up, alpha):
    """The `lora_layers` that a layer of a file holds: itself, or the parts of what kohya fused.

    Parts get the columns of `up` that only they use, so `fused_layers` is undone exactly; those that share columns, as
    where kohya trained the fused layer, get all of `down`.
    """
    name = f"lora_unet_{name[16:].replace('.', '_')}" if name.startswith("diffusion_model.") else name
    encoder = re.fullmatch(r"lora_te1?_text_model_encoder_layers_(\d+)_(self_attn|mlp)_(\w+)", name)
    if encoder:
        return {"text_encoder.text_model.encoder.layers.{}.{}.{}".format(*encoder.groups()): (down, up, alpha)}
    kohya = {f"lora_unet_{home.replace('.', '_')}": parts for home, parts in FLUX_LAYERS.items()}
    parts = kohya.get(re.sub(r"_\d+_", "_#_", name, count=1))
    if parts is None:
        return {full_name(name): (down, up, alpha)}
    number = next(iter(re.findall(r"_(\d+)_", name)), "")
    rank, ups = len(down), split_rows(up, parts, down.shape[1])
    even = torch.arange(rank) * len(parts) // rank
    owners = [(even == i) & (rank % len(parts) == 0) for i in range(len(parts))]
    if any(rows[:, ~mine].any() for rows, mine in zip(ups, owners, strict=True)):
        owners = [rows.any(dim=0) for rows in ups]
        if sum(mine.int() for mine in owners).max() > 1:
            owners = [torch.ones(rank, dtype=torch.bool)] * len(parts)
    return {
        f"transformer.{part.replace('#', number)}": (
            down[mine],
            swap_halves(part, rows[:, mine]),
            alpha / rank * int(mine.sum()),
        )
        for part, rows, mine in zip(parts, ups, owners, strict=True)
        if mine.any()
    }


def split_rows(rows, parts, width):
    """The rows of each of the `parts` that FLUX.1's authors fused: as many each, but linear1's MLP has the rest.

    `width` is that of the transformer.
    """
    sizes = [width] * 3 + [len(rows) - 3 * width] if len(parts) == 4 else [len(rows) // len(parts)] * len(parts)
    return rows.split(sizes)


def diffusers_state_dict(state_dict):
    """The weights of FLUX.1's transformer in its authors' form, of any size, as FluxTransformer2DModel has them.

    (`from_single_file` has the same for a width of 3072 alone.)
    """
    converted, width = {}, len(state_dict["img_in.bias"])
    for key, value in state_dict.items():
        name, _, kind = key.rpartition(".")
        number = next(iter(re.findall(r"\.(\d+)\.", name)), "")
        parts = FLUX_LAYERS[re.sub(r"\.\d+\.", ".#.", name, count=1)]
        for part, rows in zip(parts, split_rows(value, parts, width), strict=True):
            converted[f"{part.replace('#', number)}.{kind.replace('scale', 'weight')}"] = swap_halves(part, rows)
    return converted


def swap_halves(name, rows):
    """(scale, shift) to (shift, scale) or back, for the one layer that has them so: see FLUX_LAYERS."""
    return torch.cat(rows.chunk(2)[::-1]) if name == "norm_out.linear" else rows


def adapter_metadata(layers):
    """The metadata from which diffusers restores the strength of `lora_layers`, {"transformer.r": 4, ...}."""
    metadata = {}
    for part in dict.fromkeys(layer.partition(".")[0] for layer in layers):
        own = {name.partition(".")[2]: layer for name, layer in layers.items() if name.startswith(f"{part}.")}
        shapes = {(len(down), alpha) for down, _, alpha in own.values()}
        if len(shapes) > 1:
            raise ValueError(
                f"the form diffusers holds one rank and alpha, not {len(shapes)}: choose comfyui or kohya"
            )
        rank, alpha = shapes.pop()
        targets = own if part == "transformer" else {name.rpartition(".")[2] for name in own}
        metadata |= {f"{part}.r": rank, f"{part}.lora_alpha": alpha, f"{part}.target_modules": sorted(targets)}
    return metadata


def lora_header(layers, *, name, base_model, resolution, trigger_words, captions):
    """What a file says of itself to Forge, ComfyUI's managers and Civitai, by ModelSpec 1.0.1 and in kohya's words.

    `base_model` is flux-1-dev or flux-1-schnell, `resolution` (width, height), `captions` {folder: {tag: count}}.
    """
    down, _, alpha = next(iter(layers.values()))
    return {
        "modelspec.sai_model_spec": "1.0.1",
        "modelspec.architecture": f"{base_model}/lora",
        "modelspec.implementation": "https://github.com/black-forest-labs/flux",
        "modelspec.title": name,
        "modelspec.resolution": "{}x{}".format(*resolution),
        "modelspec.date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        **({"modelspec.trigger_phrase": ", ".join(trigger_words)} if trigger_words else {}),
        "ss_output_name": name,
        "ss_base_model_version": "flux1",
        "ss_network_module": "networks.lora_flux",
        "ss_network_dim": str(len(down)),
        "ss_network_alpha": str(alpha),
        "ss_tag_frequency": json.dumps(captions),
    }
