"""Distils a text-to-image model into one that generates in 1, 2, 4 or N steps: TwinFlow (arXiv 2512.05150).

The model F is given the time t of its input and the target time t' to jump to. It learns the mean velocity between
the two (RCGM). At negative times it learns the velocity of its own samples; the difference to that of real images
corrects its one-step samples. There is no second network and no discriminator.

    x_t = t z + (1 - t) x     F(x_t, t, t') = (x_t - x_t') / (t - t')     x̂ = x_t - t F(x_t, t, 0)

    loss = mean of w d(F(x_t, t, t'), target)         any-step loss; own samples: at (-t, -t), target z - x̂
         + mean of d(F(z, 1, 0), sg(F(z, 1, 0) - Δ))  rectification of one-step samples

| paper                        | authors' code                | here                                               |
| ---------------------------- | ---------------------------- | -------------------------------------------------- |
| x, z, x_t                    | x, z, x_t                    | latents, noise, x_t                                |
| t, t'                        | t, tt                        | t, target_time                                     |
| F(x_t, t, t')                | forward, F_th_t              | predict (`predict_velocity`), prediction           |
| types of samples             | probs, prepare_inputs        | --probs, `sample_times`, `prepare_inputs`          |
| guided velocity              | enhance_target               | `enhance_target`                                   |
| any-step target, order N     | multi_fwd, get_rcgm_target   | `multi_fwd`, `get_rcgm_target`                     |
| rectification Δ              | dist_match                   | `dist_match`                                       |
| metric d                     | loss_func                    | `loss_func`                                        |
| one training step            | training_step                | `compute_loss`                                     |
| averaged model               | ema_transformer, update_ema  | `EMATeacher`, `update_ema`                         |
| any-step sampler (UCGM)      | sampling_loop                | `sampling_loop`                                    |

One GPU, or all of them after `accelerate config`:

    accelerate launch train_twinflow.py \\
      --pretrained_model_name_or_path=black-forest-labs/FLUX.1-dev --model_type=flux --recipe=lora-2order \\
      --train_data_dir=photos --mixed_precision=bf16 --gradient_checkpointing --cache_latents \\
      --train_batch_size=8 --learning_rate=1e-4 --max_train_steps=1000 \\
      --validation_prompt="a dog on the beach" --output_dir=flux-twinflow

`output_dir` then holds the result (`pytorch_lora_weights.safetensors` or `transformer/`), from which
examples/twinflow/generate.py generates images, a model card, the arguments (args.json), the loss (metrics.jsonl,
loss.png), validation images (validation/) and checkpoints to resume from.
"""

import argparse
import copy
import functools
import inspect
import itertools
import json
import math
import os
import shlex
import shutil
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path

from common.arguments import (
    INITIALIZATIONS,
    LR_SCHEDULERS,
    TRACKERS,
    Needs,
    Parser,
    Switch,
    block_count,
    comma_list,
    decay_rate,
    exit_if_unreadable,
    fail,
    file_name,
    fraction,
    idle_flags,
    in_range,
    initialization,
    name_or_path,
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
    catch_signals,
    check_disk,
    check_output_dir,
    check_results,
    check_run,
    check_steps,
    check_taken,
    checkpoint_state,
    claim_output_dir,
    follow_umask,
    interruption,
    keep_earlier_results,
    load_checkpoint,
    match_processes,
    outlive_signals,
    register_sharded_checkpointing,
    register_tensor_checkpointing,
    run_settings,
    save_checkpoint,
    stop_agreed,
    stop_interrupted,
    stops_alone,
    writing,
)
from common.data import (
    DATASET_CAPTIONS,
    INTERPOLATION,
    MAX_SIDE,
    Example,
    Size,
    SkippedSamples,
    StepSampler,
    Stream,
    StreamedBatches,
    all_images,
    check_buckets,
    check_captions,
    check_dataset_flags,
    check_roles,
    check_shape,
    count_sizes,
    data_record,
    dataset_settings,
    describe_data,
    describe_small_groups,
    file_example,
    first_ten,
    fit,
    gather_places,
    header_size,
    metadata_file,
    nearest_bucket,
    open_stream,
    parse_buckets,
    place_in_run,
    read_batches,
    read_dataset,
    read_folder,
    read_lines,
    read_sizes,
    read_stream_start,
    resolve_num_workers,
    visible,
)
from common.flow_matching import step_generator
from common.held_out import (
    DEFAULT_STEPS,
    NOISE_LEVELS,
    NOISE_SEED,
    BestStep,
    check_held_out,
    check_split,
    describe_held_out,
    fixed_noise,
    held_out_args,
    held_out_means,
    held_out_record,
    hold_out,
)
from common.latents import (
    CachedTensors,
    TensorCache,
    check_cache_rooms,
    check_disk_cache,
    decode_images,
    encode_by_size,
    encode_images,
    image_ids,
    images_per_batch,
    latents_folder,
    pack_latents,
    print_precomputed,
    prompts_folder,
    to_image,
    to_tensor,
    unpack_latents,
)
from common.lora import (
    FLUX_TARGET_MODULES,
    adapter_kind,
    adapter_options,
    adapter_size,
    add_lora,
    block_layers,
    check_adapter,
    check_lora_file,
    layer_shapes,
    lora_file,
    register_lora_checkpointing,
    save_lora,
    scaled_adapters,
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
    check_names,
    check_weights,
    compile_blocks,
    full_tensor,
    gather_objects,
    gather_problems,
    hub_commit,
    load_model,
    model_identities,
    own_part,
    quantize_base,
    read_model_index,
    repeated_blocks,
    reshard,
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
    describe_long_prompts,
    encoder_dtype,
    fill_up,
    load_text_pipeline,
    load_tokenizer,
    place_encoders,
    prompts_per_batch,
    prompts_size,
    quantize_language_model,
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
from common.twinflow_scheduler import STYLES, TwinFlowScheduler, time_grid
from common.validation import ValidationPrompt, frugal_decoding, read_validation_prompts, save_images, undisturbed

import numpy as np
import torch
from accelerate import Accelerator, DistributedDataParallelKwargs
from accelerate.utils import InitProcessGroupKwargs, ProjectConfiguration, set_seed
from diffusers import (
    AutoencoderDC,
    AutoencoderKL,
    AutoencoderKLFlux2,
    AutoencoderKLQwenImage,
    AutoencoderKLQwenImage21,
    DiffusionPipeline,
    Flux2KleinPipeline,
    Flux2Transformer2DModel,
    Flux3ModularPipeline,
    Flux3Transformer2DModel,
    FluxPipeline,
    FluxTransformer2DModel,
    ModelMixin,
    QwenImage21Pipeline,
    QwenImage21Transformer2DModel,
    QwenImageEditPlusPipeline,
    QwenImagePipeline,
    QwenImageTransformer2DModel,
    SanaPipeline,
    SanaTransformer2DModel,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
    ZImagePipeline,
    ZImageTransformer2DModel,
)
from diffusers.modular_pipelines.flux3.before_denoise import Flux3TextRoPEInputsStep, _prepare_image_ids
from diffusers.modular_pipelines.flux3.encoders import Flux3TextEncoderStep
from diffusers.optimization import get_scheduler
from diffusers.training_utils import free_memory, offload_models
from diffusers.utils import logging as diffusers_logging
from huggingface_hub import hf_hub_download, split_torch_state_dict_into_shards
from PIL import Image
from safetensors import safe_open
from safetensors.torch import save_file
from torch.distributed.tensor import DTensor
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import DataLoader, Dataset
from tqdm.auto import tqdm
from transformers import AutoTokenizer, PretrainedConfig, ProcessorMixin
from transformers.utils import logging as transformers_logging


Conditions = dict[str, torch.Tensor]  # a prompt's embeddings by the names of the transformer's arguments
Predict = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, Conditions], torch.Tensor]  # F of (x_t, t, t', cond)

DESCRIPTION = (
    "Distils a text-to-image model into one that generates in 1, 2, 4 or N steps: TwinFlow (arXiv 2512.05150)."
)
EXAMPLE = """example:
    accelerate launch train_twinflow.py @examples/twinflow/low_memory.args \\
      --train_data_dir=photos --output_dir=flux-twinflow"""

TRAINING = ("full", "lora")
SAMPLE_TYPES = ("e2e", "mul", "any", "adv", "one")  # of the samples of a batch, in their order, see `sample_times`

TWINFLOW = {
    "probs": "e2e=1,mul=1,any=1,adv=1",
    "consistc_ratio": 1.0,
    "estimate_order": 2,
    "enhanced_ratio": 0.8,
    "ema_decay_rate": 0.99,
}
LORA = {"training": "lora", "rank": 64}
FIRST_ORDER = {"probs": "e2e=1,mul=1,adv=1,one=1", "estimate_order": 1, "ema_decay_rate": 0.0}
FROZEN_TEACHER = {"ema_decay_rate": 1.0, "enhanced_ratio": 4.0}

AUTHORS = TWINFLOW | {  # what all configurations of the authors' code have in common
    "enhanced_range": (0.0, 1.0),
    "loss_type": "barron",
    "time_dist_ctrl": (1.0, 1.0, 1.0),
    "resolution": 512,
    "center_crop": True,
    "image_interpolation_mode": "bilinear",
    "num_train_epochs": 4,
    "gradient_accumulation_steps": 1,
    "optimizer": "adamw",
    "learning_rate": 1e-4,
    "lr_scheduler": "constant",
    "adam_beta1": 0.9,
    "adam_weight_decay": 0.0,
    "max_grad_norm": 1.0,
}
OPENUNI = AUTHORS | {"model_type": "openuni", "dist_match_cof": 0.75, "train_batch_size": 16, "adam_beta2": 0.95}
SD35 = AUTHORS | {"model_type": "sd3", "dist_match_cof": 0.5, "train_batch_size": 8, "adam_beta2": 0.99}
QWENIMAGE = AUTHORS | {"model_type": "qwenimage", "dist_match_cof": 0.5, "train_batch_size": 4, "adam_beta2": 0.99}

RECIPES = {
    # ours
    "twinflow": TWINFLOW,
    "rcgm": TWINFLOW | {"probs": "e2e=1,mul=1,any=1", "dist_match_cof": 0.0},
    "flow-matching": {
        "probs": "mul=1",
        "consistc_ratio": 0.0,
        "estimate_order": 0,
        "enhanced_ratio": 0.0,
        "ema_decay_rate": 0.0,
    },
    "lora-1order": TWINFLOW | LORA | FIRST_ORDER,
    "lora-1order-teacher": TWINFLOW | LORA | FIRST_ORDER | FROZEN_TEACHER,
    "lora-2order": TWINFLOW | LORA,
    "image-free": TWINFLOW | FROZEN_TEACHER | {"image_free": True},
    # the authors', named after their files
    "openuni_full": OPENUNI | {"training": "full", "ema_decay_rate": 0.999, "target_time_init": "normal"},
    "openuni_full_imgfree": OPENUNI
    | {"training": "full", "target_time_init": "normal", "image_free": True}
    | FROZEN_TEACHER,
    "openuni_lora_1order": OPENUNI | LORA | FIRST_ORDER,
    "openuni_lora_2order": OPENUNI | LORA,
    "sd35_full": SD35
    | {"training": "full", "target_time_init": "normal", "train_batch_size": 16, "learning_rate": 1e-5},
    "sd35_lora_1order": SD35 | LORA | FIRST_ORDER,
    "sd35_lora_2order": SD35 | LORA,
    "qwenimage_full": QWENIMAGE
    | {"training": "full", "ema_decay_rate": 0.0, "target_time_init": "copy", "learning_rate": 1e-5},
    "qwenimage_lora_1order": QWENIMAGE | LORA | FIRST_ORDER | FROZEN_TEACHER,
    "qwenimage_lora_2order": QWENIMAGE | LORA,
}


# ---------------------------------------------------------------------------------------------------------------------
# Arguments
# ---------------------------------------------------------------------------------------------------------------------


def probabilities(text: str) -> dict[str, float]:
    """An argparse type: e2e=1,adv=0.5 as {sample type: share}; types that are not named get 0."""
    probs = dict.fromkeys(SAMPLE_TYPES, 0.0)
    for item in text.split(","):
        sample_type, _, share = item.partition("=")
        sample_type = sample_type.strip()
        if sample_type not in probs:
            names = ", ".join(SAMPLE_TYPES)
            raise argparse.ArgumentTypeError(f"{sample_type!r} is none of {names}; such as e2e=1,adv=0.5")
        probs[sample_type] = non_negative_float(share)
    if not any(probs.values()):
        raise argparse.ArgumentTypeError(f"{text} leaves no share above 0")
    return probs


def sampler_name(text: str) -> str:
    """An argparse type: style:steps, such as few:2."""
    style, _, steps = text.partition(":")
    if style not in STYLES or not steps.isdigit() or int(steps) < 1:
        raise argparse.ArgumentTypeError(f"{text}: expected style:steps with a style of {', '.join(STYLES)}")
    return text


def create_parser():
    # the other trainers have no teacher; here its weights are the average that is saved
    averages = dict.fromkeys(
        ("use_ema", "ema_decay"), (None, "--ema_decay_rate, of the teacher, which is what is saved")
    )
    parser = Parser(description=DESCRIPTION, epilog=EXAMPLE, other_flags=averages)

    arg = parser.add_argument_group("model", "which model is trained, in which precision").add_argument
    arg(
        "--pretrained_model_name_or_path",
        type=name_or_path,
        required=True,
        metavar="MODEL",
        help="folder or Hub id of a pipeline",
    )
    arg("--model_type", choices=tuple(BACKBONES), default="flux", help="family of that pipeline")
    arg(
        "--training",
        choices=TRAINING,
        default="full",
        help="train all weights, or an adapter; recipes lora-* set lora",
    )
    arg("--openuni_checkpoint", type=Path, metavar="FILE", help="openuni: its .pth file; MODEL is its Sana pipeline")
    arg(
        "--openuni_llm",
        type=name_or_path,
        metavar="MODEL",
        help="openuni: its InternVL3, such as OpenGVLab/InternVL3-2B-hf",
    )
    arg("--revision", help="revision of the model on the Hub")
    arg("--variant", help="variant of the model's files, such as fp16")
    arg("--cache_dir", type=name_or_path, help="folder for downloaded models and datasets")
    arg(
        "--max_sequence_length",
        type=in_range(int, 1, 1024),
        help="tokens per prompt; longer prompts are cut (default: what the model takes, FLUX.1-dev 512, schnell 256)",
    )
    arg(
        "--mixed_precision",
        choices=("no", "fp16", "bf16"),
        help="precision of forward passes and frozen weights (default: accelerate's, else bf16 "
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
        help="lora: store frozen blocks in 4 or 8 bits; int8, fp8: also multiply in 8 bits where the GPU does",
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

    arg = parser.add_argument_group("data", "images with captions, or prompts alone").add_argument
    arg(
        "--train_data_dir",
        type=Path,
        nargs="+",
        help="folders of images with .txt captions, one per line, or of parquet files",
    )
    arg(
        "--instance_data_dir",
        type=Path,
        help="folder of images of a subject, learned beside the others; captions in .txt files or metadata.jsonl",
    )
    arg(
        "--instance_prompt",
        help="prompt of the subject's images, such as a photo of sks dog; one more beside captions of their own",
    )
    arg(
        "--instance_share",
        type=in_range(float, 0.01, 0.9),
        default=0.25,
        metavar="SHARE",
        help="share of the subject's images among the samples, 0.01 to 0.9",
    )
    arg(
        "--instance_loss_weight",
        type=positive_float,
        default=5.0,
        help="weight of the flow matching loss of the subject's images, by which it is learned",
    )
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
    arg("--image_column", default="image", help="column of the dataset that holds the images")
    arg("--caption_column", help="column of the dataset or of metadata.jsonl that holds captions")
    arg("--reference_column", help="qwenimage-edit: dataset column of the images to edit")
    arg("--reference_data_dir", type=Path, help="qwenimage-edit: folder of the images to edit, same file names")
    arg(
        "--prompts_file",
        type=Path,
        help="--image_free: text with one prompt per line, a parquet file or a folder of them",
    )
    arg(
        "--resolution",
        type=square_side,
        default=512,
        help="images are resized and cropped to this side, in pixels",
    )
    arg("--aspect_ratio_buckets", metavar="H,W;H,W", help="sizes instead of --resolution; an image gets the nearest")
    arg(
        "--center_crop",
        action=Switch,
        default=False,
        help="crop the center; default: a random crop, fixed for each image",
    )
    arg("--random_flip", action="store_true", help="mirror half of the images; not for faces, text or logos")
    arg("--image_interpolation_mode", choices=INTERPOLATION, default="lanczos", help="filter for resizing images")
    arg("--train_batch_size", type=positive_int, default=4, help="samples per device and micro-step; 4 or more")
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

    arg = parser.add_argument_group("twinflow", "the method; --recipe sets these, what you type wins").add_argument
    arg(
        "--recipe",
        choices=tuple(RECIPES),
        default="twinflow",
        help="preset of flags, which --help shows as defaults; with _: the authors' configuration file of this name, "
        "with its model type, data, optimizer and epochs; others are this trainer's own, for any model type",
    )
    arg(
        "--probs",
        type=probabilities,
        default=TWINFLOW["probs"],
        help="shares of the sample types in a batch: " + ", ".join(SAMPLE_TYPES),
    )
    arg(
        "--consistc_ratio",
        type=fraction,
        default=1.0,
        help="largest (t - t') / t of any samples; rectification needs 1",
    )
    arg("--estimate_order", type=in_range(int, 0, 8), default=2, help="steps of the RCGM target; 0: flow matching")
    arg(
        "--enhanced_ratio",
        type=non_negative_float,
        default=0.8,
        help="strength ω of the guidance in the target; 0: none",
    )
    arg(
        "--enhanced_range",
        type=fraction,
        nargs=2,
        default=(0.0, 1.0),
        metavar=("FROM", "TO"),
        help="times t whose target is guided",
    )
    arg(
        "--ema_decay_rate",
        type=fraction,
        default=0.99,
        help="of the teacher: 0 is the model itself, 1 the model before training, else a moving average",
    )
    arg("--loss_type", choices=("l2", "barron"), default="l2", help="squared error, or Barron's robust loss")
    arg("--dist_match_cof", type=non_negative_float, default=1.0, help="weight of the rectification loss; 0: none")
    arg(
        "--image_free",
        action=Switch,
        default=False,
        help="train on the model's own samples of --prompts_file, no images",
    )
    arg("--uncond_prompt", help="negative (unconditional) prompt of the guidance")
    arg(
        "--target_time_init",
        choices=("zero", "copy", "normal"),
        default="zero",
        help="full: initialization of the target-time embedding",
    )

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
        help="layers with an adapter, such as attn.to_k,ff.net.2 (default: by model type)",
    )

    arg = parser.add_argument_group("noise", "which noise levels are trained").add_argument
    arg(
        "--guidance_scale",
        type=non_negative_float,
        default=3.5,
        help="value passed to the guidance embedding (FLUX.1-dev)",
    )
    arg(
        "--time_dist_ctrl",
        type=positive_float,
        nargs=3,
        default=(1.0, 1.0, 1.0),
        help="a b c: times t are c Beta(a, b)",
    )

    arg = parser.add_argument_group("optimizer", "how the trained weights are updated").add_argument
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
    arg(
        "--scale_lr",
        action="store_true",
        help="multiply the learning rate by the total batch size",
    )
    arg("--lr_scheduler", choices=LR_SCHEDULERS, default="constant", help="learning rate schedule")
    arg("--lr_warmup_steps", type=in_range(int, 0), default=500, help="linear warmup steps; constant has none")
    arg("--lr_num_cycles", type=positive_int, default=1, help="cycles of cosine_with_restarts")
    arg("--lr_power", type=positive_float, default=1.0, help="power of polynomial; 1: linear")
    arg("--use_8bit_adam", action="store_true", help="AdamW with 8-bit states (bitsandbytes), to save memory")
    arg("--adam_beta1", type=decay_rate, default=0.9, help="decay of the gradient's running mean, also in Prodigy")
    arg("--adam_beta2", type=decay_rate, default=0.99, help="decay of the squared gradient's mean, also in Prodigy")
    arg("--adam_weight_decay", type=non_negative_float, default=0.0, help="weight decay, also in Prodigy")
    arg("--adam_epsilon", type=positive_float, default=1e-8, help="added to the denominator, also in Prodigy")
    arg("--prodigy_beta3", type=decay_rate, help="decay of Prodigy's estimate (default: square root of adam_beta2)")
    arg("--prodigy_decouple", action=Switch, default=True, help="decoupled weight decay, as in AdamW")
    arg("--prodigy_use_bias_correction", action=Switch, default=True, help="Adam's bias correction in Prodigy")
    arg("--prodigy_safeguard_warmup", action=Switch, default=True, help="keep warmup out of Prodigy's estimate")
    arg("--max_grad_norm", type=in_range(float, 0), default=1.0, help="clip gradients to this norm; 0: do not")
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
    arg(
        "--num_train_epochs",
        type=positive_int,
        default=1,
        help="passes over the data",
    )
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

    arg = parser.add_argument_group(
        "validation", "images generated while training; they do not change it"
    ).add_argument
    arg("--validation_prompt", help="prompt to generate before, during and after training")
    arg(
        "--validation_prompts",
        "--sample_prompts",
        type=Path,
        metavar="FILE",
        help="file of such prompts instead, an image each per sampler; a line is such as 'a dog --w 512 --d 1'",
    )
    arg("--validation_image", type=Path, help="qwenimage-edit: image to edit with the prompt")
    arg(
        "--validation_samplers",
        type=sampler_name,
        nargs="+",
        default=["few:1", "few:2", "any:4"],
        metavar="STYLE:STEPS",
        help="sampling styles (few, any, mul) and steps",
    )
    arg("--num_validation_images", type=positive_int, default=4, help="images per sampler")
    side = in_range(int, 16, MAX_SIDE)
    arg("--validation_width", type=side, help="width of validation images in pixels (default: as trained)")
    arg("--validation_height", type=side, help="height of validation images in pixels (default: as trained)")
    arg(
        "--validation_data_dir",
        type=Path,
        help="folder of images that are not trained, as --train_data_dir; their loss is computed at fixed noise",
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
        "--validation_epochs",
        type=positive_int,
        default=50,
        help="epochs between validations",
    )
    arg("--validation_steps", type=positive_int, help="steps between validations; overrides --validation_epochs")

    arg = parser.add_argument_group("output and logging", "where the results go").add_argument
    arg("--output_dir", type=Path, default=Path("twinflow"), help="folder for all results")
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
    arg("--upcast_before_saving", action="store_true", help="save the result in float32 instead of --mixed_precision")
    arg("--verbose", action="store_true", help="show the libraries' messages and progress bars")
    arg("--push_to_hub", action="store_true", help="upload the results to the Hub, without checkpoints and logs")
    arg("--hub_token", help="Hub token (default: your login); never logged or saved")
    arg("--hub_model_id", help="Hub repository (default: the name of output_dir)")

    return parser


def parse_args(argv=None):
    parser = create_parser()
    parser.set_defaults(**chosen_defaults(argv))
    args = parser.parse_args(argv)
    args.mixed_precision = resolve_precision(args.mixed_precision)
    args.dataloader_num_workers = resolve_num_workers(args.dataloader_num_workers)
    args.lora_alpha = args.lora_alpha or args.rank
    if args.cache_latents_to_disk:
        args.cache_latents = True
    if args.output_name:
        args.output_dir /= args.output_name
    problems = check_args(args) + check_attention(args) + check_model(args)
    problems += check_disk_cache(args) + check_output_dir(args)
    result = args.output_dir / "transformer"
    if args.training == "lora":
        result = lora_file(args.output_dir, args.output_name)
    problems += check_results(args, [result], [args.lora_path] if args.lora_path else [])
    parser.refuse(problems)
    parser.remark(idle_flags(args, shared_needs(args), needs(args)))
    return args


def chosen_defaults(argv: list[str] | None) -> dict:
    """The defaults that --model_type, --recipe and --training in `argv` choose for other flags.

    A first pass over the command line, so that --help of the second shows what a run would use.
    """
    first = Parser(add_help=False)
    first.add_argument("--model_type", choices=tuple(BACKBONES))
    first.add_argument("--recipe", choices=tuple(RECIPES), default="twinflow")
    first.add_argument("--training", choices=TRAINING)
    try:
        chosen, _ = first.parse_known_args(argv)
    except (ValueError, RecursionError):  # an unreadable @file, which the second pass reports
        return {}
    recipe = RECIPES[chosen.recipe]
    backbone = BACKBONES[chosen.model_type or recipe.get("model_type", "flux")]
    defaults = {"uncond_prompt": backbone.uncond_prompt, "max_sequence_length": backbone.max_sequence_length}
    if (chosen.training or recipe.get("training", "full")) == "full":
        defaults["learning_rate"] = backbone.full_learning_rate
    return defaults | recipe


def needs(args) -> Needs:
    """{what: (whether this run has it, the flags that are read with it alone)}, see `idle_flags`."""
    return {
        "--training lora": (
            args.training == "lora",
            (
                *("rank", "lora_alpha", "use_rslora", "init_lora_weights", "lora_type"),
                *(f"metadata_{entry}" for entry in METADATA),
            ),
        ),
        "--model_type flux": (args.model_type == "flux", ("guidance_scale",)),
        "images, not --image_free": (not args.image_free, ("caption_column",)),
        "--validation_prompt": (args.validation_prompt, ("num_validation_images",)),
        "--validation_prompt or --validation_prompts": (
            args.validation_prompt or args.validation_prompts,
            ("validation_epochs", "validation_samplers"),
        ),
        "no --validation_steps": (not args.validation_steps, ("validation_epochs",)),
        "--streaming": (args.streaming, ("shuffle_buffer",)),
        "--instance_data_dir": (args.instance_data_dir, ("instance_prompt", "instance_share", "instance_loss_weight")),
        "--dataset_name or --data_files": (args.dataset_name or args.data_files, ("image_column",)),
        "--enhanced_ratio above 0": (args.enhanced_ratio > 0, ("enhanced_range",)),
        "e2e in --probs and --consistc_ratio 1": (
            args.probs["e2e"] and args.consistc_ratio == 1,
            ("dist_match_cof",),
        ),
    }


def check_args(args) -> list[str]:
    """Contradictions between flags, and flags without effect."""
    problems = check_method(args) + check_data_flags(args) + check_held_out(args)
    backbone = BACKBONES[args.model_type]
    if args.max_sequence_length is not None and args.max_sequence_length > backbone.longest_prompt:
        problems.append(
            f"--max_sequence_length {args.max_sequence_length}: {args.model_type} takes at most "
            f"{backbone.longest_prompt}"
        )
    if args.attention_backend and not backbone.reads_attention_backend:
        problems.append(
            f"--attention_backend {args.attention_backend} has no effect on {args.model_type}: leave it out"
        )
    if args.attention_backend in WITHOUT_MASK and backbone.masks_prompts:
        problems.append(
            f"--attention_backend {args.attention_backend} takes no mask, which {args.model_type} needs: leave it out"
        )
    multiple = backbone.resolution_multiple
    for flag in ("resolution", "validation_width", "validation_height"):
        side = getattr(args, flag)
        if side and side % multiple:
            nearest = max(1, side // multiple) * multiple
            problems.append(f"--{flag} {side} must be a multiple of {multiple}, such as {nearest}")
    problems += check_buckets(args.aspect_ratio_buckets, multiple)
    if args.model_type == "openuni":
        if args.openuni_checkpoint is None:
            problems.append("--openuni_checkpoint is needed for --model_type openuni")
        else:
            problems += OpenUni(args).check_checkpoint()
        if args.openuni_llm is None:
            problems.append("--openuni_llm is needed for --model_type openuni")
        else:
            problems += OpenUni(args).check_llm()
    else:
        if args.openuni_checkpoint is not None:
            problems.append("--openuni_checkpoint is only for --model_type openuni")
        if args.openuni_llm is not None:
            problems.append("--openuni_llm is only for --model_type openuni")
    if args.training == "full" and (args.lora_layers or args.lora_dropout or args.use_dora):
        problems.append(
            "--lora_layers, --lora_dropout and --use_dora have no effect on --training full: leave them out"
        )
    for flag in ("lora_path", "output_name"):
        if args.training == "full" and vars(args)[flag]:
            problems.append(f"--{flag} names the file of a LoRA: it needs --training lora")
    if args.training == "full" and args.quantize_base != "none":
        problems.append(f"--quantize_base {args.quantize_base} is for --training lora: trained weights stay float32")
    if args.training == "full" and args.blocks_to_swap:
        problems.append(
            f"--blocks_to_swap {args.blocks_to_swap} is for --training lora: it copies frozen weights to the GPU, and "
            "trained ones would have to come back; use --fsdp on several GPUs"
        )
    if args.training == "full" and args.model_type == "flux3" and args.target_time_init != "zero":
        problems.append(
            f"--target_time_init {args.target_time_init}: FLUX.3 adds the second embedding at all times, zero leaves "
            "the model as it is"
        )
    if args.training == "lora" and "target_time_init" in args.changed:
        problems.append(f"--target_time_init {args.target_time_init} has no effect on --training lora: leave it out")
    if args.optimizer == "prodigy" and args.use_8bit_adam:
        problems.append("--use_8bit_adam has no effect on --optimizer prodigy: leave one out")
    if args.optimizer == "prodigy" and args.scale_lr:
        problems.append("--scale_lr multiplies the factor of Prodigy's own rate, which is about 1: leave one out")
    if args.optimizer == "prodigy" and args.learning_rate <= 0.1:
        problems.append(f"--learning_rate {args.learning_rate:g}: Prodigy finds the rate itself and wants about 1")
    if args.optimizer != "prodigy" and args.prodigy_beta3 is not None:
        problems.append(f"--prodigy_beta3 has no effect on --optimizer {args.optimizer}: leave it out")
    if args.mixed_precision == "fp16" and not torch.accelerator.is_available():
        problems.append("--mixed_precision fp16 needs a GPU: use bf16 or no")
    if args.mixed_precision == "fp16" and args.model_type.startswith("qwenimage"):
        problems.append(
            f"--mixed_precision fp16 does not work with {args.model_type}, whose activations exceed it: use bf16"
        )
    for flag in ("validation_steps", "validation_width", "validation_height"):
        value = getattr(args, flag)
        if value and not (args.validation_prompt or args.validation_prompts):
            problems.append(f"--{flag} {value} needs --validation_prompt or --validation_prompts")
    if args.validation_prompt and args.validation_prompts:
        problems.append("--validation_prompt and --validation_prompts exclude each other: choose one")
    problems += check_weights(args) + check_adapter(args)
    return problems + check_hub(args) + check_trackers(args) + check_launcher(args)


def check_data_flags(args) -> list[str]:
    """Problems of the flags that say what is trained on."""
    problems = []
    sources = {
        "--train_data_dir": args.train_data_dir,
        "--dataset_name": args.dataset_name,
        "--data_files": args.data_files,
        "--prompts_file": args.prompts_file,
    }
    given = [flag for flag, value in sources.items() if value]
    if args.image_free and given != ["--prompts_file"]:
        problems.append(f"--image_free needs --prompts_file and no images, not {' and '.join(given) or 'nothing'}")
    if not args.image_free and (len(given) != 1 or args.prompts_file):
        problem = "exactly one of --train_data_dir, --dataset_name and --data_files is needed"
        if args.instance_data_dir:
            problem += ", to which --instance_data_dir adds a subject"
        problems.append(f"{problem}; --prompts_file is for --image_free")
    problems += check_dataset_flags(args)
    if args.streaming and args.model_type == "qwenimage-edit":
        problems.append(
            "--model_type qwenimage-edit encodes prompts beside their images before training: leave out --streaming"
        )
    for flag in ("validation_data_dir", "validation_split"):
        if args.image_free and vars(args)[flag]:
            problems.append(
                f"--{flag} has no effect with --image_free: there is no image whose loss could be computed"
            )
    if args.validation_data_dir and (args.reference_data_dir or args.reference_column):
        problems.append(
            "--validation_data_dir does not go with images to edit: hold out by --validation_split instead"
        )

    needed = []
    if args.model_type == "qwenimage-edit":
        folders = args.train_data_dir or []
        from_columns = args.dataset_name or args.data_files or any(has_parquet(folder) for folder in folders)
        if len(folders) > 1:
            problems.append("--train_data_dir: qwenimage-edit takes one folder, whose images have their references")
        needed.append("reference_column" if from_columns else "reference_data_dir")
        if args.validation_prompt or args.validation_prompts:
            needed.append("validation_image")
        if args.image_free:
            problems.append("--image_free: qwenimage-edit needs images to edit")
    for name in ("reference_column", "reference_data_dir", "validation_image"):
        given = getattr(args, name) is not None
        if name in needed and not given:
            problems.append(f"--model_type qwenimage-edit needs --{name}")
        if given and name not in needed:
            problems.append(f"--{name} has no effect here: leave it out")
    for folder in args.train_data_dir or []:
        problems += check_roles({"--train_data_dir": folder, "--reference_data_dir": args.reference_data_dir})
        problems += check_roles({"--train_data_dir": folder, "--instance_data_dir": args.instance_data_dir})
    if args.instance_data_dir:
        problems += check_instances(args)
    if not args.image_free:
        problems += check_roles({"--image_column": args.image_column, "--reference_column": args.reference_column})
    return problems


def check_instances(args) -> list[str]:
    """Problems of --instance_data_dir with flags that leave it nothing to learn from."""
    flag = f"--instance_data_dir {args.instance_data_dir}"
    problems = []
    if args.image_free:
        problems.append(f"{flag}: --image_free trains on the model's own images, which do not show the subject")
    if args.streaming:
        problems.append(f"{flag} does not go with --streaming: images are mixed by their number")
    if args.model_type == "qwenimage-edit":
        problems.append(f"{flag}: qwenimage-edit needs images to edit, which a subject does not have")
    return problems


def check_method(args) -> list[str]:
    """Combinations of the method's flags that train nothing, or diverge."""
    problems = []
    probs = args.probs
    smallest = max(4, sum(share > 0 for share in probs.values()))
    if args.train_batch_size < smallest:
        problems.append(
            f"--train_batch_size {args.train_batch_size}: each batch holds all sample types of --probs, "
            f"at least {smallest}"
        )
    if args.ema_decay_rate < 1 <= args.enhanced_ratio:
        problems.append(
            f"--enhanced_ratio {args.enhanced_ratio:g} with --ema_decay_rate {args.ema_decay_rate:g}: a teacher that "
            "learns its own guidance diverges from 1 on; use less than 1, or --ema_decay_rate 1"
        )
    if args.image_free and (args.ema_decay_rate < 1 or not args.enhanced_ratio):
        problems.append(
            "--image_free needs --ema_decay_rate 1 and --enhanced_ratio above 0: only the frozen model can teach"
        )
    if args.estimate_order == 1 and not probs["one"]:
        problems.append("--estimate_order 1 jumps to the end in one step, which only one in --probs trains: one=1")
    if args.estimate_order >= 2 and not probs["any"]:
        problems.append(f"--estimate_order {args.estimate_order} takes steps between any times: --probs needs any=1")
    if args.estimate_order == 0:
        untrained = [sample_type for sample_type in ("e2e", "any", "one") if probs[sample_type]]
        rectified = args.consistc_ratio == 1 and args.dist_match_cof > 0
        if untrained == ["e2e"] and rectified:  # which is a loss on e2e alone
            untrained = []
        if untrained:
            problems.append(
                f"--estimate_order 0 trains nothing on {', '.join(untrained)} of --probs: leave out, or order 1 or 2"
            )
    if args.estimate_order and args.consistc_ratio == 0:
        problems.append("--consistc_ratio 0 is flow matching, which goes with --estimate_order 0")
    low, high = args.enhanced_range
    if low > high:
        problems.append(f"--enhanced_range {low:g} {high:g}: give the smaller time first")
    if args.time_dist_ctrl[2] > 1:
        problems.append(f"--time_dist_ctrl: c, the largest time, must be at most 1, not {args.time_dist_ctrl[2]:g}")
    return problems


def check_model(args) -> list[str]:
    """Problems of --pretrained_model_name_or_path, --lora_layers and the disk, from the transformer's config alone."""
    flag = f"--pretrained_model_name_or_path {args.pretrained_model_name_or_path}"
    backbone = BACKBONES[args.model_type]
    expected = backbone.transformer_class.__name__
    try:
        config = backbone.transformer_class.load_config(
            args.pretrained_model_name_or_path,
            subfolder="transformer",
            revision=args.revision,
            cache_dir=args.cache_dir,
        )
    except (OSError, ValueError) as error:
        reason = why_no_pipeline(args.pretrained_model_name_or_path, "a pipeline", backbone.example, error)
        return [f"{flag}: {reason}"]
    found = config.get("_class_name")
    pipeline = pipeline_name(args)
    fitting = [name for name, other in BACKBONES.items() if other.fits(found, pipeline)]
    remedy = f": set --model_type {' or '.join(fitting)}" if fitting else ""
    if found not in backbone.transformer_names():
        return [f"{flag}: holds a {found}, --model_type {args.model_type} a {expected}{remedy}"]
    if not backbone.fits(found, pipeline):
        expected = backbone.pipeline_class.__name__
        names = f"its model_index.json names a {pipeline}"
        return [f"{flag}: {names}, --model_type {args.model_type} is a {expected}{remedy}"]
    longest = backbone.longest_prompt
    if args.model_type == "flux" and not config["guidance_embeds"]:
        longest = 256
    if args.max_sequence_length is None:
        args.max_sequence_length = longest
    if args.max_sequence_length > longest:
        return [f"--max_sequence_length {args.max_sequence_length}: FLUX.1-schnell takes at most 256"]
    with torch.device("meta"):
        transformer = backbone.transformer_class.from_config(config)
    if args.quantize_base != "none" or args.compile or args.fsdp or args.blocks_to_swap:
        try:
            repeated_blocks(transformer)
        except ValueError as error:
            flags = "--quantize_base, --compile, --blocks_to_swap and --fsdp"
            return [f"{flag}: {error}, so {flags} do not work with it: leave them out"]
    problems = check_block_count(args.blocks_to_swap, transformer)
    if problems:
        return problems
    unknown = unknown_layers(transformer, lora_targets(args, transformer))
    if unknown:
        return [f"--lora_layers: the transformer has no linear layer {', '.join(unknown)}"]

    # copies of what is trained, in float32, in one checkpoint: weights, their moving average, two moments, what would
    # be the result, and the best step's weights
    num_copies = 5 + args.load_best_model_at_end
    if args.training == "full":
        trained_parameters = transformer.num_parameters()
    else:
        layers = target_layers(transformer, lora_targets(args, transformer))
        if args.lora_path:
            shapes = layer_shapes("transformer", transformer, lora_targets(args, transformer))
            is_flux = args.model_type == "flux"
            problems = check_lora_file(args.lora_path, shapes, args.rank, flux=is_flux, **adapter_options(args))
            if problems:
                return problems
        trained_parameters = sum(adapter_size(args, layer) for _, layer in layers)
        num_copies += 1  # and the result
    return check_disk(args, 4 * num_copies * trained_parameters)


def pipeline_name(args) -> str | None:
    """The class that the model_index.json of --pretrained_model_name_or_path names; None where there is none."""
    return read_model_index(args).get("_class_name")  # where it is not read, loading the text encoders says why


def view_block_inputs(transformer: torch.nn.Module) -> None:
    """Gives each block views of its inputs, by a hook, for sums of gradients that do not depend on --compile.

    The time embedding is trained, and each block reads it several times. Autograd then adds up what a block's reads
    give before it adds blocks, as a compiled block does; without views, it adds the reads of all blocks one by one.
    """

    def views(block, args, kwargs):
        viewed = {name: view(value) for name, value in kwargs.items()}
        return tuple(view(value) for value in args), viewed

    def view(value):
        return value.view_as(value) if isinstance(value, torch.Tensor) else value

    for block in repeated_blocks(transformer):
        block.register_forward_pre_hook(views, with_kwargs=True)


def lora_targets(args, transformer: torch.nn.Module) -> list[str]:
    """The linear layers that get an adapter."""
    return comma_list(args.lora_layers) or BACKBONES[args.model_type].default_targets(transformer)


# ---------------------------------------------------------------------------------------------------------------------
# Model
# ---------------------------------------------------------------------------------------------------------------------


TIME_EMBEDDING_LAYERS = ("timestep_embedder.linear_1", "timestep_embedder.linear_2")
JOINT_ATTENTION_LAYERS = FLUX_TARGET_MODULES[:8]  # queries, keys, values and outputs of image and prompt tokens


class Backbone:
    """What differs between families of pipelines: the classes, prompt encoding, the call of the transformer.

    Conditions are named as the arguments of the transformer that take them.
    """

    pipeline_class: type[DiffusionPipeline]
    transformer_class: type[ModelMixin]
    vae_class: type[ModelMixin]
    other_pipelines: tuple[str, ...] = ()  # whose models are of this family, too
    example: str  # a model of this family on the Hub
    architecture: str  # its name in the header of a LoRA file
    targets: tuple[str, ...]  # the linear layers that get an adapter
    time_module = "time_text_embed"  # the part of the transformer that embeds t
    time_units = 1000.0  # what that part is given for each unit of t
    vae_scale_factor = 8  # pixels per latent
    latent_channels = 16
    resolution_multiple = 16
    longest_prompt = 512  # the largest --max_sequence_length
    has_unused_parameters = False  # whether some get no gradient in a training step
    reads_attention_backend = True  # whether its attention is diffusers' `dispatch_attention_fn`
    masks_prompts = False  # whether that gets a mask, of prompts of several lengths
    tokenizer_folders: tuple[str, ...] = ("tokenizer",)  # that of --max_sequence_length, then CLIP's
    # defaults of flags
    uncond_prompt = ""
    max_sequence_length: int | None = 512
    full_learning_rate = 1e-4

    def __init__(self, args):
        self.args = args

    @classmethod
    def default_targets(cls, transformer: torch.nn.Module) -> list[str]:
        """The linear layers that get an adapter without --lora_layers."""
        return list(cls.targets)

    @classmethod
    def transformer_names(cls) -> tuple[str, ...]:
        """The names of the transformer's class in its config.json: diffusers' and that of the authors' code."""
        return cls.transformer_class.__name__, f"{cls.transformer_class.__name__}Wrapper"

    @classmethod
    def fits(cls, transformer: str | None, pipeline: str | None) -> bool:
        """Whether models of these classes are of this family; the class of the pipeline need not be known."""
        pipelines = (None, cls.pipeline_class.__name__, *cls.other_pipelines)
        return transformer in cls.transformer_names() and pipeline in pipelines

    def load_prompt_encoder(self, dtype: torch.dtype, device: torch.device, **components):
        """The pipeline without transformer and VAE, frozen; `encode_prompt` takes it."""
        pipeline = load_text_pipeline(self.pipeline_class, self.args, dtype, **components)
        quantize_text_encoders(pipeline, dtype, self.args.quantize_text_encoders)
        place_encoders(pipeline, device, offload=self.args.offload)
        return pipeline

    def load_vae(self, dtype: torch.dtype) -> torch.nn.Module:
        return load_model(self.vae_class, "vae", self.args, dtype)

    def load_transformer(self, dtype: torch.dtype | None) -> torch.nn.Module:
        """The frozen transformer, with the second time embedding if its file holds one.

        `dtype` None: in that of its files, which are mapped, so that all processes share the memory.
        """
        second = f"{self.target_time_module}."
        load = functools.partial(load_model, self.transformer_class, "transformer", self.args, beside=second)
        folder = model_folder(self.args) / "transformer"
        expected = dtype or stored_dtype(folder)
        transformer = load(expected)
        if dtype is None and stored_dtype(folder) != expected:  # which shows once the files are downloaded
            transformer = load(stored_dtype(folder))
        with exit_if_unreadable(f"{self.args.pretrained_model_name_or_path}: its {second}*"):
            self.load_target_time(transformer, folder)
        return transformer.requires_grad_(False)

    def encode_prompt(self, prompt_encoder, prompt: str, reference: Image.Image | None = None) -> Conditions:
        """Conditions {name: [T, D] or [D]} of one prompt, unbatched; `reference` is an image to edit."""
        raise NotImplementedError

    def encode_prompts(self, prompt_encoder, prompts: list[str], references: list) -> list[Conditions]:
        """The conditions of several prompts, each with an image to edit or None. One at a time, because their
        lengths differ; a family that pads all to one length encodes them together."""
        inputs = zip(prompts, references, strict=True)
        return [self.encode_prompt(prompt_encoder, prompt, reference) for prompt, reference in inputs]

    def prompts_per_batch(self, device: torch.device) -> int:
        """Prompts that `encode_prompts` gets at a time."""
        return prompts_per_batch(device, self.args.offload and self.args.quantize_text_encoders == "none")

    def fill_up(self, prompt_encoder, prompts: list[str]) -> list[str]:
        """As many prompts as are encoded together."""
        return fill_up(prompts, self.prompts_per_batch(prompt_encoder._execution_device))

    def predict(self, transformer, x: torch.Tensor, time: torch.Tensor, cond: Conditions) -> torch.Tensor:
        """Velocities [B, C, h, w] of noisy latents; `time` is [B, 2], (t, t'), or [B], one time for both.

        To be called within `exact_times`, which tells the transformer both.
        """
        return transformer(hidden_states=x, timestep=1000 * time, **cond, return_dict=False)[0]

    def embedded_times(self, time: torch.Tensor) -> torch.Tensor:
        """What the time embedding is given for times of any shape."""
        return self.time_units * time

    @contextmanager
    def exact_times(self, transformer: torch.nn.Module, time: torch.Tensor) -> Iterator[None]:
        """Within it the transformer embeds `time`, [B, 2] or [B], as it is.

        FLUX's and Qwen-Image's forward first rounds times to the dtype of the hidden states: in bf16 by up to 0.004,
        where the method compares times that are 0.01 apart. Some add rows, of tokens that are not noisy: their time 0
        is t and t'.
        """
        times = self.embedded_times(time)

        def give_times(_, inputs):
            added = inputs[0][len(times) :].to(times)
            if not len(added):
                return times, *inputs[1:]
            if added.ndim < times.ndim:
                added = added[:, None].expand(-1, 2)
            return torch.cat([times, added]), *inputs[1:]

        transformer = getattr(transformer, "module", transformer)  # DistributedDataParallel's
        hook = transformer.get_submodule(self.time_module).register_forward_pre_hook(give_times)
        try:
            yield
        finally:
            hook.remove()

    @property
    def target_time_module(self) -> str:
        """The name of the second time embedding, the authors'."""
        return f"{self.time_module}_2"

    def embeds_target_time(self, transformer: torch.nn.Module) -> bool:
        """Whether the transformer has a second time embedding."""
        return getattr(transformer, self.target_time_module, None) is not None

    def add_target_time(self, transformer: torch.nn.Module, init: str) -> None:
        """Gives the transformer the second time embedding emb2, a module like the first and beside it, named `..._2`.

        `init`: copy of the first one; zero, the same with an output of zero; normal, weights from N(0, 0.02), biases
        0.
        """
        module = transformer.get_submodule(self.time_module)
        second = copy.deepcopy(module)
        for name, layer in second.named_modules():
            if not isinstance(layer, torch.nn.Linear):
                continue
            is_output = name.endswith(("linear_2", "mlp.2"))
            # Sana's, of the output: without bias it is zero, and its weight can learn
            is_modulation = name == "linear"
            if init == "normal":
                torch.nn.init.normal_(layer.weight, std=0.02)
            elif init == "zero" and is_output:
                torch.nn.init.zeros_(layer.weight)
            if layer.bias is not None and (init == "normal" or (init == "zero" and (is_output or is_modulation))):
                torch.nn.init.zeros_(layer.bias)
        transformer.add_module(self.target_time_module, second)
        module.second = (second,)
        module.time_units = self.time_units
        stock_class = type(module)
        module.__class__ = type(f"TargetTime{stock_class.__name__}", (TargetTimeEmbedding, stock_class), {})

    def load_target_time(self, transformer: torch.nn.Module, folder: Path) -> None:
        """Adds emb2 if the weights in `folder` have one, which from_pretrained leaves out."""
        prefix = f"{self.target_time_module}."
        weights = {}
        for path in folder.glob("*.safetensors"):
            with safe_open(path, "pt") as file:
                for name in file.keys():  # noqa: SIM118 (not iterable)
                    if name.startswith(prefix):
                        weights[name.removeprefix(prefix)] = file.get_tensor(name)
        if weights:
            self.add_target_time(transformer, "copy")
            second = transformer.get_submodule(self.target_time_module)
            check_names(second, *second.load_state_dict(weights, strict=False))


class Flux(Backbone):
    pipeline_class = FluxPipeline
    other_pipelines = ("FluxKontextPipeline",)
    transformer_class = FluxTransformer2DModel
    vae_class = AutoencoderKL
    example = "black-forest-labs/FLUX.1-dev"
    architecture = "flux-1-dev"
    tokenizer_folders = ("tokenizer_2", "tokenizer")
    max_sequence_length = None  # FLUX.1-dev 512, schnell 256
    targets = (*FLUX_TARGET_MODULES, "proj_mlp", *TIME_EMBEDDING_LAYERS)

    def load_transformer(self, dtype):
        transformer = super().load_transformer(dtype)
        self.guidance = self.args.guidance_scale if transformer.config.guidance_embeds else None
        if self.guidance is None:
            self.architecture = "flux-1-schnell"
        return transformer

    def encode_prompt(self, prompt_encoder, prompt, reference=None):
        return self.encode_prompts(prompt_encoder, [prompt], [reference])[0]

    def encode_prompts(self, prompt_encoder, prompts, references):
        prompt_embeds, pooled_prompt_embeds, _ = prompt_encoder.encode_prompt(
            self.fill_up(prompt_encoder, prompts), prompt_2=None, max_sequence_length=self.args.max_sequence_length
        )
        return [
            {"encoder_hidden_states": prompt_embeds[i], "pooled_projections": pooled_prompt_embeds[i]}
            for i in range(len(prompts))
        ]

    def predict(self, transformer, x, time, cond):
        batch_size, _, height, width = x.shape
        guidance = None
        if self.guidance is not None:
            guidance = torch.full((batch_size,), self.guidance, device=x.device)
        velocity = transformer(
            hidden_states=pack_latents(x),
            timestep=time,
            guidance=guidance,
            txt_ids=torch.zeros(cond["encoder_hidden_states"].shape[1], 3, device=x.device),
            img_ids=image_ids(height, width, x.device),
            **cond,
            return_dict=False,
        )[0]
        return unpack_latents(velocity, height, width)


class Flux2Klein(Backbone):
    """FLUX.2-klein, base or distilled: Qwen3 reads prompts, all padded to one length, position ids have four axes."""

    pipeline_class = Flux2KleinPipeline
    transformer_class = Flux2Transformer2DModel
    vae_class = AutoencoderKLFlux2
    example = "black-forest-labs/FLUX.2-klein-base-4B"
    architecture = "Flux.2-klein-4b"
    targets = TIME_EMBEDDING_LAYERS  # and all linear layers of the blocks
    time_module = "time_guidance_embed"
    latent_channels = 32
    full_learning_rate = 1e-5

    def load_transformer(self, dtype):
        transformer = super().load_transformer(dtype)
        self.architecture = flux2_klein_architecture(transformer.config)
        return transformer

    @classmethod
    def default_targets(cls, transformer):
        # by whole names: that of the single blocks' output, attn.to_out, is also that of a list in the double blocks
        return [*block_layers(transformer), *cls.targets]

    def encode_prompt(self, prompt_encoder, prompt, reference=None):
        return self.encode_prompts(prompt_encoder, [prompt], [reference])[0]

    def encode_prompts(self, prompt_encoder, prompts, references):
        prompt_embeds, _ = prompt_encoder.encode_prompt(
            self.fill_up(prompt_encoder, prompts), max_sequence_length=self.args.max_sequence_length
        )
        return [{"encoder_hidden_states": prompt_embeds[i]} for i in range(len(prompts))]

    @contextmanager
    def exact_times(self, transformer, time):
        # the embedding gives its layers the dtype of the times, in bf16 not that of their weights
        stock = getattr(transformer, "module", transformer)
        first = stock.get_submodule(self.time_module)
        embeddings = [first, *getattr(first, "second", ())]
        hooks = []
        for layers in (embedding.timestep_embedder for embedding in embeddings):
            hook = layers.register_forward_pre_hook(lambda layers, inputs: inputs[0].to(layers.linear_1.weight.dtype))
            hooks.append(hook)
        try:
            with super().exact_times(transformer, time):
                yield
        finally:
            for hook in hooks:
                hook.remove()

    def predict(self, transformer, x, time, cond):
        height, width = x.shape[-2:]
        patches = torch.empty(1, 0, height // 2, width // 2)  # of which only the shape counts
        velocity = transformer(
            hidden_states=pack_latents(x),
            timestep=time,
            txt_ids=to_device(self.pipeline_class._prepare_text_ids(cond["encoder_hidden_states"][:1]), x.device),
            img_ids=to_device(self.pipeline_class._prepare_latent_ids(patches), x.device),
            **cond,
            return_dict=False,
        )[0]
        return unpack_latents(velocity, height, width)


class StableDiffusion3(Backbone):
    pipeline_class = StableDiffusion3Pipeline
    transformer_class = SD3Transformer2DModel
    vae_class = AutoencoderKL
    reads_attention_backend = False
    example = "stabilityai/stable-diffusion-3.5-medium"
    architecture = "stable-diffusion-3-5"
    tokenizer_folders = ("tokenizer_3", "tokenizer")
    targets = (*JOINT_ATTENTION_LAYERS, *TIME_EMBEDDING_LAYERS)
    full_learning_rate = 1e-5
    uncond_prompt = "Generate an image."
    max_sequence_length = 256

    def encode_prompt(self, prompt_encoder, prompt, reference=None):
        return self.encode_prompts(prompt_encoder, [prompt], [reference])[0]

    def encode_prompts(self, prompt_encoder, prompts, references):
        prompt_embeds, _, pooled_prompt_embeds, _ = prompt_encoder.encode_prompt(
            self.fill_up(prompt_encoder, prompts),
            prompt_2=None,
            prompt_3=None,
            do_classifier_free_guidance=False,
            max_sequence_length=self.args.max_sequence_length,
        )
        return [
            {"encoder_hidden_states": prompt_embeds[i], "pooled_projections": pooled_prompt_embeds[i]}
            for i in range(len(prompts))
        ]


class Sana(Backbone):
    pipeline_class = SanaPipeline
    transformer_class = SanaTransformer2DModel
    vae_class = AutoencoderDC
    reads_attention_backend = False
    example = "Efficient-Large-Model/Sana_1600M_512px_diffusers"
    architecture = "sana"
    targets = ("to_q", "to_k", "to_v", "to_out.0", "time_embed.linear", *TIME_EMBEDDING_LAYERS)
    time_module = "time_embed"
    vae_scale_factor = 32
    latent_channels = 32
    resolution_multiple = 32
    max_sequence_length = 300

    def encode_prompt(self, prompt_encoder, prompt, reference=None):
        # the pipeline puts an instruction before prompts, but not before the unconditional one
        instruction = None
        if prompt != self.args.uncond_prompt:
            parameters = inspect.signature(prompt_encoder.__call__).parameters
            instruction = parameters["complex_human_instruction"].default
        prompt_embeds, attention_mask, _, _ = prompt_encoder.encode_prompt(
            prompt,
            do_classifier_free_guidance=False,
            max_sequence_length=self.args.max_sequence_length,
            complex_human_instruction=instruction,
        )
        return {"encoder_hidden_states": prompt_embeds[0], "encoder_attention_mask": attention_mask[0]}


class OpenUni(Sana):
    """Sana, whose condition is made by InternVL3 from the prompt and learned queries ("meta-queries"), a small
    transformer (connector) and a linear layer (projector). Only Sana is trained.
    """

    uncond_prompt = "Generate an image."
    max_sequence_length = 1024
    longest_prompt = 1024
    tokenizer_folders = ()  # its tokenizer is that of --openuni_llm
    template = "<|im_start|>user\nGenerate an image: {}<|im_end|>\n<|im_start|>assistant\n<img>"
    uncond_template = "<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n<img>"
    checkpoint_parts = ("connector.", "projector.", "meta_queries", "transformer.")  # prefixes of its tensors' names

    def check_checkpoint(self) -> list[str]:
        """Problems of --openuni_checkpoint."""
        flag = f"--openuni_checkpoint {self.args.openuni_checkpoint}"
        if not self.args.openuni_checkpoint.is_file():
            return [f"{flag}: no such file"]
        try:
            missing = [prefix for prefix in self.checkpoint_parts if not self.load_part(prefix)]
        except Exception as error:  # damaged files raise errors of many types
            reason = (str(error) or repr(error)).splitlines()[0]
            return [f"{flag}: not a file of weights ({reason})"]
        return [f"{flag}: holds no {prefix}*" for prefix in missing]

    def check_llm(self) -> list[str]:
        """Problems of --openuni_llm, from its config alone."""
        flag = f"--openuni_llm {self.args.openuni_llm}"
        try:
            config, _ = PretrainedConfig.get_config_dict(self.args.openuni_llm, cache_dir=self.args.cache_dir)
        except (OSError, ValueError) as error:
            return [f"{flag}: no model there ({str(error).splitlines()[0]})"]
        if config.get("model_type") != "internvl":
            return [
                f"{flag}: a model of type {config.get('model_type')}; transformers reads OpenGVLab/InternVL3-2B-hf"
            ]
        return []

    def load_part(self, prefix: str) -> dict[str, torch.Tensor]:
        """The tensors of --openuni_checkpoint whose names start with `prefix`, by the rest of their names."""
        state_dict = torch.load(self.args.openuni_checkpoint, map_location="cpu", weights_only=True, mmap=True)
        state_dict = state_dict.get("state_dict", state_dict)
        return {name.removeprefix(prefix): value for name, value in state_dict.items() if name.startswith(prefix)}

    def load_transformer(self, dtype):
        if self.args.openuni_checkpoint is None:  # the transformer of a trained one is in the pipeline's folder
            return super().load_transformer(dtype)
        transformer = super().load_transformer(dtype or torch.float32)  # its weights are copied
        weights = self.load_part("transformer.")
        has_target_time = any(name.startswith(f"{self.time_module}_2.") for name in weights)
        if has_target_time and not self.embeds_target_time(transformer):
            self.add_target_time(transformer, "copy")
        with exit_if_unreadable(f"--openuni_checkpoint {self.args.openuni_checkpoint}: its transformer"):
            check_names(transformer, *transformer.load_state_dict(weights, strict=False))
        return transformer.requires_grad_(False)

    def load_prompt_encoder(self, dtype, device):
        """A module with tokenizer, language_model, meta_queries [Q, D], connector and projector."""
        from transformers import InternVLForConditionalGeneration, SiglipVisionConfig
        from transformers.models.siglip.modeling_siglip import SiglipEncoder

        source = self.args.openuni_llm
        with exit_if_unreadable(f"--openuni_llm {source}"):
            internvl = InternVLForConditionalGeneration.from_pretrained(
                source, cache_dir=self.args.cache_dir, dtype=dtype, use_safetensors=True
            )
        prompt_encoder = torch.nn.Module()
        prompt_encoder.tokenizer = AutoTokenizer.from_pretrained(
            source, cache_dir=self.args.cache_dir, trust_remote_code=False
        )
        prompt_encoder.language_model = internvl.model.language_model
        quantize_language_model(prompt_encoder.language_model, dtype, self.args.quantize_text_encoders)
        prompt_encoder.register_buffer("meta_queries", self.load_part("meta_queries")[""])

        weights = self.load_part("connector.")  # layers.i.*
        intermediate_size, hidden_size = weights["layers.0.mlp.fc1.weight"].shape
        config = SiglipVisionConfig(
            hidden_size=hidden_size,
            intermediate_size=intermediate_size,
            num_hidden_layers=len({name.split(".")[1] for name in weights}),
            num_attention_heads=hidden_size // 64,
            hidden_act="gelu_pytorch_tanh",
            layer_norm_eps=1e-6,
            attn_implementation="sdpa",
        )
        prompt_encoder.connector = SiglipEncoder(config)
        prompt_encoder.connector.load_state_dict(weights)

        weights = self.load_part("projector.")
        out_features, in_features = weights["weight"].shape
        prompt_encoder.projector = torch.nn.Linear(in_features, out_features)
        prompt_encoder.projector.load_state_dict(weights)
        return prompt_encoder.to(device, dtype).requires_grad_(False).eval()

    def encode_prompt(self, prompt_encoder, prompt, reference=None):
        template = self.uncond_template if prompt == self.args.uncond_prompt else self.template
        queries = prompt_encoder.meta_queries[None]
        tokens = prompt_encoder.tokenizer(
            template.format(prompt), truncation=True, max_length=self.args.max_sequence_length, return_tensors="pt"
        )
        input_ids = tokens.input_ids.to(queries.device)
        token_embeds = prompt_encoder.language_model.get_input_embeddings()(input_ids)
        inputs_embeds = torch.cat([token_embeds, queries], dim=1)
        hidden_states = prompt_encoder.language_model(inputs_embeds=inputs_embeds).last_hidden_state
        at_queries = hidden_states[:, -queries.shape[1] :]
        connected = prompt_encoder.connector(inputs_embeds=at_queries).last_hidden_state
        prompt_embeds = prompt_encoder.projector(connected)[0]
        return {"encoder_hidden_states": prompt_embeds, "encoder_attention_mask": torch.ones(len(prompt_embeds))}


class QwenImage(Backbone):
    pipeline_class = QwenImagePipeline
    transformer_class = QwenImageTransformer2DModel
    vae_class = AutoencoderKLQwenImage
    example = "Qwen/Qwen-Image-2512"
    architecture = "Qwen-Image"
    targets = (
        *JOINT_ATTENTION_LAYERS,
        "img_mlp.net.0.proj",
        "img_mlp.net.2",
        "txt_mlp.net.0.proj",
        "txt_mlp.net.2",
        *TIME_EMBEDDING_LAYERS,
    )
    uncond_prompt = "Generate an image."
    max_sequence_length = 1024
    longest_prompt = 1024
    full_learning_rate = 1e-5
    time_units = 1.0
    has_unused_parameters = True  # the last block's prompt tokens are not used
    masks_prompts = True

    def encode_prompt(self, prompt_encoder, prompt, reference=None):
        prompt_embeds, _ = prompt_encoder.encode_prompt(prompt, max_sequence_length=self.args.max_sequence_length)
        attention_mask = torch.ones(prompt_embeds.shape[1], dtype=torch.long)
        return {"encoder_hidden_states": prompt_embeds[0], "encoder_hidden_states_mask": attention_mask}

    def predict(self, transformer, x, time, cond):
        height, width = x.shape[-2:]
        tokens = pack_latents(x)
        num_tokens = tokens.shape[1]
        image_shapes = [(1, height // 2, width // 2)]
        cond = dict(cond)
        reference = cond.pop("reference", None)  # latents [B, C, h, w] of the image to edit
        if reference is not None:
            tokens = torch.cat([tokens, pack_latents(reference.to(x))], dim=1)
            image_shapes.append((1, reference.shape[-2] // 2, reference.shape[-1] // 2))
        velocity = transformer(
            hidden_states=tokens, timestep=time, img_shapes=[image_shapes] * len(x), **cond, return_dict=False
        )[0]
        return unpack_latents(velocity[:, :num_tokens], height, width)


class QwenImageEdit(QwenImage):
    pipeline_class = QwenImageEditPlusPipeline
    example = "Qwen/Qwen-Image-Edit-2511"
    architecture = "Qwen-Image-Edit-Plus"
    uncond_prompt = "Edit this image."

    def load_prompt_encoder(self, dtype, device):
        from transformers import Qwen2VLImageProcessor

        # Qwen2VLProcessor would need torchvision, for videos
        self.image_processor = Qwen2VLImageProcessor.from_pretrained(
            self.args.pretrained_model_name_or_path,
            subfolder="processor",
            revision=self.args.revision,
            cache_dir=self.args.cache_dir,
        )
        pipeline = super().load_prompt_encoder(dtype, device, processor=None)
        pipeline.processor = functools.partial(self.process, pipeline.tokenizer)
        return pipeline

    def process(self, tokenizer, text, images, **kwargs):
        """What Qwen2VLProcessor returns for one prompt and one image: one placeholder token per merged patch.

        `prompt_start` is then the place of the first token after the image.
        """
        from transformers import BatchFeature

        pixels = self.image_processor(images=images, return_tensors="pt")
        num_tokens = pixels["image_grid_thw"].prod().item() // self.image_processor.merge_size**2
        prompt = text[0].replace("<|image_pad|>", "<|image_pad|>" * num_tokens)
        tokens = tokenizer([prompt], return_tensors="pt")
        image_end = tokenizer.convert_tokens_to_ids("<|vision_end|>")
        self.prompt_start = tokens["input_ids"][0].tolist().index(image_end) + 1
        return BatchFeature({**tokens, **pixels})

    def encode_prompt(self, prompt_encoder, prompt, reference=None):
        from diffusers.pipelines.qwenimage import pipeline_qwenimage_edit_plus as stock

        aspect_ratio = reference.width / reference.height
        width, height = stock.calculate_dimensions(stock.CONDITION_IMAGE_SIZE, aspect_ratio)
        resized = prompt_encoder.image_processor.resize(reference, height, width)
        prompt_embeds, _ = prompt_encoder.encode_prompt(prompt, [resized])
        # --max_sequence_length counts the tokens after the image; the pipeline leaves out the first of the template
        image_length = self.prompt_start - prompt_encoder.prompt_template_encode_start_idx
        prompt_embeds = prompt_embeds[0, : image_length + self.args.max_sequence_length]
        attention_mask = torch.ones(len(prompt_embeds), dtype=torch.long)
        return {"encoder_hidden_states": prompt_embeds, "encoder_hidden_states_mask": attention_mask}


class TextProcessor(ProcessorMixin):
    """What of Qwen3VLProcessor, which would need torchvision, reads a prompt: its tokenizer."""

    def __init__(self, tokenizer=None, chat_template: str | None = None):
        super().__init__(tokenizer, chat_template=chat_template)

    def __call__(self, images=None, text=None, videos=None, audio=None, **kwargs):
        return self.tokenizer([text] if isinstance(text, str) else text, **kwargs)


class QwenImage21(QwenImage):
    """Qwen-Image-2.1: one sequence of prompt and image, latents of 16 pixels without patches, images with alpha.

    As in its pipeline, the image stands behind the longest prompt of a batch.
    """

    pipeline_class = QwenImage21Pipeline
    transformer_class = QwenImage21Transformer2DModel
    vae_class = AutoencoderKLQwenImage21
    example = "Qwen/Qwen-Image-2.1"
    architecture = "Qwen-Image-2.1"
    targets = (
        *("to_q", "to_k", "to_v", "to_out.0"),
        *("img_mlp.proj", "img_mlp.gate_layer", "img_mlp.out"),
        *TIME_EMBEDDING_LAYERS,
    )
    vae_scale_factor = 16
    latent_channels = 64
    resolution_multiple = 32
    has_unused_parameters = False
    tokenizer_folders = ("processor",)

    def text_processor(self):
        tokenizer = load_tokenizer(self.args, "processor")
        return TextProcessor(tokenizer, tokenizer.chat_template)

    def load_prompt_encoder(self, dtype, device):
        return super().load_prompt_encoder(dtype, device, processor=self.text_processor())

    def encode_prompt(self, prompt_encoder, prompt, reference=None):
        prompt_embeds, _, _ = prompt_encoder.encode_prompt(prompt)
        prompt_embeds = prompt_embeds[0, : self.args.max_sequence_length]
        attention_mask = torch.ones(len(prompt_embeds), dtype=torch.long)
        return {"encoder_hidden_states": prompt_embeds, "encoder_hidden_states_mask": attention_mask}

    def predict(self, transformer, x, time, cond):
        batch_size, _, height, width = x.shape
        # of the prompt's tokens and then of 2 x 2 latents of the image
        num_prompt_tokens = cond["encoder_hidden_states"].shape[1]
        is_image = torch.ones(batch_size, num_prompt_tokens + height * width // 4, dtype=torch.bool, device=x.device)
        is_image[:, :num_prompt_tokens] = False
        velocity = transformer(
            hidden_states=x.flatten(2).transpose(1, 2),
            timestep=time if time.ndim == 1 else time[:, 0],  # the prompt's time 0 is put beside it
            img_shapes=[[(1, height, width)]] * batch_size,
            img_mask=is_image,
            **cond,
            return_dict=False,
        )[0]
        return velocity[:, -height * width :].transpose(1, 2).unflatten(2, (height, width))


class Flux3TextEncoder(DiffusionPipeline):
    """The parts of FLUX.3 that read prompts, as a pipeline: its own are modular."""

    def __init__(self, text_encoder, tokenizer):
        super().__init__()
        self.register_modules(text_encoder=text_encoder, tokenizer=tokenizer)


class Flux3(Backbone):
    """FLUX.3, whose prompt stands at time 0. Its second time embedding is native, that of step-distilled models
    (flow_map): emb(t) + emb2(t'), for the prompt emb(0) + emb2(t').

    The transformer reads the padding of prompts. They are padded to one length, --max_sequence_length; in its own
    pipeline each to a multiple of 80 tokens.
    """

    pipeline_class = Flux3ModularPipeline
    transformer_class = Flux3Transformer2DModel
    vae_class = AutoencoderKLFlux2
    example = "OWNER/FLUX.3"  # with its parts in folders: transformer, vae, text_encoder and tokenizer
    architecture = "Flux.3"
    targets = TIME_EMBEDDING_LAYERS  # and all linear layers of the blocks of image and prompt
    time_module = "timestep_embedder"
    target_time_module = "target_timestep_embedder"
    latent_channels = 32
    full_learning_rate = 1e-5
    has_unused_parameters = True  # those of images to edit
    max_sequence_length = 160
    longest_prompt = 1024

    @classmethod
    def default_targets(cls, transformer):
        layers = [name for name, layer in transformer.named_modules() if isinstance(layer, torch.nn.Linear)]
        blocks = ("mode_blocks.image.", "txt_mode_blocks.", "single_transformer_blocks.")
        times = ("timestep_embedder.", "target_timestep_embedder.")
        return [name for name in layers if name.startswith((*blocks, *times))]

    def load_prompt_encoder(self, dtype, device):
        from transformers import Qwen3VLForConditionalGeneration

        tokenizer = load_tokenizer(self.args, "tokenizer")
        text_encoder = load_model(Qwen3VLForConditionalGeneration, "text_encoder", self.args, dtype).eval()
        pipeline = Flux3TextEncoder(text_encoder, TextProcessor(tokenizer, tokenizer.chat_template))
        quantize_text_encoders(pipeline, dtype, self.args.quantize_text_encoders)
        place_encoders(pipeline, device, offload=self.args.offload)
        return pipeline

    def encode_prompt(self, prompt_encoder, prompt, reference=None):
        length = self.args.max_sequence_length
        prompt_embeds = Flux3TextEncoderStep._get_qwen3_vl_prompt_embeds(
            prompt_encoder.text_encoder,
            prompt_encoder.tokenizer,
            prompt,
            device=prompt_encoder._execution_device,
            max_sequence_length=length,
            pad_multiple=length,
        )
        return {"encoder_hidden_states": prompt_embeds[0]}

    def add_target_time(self, transformer, init):
        """As the base's, with `init` zero or copy: zero leaves the model as it is."""
        second = copy.deepcopy(transformer.timestep_embedder)
        if init == "zero":
            torch.nn.init.zeros_(second.linear_2.weight)
        transformer.target_timestep_embedder = second
        transformer.register_to_config(flow_map=True)

    def load_target_time(self, transformer, folder):
        """from_pretrained has loaded it."""

    @contextmanager
    def exact_times(self, transformer, time):
        transformer = getattr(transformer, "module", transformer)
        times = self.embedded_times(time).reshape(len(time), -1)
        # in the order of the forward pass: of the image, of the prompt, and with a flow map the target
        given = [times[:, 0], torch.zeros_like(times[:, 0])]
        if transformer.config.flow_map:
            given.append(times[:, -1])
        given = itertools.cycle(given)
        hook = transformer.time_proj.register_forward_pre_hook(lambda *_: (next(given),))
        try:
            yield
        finally:
            hook.remove()

    def predict(self, transformer, x, time, cond):
        height, width = x.shape[-2:]
        times = time.reshape(len(time), -1)
        target_time = {}
        if getattr(transformer, "module", transformer).config.flow_map:
            target_time["target_timestep"] = times[:, -1]
        prompt_embeds = cond["encoder_hidden_states"]
        velocity = transformer(
            hidden_states=pack_latents(x),
            timestep=times[:, 0],
            txt_ids=to_device(Flux3TextRoPEInputsStep._prepare_text_ids(prompt_embeds), x.device),
            img_ids=to_device(_prepare_image_ids(height // 2, width // 2, image_rope_scale=0.5), x.device),
            **target_time,
            **cond,
            return_dict=False,
        )[0]
        return unpack_latents(velocity, height, width)


class ZImage(Backbone):
    """Z-Image, whose time goes from noise to data, and whose output is the velocity in this direction."""

    pipeline_class = ZImagePipeline
    transformer_class = ZImageTransformer2DModel
    vae_class = AutoencoderKL
    example = "Tongyi-MAI/Z-Image"
    architecture = "Z-Image"
    targets = (
        *("to_q", "to_k", "to_v", "to_out.0"),
        *("feed_forward.w1", "feed_forward.w2", "feed_forward.w3"),
        *("t_embedder.mlp.0", "t_embedder.mlp.2"),
    )
    time_module = "t_embedder"
    time_units = -1000.0
    masks_prompts = True
    full_learning_rate = 1e-5

    def encode_prompt(self, prompt_encoder, prompt, reference=None):
        return self.encode_prompts(prompt_encoder, [prompt], [reference])[0]

    def encode_prompts(self, prompt_encoder, prompts, references):
        prompt_embeds, _ = prompt_encoder.encode_prompt(
            self.fill_up(prompt_encoder, prompts),
            do_classifier_free_guidance=False,
            max_sequence_length=self.args.max_sequence_length,
        )
        return [
            {"cap_feats": embeds, "cap_mask": torch.ones(len(embeds), dtype=torch.long)}
            for embeds in prompt_embeds[: len(prompts)]
        ]

    @classmethod
    def transformer_names(cls):
        return (cls.transformer_class.__name__,)  # the authors' embeds t' - t, not t'

    def embedded_times(self, time):
        # the signed times of own samples are mirrored as those of data are: -t at -(1 - t)
        return 1000 * (1 - time.abs()).copysign(time)

    def predict(self, transformer, x, time, cond):
        cap_feats = list(cond["cap_feats"])
        if "cap_mask" in cond:  # without it prompts have one length
            lengths = cond["cap_mask"].sum(dim=1).tolist()
            cap_feats = [embeds[:length] for embeds, length in zip(cap_feats, lengths, strict=True)]
        one_frame = list(x.unsqueeze(2))  # B tensors [C, 1, h, w]
        velocities = transformer(one_frame, self.embedded_times(time) / 1000, cap_feats, return_dict=False)[0]
        return -torch.stack(velocities).squeeze(2)


BACKBONES = {
    "flux": Flux,
    "flux2-klein": Flux2Klein,
    "flux3": Flux3,
    "sd3": StableDiffusion3,
    "sana": Sana,
    "openuni": OpenUni,
    "qwenimage": QwenImage,
    "qwenimage-edit": QwenImageEdit,
    "qwenimage21": QwenImage21,
    "z-image": ZImage,
}


def predict_velocity(
    x: torch.Tensor,
    t: torch.Tensor,
    target_time: torch.Tensor,
    cond: Conditions,
    *,
    transformer: torch.nn.Module,
    backbone: Backbone,
    dtype: torch.dtype,
    two_times: bool,
    autocast: Callable = nullcontext,
    seed: int | None = None,
) -> torch.Tensor:
    """F(x, t, t') [B, C, h, w], float32: the mean velocity on the way from x [B, C, h, w] at time t [B] to t' [B].

    A transformer that embeds one time (not `two_times`) gets t - t' / 2. The times are float32, and are embedded as
    they are in any precision. Calls with the same `seed` have the same dropout masks.
    """
    if seed is not None:
        torch.manual_seed(seed)
    time = torch.stack([t, target_time], dim=-1) if two_times else t - target_time / 2
    cond = {name: value.to(dtype) if value.is_floating_point() else value for name, value in cond.items()}
    with autocast(), backbone.exact_times(transformer, time):
        return backbone.predict(transformer, x.to(dtype), time, cond).float()


class TargetTimeEmbedding:
    """Mixed into the class of a time embedding `emb`, it embeds (t, t') [B, 2] as emb(t) + (t - t') emb2(t').

    At t' = t and for a single time [B] this is emb(t): the model still does what it was pretrained for, and a stock
    pipeline, which passes one time, samples with it. All weights but those of emb2 keep their names.
    """

    second: tuple[torch.nn.Module]  # emb2, which belongs to the transformer: not a module of this one
    time_units: float

    def forward(self, timestep, *args, **kwargs):
        if timestep.ndim == 1:
            return super().forward(timestep, *args, **kwargs)
        t, target_time = timestep.unbind(-1)
        embedding = super().forward(t, *args, **kwargs)
        second = self.second[0](target_time, *args, **kwargs)
        gap = ((t - target_time) / self.time_units)[:, None]
        if torch.is_tensor(embedding):
            return embedding + gap.to(embedding.dtype) * second
        return tuple(one + gap.to(one.dtype) * other for one, other in zip(embedding, second, strict=True))  # Sana


def model_folder(args) -> Path:
    """The folder of the pipeline that was loaded, for a Hub id the one in its cache."""
    folder = Path(args.pretrained_model_name_or_path)
    if folder.is_dir():
        return folder
    config = hf_hub_download(  # not snapshot_download, which wants all files of a repository, used or not
        str(folder), "transformer/config.json", revision=args.revision, cache_dir=args.cache_dir, local_files_only=True
    )
    return Path(config).parent.parent


def stored_dtype(folder: Path) -> torch.dtype:
    """The dtype of all weights in a folder if it is bfloat16 or float16; else float32, which holds each of them.

    bfloat16, which most models have, if there are no files yet.
    """
    found = set()
    for path in folder.glob("*.safetensors"):
        with safe_open(path, "pt") as file:
            found.update(file.get_slice(name).get_dtype() for name in file.keys())  # noqa: SIM118 (not iterable)
    if found <= {"BF16"}:
        return torch.bfloat16
    return torch.float16 if found == {"F16"} else torch.float32


def save_model(
    accelerator,
    folder: Path,
    model: torch.nn.Module,
    model_class: type,
    dtype: torch.dtype,
    max_file_size: int | str = "5GB",
) -> None:
    """Writes all weights of a model, sharded or not, so that `model_class.from_pretrained` loads them.

    All processes call it, one on each disk writes: it holds the weights of a file at a time.
    """
    weights = model.state_dict(keep_vars=True)
    files = split_torch_state_dict_into_shards(
        {name: torch.empty(value.shape, dtype=dtype, device="meta") for name, value in weights.items()},
        filename_pattern="diffusion_pytorch_model{suffix}.safetensors",
        max_shard_size=max_file_size,
    )
    with writing(folder):
        if writes_files(accelerator):
            folder.mkdir(parents=True, exist_ok=True)
            for earlier in folder.glob("diffusion_pytorch_model*"):  # of a run with other files
                earlier.unlink()
            with torch.device("meta"):  # FSDP2 renames the class of a model, and config.json would hold that name
                model_class.from_config(model.config).save_config(folder)
        for file_name, names in files.filename_to_tensors.items():
            state_dict = {}
            for name in names:
                value = full_tensor(weights[name])  # gathers a sharded weight, on all processes
                if writes_files(accelerator):
                    state_dict[name] = value.to("cpu", dtype, copy=True)
            if writes_files(accelerator):
                save_file(state_dict, folder / file_name, metadata={"format": "pt"})
        if writes_files(accelerator):
            if files.is_sharded:
                index = {"metadata": files.metadata, "weight_map": files.tensor_to_filename}
                (folder / "diffusion_pytorch_model.safetensors.index.json").write_text(json.dumps(index, indent=2))
            follow_umask(folder)


class EMATeacher:
    """The teacher's weights (the authors' ema_transformer): a second set of the trained tensors, not a second network.

    decay_rate in (0, 1): their exponential moving average; 1: the weights before training; 0: the model itself, no
    second set. Within `with teacher():` the model computes with them. The decay ramps up from 0 to decay_rate.
    """

    def __init__(
        self, parameters: Iterable[torch.nn.Parameter], decay_rate: float, on_swap: Callable[[], None] | None = None
    ):
        self.parameters = list(parameters)
        self.decay_rate = decay_rate
        self.decay = 0.0
        self.on_swap = on_swap  # called after weights were exchanged
        self.tensors = [tensor.clone() for tensor in self.trained_tensors()] if decay_rate else []

    @property
    def is_moving_average(self) -> bool:
        """Whether the teacher is a moving average, which is then also what is validated and saved."""
        return 0 < self.decay_rate < 1

    def trained_tensors(self) -> list[torch.Tensor]:
        """The trained tensors themselves, sharded or not; read anew each time, as wrapping a model may move them."""
        return [parameter.detach() for parameter in self.parameters]

    @torch.no_grad()
    def swap_weights(self) -> None:
        """Exchanges the trained tensors and the teacher's: their memory, or the values of sharded ones."""
        for i, (parameter, taught) in enumerate(zip(self.parameters, self.tensors, strict=True)):
            if isinstance(taught, DTensor):  # whose memory FSDP2 refers to
                kept = parameter.detach().clone()
                parameter.detach().copy_(taught)
                taught.copy_(kept)
            else:
                self.tensors[i] = parameter.data
                parameter.data = taught
        torch.clear_autocast_cache()  # it knows a parameter by its object, and would go on with what that held before
        if self.on_swap is not None:
            self.on_swap()

    @contextmanager
    def __call__(self) -> Iterator[None]:
        if self.decay_rate == 0:
            yield
            return
        self.swap_weights()
        try:
            yield
        finally:
            self.swap_weights()

    @torch.no_grad()
    def update_ema(self, step_taken: torch.Tensor) -> None:
        """Moves the average after an optimizer step; if that was skipped, only the decay moves on.

        `step_taken` is a bool [] on the device of the weights.
        """
        if not self.is_moving_average:
            return
        self.decay = ramp_decay(self.decay, self.decay_rate)
        weight = (1 - self.decay) * step_taken
        averages = [own_part(tensor) for tensor in self.tensors]
        trained = [own_part(tensor) for tensor in self.trained_tensors()]
        torch._foreach_lerp_(averages, trained, [weight] * len(averages))

    def restore_decay(self, global_step: int) -> None:
        """The decay as it is after `global_step` updates."""
        if self.is_moving_average:
            for _ in range(global_step):
                self.decay = ramp_decay(self.decay, self.decay_rate)


def ramp_decay(decay: float, decay_rate: float) -> float:
    """The next decay of the moving average on its way from 0 to `decay_rate`."""
    return decay + 0.5 * (1 - decay) * (decay_rate - decay)


# ---------------------------------------------------------------------------------------------------------------------
# Objective
# ---------------------------------------------------------------------------------------------------------------------


MAX_LOCAL_GAP = 0.05  # largest (t - t') / t of mul samples
DELTA_T = 0.01  # first step of the RCGM target
BARRON_C = 1e-3  # scale of Barron's loss


def partition(batch_size: int, probs: dict[str, float]) -> dict[str, int]:
    """{sample type: number of samples} of a batch: its shares rounded to whole numbers that sum to `batch_size`.

    Each type with a share above 0 gets at least one sample.
    """
    types = [sample_type for sample_type in SAMPLE_TYPES if probs[sample_type] > 0]
    total = sum(probs[sample_type] for sample_type in types)
    shares = {}
    counts = {}
    for sample_type in types:
        shares[sample_type] = batch_size * probs[sample_type] / total
        counts[sample_type] = max(1, math.floor(shares[sample_type]))
    while sum(counts.values()) < batch_size:
        furthest_below = max(types, key=lambda sample_type: shares[sample_type] - counts[sample_type])
        counts[furthest_below] += 1
    while sum(counts.values()) > batch_size:
        reducible = [sample_type for sample_type in types if counts[sample_type] > 1]
        furthest_above = max(reducible, key=lambda sample_type: counts[sample_type] - shares[sample_type])
        counts[furthest_above] -= 1
    return counts


def sample_times(
    batch_size: int, *, args, generator: torch.Generator
) -> tuple[dict[str, torch.Tensor], torch.Tensor, torch.Tensor]:
    """Masks {sample type: bool [B]}, times t [B] and target times t' [B], 0 <= t' <= t <= 1, float32.

    t ~ c Beta(a, b) with a, b, c = --time_dist_ctrl; r = --consistc_ratio; U ~ U(0, 1)
        e2e       t = 1, t' = 0               one step from noise to data
        mul       t' = t - U t min(0.05, r)   a small step
        any, adv  t' = t - U t r              any step; adv samples are used at (-t, -t)
        one       t' = 0                      one step from any time
    All are on the CPU: how many samples a mask has is known without waiting for a GPU.
    """
    # The order of random draws is the resume contract: t, then t' of any, then t' of mul, each for the whole batch.
    a, b, c = args.time_dist_ctrl
    rng = np.random.default_rng(torch.randint(2**62, (), generator=generator).item())
    t = torch.from_numpy(rng.beta(a, b, batch_size)).float().clamp(0, 1) * c
    target_time = t - torch.rand(batch_size, generator=generator) * args.consistc_ratio * t
    max_local_gap = min(MAX_LOCAL_GAP, args.consistc_ratio)
    local_target_time = t - torch.rand(batch_size, generator=generator) * max_local_gap * t

    counts = partition(batch_size, args.probs)
    masks = {}
    start = 0
    for sample_type in SAMPLE_TYPES:
        stop = start + counts.get(sample_type, 0)
        masks[sample_type] = torch.zeros(batch_size, dtype=torch.bool)
        masks[sample_type][start:stop] = True
        start = stop

    t[masks["e2e"]] = 1.0
    target_time[masks["e2e"]] = 0.0
    target_time[masks["one"]] = 0.0
    target_time[masks["mul"]] = local_target_time[masks["mul"]]
    return masks, t, target_time


def expand_as(t: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """One number per sample, t [B], as [B, 1, ...] that multiplies x [B, ...]."""
    return t.view(-1, *[1] * (x.ndim - 1)).to(x)


def rows_of(mask: torch.Tensor, device: torch.device) -> torch.Tensor:
    """The numbers [n] of the samples in a mask [B], on a device, which an index by the mask would have to wait for."""
    return to_device(mask.nonzero().flatten(), device)


def select_samples(cond: Conditions, rows: torch.Tensor) -> Conditions:
    """Conditions {name: [n, ...]} of n samples by their numbers [n], or by a mask [B]."""
    return {name: value[rows] for name, value in cond.items()}


def concatenate(first: Conditions, second: Conditions) -> Conditions:
    """Conditions of two batches as those of one, for one forward pass."""
    return {name: torch.cat([first[name], second[name]]) for name in first}


def split_prediction(velocity: torch.Tensor, x_t: torch.Tensor, t: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The data x̂ = x_t - |t| F and the noise ẑ = x_t + (1 - |t|) F that F [B, ...] points to, for t [B]."""
    t = expand_as(t.abs(), x_t)
    return x_t - t * velocity, x_t + (1 - t) * velocity


def prepare_inputs(
    predict: Predict, latents: torch.Tensor, cond: Conditions, *, args, generator: torch.Generator
) -> tuple[dict[str, torch.Tensor], torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """(masks, x_t [B, ...], t [B], target_time [B], target [B, ...]) of a batch of data, latents [B, ...].

    `masks` are those of `sample_times`, and three more: generated, whose data is the model's own one-step sample,
    guided, whose target gets guidance, and distant, real ones whose t' lies beyond the first step of the RCGM target.
    `target` is the velocity z - x of the straight path.
    """
    device = latents.device
    masks, t, target_time = sample_times(len(latents), args=args, generator=generator)
    low, high = args.enhanced_range
    masks["guided"] = ~masks["adv"] & (low < t) & (t < high)
    masks["distant"] = ~masks["adv"] & (t - DELTA_T > target_time)
    masks["generated"] = torch.ones_like(masks["adv"]) if args.image_free else masks["adv"]

    # data of generated samples: x̂ = z - F(z, 1, 0)
    generated = masks["generated"]
    if generated.any():
        num_generated = int(generated.sum())
        noise = to_device(torch.randn((num_generated, *latents.shape[1:]), generator=generator), device).to(latents)
        ones = torch.ones(num_generated, device=device)
        rows = rows_of(generated, device)
        with torch.no_grad():
            velocity = predict(noise, ones, torch.zeros_like(ones), select_samples(cond, rows))
        latents = latents.clone()
        latents[rows] = noise - velocity

    # noisy samples: x_t = t z + (1 - t) x
    noise = to_device(torch.randn(latents.shape, generator=generator), device).to(latents)
    share = expand_as(to_device(t, device), noise)
    x_t = share * noise + (1 - share) * latents
    target = noise - latents

    # own samples have times of their own, the negative ones
    t[masks["adv"]] = -t[masks["adv"]]
    target_time[masks["adv"]] = t[masks["adv"]]
    return masks, x_t, to_device(t, device), to_device(target_time, device), target


def enhance_target(
    predict: Predict,
    x_t: torch.Tensor,
    t: torch.Tensor,
    target: torch.Tensor,
    cond: Conditions,
    uncond: Conditions,
    *,
    ratio: float,
    data_free: bool = False,
) -> torch.Tensor:
    """Training-time guidance: v + ω (F(x_t, t, t, cond) - F(x_t, t, t, uncond)), both F in one forward pass.

    `data_free` replaces the velocity v by F(x_t, t, t, uncond): the guided velocity of a frozen teacher.
    """
    both_t = torch.cat([t, t])
    prediction = predict(torch.cat([x_t, x_t]), both_t, both_t, concatenate(cond, uncond))
    cond_prediction, uncond_prediction = prediction.chunk(2)
    start = uncond_prediction if data_free else target
    return start + ratio * (cond_prediction - uncond_prediction)


def multi_fwd(
    predict: Predict,
    x_t: torch.Tensor,
    t: torch.Tensor,
    target_time: torch.Tensor,
    target: torch.Tensor,
    cond: Conditions,
    *,
    order: int,
) -> torch.Tensor:
    """S [B, ...], the sum of F Δt over `order` equal steps of the model from t_m = max(t - 0.01, t') to t'.

    They start at x_m = x_t - 0.01 v, where the target velocity v leads.
    """
    t_m = torch.maximum(t - DELTA_T, target_time)
    x = x_t - DELTA_T * target
    displacement = torch.zeros_like(x_t)
    for i in range(order):
        t_now = t_m + (target_time - t_m) * (i / order)
        t_next = t_m + (target_time - t_m) * ((i + 1) / order)
        velocity = predict(x, t_now, t_next, cond)
        displacement = displacement + expand_as(t_now - t_next, x) * velocity
        x_hat, z_hat = split_prediction(velocity, x, t_now)
        x = expand_as(t_next, x) * z_hat + (1 - expand_as(t_next, x)) * x_hat
    return displacement


def get_rcgm_target(
    prediction: torch.Tensor,
    displacement: torch.Tensor,
    target: torch.Tensor,
    t: torch.Tensor,
    target_time: torch.Tensor,
) -> torch.Tensor:
    """The target [B, ...] of recursive consistency (RCGM): sg(F) - clamp(G, -1, 1), without gradient.

    F is the mean velocity from t to t' where (t - t') F = 0.01 v + S. The difference of the two sides, divided by
    0.01, is G = 100 (t - t') F - 100 S - v; next to t', where t - t' < 0.01, G = F - S / (t - t') - v.
    """
    prediction = prediction.detach()
    gap = expand_as(t - target_time, prediction)
    near = prediction - displacement / gap.clamp(min=1e-6) - target
    far = (gap * prediction - displacement) / DELTA_T - target
    error = torch.where(gap < DELTA_T, near, far)
    return prediction - error.clamp(-1, 1)


def loss_func(prediction: torch.Tensor, target: torch.Tensor, loss_type: str) -> torch.Tensor:
    """d(F, target) [B] of predictions [B, ...]. l2: the mean squared error m of a sample.

    barron: Barron's robust loss (arXiv 1701.03077) of m with α = 1 and c = 1e-3, m w / c, whose weight
    w = (m / c² + 1)^-½ has no gradient.
    """
    error = (prediction - target).square().flatten(1).mean(dim=1)
    if loss_type == "l2":
        return error
    weight = (error.detach() / (BARRON_C**2 + 1e-8) + 1) ** -0.5
    return error * weight / BARRON_C


def dist_match(
    predict: Predict, prediction: torch.Tensor, x_t: torch.Tensor, cond: Conditions, *, args, generator
) -> torch.Tensor:
    """Rectification loss [n] of e2e samples: d(F, sg(F - Δ)) of their predictions F [n, ...] at x_t = z.

    Δ = clamp(F(x_s, -s, -s) - F(x_s, s, s), -1, 1) is the difference between the velocity of own samples and of data
    at x_s, the one-step sample x̂ = z - F with noise of a random time s. Both F in one forward pass.
    """
    x_hat = (x_t - prediction).detach()
    s = to_device(torch.rand(len(x_hat), generator=generator), x_hat.device)
    noise = to_device(torch.randn(x_hat.shape, generator=generator), x_hat.device).to(x_hat)
    x_s = expand_as(s, x_hat) * noise + (1 - expand_as(s, x_hat)) * x_hat
    times = torch.cat([-s, s])
    with torch.no_grad():
        velocities = predict(torch.cat([x_s, x_s]), times, times, concatenate(cond, cond))
    fake_velocity, real_velocity = velocities.chunk(2)
    difference = (fake_velocity - real_velocity).clamp(-1, 1)
    return loss_func(prediction, prediction.detach() - difference, args.loss_type)


def compute_loss(
    predict: Predict,
    teacher: Callable,
    latents: torch.Tensor,
    cond: Conditions,
    uncond: Conditions,
    *,
    args,
    generator: torch.Generator,
    replays_dropout: bool = False,
    instances: torch.Tensor | None = None,
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """The TwinFlow loss of a batch (arXiv 2512.05150) and its parts: (loss, {name: part}).

    predict(x_t, t, t', cond) is the model's F [B, ...]; within `with teacher():` it is the teacher's. latents [B, ...]
    is data, cond and uncond are conditions {name: [B, ...]}. `replays_dropout`: whether `predict` has dropout. Forward
    passes: 1 with gradient, and without gradient one each for generated samples, guidance, rectification, and each of
    --estimate_order steps. `instances` [B], on the CPU: the samples of --instance_data_dir.
    """
    masks, x_t, t, target_time, target = prepare_inputs(predict, latents, cond, args=args, generator=generator)
    device = x_t.device
    if instances is not None:  # the teacher does not know the subject yet: its guidance would lead away
        masks["guided"] &= ~instances
    rows = {sample_type: rows_of(mask, device) for sample_type, mask in masks.items()}
    real = rows_of(~masks["adv"], device)
    frozen_teacher = args.ema_decay_rate == 1

    any_step = masks["e2e"] | masks["any"] | masks["one"]
    use_rcgm = args.estimate_order > 0 and bool(any_step.any())

    # Sharded processes must make equally many forward passes: without a sample for one, they evaluate one real sample.
    guided = rows["guided"]
    evaluated = guided if len(guided) else real[:1]
    # The steps of the RCGM target from t' to t' have length 0: S = 0 without them.
    walking = rows["distant"] if len(rows["distant"]) else real[:1]
    if replays_dropout:  # which masks the rows of a batch by their number: the first ones stay where they are
        walking = real
    displacement = torch.zeros_like(x_t)

    # The teacher's passes. Its weights are swapped in once for both, which must not happen between a forward pass with
    # gradient and its backward pass. A frozen teacher only guides.
    with torch.no_grad(), ExitStack() as swapped:
        if args.enhanced_ratio or (use_rcgm and not frozen_teacher):
            swapped.enter_context(teacher())

        # Guidance: v + ω (F(x_t, t, t, cond) - F(x_t, t, t, uncond)), at times in --enhanced_range.
        if args.enhanced_ratio and len(evaluated):
            enhanced = enhance_target(
                predict,
                x_t[evaluated],
                t[evaluated],
                target[evaluated],
                select_samples(cond, evaluated),
                select_samples(uncond, evaluated),
                ratio=args.enhanced_ratio,
                data_free=frozen_teacher and args.image_free,
            )
            if len(guided):
                target[guided] = enhanced

        # S, the displacement of the RCGM target
        if frozen_teacher:
            swapped.close()
        if use_rcgm:
            displacement[walking] = multi_fwd(
                predict,
                x_t[walking],
                t[walking],
                target_time[walking],
                target[walking],
                select_samples(cond, walking),
                order=args.estimate_order,
            )

    # Target of all but adv: sg(F) - clamp(G, -1, 1), or without RCGM the velocity as it is.
    if instances is None:
        prediction = predict(x_t, t, target_time, cond)
    else:  # in the same forward pass, the subject's images at t' = t, where flow matching learns them
        of_subject = rows_of(instances, device)
        images = latents[of_subject]
        s = to_device(torch.rand(len(images), generator=generator), device)
        noise = to_device(torch.randn(images.shape, generator=generator), device).to(images)
        x_s = expand_as(s, images) * noise + (1 - expand_as(s, images)) * images
        times = torch.cat([t, s]), torch.cat([target_time, s])
        both = predict(torch.cat([x_t, x_s]), *times, concatenate(cond, select_samples(cond, of_subject)))
        prediction, instance_prediction = both.split([len(x_t), len(x_s)])
    if use_rcgm:
        target[real] = get_rcgm_target(prediction[real], displacement[real], target[real], t[real], target_time[real])

    # Any-step loss, and at negative times the flow matching loss of own samples (adv):
    # w d(F(x_t, t, t'), target) with w = tan((1 - (|t| - |t'|)) π / 2.5) + 1; w = 1 for adv.
    gap = t.abs() - target_time.abs()
    weight = torch.tan((1 - gap) * math.pi / 2.5) + 1
    weight[rows["adv"]] = 1.0
    losses = weight * loss_func(prediction, target, args.loss_type)
    if args.estimate_order:
        trained = torch.ones_like(masks["adv"])
    else:  # flow matching: the samples whose target is the velocity itself
        trained = masks["mul"] | masks["adv"]
    loss = losses[rows_of(trained, device)].mean()
    logs = {}
    for sample_type in SAMPLE_TYPES:
        if len(rows[sample_type]):
            logs[f"loss_{sample_type}"] = losses[rows[sample_type]].detach().mean()

    # Flow matching of the subject's images: d(F(x_s, s, s), z - x). Their number in a batch is random.
    if instances is not None:
        instance_losses = loss_func(instance_prediction, noise - images, args.loss_type)
        instance_loss = instance_losses.sum() / (len(latents) * args.instance_share)
        loss = loss + args.instance_loss_weight * instance_loss
        logs["loss_instance"] = instance_loss.detach()

    # Rectification: d(F(z, 1, 0), sg(F(z, 1, 0) - Δ)).
    e2e = rows["e2e"]
    if len(e2e) and args.consistc_ratio == 1 and args.dist_match_cof:
        rectification_losses = dist_match(
            predict, prediction[e2e], x_t[e2e], select_samples(cond, e2e), args=args, generator=generator
        )
        rectification_loss = rectification_losses.mean()
        loss = loss + args.dist_match_cof * rectification_loss
        logs["loss_rectification"] = rectification_loss.detach()
    return loss, logs


@torch.no_grad()
def sampling_loop(
    predict: Predict,
    noise: torch.Tensor,
    cond: Conditions,
    uncond: Conditions | None = None,
    *,
    steps: int,
    style: str = "few",
    generators: list[torch.Generator] | None = None,
    cfg_scale: float = 0.0,
    stochast_ratio: float | str | None = None,
    extrapol_ratio: float = 0.0,
    order: int = 1,
    gaps: tuple[float, float] | None = None,
    time_dist_ctrl: tuple[float, float, float] | None = None,
) -> torch.Tensor:
    """Samples x [B, ...] from noise [B, ...] in `steps` forward passes (UCGM, arXiv 2505.07447).

    style: each prediction F(x, t, t') is made for t' = 0 (few), the next time (any) or t itself (mul, multi-step); it
    also sets the arguments that are None, see STYLES. stochast_ratio: share s of the noise that is renewed in each
    step, from one generator per image; "SDE" sets s = min(1, 2 t (t - t₊) / t₊²) for the next time t₊.
    extrapol_ratio: extrapolates x̂ and ẑ by their difference to the previous step. order 2: Heun's rule, for style mul
    without new noise. cfg_scale: F(uncond) + cfg_scale (F(cond) - F(uncond)); 0 is no guidance.
    """
    preset = STYLES[style]
    if stochast_ratio is None:
        stochast_ratio = 0.8 if style == "few" and steps == 1 else preset["stochast_ratio"]
    if order == 2 and (style != "mul" or stochast_ratio):
        raise ValueError("sampling order 2 needs style mul and stochast_ratio 0: only velocities at a time average")
    num_intervals = math.ceil(steps / order)
    times = time_grid(num_intervals, gaps or preset["gaps"], time_dist_ctrl or preset["time_dist_ctrl"]).tolist()

    def velocity(x, t, target_time):
        t = torch.full((len(x),), t, device=x.device)
        target_time = torch.full((len(x),), target_time, device=x.device)
        x = x.to(noise.dtype)
        if not cfg_scale:
            return predict(x, t, target_time, cond).double()
        prediction = predict(
            torch.cat([x, x]), torch.cat([t, t]), torch.cat([target_time, target_time]), concatenate(cond, uncond)
        )
        cond_prediction, uncond_prediction = prediction.double().chunk(2)
        return uncond_prediction + cfg_scale * (cond_prediction - uncond_prediction)

    x = noise.double()
    previous = None
    for t, t_next in zip(times[:-1], times[1:], strict=True):
        target_time = {"few": 0.0, "any": t_next, "mul": t}[style]
        F = velocity(x, t, target_time)  # noqa: N806
        x_hat = x - t * F
        z_hat = x + (1 - t) * F
        predicted = x_hat, z_hat
        if extrapol_ratio and previous is not None:
            x_hat = x_hat + extrapol_ratio * (x_hat - previous[0])
            z_hat = z_hat + extrapol_ratio * (z_hat - previous[1])
        previous = predicted

        s = stochast_ratio
        if s == "SDE":
            s = min(1.0, 2 * t * (t - t_next) / t_next**2) if t_next else 1.0
        if s and t_next:
            new_noise = torch.stack([torch.randn(noise.shape[1:], generator=generator) for generator in generators])
            z_hat = (1 - s) ** 0.5 * z_hat + s**0.5 * new_noise.to(z_hat)

        x_next = (1 - t_next) * x_hat + t_next * z_hat
        if order == 2 and t_next:
            x_next = x - (t - t_next) * (F + velocity(x_next, t_next, t_next)) / 2
        x = x_next
    return x.to(noise.dtype)


# ---------------------------------------------------------------------------------------------------------------------
# Data
# ---------------------------------------------------------------------------------------------------------------------


def has_parquet(folder: Path) -> bool:
    """Whether a folder holds parquet files instead of images."""
    return any(folder.glob("*.parquet"))


def read_prompts(path: Path) -> tuple[list[Example], list[str]]:
    """(examples without images, problems) of a text file with one prompt per line."""
    if not path.is_file():
        return [], [f"--prompts_file {visible(path)}: no such file"]
    try:
        lines = read_lines(path)
    except ValueError as error:
        return [], [f"--prompts_file {error}"]
    examples = []
    for i, line in enumerate(lines, start=1):
        prompt = line.strip()
        if prompt:
            examples.append(Example(f"{path}:{i}", caption=prompt))
    return examples, [] if examples else [f"--prompts_file {path}: no prompts in it"]


def read_parquet(flag: str, path: Path, args, image_columns: dict) -> tuple[list[Example], list[str]]:
    """(examples, problems) of a parquet file, or of all in a folder."""
    files = sorted(path.glob("*.parquet")) if path.is_dir() else [path]
    return read_dataset(
        "parquet",
        source=f"{flag} {path}",
        name=str(path),
        image_columns=image_columns,
        caption_column=args.caption_column or DATASET_CAPTIONS,
        data_files=[str(file) for file in files],
        cache_dir=args.cache_dir,
    )


def own_columns(args) -> dict[str, str | tuple[str, ...]]:
    """{role: the columns of a dataset, of which the first that there is holds the images}."""
    columns: dict[str, str | tuple[str, ...]] = {"image": (args.image_column, "image_bytes")}
    if args.reference_column:
        columns["reference"] = args.reference_column
    return columns


def own_dataset(args) -> dict:
    """What `read_dataset` and `open_stream` are to read."""
    return dataset_settings(args, own_columns(args), args.caption_column or DATASET_CAPTIONS)


def check_streamed(example: Example) -> str | None:
    """What is wrong with an example of a stream, which nothing has checked before, by the header of its image."""
    problems = check_captions([example], several=True)
    example.size = header_size(example)
    return problems[0] if problems else None


def read_examples(args) -> tuple[list[Example], list[str]]:
    """(examples, problems) of the flags that say what is trained on; the image to edit is images["reference"]."""
    if args.image_free:
        path = args.prompts_file
        if path.suffix == ".parquet" or has_parquet(path):
            return read_parquet("--prompts_file", path, args, image_columns={})
        return read_prompts(path)
    image_columns = own_columns(args)
    if args.streaming:
        return read_stream_start(own_dataset(args), check_streamed)
    if args.dataset_name or args.data_files:
        return read_dataset(name=args.dataset_name or "--data_files", **own_dataset(args))
    examples = []
    problems = []
    for folder in args.train_data_dir:
        if has_parquet(folder):
            found, unread = read_parquet("--train_data_dir", folder, args, image_columns)
        else:
            found, unread = read_folder(
                folder,
                flag="--train_data_dir",
                caption_per_line=True,
                caption_column=args.caption_column,
                partner_dirs={"reference": args.reference_data_dir},
                partner_match="name",
            )
        examples += found
        problems += unread
    return examples, problems


def find_examples(args) -> tuple[list[Example], list[str]]:
    """(examples, problems): what is trained on, with the sizes of its images."""
    examples, problems = read_examples(args)
    images = [] if args.image_free else all_images(examples)
    sizes, unreadable = read_sizes(images)  # which decodes them
    problems += unreadable
    problems += check_captions(examples, several=True, remedy="write it in a .txt file beside the image")
    for image, size in zip(images, sizes, strict=True):
        image.size = size
    misfits = []
    for example in examples:
        reference = example.images.get("reference")
        if reference and reference.size and example.size:
            misfits += check_shape(reference.name, "an image to edit", reference.size, example.size)
    problems += first_ten(misfits)
    return examples, problems


def find_instances(args) -> tuple[list[Example], list[str]]:
    """(examples of the subject, problems), each with --instance_prompt beside its own captions."""
    if not args.instance_data_dir:
        return [], []
    folder = args.instance_data_dir
    # with captions in .txt files, or without any, the column is that of the others
    caption_column = args.caption_column if metadata_file(folder).exists() else None
    examples, problems = read_folder(folder, caption_per_line=True, caption_column=caption_column)
    sizes, unreadable = read_sizes(examples)
    problems += unreadable
    if args.instance_prompt:
        for example in examples:
            captions = [text for text in example.captions if not isinstance(text, str) or text.strip()]
            example.source = example.source if captions else "--instance_prompt"
            example.caption = [*captions, args.instance_prompt]
    problems += check_captions(examples, several=True)
    for example, size in zip(examples, sizes, strict=True):
        example.size = size
    return examples, problems


def find_held_out(args, examples: list[Example]) -> tuple[list[Example], list[Example], list[str]]:
    """(training examples, held-out ones, problems) of the examples that `find_examples` has found."""
    training, held_out = hold_out(examples, args.validation_split or 0)
    problems = check_split(training, args.validation_split or 0) if examples else []
    if args.validation_data_dir:
        own_args = held_out_args(
            args, train_data_dir=[args.validation_data_dir], dataset_name=None, data_files=None, streaming=False
        )
        held_out, problems = find_examples(own_args)
        problems = [problem.replace("--train_data_dir", "--validation_data_dir") for problem in problems]
    return training, held_out, problems


def find_validation_image(args) -> tuple[Example | None, list[str]]:
    """(the image to edit with the validation prompt, problems)."""
    if args.validation_image is None:
        return None, []
    # its stamp is read once: the cache's keys change when the file does
    reference = file_example(args.validation_image, name=f"--validation_image {args.validation_image}")
    (reference.size,), problems = read_sizes([reference])
    return reference, problems


def trained_sizes(args) -> list[Size]:
    """The sizes of --aspect_ratio_buckets, or the square of --resolution."""
    return parse_buckets(args.aspect_ratio_buckets, args.resolution)


def drawn_size(args, reference: Size | None = None) -> Size:
    """The trained size that is drawn: the first one, for an edit the one nearest to the size of the image to edit."""
    sizes = trained_sizes(args)
    return sizes[0] if reference is None else nearest_bucket(reference, sizes)


def validation_size(args, reference: Example | None) -> Size:
    """The size of validation images."""
    trained = drawn_size(args, reference.size if reference else None)
    return Size(args.validation_height or trained.height, args.validation_width or trained.width)


def validation_prompts(args) -> tuple[list[ValidationPrompt], list[str]]:
    """(what is generated at every validation, problems). --validation_prompt has no seed: it is drawn with several."""
    options = {"width", "height", "seed"}
    if args.training == "lora":
        options.add("lora_scale")
    multiple = BACKBONES[args.model_type].resolution_multiple
    prompts, problems = read_validation_prompts(
        "--validation_prompts", args.validation_prompts, options=options, multiple=multiple
    )
    prompts = [replace(prompt, seed=args.seed if prompt.seed is None else prompt.seed) for prompt in prompts]
    if args.validation_prompt:
        prompts.append(ValidationPrompt(args.validation_prompt))
    return prompts, problems


def prompt_size(args, reference: Example | None, prompt: ValidationPrompt) -> Size:
    """The size of the images of a validation prompt."""
    size = validation_size(args, reference)
    return Size(prompt.height or size.height, prompt.width or size.width)


def latent_shape(backbone: Backbone, size: Size) -> tuple[int, int, int]:
    """(C, h, w) of the latents of an image."""
    factor = backbone.vae_scale_factor
    return backbone.latent_channels, size.height // factor, size.width // factor


def model_record(args) -> dict[str, str]:
    """The `model_identities` of all that models are read from."""
    return model_identities(args, ["openuni_checkpoint", "openuni_llm"])


def encoder_settings(args, models: dict[str, str]) -> list[str]:
    """What the tensors of a prompt or an image depend on, beside the prompt or the image itself.

    `models` is the `model_record`.
    """
    return [
        str(value)
        for value in (
            *models.items(),
            hub_commit(args),
            args.model_type,
            args.variant,
            args.mixed_precision,
            args.quantize_text_encoders,
            args.max_sequence_length,
            args.seed,  # of random crops
            args.resolution,
            args.center_crop,
            args.image_interpolation_mode,
            "sRGB",  # of the pixels
        )
    ]


def prompt_key(prompt: str, reference: Example | None, *crop: object) -> tuple:
    """The cache's key for a prompt; that of an edit is encoded beside the image to edit, cut as `crop` says."""
    if reference is None:
        return ("prompt", prompt)
    return ("prompt", prompt, reference.stamp or reference.name, *crop)


class TwinFlowDataset(Dataset):
    """Samples by (epoch, index): {"cond": conditions, "uncond": conditions, ...} of a caption and of --uncond_prompt.

    Beside them "latents" [C, h, w] if they are cached, else "pixel_values" [3, H, W]; for edits "reference" or
    "reference_values" of the image to edit; nothing for image_free.

    An image has the size of `buckets` nearest to its own, and a batch one size. Every batch is full, as each holds all
    types of samples: in `order`, the indices of an epoch, the first images of a size come again until they fill it.
    The last `num_instances` examples are of a subject: they, or the others, come so often that --instance_share of an
    epoch is theirs.

    The crop of an image depends on (seed, index); flip and choice of a caption on (seed, epoch, index), of a subject's
    also on the place in `order`, in this order of random draws. Workers, caches and interruptions therefore change no
    sample.
    """

    def __init__(
        self,
        examples: list[Example],
        cache: TensorCache,
        args,
        place: tuple = (),
        latents_cache: TensorCache | None = None,
        num_instances: int = 0,
    ):
        self.examples = examples
        self.num_others = len(examples) - num_instances
        self.cache = cache  # of prompts
        self.latents_cache = latents_cache or cache
        self.args = args
        self.place = place  # in the cache's keys, beside an index: held-out images are not cropped as others are
        sizes = trained_sizes(args)
        self.buckets = [nearest_bucket(example.size, sizes) if example.size else None for example in examples]
        indices = list(range(self.num_others))
        if num_instances:  # the subject's images come again until they have their share, or the others theirs
            ratio = args.instance_share / (1 - args.instance_share)
            num_samples = max(self.num_others, round(num_instances / ratio))
            num_of_subject = max(num_instances, round(self.num_others * ratio))
            indices = list(itertools.islice(itertools.cycle(indices), num_samples))
            of_subject = itertools.cycle(range(self.num_others, len(examples)))
            indices += itertools.islice(of_subject, num_of_subject)
        self.order = []
        for bucket in dict.fromkeys(self.buckets):
            members = [index for index in indices if self.buckets[index] == bucket]
            num_batches = math.ceil(len(members) / args.train_batch_size)
            self.order += itertools.islice(itertools.cycle(members), num_batches * args.train_batch_size)

    def __len__(self):
        return len(self.order)

    def image_keys(self) -> list[tuple[int, bool]]:
        """(index, flipped) of all that training can ask for."""
        flips = (False, True) if self.args.random_flip else (False,)
        return [(index, flipped) for index in range(len(self.examples)) for flipped in flips]

    def crop(self, image: Example, index: int, flipped: bool) -> Image.Image:
        """An example's image or its reference, which is cut at the same place, in the size of its bucket."""
        return self.fit(image, self.buckets[index], index, flipped)

    def fit(self, image: Example, size: Size | None, index: int, flipped: bool) -> Image.Image:
        """An image in a size."""
        assert size is not None
        centering = (0.5, 0.5)
        if not self.args.center_crop:
            centering = tuple(np.random.default_rng((self.args.seed, index)).random(2))
        interpolation = self.args.image_interpolation_mode
        return fit(image.image(), size, interpolation, centering=centering, mirrored=flipped)

    def pixel_values(self, image: Example, index: int, flipped: bool) -> torch.Tensor:
        """What `crop` returns as [3, H, W] in [-1, 1]."""
        return to_tensor(self.crop(image, index, flipped))

    def prompt_key(self, prompt: str, index: int, flipped: bool) -> tuple:
        """The cache's key for a prompt beside the image to edit of an example, if it has one."""
        reference = self.examples[index].images.get("reference")
        return prompt_key(prompt, reference, self.buckets[index], index, flipped, *self.place)

    def image_key(self, index: int, flipped: bool) -> tuple:
        """The cache's key for the latents of an image, whose random crop depends on its index."""
        example = self.examples[index]
        return ("image", self.buckets[index], index, flipped, example.stamp or example.name, *self.place)

    def has_latents(self) -> bool:
        """Whether the latents of all images that training can ask for are on the disk."""
        return all(self.latents_cache.has(*self.image_key(index, flipped)) for index, flipped in self.image_keys())

    def __getitem__(self, position: tuple[int, int]) -> dict:
        epoch, place = position
        index = self.order[place]
        example = self.examples[index]
        reference = example.images.get("reference")
        repeat = (place,) if index >= self.num_others else ()  # which differ in caption and flip
        caption, flipped = self.draw(example, epoch, index, *repeat)
        sample = {
            "cond": self.cache.load(*self.prompt_key(caption, index, flipped)),
            "uncond": self.cache.load(*self.prompt_key(self.args.uncond_prompt, index, flipped)),
            "is_instance": torch.tensor(index >= self.num_others),
        }
        if self.args.image_free:
            return sample
        if self.args.cache_latents:
            sample |= self.latents_cache.load(*self.image_key(index, flipped))
            return sample
        sample["pixel_values"] = self.pixel_values(example, index, flipped)
        if reference is not None:
            sample["reference_values"] = self.pixel_values(reference, index, flipped)
        return sample

    def draw(self, example: Example, epoch: int, index: int, *repeat: int) -> tuple[str, bool]:
        """(caption, whether the image is mirrored) of a sample."""
        rng = np.random.default_rng((self.args.seed, epoch, index, *repeat))
        caption = example.captions[rng.integers(len(example.captions))]
        return caption, bool(self.args.random_flip and rng.random() < 0.5)

    def streamed_bucket(self, example: Example, epoch: int, index: int) -> Size:
        """The size of an example of a stream, which is checked. Raises ValueError."""
        problem = check_streamed(example)
        if problem:
            raise ValueError(problem)
        assert example.size is not None
        return nearest_bucket(example.size, trained_sizes(self.args))

    def streamed_sample(self, example: Example, epoch: int, index: int) -> dict:
        """{"prompt", "pixel_values"} of an example of a stream, whose conditions are made in training."""
        assert example.size is not None
        caption, flipped = self.draw(example, epoch, index)
        bucket = nearest_bucket(example.size, trained_sizes(self.args))
        return {"prompt": caption, "pixel_values": to_tensor(self.fit(example, bucket, index, flipped))}


def streamed_batches(stream: Stream, dataset: TwinFlowDataset, args, **processes: int) -> StreamedBatches:
    """The batches of a stream, which are full, as each holds all types of samples."""
    return StreamedBatches(
        stream,
        dataset.streamed_sample,
        group_of=dataset.streamed_bucket,
        batch_size=args.train_batch_size,
        fills_batches=True,
        shuffle_buffer=args.shuffle_buffer,
        seed=args.seed,
        num_threads=args.dataloader_num_workers,
        **processes,
    )


def encode_streamed(batch: dict, backbone: Backbone, prompt_encoder, args, device: torch.device) -> dict:
    """A batch of a stream with the conditions of its prompts, as `collate` has them."""
    prompts = [*batch["prompt"], args.uncond_prompt]
    unique = list(dict.fromkeys(prompts))
    count = backbone.prompts_per_batch(device)
    conditions: dict[str, Conditions] = {}
    with torch.no_grad():
        for start in range(0, len(unique), count):
            part = unique[start : start + count]
            encoded = backbone.encode_prompts(prompt_encoder, part, [None] * len(part))
            conditions |= dict(zip(part, encoded, strict=True))
    *own, uncond = [conditions[prompt] for prompt in prompts]
    stacked = stack_conditions(own + [uncond] * len(own))
    cond = {name: value[: len(own)] for name, value in stacked.items()}
    return batch | {"cond": cond, "uncond": {name: value[len(own) :] for name, value in stacked.items()}}


def stack_conditions(conditions: list[Conditions]) -> Conditions:
    """{name: [B, ...]} of B conditions {name: [T, ...]}, padded with zeros (masked) to the longest."""
    return {name: pad_sequence([c[name] for c in conditions], batch_first=True) for name in conditions[0]}


def collate(samples: list[dict]) -> dict:
    """A batch: tensors stacked, conditions {name: [B, ...]}, cond and uncond padded to one length."""
    count = len(samples)
    conditions = stack_conditions([sample["cond"] for sample in samples] + [sample["uncond"] for sample in samples])
    batch = {
        "cond": {name: value[:count] for name, value in conditions.items()},
        "uncond": {name: value[count:] for name, value in conditions.items()},
    }
    for name in samples[0]:
        if name not in batch:
            batch[name] = torch.stack([sample[name] for sample in samples])
    return batch


# ---------------------------------------------------------------------------------------------------------------------
# Training
# ---------------------------------------------------------------------------------------------------------------------


def read_image(example: Example, size: Size, args) -> Image.Image:
    """The example's image, fitted to a size."""
    return fit(example.image(), size, args.image_interpolation_mode)


def encode_prompts(
    accelerator,
    backbone: Backbone,
    datasets: Sequence[TwinFlowDataset],
    cache: TensorCache,
    prompts: Sequence[ValidationPrompt],
    validation_reference: Example | None,
    args,
    dtype: torch.dtype,
) -> CachedTensors:
    """Fills the cache with the conditions of all prompts, those of validation, `prompts`, included, and returns its
    entries. Prompt encoders are loaded only if some are missing, and freed afterwards."""
    requests = {}  # {key of the cache: (prompt, function that returns the image to edit)}
    for dataset in datasets:
        for index, flipped in dataset.image_keys():
            example = dataset.examples[index]
            reference = example.images.get("reference")
            read_reference = functools.partial(dataset.crop, reference, index, flipped) if reference else None
            for prompt in [*example.captions, args.uncond_prompt]:
                requests[dataset.prompt_key(prompt, index, flipped)] = (prompt, read_reference)
    for validation_prompt in prompts:
        size = prompt_size(args, validation_reference, validation_prompt)
        read_reference = None
        if validation_reference is not None:
            read_reference = functools.partial(read_image, validation_reference, size, args)
        key = prompt_key(validation_prompt.prompt, validation_reference, size)
        requests[key] = (validation_prompt.prompt, read_reference)

    @functools.cache
    def load_prompt_encoder():
        return backbone.load_prompt_encoder(encoder_dtype(dtype), accelerator.device)

    def read(key):
        prompt, read_reference = requests[key]
        return prompt, read_reference() if read_reference else None

    @torch.no_grad()
    def encode(inputs):
        prompts, images = zip(*inputs, strict=True)
        return backbone.encode_prompts(load_prompt_encoder(), list(prompts), list(images))

    batch_size = backbone.prompts_per_batch(accelerator.device)
    cache.fill(accelerator, requests, read, encode, "Encoding prompts", batch_size=batch_size)
    return CachedTensors(cache, {key: cache.digest(*key) for key in requests})


def cache_latents(accelerator, vae, dataset: TwinFlowDataset) -> CachedTensors:
    """Fills the cache with the latents of all images that training can ask for, and returns its entries. Without a
    `vae` they are there already."""
    cache = dataset.latents_cache
    requests = {}  # {key of the cache: (index, flipped)}; images of one size are encoded together
    for index, flipped in sorted(dataset.image_keys(), key=lambda key: dataset.buckets[key[0]]):
        requests[dataset.image_key(index, flipped)] = (index, flipped)

    def read(key):
        index, flipped = requests[key]
        example = dataset.examples[index]
        pixel_values = {"latents": dataset.pixel_values(example, index, flipped)}
        if "reference" in example.images:
            pixel_values["reference"] = dataset.pixel_values(example.images["reference"], index, flipped)
        return pixel_values

    def encode(inputs):
        entries = [{} for _ in inputs]
        for name in inputs[0]:
            images = [pixel_values[name] for pixel_values in inputs]
            latents = encode_by_size(functools.partial(encode_images, vae), images, vae.device)
            for entry, value in zip(entries, latents, strict=True):
                entry[name] = value
        return entries

    batch_size = images_per_batch(accelerator.device)
    cache.fill(accelerator, requests, read, encode, "Caching latents", batch_size=batch_size)
    return CachedTensors(cache, {key: cache.digest(*key) for key in requests})


def check_caches(dataset: TwinFlowDataset, backbone: Backbone, args, dtype: torch.dtype) -> list[str]:
    """Problems of the disks on which the conditions of all captions lie, and the latents with --cache_latents, in
    float32."""
    prompts = set()
    num_latents = 0
    for index, flipped in dataset.image_keys():
        example = dataset.examples[index]
        prompts.update(dataset.prompt_key(caption, index, flipped) for caption in example.captions)
        if args.cache_latents and not args.image_free:
            num_latents += math.prod(latent_shape(backbone, dataset.buckets[index])) * (1 + len(example.images))
    return check_cache_rooms(args, prompts=prompts_size(args, len(prompts), dtype), latents=4 * num_latents)


def prepare_batch(
    batch: dict, backbone: Backbone, vae, args, device: torch.device, offload_vae: bool, *, micro_step: int
) -> tuple[torch.Tensor, Conditions, Conditions]:
    """(latents [B, C, h, w], conditions, unconditional conditions) of a batch, on the device."""
    reference = None
    if args.image_free:  # only the shape of the latents counts, see `prepare_inputs`
        sizes = trained_sizes(args)
        size = sizes[np.random.default_rng((args.seed, micro_step)).integers(len(sizes))]
        latents = torch.zeros(args.train_batch_size, *latent_shape(backbone, size), device=device)
    elif args.cache_latents:
        latents = to_device(batch["latents"], device)
        reference = batch.get("reference")
    else:
        with torch.no_grad(), offload_models(vae, device=device, offload=offload_vae):
            latents = encode_images(vae, batch["pixel_values"])
            if "reference_values" in batch:
                reference = encode_images(vae, batch["reference_values"])
    cond = to_device(batch["cond"], device)
    uncond = to_device(batch["uncond"], device)
    if reference is not None:
        cond["reference"] = to_device(reference, device)
        uncond["reference"] = cond["reference"]
    return latents, cond, uncond


def held_out_losses(
    accelerator, predict: Predict, transformer, teacher: EMATeacher, backbone: Backbone, vae, held_out, args
) -> dict[str, float]:
    """What the metrics get of a dataset, `held_out`: {"validation_loss": mean, "validation_loss_0.1": at this time,
    ...}.

    That is the distance of F(x_t, t, t) to its target, the velocity with the guidance of --enhanced_ratio, at the
    noise and, as times, the levels of `fixed_noise`; samples weigh alike. The weights are those that are validated.
    """
    low, high = args.enhanced_range
    guiding_model = teacher if args.ema_decay_rate == 1 else nullcontext  # else it is what is validated

    def losses_of(index):
        sample = held_out[0, held_out.order.index(index)]
        batch = collate([sample] * len(NOISE_LEVELS))
        latents, cond, uncond = prepare_batch(
            batch, backbone, vae, held_out.args, accelerator.device, offload_vae=False, micro_step=0
        )
        latents, noise, t = fixed_noise(latents[:1], index)
        x_t = expand_as(t, noise) * noise + (1 - expand_as(t, noise)) * latents
        target = noise - latents
        guided = (low < t) & (t < high)
        if args.enhanced_ratio and guided.any():
            with guiding_model():
                target[guided] = enhance_target(
                    predict,
                    x_t[guided],
                    t[guided],
                    target[guided],
                    select_samples(cond, guided),
                    select_samples(uncond, guided),
                    ratio=args.enhanced_ratio,
                )
        return {"validation_loss": loss_func(predict(x_t, t, t, cond), target, args.loss_type)}

    return held_out_means(accelerator, transformer, len(held_out.examples), losses_of)


def log_validation(
    accelerator,
    predict: Predict,
    transformer,
    backbone: Backbone,
    vae,
    cache: TensorCache,
    prompts: Sequence[ValidationPrompt],
    reference: Example | None,
    args,
    *,
    teacher: Callable,
    step: int,
    weights_of: int | None = None,
) -> list[Image.Image]:
    """Generates the validation prompts, sends the images to validation/step-N.png and the trackers, and returns them.

    `teacher()` is a context in which `predict` computes with the weights that are validated.
    """
    device = accelerator.device
    offload_vae = args.offload or args.cache_latents or args.image_free
    images = []
    captions = []
    with (
        undisturbed(transformer, device=device),
        teacher(),
        offload_models(vae, device=device, offload=offload_vae),
    ):
        for prompt in prompts:
            seeds = (
                [prompt.seed]
                if args.validation_prompts
                else [args.seed + i for i in range(args.num_validation_images)]
            )
            size = prompt_size(args, reference, prompt)
            shape = latent_shape(backbone, size)
            cond = stack_conditions([cache.load(*prompt_key(prompt.prompt, reference, size))] * len(seeds))
            if reference is not None:
                reference_values = to_tensor(read_image(reference, size, args))
                cond["reference"] = encode_images(vae, reference_values[None]).expand(len(seeds), -1, -1, -1)
            cond = {name: value.to(device) for name, value in cond.items()}
            for sampler in args.validation_samplers:
                if stop_agreed(accelerator):
                    return []
                style, steps = sampler.split(":")
                generators = [torch.Generator().manual_seed(seed) for seed in seeds]
                noise = torch.stack([torch.randn(shape, generator=generator) for generator in generators])
                with scaled_adapters(transformer, prompt.lora_scale):
                    latents = sampling_loop(
                        predict, noise.to(device), cond, steps=int(steps), style=style, generators=generators
                    )
                with frugal_decoding(vae, size.height * size.width, device):
                    images += [to_image(decode_images(vae, part)) for part in latents.split(1)]
                if args.validation_prompts:
                    captions.append(f"{prompt.prompt} | {sampler}, {prompt.described(seed=args.seed)}")
                else:
                    captions += [f"{sampler}, seed {seed}" for seed in seeds]
    columns = len(args.validation_samplers) if args.validation_prompts else args.num_validation_images
    title = "" if args.validation_prompts else args.validation_prompt
    save_images(accelerator, args, images, captions, prompt=title, step=step, columns=columns, weights_of=weights_of)
    return images


MODEL_CARD = """
# {name}

{trained} of {model} ({model_type}), trained with TwinFlow (recipe {recipe}). It generates in 1, 2, 4 or more steps,
without guidance. From the folder of the trainer:

```bash
python examples/{command}
```
"""


def save_model_card(args, command: str, held_out: str = "") -> None:
    """Writes README.md into the output folder: what was trained, the command that generates images with it, and what
    `held_out` tells of the held-out loss."""
    trained = "All weights"
    if args.training == "lora":
        trained = f"A {adapter_kind(args)} of rank {args.rank} and alpha {args.lora_alpha:g}"
    description = MODEL_CARD.format(
        name=args.output_dir.resolve().name,
        trained=trained,
        model=args.pretrained_model_name_or_path,
        model_type=args.model_type,
        recipe=args.recipe,
        command=command,
    )
    if held_out:
        description = f"{description.rstrip()}\n\n{held_out}"
    tags = ["text-to-image", "twinflow", args.training, "diffusers"]
    write_model_card(args, description, tags, args.pretrained_model_name_or_path)


def save_scheduler(folder: Path, two_times: bool) -> None:
    """Writes `TwinFlowScheduler` and its code into a folder, where diffusers' AutoModel finds both.

    Pipelines tell a model one time. An adapter knows by it where to jump; a model that embeds two times does not, and
    follows the path.
    """
    scheduler = TwinFlowScheduler(style="mul" if two_times else "few", two_times=two_times)
    with writing(folder):
        scheduler.save_pretrained(folder)
        shutil.copy(inspect.getfile(TwinFlowScheduler), folder)
        follow_umask(folder)


def generate_command(args, prompt: str) -> str:
    """The command, below examples/, that generates an image of `prompt` with the result."""
    folder = shlex.quote(str(args.output_dir.resolve()))
    command = f"twinflow/generate.py {folder} --prompt {shlex.quote(prompt)}"
    if args.model_type == "qwenimage-edit":
        command += " --image image.png"
    return f"{command} --steps 2"


def describe_run(args, dataset: TwinFlowDataset, held_out: TwinFlowDataset, num_parts: int = 0) -> dict[str, str]:
    """What the header says of the method and its data, of a stream in `num_parts`, {label: text}."""
    counts = partition(args.train_batch_size, args.probs)
    if args.ema_decay_rate == 0:
        teacher = "the model itself"
    elif args.ema_decay_rate == 1:
        teacher = "the model before training"
    else:
        teacher = f"moving average, decay {args.ema_decay_rate:g}"
    small_groups = {}
    if args.image_free:
        sizes = " or ".join(map(str, trained_sizes(args)))
        data = f"{len(dataset.examples)} prompts at {sizes} px"
    elif num_parts:
        data = f"a stream of {num_parts} files at {' or '.join(map(str, trained_sizes(args)))} px"
    else:
        data = f"{len(dataset.examples)} images: {count_sizes(dataset.buckets)}"
        num_instances = len(dataset.examples) - dataset.num_others
        if num_instances:
            share = sum(index >= dataset.num_others for index in dataset.order) / len(dataset.order)
            data += f", {num_instances} of them of the subject, {share:.0%} of the samples"
        small_groups = describe_small_groups(
            dataset.buckets, args.train_batch_size, consequence="too few for a batch, repeated until they fill one"
        )
    tokenizers = [load_tokenizer(args, folder) for folder in BACKBONES[args.model_type].tokenizer_folders]
    long_captions = {}
    if tokenizers and not num_parts:
        captions = {}
        for example in dataset.examples:
            captions |= {f"{example.name}, {i}": caption for i, caption in enumerate(example.captions, start=1)}
        long_captions = describe_long_prompts(captions, tokenizers[0], args.max_sequence_length, *tokenizers[1:])
    return {
        "model": f"{args.model_type}, {'all weights' if args.training == 'full' else 'LoRA'}",
        "recipe": f"{args.recipe}, order {args.estimate_order}, guidance {args.enhanced_ratio:g}",
        "loss": f"{args.loss_type}, rectification {args.dist_match_cof:g}",
        "batch": ", ".join(f"{count} {sample_type}" for sample_type, count in counts.items()),
        "teacher": teacher,
        "data": data,
        **describe_data(
            [*([] if num_parts else dataset.examples), *held_out.examples],
            [*(args.train_data_dir or []), args.instance_data_dir, args.reference_data_dir],
            "--prompts_file",
        ),
        **long_captions,
        **small_groups,
    }


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

    backbone = BACKBONES[args.model_type](args)
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
        kwargs_handlers=[
            InitProcessGroupKwargs(timeout=PROCESS_TIMEOUT),
            DistributedDataParallelKwargs(find_unused_parameters=backbone.has_unused_parameters),
        ],
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
    examples, held_out_examples, held_out_problems = find_held_out(args, examples)
    problems += held_out_problems
    instances, instance_problems = find_instances(args)
    problems += instance_problems
    examples += instances
    val_prompts, prompt_problems = validation_prompts(args)
    problems += prompt_problems
    validation_reference, unreadable = find_validation_image(args)
    problems += unreadable
    models = model_record(args)
    cache = TensorCache(prompts_folder(args), encoder_settings(args, models))
    latents_cache = TensorCache(latents_folder(args), cache.identity)
    dataset = TwinFlowDataset(examples, cache, args, latents_cache=latents_cache, num_instances=len(instances))
    own_args = held_out_args(args, seed=NOISE_SEED, center_crop=True, random_flip=False, cache_latents=True)
    held_out = TwinFlowDataset(held_out_examples, cache, own_args, ("held out",), latents_cache)
    processes = {"process_index": accelerator.process_index, "num_processes": accelerator.num_processes}
    accumulation = args.gradient_accumulation_steps
    total_batch_size = args.train_batch_size * accumulation * accelerator.num_processes
    if args.streaming:
        steps_per_epoch = None
        max_train_steps = args.max_train_steps
    else:
        groups = [dataset.buckets[index] for index in dataset.order]
        sampler = StepSampler(groups, args.train_batch_size, seed=args.seed, **processes)
        steps_per_epoch = math.ceil(sampler.steps_per_epoch / accumulation)
        max_train_steps = args.max_train_steps or args.num_train_epochs * steps_per_epoch
    validation_steps = args.validation_steps or args.validation_epochs * (steps_per_epoch or 1)
    validation_loss_steps = args.validation_loss_steps or args.validation_steps or DEFAULT_STEPS
    run = run_settings(args, accelerator.num_processes, data=data_record(examples), models=models)
    run |= held_out_record(held_out_examples)
    checkpoint, resume_problems = agreed_checkpoint(accelerator, args.output_dir, args.resume_from_checkpoint)
    problems += resume_problems
    stream = None
    if args.streaming and not problems:
        stream, problems = open_stream(**own_dataset(args))
        sampler = streamed_batches(stream, dataset, args, **processes)
        run["files"] = stream.record()
    begun_with = match_processes(checkpoint, run)
    problems += check_run(accelerator, args, max_train_steps, checkpoint, run)
    if not problems:
        problems += check_caches(dataset, backbone, args, weight_dtype)
    problems = gather_problems(problems)
    if problems:
        fail(accelerator, problems)
    sampler.begun_with = begun_with
    hub_repo = create_hub_repo(accelerator, args)
    claim_output_dir(accelerator, args.output_dir, [lora_file(args.output_dir, args.output_name)])

    # 3. Prompts and latents: encoded once; prompt encoders are freed before the transformer is loaded
    datasets = [dataset, held_out]
    encoded = {
        "prompts": encode_prompts(
            accelerator, backbone, datasets, cache, val_prompts, validation_reference, args, weight_dtype
        )
    }
    free_memory()
    prompt_encoder = None
    if args.streaming:  # it stays, as the prompts come with the images
        prompt_encoder = backbone.load_prompt_encoder(encoder_dtype(weight_dtype), device)
    uses_latents = args.cache_latents and not args.image_free
    draws = val_prompts and not args.precompute_only
    encodes = not (args.cache_latents or args.image_free)
    is_encoded = held_out.has_latents() and (not uses_latents or dataset.has_latents())
    vae = None
    # another run may fill the folder while processes look: all load the VAE, or none
    if draws or encodes or not all(gather_objects([is_encoded])):
        vae = backbone.load_vae(weight_dtype)
    offload_vae = args.offload or args.cache_latents or args.image_free
    if vae is not None:
        vae.to("cpu" if offload_vae else device)
    with offload_models(vae, device=device, offload=offload_vae) if vae is not None else nullcontext():
        if uses_latents:
            encoded["latents"] = cache_latents(accelerator, vae, dataset)
        if held_out_examples:
            encoded["held out"] = cache_latents(accelerator, vae, held_out)
    if args.precompute_only:
        print_precomputed(accelerator, encoded)
        accelerator.end_training()
        return

    # 4. Transformer: all weights and a second time embedding, or a LoRA
    train_all = args.training == "full"
    dtype = torch.float32 if train_all else weight_dtype  # of the transformer's own weights
    transformer = backbone.load_transformer(None if train_all else weight_dtype)
    base_size = transformer.num_parameters()
    if args.quantize_base != "none":
        quantize_base(transformer, dtype, args.quantize_base)
    block_by_block = args.fsdp or args.blocks_to_swap  # it may not fit as a whole: `shard` or BlockSwap moves it
    transformer.to("cpu" if block_by_block else device)
    set_seed(args.seed)  # the same initial weights, whether prompts and latents were encoded or found in the cache
    if train_all:
        # `shard` does it to a sharded model block by block; the second time embedding is drawn in float32
        in_float32 = transformer.get_submodule(backbone.time_module) if args.fsdp else transformer
        in_float32.float()
        if backbone.embeds_target_time(transformer):
            accelerator.print("  --target_time_init has no effect: the model has its second time embedding already")
        else:
            backbone.add_target_time(transformer, args.target_time_init)
        transformer.requires_grad_(True)
    else:
        add_lora(
            transformer,
            rank=args.rank,
            alpha=args.lora_alpha,
            use_rslora=args.use_rslora,
            init_lora_weights=args.init_lora_weights,
            dropout=args.lora_dropout,
            target_modules=lora_targets(args, transformer),
            **adapter_options(args),
        )
        if args.lora_path:
            start_from_lora(args.lora_path, {"transformer": transformer}, flux=args.model_type == "flux")
    if args.gradient_checkpointing:
        transformer.enable_gradient_checkpointing()
    view_block_inputs(transformer)
    if args.compile:
        compile_blocks(transformer)
    if args.blocks_to_swap:
        block_swap = BlockSwap(transformer, args.blocks_to_swap, device)
    if args.fsdp:
        kept_in = torch.float32 if train_all else None
        shard(transformer, device, weight_dtype, hybrid=args.hybrid_shard, kept_in=kept_in)
    params = {name: parameter for name, parameter in transformer.named_parameters() if parameter.requires_grad}

    # 5. Optimizer and schedule
    lr_scale = total_batch_size if args.scale_lr else 1
    params_to_optimize = [
        {
            "params": list(params.values()),
            "lr": args.learning_rate * lr_scale,
            "weight_decay": args.adam_weight_decay,
        }
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
    unwrapped_transformer = transformer
    if args.fsdp:  # `shard` has prepared the transformer
        lr_scheduler = accelerator.prepare(lr_scheduler)
    else:
        transformer, optimizer, lr_scheduler = accelerator.prepare(transformer, optimizer, lr_scheduler)
    teacher = EMATeacher(
        params.values(), args.ema_decay_rate, on_swap=functools.partial(reshard, unwrapped_transformer)
    )
    averages = {}
    if teacher.is_moving_average:
        averages = dict(zip(params, teacher.tensors, strict=True))
    result_weights = teacher if teacher.is_moving_average else nullcontext  # what is validated and saved
    save_dtype = torch.float32 if args.upcast_before_saving else weight_dtype
    best = BestStep(
        unwrapped_transformer,
        params.values(),
        keeps_weights=args.load_best_model_at_end,
        patience=args.early_stopping_patience,
        result_weights=result_weights,
    )

    def header(step=None):
        return lora_header(
            args,
            architecture=backbone.architecture,
            resolution=(args.resolution, args.resolution),
            step=step or global_step,
            steps_per_epoch=steps_per_epoch,
        )

    if not train_all:
        register_lora_checkpointing(
            accelerator,
            {"transformer": unwrapped_transformer},
            optimizer,
            dtype=save_dtype,
            header=lambda adapter_name: header(),
            result_weights=result_weights,
            teacher=averages,
        )
    elif args.fsdp:
        register_sharded_checkpointing(accelerator, unwrapped_transformer, optimizer, averages)
    else:
        register_tensor_checkpointing(accelerator, {"model": params, "teacher": averages})

    def save_full_model(folder, weights=result_weights):
        with weights():
            model_class = backbone.transformer_class
            save_model(accelerator, Path(folder) / "transformer", unwrapped_transformer, model_class, save_dtype)

    if train_all:  # a checkpoint holds what would be the result, too
        accelerator.register_save_state_pre_hook(lambda models, weights, folder: save_full_model(folder))
    if held_out_examples:
        best.register_checkpointing(accelerator)
    global_step = load_checkpoint(accelerator, checkpoint, lr_scheduler)
    teacher.restore_decay(global_step)

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
            collate_fn=collate,
            num_workers=args.dataloader_num_workers,
            pin_memory=device.type == "cuda",
            worker_init_fn=outlive_signals,
        )

    # 7. Train
    run_info = describe_run(args, dataset, held_out, num_parts=stream.num_parts if stream else 0)
    run_info |= describe_held_out(held_out_examples, examples, validation_loss_steps)
    print_header(accelerator, args, run_info, params.values(), base_size, max_train_steps, steps_per_epoch)
    result = args.output_dir / "transformer" if train_all else lora_file(args.output_dir, args.output_name)
    keep_earlier_results(
        accelerator, args.output_dir, [result], first_step=global_step, max_train_steps=max_train_steps
    )
    start_logging(accelerator, args, "twinflow", global_step)
    metrics = None
    if accelerator.is_main_process:
        metrics = Metrics(args.output_dir / "metrics.jsonl", global_step)
    predict = functools.partial(
        predict_velocity,
        transformer=transformer,
        backbone=backbone,
        dtype=dtype,
        two_times=backbone.embeds_target_time(unwrapped_transformer),
        autocast=accelerator.autocast,
    )
    draw_validation = functools.partial(
        log_validation,
        accelerator,
        predict,
        unwrapped_transformer,
        backbone,
        vae,
        cache,
        val_prompts,
        validation_reference,
        args,
        teacher=result_weights,
    )
    validate = functools.partial(
        held_out_losses,
        accelerator,
        functools.partial(predict, transformer=unwrapped_transformer),
        unwrapped_transformer,
        teacher,
        backbone,
        vae,
        held_out,
        args,
    )
    if val_prompts and global_step == 0:
        draw_validation(step=0)
    transformer.train()
    progress_bar = tqdm(
        total=max_train_steps,
        initial=global_step,
        desc="Training",
        unit="step",
        disable=not accelerator.is_main_process,
    )
    interruption.start_saving()
    sums = {}  # of the loss and its parts, since the last update
    step_reads = StepReads(device)
    taken_steps = []  # of each step: whether loss and gradient were finite, so that it changed weights
    skipped = SkippedSamples(args.output_dir, global_step, is_first=writes_files(accelerator))
    accelerator.wait_for_everyone()
    started = time.perf_counter()
    # No loop over epochs: a run can resume at any micro-step. All that a micro-step draws at random (batch, crops,
    # times, noise, dropout) depends on the seed and its number alone; the order of these draws is what exact resume
    # relies on.
    for micro_step, batch in enumerate(read_batches(train_dataloader, accelerator, save), start=sampler.start):
        with accelerator.accumulate(transformer):
            step, accumulated = divmod(micro_step, accumulation)
            # a run that goes on with more or fewer processes draws what those it began with would
            drawn_as = place_in_run(accumulated, accelerator.process_index, accelerator.num_processes, begun_with)
            begun_micro_step, _ = place_in_run(
                micro_step, accelerator.process_index, accelerator.num_processes, begun_with
            )
            generator = step_generator(args.seed, step, *drawn_as)
            torch.manual_seed(generator.initial_seed())  # dropout uses the global generator
            dropout_seed = generator.initial_seed() if args.lora_dropout else None  # one mask for all forward passes
            if args.streaming:
                places = batch["stream"]  # for a checkpoint: where to read on
                for text in skipped.add(step + 1, batch["left_out"]):
                    progress_bar.write(f"  skipped: {text}")
                batch = encode_streamed(batch, backbone, prompt_encoder, args, device)
            latents, cond, uncond = prepare_batch(
                batch,
                backbone,
                vae,
                args,
                device,
                offload_vae,
                micro_step=begun_micro_step,
            )
            loss, logged_losses = compute_loss(
                functools.partial(predict, seed=dropout_seed),
                teacher,
                latents,
                cond,
                uncond,
                args=args,
                generator=generator,
                replays_dropout=bool(args.lora_dropout),
                instances=batch["is_instance"] if instances else None,
            )
            accelerator.backward(loss)
            for name, value in {"loss": loss.detach(), **logged_losses}.items():
                sums[name] = sums.get(name, 0.0) + value / accumulation
            if not accelerator.sync_gradients:
                continue

            grad_norm = accelerator.clip_grad_norm_(params.values(), args.max_grad_norm or math.inf)
            grad_norm = to_device(full_tensor(grad_norm), device)  # without a gradient it is a 0 on the CPU
            # one message between the processes carries the losses and whether any of them got a signal
            stop_flag = torch.full((), float(interruption.is_requested()), device=device)
            reduced = accelerator.reduce(torch.stack([*sums.values(), stop_flag]), reduction="mean")
            *mean_losses, mean_stop = reduced
            means = dict(zip(sums, mean_losses, strict=True))
            is_finite = means["loss"].isfinite()
            if accelerator.scaler is None:  # a gradient scaler (fp16) skips infinite gradients itself
                is_finite = is_finite & grad_norm.isfinite()
            step_if_finite(accelerator, optimizer, is_finite)
            teacher.update_ema(is_finite)
            optimizer.zero_grad()

        global_step += 1
        done = global_step == max_train_steps
        numbers = {
            **means,
            "grad_norm": grad_norm,
            "stop_requested": mean_stop,
            "taken": is_finite & (not accelerator.optimizer_step_was_skipped),
        }
        step_reads.put(global_step, numbers, step_logs(optimizer, total_batch_size, started, device))
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
        if saves:
            save()
        if draws and not (done or stop_requested):
            draw_validation(step=global_step)
            stop_requested = stop_agreed(accelerator)
        if stop_requested and not done:
            checkpoint = save()
            transformer = predict = draw_validation = validate = None  # see the end of `train`
            stop_interrupted(accelerator, global_step, checkpoint)
        sums = {}
        started = time.perf_counter()
        if best.is_over:
            break
    progress_bar.close()
    skipped_summary = skipped.summary()
    if skipped_summary:
        accelerator.print(skipped_summary)

    # 8. Save and final validation, with the weights of the best step if --load_best_model_at_end keeps them
    lora = lora_file(args.output_dir, args.output_name)
    if train_all:
        save_full_model(args.output_dir, best.weights)
    else:
        with best.weights():
            adapted_models = {"transformer": unwrapped_transformer}
            header_of_step = header(best.result_step)
            save_lora(
                lora.parent,
                adapted_models,
                save_dtype,
                weight_name=lora.name,
                header=header_of_step,
                writes=writes_files(accelerator),
            )
    if accelerator.is_main_process:
        metrics.close()
        plot_metrics(args.output_dir)
    images = []
    if val_prompts:
        images = draw_validation(step=global_step, teacher=best.weights, weights_of=best.result_step)
    if stop_agreed(accelerator):
        checkpoint = save()
        transformer = predict = draw_validation = validate = None
        stop_interrupted(accelerator, global_step, checkpoint)
    interruption.stop_saving()
    if images and not train_all:
        add_thumbnail(accelerator, [lora], images[-1])
    example_prompt = val_prompts[0].prompt if val_prompts else (instances or examples)[0].captions[0]
    command = generate_command(args, example_prompt)
    if accelerator.is_main_process:
        save_model_card(args, command, held_out=best.summary())
    if writes_files(accelerator) and args.model_type != "flux3":  # whose own pipeline tells both times
        two_times = backbone.embeds_target_time(unwrapped_transformer)
        save_scheduler(args.output_dir / "scheduler", two_times)
    # DistributedDataParallel must be freed before the process group: gloo can hang otherwise
    transformer = predict = draw_validation = validate = None
    accelerator.free_memory()
    accelerator.end_training()
    results = {
        "result": "transformer" if train_all else lora.absolute(),
        "usage": "README.md",
        "loss": "loss.png",
        "images": "validation",
    }
    files_beside = [lora] if args.output_name else []
    check_taken(taken_steps, args.output_dir, has_scaler=accelerator.scaler is not None)
    if held_out_examples:
        accelerator.print(best.summary())
    finish(accelerator, args, global_step, results, command, hub_repo, ["encoded/**"], files_beside)


if __name__ == "__main__":
    main(parse_args())
