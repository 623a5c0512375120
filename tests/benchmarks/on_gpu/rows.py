"""What ../gpu.py measures, a function per topic: each makes one row's numbers, {name: value}, of keyword arguments.

As a program it is the worker of ../gpu.py: it reads requests from standard input, a JSON object a line, and answers
each with one line. What the trainers print goes to the file that its first argument names.
"""

import gc
import importlib
import importlib.metadata
import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import time
import traceback
import warnings
from contextlib import ExitStack, contextmanager, nullcontext, suppress
from pathlib import Path
from unittest.mock import patch


ROOT = Path(__file__).parents[3]
sys.path[:0] = [str(ROOT), str(Path(__file__).parent)]

# isort: split
from common.text_encoders import PromptEncoder

import numpy as np
import torch
from accelerate.state import AcceleratorState, GradientState, PartialState
from PIL import Image
from random_models import benchmark_model, random_weights, save_pipelines
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.optim.optimizer import register_optimizer_step_post_hook
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count

from examples.estimate_memory import CONTEXT, GIB, estimate, model_to_train, needed, parse_args
from train_omini import OminiPipeline


ON_GPU = torch.cuda.is_available()
REAL_SIZE = ON_GPU or "REAL_SIZE" in os.environ  # else all is tiny; the variable is for estimates beside a GPU
PIXELS = {512: 512, 1024: 1024} if REAL_SIZE else {512: 64, 1024: 128}
TEXT_TOKENS = 512 if REAL_SIZE else 64
NUM_BLOCKS = 20 if REAL_SIZE else 1  # that a row swaps
KERNELS = {"cudnn": "_native_cudnn", "flash": "_native_flash"} if ON_GPU else {"cudnn": "native", "flash": "native"}
WARM_UP, STEPS, WATCHED_STEPS = (3, 6, 2) if ON_GPU else (1, 2, 1)
NUM_PROMPTS = 64 if REAL_SIZE else 8
CAPTION = "a photo of TOK on a blue background"


# ---------------------------------------------------------------------------------------------------------------------
# Topics
# ---------------------------------------------------------------------------------------------------------------------


def environment(place):
    """The card, the versions and the commit that a number belongs to."""
    packages = ("torch", "diffusers", "transformers", "accelerate", "peft", "bitsandbytes")
    described = {"card": torch.cuda.get_device_name() if ON_GPU else "no GPU: tiny models on the CPU"}
    described |= {"python": platform.python_version()}
    described |= {package: importlib.metadata.version(package) for package in packages}
    command = ["git", "-C", str(ROOT), "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"]
    found = subprocess.run(command, capture_output=True, text=True)
    return described | {"commit": found.stdout.strip() or "unknown"}


def step(place, *, trainer, px, flags):
    """Time, memory and syncs of a trainer's steps, from within the trainer."""
    watch = StepWatch()
    with watch.installed():
        run_trainer(place, trainer, px, flags, steps=WARM_UP + STEPS + WATCHED_STEPS)
    batch_size = 4 if trainer == "train_twinflow" else 1
    return {"seconds": watch.seconds, "it/s": 1 / watch.seconds, "images/s": batch_size / watch.seconds, **watch.found}


def memory(place, *, px, flags):
    """What examples/estimate_memory.py says of such a run, in GiB: tensors in a step, at most, and of a card."""
    found = estimate(benchmark_model("FLUX.1-dev", is_tiny=not REAL_SIZE), estimate_args(px, flags))
    in_step = max(found.peaks["forward and backward pass"], found.peaks["optimizer step"])
    return {
        "in a step": in_step / GIB,
        "at most": max(found.peaks.values()) / GIB,
        "card for a step": needed(in_step),
    }


def operations(place, *, px):
    """Floating-point operations of a step of which nothing is computed twice."""
    attention = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    counter = FlopCounterMode(
        display=False,
        custom_mapping={
            attention: lambda query, key, value, *_, **__: sdpa_flop_count(query, key, value),
            torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: (
                lambda gradient, query, key, value, *_, **__: sdpa_backward_flop_count(gradient, query, key, value)
            ),
        },
    )
    fake = FakeTensorMode(allow_non_fake_inputs=True)
    _, forward = model_to_train(benchmark_model("FLUX.1-dev", is_tiny=not REAL_SIZE), estimate_args(px, ""), fake)
    with fake, counter:
        forward().float().square().mean().backward()
    return {"operations": counter.get_total_flops()}


def small_card(place, *, trainer, gigabytes, flags):
    """Training with validation, resuming and drawing with a preset while no more memory is there than on a smaller
    card: that they end at all, and seconds."""
    flags += " --gradient_accumulation_steps 1 --checkpointing_steps 2"
    flags += " --validation_prompt photo --num_validation_images 1 --validation_steps 2 "
    flags += VALIDATION[trainer].format(place=place, side=PIXELS[512])
    found = {}
    with capped(gigabytes):
        with stopwatch(found, "train"):
            run_trainer(place, trainer, 512, flags, steps=2)
        found["GiB"] = peak_gib()
        with stopwatch(found, "resume"):
            run_trainer(place, trainer, 512, f"{flags} --resume_from_checkpoint latest", steps=3)
        with stopwatch(found, "draw"):
            draw(place, trainer, "--steps 2" if trainer == "train_twinflow" else "--num_inference_steps 2")
        found["GiB drawing"] = peak_gib()
    return found


def prompts(place, *, flags):
    """Prompts per second of caching them, and the most memory meanwhile."""
    found = {}
    cache_prompts = PromptEncoder.cache_prompts

    class Cached(Exception):
        """Ends the run: the rest of it is not of interest."""

    def timed(encoder, *args, **kwargs):
        forget_peak()
        with stopwatch(found, "seconds"):
            cache_prompts(encoder, *args, **kwargs)
        found["GiB"] = peak_gib()
        raise Cached

    with patch.object(PromptEncoder, "cache_prompts", timed), suppress(Cached):
        run_trainer(place, "train_dreambooth_flux_advanced", 512, flags, steps=1, pictures="captions")
    return {"prompts/s": NUM_PROMPTS / found.pop("seconds"), **found}


def waiting(place, *, px):
    """A step with data from two workers, by one with batches that are there already."""
    trainer = importlib.import_module("train_dreambooth_flux_advanced")
    read_batches = trainer.read_batches
    watches = []
    for read in (read_batches, lambda *args: list(read_batches(*args))):
        watches.append(StepWatch())
        with watches[-1].installed(), patch.object(trainer, "read_batches", read):
            flags = "--dataloader_num_workers 2"
            steps = WARM_UP + STEPS
            run_trainer(place, trainer.__name__, px, flags, steps=steps, pictures="photos", cache_latents=False)
    workers, ready = (watch.seconds for watch in watches)
    return {"seconds": workers, "ready": ready, "ratio": workers / ready}


def kv_cache(place, *, px):
    """Seconds of an image with a condition that is computed once, and in every step."""
    run_trainer(place, "train_omini", px, "--independent_condition", steps=1)
    found = {}
    call = OminiPipeline.__call__
    for name, flags in (("without", ""), ("with", "--kv_cache")):
        flags += f" --num_inference_steps {8 if REAL_SIZE else 2}"

        def timed(pipeline, *args, name=name, **kwargs):
            with stopwatch(found, name):
                return call(pipeline, *args, **kwargs)

        with patch.object(OminiPipeline, "__call__", timed):
            draw(place, "train_omini", flags)
    return found | {"ratio": found["with"] / found["without"]}


TOPICS = {
    function.__name__: function
    for function in (environment, step, memory, operations, small_card, prompts, waiting, kv_cache)
}


# ---------------------------------------------------------------------------------------------------------------------
# Runs of the trainers
# ---------------------------------------------------------------------------------------------------------------------


GENERATORS = {
    "train_dreambooth_flux_advanced": ("dreambooth", "--output {output}"),
    "train_omini": ("omini", "--image {image} --output {output}/0.png"),
    "train_influxedit": ("influxedit", "--image {image} --output {output}"),
    "train_twinflow": ("twinflow", "--output {output}"),
}
VALIDATION = {
    "train_dreambooth_flux_advanced": "--validation_num_inference_steps 2",
    "train_omini": "--validation_num_inference_steps 2 --validation_image {place}/pictures/0.png",
    "train_influxedit": "--validation_num_inference_steps 2 --validation_width {side} --validation_height {side}",
    "train_twinflow": "",
}


def make_data(folder):
    """Pipelines and pictures, small ones, as large as photos, and with a caption each."""
    save_pipelines(folder, is_tiny=not REAL_SIZE)
    rng = np.random.default_rng(0)
    for name, count, side in (
        ("pictures", 4, PIXELS[512]),
        ("targets", 4, PIXELS[512]),
        ("photos", 8, 4 * PIXELS[512]),
        ("captions", NUM_PROMPTS, 64),
    ):
        (folder / name).mkdir()
        for i in range(count):
            coarse = Image.fromarray(rng.integers(0, 256, (16, 16, 3), dtype=np.uint8))
            image = coarse.resize((side, side), Image.Resampling.BICUBIC)
            image.save(folder / name / (f"{i}.jpg" if name == "photos" else f"{i}.png"), quality=95)
            caption = f"{CAPTION} number {i}" if name == "captions" else CAPTION
            (folder / name / f"{i}.txt").write_text(caption)


def run_trainer(place, trainer, px, flags, *, steps, pictures="pictures", cache_latents=True):
    """A whole run of a trainer in this process, with rank 16 and batch 1; later flags override these."""
    module = importlib.import_module(trainer)
    family = "fill" if trainer == "train_influxedit" else "flux"
    size = "target_size" if trainer == "train_omini" else "resolution"
    shared = {
        "train_data_dir" if trainer == "train_twinflow" else "instance_data_dir": place / pictures,
        size: PIXELS[px],
        "output_dir": place / "run",
        "mixed_precision": "bf16",
        "max_sequence_length": TEXT_TOKENS,
        "train_batch_size": 4 if trainer == "train_twinflow" else 1,
        "optimizer": "adamw",
        "learning_rate": 1e-4,
        "lr_warmup_steps": 0,
        "rank": 16,
        "report_to": "none",
        "seed": 0,
    }
    own = {
        "train_omini": {"condition_type": "canny"},
        "train_influxedit": {
            "mode": "edit",
            "target_data_dir": place / "targets",
            "caption_data_dir": place / "targets",
        },
        "train_twinflow": {"model_type": "flux", "training": "lora"},
    }
    words = [f"--{name}={value}" for name, value in (shared | own.get(trainer, {})).items()]
    words += flags.format(root=ROOT, blocks=NUM_BLOCKS, **KERNELS).split()
    words += [f"--pretrained_model_name_or_path={place / family}", f"--max_train_steps={steps}"]  # not a preset's
    if not REAL_SIZE:
        words += [f"--{size}={PIXELS[px]}", f"--max_sequence_length={TEXT_TOKENS}"]
    if cache_latents:
        words.append("--cache_latents")
    if "--resume_from_checkpoint" not in words:
        shutil.rmtree(place / "run", ignore_errors=True)
    with fresh_accelerator(), random_weights(), nullcontext() if ON_GPU else traced_only():
        module.main(module.parse_args(words))


@contextmanager
def traced_only():
    """A context in which compiled modules are traced, but no code is made of them: on a CPU that takes minutes."""
    compile_module = torch.nn.Module.compile

    def compile_traced(module, **options):
        compile_module(module, **(options | {"backend": "aot_eager"}))

    with patch.object(torch.nn.Module, "compile", compile_traced):
        yield


def draw(place, trainer, flags):
    """An image by the generator of a trainer, with the adapter of the last run."""
    name, own = GENERATORS[trainer]
    words = [str(place / "run"), "--prompt", CAPTION]
    words += own.format(image=place / "pictures" / "0.png", output=place / "drawn").split()
    with fresh_accelerator(), random_weights():
        importlib.import_module(f"examples.{name}.generate").main([*words, *flags.split()])


@contextmanager
def fresh_accelerator():
    """What accelerate keeps of another run in this process is forgotten, before and after."""
    states = (AcceleratorState, GradientState, PartialState)
    for state in states:
        state._reset_state()
    try:
        yield
    finally:
        for state in states:
            state._reset_state()


def estimate_args(px, flags):
    device = "cuda" if REAL_SIZE else "cpu"
    words = ["--resolution", str(PIXELS[px]), "--rank", "16", "--cache_latents", "--device", device]
    return parse_args([*words, *flags.format(blocks=NUM_BLOCKS).replace("--compile", "").split()])


# ---------------------------------------------------------------------------------------------------------------------
# Measuring
# ---------------------------------------------------------------------------------------------------------------------


class StepWatch:
    """Seconds per step of STEPS after WARM_UP, with `found`: the most memory in them, in GiB, and how often the device
    was waited for in the steps after them.

    torch calls it after each step of any optimizer. The trainers run as they are: nothing waits for the device but
    before the first and after the last of the steps.
    """

    def __init__(self):
        self.count = 0
        self.seconds = None
        self.found = {}
        self.warned = ExitStack()

    @contextmanager
    def installed(self):
        hook = register_optimizer_step_post_hook(self.after_step)
        try:
            yield
        finally:
            hook.remove()
            self.stop_counting()
        if self.seconds is None:
            raise RuntimeError(f"{self.count} steps were made, too few")

    def after_step(self, optimizer, args, kwargs):
        self.count += 1
        if self.count == WARM_UP - 1:
            forget_peak()
        if self.count == WARM_UP:
            synchronize()
            peak_gib()
            self.started = time.perf_counter()
        if self.count == WARM_UP + STEPS:
            synchronize()
            self.seconds = (time.perf_counter() - self.started) / STEPS
            self.found |= {"GiB": peak_gib(), "card": card_gib()} if ON_GPU else {}
            self.start_counting()
        if self.count == WARM_UP + STEPS + WATCHED_STEPS:
            self.stop_counting()

    def start_counting(self):
        if ON_GPU:
            self.caught = self.warned.enter_context(warnings.catch_warnings(record=True))
            warnings.simplefilter("always")
            torch.cuda.set_sync_debug_mode("warn")

    def stop_counting(self):
        if ON_GPU and torch.cuda.get_sync_debug_mode():
            torch.cuda.set_sync_debug_mode("default")
            self.warned.close()
            waits = [each for each in self.caught if "synchronizing CUDA operation" in str(each.message)]
            places = sorted({f"{Path(each.filename).name}:{each.lineno}" for each in waits})
            self.found |= {"syncs": len(waits) / WATCHED_STEPS, "sync places": places}


@contextmanager
def stopwatch(found, name):
    """Puts the seconds of the context into found[name]."""
    synchronize()
    started = time.perf_counter()
    yield
    synchronize()
    found[name] = time.perf_counter() - started


@contextmanager
def capped(gigabytes):
    """A context in which PyTorch gets no more memory, and is told of no more, than a card of so many GB has."""
    if not ON_GPU:
        yield
        return
    torch.cuda.empty_cache()
    total = torch.cuda.get_device_properties(0).total_memory
    limit = min(total, int((gigabytes - CONTEXT / 2) * GIB))  # a half of it is the driver's

    def mem_get_info(device=None):
        return limit - torch.cuda.memory_reserved(), limit

    torch.cuda.set_per_process_memory_fraction(limit / total)
    try:
        with patch.object(torch.cuda, "mem_get_info", mem_get_info):
            forget_peak()
            yield
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)


def synchronize():
    if ON_GPU:
        torch.cuda.synchronize()


def forget_peak():
    if ON_GPU:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def peak_gib():
    """The most memory of tensors since `forget_peak`, and from here on anew; None without a GPU."""
    if not ON_GPU:
        return None
    peak = torch.cuda.max_memory_allocated() / GIB
    torch.cuda.reset_peak_memory_stats()
    return peak


def card_gib():
    """What the card had in use at most since `forget_peak`: PyTorch's memory, and the driver's and libraries'."""
    free, total = torch.cuda.mem_get_info()
    return (total - free - torch.cuda.memory_reserved() + torch.cuda.max_memory_reserved()) / GIB


# ---------------------------------------------------------------------------------------------------------------------
# Worker
# ---------------------------------------------------------------------------------------------------------------------


def answer(place, request, log):
    """{"values": ...} or {"error": a line} of a request {"topic": ..., "options": ...}."""
    logged = log.stat().st_size
    try:
        reply = {"values": TOPICS[request["topic"]](place, **request["options"])}
    except torch.OutOfMemoryError as error:
        reply = {"error": f"out of memory: {str(error).split('. GPU')[0]}"}
    except SystemExit:  # its message was printed
        lines = log.read_bytes()[logged:].decode(errors="replace").strip().splitlines()
        reply = {"error": (lines or ["ended without a message"])[-1]}
    except Exception as error:
        traceback.print_exc()
        reply = {"error": f"{type(error).__name__}: {str(error).strip()}".splitlines()[0][:300]}
    torch.compiler.reset()
    gc.collect()
    if ON_GPU:
        torch.cuda.empty_cache()
        reply["left over"] = torch.cuda.memory_allocated()
    return reply


def main(log):
    replies = os.fdopen(os.dup(1), "w")
    with log.open("a") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    os.environ["HF_HUB_OFFLINE"] = "1"
    with tempfile.TemporaryDirectory() as folder:
        make_data(Path(folder))
        for line in sys.stdin:
            replies.write(json.dumps(answer(Path(folder), json.loads(line), log)) + "\n")
            replies.flush()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
