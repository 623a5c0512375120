"""Makes a text-to-image model an any-step model, which draws in 1, 2, 4 or N steps: TwinFlow (arXiv 2512.05150).

The model is told the time t it stands at and the time t' it is to jump to. It learns the mean velocity between the
two; at negative times it learns that of its own pictures, and the difference to real ones corrects its single steps:

    x_t = t z + (1 - t) x     F(x_t, t, t') = (x_t - x_t') / (t - t')     x̂ = x_t - t F(x_t, t, 0)

There is no second network, no discriminator. One GPU, or all of them after `accelerate config`:

    accelerate launch train_twinflow.py \\
      --pretrained_model_name_or_path=black-forest-labs/FLUX.1-dev --model_type=flux --recipe=lora-2order \\
      --train_data_dir=photos --mixed_precision=bf16 --gradient_checkpointing --cache_latents \\
      --train_batch_size=8 --learning_rate=1e-4 --max_train_steps=1000 \\
      --validation_prompt="a dog on the beach" --output_dir=flux-twinflow

`output_dir` then holds the result (`pytorch_lora_weights.safetensors` or `transformer/`), which
examples/twinflow/generate.py draws with, a model card, the arguments (args.json), the loss (metrics.jsonl, loss.png),
pictures (validation/) and checkpoints to resume from.
"""

import argparse
import copy
import functools
import inspect
import math
import shlex
import time
from collections.abc import Callable
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path

from common.arguments import (
    LR_SCHEDULERS,
    TRACKERS,
    Parser,
    Switch,
    fail,
    names_in,
    number,
    reading,
)
from common.checkpoints import (
    catch_signals,
    check_disk,
    check_output_dir,
    check_run,
    checkpoint_to_resume,
    count_skipped,
    load_checkpoint,
    register_sharded_checkpointing,
    register_tensor_checkpointing,
    run_settings,
    save_checkpoint,
    stop_interrupted,
    writing,
)
from common.data import (
    INTERPOLATION,
    StepSampler,
    check_pictures,
    open_dataset,
    picture_files,
    read_batches,
    read_row,
    read_text_file,
    upright,
)
from common.flow_matching import step_generator
from common.latents import (
    TensorCache,
    decode_images,
    encode_images,
    image_ids,
    pack_latents,
    to_image,
    to_tensor,
    unpack_latents,
)
from common.lora import (
    FLUX_TARGET_MODULES,
    add_lora,
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
    prepare_blocks,
    quantize_base,
    reshard,
    start,
    whole,
)
from common.text_encoders import load_text_pipeline
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
from common.validation import save_images, undisturbed

import diffusers
import numpy as np
import torch
from accelerate import DistributedDataParallelKwargs
from accelerate.utils import set_seed
from diffusers.training_utils import free_memory, offload_models
from huggingface_hub import save_torch_state_dict
from PIL import Image, ImageOps
from safetensors import safe_open
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import DataLoader, Dataset
from tqdm.auto import tqdm
from transformers import AutoTokenizer


TRAINING = ("full", "lora")
KINDS = ("e2e", "mul", "any", "adv", "one")  # of the samples of a batch, see `sample_times`
NEAR = 0.05  # how much of t the target of a mul sample is away, at most
DELTA = 0.01  # first step of the consistency target
BARRON_C = 1e-3
PROBS = "e2e=1,mul=1,any=1,adv=1"
TWINFLOW = {"probs": PROBS, "consistc_ratio": 1.0, "estimate_order": 2, "enhanced_ratio": 0.8, "ema_decay_rate": 0.99}
NO_TARGETS = {"consistc_ratio": 0.0, "estimate_order": 0, "enhanced_ratio": 0.0, "ema_decay_rate": 0.0}
FIRST_ORDER = {"probs": "e2e=1,mul=1,adv=1,one=1", "estimate_order": 1, "ema_decay_rate": 0.0}
LORA = {"training": "lora", "rank": 64, "lora_alpha": 64.0}
RECIPES = {
    "twinflow": TWINFLOW,
    "rcgm": TWINFLOW | {"probs": "e2e=1,mul=1,any=1", "dist_match_cof": 0.0},
    "flow-matching": NO_TARGETS | {"probs": "mul=1"},
    "lora-1order": TWINFLOW | FIRST_ORDER | LORA,
    "lora-1order-teacher": TWINFLOW | FIRST_ORDER | LORA | {"ema_decay_rate": 1.0, "enhanced_ratio": 4.0},
    "lora-2order": TWINFLOW | LORA,
    "image-free": TWINFLOW | {"ema_decay_rate": 1.0, "enhanced_ratio": 4.0, "image_free": True},
}


# ---------------------------------------------------------------------------------------------------------------------
# Arguments
# ---------------------------------------------------------------------------------------------------------------------


def probabilities(text):
    """An argparse type: e2e=1,adv=0.5 as {kind: share}; kinds that are not named have none."""
    probs = dict.fromkeys(KINDS, 0.0)
    for item in text.split(","):
        kind, _, share = item.partition("=")
        if kind.strip() not in probs:
            raise argparse.ArgumentTypeError(f"{kind.strip()!r} is none of {', '.join(KINDS)}; such as e2e=1,adv=0.5")
        probs[kind.strip()] = number(float, 0)(share)
    if not any(probs.values()):
        raise argparse.ArgumentTypeError(f"{text} leaves no share above 0")
    return probs


def sampler_name(text):
    """An argparse type: style:steps, such as few:2."""
    style, _, steps = text.partition(":")
    if style not in STYLES or not steps.isdigit() or int(steps) < 1:
        raise argparse.ArgumentTypeError(f"{text}: expected style:steps with a style of {', '.join(STYLES)}")
    return text


def parse_args(argv=None):
    parser = Parser(__doc__)
    count, size = number(int, 1), number(int, 16, 8192)
    positive, not_negative = number(float, 0, above=True), number(float, 0)
    share, decay = number(float, 0, 1), number(float, 0, 0.9999999)

    arg = parser.add_argument_group("model", "what is trained, in which precision").add_argument
    arg("--pretrained_model_name_or_path", required=True, metavar="MODEL", help="folder or hub id of a pipeline")
    arg("--model_type", choices=tuple(BACKBONES), default="flux", help="which kind of pipeline that is")
    arg("--training", choices=TRAINING, default="full", help="all weights, or an adapter; recipes lora-* set lora")
    arg("--openuni_checkpoint", type=Path, metavar="FILE", help="for openuni: its .pth; MODEL is the Sana below it")
    arg("--openuni_llm", metavar="MODEL", help="for openuni: its InternVL3, such as OpenGVLab/InternVL3-2B-hf")
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

    arg = parser.add_argument_group("data", "a folder of pictures or parquet files, a dataset, prompts").add_argument
    arg(
        "--train_data_dir", type=Path, help="folder: pictures with .txt files, a line of which is the caption; parquet"
    )
    arg("--dataset_name", help="dataset on the hub, or a folder or file that `datasets` loads")
    arg("--dataset_config_name", help="configuration of that dataset")
    arg("--image_column", default="image", help="column of the dataset that holds the pictures")
    arg("--caption_column", help="column of the dataset or of metadata.jsonl that holds captions")
    arg("--reference_column", help="for qwenimage-edit: column of the dataset with the pictures to edit")
    arg("--reference_data_dir", type=Path, help="for qwenimage-edit: folder with those pictures, of the same names")
    arg("--prompts_file", type=Path, help="for image_free: a text file, one prompt a line")
    arg("--resolution", type=size, default=512, help="side in pixels that pictures are resized and cropped to")
    arg("--center_crop", action="store_true", help="crop the centre, not a part drawn once per picture and repeat")
    arg("--random_flip", action="store_true", help="mirror half of the pictures; not for faces, text or logos")
    arg("--image_interpolation_mode", choices=INTERPOLATION, default="lanczos", help="how pictures are resized")
    arg("--train_batch_size", type=count, default=4, help="pictures per device and forward pass")
    arg("--dataloader_num_workers", type=number(int, 0), default=0, help="processes that read pictures; 0: none extra")
    arg("--cache_latents", action="store_true", help="encode pictures once, before training: saves time and memory")

    arg = parser.add_argument_group("twinflow", "the method; --recipe sets these, what is typed wins").add_argument
    arg("--recipe", choices=tuple(RECIPES), default="twinflow", help="a name for a set of the values below")
    arg("--probs", type=probabilities, default=PROBS, help="shares of a batch by kind: " + ", ".join(KINDS))
    arg("--consistc_ratio", type=share, default=1.0, help="how far t' may be from t; rectification needs 1")
    arg("--estimate_order", type=number(int, 0, 8), default=2, help="steps of its target; 0: plain flow matching")
    arg("--enhanced_ratio", type=not_negative, default=0.8, help="strength ω of the guidance that is trained in")
    arg("--enhanced_range", type=share, nargs=2, default=(0.0, 1.0), metavar=("FROM", "TO"), help="times t with it")
    arg("--ema_decay_rate", type=share, default=0.99, help="teacher: 0 the model, 1 the frozen one, else its average")
    arg("--loss_type", choices=("l2", "barron"), default="l2", help="squared error, or Barron's robust loss")
    arg("--dist_match_cof", type=not_negative, default=1.0, help="weight of rectification; 0: none")
    arg("--image_free", action="store_true", help="train on own samples of prompts instead of pictures")
    arg("--uncond_prompt", help="prompt of guidance's other side (default: that of the model_type)")
    arg(
        "--target_time_init", choices=("zero", "copy", "normal"), default="zero", help="how the embedding of t' starts"
    )

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
    arg("--time_dist_ctrl", type=positive, nargs=3, default=(1.0, 1.0, 1.0), help="a, b, c: times are c Beta(a, b)")

    arg = parser.add_argument_group("optimizer", "how the adapter is updated").add_argument
    arg("--optimizer", type=str.lower, choices=("adamw", "prodigy"), default="AdamW", help="prodigy wants rate 1")
    arg("--learning_rate", type=positive, default=1e-4, help="step size; less if the loss jumps; 1 for prodigy")
    arg("--scale_lr", action="store_true", help="multiply it by batch size, accumulation and number of devices")
    arg("--lr_scheduler", choices=LR_SCHEDULERS, default="constant", help="course of the learning rate over the steps")
    arg("--lr_warmup_steps", type=number(int, 0), default=500, help="steps until it is reached; none for constant")
    arg("--lr_num_cycles", type=count, default=1, help="cycles of cosine_with_restarts")
    arg("--lr_power", type=positive, default=1.0, help="power of polynomial; 1: a straight line")
    arg("--use_8bit_adam", action="store_true", help="AdamW with 8-bit states (bitsandbytes), to fit memory")
    arg("--adam_beta1", type=decay, default=0.9, help="decay of the gradient's mean, in Prodigy too")
    arg("--adam_beta2", type=decay, default=0.999, help="decay of the gradient's square, in Prodigy too")
    arg("--adam_weight_decay", type=not_negative, default=1e-4, help="weight decay, in Prodigy too")
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
    arg("--validation_image", type=Path, help="for qwenimage-edit: picture to edit by it")
    samplers, name = ["few:1", "few:2", "any:4"], "STYLE:STEPS"
    arg("--validation_samplers", type=sampler_name, nargs="+", default=samplers, metavar=name, help="few, any or mul")
    arg("--num_validation_images", type=count, default=4, help="pictures each time")
    arg("--validation_epochs", type=count, default=50, help="epochs between validations")
    arg("--validation_steps", type=count, help="steps between validations, instead of epochs")

    arg = parser.add_argument_group("output and logging", "where everything goes").add_argument
    arg("--output_dir", type=Path, default=Path("twinflow"), help="folder of all results")
    arg("--logging_dir", type=Path, default=Path("logs"), help="folder of the trackers' files in output_dir")
    arg("--report_to", choices=TRACKERS, default="tensorboard", help="where curves and pictures are sent")
    arg("--upcast_before_saving", action="store_true", help="save the adapter in float32, not in mixed_precision")
    arg("--verbose", action="store_true", help="show what the libraries remark and their progress bars")
    arg("--push_to_hub", action="store_true", help="upload the results, without checkpoints and logs")
    arg("--hub_token", help="token for it (default: that of `hf auth login`); it is written nowhere")
    arg("--hub_model_id", help="repository for it (default: the name of output_dir)")

    args = parser.parse_args(argv)
    backbone, recipe = BACKBONES[args.model_type], RECIPES[args.recipe]
    parser.set_defaults(adam_beta2=0.99, adam_weight_decay=0.0, uncond_prompt=backbone.uncond_prompt, **recipe)
    trained = parser.parse_args(argv).training
    parser.set_defaults(**backbone.defaults.get(trained, {}), **backbone.defaults.get("both", {}))
    args = parser.parse_args(argv)  # what is typed wins over recipe and model type, these over the defaults
    parser.refuse(check_flags(args) + check_model(args) + check_output_dir(args))
    return args


def check_flags(args):
    """Contradictions between flags, and flags without effect."""
    problems = check_method(args)
    sources = {"--train_data_dir": args.train_data_dir, "--dataset_name": args.dataset_name}
    sources["--prompts_file"] = args.prompts_file
    given = [flag for flag, value in sources.items() if value]
    if args.image_free and given != ["--prompts_file"]:
        problems.append(f"--image_free needs --prompts_file and no pictures, not {' and '.join(given) or 'nothing'}")
    if not args.image_free and (len(given) != 1 or args.prompts_file):
        problems.append(
            "exactly one of --train_data_dir and --dataset_name is needed; --prompts_file is for --image_free"
        )
    backbone = BACKBONES[args.model_type]
    if args.resolution % backbone.multiple:
        nearest = max(1, args.resolution // backbone.multiple) * backbone.multiple
        problems.append(f"--resolution {args.resolution} must be a multiple of {backbone.multiple}, such as {nearest}")
    openuni = args.model_type == "openuni"
    for name in ("openuni_checkpoint", "openuni_llm"):
        if (getattr(args, name) is not None) != openuni:
            problems.append(f"--{name} is {'needed for' if openuni else 'only for'} --model_type openuni")
    problems += OpenUni(args).problems() if args.openuni_checkpoint else []
    edit = args.model_type == "qwenimage-edit"
    source = "reference_column" if args.dataset_name or has_parquet(args) else "reference_data_dir"
    needed = [source, *(["validation_image"] if args.validation_prompt else [])] if edit else []
    for name in ("reference_column", "reference_data_dir", "validation_image"):
        if getattr(args, name) is None and name in needed:
            problems.append(f"--model_type qwenimage-edit needs --{name}")
        if getattr(args, name) is not None and name not in needed:
            problems.append(f"--{name} has no effect here: leave it out")
    if edit and args.image_free:
        problems.append("--image_free: qwenimage-edit needs pictures to edit")
    if args.training == "full" and (args.lora_layers or args.lora_dropout):
        problems.append("--lora_layers and --lora_dropout have no effect on --training full: leave them out")
    if args.training == "full" and args.quantize_base != "none":
        problems.append(f"--quantize_base {args.quantize_base} is for --training lora: what is trained stays float32")
    if args.training == "lora" and args.target_time_init != "zero":
        problems.append(f"--target_time_init {args.target_time_init} has no effect on --training lora: leave it out")
    return problems + check_shared_flags(args) + check_hub(args)


def check_method(args):
    """What the method forbids."""
    problems, probs = [], args.probs
    kinds = [kind for kind in KINDS if probs[kind] > 0]
    if args.train_batch_size < max(4, len(kinds)):
        least = max(4, len(kinds))
        problems.append(
            f"--train_batch_size {args.train_batch_size}: each batch holds all kinds of --probs, at least {least}"
        )
    if args.ema_decay_rate < 1 <= args.enhanced_ratio:
        problems.append(
            f"--enhanced_ratio {args.enhanced_ratio:g} with --ema_decay_rate {args.ema_decay_rate:g}: a teacher that "
            "learns its own guidance grows without end from 1 on; take less than 1, or --ema_decay_rate 1"
        )
    if args.image_free and (args.ema_decay_rate < 1 or not args.enhanced_ratio):
        problems.append(
            "--image_free needs --ema_decay_rate 1 and --enhanced_ratio above 0: only the frozen model can teach"
        )
    if args.estimate_order == 1 and not probs["one"]:
        problems.append("--estimate_order 1 jumps to the end in one step, which only one in --probs trains: one=1")
    if args.estimate_order >= 2 and not probs["any"]:
        problems.append(f"--estimate_order {args.estimate_order} takes steps between any times: --probs needs any=1")
    unused = [kind for kind in ("e2e", "any", "one") if probs[kind] and args.estimate_order == 0]
    if unused and not (unused == ["e2e"] and args.consistc_ratio == 1 and args.dist_match_cof):
        problems.append(
            f"--estimate_order 0 trains nothing on {', '.join(unused)} of --probs: leave out, or order 1 or 2"
        )
    if args.estimate_order and args.consistc_ratio == 0:
        problems.append("--consistc_ratio 0 is flow matching, which goes with --estimate_order 0")
    if args.enhanced_range[0] > args.enhanced_range[1]:
        problems.append("--enhanced_range {:g} {:g}: from the smaller to the larger".format(*args.enhanced_range))
    if args.time_dist_ctrl[2] > 1:
        problems.append(
            f"--time_dist_ctrl: its last number is the largest time and at most 1, not {args.time_dist_ctrl[2]:g}"
        )
    return problems


def check_model(args):
    """Problems of --pretrained_model_name_or_path, --lora_layers and the disk, from the transformer's config alone."""
    flag = f"--pretrained_model_name_or_path {args.pretrained_model_name_or_path}"
    backbone = BACKBONES[args.model_type]
    transformer_class = getattr(diffusers, backbone.transformer)
    try:
        config = transformer_class.load_config(
            args.pretrained_model_name_or_path,
            subfolder="transformer",
            revision=args.revision,
            cache_dir=args.cache_dir,
        )
    except (OSError, ValueError) as error:
        reason = str(error).splitlines()[0]
        return [f"{flag}: neither a folder with a pipeline nor a hub id like {backbone.example} ({reason})"]
    if config.get("_class_name") != backbone.transformer:
        return [
            f"{flag}: holds a {config.get('_class_name')}, --model_type {args.model_type} a {backbone.transformer}"
        ]
    if args.model_type == "flux" and not config["guidance_embeds"] and args.max_sequence_length > 256:
        return [f"--max_sequence_length {args.max_sequence_length}: FLUX.1-schnell takes at most 256"]
    with torch.device("meta"):
        transformer = transformer_class.from_config(config)
    unknown = unknown_layers(transformer, lora_targets(args))
    if unknown:
        return [f"--lora_layers: the transformer has no linear layer {', '.join(unknown)}"]
    if args.training == "full":
        needed = 16 * sum(parameter.numel() for parameter in transformer.parameters())
    else:
        layers = target_layers(transformer, lora_targets(args))
        needed = 20 * args.rank * sum(sum(layer.weight.shape) for _, layer in layers)
    # bytes of a checkpoint in float32: weights, their average, two moments, and for an adapter the result
    return check_disk(args, needed)


def lora_targets(args):
    """The layers that --lora_layers names."""
    return names_in(args.lora_layers) or list(BACKBONES[args.model_type].targets)


# ---------------------------------------------------------------------------------------------------------------------
# Model
# ---------------------------------------------------------------------------------------------------------------------


TIME_MODULES = ("timestep_embedder.linear_1", "timestep_embedder.linear_2")


class Backbone:
    """What differs between kinds of pipelines. Conditions are named as the arguments of the transformer."""

    defaults = {}  # of flags, {"full" or "lora" or "both": {name: value}}
    uncond_prompt = ""
    multiple, factor = 16, 8  # of the picture's side, pixels per latent
    channels = 16  # of latents
    time_module = "time_text_embed"
    unused_parameters = False  # whether a training step leaves some without a gradient

    def __init__(self, args):
        self.args = args

    def load_text(self, dtype, device, **parts):
        """The pipeline without transformer and VAE."""
        pipeline = load_text_pipeline(getattr(diffusers, self.pipeline), self.args, dtype, **parts)
        for part in pipeline.components.values():
            if isinstance(part, torch.nn.Module):
                part.requires_grad_(False).eval()  # T5 has dropout
        if self.args.offload:
            pipeline.enable_group_offload(device, offload_type="leaf_level")
            return pipeline
        return pipeline.to(device)

    def load_vae(self, dtype):
        return load_model(getattr(diffusers, self.vae), "vae", self.args, dtype)

    def load_transformer(self, dtype):
        return load_model(getattr(diffusers, self.transformer), "transformer", self.args, dtype)

    def predict(self, transformer, x, time, cond):
        """Velocities [B, C, h, w] of noisy latents; time [B, 2] is (t, t'), or [B] what stands for both."""
        return transformer(hidden_states=x, timestep=1000 * time, **cond, return_dict=False)[0]


class Flux(Backbone):
    pipeline, transformer, vae = "FluxPipeline", "FluxTransformer2DModel", "AutoencoderKL"
    example = "black-forest-labs/FLUX.1-dev"
    targets = (*FLUX_TARGET_MODULES, "proj_mlp", *TIME_MODULES)

    def encode_prompt(self, pipeline, prompt, reference=None):
        """Conditions {name: [T, D] or [D]} of a prompt, without a batch dimension."""
        length = self.args.max_sequence_length
        embeds, pooled, _ = pipeline.encode_prompt(prompt, prompt_2=None, max_sequence_length=length)
        return {"encoder_hidden_states": embeds[0], "pooled_projections": pooled[0]}

    def predict(self, transformer, x, time, cond):
        height, width = x.shape[-2:]
        velocity = transformer(
            hidden_states=pack_latents(x),
            timestep=time,
            guidance=None if self.guidance is None else torch.full((len(x),), self.guidance, device=x.device),
            txt_ids=torch.zeros(cond["encoder_hidden_states"].shape[1], 3, device=x.device),
            img_ids=image_ids(height, width, x.device),
            **cond,
            return_dict=False,
        )[0]
        return unpack_latents(velocity, height, width)

    def load_transformer(self, dtype):
        transformer, args = super().load_transformer(dtype), self.args
        self.guidance = args.guidance_scale if transformer.config.guidance_embeds else None
        return transformer


class StableDiffusion3(Backbone):
    pipeline, transformer, vae = "StableDiffusion3Pipeline", "SD3Transformer2DModel", "AutoencoderKL"
    example = "stabilityai/stable-diffusion-3.5-medium"
    defaults = {"both": {"max_sequence_length": 256}, "full": {"target_time_init": "zero"}}
    uncond_prompt = "Generate an image."
    targets = (*FLUX_TARGET_MODULES, *TIME_MODULES)

    def encode_prompt(self, pipeline, prompt, reference=None):
        embeds, _, pooled, _ = pipeline.encode_prompt(
            *(prompt, None, None), do_classifier_free_guidance=False, max_sequence_length=self.args.max_sequence_length
        )
        return {"encoder_hidden_states": embeds[0], "pooled_projections": pooled[0]}


class Sana(Backbone):
    pipeline, transformer, vae = "SanaPipeline", "SanaTransformer2DModel", "AutoencoderDC"
    example = "Efficient-Large-Model/Sana_1600M_512px_diffusers"
    defaults = {"both": {"max_sequence_length": 300}}
    uncond_prompt = ""
    multiple, factor, channels, time_module = 32, 32, 32, "time_embed.emb"
    targets = ("to_q", "to_k", "to_v", "to_out.0", *TIME_MODULES)

    def encode_prompt(self, pipeline, prompt, reference=None):
        # the instruction that the pipeline itself puts before prompts
        instruction = inspect.signature(pipeline.__call__).parameters["complex_human_instruction"].default
        embeds, mask, _, _ = pipeline.encode_prompt(
            prompt,
            do_classifier_free_guidance=False,
            max_sequence_length=self.args.max_sequence_length,
            complex_human_instruction=None if prompt == self.args.uncond_prompt else instruction,
        )
        return {"encoder_hidden_states": embeds[0], "encoder_attention_mask": mask[0]}


class OpenUni(Sana):
    """InternVL3 reads the prompt and learned queries; what it makes of these, sent through a few layers (connector)
    and one matrix (projector), is the condition. Only Sana is trained."""

    example = Sana.example
    parts = ("connector.", "projector.", "meta_queries", "transformer.")  # of the checkpoint
    uncond_prompt = "Generate an image."
    template = "<|im_start|>user\nGenerate an image: {}<|im_end|>\n<|im_start|>assistant\n<img>"
    uncond_template = "<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n<img>"

    def problems(self):
        """What is wrong with --openuni_checkpoint."""
        flag = f"--openuni_checkpoint {self.args.openuni_checkpoint}"
        if not self.args.openuni_checkpoint.is_file():
            return [f"{flag}: no such file"]
        try:
            missing = [prefix for prefix in self.parts if not self.state_dict(prefix)]
        except Exception as error:  # damaged files raise of all kinds
            return [f"{flag}: not a file of weights ({(str(error) or repr(error)).splitlines()[0]})"]
        return [f"{flag}: holds no {prefix}*" for prefix in missing]

    def state_dict(self, prefix):
        """The tensors of --openuni_checkpoint whose names begin with `prefix`."""
        state_dict = torch.load(self.args.openuni_checkpoint, map_location="cpu", weights_only=True, mmap=True)
        state_dict = state_dict.get("state_dict", state_dict)
        return {name.removeprefix(prefix): value for name, value in state_dict.items() if name.startswith(prefix)}

    def load_text(self, dtype, device):
        from transformers import InternVLForConditionalGeneration, SiglipVisionConfig
        from transformers.models.siglip.modeling_siglip import SiglipEncoder

        with reading(f"--openuni_llm {self.args.openuni_llm}"):
            llm = InternVLForConditionalGeneration.from_pretrained(
                self.args.openuni_llm, cache_dir=self.args.cache_dir, dtype=dtype, use_safetensors=True
            )
        weights = self.state_dict("connector.")
        intermediate, hidden = weights["layers.0.mlp.fc1.weight"].shape
        config = SiglipVisionConfig(
            hidden_size=hidden,
            intermediate_size=intermediate,
            num_hidden_layers=len({name.split(".")[1] for name in weights}),
            num_attention_heads=hidden // 64,
            hidden_act="gelu_pytorch_tanh",
            layer_norm_eps=1e-6,
            attn_implementation="sdpa",
        )
        text = torch.nn.Module()
        text.tokenizer = AutoTokenizer.from_pretrained(
            self.args.openuni_llm, cache_dir=self.args.cache_dir, trust_remote_code=False
        )
        text.language_model, text.connector = llm.model.language_model, SiglipEncoder(config)
        text.connector.load_state_dict(weights)
        weights = self.state_dict("projector.")
        text.projector = torch.nn.Linear(*reversed(weights["weight"].shape))
        text.projector.load_state_dict(weights)
        text.register_buffer("meta_queries", self.state_dict("meta_queries")[""])
        return text.to(device, dtype).requires_grad_(False).eval()

    def encode_prompt(self, text, prompt, reference=None):
        template = self.uncond_template if prompt == self.args.uncond_prompt else self.template
        queries = text.meta_queries[None]
        ids = text.tokenizer(template.format(prompt), return_tensors="pt").input_ids.to(queries.device)
        embeds = torch.cat([text.language_model.get_input_embeddings()(ids), queries], dim=1)
        states = text.language_model(inputs_embeds=embeds).last_hidden_state[:, -queries.shape[1] :]
        embeds = text.projector(text.connector(inputs_embeds=states).last_hidden_state)[0]
        return {"encoder_hidden_states": embeds, "encoder_attention_mask": torch.ones(len(embeds))}

    def load_transformer(self, dtype):
        transformer = super().load_transformer(dtype)
        transformer.load_state_dict(self.state_dict("transformer."))
        return transformer


class QwenImage(Backbone):
    pipeline, transformer, vae = "QwenImagePipeline", "QwenImageTransformer2DModel", "AutoencoderKLQwenImage"
    example = "Qwen/Qwen-Image"
    defaults = {"full": {"learning_rate": 1e-5}}
    uncond_prompt = "Generate an image."
    unused_parameters = True  # the text half of the last block
    targets = (
        *FLUX_TARGET_MODULES[:8],
        *("img_mlp.net.0.proj", "img_mlp.net.2", "txt_mlp.net.0.proj", "txt_mlp.net.2"),
        *TIME_MODULES,
    )

    def encode_prompt(self, pipeline, prompt, reference=None):
        embeds, _ = pipeline.encode_prompt(prompt, max_sequence_length=self.args.max_sequence_length)
        mask = torch.ones(embeds.shape[1], dtype=torch.long)
        return {"encoder_hidden_states": embeds[0], "encoder_hidden_states_mask": mask}

    def predict(self, transformer, x, time, cond):
        cond, (height, width) = dict(cond), x.shape[-2:]
        tokens, shapes = pack_latents(x), [(1, height // 2, width // 2)]
        count = tokens.shape[1]
        if "reference" in cond:  # normalised latents of the picture to edit
            reference = cond.pop("reference").to(x)
            tokens = torch.cat([tokens, pack_latents(reference)], dim=1)
            shapes.append((1, reference.shape[-2] // 2, reference.shape[-1] // 2))
        velocity = transformer(
            hidden_states=tokens, timestep=time, img_shapes=[shapes] * len(x), **cond, return_dict=False
        )[0]
        return unpack_latents(velocity[:, :count], height, width)


class QwenImageEdit(QwenImage):
    pipeline, example = "QwenImageEditPlusPipeline", "Qwen/Qwen-Image-Edit-2509"
    uncond_prompt = "Edit this image."

    def load_text(self, dtype, device):
        from transformers import Qwen2VLImageProcessor

        # the whole processor would need torchvision, for the sake of videos
        self.image_processor = Qwen2VLImageProcessor.from_pretrained(
            self.args.pretrained_model_name_or_path,
            subfolder="processor",
            revision=self.args.revision,
            cache_dir=self.args.cache_dir,
        )
        pipeline = super().load_text(dtype, device, processor=None)
        pipeline.processor = functools.partial(self.process, pipeline.tokenizer)
        return pipeline

    def process(self, tokenizer, text, images, **kwargs):
        """What Qwen2VLProcessor makes of a text with a picture: as many places in it as the picture has patches."""
        from transformers import BatchFeature

        pixels = self.image_processor(images=images, return_tensors="pt")
        count = pixels["image_grid_thw"].prod().item() // self.image_processor.merge_size**2
        text = [text[0].replace("<|image_pad|>", "<|image_pad|>" * count)]
        return BatchFeature({**tokenizer(text, return_tensors="pt"), **pixels})

    def encode_prompt(self, pipeline, prompt, reference=None):
        from diffusers.pipelines.qwenimage import pipeline_qwenimage_edit_plus as stock

        width, height = stock.calculate_dimensions(stock.CONDITION_IMAGE_SIZE, reference.width / reference.height)
        embeds, _ = pipeline.encode_prompt(prompt, [pipeline.image_processor.resize(reference, height, width)])
        embeds = embeds[0, : self.args.max_sequence_length]
        mask = torch.ones(len(embeds), dtype=torch.long)
        return {"encoder_hidden_states": embeds, "encoder_hidden_states_mask": mask}


BACKBONES = {
    "flux": Flux,
    "sd3": StableDiffusion3,
    "sana": Sana,
    "openuni": OpenUni,
    "qwenimage": QwenImage,
    "qwenimage-edit": QwenImageEdit,
}


def predict_velocity(x, t, target, cond, *, transformer, backbone, dtype, two_times, autocast=nullcontext, seed=None):
    """The model's velocity [B, C, h, w], float32, at x [B, C, h, w] on the way from t to t' [B].

    With one time embedding only, the time it is told is t - t' / 2. Calls with one `seed` drop the same (dropout).
    """
    if seed is not None:
        torch.manual_seed(seed)
    time = torch.stack([t, target], dim=-1) if two_times else t - target / 2
    cond = {name: value.to(dtype) if value.is_floating_point() else value for name, value in cond.items()}
    with autocast():
        return backbone.predict(transformer, x.to(dtype), time, cond).float()


class TwoTimes:
    """For a time embedding to derive from too: one that is also told the target time, emb(t) + (t - t') emb2(t').

    Where t' = t the two agree, so that the model is as it was there; a model that is saved keeps its names for what
    it had before, and a stock pipeline, which knows of one time only, draws with it as before.
    """

    def forward(self, timestep, *args, **kwargs):
        if timestep.ndim == 1:
            return super().forward(timestep, *args, **kwargs)
        t, target = timestep.unbind(-1)
        embedded = super().forward(t, *args, **kwargs)
        second = self.target_timestep_embedder(self.time_proj(target).to(embedded.dtype))
        gap = (t - target) * (self.time_proj.scale / 1000)  # times come in units of 1 or of 1/1000
        return embedded + gap[:, None].to(embedded.dtype) * second


def add_target_time(transformer, time_module, init):
    """Gives the transformer a second time embedding: a copy of the first, one that says nothing yet (zero), or N(0,
    0.02)."""
    module = transformer.get_submodule(time_module)
    second = module.target_timestep_embedder = copy.deepcopy(module.timestep_embedder)
    if init == "zero":
        torch.nn.init.zeros_(second.linear_2.weight)
        torch.nn.init.zeros_(second.linear_2.bias)
    elif init == "normal":
        for parameter in second.parameters():
            torch.nn.init.normal_(parameter, std=0.02)
    module.__class__ = type(f"TwoTimes{type(module).__name__}", (TwoTimes, type(module)), {})


def load_two_times(transformer, time_module, folder):
    """Gives a transformer, saved in `folder` with a second time embedding and loaded without, that embedding."""
    prefix = f"{time_module}.target_timestep_embedder."
    saved = {}
    for path in Path(folder).glob("*.safetensors"):
        with safe_open(path, "pt") as file:
            saved |= {key.removeprefix(prefix): file.get_tensor(key) for key in file.keys() if key.startswith(prefix)}  # noqa: SIM118
    add_target_time(transformer, time_module, "copy")
    transformer.get_submodule(time_module).target_timestep_embedder.load_state_dict(saved)


def save_model(accelerator, folder, model, config_class, dtype):
    """Writes all weights of a model, sharded or not, so that `config_class.from_pretrained` loads them."""
    state_dict = {}
    for name, value in model.state_dict(keep_vars=True).items():
        value = whole(value)
        if accelerator.is_main_process:
            state_dict[name] = value.to("cpu", dtype, copy=True)  # DeepSpeed's may be views of one tensor
    if accelerator.is_main_process:
        with writing(folder):
            folder.mkdir(parents=True, exist_ok=True)
            with torch.device("meta"):  # a sharded model's class has another name
                config_class.from_config(model.config).save_config(folder)
            pattern = "diffusion_pytorch_model{suffix}.safetensors"
            save_torch_state_dict(state_dict, folder, filename_pattern=pattern, max_shard_size="10GB")


class Teacher:
    """A second set of the trained tensors, not a second network: their moving average, or what they were at first.

    Within the context `teacher()` the model computes with it. Decay 0 is the model itself: no second set.
    """

    def __init__(self, parameters, decay, renew=lambda: None):
        self.parameters, self.renew, self.goal, self.decay = list(parameters), renew, decay, 0.0
        self.tensors = [tensor.clone() for tensor in self.live] if decay else []

    @property
    def live(self):
        """The trained tensors themselves; asked for anew each time, for wrapping a model may move them."""
        return [parameter.detach() for parameter in self.parameters]

    @torch.no_grad()
    def swap(self):
        for ours, theirs in zip(self.live, self.tensors, strict=True):
            kept = ours.clone()
            ours.copy_(theirs)
            theirs.copy_(kept)
        self.renew()

    @contextmanager
    def __call__(self):
        if self.goal == 0:
            yield
            return
        self.swap()
        try:
            yield
        finally:
            self.swap()

    @torch.no_grad()
    def update(self, taken=True):
        """Moves the average after a step, but not after one that was not taken; its decay ramps up from 0."""
        if 0 < self.goal < 1:
            self.decay = ramp_decay(self.decay, self.goal)
            if taken:
                torch._foreach_lerp_(self.tensors, self.live, 1 - self.decay)

    def catch_up(self, step):
        """The decay as it is after `step` updates."""
        for _ in range(step if 0 < self.goal < 1 else 0):
            self.decay = ramp_decay(self.decay, self.goal)


# ---------------------------------------------------------------------------------------------------------------------
# Objective
# ---------------------------------------------------------------------------------------------------------------------


STYLES = {  # of `sample_flow`: where a prediction aims, and what goes with it
    "few": {"stochast_ratio": 1.0, "gaps": (0.001, 0.7), "time_dist_ctrl": (1.0, 1.0, 1.0)},
    "any": {"stochast_ratio": 0.0, "gaps": (0.001, 0.5), "time_dist_ctrl": (1.0, 1.0, 1.0)},
    "mul": {"stochast_ratio": 0.0, "gaps": (0.001, 0.0), "time_dist_ctrl": (1.17, 0.8, 1.1)},
}


def time_grid(steps, gaps, time_dist_ctrl):
    """Times [steps + 1], float64, from noise to 0: 1 - (1 - (1 - u^a)^b)^c for even u between the gaps at both ends, a
    power of Kumaraswamy's distribution function, then 0."""
    a, b, c = time_dist_ctrl
    u = torch.linspace(gaps[0], 1 - gaps[1], steps + (gaps[1] == 0), dtype=torch.float64)[:steps]
    return torch.cat([1 - (1 - (1 - u**a) ** b) ** c, torch.zeros(1, dtype=torch.float64)])


@torch.no_grad()
def sample_flow(
    predict,
    noise,
    cond,
    uncond=None,
    *,
    steps,
    style="few",
    generators=None,
    cfg_scale=0.0,
    stochast_ratio=None,
    extrapol_ratio=0.0,
    order=1,
    gaps=None,
    time_dist_ctrl=None,
):
    """Samples x [B, ...] from noise [B, ...] in `steps` forward passes (UCGM, arXiv 2505.07447).

    `style` says where each prediction aims: few at 0, any at the next time, mul (multi-step) nowhere beyond the time
    it stands at; unset arguments are STYLES'. A share s = stochast_ratio of the noise is renewed in each step, from
    one generator per image; "SDE" sets s = min(1, 2 t (t - t₊) / t₊²). `extrapol_ratio` goes beyond each prediction
    by its difference from the one before. Order 2 corrects each step by Heun's rule, for which velocities must be
    those at a time: mul only. cfg_scale 0 is no guidance, else F(uncond) + cfg_scale (F(cond) - F(uncond)).
    """
    preset = STYLES[style]
    if stochast_ratio is None:
        stochast_ratio = 0.8 if style == "few" and steps == 1 else preset["stochast_ratio"]
    if order == 2 and (style != "mul" or stochast_ratio):
        raise ValueError("sampling order 2 needs style mul and stochast_ratio 0: only velocities at a time average")
    times = time_grid(-(-steps // order), gaps or preset["gaps"], time_dist_ctrl or preset["time_dist_ctrl"]).tolist()

    def velocity(x, t, target):
        t, target = (torch.full((len(x),), value, device=x.device) for value in (t, target))
        x = x.to(noise.dtype)
        if not cfg_scale:
            return predict(x, t, target, cond).double()
        both = {name: torch.cat([cond[name], uncond[name]]) for name in cond}
        twice = [torch.cat([value, value]) for value in (x, t, target)]
        with_prompt, without = predict(*twice, both).double().chunk(2)
        return without + cfg_scale * (with_prompt - without)

    x, before = noise.double(), None
    for t, after in zip(times[:-1], times[1:], strict=True):
        F = velocity(x, t, {"few": 0.0, "any": after, "mul": t}[style])  # noqa: N806
        x_hat, z_hat = x - t * F, x + (1 - t) * F
        predicted = x_hat, z_hat
        if extrapol_ratio and before is not None:
            x_hat, z_hat = (now + extrapol_ratio * (now - old) for now, old in zip(predicted, before, strict=True))
        before = predicted
        s = stochast_ratio
        if s == "SDE":
            s = min(1.0, 2 * t * (t - after) / after**2) if after else 1.0
        if s and after:
            fresh = [torch.randn(noise.shape[1:], generator=generator) for generator in generators]
            z_hat = (1 - s) ** 0.5 * z_hat + s**0.5 * torch.stack(fresh).to(z_hat)
        ahead = (1 - after) * x_hat + after * z_hat
        if order == 2 and after:
            ahead = x - (t - after) * (F + velocity(ahead, after, after)) / 2
        x = ahead
    return x.to(noise.dtype)


def partition(batch_size, probs):
    """{kind: samples of a batch}: as near to the shares as whole numbers come, one at least of each with a share."""
    kinds = [kind for kind in KINDS if probs[kind] > 0]
    total = sum(probs[kind] for kind in kinds)
    shares = {kind: batch_size * probs[kind] / total for kind in kinds}
    counts = {kind: max(1, math.floor(shares[kind])) for kind in kinds}
    while rest := batch_size - sum(counts.values()):
        sign = 1 if rest > 0 else -1
        movable = [kind for kind in kinds if rest > 0 or counts[kind] > 1]
        counts[max(movable, key=lambda kind: sign * (shares[kind] - counts[kind]))] += sign
    return counts


def sample_times(batch_size, *, args, generator):
    """Kinds of the samples (a list of B), times t [B] and target times t' [B], 0 <= t' <= t <= 1, float32.

    t ~ c Beta(a, b) with a, b, c = --time_dist_ctrl; r = --consistc_ratio; U ~ U(0, 1)
        e2e       t = 1, t' = 0
        mul       t' = t - U t min(0.05, r)
        any, adv  t' = t - U t r
        one       t' = 0
    """
    a, b, c = args.time_dist_ctrl
    rng = np.random.default_rng(torch.randint(2**62, (), generator=generator).item())
    t = torch.from_numpy(rng.beta(a, b, batch_size)).float().clamp(0, 1) * c
    target = t - torch.rand(batch_size, generator=generator) * args.consistc_ratio * t
    near = t - torch.rand(batch_size, generator=generator) * min(NEAR, args.consistc_ratio) * t
    kinds = [kind for kind, count in partition(batch_size, args.probs).items() for _ in range(count)]
    for i, kind in enumerate(kinds):
        t[i] = 1.0 if kind == "e2e" else t[i]
        target[i] = {"e2e": 0.0, "one": 0.0, "mul": near[i]}.get(kind, target[i])
    return kinds, t, target


def like(t, x):
    """Times [B] in the shape that multiplies x [B, ...]."""
    return t.view(-1, *[1] * (x.ndim - 1)).to(x)


def split_prediction(velocity, x_t, t):
    """The data x̂ and the noise ẑ that a velocity F [B, ...] at x_t = |t| z + (1 - |t|) x points to."""
    t = like(t.abs(), x_t)
    return x_t - t * velocity, x_t + (1 - t) * velocity


def take(cond, index):
    """The samples `index` of conditions {name: [B, ...]}."""
    return {name: value[index] for name, value in cond.items()}


def enhance_target(predict, x_t, t, velocity, cond, uncond, *, ratio, data_free=False):
    """Training-time guidance: v + ω (F(x_t, t, t, cond) - F(x_t, t, t, uncond)), both in one forward pass.

    `data_free` takes no v: F(uncond) + ω (F(cond) - F(uncond)), the guided velocity of a frozen teacher.
    """
    both = {name: torch.cat([cond[name], uncond[name]]) for name in cond}
    twice = torch.cat([t, t])
    with_prompt, without = predict(torch.cat([x_t, x_t]), twice, twice, both).chunk(2)
    return (without if data_free else velocity) + ratio * (with_prompt - without)


def walk(predict, x_t, t, target, velocity, cond, *, order):
    """S [B, ...], the displacement of the model's own path from t_m = max(t - 0.01, t') to t' in `order` equal steps.

    The path starts where the velocity target v leads in 0.01: x_m = x_t - 0.01 v.
    """
    start = torch.maximum(t - DELTA, target)
    x, displacement = x_t - DELTA * velocity, torch.zeros_like(x_t)
    for i in range(order):
        here, there = (start + (target - start) * (k / order) for k in (i, i + 1))
        step = predict(x, here, there, cond)
        displacement = displacement + like(here - there, x) * step
        x_hat, z_hat = split_prediction(step, x, here)
        x = like(there, x) * z_hat + (1 - like(there, x)) * x_hat
    return displacement


def consistency_target(prediction, displacement, velocity, t, target):
    """What recursive consistency asks F [B, ...] to be (RCGM): F - clamp(G, -1, 1), without gradient.

    G = 100 (t - t') F - 100 S - v is zero where F is the mean velocity from t to t', for
    (t - t') F = 0.01 v + S; next to t', where t - t' < 0.01, G = F - S / (t - t') - v.
    """
    gap = like(t - target, prediction)
    prediction = prediction.detach()
    near = prediction - displacement / gap.clamp(min=1e-6) - velocity
    far = (gap * prediction - displacement) / DELTA - velocity
    return prediction - torch.where(gap < DELTA, near, far).clamp(-1, 1)


def distance(prediction, target, loss_type):
    """Loss [B] of predictions [B, ...]: their mean squared error m, or of it Barron's robust loss (arXiv 1701.03077)
    with α = 1 and c = 1e-3, as a weight without gradient: m (m / c² + 1)^-½ / c."""
    error = (prediction - target).square().flatten(1).mean(dim=1)
    if loss_type == "l2":
        return error
    weight = (error.detach() / (BARRON_C**2 + 1e-8) + 1) ** -0.5
    return error * weight / BARRON_C


def rectification(predict, prediction, x_t, cond, *, args, generator):
    """Loss [n] of one-step samples (t = 1, t' = 0): their velocity is moved by Δ, the difference between what the
    model says of its own samples (negative times) and of data (positive times), both in one forward pass."""
    x_hat = (x_t - prediction).detach()
    t = torch.rand(len(x_hat), generator=generator).to(x_hat.device)
    noise = torch.randn(x_hat.shape, generator=generator).to(x_hat)
    noisy = like(t, x_hat) * noise + (1 - like(t, x_hat)) * x_hat
    both, times = {name: torch.cat([value, value]) for name, value in cond.items()}, torch.cat([-t, t])
    with torch.no_grad():
        fake, real = predict(torch.cat([noisy, noisy]), times, times, both).chunk(2)
    return distance(prediction, prediction.detach() - (fake - real).clamp(-1, 1), args.loss_type)


def compute_loss(predict, teacher, latents, cond, uncond, *, args, generator):
    """The TwinFlow loss of a batch (arXiv 2512.05150): (loss, {name: its parts}).

    predict(x, t, t', cond) is the model's velocity [B, ...] for x [B, ...] on its way from t to t' [B]; within the
    context `teacher()` it is the teacher's: the moving average of the model, or the frozen model before training.
    latents [B, ...] is data, cond and uncond {name: [B, ...]} are conditions. Forward passes: 1 with gradient, and
    without one each for the own samples, guidance, rectification, and each of --estimate_order steps.
    """
    device, batch_size = latents.device, len(latents)
    kinds, t, target = sample_times(batch_size, args=args, generator=generator)
    low, high = args.enhanced_range
    enhanced_times = ((low <= t) & (t <= high)).tolist()
    t, target = t.to(device), target.to(device)
    of_kind = {kind: [i for i in range(batch_size) if kinds[i] == kind] for kind in KINDS}
    frozen = args.ema_decay_rate == 1

    own = list(range(batch_size)) if args.image_free else of_kind["adv"]
    if own:
        noise = torch.randn(latents[own].shape, generator=generator).to(latents)
        ones = torch.ones(len(own), device=device)
        with torch.no_grad():
            generated = noise - predict(noise, ones, 0 * ones, take(cond, own))
        latents = latents.index_copy(0, torch.tensor(own, device=device), generated)
    noise = torch.randn(latents.shape, generator=generator).to(latents)
    x_t = like(t, noise) * noise + (1 - like(t, noise)) * latents
    velocity = noise - latents
    adversarial = torch.tensor([kind == "adv" for kind in kinds], device=device)
    t, target = torch.where(adversarial, -t, t), torch.where(adversarial, -t, target)

    real = [i for i in range(batch_size) if kinds[i] != "adv"]
    guided = [i for i in real if enhanced_times[i]] or real[:1]  # never none: processes would wait for each other
    if args.enhanced_ratio and guided:
        with torch.no_grad(), teacher():
            enhanced = enhance_target(
                *(predict, x_t[guided], t[guided], velocity[guided], take(cond, guided), take(uncond, guided)),
                ratio=args.enhanced_ratio,
                data_free=frozen and args.image_free,
            )
        inside = like((low <= t[guided]) & (t[guided] <= high), enhanced).bool()
        velocity[guided] = torch.where(inside, enhanced, velocity[guided])

    walked = real if args.estimate_order and any(of_kind[kind] for kind in ("e2e", "one", "any")) else []
    if walked:
        with torch.no_grad(), nullcontext() if frozen else teacher():
            displacement = walk(
                *(predict, x_t[walked], t[walked], target[walked], velocity[walked], take(cond, walked)),
                order=args.estimate_order,
            )

    prediction = predict(x_t, t, target, cond)
    goal = velocity.clone()
    if walked:
        goal[walked] = consistency_target(
            prediction[walked], displacement, velocity[walked], t[walked], target[walked]
        )
    losses = distance(prediction, goal, args.loss_type)
    weight = torch.tan((1 - (t.abs() - target.abs())) * math.pi / 2.5) + 1
    losses = torch.where(adversarial, 1.0, weight) * losses
    counted = range(batch_size) if args.estimate_order else of_kind["mul"] + of_kind["adv"]
    loss = losses[list(counted)].mean()
    logs = {f"loss_{kind}": losses[index].detach().mean() for kind, index in of_kind.items() if index}
    ends = of_kind["e2e"]
    if ends and args.consistc_ratio == 1 and args.dist_match_cof:
        rectified = rectification(
            predict, prediction[ends], x_t[ends], take(cond, ends), args=args, generator=generator
        ).mean()
        loss, logs["loss_rectification"] = loss + args.dist_match_cof * rectified, rectified.detach()
    return loss, logs


def ramp_decay(decay, goal):
    """The next decay of the moving average on its way from 0 to `goal`."""
    return decay + 0.5 * (1 - decay) * (goal - decay)


# ---------------------------------------------------------------------------------------------------------------------
# Data
# ---------------------------------------------------------------------------------------------------------------------


@dataclass
class PromptExample:
    """A picture and its captions; `read` and `read_reference` open the picture and the one it was edited from.

    `stamp` changes when the files do: what was encoded of others is then not used.
    """

    name: str
    captions: list[str]
    read: Callable[[], Image.Image] | None = None
    read_reference: Callable[[], Image.Image] | None = None
    stamp: str = ""


def read_prompts(path):
    """Examples of --prompts_file."""
    if not path.is_file():
        return [], [f"--prompts_file {path}: no such file"]
    try:
        lines = [line.strip() for line in path.read_text("utf-8-sig").splitlines()]
    except (OSError, ValueError):
        return [], [f"--prompts_file {path}: not UTF-8 text"]
    return [PromptExample(f"{path}:{i + 1}", [line]) for i, line in enumerate(lines) if line], []


def has_parquet(args):
    """Whether --train_data_dir holds parquet files, not pictures."""
    return args.train_data_dir is not None and any(args.train_data_dir.glob("*.parquet"))


def read_captioned_folder(args):
    """Examples of --train_data_dir, with captions from the .txt file beside each picture."""
    folder, examples = args.train_data_dir, []
    paths, problems = picture_files(folder)
    for path in paths:
        text_file, read_reference, files = path.with_suffix(".txt"), None, [path]
        if not path.is_file():
            problems.append(f"{path}: not a readable picture (no file)")
            continue
        text = read_text_file(text_file, problems)
        if text is None and text_file.exists():
            continue
        if args.reference_data_dir:
            reference = args.reference_data_dir / path.name
            read_reference = functools.partial(Image.open, reference)
            if not reference.is_file():
                problems.append(f"--reference_data_dir: no {reference} for {path}")
                continue
            files.append(reference)
        stamp = " ".join(f"{file} {file.stat().st_size} {file.stat().st_mtime_ns}" for file in files)
        captions = [line.strip() for line in (text or "").splitlines() if line.strip()]
        examples.append(PromptExample(str(path), captions, functools.partial(Image.open, path), read_reference, stamp))
    return examples, problems


def read_captioned_dataset(args):
    """Examples of --dataset_name, or of the parquet files in --train_data_dir."""
    flag = f"--dataset_name {args.dataset_name}" if args.dataset_name else f"--train_data_dir {args.train_data_dir}"
    if args.train_data_dir and not args.train_data_dir.is_dir():
        return [], [f"{flag}: no such folder"]
    caption_column = args.caption_column or "text"

    def columns(names):
        bytes_alone = args.image_column not in names and "image_bytes" in names
        pictures = ["image_bytes" if bytes_alone else args.image_column, args.reference_column]
        return [name for name in pictures if name], [caption_column]

    source = {}
    if not args.dataset_name:
        source = {"source": "parquet", "data_files": sorted(map(str, args.train_data_dir.glob("*.parquet")))}
    dataset, problems = open_dataset(args, columns, flag=flag, **source)
    if problems:
        return [], problems
    pictures, _ = columns(dataset.column_names)
    examples = []
    for row, caption in enumerate(dataset[caption_column]):
        readers = [functools.partial(read_row, dataset, row, column) for column in pictures]
        name = f"{args.dataset_name or args.train_data_dir}[{row}]"
        captions = caption if isinstance(caption, list) else [caption]
        examples.append(PromptExample(name, captions, *readers, stamp=f"{dataset._fingerprint} {row}"))
    return examples, []


def find_examples(args):
    """The training pictures with their captions, and what is wrong with them: (examples, problems)."""
    if args.image_free:
        examples, problems = read_prompts(args.prompts_file)
    elif args.train_data_dir and args.train_data_dir.is_dir() and not has_parquet(args):
        examples, problems = read_captioned_folder(args)
    else:
        examples, problems = read_captioned_dataset(args)
    if not examples and not problems:
        source = args.train_data_dir or args.dataset_name or args.prompts_file
        problems.append(f"{source}: no {'prompts' if args.image_free else 'pictures'} in it")

    def look(example):
        for read in (example.read, example.read_reference):
            if read:
                upright(read())

    problems += check_pictures(examples, look)
    for example in examples:
        wrong = [caption for caption in example.captions if not isinstance(caption, str) or not caption.strip()]
        if wrong or not example.captions:
            problems.append(f"{example.name}: its caption must be text and not empty, not {(wrong or [None])[0]!r}")
    return examples, problems


def encoding_flags(args):
    """All flags that decide what becomes of a prompt or a picture."""
    names = ("pretrained_model_name_or_path", "model_type", "revision", "variant", "max_sequence_length", "seed")
    names += ("resolution", "center_crop", "image_interpolation_mode", "mixed_precision", "openuni_checkpoint")
    names += ("train_data_dir", "dataset_name", "dataset_config_name", "reference_data_dir", "openuni_llm")
    return [str(getattr(args, name)) for name in names]


class TwinFlowDataset(Dataset):
    """Samples by (epoch, index): the conditions of a caption and of the unconditional prompt, {name: tensor}, and
    what a picture is: its latents if cached, else its pixels; the same of the picture it was edited from.

    Where a picture is cropped depends on (seed, index), whether it is mirrored and which of its captions is taken on
    (seed, epoch, index): neither workers, nor the cache, nor an interruption change what is drawn.
    """

    def __init__(self, examples, encoded, args):
        self.examples, self.encoded, self.args = examples, encoded, args
        # every batch is full, for each holds all kinds of samples: the first pictures come twice in an epoch
        self.length = -(-len(examples) // args.train_batch_size) * args.train_batch_size

    def picture_keys(self):
        """(index, flipped) of all that training can ask for."""
        flips = (False, True) if self.args.random_flip else (False,)
        return [(index, flipped) for index in range(len(self.examples)) for flipped in flips]

    def pixel_values(self, key, reference=False):
        """A picture, resized to cover the resolution, cropped and perhaps mirrored: [3, H, W] in [-1, 1]."""
        (index, flipped), args = key, self.args
        centering = (0.5, 0.5) if args.center_crop else np.random.default_rng((args.seed, index)).random(2)
        example = self.examples[index]
        image = upright((example.read_reference if reference else example.read)())
        return to_pixels(image, args, tuple(centering), flipped)

    def __getitem__(self, position):
        (epoch, index), args = position, self.args
        index %= len(self.examples)
        rng, example = np.random.default_rng((args.seed, epoch, index)), self.examples[index]
        caption = example.captions[rng.integers(len(example.captions))]
        key = index, bool(args.random_flip and rng.random() < 0.5)
        # the text encoder of an edit sees the picture too
        about = (index, example.stamp) if example.read_reference else ()
        prompts = {"cond": (caption, *about), "uncond": (args.uncond_prompt, *about)}
        sample = {name: self.encoded.load("prompt", *prompt) for name, prompt in prompts.items()}
        if args.cache_latents and not args.image_free:
            sample |= self.encoded.load("picture", *key, example.stamp)
        elif not args.image_free:
            sample["pixel_values"] = self.pixel_values(key)
            if example.read_reference:
                sample["reference_values"] = self.pixel_values(key, reference=True)
        return sample

    def __len__(self):
        return self.length


def to_pixels(image, args, centering=(0.5, 0.5), flipped=False):
    """A PIL image, resized to cover --resolution, cropped and perhaps mirrored: [3, H, W] in [-1, 1]."""
    method = Image.Resampling[args.image_interpolation_mode.upper()]
    image = ImageOps.fit(image, (args.resolution, args.resolution), method, centering=centering)
    image = ImageOps.mirror(image) if flipped else image
    return to_tensor(image)


def collate(examples):
    """Tensors stacked; conditions {name: [B, ...]}, shorter texts padded with zeros, which their mask leaves out."""
    batch = {name: torch.stack([e[name] for e in examples]) for name in examples[0] if name not in ("cond", "uncond")}
    conditions = [example["cond"] for example in examples] + [example["uncond"] for example in examples]
    stacked = stack_conditions(conditions)
    batch["cond"], batch["uncond"] = (
        {name: value.chunk(2)[half] for name, value in stacked.items()} for half in (0, 1)
    )
    return batch


def stack_conditions(conditions):
    """{name: [B, ...]} of B conditions {name: [T, ...]}, padded with zeros to the longest."""
    return {name: pad_sequence([c[name] for c in conditions], batch_first=True) for name in conditions[0]}


# ---------------------------------------------------------------------------------------------------------------------
# Training
# ---------------------------------------------------------------------------------------------------------------------


def encode_prompts(accelerator, backbone, dataset, encoded, args, dtype):
    """Prompts, by the text encoders, which are gone afterwards, and not loaded where all is there already."""
    text = functools.cache(functools.partial(backbone.load_text, dtype, accelerator.device))
    prompts = []
    for index, example in enumerate(dataset.examples):
        about = (index, example.stamp) if example.read_reference else ()
        prompts += [(prompt, *about) for prompt in (*example.captions, args.uncond_prompt)]
    if args.validation_prompt:
        prompts.append((args.validation_prompt, *([str(args.validation_image)] if args.validation_image else [])))

    @torch.no_grad()
    def encode(kind, prompt, picture=None, stamp=None):  # the index of an example and its stamp, or a file
        if isinstance(picture, int):
            picture = upright(dataset.examples[picture].read_reference())
        elif picture:
            picture = upright(Image.open(picture))
        return backbone.encode_prompt(text(), prompt, picture)

    items = [("prompt", *prompt) for prompt in dict.fromkeys(prompts)]
    encoded.fill(accelerator, items, encode, "Encoding prompts")


def cache_latents(accelerator, vae, dataset, encoded):
    """Latents of every picture, as training can ask for it."""

    @torch.no_grad()
    def encode(kind, index, flipped, stamp):
        key = index, flipped
        tensors = {"latents": encode_images(vae, dataset.pixel_values(key)[None])[0]}
        if dataset.examples[index].read_reference:
            tensors["reference"] = encode_images(vae, dataset.pixel_values(key, reference=True)[None])[0]
        return tensors

    items = [("picture", *key, dataset.examples[key[0]].stamp) for key in dataset.picture_keys()]
    encoded.fill(accelerator, items, encode, "Caching latents")


def prepare_batch(batch, backbone, vae, args, device, offload):
    """(latents [B, C, h, w], conditions, unconditional conditions) of a batch, on the device."""
    if args.image_free:
        side = args.resolution // backbone.factor
        latents = torch.zeros(args.train_batch_size, backbone.channels, side, side, device=device)
    elif "latents" in batch:
        latents, reference = batch["latents"].to(device), batch.get("reference")
    else:
        with torch.no_grad(), offload_models(vae, device=device, offload=offload):
            latents = encode_images(vae, batch["pixel_values"])
            reference = encode_images(vae, batch["reference_values"]) if "reference_values" in batch else None
    conditions = []
    for kind in ("cond", "uncond"):
        values = {name: value.to(device) for name, value in batch[kind].items()}
        if not args.image_free and reference is not None:
            values["reference"] = reference.to(device)
        conditions.append(values)
    return latents, *conditions


def validate(accelerator, predict, teacher, transformer, backbone, vae, encoded, args, *, step):
    """Draws the validation prompt and sends the pictures to validation/step-N.png and the trackers."""
    device, count = accelerator.device, args.num_validation_images
    side = args.resolution // backbone.factor
    about = [str(args.validation_image)] if args.validation_image else []
    cond = stack_conditions([encoded.load("prompt", args.validation_prompt, *about)] * count)
    images, captions = [], []
    offloaded = offload_models(vae, device=device, offload=args.offload or args.cache_latents or args.image_free)
    with undisturbed(transformer, device=device), teacher(), offloaded:
        if args.validation_image:
            reference = to_pixels(upright(Image.open(args.validation_image)), args)[None]
            cond["reference"] = encode_images(vae, reference).expand(count, -1, -1, -1)
        cond = {name: value.to(device) for name, value in cond.items()}
        for sampler in args.validation_samplers:
            style, steps = sampler.split(":")
            generators = [torch.Generator().manual_seed(args.seed + i) for i in range(count)]
            shape = backbone.channels, side, side
            noise = torch.stack([torch.randn(shape, generator=generator) for generator in generators]).to(device)
            latents = sample_flow(predict, noise, cond, steps=int(steps), style=style, generators=generators)
            images += [to_image(decode_images(vae, part)) for part in latents.split(1)]
            captions += [f"{sampler}, seed {args.seed + i}" for i in range(count)]
    save_images(accelerator, args, images, captions, prompt=args.validation_prompt, step=step, columns=count)


def drawing_command(args, prompt):
    """The command in examples/ that draws `prompt` with the result."""
    folder = shlex.quote(str(args.output_dir.resolve()))
    image = " --image picture.png" if args.model_type == "qwenimage-edit" else ""
    return f"twinflow/generate.py {folder} --prompt {shlex.quote(prompt)}{image} --steps 2"


def describe(args, command):
    """README.md in the output folder: what was trained on what, and the command that draws with it."""
    folder = args.output_dir.resolve()
    kind = f"LoRA of rank {args.rank} and alpha {args.lora_alpha:g}" if args.training == "lora" else "all weights"
    description = f"""
# {folder.name}

For {args.pretrained_model_name_or_path} ({args.model_type}): {kind}, by TwinFlow, recipe {args.recipe}. It draws in 1,
2, 4 or more steps, without guidance. From the folder of the trainer:

```bash
python examples/{command}
```
"""
    tags = ["text-to-image", "twinflow", args.training, "diffusers"]
    write_model_card(args, description, tags, args.pretrained_model_name_or_path)


def about_run(args, dataset):
    """What of the data and the recipe is told before training."""
    kinds = ", ".join(f"{count} {kind}" for kind, count in partition(args.train_batch_size, args.probs).items())
    teachers = {0: "the model itself", 1: "the model before training"}
    teacher = teachers.get(args.ema_decay_rate, f"moving average, decay {args.ema_decay_rate:g}")
    what = "prompts" if args.image_free else "pictures"
    return {
        "kind": f"{args.model_type}, {'all weights' if args.training == 'full' else 'LoRA'}",
        "recipe": f"{args.recipe}, order {args.estimate_order}, guidance {args.enhanced_ratio:g}",
        "batch": kinds,
        "teacher": teacher,
        "data": f"{len(dataset.examples)} {what} at {args.resolution} px",
    }


def main(args):
    # 1. Accelerator, logging, seed
    backbone = BACKBONES[args.model_type](args)
    unused = DistributedDataParallelKwargs(find_unused_parameters=backbone.unused_parameters)
    accelerator, weight_dtype = start(args, [unused])
    device, quiet = accelerator.device, not accelerator.is_main_process
    set_seed(args.seed)

    # 2. Data
    examples, problems = find_examples(args)
    encoded = TensorCache(args.output_dir / "encoded", encoding_flags(args))
    dataset = TwinFlowDataset(examples, encoded, args)
    num_processes, accumulation = accelerator.num_processes, args.gradient_accumulation_steps
    total_batch_size = args.train_batch_size * accumulation * num_processes
    processes = {"process_index": accelerator.process_index, "num_processes": num_processes}
    sampler = StepSampler([0] * len(dataset), args.train_batch_size, seed=args.seed, **processes)
    steps_per_epoch = math.ceil(sampler.steps_per_epoch / accumulation)
    max_train_steps = args.max_train_steps or args.num_train_epochs * steps_per_epoch
    validation_steps = args.validation_steps or args.validation_epochs * steps_per_epoch
    run = run_settings(args, len(examples), num_processes)
    checkpoint = checkpoint_to_resume(args.output_dir, args.resume_from_checkpoint)
    problems += check_run(accelerator, args, max_train_steps, checkpoint, run)
    if problems:
        fail(accelerator, problems)
    hub_repo = create_hub_repo(accelerator, args)
    args.output_dir.mkdir(parents=True, exist_ok=True)

    # 3. Prompts and latents: text encoders and VAE are done before the transformer is loaded
    encode_prompts(accelerator, backbone, dataset, encoded, args, weight_dtype)
    free_memory()
    offload = args.offload or args.cache_latents or args.image_free
    vae = backbone.load_vae(weight_dtype).to("cpu" if offload else device)
    if args.cache_latents and not args.image_free:
        with offload_models(vae, device=device, offload=offload):
            cache_latents(accelerator, vae, dataset, encoded)

    # 4. Transformer, teacher
    full = args.training == "full"
    dtype = torch.float32 if full else weight_dtype  # of the weights; what is trained is always float32
    transformer = backbone.load_transformer(dtype)
    base_size = transformer.num_parameters()
    quantize_base(transformer, dtype, args.quantize_base).to(first_device(accelerator, args))
    set_seed(args.seed)  # whatever was encoded, or found encoded, before
    if full:
        add_target_time(transformer, backbone.time_module, args.target_time_init)
        transformer.requires_grad_(True)
    else:
        add_lora(
            transformer,
            rank=args.rank,
            alpha=args.lora_alpha,
            dropout=args.lora_dropout,
            target_modules=lora_targets(args),
        )
    prepare_blocks(transformer, args, device, weight_dtype)
    params = {name: parameter for name, parameter in transformer.named_parameters() if parameter.requires_grad}

    # 5. Optimizer and schedule
    optimizer = create_optimizer(args, list(params.values()), total_batch_size if args.scale_lr else 1)
    lr_scheduler = create_lr_scheduler(args, optimizer, max_train_steps)

    # 6. Prepare and resume
    bare = transformer
    if args.fsdp:
        lr_scheduler = accelerator.prepare(lr_scheduler)
    else:
        transformer, optimizer, lr_scheduler = accelerator.prepare(transformer, optimizer, lr_scheduler)
    teacher = Teacher(params.values(), args.ema_decay_rate, functools.partial(reshard, bare))
    pipeline_class = getattr(diffusers, backbone.pipeline)
    averages = {}  # of the trained tensors
    if 0 < args.ema_decay_rate < 1:
        averages = dict(zip(params, teacher.tensors, strict=True))
    if args.fsdp:
        register_sharded_checkpointing(accelerator, bare, optimizer, averages)
    elif full:
        register_tensor_checkpointing(accelerator, {"model": params, "teacher": averages})
    else:
        register_lora_checkpointing(accelerator, pipeline_class, {"transformer": bare}, optimizer)
        register_tensor_checkpointing(accelerator, {"teacher": averages})
    global_step = load_checkpoint(accelerator, checkpoint, lr_scheduler)
    teacher.catch_up(global_step)
    sampler.start, sampler.stop = global_step * accumulation, max_train_steps * accumulation
    train_dataloader = DataLoader(
        dataset, batch_sampler=sampler, collate_fn=collate, num_workers=args.dataloader_num_workers
    )

    # 7. Train
    about = about_run(args, dataset)
    print_header(accelerator, args, about, params.values(), base_size, max_train_steps, steps_per_epoch)
    start_logging(accelerator, args, "twinflow", global_step)
    predict = functools.partial(
        predict_velocity,
        transformer=transformer,
        backbone=backbone,
        dtype=dtype,
        two_times=full,
        autocast=accelerator.autocast,
    )
    shown = teacher if 0 < args.ema_decay_rate < 1 else nullcontext  # whose pictures and weights are the result
    draw = functools.partial(validate, accelerator, predict, shown, bare, backbone, vae, encoded, args)
    if args.validation_prompt and global_step == 0:
        draw(step=0)
    signals = catch_signals()
    metrics = open_metrics(args.output_dir / "metrics.jsonl", global_step) if accelerator.is_main_process else None
    transformer.train()
    progress_bar = tqdm(total=max_train_steps, initial=global_step, desc="Training", unit="step", disable=quiet)
    sums, skipped, started = {}, 0, time.perf_counter()
    for micro_step, batch in enumerate(read_batches(train_dataloader), start=sampler.start):
        with accelerator.accumulate(transformer):
            generator = step_generator(args.seed, *divmod(micro_step, accumulation), accelerator.process_index)
            torch.manual_seed(generator.initial_seed())
            latents, cond, uncond = prepare_batch(batch, backbone, vae, args, device, offload)
            loss, losses = compute_loss(
                functools.partial(predict, seed=generator.initial_seed() if args.lora_dropout else None),
                teacher,
                latents,
                cond,
                uncond,
                args=args,
                generator=generator,
            )
            accelerator.backward(loss)
            for name, value in {"loss": loss.detach(), **losses}.items():
                sums[name] = sums.get(name, 0.0) + value / accumulation
            if not accelerator.sync_gradients:
                continue
            grad_norm = accelerator.clip_grad_norm_(params.values(), args.max_grad_norm)
            totals = torch.stack([*sums.values(), torch.tensor(float(len(signals)), device=device)])
            *means, interrupted = accelerator.reduce(totals, reduction="mean").tolist()
            means = dict(zip(sums, means, strict=True))
            # a gradient scaler (fp16) skips infinite gradients itself
            finite = math.isfinite(means["loss"]) and (accelerator.scaler is not None or math.isfinite(grad_norm))
            if finite or accelerator.scaler is not None:
                optimizer.step()
            teacher.update(taken=finite)
            lr_scheduler.step()
            optimizer.zero_grad()

        global_step += 1
        skipped = 0 if finite else count_skipped(skipped, global_step)
        logs = {**means, **step_logs(optimizer, grad_norm, total_batch_size, started, device)}
        log_step(accelerator, progress_bar, metrics, global_step, logs)
        done = global_step == max_train_steps
        if interrupted or global_step % args.checkpointing_steps == 0:
            checkpoint = save_checkpoint(accelerator, args.output_dir, global_step, run, args.checkpoints_total_limit)
        if interrupted and not done:
            transformer = predict = draw = None  # see below
            stop_interrupted(accelerator, global_step, checkpoint, signals)
        if args.validation_prompt and global_step % validation_steps == 0 and not done:
            draw(step=global_step)
        sums, started = {}, time.perf_counter()
    progress_bar.close()

    # 8. Save and final validation
    with shown():
        save_dtype = torch.float32 if args.upcast_before_saving else weight_dtype
        if full:
            transformer_class = getattr(diffusers, backbone.transformer)
            save_model(accelerator, args.output_dir / "transformer", bare, transformer_class, save_dtype)
        else:
            save_lora(args.output_dir, pipeline_class, {"transformer": bare}, save_dtype)
    command = drawing_command(args, args.validation_prompt or examples[0].captions[0])
    if accelerator.is_main_process:
        metrics.close()
        plot_metrics(args.output_dir)
    if args.validation_prompt:
        draw(step=global_step)
    if accelerator.is_main_process:
        describe(args, command)
    transformer = predict = draw = None  # what DistributedDataParallel frees after the process group can hang in gloo
    accelerator.free_memory()
    accelerator.end_training()
    result = "transformer" if full else "pytorch_lora_weights.safetensors"
    results = {"result": result, "usage": "README.md", "loss": "loss.png", "pictures": "validation"}
    finish(accelerator, args, global_step, results, command, hub_repo, ["encoded/**"])


if __name__ == "__main__":
    main(parse_args())
