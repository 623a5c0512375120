"""Flow matching: noise levels, noisy samples, the weighted error, and the random generator of a step.

    x_σ = (1 - σ) x_0 + σ ε        target of the model: v = ε - x_0        σ in [0, 1], timestep t = 1000 σ

x_0 are clean latents, ε is noise from N(0, 1).
"""

import math
from typing import Any

import numpy as np
import torch
from diffusers.pipelines.flux.pipeline_flux import calculate_shift
from diffusers.training_utils import compute_density_for_timestep_sampling


TIMESTEP_SAMPLING = ("sigma", "uniform", "sigmoid", "shift", "flux_shift")

WEIGHTING_SCHEMES = ("none", "sigma_sqrt", "logit_normal", "mode", "cosmap")


def step_generator(seed: int, step: int, micro_step: int = 0, process_index: int = 0) -> torch.Generator:
    """The generator that all random numbers of one micro-step come from; it depends on the arguments alone.

    A run that is resumed at a step therefore continues exactly, without a saved random state. The generator is on the
    CPU, so every device gets the same numbers.
    """
    entropy = np.random.SeedSequence([seed, step, micro_step, process_index])
    state = entropy.generate_state(1, np.uint64)[0]
    return torch.Generator().manual_seed(int(state >> 1))  # manual_seed takes 63 bits


def sample_sigmas(
    batch_size: int,
    *,
    noise_scheduler: Any,
    image_seq_len: int,
    generator: torch.Generator,
    timestep_sampling: str = "sigma",
    weighting_scheme: str = "none",
    logit_mean: float = 0.0,
    logit_std: float = 1.0,
    mode_scale: float = 1.29,
    sigmoid_scale: float = 1.0,
    discrete_flow_shift: float = 3.0,
) -> torch.Tensor:
    """Noise levels σ [batch_size] in (0, 1], float32.

    `timestep_sampling` is one of, with y = sigmoid(sigmoid_scale n) and n ~ N(0, 1):
        sigma       the scheduler's own 1000 levels, with the density of `weighting_scheme`: uniform for none,
                    sigma_sqrt and cosmap, else logit_normal or mode of arXiv 2403.03206, section 3.1
        uniform     U(0, 1)
        sigmoid     y
        shift       `shift_sigmas` of y by discrete_flow_shift
        flux_shift  `shift_sigmas` of y by exp(μ), which FluxPipeline uses for an image of `image_seq_len` tokens
    """
    if timestep_sampling == "sigma":
        u = compute_density_for_timestep_sampling(  # in [0, 1]
            weighting_scheme, batch_size, logit_mean, logit_std, mode_scale, generator=generator
        )
        num_levels = noise_scheduler.config.num_train_timesteps
        indices = (u * num_levels).long().clamp(0, num_levels - 1)  # u can be 1.0
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


def shift_sigmas(sigmas: torch.Tensor, shift: float) -> torch.Tensor:
    """Noise levels moved towards 1 by `shift` > 1, towards 0 by `shift` < 1 (arXiv 2403.03206, eq. 23)."""
    return shift * sigmas / (1 + (shift - 1) * sigmas)


def add_noise(latents: torch.Tensor, noise: torch.Tensor, sigmas: torch.Tensor) -> torch.Tensor:
    """x_σ = (1 - σ) x_0 + σ ε for latents x_0 [B, ...] and noise ε [B, ...], with one σ per sample, `sigmas` [B]."""
    sigmas = sigmas.view(-1, *[1] * (latents.ndim - 1)).to(latents)
    return (1 - sigmas) * latents + sigmas * noise


def weighted_mse(
    model_pred: torch.Tensor,
    target: torch.Tensor,
    weighting: torch.Tensor,
    weights: torch.Tensor | None = None,
) -> torch.Tensor:
    """Squared error [B] of predictions [B, ...], the mean over all but the batch, times `weighting` [B].

    `weights`, not negative, make it a weighted mean over the tokens of predictions [B, N, C] if they are [B, N], over
    their elements if they are [B, N, C].
    """
    error = (model_pred.float() - target.float()).square()
    if weights is None:
        return weighting * error.flatten(1).mean(dim=1)
    if weights.ndim == 2:
        error = error.mean(dim=2)
    total = weights.flatten(1).sum(dim=1).clamp(min=1e-6)  # with weight 0, no token may be left
    return weighting * (error * weights).flatten(1).sum(dim=1) / total
