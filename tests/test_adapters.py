"""DoRA and LoKr: at the trained strength in every reader, started and resumed exactly, in all trainers."""

import copy
import shutil

from common.lora import (
    add_lora,
    check_lora_file,
    dora_norms,
    load_lora,
    save_exact_lora,
    save_lora,
    start_from_lora,
)
from common.lora_formats import read_lora
from common.models import compile_blocks, quantize_base

import pytest
import torch
from diffusers import FluxFillPipeline, FluxPipeline, FluxTransformer2DModel
from safetensors.torch import load_file
from test_lora import run, with_random_lora
from test_omini_forward import inputs, new_transformer, omini_forward

import train_dreambooth_flux_advanced as dreambooth
import train_influxedit as influxedit
from examples import convert_lora


LAYERS = ("attn.to_q", "attn.add_k_proj", "ff.net.2", "proj_mlp", "norm1.linear", "norm_out.linear", "x_embedder")
CLIP = ("q_proj", "out_proj", "fc1")


def relative_error(found, expected):
    return ((found - expected).abs().max() / expected.abs().max()).item()


def randomized(model, seed=0):
    """`model` with its adapter's parameters changed at random, its magnitudes by a tenth."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        if "magnitude" in name:
            parameter.data *= 1 + 0.1 * torch.randn(parameter.shape, generator=generator)
        else:
            parameter.data.normal_(std=0.3, generator=generator)
    return model


def adapted(model, targets=LAYERS, seed=0, rank=2, alpha=3, **kind):
    """A copy of `model` with a random adapter of rank 2 and alpha 3."""
    model = copy.deepcopy(model)
    add_lora(model, rank=rank, alpha=alpha, dropout=0.0, target_modules=targets, **kind)
    return randomized(model, seed)


def merged_weights(model):
    """{layer: its weight with the adapter in it}."""
    model = copy.deepcopy(model)
    weights = {}
    for name, module in model.named_modules():
        if hasattr(module, "base_layer"):
            module.merge(safe_merge=True)
            weights[name] = module.get_base_layer().weight.detach()
    return weights


def swapped(rows):
    return torch.cat(rows.chunk(2)[::-1])


def comfyui_weight(tensors, name, weight, reorder=lambda rows: rows):
    """What ComfyUI makes of a weight of its model at strength 1, by its rule; takes what it reads out of `tensors`.

    `reorder` turns rows as a file has them into those of ComfyUI's model.
    """
    alpha = tensors.pop(f"{name}.alpha", None)
    dora_scale = tensors.pop(f"{name}.dora_scale", None)
    if f"{name}.lora_B.weight" in tensors:
        up, down = tensors.pop(f"{name}.lora_B.weight").float(), tensors.pop(f"{name}.lora_A.weight").float()
        difference = up @ down * (1 if alpha is None else alpha / len(down))
        tensors.pop(f"{name}.lora_magnitude_vector", None)  # is not read, and named as not loaded
    merged = weight + reorder(difference)
    if dora_scale is not None:
        assert dora_scale.shape == (len(weight), 1)
        merged *= dora_scale / (weight.norm(dim=1, keepdim=True) + torch.finfo(torch.float32).eps)
    return merged


def assert_comfyui_agrees(file, base, model, bar):
    tensors = load_file(file)
    expected = merged_weights(model)
    for name, weight in expected.items():
        before = base.get_submodule(name).weight.detach()
        if name == "norm_out.linear":  # FLUX.1's authors have shift before scale
            found = swapped(comfyui_weight(tensors, f"transformer.{name}", swapped(before), swapped))
        else:
            found = comfyui_weight(tensors, f"transformer.{name}", before)
        assert relative_error(found, weight) < bar, name
        assert relative_error(before, weight) > 0.05, name
    assert not [key for key in tensors if key.startswith("transformer.")]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_dora_is_itself_in_diffusers_and_comfyui(tiny, tmp_path, dtype):
    modules = {
        "transformer": adapted(tiny.transformer, use_dora=True),
        "text_encoder": adapted(tiny.text_encoder, CLIP, seed=1),  # a plain LoRA, as the trainers have it
    }
    save_lora(tmp_path, modules, dtype)
    file = tmp_path / "pytorch_lora_weights.safetensors"
    bar = 1e-5 if dtype == torch.float32 else 2e-2
    assert_comfyui_agrees(file, tiny.transformer, modules["transformer"], bar)

    pipeline = FluxPipeline(**tiny.components_but_image())
    pipeline.load_lora_weights(tmp_path)
    assert relative_error(run(pipeline.transformer), run(modules["transformer"])) < max(bar, 1e-4)
    ids = torch.tensor([[3, 17, 40, 5, tiny.text_encoder.config.vocab_size - 1]])
    with torch.no_grad():
        ours, theirs = modules["text_encoder"](ids).pooler_output, pipeline.text_encoder(ids).pooler_output
    assert relative_error(theirs, ours) < bar
    magnitudes = [value for key, value in load_file(file).items() if "magnitude" in key or "dora_scale" in key]
    assert {value.dtype for value in magnitudes} == {torch.float32}


@pytest.mark.parametrize("base", ["float32", "bfloat16", "nf4"])
def test_a_dora_starts_as_the_model_it_is_added_to(tiny, base):
    model = copy.deepcopy(tiny.transformer)
    if base == "bfloat16":
        model.bfloat16()
    elif base != "float32":
        quantize_base(model, torch.float32, base).to("cpu")  # which packs the weights
    with torch.autocast("cpu", torch.bfloat16, enabled=base == "bfloat16"):
        before = run(model).float()
        add_lora(model, rank=2, alpha=3, dropout=0.0, target_modules=("attn.to_q", "ff.net.2"), use_dora=True)
        after = run(model).float()
    assert relative_error(after, before) < (1e-2 if base == "bfloat16" else 1e-5)
    for module in model.modules():
        if hasattr(module, "base_layer"):
            weight_norms, _ = dora_norms(module)
            vector = module.lora_magnitude_vector["default"].weight
            assert vector.dtype == torch.float32
            torch.testing.assert_close(vector, weight_norms, atol=0, rtol=1e-6)


def test_a_dora_is_continued_at_its_strength(tiny, tmp_path):
    trained = adapted(tiny.transformer, use_dora=True)
    save_lora(tmp_path, {"transformer": trained})
    file = tmp_path / "pytorch_lora_weights.safetensors"
    continued = adapted(tiny.transformer, seed=7, alpha=5, use_dora=True)
    start_from_lora(file, {"transformer": continued})
    assert relative_error(run(continued), run(trained)) < 1e-4

    plain = with_random_lora(tiny.transformer, 2, 3, LAYERS, seed=4)  # a LoRA goes on as a DoRA
    save_lora(tmp_path, {"transformer": plain}, weight_name="plain.safetensors")
    start_from_lora(tmp_path / "plain.safetensors", {"transformer": continued})
    assert relative_error(run(continued), run(plain)) < 1e-4

    shapes = {name: (len(layer.up), layer.down.shape[1]) for name, layer in read_lora(file)[0].items()}
    assert check_lora_file(file, shapes, 2, use_dora=True) == []
    (problem,) = check_lora_file(file, shapes, 2)
    assert "--use_dora" in problem


def test_weights_of_a_dora_resume_exactly(tiny, tmp_path):
    trained, other = (adapted(tiny.transformer, seed=seed, use_dora=True) for seed in (0, 9))
    save_exact_lora(tmp_path / "a", {"transformer": trained})
    load_lora(tmp_path / "a", {"transformer": other})
    assert torch.equal(run(trained), run(other))


def test_converting_keeps_a_dora_or_says_why_not(tiny, tmp_path, capsys):
    save_lora(tmp_path, {"transformer": adapted(tiny.transformer, use_dora=True)}, header={"ss_output_name": "x"})
    file = tmp_path / "pytorch_lora_weights.safetensors"
    convert_lora.main([str(file), str(tmp_path / "other.safetensors")])
    before, after = load_file(file), load_file(tmp_path / "other.safetensors")
    assert before.keys() == after.keys()
    assert all(torch.equal(before[key], after[key]) for key in before)
    with pytest.raises(SystemExit):
        convert_lora.main([str(file), str(tmp_path / "kohya.safetensors"), "--to", "kohya"])
    assert "DoRA" in capsys.readouterr().err
    assert not (tmp_path / "kohya.safetensors").exists()


def test_a_trained_embedder_beside_a_dora_is_itself_in_diffusers(tiny_fill, tmp_path):
    model = FluxTransformer2DModel.from_pretrained(tiny_fill, subfolder="transformer")
    add_lora(
        model,
        rank=2,
        alpha=3,
        dropout=0.0,
        target_modules=["attn.to_q"],
        modules_to_save=["x_embedder"],
        use_dora=True,
    )
    randomized(model)
    save_lora(tmp_path, {"transformer": model}, more_layers=influxedit.embedder_lora(model))
    parts = {"vae": None, "text_encoder": None, "tokenizer": None, "text_encoder_2": None, "tokenizer_2": None}
    pipeline = FluxFillPipeline.from_pretrained(tiny_fill, **parts)
    pipeline.load_lora_weights(tmp_path)
    tokens = torch.randn(7, 384)
    tokens[:, -256:] = 1  # the mask in edit mode
    with torch.no_grad():
        assert relative_error(pipeline.transformer.x_embedder(tokens), model.x_embedder(tokens)) < 1e-5
        queries = [each.transformer_blocks[0].attn.to_q(torch.ones(1, 64)) for each in (pipeline.transformer, model)]
    assert relative_error(*queries) < 1e-5


@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_omini_tokens_pass_the_dora_that_the_stock_model_has(dropout):
    stock, transformer = new_transformer(model_class=FluxTransformer2DModel), new_transformer()
    for model in (stock, transformer):
        torch.manual_seed(0)
        add_lora(
            model, rank=2, alpha=3, dropout=dropout, target_modules=["attn.to_q", "ff.net.2", "proj_out"], use_dora=True
        )
        randomized(model.train())
    arguments = inputs()
    torch.manual_seed(1)
    expected = stock(**arguments, return_dict=False)[0]
    torch.manual_seed(1)
    found = omini_forward(transformer, arguments, main_adapter="default")
    plain = omini_forward(transformer, arguments)
    if dropout == 0:
        assert relative_error(found, expected) < 1e-5
    assert relative_error(plain, expected) > 0.01
    found.square().mean().backward()
    vectors = [parameter for name, parameter in transformer.named_parameters() if "magnitude" in name]
    assert min(parameter.grad.abs().max() for parameter in vectors) > 0


@pytest.mark.slow
def test_a_compiled_dora_is_the_same():
    model = adapted(new_transformer(model_class=FluxTransformer2DModel), use_dora=True)
    before = model(**inputs(), return_dict=False)[0]
    compile_blocks(model)
    assert relative_error(model(**inputs(), return_dict=False)[0], before) < 1e-5


RUNS = {
    "train_dreambooth_flux_advanced": "--train_text_encoder --quantize_base nf4 --cache_latents",
    "train_omini": "--condition_type canny coloring --adapter_per_condition --independent_condition",
    "train_influxedit": "--train_embedder --optimizer prodigy --learning_rate 1",
    "train_twinflow": "--ema_decay_rate 0.5 --gradient_checkpointing",
}
SCRIPTS = [pytest.param(script, marks=pytest.mark.slow if "dreambooth" not in script else []) for script in RUNS]


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_run_resumes_exactly_and_its_file_draws(train, short_runs, tmp_path, script):
    folder = tmp_path / "run"
    words = [*short_runs[script], *RUNS[script].split(), "--seed", 0, "--lora_alpha", 3, "--lora_dropout", 0.1]
    words += ["--use_dora", "--max_train_steps", 4, "--checkpointing_steps", 2, "--output_dir", folder]
    train(script, *words)
    files = [*folder.glob("*.safetensors")]
    results = {file: file.read_bytes() for file in files}
    assert len(files) == (2 if script == "train_omini" else 1)
    for file in files:
        file.unlink()
    shutil.rmtree(folder / "checkpoint-4")
    train(script, *words, "--resume_from_checkpoint", "latest")
    assert {file: file.read_bytes() for file in files} == results

    layers, header = read_lora(files[0])
    magnitudes = [layer.magnitude for name, layer in layers.items() if name.startswith("transformer.")]
    assert None not in magnitudes
    assert "dora" in header["ss_network_args"]
    assert "DoRA" in (folder / "README.md").read_text()


def test_what_a_dora_cannot_do_is_refused(short_runs, tmp_path, capsys):
    words = [*map(str, short_runs["train_dreambooth_flux_advanced"]), "--output_dir", str(tmp_path / "run"), "--use_dora"]
    for more in (["--quantize_base", "int8"], ["--save_format", "kohya", "--output_name", "x"]):
        with pytest.raises(SystemExit):
            dreambooth.parse_args([*words, *more])
        said = capsys.readouterr().err
        assert "DoRA" in said or "--use_dora" in said
        assert more[0] in said
