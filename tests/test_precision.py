"""The precision of a run: what resolves it, and what is recorded, for the generators, of it."""

import json
from types import SimpleNamespace

from common import placement
from common.checkpoints import CHECKSUMS, STATE_FILE, checkpoint_conflicts, checksums
from common.models import DTYPES, choose_precision
from common.text_encoders import PromptEncoder, encoder_dtype
from common.tracking import precision_text
from common.validation import frugal_decoding

import pytest
import torch
from conftest import imported
from diffusers import FluxPipeline

from examples.dreambooth.generate import load_pipeline


@pytest.mark.parametrize(
    ("requested", "launched_with", "has_bf16", "expected"),
    [
        (None, None, True, "bf16"),
        (None, None, False, "no"),
        (None, "no", True, "no"),
        (None, "fp16", True, "fp16"),
        ("no", "bf16", True, "no"),
        ("bf16", None, False, "bf16"),
    ],
)
def test_a_flag_comes_before_the_launcher_and_both_before_what_the_device_computes_in(
    requested, launched_with, has_bf16, expected
):
    assert choose_precision(requested, launched_with, has_bf16=has_bf16) == expected


def test_the_header_says_what_no_flag_chose_on_a_gpu():
    for changed, precision, device_type, words in (
        ([], "no", "cpu", "no"),
        (["mixed_precision"], "bf16", "cuda", "bf16"),
        ([], "bf16", "cuda", "no flag"),
        ([], "no", "cuda", "float32: bf16 needs half of the memory"),
    ):
        args = SimpleNamespace(mixed_precision=precision, changed=changed)
        assert words in precision_text(args, device_type)


def test_the_precision_of_the_launcher_is_recorded_and_the_result_is_drawn_in_it(
    train, short_runs, tmp_path, monkeypatch
):
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    flags = [*short_runs["train_dreambooth_flux_advanced"], "--max_train_steps", 1, "--output_dir", tmp_path]
    train("train_dreambooth_flux_advanced", *flags)
    monkeypatch.undo()
    assert json.loads((tmp_path / "args.json").read_text())["args"]["mixed_precision"] == "bf16"
    pipeline, _ = load_pipeline(tmp_path)
    assert {pipeline.transformer.dtype, pipeline.text_encoder_2.dtype, pipeline.vae.dtype} == {torch.bfloat16}


@pytest.mark.parametrize(
    "script", ["train_dreambooth_flux_advanced", "train_influxedit", "train_omini", "train_twinflow"]
)
def test_a_precision_of_the_launcher_that_is_not_supported_is_refused(script, short_runs, monkeypatch, capsys):
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "fp8")
    module = imported(script)
    with pytest.raises(SystemExit) as error:
        module.parse_args([str(flag) for flag in short_runs[script]])
    assert error.value.code == 2
    assert "fp8" in capsys.readouterr().err
    assert module.parse_args([*map(str, short_runs[script]), "--mixed_precision=bf16"]).mixed_precision == "bf16"


def test_a_run_on_the_cpu_that_names_none_is_in_float32(short_runs):
    args = imported("train_omini").parse_args([str(flag) for flag in short_runs["train_omini"]])
    assert DTYPES[args.mixed_precision] == torch.float32


def test_checkpoints_that_recorded_no_precision_are_continued_in_the_same_one_alone(tmp_path, monkeypatch):
    (tmp_path / STATE_FILE).write_text(json.dumps({"global_step": 1, "mixed_precision": "None"}))
    (tmp_path / CHECKSUMS).write_text(json.dumps(checksums(tmp_path)))
    assert checkpoint_conflicts(tmp_path, {"mixed_precision": "no"}) == []
    assert "mixed_precision" in checkpoint_conflicts(tmp_path, {"mixed_precision": "bf16"})[0]
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    assert checkpoint_conflicts(tmp_path, {"mixed_precision": "bf16"}) == []


def test_text_encoders_of_fp16_runs_do_not_overflow(tiny, tmp_path):
    parts = {name: part for name, part in tiny.components_but_image().items() if "text" in name or "token" in name}
    pipeline = FluxPipeline(scheduler=None, vae=None, transformer=None, **parts)
    pipeline.text_encoder_2.encoder.block[0].layer[1].DenseReluDense.wo.weight.data *= 1e6  # far above float16's 65504
    accelerator = SimpleNamespace(
        device=torch.device("cpu"), mixed_precision="fp16", autocast=lambda: torch.autocast("cpu", torch.float16)
    )
    prompts = ["a red shape"]
    expected = pipeline._get_t5_prompt_embeds(prompts, max_sequence_length=8)
    pipeline.to(encoder_dtype(torch.float16))
    encoder = PromptEncoder(accelerator, pipeline, torch.float16, max_sequence_length=8, folder=tmp_path)
    embeds = encoder.encode_with("t5", prompts)
    assert embeds.dtype == torch.float16
    torch.testing.assert_close(embeds.float(), expected, rtol=0.05, atol=0.05)

    accelerator.mixed_precision = None  # what autocast makes of the same weights
    assert not encoder.encode_with("t5", prompts).isfinite().all()


def test_images_are_decoded_without_autocast(tiny):
    vae = tiny.vae.to(torch.bfloat16)
    seen = []
    vae.decoder.register_forward_hook(lambda module, inputs, output: seen.append(torch.is_autocast_enabled("cpu")))
    latents = torch.randn(1, 16, 4, 4, dtype=torch.bfloat16)
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        vae.decode(latents)
        with frugal_decoding(vae, 32 * 32, torch.device("cpu")):
            image = vae.decode(latents.float()).sample  # a pipeline's latents may be float32
        vae.decode(latents)
    assert seen == [True, False, True]
    assert image.dtype == torch.bfloat16


@pytest.mark.parametrize(("side", "in_tiles"), [(512, False), (1024, True)])
def test_a_gpu_without_memory_for_the_whole_image_decodes_tiles_of_it(tiny, monkeypatch, side, in_tiles):
    monkeypatch.setattr(placement, "available_memory", lambda device: 2**30)
    vae = tiny.vae.to(torch.bfloat16)
    with frugal_decoding(vae, side * side, torch.device("cuda")):
        assert (vae.use_tiling, vae.use_slicing) == (in_tiles, in_tiles)
    assert not vae.use_tiling  # images in training are encoded as before
    assert not vae.use_slicing
