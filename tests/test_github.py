"""Files that GitHub and pre-commit read: they parse, and what they run is there."""

import os
import shlex
import shutil
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest
import yaml
from conftest import ROOT


FORMS = sorted((ROOT / ".github/ISSUE_TEMPLATE").glob("*.yml"))


def runs(command):
    """Whether the program of a command is one of this repository or of the machine."""
    program = shlex.split(command)[0]
    return os.access(ROOT / program, os.X_OK) if "/" in program else shutil.which(program) is not None


def test_the_workflow_runs_what_checks_a_change():
    workflow = yaml.safe_load((ROOT / ".github/workflows/tests.yml").read_text())
    # "on" is a boolean in YAML 1.1
    assert {"push", "pull_request"} <= workflow[True].keys()
    steps = [step for job in workflow["jobs"].values() for step in job["steps"]]
    commands = [step["run"] for step in steps if "run" in step]
    assert commands == [".ci/run", "tests/run.sh --oldest"]
    assert all(map(runs, commands))
    caches = [step["with"]["cache-dependency-path"].split() for step in steps if "cache" in step.get("with", {})]
    assert all((ROOT / file).is_file() for files in caches for file in files)


def test_hooks_repair_a_file(tmp_path):
    config = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())
    file = tmp_path / "new.py"
    file.write_text("import os\nprint( 'hello' )\n")
    for hook in (hook for repository in config["repos"] for hook in repository["hooks"]):
        program, *flags = shlex.split(hook["entry"])
        subprocess.run([Path(sys.executable).parent / Path(program).name, *flags, file], cwd=ROOT, check=True)
    assert file.read_text() == 'print("hello")\n'


@pytest.mark.parametrize("form", FORMS, ids=lambda form: form.stem)
def test_a_form_of_issues_is_one_that_github_takes(form):
    content = yaml.safe_load(form.read_text())
    assert all(isinstance(content[key], str) and content[key] for key in ("name", "description"))
    fields = [field for field in content["body"] if field["type"] != "markdown"]
    assert fields
    assert len({field["id"] for field in fields}) == len(fields)
    for field in content["body"]:
        assert field["type"] in {"markdown", "textarea", "input", "dropdown", "checkboxes"}
        assert field["attributes"]["value" if field["type"] == "markdown" else "label"]


@pytest.mark.slow
def test_the_command_of_the_bug_form_prints_versions():
    form = yaml.safe_load((ROOT / ".github/ISSUE_TEMPLATE/bug.yml").read_text())
    (field,) = [field for field in form["body"] if field.get("id") == "versions"]
    command = field["attributes"]["description"].split("`")[1]
    environment = {**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    printed = subprocess.run(["bash", "-c", command], cwd=ROOT, env=environment, capture_output=True, text=True).stdout
    for package in ("torch", "diffusers", "transformers", "accelerate", "peft", "bitsandbytes"):
        assert version(package) in printed
