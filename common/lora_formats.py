"""LoRA files: the form that diffusers, peft, ComfyUI and Forge all read at the trained strength, and kohya's.

Between files, a LoRA is {layer name: LoraLayer} under the names that ComfyUI, Forge and diffusers all know, such as
transformer.transformer_blocks.0.attn.to_q and text_encoder.text_model.encoder.layers.0.self_attn.q_proj.
"""

import hashlib
import json
import math
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import cast

from common.checkpoints import atomic_write

import torch
from diffusers.loaders.lora_base import LORA_ADAPTER_METADATA_KEY
from peft.utils.other import get_pattern_key
from safetensors import safe_open
from safetensors.torch import save


# FLUX.1's layers as its authors name them, and the layers of diffusers that each one holds; # is a block's number.
# Where diffusers has several, the authors fused them: the outputs of the parts are consecutive rows of one weight.
FLUX_LAYERS: dict[str, tuple[str, ...]] = {
    "img_in": ("x_embedder",),
    "txt_in": ("context_embedder",),
    "time_in.in_layer": ("time_text_embed.timestep_embedder.linear_1",),
    "time_in.out_layer": ("time_text_embed.timestep_embedder.linear_2",),
    "vector_in.in_layer": ("time_text_embed.text_embedder.linear_1",),
    "vector_in.out_layer": ("time_text_embed.text_embedder.linear_2",),
    "guidance_in.in_layer": ("time_text_embed.guidance_embedder.linear_1",),
    "guidance_in.out_layer": ("time_text_embed.guidance_embedder.linear_2",),
    "double_blocks.#.img_attn.qkv": (
        "transformer_blocks.#.attn.to_q",
        "transformer_blocks.#.attn.to_k",
        "transformer_blocks.#.attn.to_v",
    ),
    "double_blocks.#.txt_attn.qkv": (
        "transformer_blocks.#.attn.add_q_proj",
        "transformer_blocks.#.attn.add_k_proj",
        "transformer_blocks.#.attn.add_v_proj",
    ),
    "double_blocks.#.img_attn.norm.query_norm": ("transformer_blocks.#.attn.norm_q",),
    "double_blocks.#.img_attn.norm.key_norm": ("transformer_blocks.#.attn.norm_k",),
    "double_blocks.#.txt_attn.norm.query_norm": ("transformer_blocks.#.attn.norm_added_q",),
    "double_blocks.#.txt_attn.norm.key_norm": ("transformer_blocks.#.attn.norm_added_k",),
    "double_blocks.#.img_attn.proj": ("transformer_blocks.#.attn.to_out.0",),
    "double_blocks.#.txt_attn.proj": ("transformer_blocks.#.attn.to_add_out",),
    "double_blocks.#.img_mlp.0": ("transformer_blocks.#.ff.net.0.proj",),
    "double_blocks.#.img_mlp.2": ("transformer_blocks.#.ff.net.2",),
    "double_blocks.#.txt_mlp.0": ("transformer_blocks.#.ff_context.net.0.proj",),
    "double_blocks.#.txt_mlp.2": ("transformer_blocks.#.ff_context.net.2",),
    "double_blocks.#.img_mod.lin": ("transformer_blocks.#.norm1.linear",),
    "double_blocks.#.txt_mod.lin": ("transformer_blocks.#.norm1_context.linear",),
    "single_blocks.#.linear1": (
        "single_transformer_blocks.#.attn.to_q",
        "single_transformer_blocks.#.attn.to_k",
        "single_transformer_blocks.#.attn.to_v",
        "single_transformer_blocks.#.proj_mlp",
    ),
    "single_blocks.#.linear2": ("single_transformer_blocks.#.proj_out",),
    "single_blocks.#.norm.query_norm": ("single_transformer_blocks.#.attn.norm_q",),
    "single_blocks.#.norm.key_norm": ("single_transformer_blocks.#.attn.norm_k",),
    "single_blocks.#.modulation.lin": ("single_transformer_blocks.#.norm.linear",),
    "final_layer.linear": ("proj_out",),
    "final_layer.adaLN_modulation.1": ("norm_out.linear",),  # its halves are swapped: see swap_halves
}

FUSED_NAMES = {part: fused_name for fused_name, parts in FLUX_LAYERS.items() for part in parts}

CLIP_LAYERS = (
    "self_attn.q_proj",
    "self_attn.k_proj",
    "self_attn.v_proj",
    "self_attn.out_proj",
    "mlp.fc1",
    "mlp.fc2",
)

LORA_FORMS = ("diffusers", "comfyui", "kohya")  # the first two are one form

# Layers of diffusers by the names that files give them, without what stands before: with _ for every dot and # for a
# block's number. A file may hold one layer, or several that were fused.
SINGLE_LAYERS = {layer.replace(".", "_"): f"transformer.{layer}" for layer in FUSED_NAMES} | {
    f"encoder_layers_#_{layer.replace('.', '_')}": f"text_encoder.text_model.encoder.layers.#.{layer}"
    for layer in CLIP_LAYERS
}
DOUBLE_QKV = FLUX_LAYERS["double_blocks.#.img_attn.qkv"]
DOUBLE_CONTEXT_QKV = FLUX_LAYERS["double_blocks.#.txt_attn.qkv"]
SINGLE_QKV = FLUX_LAYERS["single_blocks.#.linear1"][:3]
FUSED_LAYERS = {fused_name.replace(".", "_"): parts for fused_name, parts in FLUX_LAYERS.items()} | {
    "single_blocks_#_linear1_qkv": SINGLE_QKV,
    "double_blocks_#_processor_qkv_lora1": DOUBLE_QKV,
    "double_blocks_#_processor_qkv_lora2": DOUBLE_CONTEXT_QKV,
    "double_blocks_#_processor_proj_lora1": FLUX_LAYERS["double_blocks.#.img_attn.proj"],
    "double_blocks_#_processor_proj_lora2": FLUX_LAYERS["double_blocks.#.txt_attn.proj"],
    "single_blocks_#_processor_qkv": SINGLE_QKV,
    "single_blocks_#_processor_proj": FLUX_LAYERS["single_blocks.#.linear2"],
}

# How programs end the keys of a layer's two matrices, down and up: diffusers and PEFT, PEFT in training, kohya,
# earlier diffusers, and XLabs, whose layers are called qkv_lora1 and so on.
ENDINGS = (
    (".lora_A.weight", ".lora_B.weight"),
    (".lora_A.default.weight", ".lora_B.default.weight"),
    (".lora_down.weight", ".lora_up.weight"),
    (".lora.down.weight", ".lora.up.weight"),
    ("_lora.down.weight", "_lora.up.weight"),
    (".lora_linear_layer.down.weight", ".lora_linear_layer.up.weight"),
    (".down.weight", ".up.weight"),
)

# What programs put before a layer's name: diffusers, PEFT, ComfyUI, kohya, OneTrainer, LyCORIS; and the same of CLIP.
PREFIXES = re.compile(
    r"^((transformer|base_model\.model|(model\.)?diffusion_model)\.|lora_(unet|transformer)_|lycoris_"
    r"|text_encoder\.|text_encoders\.clip_l\.transformer\.|lora_te1?_|text_model[._])+"
)

# Tensors and layers that are no pair of matrices for FLUX.1 or CLIP: what their keys contain, and what they are.
OTHER_TENSORS = {
    r"lora_magnitude_vector|dora_scale": "DoRA magnitudes in a form that is not read here",
    r"\.lokr_": "LoKr factors in a form that is not read here",
    r"\.hada_": "LoHa factors",
    r"\.oft_": "OFT blocks",
    r"^bundle_emb": "an embedding",
    r"^(lora_te[23]_|text_encoder_2\.|text_encoders\.t5xxl\.)": "for T5, which is not trained here",
    r"\.(bias|diff|diff_b|scale)$": "a change of a bias, a norm or a whole weight, which is no LoRA",
    r"\.alpha$": "the alpha of no layer",
}

LOKR_FACTORS = ("lokr_w1", "lokr_w2", "lokr_w2_a", "lokr_w2_b")
LOKR_MARK = "lora_type.lokr"  # a tensor without meaning: FluxPipeline.load_lora_weights wants "lora" in some name
DORA_ENDINGS = (".lora_magnitude_vector", ".dora_scale")

# Header entries with hashes of the file they stood in, or that are written anew: a converted file must not keep them.
FILE_HEADER = ("format", "sshs_model_hash", "sshs_legacy_hash", "modelspec.hash_sha256")


@dataclass(frozen=True)
class LoraLayer:
    """The adapter of one layer, which adds scale * up @ down to its weight W [out, in].

    A DoRA (2402.09353) then scales each row of W + scale * up @ down to the norm that `magnitude` holds.
    """

    down: torch.Tensor  # [rank, in]
    up: torch.Tensor  # [out, rank]
    alpha: float
    magnitude: torch.Tensor | None = None  # [out], of a DoRA
    dora_scale: torch.Tensor | None = None  # [out, 1], what ComfyUI needs for the same, see `comfyui_dora_scale`

    @property
    def rank(self) -> int:
        return len(self.down)

    @property
    def scale(self) -> float:
        return self.alpha / self.rank


@dataclass(frozen=True)
class LokrLayer:
    """The LoKr (2309.14859) of one layer, which adds scale * kron(w1, w2) to its weight [a * b, c * d].

    `factors` are lokr_w1 [a, c] and lokr_w2 [b, d], or in its place lokr_w2_a [b, rank] and lokr_w2_b [rank, d], whose
    product it is.
    """

    factors: Mapping[str, torch.Tensor]
    rank: int
    alpha: float
    magnitude = None  # it is no DoRA

    @property
    def scale(self) -> float:
        return self.alpha / self.rank


AdapterLayer = LoraLayer | LokrLayer


def comfyui_dora_scale(magnitude: torch.Tensor, base_norms: torch.Tensor, merged_norms: torch.Tensor) -> torch.Tensor:
    """A DoRA's magnitudes [out] as ComfyUI reads them [out, 1].

    `base_norms` and `merged_norms` [out] are the norms of the rows of W and of W + scale * up @ down. ComfyUI
    multiplies W + scale * up @ down by dora_scale / base_norms where PEFT multiplies it by magnitude / merged_norms.
    """
    return (magnitude * base_norms / merged_norms)[:, None]


def write_lora(
    path: str | Path,
    layers: Mapping[str, AdapterLayer],
    form: str = "diffusers",
    header: Mapping[str, str] | None = None,
    dtype: torch.dtype | None = None,
    adapter_settings: Mapping[str, object] | None = None,
) -> None:
    """Writes `layers`, converted to `dtype`, to one safetensors file in one of LORA_FORMS. It is written whole or not
    at all.

    diffusers  and comfyui: diffusers' names with the scale inside lora_B and a header that says lora_alpha = r, so
               that readers of the header (diffusers, peft), of tensors named alpha and of neither (ComfyUI, Forge)
               agree. A DoRA has lora_magnitude_vector for diffusers and PEFT and dora_scale for ComfyUI, both in
               float32 whatever the `dtype`: bfloat16 would round away most of what was learned of the magnitudes.
    kohya      the names of kohya's sd-scripts, FLUX.1 only; layers that its authors fused are fused, exactly.

    `header` is added to the file's metadata, to ss_network_dim and ss_network_alpha, which hold the trained rank and
    alpha, and to sshs_model_hash: the SHA-256 of everything after the header. `adapter_settings` are PEFT's settings
    of the layers at scale 1, which the header of diffusers' form holds; by default they are what `adapter_metadata`
    takes from the layers.
    """
    has_lokr = any(isinstance(layer, LokrLayer) for layer in layers.values())
    if form == "kohya" and (has_lokr or any(layer.magnitude is not None for layer in layers.values())):
        raise ValueError("kohya's form has neither DoRA nor LoKr: choose another")
    metadata = {"format": "pt"}
    settings = {(layer.rank, layer.alpha) for layer in layers.values()}
    if len(settings) == 1:
        rank, alpha = settings.pop()
        metadata |= {"ss_network_dim": str(rank), "ss_network_alpha": f"{alpha:g}"}
    if form != "kohya":
        layers = {name: folded(layer, dtype) for name, layer in layers.items()}
        adapter_settings = adapter_settings or adapter_metadata(layers)
        if adapter_settings:
            metadata[LORA_ADAPTER_METADATA_KEY] = json.dumps(adapter_settings, sort_keys=True)
    metadata |= header or {}
    tensors = file_tensors(layers, form)
    if has_lokr:
        tensors[LOKR_MARK] = torch.zeros(1)
    if dtype is not None:
        for key, tensor in tensors.items():
            if not key.endswith((".alpha", *DORA_ENDINGS)):
                tensors[key] = tensor.to(dtype)
    serialized = save(tensors)
    header_size = int.from_bytes(serialized[:8], "little")
    metadata["sshs_model_hash"] = hashlib.sha256(memoryview(serialized)[8 + header_size :]).hexdigest()
    with atomic_write(path) as partial:
        partial.write_bytes(save(tensors, metadata))


def folded(layer: AdapterLayer, dtype: torch.dtype | None = None) -> AdapterLayer:
    """The same adapter with its scale inside `up`, or a LoKr's inside lokr_w1, and alpha = rank.

    They are multiplied in float32 and then converted to `dtype` (None: as they were).
    """
    if isinstance(layer, LokrLayer):
        w1 = layer.factors["lokr_w1"]
        scaled = (w1.float() * layer.scale).to(dtype or w1.dtype)
        return LokrLayer({**layer.factors, "lokr_w1": scaled}, layer.rank, float(layer.rank))
    up = layer.up.float() * layer.scale
    return replace(layer, up=up.to(dtype or layer.up.dtype), alpha=float(layer.rank))


def read_lora(path: str | Path, *, flux: bool = True) -> tuple[dict[str, AdapterLayer], dict[str, str]]:
    """The layers and the header of a FLUX.1 LoRA in any of LORA_FORMS, or in the names of PEFT, OneTrainer or XLabs.
    With `flux` False of another model's, under diffusers' names.

    Of PEFT's adapter_model.safetensors, alpha stands in the adapter_config.json beside it. Raises ValueError for
    tensors that are not part of a LoRA for FLUX.1's transformer and CLIP: they would be lost.
    """
    path = Path(path)
    with safe_open(path, "pt") as file:
        header = file.metadata() or {}
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    adapter_settings = json.loads(header.pop("lora_adapter_metadata", "{}"))
    peft_settings = path.with_name("adapter_config.json")
    if path.name == "adapter_model.safetensors" and peft_settings.exists():
        for key, value in json.loads(peft_settings.read_text()).items():
            adapter_settings |= {f"transformer.{key}": value, f"text_encoder.{key}": value}
    header = {key: value for key, value in header.items() if key not in FILE_HEADER}
    try:
        read_layers = layers_of_file if flux else layers_as_named
        layers: dict[str, AdapterLayer] = {**pop_lokr(tensors, adapter_settings, flux=flux)}
        if tensors or not layers:
            layers |= read_layers(tensors, adapter_settings)
        return layers, header
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def file_tensors(layers: Mapping[str, AdapterLayer], form: str) -> dict[str, torch.Tensor]:
    """The tensors {key: tensor} of a file in one of LORA_FORMS; for all but kohya's, `layers` have scale 1."""
    down_name, up_name = "lora_A", "lora_B"
    if form == "kohya":
        layers = fused_layers(cast(Mapping[str, LoraLayer], layers))
        down_name, up_name = "lora_down", "lora_up"
    tensors = {}
    for name, layer in layers.items():
        if isinstance(layer, LokrLayer):
            for factor, value in layer.factors.items():
                tensors[f"{name}.{factor}"] = value.contiguous()
            continue
        tensors[f"{name}.{down_name}.weight"] = layer.down.contiguous()
        tensors[f"{name}.{up_name}.weight"] = layer.up.contiguous()
        if form == "kohya":
            tensors[f"{name}.alpha"] = torch.tensor(float(layer.alpha))
        if layer.magnitude is not None:
            tensors[f"{name}.lora_magnitude_vector"] = layer.magnitude.float().contiguous()
        if layer.dora_scale is not None:
            tensors[f"{name}.dora_scale"] = swap_comfyui_halves(name, layer.dora_scale.float()).contiguous()
    return tensors


def swap_comfyui_halves(name: str, dora_scale: torch.Tensor) -> torch.Tensor:
    """A `dora_scale` with the rows in the order of ComfyUI's weight, which is that of FLUX.1's authors, or back."""
    return swap_halves(name.removeprefix("transformer."), dora_scale)


def pop_lokr(tensors: dict[str, torch.Tensor], adapter_settings: Mapping, *, flux: bool) -> dict[str, LokrLayer]:
    """The LoKr layers of a file, taken out of its `tensors`; arguments as of `read_lora`. Others stay: layers that are
    several of diffusers', or whose first factor is a product too.

    As other readers have it, a tensor named alpha counts only where the second factor is a product.
    """
    tensors.pop(LOKR_MARK, None)
    layers = {}
    for key in [key for key in tensors if key.endswith(".lokr_w1")]:
        file_name = key.removesuffix(".lokr_w1")
        names = layer_names(file_name) if flux else [file_name]
        found = tuple(factor for factor in LOKR_FACTORS if f"{file_name}.{factor}" in tensors)
        if len(names) != 1 or found not in (LOKR_FACTORS[:2], (LOKR_FACTORS[0], *LOKR_FACTORS[2:])):
            continue
        factors = {factor: tensors.pop(f"{file_name}.{factor}") for factor in found}
        component = names[0].partition(".")[0]
        product = factors.get("lokr_w2_b")
        rank = adapter_settings.get(f"{component}.r", 1) if product is None else len(product)
        alpha = tensors.pop(f"{file_name}.alpha", None)
        if alpha is None:
            alpha = adapter_settings.get(f"{component}.alpha", rank)
        elif product is None:
            alpha = rank
        layers[names[0]] = LokrLayer(factors, rank, float(alpha))
    return layers


def pop_dora(
    tensors: dict[str, torch.Tensor], name: str, layer_name: str
) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """(magnitude, dora_scale) of the layer that a file calls `name`, taken out of its `tensors`.

    A dora_scale alone stays: it means nothing without the model that it was trained on.
    """
    magnitude = tensors.pop(f"{name}.lora_magnitude_vector", None)
    if magnitude is None:
        return None, None
    dora_scale = tensors.pop(f"{name}.dora_scale", None)
    return magnitude, None if dora_scale is None else swap_comfyui_halves(layer_name, dora_scale)


def layers_as_named(tensors: Mapping[str, torch.Tensor], adapter_settings: Mapping) -> dict[str, LoraLayer]:
    """The layers that a file's `tensors` {key: tensor} hold under the names they have in diffusers, of any model.

    `adapter_settings` and errors as in `layers_of_file`.
    """
    unused = dict(tensors)
    layers = {}
    for key in tensors:
        if key.endswith(".lora_A.weight"):
            name = key.removesuffix(".lora_A.weight")
            down = unused.pop(key)
            up = unused.pop(f"{name}.lora_B.weight", None)
            if up is None:
                raise ValueError(f"{key} has no lora_B")
            alpha = unused.pop(f"{name}.alpha", None)
            if alpha is None:
                alpha = alpha_in_header(name, len(down), adapter_settings)
            layers[name] = LoraLayer(down, up, float(alpha), *pop_dora(unused, name, name))
    if unused or not layers:
        raise ValueError(f"not a LoRA in diffusers' form: {', '.join([*unused][:5]) or 'nothing in it'}")
    return layers


def layers_of_file(tensors: Mapping[str, torch.Tensor], adapter_settings: Mapping) -> dict[str, LoraLayer]:
    """The layers that a file's `tensors` {key: tensor} hold; the inverse of `file_tensors`.

    `adapter_settings` is what diffusers keeps in the header, see `adapter_metadata`. Raises ValueError for a tensor
    that belongs to no layer of FLUX.1, and if there is none that does.
    """
    unused = dict(tensors)
    layers = {}
    unknown = []
    for down_ending, up_ending in ENDINGS:
        for key in [key for key in unused if key.endswith(down_ending)]:
            name = key.removesuffix(down_ending)
            down = unused.pop(key)
            up = unused.pop(name + up_ending, None)
            if up is None:
                raise ValueError(f"{key} has no {name + up_ending}")
            alpha = unused.pop(f"{name}.alpha", None)
            names = layer_names(name)
            if not names:
                if up.any():  # else it changes nothing: programs also write what they did not train
                    unknown.append(key)
                continue
            if alpha is None:
                alpha = alpha_in_header(names[0], len(down), adapter_settings)
            layer = LoraLayer(down, up, float(alpha))
            if len(names) == 1:
                magnitude, dora_scale = pop_dora(unused, name, names[0])
                layer = replace(layer, magnitude=magnitude, dora_scale=dora_scale)
            for part_name, part in split_layer(name, layer).items():
                if part_name in layers:
                    raise ValueError(f"{part_name} is in it twice, also as {key}")
                layers[part_name] = part
    unknown += unused
    if unknown or not layers:
        raise ValueError(f"not a LoRA for FLUX.1 in a known form: {describe_tensors(unknown) or 'nothing in it'}")
    return layers


def describe_tensors(keys: Iterable[str]) -> str:
    """Some of the `keys`, each kind with what it is where OTHER_TENSORS knows it, and with their number."""
    kinds: dict[str, list[str]] = {}
    for key in keys:
        kind = next((what for pattern, what in OTHER_TENSORS.items() if re.search(pattern, key)), "")
        kinds.setdefault(kind, []).append(key)
    texts = []
    for kind, found in kinds.items():
        shown = found[:1] if kind else found[:5]
        more = f" and {len(found) - len(shown)} more" if len(found) > len(shown) else ""
        texts.append(", ".join(shown) + more + (f": {kind}" if kind else ""))
    return "; ".join(texts)


def alpha_in_header(name: str, rank: int, adapter_settings: Mapping) -> float:
    """A layer's alpha by the PEFT settings in a header of diffusers; without any it is the rank, a scale of 1."""
    component, _, layer = name.partition(".")
    alpha = adapter_settings.get(f"{component}.lora_alpha", rank)
    alphas = adapter_settings.get(f"{component}.alpha_pattern") or {}  # {end of a layer's name, an expression: alpha}
    for layer_name in (layer.removeprefix("text_model."), layer):  # CLIP's layers have both names
        alpha = alphas.get(get_pattern_key(list(alphas), layer_name), alpha)
    if adapter_settings.get(f"{component}.use_rslora"):  # whose scale is alpha / sqrt(rank)
        alpha *= math.sqrt(rank)
    return alpha


def full_name(name: str) -> str:
    """A layer's name with the level text_model, which transformers 5 dropped and ComfyUI and Forge need."""
    return re.sub(r"^text_encoder\.(?!text_model\.)", "text_encoder.text_model.", name)


def split_number(name: str, separator: str = ".") -> tuple[str, str]:
    """A layer's name with # for the block's number, and the number: ("transformer_blocks.#.norm1.linear", "7").

    The number of a layer outside the blocks is "".
    """
    number = re.search(rf"(?<={re.escape(separator)})\d+(?={re.escape(separator)})", name)
    if number is None:
        return name, ""
    return f"{name[: number.start()]}#{name[number.end() :]}", number[0]


def file_layer(name: str) -> tuple[str, str]:
    """A file's name of a layer as SINGLE_LAYERS and FUSED_LAYERS have it, and the block's number."""
    return split_number(PREFIXES.sub("", name).replace(".", "_"), "_")


def layer_names(name: str) -> list[str]:
    """Our names of the layers that a file's name stands for; none if FLUX.1's transformer and CLIP have none such."""
    file_name, number = file_layer(name)
    if file_name in SINGLE_LAYERS:
        return [SINGLE_LAYERS[file_name].replace("#", number)]
    return [f"transformer.{part.replace('#', number)}" for part in FUSED_LAYERS.get(file_name, ())]


def fused_layers(layers: Mapping[str, LoraLayer]) -> dict[str, LoraLayer]:
    """`layers` under kohya's names, lora_unet_... and lora_te1_..., with the parts of a fused layer fused."""
    renamed = {}
    parts_of: dict[tuple[str, str], dict[str, LoraLayer]] = {}  # (fused name, block number): its parts
    for name, layer in layers.items():
        component, _, rest = name.partition(".")
        if component == "transformer":
            part, number = split_number(rest)
            parts_of.setdefault((FUSED_NAMES[part], number), {})[part] = layer
        else:
            renamed[f"lora_te1_{rest.replace('.', '_')}"] = layer
    for (fused_name, number), parts in parts_of.items():
        kohya_name = f"lora_unet_{fused_name.replace('.', '_').replace('#', number)}"
        renamed[kohya_name] = fuse(parts, FLUX_LAYERS[fused_name])
    return renamed


def fuse(parts: Mapping[str, LoraLayer], names: Iterable[str]) -> LoraLayer:
    """One LoRA for a fused layer whose rows are the outputs of the layers `names`, exactly equal to their LoRAs.

    With two parts of ranks r1 and r2, the fused rank is r1 + r2:

        down = [ down1 ]      up = [ up1   0  ]      up @ down = [ up1 @ down1 ]
               [ down2 ]           [  0   up2 ]                  [ up2 @ down2 ]

    Rows of a layer that has no LoRA are zero. One alpha serves all parts if their scales are equal; otherwise each
    part's scale goes into its up, and the fused scale is 1.
    """
    present = [name for name in names if name in parts]
    down = torch.cat([parts[name].down for name in present])
    scales = {layer.scale for layer in parts.values()}
    width = down.shape[1]
    rows = {name: width * (4 if "mlp" in name else 1) for name in names}  # of a layer without a LoRA
    rows |= {name: len(layer.up) for name, layer in parts.items()}

    up = down.new_zeros(sum(rows.values()), len(down))
    row = 0
    column = 0
    for name in names:
        if name in parts:
            layer = parts[name]
            part_up = swap_halves(name, layer.up)
            if len(scales) > 1:
                part_up = part_up * layer.scale
            up[row : row + rows[name], column : column + layer.rank] = part_up
            column += layer.rank
        row += rows[name]
    fused_scale = scales.pop() if len(scales) == 1 else 1.0
    return LoraLayer(down, up, len(down) * fused_scale)


def split_layer(name: str, layer: LoraLayer) -> dict[str, LoraLayer]:
    """The layers that a layer of a file stands for: itself under our name, or the parts of a fused one.

    Undoes `fuse` exactly. A fused layer that was trained as one shares its down among the parts.
    """
    names = layer_names(name)
    file_name, _ = file_layer(name)
    if file_name in SINGLE_LAYERS:
        return {names[0]: layer}
    parts = FUSED_LAYERS[file_name]
    ups = {}
    for part_name, part, rows in zip(
        names, parts, split_rows(layer.up, parts, width=layer.down.shape[1]), strict=True
    ):
        ups[part_name] = swap_halves(part, rows)
    columns = block_columns(list(ups.values()))
    split = {}
    if columns is None:
        for part_name, up in ups.items():
            split[part_name] = LoraLayer(layer.down.clone(), up.clone(), layer.alpha)
        return split
    for (part_name, up), is_own in zip(ups.items(), columns, strict=True):
        part_rank = int(is_own.sum())
        if part_rank > 0:
            split[part_name] = LoraLayer(layer.down[is_own], up[:, is_own], layer.scale * part_rank)
    return split


def block_columns(ups: list[torch.Tensor]) -> list[torch.Tensor] | None:
    """For each part's rows `ups` [out, R] of a fused up, which columns [R], bool, are its own; None if the parts share
    columns, so that the fused up is not block diagonal."""
    rank = ups[0].shape[1]
    if rank % len(ups) == 0:  # parts of equal rank: their columns are known even where they are zero
        part_of_column = torch.arange(rank) * len(ups) // rank
        columns = [part_of_column == i for i in range(len(ups))]
        if not any(up[:, ~own].any() for up, own in zip(ups, columns, strict=True)):
            return columns
    columns = [up.any(dim=0) for up in ups]
    parts_using = torch.stack(columns).sum(dim=0)
    return None if parts_using.max() > 1 else columns


def split_rows(rows: torch.Tensor, parts: tuple[str, ...], width: int) -> tuple[torch.Tensor, ...]:
    """The rows of a fused tensor [out, ...] that belong to each of `parts`, in a transformer of this width.

    Equally many each; in single_blocks.#.linear1 the MLP has what query, key and value leave.
    """
    sizes = [len(rows) // len(parts)] * len(parts)
    if len(parts) == 4:
        sizes = [width, width, width, len(rows) - 3 * width]
    return rows.split(sizes)


def swap_halves(name: str, rows: torch.Tensor) -> torch.Tensor:
    """Rows (shift, scale), as FLUX.1's authors order norm_out.linear, to diffusers' (scale, shift), or back.

    Rows of all other layers are returned as they are.
    """
    if name != "norm_out.linear":
        return rows
    first, second = rows.chunk(2)
    return torch.cat([second, first])


def diffusers_state_dict(state_dict: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The weights of FLUX.1's transformer, as its authors publish them, under the names of FluxTransformer2DModel.

    diffusers' own converter assumes a width of 3072; this one takes any.
    """
    width = len(state_dict["img_in.bias"])
    converted = {}
    for key, value in state_dict.items():
        name, _, parameter = key.rpartition(".")  # weight, bias, or scale, which diffusers calls weight
        fused_name, number = split_number(name)
        parts = FLUX_LAYERS[fused_name]
        for part, rows in zip(parts, split_rows(value, parts, width), strict=True):
            part_name = part.replace("#", number)
            converted[f"{part_name}.{parameter.replace('scale', 'weight')}"] = swap_halves(part, rows)
    return converted


def adapter_metadata(layers: Mapping[str, AdapterLayer]) -> dict[str, object]:
    """PEFT's settings for `layers` of scale 1, as diffusers keeps them in a header: {"transformer.r": 4, ...}."""
    by_component: dict[str, dict[str, AdapterLayer]] = {}
    for name, layer in layers.items():
        component, _, rest = name.partition(".")
        by_component.setdefault(component, {})[rest] = layer
    metadata = {}
    for component, own in by_component.items():
        rank = Counter(layer.rank for layer in own.values()).most_common(1)[0][0]
        other_ranks = {}  # {a pattern of this name alone, as PEFT matches it: rank}
        for name, layer in own.items():
            if layer.rank != rank:
                pattern = name.removeprefix("text_model.") if component == "text_encoder" else f"^{name}"
                other_ranks[pattern] = layer.rank
        targets = set(own)
        if component == "text_encoder":  # by their last names: transformers 5 has no level text_model
            targets = {name.rpartition(".")[2] for name in own}
        metadata[f"{component}.r"] = rank
        metadata[f"{component}.lora_alpha"] = rank
        metadata[f"{component}.target_modules"] = sorted(targets)
        if any(layer.magnitude is not None for layer in own.values()):
            metadata[f"{component}.use_dora"] = True
        if other_ranks:
            metadata[f"{component}.rank_pattern"] = other_ranks
            metadata[f"{component}.alpha_pattern"] = other_ranks
    return metadata
