"""LoRA adapters in, LoRA files out, models over several processes, and checkpoints that are whole or absent."""

import datetime
import hashlib
import json
import math
import os
import re
import shutil
import sys
import tempfile
from contextlib import contextmanager, suppress
from pathlib import Path

import torch
from accelerate.utils import DistributedType
from diffusers.loaders.lora_base import LORA_WEIGHT_NAME_SAFE
from diffusers.optimization import get_scheduler
from diffusers.training_utils import cast_training_params
from huggingface_hub import save_torch_state_dict
from peft import LoraConfig, get_peft_model_state_dict, set_peft_model_state_dict
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from transformers.integrations import unset_hf_deepspeed_config

from common import names_in, reading


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
QUANTIZATIONS = ("none", "nf4", "int8")
CHECKSUMS = "checksums.json"  # of a checkpoint's files


# ---------------------------------------------------------------------------------------------------------------------
# Models, adapters and their files, optimizers
# ---------------------------------------------------------------------------------------------------------------------


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


def load_model(model_class, subfolder, args, dtype):
    """A frozen part of the pipeline, on the CPU."""
    with reading(f"--pretrained_model_name_or_path {args.pretrained_model_name_or_path}: its {subfolder}"):
        model, found = model_class.from_pretrained(
            args.pretrained_model_name_or_path,
            subfolder=subfolder,
            revision=args.revision,
            variant=args.variant,
            cache_dir=args.cache_dir,
            dtype=dtype,
            use_safetensors=True,
            output_loading_info=True,
        )
        if missing := sorted(found["missing_keys"]):  # which would be random
            raise ValueError(f"its file lacks {missing[0]}" + f" and {len(missing) - 1} more" * (len(missing) > 1))
    return model.requires_grad_(False)


def load_text_pipeline(pipeline_class, args, dtype, **parts):
    """The pipeline of --pretrained_model_name_or_path without transformer and VAE."""
    with reading(f"--pretrained_model_name_or_path {args.pretrained_model_name_or_path}: its text encoders"):
        return pipeline_class.from_pretrained(
            args.pretrained_model_name_or_path,
            transformer=None,
            vae=None,
            revision=args.revision,
            variant=args.variant,
            cache_dir=args.cache_dir,
            dtype=dtype,
            use_safetensors=True,
            **parts,
        )


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


def repeated_blocks(model):
    """The blocks that a transformer of diffusers consists of, such as FLUX.1's double and single ones."""
    lists = [part for name, part in model.named_children() if name.endswith("blocks")]
    return [block for blocks in lists for block in blocks]


def quantize_base(model, dtype, kind="nf4"):
    """Replaces the linear layers of a frozen model's blocks by bitsandbytes' 4-bit NormalFloat (nf4, arXiv 2305.14314)
    or 8-bit (int8, arXiv 2208.07339) ones that compute in `dtype`, as plain ones do under autocast. The weights shrink
    once the model is moved to its device. Of "none", the model stays as it is."""
    from bitsandbytes.nn import Int8Params, Linear4bit, Linear8bitLt, Params4bit

    layers = [pair for pair in model.named_modules() if isinstance(pair[1], torch.nn.Linear) and "blocks." in pair[0]]
    for name, layer in layers if kind != "none" else ():
        shape = {"input_features": layer.in_features, "output_features": layer.out_features}
        shape |= {"bias": layer.bias is not None, "device": "meta"}
        if kind == "nf4":
            new = Linear4bit(**shape, compute_dtype=dtype, quant_type="nf4")
            new.weight = Params4bit(layer.weight.data, requires_grad=False, quant_type="nf4")
            new.support_avx512bf16_for_cpu = False  # validation would leave weights in a form that gives no gradients
        else:
            new = Linear8bitLt(**shape, has_fp16_weights=False)
            new.weight = Int8Params(layer.weight.data, requires_grad=False, has_fp16_weights=False)
            new.register_forward_hook(forget_input)
        new.register_forward_pre_hook(lambda layer, args: args[0].to(dtype))  # which the output is of, too
        new.bias = layer.bias
        parent, _, attribute = name.rpartition(".")
        setattr(model.get_submodule(parent), attribute, new)
    return model


def forget_input(layer, args, output):
    """Lets go of the input that bitsandbytes keeps of an int8 layer until the backward pass, checkpointed or not.

    Only a gradient of the weight would need it. What is compiled keeps what it needs.
    """
    if not torch.compiler.is_compiling() and output.grad_fn is not None:
        output.grad_fn.A = None  # on a CPU
        output.grad_fn.tensors = (None, None, None)


def compile_blocks(model):
    """torch.compile of a transformer's blocks, in place: each kind is compiled once, whatever their number."""
    for block in repeated_blocks(model):
        block.compile()


def prepare_blocks(transformer, args, device, dtype):
    """Gradient checkpointing, torch.compile and FSDP2, as far as the flags ask for them."""
    if args.gradient_checkpointing:
        transformer.enable_gradient_checkpointing()
    if args.compile:
        compile_blocks(transformer)
    if args.fsdp:
        shard(transformer, device, dtype)


def create_optimizer(args, params, scale=1, text_params=()):
    """The optimizer that --optimizer names, over the parameters of the adapter (or model) and of text encoders.

    Learning rates are multiplied by `scale`. Prodigy has one for all, as its authors ask.
    """
    groups = [{"params": params, "lr": args.learning_rate * scale, "weight_decay": args.adam_weight_decay}]
    if text_params:
        rate = args.learning_rate if args.optimizer == "prodigy" else args.text_encoder_lr
        decay = args.adam_weight_decay_text_encoder
        groups.append({"params": text_params, "lr": rate * scale, "weight_decay": decay})
    groups = [group for group in groups if group["params"]]
    shared = {"betas": (args.adam_beta1, args.adam_beta2), "eps": args.adam_epsilon}
    if args.optimizer == "prodigy":
        from prodigyopt import Prodigy

        own = ("beta3", "decouple", "use_bias_correction", "safeguard_warmup")
        return Prodigy(groups, **shared, **{name: getattr(args, f"prodigy_{name}") for name in own})
    if args.optimizer == "sgd":
        return torch.optim.SGD(groups)
    if args.use_8bit_adam:
        from bitsandbytes.optim import AdamW8bit

        return AdamW8bit(groups, **shared)
    return torch.optim.AdamW(groups, **shared)


def reduce_gradients(accelerator, parameters):
    """The mean over the processes, in one message, of gradients that `DistributedDataParallel` does not see."""
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    if accelerator.num_processes > 1 and gradients:
        mean = accelerator.reduce(torch.cat([gradient.flatten() for gradient in gradients]), reduction="mean")
        for gradient, part in zip(gradients, mean.split([g.numel() for g in gradients]), strict=True):
            gradient.copy_(part.view_as(gradient))


def create_lr_scheduler(args, optimizer, max_train_steps):
    """The course of the learning rate that --lr_scheduler names, over the steps of the run."""
    return get_scheduler(
        args.lr_scheduler,
        optimizer,
        num_warmup_steps=args.lr_warmup_steps,
        num_training_steps=max_train_steps,
        num_cycles=args.lr_num_cycles,
        power=args.lr_power,
    )


def check_disk(args, needed):
    """Problems of --output_dir if its disk has less free than the bytes that a checkpoint and the result take."""
    parent = next(path for path in [args.output_dir, *args.output_dir.absolute().parents] if path.exists())
    if shutil.disk_usage(parent).free >= needed:
        return []
    return [f"--output_dir {args.output_dir}: less than {needed / 2**20:.0f} MiB free, which one checkpoint takes"]


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
    directory.mkdir(parents=True, exist_ok=True)
    partial = directory / f".{weight_name}.partial"
    with writing(directory / weight_name, partial), tempfile.TemporaryDirectory() as folder:
        written = Path(folder) / LORA_WEIGHT_NAME_SAFE
        pipeline_class.save_lora_weights(folder, **layers)
        if metadata:
            with safe_open(written, "pt") as file:
                header = file.metadata()
            save_file(load_file(written), written, metadata={**header, **metadata})
        shutil.copyfile(written, partial)  # a copy others may read, by the user's umask
        flush_to_disk(partial)
        partial.replace(directory / weight_name)


def adapter_weights(model, adapter_name="default"):
    """An adapter's weights {name: tensor}, in full; with a sharded model all processes must ask for them."""
    named = model.state_dict(keep_vars=True).items()
    state_dict = {name: whole(value) if value.requires_grad else value.detach() for name, value in named}
    return get_peft_model_state_dict(model, state_dict, adapter_name)


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


def register_lora_checkpointing(accelerator, pipeline_class, modules, optimizer, files=None):
    """Makes `accelerator.save_state` and `load_state` handle the adapters alone, not the frozen models around them.

    `files`, {adapter name: file name}, names the adapters if there is another than "default". With a sharded model,
    each process handles its part of the adapter and of the optimizer's state.
    """
    if accelerator.distributed_type == DistributedType.DEEPSPEED:
        parts = zero_parts(accelerator)
        register_tensor_checkpointing(accelerator, {"weights": parts.values}, parts, optimizer)
        return
    if any(map(is_sharded, modules.values())):
        named = [pair for model in modules.values() for pair in model.named_parameters()]
        parameters = {name: parameter for name, parameter in named if parameter.requires_grad}
        parts = {"adapter": lambda: [local(parameter) for parameter in parameters.values()]}
        register_tensor_checkpointing(accelerator, parts, parameters, optimizer)
        return
    files = files or {"default": LORA_WEIGHT_NAME_SAFE}

    def save(models, weights, output_dir):
        for adapter_name, weight_name in files.items():
            save_lora(output_dir, pipeline_class, modules, adapter_name=adapter_name, weight_name=weight_name)
        weights.clear()

    def load(models, input_dir):
        for adapter_name, weight_name in files.items():
            load_lora(input_dir, modules, adapter_name=adapter_name, weight_name=weight_name)
        models.clear()

    accelerator.register_save_state_pre_hook(save)
    accelerator.register_load_state_pre_hook(load)


# ---------------------------------------------------------------------------------------------------------------------
# Several processes: FSDP2, DeepSpeed; full training
# ---------------------------------------------------------------------------------------------------------------------


def shard(transformer, device, dtype):
    """Splits the weights of each block, of any dtype, over the processes (FSDP2); a block is gathered while it
    computes, in `dtype`, on `device`. Parameters are other objects afterwards."""
    mesh = init_device_mesh(device.type, (torch.distributed.get_world_size(),))
    policy = MixedPrecisionPolicy(
        param_dtype=dtype if dtype != torch.float32 else None,
        reduce_dtype=torch.float32,
        cast_forward_inputs=False,  # times and positions stay in float32
    )
    for module in [*repeated_blocks(transformer), transformer]:
        fully_shard(module, mesh=mesh, mp_policy=policy, reshard_after_forward=True)


def is_sharded(model):
    """Whether a model's weights are split over the processes, by `shard` or by DeepSpeed's ZeRO-3."""
    return any(isinstance(parameter, DTensor) or hasattr(parameter, "ds_id") for parameter in model.parameters())


def count_weights(parameters):
    """The number of weights, sharded or not."""
    return sum(getattr(parameter, "ds_numel", parameter.numel()) for parameter in parameters)


def check_run(accelerator, args, max_train_steps, checkpoint, run):
    """Problems that show once the data and the processes are known."""
    problems = check_processes(accelerator, args)
    if args.lr_scheduler != "constant" and args.lr_warmup_steps >= max_train_steps > 0:
        warmup = args.lr_warmup_steps
        problems.append(f"--lr_warmup_steps {warmup} must be less than the {max_train_steps} steps of the run")
    return problems + checkpoint_conflicts(checkpoint, run)


def check_processes(accelerator, args):
    """Problems of the kind and number of processes."""
    supported = (DistributedType.NO, DistributedType.MULTI_CPU, DistributedType.MULTI_GPU)
    problems, kind = [], accelerator.distributed_type
    if kind == DistributedType.DEEPSPEED:
        return check_deepspeed(accelerator, args)
    if kind not in supported:
        problems.append(
            f"{kind.value}: not supported, choose multi-GPU without it in accelerate config and --fsdp for memory, "
            "which splits weights, gradients and optimizer over the processes (FSDP2)"
        )
    if not args.fsdp:
        return problems
    if accelerator.num_processes == 1:
        problems.append("--fsdp needs more than one process: accelerate launch --num_processes N")
    if accelerator.scaler is not None:
        problems.append("--mixed_precision fp16 does not work with --fsdp: use bf16")
    if args.optimizer == "prodigy":
        problems.append("--optimizer prodigy does not work with --fsdp: use adamw")
    refused = ("use_8bit_adam", "train_text_encoder", "train_text_encoder_ti")
    problems += [
        f"--{flag} does not work with --fsdp: leave one out" for flag in refused if getattr(args, flag, False)
    ]
    if args.quantize_base != "none":
        problems.append(f"--quantize_base {args.quantize_base} does not work with --fsdp: leave one out")
    return problems


def check_deepspeed(accelerator, args):
    """Problems of a run with DeepSpeed."""
    plugin, problems = accelerator.state.deepspeed_plugin, []
    if plugin.zero_stage not in (2, 3):
        problems.append(f"DeepSpeed: zero_stage is {plugin.zero_stage} in accelerate config, choose 2 or 3")
    if plugin.hf_ds_config.is_offload():
        problems.append("DeepSpeed: an offload device is set in accelerate config, choose none")
    if accelerator.mixed_precision == "fp16":
        problems.append("--mixed_precision fp16 does not work with DeepSpeed: use bf16")
    if args.optimizer == "prodigy":
        problems.append("--optimizer prodigy does not work with DeepSpeed: use adamw")
    if args.quantize_base != "none":
        problems.append(f"--quantize_base {args.quantize_base} does not work with DeepSpeed: leave one out")
    if getattr(args, "train_transformer_frac", 1) < 1:
        problems.append("--train_transformer_frac below 1 does not work with DeepSpeed: leave one out")
    refused = ("fsdp", "use_8bit_adam", "train_text_encoder", "train_text_encoder_ti")
    return problems + [
        f"--{flag} does not work with DeepSpeed: leave one out" for flag in refused if getattr(args, flag, False)
    ]


def configure_deepspeed(accelerator, args):
    """Tells DeepSpeed, if it runs, of the flags that it acts on: it accumulates, clips and steps the optimizer within
    `accelerator.backward`, and leaves out steps whose gradients are not finite. To be called before a model is loaded.
    """
    if accelerator.distributed_type == DistributedType.DEEPSPEED:
        unset_hf_deepspeed_config()  # else transformers splits the frozen text encoders, which nothing gathers
        accelerator.gradient_accumulation_steps = args.gradient_accumulation_steps
        accelerator.state.deepspeed_plugin.deepspeed_config |= {
            "train_micro_batch_size_per_gpu": args.train_batch_size,
            "gradient_accumulation_steps": args.gradient_accumulation_steps,
            "gradient_clipping": args.max_grad_norm,
        }


def first_device(accelerator, args):
    """Where a transformer waits before training: on the CPU if its weights are to be split, for they may not fit."""
    plugin = accelerator.state.deepspeed_plugin
    return torch.device("cpu") if args.fsdp or plugin and plugin.zero_stage == 3 else accelerator.device


def split_weights(accelerator, transformer):
    """Splits the weights over the processes where DeepSpeed's ZeRO-3 is to, one after the other: `accelerator.prepare`
    would move all of them to the device before. Trained ones get the others' dtype, as it would give them."""
    plugin = accelerator.state.deepspeed_plugin
    if plugin and plugin.zero_stage == 3:
        from deepspeed.runtime.zero import Init

        config = {key: value for key, value in plugin.deepspeed_config.items() if key != "train_batch_size"}
        for parameter in transformer.parameters() if accelerator.mixed_precision == "bf16" else ():
            parameter.data = parameter.data.to(torch.bfloat16)
        Init(module=transformer, config_dict_or_path=config)
        transformer.to(accelerator.device)  # the buffers


def zero_parts(accelerator):
    """{number: tensor}: what this process has of DeepSpeed's flat float32 copies of the trained weights, which its
    optimizer updates. `renew_weights` follows a change of them."""
    zero = accelerator.deepspeed_engine_wrapped.engine.optimizer
    of_stage_2 = getattr(zero, "single_partition_of_fp32_groups", None)
    parts = of_stage_2 or zero.fp32_partitioned_groups_flat
    return {str(i): part for i, part in enumerate(parts)}


def renew_weights(accelerator, model):
    """Lets a model compute with its sharded weights or DeepSpeed's `zero_parts` as they are, after they were changed
    in place: what was gathered or copied of them is of before."""
    for module in model.modules() if isinstance(model, FSDPModule) else ():
        if isinstance(module, FSDPModule):
            module.reshard()
    if accelerator.distributed_type == DistributedType.DEEPSPEED:
        zero = accelerator.deepspeed_engine_wrapped.engine.optimizer
        if hasattr(zero, "update_lp_params"):  # ZeRO-2
            zero.update_lp_params()
        else:
            zero._partition_all_parameters()
            for i in range(len(zero.fp16_groups)):
                zero._reassign_or_swap_out_partitioned_parameters(i)


def whole(value):
    """A sharded parameter in full, which all processes must ask for; others as they are."""
    if hasattr(value, "ds_id"):
        from deepspeed.runtime.zero import GatheredParameters

        with GatheredParameters([value]):
            return value.detach().clone()
    value = value.detach()
    return value.full_tensor() if isinstance(value, DTensor) else value


def local(parameter):
    """The part of a sharded parameter that this process holds; others as they are."""
    parameter = parameter.detach()
    return parameter.to_local() if isinstance(parameter, DTensor) else parameter


def register_tensor_checkpointing(accelerator, sets, parameters, optimizer=None):
    """Makes checkpoints hold tensors of a run, not the models that were prepared: state.safetensors.

    sets {kind: function} return one tensor for each of `parameters` {name: parameter}, to be restored in place. With
    sharded parameters, or DeepSpeed's `zero_parts`, each process writes its part, and that of the optimizer's state,
    to state-N.safetensors.
    """
    zero = accelerator.distributed_type == DistributedType.DEEPSPEED
    sharded = zero or any(isinstance(parameter, DTensor) for parameter in parameters.values())
    file_name = f"state-{accelerator.process_index}.safetensors" if sharded else "state.safetensors"
    if zero:  # its own files are pickles, and loading one runs what it says
        engine = accelerator.deepspeed_engine_wrapped.engine
        engine.save_checkpoint = engine.load_checkpoint = lambda folder, name: None

    def save(models, weights, output_dir):
        tensors = {
            f"{kind}/{name}": value for kind in sets for name, value in zip(parameters, sets[kind](), strict=True)
        }
        for name, parameter in parameters.items() if sharded else ():
            tensors |= {f"optimizer/{name}/{key}": local(v) for key, v in optimizer.state[parameter].items()}
        if tensors and (sharded or accelerator.is_main_process):
            tensors = {name: value.detach().cpu().contiguous() for name, value in tensors.items()}
            save_file(tensors, Path(output_dir) / file_name)
        weights.clear()

    @torch.no_grad()
    def load(models, input_dir):
        tensors = load_file(Path(input_dir) / file_name) if sets else {}
        for kind in sets:
            for name, value in zip(parameters, sets[kind](), strict=True):
                value.copy_(tensors.pop(f"{kind}/{name}"))
        for key, value in tensors.items():
            _, name, entry = key.split("/")
            value = value if entry == "step" else like_parameter(value, parameters[name])
            optimizer.state[parameters[name]][entry] = value
        if zero:
            renew_weights(accelerator, engine)
        models.clear()

    accelerator.register_save_state_pre_hook(save)
    accelerator.register_load_state_pre_hook(load)


def like_parameter(value, parameter):
    """This process' part of a tensor that is sharded as `parameter` is, or one of `zero_parts`."""
    if not isinstance(parameter, DTensor):
        return value.to(parameter.device)
    shape = {"shape": parameter.shape, "stride": parameter.stride()}
    return DTensor.from_local(value.to(local(parameter).device), parameter.device_mesh, parameter.placements, **shape)


def save_model(accelerator, folder, model, config_class, dtype):
    """Writes all weights of a model, sharded or not, so that `config_class.from_pretrained` loads them."""
    state_dict = {}
    for name, value in model.state_dict(keep_vars=True).items():
        value = whole(value)
        if accelerator.is_main_process:
            state_dict[name] = value.to("cpu", dtype, copy=True)  # DeepSpeed's may be views of one tensor
    if accelerator.is_main_process:
        with writing(folder):
            folder.mkdir(parents=True, exist_ok=True)
            with torch.device("meta"):  # a sharded model's class has another name
                config_class.from_config(model.config).save_config(folder)
            pattern = "diffusion_pytorch_model{suffix}.safetensors"
            save_torch_state_dict(state_dict, folder, filename_pattern=pattern, max_shard_size="10GB")


# ---------------------------------------------------------------------------------------------------------------------
# LoRA files of other programs, for FLUX.1
# ---------------------------------------------------------------------------------------------------------------------


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
    partial = path.with_name(f".{path.name}.partial")
    with writing(path, partial):
        path.parent.mkdir(parents=True, exist_ok=True)
        save_file(tensors, partial, metadata | {"sshs_model_hash": placeholder})
        with partial.open("r+b") as file:
            start = file.read(int.from_bytes(file.read(8), "little"))
            digest = hashlib.file_digest(file, "sha256").hexdigest()
            file.seek(8)
            file.write(start.replace(placeholder.encode(), digest.encode()))
        flush_to_disk(partial)
        partial.replace(path)


def lora_file(args, epoch=None):
    """Where the LoRA goes, or with --save_every_n_epochs that of an epoch."""
    if not args.output_name:
        return args.output_dir / "pytorch_lora_weights.safetensors"
    return args.output_dir.with_name(f"{args.output_name}{f'-{epoch:06d}' if epoch else ''}.safetensors")


def save_named_lora(args, adapted, examples, guided, dtype, epoch=None):
    """NAME.safetensors for ComfyUI, Forge and diffusers; its header says what it is and which words call it."""
    layers, captions = lora_layers(adapted), {}
    own = [example for example in examples if not example.options["is_reg"]]
    for example in own:
        folder = captions.setdefault(Path(example.name).parent.name, {})
        for tag in names_in(example.prompt().lower()):
            folder[tag] = folder.get(tag, 0) + example.repeats
    path = lora_file(args, epoch)
    if torch.distributed.is_initialized() and torch.distributed.get_rank():
        return
    header = lora_header(
        layers,
        name=path.stem,
        base_model="flux-1-dev" if guided else "flux-1-schnell",
        resolution=own[0].sides(),
        trigger_words=dict.fromkeys(filter(None, (example.options["class_tokens"] for example in own))),
        captions=captions,
    )
    write_lora(path, layers, args.save_format, header, dtype)


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


# ---------------------------------------------------------------------------------------------------------------------
# Checkpoints
# ---------------------------------------------------------------------------------------------------------------------


def find_checkpoints(output_dir):
    """The complete checkpoints in `output_dir`, oldest first."""
    folders = [folder for folder in Path(output_dir).glob("checkpoint-*") if folder.name[11:].isdecimal()]
    return sorted(folders, key=lambda folder: int(folder.name[11:]))


def save_checkpoint(accelerator, output_dir, step, state, total_limit=None):
    """Saves the run to `output_dir`/checkpoint-`step`, then deletes the oldest beyond `total_limit`.

    The folder is written beside its place, flushed to the disk and renamed: it is complete or absent whenever the
    machine stops. `state` (JSON) says what a step means in this run, see `checkpoint_conflicts`. To be called by all
    processes.
    """
    output_dir = Path(output_dir)
    checkpoint, partial = output_dir / f"checkpoint-{step}", output_dir / f".checkpoint-{step}.partial"
    with writing(checkpoint, partial):
        if accelerator.is_main_process:
            for left in output_dir.glob(".checkpoint-*.partial"):  # by a run that was killed
                shutil.rmtree(left)
            partial.mkdir(parents=True)
            (partial / "trainer_state.json").write_text(json.dumps({"global_step": step, **state}, indent=2))
        accelerator.wait_for_everyone()
        accelerator.save_state(partial)
        accelerator.wait_for_everyone()
        if accelerator.is_main_process:
            (partial / CHECKSUMS).write_text(json.dumps(checksums(partial), indent=2))
            for path in [*partial.rglob("*"), partial]:
                flush_to_disk(path)
            partial.rename(checkpoint)
            flush_to_disk(output_dir)
    if accelerator.is_main_process:
        for folder in find_checkpoints(output_dir)[: -total_limit if total_limit else 0]:
            doomed = folder.rename(folder.with_name(f".{folder.name}.partial"))
            shutil.rmtree(doomed)
    accelerator.wait_for_everyone()
    return checkpoint


def checksums(folder):
    """{name: SHA-256} of the files in a folder."""
    digests = {}
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        with path.open("rb") as file:
            digests[path.relative_to(folder).as_posix()] = hashlib.file_digest(file, "sha256").hexdigest()
    return digests


def checkpoint_to_resume(output_dir, resume_from_checkpoint):
    """The folder that --resume_from_checkpoint means: None without the flag, or for "latest" without a checkpoint."""
    if resume_from_checkpoint == "latest":
        return next(reversed(find_checkpoints(output_dir)), None)
    if not resume_from_checkpoint:
        return None
    inside = Path(output_dir) / resume_from_checkpoint  # diffusers' scripts take the name alone
    return inside if inside.is_dir() else Path(resume_from_checkpoint)


def checkpoint_state(checkpoint):
    """What `save_checkpoint` was given as `state`, with global_step; {} if trainer_state.json is damaged."""
    try:
        state = json.loads((checkpoint / "trainer_state.json").read_text())
    except (OSError, ValueError, RecursionError):
        return {}
    return state if isinstance(state, dict) and type(state.get("global_step")) is int else {}


def check_output_dir(args):
    """Problems of --output_dir and --resume_from_checkpoint."""
    folder, checkpoint = args.output_dir, checkpoint_to_resume(args.output_dir, args.resume_from_checkpoint)
    if folder.exists() and not folder.is_dir():
        return [f"--output_dir {folder}: a file of this name is in the way"]
    parent = next(path for path in [folder, *folder.absolute().parents] if path.exists())
    if not os.access(parent, os.W_OK):
        return [f"--output_dir {folder}: no permission to write there"]
    found = find_checkpoints(folder)
    if checkpoint is None and found:
        return [
            f"--output_dir {folder} holds {found[-1].name} of an earlier run: continue it with "
            "--resume_from_checkpoint latest, delete it, or choose another folder"
        ]
    if checkpoint is None:
        return []
    if checkpoint in found and not (checkpoint / "trainer_state.json").is_file():
        return checkpoint_damage(checkpoint)
    if not (checkpoint / "trainer_state.json").is_file():
        return [f"--resume_from_checkpoint {checkpoint}: no checkpoint there; use latest, or a checkpoint-N folder"]
    if found and checkpoint.resolve() != found[-1].resolve():
        return [
            f"--output_dir {folder} holds {found[-1].name}, later than {checkpoint}: delete what is later, or choose "
            "another folder"
        ]
    return []


def checkpoint_conflicts(checkpoint, state):
    """What keeps a run with this `state` from continuing the checkpoint (or None) exactly, as a list of sentences."""
    if checkpoint is None:
        return []
    damage, saved = checkpoint_damage(checkpoint), checkpoint_state(checkpoint)
    return damage or [
        f"--resume_from_checkpoint {checkpoint}: {name} was {saved.get(name)} there and is {value} now"
        for name, value in state.items()
        if saved.get(name, value) != value
    ]


def checkpoint_damage(checkpoint):
    """The files of a checkpoint that are not as `save_checkpoint` left them, in a sentence; [] if all are."""
    try:
        saved = json.loads((checkpoint / CHECKSUMS).read_text())
    except (OSError, ValueError, RecursionError):
        saved = None
    found = checksums(checkpoint)
    if not isinstance(saved, dict) or "trainer_state.json" not in saved:
        saved = {CHECKSUMS: ""}
    damaged = [name for name, digest in saved.items() if found.get(name) != digest]
    if not checkpoint_state(checkpoint) and "trainer_state.json" not in damaged:
        damaged.append("trainer_state.json")
    if not damaged:
        return []
    folders = find_checkpoints(checkpoint.parent)
    earlier = [folder.name for folder in folders if folder.name != checkpoint.name]
    remedy = f"go on from {earlier[-1]}" if earlier else "start anew"
    return [
        f"--resume_from_checkpoint {checkpoint}: {', '.join(damaged)} missing or damaged; delete {checkpoint} and "
        f"{remedy} with --resume_from_checkpoint latest"
    ]


def load_checkpoint(accelerator, checkpoint, lr_scheduler):
    """Restores what `save_checkpoint` saved and returns its step; step 0 for None.

    Ends the run with exit code 2 if the files do not fit the models and the optimizer.
    """
    if checkpoint is None:
        return 0
    with reading(checkpoint):
        accelerator.load_state(checkpoint)
    optimizer = lr_scheduler.scheduler.optimizer
    for group, rate in zip(optimizer.param_groups, lr_scheduler.get_last_lr(), strict=True):
        group["lr"] = rate  # a sharded optimizer is restored without it
    accelerator.print(f"Resuming from {checkpoint}")
    return checkpoint_state(checkpoint)["global_step"]


@contextmanager
def writing(path, partial=None):
    """Ends the run with one message if `path` cannot be written within it.

    `partial`, the file or folder that was to become it, does not outlive an error of any kind.
    """
    path = Path(path).absolute()
    try:
        yield
    except BaseException as error:
        free = shutil.disk_usage(next(folder for folder in path.parents if folder.exists())).free
        if partial:
            shutil.rmtree(partial, ignore_errors=True)
            with suppress(OSError):
                partial.unlink()
        of_torch_save = re.search("PytorchStreamWriter|iostream|unexpected pos", str(error))
        if not (of_torch_save or isinstance(error, OSError | SafetensorError)):
            raise
        reason = "writing failed" if of_torch_save else getattr(error, "strerror", None) or str(error)
        raise SystemExit(
            f"\n{Path(sys.argv[0]).name}: error: {path} cannot be written ({reason}); {free / 2**20:.1f} MiB are free "
            "there. Checkpoints are intact: make room and go on with --resume_from_checkpoint latest"
        ) from None


def flush_to_disk(path):
    """fsync of a file or folder."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
