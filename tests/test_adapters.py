"""DoRA and LoKr: at the trained strength in every reader, started and resumed exactly, in all trainers."""

import copy
import itertools
import re
import shutil
from types import SimpleNamespace

from common.lora import (
    adapter_options,
    adapter_size,
    add_lora,
    check_lora_file,
    dora_norms,
    layer_shapes,
    load_lora,
    save_exact_lora,
    save_lora,
    start_from_lora,
    target_layers,
    without_adapters,
)
from common.lora_formats import LoraLayer, read_lora
from common.models import compile_blocks, quantize_base

import pytest
import tiny_backbones
import torch
from diffusers import FluxFillPipeline, FluxPipeline, FluxTransformer2DModel
from safetensors.torch import load_file, save_file
from test_lora import run, with_random_lora
from test_omini_forward import inputs, new_transformer, omini_forward

import train_dreambooth_flux_advanced as dreambooth
import train_influxedit as influxedit
from examples import convert_lora
from examples.twinflow import generate as generate_twinflow


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
    else:
        w1 = tensors.pop(f"{name}.lokr_w1").float()
        if f"{name}.lokr_w2" in tensors:  # then alpha counts for nothing
            w2 = tensors.pop(f"{name}.lokr_w2").float()
        else:
            second, third = tensors.pop(f"{name}.lokr_w2_a").float(), tensors.pop(f"{name}.lokr_w2_b").float()
            w2 = second @ third * (1 if alpha is None else alpha / len(third))
        difference = torch.kron(w1, w2)
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


KINDS = {"DoRA": {"use_dora": True}, "LoKr": {"lokr_factor": -1}, "LoKr of factor 16": {"lokr_factor": 16}}
ADAPTER_KINDS = {"LoRA": {}, "DoRA": {"use_dora": True}, "LoKr": {"lokr_factor": -1}}
DORA_AND_LOKR = pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)


@DORA_AND_LOKR
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_adapter_is_itself_in_diffusers_and_comfyui(tiny, tmp_path, dtype, kind):
    modules = {
        "transformer": adapted(tiny.transformer, **kind),
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
    if "use_dora" not in kind:
        factors = {key.rpartition(".")[2] for key in load_file(file) if ".lokr_" in key}
        assert factors >= {"lokr_w1", "lokr_w2_a", "lokr_w2_b"}
        assert ("lokr_w2" in factors) == (kind["lokr_factor"] == 16)
        return
    magnitudes = [value for key, value in load_file(file).items() if "magnitude" in key or "dora_scale" in key]
    assert {value.dtype for value in magnitudes} == {torch.float32}


@DORA_AND_LOKR
def test_an_adapter_of_flux2_is_itself_in_its_pipeline(tmp_path, kind):
    torch.manual_seed(0)
    pipeline = tiny_backbones.flux2_klein()
    targets = [name for name, layer in pipeline.transformer.named_modules() if isinstance(layer, torch.nn.Linear)]
    trained = adapted(pipeline.transformer, [name for name in targets if "_blocks." in name], **kind)
    save_lora(tmp_path, {"transformer": trained})
    assert read_lora(tmp_path / "pytorch_lora_weights.safetensors", flux=False)[0].keys() >= {
        "transformer.single_transformer_blocks.0.attn.to_out"
    }
    pipeline.load_lora_weights(tmp_path)
    expected, found = merged_weights(trained), merged_weights(pipeline.transformer)
    assert found.keys() == expected.keys()
    assert max(relative_error(found[name], expected[name]) for name in expected) < 1e-5


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


@DORA_AND_LOKR
def test_the_file_to_resume_from_is_exact(tiny, tmp_path, kind):
    trained, other = (adapted(tiny.transformer, seed=seed, **kind) for seed in (0, 9))
    save_exact_lora(tmp_path / "a", {"transformer": trained})
    load_lora(tmp_path / "a", {"transformer": other})
    assert torch.equal(run(trained), run(other))
    layers, _ = read_lora(tmp_path / "a")  # as its header says
    assert {layer.scale for layer in layers.values()} == {1.5}

    later = adapted(tiny.transformer, seed=7, alpha=5, **kind)
    start_from_lora(tmp_path / "a", {"transformer": later})
    assert relative_error(run(later), run(trained)) < 1e-4


def test_a_lokr_goes_on_as_one_of_the_same_factors(tiny, tmp_path):
    save_lora(tmp_path, {"transformer": adapted(tiny.transformer, lokr_factor=4)})
    file = tmp_path / "pytorch_lora_weights.safetensors"
    shapes = layer_shapes("transformer", tiny.transformer, LAYERS)
    assert check_lora_file(file, shapes, 2, lokr_factor=4) == []
    (problem,) = check_lora_file(file, shapes, 2, lokr_factor=-1)
    assert "--lokr_factor" in problem
    (problem,) = check_lora_file(file, shapes, 2)
    assert "--lora_type lokr" in problem
    save_lora(tmp_path, {"transformer": adapted(tiny.transformer)}, weight_name="plain.safetensors")
    (problem,) = check_lora_file(tmp_path / "plain.safetensors", shapes, 2, lokr_factor=4)
    assert "--lora_type lora" in problem


def test_a_lokr_of_another_program_whose_factors_are_whole_has_no_rank(tiny, tmp_path):
    layers = ("attn.to_q", "ff.net.2")
    kind = {"rank": 64, "lokr_factor": 4}
    trained = adapted(tiny.transformer, layers, **kind)
    save_lora(tmp_path, {"transformer": trained})
    tensors = load_file(tmp_path / "pytorch_lora_weights.safetensors")
    assert not [key for key in tensors if "lokr_w2_a" in key]
    file = tmp_path / "other.safetensors"
    for name in {key.rpartition(".")[0] for key in tensors if ".lokr_" in key}:
        tensors[f"{name}.alpha"] = torch.tensor(1.0)  # LyCORIS' default, which then counts for nothing
    save_file(tensors, file)  # no header
    shapes = layer_shapes("transformer", tiny.transformer, layers)
    assert check_lora_file(file, shapes, **kind) == []
    continued = adapted(tiny.transformer, layers, seed=5, **kind)
    start_from_lora(file, {"transformer": continued})
    assert relative_error(run(continued), run(trained)) < 1e-4
    (problem,) = check_lora_file(file, shapes, 2, lokr_factor=4)
    assert "--rank 2" in problem

    backbone = SimpleNamespace(load_transformer=lambda dtype: copy.deepcopy(tiny.transformer))
    args = SimpleNamespace(training="lora", model_type="flux")
    drawing, _ = generate_twinflow.load_transformer(file, backbone, args, torch.float32)
    assert relative_error(run(drawing), run(trained)) < 1e-4


def test_a_dora_of_clip_is_refused(tiny, tmp_path):
    save_lora(tmp_path, {"text_encoder": adapted(tiny.text_encoder, CLIP, use_dora=True)})
    shapes = layer_shapes("text_encoder", tiny.text_encoder, CLIP)
    (problem,) = check_lora_file(tmp_path / "pytorch_lora_weights.safetensors", shapes, 2, use_dora=True)
    assert "CLIP" in problem


@pytest.mark.parametrize("lora_type", ["lora", "dora", "lokr", "lokr of factor 4"])
def test_the_size_of_an_adapter_is_known_before_it_is_there(tiny, lora_type):
    args = SimpleNamespace(rank=2, use_dora=lora_type == "dora", lora_type=lora_type[:4].replace("dora", "lora"))
    args.lokr_factor = 4 if "4" in lora_type else None
    layers = target_layers(tiny.transformer, LAYERS)
    expected = sum(adapter_size(args, layer) for _, layer in layers)
    options = adapter_options(args)
    parameters = add_lora(tiny.transformer, rank=2, alpha=2, dropout=0.0, target_modules=LAYERS, **options)
    assert sum(parameter.numel() for parameter in parameters) == expected


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


@pytest.mark.parametrize(
    ("kind", "dropout"), [({"use_dora": True}, 0.0), ({"use_dora": True}, 0.5), (KINDS["LoKr"], 0.0)]
)
def test_omini_tokens_pass_the_adapter_that_the_stock_model_has(kind, dropout):
    stock, transformer = new_transformer(model_class=FluxTransformer2DModel), new_transformer()
    for model in (stock, transformer):
        torch.manual_seed(0)
        add_lora(
            model,
            rank=2,
            alpha=3,
            dropout=dropout,
            target_modules=["attn.to_q", "ff.net.2", "proj_out"],
            **kind,
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
    trained = [parameter for parameter in transformer.parameters() if parameter.requires_grad]
    assert min(parameter.grad.abs().max() for parameter in trained) > 0


@pytest.mark.parametrize(("first", "second"), list(itertools.permutations(ADAPTER_KINDS, 2)))
def test_omini_tokens_pass_one_of_two_adapters_of_different_kinds(first, second):
    def add(model, name, seed):
        kind = ADAPTER_KINDS[name]
        add_lora(model, rank=2, alpha=3, dropout=0.0, target_modules=["attn.to_q"], adapter_name=name, **kind)
        return randomized(model, seed).requires_grad_(False)

    arguments = inputs()
    both = new_transformer()
    for seed, name in enumerate((first, second)):
        add(both, name, seed)
    both.set_adapter([first, second])
    for seed, name in enumerate((first, second)):
        expected = omini_forward(add(new_transformer(), name, seed), arguments, main_adapter=name)
        assert torch.equal(omini_forward(both, arguments, main_adapter=name), expected)
    assert torch.equal(omini_forward(both, arguments), omini_forward(new_transformer(), arguments))


@DORA_AND_LOKR
def test_without_adapters_the_base_predicts_bit_for_bit(kind):
    base = new_transformer(model_class=FluxTransformer2DModel)
    model = adapted(base, ["attn.to_q", "norm1.linear", "proj_out"], **kind).train()
    with torch.no_grad(), without_adapters(model):
        found = model(**inputs(), return_dict=False)[0]
    assert torch.equal(found, base(**inputs(), return_dict=False)[0])
    after = model(**inputs(), return_dict=False)[0]
    assert relative_error(after, found) > 0.01
    after.square().mean().backward()
    trained = [p for name, p in model.named_parameters() if re.search(r"\.lora_|\.lokr_", name)]
    assert all(parameter.grad is not None for parameter in trained)


@pytest.mark.slow
def test_a_compiled_dora_is_the_same():
    model = new_transformer(model_class=FluxTransformer2DModel, layers=1, single_layers=1)
    model = adapted(model, ["attn.to_q", "proj_mlp"], use_dora=True)
    before = model(**inputs(), return_dict=False)[0]
    compile_blocks(model)
    assert relative_error(model(**inputs(), return_dict=False)[0], before) < 1e-5


LORA_TYPES = {"DoRA": ["--use_dora", "--lora_dropout", 0.1], "LoKr": ["--lora_type", "lokr", "--lokr_factor", 4]}
RUNS = {
    "train_dreambooth_flux_advanced": "--train_text_encoder --cache_latents",
    "train_omini": "--condition_type canny coloring --adapter_per_condition --independent_condition",
    "train_influxedit": "--optimizer prodigy --learning_rate 1",
    "train_twinflow": "--ema_decay_rate 0.5 --gradient_checkpointing",
}
SCRIPTS = [pytest.param(script, marks=pytest.mark.slow if "dreambooth" not in script else []) for script in RUNS]


@pytest.mark.parametrize("kind", LORA_TYPES)
@pytest.mark.parametrize("script", SCRIPTS)
def test_a_run_resumes_exactly(train, short_runs, tmp_path, script, kind):
    folder = tmp_path / "run"
    words = [*short_runs[script], *RUNS[script].split(), "--seed", 0, "--lora_alpha", 3]
    words += [*LORA_TYPES[kind], "--max_train_steps", 4, "--checkpointing_steps", 2, "--output_dir", folder]
    train(script, *words)
    files = [*folder.glob("*.safetensors")]
    results = {file: load_file(file) for file in files}
    assert len(files) == (2 if script == "train_omini" else 1)
    for file in files:
        file.unlink()
    shutil.rmtree(folder / "checkpoint-4")
    train(script, *words, "--resume_from_checkpoint", "latest")
    for file, before in results.items():
        after = load_file(file)
        assert after.keys() == before.keys()
        assert [key for key in before if not torch.equal(after[key], before[key])] == []

    layers, header = read_lora(files[0])
    for name, layer in layers.items():
        is_plain = isinstance(layer, LoraLayer) and layer.magnitude is None
        assert is_plain == name.startswith("text_encoder.")
    assert kind.lower() in header["ss_network_args"]
    assert kind in (folder / "README.md").read_text()


@pytest.mark.parametrize(
    ("kind", "flags", "key_word"),
    [
        ("DoRA", "--quantize_base int8", "--quantize_base"),
        ("DoRA", "--quantize_base fp8", "--quantize_base"),
        ("DoRA", "--save_format kohya --output_name x", "--save_format"),
        ("LoKr", "--save_format kohya --output_name x", "--save_format"),
        ("LoKr", "--quantize_base nf4", "--quantize_base"),
        ("LoKr", "--lora_dropout 0.1", "--lora_dropout"),
        ("LoKr", "--use_dora", "--use_dora"),
        ("LoKr", "--use_rslora", "--use_rslora"),
        ("LoKr", "--init_lora_weights default", "--init_lora_weights"),
    ],
)
def test_what_an_adapter_cannot_do_is_refused(short_runs, tmp_path, capsys, kind, flags, key_word):
    words = [*short_runs["train_dreambooth_flux_advanced"], "--output_dir", tmp_path, *LORA_TYPES[kind]]
    with pytest.raises(SystemExit):
        dreambooth.parse_args([*map(str, words), *flags.split()])
    assert key_word in capsys.readouterr().err
