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
    atomic_write,
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
)
from common.data import (
    IMAGE_SUFFIXES,
    INTERPOLATION,
    Example,
    StepSampler,
    check_captions,
    check_pictures,
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
    encode_moments,
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
    compile_blocks,
    first_device,
    load_model,
    load_scheduler,
    quantize_base,
    shard,
)
from common.text_encoders import CLIP_TARGET_MODULES, PromptEncoder, freeze_models, load_text_pipeline
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
from common.validation import draw_class_images, generate_images, save_images, undisturbed

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import ProjectConfiguration, set_seed
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel
from diffusers.loaders.single_file_utils import convert_ldm_vae_checkpoint
from diffusers.optimization import get_scheduler
from diffusers.training_utils import compute_loss_weighting_for_sd3, offload_models, parse_buckets_string
from diffusers.utils import logging as diffusers_logging
from PIL import Image, ImageOps
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch.utils.data import DataLoader, Dataset
from tqdm.auto import tqdm
from transformers import AutoTokenizer, CLIPTextConfig, CLIPTextModel, T5Config, T5EncoderModel
from transformers.utils import logging as transformers_logging


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


def buckets(args):
    """The (height, width) that pictures are cropped to."""
    if args.aspect_ratio_buckets is None:
        return [(args.resolution, args.resolution)]
    return parse_buckets_string(args.aspect_ratio_buckets)


def check_model(args):
    """Problems of --pretrained_model_name_or_path, --lora_layers and the disk, from the transformer's config alone."""
    flag = f"--pretrained_model_name_or_path {args.pretrained_model_name_or_path}"
    files = (args.ae, args.clip_l, args.t5xxl, args.tokenizer_dir)
    if not is_single_file(args) and any(files):
        return [f"--ae, --clip_l, --t5xxl and --tokenizer_dir belong to a .safetensors file, but: {flag}"]
    if is_single_file(args) and (problems := check_single_files(args)):
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
    targets = lora_target_modules(args, transformer)
    unknown = unknown_layers(transformer, targets)
    if unknown:
        return [
            f"--lora_layers: the transformer has no linear layer {', '.join(unknown)}; kohya means all in the blocks"
        ]
    sizes = [sum(layer.weight.shape) for name, layer in target_layers(transformer, targets)]
    needed = 16 * args.rank * sum(sizes)  # bytes of a checkpoint, its two moments and the result
    return check_disk(args, needed)


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
        self.std = embedding.weight.float().std()

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
            # noise is drawn for every row, used or not
            rows = torch.randn(len(new_tokens), table.shape[1], generator=generator) * table.std()
            for row, token_id in enumerate(initial_ids[name]):
                if token_id is not None:
                    rows[row] = table[token_id]
            self.embeddings[name] = ExtendedEmbedding(embedding, first_new_id, rows)
            text_encoders[name].set_input_embeddings(self.embeddings[name])

    def replace_abstractions(self, prompt: str) -> str:
        """The prompt with the new tokens in place of the abstractions."""
        if not self.abstractions:
            return prompt
        return match_any(self.abstractions).sub(lambda match: self.abstractions[match[0]], prompt)

    def parameters(self) -> list[torch.nn.Parameter]:
        return [embedding.new_rows for embedding in self.embeddings.values()]

    @torch.no_grad()
    def retract_embeddings(self) -> None:
        """Moves the spread of the new rows towards that of the table, as the pivotal tuning of cog-sdxl does."""
        for embedding in self.embeddings.values():
            rows = embedding.new_rows
            rows *= (embedding.std.to(rows.device) / rows.std()) ** 0.1

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
            file_name = re.sub(r"[^\w.-]+", "_", abstraction) + ".safetensors"
            comfyui = {"t5xxl" if name == "t5" else name: values for name, values in rows.items()}
            save_tensors(comfyui, folder / "comfyui" / file_name)
            save_tensors({"clip_l": rows["clip_l"]}, folder / "forge" / file_name)
            first = after

    def register_checkpointing(self, accelerator: Accelerator) -> None:
        """Makes `accelerator.save_state` and `load_state` handle the new rows."""
        name = "learned_emb.safetensors"

        def save(models, weights, output_dir):
            if accelerator.is_main_process:
                self.save_embeddings(Path(output_dir) / name)

        def load(models, input_dir):
            self.load_embeddings(Path(input_dir) / name)

        accelerator.register_save_state_pre_hook(save)
        accelerator.register_load_state_pre_hook(load)


def add_new_tokens(pipeline, args):
    """The handler of the tokens that --train_text_encoder_ti adds to a pipeline, in CLIP or in CLIP and T5."""
    embedding_handler = TokenEmbeddingsHandler()
    if not args.train_text_encoder_ti:
        return embedding_handler
    text_encoders = {"clip_l": pipeline.text_encoder}
    tokenizers = {"clip_l": pipeline.tokenizer}
    if args.enable_t5_ti:
        text_encoders["t5"] = pipeline.text_encoder_2
        tokenizers["t5"] = pipeline.tokenizer_2
    abstractions = names_in(args.token_abstraction)
    concepts = names_in(args.initializer_concept) or [None]
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


def match_any(words):
    """A regular expression for any of the words, the longest first: TOK2 is not TOK."""
    longest_first = sorted(words, key=len, reverse=True)
    return re.compile("|".join(re.escape(word) for word in longest_first))


def load_vae(args, dtype):
    if is_single_file(args):
        return load_vae_file(args.ae, dtype)
    return load_model(AutoencoderKL, "vae", args, dtype)


def load_transformer(args, dtype):
    if is_single_file(args):
        return load_transformer_file(args.pretrained_model_name_or_path, dtype)
    return load_model(FluxTransformer2DModel, "transformer", args, dtype)


def load_text_encoders(args, dtype):
    """A FluxPipeline with frozen text encoders and tokenizers alone."""
    if is_single_file(args):
        return load_text_encoder_files(args, dtype)
    return load_text_pipeline(FluxPipeline, args, dtype)


def load_noise_scheduler(args):
    if is_single_file(args):
        config = transformer_config(args)
        return create_scheduler(is_dev=config["guidance_embeds"])
    return load_scheduler(args)


def lora_target_modules(args, transformer):
    """The layers that --lora_layers names; "kohya" means every linear layer in the blocks, as in its sd-scripts."""
    if args.lora_layers != "kohya":
        return names_in(args.lora_layers) or list(FLUX_TARGET_MODULES)
    layers = []
    for name, module in transformer.named_modules():
        if isinstance(module, torch.nn.Linear) and "transformer_blocks." in name:
            layers.append(name)
    return layers


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
        used = {name for text in captions for name in match_any(names).findall(text)}
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

    def image_keys(self):
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
        return {"prompt": prompt, "loss_weight": torch.tensor(weight), **values}

    def __len__(self):
        return len(self.examples)


def collate_fn(examples):
    """A batch of samples: first those of the instance images, then, with prior preservation, the class images."""
    samples = [sample for position in zip(*examples, strict=True) for sample in position]
    batch = {"prompt": [sample["prompt"] for sample in samples]}
    for name in samples[0].keys() - {"prompt"}:
        batch[name] = torch.stack([sample[name] for sample in samples])
    return batch


# ---------------------------------------------------------------------------------------------------------------------
# Single files: FLUX.1 as its authors and ComfyUI publish it, four .safetensors instead of a folder of diffusers'
# ---------------------------------------------------------------------------------------------------------------------


CHECKPOINT_PREFIX = "model.diffusion_model."  # of the transformer's keys in all-in-one checkpoints

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
        missing = [key for key in known_keys if key not in shapes]
        if missing:
            problems.append(f"--{flag} {path}: holds no {missing[0]}, so it is not the file of FLUX.1 in its own form")
        elif any(key.endswith(("scale_weight", "weight_scale", "scaled_fp8")) for key in shapes):
            problems.append(f"--{flag} {path}: scaled fp8 is not supported: use the 16-bit file")
    folder = args.tokenizer_dir
    names = ("tokenizer", "tokenizer_2")
    if folder is None or not all((folder / name / "tokenizer_config.json").is_file() for name in names):
        problems.append(f"--tokenizer_dir {folder}: must hold the folders {' and '.join(names)} of FLUX.1-dev")
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
    shapes = tensor_shapes(path)
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


def load_transformer_file(path, dtype):
    flux_modules = {name.split(".")[0] for name in FLUX_LAYERS}
    state_dict = {}
    for key, value in load_file(path).items():
        key = key.removeprefix(CHECKPOINT_PREFIX)
        if key.split(".")[0] in flux_modules:  # all-in-one checkpoints hold VAE and text encoders too
            state_dict[key] = value
    return model_from(
        FluxTransformer2DModel, transformer_config_of_file(path), diffusers_state_dict(state_dict), dtype
    )


def load_vae_file(path, dtype):
    state_dict = load_file(path)
    levels = {key.split(".")[2] for key in state_dict if key.startswith("encoder.down.")}
    blocks = {key.split(".")[4] for key in state_dict if key.startswith("encoder.down.0.block.")}
    config = {
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
    return model_from(AutoencoderKL, config, convert_ldm_vae_checkpoint(state_dict, config), dtype)


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
    clip = {}
    for key, value in load_file(args.clip_l).items():
        if key.startswith("text_model."):
            clip[key.removeprefix("text_model.")] = value
    vocab_size, hidden_size = clip["embeddings.token_embedding.weight"].shape
    clip_config = CLIPTextConfig(
        vocab_size=vocab_size,
        hidden_size=hidden_size,
        intermediate_size=len(clip["encoder.layers.0.mlp.fc1.weight"]),
        num_hidden_layers=len({key.split(".")[2] for key in clip if key.startswith("encoder.layers.")}),
        num_attention_heads=hidden_size // 64,
        eos_token_id=tokenizer.eos_token_id,
    )
    t5 = load_file(args.t5xxl)
    attention = "encoder.block.0.layer.0.SelfAttention"
    num_buckets, num_heads = t5[f"{attention}.relative_attention_bias.weight"].shape
    t5_config = T5Config(
        vocab_size=len(t5["shared.weight"]),
        d_model=t5["shared.weight"].shape[1],
        d_kv=len(t5[f"{attention}.q.weight"]) // num_heads,
        d_ff=len(t5["encoder.block.0.layer.1.DenseReluDense.wi_0.weight"]),
        num_layers=len({key.split(".")[2] for key in t5 if key.startswith("encoder.block.")}),
        num_heads=num_heads,
        relative_attention_num_buckets=num_buckets,
        feed_forward_proj="gated-gelu",
    )
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


def create_pipeline(transformer, vae, noise_scheduler):
    """A FluxPipeline of the models in training, for prompts that are embedded already."""
    return FluxPipeline(
        # its own scheduler: set_timesteps replaces the 1000 noise levels that training picks from
        scheduler=FlowMatchEulerDiscreteScheduler.from_config(noise_scheduler.config),
        vae=vae,
        text_encoder=None,
        tokenizer=None,
        text_encoder_2=None,
        tokenizer_2=None,
        transformer=transformer,
    )


def pipeline_arguments(prompt_encoder, prompt, args):
    prompt_embeds, pooled_prompt_embeds = prompt_encoder.encode_prompts([prompt])
    return {
        "prompt_embeds": prompt_embeds,
        "pooled_prompt_embeds": pooled_prompt_embeds,
        "height": args.resolution,
        "width": args.resolution,
    }


def log_validation(accelerator, transformer, vae, noise_scheduler, prompt_encoder, args, *, prompt, step):
    """Generates images of a prompt; they go to validation/step-N.png and to the trackers."""
    pipeline = create_pipeline(accelerator.unwrap_model(transformer), vae, noise_scheduler)
    with (
        undisturbed(transformer, device=accelerator.device),
        offload_models(vae, device=accelerator.device, offload=args.offload or args.cache_latents),
    ):
        arguments = pipeline_arguments(prompt_encoder, prompt, args)
        images = generate_images(accelerator, pipeline, [arguments] * args.num_validation_images, seed=args.seed)
    captions = [f"seed {args.seed + i}" for i in range(len(images))]
    save_images(accelerator, args, images, captions, prompt=prompt, step=step)


def lora_path(args, epoch=None):
    """The file of the LoRA, or with --save_every_n_epochs that of an epoch."""
    if not args.output_name:
        return args.output_dir / "pytorch_lora_weights.safetensors"
    name = args.output_name
    if epoch is not None:
        name += f"-{epoch:06d}"
    return args.output_dir.with_name(f"{name}.safetensors")


def save_named_lora(args, adapted_models, examples, is_dev, dtype, epoch=None):
    """Writes NAME.safetensors for ComfyUI, Forge and diffusers. Its header holds the trigger words and the captions'
    tags, {folder: {tag: how often an epoch has it}}. All processes call it, one writes."""
    layers = lora_layers(adapted_models)
    if torch.distributed.is_initialized() and torch.distributed.get_rank():
        return
    instance_examples = [example for example in examples if not example.options["is_reg"]]
    tag_counts = {}
    for example in instance_examples:
        counts = tag_counts.setdefault(Path(example.name).parent.name, {})
        for tag in names_in(example.prompt().lower()):
            counts[tag] = counts.get(tag, 0) + example.repeats
    trigger_words = [example.options["class_tokens"] for example in instance_examples]
    path = lora_path(args, epoch)
    header = lora_header(
        layers,
        name=path.stem,
        base_model="flux-1-dev" if is_dev else "flux-1-schnell",
        resolution=instance_examples[0].sides(),
        trigger_words=dict.fromkeys(filter(None, trigger_words)),
        captions=tag_counts,
    )
    write_lora(path, layers, args.save_format, header, dtype)


LORA_CARD = """
# {name}

LoRA of rank {rank} and alpha {lora_alpha} for {trained_model}, trained with DreamBooth.

```python
import torch
from diffusers import FluxPipeline

pipeline = FluxPipeline.from_pretrained({from_pretrained})
{load_lora}
pipeline.to("cuda" if torch.cuda.is_available() else "cpu")
image = pipeline({prompt!r}, {size}).images[0]
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
pipeline.to("cuda" if torch.cuda.is_available() else "cpu")
image = pipeline({prompt!r}, {size}).images[0]
image.save("image.png")
```
"""


def save_model_card(args, dtype, embedding_handler, prompt, embeddings_name, hub_repo=None):
    """Writes README.md: what was trained, and code that generates `prompt`, with the files in the output folder or,
    with `hub_repo`, those on the hub."""
    folder = args.output_dir.resolve()
    lora = lora_path(args).resolve()
    base_model = args.pretrained_model_name_or_path
    if is_single_file(args):
        base_model = "black-forest-labs/FLUX.1-dev"
    from_pretrained = [repr(base_model), f"dtype={dtype}"]
    if args.revision:
        from_pretrained.append(f"revision={args.revision!r}")
    if args.variant:
        from_pretrained.append(f"variant={args.variant!r}")
    values = {
        "name": folder.name,
        "rank": args.rank,
        "lora_alpha": args.lora_alpha,
        "trained_model": args.pretrained_model_name_or_path,
        "from_pretrained": ", ".join(from_pretrained),
        "load_lora": f"pipeline.load_lora_weights({hub_repo or str(lora.parent)!r}, weight_name={lora.name!r})",
        "prompt": embedding_handler.replace_abstractions(prompt),
        "size": f"height={args.resolution}, width={args.resolution}, max_sequence_length={args.max_sequence_length}",
    }
    if not embedding_handler.abstractions:
        text = LORA_CARD.format(**values)
        trigger_words = [args.instance_prompt] if args.instance_prompt else []
    else:
        tokens = [f"`{tokens}` for {word}" for word, tokens in embedding_handler.abstractions.items()]
        values |= {
            "what_was_trained": f"LoRA of rank {args.rank} and alpha {args.lora_alpha} and new tokens",
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
        if is_single_file(args):
            # trained with CLIP pooled at the end of the prompt, as in ComfyUI; with FLUX.1-dev's folder, whose
            # eos_token_id is 2, diffusers pools at the last new token
            values["set_eos_token"] = "pipeline.text_encoder.eos_token_id = pipeline.tokenizer.eos_token_id\n"
        text = NEW_TOKENS_CARD.format(**values)
        trigger_words = list(embedding_handler.abstractions)
    tags = ["text-to-image", "flux", "lora", "dreambooth", "diffusers"]
    write_model_card(args, text, tags, base_model, trigger_words, instance_prompt=args.instance_prompt)


def create_optimizer(args, params_to_optimize):
    """The optimizer that --optimizer names; each group of parameters has its own learning rate and weight decay."""
    betas = (args.adam_beta1, args.adam_beta2)
    if args.optimizer == "prodigy":
        from prodigyopt import Prodigy

        return Prodigy(
            params_to_optimize,
            betas=betas,
            eps=args.adam_epsilon,
            beta3=args.prodigy_beta3,
            decouple=args.prodigy_decouple,
            use_bias_correction=args.prodigy_use_bias_correction,
            safeguard_warmup=args.prodigy_safeguard_warmup,
        )
    if args.use_8bit_adam:
        from bitsandbytes.optim import AdamW8bit

        return AdamW8bit(params_to_optimize, betas=betas, eps=args.adam_epsilon)
    return torch.optim.AdamW(params_to_optimize, betas=betas, eps=args.adam_epsilon)


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
    if checkpoint is None or checkpoint_damage(checkpoint):
        return stops
    saved = checkpoint_state(checkpoint)
    saved_stops = saved.get("trained_until", stops)
    for i, saved_stop in enumerate(saved_stops):
        if saved_stop < saved.get("global_step", 0):
            stops[i] = saved_stop
    return stops


def describe_run(args, examples, embedding_handler, text_params, text_encoder_stop):
    """{name: text} to be printed before training: data, new tokens, text encoders."""
    num_own_captions = sum(example.caption != example.options["class_tokens"] for example in examples)
    sizes = sorted({"{} x {}".format(*example.sides()) for example in examples})
    run_info = {"data": f"{len(examples)} images at {', '.join(sizes)} px, {num_own_captions} with their own captions"}
    if embedding_handler.abstractions:
        tokens = [f"{tokens} for {word}" for word, tokens in embedding_handler.abstractions.items()]
        run_info["tokens"] = f"{', '.join(tokens)} in {' and '.join(embedding_handler.embeddings)}"
    if text_params:
        num_params = sum(parameter.numel() for parameter in text_params)
        run_info["text"] = f"{num_params:,} parameters in text encoders, trained until step {text_encoder_stop}"
        if args.optimizer == "prodigy" and args.text_encoder_lr != args.learning_rate:
            run_info["Prodigy"] = (
                f"uses one learning rate for all parameters, {args.learning_rate:g}: --text_encoder_lr is not used"
            )
    return run_info


def main(args):
    # 1. Accelerator, logging, seed
    if args.local_rank != -1:  # old launchers pass a flag instead of the environment variable
        os.environ.setdefault("LOCAL_RANK", str(args.local_rank))
    torch.backends.cuda.matmul.allow_tf32 = args.allow_tf32
    for library_logging in (diffusers_logging, transformers_logging):
        if args.verbose:
            library_logging.set_verbosity_info()
        else:
            library_logging.disable_progress_bar()
    accelerator = Accelerator(
        cpu=not torch.accelerator.is_available(),  # without it, processes of torchrun on CPUs would not join
        gradient_accumulation_steps=args.gradient_accumulation_steps,
        mixed_precision=args.mixed_precision,
        log_with=None if args.report_to == "none" else args.report_to,
        project_config=ProjectConfiguration(args.output_dir, logging_dir=args.output_dir / args.logging_dir),
        step_scheduler_with_optimizer=False,  # steps are counted over all processes together
    )
    device = accelerator.device
    weight_dtype = torch.float32
    if accelerator.mixed_precision == "fp16":
        weight_dtype = torch.float16
    elif accelerator.mixed_precision == "bf16":
        weight_dtype = torch.bfloat16
    set_seed(args.seed)

    # 2. Data
    examples, problems = find_examples(args)
    train_dataset = DreamBoothDataset(examples, args)
    accumulation = args.gradient_accumulation_steps
    sampler = StepSampler(
        [(example.dataset, example.bucket) for example in train_dataset.examples],
        {(example.dataset, example.bucket): example.options["batch_size"] for example in examples},
        seed=args.seed,
        process_index=accelerator.process_index,
        num_processes=accelerator.num_processes,
    )
    steps_per_epoch = math.ceil(sampler.steps_per_epoch / accumulation)
    checkpoint = checkpoint_to_resume(args.output_dir, args.resume_from_checkpoint)
    requested_steps = args.max_train_steps or args.num_train_epochs * steps_per_epoch
    stops = training_stops(args, requested_steps, checkpoint)
    text_encoder_stop, transformer_stop = stops
    # fewer than requested if nothing is left to train: textual inversion alone ends with --train_text_encoder_ti_frac
    max_train_steps = max(text_encoder_stop, transformer_stop)
    validation_steps = args.validation_steps or args.validation_epochs * steps_per_epoch
    run = run_settings(args, len(train_dataset), accelerator.num_processes)
    if args.dataset_config and not problems:
        run["the hash of --dataset_config"] = hashlib.sha256(args.dataset_config.read_bytes()).hexdigest()[:16]
    problems += check_run(accelerator, args, max_train_steps, checkpoint, run)
    if problems:
        fail(accelerator, problems)
    hub_repo = create_hub_repo(accelerator, args)
    args.output_dir.mkdir(parents=True, exist_ok=True)

    # 3. Prompts: frozen text encoders embed them once and are freed before the transformer is loaded
    final_prompt = None if args.skip_final_inference else args.final_validation_prompt or args.validation_prompt
    prompts = {prompt for prompt in (args.validation_prompt, final_prompt, args.class_prompt) if prompt}
    has_varying_prompts = False
    for example in examples:
        if example.varies():
            has_varying_prompts = True
        else:
            prompts.add(example.prompt())
        if example.options["caption_dropout_rate"] or example.options["caption_dropout_every_n_epochs"]:
            prompts.add("")
    prompts = sorted(prompts)

    pipeline = load_text_encoders(args, weight_dtype)
    adapted_models = {}  # those with a LoRA, under diffusers' names
    text_lora_params = []
    if args.train_text_encoder:
        target_modules = list(CLIP_TARGET_MODULES)
        if args.lora_layers == "kohya":
            target_modules += ["fc1", "fc2"]
        text_lora_params = add_lora(
            pipeline.text_encoder,
            rank=args.rank,
            alpha=args.lora_alpha,
            dropout=0.0,
            target_modules=target_modules,
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
        trained=trained_encoders,
        offload=args.offload,
        keep_encoders=has_varying_prompts,
        disk_cache_dir=args.disk_cache_dir.expanduser() if args.cache_text_encoder_outputs_to_disk else None,
        rewrite_prompt=embedding_handler.replace_abstractions,
    )
    del pipeline
    prompt_encoder.cache_prompts(prompts)

    # 4. Scheduler, VAE, class images, latents, transformer, LoRA
    noise_scheduler = load_noise_scheduler(args)
    offload_vae = args.offload or args.cache_latents
    vae = load_vae(args, weight_dtype).to("cpu" if offload_vae else device)
    transformer = None
    with offload_models(vae, device=device, offload=offload_vae):
        if args.with_prior_preservation:
            transformer = load_transformer(args, weight_dtype).to(device)
            pipeline = create_pipeline(transformer, vae, noise_scheduler)
            arguments = pipeline_arguments(prompt_encoder, args.class_prompt, args)
            draw_class_images(accelerator, pipeline, arguments, args, present=len(class_examples(args)))
            train_dataset.class_examples = class_examples(args)
            del pipeline
        if args.cache_latents:
            folder = args.disk_cache_dir.expanduser() if args.cache_latents_to_disk else None
            train_dataset.moments = cache_moments(
                accelerator, vae, train_dataset.image_keys(), train_dataset.pixel_values, folder
            )
    if transformer is None:
        transformer = load_transformer(args, weight_dtype)
    num_base_params = sum(parameter.numel() for parameter in transformer.parameters())
    quantize_base(transformer, weight_dtype, args.quantize_base).to(first_device(accelerator, args))
    if args.train_transformer_frac > 0:
        add_lora(
            transformer,
            rank=args.rank,
            alpha=args.lora_alpha,
            dropout=args.lora_dropout,
            target_modules=lora_target_modules(args, transformer),
        )
    if args.gradient_checkpointing:
        transformer.enable_gradient_checkpointing()
    if args.compile:
        compile_blocks(transformer)
    if args.fsdp:
        shard(transformer, device, weight_dtype)
    lora_params = [parameter for parameter in transformer.parameters() if parameter.requires_grad]
    if lora_params:
        adapted_models = {"transformer": transformer, **adapted_models}
    has_guidance = transformer.config.guidance_embeds  # FLUX.1-dev, not -schnell
    save_dtype = torch.float32 if args.upcast_before_saving else weight_dtype

    # 5. Optimizer and schedule
    learning_rate = args.learning_rate
    # Prodigy's authors ask for one learning rate
    text_encoder_lr = args.learning_rate if args.optimizer == "prodigy" else args.text_encoder_lr
    if args.scale_lr:
        total_batch_size = args.train_batch_size * accumulation * accelerator.num_processes
        learning_rate *= total_batch_size
        text_encoder_lr *= total_batch_size
    params_to_optimize = []
    if lora_params:
        group = {"params": lora_params, "lr": learning_rate, "weight_decay": args.adam_weight_decay}
        params_to_optimize.append(group)
    if text_params:
        group = {"params": text_params, "lr": text_encoder_lr, "weight_decay": args.adam_weight_decay_text_encoder}
        params_to_optimize.append(group)
    optimizer = create_optimizer(args, params_to_optimize)
    lr_scheduler = get_scheduler(
        args.lr_scheduler,
        optimizer,
        num_warmup_steps=args.lr_warmup_steps,
        num_training_steps=max_train_steps,
        num_cycles=args.lr_num_cycles,
        power=args.lr_power,
    )

    # 6. Prepare and resume
    if args.fsdp:  # `shard` has prepared the transformer, and the optimizer holds sharded parameters
        lr_scheduler = accelerator.prepare(lr_scheduler)
    elif not lora_params:  # DistributedDataParallel refuses a model without trained parameters
        optimizer, lr_scheduler = accelerator.prepare(optimizer, lr_scheduler)
    else:
        transformer, optimizer, lr_scheduler = accelerator.prepare(transformer, optimizer, lr_scheduler)
    register_lora_checkpointing(accelerator, FluxPipeline, adapted_models, optimizer)
    embedding_handler.register_checkpointing(accelerator)
    global_step = load_checkpoint(accelerator, checkpoint, lr_scheduler)
    sampler.start = global_step * accumulation
    sampler.stop = max_train_steps * accumulation
    train_dataloader = DataLoader(
        train_dataset, batch_sampler=sampler, collate_fn=collate_fn, num_workers=args.dataloader_num_workers
    )
    run_info = describe_run(args, examples, embedding_handler, text_params, text_encoder_stop)
    batch_sizes = sorted({example.options["batch_size"] for example in examples})
    print_header(
        accelerator,
        args,
        run_info,
        lora_params,
        num_base_params,
        max_train_steps,
        steps_per_epoch,
        " or ".join(str(batch_size) for batch_size in batch_sizes),
    )
    marks = {"pivot: text encoders frozen": text_encoder_stop, "transformer frozen": transformer_stop}
    start_logging(accelerator, args, "dreambooth-flux", global_step, marks)

    # 7. Train
    if prompt_encoder.trained and global_step >= text_encoder_stop:
        prompt_encoder.freeze(prompts)
    if args.validation_prompt and global_step == 0:
        log_validation(
            accelerator,
            transformer,
            vae,
            noise_scheduler,
            prompt_encoder,
            args,
            prompt=args.validation_prompt,
            step=0,
        )
    metrics = None
    if accelerator.is_main_process:
        metrics = open_metrics(args.output_dir / "metrics.jsonl", global_step)
    signals = catch_signals()
    num_skipped_steps = 0
    loss_sum = 0.0
    num_images = 0
    step_started = time.perf_counter()
    transformer.train()
    progress_bar = tqdm(
        total=max_train_steps,
        initial=global_step,
        desc="Training",
        unit="step",
        disable=not accelerator.is_main_process,
    )
    # No loop over epochs: the sampler counts micro-steps from 0 to the last, so a resumed run starts at any of them.
    # All randomness of a micro-step comes from its own generator, and in this order: the latents' posterior, noise,
    # noise levels, then dropout. To change the order is to change what a resumed run trains.
    for micro_step, batch in enumerate(read_batches(train_dataloader), start=sampler.start):
        with accelerator.accumulate(transformer):
            generator = step_generator(args.seed, *divmod(micro_step, accumulation), accelerator.process_index)
            torch.manual_seed(generator.initial_seed())  # dropout uses the global generator
            if "moments" in batch:
                moments = batch["moments"].to(device)
            else:
                with offload_models(vae, device=device, offload=offload_vae):
                    moments = encode_moments(vae, batch["pixel_values"])
            latents = sample_latents(moments, vae.config, generator)
            prompt_embeds, pooled_prompt_embeds = prompt_encoder.encode_prompts(batch["prompt"])
            guidance = None
            if has_guidance:
                guidance = torch.full((len(latents),), args.guidance_scale, device=device)
            with accelerator.autocast():
                losses = compute_loss(
                    transformer,
                    latents,
                    prompt_embeds,
                    pooled_prompt_embeds,
                    args=args,
                    noise_scheduler=noise_scheduler,
                    guidance=guidance,
                    generator=generator,
                )
            losses = losses * batch["loss_weight"].to(device)
            # instance_loss + prior_loss: the mean over the instance images and, with prior preservation, the mean over
            # as many class images behind them. One sum over both rounds alike with and without class images.
            num_instance_images = len(losses) // 2 if args.with_prior_preservation else len(losses)
            loss = losses.sum() / num_instance_images
            accelerator.backward(loss)
            loss_sum = loss_sum + loss.detach() / accumulation
            num_images += num_instance_images * accelerator.num_processes
            if not accelerator.sync_gradients:
                continue
            reduce_gradients(accelerator, text_params)
            if global_step >= transformer_stop:
                for parameter in lora_params:
                    parameter.grad = None
            grad_norm = accelerator.clip_grad_norm_([*lora_params, *text_params], args.max_grad_norm)
            totals = torch.stack([loss_sum, torch.tensor(float(len(signals)), device=device)])
            mean_loss, stop_requested = accelerator.reduce(totals, reduction="mean").tolist()
            is_finite = math.isfinite(mean_loss)
            if accelerator.scaler is None:  # a gradient scaler (fp16) skips infinite gradients itself
                is_finite = is_finite and math.isfinite(grad_norm)
            if is_finite or accelerator.scaler is not None:
                optimizer.step()
                if prompt_encoder.trained:
                    embedding_handler.retract_embeddings()
            lr_scheduler.step()
            optimizer.zero_grad()

        global_step += 1
        if prompt_encoder.trained and global_step == text_encoder_stop:
            prompt_encoder.freeze(prompts)
        num_skipped_steps = 0 if is_finite else count_skipped(num_skipped_steps, global_step)
        logs = {"loss": mean_loss, **step_logs(optimizer, grad_norm, num_images, step_started, device)}
        log_step(accelerator, progress_bar, metrics, global_step, logs)
        is_done = global_step == max_train_steps
        epoch, step_of_epoch = divmod(global_step, steps_per_epoch)
        is_epoch_to_save = args.save_every_n_epochs and step_of_epoch == 0 and epoch % args.save_every_n_epochs == 0
        if is_epoch_to_save and adapted_models and not is_done:
            save_named_lora(args, adapted_models, examples, has_guidance, save_dtype, epoch)
        # after the file of the epoch, which a run that is resumed from this checkpoint does not write
        if stop_requested or global_step % args.checkpointing_steps == 0:
            state = run | {"trained_until": stops}
            checkpoint = save_checkpoint(
                accelerator, args.output_dir, global_step, state, args.checkpoints_total_limit
            )
        if stop_requested and not is_done:
            transformer = None  # see the end
            stop_interrupted(accelerator, global_step, checkpoint, signals)
        if args.validation_prompt and global_step % validation_steps == 0 and not is_done:
            log_validation(
                accelerator,
                transformer,
                vae,
                noise_scheduler,
                prompt_encoder,
                args,
                prompt=args.validation_prompt,
                step=global_step,
            )
        loss_sum = 0.0
        num_images = 0
        step_started = time.perf_counter()
    progress_bar.close()

    # 8. Save and final validation
    if args.output_name and adapted_models:
        save_named_lora(args, adapted_models, examples, has_guidance, save_dtype)
    else:
        save_lora(args.output_dir, FluxPipeline, adapted_models, save_dtype)
    embeddings_name = f"{args.output_dir.resolve().name}_emb.safetensors"
    if accelerator.is_main_process:
        embedding_handler.save_embeddings(args.output_dir / embeddings_name)
        embedding_handler.export_embeddings(args.output_dir / "embeddings")
        metrics.close()
        plot_metrics(args.output_dir)
    if final_prompt:
        log_validation(
            accelerator,
            transformer,
            vae,
            noise_scheduler,
            prompt_encoder,
            args,
            prompt=final_prompt,
            step=global_step,
        )
    example_prompt = final_prompt or args.instance_prompt or examples[0].prompt()
    if accelerator.is_main_process:
        save_model_card(args, weight_dtype, embedding_handler, example_prompt, embeddings_name, hub_repo)
    transformer = None  # gloo can hang if DistributedDataParallel is freed after the process group
    accelerator.free_memory()
    accelerator.end_training()
    lora = lora_path(args)
    results = {
        "LoRA": lora.absolute(),
        "tokens": embeddings_name,
        "words": "embeddings",
        "usage": "README.md",
        "loss": "loss.png",
        "images": "validation",
    }
    command = f"dreambooth/generate.py {shlex.quote(str(args.output_dir))} --prompt {shlex.quote(example_prompt)}"
    file_beside = lora if args.output_name and lora.exists() else None
    finish(accelerator, args, global_step, results, command, hub_repo, beside=file_beside)


if __name__ == "__main__":
    main(parse_args())
