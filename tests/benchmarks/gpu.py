"""A LoRA step of FLUX.1-dev on this machine's GPU: time, memory, and share of what the chip can do.

    python tests/benchmarks/gpu.py

Weights are random, rank is 16, batch 1, precision bf16, the optimizer AdamW. Memory stands beside the figure of
examples/estimate_memory.py; floating-point operations are those of a step that computes nothing twice. Without a GPU
it does the same with a tiny model on the CPU: that the script works, not how fast.
"""

import dataclasses
import gc
import statistics
import sys
import time
from pathlib import Path

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count


sys.path.insert(0, str(Path(__file__).parents[2]))

from common.lora import add_lora
from common.models import compile_blocks, quantize_base

from examples.estimate_memory import GIB, MODELS, create_optimizer, estimate, parse_args, training_step
from train_twinflow import BACKBONES


WARM_UP, STEPS = 3, 8
# Dense bf16 operations per second by the makers' data sheets; the first name that occurs in the device's counts.
CHIPS = {
    "B200": 2250e12,
    "H200": 989e12,
    "H100 PCIe": 756e12,
    "H100": 989e12,
    "A100": 312e12,
    "L40S": 362e12,
    "RTX 4090": 165e12,
    "RTX 3090": 71e12,
}
WAYS = ("", "--gradient_checkpointing", "--compile", "--gradient_checkpointing --compile")
WAYS += ("--gradient_checkpointing --quantize_base nf4", "--gradient_checkpointing --quantize_base int8")


def model_and_resolutions(device):
    model = MODELS["FLUX.1-dev"]
    if device.type != "cpu":
        return model, (512, 1024)
    config = {**model.config, "num_layers": 1, "num_single_layers": 1, "num_attention_heads": 2}
    config |= {"attention_head_dim": 16, "axes_dims_rope": (4, 6, 6), "joint_attention_dim": 32}
    conditions = {**model.conditions, "encoder_hidden_states": (16, 32)}
    return dataclasses.replace(model, config=config, conditions=conditions), (64, 128)


def operations(model, args):
    """Floating-point operations of a step without checkpointing."""
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
    with counter:
        training_step(model, args, FakeTensorMode(allow_non_fake_inputs=True))
    return counter.get_total_flops() / 2  # it makes two steps


def run(model, args, device, compiled):
    """(seconds per step, most bytes at once or None) of real steps."""
    backbone = BACKBONES[model.backbone](args)
    backbone.guidance = 3.5
    torch.set_default_dtype(torch.bfloat16)
    with device:
        transformer = model.transformer(**model.config).requires_grad_(False)
    torch.set_default_dtype(torch.float32)
    if args.quantize_base != "none":
        quantize_base(transformer, torch.bfloat16, args.quantize_base).to(device)
    params = add_lora(transformer, rank=args.rank, alpha=args.rank, dropout=0.0, target_modules=model.targets)
    if args.gradient_checkpointing:
        transformer.enable_gradient_checkpointing()
    if compiled:
        compile_blocks(transformer)
    transformer.train()
    optimizer = create_optimizer(args, params)
    side, size = args.resolution // backbone.vae_scale_factor, args.train_batch_size
    shape = {"device": device, "dtype": torch.bfloat16}
    x = torch.randn(size, model.channels, side, side, **shape)
    conditions = {name: torch.randn(size, *each, **shape) for name, each in model.conditions.items()}
    seconds, on_gpu = [], device.type == "cuda"
    for step in range(WARM_UP + STEPS):
        if step == WARM_UP and on_gpu:
            torch.cuda.reset_peak_memory_stats(device)
        started = time.perf_counter()
        with torch.autocast(device.type, torch.bfloat16):
            times = torch.rand(size, device=device)
            loss = backbone.predict(transformer, x, times, conditions).float().square().mean()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(params, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if on_gpu:
            torch.cuda.synchronize(device)
        seconds.append(time.perf_counter() - started)
    return statistics.median(seconds[WARM_UP:]), torch.cuda.max_memory_allocated(device) if on_gpu else None


def main():
    on_gpu = torch.cuda.is_available()
    device = torch.device("cuda" if on_gpu else "cpu")
    name = torch.cuda.get_device_name(device) if on_gpu else "no GPU: a tiny model on the CPU"
    per_second = next((peak for chip, peak in CHIPS.items() if chip in name), None)
    model, resolutions = model_and_resolutions(device)
    print(f"{name}, torch {torch.__version__}\n")
    print("| px | flags | s/step | TFLOP/s | share of bf16 peak | peak GiB | estimated GiB | measured / estimated |")
    print("| --- " * 8 + "|")
    for resolution in resolutions:
        shared = ["--resolution", str(resolution), "--rank", "16", "--cache_latents", "--device", device.type]
        work = operations(model, parse_args(shared))
        for way in WAYS:
            compiled = "--compile" in way
            args = parse_args([*shared, *way.replace("--compile", "").split()])
            phases = estimate(model, args).peaks
            estimated = max(phases["forward and backward pass"], phases["optimizer step"])
            try:
                seconds, peak = run(model, args, device, compiled)
            except torch.OutOfMemoryError:
                print(f"| {resolution} | {way} | out of memory | | | | {estimated / GIB:.2f} | |", flush=True)
                continue
            finally:
                torch.compiler.reset()
                gc.collect()
                if on_gpu:
                    torch.cuda.empty_cache()
            rate = work / seconds
            cells = [resolution, way or "none", f"{seconds:.3f}", f"{rate / 1e12:.3g}"]
            cells += [f"{rate / per_second:.1%}" if per_second else ""]
            cells += [f"{peak / GIB:.2f}" if peak else "", f"{estimated / GIB:.3g}"]
            cells += [f"{peak / estimated:.2f}" if peak and not compiled else ""]
            print(f"| {' | '.join(map(str, cells))} |", flush=True)


if __name__ == "__main__":
    main()
