"""Prompts and pictures: text encoders, single files, sampling while training, without a trace in the training; and
what a run tells: grids, metrics, trackers, model cards."""

import errno
import functools
import hashlib
import importlib.metadata
import json
import math
import os
import random
import resource
import shlex
import shutil
import sys
import time
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path

import numpy as np
import torch
from accelerate.utils import gather_object
from diffusers import FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel
from diffusers.loaders.single_file_utils import convert_ldm_vae_checkpoint
from diffusers.pipelines.flux.pipeline_flux import FluxPipelineOutput, calculate_shift
from diffusers.training_utils import free_memory
from huggingface_hub import HfApi, ModelCard, ModelCardData
from huggingface_hub.errors import HTTPError
from PIL import Image, ImageDraw, ImageFont
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from tqdm.auto import tqdm
from transformers import (
    MODEL_FOR_DEPTH_ESTIMATION_MAPPING,
    AutoConfig,
    AutoTokenizer,
    CLIPTextConfig,
    CLIPTextModel,
    T5Config,
    T5EncoderModel,
)

from common import fail
from common.flow_matching import bound, condition_tokens, omini_forward, step_generator
from common.latents import (
    PATCH,
    decode_latents,
    encode_moments,
    fit,
    mean_latents,
    pack_latents,
    select_tokens,
    to_tensor,
    token_hole,
    unpack_latents,
)
from common.lora import (
    FLUX_LAYERS,
    add_lora,
    count_weights,
    diffusers_state_dict,
    find_checkpoints,
    is_sharded,
    load_model,
    load_text_pipeline,
    writing,
)


SETTINGS = (  # that a model card shows
    *("recipe", "condition_type", "mode", "resolution", "target_size", "rank", "lora_alpha", "quantize_base"),
    *("mixed_precision", "optimizer", "learning_rate", "lr_scheduler", "train_batch_size"),
    *("gradient_accumulation_steps", "max_train_steps", "num_train_epochs", "guidance_scale", "seed"),
)
FIRST_STEPS = 5  # whose time tells how long a run takes, but for the first, which may compile
CLIP_TARGET_MODULES = ("q_proj", "k_proj", "v_proj", "out_proj")
TOKENIZERS = ("tokenizer", "tokenizer_2")
CHECKPOINT_PREFIX, FLUX_ROOTS = "model.diffusion_model.", {name.split(".")[0] for name in FLUX_LAYERS}
CHECKPOINT_SIZES = (
    "double_blocks.0.img_attn.norm.query_norm.scale",
    *("img_in.weight", "txt_in.weight", "vector_in.in_layer.weight"),
)


@contextmanager
def undisturbed(*models, device):
    """Evaluation mode without gradients; afterwards all random states and each module's mode are as before."""
    modes = [(module, module.training) for model in models for module in model.modules()]
    python_state, numpy_state = random.getstate(), np.random.get_state()
    accelerators = [] if device.type == "cpu" else [device]
    try:
        with torch.no_grad(), torch.random.fork_rng(accelerators, device_type=device.type):
            for model in models:
                model.eval()
            yield
    finally:
        random.setstate(python_state)
        np.random.set_state(numpy_state)
        for module, mode in modes:
            module.training = mode


# ---------------------------------------------------------------------------------------------------------------------
# FLUX.1 in single files, as its authors and ComfyUI publish it
# ---------------------------------------------------------------------------------------------------------------------


def single_file(args):
    """Whether the model is the four files that FLUX.1's authors and ComfyUI publish, not a folder of diffusers'."""
    return args.pretrained_model_name_or_path.endswith(".safetensors")


def file_problems(args):
    """What is wrong with the files of a model in single files, as far as their keys tell."""
    problems = []
    wanted = {  # tensors that the right file has
        "pretrained_model_name_or_path": ("double_blocks.0.img_attn.qkv.weight", *CHECKPOINT_SIZES),
        "ae": ("decoder.conv_in.weight",),
        "clip_l": ("text_model.embeddings.token_embedding.weight",),
        "t5xxl": ("encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight",),
    }
    for name, needed in wanted.items():
        path = getattr(args, name)
        try:
            keys = file_shapes(path) if path else None
        except (OSError, SafetensorError) as error:
            problems.append(f"--{name} {path}: not a whole safetensors file ({error})")
            continue
        if keys is None:
            problems.append(f"--{name} is needed with {Path(args.pretrained_model_name_or_path).name}")
        elif absent := [key for key in needed if key not in keys]:
            problems.append(f"--{name} {path}: holds no {absent[0]}, so it is another model or form than FLUX.1's own")
        elif any(name.endswith(("scale_weight", "weight_scale", "scaled_fp8")) for name in keys):
            problems.append(f"--{name} {path}: scaled fp8 is not read: take the 16-bit file")
    folder = args.tokenizer_dir
    if not folder or not all((folder / name / "tokenizer_config.json").is_file() for name in TOKENIZERS):
        problems.append(
            f"--tokenizer_dir {folder}: needed with folders {' and '.join(TOKENIZERS)} of FLUX.1-dev in it"
        )
    return problems


def file_shapes(path):
    """{key: shape} of a safetensors file, keys without the prefix of all-in-one checkpoints."""
    with safe_open(path, "pt") as file:
        return {key.removeprefix(CHECKPOINT_PREFIX): file.get_slice(key).get_shape() for key in file.keys()}  # noqa: SIM118


def transformer_config(args):
    """The config of the transformer; that of a single file follows from its shapes."""
    if not single_file(args):
        return FluxTransformer2DModel.load_config(
            args.pretrained_model_name_or_path,
            subfolder="transformer",
            revision=args.revision,
            cache_dir=args.cache_dir,
        )
    shapes = file_shapes(args.pretrained_model_name_or_path)
    (width, channels), head = shapes["img_in.weight"], shapes["double_blocks.0.img_attn.norm.query_norm.scale"][0]
    numbers = {kind: {key.split(".")[1] for key in shapes if key.startswith(kind)} for kind in ("double", "single")}
    return {
        "_class_name": "FluxTransformer2DModel",
        "in_channels": channels,
        "num_layers": len(numbers["double"]),
        "num_single_layers": len(numbers["single"]),
        "attention_head_dim": head,
        "num_attention_heads": width // head,
        "joint_attention_dim": shapes["txt_in.weight"][1],
        "pooled_projection_dim": shapes["vector_in.in_layer.weight"][1],
        "guidance_embeds": "guidance_in.in_layer.weight" in shapes,
        "axes_dims_rope": [16, (head - 16) // 2, (head - 16) // 2],
    }


def load_part(model_class, subfolder, args, dtype):
    """`load_model`, or the transformer or VAE out of a single file."""
    if not single_file(args):
        return load_model(model_class, subfolder, args, dtype)
    state_dict = load_file(args.ae if subfolder == "vae" else args.pretrained_model_name_or_path)
    if subfolder == "vae":
        config = vae_config(state_dict)
        state_dict = convert_ldm_vae_checkpoint(state_dict, config)
    else:
        config = transformer_config(args)
        own = {key.removeprefix(CHECKPOINT_PREFIX): value for key, value in state_dict.items()}
        own = {key: value for key, value in own.items() if key.split(".")[0] in FLUX_ROOTS}  # of all-in-one files
        state_dict = diffusers_state_dict(own)
    with torch.device("meta"):
        model = model_class.from_config(config)
    model.load_state_dict({key: value.to(dtype) for key, value in state_dict.items()}, assign=True)
    return model.requires_grad_(False).eval()


def vae_config(state_dict):
    """The config of FLUX.1's VAE, whose file has the names of latent diffusion, from its shapes."""
    levels = {key.split(".")[2] for key in state_dict if key.startswith("encoder.down.")}
    blocks = {key.split(".")[4] for key in state_dict if key.startswith("encoder.down.0.block.")}
    return {
        "down_block_types": ["DownEncoderBlock2D"] * len(levels),
        "up_block_types": ["UpDecoderBlock2D"] * len(levels),
        "block_out_channels": [len(state_dict[f"encoder.down.{i}.block.0.conv1.weight"]) for i in range(len(levels))],
        "layers_per_block": len(blocks),
        "latent_channels": state_dict["decoder.conv_in.weight"].shape[1],
        "use_quant_conv": False,
        "use_post_quant_conv": False,
        "shift_factor": 0.1159,
        "scaling_factor": 0.3611,
    }


def load_scheduler(args):
    """The scheduler that the model was made with."""
    if single_file(args):
        guided = transformer_config(args)["guidance_embeds"]  # FLUX.1-dev, not -schnell
        return FlowMatchEulerDiscreteScheduler(shift=3.0 if guided else 1.0, use_dynamic_shifting=guided)
    return FlowMatchEulerDiscreteScheduler.from_pretrained(
        args.pretrained_model_name_or_path, subfolder="scheduler", revision=args.revision, cache_dir=args.cache_dir
    )


def load_file_pipeline(args, dtype):
    """The pipeline with text encoders and tokenizers alone, of a model in single files."""
    tokenizer, tokenizer_2 = (
        AutoTokenizer.from_pretrained(args.tokenizer_dir / name, trust_remote_code=False) for name in TOKENIZERS
    )
    clip, t5 = load_file(args.clip_l), load_file(args.t5xxl)
    clip = {key.removeprefix("text_model."): value for key, value in clip.items() if key.startswith("text_model.")}
    vocabulary, width = clip["embeddings.token_embedding.weight"].shape
    clip_config = CLIPTextConfig(
        vocab_size=vocabulary,
        hidden_size=width,
        intermediate_size=len(clip["encoder.layers.0.mlp.fc1.weight"]),
        num_hidden_layers=len({key.split(".")[2] for key in clip if key.startswith("encoder.layers.")}),
        num_attention_heads=width // 64,
        eos_token_id=tokenizer.eos_token_id,
    )
    first = "encoder.block.0.layer.0.SelfAttention"
    buckets, heads = t5[f"{first}.relative_attention_bias.weight"].shape
    t5_config = T5Config(
        vocab_size=len(t5["shared.weight"]),
        d_model=t5["shared.weight"].shape[1],
        d_kv=len(t5[f"{first}.q.weight"]) // heads,
        d_ff=len(t5["encoder.block.0.layer.1.DenseReluDense.wi_0.weight"]),
        num_layers=len({key.split(".")[2] for key in t5 if key.startswith("encoder.block.")}),
        num_heads=heads,
        relative_attention_num_buckets=buckets,
        feed_forward_proj="gated-gelu",
    )
    return FluxPipeline(
        scheduler=load_scheduler(args),
        vae=None,
        transformer=None,
        text_encoder=CLIPTextModel.from_pretrained(None, config=clip_config, state_dict=clip, dtype=dtype),
        tokenizer=tokenizer,
        text_encoder_2=T5EncoderModel.from_pretrained(None, config=t5_config, state_dict=t5, dtype=dtype),
        tokenizer_2=tokenizer_2,
    )


# ---------------------------------------------------------------------------------------------------------------------
# Prompts
# ---------------------------------------------------------------------------------------------------------------------


class PromptEncoder:
    """CLIP and T5: the embeddings of prompts; CLIP with a LoRA in training if there is --train_text_encoder.

    One without trained parts embeds every prompt once, in `cache`, and is freed. With `keep`, for prompts that are not
    all known before, it stays and embeds those too.
    """

    def __init__(self, accelerator, args, dtype, *, keep=False):
        self.accelerator, self.args, self.dtype, self.keep = accelerator, args, dtype, keep
        load = load_file_pipeline if single_file(args) else functools.partial(load_text_pipeline, FluxPipeline)
        self.pipeline = load(args, dtype)
        self.encoders = {"clip_l": self.pipeline.text_encoder, "t5": self.pipeline.text_encoder_2}
        for encoder in self.encoders.values():
            encoder.requires_grad_(False).eval()  # T5 has dropout
        self.lora_params, self.trained = [], set()
        self.add_trained_parts()
        if args.offload:
            names = {"clip_l": "text_encoder", "t5": "text_encoder_2"}
            trained = [names[kind] for kind in self.trained]
            self.pipeline.enable_group_offload(accelerator.device, offload_type="leaf_level", exclude_modules=trained)
        else:
            self.pipeline.to(accelerator.device)
        self.cached = {"clip_l": {}, "t5": {}}  # {prompt: embedding on the CPU}

    def add_trained_parts(self):
        args = self.args
        if "train_text_encoder" in args and args.train_text_encoder:
            layers = CLIP_TARGET_MODULES + (("fc1", "fc2") if args.lora_layers == "kohya" else ())
            settings = {"rank": args.rank, "alpha": args.lora_alpha, "dropout": 0.0, "target_modules": layers}
            self.lora_params, self.trained = add_lora(self.encoders["clip_l"], **settings), {"clip_l"}

    def parameters(self):
        return self.lora_params

    def replace(self, prompt):
        """The prompt as the tokenizers get it."""
        return prompt

    def embed(self, kind, prompts):
        """CLIP's pooled embeddings [B, P] or T5's [B, T, D]."""
        prompts = [self.replace(prompt) for prompt in prompts]
        with self.accelerator.autocast():
            if kind == "clip_l":
                embeds = self.pipeline._get_clip_prompt_embeds(prompts)
            else:
                length = self.args.max_sequence_length
                embeds = self.pipeline._get_t5_prompt_embeds(prompts, max_sequence_length=length, dtype=self.dtype)
        return embeds.to(self.dtype)

    def kept_embed(self, kind, prompt):
        """The embedding on the CPU."""
        return self.embed(kind, [prompt]).cpu()

    @torch.no_grad()
    def cache(self, prompts):
        """Embeds the prompts with the encoders that are not in training, which are then freed.

        The processes share the work; each has all.
        """
        for kind in sorted(self.encoders.keys() - self.trained):  # in one order on all processes
            quiet = not self.accelerator.is_main_process
            with self.accelerator.split_between_processes(prompts) as share:
                bar = tqdm(share, desc=f"Encoding prompts, {kind}", unit="prompt", disable=quiet)
                embeds = [(prompt, self.kept_embed(kind, prompt)) for prompt in bar]
            self.cached[kind] = dict(gather_object(embeds))
            if self.keep:
                continue
            del self.encoders[kind]
            if kind == "t5":
                self.pipeline.text_encoder_2 = None
            elif not self.lora_params:  # a LoRA is saved at the end
                self.pipeline.text_encoder = None
        free_memory()

    def __call__(self, prompts):
        """(prompt_embeds [B, T, D], pooled_prompt_embeds [B, P])."""
        return tuple(
            self.embed(kind, prompts) if kind in self.trained else self.recall(kind, prompts)
            for kind in ("t5", "clip_l")
        )

    @torch.no_grad()
    def recall(self, kind, prompts):
        """Embeddings from the cache, of a prompt that is not in it from the encoder: one at a time, so that what else
        is in the batch does not matter."""
        known = self.cached[kind]
        embeds = [known[prompt] if prompt in known else self.embed(kind, [prompt]) for prompt in prompts]
        return torch.cat([embed.to(self.accelerator.device) for embed in embeds])


# ---------------------------------------------------------------------------------------------------------------------
# Pictures
# ---------------------------------------------------------------------------------------------------------------------


def sampling_pipeline(pipeline_class, transformer, vae, noise_scheduler):
    """A pipeline around the models in training, without text encoders and with a scheduler of its own."""
    return pipeline_class(
        scheduler=FlowMatchEulerDiscreteScheduler.from_config(noise_scheduler.config),
        vae=vae,
        text_encoder=None,
        tokenizer=None,
        text_encoder_2=None,
        tokenizer_2=None,
        transformer=transformer,
    )


def generate_images(accelerator, pipeline, calls, *, seed):
    """One image per dictionary of pipeline arguments in `calls`, image i from a generator seeded with `seed` + i.

    The processes share the work, but for a sharded model, which needs all of them for each image; each process
    returns all images, in order.
    """
    sharded = is_sharded(pipeline.transformer)
    pipeline.set_progress_bar_config(disable=True)
    images = []
    numbered = list(enumerate(calls))
    sharing = nullcontext(numbered) if sharded else accelerator.split_between_processes(numbered)
    with sharing as share, accelerator.autocast():
        quiet = not accelerator.is_main_process
        for i, call in tqdm(share, desc="Validation", unit="image", leave=False, disable=quiet):
            generator = torch.Generator().manual_seed(seed + i)  # on the CPU: the same image on every device
            images += pipeline(**call, generator=generator).images
    return images if sharded else gather_object(images)


class OminiPipeline(FluxPipeline):
    """FluxPipeline with conditions."""

    @torch.no_grad()
    def __call__(
        self,
        prompt=None,
        *,
        conditions=(),
        condition_images=(),
        hole=None,
        prompt_embeds=None,
        pooled_prompt_embeds=None,
        height=512,
        width=512,
        num_inference_steps=28,
        guidance_scale=3.5,
        image_guidance_scale=1.0,
        independent_condition=False,
        image_adapters=(),
        kv_cache=False,
        compile_blocks=False,
        max_sequence_length=512,
        generator=None,
        output_type="pil",
    ):
        """Draws a picture for each prompt (or each of prompt_embeds [B, T, D], pooled_prompt_embeds [B, P]).

            conditions            list of Condition, as the adapter's metadata has them
            condition_images      for each a PIL image of its size, or a list of B
            hole                  for token_integration: boolean [H, W] or [B, H, W], true where the image is drawn
            image_guidance_scale  above 1, the velocity is led away from the one with black conditions
            independent_condition as the adapter was trained
            image_adapters        names of LoRAs, such as a style, for text and image
            kv_cache              compute the conditions at the first step only: exact with independent_condition

        `output_type` "latent" returns normalised latents [B, C, height / 8, width / 8].
        """
        device, config = self.transformer.device, self.scheduler.config
        if prompt_embeds is None:
            prompt_embeds, pooled_prompt_embeds, _ = self.encode_prompt(
                prompt, None, device=device, max_sequence_length=max_sequence_length
            )
        batch_size, dtype = len(prompt_embeds), prompt_embeds.dtype
        if hole is not None:
            hole = [token_hole(mask) for mask in np.broadcast_to(hole, (batch_size, height, width))]
            hole = torch.from_numpy(np.stack(hole)).to(device)
            if hole.flatten(1).all(dim=1).any() or not hole.flatten(1).any(dim=1).all():
                raise ValueError("a hole must contain some and leave some of the image's tokens of 16 pixels")

        def encode(images):
            images = images if isinstance(images, list) else [images] * batch_size
            moments = encode_moments(self.vae, torch.stack([to_tensor(image.convert("RGB")) for image in images]))
            return mean_latents(moments, self.vae.config).to(device, dtype)

        condition_latents = [encode(images) for images in condition_images]
        passes = [condition_latents]
        if image_guidance_scale != 1:
            passes.append([encode(Image.new("RGB", condition.size[::-1])) for condition in conditions])
        passes = [(condition_tokens(each, conditions, hole), [] if kv_cache else None) for each in passes]
        latents, ids = self.prepare_latents(
            batch_size, self.vae.config.latent_channels, height, width, dtype, device, generator
        )
        valid = None
        if hole is not None:
            latents, ids, valid = select_tokens(latents, ids, hole.flatten(1))
        guidance = torch.full((batch_size,), guidance_scale, device=device)
        mu = calculate_shift(
            height * width // PATCH**2,
            config.get("base_image_seq_len", 256),
            config.get("max_image_seq_len", 4096),
            config.get("base_shift", 0.5),
            config.get("max_shift", 1.15),
        )
        sigmas = np.linspace(1.0, 1 / num_inference_steps, num_inference_steps)
        self.scheduler.set_timesteps(sigmas=sigmas, device=device, mu=mu)
        self.scheduler.set_begin_index(0)
        for t in self.progress_bar(self.scheduler.timesteps):
            velocities = [
                bound(omini_forward, self.transformer)(
                    hidden_states=latents,
                    encoder_hidden_states=prompt_embeds,
                    pooled_projections=pooled_prompt_embeds,
                    timestep=t.expand(batch_size).to(dtype) / 1000,
                    guidance=guidance if self.transformer.config.guidance_embeds else None,
                    txt_ids=torch.zeros(prompt_embeds.shape[1], 3, device=device),
                    img_ids=ids,
                    conditions=tokens,
                    independent_condition=independent_condition,
                    image_adapters=image_adapters,
                    image_valid=valid,
                    cache=cache,
                    compile_blocks=compile_blocks,
                )
                for tokens, cache in passes
            ]
            velocity = velocities[0]
            if len(passes) == 2:
                velocity = velocities[1] + image_guidance_scale * (velocities[0] - velocities[1])
            latents = self.scheduler.step(velocity, t, latents, return_dict=False)[0]
        if hole is not None:
            place = [condition.type for condition in conditions].index("token_integration")
            whole, kept = pack_latents(condition_latents[place]), latents.new_ones(latents.shape[:2], dtype=bool)
            whole[hole.flatten(1)] = latents[kept if valid is None else valid]
            latents = whole
        latents = unpack_latents(latents, height // 8, width // 8)
        if output_type == "latent":
            return FluxPipelineOutput(images=latents)
        images = decode_latents(self.vae, latents.to(self.vae.device))
        return FluxPipelineOutput(images=self.image_processor.postprocess(images, output_type=output_type))


def draw_class_images(accelerator, pipeline, call, args, present):
    """Fills --class_data_dir up to --num_class_images with what the untrained model draws, where `present`
    pictures are already; `call` are the pipeline's arguments for --class_prompt.

    Image i comes from (seed, i) and appears whole or not at all: an interrupted run goes on where it was. A batch is
    drawn as a whole also for one absent image, for rounding depends on the size of a batch.
    """
    args.class_data_dir.mkdir(parents=True, exist_ok=True)
    paths = [args.class_data_dir / f"class-{i:05d}.png" for i in range(args.num_class_images)]
    absent = [path for path in paths if not path.exists()]
    absent = set(absent[: args.num_class_images - present])
    batches = [range(len(paths))[i : i + args.sample_batch_size] for i in range(0, len(paths), args.sample_batch_size)]
    batches = [batch for batch in batches if any(paths[i] in absent for i in batch)]
    accelerator.wait_for_everyone()  # all have listed what is absent
    dtype = {"fp16": torch.float16, "bf16": torch.bfloat16}.get(args.prior_generation_precision)
    device = accelerator.device
    pipeline.set_progress_bar_config(disable=True)
    precision = torch.autocast(device.type, dtype) if dtype else accelerator.autocast()
    quiet = not absent or not accelerator.is_main_process
    sharing = accelerator.split_between_processes(batches)
    with undisturbed(pipeline.transformer, device=device), precision, sharing as share:
        for batch in tqdm(share, desc="Drawing class images", unit="batch", disable=quiet):
            generators = [step_generator(args.seed, i) for i in batch]
            images = pipeline(**call, num_images_per_prompt=len(batch), generator=generators).images
            for path, image in zip([paths[i] for i in batch], images, strict=True):
                if path in absent:
                    partial = path.with_suffix(".partial")
                    with writing(path, partial):
                        image.save(partial, format="PNG")
                        partial.replace(path)
    accelerator.wait_for_everyone()


def check_depth_model(args):
    """Problems of --depth_model."""
    if not {"depth", "depth_pred"} & set(args.condition_type):
        return []
    try:
        config = AutoConfig.from_pretrained(args.depth_model, cache_dir=args.cache_dir, trust_remote_code=False)
    except (OSError, ValueError) as error:
        return [f"--depth_model {args.depth_model}: cannot be loaded ({str(error).splitlines()[0]})"]
    if type(config) not in MODEL_FOR_DEPTH_ESTIMATION_MAPPING:
        return [f"--depth_model {args.depth_model}: is a {config.model_type}, which estimates no depth"]
    return []


def depth_file(image, args):
    """Where the depth map of a picture of --target_size is kept."""
    digest = hashlib.sha256(image.tobytes() + str((image.size, args.depth_model)).encode()).hexdigest()
    return args.output_dir / "depth" / f"{digest[:32]}.png"


def estimate_depth(accelerator, examples, args):
    """Depth maps of all pictures into output_dir/depth, by the processes together; what is there stays."""
    from transformers import pipeline

    folder = args.output_dir / "depth"
    folder.mkdir(parents=True, exist_ok=True)
    where = {"device": accelerator.device, "model_kwargs": {"cache_dir": args.cache_dir}}
    estimator = pipeline("depth-estimation", model=args.depth_model, trust_remote_code=False, **where)
    starts = list(range(0, len(examples), args.depth_batch_size))
    with accelerator.split_between_processes(starts) as share:
        for start in tqdm(share, desc="Estimating depth", unit="batch", disable=not accelerator.is_main_process):
            batch = examples[start : start + args.depth_batch_size]
            images = [fit(example.image(), args.target_size, args) for example in batch]
            images = [image for image in images if not depth_file(image, args).exists()]
            for image, found in zip(
                images, estimator(images, batch_size=args.depth_batch_size) if images else (), strict=True
            ):
                path = depth_file(image, args)
                partial = path.with_suffix(f".{accelerator.process_index}")
                with writing(path, partial):
                    found["depth"].convert("L").resize(image.size).save(partial, format="PNG")
                    partial.replace(path)
    accelerator.wait_for_everyone()


def wrap(text, font, width):
    """The text in lines of at most `width` pixels, broken at spaces or within words that are wider."""
    lines = []
    for paragraph in text.splitlines() or [""]:
        line = ""
        for word in paragraph.split():
            if line and font.getlength(f"{line} {word}") > width:
                lines.append(line)
                line = ""
            line = f"{line} {word}" if line else word
            while len(line) > 1 and font.getlength(line) > width:
                fits = next(n for n in range(len(line) - 1, 0, -1) if n == 1 or font.getlength(line[:n]) <= width)
                lines.append(line[:fits])
                line = line[fits:]
        lines.append(line)
    return "\n".join(lines)


def image_grid(images, captions, columns=4, min_width=192, title=""):
    """PIL images in rows of `columns`, each with its caption below, under a title; small ones are enlarged to
    `min_width` pixels."""
    import matplotlib

    scale = max(1, math.ceil(min_width / max(image.width for image in images)))
    images = [image.resize((image.width * scale, image.height * scale), Image.Resampling.NEAREST) for image in images]
    width, height = max(image.width for image in images), max(image.height for image in images)
    font_size = max(13, width // 28)
    gap, columns = font_size // 2, min(columns, len(images))
    font = ImageFont.truetype(Path(matplotlib.get_data_path()) / "fonts" / "ttf" / "DejaVuSans.ttf", font_size)
    draw = ImageDraw.Draw(Image.new("RGB", (1, 1)))
    style = {"font": font, "spacing": font_size // 4}
    tall = lambda text: math.ceil(draw.multiline_textbbox((0, 0), text, **style)[3]) + gap if text else 0  # noqa: E731
    captions = [wrap(caption, font, width) for caption in captions]
    cell_width, cell_height = width + gap, height + max(map(tall, captions)) + gap
    title = wrap(title, font, columns * cell_width - gap)
    top = tall(title) + gap
    grid = Image.new("RGB", (columns * cell_width + gap, -(-len(images) // columns) * cell_height + top), "white")
    draw = ImageDraw.Draw(grid)
    draw.multiline_text((gap, gap // 2), title, fill="black", **style)
    for i, (image, caption) in enumerate(zip(images, captions, strict=True)):
        x, y = gap + i % columns * cell_width, top + i // columns * cell_height
        grid.paste(image, (x, y))
        draw.multiline_text((x, y + height + gap // 2), caption, fill="#444444", **style)
    return grid


def log_images(accelerator, images, captions, *, name, step, grid):
    """Sends images with their captions to every tracker of the run; TensorBoard, which has none, gets the grid."""
    for tracker in accelerator.trackers:
        if tracker.name == "tensorboard":
            tracker.log_images({name: np.asarray(grid)[None]}, step=step, dataformats="NHWC")
            tracker.log({name: "\n".join(f"1. {caption}" for caption in captions)}, step=step)
        elif tracker.name == "wandb":
            import wandb

            pictures = [wandb.Image(image, caption=text) for image, text in zip(images, captions, strict=True)]
            tracker.log({name: pictures}, step=step)


def save_images(accelerator, args, images, captions, *, step, prompt="", columns=4, grid=None):
    """Sends pictures to validation/step-N.png, there as `grid` if given, and to the trackers.

    `prompt` is that of all of them, `captions` say what differs.
    """
    if accelerator.is_main_process:
        path = args.output_dir / "validation" / f"step-{step:06d}.png"
        grid = grid or image_grid(images, captions, columns, title=f"{prompt}\nstep {step}")
        with writing(path):
            path.parent.mkdir(exist_ok=True)
            grid.save(path)
        captions = [f"{prompt} | {caption}, step {step}".removeprefix(" | ") for caption in captions]
        with writing(args.output_dir / args.logging_dir):
            log_images(accelerator, images, captions, name="validation", step=step, grid=grid)


# ---------------------------------------------------------------------------------------------------------------------
# Logging
# ---------------------------------------------------------------------------------------------------------------------


def start_logging(accelerator, args, project, last_step, marks=None):
    """Writes args.json, with those that are not as by default and the versions of the libraries, and starts the
    trackers under the name of `project`.

    What TensorBoard has of steps after `last_step`, from which the run goes on, is dropped as by `open_metrics`.
    `marks` are {what happens: the step after which it does}, 0 for never, for plots.
    """
    values = {name: value for name, value in vars(args).items() if name != "hub_token"}
    values = {name: str(value) if isinstance(value, Path) else value for name, value in values.items()}
    if accelerator.is_main_process:
        libraries = ("torch", "diffusers", "transformers", "peft", "accelerate")
        versions = {name: importlib.metadata.version(name) for name in libraries}
        marks = {what: step for what, step in (marks or {}).items() if step}
        record = {"args": values, "changed": args.changed, "versions": versions, "marks": marks}
        text = json.dumps(record, indent=2, default=str)
        with writing(args.output_dir / "args.json"):
            (args.output_dir / "args.json").write_text(text + "\n")
    if accelerator.log_with:
        if token := getattr(args, "hub_token", None):  # wandb keeps the command
            sys.argv = [word.replace(token, "***") for word in sys.argv]
        values = {name: "" if value is None else value for name, value in values.items()}
        plain = (bool, int, float, str)  # all that TensorBoard takes
        with writing(args.output_dir / args.logging_dir):
            config = {n: v if isinstance(v, plain) else str(v) for n, v in values.items()}
            purge = {"tensorboard": {"purge_step": last_step + 1}} if last_step else {}
            accelerator.init_trackers(project, config, init_kwargs=purge)


def peak_memory(device):
    """Most memory in use so far, in GiB: the accelerator's, or the process' on a CPU."""
    if device.type == "cpu":
        unit = 2**10 if sys.platform == "linux" else 1  # macOS counts bytes
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30
    return torch.accelerator.max_memory_allocated(device) / 2**30


def open_metrics(path, last_step):
    """Opens the run's metrics, a JSON object per line, to be continued after `last_step`; later lines are dropped."""
    kept = [row for row in read_metrics(path) if row["step"] <= last_step]
    partial = path.with_name(f".{path.name}.partial")
    with writing(path, partial):
        partial.write_text("".join(json.dumps(row) + "\n" for row in kept))
        partial.replace(path)
    return path.open("ab", buffering=0)  # what a full disk does not take is not kept to be tried again at the end


def read_metrics(path):
    """The rows of a file of metrics; lines that a crash of the machine left torn are passed over."""
    rows = []
    for line in path.read_text(errors="replace").splitlines() if path.exists() else []:
        with suppress(ValueError, TypeError, KeyError, RecursionError):
            row = json.loads(line)
            rows += [row] if {type(row[name]) for name in ("step", "loss", "lr")} <= {int, float} else []
    return rows


def step_logs(optimizer, grad_norm, num_images, started, device):
    """What is logged of every step that drew `num_images` pictures since `started`, beside its loss."""
    return {
        **learning_rates(optimizer),
        "grad_norm": float(grad_norm),
        "images_per_second": num_images / (time.perf_counter() - started),
        "peak_memory_gb": peak_memory(device),
    }


def log_step(accelerator, progress_bar, metrics, step, logs):
    """Sends one step's numbers to the progress bar, the trackers and, on the main process, `open_metrics`' file."""
    progress_bar.set_postfix({name: f"{logs[name]:.3g}" for name in ("loss", "lr")}, refresh=False)
    progress_bar.update()  # which draws it ten times a second at most
    elapsed, done = progress_bar.format_dict["elapsed"], 0 if progress_bar.disable else step - progress_bar.initial
    if done == 1:
        progress_bar.first = elapsed
    if done == FIRST_STEPS:
        left = (progress_bar.total - step) * (elapsed - progress_bar.first) / (FIRST_STEPS - 1)
        memory = f"{logs['peak_memory_gb']:.1f} GiB of memory"
        progress_bar.write(f"  expected {progress_bar.format_interval(left)} more, {memory}, by the first steps")
    with writing(accelerator.logging_dir or "."):
        accelerator.log(logs, step=step)
    if metrics:
        line = (json.dumps({"step": step, **logs}) + "\n").encode()
        with writing(metrics.name):
            if metrics.write(line) < len(line):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def learning_rates(optimizer):
    """lr, what a step is multiplied with; of Prodigy, whose lr is a factor of its estimate d, also that d."""
    group = optimizer.param_groups[0]
    return {"lr": group["lr"] * group["d"], "prodigy_d": group["d"]} if "d" in group else {"lr": group["lr"]}


def running_mean(values, window):
    """The exponential mean of about `window` values before each; those that are not finite are passed over."""
    decay, mean, weight, means = 1 - 1 / window, 0.0, 0.0, []
    for value in values:
        if math.isfinite(value):
            mean, weight = decay * mean + (1 - decay) * value, decay * weight + 1 - decay
        means.append(mean / weight if weight else math.nan)
    return means


def plot_metrics(output_dir):
    """Draws loss.png from metrics.jsonl: the loss (faint) and its running mean over the learning rate, and with lines
    the checkpoints that are there and what args.json marks."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    rows, marks = read_metrics(output_dir / "metrics.jsonl"), {}
    if not rows:
        return
    with suppress(OSError, ValueError, TypeError, KeyError):
        marks = json.loads((output_dir / "args.json").read_text())["marks"]
    steps, losses = [row["step"] for row in rows], np.array([row["loss"] for row in rows], float)
    figure, (upper, lower) = plt.subplots(
        2, 1, figsize=(8, 6), sharex=True, height_ratios=(3, 1), layout="constrained"
    )
    window = max(1, min(50, len(rows) // 10))
    mean = running_mean(losses, window)
    upper.plot(steps, losses, color="C0", alpha=0.25, linewidth=0.8 if len(rows) > 500 else 1.5, label="loss")
    upper.plot(steps, mean, color="C0", linewidth=2, label=f"running mean of {window} steps")
    shown = losses[np.isfinite(losses)]
    if len(shown) > 200:  # a few outliers would flatten the rest
        low, high = np.percentile(shown, (0, 99.5))
        upper.set_ylim(low - 0.05 * (high - low), high + 0.05 * (high - low))
    upper.set(title=output_dir.resolve().name, ylabel="loss")
    checkpoints = [int(folder.name[11:]) for folder in find_checkpoints(output_dir)]
    checkpoints = [step for step in checkpoints if steps[0] <= step <= steps[-1]]
    if checkpoints:
        named = checkpoints[:: -max(1, len(checkpoints) // 8)]  # from the last one
        ticks = upper.secondary_xaxis("top")
        ticks.set_xticks(checkpoints, [step if step in named else "" for step in checkpoints], color="0.4")
        ticks.set_xlabel("checkpoints", color="0.4")
        for step in checkpoints:
            upper.axvline(step, color="0.85", linewidth=0.8, zorder=0)
    for i, (what, step) in enumerate(marks.items()):
        if steps[0] <= step < steps[-1]:
            lower.axvline(step, color=f"C{3 + i}", linestyle="--")
            upper.axvline(step, color=f"C{3 + i}", linestyle="--", label=f"{what}, step {step}")
    prodigy = "prodigy_d" in rows[-1]
    name, width = ("learning rate x d", 3) if prodigy else ("learning rate", 1.5)
    lower.plot(steps, [row["lr"] for row in rows], color="C1", linewidth=width, label=name)
    if prodigy:
        lower.plot(steps, [row.get("prodigy_d", math.nan) for row in rows], color="black", label="Prodigy's d")
    lower.set(xlabel="step", ylabel="learning rate", yscale="log" if prodigy else "linear")
    lower.xaxis.get_major_locator().set_params(integer=True)
    figure.legend(loc="outside lower center", ncols=3, frameon=False)
    with writing(output_dir / "loss.png"):
        figure.savefig(output_dir / "loss.png", dpi=100)
    plt.close(figure)


# ---------------------------------------------------------------------------------------------------------------------
# What the run leaves behind
# ---------------------------------------------------------------------------------------------------------------------


def save_model_card(args, text, tags, base_model, trigger_words=(), **data):
    """README.md in the output folder: the header that the hub reads, `text`, trigger words, pictures and settings."""
    base_model = None if Path(base_model).exists() else base_model  # the hub refuses cards with a folder here
    parts, folder = [text.strip()], args.output_dir
    if trigger_words:
        parts.append("## Trigger words\n\n" + "\n".join(f"- `{word}`" for word in trigger_words))
    if pictures := sorted((folder / "validation").glob("step-*.png")):
        shown = {int(path.stem[5:]): path.relative_to(folder).as_posix() for path in (pictures[0], pictures[-1])}
        data["widget"] = [{"text": args.validation_prompt or folder.name, "output": {"url": [*shown.values()][-1]}}]
        parts += ["## Pictures", *(f"Step {step}:\n\n![step {step}]({path})" for step, path in shown.items())]
    values = {name: vars(args).get(name) for name in SETTINGS}
    values["num_train_epochs"] = None if args.max_train_steps else args.num_train_epochs  # the steps win
    rows = [f"| {name} | {value} |" for name, value in values.items() if value is not None]
    parts.append("## Settings\n\nAll are in `args.json`.\n\n| flag | value |\n| --- | --- |\n" + "\n".join(rows))
    metadata = ModelCardData(
        library_name="diffusers", tags=[*tags, "diffusers-training"], base_model=base_model, **data
    )
    with writing(folder / "README.md"):
        ModelCard(f"---\n{metadata.to_yaml()}\n---\n\n" + "\n\n".join(parts) + "\n").save(folder / "README.md")


def check_hub(args):
    """Problems of the flags for the hub."""
    problems, token = [], args.hub_token or ""
    if (args.hub_token or args.hub_model_id) and not args.push_to_hub:
        problems.append("--hub_token and --hub_model_id have no effect without --push_to_hub")
    if " " in token or not token.isprintable():  # the library's errors would show it
        problems.append("--hub_token: is no token, for it has spaces or line ends")
    return problems


def create_hub_repo(accelerator, args):
    """The id of the repository that --push_to_hub uploads to, made now so that a wrong token shows before training.

    None without the flag, and in all processes but the main one.
    """
    if not (args.push_to_hub and accelerator.is_main_process):
        return None
    try:
        name = args.hub_model_id or args.output_dir.resolve().name
        return HfApi(token=args.hub_token).create_repo(name, exist_ok=True).repo_id
    except (HTTPError, OSError, ValueError) as error:
        fail(accelerator, [f"--push_to_hub: {error}"])


def push_to_hub(args, repo_id, unwanted=(), beside=None):
    """Uploads the output folder, without checkpoints, logs and what is `unwanted` (patterns), and a file beside it."""
    hub, unwanted = HfApi(token=args.hub_token), ["checkpoint-*/**", ".*", f"{args.logging_dir}/**", *unwanted]
    try:
        hub.upload_folder(repo_id=repo_id, folder_path=args.output_dir, ignore_patterns=unwanted)
        if beside:
            hub.upload_file(repo_id=repo_id, path_or_fileobj=beside, path_in_repo=beside.name)
    except (HTTPError, OSError, ValueError) as error:
        raise SystemExit(
            f"--push_to_hub: {error}\nNothing is lost. Try again: hf upload {repo_id} {args.output_dir}"
        ) from None


def print_header(accelerator, args, about, params, base_size, max_train_steps, steps_per_epoch, batch=None):
    """What is about to be trained on what: `params` of `base_size` parameters, and {what: text} `about` the rest.

    `batch` is the number of pictures if it is not --train_batch_size.
    """
    trainable, batch = count_weights(params), batch or args.train_batch_size
    share = min(1, trainable / base_size)  # a second time embedding is trained beside all there is
    steps = f"{max_train_steps}, {steps_per_epoch or 'unknown'} per epoch; a step is batch {batch} x "
    steps += f"accumulation {args.gradient_accumulation_steps} x {accelerator.num_processes} {accelerator.device.type}"
    lines = {
        "model": args.pretrained_model_name_or_path,
        "trained": f"{trainable:,} parameters, {share:.2%} of all",
        **about,
        "steps": steps,
        "numbers": f"mixed precision {accelerator.mixed_precision}, seed {args.seed}",
        "output": args.output_dir,
    }
    accelerator.print("".join(f"  {what:9}{text}\n" for what, text in lines.items() if text), end="")


def about_text(args, text, stop=None):
    """{what: text} for `print_header` of what a PromptEncoder trains, until step `stop`."""
    until = "" if stop is None else f", trained until step {stop}"
    size = count_weights(text.parameters())
    lines = {"text": f"{size:,} parameters in text encoders{until}" if size else ""}
    if text.parameters() and args.optimizer == "prodigy" and args.text_encoder_lr != args.learning_rate:
        lines["Prodigy"] = f"has one learning rate for all, {args.learning_rate:g}: --text_encoder_lr is not used"
    return lines


def finish(accelerator, args, step, results, command, hub_repo=None, unwanted=(), beside=None):
    """Says what lies where, results {what: path in the output folder}, as far as they are there, and which `command`
    in examples/ draws with it; and uploads it."""
    files = {what: args.output_dir / name for what, name in results.items() if (args.output_dir / name).exists()}
    accelerator.print(f"Trained {step} steps. In {args.output_dir}:")
    width = max([7, *map(len, files)]) + 2
    accelerator.print("\n".join(f"  {what:{width}}{path}" for what, path in files.items()))
    examples = shlex.quote(str(Path(sys.argv[0]).parent / "examples"))
    activated = Path(shutil.which("python") or "").parent == Path(sys.executable).parent  # the environment of this run
    program = f"{'python' if activated else shlex.quote(sys.executable)} {examples}"
    accelerator.print(f"See how it went:\n  {program}/report.py {shlex.quote(str(args.output_dir))}")
    accelerator.print(f"Draw with it:\n  {program}/{command}")
    if hub_repo:
        push_to_hub(args, hub_repo, unwanted, beside)
