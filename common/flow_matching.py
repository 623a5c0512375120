"""Flow matching: which noise levels are trained, the noisy sample, its velocity, and the weight of its loss.

x_σ = (1 - σ) x_0 + σ ε,   the model predicts v = ε - x_0,   σ in [0, 1], timestep t = 1000 σ
"""

import math

import numpy as np
import torch
from diffusers.pipelines.flux.pipeline_flux import calculate_shift
from diffusers.training_utils import compute_density_for_timestep_sampling, compute_loss_weighting_for_sd3


TIMESTEP_SAMPLING = ("sigma", "uniform", "sigmoid", "shift", "flux_shift")
STYLES = {  # of `sample_flow`: where a prediction aims, and what goes with it
    "few": {"stochast_ratio": 1.0, "gaps": (0.001, 0.7), "time_dist_ctrl": (1.0, 1.0, 1.0)},
    "any": {"stochast_ratio": 0.0, "gaps": (0.001, 0.5), "time_dist_ctrl": (1.0, 1.0, 1.0)},
    "mul": {"stochast_ratio": 0.0, "gaps": (0.001, 0.0), "time_dist_ctrl": (1.17, 0.8, 1.1)},
}


def step_generator(seed, step, micro_step=0, process_index=0):
    """The CPU generator that all of one micro-step's randomness comes from: equal arguments, equal draws."""
    entropy = np.random.SeedSequence([seed, step, micro_step, process_index])
    return torch.Generator().manual_seed(int(entropy.generate_state(1, np.uint64)[0] >> 1))


def sample_sigmas(
    batch_size,
    *,
    noise_scheduler,
    image_seq_len,
    generator,
    timestep_sampling="sigma",
    weighting_scheme="none",
    logit_mean=0.0,
    logit_std=1.0,
    mode_scale=1.29,
    sigmoid_scale=1.0,
    discrete_flow_shift=3.0,
):
    """Noise levels σ [batch_size] in (0, 1], float32.

    `timestep_sampling`, with y = sigmoid(sigmoid_scale n), n ~ N(0, 1):
        sigma       the scheduler's own 1000 levels, picked by the density of `weighting_scheme` (arXiv 2403.03206)
        uniform     U(0, 1)
        sigmoid     y
        shift       s y / (1 + (s - 1) y) with s = discrete_flow_shift
        flux_shift  the same with s = exp(μ), μ as FluxPipeline computes it from `image_seq_len` tokens
    """
    if timestep_sampling == "sigma":
        density = compute_density_for_timestep_sampling(
            weighting_scheme, batch_size, logit_mean, logit_std, mode_scale, generator=generator
        )
        num_levels = noise_scheduler.config.num_train_timesteps
        indices = (density * num_levels).long().clamp(0, num_levels - 1)  # a density can reach 1.0
        return noise_scheduler.sigmas[indices]
    if timestep_sampling == "uniform":
        sigmas = 1 - torch.rand(batch_size, generator=generator)  # never 0
    else:
        sigmas = torch.sigmoid(sigmoid_scale * torch.randn(batch_size, generator=generator))
    if timestep_sampling == "shift":
        sigmas = shift_sigmas(sigmas, discrete_flow_shift)
    elif timestep_sampling == "flux_shift":
        sigmas = shift_sigmas(sigmas, math.exp(calculate_shift(image_seq_len)))
    return sigmas


def shift_sigmas(sigmas, shift):
    """Noise levels moved towards 1 by `shift` > 1, towards 0 by `shift` < 1 (arXiv 2403.03206, eq. 23)."""
    return shift * sigmas / (1 + (shift - 1) * sigmas)


def add_noise(latents, noise, sigmas):
    """x_σ = (1 - σ) x_0 + σ ε, with one σ per sample: sigmas [B], the others [B, ...]."""
    sigmas = sigmas.view(-1, *[1] * (latents.ndim - 1)).to(latents)
    return (1 - sigmas) * latents + sigmas * noise


def velocity_loss(model_pred, latents, noise, sigmas, weighting_scheme="none", token_weights=None):
    """Weighted squared error [B] of predicted velocities [B, ...] against ε - x_0, mean over all but the batch.

    `token_weights` [B, N], not negative, make it a weighted mean over the tokens of velocities [B, N, C].
    """
    weighting = compute_loss_weighting_for_sd3(weighting_scheme, sigmas=sigmas.to(model_pred.device))
    error = (model_pred.float() - (noise - latents).float()).square()
    if token_weights is None:
        return weighting * error.flatten(1).mean(dim=1)
    total = token_weights.sum(dim=1).clamp(min=1e-6)  # with weight 0, no token may be left
    return weighting * (error.mean(dim=2) * token_weights).sum(dim=1) / total


# ---------------------------------------------------------------------------------------------------------------------
# Sampling in few steps
# ---------------------------------------------------------------------------------------------------------------------


def time_grid(steps, gaps, time_dist_ctrl):
    """Times [steps + 1], float64, from noise to 0: 1 - (1 - (1 - u^a)^b)^c for even u between the gaps at both ends, a
    power of Kumaraswamy's distribution function, then 0."""
    a, b, c = time_dist_ctrl
    u = torch.linspace(gaps[0], 1 - gaps[1], steps + (gaps[1] == 0), dtype=torch.float64)[:steps]
    return torch.cat([1 - (1 - (1 - u**a) ** b) ** c, torch.zeros(1, dtype=torch.float64)])


@torch.no_grad()
def sample_flow(
    predict,
    noise,
    cond,
    uncond=None,
    *,
    steps,
    style="few",
    generators=None,
    cfg_scale=0.0,
    stochast_ratio=None,
    extrapol_ratio=0.0,
    order=1,
    gaps=None,
    time_dist_ctrl=None,
):
    """Samples x [B, ...] from noise [B, ...] in `steps` forward passes (UCGM, arXiv 2505.07447).

    `style` says where each prediction aims: few at 0, any at the next time, mul (multi-step) nowhere beyond the time
    it stands at; unset arguments are STYLES'. A share s = stochast_ratio of the noise is renewed in each step, from
    one generator per image; "SDE" sets s = min(1, 2 t (t - t₊) / t₊²). `extrapol_ratio` goes beyond each prediction
    by its difference from the one before. Order 2 corrects each step by Heun's rule, for which velocities must be
    those at a time: mul only. cfg_scale 0 is no guidance, else F(uncond) + cfg_scale (F(cond) - F(uncond)).
    """
    preset = STYLES[style]
    if stochast_ratio is None:
        stochast_ratio = 0.8 if style == "few" and steps == 1 else preset["stochast_ratio"]
    if order == 2 and (style != "mul" or stochast_ratio):
        raise ValueError("sampling order 2 needs style mul and stochast_ratio 0: only velocities at a time average")
    times = time_grid(-(-steps // order), gaps or preset["gaps"], time_dist_ctrl or preset["time_dist_ctrl"]).tolist()

    def velocity(x, t, target):
        t, target = (torch.full((len(x),), value, device=x.device) for value in (t, target))
        x = x.to(noise.dtype)
        if not cfg_scale:
            return predict(x, t, target, cond).double()
        both = {name: torch.cat([cond[name], uncond[name]]) for name in cond}
        twice = [torch.cat([value, value]) for value in (x, t, target)]
        with_prompt, without = predict(*twice, both).double().chunk(2)
        return without + cfg_scale * (with_prompt - without)

    x, before = noise.double(), None
    for t, after in zip(times[:-1], times[1:], strict=True):
        F = velocity(x, t, {"few": 0.0, "any": after, "mul": t}[style])  # noqa: N806
        x_hat, z_hat = x - t * F, x + (1 - t) * F
        predicted = x_hat, z_hat
        if extrapol_ratio and before is not None:
            x_hat, z_hat = (now + extrapol_ratio * (now - old) for now, old in zip(predicted, before, strict=True))
        before = predicted
        s = stochast_ratio
        if s == "SDE":
            s = min(1.0, 2 * t * (t - after) / after**2) if after else 1.0
        if s and after:
            fresh = [torch.randn(noise.shape[1:], generator=generator) for generator in generators]
            z_hat = (1 - s) ** 0.5 * z_hat + s**0.5 * torch.stack(fresh).to(z_hat)
        ahead = (1 - after) * x_hat + after * z_hat
        if order == 2 and after:
            ahead = x - (t - after) * (F + velocity(ahead, after, after)) / 2
        x = ahead
    return x.to(noise.dtype)
