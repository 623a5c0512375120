"""Writes OUTPUT_DIR/report.html about a trainer's run: pictures, curves, settings and files in one page.

python examples/report.py OUTPUT_DIR

The page needs no network and no other file. While a run goes on, the command can be given again at any time.
"""

import argparse
import base64
import hashlib
import html
import io
import json
import math
import re
import string
import sys
from pathlib import Path
from urllib.parse import quote

import numpy as np
from PIL import Image


POINTS = 3000  # of a curve in the page; of longer runs each is the mean of several steps
LARGE = 400_000  # bytes of a picture that is kept as it is; larger ones become WebP of at most 2048 pixels
NAMES = {
    "loss": "loss",
    "lr": "learning rate",
    "prodigy_d": "Prodigy's d",
    "grad_norm": "gradient norm",
    "images_per_second": "images per second",
    "peak_memory_gb": "peak memory, GiB",
}


class Template(string.Template):
    """A template without a meaning for the `$` of JavaScript."""

    delimiter = "@@"


def read_json(path):
    """The object in a file; {} if there is none."""
    try:
        value = json.loads(path.read_text(errors="replace"))
    except (OSError, ValueError, RecursionError):
        value = {}
    return value if isinstance(value, dict) else {}


def read_metrics(path):
    """The rows of metrics.jsonl that are whole, in the order of their steps."""
    rows = {}
    for line in path.read_text(errors="replace").splitlines() if path.is_file() else []:
        try:
            row = json.loads(line)
            rows[row["step"]] = {name: float(value) for name, value in row.items()}
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
            continue  # torn by a crash
    return [rows[step] for step in sorted(rows)]


def running_mean(values, window):
    """The exponential mean of about `window` values; those that are no numbers are passed over."""
    decay, mean, weight, means = 1 - 1 / window, 0.0, 0.0, []
    for value in values:
        if math.isfinite(value):
            mean, weight = decay * mean + (1 - decay) * value, decay * weight + 1 - decay
        means.append(mean / weight if weight else math.nan)
    return np.array(means)


def curves_of(rows):
    """What the page plots: {"steps": [...], "charts": [{"name", "lines": {name: [value or None]}}]}."""
    every = -(-len(rows) // POINTS)

    def thinned(values):
        parts = [values[i : i + every] for i in range(0, len(values), every)]
        means = [np.mean(part[np.isfinite(part)]) if np.isfinite(part).any() else math.nan for part in parts]
        return [float(f"{value:.5g}") if math.isfinite(value) else None for value in means]

    charts, window = [], max(1, min(50, len(rows) // 10))
    for name in dict.fromkeys([*NAMES, *(name for row in rows for name in row)]):
        values = np.array([row.get(name, math.nan) for row in rows])
        if name == "step" or not np.isfinite(values).any():
            continue
        lines = {"": thinned(values)}
        if name not in ("lr", "prodigy_d", "peak_memory_gb"):
            means = thinned(running_mean(values, window))
            lines = {f"each {every} steps" if every > 1 else "each step": lines[""], f"mean of {window}": means}
        log = name in ("lr", "prodigy_d") and 0 < 100 * values.min() < values.max()
        charts.append({"name": NAMES.get(name, name), "lines": lines, "log": bool(log)})
    return {"steps": [int(row["step"]) for row in rows[::every]], "last": int(rows[-1]["step"]), "charts": charts}


def picture(path):
    """A picture as a data: address; None if it cannot be read."""
    try:
        data, kind = path.read_bytes(), "png"
        with Image.open(io.BytesIO(data)) as image:
            image.load()
            if len(data) > LARGE:
                image.thumbnail((2048, 2048))
                image.convert("RGB").save(buffer := io.BytesIO(), "WEBP", quality=90)
                data, kind = buffer.getvalue(), "webp"
    except (OSError, ValueError, SyntaxError) as error:
        print(f"{path}: left out, {error}", file=sys.stderr)
        return None
    return f"data:image/{kind};base64,{base64.b64encode(data).decode()}"


def size_of(path):
    """Bytes of a file or a folder, to be read."""
    files = path.rglob("*") if path.is_dir() else [path]
    size = sum(file.stat().st_size for file in files if file.is_file())
    unit = min(3, int(math.log(max(size, 1), 1000)))
    return f"{size / 1000**unit:.{min(unit, 1)}f} {('B', 'kB', 'MB', 'GB')[unit]}"


def table(rows):
    """Two columns, escaped."""
    words = lambda value: value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)  # noqa: E731
    rows = [(html.escape(str(name)).replace("_", "_<wbr>"), html.escape(words(value))) for name, value in rows]
    return f"<table>{''.join(f'<tr><th>{name}</th><td>{value}</td></tr>' for name, value in rows)}</table>"


def page(folder):
    """The HTML of the report."""
    if not folder.is_dir():
        raise ValueError(f"{folder}: no such folder")
    rows, record = read_metrics(folder / "metrics.jsonl"), read_json(folder / "args.json")
    if not rows:
        raise ValueError(f"{folder}: no metrics.jsonl with steps in it, so it is not the output folder of a run")
    values, changed = record.get("args", {}), record.get("changed", [])
    paths = {path.stem[5:]: path for path in sorted(folder.glob("validation/step-*.png")) if path.stem[5:].isdecimal()}
    shown = [{"step": int(step), "src": src} for step, path in paths.items() if (src := picture(path))]
    names = [path.name[11:] for path in folder.glob("checkpoint-*")]
    checkpoints = sorted(int(name) for name in names if name.isdecimal() and int(name) <= rows[-1]["step"])
    marks = [(name, step) for name, step in record.get("marks", {}).items() if step < rows[-1]["step"]]
    data = json.dumps({**curves_of(rows), "checkpoints": checkpoints, "marks": marks, "pictures": shown})
    speed, losses = [row.get("images_per_second", math.nan) for row in rows], [row["loss"] for row in rows]
    facts = {
        "steps": f"{int(rows[-1]['step'])}",
        "loss": f"{running_mean(losses, max(1, min(50, len(rows) // 10)))[-1]:.4g}",
        "images per second": f"{np.nanmedian(speed):.3g}" if np.isfinite(speed).any() else "-",
        "peak memory": f"{max(row.get('peak_memory_gb', 0) for row in rows):.2f} GiB",
        "checkpoints": f"{len(checkpoints)}",
    }
    files = [path for path in folder.iterdir() if path.name[0] != "." and path.name != "report.html"]
    natural = lambda path: [int(p) if p.isdecimal() else p.lower() for p in re.split(r"(\d+)", path.name)]  # noqa: E731
    files.sort(key=natural)  # 200 before 1000
    links = "".join(
        f'<tr><th><a href="{quote(path.name)}">{html.escape(path.name)}</a></th><td>{size_of(path)}</td></tr>'
        for path in files
    )
    settings = table((name, values[name]) for name in values if name in changed)
    others = table((name, value) for name, value in sorted(values.items()) if name not in changed)
    more = f"<details><summary>{len(values) - len(changed)} more, as by default</summary>{others}</details>"
    template = Path(__file__).with_suffix(".html").read_text()
    script = re.search("<script>(.*)</script>", template, re.DOTALL)[1].encode()
    return Template(template).substitute(
        name=html.escape(folder.resolve().name),
        model=html.escape(str(values.get("pretrained_model_name_or_path", ""))),
        prompt=html.escape(str(values.get("validation_prompt") or "")),
        facts="".join(f"<div><b>{value}</b>{name}</div>" for name, value in facts.items()),
        settings=settings + more if changed else others,
        files=f"<table>{links}</table>",
        versions=table(record.get("versions", {}).items()),
        data=data.replace("<", "\\u003c"),
        hash=base64.b64encode(hashlib.sha256(script).digest()).decode(),
    )


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("folder", metavar="OUTPUT_DIR", type=Path, help="a trainer's output folder")
    folder = parser.parse_args().folder
    try:
        text = page(folder)
        (folder / "report.html").write_text(text, errors="replace")
    except (OSError, ValueError) as error:
        print(f"report.py: error: {error}", file=sys.stderr)
        raise SystemExit(2) from None
    print(folder / "report.html")


if __name__ == "__main__":
    main()
