"""The forward pass of train_omini.py against the stock model and against a dense-mask reference."""

import copy
import itertools

from common.latents import image_ids
from common.models import compile_blocks

import pytest
import torch
import torch.nn.functional as F
from diffusers import FluxTransformer2DModel
from peft import LoraConfig
from peft.tuners.lora import LoraLayer

import train_omini as omini
from train_omini import ConditionSpec, ConditionTokens, KVCache, OminiTransformer2DModel, condition_ids


TEXT_LENGTH = 5


def new_transformer(guidance=True, layers=2, single_layers=2, model_class=OminiTransformer2DModel):
    torch.manual_seed(0)
    transformer = model_class(
        in_channels=64,
        num_layers=layers,
        num_single_layers=single_layers,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=24,
        pooled_projection_dim=20,
        guidance_embeds=guidance,
        axes_dims_rope=(4, 6, 6),
    )
    for name, parameter in transformer.named_parameters():
        parameter.data.normal_(std=0.15 if "norm_" not in name else 0.3)
    return transformer.requires_grad_(False)


def omini_forward(transformer, arguments, **joint_attention_kwargs):
    """The output for arguments of the stock forward pass and what OminiTransformer2DModel has besides."""
    return transformer(**arguments, joint_attention_kwargs=joint_attention_kwargs, return_dict=False)[0]


def add_adapters(transformer, *names, rank=3, alpha=6, target_modules=omini.TARGET_MODULES):
    """Adapters whose second factor is not zero, so that they do something."""
    for name in names:
        config = LoraConfig(r=rank, lora_alpha=alpha, target_modules=target_modules, init_lora_weights="gaussian")
        transformer.add_adapter(config, name)
    for name, parameter in transformer.named_parameters():
        if "lora_" in name:
            parameter.data.normal_(std=0.3)
            parameter.requires_grad_(True)
    return transformer


def inputs(batch=2, height=6, width=8, guidance=True, seed=0):
    """Arguments of the stock forward pass for latents of height x width."""
    generator = torch.Generator().manual_seed(seed)
    normal = lambda *shape: torch.randn(*shape, generator=generator)  # noqa: E731
    return {
        "hidden_states": normal(batch, height * width // 4, 64),
        "encoder_hidden_states": normal(batch, TEXT_LENGTH, 24),
        "pooled_projections": normal(batch, 20),
        "timestep": torch.rand(batch, generator=generator),
        "guidance": torch.full((batch,), 3.5) if guidance else None,
        "txt_ids": torch.zeros(TEXT_LENGTH, 3),
        "img_ids": image_ids(height, width),
    }


def condition_tokens(sizes, adapters, batch=2):
    """Conditions of (height, width) in latents, at positions of different scales and deltas."""
    generator = torch.Generator().manual_seed(1)
    places = itertools.cycle([((0, 0), 1.0), ((0, -4), 1.0), ((1, 2), 2.0)])
    return [
        ConditionTokens(
            torch.randn(batch, height * width // 4, 64, generator=generator),
            condition_ids(height, width, *place),
            adapter,
        )
        for (height, width), adapter, place in zip(sizes, adapters, places, strict=False)
    ]


def reference_forward(transformer, arguments, conditions, independent):
    """One sequence [text, image, conditions], a dense mask, and for each token the weights it is to meet, merged."""
    layers = dict(transformer.named_modules())
    groups = ["text", "image"] + [condition.adapter for condition in conditions]
    lengths = [arguments["encoder_hidden_states"].shape[1], arguments["hidden_states"].shape[1]]
    lengths += [condition.hidden_states.shape[1] for condition in conditions]
    spans = list(itertools.pairwise(itertools.accumulate([0, *lengths])))
    total, batch = spans[-1][1], len(arguments["hidden_states"])

    allowed = torch.zeros(total, total, dtype=torch.bool)
    for i, (start, stop) in enumerate(spans):
        for j, (first, last) in enumerate(spans):
            if i < 2 or i == j or (j < 2 and not independent):
                allowed[start:stop, first:last] = True

    def linear(name, x, adapter):
        layer = layers[name]
        if not isinstance(layer, LoraLayer):
            return F.linear(x, layer.weight, layer.bias)
        weight = layer.base_layer.weight
        if adapter in layer.lora_A:
            b, a = layer.lora_B[adapter].weight, layer.lora_A[adapter].weight
            weight = weight + layer.scaling[adapter] * b @ a
        return F.linear(x, weight, layer.base_layer.bias)

    def per_token(name, x):
        """x [B, total, D] or [B, total of some groups, D] through the layer, each group with its own adapter."""
        return torch.cat([linear(name, x[:, a:b], g) for (a, b), g in zip(spans, groups, strict=True)], dim=1)

    def modulations(name, count, groups=groups, spans=spans):
        rows = [
            linear(name, F.silu(temb if g in ("text", "image") else condition_temb), g)[:, None].expand(-1, b - a, -1)
            for (a, b), g in zip(spans, groups, strict=True)
        ]
        return torch.cat(rows, dim=1).chunk(count, dim=-1)

    def norm(x):
        return F.layer_norm(x, x.shape[-1:], eps=1e-6)

    t, guidance = arguments["timestep"] * 1000, arguments["guidance"]
    pooled = arguments["pooled_projections"]
    if guidance is None:
        temb = transformer.time_text_embed(t, pooled)
        condition_temb = transformer.time_text_embed(0 * t, pooled)
    else:
        temb = transformer.time_text_embed(t, guidance * 1000, pooled)
        condition_temb = transformer.time_text_embed(0 * t, 0 * t + 1000, pooled)
    ids = torch.cat([arguments["txt_ids"], arguments["img_ids"], *[condition.ids for condition in conditions]])
    cos, sin = transformer.pos_embed(ids)

    def rope(x):
        pairs = x.unflatten(-1, (-1, 2))
        turned = torch.stack([-pairs[..., 1], pairs[..., 0]], dim=-1).flatten(-2)
        return x * cos[None, :, None] + turned * sin[None, :, None]

    def attention(q, k, v):
        q, k, v = (part.transpose(1, 2) for part in (rope(q), rope(k), v))
        scores = q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5
        weights = scores.masked_fill(~allowed, float("-inf")).softmax(-1)
        return (weights @ v).transpose(1, 2).flatten(2)

    x = [transformer.context_embedder(arguments["encoder_hidden_states"])]
    x.append(linear("x_embedder", arguments["hidden_states"], "image"))
    x += [linear("x_embedder", condition.hidden_states, condition.adapter) for condition in conditions]
    x = torch.cat(x, dim=1)
    text = slice(0, lengths[0])
    for n, block in enumerate(transformer.transformer_blocks):
        name = f"transformer_blocks.{n}"
        rest = slice(lengths[0], total)
        rest_spans = [(a - lengths[0], b - lengths[0]) for a, b in spans[1:]]

        def both(context_layer, layer, x, name=name, rest_spans=rest_spans, rest=rest):
            """Text through one layer, all else through the other."""
            parts = [linear(f"{name}.{context_layer}", x[:, text], "text")]
            parts += [
                linear(f"{name}.{layer}", x[:, rest][:, a:b], g)
                for (a, b), g in zip(rest_spans, groups[1:], strict=True)
            ]
            return torch.cat(parts, dim=1)

        context = modulations(f"{name}.norm1_context.linear", 6, ["text"], spans[:1])
        others = modulations(f"{name}.norm1.linear", 6, groups[1:], rest_spans)
        shift, scale, gate, shift_mlp, scale_mlp, gate_mlp = (
            torch.cat(pair, dim=1) for pair in zip(context, others, strict=True)
        )
        h = norm(x) * (1 + scale) + shift
        heads = {}
        for kind, added in (("q", "add_q_proj"), ("k", "add_k_proj"), ("v", "add_v_proj")):
            value = both(f"attn.{added}", f"attn.to_{kind}", h).unflatten(-1, (-1, 16))
            if kind != "v":
                added_norm, own_norm = getattr(block.attn, f"norm_added_{kind}"), getattr(block.attn, f"norm_{kind}")
                value = torch.cat([added_norm(value[:, text]), own_norm(value[:, rest])], dim=1)
            heads[kind] = value
        out = attention(heads["q"], heads["k"], heads["v"])
        x = x + gate * both("attn.to_add_out", "attn.to_out.0", out)
        h = norm(x) * (1 + scale_mlp) + shift_mlp
        h = F.gelu(both("ff_context.net.0.proj", "ff.net.0.proj", h), approximate="tanh")
        x = x + gate_mlp * both("ff_context.net.2", "ff.net.2", h)
    for n, block in enumerate(transformer.single_transformer_blocks):
        name = f"single_transformer_blocks.{n}"
        shift, scale, gate = modulations(f"{name}.norm.linear", 3)
        h = norm(x) * (1 + scale) + shift
        q, k, v = (per_token(f"{name}.attn.to_{kind}", h).unflatten(-1, (-1, 16)) for kind in "qkv")
        out = attention(block.attn.norm_q(q), block.attn.norm_k(k), v)
        inner = F.gelu(per_token(f"{name}.proj_mlp", h), approximate="tanh")
        x = x + gate * per_token(f"{name}.proj_out", torch.cat([out, inner], dim=-1))
    assert x.shape == (batch, total, 32)
    image = x[:, lengths[0] : lengths[0] + lengths[1]]
    return transformer.proj_out(transformer.norm_out(image, temb))


@pytest.mark.parametrize("guidance", [True, False], ids=["dev", "schnell"])
def test_without_conditions_it_is_the_stock_model(guidance):
    stock = new_transformer(guidance, model_class=FluxTransformer2DModel)
    transformer = new_transformer(guidance)
    arguments = inputs(guidance=guidance)
    expected = stock(**arguments, return_dict=False)[0]
    adapted = add_adapters(copy.deepcopy(transformer), "control")
    for model in (transformer, adapted):
        difference = (omini_forward(model, arguments) - expected).abs().max().item()
        print(f"max abs {difference:.1e} (bar 1e-5), outputs to {expected.abs().max():.1f}")
        assert difference <= 1e-5
    # bit for bit the base: what --preserve_outputs would hold fast
    assert torch.equal(omini_forward(adapted, arguments), omini_forward(transformer, arguments))
    stock = add_adapters(stock, "control")
    assert (stock(**arguments, return_dict=False)[0] - expected).abs().max() > 0.1  # the adapter does do something


CASES = {
    "one": ([(6, 8)], ["a"]),
    "compact": ([(4, 4)], ["a"]),
    "two, shared": ([(6, 8), (4, 8)], ["a", "a"]),
    "two, separate": ([(6, 8), (4, 6)], ["a", "b"]),
    "three, separate and shared": ([(6, 8), (4, 4), (2, 6)], ["a", "b", "a"]),
}


@pytest.mark.parametrize("independent", [False, True], ids=["dependent", "independent"])
@pytest.mark.parametrize("case", CASES)
def test_with_conditions_it_is_the_dense_mask_reference(case, independent):
    transformer = add_adapters(new_transformer(), "a", "b")
    arguments, conditions = inputs(), condition_tokens(*CASES[case])
    parameters = {name: p for name, p in transformer.named_parameters() if p.requires_grad}
    results, gradients = [], []
    for forward in (
        lambda: omini_forward(transformer, arguments, conditions=conditions, independent_condition=independent),
        lambda: reference_forward(transformer, arguments, conditions, independent),
    ):
        result = forward()
        grads = torch.autograd.grad(result.square().mean(), list(parameters.values()), allow_unused=True)
        results.append(result)
        gradients.append([0.0 if g is None else g for g in grads])
    difference = (results[0] - results[1]).abs().max().item()
    worst = max(
        float((a - b).abs().max()) if torch.is_tensor(b) else float(abs(a).max()) if torch.is_tensor(a) else 0
        for a, b in zip(*gradients, strict=True)
    )
    largest = max(float(g.abs().max()) for g in gradients[1] if torch.is_tensor(g))
    print(f"output differs by {difference:.1e}, gradients by {worst:.1e} of {largest:.1e} (bar 1e-5 of the largest)")
    assert difference <= 1e-5
    assert worst <= 1e-5 * max(largest, 1)
    used = {
        name.split(".lora_")[1].split(".")[1]
        for name, g in zip(parameters, gradients[0], strict=True)
        if torch.is_tensor(g)
    }
    assert used == set(CASES[case][1])


def test_text_and_image_tokens_meet_no_lora():
    """Every product with a LoRA's factor is counted: only as many tokens as the conditions have."""
    transformer = add_adapters(new_transformer(), "a", "b")
    conditions = condition_tokens([(4, 4), (2, 6)], ["a", "b"])
    seen = {}

    def count(name):
        adapter = name.split(".lora_A.")[1]
        return lambda module, args: seen.setdefault(adapter, set()).add(tuple(args[0].shape[:-1]))

    for name, module in transformer.named_modules():
        if ".lora_A." in name:
            module.register_forward_pre_hook(count(name))
    omini_forward(transformer, inputs(), conditions=conditions)
    assert seen == {"a": {(2, 4), (2,)}, "b": {(2, 3), (2,)}}  # tokens, and one modulation for all of them
    seen.clear()
    omini_forward(transformer, inputs())
    assert seen == {}


def test_one_attention_call_per_group_and_only_the_keys_it_sees(monkeypatch):
    calls = []
    honest = F.scaled_dot_product_attention

    def record(query, key, value, attn_mask=None, **settings):
        calls.append((query.shape[2], key.shape[2], attn_mask))
        return honest(query, key, value, attn_mask=attn_mask, **settings)

    monkeypatch.setattr(F, "scaled_dot_product_attention", record)
    transformer = add_adapters(new_transformer(layers=1, single_layers=2), "a")
    text_image = TEXT_LENGTH + 12
    conditions = condition_tokens([(6, 8), (4, 4)], ["a", "a"])
    everything = text_image + 12 + 4
    for independent, own in ((False, text_image), (True, 0)):
        calls.clear()
        omini_forward(transformer, inputs(), conditions=conditions, independent_condition=independent)
        block = [(text_image, everything, None), (12, own + 12, None), (4, own + 4, None)]
        assert calls == [*block, *block, (12, everything, None)]  # the last one for the image alone
    calls.clear()
    omini_forward(transformer, inputs(), conditions=conditions[:1])
    assert calls[0] == (text_image + 12, text_image + 12, None)  # one condition that sees all: a single call


def test_the_cache_repeats_independent_conditions_and_computes_them_once():
    transformer = add_adapters(new_transformer(), "a")
    conditions = condition_tokens([(6, 8), (4, 4)], ["a", "a"])
    products = []
    for name, module in transformer.named_modules():
        if ".lora_A." in name:
            module.register_forward_pre_hook(lambda module, args: products.append(1))
    cache = KVCache()
    for seed in range(3):
        arguments = inputs(seed=seed)
        arguments["pooled_projections"] = inputs()["pooled_projections"]  # a prompt is one for all steps
        shared = {"conditions": conditions, "independent_condition": True}
        expected = omini_forward(transformer, arguments, **shared)
        products.clear()
        cached = omini_forward(transformer, arguments, **shared, cache=cache)
        assert bool(products) == (seed == 0)
        assert (cached - expected).abs().max() <= 1e-5


@pytest.mark.parametrize("independent", [False, True])
def test_a_batch_of_different_masks_is_its_samples_one_by_one(independent):
    """Masks of different sizes and shapes, latents that are not square, a second condition beside."""
    transformer = add_adapters(new_transformer(), "a", "b")
    height, width, generator = 6, 8, torch.Generator().manual_seed(2)
    arguments = inputs(batch=4, height=height, width=width)
    clean, other = (torch.randn(4, 16, height, width, generator=generator) for _ in range(2))
    mask = torch.zeros(4, height // 2, width // 2, dtype=torch.bool)
    mask[0, 0, 0] = mask[1, :, 1:] = mask[2, 1:, 2] = mask[3, 0, :] = mask[3, 2, 3] = True
    specs = [
        ConditionSpec("token_integration", (48, 64), adapter="a"),
        ConditionSpec("canny", (48, 64), adapter="b"),
    ]

    def run(rows):
        picked = {name: v if v is None or len(v) != 4 else v[rows] for name, v in arguments.items()}
        latent_mask = mask[rows].flatten(1)
        out = omini_forward(
            transformer,
            picked,
            latent_mask=latent_mask,
            conditions=omini.pack_conditions([clean[rows], other[rows]], specs, [~latent_mask, None]),
            independent_condition=independent,
        )
        assert out.shape == picked["hidden_states"].shape
        assert out[~latent_mask].eq(0).all()
        out, _, valid = omini.select_tokens(out, picked["img_ids"], latent_mask)
        return out, valid

    together, valid = run([0, 1, 2, 3])
    assert together.shape[1] == 9  # the largest mask
    for i in range(4):
        alone, padding = run([i])
        assert padding is None
        assert alone.shape[1] == mask[i].sum()
        difference = (together[i][valid[i]] - alone[0]).abs().max().item()
        assert difference <= 1e-5
    gradient = torch.autograd.grad(
        together[valid].sum(), [p for p in transformer.parameters() if p.requires_grad], allow_unused=True
    )
    assert all(torch.isfinite(g).all() for g in gradient if g is not None)


def test_integrated_tokens_are_exactly_one_images():
    mask = torch.zeros(1, 3, 4, dtype=torch.bool)
    mask[0, 1, 1:3] = True
    latents = torch.arange(1 * 16 * 6 * 8.0).view(1, 16, 6, 8)
    (outside,) = omini.pack_conditions([latents], [ConditionSpec("token_integration", (48, 64))], [~mask.flatten(1)])
    _, inside, _ = omini.select_tokens(omini.pack_latents(latents), image_ids(6, 8), mask.flatten(1))
    assert outside.hidden_states.shape[1] + inside.shape[1] == 12
    together = torch.cat([outside.ids[0], inside[0]])
    assert sorted(map(tuple, together.tolist())) == sorted(map(tuple, image_ids(6, 8).tolist()))


def test_positions_scale_first_then_move():
    ids = condition_ids(4, 6, (1, -3), 2.0)
    rows, columns = [1.5, 3.5], [-2.5, -0.5, 1.5]
    assert ids.tolist() == [[0.0, row, column] for row in rows for column in columns]
    assert torch.equal(condition_ids(4, 6), image_ids(4, 6))


def test_a_style_on_text_and_image_is_the_stock_model_with_it():
    stock = new_transformer(model_class=FluxTransformer2DModel)
    transformer = add_adapters(new_transformer(), "control")
    style = r".*(attn\.(to_[qkv]|add_[qkv]_proj|to_add_out|to_out\.0)|net\.(0\.proj|2)|proj_(mlp|out)|norm.*\.linear"
    style += r"|(x|context)_embedder)"
    add_adapters(transformer, "style", target_modules=style)
    add_adapters(stock, "style", target_modules=style)
    lora = {name: value for name, value in transformer.state_dict().items() if ".style." in name}
    stock.load_state_dict(lora, strict=False)
    arguments = inputs()
    expected = stock(**arguments, return_dict=False)[0]
    result = omini_forward(transformer, arguments, main_adapter="style")
    assert (result - expected).abs().max() <= 1e-5
    plain = omini_forward(transformer, arguments)
    assert (plain - expected).abs().max() > 0.1
    conditions = condition_tokens([(6, 8)], ["control"])
    both = omini_forward(transformer, arguments, conditions=conditions, main_adapter="style")
    alone = omini_forward(transformer, arguments, conditions=conditions)
    assert (both - alone).abs().max() > 0.1


@pytest.mark.parametrize("way", ["checkpointing", pytest.param("compile", marks=pytest.mark.slow)])
def test_checkpointing_and_compiling_change_neither_result_nor_gradient(way):
    transformer = add_adapters(new_transformer(layers=1, single_layers=2), "a")
    conditions = condition_tokens([(6, 8), (4, 4)], ["a", "a"])
    parameters = [p for p in transformer.parameters() if p.requires_grad]
    results = []
    for current in ("plain", way):
        if current == "checkpointing":
            transformer.enable_gradient_checkpointing()
        elif current == "compile":
            compile_blocks(transformer)
        out = omini_forward(transformer, inputs(), conditions=conditions)
        gradients = torch.autograd.grad(out.square().mean(), parameters, allow_unused=True)
        results.append([out, *(g for g in gradients if g is not None)])
    plain, other = results
    assert len(other) == len(plain)
    assert max(float((a - b).abs().max()) for a, b in zip(plain, other, strict=True)) <= 2e-5


def test_the_published_size_on_the_real_model():
    """Rank 4 on FLUX.1-dev's shapes: 14.5 million parameters, 0.1 % of the base (arXiv 2411.15098, section 4.1)."""
    with torch.device("meta"):
        transformer = FluxTransformer2DModel(
            in_channels=64,
            num_layers=19,
            num_single_layers=38,
            attention_head_dim=128,
            num_attention_heads=24,
            joint_attention_dim=4096,
            pooled_projection_dim=768,
            guidance_embeds=True,
            axes_dims_rope=(16, 56, 56),
        ).requires_grad_(False)
        base = sum(p.numel() for p in transformer.parameters())
        adapter = omini.add_lora(transformer, rank=4, alpha=4, dropout=0.0, target_modules=omini.TARGET_MODULES)
    size = sum(p.numel() for p in adapter)
    print(f"{size:,} parameters, {size / base:.2%} of {base:,}")
    assert round(size / 1e6, 1) == 14.5
    assert round(100 * size / base, 1) == 0.1


@pytest.mark.slow
def test_compiling_covers_every_block():
    """Many blocks do not fall back to eager, and a second pass compiles nothing."""
    from torch._dynamo.utils import counters

    torch._dynamo.reset()
    counters.clear()
    transformer = add_adapters(new_transformer(layers=4, single_layers=12), "a")
    conditions = condition_tokens([(6, 8)], ["a"])
    with torch.no_grad(), torch._dynamo.config.patch(fail_on_recompile_limit_hit=True):
        plain = omini_forward(transformer, inputs(), conditions=conditions)
        compile_blocks(transformer)
        out = omini_forward(transformer, inputs(), conditions=conditions)
        graphs = counters["stats"]["unique_graphs"]
        omini_forward(transformer, inputs(), conditions=conditions)
    print(f"{graphs} graphs for 16 blocks")
    assert (out - plain).abs().max() <= 1e-4
    assert counters["stats"]["unique_graphs"] == graphs <= 4
    assert not counters["graph_break"]
