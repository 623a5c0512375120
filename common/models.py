"""Models: loading, quantization, compilation, splitting over processes (FSDP2)."""

import argparse
import functools
import hashlib
import json
import logging
import math
import os
import re
import socket
import sys
import warnings
from collections.abc import Iterable
from contextlib import AbstractContextManager, nullcontext, suppress
from datetime import timedelta
from itertools import pairwise
from pathlib import Path
from typing import Any

from common.arguments import exit_if_unreadable

import torch
import torch.distributed as dist
from accelerate import Accelerator, PartialState
from accelerate.utils import DistributedType
from diffusers import AutoencoderKL, DiffusionPipeline, FlowMatchEulerDiscreteScheduler
from diffusers.models.attention_dispatch import attention_backend
from huggingface_hub import try_to_load_from_cache
from safetensors import safe_open
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor


# ---------------------------------------------------------------------------------------------------------------------
# Loading
# ---------------------------------------------------------------------------------------------------------------------


def load_model(
    model_class: Any, subfolder: str, args: argparse.Namespace, dtype: torch.dtype, *, beside: str | None = None
) -> Any:
    """A part of the pipeline that --pretrained_model_name_or_path names, frozen, on the CPU.

    Ends the run with exit code 2 if it cannot be read, if its file lacks weights, or if it holds some that the model
    does not have. Those whose names begin with `beside` may be there: the caller reads them.
    """
    with exit_if_unreadable(f"--pretrained_model_name_or_path {args.pretrained_model_name_or_path}: its {subfolder}"):
        model, loaded = model_class.from_pretrained(
            args.pretrained_model_name_or_path,
            subfolder=subfolder,
            revision=args.revision,
            variant=args.variant,
            cache_dir=args.cache_dir,
            dtype=dtype,
            use_safetensors=True,
            output_loading_info=True,
        )
        unexpected = [name for name in loaded["unexpected_keys"] if beside is None or not name.startswith(beside)]
        check_names(model, loaded["missing_keys"], unexpected)
    return model.requires_grad_(False)


def check_names(model: torch.nn.Module, missing: Iterable[str], unexpected: Iterable[str]) -> None:
    """Raises ValueError for weights that a model's file lacks, which would be random, and for those left unused."""
    name = type(model).__name__
    if missing:
        raise ValueError(f"its file lacks {first_of(missing)} of {name}")
    if unexpected:
        raise ValueError(f"its file holds {first_of(unexpected)}, which {name} does not have: another kind of model")


def first_of(names: Iterable[str]) -> str:
    """The first of some names, and how many others there are."""
    first, *others = sorted(names)
    return f"{first} and {len(others)} more" if others else first


def load_scheduler(args: argparse.Namespace) -> Any:
    """The FlowMatchEulerDiscreteScheduler of the pipeline that --pretrained_model_name_or_path names."""
    return FlowMatchEulerDiscreteScheduler.from_pretrained(
        args.pretrained_model_name_or_path, subfolder="scheduler", revision=args.revision, cache_dir=args.cache_dir
    )


def why_no_pipeline(source: str, kind: str, example: str, error: Exception) -> str:
    """What is wrong with a --pretrained_model_name_or_path of which reading raised an error, and the remedy.

    kind     what is needed, as a message calls it: a FLUX pipeline
    example  name of one on the Hub
    """
    path = Path(source)
    needed = f"needed is the folder of {kind} in diffusers' form, or a Hub id like {example}"
    if path.is_file():
        found = "a LoRA, which belongs to --lora_path" if is_lora(path) else "a single file"
        return f"{found}; {needed}"
    if (path / "model_index.json").is_file():
        with suppress(OSError, ValueError, AttributeError):
            found = json.loads((path / "model_index.json").read_text()).get("_class_name")
            return f"holds a {found} without a transformer; {needed}"
    if any(is_lora(file) for file in path.glob("*.safetensors")):
        return f"holds a LoRA, which belongs to --lora_path; {needed}"
    reason = f"neither a folder with {kind} nor a Hub id like {example}"
    if path.exists():
        return f"{reason}: it has no transformer/config.json"
    if re.fullmatch(r"[\w.-]+/[\w.-]+", source) and not source.startswith("."):
        return (
            f"neither a folder with {kind} nor a Hub id that can be read: for a gated model accept its terms at "
            f"https://huggingface.co/{source} and run `hf auth login`; without a network it must be here already "
            f"({str(error).splitlines()[0]})"
        )
    return reason


def is_lora(path: Path) -> bool:
    """Whether a file is a LoRA in safetensors, by the names of its tensors."""
    try:
        with safe_open(path, "pt") as file:
            return any("lora_" in key for key in file.keys())  # noqa: SIM118, it is no dict
    except Exception:  # safetensors raises a kind of its own beside OSError
        return False


def read_model_index(args: argparse.Namespace) -> dict[str, Any]:
    """The content of the model_index.json of --pretrained_model_name_or_path.

    Empty where that cannot be read: reading the transformer's config says why.
    """
    try:
        return DiffusionPipeline.load_config(  # type: ignore[return-value]
            args.pretrained_model_name_or_path, revision=args.revision, cache_dir=args.cache_dir
        )
    except (OSError, ValueError):
        return {}


def latent_channels(args: argparse.Namespace) -> int:
    """The channels of the latents of the VAE that --pretrained_model_name_or_path names, from its config.

    16, FLUX.1's, where that cannot be read: loading it says why.
    """
    try:
        config: dict[str, Any] = AutoencoderKL.load_config(  # type: ignore[assignment]
            args.pretrained_model_name_or_path, subfolder="vae", revision=args.revision, cache_dir=args.cache_dir
        )
        return config["latent_channels"]
    except (OSError, ValueError, KeyError):
        return 16


def prompt_width(args: argparse.Namespace) -> int:
    """The numbers per token of a prompt that the transformer of --pretrained_model_name_or_path takes, by its config.

    4096, those of T5-XXL, where that cannot be read, such as that of a single file.
    """
    try:
        config: dict[str, Any] = AutoencoderKL.load_config(  # type: ignore[assignment]
            args.pretrained_model_name_or_path,
            subfolder="transformer",
            revision=args.revision,
            cache_dir=args.cache_dir,
        )
    except (OSError, ValueError):
        return 4096
    return config.get("joint_attention_dim") or config.get("caption_channels") or 4096


# Beginnings of the names of a pipeline's folders: text_encoder_2
PARTS = ("transformer", "vae", "text_encoder", "tokenizer", "scheduler", "processor")


def model_identity(args: argparse.Namespace, part: str = "transformer") -> str:
    """Text that tells a part of --pretrained_model_name_or_path from those of other models: the name and the revision
    of one on the hub, or the `content_hash` of a local one."""
    path = Path(args.pretrained_model_name_or_path)
    if not path.exists():
        return f"{path} {args.revision or 'main'}"  # no commit: it changes with a word on the model's page
    return content_hash(path if path.is_file() else path / part)


def hub_commit(args: argparse.Namespace) -> str | None:
    """The commit to which a name on the hub points, as the local cache has it; None of a folder or a file."""
    if Path(args.pretrained_model_name_or_path).exists():
        return None
    found = try_to_load_from_cache(
        args.pretrained_model_name_or_path, "model_index.json", cache_dir=args.cache_dir, revision=args.revision
    )
    return Path(found).parent.name if isinstance(found, str) else None


def model_identities(args: argparse.Namespace, flags: Iterable[str] = ()) -> dict[str, str]:
    """{part: `model_identity`} of --pretrained_model_name_or_path, and {flag: text} of the models in `flags`, files,
    folders or names on the hub."""
    path = Path(args.pretrained_model_name_or_path)
    parts = ["transformer"]
    if path.is_dir():
        parts = sorted(part.name for part in path.iterdir() if part.is_dir() and part.name.startswith(PARTS))
    identities = {part: model_identity(args, part) for part in parts}
    for flag in flags:
        other = vars(args)[flag]
        if other is not None:
            identities[f"--{flag}"] = content_hash(Path(other)) if Path(other).exists() else str(other)
    return identities


def content_hash(path: Path) -> str:
    """A hash of pieces of a file, 256 of each, or of the files in a folder and below with their names, that is the
    same wherever they lie."""
    digest = hashlib.sha256()
    with exit_if_unreadable(path):  # it can vanish after the flags were checked
        files = [path] if path.is_file() else sorted(file for file in path.rglob("[!.]*") if file.is_file())
        for file in files:
            if file != path:
                digest.update(file.relative_to(path).as_posix().encode())
            size = file.stat().st_size
            digest.update(f" {size} ".encode())
            with file.open("rb") as opened:
                for start in range(0, size, max(4096, size // 256)):
                    opened.seek(start)
                    digest.update(opened.read(4096))
    return digest.hexdigest()


def check_weights(args: argparse.Namespace) -> list[str]:
    """Problems of the weights in a local folder of a pipeline; of each file only the header is read."""
    folder = Path(args.pretrained_model_name_or_path)
    if not (folder / "transformer" / "config.json").is_file():
        return []  # a name on the hub, or no pipeline
    problems = []
    for part in [folder / "transformer", folder / "vae", *sorted(folder.glob("text_encoder*"))]:
        for problem in weight_problems(part):
            problems.append(f"--pretrained_model_name_or_path {folder}: {problem}")
    return problems


def weight_problems(folder: Path) -> list[str]:
    """Problems of the .safetensors of one model, and of the files that its index names."""
    files = [*folder.glob("*.safetensors.index*.json"), *folder.glob("*.safetensors")]
    if not files:
        return [f"{folder} holds no .safetensors, the only weights that are read: save them in this format"]
    problems = []
    for file in files:  # grows by what an index names
        try:
            if file.suffix == ".json":
                named = {folder / name for name in json.loads(file.read_text())["weight_map"].values()}
                files += sorted(named.difference(files))
            else:
                with safe_open(file, "pt"):
                    pass
        except Exception as error:  # every file format raises its own exceptions
            reason = (str(error) or repr(error)).splitlines()[0]
            problems.append(f"{file} cannot be read ({reason}): copy or download it again")
    return problems


# ---------------------------------------------------------------------------------------------------------------------
# Precision
# ---------------------------------------------------------------------------------------------------------------------

DTYPES = {"no": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}  # by --mixed_precision


def choose_precision(requested: str | None, launched_with: str | None, *, has_bf16: bool) -> str:
    """The mixed precision of a run: what --mixed_precision requests, else what accelerate's launcher was told, else
    bf16 where the device computes in it, and "no", which is float32, elsewhere."""
    if requested or launched_with:
        return requested or launched_with or ""
    return "bf16" if has_bf16 else "no"


def resolve_precision(requested: str | None) -> str:
    """`choose_precision` for the launcher and the device of this process."""
    return choose_precision(requested, os.environ.get("ACCELERATE_MIXED_PRECISION"), has_bf16=has_bf16_gpu())


def has_bf16_gpu() -> bool:
    """Whether there is a GPU that computes in bfloat16 by itself. NVIDIA's do since Ampere; older ones emulate it."""
    if not torch.accelerator.is_available():
        return False
    device_type = torch.accelerator.current_accelerator().type  # type: ignore[union-attr]
    if device_type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    is_supported = getattr(torch.get_device_module(device_type), "is_bf16_supported", None)
    return is_supported is not None and is_supported()


# ---------------------------------------------------------------------------------------------------------------------
# Moving
# ---------------------------------------------------------------------------------------------------------------------


def to_device(value: Any, device: torch.device | str) -> Any:
    """A tensor, or those in a dict, on a device; the program does not wait for a copy to a GPU, from pinned memory.

    It waits for a copy to the CPU, whose numbers could be read before they are there.
    """
    device = torch.device(device)
    if isinstance(value, dict):
        return {name: to_device(each, device) for name, each in value.items()}
    if device.type == "cuda" and value.device.type == "cpu":
        value = value.pin_memory()
    leaves = device.type == "cpu" and value.device.type != "cpu"
    return value.to(device, non_blocking=not leaves)


# ---------------------------------------------------------------------------------------------------------------------
# Quantization and compilation
# ---------------------------------------------------------------------------------------------------------------------

QUANTIZATIONS = ("none", "nf4", "int8", "fp8")


def repeated_blocks(model: torch.nn.Module) -> list[torch.nn.Module]:
    """The blocks of a diffusers transformer, such as FLUX.1's double and single ones.

    They are those of the classes that the model names as `_repeated_blocks`, or what is in lists called `...blocks`.
    Raises ValueError for a model that has neither: nothing of it would be quantized, compiled or sharded.
    """
    classes = getattr(model, "_repeated_blocks", None)
    blocks = []
    if classes:
        for module in model.modules():
            if any(kind.__name__ in classes for kind in type(module).__mro__):  # Omini's blocks are FLUX.1's, extended
                blocks.append(module)
    else:
        for name, module in model.named_children():
            if name.endswith("blocks"):
                blocks += list(module.children())
    if not blocks:
        raise ValueError(f"{type(model).__name__} has no repeated blocks")
    return blocks


def quantize_base(model: torch.nn.Module, dtype: torch.dtype, quantization: str = "nf4") -> torch.nn.Module:
    """Quantizes the linear layers in a frozen model's blocks, in place.

    nf4: 4-bit NormalFloat by bitsandbytes (arXiv 2305.14314); without a GPU weights shrink when the model is moved to
    its device. int8, fp8: see `EightBitLinear`. The layers compute in `dtype`, as plain ones do under autocast. A LoRA
    that is in the model already stays as it is.
    """
    for block in repeated_blocks(model):
        for name, layer in list(block.named_modules()):
            if isinstance(layer, torch.nn.Linear) and "lora_" not in name:
                parent, _, attribute = name.rpartition(".")
                setattr(block.get_submodule(parent), attribute, quantized_layer(layer, dtype, quantization))
    return model


def to_gpu(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor on this process's GPU, where there is one: it quantizes a large model in seconds."""
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    return tensor if accelerator is None or tensor.is_meta else tensor.to(accelerator)


def quantized_layer(
    layer: torch.nn.Linear, dtype: torch.dtype, quantization: str, storage: torch.dtype = torch.uint8
) -> torch.nn.Module:
    """A layer with the weight of a linear one in 4 or 8 bits, and its bias, where the linear one is.

    `storage` is the dtype that 4-bit weights pretend to have: T5 casts what enters a layer to that of its weight.
    """
    if quantization != "nf4":
        multiplies = multiplies_8_bits(quantization, dtype, nvidia_capability())
        return EightBitLinear(layer, dtype, quantization, multiplies and has_8_bit_kernel(quantization, dtype))
    from bitsandbytes.nn import Linear4bit, Params4bit

    form: Any = {"quant_type": "nf4", "quant_storage": storage}
    has_bias = layer.bias is not None
    new: Any = Linear4bit(layer.in_features, layer.out_features, has_bias, compute_dtype=dtype, device="meta", **form)
    weight: Any = Params4bit(layer.weight.data, requires_grad=False, **form)
    packed: Any = to_gpu(weight)
    new.weight = packed.to(layer.weight.device) if packed is not weight else weight
    new.support_avx512bf16_for_cpu = False  # validation would leave weights in a form that gives no gradients
    new.register_forward_pre_hook(lambda layer, args: args[0].to(dtype))  # the output has the dtype of the input
    new.bias = layer.bias
    return new


class EightBitLinear(torch.nn.Linear):
    """A frozen linear layer with a weight in 8 bits and a scale for each of its rows.

    int8: whole numbers, as LLM.int8() rounds them (arXiv 2208.07339); fp8: float8 e4m3 (arXiv 2209.05433).
    `multiplies`: its input is rounded too, row by row, and the GPU multiplies numbers of 8 bits; else the weight is
    turned into `dtype` for each product. The backward pass always does the latter: gradients rounded to 8 bits would
    add noise in every block on the way back, and their product would need a transposed copy of the weight.
    """

    def __init__(self, layer: torch.nn.Linear, dtype: torch.dtype, quantization: str, multiplies: bool):
        super().__init__(layer.in_features, layer.out_features, bias=False, device="meta")
        weight = layer.weight.data
        rounded, scale = round_rows(to_gpu(weight), quantization)
        # PEFT gives adapters the dtype of a weight if it is one of floating point
        self.weight = torch.nn.Parameter(rounded.view(torch.int8).to(weight.device), requires_grad=False)
        self.scale = torch.nn.Parameter(scale.to(weight.device), requires_grad=False)  # [out, 1]
        self.bias = layer.bias
        self.compute_dtype = dtype
        self.weight_dtype = rounded.dtype
        self.multiplies = (
            multiplies and layer.in_features % 16 == 0 and layer.out_features % 16 == 0
        )  # as kernels need

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """[..., in] -> [..., out], in the layer's `dtype`."""
        bias = None if self.bias is None else self.bias.to(self.compute_dtype)
        weight = self.weight.view(self.weight_dtype)
        # modulations have a row for each image: so few that nothing is gained, and less than the GPU takes
        multiplies = self.multiplies and input.numel() > 16 * self.in_features
        return EightBitProduct.apply(input.to(self.compute_dtype), weight, self.scale, bias, multiplies)


class EightBitProduct(torch.autograd.Function):
    """The product of an input [..., in] and a weight [out, in] in 8 bits, all that is kept for the backward pass."""

    @staticmethod
    def forward(ctx, input, weight, scale, bias, multiplies):
        ctx.save_for_backward(weight, scale)
        if multiplies:
            output = multiply_8_bits(input.reshape(-1, input.shape[-1]), weight, scale, bias)
            return output.reshape(*input.shape[:-1], -1)
        return torch.nn.functional.linear(input, weight.to(input.dtype).mul_(scale), bias)

    @staticmethod
    def backward(ctx, gradient):
        weight, scale = ctx.saved_tensors
        return gradient @ weight.to(gradient.dtype).mul_(scale), None, None, None, None


def round_rows(rows: torch.Tensor, quantization: str) -> tuple[torch.Tensor, torch.Tensor]:
    """([N, D] in 8 bits, float32 scales [N, 1]), whose product is close to `rows` [N, D]."""
    if quantization == "int8":
        from bitsandbytes.functional import int8_vectorwise_quant

        rounded, largest, _ = int8_vectorwise_quant(rows.to(torch.float16))
        return rounded, largest[:, None] * (1.0 / 127.0)
    scale = row_scale(rows, torch.float8_e4m3fn)
    return (rows / scale).to(torch.float8_e4m3fn), scale


def row_scale(rows: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Scales [N, 1] by which rows [N, D] are divided so that the largest number of a row is that of a dtype."""
    largest = torch.iinfo(dtype).max if dtype == torch.int8 else torch.finfo(dtype).max
    return rows.abs().amax(dim=1, keepdim=True).float().clamp(min=1e-12) / largest


def multiply_8_bits(
    rows: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor, bias: torch.Tensor | None
) -> torch.Tensor:
    """Rows [N, in] times a weight [out, in] in 8 bits, to whose dtype they are rounded; in the dtype of the rows."""
    scale_of_rows = row_scale(rows, weight.dtype)
    divided = rows / scale_of_rows
    if weight.dtype == torch.int8:
        sums = torch._int_mm(divided.round().to(torch.int8), weight.t())  # int32
        output = (sums * scale_of_rows).mul_(scale.t()).to(rows.dtype)
    else:
        output = torch._scaled_mm(
            divided.to(weight.dtype),
            weight.t(),
            scale_a=scale_of_rows,
            scale_b=scale.t(),
            out_dtype=rows.dtype,
            use_fast_accum=True,
        )
    return output if bias is None else output + bias


def nvidia_capability() -> tuple[int, int] | None:
    """The compute capability of this process's GPU, such as (8, 9); None without one of NVIDIA."""
    if torch.version.cuda is None or not torch.cuda.is_available():
        return None
    return torch.cuda.get_device_capability()


def multiplies_8_bits(quantization: str, dtype: torch.dtype, capability: tuple[int, int] | None) -> bool:
    """Whether a GPU multiplies numbers of 8 bits: int8 from Turing on; fp8, with results in bf16, from Ada on."""
    if capability is None:
        return False
    if quantization == "int8":
        return capability >= (7, 5)
    return capability >= (8, 9) and dtype == torch.bfloat16


@functools.cache
def has_8_bit_kernel(quantization: str, dtype: torch.dtype, device: str = "cuda") -> bool:
    """Whether torch multiplies numbers of 8 bits on a GPU that can: its kernels are not built for every one."""
    rows = torch.ones(32, 32, dtype=dtype, device=device)
    weight, scale = round_rows(rows, quantization)
    try:
        error = (multiply_8_bits(rows, weight, scale, None) - 32).abs().max().item()
    except RuntimeError:
        error = math.inf
    if error < 1:
        return True
    if os.environ.get("RANK", "0") == "0":
        text = f"--quantize_base {quantization}: this torch cannot multiply 8 bits on this GPU, steps are slower"
        print(text, file=sys.stderr)
    return False


# diffusers' names of those that have a backward pass; its others are for inference, or fetch code from the Hub
ATTENTION_BACKENDS = (
    *("native", "_native_flash", "_native_efficient", "_native_cudnn", "_native_math"),
    *("flash", "xformers"),
)
WITHOUT_MASK = ("_native_flash", "flash")
IN_16_BITS = ("_native_flash", "_native_cudnn", "flash")


def check_attention(args: argparse.Namespace) -> list[str]:
    """Problems of --attention_backend: a package that is not installed, a GPU or precision that it needs."""
    backend = args.attention_backend
    if backend is None:
        return []
    try:
        with use_attention(backend):
            pass
    except RuntimeError as error:  # diffusers names the package
        return [f"--attention_backend {backend}: {error}"]
    problems = []
    if backend not in ("native", "_native_math") and not torch.cuda.is_available():
        problems.append(f"--attention_backend {backend} needs a CUDA GPU: leave it out")
    if backend in IN_16_BITS and args.mixed_precision == "no":
        problems.append(f"--attention_backend {backend} computes in 16 bits: give --mixed_precision bf16")
    return problems


def use_attention(backend: str | None) -> AbstractContextManager:
    """Within it, diffusers' models compute attention by one of ATTENTION_BACKENDS; None: as without it."""
    return nullcontext() if backend is None else attention_backend(backend)


# Compilations of a class of blocks, after which new sizes run uncompiled. torch stops at 8, which a few bucket sizes,
# batch sizes and steps without adapter or gradients reach.
RECOMPILE_LIMIT = 64


def compile_blocks(model: torch.nn.Module, backend: str = "inductor") -> None:
    """torch.compile of a transformer's blocks, in place: blocks of one class share one compilation.

    The first is for one size, the fastest; where a second size comes, tokens or samples become dynamic and the next
    sizes need none. `backend` is one of torch.compile's.
    """
    dynamo: Any = torch._dynamo
    dynamo.config.recompile_limit = max(RECOMPILE_LIMIT, dynamo.config.recompile_limit)
    logging.getLogger("torch._dynamo.convert_frame").addFilter(say_not_compiled)
    for block in repeated_blocks(model):
        block.compile(backend=backend)


def say_not_compiled(record: logging.LogRecord) -> bool:
    """Puts one line in place of what torch logs of a block that is compiled no more; a filter of its logger."""
    if "recompile" not in record.getMessage() or not record.args:
        return True
    if os.environ.get("RANK", "0") == "0":
        _, limit, function = record.args[:3]  # type: ignore[index]
        print(
            f"\n--compile: {function} was compiled {limit} times and runs uncompiled, slower, where sizes are new",
            file=sys.stderr,
            flush=True,
        )
    return False


# ---------------------------------------------------------------------------------------------------------------------
# Splitting over processes (FSDP2)
# ---------------------------------------------------------------------------------------------------------------------


def processes_per_machine() -> int:
    """The processes of this machine, as the launcher says it; without one, all."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", dist.get_world_size()))


def shard(
    transformer: torch.nn.Module,
    device: torch.device,
    dtype: torch.dtype,
    *,
    hybrid: bool = False,
    kept_in: torch.dtype | None = None,
) -> None:
    """Splits the weights of each block over the processes (FSDP2), in place.

    A block is gathered while it computes, in `dtype`, on `device`. The parameters are new objects (DTensor)
    afterwards, so an optimizer is made after this. With `kept_in` they have this dtype then: a block gets it just
    before it is split, so that no process ever holds the whole model in it.

    `hybrid`: over the processes of a machine, so that weights do not travel between machines, but the sums of their
    gradients (HSDP). Each machine holds the whole model.
    """
    # FLUX.1's blocks return slices; nothing writes into them in place, of which this warns
    warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view")
    num_processes = dist.get_world_size()
    mesh = init_device_mesh(device.type, (num_processes,))
    if hybrid:
        shape = (num_processes // processes_per_machine(), processes_per_machine())
        mesh = init_device_mesh(device.type, shape, mesh_dim_names=("replicate", "shard"))
    policy = MixedPrecisionPolicy(
        param_dtype=dtype if dtype != torch.float32 else None,
        reduce_dtype=torch.float32,
        cast_forward_inputs=False,  # times and positions stay in float32
    )
    for module in [*repeated_blocks(transformer), transformer]:
        for parameter in module.parameters():
            if kept_in is not None and parameter.dtype != kept_in:
                parameter.data = parameter.data.to(device).to(kept_in)
        fully_shard(module, mesh=mesh, mp_policy=policy, reshard_after_forward=True)


def is_sharded(model: torch.nn.Module) -> bool:
    """Whether `shard` has split the model's weights."""
    return any(isinstance(parameter, DTensor) for parameter in model.parameters())


def reshard(model: torch.nn.Module) -> None:
    """Drops gathered weights, so that a sharded model sees a change of its own weights in place."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def full_tensor(value: torch.Tensor) -> torch.Tensor:
    """A sharded parameter gathered from all processes, which all must call; any other one as it is."""
    value = value.detach()
    return value.full_tensor() if isinstance(value, DTensor) else value


def own_part(value: torch.Tensor) -> torch.Tensor:
    """What this process holds of a sharded tensor; any other one as it is."""
    return value.to_local() if isinstance(value, DTensor) else value


# How long processes wait for one that encodes, draws class images, writes or hashes longer than they do; the default,
# 10 minutes with GPUs, would end the run. The launcher notices one that has died at once.
PROCESS_TIMEOUT = timedelta(hours=6)


@functools.cache
def cpu_group() -> Any:
    """The group of all processes for what travels through CPU memory."""
    return dist.new_group(backend="gloo", timeout=PROCESS_TIMEOUT)


@functools.cache
def machine_group() -> Any:
    """`cpu_group` of this machine's processes alone; the first call is one of all processes."""
    first = dist.get_rank() - PartialState().local_process_index
    firsts = sorted(set(gather_objects([first])))
    ranks = [list(range(*bounds)) for bounds in pairwise([*firsts, dist.get_world_size()])]
    group, _ = dist.new_subgroups_by_enumeration(ranks, backend="gloo", timeout=PROCESS_TIMEOUT)
    return group


def disk_group(accelerator: Accelerator) -> Any:
    """The processes that share --output_dir: all, or with --save_on_each_node those of a machine; None for one."""
    if not dist.is_initialized():
        return None
    return machine_group() if accelerator.project_configuration.save_on_each_node else cpu_group()


def place_on_disk(accelerator: Accelerator) -> tuple[int, int]:
    """(place, number) of this process among those that share --output_dir; the one at place 0 writes what is written
    once for all of them."""
    if not dist.is_initialized():
        return 0, 1
    group = disk_group(accelerator)
    return dist.get_rank(group), dist.get_world_size(group)


def writes_files(accelerator: Accelerator) -> bool:
    """Whether this process writes what is written once on a disk: of all processes one, or one on each machine."""
    return place_on_disk(accelerator)[0] == 0


def own_items(accelerator: Accelerator, items: list) -> list:
    """This process' part of work whose results go to files: accelerate's `split_between_processes`, but among those
    that share --output_dir. Part after part, in the order of the processes, they are all items."""
    place, number = place_on_disk(accelerator)
    size, rest = divmod(len(items), number)
    start = place * size + min(place, rest)
    return items[start : start + size + (place < rest)]


OBJECTS_PER_MESSAGE = 1000


def gather_objects(objects: list, group: Any = None) -> list:
    """The objects of all processes, or of a group, in one list, in the order of the processes; all of them call it.

    They are pickled and travel through CPU memory, where accelerate's gather_object takes that of the GPU. For what
    is small, as names, sizes and problems are: a message has OBJECTS_PER_MESSAGE of a process.
    """
    if not dist.is_initialized():
        return objects
    group = group or cpu_group()
    lengths = [0] * dist.get_world_size(group)
    dist.all_gather_object(lengths, len(objects), group=group)
    gathered: list[list] = [[] for _ in lengths]
    for start in range(0, max(lengths), OBJECTS_PER_MESSAGE):
        parts: list[list] = [[]] * len(lengths)
        dist.all_gather_object(parts, objects[start : start + OBJECTS_PER_MESSAGE], group=group)
        for own, part in zip(gathered, parts, strict=True):
            own += part
    return [each for own in gathered for each in own]


def gather_problems(problems: list[str]) -> list[str]:
    """The problems of all processes, each once; to be called by all of them.

    A machine's disk, data or checkpoint may have a problem that others have not: else its processes would end alone,
    without a message, and the others wait for them. Such a problem gets the names of its machines.
    """
    host = socket.gethostname()
    num_hosts = len(set(gather_objects([host])))
    hosts: dict[str, dict[str, None]] = {}  # of each problem, in the order of the processes
    for problem, at in gather_objects([(problem, host) for problem in problems]):
        hosts.setdefault(problem, {})[at] = None
    return [problem if len(at) == num_hosts else f"{problem} (on {', '.join(at)})" for problem, at in hosts.items()]


NOT_SUPPORTED = (
    "not supported, choose multi-GPU without it in accelerate config and --fsdp for memory, which splits weights, "
    "gradients and optimizer over the processes (FSDP2)"
)


def check_launcher(args: argparse.Namespace) -> list[str]:
    """Problems of accelerate's configuration of which its Accelerator would say nothing but that a package lacks."""
    problems = []
    if os.environ.get("ACCELERATE_USE_DEEPSPEED", "").lower() in ("true", "1"):
        problems.append(f"DEEPSPEED: {NOT_SUPPORTED}")
    if args.mixed_precision not in DTYPES:
        problems.append(
            f"mixed precision {args.mixed_precision} of accelerate's config is not supported: --mixed_precision bf16"
        )
    return problems


def check_processes(accelerator: Accelerator, args: argparse.Namespace) -> list[str]:
    """Problems of the launcher's settings, and of flags that do not work together with --fsdp."""
    problems = []
    if args.hybrid_shard and args.fsdp and dist.is_initialized():
        counts = set(gather_objects([processes_per_machine()]))
        if len(counts) > 1:
            numbers = " and ".join(map(str, sorted(counts)))
            problems.append(f"--hybrid_shard needs as many processes on every machine: there are {numbers}")
    launched_as = accelerator.distributed_type
    if launched_as not in (DistributedType.NO, DistributedType.MULTI_CPU, DistributedType.MULTI_GPU):
        problems.append(f"{launched_as.value}: {NOT_SUPPORTED}")
    if not args.fsdp:
        return problems
    if launched_as == DistributedType.NO:  # torchrun's may be one, to continue what several have saved
        problems.append("--fsdp needs more than one process: accelerate launch --num_processes N")
    is_on_machines = dist.is_initialized() and accelerator.num_processes > processes_per_machine()
    if is_on_machines and accelerator.project_configuration.save_on_each_node and not args.hybrid_shard:
        problems.append(
            "--save_on_each_node: with --fsdp alone a machine holds a part of each weight, which nobody can resume "
            "from: add --hybrid_shard, or leave it out and give all machines one --output_dir on a shared disk"
        )
    if accelerator.scaler is not None:
        problems.append("--mixed_precision fp16 does not work with --fsdp: use bf16")
    if args.optimizer == "prodigy":
        problems.append("--optimizer prodigy does not work with --fsdp: use adamw")
    if args.blocks_to_swap:
        problems.append(
            f"--blocks_to_swap {args.blocks_to_swap} does not work with --fsdp, which shares the weights among the "
            "processes: leave one out"
        )
    if args.use_8bit_adam:
        problems.append("--use_8bit_adam does not work with --fsdp: leave one out")
    if args.quantize_base != "none":
        problems.append(f"--quantize_base {args.quantize_base} does not work with --fsdp: leave one out")
    if args.use_dora and args.mixed_precision == "bf16":
        problems.append(
            "--use_dora does not work with --fsdp in bf16, to which it would round the magnitudes: leave one out, or "
            "give --mixed_precision no"
        )
    return problems
