"""metrics.jsonl, a JSON object per step: reading it, and the mean that its plots show. Imports no torch."""

import json
import math
import re
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any


# What is computed on held-out examples, its name in metrics and its title in plots
HELD_OUT = {"validation_loss": "held-out loss", "distance_from_base": "distance from the base model"}


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The rows of a run's metrics; [] without a file. Lines that a crash of the machine left torn are skipped."""
    if not path.is_file():
        return []
    rows = []
    for line in path.read_text(errors="replace").split("\n"):
        with suppress(ValueError, TypeError, KeyError, RecursionError):
            row = json.loads(line)
            if all(type(row[name]) in (int, float) for name in ("step", "loss", "lr")):
                rows.append(row)
    return rows


def mean_window(num_steps: int) -> int:
    """The number of steps that `running_mean` averages in a plot of a run."""
    return max(1, min(50, num_steps // 10))


def running_mean(values: Iterable[float], window: int) -> list[float]:
    """An exponential mean of about `window` values up to each value; values that are not finite are skipped.

    As in Adam, dividing by the sum of the weights keeps the first means from starting near 0.
    """
    decay = 1 - 1 / window
    mean = 0.0
    weight = 0.0
    means = []
    for value in values:
        if math.isfinite(value):
            mean = decay * mean + (1 - decay) * value
            weight = decay * weight + (1 - decay)
        means.append(mean / weight if weight else math.nan)
    return means


def kind_of(key: str) -> str | None:
    """Which of HELD_OUT an entry of a row is, as a mean or at a noise level; None if it is something else."""
    return next((kind for kind in HELD_OUT if re.fullmatch(rf"{kind}(_[\d.]+)?", key)), None)


def is_held_out(key: str) -> bool:
    """Whether an entry of a row is computed on held-out examples."""
    return kind_of(key) is not None


def held_out_lines(rows: Iterable[dict[str, Any]]) -> dict[str, dict[str, dict[int, float]]]:
    """What the rows have of held-out examples: {a title of HELD_OUT: {"mean": {step: value}, "σ 0.1": ..., ...}}."""
    found: dict[str, dict[str, dict[int, float]]] = {}
    for row in rows:
        for key, value in row.items():
            kind = kind_of(key)
            if kind and type(value) in (int, float) and math.isfinite(value):
                line = "mean" if key == kind else f"σ {key.removeprefix(f'{kind}_')}"
                found.setdefault(HELD_OUT[kind], {}).setdefault(line, {})[int(row["step"])] = value
    return found


def held_out_losses(rows: Iterable[dict[str, Any]]) -> dict[int, float]:
    """{step: mean held-out loss} of the rows that have a finite one."""
    losses = {}
    for row in rows:
        loss = row.get("validation_loss")
        if isinstance(loss, (int, float)) and math.isfinite(loss):
            losses[int(row["step"])] = loss
    return losses


def held_out_summary(losses: dict[int, float], first_step: int = 1) -> str:
    """What the held-out losses {step: loss} of a run tell: whether it overfits, and since when; "" of none.

    Those before `first_step` are not known, where a run was resumed in another folder.
    """
    losses = {step: loss for step, loss in losses.items() if math.isfinite(loss)}
    if not losses:
        return ""
    best = min(losses, key=lambda step: (losses[step], step))
    last = max(losses)
    subject = "The held-out loss" if first_step == 1 else f"From step {first_step} on, the held-out loss"
    lowest = f"{subject} was lowest at step {best}, {losses[best]:.4g}"
    if best == last:
        return f"{lowest}, the last at which it was computed: no overfitting so far."
    # a mask that shows nothing of an image makes its loss 0
    increase = losses[last] / losses[best] - 1 if losses[best] else 0.0
    at_last = f"at step {last} it was {losses[last]:.4g}, {increase:.1%} higher"
    if increase < 0.01:
        return f"{lowest}; {at_last}: hardly any overfitting."
    return f"{lowest}; {at_last}: the run overfits since step {best}."
