"""Installation, shell commands and images in a notebook.

    %load_ext examples.notebook
    from examples.notebook import install, show

A cell that begins with %%terminal is run by bash, with .venv/bin first in its PATH and the notebook's variables in
capitals as its own. The stop button gives a trainer time to save a checkpoint, where `!` and %%bash kill it within
half a second. A command that fails stops the notebook. `%%terminal NAME` runs only if the notebook's variable NAME is
true.
"""

import base64
import codecs
import contextlib
import html
import os
import shlex
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import psutil
from IPython.display import HTML, display


class CommandFailed(Exception):
    """A command of a cell has failed, or was stopped; it has said why itself."""

    def _render_traceback_(self) -> list[str]:  # IPython shows this in place of the traceback
        return [str(self)]


def run(command: str, variables: dict[str, str] | None = None) -> None:
    """Runs bash code, shows what it prints as it comes, and waits for all that it has started."""
    environment = os.environ | {"PYTHONUNBUFFERED": "1", "TQDM_MININTERVAL": "0.5", "TRANSFORMERS_VERBOSITY": "error"}
    environment |= variables or {}
    environment["PATH"] = f"{Path('.venv/bin').absolute()}{os.pathsep}{environment['PATH']}"
    process = subprocess.Popen(
        ["bash", "-e", "-o", "pipefail", "-c", command],
        env=environment,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )
    decoder = codecs.getincrementaldecoder("utf-8")("replace")
    is_stopped = False
    with process.stdout as output:
        while True:
            try:
                piece = os.read(output.fileno(), 65536)
                if not piece:
                    break
                print(decoder.decode(piece), end="", flush=True)
            except KeyboardInterrupt:
                is_stopped = True
                interrupt(process.pid)
    code = process.wait()
    if is_stopped or code:
        raise CommandFailed("Stopped" if is_stopped else f"The command failed, with exit code {code}: see above")


def interrupt(pid: int) -> None:
    """Ctrl-C for a process and what it has started: some programs that show notebooks interrupt their kernel alone."""
    with contextlib.suppress(psutil.NoSuchProcess):
        parent = psutil.Process(pid)
        for process in (parent, *parent.children(recursive=True)):
            with contextlib.suppress(psutil.NoSuchProcess):
                process.send_signal(signal.SIGINT)


def install() -> None:
    """Installs requirements.txt into .venv, unless that was done: the notebook's own packages stay as they are."""
    if Path(".venv/bin/accelerate").exists():
        print(f"Installed in {Path('.venv').absolute()}")
        return
    this = shlex.quote(sys.executable)
    run(f"{this} -m venv --without-pip .venv")  # Debian's Python has no pip to put there
    run(f"{this} -m pip --python .venv/bin/python install --quiet pip --requirement requirements.txt")


def show(*files: str | Path, height: int | None = None) -> None:
    """Shows images side by side, `height` pixels high or as they are, each with its name, or its caption where a .txt
    file lies beside it."""
    style = f"height: {height}px; image-rendering: pixelated" if height else "max-width: 100%"
    figures = []
    for file in map(Path, files):
        caption = file.with_suffix(".txt")
        text = html.escape(caption.read_text().strip() if caption.is_file() else file.name)
        kind = {".jpg": "jpeg"}.get(file.suffix, file.suffix[1:])
        data = base64.b64encode(file.read_bytes()).decode()
        image = f'<img style="{style}" src="data:image/{kind};base64,{data}">'
        figures.append(f'<figure style="margin: 4px">{image}<figcaption>{text}</figcaption></figure>')
    display(HTML(f'<div style="display: flex; flex-wrap: wrap">{"".join(figures)}</div>'))


def load_ipython_extension(ipython: Any) -> None:
    """Adds %%terminal; %load_ext calls this."""

    def terminal(line: str, cell: str) -> None:
        name = line.strip()
        if name and not ipython.user_ns[name]:
            print(f"Not run, as {name} is {ipython.user_ns[name]} in the first cell")
            return
        values = {name: value for name, value in ipython.user_ns.items() if name.isupper()}
        run(cell, {name: str(value) for name, value in values.items() if isinstance(value, (str, int, float))})

    ipython.register_magic_function(terminal, "cell")
