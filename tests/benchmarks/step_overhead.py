"""How much longer a step of the DreamBooth trainer takes than the bare loop on ready tensors.

    python tests/benchmarks/step_overhead.py

Both train the same model (4 + 8 blocks, width 512, LoRA rank 4) on 256 px, batch 1, float32. They take turns, one step
each, so that a machine that is busy for a while is busy for both. The last line is the quotient of the
medians; above 1.05 the exit code is 1.
"""

import random
import statistics
import sys
import tempfile
import time
from pathlib import Path

import torch


sys.path.insert(0, str(Path(__file__).parents[2]))

from common.flow_matching import add_noise
from common.latents import image_ids
from common.lora import FLUX_TARGET_MODULES, add_lora

import train_dreambooth_flux_advanced as dreambooth
from examples.toy.pretrain import new_pipeline, new_text_encoders, new_tokenizers, new_transformer, new_vae
from examples.toy.world import draw, random_scene


STEPS, WARM_UP, TEXT_LENGTH = 24, 4, 128


def save_model(folder, text_layers=2):
    """A pipeline of the size to be measured, with random weights."""
    clip_tokenizer, t5_tokenizer = new_tokenizers()
    text_encoder, text_encoder_2 = new_text_encoders(clip_tokenizer, t5_tokenizer, layers=text_layers)
    pipeline = new_pipeline(
        vae=new_vae(),
        text_encoder=text_encoder,
        tokenizer=clip_tokenizer,
        text_encoder_2=text_encoder_2,
        tokenizer_2=t5_tokenizer,
        transformer=new_transformer(heads=16, layers=4, single_layers=8),
    )
    pipeline.save_pretrained(folder)


def train(folder, *flags):
    """Runs the trainer with the model in folder/model on pictures of its own."""
    (folder / "pictures").mkdir(exist_ok=True)
    for i in range(4):
        draw(random_scene(random.Random(i)), 256, 256).save(folder / "pictures" / f"{i}.png")
    shared = [
        *("--pretrained_model_name_or_path", folder / "model", "--max_sequence_length", TEXT_LENGTH),
        *("--instance_data_dir", folder / "pictures", "--instance_prompt", "a picture", "--resolution", 256),
        *("--train_batch_size", 1, "--cache_latents", "--output_dir", folder / "run"),
    ]
    dreambooth.main(dreambooth.parse_args([str(flag) for flag in (*shared, *flags)]))


def bare_step():
    """A function that does one step: forward, backward, clip, update."""
    transformer = new_transformer(heads=16, layers=4, single_layers=8).requires_grad_(False)
    parameters = add_lora(transformer, rank=4, alpha=4, dropout=0.0, target_modules=FLUX_TARGET_MODULES)
    optimizer = torch.optim.AdamW(parameters, lr=1e-4)
    latents, noise, sigmas = torch.randn(1, 256, 64), torch.randn(1, 256, 64), torch.tensor([0.5])
    inputs = {
        "hidden_states": add_noise(latents, noise, sigmas),
        "timestep": sigmas,
        "guidance": torch.tensor([3.5]),
        "pooled_projections": torch.randn(1, 64),
        "encoder_hidden_states": torch.randn(1, TEXT_LENGTH, 64),
        "txt_ids": torch.zeros(TEXT_LENGTH, 3),
        "img_ids": image_ids(32, 32),
    }
    transformer.train()

    def step():
        loss = (transformer(**inputs, return_dict=False)[0] - (noise - latents)).square().mean()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()

    return step


def main():
    step, compute_loss = bare_step(), dreambooth.compute_loss
    trainer_seconds, bare_seconds, resumed = [], [], []

    def timed(*args, **kwargs):
        now = time.perf_counter()
        if resumed:
            trainer_seconds.append(now - resumed.pop())
        start = time.perf_counter()
        step()
        resumed.append(time.perf_counter())
        bare_seconds.append(resumed[0] - start)
        return compute_loss(*args, **kwargs)

    dreambooth.compute_loss = timed
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        save_model(folder / "model")
        train(folder, "--max_train_steps", STEPS + 1)
    trainer, bare = (statistics.median(seconds[WARM_UP:]) for seconds in (trainer_seconds, bare_seconds))
    print(f"trainer step {trainer:.3f} s, bare step {bare:.3f} s, {torch.get_num_threads()} threads")
    print(f"{trainer / bare:.3f}")
    return int(trainer / bare > 1.05)


if __name__ == "__main__":
    sys.exit(main())
