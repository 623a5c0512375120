"""How much longer a step of pivotal tuning with CLIP takes than a step of plain DreamBooth.

    python tests/benchmarks/pivotal_step.py

Both train the model of step_overhead.py with a CLIP of 12 layers, in short runs that take turns. The last line is the
quotient of the medians; above 1.15 the exit code is 1.
"""

import statistics
import sys
import tempfile
import time
from pathlib import Path

from step_overhead import dreambooth, save_model, train


RUNS, STEPS, WARM_UP = 3, 10, 2
PIVOTAL = ("--train_text_encoder_ti", "--train_text_encoder_ti_frac", 1, "--token_abstraction", "picture")


def main():
    compute_loss, started = dreambooth.compute_loss, []

    def timed(*args, **kwargs):
        started.append(time.perf_counter())
        return compute_loss(*args, **kwargs)

    dreambooth.compute_loss = timed
    seconds = {(): [], PIVOTAL: []}
    with tempfile.TemporaryDirectory() as folder:
        save_model(Path(folder) / "model", text_layers=12)
        for _ in range(RUNS):
            for flags in seconds:
                started.clear()
                train(Path(folder), "--max_train_steps", STEPS, *flags)
                seconds[flags] += [b - a for a, b in zip(started, started[1:], strict=False)][WARM_UP:]
    plain, pivotal = map(statistics.median, seconds.values())
    print(f"pivotal step {pivotal:.3f} s, plain step {plain:.3f} s")
    print(f"{pivotal / plain:.3f}")
    return int(pivotal / plain > 1.15)


if __name__ == "__main__":
    sys.exit(main())
