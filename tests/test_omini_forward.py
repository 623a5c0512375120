"""The forward pass of train_omini.py against the stock model and against a dense-mask reference."""

import copy
import itertools

import pytest
import torch
import torch.nn.functional as F
from diffusers import FluxTransformer2DModel
from peft import LoraConfig
from peft.tuners.lora import LoraLayer

import train_omini as omini
from common.latents import image_ids


TEXT_LENGTH = 5


def new_transformer(guidance=True, layers=2, single_layers=2):
    torch.manual_seed(0)
    transformer = FluxTransformer2DModel(
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
        omini.Tokens(
            torch.randn(batch, height * width // 4, 64, generator=generator),
            omini.condition_ids(height, width, *place),
            (adapter,),
        )
        for (height, width), adapter, place in zip(sizes, adapters, places, strict=False)
    ]


def reference_forward(transformer, arguments, conditions, independent):
    """One sequence [text, image, conditions], a dense mask, and for each token the weights it is to meet, merged."""
    layers = dict(transformer.named_modules())
    groups = ["text", "image"] + [condition.adapters[0] for condition in conditions]
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
    x += [linear("x_embedder", condition.hidden_states, condition.adapters[0]) for condition in conditions]
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
    transformer = new_transformer(guidance)
    arguments = inputs(guidance=guidance)
    expected = transformer(**arguments, return_dict=False)[0]
    adapted = add_adapters(copy.deepcopy(transformer), "control")
    for model in (transformer, adapted):
        difference = (omini.omini_forward(model, **arguments) - expected).abs().max().item()
        print(f"max abs {difference:.1e} (bar 1e-5), outputs to {expected.abs().max():.1f}")
        assert difference <= 1e-5
    assert (adapted(**arguments, return_dict=False)[0] - expected).abs().max() > 0.1  # the adapter does do something


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
        lambda: omini.omini_forward(
            transformer, **arguments, conditions=conditions, independent_condition=independent
        ),
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
