"""--compile: blocks stay compiled with sizes, batch sizes and validation, keep weights, and say when they are not."""

import functools
import importlib

from common import models
from common.latents import image_ids
from common.lora import add_lora
from common.models import compile_blocks
from common.validation import undisturbed

import pytest
import torch
from safetensors.torch import load_file


CPU = torch.device("cpu")
# [batch, height, width] in latents: three shapes of a bucketed run, another batch size, its rest of one sample
SHAPES = [(2, 4, 4), (2, 4, 8), (2, 8, 6), (3, 4, 8), (1, 8, 6), (2, 4, 4)]


@pytest.fixture
def dynamo():
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    with torch._dynamo.config.patch(recompile_limit=8):
        yield torch._dynamo
    torch._dynamo.reset()


def adapted(transformer):
    transformer.requires_grad_(False)
    add_lora(transformer, rank=2, alpha=2, dropout=0.0, target_modules=["to_q", "to_v", "proj_mlp"])
    return transformer.train()


def predict(transformer, batch, height, width):
    generator = torch.Generator().manual_seed(batch * height * width)
    config = transformer.config
    tokens = height * width // 4
    return transformer(
        hidden_states=torch.randn(batch, tokens, config.in_channels, generator=generator),
        encoder_hidden_states=torch.randn(batch, 7, config.joint_attention_dim, generator=generator),
        pooled_projections=torch.randn(batch, config.pooled_projection_dim, generator=generator),
        timestep=torch.rand(batch, generator=generator),
        guidance=torch.ones(batch) if config.guidance_embeds else None,
        img_ids=image_ids(height, width),
        txt_ids=torch.zeros(7, 3),
        return_dict=False,
    )[0]


def train_steps(transformer, shapes):
    """Weights after a step for each shape, with a validation of another size after each."""
    trained = [parameter for parameter in transformer.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-2)
    for number, shape in enumerate(shapes):
        predict(transformer, *shape).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        with undisturbed(transformer, device=CPU):
            predict(transformer, 1, 4, 2 * number + 10)
    return [parameter.detach().clone() for parameter in trained]


@pytest.mark.slow
def test_blocks_stay_compiled_with_sizes_batches_and_validation(tiny, dynamo):
    transformer = adapted(tiny.transformer)
    compile_blocks(transformer, backend="eager")
    predict(transformer, *SHAPES[0])
    first = dynamo.utils.counters["stats"]["unique_graphs"]
    with dynamo.config.patch(fail_on_recompile_limit_hit=True):
        train_steps(transformer, SHAPES)
        graphs = dynamo.utils.counters["stats"]["unique_graphs"]
        train_steps(transformer, SHAPES)
        with undisturbed(transformer, device=CPU):
            predict(transformer, 1, 10, 10)
    print(f"{first} graphs for one shape, {graphs} for {len(SHAPES)} with validation")
    assert dynamo.utils.counters["stats"]["unique_graphs"] == graphs <= 4 * first  # and a second time compiles nothing
    assert not dynamo.utils.counters["graph_break"]
    assert dynamo.config.recompile_limit >= models.RECOMPILE_LIMIT


@pytest.mark.slow
@pytest.mark.parametrize(
    ("script", "flags"),
    [
        ("train_dreambooth_flux_advanced", []),
        ("train_omini", []),
        ("train_influxedit", []),
        ("train_twinflow", []),
        ("train_twinflow", ["--training", "full"]),
    ],
    ids=["dreambooth", "omini", "influxedit", "twinflow", "twinflow full"],
)
def test_a_compiled_run_ends_in_the_same_weights(train, short_runs, tmp_path, monkeypatch, dynamo, script, flags):
    """By a backend that runs the model's own operations: inductor merges them, and rounds otherwise."""
    module = importlib.import_module(script)
    traced = functools.partial(compile_blocks, backend="aot_eager")
    monkeypatch.setattr(module, "compile_blocks", traced)
    for name, compiled in (("plain", []), ("compiled", ["--compile"])):
        train(script, *short_runs[script], "--seed", 0, "--output_dir", tmp_path / name, *flags, *compiled)
    assert dynamo.utils.counters["stats"]["unique_graphs"]
    files = sorted(path.relative_to(tmp_path / "plain") for path in (tmp_path / "plain").rglob("*.safetensors"))
    assert files
    for file in files:
        plain = load_file(tmp_path / "plain" / file)
        compiled = load_file(tmp_path / "compiled" / file)
        assert plain.keys() == compiled.keys()
        for name, tensor in plain.items():
            assert torch.equal(tensor, compiled[name]), name


def test_one_line_says_that_a_block_runs_uncompiled(tiny, dynamo, monkeypatch, capfd):
    monkeypatch.setattr(models, "RECOMPILE_LIMIT", 1)
    transformer = adapted(tiny.transformer)
    with dynamo.config.patch(recompile_limit=1):
        compile_blocks(transformer, backend="eager")
        for shape in SHAPES[:3]:
            predict(transformer, *shape)
    said = [line for line in capfd.readouterr().err.splitlines() if line]
    assert said, "nothing was said"
    assert all(line.startswith("--compile:") and "uncompiled" in line for line in said), said
    assert len(said) <= 2  # one for each kind of block
