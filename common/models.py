"""Frozen models: loading, quantization, compilation, splitting over processes."""

import json
import os
from pathlib import Path

from common.arguments import reading

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType, ProjectConfiguration
from diffusers import FlowMatchEulerDiscreteScheduler
from diffusers.optimization import get_scheduler
from diffusers.utils import logging as diffusers_logging
from safetensors import safe_open
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from transformers.utils import logging as transformers_logging


QUANTIZATIONS = ("none", "nf4", "int8")


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


def load_scheduler(args):
    """The scheduler that the model was made with."""
    return FlowMatchEulerDiscreteScheduler.from_pretrained(
        args.pretrained_model_name_or_path, subfolder="scheduler", revision=args.revision, cache_dir=args.cache_dir
    )


def check_weights(args):
    """Problems of the weights in a local folder of a pipeline, of whose files the headers alone are read."""
    folder, problems = Path(args.pretrained_model_name_or_path), []
    flag = f"--pretrained_model_name_or_path {folder}"
    parts = [folder / "transformer", folder / "vae", *sorted(folder.glob("text_encoder*"))]
    for part in parts if (parts[0] / "config.json").is_file() else ():  # else it is no pipeline
        files = [*part.glob("*.safetensors.index*.json"), *part.glob("*.safetensors")]
        if not files:
            problems.append(f"{flag}: {part} holds no .safetensors; other weights are not read, save it anew as these")
        for file in files:
            try:
                if file.suffix == ".json":
                    shards = {part / name for name in json.loads(file.read_text())["weight_map"].values()}
                    files += sorted(shards.difference(files))
                else:
                    with safe_open(file, "pt"):
                        pass
            except Exception as error:  # each kind of file raises its own
                reason = (str(error) or repr(error)).splitlines()[0]
                problems.append(f"{flag}: {file} cannot be read ({reason}): copy or download it again")
    return problems


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
    """Whether a model's weights are split over the processes by `shard`."""
    return any(isinstance(parameter, DTensor) for parameter in model.parameters())


def reshard(model):
    """Lets a sharded model compute with its weights as they are after a change in place, not with gathered ones."""
    for module in model.modules() if isinstance(model, FSDPModule) else ():
        if isinstance(module, FSDPModule):
            module.reshard()


def count_weights(parameters):
    """The number of weights, sharded or not."""
    return sum(parameter.numel() for parameter in parameters)


def first_device(accelerator, args):
    """Where a transformer waits before training: on the CPU if its weights are to be split, for they may not fit."""
    return torch.device("cpu") if args.fsdp else accelerator.device


def check_processes(accelerator, args):
    """Problems of the kind and number of processes."""
    supported = (DistributedType.NO, DistributedType.MULTI_CPU, DistributedType.MULTI_GPU)
    problems, kind = [], accelerator.distributed_type
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


def whole(value):
    """A sharded parameter in full, which all processes must ask for; others as they are."""
    value = value.detach()
    return value.full_tensor() if isinstance(value, DTensor) else value


def local(parameter):
    """The part of a sharded parameter that this process holds; others as they are."""
    parameter = parameter.detach()
    return parameter.to_local() if isinstance(parameter, DTensor) else parameter


def start(args, handlers=()):
    """The Accelerator of a run, with `handlers` of accelerate's kwargs, and the dtype of the frozen models."""
    if args.local_rank != -1:
        os.environ.setdefault("LOCAL_RANK", str(args.local_rank))
    torch.backends.cuda.matmul.allow_tf32 = args.allow_tf32
    for library in (diffusers_logging, transformers_logging):
        library.set_verbosity_info() if args.verbose else library.disable_progress_bar()
    accelerator = Accelerator(
        cpu=not torch.accelerator.is_available(),  # else torchrun's processes would not know of each other there
        gradient_accumulation_steps=args.gradient_accumulation_steps,
        mixed_precision=args.mixed_precision,
        log_with=None if args.report_to == "none" else args.report_to,
        project_config=ProjectConfiguration(args.output_dir, logging_dir=args.output_dir / args.logging_dir),
        step_scheduler_with_optimizer=False,
        kwargs_handlers=list(handlers),
    )
    dtypes = {"fp16": torch.float16, "bf16": torch.bfloat16}
    return accelerator, dtypes.get(accelerator.mixed_precision, torch.float32)


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


def check_shared_flags(args):
    """Contradictions between flags that all or most trainers have, flags without effect, unreadable weights."""
    problems = []
    if args.dataset_config_name and not args.dataset_name:
        problems.append(f"--dataset_config_name {args.dataset_config_name} needs --dataset_name")
    if args.optimizer != "adamw" and args.use_8bit_adam:
        problems.append(f"--use_8bit_adam has no effect on --optimizer {args.optimizer}: leave one out")
    if args.optimizer == "prodigy" and args.learning_rate <= 0.1:
        problems.append(f"--learning_rate {args.learning_rate:g}: Prodigy finds the rate itself and wants about 1")
    if args.optimizer != "prodigy" and args.prodigy_beta3 is not None:
        problems.append(f"--prodigy_beta3 has no effect on --optimizer {args.optimizer}: leave it out")
    if args.mixed_precision == "fp16" and not torch.accelerator.is_available():
        problems.append("--mixed_precision fp16 needs a GPU: use bf16 or no")
    densities = ("logit_normal", "mode")
    if "timestep_sampling" in args and args.timestep_sampling != "sigma" and args.weighting_scheme in densities:
        problems.append(f"--weighting_scheme {args.weighting_scheme} has no effect without --timestep_sampling sigma")
    if "validation_epochs" in args and args.validation_steps and not args.validation_prompt:
        problems.append(f"--validation_steps {args.validation_steps} needs --validation_prompt")
    if "final_validation_prompt" in args and args.final_validation_prompt and args.skip_final_inference:
        problems.append("--final_validation_prompt has no effect with --skip_final_inference: leave one out")
    problems += check_prior_flags(args) if "with_prior_preservation" in args else []
    return problems + check_weights(args)


def check_prior_flags(args):
    """Problems of the flags of prior preservation."""
    problems, folder = [], args.class_data_dir
    if args.with_prior_preservation and not (folder and args.class_prompt):
        problems.append("--with_prior_preservation needs --class_data_dir and --class_prompt")
    if not args.with_prior_preservation and (folder or args.class_prompt):
        problems.append("--class_data_dir and --class_prompt have no effect without --with_prior_preservation")
    if args.prior_generation_precision in ("no", "fp32") and args.mixed_precision in ("fp16", "bf16"):
        precision = args.prior_generation_precision
        problems.append(f"--prior_generation_precision {precision}: the model is loaded in {args.mixed_precision}")
    if folder and folder.exists() and not folder.is_dir():
        problems.append(f"--class_data_dir {folder}: a file of this name is in the way")
    return problems
