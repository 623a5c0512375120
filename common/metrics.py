"""metrics.jsonl, a JSON object per step: reading it, and the mean that its plots show. Imports no torch."""

import json
import math
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any


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
