"""How much memory a training run will need on each GPU, in RAM and on disk, found without a GPU and without weights.

    python examples/estimate_memory.py --model FLUX.1-dev --resolution 1024 --gradient_checkpointing --cache_latents

Flags are those of the trainers. Or put a whole training command behind it, whose other flags are passed over:

    python examples/estimate_memory.py train_omini.py @examples/omini/low_memory.args --instance_data_dir photos ...

--table prints what fits in 12 to 80 GB. With several processes it also says what a step sends over the network;
--network_table prints that for 8 to 512 GPUs and common links.

The models are the real classes in their real size; their tensors have shapes but no memory (FakeTensorMode). They
encode prompts and images, make a step as the trainers do, with adapters, autocast, checkpointing and quantized layers,
and draw, while the bytes of all tensors alive are counted, so that activations are what autograd does keep. The
optimizer is measured on a few real parameters.
"""

import argparse
import functools
import math
import re
import sys
import warnings
import weakref
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from unittest.mock import patch


sys.path.insert(0, str(Path(__file__).parents[1]))


# isort: split
from common.arguments import Parser, comma_list, in_range
from common.block_swap import spread
from common.data import check_buckets, parse_buckets
from common.latents import VIDEO_VAES, encode_images, encode_moments, pack_latents, unpack_latents
from common.lora import (
    FLUX_TARGET_MODULES,
    adapter_kind,
    adapter_options,
    add_lora,
    block_layers,
    check_adapter,
    unknown_layers,
)
from common.models import DTYPES, QUANTIZATIONS, check_processes, quantize_base, repeated_blocks, shard
from common.text_encoders import PROMPTS_PER_BATCH, PROMPTS_PER_PASS, TEXT_QUANTIZATIONS, quantize_language_model

import bitsandbytes
import diffusers
import torch
import transformers
from accelerate import DistributedType
from bitsandbytes.functional import quantize_4bit, quantize_blockwise
from bitsandbytes.nn import Params4bit
from peft.tuners.lokr.layer import LoKrLayer
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed.tensor import DTensor
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import train_dreambooth_flux_advanced
import train_influxedit
import train_omini
import train_twinflow
from train_twinflow import BACKBONES


GIB = 2**30
CARDS = (12, 16, 24, 40, 80)  # GiB, as they are sold
# Of a card beside the tensors: the driver's context and the libraries' workspaces, and the gaps between tensors that
# PyTorch's allocator leaves.
CONTEXT = 1.0  # GiB
GAPS = 0.12  # of the tensors
# RAM of a process of its own with a GPU: Python, the libraries' code and tables, the driver's copy of the context
PROCESS_RAM = 3.0  # GiB


# ---------------------------------------------------------------------------------------------------------------------
# Models
# ---------------------------------------------------------------------------------------------------------------------


class Kontext:
    """The call of FLUX.1-Kontext's transformer, in the form of train_twinflow.py's classes."""

    vae_scale_factor = 8
    resolution_multiple = 16
    family: train_influxedit.Fill = train_influxedit.Kontext({})
    references = 1  # input images, unless --references says it

    def __init__(self, args):
        self.guidance = None
        if args.references is not None:
            self.references = args.references

    def predict(self, transformer, x, time, cond):
        batch_size, _, height, width = x.shape
        guidance = None
        if self.guidance is not None:
            guidance = torch.full((batch_size,), self.guidance)
        tokens = self.family.predict(
            transformer,
            pack_latents(x),
            [x] * self.references,
            time,
            cond["encoder_hidden_states"],
            cond.get("pooled_projections"),
            guidance=guidance,
            height=height,
            width=width,
        )
        return unpack_latents(tokens, height, width)


class Flux2(Kontext):
    family = train_influxedit.Flux2({})
    references = 0


class QwenImage21(BACKBONES["qwenimage21"]):
    """Its transformer's parts: the whole finds the places of tokens by numbers, which fake tensors do not have."""

    def predict(self, transformer, x, time, cond):
        prompt = transformer.txt_in(cond["encoder_hidden_states"])
        tokens = torch.cat([prompt, transformer.img_in(x.flatten(2).transpose(1, 2))], dim=1)
        num_prompt_tokens, num_tokens = prompt.shape[1], tokens.shape[1]
        times = torch.cat([time.reshape(len(x), -1)[:, 0], torch.zeros(1)])
        temb = transformer.time_text_embed(times, tokens)
        arguments = {
            "modulation": transformer.modulation(temb),
            "rotary_emb": torch.empty(num_tokens, transformer.config.attention_head_dim // 2, dtype=torch.complex64),
            "target_token_mask": torch.empty(num_tokens, dtype=torch.bool),
            "segments": [(0, num_prompt_tokens, True)],
            "key_valid": torch.empty(len(x), num_tokens, dtype=torch.bool),
        }
        for block in transformer.transformer_blocks:
            run = functools.partial(block, **arguments)
            if transformer.gradient_checkpointing and torch.is_grad_enabled():
                tokens = transformer._gradient_checkpointing_func(run, tokens)
            else:
                tokens = run(tokens)
        tokens = transformer.norm_out(tokens, temb, arguments["target_token_mask"])
        return transformer.proj_out(tokens)


CALLS = {**BACKBONES, "qwenimage21": QwenImage21, "kontext": Kontext, "flux2": Flux2}  # of the transformer
REFERENCE_CALLS = {"kontext": Kontext, "flux2": Flux2, "flux2-klein": Flux2}  # with references


@dataclass
class Model:
    """The parts of a pipeline; parts are functions that build them."""

    backbone: str  # a key of CALLS
    transformer: type
    config: dict
    conditions: dict  # shapes without the batch dimension
    text_encoders: tuple
    vae: object
    channels: int = 16  # of what the transformer is given, before packing
    targets: tuple | str = FLUX_TARGET_MODULES
    condition_tokens: int = 0  # that train_omini.py appends to an image's
    has_reference: bool = False  # an image to edit, of the size of the drawn one, beside it


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


def internvl3_2b():
    """Its language model."""
    config = transformers.Qwen2Config(
        vocab_size=151674,
        hidden_size=1536,
        intermediate_size=8960,
        num_hidden_layers=28,
        num_attention_heads=12,
        num_key_value_heads=2,
    )
    return transformers.Qwen2Model(config)


def qwen25_vl():
    text = {"hidden_size": 3584, "intermediate_size": 18944, "num_hidden_layers": 28}
    text |= {"num_attention_heads": 28, "num_key_value_heads": 4}
    vision = {"hidden_size": 1280, "out_hidden_size": 3584}
    config = transformers.Qwen2_5_VLConfig(text_config=text, vision_config=vision)
    return transformers.Qwen2_5_VLForConditionalGeneration(config)


def qwen3(width, mlp_width, ties_embeddings):
    config = transformers.Qwen3Config(
        vocab_size=151936,
        hidden_size=width,
        intermediate_size=mlp_width,
        num_hidden_layers=36,
        num_attention_heads=32,
        num_key_value_heads=8,
        head_dim=128,
        tie_word_embeddings=ties_embeddings,
    )
    return transformers.Qwen3ForCausalLM(config)


def qwen3_4b():
    return qwen3(2560, 9728, ties_embeddings=True)


def qwen3_8b():
    return qwen3(4096, 12288, ties_embeddings=False)


def mistral3_small():
    text = {"model_type": "mistral", "vocab_size": 131072, "hidden_size": 5120, "intermediate_size": 32768}
    text |= {
        "tie_word_embeddings": False,
        "num_hidden_layers": 40,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 128,
    }
    vision = {"model_type": "pixtral", "hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24}
    vision |= {"num_attention_heads": 16, "image_size": 1540, "patch_size": 14}
    config = transformers.Mistral3Config(text_config=text, vision_config=vision, tie_word_embeddings=False)
    return transformers.Mistral3ForConditionalGeneration(config)


def qwen3_vl_8b():
    text = {"hidden_size": 4096, "intermediate_size": 12288, "num_hidden_layers": 36, "head_dim": 128}
    text |= {"num_attention_heads": 32, "num_key_value_heads": 8}
    config = transformers.Qwen3VLConfig(text_config=text, vision_config={"out_hidden_size": 4096})
    return transformers.Qwen3VLForConditionalGeneration(config)


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


def flux2(layers, single_layers, heads, text_width, text_encoder, guidance_embeds=False):
    config = {"num_layers": layers, "num_single_layers": single_layers, "num_attention_heads": heads}
    config |= {"joint_attention_dim": text_width, "guidance_embeds": guidance_embeds}
    targets = [name.replace("net.0.proj", "linear_in").replace("net.2", "linear_out") for name in FLUX_TARGET_MODULES]
    targets.append("attn.to_qkv_mlp_proj")
    targets += [f"single_transformer_blocks.{i}.attn.to_out" for i in range(single_layers)]
    return Model(
        "flux2" if guidance_embeds else "flux2-klein",
        diffusers.Flux2Transformer2DModel,
        config,
        {"encoder_hidden_states": (512, text_width)},
        (text_encoder,),
        diffusers.AutoencoderKLFlux2,
        channels=32,
        targets=tuple(targets),
    )


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
    "FLUX.1-Kontext-dev": Model(
        "kontext",
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
    "FLUX.3": Model(
        "flux3",
        diffusers.Flux3Transformer2DModel,
        {},
        {"encoder_hidden_states": (160, 20480)},
        (qwen3_4b,),
        diffusers.AutoencoderKLFlux2,
        channels=32,
        targets=("to_q", "to_k", "to_v", "to_out.0", "ff.linear_in", "ff.linear_out", *BACKBONES["flux3"].targets),
    ),
    "FLUX.2-klein-4B": flux2(5, 20, 24, 7680, qwen3_4b),
    "FLUX.2-klein-9B": flux2(8, 24, 32, 12288, qwen3_8b),
    "FLUX.2-dev": flux2(8, 48, 48, 15360, mistral3_small, guidance_embeds=True),
    "SD3.5-medium": Model(
        "sd3",
        diffusers.SD3Transformer2DModel,
        {
            "num_layers": 24,
            "num_attention_heads": 24,
            "caption_projection_dim": 1536,
            "qk_norm": "rms_norm",
            "pos_embed_max_size": 384,
            "dual_attention_layers": tuple(range(13)),
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
    "OpenUni": Model(
        "openuni",
        diffusers.SanaTransformer2DModel,
        {},
        {"encoder_hidden_states": (256, 2304), "encoder_attention_mask": (256,)},
        (internvl3_2b,),
        sana_vae,
        channels=32,
        targets=BACKBONES["openuni"].targets,
    ),
    "Z-Image": Model(
        "z-image",
        diffusers.ZImageTransformer2DModel,
        {},
        {"cap_feats": (512, 2560)},
        (qwen3_4b,),
        kl_vae,
        targets=BACKBONES["z-image"].targets,
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
    "Qwen-Image-2.1": Model(
        "qwenimage21",
        diffusers.QwenImage21Transformer2DModel,
        {},
        {"encoder_hidden_states": (512, 4096), "encoder_hidden_states_mask": (512,)},
        (qwen3_vl_8b,),
        diffusers.AutoencoderKLQwenImage21,
        channels=64,
        targets=BACKBONES["qwenimage21"].targets,
    ),
    "Qwen-Image-Edit": Model(
        "qwenimage-edit",
        diffusers.QwenImageTransformer2DModel,
        {"zero_cond_t": True},
        {"encoder_hidden_states": (700, 3584), "encoder_hidden_states_mask": (700,)},  # the image in 188 tokens
        (qwen25_vl,),
        diffusers.AutoencoderKLQwenImage,
        targets=BACKBONES["qwenimage"].targets,
        has_reference=True,
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
        self.sizes = {}  # of each storage, by its id

    def __enter__(self):
        resize = torch.UntypedStorage.resize_

        def resized(storage, size):  # how FSDP frees and refills what it gathers
            resize(storage, size)
            if id(storage) in self.sizes:
                self.count(storage)

        self.patch = patch.object(torch.UntypedStorage, "resize_", resized)
        self.patch.start()
        return super().__enter__()

    def __exit__(self, *error):
        self.patch.stop()
        return super().__exit__(*error)

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if DTensor in types:
            return NotImplemented  # its parts come by on their own
        result = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor) and id(tensor.untyped_storage()) not in self.sizes:
                storage = tensor.untyped_storage()
                weakref.finalize(storage, self.release, id(storage))
                self.count(storage)
        return result

    def count(self, storage):
        self.live += storage.nbytes() - self.sizes.get(id(storage), 0)
        self.sizes[id(storage)] = storage.nbytes()
        self.peak = max(self.peak, self.live)

    def release(self, key):
        self.live -= self.sizes.pop(key)


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


def as_on(device):
    """A context in which the CPU keeps what `device` would."""
    return as_on_gpu() if device == "cuda" else nullcontext()


@contextmanager
def as_on_gpu():
    """A context in which a step keeps what it does on a GPU: there autocast computes norms in float32, RMSNorm is one
    kernel, and layers in 8 bits multiply in 8 bits."""

    def upcast(tensor):
        return tensor.float() if isinstance(tensor, torch.Tensor) and torch.is_autocast_enabled("cpu") else tensor

    def in_float32(function):
        return lambda *args, **kwargs: function(*map(upcast, args), **{k: upcast(v) for k, v in kwargs.items()})

    def rms_norm(x, shape, weight=None, eps=None):
        return FusedRMSNorm.apply(upcast(x), upcast(weight))

    functions = {"rms_norm": rms_norm}
    functions |= {name: in_float32(getattr(torch.nn.functional, name)) for name in ("layer_norm", "group_norm")}
    with (
        patch.multiple(torch.nn.functional, **functions),
        patch("common.models.nvidia_capability", lambda: (9, 0)),
        patch("common.models.has_8_bit_kernel", lambda *kind: True),
    ):
        yield


def convert(module, change):
    """Replaces parameters and buffers by change(tensor); what several modules share is still one tensor."""
    changed = {}  # {id: (tensor, the new one)}
    for part in module.modules():
        for tensors in (part._parameters, part._buffers):
            for name, tensor in tensors.items():
                if tensor is not None:
                    if id(tensor) not in changed:
                        changed[id(tensor)] = tensor, change(tensor)
                    tensors[name] = changed[id(tensor)][1]


def allocate(tensor):
    """A fake tensor like one that is on the meta device, quantized if that is what it is for."""
    fake = torch.empty(tensor.shape, dtype=tensor.dtype)
    if not isinstance(tensor, torch.nn.Parameter):
        return fake
    parameter = torch.nn.Parameter(fake, tensor.requires_grad)
    if isinstance(tensor, Params4bit):
        options = {"quant_type": tensor.quant_type, "compress_statistics": tensor.compress_statistics}
        options["quant_storage"] = tensor.quant_storage
        packed, state = quantize_4bit(fake, **options)
        parameter = torch.nn.Parameter(packed, requires_grad=False)
        parameter.quant_state = state
    return parameter


def build(create, dtype, fake, adapt=lambda module: None):
    """A frozen module in `dtype`, as adapt(module) changed it on the meta device, of tensors without memory."""

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


def create_optimizer(args, parameters):
    """The optimizer of --optimizer, with default settings: its memory does not depend on them."""
    if args.optimizer == "prodigy":
        from prodigyopt import Prodigy

        return Prodigy(parameters)
    if args.optimizer == "sgd":
        return torch.optim.SGD(parameters)
    if args.use_8bit_adam:
        return bitsandbytes.optim.AdamW8bit(parameters)
    return torch.optim.AdamW(parameters)


def optimizer_bytes(args):
    """(state, what a step needs besides) of the optimizer in bytes per trained number, from two steps on real ones."""
    with LiveMemory() as memory:
        parameters = [torch.nn.Parameter(torch.rand(64, 256)) for _ in range(64)]
        for parameter in parameters:
            parameter.grad = torch.rand_like(parameter)
        optimizer = create_optimizer(args, parameters)
        for group in optimizer.param_groups:
            group["foreach"] = args.device == "cuda"  # there all parameters at once, on a CPU one after the other
        before = memory.live
        optimizer.step()
        after = memory.peak = memory.live
        optimizer.step()
    count = sum(parameter.numel() for parameter in parameters)
    return (after - before) / count, (memory.peak - after) / count


def model_to_train(model, args, fake):
    """(the transformer of `model` with what is trained of it, its forward pass as a function of a number of images)"""
    dtype, full, size = DTYPES[args.mixed_precision], args.training == "full", args.train_batch_size
    calls = REFERENCE_CALLS if args.references else CALLS
    backbone = calls[model.backbone](args)
    backbone.guidance = 1.0 if model.config.get("guidance_embeds") else None

    def adapt(transformer):
        if full:
            backbone.add_target_time(transformer, "copy")
            transformer.requires_grad_(True)
            return
        if args.quantize_base != "none":
            quantize_base(transformer, dtype, args.quantize_base)
        add_lora(
            transformer,
            rank=args.rank,
            alpha=args.rank,
            dropout=0.0,
            target_modules=model.targets,
            **adapter_options(args),
        )

    transformer = build(lambda: model.transformer(**model.config), torch.float32 if full else dtype, fake, adapt)
    if args.gradient_checkpointing:
        transformer.enable_gradient_checkpointing()
    if args.fsdp:
        with patch.dict("os.environ", LOCAL_WORLD_SIZE=str(gpus_per_machine(args))):
            shard(transformer, torch.device("cpu"), dtype, hybrid=args.hybrid_shard)
    transformer.train()
    for module in transformer.modules():
        if isinstance(module, LoKrLayer):
            module.training = False  # else it draws whether it is dropped, which no fake tensor can say
    side = args.resolution // backbone.vae_scale_factor
    # conditions as a part of the image, which passes the same layers; a token is 2 x 2 latents
    more = 2 * math.ceil(2 * model.condition_tokens / side)
    with fake:
        x = torch.empty(size, model.channels, side, side + more, dtype=dtype)
        conditions = {name: torch.empty(size, *shape, dtype=dtype) for name, shape in model.conditions.items()}
        if model.has_reference:
            conditions["reference"] = x

    def forward(images=size):
        inputs = x[:1].expand(images, *x.shape[1:])
        prompts = {name: each[:1].expand(images, *each.shape[1:]) for name, each in conditions.items()}
        time = torch.rand(images, 2) if full else torch.rand(images)
        exact_times = backbone.exact_times(transformer, time) if full else nullcontext()
        with torch.autocast("cpu", dtype, enabled=dtype != torch.float32), exact_times:
            return backbone.predict(transformer, inputs, time, prompts)

    return transformer, forward


def training_step(model, args):
    """{what: bytes} of forward and backward pass: there before, trained, kept between the two, the most at once; what
    an image in drawing needs besides the weights; of the frozen weights, each block's."""
    fake = FakeTensorMode(allow_non_fake_inputs=True)
    with LiveMemory() as memory:
        transformer, forward = model_to_train(model, args, fake)
        with fake:
            before = memory.live
            for _ in range(2):  # the second step is like all others: the loss before still holds on to its layers
                memory.peak = memory.live
                loss = forward().float().square().mean()
                activations = memory.live - before
                loss.backward()
                transformer.zero_grad()
            peak = memory.peak
            del loss
            alive = memory.peak = memory.live
            with torch.no_grad():
                forward(images=args.sample_batch_size if args.with_prior_preservation else 1)
            drawing = memory.peak - alive
    trained = 0
    for parameter in transformer.parameters():
        if parameter.requires_grad:
            part = parameter.to_local() if isinstance(parameter, DTensor) else parameter
            trained += part.nbytes
    return {
        "before": before,
        "trained": trained,
        "activations": activations,
        "peak": peak,
        "drawing": drawing,
        "blocks": [frozen_bytes(block) for block in repeated_blocks(transformer)],
    }


def frozen_bytes(module):
    """Bytes of the parameters that are not trained."""
    return sum(parameter.nbytes for parameter in module.parameters() if not parameter.requires_grad)


@contextmanager
def processes(count):
    """This process as the first of so many, with which it exchanges nothing."""
    torch.distributed.init_process_group("fake", store=FakeStore(), rank=0, world_size=count)
    try:
        yield
    finally:
        torch.distributed.destroy_process_group()


@dataclass
class Estimate:
    """Bytes of a run: `rows` are what each device holds while it trains, `peaks` the most at once of each phase; `ram`
    is what each process has of its own, `files` what all map together from disk, `disk` what lies there.
    `network` is what a step sends. `step` is what `training_step` found."""

    rows: dict[str, int]
    peaks: dict[str, int]
    ram: dict[str, int]
    files: int
    disk: dict[str, int]
    network: dict[str, int]
    step: dict


def as_trained(model, args):
    """The Model with what a training command says of its adapter's layers, conditions and prompts."""
    conditions = model.conditions
    usual = PROMPT_TOKENS.get(model.backbone)
    if args.max_sequence_length and usual:
        length = next(iter(conditions.values()))[0]
        conditions = {
            name: (length - usual + args.max_sequence_length, *shape[1:]) if shape[0] == length else shape
            for name, shape in conditions.items()
        }
    targets = args.lora_layers or model.targets
    return replace(model, targets=targets, condition_tokens=args.condition_tokens, conditions=conditions)


def estimate(model, args, step=None):
    """The Estimate of a run of `model` with these flags.

    `step` of an Estimate saves most of the time where flags differ that a forward and backward pass do not depend on:
    --offload, --cache_latents, --blocks_to_swap, --quantize_text_encoders and the optimizer's.
    """
    model = as_trained(model, args)
    dtype = DTYPES[args.mixed_precision]
    quantize_blockwise(torch.zeros(256))  # makes a table that nf4 needs, from numbers that fake tensors do not have
    warnings.filterwarnings("ignore", message="FSDP2-wrapped module")  # returns a view, which nothing writes to
    if step is None:
        with as_on(args.device), processes(args.num_processes) if args.fsdp else nullcontext():
            step = training_step(model, args)
    length = next(iter(model.conditions.values()))[0]
    encoders = []
    for create in model.text_encoders:
        quantization = "none" if create in (clip_l, clip_g) else args.quantize_text_encoders
        count = PROMPTS_PER_PASS if args.offload and quantization == "none" else PROMPTS_PER_BATCH
        encoders.append(encoding_prompts(create, length, dtype, args.device, quantization=quantization, count=count))
    vae = coding_images(
        model.vae,
        dtype,
        args.device,
        resolution=args.resolution,
        images=args.train_batch_size,
        drawn=args.sample_batch_size if args.with_prior_preservation else 1,
    )
    state, update = (round(share * step["trained"] / 4) for share in optimizer_bytes(args))  # 4 bytes per number
    trained, full = step["trained"], args.training == "full"
    in_ram, swapped = swapped_bytes(step["blocks"], args.blocks_to_swap)
    before = step["before"] - swapped
    stays = not (args.cache_latents or args.offload)
    rows = {
        "weights": before - (0 if full else trained),
        "LoRA": 0 if full else trained,
        "teacher": trained if full and args.ema_decay_rate else 0,
        "average": trained if args.use_ema else 0,
        "gradients": trained,
        "reducer": trained if args.num_processes > 1 and not args.fsdp else 0,
        "optimizer": state,
        "VAE": vae["weights"] if stays else 0,
        "activations": step["activations"],
    }
    trained_encoders = [
        training_tokens(create, length, dtype, args.device, count=args.train_batch_size)
        for create in model.text_encoders
        if args.train_text_encoder_ti and (create is clip_l or args.enable_t5_ti)
    ]
    rows["text encoders"] = sum(encoder["weights"] for encoder in trained_encoders)
    rows["activations of text"] = sum(encoder["kept"] for encoder in trained_encoders)
    held = sum(rows[name] for name in ("teacher", "average", "reducer", "optimizer", "text encoders"))
    drawing = max(step["drawing"] + rows["VAE"], vae["decoding"])
    text = sum(encoder["weights"] for encoder in encoders if not args.offload or encoder["quantized"])
    if args.offload:  # a layer and the next are on the device
        text += max(2 * encoder["layer"] + encoder["activations"] for encoder in encoders)
    else:
        text += max(encoder["activations"] for encoder in encoders)
    peaks = {
        "encoding prompts": text,
        "encoding images": vae["encoding"] + (0 if args.cache_latents else before + held),
        "drawing class images": rows["weights"] + drawing if args.with_prior_preservation else 0,
        "forward and backward pass": step["peak"] - swapped + held + rows["VAE"] + rows["activations of text"],
        "optimizer step": before + held + rows["VAE"] + trained + update,
        "drawing for validation": before + held + drawing,
    }

    transformer = on_meta(lambda: model.transformer(**model.config))
    block = max(size_of(block, torch.float32) for block in repeated_blocks(transformer))
    text_files = sum(encoder["weights"] for encoder in encoders)
    ram = {
        "Python, libraries, driver": round(PROCESS_RAM * GIB),
        "VAE": 0 if stays else vae["weights"],
        "text encoders, pinned": sum(encoder["weights"] for encoder in encoders if args.offload),
        "blocks to swap": in_ram,
        "a block in float32": block if full else 0,
    }
    shards = 1
    if args.fsdp:
        shards = gpus_per_machine(args) if args.hybrid_shard else args.num_processes
    saved = sum(rows[name] for name in ("LoRA", "teacher", "average", "optimizer")) * shards
    if full:
        saved += size_of(transformer, torch.float32)
    disk = {
        "model": size_of(transformer, torch.bfloat16) + text_files + vae["weights"],
        "each checkpoint": saved,
        "1000 cached images": 1000 * vae["cached"],
        "1000 cached prompts": 1000 * dtype.itemsize * sum(map(math.prod, model.conditions.values())),
    }
    network = sent_bytes(args, weights=size_of(transformer, dtype), gradients=trained * shards)
    return Estimate(rows, peaks, ram, max(size_of(transformer, dtype), text_files), disk, network, step)


def gpus_per_machine(args):
    """The processes of each machine."""
    return args.num_processes // args.num_machines


def sent_bytes(args, *, weights, gradients):
    """{link: bytes} that are sent in a step, as many as are received, with rings of all processes.

    Of S bytes on n processes in a ring an all-gather or a reduce-scatter sends (n - 1) / n S to the next one, an
    all-reduce 2 (n - 1) / n S. A ring leaves each machine once, whatever number of rings and cards share the work.

    weights    of the model, in the precision in which a block is gathered
    gradients  of what is trained, in float32, in which they are added up
    """

    def ring(count):
        return (count - 1) / count

    all_processes, local = args.num_processes, gpus_per_machine(args)
    if not args.fsdp:  # DDP: an all-reduce
        sent = 2 * ring(all_processes) * gradients
        by_gpu, by_machine = sent, sent
    elif args.hybrid_shard:  # a machine's sums are added up to those of the others, a part by each of its GPUs
        by_gpu = ring(local) * (2 * weights + gradients) + 2 * ring(args.num_machines) * gradients / local
        by_machine = 2 * ring(args.num_machines) * gradients
    else:  # a block is gathered for the forward and for the backward pass
        sent = ring(all_processes) * (2 * weights + gradients)
        by_gpu, by_machine = sent, sent
    return {"each GPU": round(by_gpu), "each machine": round(by_machine) if args.num_machines > 1 else 0}


@functools.cache
def encoding_prompts(create, length, dtype, device, *, quantization, count):
    """{what: bytes} of a text encoder: all its weights, its largest layer, and what `count` prompts of `length` tokens
    need besides; whether it is quantized."""
    fake = FakeTensorMode(allow_non_fake_inputs=True)

    def adapt(encoder):
        quantize_language_model(encoder, dtype, quantization)

    with as_on(device), LiveMemory() as memory:
        encoder = build(create, dtype, fake, adapt)
        weights = memory.peak = memory.live
        if create in (clip_l, clip_g):
            length = encoder.config.max_position_embeddings
        with fake, torch.no_grad(), torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
            encoder(input_ids=torch.ones(count, length, dtype=torch.long), output_hidden_states=True)
        activations = memory.peak - weights
    layer = max(sum(each.nbytes for each in part.parameters(recurse=False)) for part in encoder.modules())
    is_quantized = quantization != "none"
    return {"weights": weights, "layer": layer, "activations": activations, "quantized": is_quantized}


@functools.cache
def training_tokens(create, length, dtype, device, *, count):
    """{what: bytes} of a text encoder whose token embeddings are trained: its weights, what the forward pass keeps for
    the backward pass and the most at once besides the weights, with `count` prompts."""
    fake = FakeTensorMode(allow_non_fake_inputs=True)

    def adapt(encoder):
        encoder.get_input_embeddings().weight.requires_grad_(True)

    with as_on(device), LiveMemory() as memory:
        encoder = build(create, dtype, fake, adapt)
        weights = memory.peak = memory.live
        if create in (clip_l, clip_g):
            length = encoder.config.max_position_embeddings
        with fake, torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
            output = encoder(input_ids=torch.ones(count, length, dtype=torch.long))[0]
            kept = memory.live - weights
            output.float().square().mean().backward()
    return {"weights": weights, "kept": kept, "peak": memory.peak - weights}


@functools.cache
def coding_images(create, dtype, device, *, resolution, images, drawn):
    """{what: bytes} of a VAE: its weights, the most at once with them while it encodes so many images and while it
    decodes those drawn together, and what of an image is cached."""
    fake = FakeTensorMode(allow_non_fake_inputs=True)
    with as_on(device), LiveMemory() as memory:
        vae = build(create, dtype, fake)
        weights = memory.peak = memory.live
        with fake, torch.no_grad():
            moments = create is diffusers.AutoencoderKLFlux2
            encode = encode_moments if moments else encode_images
            latents = encode(vae, torch.empty(images, 3, resolution, resolution))[:1]
            encoding = memory.peak
            cached = latents.numel() * latents.itemsize
            if moments:
                latents, _ = latents.chunk(2, dim=1)
            elif create is kl_vae:
                cached *= 2  # mean and variance
            memory.peak = memory.live
            decode(vae, latents.expand(drawn, -1, -1, -1))
    return {"weights": weights, "encoding": encoding, "decoding": memory.peak, "cached": cached}


def decode(vae, latents):
    """The images of latents; what normalizes them takes no memory."""
    if isinstance(vae, VIDEO_VAES):
        latents = latents.unsqueeze(2)
    return vae.decode(latents.to(vae.dtype)).sample


def swapped_bytes(blocks, count):
    """(bytes of the blocks that --blocks_to_swap keeps in RAM, what that leaves free on the device, where two of them
    are at a time)"""
    swapped = [blocks[i] for i in spread(count, len(blocks))]
    return sum(swapped), sum(sorted(swapped)[:-2])


def size_of(module, dtype):
    """Bytes of a module's parameters in `dtype`."""
    return sum(map(torch.numel, module.parameters())) * dtype.itemsize


def on_meta(create):
    with torch.device("meta"):
        return create()


# ---------------------------------------------------------------------------------------------------------------------
# Command line
# ---------------------------------------------------------------------------------------------------------------------


TRAINERS = (train_dreambooth_flux_advanced, train_influxedit, train_omini, train_twinflow)
SCRIPTS = {f"{trainer.__name__}.py": trainer for trainer in TRAINERS}
MODEL_NAMES = {  # of folders, files and repositories, without what is neither letter nor digit: keys of MODELS
    **dict.fromkeys(("flux1dev", "flux1schnell", "flux1kreadev"), "FLUX.1-dev"),
    "flux1filldev": "FLUX.1-Fill-dev",
    "flux1kontextdev": "FLUX.1-Kontext-dev",
    **dict.fromkeys(("flux2klein4b", "flux2kleinbase4b"), "FLUX.2-klein-4B"),
    **dict.fromkeys(("flux2klein9b", "flux2kleinbase9b"), "FLUX.2-klein-9B"),
    "flux2dev": "FLUX.2-dev",
    "stablediffusion35medium": "SD3.5-medium",
    **dict.fromkeys(("qwenimageedit", "qwenimageedit2509", "qwenimageedit2511"), "Qwen-Image-Edit"),
}
# Tokens of a prompt, of models whose trainers fill each up to --max_sequence_length
PROMPT_TOKENS = {"flux": 512, "kontext": 512, "flux2": 512, "flux2-klein": 512, "sd3": 256}
NOT_COUNTED = {  # flags of trainers that change memory in a way that is not estimated
    "adapter_per_condition": "one adapter is counted",
    "compile": "compiled blocks keep other activations",
    "dataset_config": "sizes and batches of its own",
    "preserve_outputs": "its second forward and backward pass",
    "train_embedder": "x_embedder and its optimizer's state",
    "train_text_encoder": "CLIP, its adapter and activations",
}


def add_own_flags(parser):
    """The flags that no trainer has."""
    arg = parser.add_argument
    arg("--model", choices=MODELS, default="FLUX.1-dev", help="(default of a training command: the one it names)")
    arg(
        "--references",
        type=in_range(int, 0, 10),
        help="input images of each, as train_influxedit.py trains them (default: FLUX.1-Kontext 1, else 0)",
    )
    arg("--num_processes", type=in_range(int, 1, 1024), default=1, help="of accelerate launch, on all machines")
    arg("--num_machines", type=in_range(int, 1, 1024), default=1, help="of accelerate launch")
    arg("--device", choices=("cuda", "cpu"), default="cuda", help="whose way to compute is assumed")
    arg("--table", action="store_true", help="print as Markdown what fits in which card")
    arg("--network_table", action="store_true", help="print as Markdown what a step sends, and how long that takes")


def create_parser():
    parser = Parser(description=__doc__, takes="[TRAINING_COMMAND]")
    add_own_flags(parser)
    arg = parser.add_argument
    arg("--training", choices=("lora", "full"), default="lora", help="full: as train_twinflow.py does it")
    arg("--resolution", type=in_range(int, 16, 8192), default=512, help="side of the images in pixels")
    arg("--train_batch_size", type=in_range(int, 1, 4096), default=1, help="images per device and forward pass")
    arg("--rank", type=in_range(int, 1, 4096), default=16, help="rank of the LoRA")
    arg("--use_dora", action="store_true", help="train a DoRA")
    arg("--lora_type", choices=("lora", "lokr"), default="lora", help="lokr: train a LoKr")
    arg("--lokr_factor", type=in_range(int, 1, 4096), help="size of a LoKr's first factor")
    arg("--mixed_precision", choices=DTYPES, default="bf16")
    arg("--gradient_checkpointing", action="store_true")
    arg("--quantize_base", choices=QUANTIZATIONS, default="none")
    arg("--quantize_text_encoders", choices=TEXT_QUANTIZATIONS, default="none")
    arg("--train_text_encoder_ti", action="store_true", help="new tokens are trained in CLIP")
    arg("--enable_t5_ti", action="store_true", help="new tokens are trained in T5 too")
    arg("--optimizer", choices=("adamw", "prodigy", "sgd"), default="adamw")
    arg("--use_8bit_adam", action="store_true")
    arg(
        "--ema_decay_rate",
        type=in_range(float, 0, 1),
        default=0.99,
        help="of full training; 0: no second set of weights",
    )
    arg("--use_ema", action="store_true", help="keep a moving average of the adapter")
    arg("--cache_latents", action="store_true")
    arg("--offload", action="store_true")
    arg("--blocks_to_swap", type=in_range(int, 0, 1024), default=0, help="blocks whose frozen weights stay in RAM")
    arg(
        "--with_prior_preservation",
        action="store_true",
        help="class images are drawn; they count in --train_batch_size, too",
    )
    arg("--sample_batch_size", type=in_range(int, 1, 4096), default=4, help="class images drawn at once")
    arg("--fsdp", action="store_true")
    arg("--hybrid_shard", action="store_true")
    parser.set_defaults(condition_tokens=0, lora_layers=None, max_sequence_length=None, remarks=[])
    return parser


def parse_args(argv=None):
    """The flags of a run: typed as such, or read in a training command."""
    parser = create_parser()
    own = Parser(add_help=False)
    add_own_flags(own)
    own.set_defaults(model=None)
    typed, words = own.read_known(argv)
    names = {word.partition("=")[0] for word in words if word.startswith("--")}
    script = next((i for i, word in enumerate(words) if Path(word).name in SCRIPTS), None)
    if script is not None:
        trainer = SCRIPTS[Path(words[script]).name]
        words = read_launcher(words[:script], words[script], typed, parser) + words[script + 1 :]
    elif names <= set(parser.flags):
        args = parser.parse_args(argv)
        parser.refuse(check_args(args))
        return args
    else:
        trainer = trainer_with(names, preset_folders(argv), parser)
    args = read_training_command(trainer, words, typed, parser)
    parser.refuse(check_args(args))
    return args


def read_launcher(words, script, typed, parser):
    """Sets the processes and machines that accelerate launch or torchrun are told in `words`, which stand before a
    script; returns the words that mean the same behind it."""
    if words and words[0].startswith("--"):
        parser.error(f"{words[0]} is before {script}, as a launcher's flag without a launcher: put it behind {script}")
    known = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    known.add_argument("--nproc_per_node", "--nproc-per-node", default="1")
    known.add_argument("--nnodes", default="1")
    known.add_argument("--mixed_precision", "--mixed-precision")
    launcher = known.parse_known_args(words)[0]
    if {"torchrun", "torch.distributed.run"} & {Path(word).name for word in words}:
        for name in ("nproc_per_node", "nnodes"):
            value = getattr(launcher, name)
            if not value.isdecimal() or int(value) == 0:
                parser.error(f"--{name} {value}: give a number, for which memory is estimated")
        typed.num_machines = int(launcher.nnodes)
        typed.num_processes = int(launcher.nproc_per_node) * typed.num_machines
    return ["--mixed_precision", launcher.mixed_precision] if launcher.mixed_precision else []


def preset_folders(argv):
    """The names of the folders of a command's @files: those of examples/ are called like their trainers."""
    words = sys.argv[1:] if argv is None else argv
    return [Path(word[1:]).absolute().parent.name for word in words if word.startswith("@")]


def trainer_with(names, folders, parser):
    """The one of the TRAINERS that has all of these flags, of several the one called like a folder, or the first;
    exits if none has them."""
    flags = {}
    for trainer in TRAINERS:
        known = trainer.create_parser()
        flags[trainer] = {*known.flags, *(f"--{name}" for name in known.other_flags)}
    every = Parser(add_help=False)
    every.add_argument(*set(parser.flags).union(*flags.values()))
    unknown = sorted(names - set(every.flags))
    parser.refuse([f"{name}: no trainer has this flag; {every.similar_flags(name)}" for name in unknown])

    def distance(trainer):
        return len(names - flags[trainer]), not any(folder in trainer.__name__ for folder in folders)

    nearest = min(TRAINERS, key=distance)
    lacking = sorted(names - flags[nearest])
    if lacking:
        parser.error(f"no trainer has all of these flags: {nearest.__name__}.py has no {', '.join(lacking)}")
    return nearest


def read_training_command(trainer, words, typed, parser):
    """The flags of a run of `trainer` with these words, with its defaults, and those `typed` of ours."""
    known = trainer.create_parser()
    known.prog = f"{parser.prog} {trainer.__name__}.py"  # whose flags a message is about
    for action in known._actions:
        action.required = False  # a preset alone is enough
    if trainer is train_twinflow:
        known.set_defaults(**train_twinflow.chosen_defaults(words))
    run = known.parse_args(words)
    if trainer is train_dreambooth_flux_advanced and run.network_module:
        known.set_defaults(**trainer.kohya_defaults(run))
        run = known.parse_args(words)

    args = parser.parse_args([])
    for name in vars(args).keys() & vars(run).keys() - {"resolution", "lora_layers"}:
        setattr(args, name, getattr(run, name))
    args.remarks = [f"{trainer.__name__}.py trains"]
    args.model = typed.model or trained_model(run, args.remarks)
    for name, value in vars(typed).items():
        if value is not None and name != "model":
            setattr(args, name, value)

    args.mixed_precision = run.mixed_precision or "bf16"
    args.cache_latents = run.cache_latents or run.cache_latents_to_disk
    if run.blocks_to_swap == "auto":
        args.remarks.append("not counted: --blocks_to_swap auto (as many as do not fit wait in RAM)")
    args.blocks_to_swap = 0 if run.blocks_to_swap in (None, "auto") else run.blocks_to_swap
    if vars(run).get("with_prior_preservation"):
        args.train_batch_size *= 2  # a class image for each
    if trainer is train_twinflow and run.instance_data_dir:
        args.remarks.append("the batch is doubled: the subject's images pass once more, at most all of a batch")
        args.train_batch_size *= 2
    for name, why in NOT_COUNTED.items():
        if vars(run).get(name):
            args.remarks.append(f"not counted: --{name} ({why})")

    parser.refuse(read_sizes(trainer, run, args) + read_layers(trainer, run, args))
    images = f"{args.resolution} pixels a side, batch {args.train_batch_size}"
    adapter = "all weights" if args.training == "full" else f"a {adapter_kind(args)} of rank {args.rank}"
    conditions = f", {args.condition_tokens} condition tokens" if args.condition_tokens else ""
    args.remarks[0] += f" {adapter} of {args.model}: {images}{conditions}, {args.optimizer}, {args.mixed_precision}"
    return args


def trained_model(run, remarks):
    """The key of MODELS of what a run trains, by its name; adds a remark where that does not tell."""
    path = run.pretrained_model_name_or_path
    if path:
        name = re.sub(r"\.safetensors$", "", Path(path).name)
        name = re.sub("[^a-z0-9]", "", name.lower())
        known = {re.sub("[^a-z0-9]", "", model.lower()): model for model in MODELS} | MODEL_NAMES
        if name in known:
            return known[name]
    model_type = vars(run).get("model_type")
    found = next((name for name, model in MODELS.items() if model.backbone == model_type), "FLUX.1-dev")
    said = f"{path} is no name of a model known here" if path else "no --pretrained_model_name_or_path is given"
    remarks.append(f"{said}: the sizes are those of {found}; --model names another")
    return found


def read_sizes(trainer, run, args):
    """Sets the resolution, references and condition tokens that a run's flags mean; returns problems of these."""
    multiple = CALLS[MODELS[args.model].backbone].resolution_multiple
    if trainer is train_omini:
        if not run.condition_type:
            run.condition_type = ["custom"]
            args.remarks.append("no --condition_type is given: one condition")
        if run.condition_size and len(run.condition_size) not in (1, len(run.condition_type)):
            return [
                f"--condition_size has {len(run.condition_size)} values, --condition_type {len(run.condition_type)}"
            ]
        sizes = [run.target_size]
        conditions = [spec.size for spec in train_omini.condition_specs(run)]
        args.condition_tokens = sum(height * width for height, width in conditions) // train_omini.PATCH**2
    elif trainer is train_influxedit:
        sizes = [(side, side) for side in run.resolution]  # long edges
        if args.references is None and args.model.startswith("FLUX.2"):
            args.references = 1 + len(run.additional_data_dir or run.additional_column or [])
    else:
        problems = check_buckets(run.aspect_ratio_buckets, multiple)
        if problems:
            return problems
        sizes = parse_buckets(run.aspect_ratio_buckets, run.resolution)
    side = max(math.sqrt(height * width) for height, width in sizes)
    args.resolution = multiple * math.ceil(side / multiple)
    return []


def read_layers(trainer, run, args):
    """Sets the layers that get the adapter, if they are not the usual ones; returns problems of their names."""
    if trainer is train_omini:
        is_flux2 = args.model.startswith("FLUX.2")
        args.lora_layers = train_omini.FLUX2_TARGET_MODULES if is_flux2 else train_omini.TARGET_MODULES
    elif run.lora_layers and args.training == "lora":
        model = MODELS[args.model]
        transformer = on_meta(lambda: model.transformer(**model.config))
        names = block_layers(transformer) if run.lora_layers == "kohya" else comma_list(run.lora_layers)
        args.lora_layers = tuple(names)
        unknown = unknown_layers(transformer, names)
        if unknown:
            return [f"--lora_layers: {args.model} has no linear layer {', '.join(unknown)}"]
    return []


def check_args(args):
    """Problems of flags that the trainers refuse, too, or that are not estimated."""
    kind = DistributedType.MULTI_GPU if args.num_processes > 1 else DistributedType.NO
    scaler = "of gradients" if args.mixed_precision == "fp16" else None
    problems = check_processes(argparse.Namespace(**vars(args), distributed_type=kind, scaler=scaler), args)
    reads = REFERENCE_CALLS.get(MODELS[args.model].backbone)
    most = reads.family.max_references if reads else 0
    if (args.references or 0) > most:
        problems.append(f"--references {args.references}: {args.model} reads at most {most}")
    if args.references and args.training == "full":
        problems.append("--references is for --training lora")
    if args.training == "full" and args.quantize_base != "none":
        problems.append(f"--quantize_base {args.quantize_base} is for --training lora")
    if args.training == "full" and adapter_kind(args) != "LoRA":
        problems.append(f"a {adapter_kind(args)} is for --training lora")
    if args.use_dora and args.quantize_base == "nf4":
        problems.append("--use_dora: not estimated with --quantize_base nf4")
    unchanged = {"lora_dropout": 0, "use_rslora": False, "init_lora_weights": "gaussian"}  # no memory depends on them
    problems += check_adapter(argparse.Namespace(**vars(args), **unchanged))
    if args.training == "full" and only_lora(args.model):
        problems.append(f"--training full: no trainer does this for {args.model}")
    if args.num_processes % args.num_machines:
        problems.append(
            f"--num_processes {args.num_processes} counts those of all machines, as many on each: a multiple of "
            f"--num_machines {args.num_machines}"
        )
    multiple = CALLS[MODELS[args.model].backbone].resolution_multiple
    if args.resolution % multiple:
        problems.append(f"--resolution {args.resolution} must be a multiple of {multiple}")
    return problems


def only_lora(name):
    """Whether no trainer trains all weights of a model."""
    return name in ("FLUX.1-Fill-dev", "FLUX.1-Kontext-dev", "FLUX.2-dev")


def needed(peak):
    """GiB of a card for tensors of so many bytes."""
    return CONTEXT + (1 + GAPS) * peak / GIB


def print_estimate(model, args):
    for remark in args.remarks:
        print(remark)
    found = estimate(model, args)
    print_sizes(f"each of {args.num_processes} GPUs" if args.num_processes > 1 else "GPU, in training", found.rows)
    print_sizes("GPU, at most while", found.peaks)
    print_sizes("RAM, each process", found.ram)
    print_sizes("RAM, files mapped by all processes", {"": found.files})
    print_sizes("disk", found.disk)
    if args.num_processes > 1:
        print_sizes("network, sent in a step by (computed, not measured)", found.network)
    peak = max(found.peaks.values())
    print(
        f"peak {peak / GIB:.2f} GiB; with {CONTEXT:g} GiB for the driver and {GAPS:.0%} for gaps, "
        f"a card of {math.ceil(needed(peak))} GB"
    )


def print_sizes(title, sizes):
    print(title)
    for name, size in sizes.items():
        if size:
            print(f"  {name:28}{size / GIB:7.2f} GiB")


WAYS = {  # of training, each slower than the one before, or further from the base model
    "lora": {
        "plain": "",
        "checkpointing": "--gradient_checkpointing",
        "checkpointing, offload": "--gradient_checkpointing --offload",
        "checkpointing, int8": "--gradient_checkpointing --quantize_base int8",
        "checkpointing, nf4": "--gradient_checkpointing --quantize_base nf4",
        "checkpointing, nf4, offload": "--gradient_checkpointing --quantize_base nf4 --offload",
    },
    "full": {
        "1 GPU": "--gradient_checkpointing",
        "8 GPUs": "--gradient_checkpointing --fsdp --num_processes 8",
    },
}


def what_fits(model, training, resolution):
    """For each of CARDS the first of WAYS that fits, or "-"."""
    fitting = dict.fromkeys(CARDS, "-")
    for way, flags in WAYS[training].items():
        flags += f" --cache_latents --training {training} --resolution {resolution}"
        need = needed(max(estimate(model, parse_args(flags.split())).peaks.values()))
        fitting |= {card: way for card, known in fitting.items() if known == "-" and need <= card}
        if "-" not in fitting.values():
            break
    return fitting.values()


def print_table():
    print(f"| model | training | px |{''.join(f' {card} GB |' for card in CARDS)}")
    print("| --- " * (3 + len(CARDS)) + "|")
    for training, resolution in (("lora", 512), ("lora", 1024), ("full", 512)):
        for name, model in MODELS.items():
            if training == "full" and only_lora(name):
                continue
            cells = name, training, str(resolution), *what_fits(model, training, resolution)
            print(f"| {' | '.join(cells)} |", flush=True)


NVLINK = 450  # GB/s in each direction, of each GPU: H100, H200
NETWORKS = (100, 200, 400, 3200)  # Gbit/s in each direction, of each machine
CLUSTERS = ((8, 1), (64, 8), (512, 64))  # GPUs, machines
SHARING = {"DDP": "", "FSDP": "--fsdp", "hybrid": "--fsdp --hybrid_shard"}


def print_network_table(name):
    """What a step of a model sends by LoRA and full training, and the seconds of that at full speed of the links."""
    columns = ["GPUs", "training", "sharing", "GB, each GPU", "GB, each machine", "NVLink"]
    columns += [f"{speed} Gbit/s" for speed in NETWORKS]
    print(f"| {' | '.join(columns)} |")
    print("| --- " * len(columns) + "|")
    model = MODELS[name]
    dtype = DTYPES["bf16"]
    transformer = on_meta(lambda: model.transformer(**model.config))
    weights = size_of(transformer, dtype)
    full = size_of(transformer, torch.float32)
    lora = parse_args(["--model", name])
    adapted, _ = model_to_train(model, lora, FakeTensorMode(allow_non_fake_inputs=True))
    trained = {"LoRA": sum(each.numel() * 4 for each in adapted.parameters() if each.requires_grad), "all": full}
    for gpus, machines in CLUSTERS:
        for training, gradients in trained.items():
            for sharing, flags in SHARING.items():
                words = f"--num_processes {gpus} --num_machines {machines} {flags}".split()
                sent = sent_bytes(parse_args(words), weights=weights, gradients=gradients)
                in_gb = {link: size / 1e9 for link, size in sent.items()}
                cells = [str(gpus), training, sharing, f"{in_gb['each GPU']:.2f}"]
                if machines == 1:
                    cells += ["0", f"{in_gb['each GPU'] / NVLINK:.3f} s", *["-"] * len(NETWORKS)]
                else:
                    inside = in_gb["each GPU"] - in_gb["each machine"] * machines / gpus
                    cells += [
                        f"{in_gb['each machine']:.2f}",
                        f"{inside / NVLINK:.3f} s" if sharing == "hybrid" else "-",
                    ]
                    cells += [f"{8 * in_gb['each machine'] / speed:.3f} s" for speed in NETWORKS]
                print(f"| {' | '.join(cells)} |")


def main(argv=None):
    args = parse_args(argv)
    if args.table:
        print_table()
    elif args.network_table:
        print_network_table(args.model)
    else:
        print_estimate(MODELS[args.model], args)


if __name__ == "__main__":
    main()
