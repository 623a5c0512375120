"""What holds for every trainer's command line: a flag that trainers share means the same, all flags are explained."""

import argparse
import importlib
import os
import shlex
from pathlib import Path

from common.arguments import Parser

import pytest
from conftest import ROOT
from test_data import COLORS, DATASETS, color_of, write_dataset


SCRIPTS = sorted(path.stem for path in ROOT.glob("train_*.py"))
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
# {(trainer, flag): why it may differ from the other trainers}
DIFFERENT = {
    ("train_influxedit", "resolution"): "InFluxEdit's list of long edges",
    ("train_influxedit", "seed"): "InFluxEdit's has no default: a random one is used",
    ("train_influxedit", "num_validation_images"): "images of each of several prompts",
    ("train_influxedit", "validation_steps"): "InFluxEdit's default",
    ("train_influxedit", "validation_width"): "InFluxEdit's default",
    ("train_influxedit", "validation_height"): "InFluxEdit's default",
    ("train_influxedit", "max_sequence_length"): "InFluxEdit's default, of models that all take it",
    ("train_influxedit", "validation_image"): "InFluxEdit's list of files in one text",
    ("train_twinflow", "adam_beta2"): "TwinFlow's default",
    ("train_twinflow", "adam_weight_decay"): "TwinFlow's default",
    ("train_omini", "optimizer"): "OminiControl trains with prodigy, and its configurations name sgd",
    ("train_omini", "learning_rate"): "prodigy's",
    ("train_omini", "adam_weight_decay"): "OminiControl's default",
    ("train_omini", "max_grad_norm"): "OminiControl's default",
    ("train_omini", "guidance_scale"): "OminiControl's default",
    ("train_omini", "timestep_sampling"): "OminiControl's default",
    ("train_omini", "validation_image"): "one image per condition",
    ("train_omini", "lora_path"): "one file per adapter",
}
ALWAYS_DIFFERENT = {"output_dir"}  # a folder of the trainer's own


class Built(Exception):  # noqa: N818
    def __init__(self, parser):
        self.parser = parser


def parser_of(script):
    """The ArgumentParser that a trainer's parse_args builds."""

    def stop(parser, *_):
        raise Built(parser)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Parser, "parse_args", stop)
        with pytest.raises(Built) as built:
            importlib.import_module(script).parse_args([])
    return built.value.parser


def flags_of(script):
    """The flags that have a value of their own: not --help, and not --network_train_unet_only, which turns one off."""
    no_values = (argparse._HelpAction, argparse._StoreFalseAction)
    return [action for action in parser_of(script)._actions if not isinstance(action, no_values)]


def flags_named(script):
    return {action.dest: action for action in flags_of(script)}


def accepted(action):
    """What a flag's type makes of some words, as text; an error where it refuses a word."""
    results = {}
    for word in ("-1", "0", "0.5", "1", "2", "100", "~/a", "512", "8193", "100000", "1e30", "nan", "word", "a,b"):
        try:
            results[word] = str((action.type or str)(word))
        except (ValueError, argparse.ArgumentTypeError):
            results[word] = "an error"
    return results


# ---------------------------------------------------------------------------------------------------------------------
# Parsers
# ---------------------------------------------------------------------------------------------------------------------


def test_a_shared_flag_is_the_same_in_every_trainer():
    seen = {}
    differences = []
    for script in SCRIPTS:
        for action in flags_of(script):
            if action.dest in ALWAYS_DIFFERENT or (script, action.dest) in DIFFERENT:
                continue
            meaning = {
                "values": accepted(action),
                "default": action.default,
                "choices": list(action.choices or []),
                "nargs": action.nargs,
                "kind": type(action),
                "required": action.required,
            }
            first_script, first_meaning = seen.setdefault(action.dest, (script, meaning))
            for what, value in meaning.items():
                if value != first_meaning[what]:
                    differences.append(
                        f"--{action.dest}: {what} is {first_meaning[what]} in {first_script}, {value} in {script}"
                    )
    assert not differences


def test_the_listed_differences_exist():
    for script, flag in DIFFERENT:
        assert flag in flags_named(script)


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
    assert "@file: a file of options" in help_text


@pytest.mark.parametrize("script", SCRIPTS)
def test_defaults_are_shown_as_they_would_be_typed(script):
    parser = parser_of(script)
    help_text = "".join(parser.format_help().split())  # lines are broken at spaces and hyphens
    for action in flags_of(script):
        if action.default is None or isinstance(action.default, bool) or action.nargs == 0:
            continue
        words = action.default if isinstance(action.default, (list, tuple)) else [action.default]
        shown = "(default: " + " ".join(str(word) for word in words) + ")"
        assert "".join(shown.split()) in help_text, f"--{action.dest}"
        values = [parser._get_value(action, str(word)) for word in words]
        if not isinstance(action.default, str):  # argparse converts text itself
            assert values == list(words), f"--{action.dest}"
        if action.choices:
            assert set(values) <= set(action.choices), f"--{action.dest}"


# ---------------------------------------------------------------------------------------------------------------------
# Parsed commands
# ---------------------------------------------------------------------------------------------------------------------


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


@pytest.mark.parametrize("script", SCRIPTS)
def test_alpha_is_the_rank_unless_it_is_given(script, short_runs, tmp_path):
    words = [str(word) for word in short_runs[script]] + ["--output_dir", str(tmp_path), "--rank", "12"]
    parse_args = importlib.import_module(script).parse_args
    assert parse_args(words).lora_alpha == 12
    assert parse_args([*words, "--lora_alpha", "3"]).lora_alpha == 3


@pytest.mark.parametrize("script", SCRIPTS)
def test_flags_in_a_file_are_those_of_the_command(script, short_runs, tmp_path):
    words = [str(word) for word in short_runs[script]] + ["--output_dir", str(tmp_path / "run")]
    file = tmp_path / "run.args"
    file.write_text(f"# a comment\n{shlex.join(words[:4])}  # another\n{shlex.join(words[4:])}\n")
    trainer = importlib.import_module(script)
    assert vars(trainer.parse_args([f"@{file}"])) == vars(trainer.parse_args(words))


@pytest.mark.parametrize("script", SCRIPTS)
def test_required_flags_are_asked_for(script, capsys):
    required = [action.dest for action in flags_of(script) if action.required]
    with pytest.raises(SystemExit) as stop:
        importlib.import_module(script).parse_args([])
    assert stop.value.code == 2
    error = capsys.readouterr().err
    assert all(f"--{flag}" in error for flag in required)


# ---------------------------------------------------------------------------------------------------------------------
# Launching
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("script", SCRIPTS)
def test_more_workers_than_the_machine_can_run_are_refused(script, short_runs, capsys):
    with pytest.raises(SystemExit) as stop:
        importlib.import_module(script).parse_args(
            [str(word) for word in short_runs[script]] + ["--dataloader_num_workers", "5000"]
        )
    assert stop.value.code == 2
    error = capsys.readouterr().err.split("error: ")[-1]
    assert "--dataloader_num_workers" in error
    assert "5000 is out of range" in error
    assert f"{os.cpu_count()} cores" in error


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_tilde_is_the_home_folder_in_every_flag_of_a_path(script, monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    parser = parser_of(script)
    texts = {"pretrained_model_name_or_path", "cache_dir", "dataset_name", "resume_from_checkpoint"}
    for action in flags_of(script):
        if action.type is Path or action.dest in texts:
            assert str(parser._get_value(action, "~/a")) == f"{tmp_path}/a", f"--{action.dest}"


def test_local_rank_without_a_launcher_is_a_run_of_one_process(train, short_runs, tmp_path, monkeypatch):
    """A launcher that passes it also says in the environment how many processes there are."""
    for name in ("LOCAL_RANK", "WORLD_SIZE", "RANK"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")  # left over in a shell
    script = "train_dreambooth_flux_advanced"
    train(script, *short_runs[script], "--max_train_steps", 1, "--local_rank=0", "--output_dir", tmp_path)
    assert (tmp_path / "pytorch_lora_weights.safetensors").exists()


ODD = {"position_delta": "{},0", "probs": "e2e={}", "time_dist_ctrl": "{}"}  # flags whose numbers stand within text


@pytest.mark.parametrize("script", SCRIPTS)
def test_no_flag_takes_a_number_that_is_none(script):
    numbers = 0
    for action in flags_of(script):
        form = ODD.get(action.dest, "{}")
        if action.type is None or not takes(action, form.format("0.5")):
            continue
        if action.type(form.format("0.5")) in (form.format("0.5"), Path(form.format("0.5"))):
            continue  # text
        numbers += 1
        for word in ("nan", "inf", "-inf", "1e999", "9" * 400):
            assert not takes(action, form.format(word)), f"{action.option_strings[0]} {form.format(word)}"
    assert numbers > 5


def takes(action, text):
    try:
        action.type(text)
    except (argparse.ArgumentTypeError, ValueError):
        return False
    return True


@pytest.mark.parametrize("script", SCRIPTS)
def test_every_trainer_reads_the_forms_that_people_have_datasets_in(script, short_runs, tmp_path):
    """Whatever `datasets` reads; or a message that names the flag."""
    module = importlib.import_module(script)
    flags = [str(flag) for flag in short_runs[script]]
    place = flags.index("--train_data_dir" if script == "train_twinflow" else "--instance_data_dir")
    del flags[place : place + 2]
    captions = script in ("train_omini", "train_twinflow")  # without --caption_column
    for flag in ("--target_data_dir", "--caption_data_dir", "--mode"):
        if flag in flags:
            place = flags.index(flag)
            del flags[place : place + 2]
    if script == "train_influxedit":
        flags += ["--mode", "mask", "--use_split_mask"]
    for i, kind in enumerate(DATASETS):
        write_dataset(kind, tmp_path / str(i))
        source = ["--dataset_name", tmp_path / str(i)]
        if script == "train_omini" and kind.startswith("tar"):
            source = ["--data_files", tmp_path / str(i) / "*.tar"]
        column = [] if captions else ["--caption_column", "json.caption" if kind.endswith("json") else "text"]
        if kind.endswith("txt") and not captions:
            column = ["--caption_column", "txt"]
        args = module.parse_args([*flags, *map(str, [*source, *column, "--cache_dir", tmp_path / "cache"])])
        examples, problems = module.find_examples(args)
        assert not problems, (kind, problems)
        assert [example.caption for example in examples] == [f"a {color} image" for color in COLORS.values()], kind
        assert [color_of(example) for example in examples] == list(COLORS.values())
    if script != "train_omini":
        _, problems = module.find_examples(module.parse_args([*flags, "--dataset_name", str(tmp_path / "none")]))
        assert problems[0].startswith(f"--dataset_name {tmp_path / 'none'}: ")


@pytest.mark.parametrize("script", SCRIPTS)
def test_the_total_batch_does_not_multiply_the_rate_that_prodigy_finds(script, short_runs, capsys):
    flags = [*short_runs[script], "--optimizer", "prodigy", "--learning_rate", 1, "--scale_lr"]
    with pytest.raises(SystemExit) as stop:
        importlib.import_module(script).parse_args([str(flag) for flag in flags])
    assert stop.value.code == 2
    assert "--scale_lr multiplies" in capsys.readouterr().err
