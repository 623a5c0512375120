"""Teaches FLUX.1 or FLUX.2 a subject or a style from a few images: DreamBooth LoRA, pivotal tuning, textual inversion.

The transformer predicts the velocity of a noisy latent. It stays frozen; a LoRA in its layers is trained:

    x_σ = (1 - σ) x_0 + σ ε        loss = w(σ) || transformer(x_σ, σ, prompt) - (ε - x_0) ||²

One GPU, or all of them after `accelerate config`:

    accelerate launch train_dreambooth_flux_advanced.py \\
      --pretrained_model_name_or_path=black-forest-labs/FLUX.1-dev \\
      --instance_data_dir=photos --instance_prompt="a photo of sks dog" \\
      --mixed_precision=bf16 --gradient_checkpointing --cache_latents --train_batch_size=1 \\
      --rank=16 --lora_alpha=16 --learning_rate=1e-4 --max_train_steps=1000 \\
      --validation_prompt="sks dog on the beach" --output_dir=sks-dog

`output_dir` then holds `pytorch_lora_weights.safetensors` for `FluxPipeline.load_lora_weights`, a model card, the
arguments (args.json), the loss (metrics.jsonl, loss.png), images (validation/) and checkpoints to resume from.

    paper                                     in diffusers' script      here
    LoRA (2106.09685)                         LoraConfig                common/lora.py add_lora
    flow matching (2403.03206)                get_sigmas, target        compute_loss
    DreamBooth, prior loss (2208.12242, (2))  prior_loss                instance_loss + prior_loss in train
    textual inversion (2208.01618)            TokenEmbeddingsHandler    TokenEmbeddingsHandler
    pivotal tuning (2106.05744)               pivoted_te, pivoted_tr    training_stops, PromptEncoder.freeze
"""

import argparse
import contextlib
import copy
import difflib
import functools
import glob
import hashlib
import inspect
import itertools
import json
import math
import os
import re
import shlex
import time
import tomllib
from collections.abc import Callable
from dataclasses import dataclass, field, replace
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
    square_side,
    worker_count,
)
from common.block_swap import BlockSwap, check_block_count
from common.checkpoints import (
    agreed_checkpoint,
    atomic_write,
    catch_signals,
    check_disk,
    check_output_dir,
    check_places,
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
    IMAGE_SUFFIXES,
    INTERPOLATION,
    Example,
    Size,
    SkippedSamples,
    StepSampler,
    StreamedBatches,
    all_images,
    alpha_channel,
    check_buckets,
    check_captions,
    check_class_images,
    check_dataset_flags,
    check_num_samples,
    check_roles,
    check_shape,
    check_stems,
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
    gather_places,
    header_size,
    image_files,
    map_examples,
    match_any,
    nearest_bucket,
    open_stream,
    parse_buckets,
    place_in_run,
    quoted,
    read_batches,
    read_class_images,
    read_dataset,
    read_folder,
    read_prompts,
    read_sizes,
    read_stream_start,
    read_text,
    replace_words,
    resolve_num_workers,
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
    TensorCache,
    cache_moments,
    check_cache_rooms,
    check_disk_cache,
    encode_moments,
    encoded_folder,
    flux2_latents,
    image_ids,
    latents_folder,
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
    RESUME_PREFIX,
    adapter_kind,
    adapter_options,
    adapter_size,
    add_lora,
    average_gradients,
    averaged_weights,
    block_layers,
    check_adapter,
    check_lora_file,
    is_target,
    layer_shapes,
    lora_file,
    register_lora_checkpointing,
    save_lora,
    start_from_lora,
    target_layers,
    unknown_layers,
    without_adapters,
)
from common.lora_formats import FLUX_LAYERS, LORA_FORMS, diffusers_state_dict, full_name
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
    is_lora,
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
    freeze_models,
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
    generate_class_images,
    generate_images,
    read_validation_prompts,
    repeated_prompt,
    sampling_arguments,
    save_images,
    texts_of,
    undisturbed,
    with_defaults,
)

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import InitProcessGroupKwargs, ProjectConfiguration, set_seed
from diffusers import (
    AutoencoderKL,
    AutoencoderKLFlux2,
    DiffusionPipeline,
    FlowMatchEulerDiscreteScheduler,
    Flux2KleinPipeline,
    Flux2Pipeline,
    Flux2Transformer2DModel,
    FluxPipeline,
    FluxTransformer2DModel,
)
from diffusers.loaders.single_file_utils import convert_ldm_vae_checkpoint
from diffusers.optimization import get_scheduler
from diffusers.training_utils import EMAModel, compute_loss_weighting_for_sd3, free_memory, offload_models
from diffusers.utils import logging as diffusers_logging
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch.utils.data import DataLoader, Dataset
from tqdm.auto import tqdm
from transformers import AutoTokenizer, CLIPTextConfig, CLIPTextModel, T5Config, T5EncoderModel
from transformers.utils import logging as transformers_logging


# ---------------------------------------------------------------------------------------------------------------------
# Arguments
# ---------------------------------------------------------------------------------------------------------------------


def create_parser():
    parser = Parser(
        description="Teaches FLUX.1 or FLUX.2 a subject or a style from a few images: DreamBooth LoRA, pivotal "
        "tuning, textual inversion.",
        epilog="""example:
  accelerate launch train_dreambooth_flux_advanced.py @examples/dreambooth/low_memory.args \\
    --pretrained_model_name_or_path=black-forest-labs/FLUX.1-dev --instance_data_dir=photos \\
    --instance_prompt="a photo of sks dog" --validation_prompt="sks dog on the beach" --output_dir=sks-dog""",
        other_flags=KOHYA_FLAGS,
    )

    arg = parser.add_argument_group("model", "the pretrained model, its precision and memory").add_argument
    arg(
        "--pretrained_model_name_or_path",
        type=name_or_path,
        required=True,
        metavar="MODEL",
        help="folder or Hub id of a FLUX.1 or FLUX.2 pipeline, or FLUX.1's transformer as a single .safetensors file",
    )
    arg("--ae", type=Path, metavar="FILE", help="ae.safetensors, if MODEL is a single file")
    arg("--clip_l", type=Path, metavar="FILE", help="clip_l.safetensors, if MODEL is a single file")
    arg("--t5xxl", type=Path, metavar="FILE", help="t5xxl_fp16.safetensors, if MODEL is a single file")
    arg(
        "--tokenizer_dir",
        type=Path,
        metavar="DIR",
        help="folder of FLUX.1's tokenizer and tokenizer_2, if MODEL is a single file (default: tokenizers beside the "
        "folder of MODEL)",
    )
    arg("--revision", help="revision of the model on the Hub")
    arg("--variant", help="variant of the model's files, such as fp16")
    arg("--cache_dir", type=name_or_path, help="folder for downloaded models and datasets")
    arg(
        "--max_sequence_length",
        "--t5xxl_max_token_length",
        type=in_range(int, 1, 512),
        help="tokens per prompt; longer prompts are cut (default: what the model takes, 512, FLUX.1-schnell 256)",
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
    arg(
        "--compile",
        "--torch_compile",
        action="store_true",
        help="compile the transformer's blocks: minutes once, then faster steps",
    )
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

    arg = parser.add_argument_group("data", "a folder of images, a dataset, or a data.toml").add_argument
    arg("--instance_data_dir", type=Path, help="folder of images; captions in .txt files or metadata.jsonl")
    arg("--dataset_name", type=name_or_path, help="dataset on the Hub, or a folder or file that `datasets` loads")
    arg("--dataset_config", type=Path, metavar="DATA.TOML", help="folders and options as kohya's sd-scripts read them")
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
    arg("--image_column", default="image", help="column of the dataset that holds the images")
    arg("--caption_column", help="column of the dataset or of metadata.jsonl that holds captions")
    arg("--instance_prompt", help="prompt of every image without a caption, such as a photo of sks dog")
    arg(
        "--caption_dropout",
        "--caption_dropout_rate",
        type=fraction,
        default=0.0,
        help="probability of training without the caption, 0 to 1",
    )
    arg(
        "--caption_dropout_to",
        choices=("empty", "instance_prompt"),
        default="empty",
        help="what stands in for a dropped caption: nothing, or --instance_prompt (class_tokens), so that the bare "
        "prompt is learned beside the captions",
    )
    arg(
        "--repeats",
        type=in_range(int, 1, 10_000),
        default=1,
        help="times each image is used per epoch, each with its own crop",
    )
    arg("--resolution", type=square_side, default=512, help="side in pixels that images are resized and cropped to")
    arg("--aspect_ratio_buckets", metavar="H,W;H,W", help="sizes instead of --resolution; an image gets the nearest")
    arg(
        "--center_crop",
        action=Switch,
        default=False,
        help="crop the center (default: a random part, fixed for each image)",
    )
    arg("--random_flip", action="store_true", help="mirror half of the samples; not for faces, text or logos")
    arg("--image_interpolation_mode", choices=INTERPOLATION, default="lanczos", help="filter for resizing images")
    arg("--train_batch_size", type=positive_int, default=4, help="images per device and forward pass")
    arg(
        "--dataloader_num_workers",
        "--max_data_loader_n_workers",
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

    arg = parser.add_argument_group(
        "prior preservation", "class images, so that the class stays as it is"
    ).add_argument
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
    arg(
        "--prior_target",
        choices=("image", "base"),
        default="image",
        help="what is to be predicted for a class image: the image, or what the model predicts without the adapter, "
        "which keeps more",
    )
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

    arg = parser.add_argument_group("masked loss", "which part of an image is learned").add_argument
    arg("--mask_data_dir", type=Path, help="folder of masks, named like the images; white parts are learned")
    arg("--alpha_mask", action="store_true", help="use the images' alpha channels as masks; opaque parts are learned")
    arg(
        "--unmasked_weight",
        type=fraction,
        default=0.0,
        help="loss weight of what a mask leaves out, 0 to 1; of the rest 1",
    )

    arg = parser.add_argument_group("pivotal tuning", "what is trained in the text encoders").add_argument
    arg(
        "--network_train_unet_only",
        dest="train_text_encoder",
        action="store_false",
        default=False,
        help="train no LoRA on CLIP, as without --network_module",
    )
    arg("--train_text_encoder", action="store_true", help="also train a LoRA on CLIP")
    arg(
        "--train_text_encoder_ti",
        action="store_true",
        help="train embeddings of new tokens (arXiv 2106.05744) in CLIP",
    )
    arg("--enable_t5_ti", action="store_true", help="train embeddings of the new tokens in T5 too")
    arg("--token_abstraction", default="TOK", help="words in prompts and captions that new tokens replace: A,B")
    arg("--num_new_tokens_per_abstraction", type=positive_int, help="new tokens for each such word (default: 2)")
    arg(
        "--initializer_concept",
        metavar="WORDS",
        help="words whose embeddings new tokens start with, one for all or one each: A,B (default: noise)",
    )
    arg("--train_text_encoder_frac", type=fraction, default=1.0, help="fraction of the steps that train CLIP's LoRA")
    arg("--train_text_encoder_ti_frac", type=fraction, default=0.5, help="fraction of the steps that train new tokens")
    arg(
        "--train_transformer_frac",
        type=fraction,
        default=1.0,
        help="fraction of the steps that train the transformer's LoRA",
    )

    arg = parser.add_argument_group("lora", "the adapter").add_argument
    arg(
        "--rank",
        "--network_dim",
        type=positive_int,
        default=4,
        help="rank of the LoRA: its capacity and size; 16 to 64 for detail",
    )
    arg("--lora_alpha", "--network_alpha", type=positive_float, help="LoRA scale is lora_alpha / rank (default: rank)")
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
        help="layers with a LoRA, such as attn.to_k,ff.net.2, or kohya for all linear layers in the blocks (default: "
        "attention and feed-forward layers; FLUX.2: as kohya)",
    )

    arg(
        "--network_module",
        choices=("networks.lora_flux",),
        help="for commands of kohya's sd-scripts: flags that are not given have its defaults, --lora_layers kohya, "
        "--train_text_encoder, --lora_alpha 1, --train_batch_size 1, --lr_warmup_steps 0, --text_encoder_lr as "
        "--learning_rate, weight decay 0.01, Prodigy without weight decay, bias correction and safeguard",
    )

    arg = parser.add_argument_group("noise", "which noise levels are trained, and with which weight").add_argument
    arg(
        "--guidance_scale",
        type=non_negative_float,
        default=3.5,
        help="value passed to the guidance embedding (FLUX.1-dev, FLUX.2-dev)",
    )
    arg(
        "--timestep_sampling",
        choices=TIMESTEP_SAMPLING,
        default="sigma",
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
        "--optimizer_type",
        type=optimizer_name,
        choices=("adamw", "prodigy"),
        default="AdamW",
        help="prodigy finds the learning rate itself: set --learning_rate 1",
    )
    arg(
        "--learning_rate", type=positive_float, default=1e-4, help="learning rate; 1 for prodigy, about 1e-4 for adamw"
    )
    arg(
        "--text_encoder_lr",
        type=positive_float,
        default=5e-6,
        help="learning rate of the text encoders; unused by prodigy",
    )
    arg("--scale_lr", action="store_true", help="multiply learning rates by the total batch size")
    arg("--lr_scheduler", choices=LR_SCHEDULERS, default="constant", help="learning rate schedule")
    arg("--lr_warmup_steps", type=in_range(int, 0), default=500, help="linear warmup steps; constant has none")
    arg(
        "--lr_num_cycles",
        "--lr_scheduler_num_cycles",
        type=positive_int,
        default=1,
        help="cycles of cosine_with_restarts",
    )
    arg("--lr_power", "--lr_scheduler_power", type=positive_float, default=1.0, help="power of polynomial; 1: linear")
    arg("--use_8bit_adam", action="store_true", help="AdamW with 8-bit states (bitsandbytes), to save memory")
    arg("--adam_beta1", type=decay_rate, default=0.9, help="decay of the gradient's running mean, also in Prodigy")
    arg("--adam_beta2", type=decay_rate, default=0.999, help="decay of the squared gradient's mean, also in Prodigy")
    arg("--adam_weight_decay", type=non_negative_float, default=1e-4, help="weight decay, also in Prodigy")
    arg(
        "--adam_weight_decay_text_encoder",
        type=non_negative_float,
        default=1e-3,
        help="weight decay of the text encoders",
    )
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

    arg = parser.add_argument_group("schedule and checkpoints", "how long, and what can be resumed").add_argument
    arg(
        "--seed",
        type=seed_number,
        default=0,
        help="random seed for data order, crops, noise, adapter init and validation",
    )
    arg("--num_train_epochs", "--max_train_epochs", type=positive_int, default=1, help="passes over the data")
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

    arg = parser.add_argument_group("validation", "images while training, without effect on it").add_argument
    arg("--validation_prompt", help="prompt to generate before, during and after training")
    arg(
        "--validation_prompts",
        "--sample_prompts",
        type=Path,
        metavar="FILE",
        help="file of such prompts instead, an image each; a line is such as 'a dog --w 512 --d 1 --am 0.8'",
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
        help="guidance_scale of the pipeline in them (default: the pipeline's)",
    )

    arg = parser.add_argument_group("output and logging", "where results and logs are written").add_argument
    arg("--output_dir", type=Path, default=Path("flux-dreambooth-lora"), help="folder for all results")
    arg(
        "--output_name",
        type=file_name,
        metavar="NAME",
        help="the LoRA becomes output_dir/NAME.safetensors, the rest output_dir/NAME/",
    )
    arg(
        "--save_format",
        choices=LORA_FORMS,
        default="diffusers",
        help="form of NAME.safetensors: kohya's for its own tools (diffusers reads it at FLUX.1's size alone), "
        "or the one that all others read",
    )
    arg("--save_every_n_epochs", type=positive_int, metavar="N", help="also save NAME-00000N.safetensors")
    for entry in METADATA:
        arg(f"--metadata_{entry}", help=f"{entry} in the header of the LoRA's file")
    arg("--logging_dir", type=Path, default=Path("logs"), help="folder for the trackers' files, inside output_dir")
    arg(
        "--report_to",
        "--log_with",
        choices=TRACKERS,
        default="tensorboard",
        help="trackers for metrics and validation images",
    )
    arg("--upcast_before_saving", action="store_true", help="save the LoRA in float32 instead of --mixed_precision")
    arg("--verbose", action="store_true", help="show the libraries' messages and progress bars")
    arg("--push_to_hub", action="store_true", help="upload the results to the Hub, without checkpoints and logs")
    arg("--hub_token", help="Hub token (default: your login); never logged or saved")
    arg("--hub_model_id", help="Hub repository (default: the name of output_dir)")

    return parser


def parse_args(argv=None):
    parser = create_parser()
    args = parser.parse_args(argv)
    if args.network_module:
        parser.set_defaults(**kohya_defaults(args))
        args = parser.parse_args(argv)
    if is_single_file(args) and args.tokenizer_dir is None:
        args.tokenizer_dir = Path(args.pretrained_model_name_or_path).parent.parent / "tokenizers"
    args.mixed_precision = resolve_precision(args.mixed_precision)
    args.dataloader_num_workers = resolve_num_workers(args.dataloader_num_workers)
    args.lora_alpha = args.lora_alpha or args.rank
    if args.cache_latents_to_disk:
        args.cache_latents = True
    if args.output_name:
        args.output_dir /= args.output_name
    args.pool_at_eos = args.train_text_encoder_ti  # no flag, but recorded as one, see `pools_at_eos`
    problems = check_args(args) + check_hub(args) + check_trackers(args) + check_weights(args) + check_model(args)
    problems += check_adapter(args) + check_attention(args)
    problems += check_launcher(args) + check_output_dir(args)
    parser.refuse(problems + check_results(args, result_files(args), [args.lora_path] if args.lora_path else []))
    parser.remark(idle_flags(args, shared_needs(args), needs(args)))
    return args


def optimizer_name(text):
    """An argparse type: a name in lower case."""
    name = text.lower()
    if name == "adamw8bit":
        raise argparse.ArgumentTypeError(f"{text}: give --optimizer adamw --use_8bit_adam")
    return name


def kohya_defaults(args):
    """The defaults of flux_train_network.py in kohya's sd-scripts, where they differ from ours."""
    weight_decay = 0.0 if args.optimizer == "prodigy" else 0.01  # prodigyopt's and torch's
    return {
        "lora_layers": "kohya",
        "train_text_encoder": True,
        "lora_alpha": 1,
        "train_batch_size": 1,
        "lr_warmup_steps": 0,
        "text_encoder_lr": args.learning_rate,
        "adam_weight_decay": weight_decay,
        "adam_weight_decay_text_encoder": weight_decay,
        "prodigy_use_bias_correction": False,
        "prodigy_safeguard_warmup": False,
    }


def needs(args):
    """{what: (whether this run has it, the flags that are read with it alone)}, see `idle_flags`."""
    trains_text = args.train_text_encoder or args.train_text_encoder_ti
    one_prompt = args.validation_prompt or args.final_validation_prompt
    draws = one_prompt or args.validation_prompts
    family = find_family(args)
    return noise_needs(args) | {
        "--with_prior_preservation": (
            args.with_prior_preservation,
            ("num_class_images", "sample_batch_size", "prior_generation_precision"),
        ),
        "--with_prior_preservation or --dataset_config": (
            args.with_prior_preservation or args.dataset_config,
            ("prior_loss_weight", "prior_target"),
        ),
        "--caption_dropout or --dataset_config": (
            args.caption_dropout or args.dataset_config,
            ("caption_dropout_to",),
        ),
        "--train_text_encoder or --train_text_encoder_ti": (
            trains_text,
            ("text_encoder_lr", "adam_weight_decay_text_encoder"),
        ),
        "--train_text_encoder_ti": (args.train_text_encoder_ti, ("token_abstraction",)),
        "a model with a guidance embedding": (family.reads_guidance, ("guidance_scale",)),
        "a model that draws with guidance": (family.draws_with_guidance, ("validation_guidance_scale",)),
        "--train_transformer_frac above 0": (
            args.train_transformer_frac > 0,
            (
                *("rank", "lora_alpha", "use_rslora", "init_lora_weights", "lora_dropout", "lora_layers"),
                *("use_dora", "lora_type", "adam_weight_decay"),
            ),
        ),
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
        "--use_ema": (args.use_ema, ("ema_decay",)),
        "--streaming": (args.streaming, ("shuffle_buffer",)),
        "--dataset_name or --data_files": (args.dataset_name or args.data_files, ("image_column",)),
        "--mask_data_dir, --alpha_mask or --dataset_config": (
            args.mask_data_dir or args.alpha_mask or args.dataset_config,
            ("unmasked_weight",),
        ),
    }


def check_args(args):
    """Problems of the flags: those that contradict each other, and those that would have no effect."""
    problems = []

    # data
    sources = (args.instance_data_dir, args.dataset_name, args.data_files, args.dataset_config)
    if sum(bool(source) for source in sources) != 1:
        problems.append(
            "exactly one of --instance_data_dir, --dataset_name, --data_files and --dataset_config is needed"
        )
    problems += check_dataset_flags(args)
    if args.streaming:
        if args.repeats != 1:
            problems.append(f"--repeats {args.repeats} has no effect with --streaming: leave one out")
        if args.save_every_n_epochs:
            problems.append("--save_every_n_epochs: the length of a stream is not known, use --checkpointing_steps")
        if args.train_text_encoder_ti:
            problems.append("--train_text_encoder_ti checks all captions before training: leave out --streaming")
        for flag in ("class_prompt", "preserve_prompts"):
            if "=>" in (vars(args)[flag] or ""):
                problems.append(
                    f"--{flag} {vars(args)[flag]!r} reads all captions before training: leave out --streaming"
                )
    if args.caption_dropout_to == "instance_prompt" and not (args.instance_prompt or args.dataset_config):
        problems.append("--caption_dropout_to instance_prompt needs --instance_prompt")
    if args.dataset_config:
        for flag in ("with_prior_preservation", "aspect_ratio_buckets", "center_crop", "caption_column", "scale_lr"):
            if vars(args)[flag]:
                problems.append(f"--{flag} has no effect with --dataset_config")
    if args.resolution % 16:
        nearest = args.resolution // 16 * 16
        problems.append(f"--resolution {args.resolution} must be a multiple of 16, such as {nearest}")
    problems += check_buckets(args.aspect_ratio_buckets, multiple=16)
    problems += check_disk_cache(args)

    # prior preservation
    if args.with_prior_preservation:
        if not (args.class_data_dir and args.class_prompt):
            problems.append("--with_prior_preservation needs --class_data_dir and --class_prompt")
    elif args.class_data_dir or args.class_prompt:
        problems.append("--class_data_dir and --class_prompt have no effect without --with_prior_preservation")
    if args.class_data_dir and args.class_data_dir.exists() and not args.class_data_dir.is_dir():
        problems.append(f"--class_data_dir {args.class_data_dir}: a file of this name is in the way")
    if args.prior_generation_precision in ("no", "fp32") and args.mixed_precision in ("fp16", "bf16"):
        problems.append(
            f"--prior_generation_precision {args.prior_generation_precision}: the model is loaded in "
            f"{args.mixed_precision}"
        )
    if args.prior_target == "base" and args.dataset_config and args.fsdp:
        problems.append(  # is_reg images are not in the batches of all processes, which a forward pass needs
            "--prior_target base does not work with --fsdp and --dataset_config: leave one out"
        )

    # output preservation
    if args.preserve_outputs and not args.preserve_prompts:
        problems.append("--preserve_outputs needs --preserve_prompts")
    if args.preserve_outputs is None:
        for flag in ("preserve_prompts", "preserve_every"):
            is_measured = flag == "preserve_prompts" and (args.validation_data_dir or args.validation_split)
            if flag in args.changed and not is_measured:
                problems.append(f"--{flag} {vars(args)[flag]} needs --preserve_outputs, such as 1")
    if args.preserve_outputs and args.train_transformer_frac == 0:
        problems.append("--preserve_outputs has no effect with --train_transformer_frac 0: no adapter is trained")

    # masked loss
    if args.mask_data_dir and args.alpha_mask:
        problems.append("--mask_data_dir and --alpha_mask exclude each other: choose one")
    if args.mask_data_dir and args.dataset_config:
        problems.append("--mask_data_dir has no effect with --dataset_config: conditioning_data_dir in it is the same")
    if args.mask_data_dir and args.validation_data_dir:
        problems.append(
            "--validation_data_dir does not go with --mask_data_dir: hold out by --validation_split instead"
        )
    if args.mask_data_dir and (args.dataset_name or args.data_files):
        given = "--dataset_name" if args.dataset_name else "--data_files"
        problems.append(f"--mask_data_dir goes with --instance_data_dir, not with {given}")
    problems += check_roles({"--instance_data_dir": args.instance_data_dir, "--mask_data_dir": args.mask_data_dir})
    if args.unmasked_weight == 1:
        problems.append("--unmasked_weight 1 leaves masks without effect: leave them out")

    # pivotal tuning
    if args.train_text_encoder and args.train_text_encoder_ti:
        problems.append("--train_text_encoder and --train_text_encoder_ti exclude each other: choose one")
    if args.enable_t5_ti and args.quantize_text_encoders != "none":
        problems.append(
            f"--quantize_text_encoders {args.quantize_text_encoders} is for a frozen T5, --enable_t5_ti trains it: "
            "leave one out"
        )
    if not args.train_text_encoder_ti:
        for flag in ("enable_t5_ti", "initializer_concept", "num_new_tokens_per_abstraction"):
            if vars(args)[flag]:
                problems.append(f"--{flag} needs --train_text_encoder_ti")
        if args.train_text_encoder_ti_frac != 0.5:
            problems.append(
                f"--train_text_encoder_ti_frac {args.train_text_encoder_ti_frac} needs --train_text_encoder_ti"
            )
    elif args.train_text_encoder_ti_frac == 0 and args.train_transformer_frac > 0:  # else see below
        problems.append("--train_text_encoder_ti_frac 0 leaves the new tokens as noise: train them, such as 0.5")
    if args.train_text_encoder and args.train_text_encoder_frac == 0:
        problems.append("--train_text_encoder_frac 0 trains nothing of CLIP: leave out --train_text_encoder")
    if args.train_text_encoder_frac < 1 and not args.train_text_encoder:
        problems.append(f"--train_text_encoder_frac {args.train_text_encoder_frac} needs --train_text_encoder")
    for flag in ("train_text_encoder", "train_text_encoder_ti"):
        if args.fsdp and vars(args)[flag]:
            problems.append(f"--{flag} does not work with --fsdp: leave one out")
    trains_new_tokens = args.train_text_encoder_ti and args.train_text_encoder_ti_frac > 0
    if args.train_transformer_frac == 0 and not trains_new_tokens:
        problems.append("--train_transformer_frac 0 leaves nothing to train without --train_text_encoder_ti")
    if args.train_transformer_frac == 0 and args.lora_path:
        problems.append("--lora_path has no effect with --train_transformer_frac 0: leave one out")
    if args.num_new_tokens_per_abstraction and args.initializer_concept:
        problems.append("--num_new_tokens_per_abstraction has no effect with --initializer_concept: leave one out")
    abstractions = comma_list(args.token_abstraction)
    concepts = comma_list(args.initializer_concept)
    if not abstractions or len(set(abstractions)) < len(abstractions):
        problems.append(f"--token_abstraction {args.token_abstraction!r}: one word, or several different ones: A,B")
    if len(concepts) > 1 and len(concepts) != len(abstractions):
        problems.append(
            f"--initializer_concept names {len(concepts)} concepts for {len(abstractions)} of --token_abstraction"
        )

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
    if args.mixed_precision == "fp16" and not torch.accelerator.is_available():
        problems.append("--mixed_precision fp16 needs a GPU: use bf16 or no")

    # validation and output
    problems += check_held_out(args)
    if args.validation_prompt and args.validation_prompts:
        problems.append("--validation_prompt and --validation_prompts exclude each other: choose one")
    if args.validation_steps and not (args.validation_prompt or args.validation_prompts):
        needed = "--validation_prompt or --validation_prompts"
        problems.append(f"--validation_steps {args.validation_steps} needs {needed}")
    if args.final_validation_prompt and args.skip_final_inference:
        problems.append("--final_validation_prompt has no effect with --skip_final_inference: leave one out")
    if (args.save_every_n_epochs or args.save_format == "kohya") and not args.output_name:
        problems.append("--save_every_n_epochs and --save_format need --output_name")
    if adapter_kind(args) != "LoRA" and args.save_format == "kohya":
        problems.append(f"--save_format kohya has no {adapter_kind(args)}: leave one out")
    return problems


def check_model(args):
    """Problems of --pretrained_model_name_or_path, --lora_layers and the disk, from the transformer's config alone."""
    flag = f"--pretrained_model_name_or_path {args.pretrained_model_name_or_path}"
    if is_single_file(args):
        problems = check_single_files(args)
        if problems:
            return problems
    elif args.ae or args.clip_l or args.t5xxl or args.tokenizer_dir:
        return [f"--ae, --clip_l, --t5xxl and --tokenizer_dir belong to a single .safetensors file, but: {flag}"]
    try:
        config = transformer_config(args)
        channels = 16 if is_single_file(args) else latent_channels(args)
        family = find_family(args)
    except (OSError, ValueError) as error:
        reason = why_no_pipeline(
            args.pretrained_model_name_or_path, "a FLUX pipeline", "black-forest-labs/FLUX.1-dev", error
        )
        return [f"{flag}: {reason}"]
    in_channels = 4 * channels  # a token is a patch of 2 x 2 latents
    if config.get("_class_name") != family.transformer_class.__name__ or config.get("in_channels") != in_channels:
        found = f"{config.get('_class_name')} with {config.get('in_channels')} input channels"
        return [f"{flag}: holds a {found}, not {family.kind}, where its VAE makes {in_channels}"]
    if not family.has_clip:
        problems = check_without_clip(args, family)
        if problems:
            return problems
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
    target_modules = lora_targets(args, family, transformer)
    unknown = unknown_layers(transformer, target_modules)
    if unknown:
        return [
            f"--lora_layers: the transformer has no linear layer {', '.join(unknown)}; kohya means all in the blocks"
        ]
    outside_blocks = [name for name, _ in target_layers(transformer, target_modules) if "_blocks." not in name]
    if args.save_format == "kohya" and outside_blocks:
        return [
            f"--save_format kohya: neither diffusers nor sd-scripts reads {', '.join(outside_blocks)} in that form: "
            "leave them out of --lora_layers, or save the default form"
        ]
    lora_size = 0
    for _, layer in target_layers(transformer, target_modules):
        lora_size += adapter_size(args, layer)
    if args.lora_path:
        shapes = layer_shapes("transformer", transformer, target_modules)
        if args.train_text_encoder:
            shapes |= clip_shapes(args)
        problems = check_lora_file(args.lora_path, shapes, args.rank, flux=family.has_clip, **adapter_options(args))
        if problems:
            return problems
    # float32: a checkpoint holds the LoRA twice, Adam's two moments and what these flags keep; the result
    num_copies = 5 + args.use_ema + args.load_best_model_at_end
    return check_disk(args, 4 * num_copies * lora_size)


def check_without_clip(args, family):
    """Problems of flags that only FLUX.1 has a use for."""
    if args.network_module:  # its defaults are refused below
        return [f"--network_module {args.network_module} is for FLUX.1: leave it out for {family.kind}"]
    problems = []
    if args.train_text_encoder:
        problems.append(f"--train_text_encoder trains CLIP, which {family.kind} does not have: leave it out")
    if args.train_text_encoder_ti:
        problems.append(
            f"--train_text_encoder_ti trains new tokens of CLIP and T5, which {family.kind} does not have, and "
            f"{family.pipeline_class.__name__} loads no files of tokens: leave it out"
        )
    if args.save_format == "kohya":
        problems.append(
            f"--save_format kohya has the names of FLUX.1's layers: leave it out for {family.kind}, whose files "
            "diffusers and ComfyUI read in the default form"
        )
    return problems


# ---------------------------------------------------------------------------------------------------------------------
# Families of models
# ---------------------------------------------------------------------------------------------------------------------


class Flux:
    """FLUX.1: dev, schnell, Krea, and Kontext, which draws from a prompt alone where it has no reference image.

    A family is what differs between models. `latents` are [B, C, H/8, W/8], normalized; the transformer takes them as
    `pack_latents` makes them, tokens [B, H/16 * W/16, 4C].
    """

    kind = "FLUX.1-dev or -schnell"
    pipeline_class = FluxPipeline
    transformer_class = FluxTransformer2DModel
    vae_class = AutoencoderKL
    text_parts = ("text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2")
    tokenizers = {"clip_l": "tokenizer", "t5": "tokenizer_2"}  # {name: its folder}
    settings: dict[str, Any] = {}  # of the pipeline, beside its models
    sampling: dict[str, Any] = {}  # arguments of the pipeline's call that differ from its defaults
    more_prompts: tuple[str, ...] = ()  # that sampling needs
    has_clip = True  # which can be trained; else a language model alone reads prompts
    reads_guidance = True  # or may: FLUX.1-schnell does not
    draws_with_guidance = True  # likewise

    def __init__(self, index: dict):
        """`index` is the content of the pipeline's model_index.json."""

    def load_text_encoders(self, args: argparse.Namespace, dtype: torch.dtype) -> DiffusionPipeline:
        """A pipeline with frozen text encoders and tokenizers alone."""
        return load_text_pipeline(self.pipeline_class, args, dtype)

    def longest_prompt(self, config: dict) -> int:
        """The largest --max_sequence_length for a transformer with this config."""
        return 512 if config["guidance_embeds"] else 256

    def architecture(self, config: dict) -> str:
        """The name in the header of a LoRA file."""
        return "flux-1-dev" if config["guidance_embeds"] else "flux-1-schnell"

    def target_modules(self, transformer: torch.nn.Module) -> list[str]:
        """The layers that get a LoRA without --lora_layers."""
        return list(FLUX_TARGET_MODULES)

    def sample_latents(self, moments: torch.Tensor, vae: torch.nn.Module, generator: torch.Generator) -> torch.Tensor:
        """Latents [B, C, h, w] of posteriors [B, 2C, h, w]."""
        return sample_latents(moments, vae.config, generator)

    def predict(
        self,
        transformer: torch.nn.Module,
        tokens: torch.Tensor,
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
            hidden_states=tokens,
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


class Flux2(Flux):
    """FLUX.2-dev: one language model reads prompts, position ids have four axes, and running statistics of the VAE
    normalize each of the 4C numbers of a token."""

    kind = "FLUX.2"
    pipeline_class = Flux2Pipeline
    transformer_class = Flux2Transformer2DModel
    vae_class = AutoencoderKLFlux2
    text_parts = ("text_encoder", "tokenizer")
    tokenizers = {"llm": "tokenizer"}
    has_clip = False

    def load_text_encoders(self, args, dtype):
        return load_flux2_text_pipeline(args, dtype)

    def chat(self, tokenizer: Any, prompt: str) -> str:
        """The text that the language model reads for a prompt."""
        return flux2_chat(tokenizer, prompt)

    def longest_prompt(self, config):
        return 512

    def architecture(self, config):
        return "Flux.2-dev"

    def target_modules(self, transformer):
        return block_layers(transformer)  # single blocks have two: queries, keys, values and MLP are one layer

    def sample_latents(self, moments, vae, generator):
        return flux2_latents(moments, vae)

    def predict(self, transformer, tokens, sigmas, prompt_embeds, pooled_prompt_embeds, *, guidance, height, width):
        patches = torch.empty(len(tokens), 0, height // 2, width // 2)
        return transformer(
            hidden_states=tokens,
            timestep=sigmas,
            guidance=guidance,
            encoder_hidden_states=prompt_embeds,
            txt_ids=to_device(Flux2Pipeline._prepare_text_ids(prompt_embeds), tokens.device),
            img_ids=to_device(Flux2Pipeline._prepare_latent_ids(patches), tokens.device),
            return_dict=False,
        )[0]

    def prompt_arguments(self, prompt_encoder, prompts):
        prompt_embeds, _ = prompt_encoder.encode_prompts(prompts)
        return {"prompt_embeds": prompt_embeds}


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
    "FluxPipeline": Flux,
    "FluxKontextPipeline": Flux,
    "Flux2Pipeline": Flux2,
    "Flux2KleinPipeline": Flux2Klein,
}


def find_family(args):
    """The family of --pretrained_model_name_or_path. That of FLUX.1 for any other: `check_model` says what it is."""
    if is_single_file(args):
        return Flux({})
    index = read_model_index(args)
    return FAMILIES.get(index.get("_class_name"), Flux)(index)


# ---------------------------------------------------------------------------------------------------------------------
# Model
# ---------------------------------------------------------------------------------------------------------------------


class ExtendedEmbedding(torch.nn.Module):
    """A frozen embedding table with trained rows [n, D] for the token ids from `first_new_id` on."""

    def __init__(self, embedding: torch.nn.Embedding, first_new_id: int, new_rows: torch.Tensor):
        super().__init__()
        self.embedding = embedding
        self.first_new_id = first_new_id
        self.new_rows = torch.nn.Parameter(new_rows.float())
        self.register_buffer("std", embedding.weight.float().std(), persistent=False)  # moves with the table

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        embedded = self.embedding(input_ids.clamp(max=self.first_new_id - 1))
        new_rows = self.new_rows[(input_ids - self.first_new_id).clamp(min=0)].to(embedded.dtype)
        is_new = (input_ids >= self.first_new_id)[..., None]
        return torch.where(is_new, new_rows, embedded)


class TokenEmbeddingsHandler:
    """New tokens <s0><s1>... in CLIP and perhaps T5, which stand for abstractions such as TOK in prompts.

    Without `initialize_new_tokens` there are none, and no method does anything.
    """

    def __init__(self):
        self.abstractions: dict[str, str] = {}  # {"TOK": "<s0><s1>"}
        self.embeddings: dict[str, ExtendedEmbedding] = {}  # {"clip_l": ..., "t5": ...}

    def initialize_new_tokens(
        self,
        text_encoders: dict[str, torch.nn.Module],
        tokenizers: dict,
        *,
        abstractions: list[str],
        concepts: list[str | None],
        num_new_tokens: int,
        generator: torch.Generator,
    ) -> None:
        """Adds tokens for each abstraction to the tokenizers, and rows for them to the encoders' embedding tables.

        The rows start as those of the abstraction's concept, such as "red dog", or for None as `num_new_tokens` rows
        of noise as large as the table's. The dictionaries have an entry for each encoder that gets tokens.
        """
        new_tokens = []
        initial_ids = {name: [] for name in tokenizers}  # the tokens whose rows the new ones start as, None: noise
        for abstraction, concept in zip(abstractions, concepts, strict=True):
            num_tokens = num_new_tokens
            if concept is None:
                for ids in initial_ids.values():
                    ids += [None] * num_tokens
            else:
                concept_ids = {
                    name: tokenizer(concept, add_special_tokens=False).input_ids
                    for name, tokenizer in tokenizers.items()
                }
                num_tokens = max(len(ids) for ids in concept_ids.values())
                for name, ids in concept_ids.items():  # repeated where the other tokenizer needs more for the concept
                    initial_ids[name] += [ids[i % len(ids)] for i in range(num_tokens)]
            first = len(new_tokens)
            tokens = [f"<s{i}>" for i in range(first, first + num_tokens)]
            self.abstractions[abstraction] = "".join(tokens)
            new_tokens += tokens

        for name, tokenizer in tokenizers.items():
            embedding = text_encoders[name].get_input_embeddings()
            first_new_id = len(tokenizer)
            tokenizer.add_tokens(new_tokens)
            table = embedding.weight.float()
            # noise for every row, used or not: the number of random draws does not depend on the concepts
            rows = torch.randn(len(new_tokens), table.shape[1], generator=generator) * table.std()
            for row, token_id in enumerate(initial_ids[name]):
                if token_id is not None:
                    rows[row] = table[token_id]
            self.embeddings[name] = ExtendedEmbedding(embedding, first_new_id, rows)
            text_encoders[name].set_input_embeddings(self.embeddings[name])

    def replace_abstractions(self, prompt: str) -> str:
        """The prompt with the new tokens in place of the abstractions."""
        return replace_words(prompt, self.abstractions)

    def parameters(self) -> list[torch.nn.Parameter]:
        return [embedding.new_rows for embedding in self.embeddings.values()]

    @torch.no_grad()
    def retract_embeddings(self, step_taken: torch.Tensor) -> None:
        """Moves the spread of the new rows towards that of the table, as the pivotal tuning of cog-sdxl does.

        Not after a step that was skipped: `step_taken` is a bool [].
        """
        for embedding in self.embeddings.values():
            rows = embedding.new_rows
            rows *= torch.where(step_taken, (embedding.std / rows.std()) ** 0.1, 1.0)

    def save_embeddings(self, path: Path) -> None:
        """Writes the new rows, {"clip_l": [n, 768], "t5": [n, 4096]}, for `load_textual_inversion`.

        The file's metadata is the abstractions and their tokens: {"TOK": "<s0><s1>"}.
        """
        if self.embeddings:
            rows = {name: embedding.new_rows.detach().cpu() for name, embedding in self.embeddings.items()}
            with atomic_write(path) as partial:
                save_file(rows, partial, metadata=self.abstractions)

    def load_embeddings(self, path: Path) -> None:
        if self.embeddings:
            rows = load_file(path)
            for name, embedding in self.embeddings.items():
                embedding.new_rows.data.copy_(rows[name])

    def export_embeddings(self, folder: Path) -> None:
        """Writes the rows of each abstraction as comfyui/TOK.safetensors (clip_l, t5xxl) and forge/TOK.safetensors
        (clip_l alone), to be loaded by these programs under its name."""
        first = 0
        for abstraction, tokens in self.abstractions.items():
            after = first + tokens.count("<s")
            rows = {}
            for name, embedding in self.embeddings.items():
                rows[name] = embedding.new_rows.detach().cpu()[first:after].clone()
            file_name = embedding_name(abstraction) + ".safetensors"
            comfyui = {"t5xxl" if name == "t5" else name: values for name, values in rows.items()}
            save_tensors(comfyui, folder / "comfyui" / file_name)
            save_tensors({"clip_l": rows["clip_l"]}, folder / "forge" / file_name)
            first = after

    def register_checkpointing(
        self, accelerator: Accelerator, result_weights: Callable[[], contextlib.AbstractContextManager]
    ) -> None:
        """Makes `accelerator.save_state` and `load_state` handle the new rows: as they are within `result_weights()`,
        to be drawn with, and as they are in training, to resume from."""
        name = "learned_emb.safetensors"
        resume_name = RESUME_PREFIX + "tokens.safetensors"  # not *_emb.safetensors, which is drawn with

        def save(models, weights, output_dir):
            with result_weights():
                if writes_files(accelerator):
                    self.save_embeddings(Path(output_dir) / name)
            if writes_files(accelerator):
                self.save_embeddings(Path(output_dir) / resume_name)

        def load(models, input_dir):
            path = Path(input_dir) / resume_name
            if not path.exists():
                path = Path(input_dir) / name  # of an earlier version, which wrote one file
            self.load_embeddings(path)

        accelerator.register_save_state_pre_hook(save)
        accelerator.register_load_state_pre_hook(load)


def pools_at_eos(args, checkpoint):
    """Whether CLIP pools at the end of the prompt, as ComfyUI and Forge do, and not at the last new token.

    A checkpoint that says nothing of it is of a run that pools at the last new token, and goes on like this.
    """
    if checkpoint is None:
        return args.train_text_encoder_ti
    return checkpoint_state(checkpoint).get("pool_at_eos") == "True"


def add_new_tokens(pipeline, args):
    """The handler of the tokens that --train_text_encoder_ti adds to a pipeline, in CLIP or in CLIP and T5."""
    embedding_handler = TokenEmbeddingsHandler()
    if not args.train_text_encoder_ti:
        return embedding_handler
    if args.pool_at_eos:
        # FLUX.1's CLIP says eos_token_id 2, by which transformers pools at the largest id: the last new token
        pipeline.text_encoder.eos_token_id = pipeline.tokenizer.eos_token_id
    text_encoders = {"clip_l": pipeline.text_encoder}
    tokenizers = {"clip_l": pipeline.tokenizer}
    if args.enable_t5_ti:
        text_encoders["t5"] = pipeline.text_encoder_2
        tokenizers["t5"] = pipeline.tokenizer_2
    abstractions = comma_list(args.token_abstraction)
    concepts = comma_list(args.initializer_concept) or [None]
    if len(concepts) == 1:  # for all abstractions
        concepts = concepts * len(abstractions)
    embedding_handler.initialize_new_tokens(
        text_encoders,
        tokenizers,
        abstractions=abstractions,
        concepts=concepts,
        num_new_tokens=args.num_new_tokens_per_abstraction or 2,
        generator=step_generator(args.seed, 0),
    )
    return embedding_handler


def save_tensors(tensors, path):
    with atomic_write(path) as partial:
        save_file(tensors, partial)


def load_vae(args, dtype):
    if is_single_file(args):
        return load_vae_file(args.ae, dtype)
    return load_model(find_family(args).vae_class, "vae", args, dtype)


def load_transformer(args, dtype):
    if is_single_file(args):
        return load_transformer_file(args.pretrained_model_name_or_path, dtype)
    return load_model(find_family(args).transformer_class, "transformer", args, dtype)


def load_text_encoders(args, dtype):
    """A pipeline with frozen text encoders and tokenizers alone."""
    if is_single_file(args):
        return load_text_encoder_files(args, dtype)
    return find_family(args).load_text_encoders(args, dtype)


def load_noise_scheduler(args):
    if is_single_file(args):
        config = transformer_config(args)
        return create_scheduler(is_dev=config["guidance_embeds"])
    return load_scheduler(args)


def clip_targets(args):
    """The layers of CLIP with a LoRA."""
    return (*CLIP_TARGET_MODULES, "fc1", "fc2") if args.lora_layers == "kohya" else CLIP_TARGET_MODULES


def clip_shapes(args):
    """{name in a LoRA file: (out, in)} of CLIP's layers with a LoRA, from its config or the header of its file."""
    if not is_single_file(args):
        return clip_lora_shapes(args, clip_targets(args))
    shapes = {}
    for key, shape in tensor_shapes(args.clip_l).items():
        name, _, parameter = key.rpartition(".")
        if parameter == "weight" and is_target(name, clip_targets(args)):
            shapes[full_name(f"text_encoder.{name}")] = tuple(shape)
    return shapes


def lora_targets(args, family, transformer):
    """The layers that --lora_layers names; "kohya" means every linear layer in the blocks, as in its sd-scripts."""
    if args.lora_layers == "kohya":
        return block_layers(transformer)
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
    prompt_embeds: torch.Tensor,
    pooled_prompt_embeds: torch.Tensor,
    *,
    family: Flux,
    guidance: torch.Tensor | None,
    weighting_scheme: str,
    target: torch.Tensor | None = None,
    loss_mask: torch.Tensor | None = None,
) -> torch.Tensor:
    """The flow matching loss [B] of each sample of a batch (arXiv 2403.03206).

    latents [B, C, h, w] are normalized; noise and sigmas are those of `sample_noise`; prompt_embeds [B, T, D],
    pooled_prompt_embeds [B, P]; guidance [B], or None for a model without guidance embedding. target
    [B, h/2 * w/2, 4C] is the velocity to be predicted, by default that of the images.

    loss_mask [B, 1, h, w], not negative, weights the squared error e of each latent, see `loss_mask` of the dataset:
    Σ w e / Σ w. Divided by the sum of the weights and not by the number of latents, an image counts as much where the
    subject is small, and the weights of class images and of output preservation mean what they do without masks.
    """
    model_pred = predict_velocity(
        transformer, latents, noise, sigmas, prompt_embeds, pooled_prompt_embeds, family=family, guidance=guidance
    )
    if target is None:
        target = pack_latents(noise) - pack_latents(latents)
    weighting = compute_loss_weighting_for_sd3(weighting_scheme, sigmas=sigmas)
    weights = None
    if loss_mask is not None:
        weights = pack_latents(loss_mask.expand(latents.shape))
    return weighted_mse(model_pred, target, weighting, weights)


def predict_velocity(
    transformer: torch.nn.Module,
    latents: torch.Tensor,
    noise: torch.Tensor,
    sigmas: torch.Tensor,
    prompt_embeds: torch.Tensor,
    pooled_prompt_embeds: torch.Tensor,
    *,
    family: Flux,
    guidance: torch.Tensor | None,
) -> torch.Tensor:
    """The velocity [B, h/2 * w/2, 4C] that the model predicts for x_σ; arguments as of `compute_loss`."""
    _, _, height, width = latents.shape
    noisy_latents = add_noise(pack_latents(latents), pack_latents(noise), sigmas)
    return family.predict(
        transformer,
        noisy_latents.to(prompt_embeds.dtype),
        sigmas,
        prompt_embeds,
        pooled_prompt_embeds,
        guidance=guidance,
        height=height,
        width=width,
    )


@torch.no_grad()
def predict_base_velocity(transformer: torch.nn.Module, *inputs: torch.Tensor, **settings: Any) -> torch.Tensor:
    """`predict_velocity` of the model without its adapter."""
    with without_adapters(transformer):
        return predict_velocity(transformer, *inputs, **settings)


def compute_preservation_loss(
    transformer: torch.nn.Module,
    latents: torch.Tensor,
    noise: torch.Tensor,
    sigmas: torch.Tensor,
    prompt_embeds: torch.Tensor,
    pooled_prompt_embeds: torch.Tensor,
    base_pooled_prompt_embeds: torch.Tensor,
    *,
    family: Flux,
    guidance: torch.Tensor | None,
    weighting_scheme: str,
) -> torch.Tensor:
    """How far the adapter moves what is predicted for other prompts at the same x_σ, for each sample of a batch [B].

    || transformer(x_σ, σ, prompt) - transformer without adapter(x_σ, σ, prompt) ||², arguments as of `compute_loss`.
    base_pooled_prompt_embeds [B, P] are those of CLIP without adapter.
    """
    target = predict_base_velocity(
        transformer,
        latents,
        noise,
        sigmas,
        prompt_embeds,
        base_pooled_prompt_embeds,
        family=family,
        guidance=guidance,
    )
    model_pred = predict_velocity(
        transformer, latents, noise, sigmas, prompt_embeds, pooled_prompt_embeds, family=family, guidance=guidance
    )
    weighting = compute_loss_weighting_for_sd3(weighting_scheme, sigmas=sigmas)
    return weighted_mse(model_pred, target, weighting)


# ---------------------------------------------------------------------------------------------------------------------
# Data
# ---------------------------------------------------------------------------------------------------------------------


class DreamBoothDataset(Dataset):
    """Samples by (epoch, index): the posterior of an image's latents if it is cached, else its pixels; and its prompt.

    With prior preservation, a list of two samples: that of the image and that of a class image.

    Where an image is cropped depends on (seed, index) alone; whether it is mirrored, its prompt and the class image
    that goes with it depend on (seed, epoch, index). Neither workers nor caches nor an interruption change them.
    """

    def __init__(self, examples, args):
        self.args = args
        self.class_examples = []
        self.moments = {}  # {key of `image_keys`: [2C, h, w]} once latents are cached, mapped from the disk
        self.has_masks = any("mask" in example.images for example in examples)
        self.loss_masks = {}  # {key of `image_keys`: [1, h, w]}, cached with the latents
        self.examples = []
        max_repeats = max((example.repeats for example in examples), default=0)
        # round after round, each with the examples that have repeats left
        for repeat in range(max_repeats):
            for example in examples:
                if example.repeats > repeat:
                    self.examples.append(example)
        self.crop_index = {}  # {index: the index whose crop it has}; center crops of an image share its first latents
        first_index = {}
        for index, example in enumerate(self.examples):
            if example.options["random_crop"]:
                self.crop_index[index] = index
            else:
                self.crop_index[index] = first_index.setdefault(id(example), index)
        self.first_class_index = len(self.examples)

    def __len__(self):
        return len(self.examples)

    def __getitem__(self, position):
        epoch, index = position
        example = self.examples[index]
        options = example.options
        # The order of the random draws is the resume contract: caption dropout, flip, what the prompt draws, the class
        # image, its flip. Another order would make another run of the same seed.
        rng = np.random.default_rng((self.args.seed, epoch, index))
        dropout_draw, flip_draw = rng.random(2)
        mirrored = bool(options["flip_aug"] and flip_draw < 0.5)
        every_n_epochs = options["caption_dropout_every_n_epochs"]
        is_dropped = dropout_draw < options["caption_dropout_rate"]
        if every_n_epochs and (epoch + 1) % every_n_epochs == 0:
            is_dropped = True
        prompt = example.dropped_prompt(self.args, rng) if is_dropped else example.prompt(rng)
        key = (self.crop_index[index], example.bucket, mirrored)
        samples = [self.sample(key, prompt, is_class_image=options["is_reg"])]
        if self.class_examples:
            class_index = int(rng.integers(len(self.class_examples)))
            flip_draw = rng.random()
            mirrored = bool(self.args.random_flip and flip_draw < 0.5)
            key = (self.first_class_index + class_index, example.bucket, mirrored)
            caption = self.class_examples[class_index].caption
            samples.append(self.sample(key, caption, is_class_image=True))
        return samples

    def sample(self, key, prompt, is_class_image):
        sample = {"prompt": prompt, "is_class_image": torch.tensor(is_class_image)}
        if self.moments:
            sample["moments"] = self.moments[key]
        else:
            sample["pixel_values"] = self.pixel_values(key)
        if self.has_masks:
            sample["loss_mask"] = self.loss_masks[key] if self.loss_masks else self.loss_mask(key)
        return sample

    def streamed_bucket(self, example, epoch, index):
        """The bucket of an example of a stream, which is checked. Raises ValueError."""
        problem = check_streamed(example, self.args)
        if problem:
            raise ValueError(problem)
        example.bucket = nearest_bucket(
            example.size, parse_buckets(self.args.aspect_ratio_buckets, self.args.resolution)
        )
        return example.bucket

    def streamed_samples(self, example, epoch, index):
        """What `[epoch, index]` would be if the example, which is of a stream, had this index. Raises ValueError."""
        mask = example.images.get("mask")
        if mask and mask_size_and_share(mask)[1] == 0:
            raise ValueError(f"{mask.name}: nothing in this mask is opaque, so nothing would be learned")
        alone = copy.copy(self)
        alone.examples = {index: example}
        alone.crop_index = {index: index}
        alone.first_class_index = index + 1
        return alone[epoch, index]

    def image_keys(self):
        """(index, bucket, mirrored) of every image that training can ask for; class images come after the examples."""
        keys = []
        buckets = set()
        for index in dict.fromkeys(self.crop_index.values()):
            example = self.examples[index]
            buckets.add(example.bucket)
            keys.append((index, example.bucket, False))
            if example.options["flip_aug"]:
                keys.append((index, example.bucket, True))
        for index in range(self.first_class_index, self.first_class_index + len(self.class_examples)):
            for bucket in sorted(buckets):
                keys.append((index, bucket, False))
                if self.args.random_flip:
                    keys.append((index, bucket, True))
        return keys

    def example(self, index):
        """The example of an index of `image_keys`."""
        if index < self.first_class_index:
            return self.examples[index]
        return self.class_examples[index - self.first_class_index]

    def crop(self, key):
        """The arguments of `fit` that an image and its mask share."""
        index, _, mirrored = key
        centering = (0.5, 0.5)
        if self.example(index).options["random_crop"]:
            centering = tuple(np.random.default_rng((self.args.seed, index)).random(2))
        return {"centering": centering, "mirrored": mirrored}

    def pixel_values(self, key):
        """An image, resized to cover its bucket, cropped and perhaps mirrored: [3, H, W] in [-1, 1]."""
        index, bucket, _ = key
        example = self.example(index)
        interpolation = example.options["resize_interpolation"]
        interpolation = KOHYA_INTERPOLATION.get(interpolation, interpolation)
        return to_tensor(fit(example.image(), bucket, interpolation, **self.crop(key)))

    def loss_mask(self, key):
        """The weight in the loss of each latent of an image: [1, h, w], h and w an eighth of the bucket's sides.

        m + --unmasked_weight (1 - m), where m is the mean of the mask, from black 0 to white 1, over what it is of.
        All are 1 without a mask, and 0 if the crop shows nothing of the mask: then there is nothing to learn.
        """
        index, bucket, _ = key
        height, width = (side // (PATCH // 2) for side in bucket)
        example = self.example(index)
        if "mask" not in example.images:
            return torch.ones(1, height, width)
        mask = example.images["mask"].image().convert("L")
        mask = fit(mask, (height, width), "box", **self.crop(key))  # box: the mean over an area
        mask = torch.from_numpy(np.array(mask)).float()[None] / 255
        if not mask.any():
            return mask
        return mask + self.args.unmasked_weight * (1 - mask)

    def index_label(self, what):
        """Under what `EncodedIndex` knows tensors of these images: class images are not among a run's data."""
        return [what, [example.stamp for example in self.class_examples]]

    def cache_loss_masks(self, accelerator, index, what="masks"):
        """Makes the masks of all images once, if there are any, in files of the index's folder."""
        if not self.has_masks:
            return
        label, keys = self.index_label(what), self.image_keys()
        found = index.find(accelerator, label, keys, self.loss_mask)
        if found is None:
            cache = TensorCache(index.folder, b"loss masks")
            found = cache.fill_by_content(accelerator, keys, read=self.loss_mask, encode=list, desc="Caching masks")
            index.record(accelerator, label, found)
        self.loss_masks = found


def streamed_examples(stream, options, row, name):
    """The example of a row of a stream, in a list."""
    return [configure(stream.example(row, name), options)]


def streamed_batches(stream, dataset, args, **processes):
    """The batches of a stream, whose samples are checked as they come."""
    return StreamedBatches(
        stream,
        dataset.streamed_samples,
        examples_of=functools.partial(streamed_examples, stream, default_options(args)),
        group_of=dataset.streamed_bucket,
        collate_fn=collate,
        batch_size=args.train_batch_size,
        shuffle_buffer=args.shuffle_buffer,
        seed=args.seed,
        num_threads=args.dataloader_num_workers,
        **processes,
    )


def check_caches(args, dataset, dtype):
    """Problems of the disks on which encoded images and prompts lie, before class images are drawn."""
    captions = {example.prompt() for example in dataset.examples}
    buckets = [bucket for _, bucket, _ in dataset.image_keys()] if args.cache_latents else []
    return check_cache_rooms(
        args, prompts=prompts_size(args, len(captions), dtype), latents=moments_size(args, buckets, dtype)
    )


@dataclass
class ConfiguredExample(Example):
    """An example with the options of DATASET_OPTIONS, from --dataset_config or the flags."""

    options: dict = field(default_factory=dict)
    repeats: int = 1  # in an epoch
    dataset: int = 0  # a batch holds images of one dataset
    bucket: Size | None = None
    mask_share: float | None = None  # of its image that its mask shows, 0 to 1
    is_held_out: bool = False  # by --validation_split

    @property
    def resolution(self):
        return parse_resolution(self.options["resolution"])

    def varies(self):
        """Whether `prompt` is another for each sample."""
        options = self.options
        return options["shuffle_caption"] or options["enable_wildcard"] or options["caption_tag_dropout_rate"] > 0

    def prompt(self, rng=None):
        """The caption as a sample has it, or without `rng` with the first of all choices, in order and complete.

        The order of the random draws is the resume contract: line, choices from left to right, order of the tags,
        dropout of each tag.
        """
        options = self.options
        lines = self.caption.split("\n") if options["enable_wildcard"] else [self.caption]
        parts = (options["caption_prefix"], choose(lines, rng), options["caption_suffix"])
        caption = " ".join(part for part in parts if part)
        if options["enable_wildcard"]:
            caption = expand_wildcards(caption, rng)
        has_keep_separator = options["keep_tokens_separator"] and options["keep_tokens_separator"] in caption
        if has_keep_separator or options["shuffle_caption"] or options["caption_tag_dropout_rate"]:
            caption = self.arrange_tags(caption, rng)
        if options["secondary_separator"]:
            caption = caption.replace(options["secondary_separator"], options["caption_separator"])
        return caption

    def drops_captions(self):
        """Whether a sample of it can have `dropped_prompt`."""
        return bool(self.options["caption_dropout_rate"] or self.options["caption_dropout_every_n_epochs"])

    def dropped_prompt(self, args, rng=None):
        """The prompt of a sample whose caption is dropped: an empty one, or the one it would have without a caption
        of its own; images that keep the class, which is_reg marks, have no other than their own."""
        if args.caption_dropout_to == "empty":
            return ""
        if self.options["is_reg"]:
            return self.prompt(rng) if self.caption else ""
        return replace(self, caption=self.options["class_tokens"] or "").prompt(rng)

    def arrange_tags(self, caption, rng):
        """The caption's tags with ", " between them; those that are not kept in place are shuffled and dropped."""
        options = self.options
        keep_separator = options["keep_tokens_separator"]
        tail = []
        if keep_separator and keep_separator in caption:  # first ||| flexible, or first ||| flexible ||| tail
            parts = [self.split_tags(part) for part in caption.split(keep_separator, 2)]
            first, flexible = parts[:2]
            if len(parts) == 3:
                tail = parts[2]
        else:
            tags = self.split_tags(caption)
            first = tags[: options["keep_tokens"]]
            flexible = tags[options["keep_tokens"] :]
        if rng is not None and options["shuffle_caption"]:
            flexible = [flexible[i] for i in rng.permutation(len(flexible))]
        if rng is not None and options["caption_tag_dropout_rate"]:
            flexible = [tag for tag in flexible if rng.random() >= options["caption_tag_dropout_rate"]]
        return ", ".join([*first, *flexible, *tail])

    def split_tags(self, text):
        return [tag.strip() for tag in text.split(self.options["caption_separator"]) if tag.strip()]


def choose(choices, rng):
    """One of the choices, or without `rng` the first."""
    if rng is None:
        return choices[0]
    return choices[rng.integers(len(choices))]


def expand_wildcards(caption, rng):
    """{a|b} becomes a or b, {{ and }} become braces."""

    def replacement(match):
        choices = match[1]
        if choices is None:
            return match[0][0]
        return choose(choices.split("|"), rng)

    return re.sub(r"\{\{|\}\}|\{([^{}]+)\}", replacement, caption)


def find_examples(args):
    """(examples, problems): the training images with their captions, options and buckets."""
    # 1. Read
    examples, problems = read_examples(args)
    class_images = read_class_images(args.class_data_dir, [], args.num_class_images)
    sizes, unreadable = read_sizes(examples + class_images)
    sizes = sizes[: len(examples)]

    shares, mask_problems = check_masks(args, examples, sizes)

    # 2. Check, which changes nothing
    problems += unreadable + mask_problems
    problems += check_captions(examples, default=args.instance_prompt)
    problems += check_num_samples(sum(example.repeats for example in examples))
    if args.train_text_encoder_ti:
        problems += check_abstractions(examples, args)
        if not problems:
            problems += check_reach(examples, args)
    if args.dataset_config:
        problems += check_dropout(examples, args)
        problems += check_bucket_sizes(examples, sizes)
        folders = sorted({file.parent for image in all_images(examples) for file in image.files})
        filled = {"--output_dir": args.output_dir, "--disk_cache_dir": args.disk_cache_dir}
        problems += check_places(filled, [(f"{args.dataset_config}: image_dir", folder) for folder in folders])

    # 3. Assign captions, sizes and buckets
    flag_buckets = parse_buckets(args.aspect_ratio_buckets, args.resolution)
    for example, size in zip(examples, sizes, strict=True):
        if example.caption is None:
            example.caption = args.instance_prompt
        if size is None:  # unreadable
            continue
        example.size = size
        example.mask_share = shares.get(example.name)
        if args.dataset_config:
            example.bucket = choose_bucket(size, example.options)
        else:
            example.bucket = nearest_bucket(size, flag_buckets)
    return examples, problems


def own_dataset(args):
    """What `read_dataset` and `open_stream` are to read."""
    # the caption of a file in --data_files has a usual name; a dataset's column is named
    settings = dataset_settings(args, {"image": args.image_column}, args.caption_column)
    return settings | {"whole_rows": bool(args.data_files)}


def check_streamed(example, args):
    """What is wrong with an example of a stream, which nothing has checked before, by its caption and the header of
    its image; or None. Assigns its size and caption."""
    if args.instance_prompt and isinstance(example.caption, str) and not example.caption.strip():
        example.caption = None  # an empty caption stands for --instance_prompt
        example.source = ""
    example.size = header_size(example)
    problems = check_captions([example], default=args.instance_prompt)
    if example.caption is None:
        example.caption = args.instance_prompt
    return problems[0] if problems else None


def read_examples(args):
    """(examples, problems) of the one source that the flags name."""
    if args.dataset_config:
        examples, problems = read_dataset_config(args)
        if not examples and not problems:
            suffixes = ", ".join(IMAGE_SUFFIXES)
            problems.append(f"--dataset_config {args.dataset_config}: no images ({suffixes}) in it")
    else:
        if args.streaming:
            found, problems = read_stream_start(own_dataset(args), functools.partial(check_streamed, args=args))
        elif args.dataset_name or args.data_files:
            found, problems = read_dataset(name=args.dataset_name or "--data_files", **own_dataset(args))
        else:
            found, problems = read_folder(
                args.instance_data_dir,
                caption_column=args.caption_column,
                partner_dirs={"mask": args.mask_data_dir},
            )
        options = default_options(args)
        examples = [configure(example, options) for example in found]
    if args.instance_prompt:
        for example in examples:
            if isinstance(example.caption, str) and not example.caption.strip():
                example.caption = None  # an empty caption stands for --instance_prompt
                example.source = ""
    if args.validation_split and examples:
        subjects = [example for example in examples if not example.options["is_reg"]]
        training, held_out = hold_out(subjects, args.validation_split)
        problems += check_split(training, args.validation_split)
        for example in held_out:
            example.is_held_out = True
    if args.dataset_config:
        for number in {example.dataset for example in examples}:
            balance_regularization([example for example in examples if example.dataset == number])
        examples = [example for example in examples if example.repeats > 0]
    return examples, problems


def find_held_out(args, examples):
    """(training examples, held-out ones, problems) of the examples that `find_examples` has found.

    Held-out images are cropped at the center and not mirrored.
    """
    problems = []
    held_out = [example for example in examples if example.is_held_out]
    training = [example for example in examples if not example.is_held_out]
    if args.validation_data_dir:
        own_args = held_out_args(
            args,
            instance_data_dir=args.validation_data_dir,
            dataset_name=None,
            data_files=None,
            streaming=False,
            dataset_config=None,
            class_data_dir=None,
            train_text_encoder_ti=False,
        )
        held_out, problems = find_examples(own_args)
        problems = [problem.replace("--instance_data_dir", "--validation_data_dir") for problem in problems]
    for example in held_out:
        example.repeats = 1
        example.options = example.options | {"random_crop": False, "flip_aug": False}
    return training, held_out, problems


def configure(example, options):
    images = dict(example.images)
    if options["alpha_mask"]:
        images["mask"] = Example(f"{example.name}, alpha channel", functools.partial(read_alpha, example.read))
    return ConfiguredExample(
        example.name,
        example.read,
        example.caption,
        images=images,
        stamp=example.stamp,
        files=example.files,
        source=example.source,
        options=options,
        repeats=options["num_repeats"],
    )


def read_alpha(read):
    return alpha_channel(read())


def check_masks(args, examples, sizes):
    """({name of an example: the share of its image that its mask shows}, problems). All processes call it.

    `sizes` are those of the images, None of one that cannot be read.
    """
    masked = []  # (example, size)
    for example, size in zip(examples, sizes, strict=True):
        if "mask" in example.images and size is not None:
            masked.append((example, size))
    if not masked:
        if args.dataset_config and "unmasked_weight" in args.changed:
            return {}, [f"--unmasked_weight {args.unmasked_weight:g} needs masks: {args.dataset_config} names none"]
        return {}, []
    shares = {}
    problems = []
    found = map_examples(mask_size_and_share, [example.images["mask"] for example, _ in masked])
    for (example, image_size), (size_and_share, unreadable) in zip(masked, found, strict=True):
        if unreadable:
            problems.append(unreadable)
            continue
        size, share = size_and_share
        name = example.images["mask"].name
        problems += check_shape(name, "a mask", size, image_size)
        if share == 0:
            problems.append(f"{name}: nothing in this mask is white (or opaque), so nothing would be learned")
        shares[example.name] = share
    return shares, first_ten(problems)


def mask_size_and_share(mask):
    """(size, share of it that counts, 0 to 1) of a mask's example; 0 where nothing is brighter than grey."""
    values = np.asarray(mask.image().convert("L"))
    share = values.mean() / 255 if values.max() >= 128 else 0.0
    return Size(*values.shape), float(share)


def describe_masks(args, examples):
    """What the header says of masks, {label: text}."""
    shares = [example.mask_share for example in examples if example.mask_share is not None]
    if not shares:
        return {}
    num_whole = sum(share == 1 for share in shares)
    whole = f", {num_whole} of them whole" if num_whole else ""
    share = sum(shares) / len(shares)
    weight = f"weight {args.unmasked_weight:g} outside"
    return {"masks": f"for {len(shares)} of {len(examples)} images{whole}, {share:.0%} of an image, {weight}"}


def class_examples(args, class_prompts):
    """Examples of the images that --class_data_dir holds, at most --num_class_images, with captions."""
    options = default_options(args) | {"alpha_mask": False}  # they count whole
    found = read_class_images(args.class_data_dir, class_prompts, args.num_class_images)
    return [configure(example, options) for example in found]


def check_effects(examples, args):
    """Problems of flags that have no effect on these training images."""
    problems = []
    shares = [example.mask_share for example in examples if example.mask_share is not None]
    if shares and min(shares) == 1:
        source = f"--mask_data_dir {args.mask_data_dir}"
        if args.dataset_config:
            source = f"--dataset_config {args.dataset_config}"
        elif args.alpha_mask:
            source = "--alpha_mask"
        problems.append(f"{source}: all masks are white (or opaque) all over, which has no effect: leave them out")
    subjects = [example for example in examples if not example.options["is_reg"]]
    if args.caption_dropout_to == "instance_prompt" and not any(
        example.drops_captions() and example.source for example in subjects
    ):
        problems.append(
            "--caption_dropout_to instance_prompt has no effect: no caption that is dropped is an image's own"
        )
    if args.prior_target == "base" and args.dataset_config and len(subjects) == len(examples):
        problems.append(f"--prior_target base has no effect: {args.dataset_config} has no is_reg images")
    return problems


def check_dropout(examples, args):
    """Problems of folders whose captions are dropped, but that have no prompt to put in their place."""
    if args.caption_dropout_to == "empty":
        return []
    folders = set()
    for example in examples:
        if example.drops_captions() and not (example.options["is_reg"] or example.options["class_tokens"]):
            folders.add(example.files[0].parent)
    return [
        f"{folder}: --caption_dropout_to instance_prompt needs its class_tokens in {args.dataset_config}, or "
        "--instance_prompt"
        for folder in sorted(folders)
    ]


def check_abstractions(examples, args):
    """Problems of abstractions that no caption contains."""
    abstractions = comma_list(args.token_abstraction)
    used = set()
    captions = []
    for example in examples:
        caption = example.caption or args.instance_prompt
        if isinstance(caption, str):
            used.update(match_any(abstractions).findall(caption))
            captions.append(caption)
    in_prompt = match_any(abstractions).findall(args.instance_prompt or "")
    problems = []
    for abstraction in abstractions:
        if abstraction in used:
            continue
        where = "in no caption and not in --instance_prompt" + near_miss(abstraction, captions)
        if abstraction in in_prompt:
            where = "in no caption; --instance_prompt has it, but every image has a caption of its own"
        problems.append(f"--token_abstraction {abstraction}: {where}")
    return problems


def check_no_new_tokens(flag, prompts, args):
    """Problems of prompts for which the model shall stay as it is, but which hold the word of a new token."""
    if not args.train_text_encoder_ti:
        return []
    for prompt in prompts:
        found = match_any(comma_list(args.token_abstraction)).search(prompt)
        if found:
            return [f"{flag}: {prompt[:80]!r} holds {found[0]}, which stands for new tokens: write other words"]
    return []


def near_miss(abstraction, captions):
    """A caption that has the abstraction in another case or within a word, as the end of a message; "" without one."""
    for caption in captions:
        if abstraction.lower() in caption.lower():
            return f" as a word of its own, spelled like this; near it comes {caption[:80]!r}"
    return ""


def check_reach(examples, args):
    """Problems of abstractions whose new tokens lie, in every caption, behind what an encoder reads."""
    abstractions = comma_list(args.token_abstraction)
    concepts = comma_list(args.initializer_concept) or [None]
    if len(concepts) == 1:
        concepts = concepts * len(abstractions)
    tokenizers = load_tokenizers(args)
    limits = {"clip_l": tokenizers["clip_l"].model_max_length}
    if args.enable_t5_ti:
        limits["t5"] = args.max_sequence_length
    placeholders = {}
    for i, (abstraction, concept) in enumerate(zip(abstractions, concepts, strict=True)):
        num_tokens = args.num_new_tokens_per_abstraction or 2
        if concept is not None:
            num_tokens = max(len(tokenizers[name](concept, add_special_tokens=False).input_ids) for name in limits)
        placeholders[abstraction] = [f"<new {i}.{n}>" for n in range(num_tokens)]
    problems = []
    for name, limit in limits.items():
        tokenizer = tokenizers[name]
        tokenizer.add_tokens([token for tokens in placeholders.values() for token in tokens])
        seen = set()  # token ids
        for example in examples:
            caption = example.caption or args.instance_prompt
            text = match_any(abstractions).sub(lambda match: "".join(placeholders[match[0]]), caption)
            seen.update(tokenizer(text, truncation=True, max_length=limit).input_ids)
        num_most = limit - 2 if name == "clip_l" else limit - 1  # without those of begin and end
        for abstraction, tokens in placeholders.items():
            if len(tokens) > num_most:
                flag = "CLIP" if name == "clip_l" else f"T5 with --max_sequence_length {limit}"
                problems.append(
                    f"--token_abstraction {abstraction}: {len(tokens)} new tokens for it, and {flag} has room for "
                    f"{num_most} in all: give --num_new_tokens_per_abstraction {min(num_most, 4)}"
                )
                continue
            num_read = len(seen.intersection(tokenizer.convert_tokens_to_ids(tokens)))
            if num_read < len(tokens):
                flag = "CLIP" if name == "clip_l" else "T5 with --max_sequence_length"
                problems.append(
                    f"--token_abstraction {abstraction}: {flag} reads {limit} tokens of a caption, and {num_read} of "
                    f"its {len(tokens)} new tokens are among them in any caption: write it nearer to the beginning"
                )
    return problems


def load_tokenizers(args):
    """{clip_l, t5: its tokenizer}."""
    names = find_family(args).tokenizers
    if not is_single_file(args):
        return {name: load_tokenizer(args, folder) for name, folder in names.items()}
    return {
        name: AutoTokenizer.from_pretrained(args.tokenizer_dir / folder, trust_remote_code=False)
        for name, folder in names.items()
    }


# ---------------------------------------------------------------------------------------------------------------------
# --dataset_config: the data.toml of kohya's sd-scripts
# ---------------------------------------------------------------------------------------------------------------------


KOHYA_INTERPOLATION = {"linear": "bilinear", "cubic": "bicubic", "area": "box"}  # sd-scripts' names for PIL's methods


@dataclass(frozen=True)
class ValueType:
    """What the value of an option must be: in words, after "must be", and as a check."""

    description: str
    accepts: Callable[[Any], bool]


def is_switch(value):
    return isinstance(value, bool)


def is_text(value):
    return isinstance(value, str)


def is_non_empty_text(value):
    return isinstance(value, str) and value != ""


def is_count(value):
    return is_whole_number(value, 0, 10_000)


def is_positive_count(value):
    return is_whole_number(value, 1, 10_000)


def is_whole_number(value, minimum, maximum):
    return type(value) is int and minimum <= value <= maximum  # not bool, which is an int


def is_side(value):
    return is_whole_number(value, 16, 8192) and value % 16 == 0


def is_resolution(value):
    if isinstance(value, list):
        return len(value) == 2 and is_side(value[0]) and is_side(value[1])
    return is_side(value)


def is_fraction(value):
    return type(value) in (int, float) and 0 <= value <= 1


def is_extension(value):
    return isinstance(value, str) and re.fullmatch(r"\.?\w[\w.-]*", value) is not None


def is_interpolation(value):
    return isinstance(value, str) and (value in INTERPOLATION or value in KOHYA_INTERPOLATION)


SWITCH = ValueType("true or false", is_switch)
TEXT = ValueType("text", is_text)
NON_EMPTY_TEXT = ValueType("text that is not empty", is_non_empty_text)
EXTENSION = ValueType("an extension such as .txt", is_extension)
COUNT = ValueType("a whole number from 0 to 10,000", is_count)
POSITIVE_COUNT = ValueType("a whole number from 1 to 10,000", is_positive_count)
FRACTION = ValueType("a number from 0 to 1", is_fraction)
SIDE = ValueType("a multiple of 16 to 8192", is_side)
RESOLUTION = ValueType("a side or [width, height], multiples of 16 to 8192", is_resolution)
METHOD = ValueType("lanczos, nearest, bilinear, linear, bicubic, cubic, area or box", is_interpolation)

TABLE_NAMES = {"general": "[general]", "datasets": "[[datasets]]", "subsets": "[[datasets.subsets]]"}
DATASET = ("general", "datasets")
ANYWHERE = ("general", "datasets", "subsets")
SUBSET = ("subsets",)


@dataclass(frozen=True)
class Option:
    """An option of --dataset_config: the tables it may stand in, what its value must be, its default.

    The default None means the value of a flag (`default_options`), or that another rule decides.
    """

    tables: tuple[str, ...]
    type: ValueType
    default: Any = None


DATASET_OPTIONS = {
    "resolution": Option(DATASET, RESOLUTION),
    "batch_size": Option(DATASET, POSITIVE_COUNT),
    "enable_bucket": Option(DATASET, SWITCH, False),
    "min_bucket_reso": Option(DATASET, POSITIVE_COUNT),
    "max_bucket_reso": Option(DATASET, POSITIVE_COUNT),
    "bucket_reso_steps": Option(DATASET, SIDE, 64),
    "bucket_no_upscale": Option(DATASET, SWITCH, False),
    "resize_interpolation": Option(ANYWHERE, METHOD),
    "num_repeats": Option(ANYWHERE, COUNT),
    "flip_aug": Option(ANYWHERE, SWITCH),
    "random_crop": Option(ANYWHERE, SWITCH, False),
    "caption_extension": Option(ANYWHERE, EXTENSION),
    "class_tokens": Option(ANYWHERE, TEXT),
    "caption_prefix": Option(ANYWHERE, TEXT, ""),
    "caption_suffix": Option(ANYWHERE, TEXT, ""),
    "enable_wildcard": Option(ANYWHERE, SWITCH, False),
    "caption_separator": Option(ANYWHERE, NON_EMPTY_TEXT, ","),
    "secondary_separator": Option(ANYWHERE, TEXT, ""),
    "keep_tokens": Option(ANYWHERE, COUNT, 0),
    "keep_tokens_separator": Option(ANYWHERE, TEXT, ""),
    "shuffle_caption": Option(ANYWHERE, SWITCH, False),
    "caption_tag_dropout_rate": Option(ANYWHERE, FRACTION, 0.0),
    "caption_dropout_rate": Option(ANYWHERE, FRACTION),
    "caption_dropout_every_n_epochs": Option(ANYWHERE, COUNT, 0),
    "image_dir": Option(SUBSET, NON_EMPTY_TEXT),
    "is_reg": Option(SUBSET, SWITCH, False),
    "alpha_mask": Option(ANYWHERE, SWITCH),
    "conditioning_data_dir": Option(SUBSET, NON_EMPTY_TEXT),
}


class RefusedOption(NamedTuple):
    """An option or flag that is not supported: the one value that changes nothing here, and why no other is."""

    neutral_value: Any
    reason: str


REFUSED_OPTIONS = {
    "cache_info": RefusedOption(False, "captions and sizes are read from the files every time"),
    "color_aug": RefusedOption(False, "colors are kept as they are"),
    "custom_attributes": RefusedOption({}, "preserve the class with an is_reg subset"),
    "debug_dataset": RefusedOption(None, "it is a flag of another trainer"),
    "face_crop_aug_range": RefusedOption(None, "use random_crop, or crop the images beforehand"),
    "metadata_file": RefusedOption(None, "give image_dir, with a caption file beside each image"),
    "network_multiplier": RefusedOption(1.0, "the LoRA has the same scale for all data"),
    "prior_loss_weight": RefusedOption(None, "it is a flag: --prior_loss_weight"),
    "token_warmup_min": RefusedOption(1, "captions do not grow with the steps"),
    "token_warmup_step": RefusedOption(0, "captions do not grow with the steps"),
    "validation_seed": RefusedOption(None, "the noise of the held-out loss is the same in all runs"),
    "validation_split": RefusedOption(0.0, "it is a flag: --validation_split"),
}


# Flags of sd-scripts' flux_train_network.py that are not ours: the one value, "" for none, that asks for what happens
# here anyway, and what to do instead of any other. Those that are ours too have their place in `parse_args`.
IN_DATASET_CONFIG = RefusedOption(None, "write it into the file that --dataset_config names")
KOHYA_FLAGS = dict.fromkeys([*DATASET_OPTIONS, *REFUSED_OPTIONS], IN_DATASET_CONFIG) | {
    "apply_t5_attn_mask": RefusedOption(None, "T5's padding is read, as ComfyUI and diffusers do: leave it out"),
    "base_weights": RefusedOption(None, "merge the LoRA into the model beforehand"),
    "cache_text_encoder_outputs": RefusedOption("", "prompts are always embedded once"),
    "clip_skip": RefusedOption(None, "FLUX.1 reads CLIP's last layer: leave it out"),
    "config_file": RefusedOption(None, "write flags as on the command line into a file and give it as @file"),
    "cpu_offload_checkpointing": RefusedOption(None, "to save memory: --blocks_to_swap auto or --quantize_base nf4"),
    "dim_from_weights": RefusedOption(None, "--rank says it"),
    "dynamo_backend": RefusedOption("inductor", "--compile has one backend: leave it out"),
    "fp8_base": RefusedOption(None, "--quantize_base fp8"),
    "fp8_base_unet": RefusedOption(None, "--quantize_base fp8"),
    "full_bf16": RefusedOption(None, "the LoRA is trained in float32, frozen models in --mixed_precision bf16"),
    "full_fp16": RefusedOption(None, "the LoRA is trained in float32, frozen models in --mixed_precision fp16"),
    "highvram": RefusedOption("", "it is so without --offload"),
    "huggingface_repo_id": RefusedOption(None, "--push_to_hub --hub_model_id"),
    "huggingface_token": RefusedOption(None, "--hub_token, or log in: hf auth login"),
    "in_json": RefusedOption(None, "give --instance_data_dir with captions in metadata.jsonl"),
    "initial_epoch": RefusedOption(None, "--resume_from_checkpoint latest continues where the run was"),
    "initial_step": RefusedOption(None, "--resume_from_checkpoint latest continues where the run was"),
    "ip_noise_gamma": RefusedOption(None, "it is for models that predict noise: leave it out"),
    "log_config": RefusedOption("", "args.json holds all flags"),
    "log_prefix": RefusedOption(None, "runs are told apart by --output_dir and --output_name"),
    "log_tracker_name": RefusedOption(None, "leave it out"),
    "loss_type": RefusedOption("l2", "the loss is the squared error, l2"),
    "lowram": RefusedOption(None, "to save memory: --offload or --blocks_to_swap auto"),
    "lr_scheduler_args": RefusedOption(None, "--lr_warmup_steps, --lr_num_cycles and --lr_power"),
    "lr_scheduler_type": RefusedOption(None, "--lr_scheduler chooses among the schedules of diffusers"),
    "masked_loss": RefusedOption("", "masks count where there are any: --mask_data_dir or --alpha_mask"),
    "max_timestep": RefusedOption(None, "it has no effect on FLUX.1 in sd-scripts either: leave it out"),
    "max_token_length": RefusedOption(None, "CLIP reads 77 tokens; T5's number is --max_sequence_length"),
    "mem_eff_attn": RefusedOption("", "attention is PyTorch's scaled_dot_product_attention"),
    "metadata_thumbnail": RefusedOption(None, "it is the last image drawn after training, of --validation_prompt"),
    "min_snr_gamma": RefusedOption(None, "it is for models that predict noise: see --weighting_scheme"),
    "min_timestep": RefusedOption(None, "it has no effect on FLUX.1 in sd-scripts either: leave it out"),
    "model_prediction_type": RefusedOption("raw", "the velocity is predicted, which sd-scripts calls raw"),
    "network_args": RefusedOption(None, "--lora_layers names the layers; there is one rank for all"),
    "network_dropout": RefusedOption(None, "--lora_dropout, of the LoRA's inputs"),
    "network_weights": RefusedOption(None, "--lora_path"),
    "no_half_vae": RefusedOption(None, "the VAE has the precision of --mixed_precision: leave it out"),
    "no_metadata": RefusedOption(None, "the file always says what it is: leave it out"),
    "noise_offset": RefusedOption(None, "it is for models that predict noise: leave it out"),
    "optimizer_args": RefusedOption(None, "give --adam_..., --prodigy_... and the weight decay as flags"),
    "persistent_data_loader_workers": RefusedOption("", "the workers live as long as the run"),
    "reg_data_dir": RefusedOption(None, "--with_prior_preservation --class_data_dir, or is_reg in --dataset_config"),
    "resume": RefusedOption(None, "--resume_from_checkpoint"),
    "sample_at_first": RefusedOption("", "--validation_prompt is drawn before training too"),
    "sample_every_n_epochs": RefusedOption(None, "--validation_epochs"),
    "sample_every_n_steps": RefusedOption(None, "--validation_steps"),
    "sample_sampler": RefusedOption(None, "images are drawn with the model's own scheduler: leave it out"),
    "save_every_n_steps": RefusedOption(None, "--checkpointing_steps; their LoRA is a file in checkpoint-N"),
    "save_last_n_epochs": RefusedOption(None, "--checkpoints_total_limit; files of epochs are kept"),
    "save_last_n_steps": RefusedOption(None, "--checkpoints_total_limit"),
    "save_model_as": RefusedOption("safetensors", "files are safetensors"),
    "save_precision": RefusedOption(
        None, "the LoRA is saved as --mixed_precision says; --upcast_before_saving: float"
    ),
    "save_state": RefusedOption(None, "--checkpointing_steps saves what a run resumes from"),
    "save_state_on_train_end": RefusedOption(None, "--checkpointing_steps saves what a run resumes from"),
    "scale_weight_norms": RefusedOption(None, "weights are not rescaled: see --adam_weight_decay, --max_grad_norm"),
    "sdpa": RefusedOption("", "attention is PyTorch's scaled_dot_product_attention"),
    "skip_cache_check": RefusedOption("", "caches are found by what they were made of"),
    "split_mode": RefusedOption(None, "to save memory: --blocks_to_swap auto, --quantize_base nf4 or fp8"),
    "tokenizer_cache_dir": RefusedOption(None, "--tokenizer_dir"),
    "train_data_dir": RefusedOption(None, "--instance_data_dir for images in one folder, or --dataset_config"),
    "training_comment": RefusedOption(None, "it would not be written: leave it out"),
    "unet_lr": RefusedOption(None, "--learning_rate"),
    "vae": RefusedOption(None, "--ae"),
    "validate_every_n_steps": RefusedOption(None, "--validation_loss_steps"),
    "vae_batch_size": RefusedOption(None, "images are encoded one at a time: leave it out"),
    "wandb_api_key": RefusedOption(None, "log in: wandb login"),
    "wandb_run_name": RefusedOption(None, "leave it out"),
    "xformers": RefusedOption("", "attention is PyTorch's scaled_dot_product_attention"),
}


def default_options(args):
    """The options that no table sets."""
    options = {name: option.default for name, option in DATASET_OPTIONS.items()}
    options["resolution"] = args.resolution
    options["batch_size"] = args.train_batch_size
    options["resize_interpolation"] = args.image_interpolation_mode
    options["num_repeats"] = args.repeats
    options["flip_aug"] = args.random_flip
    options["random_crop"] = not args.center_crop and not args.dataset_config
    options["caption_dropout_rate"] = args.caption_dropout
    options["class_tokens"] = args.instance_prompt
    options["alpha_mask"] = args.alpha_mask
    return options


def read_dataset_config(args):
    """(examples, problems) of --dataset_config. An option is the subset's, else its dataset's, [general]'s, the flag's
    or the default."""
    path = args.dataset_config
    try:
        config = parse_dataset_config(path)
    except (OSError, ValueError, RecursionError) as error:
        return [], [f"--dataset_config {path}: cannot be read ({error})"]
    problems = check_dataset_config(path, config)
    if problems:
        return [], problems
    examples = []
    for i, dataset in enumerate(config["datasets"]):
        where = f"{path}, [[datasets]] {i + 1}"
        own_options = {name: value for name, value in dataset.items() if name != "subsets"}
        options = default_options(args) | config.get("general", {}) | own_options
        image_dirs = [subset["image_dir"] for subset in dataset["subsets"]]
        first_name = {}  # of each folder, which can be spelt in several ways
        for name in image_dirs:
            found = find_image_dirs(name, path.parent)
            folder = found[0].resolve() if found else Path(name)
            if folder in first_name:
                same = f" ({first_name[folder]} is the same folder)" if first_name[folder] != name else ""
                problems.append(f"{where}: image_dir {name} twice{same}: use num_repeats")
            first_name.setdefault(folder, name)
        problems += check_bucket_options(where, options)
        dataset_examples = []
        for j, subset in enumerate(dataset["subsets"]):
            subset_options = options | subset
            if subset_options["num_repeats"] > 0:
                subset_examples, subset_problems = read_subset(f"{where}, subset {j + 1}", subset_options, path.parent)
                dataset_examples += subset_examples
                problems += subset_problems
        if dataset_examples and all(example.options["is_reg"] for example in dataset_examples):
            problems.append(f"{where}: is_reg images need a subset of others in the same dataset")
        for example in dataset_examples:
            example.dataset = i
        examples += dataset_examples
    if problems:
        return [], problems
    return examples, []


def adopt_dataset_config(args, examples):
    """Sets --train_batch_size to the largest batch that --dataset_config asks for, and --resolution, unless it was
    given, to the side of its largest square images: validation, args.json and the model card go by them."""
    args.train_batch_size = max((example.options["batch_size"] for example in examples), default=args.train_batch_size)
    sides = [example.resolution.width for example in examples if example.resolution.width == example.resolution.height]
    if "resolution" not in args.changed:
        args.resolution = max(sides, default=args.resolution)


def parse_dataset_config(path):
    """The content of a TOML or JSON file. Raises OSError, ValueError or RecursionError."""
    text = path.read_text("utf-8-sig")
    if path.suffix != ".json":
        return tomllib.loads(text)
    config = json.loads(text)
    json.dumps(config, ensure_ascii=False).encode()  # JSON can hold half of a surrogate pair, which is not text
    return config


def check_dataset_config(path, config):
    """Problems of the names and values in the file; no image is looked at."""
    if not isinstance(config, dict):
        return [f"--dataset_config {path}: must hold general and datasets, not a {type(config).__name__}"]
    problems = []
    for key in config:
        if key not in ("general", "datasets"):
            problems.append(f"{path}: {key} is neither [general] nor [[datasets]]")
    problems += check_options(f"{path}, [general]", config.get("general", {}), "general")
    datasets = config.get("datasets")
    if not is_list_of_tables(datasets):
        return [*problems, f"{path}: no [[datasets]] table in it"]
    for i, dataset in enumerate(datasets):
        where = f"{path}, [[datasets]] {i + 1}"
        own_options = {name: value for name, value in dataset.items() if name != "subsets"}
        problems += check_options(where, own_options, "datasets")
        subsets = dataset.get("subsets")
        if not is_list_of_tables(subsets):
            problems.append(f"{where}: no [[datasets.subsets]] table in it")
            continue
        for j, subset in enumerate(subsets):
            problems += check_options(f"{where}, subset {j + 1}", subset, "subsets")
    return problems


def is_list_of_tables(value):
    return isinstance(value, list) and len(value) > 0 and all(isinstance(table, dict) for table in value)


def check_options(where, table, table_name):
    """Problems of the names and values in one table."""
    if not isinstance(table, dict):
        return [f"{where} must be a table, not {quoted(table)}"]
    problems = []
    allowed = [name for name, option in DATASET_OPTIONS.items() if table_name in option.tables]
    for name, value in table.items():
        if name in REFUSED_OPTIONS:
            refused = REFUSED_OPTIONS[name]
            if value != refused.neutral_value:
                problems.append(f"{where}: {name} = {quoted(value)} is not supported: {refused.reason}")
        elif name in allowed:
            option = DATASET_OPTIONS[name]
            if not option.type.accepts(value):
                problems.append(f"{where}: {name} = {quoted(value)} must be {option.type.description}")
        else:
            problems.append(f"{where}: {name}: {unknown_option_hint(name)} (allowed here: {', '.join(allowed)})")
    if table_name == "subsets" and "image_dir" not in table:
        problems.append(f"{where}: image_dir is missing")
    return problems


def unknown_option_hint(name):
    if name in DATASET_OPTIONS:
        return f"it belongs in {' or '.join(TABLE_NAMES[table] for table in DATASET_OPTIONS[name].tables)}"
    similar = difflib.get_close_matches(name, DATASET_OPTIONS, 1)
    if similar:
        return f"did you mean {similar[0]}?"
    return "no option has this name"


def find_image_dirs(image_dir, config_dir):
    """The folders that image_dir means: in the working folder, and in that of the file."""
    image_dir = Path(image_dir)
    with contextlib.suppress(RuntimeError):  # ~name of a user who does not exist
        image_dir = image_dir.expanduser()
    return [folder for folder in (image_dir, config_dir / image_dir) if folder.is_dir()]


def read_subset(where, options, config_dir):
    """(examples, problems) of a subset. image_dir is relative to the working folder, or else to that of the file."""
    image_dir = Path(options["image_dir"])
    folders = find_image_dirs(image_dir, config_dir)
    if not folders:
        return [], [f"{where}: image_dir {visible(image_dir)}: no such folder here or in {config_dir}"]
    paths, problems = image_files(folders[0])
    if not paths:
        problems.append(f"{where}: image_dir {image_dir}: no images ({', '.join(IMAGE_SUFFIXES)}) in it")
    suffix = ".caption"
    if options["caption_extension"]:
        suffix = "." + options["caption_extension"].lstrip(".")
    else:
        text_files = [path.with_suffix(".txt") for path in paths if not path.with_suffix(suffix).exists()]
        text_files = [path for path in text_files if path.exists()]
        if text_files:
            problems.append(f'{text_files[0]}: is it a caption? Set caption_extension = ".txt" or "{suffix}"')
    masks = {}
    if options["conditioning_data_dir"]:
        masks, mask_problems = find_masks(where, options, folders[0], paths, config_dir)
        problems += mask_problems
    examples = []
    for path in paths:
        try:
            caption = read_subset_caption(path.with_suffix(suffix), options)
        except ValueError as error:
            problems.append(str(error))
            continue
        if not caption:
            problems.append(f"{path}: no caption: write {path.stem}{suffix}, or give class_tokens")
        example = file_example(path, caption)
        if path.with_suffix(suffix).exists():
            example.files += (path.with_suffix(suffix),)
            example.source = suffix
        if path in masks:
            example.images["mask"] = file_example(masks[path])
            example.stamp += f" {example.images['mask'].stamp}"
        examples.append(configure(example, options))
    return examples, problems


def find_masks(where, options, image_dir, paths, config_dir):
    """({image: its mask in conditioning_data_dir}, problems) of a subset."""
    mask_dir = options["conditioning_data_dir"]
    if options["alpha_mask"]:
        return {}, [f"{where}: alpha_mask and conditioning_data_dir exclude each other: set alpha_mask = false"]
    folders = find_image_dirs(mask_dir, config_dir)
    if not folders:
        return {}, [f"{where}: conditioning_data_dir {visible(mask_dir)}: no such folder here or in {config_dir}"]
    problems = check_roles({"image_dir": image_dir, f"{where}: conditioning_data_dir": folders[0]})
    if problems:
        return {}, problems
    masks, problems = find_partners(paths, folders[0], "stem")
    return masks, problems + check_stems(image_dir, paths)


def read_subset_caption(path, options):
    """The caption file's first line, all lines with enable_wildcard, or without a file class_tokens. Raises ValueError
    for a file that is empty or not text."""
    text = read_text(path)
    if text is None:
        return options["class_tokens"]
    lines = [line.strip() for line in text.split("\n") if line.strip()]
    if not lines:
        raise ValueError(f"{path}: empty; delete it to use class_tokens")
    if options["enable_wildcard"]:
        return "\n".join(lines)
    return lines[0]


def balance_regularization(examples):
    """Sets the repeats of the is_reg images of a dataset so that an epoch has as many of them as of the others that
    are trained.

    They are taken in order, each as often as its num_repeats; if that is not enough, once more each, round by round.
    """
    regularization = [example for example in examples if example.options["is_reg"]]
    trained = [example for example in examples if not (example.options["is_reg"] or example.is_held_out)]
    num_missing = sum(example.repeats for example in trained)
    for example in regularization:
        example.repeats = min(example.repeats, num_missing)
        num_missing -= example.repeats
    for example in itertools.islice(itertools.cycle(regularization), num_missing):
        example.repeats += 1


def parse_resolution(value):
    """The Size of a side or of [width, height]."""
    if isinstance(value, list):
        width, height = value
        return Size(height, width)
    return Size(value, value)


def check_bucket_options(where, options):
    """Problems of limits of buckets that contradict the resolution."""
    if not options["enable_bucket"]:
        return []
    resolution = parse_resolution(options["resolution"])
    step = options["bucket_reso_steps"]
    min_side = options["min_bucket_reso"]
    max_side = options["max_bucket_reso"]
    problems = []
    if step > math.isqrt(resolution.height * resolution.width):
        problems.append(f"bucket_reso_steps {step} is more than the resolution")
    if not options["bucket_no_upscale"]:
        if min_side and min_side > min(resolution):
            problems.append(f"min_bucket_reso {min_side} is more than the resolution")
        if max_side and max_side < max(resolution):
            problems.append(f"max_bucket_reso {max_side} is less than the resolution")
    return [f"{where}: {problem} {options['resolution']}" for problem in problems]


def check_bucket_sizes(examples, sizes):
    """Problems of images that are smaller than a step of the buckets."""
    problems = []
    for example, size in zip(examples, sizes, strict=True):
        if size is not None and 0 in choose_bucket(size, example.options):
            step = example.options["bucket_reso_steps"]
            problems.append(f"{example.name}: at {size} pixels, a side of its bucket is less than {step} pixels")
    return problems


def choose_bucket(size, options):
    """The size that an image of `size` is resized to cover and cropped to, as sd-scripts chooses it."""
    resolution = parse_resolution(options["resolution"])
    if not options["enable_bucket"]:
        return resolution
    area = resolution.height * resolution.width
    step = options["bucket_reso_steps"]
    if options["bucket_no_upscale"]:
        return shrunk_bucket(size, area, step)
    buckets = bucket_sizes(area, options["min_bucket_reso"], options["max_bucket_reso"], step)
    if size in buckets:
        return size
    aspect_ratio = size.width / size.height
    return min(buckets, key=lambda bucket: abs(bucket.width / bucket.height - aspect_ratio))


@functools.cache
def bucket_sizes(area, min_bucket_reso, max_bucket_reso, step):
    """Sorted sizes of about `area` pixels whose sides are multiples of `step`.

    Sides go from min_bucket_reso (None: 256, or half of a smaller resolution) to max_bucket_reso (None: as far as the
    area goes).
    """
    side = math.isqrt(area)
    if min_bucket_reso is None:
        min_bucket_reso = min(256, side // 2)
    min_side = max(min_bucket_reso // step, 1) * step
    if max_bucket_reso is None:
        max_bucket_reso = area / min_side
    max_side = math.ceil(max_bucket_reso / step) * step
    sizes = {Size(side // step * step, side // step * step)}
    for width in range(min_side, max_side + 1, step):
        height = min(max_side, area // width // step * step)
        if height >= min_side:
            sizes.add(Size(height, width))
            sizes.add(Size(width, height))
    return sorted(sizes)


def shrunk_bucket(size, area, step):
    """bucket_no_upscale: an image of more than `area` pixels shrinks to about that; then sides are rounded down to
    multiples of `step`, to 0 for less than a step."""
    if size.width * size.height > area:
        aspect_ratio = size.width / size.height
        # sd-scripts' rounding: one side becomes a multiple of the step and the other follows from it; of both ways,
        # the one that changes the aspect ratio less
        width = round(math.sqrt(area * aspect_ratio)) // step * step
        height = round(math.sqrt(area * (1 / aspect_ratio))) // step * step
        by_width = Size(int(width / aspect_ratio + 0.5), width)
        by_height = Size(height, int(height * aspect_ratio + 0.5))

        def distortion(candidate):
            steps_across = max(candidate.width // step, 0.1)
            steps_down = max(candidate.height // step, 0.1)
            return abs(steps_across / steps_down - aspect_ratio)

        size = min([by_width, by_height], key=distortion)
    return Size(size.height // step * step, size.width // step * step)


# ---------------------------------------------------------------------------------------------------------------------
# Single files: FLUX.1 as its authors and ComfyUI publish it, four .safetensors instead of a folder of diffusers'
# ---------------------------------------------------------------------------------------------------------------------


CHECKPOINT_PREFIX = "model.diffusion_model."  # of the transformer's keys in all-in-one checkpoints
CLIP_PREFIX = "text_model."  # of CLIP's keys, but not as transformers 5 saves it

# What a file must hold to be FLUX.1's: keys from which `transformer_config` also takes the sizes.
KNOWN_KEYS = {
    "pretrained_model_name_or_path": (
        "double_blocks.0.img_attn.qkv.weight",
        "double_blocks.0.img_attn.norm.query_norm.scale",
        "img_in.weight",
        "txt_in.weight",
        "vector_in.in_layer.weight",
    ),
    "ae": ("decoder.conv_in.weight",),
    "clip_l": ("text_model.embeddings.token_embedding.weight",),
    "t5xxl": ("encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight",),
}


def is_single_file(args):
    return args.pretrained_model_name_or_path.endswith(".safetensors")


def check_single_files(args):
    """Problems of the four files, as far as their keys tell, and of the tokenizers."""
    problems = []
    for flag, known_keys in KNOWN_KEYS.items():
        path = vars(args)[flag]
        if path is None:
            problems.append(f"--{flag} is needed with {Path(args.pretrained_model_name_or_path).name}")
            continue
        try:
            shapes = tensor_shapes(path)
        except (OSError, SafetensorError) as error:
            problems.append(f"--{flag} {path}: not a whole safetensors file ({error})")
            continue
        missing = [key for key in known_keys if key not in shapes and key.removeprefix(CLIP_PREFIX) not in shapes]
        if missing and flag == "pretrained_model_name_or_path" and is_lora(Path(path)):
            return [
                f"--{flag} {path}: a LoRA, which belongs to --lora_path; here stands the model it was trained from"
            ]
        if missing:
            problems.append(f"--{flag} {path}: holds no {missing[0]}, so it is not the file of FLUX.1 in its own form")
        elif any(key.endswith(("scale_weight", "weight_scale", "scaled_fp8")) for key in shapes):
            problems.append(f"--{flag} {path}: scaled fp8 is not supported: use the 16-bit file")
        else:
            problems += check_tensors(flag, path)
    folder = args.tokenizer_dir
    names = ("tokenizer", "tokenizer_2")
    if not all((folder / name / "tokenizer_config.json").is_file() for name in names):
        problems.append(
            f"--tokenizer_dir {folder}: must hold the folders {' and '.join(names)} of FLUX.1-dev, which "
            "examples/dgx_spark/download.sh fetches"
        )
    return problems


def check_tensors(flag, path):
    """Problems of a file whose tensors are not the weights of its model, by name and shape; no weight is read."""
    tensors = {key: torch.empty(shape, device="meta") for key, shape in tensor_shapes(path).items()}
    model_class, from_tensors = FILE_MODELS[flag]
    try:
        config, weights = from_tensors(tensors)
    except (KeyError, IndexError, ValueError, RuntimeError) as error:
        return [f"--{flag} {path}: its tensors are not those of FLUX.1's file (unknown or missing: {error})"]
    with torch.device("meta"):
        if isinstance(config, dict):
            expected = model_class.from_config(config).state_dict()
        else:
            expected = model_class(config).state_dict()
    expected.pop("encoder.embed_tokens.weight", None)  # T5's is shared.weight
    problems = []
    missing = [name for name in expected if name not in weights]
    # text encoders are published with parts that are not used: CLIP's projection, T5's decoder
    unknown = [name for name in weights if name not in expected and isinstance(config, dict)]
    for what, names in (("missing", missing), ("unknown", unknown)):
        if names:
            problems.append(f"--{flag} {path}: {len(names)} of its weights are {what}, such as {names[0]}")
    for name, weight in expected.items():
        if name in weights and weights[name].shape != weight.shape:
            found = list(weights[name].shape)
            problems.append(f"--{flag} {path}: {name} is {found} where FLUX.1 has {list(weight.shape)}")
            break
    return problems


def tensor_shapes(path):
    """{key: shape} of the tensors in a file, keys without CHECKPOINT_PREFIX."""
    with safe_open(path, "pt") as file:
        keys = list(file.keys())
        return {key.removeprefix(CHECKPOINT_PREFIX): file.get_slice(key).get_shape() for key in keys}


def transformer_config(args):
    """The config of the transformer; for a single file it follows from the shapes."""
    if not is_single_file(args):
        return FluxTransformer2DModel.load_config(
            args.pretrained_model_name_or_path,
            subfolder="transformer",
            revision=args.revision,
            cache_dir=args.cache_dir,
        )
    return transformer_config_of_file(args.pretrained_model_name_or_path)


def transformer_config_of_file(path):
    return transformer_config_of_shapes(tensor_shapes(path))


def transformer_config_of_shapes(shapes):
    width, in_channels = shapes["img_in.weight"]
    head_dim = shapes["double_blocks.0.img_attn.norm.query_norm.scale"][0]
    double_blocks = {key.split(".")[1] for key in shapes if key.startswith("double_blocks.")}
    single_blocks = {key.split(".")[1] for key in shapes if key.startswith("single_blocks.")}
    return {
        "_class_name": "FluxTransformer2DModel",
        "in_channels": in_channels,
        "num_layers": len(double_blocks),
        "num_single_layers": len(single_blocks),
        "attention_head_dim": head_dim,
        "num_attention_heads": width // head_dim,
        "joint_attention_dim": shapes["txt_in.weight"][1],
        "pooled_projection_dim": shapes["vector_in.in_layer.weight"][1],
        "guidance_embeds": "guidance_in.in_layer.weight" in shapes,
        "axes_dims_rope": [16, (head_dim - 16) // 2, (head_dim - 16) // 2],
    }


# (config, weights under the model's names) of the tensors of a file. These read no values, so that they work on the
# meta device too.


def transformer_from_tensors(tensors):
    flux_modules = {name.split(".")[0] for name in FLUX_LAYERS}
    state_dict = {}
    for key, value in tensors.items():
        key = key.removeprefix(CHECKPOINT_PREFIX)
        if key.split(".")[0] in flux_modules:  # all-in-one checkpoints hold VAE and text encoders too
            state_dict[key] = value
    shapes = {key: value.shape for key, value in state_dict.items()}
    return transformer_config_of_shapes(shapes), diffusers_state_dict(state_dict)


def vae_from_tensors(tensors):
    """The VAE in its authors' names or in diffusers'."""
    has_diffusers_names = "encoder.down_blocks.0.resnets.0.conv1.weight" in tensors
    level = "encoder.down_blocks.{}.resnets.{}" if has_diffusers_names else "encoder.down.{}.block.{}"
    channels = []
    while f"{level.format(len(channels), 0)}.conv1.weight" in tensors:
        channels.append(len(tensors[f"{level.format(len(channels), 0)}.conv1.weight"]))
    num_blocks = 0
    while f"{level.format(0, num_blocks)}.conv1.weight" in tensors:
        num_blocks += 1
    config = {
        "down_block_types": ["DownEncoderBlock2D"] * len(channels),
        "up_block_types": ["UpDecoderBlock2D"] * len(channels),
        "block_out_channels": channels,
        "layers_per_block": num_blocks,
        "latent_channels": tensors["decoder.conv_in.weight"].shape[1],
        "use_quant_conv": False,
        "use_post_quant_conv": False,
        "shift_factor": 0.1159,
        "scaling_factor": 0.3611,
    }
    if has_diffusers_names:
        return config, tensors
    return config, convert_ldm_vae_checkpoint(tensors, config)


def clip_from_tensors(tensors):
    """CLIP with or without the level text_model in its names."""
    clip = {key.removeprefix(CLIP_PREFIX): value for key, value in tensors.items()}
    vocab_size, hidden_size = clip["embeddings.token_embedding.weight"].shape
    config = CLIPTextConfig(
        vocab_size=vocab_size,
        hidden_size=hidden_size,
        intermediate_size=len(clip["encoder.layers.0.mlp.fc1.weight"]),
        num_hidden_layers=len({key.split(".")[2] for key in clip if key.startswith("encoder.layers.")}),
        num_attention_heads=hidden_size // 64,
    )
    return config, clip


def t5_from_tensors(tensors):
    """T5, whose embeddings are called shared or encoder.embed_tokens."""
    t5 = dict(tensors)
    if "shared.weight" not in t5:
        t5["shared.weight"] = t5["encoder.embed_tokens.weight"]
    attention = "encoder.block.0.layer.0.SelfAttention"
    num_buckets, num_heads = t5[f"{attention}.relative_attention_bias.weight"].shape
    config = T5Config(
        vocab_size=len(t5["shared.weight"]),
        d_model=t5["shared.weight"].shape[1],
        d_kv=len(t5[f"{attention}.q.weight"]) // num_heads,
        d_ff=len(t5["encoder.block.0.layer.1.DenseReluDense.wi_0.weight"]),
        num_layers=len({key.split(".")[2] for key in t5 if key.startswith("encoder.block.")}),
        num_heads=num_heads,
        relative_attention_num_buckets=num_buckets,
        feed_forward_proj="gated-gelu",
    )
    return config, t5


FILE_MODELS = {  # {flag: (class, how its file is read)}
    "pretrained_model_name_or_path": (FluxTransformer2DModel, transformer_from_tensors),
    "ae": (AutoencoderKL, vae_from_tensors),
    "clip_l": (CLIPTextModel, clip_from_tensors),
    "t5xxl": (T5EncoderModel, t5_from_tensors),
}


def load_transformer_file(path, dtype):
    return model_from(FluxTransformer2DModel, *transformer_from_tensors(load_file(path)), dtype)


def load_vae_file(path, dtype):
    return model_from(AutoencoderKL, *vae_from_tensors(load_file(path)), dtype)


def model_from(model_class, config, state_dict, dtype):
    """A frozen model whose weights are those of the state dict, without a copy that is initialized first."""
    with torch.device("meta"):
        model = model_class.from_config(config)
    model.load_state_dict({key: value.to(dtype) for key, value in state_dict.items()}, assign=True)
    return model.requires_grad_(False).eval()


def create_scheduler(is_dev):
    """The scheduler of FLUX.1-dev, or that of -schnell."""
    if is_dev:
        return FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True)
    return FlowMatchEulerDiscreteScheduler(shift=1.0, use_dynamic_shifting=False)


def load_text_encoder_files(args, dtype):
    tokenizer = AutoTokenizer.from_pretrained(args.tokenizer_dir / "tokenizer", trust_remote_code=False)
    tokenizer_2 = AutoTokenizer.from_pretrained(args.tokenizer_dir / "tokenizer_2", trust_remote_code=False)
    clip_config, clip = clip_from_tensors(load_file(args.clip_l))
    clip_config.eos_token_id = tokenizer.eos_token_id
    t5_config, t5 = t5_from_tensors(load_file(args.t5xxl))
    pipeline = FluxPipeline(
        scheduler=load_noise_scheduler(args),
        vae=None,
        transformer=None,
        text_encoder=CLIPTextModel.from_pretrained(None, config=clip_config, state_dict=clip, dtype=dtype),
        tokenizer=tokenizer,
        text_encoder_2=T5EncoderModel.from_pretrained(None, config=t5_config, state_dict=t5, dtype=dtype),
        tokenizer_2=tokenizer_2,
    )
    return freeze_models(pipeline)


# ---------------------------------------------------------------------------------------------------------------------
# Training
# ---------------------------------------------------------------------------------------------------------------------


def create_pipeline(family, transformer, vae, noise_scheduler):
    """A pipeline of the models in training, for prompts that are embedded already."""
    return family.pipeline_class(
        # its own scheduler: set_timesteps replaces the 1000 noise levels that training picks from
        scheduler=FlowMatchEulerDiscreteScheduler.from_config(noise_scheduler.config),
        vae=vae,
        transformer=transformer,
        **dict.fromkeys(family.text_parts),
        **family.settings,
    )


def pipeline_call(family, prompt_encoder, args, prompts):
    """Arguments of the pipeline: generate an image of --resolution from each prompt."""
    call = family.prompt_arguments(prompt_encoder, prompts) | family.sampling
    return call | {"height": args.resolution, "width": args.resolution}


def validation_prompts(args, family):
    """(what is generated while training, what after it, problems): lists of `ValidationPrompt`."""
    options = {"width", "height", "seed"}
    takes = inspect.signature(family.pipeline_class.__call__).parameters
    options |= {"num_inference_steps", "guidance_scale"} & set(takes)
    if not family.draws_with_guidance:
        options.remove("guidance_scale")
    if "true_cfg_scale" in takes:
        options |= {"true_cfg_scale", "negative_prompt"}
    if args.train_transformer_frac > 0 and not args.train_text_encoder:  # prompts are embedded at full scale
        options.add("lora_scale")
    prompts, problems = read_validation_prompts("--validation_prompts", args.validation_prompts, options=options)
    prompts += repeated_prompt(args.validation_prompt, args.num_validation_images, seed=args.seed)
    final_prompts = []
    if not args.skip_final_inference:
        final_prompts = repeated_prompt(args.final_validation_prompt, args.num_validation_images, seed=args.seed)
        final_prompts = final_prompts or prompts
    defaults = {
        "guidance_scale": args.validation_guidance_scale,
        "num_inference_steps": args.validation_num_inference_steps,
    }
    return with_defaults(prompts, **defaults), with_defaults(final_prompts, **defaults), problems


def log_validation(
    accelerator,
    family,
    transformer,
    result_weights,
    vae,
    noise_scheduler,
    prompt_encoder,
    args,
    prompts,
    step,
    weights_of=None,
):
    """Generates images of prompts and returns them; they go to validation/step-N.png and to the trackers."""
    pipeline = create_pipeline(family, accelerator.unwrap_model(transformer), vae, noise_scheduler)
    seeds = [args.seed if prompt.seed is None else prompt.seed for prompt in prompts]
    with (
        result_weights(),
        undisturbed(transformer, device=accelerator.device),
        offload_models(vae, device=accelerator.device, offload=args.offload or args.cache_latents),
    ):
        calls = []
        for prompt in prompts:
            call = pipeline_call(family, prompt_encoder, args, [prompt.prompt]) | sampling_arguments(prompt)
            call |= {"height": prompt.height or args.resolution, "width": prompt.width or args.resolution}
            if prompt.negative is not None:
                negative = family.prompt_arguments(prompt_encoder, [prompt.negative])
                call |= {f"negative_{name}": value for name, value in negative.items()}
            calls.append(call)
        lora_scales = [prompt.lora_scale for prompt in prompts]
        images = generate_images(accelerator, pipeline, calls, seeds=seeds, lora_scales=lora_scales)
    if not images:  # interrupted
        return []
    captions = [prompt.described(seed=args.seed) for prompt in prompts]
    title = prompts[0].prompt
    if args.validation_prompts and len({prompt.prompt for prompt in prompts}) > 1:
        captions = [f"{prompt.prompt} | {caption}" for prompt, caption in zip(prompts, captions, strict=True)]
        title = ""
    save_images(accelerator, args, images, captions, prompt=title, step=step, weights_of=weights_of)
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

    That is the loss of training for the center of the image, at the noise and the levels of `fixed_noise`, without
    --weighting_scheme. With --preserve_prompts it is "distance_from_base" as well: how far the adapter moves what is
    predicted for these prompts at the same noisy latents. prompts_instead(caption) are those of an image, taken in
    turn; base_pooled {prompt: [1, P]} are their embeddings by CLIP without adapter.
    """
    num_levels = len(NOISE_LEVELS)
    guidance = None
    if guidance_embeds:
        guidance = torch.full((num_levels,), args.guidance_scale, device=accelerator.device)

    def losses_of(index):
        example = held_out.examples[index]
        key = (index, example.bucket, False)
        moments = held_out.moments[key][None].to(accelerator.device)
        noisy = fixed_noise(family.sample_latents(moments, vae, fixed_generator(index)), index)
        loss_mask = None
        if held_out.has_masks:
            loss_mask = held_out.loss_masks[key].to(accelerator.device).expand(num_levels, -1, -1, -1)
        loss = compute_loss(
            transformer,
            *noisy,
            *prompt_encoder.encode_prompts([example.prompt()] * num_levels),
            family=family,
            guidance=guidance,
            weighting_scheme="none",
            loss_mask=loss_mask,
        )
        losses = {"validation_loss": loss}
        choices = prompts_instead(example.prompt())
        if choices:
            prompts = [choices[(index + level) % len(choices)] for level in range(num_levels)]
            losses["distance_from_base"] = compute_preservation_loss(
                transformer,
                *noisy,
                *prompt_encoder.encode_prompts(prompts),
                torch.cat([base_pooled[prompt] for prompt in prompts]),
                family=family,
                guidance=guidance,
                weighting_scheme="none",
            )
        return losses

    return held_out_means(accelerator, transformer, len(held_out.examples), losses_of)


def embedding_name(abstraction):
    """The name of the embedding's file of a word, by which ComfyUI's prompts call it: embedding:NAME."""
    return re.sub(r"[^\w.-]+", "_", abstraction)


def embeddings_file(args):
    """The file of the new tokens."""
    return args.output_dir / f"{args.output_dir.resolve().name}_emb.safetensors"


def result_files(args):
    """The files of LoRAs and new tokens that a run writes: of those of epochs the ones that are there already."""
    files = [lora_file(args.output_dir, args.output_name)]
    if args.output_name and args.save_every_n_epochs:
        pattern = f"{glob.escape(args.output_name)}-{'[0-9]' * 6}.safetensors"
        found = sorted(args.output_dir.parent.glob(pattern))
        files += [file for file in found if not file.with_suffix("").is_dir()]  # else of a run with a date as its name
    if args.train_text_encoder_ti:
        files += [embeddings_file(args), args.output_dir / "embeddings"]
    return files


def save_result(accelerator, args, adapted_models, header, dtype, epoch=None):
    """Writes the LoRA, of an epoch or of the whole run. All processes call it, one writes."""
    path = lora_file(args.output_dir, args.output_name, epoch)
    save_lora(
        path.parent,
        adapted_models,
        dtype,
        weight_name=path.name,
        form=args.save_format,
        header=header,
        writes=writes_files(accelerator),
    )


def file_header(args, examples, embedding_handler, architecture, step, steps_per_epoch):
    """The header of the LoRA's file at a step. It holds what calls the subject in ComfyUI, and the captions' tags,
    {folder: {tag: how often an epoch has it}}."""
    instance_examples = [example for example in examples if not example.options["is_reg"]]
    tag_counts = {}
    for example in instance_examples if not args.streaming else []:
        counts = tag_counts.setdefault(Path(example.name).parent.name, {})
        for tag in comma_list(example.prompt().lower()):
            counts[tag] = counts.get(tag, 0) + example.repeats
    trigger_words = class_tokens(examples)
    if embedding_handler.abstractions:  # words like TOK call the new tokens as files of embeddings
        trigger_words = [f"embedding:{embedding_name(word)}" for word in embedding_handler.abstractions]
    resolution = instance_examples[0].resolution
    return lora_header(
        args,
        architecture=architecture,
        resolution=(resolution.width, resolution.height),
        step=step,
        steps_per_epoch=steps_per_epoch,
        trigger_words=trigger_words,
        captions=tag_counts,
    )


def class_tokens(examples):
    """The captions of images without their own, such as: tjtoy toy. Those of class images are left out."""
    found = [example.options["class_tokens"] for example in examples if not example.options["is_reg"]]
    return list(dict.fromkeys(filter(None, found)))


LORA_CARD = """
# {name}

{adapter} of rank {rank} and alpha {lora_alpha} for {trained_model}, trained with DreamBooth.

```python
import torch
from diffusers import {pipeline_class}

pipeline = {pipeline_class}.from_pretrained({from_pretrained})
{load_lora}
# Each layer is copied to the GPU when it computes; where the whole pipeline fits, pipeline.to("cuda") is faster
if torch.cuda.is_available():
    pipeline.enable_group_offload(torch.device("cuda"), offload_type="leaf_level", use_stream=True)
image = pipeline(prompt={prompt!r}, {size}).images[0]
image.save("image.png")
```
"""

NEW_TOKENS_CARD = """
# {name}

{what_was_trained} for {trained_model}, trained with pivotal tuning.

The prompt below contains the new tokens: {tokens}.

```python
import torch
from diffusers import FluxPipeline
{import_hub}from safetensors.torch import load_file

pipeline = FluxPipeline.from_pretrained({from_pretrained})
{load_lora}
{set_eos_token}embeddings = load_file({embeddings_file})
tokens = [f"<s{{i}}>" for i in range(len(embeddings["clip_l"]))]
pipeline.load_textual_inversion(
    embeddings["clip_l"], token=tokens, text_encoder=pipeline.text_encoder, tokenizer=pipeline.tokenizer
)
if "t5" in embeddings:
    pipeline.load_textual_inversion(
        embeddings["t5"], token=tokens, text_encoder=pipeline.text_encoder_2, tokenizer=pipeline.tokenizer_2
    )
# Each layer is copied to the GPU when it computes; where the whole pipeline fits, pipeline.to("cuda") is faster
if torch.cuda.is_available():
    pipeline.enable_group_offload(torch.device("cuda"), offload_type="leaf_level", use_stream=True)
image = pipeline(prompt={prompt!r}, {size}).images[0]
image.save("image.png")
```
"""


def save_model_card(
    args, dtype, embedding_handler, prompt, embeddings_name, hub_repo=None, trigger_words=(), held_out=""
):
    """Writes README.md: what was trained, and code that generates `prompt`, with the files in the output folder or,
    with `hub_repo`, those on the Hub; and what `held_out` tells of the held-out loss."""
    folder = args.output_dir.resolve()
    lora = lora_file(args.output_dir, args.output_name).resolve()
    base_model = args.pretrained_model_name_or_path
    if is_single_file(args):
        is_dev = transformer_config(args)["guidance_embeds"]
        base_model = "black-forest-labs/FLUX.1-dev" if is_dev else "black-forest-labs/FLUX.1-schnell"
    from_pretrained = [repr(base_model), f"dtype={dtype}"]
    if args.revision:
        from_pretrained.append(f"revision={args.revision!r}")
    if args.variant:
        from_pretrained.append(f"variant={args.variant!r}")
    adapter = adapter_kind(args)
    family = find_family(args)
    call = {"height": args.resolution, "width": args.resolution, "max_sequence_length": args.max_sequence_length}
    values = {
        "name": folder.name,
        "adapter": adapter,
        "pipeline_class": family.pipeline_class.__name__,
        "rank": args.rank,
        "lora_alpha": args.lora_alpha,
        "trained_model": args.pretrained_model_name_or_path,
        "from_pretrained": ", ".join(from_pretrained),
        "load_lora": f"pipeline.load_lora_weights({hub_repo or str(lora.parent)!r}, weight_name={lora.name!r})",
        "prompt": embedding_handler.replace_abstractions(prompt),
        "size": ", ".join(f"{name}={value}" for name, value in (call | family.sampling).items()),
    }
    if not embedding_handler.abstractions:
        text = LORA_CARD.format(**values)
    else:
        tokens = [f"`{tokens}` for {word}" for word, tokens in embedding_handler.abstractions.items()]
        values |= {
            "what_was_trained": f"{adapter} of rank {args.rank} and alpha {args.lora_alpha} and new tokens",
            "tokens": ", ".join(tokens),
            "import_hub": "",
            "set_eos_token": "",
            "embeddings_file": repr(str(folder / embeddings_name)),
        }
        if not lora.exists():  # --train_transformer_frac 0
            values |= {"what_was_trained": "New tokens", "load_lora": ""}
        if hub_repo:
            values["import_hub"] = "from huggingface_hub import hf_hub_download\n"
            values["embeddings_file"] = f"hf_hub_download({hub_repo!r}, {embeddings_name!r})"
        if args.pool_at_eos or is_single_file(
            args
        ):  # diffusers pools at the last new token if the model's eos_token_id is 2
            values["set_eos_token"] = "pipeline.text_encoder.eos_token_id = pipeline.tokenizer.eos_token_id\n"
        text = NEW_TOKENS_CARD.format(**values)
        trigger_words = list(embedding_handler.abstractions)
    if held_out:
        text = f"{text.rstrip()}\n\n{held_out}"
    tags = ["text-to-image", "flux" if family.has_clip else "flux2", "lora", "dreambooth", "diffusers"]
    write_model_card(args, text, tags, base_model, trigger_words, instance_prompt=args.instance_prompt)


def create_optimizer(args, params_to_optimize, fused=None):
    """The optimizer that --optimizer names; each group of parameters has its own learning rate and weight decay."""
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


def training_stops(args, max_train_steps, checkpoint):
    """[text_encoder_stop, transformer_stop]: the steps after which text encoders and transformer are not trained.

    What had stopped before the checkpoint was saved does not start again, even if the run has more steps now.
    """
    text_encoder_frac = 0.0
    if args.train_text_encoder:
        text_encoder_frac = args.train_text_encoder_frac
    if args.train_text_encoder_ti:
        text_encoder_frac = args.train_text_encoder_ti_frac
    fractions = (text_encoder_frac, args.train_transformer_frac)
    stops = [math.ceil(round(frac * max_train_steps, 6)) for frac in fractions]  # 0.07 * 100 is 7.000000000000001
    if checkpoint is None:
        return stops
    saved = checkpoint_state(checkpoint)
    saved_stops = saved.get("trained_until", stops)
    for i, saved_stop in enumerate(saved_stops):
        if saved_stop < saved.get("global_step", 0):
            stops[i] = saved_stop
    return stops


def describe_run(
    args,
    examples,
    held_out_examples,
    class_examples,
    embedding_handler,
    text_params,
    text_encoder_stop,
    num_parts=0,
):
    """{name: text} to be printed before training: data, of a stream in `num_parts`, new tokens, text encoders."""
    run_info = {"data": f"{len(examples)} images: {count_sizes(example.bucket for example in examples)}"}
    if num_parts:
        sizes = " or ".join(map(str, parse_buckets(args.aspect_ratio_buckets, args.resolution)))
        run_info = {"data": f"a stream of {num_parts} files at {sizes} px"}
        examples = []  # of which nothing more is known
    folders = {image.files[0].parent for image in all_images(examples) if image.files}
    default = "class_tokens" if args.dataset_config else "--instance_prompt"
    run_info |= describe_data([*examples, *held_out_examples], sorted(folders), default)
    run_info |= describe_masks(args, examples)
    run_info |= describe_class_images(class_examples)
    tokenizers = load_tokenizers(args)
    captions = {example.name: example.prompt() for example in examples}
    if "llm" in tokenizers:
        family = find_family(args)
        captions = {name: family.chat(tokenizers["llm"], caption) for name, caption in captions.items()}
        run_info |= describe_long_prompts(captions, tokenizers["llm"], args.max_sequence_length)
    else:
        run_info |= describe_long_prompts(captions, tokenizers["t5"], args.max_sequence_length, tokenizers["clip_l"])
    if embedding_handler.abstractions:
        tokens = [f"{tokens} for {word}" for word, tokens in embedding_handler.abstractions.items()]
        run_info["tokens"] = f"{', '.join(tokens)} in {' and '.join(embedding_handler.embeddings)}"
        any_case = re.compile(match_any(embedding_handler.abstractions).pattern, re.IGNORECASE)
        others = []
        for example in examples:
            others += [
                word for word in any_case.findall(example.prompt()) if word not in embedding_handler.abstractions
            ]
        if others:
            run_info["no tokens"] = f"for {', '.join(sorted(set(others)))}, in another case ({len(others)} times)"
    if text_params:
        num_params = sum(parameter.numel() for parameter in text_params)
        run_info["text encoders"] = f"{num_params:,} parameters, trained until step {text_encoder_stop}"
        if args.optimizer == "prodigy" and args.text_encoder_lr != args.learning_rate:
            run_info["Prodigy"] = (
                f"uses one learning rate for all parameters, {args.learning_rate:g}: --text_encoder_lr is not used"
            )
    return run_info


def generate_command(args, prompt):
    """The command, below examples/, that generates an image with the result."""
    folder = shlex.quote(str(args.output_dir))
    command = f"dreambooth/generate.py {folder} --prompt {shlex.quote(prompt)}"
    if not os.access(Path(), os.W_OK):  # as in the playbook's container, which keeps nothing outside its volumes
        command += f" --output {folder}"
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
    set_seed(args.seed)

    # 2. Data
    family = find_family(args)
    examples, problems = find_examples(args)
    models = model_identities(args, ["ae", "clip_l", "t5xxl", "tokenizer_dir"])
    if args.dataset_config:
        adopt_dataset_config(args, examples)
    examples, held_out_examples, held_out_problems = find_held_out(args, examples)
    problems += held_out_problems
    if not problems and not args.streaming:
        problems += check_effects(examples, args)
    captions = [example.prompt() for example in examples if isinstance(example.caption, str)]
    class_prompts, prompt_problems = read_prompts("--class_prompt", args.class_prompt, captions)
    problems += prompt_problems + check_no_new_tokens("--class_prompt", class_prompts, args)
    if class_prompts:
        problems += check_class_images(
            args.class_data_dir,
            args.num_class_images,
            prompts=class_prompts,
            model=models["transformer"],
            size=Size(args.resolution, args.resolution),
        )
    preserve_prompts = []
    prompts_instead = {}  # {caption: the same with other words, if --preserve_prompts names words}
    prompt_problems = []
    if args.preserve_outputs or (args.preserve_prompts and held_out_examples):
        dropped_prompts = {example.dropped_prompt(args) for example in examples if example.drops_captions()} - {""}
        all_captions = captions + sorted(dropped_prompts)
        preserve_prompts, prompt_problems = read_prompts("--preserve_prompts", args.preserve_prompts, all_captions)
        if "=>" in args.preserve_prompts:
            for caption in set(all_captions):
                prompts, _ = read_prompts("--preserve_prompts", args.preserve_prompts, [caption])
                prompts_instead[caption] = prompts or preserve_prompts
    problems += prompt_problems + check_no_new_tokens("--preserve_prompts", preserve_prompts, args)
    varying_class_prompts = any(example.options["is_reg"] and example.varies() for example in examples)
    if args.prior_target == "base" and args.train_text_encoder and varying_class_prompts:
        problems.append(
            "--prior_target base with --train_text_encoder takes is_reg images whose captions stay the same: leave "
            "shuffle_caption, enable_wildcard and caption_tag_dropout_rate out"
        )
    dataset = DreamBoothDataset(examples, args)
    accumulation = args.gradient_accumulation_steps
    processes = {"process_index": accelerator.process_index, "num_processes": accelerator.num_processes}
    steps_per_epoch = None
    if not args.streaming:
        sampler = StepSampler(
            [(example.dataset, example.bucket) for example in dataset.examples],
            {(example.dataset, example.bucket): example.options["batch_size"] for example in examples},
            seed=args.seed,
            **processes,
        )
        steps_per_epoch = math.ceil(sampler.steps_per_epoch / accumulation)
    checkpoint, resume_problems = agreed_checkpoint(accelerator, args.output_dir, args.resume_from_checkpoint)
    problems += resume_problems
    args.pool_at_eos = pools_at_eos(args, checkpoint)
    requested_steps = args.max_train_steps or args.num_train_epochs * steps_per_epoch
    stops = training_stops(args, requested_steps, checkpoint)
    text_encoder_stop, transformer_stop = stops
    # fewer than requested where nothing is left to train: new tokens alone are done after --train_text_encoder_ti_frac
    max_train_steps = max(text_encoder_stop, transformer_stop)
    validation_steps = args.validation_steps or args.validation_epochs * (steps_per_epoch or 1)
    validation_loss_steps = args.validation_loss_steps or args.validation_steps or DEFAULT_STEPS
    val_prompts, final_prompts, prompt_problems = validation_prompts(args, family)
    problems += prompt_problems
    run = run_settings(args, accelerator.num_processes, data=data_record(examples), models=models)
    run |= held_out_record(held_out_examples)
    if args.dataset_config and not problems:
        run["the hash of --dataset_config"] = hashlib.sha256(args.dataset_config.read_bytes()).hexdigest()[:16]
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
        problems += check_caches(args, dataset, weight_dtype)
    problems = gather_problems(problems)
    if problems:
        fail(accelerator, problems)
    sampler.begun_with = begun_with
    hub_repo = create_hub_repo(accelerator, args)
    claim_output_dir(accelerator, args.output_dir, result_files(args))
    index = EncodedIndex(latents_folder(args), args, run)

    # 3. Prompts: embedded once; frozen text encoders are freed before the transformer is loaded
    prompts = set()
    prompts.update(class_prompts, preserve_prompts)
    if class_prompts or val_prompts or final_prompts:
        prompts.update(family.more_prompts)
    prompts.update(example.caption for example in class_examples(args, class_prompts))
    prompts.update(texts_of(val_prompts + final_prompts))
    prompts.update(example.prompt() for example in held_out_examples)
    has_varying_prompts = args.streaming
    for example in examples:
        if example.varies():
            has_varying_prompts = True
        else:
            prompts.add(example.prompt())
        if example.drops_captions():
            prompts.add(example.dropped_prompt(args))
    prompts = sorted(prompts)

    def load_pipeline():
        pipeline = load_text_encoders(args, encoder_dtype(weight_dtype))
        quantize_text_encoders(pipeline, encoder_dtype(weight_dtype), args.quantize_text_encoders)
        return pipeline

    # where all encoders are frozen, they are loaded if the disk lacks a prompt
    pipeline = load_pipeline() if args.train_text_encoder or args.train_text_encoder_ti else load_pipeline
    adapted_models = {}  # those with a LoRA, under diffusers' names
    text_lora_params = []
    if args.train_text_encoder:
        text_lora_params = add_lora(
            pipeline.text_encoder,
            rank=args.rank,
            alpha=args.lora_alpha,
            use_rslora=args.use_rslora,
            init_lora_weights=args.init_lora_weights,
            dropout=0.0,
            target_modules=clip_targets(args),  # always a LoRA: transformers loads no other kind into CLIP
        )
        adapted_models["text_encoder"] = pipeline.text_encoder
    embedding_handler = add_new_tokens(pipeline, args)
    text_params = [*embedding_handler.parameters(), *text_lora_params]
    trained_encoders = {"clip_l"} if args.train_text_encoder else set(embedding_handler.embeddings)
    prompt_encoder = PromptEncoder(
        accelerator,
        pipeline,
        weight_dtype,
        max_sequence_length=args.max_sequence_length,
        folder=encoded_folder(args.output_dir),
        trained=trained_encoders,
        offload=args.offload,
        keep_encoders=has_varying_prompts,
        disk_cache_dir=args.disk_cache_dir.expanduser() if args.cache_text_encoder_outputs_to_disk else None,
        index=EncodedIndex(prompts_folder(args), args, run),
        rewrite_prompt=embedding_handler.replace_abstractions,
    )
    prompt_encoder.cache_prompts(prompts)
    base_prompts = set(preserve_prompts)  # what the model without adapters is asked for
    if args.prior_target == "base" and args.train_text_encoder:
        base_prompts.update(class_prompts)
        base_prompts.update(example.caption for example in class_examples(args, class_prompts))
        for example in examples:
            if example.options["is_reg"]:
                base_prompts.update([example.prompt(), example.dropped_prompt(args)])
    with torch.no_grad(), without_adapters(*adapted_models.values()):
        base_pooled = {prompt: prompt_encoder.encode_prompts([prompt])[1] for prompt in sorted(base_prompts)}

    # 4. Models: VAE, class images and cached latents; then the transformer and its LoRA
    noise_scheduler = load_noise_scheduler(args)
    num_present = len(class_examples(args, class_prompts))
    # also if only another machine lacks some, of its own folder: all draw together
    is_short = any(gather_objects([num_present < args.num_class_images]))
    lacks_class_images = args.with_prior_preservation and is_short
    if args.with_prior_preservation and not lacks_class_images:
        dataset.class_examples = class_examples(args, class_prompts)
    held_out = DreamBoothDataset(held_out_examples, args)
    held_out_keys = held_out.image_keys()
    keys = sorted(dataset.image_keys(), key=lambda key: key[1])  # images of one size are encoded together
    if held_out_examples:
        found = index.find(accelerator, "held out", held_out_keys, held_out.pixel_values)
        held_out.moments = found or {}
    if args.cache_latents and not lacks_class_images:
        found = index.find(accelerator, dataset.index_label("latents"), keys, dataset.pixel_values)
        dataset.moments = found or {}
    draws = (val_prompts or final_prompts) and not args.precompute_only
    needs_vae = draws or lacks_class_images or not dataset.moments or (held_out_examples and not held_out.moments)
    offload_vae = needs_vae and (args.offload or args.cache_latents)
    if needs_vae:
        vae = load_vae(args, weight_dtype)
        vae.to("cpu" if offload_vae else device)
    else:
        vae = index.load_vae(family.vae_class, dataset.index_label("latents"), keys)
    with offload_models(vae, device=device, offload=offload_vae):
        if lacks_class_images:
            transformer = load_transformer(args, weight_dtype)
            if args.quantize_base != "none":
                quantize_base(transformer, weight_dtype, args.quantize_base)
            if args.blocks_to_swap:
                BlockSwap(transformer, args.blocks_to_swap, device)
            elif args.quantize_base != "none":
                transformer.to(device)
            else:
                place({"transformer": transformer}, device, pixels=args.sample_batch_size * args.resolution**2)
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
            keys = sorted(dataset.image_keys(), key=lambda key: key[1])
        if held_out_examples:
            if not held_out.moments:
                held_out.moments = cache_moments(
                    accelerator, vae, held_out_keys, held_out.pixel_values, index, "held out"
                )
            held_out.cache_loss_masks(accelerator, index, "held-out masks")
        if args.cache_latents:
            if not dataset.moments:
                dataset.moments = cache_moments(
                    accelerator, vae, keys, dataset.pixel_values, index, dataset.index_label("latents")
                )
            dataset.cache_loss_masks(accelerator, index)
    if args.precompute_only:
        encoded = {f"prompts, {name}": embeddings for name, embeddings in prompt_encoder.cached.items()}
        encoded |= {"latents": dataset.moments, "held out": held_out.moments}
        print_precomputed(accelerator, encoded)
        accelerator.end_training()
        return
    transformer = load_transformer(args, weight_dtype)
    base_size = transformer.num_parameters()
    guidance_embeds = transformer.config.guidance_embeds  # FLUX.1-dev was distilled with guidance, -schnell was not
    architecture = family.architecture(transformer.config)
    if args.quantize_base != "none":
        quantize_base(transformer, weight_dtype, args.quantize_base)
    block_by_block = args.fsdp or args.blocks_to_swap  # it may not fit as a whole: `shard` or BlockSwap moves it
    transformer.to("cpu" if block_by_block else device)

    if args.train_transformer_frac > 0:
        add_lora(
            transformer,
            rank=args.rank,
            alpha=args.lora_alpha,
            use_rslora=args.use_rslora,
            init_lora_weights=args.init_lora_weights,
            dropout=args.lora_dropout,
            target_modules=lora_targets(args, family, transformer),
            **adapter_options(args),
        )
    if args.lora_path:
        start_from_lora(args.lora_path, {"transformer": transformer, **adapted_models}, flux=family.has_clip)
    if args.gradient_checkpointing:
        transformer.enable_gradient_checkpointing()
    if args.compile:
        compile_blocks(transformer)
    if args.blocks_to_swap:
        block_swap = BlockSwap(transformer, args.blocks_to_swap, device)
    if args.fsdp:
        shard(transformer, device, weight_dtype, hybrid=args.hybrid_shard)
    lora_params = [parameter for parameter in transformer.parameters() if parameter.requires_grad]
    if lora_params:
        adapted_models = {"transformer": transformer, **adapted_models}

    # 5. Optimizer and schedule
    total_batch_size = args.train_batch_size * accumulation * accelerator.num_processes
    lr_scale = total_batch_size if args.scale_lr else 1
    params_to_optimize = []
    if lora_params:
        params_to_optimize.append(
            {"params": lora_params, "lr": args.learning_rate * lr_scale, "weight_decay": args.adam_weight_decay}
        )
    if text_params:
        # Prodigy estimates one step size for all groups, so they need the same learning rate
        text_encoder_lr = args.learning_rate if args.optimizer == "prodigy" else args.text_encoder_lr
        params_to_optimize.append(
            {
                "params": text_params,
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
    elif not lora_params:  # DistributedDataParallel refuses a model without trained parameters
        optimizer, lr_scheduler = accelerator.prepare(optimizer, lr_scheduler)
    else:
        transformer, optimizer, lr_scheduler = accelerator.prepare(transformer, optimizer, lr_scheduler)
    trained_params = [*lora_params, *text_params]
    result_weights = contextlib.nullcontext  # what is validated and saved
    averages = {}
    if args.use_ema:
        # sharded tensors have no _foreach_copy_
        ema = EMAModel(trained_params, decay=args.ema_decay, foreach=not args.fsdp)
        averages = {str(i): tensor for i, tensor in enumerate(ema.shadow_params)}
        unwrapped_transformer = accelerator.unwrap_model(transformer)
        result_weights = functools.partial(averaged_weights, ema, trained_params, unwrapped_transformer)
    save_dtype = torch.float32 if args.upcast_before_saving else weight_dtype

    def header(step=None):
        return file_header(args, examples, embedding_handler, architecture, step or global_step, steps_per_epoch)

    register_lora_checkpointing(
        accelerator,
        adapted_models,
        optimizer,
        dtype=save_dtype,
        header=lambda adapter_name: header(),
        result_weights=result_weights,
        teacher=averages,
    )
    embedding_handler.register_checkpointing(accelerator, result_weights)
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
    # encoders that are trained to the end stay, to draw with their average
    has_pivot = text_encoder_stop < max_train_steps or not args.use_ema
    if prompt_encoder.trained and has_pivot and global_step >= text_encoder_stop:  # the run resumes behind the pivot
        prompt_encoder.freeze(prompts, keep=args.load_best_model_at_end)

    places = {}  # of a stream's lanes, behind the last micro-step
    if args.streaming and checkpoint:
        places = checkpoint_state(checkpoint).get("stream", {})

    def save():
        state = run | {"trained_until": stops}
        if args.streaming:
            state["stream"] = gather_places(places)
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
            collate_fn=collate,
            num_workers=args.dataloader_num_workers,
            pin_memory=device.type == "cuda",
            worker_init_fn=outlive_signals,
        )

    # 7. Train
    run_info = describe_run(
        args,
        examples,
        held_out_examples,
        dataset.class_examples,
        embedding_handler,
        text_params,
        text_encoder_stop,
        num_parts=stream.num_parts if stream else 0,
    )
    if not args.streaming:
        run_info |= describe_small_groups(sampler.groups, sampler.batch_size, size_of=lambda group: group[1])
    if args.use_ema:
        run_info["average"] = f"decay {args.ema_decay:g}, of what is saved and drawn"
    run_info |= describe_held_out(held_out_examples, examples, validation_loss_steps)
    if args.preserve_outputs:
        interval = "every step" if args.preserve_every == 1 else f"every {args.preserve_every} steps"
        run_info["preserved"] = f"outputs for {len(preserve_prompts)} prompts, {interval}"
    batch_sizes = sorted({example.options["batch_size"] for example in examples})
    batch = " or ".join(str(batch_size) for batch_size in batch_sizes)
    print_header(accelerator, args, run_info, lora_params, base_size, max_train_steps, steps_per_epoch, batch)
    results = [lora_file(args.output_dir, args.output_name), embeddings_file(args), args.output_dir / "embeddings"]
    marks = {"pivot: text encoders frozen": text_encoder_stop, "transformer frozen": transformer_stop}
    keep_earlier_results(
        accelerator, args.output_dir, results, first_step=global_step, max_train_steps=max_train_steps
    )
    start_logging(accelerator, args, "dreambooth-flux", global_step, marks)
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
    if val_prompts and global_step == 0:
        log_validation(
            accelerator,
            family,
            transformer,
            result_weights,
            vae,
            noise_scheduler,
            prompt_encoder,
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
    num_images = 0  # in them, on all processes, without class images
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

            if args.cache_latents:
                moments = to_device(batch["moments"], device)
            else:
                with offload_models(vae, device=device, offload=offload_vae):
                    moments = encode_moments(vae, batch["pixel_values"])
            latents = family.sample_latents(moments, vae, generator)
            prompt_embeds, pooled_prompt_embeds = prompt_encoder.encode_prompts(batch["prompt"])
            guidance = None
            if guidance_embeds:
                guidance = torch.full((len(latents),), args.guidance_scale, device=device)
            noise, sigmas = sample_noise(latents, args=args, noise_scheduler=noise_scheduler, generator=generator)
            is_class_image = batch["is_class_image"]
            target = None
            class_rows = is_class_image.nonzero().flatten()  # on the CPU, where nothing waits for it
            if args.prior_target == "base" and len(class_rows):
                class_prompts_of_batch = [batch["prompt"][row] for row in class_rows.tolist()]
                class_rows = to_device(class_rows, device)
                base_pooled_prompt_embeds = pooled_prompt_embeds[class_rows]
                if args.train_text_encoder:
                    base_pooled_prompt_embeds = torch.cat([base_pooled[prompt] for prompt in class_prompts_of_batch])
                with accelerator.autocast():
                    base_pred = predict_base_velocity(
                        transformer,
                        latents[class_rows],
                        noise[class_rows],
                        sigmas[class_rows],
                        prompt_embeds[class_rows],
                        base_pooled_prompt_embeds,
                        family=family,
                        guidance=None if guidance is None else guidance[class_rows],
                    )
                target = pack_latents(noise) - pack_latents(latents)
                target[class_rows] = base_pred.to(target.dtype)
            with accelerator.autocast():
                losses = compute_loss(
                    transformer,
                    latents,
                    noise,
                    sigmas,
                    prompt_embeds,
                    pooled_prompt_embeds,
                    family=family,
                    guidance=guidance,
                    weighting_scheme=args.weighting_scheme,
                    target=target,
                    loss_mask=to_device(batch["loss_mask"], device) if dataset.has_masks else None,
                )
            # class images, drawn or of is_reg, count prior_loss_weight times
            losses = torch.where(to_device(is_class_image, device), args.prior_loss_weight * losses, losses)
            if args.with_prior_preservation:
                instance_losses, prior_losses = losses.chunk(2)  # `collate` puts class images behind the others
                instance_loss = instance_losses.mean()
                prior_loss = prior_losses.mean()
                loss = instance_loss + prior_loss
            else:
                instance_losses = losses
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
                with torch.set_grad_enabled(args.train_text_encoder):  # new tokens are not in these prompts
                    prompt_embeds, pooled_prompt_embeds = prompt_encoder.encode_prompts(batch_prompts)
                with accelerator.autocast():
                    preserve_loss = compute_preservation_loss(
                        transformer,
                        latents,
                        noise,
                        sigmas,
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
            num_images += len(instance_losses) * accelerator.num_processes
            if not accelerator.sync_gradients:
                continue

            average_gradients(accelerator, text_params)
            if global_step >= transformer_stop:
                for parameter in lora_params:
                    parameter.grad = None
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
            if prompt_encoder.trained:
                embedding_handler.retract_embeddings(is_finite | (accelerator.scaler is not None))
            optimizer.zero_grad()

        global_step += 1
        if prompt_encoder.trained and has_pivot and global_step == text_encoder_stop:
            prompt_encoder.freeze(prompts, keep=args.load_best_model_at_end)
        if args.use_ema:
            ema.step(trained_params)  # takes those that are frozen as they are, which the transformer goes on with
        done = global_step == max_train_steps
        numbers = {
            "loss": mean_loss,
            "grad_norm": grad_norm,
            "stop_requested": mean_stop,
            "taken": is_finite & (not accelerator.optimizer_step_was_skipped),
        }
        step_reads.put(global_step, numbers, step_logs(optimizer, num_images, started, device))
        lr_scheduler.step()  # after the step's rate was logged
        validates = held_out_examples and (global_step % validation_loss_steps == 0 or global_step == 1 or done)
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
        if args.save_every_n_epochs and adapted_models and not done:
            epoch, step_of_epoch = divmod(global_step, steps_per_epoch)
            if step_of_epoch == 0 and epoch % args.save_every_n_epochs == 0:
                with result_weights():
                    save_result(accelerator, args, adapted_models, header(), save_dtype, epoch)
        # after the file of the epoch, which a run that is resumed from this checkpoint does not write
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
                val_prompts,
                global_step,
            )
            stop_requested = stop_agreed(accelerator)
        if stop_requested and not done:
            checkpoint = save()
            transformer = None  # see the end of `train`
            stop_interrupted(accelerator, global_step, checkpoint)
        loss_sum = 0.0
        num_images = 0
        started = time.perf_counter()
        if best.is_over:
            break
    progress_bar.close()
    skipped_summary = skipped.summary()
    if skipped_summary:
        accelerator.print(skipped_summary)

    # 8. Save and final validation, with the weights of the best step if --load_best_model_at_end keeps them
    embeddings_name = embeddings_file(args).name
    with best.weights():
        save_result(accelerator, args, adapted_models, header(best.result_step), save_dtype)
        if writes_files(accelerator):
            embedding_handler.save_embeddings(embeddings_file(args))
            embedding_handler.export_embeddings(args.output_dir / "embeddings")
    if accelerator.is_main_process:
        metrics.close()
        plot_metrics(args.output_dir)
    images = []
    if final_prompts:
        if best.result_step:
            prompt_encoder.forget_trained()
        images = log_validation(
            accelerator,
            family,
            transformer,
            best.weights,
            vae,
            noise_scheduler,
            prompt_encoder,
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
    if images and adapted_models:
        add_thumbnail(accelerator, [lora_file(args.output_dir, args.output_name)], images[-1])
    shown_last = final_prompts[0].prompt if final_prompts else None
    example_prompt = shown_last or args.instance_prompt or examples[0].prompt()
    if accelerator.is_main_process:
        save_model_card(
            args,
            weight_dtype,
            embedding_handler,
            example_prompt,
            embeddings_name,
            hub_repo,
            trigger_words=class_tokens(examples),
            held_out=best.summary(),
        )
    remove_encoded(accelerator, args.output_dir)
    transformer = None  # DistributedDataParallel must be freed before the process group: gloo can hang otherwise
    accelerator.free_memory()
    accelerator.end_training()
    lora = lora_file(args.output_dir, args.output_name)
    results = {
        "LoRA": lora.absolute(),
        "tokens": embeddings_name,
        "per-word embeddings": "embeddings",
        "usage": "README.md",
        "loss": "loss.png",
        "images": "validation",
    }
    files_beside = [lora] if args.output_name and lora.exists() else []
    command = generate_command(args, example_prompt)
    check_taken(taken_steps, args.output_dir, has_scaler=accelerator.scaler is not None)
    if held_out_examples:
        accelerator.print(best.summary())
    finish(accelerator, args, global_step, results, command, hub_repo, files_beside=files_beside)


if __name__ == "__main__":
    main(parse_args())
