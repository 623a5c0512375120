"""Hashes of what short seeded trainings on the CPU give: the proof that a refactoring changes no trained number.

    git worktree add ../before COMMIT
    python tests/same_weights.py ../before > before.txt
    python tests/same_weights.py . > after.txt
    diff before.txt after.txt

Each line is the name of a run, a file that it left and the SHA-256 of what counts in it: tensors and header of weights
(without the date), losses and learning rates of metrics.jsonl, pixels of pictures that were drawn with the result.
Grids of validation are left out. The trainers are those of the folder that is named, and only their command lines are
used; the toy models and the data come from the folder of this script, so both calls see the same. They work in
/tmp/same-weights; SAME_WEIGHTS=FOLDER names another one, for two calls at a time.
"""

import argparse
import fcntl
import hashlib
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import time
from pathlib import Path

from PIL import Image, ImageDraw


ROOT = Path(__file__).resolve().parent.parent
WORK = Path(os.environ.get("SAME_WEIGHTS", "/tmp/same-weights"))  # emptied first
DATA, MODELS = WORK / "data", WORK / "models"
UNHASHED_HEADER = ("modelspec.date",)
UNHASHED_NAMES = ("validation", "loss.png", "encoded")  # encoded: a cache, its names depend on the data's dates


# ---------------------------------------------------------------------------------------------------------------------
# Runs
# ---------------------------------------------------------------------------------------------------------------------

ENVIRONMENT = {
    "OMP_NUM_THREADS": "1",
    "HF_HUB_OFFLINE": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "CUDA_VISIBLE_DEVICES": "",  # sums of a GPU are not the same twice
}
SHARED = "--seed 0 --report_to none --max_sequence_length 16 --lr_warmup_steps 0 --max_train_steps 6 --rank 4"
SHARED += " --train_batch_size 2 --learning_rate 1e-3 --output_dir OUT"
FLUX = f"--pretrained_model_name_or_path {MODELS}/flux {SHARED}"
DREAMBOOTH = f"train_dreambooth_flux_advanced.py {FLUX} --resolution 64"
OMINI = f"train_omini.py {FLUX} --optimizer adamw --target_size 64"
INFLUXEDIT = f"train_influxedit.py --pretrained_model_name_or_path {MODELS}/flux-fill {SHARED}"
INFLUXEDIT += f" --instance_data_dir {DATA}/images --caption_data_dir {DATA}/captions --resolution 64"
TWINFLOW = f"train_twinflow.py {FLUX} --model_type flux --resolution 32 --train_batch_size 4"
GLYPH = f"--instance_data_dir {DATA}/glyph"
SHAPES = f"--instance_data_dir {DATA}/shapes"
SUBJECT = "'sks glyph on a white background'"

# {name: commands}, one after the other. OUT is the folder of the run's results, a command that begins with `torchrun`
# is run by two processes.
RUNS = {
    "dreambooth-captions": [
        f"{DREAMBOOTH} {SHAPES} --resolution 48 --random_flip --gradient_accumulation_steps 2 --repeats 2"
        " --dataloader_num_workers 1 --lr_scheduler cosine --caption_dropout 0.2 --lora_dropout 0.1"
        f" --validation_prompt {SUBJECT} --validation_steps 4 --num_validation_images 1",
    ],
    "dreambooth-pivotal": [
        f"{DREAMBOOTH} {GLYPH} --train_text_encoder_ti --enable_t5_ti --token_abstraction glyph --optimizer prodigy"
        " --learning_rate 1 --text_encoder_lr 1 --cache_latents --cache_latents_to_disk --max_train_steps 8"
        " --cache_text_encoder_outputs_to_disk --disk_cache_dir OUT/../cache",
        f"examples/dreambooth/generate.py OUT --prompt {SUBJECT} --size 64 64 --num_inference_steps 3 --output OUT",
    ],
    "dreambooth-prior": [
        f"{DREAMBOOTH} {SHAPES} --train_text_encoder --text_encoder_lr 1e-3 --aspect_ratio_buckets 64,48;48,64;64,64"
        " --with_prior_preservation --class_data_dir OUT/class --class_prompt 'a red circle' --num_class_images 3"
        " --prior_loss_weight 0.5 --timestep_sampling flux_shift",
    ],
    "dreambooth-nf4": [
        f"{DREAMBOOTH} {GLYPH} --quantize_base nf4 --gradient_checkpointing --weighting_scheme cosmap",
    ],
    "dreambooth-toml": [
        f"{DREAMBOOTH} --dataset_config {DATA}/data.toml --output_name named --save_format kohya"
        " --network_dim 6 --network_alpha 3 --lora_layers kohya --train_text_encoder --text_encoder_lr 1e-3"
        " --save_every_n_epochs 1 --max_train_steps 14",
    ],
    "dreambooth-files": [
        f"{DREAMBOOTH} {GLYPH} --pretrained_model_name_or_path {MODELS}/files/flux1-dev.safetensors"
        f" --ae {MODELS}/files/ae.safetensors --clip_l {MODELS}/files/clip_l.safetensors"
        f" --t5xxl {MODELS}/files/t5xxl.safetensors --tokenizer_dir {MODELS}/flux --center_crop",
    ],
    "dreambooth-resume": [
        f"{DREAMBOOTH} {SHAPES} --checkpointing_steps 3 --lr_scheduler linear",
        "rm -r OUT/checkpoint-6 OUT/pytorch_lora_weights.safetensors",
        f"{DREAMBOOTH} {SHAPES} --checkpointing_steps 3 --lr_scheduler linear --resume_from_checkpoint latest",
    ],
    "dreambooth-ddp": [
        f"torchrun {DREAMBOOTH} {GLYPH} --train_text_encoder --text_encoder_lr 1e-3",
    ],
    "omini-two": [
        f"{OMINI} {SHAPES} --condition_type canny coloring --independent_condition --adapter_per_condition"
        " --condition_size 64 32 --optimizer prodigy --learning_rate 1 --cache_latents",
        f"examples/omini/generate.py OUT/canny.safetensors OUT/coloring.safetensors --prompt {SUBJECT} --kv_cache"
        f" --image {DATA}/glyph/0.png --num_inference_steps 3 --output OUT/drawn.png",
    ],
    "omini-hole": [
        f"{OMINI} --instance_data_dir {DATA}/holes --condition_type token_integration --mask_column hole"
        " --dataloader_num_workers 1",
        f"examples/omini/generate.py OUT/token_integration.safetensors --prompt {SUBJECT} --image {DATA}/holes/1.png"
        f" --mask {DATA}/holes/hole-1.png --num_inference_steps 3 --output OUT/drawn.png",
    ],
    "omini-pairs": [
        f"{OMINI} --instance_data_dir {DATA}/pairs --condition_type subject sr --image_size 64 --padding 4",
    ],
    "omini-ddp": [
        f"torchrun {OMINI} {GLYPH} --condition_type fill --no-cache_prompts",
    ],
    "influxedit-edit": [
        f"{INFLUXEDIT} --mode edit --target_data_dir {DATA}/targets --train_text_encoder --text_encoder_lr 1e-3"
        " --train_embedder --guidance_scale 1",
        f"examples/influxedit/generate.py OUT --prompt 'a red circle' --image {DATA}/images/0.png --size 64 64"
        " --num_inference_steps 3 --output OUT",
    ],
    "influxedit-mask": [
        f"{INFLUXEDIT} --mode mask --use_split_mask --loss_mask_weight 3 --cache_latents --resolution 32,48,64",
    ],
    "influxedit-fsdp": [
        f"torchrun {INFLUXEDIT} --mode mask --mask_data_dir {DATA}/masks --random_flip --fsdp",
    ],
    "twinflow-lora": [
        f"{TWINFLOW} --train_data_dir {DATA}/glyph --training lora --cache_latents --random_flip",
    ],
    "twinflow-full": [
        f"{TWINFLOW} --train_data_dir {DATA}/glyph --recipe twinflow --training full --learning_rate 1e-4",
        f"examples/twinflow/generate.py OUT --prompt {SUBJECT} --steps 4 --output OUT",
    ],
    "twinflow-free": [
        f"{TWINFLOW} --prompts_file {DATA}/prompts.txt --recipe image-free --training lora --loss_type barron"
        " --quantize_base int8",
    ],
    "twinflow-fsdp": [
        f"torchrun {TWINFLOW} --train_data_dir {DATA}/glyph --recipe rcgm --training full --fsdp --max_train_steps 3",
    ],
}


# ---------------------------------------------------------------------------------------------------------------------
# Data and models
# ---------------------------------------------------------------------------------------------------------------------

DATA_TOML = f"""
[general]
caption_extension = ".txt"
shuffle_caption = true
keep_tokens = 1
caption_dropout_rate = 0.2

[[datasets]]
resolution = 64
batch_size = 4
enable_bucket = true
min_bucket_reso = 32
max_bucket_reso = 96
bucket_reso_steps = 16

  [[datasets.subsets]]
  image_dir = "{DATA}/shapes"
  num_repeats = 2
  flip_aug = true

  [[datasets.subsets]]
  image_dir = "{DATA}/glyph"
  class_tokens = "sks glyph"
  random_crop = true

  [[datasets.subsets]]
  image_dir = "{DATA}/targets"
  is_reg = true
"""


def draw_scenes(name: str, subject: str, seed: int, count: int = 6) -> list[Path]:
    """The pictures of a new folder, with captions in .txt files beside them."""
    command = [sys.executable, ROOT / "examples/toy/world.py", subject, DATA / name, "--seed", seed, "--count", count]
    subprocess.run([*map(str, command)], check=True, stdout=subprocess.DEVNULL)
    return sorted((DATA / name).glob("*.png"))


def draw_mask(path: Path, size: tuple[int, int], box: tuple[int, int, int, int]) -> None:
    """A black picture with a white rectangle."""
    mask = Image.new("L", size)
    ImageDraw.Draw(mask).rectangle(box, fill=255)
    path.parent.mkdir(exist_ok=True)
    mask.save(path)


def write_rows(folder: Path, rows: list[dict]) -> None:
    """metadata.jsonl of a folder."""
    (folder / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def make_data() -> None:
    """Folders for the sources of data that the trainers have."""
    draw_scenes("glyph", "glyph", 0)
    shapes = draw_scenes("shapes", "scenes", 1)
    for path, size in zip(shapes, [(64, 64), (64, 48), (48, 64), (64, 48), (60, 52), (48, 64)], strict=True):
        Image.open(path).crop((0, 0, *size)).save(path)
        caption = path.with_suffix(".txt")
        caption.write_text(caption.read_text().replace(" on ", ", on ").replace(" and ", ", "))  # tags to shuffle

    images, targets = draw_scenes("images", "scenes", 2), draw_scenes("targets", "scenes", 3)
    (DATA / "captions").mkdir()
    for i, (image, target) in enumerate(zip(images, targets, strict=True)):
        image.with_suffix(".txt").unlink()
        shutil.copy(target.with_suffix(".txt"), DATA / "captions")
        draw_mask(DATA / "masks" / image.name, (64, 64), (4 + i, 6, 40, 30 + 3 * i))

    holes = draw_scenes("holes", "scenes", 4)
    for i, path in enumerate(holes):
        draw_mask(path.with_stem(f"hole-{path.stem}"), (64, 64), (8 * (i % 3), 16, 8 * (i % 3) + 30, 47))
    texts = [path.with_suffix(".txt").read_text().strip() for path in holes]
    names = [path.name for path in holes]
    write_rows(
        DATA / "holes",
        [{"file_name": name, "text": text, "hole": f"hole-{name}"} for name, text in zip(names, texts, strict=True)],
    )

    (DATA / "pairs").mkdir()
    for name, left, right in zip(names, images, targets, strict=True):
        pair = Image.new("RGB", (2 * 64 + 3 * 4, 64 + 2 * 4))
        for i, path in enumerate((left, right)):
            pair.paste(Image.open(path), (4 + 68 * i, 4))
        pair.save(DATA / "pairs" / name)
    write_rows(
        DATA / "pairs",
        [
            {"file_name": name, "description_0": text, "description_1": f"{text}, again"}
            for name, text in zip(names, texts, strict=True)
        ],
    )
    (DATA / "prompts.txt").write_text("\n".join(texts) + "\n")
    (DATA / "data.toml").write_text(DATA_TOML)


def make_models() -> None:
    """Copies of the toy models, at a path that does not depend on where this script lies."""
    for name in ("flux", "flux-fill"):
        shutil.copytree(ROOT / "examples" / "toy" / name, MODELS / name)


def make_single_files() -> None:
    """The toy FLUX, with another VAE, as the four files that FLUX.1's authors publish."""
    import torch
    from diffusers import AutoencoderKL, FluxTransformer2DModel
    from safetensors.torch import load_file, save_file

    sys.path[:0] = [str(ROOT / "tests"), str(ROOT)]
    from test_lora_files import original_state_dict
    from test_playbook import latent_diffusion_names

    toy, files = MODELS / "flux", MODELS / "files"
    files.mkdir()
    transformer = FluxTransformer2DModel.from_pretrained(toy / "transformer")
    save_file(original_state_dict(transformer), files / "flux1-dev.safetensors")
    torch.manual_seed(0)
    vae = AutoencoderKL.load_config(toy / "vae") | {"block_out_channels": (32, 32, 64, 64), "norm_num_groups": 32}
    save_file(latent_diffusion_names(AutoencoderKL.from_config(vae)), files / "ae.safetensors")
    clip = load_file(toy / "text_encoder" / "model.safetensors")
    clip = {f"text_model.{key.removeprefix('text_model.')}": value for key, value in clip.items()}
    save_file(clip, files / "clip_l.safetensors")
    t5 = load_file(toy / "text_encoder_2" / "model.safetensors")
    save_file({key: value for key, value in t5.items() if "embed_tokens" not in key}, files / "t5xxl.safetensors")


# ---------------------------------------------------------------------------------------------------------------------
# Running and hashing
# ---------------------------------------------------------------------------------------------------------------------


def program(command: str, checkout: Path, out: Path) -> list[str]:
    """The words of a command of RUNS."""
    words = [re.sub(r"^OUT\b", str(out), word) for word in shlex.split(command)]
    if words[0] == "rm":
        return words
    launcher = []
    if words[0] == "torchrun":
        launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
        words = words[1:]
    return [sys.executable, *launcher, str(checkout / words[0]), *words[1:]]


def run(name: str, checkout: Path) -> Path:
    """Runs the commands of a run and returns the folder of its results."""
    out, environment = WORK / name / "out", {**os.environ, **ENVIRONMENT}
    environment.pop("PYTHONPATH", None)  # it could lead to another checkout's code
    out.mkdir(parents=True)
    for command in RUNS[name]:
        words = program(command, checkout, out)
        done = subprocess.run(words, cwd=checkout, env=environment, capture_output=True, text=True)
        if done.returncode:
            sys.exit(f"{done.stderr[-4000:]}\n{name}: exit status {done.returncode} of {shlex.join(words)}")
    return out


def comparable(value: object) -> object:
    """A value of a header, where it is JSON parsed, with lists of names in order: peft writes sets as lists."""
    if isinstance(value, str):
        try:
            parsed = json.loads(value)
        except ValueError:
            return value.replace(str(WORK), "WORK")
        return comparable(parsed) if isinstance(parsed, dict) else value
    if isinstance(value, dict):
        return {key: comparable(item) for key, item in value.items()}
    if isinstance(value, list) and all(isinstance(item, str) for item in value):
        return sorted(value)
    return value


def hash_of_weights(path: Path) -> str:
    """Of names, types, shapes and bytes of the tensors of a safetensors file, in order of names, and of its header."""
    data = path.read_bytes()
    start = 8 + int.from_bytes(data[:8], "little")
    tensors = json.loads(data[8:start])
    header = tensors.pop("__metadata__", {})
    header = {key: comparable(value) for key, value in header.items() if key not in UNHASHED_HEADER}
    digest = hashlib.sha256(json.dumps(header, sort_keys=True).encode())
    for name, about in sorted(tensors.items()):
        first, end = about["data_offsets"]
        digest.update(f"{name} {about['dtype']} {about['shape']}\n".encode())
        digest.update(data[start + first : start + end])
    return digest.hexdigest()


def hash_of_metrics(path: Path) -> str:
    """Of losses and learning rates."""
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    values = [{key: row[key] for key in ("loss", "lr")} for row in rows]
    return hashlib.sha256(json.dumps(values).encode()).hexdigest()


def hash_of_picture(path: Path) -> str:
    """Of mode, size and pixels."""
    image = Image.open(path)
    return hashlib.sha256(f"{image.mode} {image.size}".encode() + image.tobytes()).hexdigest()


def results(out: Path) -> list[tuple[str, str]]:
    """(file, hash) of what a run left that is to stay the same."""
    found = []
    for path in sorted(path for path in out.rglob("*") if path.is_file()):
        parts = path.relative_to(out).parts
        if {*parts} & {*UNHASHED_NAMES} or any(part.startswith("checkpoint-") for part in parts):
            continue
        if path.suffix == ".safetensors":
            found.append(("/".join(parts), hash_of_weights(path)))
        elif path.name == "metrics.jsonl":
            found.append(("/".join(parts), hash_of_metrics(path)))
        elif path.suffix in (".png", ".jpg"):
            found.append(("/".join(parts), hash_of_picture(path)))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("checkout", type=Path, help="folder with train_*.py, common/ and examples/")
    parser.add_argument("--only", nargs="+", choices=RUNS, metavar="NAME", help=f"some of: {', '.join(RUNS)}")
    args = parser.parse_args()
    checkout = args.checkout.resolve()
    if not list(checkout.glob("train_*.py")):
        parser.error(f"{args.checkout}: no train_*.py in it")
    lock = Path(f"{WORK}.lock").open("w")  # noqa: SIM115 (held until the end)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        parser.error(f"another run of this script is using {WORK}")

    names, began = args.only or list(RUNS), time.monotonic()
    shutil.rmtree(WORK, ignore_errors=True)
    make_data()
    make_models()
    if "dreambooth-files" in names:
        make_single_files()
    for name in names:
        start = time.monotonic()
        for file, digest in results(run(name, checkout)):
            print(f"{name}  {file}  {digest}", flush=True)
        print(f"{name}: {time.monotonic() - start:.1f} s", file=sys.stderr, flush=True)
    print(f"all: {time.monotonic() - began:.1f} s", file=sys.stderr)


if __name__ == "__main__":
    main()
