"""examples/*/notebook.ipynb: their form, their commands beside those of the pages, and a run of each in few steps.

tests/test_commands.py runs their commands too, those for a GPU with tiny models.
"""

import base64
import contextlib
import io
import os
import re
import signal
import sys
import time
from pathlib import Path

import nbformat
import psutil
import pytest
from conftest import ROOT
from jupyter_client.manager import start_new_kernel
from nbclient import NotebookClient
from PIL import Image
from test_commands import NOTEBOOKS, QUICKSTART, TRAINERS, steps_of, without_launcher
from test_commands import flags_of as known_flags


NAMES = [Path(path).parent.name for path in NOTEBOOKS]
STEPS = 60  # more than the warmup of each notebook
FOLDERS = ("--instance_data_dir", "--target_data_dir", "--caption_data_dir", "--train_data_dir", "--class_data_dir")
FREE = (*FOLDERS, "--output_dir", "--max_train_steps", "--resume_from_checkpoint", "--validation_")  # not the page's
SHOWN = {  # images in each cell that shows some on a CPU
    "dreambooth": {"data-images": 6, "loss": 1, "validation": 2, "generate-images": 3, "compare-images": 1},
    "influxedit": {"data-images": 6, "loss": 1, "validation": 2, "generate-images": 4},
    "omini": {"data-images": 6, "loss": 1, "validation": 2, "generate-images": 2},
    "twinflow": {"data-images": 6, "loss": 1, "validation": 2, "generate-images": 2, "compare-images": 1},
}


def read(name, steps=None):
    """A notebook; with `steps`, one that trains so many, on less data."""
    notebook = nbformat.read(ROOT / "examples" / name / "notebook.ipynb", as_version=nbformat.NO_CONVERT)
    for cell in notebook.cells if steps else ():
        cell.source = re.sub(r"^STEPS = \d+", f"STEPS = {steps}", cell.source)
        cell.source = re.sub(r"(--num_class_images|--count) \d{3,}", r"\1 48", cell.source)
    return notebook


def commands_of(page, tmp_path):
    """The words of each command of a page."""
    return [without_launcher(words) for _, _, words in steps_of(page, tmp_path) if isinstance(words, list)]


def flags_of(words):
    """{flag: its values} of a command, with @files as a flag of their own."""
    flags = {}
    for word in words:
        if word.startswith("--"):
            name, *values = word.split("=", 1)
            flags[name] = tuple(values)
        elif word.startswith("@"):
            flags["@"] = (word,)
        elif flags:
            flags[name] += (word,)
    return flags


def trainings(page, tmp_path):
    """(script, the flags that say how) of each training of a page."""
    found = []
    for words in commands_of(page, tmp_path):
        if words[1:2] and words[1] in TRAINERS:
            flags = flags_of(words[2:]).items()
            found.append((words[1], {flag: values for flag, values in flags if not flag.startswith(FREE)}))
    return found


@pytest.fixture
def place(tmp_path):
    """A function that makes a copy of the repository to run a notebook in, and names the notebook's folder in it."""

    def make(name):
        folder = tmp_path / "clone" / "examples" / name
        folder.mkdir(parents=True)
        parts = [ROOT / part for part in ("common", "requirements.txt", *TRAINERS)]
        parts += [path for path in ROOT.glob("examples/*") if path.name != name]
        for path in parts + [*(ROOT / "examples" / name).iterdir()]:
            (tmp_path / "clone" / path.relative_to(ROOT)).symlink_to(path)
        (tmp_path / "clone" / ".venv").symlink_to(sys.prefix)
        return folder

    return make


# ---------------------------------------------------------------------------------------------------------------------
# Form and commands
# ---------------------------------------------------------------------------------------------------------------------


def test_each_trainer_has_a_notebook():
    assert sorted(SHOWN) == NAMES
    assert len(NAMES) == len(TRAINERS)


@pytest.mark.parametrize("name", NAMES)
def test_a_notebook_is_valid_and_carries_no_results(name):
    """Its text is what nbformat writes, so that a difference between two of them is one of the cells."""
    notebook = read(name)
    nbformat.validate(notebook)
    assert (notebook.nbformat, notebook.nbformat_minor) == (4, 5)
    assert (ROOT / "examples" / name / "notebook.ipynb").read_text() == nbformat.writes(notebook) + "\n"
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert not any(cell.outputs or cell.execution_count for cell in code)
    assert code[0].id == "settings"
    assert re.fullmatch(r"STEPS = \d+ .*\nGPU = False .*", code[0].source)


@pytest.mark.parametrize("name", NAMES)
def test_the_flags_of_a_notebook_exist(name, tmp_path):
    commands = commands_of(f"examples/{name}/notebook.ipynb", tmp_path)
    assert len(commands) >= 5
    for _, script, *words in commands:
        assert flags_of(words).keys() - {"@"} <= known_flags(script), script


@pytest.mark.parametrize("name", NAMES)
def test_what_a_notebook_trains_is_what_its_page_trains(name, tmp_path):
    """But for folders, the number of steps and what is drawn for validation."""
    pages = (f"examples/{name}/README.md", QUICKSTART)
    known = [training for page in pages for training in trainings(page, tmp_path)]
    found = trainings(f"examples/{name}/notebook.ipynb", tmp_path)
    assert len(found) == 2  # the toy, and FLUX.1 on a GPU
    for training in found:
        assert training in known


# ---------------------------------------------------------------------------------------------------------------------
# Kernels
# ---------------------------------------------------------------------------------------------------------------------


class Kernel:
    """A notebook's kernel, to run cells in and to stop them."""

    def __init__(self, folder):
        self.manager, self.client = start_new_kernel(cwd=str(folder))
        self.pid = self.manager.provisioner.pid

    def start(self, code):
        self.request = self.client.execute(code)
        self.text = ""

    def read(self, until, timeout=300):
        """Reads what a cell prints until `until(text)`, or else until it ends: whether it has ended."""
        deadline = time.monotonic() + timeout
        while not until(self.text):
            message = self.client.get_iopub_msg(timeout=deadline - time.monotonic())
            if message["parent_header"].get("msg_id") != self.request:
                continue
            content = message["content"]
            self.text += content.get("text", "")
            if content.get("execution_state") == "idle":
                return True
        return False

    def end(self):
        """What a cell raised, None if nothing."""
        assert self.read(lambda text: False)
        while (reply := self.client.get_shell_msg(timeout=60))["parent_header"].get("msg_id") != self.request:
            pass  # of the questions whether the kernel is there
        content = reply["content"]
        return None if content["status"] == "ok" else (content["ename"], content["evalue"])

    def run(self, code):
        self.start(code)
        return self.end()

    def interrupt(self, whom):
        """The stop button: Jupyter sends the signal to the kernel's group, some programs to the kernel alone."""
        (os.killpg if whom == "group" else os.kill)(self.pid, signal.SIGINT)

    def close(self):
        left = psutil.Process(self.pid).children(recursive=True)
        for process in left:
            process.kill()
        self.client.stop_channels()
        self.manager.shutdown_kernel(now=True)
        assert not left


@pytest.fixture
def kernel():
    """A function that starts a kernel in a folder; at its end, nothing that it has started is left."""
    with contextlib.ExitStack() as stack:

        def start(folder):
            kernel = Kernel(folder)
            stack.callback(kernel.close)
            return kernel

        yield start


SAVES = """
import pathlib, signal, sys, time
signals = []
signal.signal(signal.SIGINT, lambda number, frame: signals.append(number))
print("started \u00e4")
while not signals:
    time.sleep(0.01)
time.sleep(1)
pathlib.Path("saved").touch()
print("saved")
sys.exit(130)
"""


def test_a_cell_shows_output_at_once_fails_with_its_command_and_stops_when_that_has_saved(kernel, place, tmp_path):
    folder = place("omini")
    clone = tmp_path / "clone"
    (clone / "saves.py").write_text(SAVES)
    kernel = kernel(folder)
    cells = {cell.id: cell.source for cell in read("omini").cells}
    assert kernel.run(cells["settings"]) is None
    assert kernel.run(cells["install"]) is None
    assert kernel.text == f"Installed in {clone / '.venv'}\n"
    assert kernel.run("%%terminal\necho $STEPS\nfalse\necho more") == (
        "CommandFailed",
        "The command failed, with exit code 1: see above",
    )
    assert kernel.text == "600\n"
    assert kernel.run("%%terminal GPU\nfalse") is None
    assert kernel.text == "Not run, as GPU is False in the first cell\n"
    assert kernel.run("%%terminal\ncommand -v python") is None
    assert kernel.text == f"{clone}/.venv/bin/python\n"
    for whom in ("group", "kernel"):
        kernel.start("%%terminal\npython saves.py\ntouch went_on")
        assert not kernel.read(lambda text: "started \u00e4" in text)
        kernel.interrupt(whom)
        assert kernel.end() == ("CommandFailed", "Stopped")
        assert kernel.text.endswith("saved\n")
        (clone / "saved").unlink()
    assert not (clone / "went_on").exists()


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_the_stop_button_saves_a_checkpoint_and_the_cell_goes_on_from_it(kernel, place, name):
    kernel = kernel(place(name))
    for cell in read(name, 5000).cells:
        if cell.id == "train":
            break
        if cell.cell_type == "code":
            assert kernel.run(cell.source) is None, kernel.text
    kernel.start(cell.source)
    assert not kernel.read(lambda text: re.search(r" [1-9]\d*/5000 \[", text)), kernel.text
    kernel.interrupt("group")
    assert kernel.end() == ("CommandFailed", "Stopped")
    step = int(re.search(r"Interrupted at step (\d+), saved .*checkpoint-\1; continue with", kernel.text)[1])
    assert 1 <= step < 5000
    kernel.start(cell.source)
    assert not kernel.read(lambda text: re.search(r", loss=.*, loss=", text, re.S)), kernel.text
    kernel.interrupt("kernel")
    assert kernel.end() == ("CommandFailed", "Stopped")
    assert int(re.search(r"Interrupted at step (\d+), saved", kernel.text)[1]) > step


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_a_notebook_runs_and_shows_its_images(place, name):
    folder = place(name)
    notebook = read(name, STEPS)
    resources = {"metadata": {"path": str(folder)}}
    NotebookClient(notebook, timeout=1800, kernel_name="python3", resources=resources).execute()
    shown = {}
    for cell in notebook.cells:
        html = "".join(output.get("data", {}).get("text/html", "") for output in cell.get("outputs", []))
        images = re.findall(r'src="data:image/png;base64,([^"]+)"', html)
        assert len(images) == html.count("<img")
        for image in images:
            Image.open(io.BytesIO(base64.b64decode(image))).verify()
        if images:
            shown[cell.id] = len(images)
    assert shown == SHOWN[name]
