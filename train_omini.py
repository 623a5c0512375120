"""Teaches FLUX.1 to follow image conditions: OminiControl (arXiv 2411.15098) and OminiControl2 (arXiv 2503.08280).

Conditions join the transformer's sequence as clean tokens beside text and noisy image, through the same frozen
weights; a low-rank adapter acts on the condition tokens alone and is trained:

    x_t = (1 - t) x_0 + t ε        loss = || transformer([prompt; x_t at t; conditions at 0], t) - (ε - x_0) ||²

One GPU, or all of them after `accelerate config`:

    accelerate launch train_omini.py \\
      --pretrained_model_name_or_path=black-forest-labs/FLUX.1-dev \\
      --instance_data_dir=photos --condition_type canny --target_size=512 \\
      --mixed_precision=bf16 --gradient_checkpointing --train_batch_size=1 --gradient_accumulation_steps=8 \\
      --max_train_steps=10000 --validation_prompt="a cat on a sofa" --validation_image=cat.png --output_dir=canny

`output_dir` then holds `canny.safetensors`, whose header tells `examples/omini/generate.py` what it was trained for, a
model card, the arguments (args.json), the loss (metrics.jsonl, loss.png), pictures (validation/) and checkpoints.
"""

import argparse
import functools
import hashlib
import importlib.metadata
import io
import json
import math
import re
import shlex
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

from common.arguments import LR_SCHEDULERS, TRACKERS, Parser, Switch, fail, number
from common.checkpoints import (
    atomic_write,
    catch_signals,
    check_disk,
    check_output_dir,
    check_run,
    checkpoint_to_resume,
    count_skipped,
    load_checkpoint,
    run_settings,
    save_checkpoint,
    stop_interrupted,
)
from common.data import (
    IMAGE_SUFFIXES,
    INTERPOLATION,
    Example,
    StepSampler,
    StreamedBatches,
    check_pictures,
    fit,
    open_dataset,
    picture_files,
    read_batches,
    read_row,
    read_text_file,
)
from common.flow_matching import (
    TIMESTEP_SAMPLING,
    WEIGHTING_SCHEMES,
    add_noise,
    sample_sigmas,
    step_generator,
    weighted_mse,
)
from common.latents import (
    PATCH,
    cache_moments,
    decode_latents,
    encode_moments,
    image_ids,
    mean_latents,
    pack_latents,
    sample_latents,
    to_tensor,
    unpack_latents,
)
from common.lora import (
    add_lora,
    load_lora,
    reduce_gradients,
    register_lora_checkpointing,
    save_lora,
    target_layers,
    unknown_layers,
)
from common.models import (
    QUANTIZATIONS,
    check_shared_flags,
    create_lr_scheduler,
    create_optimizer,
    first_device,
    load_model,
    load_scheduler,
    prepare_blocks,
    quantize_base,
    start,
)
from common.text_encoders import PromptEncoder, load_text_pipeline
from common.tracking import (
    check_hub,
    create_hub_repo,
    finish,
    log_step,
    open_metrics,
    plot_metrics,
    print_header,
    start_logging,
    step_logs,
    write_model_card,
)
from common.validation import generate_images, sampling_pipeline, save_images, undisturbed

import cv2
import numpy as np
import psutil
import torch
import torch.nn.functional as F
from accelerate.utils import set_seed
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel
from diffusers.models.embeddings import apply_rotary_emb
from diffusers.models.modeling_outputs import Transformer2DModelOutput
from diffusers.models.transformers.transformer_flux import FluxSingleTransformerBlock, FluxTransformerBlock
from diffusers.pipelines.flux.pipeline_flux import FluxPipelineOutput
from diffusers.training_utils import compute_loss_weighting_for_sd3, offload_models
from PIL import Image, ImageFilter, ImageOps
from safetensors import safe_open
from torch.utils.data import DataLoader, Dataset
from tqdm.auto import tqdm
from transformers import MODEL_FOR_DEPTH_ESTIMATION_MAPPING, AutoConfig, T5Config


CONDITION_TYPES = (
    *("canny", "coloring", "deblurring", "depth", "depth_pred", "fill", "sr"),
    *("subject", "token_integration", "custom"),
)
RANDOM_CONDITIONS = ("deblurring", "fill", "token_integration")  # conditions drawn anew each time a picture is seen
TARGET_MODULES = (  # all that image tokens pass: 14.5 million parameters at rank 4 on FLUX.1-dev
    r"x_embedder|transformer_blocks\.\d+\.(norm1\.linear|attn\.to_[qkv]|attn\.to_out\.0|ff\.net\.2)"
    r"|single_transformer_blocks\.\d+\.(norm\.linear|proj_mlp|proj_out|attn\.to_[qkv])"
)
MAX_CHECKED = 2000  # pictures opened before training; of more, every n-th


# ---------------------------------------------------------------------------------------------------------------------
# Arguments
# ---------------------------------------------------------------------------------------------------------------------


def picture_size(text):
    """An argparse type: "512" or "512,768" as (height, width) in pixels, multiples of a token's 16."""
    parts = [int(part) for part in text.split(",")]
    if len(parts) > 2 or any(part % PATCH or not PATCH <= part <= 8192 for part in parts):
        raise argparse.ArgumentTypeError(
            f"{text}: expected SIDE or HEIGHT,WIDTH, multiples of {PATCH} from 16 to 8192"
        )
    return (parts[0], parts[-1])


def offset(text):
    """An argparse type: "dy,dx" as a pair of numbers."""
    parts = text.split(",")
    if len(parts) != 2:
        raise argparse.ArgumentTypeError(f"{text}: expected a pair DOWN,RIGHT in tokens of 16 pixels, such as 0,-32")
    return (float(parts[0]), float(parts[1]))


def parse_args(argv=None):
    parser = Parser(__doc__)
    count = number(int, 1)
    positive, not_negative = number(float, 0, above=True), number(float, 0)
    share, decay = number(float, 0, 1), number(float, 0, 0.9999999)

    arg = parser.add_argument_group("model", "what is trained, in which precision").add_argument
    arg(
        "--pretrained_model_name_or_path", required=True, metavar="MODEL", help="folder or hub id of a FLUX.1 pipeline"
    )
    arg("--revision", help="revision of the model on the hub")
    arg("--variant", help="variant of the model's files, such as fp16")
    arg("--cache_dir", help="where downloaded models and datasets are kept")
    arg("--max_sequence_length", type=number(int, 1, 512), default=512, help="T5 tokens per prompt, schnell: to 256")
    arg("--mixed_precision", choices=("no", "fp16", "bf16"), help="of frozen models; bf16 halves them on recent GPUs")
    arg("--allow_tf32", action="store_true", help="faster, less exact float32 products on Ampere and later GPUs")
    arg("--gradient_checkpointing", action="store_true", help="to fit memory: about half, a third more time per step")
    arg("--quantize_base", choices=QUANTIZATIONS, default="none", help="frozen blocks in 4 or 8 bits, to fit memory")
    arg("--compile", action="store_true", help="compile the blocks: minutes at first, then faster steps")
    arg("--offload", action="store_true", help="what is frozen waits in main memory: text encoders by layers, the VAE")
    arg("--fsdp", action="store_true", help="split weights and optimizer over the processes (FSDP2)")

    arg = parser.add_argument_group("data", "a folder of pictures, a dataset, or tars").add_argument
    arg("--instance_data_dir", type=Path, help="folder of pictures; captions in .txt files, metadata.jsonl or none")
    arg("--dataset_name", help="dataset on the hub, or a folder or file that `datasets` loads")
    arg("--dataset_config_name", help="configuration of that dataset")
    arg("--data_files", nargs="+", metavar="TAR", help="webdataset tars or patterns: jpg pictures, json with a prompt")
    arg(
        "--dataset_class",
        metavar="FILE.py:CLASS",
        help="your own dataset of image, description, condition_0 and so on",
    )
    arg("--streaming", action="store_true", help="read dataset_name or data_files while training; needs no disk")
    arg("--shuffle_buffer", type=count, default=1000, help="samples among which streaming draws the next one")
    arg("--image_column", default="image", help="column of the dataset that holds the pictures")
    arg("--caption_column", help="column of the dataset or of metadata.jsonl that holds captions")
    arg("--condition_column", nargs="+", help="column of the pictures of each custom condition; in metadata.jsonl too")
    arg("--mask_column", help="column of the holes (white) of fill and token_integration (default: random rectangles)")
    arg("--instance_prompt", help="prompt of every picture without a caption: a photo of sks dog")
    arg("--image_interpolation_mode", choices=INTERPOLATION, default="lanczos", help="how pictures are resized")
    arg("--train_batch_size", type=count, default=4, help="pictures per device and forward pass")
    arg("--dataloader_num_workers", type=number(int, 0), default=0, help="processes that read pictures; 0: none extra")
    arg("--cache_latents", action="store_true", help="encode pictures once, before training: saves time and memory")
    arg("--cache_prompts", action=Switch, default=True, help="embed every prompt once, before training")

    arg = parser.add_argument_group("conditions", "what the image is to follow").add_argument
    arg(
        "--condition_type", nargs="+", required=True, choices=CONDITION_TYPES, help="one condition, or several at once"
    )
    arg("--target_size", type=picture_size, default="512", metavar="SIZE", help="SIDE or HEIGHT,WIDTH of the image")
    arg(
        "--condition_size",
        nargs="+",
        type=picture_size,
        metavar="SIZE",
        help="of all conditions or of each (default: target_size, half of it for sr)",
    )
    arg(
        "--position_delta",
        nargs="+",
        type=offset,
        metavar="DOWN,RIGHT",
        help="where all conditions or each are, in tokens of 16 px (default: on the image; subject, sr: left of it)",
    )
    arg(
        "--position_scale",
        nargs="+",
        type=positive,
        metavar="SCALE",
        help="image tokens per condition token and direction (default: target_size / condition_size on the image, 1)",
    )
    arg("--independent_condition", action="store_true", help="conditions see only themselves: allows the kv_cache")
    arg("--adapter_per_condition", action="store_true", help="a LoRA for each condition instead of one for all")
    arg("--drop_text_prob", type=share, default=0.1, help="share of the samples without caption")
    arg("--drop_image_prob", type=share, default=0.1, help="share of the samples with black conditions")
    arg("--image_size", type=count, default=512, help="side of each picture of a subject pair side by side")
    arg("--padding", type=number(int, 0), default=8, help="pixels around and between the pictures of a subject pair")
    arg("--depth_model", default="LiheYoung/depth-anything-small-hf", help="depth estimator of transformers")
    arg("--depth_batch_size", type=count, default=8, help="pictures per pass of the depth estimator")

    arg = parser.add_argument_group("lora", "the adapter").add_argument
    arg("--rank", type=count, default=4, help="size of the adapter and what it can hold; 16 to 64 for detail")
    arg("--lora_alpha", type=positive, help="the adapter counts lora_alpha / rank (default: rank)")
    arg("--lora_dropout", type=number(float, 0, 0.99), default=0.0, help="share of its inputs dropped, 0 to 1")
    arg("--target_modules", metavar="REGEX", help="its layers (default: all that condition tokens pass)")
    arg("--lora_path", nargs="+", type=Path, metavar="FILE", help="adapters of an earlier run to go on from")

    arg = parser.add_argument_group("noise", "which noise levels are trained, and how much each counts").add_argument
    arg("--guidance_scale", type=not_negative, default=1.0, help="guidance that a guidance-distilled model is told")
    arg(
        "--timestep_sampling",
        choices=TIMESTEP_SAMPLING,
        default="sigmoid",
        help="sigma draws as weighting_scheme says",
    )
    arg("--weighting_scheme", choices=WEIGHTING_SCHEMES, default="none", help="density of noise levels or loss weight")
    arg("--logit_mean", type=number(float, -100, 100), default=0.0, help="mean of logit_normal; below 0: more noise")
    arg("--logit_std", type=positive, default=1.0, help="standard deviation of logit_normal")
    arg("--mode_scale", type=number(float, -1, 1.75), default=1.29, help="scale of mode; 0: all levels equally")
    arg("--sigmoid_scale", type=positive, default=1.0, help="spread of sigmoid, shift and flux_shift")
    arg("--discrete_flow_shift", type=positive, default=3.0, help="s of shift; above 1: more noise")

    arg = parser.add_argument_group("optimizer", "how the adapter is updated").add_argument
    arg(
        "--optimizer",
        type=str.lower,
        choices=("adamw", "prodigy", "sgd"),
        default="prodigy",
        help="prodigy wants rate 1",
    )
    arg("--learning_rate", type=positive, default=1.0, help="step size; 1 for prodigy, about 1e-4 for adamw")
    arg("--scale_lr", action="store_true", help="multiply it by batch size, accumulation and number of devices")
    arg("--lr_scheduler", choices=LR_SCHEDULERS, default="constant", help="course of the learning rate over the steps")
    arg("--lr_warmup_steps", type=number(int, 0), default=500, help="steps until it is reached; none for constant")
    arg("--lr_num_cycles", type=count, default=1, help="cycles of cosine_with_restarts")
    arg("--lr_power", type=positive, default=1.0, help="power of polynomial; 1: a straight line")
    arg("--use_8bit_adam", action="store_true", help="AdamW with 8-bit states (bitsandbytes), to fit memory")
    arg("--adam_beta1", type=decay, default=0.9, help="decay of the gradient's mean, in Prodigy too")
    arg("--adam_beta2", type=decay, default=0.999, help="decay of the gradient's square, in Prodigy too")
    arg("--adam_weight_decay", type=not_negative, default=0.01, help="weight decay, in Prodigy too")
    arg("--adam_epsilon", type=positive, default=1e-8, help="added to the denominator, in Prodigy too")
    arg("--prodigy_beta3", type=decay, help="decay of Prodigy's estimate (default: square root of adam_beta2)")
    arg("--prodigy_decouple", action=Switch, default=True, help="weight decay as in AdamW")
    arg("--prodigy_use_bias_correction", action=Switch, default=True, help="Adam's bias correction")
    arg("--prodigy_safeguard_warmup", action=Switch, default=True, help="keep warm-up out of Prodigy's estimate")
    arg("--max_grad_norm", type=positive, default=0.5, help="longer gradients are scaled down to this norm")
    arg("--gradient_accumulation_steps", type=count, default=1, help="batches per step; in no more memory than one")

    arg = parser.add_argument_group("schedule and checkpoints", "how long, and what can be resumed").add_argument
    arg("--seed", type=number(int, 0), default=0, help="of data order, crops, noise, adapter and validation")
    arg("--num_train_epochs", type=count, default=1, help="passes over the data")
    arg("--max_train_steps", type=count, help="updates of what is trained, instead of epochs")
    arg("--checkpointing_steps", type=count, default=500, help="steps between checkpoints to resume from")
    arg("--checkpoints_total_limit", type=count, help="checkpoints to keep, the newest (default: all)")
    arg("--resume_from_checkpoint", metavar="CHECKPOINT", help="a checkpoint-N folder, or latest (if there is one)")
    arg("--local_rank", type=int, default=-1, help="set by old launchers; LOCAL_RANK in the environment wins")

    arg = parser.add_argument_group("validation", "pictures while training, which they never change").add_argument
    arg("--validation_prompt", help="prompt to draw, first before training and last after it")
    arg(
        "--validation_image",
        nargs="+",
        type=Path,
        metavar="IMAGE",
        help="picture to make conditions of, or one for each",
    )
    arg("--num_validation_images", type=count, default=4, help="pictures each time")
    arg("--validation_epochs", type=count, default=50, help="epochs between validations")
    arg("--validation_steps", type=count, help="steps between validations, instead of epochs")
    arg("--final_validation_prompt", help="prompt to draw after training (default: validation_prompt)")
    arg("--skip_final_inference", action="store_true", help="draw nothing after training")

    arg = parser.add_argument_group("output and logging", "where everything goes").add_argument
    arg("--output_dir", type=Path, default=Path("flux-omini"), help="folder of all results")
    arg("--logging_dir", type=Path, default=Path("logs"), help="folder of the trackers' files in output_dir")
    arg("--report_to", choices=TRACKERS, default="tensorboard", help="where curves and pictures are sent")
    arg("--upcast_before_saving", action="store_true", help="save the adapter in float32, not in mixed_precision")
    arg("--verbose", action="store_true", help="show what the libraries remark and their progress bars")
    arg("--push_to_hub", action="store_true", help="upload the results, without checkpoints and logs")
    arg("--hub_token", help="token for it (default: that of `hf auth login`); it is written nowhere")
    arg("--hub_model_id", help="repository for it (default: the name of output_dir)")

    args = parser.parse_args(argv)
    parser.refuse(check_flags(args) + check_conditions(args) + check_model(args) + check_output_dir(args))
    return args


def check_flags(args):
    """Contradictions between flags, and flags without effect."""
    problems = []
    sources = ("instance_data_dir", "dataset_name", "data_files", "dataset_class")
    if sum(getattr(args, name) is not None for name in sources) != 1:
        problems.append(f"exactly one of {', '.join(f'--{name}' for name in sources)} is needed")
    if args.streaming and not (args.dataset_name or args.data_files):
        problems.append("--streaming needs --dataset_name or --data_files")
    if args.streaming and not args.max_train_steps:
        problems.append("--streaming needs --max_train_steps: the length of a stream is not known")
    if args.streaming and args.dataloader_num_workers:
        problems.append(f"--dataloader_num_workers {args.dataloader_num_workers} has no effect with --streaming")
    if args.streaming and args.cache_latents:
        problems.append("--cache_latents needs all pictures before training: leave out --streaming")
    if args.optimizer == "adamw" and args.learning_rate > 0.1:
        problems.append(f"--learning_rate {args.learning_rate:g} is Prodigy's: AdamW wants about 1e-4")
    if args.streaming and args.validation_prompt and not args.validation_steps:
        problems.append("--validation_prompt needs --validation_steps with --streaming")
    prompted = args.validation_prompt or args.final_validation_prompt
    if bool(prompted) != bool(args.validation_image):
        problems.append("--validation_prompt and --validation_image need each other")
    return problems + check_shared_flags(args) + check_hub(args)


def check_conditions(args):
    """Problems of the flags that say what the conditions are, and of the files among them."""
    types, problems = args.condition_type, []
    for name in ("condition_size", "position_delta", "position_scale"):
        given = getattr(args, name)
        if given and len(given) not in (1, len(types)):
            problems.append(
                f"--{name} has {len(given)} values for the {len(types)} of --condition_type: give 1 or each"
            )
    if args.dataset_class and (args.position_delta or args.position_scale):
        problems.append(
            "--position_delta and --position_scale have no effect with --dataset_class: its items say where"
        )
    if args.dataset_class and set(types) != {"custom"}:
        problems.append("--dataset_class brings its own conditions: --condition_type custom, once for each")
    columns, custom = len(args.condition_column or ()), types.count("custom")
    if not args.dataset_class and columns not in (custom, custom + types.count("subject")):
        problems.append(f"--condition_column names {columns} columns for {custom} custom conditions")
    if types.count("subject") > 1 and columns == custom:
        problems.append("--condition_type subject goes once: a pair has one other side; or give --condition_column")
    if args.dataset_class and columns:
        problems.append("--condition_column has no effect with --dataset_class: its items carry condition_0, ...")
    if args.mask_column and not {"fill", "token_integration"} & set(types):
        problems.append(f"--mask_column {args.mask_column} needs --condition_type fill or token_integration")
    if args.mask_column and args.dataset_class:
        problems.append(f"--mask_column {args.mask_column} has no effect with --dataset_class")
    if "depth_pred" in types and len(types) > 1:
        problems.append("--condition_type depth_pred draws depth maps: it goes with no other condition")
    if {"depth", "depth_pred"} & set(types) and args.streaming:
        problems.append("--condition_type depth and depth_pred estimate depth before training: leave out --streaming")
    if types.count("token_integration") > 1:
        problems.append("--condition_type token_integration goes once: an image has one outside")
    if {"fill", "token_integration"} & set(types) and min(args.target_size) < 2 * PATCH:
        problems.append(f"--target_size {min(args.target_size)} leaves no room for a hole: at least {2 * PATCH}")
    paths = len(args.validation_image or ())
    if paths not in (0, 1, len(types)):
        problems.append(f"--validation_image names {paths} pictures for {len(types)} conditions: give 1 or each")
    problems += [
        f"--validation_image {path}: no such file" for path in args.validation_image or () if not path.is_file()
    ]
    if problems:
        return problems
    for condition in condition_specs(args):
        height, width = (round(side * condition.position_scale, 6) for side in condition.size)
        aligned = condition.position_delta == (0, 0) and condition.type not in ("subject", "custom")
        if condition.type == "token_integration" and (
            condition.size != args.target_size or not aligned or height != condition.size[0]
        ):
            problems.append(
                "--condition_type token_integration shares the image's tokens: no size or place of its own"
            )
        elif aligned and not args.position_scale and (height, width) != args.target_size:
            size, target = ("x".join(map(str, each)) for each in (condition.size, args.target_size))
            problems.append(
                f"--condition_size {size} of {condition.type} is no scaled --target_size {target}: "
                "give --position_scale"
            )
    return problems + check_depth_model(args)


def check_lora_path(args, layers):
    """Problems of --lora_path, whose files must hold adapters of the (name, module) in `layers`."""
    adapters, problems = adapter_names(condition_specs(args)), []
    if args.lora_path and len(args.lora_path) != len(adapters):
        return [f"--lora_path names {len(args.lora_path)} files for {len(adapters)} adapters: {', '.join(adapters)}"]
    wanted = {f"transformer.{name}.lora_A.weight": [args.rank, layer.in_features] for name, layer in layers}
    wanted |= {f"transformer.{name}.lora_B.weight": [layer.out_features, args.rank] for name, layer in layers}
    for path in args.lora_path or ():
        try:
            with safe_open(path, "pt") as file:
                slices = {key: file.get_slice(key) for key in file.keys()}  # noqa: SIM118
                found = {key: piece.get_shape() for key, piece in slices.items()}
                dtypes = {piece.get_dtype() for piece in slices.values()}
        except Exception as error:  # safetensors raises a kind of its own beside OSError
            problems.append(f"--lora_path {path}: not a readable LoRA file ({error})")
            continue
        ranks = {shape[0] for key, shape in found.items() if ".lora_A." in key and shape}
        if ranks != {args.rank}:
            problems.append(f"--lora_path {path} has rank {', '.join(map(str, sorted(ranks)))}: --rank is {args.rank}")
        elif found != wanted:
            odd = sorted(key for key in {*found, *wanted} if found.get(key) != wanted.get(key))
            problems.append(f"--lora_path {path}: made for other layers than --target_modules, such as {odd[0]}")
        elif not dtypes <= {"F64", "F32", "F16", "BF16"}:
            problems.append(f"--lora_path {path}: its numbers are {', '.join(sorted(dtypes))}, not F32, F16 or BF16")
    return problems


def check_model(args):
    """Problems of --pretrained_model_name_or_path, --target_modules and the disk, from the configs alone."""
    flag = f"--pretrained_model_name_or_path {args.pretrained_model_name_or_path}"
    try:
        config = FluxTransformer2DModel.load_config(
            args.pretrained_model_name_or_path,
            subfolder="transformer",
            revision=args.revision,
            cache_dir=args.cache_dir,
        )
    except (OSError, ValueError) as error:
        reason = str(error).splitlines()[0]
        return [
            f"{flag}: neither a folder with a FLUX pipeline nor a hub id like black-forest-labs/FLUX.1-dev ({reason})"
        ]
    if config.get("_class_name") != "FluxTransformer2DModel" or config.get("in_channels") != 64:
        found = f"{config.get('_class_name')} with {config.get('in_channels')} input channels"
        return [f"{flag}: holds a {found}, not FLUX.1-dev or -schnell"]
    if not config["guidance_embeds"] and args.max_sequence_length > 256:
        return [f"--max_sequence_length {args.max_sequence_length}: FLUX.1-schnell takes at most 256"]
    with torch.device("meta"):
        transformer = FluxTransformer2DModel.from_config(config)
    targets = args.target_modules or TARGET_MODULES
    try:
        unknown = unknown_layers(transformer, targets)
    except re.error as error:
        return [f"--target_modules {targets}: not a regular expression ({error})"]
    if unknown:
        return [f"--target_modules {targets}: matches no linear layer of the transformer"]
    layers = target_layers(transformer, targets)
    text_side = [
        name for name, _ in layers if re.search(r"context|attn\.(add_|to_add)|time_text_embed|^(norm|proj)_out", name)
    ]
    if text_side:
        return [f"--target_modules {targets}: condition tokens do not pass {text_side[0]}; leave it out"]
    needed = 16 * args.rank * sum(sum(layer.weight.shape) for _, layer in layers)
    return check_disk(args, needed) or check_lora_path(args, layers)


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
    ids = image_ids(height, width, device)
    delta = torch.tensor(position_delta, device=device)
    ids[:, 1:] = position_scale * ids[:, 1:] + (position_scale - 1) / 2 + delta
    return ids


def pack_conditions(
    condition_latents: list[torch.Tensor], specs: Sequence[ConditionSpec], latent_mask: torch.Tensor | None = None
) -> list[ConditionTokens]:
    """The tokens of each condition, from its normalised latents [B, C, h, w].

    For token_integration, only what lies outside of `latent_mask` [B, h/2 * w/2] becomes tokens
    (arXiv 2503.08280, section 3.3).
    """
    conditions = []
    for latents, spec in zip(condition_latents, specs, strict=True):
        height, width = latents.shape[-2:]
        tokens = pack_latents(latents)
        ids = condition_ids(height, width, spec.position_delta, spec.position_scale, latents.device)
        attention_mask = None
        if spec.type == "token_integration":
            tokens, ids, attention_mask = select_tokens(tokens, ids, ~latent_mask)
        conditions.append(ConditionTokens(tokens, ids, spec.adapter, attention_mask))
    return conditions


def select_tokens(
    tokens: torch.Tensor, ids: torch.Tensor, keep: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """The tokens [B, N, C] where keep [B, N] is true, in order, and their ids [N, 3]: [B, M, C] and [B, M, 3].

    M is the largest count in the batch. Samples with fewer are padded: `attention_mask` [B, M], the third result, is
    False there. It is None if nothing is padded.
    """
    counts = keep.sum(dim=1)
    length = int(counts.max())
    order = torch.argsort(~keep, dim=1, stable=True)[:, :length]
    selected = tokens.gather(1, order[..., None].expand(-1, -1, tokens.shape[-1]))
    attention_mask = torch.arange(length, device=keep.device) < counts[:, None]
    return selected, ids[order], None if attention_mask.all() else attention_mask


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
    row of the group mask go into one call of scaled_dot_product_attention, with exactly the keys they attend to: there
    is no dense mask, and no product that a mask would throw away.
    """
    groups: dict[tuple[bool, ...], list[int]] = {}
    for i, branch in enumerate(branches):
        if projections[i].query is not None:
            groups.setdefault(branch.group_mask, []).append(i)
    attn_outputs: list[torch.Tensor | None] = [None] * len(branches)
    for row, members in groups.items():
        attended = [each for each, allowed in zip(projections, row, strict=True) if allowed]
        queries = [projections[i].query for i in members]
        query = torch.cat(queries, dim=1)
        key = torch.cat([each.key for each in attended], dim=1)
        value = torch.cat([each.value for each in attended], dim=1)
        attn_output = F.scaled_dot_product_attention(
            query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2), attn_mask=padding_mask(attended)
        )
        attn_output = attn_output.transpose(1, 2).flatten(2)
        lengths = [each.shape[1] for each in queries]
        for i, part in zip(members, attn_output.split(lengths, dim=1), strict=True):
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


def lora_linear(layer: torch.nn.Module, hidden_states: torch.Tensor, adapter: str | None) -> torch.Tensor:
    """A linear layer with the LoRA named `adapter` alone; of other LoRAs on the layer, nothing is computed."""
    if not hasattr(layer, "base_layer"):
        return layer(hidden_states)
    result = layer.base_layer(hidden_states)
    if adapter is not None and adapter in layer.lora_A:
        inputs = layer.lora_dropout[adapter](hidden_states.to(layer.lora_A[adapter].weight.dtype))
        update = layer.lora_B[adapter](layer.lora_A[adapter](inputs)) * layer.scaling[adapter]
        result = result + update.to(result.dtype)
    return result


def modulate(norm: torch.nn.Module, branch: Branch, num_parts: int) -> tuple[torch.Tensor, ...]:
    """Shift, scale and gate vectors [B, 1, D] that an adaptive norm makes of a branch's own temb."""
    modulation = lora_linear(norm.linear, norm.silu(branch.temb), branch.adapter)
    return modulation[:, None].chunk(num_parts, dim=-1)


def project(
    attn: torch.nn.Module, hidden_states: torch.Tensor, branch: Branch, *, is_text=False, with_query=True
) -> Projections:
    """Query, key and value of a branch. `is_text`: with the layers that a double block has for text."""
    query = None
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
        """The next hidden states [B, N, D] of each branch, and its query, key and value.

        `cached` are keys and values of conditions that are not among the branches.
        """
        # 1. Adaptive norm, query, key and value of each branch
        projections, modulations = [], []
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
        return results, projections


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
        projections, modulated = [], []
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
        return results, projections


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
            negative_velocity = self.transformer_forward(**inputs, **{**options, **negative})
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
                rotary_emb, mask = self.rotary_embedding(condition.ids), condition.attention_mask
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
        modulation = lora_linear(self.norm_out.linear, self.norm_out.silu(temb).to(states[1].dtype), main_adapter)
        scale, shift = modulation[:, None].chunk(2, dim=-1)
        normed = self.norm_out.norm(states[1]) * (1 + scale) + shift
        velocity = lora_linear(self.proj_out, normed, main_adapter)
        if latent_mask is not None:
            selected = velocity.flatten(0, 1) if attention_mask is None else velocity[attention_mask]
            velocity = velocity.new_zeros(batch_size, num_tokens, velocity.shape[-1])
            velocity[latent_mask] = selected
        return velocity

    def run_block(self, block, index: int, states, branches: list[Branch], cache: KVCache | None, *options):
        """The next hidden states of the branches; keys and values of conditions go to the cache or come from it."""
        cached = cache.blocks[index] if cache is not None and cache.mode == "read" else []
        if torch.is_grad_enabled() and self.gradient_checkpointing:
            states, projections = self._gradient_checkpointing_func(block, states, branches, cached, *options)
        else:
            states, projections = block(states, branches, cached, *options)
        if cache is not None and cache.mode == "write":
            cache.blocks.append([replace(each, query=None) for each in projections[2:]])
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
            condition_images       of each condition: a PIL image of its size, or a list of B such images
            mask                   for token_integration: boolean [H, W] or [B, H, W], True where to generate
            image_guidance_scale   above 1, the image follows its conditions more closely, at twice the time
            independent_condition  as the adapters were trained
            main_adapter           name of a LoRA, such as a style, for text and image
            kv_cache               compute the conditions only once: exact if they are independent

        Further arguments are FluxPipeline's own. `output_type` "latent" returns normalised latents
        [B, C, height / 8, width / 8].
        """
        device = self.transformer.device
        if prompt_embeds is None:
            prompt_embeds, pooled_prompt_embeds, _ = self.encode_prompt(
                prompt, None, device=device, max_sequence_length=max_sequence_length
            )
        batch_size = len(prompt_embeds)

        # 1. Condition images to latents
        def encode(images):
            images = images if isinstance(images, list) else [images] * batch_size
            moments = encode_moments(self.vae, torch.stack([to_tensor(image.convert("RGB")) for image in images]))
            return mean_latents(moments, self.vae.config).to(device, prompt_embeds.dtype)

        latent_mask = None
        if mask is not None:
            masks = np.broadcast_to(mask, (batch_size, height, width))
            latent_mask = torch.from_numpy(np.stack([to_latent_mask(each) for each in masks])).flatten(1).to(device)
            if latent_mask.all(dim=1).any() or not latent_mask.any(dim=1).all():
                raise ValueError("a mask must contain some and leave some of the image's tokens of 16 pixels")
        condition_latents = [encode(images) for images in condition_images]
        joint_attention_kwargs = {
            "conditions": pack_conditions(condition_latents, specs, latent_mask),
            "independent_condition": independent_condition,
            "main_adapter": main_adapter,
            "latent_mask": latent_mask,
            "cache": KVCache() if kv_cache else None,
        }
        if image_guidance_scale != 1:
            black_latents = [encode(Image.new("RGB", spec.size[::-1])) for spec in specs]
            joint_attention_kwargs["image_guidance_scale"] = image_guidance_scale
            joint_attention_kwargs["negative"] = {
                "conditions": pack_conditions(black_latents, specs, latent_mask),
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

        # 3. Outside of the mask, the condition is the image
        if latent_mask is not None:
            integrated = [spec.type for spec in specs].index("token_integration")
            outside = pack_latents(condition_latents[integrated])
            latents = torch.where(latent_mask[..., None], latents, outside)
        latents = unpack_latents(latents, height // 8, width // 8)
        if output_type == "latent":
            return FluxPipelineOutput(images=latents)
        images = decode_latents(self.vae, latents.to(self.vae.device))
        return FluxPipelineOutput(images=self.image_processor.postprocess(images, output_type=output_type))


# ---------------------------------------------------------------------------------------------------------------------
# Objective
# ---------------------------------------------------------------------------------------------------------------------


def compute_loss(
    transformer: OminiTransformer2DModel,
    latents: torch.Tensor,
    condition_latents: list[torch.Tensor],
    latent_mask: torch.Tensor | None,
    prompt_embeds: torch.Tensor,
    pooled_prompt_embeds: torch.Tensor,
    *,
    args: argparse.Namespace,
    specs: list[ConditionSpec],
    noise_scheduler: FlowMatchEulerDiscreteScheduler,
    guidance: torch.Tensor | None,
    generator: torch.Generator,
) -> torch.Tensor:
    """The flow matching loss [B] of each sample of a batch (arXiv 2411.15098, section 3.1).

    latents [B, C, h, w] and those of each condition are normalised, prompt_embeds [B, T, D], pooled_prompt_embeds
    [B, P]; guidance [B], or None for a model without guidance embedding. With latent_mask [B, h/2 * w/2], for
    token_integration, only its tokens are noisy and count. Noise and noise levels come from `generator`, on the CPU.
    """
    batch_size, _, height, width = latents.shape
    device = latents.device
    noise = torch.randn(latents.shape, generator=generator).to(device)
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
    ).to(device)
    x_0 = pack_latents(latents)  # [B, N, 64]
    x_1 = pack_latents(noise)
    x_t = add_noise(x_0, x_1, t)  # (1 - t) x_0 + t x_1
    img_ids = image_ids(height, width, device)
    dtype = prompt_embeds.dtype
    conditions = pack_conditions([each.to(dtype) for each in condition_latents], specs, latent_mask)

    model_pred = transformer(
        hidden_states=x_t.to(dtype),
        timestep=t,
        guidance=guidance,
        pooled_projections=pooled_prompt_embeds,
        encoder_hidden_states=prompt_embeds,
        txt_ids=torch.zeros(prompt_embeds.shape[1], 3, device=device),
        img_ids=img_ids,
        joint_attention_kwargs={
            "conditions": conditions,
            "independent_condition": args.independent_condition,
            "latent_mask": latent_mask,
        },
        return_dict=False,
    )[0]
    target = x_1 - x_0
    token_weights = None
    if latent_mask is not None:
        model_pred, _, token_weights = select_tokens(model_pred, img_ids, latent_mask)
        target, _, _ = select_tokens(target, img_ids, latent_mask)
    weighting = compute_loss_weighting_for_sd3(args.weighting_scheme, sigmas=t)
    return weighted_mse(model_pred, target, weighting, token_weights)


# ---------------------------------------------------------------------------------------------------------------------
# Data
# ---------------------------------------------------------------------------------------------------------------------


@dataclass
class ControlExample(Example):
    """An example with the pictures of its subject or custom conditions, and its mask.

    `places` are (position_delta, position_scale) of the conditions, if the data says so.
    """

    conditions: list[Example] = field(default_factory=list)
    mask: Example | None = None
    places: tuple = ()


def source_of(args):
    """The flag that names the data, as it was given."""
    sources = ("instance_data_dir", "dataset_name", "data_files", "dataset_class")
    name, value = next((name, getattr(args, name)) for name in sources if getattr(args, name) is not None)
    return f"--{name} {' '.join(value) if isinstance(value, list) else value}"


def read_rows(args):
    """[(name, row)] and problems; a row is {column: value}, in which pictures are functions that open them."""
    if args.instance_data_dir:
        return read_folder_rows(args)
    return read_dataset_class(args) if args.dataset_class else read_dataset_rows(args)


def read_folder_rows(args):
    """Rows of --instance_data_dir: captions and more from metadata.jsonl, else captions from the .txt file beside."""
    folder, rows, problems, listed = args.instance_data_dir, [], [], {}
    if not folder.is_dir():
        return [], [f"--instance_data_dir {folder}: no such folder"]
    metadata = folder / "metadata.jsonl"
    try:
        lines = metadata.read_text("utf-8-sig").splitlines() if metadata.exists() else []
        listed = {str(row.pop("file_name")): row for row in (json.loads(line) for line in lines if line.strip())}
        json.dumps(listed, ensure_ascii=False).encode()  # half of a surrogate pair is no text
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        problems.append(f"{metadata}: each line must be JSON with file_name ({error!r})")
    others = {str(row.get(column)) for row in listed.values() for column in picture_columns(args)[1:]}
    paths, unread = picture_files(folder)
    paths = [path for path in paths if path.name not in others]
    problems += [f"{metadata}: no picture {n} in this folder" for n in sorted(listed.keys() - {p.name for p in paths})]
    problems += unread
    for path in paths:
        row, text_file = dict(listed.get(path.name, {})), path.with_suffix(".txt")
        for column in picture_columns(args)[1:]:
            if not isinstance(row.get(column), str):
                return [], [f"{metadata}: column {column} names no file for {path.name}"]
            row[column] = functools.partial(Image.open, folder / row[column])
        if path.name not in listed:
            row["text"] = read_text_file(text_file, problems)
        rows.append((str(path), {**row, "image": functools.partial(Image.open, path)}))
    return rows, problems


def read_dataset_rows(args):
    """Rows of --dataset_name or --data_files."""
    dataset, problems = open_rows(args)
    if problems:
        return [], problems
    pictures = picture_columns(args, dataset.column_names)
    texts = dataset.remove_columns([c for c, f in dataset.features.items() if type(f).__name__ == "Image"])
    texts = texts.to_list() if texts.column_names else [{}] * len(dataset)
    name = args.dataset_name or "--data_files"
    return [
        (f"{name}[{i}]", {**row, **{column: functools.partial(read_row, dataset, i, column) for column in pictures}})
        for i, row in enumerate(texts)
    ], []


def open_rows(args):
    """(dataset, problems) of --dataset_name or --data_files; with --streaming one of undecoded files."""

    def columns(names):
        return picture_columns(args, names), [name.split(".")[0] for name in [caption_column(args)] if name]

    source = "webdataset" if args.data_files else args.dataset_name
    return open_dataset(
        args, columns, flag=source_of(args), source=source, data_files=args.data_files, streaming=args.streaming
    )


def read_dataset_class(args):
    """Rows of the user's own dataset, whose items are dictionaries."""
    path, _, name = args.dataset_class.partition(":")
    try:
        spec = importlib.util.spec_from_file_location(Path(path).stem, path)
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        dataset = getattr(module, name)()
        read = functools.lru_cache(maxsize=1)(dataset.__getitem__)  # image and conditions of one and the same call
        rows, number_of = [], len(args.condition_type)
        for i in range(len(dataset)):
            item = read(i)
            found = sum(re.fullmatch(r"condition_\d+", key) is not None for key in item)
            if found != number_of:
                return [], [
                    f"--dataset_class {args.dataset_class}: item {i} has {found} conditions for {number_of} "
                    "of --condition_type"
                ]
            row = {key: functools.partial(read_item, read, i, key) for key in ("image", *condition_keys(number_of))}
            places = tuple(
                (tuple(map(float, item[f"position_delta_{n}"])), float(item.get(f"position_scale_{n}", 1.0)))
                for n in range(number_of)
            )
            rows.append((f"{args.dataset_class}[{i}]", {**row, "description": item["description"], "places": places}))
    except Exception as error:  # whatever the user's file raises
        return [], [f"--dataset_class {args.dataset_class}: cannot be read ({error!r})"]
    return rows, []


def read_item(read, i, key):
    """A picture of the user's own dataset."""
    return read(i)[key]


def condition_keys(number_of):
    return [f"condition_{i}" for i in range(number_of)]


def open_bytes(file):
    """A picture of a stream, {"bytes": ..., "path": ...}."""
    return Image.open(io.BytesIO(file["bytes"]) if file["bytes"] else file["path"])


def picture_columns(args, columns=()):
    """The columns that hold pictures: image, conditions, mask. Tars have jpg, png or webp where there is no image."""
    image = args.image_column
    if args.data_files and image not in columns:
        image = next((name for name in ("jpg", "jpeg", "png", "webp") if name in columns), image)
    if args.instance_data_dir:
        image = "image"
    return [image, *(args.condition_column or ()), *([args.mask_column] if args.mask_column else ())]


def caption_column(args):
    return args.caption_column or ("json.prompt" if args.data_files else None)


def lookup(row, column):
    """The value of "a.b" in {"a": {"b": value}} or of a column of that whole name, None if there is none."""
    if column in row:
        return row[column]
    for part in column.split("."):
        row = row.get(part) if isinstance(row, dict) else None
    return row


def caption_of(row, columns, args):
    """What the first of `columns` that there is says, else --instance_prompt."""
    texts = (lookup(row, column) for column in columns)
    return next((text for text in texts if text is not None), args.instance_prompt)


def examples_of(name, row, args):
    """The examples of a row: one, or for pairs of a subject side by side two, each picture once the condition."""
    if args.dataset_class:
        pictures = [Example(f"{name}, {key}", row[key]) for key in condition_keys(len(args.condition_type))]
        return [ControlExample(name, row["image"], row["description"], pictures, places=row["places"])]
    columns = picture_columns(args, row)
    image = row[columns[0]]
    mask = Example(f"{name}, {args.mask_column}", row[args.mask_column]) if args.mask_column else None
    pictures = [Example(f"{name}, {column}", row[column]) for column in args.condition_column or ()]
    needed = sum(kind in ("subject", "custom") for kind in args.condition_type)
    if needed == len(pictures):
        names = [caption_column(args)] if caption_column(args) else ["text", "prompt", "caption"]
        return [ControlExample(name, image, caption_of(row, names, args), pictures, mask)]
    examples, place = [], args.condition_type[: args.condition_type.index("subject")].count("custom")
    for side in (0, 1):
        names = (f"description.description_{side}", f"description_{side}", args.caption_column or "text")
        halves = [functools.partial(half_of, image, half, args.image_size, args.padding) for half in (side, 1 - side)]
        others = [*pictures[:place], Example(f"{name}, other side", halves[1]), *pictures[place:]]
        examples.append(ControlExample(f"{name}, side {side}", halves[0], caption_of(row, names, args), others, mask))
    return examples


def half_of(read, side, image_size, padding):
    """The left (0) or right (1) picture, `image_size` square, of a pair with `padding` around and between."""
    image, left = read(), padding + side * (image_size + padding)
    if image.width < left + image_size or image.height < padding + image_size:
        raise ValueError(
            f"{image.width} x {image.height} pixels hold no pair of --image_size {image_size} and --padding {padding}"
        )
    return image.crop((left, padding, left + image_size, padding + image_size))


def streamed_examples(row, name, args):
    """The examples of a row of a stream, whose pictures are files not yet decoded."""
    pictures = picture_columns(args, row)
    return examples_of(name, {**row, **{c: functools.partial(open_bytes, row[c]) for c in pictures}}, args)


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
                with atomic_write(path) as partial:
                    found["depth"].convert("L").resize(image.size).save(partial, format="PNG")
    accelerator.wait_for_everyone()


def find_examples(args):
    """The training pictures with captions and conditions, and what is wrong with them: (examples, problems)."""
    rows, problems = read_rows(args)
    examples = [example for name, row in rows for example in examples_of(name, row, args)]
    if not examples and not problems:
        problems.append(f"{source_of(args)}: no pictures ({', '.join(IMAGE_SUFFIXES)}) in it")
    problems += filter(None, map(caption_defect, examples))
    looked_at = examples[:: 1 + len(examples) // MAX_CHECKED] + validation_examples(args)
    problems += check_pictures(looked_at, functools.partial(defect, args=args))
    places = {example.places for example in examples}
    if len(places) > 1:
        problems.append(f"{source_of(args)}: position_delta and position_scale differ between its items: {places}")
    return examples, problems


def caption_defect(example):
    """What is wrong with the caption of an example, or None."""
    if example.caption is None:
        return f"{example.name}: no caption; give --instance_prompt, captions in .txt files, or --caption_column"
    if not (isinstance(example.caption, str) and example.caption.strip()):
        return f"{example.name}: its caption must be text and not empty, not {example.caption!r}"
    return None


def defect(example, args):
    """What is wrong with the pictures of an example, or None."""
    picture = example
    try:
        size = example.image().size
        for picture in example.conditions:
            picture.image()
        if example.mask:
            picture = example.mask
            if picture.read().size != size:
                across, down = picture.read().size
                return f"{picture.name}: the mask is {across} x {down} pixels, its picture {size[0]} x {size[1]}"
            mask = to_latent_mask(read_mask(picture, args))
            if mask.all() or not mask.any():
                return f"{picture.name}: the mask is all {'white' if mask.all() else 'black'}, in tokens of 16 pixels"
    except Exception as error:  # PIL's readers of formats raise of all kinds
        return f"{picture.name}: not a readable picture ({error})"


# ---- conditions ----


SIDE_BY_SIDE_CONDITIONS = ("subject", "sr")  # conditions to the left of the image, not upon it


def condition_specs(args, places=()):
    """The conditions of a run in the order of --condition_type; `places` are (delta, scale) that the data brings."""
    types, target, conditions = args.condition_type, args.target_size, []
    each = lambda values, i: None if not values else values[0] if len(values) == 1 else values[i]  # noqa: E731
    for i, kind in enumerate(types):
        size = each(args.condition_size, i) or (tuple(side // 2 for side in target) if kind == "sr" else target)
        delta = each(args.position_delta, i) or ((0, -size[1] // PATCH) if kind in SIDE_BY_SIDE_CONDITIONS else (0, 0))
        scale = each(args.position_scale, i) or (target[0] / size[0] if delta == (0, 0) else 1.0)
        delta, scale = places[i] if places else (delta, scale)
        adapter = (
            (kind if types.count(kind) == 1 else f"{kind}_{i}") if args.adapter_per_condition else "_".join(types)
        )
        conditions.append(ConditionSpec(kind, size, delta, scale, adapter))
    return conditions


def adapter_names(conditions):
    return list(dict.fromkeys(condition.adapter for condition in conditions))


def to_latent_mask(mask):
    """The tokens of which any pixel is in the mask: boolean [H, W] to [H / 16, W / 16]."""
    height, width = mask.shape
    return mask.reshape(height // PATCH, PATCH, width // PATCH, PATCH).any(axis=(1, 3))


def convert_to_condition(kind, image, *, rng=None, mask=None):
    """The condition (PIL, RGB) that `kind` makes of a picture of the condition's size.

    `rng` draws the blur of deblurring; `mask`, boolean [H, W], is what fill and token_integration black out.
    """
    if kind == "canny":
        return Image.fromarray(cv2.Canny(np.asarray(image), 100, 200)).convert("RGB")
    if kind == "coloring":
        return image.convert("L").convert("RGB")
    if kind == "deblurring":
        return image.filter(ImageFilter.GaussianBlur(int(rng.integers(1, 11))))
    if kind in ("fill", "token_integration"):
        mask = Image.fromarray(mask).resize(image.size, Image.Resampling.NEAREST)
        return Image.composite(Image.new("RGB", image.size), image, mask)
    return image


def random_mask(rng, rows, columns):
    """A random rectangle, or half of the time all around it: boolean [rows, columns], never all or none."""
    height, width = rng.integers(1, rows), rng.integers(1, columns)
    top, left = rng.integers(0, rows - height + 1), rng.integers(0, columns - width + 1)
    mask = np.zeros((rows, columns), dtype=bool)
    mask[top : top + height, left : left + width] = True
    return ~mask if rng.random() < 0.5 else mask


def read_mask(mask, args):
    """What is white in a mask, cropped as its picture is: boolean [H, W] of --target_size."""
    height, width = args.target_size
    return np.asarray(ImageOps.fit(mask.image().convert("L"), (width, height), Image.Resampling.NEAREST)) > 127


def to_pixel_mask(tokens):
    """Boolean tokens [h, w] as pixels [16 h, 16 w]."""
    return tokens.repeat(PATCH, axis=0).repeat(PATCH, axis=1)


class ControlDataset(Dataset):
    """Samples by (epoch, index): prompt, image and conditions as pixels or, if cached, as posteriors of their latents.

    What of a sample is drawn by chance (mask, blur, what is left out) comes from (seed, epoch, index) alone: neither
    workers, nor the cache, nor an interruption change it.
    """

    def __init__(self, examples, specs, args):
        self.examples, self.specs, self.args = examples, specs, args
        self.slots = ["image", *condition_keys(len(specs))]
        self.fixed = [s for s, c in zip(self.slots[1:], specs, strict=True) if c.type not in RANDOM_CONDITIONS]
        self.moments = {}  # (index, slot) or ("black", slot): [2C, h, w]

    def fixed_keys(self):
        """The keys of all pictures that are the same in each epoch."""
        keys = [(index, slot) for index in range(len(self.examples)) for slot in ("image", *self.fixed)]
        return keys + [("black", slot) for slot in self.fixed if self.args.drop_image_prob]

    def fixed_pixels(self, key):
        index, slot = key
        return to_tensor(self.black(slot) if index == "black" else self.picture(self.examples[index], slot))

    def black(self, slot):
        return Image.new("RGB", self.specs[self.slots.index(slot) - 1].size[::-1])

    def picture(self, example, slot, rng=None, mask=None):
        """The image or condition of an example as a PIL image."""
        args, number_of = self.args, self.slots.index(slot) - 1
        kind = self.specs[number_of].type if number_of >= 0 else self.specs[0].type
        size = self.specs[number_of].size if number_of >= 0 else args.target_size
        if kind == ("depth_pred" if number_of < 0 else "depth"):
            depth = Image.open(depth_file(fit(example.image(), args.target_size, args), args))
            return depth.convert("RGB").resize(size[::-1])
        if number_of < 0:
            return fit(example.image(), size, args)
        given = [c.type for c in self.specs[: number_of + 1] if c.type in ("subject", "custom")]
        source = example.conditions[len(given) - 1] if kind in ("subject", "custom") else example
        return convert_to_condition(kind, fit(source.image(), size, args), rng=rng, mask=mask)

    def mask(self, example, rng):
        """Pixels [H, W] of the image to be filled, None if no condition has a mask."""
        types, (height, width) = [condition.type for condition in self.specs], self.args.target_size
        if not {"fill", "token_integration"} & set(types):
            return None
        if example.mask:
            mask = read_mask(example.mask, self.args)
            return to_pixel_mask(to_latent_mask(mask)) if "token_integration" in types else mask
        if "token_integration" in types:
            return to_pixel_mask(random_mask(rng, height // PATCH, width // PATCH))
        return random_mask(rng, height, width)

    def checked_sample(self, example, epoch, index):
        """`sample` of an example that was not looked at before."""
        problem = caption_defect(example) or defect(example, self.args)
        if problem:
            raise ValueError(problem)
        return self.sample(example, epoch, index)

    def sample(self, example, epoch, index):
        args, rng = self.args, np.random.default_rng((self.args.seed, epoch, index))
        drop_text, drop_image = rng.random(2) < (args.drop_text_prob, args.drop_image_prob)
        mask = self.mask(example, rng)
        sample = {"prompt": "" if drop_text else example.caption, "moments": {}, "pixel_values": {}}
        for slot in self.slots:
            black = drop_image and slot != "image"
            key = ("black" if black else index, slot)
            if key in self.moments:
                sample["moments"][slot] = self.moments[key]
            else:
                sample["pixel_values"][slot] = to_tensor(
                    self.black(slot) if black else self.picture(example, slot, rng, mask)
                )
        if "token_integration" in (condition.type for condition in self.specs):
            sample["latent_mask"] = torch.from_numpy(to_latent_mask(mask)).flatten()
        return sample

    def __getitem__(self, position):
        epoch, index = position
        return self.sample(self.examples[index], epoch, index)

    def __len__(self):
        return len(self.examples)


def find_stream(args):
    """The first examples of a stream, to check, and problems."""
    stream, problems = open_rows(args)
    row = None if problems else next(iter(stream), None)
    if row is None:
        return [], problems or [f"{source_of(args)}: no samples in it"]
    examples = streamed_examples(row, "the first sample of the stream", args)
    problems = [*map(caption_defect, examples), *(defect(e, args) for e in examples + validation_examples(args))]
    return examples, [problem for problem in problems if problem]


# ---------------------------------------------------------------------------------------------------------------------
# Training
# ---------------------------------------------------------------------------------------------------------------------


def add_adapters(transformer, conditions, args):
    """A LoRA for each adapter of the conditions, as in --lora_path if given: {its name: that of its file}."""
    files = {name: f"{name}.safetensors" for name in adapter_names(conditions)}
    for name in files:
        add_lora(
            transformer,
            rank=args.rank,
            alpha=args.lora_alpha or args.rank,
            dropout=args.lora_dropout,
            target_modules=args.target_modules or TARGET_MODULES,
            adapter_name=name,
        )
    for name, path in zip(files, args.lora_path or (), strict=False):
        load_lora(path.parent, {"transformer": transformer}, adapter_name=name, weight_name=path.name)
    return files


def validation_examples(args):
    """--validation_image as an example, in a list; no example without."""
    paths = args.validation_image or []
    paths = paths * len(args.condition_type) if len(paths) == 1 else paths
    pictures = [Example(str(path), functools.partial(Image.open, path)) for path in paths]
    given = [p for p, kind in zip(pictures, args.condition_type, strict=False) if kind in ("subject", "custom")]
    return [ControlExample(picture.name, picture.read, None, given) for picture in pictures[:1]]


def validate(accelerator, transformer, vae, noise_scheduler, prompt_encoder, dataset, args, *, prompt, step):
    """Draws a prompt with the conditions of --validation_image and sends the pictures, conditions first, to
    validation/step-N.png and the trackers."""
    (example,), rng = validation_examples(args), np.random.default_rng(args.seed)
    mask = dataset.mask(example, rng)
    shown = [dataset.picture(example, slot, rng, mask) for slot in dataset.slots[1:]]
    pipeline = sampling_pipeline(OminiPipeline, transformer, vae, noise_scheduler)
    with (
        undisturbed(transformer, device=accelerator.device),
        offload_models(vae, device=accelerator.device, offload=offloaded(args)),
    ):
        prompt_embeds, pooled_prompt_embeds = prompt_encoder.encode_prompts([prompt])
        call = {
            "prompt_embeds": prompt_embeds,
            "pooled_prompt_embeds": pooled_prompt_embeds,
            "specs": dataset.specs,
            "condition_images": shown,
            "mask": mask if "token_integration" in args.condition_type else None,
            "height": args.target_size[0],
            "width": args.target_size[1],
            "independent_condition": args.independent_condition,
        }
        images = generate_images(accelerator, pipeline, [call] * args.num_validation_images, seed=args.seed)
    captions = [f"condition: {condition.type}" for condition in dataset.specs]
    captions += [f"seed {args.seed + i}" for i in range(len(images))]
    images = [image.resize(args.target_size[::-1]) for image in shown] + images
    save_images(accelerator, args, images, captions, prompt=prompt, step=step)


def offloaded(args):
    """Whether the VAE waits in main memory while the transformer works."""
    return args.offload or args.cache_latents


def adapter_metadata(args, conditions, adapter):
    """What generation must know of an adapter, for the header of its file."""
    own = [asdict(condition) for condition in conditions if condition.adapter == adapter]
    about = {
        "base_model": args.pretrained_model_name_or_path,
        "target_size": args.target_size,
        "independent_condition": args.independent_condition,
        "max_sequence_length": args.max_sequence_length,
        "depth_model": args.depth_model,
        "conditions": own,
    }
    return {"omini": json.dumps(about)}


def drawing_command(args, conditions, prompt):
    """The command in examples/ that draws `prompt` with the adapters."""
    folder = args.output_dir.resolve()
    files = " ".join(shlex.quote(str(folder / f"{name}.safetensors")) for name in adapter_names(conditions))
    mask = ' --mask "$MASK"' if {"fill", "token_integration"} & set(args.condition_type) else ""
    return f'omini/generate.py {files} --prompt {shlex.quote(prompt)} --image "$IMAGE"{mask} --output image.png'


def describe(args, command):
    """README.md in the output folder: what was trained, and the command that draws with it."""
    folder, kinds = args.output_dir.resolve(), ", ".join(args.condition_type)
    height, width = args.target_size
    about_mask = ", `MASK` is white where it is to be drawn anew" if "$MASK" in command else ""
    description = f"""
# {folder.name}

For {args.pretrained_model_name_or_path}: LoRA of rank {args.rank} that makes it follow {kinds}, by OminiControl.

`IMAGE` is a picture to make the conditions of ({height} x {width} pixels are cut out of it){about_mask}. In the
trainer's folder:

```bash
python examples/{command}
```
"""
    tags = ["image-to-image", "flux", "lora", "ominicontrol", "diffusers"]
    write_model_card(args, description, tags, args.pretrained_model_name_or_path)


def check_prompts(args, prompts):
    """Problems of keeping the embeddings of all prompts in main memory."""
    problems = []
    if args.cache_prompts and not args.streaming:
        width = T5Config.from_pretrained(
            args.pretrained_model_name_or_path,
            subfolder="text_encoder_2",
            revision=args.revision,
            cache_dir=args.cache_dir,
        ).d_model
        needed = len(prompts) * args.max_sequence_length * width * (4 if args.mixed_precision in (None, "no") else 2)
        if needed > psutil.virtual_memory().available:
            problems.append(
                f"--cache_prompts: {len(prompts)} prompts take {needed / 2**30:.0f} GiB of main memory, more than is "
                "free: use --no-cache_prompts, or a smaller --max_sequence_length"
            )
    return problems


def about_data(args, dataset):
    """What of the data and its conditions is told before training."""
    amount = "a stream" if args.streaming else f"{len(dataset)} samples"
    about = {"data": f"{amount} at {'x'.join(map(str, args.target_size))} px"}
    for i, condition in enumerate(dataset.specs, start=1):
        (height, width), (down, right) = condition.size, condition.position_delta
        place = f"moved by {down:g},{right:g}, scale {condition.position_scale:g}, adapter {condition.adapter}"
        about[f"follows{'' if i == 1 else f' {i}'}"] = f"{condition.type} of {height}x{width} px, {place}"
    return about


def main(args):
    # 1. Accelerator, logging, seed
    accelerator, weight_dtype = start(args)
    device, quiet = accelerator.device, not accelerator.is_main_process
    set_seed(args.seed)

    # 2. Data
    examples, problems = find_stream(args) if args.streaming else find_examples(args)
    specs = condition_specs(args, examples[0].places if examples else ())
    dataset = ControlDataset(examples, specs, args)
    num_processes, accumulation = accelerator.num_processes, args.gradient_accumulation_steps
    total_batch_size = args.train_batch_size * accumulation * num_processes
    processes = {"process_index": accelerator.process_index, "num_processes": num_processes}
    if args.streaming:
        sampler = (
            None
            if problems
            else StreamedBatches(open_rows(args)[0], streamed_examples, dataset.checked_sample, args, **processes)
        )
        steps_per_epoch = None
    else:
        sampler = StepSampler([0] * len(examples), args.train_batch_size, seed=args.seed, **processes)
        steps_per_epoch = math.ceil(sampler.steps_per_epoch / accumulation)
    max_train_steps = args.max_train_steps or args.num_train_epochs * steps_per_epoch
    validation_steps = args.validation_steps or args.validation_epochs * (steps_per_epoch or 1)
    final_prompt = None if args.skip_final_inference else args.final_validation_prompt or args.validation_prompt
    prompts = {example.caption for example in examples if not caption_defect(example)}
    prompts |= {""} if args.drop_text_prob else set()
    prompts = sorted(p for p in {*prompts, args.validation_prompt, final_prompt} if p is not None)
    run = run_settings(args, len(dataset), num_processes)
    checkpoint = checkpoint_to_resume(args.output_dir, args.resume_from_checkpoint)
    problems += check_prompts(args, prompts) + check_run(accelerator, args, max_train_steps, checkpoint, run)
    if problems:
        fail(accelerator, problems)
    hub_repo = create_hub_repo(accelerator, args)
    args.output_dir.mkdir(parents=True, exist_ok=True)

    # 3. Prompts, depth maps, latents: what makes them is gone before the transformer is loaded
    cached = args.cache_prompts and not args.streaming
    pipeline = load_text_pipeline(FluxPipeline, args, weight_dtype)
    prompt_encoder = PromptEncoder(
        accelerator,
        pipeline,
        weight_dtype,
        max_sequence_length=args.max_sequence_length,
        offload=args.offload,
        keep_encoders=not cached,
    )
    if cached:
        prompt_encoder.cache_prompts(prompts)
    if {"depth", "depth_pred"} & set(args.condition_type):
        estimate_depth(accelerator, examples + validation_examples(args), args)
    vae = load_model(AutoencoderKL, "vae", args, weight_dtype).to(device)
    if args.cache_latents:
        dataset.moments = cache_moments(accelerator, vae, dataset.fixed_keys(), dataset.fixed_pixels)
    offload = offloaded(args)
    vae.to("cpu" if offload else device)

    # 4. Transformer and LoRA
    noise_scheduler = load_scheduler(args)
    transformer = load_model(OminiTransformer2DModel, "transformer", args, weight_dtype)
    base_size = transformer.num_parameters()
    quantize_base(transformer, weight_dtype, args.quantize_base).to(first_device(accelerator, args))
    files, modules = add_adapters(transformer, specs, args), {"transformer": transformer}
    prepare_blocks(transformer, args, device, weight_dtype)
    lora_params = [parameter for parameter in transformer.parameters() if parameter.requires_grad]
    guided = transformer.config.guidance_embeds

    # 5. Optimizer and schedule
    optimizer = create_optimizer(args, lora_params, total_batch_size if args.scale_lr else 1)
    lr_scheduler = create_lr_scheduler(args, optimizer, max_train_steps)

    # 6. Prepare and resume
    lr_scheduler = accelerator.prepare(lr_scheduler)
    optimizer = optimizer if args.fsdp else accelerator.prepare(optimizer)
    register_lora_checkpointing(accelerator, FluxPipeline, modules, optimizer, files)
    global_step = load_checkpoint(accelerator, checkpoint, lr_scheduler)
    sampler.start, sampler.stop = global_step * accumulation, max_train_steps * accumulation
    if args.streaming:
        train_dataloader = DataLoader(sampler, batch_size=None)
    else:
        train_dataloader = DataLoader(dataset, batch_sampler=sampler, num_workers=args.dataloader_num_workers)

    # 7. Train
    print_header(
        accelerator, args, about_data(args, dataset), lora_params, base_size, max_train_steps, steps_per_epoch
    )
    start_logging(accelerator, args, "omini", global_step)
    draw = functools.partial(validate, accelerator, transformer, vae, noise_scheduler, prompt_encoder, dataset, args)
    if args.validation_prompt and global_step == 0:
        draw(prompt=args.validation_prompt, step=0)
    metrics = open_metrics(args.output_dir / "metrics.jsonl", global_step) if accelerator.is_main_process else None
    transformer.train()
    progress_bar = tqdm(total=max_train_steps, initial=global_step, desc="Training", unit="step", disable=quiet)
    loss_sum, skipped, signals, started = 0.0, 0, catch_signals(), time.perf_counter()
    for micro_step, batch in enumerate(read_batches(train_dataloader), start=sampler.start):
        with accelerator.accumulate(transformer):
            generator = step_generator(args.seed, *divmod(micro_step, accumulation), accelerator.process_index)
            torch.manual_seed(generator.initial_seed())  # dropout draws from the global generator
            moments = {slot: values.to(device) for slot, values in batch["moments"].items()}
            if batch["pixel_values"]:
                with offload_models(vae, device=device, offload=offload):
                    moments |= {slot: encode_moments(vae, values) for slot, values in batch["pixel_values"].items()}
            latents, *condition_latents = (
                sample_latents(moments[slot], vae.config, generator) for slot in dataset.slots
            )
            prompt_embeds, pooled_prompt_embeds = prompt_encoder.encode_prompts(batch["prompt"])
            with accelerator.autocast():
                loss = compute_loss(
                    transformer,
                    latents,
                    condition_latents,
                    batch["latent_mask"].to(device) if "latent_mask" in batch else None,
                    prompt_embeds,
                    pooled_prompt_embeds,
                    args=args,
                    specs=specs,
                    noise_scheduler=noise_scheduler,
                    guidance=torch.full((len(latents),), args.guidance_scale, device=device) if guided else None,
                    generator=generator,
                ).mean()
            accelerator.backward(loss)
            loss_sum = loss_sum + loss.detach() / accumulation
            if not accelerator.sync_gradients:
                continue
            if not args.fsdp:
                reduce_gradients(accelerator, lora_params)
            grad_norm = accelerator.clip_grad_norm_(lora_params, args.max_grad_norm)
            totals = torch.stack([loss_sum, torch.tensor(float(len(signals)), device=device)])
            mean_loss, interrupted = accelerator.reduce(totals, reduction="mean").tolist()
            # a gradient scaler (fp16) skips infinite gradients itself
            finite = math.isfinite(mean_loss) and (accelerator.scaler is not None or math.isfinite(grad_norm))
            if finite or accelerator.scaler is not None:
                optimizer.step()
            lr_scheduler.step()
            optimizer.zero_grad()

        global_step += 1
        skipped = 0 if finite else count_skipped(skipped, global_step)
        logs = {"loss": mean_loss, **step_logs(optimizer, grad_norm, total_batch_size, started, device)}
        log_step(accelerator, progress_bar, metrics, global_step, logs)
        done = global_step == max_train_steps
        if interrupted or global_step % args.checkpointing_steps == 0:
            checkpoint = save_checkpoint(accelerator, args.output_dir, global_step, run, args.checkpoints_total_limit)
        if interrupted and not done:
            transformer = draw = None  # see below
            stop_interrupted(accelerator, global_step, checkpoint, signals)
        if args.validation_prompt and global_step % validation_steps == 0 and not done:
            draw(prompt=args.validation_prompt, step=global_step)
        loss_sum, started = 0.0, time.perf_counter()
    progress_bar.close()

    # 8. Save and final validation
    save_dtype = torch.float32 if args.upcast_before_saving else weight_dtype
    for name, file in files.items():
        metadata = adapter_metadata(args, specs, name)
        save_lora(
            args.output_dir, FluxPipeline, modules, save_dtype, adapter_name=name, weight_name=file, metadata=metadata
        )
    shown_prompt = final_prompt or (examples[0].caption if examples else "a picture")
    command = drawing_command(args, specs, shown_prompt)
    if accelerator.is_main_process:
        metrics.close()
        plot_metrics(args.output_dir)
    if final_prompt:
        draw(prompt=final_prompt, step=global_step)
    if accelerator.is_main_process:
        describe(args, command)
    transformer = draw = None  # what DistributedDataParallel frees after the process group can hang in gloo
    accelerator.free_memory()
    accelerator.end_training()
    results = {f"{name} LoRA": file for name, file in files.items()}
    results |= {"usage": "README.md", "loss": "loss.png", "pictures": "validation"}
    shown = " ".join(shlex.quote(str(path)) for path in args.validation_image or ["IMAGE"])
    command = command.replace('"$IMAGE"', shown).replace('"$MASK"', "MASK")
    finish(accelerator, args, global_step, results, command, hub_repo, ["depth/**"])


if __name__ == "__main__":
    main(parse_args())
