"""common/lora_formats.py: ComfyUI's rules, kohya's fused layers, headers, and every way round."""

import base64
import copy
import hashlib
import importlib
import io
import json
from argparse import ArgumentTypeError
from pathlib import Path
from types import SimpleNamespace

from common.arguments import file_name
from common.lora import (
    adapter_weights,
    add_lora,
    check_lora_file,
    lora_file,
    lora_in,
    lora_layers,
    save_exact_lora,
    save_lora,
    start_from_lora,
)
from common.lora_formats import (
    LORA_FORMS,
    LoraLayer,
    diffusers_state_dict,
    full_name,
    fused_layers,
    read_lora,
    split_layer,
    write_lora,
)
from common.tracking import METADATA, add_thumbnail, lora_header

import pytest
import tiny_backbones
import torch
from accelerate import Accelerator
from conftest import ROOT
from diffusers import FluxFillPipeline, FluxPipeline, FluxTransformer2DModel
from diffusers.loaders.lora_conversion_utils import _convert_kohya_flux_lora_to_diffusers
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from test_lora import run, with_random_lora

import train_influxedit as influxedit
import train_twinflow as twinflow
from examples import convert_lora


# ComfyUI's rules for a LoRA on FLUX.1, written down from its behaviour: for each weight of the model, by which names
# a file may call it, and which rows of the weight that name means.
HIDDEN = 64
CLIP_LAYERS = [f"self_attn.{part}_proj" for part in "qkv"] + ["self_attn.out_proj", "mlp.fc1", "mlp.fc2"]
OUTER_LAYERS = {
    "x_embedder": "img_in",
    "time_text_embed.timestep_embedder.linear_1": "time_in.in_layer",
    "time_text_embed.timestep_embedder.linear_2": "time_in.out_layer",
}


def comfyui_names(blocks=1, single_blocks=1, clip_layers=1):
    """{name in a file: (weight of the model, first row, number of rows or None for all)}."""
    h, names = HIDDEN, {}
    for i in range(blocks):
        ours, theirs = f"transformer_blocks.{i}", f"double_blocks.{i}"
        split = {
            "attn.to_q": ("img_attn.qkv", 0, h),
            "attn.to_k": ("img_attn.qkv", h, h),
            "attn.to_v": ("img_attn.qkv", 2 * h, h),
            "attn.add_q_proj": ("txt_attn.qkv", 0, h),
            "attn.add_k_proj": ("txt_attn.qkv", h, h),
            "attn.add_v_proj": ("txt_attn.qkv", 2 * h, h),
            "attn.to_out.0": ("img_attn.proj", 0, None),
            "attn.to_add_out": ("txt_attn.proj", 0, None),
            "ff.net.0.proj": ("img_mlp.0", 0, None),
            "ff.net.2": ("img_mlp.2", 0, None),
            "ff_context.net.0.proj": ("txt_mlp.0", 0, None),
            "ff_context.net.2": ("txt_mlp.2", 0, None),
            "norm1.linear": ("img_mod.lin", 0, None),
            "norm1_context.linear": ("txt_mod.lin", 0, None),
        }
        for name, (weight, *rows) in split.items():
            names[f"transformer.{ours}.{name}"] = (f"{theirs}.{weight}", *rows)
            names[f"lora_unet_{theirs}.{weight}".replace(".", "_")] = (f"{theirs}.{weight}", 0, None)
    for i in range(single_blocks):
        ours, theirs = f"single_transformer_blocks.{i}", f"single_blocks.{i}"
        split = {
            "attn.to_q": ("linear1", 0, h),
            "attn.to_k": ("linear1", h, h),
            "attn.to_v": ("linear1", 2 * h, h),
            "proj_mlp": ("linear1", 3 * h, 4 * h),
            "proj_out": ("linear2", 0, None),
            "norm.linear": ("modulation.lin", 0, None),
        }
        for name, (weight, *rows) in split.items():
            names[f"transformer.{ours}.{name}"] = (f"{theirs}.{weight}", *rows)
            names[f"lora_unet_{theirs}.{weight}".replace(".", "_")] = (f"{theirs}.{weight}", 0, None)
    for i in range(clip_layers):
        for part in CLIP_LAYERS:
            weight = f"text_model.encoder.layers.{i}.{part}"
            names[f"text_encoder.{weight}"] = names[f"lora_te1_{weight}".replace(".", "_")] = (weight, 0, None)
    for ours, weight in OUTER_LAYERS.items():
        names[f"transformer.{ours}"] = names[f"lora_unet_{weight}".replace(".", "_")] = (weight, 0, None)
    return names


PAIRS = [(".lora_up.weight", ".lora_down.weight"), (".lora_B.weight", ".lora_A.weight")]


def comfyui_patches(path, shapes):
    """What ComfyUI adds to each weight {weight: [out, in]} for a file, and the keys it says were not loaded."""
    tensors, patches = load_file(path), {}  # the header is ignored
    for name, (weight, start, length) in comfyui_names().items():
        for up, down in PAIRS:
            if name + up not in tensors:
                continue
            up, down = tensors.pop(name + up), tensors.pop(name + down)
            alpha = tensors.pop(f"{name}.alpha", None)
            scale = 1.0 if alpha is None else alpha.item() / down.shape[0]
            patch = patches.setdefault(weight, torch.zeros(shapes[weight]))
            patch[start : start + (length or len(patch))] += scale * (up.float() @ down.float())
    return patches, list(tensors)


def model_shapes(layers):
    """The shapes of the weights of a model with FLUX.1's own fused layers."""
    shapes = {}
    for name, (weight, start, length) in comfyui_names().items():
        if name in layers:
            layer = layers[name]
            rows = len(layer.up) if length is None else start + length
            shapes[weight] = (max(rows, shapes.get(weight, (0, 0))[0]), layer.down.shape[1])
    for weight, (_, width) in shapes.items():
        if weight.endswith(("qkv", "linear1")):
            shapes[weight] = ((3 if weight.endswith("qkv") else 7) * HIDDEN, width)
    return shapes


def expected_patches(layers):
    patches, shapes = {}, model_shapes(layers)
    for name, layer in layers.items():
        weight, start, length = comfyui_names()[name]
        patch = patches.setdefault(weight, torch.zeros(shapes[weight]))
        patch[start : start + (length or len(patch))] += layer.alpha / len(layer.down) * (layer.up @ layer.down)
    return patches


def block_layers(transformer):
    layers = [name for name, module in transformer.named_modules() if isinstance(module, torch.nn.Linear)]
    return [name for name in layers if "transformer_blocks." in name]


@pytest.fixture
def adapted(tiny):
    """adapted(rank, alpha): the tiny transformer and CLIP with random adapters on every layer of their blocks."""

    def make(rank, alpha, **kind):
        clip = ("q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2")
        transformer = with_random_lora(tiny.transformer, rank, alpha, block_layers(tiny.transformer), **kind)
        return {
            "transformer": transformer,
            "text_encoder": with_random_lora(tiny.text_encoder, rank, alpha, clip, seed=2, **kind),
        }

    return make


@pytest.mark.parametrize("form", ["comfyui", "kohya"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("rank", "alpha"), [(4, 4), (4, 8), (8, 2), (3, 1.5), (4, 7)])
def test_comfyui_loads_every_key_at_the_right_strength(adapted, tmp_path, form, dtype, rank, alpha):
    layers = lora_layers(adapted(rank, alpha))
    assert len(layers) == 14 + 6 + 6
    write_lora(tmp_path / "x.safetensors", layers, form, dtype=dtype)
    expected = expected_patches(layers)
    patches, not_loaded = comfyui_patches(tmp_path / "x.safetensors", model_shapes(layers))
    assert not not_loaded
    assert patches.keys() == expected.keys()
    error = max((patches[key] - expected[key]).abs().max() / expected[key].abs().max() for key in patches)
    assert error < (0.01 if dtype == torch.bfloat16 else 1e-6)
    assert min(patch.abs().max() for patch in patches.values()) > 0.01


@pytest.mark.parametrize("form", LORA_FORMS)
def test_every_reader_has_the_strength_of_rslora(adapted, tiny, tmp_path, form):
    modules = adapted(4, 6, use_rslora=True)
    scale = 6 / 4**0.5
    file = tmp_path / "x.safetensors"
    save_lora(tmp_path, modules, weight_name=file.name, form=form)
    layers = lora_layers(modules)
    expected = {}  # from the weights in training
    for component, model in modules.items():
        weights = adapter_weights(model)
        for key, down in weights.items():
            if key.endswith(".lora_A.weight"):
                up = weights[key.replace("lora_A", "lora_B")]
                expected[full_name(f"{component}.{key.removesuffix('.lora_A.weight')}")] = LoraLayer(
                    down, up, scale * 4
                )
    assert_same_effect(layers, expected)
    patches, not_loaded = comfyui_patches(file, model_shapes(layers))
    assert not not_loaded
    for weight, patch in expected_patches(expected).items():
        torch.testing.assert_close(patches[weight], patch, atol=1e-5, rtol=1e-5)
    header = content(file)[0]
    assert (header["ss_network_dim"], header["ss_network_alpha"]) == ("4", "12")
    if form != "kohya":
        pipeline = FluxPipeline(**tiny.components_but_image())
        pipeline.load_lora_weights(file)
        torch.testing.assert_close(run(pipeline.transformer), run(modules["transformer"]), atol=1e-4, rtol=1e-4)

    # what a run resumes from, and a file that another run begins with, of another alpha and rule
    save_exact_lora(tmp_path / "resume_x.safetensors", modules)
    assert_same_effect(read_lora(tmp_path / "resume_x.safetensors")[0], expected)
    for kind in ({"use_rslora": True}, {}):
        others = {
            name: with_random_lora(getattr(tiny, name), 4, 5, targets, seed=3, **kind)
            for name, targets in {"transformer": block_layers(tiny.transformer), "text_encoder": CLIP_LAYERS}.items()
        }
        start_from_lora(file, others)
        torch.testing.assert_close(run(others["transformer"]), run(modules["transformer"]), atol=1e-4, rtol=1e-4)


def test_these_rules_see_what_peft_files_get_wrong(adapted, tmp_path):
    modules = adapted(4, 8)
    tensors = {}
    for component, model in modules.items():
        tensors |= {f"{component}.{key}": value for key, value in adapter_weights(model).items()}
    save_file(tensors, tmp_path / "x.safetensors")
    layers = lora_layers(modules)
    patches, not_loaded = comfyui_patches(tmp_path / "x.safetensors", model_shapes(layers))
    expected = expected_patches(layers)
    assert all(torch.allclose(2 * patches[key], expected[key], atol=1e-5) for key in patches)  # alpha is lost
    assert len(not_loaded) == 2 * 6  # CLIP's keys have no text_model


@pytest.mark.parametrize(("rank", "alpha"), [(4, 4), (4, 8), (3, 1.5)])
@pytest.mark.parametrize("form", ["comfyui", "diffusers"])
def test_diffusers_loads_the_same_file(adapted, tiny, tmp_path, form, rank, alpha):
    modules = adapted(rank, alpha)
    write_lora(tmp_path / "x.safetensors", lora_layers(modules), form, {"ss_output_name": "x"})
    pipeline = FluxPipeline(**tiny.components_but_image())
    pipeline.load_lora_weights(tmp_path, weight_name="x.safetensors")
    torch.testing.assert_close(run(pipeline.transformer), run(modules["transformer"]), atol=1e-4, rtol=1e-4)
    assert (run(pipeline.transformer) - run(tiny.transformer)).abs().max() > 0.01
    ids = torch.tensor([[3, 17, 40, 5, tiny.text_encoder.config.vocab_size - 1]])
    with torch.no_grad():
        ours, theirs = modules["text_encoder"](ids).pooler_output, pipeline.text_encoder(ids).pooler_output
        plain = tiny.text_encoder(ids).pooler_output
    torch.testing.assert_close(theirs, ours, atol=1e-5, rtol=1e-5)
    assert (ours - plain).abs().max() > 1e-3


@pytest.fixture
def fill_transformer(tiny_fill):
    return FluxTransformer2DModel.from_pretrained(tiny_fill, subfolder="transformer")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_trained_embedder_is_a_lora_in_every_reader(fill_transformer, tiny_fill, tmp_path, capsys, dtype):
    trained = copy.deepcopy(fill_transformer)
    add_lora(trained, rank=2, alpha=4, dropout=0.0, target_modules=["attn.to_q"], modules_to_save=["x_embedder"])
    torch.manual_seed(0)
    for parameter in (p for p in trained.parameters() if p.requires_grad):
        parameter.data += 0.1 * torch.randn_like(parameter)
    before, after = fill_transformer.x_embedder, trained.x_embedder.modules_to_save["default"]
    tokens = torch.randn(7, 384)
    tokens[:, -256:] = 1  # the mask in edit mode
    with torch.no_grad():
        change = after(tokens) - before(tokens)
    bar = {"atol": 5e-3 * change.abs().max().item() if dtype == torch.bfloat16 else 1e-5, "rtol": 1e-5}
    file = tmp_path / "x.safetensors"
    more_layers = influxedit.embedder_lora(trained)
    save_lora(tmp_path, {"transformer": trained}, dtype, weight_name=file.name, more_layers=more_layers)

    # diffusers, beside another LoRA that has the layer, too
    second = with_random_lora(copy.deepcopy(fill_transformer), 3, 3, ["attn.to_q", "x_embedder"], seed=5)
    save_lora(tmp_path, {"transformer": second}, weight_name="second.safetensors")
    pipeline = FluxFillPipeline.from_pretrained(tiny_fill, vae=None, text_encoder_2=None, tokenizer_2=None)
    pipeline.load_lora_weights(file, adapter_name="edit")
    pipeline.load_lora_weights(tmp_path / "second.safetensors", adapter_name="second")
    embedder = pipeline.transformer.x_embedder
    to_q = "transformer.transformer_blocks.0.attn.to_q"
    assert pipeline.transformer.transformer_blocks[0].attn.to_q.scaling == {"edit": 1, "second": 1}
    with torch.no_grad():
        other = second.x_embedder(tokens) - before(tokens)
        for weight in (1, 0.5, 0):
            for other_weight in (0, 1):
                pipeline.set_adapters(["edit", "second"], [weight, other_weight])
                expected = before(tokens) + weight * change + other_weight * other
                torch.testing.assert_close(embedder(tokens), expected, **bar)
        pipeline.set_adapters(["edit"], [1])
        torch.testing.assert_close(embedder(tokens), before(tokens) + change, **bar)
        pipeline.disable_lora()
        assert torch.equal(embedder(tokens), before(tokens))

    # ComfyUI and Forge, and every form that it is converted to
    expected = lora_layers({"transformer": trained})
    for form in ("comfyui", "kohya"):
        converted = tmp_path / f"{form}.safetensors"
        convert_lora.main([str(file), str(converted), "--to", form])
        for path in (file, converted):
            patches, not_loaded = comfyui_patches(path, model_shapes(expected | more_layers))
            assert not not_loaded
            torch.testing.assert_close(tokens @ patches["img_in"].T, change, **bar)
            patch = patches["double_blocks.0.img_attn.qkv"][:HIDDEN]
            wanted = expected[to_q].scale * expected[to_q].up @ expected[to_q].down
            torch.testing.assert_close(patch, wanted, atol=5e-3 * wanted.abs().max().item(), rtol=1e-5)
    header = content(file)[0]
    assert (header["ss_network_dim"], header["ss_network_alpha"]) == ("2", "4")


def test_a_header_tells_layers_of_other_ranks(tiny, tmp_path):
    names = ["transformer_blocks.0.attn.to_q", "single_transformer_blocks.0.proj_out", "proj_out"]
    sizes = {name: tiny.transformer.get_submodule(name).weight.shape for name in names}
    torch.manual_seed(0)
    layers = {}
    for name, rank in zip(names, (4, 4, 2), strict=True):
        out_features, in_features = sizes[name]
        down, up = torch.randn(rank, in_features), torch.randn(out_features, rank)
        layers[f"transformer.{name}"] = LoraLayer(down, up, 3.0)
    clip_layers = tiny.text_encoder.config.num_hidden_layers
    width = tiny.text_encoder.config.hidden_size
    for i in range(clip_layers):
        name = f"text_encoder.text_model.encoder.layers.{i}.self_attn.q_proj"
        layers[name] = LoraLayer(torch.randn(2 + i, width), torch.randn(width, 2 + i), 3.0)
    write_lora(tmp_path / "x.safetensors", layers)
    assert_same_effect(read_lora(tmp_path / "x.safetensors")[0], layers)
    assert "lora_adapter_metadata" in content(tmp_path / "x.safetensors")[0]
    pipeline = FluxPipeline(**tiny.components_but_image())
    before = {name: tiny.transformer.get_submodule(name).weight.clone() for name in names}
    pipeline.load_lora_weights(tmp_path / "x.safetensors")
    pipeline.fuse_lora(components=["transformer", "text_encoder"])
    pipeline.unload_lora_weights()
    for name in names:
        layer = layers[f"transformer.{name}"]
        difference = pipeline.transformer.get_submodule(name).weight - before[name]
        torch.testing.assert_close(difference, layer.scale * layer.up @ layer.down, atol=1e-5, rtol=1e-4)


def random_layers(width, rank, alpha, names, seed=0):
    generator = torch.Generator().manual_seed(seed)
    draw = lambda *shape: torch.randn(*shape, generator=generator)  # noqa: E731
    return {
        name: LoraLayer(draw(rank, width), draw(width * (4 if "mlp" in name else 1), rank), float(alpha))
        for name in names
    }


QKV = [f"transformer.transformer_blocks.7.attn.to_{part}" for part in "qkv"]
SINGLE = [f"transformer.single_transformer_blocks.31.attn.to_{part}" for part in "qkv"]
SINGLE.append("transformer.single_transformer_blocks.31.proj_mlp")


@pytest.mark.parametrize(
    ("rank", "alpha"), [(2, 2), *(pytest.param(*case, marks=pytest.mark.slow) for case in ((3, 1), (4, 16)))]
)
def test_diffusers_own_converter_reads_the_fused_form_exactly(rank, alpha):
    layers = random_layers(3072, rank, alpha, [*QKV, *SINGLE])
    state_dict = {}
    for name, layer in fused_layers(layers).items():
        state_dict |= {f"{name}.lora_down.weight": layer.down, f"{name}.lora_up.weight": layer.up}
        state_dict[f"{name}.alpha"] = torch.tensor(layer.alpha)
    converted = _convert_kohya_flux_lora_to_diffusers(state_dict)
    differences = []
    for name, layer in layers.items():
        theirs = converted[f"{name}.lora_B.weight"].double() @ converted[f"{name}.lora_A.weight"].double()
        differences.append(
            (theirs - layer.alpha / rank * (layer.up.double() @ layer.down.double())).abs().max().item()
        )
    print(f"rank {rank}, alpha {alpha}: largest difference {max(differences):.1e} (bar 1e-6)")
    assert max(differences) <= 1e-6
    assert len(differences) == 7


def test_a_thumbnail_is_small_and_changes_no_weight(adapted, tmp_path):
    file = tmp_path / "x.safetensors"
    write_lora(file, lora_layers(adapted(4, 6)), "diffusers", {"ss_output_name": "mine"})
    header, weights = content(file)
    image = Image.effect_noise((1024, 512), 64)
    for _ in range(2):
        add_thumbnail(Accelerator(cpu=True), [file], image)
        header_after, weights_after = content(file)
        url = header_after.pop("modelspec.thumbnail")
        assert (header_after, weights_after) == (header, weights)
    thumbnail = Image.open(io.BytesIO(base64.b64decode(url.removeprefix("data:image/jpeg;base64,"))))
    assert thumbnail.size == (256, 128)
    assert len(url) < 50_000
    data = file.read_bytes()
    length = int.from_bytes(data[:8], "little")
    assert header["sshs_model_hash"] == hashlib.sha256(data[8 + length :]).hexdigest()


def assert_same_effect(a, b):
    assert a.keys() == b.keys()
    for name in a:
        effects = [layer.alpha / len(layer.down) * (layer.up @ layer.down) for layer in (a[name], b[name])]
        torch.testing.assert_close(*effects, atol=1e-5, rtol=1e-5)


def unfused(fused):
    parts = {}
    for name, layer in fused.items():
        parts |= split_layer(name, layer)
    return parts


def test_fusing_is_undone_exactly_also_for_missing_parts_and_unlike_ranks():
    whole = random_layers(16, 4, 8, [*QKV, *SINGLE])
    back = unfused(fused_layers(whole))
    assert all(torch.equal(whole[name].down, back[name].down) for name in whole)
    assert all(torch.equal(whole[name].up, back[name].up) for name in whole)
    assert {layer.alpha for layer in back.values()} == {8.0}
    for names in ([QKV[0]], QKV[1:], [SINGLE[3]], [SINGLE[0], SINGLE[3]]):
        some = random_layers(16, 3, 6, names)
        assert_same_effect(unfused(fused_layers(some)), some)
        (fused,) = fused_layers(some).values()
        assert len(fused.up) == (48 if "single" not in names[0] else 112)
    unlike = random_layers(16, 2, 2, QKV[:1]) | random_layers(16, 4, 12, QKV[1:], seed=1)
    assert_same_effect(unfused(fused_layers(unlike)), unlike)


def test_a_shared_down_as_kohya_trains_it_goes_to_every_part():
    generator = torch.Generator().manual_seed(0)
    down, up = torch.randn(6, 16, generator=generator), torch.randn(48, 6, generator=generator)
    parts = split_layer("lora_unet_double_blocks_7_img_attn_qkv", LoraLayer(down, up, 3.0))
    assert list(parts) == QKV
    merged = torch.cat([layer.scale * (layer.up @ layer.down) for layer in parts.values()])
    torch.testing.assert_close(merged, 0.5 * up @ down)


def test_every_form_becomes_every_other_and_back(adapted, tmp_path, capsys):
    layers = lora_layers(adapted(4, 6))
    write_lora(tmp_path / "diffusers.safetensors", layers, "diffusers", {"ss_output_name": "mine"})
    for first in LORA_FORMS:
        convert_lora.main([str(tmp_path / "diffusers.safetensors"), str(tmp_path / f"{first}.2"), "--to", first])
        for second in LORA_FORMS:
            convert_lora.main([str(tmp_path / f"{first}.2"), str(tmp_path / f"{first}-{second}"), "--to", second])
            back, header = read_lora(tmp_path / f"{first}-{second}")
            assert back.keys() == layers.keys()
            for name, layer in layers.items():
                assert torch.equal(back[name].down, layer.down)
                assert torch.equal(back[name].up, layer.up * 1.5)
                assert back[name].scale == 1
            assert header == {"ss_output_name": "mine", "ss_network_dim": "4", "ss_network_alpha": "6"}
    assert "26 layers of rank 4" in capsys.readouterr().out


def test_other_spellings_are_read_and_others_refused(tmp_path, capsys):
    file, pair = tmp_path / "x.safetensors", {"A": torch.ones(2, 16), "B": torch.ones(48, 2)}
    save_file({f"diffusion_model.double_blocks.7.img_attn.qkv.lora_{k}.weight": v for k, v in pair.items()}, file)
    assert list(read_lora(file)[0]) == QKV
    save_file({f"lora_te3_encoder_block_0.lora_{k}.weight": v for k, v in pair.items()}, file)
    with pytest.raises(SystemExit):
        convert_lora.main([str(file), str(tmp_path / "y")])
    assert "not a LoRA for FLUX.1 in a known form: lora_te3_encoder_block_0" in capsys.readouterr().err
    save_file({f"transformer.transformer_blocks.0.img_mod.1.lora_{k}.weight": v for k, v in pair.items()}, file)
    with pytest.raises(SystemExit):
        convert_lora.main([str(file), str(tmp_path / "y"), "--to", "kohya"])
    assert "known form: transformer.transformer_blocks.0.img_mod.1" in capsys.readouterr().err
    file.write_bytes(b"<html>")
    with pytest.raises(SystemExit):
        convert_lora.main([str(file), str(tmp_path / "y")])
    assert not (tmp_path / "y").exists()


def test_a_conversion_replaces_no_file(adapted, tmp_path, capsys):
    file, other = tmp_path / "x.safetensors", tmp_path / "y.safetensors"
    write_lora(file, lora_layers(adapted(2, 2)))
    other.write_bytes(b"mine")
    before = file.read_bytes()
    for output in (file, other):
        with pytest.raises(SystemExit) as stop:
            convert_lora.main([str(file), str(output), "--to", "kohya"])
        assert stop.value.code == 2
        assert f"{output} exists" in capsys.readouterr().err
    assert (file.read_bytes(), other.read_bytes()) == (before, b"mine")


def test_hashes_of_the_file_that_was_are_dropped_and_those_of_the_model_kept(tmp_path):
    tensors = {f"{QKV[0]}.lora_A.weight": torch.ones(2, 16), f"{QKV[0]}.lora_B.weight": torch.ones(16, 2)}
    stale = {"sshs_model_hash": "1", "sshs_legacy_hash": "2", "modelspec.hash_sha256": "0x3"}
    save_file(tensors, tmp_path / "x.safetensors", {"format": "pt", "ss_sd_model_hash": "4"} | stale)
    assert read_lora(tmp_path / "x.safetensors")[1] == {"ss_sd_model_hash": "4"}


def test_the_header_and_the_hash_are_what_civitai_and_forge_look_up(adapted, tmp_path):
    layers = lora_layers(adapted(4, 8))
    args = SimpleNamespace(output_name="mine", output_dir=tmp_path, pretrained_model_name_or_path="x/FLUX.1-dev")
    args.use_dora = False
    args.lora_type = "lora"
    for entry in METADATA:
        vars(args)[f"metadata_{entry}"] = None
    args.metadata_author = "me"
    args.metadata_usage_hint = "at strength 0.8"
    header = lora_header(
        args,
        architecture="flux-1-dev",
        resolution=(1024, 768),
        step=7,
        steps_per_epoch=4,
        trigger_words=["tjtoy toy", "sparkgpu gpu"],
        captions={"tjtoy": {"tjtoy toy": 6}},
    )
    write_lora(tmp_path / "mine.safetensors", layers, "comfyui", header, torch.bfloat16)
    data = (tmp_path / "mine.safetensors").read_bytes()
    length = int.from_bytes(data[:8], "little")
    with safe_open(tmp_path / "mine.safetensors", "pt") as file:
        written = file.metadata()
    assert written["sshs_model_hash"] == hashlib.sha256(data[8 + length :]).hexdigest()
    assert written["modelspec.trigger_phrase"] == "tjtoy toy, sparkgpu gpu"
    assert written["modelspec.architecture"] == "flux-1-dev/lora"
    assert (written["modelspec.title"], written["modelspec.author"]) == ("mine", "me")
    assert written["modelspec.usage_hint"] == "at strength 0.8"
    assert (written["ss_steps"], written["ss_epoch"], written["ss_sd_model_name"]) == ("7", "2", "FLUX.1-dev")
    assert written["modelspec.resolution"] == "1024x768"
    assert json.loads(written["ss_tag_frequency"]) == {"tjtoy": {"tjtoy toy": 6}}
    assert all(isinstance(value, str) for value in written.values())
    assert json.loads(written["lora_adapter_metadata"])["transformer.lora_alpha"] == 4
    assert (written["ss_network_dim"], written["ss_network_alpha"]) == ("4", "8")
    assert {t.dtype for k, t in load_file(tmp_path / "mine.safetensors").items() if "lora" in k} == {torch.bfloat16}
    assert list(tmp_path.iterdir()) == [tmp_path / "mine.safetensors"]


def original_state_dict(transformer):
    """A FluxTransformer2DModel's weights under the names, and fused as, FLUX.1's authors publish them."""
    ours, theirs = transformer.state_dict(), {}
    flat = {"weight": "weight", "bias": "bias"}
    outer = {
        "x_embedder": "img_in",
        "context_embedder": "txt_in",
        "time_text_embed.timestep_embedder.linear_1": "time_in.in_layer",
        "time_text_embed.timestep_embedder.linear_2": "time_in.out_layer",
        "time_text_embed.text_embedder.linear_1": "vector_in.in_layer",
        "time_text_embed.text_embedder.linear_2": "vector_in.out_layer",
        "time_text_embed.guidance_embedder.linear_1": "guidance_in.in_layer",
        "time_text_embed.guidance_embedder.linear_2": "guidance_in.out_layer",
        "proj_out": "final_layer.linear",
    }
    for kind in flat:
        for name, other in outer.items():
            theirs[f"{other}.{kind}"] = ours[f"{name}.{kind}"]
        scale, shift = ours[f"norm_out.linear.{kind}"].chunk(2)
        theirs[f"final_layer.adaLN_modulation.1.{kind}"] = torch.cat([shift, scale])
        for i in range(transformer.config.num_layers):
            a, b = f"transformer_blocks.{i}", f"double_blocks.{i}"
            for side, q in (("img", "to_{}"), ("txt", "add_{}_proj")):
                qkv = [ours[f"{a}.attn.{q.format(part)}.{kind}"] for part in "qkv"]
                theirs[f"{b}.{side}_attn.qkv.{kind}"] = torch.cat(qkv)
            single = {
                "attn.to_out.0": "img_attn.proj",
                "attn.to_add_out": "txt_attn.proj",
                "ff.net.0.proj": "img_mlp.0",
                "ff.net.2": "img_mlp.2",
                "ff_context.net.0.proj": "txt_mlp.0",
                "ff_context.net.2": "txt_mlp.2",
                "norm1.linear": "img_mod.lin",
                "norm1_context.linear": "txt_mod.lin",
            }
            for name, other in single.items():
                theirs[f"{b}.{other}.{kind}"] = ours[f"{a}.{name}.{kind}"]
        for i in range(transformer.config.num_single_layers):
            a, b = f"single_transformer_blocks.{i}", f"single_blocks.{i}"
            rows = [ours[f"{a}.attn.to_{part}.{kind}"] for part in "qkv"] + [ours[f"{a}.proj_mlp.{kind}"]]
            theirs[f"{b}.linear1.{kind}"] = torch.cat(rows)
            theirs[f"{b}.linear2.{kind}"] = ours[f"{a}.proj_out.{kind}"]
            theirs[f"{b}.modulation.lin.{kind}"] = ours[f"{a}.norm.linear.{kind}"]
    for i in range(transformer.config.num_layers):
        for side, name in (("img", "norm_"), ("txt", "norm_added_")):
            for old in ("query", "key"):
                norm = ours[f"transformer_blocks.{i}.attn.{name}{old[0]}.weight"]
                theirs[f"double_blocks.{i}.{side}_attn.norm.{old}_norm.scale"] = norm
    for i in range(transformer.config.num_single_layers):
        for old in ("query", "key"):
            norm = ours[f"single_transformer_blocks.{i}.attn.norm_{old[0]}.weight"]
            theirs[f"single_blocks.{i}.norm.{old}_norm.scale"] = norm
    return {key: value.clone() for key, value in theirs.items()}


def test_weights_in_their_authors_form_become_diffusers(tiny):
    converted = diffusers_state_dict(original_state_dict(tiny.transformer))
    own = tiny.transformer.state_dict()
    assert converted.keys() == own.keys()
    assert all(torch.equal(converted[key], own[key]) for key in own)


def test_the_help_says_how_to_run_it():
    assert (
        "convert_lora.py in.safetensors out.safetensors --to comfyui"
        in (ROOT / "examples/convert_lora.py").read_text()
    )


SCRIPTS = ["train_dreambooth_flux_advanced", "train_omini", "train_influxedit", "train_twinflow"]


def trained_layers(checkpoint, name):
    """What a run has trained until its checkpoint, {layer: LoraLayer}, from the file that it would resume from; of
    TwinFlow the moving average."""
    tensors = load_file(checkpoint / f"resume_{name}")
    with safe_open(checkpoint / name, "pt") as file:
        alpha = float(file.metadata()["ss_network_alpha"])
    if (checkpoint / "state.safetensors").exists():
        averages = load_file(checkpoint / "state.safetensors")
        for key in tensors:
            average = key.replace("transformer.", "teacher/", 1).replace(".weight", ".default.weight")
            tensors[key] = averages[average]
    layers = {}
    for key, down in tensors.items():
        if key.endswith(".lora_A.weight"):
            name = key.removesuffix(".lora_A.weight").replace(
                "text_encoder.encoder", "text_encoder.text_model.encoder"
            )
            layers[name] = LoraLayer(down, tensors[key.replace("lora_A", "lora_B")], alpha)
    return layers


def assert_patches(path, layers):
    patches, not_loaded = comfyui_patches(path, model_shapes(layers))
    expected = expected_patches(layers)
    assert not not_loaded  # Forge refuses a file with more than twelve
    assert patches.keys() == expected.keys()
    for key, patch in patches.items():
        torch.testing.assert_close(patch, expected[key], atol=1e-7, rtol=1e-4)


# those with CLIP and with a moving average are the quick ones
@pytest.mark.parametrize(
    "script", [pytest.param(s, marks=[pytest.mark.slow] if s in SCRIPTS[1:3] else []) for s in SCRIPTS]
)
def test_a_runs_file_has_the_trained_strength_in_every_reader(script, train, short_runs, tmp_path):
    trains_clip = script in ("train_dreambooth_flux_advanced", "train_influxedit")
    flags = [*short_runs[script], *(["--train_text_encoder"] if trains_clip else []), "--output_dir", tmp_path / "run"]
    train(script, *flags, "--rank", 2, "--lora_alpha", 3, "--max_train_steps", 1, "--checkpointing_steps", 1)
    name = "canny.safetensors" if script == "train_omini" else "pytorch_lora_weights.safetensors"
    file, checkpoint = tmp_path / "run" / name, tmp_path / "run" / "checkpoint-1"
    layers = trained_layers(checkpoint, name)
    assert trains_clip == any(layer.startswith("text_encoder.text_model.") for layer in layers)
    assert {layer.scale for layer in layers.values()} == {1.5}
    assert max(layer.up.abs().max() for layer in layers.values()) > 0

    # ComfyUI and Forge, as the file is and as converted for kohya's tools
    assert_patches(file, layers)
    convert_lora.main([str(file), str(tmp_path / "kohya.safetensors"), "--to", "kohya"])
    assert_patches(tmp_path / "kohya.safetensors", layers)

    # diffusers' own loader
    model = flags[flags.index("--pretrained_model_name_or_path") + 1]
    pipeline_class = FluxFillPipeline if script == "train_influxedit" else FluxPipeline
    pipeline = pipeline_class.from_pretrained(model, vae=None, text_encoder_2=None, tokenizer_2=None)
    before = pipeline.transformer.state_dict() | {"clip": pipeline.text_encoder.state_dict()}
    before = {key: value.clone() if key != "clip" else copy.deepcopy(value) for key, value in before.items()}
    pipeline.load_lora_weights(file.parent, weight_name=name)
    pipeline.fuse_lora(components=["transformer", *(["text_encoder"] if trains_clip else [])])
    pipeline.unload_lora_weights()
    for key, layer in layers.items():
        component, _, rest = key.partition(".")
        weights, own = pipeline.transformer.state_dict(), before
        if component == "text_encoder":
            weights, own, rest = pipeline.text_encoder.state_dict(), before["clip"], rest.removeprefix("text_model.")
        difference = weights[f"{rest}.weight"] - own[f"{rest}.weight"]
        torch.testing.assert_close(difference, layer.scale * layer.up @ layer.down, atol=1e-6, rtol=1e-3)

    # the checkpoint of the last step holds the result
    assert content(checkpoint / name) == content(file)
    header = content(file)[0]
    architecture = "flux-1-fill-dev/lora" if script == "train_influxedit" else "flux-1-dev/lora"
    assert (header["modelspec.architecture"], header["ss_steps"], header["ss_epoch"]) == (architecture, "1", "1")
    assert header["modelspec.title"] == "run"

    # another run goes on from its folder, at another alpha and so slowly that nothing changes, to a file with a name
    again = [
        "--lora_path",
        file.parent,
        "--lora_alpha",
        1,
        "--learning_rate",
        1e-12,
        "--output_dir",
        tmp_path / "again",
    ]
    if trains_clip:
        again += ["--text_encoder_lr", 1e-12]
    train(script, *flags, *again, "--output_name", "mine", "--metadata_author", "me")
    assert sorted(path.name for path in (tmp_path / "again").iterdir()) == ["mine", "mine.safetensors"]
    assert_patches(tmp_path / "again" / "mine.safetensors", layers)
    header = content(tmp_path / "again" / "mine.safetensors")[0]
    assert (header["ss_output_name"], header["modelspec.author"], header["ss_network_alpha"]) == ("mine", "me", "1")


@pytest.mark.parametrize("form", ["header", "rslora", "alpha tensors", "kohya", "ours"])
def test_a_run_starts_at_the_strength_of_a_file_in_any_form(adapted, tiny, tmp_path, form):
    trained = adapted(4, 8)
    layers, file = lora_layers(trained), tmp_path / "x.safetensors"
    pairs = {f"{name}.lora_A.weight": layer.down for name, layer in layers.items()}
    pairs |= {f"{name}.lora_B.weight": layer.up for name, layer in layers.items()}
    if form in ("ours", "kohya"):
        write_lora(file, layers, "kohya" if form == "kohya" else "diffusers")
    elif form == "alpha tensors":
        save_file(pairs | {f"{name}.alpha": torch.tensor(8.0) for name in layers}, file)
    else:
        settings = {"lora_alpha": 8} if form == "header" else {"lora_alpha": 4, "use_rslora": True}
        settings = {f"{part}.{key}": value for part in trained for key, value in settings.items()}
        save_file(pairs, file, {"lora_adapter_metadata": json.dumps(settings)})
    started = adapted(4, 1)
    start_from_lora(file, started)
    torch.testing.assert_close(run(started["transformer"]), run(trained["transformer"]), atol=1e-4, rtol=1e-4)
    for name, layer in lora_layers(started).items():
        torch.testing.assert_close(layer.scale * layer.up, 2 * layers[name].up)


def test_adapters_of_other_models_are_read_by_their_own_names(tmp_path):
    file, name = tmp_path / "x.safetensors", "transformer.blocks.0.attn1.to_q"
    layers = {name: LoraLayer(torch.randn(2, 6), torch.randn(5, 2), 3.0)}
    write_lora(file, layers, dtype=torch.bfloat16)
    back = read_lora(file, flux=False)[0]
    torch.testing.assert_close(back[name].up.float(), 1.5 * layers[name].up, atol=0, rtol=2**-8)
    shapes = {name: (5, 6)}
    assert check_lora_file(file, shapes, 2, flux=False) == []
    assert "give --rank 2" in check_lora_file(file, shapes, 3, flux=False)[0]
    assert name in check_lora_file(file, {name: (5, 7)}, 2, flux=False)[0]
    assert name in check_lora_file(file, shapes, 2)[0]


def test_a_runs_folder_stands_for_its_lora(tmp_path, monkeypatch):
    (tmp_path / "dog").mkdir()
    (tmp_path / "dog" / "args.json").write_text('{"args": {"output_name": "dog"}}')
    file = tmp_path / "dog.safetensors"
    file.touch()
    monkeypatch.chdir(tmp_path / "dog")
    assert [lora_in(Path(text)) for text in (".", "../dog", str(file))] == [file, file, file]


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_file_that_does_not_fit_is_refused_before_a_model_is_loaded(script, adapted, short_runs, tmp_path, capsys):
    write_lora(tmp_path / "x.safetensors", lora_layers(adapted(2, 4)))
    flags = [*short_runs[script], "--output_dir", tmp_path / "run", "--lora_path", tmp_path / "x.safetensors"]
    (tmp_path / "empty").mkdir()
    no_lora = (["--lora_path", tmp_path / "empty"], f"{tmp_path / 'empty'} has no LoRA")
    for extra, words in ((["--rank", 2], "made for other layers"), (["--rank", 3], "give --rank 2"), no_lora):
        with pytest.raises(SystemExit) as stop:
            importlib.import_module(script).parse_args([str(flag) for flag in [*flags, *extra]])
        assert stop.value.code == 2
        assert words in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("script", SCRIPTS)
@pytest.mark.parametrize("name", [None, "mine"])
def test_a_result_replaces_neither_another_runs_nor_what_the_run_starts_from(
    script, name, tmp_path, short_runs, capsys
):
    trainer = importlib.import_module(script)
    words = [str(flag) for flag in [*short_runs[script], "--output_dir", tmp_path]]
    words += ["--output_name", name] if name else []
    args = trainer.parse_args(words)
    file = lora_file(args.output_dir, name)
    if script == "train_omini":
        (file,) = trainer.adapter_files(args).values()
    file.parent.mkdir(exist_ok=True)
    file.write_bytes(b"another's")

    def refused(*more):
        with pytest.raises(SystemExit) as stop:
            trainer.parse_args([*words, *more])
        assert stop.value.code == 2
        return capsys.readouterr().err

    assert f"{file} exists" in refused()
    args.output_dir.mkdir(exist_ok=True)
    (args.output_dir / "args.json").write_text('{"args": {}}')
    trainer.parse_args(words)  # the run again
    for source in (file, args.output_dir):
        assert f"{file}: this run would write over it" in refused("--lora_path", str(source))
    (args.output_dir / "args.json").unlink()
    (args.output_dir / "checkpoint-1").mkdir()
    (args.output_dir / "checkpoint-1" / "trainer_state.json").write_text("{}")
    trainer.parse_args([*words, "--resume_from_checkpoint", "latest"])


@pytest.mark.parametrize(
    ("script", "flags", "result"),
    [
        (
            "train_dreambooth_flux_advanced",
            ["--train_text_encoder_ti", "--instance_prompt", "TOK"],
            "run_emb.safetensors",
        ),
        ("train_twinflow", ["--training", "full"], "transformer/diffusion_pytorch_model.safetensors"),
    ],
)
def test_a_result_that_is_no_lora_replaces_no_other_runs_either(script, flags, result, tmp_path, short_runs, capsys):
    words = [str(flag) for flag in [*short_runs[script], *flags, "--output_dir", tmp_path / "run"]]
    if "full" in flags:
        del words[words.index("--rank") : words.index("--rank") + 2]
    parse_args = importlib.import_module(script).parse_args
    parse_args(words)
    file = tmp_path / "run" / result
    file.parent.mkdir(parents=True)
    file.write_bytes(b"another's")
    with pytest.raises(SystemExit):
        parse_args(words)
    assert f"{tmp_path / 'run' / result.partition('/')[0]} exists" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["", "a/b", "..", ".", ".hidden", "resume_x", "x.safetensors", "x/"])
def test_no_name_hides_a_result_or_means_another_file(name):
    with pytest.raises(ArgumentTypeError):
        file_name(name)
    assert file_name("dog-v1.5") == "dog-v1.5"


def content(path):
    """(header, tensors as lists) of a file; the order of a header's entries varies."""
    with safe_open(path, "pt") as file:
        return file.metadata(), {key: file.get_tensor(key).tolist() for key in file.keys()}  # noqa: SIM118


@pytest.mark.parametrize("family", ["sd3", "sana", "qwenimage"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_pipelines_of_other_families_load_their_file_at_the_trained_strength(family, dtype, tmp_path):
    torch.manual_seed(0)
    pipeline = getattr(tiny_backbones, family)()
    backbone = {"sd3": twinflow.StableDiffusion3, "sana": twinflow.Sana, "qwenimage": twinflow.QwenImage}[family]
    modules = {"transformer": with_random_lora(pipeline.transformer, 4, 6, backbone.targets)}
    save_lora(tmp_path, modules, dtype)
    before = {key: value.clone() for key, value in pipeline.transformer.state_dict().items()}
    pipeline.load_lora_weights(tmp_path)
    pipeline.fuse_lora(components=["transformer"])
    pipeline.unload_lora_weights()
    after = pipeline.transformer.state_dict()
    layers = lora_layers(modules)
    assert len(layers) > 10
    for name, layer in layers.items():
        key = name.removeprefix("transformer.") + ".weight"
        expected = layer.scale * layer.up @ layer.down
        tolerance = 0.05 if dtype == torch.bfloat16 else 1e-4
        torch.testing.assert_close(after[key] - before[key], expected, atol=tolerance, rtol=tolerance)
