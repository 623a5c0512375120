"""Block swap: the numbers are those without it, and two swapped blocks at most are on the device."""

import copy
import gc
from types import SimpleNamespace

from common.block_swap import BlockSwap, blocks_to_swap, check_block_count, pin, spread
from common.lora import add_lora, save_lora
from common.models import compile_blocks, quantize_base

import pytest
import torch
from safetensors.torch import load_file
from test_pivotal import results
from test_speed import ONE_QUICK, SCRIPTS


CPU = torch.device("cpu")


def adapted(tiny, *, quantization="none", checkpointing=False, use_dora=False):
    """The tiny FLUX with an adapter that changes what it predicts, on two blocks and the time embedding."""
    model = copy.deepcopy(tiny.transformer).requires_grad_(False)
    if quantization != "none":
        quantize_base(model, torch.float32, quantization).to("cpu")
    layers = ["attn.to_q", "ff.net.2", "proj_mlp", "timestep_embedder.linear_1"]
    torch.manual_seed(0)
    add_lora(model, rank=4, alpha=4, dropout=0.0, target_modules=layers, use_dora=use_dora)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(std=0.1)
    if checkpointing:
        model.enable_gradient_checkpointing()
    return model


def train_and_draw(model, after_step=lambda: None):
    """Predictions without gradients and the trained weights, of two steps of two forward passes each."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.SGD(trained, lr=0.1)
    channels = model.config.in_channels
    width = model.config.joint_attention_dim
    found = []
    for step in range(2):
        torch.manual_seed(step)
        inputs = {
            "hidden_states": torch.randn(2, 4, channels),
            "encoder_hidden_states": torch.randn(2, 3, width),
            "pooled_projections": torch.randn(2, model.config.pooled_projection_dim),
            "timestep": torch.rand(2),
            "guidance": torch.ones(2),
            "img_ids": torch.zeros(4, 3),
            "txt_ids": torch.zeros(3, 3),
            "return_dict": False,
        }
        with torch.no_grad():
            found += [model(**inputs)[0], model(**inputs)[0]]
        first = model(**inputs)[0]
        second = model(**{**inputs, "timestep": 0.5 * inputs["timestep"]})[0]
        (first.square().mean() + (first * second).mean()).backward()
        optimizer.step()
        optimizer.zero_grad()
        after_step()
    return [*found, *(parameter.detach().clone() for parameter in trained)]


def assert_same(found, expected):
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


@pytest.mark.parametrize(
    "way",
    [
        {},
        {"checkpointing": True},
        {"use_dora": True},
        {"quantization": "nf4"},
        {"quantization": "int8"},
        {"quantization": "fp8"},
    ],
    ids=["plain", "checkpointing", "DoRA", "nf4", "int8", "fp8"],
)
def test_swapped_blocks_compute_the_same(tiny, way):
    expected = train_and_draw(adapted(tiny, **way))
    for number in (1, 2, "auto"):
        model = adapted(tiny, **way)
        swap = BlockSwap(model, number, CPU)
        waiting = [block.host.clone() for block in swap.blocks]

        def only_two_are_there():
            there = {block for block in swap.blocks if block.device.untyped_storage().nbytes()}  # noqa: B023
            assert there == swap.loaded  # noqa: B023
            assert len(there) <= 2

        assert_same(train_and_draw(model, only_two_are_there), expected)
        assert all(torch.equal(a, block.host) for a, block in zip(waiting, swap.blocks, strict=True))


@pytest.mark.slow
@pytest.mark.parametrize("way", [{}, {"checkpointing": True}, {"quantization": "fp8"}], ids=["plain", "again", "fp8"])
def test_swapped_compiled_blocks_compute_the_same(tiny, way):
    found = []
    for number in (None, 1, "auto"):
        model = adapted(tiny, **way)
        compile_blocks(model)
        if number is not None:
            BlockSwap(model, number, CPU)
        found.append(train_and_draw(model))
    assert_same(found[1], found[0])
    assert_same(found[2], found[0])


def test_swapped_weights_stay_where_they_are(tiny):
    expected = train_and_draw(adapted(tiny))
    model = adapted(tiny)
    BlockSwap(model, 2, torch.device("cpu:0"))
    assert_same(train_and_draw(model.to("cpu:0")), expected)


def test_what_fits_stays_on_the_device_from_the_first_step_on(tiny, capsys):
    expected = train_and_draw(adapted(tiny))
    for number in (0, 1, 2):
        model = adapted(tiny)
        swap = BlockSwap(model, "auto", CPU)
        assert_same(train_and_draw(model, lambda: swap.keep(number)), expected)  # noqa: B023
        assert len(swap.blocks) == number
    model = adapted(tiny)
    swap = BlockSwap(model, "auto", CPU)
    optimizer = torch.optim.SGD([parameter for parameter in model.parameters() if parameter.requires_grad])
    optimizer.register_step_post_hook(swap.keep_what_fits)
    optimizer.step()
    assert not swap.blocks  # there is no GPU whose memory they would fill
    assert "0 of 2 blocks" in capsys.readouterr().err
    with torch.no_grad():
        frozen = [parameter for parameter in model.parameters() if not parameter.requires_grad]
        assert all(torch.isfinite(parameter).all() for parameter in frozen)


@pytest.mark.parametrize("quantization", ["none", "nf4"])
def test_a_dora_is_saved_with_the_norms_of_weights_that_wait(tiny, tmp_path, quantization):
    saved = []
    for number in (None, "auto"):
        model = adapted(tiny, use_dora=True, quantization=quantization)
        if number is not None:
            swap = BlockSwap(model, number, CPU)
        save_lora(tmp_path / str(number), {"transformer": model}, torch.float32)
        (file,) = (tmp_path / str(number)).glob("*.safetensors")
        saved.append(load_file(file))
    assert any("dora_scale" in name for name in saved[0])
    assert saved[0].keys() == saved[1].keys()
    assert all(torch.equal(value, saved[1][name]) for name, value in saved[0].items())
    assert not any(block.device.untyped_storage().nbytes() for block in swap.blocks)


def test_each_weight_is_copied_once_a_pass_and_those_of_the_turn_not_again(tiny):
    model = adapted(tiny)
    swap = BlockSwap(model, "auto", CPU)
    copies = []
    copy_block = swap.copy
    swap.copy = lambda block: (copies.append(swap.blocks.index(block)), copy_block(block))
    count = len(swap.blocks)
    counts = []
    train_and_draw(model, lambda: (counts.append(len(copies)), copies.clear()))
    drawing, training = 2 * count, 4 * count  # forward passes, and the backward passes of training
    assert counts[1] <= drawing + training


def test_pinned_memory_is_given_back_with_its_tensor(monkeypatch):
    registered = {}
    errors = iter([0, 2])

    def register(pointer, size, flags):
        registered[pointer] = size
        return next(errors)

    runtime = SimpleNamespace(cudaHostRegister=register, cudaHostUnregister=registered.pop)
    monkeypatch.setattr(torch.cuda, "cudart", lambda: runtime)
    host = torch.zeros(4096, dtype=torch.uint8)
    pin(host)
    assert registered == {host.data_ptr(): 4096}
    view = host[:16]
    del host
    assert registered  # its memory is still in use
    del view
    gc.collect()
    assert not registered
    with pytest.raises(SystemExit, match="--blocks_to_swap"):
        pin(torch.zeros(4096, dtype=torch.uint8))


def test_the_number_of_blocks_follows_from_free_memory():
    gib = 2**30
    blocks = 19 * [0.63 * gib] + 38 * [0.26 * gib]  # FLUX.1's in bf16
    assert blocks_to_swap(blocks, free=0, total=12 * gib) == 57
    assert blocks_to_swap(blocks, free=40 * gib, total=80 * gib) == 0
    some = blocks_to_swap(blocks, free=10 * gib, total=24 * gib)
    assert 0 < some < 57
    assert blocks_to_swap(blocks, free=12 * gib, total=24 * gib) < some
    assert sum(blocks[: 57 - some]) <= 10 * gib - 2.4 * gib  # even if they are the largest that stay
    assert blocks_to_swap([], free=0, total=gib) == 0


def test_swapped_blocks_lie_at_even_distances(tiny):
    assert spread(3, 9) == [0, 3, 6]
    assert spread(4, 4) == [0, 1, 2, 3]
    assert spread(0, 4) == []
    assert not check_block_count("auto", tiny.transformer)
    assert not check_block_count(None, tiny.transformer)
    (problem,) = check_block_count(58, tiny.transformer)
    assert "--blocks_to_swap 58" in problem


@pytest.mark.parametrize("script", ONE_QUICK)
def test_a_run_with_swapped_blocks_has_the_same_weights(train, short_runs, script, tmp_path):
    prompt = ["--validation_prompt", "a", "--gradient_checkpointing"]
    if script in ("train_omini", "train_influxedit"):
        prompt = ["--gradient_checkpointing"]
    for name, extra in (("plain", []), ("swapped", ["--blocks_to_swap", 2])):
        train(script, *short_runs[script], *prompt, *extra, "--output_dir", tmp_path / name)
    found, expected = (results(tmp_path / name) for name in ("swapped", "plain"))
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[key], expected[key]) for key in expected)


@pytest.mark.slow
@pytest.mark.parametrize("script", SCRIPTS)
def test_two_processes_swap_the_same_blocks_and_a_run_resumes_with_others(runs, short_runs, script, tmp_path):
    shared = [*short_runs[script], "--checkpointing_steps", 1]
    plain = [*shared, "--output_dir", tmp_path / "plain"]
    assert runs.run(script, plain, processes=2) == 0, runs.output()[-3000:]
    swapped = [*shared, "--blocks_to_swap", 2, "--output_dir", tmp_path / "swapped"]
    assert runs.run(script, [*swapped, "--max_train_steps", 1], processes=2) == 0, runs.output()[-3000:]
    again = [*shared, "--blocks_to_swap", "auto", "--resume_from_checkpoint", "latest"]
    assert runs.run(script, [*again, "--output_dir", tmp_path / "swapped"], processes=2) == 0, runs.output()[-3000:]
    found, expected = (results(tmp_path / name) for name in ("swapped", "plain"))
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[key], expected[key]) for key in expected)
