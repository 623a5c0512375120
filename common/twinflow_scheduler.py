"""TwinFlow's sampler as a scheduler of diffusers' own pipelines; train_twinflow.py copies this file into its results.

    scheduler = AutoModel.from_pretrained("flux-twinflow-lora", subfolder="scheduler", trust_remote_code=True)
    pipeline = FluxPipeline.from_pretrained("black-forest-labs/FLUX.1-dev", scheduler=scheduler)
    pipeline.load_lora_weights("flux-twinflow-lora")
    pipeline("a dog on the beach", num_inference_steps=2)

It must work there by itself: it imports nothing of this repository.
"""

from typing import Any

import numpy as np
import torch
from diffusers import ConfigMixin, SchedulerMixin
from diffusers.configuration_utils import register_to_config
from diffusers.schedulers.scheduling_utils import SchedulerOutput
from diffusers.utils.torch_utils import randn_tensor


STYLES = {  # the time that each prediction is made for, and the settings that go with it
    "few": {"stochast_ratio": 1.0, "gaps": (0.001, 0.7), "time_dist_ctrl": (1.0, 1.0, 1.0)},  # 0, the end
    "any": {"stochast_ratio": 0.0, "gaps": (0.001, 0.5), "time_dist_ctrl": (1.0, 1.0, 1.0)},  # the next time
    "mul": {"stochast_ratio": 0.0, "gaps": (0.001, 0.0), "time_dist_ctrl": (1.17, 0.8, 1.1)},  # t itself
}


def time_grid(steps: int, gaps: tuple[float, float], time_dist_ctrl: tuple[float, float, float]) -> torch.Tensor:
    """Times [steps + 1], float64, from noise to 0: 1 - (1 - (1 - u^a)^b)^c for even u between the gaps at both ends, a
    power of Kumaraswamy's distribution function, then 0."""
    a, b, c = time_dist_ctrl
    if gaps[1] == 0:
        # the last of steps + 1 even nodes is the time 0 appended below
        u = torch.linspace(gaps[0], 1, steps + 1, dtype=torch.float64)[:-1]
    else:
        u = torch.linspace(gaps[0], 1 - gaps[1], steps, dtype=torch.float64)
    times = 1 - (1 - (1 - u**a) ** b) ** c
    return torch.cat([times, torch.zeros(1, dtype=torch.float64)])


class TwinFlowScheduler(SchedulerMixin, ConfigMixin):
    """UCGM's sampler (arXiv 2505.07447) without guidance and extrapolation: few, any or mul steps.

    Args:
        style: few jumps to the end in each step and renews the noise (1 or 2 steps), any jumps to the next time (4 or
            8), mul follows the path (30).
        two_times: Whether the model has a second time embedding. An adapter has none (False): `timesteps`, the one
            time that pipelines tell the model, is then t - t' / 2, else t.
        stochast_ratio: Share of the noise that is renewed in each step (default: by the style).
        gaps: Parts of the times left out at the noise and at the data end (default: by the style).
        time_dist_ctrl: Bends the times (default: by the style).
    """

    config_name = "config.json"  # where AutoModel looks for the class, by "auto_map"
    _auto_class = "AutoModel"
    order = 1
    init_noise_sigma = 1.0  # of the latents that a pipeline begins with

    @register_to_config
    def __init__(
        self,
        style: str = "few",
        two_times: bool = False,
        stochast_ratio: float | None = None,
        gaps: tuple[float, float] | None = None,
        time_dist_ctrl: tuple[float, float, float] | None = None,
        num_train_timesteps: int = 1000,
    ):
        if style not in STYLES:
            raise ValueError(f"style {style!r} is none of {', '.join(STYLES)}")
        self.step_index = 0

    def set_timesteps(
        self,
        num_inference_steps: int | None = None,
        device: str | torch.device | None = None,
        sigmas: list[float] | np.ndarray | None = None,
        mu: float | None = None,
    ) -> None:
        """Sets `timesteps` [N], which models are told, and `sigmas` [N + 1], the times t, whose last is 0.

        Some pipelines always give evenly spaced `sigmas`: only their number counts. Others are the times as they are.
        `mu`, a shift of the times by the size of the image, is not used: training does not shift them either.
        """
        if sigmas is not None:
            num_inference_steps = len(sigmas)
        if num_inference_steps is None:
            raise ValueError("set_timesteps needs num_inference_steps or sigmas")
        config: Any = self.config
        preset = STYLES[config.style]
        gaps = config.gaps or preset["gaps"]
        times = time_grid(num_inference_steps, gaps, config.time_dist_ctrl or preset["time_dist_ctrl"])
        if sigmas is not None and not np.allclose(sigmas, np.linspace(1, 1 / len(sigmas), len(sigmas))):
            times = torch.tensor([*sigmas, 0.0], dtype=torch.float64)
        t = times[:-1]
        target_time = {"few": torch.zeros_like(t), "any": times[1:], "mul": t}[config.style]
        told = t if config.two_times else t - target_time / 2
        self.num_inference_steps = len(t)
        self.sigmas = times
        self.timesteps = (config.num_train_timesteps * told).to(device, torch.float32)
        self.step_index = 0

    def set_begin_index(self, begin_index: int = 0) -> None:
        """The step that is next; pipelines set 0."""
        self.step_index = begin_index

    def scale_model_input(self, sample: torch.Tensor, timestep: torch.Tensor | None = None) -> torch.Tensor:
        """What the model is given: the sample as it is."""
        return sample

    def step(
        self,
        model_output: torch.Tensor,
        timestep: torch.Tensor,
        sample: torch.Tensor,
        generator: torch.Generator | list[torch.Generator] | None = None,
        return_dict: bool = True,
    ) -> SchedulerOutput | tuple[torch.Tensor]:
        """The sample at the next time, of the velocity that a model predicts for `sample`, both [B, ...].

        Pipelines take the steps in their order. `generator` draws the new noise; without one, as in most pipelines,
        torch's own does, which torch.manual_seed sets.
        """
        t, t_next = self.sigmas[self.step_index : self.step_index + 2].tolist()
        self.step_index += 1
        is_mps = model_output.device.type == "mps"  # which has no float64
        velocity = model_output.to(torch.float32 if is_mps else torch.float64)
        x_hat = sample - t * velocity
        z_hat = sample + (1 - t) * velocity
        config: Any = self.config
        s = config.stochast_ratio
        if s is None:
            s = STYLES[config.style]["stochast_ratio"]
        if s and t_next:
            new_noise = randn_tensor(sample.shape, generator=generator, device=sample.device, dtype=torch.float32)
            z_hat = (1 - s) ** 0.5 * z_hat + s**0.5 * new_noise
        prev_sample = ((1 - t_next) * x_hat + t_next * z_hat).to(sample.dtype)
        return SchedulerOutput(prev_sample=prev_sample) if return_dict else (prev_sample,)
