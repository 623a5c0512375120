"""What a run tells: header, metrics, trackers, plots, model cards, the hub."""

import errno
import importlib.metadata
import json
import math
import os
import resource
import shlex
import shutil
import sys
import time
from contextlib import suppress
from pathlib import Path

from common.arguments import fail
from common.checkpoints import atomic_write, find_checkpoints, writing
from common.models import count_weights

import numpy as np
import torch
from huggingface_hub import HfApi, ModelCard, ModelCardData
from huggingface_hub.errors import HTTPError


SETTINGS = (  # that a model card shows
    *("recipe", "condition_type", "mode", "resolution", "target_size", "rank", "lora_alpha", "quantize_base"),
    *("mixed_precision", "optimizer", "learning_rate", "lr_scheduler", "train_batch_size"),
    *("gradient_accumulation_steps", "max_train_steps", "num_train_epochs", "guidance_scale", "seed"),
)

FIRST_STEPS = 5  # whose time tells how long a run takes, but for the first, which may compile


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


def about_text(args, text_params, stop=None):
    """{what: text} for `print_header` of what is trained in text encoders, until step `stop`."""
    until = "" if stop is None else f", trained until step {stop}"
    size = count_weights(text_params)
    lines = {"text": f"{size:,} parameters in text encoders{until}" if size else ""}
    if text_params and args.optimizer == "prodigy" and args.text_encoder_lr != args.learning_rate:
        lines["Prodigy"] = f"has one learning rate for all, {args.learning_rate:g}: --text_encoder_lr is not used"
    return lines


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
        with atomic_write(args.output_dir / "args.json") as partial:
            partial.write_text(text + "\n")
    if accelerator.log_with:
        if token := getattr(args, "hub_token", None):  # wandb keeps the command
            sys.argv = [word.replace(token, "***") for word in sys.argv]
        values = {name: "" if value is None else value for name, value in values.items()}
        plain = (bool, int, float, str)  # all that TensorBoard takes
        with writing(args.output_dir / args.logging_dir):
            config = {n: v if isinstance(v, plain) else str(v) for n, v in values.items()}
            purge = {"tensorboard": {"purge_step": last_step + 1}} if last_step else {}
            accelerator.init_trackers(project, config, init_kwargs=purge)


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


def peak_memory(device):
    """Most memory in use so far, in GiB: the accelerator's, or the process' on a CPU."""
    if device.type == "cpu":
        unit = 2**10 if sys.platform == "linux" else 1  # macOS counts bytes
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30
    return torch.accelerator.max_memory_allocated(device) / 2**30


def open_metrics(path, last_step):
    """Opens the run's metrics, a JSON object per line, to be continued after `last_step`; later lines are dropped."""
    kept = [row for row in read_metrics(path) if row["step"] <= last_step]
    with atomic_write(path) as partial:
        partial.write_text("".join(json.dumps(row) + "\n" for row in kept))
    return path.open("ab", buffering=0)  # what a full disk does not take is not kept to be tried again at the end


def read_metrics(path):
    """The rows of a file of metrics; lines that a crash of the machine left torn are passed over."""
    rows = []
    for line in path.read_text(errors="replace").splitlines() if path.exists() else []:
        with suppress(ValueError, TypeError, KeyError, RecursionError):
            row = json.loads(line)
            rows += [row] if {type(row[name]) for name in ("step", "loss", "lr")} <= {int, float} else []
    return rows


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
    with atomic_write(output_dir / "loss.png") as partial:
        figure.savefig(partial, dpi=100, format="png")
    plt.close(figure)


def running_mean(values, window):
    """The exponential mean of about `window` values before each; those that are not finite are passed over."""
    decay, mean, weight, means = 1 - 1 / window, 0.0, 0.0, []
    for value in values:
        if math.isfinite(value):
            mean, weight = decay * mean + (1 - decay) * value, decay * weight + 1 - decay
        means.append(mean / weight if weight else math.nan)
    return means


def write_model_card(args, text, tags, base_model, trigger_words=(), **data):
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
    with atomic_write(folder / "README.md") as partial:
        ModelCard(f"---\n{metadata.to_yaml()}\n---\n\n" + "\n\n".join(parts) + "\n").save(partial)


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
