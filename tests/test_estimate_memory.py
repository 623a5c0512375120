"""The memory calculator against the memory that processes take.

Run as a script it makes two training steps of a mid-size model on the CPU and prints by how many bytes the resident
set grew at most. The allocator returns what is freed at once (MALLOC_* below), so that is what was alive.
"""

import argparse
import dataclasses
import gc
import inspect
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch


sys.path.insert(0, str(Path(__file__).parents[1]))

from common.lora import add_lora, target_layers
from common.models import quantize_base

from examples.estimate_memory import (
    DTYPES,
    GIB,
    MODELS,
    TRAINERS,
    as_trained,
    create_optimizer,
    encoding_prompts,
    estimate,
    flux2,
    needed,
    parse_args,
    qwen3_4b,
    t5_xxl,
    training_step,
    training_tokens,
)
from train_twinflow import BACKBONES


ROOT = Path(__file__).parents[1]
PRESETS = [path.relative_to(ROOT) for path in sorted(ROOT.glob("examples/**/*.args"))]


def model_like(name, layers):
    """A model of MODELS with fewer and narrower blocks."""
    model = MODELS[name]
    config, conditions = dict(model.config), dict(model.conditions)
    if "FLUX" in name:
        config |= {"num_layers": layers, "num_single_layers": 2 * layers, "num_attention_heads": 6}
        config |= {"joint_attention_dim": 256}
        conditions["encoder_hidden_states"] = (128, 256)
    elif name == "SD3.5-medium":
        config |= {"num_layers": 2 * layers, "num_attention_heads": 12, "caption_projection_dim": 768}
        config |= {"dual_attention_layers": tuple(range(layers)), "pos_embed_max_size": 96}
    else:
        config |= {"num_layers": 2 * layers, "num_attention_heads": 24, "num_cross_attention_heads": 12}
        config |= {"cross_attention_head_dim": 64, "cross_attention_dim": 768}
    return dataclasses.replace(model, config=config, conditions=conditions)


def train(model, args, steps=2):
    """Training steps as the trainers make them, on real tensors."""
    dtype, full, size = DTYPES[args.mixed_precision], args.training == "full", args.train_batch_size
    backbone = BACKBONES[model.backbone](args)
    backbone.guidance = 3.5 if model.config.get("guidance_embeds") else None
    torch.set_default_dtype(torch.float32 if full else dtype)  # no second set of weights while it is made
    transformer = model.transformer(**model.config).requires_grad_(False)
    torch.set_default_dtype(torch.float32)
    if full:
        backbone.add_target_time(transformer, "copy")
        transformer.requires_grad_(True)
    else:
        if args.quantize_base != "none":
            quantize_base(transformer, dtype, args.quantize_base).to("cpu")
        add_lora(transformer, rank=args.rank, alpha=args.rank, dropout=0.0, target_modules=model.targets)
    if args.gradient_checkpointing:
        transformer.enable_gradient_checkpointing()
    transformer.train()
    params = [parameter for parameter in transformer.parameters() if parameter.requires_grad]
    optimizer = create_optimizer(args, params)
    side = args.resolution // backbone.vae_scale_factor
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")  # forgets the highest so far, of loading weights to quantize them
    for _ in range(steps):
        x = torch.randn(size, model.channels, side, side, dtype=dtype)
        conditions = {name: torch.randn(size, *shape, dtype=dtype) for name, shape in model.conditions.items()}
        time = torch.rand(size, 2) if full else torch.rand(size)
        with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
            loss = backbone.predict(transformer, x, time, conditions).float().square().mean()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(params, 1.0)
        optimizer.step()
        optimizer.zero_grad()


def resident(what):
    """VmRSS (now) or VmHWM (at most) of this process in bytes."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(what))
    return 1024 * int(line.split()[1])


def measure(name, layers, flags):
    args = parse_args(flags)
    train(
        dataclasses.replace(model_like(name, 1)), parse_args([*flags, "--resolution", "64"]), steps=1
    )  # loads kernels
    gc.collect()
    before = resident("VmRSS")
    train(model_like(name, layers), args)
    print(resident("VmHWM") - before)


def measured(name, layers, flags):
    command = [sys.executable, __file__, name, str(layers), json.dumps(flags)]
    env = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
    return int(subprocess.run(command, env=env, check=True, capture_output=True, text=True).stdout.splitlines()[-1])


CASES = {
    "lora": ("FLUX.1-dev", 2, "--resolution 512 --mixed_precision no"),
    "checkpointing": ("FLUX.1-dev", 4, "--resolution 512 --mixed_precision no --gradient_checkpointing"),
    "full": ("FLUX.1-dev", 4, "--resolution 256 --mixed_precision no --training full --ema_decay_rate 0"),
    "bf16": ("FLUX.1-dev", 4, "--resolution 512"),
    "nf4": ("FLUX.1-dev", 4, "--resolution 512 --quantize_base nf4"),
    "int8": ("FLUX.1-dev", 4, "--resolution 512 --quantize_base int8 --gradient_checkpointing --train_batch_size 4"),
    "sd3": ("SD3.5-medium", 4, "--resolution 512"),
    "sana": ("Sana-1.6B", 4, "--resolution 1024 --training full --ema_decay_rate 0"),
}


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_the_estimate_is_within_ten_percent_of_what_a_process_takes(case):
    name, layers, flags = CASES[case]
    flags = [*flags.split(), "--rank", "4", "--cache_latents", "--device", "cpu"]
    peaks = estimate(model_like(name, layers), parse_args(flags)).peaks
    estimated = max(peaks["forward and backward pass"], peaks["optimizer step"])
    taken = measured(name, layers, flags)
    print(f"{case}: estimated {estimated / 2**20:.0f} MiB, measured {taken / 2**20:.0f} MiB, {estimated / taken:.3f}")
    assert taken > 200 * 2**20  # else noise would count
    assert 0.9 < estimated / taken < 1.1


@pytest.mark.slow
def test_real_sizes():
    """The published numbers of parameters, in billions, and bytes where they are known by multiplication."""
    published = {"FLUX.1-dev": 11.9, "SD3.5-medium": 2.24, "Sana-1.6B": 1.6, "Qwen-Image": 20.4, "Z-Image": 6.15}
    published |= {"Qwen-Image-2.1": 7.1, "FLUX.3": 5.54}
    for name, billions in published.items():
        with torch.device("meta"):
            transformer = MODELS[name].transformer(**MODELS[name].config)
        count = sum(parameter.numel() for parameter in transformer.parameters())
        assert count / 1e9 == pytest.approx(billions, rel=0.01), name
    found = estimate(MODELS["FLUX.1-dev"], parse_args(["--gradient_checkpointing", "--cache_latents"]))
    rows = found.rows
    assert rows["weights"] / 2 == pytest.approx(11.9e9, rel=0.01)  # bfloat16
    assert rows["optimizer"] == pytest.approx(2 * rows["LoRA"], rel=0.01)  # AdamW's two moments
    prompts = (4.76e9 + 0.123e9) * 2  # T5-XXL and CLIP
    assert prompts + GIB < found.peaks["encoding prompts"] < prompts + 2 * GIB
    assert found.disk["model"] / 2 == pytest.approx(11.9e9 + 4.76e9 + 0.123e9 + 0.084e9, rel=0.01)
    assert found.files / 2 == pytest.approx(11.9e9, rel=0.01)  # the transformer: it is not read before T5 is freed
    assert found.disk["1000 cached prompts"] == 1000 * 2 * (512 * 4096 + 768)
    assert found.disk["1000 cached images"] == 1000 * 4 * 32 * 64 * 64  # mean and variance of 16 channels


def test_sizes_of_flux2():
    for name, billions, text_billions in (
        ("FLUX.2-klein-4B", 3.88, 4.02),
        ("FLUX.2-klein-9B", 9.06, 8.19),
        ("FLUX.2-dev", 32.2, 24.0),
    ):
        model = MODELS[name]
        with torch.device("meta"):
            transformer = model.transformer(**model.config)
            text_encoder = model.text_encoders[0]()
        assert sum(p.numel() for p in transformer.parameters()) / 1e9 == pytest.approx(billions, rel=0.01), name
        assert sum(p.numel() for p in text_encoder.parameters()) / 1e9 == pytest.approx(text_billions, rel=0.01), name
        linear = [name for name, layer in transformer.named_modules() if isinstance(layer, torch.nn.Linear)]
        in_blocks = [name for name in linear if "blocks." in name]
        assert len(target_layers(transformer, model.targets)) == len(in_blocks), name


@pytest.mark.slow
def test_a_step_of_flux2_is_estimated():
    small = flux2(1, 1, 24, 7680, qwen3_4b)
    flags = ["--model", "FLUX.2-klein-4B", "--gradient_checkpointing"]
    found = estimate(small, parse_args([*flags, "--quantize_base", "nf4"]))
    assert found.rows["weights"] < 0.7 * estimate(small, parse_args(flags)).rows["weights"]
    logits = 4 * 512 * 151936 * 2  # of every token of four prompts, which encoding computes and nobody reads
    assert found.peaks["encoding prompts"] > 4.02e9 * 2 + logits
    assert found.peaks["encoding images"] > found.rows["VAE"] > 0
    assert found.disk["1000 cached prompts"] == 1000 * 2 * 512 * 7680


@pytest.mark.parametrize(
    "name",
    [
        "Z-Image",
        *(
            pytest.param(name, marks=pytest.mark.slow)
            for name in ("FLUX.2-klein-4B", "FLUX.3", "OpenUni", "Qwen-Image-Edit")
        ),
        "Qwen-Image-2.1",
    ],
)
def test_a_step_of_a_backbone_is_estimated(name):
    """Of the real width, with two blocks."""
    model = MODELS[name]
    known = inspect.signature(model.transformer).parameters
    counts = {key: 2 for key in ("n_layers", "num_layers", "num_single_layers") if key in known}
    small = dataclasses.replace(model, config=model.config | counts)
    step = training_step(small, parse_args(["--training", "full", "--gradient_checkpointing"]))
    assert step["peak"] > step["before"] >= step["trained"] > 0
    assert len(step["blocks"]) >= 2


@pytest.mark.slow
def test_references_lengthen_the_sequence():
    small = flux2(1, 1, 24, 7680, qwen3_4b)
    flags = ["--model", "FLUX.2-klein-4B", "--resolution", "1024"]
    activations = []
    for count in range(3):
        found = estimate(small, parse_args([*flags, "--references", str(count)]))
        activations.append(found.rows["activations"])
    assert activations[1] / activations[0] == pytest.approx((512 + 2 * 4096) / (512 + 4096), rel=0.1)
    assert activations[2] - activations[1] == pytest.approx(activations[1] - activations[0], rel=0.1)


def of(*flags, model="FLUX.1-dev"):
    return estimate(model_like(model, 2), parse_args(["--cache_latents", *flags]))


@pytest.mark.slow
def test_flags_have_the_effects_they_are_for():
    rows = of().rows
    assert of("--gradient_checkpointing").rows["activations"] < 0.2 * rows["activations"]
    assert of("--train_batch_size", "4").rows["activations"] == pytest.approx(4 * rows["activations"], rel=0.05)
    assert of("--rank", "32").rows["LoRA"] == 2 * rows["LoRA"]
    assert of("--use_8bit_adam").rows["optimizer"] < 0.3 * rows["optimizer"]
    assert of("--optimizer", "prodigy").rows["optimizer"] == pytest.approx(2 * rows["optimizer"], rel=0.01)
    assert of("--quantize_base", "nf4").rows["weights"] < 0.4 * rows["weights"]
    assert of("--quantize_base", "int8").rows["weights"] < 0.6 * rows["weights"]
    checkpointed = of("--gradient_checkpointing").rows["activations"]
    for kind in ("nf4", "int8"):
        small = of("--gradient_checkpointing", "--quantize_base", kind).rows
        assert small["activations"] == pytest.approx(checkpointed, rel=0.02), kind
    assert of("--mixed_precision", "no").rows["weights"] == pytest.approx(2 * rows["weights"], rel=0.01)
    assert of("--num_processes", "2").rows["reducer"] == rows["LoRA"]
    with_vae = estimate(model_like("FLUX.1-dev", 2), parse_args([]))
    assert with_vae.rows["VAE"] > 0 == estimate(model_like("FLUX.1-dev", 2), parse_args(["--offload"])).rows["VAE"]
    assert with_vae.peaks["encoding images"] > of().peaks["encoding images"]


def test_the_card_has_room_for_the_driver_and_for_gaps():
    """Weights and activations of public runs of FLUX.1-dev, in GiB, and what cards were seen to need, in GB."""
    for tensors, least, most in ((7.22, 9, 10), (14.5, 18, 19), (23.6, 26, 30)):
        assert least < needed(tensors * GIB) * GIB / 1e9 < most


@pytest.fixture(scope="module")
def plain():
    return of_small()


def of_small(*flags):
    return estimate(model_like("FLUX.1-dev", 2), parse_args(["--cache_latents", "--resolution", "64", *flags]))


def test_each_phase_of_a_run_counts(plain):
    found = plain
    in_training = found.peaks["drawing for validation"]
    assert in_training > found.rows["weights"] + found.rows["optimizer"]
    assert found.peaks["drawing class images"] == 0
    with_class_images = of_small("--with_prior_preservation").peaks
    assert with_class_images["drawing class images"] > found.rows["weights"]
    assert with_class_images["forward and backward pass"] == found.peaks["forward and backward pass"]


def test_swapped_blocks_lie_in_ram_and_leave_two_places_on_the_card(plain):
    swapped = of_small("--blocks_to_swap", "6")
    gone = plain.rows["weights"] - swapped.rows["weights"]
    assert swapped.ram["blocks to swap"] > gone > 0 == plain.ram["blocks to swap"]
    for phase in ("forward and backward pass", "optimizer step", "drawing for validation"):
        assert plain.peaks[phase] - swapped.peaks[phase] == gone, phase


@pytest.mark.parametrize("flags", [["--blocks_to_swap", "4"], ["--offload", "--use_8bit_adam"]])
def test_a_known_step_changes_no_estimate(plain, flags):
    args = parse_args(["--cache_latents", "--resolution", "64", *flags])
    assert estimate(model_like("FLUX.1-dev", 2), args, plain.step) == of_small(*flags)


def test_an_average_is_a_second_adapter(plain):
    averaged = of_small("--use_ema")
    more = averaged.peaks["optimizer step"] - plain.peaks["optimizer step"]
    assert more == averaged.rows["average"] == plain.rows["LoRA"]
    assert averaged.disk["each checkpoint"] - plain.disk["each checkpoint"] == more


@pytest.mark.slow
def test_a_dora_has_numbers_of_its_own_and_a_lokr_holds_whole_changes():
    sizes = {}
    for kind in ("", "--use_dora", "--lora_type lokr"):
        sizes[kind] = estimate(model_like("FLUX.1-dev", 1), parse_args(["--cache_latents", *kind.split()])).rows
    assert 1 < sizes["--use_dora"]["LoRA"] / sizes[""]["LoRA"] < 1.1
    assert sizes["--lora_type lokr"]["LoRA"] < sizes[""]["LoRA"]
    assert sizes["--lora_type lokr"]["activations"] > sizes[""]["activations"]


@pytest.mark.slow
def test_fsdp_splits_what_full_training_holds():
    full = ("--training", "full", "--gradient_checkpointing")
    alone = of(*full)
    shared = of(*full, "--fsdp", "--num_processes", "4")
    one = alone.rows
    two = shared.rows
    for what in ("weights", "teacher", "gradients", "optimizer"):
        assert two[what] == pytest.approx(one[what] / 4, rel=0.02), what
    assert two["activations"] == pytest.approx(one["activations"], rel=0.5)
    assert one["teacher"] == one["gradients"]
    assert shared.peaks["forward and backward pass"] < 0.5 * alone.peaks["forward and backward pass"]
    assert shared.disk["each checkpoint"] == pytest.approx(alone.disk["each checkpoint"], rel=0.02)
    assert shared.ram == alone.ram and shared.ram["a block in float32"] > 0


def test_refuses_what_the_trainers_refuse(capsys):
    for flags, message in (
        ("--fsdp", "--fsdp needs more than one process"),
        ("--fsdp --num_processes 2 --quantize_base nf4", "--quantize_base nf4 does not work with --fsdp"),
        ("--training full --quantize_base nf4", "is for --training lora"),
        ("--training full --model FLUX.1-Fill-dev", "no trainer does this"),
        ("--model FLUX.1-Kontext-dev --references 2", "reads at most 1"),
    ):
        with pytest.raises(SystemExit) as error:
            parse_args(flags.split())
        assert error.value.code == 2 and message in capsys.readouterr().err


@pytest.mark.parametrize("preset", PRESETS, ids=str)
def test_a_training_command_is_read_as_its_trainer_reads_it(preset, monkeypatch, capsys):
    """Of each preset, alone and in a whole command, as far as flags change memory."""
    monkeypatch.chdir(ROOT)
    (trainer,) = [each for each in TRAINERS if preset.parent.name.replace("dgx_spark", "dreambooth") in each.__name__]
    parser = trainer.create_parser()
    for action in parser._actions:
        action.required = False
    if hasattr(trainer, "chosen_defaults"):
        parser.set_defaults(**trainer.chosen_defaults([f"@{preset}"]))
    run = parser.parse_args([f"@{preset}"])

    found = parse_args([f"@{preset}"])
    assert f"{trainer.__name__}.py trains" in found.remarks[0]
    same = vars(found).keys() & vars(run).keys()
    same -= {"resolution", "lora_layers", "mixed_precision", "cache_latents", "blocks_to_swap", "max_sequence_length"}
    assert {"rank", "optimizer", "quantize_base", "gradient_checkpointing", "offload", "train_batch_size"} <= same
    for name in same:
        assert getattr(found, name) == getattr(run, name), name
    if trainer.__name__ == "train_omini":
        assert found.resolution == run.target_size[0] and found.condition_tokens > 0
    else:
        assert found.resolution == (max(run.resolution) if isinstance(run.resolution, tuple) else run.resolution)
    launched = f"accelerate launch --num_processes 8 --main_process_port 1 {trainer.__name__}.py @{preset} --seed 1"
    whole = parse_args([*launched.split(), "--output_dir", "a folder", "--model", "FLUX.1-dev"])
    assert whole.num_processes == 8 and whole.rank == found.rank and whole.optimizer == found.optimizer

    with pytest.raises(SystemExit) as stop:
        parse_args([f"@{preset}", "--gradient_checkpoint"])
    assert stop.value.code == 2 and "did you mean --gradient_checkpointing?" in capsys.readouterr().err


def test_what_a_training_command_means_for_memory(monkeypatch, capsys):
    monkeypatch.chdir(ROOT)

    def read(command):
        return parse_args(command.split())

    omini = read("train_omini.py --condition_type canny sr --target_size 512x256 --max_train_steps 10")
    assert omini.condition_tokens == 32 * 16 + 16 * 8 and omini.resolution == 368  # 512 x 256 = 362 squared
    assert omini.optimizer == "prodigy" and omini.train_batch_size == 4  # the trainer's defaults
    assert (
        read("train_influxedit.py --mode edit --pretrained_model_name_or_path a/FLUX.2-klein-base-4B").references == 1
    )
    twice = read("train_dreambooth_flux_advanced.py --with_prior_preservation --train_batch_size 2")
    assert twice.train_batch_size == 4
    assert read("train_twinflow.py --train_batch_size 5 --instance_data_dir dog").train_batch_size == 10
    assert read("train_twinflow.py --recipe sd35_lora_1order --lora_dropout 0.1").model == "SD3.5-medium"
    file = read("--instance_prompt x --pretrained_model_name_or_path m/flux1-fill-dev.safetensors")
    assert file.model == "FLUX.1-Fill-dev"
    prompts = read("--instance_prompt x --compile --pretrained_model_name_or_path ~/models/mine")
    assert any("models/mine" in remark and "--model" in remark for remark in prompts.remarks)
    assert any("--compile" in remark for remark in prompts.remarks)
    machines = read(
        "torchrun --nnodes=2 --nproc-per-node 8 train_omini.py --condition_type canny --optimizer adamw --fsdp"
    )
    assert (machines.num_processes, machines.num_machines) == (16, 2)
    launched = "accelerate launch --mixed_precision fp16 train_omini.py --condition_type canny"
    assert read(launched).mixed_precision == "fp16"
    assert read(f"{launched} --mixed_precision bf16").mixed_precision == "bf16"
    for command, message in (
        ("--offload train_omini.py --condition_type canny", "put it behind train_omini.py"),
        ("torchrun --nproc_per_node gpu train_omini.py", "--nproc_per_node gpu"),
        ("--recipe lora-1order --condition_type canny", "no trainer has all of these flags"),
        ("train_omini.py --recipe lora-1order", "--recipe: no flag has this name"),
        ("train_omini.py --condition_type canny fill sr --condition_size 32 64", "--condition_size has 2 values"),
        ("--instance_prompt x --lora_layers attn.to_z", "has no linear layer attn.to_z"),
    ):
        with pytest.raises(SystemExit) as stop:
            read(command)
        assert stop.value.code == 2 and message in capsys.readouterr().err, command


def test_condition_tokens_and_short_prompts_count_as_what_passes_the_blocks():
    model = model_like("FLUX.1-dev", 1)
    model.conditions["encoder_hidden_states"] = (512, 256)

    def activations(**flags):
        args = argparse.Namespace(**{**vars(parse_args(["--resolution", "64"])), **flags})
        return training_step(as_trained(model, args), args)["activations"]

    plain = activations()
    with_condition = activations(condition_tokens=48)
    assert with_condition == activations(resolution=128) > plain  # 64 tokens
    assert plain - activations(max_sequence_length=464) == pytest.approx(with_condition - plain, rel=0.01)


def test_norms_are_computed_as_autocast_does_on_a_gpu():
    """What as_on_gpu assumes, by the tables of torch itself."""
    registered = torch._C._dispatch_has_kernel_for_dispatch_key
    for norm in ("layer_norm", "group_norm", "rms_norm"):
        assert registered(f"aten::{norm}", "AutocastCUDA") and not registered(f"aten::{norm}", "AutocastCPU")


def test_text_encoders_are_offloaded_quantized_or_trained():
    def encoding(quantization):
        return encoding_prompts(t5_xxl, 512, torch.bfloat16, "cuda", quantization=quantization, count=4)

    whole = 4.76e9 * 2
    with_all = encoding("none")
    assert with_all["weights"] == pytest.approx(whole, rel=0.01)
    in_four_bits = encoding("nf4")
    assert 0.25 < in_four_bits["weights"] / whole < 0.32  # the embeddings stay as they are
    trained = training_tokens(t5_xxl, 512, torch.bfloat16, "cuda", count=1)
    scores = 24 * 64 * 512 * 512 * 2  # of the attention in each layer, at least
    assert trained["weights"] == with_all["weights"] and scores < trained["kept"] < trained["peak"]


if __name__ == "__main__":
    measure(sys.argv[1], int(sys.argv[2]), json.loads(sys.argv[3]))
