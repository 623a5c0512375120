"""Flow matching: noise levels, the noisy sample, the weight of its loss, the generator of a step.

x_σ = (1 - σ) x_0 + σ ε,   the model predicts v = ε - x_0,   σ in [0, 1], timestep t = 1000 σ
"""

import math

import numpy as np
import torch
from diffusers.pipelines.flux.pipeline_flux import calculate_shift
from diffusers.training_utils import compute_density_for_timestep_sampling


TIMESTEP_SAMPLING = ("sigma", "uniform", "sigmoid", "shift", "flux_shift")

WEIGHTING_SCHEMES = ("none", "sigma_sqrt", "logit_normal", "mode", "cosmap")


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


def weighted_mse(
    model_pred: torch.Tensor,
    target: torch.Tensor,
    weighting: torch.Tensor,
    token_weights: torch.Tensor | None = None,
) -> torch.Tensor:
    """Squared error [B] of predictions [B, ...], the mean over all but the batch, times `weighting` [B].

    `token_weights` [B, N], not negative, make it a weighted mean over the tokens of predictions [B, N, C].
    """
    error = (model_pred.float() - target.float()).square()
    if token_weights is None:
        return weighting * error.flatten(1).mean(dim=1)
    total = token_weights.sum(dim=1).clamp(min=1e-6)  # with weight 0, no token may be left
    return weighting * (error.mean(dim=2) * token_weights).sum(dim=1) / total
