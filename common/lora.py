"""LoRA adapters: which layers get one, adding them, saving and loading them."""

import argparse
import functools
import json
import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any, cast

from common.block_swap import readable
from common.checkpoints import (
    TENSORS_FILES,
    find_checkpoints,
    read_json,
    register_sharded_checkpointing,
    register_tensor_checkpointing,
)
from common.lora_formats import (
    LOKR_FACTORS,
    AdapterLayer,
    LokrLayer,
    LoraLayer,
    comfyui_dora_scale,
    full_name,
    read_lora,
    write_lora,
)
from common.models import full_tensor, is_sharded, reshard, writes_files

import peft
import torch
from accelerate import Accelerator
from diffusers.loaders.lora_base import LORA_ADAPTER_METADATA_KEY, LORA_WEIGHT_NAME_SAFE
from diffusers.training_utils import EMAModel, cast_training_params
from peft import LoKrConfig, LoraConfig, get_peft_model_state_dict, set_peft_model_state_dict
from peft.tuners.lokr.layer import factorization
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import ModulesToSaveWrapper
from peft.utils.integrations import dequantize_module_weight
from safetensors import safe_open
from safetensors.torch import load_file, save_file


FLUX_TARGET_MODULES = (
    "attn.to_k",
    "attn.to_q",
    "attn.to_v",
    "attn.to_out.0",
    "attn.add_k_proj",
    "attn.add_q_proj",
    "attn.add_v_proj",
    "attn.to_add_out",
    "ff.net.0.proj",
    "ff.net.2",
    "ff_context.net.0.proj",
    "ff_context.net.2",
)

RESUME_PREFIX = "resume_"  # of the files in checkpoints that runs continue from

# Embeddings are no part of an adapter; left to itself, PEFT asks the Hub whether they are
peft_state_dict = functools.partial(get_peft_model_state_dict, save_embedding_layers=False)

TargetModules = str | Sequence[str]  # a regular expression, or names of layers or ends of such names


def target_layers(model: torch.nn.Module, target_modules: TargetModules) -> list[tuple[str, torch.nn.Linear]]:
    """(name, module) of the linear layers that an adapter for `target_modules` is added to.

    `target_modules` are names of layers or ends of such names, or one regular expression that matches whole names.
    """
    layers = []
    for name, module in model.named_modules():
        name = name.removesuffix(".base_layer")  # where an adapter wraps the layer already
        if isinstance(module, torch.nn.Linear) and ".lora_" not in name and is_target(name, target_modules):
            layers.append((name, module))
    return layers


def is_target(name: str, target_modules: TargetModules) -> bool:
    """Whether `target_modules` name this layer, as PEFT matches them."""
    if isinstance(target_modules, str):
        return re.fullmatch(target_modules, name) is not None
    return any(name == target or name.endswith(f".{target}") for target in target_modules)


def block_layers(transformer: torch.nn.Module) -> list[str]:
    """The names of all linear layers in a transformer's blocks."""
    layers = []
    for name, module in transformer.named_modules():
        if isinstance(module, torch.nn.Linear) and "transformer_blocks." in name:
            layers.append(name)
    return layers


def unknown_layers(model: torch.nn.Module, target_modules: TargetModules) -> list[str]:
    """The `target_modules` that no linear layer of the model has."""
    if isinstance(target_modules, str):
        return [] if target_layers(model, target_modules) else [target_modules]
    return [target for target in target_modules if not target_layers(model, [target])]


def add_lora(
    model: torch.nn.Module,
    *,
    rank: int,
    alpha: float,
    dropout: float,
    target_modules: TargetModules,
    use_rslora: bool = False,
    init_lora_weights: str = "gaussian",
    modules_to_save: list[str] | None = None,
    use_dora: bool = False,
    lokr_factor: int | None = None,
    adapter_name: str = "default",
) -> list[torch.nn.Parameter]:
    """Adds a LoRA adapter to a frozen model and returns its parameters, in float32 whatever the model's dtype.

    `target_modules` are names of modules or ends of such names, or a regular expression, as in `LoraConfig`; raises
    ValueError for those that no linear layer has. The scale is alpha / rank, with `use_rslora` alpha / sqrt(rank).
    `init_lora_weights` is one of INITIALIZATIONS. `modules_to_save` are modules trained as a whole, of which the
    adapter holds copies; what they become in its file the caller says, see `save_lora`. `use_dora` adds the trained
    magnitudes of DoRA (2402.09353), one for each row of a weight. With a `lokr_factor` it is a LoKr (2309.14859),
    without dropout, whose first Kronecker factor has about so many rows and columns, with -1 about the square root of
    the layer's. Adapters added before stay trainable.
    """
    unknown = unknown_layers(model, target_modules)
    if unknown:
        raise ValueError(f"no linear layer of {type(model).__name__} is named {', '.join(unknown)}")
    config = LoraConfig(
        r=rank,
        lora_alpha=alpha,  # type: ignore[arg-type]  # a float works as well
        lora_dropout=dropout,
        use_rslora=use_rslora,
        init_lora_weights=True if init_lora_weights == "default" else init_lora_weights,  # type: ignore[arg-type]
        target_modules=target_modules if isinstance(target_modules, str) else list(target_modules),
        modules_to_save=modules_to_save,
        use_dora=use_dora,
    )
    if lokr_factor is not None:
        config = LoKrConfig(
            r=rank,
            alpha=alpha,  # type: ignore[arg-type]
            decompose_factor=lokr_factor,
            init_weights="lycoris",  # the second factor is 0, not the first
            target_modules=target_modules if isinstance(target_modules, str) else list(target_modules),
        )
    earlier = [p for name, p in model.named_parameters() if p.requires_grad and re.search(r"\.lora_|\.lokr_", name)]
    model.add_adapter(config, adapter_name)  # type: ignore[operator]  # freezes all other adapters
    cast_training_params(model, dtype=torch.float32)  # bfloat16 would lose small updates to rounding
    if use_dora:
        set_magnitudes(model, adapter_name)
    added = [parameter for parameter in model.parameters() if parameter.requires_grad]
    for parameter in earlier:
        parameter.requires_grad_(True)
    return added


@contextmanager
def without_adapters(*models: torch.nn.Module) -> Iterator[None]:
    """Models compute what they did before adapters were added, and before modules were trained as a whole."""
    wrappers = (BaseTunerLayer, ModulesToSaveWrapper)
    layers = [module for model in models for module in model.modules() if isinstance(module, wrappers)]
    for layer in layers:
        layer.enable_adapters(False)
    try:
        yield
    finally:
        for layer in layers:
            layer.enable_adapters(True)


def adapter_kind(args: argparse.Namespace) -> str:
    """What a run's flags make: "LoRA", "DoRA" or "LoKr"."""
    if args.lora_type == "lokr":
        return "LoKr"
    return "DoRA" if args.use_dora else "LoRA"


def adapter_options(args: argparse.Namespace) -> dict[str, Any]:
    """The kind of a run's adapter as `add_lora` and `check_lora_file` take it."""
    lokr_factor = None
    if args.lora_type == "lokr":
        lokr_factor = args.lokr_factor or -1
    return {"use_dora": args.use_dora, "lokr_factor": lokr_factor}


def adapter_size(args: argparse.Namespace, layer: torch.nn.Linear) -> int:
    """How many numbers a run's adapter trains of a layer."""
    out_features, in_features = layer.out_features, layer.in_features
    if args.lora_type == "lokr":
        shapes = lokr_shapes(out_features, in_features, args.rank, args.lokr_factor or -1)
        return sum(math.prod(shape) for shape in shapes.values())
    size = args.rank * (out_features + in_features)
    return size + out_features if args.use_dora else size


def lokr_shapes(out_features: int, in_features: int, rank: int, factor: int) -> dict[str, tuple[int, ...]]:
    """{name: shape} of a layer's LoKr factors, as PEFT makes them: the second is a product where that is smaller."""
    a, b = factorization(out_features, factor)
    c, d = factorization(in_features, factor)
    if rank >= max(b, d) / 2:
        return {"lokr_w1": (a, c), "lokr_w2": (b, d)}
    return {"lokr_w1": (a, c), "lokr_w2_a": (b, rank), "lokr_w2_b": (rank, d)}


def check_adapter(args: argparse.Namespace) -> list[str]:
    """Problems of the flags that choose the kind of adapter."""
    if args.lora_type == "lokr":
        problems = []
        if args.use_dora:
            problems.append("--use_dora is of a LoRA: leave out it or --lora_type lokr")
        if args.use_rslora:
            problems.append("--use_rslora has no effect on --lora_type lokr: leave it out")
        if args.init_lora_weights != "gaussian":
            problems.append(
                f"--init_lora_weights {args.init_lora_weights} has no effect on --lora_type lokr: leave it out"
            )
        if args.lora_dropout:
            problems.append(f"--lora_dropout {args.lora_dropout:g} has no effect on --lora_type lokr: leave it out")
        if args.quantize_base != "none":
            problems.append(
                f"--quantize_base {args.quantize_base}: PEFT's LoKr takes no quantized layers, leave out it or "
                "--lora_type lokr"
            )
        return problems
    if args.use_dora and args.quantize_base in ("int8", "fp8"):
        return [
            f"--use_dora needs the norms of weights, which PEFT does not read from {args.quantize_base}: use "
            "--quantize_base nf4"
        ]
    return []


def dora_norms(layer: Any, adapter_name: str = "default") -> tuple[torch.Tensor, torch.Tensor]:
    """The norms [out], in float32, of the rows of a layer's frozen weight W and of W + scale * B A of its adapter.

    Of a sharded model only if all processes ask for them.
    """
    base_layer = layer.get_base_layer()
    with readable(base_layer.weight):
        weight = full_tensor(dequantize_module_weight(base_layer)).float()
    down = full_tensor(layer.lora_A[adapter_name].weight).float()
    up = full_tensor(layer.lora_B[adapter_name].weight).float()
    merged = weight + layer.scaling[adapter_name] * (up @ down)
    return weight.norm(dim=1), merged.norm(dim=1)


def set_magnitudes(
    model: torch.nn.Module, adapter_name: str = "default", magnitudes: Mapping[str, torch.Tensor] | None = None
) -> None:
    """Sets a DoRA's magnitudes to `magnitudes` {layer name: [out]}, of other layers to the norms of W + scale * B A.

    At the latter, the adapter is a plain LoRA. PEFT sets them too, of a bfloat16 weight rounded to it.
    """
    for name, module in model.named_modules():
        vectors = getattr(module, "lora_magnitude_vector", {})
        if adapter_name in vectors:
            magnitude = (magnitudes or {}).get(name)
            if magnitude is None:
                magnitude = dora_norms(module, adapter_name)[1]
            vectors[adapter_name].weight.data = magnitude.to(vectors[adapter_name].weight.device, torch.float32)


@contextmanager
def scaled_adapters(model: torch.nn.Module, scale: float) -> Iterator[None]:
    """The model's adapters count `scale` times as much as they are trained to."""
    layers: list[Any] = []
    if scale != 1:
        layers = [module for module in model.modules() if isinstance(module, BaseTunerLayer)]
    scalings = [dict(layer.scaling) for layer in layers]
    for layer, scaling in zip(layers, scalings, strict=True):
        layer.scaling.update({name: scale * value for name, value in scaling.items()})
    try:
        yield
    finally:
        for layer, scaling in zip(layers, scalings, strict=True):
            layer.scaling.update(scaling)


def adapter_config(model: torch.nn.Module, adapter_name: str = "default") -> LoraConfig:
    """The settings of an adapter: its rank, alpha and target modules."""
    return model.peft_config[adapter_name]  # type: ignore[index]


def adapter_alpha(config: LoraConfig | LoKrConfig) -> float:
    """The alpha by which alpha / r is the scale of a LoRA or a LoKr, as files have it."""
    if isinstance(config, LoKrConfig):
        return float(config.alpha)
    return config.lora_alpha * math.sqrt(config.r) if config.use_rslora else float(config.lora_alpha)


def adapter_settings(modules: Mapping[str, torch.nn.Module], adapter_name: str = "default") -> dict[str, Any]:
    """PEFT's settings of an adapter of {"transformer": model, ...}, as diffusers keeps them in a header:
    {"transformer.r": 4, ...}."""
    settings = {}
    for component, model in modules.items():
        for key, value in adapter_config(model, adapter_name).to_dict().items():
            settings[f"{component}.{key}"] = sorted(value) if isinstance(value, set) else value
    return settings


def adapter_weights(model: torch.nn.Module, adapter_name: str = "default") -> dict[str, torch.Tensor]:
    """An adapter's weights {name: tensor}, in full; of a sharded model only if all processes ask for them."""
    state_dict = {}
    for name, value in model.state_dict(keep_vars=True).items():
        trained = value.requires_grad  # frozen weights are not gathered
        state_dict[name] = full_tensor(value) if trained else value.detach()
    return peft_state_dict(model, state_dict, adapter_name)


def lora_file(output_dir: Path, output_name: str | None, epoch: int | None = None) -> Path:
    """The file of a run's LoRA: in its folder, or with --output_name beside it; with an epoch that of this epoch."""
    if not output_name:
        return output_dir / LORA_WEIGHT_NAME_SAFE
    suffix = "" if epoch is None else f"-{epoch:06d}"
    return output_dir.with_name(f"{output_name}{suffix}.safetensors")


def lora_layers(modules: Mapping[str, torch.nn.Module], adapter_name: str = "default") -> dict[str, AdapterLayer]:
    """An adapter of {"transformer": model, "text_encoder": model}, on the CPU: {layer name: AdapterLayer}."""
    layers: dict[str, AdapterLayer] = {}
    for component, model in modules.items():
        weights = adapter_weights(model, adapter_name)
        config = adapter_config(model, adapter_name)
        alpha = adapter_alpha(config)
        for key, value in weights.items():
            if key.endswith(".lora_A.weight"):
                name = full_name(f"{component}.{key.removesuffix('.lora_A.weight')}")
                up = weights[key.replace("lora_A", "lora_B")]
                magnitude = weights.get(key.replace("lora_A.weight", "lora_magnitude_vector"))
                dora_scale = None
                if magnitude is not None:
                    module = model.get_submodule(key.removesuffix(".lora_A.weight"))
                    dora_scale = comfyui_dora_scale(magnitude, *dora_norms(module, adapter_name)).cpu()
                    magnitude = magnitude.cpu()
                layers[name] = LoraLayer(value.cpu(), up.cpu(), alpha, magnitude, dora_scale)
            elif key.endswith(".lokr_w1"):
                layer_name = key.removesuffix(".lokr_w1")
                factors = {}
                for factor in LOKR_FACTORS:
                    if f"{layer_name}.{factor}" in weights:
                        factors[factor] = weights[f"{layer_name}.{factor}"].cpu()
                layers[f"{component}.{layer_name}"] = LokrLayer(factors, config.r, alpha)
    return layers


def save_lora(
    directory: str | Path,
    modules: Mapping[str, torch.nn.Module],
    dtype: torch.dtype = torch.float32,
    *,
    adapter_name: str = "default",
    weight_name: str = LORA_WEIGHT_NAME_SAFE,
    form: str = "diffusers",
    header: Mapping[str, str] | None = None,
    more_layers: Mapping[str, LoraLayer] | None = None,
    writes: bool = True,
) -> None:
    """Writes an adapter of {"transformer": model, ...} as directory/weight_name, see `write_lora`, with `header`.

    `more_layers` {layer name: LoraLayer} are written beside the adapter's: what was trained otherwise, as a LoRA.
    All processes call it, those that have `writes` write, see `writes_files`.
    """
    if not modules:
        return
    layers = lora_layers(modules, adapter_name)
    if not writes:
        return
    settings = None
    if more_layers:
        config = adapter_config(next(iter(modules.values())), adapter_name)
        trained = {"ss_network_dim": str(config.r), "ss_network_alpha": f"{adapter_alpha(config):g}"}
        header = trained | dict(header or {})
        layers |= more_layers
    else:
        settings = adapter_settings(modules, adapter_name)
        for component in modules:
            alpha = "alpha" if f"{component}.alpha" in settings else "lora_alpha"  # of a LoKr or a LoRA
            settings[f"{component}.{alpha}"] = settings[f"{component}.r"]  # the scale is in the tensors
            if f"{component}.use_rslora" in settings:
                settings[f"{component}.use_rslora"] = False
    write_lora(Path(directory) / weight_name, layers, form, header, dtype, settings)


def save_exact_lora(
    path: str | Path, modules: Mapping[str, torch.nn.Module], *, adapter_name: str = "default"
) -> None:
    """Writes an adapter's weights as they are in training, without their scale, for `load_lora`.

    Its r and lora_alpha stand in the header, so that readers of the header apply the file at its strength.
    """
    tensors = {}
    for component, model in modules.items():
        for key, value in adapter_weights(model, adapter_name).items():
            tensors[f"{component}.{key}"] = value.cpu().contiguous()
    settings = adapter_settings(modules, adapter_name)
    save_file(tensors, path, {"format": "pt", LORA_ADAPTER_METADATA_KEY: json.dumps(settings, sort_keys=True)})


def load_lora(path: str | Path, modules: Mapping[str, torch.nn.Module], *, adapter_name: str = "default") -> None:
    """Loads what `save_exact_lora` wrote back into an adapter of {"transformer": model, ...}.

    Raises ValueError if the file's keys are not exactly those of the adapter.
    """
    state_dict = load_file(path)
    for name, model in modules.items():
        prefix = f"{name}."
        weights = {key.removeprefix(prefix): value for key, value in state_dict.items() if key.startswith(prefix)}
        if weights.keys() != peft_state_dict(model, adapter_name=adapter_name).keys():
            raise ValueError(f"the LoRA in {path} was made for other layers of the {name} than this run trains")
        load_weights(model, weights, adapter_name)
    unused = [key for key in state_dict if key.partition(".")[0] not in modules]
    if unused:
        raise ValueError(f"the LoRA in {path} holds layers this run does not train: {', '.join(unused)}")


def layer_shapes(component: str, model: torch.nn.Module, target_modules: TargetModules) -> dict[str, tuple[int, int]]:
    """{name in a LoRA file: (out, in)} of the layers of "transformer" or "text_encoder" that get an adapter."""
    shapes = {}
    for name, layer in target_layers(model, target_modules):
        shapes[full_name(f"{component}.{name}")] = (layer.out_features, layer.in_features)
    return shapes


def check_lora_file(
    path: Path,
    shapes: Mapping[str, tuple[int, int]],
    rank: int,
    *,
    use_dora: bool = False,
    lokr_factor: int | None = None,
    flux: bool = True,
) -> list[str]:
    """Problems of a LoRA, see `lora_in`, given as --lora_path to a run with adapters of `rank` on the layers
    {name: (out, in)}, of the kind that `use_dora` and `lokr_factor` say, see `add_lora`; `flux` as in `read_lora`."""
    try:
        layers, _ = read_lora(lora_in(path), flux=flux)
        ranks = set()
        found_shapes: dict[str, Any] = {}
        for name, layer in layers.items():
            if isinstance(layer, LokrLayer):
                found_shapes[name] = {factor: tuple(value.shape) for factor, value in layer.factors.items()}
            else:
                found_shapes[name] = (len(layer.up), layer.down.shape[1])
            if not (isinstance(layer, LokrLayer) and "lokr_w2" in layer.factors):  # which has no rank
                ranks.add(layer.rank)
    except Exception as error:  # a damaged file can raise anything
        return [f"--lora_path {path}: not a readable LoRA file ({error})"]
    if ranks - {rank}:
        found = ", ".join(map(str, sorted(ranks)))
        remedy = f"give --rank {found}" if len(ranks) == 1 else "one rank for all layers is needed"
        return [f"--lora_path {path} has rank {found}: --rank is {rank}, {remedy}"]
    has_lokr = any(isinstance(layer, LokrLayer) for layer in layers.values())
    found = "LoKr" if has_lokr else "LoRA"
    if has_lokr != (lokr_factor is not None):
        return [f"--lora_path {path}: a {found}, which needs --lora_type {found.lower()}"]
    expected_shapes: dict[str, Any] = dict(shapes)
    if lokr_factor is not None:
        for name, (out_features, in_features) in shapes.items():
            if name.startswith("transformer."):  # CLIP has a LoRA
                expected_shapes[name] = lokr_shapes(out_features, in_features, rank, lokr_factor)
        if found_shapes.keys() == expected_shapes.keys() and found_shapes != expected_shapes:
            factor = f"--lokr_factor {lokr_factor}" if lokr_factor > 0 else "no --lokr_factor"
            return [f"--lora_path {path}: a LoKr of other factors than --rank {rank} and {factor} make"]
    if found_shapes != expected_shapes:
        names = {*found_shapes, *expected_shapes}
        different = [name for name in names if found_shapes.get(name) != expected_shapes.get(name)]
        return [f"--lora_path {path}: made for other layers than this run trains, such as {min(different)}"]
    with_magnitudes = [name for name, layer in layers.items() if layer.magnitude is not None]
    if with_magnitudes and not use_dora:
        return [f"--lora_path {path}: a DoRA, which needs --use_dora"]
    of_clip = [name for name in with_magnitudes if name.startswith("text_encoder.")]
    if of_clip:
        return [f"--lora_path {path}: a DoRA of CLIP, such as {of_clip[0]}, whose adapter is a LoRA here"]
    dtypes = set()
    for layer in layers.values():
        tensors = layer.factors.values() if isinstance(layer, LokrLayer) else (layer.down, layer.up)
        dtypes |= {tensor.dtype for tensor in tensors}
    unusual = sorted(str(dtype) for dtype in dtypes - {torch.float64, torch.float32, torch.float16, torch.bfloat16})
    if unusual:
        return [f"--lora_path {path}: its numbers are {', '.join(unusual)}, not float32, float16 or bfloat16"]
    return []


def start_from_lora(
    path: Path, modules: Mapping[str, torch.nn.Module], *, adapter_name: str = "default", flux: bool = True
) -> None:
    """Loads a LoRA, see `lora_in`, into an adapter of {"transformer": model, ...}, in any form that `read_lora`
    understands and at the file's strength: its scale is divided by the adapter's own."""
    layers: dict[str, Any] = read_lora(lora_in(path), flux=flux)[0]
    for component, model in modules.items():
        config = adapter_config(model, adapter_name)
        weights = {}
        magnitudes = {}
        alpha = adapter_alpha(config)
        for key in peft_state_dict(model, adapter_name=adapter_name):
            if key.endswith(".lora_A.weight"):
                layer = layers[full_name(f"{component}.{key.removesuffix('.lora_A.weight')}")]
                weights[key] = layer.down.float()
                up = layer.up.float() * (layer.scale * config.r / alpha)
                weights[key.replace("lora_A", "lora_B")] = up
                if layer.magnitude is not None:
                    magnitudes[key.removesuffix(".lora_A.weight")] = layer.magnitude
            elif key.endswith(".lokr_w1"):
                layer_name = key.removesuffix(".lokr_w1")
                layer = layers[f"{component}.{layer_name}"]
                for factor, value in layer.factors.items():
                    weights[f"{layer_name}.{factor}"] = value.float()
                weights[key] *= layer.scale * config.r / alpha
        load_weights(model, weights, adapter_name)
        set_magnitudes(model, adapter_name, magnitudes)


def load_weights(model: torch.nn.Module, weights: dict[str, torch.Tensor], adapter_name: str) -> None:
    """Loads an adapter's weights, by the names of `peft_state_dict`; RuntimeError if PEFT does not take them all."""
    ignored = set_peft_model_state_dict(model, weights, adapter_name=adapter_name).unexpected_keys
    if ignored:
        raise RuntimeError(
            f"peft {peft.__version__} did not load {len(ignored)} tensors, such as {ignored[0]}: install the version "
            "that requirements.txt names"
        )


def check_applied(path: Path, models: Iterable[torch.nn.Module | None], *, adapter_name: str | None = None) -> None:
    """Raises ValueError if the models, into which a LoRA file was loaded, did not take all its layers: what they draw
    would be that of another LoRA. `adapter_name` None: they have no other adapter."""
    with safe_open(path, "pt") as file:
        keys = list(file.keys())
    layers = [key for key in keys if re.search(r"lora_A|lora_down|lora\.down|\.lokr_w1$", key)]
    taken = 0
    for model in models:
        for module in model.modules() if model is not None else ():
            adapters = getattr(module, "lora_A", None) or getattr(module, "lokr_w1", {})
            taken += adapter_name in adapters if adapter_name else len(adapters) > 0
    if not taken:
        raise ValueError("it holds no layer of this model")
    if taken < len(layers):
        raise ValueError(f"this model has {taken} of its {len(layers)} layers: it was made for another one")


def find_lora(path: str | Path) -> tuple[Path, Path | None]:
    """(the LoRA file that `path` means, the run's folder, which holds args.json; None for a file without a run).

    `path` is a run's folder, a checkpoint-N of it, or the file itself. The file of a folder is the one that args.json
    names (--output_name NAME: NAME.safetensors beside the folder or, downloaded from the Hub, in it), else
    pytorch_lora_weights.safetensors, else the only other LoRA there.

    Raises FileNotFoundError if there is none and ValueError if there are several or the file is damaged, so that
    nobody draws with the base model unawares.
    """
    found = Path(path).absolute()  # a file is not resolved: in the Hub's cache it is a link to one without a suffix
    if not found.exists():
        raise FileNotFoundError(f"{path}: no such file or folder")
    if found.is_dir():
        found = found.resolve()
    if found.is_file() and found.name.startswith(RESUME_PREFIX):
        result = found.name.removeprefix(RESUME_PREFIX)
        raise ValueError(f"{path}: weights that a run resumes from; {result} beside it is the one to draw with")
    lora = found if found.is_file() else lora_of_folder(found)
    try:
        with safe_open(lora, "pt") as file:
            keys = list(file.keys())
    except Exception as error:  # safetensors raises a kind of its own beside OSError
        raise ValueError(f"{lora}: not a readable LoRA file ({error})") from None
    if not any("lora" in key.lower() for key in keys):
        raise ValueError(f"{lora}: holds no LoRA")
    return lora, run_of(lora) if found.is_file() else run_of(found / lora.name)


def lora_in(path: Path) -> Path:
    """The LoRA file at `path`, or of the run's folder or checkpoint that it is; raises as `find_lora` does."""
    return lora_of_folder(path.resolve()) if path.is_dir() else path


def lora_of_folder(folder: Path) -> Path:
    """The LoRA file of a run's folder or a checkpoint, see `find_lora`."""
    args = read_json(folder / "args.json").get("args")
    name = args.get("output_name") if isinstance(args, dict) else None
    wanted = [folder / LORA_WEIGHT_NAME_SAFE]
    if name:
        wanted = [folder.with_name(f"{name}.safetensors"), folder / f"{name}.safetensors"]
    for file in wanted:
        if file.is_file():
            return file
    others = sorted(folder.glob("*.safetensors"))
    others = [file for file in others if not TENSORS_FILES.fullmatch(file.name) and not file.stem.endswith("_emb")]
    others = [file for file in others if not file.name.startswith(RESUME_PREFIX)]
    if len(others) == 1 and not name:
        return others[0]
    if others:
        names = ", ".join(file.name for file in others)
        raise ValueError(f"{folder}: no {wanted[0].name}; name one of the files in it: {names}")
    checkpoints = find_checkpoints(folder)
    hint = f"; {checkpoints[-1]} is its last checkpoint" if checkpoints else ""
    raise FileNotFoundError(f"{wanted[0]}: no such file, so {folder} has no LoRA{hint}")


def run_of(lora: Path) -> Path | None:
    """The folder with args.json of the run that wrote a file: NAME/ beside NAME.safetensors or NAME-000010.safetensors
    (an epoch's), the file's own, or the one above a checkpoint's or a step's; None if there is none."""
    without_epoch = re.sub(r"-\d{6}$", "", lora.stem)
    folders = [lora.with_name(lora.stem), lora.with_name(without_epoch), lora.parent]
    if lora.parent.name.startswith(("checkpoint-", "step-")):
        folders.append(lora.parent.parent)
    for folder in folders:
        if (folder / "args.json").is_file():
            return folder
    return None


def register_lora_checkpointing(
    accelerator: Accelerator,
    modules: dict[str, torch.nn.Module],
    optimizer: torch.optim.Optimizer,
    files: dict[str, str] | None = None,
    *,
    dtype: torch.dtype = torch.float32,
    header: Callable[[str], Mapping[str, str]] | None = None,
    result_weights: Callable[[], AbstractContextManager] = nullcontext,
    teacher: Mapping[str, torch.Tensor] | None = None,
    more_layers: Callable[[], Mapping[str, LoraLayer]] = dict,
) -> None:
    """Makes checkpoints hold the adapters of {"transformer": model, ...} alone, not the frozen models around them.

    Of each of `files` {adapter name: file name}, one named "default" without, there are two: the file itself, which
    is what `save_lora` would write as the result at that step, in `dtype`, with `header(adapter name)` and
    `more_layers()`, within `result_weights()`, though always in diffusers' form; and RESUME_PREFIX + file name, the
    weights as they are in training, to resume from. `teacher` {name: tensor} is saved with the second. Where the
    transformer is split over the processes, each saves its part of these and of the optimizer instead.
    `modules` may be empty (DreamBooth's textual inversion alone): then checkpoints hold no models.
    """
    files = files or {"default": LORA_WEIGHT_NAME_SAFE}
    transformer = modules.get("transformer")

    def save_results(models: list, weights: list, output_dir: str) -> None:
        with result_weights():
            for adapter_name, weight_name in files.items():
                save_lora(
                    output_dir,
                    modules,
                    dtype,
                    adapter_name=adapter_name,
                    weight_name=weight_name,
                    header=header(adapter_name) if header else None,
                    more_layers=more_layers(),
                    writes=writes_files(accelerator),
                )

    accelerator.register_save_state_pre_hook(save_results)
    if transformer is not None and is_sharded(transformer):
        register_sharded_checkpointing(accelerator, transformer, optimizer, teacher)
        return
    register_tensor_checkpointing(accelerator, {"teacher": teacher or {}})

    def save(models: list, weights: list, output_dir: str) -> None:
        weights.clear()  # accelerate would save the whole models too
        if modules and writes_files(accelerator):
            for adapter_name, weight_name in files.items():
                save_exact_lora(Path(output_dir) / (RESUME_PREFIX + weight_name), modules, adapter_name=adapter_name)

    def load(models: list, input_dir: str) -> None:
        models.clear()
        for adapter_name, weight_name in files.items():
            path = Path(input_dir) / (RESUME_PREFIX + weight_name)
            if not path.exists():
                path = Path(input_dir) / weight_name  # of an earlier version, which wrote the weights without scale
            if modules or path.exists():
                load_lora(path, modules, adapter_name=adapter_name)

    accelerator.register_save_state_pre_hook(save)
    accelerator.register_load_state_pre_hook(load)


@contextmanager
def averaged_weights(
    ema: EMAModel, parameters: Sequence[torch.nn.Parameter], transformer: torch.nn.Module
) -> Iterator[None]:
    """Within it, the trained `parameters` hold their moving average; afterwards exactly what they held before.

    `ema` was made of the same parameters in the same order; those of a sharded `transformer` may be among them.
    """
    ema.store(parameters)
    ema.copy_to(parameters)
    reshard(transformer)
    try:
        yield
    finally:
        ema.restore(parameters)
        reshard(transformer)


def average_gradients(accelerator: Accelerator, parameters: Iterable[torch.nn.Parameter]) -> None:
    """Averages gradients over the processes, in one message, where no `DistributedDataParallel` does it."""
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    if accelerator.num_processes == 1 or not gradients:
        return
    flat = torch.cat([gradient.flatten() for gradient in gradients])
    mean = cast(torch.Tensor, accelerator.reduce(flat, reduction="mean"))
    sizes = [gradient.numel() for gradient in gradients]
    for gradient, part in zip(gradients, mean.split(sizes), strict=True):
        gradient.copy_(part.view_as(gradient))
