"""What conditions cost: a training step of train_omini against the plain model, a step of generation with the cache.

    python tests/benchmarks/omini_step.py

Model: 4 + 8 blocks, width 512, float32, 128 text tokens, 256 image tokens, 256 condition tokens, LoRA rank 4. Those
that are compared take turns, one step each. Training: forward, backward and clip of OminiTransformer2DModel against
the stock FluxTransformer2DModel with the same LoRA on a sequence of as many tokens. Generation: a step with filled
cache against a step without conditions, and the step without the cache. The exit code is 1 if a quotient of medians
misses its bar.
"""

import statistics
import sys
import time
from pathlib import Path

import torch


sys.path.insert(0, str(Path(__file__).parents[2]))

from common.latents import image_ids
from common.lora import add_lora

from examples.toy.pretrain import new_transformer
from train_omini import TARGET_MODULES, ConditionTokens, KVCache, OminiTransformer2DModel, condition_ids


ROUNDS, WARM_UP, TEXT_LENGTH, SIDE = 14, 3, 128, 32  # SIDE in latents: 256 tokens


def arguments(width=SIDE):
    """Inputs of the stock forward pass for latents of SIDE x `width`."""
    return {
        "hidden_states": torch.randn(1, SIDE * width // 4, 64),
        "timestep": torch.tensor([0.5]),
        "guidance": torch.tensor([1.0]),
        "pooled_projections": torch.randn(1, 64),
        "encoder_hidden_states": torch.randn(1, TEXT_LENGTH, 64),
        "txt_ids": torch.zeros(TEXT_LENGTH, 3),
        "img_ids": image_ids(SIDE, width),
    }


def training_step(transformer, parameters, forward):
    out = forward()
    out.square().mean().backward()
    torch.nn.utils.clip_grad_norm_(parameters, 0.5)
    for parameter in parameters:
        parameter.grad = None


def medians(**functions):
    """The median seconds of each function; they take turns."""
    seconds = {name: [] for name in functions}
    for _ in range(ROUNDS):
        for name, function in functions.items():
            start = time.perf_counter()
            function()
            seconds[name].append(time.perf_counter() - start)
    return {name: statistics.median(values[WARM_UP:]) for name, values in seconds.items()}


def main():
    plain = new_transformer(heads=16, layers=4, single_layers=8)
    omini = OminiTransformer2DModel.from_config(plain.config)
    omini.load_state_dict(plain.state_dict())
    parameters = {}
    for model in (plain, omini):
        model.requires_grad_(False)
        parameters[model] = add_lora(model, rank=4, alpha=4, dropout=0.0, target_modules=TARGET_MODULES)
    image = arguments()
    twice = arguments(2 * SIDE)
    conditions = [ConditionTokens(torch.randn(1, SIDE * SIDE // 4, 64), condition_ids(SIDE, SIDE))]

    def forward(**joint_attention_kwargs):
        return omini(**image, joint_attention_kwargs=joint_attention_kwargs, return_dict=False)[0]

    training = medians(
        omini=lambda: training_step(omini, parameters[omini], lambda: forward(conditions=conditions)),
        plain=lambda: training_step(plain, parameters[plain], lambda: plain(**twice, return_dict=False)[0]),
    )
    ratio = training["omini"] / training["plain"]
    print(f"training step {training['omini']:.3f} s, plain model {training['plain']:.3f} s: {ratio:.3f} (bar 1.15)")
    with torch.no_grad():
        cache = KVCache()
        independent = {"conditions": conditions, "independent_condition": True}
        forward(**independent, cache=cache)
        steps = medians(
            unconditioned=forward,
            cached=lambda: forward(**independent, cache=cache),
            uncached=lambda: forward(**independent),
        )
    cached, uncached = (steps[name] / steps["unconditioned"] for name in ("cached", "uncached"))
    print(
        f"step of generation {steps['unconditioned']:.3f} s without conditions; with the cache {cached:.3f} times that"
    )
    print(f"(bar 1.1), without it {uncached:.3f} times")
    return int(ratio > 1.15 or cached > 1.1)


if __name__ == "__main__":
    sys.exit(main())
