"""LoRA adapters in, LoRA files out."""

import re
import shutil
import tempfile
from pathlib import Path

from common.checkpoints import atomic_write, register_sharded_checkpointing
from common.models import is_sharded, whole

import torch
from accelerate import Accelerator
from diffusers.loaders.lora_base import LORA_WEIGHT_NAME_SAFE
from diffusers.training_utils import cast_training_params
from peft import LoraConfig, get_peft_model_state_dict, set_peft_model_state_dict
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


def target_layers(model, target_modules):
    """(name, module) of the linear layers that an adapter for `target_modules` is put beside.

    `target_modules` are names of layers or ends of such names, or one regular expression that matches whole names.
    """
    named = [(name.removesuffix(".base_layer"), module) for name, module in model.named_modules()]
    linear = [pair for pair in named if isinstance(pair[1], torch.nn.Linear) and ".lora_" not in pair[0]]
    if isinstance(target_modules, str):
        return [(name, module) for name, module in linear if re.fullmatch(target_modules, name)]
    ends = tuple(f".{target}" for target in target_modules)
    return [(name, module) for name, module in linear if f".{name}".endswith(ends)]


def unknown_layers(model, target_modules):
    """The `target_modules` that no linear layer of the model has."""
    if isinstance(target_modules, str):
        return [] if target_layers(model, target_modules) else [target_modules]
    return [target for target in target_modules if not target_layers(model, [target])]


def add_lora(model, *, rank, alpha, dropout, target_modules, modules_to_save=None, adapter_name="default"):
    """Adds a LoRA adapter to a frozen model and returns its parameters, in float32 whatever the model's dtype.

    `target_modules` are names of modules or ends of such names, or a regular expression, as in `LoraConfig`. Raises
    ValueError for those that no linear layer has. `modules_to_save` are modules trained as a whole: the adapter holds
    copies of them, and its file their weights. Adapters added before stay trainable.
    """
    unknown = unknown_layers(model, target_modules)
    if unknown:
        raise ValueError(f"no linear layer of {type(model).__name__} is named {', '.join(unknown)}")
    config = LoraConfig(
        r=rank,
        lora_alpha=alpha,
        lora_dropout=dropout,
        init_lora_weights="gaussian",
        target_modules=target_modules if isinstance(target_modules, str) else list(target_modules),
        modules_to_save=modules_to_save,
    )
    earlier = [p for name, p in model.named_parameters() if p.requires_grad and ".lora_" in name]
    model.add_adapter(config, adapter_name)  # which freezes all other adapters
    cast_training_params(model, dtype=torch.float32)  # bfloat16 would lose small updates to rounding
    added = [parameter for parameter in model.parameters() if parameter.requires_grad]
    for parameter in earlier:
        parameter.requires_grad_(True)
    return added


def adapter_config(model: torch.nn.Module, adapter_name: str = "default") -> LoraConfig:
    """The settings of an adapter: its rank, alpha and target modules."""
    return model.peft_config[adapter_name]  # type: ignore[index]


def adapter_weights(model, adapter_name="default"):
    """An adapter's weights {name: tensor}, in full; with a sharded model all processes must ask for them."""
    named = model.state_dict(keep_vars=True).items()
    state_dict = {name: whole(value) if value.requires_grad else value.detach() for name, value in named}
    return get_peft_model_state_dict(model, state_dict, adapter_name)


def save_lora(
    directory,
    pipeline_class,
    modules,
    dtype=torch.float32,
    *,
    adapter_name="default",
    weight_name=LORA_WEIGHT_NAME_SAFE,
    metadata=None,
):
    """Writes the adapters of {"transformer": model, ...} as `weight_name`, with the metadata from which
    `pipeline_class.load_lora_weights` restores their strength (alpha / rank). `metadata`, {name: text}, goes into the
    file's header beside it. All processes call it, one writes.
    """
    if not modules:
        return
    layers = {}
    for name, model in modules.items():
        weights = adapter_weights(model, adapter_name)
        layers[f"{name}_lora_layers"] = {key: value.to("cpu", dtype) for key, value in weights.items()}
        config = model.peft_config[adapter_name].to_dict()
        if not isinstance(config["target_modules"], str):
            config["target_modules"] = sorted(config["target_modules"])  # a set, in no fixed order
        layers[f"{name}_lora_adapter_metadata"] = config
    if torch.distributed.is_initialized() and torch.distributed.get_rank():
        return
    directory = Path(directory)
    with atomic_write(directory / weight_name) as partial, tempfile.TemporaryDirectory() as folder:
        written = Path(folder) / LORA_WEIGHT_NAME_SAFE
        pipeline_class.save_lora_weights(folder, **layers)
        if metadata:
            with safe_open(written, "pt") as file:
                header = file.metadata()
            save_file(load_file(written), written, metadata={**header, **metadata})
        shutil.copyfile(written, partial)  # a copy others may read, by the user's umask


def load_lora(directory, modules, *, adapter_name="default", weight_name=LORA_WEIGHT_NAME_SAFE):
    """Loads what `save_lora` wrote back into the adapters of {"transformer": model, ...}.

    Raises ValueError if the file's keys are not exactly those of the adapters.
    """
    path = Path(directory) / weight_name
    state_dict = load_file(path) if modules or path.exists() else {}
    for name, model in modules.items():
        prefix = f"{name}."
        layers = {key.removeprefix(prefix): state_dict.pop(key) for key in list(state_dict) if key.startswith(prefix)}
        if layers.keys() != get_peft_model_state_dict(model, adapter_name=adapter_name).keys():
            raise ValueError(f"the LoRA in {directory} was made for other layers of the {name} than this run trains")
        set_peft_model_state_dict(model, layers, adapter_name=adapter_name)
    if state_dict:
        raise ValueError(f"the LoRA in {directory} holds layers this run does not train: {', '.join(state_dict)}")


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
    """
    if is_sharded(modules["transformer"]):
        register_sharded_checkpointing(accelerator, modules["transformer"], optimizer)
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


def reduce_gradients(accelerator, parameters):
    """The mean over the processes, in one message, of gradients that `DistributedDataParallel` does not see."""
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    if accelerator.num_processes > 1 and gradients:
        mean = accelerator.reduce(torch.cat([gradient.flatten() for gradient in gradients]), reduction="mean")
        for gradient, part in zip(gradients, mean.split([g.numel() for g in gradients]), strict=True):
            gradient.copy_(part.view_as(gradient))
