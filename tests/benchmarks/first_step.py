"""Seconds from the start of a trainer's process to the end of its first step, with and without a precomputed cache.

    python tests/benchmarks/first_step.py [trainer ...] [--images 1000]      # about 3 minutes for all four

Every row is a process of its own on the toy's FLUX, 64 px, a caption for each image. The images are encoded by
--precompute_only before, which is the row of this name, or in the run.

    import    importing the trainer and what it needs
    load      weights of text encoders, VAE and transformer
    data      from the flags to the folder of the run: reading images' headers and captions, all checks
    cache     encoding prompts and images, or finding them on the disk
    rest      adapters, optimizer, workers
    step      the first step, until its loss is logged
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path


ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))

from tests.benchmarks.trainers import SCRIPTS, data_flags, write_pictures


KEPT = ("--cache_latents_to_disk", "--cache_text_encoder_outputs_to_disk")
PARTS = ("import", "load", "data", "cache", "rest", "step")
SIDE = 64


def flags_of(script, folder):
    model = "flux-fill" if script == "train_influxedit" else "flux"
    flags = {"pretrained_model_name_or_path": ROOT / "examples" / "toy" / model, "max_sequence_length": 32}
    flags |= {"train_batch_size": 4, "max_train_steps": 1, "rank": 4, "report_to": "none", "seed": 0}
    flags |= {"disk_cache_dir": folder / script, **data_flags(script, folder, SIDE)}
    return [f"--{name}={value}" for name, value in flags.items()]


def run(script, flags):
    """{part: seconds} of a run, which this process is for."""
    started = time.perf_counter()
    trainer = __import__(script)
    from common.latents import EncodedIndex, TensorCache
    from common.text_encoders import PromptEncoder

    from diffusers import ModelMixin
    from transformers import PreTrainedModel

    seconds = dict.fromkeys(PARTS, 0.0)
    seconds["import"] = time.perf_counter() - started
    inside = []  # the parts that are under way

    def timed(owner, name, part):
        honest = getattr(owner, name)
        function = getattr(honest, "__func__", honest)

        def wrapper(*args, **kwargs):
            start = time.perf_counter()
            inside.append(part)
            try:
                return function(*args, **kwargs)
            finally:
                inside.pop()
                took = time.perf_counter() - start
                seconds[part] += took
                if inside:  # the outer part's time is its own
                    seconds[inside[-1]] -= took

        setattr(owner, name, classmethod(wrapper) if function is not honest else wrapper)

    for owner in (ModelMixin, PreTrainedModel):
        timed(owner, "from_pretrained", "load")
    timed(PromptEncoder, "cache_prompts", "cache")
    for name in ("find", "load_vae", "record"):
        timed(EncodedIndex, name, "cache")
    for name in ("fill", "fill_by_content"):
        timed(TensorCache, name, "cache")
    claim = trainer.claim_output_dir
    marks = {"main": time.perf_counter()}

    def claim_output_dir(*args):
        seconds["data"] = time.perf_counter() - marks["main"] - seconds["load"]
        return claim(*args)

    start_saving = trainer.interruption.start_saving

    def start():
        marks["loop"] = time.perf_counter()
        start_saving()

    log = trainer.log_step

    def log_step(*args):
        marks.setdefault("logged", time.perf_counter())
        return log(*args)

    trainer.claim_output_dir = claim_output_dir
    trainer.interruption.start_saving = start
    trainer.log_step = log_step
    with tempfile.TemporaryDirectory() as folder:
        trainer.main(trainer.parse_args([*flags, f"--output_dir={folder}"]))
    end = marks.get("logged", time.perf_counter())
    seconds["step"] = end - marks.get("loop", end)
    seconds["rest"] = end - started - sum(seconds.values())
    return seconds


def measure(script, flags):
    """({part: seconds}, seconds in all) of a process, the start of Python included."""
    command = [sys.executable, __file__, "--child", script, *flags]
    before = time.time()
    result = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"HF_HUB_OFFLINE": "1"})
    if result.returncode:
        raise SystemExit(f"{script}: {result.stderr[-2000:]}")
    measured = json.loads(result.stdout.splitlines()[-1])
    return measured["seconds"], measured["began"] - before + sum(measured["seconds"].values())


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("trainers", nargs="*", default=SCRIPTS)
    parser.add_argument("--images", type=int, default=1000)
    args = parser.parse_args()
    print(f"{args.images:,} images")
    print(f"| trainer | run | to the end of the first step, s | {' + '.join(PARTS)} |")
    print("| --- | --- | --- | --- |")
    with tempfile.TemporaryDirectory() as folder:
        write_pictures(Path(folder), args.images, SIDE)
        for script in args.trainers:
            flags = flags_of(script, Path(folder))
            rows = {"encodes in the run": ["--cache_latents"], "--precompute_only": [*KEPT, "--precompute_only"]}
            rows["precomputed"] = list(KEPT)
            for name, more in rows.items():
                seconds, total = measure(script, [*flags, *more])
                cells = " + ".join(f"{seconds[part]:.1f}" for part in PARTS)
                print(f"| {script} | {name} | {total:.1f} | {cells} |", flush=True)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--child"]:
        began = time.time()
        print("\n" + json.dumps({"seconds": run(sys.argv[2], sys.argv[3:]), "began": began}))
    else:
        main()
