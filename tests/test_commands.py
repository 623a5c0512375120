"""What the pages say works: every code block of README.md, CONTRIBUTING.md and examples/**/README.md is run, and
every command of examples/*/notebook.ipynb.

bash itself reads a page's blocks, from top to bottom, so quotes, variables and line ends mean what they mean to a
user. The programs are functions that write down their words; an unknown one fails. Then each command runs in this
process, in a folder where the names that pages use are small things: stand_ins. A hub id is a folder with a tiny model
of the same classes there. `accelerate launch` and `torchrun` are left out, their own flags are checked; SMALL flags
follow a command's own. What cannot run here is in NOT_RUN with its reason, and checked as far as it can be. Python
blocks draw 32 pixels in two steps. `...` at the end of a command stands for the flags of a short run, in the text it
is not run.
"""

import argparse
import ast
import contextlib
import functools
import importlib
import io
import json
import math
import os
import re
import runpy
import shlex
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

from common.lora import add_lora

import diffusers
import pytest
import tiny_backbones
import torch
from _pytest.mark.expression import Expression
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.commands.launch import launch_command_parser
from conftest import ROOT
from diffusers import FluxKontextPipeline
from PIL import Image
from torch.distributed.run import get_args_parser as torchrun_parser

from examples import estimate_memory
from examples.influxedit.prepare_fill_circles import prepare
from examples.influxedit.toy_circles import write_archive


QUICKSTART, PLAYBOOK = "examples/quickstart.sh", "examples/dgx_spark/train.args"
PAGES = sorted(str(path.relative_to(ROOT)) for path in [*ROOT.glob("*.md"), *ROOT.glob("examples/**/README.md")])
NOTEBOOKS = sorted(str(path.relative_to(ROOT)) for path in ROOT.glob("examples/*/notebook.ipynb"))
PAGES += [*NOTEBOOKS, QUICKSTART]
TRAINERS = sorted(path.name for path in ROOT.glob("train_*.py"))
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.M | re.S)
LANGUAGES = {"bash", "python", ""}  # "": a tree of files, or what a command prints
INLINE = re.compile(r"`((?:python|pytest|accelerate launch) [^`]*|(?:tests/run|examples/[\w/]+)\.sh(?: [^`]*)?)`")

NOT_RUN = {
    "accelerate config": "asks its user questions",
    "diff": "of what tests/same_weights.py printed",
    "docker": "needs a daemon and the network",
    "git": "makes another checkout",
    "hf": "needs the network",
    "pip": "installs; what it would install runs this test",
    "pre-commit": "hooks into git; tests/test_github.py runs what it would",
    "pytest": "these tests themselves",
    "rsync": "from another machine",
    "sbatch": "needs a Slurm cluster; tests/test_machines.py runs the script with stand-ins for Slurm's commands",
    "source": "a virtual environment, which these tests run in",
    "tests/run.sh": "these tests themselves",
    "examples/quickstart.sh": "installs; the commands in it are run as a page of their own",
    "examples/dgx_spark/download.sh": "34 GB; tests/test_dgx_spark.py runs it against a server of its own",
    "examples/dgx_spark/launch_train.sh": "needs docker; tests/test_dgx_spark.py runs it with a false one",
    "examples/dgx_spark/launch_comfyui.sh": "needs docker; tests/test_dgx_spark.py runs it with a false one",
    "examples/omini/download_subjects.sh": "needs the network; run below with a false hf",
    "examples/omini/download_text_to_image.sh": "needs the network; run below with a false hf",
    "python tests/benchmarks/": "minutes; tests/run.sh --all runs them",
    "python tests/same_weights.py": "minutes, of two checkouts",
    "python examples/toy/pretrain.py": "more than an hour; with --score it is run below",
    "python examples/estimate_memory.py": "seconds to minutes each; run below",
    "python examples/suggest.py": "a minute; run below",
}
SLOW_COMMANDS = ("python examples/toy/pretrain.py", "python examples/estimate_memory.py", "python examples/suggest.py")
PROGRAMS = {"python", *(name for name in NOT_RUN if " " not in name), "accelerate", "torchrun"}

# Flags after a command's own, which override them. Each key is a script of the pages.
SMALL_RUN = ["--max_train_steps", "2", "--max_sequence_length", "8", "--lr_warmup_steps", "0", "--report_to", "none"]
SMALL = {
    "train_dreambooth_flux_advanced.py": [
        *SMALL_RUN,
        *("--resolution", "32", "--num_class_images", "2", "--num_validation_images", "1", "--train_batch_size", "2"),
    ],
    "train_omini.py": [
        *SMALL_RUN,
        *("--target_size", "32", "--condition_size", "32", "--num_validation_images", "1", "--train_batch_size", "2"),
    ],
    "train_influxedit.py": [
        *SMALL_RUN,
        *("--resolution", "32", "--validation_width", "96", "--validation_height", "96", "--train_batch_size", "2"),
    ],
    "train_twinflow.py": [
        *SMALL_RUN,
        *("--resolution", "32", "--num_validation_images", "1", "--train_batch_size", "4"),
        *("--gradient_accumulation_steps", "1"),
    ],
    "examples/dreambooth/generate.py": ["--num_inference_steps", "2"],
    "examples/omini/generate.py": ["--num_inference_steps", "2"],
    "examples/influxedit/generate.py": ["--num_inference_steps", "2", "--size", "64", "64"],
    "examples/influxedit/toy_circles.py": ["--count", "4"],
    "examples/influxedit/prepare_fill_circles.py": ["--zip", "fill50k.zip", "--test_count", "1"],
    "examples/toy/letters.py": ["--count", "4"],
    "examples/toy/world.py": ["--count", "4"],
    "examples/twinflow/generate.py": ["--size", "32", "32"],
    "examples/twinflow/compare.py": ["--count", "2", "--steps", "1"],
}
# Flags that are left out: --fsdp needs several processes, which tests/test_scale.py has; a model of single files is
# tried in tests/test_playbook.py, here it is a folder.
FLUX = "black-forest-labs/FLUX.1-dev"
LEFT_OUT = re.compile(r"--fsdp|--hybrid_shard|--(clip_l|t5xxl|ae|tokenizer_dir)=.*")
RECORDER = """
record() { printf '%s\\0' "$line" "$PWD" "$@" $'\\1' >> "$RECORD"; }
[() { false; }  # what a page does only if something is not there yet, is done
for name in $PROGRAMS; do eval "function $name { record $name \\"\\$@\\"; }"; done
"""


SETTING = re.compile(r"^([A-Z]+) = (.+)$", re.M)


def text_of(page):
    """A page as Markdown. Of a notebook's code that is its commands, and its variables in capitals, in bash."""
    if page not in NOTEBOOKS:
        return (ROOT / page).read_text()
    parts = []
    for cell in json.loads((ROOT / page).read_text())["cells"]:
        text = "".join(cell["source"])
        if cell["cell_type"] == "code" and text.startswith("%%terminal"):
            text = f"```bash\n{text.split(chr(10), 1)[1]}\n```"
        elif cell["cell_type"] == "code":
            values = {name: str(ast.literal_eval(value)) for name, value in SETTING.findall(text)}
            text = "".join(f"```bash\n{name}={shlex.quote(value)}\n```\n" for name, value in values.items())
        parts.append(text)
    return "\n\n".join(parts)


def line_of(text, match):
    return text.count("\n", 0, match.start()) + 1


def read_by_bash(snippets, tmp_path):
    """(line, folder, words) of each command that bash finds in the (line, code) `snippets`."""
    record = tmp_path / "record"
    record.write_text("")
    script = RECORDER + "".join(f"line={line}\n{code}\n" for line, code in snippets)
    environment = {"PATH": "", "RECORD": str(record), "HOME": str(tmp_path), "PROGRAMS": " ".join(PROGRAMS)}
    done = subprocess.run(
        ["/bin/bash", "--norc", "-eu"], input=script, env=environment, cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, f"{done.stderr}\nIs the program in PROGRAMS?"
    commands = [part.split("\0") for part in record.read_text().split("\0\1\0")[:-1]]
    return [(int(line), Path(folder).relative_to(ROOT), words) for line, folder, *words in commands]


# ---------------------------------------------------------------------------------------------------------------------
# Stand-ins for what pages name
# ---------------------------------------------------------------------------------------------------------------------


def write_pipeline(build, path):
    torch.manual_seed(0)
    build().save_pretrained(path)


def write_edit_pipeline(path, zero_cond_t=False):
    from transformers import Qwen2VLImageProcessor

    write_pipeline(functools.partial(tiny_backbones.qwenimage, edit=True, zero_cond_t=zero_cond_t), path)
    Qwen2VLImageProcessor().save_pretrained(path / "processor")


def write_kontext(model, path):
    FluxKontextPipeline.from_pretrained(model).save_pretrained(path)


def write_openuni(path):
    """The checkpoint `path`, and its language model under the name that it has on the hub."""
    torch.manual_seed(0)
    checkpoint, llm = tiny_backbones.openuni(path.parent)
    checkpoint.rename(path)
    target = path.parent / "OpenGVLab" / "InternVL3-2B-hf"
    target.parent.mkdir()
    llm.rename(target)


def write_depth_model(path):
    from transformers import DepthAnythingConfig, DepthAnythingForDepthEstimation, DPTImageProcessorPil

    backbone = {"model_type": "dinov2", "image_size": 32, "patch_size": 8, "hidden_size": 16, "num_hidden_layers": 4}
    backbone |= {"num_attention_heads": 2, "out_indices": [1, 2, 3, 4], "reshape_hidden_states": False}
    sizes = {"reassemble_hidden_size": 16, "neck_hidden_sizes": [8] * 4, "fusion_hidden_size": 8}
    config = DepthAnythingConfig(backbone_config=backbone, patch_size=8, head_hidden_size=4, **sizes)
    DepthAnythingForDepthEstimation(config).save_pretrained(path)
    DPTImageProcessorPil(size={"height": 32, "width": 32}, keep_aspect_ratio=False).save_pretrained(path)


def write_rows(pictures, path, column):
    """A folder of pictures whose captions are in a column of metadata.jsonl."""
    path.mkdir(parents=True)
    with (path / "metadata.jsonl").open("w") as rows:
        for picture in sorted(pictures.glob("*.png")):
            shutil.copy(picture, path)
            rows.write(json.dumps({"file_name": picture.name, column: "a TOK icon of a shape"}) + "\n")


def write_poses(pictures, path):
    """Captioned pictures, and a condition for each in a column."""
    path.mkdir()
    rows = []
    for picture in sorted(pictures.glob("*.png")):
        for name in (picture.name, f"{picture.stem}-pose.png"):
            shutil.copy(picture, path / name)
        rows.append({"file_name": picture.name, "prompt": "a dancer", "pose": f"{picture.stem}-pose.png"})
    (path / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def write_parquet(path, rows):
    import pandas

    path.mkdir(parents=True)
    pandas.DataFrame(rows).to_parquet(path / "train-00000.parquet")


def encoded(image):
    buffer = io.BytesIO()
    image.convert("RGB").save(buffer, format="JPEG")
    return buffer.getvalue()


def write_tar(pictures, path):
    with tarfile.open(path, "w") as tar:
        for i, picture in enumerate(sorted(pictures.glob("*.png"))):
            record = json.dumps({"prompt": picture.with_suffix(".txt").read_text()}).encode()
            for suffix, data in (("jpg", encoded(Image.open(picture))), ("json", record)):
                info = tarfile.TarInfo(f"{i:04d}.{suffix}")
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))


def write_tars(pictures, path):
    path.mkdir()
    write_tar(pictures, path / "00000.tar")


def write_edits(pairs, path):
    rows = []
    for i in (0, 1, 2, 3):
        images = {}
        for column, folder in (("image", "images"), ("target", "targets")):
            (file,) = (pairs / folder).glob(f"{i}.*")
            images[column] = {"bytes": file.read_bytes(), "path": None}
        rows.append({**images, "text": (pairs / "captions" / f"{i}.txt").read_text()})
    write_parquet(path, rows)


def write_subjects(path):
    """Pairs of pictures of 512 pixels side by side, with 8 pixels around and between."""
    pair = {"description_0": "a red circle", "description_1": "a red circle, again"}
    image = {"bytes": encoded(Image.new("RGB", (2 * 512 + 3 * 8, 512 + 2 * 8), "red")), "path": None}
    write_parquet(path, [{"image": image, "description": pair}] * 4)


def write_plain_lora(model, path):
    """A LoRA file as OminiControl's own code writes it, which says nothing of its condition."""
    from diffusers import FluxPipeline, FluxTransformer2DModel
    from peft import get_peft_model_state_dict

    transformer = FluxTransformer2DModel.from_pretrained(model, subfolder="transformer")
    add_lora(transformer, rank=4, alpha=4, dropout=0.0, target_modules=["attn.to_q"])
    layers = get_peft_model_state_dict(transformer)
    FluxPipeline.save_lora_weights(path.parent, transformer_lora_layers=layers, weight_name=path.name)


def mask(path):
    image = Image.new("L", (32, 32))
    image.paste(255, (0, 0, 16, 16))
    image.save(path)


def write_masks(pictures, path):
    path.mkdir()
    for file in pictures.glob("*.png"):
        image = Image.new("L", Image.open(file).size)
        image.paste(255, (0, 0, image.width // 2, image.height))
        image.save(path / file.name)


def stand_ins(pictures, pairs, tiny_model, tiny_fill):
    """{name in a page: what makes it at a path}"""
    link = lambda target: lambda path: path.symlink_to(target)  # noqa: E731
    picture = link(pictures / "1.png")
    shards = [
        {"text": p.with_suffix(".txt").read_text(), "image_bytes": encoded(Image.open(p))}
        for p in pictures.glob("*.png")
    ]
    return {
        FLUX: link(tiny_model),
        "black-forest-labs/FLUX.1-Fill-dev": link(tiny_fill),
        "black-forest-labs/FLUX.1-Kontext-dev": functools.partial(write_kontext, tiny_model),
        "black-forest-labs/FLUX.2-klein-base-4B": functools.partial(
            write_pipeline, functools.partial(tiny_backbones.flux2_klein, latent_channels=32)
        ),
        "black-forest-labs/FLUX.2-klein-4B": functools.partial(
            write_pipeline, functools.partial(tiny_backbones.flux2_klein, is_distilled=True, latent_channels=32)
        ),
        "stabilityai/stable-diffusion-3.5-medium": functools.partial(write_pipeline, tiny_backbones.sd3),
        "Efficient-Large-Model/Sana_1600M_512px_diffusers": functools.partial(write_pipeline, tiny_backbones.sana),
        "openuni_l_internvl3_2b_sana_1_6b_512_hf_blip3o60k.pth": write_openuni,
        "Qwen/Qwen-Image": functools.partial(write_pipeline, tiny_backbones.qwenimage),
        "Qwen/Qwen-Image-2512": functools.partial(write_pipeline, tiny_backbones.qwenimage),
        "Qwen/Qwen-Image-2.1": functools.partial(write_pipeline, tiny_backbones.qwenimage21),
        "Qwen/Qwen-Image-Edit-2509": write_edit_pipeline,
        "Qwen/Qwen-Image-Edit-2511": functools.partial(write_edit_pipeline, zero_cond_t=True),
        "FLUX.3": functools.partial(write_pipeline, tiny_backbones.Flux3),
        "Tongyi-MAI/Z-Image": functools.partial(write_pipeline, tiny_backbones.z_image),
        "LiheYoung/depth-anything-small-hf": write_depth_model,
        "photos": link(pictures),
        **dict.fromkeys(
            ("dog", "anna", "cup", "bottle"),
            lambda path: shutil.copytree(pictures, path, ignore=shutil.ignore_patterns("*.txt")),
        ),
        **dict.fromkeys(("dog-masks", "bottle-masks"), functools.partial(write_masks, pictures)),
        "ink": link(pictures),
        "before": link(pictures),
        "after": lambda path: shutil.copytree(pictures, path),
        "poses": functools.partial(write_poses, pictures),
        "3d_icon": lambda path: write_rows(pictures, path, "prompt"),
        "shards": lambda path: write_parquet(path, shards),
        "tars": functools.partial(write_tars, pictures),
        "edits": functools.partial(write_edits, pairs),
        "prompts.txt": lambda path: path.write_text("a red circle\na blue square\n"),
        "data/Subjects200K": write_subjects,
        "data/text-to-image-2M/data_512_2M/data_000000.tar": lambda path: write_tar(pictures, path),
        **dict.fromkeys(
            ("dog.safetensors", "subject_512.safetensors"), functools.partial(write_plain_lora, tiny_model)
        ),
        "train_A": link(pairs / "images"),
        "train_B": link(pairs / "targets"),
        "prompts": link(pairs / "captions"),
        "masks": link(pairs / "masks"),
        **dict.fromkeys(("cat.png", "photo.png", "outline.png", "edges.png", "pose.png"), picture),
        **dict.fromkeys(("mask.png", "hole.png"), mask),
        "fill50k": lambda path: write_archive(path.with_suffix(".zip"), count=4),
    }


@pytest.fixture
def workplace(stand_in_makers, pictures, tmp_path, monkeypatch):
    """A working folder in which a page's commands find what the page names."""
    toml = (ROOT / PLAYBOOK).with_name("flux_data").joinpath("data.toml").read_text()

    def prepare(text):
        place = tmp_path / "place"
        playbook = place / Path(PLAYBOOK).parent
        shutil.copytree((ROOT / PLAYBOOK).parent, playbook)  # the only one that is trained in
        (playbook / "flux_data" / "data.toml").write_text(toml.replace("resolution = 1024", "resolution = 32"))
        for concept in ("tjtoy", "sparkgpu"):
            shutil.copytree(pictures, playbook / "flux_data" / concept, ignore=shutil.ignore_patterns("*.txt"))
        parts = [ROOT / name for name in ("common", "tests", "requirements.txt", *TRAINERS)]
        for path in parts + [path for path in ROOT.glob("examples/*") if path.name != playbook.name]:
            (place / path.relative_to(ROOT)).symlink_to(path)
        text += FLUX + "".join(path.read_text() for path in ROOT.glob("examples/**/*.args"))
        for name, make in stand_in_makers.items():
            if re.search(rf"(?<![\w.-]){re.escape(name.split('/data_')[0])}(?![\w-])", text):
                (place / name).parent.mkdir(parents=True, exist_ok=True)
                make(place / name)
        return place

    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "datasets"))
    monkeypatch.setenv("WANDB_DIR", str(tmp_path))
    return prepare


@pytest.fixture(scope="session")
def stand_in_makers(pictures, pairs, tiny_model, tiny_fill):
    return stand_ins(pictures, pairs, tiny_model, tiny_fill)


# ---------------------------------------------------------------------------------------------------------------------
# Commands
# ---------------------------------------------------------------------------------------------------------------------


def reason_not_to_run(words):
    command = " ".join(words) + " "
    return next((name for name in NOT_RUN if command.startswith(name if name[-1] == "/" else f"{name} ")), None)


def check_without_running(words):
    """What can be said of a command of NOT_RUN: files are there, tests are selected, flags are known."""
    files = [word for word in words if word.endswith((".sh", ".py")) or "Dockerfile" in word]
    if "-r" in words or "--requirement" in words:
        files.append(words[words.index("-r") + 1])
    for file in files:
        assert (ROOT / file).is_file(), f"{file}: no such file"
        if file.endswith(".sh"):
            assert os.access(ROOT / file, os.X_OK), f"{file}: not executable"
            subprocess.run(["/bin/bash", "-n", ROOT / file], check=True)
    if words[0] in ("pytest", "tests/run.sh"):
        assert selected_tests(words[1:]), "selects no test"
    if words[1:2] in (["examples/estimate_memory.py"], ["examples/suggest.py"]):
        importlib.import_module(words[1].removesuffix(".py").replace("/", ".")).parse_args(with_a_card(words)[2:])


def with_a_card(words):
    """A command of suggest.py that takes the card of the machine, with one named."""
    if words[1] == "examples/suggest.py" and "--gpu" not in words:
        return [*words, "--gpu", "12GB"]
    return words


def selected_tests(words):
    """Names of the test functions that pytest's words select, as far as names tell."""
    parser = argparse.ArgumentParser(exit_on_error=False)
    parser.add_argument("files", nargs="*", type=Path)
    parser.add_argument("-k", type=Expression.compile)
    parser.add_argument("-m", type=Expression.compile)
    for flag in ("--all", "--oldest", "-s", "-x", "-q"):
        parser.add_argument(flag, action="store_true")
    args = parser.parse_args(words)
    found = []
    for file in args.files or ROOT.glob("tests/test_*.py"):
        names = [node.name for node in ast.parse((ROOT / file).read_text()).body if isinstance(node, ast.FunctionDef)]
        tests = [f"{file.name}::{name}" for name in names if name.startswith("test_")]
        found += [test for test in tests if not args.k or args.k.evaluate(lambda word, test=test: word in test)]
    return found


def without_launcher(words):
    """A command without `python -m`, or with a launcher and its flags, which must be right, as python. One process
    accumulates what torchrun's would take together, unless it is told how many."""
    if words[:3] == ["python", "-m", "pytest"]:
        return words[2:]
    if words[0] == "torchrun":
        args = torchrun_parser().parse_args(words[1:])
        count = int(args.nnodes.split(":")[0]) * int(args.nproc_per_node)
        return ["python", args.training_script, f"--gradient_accumulation_steps={count}", *args.training_script_args]
    if words[:2] != ["accelerate", "launch"]:
        return words
    args = launch_command_parser().parse_args(words[2:])
    if args.config_file:
        load_config_from_file(str(ROOT / args.config_file))
    return ["python", args.training_script, *args.training_script_args]


def expanded(words):
    """Words in which @files are replaced by what they hold, for LEFT_OUT to apply to it."""
    for word in words:
        if word.startswith("@"):
            yield from expanded(shlex.split(Path(word[1:]).read_text(), comments=True))
        else:
            yield word


def run(words, train, short_runs, monkeypatch):
    """Runs a command in this process, in small."""
    script = Path(words[1])
    if script.name in TRAINERS:
        flags = [word for word in expanded(words[2:]) if not LEFT_OUT.fullmatch(word)]
        flags = [word.replace("models/checkpoints/flux1-dev.safetensors", f"../../{FLUX}") for word in flags]
        if flags[-1:] == ["..."]:
            flags[-1:] = map(str, short_runs[script.stem])
        with contextlib.redirect_stderr(io.StringIO()) as said:
            importlib.import_module(script.stem).parse_args(flags)
        assert said.getvalue() == ""  # no flag of a page is without effect
        torch.compiler.set_stance("force_eager")  # compiling takes a minute on a CPU; tests/test_speed.py does it
        try:
            train(script.stem, *flags, *small_run(script.name, flags))
        finally:
            torch.compiler.set_stance("default")
        return
    with monkeypatch.context() as patch:
        patch.setattr(sys, "argv", [str(script), *words[2:], *SMALL.get(str(script), [])])
        patch.setattr(sys, "path", [*sys.path])
        if script.name == "compare.py":  # which draws 192 pictures
            for pipeline_class in (diffusers.FluxPipeline, diffusers.Flux2KleinPipeline):
                small_pictures(pipeline_class, patch, num_inference_steps=2)
        try:
            runpy.run_path(str(script), run_name="__main__")
        except SystemExit as stop:
            assert not stop.code, stop.code


def small_run(script, flags):
    """The flags that make a training small; the toy world's pictures keep their size, for what is drawn from them.

    FLUX.2-klein's pipeline takes no condition of less than 64 pixels.
    """
    small, toy = SMALL[script], any("examples/toy" in flag for flag in flags)
    if script == "train_omini.py" and any("FLUX.2-klein" in flag for flag in flags):
        small = ["64" if word == "32" else word for word in small]
    sizes = ("--resolution", "--target_size", "--condition_size")
    drop = {small.index(name) + i for name in sizes if name in small for i in (0, 1)}
    return [word for i, word in enumerate(small) if not toy or i not in drop]


def small_pictures(pipeline_class, patch, **small):
    """Lets a pipeline draw with the arguments `small` in the place of those it is given."""
    call = pipeline_class.__call__
    patch.setattr(pipeline_class, "__call__", lambda self, *args, **kwargs: call(self, *args, **kwargs | small))


def run_python(page, line, code, monkeypatch):
    """Runs a block; one that begins with the name of a file is also written to it."""
    if name := re.match(r"# (\w+\.py)\n", code):
        Path(name[1]).write_text(code)
    with monkeypatch.context() as patch:
        for pipeline_class in (diffusers.FluxPipeline, diffusers.FluxFillPipeline):
            small_pictures(pipeline_class, patch, width=32, height=32, num_inference_steps=2)
        exec(compile("\n" * line + code, page, "exec"), {"__name__": "page"})


# ---------------------------------------------------------------------------------------------------------------------
# Tests
# ---------------------------------------------------------------------------------------------------------------------


def steps_of(page, tmp_path):
    """(line, folder, command or Python code) of a page, from top to bottom."""
    text = text_of(page)
    if page == QUICKSTART:
        start = text.index(".venv/bin/python examples/")
        commands = f"out=quickstart\n{text[start:]}".replace(".venv/bin/python", "python")
        return read_by_bash([(text.count("\n", 0, start) + 1, commands)], tmp_path)
    assert {match[1] for match in FENCE.finditer(text)} <= LANGUAGES
    shell = [(line_of(text, match), match[2]) for match in FENCE.finditer(text) if match[1] == "bash"]
    prose = FENCE.sub(lambda match: "\n" * match[0].count("\n"), text)
    shell += [(line_of(prose, match), match[1]) for match in INLINE.finditer(prose) if "..." not in match[1]]
    steps = read_by_bash(sorted(shell), tmp_path)
    steps += [(line_of(text, match), Path(), match[2]) for match in FENCE.finditer(text) if match[1] == "python"]
    return sorted(steps, key=lambda step: step[0])


LONG_PAGES = [f"examples/{name}/README.md" for name in ("dreambooth", "influxedit", "omini", "twinflow")]
LONG_PAGES += NOTEBOOKS


@pytest.mark.parametrize(
    "page", [pytest.param(page, marks=pytest.mark.slow if page in LONG_PAGES else []) for page in PAGES]
)
def test_what_a_page_says_runs(page, train, short_runs, workplace, tmp_path, monkeypatch):
    place = workplace(text_of(page))
    for line, folder, step in steps_of(page, tmp_path):
        monkeypatch.chdir(place / folder)
        print(f"{page}:{line}: {step if isinstance(step, str) else shlex.join(step)}")
        if isinstance(step, str):
            run_python(page, line, step, monkeypatch)
            continue
        words = without_launcher(step)
        if reason_not_to_run(words):
            check_without_running(words)
        else:
            run(words, train, short_runs, monkeypatch)


def slow_commands(page, tmp_path):
    """(line, folder, words) of a page's estimates, suggestions and scores; to make the toy anew takes an hour."""
    for line, folder, words in steps_of(page, tmp_path):
        if isinstance(words, str) or reason_not_to_run(words) not in SLOW_COMMANDS:
            continue
        if words[1] != "examples/toy/pretrain.py" or "--score" in words:
            yield line, folder, words


SLOW_PAGES = [
    page for page in PAGES if any(command.removeprefix("python ") in text_of(page) for command in SLOW_COMMANDS)
]


@pytest.mark.slow
@pytest.mark.parametrize("page", SLOW_PAGES)
def test_what_a_page_says_of_memory_and_scores_runs(page, workplace, tmp_path, monkeypatch, capsys):
    """Each once, on the first page that has it; what prints a table of a page is below."""
    place = workplace(text_of(page))
    before = [words for each in PAGES[: PAGES.index(page)] for _, _, words in slow_commands(each, tmp_path)]
    for line, folder, words in slow_commands(page, tmp_path):
        if words in before or "--table" in words or "--network_table" in words:
            continue
        monkeypatch.chdir(place / folder)
        run(with_a_card(words), None, None, monkeypatch)
        assert capsys.readouterr().out, f"{page}:{line}: {shlex.join(words)} printed nothing"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("page", "flag", "column"),
    [("README.md", "--table", "12 GB"), ("examples/accelerate/README.md", "--network_table", "NVLink")],
)
def test_a_pages_table_of_estimates_is_what_is_printed(monkeypatch, capsys, page, flag, column):
    """All rows of the page; of the models, those that it shows: all take half an hour."""
    ((names, rows),) = ((names, rows) for _, names, rows in tables_of(page) if column in names)
    if flag == "--table":
        shown = {row[0].strip() for row in rows}
        models = {name: model for name, model in estimate_memory.MODELS.items() if name in shown}
        assert models.keys() == shown
        monkeypatch.setattr(estimate_memory, "MODELS", models)
    estimate_memory.main([flag])
    printed = capsys.readouterr().out.splitlines()
    assert rows
    for row in [[f" {name} " for name in names], *rows]:
        assert f"|{'|'.join(row)}|" in printed


@pytest.mark.parametrize(
    ("script", "words", "asked"),
    [
        ("download_subjects.sh", [], ("Yuanshi/Subjects200K", "data/Subjects200K", "data/train-00001-of-*.parquet")),
        ("download_subjects.sh", ["x", "0"], ("Yuanshi/Subjects200K", "x", "data/train-*.parquet")),
        (
            "download_text_to_image.sh",
            ["x", "1"],
            ("jackyhate/text-to-image-2M", "x", "data_512_2M/data_000000.tar"),
        ),
    ],
)
def test_downloads_ask_the_hub_for_what_is_trained_on(tmp_path, script, words, asked):
    repo, folder, file = asked
    (tmp_path / "hf").write_text('#!/bin/sh\necho "$@"\n')
    (tmp_path / "hf").chmod(0o755)
    path = f"{tmp_path}:{os.environ['PATH']}"
    command = [ROOT / "examples" / "omini" / script, *words]
    done = subprocess.run(command, env={"PATH": path}, capture_output=True, text=True, check=True, cwd=tmp_path)
    request, hint = done.stdout.splitlines()
    assert request.startswith(f"download {repo} --repo-type dataset --local-dir {folder} --include ")
    assert request.endswith(f"--include {file}")
    assert hint.startswith(f"In {folder}: ")


SHARED = {
    "train_batch_size": 1,
    "guidance_scale": 1.0,
    "gradient_accumulation_steps": 4,
    "optimizer": "prodigy",
    "learning_rate": 1.0,
    "lr_scheduler": "constant",
    "lr_warmup_steps": 0,
    "checkpointing_steps": 100,
    "max_train_steps": 100000,
    "num_validation_images": 1,
    "mixed_precision": "bf16",
    "gradient_checkpointing": True,
}
INFLUXEDIT = {
    "mask": {
        **SHARED,
        "use_split_mask": True,
        "rank": 16,
        "lora_alpha": 16,
        "resolution": (704, 1024),
        "validation_steps": 50,
        "validation_width": 1024,
        "validation_height": 512,
    },
    "edit": {
        **SHARED,
        "rank": 64,
        "lora_alpha": 64,
        "resolution": (1024, 1536, 2048),
        "train_batch_size": 2,
        "gradient_accumulation_steps": 2,
        "validation_steps": 100,
        "validation_width": 1024,
        "validation_height": 1024,
    },
}
TOLD = {
    "mask": ("images with split masks at 704, 1024 px", "a step is batch 1 x accumulation 4", "mixed precision bf16"),
    "edit": (
        "images with targets at 1024, 1536, 2048 px",
        "a step is batch 2 x accumulation 2",
        "mixed precision bf16",
    ),
}


def influxedit_commands(tmp_path):
    """{mode: words} of InFluxEdit's two published commands."""
    steps = [
        without_launcher(step)
        for _, _, step in steps_of("examples/influxedit/README.md", tmp_path)
        if step[0] == "accelerate"
    ]
    commands = [step for step in steps if "--validation_prompt=validation prompt" in step]
    return {"edit" if "--mode=edit" in step else "mask": step for step in commands}


@pytest.mark.parametrize("mode", INFLUXEDIT)
def test_influxedits_published_commands_mean_what_they_say(workplace, tmp_path, monkeypatch, mode):
    words = influxedit_commands(tmp_path)[mode]
    monkeypatch.chdir(workplace(" ".join(words)))
    args = importlib.import_module("train_influxedit").parse_args(words[2:])
    assert {name: value for name, value in vars(args).items() if name in INFLUXEDIT[mode]} == INFLUXEDIT[mode]
    assert (args.mode, args.report_to) == (mode, "wandb")


@pytest.mark.slow
@pytest.mark.parametrize("mode", INFLUXEDIT)
def test_influxedits_published_commands_run_as_they_are(
    train, workplace, wandb_dir, tmp_path, monkeypatch, capsys, mode
):
    words = influxedit_commands(tmp_path)[mode]
    monkeypatch.chdir(workplace(" ".join(words)))
    write_archive(Path("circles.zip"), count=4)
    prepare(Path("circles.zip"), Path("data/my_fill50k"))
    train("train_influxedit", *words[2:], "--max_train_steps", 1)
    told = capsys.readouterr().out
    for setting in TOLD[mode]:
        assert setting in told


def published_commands(page, word, tmp_path):
    """{folder of results: words} of the commands of a page that contain a word."""
    steps = [without_launcher(step) for _, _, step in steps_of(page, tmp_path) if step[0] == "accelerate"]
    commands = {}
    for step in steps:
        output_dir = re.search(r"--output_dir[= ](\S+)", " ".join(step))
        if output_dir and any(word in part for part in step):
            commands[output_dir[1]] = step
    return commands


TWINFLOW = {  # the folder of results of each published command: images of a step, pixels
    "openuni-full": (16, 512),
    "openuni-image-free": (16, 512),
    "openuni-lora-order-1": (16, 512),
    "openuni-lora-order-2": (16, 512),
    "sd35-m-full": (16, 512),
    "sd35-m-lora-order-1": (8, 512),
    "sd35-m-lora-order-2": (8, 512),
    "qwen-image-full": (4, 512),
    "qwen-image-lora-order-1": (4, 512),
    "qwen-image-lora-order-2": (4, 512),
    "qwen-image-edit-lora": (4, 1024),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", TWINFLOW)
def test_twinflows_published_commands_run_as_they_are(train, workplace, pictures, tmp_path, monkeypatch, capsys, name):
    """At their own size and batch; only models and data are small, and --fsdp needs several processes."""
    words = published_commands("examples/twinflow/README.md", "--recipe", tmp_path)[name]
    monkeypatch.chdir(workplace(" ".join(words)))
    if Path("shards").exists():
        shutil.rmtree("shards")
        row = {"text": "a red circle", "image_bytes": encoded(Image.open(pictures / "1.png"))}
        write_parquet(Path("shards"), [row] * 16)
    flags = [word for word in words[2:] if not LEFT_OUT.fullmatch(word)]
    train("train_twinflow", *flags, "--max_train_steps", 1)
    told = capsys.readouterr().out
    batch, pixels = TWINFLOW[name]
    assert f"a step is batch {batch} x accumulation 1" in told
    assert f"{pixels} x {pixels} px" in told
    (row,) = map(json.loads, (Path(name) / "metrics.jsonl").open())
    assert math.isfinite(row["loss"])


OMINICONTROL = ("subject", "coloring", "several", "canny-reuse", "compact", "integration")


@pytest.mark.slow
@pytest.mark.parametrize("name", OMINICONTROL)
def test_ominicontrols_published_commands_run_as_they_are(train, workplace, tmp_path, monkeypatch, capsys, name):
    """What train/script/train_*.sh start, at their own size and batch, with the images they draw."""
    page = "examples/omini/README.md"
    words = published_commands(page, "@examples/omini/", tmp_path)[name]
    monkeypatch.chdir(workplace((ROOT / page).read_text()))
    train("train_omini", *words[2:], "--max_train_steps", 1)
    assert "a step is batch 1 x accumulation 1" in capsys.readouterr().out
    assert Image.open(sorted((Path(name) / "validation").iterdir())[-1]).width > 2 * 512


def test_the_pages_name_every_script_and_every_preset(tmp_path):
    """And nothing that this file excuses is gone from them."""
    steps = [step for page in PAGES for _, _, step in steps_of(page, tmp_path)]
    commands = [without_launcher(step) for step in steps if isinstance(step, list)]
    words = {word.removeprefix("@").removeprefix("../../") for command in commands for word in command}
    scripts = {path for path in ROOT.glob("examples/**/*.py") if "__main__" in path.read_text()}
    scripts |= {ROOT / name for name in TRAINERS} | {*ROOT.glob("examples/**/*.sh")}
    assert {str(path.relative_to(ROOT)) for path in scripts} | set(SMALL) <= words
    assert {str(path.relative_to(ROOT)) for path in ROOT.glob("examples/**/*.args")} - {PLAYBOOK} <= words
    assert {reason_not_to_run(command) for command in commands} - {None} == set(NOT_RUN)


FLAG = re.compile(r"--\w+\b(?!\.\.\.)")
REMEDIES = ("here", "what to do")  # columns of the tables "coming from" and of troubleshooting


def tables_of(page):
    """(line, column names, rows of cells) of each table of a page."""
    text = (ROOT / page).read_text()
    for match in re.finditer(r"^\|.*\|\n\|[ \-|]*\|\n(?:\|.*\|\n)*", text, re.M):
        header, _, *rows = [line[1:-1].split("|") for line in match[0].splitlines()]
        yield line_of(text, match), [name.strip() for name in header], rows


@functools.cache
def flags_of(script):
    """The flags that `script` --help explains."""
    module = importlib.import_module(script.removesuffix(".py").replace("/", "."))
    with contextlib.redirect_stdout(io.StringIO()) as said, pytest.raises(SystemExit):
        (module.parse_args if script in TRAINERS else module.main)(["--help"])
    return set(FLAG.findall(said.getvalue()))


TABLES = {  # page: the programs whose flags its tables name
    "examples/dreambooth/README.md": ["train_dreambooth_flux_advanced.py", "examples/dreambooth/generate.py"],
    "examples/dgx_spark/README.md": ["train_dreambooth_flux_advanced.py"],
    "examples/omini/README.md": ["train_omini.py", "examples/omini/generate.py"],
    "examples/influxedit/README.md": [
        "train_influxedit.py",
        "examples/influxedit/generate.py",
        "examples/influxedit/prepare_fill_circles.py",
    ],
    "examples/twinflow/README.md": ["train_twinflow.py", "examples/twinflow/generate.py"],
}
OTHER_FLAGS = {"--am", "--ss", "--num_processes"}  # of a line of --validation_prompts, and accelerate's


@pytest.mark.parametrize("page", TABLES)
def test_flags_that_tables_advise_exist(page):
    known = {flag for script in TABLES[page] for flag in flags_of(script)} | OTHER_FLAGS
    checked = 0
    for line, names, rows in tables_of(page):
        for row in rows:
            assert len(row) == len(names), f"{page}:{line}: {row}"
            for name, cell in zip(names, row, strict=True):
                if name in REMEDIES:
                    checked += 1
                    assert set(FLAG.findall(cell)) <= known, f"{page}:{line}: {cell}"
    assert checked


@pytest.mark.parametrize("page", PAGES[:-1])
def test_links_lead_somewhere(page):
    links = re.findall(r"\]\(([^)#\s]*)#?([^)\s]*)\)", text_of(page))
    for target, anchor in [link for link in links if "://" not in link[0]]:
        path = (ROOT / page).parent / target if target else ROOT / page
        assert path.exists(), f"{page}: {target}"
        headings = re.findall(r"^#+ (.*)$", path.read_text(), re.M) if anchor else []
        slugs = {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}
        assert not anchor or anchor in slugs, f"{page}: {target}#{anchor}"
