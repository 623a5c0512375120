"""Damaged and hostile files: every reader works or names the file in one message, and writes nothing beside it."""

import copy
import functools
import importlib
import io
import json
import os
import shutil
import signal
import struct
import zlib
from contextlib import contextmanager
from pathlib import Path

from common.checkpoints import (
    CHECKSUMS,
    checkpoint_conflicts,
    checksums,
    load_checkpoint,
    register_tensor_checkpointing,
    save_checkpoint,
)
from common.latents import TensorCache
from common.lora import (
    add_lora,
    lora_layers,
    register_lora_checkpointing,
    save_lora,
    start_from_lora,
    target_layers,
)
from common.lora_formats import LORA_FORMS, write_lora

import hypothesis.strategies as st
import numpy as np
import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState, PartialState
from conftest import ROOT
from hypothesis import HealthCheck, Phase, given, settings
from PIL import Image
from safetensors.torch import load_file
from test_family import SCRIPTS

from train_dreambooth_flux_advanced import DATASET_OPTIONS, REFUSED_OPTIONS


DREAMBOOTH, INFLUX, OMINI, TWINFLOW = SCRIPTS
SUFFIXES = [".png", ".jpg", ".jpeg", ".webp", ".bmp", ".PNG"]
COUNTS = [100, pytest.param(3000, marks=pytest.mark.slow)]


def fuzz(count, prop, *strategies):
    """Calls `prop` with `count` draws, always the same ones; each has a minute."""

    @settings(
        max_examples=int(os.environ.get("FUZZ", count)),
        deadline=None,
        derandomize="FUZZ" not in os.environ,
        database=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(st.tuples(*strategies))
    def run(values):
        with within(300):
            prop(*values)

    run()


@contextmanager
def within(seconds):
    """Fails if the body takes longer."""

    def stop(number, frame):
        raise AssertionError(f"still busy after {seconds} s")

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def snapshot(root):
    """{path: content} of all files below."""
    return {path: path.read_bytes() for path in sorted(root.rglob("*")) if path.is_file()}


# ---------------------------------------------------------------------------------------------------------------------
# What is read
# ---------------------------------------------------------------------------------------------------------------------


def encoded(mode="RGB", size=(24, 20), format="PNG", frames=1, **options):
    """The bytes of a picture file."""
    pixels = np.random.default_rng(0).integers(0, 255, (size[1], size[0], 3), np.uint8)
    image = Image.fromarray(pixels).convert(mode) if mode != "I;16" else Image.new("I;16", size, 40000)
    if frames > 1:
        options |= {"save_all": True, "append_images": [Image.new(mode, size, i) for i in range(1, frames)]}
    file = io.BytesIO()
    image.save(file, format, **options)
    return file.getvalue()


def png_of(width, height, data=b""):
    """A PNG file that declares a size."""
    chunks = [(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)), (b"IDAT", zlib.compress(data))]
    parts = [
        struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))
        for kind, body in [*chunks, (b"IEND", b"")]
    ]
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


@functools.cache
def picture_files():
    """Whole picture files of many kinds."""
    exif = Image.Exif()
    exif[0x0112], exif[0x010E] = 6, "a description"
    return [
        encoded(),
        encoded("RGBA"),
        encoded("P"),
        encoded("1"),
        encoded("LA"),
        encoded("I;16"),
        encoded(exif=exif),
        encoded("RGBA", frames=3),
        encoded(format="JPEG", exif=exif),
        encoded("CMYK", format="JPEG"),
        encoded("L", format="JPEG", progressive=True),
        encoded(format="WEBP"),
        encoded("RGBA", format="WEBP", lossless=True),
        encoded(format="WEBP", frames=3),
        encoded(format="BMP"),
        encoded("1", format="BMP"),
        encoded("P", format="GIF", frames=3),
        encoded(format="TIFF"),
        encoded("I;16", format="TIFF", compression="tiff_lzw"),
        encoded("F", format="TIFF"),
        encoded("LAB", format="TIFF"),
        encoded(format="ICO"),
        encoded(format="PPM"),
        encoded(format="TGA"),
        encoded(format="PCX"),
        encoded(format="DDS"),
        encoded(format="EPS"),
        encoded(format="AVIF"),
        encoded(size=(1, 3000)),
        encoded(size=(1, 1)),
        png_of(40000, 40000),
        png_of(2**31 - 1, 2**31 - 1),
        png_of(0, 5),
        png_of(3000, 3000, b"\0" * 100),
    ]


@st.composite
def damaged(draw, wholes):
    """One of `wholes`, bytes, as it is, cut, with bits flipped, with a piece replaced, or nothing of it."""
    content = bytearray(draw(st.sampled_from(wholes)))
    for how in draw(st.lists(st.sampled_from(["cut", "flip", "splice", "zero"]), max_size=2)):
        if not content:
            break
        start = draw(st.integers(0, len(content) - 1))
        if how == "cut":
            del content[start:]
        elif how == "flip":
            for place in draw(st.lists(st.integers(0, min(len(content), 400) - 1), min_size=1, max_size=4)):
                content[place] ^= 1 << draw(st.integers(0, 7))
        elif how == "splice":
            content[start : start + draw(st.integers(0, 40))] = draw(st.binary(max_size=40))
        else:
            content[start : start + 4096] = bytes(len(content[start : start + 4096]))
    return bytes(content)


ODD_TEXT = [
    b"",
    b"\n \n",
    b"\xef\xbb\xbfa red circle",
    "a red circle".encode("utf-16"),
    "ein gr\u00fcner Kreis".encode("latin-1"),
    "\u7d05\u3044\u5186".encode("shift-jis"),
    b"a\0red\0circle",
    b"\0",
    b"a " * 500_000,
    "\U0001f534\u200d\u202e\u0301 circle".encode(),
    b"\xed\xa0\x80",
    b"\r\r\x0b\x0c\x85",
    b"<|endoftext|><pad></s><extra_id_0>",
    b"{a|b}{{c}} {",
]


def text_file():
    return st.one_of(st.sampled_from(ODD_TEXT), st.binary(max_size=40), st.text(max_size=40).map(str.encode))


NAMES = [
    "0.png",
    "1.png",
    "2.png",
    "../secret.png",
    "/etc/passwd",
    "./1.png",
    "sub/1.png",
    "0.PNG",
    "",
    "\0",
    "x" * 300,
]
ODD_VALUES = st.one_of(
    st.sampled_from([None, True, 0, -1, 10**30, 1.5, float("nan"), "", "a red circle", "\ud800", "\0", [], {}, ["a"]]),
    st.text(max_size=20),
    st.lists(st.integers(), max_size=2),
)


@st.composite
def metadata_file(draw):
    """metadata.jsonl: rows with odd names, captions and kinds, or no JSON at all."""
    row = st.fixed_dictionaries(
        {},
        optional={
            "file_name": st.one_of(st.sampled_from(NAMES), ODD_VALUES),
            "text": ODD_VALUES,
            "prompt": ODD_VALUES,
            "other": st.one_of(st.sampled_from(NAMES), ODD_VALUES),
        },
    )
    odd = ["[" * 100_000, '{"file_name": "0.png", "text": "a"' + "}" * 3, '{"file_name": "0.png"', "9" * 5000]
    line = st.one_of(row.map(json.dumps), ODD_VALUES.map(json.dumps), st.text(max_size=20), st.sampled_from(odd))
    content = "\n".join(draw(st.lists(line, max_size=4))).encode("utf-8", "surrogatepass")
    return draw(damaged([content])) if draw(st.booleans()) else content


# ---------------------------------------------------------------------------------------------------------------------
# Pictures, captions, flags
# ---------------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def arguments(tiny_model, tiny_fill, tmp_path_factory):
    """arguments(script, *flags): what the trainer's parse_args returns."""
    shared = ["--max_sequence_length", 8, "--output_dir", tmp_path_factory.mktemp("out") / "none"]
    model, fill = (["--pretrained_model_name_or_path", folder] for folder in (tiny_model, tiny_fill))
    own = {
        DREAMBOOTH: [*model, "--resolution", 32],
        OMINI: [*model, "--target_size", 32, "--condition_type"],
        INFLUX: [*fill, "--resolution", 32, "--use_split_mask", "--seed", 0],
        TWINFLOW: [*model, "--model_type", "flux", "--resolution", 32],
    }

    @functools.cache
    def parse(script, *flags):
        kinds = [] if script != OMINI else ["custom"] if "--condition_column" in flags else ["canny"]
        flags = [*shared, *own[script], *kinds, *flags]
        return importlib.import_module(script).parse_args([str(flag) for flag in flags])

    return lambda script, *flags: copy.copy(parse(script, *flags))


FOLDER_FLAG = {TWINFLOW: "train_data_dir"}


@pytest.fixture(scope="module")
def read(arguments, tiny_pipeline):
    """read(script, folder, *flags): the problems that the trainer finds in a folder, [] once it used all of it."""

    def run(script, folder, *flags):
        module, name = importlib.import_module(script), FOLDER_FLAG.get(script, "instance_data_dir")
        args = arguments(script, f"--{name}", ROOT, *flags)
        setattr(args, name, [folder] if script == TWINFLOW else folder)
        before = snapshot(folder.parent)
        examples, problems = module.find_examples(args)
        if not problems:
            use(module, examples, args)
        assert snapshot(folder.parent) == before
        assert all(str(folder) in problem for problem in problems), problems
        return problems

    def use(module, examples, args):
        if module.__name__ == DREAMBOOTH:
            dataset = module.DreamBoothDataset(examples, args)
            prompts = [dataset[0, i][0]["prompt"] for i in range(len(dataset))]
        elif module.__name__ == OMINI:
            dataset = module.OminiDataset(examples, module.condition_specs(args), args)
            prompts = [dataset[0, i]["prompt"] for i in range(len(dataset))]
        elif module.__name__ == INFLUX:
            dataset = module.EditDataset(examples, args)
            for key in dataset.image_keys():
                dataset.pixel_values(key)
            prompts = [example.caption for example in examples]
        else:
            dataset = module.TwinFlowDataset(examples, None, args)
            for index, flipped in dataset.image_keys():
                dataset.pixel_values(examples[index], index, flipped)
            prompts = [caption for example in examples for caption in example.captions]
        tokenize(prompts)

    def tokenize(prompts):
        for tokenizer in (tiny_pipeline.tokenizer, tiny_pipeline.tokenizer_2):
            tokenizer(prompts, truncation=True, max_length=8, padding="max_length", return_tensors="pt")

    run.tokenize = tokenize
    return run


@pytest.fixture
def folder(tmp_path):
    """Empties and returns a folder, beside which a secret lies."""
    (tmp_path / "secret.png").write_bytes(picture_files()[0])

    def make():
        shutil.rmtree(tmp_path / "data", ignore_errors=True)
        (tmp_path / "data").mkdir()
        return tmp_path / "data"

    return make


@pytest.mark.parametrize("count", COUNTS)
@pytest.mark.parametrize("script", SCRIPTS)
def test_pictures(read, folder, script, count):
    def prop(content, suffix):
        data = folder()
        (data / f"0{suffix}").write_bytes(content)
        (data / "0.txt").write_text("a red circle")
        read(script, data)

    # InFluxEdit checks a PNG file's checksums and does not decode it
    wholes = picture_files()[: -1 if script == INFLUX else None]
    fuzz(count, prop, st.one_of(damaged(wholes), st.binary(max_size=60)), st.sampled_from(SUFFIXES))


@pytest.mark.parametrize("count", [20, pytest.param(500, marks=pytest.mark.slow)])
@pytest.mark.parametrize("script", SCRIPTS)
def test_captions(read, folder, script, count):
    def prop(content):
        data = folder()
        (data / "0.png").write_bytes(picture_files()[0])
        (data / "0.txt").write_bytes(content)
        read(script, data)

    fuzz(count, prop, text_file())


@pytest.mark.parametrize("count", COUNTS)
@pytest.mark.parametrize("script", SCRIPTS)
def test_metadata(read, folder, script, count):
    def prop(content):
        data = folder()
        for i in range(2):
            (data / f"{i}.png").write_bytes(picture_files()[0])
        (data / "metadata.jsonl").write_bytes(content)
        read(script, data)
        if script == OMINI:
            read(script, data, "--condition_column", "other")

    fuzz(count, prop, metadata_file())


def test_what_is_no_file_in_a_folder(read, folder):
    """Folders, links and names that are no UTF-8, where pictures and captions are looked for."""
    for script in SCRIPTS:
        data = folder()
        for kind in ("0.png", "1.txt", "metadata.jsonl"):
            (data / kind).mkdir()
        (data / "1.png").write_bytes(picture_files()[0])
        (data / "2.png").symlink_to(data / "nowhere.png")
        (data / "3.png").symlink_to(data.parent / "secret.png")
        (data / "4.png").symlink_to("4.png")
        problems = "\n".join(read(script, data))
        for name in ("0.png", "1.txt", "2.png", "4.png", "metadata.jsonl"):
            assert f"/{name}" in problems
        data = folder()
        odd = Path(os.fsdecode(bytes(data) + b"/a\xff\xfe.png"))
        odd.write_bytes(picture_files()[0])
        odd.with_suffix(".txt").write_text("a red circle")
        (data / "3.png").symlink_to(data.parent / "secret.png")
        (data / "3.txt").write_text("a red circle")
        assert read(script, data) == []


@pytest.mark.parametrize("count", [20, pytest.param(500, marks=pytest.mark.slow)])
def test_prompts_file(arguments, read, tmp_path, count):
    def prop(content):
        (tmp_path / "prompts").write_bytes(content)
        examples, problems = importlib.import_module(TWINFLOW).find_examples(args)
        assert all(str(tmp_path / "prompts") in problem for problem in problems)
        if not problems:
            read.tokenize([example.captions[0] for example in examples])

    flags = ("--image_free", "--prompts_file", tmp_path / "prompts", "--ema_decay_rate", 1, "--enhanced_ratio", 0.5)
    args = arguments(TWINFLOW, *flags)
    fuzz(count, prop, text_file())


TEXTS = [
    "",
    "a circle",
    "{a|b}",
    "|",
    "lanczos",
    "/../../secret",
    ".",
    "..",
    "txt",
    "~nobody/x",
    "~",
    "/",
    "\0",
    "\ud800",
]
NUMBERS = [0, 1, 2, 16, 64, 10**6, 2**31, 16 * 10**9, 16 * 10**30, 0.5, 1e-300]
LISTS = [[32, 64], [32], [16, 16 * 10**9], [16, 4096]]


@st.composite
def dataset_config(draw):
    """A file for --dataset_config, (ending, content): a good one in which up to three things are odd."""

    subset = {"image_dir": "data", "class_tokens": "a circle", "caption_extension": ".txt"}
    dataset = {"resolution": 32, "enable_bucket": True, "subsets": [subset]}
    config = {"general": {}, "datasets": [dataset]}
    places = [subset, dataset, config["general"], config]
    for _ in range(draw(st.integers(0, 3))):
        place = draw(st.sampled_from(places))
        options = [name for name, option in DATASET_OPTIONS.items() if "general" in option.tables]
        options = [*DATASET_OPTIONS] if place is subset else options
        others = [
            *DATASET_OPTIONS,
            *REFUSED_OPTIONS,
            "unknown",
            "subsets",
            "datasets",
            "general",
        ]
        name = draw(st.sampled_from(options * 4 + others))
        option = DATASET_OPTIONS.get(name)
        values = [True, False, *TEXTS, *NUMBERS, *LISTS]
        values = [value for value in values if option and option.type.accepts(value)]
        place[name] = draw(st.sampled_from(values) if values and draw(st.integers(0, 5)) else ODD_VALUES)
    return ".json", draw(st.one_of(st.just(json.dumps(config).encode()), damaged([json.dumps(config).encode()])))


def toml_file():
    """The same as TOML, damaged."""
    whole = b"[general]\nenable_bucket = true\n[[datasets]]\nresolution = 32\n[[datasets.subsets]]\n"
    whole += b'image_dir = "data"\nclass_tokens = "a circle"\nnum_repeats = 2\n'
    odd = [b"a = " + b"[" * 50_000, b"[" * 50_000, b"a.b" + b".b" * 5000 + b" = 1", b"a = 1e99999", b"[datasets]\n"]
    return st.tuples(st.just(".toml"), st.one_of(damaged([whole]), st.sampled_from(odd)))


@pytest.mark.parametrize("count", [150, pytest.param(4000, marks=pytest.mark.slow)])
def test_dataset_config(arguments, read, folder, count):
    import train_dreambooth_flux_advanced as dreambooth

    data = folder()
    for i in range(2):
        (data / f"{i}.png").write_bytes(picture_files()[0])
        (data / f"{i}.txt").write_text("a red, {round|big} circle, on the left")
    args = arguments(DREAMBOOTH, "--dataset_config", ROOT)

    def prop(config):
        suffix, content = config
        args.dataset_config = data.parent / f"config{suffix}"
        args.dataset_config.write_bytes(content)
        before = snapshot(data.parent)
        examples, problems = dreambooth.find_examples(args)
        assert all(str(data.parent) in problem for problem in problems), problems
        if not problems:
            dataset = dreambooth.DreamBoothDataset(examples, args)
            read.tokenize([dataset[0, i][0]["prompt"] for i in range(min(4, len(dataset)))])
        assert snapshot(data.parent) == before

    fuzz(count, prop, dataset_config())
    fuzz(count // 4, prop, toml_file())


@pytest.mark.parametrize("count", [25, pytest.param(500, marks=pytest.mark.slow)])
@pytest.mark.parametrize("script", SCRIPTS)
def test_flags_in_a_file(script, tmp_path, capsys, count):
    module, path = importlib.import_module(script), tmp_path / "run.args"

    def prop(content):
        path.write_bytes(content)
        with pytest.raises(SystemExit) as stop:
            module.parse_args([f"@{path}"])
        assert stop.value.code == 2
        assert "error:" in capsys.readouterr().err

    whole = f'--pretrained_model_name_or_path={tmp_path}  # "it\'s\n--seed 0\n--instance_prompt "a circle"\n'.encode()
    odd = [b'--seed "0\n', b"@" + bytes(path) + b"\n", b"--seed '\xff'\n", b"\\", b"--help\0"]
    fuzz(count, prop, st.one_of(damaged([whole]), st.sampled_from(odd), st.binary(max_size=40)))


# ---------------------------------------------------------------------------------------------------------------------
# LoRA files
# ---------------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def adapter(tiny_pipeline):
    """(the tiny transformer with an adapter, the adapter's layers as (name, module))."""
    import train_omini as omini

    transformer = copy.deepcopy(tiny_pipeline.transformer)
    layers = target_layers(transformer, omini.TARGET_MODULES)
    add_lora(transformer, rank=2, alpha=2, dropout=0, target_modules=omini.TARGET_MODULES)
    return transformer, layers


@pytest.fixture(scope="module")
def lora_files(adapter, tmp_path_factory):
    """Whole LoRA files in all forms; the first is that of `adapter`."""
    folder = tmp_path_factory.mktemp("loras")
    save_lora(folder, {"transformer": adapter[0]})
    for form in LORA_FORMS:
        write_lora(folder / f"{form}.safetensors", lora_layers({"transformer": adapter[0]}), form)
    paths = [folder / "pytorch_lora_weights.safetensors", *(folder / f"{form}.safetensors" for form in LORA_FORMS)]
    return [path.read_bytes() for path in paths]


@st.composite
def tensor_file(draw, wholes):
    """One of the safetensors files `wholes`, damaged, or with another header before its numbers."""
    if draw(st.booleans()):
        return draw(damaged(wholes))
    whole = draw(st.sampled_from(wholes))
    length = int.from_bytes(whole[:8], "little")
    header, numbers = json.loads(whole[8 : 8 + length]), whole[8 + length :]
    for _ in range(draw(st.integers(0, 3))):
        name = draw(st.sampled_from(sorted(header)))
        how = draw(st.sampled_from(["drop", "rename", "dtype", "shape", "offsets", "odd", "metadata"]))
        entry = header[name]
        if how == "drop":
            del header[name]
        elif how == "rename":
            endings = ["", ".alpha", ".lora_A.weight", ".lora_up.weight", ".lora_down.weight", "lora_unet_x", "\ud800"]
            header[draw(st.sampled_from(endings))] = header.pop(name)
        elif how == "odd":
            header[name] = draw(ODD_VALUES)
        elif how == "metadata":
            texts = ["", "{", "[]", "5", '{"transformer.r": "x"}', '{"transformer.lora_alpha": []}', "[" * 50_000]
            key = draw(st.sampled_from(["lora_adapter_metadata", "format", "x"]))
            header["__metadata__"] = {key: draw(st.sampled_from(texts))}
        elif isinstance(entry, dict) and "shape" in entry:
            values = {
                "dtype": ["I8", "U8", "BOOL", "I32", "F16", "F8_E4M3", "F64", "F4", "X"],
                "shape": [[], [0], [-1], entry["shape"][::-1], [2**62, 4], [1, *entry["shape"]], entry["shape"][:1]],
                "offsets": [[0, 0], [0, 2**63], [10, 5], entry["data_offsets"][::-1]],
            }
            header[name] = entry | {"data_offsets" if how == "offsets" else how: draw(st.sampled_from(values[how]))}
    text = json.dumps(header).encode()
    length = draw(st.sampled_from([len(text)] * 6 + [0, 1, len(text) + 100, 2**40, 2**63, 2**64 - 1]))
    return length.to_bytes(8, "little") + text + numbers


@pytest.mark.parametrize("count", [150, pytest.param(5000, marks=pytest.mark.slow)])
def test_lora_files(arguments, adapter, lora_files, tmp_path, capsys, count):
    """As --lora_path, and in examples/convert_lora.py."""
    from examples import convert_lora

    omini, (transformer, layers) = importlib.import_module(OMINI), adapter
    args = arguments(OMINI, "--instance_data_dir", ROOT, "--rank", 2)
    args.lora_path = [tmp_path / "in.safetensors"]
    read = []

    def prop(content):
        args.lora_path[0].write_bytes(content)
        problems = omini.check_lora_path(args, layers)
        assert all(str(args.lora_path[0]) in problem for problem in problems)
        if not problems:
            start_from_lora(args.lora_path[0], {"transformer": transformer})
        read.append(not problems)
        try:
            convert_lora.main([str(args.lora_path[0]), str(tmp_path / "out.safetensors"), "--to", "kohya"])
        except SystemExit as stop:
            assert stop.code == 2
            assert str(args.lora_path[0]) in capsys.readouterr().err
        (tmp_path / "out.safetensors").unlink(missing_ok=True)
        assert [path.name for path in tmp_path.iterdir()] == ["in.safetensors"]

    prop(lora_files[0])
    assert read == [True]
    fuzz(count, prop, tensor_file(lora_files))
    assert 0 < sum(read) < len(read)


# ---------------------------------------------------------------------------------------------------------------------
# Checkpoints
# ---------------------------------------------------------------------------------------------------------------------


@pytest.fixture
def saved(adapter, tmp_path_factory):
    """(accelerator, schedule of the learning rate, folder with checkpoint-1 and checkpoint-2)."""
    folder, accelerator = tmp_path_factory.mktemp("saved"), Accelerator(cpu=True)
    parameters = [parameter for parameter in adapter[0].parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0)  # as diffusers' schedules are
    register_lora_checkpointing(accelerator, {"transformer": adapter[0]}, optimizer)
    register_tensor_checkpointing(accelerator, {"average": {f"p{i}": p for i, p in enumerate(parameters)}})
    optimizer, schedule = accelerator.prepare(optimizer, schedule)
    for step in (1, 2):
        for parameter in parameters:
            parameter.grad = torch.ones_like(parameter)
        optimizer.step()
        save_checkpoint(accelerator, folder, step, {"seed": "5"})
    yield accelerator, schedule, folder
    accelerator.free_memory()
    for state in (AcceleratorState, GradientState, PartialState):
        state._reset_state()


@pytest.mark.parametrize("count", [80, pytest.param(3000, marks=pytest.mark.slow)])
def test_checkpoints(saved, tmp_path, capsys, count):
    """Whatever becomes of a file is seen before anything is loaded; files that were saved so end the run, or load."""
    accelerator, schedule, folder = saved
    files = {path.name: path.read_bytes() for path in (folder / "checkpoint-2").iterdir()}
    assert {"optimizer.bin", "scheduler.bin", "random_states_0.pkl", "state.safetensors", CHECKSUMS} < files.keys()
    loaded = []

    def prop(name, how):
        checkpoint = tmp_path / "checkpoint-2"
        shutil.rmtree(checkpoint, ignore_errors=True)
        shutil.copytree(folder / "checkpoint-2", checkpoint)
        (tmp_path / "checkpoint-1").mkdir(exist_ok=True)
        content = how(files[name])
        if content is None:
            (checkpoint / name).unlink()
        else:
            (checkpoint / name).write_bytes(content)
        problems = checkpoint_conflicts(checkpoint, {"seed": "5"})
        assert len(problems) == (content != files[name]) or name == CHECKSUMS and same_json(content, files[name])
        for problem in problems:
            assert str(checkpoint) in problem
            assert name in problem or name == CHECKSUMS  # which may name another
            assert "continue from checkpoint-1" in problem
        if name != CHECKSUMS:  # as if it had been saved like that
            (checkpoint / CHECKSUMS).unlink()
            (checkpoint / CHECKSUMS).write_text(json.dumps(checksums(checkpoint)))
            if checkpoint_conflicts(checkpoint, {}):
                return
            try:
                loaded.append(load_checkpoint(accelerator, checkpoint, schedule) >= 0)
            except SystemExit as stop:
                assert stop.code == 2
                assert str(checkpoint) in capsys.readouterr().err

    prop("optimizer.bin", lambda whole: whole)
    assert loaded == [True]
    ways = st.one_of(
        st.just(lambda whole: None),
        st.binary(max_size=30).map(lambda other: lambda whole: other),
        st.sampled_from([b"{}", b"[]", b'{"global_step": "2"}', b'{"global_step": -1}', b"[" * 99_999]).map(
            lambda other: lambda whole: other
        ),
        st.randoms(use_true_random=False).map(lambda rng: lambda whole: whole[: rng.randrange(len(whole))]),
        st.randoms(use_true_random=False).map(lambda rng: lambda whole: flipped(whole, rng)),
    )
    fuzz(count, prop, st.sampled_from(sorted(files)), ways)


def same_json(content, other):
    try:
        return json.loads(content) == json.loads(other)
    except ValueError:
        return False


def flipped(content, rng):
    """The bytes with one bit changed."""
    content = bytearray(content)
    content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
    return bytes(content)


@pytest.fixture(scope="module")
def run_flags(tiny_model, tiny_fill, pictures, pairs):
    """{script: flags of a short run}."""
    shared = ["--max_sequence_length", 8, "--report_to", "none", "--checkpointing_steps", 1, "--max_train_steps", 2]
    model, fill = (["--pretrained_model_name_or_path", folder] for folder in (tiny_model, tiny_fill))
    data, own = ["--instance_data_dir", pictures], ["--rank", 2, "--train_batch_size", 2]
    combined = ["--instance_data_dir", pairs / "combined", "--caption_data_dir", pairs / "captions"]
    return {
        DREAMBOOTH: [*model, *data, *own, *shared, "--resolution", 32],
        OMINI: [*model, *data, *own, *shared, "--target_size", 32, "--condition_type", "canny"],
        INFLUX: [*fill, *combined, *own, *shared, "--resolution", 32, "--use_split_mask"],
        TWINFLOW: [*model, "--train_data_dir", pictures, *shared, "--model_type", "flux", "--resolution", 32],
    }


@pytest.mark.parametrize(
    "script", [pytest.param(script, marks=[] if script == DREAMBOOTH else pytest.mark.slow) for script in SCRIPTS]
)
def test_a_run_with_a_damaged_checkpoint(train, run_flags, script, tmp_path, capsys):
    """One message for each file of the newest checkpoint, nothing changed; without it, the run goes on from the one
    before to the same weights."""
    flags = [*run_flags[script], "--output_dir", tmp_path / "run"]
    train(script, *flags)
    checkpoint, results = tmp_path / "run" / "checkpoint-2", snapshot(tmp_path / "run")
    results = {path: load_file(path) for path in results if path.suffix == ".safetensors"}
    files = {path: path.read_bytes() for path in checkpoint.rglob("*") if path.is_file()}
    assert len(files) >= 6
    for path, whole in files.items():
        path.write_bytes(whole[: len(whole) // 2])
        before = snapshot(tmp_path)
        capsys.readouterr()
        with pytest.raises(SystemExit) as stop:
            train(script, *flags, "--resume_from_checkpoint", "latest")
        error = capsys.readouterr().err.split("error: ")[1]
        assert stop.value.code == 2
        assert path.name in error
        assert f"delete {checkpoint} and continue from checkpoint-1" in error
        assert snapshot(tmp_path) == before
        path.write_bytes(whole)
    shutil.rmtree(checkpoint)
    (tmp_path / "run" / "metrics.jsonl").write_bytes(b'\0\0\0{"step": 1}\n{"step": 1, "loss": 1, "lr": 1}\n\xff')
    train(script, *flags, "--resume_from_checkpoint", "latest")
    for path, tensors in results.items():
        assert {name: value.tolist() for name, value in load_file(path).items()} == {
            name: value.tolist() for name, value in tensors.items()
        }


@pytest.mark.parametrize("count", COUNTS)
def test_caches(tmp_path, count):
    """What a crash of the machine left of a cached file is made anew."""
    accelerator, value = Accelerator(cpu=True), torch.arange(6.0)
    cache = TensorCache(tmp_path, ["a model"])
    bytes_cache = TensorCache(tmp_path, b"a model")
    bytes_cache.save({"a": value}, b"key")
    (file,) = tmp_path.glob("*.safetensors")
    cache.fill(accelerator, [("picture",)], str, lambda names: [{"a": value}], "Encoding")
    wholes = [path.read_bytes() for path in (file, cache.path("picture"))]

    def prop(content):
        for path in (file, cache.path("picture")):
            path.write_bytes(content)
        cache.fill(accelerator, [("picture",)], str, lambda names: [{"a": value}], "Encoding")
        assert torch.equal(cache.load("picture")["a"], value)
        bytes_cache.fill(accelerator, [(b"key",)], str, lambda names: [{"a": value}], "Encoding")
        assert torch.equal(bytes_cache.load(b"key")["a"], value)

    cuts = st.sampled_from(wholes).flatmap(lambda whole: st.integers(0, len(whole) - 1).map(lambda n: whole[:n]))
    fuzz(count, prop, st.one_of(cuts, st.binary(max_size=60), st.just(bytes(len(wholes[0])))))
