"""Memory and speed of reading a stream of many samples.

    python tests/benchmarks/streams.py --samples 200000 --tars 200

It writes webdataset tars of PNG files of 32 x 32 pixels with captions, reads one epoch of them as a process of a run
does, decodes every image, and prints the samples per second and the memory after each quarter. Above 1.05 times the
memory of the first quarter in the last one the exit code is 1, also where a sample is missing or seen twice.

Then it times steps of the toy FLUX (VAE, transformer with a LoRA, update) on batches of the stream and on the same
batches, held in memory, in turns. The last line is the quotient of the sums; above 1.05 the exit code is 1.
`--steps 0` leaves this out. `--folder` keeps the tars for another call.
"""

import argparse
import io
import itertools
import json
import sys
import tarfile
import tempfile
import time
from pathlib import Path

import numpy as np
import psutil
import torch
from PIL import Image
from torch.utils.data import DataLoader


ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))

from common.data import StreamedBatches, fit, open_stream
from common.flow_matching import add_noise
from common.latents import encode_moments, image_ids, pack_latents
from common.lora import FLUX_TARGET_MODULES, add_lora


TEXT_LENGTH = 32


def write_tars(folder, num_samples, num_tars, members_of):
    """The tars of {ending: bytes} of each sample, members_of(number); those that are there stay."""
    folder.mkdir(parents=True, exist_ok=True)
    for number in range(num_tars):
        path = folder / f"{number:05d}.tar"
        if path.exists():
            continue
        partial = path.with_suffix(".partial")
        with tarfile.open(partial, "w") as tar:
            for i in range(number, num_samples, num_tars):
                for ending, data in members_of(i).items():
                    member = tarfile.TarInfo(f"{i:08d}.{ending}")
                    member.size = len(data)
                    tar.addfile(member, io.BytesIO(data))
        partial.rename(path)


def png(pixels):
    """A PNG file of pixels [H, W, 3]."""
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, format="PNG")
    return file.getvalue()


def captioned_image(number):
    pixels = np.random.default_rng(number).integers(256, size=(32, 32, 3), dtype=np.uint8)
    return {"png": png(pixels), "json": json.dumps({"prompt": str(number)}).encode()}


def sample(example, epoch, index):
    pixels = np.asarray(fit(example.image(), (32, 32)), dtype=np.float32) / 127.5 - 1
    return {"id": int(example.caption), "epoch": epoch, "pixel_values": torch.from_numpy(pixels).permute(2, 0, 1)}


def open_batches(args, stop):
    stream, problems = open_stream(
        "webdataset",
        source="--folder",
        image_columns={"image": "png"},
        data_files=[str(path) for path in sorted(args.folder.glob("*.tar"))],
    )
    if stream is None:
        raise SystemExit(str(problems))
    batches = StreamedBatches(
        stream,
        sample,
        batch_size=args.batch_size,
        shuffle_buffer=args.shuffle_buffer,
        seed=0,
        process_index=0,
        num_processes=1,
        num_threads=args.workers,
    )
    batches.stop = stop
    return DataLoader(batches, batch_size=None, num_workers=min(1, args.workers))


def memory():
    """MiB that this process and its reader hold; what they share counts twice."""
    own = psutil.Process()
    return sum(process.memory_info().rss for process in (own, *own.children(recursive=True))) / 2**20


def read_epoch(args):
    """Reads an epoch; returns whether memory was flat and every sample was there once."""
    seen = np.zeros(args.samples, dtype=np.int32)
    marks = [args.samples * quarter // 4 for quarter in range(1, 5)]
    quarters = []
    started = time.perf_counter()
    peak = 0.0
    for step, batch in enumerate(open_batches(args, stop=10**9)):
        first_epoch = batch["epoch"] == 0
        np.add.at(seen, batch["id"][first_epoch].numpy(), 1)
        if step % 100 == 0:
            peak = max(peak, memory())
        if seen.sum() >= marks[len(quarters)]:
            quarters.append(max(peak, memory()))
            peak = 0.0
            seconds = time.perf_counter() - started
            print(
                f"{seen.sum():9,} samples: {quarters[-1]:7.1f} MiB, {seen.sum() / seconds:7.0f} samples per second",
                flush=True,
            )
        if len(quarters) == 4 or not first_epoch.any():
            break
    is_complete = bool((seen == 1).all())
    ratio = quarters[-1] / quarters[0]
    print(f"each of {args.samples:,} samples once: {is_complete}; memory, last quarter to first: {ratio:.3f}")
    return is_complete and ratio <= 1.05


def toy_step(batch_size):
    """step(pixel_values): a training step of the toy FLUX."""
    from diffusers import AutoencoderKL, FluxTransformer2DModel

    toy = ROOT / "examples" / "toy" / "flux"
    vae = AutoencoderKL.from_pretrained(toy, subfolder="vae").requires_grad_(False)
    transformer = FluxTransformer2DModel.from_pretrained(toy, subfolder="transformer").requires_grad_(False)
    parameters = add_lora(transformer, rank=4, alpha=4, dropout=0.0, target_modules=FLUX_TARGET_MODULES)
    optimizer = torch.optim.AdamW(parameters, lr=1e-4)
    config = transformer.config
    sigmas = torch.full((batch_size,), 0.5)
    inputs = {
        "timestep": sigmas,
        "guidance": torch.full((batch_size,), 3.5) if config.guidance_embeds else None,
        "pooled_projections": torch.randn(batch_size, config.pooled_projection_dim),
        "encoder_hidden_states": torch.randn(batch_size, TEXT_LENGTH, config.joint_attention_dim),
        "txt_ids": torch.zeros(TEXT_LENGTH, 3),
    }

    def step(pixel_values):
        with torch.no_grad():
            latents = encode_moments(vae, pixel_values).chunk(2, dim=1)[0]
        noise = torch.randn_like(latents)
        noisy = pack_latents(add_noise(latents, noise, sigmas))
        ids = image_ids(latents.shape[2], latents.shape[3])
        velocity = transformer(hidden_states=noisy, img_ids=ids, **inputs, return_dict=False)[0]
        loss = (velocity - pack_latents(noise - latents)).square().mean()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()

    return step


def time_steps(args):
    """The time of steps on a stream to that on tensors in memory."""
    step = toy_step(args.batch_size)
    batches = iter(open_batches(args, stop=args.steps + 5))
    ready = []
    for batch in itertools.islice(batches, 5):  # warm-up
        step(batch["pixel_values"])
        ready.append(batch["pixel_values"].clone())
    streamed = 0.0
    preloaded = 0.0
    for number in range(args.steps):
        started = time.perf_counter()
        step(next(batches)["pixel_values"])
        between = time.perf_counter()
        step(ready[number % len(ready)])
        streamed += between - started
        preloaded += time.perf_counter() - between
    ratio = streamed / preloaded
    print(f"a step of {args.batch_size} samples: {1000 * preloaded / args.steps:.1f} ms on tensors in memory")
    print(f"steps on the stream to steps on tensors in memory: {ratio:.3f}")
    return ratio <= 1.05


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--samples", type=int, default=20_000)
    parser.add_argument("--tars", type=int, default=20)
    parser.add_argument("--batch_size", type=int, default=8)
    parser.add_argument("--shuffle_buffer", type=int, default=1000)
    parser.add_argument("--workers", type=int, default=0, help="threads that decode ahead, in one process")
    parser.add_argument("--steps", type=int, default=200, help="of the toy, timed")
    parser.add_argument("--folder", type=Path)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        args.folder = args.folder or Path(folder) / "tars"
        write_tars(args.folder, args.samples, args.tars, captioned_image)
        is_good = read_epoch(args)
        if args.steps:
            is_good &= time_steps(args)
    raise SystemExit(not is_good)


if __name__ == "__main__":
    main()
