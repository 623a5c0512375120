"""common/lora_formats.py: the names by which other programs call the layers of FLUX.1, against diffusers and PEFT."""

import json

from common.lora_formats import FLUX_LAYERS, FUSED_NAMES, read_lora

import pytest
import torch
from diffusers.loaders.lora_conversion_utils import (
    _convert_fal_kontext_lora_to_diffusers,
    _convert_kohya_flux_lora_to_diffusers,
    _convert_xlabs_flux_lora_to_diffusers,
)
from peft import LoraConfig, get_peft_model
from safetensors.torch import save_file
from test_lora import with_random_lora

from examples import convert_lora


def pair(name, ending, shape, seed, alpha=None):
    """The tensors of one layer under a file's names; `shape` is (rows, columns), the rank 2."""
    generator = torch.Generator().manual_seed(seed)
    down_ending, up_ending = ending
    tensors = {
        name + down_ending: torch.randn(2, shape[1], generator=generator),
        name + up_ending: torch.randn(shape[0], 2, generator=generator),
    }
    if alpha is not None:
        tensors[f"{name}.alpha"] = torch.tensor(float(alpha))
    return tensors


def products(state_dict):
    """{layer: B A} of a state dict with diffusers' names."""
    found = {}
    for key, down in state_dict.items():
        if key.endswith(".lora_A.weight"):
            name = key.removesuffix(".lora_A.weight")
            found[name] = state_dict[f"{name}.lora_B.weight"] @ down
    return found


def read_products(tensors, path):
    save_file(tensors, path)
    layers, _ = read_lora(path)
    return {name: layer.scale * (layer.up @ layer.down) for name, layer in layers.items()}


def assert_same(ours, theirs):
    assert ours.keys() == theirs.keys()
    for name, product in theirs.items():
        torch.testing.assert_close(ours[name], product, atol=1e-5, rtol=1e-5)


def test_xlabs_names_are_read_as_diffusers_reads_them(tmp_path):
    tensors = {}
    for i in (0, 7):
        for j, rows in enumerate((24, 8)):
            for kind in (1, 2):
                name = f"double_blocks.{i}.processor.{('qkv', 'proj')[j]}_lora{kind}"
                tensors |= pair(name, (".down.weight", ".up.weight"), (rows, 8), seed=10 * i + 2 * j + kind)
    for j, (part, shape) in enumerate({"qkv": (24, 8), "proj": (8, 40)}.items()):
        name = f"single_blocks.31.processor.{part}_lora"
        tensors |= pair(name, (".down.weight", ".up.weight"), shape, seed=50 + j)
    theirs = products(_convert_xlabs_flux_lora_to_diffusers(dict(tensors)))
    ours = read_products(tensors, tmp_path / "x.safetensors")
    assert len(ours) == 2 * 8 + 4
    assert_same(ours, theirs)


def test_onetrainers_names_are_read(tmp_path):
    attention = ("to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "to_add_out")
    layers = {f"transformer_blocks.3.attn.{part}": (8, 8) for part in attention}
    layers |= {"single_transformer_blocks.20.attn.to_k": (8, 8), "x_embedder": (8, 4), "proj_out": (4, 8)}
    layers |= {"norm_out.linear": (16, 8), "time_text_embed.guidance_embedder.linear_2": (8, 8)}
    ending = (".lora_down.weight", ".lora_up.weight")
    tensors = {}
    for i, (layer, shape) in enumerate(layers.items()):
        tensors |= pair(f"lora_transformer_{layer.replace('.', '_')}", ending, shape, seed=i, alpha=3)
    clip = "lora_te1_text_model_encoder_layers_11_mlp_fc1"
    tensors |= pair(clip, ending, (16, 4), seed=99, alpha=1)
    ours = read_products(tensors, tmp_path / "x.safetensors")
    assert_same(ours, products(_convert_kohya_flux_lora_to_diffusers(dict(tensors))))
    assert f"transformer.{list(layers)[0]}" in ours
    assert "text_encoder.text_model.encoder.layers.11.mlp.fc1" in ours

    # diffusers' converter knows OneTrainer's attention layers alone; the others are under the same rule
    rest = ("ff.net.0.proj", "ff.net.2", "ff_context.net.2", "norm1.linear", "norm1_context.linear")
    tensors = {}
    for i, layer in enumerate(rest):
        tensors |= pair(f"lora_transformer_transformer_blocks_3_{layer.replace('.', '_')}", ending, (8, 8), seed=i)
    ours = read_products(tensors, tmp_path / "y.safetensors")
    assert set(ours) == {f"transformer.transformer_blocks.3.{layer}" for layer in rest}


def test_fused_names_behind_pefts_are_read_as_diffusers_reads_them(tmp_path):
    """base_model.model.double_blocks..., as trainers of FLUX.1 Kontext write it; diffusers wants all blocks."""
    width = 3072
    tensors = {}
    for block, count in (("double", 19), ("single", 38)):
        for fused_name, parts in FLUX_LAYERS.items():
            if not fused_name.startswith(block) or "norm" in fused_name:
                continue
            rows = {3: 3 * width, 4: 7 * width}.get(len(parts), 4)
            for i in range(count):
                name = f"base_model.model.{fused_name.replace('#', str(i))}"
                tensors[f"{name}.lora_A.weight"] = torch.full((1, width if len(parts) == 4 else 4), 0.5 + i)
                tensors[f"{name}.lora_B.weight"] = torch.arange(rows)[:, None].float() / width
    tensors["base_model.model.final_layer.linear.lora_A.weight"] = torch.ones(1, 4)
    tensors["base_model.model.final_layer.linear.lora_B.weight"] = torch.ones(4, 1)
    theirs = _convert_fal_kontext_lora_to_diffusers(dict(tensors))
    save_file(tensors, tmp_path / "x.safetensors")
    ours, _ = read_lora(tmp_path / "x.safetensors")
    assert len(ours) == len(theirs) / 2 == 19 * 14 + 38 * 6 + 1
    for name, layer in ours.items():
        assert torch.equal(layer.down, theirs[f"{name}.lora_A.weight"])
        assert torch.equal(layer.up, theirs[f"{name}.lora_B.weight"])
        assert layer.scale == 1


def test_comfyuis_names_are_read_as_diffusers_reads_them(tmp_path):
    ending = (".lora_down.weight", ".lora_up.weight")
    tensors = pair("diffusion_model.double_blocks.2.img_mlp.0", ending, (16, 4), seed=1, alpha=1)
    tensors |= pair("diffusion_model.double_blocks.2.txt_attn.qkv", ending, (12, 4), seed=2, alpha=4)
    clip = "text_encoders.clip_l.transformer.text_model.encoder.layers.0.self_attn.out_proj"
    tensors |= pair(clip, ending, (4, 4), seed=3, alpha=2)
    unused_t5 = pair("text_encoders.t5xxl.transformer.encoder.block.0.layer.0.SelfAttention.q", ending, (4, 4), seed=4)
    unused_t5 = {key: torch.zeros_like(value) for key, value in unused_t5.items()}
    theirs = products(_convert_kohya_flux_lora_to_diffusers(tensors | unused_t5))
    ours = read_products(tensors | unused_t5, tmp_path / "x.safetensors")
    product = ours.pop("text_encoder.text_model.encoder.layers.0.self_attn.out_proj")
    torch.testing.assert_close(product, tensors[f"{clip}.lora_up.weight"] @ tensors[f"{clip}.lora_down.weight"])
    assert_same(ours, theirs)
    split = {
        f"diffusion_model.single_blocks.5.linear1_qkv{end}": v
        for end, v in zip(ending, (torch.ones(2, 4), torch.ones(12, 2)), strict=True)
    }
    ours = read_products(split, tmp_path / "y.safetensors")
    assert {name.rpartition(".")[2] for name in ours} == {"to_q", "to_k", "to_v"}


@pytest.mark.parametrize("patterns", [{}, {"attn.to_q": 2, "x_embedder": 3, r"single.*\d\.proj_mlp": 5}])
@pytest.mark.parametrize("use_rslora", [False, True])
def test_what_peft_saves_has_its_strength(tiny, tmp_path, use_rslora, patterns):
    names = ["attn.to_q", "proj_mlp", "norm_out.linear", "x_embedder"]
    config = LoraConfig(
        r=4,
        lora_alpha=6,
        target_modules=names,
        use_rslora=use_rslora,
        rank_pattern=patterns,
        alpha_pattern={name: 3 * rank for name, rank in patterns.items()},
        init_lora_weights=False,
    )
    model = get_peft_model(tiny.transformer, config)
    model.save_pretrained(tmp_path)
    layers, _ = read_lora(tmp_path / "adapter_model.safetensors")
    adapted = {
        name.removeprefix("base_model.model."): module
        for name, module in model.named_modules()
        if hasattr(module, "get_delta_weight")
    }
    assert {name.removeprefix("transformer.") for name in layers} == adapted.keys()
    for name, layer in layers.items():
        delta = adapted[name.removeprefix("transformer.")].get_delta_weight("default")
        torch.testing.assert_close(layer.scale * (layer.up @ layer.down), delta.detach())


@pytest.mark.parametrize(
    "pattern", ["q_proj", "layers.0.self_attn.q_proj", "text_model.encoder.layers.0.self_attn.q_proj"]
)
def test_alphas_of_some_layers_hold_by_either_name_of_clips_layers(tmp_path, pattern):
    tensors = {}
    for name in ("q_proj", "k_proj"):
        layer = f"text_encoder.encoder.layers.0.self_attn.{name}"
        tensors |= pair(layer, (".lora_A.weight", ".lora_B.weight"), (4, 4), seed=0)
    settings = {"text_encoder.lora_alpha": 2, "text_encoder.alpha_pattern": {pattern: 6}}
    save_file(tensors, tmp_path / "x.safetensors", {"lora_adapter_metadata": json.dumps(settings)})
    layers, _ = read_lora(tmp_path / "x.safetensors")
    assert {name.rpartition(".")[2]: layer.alpha for name, layer in layers.items()} == {"q_proj": 6, "k_proj": 2}


@pytest.mark.parametrize("prefix", ["", "base_model.model.", "transformer.base_model.model.", "transformer."])
@pytest.mark.parametrize(
    "ending",
    [
        (".lora_A.weight", ".lora_B.weight"),
        (".lora_A.default.weight", ".lora_B.default.weight"),
        (".lora.down.weight", ".lora.up.weight"),
        ("_lora.down.weight", "_lora.up.weight"),
        (".lora_linear_layer.down.weight", ".lora_linear_layer.up.weight"),
    ],
)
def test_every_prefix_with_every_ending_is_the_same_layer(tmp_path, prefix, ending):
    names = ("transformer_blocks.7.attn.to_out.0", "single_transformer_blocks.31.proj_out", "norm_out.linear")
    tensors = {}
    for i, name in enumerate(names):
        tensors |= pair(prefix + name, ending, (8, 4), seed=i, alpha=3)
    save_file(tensors, tmp_path / "x.safetensors")
    layers, _ = read_lora(tmp_path / "x.safetensors")
    assert set(layers) == {f"transformer.{name}" for name in names}
    for i, name in enumerate(names):
        layer = layers[f"transformer.{name}"]
        assert (layer.alpha, layer.rank) == (3, 2)
        assert torch.equal(layer.down, pair("", ("a", "b"), (8, 4), seed=i)["a"])
        assert torch.equal(layer.up, pair("", ("a", "b"), (8, 4), seed=i)["b"])  # norm_out's halves too


def test_every_layer_has_names_of_its_own():
    ours = [name.replace(".", "_") for name in FUSED_NAMES]
    fused = [name.replace(".", "_") for name in FLUX_LAYERS]
    assert len(set(ours + fused)) == len(ours) + len(fused)


Q = "transformer.transformer_blocks.0.attn.to_q"


@pytest.mark.parametrize(
    ("extra", "words"),
    [
        ({f"{Q.replace('to_q', 'to_k')}.lora_magnitude_vector": 8}, ("DoRA",)),
        ({f"{Q}.dora_scale": 8}, ("DoRA",)),
        (
            {"lora_unet_double_blocks_0_img_mlp_0.lokr_w1": 4, "lora_unet_double_blocks_0_img_mlp_0.alpha": 1},
            ("LoKr",),
        ),
        ({"lora_te3_encoder_block_0.lora_down.weight": 4, "lora_te3_encoder_block_0.lora_up.weight": 4}, ("T5",)),
        ({"lora_te2_encoder_block_0.lora_down.weight": 4, "lora_te2_encoder_block_0.lora_up.weight": 4}, ("T5",)),
        ({f"{Q}.lora_B.bias": 8}, ("bias",)),
        (
            {"lora_unet_down_blocks_0.lora_down.weight": 4, "lora_unet_down_blocks_0.lora_up.weight": 4},
            ("down_blocks",),
        ),
        ({"bundle_emb.tok.clip_l": 4}, ("embedding",)),
        ({f"lora_transformer_{Q.replace('.', '_').removeprefix('transformer_')}.lora_A.weight": 2}, ("lora_B",)),
    ],
)
def test_what_is_no_pair_of_matrices_is_refused_by_name(tmp_path, capsys, extra, words):
    tensors = pair(Q, (".lora_A.weight", ".lora_B.weight"), (8, 8), seed=0)
    tensors |= {key: torch.ones(size, 1) for key, size in extra.items()}
    save_file(tensors, tmp_path / "x.safetensors")
    with pytest.raises(SystemExit) as stop:
        convert_lora.main([str(tmp_path / "x.safetensors"), str(tmp_path / "y.safetensors")])
    assert stop.value.code == 2
    error = capsys.readouterr().err
    assert all(word in error for word in (str(tmp_path / "x.safetensors"), next(iter(extra)), *words))
    assert not (tmp_path / "y.safetensors").exists()


def test_one_layer_under_two_names_is_refused(tmp_path):
    tensors = pair(Q, (".lora_A.weight", ".lora_B.weight"), (8, 8), seed=0)
    tensors |= pair(Q.removeprefix("transformer."), (".lora_down.weight", ".lora_up.weight"), (8, 8), seed=1)
    save_file(tensors, tmp_path / "x.safetensors")
    with pytest.raises(ValueError, match="twice"):
        read_lora(tmp_path / "x.safetensors")


def test_a_converted_file_of_another_program_is_whole(tiny, tmp_path, capsys):
    """OneTrainer's file of every layer that we train becomes our form, and every layer is in it."""
    modules = [name for name, module in tiny.transformer.named_modules() if isinstance(module, torch.nn.Linear)]
    adapted = with_random_lora(tiny.transformer, 2, 2, modules)
    tensors = {}
    for name, value in adapted.state_dict().items():
        if ".lora_" in name:
            layer, _, matrix = name.removesuffix(".default.weight").rpartition(".lora_")
            end = {"A": "lora_down", "B": "lora_up"}[matrix]
            tensors[f"lora_transformer_{layer.replace('.', '_')}.{end}.weight"] = value.contiguous()
    save_file(tensors, tmp_path / "x.safetensors")
    convert_lora.main([str(tmp_path / "x.safetensors"), str(tmp_path / "y.safetensors")])
    layers, _ = read_lora(tmp_path / "y.safetensors")
    assert {name.removeprefix("transformer.") for name in layers} == set(modules)
    assert "neither" not in capsys.readouterr().err
    convert_lora.main([str(tmp_path / "y.safetensors"), str(tmp_path / "z.safetensors"), "--to", "kohya"])
    assert "neither diffusers nor sd-scripts reads" in capsys.readouterr().err
    assert read_lora(tmp_path / "z.safetensors")[0].keys() == layers.keys()
