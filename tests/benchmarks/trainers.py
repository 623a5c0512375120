"""What a step of each trainer takes beside its bare parts, and what each saving flag does to its time and memory.

    python tests/benchmarks/trainers.py [trainer ...]      # about 15 minutes for all four; --quick: the small model

Every row is a run of its own on random weights: 13 steps on a small FLUX (2 + 4 blocks, width 128, as the toy's) or a
medium one (4 + 8 blocks, width 512, 71 M parameters).

    overhead    a step's time divided by that of its forward passes, backward pass, clipping and optimizer step, which
                are timed where torch and diffusers do them, within the same step; the median over the steps
    time        a step's time divided by that of the same trainer without flags
    memory      likewise the most memory in use over that after the imports (resident, so noisy below 10 %)
    import ...  seconds from the start of the program to the first step: imports, loading of weights, everything else
                (checks, prompts, latents)

The exit code is 1 if an overhead of a medium model is above 1.05.
"""

import ctypes
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path


ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))
SCRIPTS = ["train_dreambooth_flux_advanced", "train_omini", "train_influxedit", "train_twinflow"]
SIZES = {
    "small": {"heads": 4, "layers": 2, "single_layers": 4},
    "medium": {"heads": 16, "layers": 4, "single_layers": 8},
}
ROWS = [  # (size, flags)
    ("small", ""),
    ("small", "--gradient_checkpointing"),
    ("medium", ""),
    ("medium", "--gradient_checkpointing"),
    ("medium", "--compile"),
    ("medium", "--mixed_precision bf16"),
    ("medium", "--use_8bit_adam"),
    ("medium", "--quantize_base int8"),
    ("medium", "--quantize_base nf4"),
    ("medium", "--offload"),
]
STEPS, WARM_UP, SIDE, BAR = 13, 3, 128, 1.05


def write_pictures(folder, number, side):
    """Pictures with a caption each, and targets of the same names for editing."""
    from examples.toy.world import caption, draw, random_scene

    for name in ("pictures", "targets"):
        (folder / name).mkdir()
        for i in range(number):
            scene = random_scene(random.Random(f"{name}{i}"))
            draw(scene, side, side).save(folder / name / f"{i}.png")
            (folder / name / f"{i}.txt").write_text(f"{caption(scene)} {i}")


def data_flags(script, folder, side):
    """{name: value} of the flags with which a trainer trains on what `write_pictures` wrote."""
    data = "train_data_dir" if script == "train_twinflow" else "instance_data_dir"
    flags = {data: folder / "pictures", "target_size" if script == "train_omini" else "resolution": side}
    targets = folder / "targets"
    own = {
        "train_omini": {"condition_type": "canny"},
        "train_influxedit": {"mode": "edit", "target_data_dir": targets, "caption_data_dir": targets},
        "train_twinflow": {"training": "lora", "model_type": "flux"},
    }
    return flags | own.get(script, {})


def make_data(folder):
    """Pictures with captions, and pipelines of both sizes, plain and Fill."""
    from diffusers import FluxFillPipeline

    from examples.toy.pretrain import (
        copy_of,
        new_pipeline,
        new_text_encoders,
        new_tokenizers,
        new_transformer,
        new_vae,
    )

    write_pictures(folder, 8, SIDE)
    tokenizer, tokenizer_2 = new_tokenizers()
    text_encoder, text_encoder_2 = new_text_encoders(tokenizer, tokenizer_2)
    shared = {"vae": new_vae(), "text_encoder": text_encoder, "text_encoder_2": text_encoder_2}
    shared |= {"tokenizer": tokenizer, "tokenizer_2": tokenizer_2}
    for size, shape in SIZES.items():
        transformer = new_transformer(**shape)
        new_pipeline(transformer=transformer, **shared).save_pretrained(folder / size)
        transformer = copy_of(transformer, in_channels=384, out_channels=64)
        new_pipeline(FluxFillPipeline, transformer=transformer, **shared).save_pretrained(folder / f"{size}-fill")


def flags_of(script, folder, size):
    model = folder / (f"{size}-fill" if script == "train_influxedit" else size)
    flags = {"pretrained_model_name_or_path": model, "max_sequence_length": 64, "max_train_steps": STEPS}
    flags |= {"train_batch_size": 4, "learning_rate": 1e-4, "rank": 4, "report_to": "none", "optimizer": "adamw"}
    flags |= data_flags(script, folder, SIDE)
    return [f"--{name}={value}" for name, value in flags.items()] + ["--cache_latents"]


def run(script, flags):
    """One run, which this process is for: seconds of "import", "load", "prepare" and "steps", [(all, bare parts)], and
    "memory" in MiB."""
    started = time.perf_counter()
    import torch
    from diffusers import FluxTransformer2DModel, ModelMixin
    from diffusers.loaders import lora_base  # noqa: F401  imported by every trainer
    from transformers import PreTrainedModel

    trainer = __import__(script)
    measured = {"import": time.perf_counter() - started, "load": 0.0, "steps": []}
    baseline, depth, parts, began = resident("VmRSS"), [0], [0.0], []

    def timed(owner, name, add):
        honest = getattr(owner, name)
        function = getattr(honest, "__func__", honest)

        def wrapper(*args, **kwargs):
            depth[0] += 1
            start = time.perf_counter()
            try:
                return function(*args, **kwargs)
            finally:
                depth[0] -= 1
                if depth[0] == 0:  # not those within others, such as a checkpointed forward pass in the backward
                    add(time.perf_counter() - start)

        setattr(owner, name, classmethod(wrapper) if function is not honest else wrapper)

    def load(seconds):
        measured["load"] += seconds

    def part(seconds):
        parts[0] += seconds

    for owner in (ModelMixin, PreTrainedModel):
        timed(owner, "from_pretrained", load)
    if script == "train_omini":
        timed(trainer.OminiTransformer2DModel, "forward", part)
    else:
        timed(FluxTransformer2DModel, "forward", part)
    timed(torch.Tensor, "backward", part)
    timed(torch.nn.utils, "clip_grad_norm_", part)
    create = trainer.create_optimizer

    def create_optimizer(*args, **kwargs):
        optimizer = create(*args, **kwargs)
        timed(type(optimizer), "step", part)
        return optimizer

    trainer.create_optimizer = create_optimizer
    generator = trainer.step_generator

    def step_generator(seed, step, micro_step=0, *rest):  # called at the start of each step
        now = time.perf_counter()
        if began:
            measured["steps"].append((now - began[-1], parts[0]))
        else:
            measured["prepare"] = now - started - measured["import"] - measured["load"]
            ctypes.CDLL(None).malloc_trim(0)  # what loading has left
            Path("/proc/self/clear_refs").write_text("5")  # forget the peak of loading
        began.append(now)
        parts[0] = 0.0
        return generator(seed, step, micro_step, *rest)

    start_saving = trainer.interruption.start_saving

    def start():  # just before the loop, after all other users of generators
        trainer.step_generator = step_generator
        start_saving()

    trainer.interruption.start_saving = start
    with tempfile.TemporaryDirectory() as folder:
        trainer.main(trainer.parse_args([*flags, f"--output_dir={folder}"]))
    measured["memory"] = resident("VmHWM") - baseline
    return measured


def resident(name):
    """VmRSS, memory in use, or VmHWM, the most so far, in MiB."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) / 2**10 for line in lines if line.startswith(name))


def measure(script, folder, size, extra):
    command = [sys.executable, __file__, "--child", script, *flags_of(script, folder, size), *extra.split()]
    result = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"HF_HUB_OFFLINE": "1"})
    if result.returncode:
        raise SystemExit(f"{script} {extra}: {result.stderr[-2000:]}")
    measured = json.loads(result.stdout.splitlines()[-1])
    steps = measured["steps"][WARM_UP:]
    measured["step"] = statistics.median(everything for everything, _ in steps)
    measured["overhead"] = statistics.median(everything / bare for everything, bare in steps)
    return measured


def main(words):
    rows = [row for row in ROWS if row[0] == "small" or "--quick" not in words]
    scripts, above = [word for word in words if not word.startswith("--")] or SCRIPTS, False
    print("| trainer | model | flags | overhead | time | memory | import + load + rest, s |")
    print("| --- | --- | --- | --- | --- | --- | --- |")
    with tempfile.TemporaryDirectory() as folder:
        make_data(Path(folder))
        for script in scripts:
            plain = {}
            for size, extra in rows:
                found = measure(script, Path(folder), size, extra)
                plain.setdefault(size, found)
                time_ratio, memory = (found[name] / plain[size][name] for name in ("step", "memory"))
                above |= size == "medium" and found["overhead"] > BAR
                start = " + ".join(f"{found[name]:.1f}" for name in ("import", "load", "prepare"))
                cells = f"{found['overhead']:.3f} | {time_ratio:.2f} | {memory:.2f} | {start}"
                print(f"| {script} | {size} | `{extra}` | {cells} |".replace("``", ""), flush=True)
    return int(above)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--child"]:
        print("\n" + json.dumps(run(sys.argv[2], sys.argv[3:])))
    else:
        sys.exit(main(sys.argv[1:]))
