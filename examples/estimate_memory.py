"""How much memory a training run will need on each GPU, found without a GPU and without the model's weights.

    python examples/estimate_memory.py --model FLUX.1-dev --resolution 1024 --gradient_checkpointing --cache_latents

Flags are those of the trainers. --table prints what fits in 12 to 80 GB.

The model is the real class in its real size; its tensors have shapes but no memory (FakeTensorMode). It makes a step
as the trainers do, with adapters, autocast, checkpointing and quantized layers, while the bytes of all tensors alive
are counted, so that activations are what autograd does keep. The optimizer is measured on a few real parameters.
"""

import argparse
import sys
import weakref
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from unittest.mock import patch

import diffusers
import torch
import transformers
from bitsandbytes.functional import quantize_4bit
from bitsandbytes.nn import Params4bit
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


sys.path.insert(0, str(Path(__file__).parents[1]))

from common.latents import encode_images
from common.lora import FLUX_TARGET_MODULES, add_lora, create_optimizer, quantize_base
from train_twinflow import BACKBONES, add_target_time


GIB = 2**30
CARDS = (12, 16, 24, 40, 80)  # GB
RESERVE = 1.0  # GiB of a card for the driver, cuBLAS and the gaps between tensors
DTYPES = {"no": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
# What the memory of a step does not depend on, as create_optimizer wants it.
OPTIMIZER = {
    **{"learning_rate": 1.0, "adam_weight_decay": 0.0, "adam_beta1": 0.9, "adam_beta2": 0.999, "adam_epsilon": 1e-8},
    **{"prodigy_beta3": None, "prodigy_decouple": True, "prodigy_use_bias_correction": True},
    "prodigy_safeguard_warmup": True,
}


# ---------------------------------------------------------------------------------------------------------------------
# Models
# ---------------------------------------------------------------------------------------------------------------------


@dataclass
class Model:
    """The parts of a pipeline; parts are functions that build them."""

    backbone: str  # of train_twinflow: how the transformer is called
    transformer: type
    config: dict
    conditions: dict  # shapes without the batch dimension
    text_encoders: tuple
    vae: object
    channels: int = 16  # of what the transformer is given, before packing
    targets: tuple = FLUX_TARGET_MODULES


def clip(kind, width, layers, heads):
    config = transformers.CLIPTextConfig(
        hidden_size=width,
        intermediate_size=4 * width,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        projection_dim=width,
    )
    return kind(config)


def clip_l():
    return clip(transformers.CLIPTextModel, 768, 12, 12)


def clip_g():
    return clip(transformers.CLIPTextModelWithProjection, 1280, 32, 20)


def t5_xxl():
    config = transformers.T5Config(
        d_model=4096, d_kv=64, d_ff=10240, num_layers=24, num_heads=64, feed_forward_proj="gated-gelu"
    )
    return transformers.T5EncoderModel(config)


def gemma2():
    return transformers.Gemma2Model(transformers.Gemma2Config())


def qwen25_vl():
    text = {"hidden_size": 3584, "intermediate_size": 18944, "num_hidden_layers": 28}
    text |= {"num_attention_heads": 28, "num_key_value_heads": 4}
    vision = {"hidden_size": 1280, "out_hidden_size": 3584}
    config = transformers.Qwen2_5_VLConfig(text_config=text, vision_config=vision)
    return transformers.Qwen2_5_VLForConditionalGeneration(config)


def kl_vae():
    return diffusers.AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(128, 256, 512, 512),
        layers_per_block=2,
        latent_channels=16,
        shift_factor=0.1159,
        use_quant_conv=False,
        use_post_quant_conv=False,
    )


def sana_vae():
    blocks = ("ResBlock",) * 3 + ("EfficientViTBlock",) * 3
    return diffusers.AutoencoderDC(encoder_block_types=blocks, decoder_block_types=blocks)


FLUX_CONDITIONS = {"encoder_hidden_states": (512, 4096), "pooled_projections": (768,)}
MODELS = {
    "FLUX.1-dev": Model(
        "flux",
        diffusers.FluxTransformer2DModel,
        {"guidance_embeds": True},
        FLUX_CONDITIONS,
        (clip_l, t5_xxl),
        kl_vae,
    ),
    "FLUX.1-Fill-dev": Model(
        "flux",
        diffusers.FluxTransformer2DModel,
        {"guidance_embeds": True, "in_channels": 384, "out_channels": 64},
        FLUX_CONDITIONS,
        (clip_l, t5_xxl),
        kl_vae,
        channels=96,
    ),
    "SD3.5-medium": Model(
        "sd3",
        diffusers.SD3Transformer2DModel,
        {
            **{"num_layers": 24, "num_attention_heads": 24, "caption_projection_dim": 1536, "qk_norm": "rms_norm"},
            **{"pos_embed_max_size": 384, "dual_attention_layers": tuple(range(13))},
        },
        {"encoder_hidden_states": (77 + 256, 4096), "pooled_projections": (2048,)},
        (clip_l, clip_g, t5_xxl),
        kl_vae,
        targets=BACKBONES["sd3"].targets,
    ),
    "Sana-1.6B": Model(
        "sana",
        diffusers.SanaTransformer2DModel,
        {},
        {"encoder_hidden_states": (300, 2304), "encoder_attention_mask": (300,)},
        (gemma2,),
        sana_vae,
        channels=32,
        targets=BACKBONES["sana"].targets,
    ),
    "Qwen-Image": Model(
        "qwenimage",
        diffusers.QwenImageTransformer2DModel,
        {},
        {"encoder_hidden_states": (512, 3584), "encoder_hidden_states_mask": (512,)},
        (qwen25_vl,),
        diffusers.AutoencoderKLQwenImage,
        targets=BACKBONES["qwenimage"].targets,
    ),
}


# ---------------------------------------------------------------------------------------------------------------------
# Counting
# ---------------------------------------------------------------------------------------------------------------------


class LiveMemory(TorchDispatchMode):
    """Counts the bytes of the storages that come to be within the context: `live` now, `peak` at most."""

    def __init__(self):
        super().__init__()
        self.live = self.peak = 0
        self.known = weakref.WeakSet()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor) and tensor.untyped_storage() not in self.known:
                storage = tensor.untyped_storage()
                self.known.add(storage)
                self.live += storage.nbytes()
                weakref.finalize(storage, self.release, storage.nbytes())
        self.peak = max(self.peak, self.live)
        return result

    def release(self, count):
        self.live -= count


class FusedRMSNorm(torch.autograd.Function):
    """The shapes of a GPU's kernel, which keeps its input and one number per row."""

    @staticmethod
    def forward(ctx, x, weight):
        ctx.save_for_backward(x, x.new_empty(x.shape[:-1]), weight)
        return torch.empty_like(x)

    @staticmethod
    def backward(ctx, gradient):
        weight = ctx.saved_tensors[2]
        return torch.empty_like(gradient), None if weight is None else torch.empty_like(weight)


def as_on_gpu():
    """A context in which a step keeps what it does on a GPU: there autocast computes norms in float32, and RMSNorm is
    one kernel."""

    def upcast(tensor):
        return tensor.float() if isinstance(tensor, torch.Tensor) and torch.is_autocast_enabled("cpu") else tensor

    def in_float32(function):
        return lambda *args, **kwargs: function(*map(upcast, args), **{k: upcast(v) for k, v in kwargs.items()})

    def rms_norm(x, shape, weight=None, eps=None):
        return FusedRMSNorm.apply(upcast(x), upcast(weight))

    norms = {name: in_float32(getattr(torch.nn.functional, name)) for name in ("layer_norm", "group_norm")}
    return patch.multiple(torch.nn.functional, rms_norm=rms_norm, **norms)


def convert(module, change):
    """Replaces parameters and buffers by change(tensor)."""
    for part in module.modules():
        for tensors in (part._parameters, part._buffers):
            tensors |= {name: change(tensor) for name, tensor in tensors.items() if tensor is not None}


def allocate(tensor):
    """A fake tensor like one that is on the meta device, quantized if that is what it is for."""
    fake = torch.empty(tensor.shape, dtype=tensor.dtype)
    if isinstance(tensor, Params4bit):
        packed, state = quantize_4bit(
            fake, quant_type=tensor.quant_type, compress_statistics=tensor.compress_statistics
        )
        fake = torch.nn.Parameter(packed, requires_grad=False)
        fake.quant_state = state
        return fake
    return torch.nn.Parameter(fake, tensor.requires_grad) if isinstance(tensor, torch.nn.Parameter) else fake


def build(create, dtype, fake, adapt=lambda module: None):
    """A frozen module in `dtype` with tensors that have no memory, after adapt(module) changed it on the meta device."""

    def to_meta(tensor):
        kind = dtype if tensor.is_floating_point() else tensor.dtype
        new = torch.empty(tensor.shape, dtype=kind, device="meta")
        return torch.nn.Parameter(new, requires_grad=False) if isinstance(tensor, torch.nn.Parameter) else new

    with fake:
        module = create()
    convert(module, to_meta)
    adapt(module)
    with fake:
        convert(module, allocate)
    return module


def optimizer_bytes(args):
    """(state, what a step needs besides) of the optimizer in bytes per trained number, from a step on real ones."""
    with LiveMemory() as memory:
        parameters = [torch.nn.Parameter(torch.zeros(256, 1024)) for _ in range(8)]
        for parameter in parameters:
            parameter.grad = torch.ones_like(parameter)
        optimizer = create_optimizer(args, parameters)
        for group in optimizer.param_groups:
            group["foreach"] = args.device == "cuda"  # there all parameters at once, on a CPU one after the other
        before = memory.live
        optimizer.step()
        after = memory.peak = memory.live
        optimizer.step()
    count = sum(parameter.numel() for parameter in parameters)
    return (after - before) / count, (memory.peak - after) / count


def training_step(model, args):
    """{what: bytes} of a step on one device: weights, LoRA, gradients, activations, and the most at once."""
    dtype = DTYPES[args.mixed_precision]
    full, size = args.training == "full", args.train_batch_size
    backbone = BACKBONES[model.backbone](args)
    backbone.guidance = 1.0 if model.config.get("guidance_embeds") else None

    def adapt(transformer):
        if full:
            add_target_time(transformer, backbone.time_module, "copy")
            transformer.requires_grad_(True)
            return
        if args.quantize_base != "none":
            quantize_base(transformer, dtype)
        add_lora(transformer, rank=args.rank, alpha=args.rank, dropout=0.0, target_modules=model.targets)

    fake = FakeTensorMode(allow_non_fake_inputs=True)
    with LiveMemory() as memory, as_on_gpu() if args.device == "cuda" else nullcontext():
        transformer = build(lambda: model.transformer(**model.config), torch.float32 if full else dtype, fake, adapt)
        trained = sum(parameter.nbytes for parameter in transformer.parameters() if parameter.requires_grad)
        if args.gradient_checkpointing:
            transformer.enable_gradient_checkpointing()
        transformer.train()
        with fake:
            side = args.resolution // backbone.factor
            x = torch.empty(size, model.channels, side, side, dtype=dtype)
            conditions = {name: torch.empty(size, *shape, dtype=dtype) for name, shape in model.conditions.items()}
            weights = memory.peak = memory.live
            with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
                time = torch.rand(size, 2) if full else torch.rand(size)
                prediction = backbone.predict(transformer, x, time, conditions)
            loss = prediction.float().square().mean()
            del prediction
            activations = memory.live - weights
            loss.backward()
    rows = {"weights": weights - trained, "LoRA": trained, "gradients": trained, "activations": activations}
    if full:
        rows |= {"weights": weights, "LoRA": 0}
    return rows | {"step": memory.peak}


def estimate(model, args):
    """{what: bytes} of a run of `model` with these flags, on each device."""
    rows = training_step(model, args)
    return rows
