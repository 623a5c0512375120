"""Optimizers that do not wait for the device: Prodigy with one read per step, steps left out if not finite."""

import math
from collections.abc import Callable
from typing import Any

import prodigyopt
import torch
from accelerate import Accelerator


class Prodigy(prodigyopt.Prodigy):
    """prodigyopt's Prodigy (arXiv 2306.06101), which reads two numbers of each tensor from the device in every step.

    This one does the same with the same state, bit for bit on a CPU, and reads the numbers of all tensors at once. The
    first step reads once more: which tensors are all zero. Not for sharded tensors.

    A tensor `found_inf` that is not 0 makes a step do nothing, as with torch's fused optimizers.
    """

    found_inf: torch.Tensor | None = None

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        first = self.param_groups[0]  # has what all groups share
        beta1, beta2 = first["betas"]
        beta3 = math.sqrt(beta2) if first["beta3"] is None else first["beta3"]
        d = first["d"]
        lr = max(group["lr"] for group in self.param_groups)
        bias_correction = 1.0
        if first["use_bias_correction"]:
            bias_correction = ((1 - beta2 ** (first["k"] + 1)) ** 0.5) / (1 - beta1 ** (first["k"] + 1))
        dlr = d * lr * bias_correction

        self._add_state(beta1)
        with_gradient = []  # [parameter] of each group
        for group in self.param_groups:
            if group["lr"] not in (lr, 0.0):
                raise RuntimeError("Prodigy estimates one step size: a group's lr is that of the others, or 0")
            parameters = [parameter for parameter in group["params"] if parameter.grad is not None]
            with_gradient.append(parameters)
            if group["weight_decay"] and not group["decouple"] and parameters:
                gradients = [parameter.grad for parameter in parameters]
                torch._foreach_add_(gradients, parameters, alpha=group["weight_decay"])

        # What the estimate of d needs of each tensor. Nothing is changed before it is known that all is finite.
        numerators = []
        denominators = []
        for group, parameters in zip(self.param_groups, with_gradient, strict=True):
            if group["lr"] > 0:
                for parameter in parameters:
                    gradient = part(parameter.grad, group)
                    distance = self.state[parameter]["p0"] - part(parameter, group)
                    s = self.state[parameter]["s"].mul(beta3).add_(gradient, alpha=self._s_weight(group, dlr))
                    numerators.append(torch.dot(gradient, distance))
                    denominators.append(s.abs().sum())
        if not numerators:
            return loss
        found_inf = [self.found_inf] if self.found_inf is not None else []
        numbers = torch.stack([*numerators, *denominators, *found_inf]).tolist()
        if found_inf and numbers.pop():
            return loss
        delta_numerator = 0.0
        for number in numbers[: len(numerators)]:
            delta_numerator += (d / first["d0"]) * dlr * number
        d_denom = 0.0
        for number in numbers[len(numerators) :]:
            d_denom += number

        for group, parameters in zip(self.param_groups, with_gradient, strict=True):
            if group["lr"] > 0 and parameters:
                gradients = [parameter.grad for parameter in parameters]
                if beta1 > 0:
                    averages = self._states(parameters, "exp_avg")
                    torch._foreach_mul_(averages, beta1)
                    torch._foreach_add_(averages, gradients, alpha=d * (1 - beta1))
                squares = self._states(parameters, "exp_avg_sq")
                torch._foreach_mul_(squares, beta2)
                torch._foreach_addcmul_(squares, gradients, gradients, value=d * d * (1 - beta2))
                sums = self._states(parameters, "s")
                torch._foreach_mul_(sums, beta3)
                parts = [part(gradient, group) for gradient in gradients]
                torch._foreach_add_(sums, parts, alpha=self._s_weight(group, dlr))
        if d_denom == 0:  # all gradients are 0
            return loss

        d_numerator = first["d_numerator"] * beta3 + delta_numerator
        d_hat = first["d_coef"] * d_numerator / d_denom
        if d == first["d0"]:
            d = max(d, d_hat)
        d_max = max(first["d_max"], d_hat)
        d = min(d_max, d * first["growth_rate"])
        for group, parameters in zip(self.param_groups, with_gradient, strict=True):
            group.update(d_numerator=d_numerator, d_denom=d_denom, d=d, d_max=d_max, d_hat=d_hat)
            group["k"] += 1
            if not parameters:
                continue
            for parameter in parameters:
                self.state[parameter]["step"] += 1
            denominators = torch._foreach_sqrt(self._states(parameters, "exp_avg_sq"))
            torch._foreach_add_(denominators, d * group["eps"])
            if group["weight_decay"] and group["decouple"]:
                torch._foreach_add_(parameters, parameters, alpha=-group["weight_decay"] * dlr)
            if beta1 > 0:
                torch._foreach_addcdiv_(parameters, self._states(parameters, "exp_avg"), denominators, value=-dlr)
            else:
                gradients = [parameter.grad for parameter in parameters]
                torch._foreach_addcdiv_(parameters, gradients, denominators, value=-dlr * d)
        return loss

    def _add_state(self, beta1: float) -> None:
        """The state of parameters that get their first gradient; p0 is a single 0 for those that are all 0."""
        new = []
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None and not self.state[parameter]:
                    new.append((group, parameter))
        if not new:
            return
        has_values = torch.stack([parameter.any() for _, parameter in new]).tolist()
        for (group, parameter), has_value in zip(new, has_values, strict=True):
            state = self.state[parameter]
            state["step"] = 0
            state["s"] = torch.zeros_like(part(parameter, group))
            if has_value:
                state["p0"] = part(parameter, group).clone()
            else:
                state["p0"] = torch.zeros((), device=parameter.device, dtype=parameter.dtype)
            if beta1 > 0:
                state["exp_avg"] = torch.zeros_like(parameter)
            state["exp_avg_sq"] = torch.zeros_like(parameter)

    def _states(self, parameters: list[torch.nn.Parameter], name: str) -> list[torch.Tensor]:
        return [self.state[parameter][name] for parameter in parameters]

    def _s_weight(self, group: dict[str, Any], dlr: float) -> float:
        # d / d0 instead of d keeps the numbers from becoming too small
        return (group["d"] / group["d0"]) * (group["d"] if group["safeguard_warmup"] else dlr)


def part(values: torch.Tensor, group: dict[str, Any]) -> torch.Tensor:
    """Every `slice_p`-th of the values, flat: those that Prodigy's estimate is made of."""
    return values.flatten()[:: group["slice_p"]]


def fused_adamw(device: torch.device, *, has_scaler: bool = False) -> bool | None:
    """The argument `fused` of torch's AdamW: one kernel updates all weights.

    None, torch's default, on a CPU, where it would round differently, and with a gradient scaler (fp16), of which
    accelerate could not tell that it skipped a step.
    """
    return True if device.type == "cuda" and not has_scaler else None


def step_if_finite(accelerator: Accelerator, optimizer: Any, is_finite: torch.Tensor) -> None:
    """A step of a prepared optimizer; none if `is_finite`, a bool on the device, is false.

    AdamW (fused) and Prodigy see that on the device, which the program does not wait for; with others it does. A
    gradient scaler skips such steps itself.
    """
    inner = getattr(optimizer, "optimizer", optimizer)  # accelerate's wrapper has it
    if accelerator.scaler is not None:
        optimizer.step()
    elif isinstance(inner, Prodigy) or inner.param_groups[0].get("fused"):
        inner.found_inf = (~is_finite).float()
        optimizer.step()
        inner.found_inf = None
    elif is_finite:
        optimizer.step()
