"""The mathematics of train_twinflow.py against slow, literal versions of it, and on eight Gaussians in the plane."""

import copy
import itertools
import math
from contextlib import contextmanager, nullcontext
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import train_twinflow as twinflow
from examples.toy.world import sliced_wasserstein
from train_twinflow import sampling_loop


SAMPLE_TYPES = twinflow.SAMPLE_TYPES


def method(**changes):
    """Arguments of the method, as `compute_loss` reads them."""
    args = {
        "probs": dict.fromkeys(SAMPLE_TYPES, 1.0),
        "consistc_ratio": 1.0,
        "estimate_order": 2,
        "enhanced_ratio": 0.8,
        "enhanced_range": (0.0, 1.0),
        "ema_decay_rate": 0.99,
        "loss_type": "l2",
        "dist_match_cof": 1.0,
        "image_free": False,
        "time_dist_ctrl": (1.0, 1.0, 1.0),
        "instance_share": 0.25,
        "instance_loss_weight": 1.0,
    }
    return SimpleNamespace(**args | changes)


# ---------------------------------------------------------------------------------------------------------------------
# The pieces
# ---------------------------------------------------------------------------------------------------------------------


PROBS = [
    {"e2e": 1, "mul": 1, "any": 1, "adv": 1, "one": 0},
    {"e2e": 1, "mul": 1, "any": 0, "adv": 1, "one": 1},
    {"e2e": 0, "mul": 1, "any": 0, "adv": 0, "one": 0},
    {"e2e": 0.1, "mul": 7, "any": 0, "adv": 0.1, "one": 0},
    {"e2e": 3, "mul": 0, "any": 2, "adv": 0.5, "one": 0},
    {"e2e": 1, "mul": 2, "any": 3, "adv": 5, "one": 0},
]


@pytest.mark.parametrize("probs", PROBS, ids=str)
@pytest.mark.parametrize("batch_size", range(4, 18))
def test_a_batch_holds_every_kind_as_near_to_its_share_as_whole_numbers_come(batch_size, probs):
    counts = twinflow.partition(batch_size, probs)
    kinds = [kind for kind in SAMPLE_TYPES if probs[kind]]
    assert list(counts) == kinds
    assert sum(counts.values()) == batch_size
    shares = [batch_size * probs[kind] / sum(probs.values()) for kind in kinds]
    error = lambda numbers: sum((n - s) ** 2 for n, s in zip(numbers, shares, strict=True))  # noqa: E731
    every = itertools.product(range(1, batch_size + 1), repeat=len(kinds))
    best = min(error(numbers) for numbers in every if sum(numbers) == batch_size)
    assert error(counts.values()) == pytest.approx(best)


def kinds_of(masks):
    """The kind of each sample; every sample is of one."""
    assert (torch.stack([masks[kind] for kind in SAMPLE_TYPES]).sum(dim=0) == 1).all()
    return [next(kind for kind in SAMPLE_TYPES if masks[kind][i]) for i in range(len(masks["e2e"]))]


def test_times_of_each_kind():
    args = method(probs=dict.fromkeys(SAMPLE_TYPES, 1.0), consistc_ratio=0.7, time_dist_ctrl=(2.0, 5.0, 0.9))
    drawn = {kind: [] for kind in SAMPLE_TYPES}
    for seed in range(400):
        generator = torch.Generator().manual_seed(seed)
        masks, t, target_time = twinflow.sample_times(10, args=args, generator=generator)
        for i, kind in enumerate(kinds_of(masks)):
            drawn[kind].append((t[i].item(), target_time[i].item()))
    times = {kind: np.array(pairs).T for kind, pairs in drawn.items()}
    assert {kind: len(pairs) for kind, pairs in drawn.items()} == dict.fromkeys(SAMPLE_TYPES, 800)
    assert (times["e2e"][0] == 1).all()
    assert (times["e2e"][1] == 0).all()
    assert (times["one"][1] == 0).all()
    for kind, reach in (("mul", 0.05), ("any", 0.7), ("adv", 0.7)):
        t, target = times[kind]
        gap = (t - target) / t
        assert gap.min() >= -1e-6
        assert gap.max() == pytest.approx(reach, rel=0.02)
        assert gap.mean() == pytest.approx(reach / 2, rel=0.1)
    t = np.concatenate([times[kind][0] for kind in ("mul", "any", "adv", "one")])
    assert t.max() <= 0.9
    assert t.mean() == pytest.approx(0.9 * 2 / 7, rel=0.05)  # c times the mean of Beta(2, 5)


def slow_consistency_target(F, model, x_t, v, t, target, cond, order):  # noqa: N803
    """One sample at a time, in plain numbers, as the method's definition reads."""
    rows = []
    for i in range(len(F)):
        here, end = t[i].item(), target[i].item()
        start = max(here - 0.01, end)
        x, total, grid = x_t[i] - 0.01 * v[i], 0.0, [start + (end - start) * k / order for k in range(order + 1)]
        for a, b in zip(grid[:-1], grid[1:], strict=True):
            step = model(x[None], torch.tensor([a]), torch.tensor([b]), {"c": cond["c"][i : i + 1]})[0]
            total = total + step * (a - b)
            x_hat, z_hat = x - a * step, x + (1 - a) * step
            x = b * z_hat + (1 - b) * x_hat
        if here == end:
            error = F[i] - v[i]
        elif here - end < 0.01:
            error = F[i] - total / (here - end) - v[i]
        else:
            error = 100 * (here - end) * F[i] - 100 * total - v[i]
        rows.append(F[i] - error.clamp(-1, 1))
    return torch.stack(rows)


def smooth_model(x, t, target, cond):
    """Some smooth velocity that depends on all its arguments."""
    t, target = (value.view(-1, *[1] * (x.ndim - 1)) for value in (t, target))
    return torch.sin(x + 2 * t - target) + cond["c"].view(-1, *[1] * (x.ndim - 1)) * torch.cos(3 * t * x)


@pytest.mark.parametrize("order", [1, 2, 3])
def test_consistency_target(order):
    torch.manual_seed(0)
    t = torch.tensor([1.0, 0.8, 0.305, 0.3, 0.4, 0.009, 0.0])
    target = torch.tensor([0.0, 0.2, 0.3, 0.3, 0.39, 0.0, 0.0])
    F, x_t, v = (torch.randn(7, 3, 2, 2).double() for _ in range(3))  # noqa: N806
    cond = {"c": torch.randn(7)}
    t, target = t.double(), target.double()
    displacement = twinflow.multi_fwd(smooth_model, x_t, t, target, v, cond, order=order)
    fast = twinflow.get_rcgm_target(F, displacement, v, t, target)
    assert torch.isfinite(fast).all()
    slow = slow_consistency_target(F, smooth_model, x_t, v, t, target, cond, order)
    torch.testing.assert_close(fast, slow, atol=1e-4, rtol=1e-4)


def test_the_mean_velocity_of_a_straight_path_is_its_own_target():
    """For one point of data the flow is straight: F = (x_t - x) / t everywhere, and no jump changes it."""
    data = torch.tensor([[0.3, -1.2]]).double()
    model = lambda x, t, target, cond: (x - data) / t.view(-1, 1)  # noqa: E731
    t, target = torch.tensor([0.9, 0.5]).double(), torch.tensor([0.0, 0.2]).double()
    x_t = torch.randn(2, 2).double()
    exact = model(x_t, t, target, None)
    displacement = twinflow.multi_fwd(model, x_t, t, target, exact, None, order=2)
    torch.testing.assert_close(twinflow.get_rcgm_target(exact, displacement, exact, t, target), exact)
    wrong = exact + 0.001
    moved = twinflow.get_rcgm_target(wrong, displacement, exact, t, target)
    torch.testing.assert_close(moved, wrong - 100 * (t - target)[:, None] * 0.001)  # towards the exact one


@pytest.mark.parametrize("data_free", [False, True])
def test_enhanced_target(data_free):
    x_t, v, t = torch.randn(3, 2, 4), torch.randn(3, 2, 4), torch.rand(3)
    cond, uncond = {"c": torch.randn(3)}, {"c": torch.randn(3)}
    fast = twinflow.enhance_target(smooth_model, x_t, t, v, cond, uncond, ratio=0.7, data_free=data_free)
    for i in range(3):
        one = lambda c: smooth_model(x_t[i : i + 1], t[i : i + 1], t[i : i + 1], {"c": c["c"][i : i + 1]})[0]  # noqa: B023, E731
        start = one(uncond) if data_free else v[i]
        torch.testing.assert_close(fast[i], start + 0.7 * (one(cond) - one(uncond)))


def test_losses():
    prediction, target = torch.randn(5, 3, 2), torch.randn(5, 3, 2)
    target[0] = prediction[0]
    alpha, c = 1.0, 1e-3
    for loss_type in ("l2", "barron"):
        x = prediction.clone().requires_grad_()
        losses = twinflow.loss_func(x, target, loss_type)
        for i in range(5):
            m = ((prediction[i] - target[i]) ** 2).mean().item()
            weight = ((m / (c**2 + 1e-8)) / abs(alpha - 2) + 1) ** ((alpha - 2) / 2) / c
            assert losses[i].item() == pytest.approx(m * (weight if loss_type == "barron" else 1), rel=1e-4)
            (gradient,) = torch.autograd.grad(losses[i], x, retain_graph=True)
            expected = 2 * (prediction[i] - target[i]) / 6 * (weight if loss_type == "barron" else 1)
            torch.testing.assert_close(gradient[i], expected, rtol=1e-3, atol=1e-6)  # the weight has no gradient


def test_rectification():
    torch.manual_seed(1)
    prediction, x_t = torch.randn(4, 3, 2), torch.randn(4, 3, 2)
    cond = {"c": torch.randn(4)}
    args = method()
    fast = twinflow.dist_match(
        smooth_model, prediction, x_t, cond, args=args, generator=torch.Generator().manual_seed(3)
    )
    generator = torch.Generator().manual_seed(3)
    t, noise = torch.rand(4, generator=generator), torch.randn(4, 3, 2, generator=generator)
    for i in range(4):
        x_hat = x_t[i] - prediction[i]
        noisy = (t[i] * noise[i] + (1 - t[i]) * x_hat)[None]
        c = {"c": cond["c"][i : i + 1]}
        times = t[i : i + 1]
        delta = smooth_model(noisy, -times, -times, c) - smooth_model(noisy, times, times, c)
        assert fast[i].item() == pytest.approx((delta.clamp(-1, 1) ** 2).mean().item(), rel=1e-4)


def test_the_decay_of_the_average_ramps_up():
    decay, expected = 0.0, 0.0
    for _ in range(50):
        decay, expected = twinflow.ramp_decay(decay, 0.99), expected + (1 - expected) * (0.99 - expected) / 2
        assert decay == pytest.approx(expected)
    assert 0.9 < decay < 0.99


# ---------------------------------------------------------------------------------------------------------------------
# The whole step
# ---------------------------------------------------------------------------------------------------------------------


class Counted:
    """A velocity that remembers how it was called, and differs while a teacher is in its place."""

    def __init__(self):
        self.scale = torch.nn.Parameter(torch.tensor(0.7))
        self.is_teacher, self.calls, self.swaps = False, [], 0

    def __call__(self, x, t, target, cond):
        self.calls.append((len(x), torch.is_grad_enabled(), self.is_teacher, t.tolist(), target.tolist()))
        return (self.scale + self.is_teacher) * smooth_model(x, t, target, cond)

    @contextmanager
    def teacher(self):
        self.is_teacher, self.swaps = True, self.swaps + 1
        yield
        self.is_teacher = False


def step(args, batch_size=10, seed=0, **options):
    torch.manual_seed(seed)
    model, latents = Counted(), torch.randn(batch_size, 2, 3)
    cond, uncond = {"c": torch.randn(batch_size)}, {"c": torch.randn(batch_size)}
    generator = torch.Generator().manual_seed(seed)
    teacher = model.teacher if args.ema_decay_rate else nullcontext
    batch = (latents, cond, uncond)
    loss, logs = twinflow.compute_loss(model, teacher, *batch, args=args, generator=generator, **options)
    return model, latents, cond, uncond, loss, logs


def slow_loss(model, latents, cond, uncond, args, seed=0):
    """The same step, one sample at a time, with the same draws."""
    generator = torch.Generator().manual_seed(seed)
    masks, times, targets = twinflow.sample_times(len(latents), args=args, generator=generator)
    kinds = kinds_of(masks)
    own = [i for i in range(len(latents)) if args.image_free or kinds[i] == "adv"]
    own_noise = torch.randn(len(own), *latents.shape[1:], generator=generator) if own else None
    noise = torch.randn(latents.shape, generator=generator)
    ends = [i for i in range(len(latents)) if kinds[i] == "e2e"]
    rectify = bool(ends) and args.consistc_ratio == 1
    star = torch.rand(len(ends), generator=generator) if rectify else None
    star_noise = torch.randn(len(ends), *latents.shape[1:], generator=generator) if rectify else None

    def live(x, t, target, c):
        return model.scale * smooth_model(x[None], torch.tensor([t]), torch.tensor([target]), {"c": c[None]})[0]

    def taught(x, t, target, c):
        return live(x, t, target, c) * (1 + 1 / model.scale)

    averaged, frozen = 0 < args.ema_decay_rate < 1, args.ema_decay_rate == 1
    guide, walker = (taught if averaged or frozen else live), (taught if averaged else live)
    losses, rectified = [], []
    for i, kind in enumerate(kinds):
        t, target, c, x = times[i].item(), targets[i].item(), cond["c"][i], latents[i]
        if i in own:
            z = own_noise[own.index(i)]
            x = (z - live(z, 1.0, 0.0, c)).detach()
        z, v = noise[i], noise[i] - x
        x_t = t * z + (1 - t) * x
        weight = math.tan((1 - (t - target)) * math.pi / 2.5) + 1
        if kind == "adv":
            t, target, weight = -t, -t, 1.0
        elif args.enhanced_ratio and args.enhanced_range[0] < t < args.enhanced_range[1]:
            with_prompt, without = guide(x_t, t, t, c), guide(x_t, t, t, uncond["c"][i])
            start = without if frozen and args.image_free else v
            v = (start + args.enhanced_ratio * (with_prompt - without)).detach()
        F = live(x_t, t, target, c)  # noqa: N806
        goal = v
        if kind != "adv" and args.estimate_order and {"e2e", "one", "any"} & set(kinds):
            walk = lambda x, t, target, c: walker(x[0], t.item(), target.item(), c["c"][0])[None]  # noqa: E731
            goal = slow_consistency_target(
                F[None], walk, x_t[None], v[None], torch.tensor([t]), torch.tensor([target]), {"c": c[None]},
                args.estimate_order,
            )[0].detach()  # fmt: skip
        error = ((F - goal) ** 2).mean()
        if args.estimate_order or kind in ("mul", "adv"):
            losses.append(weight * error)
        if kind == "e2e" and rectify:
            j = ends.index(i)
            noisy = star[j] * star_noise[j] + (1 - star[j]) * (x_t - F).detach()
            s = star[j].item()
            delta = (live(noisy, -s, -s, c) - live(noisy, s, s, c)).clamp(-1, 1).detach()
            rectified.append(((F - (F - delta).detach()) ** 2).mean())
    total = torch.stack(losses).mean()
    return total + args.dist_match_cof * torch.stack(rectified).mean() if rectified else total


STEPS = {
    "twinflow": {"probs": PROBS[0]},
    "all kinds, order 3": {"estimate_order": 3},
    "first order, live teacher": {"probs": PROBS[1], "estimate_order": 1, "ema_decay_rate": 0.0},
    "frozen teacher": {"probs": PROBS[1], "estimate_order": 1, "ema_decay_rate": 1.0, "enhanced_ratio": 4.0},
    "guidance at some times": {"probs": PROBS[0], "enhanced_range": (0.3, 0.7)},
    "image-free": {"image_free": True, "ema_decay_rate": 1.0, "enhanced_ratio": 4.0},
    "rcgm": {"probs": {"e2e": 1, "mul": 1, "any": 1, "adv": 0, "one": 0}, "dist_match_cof": 0.0},
    "no consistency": {"probs": PROBS[2], "consistc_ratio": 0.0, "estimate_order": 0, "enhanced_ratio": 0.0},
    "rectification alone": {"probs": {"e2e": 1, "mul": 1, "any": 0, "adv": 1, "one": 0}, "estimate_order": 0},
}


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("name", STEPS)
def test_the_loss_and_its_gradient(name, seed):
    args = method(**STEPS[name])
    model, latents, cond, uncond, loss, _ = step(args, seed=seed)
    (gradient,) = torch.autograd.grad(loss, model.scale)
    slow = slow_loss(model, latents, cond, uncond, args, seed=seed)
    (slow_gradient,) = torch.autograd.grad(slow, model.scale)
    torch.testing.assert_close(loss, slow, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(gradient, slow_gradient, rtol=1e-3, atol=1e-4)


def test_a_subject_is_learned_by_flow_matching_beside_the_rest():
    args = method(probs=PROBS[0], enhanced_ratio=0.0, dist_match_cof=0.0, instance_loss_weight=3.0)
    instances = torch.tensor([True, False, False, True, False, False, False, True, False, False])
    without = step(args)[4]
    model, latents, cond, _, loss, logs = step(args, instances=instances)
    generator = torch.Generator().manual_seed(0)
    masks, _, _ = twinflow.sample_times(10, args=args, generator=generator)
    for count in (int(masks["adv"].sum()), 10):
        torch.randn(count, 2, 3, generator=generator)
    times = torch.rand(3, generator=generator)
    noise = torch.randn(3, 2, 3, generator=generator)
    errors = []
    for time, z, x, c in zip(times, noise, latents[instances], cond["c"][instances], strict=True):
        velocity = model((time * z + (1 - time) * x)[None], time[None], time[None], {"c": c[None]})[0]
        errors.append((velocity - (z - x)).square().mean())
    expected = torch.stack(errors).sum() / (10 * 0.25)
    torch.testing.assert_close(logs["loss_instance"], expected.detach())
    torch.testing.assert_close(loss, without + 3 * expected)


def test_a_subject_is_not_guided_and_needs_no_further_forward_pass():
    instances = torch.zeros(8, dtype=torch.bool)
    args = method(probs=PROBS[0])
    for of_subject in ([], [2, 3, 5], list(range(8))):
        instances[of_subject] = True
        calls = step(args, batch_size=8, instances=instances)[0].calls
        assert len(calls) == 6
        guided = [i for i in (2, 3, 4, 5) if i not in of_subject]  # neither e2e, at t = 1, nor adv
        assert calls[1][0] == 2 * max(1, len(guided))  # one sample where there is none: equal on all processes
        assert calls[4][:2] == (8 + len(of_subject), True)


@pytest.mark.parametrize(
    ("name", "expected"),
    [  # (samples, with gradient, teacher) of each forward pass of a batch of 8; None: those that are not next to t'
        ("twinflow", [(2, 0, 0), (8, 0, 1), (None, 0, 1), (None, 0, 1), (8, 1, 0), (4, 0, 0)]),
        ("rcgm", [(10, 0, 1), (None, 0, 1), (None, 0, 1), (8, 1, 0)]),
        ("frozen teacher", [(2, 0, 0), (8, 0, 1), (None, 0, 0), (8, 1, 0), (4, 0, 0)]),
        ("no consistency", [(8, 1, 0)]),
        ("rectification alone", [(2, 0, 0), (6, 0, 1), (8, 1, 0), (6, 0, 0)]),
    ],
)
def test_forward_passes_are_the_fewest_the_method_needs(name, expected):
    args, found = method(**STEPS[name]), set()
    for seed in range(6):
        model = step(args, batch_size=8, seed=seed)[0]
        masks, t, target = twinflow.sample_times(8, args=args, generator=torch.Generator().manual_seed(seed))
        distant = int((~masks["adv"] & (t - target > 0.01)).sum())
        needed = [(distant if count is None else count, *rest) for count, *rest in expected]
        assert [(count, int(gradient), int(teacher)) for count, gradient, teacher, _, _ in model.calls] == needed
        assert model.swaps == any(teacher for _, _, teacher in expected)  # once for guidance and the RCGM target
        found.add(distant)
    assert len(found) > 1 or name in ("no consistency", "rectification alone")


def test_with_dropout_the_rows_of_a_batch_stay_where_they_are():
    """So that a sample has one mask in the pass with gradient and in the steps of its RCGM target."""
    args = method(probs=PROBS[0])
    for seed in range(6):
        calls = step(args, batch_size=8, seed=seed, replays_dropout=True)[0].calls
        assert [len(calls[i][3]) for i in (2, 3)] == [6, 6]


def test_guidance_runs_only_where_it_is_used_and_never_not_at_all():
    args = method(probs=PROBS[0], enhanced_range=(0.3, 0.7))
    for seed in range(10):
        calls = step(args, batch_size=8, seed=seed)[0].calls
        assert len(calls) == 6  # the same on every process, whatever the times
        guided = calls[1]
        assert guided[3] == guided[4]
        assert guided[0] == 2 or all(0.3 <= t <= 0.7 for t in guided[3])


# ---------------------------------------------------------------------------------------------------------------------
# Few steps in ComfyUI, by its rules as written down from its behaviour
# ---------------------------------------------------------------------------------------------------------------------


def comfyui_sigmas(steps, shift, table):
    """Its scheduler `simple`: every len / steps-th of a table of even, shifted times from its end, then 0."""
    times = torch.arange(1, table + 1).double() / table
    shifted = shift * times / (1 + (shift - 1) * times)
    return [shifted[-1 - int(i * table / steps)].item() for i in range(steps)] + [0.0]


def comfyui_lcm(model, noise, cond, sigmas, generators):
    """Its sampler `lcm` on an empty latent, for a model of velocities, which it tells the time t alone."""
    x = sigmas[0] * noise.double()
    for sigma, sigma_next in itertools.pairwise(sigmas):
        t = torch.full((len(x),), sigma)
        x_hat = x - sigma * model(x.float(), t, cond)
        new_noise = torch.stack([torch.randn(noise.shape[1:], generator=generator) for generator in generators])
        x = sigma_next * new_noise + (1 - sigma_next) * x_hat
    return x.float()


COMFYUI_SHIFTS = {  # the page's numbers, as each node takes them: (shift of the times, length of its table)
    "ModelSamplingFlux, both shifts 0.85": (math.exp(0.85), 10000),
    "ModelSamplingSD3 or ModelSamplingAuraFlow, shift 2.33": (2.33, 1000),
    "exactly": (7 / 3, 10000),
}


@pytest.mark.parametrize("steps", [1, 2])
@pytest.mark.parametrize("node", COMFYUI_SHIFTS)
def test_comfyui_draws_few_steps_of_an_adapter(node, steps):
    sigmas = comfyui_sigmas(steps, *COMFYUI_SHIFTS[node])
    gaps = (0.0, 0.7)  # ComfyUI begins at t = 1, the style few at 0.999
    assert sigmas == pytest.approx(twinflow.time_grid(steps, gaps, (1.0, 1.0, 1.0)).tolist(), abs=1e-3)
    assert sigmas == pytest.approx(twinflow.time_grid(steps, (0.001, 0.7), (1.0, 1.0, 1.0)).tolist(), abs=2e-3)

    def adapter(x, t, cond):  # which is told t - t' / 2
        return smooth_model(x, t, 0 * t, cond)

    noise, cond = torch.randn(3, 2, 4, generator=torch.Generator().manual_seed(0)), {"c": torch.rand(3)}
    drawn = []
    for sampler in (
        lambda generators: comfyui_lcm(adapter, noise, cond, sigmas, generators),
        lambda generators: sampling_loop(
            lambda x, t, target, cond: adapter(x, t - target / 2, cond),
            noise, cond, steps=steps, style="few", generators=generators, gaps=gaps, stochast_ratio=1.0,
        ),
    ):  # fmt: skip
        drawn.append(sampler([torch.Generator().manual_seed(i) for i in range(3)]))
    torch.testing.assert_close(drawn[0], drawn[1], atol=1e-5 if node == "exactly" else 5e-3, rtol=0)
    assert (drawn[1] - noise).abs().max() > 0.1


# ---------------------------------------------------------------------------------------------------------------------
# Eight Gaussians
# ---------------------------------------------------------------------------------------------------------------------


class Plane(torch.nn.Module):
    """A velocity in the plane that knows both times."""

    def __init__(self, width=128):
        super().__init__()
        sizes = [2 + 16, width, width, width]
        layers = [layer for pair in itertools.pairwise(sizes) for layer in (torch.nn.Linear(*pair), torch.nn.SiLU())]
        self.layers = torch.nn.Sequential(*layers, torch.nn.Linear(width, 2))

    def forward(self, x, t, target, cond=None):
        waves = torch.tensor([1.0, 2.0, 4.0, 8.0]) * math.pi / 2
        times = [f(value[:, None] * waves) for value in (t, target) for f in (torch.sin, torch.cos)]
        return self.layers(torch.cat([x, *times], dim=1))


CENTRES = torch.tensor([[math.cos(k * math.pi / 4), math.sin(k * math.pi / 4)] for k in range(8)]) * math.sqrt(2)


def gaussians(count, generator):
    centres = CENTRES[torch.randint(8, (count,), generator=generator)]
    return centres + 0.08 * torch.randn(count, 2, generator=generator)


def fit(model, loss_of, steps, lr=2e-3, after=lambda: None):
    optimizer = torch.optim.Adam(model.parameters(), lr=lr, betas=(0.9, 0.99))
    for i in range(steps):
        optimizer.param_groups[0]["lr"] = lr * min(1.0, 2 * (1 - i / steps))
        loss = loss_of(torch.Generator().manual_seed(i))
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        after()


@pytest.fixture(scope="module")
def pretrained():
    """Plain flow matching, which needs many steps to sample."""
    torch.manual_seed(0)
    model = Plane()

    def loss_of(generator):
        data, noise = gaussians(512, generator), torch.randn(512, 2, generator=generator)
        t = torch.rand(512, generator=generator)
        x_t = t[:, None] * noise + (1 - t[:, None]) * data
        return (model(x_t, t, t) - (noise - data)).square().mean()

    fit(model, loss_of, 1200)
    return model


def distilled(pretrained, steps=800, **changes):
    args = method(enhanced_ratio=0.0, **changes)
    model, average = copy.deepcopy(pretrained), copy.deepcopy(pretrained)
    active, decay = [model], 0.0

    @contextmanager
    def teacher():
        active[0] = average
        yield
        active[0] = model

    def loss_of(generator):
        predict = lambda x, t, target, cond: active[0](x, t, target)  # noqa: E731
        data = gaussians(512, generator)
        context = teacher if args.ema_decay_rate else nullcontext
        return twinflow.compute_loss(predict, context, data, {}, {}, args=args, generator=generator)[0]

    def after():
        nonlocal decay
        decay = twinflow.ramp_decay(decay, args.ema_decay_rate)
        for mean, value in zip(average.parameters(), model.parameters(), strict=True):
            mean.data.lerp_(value.data, 1 - decay)

    fit(model, loss_of, steps, after=after)
    return model


def quality(model, steps, style):
    """(sliced Wasserstein distance to the data, share of samples within 0.3 of a centre)."""
    generator = torch.Generator().manual_seed(7)
    real, noise = gaussians(2000, generator), torch.randn(2000, 2, generator=generator)
    generators = [torch.Generator().manual_seed(i) for i in range(2000)]
    with torch.no_grad():
        drawn = sampling_loop(model, noise, {}, steps=steps, style=style, generators=generators)
    near = torch.cdist(drawn, CENTRES).min(dim=1).values < 0.3
    return sliced_wasserstein(drawn.numpy(), real.numpy()), near.float().mean().item()


@pytest.mark.slow
@pytest.mark.learning
def test_one_step_draws_the_eight_gaussians_and_rectification_matters(pretrained):
    no_steps = {"probs": {"e2e": 1, "mul": 1, "any": 0, "adv": 1, "one": 0}, "estimate_order": 0}
    models = {
        "flow matching": pretrained,
        "TwinFlow": distilled(pretrained, probs=PROBS[0], loss_type="barron"),
        "rectification alone": distilled(pretrained, ema_decay_rate=0.0, **no_steps),
        "neither": distilled(pretrained, ema_decay_rate=0.0, dist_match_cof=0.0, **no_steps),
    }
    found = {}
    for name, model in models.items():
        found[name] = {steps: quality(model, steps, style) for steps, style in ((1, "few"), (2, "few"), (30, "mul"))}
        cells = ", ".join(f"{n} steps {w:.3f} / {100 * near:.0f} %" for n, (w, near) in found[name].items())
        print(f"{name:20} {cells}")
    distance, near = ({name: cells[1][i] for name, cells in found.items()} for i in (0, 1))
    best = found["flow matching"][30][0]
    print(f"bars, 1 step: TwinFlow within .05 of flow matching in 30 ({best:.3f}) and 65 % near a centre")
    assert near["flow matching"] < 0.4
    assert distance["flow matching"] > best + 0.1
    assert distance["TwinFlow"] < best + 0.05
    assert near["TwinFlow"] > 0.65
    assert near["rectification alone"] > near["neither"] + 0.2
    assert distance["rectification alone"] < distance["neither"] - 0.05
