"""Where models lie while images are generated: the choice by given memory; offloaded models compute the same."""

from types import SimpleNamespace

from common import placement
from common.lora import add_lora
from common.placement import choose_placements, num_bytes, place

import numpy as np
import pytest
import torch
from diffusers import FluxPipeline
from test_omini_generate import adapter, load, picture  # noqa: F401  # adapter is a fixture

from examples.twinflow.generate import generate


GIB = 2**30
FLUX = {"text_encoder": 0.23 * GIB, "text_encoder_2": 8.9 * GIB, "transformer": 22.2 * GIB, "vae": 0.16 * GIB}
CPU = torch.device("cpu")


@pytest.mark.parametrize(
    ("free", "free_ram", "transformer", "t5"),
    [
        (78, 100, "whole", "whole"),
        (34, 100, "whole", "whole"),
        (31, 60, "model_offload", "model_offload"),
        (23, 60, "group_offload", "model_offload"),
        (11.5, 60, "group_offload", "model_offload"),
        (7.5, 60, "group_offload", "group_offload"),
        (23, 45, "group_offload", "model_offload"),
        (23, 40, "nf4", "model_offload"),
        (11.5, 16, "nf4", "model_offload"),
    ],
)
def test_flux_is_drawn_with_the_first_way_that_fits(free, free_ram, transformer, t5):
    placements = choose_placements(FLUX, free=free * GIB, free_ram=free_ram * GIB)
    assert (placements["transformer"], placements["text_encoder_2"]) == (transformer, t5)
    assert placements["vae"] == placements["text_encoder"] == "whole"
    resident = sum(FLUX[name] for name, how in placements.items() if how == "whole")
    for name, how in placements.items():
        if how == "model_offload":
            assert resident + FLUX[name] < free * GIB


def test_large_images_leave_less_memory_for_models():
    assert choose_placements(FLUX, free=34 * GIB, free_ram=60 * GIB)["transformer"] == "whole"
    large = choose_placements(FLUX, free=34 * GIB, free_ram=60 * GIB, pixels=2048 * 2048)
    assert large["transformer"] == "model_offload"


@pytest.fixture
def all_large(monkeypatch):
    """Tiny models are placed like large ones."""
    monkeypatch.setattr(placement, "SMALL", 0)


def flux_with_lora(model):
    torch.manual_seed(0)
    pipeline = FluxPipeline.from_pretrained(model)
    pipeline.set_progress_bar_config(disable=True)
    for parameter in add_lora(pipeline.transformer, rank=2, alpha=2, dropout=0.0, target_modules=["attn.to_q"]):
        torch.nn.init.normal_(parameter)
    return pipeline


def drawn(pipeline, **options):
    call = {
        "height": 32,
        "width": 32,
        "num_inference_steps": 2,
        "max_sequence_length": 8,
        "output_type": "np",
    } | options
    images = [pipeline(["a red shape"], generator=torch.Generator().manual_seed(i), **call).images for i in range(2)]
    return np.concatenate(images)


class Movable(torch.nn.Linear):
    """A model that can come back from the meta device, which stands in for a GPU."""

    def to(self, device):
        return self.to_empty(device=device)


def test_models_that_are_moved_lie_on_the_device_one_at_a_time(monkeypatch, all_large):
    monkeypatch.setattr(placement, "available_memory", lambda device: 0)
    gpu = torch.device("meta")
    names = ("text_encoder", "text_encoder_2", "transformer")
    models = {name: Movable(8, 8) for name in names}
    place(models, gpu, placement="model_offload")
    present = []
    for name in (*names, *names):
        assert models[name](torch.zeros(1, 8)).device == gpu
        present.append([name for name in names if models[name].weight.device == gpu])
    assert present == [[name] for name in (*names, *names)]


def test_a_model_larger_than_the_memory_that_can_be_pinned_is_not_pinned_as_a_whole(monkeypatch):
    found = []

    def offload(model, device, **options):
        found.append(options["low_cpu_mem_usage"])

    monkeypatch.setattr(placement, "apply_group_offloading", offload)
    model = torch.nn.Linear(100, 100, bias=False)  # 40,000 bytes
    for available in (50_000, 70_000):
        monkeypatch.setattr(placement.psutil, "virtual_memory", lambda: SimpleNamespace(available=available))  # noqa: B023
        placement.offload_groups(model, torch.device("meta"))
    assert found == [True, False]


@pytest.mark.parametrize("how", ["model_offload", "group_offload"])
def test_an_offloaded_pipeline_draws_the_same(tiny_model, all_large, how):
    expected = drawn(flux_with_lora(tiny_model))
    pipeline = flux_with_lora(tiny_model)
    assert place(pipeline.components, CPU, placement=how)["transformer"] == how
    np.testing.assert_array_equal(drawn(pipeline), expected)


def test_a_transformer_in_4_bits_is_smaller_keeps_its_lora_and_draws_nearly_the_same(tiny_model, all_large, capsys):
    pipeline = flux_with_lora(tiny_model)
    expected = drawn(pipeline)
    size = num_bytes(pipeline.transformer)
    lora = {name: value.clone() for name, value in pipeline.transformer.named_parameters() if "lora_" in name}
    place(pipeline.components, CPU, placement="nf4")
    assert "nf4" in capsys.readouterr().err  # images change: it is said
    assert num_bytes(pipeline.transformer) < 0.5 * size
    parameters = dict(pipeline.transformer.named_parameters())
    for name, value in lora.items():
        torch.testing.assert_close(parameters[name], value, rtol=0, atol=0)
    assert 0 < np.abs(drawn(pipeline) - expected).mean() < 0.2


@pytest.mark.parametrize("how", ["model_offload", "group_offload"])
def test_conditions_their_cache_and_a_second_pass_go_through_offloaded_blocks(tiny_model, adapter, all_large, how):  # noqa: F811
    paths = adapter("canny", "coloring", independent_condition=True, adapter_per_condition=True)
    results = []
    for placed in ("whole", how):
        pipeline, specs = load(tiny_model, paths)
        place(pipeline.components, CPU, placement=placed)
        options = {"specs": specs, "condition_images": [picture(), picture()], "independent_condition": True}
        results.append(drawn(pipeline, kv_cache=True, image_guidance_scale=1.5, **options))
    np.testing.assert_array_equal(*results)


@pytest.mark.parametrize("how", ["model_offload", "group_offload"])
def test_twinflow_draws_the_same_with_offloaded_models(train, short_runs, tmp_path, all_large, how):
    flags = [*short_runs["train_twinflow"], "--max_train_steps", 1, "--output_dir", tmp_path, "--offload"]
    train("train_twinflow", *flags)
    options = {"steps": 2, "style": "few", "size": (32, 32)}
    expected = generate(tmp_path, ["a red shape"], **options)
    images = generate(tmp_path, ["a red shape"], placement=how, **options)
    assert images[0].tobytes() == expected[0].tobytes()
