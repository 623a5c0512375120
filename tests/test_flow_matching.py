"""common/flow_matching.py against diffusers' functions and the formulas."""

import math

from common.flow_matching import (
    TIMESTEP_SAMPLING,
    add_noise,
    sample_sigmas,
    shift_sigmas,
    step_generator,
    weighted_mse,
)

import numpy as np
import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from diffusers.pipelines.flux.pipeline_flux import calculate_shift
from diffusers.training_utils import compute_density_for_timestep_sampling, compute_loss_weighting_for_sd3

from train_twinflow import sampling_loop, time_grid


DEV = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, shift=3.0)
SD3 = FlowMatchEulerDiscreteScheduler(shift=3.0)


def sample(batch_size, seed=0, noise_scheduler=DEV, **options):
    generator = torch.Generator().manual_seed(seed)
    options = {"image_seq_len": 1024, "noise_scheduler": noise_scheduler, "generator": generator} | options
    return sample_sigmas(batch_size, **options)


@pytest.mark.parametrize("scheme", ["none", "sigma_sqrt", "logit_normal", "mode", "cosmap"])
@pytest.mark.parametrize("noise_scheduler", [DEV, SD3])
def test_sigma_sampling_is_what_the_diffusers_scripts_do(scheme, noise_scheduler):
    sigmas = sample(512, 1, noise_scheduler, weighting_scheme=scheme, logit_mean=0.3, logit_std=0.8)
    density = compute_density_for_timestep_sampling(
        scheme, 512, 0.3, 0.8, 1.29, generator=torch.Generator().manual_seed(1)
    )
    timesteps = noise_scheduler.timesteps[(density * 1000).long()]
    torch.testing.assert_close(1000 * sigmas, timesteps)


def test_a_density_of_one_stays_in_the_table():
    assert sample(20000, weighting_scheme="logit_normal", logit_std=30.0).min() > 0


def test_shifted_samplings_follow_their_formulas():
    normal = torch.randn(1000, generator=torch.Generator().manual_seed(0))
    y = torch.sigmoid(1.5 * normal)
    torch.testing.assert_close(sample(1000, timestep_sampling="sigmoid", sigmoid_scale=1.5), y)
    shifted = sample(1000, timestep_sampling="shift", sigmoid_scale=1.5, discrete_flow_shift=2.5)
    torch.testing.assert_close(shifted, 2.5 * y / (1 + 1.5 * y))
    for tokens, mu in [(1024, 0.63), (2304, 0.847), (4096, 1.15), (9216, 2.017)]:  # 512, 768, 1024, 1536 px
        assert calculate_shift(tokens) == pytest.approx(mu, abs=1e-3)
        flux = sample(1000, timestep_sampling="flux_shift", sigmoid_scale=1.5, image_seq_len=tokens)
        torch.testing.assert_close(flux, math.exp(mu) / (math.exp(mu) + 1 / y - 1), atol=1e-3, rtol=0)
        torch.testing.assert_close(flux, DEV.time_shift(calculate_shift(tokens), 1.0, y))


def test_shift_of_a_known_value():
    assert shift_sigmas(torch.tensor(0.5), 3.0) == pytest.approx(0.75)


@pytest.mark.parametrize("timestep_sampling", TIMESTEP_SAMPLING)
def test_noise_levels_are_seeded_and_in_range(timestep_sampling):
    first, again, other = (sample(4096, seed, timestep_sampling=timestep_sampling) for seed in (0, 0, 1))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert 0 <= first.min() < 0.05
    assert 0.95 < first.max() <= 1


def test_step_generator_depends_on_each_of_its_arguments():
    base = (7, 100, 1, 3)
    draw = lambda *arguments: torch.randn(8, generator=step_generator(*arguments))  # noqa: E731
    assert torch.equal(draw(*base), draw(*base))
    neighbours = [base] + [tuple(v + (i == k) for i, v in enumerate(base)) for k in range(4)]
    assert len({tuple(draw(*arguments).tolist()) for arguments in neighbours}) == 5
    assert not torch.equal(draw(0, 1, 0, 0), draw(1, 0, 0, 0))


def test_add_noise_is_the_schedulers():
    latents, noise = torch.randn(2, 4, 16, 8, 8)
    sigmas = DEV.sigmas[torch.tensor([0, 300, 600, 999])]
    expected = DEV.scale_noise(latents, 1000 * sigmas, noise)
    torch.testing.assert_close(add_noise(latents, noise, sigmas), expected)
    assert torch.equal(add_noise(latents, noise, torch.ones(4)), noise)
    assert torch.equal(add_noise(latents, noise, torch.zeros(4)), latents)


@pytest.mark.parametrize("scheme", ["none", "sigma_sqrt", "logit_normal", "mode", "cosmap"])
def test_weighted_mse_is_the_weighted_mean_square(scheme):
    model_pred, latents, noise = torch.randn(3, 5, 4, 6)
    sigmas = torch.rand(5) * 0.9 + 0.1
    weights = compute_loss_weighting_for_sd3(scheme, sigmas)
    expected = [
        w * (p - (n - x)).pow(2).mean() for w, p, n, x in zip(weights, model_pred, noise, latents, strict=True)
    ]
    losses = weighted_mse(model_pred, noise - latents, compute_loss_weighting_for_sd3(scheme, sigmas))
    torch.testing.assert_close(losses, torch.stack(expected))
    order = torch.randperm(5)
    torch.testing.assert_close(
        weighted_mse(
            model_pred[order], noise[order] - latents[order], compute_loss_weighting_for_sd3(scheme, sigmas[order])
        ),
        losses[order],
    )
    if scheme == "sigma_sqrt":
        torch.testing.assert_close(weights, sigmas**-2)
    if scheme == "cosmap":
        torch.testing.assert_close(weights, 2 / (math.pi * (1 - 2 * sigmas + 2 * sigmas**2)))


def test_token_weights_make_a_weighted_mean():
    model_pred, latents, noise = torch.randn(3, 2, 5, 8)
    sigmas, token_weights = torch.rand(2), torch.rand(2, 5)
    plain = weighted_mse(model_pred, noise - latents, compute_loss_weighting_for_sd3("cosmap", sigmas))
    torch.testing.assert_close(
        weighted_mse(
            model_pred, noise - latents, compute_loss_weighting_for_sd3("cosmap", sigmas), torch.ones(2, 5) * 3
        ),
        plain,
    )
    weighted = weighted_mse(model_pred, noise - latents, compute_loss_weighting_for_sd3("none", sigmas), token_weights)
    error = (model_pred - (noise - latents)).square().mean(-1)
    torch.testing.assert_close(weighted, (error * token_weights).sum(1) / token_weights.sum(1))
    assert torch.equal(
        weighted_mse(model_pred, noise - latents, compute_loss_weighting_for_sd3("none", sigmas), torch.zeros(2, 5)),
        torch.zeros(2),
    )


def test_padded_tokens_cost_no_loss():
    pred, latents, noise = (torch.randn(2, 3, 4) for _ in range(3))
    sigmas = torch.tensor([0.2, 0.9])
    valid = torch.tensor([[True, True, False], [True, True, True]])
    losses = weighted_mse(pred, noise - latents, compute_loss_weighting_for_sd3("sigma_sqrt", sigmas), valid)
    short = weighted_mse(
        pred[:1, :2], noise[:1, :2] - latents[:1, :2], compute_loss_weighting_for_sd3("sigma_sqrt", sigmas[:1])
    )
    assert torch.allclose(losses[:1], short)
    assert torch.allclose(
        losses[1:], weighted_mse(pred, noise - latents, compute_loss_weighting_for_sd3("sigma_sqrt", sigmas))[1:]
    )


# ---------------------------------------------------------------------------------------------------------------------
# Sampling in few steps
# ---------------------------------------------------------------------------------------------------------------------


def smooth_model(x, t, target, cond):
    """Some smooth velocity that depends on all its arguments."""
    t, target = (value.view(-1, *[1] * (x.ndim - 1)) for value in (t, target))
    return torch.sin(x + 2 * t - target) + cond["c"].view(-1, *[1] * (x.ndim - 1)) * torch.cos(3 * t * x)


def test_time_grids():
    assert time_grid(1, (0.001, 0.7), (1, 1, 1)).tolist() == pytest.approx([0.999, 0])
    assert time_grid(2, (0.001, 0.7), (1, 1, 1)).tolist() == pytest.approx([0.999, 0.7, 0])
    assert time_grid(4, (0.001, 0.5), (1, 1, 1)).tolist() == pytest.approx(
        [1 - 0.001 - k * 0.499 / 3 for k in range(4)] + [0]
    )
    grid = time_grid(30, (0.001, 0.0), (1.17, 0.8, 1.1))
    us = [0.001 + k * 0.999 / 30 for k in range(30)]
    assert grid.tolist() == pytest.approx([1 - (1 - (1 - u**1.17) ** 0.8) ** 1.1 for u in us] + [0])
    assert grid.dtype == torch.float64


def slow_sample(model, noise, steps, style, s, extrapol, order, gaps, ctrl, cfg, seeds, cond, uncond):
    """One picture at a time, with numpy."""
    a, b, c = ctrl
    n = (steps + 1) // 2 if order == 2 else steps
    us = np.linspace(gaps[0], 1 - gaps[1], n + 1)[:n] if gaps[1] == 0 else np.linspace(gaps[0], 1 - gaps[1], n)
    ts = [1 - (1 - (1 - u**a) ** b) ** c for u in us] + [0.0]
    pictures = []
    for i in range(len(noise)):
        x, generator, last = noise[i].double().numpy(), torch.Generator().manual_seed(seeds[i]), None

        def F(x, t, target):  # noqa: N802
            x, t, target = torch.tensor(x).float()[None], torch.tensor([t]).float(), torch.tensor([target]).float()
            on, off = (model(x, t, target, {"c": k["c"][i : i + 1]}).double().numpy()[0] for k in (cond, uncond))  # noqa: B023
            return off + cfg * (on - off) if cfg else on

        for t, after in zip(ts[:-1], ts[1:], strict=True):
            f = F(x, t, {"few": 0.0, "any": after, "mul": t}[style])
            now = x - t * f, x + (1 - t) * f
            x_hat, z_hat = now if last is None else (p + extrapol * (p - q) for p, q in zip(now, last, strict=True))
            last = now
            if after:
                share = min(1.0, 2 * t * (t - after) / after**2) if s == "SDE" else s
                fresh = torch.randn(noise.shape[1:], generator=generator).double().numpy() if share else 0
                ahead = (1 - after) * x_hat + after * (np.sqrt(1 - share) * z_hat + np.sqrt(share) * fresh)
                x = x - (t - after) * (f + F(ahead, after, after)) / 2 if order == 2 else ahead
            else:
                x = x_hat
        pictures.append(torch.tensor(x))
    return torch.stack(pictures)


SAMPLERS = [
    {"steps": 1, "style": "few"},
    {"steps": 2, "style": "few"},
    {"steps": 4, "style": "any"},
    {"steps": 30, "style": "mul"},
    {"steps": 7, "style": "mul", "order": 2},
    {"steps": 5, "style": "any", "extrapol_ratio": 0.4},
    {"steps": 5, "style": "few", "stochast_ratio": "SDE"},
    {"steps": 6, "style": "mul", "stochast_ratio": "SDE", "gaps": (0.01, 0.1), "time_dist_ctrl": (1.0, 2.0, 0.5)},
    {"steps": 3, "style": "few", "stochast_ratio": 0.5, "cfg_scale": 2.5},
]


@pytest.mark.parametrize("sampler", SAMPLERS, ids=lambda s: " ".join(map(str, s.values())))
def test_sampling(sampler):
    noise = torch.randn(3, 2, 4, generator=torch.Generator().manual_seed(0))
    untouched = noise.clone()
    cond, uncond = {"c": torch.tensor([0.5, -0.2, 1.0])}, {"c": torch.zeros(3)}
    seeds = [7, 8, 9]
    fast = sampling_loop(
        *(smooth_model, noise, cond, uncond),
        generators=[torch.Generator().manual_seed(seed) for seed in seeds],
        **sampler,
    )
    preset = {"few": (1.0, (0.001, 0.7), (1, 1, 1)), "any": (0.0, (0.001, 0.5), (1, 1, 1))}
    preset["mul"] = (0.0, (0.001, 0.0), (1.17, 0.8, 1.1))
    s, gaps, ctrl = preset[sampler["style"]]
    s = 0.8 if sampler["style"] == "few" and sampler["steps"] == 1 else s
    slow = slow_sample(
        *(smooth_model, noise, sampler["steps"], sampler["style"], sampler.get("stochast_ratio", s)),
        *(sampler.get("extrapol_ratio", 0.0), sampler.get("order", 1), sampler.get("gaps", gaps)),
        *(sampler.get("time_dist_ctrl", ctrl), sampler.get("cfg_scale", 0.0), seeds, cond, uncond),
    )
    torch.testing.assert_close(fast.double(), slow, atol=1e-4, rtol=1e-4)
    assert torch.equal(noise, untouched)


def test_the_second_order_is_for_velocities_at_a_time():
    for wrong in ({"style": "few"}, {"style": "any"}, {"style": "mul", "stochast_ratio": 0.5}):
        with pytest.raises(ValueError, match="needs style mul and stochast_ratio 0"):
            sampling_loop(smooth_model, torch.randn(1, 2), {"c": torch.zeros(1)}, steps=4, order=2, **wrong)


def test_the_second_order_is_more_exact():
    """dx/dt = 3 t² x from t = 1 to 0, of which the solution is known; the last step is always of order 1."""
    model = lambda x, t, target, cond: 3 * t[:, None] ** 2 * x  # noqa: E731
    exact = math.exp(-1)
    noise = torch.ones(1, 1, dtype=torch.float64)
    grid = {"style": "mul", "steps": 40, "gaps": (1e-9, 0.0), "time_dist_ctrl": (1.0, 1.0, 1.0)}
    errors = [abs(sampling_loop(model, noise, {}, order=order, **grid).item() - exact) for order in (1, 2)]
    print(f"error of order 1 {errors[0]:.5f}, of order 2 with as many passes {errors[1]:.5f} (bar: a third)")
    assert errors[1] < errors[0] / 3
