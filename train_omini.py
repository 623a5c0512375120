"""Trains FLUX to follow image conditions: OminiControl (arXiv 2411.15098) and OminiControl2 (arXiv 2503.08280).

Conditions join the transformer's sequence as clean tokens, beside text and noisy image, and pass the same frozen
weights. A LoRA acts on the condition tokens alone and is trained:

    x_t = (1 - t) x_0 + t x_1      x_1 is noise
    loss = || transformer(prompt, x_t at t, conditions at 0) - (x_1 - x_0) ||²

FLUX.1 has no such conditions: its blocks, with them, stand below. FLUX.2-klein has them: in diffusers'
`Flux2KleinKVPipeline`, reference images are clean tokens at timestep 0 that attend to themselves alone, and their keys
and values are computed once. That pipeline's transformer is trained, called as the pipeline calls it, so that the
pipeline draws from the LoRA's file. It has no LoRA on some tokens alone: there the LoRA acts on all.

One GPU, or all of them after `accelerate config`:

    accelerate launch train_omini.py \\
      --pretrained_model_name_or_path=black-forest-labs/FLUX.1-dev \\
      --instance_data_dir=photos --condition_type canny --target_size=512 \\
      --mixed_precision=bf16 --gradient_checkpointing --train_batch_size=1 --gradient_accumulation_steps=8 \\
      --max_train_steps=10000 --validation_prompt="a cat on a sofa" --validation_image=cat.png --output_dir=canny

`output_dir` then holds `canny.safetensors`, whose header tells `examples/omini/generate.py` what it was trained for, a
model card, the arguments (args.json), the loss (metrics.jsonl, loss.png), images (validation/) and checkpoints.

| paper                         | authors' code                  | here                                        |
| ----------------------------- | ------------------------------ | ------------------------------------------- |
| joint attention of branches   | group_mask, attn_forward       | group_mask, attn_forward                    |
| double blocks                 | block_forward                  | OminiTransformerBlock                       |
| single blocks                 | single_block_forward           | OminiSingleTransformerBlock                 |
| the transformer               | transformer_forward            | OminiTransformer2DModel.transformer_forward |
| LoRA on condition tokens only | specify_lora, adapters         | lora_linear, Branch.adapter                 |
| LoRA on text and image        | main_adapter                   | main_adapter                                |
| condition image               | convert_to_condition           | convert_to_condition                        |
| condition                     | Condition                      | ConditionSpec (no image), ConditionTokens   |
| its tokens                    | Condition.encode               | pack_conditions                             |
| position shift and scale      | position_delta, position_scale | condition_ids                               |
| feature reuse                 | kv_cache, cache_mode           | KVCache, KVCache.mode                       |
| compact tokens                | condition_size, position_scale | --condition_size, --position_scale          |
| token integration             | latent_mask                    | latent_mask, select_tokens                  |
| guidance by the condition     | image_guidance_scale           | OminiTransformer2DModel.forward             |
| loss                          | x_0, x_1, x_t, step            | compute_loss                                |
| the same with FLUX.2-klein    |                                | Flux2Klein                                  |
"""

import argparse
import functools
import hashlib
import importlib.util
import json
import math
import os
import re
import shlex
import time
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field, replace
from itertools import islice, product, zip_longest
from pathlib import Path
from typing import Any

from common.arguments import (
    INITIALIZATIONS,
    LR_SCHEDULERS,
    TRACKERS,
    Parser,
    Switch,
    block_count,
    decay_rate,
    fail,
    file_name,
    fraction,
    idle_flags,
    in_range,
    initialization,
    name_or_path,
    noise_needs,
    non_negative_float,
    positive_float,
    positive_int,
    seed_number,
    shared_needs,
    worker_count,
)
from common.block_swap import BlockSwap, check_block_count
from common.checkpoints import (
    agreed_checkpoint,
    atomic_write,
    catch_signals,
    check_disk,
    check_output_dir,
    check_results,
    check_run,
    check_steps,
    check_taken,
    checkpoint_state,
    claim_output_dir,
    interruption,
    keep_earlier_results,
    load_checkpoint,
    match_processes,
    outlive_signals,
    run_settings,
    save_checkpoint,
    stop_agreed,
    stop_interrupted,
    stops_alone,
)
from common.data import (
    INTERPOLATION,
    Example,
    Size,
    SkippedSamples,
    StepSampler,
    StreamedBatches,
    all_images,
    check_captions,
    check_dataset_flags,
    check_images,
    check_roles,
    check_shape,
    data_record,
    dataset_settings,
    decoded_size,
    describe_data,
    describe_small_groups,
    file_example,
    first_ten,
    first_value,
    fit,
    fit_mask,
    gather_places,
    header_size,
    map_ahead,
    map_examples,
    open_image,
    open_stream,
    place_in_run,
    read_batches,
    read_dataset,
    read_folder,
    read_stream_start,
    resolve_num_workers,
    same_shape,
    upright_size,
    visible,
)
from common.flow_matching import (
    TIMESTEP_SAMPLING,
    WEIGHTING_SCHEMES,
    add_noise,
    sample_sigmas,
    step_generator,
    weighted_mse,
)
from common.held_out import (
    DEFAULT_STEPS,
    NOISE_LEVELS,
    NOISE_SEED,
    BestStep,
    check_held_out,
    check_split,
    describe_held_out,
    fixed_generator,
    fixed_noise,
    held_out_args,
    held_out_means,
    held_out_record,
    hold_out,
)
from common.latents import (
    PATCH,
    EncodedIndex,
    cache_moments,
    check_cache_rooms,
    check_disk_cache,
    decode_latents,
    encode_moments,
    encoded_folder,
    flux2_latents,
    image_ids,
    latents_folder,
    mean_latents,
    moments_size,
    num_reading_threads,
    pack_latents,
    print_precomputed,
    prompts_folder,
    remove_encoded,
    sample_latents,
    to_tensor,
    unpack_latents,
)
from common.lora import (
    adapter_kind,
    adapter_options,
    adapter_size,
    add_lora,
    average_gradients,
    averaged_weights,
    check_adapter,
    check_lora_file,
    lora_file,
    lora_in,
    register_lora_checkpointing,
    save_lora,
    start_from_lora,
    target_layers,
    unknown_layers,
)
from common.models import (
    ATTENTION_BACKENDS,
    PROCESS_TIMEOUT,
    QUANTIZATIONS,
    WITHOUT_MASK,
    check_attention,
    check_launcher,
    check_weights,
    compile_blocks,
    full_tensor,
    gather_problems,
    latent_channels,
    load_model,
    load_scheduler,
    model_identities,
    own_items,
    quantize_base,
    read_model_index,
    resolve_precision,
    shard,
    to_device,
    use_attention,
    why_no_pipeline,
    writes_files,
)
from common.optimizers import Prodigy, fused_adamw, step_if_finite
from common.text_encoders import (
    TEXT_QUANTIZATIONS,
    PromptEncoder,
    describe_long_prompts,
    encoder_dtype,
    flux2_klein_chat,
    load_text_pipeline,
    load_tokenizer,
    load_whole_pipeline,
    prompts_size,
    quantize_text_encoders,
)
from common.tracking import (
    METADATA,
    Metrics,
    StepReads,
    add_thumbnail,
    check_hub,
    check_trackers,
    create_hub_repo,
    finish,
    flux2_klein_architecture,
    log_step,
    lora_header,
    plot_metrics,
    print_header,
    start_logging,
    step_logs,
    write_model_card,
)
from common.validation import (
    generate_images,
    read_validation_prompts,
    repeated_prompt,
    sampling_arguments,
    save_images,
    texts_of,
    undisturbed,
    with_defaults,
)

import cv2
import numpy as np
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from accelerate.utils import InitProcessGroupKwargs, ProjectConfiguration, set_seed
from diffusers import (
    AutoencoderKL,
    AutoencoderKLFlux2,
    DiffusionPipeline,
    FlowMatchEulerDiscreteScheduler,
    Flux2KleinKVPipeline,
    Flux2KleinPipeline,
    Flux2Transformer2DModel,
    FluxPipeline,
    FluxTransformer2DModel,
)
from diffusers.image_processor import VaeImageProcessor
from diffusers.models.attention_dispatch import dispatch_attention_fn
from diffusers.models.embeddings import apply_rotary_emb
from diffusers.models.modeling_outputs import Transformer2DModelOutput
from diffusers.models.transformers.transformer_flux import FluxSingleTransformerBlock, FluxTransformerBlock
from diffusers.models.transformers.transformer_flux2 import Flux2KVAttnProcessor, Flux2KVParallelSelfAttnProcessor
from diffusers.optimization import get_scheduler
from diffusers.pipelines.flux.pipeline_flux import FluxPipelineOutput
from diffusers.training_utils import EMAModel, compute_loss_weighting_for_sd3, offload_models
from diffusers.utils import logging as diffusers_logging
from peft.tuners.lokr.layer import LoKrLayer
from PIL import Image, ImageFilter
from safetensors import safe_open
from torch.utils.data import DataLoader, Dataset
from tqdm.auto import tqdm
from transformers import MODEL_FOR_DEPTH_ESTIMATION_MAPPING, AutoConfig
from transformers.utils import logging as transformers_logging


EXAMPLE = """example:
    accelerate launch train_omini.py @examples/omini/low_memory.args \\
      --instance_data_dir photos --condition_type canny --output_dir canny"""

CONDITION_TYPES = (
    "canny",
    "coloring",
    "deblurring",
    "depth",
    "depth_pred",
    "fill",
    "sr",
    "subject",
    "token_integration",
    "custom",
)
RANDOM_CONDITIONS = ("deblurring", "fill", "token_integration")  # differ each time an image is seen
SIDE_BY_SIDE_CONDITIONS = ("subject", "sr")  # positioned to the left of the image; other conditions lie on it
GIVEN_CONDITIONS = ("subject", "custom")  # come with the data; all others are made from the image itself
MASKED_CONDITIONS = ("fill", "token_integration")
DEPTH_CONDITIONS = ("depth", "depth_pred")
DEPTH_MODEL = "LiheYoung/depth-anything-small-hf"

# All layers that image tokens pass: 14.5 million parameters at rank 4 on FLUX.1-dev.
TARGET_MODULES = (
    r"x_embedder|transformer_blocks\.\d+\.(norm1\.linear|attn\.to_[qkv]|attn\.to_out\.0|ff\.net\.2)"
    r"|single_transformer_blocks\.\d+\.(norm\.linear|proj_mlp|proj_out|attn\.to_[qkv])"
)
FLUX2_TARGET_MODULES = (
    r"x_embedder|transformer_blocks\.\d+\.(attn\.to_[qkv]|attn\.to_out\.0|ff\.linear_(in|out))"
    r"|single_transformer_blocks\.\d+\.attn\.(to_qkv_mlp_proj|to_out)"
)
# OminiControl's published pattern names it, but the single blocks of diffusers' FLUX have no such layer.
ABSENT_LAYER = "single_transformer_blocks.0.attn.to_out"
# Layers that condition tokens do not pass: those of text, of time, and the last ones, which only the image reaches.
OTHER_LAYERS = r"context|attn\.(add_|to_add)|time_(text|guidance)_embed|modulation_txt|^(norm|proj)_out"

# Subjects200K grades each pair, 0 to 5; the authors train on pairs that have the best grade in all three.
QUALITY_SCORES = ("compositeStructure", "objectConsistency", "imageQuality")
BEST_QUALITY = 5

MAX_CHECKED = 2000  # examples whose images are read before training; of more, every n-th


# ---------------------------------------------------------------------------------------------------------------------
# Arguments
# ---------------------------------------------------------------------------------------------------------------------


def image_size(text):
    """An argparse type: "512" or, width first, "768x512" as (height, width) in pixels, multiples of a token's 16."""
    match = re.fullmatch(r"(\d+)(?:x(\d+))?", text)
    width, height = (int(match[1]), int(match[2] or match[1])) if match else (0, 0)
    if any(side % PATCH or not PATCH <= side <= 8192 for side in (width, height)):
        raise argparse.ArgumentTypeError(
            f"{text}: expected SIDE or WIDTHxHEIGHT, such as 768x512, multiples of {PATCH} from 16 to 8192"
        )
    return (height, width)


def size_text(size):
    """A size (height, width) as it is typed, WIDTHxHEIGHT."""
    height, width = size
    return f"{width}x{height}"


MAX_OFFSET = 100_000  # tokens


def offset(text):
    """An argparse type: "down,right" as a pair of numbers."""
    parts = text.split(",")
    if len(parts) != 2:
        raise argparse.ArgumentTypeError(f"{text}: expected a pair DOWN,RIGHT in tokens of 16 pixels, such as 0,-32")
    down, right = map(in_range(float, -MAX_OFFSET, MAX_OFFSET), parts)
    return (down, right)


# FLUX.1's LoRA acts on condition tokens alone, and without a condition nobody needs FLUX.2's
NOT_NEEDED = (None, "without a condition, draw with the base model: there is nothing to preserve")


def create_parser():
    parser = Parser(
        description="Trains FLUX.1 or FLUX.2-klein to follow image conditions (OminiControl).",
        epilog=EXAMPLE,
        other_flags=dict.fromkeys(("preserve_outputs", "preserve_prompts", "preserve_every"), NOT_NEEDED),
    )

    arg = parser.add_argument_group("model", "which model is trained, in which precision").add_argument
    arg(
        "--pretrained_model_name_or_path",
        type=name_or_path,
        required=True,
        metavar="MODEL",
        help="folder or Hub id of a FLUX.1 or FLUX.2-klein pipeline",
    )
    arg("--revision", help="revision of the model on the Hub")
    arg("--variant", help="variant of the model's files, such as fp16")
    arg("--cache_dir", type=name_or_path, help="folder for downloaded models and datasets")
    arg(
        "--max_sequence_length",
        type=in_range(int, 1, 512),
        help="tokens per prompt; longer prompts are cut (default: what the model takes, FLUX.1-dev 512, schnell 256)",
    )
    arg(
        "--mixed_precision",
        choices=("no", "fp16", "bf16"),
        help="precision of frozen models; bf16 halves memory (default: accelerate's, else bf16 "
        "on a GPU that computes in it, else no)",
    )
    arg("--allow_tf32", action="store_true", help="faster, less exact float32 products on Ampere and later GPUs")
    arg(
        "--gradient_checkpointing",
        action="store_true",
        help="recompute activations: about half the memory, a third more time",
    )
    arg(
        "--quantize_base",
        choices=QUANTIZATIONS,
        default="none",
        help="store frozen blocks in 4 or 8 bits; int8, fp8: also multiply in 8 bits where the GPU does",
    )
    arg(
        "--quantize_text_encoders",
        choices=TEXT_QUANTIZATIONS,
        default="none",
        help="store T5, or the language model that reads prompts, in 4 or 8 bits; not CLIP",
    )
    arg("--compile", action="store_true", help="compile the transformer's blocks: minutes once, then faster steps")
    arg(
        "--attention_backend",
        choices=ATTENTION_BACKENDS,
        help="diffusers' name of the kernels that compute attention (default: PyTorch chooses)",
    )
    arg("--offload", action="store_true", help="keep frozen models in CPU memory until they are used")
    arg(
        "--blocks_to_swap",
        type=block_count,
        metavar="N",
        help="frozen blocks that wait in RAM and are copied to the GPU ahead of use; auto: as many as do not fit",
    )
    arg("--fsdp", action="store_true", help="shard weights and optimizer state over the processes (FSDP2)")
    arg("--hybrid_shard", action="store_true", help="with --fsdp: shard within a machine, copies between machines")

    arg = parser.add_argument_group("data", "a folder of images, a dataset, or tar files").add_argument
    arg("--instance_data_dir", type=Path, help="folder of images; captions in .txt files, metadata.jsonl or none")
    arg("--dataset_name", type=name_or_path, help="dataset on the Hub, or a folder or file that `datasets` loads")
    arg("--dataset_config_name", help="configuration of that dataset")
    arg(
        "--data_files",
        type=name_or_path,
        nargs="+",
        metavar="FILE",
        help="webdataset tars (images, captions in json or txt) or parquet files, or patterns such as 'tars/*.tar'",
    )
    arg(
        "--dataset_class",
        type=name_or_path,
        metavar="FILE.py:CLASS",
        help="your own dataset, with items of image, description, condition_0, optional position_delta_0 and so on",
    )
    arg("--streaming", action="store_true", help="read dataset_name or data_files during training; needs no disk")
    arg("--shuffle_buffer", type=positive_int, default=1000, help="rows that streaming holds and shuffles at a time")
    arg("--image_column", default="image", help="column of the dataset that holds the images")
    arg("--caption_column", help="column of the dataset or of metadata.jsonl that holds captions")
    arg(
        "--condition_column",
        nargs="+",
        help="column of the dataset, or of metadata.jsonl with paths from its folder (../ may leave it), of images of "
        "each custom condition",
    )
    arg("--mask_column", help="column of masks, white to generate, for fill and token_integration (default: random)")
    arg("--instance_prompt", help="prompt of every image without a caption, such as a photo of sks dog")
    arg("--image_interpolation_mode", choices=INTERPOLATION, default="lanczos", help="filter for resizing images")
    arg("--train_batch_size", type=positive_int, default=4, help="images per device and forward pass")
    arg(
        "--dataloader_num_workers",
        type=worker_count,
        help="processes that read images (threads with --streaming); 0: the main process "
        "(default: 4 with a GPU, one per core of a process if those are fewer, else 0)",
    )
    arg("--cache_latents", action="store_true", help="encode images once, before training: saves time and memory")
    arg("--cache_latents_to_disk", action="store_true", help="keep latents for later runs, found by image content")
    arg("--cache_text_encoder_outputs_to_disk", action="store_true", help="keep prompt embeddings for later runs")
    arg(
        "--disk_cache_dir",
        type=Path,
        default="~/.cache/flux-trainers",
        help="folder of the latents and embeddings that are kept for later runs",
    )
    arg("--precompute_only", action="store_true", help="fill --disk_cache_dir for later runs and end before training")
    arg("--cache_prompts", action=Switch, default=True, help="embed every prompt once, before training")

    arg = parser.add_argument_group("conditions", "what the generated image follows").add_argument
    arg(
        "--condition_type",
        nargs="+",
        required=True,
        choices=CONDITION_TYPES,
        help="type of the condition, or of several at once",
    )
    arg("--target_size", type=image_size, default="512", metavar="SIZE", help="SIDE or WIDTHxHEIGHT of the image")
    arg(
        "--condition_size",
        nargs="+",
        type=image_size,
        metavar="SIZE",
        help="SIDE or WIDTHxHEIGHT of all conditions, or of each (default: target_size, half of it for sr)",
    )
    arg(
        "--position_delta",
        nargs="+",
        type=offset,
        metavar="DOWN,RIGHT",
        help="shift of all conditions, or of each, in tokens of 16 px (default: 0,0; subject and sr: side by side to "
        "the left of the image)",
    )
    arg(
        "--position_scale",
        nargs="+",
        type=positive_float,
        metavar="SCALE",
        help="image tokens per condition token and direction (default: target_size / condition_size, if not shifted)",
    )
    arg(
        "--independent_condition",
        action="store_true",
        help="condition tokens attend to themselves only, so generation can cache them",
    )
    arg("--adapter_per_condition", action="store_true", help="train one LoRA per condition, not one for all")
    arg("--drop_text_prob", type=fraction, default=0.1, help="share of samples with an empty prompt")
    arg("--drop_image_prob", type=fraction, default=0.1, help="share of samples with black conditions")
    arg("--image_size", type=positive_int, default=512, help="side of each image of a side-by-side subject pair")
    arg("--padding", type=in_range(int, 0), default=8, help="pixels around and between the images of a subject pair")
    arg(
        "--quality_filter",
        action=Switch,
        default=True,
        help="leave out pairs whose quality_assessment (a column of Subjects200K) has a score below 5",
    )
    arg("--depth_model", type=name_or_path, default=DEPTH_MODEL, help="depth estimation model of transformers")
    arg("--depth_batch_size", type=positive_int, default=8, help="images per forward pass of the depth model")

    arg = parser.add_argument_group("lora", "the adapter").add_argument
    arg("--rank", type=positive_int, default=4, help="rank of the LoRA: its capacity and size; 16 to 64 for detail")
    arg("--lora_alpha", type=positive_float, help="LoRA scale is lora_alpha / rank (default: rank)")
    arg("--use_rslora", action="store_true", help="LoRA scale is lora_alpha / sqrt(rank) instead (arXiv 2312.03732)")
    arg(
        "--init_lora_weights",
        type=initialization,
        choices=INITIALIZATIONS,
        default="gaussian",
        help="how the LoRA begins, as PEFT names it; default: uniform numbers of the size of a linear layer's",
    )
    arg("--lora_dropout", type=in_range(float, 0, 0.99), default=0.0, help="dropout probability of the LoRA's inputs")
    arg("--use_dora", action="store_true", help="train a DoRA: also the norm of each row of a weight; slower steps")
    arg("--lora_type", choices=("lora", "lokr"), default="lora", help="lokr: a Kronecker product (LyCORIS' LoKr)")
    arg("--lokr_factor", type=positive_int, help="size of a LoKr's first factor (default: near the square root)")
    arg("--target_modules", metavar="REGEX", help="layers with LoRA (default: all that condition tokens pass)")
    arg(
        "--lora_path",
        nargs="+",
        type=Path,
        metavar="FILE",
        help="LoRA files, or folders of runs, to continue from, one per adapter, at the strength they have",
    )

    arg = parser.add_argument_group("noise", "which noise levels are trained, and how they are weighted").add_argument
    arg(
        "--guidance_scale",
        type=non_negative_float,
        default=1.0,
        help="value passed to the guidance embedding (FLUX.1-dev)",
    )
    arg(
        "--timestep_sampling",
        choices=TIMESTEP_SAMPLING,
        default="sigmoid",
        help="distribution of noise levels; sigma: as --weighting_scheme says",
    )
    arg(
        "--weighting_scheme", choices=WEIGHTING_SCHEMES, default="none", help="density of noise levels, or loss weight"
    )
    arg("--logit_mean", type=in_range(float, -100, 100), default=0.0, help="mean of logit_normal; below 0: more noise")
    arg("--logit_std", type=positive_float, default=1.0, help="standard deviation of logit_normal")
    arg("--mode_scale", type=in_range(float, -1, 1.75), default=1.29, help="scale of mode; 0: uniform")
    arg("--sigmoid_scale", type=positive_float, default=1.0, help="spread of sigmoid, shift and flux_shift")
    arg("--discrete_flow_shift", type=positive_float, default=3.0, help="s of shift; above 1: more noise")

    arg = parser.add_argument_group("optimizer", "how the adapter is updated").add_argument
    arg(
        "--optimizer",
        type=str.lower,
        choices=("adamw", "prodigy", "sgd"),
        default="prodigy",
        help="prodigy finds the learning rate itself: set --learning_rate 1",
    )
    arg("--learning_rate", type=positive_float, default=1.0, help="learning rate; 1 for prodigy, about 1e-4 for adamw")
    arg("--scale_lr", action="store_true", help="multiply the learning rate by the total batch size")
    arg("--lr_scheduler", choices=LR_SCHEDULERS, default="constant", help="learning rate schedule")
    arg("--lr_warmup_steps", type=in_range(int, 0), default=500, help="linear warmup steps; constant has none")
    arg("--lr_num_cycles", type=positive_int, default=1, help="cycles of cosine_with_restarts")
    arg("--lr_power", type=positive_float, default=1.0, help="power of polynomial; 1: linear")
    arg("--use_8bit_adam", action="store_true", help="AdamW with 8-bit states (bitsandbytes), to save memory")
    arg("--adam_beta1", type=decay_rate, default=0.9, help="decay of the gradient's running mean, also in Prodigy")
    arg("--adam_beta2", type=decay_rate, default=0.999, help="decay of the squared gradient's mean, also in Prodigy")
    arg("--adam_weight_decay", type=non_negative_float, default=0.01, help="weight decay, also in Prodigy")
    arg("--adam_epsilon", type=positive_float, default=1e-8, help="added to the denominator, also in Prodigy")
    arg("--prodigy_beta3", type=decay_rate, help="decay of Prodigy's estimate (default: square root of adam_beta2)")
    arg("--prodigy_decouple", action=Switch, default=True, help="decoupled weight decay, as in AdamW")
    arg("--prodigy_use_bias_correction", action=Switch, default=True, help="Adam's bias correction in Prodigy")
    arg("--prodigy_safeguard_warmup", action=Switch, default=True, help="keep warmup out of Prodigy's estimate")
    arg("--max_grad_norm", type=in_range(float, 0), default=0.5, help="clip gradients to this norm; 0: do not")
    arg(
        "--use_ema",
        action="store_true",
        help="save and draw with a moving average of what is trained, not with its last step",
    )
    arg(
        "--ema_decay",
        type=decay_rate,
        default=0.9999,
        help="decay of that average; at step N at most N / (9 + N)",
    )
    arg(
        "--gradient_accumulation_steps",
        type=positive_int,
        default=1,
        help="batches per update: a larger batch in the memory of one",
    )

    arg = parser.add_argument_group("schedule and checkpoints", "how long, and what can be resumed").add_argument
    arg(
        "--seed",
        type=seed_number,
        default=0,
        help="random seed for data order, noise, adapter init and validation",
    )
    arg("--num_train_epochs", type=positive_int, default=1, help="passes over the data")
    arg("--max_train_steps", type=positive_int, help="number of updates; overrides --num_train_epochs")
    arg("--checkpointing_steps", type=positive_int, default=500, help="steps between checkpoints")
    arg("--checkpoints_total_limit", type=positive_int, help="number of newest checkpoints to keep (default: all)")
    arg(
        "--resume_from_checkpoint",
        type=name_or_path,
        metavar="CHECKPOINT",
        help="a checkpoint-N folder, or latest (if there is one)",
    )
    arg(
        "--save_on_each_node",
        action="store_true",
        help="each machine saves checkpoints and result in its own output_dir, which the others do not see",
    )
    arg("--local_rank", type=int, default=-1, help="set by old launchers; LOCAL_RANK in the environment wins")

    arg = parser.add_argument_group("validation", "images while training; they never change it").add_argument
    arg("--validation_prompt", help="prompt to generate before, during and after training")
    arg(
        "--validation_prompts",
        "--sample_prompts",
        type=Path,
        metavar="FILE",
        help="file of such prompts instead, an image each; a line is such as 'a dog --d 1 --am 0.8 --cn input.png'",
    )
    arg(
        "--validation_image",
        nargs="+",
        type=Path,
        metavar="IMAGE",
        help="image to make all conditions from, or one for each, in the order of --condition_type",
    )
    arg("--num_validation_images", type=positive_int, default=4, help="images per validation")
    arg("--validation_epochs", type=positive_int, default=50, help="epochs between validations")
    arg("--validation_steps", type=positive_int, help="steps between validations; overrides --validation_epochs")
    arg("--final_validation_prompt", help="prompt to generate after training (default: validation_prompt)")
    arg("--skip_final_inference", action="store_true", help="generate no images after training")
    arg(
        "--validation_data_dir",
        type=Path,
        help="folder of images that are not trained, as --instance_data_dir; their loss is computed at fixed noise",
    )
    arg(
        "--validation_split",
        type=in_range(float, 0, 0.9, above=True),
        metavar="SHARE",
        help="hold out this share of the images instead, the same ones in every run, such as 0.2",
    )
    arg(
        "--validation_loss_steps",
        type=positive_int,
        help="steps between computations of the held-out loss (default: --validation_steps, else 100)",
    )
    arg(
        "--load_best_model_at_end",
        action="store_true",
        help="the result has the weights of the step with the lowest held-out loss",
    )
    arg(
        "--early_stopping_patience",
        type=positive_int,
        metavar="N",
        help="end the run when the held-out loss has not become lower N times in a row",
    )
    arg(
        "--validation_num_inference_steps",
        type=in_range(int, 1, 1000),
        help="steps to generate an image in (default: the pipeline's)",
    )
    arg(
        "--validation_guidance_scale",
        type=non_negative_float,
        help="value of the guidance embedding in them (default: the pipeline's)",
    )

    arg = parser.add_argument_group("output and logging", "where everything goes").add_argument
    arg("--output_dir", type=Path, default=Path("flux-omini"), help="folder for all results")
    arg(
        "--output_name",
        type=file_name,
        metavar="NAME",
        help="the LoRA becomes output_dir/NAME.safetensors, the rest output_dir/NAME/",
    )
    for entry in METADATA:
        arg(f"--metadata_{entry}", help=f"{entry} in the header of the LoRA's file")
    arg("--logging_dir", type=Path, default=Path("logs"), help="folder for the trackers' files, inside output_dir")
    arg("--report_to", choices=TRACKERS, default="tensorboard", help="trackers for metrics and validation images")
    arg("--upcast_before_saving", action="store_true", help="save the LoRA in float32 instead of --mixed_precision")
    arg("--verbose", action="store_true", help="show the libraries' messages and progress bars")
    arg("--push_to_hub", action="store_true", help="upload the results to the Hub, without checkpoints and logs")
    arg("--hub_token", help="Hub token (default: your login); never logged or saved")
    arg("--hub_model_id", help="Hub repository (default: the name of output_dir)")

    return parser


def parse_args(argv=None):
    parser = create_parser()
    args = parser.parse_args(argv)
    args.mixed_precision = resolve_precision(args.mixed_precision)
    args.dataloader_num_workers = resolve_num_workers(args.dataloader_num_workers)
    args.lora_alpha = args.lora_alpha or args.rank
    if args.cache_latents_to_disk:
        args.cache_latents = True
    if args.output_name:
        args.output_dir /= args.output_name
    problems = check_args(args) + check_attention(args) + check_conditions(args) + check_weights(args)
    problems += check_model(args) + check_disk_cache(args)
    problems += check_output_dir(args) + check_results(args, adapter_files(args).values(), args.lora_path or [])
    parser.refuse(problems)
    parser.remark(idle_flags(args, shared_needs(args), needs(args)))
    return args


def needs(args):
    """{what: (whether this run has it, the flags that are read with it alone)}, see `idle_flags`."""
    one_prompt = args.validation_prompt or args.final_validation_prompt
    draws = one_prompt or args.validation_prompts
    reads_guidance = find_family(args).reads_guidance
    return noise_needs(args) | {
        "a model with a guidance embedding": (reads_guidance, ("guidance_scale", "validation_guidance_scale")),
        "--optimizer adamw or prodigy": (
            args.optimizer != "sgd",
            ("adam_beta1", "adam_beta2", "adam_epsilon"),
        ),
        "--use_ema": (args.use_ema, ("ema_decay",)),
        "--streaming": (args.streaming, ("shuffle_buffer",)),
        "--dataset_name or --data_files": (args.dataset_name or args.data_files, ("image_column",)),
        "--condition_type subject": (
            "subject" in args.condition_type,
            ("image_size", "padding", "quality_filter"),
        ),
        "--condition_type depth or depth_pred": (needs_depth(args), ("depth_model", "depth_batch_size")),
        "--validation_prompt or --validation_prompts": (
            args.validation_prompt or args.validation_prompts,
            ("validation_epochs",),
        ),
        "no --validation_steps": (not args.validation_steps, ("validation_epochs",)),
        "--validation_prompt or --final_validation_prompt": (one_prompt, ("num_validation_images",)),
        "--validation_prompt, --validation_prompts or --final_validation_prompt": (
            draws,
            ("skip_final_inference", "validation_guidance_scale", "validation_num_inference_steps"),
        ),
    }


def check_args(args):
    """Problems of the flags: those that contradict each other, and those that would have no effect."""
    problems = []

    # data
    sources = ("instance_data_dir", "dataset_name", "data_files", "dataset_class")
    given = [name for name in sources if vars(args)[name] is not None]
    if len(given) != 1:
        problems.append(f"exactly one of {', '.join(f'--{name}' for name in sources)} is needed")
    problems += check_dataset_flags(args)
    if args.cache_text_encoder_outputs_to_disk and not args.cache_prompts:
        problems.append(
            "--cache_text_encoder_outputs_to_disk keeps prompts that are embedded before training: leave out "
            "--no-cache_prompts"
        )

    # noise, optimizer, precision
    if args.weighting_scheme in ("logit_normal", "mode") and args.timestep_sampling != "sigma":
        problems.append(f"--weighting_scheme {args.weighting_scheme} has no effect without --timestep_sampling sigma")
    if args.optimizer == "prodigy" and args.scale_lr:
        problems.append("--scale_lr multiplies the factor of Prodigy's own rate, which is about 1: leave one out")
    if args.optimizer == "prodigy" and args.learning_rate <= 0.1:
        problems.append(f"--learning_rate {args.learning_rate:g}: Prodigy finds the rate itself and wants about 1")
    if args.optimizer == "adamw" and args.learning_rate > 0.1:
        problems.append(f"--learning_rate {args.learning_rate:g} is Prodigy's: AdamW wants about 1e-4")
    if args.optimizer != "adamw" and args.use_8bit_adam:
        problems.append(f"--use_8bit_adam has no effect on --optimizer {args.optimizer}: leave one out")
    if args.optimizer != "prodigy" and args.prodigy_beta3 is not None:
        problems.append(f"--prodigy_beta3 has no effect on --optimizer {args.optimizer}: leave it out")
    if args.mixed_precision == "fp16" and not torch.accelerator.is_available():
        problems.append("--mixed_precision fp16 needs a GPU: use bf16 or no")

    # validation
    problems += check_held_out(args)
    if args.validation_data_dir and args.dataset_class:
        problems.append(
            "--validation_data_dir does not go with --dataset_class: hold out by --validation_split instead"
        )
    has_prompt = bool(args.validation_prompt or args.final_validation_prompt)
    if args.validation_prompt and args.validation_prompts:
        problems.append("--validation_prompt and --validation_prompts exclude each other: choose one")
    elif has_prompt != bool(args.validation_image) and not (args.validation_prompts and args.validation_image):
        problems.append("--validation_prompt and --validation_image need each other")
    if args.validation_steps and not (args.validation_prompt or args.validation_prompts):
        needed = "--validation_prompt or --validation_prompts"
        problems.append(f"--validation_steps {args.validation_steps} needs {needed}")
    if args.final_validation_prompt and args.skip_final_inference:
        problems.append("--final_validation_prompt has no effect with --skip_final_inference: leave one out")

    return problems + check_adapter(args) + check_hub(args) + check_trackers(args) + check_launcher(args)


def check_model(args):
    """Problems of --pretrained_model_name_or_path, --target_modules and the disk, from the configs alone."""
    flag = f"--pretrained_model_name_or_path {args.pretrained_model_name_or_path}"
    try:
        family = find_family(args)
        config = family.transformer_class.load_config(
            args.pretrained_model_name_or_path,
            subfolder="transformer",
            revision=args.revision,
            cache_dir=args.cache_dir,
        )
        channels = latent_channels(args)
    except (OSError, ValueError) as error:
        reason = why_no_pipeline(
            args.pretrained_model_name_or_path, "a FLUX pipeline", "black-forest-labs/FLUX.1-dev", error
        )
        return [f"{flag}: {reason}"]
    in_channels = 4 * channels  # a token is a patch of 2 x 2 latents
    if config.get("_class_name") != family.transformer_class.__name__ or config.get("in_channels") != in_channels:
        found = f"{config.get('_class_name')} with {config.get('in_channels')} input channels"
        return [f"{flag}: holds a {found}, not {family.kind}, where its VAE makes {in_channels}"]
    problems = family.check_flags(args)
    if problems:
        return problems
    for name, value in family.fixed.items():
        setattr(args, name, value)
    longest = family.longest_prompt(config)
    if args.max_sequence_length is None:
        args.max_sequence_length = longest
    if args.max_sequence_length > longest:
        return [f"--max_sequence_length {args.max_sequence_length}: FLUX.1-schnell takes at most 256"]
    with torch.device("meta"):
        transformer = family.transformer_class.from_config(config)
    problems = check_block_count(args.blocks_to_swap, transformer)
    if problems:
        return problems
    targets = lora_targets(args)
    try:
        unknown = unknown_layers(transformer, targets)
    except re.error as error:
        return [f"--target_modules {targets}: not a regular expression ({error})"]
    if unknown:
        return [f"--target_modules {targets}: matches no linear layer of the transformer{backslash_hint(targets)}"]
    problems = check_alternatives(transformer, targets)
    if problems:
        return problems
    layers = target_layers(transformer, targets)
    not_passed = [name for name, _ in layers if re.search(OTHER_LAYERS, name)]
    if not_passed:
        return [f"--target_modules {targets}: condition tokens do not pass {not_passed[0]}; leave it out"]
    # float32: a checkpoint holds the LoRA twice, Adam's two moments and what these flags keep; the result
    num_copies = 5 + args.use_ema + args.load_best_model_at_end
    needed = 4 * num_copies * sum(adapter_size(args, layer) for _, layer in layers)
    return check_disk(args, needed) or check_lora_path(args, layers)


def check_alternatives(transformer, pattern):
    """A problem for each of the alternatives a|b|c of a pattern that matches no layer."""
    problems = []
    for alternative in alternatives_of(pattern):
        if not re.fullmatch(alternative, ABSENT_LAYER) and not target_layers(transformer, alternative):
            problems.append(
                f"--target_modules: its part {alternative} matches no linear layer of the transformer"
                f"{backslash_hint(alternative)}"
            )
    return problems


def alternatives_of(pattern):
    """The alternatives of a regular expression, "a" and "b" of "a|b" or "(a|b)"; those within a group stay whole."""
    group = re.fullmatch(r"\((?:\?:)?(.*)\)", pattern, re.DOTALL)
    if group and is_pattern(group[1]):  # which (a)(b) without its ends is not
        return alternatives_of(group[1])
    alternatives = []
    part = ""
    for piece in pattern.split("|"):
        part += piece
        if is_pattern(part):
            alternatives.append(part)
            part = ""
        else:  # the | is within a group or a set, or stands for itself
            part += "|"
    return alternatives


def is_pattern(text):
    """Whether the text is a regular expression."""
    try:
        re.compile(text)
    except re.error:
        return False
    return True


def backslash_hint(pattern):
    """What to do about a doubled backslash, as in a text that yaml reads in double quotes."""
    if r"\\" not in pattern:
        return ""
    return r"; \\ stands for a backslash in a layer's name: write a single one, as yaml reads it within double quotes"


def check_lora_path(args, layers):
    """Problems of --lora_path, whose files must hold adapters of the (name, module) in `layers`."""
    adapters = adapter_names(condition_specs(args))
    paths = args.lora_path or []
    if paths and len(paths) != len(adapters):
        return [f"--lora_path names {len(paths)} files for {len(adapters)} adapters: {', '.join(adapters)}"]
    shapes = {f"transformer.{name}": (layer.out_features, layer.in_features) for name, layer in layers}
    problems = []
    for path in paths:
        problems += check_lora_file(path, shapes, args.rank, flux=find_family(args).has_clip, **adapter_options(args))
    return problems


def lora_targets(args):
    """The layers with a LoRA, as a regular expression: --target_modules, or all that condition tokens pass."""
    return args.target_modules or find_family(args).target_modules


# ---------------------------------------------------------------------------------------------------------------------
# Model
# ---------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ConditionSpec:
    """What a condition is, without its image: type, size, position, and the LoRA that its tokens pass.

    The header of an adapter's file holds these fields for each of its conditions.
    """

    type: str
    size: tuple[int, int]  # (height, width) in pixels
    position_delta: tuple[float, float] = (0, 0)  # (down, right), in image tokens of 16 pixels
    position_scale: float = 1.0  # image tokens per condition token, in each direction
    adapter: str = "default"


@dataclass
class ConditionTokens:
    """A condition as it enters the transformer."""

    hidden_states: torch.Tensor  # [B, N, 64], packed latents
    ids: torch.Tensor  # [N, 3] or, if every sample has its own, [B, N, 3]
    adapter: str = "default"
    attention_mask: torch.Tensor | None = None  # [B, N], False for padding; None: there is no padding


def condition_ids(
    height: int,
    width: int,
    position_delta: tuple[float, float] = (0, 0),
    position_scale: float = 1.0,
    device: torch.device | None = None,
) -> torch.Tensor:
    """Position ids [h/2 * w/2, 3] of a condition's latents, h and w being `height` and `width`.

    id = scale (row, column) + (scale - 1) / 2 + delta: a condition token covers `position_scale` image tokens in each
    direction and stands at their center; `position_delta` (down, right) is in image tokens of 16 pixels
    (arXiv 2503.08280, section 3.2). Training, validation and generation all take positions from here.
    """
    ids = image_ids(height, width)
    ids[:, 1:] = position_scale * ids[:, 1:] + (position_scale - 1) / 2 + torch.tensor(position_delta)
    return ids if device is None else to_device(ids, device)


def pack_conditions(
    condition_latents: list[torch.Tensor],
    specs: Sequence[ConditionSpec],
    latent_masks: Sequence[torch.Tensor | None] = (),
) -> list[ConditionTokens]:
    """The tokens of each condition, from its normalized latents [B, C, h, w].

    `latent_masks`, one for each condition, are boolean [B, h/2 * w/2], True for the tokens that enter the transformer,
    or None for all (arXiv 2503.08280, section 3.3).
    """
    conditions = []
    latent_masks = latent_masks or [None] * len(specs)
    for latents, spec, latent_mask in zip(condition_latents, specs, latent_masks, strict=True):
        height, width = latents.shape[-2:]
        tokens = pack_latents(latents)
        ids = condition_ids(height, width, spec.position_delta, spec.position_scale, latents.device)
        attention_mask = None
        if latent_mask is not None:
            tokens, ids, attention_mask = select_tokens(tokens, ids, latent_mask)
        conditions.append(ConditionTokens(tokens, ids, spec.adapter, attention_mask))
    return conditions


def select_tokens(
    tokens: torch.Tensor, ids: torch.Tensor, keep: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """The tokens [B, N, C] where keep [B, N] is true, in order, and their ids [N, 3]: [B, M, C] and [B, M, 3].

    M is the largest count in the batch. Samples with fewer are padded: `attention_mask` [B, M], the third result, is
    False there. It is None if nothing is padded.
    """
    order, attention_mask = token_order(keep, tokens.device)
    return tokens.gather(1, order[..., None].expand(-1, -1, tokens.shape[-1])), ids[order], attention_mask


def token_order(keep: torch.Tensor, device: torch.device) -> tuple[torch.Tensor, torch.Tensor | None]:
    """The numbers [B, M] of the tokens where keep [B, N] is true, and the `attention_mask` of `select_tokens`, on a
    device. It does not wait for a `keep` on the CPU."""
    counts = keep.sum(dim=1)
    length = int(counts.max())
    order = torch.argsort(~keep, dim=1, stable=True)[:, :length]
    attention_mask = keep.sort(dim=1, descending=True).values[:, :length]
    return to_device(order, device), None if attention_mask.all() else to_device(attention_mask, device)


# ---- attention: who attends to whom ----


def group_mask(num_conditions: int, independent_condition: bool) -> list[tuple[bool, ...]]:
    """Which branch attends to which: row i, column j is True if the queries of branch i meet the keys of branch j.

    The branches are text, image, condition 1, condition 2, ...
    """
    # 1. Text and image attend to every branch.
    # 2. A condition attends to itself, and to text and image unless conditions are independent: then its keys and
    #    values are the same at every step and can be cached (OminiControl2's feature reuse).
    # 3. Two conditions never attend to each other.
    rows = [(True,) * (2 + num_conditions)] * 2
    for i in range(num_conditions):
        text_and_image = (not independent_condition, not independent_condition)
        itself = tuple(i == j for j in range(num_conditions))
        rows.append(text_and_image + itself)
    return rows


@dataclass
class Branch:
    """One of text, image, condition 1, condition 2, ...: what all blocks need to know of its tokens."""

    name: str  # text, image or condition
    temb: torch.Tensor  # [B, D], embedding of its timestep, its guidance and the pooled prompt
    image_rotary_emb: tuple[torch.Tensor, torch.Tensor]  # cos and sin, [N, d] or [B, N, d]
    adapter: str | None  # the LoRA that its tokens pass; None: the base weights alone
    group_mask: tuple[bool, ...]  # its row: the branches it attends to
    attention_mask: torch.Tensor | None = None  # [B, N], False for padding, which nothing attends to


@dataclass
class Projections:
    """Query, key and value [B, N, heads, d] of a branch in one block. Without query, others only attend to it."""

    query: torch.Tensor | None
    key: torch.Tensor
    value: torch.Tensor
    attention_mask: torch.Tensor | None


@dataclass
class KVCache:
    """Keys and values of independent conditions, computed in the first forward pass and reused in all later ones
    (feature reuse, arXiv 2503.08280, section 3.4)."""

    mode: str = "write"  # "read" once a forward pass has written the keys and values of every block
    blocks: list[list[Projections]] = field(default_factory=list)  # of each block, those of each condition


def attn_forward(projections: list[Projections], branches: list[Branch]) -> list[torch.Tensor | None]:
    """Attention [B, N, heads * d] of each branch to those of its group mask; None for a branch without query.

    `projections` are those of `branches` and, after them, those of conditions from the cache. Branches with the same
    row of the group mask go into one call of diffusers' attention, with exactly the keys they attend to: there
    is no dense mask, and no product that a mask would throw away.
    """
    groups: dict[tuple[bool, ...], list[int]] = {}
    for i, branch in enumerate(branches):
        if projections[i].query is not None:
            groups.setdefault(branch.group_mask, []).append(i)
    attn_outputs: list[torch.Tensor | None] = [None] * len(branches)
    for row, members in groups.items():
        attended = [each for each, allowed in zip(projections, row, strict=True) if allowed]
        queries: Any = [projections[i].query for i in members]
        query = torch.cat(queries, dim=1)  # [B, N, heads, d]
        key = torch.cat([each.key for each in attended], dim=1)
        value = torch.cat([each.value for each in attended], dim=1)
        attn_output = dispatch_attention_fn(query, key, value, attn_mask=padding_mask(attended))
        attn_output = attn_output.flatten(2)  # [B, N, heads * d], the members one after another
        num_tokens = [each.shape[1] for each in queries]
        for i, part in zip(members, attn_output.split(num_tokens, dim=1), strict=True):
            attn_outputs[i] = part
    return attn_outputs


def padding_mask(attended: list[Projections]) -> torch.Tensor | None:
    """The attention mask [B, 1, 1, keys] that hides padding; None if there is no padding."""
    if all(each.attention_mask is None for each in attended):
        return None
    masks = []
    for each in attended:
        everything = each.key.new_ones(each.key.shape[:2], dtype=torch.bool)
        masks.append(everything if each.attention_mask is None else each.attention_mask)
    return torch.cat(masks, dim=1)[:, None, None]


def lora_linear(layer: Any, hidden_states: torch.Tensor, adapter: str | None) -> torch.Tensor:
    """A linear layer with the LoRA named `adapter` alone; of other LoRAs on the layer, nothing is computed."""
    if not hasattr(layer, "base_layer"):
        return layer(hidden_states)
    result = lora_linear(layer.base_layer, hidden_states, adapter)  # PEFT puts a LoKr around a LoRA, or within it
    if isinstance(layer, LoKrLayer):
        if adapter in layer.lokr_w1:
            change = layer.get_delta_weight(adapter)
            result = result + F.linear(hidden_states.to(change.dtype), change).to(result.dtype)
    elif adapter is not None and adapter in layer.lora_A:
        inputs = layer.lora_dropout[adapter](hidden_states.to(layer.lora_A[adapter].weight.dtype))
        if adapter in layer.lora_magnitude_vector:
            update = dora_update(layer, inputs, adapter, result)
        else:
            update = layer.lora_B[adapter](layer.lora_A[adapter](inputs)) * layer.scaling[adapter]
        result = result + update.to(result.dtype)
    return result


def dora_update(layer: Any, inputs: torch.Tensor, adapter: str, result: torch.Tensor) -> torch.Tensor:
    """What a DoRA changes of the frozen layer's `result`, by PEFT. `inputs` are after dropout, which is also that of
    the frozen weight's."""
    has_dropout = layer.training and not isinstance(layer.lora_dropout[adapter], torch.nn.Identity)
    return layer.lora_magnitude_vector[adapter](
        inputs,
        lora_A=layer.lora_A[adapter],
        lora_B=layer.lora_B[adapter],
        scaling=layer.scaling[adapter],
        base_layer=layer.get_base_layer(),
        base_result=None if has_dropout else result,
        adapter_name=adapter,
    )


def modulate(norm: Any, branch: Branch, num_parts: int) -> tuple[torch.Tensor, ...]:
    """Shift, scale and gate vectors [B, 1, D] that an adaptive norm makes of a branch's own temb."""
    modulation = lora_linear(norm.linear, norm.silu(branch.temb), branch.adapter)
    return modulation[:, None].chunk(num_parts, dim=-1)


def project(attn: Any, hidden_states: torch.Tensor, branch: Branch, *, is_text=False, with_query=True) -> Projections:
    """Query, key and value of a branch. `is_text`: with the layers that a double block has for text."""
    query: Any = None
    if is_text:
        to_q, to_k, to_v = attn.add_q_proj, attn.add_k_proj, attn.add_v_proj
        norm_q, norm_k = attn.norm_added_q, attn.norm_added_k
    else:
        to_q, to_k, to_v = attn.to_q, attn.to_k, attn.to_v
        norm_q, norm_k = attn.norm_q, attn.norm_k
    if with_query:
        query = lora_linear(to_q, hidden_states, branch.adapter).unflatten(-1, (-1, attn.head_dim))
    key = lora_linear(to_k, hidden_states, branch.adapter).unflatten(-1, (-1, attn.head_dim))
    value = lora_linear(to_v, hidden_states, branch.adapter).unflatten(-1, (-1, attn.head_dim))
    if with_query:
        query = apply_rotary(norm_q(query), branch.image_rotary_emb)
    key = apply_rotary(norm_k(key), branch.image_rotary_emb)
    return Projections(query, key, value, branch.attention_mask)


def apply_rotary(hidden_states: torch.Tensor, image_rotary_emb: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
    """Rotary embedding of queries or keys [B, N, heads, d], with cos and sin [N, d] or, per sample, [B, N, d]."""
    if image_rotary_emb[0].ndim == 2:
        return apply_rotary_emb(hidden_states, image_rotary_emb, sequence_dim=1)
    # diffusers' function has one position per token for the whole batch: make the batch one long sequence
    cos, sin = (part.flatten(0, 1) for part in image_rotary_emb)
    rotated = apply_rotary_emb(hidden_states.flatten(0, 1)[None], (cos, sin), sequence_dim=1)
    return rotated.view_as(hidden_states)


def clip_float16(hidden_states: torch.Tensor) -> torch.Tensor:
    """Keeps float16 finite, as diffusers' blocks do."""
    return hidden_states.clip(-65504, 65504) if hidden_states.dtype == torch.float16 else hidden_states


# ---- the transformer: FLUX's own blocks, each branch by itself except for attention ----


class OminiTransformerBlock(FluxTransformerBlock):
    """A double block: text passes weights of its own, image and conditions pass the others."""

    def forward(self, hidden_states: list[torch.Tensor], branches: list[Branch], cached: list[Projections]):
        """The next hidden states [B, N, D] of each branch; and keys and values of conditions, to be cached.

        `cached` are keys and values of conditions that are not among the branches.
        """
        # 1. Adaptive norm, query, key and value of each branch
        projections = []
        modulations = []
        for x, branch in zip(hidden_states, branches, strict=True):
            is_text = branch.name == "text"
            norm1 = self.norm1_context if is_text else self.norm1
            shift_msa, scale_msa, gate_msa, shift_mlp, scale_mlp, gate_mlp = modulate(norm1, branch, 6)
            normed = norm1.norm(x) * (1 + scale_msa) + shift_msa
            projections.append(project(self.attn, normed, branch, is_text=is_text))
            modulations.append((gate_msa, shift_mlp, scale_mlp, gate_mlp))

        # 2. Joint attention
        attn_outputs = attn_forward(projections + cached, branches)

        # 3. Output projection and feed-forward of each branch
        results = []
        for i, branch in enumerate(branches):
            is_text = branch.name == "text"
            to_out = self.attn.to_add_out if is_text else self.attn.to_out[0]
            norm2 = self.norm2_context if is_text else self.norm2
            ff = self.ff_context if is_text else self.ff
            gate_msa, shift_mlp, scale_mlp, gate_mlp = modulations[i]
            x = hidden_states[i] + gate_msa * lora_linear(to_out, attn_outputs[i], branch.adapter)
            normed = norm2(x) * (1 + scale_mlp) + shift_mlp
            inner = F.gelu(lora_linear(ff.net[0].proj, normed, branch.adapter), approximate="tanh")
            x = x + gate_mlp * lora_linear(ff.net[2], inner, branch.adapter)
            results.append(clip_float16(x))
        return results, projections[2:]  # after text and image: the conditions


class OminiSingleTransformerBlock(FluxSingleTransformerBlock):
    """A single block: all branches pass the same weights."""

    def forward(
        self,
        hidden_states: list[torch.Tensor],
        branches: list[Branch],
        cached: list[Projections],
        is_last: bool = False,
    ):
        """As `OminiTransformerBlock`. From the last block, only the image goes on: of the other branches, only keys
        and values are computed there, and their next hidden states are None."""
        # 1. Adaptive norm, query, key and value of each branch
        projections = []
        modulated = []
        for x, branch in zip(hidden_states, branches, strict=True):
            goes_on = branch.name == "image" or not is_last
            shift, scale, gate = modulate(self.norm, branch, 3)
            normed = self.norm.norm(x) * (1 + scale) + shift
            projections.append(project(self.attn, normed, branch, with_query=goes_on))
            modulated.append((normed, gate))

        # 2. Joint attention
        attn_outputs = attn_forward(projections + cached, branches)

        # 3. Feed-forward and output projection of each branch
        results = []
        for i, branch in enumerate(branches):
            if attn_outputs[i] is None:
                results.append(None)
                continue
            normed, gate = modulated[i]
            inner = self.act_mlp(lora_linear(self.proj_mlp, normed, branch.adapter))
            inner = torch.cat([attn_outputs[i], inner], dim=-1)
            x = hidden_states[i] + gate * lora_linear(self.proj_out, inner, branch.adapter)
            results.append(clip_float16(x))
        return results, projections[2:]  # after text and image: the conditions


class OminiTransformer2DModel(FluxTransformer2DModel):
    """FLUX.1's transformer with conditions as further tokens of its sequence (arXiv 2411.15098).

    It has the weights, the config and, without conditions, the output of FluxTransformer2DModel. FluxPipeline
    generates with it: its `joint_attention_kwargs` reach `forward`.
    """

    @functools.wraps(FluxTransformer2DModel.__init__)  # from_config reads the names of the arguments
    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        for block in self.transformer_blocks:
            block.__class__ = OminiTransformerBlock
        for block in self.single_transformer_blocks:
            block.__class__ = OminiSingleTransformerBlock

    def forward(
        self,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor,
        pooled_projections: torch.Tensor,
        timestep: torch.Tensor,
        img_ids: torch.Tensor,
        txt_ids: torch.Tensor,
        guidance: torch.Tensor | None = None,
        joint_attention_kwargs: dict | None = None,
        return_dict: bool = True,
    ):
        """The velocity [B, N, 64] of noisy image tokens. `joint_attention_kwargs` may hold what follows:

        conditions             list of ConditionTokens
        independent_condition  a condition's tokens attend to nothing but themselves, see `group_mask`
        main_adapter           name of a LoRA, such as a style, that text and image pass; else they pass no LoRA
        latent_mask            [B, N], for token_integration: image tokens where it is False are left out of the
                               sequence; their velocity is 0
        cache                  a KVCache: its first forward pass computes the conditions, later ones reuse them
        image_guidance_scale   if not 1, the velocity is guided away from that of a second pass, with black conditions
        negative               what differs in that second pass: {"conditions": ..., "cache": ...}
        """
        options = dict(joint_attention_kwargs or {})
        image_guidance_scale = options.pop("image_guidance_scale", 1.0)
        negative = options.pop("negative", {})
        inputs = {
            "hidden_states": hidden_states,
            "encoder_hidden_states": encoder_hidden_states,
            "pooled_projections": pooled_projections,
            "timestep": timestep,
            "img_ids": img_ids,
            "txt_ids": txt_ids,
            "guidance": guidance,
        }
        velocity = self.transformer_forward(**inputs, **options)
        if image_guidance_scale != 1:
            negative_velocity = self.transformer_forward(**inputs, **(options | negative))
            velocity = negative_velocity + image_guidance_scale * (velocity - negative_velocity)
        return Transformer2DModelOutput(sample=velocity) if return_dict else (velocity,)

    def transformer_forward(
        self,
        *,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor,
        pooled_projections: torch.Tensor,
        timestep: torch.Tensor,
        img_ids: torch.Tensor,
        txt_ids: torch.Tensor,
        guidance: torch.Tensor | None,
        conditions: Sequence[ConditionTokens] = (),
        independent_condition: bool = False,
        main_adapter: str | None = None,
        latent_mask: torch.Tensor | None = None,
        cache: KVCache | None = None,
    ) -> torch.Tensor:
        """One pass of all branches through all blocks: the velocity [B, N, 64], see `forward`."""
        attention_mask = None
        batch_size, num_tokens, _ = hidden_states.shape
        if latent_mask is not None:
            hidden_states, img_ids, attention_mask = select_tokens(hidden_states, img_ids, latent_mask)
        rows = group_mask(len(conditions), independent_condition)

        # 1. Text and image: base weights, at the sampled timestep
        text = lora_linear(self.context_embedder, encoder_hidden_states, main_adapter)
        image = lora_linear(self.x_embedder, hidden_states, main_adapter)
        temb = self.time_embedding(timestep, guidance, pooled_projections, image.dtype)
        branches = [
            Branch("text", temb, self.rotary_embedding(txt_ids), main_adapter, rows[0]),
            Branch("image", temb, self.rotary_embedding(img_ids), main_adapter, rows[1], attention_mask),
        ]
        states = [text, image]

        # 2. Each condition: the same weights and its own LoRA, at timestep 0 and guidance 1
        if conditions and (cache is None or cache.mode == "write"):
            clean = torch.zeros_like(timestep)
            unguided = None if guidance is None else torch.ones_like(timestep)
            condition_temb = self.time_embedding(clean, unguided, pooled_projections, image.dtype)
            for condition, row in zip(conditions, rows[2:], strict=True):
                rotary_emb = self.rotary_embedding(condition.ids)
                mask = condition.attention_mask
                branches.append(Branch("condition", condition_temb, rotary_emb, condition.adapter, row, mask))
                states.append(lora_linear(self.x_embedder, condition.hidden_states, condition.adapter))

        # 3. Double blocks, single blocks
        for i, block in enumerate(self.transformer_blocks):
            states = self.run_block(block, i, states, branches, cache)
        for i, block in enumerate(self.single_transformer_blocks, start=len(self.transformer_blocks)):
            is_last = block is self.single_transformer_blocks[-1]
            states = self.run_block(block, i, states, branches, cache, is_last)
        if cache is not None:
            cache.mode = "read"

        # 4. Only the image leaves the model
        image = states[1]
        modulation = lora_linear(self.norm_out.linear, self.norm_out.silu(temb).to(image.dtype), main_adapter)
        scale, shift = modulation[:, None].chunk(2, dim=-1)
        normed = self.norm_out.norm(image) * (1 + scale) + shift
        velocity = lora_linear(self.proj_out, normed, main_adapter)
        if latent_mask is not None:
            order, _ = token_order(latent_mask, velocity.device)
            if attention_mask is not None:
                velocity = torch.where(attention_mask[..., None], velocity, 0)
            everywhere = velocity.new_zeros(batch_size, num_tokens, velocity.shape[-1])
            velocity = everywhere.scatter(1, order[..., None].expand_as(velocity), velocity)
        return velocity

    def run_block(self, block, index: int, states, branches: list[Branch], cache: KVCache | None, *options):
        """The next hidden states of the branches; keys and values of conditions go to the cache or come from it."""
        cached = cache.blocks[index] if cache is not None and cache.mode == "read" else []
        if torch.is_grad_enabled() and self.gradient_checkpointing:
            states, projections = self._gradient_checkpointing_func(block, states, branches, cached, *options)
        else:
            states, projections = block(states, branches, cached, *options)
        if cache is not None and cache.mode == "write":
            cache.blocks.append([replace(each, query=None) for each in projections])
        return states

    def time_embedding(
        self,
        timestep: torch.Tensor,
        guidance: torch.Tensor | None,
        pooled_projections: torch.Tensor,
        dtype: torch.dtype,
    ) -> torch.Tensor:
        """temb [B, D] of timesteps [B] in [0, 1], guidance [B] (None: no guidance embedding) and pooled prompts."""
        timestep = timestep.to(dtype) * 1000
        if guidance is None:
            return self.time_text_embed(timestep, pooled_projections)
        return self.time_text_embed(timestep, guidance.to(dtype) * 1000, pooled_projections)

    def rotary_embedding(self, ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """cos and sin, each [N, d] of ids [N, 3] or [B, N, d] of ids [B, N, 3]."""
        if ids.ndim == 2:
            return self.pos_embed(ids)
        cos, sin = self.pos_embed(ids.flatten(0, 1))
        return cos.unflatten(0, ids.shape[:2]), sin.unflatten(0, ids.shape[:2])


# ---- generation ----


class OminiPipeline(FluxPipeline):
    """FluxPipeline that makes tokens of condition images. Its transformer is an `OminiTransformer2DModel`."""

    @torch.no_grad()
    def __call__(
        self,
        prompt: list[str] | None = None,
        *,
        specs: Sequence[ConditionSpec] = (),
        condition_images: Sequence = (),
        mask: np.ndarray | None = None,
        condition_masks: Sequence[torch.Tensor | None] = (),
        image_guidance_scale: float = 1.0,
        independent_condition: bool = False,
        main_adapter: str | None = None,
        kv_cache: bool = False,
        prompt_embeds: torch.Tensor | None = None,
        pooled_prompt_embeds: torch.Tensor | None = None,
        height: int = 512,
        width: int = 512,
        max_sequence_length: int = 512,
        output_type: str = "pil",
        **kwargs,
    ):
        """Generates an image for each prompt, or for each of prompt_embeds [B, T, D], pooled_prompt_embeds [B, P].

            specs                  what each condition is, from the adapters' metadata
            condition_images       of each condition: a PIL image of its size, or a list of B such images; of
                                   token_integration the image itself, of which all but what is to be generated stays
            mask                   for token_integration: boolean [H, W] or [B, H, W], True where to generate
            condition_masks        of each condition that was trained with a latent mask of its own: that mask
                                   [B, N], True for its tokens that enter the transformer
            image_guidance_scale   above 1, the image follows its conditions more closely, at twice the time
            independent_condition  as the adapters were trained
            main_adapter           name of a LoRA, such as a style, for text and image
            kv_cache               compute the conditions only once: exact if they are independent

        Further arguments are FluxPipeline's own. `output_type` "latent" returns normalized latents
        [B, C, height / 8, width / 8].
        """
        device = self._execution_device  # an offloaded transformer lies on the CPU
        if prompt_embeds is None:
            prompt_embeds, pooled_prompt_embeds, _ = self.encode_prompt(
                prompt, None, device=device, max_sequence_length=max_sequence_length
            )
        batch_size = len(prompt_embeds)

        # 1. Condition images to latents
        def encode(images):
            moments = encode_moments(self.vae, torch.stack([to_tensor(image.convert("RGB")) for image in images]))
            return mean_latents(moments, self.vae.config).to(device, prompt_embeds.dtype)

        latent_mask = None
        if mask is not None:
            masks = np.broadcast_to(mask, (batch_size, height, width))
            latent_mask = torch.from_numpy(np.stack([to_latent_mask(each) for each in masks])).flatten(1).to(device)
            if latent_mask.all(dim=1).any() or not latent_mask.any(dim=1).all():
                raise ValueError("a mask must contain some and leave some of the image's tokens of 16 pixels")
        condition_latents = []
        latent_masks = list(condition_masks) or [None] * len(specs)
        kept_images = None  # those that stay outside of the mask
        for i, (spec, images) in enumerate(zip(specs, condition_images, strict=True)):
            images = images if isinstance(images, list) else [images] * batch_size
            if spec.type == "token_integration":
                latent_masks[i] = ~latent_mask
            if latent_masks[i] is not None and kept_images is None:
                kept_images = images
            if spec.type == "token_integration":
                pixel_masks = [to_pixel_mask(to_latent_mask(each)) for each in masks]
                pairs = zip(images, pixel_masks, strict=True)
                images = [convert_to_condition(spec.type, image, mask=each) for image, each in pairs]
            condition_latents.append(encode(images))
        joint_attention_kwargs = {
            "conditions": pack_conditions(condition_latents, specs, latent_masks),
            "independent_condition": independent_condition,
            "main_adapter": main_adapter,
            "latent_mask": latent_mask,
            "cache": KVCache() if kv_cache else None,
        }
        if image_guidance_scale != 1:
            black_latents = [encode([Image.new("RGB", spec.size[::-1])] * batch_size) for spec in specs]
            joint_attention_kwargs["image_guidance_scale"] = image_guidance_scale
            joint_attention_kwargs["negative"] = {
                "conditions": pack_conditions(black_latents, specs, latent_masks),
                "cache": KVCache() if kv_cache else None,
            }

        # 2. FluxPipeline's own steps
        latents = (
            super()
            .__call__(
                prompt_embeds=prompt_embeds,
                pooled_prompt_embeds=pooled_prompt_embeds,
                height=height,
                width=width,
                joint_attention_kwargs=joint_attention_kwargs,
                output_type="latent",
                **kwargs,
            )
            .images
        )

        # 3. Outside of the mask, the image stays: its own tokens, not those of the condition, which border on black
        if latent_mask is not None:
            latents = torch.where(latent_mask[..., None], latents, pack_latents(encode(kept_images)))
        latents = unpack_latents(latents, height // 8, width // 8)
        if output_type == "latent":
            return FluxPipelineOutput(images=latents)
        images = decode_latents(self.vae, latents.to(self.vae.device))
        return FluxPipelineOutput(images=self.image_processor.postprocess(images, output_type=output_type))


# ---- families: what differs between models ----


class Flux:
    """FLUX.1, dev or schnell: the LoRA acts on condition tokens alone, and `OminiPipeline` draws.

    `latents` are [B, C, H/8, W/8], normalized.
    """

    kind = "FLUX.1-dev, -schnell or FLUX.2-klein"
    transformer_class: Any = FluxTransformer2DModel  # whose weights and config the model has
    vae_class: Any = AutoencoderKL
    text_pipeline_class: Any = FluxPipeline
    target_modules = TARGET_MODULES
    num_inference_steps = 28
    fixed: dict[str, Any] = {}  # flags that its pipeline leaves no choice of
    has_clip = True
    reads_guidance = True  # or may: FLUX.1-schnell does not

    def __init__(self, index: dict):
        """`index` is the content of the pipeline's model_index.json."""

    def check_flags(self, args: argparse.Namespace) -> list[str]:
        """Problems of flags that this model has no counterpart for."""
        return []

    def longest_prompt(self, config: dict) -> int:
        """The largest --max_sequence_length for a transformer with this config."""
        return 512 if config["guidance_embeds"] else 256

    def architecture(self, config: dict) -> str:
        """The name in the header of a LoRA file."""
        return "flux-1-dev" if config["guidance_embeds"] else "flux-1-schnell"

    def describe_long_prompts(self, args: argparse.Namespace, captions: dict[str, str]) -> dict[str, str]:
        """What the header of a run says of captions {name: text} that are too long, see `describe_long_prompts`."""
        tokenizers = load_tokenizer(args, "tokenizer_2"), load_tokenizer(args, "tokenizer")
        return describe_long_prompts(captions, tokenizers[0], args.max_sequence_length, tokenizers[1])

    def load_transformer(self, args: argparse.Namespace, dtype: torch.dtype) -> Any:
        """The frozen transformer, which `predict` and the pipeline call."""
        return load_model(OminiTransformer2DModel, "transformer", args, dtype)

    def load_pipeline(self, args: argparse.Namespace, dtype: torch.dtype) -> DiffusionPipeline:
        """The whole frozen pipeline that draws with conditions, on the CPU."""
        return load_whole_pipeline(OminiPipeline, OminiTransformer2DModel, args, dtype)

    def create_pipeline(self, transformer: Any, vae: Any, scheduler: Any) -> DiffusionPipeline:
        """That pipeline of models in training, for prompts that are embedded already."""
        return OminiPipeline(
            scheduler=scheduler,
            vae=vae,
            text_encoder=None,
            tokenizer=None,
            text_encoder_2=None,
            tokenizer_2=None,
            transformer=transformer,
        )

    def pipeline_call(
        self,
        prompt_encoder: PromptEncoder,
        prompt: str,
        args: argparse.Namespace,
        specs: list[ConditionSpec],
        condition_images: list[Image.Image],
        mask: np.ndarray | None,
    ) -> dict[str, Any]:
        """Arguments of the pipeline: generate `prompt` with the image of each condition."""
        height, width = args.target_size
        prompt_embeds, pooled_prompt_embeds = prompt_encoder.encode_prompts([prompt])
        return {
            "prompt_embeds": prompt_embeds,
            "pooled_prompt_embeds": pooled_prompt_embeds,
            "specs": specs,
            "condition_images": condition_images,
            "mask": mask if "token_integration" in args.condition_type else None,
            "height": height,
            "width": width,
            "independent_condition": args.independent_condition,
        }

    def sample_latents(self, moments: torch.Tensor, vae: Any, generator: torch.Generator) -> torch.Tensor:
        """Latents [B, C, h, w] of posteriors [B, 2C, h, w]."""
        return sample_latents(moments, vae.config, generator)

    def predict(
        self,
        transformer: Any,
        x_t: torch.Tensor,
        t: torch.Tensor,
        prompt_embeds: torch.Tensor,
        pooled_prompt_embeds: torch.Tensor,
        condition_latents: list[torch.Tensor],
        *,
        specs: list[ConditionSpec],
        latent_masks: list[torch.Tensor | None],
        independent_condition: bool,
        guidance: torch.Tensor | None,
        height: int,
        width: int,
    ) -> torch.Tensor:
        """The velocity [B, N, 4C] of noisy tokens [B, N, 4C], which are height x width latents, at noise levels t [B];
        the other arguments are those of `compute_loss`."""
        latent_mask, *condition_masks = latent_masks
        return transformer(
            hidden_states=x_t,
            timestep=t,
            guidance=guidance,
            pooled_projections=pooled_prompt_embeds,
            encoder_hidden_states=prompt_embeds,
            txt_ids=torch.zeros(prompt_embeds.shape[1], 3, device=x_t.device),
            img_ids=image_ids(height, width, x_t.device),
            joint_attention_kwargs={
                "conditions": pack_conditions(condition_latents, specs, condition_masks),
                "independent_condition": independent_condition,
                "latent_mask": latent_mask,
            },
            return_dict=False,
        )[0]


class Flux2Klein(Flux):
    """FLUX.2-klein, whose reference images are conditions as OminiControl2's independent ones are, with a cache.

    In `Flux2KleinKVPipeline` text and image attend to everything, references to references alone; references are
    modulated at timestep 0 and stand in layers of positions of their own, 10, 20, ... beside the image's 0, with rows
    and columns from 0 on. So their keys and values depend neither on the image nor on its time: the pipeline computes
    them in its first step and reuses them in the others. `predict` is that first step, at any noise level. A LoRA that
    the pipeline loads acts on text, image and references, and that is what is trained.
    """

    kind = "FLUX.2-klein"
    transformer_class = Flux2Transformer2DModel
    vae_class = AutoencoderKLFlux2
    text_pipeline_class = Flux2KleinPipeline
    target_modules = FLUX2_TARGET_MODULES
    fixed = {"independent_condition": True, "position_delta": [(0.0, 0.0)], "position_scale": [1.0]}
    has_clip = False
    reads_guidance = False

    def __init__(self, index):
        self.num_inference_steps = 4 if index.get("is_distilled", True) else 50

    def check_flags(self, args):
        not_there = {
            "position_delta": "numbers the rows and columns of each condition from 0 on",
            "position_scale": "numbers the rows and columns of each condition by its own tokens",
            "adapter_per_condition": "has all LoRAs on all tokens",
            "dataset_class": "has neither the positions nor the masks that its items may bring",
        }
        problems = []
        for name, reason in not_there.items():
            if vars(args)[name]:
                problems.append(f"--{name} is for FLUX.1: Flux2KleinKVPipeline {reason}; leave it out")
        if "token_integration" in args.condition_type:
            problems.append(
                "--condition_type token_integration is for FLUX.1: Flux2KleinKVPipeline takes no part of an image; "
                "fill is similar"
            )
        specs = condition_specs(args)
        for spec in specs:
            if spec.type not in (*GIVEN_CONDITIONS, "sr") and spec.size != args.target_size:
                problems.append(
                    f"--condition_size {size_text(spec.size)} of {spec.type}: Flux2KleinKVPipeline does not spread "
                    f"its tokens over the image: leave it out, for --target_size {size_text(args.target_size)}"
                )
        return problems + [f"--target_size or --condition_size: {text}" for text in check_reference_sizes(specs)]

    def longest_prompt(self, config):
        return 512

    def architecture(self, config):
        return flux2_klein_architecture(config)

    def describe_long_prompts(self, args, captions):
        tokenizer = load_tokenizer(args, "tokenizer")
        texts = {name: flux2_klein_chat(tokenizer, caption) for name, caption in captions.items()}
        return describe_long_prompts(texts, tokenizer, args.max_sequence_length)

    def load_transformer(self, args, dtype):
        transformer = load_model(Flux2Transformer2DModel, "transformer", args, dtype)
        for block in transformer.transformer_blocks:
            block.attn.set_processor(Flux2KVAttnProcessor())
        for block in transformer.single_transformer_blocks:
            block.attn.set_processor(Flux2KVParallelSelfAttnProcessor())
        return transformer

    def load_pipeline(self, args, dtype):
        parts = load_text_pipeline(Flux2KleinPipeline, args, dtype).components
        parts["vae"] = load_model(AutoencoderKLFlux2, "vae", args, dtype)
        parts["transformer"] = load_model(Flux2Transformer2DModel, "transformer", args, dtype)
        return Flux2KleinKVPipeline(**parts)

    def create_pipeline(self, transformer, vae, scheduler):
        return Flux2KleinKVPipeline(
            scheduler=scheduler, vae=vae, text_encoder=None, tokenizer=None, transformer=transformer
        )

    def pipeline_call(self, prompt_encoder, prompt, args, specs, condition_images, mask):
        height, width = args.target_size
        prompt_embeds, _ = prompt_encoder.encode_prompts([prompt])
        return {
            "prompt_embeds": prompt_embeds,
            "image": condition_images,
            "height": height,
            "width": width,
            "num_inference_steps": self.num_inference_steps,
        }

    def sample_latents(self, moments, vae, generator):
        return flux2_latents(moments, vae)

    def predict(
        self,
        transformer,
        x_t,
        t,
        prompt_embeds,
        pooled_prompt_embeds,
        condition_latents,
        *,
        specs,
        latent_masks,
        independent_condition,
        guidance,
        height,
        width,
    ):
        references = torch.cat([pack_latents(latents) for latents in condition_latents], dim=1)
        # the pipeline numbers tokens [1, C, rows, columns]
        grids = [latents[:1, :, ::2, ::2] for latents in condition_latents]
        reference_ids = Flux2KleinKVPipeline._prepare_image_ids(grids)
        ids = Flux2KleinKVPipeline._prepare_latent_ids(torch.empty(1, 0, height // 2, width // 2))
        velocity, _ = transformer(
            hidden_states=torch.cat([references, x_t], dim=1),
            timestep=t,
            encoder_hidden_states=prompt_embeds,
            txt_ids=to_device(Flux2KleinKVPipeline._prepare_text_ids(prompt_embeds[:1]), x_t.device),
            img_ids=to_device(torch.cat([reference_ids, ids], dim=1), x_t.device),
            return_dict=False,
            kv_cache_mode="extract",
            num_ref_tokens=references.shape[1],
        )
        return velocity


def check_reference_sizes(specs: list[ConditionSpec]) -> list[str]:
    """What `Flux2KleinKVPipeline` would refuse or shrink of the images of conditions."""
    problems = []
    for spec in specs:
        shorter, longer = sorted(spec.size)
        if shorter < 64 or shorter * longer > 1024 * 1024 or longer > 8 * shorter:
            problems.append(
                f"{size_text(spec.size)} of {spec.type}, where FLUX.2-klein takes conditions of 64 pixels or more a "
                "side, 1024 x 1024 in all at most, and at most 8 times as long as wide"
            )
    return problems


FAMILIES = {  # by the class that model_index.json names
    "FluxPipeline": Flux,
    "Flux2KleinPipeline": Flux2Klein,
    "Flux2KleinKVPipeline": Flux2Klein,
}


def find_family(args: argparse.Namespace) -> Flux:
    """The family of --pretrained_model_name_or_path. That of FLUX.1 for any other: `check_model` says what it is."""
    index = read_model_index(args)
    return FAMILIES.get(index.get("_class_name"), Flux)(index)


# ---------------------------------------------------------------------------------------------------------------------
# Objective
# ---------------------------------------------------------------------------------------------------------------------


def sample_noise(
    latents: torch.Tensor,
    *,
    args: argparse.Namespace,
    noise_scheduler: FlowMatchEulerDiscreteScheduler,
    generator: torch.Generator,
) -> tuple[torch.Tensor, torch.Tensor]:
    """(noise [B, C, h, w], noise levels [B]) for latents [B, C, h, w], from `generator`, which is on the CPU."""
    batch_size, _, height, width = latents.shape
    noise = torch.randn(latents.shape, generator=generator)
    t = sample_sigmas(
        batch_size,
        noise_scheduler=noise_scheduler,
        image_seq_len=height * width // 4,
        generator=generator,
        timestep_sampling=args.timestep_sampling,
        weighting_scheme=args.weighting_scheme,
        logit_mean=args.logit_mean,
        logit_std=args.logit_std,
        mode_scale=args.mode_scale,
        sigmoid_scale=args.sigmoid_scale,
        discrete_flow_shift=args.discrete_flow_shift,
    )
    return to_device(noise, latents.device), to_device(t, latents.device)


def compute_loss(
    transformer: Any,
    latents: torch.Tensor,
    condition_latents: list[torch.Tensor],
    latent_masks: list[torch.Tensor | None],
    noise: torch.Tensor,
    t: torch.Tensor,
    prompt_embeds: torch.Tensor,
    pooled_prompt_embeds: torch.Tensor,
    *,
    family: Flux,
    specs: list[ConditionSpec],
    independent_condition: bool,
    guidance: torch.Tensor | None,
    weighting_scheme: str,
) -> torch.Tensor:
    """The flow matching loss [B] of each sample of a batch (arXiv 2411.15098, section 3.1).

    latents [B, C, h, w] and those of each condition are normalized; noise and noise levels t are those of
    `sample_noise`; prompt_embeds [B, T, D], pooled_prompt_embeds [B, P]; guidance [B], or None for a model without
    guidance embedding. `latent_masks`, boolean [B, h/2 * w/2] or None for all tokens, are those of the image and of
    each condition (token_integration): only an image's tokens in its mask are noisy and count.
    """
    _, _, height, width = latents.shape
    x_0 = pack_latents(latents)  # [B, N, 4C]
    x_1 = pack_latents(noise)
    x_t = add_noise(x_0, x_1, t)  # (1 - t) x_0 + t x_1
    dtype = prompt_embeds.dtype
    model_pred = family.predict(
        transformer,
        x_t.to(dtype),
        t,
        prompt_embeds,
        pooled_prompt_embeds,
        [each.to(dtype) for each in condition_latents],
        specs=specs,
        latent_masks=latent_masks,
        independent_condition=independent_condition,
        guidance=guidance,
        height=height,
        width=width,
    )
    target = x_1 - x_0
    latent_mask = latent_masks[0]
    token_weights = None
    if latent_mask is not None:
        img_ids = image_ids(height, width, latents.device)
        model_pred, _, token_weights = select_tokens(model_pred, img_ids, latent_mask)
        target, _, _ = select_tokens(target, img_ids, latent_mask)
    weighting = compute_loss_weighting_for_sd3(weighting_scheme, sigmas=t)
    return weighted_mse(model_pred, target, weighting, token_weights)


# ---------------------------------------------------------------------------------------------------------------------
# Data
# ---------------------------------------------------------------------------------------------------------------------


# ---- conditions: what they are, their images, their checks ----


def condition_specs(
    args: argparse.Namespace, positions: Sequence[tuple[tuple[float, float], float]] | None = None
) -> list[ConditionSpec]:
    """The conditions of a run, in the order of --condition_type.

    `positions` are (position_delta, position_scale) of each, where the data brings them (--dataset_class).
    """
    specs = []
    left = 0  # where the images to the left of the generated one begin, in its tokens
    for i, condition_type in enumerate(args.condition_type):
        size = value_for(args.condition_size, i)
        if size is None:
            size = args.target_size
            if condition_type == "sr":
                size = (args.target_size[0] // 2, args.target_size[1] // 2)
        delta = value_for(args.position_delta, i)
        if delta is None:
            delta = (0, 0)
            if condition_type in SIDE_BY_SIDE_CONDITIONS:
                left -= size[1] // PATCH
                delta = (0, left)
        scale = value_for(args.position_scale, i)
        if scale is None:
            scale = args.target_size[0] / size[0] if delta == (0, 0) else 1.0
        if positions:
            delta, scale = positions[i]
        specs.append(ConditionSpec(condition_type, size, delta, scale, adapter_name(args, i)))
    return specs


def value_for(values, i):
    """The value of condition i of a flag that has one for all conditions, one for each, or none."""
    if not values:
        return None
    return values[0] if len(values) == 1 else values[i]


def adapter_name(args, i):
    """The name of the LoRA that condition i passes."""
    types = args.condition_type
    if not args.adapter_per_condition:
        return "_".join(types)
    return types[i] if types.count(types[i]) == 1 else f"{types[i]}_{i}"


def adapter_names(specs):
    """The names of the adapters, each once, in the order of the conditions."""
    return list(dict.fromkeys(spec.adapter for spec in specs))


def check_conditions(args):
    """Problems of the flags that say what the conditions are, and of the files among them."""
    types = args.condition_type
    problems = []
    if args.attention_backend in WITHOUT_MASK and "token_integration" in types:
        problems.append(
            f"--attention_backend {args.attention_backend} takes no mask, which token_integration needs: leave it out"
        )
    for name in ("condition_size", "position_delta", "position_scale"):
        given = vars(args)[name]
        if given and len(given) not in (1, len(types)):
            problems.append(
                f"--{name} has {len(given)} values for the {len(types)} of --condition_type: give 1 or each"
            )

    # conditions that come with the data
    num_columns = len(args.condition_column or ())
    num_custom = types.count("custom")
    if args.dataset_class:
        if args.position_delta or args.position_scale:
            problems.append(
                "--position_delta and --position_scale have no effect with --dataset_class: its items say where"
            )
        if set(types) != {"custom"}:
            problems.append("--dataset_class brings its own conditions: --condition_type custom, once for each")
        if num_columns:
            problems.append("--condition_column has no effect with --dataset_class: its items carry condition_0, ...")
        if args.mask_column:
            problems.append(f"--mask_column {args.mask_column} has no effect with --dataset_class")
    elif num_columns not in (num_custom, num_custom + types.count("subject")):
        problems.append(f"--condition_column names {num_columns} columns for {num_custom} custom conditions")
    if types.count("subject") > 1 and num_columns == num_custom:
        problems.append(
            "--condition_type subject can be given once for side-by-side pairs, or more often with --condition_column"
        )

    # what cannot be one and the same
    image_column = args.image_column if args.dataset_name or args.data_files else None
    problems += check_roles({"--image_column": image_column, "--mask_column": args.mask_column})
    for column in args.condition_column or []:
        problems += check_roles({"--image_column": image_column, "--condition_column": column})
        problems += check_roles({"--mask_column": args.mask_column, "--condition_column": column})

    # masks and depth
    is_masked = any(condition_type in MASKED_CONDITIONS for condition_type in types)
    if args.mask_column and not is_masked:
        problems.append(f"--mask_column {args.mask_column} needs --condition_type fill or token_integration")
    if is_masked and min(args.target_size) < 2 * PATCH:
        problems.append(f"--target_size {min(args.target_size)} is too small for a mask: at least {2 * PATCH}")
    if types.count("token_integration") > 1:
        problems.append("--condition_type token_integration can be given only once")
    if "depth_pred" in types and len(types) > 1:
        problems.append("--condition_type depth_pred generates depth maps: it goes with no other condition")
    if needs_depth(args) and args.streaming:
        problems.append("--condition_type depth and depth_pred estimate depth before training: leave out --streaming")

    # validation
    paths = args.validation_image or []
    if len(paths) not in (0, 1, len(types)):
        problems.append(f"--validation_image names {len(paths)} images for {len(types)} conditions: give 1 or each")
    for path in paths:
        if not path.is_file():
            problems.append(f"--validation_image {visible(path)}: no such file")
    if problems:
        return problems
    return check_positions(args) + check_depth_model(args)


def check_positions(args):
    """Problems of conditions that lie on the image without covering it exactly."""
    problems = []
    for spec in condition_specs(args):
        is_aligned = spec.position_delta == (0, 0) and spec.type not in GIVEN_CONDITIONS
        if spec.type == "token_integration":
            if not is_aligned or spec.size != args.target_size or spec.position_scale != 1:
                problems.append(
                    "--condition_type token_integration shares the image's tokens: no size or position of its own"
                )
        elif is_aligned and not args.position_scale and not covers_image(spec, args.target_size):
            problems.append(
                f"--condition_size {size_text(spec.size)} of {spec.type} is not --target_size "
                f"{size_text(args.target_size)} scaled: give --position_scale"
            )
    return problems


def covers_image(spec, target_size):
    """Whether a condition lies exactly on the image: what it shows at a place is there in the image."""
    height, width = (round(side * spec.position_scale, 6) for side in spec.size)
    is_aligned = spec.position_delta == (0, 0) and spec.type != "subject"  # which is elsewhere in the image
    return is_aligned and (height, width) == tuple(target_size)


def check_shapes(names, sizes, specs, target_size):
    """Problems of conditions that lie on one image and are made from images of different shapes, `names` with `sizes`,
    one for each of `specs`: they would be cropped apart."""
    covering = [i for i, spec in enumerate(specs) if covers_image(spec, target_size)]
    problems = []
    for i in covering[1:]:
        first = covering[0]
        if not same_shape(sizes[i], sizes[first]):
            problems.append(
                f"{names[i]} is {sizes[i]} pixels, {names[first]} {sizes[first]}: conditions that lie on one image "
                "must have one shape"
            )
    return problems


def convert_to_condition(
    condition_type: str,
    image: Image.Image,
    *,
    rng: np.random.Generator | None = None,
    mask: np.ndarray | None = None,
) -> Image.Image:
    """The condition image, RGB, that is made from an RGB image of the condition's size.

    `rng` gives the blur of deblurring. fill and token_integration are black where `mask`, boolean [H, W], is True.
    depth is estimated beforehand, by `estimate_depth`; an image that is given is its own condition.
    """
    if condition_type == "canny":
        return Image.fromarray(cv2.Canny(np.asarray(image), 100, 200)).convert("RGB")
    if condition_type == "coloring":
        return image.convert("L").convert("RGB")
    if condition_type == "deblurring":
        assert rng is not None
        radius = int(rng.integers(1, 11))
        return image.filter(ImageFilter.GaussianBlur(radius))
    if condition_type in MASKED_CONDITIONS:
        assert mask is not None
        resized = Image.fromarray(mask).resize(image.size, Image.Resampling.NEAREST)
        return Image.composite(Image.new("RGB", image.size), image, resized)
    return image


def random_mask(rng: np.random.Generator, height: int, width: int) -> np.ndarray:
    """A random rectangle or, half of the time, all around it: boolean [height, width], neither full nor empty.

    The rectangle's edges are uniform, as in OminiControl: on average it covers 12 % of the image.
    """
    mask = np.zeros((height, width), dtype=bool)
    while not mask.any() or mask.all():
        top, bottom = np.sort(rng.integers(0, height + 1, size=2))
        left, right = np.sort(rng.integers(0, width + 1, size=2))
        mask[:] = False
        mask[top:bottom, left:right] = True
    return ~mask if rng.random() < 0.5 else mask


def to_latent_mask(mask: np.ndarray) -> np.ndarray:
    """The tokens of which any pixel is in the mask: boolean [H, W] to [H / 16, W / 16]."""
    height, width = mask.shape
    return mask.reshape(height // PATCH, PATCH, width // PATCH, PATCH).any(axis=(1, 3))


def to_pixel_mask(latent_mask: np.ndarray) -> np.ndarray:
    """Boolean tokens [h, w] as pixels [16 h, 16 w]."""
    return latent_mask.repeat(PATCH, axis=0).repeat(PATCH, axis=1)


def check_mask(mask, args):
    """What is wrong with a mask, an example, or None."""
    latent_mask = to_latent_mask(fit_mask(mask.image(), args.target_size))
    if latent_mask.all():
        return f"{mask.name}: the mask is all white, in tokens of 16 pixels"
    if not latent_mask.any():
        return f"{mask.name}: the mask is all black, in tokens of 16 pixels"
    return None


def needs_depth(args):
    """Whether depth maps of the images are needed."""
    return any(condition_type in DEPTH_CONDITIONS for condition_type in args.condition_type)


def check_depth_model(args):
    """Problems of --depth_model."""
    if not needs_depth(args):
        return []
    try:
        config = AutoConfig.from_pretrained(args.depth_model, cache_dir=args.cache_dir, trust_remote_code=False)
    except (OSError, ValueError) as error:
        return [f"--depth_model {args.depth_model}: cannot be loaded ({str(error).splitlines()[0]})"]
    if type(config) not in MODEL_FOR_DEPTH_ESTIMATION_MAPPING:
        return [f"--depth_model {args.depth_model}: is a {config.model_type}, which estimates no depth"]
    return []


def depth_path(image, args):
    """Where the depth map of an image of --target_size is kept."""
    digest = hashlib.sha256(image.tobytes() + str((image.size, args.depth_model)).encode()).hexdigest()
    return args.output_dir / "depth" / f"{digest[:32]}.png"


def estimate_depth(accelerator, examples, args):
    """Writes the depth maps of all images to output_dir/depth; those that are there stay. The processes share it."""
    from transformers import pipeline

    estimator = pipeline(
        "depth-estimation",
        model=args.depth_model,
        trust_remote_code=False,
        device=accelerator.device,
        model_kwargs={"cache_dir": args.cache_dir},
    )
    # an item of the user's class is read by one thread, as everywhere
    num_threads = 1 if args.dataset_class else num_reading_threads()
    read = lambda example: fit(example.image(), args.target_size, args.image_interpolation_mode)  # noqa: E731
    starts = list(range(0, len(examples), args.depth_batch_size))
    own_starts = own_items(accelerator, starts)
    own = [example for start in own_starts for example in examples[start : start + args.depth_batch_size]]
    inputs = map_ahead(read, own, num_threads)
    for _ in tqdm(own_starts, desc="Estimating depth", unit="batch", disable=not accelerator.is_main_process):
        batch = list(islice(inputs, args.depth_batch_size))
        images = [image for image in batch if not depth_path(image, args).exists()]
        if not images:
            continue
        results = estimator(images, batch_size=args.depth_batch_size)
        for image, result in zip(images, results, strict=True):
            with atomic_write(depth_path(image, args)) as partial:
                result["depth"].convert("L").resize(image.size).save(partial, format="PNG")
    accelerator.wait_for_everyone()


# ---- reading: one function for each source of data ----


def find_examples(args):
    """Examples of the data with captions, target and condition images, and problems."""
    # read
    if args.instance_data_dir:
        examples, problems = read_image_folder(args)
    elif args.dataset_class:
        examples, problems = read_dataset_class(args)
    elif args.streaming:
        examples, problems = read_first_of_stream(args)
    else:
        examples, problems = read_stored_dataset(args)

    positions = examples[0].columns["positions"] if args.dataset_class and examples else None
    specs = condition_specs(args, positions)

    # check what is trained on
    used = [example for example in examples if not is_left_out(example, args)]
    if examples and not used:
        problems.append(
            f"{source_of(args)}: none of {len(examples)} samples has the best quality: use --no-quality_filter"
        )
    every_nth = 1 + len(used) // MAX_CHECKED
    problems += check_captions(used, default=args.instance_prompt)
    misfits = find_misfits(used, specs, args)
    problems += first_ten(list(misfits.values()))
    checked = [example for example in used[::every_nth] if example.name not in misfits]
    problems += check_images(checked + validation_examples(args), functools.partial(check_example, args=args))
    problems += check_validation_shapes(specs, args)
    if args.dataset_class:
        problems += check_latent_masks(examples, args)
        positions = {example.columns["positions"] for example in examples}
        if len(positions) > 1:
            problems.append(
                f"{source_of(args)}: position_delta and position_scale differ between its items: {positions}"
            )

    # assign
    for example in examples:
        if example.caption is None:
            example.caption = args.instance_prompt
    return examples, problems


def find_held_out(args, dataset):
    """(dataset of the held-out examples, problems). What --validation_split holds out is taken from `dataset`.

    Nothing is dropped in it; masks and blurs are the same for every run.
    """
    problems = []
    own_args = held_out_args(args, seed=NOISE_SEED, drop_text_prob=0.0, drop_image_prob=0.0)
    if args.validation_data_dir:
        own_args.instance_data_dir = args.validation_data_dir
        own_args.dataset_name = None
        own_args.data_files = None
        own_args.streaming = False
        own_args.validation_image = None
        own_args.validation_prompts = None
        examples, problems = find_examples(own_args)
        problems = [problem.replace("--instance_data_dir", "--validation_data_dir") for problem in problems]
    else:
        found = dataset.examples
        dataset.examples, examples = hold_out(found, args.validation_split or 0)
        if found:
            problems = check_split(dataset.examples, args.validation_split or 0)
    return OminiDataset(examples, dataset.specs, own_args), problems


def is_left_out(example, args):
    """Whether an example has scores of its quality, and --quality_filter leaves it out for one of them."""
    if not args.quality_filter or "quality_assessment" not in example.columns:
        return False
    scores = example.columns["quality_assessment"] or {}
    return any((scores.get(name) or 0) < BEST_QUALITY for name in QUALITY_SCORES)


def source_of(args):
    """The flag that names the data, with its value."""
    if args.instance_data_dir:
        return f"--instance_data_dir {args.instance_data_dir}"
    if args.dataset_class:
        return f"--dataset_class {args.dataset_class}"
    return own_dataset(args)["source"]


def own_dataset(args):
    """What `read_dataset` and `open_stream` are to read."""
    return dataset_settings(args, {"image": args.image_column, **condition_columns(args)}, args.caption_column)


def read_image_folder(args):
    """Examples of --instance_data_dir, whose metadata.jsonl names condition images and masks."""
    examples, problems = read_folder(
        args.instance_data_dir,
        caption_column=args.caption_column,
        partner_columns=condition_columns(args),
        whole_rows=True,
    )
    examples, misfits = fitting_pairs(examples, args)
    return split_pairs(examples, args), problems + misfits


def read_stored_dataset(args):
    """Examples of --dataset_name or --data_files."""
    examples, problems = read_dataset(name=args.dataset_name or "--data_files", whole_rows=True, **own_dataset(args))
    examples, misfits = fitting_pairs(examples, args)
    return split_pairs(examples, args), problems + misfits


def read_first_of_stream(args):
    """The examples of a row of a stream: what can be checked before training."""
    return read_stream_start(
        own_dataset(args),
        functools.partial(check_streamed, args=args),
        examples_of=functools.partial(streamed_examples, args),
    )


def streamed_examples(args, stream, row, name):
    """The examples of a row of a stream; none of one that --quality_filter leaves out."""
    example = stream.example(row, name)
    return [] if is_left_out(example, args) else split_pairs([example], args)


def check_streamed(example, args, specs=(), size_of=decoded_size):
    """What is wrong with an example of a stream, or None; for `specs` and `size_of` see `check_example`."""
    problems = check_captions([example], default=args.instance_prompt)
    return problems[0] if problems else check_example(example, args, specs, size_of)


def streamed_batches(stream, dataset, args, **processes):
    """The batches of a stream, whose samples are checked as they come."""
    return StreamedBatches(
        stream,
        dataset.checked_sample,
        examples_of=functools.partial(streamed_examples, args, stream),
        batch_size=args.train_batch_size,
        shuffle_buffer=args.shuffle_buffer,
        seed=args.seed,
        num_threads=args.dataloader_num_workers,
        **processes,
    )


def condition_columns(args):
    """{role of an image: its column}, of custom conditions and, if there are columns enough, of subjects; and mask."""
    columns = args.condition_column or []
    with_column = GIVEN_CONDITIONS
    if len(columns) == args.condition_type.count("custom"):
        with_column = ("custom",)
    roles = []
    for i, condition_type in enumerate(args.condition_type):
        if condition_type in with_column:
            roles.append(f"condition_{i}")
    image_columns = dict(zip(roles, columns, strict=True))
    if args.mask_column:
        image_columns["mask"] = args.mask_column
    return image_columns


def has_pairs(args):
    """Whether the images of the data are pairs side by side: there is a subject, and no column of its images."""
    needed = [f"condition_{i}" for i, each in enumerate(args.condition_type) if each in GIVEN_CONDITIONS]
    return not all(role in condition_columns(args) for role in needed)


def fitting_pairs(examples, args):
    """(the examples whose images are no pairs, or pairs that `crop_side` cuts, problems of the others), by the headers
    of their files alone."""
    if not has_pairs(args):
        return examples, []
    pairs = [example for example in examples if not is_left_out(example, args)]
    misfits = {}
    for pair, (size, error) in zip(pairs, map_examples(header_size, pairs), strict=True):
        misfit = pair_misfit(size, args.image_size, args.padding) if size else None
        if error or misfit:
            misfits[pair.name] = error or f"{pair.name}: {misfit}"
    return [example for example in examples if example.name not in misfits], first_ten(list(misfits.values()))


def split_pairs(examples, args):
    """The examples; those of pairs side by side (subject) are two each, with each side once as the condition."""
    if not has_pairs(args):
        return examples
    subject = f"condition_{args.condition_type.index('subject')}"
    sides = []
    for pair in examples:
        for side in (0, 1):
            read_side = functools.partial(crop_side, pair, side, args.image_size, args.padding)
            read_other = functools.partial(crop_side, pair, 1 - side, args.image_size, args.padding)
            caption_columns = (f"description.description_{side}", f"description_{side}", args.caption_column or "text")
            caption = first_value(pair.columns, caption_columns)
            if caption is None:
                caption = pair.caption
            example = Example(f"{pair.name}, side {side}", read_side, caption, columns=pair.columns, files=pair.files)
            example.stamp = pair.stamp
            example.source = "" if caption is None else pair.source or "its own column"
            example.size = Size(args.image_size, args.image_size)
            other = Example(f"{pair.name}, other side", read_other, size=example.size)
            example.images = {**pair.images, subject: other}
            sides.append(example)
    return sides


def crop_side(pair, side, image_size, padding):
    """The left (0) or right (1) image, `image_size` square, of a pair with `padding` around and between."""
    image = pair.image()
    misfit = pair_misfit(Size.of(image), image_size, padding)
    if misfit:
        raise ValueError(misfit)
    left = padding + side * (image_size + padding)
    square = image.crop((left, padding, left + image_size, padding + image_size))
    square.info.clear()  # such as the colour profile, which is applied
    return square


def pair_misfit(size, image_size, padding):
    """What is wrong with the size of a pair, or None."""
    if holds_pair(size, image_size, padding):
        return None
    fitting = []
    for other_padding in (2 * size.height - size.width, padding):  # as much around as between; as it is given
        other_size = size.height - 2 * other_padding
        if 0 <= 4 * other_padding <= other_size and holds_pair(size, other_size, other_padding):
            fitting.append(f"--image_size {other_size} --padding {other_padding}")
    remedy = "two squares side by side are needed"
    if fitting:
        remedy = f"give {' or '.join(dict.fromkeys(fitting))}"
    return f"{size} pixels hold no pair of --image_size {image_size} and --padding {padding}: {remedy}"


def holds_pair(size, image_size, padding):
    """Whether an image of this size is a pair: two squares of `image_size` with `padding` between them and before
    them. Behind them there may be less, or around each as much (Subjects200K, 1056 x 528)."""
    rest_right = size.width - 2 * (padding + image_size)
    rest_below = size.height - (padding + image_size)
    return 0 <= rest_right <= 2 * padding and 0 <= rest_below <= padding


def read_dataset_class(args):
    """Examples of the user's own dataset, whose items are dictionaries."""
    path, _, name = args.dataset_class.rpartition(":")
    if not path:
        return [], [f"--dataset_class {args.dataset_class}: expected FILE.py:CLASS"]
    num_conditions = len(args.condition_type)
    examples = []
    try:
        module_spec = importlib.util.spec_from_file_location(Path(path).stem, path)
        module = importlib.util.module_from_spec(module_spec)
        module_spec.loader.exec_module(module)
        dataset = getattr(module, name)()
        read_item = functools.lru_cache(maxsize=1)(dataset.__getitem__)  # image and conditions come from one call
        for i in range(len(dataset)):
            item = read_item(i)
            found = sum(re.fullmatch(r"condition_\d+", key) is not None for key in item)
            if found != num_conditions:
                return [], [
                    f"--dataset_class {args.dataset_class}: item {i} has {found} conditions for {num_conditions} "
                    "of --condition_type"
                ]
            example_name = f"{args.dataset_class}[{i}]"
            example = Example(example_name, functools.partial(read_key, read_item, i, "image"), item["description"])
            example.size = item_size(item["image"])
            positions = []
            latent_masks = {"image": "image_latent_mask"}
            for n in range(num_conditions):
                role = f"condition_{n}"
                read = functools.partial(read_key, read_item, i, role)
                example.images[role] = Example(f"{example_name}, {role}", read, size=item_size(item[role]))
                down, right = map(float, item.get(f"position_delta_{n}", (0, 0)))
                scale = float(item.get(f"position_scale_{n}", 1.0))
                if not all(map(math.isfinite, (down, right, scale))):
                    return [], [
                        f"--dataset_class {args.dataset_class}: item {i}: condition {n} has no finite position"
                    ]
                positions.append(((down, right), scale))
                latent_masks[role] = f"condition_latent_mask_{n}"
            example.columns["positions"] = tuple(positions)
            example.columns["latent_masks"] = {
                role: functools.partial(read_latent_mask, read_item, i, key)
                for role, key in latent_masks.items()
                if item.get(key) is not None
            }
            examples.append(example)
    except Exception as error:  # whatever the user's file raises
        return [], [f"--dataset_class {args.dataset_class}: cannot be read ({error!r})"]
    if not examples:
        return [], [f"{source_of(args)}: no images in it"]
    return examples, []


def read_key(read_item, i, key):
    """An image of the user's own dataset, where it may be a tensor [3, H, W] in [0, 1]."""
    image = read_item(i)[key]
    if not isinstance(image, torch.Tensor):
        return image
    if image.ndim != 3 or len(image) != 3 or image.min() < 0 or image.max() > 1:
        values = f"from {image.min():g} to {image.max():g}"
        raise ValueError(f"a tensor of shape {list(image.shape)} {values}: expected [3, H, W] in [0, 1]")
    return VaeImageProcessor.numpy_to_pil(image.float().permute(1, 2, 0).numpy())[0]


def item_size(image):
    """The size of an image of the user's own dataset, PIL or a tensor [3, H, W]; None of what is neither."""
    if isinstance(image, torch.Tensor) and image.ndim == 3:
        return Size(*image.shape[1:])
    return upright_size(image) if isinstance(image, Image.Image) else None


def read_latent_mask(read_item, i, key):
    """A latent mask of the user's own dataset, boolean [N]: which tokens of its image enter the transformer."""
    return torch.as_tensor(read_item(i)[key]).bool().flatten()


def check_latent_masks(examples, args):
    """Problems of the latent masks of the user's own dataset."""
    if not examples:
        return []
    specs = condition_specs(args, examples[0].columns["positions"])
    sizes = {"image": args.target_size} | {f"condition_{i}": spec.size for i, spec in enumerate(specs)}
    problems = []
    for example in examples:
        latent_masks = example.columns["latent_masks"]
        if latent_masks.keys() != examples[0].columns["latent_masks"].keys():
            problems.append(f"{example.name}: has latent masks where {examples[0].name} has none, or the reverse")
        if latent_masks and args.attention_backend in WITHOUT_MASK:
            problems.append(
                f"{example.name}: has latent masks, which --attention_backend {args.attention_backend} does not take"
            )
        for role, read_mask in latent_masks.items():
            latent_mask = read_mask()
            height, width = sizes[role]
            expected = height * width // PATCH**2
            if len(latent_mask) != expected or not latent_mask.any():
                selected = f"{int(latent_mask.sum())} of {len(latent_mask)} tokens"
                problems.append(
                    f"{example.name}: the latent mask of {role} selects {selected}: "
                    f"expected some of {expected}, one for each {PATCH} x {PATCH} pixels"
                )
    return problems[:5]


def find_misfits(examples, specs, args):
    """{name: problem} of examples whose images do not fit together, by the headers of their files alone."""
    roles = ["mask", *(f"condition_{i}" for i, spec in enumerate(specs) if covers_image(spec, args.target_size))]
    compared = {}  # {index of the example: {role: its image}}
    for index, example in enumerate(examples):
        others = {role: example.images[role] for role in roles if role in example.images}
        if others:
            compared[index] = {"image": example, **others}
    images = [image for images in compared.values() for image in images.values()]
    results = iter(map_examples(header_size, images))
    misfits = {}
    for index, own in compared.items():
        sizes = {}
        errors = []
        for role in own:
            sizes[role], error = next(results)
            errors += [error] if error else []
        misfit = errors[0] if errors else misfit_of(examples[index], sizes, specs, args)
        if misfit:
            misfits[examples[index].name] = misfit
    return misfits


def misfit_of(example, sizes, specs, args):
    """What is wrong with the sizes {role: Size} of the images of an example, or None."""
    if "mask" in sizes and sizes["mask"] != sizes["image"]:
        return f"{example.images['mask'].name}: the mask is {sizes['mask']} pixels, its image {sizes['image']}"
    for i, spec in enumerate(specs):
        role = f"condition_{i}"
        if role in sizes and covers_image(spec, args.target_size):
            kind = "a condition that lies on it"
            problems = check_shape(example.images[role].name, kind, sizes[role], sizes["image"])
            if problems:
                return f"{problems[0]}: crop both alike, or give it another position_delta"
    return None


def check_example(example, args, specs=(), size_of=decoded_size):
    """What is wrong with the images and the mask of an example, or None. Conditions are compared with their image by
    `specs`, unless `find_misfits` has done it. `size_of` reads as much of an image as is to be checked."""
    sizes = {}
    for role, image in {"image": example, **example.images}.items():
        try:
            sizes[role] = size_of(image)
        except Exception as error:  # PIL raises several exception types
            return f"{image.name}: not a readable image ({str(error)[:200]})"
    misfit = misfit_of(example, sizes, specs, args)
    if misfit or "mask" not in sizes:
        return misfit
    return check_mask(example.images["mask"], args)


def check_validation_shapes(specs, args):
    """Problems of validation images, one for each condition, that have different shapes and lie on one image."""
    problems = []
    for paths in dict.fromkeys(prompt.image for prompt in all_validation_prompts(args)):
        if len(paths) != len(specs):
            continue
        sizes = [size for size, _ in map_examples(header_size, [file_example(path) for path in paths])]
        if None not in sizes:  # one is not readable, which is said already
            flag = "--validation_image" if list(paths) == args.validation_image else "--cn"
            problems += check_shapes([f"{flag} {path}" for path in paths], sizes, specs, args.target_size)
    return problems


def validation_prompts(args):
    """(what is generated while training, what after it, problems): lists of `ValidationPrompt` with their images."""
    options = {"seed", "num_inference_steps", "guidance_scale", "true_cfg_scale", "negative_prompt", "lora_scale"}
    options.add("image")
    reads_guidance = find_family(args).reads_guidance
    if not reads_guidance:
        options -= {"guidance_scale", "true_cfg_scale", "negative_prompt"}
    if {"fill", "token_integration"} & set(args.condition_type):
        options.add("mask")
    prompts, problems = read_validation_prompts("--validation_prompts", args.validation_prompts, options=options)
    num_conditions = len(args.condition_type)
    for prompt in prompts:
        num_images = len(prompt.image or args.validation_image or ())
        if num_images not in (1, num_conditions):
            wanted = "one" if num_conditions == 1 else f"one, or {num_conditions}"
            problems.append(
                f"--validation_prompts {args.validation_prompts}: {prompt.prompt[:80]!r} has {num_images} images for "
                f"{num_conditions} conditions: give --cn {wanted}"
            )
    prompts += repeated_prompt(args.validation_prompt, args.num_validation_images, seed=args.seed)
    final_prompts = []
    if not args.skip_final_inference:
        final_prompts = repeated_prompt(args.final_validation_prompt, args.num_validation_images, seed=args.seed)
        final_prompts = final_prompts or prompts
    default_images = tuple(args.validation_image or ())
    defaults = {
        "guidance_scale": args.validation_guidance_scale if reads_guidance else None,
        "num_inference_steps": args.validation_num_inference_steps,
    }
    prompts, final_prompts = (
        [replace(prompt, image=prompt.image or default_images) for prompt in with_defaults(each, **defaults)]
        for each in (prompts, final_prompts)
    )
    return prompts, final_prompts, problems


def all_validation_prompts(args):
    """All prompts that are generated at a time, but for those whose number of images is a problem."""
    prompts, final_prompts, _ = validation_prompts(args)
    counts = (1, len(args.condition_type))
    return [prompt for prompt in prompts + final_prompts if len(prompt.image) in counts]


def validation_examples(args):
    """An example for each of the different images of validation prompts. Each condition has an image of its own."""
    examples = {}
    for prompt in all_validation_prompts(args):
        examples.setdefault((prompt.image, prompt.mask), prompt)
    return [validation_example(prompt, args) for prompt in examples.values()]


def validation_example(prompt, args):
    """The example whose conditions a prompt is generated with."""
    example = file_example(prompt.image[0])
    for i in range(len(args.condition_type)):
        example.images[f"condition_{i}"] = file_example(value_for(prompt.image, i))
    if prompt.mask:
        example.images["mask"] = file_example(prompt.mask)
    return example


# ---- samples ----


class OminiDataset(Dataset):
    """Samples by (epoch, index): prompt, image and conditions. These are pixels or, if cached, posteriors of latents.

    All that is random in a sample (what is dropped, mask, blur, in this order) depends on (seed, epoch, index) alone:
    neither workers, nor the cache, nor an interruption change it. The order of these draws is what exact resume relies
    on.
    """

    def __init__(self, examples, specs, args):
        self.examples = [example for example in examples if not is_left_out(example, args)]
        self.num_left_out = len(examples) - len(self.examples)  # by --quality_filter
        self.specs = specs
        self.args = args
        self.types = [spec.type for spec in specs]
        self.roles = ["image", *(f"condition_{i}" for i in range(len(specs)))]
        self.moments = {}  # {(index or "black", role): [2C, h, w]} on the disk, with --cache_latents

    def __len__(self):
        return len(self.examples)

    def __getitem__(self, position):
        epoch, index = position
        return self.sample(self.examples[index], epoch, index)

    def checked_sample(self, example, epoch, index):
        """`sample` of an example of a stream, which nothing has checked before. Raises ValueError, or what PIL raises.

        An image is decoded once, where the sample needs it: a damaged condition leaves the example out of the epochs
        that do not drop it.
        """
        problem = check_streamed(example, self.args, self.specs, header_size)
        if problem:
            raise ValueError(problem)
        if example.caption is None:
            example.caption = self.args.instance_prompt
        return self.sample(example, epoch, index)

    def sample(self, example, epoch, index):
        args = self.args
        rng = np.random.default_rng((args.seed, epoch, index))
        drop_text = rng.random() < args.drop_text_prob
        drop_image = rng.random() < args.drop_image_prob
        mask = self.mask(example, rng)
        latent_masks = self.latent_masks(example, mask)
        sample = {"prompt": "" if drop_text else example.caption, "moments": {}, "pixel_values": {}}
        sample["latent_masks"] = latent_masks
        for role in self.roles:
            # with a latent mask, a condition is a part of the image itself, and as OminiControl's never dropped
            is_black = drop_image and role != "image" and role not in latent_masks
            key = ("black" if is_black else index, role)
            if key in self.moments:
                sample["moments"][role] = self.moments[key]
            elif is_black:
                sample["pixel_values"][role] = to_tensor(self.black_image(role))
            elif role == "image":
                sample["pixel_values"][role] = to_tensor(self.target_image(example))
            else:
                sample["pixel_values"][role] = to_tensor(self.condition_image(example, role, rng, mask))
        return sample

    def latent_masks(self, example, mask):
        """{role: boolean [N]}, True for the tokens that enter the transformer; of other roles all do."""
        if self.args.dataset_class:
            return {role: read_mask() for role, read_mask in example.columns["latent_masks"].items()}
        if "token_integration" not in self.types:
            return {}
        inside = torch.from_numpy(to_latent_mask(mask)).flatten()
        condition = self.roles[1 + self.types.index("token_integration")]
        return {"image": inside, condition: ~inside}

    def target_image(self, example):
        """The image that is generated, of --target_size."""
        if self.types == ["depth_pred"]:
            return self.depth_map(example, self.args.target_size)
        return fit(example.image(), self.args.target_size, self.args.image_interpolation_mode)

    def condition_image(self, example, role, rng=None, mask=None):
        """The image of a condition, of its size."""
        spec = self.spec(role)
        if spec.type == "depth":
            return self.depth_map(example.images.get(role, example), spec.size)
        return convert_to_condition(spec.type, self.source_image(example, role), rng=rng, mask=mask)

    def source_image(self, example, role):
        """What the image of a condition is made from, of its size."""
        source = example.images.get(role, example)  # its own image if it comes with the data, or is for validation
        return fit(source.image(), self.spec(role).size, self.args.image_interpolation_mode)

    def depth_map(self, example, size):
        """What `estimate_depth` has written for the image of an example."""
        image = fit(example.image(), self.args.target_size, self.args.image_interpolation_mode)
        depth = open_image(depth_path(image, self.args))
        return depth.convert("RGB").resize(size[::-1])

    def black_image(self, role):
        """What a dropped condition is replaced by."""
        return Image.new("RGB", self.spec(role).size[::-1])

    def mask(self, example, rng):
        """True where the image is to be generated, [H, W] of --target_size; None if no condition has a mask."""
        height, width = self.args.target_size
        is_integrated = "token_integration" in self.types
        if not is_integrated and "fill" not in self.types:
            return None
        if "mask" in example.images:
            mask = fit_mask(example.images["mask"].image(), self.args.target_size)
            return to_pixel_mask(to_latent_mask(mask)) if is_integrated else mask
        if is_integrated:
            return to_pixel_mask(random_mask(rng, height // PATCH, width // PATCH))
        return random_mask(rng, height, width)

    def spec(self, role):
        """The ConditionSpec of a role, condition_0, condition_1, ..."""
        return self.specs[self.roles.index(role) - 1]

    def image_keys(self):
        """The keys in `moments` of all images that are the same in every epoch."""
        fixed = [role for role in self.roles if role == "image" or self.spec(role).type not in RANDOM_CONDITIONS]
        keys = [(index, role) for index in range(len(self.examples)) for role in fixed]
        if self.args.drop_image_prob:
            keys += [("black", role) for role in fixed if role != "image"]
        return keys

    def pixel_values(self, key):
        """The image [3, H, W] in [-1, 1] of a key of `image_keys`."""
        index, role = key
        if index == "black":
            return to_tensor(self.black_image(role))
        if role == "image":
            return to_tensor(self.target_image(self.examples[index]))
        return to_tensor(self.condition_image(self.examples[index], role))


# ---------------------------------------------------------------------------------------------------------------------
# Training
# ---------------------------------------------------------------------------------------------------------------------


# ---- adapters ----


def add_adapters(transformer, specs, args):
    """Adds the LoRA of each adapter of the conditions, with the weights in --lora_path if given."""
    names = adapter_names(specs)
    for name in names:
        add_lora(
            transformer,
            rank=args.rank,
            alpha=args.lora_alpha,
            use_rslora=args.use_rslora,
            init_lora_weights=args.init_lora_weights,
            dropout=args.lora_dropout,
            target_modules=lora_targets(args),
            adapter_name=name,
            **adapter_options(args),
        )
    for name, path in match_lora_paths(args, specs).items():
        start_from_lora(path, {"transformer": transformer}, adapter_name=name, flux=find_family(args).has_clip)


def adapter_files(args):
    """{adapter name: the file of its result}, in output_dir or, with --output_name, beside it."""
    names = list(dict.fromkeys(adapter_name(args, i) for i in range(len(args.condition_type))))
    if not args.output_name:
        return {name: args.output_dir / f"{name}.safetensors" for name in names}
    if len(names) == 1:
        return {names[0]: lora_file(args.output_dir, args.output_name)}
    return {name: lora_file(args.output_dir, f"{args.output_name}-{name}") for name in names}


def read_header(path):
    """What `adapter_metadata` says in the header of an adapter's file; None for a file without. Raises ValueError."""
    try:
        with safe_open(lora_in(path), "pt") as file:
            text = (file.metadata() or {}).get("omini")
    except Exception as error:  # safetensors raises a kind of its own beside OSError
        raise ValueError(f"{path}: not a readable LoRA file ({error})") from None
    return text and json.loads(text)


def match_lora_paths(args, specs):
    """{adapter name: its file of --lora_path}: that of the most similar conditions, by its header."""
    own_specs = {name: [spec for spec in specs if spec.adapter == name] for name in adapter_names(specs)}

    def mismatch(pair):
        name, path = pair
        differences = trained_differently(path, args, own_specs[name])
        return (any(text.startswith("type") for text in differences), len(differences))

    left = list(args.lora_path or [])
    paths = {}
    while left:
        name, path = min(product([name for name in own_specs if name not in paths], left), key=mismatch)
        paths[name] = path
        left.remove(path)
    return paths


def as_typed(name, value):
    """A field of a ConditionSpec, or what a header holds of it, as its flag is typed."""
    if name == "size" and value:
        return size_text(value)
    if name == "position_delta" and value:
        return f"{value[0]:g},{value[1]:g}"
    return value


def trained_differently(path, args, specs):
    """What a file of --lora_path was trained for that differs from an adapter's conditions, in words."""
    header = read_header(path)
    if header is None:
        return ["its header does not say for which condition"]
    differences = []
    for trained, wanted in zip_longest(header["conditions"], [asdict(spec) for spec in specs], fillvalue={}):
        for name in ("type", "size", "position_delta", "position_scale"):
            before = as_typed(name, trained.get(name))
            now = as_typed(name, wanted.get(name))
            if before != now:
                differences.append(f"{name} {before} instead of {now}")
    if header["independent_condition"] != args.independent_condition:
        differences.append(f"independent_condition {header['independent_condition']}")
    return differences


def adapter_metadata(args, specs, adapter):
    """What generation must know of an adapter, for the header of its file."""
    own_specs = [asdict(spec) for spec in specs if spec.adapter == adapter]
    run_info = {
        "base_model": args.pretrained_model_name_or_path,
        "target_size": args.target_size,
        "independent_condition": args.independent_condition,
        "max_sequence_length": args.max_sequence_length,
        "depth_model": args.depth_model,
        "image_interpolation_mode": args.image_interpolation_mode,
        "conditions": own_specs,
        "place": adapter_names(specs).index(adapter),  # among the adapters of the run
    }
    return {"omini": json.dumps(run_info)}


# ---- validation ----


def log_validation(
    accelerator,
    family,
    transformer,
    result_weights,
    vae,
    noise_scheduler,
    prompt_encoder,
    dataset,
    args,
    prompts,
    step,
    weights_of=None,
):
    """Generates images of prompts with the conditions of their images, sends them, each behind its conditions, to
    validation/step-N.png and the trackers, and returns them."""
    scheduler = FlowMatchEulerDiscreteScheduler.from_config(noise_scheduler.config)
    pipeline = family.create_pipeline(transformer, vae, scheduler)
    height, width = args.target_size
    condition_images = {}  # by what they are made from
    masks = {}
    calls = []
    with (
        result_weights(),
        undisturbed(transformer, device=accelerator.device),
        offload_models(vae, device=accelerator.device, offload=args.offload or args.cache_latents),
    ):
        for prompt in prompts:
            example = validation_example(prompt, args)
            key = (prompt.image, prompt.mask)
            if key not in condition_images:
                rng = np.random.default_rng(args.seed)
                masks[key] = dataset.mask(example, rng)
                condition_images[key] = [
                    dataset.condition_image(example, role, rng, masks[key]) for role in dataset.roles[1:]
                ]
            inputs = list(condition_images[key])
            if "token_integration" in dataset.types:
                integrated = dataset.types.index("token_integration")
                inputs[integrated] = dataset.source_image(example, f"condition_{integrated}")
            call = family.pipeline_call(prompt_encoder, prompt.prompt, args, dataset.specs, inputs, masks[key])
            call |= sampling_arguments(prompt)
            if prompt.negative is not None:
                negative_embeds, negative_pooled_embeds = prompt_encoder.encode_prompts([prompt.negative])
                call["negative_prompt_embeds"] = negative_embeds
                call["negative_pooled_prompt_embeds"] = negative_pooled_embeds
            calls.append(call)
        seeds = [args.seed if prompt.seed is None else prompt.seed for prompt in prompts]
        lora_scales = [prompt.lora_scale for prompt in prompts]
        images = generate_images(accelerator, pipeline, calls, seeds=seeds, lora_scales=lora_scales)
    if not images:  # interrupted
        return []
    condition_captions = [f"condition: {spec.type}" for spec in dataset.specs]
    captions = [prompt.described(seed=args.seed) for prompt in prompts]
    title = prompts[0].prompt
    columns = 4
    if len({(prompt.prompt, prompt.image, prompt.mask) for prompt in prompts}) == 1:
        shown = [image.resize((width, height)) for image in condition_images[key]] + images
        captions = condition_captions + captions
    else:  # a row for each prompt
        title = ""
        columns = 1 + len(condition_captions)
        shown = []
        captions_shown = []
        for prompt, image, caption in zip(prompts, images, captions, strict=True):
            shown += [each.resize((width, height)) for each in condition_images[prompt.image, prompt.mask]] + [image]
            captions_shown += [*condition_captions, f"{prompt.prompt} | {caption}"]
        captions = captions_shown
    save_images(accelerator, args, shown, captions, prompt=title, step=step, columns=columns, weights_of=weights_of)
    return images


# ---- the run ----


MODEL_CARD = """
# {name}

A {adapter} (rank {rank}) for {model}: generated images follow {conditions}, by OminiControl.

{image_note} ({width} x {height} pixels are cut out of it){mask_note}. In the
trainer's folder:

```bash
python examples/{command}
```
"""


def held_out_losses(accelerator, family, transformer, vae, prompt_encoder, held_out, args, guidance_embeds):
    """What the metrics get of `held_out`, a dataset: {"validation_loss": mean, "validation_loss_0.1": at this noise
    level, ...}.

    That is the loss of training at the noise and the levels of `fixed_noise`, without --weighting_scheme.
    """
    device = accelerator.device
    num_levels = len(NOISE_LEVELS)
    guidance = None
    if guidance_embeds:
        guidance = torch.full((num_levels,), args.guidance_scale, device=device)

    def losses_of(index):
        generator = fixed_generator(index)
        sample = held_out[0, index]
        latents, *condition_latents = [
            family.sample_latents(sample["moments"][role][None].to(device), vae, generator) for role in held_out.roles
        ]
        latent_masks = []
        for role in held_out.roles:
            mask = sample["latent_masks"].get(role)
            latent_masks.append(None if mask is None else mask.to(device).expand(num_levels, -1))
        latents, noise, t = fixed_noise(latents, index)
        losses = compute_loss(
            transformer,
            latents,
            [each.expand(num_levels, -1, -1, -1) for each in condition_latents],
            latent_masks,
            noise,
            t,
            *prompt_encoder.encode_prompts([sample["prompt"]] * num_levels),
            family=family,
            specs=held_out.specs,
            independent_condition=args.independent_condition,
            guidance=guidance,
            weighting_scheme="none",
        )
        return {"validation_loss": losses}

    return held_out_means(accelerator, transformer, len(held_out), losses_of)


def save_model_card(args, command, held_out=""):
    """Writes README.md into the output folder: what was trained, the command that generates with it, and what
    `held_out` tells of the held-out loss."""
    image_note = "`IMAGE` is the image to make the conditions from"
    if "$CONDITION" in command:
        image_note = "`CONDITION` is a condition as in the training"
    mask_note = ""
    if "$MASK" in command:
        mask_note = ", `MASK` is white where the image is to be generated"
    height, width = args.target_size
    description = MODEL_CARD.format(
        name=args.output_dir.resolve().name,
        adapter=adapter_kind(args),
        rank=args.rank,
        model=args.pretrained_model_name_or_path,
        conditions=", ".join(args.condition_type),
        height=height,
        width=width,
        image_note=image_note,
        mask_note=mask_note,
        command=command,
    )
    if held_out:
        description = f"{description.rstrip()}\n\n{held_out}"
    family = "flux" if find_family(args).has_clip else "flux2"
    tags = ["image-to-image", family, "lora", "ominicontrol", "diffusers"]
    write_model_card(args, description, tags, args.pretrained_model_name_or_path)


def generate_command(args, specs, prompt, image=None, mask='"$MASK"'):
    """The command, below examples/, that generates from `prompt` with the adapters. `image` replaces a variable."""
    files = " ".join(shlex.quote(str(file.resolve())) for file in adapter_files(args).values())
    command = f"omini/generate.py {files} --prompt {shlex.quote(prompt)}"
    if set(args.condition_type) == {"custom"}:
        command += " --condition " + (image or '"$CONDITION"')
    else:
        command += " --image " + (image or '"$IMAGE"')
    if any(condition_type in MASKED_CONDITIONS for condition_type in args.condition_type):
        command += f" --mask {mask}"
    return f"{command} --output image.png"


def check_caches(args, dataset, num_prompts, dtype):
    """Problems of the disk on which encoded images and prompts lie."""
    prompts = prompts_size(args, num_prompts, dtype) if args.cache_prompts and not args.streaming else 0
    sizes = []
    if args.cache_latents:
        sizes = [args.target_size if role == "image" else dataset.spec(role).size for _, role in dataset.image_keys()]
    problems = check_cache_rooms(args, prompts=prompts, latents=moments_size(args, sizes, dtype))
    return [f"{problem}, or give --no-cache_prompts or a smaller --max_sequence_length" for problem in problems]


def describe_run(args, dataset, held_out, num_parts=0):
    """What the header says of this trainer's data, of a stream in `num_parts`, and conditions, {label: text}."""
    amount = f"a stream of {num_parts} files" if num_parts else f"{len(dataset)} samples"
    run_info = {"data": f"{amount} at {size_text(args.target_size)} px"}
    if not args.streaming:
        run_info |= describe_data(
            [*dataset.examples, *held_out.examples], [args.instance_data_dir], "--instance_prompt"
        )
        captions = {example.name: example.caption for example in dataset.examples}
        run_info |= find_family(args).describe_long_prompts(args, captions)
    if dataset.num_left_out:
        run_info["left out"] = f"{dataset.num_left_out} samples of lower quality (--no-quality_filter takes them)"
    for i, spec in enumerate(dataset.specs, start=1):
        label = "condition" if i == 1 else f"condition {i}"
        down, right = spec.position_delta
        run_info[label] = (
            f"{spec.type} of {size_text(spec.size)} px, moved by {down:g},{right:g}, scale {spec.position_scale:g}, "
            f"adapter {spec.adapter}"
        )
    for name, path in match_lora_paths(args, dataset.specs).items():
        own_specs = [spec for spec in dataset.specs if spec.adapter == name]
        differences = trained_differently(path, args, own_specs)
        run_info[f"{name} from"] = f"{path}{', trained with ' if differences else ''}{', '.join(differences)}"
    return run_info


def create_optimizer(args, params_to_optimize, fused=None):
    """The optimizer of --optimizer; `params_to_optimize` are groups, each with its learning rate and weight decay."""
    betas = (args.adam_beta1, args.adam_beta2)
    if args.optimizer == "prodigy":
        return Prodigy(
            params_to_optimize,
            betas=betas,
            beta3=args.prodigy_beta3,
            eps=args.adam_epsilon,
            decouple=args.prodigy_decouple,
            use_bias_correction=args.prodigy_use_bias_correction,
            safeguard_warmup=args.prodigy_safeguard_warmup,
        )
    if args.optimizer == "sgd":
        return torch.optim.SGD(params_to_optimize)
    if args.use_8bit_adam:
        from bitsandbytes.optim import AdamW8bit

        return AdamW8bit(params_to_optimize, betas=betas, eps=args.adam_epsilon)
    return torch.optim.AdamW(params_to_optimize, betas=betas, eps=args.adam_epsilon, fused=fused)


def main(args):
    """Trains. Ctrl-C and other signals save and end it with exit code 128 + their number."""
    with catch_signals(args.output_dir), use_attention(args.attention_backend):
        train(args)


def train(args):
    # 1. Accelerator, logging, seed
    if args.local_rank != -1 and "RANK" in os.environ:  # without a launcher there is one process
        os.environ.setdefault("LOCAL_RANK", str(args.local_rank))
    torch.backends.cuda.matmul.allow_tf32 = args.allow_tf32
    if args.verbose:
        diffusers_logging.set_verbosity_info()
        transformers_logging.set_verbosity_info()
    else:
        diffusers_logging.disable_progress_bar()
        transformers_logging.disable_progress_bar()

    accelerator = Accelerator(
        cpu=not torch.accelerator.is_available(),  # without it, processes started by torchrun on a CPU stay apart
        gradient_accumulation_steps=args.gradient_accumulation_steps,
        mixed_precision=args.mixed_precision,
        log_with=None if args.report_to == "none" else args.report_to,
        project_config=ProjectConfiguration(
            args.output_dir,
            logging_dir=args.output_dir / args.logging_dir,
            save_on_each_node=args.save_on_each_node,
        ),
        step_scheduler_with_optimizer=False,  # the schedule counts updates, whatever the number of processes
        kwargs_handlers=[InitProcessGroupKwargs(timeout=PROCESS_TIMEOUT)],
    )
    device = accelerator.device
    weight_dtype = torch.float32  # of frozen models; what is trained stays in float32
    if accelerator.mixed_precision == "fp16":
        weight_dtype = torch.float16
    elif accelerator.mixed_precision == "bf16":
        weight_dtype = torch.bfloat16
    set_seed(args.seed)

    # 2. Data
    examples, problems = find_examples(args)
    positions = None
    if args.dataset_class and examples:
        positions = examples[0].columns["positions"]
    specs = condition_specs(args, positions)
    dataset = OminiDataset(examples, specs, args)
    held_out, held_out_problems = find_held_out(args, dataset)
    problems += held_out_problems
    examples = dataset.examples
    processes = {"process_index": accelerator.process_index, "num_processes": accelerator.num_processes}
    accumulation = args.gradient_accumulation_steps
    total_batch_size = args.train_batch_size * accumulation * accelerator.num_processes
    if args.streaming:
        steps_per_epoch = None
        max_train_steps = args.max_train_steps
    else:
        groups = [Size(*args.target_size)] * len(dataset)  # one bucket
        sampler = StepSampler(groups, args.train_batch_size, seed=args.seed, **processes)
        steps_per_epoch = math.ceil(sampler.steps_per_epoch / accumulation)
        max_train_steps = args.max_train_steps or args.num_train_epochs * steps_per_epoch
    validation_steps = args.validation_steps or args.validation_epochs * (steps_per_epoch or 1)
    val_prompts, final_prompts, prompt_problems = validation_prompts(args)
    problems += prompt_problems
    captions = [example.caption for example in examples + held_out.examples]
    prompts = {caption for caption in captions if isinstance(caption, str)}  # others are problems
    if args.drop_text_prob:
        prompts.add("")
    prompts.update(texts_of(val_prompts + final_prompts))
    checkpoint, resume_problems = agreed_checkpoint(accelerator, args.output_dir, args.resume_from_checkpoint)
    problems += resume_problems
    models = model_identities(args, ["depth_model"] if needs_depth(args) else [])
    validation_loss_steps = args.validation_loss_steps or args.validation_steps or DEFAULT_STEPS
    run = run_settings(args, accelerator.num_processes, data=data_record(examples), models=models)
    run |= held_out_record(held_out.examples)
    stream = None
    if args.streaming and not problems:
        stream, problems = open_stream(**own_dataset(args))
        sampler = streamed_batches(stream, dataset, args, **processes)
        run["files"] = stream.record()
    begun_with = match_processes(checkpoint, run)
    problems += check_run(accelerator, args, max_train_steps, checkpoint, run)
    if not problems:
        problems += check_caches(args, dataset, len(prompts), weight_dtype)
    problems = gather_problems(problems)
    if problems:
        fail(accelerator, problems)
    sampler.begun_with = begun_with
    hub_repo = create_hub_repo(accelerator, args)
    claim_output_dir(accelerator, args.output_dir, adapter_files(args).values())

    # 3. Prompts, depth maps, VAE and latents: what makes them is freed before the transformer is loaded
    is_cached = args.cache_prompts and not args.streaming
    index = EncodedIndex(latents_folder(args), args, run)
    family = find_family(args)

    def load_text_encoders():
        pipeline = load_text_pipeline(family.text_pipeline_class, args, encoder_dtype(weight_dtype))
        quantize_text_encoders(pipeline, encoder_dtype(weight_dtype), args.quantize_text_encoders)
        return pipeline

    prompt_encoder = PromptEncoder(
        accelerator,
        load_text_encoders,  # if the disk lacks a prompt
        weight_dtype,
        max_sequence_length=args.max_sequence_length,
        folder=encoded_folder(args.output_dir),
        offload=args.offload,
        keep_encoders=not is_cached,
        disk_cache_dir=args.disk_cache_dir.expanduser() if args.cache_text_encoder_outputs_to_disk else None,
        index=EncodedIndex(prompts_folder(args), args, run),
    )
    if is_cached:
        prompt_encoder.cache_prompts(sorted(prompts))
    if needs_depth(args):
        estimate_depth(accelerator, examples + held_out.examples + all_images(validation_examples(args)), args)
    keys = dataset.image_keys() if args.cache_latents else []
    held_out_keys = [(position, role) for position in range(len(held_out)) for role in held_out.roles]

    def read_held_out(key):
        position, role = key
        return held_out[0, position]["pixel_values"][role]

    held_out.moments = index.find(accelerator, "held out", held_out_keys, read_held_out) or {}
    dataset.moments = index.find(accelerator, "latents", keys, dataset.pixel_values) or {}
    draws = (val_prompts or final_prompts) and not args.precompute_only
    is_random = any(spec.type in RANDOM_CONDITIONS for spec in specs)  # such conditions are encoded in every step
    needs_vae = draws or is_random or not dataset.moments or len(held_out.moments) < len(held_out_keys)
    offload_vae = needs_vae and (args.offload or args.cache_latents)
    if needs_vae:
        vae = load_model(family.vae_class, "vae", args, weight_dtype)
        vae.to("cpu" if offload_vae else device)
    else:
        vae = index.load_vae(family.vae_class, "latents", keys)
    with offload_models(vae, device=device, offload=offload_vae):
        if held_out.examples and not held_out.moments:
            held_out.moments = cache_moments(accelerator, vae, held_out_keys, read_held_out, index, "held out")
        if args.cache_latents and not dataset.moments:
            # an item of the user's class is read once for its image and its conditions, which may be cropped alike
            num_threads = 1 if args.dataset_class else None
            dataset.moments = cache_moments(
                accelerator, vae, keys, dataset.pixel_values, index, "latents", num_threads=num_threads
            )
    if args.precompute_only:
        encoded = {f"prompts, {name}": embeddings for name, embeddings in prompt_encoder.cached.items()}
        encoded |= {"latents": dataset.moments, "held out": held_out.moments}
        print_precomputed(accelerator, encoded)
        accelerator.end_training()
        return

    # 4. Transformer and LoRA
    noise_scheduler = load_scheduler(args)
    transformer = family.load_transformer(args, weight_dtype)
    base_size = transformer.num_parameters()
    guidance_embeds = transformer.config.guidance_embeds  # FLUX.1-dev was distilled with guidance, schnell was not
    if args.quantize_base != "none":
        quantize_base(transformer, weight_dtype, args.quantize_base)
    block_by_block = args.fsdp or args.blocks_to_swap  # it may not fit as a whole: `shard` or BlockSwap moves it
    transformer.to("cpu" if block_by_block else device)
    add_adapters(transformer, specs, args)
    if args.gradient_checkpointing:
        transformer.enable_gradient_checkpointing()
    if args.compile:
        compile_blocks(transformer)
    if args.blocks_to_swap:
        block_swap = BlockSwap(transformer, args.blocks_to_swap, device)
    if args.fsdp:
        shard(transformer, device, weight_dtype, hybrid=args.hybrid_shard)
    lora_params = [parameter for parameter in transformer.parameters() if parameter.requires_grad]
    adapted_models = {"transformer": transformer}

    # 5. Optimizer and schedule
    lr_scale = total_batch_size if args.scale_lr else 1
    params_to_optimize = [
        {"params": lora_params, "lr": args.learning_rate * lr_scale, "weight_decay": args.adam_weight_decay}
    ]
    fused = fused_adamw(device, has_scaler=accelerator.scaler is not None)
    optimizer = create_optimizer(args, params_to_optimize, fused)
    if args.blocks_to_swap == "auto":  # what fits is known at the peak of memory of the first step
        optimizer.register_step_post_hook(block_swap.keep_what_fits)
    lr_scheduler = get_scheduler(
        args.lr_scheduler,
        optimizer,
        num_warmup_steps=args.lr_warmup_steps,
        num_training_steps=max_train_steps,
        num_cycles=args.lr_num_cycles,
        power=args.lr_power,
    )

    # 6. Prepare and resume
    lr_scheduler = accelerator.prepare(lr_scheduler)
    if not args.fsdp:  # the transformer is not wrapped in DistributedDataParallel: `average_gradients` is all it needs
        optimizer = accelerator.prepare(optimizer)
    result_weights = nullcontext  # what is validated and saved
    averages = {}
    if args.use_ema:
        # sharded tensors have no _foreach_copy_
        ema = EMAModel(lora_params, decay=args.ema_decay, foreach=not args.fsdp)
        averages = {str(i): tensor for i, tensor in enumerate(ema.shadow_params)}
        result_weights = functools.partial(averaged_weights, ema, lora_params, transformer)
    save_dtype = torch.float32 if args.upcast_before_saving else weight_dtype
    files = adapter_files(args)

    def header(adapter_name, step=None):
        height, width = args.target_size
        described = lora_header(
            args,
            architecture=family.architecture(transformer.config),
            resolution=(width, height),
            step=step or global_step,
            steps_per_epoch=steps_per_epoch,
        )
        return described | adapter_metadata(args, specs, adapter_name)

    files_in_checkpoints = {name: f"{name}.safetensors" for name in files}
    register_lora_checkpointing(
        accelerator,
        adapted_models,
        optimizer,
        files_in_checkpoints,
        dtype=save_dtype,
        header=header,
        result_weights=result_weights,
        teacher=averages,
    )
    best = BestStep(
        transformer,
        lora_params,
        keeps_weights=args.load_best_model_at_end,
        patience=args.early_stopping_patience,
        result_weights=result_weights,
    )
    if held_out.examples:
        best.register_checkpointing(accelerator)
    global_step = load_checkpoint(accelerator, checkpoint, lr_scheduler)
    if args.use_ema:
        ema.optimization_step = global_step

    places = {}  # of a stream's lanes, behind the last micro-step
    if args.streaming and checkpoint:
        places = checkpoint_state(checkpoint).get("stream", {})

    def save():
        state = run | ({"stream": gather_places(places)} if args.streaming else {})
        return save_checkpoint(accelerator, args.output_dir, global_step, state, args.checkpoints_total_limit)

    sampler.start = global_step * accumulation
    sampler.stop = sampler.start if best.is_over else max_train_steps * accumulation
    if args.streaming:
        sampler.places = places
        # one process reads the stream, whose threads decode: each row is read once, in the same order
        train_dataloader = DataLoader(
            sampler,
            batch_size=None,
            num_workers=min(1, args.dataloader_num_workers),
            pin_memory=device.type == "cuda",
            worker_init_fn=outlive_signals,
        )
    else:
        train_dataloader = DataLoader(
            dataset,
            batch_sampler=sampler,
            num_workers=args.dataloader_num_workers,
            pin_memory=device.type == "cuda",
            worker_init_fn=outlive_signals,
        )

    # 7. Train
    run_info = describe_run(args, dataset, held_out, num_parts=stream.num_parts if stream else 0)
    if args.use_ema:
        run_info["average"] = f"decay {args.ema_decay:g}, of what is saved and drawn"
    if not args.streaming:
        run_info |= describe_small_groups(sampler.groups, args.train_batch_size)
    run_info |= describe_held_out(held_out.examples, examples, validation_loss_steps)
    print_header(accelerator, args, run_info, lora_params, base_size, max_train_steps, steps_per_epoch)
    keep_earlier_results(
        accelerator, args.output_dir, files.values(), first_step=global_step, max_train_steps=max_train_steps
    )
    start_logging(accelerator, args, "omini", global_step)
    metrics = None
    if accelerator.is_main_process:
        metrics = Metrics(args.output_dir / "metrics.jsonl", global_step)
    validate = functools.partial(
        held_out_losses, accelerator, family, transformer, vae, prompt_encoder, held_out, args, guidance_embeds
    )
    if val_prompts and global_step == 0:
        log_validation(
            accelerator,
            family,
            transformer,
            result_weights,
            vae,
            noise_scheduler,
            prompt_encoder,
            dataset,
            args,
            val_prompts,
            0,
        )
    transformer.train()
    progress_bar = tqdm(
        total=max_train_steps,
        initial=global_step,
        desc="Training",
        unit="step",
        disable=not accelerator.is_main_process,
    )
    interruption.start_saving()
    loss_sum = 0.0  # of the micro-steps since the last update
    step_reads = StepReads(device)
    taken_steps = []  # of each step: whether loss and gradient were finite, so that it changed weights
    skipped = SkippedSamples(args.output_dir, global_step, is_first=writes_files(accelerator))
    accelerator.wait_for_everyone()
    started = time.perf_counter()
    # No loop over epochs: a run can resume at any micro-step. All that a micro-step draws at random (batch, masks,
    # latents, noise, noise levels, dropout) depends on the seed and its number alone; the order of these draws is what
    # exact resume relies on.
    for micro_step, batch in enumerate(read_batches(train_dataloader, accelerator, save), start=sampler.start):
        with accelerator.accumulate(transformer):
            step, accumulated = divmod(micro_step, accumulation)
            # a run that goes on with more or fewer processes draws what those it began with would
            drawn_as = place_in_run(accumulated, accelerator.process_index, accelerator.num_processes, begun_with)
            generator = step_generator(args.seed, step, *drawn_as)
            torch.manual_seed(generator.initial_seed())  # dropout uses the global generator
            if args.streaming:
                places = batch["stream"]  # for a checkpoint: where to read on
                for text in skipped.add(step + 1, batch["left_out"]):
                    progress_bar.write(f"  skipped: {text}")

            moments = to_device(batch["moments"], device)
            if batch["pixel_values"]:
                with offload_models(vae, device=device, offload=offload_vae):
                    for role, pixel_values in batch["pixel_values"].items():
                        moments[role] = encode_moments(vae, pixel_values)
            latents, *condition_latents = [
                family.sample_latents(moments[role], vae, generator) for role in dataset.roles
            ]
            latent_masks = [batch["latent_masks"].get(role) for role in dataset.roles]  # on the CPU: they give lengths
            prompt_embeds, pooled_prompt_embeds = prompt_encoder.encode_prompts(batch["prompt"])
            guidance = None
            if guidance_embeds:
                guidance = torch.full((len(latents),), args.guidance_scale, device=device)
            noise, t = sample_noise(latents, args=args, noise_scheduler=noise_scheduler, generator=generator)
            with accelerator.autocast():
                losses = compute_loss(
                    transformer,
                    latents,
                    condition_latents,
                    latent_masks,
                    noise,
                    t,
                    prompt_embeds,
                    pooled_prompt_embeds,
                    family=family,
                    specs=specs,
                    independent_condition=args.independent_condition,
                    guidance=guidance,
                    weighting_scheme=args.weighting_scheme,
                )
                loss = losses.mean()
            accelerator.backward(loss)
            loss_sum = loss_sum + loss.detach() / accumulation
            if not accelerator.sync_gradients:
                continue

            if not args.fsdp:
                average_gradients(accelerator, lora_params)
            grad_norm = accelerator.clip_grad_norm_(lora_params, args.max_grad_norm or math.inf)
            grad_norm = to_device(full_tensor(grad_norm), device)  # without a gradient it is a 0 on the CPU
            # one message between the processes carries the loss and whether any of them got a signal
            stop_flag = torch.full((), float(interruption.is_requested()), device=device)
            reduced = accelerator.reduce(torch.stack([loss_sum, stop_flag]), reduction="mean")
            mean_loss, mean_stop = reduced
            is_finite = mean_loss.isfinite()
            if accelerator.scaler is None:  # a gradient scaler (fp16) skips infinite gradients itself
                is_finite = is_finite & grad_norm.isfinite()
            step_if_finite(accelerator, optimizer, is_finite)
            optimizer.zero_grad()
            if args.use_ema:
                ema.step(lora_params)

        global_step += 1
        done = global_step == max_train_steps
        numbers = {
            "loss": mean_loss,
            "grad_norm": grad_norm,
            "stop_requested": mean_stop,
            "taken": is_finite & (not accelerator.optimizer_step_was_skipped),
        }
        step_reads.put(global_step, numbers, step_logs(optimizer, total_batch_size, started, device))
        lr_scheduler.step()  # after the step's rate was logged
        validates = held_out.examples and (global_step % validation_loss_steps == 0 or global_step == 1 or done)
        saves = global_step % args.checkpointing_steps == 0
        draws = val_prompts and global_step % validation_steps == 0
        stop_requested = False
        for logged_step, logs in step_reads.read(wait=done or validates or saves or draws or stops_alone(accelerator)):
            taken_steps.append(bool(logs.pop("taken")))
            if logs.pop("stop_requested"):
                stop_requested = True
                step_reads.num_waiting = 0  # all is logged before it is saved
            if validates and logged_step == global_step:
                with result_weights():
                    logs |= validate()
                    best.update(global_step, logs["validation_loss"])
                done = done or best.is_over
            log_step(accelerator, progress_bar, metrics, logged_step, logs)
            check_steps(taken_steps, logged_step, done=done and logged_step == global_step)
        if saves:
            save()
        if draws and not (done or stop_requested):
            log_validation(
                accelerator,
                family,
                transformer,
                result_weights,
                vae,
                noise_scheduler,
                prompt_encoder,
                dataset,
                args,
                val_prompts,
                global_step,
            )
            stop_requested = stop_agreed(accelerator)
        if stop_requested and not done:
            checkpoint = save()
            transformer = None  # see the end of `train`
            stop_interrupted(accelerator, global_step, checkpoint)
        loss_sum = 0.0
        started = time.perf_counter()
        if best.is_over:
            break
    progress_bar.close()
    skipped_summary = skipped.summary()
    if skipped_summary:
        accelerator.print(skipped_summary)

    # 8. Save and final validation, with the weights of the best step if --load_best_model_at_end keeps them
    with best.weights():
        for name, file in files.items():
            save_lora(
                file.parent,
                adapted_models,
                save_dtype,
                adapter_name=name,
                weight_name=file.name,
                header=header(name, best.result_step),
                writes=writes_files(accelerator),
            )
    if accelerator.is_main_process:
        metrics.close()
        plot_metrics(args.output_dir)
    images = []
    if final_prompts:
        images = log_validation(
            accelerator,
            family,
            transformer,
            best.weights,
            vae,
            noise_scheduler,
            prompt_encoder,
            dataset,
            args,
            final_prompts,
            global_step,
            weights_of=best.result_step,
        )
    if stop_agreed(accelerator):
        checkpoint = save()
        transformer = None
        stop_interrupted(accelerator, global_step, checkpoint)
    interruption.stop_saving()
    if images:
        add_thumbnail(accelerator, files.values(), images[-1])
    example_prompt = final_prompts[0].prompt if final_prompts else examples[0].caption
    if accelerator.is_main_process:
        save_model_card(args, generate_command(args, specs, example_prompt), held_out=best.summary())
    remove_encoded(accelerator, args.output_dir)
    transformer = None  # what FSDP holds must be freed before the process group: gloo can hang otherwise
    accelerator.free_memory()
    accelerator.end_training()
    results = {f"{name} LoRA": file.absolute() for name, file in files.items()}
    results |= {"usage": "README.md", "loss": "loss.png", "images": "validation"}
    images = " ".join(shlex.quote(str(path)) for path in args.validation_image or ["IMAGE"])
    command = generate_command(args, specs, example_prompt, image=images, mask="MASK")
    files_beside = list(files.values()) if args.output_name else []
    check_taken(taken_steps, args.output_dir, has_scaler=accelerator.scaler is not None)
    if held_out.examples:
        accelerator.print(best.summary())
    finish(accelerator, args, global_step, results, command, hub_repo, ["depth/**"], files_beside)


if __name__ == "__main__":
    main(parse_args())
