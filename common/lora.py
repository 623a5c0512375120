"""LoRA adapters: which layers get one, adding them, saving and loading them in diffusers' form."""

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

from common.checkpoints import (
    TENSORS_FILE,
    atomic_write,
    find_checkpoints,
    read_json,
    register_sharded_checkpointing,
)
from common.models import full_tensor, is_sharded

import torch
from accelerate import Accelerator
from diffusers.loaders.lora_base import LORA_ADAPTER_METADATA_KEY, LORA_WEIGHT_NAME_SAFE
from diffusers.training_utils import cast_training_params
from peft import LoraConfig, get_peft_model_state_dict, set_peft_model_state_dict
from safetensors import safe_open
from safetensors.torch import load_file, save


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
    modules_to_save: list[str] | None = None,
    adapter_name: str = "default",
) -> list[torch.nn.Parameter]:
    """Adds a LoRA adapter to a frozen model and returns its parameters, in float32 whatever the model's dtype.

    `target_modules` are names of modules or ends of such names, or a regular expression, as in `LoraConfig`; raises
    ValueError for those that no linear layer has. `modules_to_save` are modules trained as a whole: the adapter holds
    copies of them, and its file their weights. Adapters added before stay trainable.
    """
    unknown = unknown_layers(model, target_modules)
    if unknown:
        raise ValueError(f"no linear layer of {type(model).__name__} is named {', '.join(unknown)}")
    config = LoraConfig(
        r=rank,
        lora_alpha=alpha,  # type: ignore[arg-type]  # a float works as well
        lora_dropout=dropout,
        init_lora_weights="gaussian",
        target_modules=target_modules if isinstance(target_modules, str) else list(target_modules),
        modules_to_save=modules_to_save,
    )
    earlier = [p for name, p in model.named_parameters() if p.requires_grad and ".lora_" in name]
    model.add_adapter(config, adapter_name)  # type: ignore[operator]  # freezes all other adapters
    cast_training_params(model, dtype=torch.float32)  # bfloat16 would lose small updates to rounding
    added = [parameter for parameter in model.parameters() if parameter.requires_grad]
    for parameter in earlier:
        parameter.requires_grad_(True)
    return added


def adapter_config(model: torch.nn.Module, adapter_name: str = "default") -> LoraConfig:
    """The settings of an adapter: its rank, alpha and target modules."""
    return model.peft_config[adapter_name]  # type: ignore[index]


def adapter_weights(model: torch.nn.Module, adapter_name: str = "default") -> dict[str, torch.Tensor]:
    """An adapter's weights {name: tensor}, in full; of a sharded model only if all processes ask for them."""
    state_dict = {}
    for name, value in model.state_dict(keep_vars=True).items():
        trained = value.requires_grad  # frozen weights are not gathered
        state_dict[name] = full_tensor(value) if trained else value.detach()
    return get_peft_model_state_dict(model, state_dict, adapter_name)


def save_lora(
    directory: str | Path,
    pipeline_class: Any,
    modules: Mapping[str, torch.nn.Module],
    dtype: torch.dtype = torch.float32,
    *,
    adapter_name: str = "default",
    weight_name: str = LORA_WEIGHT_NAME_SAFE,
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Writes the adapters of {"transformer": model, ...} as directory/weight_name, whole or not at all.

    The header holds the settings from which `pipeline_class.load_lora_weights` restores their scale, alpha / rank, and
    `metadata`. All processes call it, the main one writes.
    """
    if not modules:
        return
    layers = {}
    settings = {}
    for name, model in modules.items():
        weights = adapter_weights(model, adapter_name)
        layers[f"{name}_lora_layers"] = {key: value.to("cpu", dtype) for key, value in weights.items()}
        for key, value in adapter_config(model, adapter_name).to_dict().items():
            settings[f"{name}.{key}"] = sorted(value) if isinstance(value, set) else value
    if torch.distributed.is_initialized() and torch.distributed.get_rank() != 0:
        return

    def write(state_dict: dict[str, torch.Tensor], filename: str) -> None:
        header = {"format": "pt", LORA_ADAPTER_METADATA_KEY: json.dumps(settings, indent=2, sort_keys=True)}
        # not by save_file, whose files other users cannot read
        Path(filename).write_bytes(save(state_dict, {**header, **(metadata or {})}))

    with atomic_write(Path(directory) / weight_name) as partial:
        pipeline_class.save_lora_weights(partial.parent, **layers, weight_name=partial.name, save_function=write)


def load_lora(
    directory: str | Path,
    modules: Mapping[str, torch.nn.Module],
    *,
    adapter_name: str = "default",
    weight_name: str = LORA_WEIGHT_NAME_SAFE,
) -> None:
    """Loads what `save_lora` wrote back into the adapters of {"transformer": model, ...}.

    Raises ValueError if the file's keys are not exactly those of the adapters.
    """
    path = Path(directory) / weight_name
    if not modules and not path.exists():
        return
    state_dict = load_file(path)
    for name, model in modules.items():
        prefix = f"{name}."
        weights = {key.removeprefix(prefix): value for key, value in state_dict.items() if key.startswith(prefix)}
        if weights.keys() != get_peft_model_state_dict(model, adapter_name=adapter_name).keys():
            raise ValueError(f"the LoRA in {directory} was made for other layers of the {name} than this run trains")
        set_peft_model_state_dict(model, weights, adapter_name=adapter_name)
    unused = [key for key in state_dict if key.partition(".")[0] not in modules]
    if unused:
        raise ValueError(f"the LoRA in {directory} holds layers this run does not train: {', '.join(unused)}")


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
    lora = found if found.is_file() else lora_of_folder(found)
    try:
        with safe_open(lora, "pt") as file:
            keys = list(file.keys())
    except Exception as error:  # safetensors raises a kind of its own beside OSError
        raise ValueError(f"{lora}: not a readable LoRA file ({error})") from None
    if not any("lora" in key.lower() for key in keys):
        raise ValueError(f"{lora}: holds no LoRA")
    return lora, run_of(lora) if found.is_file() else run_of(found / lora.name)


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
    others = [file for file in others if file.name != TENSORS_FILE and not file.stem.endswith("_emb")]
    if len(others) == 1 and not name:
        return others[0]
    if others:
        names = ", ".join(file.name for file in others)
        raise ValueError(f"{folder}: no {wanted[0].name}; name one of the files in it: {names}")
    checkpoints = find_checkpoints(folder)
    hint = f"; {checkpoints[-1]} is its last checkpoint" if checkpoints else ""
    raise FileNotFoundError(f"{wanted[0]}: no such file, so {folder} has no LoRA to draw with{hint}")


def run_of(lora: Path) -> Path | None:
    """The folder with args.json of the run that wrote a file: NAME/ beside NAME.safetensors or NAME-000010.safetensors
    (an epoch's), the file's own, or the one above a checkpoint's; None if there is none."""
    name = re.sub(r"-\d{6}$", "", lora.stem)
    folders = [lora.with_name(name), lora.parent]
    if lora.parent.name.startswith("checkpoint-"):
        folders.append(lora.parent.parent)
    for folder in folders:
        if (folder / "args.json").is_file():
            return folder
    return None


def register_lora_checkpointing(
    accelerator: Accelerator,
    pipeline_class: type,
    modules: dict[str, torch.nn.Module],
    optimizer: torch.optim.Optimizer,
    files: dict[str, str] | None = None,
) -> None:
    """Makes checkpoints hold the adapters of {"transformer": model, ...} alone, not the frozen models around them.

    They are LoRA files as `save_lora` writes them: `files` {adapter name: file name}, one named "default" without.
    Where the transformer is split over the processes, each saves its part of its adapters and of the optimizer.
    `modules` may be empty (DreamBooth's textual inversion alone): then checkpoints hold no models.
    """
    transformer = modules.get("transformer")
    if transformer is not None and is_sharded(transformer):
        register_sharded_checkpointing(accelerator, transformer, optimizer)
        return
    files = files or {"default": LORA_WEIGHT_NAME_SAFE}

    def save(models: list, weights: list, output_dir: str) -> None:
        for adapter_name, weight_name in files.items():
            save_lora(output_dir, pipeline_class, modules, adapter_name=adapter_name, weight_name=weight_name)
        weights.clear()  # accelerate would save the whole models too

    def load(models: list, input_dir: str) -> None:
        for adapter_name, weight_name in files.items():
            load_lora(input_dir, modules, adapter_name=adapter_name, weight_name=weight_name)
        models.clear()

    accelerator.register_save_state_pre_hook(save)
    accelerator.register_load_state_pre_hook(load)


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
