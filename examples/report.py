"""Writes OUTPUT_DIR/report.html about a trainer's run, or comparison.html of several runs beside each other.

python examples/report.py OUTPUT_DIR
python examples/report.py OUTPUT_DIR ANOTHER ... --output comparison.html

One run: images, curves, settings and files. Several: their images at the same step, their losses in one chart, the
settings that differ. The page needs no network and no other file. While a run goes on, the command can be given again
at any time.
"""

import base64
import hashlib
import html
import io
import json
import math
import os
import re
import string
import sys
from collections import defaultdict
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from urllib.parse import quote

import numpy as np
from PIL import Image


sys.path.insert(0, str(Path(__file__).parents[1]))

from common.arguments import Parser, check_file, join_problems
from common.metrics import (
    HELD_OUT,
    held_out_lines,
    held_out_losses,
    held_out_summary,
    is_held_out,
    mean_window,
    read_metrics,
    running_mean,
)


# of the curves of a value, of all runs together; in longer runs a point is the mean of several steps
MAX_POINTS = 3000
MAX_IMAGE_BYTES = 400_000  # a larger image becomes WebP of at most 2048 pixels
PAGES = ("report.html", "comparison.html")  # of one run, of several
NUM_COLORS = 8  # --run-0 to --run-7 in report.html; the lines of further runs are dashed
CHART_TITLES = {
    "loss": "loss",
    "lr": "learning rate",
    "prodigy_d": "Prodigy's d",
    "grad_norm": "gradient norm",
    "images_per_second": "images per second",
    "peak_memory_gb": "peak memory, GiB",
}


@dataclass
class Run:
    """What a trainer's output folder tells of a run: a row of metrics per step, and args.json."""

    folder: Path
    rows: list
    record: dict

    @property
    def args(self):
        return part_of(self.record, "args")

    @property
    def versions(self):
        return part_of(self.record, "versions")

    @property
    def last_step(self):
        return self.rows[-1]["step"]

    @property
    def prompt(self):
        return str(self.args.get("validation_prompt") or self.args.get("validation_prompts") or "")

    @cached_property
    def checkpoints(self):
        """The steps of the checkpoints that are there."""
        steps = [path.name.removeprefix("checkpoint-") for path in self.folder.glob("checkpoint-*")]
        return sorted(int(step) for step in steps if step.isdecimal() and int(step) <= self.last_step)

    @property
    def held_out_hash(self):
        """A hash of the held-out examples, from the last checkpoint; None if there is none."""
        if not self.checkpoints:
            return None
        state = read_json(self.folder / f"checkpoint-{self.checkpoints[-1]}" / "trainer_state.json")
        return state.get("the hash of the held-out data")


class Template(string.Template):
    """A template whose placeholders start with @@: JavaScript has its own use for $."""

    delimiter = "@@"


def read_json(path):
    """The object in a file; {} if there is none."""
    try:
        value = json.loads(path.read_text(errors="replace"))
    except (OSError, ValueError, RecursionError):
        value = {}
    return value if isinstance(value, dict) else {}


def part_of(record, name):
    """The object of this name in another; {} if there is none, or something else in its place."""
    part = record.get(name)
    return part if isinstance(part, dict) else {}


def is_before(step, last_step):
    return type(step) is int and step < last_step


def read_run(folder):
    """The run whose output folder this is."""
    if not folder.is_dir():
        raise ValueError(f"{folder}: no such folder")
    by_step = {}
    for row in read_metrics(folder / "metrics.jsonl"):
        by_step[row["step"]] = {name: value for name, value in row.items() if type(value) in (int, float)}
    if not by_step:
        raise ValueError(f"{folder}: no metrics.jsonl with steps in it, so it is not the output folder of a run")
    return Run(folder, [by_step[step] for step in sorted(by_step)], read_json(folder / "args.json"))


def charts_of(rows, max_points=MAX_POINTS, window=None):
    """What the page plots: {"steps": [...], "last", "charts": [{"name", "lines": {name: [value or None]}, "log"}]}.

    A chart of what is computed on held-out data has "steps" of its own. A mean is that of `window` steps, by default
    of as many as loss.png takes.
    """
    steps_per_point = math.ceil(len(rows) / max_points)
    window = window or mean_window(len(rows))
    names = dict.fromkeys(CHART_TITLES)  # in this order, before whatever else was logged
    for row in rows:
        names |= dict.fromkeys(row)
    charts = []
    for name in names:
        values = np.array([row.get(name, math.nan) for row in rows], float)
        if name == "step" or is_held_out(name) or not np.isfinite(values).any():
            continue
        points = averaged(values, steps_per_point)
        if name in ("lr", "prodigy_d", "peak_memory_gb"):
            lines = {"": points}
        else:
            each = f"each {steps_per_point} steps" if steps_per_point > 1 else "each step"
            mean = averaged(np.array(running_mean(values, window)), steps_per_point)
            lines = {each: points, f"mean of {window}": mean}
        log = name in ("lr", "prodigy_d") and spans_decades(values.min(), values.max())
        charts.append({"name": CHART_TITLES.get(name, name), "lines": lines, "log": log})
    charts[1:1] = held_out_charts(rows)
    steps = [int(row["step"]) for row in rows[::steps_per_point]]
    return {"steps": steps, "last": int(rows[-1]["step"]), "charts": charts}


def spans_decades(low, high):
    """Whether values from `low` to `high` are read from a logarithmic axis only."""
    return bool(0 < 100 * low < high)


def compared_charts(runs):
    """The charts of several runs {name: run}: as `charts_of`, but with a line per run, with "line_steps" of its own.

    "wide" are those of the losses. A line is the mean of as many steps in all runs.
    """
    window = mean_window(max(len(run.rows) for run in runs.values()))
    charts = {}
    for name, run in runs.items():
        own = charts_of(run.rows, MAX_POINTS // len(runs) + 1, window)
        for chart in own["charts"]:
            lines = chart["lines"]
            if "steps" not in chart:
                lines = {"mean": list(lines.values())[-1]}
            for line, values in lines.items():
                title = chart["name"] if line == "mean" else f"{chart['name']}, {line}"
                compared = charts.setdefault(title, {"name": title, "lines": {}, "line_steps": {}})
                compared["held_out"] = "steps" in chart
                compared["lines"][name] = values
                compared["line_steps"][name] = chart.get("steps", own["steps"])
    for title, chart in charts.items():
        values = [value for line in chart["lines"].values() for value in line if value is not None]
        on_log_axis = (CHART_TITLES["lr"], CHART_TITLES["prodigy_d"])
        chart["log"] = title in on_log_axis and spans_decades(min(values), max(values))
        chart["wide"] = title in (CHART_TITLES["loss"], HELD_OUT["validation_loss"])
    steps = {step for chart in charts.values() for line in chart["line_steps"].values() for step in line}
    last = max(int(run.last_step) for run in runs.values())
    ordered = sorted(charts.values(), key=lambda chart: (chart["name"] != CHART_TITLES["loss"], not chart["held_out"]))
    return {"steps": sorted(steps), "last": last, "window": window, "charts": ordered}


def held_out_charts(rows):
    """A chart of each kind of values that are computed on held-out data, with the steps that have them."""
    charts = []
    for title, values in held_out_lines(rows).items():
        steps = sorted({step for line in values.values() for step in line})
        lines = {name: [line.get(step) for step in steps] for name, line in values.items()}
        charts.append({"name": title, "lines": lines, "log": False, "steps": steps})
    return charts


def averaged(values, count):
    """The mean of the finite ones of each `count` values, with five digits; None where there is none."""
    points = []
    for i in range(0, len(values), count):
        part = values[i : i + count]
        finite = part[np.isfinite(part)]
        points.append(float(f"{np.mean(finite):.5g}") if len(finite) else None)
    return points


def image_url(path, num_runs=1):
    """An image as a data: address; None if it cannot be read. Beside those of other runs it is smaller."""
    try:
        data = path.read_bytes()
        form = "png"
        with Image.open(io.BytesIO(data)) as image:
            image.load()
            if len(data) > MAX_IMAGE_BYTES / num_runs:
                size = max(2048 // num_runs, 768)
                image.thumbnail((size, size))
                buffer = io.BytesIO()
                image.convert("RGB").save(buffer, "WEBP", quality=90)
                data = buffer.getvalue()
                form = "webp"
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        print(f"{path}: left out, {error}", file=sys.stderr)
        return None
    return f"data:image/{form};base64,{base64.b64encode(data).decode()}"


def readable_size(path):
    """The size of a file or folder in words, such as 1.3 MB."""
    files = path.rglob("*") if path.is_dir() else [path]
    size = sum(file.stat().st_size for file in files if file.is_file())
    if size < 1000:
        return f"{size} B"
    for unit in ("kB", "MB", "GB"):
        size /= 1000
        if size < 1000 or unit == "GB":
            break
    return f"{size:.1f} {unit}"


def shown(value):
    """A value of a setting in HTML."""
    return html.escape(value if isinstance(value, str) else json.dumps(value, ensure_ascii=False))


def breakable(name):
    """The name of a setting or run in HTML; a line may end after its underscores and slashes."""
    return re.sub("([_/])", r"\1<wbr>", html.escape(str(name)))


def table(rows):
    """An HTML table of (name, value) pairs, escaped."""
    cells = [f"<tr><th>{breakable(name)}</th><td>{shown(value)}</td></tr>" for name, value in rows]
    return f"<table>{''.join(cells)}</table>"


def wide_table(columns, rows):
    """An HTML table of {name: cells}, in HTML already; on a narrow screen a row is a list of its columns' names and
    cells."""
    head = "".join(f"<th>{column}</th>" for column in columns)
    body = []
    for name, cells in rows.items():
        pairs = zip(columns, cells, strict=True)
        cells = "".join(f"<td><span>{column}</span><b>{cell}</b></td>" for column, cell in pairs)
        body.append(f"<tr><th>{name}</th>{cells}</tr>")
    return f'<table class="matrix"><thead><tr><th></th>{head}</tr></thead>{"".join(body)}</table>'


def natural_order(path):
    """A key that sorts checkpoint-200 before checkpoint-1000."""
    return [int(part) if part.isdecimal() else part.lower() for part in re.split(r"(\d+)", path.name)]


def files_table(folder, page_folder):
    """The files of a run with links to them from a page in `page_folder`."""
    path_to = Path(os.path.relpath(folder.resolve(), page_folder.resolve()))
    files = [
        path
        for path in folder.iterdir()
        if not path.name.startswith(".") and path.name not in ("report.html", "comparison.html")
    ]
    rows = []
    for path in sorted(files, key=natural_order):
        link = f'<a href="{quote(str(path_to / path.name))}">{html.escape(path.name)}</a>'
        rows.append(f"<tr><th>{link}</th><td>{readable_size(path)}</td></tr>")
    return f"<table>{''.join(rows)}</table>"


def settings_html(values, changed):
    """The flags that were changed, and the others behind a click."""
    others = table((name, value) for name, value in sorted(values.items()) if name not in changed)
    if not changed:
        return others
    first = table((name, value) for name, value in values.items() if name in changed)
    more = len(values) - len(changed)
    return f"{first}<details><summary>{more} more, as by default</summary>{others}</details>"


def validation_images(runs):
    """The grids of validation/ that can be read: [{"run": index, "step", "src"}], in the order of runs and steps."""
    images = []
    for i, run in enumerate(runs):
        for path in sorted(run.folder.glob("validation/step-*.png")):
            step = path.stem.removeprefix("step-")
            src = image_url(path, len(runs)) if step.isdecimal() else None
            if src:
                images.append({"run": i, "step": int(step), "src": src})
    return images


def run_names(folders):
    """Names that tell runs apart: their folders', with as many parents as that takes."""
    paths = [folder.resolve() for folder in folders]
    if len(set(paths)) < len(paths):
        twice = next(folder for folder, path in zip(folders, paths, strict=True) if paths.count(path) > 1)
        raise ValueError(f"{twice}: given twice, name other runs")
    names = [path.name for path in paths]
    num_parts = 1
    while len(set(names)) < len(names):
        num_parts += 1
        names = ["/".join(path.parts[-num_parts:]) for path in paths]
    return names


def facts_of(run, window):
    """{what: text} of a run in numbers; its loss is the mean of `window` steps, as in the chart."""
    mean_losses = running_mean([row["loss"] for row in run.rows], window)
    speeds = np.array([row.get("images_per_second", math.nan) for row in run.rows])
    speeds = speeds[np.isfinite(speeds)]
    return {
        "steps": f"{int(run.last_step)}",
        f"loss, mean of {window}": f"{mean_losses[-1]:.4g}",
        "images per second, median": f"{np.median(speeds):.3g}" if len(speeds) else "-",
        "peak memory": f"{max(row.get('peak_memory_gb', 0) for row in run.rows):.2f} GiB",
        "checkpoints": f"{len(run.checkpoints)}",
    }


def one_run(run, page_folder):
    """The parts of the page of one run, in HTML."""
    changed = run.record.get("changed")
    changed = changed if isinstance(changed, list) else []
    data = charts_of(run.rows)
    data["checkpoints"] = run.checkpoints
    marks = part_of(run.record, "marks")
    data["marks"] = [(label, step) for label, step in marks.items() if is_before(step, run.last_step)]
    data["images"] = validation_images([run])
    data["runs"] = [{"name": "", "prompt": run.prompt}]
    files = f'<section id="files"><h2>Files</h2>{files_table(run.folder, page_folder)}</section>'
    versions = f"<section><h2>Versions</h2>{table(run.versions.items())}</section>"
    settings = f'<section id="settings"><h2>Settings</h2>{settings_html(run.args, changed)}</section>'
    facts = "".join(
        f"<div><b>{value}</b>{name}</div>" for name, value in facts_of(run, mean_window(len(run.rows))).items()
    )
    return {
        "title": html.escape(run.folder.resolve().name),
        "heading": html.escape(run.folder.resolve().name),
        "model": html.escape(str(run.args.get("pretrained_model_name_or_path", ""))),
        "facts": f'<div class="facts">{facts}</div>',
        "held_out": html.escape(held_out_summary(held_out_losses(run.rows), int(run.rows[0]["step"]))),
        "differences": "",
        "tables": f'<div class="grid wide">{settings}<div class="grid">{files}{versions}</div></div>',
        "data": json.dumps(data).replace("<", "\\u003c"),
    }


def several_runs(runs):
    """The parts of the page that compares runs, in HTML."""
    names = run_names([run.folder for run in runs])
    data = compared_charts(dict(zip(names, runs, strict=True)))
    data["checkpoints"] = []
    data["marks"] = []
    data["images"] = validation_images(runs)
    data["runs"] = [{"name": name, "prompt": run.prompt} for name, run in zip(names, runs, strict=True)]
    labels = []
    for i, name in enumerate(names):
        dashed = " class=dashed" if i >= NUM_COLORS else ""
        labels.append(f'<i{dashed} style="--line: var(--run-{i % NUM_COLORS})"></i>{breakable(name)}')
    settings = f'<section id="settings"><h2>Settings that differ</h2>{differences_html(runs, labels)}</section>'
    models = {str(run.args.get("pretrained_model_name_or_path", "")) for run in runs}
    return {
        "title": html.escape(", ".join(names)),
        "heading": f"Comparison of {len(runs)} runs",
        "model": html.escape(models.pop()) if len(models) == 1 else "",
        "facts": f'<section id="runs">{overview_html(runs, labels)}</section>',
        "held_out": held_out_note(runs),
        "differences": settings,
        "tables": "",
        "data": json.dumps(data).replace("<", "\\u003c"),
    }


def overview_html(runs, labels):
    """A row of numbers per run; `labels` are the names of runs in HTML."""
    rows = {}
    window = mean_window(max(len(run.rows) for run in runs))
    for run, label in zip(runs, labels, strict=True):
        facts = facts_of(run, window)
        losses = held_out_losses(run.rows)
        best = min(losses, key=lambda step: (losses[step], step), default=None)
        facts["lowest held-out loss"] = "-" if best is None else f"{losses[best]:.4g} at step {best}"
        rows[label] = facts
    columns = list(facts)
    return wide_table(columns, {label: list(facts.values()) for label, facts in rows.items()})


def held_out_note(runs):
    """Whether the held-out losses of runs compare, as far as their checkpoints tell."""
    measured = [run for run in runs if held_out_losses(run.rows)]
    hashes = [run.held_out_hash for run in measured]
    if len(measured) < 2 or None in hashes:
        return ""
    if len(set(hashes)) > 1:
        return "The runs hold out different images: their held-out losses do not compare."
    return "The held-out losses are of the same images and the same noise."


def differences_html(runs, labels):
    """The settings and versions that differ, a column per run, and behind clicks those that only some of the runs have
    and those that all share."""
    settings = defaultdict(lambda: [None] * len(runs))  # {name: the value of each run in HTML, or None}
    for i, run in enumerate(runs):
        for name, value in run.args.items():
            settings[breakable(name)][i] = shown(value)
        for name, value in run.versions.items():
            settings[f"version of {breakable(name)}"][i] = shown(value)
    settings.pop(breakable("output_dir"), None)
    different = {}
    partial = {}
    same = {}
    for name, values in sorted(settings.items()):
        if None in values:
            partial[name] = ["-" if value is None else value for value in values]
        elif len(set(values)) > 1:
            different[name] = values
        else:
            same[name] = values[0]
    parts = [wide_table(labels, different) if different else "<p>None.</p>"]
    if partial:
        title = f"{len(partial)} that only some of the runs have"
        parts.append(f"<details><summary>{title}</summary>{wide_table(labels, partial)}</details>")
    if same:
        title = f"{len(same)} that are the same"
        rows = "".join(f"<tr><th>{name}</th><td>{value}</td></tr>" for name, value in same.items())
        parts.append(f"<details><summary>{title}</summary><table>{rows}</table></details>")
    return "".join(parts)


def page(runs, page_folder):
    """The HTML of the report of one run or several, to lie in `page_folder`."""
    parts = one_run(runs[0], page_folder) if len(runs) == 1 else several_runs(runs)
    template = Path(__file__).with_suffix(".html").read_text()
    script = re.search("<script>(.*)</script>", template, re.DOTALL)[1].encode()
    return Template(template).substitute(
        parts,
        kind="one" if len(runs) == 1 else "several",
        hash=base64.b64encode(hashlib.sha256(script).digest()).decode(),
    )


def main(argv=None):
    parser = Parser(description=__doc__, takes="OUTPUT_DIR")
    parser.add_argument("folders", metavar="OUTPUT_DIR", type=Path, nargs="+", help="output folders of trainers")
    parser.add_argument(
        "--output",
        metavar="PAGE",
        type=Path,
        help="the page (default: report.html, of several comparison.html, in the first)",
    )
    args = parser.parse_args(argv)
    report = args.output or args.folders[0] / PAGES[len(args.folders) > 1]
    problems = check_file("--output", report) if args.output else []
    runs = []
    for folder in args.folders:
        try:
            runs.append(read_run(folder))
        except (OSError, ValueError, OverflowError) as error:
            problems.append(str(error))
    partial = report.with_name(f".{report.name}.{os.getpid()}")
    try:
        if problems:
            raise ValueError(join_problems(problems))
        text = page(runs, report.parent)
        if report.exists() and 'id="data"' not in report.read_text(errors="replace"):
            raise ValueError(f"{report} exists and is no report of this program: move it")
        report.parent.mkdir(parents=True, exist_ok=True)
        partial.write_text(text, errors="replace")
        partial.replace(report)
    except (OSError, ValueError, OverflowError) as error:
        if partial.exists():
            partial.unlink()
        print(f"report.py: error: {error}", file=sys.stderr)
        raise SystemExit(2) from None
    print(report)


if __name__ == "__main__":
    main()
