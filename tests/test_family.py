"""What holds for every trainer: flags are grouped, explained and read; the same banners in the same order."""

import argparse
import ast
import importlib

import pytest
from conftest import ROOT


SCRIPTS = sorted(path.stem for path in ROOT.glob("train_*.py"))
BANNERS = ["Arguments", "Data", "Model", "Objective", "Training"]
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
    "train_omini": {
        *("optimizer", "learning_rate", "adam_weight_decay", "max_grad_norm", "guidance_scale"),
        *("timestep_sampling", "lora_alpha", "output_dir"),
        "mask_column",  # holes
    },
}


def parser_of(script):
    """The ArgumentParser that a trainer's parse_args builds."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(argparse.ArgumentParser, "parse_args", lambda parser, argv: (_ for _ in ()).throw(Built(parser)))
        with pytest.raises(Built) as built:
            importlib.import_module(script).parse_args([])
    return built.value.parser


class Built(Exception):  # noqa: N818
    def __init__(self, parser):
        self.parser = parser


def flags_of(script):
    return [action for action in parser_of(script)._actions if action.dest != "help"]


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
    assert "accelerate launch" in help_text
    told = [action for action in flags_of(script) if action.default is not None and action.default is not False]
    assert help_text.count("(default:") >= len(told)


@pytest.mark.parametrize("script", SCRIPTS)
def test_every_flag_is_read_outside_the_parser(script):
    tree = ast.parse((ROOT / f"{script}.py").read_text())
    checks = [f for f in tree.body if getattr(f, "name", "").startswith(("parse_args", "check_"))]
    inside = {id(node) for function in checks for node in ast.walk(function)}
    nodes = [node for node in ast.walk(tree) if id(node) not in inside]
    nodes += [node for room in ROOT.glob("common/*.py") for node in ast.walk(ast.parse(room.read_text()))]
    read = {n.attr for n in nodes if isinstance(n, ast.Attribute) and getattr(n.value, "id", "") == "args"}
    read |= {n.value for n in nodes if isinstance(n, ast.Constant) and isinstance(n.value, str)}  # getattr(args, name)
    read |= {f"prodigy_{name}" for name in read}  # create_optimizer
    assert not {action.dest for action in flags_of(script)} - read


@pytest.mark.parametrize("script", SCRIPTS)
def test_banners_stand_in_the_same_order(script):
    lines = (ROOT / f"{script}.py").read_text().splitlines()
    rule = "# " + "-" * 117
    banners = [lines[i][2:] for i in range(1, len(lines) - 1) if lines[i - 1] == lines[i + 1] == rule]
    assert banners == BANNERS


def test_a_flag_means_the_same_in_every_trainer():
    seen = {}
    for script in SCRIPTS:
        for action in flags_of(script):
            if action.dest in OWN.get(script, set()) | {"output_dir", "validation_image"}:
                continue
            meaning = action.default, action.help, list(action.choices or []), action.nargs
            assert seen.setdefault(action.dest, meaning) == meaning, f"--{action.dest} of {script}"


def test_functions_marked_as_the_same_are():
    marked = {}
    for script in SCRIPTS:
        source = (ROOT / f"{script}.py").read_text()
        for node in ast.walk(ast.parse(source)):
            if isinstance(node, ast.FunctionDef | ast.ClassDef):
                first = min([node.lineno, *(decorator.lineno for decorator in node.decorator_list)])
                if source.splitlines()[first - 2].strip() == "# same in all trainers":
                    marked.setdefault(node.name, {})[script] = ast.dump(node)
    assert len(marked) > 5
    for name, versions in marked.items():
        assert len(set(versions.values())) == 1, f"{name} differs between {', '.join(versions)}"
