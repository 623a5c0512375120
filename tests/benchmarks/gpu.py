"""What training FLUX.1 and drawing with it take on this machine's GPU, beside what is aimed at.

    python tests/benchmarks/gpu.py                                    # under ten minutes on an H100
    python tests/benchmarks/gpu.py --results card.json --topic step   # one topic's rows

Weights are random, of FLUX.1-dev's and FLUX.1-Fill-dev's real shapes, rank is 16, batch 1 (TwinFlow 4), precision
bf16, the optimizer AdamW; the trainers and generators run as they are. Rows come in the order of their importance.
Each is written to --results as soon as it is measured (what the trainers print, to the same name with .log); those of
the same card, versions and commit are not measured again. A row that fails is a line with the reason; others go on.

Without a GPU the same rows run with tiny models on the CPU: that the benchmark works, not how fast anything is.
"""

import argparse
import json
import os
import select
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path


WORKER = Path(__file__).with_name("on_gpu") / "rows.py"
DREAMBOOTH = "train_dreambooth_flux_advanced"
TRAINERS = {"dreambooth": DREAMBOOTH, "omini": "train_omini", "influxedit": "train_influxedit"}
TRAINERS["twinflow"] = "train_twinflow"


# ---------------------------------------------------------------------------------------------------------------------
# Rows
# ---------------------------------------------------------------------------------------------------------------------

WAYS = {
    "plain": "",
    "compile": "--compile",
    "compile, cuDNN's attention": "--compile --attention_backend {cudnn}",
    "compile, flash attention": "--compile --attention_backend {flash}",
    "checkpointing": "--gradient_checkpointing",
    "nf4": "--gradient_checkpointing --quantize_base nf4",
    "int8": "--gradient_checkpointing --quantize_base int8",
    "fp8": "--quantize_base fp8",
    "fp8, compile": "--quantize_base fp8 --compile",
    "20 blocks swapped": "--gradient_checkpointing --blocks_to_swap {blocks}",
}


def step(trainer, px, way):
    return "step", f"{trainer}, {px} px, {way}", {"trainer": TRAINERS[trainer], "px": px, "flags": WAYS[way]}


def small_card(trainer, gigabytes, preset="low_memory", more=""):
    """A run with examples/TRAINER/PRESET.args and more flags, whose photos' captions have the word TOK."""
    flags = f"@{{root}}/examples/{trainer}/{preset}.args {more}"
    options = {"trainer": TRAINERS[trainer], "gigabytes": gigabytes, "flags": flags}
    return "small_card", f"{gigabytes} GB, {trainer}, {preset}.args {more}".strip(), options


def prompts(name, flags):
    return "prompts", name, {"flags": flags}


ROWS = [  # (topic, name, options), the most important first
    step("dreambooth", 512, "compile"),
    step("dreambooth", 512, "nf4"),
    step("dreambooth", 512, "plain"),
    small_card("dreambooth", 12),
    step("omini", 512, "plain"),
    step("influxedit", 512, "plain"),
    step("twinflow", 512, "plain"),
    step("dreambooth", 512, "fp8, compile"),
    step("dreambooth", 512, "20 blocks swapped"),
    step("dreambooth", 1024, "compile"),
    step("dreambooth", 1024, "int8"),
    step("dreambooth", 512, "checkpointing"),
    step("dreambooth", 512, "int8"),
    step("dreambooth", 512, "fp8"),
    ("waiting", "512 px, photos of 2048 px", {"px": 512}),
    prompts("T5 on the card", ""),
    prompts("T5 offloaded", "--offload"),
    prompts("T5 in nf4", "--quantize_text_encoders nf4"),
    prompts("T5 in int8", "--quantize_text_encoders int8"),
    ("kv_cache", "512 px", {"px": 512}),
    small_card("omini", 12),
    small_card("influxedit", 12),
    small_card("twinflow", 16),
    small_card("dreambooth", 12, "low_memory", "--quantize_base none --blocks_to_swap auto"),
    small_card("dreambooth", 16, "low_memory", "--quantize_base int8"),
    small_card("dreambooth", 24, "low_memory", "--quantize_base int8 --resolution 1024"),
    small_card("dreambooth", 32, "best_quality", "--quantize_base nf4"),
    step("omini", 512, "nf4"),
    step("influxedit", 512, "nf4"),
    step("twinflow", 512, "nf4"),
    step("dreambooth", 1024, "plain"),
    step("dreambooth", 1024, "checkpointing"),
    step("dreambooth", 1024, "nf4"),
    step("dreambooth", 1024, "fp8, compile"),
    step("dreambooth", 1024, "20 blocks swapped"),
    step("dreambooth", 1024, "compile, cuDNN's attention"),
    step("dreambooth", 1024, "compile, flash attention"),
    step("omini", 512, "compile"),
    step("influxedit", 512, "compile"),
    step("twinflow", 512, "compile"),
]


def estimates():
    """The rows that need no GPU: what is estimated of the DreamBooth trainer's steps, and their operations."""
    rows = [("operations", f"{px} px", {"px": px}) for px in (512, 1024)]
    for topic, name, options in ROWS:
        if topic == "step" and options["trainer"] == DREAMBOOTH and "compile" not in name:
            rows.append(("memory", name, {"px": options["px"], "flags": options["flags"]}))
    return rows


# ---------------------------------------------------------------------------------------------------------------------
# Measuring
# ---------------------------------------------------------------------------------------------------------------------


class Worker:
    """A process that measures rows one after the other, and a new one after each that failed."""

    def __init__(self, log, env):
        self.log = log
        self.env = env
        self.process = None
        self.ended = False

    def ask(self, topic, options, limit):
        """The reply to a request, {"values" or "error": ...}, in `limit` seconds at most."""
        if self.process is None:
            command = [sys.executable, WORKER, self.log]
            pipe = subprocess.PIPE
            self.process = subprocess.Popen(command, env=self.env, stdin=pipe, stdout=pipe, text=True)
        try:
            self.process.stdin.write(json.dumps({"topic": topic, "options": options}) + "\n")
            self.process.stdin.flush()
            ready, _, _ = select.select([self.process.stdout], [], [], limit)
            line = self.process.stdout.readline() if ready else None
        except BrokenPipeError:
            line = ""
        if line:
            reply = json.loads(line)
        elif line is None:
            reply = {"error": f"not done in {limit:.0f} s"}
        else:
            reply = {"error": f"the process ended with code {self.process.wait()}, see {self.log}"}
        if "error" in reply or reply.get("left over", 0) > 2**28:
            self.close()
        return reply

    def close(self):
        if self.process:
            self.process.kill()
            self.process.communicate()
            self.process = None

    def end(self):
        """Answers nothing any more."""
        self.ended = True
        if self.process:
            self.process.kill()


class Results:
    """The rows of a file, of all cards and versions; `find` and `add` are of this environment."""

    def __init__(self, path, environment):
        self.path = path
        self.environment = environment
        self.rows = json.loads(path.read_text()) if path.exists() else []
        self.lock = threading.Lock()

    def find(self, topic, name):
        """The row, or None."""
        for row in self.rows:
            if (row["topic"], row["name"], row["environment"]) == (topic, name, self.environment):
                return row
        return None

    def add(self, topic, name, reply, seconds):
        row = {"topic": topic, "name": name, "environment": self.environment, "took": round(seconds, 1)}
        row |= {key: reply[key] for key in ("values", "error") if key in reply}
        with self.lock:
            earlier = self.find(topic, name)
            if earlier:
                self.rows.remove(earlier)
            self.rows.append(row)
            partial = self.path.with_name(f"{self.path.name}.partial")
            partial.write_text(json.dumps(self.rows, indent=1))
            partial.replace(self.path)

    def values(self, topic, name):
        """The numbers of a row, {} if there are none."""
        row = self.find(topic, name)
        return row.get("values", {}) if row else {}


def measure(rows, results, worker, args, until):
    """Measures the rows that have no values yet, until it is time to end."""
    for topic, name, options in rows:
        if results.values(topic, name):
            continue
        left = until - time.monotonic()
        if left <= 0:
            return
        started = time.perf_counter()
        reply = worker.ask(topic, options, min(left, args.row_limit))
        if worker.ended or ("error" in reply and time.monotonic() > until):
            return  # the time of all is over, not this row's
        results.add(topic, name, reply, time.perf_counter() - started)
        print(f"{topic}: {name}: {brief(reply)}", flush=True)


def brief(reply):
    """A reply in a line."""
    if "error" in reply:
        return f"FAILED: {reply['error']}"
    return ", ".join(f"{name} {shown(value)}" for name, value in reply["values"].items() if value is not None)


# ---------------------------------------------------------------------------------------------------------------------
# Tables
# ---------------------------------------------------------------------------------------------------------------------

# Dense bf16 operations per second by the makers' data sheets; the first name that occurs in the device's counts.
CHIPS = {"B200": 2250e12, "H200": 989e12, "H100 PCIe": 756e12, "H100": 989e12, "A100": 312e12, "L40S": 362e12}
CHIPS |= {"RTX 5090": 210e12, "RTX 4090": 165e12, "RTX 3090": 71e12}
PUBLIC = {  # what users have published of such a run
    "dreambooth, 512 px, compile": "2 it/s on an H100",
    "dreambooth, 512 px, nf4": "about 9 GB; 0.28 it/s on an RTX 4090",
    "dreambooth, 512 px, plain": "26-30 GB",
    "dreambooth, 1024 px, int8": "more than 18 GB",
}


def shown(value):
    if value is None:
        return ""
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def share_of_peak(results, name):
    """Of the card's bf16 peak, what the operations of a step are that computes nothing twice; None if unknown."""
    card = results.environment["card"]
    per_second = next((peak for chip, peak in CHIPS.items() if chip in card), None)
    operations = results.values("operations", name.split(", ")[1]).get("operations")
    seconds = results.values("step", name).get("seconds")
    if not (per_second and operations and seconds and name.startswith("dreambooth")):
        return None
    return operations / seconds / per_second


def step_table(results, name, values):
    estimated = results.values("memory", name)
    cells = {"s": values["seconds"], "it/s": values["it/s"], "images/s": values["images/s"]}
    share = share_of_peak(results, name)
    cells["of bf16 peak"] = f"{share:.0%}" if share else None
    cells["syncs"] = values.get("syncs")
    cells["GiB"] = values.get("GiB")
    cells["estimated"] = estimated.get("in a step")
    cells["GiB of the card"] = values.get("card")
    cells["estimated of it"] = estimated.get("card for a step")
    return cells | {"as public figures": PUBLIC.get(name)}


def bars(results):
    """(what is aimed at, what was measured, whether it is met) of all that was measured."""
    steps = {name: results.values("step", name) for topic, name, _ in ROWS if topic == "step"}
    compiled = steps["dreambooth, 512 px, compile"].get("it/s")
    if compiled:
        yield "LoRA at 512 px, compiled: 2 it/s or more", compiled, compiled >= 2
    fp8 = steps["dreambooth, 512 px, fp8, compile"].get("it/s")
    if compiled and fp8:
        yield "fp8: 1.3 times bf16 or more, both compiled", fp8 / compiled, fp8 / compiled >= 1.3
    share = share_of_peak(results, "dreambooth, 1024 px, compile")
    if share:
        yield "share of bf16 peak at 1024 px: 0.5 or more", share, share >= 0.5
    ratio = results.values("waiting", "512 px, photos of 2048 px").get("ratio")
    if ratio:
        yield "a step with 2 workers to one with data ready: 1.02 or less", ratio, ratio <= 1.02
    for name, values in steps.items():
        if values.get("syncs", 0) > 1:
            yield f"syncs per step, {name}: 1 or fewer", values["syncs"], False
        estimated = results.values("memory", name)
        if estimated and values.get("GiB"):
            ratio = values["GiB"] / estimated["in a step"]
            yield f"memory to its estimate, {name}: 0.92 to 1.08", ratio, 0.92 <= ratio <= 1.08
            ratio = values["card"] / estimated["card for a step"]
            yield f"memory of the card to its estimate, {name}: 1 or less", ratio, ratio <= 1


def print_tables(results):
    print("\n" + ", ".join(f"{name} {value}" for name, value in results.environment.items()))
    for topic in dict.fromkeys(topic for topic, _, _ in ROWS):
        names = [name for each, name, _ in ROWS if each == topic]
        found = {name: row for name in names if (row := results.find(topic, name))}
        cells = {}
        for name, row in found.items():
            values = row.get("values")
            if values:
                cells[name] = step_table(results, name, values) if topic == "step" else values
        if found:
            print_table(topic, cells, {name: row["error"] for name, row in found.items() if "error" in row})
    rows = {name: {"measured": value, "met": "yes" if met else "NO"} for name, value, met in bars(results)}
    if rows:
        print_table("aimed at", rows, {})


def print_table(title, rows, errors):
    """A Markdown table of rows {name: {column: value}}, and under it a line for each error."""
    columns = list(dict.fromkeys(column for row in rows.values() for column in row))
    columns = [column for column in columns if any(row.get(column) is not None for row in rows.values())]
    if rows:
        print(f"\n| {' | '.join([title, *columns])} |\n{'| --- ' * (1 + len(columns))}|")
    for name, row in rows.items():
        print(f"| {' | '.join([name, *(shown(row.get(column)) for column in columns)])} |")
    for name, error in errors.items():
        print(f"\n{title}, {name}: {error}")


# ---------------------------------------------------------------------------------------------------------------------
# Command line
# ---------------------------------------------------------------------------------------------------------------------


def parse_args(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=Path("gpu_results.json"), help="file of all rows")
    parser.add_argument("--topic", choices=sorted({topic for topic, _, _ in ROWS}), help="measure its rows alone")
    parser.add_argument("--time_limit", type=float, default=600.0, help="seconds; then the tables of what there is")
    parser.add_argument("--row_limit", type=float, default=120.0, help="seconds of a row at most")
    return parser.parse_args(argv)


def main(argv=None):
    args = parse_args(argv)
    log = args.results.with_suffix(".log")
    until = time.monotonic() + args.time_limit
    worker = Worker(log, os.environ)
    environment = worker.ask("environment", {}, 300.0)
    if "error" in environment:
        sys.exit(f"gpu.py: error: {environment['error']}")
    results = Results(args.results, environment["values"])
    rows = [row for row in ROWS if args.topic in (None, row[0])]
    estimator = worker
    try:
        if environment["values"]["card"].startswith("no GPU"):
            measure(rows + estimates(), results, worker, args, until)
        else:  # estimates need a processor alone: they are made meanwhile
            estimator = Worker(log, os.environ | {"CUDA_VISIBLE_DEVICES": "", "REAL_SIZE": "1"})
            beside = threading.Thread(target=measure, args=(estimates(), results, estimator, args, until), daemon=True)
            beside.start()
            measure(rows, results, worker, args, until)
            beside.join(max(0.0, until - time.monotonic()))
    finally:
        worker.end()
        estimator.end()
        print_tables(results)


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("gpu.py: ended by a signal"))  # with the tables
    main()
