"""What the four trainers share: latents, flow matching, LoRA files and checkpoints, validation.

Here: how a command line is read and refused, how a process starts, is interrupted and ends.
"""

import argparse
import json
import logging
import math
import os
import shlex
import signal
import sys
import time
from contextlib import contextmanager
from pathlib import Path


if "--verbose" not in sys.argv:  # before the libraries are imported, which some of them remark upon
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("DIFFUSERS_VERBOSITY", "error")
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)

import torch
from accelerate import Accelerator
from accelerate.utils import ProjectConfiguration
from diffusers.optimization import SchedulerType
from diffusers.utils import logging as diffusers_logging
from safetensors import safe_open
from transformers.utils import logging as transformers_logging


WEIGHTING_SCHEMES = ("none", "sigma_sqrt", "logit_normal", "mode", "cosmap")
LR_SCHEDULERS = [scheduler.value for scheduler in SchedulerType if scheduler != SchedulerType.PIECEWISE_CONSTANT]
TRACKERS = ("tensorboard", "wandb", "all", "none")
MAX_SKIPPED_STEPS = 10  # in a row, for want of a finite loss
# Flags that a resumed run may change: they do not touch what a step computes, or only how many there are.
CHANGEABLE = {
    *("allow_tf32", "cache_dir", "gradient_checkpointing", "offload", "dataloader_num_workers", "depth_batch_size"),
    *("cache_latents", "cache_latents_to_disk", "cache_text_encoder_outputs_to_disk", "disk_cache_dir"),
    *("cache_prompts", "prior_generation_precision", "sample_batch_size"),
    *("max_train_steps", "num_train_epochs", "checkpointing_steps", "checkpoints_total_limit", "local_rank"),
    *("validation_prompt", "validation_image", "validation_mask", "validation_steps", "validation_epochs"),
    *("num_validation_images", "validation_width", "validation_height", "validation_samplers"),
    *("final_validation_prompt", "skip_final_inference", "resume_from_checkpoint"),
    *("output_dir", "output_name", "save_format", "save_every_n_epochs", "logging_dir", "report_to", "verbose"),
    *("upcast_before_saving", "push_to_hub", "hub_token", "hub_model_id"),
}


class HelpFormatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """The default in the help of every argument that has one, the example command as it stands."""

    def _get_help_string(self, action):
        if action.default is None or action.default is False:  # 0 is worth telling
            return action.help
        if isinstance(action.default, (list, tuple)):  # as it would be typed
            return f"{action.help} (default: {' '.join(map(str, action.default))})"
        return super()._get_help_string(action)

    def _get_default_metavar_for_optional(self, action):
        """What kind of value a flag takes, where the flag's own name would only be repeated."""
        kinds = {Path: "PATH", int: "N", "whole number": "N", "number": "X"}
        return kinds.get(action.type) or kinds.get(getattr(action.type, "__name__", ""), "TEXT")

    def _format_args(self, action, default_metavar):
        """`A ...` of several values, not `A [A ...]`, which long choices make unreadable."""
        several = action.nargs == argparse.ONE_OR_MORE
        return (
            f"{self._metavar_formatter(action, default_metavar)(1)[0]} ..."
            if several
            else (super()._format_args(action, default_metavar))
        )

    def _format_action_invocation(self, action):
        switch = isinstance(action, argparse.BooleanOptionalAction)
        return ", ".join(action.option_strings) if switch else super()._format_action_invocation(action)


class Switch(argparse.BooleanOptionalAction):
    """--x and --no-x, and `--x True` or `--x False` as older commands spell it."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.nargs = "?"

    def __call__(self, parser, namespace, value, option_string=None):
        words = {None: True, "true": True, "false": False}
        if value not in words and value.lower() not in words:
            parser.error(f"{option_string} {value}: expected True or False, or nothing")
        on = words[value and value.lower()]
        setattr(namespace, self.dest, on != option_string.startswith("--no-"))


class Flags(argparse.Namespace):
    """Flags by name; beside them, and none of vars(), `changed` names those that are not as by default."""

    __slots__ = ("changed",)


class Parser(argparse.ArgumentParser):
    """An ArgumentParser for the flags of the script whose docstring is `doc`, which ends in an example command.

    Flags can stand in a file, `script.py @file`, with # comments. `aliases`, {flag: flag}, are other names of some.
    """

    def __init__(self, doc, aliases=()):
        example = doc.split("`accelerate config`:\n")[1].split("\n\n`output_dir`")[0]
        super().__init__(
            usage="%(prog)s [options] [@file]; --help explains them",
            description=doc.split("\n\n")[0],
            epilog=f"example:{example}\n\n@file: a file of options with # comments, such as examples/*/*.args",
            formatter_class=HelpFormatter,
            fromfile_prefix_chars="@",
            allow_abbrev=False,
        )
        self.aliases = dict(aliases)

    def own_names(self, words):
        """Words of a command in which aliases of flags are replaced."""
        parts = [word.partition("=") for word in words]
        return [self.aliases.get(name, name) + equals + value for name, equals, value in parts]

    def convert_arg_line_to_args(self, line):
        return self.own_names(shlex.split(line, comments=True))

    def parse_args(self, argv=None):
        argv = sys.argv[1:] if argv is None else argv
        try:
            args = super().parse_args(self.own_names(argv), Flags())
        except (ValueError, RecursionError) as error:
            self.error(f"{' '.join(word for word in argv if word[:1] == '@')}: no file of flags ({error})")
        actions = [action for action in self._actions if action.dest in args]
        args.changed = [action.dest for action in actions if getattr(args, action.dest) != self.default_of(action)]
        return args

    def default_of(self, action):
        """What a flag is without being given: text goes through the flag's type."""
        text = isinstance(action.default, str) and not action.required
        return self._get_value(action, action.default) if text else action.default

    def refuse(self, problems):
        """Ends with all problems in one message, if there are any."""
        if problems:
            self.error(join_problems(problems))


def number(kind, minimum, maximum=math.inf, *, above=False):
    """An argparse type: `kind` within [minimum, maximum], or above the minimum."""

    def parse(text):
        value = kind(text)
        if not (minimum < value if above else minimum <= value) or not value <= maximum or math.isinf(value):
            limit = f"above {minimum}" if above else f"at least {minimum}"
            limit += f" and at most {maximum}" if maximum < math.inf else ""
            raise argparse.ArgumentTypeError(f"{text} is out of range: it must be {limit}")
        return value

    parse.__name__ = "number" if kind is float else "whole number"
    return parse


def names_in(text):
    """The names in a comma list."""
    return [name.strip() for name in (text or "").split(",") if name.strip()]


def check_shared_flags(args):
    """Contradictions between flags that all or most trainers have, flags without effect, unreadable weights."""
    problems = []
    if args.dataset_config_name and not args.dataset_name:
        problems.append(f"--dataset_config_name {args.dataset_config_name} needs --dataset_name")
    if args.optimizer != "adamw" and args.use_8bit_adam:
        problems.append(f"--use_8bit_adam has no effect on --optimizer {args.optimizer}: leave one out")
    if args.optimizer == "prodigy" and args.learning_rate <= 0.1:
        problems.append(f"--learning_rate {args.learning_rate:g}: Prodigy finds the rate itself and wants about 1")
    if args.optimizer != "prodigy" and args.prodigy_beta3 is not None:
        problems.append(f"--prodigy_beta3 has no effect on --optimizer {args.optimizer}: leave it out")
    if args.mixed_precision == "fp16" and not torch.accelerator.is_available():
        problems.append("--mixed_precision fp16 needs a GPU: use bf16 or no")
    densities = ("logit_normal", "mode")
    if "timestep_sampling" in args and args.timestep_sampling != "sigma" and args.weighting_scheme in densities:
        problems.append(f"--weighting_scheme {args.weighting_scheme} has no effect without --timestep_sampling sigma")
    if "validation_epochs" in args and args.validation_steps and not args.validation_prompt:
        problems.append(f"--validation_steps {args.validation_steps} needs --validation_prompt")
    if "final_validation_prompt" in args and args.final_validation_prompt and args.skip_final_inference:
        problems.append("--final_validation_prompt has no effect with --skip_final_inference: leave one out")
    problems += check_prior_flags(args) if "with_prior_preservation" in args else []
    return problems + check_weights(args)


def check_prior_flags(args):
    """Problems of the flags of prior preservation."""
    problems, folder = [], args.class_data_dir
    if args.with_prior_preservation and not (folder and args.class_prompt):
        problems.append("--with_prior_preservation needs --class_data_dir and --class_prompt")
    if not args.with_prior_preservation and (folder or args.class_prompt):
        problems.append("--class_data_dir and --class_prompt have no effect without --with_prior_preservation")
    if args.prior_generation_precision in ("no", "fp32") and args.mixed_precision in ("fp16", "bf16"):
        precision = args.prior_generation_precision
        problems.append(f"--prior_generation_precision {precision}: the model is loaded in {args.mixed_precision}")
    if folder and folder.exists() and not folder.is_dir():
        problems.append(f"--class_data_dir {folder}: a file of this name is in the way")
    return problems


def check_weights(args):
    """Problems of the weights in a local folder of a pipeline, of whose files the headers alone are read."""
    folder, problems = Path(args.pretrained_model_name_or_path), []
    flag = f"--pretrained_model_name_or_path {folder}"
    parts = [folder / "transformer", folder / "vae", *sorted(folder.glob("text_encoder*"))]
    for part in parts if (parts[0] / "config.json").is_file() else ():  # else it is no pipeline
        files = [*part.glob("*.safetensors.index*.json"), *part.glob("*.safetensors")]
        if not files:
            problems.append(f"{flag}: {part} holds no .safetensors; other weights are not read, save it anew as these")
        for file in files:
            try:
                if file.suffix == ".json":
                    shards = {part / name for name in json.loads(file.read_text())["weight_map"].values()}
                    files += sorted(shards.difference(files))
                else:
                    with safe_open(file, "pt"):
                        pass
            except Exception as error:  # each kind of file raises its own
                reason = (str(error) or repr(error)).splitlines()[0]
                problems.append(f"{flag}: {file} cannot be read ({reason}): copy or download it again")
    return problems


def join_problems(problems):
    """One problem as it is, several as a list."""
    return problems[0] if len(problems) == 1 else "\n  ".join(["", *problems])


def fail(accelerator, problems):
    """Ends the run as argparse does: all problems in one message, exit code 2."""
    if accelerator.is_main_process:
        print(f"{Path(sys.argv[0]).name}: error: {join_problems(problems)}", file=sys.stderr)
    raise SystemExit(2)


@contextmanager
def reading(source):
    """Ends the run with one message and exit code 2 if what `source` names cannot be loaded within it."""
    try:
        yield
    except Exception as error:  # each kind of file raises its own
        reason = (str(error) or repr(error)).splitlines()[0]
        print(f"{Path(sys.argv[0]).name}: error: {source} cannot be loaded: {reason}", file=sys.stderr)
        raise SystemExit(2) from error


def start(args, handlers=()):
    """The Accelerator of a run, with `handlers` of accelerate's kwargs, and the dtype of the frozen models."""
    if args.local_rank != -1:
        os.environ.setdefault("LOCAL_RANK", str(args.local_rank))
    torch.backends.cuda.matmul.allow_tf32 = args.allow_tf32
    for library in (diffusers_logging, transformers_logging):
        library.set_verbosity_info() if args.verbose else library.disable_progress_bar()
    accelerator = Accelerator(
        cpu=not torch.accelerator.is_available(),  # else torchrun's processes would not know of each other there
        gradient_accumulation_steps=args.gradient_accumulation_steps,
        mixed_precision=args.mixed_precision,
        log_with=None if args.report_to == "none" else args.report_to,
        project_config=ProjectConfiguration(args.output_dir, logging_dir=args.output_dir / args.logging_dir),
        step_scheduler_with_optimizer=False,
        kwargs_handlers=list(handlers),
    )
    dtypes = {"fp16": torch.float16, "bf16": torch.bfloat16}
    return accelerator, dtypes.get(accelerator.mixed_precision, torch.float32)


def run_settings(args, num_samples, num_processes):
    """{name: text} of all that must be the same when the run is resumed."""
    run = {name: str(value) for name, value in vars(args).items() if name not in CHANGEABLE}
    return run | {"the number of samples": num_samples, "the number of processes": num_processes}


def catch_signals():
    """The list that SIGINT and SIGTERM append themselves to; another one, two seconds later, ends the process at once.

    Until then it is the same one: of a signal to all processes, torchrun sends each of its own another.
    """
    signals, first = [], math.inf

    def catch(number, frame):
        nonlocal first
        first = min(first, time.monotonic())
        signals.append(number)
        if time.monotonic() > first + 2:
            signal.signal(number, signal.SIG_DFL)
            signal.raise_signal(number)

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, catch)
    return signals


def count_skipped(skipped, step):
    """One more step in a row without a finite loss; ends the run after MAX_SKIPPED_STEPS of them."""
    skipped += 1
    if skipped == MAX_SKIPPED_STEPS:
        raise SystemExit(
            f"\nStopped at step {step}: the last {skipped} losses were not finite. Checkpoints are intact."
        )
    return skipped


def stop_interrupted(accelerator, step, checkpoint, signals):
    """Ends a run that a signal interrupted, on this process or another."""
    accelerator.free_memory()
    accelerator.end_training()
    accelerator.print(f"\nInterrupted at step {step}, saved {checkpoint}; go on with --resume_from_checkpoint latest")
    raise SystemExit(128 + signals[0] if signals else 1)
