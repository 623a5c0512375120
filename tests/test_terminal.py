"""What a run prints: what is trained and what it costs, progress, where the results are and how to use them."""

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

from common.tracking import memory_text

import pytest
from conftest import ROOT


SCRIPTS = sorted(path.stem for path in ROOT.glob("train_*.py"))


def run(command, **environment):
    quiet = {name: value for name, value in os.environ.items() if not name.endswith("_VERBOSITY")}
    quiet |= {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", **environment}
    return subprocess.run(
        [sys.executable, *map(str, command)], cwd=ROOT, env=quiet, capture_output=True, text=True, timeout=600
    )


@pytest.mark.parametrize("script", [SCRIPTS[0], *(pytest.param(s, marks=pytest.mark.slow) for s in SCRIPTS[1:])])
def test_a_run_says_what_matters_and_nothing_else(script, run_program, short_runs, pictures, tmp_path):
    flags = [*short_runs[script], "--validation_prompt", "a circle", "--num_validation_images", 1]
    if script in ("train_omini", "train_influxedit"):
        flags += ["--validation_image", pictures / "0.png"]
    if script == "train_influxedit":
        flags += ["--validation_width", 32, "--validation_height", 32]
    activated = script != SCRIPTS[0]  # the environment that Python is of
    path = str(Path(sys.executable).parent if activated else tmp_path)
    done = run([f"{script}.py", *flags, "--max_train_steps", 7, "--output_dir", tmp_path / "run"], PATH=path)
    assert done.returncode == 0, done.stderr
    header, closing = done.stdout.split("Trained 7 steps.")
    labels = [line[2:17].strip() for line in header.splitlines()]
    assert all(len(line) <= 80 for line in header.splitlines() if not re.match("  (model|output) ", line))
    assert labels[:2] == ["model", "trained"] and {"data", "steps", "precision", "output"} <= {*labels}
    expected = re.search(r"expected (\d\d:\d\d) more, .* (\d+\.\d) GiB of memory", done.stdout)
    assert expected and float(expected[2]) > 0.1
    files, report, command = re.split("See how it went:|Generate with it:", closing)
    program = "python" if activated else sys.executable
    assert [shlex.split(report)[0], shlex.split(command)[0]] == [program] * 2
    assert run(shlex.split(report)[1:]).returncode == 0
    assert (tmp_path / "run" / "report.html").exists()
    listed = re.findall(r"^  \S.*?  +(/.*)$", files, re.MULTILINE)
    assert len(listed) >= 4 and all((tmp_path / "run" / path).exists() for path in listed)
    bars = re.split(r"[\r\n]+", done.stderr)
    assert not [line for line in bars if line.strip() and not re.search(r"\d+%\||\d+it |it/s\]", line)]

    card = (tmp_path / "run" / "README.md").read_text()
    pictures_shown = re.findall(r"!\[.*\]\((.+)\)", card)
    assert pictures_shown == ["validation/step-000000.png", "validation/step-000007.png"]
    assert all((tmp_path / "run" / path).exists() for path in pictures_shown)
    assert "num_train_epochs" not in card  # --max_train_steps wins
    assert "## Settings" in card and "| rank | 2 |" in card and "url: validation/step-000007.png" in card

    output = tmp_path / "drawn.png" if script == "train_omini" else tmp_path
    steps = "--steps" if "twinflow" in script else "--num_inference_steps"
    run_program(*shlex.split(command)[1:], steps, 1, "--output", output)
    assert [*tmp_path.glob("*.png")]


@pytest.mark.parametrize("script", [SCRIPTS[0], *(pytest.param(s, marks=pytest.mark.slow) for s in SCRIPTS[1:])])
def test_the_header_names_sizes_that_fill_no_batch(script, train, short_runs, tmp_path, capsys):
    flags = [*short_runs[script], "--train_batch_size", 4, "--max_train_steps", 1, "--output_dir", tmp_path]
    expected = {  # of five images
        "train_dreambooth_flux_advanced": ["2 at 32 x 32", "2 at 48 x 32", "1 at 32 x 48"],
        "train_omini": [],
        "train_influxedit": ["3 at 32 x 32", "2 at 32 x 16"],
        "train_twinflow": ["2 at 32 x 32", "2 at 48 x 32", "1 at 32 x 48"],
    }[script]
    if script in ("train_dreambooth_flux_advanced", "train_twinflow"):
        flags += ["--aspect_ratio_buckets", "32,48;32,32;48,32"]
    train(script, *flags)
    header = capsys.readouterr().out
    small = "".join(re.findall("^  small batches .*$", header, re.MULTILINE))
    assert all(header.count(text) == 2 and text in small for text in expected), header
    assert bool(small) == bool(expected)


def test_packed_weights_count_as_what_they_stand_for(train, short_runs, tmp_path, capsys):
    trained = set()
    for kind in ("none", "nf4"):
        flags = [*short_runs["train_twinflow"], "--quantize_base", kind, "--max_train_steps", 1]
        train("train_twinflow", *flags, "--output_dir", tmp_path / kind)
        trained |= set(re.findall("^  trained +(.* of all)$", capsys.readouterr().out, re.MULTILINE))
    assert len(trained) == 1


@pytest.mark.slow
def test_verbose_lets_the_libraries_speak(short_runs, tmp_path):
    flags = [*short_runs["train_dreambooth_flux_advanced"], "--verbose", "--output_dir", tmp_path / "run"]
    done = run(["train_dreambooth_flux_advanced.py", *flags])
    assert done.returncode == 0, done.stderr
    assert "[transformers]" in done.stderr or "transformers" in done.stderr


def test_the_header_says_what_saves_memory():
    plain = {"quantize_base": "none", "quantize_text_encoders": "none", "blocks_to_swap": None}
    plain |= {"gradient_checkpointing": False, "offload": False}
    assert memory_text(SimpleNamespace(**plain)) == ""
    assert "20" in memory_text(SimpleNamespace(**plain | {"blocks_to_swap": 20}))
    all_of_it = {"quantize_base": "nf4", "quantize_text_encoders": "int8", "blocks_to_swap": "auto"}
    text = memory_text(SimpleNamespace(**all_of_it, gradient_checkpointing=True, offload=True))
    assert "nf4" in text and "int8" in text and "checkpointing" in text and "offload" in text
    assert len(text) <= 80 - 17  # a line of the header
