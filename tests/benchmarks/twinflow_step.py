"""A step of train_twinflow.py beside one with the forward passes of the authors' code: their number, time and memory.

    python tests/benchmarks/twinflow_step.py             # about 5 minutes; --count: the number of passes alone

Counted, per recipe, by a hook on the transformer: calls, and samples in them, of a batch of 8 (the mean of 8 steps).
The method needs one call with gradient and, where the recipe has them, one each for generated samples, guidance (both
prompts at once), each step of the RCGM target and rectification (both signs of the time at once).

Timed: a Stable Diffusion 3 of 39 M parameters, float32, 64 image and 16 text tokens, a batch of 8. A step is
`compute_loss`, backward, clipping, AdamW and the moving average. The stand-in makes the authors' passes with the same
functions, optimizer and average: the pass with gradient first, then, on the whole batch, two of guidance and one per
RCGM step, then two of rectification; its teacher is a copy of the whole model. Both take turns, in CPU seconds of one
thread. Memory is the most in use above the imports, each in a process of its own.

The exit code is 1 if the number of calls is not the method's, or a bar is missed: time 0.8, memory 0.9 of an adapter,
1.02 of all weights (both hold weights, gradients, two moments and the average), swaps of weights 2 % of a step.
"""

import copy
import ctypes
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import torch
from diffusers import SD3Transformer2DModel


sys.path.insert(0, str(Path(__file__).parents[2]))

from common.lora import add_lora

import train_twinflow as twinflow
from tests.benchmarks.trainers import resident
from train_twinflow import RECIPES, StableDiffusion3, select_samples


BATCH_SIZE, SIDE, TEXT_LENGTH = 8, 16, 16  # SIDE in latents: 64 tokens
ROUNDS, WARM_UP, MEMORY_STEPS = 8, 2, 3
TIME_BAR, SWAP_BAR = 0.8, 0.02
MEMORY_BARS = {"twinflow": 1.02, "lora-2order": 0.9}
SIZES = {
    "39 M": {"num_layers": 7, "attention_head_dim": 64, "num_attention_heads": 6},
    "tiny": {"num_layers": 2, "attention_head_dim": 8, "num_attention_heads": 2},
}
DEFAULTS = {
    "training": "full",
    "enhanced_range": (0.0, 1.0),
    "loss_type": "l2",
    "dist_match_cof": 1.0,
    "image_free": False,
    "time_dist_ctrl": (1.0, 1.0, 1.0),
}


def method_args(recipe):
    """The settings of a recipe that `compute_loss` reads."""
    settings = DEFAULTS | RECIPES[recipe]
    return SimpleNamespace(**settings | {"probs": twinflow.probabilities(settings["probs"])})


class Run:
    """A model with its optimizer and teacher, trained by `step`."""

    def __init__(self, recipe, size):
        torch.manual_seed(0)
        self.args = method_args(recipe)
        self.backbone = StableDiffusion3(self.args)
        width = SIZES[size]["attention_head_dim"] * SIZES[size]["num_attention_heads"]
        self.transformer = SD3Transformer2DModel(
            sample_size=SIDE,
            joint_attention_dim=4096,
            pooled_projection_dim=2048,
            caption_projection_dim=width,
            pos_embed_max_size=SIDE,
            qk_norm="rms_norm",
            dual_attention_layers=(),
            **SIZES[size],
        )
        if self.args.training == "lora":
            self.transformer.requires_grad_(False)
            add_lora(self.transformer, rank=64, alpha=64, dropout=0.0, target_modules=StableDiffusion3.targets)
        else:
            self.backbone.add_target_time(self.transformer, "zero")
        self.parameters = [p for p in self.transformer.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(self.parameters, lr=1e-4)
        self.calls = []  # the number of samples of each forward pass
        self.swap_seconds = 0.0
        self.make_teacher()

    def predict_with(self, transformer):
        def count(_, inputs, kwargs):
            self.calls.append(len(kwargs["hidden_states"]))

        transformer.register_forward_pre_hook(count, with_kwargs=True)

        def predict(x, t, target_time, cond):
            return twinflow.predict_velocity(
                *(x, t, target_time, cond),
                transformer=transformer,
                backbone=self.backbone,
                dtype=torch.float32,
                two_times=self.args.training == "full",
            )

        return predict

    def batch(self, seed):
        """(latents, cond, uncond, generator) of a step."""
        generator = torch.Generator().manual_seed(seed)
        latents = torch.randn(BATCH_SIZE, 16, SIDE, SIDE, generator=generator)
        cond, uncond = (
            {
                "encoder_hidden_states": torch.randn(BATCH_SIZE, TEXT_LENGTH, 4096, generator=generator),
                "pooled_projections": torch.randn(BATCH_SIZE, 2048, generator=generator),
            }
            for _ in range(2)
        )
        return latents, cond, uncond, generator

    def step(self, seed):
        loss = self.loss(*self.batch(seed))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.parameters, 1.0)
        self.optimizer.step()
        self.update_teacher()
        self.optimizer.zero_grad()


class Ours(Run):
    def make_teacher(self):
        self.predict = self.predict_with(self.transformer)
        self.teacher = twinflow.EMATeacher(self.parameters, self.args.ema_decay_rate)
        honest = self.teacher.swap_weights

        def swap_weights():
            started = time.process_time()
            honest()
            self.swap_seconds += time.process_time() - started

        self.teacher.swap_weights = swap_weights

    def update_teacher(self):
        self.teacher.update_ema(torch.tensor(True))

    def loss(self, latents, cond, uncond, generator):
        loss, _ = twinflow.compute_loss(
            *(self.predict, self.teacher, latents, cond, uncond), args=self.args, generator=generator
        )
        return loss


class StandIn(Run):
    """The authors' forward passes, of the sizes and in the order of their code."""

    def make_teacher(self):
        self.predict = self.predict_with(self.transformer)
        self.teacher_predict = self.predict
        self.averages = []
        if self.args.ema_decay_rate:
            teacher = copy.deepcopy(self.transformer)
            teacher._forward_pre_hooks.clear()
            teacher._forward_pre_hooks_with_kwargs.clear()
            self.averages = [p for p in teacher.parameters() if p.requires_grad]
            teacher.requires_grad_(False)
            self.teacher_predict = self.predict_with(teacher)

    @torch.no_grad()
    def update_teacher(self):
        if 0 < self.args.ema_decay_rate < 1:
            torch._foreach_lerp_(self.averages, [p.detach() for p in self.parameters], 0.01)

    def loss(self, latents, cond, uncond, generator):
        args = self.args
        masks, t, target_time = twinflow.sample_times(BATCH_SIZE, args=args, generator=generator)
        generated = [torch.ones(BATCH_SIZE, dtype=torch.bool)] * args.image_free + [masks["adv"]] * masks["adv"].any()
        for mask in generated:
            noise = torch.randn(latents[mask].shape, generator=generator)
            ones = torch.ones(len(noise))
            with torch.no_grad():
                latents[mask] = noise - self.predict(noise, ones, 0 * ones, select_samples(cond, mask))
        noise = torch.randn(latents.shape, generator=generator)
        x_t = twinflow.expand_as(t, noise) * noise + twinflow.expand_as(1 - t, noise) * latents
        target = noise - latents
        t[masks["adv"]] *= -1
        target_time[masks["adv"]] = t[masks["adv"]]
        prediction = self.predict(x_t, t, target_time, cond)
        with torch.no_grad():
            if args.enhanced_ratio:
                without = self.teacher_predict(x_t, t, t, uncond)
                guidance = self.teacher_predict(x_t, t, t, cond) - without
                guided = ~masks["adv"] & (t > 0) & (t < 1)
                target[guided] = (target + args.enhanced_ratio * guidance)[guided]
            if args.estimate_order and (masks["e2e"] | masks["any"] | masks["one"]).any():
                stepping = self.predict if args.ema_decay_rate == 1 else self.teacher_predict
                displacement = twinflow.multi_fwd(
                    stepping, x_t, t, target_time, target, cond, order=args.estimate_order
                )
                rcgm_target = twinflow.get_rcgm_target(prediction, displacement, target, t, target_time)
                target[~masks["adv"]] = rcgm_target[~masks["adv"]]
        loss = twinflow.loss_func(prediction, target, args.loss_type).mean()
        e2e = masks["e2e"]
        if e2e.any() and args.consistc_ratio == 1:
            x_hat = (x_t - prediction)[e2e].detach()
            s = torch.rand(len(x_hat), generator=generator)
            x_s = x_hat + twinflow.expand_as(s, x_hat) * torch.randn(x_hat.shape, generator=generator)
            with torch.no_grad():
                fake, real = (self.predict(x_s, sign * s, sign * s, select_samples(cond, e2e)) for sign in (-1, 1))
            rectified = prediction[e2e].detach() - (fake - real).clamp(-1, 1)
            loss = loss + twinflow.loss_func(prediction[e2e], rectified, args.loss_type).mean()
        return loss


def needed_calls(args):
    """The number of forward passes that the method needs."""
    share = args.probs
    jumps = share["e2e"] or share["any"] or share["one"]
    return (
        1
        + bool(share["adv"] or args.image_free)
        + bool(args.enhanced_ratio)
        + (args.estimate_order if jumps else 0)
        + bool(share["e2e"] and args.consistc_ratio == 1 and args.dist_match_cof)
    )


def count_passes():
    """Prints the passes of each recipe; True if the number of calls is the method's in all."""
    print("| recipe | calls of the method | calls here (samples) | calls in the authors' code (samples) |")
    print("| --- | --- | --- | --- |")
    right = True
    for recipe in RECIPES:
        cells = []
        for kind in (Ours, StandIn):
            run = kind(recipe, "tiny")
            samples = []
            for seed in range(8):  # the times, and with them the number of samples, are drawn at random
                run.calls.clear()
                run.step(seed)
                samples.append(sum(run.calls))
            cells.append((len(run.calls), f"{len(run.calls)} ({statistics.mean(samples):.1f})"))
        needed = needed_calls(method_args(recipe))
        right &= cells[0][0] == needed
        print(f"| {recipe} | {needed} | {cells[0][1]} | {cells[1][1]} |")
    return right


def memory_of(kind, recipe):
    """MiB above the imports that a run takes, in this process."""
    baseline = resident("VmRSS")
    run = kind(recipe, "39 M")
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # forget the peak of making the model
    for seed in range(MEMORY_STEPS):
        run.step(seed)
    return resident("VmHWM") - baseline


def compare(recipe):
    """Prints the ratios of a recipe; True if they are below their bars."""
    runs = {kind: kind(recipe, "39 M") for kind in (Ours, StandIn)}
    seconds = {kind: [] for kind in runs}
    swaps = []
    for seed in range(ROUNDS):
        for kind, run in runs.items():
            run.swap_seconds = 0.0
            started = time.process_time()
            run.step(seed)
            seconds[kind].append(time.process_time() - started)
        swaps.append(runs[Ours].swap_seconds / seconds[Ours][-1])
    size = sum(p.numel() for p in runs[Ours].transformer.parameters()) / 1e6
    ours, authors = (statistics.median(values[WARM_UP:]) for values in seconds.values())
    swap = statistics.median(swaps[WARM_UP:])
    memory = {}
    for kind in runs:
        command = [sys.executable, str(Path(__file__).resolve()), "--child", kind.__name__, recipe]
        child = subprocess.run(command, capture_output=True, text=True, check=True)
        memory[kind] = json.loads(child.stdout.splitlines()[-1])
    ratio = memory[Ours] / memory[StandIn]
    print(
        f"| {recipe} ({size:.0f} M) | {ours:.2f} / {authors:.2f} s = {ours / authors:.3f} | "
        f"{memory[Ours]:.0f} / {memory[StandIn]:.0f} MiB = {ratio:.3f} | {100 * swap:.2f} % |",
        flush=True,
    )
    return ours / authors <= TIME_BAR and ratio <= MEMORY_BARS[recipe] and swap <= SWAP_BAR


def main(words):
    torch.set_num_threads(1)
    if words[:1] == ["--child"]:
        print(json.dumps(memory_of({"Ours": Ours, "StandIn": StandIn}[words[1]], words[2])))
        return 0
    passed = count_passes()
    if "--count" not in words:
        print(f"\n| recipe | time (bar {TIME_BAR}) | memory (bars 1.02, 0.9) | swaps of weights (bar 2 %) |")
        print("| --- | --- | --- | --- |")
        for recipe in MEMORY_BARS:
            passed &= compare(recipe)
    return int(not passed)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
