"""Writes OUTPUT_DIR/report.html about a trainer's run: images, curves, settings and files in one page.

python examples/report.py OUTPUT_DIR

The page needs no network and no other file. While a run goes on, the command can be given again at any time.
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
from pathlib import Path
from urllib.parse import quote

import numpy as np
from PIL import Image


sys.path.insert(0, str(Path(__file__).parents[1]))

from common.arguments import Parser
from common.metrics import (
    held_out_lines,
    held_out_losses,
    held_out_summary,
    is_held_out,
    mean_window,
    read_metrics,
    running_mean,
)


MAX_POINTS = 3000  # of a curve in the page; in longer runs a point is the mean of several steps
MAX_IMAGE_BYTES = 400_000  # a larger image becomes WebP of at most 2048 pixels
CHART_TITLES = {
    "loss": "loss",
    "lr": "learning rate",
    "prodigy_d": "Prodigy's d",
    "grad_norm": "gradient norm",
    "images_per_second": "images per second",
    "peak_memory_gb": "peak memory, GiB",
}


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


def charts_of(rows):
    """What the page plots: {"steps": [...], "last", "charts": [{"name", "lines": {name: [value or None]}, "log"}]}.

    A chart of what is computed on held-out data has "steps" of its own.
    """
    steps_per_point = math.ceil(len(rows) / MAX_POINTS)
    window = mean_window(len(rows))
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
        log = name in ("lr", "prodigy_d") and 0 < 100 * values.min() < values.max()
        charts.append({"name": CHART_TITLES.get(name, name), "lines": lines, "log": bool(log)})
    charts[1:1] = held_out_charts(rows)
    steps = [int(row["step"]) for row in rows[::steps_per_point]]
    return {"steps": steps, "last": int(rows[-1]["step"]), "charts": charts}


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


def image_url(path):
    """An image as a data: address; None if it cannot be read."""
    try:
        data = path.read_bytes()
        form = "png"
        with Image.open(io.BytesIO(data)) as image:
            image.load()
            if len(data) > MAX_IMAGE_BYTES:
                image.thumbnail((2048, 2048))
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


def table(rows):
    """An HTML table of (name, value) pairs, escaped."""
    cells = []
    for name, value in rows:
        text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
        breakable = html.escape(str(name)).replace("_", "_<wbr>")
        cells.append(f"<tr><th>{breakable}</th><td>{html.escape(text)}</td></tr>")
    return f"<table>{''.join(cells)}</table>"


def natural_order(path):
    """A key that sorts checkpoint-200 before checkpoint-1000."""
    return [int(part) if part.isdecimal() else part.lower() for part in re.split(r"(\d+)", path.name)]


def files_table(folder):
    files = [path for path in folder.iterdir() if not path.name.startswith(".") and path.name != "report.html"]
    rows = []
    for path in sorted(files, key=natural_order):
        link = f'<a href="{quote(path.name)}">{html.escape(path.name)}</a>'
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


def validation_images(folder):
    """The grids of validation/ that can be read: [{"step", "src"}], in the order of their steps."""
    images = []
    for path in sorted(folder.glob("validation/step-*.png")):
        step = path.stem.removeprefix("step-")
        src = image_url(path) if step.isdecimal() else None
        if src:
            images.append({"step": int(step), "src": src})
    return images


def page(folder):
    """The HTML of the report."""
    if not folder.is_dir():
        raise ValueError(f"{folder}: no such folder")
    by_step = {}
    for row in read_metrics(folder / "metrics.jsonl"):
        by_step[row["step"]] = {name: value for name, value in row.items() if type(value) in (int, float)}
    if not by_step:
        raise ValueError(f"{folder}: no metrics.jsonl with steps in it, so it is not the output folder of a run")
    rows = [by_step[step] for step in sorted(by_step)]
    last_step = rows[-1]["step"]
    record = read_json(folder / "args.json")
    values = part_of(record, "args")
    changed = record.get("changed")
    checkpoints = [path.name.removeprefix("checkpoint-") for path in folder.glob("checkpoint-*")]
    checkpoints = sorted(int(step) for step in checkpoints if step.isdecimal() and int(step) <= last_step)
    data = charts_of(rows)
    data["checkpoints"] = checkpoints
    data["marks"] = [(label, step) for label, step in part_of(record, "marks").items() if is_before(step, last_step)]
    data["images"] = validation_images(folder)

    mean_losses = running_mean([row["loss"] for row in rows], mean_window(len(rows)))
    speeds = np.array([row.get("images_per_second", math.nan) for row in rows])
    speeds = speeds[np.isfinite(speeds)]
    facts = {
        "steps": f"{int(last_step)}",
        "loss": f"{mean_losses[-1]:.4g}",
        "images per second": f"{np.median(speeds):.3g}" if len(speeds) else "-",
        "peak memory": f"{max(row.get('peak_memory_gb', 0) for row in rows):.2f} GiB",
        "checkpoints": f"{len(checkpoints)}",
    }
    template = Path(__file__).with_suffix(".html").read_text()
    script = re.search("<script>(.*)</script>", template, re.DOTALL)[1].encode()
    return Template(template).substitute(
        name=html.escape(folder.resolve().name),
        model=html.escape(str(values.get("pretrained_model_name_or_path", ""))),
        prompt=html.escape(str(values.get("validation_prompt") or values.get("validation_prompts") or "")),
        held_out=html.escape(held_out_summary(held_out_losses(rows), int(rows[0]["step"]))),
        facts="".join(f"<div><b>{value}</b>{name}</div>" for name, value in facts.items()),
        settings=settings_html(values, changed if isinstance(changed, list) else []),
        files=files_table(folder),
        versions=table(part_of(record, "versions").items()),
        data=json.dumps(data).replace("<", "\\u003c"),
        hash=base64.b64encode(hashlib.sha256(script).digest()).decode(),
    )


def main(argv=None):
    parser = Parser(description=__doc__.split("\n")[0], takes="OUTPUT_DIR")
    parser.add_argument("folder", metavar="OUTPUT_DIR", type=Path, help="a trainer's output folder")
    folder = parser.parse_args(argv).folder
    report = folder / "report.html"
    partial = folder / f".report.html.{os.getpid()}"
    try:
        text = page(folder)
        if report.exists() and 'id="data"' not in report.read_text(errors="replace"):
            raise ValueError(f"{report} exists and is no report of this program: move it")
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
