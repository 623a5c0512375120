"""Wrong input of every trainer and every program of examples/, generated from their flags and from damaged files: one
message, exit code 2, nothing is written and no model is loaded."""

import importlib
import json
import math
from pathlib import Path

from common.arguments import LR_SCHEDULERS, Parser
from common.lora import add_lora, save_lora

import pytest
import torch
from accelerate.state import AcceleratorState, GradientState, PartialState
from diffusers import ModelMixin
from diffusers.optimization import SchedulerType
from PIL import Image
from transformers import PreTrainedModel


TRAINERS = ["train_dreambooth_flux_advanced", "train_omini", "train_influxedit", "train_twinflow"]
GENERATORS = [f"examples.{name}.generate" for name in ("dreambooth", "omini", "influxedit", "twinflow")]
TOOLS = [
    *("examples.report", "examples.convert_lora", "examples.estimate_memory", "examples.toy.compare"),
    *("examples.toy.pretrain", "examples.toy.world", "examples.twinflow.compare"),
    *("examples.influxedit.combine_images", "examples.influxedit.prepare_fill_circles"),
    *("examples.influxedit.toy_circles", "examples.suggest"),
]
PROGRAMS = [*TRAINERS, *GENERATORS, *TOOLS]
LORA = "pytorch_lora_weights.safetensors"
WRITTEN = {"--output", "--output_dir", "--disk_cache_dir", "--work_dir", "--make_data"}  # flags of what is written


@pytest.fixture(scope="module")
def place(tiny_model, tiny_fill, pictures, pairs, tmp_path_factory):
    """A folder with the runs, LoRA files, images and archives that the commands below name."""
    import train_omini as omini
    from examples.dreambooth import generate as dreambooth_generate
    from examples.influxedit import generate as influx_generate
    from examples.influxedit.toy_circles import write_archive

    folder = tmp_path_factory.mktemp("place")
    transformers = {}
    for name, model in (("flux", tiny_model), ("fill", tiny_fill)):
        from diffusers import FluxTransformer2DModel

        transformers[name] = FluxTransformer2DModel.from_pretrained(model, subfolder="transformer")
        add_lora(transformers[name], rank=1, alpha=1, dropout=0.0, target_modules=["attn.to_q"])
    flags = {
        "dreambooth": dreambooth_generate.WITHOUT_RUN
        | {"pretrained_model_name_or_path": tiny_model, "token_abstraction": "TOK", "resolution": 32},
        "influxedit": influx_generate.WITHOUT_RUN
        | {"pretrained_model_name_or_path": tiny_fill, "mode": "edit", "resolution": [32]},
        "twinflow": {
            "pretrained_model_name_or_path": tiny_model,
            "model_type": "flux",
            "training": "lora",
            "resolution": 32,
        },
    }
    for name, values in flags.items():
        (folder / name).mkdir()
        (folder / name / "args.json").write_text(json.dumps({"args": values}, default=str))
        save_lora(folder / name, {"transformer": transformers["fill" if name == "influxedit" else "flux"]})
        (folder / name / "metrics.jsonl").write_text('{"step": 1, "loss": 1.0, "lr": 0.1}\n')
    words = ["--pretrained_model_name_or_path", tiny_model, "--instance_data_dir", pictures, "--target_size", 32]
    args = omini.parse_args([str(word) for word in [*words, "--condition_type", "canny"]])
    header = omini.adapter_metadata(args, omini.condition_specs(args), "canny")
    save_lora(folder, {"transformer": transformers["flux"]}, weight_name="canny.safetensors", header=header)
    (folder / "bare.safetensors").write_bytes((folder / "dreambooth" / LORA).read_bytes())
    Image.new("RGB", (48, 32), "red").save(folder / "0.png")
    write_archive(folder / "circles.zip", count=2)
    for name in ("images", "targets"):
        (folder / name).symlink_to(pairs / name)
    return folder


@pytest.fixture
def commands(place, short_runs, monkeypatch):
    """{program: words of a command that would work}; the programs start in `place`."""
    monkeypatch.chdir(place)
    words = {
        "examples.dreambooth.generate": "dreambooth --prompt x",
        "examples.omini.generate": "canny.safetensors --prompt x --image 0.png",
        "examples.influxedit.generate": "influxedit --prompt x --image 0.png",
        "examples.twinflow.generate": "twinflow --prompt x",
        "examples.report": "dreambooth",
        "examples.convert_lora": "bare.safetensors converted.safetensors",
        "examples.estimate_memory": "",
        "examples.toy.compare": "dreambooth",
        "examples.toy.pretrain": "",
        "examples.toy.world": "glyph drawn",
        "examples.twinflow.compare": "twinflow",
        "examples.influxedit.combine_images": "--dir_a images --dir_b targets --output_dir joined",
        "examples.influxedit.prepare_fill_circles": "--zip circles.zip --output prepared",
        "examples.influxedit.toy_circles": "new.zip",
        "examples.suggest": "images --gpu 12GB",
    }
    commands = {name: text.split() for name, text in words.items()}
    for name, flags in short_runs.items():
        commands[name] = [*map(str, flags), "--output_dir", "run"]
    return commands


@pytest.fixture
def refused(place, monkeypatch, capsys, record_property):
    """refused(program, words): the message of a command that must be refused before a model is loaded, with nothing
    written."""

    def no_model(*args, **kwargs):
        raise AssertionError("a model was loaded")

    for model_class in (ModelMixin, PreTrainedModel):
        monkeypatch.setattr(model_class, "from_pretrained", no_model)

    def run(program, words):
        before = snapshot(place)
        capsys.readouterr()
        with pytest.raises(SystemExit) as stop:
            start(program, words)
        error = capsys.readouterr().err
        assert stop.value.code == 2, (words, stop.value.code)
        assert "Traceback" not in error
        assert error.count("error: ") == 1, (words, error)
        message = error.partition("error: ")[2]
        assert message.count("\n") == 1 or message.startswith("\n  "), (words, message)
        assert snapshot(place) == before, words
        record_property("wrong inputs refused", 1)
        return message

    return run


def start(program, words):
    module = importlib.import_module(program)
    for state in (AcceleratorState, GradientState, PartialState):
        state._reset_state()
    try:
        if program in TRAINERS:
            module.main(module.parse_args(words))
        else:
            code = module.main(words)
            if code:
                raise SystemExit(code)
    finally:
        for state in (AcceleratorState, GradientState, PartialState):
            state._reset_state()


def snapshot(folder):
    """{path: its time of change and size} of all below a folder."""
    found = {}
    for path in folder.rglob("*"):
        status = path.lstat()
        found[path] = (status.st_mtime_ns, status.st_size)
    return found


class FoundParser(Exception):
    """Carries the parser of a program out of it."""


def actions_of(program, monkeypatch):
    """The flags of a program, as argparse holds them."""

    def leave(parser, argv=None):
        raise FoundParser(parser)

    with monkeypatch.context() as patch:
        patch.setattr(Parser, "parse_args", leave)
        with pytest.raises(FoundParser) as found:
            start(program, [])
    return found.value.args[0]._actions


def wrong_values(action):
    """Values that a flag must refuse: words that are no numbers, numbers out of its range, unknown choices, folders
    and files that are not there or are something else."""
    flag = action.option_strings[0]
    name = getattr(action.type, "__name__", "")
    if action.nargs == 0 or type(action).__name__ in ("OnSwitch", "Switch"):
        return ["maybe"]
    if action.choices:
        return ["nosuch"]
    if name in ("int", "float", "whole number", "number"):
        values = ["x", "nan", "inf", "-inf", "1e999", "", "0x10"]
        for value in ("-1", "0", "1.5", "4294967296", "99999999999999999999"):
            try:
                number = action.type(value)
            except (ValueError, TypeError, OverflowError):
                values.append(value)
            except Exception:  # argparse's own
                values.append(value)
            else:
                assert math.isfinite(number)
        return values
    if action.type is Path:
        if flag in WRITTEN:
            return ["0.png/below", "\0"] if flag != "--disk_cache_dir" else []
        return [] if flag == "--logging_dir" else ["nowhere/at/all"]
    return []


def misspelt(flag):
    return flag + flag[-1] + "q"


def argument_cases(program, monkeypatch):
    """(words to add to a working command) of wrong values of each flag, and of misspelt flags."""
    for action in actions_of(program, monkeypatch):
        if not action.option_strings or action.option_strings[0] == "-h":
            continue
        flag = action.option_strings[0]
        count = action.nargs if isinstance(action.nargs, int) else 1
        for value in wrong_values(action):
            yield [flag, *[value] * max(count, 1)] if not value.startswith("-") else [f"{flag}={value}"]
        yield [misspelt(flag), "1"]


def quick(names, *few):
    """The programs as parameters: all but `few` are slow."""
    return [pytest.param(name, marks=[] if name in few else pytest.mark.slow) for name in names]


@pytest.mark.parametrize("program", quick(PROGRAMS, "examples.toy.world", "examples.dreambooth.generate"))
def test_wrong_values_of_every_flag(commands, refused, monkeypatch, program):
    accepted = []
    for words in argument_cases(program, monkeypatch):
        try:
            refused(program, [*commands[program], *words])
        except (Exception, pytest.fail.Exception) as error:
            accepted.append((words, repr(error)[:300]))
    assert accepted == []


def test_images_are_drawn_with_seeds_of_other_programs(monkeypatch):
    for name in ("dreambooth", "omini", "influxedit", "twinflow"):
        actions = actions_of(f"examples.{name}.generate", monkeypatch)
        (seed,) = (action for action in actions if action.dest == "seed")
        torch.Generator().manual_seed(seed.type("156680208700286") + 1)  # ComfyUI's have 64 bits


def test_the_schedules_are_those_of_diffusers():
    assert set(LR_SCHEDULERS) == {scheduler.value for scheduler in SchedulerType} - {"piecewise_constant"}


# ---------------------------------------------------------------------------------------------------------------------
# Files that are damaged, gone, of another program, or in the way
# ---------------------------------------------------------------------------------------------------------------------


def cut(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def empty(path):
    path.write_bytes(b"")


def text(path):
    path.write_text('{"args": 5')


def as_folder(path):
    path.unlink()
    path.mkdir()


DAMAGES = [cut, empty, text, as_folder, Path.unlink]
FILES = {  # {program: (its command, the file that is damaged)}
    "examples.dreambooth.generate": [
        ("dreambooth --prompt x", f"dreambooth/{LORA}"),
        ("dreambooth --prompt x", "dreambooth/args.json"),
        (f"dreambooth/{LORA} --prompt x", f"dreambooth/{LORA}"),
    ],
    "examples.omini.generate": [
        ("canny.safetensors --prompt x --image 0.png", "canny.safetensors"),
        ("canny.safetensors --prompt x --image 0.png", "0.png"),
        ("canny.safetensors bare.safetensors --condition_type canny --prompt x --image 0.png", "bare.safetensors"),
    ],
    "examples.influxedit.generate": [
        ("influxedit --prompt x --image 0.png", f"influxedit/{LORA}"),
        ("influxedit --prompt x --image 0.png", "influxedit/args.json"),
        ("influxedit --prompt x --image 0.png", "0.png"),
    ],
    "examples.twinflow.generate": [
        ("twinflow --prompt x", f"twinflow/{LORA}"),
        ("twinflow --prompt x", "twinflow/args.json"),
    ],
    "examples.toy.compare": [("dreambooth", f"dreambooth/{LORA}")],
    "examples.twinflow.compare": [("twinflow", f"twinflow/{LORA}"), ("twinflow", "twinflow/args.json")],
    "examples.convert_lora": [("bare.safetensors converted.safetensors", "bare.safetensors")],
    "examples.report": [("dreambooth", "dreambooth/metrics.jsonl")],
    "examples.influxedit.prepare_fill_circles": [("--zip circles.zip --output prepared", "circles.zip")],
}


@pytest.mark.parametrize("program", quick(FILES, "examples.convert_lora", "examples.twinflow.generate"))
def test_damaged_files(place, commands, refused, program):
    for command, name in FILES[program]:
        path = place / name
        whole = path.read_bytes()
        for damage in DAMAGES:
            damage(path)
            try:
                message = refused(program, command.split())
            finally:
                if path.is_dir():
                    path.rmdir()
                path.write_bytes(whole)
            assert name.split("/")[0].split(".")[0] in message, (command, name, damage)


OTHERS = {  # {program: commands whose input is of another kind, or whose output is in the way}
    "examples.dreambooth.generate": [
        *("influxedit --prompt x", "twinflow --prompt x", "images --prompt x", "0.png --prompt x"),
        *("bare.safetensors --prompt x", "dreambooth --prompt x --size 0 0", "dreambooth --prompt x --size 40 32"),
        "dreambooth --prompt x --pretrained_model_name_or_path some.safetensors",
        "dreambooth --prompt x --output 0.png",
        "dreambooth",
    ],
    "examples.omini.generate": [
        *("dreambooth --prompt x --image 0.png", "influxedit --prompt x --image 0.png"),
        *("canny.safetensors --prompt x", "canny.safetensors --prompt x --image 0.png circles.zip"),
        *(
            "canny.safetensors --prompt x --image 0.png --output image.xyz",
            "canny.safetensors --prompt x --image images",
        ),
        *("canny.safetensors --prompt x --image 0.png --size 0 0", "canny.safetensors --prompt x --image circles.zip"),
        "canny.safetensors --prompt x --image 0.png --mask 0.png",
        "canny.safetensors --prompt x --image 0.png --output images",
        "canny.safetensors --prompt x --image 0.png --kv_cache",
    ],
    "examples.influxedit.generate": [
        *("dreambooth --prompt x --image 0.png", "twinflow --prompt x --image 0.png"),
        *(
            "influxedit --prompt x",
            "influxedit --prompt x --image images",
            "influxedit --prompt x --image circles.zip",
        ),
        *("influxedit --prompt x --image 0.png --mask 0.png", "influxedit --prompt x --image 0.png --mode mask"),
        *("influxedit --prompt x --image 0.png --size 0 0", "influxedit --prompt x --image 0.png --output 0.png"),
        "influxedit --prompt x --image 0.png --keep_unmasked",
    ],
    "examples.twinflow.generate": [
        *("dreambooth --prompt x", "influxedit --prompt x", "images --prompt x", "0.png --prompt x"),
        *("twinflow --prompt x --size 0 0", "twinflow --prompt x --size 40 32", "twinflow --prompt x --image 0.png"),
        *("twinflow --prompt x --gaps 0.5 0.5", "twinflow --prompt x --order 2 --style few", "twinflow --prompt"),
        *("twinflow --prompt x --stochast_ratio 2", "twinflow --prompt x --output 0.png"),
    ],
    "examples.toy.compare": ["images", "nowhere", "0.png", "dreambooth --output images", "dreambooth --output x.xyz"],
    "examples.twinflow.compare": [
        *("dreambooth", "images", "twinflow --output grid.xyz", "--make_data images", "twinflow --make_data new"),
    ],
    "examples.convert_lora": [
        *("0.png out.safetensors", "nowhere out.safetensors", "dreambooth out.safetensors", "bare.safetensors"),
        *("bare.safetensors bare.safetensors", "bare.safetensors images", "bare.safetensors 0.png/out.safetensors"),
    ],
    "examples.report": ["nowhere", "images", "0.png", "canny.safetensors", ""],
    "examples.estimate_memory": [
        *("--fsdp", "--training full --quantize_base nf4", "--training full --model FLUX.1-Fill-dev", "dreambooth"),
        *("--resolution 40", "--model Sana-1.6B --resolution 48", "--num_processes 2 --fsdp --optimizer prodigy"),
    ],
    "examples.suggest": [
        *("nowhere --gpu 12GB", "0.png --gpu 12GB", "dreambooth --gpu 12GB", "images --gpu 0", "images --gpu 12MB"),
        *("images --gpu 12GB --class_word=", "images --gpu 12GB --class_word a,b", "images 12GB"),
    ],
    "examples.toy.world": ["glyph images", "glyph 0.png", "glyph 0.png/x", "square new", "glyph"],
    "examples.influxedit.toy_circles": ["circles.zip", "images", "0.png/x.zip", "0.png"],
    "examples.influxedit.combine_images": [
        *("--dir_a images --dir_b nowhere --output_dir joined", "--dir_a 0.png --dir_b targets --output_dir joined"),
        *("--dir_a images --dir_b targets --output_dir images", "--dir_a images --dir_b targets --output_dir 0.png"),
        *("--dir_a influxedit --dir_b targets --output_dir joined", "--dir_a images --dir_b targets"),
    ],
    "examples.influxedit.prepare_fill_circles": [
        *("--zip 0.png --output prepared", "--zip images --output prepared", "--zip circles.zip --output 0.png"),
        *("--zip circles.zip --output prepared --test_count 2", "--zip circles.zip --max_gigabytes 0.0000001"),
    ],
}


@pytest.mark.parametrize("program", quick(OTHERS, "examples.report", "examples.influxedit.generate"))
def test_input_of_another_kind_and_output_in_the_way(commands, refused, program):
    for command in OTHERS[program]:
        assert refused(program, command.split())


@pytest.mark.slow
def test_the_number_of_wrong_inputs(monkeypatch):
    flags = sum(len(list(argument_cases(program, monkeypatch))) for program in PROGRAMS)
    others = sum(len(cases) for cases in OTHERS.values())
    print(f"{flags} wrong values of flags, {others} inputs of another kind")
    assert flags + others >= 250
