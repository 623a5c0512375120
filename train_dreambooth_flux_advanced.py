"""Teaches FLUX.1 a subject or a style from a few pictures: DreamBooth LoRA (arXiv 2208.12242, 2106.09685).

The frozen transformer predicts the velocity of a noisy latent, a low-rank adapter beside its layers is trained:

    x_σ = (1 - σ) x_0 + σ ε        loss = w(σ) || transformer(x_σ, σ, prompt) - (ε - x_0) ||²

One GPU, or all of them after `accelerate config`:

    accelerate launch train_dreambooth_flux_advanced.py \\
      --pretrained_model_name_or_path=black-forest-labs/FLUX.1-dev \\
      --instance_data_dir=photos --instance_prompt="a photo of sks dog" \\
      --mixed_precision=bf16 --gradient_checkpointing --cache_latents --train_batch_size=1 \\
      --rank=16 --lora_alpha=16 --learning_rate=1e-4 --max_train_steps=1000 \\
      --validation_prompt="sks dog on the beach" --output_dir=sks-dog

`output_dir` then holds `pytorch_lora_weights.safetensors` for `FluxPipeline.load_lora_weights`, a model card, the
arguments (args.json), the loss (metrics.jsonl, loss.png), pictures (validation/) and checkpoints to resume from.
"""

import contextlib
import difflib
import functools
import hashlib
import itertools
import json
import math
import os
import re
import shlex
import time
import tomllib
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

from common.arguments import LR_SCHEDULERS, TRACKERS, Parser, Switch, fail, names_in, number
from common.checkpoints import (
    catch_signals,
    check_disk,
    check_output_dir,
    check_run,
    checkpoint_damage,
    checkpoint_state,
    checkpoint_to_resume,
    count_skipped,
    load_checkpoint,
    run_settings,
    save_checkpoint,
    stop_interrupted,
    writing,
)
from common.data import (
    IMAGE_SUFFIXES,
    INTERPOLATION,
    Example,
    StepSampler,
    check_captions,
    check_pictures,
    collate,
    open_dataset,
    picture_files,
    read_batches,
    read_captions,
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
    cache_moments,
    disk_cached,
    encode_moments,
    fingerprint,
    image_ids,
    pack_latents,
    sample_latents,
    to_tensor,
)
from common.lora import (
    FLUX_TARGET_MODULES,
    add_lora,
    reduce_gradients,
    register_lora_checkpointing,
    save_lora,
    target_layers,
    unknown_layers,
)
from common.lora_formats import FLUX_LAYERS, LORA_FORMS, diffusers_state_dict, lora_header, lora_layers, write_lora
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
    about_text,
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
from common.validation import draw_class_images, generate_images, sampling_pipeline, save_images, undisturbed

import numpy as np
import torch
from accelerate.utils import set_seed
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel
from diffusers.loaders.single_file_utils import convert_ldm_vae_checkpoint
from diffusers.training_utils import compute_loss_weighting_for_sd3, offload_models, parse_buckets_string
from PIL import Image, ImageOps
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from safetensors.torch import save_file as save_tensors
from torch.utils.data import DataLoader, Dataset
from tqdm.auto import tqdm
from transformers import AutoTokenizer, CLIPTextConfig, CLIPTextModel, T5Config, T5EncoderModel


KOHYA_FLAGS = {
    "--network_dim": "--rank",
    "--network_alpha": "--lora_alpha",
    "--optimizer_type": "--optimizer",
    "--lr_scheduler_num_cycles": "--lr_num_cycles",
    "--max_train_epochs": "--num_train_epochs",
}


# ---------------------------------------------------------------------------------------------------------------------
# Arguments
# ---------------------------------------------------------------------------------------------------------------------


def parse_args(argv=None):
    parser = Parser(__doc__, aliases=KOHYA_FLAGS)
    count, size = number(int, 1), number(int, 16, 8192)
    positive, not_negative = number(float, 0, above=True), number(float, 0)
    share, decay = number(float, 0, 1), number(float, 0, 0.9999999)

    arg = parser.add_argument_group("model", "what is trained, in which precision").add_argument
    arg(
        "--pretrained_model_name_or_path", required=True, metavar="MODEL", help="folder or hub id of a FLUX.1 pipeline"
    )
    arg("--ae", type=Path, metavar="FILE", help="ae.safetensors, if MODEL is a file like flux1-dev.safetensors")
    arg("--clip_l", type=Path, metavar="FILE", help="clip_l.safetensors, likewise")
    arg("--t5xxl", type=Path, metavar="FILE", help="t5xxl_fp16.safetensors, likewise")
    arg("--tokenizer_dir", type=Path, metavar="DIR", help="likewise a folder with FLUX.1's tokenizer and tokenizer_2")
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

    arg = parser.add_argument_group("data", "a folder of pictures, or a dataset").add_argument
    arg("--instance_data_dir", type=Path, help="folder of pictures; captions in .txt files, metadata.jsonl or none")
    arg("--dataset_name", help="dataset on the hub, or a folder or file that `datasets` loads")
    arg(
        "--dataset_config",
        type=Path,
        metavar="DATA.TOML",
        help="folders and their options as kohya's sd-scripts read it",
    )
    arg("--dataset_config_name", help="configuration of that dataset")
    arg("--image_column", default="image", help="column of the dataset that holds the pictures")
    arg("--caption_column", help="column of the dataset or of metadata.jsonl that holds captions")
    arg("--instance_prompt", help="prompt of every picture without a caption: a photo of sks dog")
    arg("--caption_dropout", type=share, default=0.0, help="share of captions left out, 0 to 1")
    arg("--repeats", type=count, default=1, help="times each picture counts in an epoch, each with its own crop")
    arg("--resolution", type=size, default=512, help="side in pixels that pictures are resized and cropped to")
    arg("--aspect_ratio_buckets", metavar="H,W;H,W", help="sizes instead of resolution: each picture gets the nearest")
    arg("--center_crop", action="store_true", help="crop the centre, not a part drawn once per picture and repeat")
    arg("--random_flip", action="store_true", help="mirror half of the pictures; not for faces, text or logos")
    arg("--image_interpolation_mode", choices=INTERPOLATION, default="lanczos", help="how pictures are resized")
    arg("--train_batch_size", type=count, default=4, help="pictures per device and forward pass")
    arg("--dataloader_num_workers", type=number(int, 0), default=0, help="processes that read pictures; 0: none extra")
    arg("--cache_latents", action="store_true", help="encode pictures once, before training: saves time and memory")
    arg("--cache_latents_to_disk", action="store_true", help="and keep them for later runs, by content: never stale")
    arg("--cache_text_encoder_outputs_to_disk", action="store_true", help="keep the embeddings of prompts so too")
    arg("--disk_cache_dir", type=Path, default="~/.cache/flux-trainers", help="folder where they are kept")

    arg = parser.add_argument_group("prior preservation", "keeps the class of the subject as it was").add_argument
    arg("--with_prior_preservation", action="store_true", help="train on pictures of the class beside the subject's")
    arg("--class_data_dir", type=Path, help="folder of class pictures; missing ones are drawn by the untrained model")
    arg("--class_prompt", help="prompt of the class: a photo of a dog")
    arg("--num_class_images", type=count, default=100, help="number of class pictures to have")
    arg("--prior_loss_weight", type=not_negative, default=1.0, help="weight of their loss; more if the class changes")
    arg("--sample_batch_size", type=count, default=4, help="class pictures drawn at a time")
    arg("--prior_generation_precision", choices=("no", "fp32", "fp16", "bf16"), help="precision they are drawn in")

    arg = parser.add_argument_group("pivotal tuning", "what is trained in the text encoders").add_argument
    arg("--train_text_encoder", action="store_true", help="train a LoRA for CLIP too")
    arg("--train_text_encoder_ti", action="store_true", help="train new tokens for the subject (arXiv 2106.05744)")
    arg("--enable_t5_ti", action="store_true", help="new tokens in T5 too, not in CLIP alone")
    arg("--token_abstraction", default="TOK", help="words in prompts and captions that the new tokens stand for: A,B")
    arg("--num_new_tokens_per_abstraction", type=count, help="new tokens for each (default: 2)")
    arg(
        "--initializer_concept",
        metavar="WORDS",
        help="what they start as, WORDS,WORDS or one for all (default: noise)",
    )
    arg("--train_text_encoder_frac", type=share, default=1.0, help="share of the steps that train CLIP's LoRA")
    arg("--train_text_encoder_ti_frac", type=share, default=0.5, help="share of the steps that train new tokens")
    arg("--train_transformer_frac", type=share, default=1.0, help="share that trains the transformer; 0: only tokens")

    arg = parser.add_argument_group("lora", "the adapter").add_argument
    arg("--rank", type=count, default=4, help="size of the adapter and what it can hold; 16 to 64 for detail")
    arg("--lora_alpha", type=positive, default=4, help="the adapter counts lora_alpha / rank; usually the rank")
    arg("--lora_dropout", type=number(float, 0, 0.99), default=0.0, help="share of its inputs dropped, 0 to 1")
    arg(
        "--lora_layers",
        "--lora_blocks",
        help="names of layers that get an adapter, such as attn.to_k,ff.net.2 (default: the usual ones)",
    )

    arg = parser.add_argument_group("noise", "which noise levels are trained, and how much each counts").add_argument
    arg("--guidance_scale", type=not_negative, default=3.5, help="guidance that a guidance-distilled model is told")
    arg("--timestep_sampling", choices=TIMESTEP_SAMPLING, default="sigma", help="sigma draws as weighting_scheme says")
    arg("--weighting_scheme", choices=WEIGHTING_SCHEMES, default="none", help="density of noise levels or loss weight")
    arg("--logit_mean", type=number(float, -100, 100), default=0.0, help="mean of logit_normal; below 0: more noise")
    arg("--logit_std", type=positive, default=1.0, help="standard deviation of logit_normal")
    arg("--mode_scale", type=number(float, -1, 1.75), default=1.29, help="scale of mode; 0: all levels equally")
    arg("--sigmoid_scale", type=positive, default=1.0, help="spread of sigmoid, shift and flux_shift")
    arg("--discrete_flow_shift", type=positive, default=3.0, help="s of shift; above 1: more noise")

    arg = parser.add_argument_group("optimizer", "how the adapter is updated").add_argument
    arg("--optimizer", type=str.lower, choices=("adamw", "prodigy"), default="AdamW", help="prodigy wants rate 1")
    arg("--learning_rate", type=positive, default=1e-4, help="step size; less if the loss jumps; 1 for prodigy")
    arg("--text_encoder_lr", type=positive, default=5e-6, help="step size for text encoders; Prodigy has one for all")
    arg("--scale_lr", action="store_true", help="multiply it by batch size, accumulation and number of devices")
    arg("--lr_scheduler", choices=LR_SCHEDULERS, default="constant", help="course of the learning rate over the steps")
    arg("--lr_warmup_steps", type=number(int, 0), default=500, help="steps until it is reached; none for constant")
    arg("--lr_num_cycles", type=count, default=1, help="cycles of cosine_with_restarts")
    arg("--lr_power", type=positive, default=1.0, help="power of polynomial; 1: a straight line")
    arg("--use_8bit_adam", action="store_true", help="AdamW with 8-bit states (bitsandbytes), to fit memory")
    arg("--adam_beta1", type=decay, default=0.9, help="decay of the gradient's mean, in Prodigy too")
    arg("--adam_beta2", type=decay, default=0.999, help="decay of the gradient's square, in Prodigy too")
    arg("--adam_weight_decay", type=not_negative, default=1e-4, help="weight decay, in Prodigy too")
    arg("--adam_weight_decay_text_encoder", type=not_negative, default=1e-3, help="weight decay of text encoders")
    arg("--adam_epsilon", type=positive, default=1e-8, help="added to the denominator, in Prodigy too")
    arg("--prodigy_beta3", type=decay, help="decay of Prodigy's estimate (default: square root of adam_beta2)")
    arg("--prodigy_decouple", action=Switch, default=True, help="weight decay as in AdamW")
    arg("--prodigy_use_bias_correction", action=Switch, default=True, help="Adam's bias correction")
    arg("--prodigy_safeguard_warmup", action=Switch, default=True, help="keep warm-up out of Prodigy's estimate")
    arg("--max_grad_norm", type=positive, default=1.0, help="longer gradients are scaled down to this norm")
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
    arg("--num_validation_images", type=count, default=4, help="pictures each time")
    arg("--validation_epochs", type=count, default=50, help="epochs between validations")
    arg("--validation_steps", type=count, help="steps between validations, instead of epochs")
    arg("--final_validation_prompt", help="prompt to draw after training (default: validation_prompt)")
    arg("--skip_final_inference", action="store_true", help="draw nothing after training")

    arg = parser.add_argument_group("output and logging", "where everything goes").add_argument
    arg("--output_dir", type=Path, default=Path("flux-dreambooth-lora"), help="folder of all results")
    arg("--output_name", metavar="NAME", help="the LoRA is output_dir/NAME.safetensors, the rest in output_dir/NAME")
    arg(
        "--save_format",
        choices=LORA_FORMS[:2],
        default="comfyui",
        help="of NAME.safetensors; Forge and diffusers read both",
    )
    arg("--save_every_n_epochs", type=count, metavar="N", help="keep NAME-00000N.safetensors every N epochs too")
    arg("--logging_dir", type=Path, default=Path("logs"), help="folder of the trackers' files in output_dir")
    arg("--report_to", choices=TRACKERS, default="tensorboard", help="where curves and pictures are sent")
    arg("--upcast_before_saving", action="store_true", help="save the adapter in float32, not in mixed_precision")
    arg("--verbose", action="store_true", help="show what the libraries remark and their progress bars")
    arg("--push_to_hub", action="store_true", help="upload the results, without checkpoints and logs")
    arg("--hub_token", help="token for it (default: that of `hf auth login`); it is written nowhere")
    arg("--hub_model_id", help="repository for it (default: the name of output_dir)")

    args = parser.parse_args(argv)
    args.cache_latents |= args.cache_latents_to_disk
    args.output_dir /= args.output_name or ""
    parser.refuse(check_flags(args) + check_model(args) + check_output_dir(args))
    return args


def check_flags(args):
    """Contradictions between flags, and flags without effect."""
    problems = []
    if sum(map(bool, (args.instance_data_dir, args.dataset_name, args.dataset_config))) != 1:
        problems.append("exactly one of --instance_data_dir and --dataset_name is needed, or else --dataset_config")
    if args.dataset_config:
        idle = ("with_prior_preservation", "aspect_ratio_buckets", "center_crop", "caption_column", "scale_lr")
        problems += [f"--{name} has no effect with --dataset_config" for name in idle if getattr(args, name)]
    if args.resolution % 16:
        nearest = args.resolution // 16 * 16
        problems.append(f"--resolution {args.resolution} must be a multiple of 16, such as {nearest}")
    try:
        odd = [f"{height},{width}" for height, width in buckets(args) if height % 16 or width % 16]
        problems += [
            f"--aspect_ratio_buckets: {size} is not two multiples of 16" for size in odd if not args.resolution % 16
        ]
    except ValueError:
        problems.append(f"--aspect_ratio_buckets {args.aspect_ratio_buckets}: expected height,width;height,width")
    if args.train_text_encoder and args.train_text_encoder_ti:
        problems.append("--train_text_encoder and --train_text_encoder_ti exclude each other: choose one")
    if not args.train_text_encoder_ti:
        needy = ("enable_t5_ti", "initializer_concept", "num_new_tokens_per_abstraction")
        problems += [f"--{name} needs --train_text_encoder_ti" for name in needy if getattr(args, name)]
    if args.train_transformer_frac == 0 and not (args.train_text_encoder_ti and args.train_text_encoder_ti_frac):
        problems.append("--train_transformer_frac 0 leaves nothing to train without --train_text_encoder_ti")
    if args.train_text_encoder_ti_frac != 0.5 and not args.train_text_encoder_ti:
        problems.append(
            f"--train_text_encoder_ti_frac {args.train_text_encoder_ti_frac} needs --train_text_encoder_ti"
        )
    if args.train_text_encoder_frac < 1 and not args.train_text_encoder:
        problems.append(f"--train_text_encoder_frac {args.train_text_encoder_frac} needs --train_text_encoder")
    if args.num_new_tokens_per_abstraction and args.initializer_concept:
        problems.append("--num_new_tokens_per_abstraction has no effect with --initializer_concept: leave one out")
    concepts, abstractions = (len(names_in(text)) for text in (args.initializer_concept, args.token_abstraction))
    if not 0 < len({*names_in(args.token_abstraction)}) == abstractions:
        problems.append(f"--token_abstraction {args.token_abstraction!r}: one word, or several different ones: A,B")
    if concepts not in (0, 1, abstractions):
        problems.append(f"--initializer_concept names {concepts} concepts for {abstractions} of --token_abstraction")
    if (args.save_every_n_epochs or args.save_format != "comfyui") and not args.output_name:
        problems.append("--save_every_n_epochs and --save_format need --output_name")
    if args.output_name and Path(args.output_name).name != args.output_name:
        problems.append(f"--output_name {args.output_name} must be the name of a file, without folders")
    if args.cache_latents_to_disk or args.cache_text_encoder_outputs_to_disk:
        folder = args.disk_cache_dir.expanduser().absolute()
        parent = next(path for path in [folder, *folder.parents] if path.exists())
        if not (parent.is_dir() and os.access(parent, os.W_OK)):
            problems.append(f"--disk_cache_dir {args.disk_cache_dir}: {parent} is no folder that can be written to")
    return problems + check_shared_flags(args) + check_hub(args)


def any_of(words):
    """A regular expression for any of the words, the longest first: TOK2 is no TOK."""
    return re.compile("|".join(map(re.escape, sorted(words, key=len, reverse=True))))


def buckets(args):
    """The (height, width) that pictures are cropped to."""
    if args.aspect_ratio_buckets is None:
        return [(args.resolution, args.resolution)]
    return parse_buckets_string(args.aspect_ratio_buckets)


def check_model(args):
    """Problems of --pretrained_model_name_or_path, --lora_layers and the disk, from the transformer's config alone."""
    flag = f"--pretrained_model_name_or_path {args.pretrained_model_name_or_path}"
    files = (args.ae, args.clip_l, args.t5xxl, args.tokenizer_dir)
    if not single_file(args) and any(files):
        return [f"--ae, --clip_l, --t5xxl and --tokenizer_dir belong to a .safetensors file, but: {flag}"]
    if single_file(args) and (problems := file_problems(args)):
        return problems
    try:
        config = transformer_config(args)
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
    targets = lora_targets(args, transformer)
    unknown = unknown_layers(transformer, targets)
    if unknown:
        return [
            f"--lora_layers: the transformer has no linear layer {', '.join(unknown)}; kohya means all in the blocks"
        ]
    sizes = [sum(layer.weight.shape) for name, layer in target_layers(transformer, targets)]
    needed = 16 * args.rank * sum(sizes)  # bytes of a checkpoint, its two moments and the result
    return check_disk(args, needed)


def lora_targets(args, transformer):
    """The layers that --lora_layers names; kohya stands for every linear layer in the blocks, as in its sd-scripts."""
    if args.lora_layers != "kohya":
        return names_in(args.lora_layers) or list(FLUX_TARGET_MODULES)
    layers = [name for name, module in transformer.named_modules() if isinstance(module, torch.nn.Linear)]
    return [name for name in layers if "transformer_blocks." in name]


# ---------------------------------------------------------------------------------------------------------------------
# Model
# ---------------------------------------------------------------------------------------------------------------------


TOKENIZERS = ("tokenizer", "tokenizer_2")


CHECKPOINT_PREFIX, FLUX_ROOTS = "model.diffusion_model.", {name.split(".")[0] for name in FLUX_LAYERS}


CHECKPOINT_SIZES = (
    "double_blocks.0.img_attn.norm.query_norm.scale",
    *("img_in.weight", "txt_in.weight", "vector_in.in_layer.weight"),
)


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


def load_flux_scheduler(args):
    """The scheduler that the model was made with; that of a single file follows from its kind."""
    if single_file(args):
        guided = transformer_config(args)["guidance_embeds"]  # FLUX.1-dev, not -schnell
        return FlowMatchEulerDiscreteScheduler(shift=3.0 if guided else 1.0, use_dynamic_shifting=guided)
    return load_scheduler(args)


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


class NewTokens(torch.nn.Module):
    """An embedding table with trained rows [n, D] for the tokens from `first_id` on; its own rows never change."""

    def __init__(self, table, first_id, rows):
        super().__init__()
        self.table, self.first_id = table, first_id
        self.rows = torch.nn.Parameter(rows.float())
        self.std = table.weight.float().std()

    def forward(self, input_ids):
        embedded = self.table(input_ids.clamp(max=self.first_id - 1))
        rows = self.rows[(input_ids - self.first_id).clamp(min=0)].to(embedded.dtype)
        return torch.where((input_ids >= self.first_id)[..., None], rows, embedded)

    @torch.no_grad()
    def pull(self):
        """Moves the spread of the new rows towards that of the table, as the pivotal tuning of cog-sdxl does."""
        self.rows *= (self.std.to(self.rows.device) / self.rows.std()) ** 0.1


class TokenEncoder(PromptEncoder):
    """PromptEncoder with new tokens in training, until `freeze`."""

    def add_trained_parts(self):
        super().add_trained_parts()
        self.abstractions, self.new_tokens, self.fingerprints = {}, {}, {}
        if self.args.train_text_encoder_ti:
            self.add_new_tokens()
            self.trained = {*self.new_tokens}

    def add_new_tokens(self):
        """<s0><s1>... for each abstraction, in the tokenizers and, with rows to be trained, in the encoders."""
        args = self.args
        tokenizers = {"clip_l": self.pipeline.tokenizer}
        if args.enable_t5_ti:
            tokenizers["t5"] = self.pipeline.tokenizer_2
        names, concepts = names_in(args.token_abstraction), names_in(args.initializer_concept)
        concepts = concepts * len(names) if len(concepts) == 1 else concepts or [None] * len(names)
        initial = {name: [] for name in tokenizers}  # ids whose embeddings the new rows start as, None for noise
        tokens = []
        for name, concept in zip(names, concepts, strict=True):
            ids = {k: t(concept, add_special_tokens=False).input_ids for k, t in tokenizers.items()} if concept else {}
            length = max(map(len, ids.values()), default=args.num_new_tokens_per_abstraction or 2)
            for kind in tokenizers:
                initial[kind] += [ids[kind][i % len(ids[kind])] if concept else None for i in range(length)]
            new = [f"<s{len(tokens) + i}>" for i in range(length)]
            self.abstractions[name] = "".join(new)
            tokens += new
        generator = step_generator(args.seed, 0)
        for kind, tokenizer in tokenizers.items():
            table, first_id = self.encoders[kind].get_input_embeddings(), len(tokenizer)
            tokenizer.add_tokens(tokens)
            weight = table.weight.float()
            noise = torch.randn(len(tokens), weight.shape[1], generator=generator) * weight.std()
            rows = [noise[i] if id is None else weight[id] for i, id in enumerate(initial[kind])]
            self.new_tokens[kind] = NewTokens(table, first_id, torch.stack(rows))
            self.encoders[kind].set_input_embeddings(self.new_tokens[kind])

    def replace(self, prompt):
        """The prompt with the new tokens in place of the words they stand for."""
        if not self.abstractions:
            return prompt
        return any_of(self.abstractions).sub(lambda name: self.abstractions[name[0]], prompt)

    def parameters(self):
        return [*(new.rows for new in self.new_tokens.values()), *self.lora_params]

    def kept_embed(self, kind, prompt):
        """The embedding on the CPU, through the cache on disk if there is one and the encoder is as it was loaded."""
        compute = lambda: self.embed(kind, [prompt]).cpu()  # noqa: E731
        adapted = kind in self.new_tokens or kind == "clip_l" and self.lora_params
        if adapted or not self.args.cache_text_encoder_outputs_to_disk:
            return compute()
        if kind not in self.fingerprints:
            self.fingerprints[kind] = fingerprint(self.encoders[kind])
        how = f"{self.args.max_sequence_length} {self.dtype} {self.accelerator.mixed_precision} {self.replace(prompt)}"
        return disk_cached(self.args.disk_cache_dir.expanduser(), self.fingerprints[kind] + how.encode(), compute)

    def freeze(self, prompts):
        """Ends the training of the encoders."""
        self.trained = set()
        for parameter in self.parameters():
            parameter.requires_grad_(False).grad = None
        self.cache(prompts)

    def save_embeddings(self, path):
        """The rows of the new tokens, {"clip_l": [n, 768], "t5": [n, 4096]}, for `load_textual_inversion`.

        The file's metadata says what stands for each abstraction: {"TOK": "<s0><s1>"}.
        """
        if self.new_tokens:
            rows = {kind: new.rows.detach().cpu().contiguous() for kind, new in self.new_tokens.items()}
            with writing(path):
                save_tensors(rows, path, metadata=self.abstractions)

    def export_embeddings(self, folder):
        """Each word's rows as comfyui/TOK.safetensors (clip_l, t5xxl) and forge/TOK.safetensors (clip_l alone)."""
        first = 0
        for word, tokens in self.abstractions.items():
            after = first + tokens.count("<s")
            rows = {kind: new.rows.detach().cpu()[first:after].clone() for kind, new in self.new_tokens.items()}
            comfyui = {{"t5": "t5xxl"}.get(kind, kind): value for kind, value in rows.items()}
            for program, tensors in {"comfyui": comfyui, "forge": {"clip_l": rows["clip_l"]}}.items():
                path = folder / program / (re.sub(r"[^\w.-]+", "_", word) + ".safetensors")
                with writing(path):
                    path.parent.mkdir(parents=True, exist_ok=True)
                    save_tensors(tensors, path)
            first = after

    def load_embeddings(self, path):
        rows = load_file(path) if self.new_tokens else {}
        for kind, new in self.new_tokens.items():
            new.rows.data.copy_(rows[kind])


# ---------------------------------------------------------------------------------------------------------------------
# Objective
# ---------------------------------------------------------------------------------------------------------------------


def compute_loss(
    transformer, latents, prompt_embeds, pooled_prompt_embeds, *, args, noise_scheduler, guidance, generator
):
    """The flow matching loss [B] of each sample of a batch.

    latents [B, C, h, w] are normalised, prompt_embeds [B, T, D], pooled_prompt_embeds [B, P]; guidance [B], or None
    for a model without guidance embedding. Noise and noise levels are drawn from `generator`, a CPU one.
    """
    batch_size, _, height, width = latents.shape
    noise = torch.randn(latents.shape, generator=generator).to(latents.device)
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
    ).to(latents.device)
    latents, noise = pack_latents(latents), pack_latents(noise)
    model_pred = transformer(
        hidden_states=add_noise(latents, noise, sigmas).to(prompt_embeds.dtype),
        timestep=sigmas,
        guidance=guidance,
        pooled_projections=pooled_prompt_embeds,
        encoder_hidden_states=prompt_embeds,
        txt_ids=torch.zeros(prompt_embeds.shape[1], 3, device=latents.device),
        img_ids=image_ids(height, width, latents.device),
        return_dict=False,
    )[0]
    target = noise - latents
    weighting = compute_loss_weighting_for_sd3(args.weighting_scheme, sigmas=sigmas)
    return weighted_mse(model_pred, target, weighting)


# ---------------------------------------------------------------------------------------------------------------------
# Data
# ---------------------------------------------------------------------------------------------------------------------


KOHYA_INTERPOLATION = {name: name for name in INTERPOLATION} | {
    "linear": "bilinear",
    "cubic": "bicubic",
    "area": "box",
}


# What a value in --dataset_config must be, and whether one is.
OPTION_KINDS = {
    "true or false": lambda value: isinstance(value, bool),
    "text": lambda value: isinstance(value, str),
    "text that is not empty": lambda value: isinstance(value, str) and value != "",
    "an extension such as .txt": lambda value: isinstance(value, str) and re.fullmatch(r"\.?\w[\w.-]*", value),
    "a whole number from 0 to 10,000": lambda value: type(value) is int and 0 <= value <= 10_000,
    "a whole number from 1 to 10,000": lambda value: type(value) is int and 1 <= value <= 10_000,
    "a number from 0 to 1": lambda value: type(value) in (int, float) and 0 <= value <= 1,
    "a multiple of 16 to 8192": lambda value: type(value) is int and 16 <= value <= 8192 and value % 16 == 0,
    "a side or [width, height], multiples of 16 to 8192": lambda value: (
        all(OPTION_KINDS["a multiple of 16 to 8192"](side) for side in (value if isinstance(value, list) else [value]))
        and (not isinstance(value, list) or len(value) == 2)
    ),
    "lanczos, nearest, bilinear, linear, bicubic, cubic, area or box": lambda value: value in [*KOHYA_INTERPOLATION],
}


SWITCH, TEXT, SOME_TEXT, EXTENSION, FROM_0, FROM_1, SHARE, SIDE, SIZE, METHOD = OPTION_KINDS


TABLES = {"general": "[general]", "datasets": "[[datasets]]", "subsets": "[[datasets.subsets]]"}


ABOVE, ANYWHERE = ("general", "datasets"), tuple(TABLES)


DATASET_OPTIONS = {  # in which tables, what, default; None: the command line's or derived
    "resolution": (ABOVE, SIZE, None),
    "batch_size": (ABOVE, FROM_1, None),
    "enable_bucket": (ABOVE, SWITCH, False),
    "min_bucket_reso": (ABOVE, FROM_1, None),
    "max_bucket_reso": (ABOVE, FROM_1, None),
    "bucket_reso_steps": (ABOVE, SIDE, 64),
    "bucket_no_upscale": (ABOVE, SWITCH, False),
    "resize_interpolation": (ANYWHERE, METHOD, None),
    "num_repeats": (ANYWHERE, FROM_0, None),
    "flip_aug": (ANYWHERE, SWITCH, None),
    "random_crop": (ANYWHERE, SWITCH, False),
    "caption_extension": (ANYWHERE, EXTENSION, None),
    "class_tokens": (ANYWHERE, TEXT, None),
    "caption_prefix": (ANYWHERE, TEXT, ""),
    "caption_suffix": (ANYWHERE, TEXT, ""),
    "enable_wildcard": (ANYWHERE, SWITCH, False),
    "caption_separator": (ANYWHERE, SOME_TEXT, ","),
    "secondary_separator": (ANYWHERE, TEXT, ""),
    "keep_tokens": (ANYWHERE, FROM_0, 0),
    "keep_tokens_separator": (ANYWHERE, TEXT, ""),
    "shuffle_caption": (ANYWHERE, SWITCH, False),
    "caption_tag_dropout_rate": (ANYWHERE, SHARE, 0.0),
    "caption_dropout_rate": (ANYWHERE, SHARE, None),
    "caption_dropout_every_n_epochs": (ANYWHERE, FROM_0, 0),
    "image_dir": (("subsets",), SOME_TEXT, None),
    "is_reg": (("subsets",), SWITCH, False),
}


REFUSED_OPTIONS = {  # the value that says what happens anyway, and why no other is taken
    "alpha_mask": (False, "transparent parts become white"),
    "cache_info": (False, "captions and sizes are read from the files every time"),
    "color_aug": (False, "colours are kept as they are"),
    "conditioning_data_dir": (None, "loss masks are not supported"),
    "custom_attributes": ({}, "keep the class as it was with an is_reg subset"),
    "debug_dataset": (None, "it is a flag of another trainer"),
    "face_crop_aug_range": (None, "use random_crop, or crop the pictures beforehand"),
    "metadata_file": (None, "give image_dir, with a caption file beside each picture"),
    "network_multiplier": (1.0, "the adapter counts the same for all data"),
    "prior_loss_weight": (None, "it is a flag: --prior_loss_weight"),
    "token_warmup_min": (1, "captions do not grow with the steps"),
    "token_warmup_step": (0, "captions do not grow with the steps"),
    "validation_seed": (None, "no pictures are held out: judge by --validation_prompt"),
    "validation_split": (0.0, "no pictures are held out: judge by --validation_prompt"),
}


@dataclass
class ConfiguredExample(Example):
    """An example with what --dataset_config says of it."""

    options: dict = field(default_factory=dict)  # DATASET_OPTIONS
    repeats: int = 1  # times in an epoch
    dataset: int = 0  # batches keep to one
    bucket: tuple[int, int] | None = None  # (height, width)

    def sides(self):
        """(width, height) of the resolution."""
        return sides(self.options["resolution"])

    def varies(self):
        """Whether `prompt` is drawn anew for each sample."""
        return any(self.options[name] for name in ("shuffle_caption", "enable_wildcard", "caption_tag_dropout_rate"))

    def prompt(self, rng=None):
        """The caption as a sample has it; without `rng` the first of all choices, unshuffled and whole."""
        options, separator = self.options, self.options["caption_separator"]
        pick = (lambda choices: choices[rng.integers(len(choices))]) if rng else (lambda choices: choices[0])
        lines = self.caption.split("\n") if options["enable_wildcard"] else [self.caption]
        caption = " ".join(filter(None, (options["caption_prefix"], pick(lines), options["caption_suffix"])))
        if options["enable_wildcard"]:  # {a|b} is one of the two, {{ and }} are braces
            choose = lambda match: pick(match[1].split("|")) if match[1] else match[0][0]  # noqa: E731
            caption = re.sub(r"\{\{|\}\}|\{([^{}]+)\}", choose, caption)
        keep, mark = options["keep_tokens"], options["keep_tokens_separator"]
        shuffled, dropped = options["shuffle_caption"], options["caption_tag_dropout_rate"]
        if shuffled or dropped or mark and mark in caption:
            pieces = caption.split(mark, 2) if mark and mark in caption else [caption]
            fixed, *others = [[p.strip() for p in piece.split(separator) if p.strip()] for piece in pieces]
            fixed, flexible, tail = (fixed, *others, [])[:3] if others else (fixed[:keep], fixed[keep:], [])
            if rng and shuffled:
                flexible = [flexible[i] for i in rng.permutation(len(flexible))]
            if rng and dropped:
                flexible = [part for part in flexible if rng.random() >= dropped]
            caption = ", ".join([*fixed, *flexible, *tail])
        second = options["secondary_separator"]
        return caption.replace(second, separator) if second else caption


def default_options(args):
    """DATASET_OPTIONS where --dataset_config is silent."""
    return {name: default for name, (_, _, default) in DATASET_OPTIONS.items()} | {
        "resolution": args.resolution,
        "batch_size": args.train_batch_size,
        "resize_interpolation": args.image_interpolation_mode,
        "num_repeats": args.repeats,
        "flip_aug": args.random_flip,
        "random_crop": not (args.center_crop or args.dataset_config),
        "caption_dropout_rate": args.caption_dropout,
        "class_tokens": args.instance_prompt,
    }


def read_dataset_config(args):
    """Examples of --dataset_config; an option is the subset's, else its dataset's, [general]'s, the command line's."""
    path = args.dataset_config
    try:
        config = (json.loads if path.suffix == ".json" else tomllib.loads)(path.read_text("utf-8-sig"))
        if path.suffix == ".json":
            json.dumps(config, ensure_ascii=False).encode()  # half of a surrogate pair is no text
    except (OSError, ValueError, RecursionError) as error:
        return [], [f"--dataset_config {path}: cannot be read ({error})"]
    if not isinstance(config, dict):
        return [], [f"--dataset_config {path}: must hold general and datasets, not a {type(config).__name__}"]
    general, datasets = config.get("general", {}), tables_in(config.get("datasets"))
    problems = [f"{path}: {key} is neither [general] nor [[datasets]]" for key in config if key not in ABOVE]
    problems += option_problems(f"{path}, [general]", general, "general")
    if not datasets:
        problems.append(f"{path}: no [[datasets]] table in it")
    blocks = []
    for count, dataset in enumerate(datasets, 1):
        where, subsets = f"{path}, [[datasets]] {count}", tables_in(dataset.pop("subsets", None))
        problems += option_problems(where, dataset, "datasets")
        if not subsets:
            problems.append(f"{where}: no [[datasets.subsets]] table in it")
        subsets = [(f"{where}, subset {place}", subset) for place, subset in enumerate(subsets, 1)]
        problems += [problem for subset in subsets for problem in option_problems(*subset, "subsets")]
        blocks.append((where, dataset, subsets))
    examples = []
    for count, (where, dataset, subsets) in enumerate(blocks if not problems else []):
        shared = default_options(args) | general | dataset
        names = [subset["image_dir"] for _, subset in subsets]
        problems += [f"{where}: image_dir {name} twice: use num_repeats" for name in {*names} if names.count(name) > 1]
        problems += bucket_problems(where, shared)
        found = []
        for table, subset in subsets:
            if (shared | subset)["num_repeats"] == 0:
                continue
            read, wrong = read_subset(table, shared | subset, path.parent)
            found, problems = found + read, problems + wrong
        if found and all(example.options["is_reg"] for example in found):
            problems.append(f"{where}: is_reg pictures need a subset of others in the same dataset")
        for example in balance(found):
            example.dataset = count
            examples.append(example)
    return ([] if problems else examples), problems


def tables_in(value):
    """The tables of a list of tables, [] for anything else."""
    return value if isinstance(value, list) and all(isinstance(table, dict) for table in value) else []


def option_problems(where, table, level):
    """What is wrong with the names and values in a table of --dataset_config."""
    if not isinstance(table, dict):
        return [f"{where} must be a table, not {table!r}"]
    problems, allowed = [], [name for name, (levels, *_) in DATASET_OPTIONS.items() if level in levels]
    for name, value in table.items():
        if name in REFUSED_OPTIONS:
            harmless, reason = REFUSED_OPTIONS[name]
            problems += [f"{where}: {name} = {value!r} is not supported: {reason}"] if value != harmless else []
        elif name not in allowed:
            near = difflib.get_close_matches(name, DATASET_OPTIONS, 1)
            hint = f"did you mean {near[0]}?" if near else "no option has this name"
            if name in DATASET_OPTIONS:
                hint = f"it belongs in {' or '.join(TABLES[place] for place in DATASET_OPTIONS[name][0])}"
            problems.append(f"{where}: {name}: {hint} (allowed here: {', '.join(allowed)})")
        elif not OPTION_KINDS[DATASET_OPTIONS[name][1]](value):
            problems.append(f"{where}: {name} = {value!r} must be {DATASET_OPTIONS[name][1]}")
    if level == "subsets" and "image_dir" not in table:
        problems.append(f"{where}: image_dir is missing")
    return problems


def read_subset(where, options, beside):
    """Examples of one subset; image_dir is relative to the working folder, or else to the file's, `beside`."""
    named = Path(options["image_dir"])
    with contextlib.suppress(RuntimeError):  # no such user
        named = named.expanduser()
    folder = next((path for path in (named, beside / named) if path.is_dir()), None)
    if folder is None:
        return [], [f"{where}: image_dir {named}: no such folder here or in {beside}"]
    paths, problems = picture_files(folder)
    problems += [] if paths else [f"{where}: image_dir {named}: no pictures ({', '.join(IMAGE_SUFFIXES)}) in it"]
    suffix = "." + (options["caption_extension"] or "caption").lstrip(".")
    strays = [path.with_suffix(".txt") for path in paths if not path.with_suffix(suffix).exists()]
    strays = [] if options["caption_extension"] else [path for path in strays if path.exists()]
    problems += [f'{path}: is it a caption? Say caption_extension = ".txt" or "{suffix}"' for path in strays[:1]]
    examples = []
    for path in paths:
        caption, text_file = options["class_tokens"], path.with_suffix(suffix)
        if text_file.exists():
            text = read_text_file(text_file, problems)
            if text is None:
                continue
            lines = [line.strip() for line in text.splitlines() if line.strip()]
            caption = "\n".join(lines if options["enable_wildcard"] else lines[:1])
            problems += [] if lines else [f"{text_file}: empty; delete it to use class_tokens"]
        elif not caption:
            problems.append(f"{path}: no caption: write {text_file.name}, or give class_tokens")
        read = functools.partial(Image.open, path)
        examples.append(ConfiguredExample(str(path), read, caption, options, repeats=options["num_repeats"]))
    return (examples if not problems else []), problems


def balance(examples):
    """Regularisation pictures as often as the others together: in order, with their repeats, then all round again."""
    own, others = ([e for e in examples if e.options["is_reg"] == kind] for kind in (False, True))
    order = itertools.chain((e for e in others for _ in range(e.repeats)), itertools.cycle(others))
    taken = Counter(map(id, itertools.islice(order, sum(example.repeats for example in own))))
    for example in others:
        example.repeats = taken[id(example)]
    return [example for example in examples if example.repeats]


def sides(resolution):
    """(width, height) of a resolution in --dataset_config."""
    return tuple(resolution) if isinstance(resolution, list) else (resolution, resolution)


def bucket_problems(where, options):
    """Limits of buckets that contradict the resolution."""
    width, height = sides(options["resolution"])
    low, high, step = (options[name] for name in ("min_bucket_reso", "max_bucket_reso", "bucket_reso_steps"))
    if not options["enable_bucket"]:
        return []
    problems = [f"bucket_reso_steps {step} is more than the resolution"] if step > math.isqrt(width * height) else []
    if not options["bucket_no_upscale"]:
        problems += [f"min_bucket_reso {low} is more than the resolution"] if low and low > min(width, height) else []
        problems += (
            [f"max_bucket_reso {high} is less than the resolution"] if high and high < max(width, height) else []
        )
    return [f"{where}: {problem} {options['resolution']}" for problem in problems]


@functools.cache
def bucket_sizes(width, height, low, high, step):
    """Sorted (height, width) in steps of `step` with about the area of width x height and sides from `low` to `high`.

    Without limits, sides start at 256 (half of a smaller resolution) and go as far as the area does.
    """
    area, side = width * height, math.isqrt(width * height)
    low = max((low or min(256, side // 2)) // step, 1) * step
    high = math.ceil((high or area / low) / step) * step
    sizes = {(side // step * step, side // step * step)}
    for across in range(low, high + 1, step):
        down = min(high, area // across // step * step)
        sizes |= {(down, across), (across, down)} if down >= low else set()
    return sorted(sizes)


def dataset_bucket(size, options):
    """The (height, width) that a picture of (width, height) `size` is resized to cover and cropped to."""
    (width, height), (across, down), step = size, sides(options["resolution"]), options["bucket_reso_steps"]
    if not options["enable_bucket"]:
        return down, across
    if not options["bucket_no_upscale"]:
        sizes = bucket_sizes(across, down, options["min_bucket_reso"], options["max_bucket_reso"], step)
        return min(sizes, key=lambda b: (b != (height, width), abs(b[1] / b[0] - width / height)))
    if width * height > across * down:  # one side becomes a multiple of the step: the one that distorts less
        ratio = width / height
        wide, high = (round(math.sqrt(across * down * r)) // step * step for r in (ratio, 1 / ratio))
        fits = [(wide, int(wide / ratio + 0.5)), (int(high * ratio + 0.5), high)]
        width, height = min(fits, key=lambda s: abs(max(s[0] // step, 0.1) / max(s[1] // step, 0.1) - ratio))
    if min(width, height) < step:
        raise ValueError(f"{width} x {height} pixels are less than bucket_reso_steps {step}")
    return height // step * step, width // step * step


def find_examples(args):
    """The training pictures with their captions, and what is wrong with them: (examples, problems)."""
    sources = {"dataset_config": read_dataset_config, "dataset_name": read_dataset, "instance_data_dir": read_folder}
    source = next(name for name in sources if getattr(args, name))
    examples, problems = sources[source](args)
    if not examples and not problems:
        problems.append(f"--{source} {getattr(args, source)}: no pictures ({', '.join(IMAGE_SUFFIXES)}) in it")

    sizes = buckets(args)

    def look(example):
        size = example.image().size
        example.bucket = dataset_bucket(size, example.options) if args.dataset_config else nearest_bucket(size, sizes)

    problems += check_pictures(examples + class_examples(args), look)
    for example in examples:
        if args.instance_prompt and isinstance(example.caption, str) and not example.caption.strip():
            example.caption = None
    captions = [example.caption or args.instance_prompt or "" for example in examples]
    if args.train_text_encoder_ti:
        names = names_in(args.token_abstraction)
        used = {name for text in captions for name in any_of(names).findall(text)}
        unused = [name for name in names if name not in used]
        problems += [f"--token_abstraction {name}: in no caption and not in --instance_prompt" for name in unused]
    if not args.dataset_config:
        for example in examples:
            example.options, example.repeats = default_options(args), args.repeats
    return examples, problems + check_captions(examples, args)


def nearest_bucket(size, sizes):
    """Of (height, width) `sizes` the one nearest to a picture's (width, height) in aspect ratio, then in area."""
    width, height = size

    def distance(bucket):
        across, down = math.log(width / bucket[1]), math.log(height / bucket[0])
        return round(abs(across - down), 6), abs(across + down)

    return min(sizes, key=distance)


def class_examples(args):
    """Examples of the pictures that --class_data_dir holds, at most --num_class_images."""
    folder, options = args.class_data_dir, default_options(args)
    paths = picture_files(folder)[0][: args.num_class_images] if folder and folder.is_dir() else []
    return [
        ConfiguredExample(str(path), functools.partial(Image.open, path), args.class_prompt, options) for path in paths
    ]


def read_folder(args):
    """Examples of --instance_data_dir: captions from metadata.jsonl, else from the .txt file beside each picture."""
    folder, examples = args.instance_data_dir, []
    if not folder.is_dir():
        return [], [f"--instance_data_dir {folder}: no such folder"]
    paths, problems = picture_files(folder)
    captions, flaws = read_captions(folder, paths, args)
    for path in paths:
        caption = captions.get(path.name)
        if caption is None:
            caption = read_text_file(path.with_suffix(".txt"), problems)
        examples.append(ConfiguredExample(str(path), functools.partial(Image.open, path), caption))
    return examples, problems + flaws


def read_dataset(args):
    """Examples of --dataset_name."""
    columns = [args.image_column], list(filter(None, [args.caption_column]))
    dataset, problems = open_dataset(args, lambda names: columns)
    if problems:
        return [], problems
    captions = dataset[args.caption_column] if args.caption_column else [None] * len(dataset)
    return [
        ConfiguredExample(
            f"{args.dataset_name}[{row}]", functools.partial(read_row, dataset, row, args.image_column), caption
        )
        for row, caption in enumerate(captions)
    ], []


class DreamBoothDataset(Dataset):
    """Samples by (epoch, index): the posterior of the picture's latents if cached, else its pixels; and its caption.
    With prior preservation, a list of two: the picture's and that of a class picture.

    Where a picture is cropped depends on (seed, index), whether it is mirrored and loses its caption on (seed, epoch,
    index), and so does which class picture goes with it: neither workers, nor the cache, nor an interruption change
    what is drawn.
    """

    def __init__(self, examples, args):
        rounds = range(max((example.repeats for example in examples), default=0))
        self.examples = [example for i in rounds for example in examples if i < example.repeats]
        first = {}  # repeats of a picture that is cropped in the centre share its latents
        self.pictures = [
            i if example.options["random_crop"] else first.setdefault(id(example), i)
            for i, example in enumerate(self.examples)
        ]
        self.class_examples = []
        self.args = args
        self.moments = {}  # (index, bucket, flipped): [2C, h, w]; class pictures come after the examples

    def picture_keys(self):
        """(index, bucket, flipped) of all that training can ask for."""
        own = [(index, self.examples[index]) for index in dict.fromkeys(self.pictures)]
        used = [(index, example.bucket, example.options["flip_aug"]) for index, example in own]
        others, sizes = enumerate(self.class_examples, len(self.examples)), sorted({bucket for _, bucket, _ in used})
        used += [(index, size, example.options["flip_aug"]) for index, example in others for size in sizes]
        return [(*key, flipped) for *key, flips in used for flipped in ((False, True) if flips else (False,))]

    def pixel_values(self, key):
        """A picture, resized to cover its bucket, cropped and perhaps mirrored: [3, H, W] in [-1, 1]."""
        index, (height, width), flipped = key
        own = len(self.examples)
        example = self.examples[index] if index < own else self.class_examples[index - own]
        anywhere = np.random.default_rng((self.args.seed, index)).random(2)
        centering = anywhere if example.options["random_crop"] else (0.5, 0.5)
        method = Image.Resampling[KOHYA_INTERPOLATION[example.options["resize_interpolation"]].upper()]
        image = ImageOps.fit(example.image(), (width, height), method, centering=tuple(centering))
        image = ImageOps.mirror(image) if flipped else image
        return to_tensor(image)

    def __getitem__(self, position):
        (epoch, index), args = position, self.args
        rng = np.random.default_rng((args.seed, epoch, index))
        drop, flip = rng.random(2)
        example = self.examples[index]
        bucket, options = example.bucket, example.options
        key = self.pictures[index], bucket, bool(options["flip_aug"] and flip < 0.5)
        every = options["caption_dropout_every_n_epochs"]
        dropped = drop < options["caption_dropout_rate"] or every and (epoch + 1) % every == 0
        weight = args.prior_loss_weight if options["is_reg"] else 1.0
        samples = [self.sample(key, "" if dropped else example.prompt(rng), weight)]
        if self.class_examples:
            index, flip = len(self.examples) + int(rng.integers(len(self.class_examples))), rng.random()
            key = index, bucket, bool(args.random_flip and flip < 0.5)
            samples.append(self.sample(key, args.class_prompt, args.prior_loss_weight))
        return samples

    def sample(self, key, prompt, weight):
        values = {"moments": self.moments[key]} if self.moments else {"pixel_values": self.pixel_values(key)}
        return {"prompt": prompt, "weight": torch.tensor(weight), **values}

    def __len__(self):
        return len(self.examples)


# ---------------------------------------------------------------------------------------------------------------------
# Training
# ---------------------------------------------------------------------------------------------------------------------


def lora_file(args, epoch=None):
    """Where the LoRA goes, or with --save_every_n_epochs that of an epoch."""
    if not args.output_name:
        return args.output_dir / "pytorch_lora_weights.safetensors"
    return args.output_dir.with_name(f"{args.output_name}{f'-{epoch:06d}' if epoch else ''}.safetensors")


def save_named_lora(args, adapted, examples, guided, dtype, epoch=None):
    """NAME.safetensors for ComfyUI, Forge and diffusers; its header says what it is and which words call it."""
    layers, captions = lora_layers(adapted), {}
    own = [example for example in examples if not example.options["is_reg"]]
    for example in own:
        folder = captions.setdefault(Path(example.name).parent.name, {})
        for tag in names_in(example.prompt().lower()):
            folder[tag] = folder.get(tag, 0) + example.repeats
    path = lora_file(args, epoch)
    if torch.distributed.is_initialized() and torch.distributed.get_rank():
        return
    header = lora_header(
        layers,
        name=path.stem,
        base_model="flux-1-dev" if guided else "flux-1-schnell",
        resolution=own[0].sides(),
        trigger_words=dict.fromkeys(filter(None, (example.options["class_tokens"] for example in own))),
        captions=captions,
    )
    write_lora(path, layers, args.save_format, header, dtype)


def pipeline_call(text, prompt, args):
    """The pipeline's arguments for a picture of `prompt`."""
    prompt_embeds, pooled_prompt_embeds = text([prompt])
    return {
        "prompt_embeds": prompt_embeds,
        "pooled_prompt_embeds": pooled_prompt_embeds,
        "height": args.resolution,
        "width": args.resolution,
    }


def validate(accelerator, transformer, vae, noise_scheduler, text, args, *, prompt, step):
    """Draws a prompt and sends the pictures to validation/step-N.png and the trackers."""
    pipeline = sampling_pipeline(FluxPipeline, accelerator.unwrap_model(transformer), vae, noise_scheduler)
    with (
        undisturbed(transformer, device=accelerator.device),
        offload_models(vae, device=accelerator.device, offload=args.offload or args.cache_latents),
    ):
        call = pipeline_call(text, prompt, args)
        images = generate_images(accelerator, pipeline, [call] * args.num_validation_images, seed=args.seed)
    captions = [f"seed {args.seed + i}" for i in range(len(images))]
    save_images(accelerator, args, images, captions, prompt=prompt, step=step)


def describe(args, dtype, text, prompt, embeddings_name, hub_repo=None):
    """README.md in the output folder: what was trained on what, and how to draw `prompt` with it.

    The files are those in the output folder, or with `hub_repo` those on the hub.
    """
    folder = args.output_dir.resolve()
    base = "black-forest-labs/FLUX.1-dev" if single_file(args) else args.pretrained_model_name_or_path
    model = [repr(base), f"dtype={dtype}"]
    model += [f"{name}={getattr(args, name)!r}" for name in ("revision", "variant") if getattr(args, name)]
    lora = lora_file(args).resolve()
    adapter, load, imports = [f"LoRA of rank {args.rank} and alpha {args.lora_alpha}"] if lora.exists() else [], [], ""
    if adapter:
        load.append(f"pipeline.load_lora_weights({(hub_repo or str(lora.parent))!r}, weight_name={lora.name!r})")
    if text.new_tokens:
        imports = "\nfrom huggingface_hub import hf_hub_download" if hub_repo else ""
        imports += "\nfrom safetensors.torch import load_file"
        embeddings = f"hf_hub_download({hub_repo!r}, {embeddings_name!r})" if hub_repo else ""
        load.append(f"rows = load_file({embeddings or repr(str(folder / embeddings_name))})")
        if single_file(args):  # trained so, as ComfyUI draws; FLUX.1-dev's folder says 2: pool at the last new token
            load.append("pipeline.text_encoder.eos_token_id = pipeline.tokenizer.eos_token_id")
    words = [f"new tokens `{tokens}` for {word}" for word, tokens in text.abstractions.items()]
    parts = {"clip_l": ("text_encoder", "tokenizer"), "t5": ("text_encoder_2", "tokenizer_2")}
    for kind, new in text.new_tokens.items():
        tokens, (encoder, tokenizer) = [f"<s{i}>" for i in range(len(new.rows))], parts[kind]
        rows = f'rows["{kind}"], token={tokens}'
        load.append(
            f"pipeline.load_textual_inversion(\n"
            f"    {rows}, text_encoder=pipeline.{encoder}, tokenizer=pipeline.{tokenizer}\n)"
        )
    load = "\n".join(load)
    size = f"height={args.resolution}, width={args.resolution}, max_sequence_length={args.max_sequence_length}"
    description = f"""
# {folder.name}

For {args.pretrained_model_name_or_path}: {", ".join(adapter + words)}, by DreamBooth.

```python
import torch
from diffusers import FluxPipeline{imports}

pipeline = FluxPipeline.from_pretrained({", ".join(model)})
{load}
pipeline.to("cuda" if torch.cuda.is_available() else "cpu")
image = pipeline({text.replace(prompt)!r}, {size}).images[0]
image.save("image.png")
```
"""
    tags = ["text-to-image", "flux", "lora", "dreambooth", "diffusers"]
    words = list(text.abstractions) or list(filter(None, [args.instance_prompt]))
    write_model_card(args, description, tags, base, words, instance_prompt=args.instance_prompt)


def trained_until(args, max_train_steps, checkpoint):
    """[text encoders, transformer]: the step after which each is trained no more.

    What had ended before the checkpoint stays so, also if the run is to have more steps now.
    """
    text = args.train_text_encoder_frac if args.train_text_encoder else 0.0
    shares = args.train_text_encoder_ti_frac if args.train_text_encoder_ti else text, args.train_transformer_frac
    stops = [math.ceil(round(share * max_train_steps, 6)) for share in shares]
    saved = checkpoint_state(checkpoint) if checkpoint and not checkpoint_damage(checkpoint) else {}
    pairs = zip(saved.get("trained_until", stops), stops, strict=True)
    return [old if old < saved.get("global_step", 0) else new for old, new in pairs]


def register_embedding_checkpointing(accelerator, text):
    """Makes checkpoints hold the new tokens' rows, under one name whatever folder a run goes to."""
    name = "learned_emb.safetensors"

    def save(models, weights, output_dir):
        if accelerator.is_main_process:
            text.save_embeddings(Path(output_dir) / name)

    accelerator.register_save_state_pre_hook(save)
    accelerator.register_load_state_pre_hook(lambda models, input_dir: text.load_embeddings(Path(input_dir) / name))


def about_data(examples, text):
    """What of the data and the new tokens is told before training."""
    own_captions = sum(example.caption != example.options["class_tokens"] for example in examples)
    sizes = ", ".join(sorted({"{} x {}".format(*example.sides()) for example in examples}))
    about = {"data": f"{len(examples)} pictures at {sizes} px, {own_captions} with captions of their own"}
    if text.new_tokens:
        tokens = ", ".join(f"{tokens} for {name}" for name, tokens in text.abstractions.items())
        about["tokens"] = f"{tokens} in {' and '.join(text.new_tokens)}"
    return about


def main(args):
    # 1. Accelerator, logging, seed
    accelerator, weight_dtype = start(args)
    device, quiet = accelerator.device, not accelerator.is_main_process
    set_seed(args.seed)

    # 2. Data
    examples, problems = find_examples(args)
    dataset = DreamBoothDataset(examples, args)
    num_processes, accumulation = accelerator.num_processes, args.gradient_accumulation_steps
    total_batch_size = args.train_batch_size * accumulation * num_processes
    sampler = StepSampler(
        [(example.dataset, example.bucket) for example in dataset.examples],
        {(example.dataset, example.bucket): example.options["batch_size"] for example in examples},
        seed=args.seed,
        process_index=accelerator.process_index,
        num_processes=num_processes,
    )
    steps_per_epoch = math.ceil(sampler.steps_per_epoch / accumulation)
    max_train_steps = args.max_train_steps or args.num_train_epochs * steps_per_epoch
    checkpoint = checkpoint_to_resume(args.output_dir, args.resume_from_checkpoint)
    text_stop, transformer_stop = stops = trained_until(args, max_train_steps, checkpoint)
    max_train_steps = max(stops)
    validation_steps = args.validation_steps or args.validation_epochs * steps_per_epoch
    run = run_settings(args, len(dataset), num_processes)
    if args.dataset_config and not problems:
        run["the hash of --dataset_config"] = hashlib.sha256(args.dataset_config.read_bytes()).hexdigest()[:16]
    problems += check_run(accelerator, args, max_train_steps, checkpoint, run)
    if problems:
        fail(accelerator, problems)
    hub_repo = create_hub_repo(accelerator, args)
    args.output_dir.mkdir(parents=True, exist_ok=True)

    # 3. Prompts: frozen text encoders are gone before the transformer is loaded
    final_prompt = None if args.skip_final_inference else args.final_validation_prompt or args.validation_prompt
    prompts = {example.prompt() for example in examples if not example.varies()}
    dropout = ("caption_dropout_rate", "caption_dropout_every_n_epochs")
    prompts |= {"" for example in examples for name in dropout if example.options[name]}
    prompts |= {prompt for prompt in (args.validation_prompt, final_prompt, args.class_prompt) if prompt}
    prompts = sorted(prompts)
    pipeline = (
        load_file_pipeline(args, weight_dtype)
        if single_file(args)
        else load_text_pipeline(FluxPipeline, args, weight_dtype)
    )
    text = TokenEncoder(accelerator, pipeline, args, weight_dtype, keep=any(example.varies() for example in examples))
    text.cache(prompts)

    # 4. VAE, transformer, class images, latents, LoRA
    noise_scheduler = load_flux_scheduler(args)
    offload = args.offload or args.cache_latents
    vae = load_part(AutoencoderKL, "vae", args, weight_dtype).to("cpu" if offload else device)
    transformer = None
    with offload_models(vae, device=device, offload=offload):
        if args.with_prior_preservation:
            transformer = load_part(FluxTransformer2DModel, "transformer", args, weight_dtype).to(device)
            pipeline = sampling_pipeline(FluxPipeline, transformer, vae, noise_scheduler)
            call = pipeline_call(text, args.class_prompt, args)
            draw_class_images(accelerator, pipeline, call, args, present=len(class_examples(args)))
            dataset.class_examples = class_examples(args)
        if args.cache_latents:
            folder = args.disk_cache_dir.expanduser() if args.cache_latents_to_disk else None
            dataset.moments = cache_moments(accelerator, vae, dataset.picture_keys(), dataset.pixel_values, folder)
    transformer = transformer or load_part(FluxTransformer2DModel, "transformer", args, weight_dtype)
    base_size = sum(parameter.numel() for parameter in transformer.parameters())
    quantize_base(transformer, weight_dtype, args.quantize_base).to(first_device(accelerator, args))
    if args.train_transformer_frac > 0:
        add_lora(
            transformer,
            rank=args.rank,
            alpha=args.lora_alpha,
            dropout=args.lora_dropout,
            target_modules=lora_targets(args, transformer),
        )
    prepare_blocks(transformer, args, device, weight_dtype)
    params = {name: parameter for name, parameter in transformer.named_parameters() if parameter.requires_grad}
    lora_params = list(params.values())
    adapted = {"transformer": transformer} if lora_params else {}
    if text.lora_params:
        adapted["text_encoder"] = text.encoders["clip_l"]
    guided = transformer.config.guidance_embeds
    save_dtype = torch.float32 if args.upcast_before_saving else weight_dtype

    # 5. Optimizer and schedule
    optimizer = create_optimizer(args, lora_params, total_batch_size if args.scale_lr else 1, text.parameters())
    lr_scheduler = create_lr_scheduler(args, optimizer, max_train_steps)

    # 6. Prepare and resume
    if args.fsdp or not lora_params:
        lr_scheduler = accelerator.prepare(lr_scheduler)
        optimizer = optimizer if args.fsdp else accelerator.prepare(optimizer)
    else:
        transformer, optimizer, lr_scheduler = accelerator.prepare(transformer, optimizer, lr_scheduler)
    register_lora_checkpointing(accelerator, FluxPipeline, adapted, optimizer)
    register_embedding_checkpointing(accelerator, text)
    global_step = load_checkpoint(accelerator, checkpoint, lr_scheduler)
    sampler.start, sampler.stop = global_step * accumulation, max_train_steps * accumulation
    train_dataloader = DataLoader(
        dataset, batch_sampler=sampler, collate_fn=collate, num_workers=args.dataloader_num_workers
    )

    # 7. Train
    about = about_data(examples, text) | about_text(args, text, text_stop)
    batch = " or ".join(map(str, sorted({example.options["batch_size"] for example in examples})))
    print_header(accelerator, args, about, lora_params, base_size, max_train_steps, steps_per_epoch, batch)
    marks = {"pivot: text encoders frozen": text_stop, "transformer frozen": transformer_stop}
    start_logging(accelerator, args, "dreambooth-flux", global_step, marks)
    draw = functools.partial(validate, accelerator, transformer, vae, noise_scheduler, text, args)
    if text.trained and global_step >= text_stop:
        text.freeze(prompts)
    if args.validation_prompt and global_step == 0:
        draw(prompt=args.validation_prompt, step=0)
    metrics = open_metrics(args.output_dir / "metrics.jsonl", global_step) if accelerator.is_main_process else None
    transformer.train()
    progress_bar = tqdm(total=max_train_steps, initial=global_step, desc="Training", unit="step", disable=quiet)
    loss_sum, pictures, skipped, signals, started = 0.0, 0, 0, catch_signals(), time.perf_counter()
    for micro_step, batch in enumerate(read_batches(train_dataloader), start=sampler.start):
        with accelerator.accumulate(transformer):
            generator = step_generator(args.seed, *divmod(micro_step, accumulation), accelerator.process_index)
            torch.manual_seed(generator.initial_seed())  # dropout draws from the global generator
            if "moments" in batch:
                moments = batch["moments"].to(device)
            else:
                with offload_models(vae, device=device, offload=offload):
                    moments = encode_moments(vae, batch["pixel_values"])
            prompt_embeds, pooled_prompt_embeds = text(batch["prompt"])
            with accelerator.autocast():
                losses = compute_loss(
                    transformer,
                    sample_latents(moments, vae.config, generator),
                    prompt_embeds,
                    pooled_prompt_embeds,
                    args=args,
                    noise_scheduler=noise_scheduler,
                    guidance=torch.full((len(moments),), args.guidance_scale, device=device) if guided else None,
                    generator=generator,
                )
            kinds = 2 if args.with_prior_preservation else 1  # of pictures in a batch, whose mean losses are added
            loss = kinds * (losses * batch["weight"].to(device)).mean()
            accelerator.backward(loss)
            loss_sum = loss_sum + loss.detach() / accumulation
            pictures += len(losses) // kinds * num_processes
            if not accelerator.sync_gradients:
                continue
            reduce_gradients(accelerator, text.parameters())
            if global_step >= transformer_stop:
                for parameter in lora_params:
                    parameter.grad = None
            grad_norm = accelerator.clip_grad_norm_([*lora_params, *text.parameters()], args.max_grad_norm)
            totals = torch.stack([loss_sum, torch.tensor(float(len(signals)), device=device)])
            mean_loss, interrupted = accelerator.reduce(totals, reduction="mean").tolist()
            # a gradient scaler (fp16) skips infinite gradients itself
            finite = math.isfinite(mean_loss) and (accelerator.scaler is not None or math.isfinite(grad_norm))
            if finite or accelerator.scaler is not None:
                optimizer.step()
                for new_tokens in text.new_tokens.values() if text.trained else ():
                    new_tokens.pull()
            lr_scheduler.step()
            optimizer.zero_grad()

        global_step += 1
        if text.trained and global_step == text_stop:
            text.freeze(prompts)
        skipped = 0 if finite else count_skipped(skipped, global_step)
        logs = {"loss": mean_loss, **step_logs(optimizer, grad_norm, pictures, started, device)}
        log_step(accelerator, progress_bar, metrics, global_step, logs)
        done = global_step == max_train_steps
        epoch, rest = divmod(global_step, steps_per_epoch)
        whole = args.save_every_n_epochs and not rest and epoch % args.save_every_n_epochs == 0
        if whole and adapted and not done:
            save_named_lora(args, adapted, examples, guided, save_dtype, epoch)
        # after the file of the epoch, which a run resumed from here does not write
        if interrupted or global_step % args.checkpointing_steps == 0:
            state = run | {"trained_until": stops}
            checkpoint = save_checkpoint(
                accelerator, args.output_dir, global_step, state, args.checkpoints_total_limit
            )
        if interrupted and not done:
            transformer = draw = None  # see below
            stop_interrupted(accelerator, global_step, checkpoint, signals)
        if args.validation_prompt and global_step % validation_steps == 0 and not done:
            draw(prompt=args.validation_prompt, step=global_step)
        loss_sum, pictures, started = 0.0, 0, time.perf_counter()
    progress_bar.close()

    # 8. Save and final validation
    if args.output_name and adapted:
        save_named_lora(args, adapted, examples, guided, save_dtype)
    else:
        save_lora(args.output_dir, FluxPipeline, adapted, save_dtype)
    shown_prompt = final_prompt or args.instance_prompt or examples[0].prompt()
    if accelerator.is_main_process:
        embeddings_name = f"{args.output_dir.resolve().name}_emb.safetensors"
        text.save_embeddings(args.output_dir / embeddings_name)
        text.export_embeddings(args.output_dir / "embeddings")
        metrics.close()
        plot_metrics(args.output_dir)
    if final_prompt:
        draw(prompt=final_prompt, step=global_step)
    if accelerator.is_main_process:
        describe(args, weight_dtype, text, shown_prompt, embeddings_name, hub_repo)
    transformer = draw = None  # what DistributedDataParallel frees after the process group can hang in gloo
    accelerator.free_memory()
    accelerator.end_training()
    lora = lora_file(args)
    results = {
        "LoRA": lora.absolute(),
        "tokens": f"{args.output_dir.resolve().name}_emb.safetensors",
        "words": "embeddings",
        "usage": "README.md",
        "loss": "loss.png",
        "pictures": "validation",
    }
    command = f"dreambooth/generate.py {shlex.quote(str(args.output_dir))} --prompt {shlex.quote(shown_prompt)}"
    beside = lora if args.output_name and lora.exists() else None
    finish(accelerator, args, global_step, results, command, hub_repo, beside=beside)


if __name__ == "__main__":
    main(parse_args())
