"""What holds for every trainer: flags are grouped, explained and read; the same banners in the same order."""

import argparse
import ast
import importlib
import re

import pytest
from conftest import ROOT


SCRIPTS = sorted(path.stem for path in ROOT.glob("train_*.py"))
BANNERS = ["Arguments", "Model", "Objective", "Data", "Training"]
GROUPS = [
    "model",
    "data",
    "lora",
    "noise",
    "optimizer",
    "schedule and checkpoints",
    "validation",
    "output and logging",
]
FUNCTIONS = [
    "parse_args",
    "check_flags",
    "check_model",
    "find_examples",
    "compute_loss",
    "validate",
    "describe",
    "main",
]
STEPS = {  # of main, whose third and fourth say what is loaded when
    "1": "Accelerator, logging, seed",
    "2": "Data",
    "5": "Optimizer and schedule",
    "6": "Prepare and resume",
    "7": "Train",
    "8": "Save and final validation",
}
# Flags that a trainer's paper or published command sets otherwise than the others.
OWN = {
    "train_influxedit": {
        "pretrained_model_name_or_path",  # another model
        "resolution",  # a list of long edges
        "seed",  # none, so one is drawn
        "validation_prompt",  # a list
        "num_validation_images",  # 1, of each prompt
        "validation_steps",  # 50
    },
    "train_twinflow": {"pretrained_model_name_or_path", "adam_beta2", "adam_weight_decay"},
    "train_omini": {
        *("optimizer", "learning_rate", "adam_weight_decay", "max_grad_norm", "guidance_scale"),
        *("timestep_sampling", "lora_alpha", "output_dir"),
        "mask_column",  # holes
    },
}


def parser_of(script):
    """The ArgumentParser that a trainer's parse_args builds."""
    with pytest.MonkeyPatch.context() as patch:
        built = lambda parser, *words: (_ for _ in ()).throw(Built(parser))  # noqa: E731
        patch.setattr(argparse.ArgumentParser, "parse_args", built)
        with pytest.raises(Built) as built:
            importlib.import_module(script).parse_args([])
    return built.value.parser


class Built(Exception):  # noqa: N818
    def __init__(self, parser):
        self.parser = parser


def flags_of(script):
    return [action for action in parser_of(script)._actions if action.dest != "help"]


@pytest.mark.parametrize("script", SCRIPTS)
def test_the_flags_that_were_changed_are_known(script, short_runs, tmp_path):
    """Those that were typed, and of a required one any value, but not one that was typed as it is by default."""
    words = [str(word) for word in short_runs[script]] + ["--output_dir", str(tmp_path), "--lora_dropout", "0"]
    words += ["--lr_scheduler", flags_named(script)["lr_scheduler"].default]
    args = importlib.import_module(script).parse_args(words)
    typed = {word.removeprefix("--") for word in words if word.startswith("--")}
    assert {"pretrained_model_name_or_path", "max_train_steps", "learning_rate"} <= set(args.changed) <= typed
    for name in typed - set(args.changed):
        assert str(vars(args)[name]).lower() == str(flags_named(script)[name].default).lower()
    assert {"lr_scheduler", "lora_dropout"} <= typed - set(args.changed)
    assert "changed" not in vars(args)


def flags_named(script):
    return {action.dest: action for action in flags_of(script)}


@pytest.mark.parametrize("script", SCRIPTS)
def test_every_flag_has_a_group_and_a_help_text(script):
    parser = parser_of(script)
    titled = [group for group in parser._action_groups if group.title not in ("positional arguments", "options")]
    grouped = {action.dest for group in titled for action in group._group_actions}
    assert {action.dest for action in flags_of(script)} == grouped
    assert all(action.help and action.help[-1] != "." for action in flags_of(script))
    assert all(group.description for group in titled)
    titles = [group.title for group in titled]
    assert [title for title in titles if title in GROUPS] == GROUPS
    help_text = parser.format_help()
    assert all(f"--{action.dest}" in help_text for action in flags_of(script))
    assert "accelerate launch" in help_text and "@file: a file of options" in help_text
    assert "(default: [" not in help_text and "(default: (" not in help_text  # which nobody could type
    told = [action for action in flags_of(script) if action.default is not None and action.default is not False]
    assert help_text.count("(default:") >= len(told)


def parts_used(script):
    """The parts of a trainer, and those of the rooms that it names, but for what only lists or checks flags."""
    rooms = [part for path in ROOT.glob("common/*.py") for part in ast.parse(path.read_text()).body]
    parts, names = [], set()
    waiting = ast.parse((ROOT / f"{script}.py").read_text()).body
    while waiting:
        waiting = [part for part in waiting if not names_of(part)[0].startswith(("parse_args", "check_"))]
        parts += [part for part in waiting if names_of(part)[0] not in ("CHANGEABLE", "SETTINGS")]
        new = {n.id for part in waiting for n in ast.walk(part) if isinstance(n, ast.Name)} - names
        names |= new
        waiting = [part for part in rooms if new & {*names_of(part)}]
    return parts


def names_of(part):
    """What a part of a module defines."""
    nodes = [node for target in getattr(part, "targets", ()) for node in ast.walk(target)]
    return [part.name] if hasattr(part, "name") else [n.id for n in nodes if isinstance(n, ast.Name)] or [""]


@pytest.mark.parametrize("script", SCRIPTS)
def test_every_flag_is_read_outside_the_parser(script):
    nodes = [node for part in parts_used(script) for node in ast.walk(part)]
    read = {n.attr for n in nodes if isinstance(n, ast.Attribute) and ast.unparse(n.value) in ("args", "self.args")}
    read |= {n.value for n in nodes if isinstance(n, ast.Constant) and isinstance(n.value, str)}  # getattr(args, name)
    read |= {f"prodigy_{name}" for name in read}  # create_optimizer
    assert not {action.dest for action in flags_of(script)} - read


@pytest.mark.parametrize("script", SCRIPTS)
def test_banners_stand_in_the_same_order(script):
    lines = (ROOT / f"{script}.py").read_text().splitlines()
    rule = "# " + "-" * 117
    banners = [lines[i][2:] for i in range(1, len(lines) - 1) if lines[i - 1] == lines[i + 1] == rule]
    assert banners == BANNERS


@pytest.mark.parametrize("script", SCRIPTS)
def test_functions_and_steps_stand_in_the_same_order(script):
    text = (ROOT / f"{script}.py").read_text()
    names = [node.name for node in ast.parse(text).body if isinstance(node, ast.FunctionDef)]
    assert [name for name in names if name in FUNCTIONS] == FUNCTIONS
    steps = dict(re.findall(r"^    # (\d)\. (.*)$", text.split("\ndef main(args):\n")[1], re.M))
    assert "".join(steps) == "12345678"
    assert STEPS.items() <= steps.items()


def test_a_flag_means_the_same_in_every_trainer():
    seen = {}
    for script in SCRIPTS:
        for action in flags_of(script):
            if action.dest in OWN.get(script, set()) | {"output_dir", "validation_image"}:
                continue
            meaning = action.default, list(action.choices or []), action.nargs
            assert seen.setdefault(action.dest, meaning) == meaning, f"--{action.dest} of {script}"


def test_no_function_stands_twice():
    places = {}
    for path in [*ROOT.glob("train_*.py"), *ROOT.glob("common/*.py")]:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef) and node.end_lineno - node.lineno > 2:
                places.setdefault(ast.dump(node), []).append(f"{path.name}:{node.lineno} {node.name}")
    assert not [where for where in places.values() if len(where) > 1]


@pytest.mark.parametrize("path", [path for path in ROOT.glob("**/*.py") if ".venv" not in path.parts], ids=str)
def test_no_file_is_longer_than_can_be_read(path):
    lines = len(path.read_text().splitlines())
    assert lines <= 2000
