"""Trains a LoRA (arXiv 2106.09685) that edits images with FLUX.1-Fill, the inpainting model, FLUX.1-Kontext or FLUX.2.

The transformer reads the noisy latents of the result together with the latents of an input image and a mask, and
predicts the velocity. It is frozen; the LoRA in its layers is trained by flow matching:

    x_σ = (1 - σ) x_0 + σ ε        loss = || transformer([x_σ, input, mask], σ, prompt) - (ε - x_0) ||²

    --mode mask   x_0 is an image. Its black-masked part is the input, its white-masked part is to be generated.
    --mode edit   x_0 is the target image. All of another image is the input, and the mask is white: all of the target
                  is to be generated.

FLUX.1-Kontext and FLUX.2 have no mask. In edit mode they read the tokens of input images, called references, behind
the noisy ones; FLUX.2 takes several.

On one GPU, or on all of them after `accelerate config`:

    accelerate launch train_influxedit.py \\
      --pretrained_model_name_or_path=black-forest-labs/FLUX.1-Fill-dev --mode=edit \\
      --instance_data_dir=train_A --target_data_dir=train_B --caption_data_dir=prompts \\
      --mixed_precision=bf16 --gradient_checkpointing --cache_latents --resolution=512 --train_batch_size=1 \\
      --rank=64 --lora_alpha=64 --guidance_scale=1 --learning_rate=1e-4 --max_train_steps=5000 \\
      --validation_prompt="violet circle with orange background" --validation_image=outline.png --output_dir=circles

output_dir then holds pytorch_lora_weights.safetensors for `FluxFillPipeline.load_lora_weights`, a model card
(README.md), args.json, metrics.jsonl and loss.png, validation images and checkpoints.

| FluxFillPipeline     | InFluxEdit's code               | here                          |
| -------------------- | ------------------------------- | ----------------------------- |
| latents              | noisy_model_input               | noisy_latents                 |
| masked_image         | masked_images                   | EditDataset.pixel_values      |
| mask_image           | masks, --use_split_mask         | EditDataset.mask, split_mask  |
| masked_image_latents | masked_image_latents            | input_latents                 |
| prepare_mask_latents | masked_image_latents with mask  | pack_fill_condition           |
| the pipeline         | FluxFillEditPipeline            | FillPipeline                  |
|                      | target = noise - model_input    | target in compute_loss        |
|                      | loss, prior_loss                | instance_loss, prior_loss     |
"""

import argparse
import copy
import functools
import hashlib
import math
import os
import secrets
import shlex
import time
from collections import Counter
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

from common.arguments import (
    INITIALIZATIONS,
    LR_SCHEDULERS,
    TRACKERS,
    Parser,
    Switch,
    block_count,
    comma_list,
    decay_rate,
    expanded_path,
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
    Size,
    SkippedSamples,
    StepSampler,
    StreamedBatches,
    all_images,
    check_captions,
    check_class_images,
    check_dataset_flags,
    check_folders,
    check_num_samples,
    check_roles,
    check_shape,
    collate,
    count_sizes,
    data_record,
    dataset_settings,
    describe_class_images,
    describe_data,
    describe_small_groups,
    file_example,
    find_partners,
    first_ten,
    fit,
    fit_mask,
    gather_places,
    header_size,
    image_files,
    map_examples,
    open_stream,
    place_in_run,
    read_batches,
    read_class_images,
    read_dataset,
    read_folder,
    read_prompts,
    read_sizes,
    read_stream_start,
    resolve_num_workers,
    shortened,
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
    NOISE_LEVELS,
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
    EncodedIndex,
    cache_moments,
    check_cache_rooms,
    check_disk_cache,
    encode_moments,
    encoded_folder,
    flux2_latents,
    image_ids,
    latents_folder,
    mean_latents,
    moments_size,
    pack_latents,
    print_precomputed,
    prompts_folder,
    remove_encoded,
    sample_latents,
    to_tensor,
)
from common.lora import (
    FLUX_TARGET_MODULES,
    adapter_config,
    adapter_kind,
    adapter_options,
    adapter_size,
    add_lora,
    average_gradients,
    averaged_weights,
    block_layers,
    check_adapter,
    check_lora_file,
    layer_shapes,
    lora_file,
    register_lora_checkpointing,
    save_lora,
    start_from_lora,
    target_layers,
    unknown_layers,
    without_adapters,
)
from common.lora_formats import LoraLayer
from common.models import (
    ATTENTION_BACKENDS,
    PROCESS_TIMEOUT,
    QUANTIZATIONS,
    check_attention,
    check_launcher,
    check_weights,
    compile_blocks,
    full_tensor,
    gather_objects,
    gather_problems,
    latent_channels,
    load_model,
    load_scheduler,
    model_identities,
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
from common.placement import place
from common.text_encoders import (
    CLIP_TARGET_MODULES,
    TEXT_QUANTIZATIONS,
    PromptEncoder,
    clip_lora_shapes,
    describe_long_prompts,
    encoder_dtype,
    flux2_chat,
    flux2_klein_chat,
    load_flux2_text_pipeline,
    load_text_pipeline,
    load_tokenizer,
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
    ValidationPrompt,
    generate_class_images,
    generate_images,
    image_grid,
    read_validation_prompts,
    sampling_arguments,
    save_images,
    step_title,
    texts_of,
    undisturbed,
    with_defaults,
)

import numpy as np
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from accelerate.utils import InitProcessGroupKwargs, ProjectConfiguration, broadcast_object_list, set_seed
from diffusers import (
    AutoencoderKL,
    AutoencoderKLFlux2,
    DiffusionPipeline,
    FlowMatchEulerDiscreteScheduler,
    Flux2KleinPipeline,
    Flux2Pipeline,
    Flux2Transformer2DModel,
    FluxFillPipeline,
    FluxKontextPipeline,
    FluxPipeline,
    FluxTransformer2DModel,
)
from diffusers.optimization import get_scheduler
from diffusers.pipelines.flux2.image_processor import Flux2ImageProcessor
from diffusers.training_utils import EMAModel, compute_loss_weighting_for_sd3, free_memory, offload_models
from diffusers.utils import logging as diffusers_logging
from PIL import Image, ImageOps
from torch.utils._pytree import tree_map
from torch.utils.data import DataLoader, Dataset
from tqdm.auto import tqdm
from transformers.utils import logging as transformers_logging


# ---------------------------------------------------------------------------------------------------------------------
# Arguments
# ---------------------------------------------------------------------------------------------------------------------


DESCRIPTION = "Trains a LoRA that edits images with FLUX.1-Fill, the inpainting model, FLUX.1-Kontext or FLUX.2."

EXAMPLE = """example:
    accelerate launch train_influxedit.py @examples/influxedit/low_memory.args --mode=edit \\
      --instance_data_dir=train_A --target_data_dir=train_B --caption_data_dir=prompts --output_dir=circles"""

image_edge = in_range(int, 16, 8192)


def resolutions(text):
    """An argparse type: one or more lengths in pixels, separated by commas, as a tuple."""
    return tuple(image_edge(part) for part in text.split(","))


def create_parser():
    parser = Parser(description=DESCRIPTION, epilog=EXAMPLE)

    arg = parser.add_argument_group("model", "what is trained, and in which precision").add_argument
    arg(
        "--pretrained_model_name_or_path",
        type=name_or_path,
        required=True,
        metavar="MODEL",
        help="folder or Hub id of a FLUX.1-Fill, FLUX.1-Kontext or FLUX.2 pipeline",
    )
    arg("--revision", help="revision of the model on the Hub")
    arg("--variant", help="variant of the model's files, such as fp16")
    arg("--cache_dir", type=name_or_path, help="folder for downloaded models and datasets")
    arg(
        "--max_sequence_length",
        type=in_range(int, 1, 512),
        default=512,
        help="tokens per prompt; longer prompts are cut",
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

    arg = parser.add_argument_group("data", "folders with files of equal names, or a dataset").add_argument
    arg("--instance_data_dir", type=Path, help="folder of input images; captions in .txt files or metadata.jsonl")
    arg("--target_data_dir", type=Path, help="folder of target images for edit mode, named like the input images")
    arg(
        "--additional_data_dir",
        type=Path,
        nargs="+",
        metavar="FOLDER",
        help="folders of further input images for FLUX.2, in order, named alike; not every image needs one",
    )
    arg("--mask_data_dir", type=Path, help="folder of masks for mask mode, named alike; white parts are generated")
    arg("--caption_data_dir", type=Path, help="folder of captions: .txt files, named like the input images")
    arg("--dataset_name", type=name_or_path, help="dataset on the Hub, or a folder or file that `datasets` loads")
    arg("--dataset_config_name", help="configuration of that dataset")
    arg(
        "--data_files",
        type=name_or_path,
        nargs="+",
        metavar="FILE",
        help="webdataset tars (images, captions in json or txt) or parquet files, or patterns such as 'tars/*.tar'",
    )
    arg("--streaming", action="store_true", help="read dataset_name or data_files during training; needs no disk")
    arg("--shuffle_buffer", type=positive_int, default=1000, help="rows that streaming holds and shuffles at a time")
    arg("--image_column", default="image", help="column of the dataset with the input images")
    arg("--target_column", help="column of the dataset with the target images, for edit mode")
    arg(
        "--additional_column",
        nargs="+",
        metavar="COLUMN",
        help="columns of the dataset with further input images, for FLUX.2",
    )
    arg("--mask_column", help="column of the dataset with the masks, for mask mode")
    arg("--caption_column", help="column of the dataset or of metadata.jsonl that holds captions")
    arg("--instance_prompt", help="prompt of every image without a caption, such as a photo of sks dog")
    arg("--caption_dropout", type=fraction, default=0.0, help="probability of training on an empty caption, 0 to 1")
    arg(
        "--repeats",
        type=in_range(int, 1, 10_000),
        default=1,
        help="times each image is used per epoch, each with its own crop",
    )
    arg(
        "--resolution",
        "--size",
        type=resolutions,
        default="512",
        help="long edge in pixels; of several, such as 512,768,1024, each batch uses one at random; both sides are "
        "rounded to multiples of 16",
    )
    arg("--center_crop", action=Switch, default=False, help="crop the center instead of a random part")
    arg("--random_flip", action="store_true", help="mirror half of the samples; not for faces, text or logos")
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

    arg = parser.add_argument_group("prior preservation", "keeps what the model knows of a class").add_argument
    arg("--with_prior_preservation", action="store_true", help="also train on images of the class, see --class_prompt")
    arg("--class_data_dir", type=Path, help="folder of class images; missing ones are generated before training")
    arg(
        "--class_prompt",
        metavar="PROMPTS",
        help="prompt of the class images, such as a photo of a dog; or a .txt file with a prompt per line; or "
        "'sks dog=>dog,cat': all captions, with these words in place of the subject's",
    )
    arg("--num_class_images", type=positive_int, default=100, help="number of class images to use")
    arg("--prior_loss_weight", type=non_negative_float, default=1.0, help="weight of the class images' loss")
    arg("--sample_batch_size", type=positive_int, default=4, help="class images generated at a time")
    arg(
        "--prior_generation_precision",
        choices=("no", "fp32", "fp16", "bf16"),
        help="precision for generating class images (default: --mixed_precision)",
    )

    arg = parser.add_argument_group("output preservation", "keeps other prompts as they are").add_argument
    arg(
        "--preserve_outputs",
        type=non_negative_float,
        metavar="WEIGHT",
        help="weight of a loss that keeps what is predicted for --preserve_prompts as it is without the adapter, such "
        "as 1 (default: none)",
    )
    arg(
        "--preserve_prompts",
        metavar="PROMPTS",
        help="a .txt file with a prompt per line, or 'sks dog=>dog,cat': the caption with one of these words in place "
        "of the subject's",
    )
    arg("--preserve_every", type=positive_int, default=1, metavar="N", help="steps from one such loss to the next")

    arg = parser.add_argument_group("edit", "what the model sees, and what it generates").add_argument
    arg(
        "--mode",
        choices=("mask", "edit"),
        default="mask",
        help="fill a mask, or edit the whole image; edit alone without FLUX.1-Fill",
    )
    arg("--use_split_mask", action="store_true", help="mask the left or the right half at random: side-by-side images")
    arg("--mask_only_right", action="store_true", help="with --use_split_mask, always mask the right half")
    arg("--loss_mask_weight", type=non_negative_float, default=1.0, help="loss weight under the mask; elsewhere 1")
    arg("--train_embedder", action="store_true", help="also train all of x_embedder, the input layer; edit mode only")
    arg("--train_text_encoder", action="store_true", help="also train a LoRA on CLIP")

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
    arg("--lora_path", type=Path, metavar="FILE", help="a LoRA, or a run's folder, to continue from at its strength")
    arg("--lora_dropout", type=in_range(float, 0, 0.99), default=0.0, help="dropout probability of the LoRA's inputs")
    arg("--use_dora", action="store_true", help="train a DoRA: also the norm of each row of a weight; slower steps")
    arg("--lora_type", choices=("lora", "lokr"), default="lora", help="lokr: a Kronecker product (LyCORIS' LoKr)")
    arg("--lokr_factor", type=positive_int, help="size of a LoKr's first factor (default: near the square root)")
    arg(
        "--lora_layers",
        "--lora_blocks",
        help="names of layers to adapt, such as attn.to_k,ff.net.2 (default: attention and feed-forward layers)",
    )

    arg = parser.add_argument_group("noise", "which noise levels are trained, and their weights").add_argument
    arg("--guidance_scale", type=non_negative_float, default=3.5, help="value passed to the guidance embedding")
    arg(
        "--timestep_sampling",
        choices=TIMESTEP_SAMPLING,
        default="sigma",
        help="distribution of noise levels; sigma: as --weighting_scheme says",
    )
    arg(
        "--weighting_scheme",
        choices=WEIGHTING_SCHEMES,
        default="none",
        help="density of noise levels, or loss weight",
    )
    arg("--logit_mean", type=in_range(float, -100, 100), default=0.0, help="mean of logit_normal; below 0: more noise")
    arg("--logit_std", type=positive_float, default=1.0, help="standard deviation of logit_normal")
    arg("--mode_scale", type=in_range(float, -1, 1.75), default=1.29, help="scale of mode; 0: uniform")
    arg("--sigmoid_scale", type=positive_float, default=1.0, help="spread of sigmoid, shift and flux_shift")
    arg("--discrete_flow_shift", type=positive_float, default=3.0, help="s of shift; above 1: more noise")

    arg = parser.add_argument_group("optimizer", "how the LoRA is updated").add_argument
    arg(
        "--optimizer",
        type=str.lower,
        choices=("adamw", "prodigy"),
        default="AdamW",
        help="prodigy finds the learning rate itself: set --learning_rate 1",
    )
    arg(
        "--learning_rate", type=positive_float, default=1e-4, help="learning rate; 1 for prodigy, about 1e-4 for adamw"
    )
    arg("--text_encoder_lr", type=positive_float, default=5e-6, help="learning rate of CLIP's LoRA; unused by prodigy")
    arg("--scale_lr", action="store_true", help="multiply learning rates by the total batch size")
    arg("--lr_scheduler", choices=LR_SCHEDULERS, default="constant", help="learning rate schedule")
    arg("--lr_warmup_steps", type=in_range(int, 0), default=500, help="linear warmup steps; constant has none")
    arg("--lr_num_cycles", type=positive_int, default=1, help="cycles of cosine_with_restarts")
    arg("--lr_power", type=positive_float, default=1.0, help="power of polynomial; 1: linear")
    arg("--use_8bit_adam", action="store_true", help="AdamW with 8-bit states (bitsandbytes), to save memory")
    arg("--adam_beta1", type=decay_rate, default=0.9, help="decay of the gradient's running mean, also in Prodigy")
    arg("--adam_beta2", type=decay_rate, default=0.999, help="decay of the squared gradient's mean, also in Prodigy")
    arg("--adam_weight_decay", type=non_negative_float, default=1e-4, help="weight decay, also in Prodigy")
    arg("--adam_weight_decay_text_encoder", type=non_negative_float, default=1e-3, help="weight decay of CLIP's LoRA")
    arg("--adam_epsilon", type=positive_float, default=1e-8, help="added to the denominator, also in Prodigy")
    arg("--prodigy_beta3", type=decay_rate, help="decay of Prodigy's estimate (default: square root of adam_beta2)")
    arg("--prodigy_decouple", action=Switch, default=True, help="decoupled weight decay, as in AdamW")
    arg("--prodigy_use_bias_correction", action=Switch, default=True, help="Adam's bias correction in Prodigy")
    arg("--prodigy_safeguard_warmup", action=Switch, default=True, help="keep warmup out of Prodigy's estimate")
    arg("--max_grad_norm", type=in_range(float, 0), default=1.0, help="clip gradients to this norm; 0: do not")
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

    arg = parser.add_argument_group("schedule and checkpoints", "how long to train, and how to resume").add_argument
    arg(
        "--seed",
        type=seed_number,
        help="random seed for data order, crops, noise, adapter init and validation (default: a random one)",
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

    arg = parser.add_argument_group("validation", "images generated while training, without effect on it").add_argument
    arg(
        "--validation_prompt",
        help="validation prompts, separated by ; (or by , if that makes one for each of several images)",
    )
    arg(
        "--validation_prompts",
        "--sample_prompts",
        type=Path,
        metavar="FILE",
        help="file of such prompts instead, an image each; a line is such as 'a dog --w 512 --d 1 --cn input.png'",
    )
    arg("--validation_image", help="input images for them, separated by ; or , (default: the first of the data)")
    arg("--validation_mask", help="masks for them, separated by ; or ,; split masks need none")
    arg("--num_validation_images", type=positive_int, default=1, help="images per prompt")
    arg("--validation_steps", type=positive_int, default=50, help="steps between validations")
    arg("--validation_width", type=image_edge, default=1024, help="width of validation images in pixels")
    arg("--validation_height", type=image_edge, default=1024, help="height of validation images in pixels")
    arg(
        "--validation_data_dir",
        type=Path,
        help="folder of images that are not trained, with a folder in it for each of the data's folders, of the same "
        "name; their loss is computed at fixed noise",
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
        help="steps between computations of the held-out loss (default: --validation_steps)",
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
        help="guidance in them (default: guidance_scale; FLUX.2-klein: the pipeline's)",
    )

    arg = parser.add_argument_group("output and logging", "where results and logs go").add_argument
    arg(
        "--output_dir",
        type=Path,
        default=Path("flux-dreambooth-lora"),
        help="folder for all results, named as by InFluxEdit's script",
    )
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
    problems = check_args(args) + check_attention(args) + check_weights(args) + check_model(args)
    problems += check_disk_cache(args) + check_output_dir(args)
    if args.precompute_only and args.seed is None:
        problems.append("--precompute_only needs --seed: without it the training would crop by another one")
    lora = lora_file(args.output_dir, args.output_name)
    parser.refuse(problems + check_results(args, [lora], [args.lora_path] if args.lora_path else []))
    parser.remark(idle_flags(args, shared_needs(args), needs(args)))
    return args


def needs(args):
    """{what: (whether this run has it, the flags that are read with it alone)}, see `idle_flags`."""
    family = find_family(args)
    return noise_needs(args) | {
        "--with_prior_preservation": (
            args.with_prior_preservation,
            ("num_class_images", "sample_batch_size", "prior_generation_precision", "prior_loss_weight"),
        ),
        "--train_text_encoder": (args.train_text_encoder, ("text_encoder_lr", "adam_weight_decay_text_encoder")),
        "--validation_prompt": (args.validation_prompt, ("num_validation_images",)),
        "--validation_prompt or --validation_prompts": (
            args.validation_prompt or args.validation_prompts,
            (
                "validation_width",
                "validation_height",
                "validation_guidance_scale",
                "validation_num_inference_steps",
            ),
        ),
        "--validation_prompt, --validation_prompts, or held-out data without --validation_loss_steps": (
            args.validation_prompt
            or args.validation_prompts
            or ((args.validation_data_dir or args.validation_split) and not args.validation_loss_steps),
            ("validation_steps",),
        ),
        "--use_ema": (args.use_ema, ("ema_decay",)),
        "--streaming": (args.streaming, ("shuffle_buffer",)),
        "--dataset_name or --data_files": (args.dataset_name or args.data_files, ("image_column",)),
        "a model with a guidance embedding": (family.reads_guidance, ("guidance_scale",)),
        "a model that draws with guidance": (family.draws_with_guidance, ("validation_guidance_scale",)),
    }


def check_args(args):
    """Problems of the flags: those that contradict each other, and those that would have no effect."""
    problems = []

    # where images, their targets or masks, and their captions are
    sources = (args.instance_data_dir, args.dataset_name, args.data_files)
    if sum(source is not None for source in sources) != 1:
        problems.append("exactly one of --instance_data_dir, --dataset_name and --data_files is needed")
    problems += check_dataset_flags(args)
    has_columns = args.dataset_name or args.data_files
    given = "--dataset_name" if args.dataset_name else "--data_files"
    for flag in ("target_data_dir", "additional_data_dir", "mask_data_dir", "caption_data_dir"):
        if vars(args)[flag] and has_columns:
            problems.append(f"--{flag} goes with --instance_data_dir, not with {given}")
    for flag in ("target_column", "mask_column"):
        if vars(args)[flag] and not has_columns:
            problems.append(f"--{flag} {vars(args)[flag]} needs --dataset_name or --data_files")
    if args.additional_column and not has_columns:
        problems.append(f"--additional_column {' '.join(args.additional_column)} needs --dataset_name or --data_files")
    if args.streaming and args.repeats != 1:
        problems.append(f"--repeats {args.repeats} has no effect with --streaming: leave one out")
    for flag in ("class_prompt", "preserve_prompts"):
        if args.streaming and "=>" in (vars(args)[flag] or ""):
            problems.append(f"--{flag} {vars(args)[flag]!r} reads all captions before training: leave out --streaming")
    folders = {
        "--instance_data_dir": args.instance_data_dir,
        "--target_data_dir": args.target_data_dir,
        "--mask_data_dir": args.mask_data_dir,
    }
    for number, folder in enumerate(args.additional_data_dir or [], start=1):
        folders[f"folder {number} of --additional_data_dir"] = folder
    problems += check_roles(folders)
    if has_columns:
        columns = {
            "--image_column": args.image_column,
            "--target_column": args.target_column,
            "--mask_column": args.mask_column,
        }
        for number, column in enumerate(args.additional_column or [], start=1):
            columns[f"column {number} of --additional_column"] = column
        problems += check_roles(columns)
    if args.caption_data_dir and args.caption_column:
        problems.append("--caption_data_dir and --caption_column exclude each other: choose one")

    # the modes
    if args.mode == "edit":
        if not (args.target_data_dir or args.target_column):
            problems.append("--mode edit needs --target_data_dir, or --target_column of a dataset")
        for flag in ("mask_data_dir", "mask_column", "use_split_mask", "validation_mask"):
            if vars(args)[flag]:
                problems.append(f"--{flag} needs --mode mask")
        if args.loss_mask_weight != 1:
            problems.append(
                f"--loss_mask_weight {args.loss_mask_weight:g} needs --mode mask: in edit mode everything is masked"
            )
        if args.train_embedder and "x_embedder" in comma_list(args.lora_layers):
            problems.append("--lora_layers x_embedder: --train_embedder trains all of this layer, leave one out")
    else:
        has_masks = bool(args.mask_data_dir or args.mask_column)
        if has_masks == args.use_split_mask:
            problems.append(
                "--mode mask needs one of --mask_data_dir (or --mask_column of a dataset) and --use_split_mask"
            )
        for flag in ("target_data_dir", "target_column", "additional_data_dir", "additional_column", "train_embedder"):
            if vars(args)[flag]:
                problems.append(f"--{flag} needs --mode edit")
    if args.train_embedder and args.lora_path:
        problems.append("--lora_path cannot start --train_embedder: leave one out")
    if args.train_embedder and args.lora_type == "lokr":
        problems.append("--train_embedder is saved as a LoRA, which no file holds beside a LoKr: leave one out")
    if args.mask_only_right and not args.use_split_mask:
        problems.append("--mask_only_right needs --use_split_mask")

    # prior preservation
    if args.with_prior_preservation:
        if not (args.class_data_dir and args.class_prompt):
            problems.append("--with_prior_preservation needs --class_data_dir and --class_prompt")
        if args.loss_mask_weight == 0:
            problems.append("--loss_mask_weight 0 leaves nothing of the class images, which are masked as a whole")
    elif args.class_data_dir or args.class_prompt:
        problems.append("--class_data_dir and --class_prompt have no effect without --with_prior_preservation")
    if args.class_data_dir and args.class_data_dir.exists() and not args.class_data_dir.is_dir():
        problems.append(f"--class_data_dir {args.class_data_dir}: a file of this name is in the way")
    if args.prior_generation_precision in ("no", "fp32") and args.mixed_precision in ("fp16", "bf16"):
        problems.append(
            f"--prior_generation_precision {args.prior_generation_precision}: the model is loaded in "
            f"{args.mixed_precision}"
        )

    # output preservation
    if args.preserve_outputs and not args.preserve_prompts:
        problems.append("--preserve_outputs needs --preserve_prompts")
    if args.preserve_outputs is None:
        for flag in ("preserve_prompts", "preserve_every"):
            is_measured = flag == "preserve_prompts" and (args.validation_data_dir or args.validation_split)
            if flag in args.changed and not is_measured:
                problems.append(f"--{flag} {vars(args)[flag]} needs --preserve_outputs, such as 1")

    # noise, optimizer, precision
    if args.weighting_scheme in ("logit_normal", "mode") and args.timestep_sampling != "sigma":
        problems.append(f"--weighting_scheme {args.weighting_scheme} has no effect without --timestep_sampling sigma")
    if args.optimizer == "prodigy":
        if args.use_8bit_adam:
            problems.append("--use_8bit_adam has no effect on --optimizer prodigy: leave one out")
        if args.scale_lr:
            problems.append("--scale_lr multiplies the factor of Prodigy's own rate, which is about 1: leave one out")
        if args.learning_rate <= 0.1:
            problems.append(f"--learning_rate {args.learning_rate:g}: Prodigy finds the rate itself and wants about 1")
    elif args.prodigy_beta3 is not None:
        problems.append(f"--prodigy_beta3 has no effect on --optimizer {args.optimizer}: leave it out")
    if args.fsdp and args.train_text_encoder:
        problems.append("--train_text_encoder does not work with --fsdp: leave one out")
    if args.mixed_precision == "fp16" and not torch.accelerator.is_available():
        problems.append("--mixed_precision fp16 needs a GPU: use bf16 or no")

    problems += check_held_out(args)
    if args.validation_data_dir and not args.instance_data_dir:
        problems.append("--validation_data_dir goes with --instance_data_dir: hold out by --validation_split instead")

    # validation: lists with one entry per case, or a single one for all cases
    for flag in ("validation_width", "validation_height"):
        size = vars(args)[flag]
        if size % 16:
            problems.append(f"--{flag} {size} must be a multiple of 16, such as {size // 16 * 16}")
    listed = {flag: entries for flag, entries in validation_lists(args).items() if entries}
    if listed and args.validation_prompts:
        problems.append(
            f"--{next(iter(listed))} and --validation_prompts exclude each other: lines have images (--cn)"
        )
        listed = {}
    if args.use_split_mask:
        listed.pop("validation_mask", None)
    if listed and "validation_prompt" not in listed:
        problems.append(f"--{next(iter(listed))} needs --validation_prompt")
    if len({len(names) for names in listed.values() if len(names) > 1}) > 1:
        lengths = ", ".join(f"{len(names)} in --{flag}" for flag, names in listed.items())
        problems.append(f"{lengths}: these lists must be equally long, or hold one entry for all")
    mask_needed = args.mode == "mask" and not args.use_split_mask
    if mask_needed and "validation_image" in listed and "validation_mask" not in listed:
        problems.append("--validation_image needs --validation_mask, or masks that are split: --use_split_mask")

    return problems + check_adapter(args) + check_hub(args) + check_trackers(args) + check_launcher(args)


def validation_lists(args):
    """{flag: entries} of --validation_prompt, --validation_image and --validation_mask.

    A comma is common in a prompt: it separates prompts only where that makes one for each of several images or masks.
    """
    images = split_files(args.validation_image)
    masks = split_files(args.validation_mask)
    count = max(len(images), len(masks))
    prompts = split_list(args.validation_prompt, ";")
    parts = split_list(args.validation_prompt, ",")
    if ";" not in (args.validation_prompt or "") and len(parts) == count > 1:
        prompts = parts
    return {"validation_prompt": prompts, "validation_image": images, "validation_mask": masks}


def split_files(text):
    """The files of a list that semicolons separate, or commas, unless a file has that name, comma and all."""
    if "," not in (text or "") or ";" in text:
        return split_list(text, ";")
    try:
        is_one_name = expanded_path(text).is_file()
    except (OSError, ValueError):  # no name at all: too long, or with a zero byte
        is_one_name = False
    return [text] if is_one_name else split_list(text, ",")


def split_list(text, separator):
    """The parts of a text, without spaces around them and without empty ones."""
    parts = (text or "").split(separator)
    return [part.strip() for part in parts if part.strip()]


def check_model(args):
    """Problems of --pretrained_model_name_or_path, --lora_layers and the disk's free space.

    Only the configurations of the pipeline, the transformer and the VAE are read, their weights are not.
    """
    flag = f"--pretrained_model_name_or_path {args.pretrained_model_name_or_path}"
    try:
        config = FluxTransformer2DModel.load_config(
            args.pretrained_model_name_or_path,
            subfolder="transformer",
            revision=args.revision,
            cache_dir=args.cache_dir,
        )
    except (OSError, ValueError) as error:
        reason = why_no_pipeline(
            args.pretrained_model_name_or_path, "a FLUX.1-Fill pipeline", "black-forest-labs/FLUX.1-Fill-dev", error
        )
        return [f"{flag}: {reason}"]
    family = find_family(args)
    class_name = config.get("_class_name")
    in_channels = config.get("in_channels")
    if class_name != family.transformer_class.__name__ or in_channels != family.in_channels(args):
        found = f"{class_name} with {in_channels} input channels"
        kind = f"{family.kind}, which has {family.in_channels(args)}"
        others = [name for name, other in FAMILIES.items() if other is not type(family)]
        return [f"{flag}: holds a {found}, not {kind}; {', '.join(others)} are taken as well"]
    problems = check_references(args, family)
    if problems:
        return problems
    with torch.device("meta"):
        transformer = family.transformer_class.from_config(config)
    problems = check_block_count(args.blocks_to_swap, transformer)
    if problems:
        return problems
    targets = lora_targets(args, family, transformer)
    unknown = unknown_layers(transformer, targets)
    if unknown:
        return [f"--lora_layers: the transformer has no linear layer {', '.join(unknown)}"]
    lora_size = 0
    for _, layer in target_layers(transformer, targets):
        lora_size += adapter_size(args, layer)
    if args.lora_path:
        shapes = layer_shapes("transformer", transformer, targets)
        if args.train_text_encoder:
            shapes |= clip_lora_shapes(args, CLIP_TARGET_MODULES)
        problems = check_lora_file(args.lora_path, shapes, args.rank, flux=family.has_clip, **adapter_options(args))
        if problems:
            return problems
    # float32: a checkpoint holds the LoRA twice, Adam's two moments and what these flags keep; the result
    num_copies = 5 + args.use_ema + args.load_best_model_at_end
    return check_disk(args, 4 * num_copies * lora_size)


def check_references(args, family):
    """Problems of flags that this family has no use for: those of masks, or of references."""
    problems = []
    more = args.additional_data_dir or args.additional_column
    if more and family.max_references < 2:
        flag = "--additional_data_dir" if args.additional_data_dir else "--additional_column"
        problems.append(f"{flag}: {family.kind} reads one input image, FLUX.2 reads several: leave it out")
    elif more and 1 + len(more) > family.max_references:
        problems.append(f"{1 + len(more)} input images of each: {family.kind} reads at most {family.max_references}")
    if family.max_references == 0:
        return problems
    if args.mode == "mask":
        problems.append(f"--mode mask is for FLUX.1-Fill, {family.kind} has no mask: give --mode edit")
    if args.train_embedder:
        problems.append(
            "--train_embedder trains the layer that reads FLUX.1-Fill's masks and input images, "
            f"{family.kind} reads them as tokens: leave it out"
        )
    if args.train_text_encoder and not family.has_clip:
        problems.append(f"--train_text_encoder trains CLIP, which {family.kind} does not have: leave it out")
    return problems


def lora_targets(args, family, transformer):
    """The layers with a LoRA: --lora_layers, or the usual ones of the family."""
    names = comma_list(args.lora_layers)
    if not names:
        return family.target_modules(transformer)
    if family.has_clip:
        return names
    layers = []  # in full: FLUX.2's attn.to_out is a layer in single blocks and a list in the others
    for name in names:
        layers += [layer for layer, _ in target_layers(transformer, [name])] or [name]
    return layers


# ---------------------------------------------------------------------------------------------------------------------
# Model
# ---------------------------------------------------------------------------------------------------------------------


MASK_CHANNELS = 256  # pixels of the mask in a token

FILL_CHANNELS = 384  # of a token that FLUX.1-Fill reads: 64 noisy latent, 64 input latent, then the mask's


def pack_fill_condition(input_latents: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """What FLUX.1-Fill reads beside the noisy latents: tokens [B, h/2 * w/2, 4C + 4f²].

    input_latents [B, C, h, w] are the normalized latents of the input image, black where it is masked out. mask
    [B, 1, H, W] is 1 where the result is to be generated. It keeps its full resolution: with f = H / h pixels per
    latent, each token carries its 2f x 2f pixels.
    """
    pixels_per_latent = mask.shape[-1] // input_latents.shape[-1]
    mask = F.pixel_unshuffle(mask.to(input_latents), pixels_per_latent)
    return torch.cat([pack_latents(input_latents), pack_latents(mask)], dim=-1)


def embedder_lora(transformer: torch.nn.Module) -> dict[str, LoraLayer]:
    """{layer name: LoraLayer} of what --train_embedder has changed in x_embedder, exactly.

    The change of its weight W [out, in] is up @ down with the identity as down, a LoRA of rank in = FILL_CHANNELS. A
    LoRA has no bias; the mask's inputs are all 1 in edit mode, the mode of --train_embedder, and so their weights
    carry the change of the bias.
    """
    embedder: Any = transformer.x_embedder  # PEFT's, which holds the layer before and after
    before = embedder.original_module
    after = embedder.modules_to_save["default"]
    up = (full_tensor(after.weight) - full_tensor(before.weight)).detach().cpu()  # the trained layer is in float32
    bias = (full_tensor(after.bias) - full_tensor(before.bias)).detach().cpu()
    up[:, -MASK_CHANNELS:] += bias[:, None] / MASK_CHANNELS
    layer = LoraLayer(torch.eye(FILL_CHANNELS), up, float(FILL_CHANNELS))
    if adapter_config(transformer).use_dora:  # then readers expect magnitudes of all layers: at these it is the LoRA
        weight = full_tensor(before.weight).float().cpu()
        layer = replace(layer, magnitude=(weight + up).norm(dim=1), dora_scale=weight.norm(dim=1, keepdim=True))
    return {"transformer.x_embedder": layer}


class FillPipeline(FluxFillPipeline):
    """FluxFillPipeline that prepares its condition exactly as training does, by `pack_fill_condition`.

    In edit mode, nothing of the input image is hidden and all of the result is generated. The pipeline is then called
    with a black mask, which hides nothing, and passes a white one to the transformer.
    """

    edit_mode = False

    def prepare_mask_latents(
        self, mask, masked_image, batch_size, channels, num_images, height, width, dtype, device, generator
    ):
        """(mask [B, N, 4f²], input latents [B, N, 4C]) as tokens; the pipeline joins the latter and the former."""
        if self.edit_mode:
            mask = torch.ones_like(mask)
        latents = sample_latents(encode_moments(self.vae, masked_image), self.vae.config, generator)
        condition = pack_fill_condition(latents, mask).to(device, dtype)
        condition = condition.repeat(batch_size * num_images // len(condition), 1, 1)
        input_tokens = condition[..., : 4 * channels]
        mask_tokens = condition[..., 4 * channels :]
        return mask_tokens, input_tokens


# ---------------------------------------------------------------------------------------------------------------------
# Families of models
# ---------------------------------------------------------------------------------------------------------------------


class Fill:
    """FLUX.1-Fill: a token holds noisy latents, then those of the input image and the mask's pixels.

    A family is what differs between models. `latents` are [B, C, h, w], normalized; `pack_latents` makes tokens
    [B, h/2 * w/2, 4C] of them. A condition is what the transformer reads beside the noisy tokens.
    """

    kind = "FLUX.1-Fill"
    tags: tuple[str, ...] = ("flux", "lora", "flux-fill")  # of the model card
    pipeline_class: Any = FillPipeline
    transformer_class: Any = FluxTransformer2DModel
    vae_class: Any = AutoencoderKL
    text_parts = ("text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2")
    settings: dict[str, Any] = {}  # of the pipeline, beside its models
    sampling: dict[str, Any] = {}  # arguments of the pipeline's call that differ from its defaults
    more_prompts: tuple[str, ...] = ()  # that sampling needs
    max_references = 0  # input images that are read as tokens; none: one is read beside a mask
    smallest_reference = 1  # pixels of a side of an image that the pipeline takes
    longest_reference = math.inf  # its long edge, in short ones
    has_clip = True  # which can be trained; else a language model alone reads prompts
    reads_guidance = True
    draws_with_guidance = True

    def __init__(self, index: dict):
        """`index` is the content of the pipeline's model_index.json."""

    def in_channels(self, args: argparse.Namespace) -> int:
        """Numbers in a token that the transformer reads."""
        return FILL_CHANNELS

    def load_text_encoders(self, args: argparse.Namespace, dtype: torch.dtype) -> DiffusionPipeline:
        """A pipeline with frozen text encoders and tokenizers alone."""
        return load_text_pipeline(FluxPipeline, args, dtype)

    def describe_captions(self, args: argparse.Namespace, captions: dict[str, str]) -> dict[str, str]:
        """What the header says of captions {name: text} that are not read to their end."""
        tokenizers = load_tokenizer(args, "tokenizer_2"), load_tokenizer(args, "tokenizer")
        return describe_long_prompts(captions, tokenizers[0], args.max_sequence_length, tokenizers[1])

    def architecture(self, config: dict) -> str:
        """The name in the header of a LoRA file."""
        return "flux-1-fill-dev"

    def target_modules(self, transformer: torch.nn.Module) -> list[str]:
        """The layers that get a LoRA without --lora_layers."""
        return list(FLUX_TARGET_MODULES)

    def sample_latents(self, moments: torch.Tensor, vae: torch.nn.Module, generator: torch.Generator) -> torch.Tensor:
        """Latents [B, C, h, w] of posteriors [B, 2C, h, w]."""
        return sample_latents(moments, vae.config, generator)

    def condition(self, batch: dict[str, Any], vae: torch.nn.Module, generator: torch.Generator) -> Any:
        """The condition of a batch with "moments" [B, 2, 2C, h, w] and "mask" [B, 1, H, W], or with "references", a
        list of moments [B, 2C, h, w]; see `EditDataset`."""
        return pack_fill_condition(self.sample_latents(batch["moments"][:, 1], vae, generator), batch["mask"])

    def predict(
        self,
        transformer: torch.nn.Module,
        tokens: torch.Tensor,
        condition: Any,
        sigmas: torch.Tensor,
        prompt_embeds: torch.Tensor,
        pooled_prompt_embeds: torch.Tensor,
        *,
        guidance: torch.Tensor | None,
        height: int,
        width: int,
    ) -> torch.Tensor:
        """The velocity [B, N, 4C] of noisy tokens [B, N, 4C], which are height x width latents."""
        return transformer(
            hidden_states=torch.cat([tokens, condition], dim=-1).to(prompt_embeds.dtype),
            timestep=sigmas,
            guidance=guidance,
            pooled_projections=pooled_prompt_embeds,
            encoder_hidden_states=prompt_embeds,
            txt_ids=torch.zeros(prompt_embeds.shape[1], 3, device=tokens.device),
            img_ids=image_ids(height, width, tokens.device),
            return_dict=False,
        )[0]

    def prompt_arguments(self, prompt_encoder: PromptEncoder, prompts: list[str]) -> dict[str, torch.Tensor]:
        """Arguments of the pipeline's call that stand for prompts."""
        prompt_embeds, pooled_prompt_embeds = prompt_encoder.encode_prompts(prompts)
        return {"prompt_embeds": prompt_embeds, "pooled_prompt_embeds": pooled_prompt_embeds}

    def image_arguments(self, case: "ValidationCase | None", size: Size) -> dict[str, Any]:
        """Arguments of the pipeline's call that stand for the images of a case; without one, all of an image of `size`
        is drawn from the prompt."""
        if case is None:
            white = Image.new("RGB", (size.width, size.height), "white")
            return {"image": white, "mask_image": white.convert("L")}
        return {"image": case.image, "mask_image": case.mask}


class Kontext(Fill):
    """FLUX.1-Kontext: the tokens of one reference stand behind the noisy ones, 1 on the first axis of their ids."""

    kind = "FLUX.1-Kontext"
    tags = ("flux", "lora", "flux-kontext")
    pipeline_class = FluxKontextPipeline
    max_references = 1

    def in_channels(self, args):
        return 4 * latent_channels(args)  # a token is a patch of 2 x 2 latents

    def architecture(self, config):
        return "flux-1-kontext-dev"

    def condition(self, batch, vae, generator):
        return [self.reference_latents(moments, vae) for moments in batch["references"]]

    def reference_latents(self, moments: torch.Tensor, vae: torch.nn.Module) -> torch.Tensor:
        """Latents [B, C, h, w] of a reference: the mean of its posterior [B, 2C, h, w], as in the pipeline."""
        return mean_latents(moments, vae.config)

    def predict(
        self,
        transformer,
        tokens,
        condition,
        sigmas,
        prompt_embeds,
        pooled_prompt_embeds,
        *,
        guidance,
        height,
        width,
    ):
        num_edits = len(condition[0]) if condition else 0
        if 0 < num_edits < len(tokens):  # class images have no references; they stand behind the others
            parts = []
            for rows, references in ((slice(num_edits), condition), (slice(num_edits, None), [])):
                prediction = self.predict(
                    transformer,
                    tokens[rows],
                    references,
                    sigmas[rows],
                    prompt_embeds[rows],
                    pooled_prompt_embeds[rows],
                    guidance=None if guidance is None else guidance[rows],
                    height=height,
                    width=width,
                )
                parts.append(prediction)
            return torch.cat(parts)
        all_tokens = torch.cat([tokens, *(pack_latents(latents) for latents in condition)], dim=1)
        prediction = transformer(
            hidden_states=all_tokens.to(prompt_embeds.dtype),
            timestep=sigmas,
            guidance=guidance,
            encoder_hidden_states=prompt_embeds,
            img_ids=to_device(self.image_ids(tokens, height, width, condition), tokens.device),
            **self.text_arguments(prompt_embeds, pooled_prompt_embeds),
            return_dict=False,
        )[0]
        return prediction[:, : tokens.shape[1]]

    def text_arguments(
        self, prompt_embeds: torch.Tensor, pooled_prompt_embeds: torch.Tensor
    ) -> dict[str, torch.Tensor]:
        """Arguments of the transformer that go with prompt_embeds."""
        txt_ids = torch.zeros(prompt_embeds.shape[1], 3, device=prompt_embeds.device)
        return {"pooled_projections": pooled_prompt_embeds, "txt_ids": txt_ids}

    def image_ids(self, tokens: torch.Tensor, height: int, width: int, references: list[torch.Tensor]) -> torch.Tensor:
        """The position ids of the tokens of height x width latents and of references."""
        ids = [image_ids(height, width)]
        for latents in references:
            ids.append(image_ids(*latents.shape[-2:]) + torch.tensor([1.0, 0.0, 0.0]))
        return torch.cat(ids)

    def image_arguments(self, case, size):
        # the pipeline would else resize both to about 1024 x 1024 pixels, as which it was not trained here
        arguments = {"max_area": size.height * size.width, "_auto_resize": False}
        if case is not None:
            arguments["image"] = case.references[0]
        return arguments


class Flux2(Kontext):
    """FLUX.2-dev: several references, at 10, 20, ... on the first of four axes; one language model reads prompts."""

    kind = "FLUX.2"
    tags = ("flux2", "lora")
    pipeline_class = Flux2Pipeline
    transformer_class = Flux2Transformer2DModel
    vae_class = AutoencoderKLFlux2
    text_parts = ("text_encoder", "tokenizer")
    max_references = 10
    smallest_reference = 64
    longest_reference = 8
    has_clip = False

    def load_text_encoders(self, args, dtype):
        return load_flux2_text_pipeline(args, dtype)

    def chat(self, tokenizer: Any, prompt: str) -> str:
        """The text that the language model reads for a prompt."""
        return flux2_chat(tokenizer, prompt)

    def describe_captions(self, args, captions):
        tokenizer = load_tokenizer(args, "tokenizer")
        captions = {name: self.chat(tokenizer, caption) for name, caption in captions.items()}
        return describe_long_prompts(captions, tokenizer, args.max_sequence_length)

    def architecture(self, config):
        return "Flux.2-dev"

    def target_modules(self, transformer):
        return block_layers(transformer)  # single blocks have two: queries, keys, values and MLP are one layer

    def sample_latents(self, moments, vae, generator):
        return flux2_latents(moments, vae)

    def reference_latents(self, moments, vae):
        return flux2_latents(moments, vae)

    def text_arguments(self, prompt_embeds, pooled_prompt_embeds):
        return {"txt_ids": to_device(Flux2Pipeline._prepare_text_ids(prompt_embeds), prompt_embeds.device)}

    def image_ids(self, tokens, height, width, references):
        count = len(tokens)
        ids = [Flux2Pipeline._prepare_latent_ids(torch.empty(count, 0, height // 2, width // 2))]
        if references:
            shapes = [torch.empty(1, 0, latents.shape[-2] // 2, latents.shape[-1] // 2) for latents in references]
            ids.append(Flux2Pipeline._prepare_image_ids(shapes).expand(count, -1, -1))
        return torch.cat(ids, dim=1)

    def prompt_arguments(self, prompt_encoder, prompts):
        prompt_embeds, _ = prompt_encoder.encode_prompts(prompts)
        return {"prompt_embeds": prompt_embeds}

    def image_arguments(self, case, size):
        return {} if case is None else {"image": list(case.references)}


class Flux2Klein(Flux2):
    """FLUX.2-klein, base or distilled to four steps, of 4 or 9 billion parameters; Qwen3 reads prompts."""

    kind = "FLUX.2-klein"
    pipeline_class = Flux2KleinPipeline
    reads_guidance = False

    def __init__(self, index):
        self.is_distilled = bool(index.get("is_distilled"))
        self.settings = {"is_distilled": self.is_distilled}
        self.draws_with_guidance = not self.is_distilled
        if self.is_distilled:
            self.sampling = {"num_inference_steps": 4, "guidance_scale": 1.0}
        else:
            self.more_prompts = ("",)  # the other side of guidance

    def load_text_encoders(self, args, dtype):
        return load_text_pipeline(self.pipeline_class, args, dtype)

    def chat(self, tokenizer, prompt):
        return flux2_klein_chat(tokenizer, prompt)

    def architecture(self, config):
        return flux2_klein_architecture(config)

    def prompt_arguments(self, prompt_encoder, prompts):
        arguments = super().prompt_arguments(prompt_encoder, prompts)
        if not self.is_distilled:
            arguments["negative_prompt_embeds"], _ = prompt_encoder.encode_prompts([""] * len(prompts))
        return arguments


FAMILIES = {  # by the class that model_index.json names
    "FluxFillPipeline": Fill,
    "FluxKontextPipeline": Kontext,
    "Flux2Pipeline": Flux2,
    "Flux2KleinPipeline": Flux2Klein,
}


def find_family(args):
    """The family of --pretrained_model_name_or_path. FLUX.1-Fill's for any other: `check_model` says what it is."""
    index = read_model_index(args)
    return FAMILIES.get(index.get("_class_name"), Fill)(index)


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
    sigmas = sample_sigmas(
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
    return to_device(noise, latents.device), to_device(sigmas, latents.device)


def compute_loss(
    transformer: torch.nn.Module,
    latents: torch.Tensor,
    noise: torch.Tensor,
    sigmas: torch.Tensor,
    condition: Any,
    prompt_embeds: torch.Tensor,
    pooled_prompt_embeds: torch.Tensor,
    *,
    args: argparse.Namespace,
    family: Fill,
    guidance: torch.Tensor | None,
) -> torch.Tensor:
    """The flow matching loss [B] of each sample of a batch.

    latents [B, C, h, w] of the results, normalized; noise and sigmas are those of `sample_noise`; condition is the
    family's, of FLUX.1-Fill [B, h/2 * w/2, 4C + 4f²] from `pack_fill_condition`, else a list of latents; prompt_embeds
    [B, T, D]; pooled_prompt_embeds [B, P]; guidance [B], None for a model without guidance embedding.
    """
    inputs = (latents, noise, sigmas, condition, prompt_embeds, pooled_prompt_embeds)
    model_pred = predict_velocity(transformer, *inputs, family=family, guidance=guidance)
    target = pack_latents(noise) - pack_latents(latents)
    weighting = compute_loss_weighting_for_sd3(args.weighting_scheme, sigmas=sigmas)
    token_weights = None
    if args.loss_mask_weight != 1:
        num_latent_channels = target.shape[-1]  # of a condition token: these come first, then its mask pixels
        mask_pixels = condition[..., num_latent_channels:]
        masked_share = mask_pixels.mean(dim=-1)  # [B, N]
        token_weights = 1 + (args.loss_mask_weight - 1) * masked_share
    return weighted_mse(model_pred, target, weighting, token_weights)


def predict_velocity(
    transformer: torch.nn.Module,
    latents: torch.Tensor,
    noise: torch.Tensor,
    sigmas: torch.Tensor,
    condition: Any,
    prompt_embeds: torch.Tensor,
    pooled_prompt_embeds: torch.Tensor,
    *,
    family: Fill,
    guidance: torch.Tensor | None,
) -> torch.Tensor:
    """The velocity [B, h/2 * w/2, 4C] that the model predicts for x_σ; arguments as of `compute_loss`."""
    _, _, height, width = latents.shape
    noisy_latents = add_noise(pack_latents(latents), pack_latents(noise), sigmas)
    return family.predict(
        transformer,
        noisy_latents,
        condition,
        sigmas,
        prompt_embeds,
        pooled_prompt_embeds,
        guidance=guidance,
        height=height,
        width=width,
    )


def compute_preservation_loss(
    transformer: torch.nn.Module,
    latents: torch.Tensor,
    noise: torch.Tensor,
    sigmas: torch.Tensor,
    condition: Any,
    prompt_embeds: torch.Tensor,
    pooled_prompt_embeds: torch.Tensor,
    base_pooled_prompt_embeds: torch.Tensor,
    *,
    family: Fill,
    guidance: torch.Tensor | None,
    weighting_scheme: str,
) -> torch.Tensor:
    """How far the adapter moves what is predicted for other prompts at the same x_σ and condition, [B].

    || transformer(x_σ, σ, condition, prompt) - transformer without adapter(the same) ||², arguments as of
    `compute_loss`. base_pooled_prompt_embeds [B, P] are those of CLIP without adapter.
    """
    inputs = (latents, noise, sigmas, condition, prompt_embeds)
    with torch.no_grad(), without_adapters(transformer):
        target = predict_velocity(transformer, *inputs, base_pooled_prompt_embeds, family=family, guidance=guidance)
    model_pred = predict_velocity(transformer, *inputs, pooled_prompt_embeds, family=family, guidance=guidance)
    weighting = compute_loss_weighting_for_sd3(weighting_scheme, sigmas=sigmas)
    return weighted_mse(model_pred, target, weighting)


# ---------------------------------------------------------------------------------------------------------------------
# Data
# ---------------------------------------------------------------------------------------------------------------------


def find_examples(args):
    """(training examples, problems). Each has its caption, its size and, in `images`, its target or mask."""
    # 1. Read
    examples, problems = read_examples(args)
    images = all_images(examples) + class_examples(args, []) + validation_files(args, "validation_image")
    if not args.use_split_mask:
        images += validation_files(args, "validation_mask")
    _, prompt_problems = file_prompts(args)
    problems += prompt_problems
    if args.validation_prompts and examples and not prompt_problems:
        for _, inputs, mask in validation_inputs(args, examples):
            images += inputs if mask is None else [*inputs, mask]

    # 2. Check
    sizes, unreadable = read_sizes(images, decode=False)
    size_of = {image.name: size for image, size in zip(images, sizes, strict=True)}  # None: not readable
    problems += unreadable
    family = find_family(args)
    misfits = []
    if family.max_references == 0:
        for example in examples:
            misfits += check_partner_size(example, size_of)
    problems += first_ten(misfits)
    problems += check_validation_masks(args, examples, size_of)
    problems += check_validation_references(args, family, examples, size_of)
    problems += check_num_samples(len(examples) * args.repeats)
    problems += check_captions(examples, default=args.instance_prompt)

    # 3. Assign
    for image in all_images(examples):
        image.size = size_of[image.name] or Size(16, 16)  # an unreadable image is among the problems
    for example in examples:
        if example.caption is None:
            example.caption = args.instance_prompt
    return examples, problems


def find_held_out(args, examples):
    """(training examples, held-out ones, problems) of the examples that `find_examples` has found."""
    training, held_out = hold_out(examples, args.validation_split or 0)
    problems = check_split(training, args.validation_split or 0) if examples else []
    if args.validation_data_dir:
        folders = {}
        for flag in ("instance_data_dir", "target_data_dir", "mask_data_dir", "caption_data_dir"):
            folder = vars(args)[flag]
            if folder:
                folders[flag] = args.validation_data_dir / folder.resolve().name
        if args.additional_data_dir:
            folders["additional_data_dir"] = [
                args.validation_data_dir / folder.resolve().name for folder in args.additional_data_dir
            ]
        if len(folders) == 1:
            folders["instance_data_dir"] = args.validation_data_dir
        own_args = held_out_args(
            args,
            **folders,
            class_data_dir=None,
            validation_prompt=None,
            validation_prompts=None,
            validation_image=None,
        )
        held_out, problems = find_examples(own_args)
        problems = [f"--validation_data_dir {args.validation_data_dir}: {problem}" for problem in problems]
    return training, held_out, problems


def own_dataset(args):
    """What `read_dataset` and `open_stream` are to read."""
    image_columns = {"image": args.image_column}
    if args.target_column:
        image_columns["target"] = args.target_column
    if args.mask_column:
        image_columns["mask"] = args.mask_column
    for number, column in enumerate(args.additional_column or [], start=2):
        image_columns[f"reference_{number}"] = column
    # the caption of a file in --data_files has a usual name; a dataset's column is named
    return dataset_settings(args, image_columns, args.caption_column) | {"whole_rows": bool(args.data_files)}


def check_streamed(example, args):
    """What is wrong with an example of a stream, which nothing has checked before, by the headers of its images; or
    None. Assigns its sizes and its caption."""
    for image in all_images([example]):
        image.size = header_size(image)
    problems = check_captions([example], default=args.instance_prompt)
    if find_family(args).max_references == 0:
        problems += check_partner_size(example, {image.name: image.size for image in all_images([example])})
    if example.caption is None:
        example.caption = args.instance_prompt
    return problems[0] if problems else None


def read_examples(args):
    """(examples of --dataset_name or --instance_data_dir, problems), as the files have them."""
    if args.streaming:
        return read_stream_start(own_dataset(args), functools.partial(check_streamed, args=args))
    if args.dataset_name or args.data_files:
        return read_dataset(name=args.dataset_name or "--data_files", **own_dataset(args))
    examples, problems = read_folder(
        args.instance_data_dir,
        caption_column=args.caption_column,
        caption_dir=args.caption_data_dir,
        partner_dirs={"target": args.target_data_dir, "mask": args.mask_data_dir},
        sort_by_stem=True,
    )
    for number, folder in enumerate(args.additional_data_dir or [], start=2):
        problems += add_references(examples, f"reference_{number}", folder)
    return examples, problems


def add_references(examples, role, folder):
    """Adds to examples the images of their names in a folder, which need not have one for each; returns problems."""
    problems = check_folders({"--additional_data_dir": folder})
    if problems:
        return problems
    files, problems = image_files(folder)
    stems = {file.stem for file in files}
    paths = [example.files[0] for example in examples if example.files[0].stem in stems]
    if examples and not paths:
        problems.append(f"--additional_data_dir {folder}: none of its images is named like an input image")
    partners, unmatched = find_partners(paths, folder, "stem")
    for example in examples:
        if example.files[0] in partners:
            reference = file_example(partners[example.files[0]])
            example.images[role] = reference
            example.stamp += f" {reference.stamp}"
    return problems + unmatched


def reference_roles(example):
    """The keys of an example's further references in `images`, in order."""
    return [role for role in example.images if role.startswith("reference")]


def check_partner_size(example, size_of):
    """Problems of an example's target, which must have its size, or mask, which must have its shape."""
    problems = []
    size = size_of[example.name]
    for role, partner in example.images.items():
        partner_size = size_of[partner.name]
        if size is None or partner_size is None:
            continue
        if role == "target" and partner_size != size:
            problems.append(f"{partner.name}: a target must have the size of its image, {size}, not {partner_size}")
        if role == "mask":
            problems += check_shape(partner.name, "a mask", partner_size, size)
    return problems


def black_masks(examples):
    """The names of the masks in which nothing is white; to be called by all processes."""
    masks = [example.images["mask"] for example in examples if "mask" in example.images]
    found = map_examples(lambda mask: mask.image().convert("L").getextrema()[1] < 128, masks)
    return [mask.name for mask, (is_black, _) in zip(masks, found, strict=True) if is_black]


def read_mask(example, size):
    """The mask of an example as training prepares it at `size` (height, width): PIL, 255 where to generate, else 0.

    Raises ValueError if there is nothing to generate.
    """
    selected = fit_mask(example.image(), size)
    if not selected.any():
        raise ValueError(f"{example.name}: nothing in this mask is white, so nothing would be generated")
    return Image.fromarray(selected.astype(np.uint8) * 255)


def class_examples(args, class_prompts):
    """Examples of the class images there are, at most --num_class_images."""
    return read_class_images(args.class_data_dir, class_prompts, args.num_class_images)


def size_at(long_edge: int, size: Size) -> Size:
    """The training size, multiples of 16 pixels, of an image of `size` whose long edge becomes about `long_edge`."""
    height = max(16, round(size.height * long_edge / max(size) / 16) * 16)
    width = max(16, round(size.width * long_edge / max(size) / 16) * 16)
    return Size(height, width)


def reference_size(long_edge: int, size: Size) -> Size:
    """`size_at` for a reference, of at most 1024 x 1024 pixels, to which FLUX.2's pipeline shrinks larger ones."""
    fitted = size_at(long_edge, size)
    while fitted.height * fitted.width > 1024**2:
        long_edge -= 16
        fitted = size_at(long_edge, size)
    return fitted


def split_mask(size: Size, half: str) -> Image.Image:
    """A mask whose "left" or "right" half is white."""
    middle = size.width // 2
    mask = Image.new("L", (size.width, size.height), "black")
    if half == "left":
        mask.paste(255, (0, 0, middle, size.height))
    else:
        mask.paste(255, (middle, 0, size.width, size.height))
    return mask


class ImageKey(NamedTuple):
    """An image as training uses it; with --cache_latents each is encoded once.

    index     of the example; class images are counted on after the examples
    size      to which the image is resized and cropped
    mirrored  from left to right
    view      image: as it is; target, reference_2, ...: that image of the example; masked, left masked, right masked:
              the image without what its mask or that half covers; nothing: no image
    """

    index: int | None
    size: Size
    mirrored: bool
    view: str


class EditDataset(Dataset):
    """Samples by position (epoch, index), in batches of one long edge each.

    A sample is a list: {"pixel_values" or "moments", "mask", "prompt"}, and with prior preservation the same of a
    class image. pixel_values [2, 3, H, W] in [-1, 1] are the result to be generated and the input image; moments
    [2, 2C, h, w] are the posteriors of their latents, if these are cached. mask [1, H, W] is 1 where the result is to
    be generated. A class image is generated as a whole, from nothing.

    For a family that reads references it is {"pixel_values" or "moments", "references", "prompt"}: the result alone,
    [1, ...], and the input images in a list, each of its own size, which the samples of a batch have in common. A
    class image has none.

    What is random depends on the seed and on

        the crop                                              index
        the long edge of a batch                              epoch and index of its first sample, 1
        caption dropout, mirroring, split mask, class image   epoch and index, drawn in this order

    so neither workers, nor the cache, nor an interruption change it. Exact resume relies on this order.
    """

    def __init__(self, examples, args):
        self.examples = examples * args.repeats
        self.class_examples = []  # they are generated after this dataset is made
        self.args = args
        self.moments = {}  # {ImageKey: posterior [2C, h, w]} on the disk, empty without --cache_latents
        # with --center_crop, the repeats of an image are all cropped alike and need one key
        self.num_crops = len(examples) if args.center_crop else len(self.examples)
        self.first_class_index = len(self.examples)
        self.has_references = find_family(args).max_references > 0
        if args.mode == "edit":
            self.result_view = "target"
            self.input_views = ["image"]
        else:
            self.result_view = "image"
            self.input_views = ["masked"]
            if args.use_split_mask:
                self.input_views = ["left masked", "right masked"]
            if args.mask_only_right:
                self.input_views = ["right masked"]

    def __len__(self):
        return len(self.examples)

    def sizes(self):
        """The sizes of each example's result at all resolutions."""
        sizes = []
        for example in self.examples:
            result = self.view_of(example, self.result_view)
            sizes.append(tuple(size_at(long_edge, result.size) for long_edge in self.args.resolution))
        return sizes

    def groups(self):
        """For each example what the samples of a batch have in common: its sizes, and those of its references."""
        groups = self.sizes()
        if not self.has_references:
            return groups
        for index, example in enumerate(self.examples):
            for long_edge in self.args.resolution:
                for view in self.reference_views(example):
                    groups[index] += (reference_size(long_edge, self.view_of(example, view).size),)
        return groups

    def image_keys(self):
        """Every `ImageKey` that training can ask for."""
        sizes = self.sizes()
        mirrorings = [False, True] if self.args.random_flip else [False]
        keys = []
        for index in range(self.num_crops):
            for long_edge, size in zip(self.args.resolution, sizes[index], strict=True):
                for mirrored in mirrorings:
                    result_key = ImageKey(index, size, mirrored, self.result_view)
                    keys.append(result_key)
                    for view in self.input_views:
                        keys += self.input_keys(result_key, view, long_edge)
        if self.class_examples:
            for size in sorted({size for group in sizes for size in group}):
                for i in range(len(self.class_examples)):
                    index = self.first_class_index + i
                    keys += [ImageKey(index, size, mirrored, "image") for mirrored in mirrorings]
                if not self.has_references:
                    keys.append(ImageKey(None, size, False, "nothing"))
        return list(dict.fromkeys(keys))  # two resolutions can give a small image the same size

    def index_label(self):
        """Under what `EncodedIndex` knows latents of these images: class images are not among a run's data."""
        return ["latents", [example.stamp for example in self.class_examples]]

    def input_keys(self, result_key, view, long_edge):
        """The keys of the input images that go with a result: that of a view, or those of all references."""
        if not self.has_references:
            return [result_key._replace(view=view)]
        keys = []
        example = self.examples[result_key.index]
        for reference_view in self.reference_views(example):
            size = reference_size(long_edge, self.view_of(example, reference_view).size)
            keys.append(result_key._replace(size=size, view=reference_view))
        return keys

    def reference_views(self, example):
        return ["image", *reference_roles(example)]

    def view_of(self, example, view):
        """The image of an example that a view shows."""
        return example.images.get(view, example)

    def example(self, key):
        if key.index < self.first_class_index:
            return self.examples[key.index]
        return self.class_examples[key.index - self.first_class_index]

    def crop(self, key):
        """The arguments of `fit` and `fit_mask` that an image, its target and its mask share."""
        centering = (0.5, 0.5)
        if not self.args.center_crop:
            centering = np.random.default_rng((self.args.seed, key.index)).random(2)
        return {"centering": centering, "mirrored": key.mirrored}

    def pixel_values(self, key):
        """The image of a key [3, H, W] in [-1, 1]; 0, which is gray, where it is masked, as in FluxFillPipeline."""
        if key.view == "nothing":
            return torch.zeros(3, *key.size)
        example = self.view_of(self.example(key), key.view)
        image = fit(example.image(), key.size, self.args.image_interpolation_mode, **self.crop(key))
        pixels = to_tensor(image)
        if key.view.endswith("masked"):
            pixels = pixels * (1 - self.mask(key))
        return pixels

    def mask(self, key):
        """The mask [1, H, W] for the input image of a key: 1 where it is masked; 1 everywhere without a mask."""
        if not key.view.endswith("masked"):
            return torch.ones(1, *key.size)
        example = self.example(key)
        if key.view == "masked":
            mask = example.images["mask"].image()
        else:
            mask = split_mask(example.size, half=key.view.removesuffix(" masked"))
        return torch.from_numpy(fit_mask(mask, key.size, **self.crop(key))).float()[None]

    def __getitems__(self, positions):
        """The samples of one batch."""
        rng = np.random.default_rng((self.args.seed, *positions[0], 1))
        long_edge = rng.choice(self.args.resolution)
        return [self.samples(position, long_edge) for position in positions]

    def samples(self, position, long_edge):
        """[the sample at a position], with prior preservation also that of a class image."""
        epoch, index = position
        example = self.examples[index]
        size = size_at(long_edge, self.view_of(example, self.result_view).size)
        rng = np.random.default_rng((self.args.seed, epoch, index))
        dropout_draw, flip_draw = rng.random(2)
        input_view = self.input_views[rng.integers(len(self.input_views))]

        prompt = example.caption
        if dropout_draw < self.args.caption_dropout:
            prompt = ""
        mirrored = bool(self.args.random_flip and flip_draw < 0.5)
        result_key = ImageKey(index % self.num_crops, size, mirrored, self.result_view)
        samples = [self.sample(result_key, self.input_keys(result_key, input_view, long_edge), prompt)]

        if self.class_examples:
            drawn = int(rng.integers(len(self.class_examples)))
            class_index = self.first_class_index + drawn
            mirrored = bool(self.args.random_flip and rng.random() < 0.5)
            result_key = ImageKey(class_index, size, mirrored, "image")
            input_keys = [] if self.has_references else [ImageKey(None, size, False, "nothing")]
            samples.append(self.sample(result_key, input_keys, self.class_examples[drawn].caption))
        return samples

    def streamed_edge(self, epoch, index):
        """The long edge of an example of a stream; a batch has those of one edge."""
        rng = np.random.default_rng((self.args.seed, epoch, index, 1))
        return rng.choice(self.args.resolution)

    def streamed_group(self, example, epoch, index):
        """What a batch has in common, the sizes of the result and its references, of an example of a stream, which is
        checked. Raises ValueError."""
        problem = check_streamed(example, self.args)
        if problem:
            raise ValueError(problem)
        long_edge = self.streamed_edge(epoch, index)
        group = (size_at(long_edge, self.view_of(example, self.result_view).size),)
        if self.has_references:
            for view in self.reference_views(example):
                group += (reference_size(long_edge, self.view_of(example, view).size),)
        return group

    def streamed_samples(self, example, epoch, index):
        """`samples` of an example of a stream, which has this index."""
        alone = copy.copy(self)
        alone.examples = {index: example}
        alone.first_class_index = alone.num_crops = index + 1
        return alone.samples((epoch, index), self.streamed_edge(epoch, index))

    def held_out_keys(self, index):
        """[key of the result, keys of the input images] of a held-out example; split masks take turns."""
        long_edge = max(self.args.resolution)
        size = size_at(long_edge, self.view_of(self.examples[index], self.result_view).size)
        result_key = ImageKey(index, size, False, self.result_view)
        view = self.input_views[index % len(self.input_views)]
        return [result_key, *self.input_keys(result_key, view, long_edge)]

    def sample(self, result_key, input_keys, prompt):
        """One sample: the images of a result and its inputs, the mask of the input image, and the prompt."""
        name = "moments" if self.moments else "pixel_values"
        image_of = self.moments.__getitem__ if self.moments else self.pixel_values
        if self.has_references:
            references = [image_of(key) for key in input_keys]
            return {name: image_of(result_key)[None], "references": references, "prompt": prompt}
        images = torch.stack([image_of(key) for key in [result_key, *input_keys]])
        return {"mask": self.mask(input_keys[0]), "prompt": prompt, name: images}


def streamed_batches(stream, dataset, args, **processes):
    """The batches of a stream, whose samples are checked as they come."""
    return StreamedBatches(
        stream,
        dataset.streamed_samples,
        group_of=dataset.streamed_group,
        collate_fn=collate_edits,
        batch_size=args.train_batch_size,
        shuffle_buffer=args.shuffle_buffer,
        seed=args.seed,
        num_threads=args.dataloader_num_workers,
        **processes,
    )


def collate_edits(samples):
    """`collate`, with the references of the first samples, [B, ...] each, in a list: class images have none."""
    references = []
    for group in samples:
        references.append(group[0].pop("references", []))
        for class_sample in group[1:]:
            class_sample.pop("references", None)
    batch = collate(samples)
    batch["references"] = [torch.stack(images) for images in zip(*references, strict=True)]
    return batch


# ---------------------------------------------------------------------------------------------------------------------
# Training
# ---------------------------------------------------------------------------------------------------------------------


class ValidationCase(NamedTuple):
    """A prompt and the PIL image and mask that it is applied to at every validation, or the references, which `image`
    then shows at the size of the result."""

    prompt: str
    image: Image.Image
    mask: Image.Image
    settings: ValidationPrompt
    references: tuple[Image.Image, ...] = ()


def create_pipeline(family, transformer, vae, noise_scheduler):
    """The pipeline around the models in training, for prompts that are embedded already.

    It has its own scheduler: sampling sets other timesteps than training uses.
    """
    return family.pipeline_class(
        scheduler=FlowMatchEulerDiscreteScheduler.from_config(noise_scheduler.config),
        vae=vae,
        transformer=transformer,
        **dict.fromkeys(family.text_parts),
        **family.settings,
    )


def class_image_size(args):
    return size_at(max(args.resolution), Size(1, 1))


def pipeline_call(family, prompt_encoder, args, prompts, case=None):
    """Arguments of the pipeline for prompts: edit what a `ValidationCase` shows, or, without it, draw whole images."""
    size = class_image_size(args) if case is None else Size.of(case.image)
    call = {
        **family.prompt_arguments(prompt_encoder, prompts),
        **family.sampling,
        **family.image_arguments(case, size),
    }
    if family.reads_guidance:
        call["guidance_scale"] = args.guidance_scale
    return call | {"height": size.height, "width": size.width}


def validation_files(args, flag):
    """Examples of the image files that --validation_image or --validation_mask lists."""
    return [file_example(expanded_path(path), name=f"--{flag} {path}") for path in validation_lists(args)[flag]]


def file_prompts(args):
    """(prompts of --validation_prompts, problems)."""
    options = {"width", "height", "seed", "num_inference_steps", "image"}
    family = find_family(args)
    if family.draws_with_guidance:
        options.add("guidance_scale")
    has_masks = args.mode == "mask" and not args.use_split_mask
    if has_masks:
        options.add("mask")
    if not (args.train_text_encoder or args.train_embedder):  # their part has no scale
        options.add("lora_scale")
    prompts, problems = read_validation_prompts("--validation_prompts", args.validation_prompts, options=options)
    for prompt in prompts:
        where = f"--validation_prompts {args.validation_prompts}: {prompt.prompt[:80]!r}"
        most = max(1, family.max_references)
        if len(prompt.image) > most:
            problems.append(f"{where} has {len(prompt.image)} images: give {'one' if most == 1 else most} --cn")
        if has_masks and prompt.image and not prompt.mask:
            problems.append(f"{where}: --cn needs --mask, or masks that are split: --use_split_mask")
    return prompts, problems


def validation_cases(args, examples):
    """What is generated at every validation, a list of `ValidationCase`.

    Split masks give one case for each half that training uses. In edit mode the mask is black, see `FillPipeline`.
    """
    cases = []
    has_references = find_family(args).max_references > 0
    for prompt, inputs, mask in validation_inputs(args, examples):
        size = drawn_size(args, prompt)
        if has_references:
            references = tuple(fit_reference(image, max(size), args.image_interpolation_mode) for image in inputs)
            image = ImageOps.pad(Flux2ImageProcessor.concatenate_images(list(references)), size[::-1], color="white")
            mask = Image.new("L", image.size, "black")
            cases.append(ValidationCase(prompt.prompt, image, mask, prompt, references))
            continue
        image = fit(inputs[0].image(), size, args.image_interpolation_mode)
        if args.mode == "edit":
            masks = [Image.new("L", image.size, "black")]
        elif not args.use_split_mask:
            masks = [read_mask(mask, size)]
        elif args.mask_only_right:
            masks = [split_mask(size, "right")]
        else:
            masks = [split_mask(size, "left"), split_mask(size, "right")]
        cases += [ValidationCase(prompt.prompt, image, mask, prompt) for mask in masks]
    return cases


def drawn_size(args, prompt):
    """The size of the image that is generated for a `ValidationPrompt`."""
    return Size(prompt.height or args.validation_height, prompt.width or args.validation_width)


def fit_reference(example, long_edge, interpolation):
    """The image of an example as a reference beside results whose long edge is `long_edge`."""
    image = example.image()
    return fit(image, reference_size(long_edge, Size.of(image)), interpolation)


def validation_inputs(args, examples):
    """[(prompt, examples of its input images, example of its mask)]; no mask, None, in edit mode and with split masks.

    They are those of --validation_prompts, or each of the lists --validation_prompt, --validation_image and
    --validation_mask has one entry for each, or a single one for all. Without an image, that of the first training
    example is used, with its references.
    """
    has_masks = args.mode == "mask" and not args.use_split_mask
    first = []
    if examples:
        first = [examples[0], *(examples[0].images[role] for role in reference_roles(examples[0]))]
    inputs = []
    if args.validation_prompts:
        for prompt in file_prompts(args)[0]:
            images = [file_example(path) for path in prompt.image] or first
            mask = None
            if has_masks:
                mask = file_example(prompt.mask) if prompt.mask else examples[0].images["mask"]
            inputs.append((replace(prompt, seed=args.seed if prompt.seed is None else prompt.seed), images, mask))
    elif prompts := validation_lists(args)["validation_prompt"]:
        images = [[image] for image in validation_files(args, "validation_image")] or [first]
        masks = [None]
        if has_masks:
            masks = validation_files(args, "validation_mask") or [examples[0].images["mask"]]
        for i in range(max(len(prompts), len(images), len(masks))):
            prompt = ValidationPrompt(prompts[i % len(prompts)])
            inputs.append((prompt, images[i % len(images)], masks[i % len(masks)]))
    prompts = with_defaults(
        [prompt for prompt, _, _ in inputs],
        guidance_scale=args.validation_guidance_scale,
        num_inference_steps=args.validation_num_inference_steps,
    )
    return [(prompt, images, mask) for prompt, (_, images, mask) in zip(prompts, inputs, strict=True)]


def check_validation_masks(args, examples, size_of):
    """Problems of validation masks that have another shape than their images, or select nothing."""
    if not examples or "mask" not in examples[0].images:
        return []
    problems = []
    for prompt, inputs, mask in validation_inputs(args, examples):
        mask_size = size_of.get(mask.name)
        image_size = size_of.get(inputs[0].name)
        if mask_size is None or image_size is None:  # not readable, which is said already
            continue
        misfit = check_shape(mask.name, "a mask", mask_size, image_size)
        problems += misfit
        if not misfit:
            try:
                read_mask(mask, drawn_size(args, prompt))
            except ValueError as error:
                problems.append(str(error))
    return list(dict.fromkeys(problems))


def check_validation_references(args, family, examples, size_of):
    """Problems of validation images that are too small, or too long, for the family's pipeline."""
    problems = []
    if not examples:
        return problems
    for prompt, inputs, _ in validation_inputs(args, examples):
        for image in inputs:
            if size_of.get(image.name):
                long_edge = max(drawn_size(args, prompt))
                problems += check_reference(image.name, reference_size(long_edge, size_of[image.name]), family)
    return list(dict.fromkeys(problems))


def check_reference(name, size, family):
    """A problem if the family's pipeline takes no reference of a size."""
    fits = min(size) >= family.smallest_reference and max(size) <= family.longest_reference * min(size)
    if fits:
        return []
    return [
        f"{name}: would be read at {size} pixels, {family.kind} draws from images of at least "
        f"{family.smallest_reference} pixels a side, at most {family.longest_reference} times as long as wide: give a "
        "larger size or another image"
    ]


def log_validation(
    accelerator,
    family,
    transformer,
    result_weights,
    vae,
    noise_scheduler,
    prompt_encoder,
    args,
    cases,
    step,
    weights_of=None,
):
    """Generates the cases, sends the images to validation/step-N.png, beside their inputs, and to the trackers, and
    returns them."""
    pipeline = create_pipeline(family, accelerator.unwrap_model(transformer), vae, noise_scheduler)
    if family.max_references == 0:
        pipeline.edit_mode = args.mode == "edit"
    calls = []
    count = 1 if args.validation_prompts else args.num_validation_images
    prompts = []  # of each image
    with (
        result_weights(),
        undisturbed(transformer, device=accelerator.device),
        offload_models(vae, device=accelerator.device, offload=args.offload or args.cache_latents),
    ):
        for case in cases:
            call = pipeline_call(family, prompt_encoder, args, [case.prompt], case)
            calls += [call | sampling_arguments(case.settings)] * count
            prompts += [case.settings] * count
        seeds = [args.seed + i if prompt.seed is None else prompt.seed for i, prompt in enumerate(prompts)]
        lora_scales = [prompt.lora_scale for prompt in prompts]
        images = generate_images(accelerator, pipeline, calls, seeds=seeds, lora_scales=lora_scales)
    if not images:  # interrupted
        return []
    captions = [f"{prompt.prompt} | {prompt.described(seed=args.seed + i)}" for i, prompt in enumerate(prompts)]

    cells = []  # of the grid, a row per case: its input, then the images generated from it
    captions_of_cells = []
    for i, case in enumerate(cases):
        first = i * count
        last = first + count
        cells += [Image.composite(Image.new("RGB", case.image.size, "gray"), case.image, case.mask)]
        cells += images[first:last]
        captions_of_cells += ["input", *captions[first:last]]
    columns = 1 + count
    grid = image_grid(cells, captions_of_cells, columns=columns, title=step_title(step, weights_of))
    save_images(accelerator, args, images, captions, step=step, grid=grid, weights_of=weights_of)
    return images


def held_out_losses(
    accelerator,
    family,
    transformer,
    vae,
    prompt_encoder,
    held_out,
    args,
    guidance_embeds,
    prompts_instead,
    base_pooled,
):
    """What the metrics get of the images of a dataset, `held_out`: {"validation_loss": mean, "validation_loss_0.1": at
    this noise level, ...}.

    That is the loss of training for the center of the image, at the noise and the levels of `fixed_noise` and the
    largest --resolution, without --weighting_scheme. With --preserve_prompts it is "distance_from_base" as well: how
    far the adapter moves what is predicted for these prompts at the same noisy latents. prompts_instead(caption) are
    those of an image, taken in turn; base_pooled {prompt: [1, P]} are their embeddings by CLIP without adapter.
    """
    device = accelerator.device
    num_levels = len(NOISE_LEVELS)
    guidance = None
    if guidance_embeds:
        guidance = torch.full((num_levels,), args.guidance_scale, device=device)

    def losses_of(index):
        generator = fixed_generator(index)
        result_key, *input_keys = held_out.held_out_keys(index)
        batch = collate_edits([[held_out.sample(result_key, input_keys, "")]])
        batch = tree_map(lambda value: value.to(device) if isinstance(value, torch.Tensor) else value, batch)
        latents = family.sample_latents(batch["moments"][:, 0], vae, generator)
        condition = family.condition(batch, vae, generator)
        condition = tree_map(lambda part: part.expand(num_levels, *part.shape[1:]), condition)
        inputs = (*fixed_noise(latents, index), condition)
        caption = held_out.examples[index].caption
        prompt_embeds = prompt_encoder.encode_prompts([caption] * num_levels)
        loss = compute_loss(transformer, *inputs, *prompt_embeds, args=held_out.args, family=family, guidance=guidance)
        losses = {"validation_loss": loss}
        choices = prompts_instead(caption)
        if choices:
            prompts = [choices[(index + level) % len(choices)] for level in range(num_levels)]
            losses["distance_from_base"] = compute_preservation_loss(
                transformer,
                *inputs,
                *prompt_encoder.encode_prompts(prompts),
                torch.cat([base_pooled[prompt] for prompt in prompts]),
                family=family,
                guidance=guidance,
                weighting_scheme="none",
            )
        return losses

    return held_out_means(accelerator, transformer, len(held_out.examples), losses_of)


MASK_MODE_CARD = """
# {name}

A {adapter} (rank {rank}, alpha {alpha}) for {model}: it generates the white part of a mask from a prompt.

```python
import torch
from diffusers import FluxFillPipeline
from diffusers.utils import load_image

pipeline = FluxFillPipeline.from_pretrained({pretrained_arguments})
pipeline.load_lora_weights({lora_folder!r}, weight_name={lora_name!r})
# Each layer is copied to the GPU when it computes; where the whole pipeline fits, pipeline.to("cuda") is faster
if torch.cuda.is_available():
    pipeline.enable_group_offload(torch.device("cuda"), offload_type="leaf_level", use_stream=True)

input_image = load_image("input.png")
scale = {long_edge} / max(input_image.size)  # to the long edge that was trained, in the image's shape
width, height = (max(16, round(side * scale / 16) * 16) for side in input_image.size)
image = pipeline(
    {prompt!r},
    image=input_image,
    mask_image=load_image("mask.png"),  # white where the image is to be generated
    height=height,
    width=width,
    guidance_scale={guidance_scale},
    max_sequence_length={max_sequence_length},
).images[0]
image.save("image.png")
```
"""

EDIT_MODE_CARD = """
# {name}

A {adapter} (rank {rank}, alpha {alpha}) for {model}: it edits a whole image as a prompt says.

```python
import torch
from diffusers import FluxFillPipeline
from diffusers.utils import load_image
from PIL import Image


class EditPipeline(FluxFillPipeline):
    # The mask given to the pipeline is black: it hides nothing of the input image.
    # The transformer was trained with a white one: all of the result is generated.
    def prepare_mask_latents(self, mask, *inputs):
        return super().prepare_mask_latents(torch.ones_like(mask), *inputs)


pipeline = EditPipeline.from_pretrained({pretrained_arguments})
pipeline.load_lora_weights({lora_folder!r}, weight_name={lora_name!r})
# Each layer is copied to the GPU when it computes; where the whole pipeline fits, pipeline.to("cuda") is faster
if torch.cuda.is_available():
    pipeline.enable_group_offload(torch.device("cuda"), offload_type="leaf_level", use_stream=True)

input_image = load_image("input.png")
scale = {long_edge} / max(input_image.size)  # to the long edge that was trained, in the image's shape
width, height = (max(16, round(side * scale / 16) * 16) for side in input_image.size)
image = pipeline(
    {prompt!r},
    image=input_image,
    mask_image=Image.new("L", (1, 1), "black"),
    height=height,
    width=width,
    guidance_scale={guidance_scale},
    max_sequence_length={max_sequence_length},
).images[0]
image.save("image.png")
```
"""


REFERENCE_CARD = """
# {name}

A {adapter} (rank {rank}, alpha {alpha}) for {model}: it edits images as a prompt says.

```python
import torch
from diffusers import {pipeline_class}
from diffusers.utils import load_image

pipeline = {pipeline_class}.from_pretrained({pretrained_arguments})
pipeline.load_lora_weights({lora_folder!r}, weight_name={lora_name!r})
# Each layer is copied to the GPU when it computes; where the whole pipeline fits, pipeline.to("cuda") is faster
if torch.cuda.is_available():
    pipeline.enable_group_offload(torch.device("cuda"), offload_type="leaf_level", use_stream=True)

input_image = load_image("input.png")
scale = {long_edge} / max(input_image.size)  # to the long edge that was trained, in the image's shape
width, height = (max(16, round(side * scale / 16) * 16) for side in input_image.size)
resized = input_image.resize((width, height))
image = pipeline(
    prompt={prompt!r},
    {image}
    height=height,
    width=width,
    max_sequence_length={max_sequence_length},{more_arguments}
).images[0]
image.save("image.png")
```
"""


def save_model_card(args, dtype, prompt, hub_repo=None, held_out=""):
    """Writes README.md into the output folder: what was trained, and code that applies it with `prompt`, with the file
    that was written or, with `hub_repo`, that on the Hub; and what `held_out` tells of the held-out loss."""
    folder = args.output_dir.resolve()
    lora = lora_file(folder, args.output_name)
    pretrained_arguments = [repr(args.pretrained_model_name_or_path), f"dtype={dtype}"]
    if args.revision:
        pretrained_arguments.append(f"revision={args.revision!r}")
    if args.variant:
        pretrained_arguments.append(f"variant={args.variant!r}")
    family = find_family(args)
    template = EDIT_MODE_CARD if args.mode == "edit" else MASK_MODE_CARD
    more_arguments = dict(family.sampling)
    image = "image=resized,"
    if family.max_references:
        template = REFERENCE_CARD
    if family.max_references == 1:
        more_arguments |= {"max_area": "height * width", "_auto_resize": False}
    elif family.max_references > 1:
        image = "image=[resized],"
        if args.additional_data_dir or args.additional_column:
            image = "image=[resized],  # and further input images behind it, in order"
    if family.reads_guidance:
        more_arguments["guidance_scale"] = args.guidance_scale
    description = template.format(
        pipeline_class=family.pipeline_class.__name__,
        image=image,
        more_arguments="".join(f"\n    {name}={value}," for name, value in more_arguments.items()),
        name=folder.name,
        adapter=adapter_kind(args),
        rank=args.rank,
        alpha=args.lora_alpha,
        model=args.pretrained_model_name_or_path,
        pretrained_arguments=", ".join(pretrained_arguments),
        lora_folder=hub_repo or str(lora.parent),
        lora_name=lora.name,
        prompt=prompt,
        long_edge=max(args.resolution),
        guidance_scale=args.guidance_scale,
        max_sequence_length=args.max_sequence_length,
    )
    if held_out:
        description = f"{description.rstrip()}\n\n{held_out}"
    write_model_card(
        args,
        description,
        tags=["image-to-image", *family.tags, "diffusers"],
        base_model=args.pretrained_model_name_or_path,
        trigger_words=[args.instance_prompt] if args.instance_prompt else [],
        instance_prompt=args.instance_prompt,
    )


def choose_seed(seed, checkpoint):
    """--seed; without it the seed of the run to resume, else a random one, the same on all processes."""
    if seed is not None:
        return seed
    if checkpoint and checkpoint_state(checkpoint):  # a damaged one is reported by `check_run`
        return int(checkpoint_state(checkpoint)["seed"])
    return broadcast_object_list([secrets.randbits(31)])[0]


def describe_run(args, examples, held_out_examples, class_examples, text_lora_params, num_parts=0):
    """What the header says of this trainer's data, of a stream in `num_parts`, and text encoders, {label: text}."""
    if args.mode == "edit":
        partners = "targets"
    elif args.use_split_mask:
        partners = "split masks"
    else:
        partners = "masks"
    edges = ", ".join(map(str, args.resolution))
    amount = f"a stream of {num_parts} files" if num_parts else f"{len(examples)} images"
    run_info = {"data": f"{amount} with {partners} at {edges} px"}
    if num_parts:
        examples = []  # of which nothing more is known
    folders = [args.instance_data_dir, args.target_data_dir, args.mask_data_dir, args.caption_data_dir]
    folders += args.additional_data_dir or []
    if examples and (args.additional_data_dir or args.additional_column):
        run_info["references"] = describe_references(examples)
    run_info |= describe_data([*examples, *held_out_examples], folders, "--instance_prompt")
    run_info |= describe_class_images(class_examples)
    black = black_masks(examples)
    if black:
        run_info["black masks"] = f"{len(black)}, which select nothing: {shortened(black)}"
    captions = {example.name: example.caption for example in examples}
    run_info |= find_family(args).describe_captions(args, captions)
    if text_lora_params:
        count = sum(parameter.numel() for parameter in text_lora_params)
        run_info["text encoders"] = f"{count:,} parameters"
        if args.optimizer == "prodigy" and args.text_encoder_lr != args.learning_rate:
            run_info["Prodigy"] = f"has one learning rate, {args.learning_rate:g}: --text_encoder_lr is not used"
    return run_info


def describe_references(examples):
    """How many examples have how many input images, as the header says it."""
    counts = Counter(1 + len(reference_roles(example)) for example in examples)
    return ", ".join(f"{counts[number]} images with {number}" for number in sorted(counts))


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
    if args.use_8bit_adam:
        from bitsandbytes.optim import AdamW8bit

        return AdamW8bit(params_to_optimize, betas=betas, eps=args.adam_epsilon)
    return torch.optim.AdamW(params_to_optimize, betas=betas, eps=args.adam_epsilon, fused=fused)


def generate_command(args, prompt):
    """The command, below examples/, that applies the result to an image."""
    command = f"influxedit/generate.py {shlex.quote(str(args.output_dir))} --prompt {shlex.quote(prompt)}"
    files = validation_lists(args)
    images = files["validation_image"] or ["IMAGE"]
    command += f" --image {shlex.quote(images[0])}"
    more = args.additional_data_dir or args.additional_column
    if more:
        command += " --reference" + len(more) * " IMAGE"
    if args.mode == "mask" and not args.use_split_mask:
        masks = files["validation_mask"] or ["MASK"]
        command += f" --mask {shlex.quote(masks[0])}"
    return command


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

    checkpoint, resume_problems = agreed_checkpoint(accelerator, args.output_dir, args.resume_from_checkpoint)
    args.seed = choose_seed(args.seed, checkpoint)
    set_seed(args.seed)

    # 2. Data
    family = find_family(args)
    examples, problems = find_examples(args)
    problems += resume_problems
    examples, held_out_examples, held_out_problems = find_held_out(args, examples)
    problems += held_out_problems
    models = model_identities(args)
    captions = [example.caption for example in examples if example.caption is not None]
    class_prompts, prompt_problems = read_prompts("--class_prompt", args.class_prompt, captions)
    problems += prompt_problems
    if class_prompts:
        problems += check_class_images(
            args.class_data_dir,
            args.num_class_images,
            prompts=class_prompts,
            model=models["transformer"],
            size=class_image_size(args),
        )
    preserve_prompts = []
    prompts_instead = {}  # {caption: the same with other words, if --preserve_prompts names words}
    if args.preserve_outputs or (args.preserve_prompts and held_out_examples):
        preserve_prompts, prompt_problems = read_prompts("--preserve_prompts", args.preserve_prompts, captions)
        problems += prompt_problems
        if "=>" in args.preserve_prompts:
            for caption in set(captions):
                found, _ = read_prompts("--preserve_prompts", args.preserve_prompts, [caption])
                prompts_instead[caption] = found or preserve_prompts
    dataset = EditDataset(examples, args)
    held_out = EditDataset(
        held_out_examples, held_out_args(args, repeats=1, center_crop=True, weighting_scheme="none")
    )
    processes = {"process_index": accelerator.process_index, "num_processes": accelerator.num_processes}
    accumulation = args.gradient_accumulation_steps
    total_batch_size = args.train_batch_size * accumulation * accelerator.num_processes
    if args.streaming:
        steps_per_epoch = None
        max_train_steps = args.max_train_steps
    else:
        sampler = StepSampler(dataset.groups(), args.train_batch_size, seed=args.seed, **processes)
        steps_per_epoch = math.ceil(sampler.steps_per_epoch / accumulation)
        max_train_steps = args.max_train_steps or args.num_train_epochs * steps_per_epoch
    validation_loss_steps = args.validation_loss_steps or args.validation_steps
    run = run_settings(args, accelerator.num_processes, data=data_record(examples), models=models)
    run |= held_out_record(held_out_examples)
    if class_prompts:
        run["the hash of --class_prompt"] = hashlib.sha256("\n".join(class_prompts).encode()).hexdigest()[:16]
    if preserve_prompts:
        run["the hash of --preserve_prompts"] = hashlib.sha256("\n".join(preserve_prompts).encode()).hexdigest()[:16]
    stream = None
    if args.streaming and not problems:
        stream, problems = open_stream(**own_dataset(args))
        sampler = streamed_batches(stream, dataset, args, **processes)
        run["files"] = stream.record()
    begun_with = match_processes(checkpoint, run)
    problems += check_run(accelerator, args, max_train_steps, checkpoint, run)
    if not problems:
        sizes = [key.size for key in dataset.image_keys()] if args.cache_latents else []
        problems += check_cache_rooms(
            args,
            prompts=prompts_size(args, len({example.caption for example in examples}), weight_dtype),
            latents=moments_size(args, sizes, weight_dtype),
        )
    problems = gather_problems(problems)
    if problems:
        fail(accelerator, problems)
    sampler.begun_with = begun_with
    hub_repo = create_hub_repo(accelerator, args)
    claim_output_dir(accelerator, args.output_dir, [lora_file(args.output_dir, args.output_name)])

    # 3. Prompts: embedded once; frozen text encoders are freed before the transformer is loaded
    cases = validation_cases(args, examples)
    prompts = {example.caption for example in [*examples, *held_out_examples]}
    prompts.update(texts_of(case.settings for case in cases))
    if cases or args.with_prior_preservation:
        prompts.update(family.more_prompts)
    if args.caption_dropout:
        prompts.add("")
    prompts.update(class_prompts, preserve_prompts)
    prompts.update(example.caption for example in class_examples(args, class_prompts))
    index = EncodedIndex(latents_folder(args), args, run)

    def load_encoders():
        pipeline = family.load_text_encoders(args, encoder_dtype(weight_dtype))
        quantize_text_encoders(pipeline, encoder_dtype(weight_dtype), args.quantize_text_encoders)
        return pipeline

    # where all encoders are frozen, they are loaded if the disk lacks a prompt
    text_pipeline = load_encoders() if args.train_text_encoder else load_encoders
    text_lora_params = []
    if args.train_text_encoder:
        text_lora_params = add_lora(
            text_pipeline.text_encoder,
            rank=args.rank,
            alpha=args.lora_alpha,
            use_rslora=args.use_rslora,
            init_lora_weights=args.init_lora_weights,
            dropout=0.0,
            target_modules=CLIP_TARGET_MODULES,  # always a LoRA: transformers loads no other kind into CLIP
        )
    prompt_encoder = PromptEncoder(
        accelerator,
        text_pipeline,
        weight_dtype,
        max_sequence_length=args.max_sequence_length,
        folder=encoded_folder(args.output_dir),
        trained={"clip_l"} if args.train_text_encoder else set(),
        offload=args.offload,
        disk_cache_dir=args.disk_cache_dir.expanduser() if args.cache_text_encoder_outputs_to_disk else None,
        index=EncodedIndex(prompts_folder(args), args, run),
        keep_encoders=args.streaming,  # the prompts come with the images
    )
    prompt_encoder.cache_prompts(sorted(prompts))
    text_encoders = [text_pipeline.text_encoder] if args.train_text_encoder else []
    with torch.no_grad(), without_adapters(*text_encoders):
        base_pooled = {prompt: prompt_encoder.encode_prompts([prompt])[1] for prompt in preserve_prompts}

    # 4. Models: VAE, class images and cached latents; then the transformer and its LoRA
    noise_scheduler = load_scheduler(args)
    num_present = len(class_examples(args, class_prompts))
    # also if only another machine lacks some, of its own folder: all draw together
    is_short = any(gather_objects([num_present < args.num_class_images]))
    lacks_class_images = args.with_prior_preservation and is_short
    if args.with_prior_preservation and not lacks_class_images:
        dataset.class_examples = class_examples(args, class_prompts)
    held_out_keys = [key for position in range(len(held_out_examples)) for key in held_out.held_out_keys(position)]
    keys = sorted(dataset.image_keys(), key=lambda key: key.size)  # images of one size are encoded together
    if held_out_examples:
        found = index.find(accelerator, "held out", held_out_keys, held_out.pixel_values)
        held_out.moments = found or {}
    if args.cache_latents and not lacks_class_images:
        found = index.find(accelerator, dataset.index_label(), keys, dataset.pixel_values)
        dataset.moments = found or {}
    draws = cases and not args.precompute_only
    needs_vae = draws or lacks_class_images or not dataset.moments or (held_out_examples and not held_out.moments)
    offload_vae = needs_vae and (args.offload or args.cache_latents)
    if needs_vae:
        vae = load_model(family.vae_class, "vae", args, weight_dtype)
        vae.to("cpu" if offload_vae else device)
    else:
        vae = index.load_vae(family.vae_class, dataset.index_label(), keys)
    with offload_models(vae, device=device, offload=offload_vae):
        if lacks_class_images:
            transformer = load_model(family.transformer_class, "transformer", args, weight_dtype)
            if args.quantize_base != "none":
                quantize_base(transformer, weight_dtype, args.quantize_base)
            if args.blocks_to_swap:
                BlockSwap(transformer, args.blocks_to_swap, device)
            elif args.quantize_base != "none":
                transformer.to(device)
            else:
                size = class_image_size(args)
                pixels = args.sample_batch_size * size.height * size.width
                place({"transformer": transformer}, device, pixels=pixels)
            pipeline = create_pipeline(family, transformer, vae, noise_scheduler)
            generate_class_images(
                accelerator,
                pipeline,
                functools.partial(pipeline_call, family, prompt_encoder, args),
                prompts=class_prompts,
                model=models["transformer"],
                folder=args.class_data_dir,
                num_images=args.num_class_images,
                num_present=num_present,
                batch_size=args.sample_batch_size,
                seed=args.seed,
                precision=args.prior_generation_precision,
            )
            del transformer, pipeline  # the one in training is loaded anew, without the hooks of `place`
            free_memory()
            dataset.class_examples = class_examples(args, class_prompts)
            keys = sorted(dataset.image_keys(), key=lambda key: key.size)
        if held_out_examples and not held_out.moments:
            held_out.moments = cache_moments(accelerator, vae, held_out_keys, held_out.pixel_values, index, "held out")
        if args.cache_latents and not dataset.moments:
            dataset.moments = cache_moments(accelerator, vae, keys, dataset.pixel_values, index, dataset.index_label())
    if args.precompute_only:
        encoded = {f"prompts, {name}": embeddings for name, embeddings in prompt_encoder.cached.items()}
        encoded |= {"latents": dataset.moments, "held out": held_out.moments}
        print_precomputed(accelerator, encoded)
        accelerator.end_training()
        return
    transformer = load_model(family.transformer_class, "transformer", args, weight_dtype)
    architecture = family.architecture(transformer.config)
    base_size = transformer.num_parameters()
    guidance_embeds = transformer.config.guidance_embeds  # such as FLUX.1-Fill-dev, which was distilled with guidance
    if args.quantize_base != "none":
        quantize_base(transformer, weight_dtype, args.quantize_base)
    block_by_block = args.fsdp or args.blocks_to_swap  # it may not fit as a whole: `shard` or BlockSwap moves it
    transformer.to("cpu" if block_by_block else device)

    add_lora(
        transformer,
        rank=args.rank,
        alpha=args.lora_alpha,
        use_rslora=args.use_rslora,
        init_lora_weights=args.init_lora_weights,
        dropout=args.lora_dropout,
        target_modules=lora_targets(args, family, transformer),
        modules_to_save=["x_embedder"] if args.train_embedder else None,
        **adapter_options(args),
    )
    adapted_models = {"transformer": transformer}
    if args.train_text_encoder:
        adapted_models["text_encoder"] = text_pipeline.text_encoder
    if args.lora_path:
        start_from_lora(args.lora_path, adapted_models, flux=family.has_clip)
    if args.gradient_checkpointing:
        transformer.enable_gradient_checkpointing()
    if args.compile:
        compile_blocks(transformer)
    if args.blocks_to_swap:
        block_swap = BlockSwap(transformer, args.blocks_to_swap, device)
    if args.fsdp:
        shard(transformer, device, weight_dtype, hybrid=args.hybrid_shard)
    lora_params = [parameter for parameter in transformer.parameters() if parameter.requires_grad]

    # 5. Optimizer and schedule
    lr_scale = total_batch_size if args.scale_lr else 1
    params_to_optimize = [
        {"params": lora_params, "lr": args.learning_rate * lr_scale, "weight_decay": args.adam_weight_decay}
    ]
    if args.train_text_encoder:
        # Prodigy estimates one step size for all groups, so they need the same learning rate
        text_encoder_lr = args.learning_rate if args.optimizer == "prodigy" else args.text_encoder_lr
        params_to_optimize.append(
            {
                "params": text_lora_params,
                "lr": text_encoder_lr * lr_scale,
                "weight_decay": args.adam_weight_decay_text_encoder,
            }
        )
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
    if args.fsdp:  # `shard` has prepared the transformer
        lr_scheduler = accelerator.prepare(lr_scheduler)
    else:
        transformer, optimizer, lr_scheduler = accelerator.prepare(transformer, optimizer, lr_scheduler)
    trained_params = [*lora_params, *text_lora_params]
    result_weights = nullcontext  # what is validated and saved
    averages = {}
    if args.use_ema:
        # sharded tensors have no _foreach_copy_
        ema = EMAModel(trained_params, decay=args.ema_decay, foreach=not args.fsdp)
        averages = {str(i): tensor for i, tensor in enumerate(ema.shadow_params)}
        unwrapped_transformer = accelerator.unwrap_model(transformer)
        result_weights = functools.partial(averaged_weights, ema, trained_params, unwrapped_transformer)
    save_dtype = torch.float32 if args.upcast_before_saving else weight_dtype

    def header(step=None):
        long_edge = max(args.resolution)
        return lora_header(
            args,
            architecture=architecture,
            resolution=(long_edge, long_edge),
            step=step or global_step,
            steps_per_epoch=steps_per_epoch,
            trigger_words=[args.instance_prompt] if args.instance_prompt else [],
        )

    def more_layers():
        return embedder_lora(adapted_models["transformer"]) if args.train_embedder else {}

    register_lora_checkpointing(
        accelerator,
        adapted_models,
        optimizer,
        dtype=save_dtype,
        header=lambda adapter_name: header(),
        result_weights=result_weights,
        teacher=averages,
        more_layers=more_layers,
    )
    best = BestStep(
        accelerator.unwrap_model(transformer),
        trained_params,
        keeps_weights=args.load_best_model_at_end,
        patience=args.early_stopping_patience,
        result_weights=result_weights,
    )
    if held_out_examples:
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
            collate_fn=collate_edits,
            num_workers=args.dataloader_num_workers,
            pin_memory=device.type == "cuda",
            worker_init_fn=outlive_signals,
        )

    # 7. Train
    num_parts = stream.num_parts if stream else 0
    run_info = describe_run(args, examples, held_out_examples, dataset.class_examples, text_lora_params, num_parts)
    if args.use_ema:
        run_info["average"] = f"decay {args.ema_decay:g}, of what is saved and drawn"
    if not args.streaming:
        run_info["sizes"] = count_sizes(dataset.sizes())
        run_info |= describe_small_groups(
            sampler.groups, args.train_batch_size, size_of=lambda group: group[: len(args.resolution)]
        )
    if args.preserve_outputs:
        interval = "every step" if args.preserve_every == 1 else f"every {args.preserve_every} steps"
        run_info["preserved"] = f"outputs for {len(preserve_prompts)} prompts, {interval}"
    run_info |= describe_held_out(held_out_examples, examples, validation_loss_steps)
    print_header(accelerator, args, run_info, lora_params, base_size, max_train_steps, steps_per_epoch)
    result = lora_file(args.output_dir, args.output_name)
    keep_earlier_results(
        accelerator, args.output_dir, [result], first_step=global_step, max_train_steps=max_train_steps
    )
    start_logging(accelerator, args, "influxedit", global_step)
    metrics = None
    if accelerator.is_main_process:
        metrics = Metrics(args.output_dir / "metrics.jsonl", global_step)
    validate = functools.partial(
        held_out_losses,
        accelerator,
        family,
        accelerator.unwrap_model(transformer),
        vae,
        prompt_encoder,
        held_out,
        args,
        guidance_embeds,
        lambda caption: prompts_instead.get(caption, preserve_prompts),
        base_pooled,
    )
    if cases and global_step == 0:
        log_validation(
            accelerator, family, transformer, result_weights, vae, noise_scheduler, prompt_encoder, args, cases, step=0
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
    # No loop over epochs: a run can resume at any micro-step. All that a micro-step draws at random (batch, crops,
    # latents, noise levels, dropout) depends on the seed and its number alone; the order of these draws is what exact
    # resume relies on.
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

            if "mask" in batch:
                batch["mask"] = to_device(batch["mask"], device)
            if args.cache_latents:
                batch["moments"] = to_device(batch["moments"], device)
                batch["references"] = [to_device(moments, device) for moments in batch["references"]]
            else:
                with offload_models(vae, device=device, offload=offload_vae):
                    images = batch["pixel_values"]  # [B, 2, 3, H, W]; with references [B, 1, 3, H, W]
                    batch["moments"] = encode_moments(vae, images.flatten(0, 1)).unflatten(0, images.shape[:2])
                    batch["references"] = [encode_moments(vae, images) for images in batch["references"]]
            latents = family.sample_latents(batch["moments"][:, 0], vae, generator)
            condition = family.condition(batch, vae, generator)
            prompt_embeds, pooled_prompt_embeds = prompt_encoder.encode_prompts(batch["prompt"])
            guidance = None
            if guidance_embeds:
                guidance = torch.full((len(latents),), args.guidance_scale, device=device)
            noise, sigmas = sample_noise(latents, args=args, noise_scheduler=noise_scheduler, generator=generator)
            with accelerator.autocast():
                losses = compute_loss(
                    transformer,
                    latents,
                    noise,
                    sigmas,
                    condition,
                    prompt_embeds,
                    pooled_prompt_embeds,
                    args=args,
                    family=family,
                    guidance=guidance,
                )
            if args.with_prior_preservation:
                instance_losses, prior_losses = losses.chunk(2)  # `collate` puts class images behind the others
                instance_loss = instance_losses.mean()
                prior_loss = prior_losses.mean()
                loss = instance_loss + args.prior_loss_weight * prior_loss
            else:
                loss = losses.mean()
            accelerator.backward(loss)
            loss_sum = loss_sum + loss.detach() / accumulation
            if args.preserve_outputs and step % args.preserve_every == 0:
                # a backward pass of its own: the activations of one batch are in memory at a time
                prompt_draws = torch.rand(len(latents), generator=generator).tolist()
                batch_prompts = []
                for prompt, draw in zip(batch["prompt"], prompt_draws, strict=True):
                    choices = prompts_instead.get(prompt, preserve_prompts)
                    batch_prompts.append(choices[int(draw * len(choices))])
                prompt_embeds, pooled_prompt_embeds = prompt_encoder.encode_prompts(batch_prompts)
                with accelerator.autocast():
                    preserve_loss = compute_preservation_loss(
                        transformer,
                        latents,
                        noise,
                        sigmas,
                        condition,
                        prompt_embeds,
                        pooled_prompt_embeds,
                        torch.cat([base_pooled[prompt] for prompt in batch_prompts]),
                        family=family,
                        guidance=guidance,
                        weighting_scheme=args.weighting_scheme,
                    ).mean()
                preserve_loss = args.preserve_outputs * preserve_loss
                accelerator.backward(preserve_loss)
                loss_sum = loss_sum + preserve_loss.detach() / accumulation
            if not accelerator.sync_gradients:
                continue

            average_gradients(accelerator, text_lora_params)
            grad_norm = accelerator.clip_grad_norm_(trained_params, args.max_grad_norm or math.inf)
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
                ema.step(trained_params)

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
        validates = held_out_examples and (global_step % validation_loss_steps == 0 or global_step == 1 or done)
        saves = global_step % args.checkpointing_steps == 0
        draws = cases and global_step % args.validation_steps == 0
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
                args,
                cases,
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
    lora = lora_file(args.output_dir, args.output_name)
    with best.weights():
        save_lora(
            lora.parent,
            adapted_models,
            save_dtype,
            weight_name=lora.name,
            header=header(best.result_step),
            more_layers=more_layers(),
            writes=writes_files(accelerator),
        )
    if accelerator.is_main_process:
        metrics.close()
        plot_metrics(args.output_dir)
    images = []
    if cases:
        images = log_validation(
            accelerator,
            family,
            transformer,
            best.weights,
            vae,
            noise_scheduler,
            prompt_encoder,
            args,
            cases,
            global_step,
            weights_of=best.result_step,
        )
    if stop_agreed(accelerator):
        checkpoint = save()
        transformer = None
        stop_interrupted(accelerator, global_step, checkpoint)
    interruption.stop_saving()
    if images:
        add_thumbnail(accelerator, [lora], images[-1])
    example_prompt = cases[0].prompt if cases else examples[0].caption
    if accelerator.is_main_process:
        save_model_card(args, weight_dtype, example_prompt, hub_repo, held_out=best.summary())
    remove_encoded(accelerator, args.output_dir)
    transformer = None  # DistributedDataParallel must be freed before the process group: gloo can hang otherwise
    accelerator.free_memory()
    accelerator.end_training()
    results = {
        "LoRA": lora.absolute(),
        "usage": "README.md",
        "loss": "loss.png",
        "images": "validation",
    }
    files_beside = [lora] if args.output_name else []
    command = generate_command(args, example_prompt)
    check_taken(taken_steps, args.output_dir, has_scaler=accelerator.scaler is not None)
    if held_out_examples:
        accelerator.print(best.summary())
    finish(accelerator, args, global_step, results, command, hub_repo, files_beside=files_beside)


if __name__ == "__main__":
    main(parse_args())
