"""common/lora.py: strength in a stock pipeline, exact round trips, whole checkpoints."""

import copy
import inspect
import json
import os
import re
import weakref
from contextlib import contextmanager, nullcontext

from common.arguments import INITIALIZATIONS
from common.checkpoints import (
    atomic_write,
    find_checkpoints,
    read_run_args,
    register_tensor_checkpointing,
    save_checkpoint,
)
from common.lora import (
    FLUX_TARGET_MODULES,
    add_lora,
    find_lora,
    load_lora,
    load_weights,
    lora_layers,
    peft_state_dict,
    register_lora_checkpointing,
    save_exact_lora,
    save_lora,
    target_layers,
    unknown_layers,
)
from common.lora_formats import read_lora
from common.models import EightBitLinear, has_8_bit_kernel, multiplies_8_bits, quantize_base, repeated_blocks

import pytest
import torch
from accelerate import Accelerator
from diffusers import FluxPipeline, FluxTransformer2DModel
from safetensors import safe_open
from safetensors.torch import save_file

from examples.estimate_memory import as_on_gpu
from train_twinflow import BACKBONES, save_model


def with_random_lora(model, rank=4, alpha=4.0, target_modules=FLUX_TARGET_MODULES, seed=0, **kind):
    model = copy.deepcopy(model)
    parameters = add_lora(model, rank=rank, alpha=alpha, dropout=0.0, target_modules=target_modules, **kind)
    generator = torch.Generator().manual_seed(seed)
    for parameter in parameters:
        parameter.data.normal_(std=0.3, generator=generator)
    return model


def run(transformer):
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        return transformer(
            hidden_states=torch.randn(2, 6, 64, generator=generator),
            encoder_hidden_states=torch.randn(2, 5, transformer.config.joint_attention_dim, generator=generator),
            pooled_projections=torch.randn(2, transformer.config.pooled_projection_dim, generator=generator),
            timestep=torch.tensor([0.3, 0.8]),
            guidance=torch.tensor([1.0, 4.0]),
            img_ids=torch.zeros(6, 3),
            txt_ids=torch.zeros(5, 3),
            return_dict=False,
        )[0]


@pytest.mark.parametrize("init", INITIALIZATIONS)
@pytest.mark.parametrize("quantized", [False, True])
def test_a_new_lora_changes_nothing(tiny, init, quantized):
    transformer = tiny.transformer
    if quantized:
        transformer = quantize_base(transformer.requires_grad_(False), torch.float32, "nf4").to("cpu")
    before = run(transformer)
    parameters = add_lora(
        transformer, rank=4, alpha=4, dropout=0.0, target_modules=FLUX_TARGET_MODULES, init_lora_weights=init
    )
    assert {parameter.dtype for parameter in parameters} == {torch.float32}
    after = run(transformer)
    assert torch.equal(after, before)
    layer = transformer.transformer_blocks[0].ff.net[2]  # of 256 inputs
    down = layer.lora_A["default"].weight
    if init == "gaussian":
        assert down.std().item() == pytest.approx(1 / 4, rel=0.1)
    else:
        assert down.abs().max().item() == pytest.approx(256**-0.5, rel=0.05)
    assert all(parameter.requires_grad for parameter in parameters)


@pytest.mark.parametrize(("rank", "alpha"), [(4, 4), (4, 8), (8, 2), (3, 1.5)])
def test_a_stock_pipeline_loads_the_file_at_the_right_strength(tiny, tmp_path, rank, alpha):
    trained = with_random_lora(tiny.transformer, rank, alpha)
    save_lora(tmp_path, {"transformer": trained})
    pipeline = FluxPipeline(**tiny.components_but_image())
    before = run(pipeline.transformer)
    pipeline.load_lora_weights(tmp_path)
    torch.testing.assert_close(run(pipeline.transformer), run(trained), atol=1e-5, rtol=1e-5)
    assert (run(trained) - before).abs().max() > 0.01
    with safe_open(tmp_path / "pytorch_lora_weights.safetensors", "pt") as file:
        assert all(key.startswith("transformer.") for key in file.keys())  # noqa: SIM118
        metadata = json.loads(file.metadata()["lora_adapter_metadata"])
        header = file.metadata()
    assert (metadata["transformer.r"], metadata["transformer.lora_alpha"]) == (rank, rank)
    assert (header["ss_network_dim"], float(header["ss_network_alpha"])) == (str(rank), alpha)


def test_text_encoder_adapters_travel_in_the_same_file(tiny, tmp_path):
    targets = ("self_attn.q_proj", "self_attn.v_proj")
    text_encoder = with_random_lora(tiny.text_encoder, 4, 8, targets, seed=2)
    transformer = with_random_lora(tiny.transformer, 4, 2, seed=3)
    save_lora(tmp_path, {"transformer": transformer, "text_encoder": text_encoder})
    pipeline = FluxPipeline(**tiny.components_but_image())
    pipeline.load_lora_weights(tmp_path)
    ids = torch.tensor([[3, 17, 40, 5, tiny.text_encoder.config.vocab_size - 1]])
    with torch.no_grad():
        ours, theirs = text_encoder(ids).pooler_output, pipeline.text_encoder(ids).pooler_output
    torch.testing.assert_close(theirs, ours, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(run(pipeline.transformer), run(transformer), atol=1e-5, rtol=1e-5)


def test_saving_asks_nobody_about_the_vocabulary(tiny, tmp_path, recwarn):
    text_encoder = with_random_lora(tiny.text_encoder, 4, 8, ("self_attn.q_proj",))
    text_encoder.peft_config["default"].base_model_name_or_path = "some/pipeline"  # whose root has no config.json
    save_lora(tmp_path, {"text_encoder": text_encoder})
    save_exact_lora(tmp_path / "exact", {"text_encoder": text_encoder})
    load_lora(tmp_path / "exact", {"text_encoder": text_encoder})
    assert not [warning for warning in recwarn if "config" in str(warning.message)]


def test_round_trip_is_exact(tiny, tmp_path):
    trained, other = (with_random_lora(tiny.transformer, 4, 7, seed=seed) for seed in (0, 9))
    save_exact_lora(tmp_path / "a", {"transformer": trained})
    load_lora(tmp_path / "a", {"transformer": other})
    assert torch.equal(run(trained), run(other))
    assert all(parameter.requires_grad == ("lora" in name) for name, parameter in other.named_parameters())


def test_weights_to_resume_from_say_their_strength(tiny, tmp_path):
    modules = {"transformer": with_random_lora(tiny.transformer, 4, 7)}
    save_exact_lora(tmp_path / "resume.safetensors", modules)
    read, _ = read_lora(tmp_path / "resume.safetensors")
    for name, layer in lora_layers(modules).items():
        assert torch.equal(read[name].up, layer.up)
        assert read[name].scale == layer.scale == 7 / 4
    pipeline = FluxPipeline(**tiny.components_but_image())
    pipeline.load_lora_weights(tmp_path, weight_name="resume.safetensors")
    torch.testing.assert_close(run(pipeline.transformer), run(modules["transformer"]), atol=1e-4, rtol=1e-4)


def test_a_file_for_other_layers_is_refused(tiny, tmp_path):
    save_exact_lora(tmp_path / "a", {"transformer": with_random_lora(tiny.transformer)})
    fewer = with_random_lora(tiny.transformer, target_modules=("attn.to_q",))
    with pytest.raises(ValueError, match="made for other layers"):
        load_lora(tmp_path / "a", {"transformer": fewer})
    with pytest.raises(ValueError, match="does not train"):
        load_lora(tmp_path / "a", {})


def test_weights_that_peft_does_not_take_are_not_lost_in_silence(tiny):
    """As peft 0.19 with transformers 5 leaves out those of text encoders."""
    model = with_random_lora(tiny.transformer)
    weights = {f"model.{name}": value for name, value in peft_state_dict(model).items()}
    with pytest.raises(RuntimeError, match=r"did not load \d+ tensors, such as \S+lora_A"):
        load_weights(model, weights, "default")


def test_adapters_train_in_float32_beside_a_bfloat16_model(tiny):
    model = with_random_lora(copy.deepcopy(tiny.transformer).to(torch.bfloat16))
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    assert {parameter.dtype for parameter in trainable} == {torch.float32}
    assert model.x_embedder.weight.dtype == torch.bfloat16


def test_two_adapters_by_regex_train_together_and_have_a_file_each(tiny, tmp_path):
    pattern = r"transformer_blocks\.\d+\.attn\.to_[qk]"
    assert unknown_layers(tiny.transformer, pattern) == []
    assert unknown_layers(tiny.transformer, "nothing.*") == ["nothing.*"]

    def adapted(seed):
        model = copy.deepcopy(tiny.transformer).requires_grad_(False)
        torch.manual_seed(seed)
        for name in ("first", "second"):
            for parameter in add_lora(model, rank=2, alpha=4, dropout=0.0, target_modules=pattern, adapter_name=name):
                parameter.data.normal_()
        return model

    model, other = adapted(0), adapted(1)
    assert [name for name, _ in target_layers(model, pattern)] == [
        n for n, _ in target_layers(tiny.transformer, pattern)
    ]
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert {name.split(".")[-2] for name in trained} == {"first", "second"}
    for name in ("first", "second"):
        file = {"adapter_name": name, "weight_name": f"{name}.safetensors"}
        save_lora(tmp_path, {"transformer": model}, **file, header={"mine": name})
        save_exact_lora(tmp_path / name, {"transformer": model}, adapter_name=name)
        load_lora(tmp_path / name, {"transformer": other}, adapter_name=name)
        with safe_open(tmp_path / f"{name}.safetensors", "pt") as opened:
            assert opened.metadata()["mine"] == name
            assert "lora_adapter_metadata" in opened.metadata()
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), other.parameters(), strict=True))
    pipeline = FluxPipeline(**tiny.components_but_image())
    pipeline.load_lora_weights(tmp_path, weight_name="first.safetensors")
    model.set_adapter("first")
    torch.testing.assert_close(run(pipeline.transformer), run(model), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(("kind", "bar"), [("nf4", 0.15), ("int8", 0.02), ("fp8", 0.04)])
def test_a_quantized_base_is_small_and_near(tiny, kind, bar):
    quantized = quantize_base(copy.deepcopy(tiny.transformer).requires_grad_(False), torch.float32, kind).to("cpu")
    layer, own = (model.transformer_blocks[0].ff.net[0].proj for model in (quantized, tiny.transformer))
    assert layer.weight.dtype == {"nf4": torch.uint8, "int8": torch.int8, "fp8": torch.int8}[kind]
    assert layer.weight.numel() * {"nf4": 2, "int8": 1, "fp8": 1}[kind] == own.weight.numel()
    assert quantized.x_embedder.weight.dtype == torch.float32
    inputs = torch.randn(64, own.in_features)
    error = (layer(inputs) - own(inputs)).std() / own(inputs).std()
    print(f"relative error of a quantized layer {error:.3f}")
    assert 0 < error < bar
    assert torch.isfinite(run(quantized)).all()


@pytest.mark.parametrize("kind", ["nf4", "int8", "fp8"])
@pytest.mark.parametrize("way", ["CPU", "GPU"])  # that have int8 products of their own
def test_a_quantized_layer_keeps_no_input_and_computes_what_bitsandbytes_does(tiny, kind, way):
    quantized = quantize_base(copy.deepcopy(tiny.transformer).requires_grad_(False), torch.float32, kind).to("cpu")
    layer = quantized.transformer_blocks[0].ff.net[0].proj
    with as_on_gpu() if way == "GPU" else nullcontext():
        inputs, direction = torch.randn(2, 6, layer.in_features, requires_grad=True), torch.randn(1)
        copied = inputs * direction
        output = layer(copied)
        kept = weakref.ref(copied.untyped_storage())
        del copied
        assert kept() is None
        (gradient,) = torch.autograd.grad(output.square().sum(), inputs)
        same = layer.forward(inputs * direction)  # without hooks
        assert torch.equal(output, same)
        assert torch.equal(gradient, torch.autograd.grad(same.square().sum(), inputs)[0])
        assert gradient.abs().max() > 0


@pytest.mark.parametrize("kind", ["int8", "fp8"])
def test_products_of_8_bits_are_near_those_of_the_same_weight(kind):
    torch.manual_seed(0)
    own = torch.nn.Linear(256, 64).requires_grad_(False)
    own.weight[3] = 0.0  # a row that no scale makes larger
    inputs = torch.randn(2, 40, 256).mul(torch.logspace(-3, 3, 40)[:, None]).requires_grad_()  # a scale a row
    direction = torch.randn(2, 40, 64)
    found = {}
    for multiplies in (False, True):
        layer = EightBitLinear(own, torch.float32, kind, multiplies)
        output = layer(inputs)
        gradient = torch.autograd.grad(output, inputs, direction)[0]
        found[multiplies] = output.detach(), gradient, layer(inputs[:1, :8]).detach()
    exact = own(inputs).detach()
    norms = [(found[each][0] - exact).norm(dim=-1) / exact.norm(dim=-1) for each in (False, True)]
    print(f"relative error: weight {norms[0].mean():.4f}, weight and input {norms[1].mean():.4f}")
    bar = {"int8": 0.02, "fp8": 0.05}[kind]
    assert norms[0].max() < norms[1].max() < bar  # of the smallest row as of the largest
    assert torch.equal(found[True][1], found[False][1])  # gradients are not rounded
    assert torch.equal(found[True][2], found[False][2])  # a few rows are multiplied without rounding them
    assert torch.isfinite(EightBitLinear(own, torch.float32, kind, True)(torch.zeros(20, 256))).all()


def test_the_gpu_decides_whether_8_bits_are_multiplied():
    ampere, ada, blackwell = (8, 6), (8, 9), (12, 0)
    bf16 = torch.bfloat16
    assert not multiplies_8_bits("fp8", bf16, ampere)
    assert multiplies_8_bits("fp8", bf16, ada)
    assert multiplies_8_bits("fp8", bf16, blackwell)
    assert not multiplies_8_bits("fp8", torch.float32, ada)
    assert multiplies_8_bits("int8", torch.float32, ampere)
    assert not multiplies_8_bits("int8", bf16, (7, 0))
    assert not any(multiplies_8_bits(kind, bf16, None) for kind in ("int8", "fp8"))


def test_layers_for_which_there_is_no_kernel_do_not_multiply_8_bits(monkeypatch, capsys):
    inputs = torch.randn(20, 32)
    for sizes in [(32, 24), (24, 32)]:  # kernels take multiples of 16
        layers = [EightBitLinear(torch.nn.Linear(*sizes), torch.float32, "int8", each) for each in (True, False)]
        layers[1].load_state_dict(layers[0].state_dict())
        assert torch.equal(*(layer(inputs[:, : sizes[0]]) for layer in layers))

    has_8_bit_kernel.cache_clear()
    assert has_8_bit_kernel("int8", torch.bfloat16, "cpu")
    assert not capsys.readouterr().err

    def not_built(*tensors):
        raise RuntimeError("no kernel image is available for execution on the device")

    has_8_bit_kernel.cache_clear()
    monkeypatch.setattr(torch, "_int_mm", not_built)
    assert not has_8_bit_kernel("int8", torch.bfloat16, "cpu")
    assert "--quantize_base int8" in capsys.readouterr().err
    has_8_bit_kernel.cache_clear()


@pytest.mark.parametrize("kind", ["none", "nf4", "int8", "fp8"])
def test_hidden_states_between_blocks_are_of_the_dtype_of_autocast(tiny, kind):
    model = copy.deepcopy(tiny.transformer).requires_grad_(False).to(torch.bfloat16)
    if kind != "none":
        quantize_base(model, torch.bfloat16, kind).to("cpu")
    model = with_random_lora(model)
    found = []
    for block in repeated_blocks(model):
        block.register_forward_hook(lambda block, args, outputs: found.extend(output.dtype for output in outputs))
    with as_on_gpu(), torch.autocast("cpu", torch.bfloat16):
        run(model)
    assert len(found) >= 4 and set(found) == {torch.bfloat16}


def test_the_blocks_of_an_extended_class_are_found(tiny):
    from train_omini import OminiTransformer2DModel

    model = OminiTransformer2DModel.from_config(tiny.transformer.config)
    assert repeated_blocks(model) == [*model.transformer_blocks, *model.single_transformer_blocks]


def test_unknown_layers_are_named(tiny):
    with pytest.raises(ValueError, match=r"attn\.to_x, nothing"):
        add_lora(
            copy.deepcopy(tiny.transformer),
            rank=2,
            alpha=2,
            dropout=0,
            target_modules=["attn.to_q", "attn.to_x", "nothing"],
        )


def test_block_prefixes_reach_one_block_only(tiny):
    name = "single_transformer_blocks.0.attn.to_k"
    model = with_random_lora(tiny.transformer, target_modules=(name,))
    adapted = {name.split(".lora_")[0] for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert adapted == {name}


@pytest.fixture
def prepared(tiny):
    accelerator = Accelerator()
    transformer = with_random_lora(tiny.transformer)
    parameters = [parameter for parameter in transformer.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters)
    register_lora_checkpointing(accelerator, {"transformer": transformer}, optimizer)
    accelerator.prepare(transformer, optimizer)
    yield accelerator, transformer, parameters, optimizer
    accelerator.free_memory()


def test_checkpoints_hold_adapters_and_optimizer_only_and_rotate(prepared, tmp_path):
    accelerator, transformer, parameters, optimizer = prepared
    saved = {}
    for step in (2, 10, 9):
        for parameter in parameters:
            parameter.grad = torch.randn_like(parameter)
        optimizer.step()
        saved[step] = [parameter.detach().clone() for parameter in parameters]
        save_checkpoint(accelerator, tmp_path, step, {"seed": 5}, total_limit=2)
    assert [folder.name for folder in find_checkpoints(tmp_path)] == ["checkpoint-9", "checkpoint-10"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint-10", "checkpoint-9"]
    weights = sum(path.stat().st_size for path in (tmp_path / "checkpoint-9").glob("*.safetensors"))
    assert weights < 2.3 * 4 * sum(parameter.numel() for parameter in parameters) + 20000
    assert json.loads((tmp_path / "checkpoint-9" / "trainer_state.json").read_text()) == {"global_step": 9, "seed": 5}
    state = copy.deepcopy(optimizer.state_dict()["state"])
    for parameter in parameters:
        parameter.grad = torch.randn_like(parameter)
    optimizer.step()
    accelerator.load_state(tmp_path / "checkpoint-9")
    assert all(torch.equal(a, b) for a, b in zip(parameters, saved[9], strict=True))
    restored = optimizer.state_dict()["state"]
    assert all(torch.equal(restored[i]["exp_avg"], state[i]["exp_avg"]) for i in state)


def test_a_checkpoint_holds_the_result_at_its_step_and_what_resumes_exactly(tiny, tmp_path):
    accelerator = Accelerator(cpu=True)
    transformer = with_random_lora(tiny.transformer, 4, 7)
    parameters = [parameter for parameter in transformer.parameters() if parameter.requires_grad]

    @contextmanager
    def doubled():  # stands for TwinFlow's moving average: the result is not what is trained
        for parameter in parameters:
            parameter.data *= 2
        yield
        for parameter in parameters:
            parameter.data /= 2

    register_lora_checkpointing(
        accelerator,
        {"transformer": transformer},
        torch.optim.AdamW(parameters),
        {"default": "mine.safetensors"},
        header=lambda name: {"adapter": name},
        result_weights=doubled,
    )
    checkpoint = save_checkpoint(accelerator, tmp_path, 1, {})
    before = [parameter.detach().clone() for parameter in parameters]
    pipeline = FluxPipeline(**tiny.components_but_image())
    pipeline.load_lora_weights(checkpoint, weight_name="mine.safetensors")
    with doubled():
        torch.testing.assert_close(run(pipeline.transformer), run(transformer), atol=1e-4, rtol=1e-4)
    with safe_open(checkpoint / "mine.safetensors", "pt") as file:
        assert file.metadata()["adapter"] == "default"
    assert find_lora(checkpoint)[0] == checkpoint / "mine.safetensors"

    def resumed():
        for parameter in parameters:
            parameter.data.zero_()
        accelerator.load_state(checkpoint)
        return all(torch.equal(a, b) for a, b in zip(parameters, before, strict=True))

    assert resumed()
    (checkpoint / "resume_mine.safetensors").rename(checkpoint / "mine.safetensors")  # as checkpoints were once
    assert resumed()


def test_files_are_as_readable_as_the_umask_says(prepared, tmp_path):
    accelerator, transformer, *_ = prepared
    earlier = os.umask(0o027)
    try:
        save_lora(tmp_path, {"transformer": transformer})
        with atomic_write(tmp_path / "cached.safetensors") as partial:
            save_file({"x": torch.ones(1)}, partial)
        save_checkpoint(accelerator, tmp_path, 1, {})
        save_model(accelerator, tmp_path / "transformer", transformer, FluxTransformer2DModel, torch.float32)
    finally:
        os.umask(earlier)
    modes = {path.name: path.stat().st_mode & 0o777 for path in tmp_path.rglob("*") if path.is_file()}
    assert len(modes) > 8
    assert set(modes.values()) == {0o640}


def test_a_checkpoint_that_fails_while_it_is_written_is_never_seen(prepared, tmp_path, monkeypatch):
    accelerator, *_ = prepared
    save_checkpoint(accelerator, tmp_path, 1, {}, total_limit=1)
    monkeypatch.setattr(accelerator, "save_state", lambda folder: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(SystemExit, match="disk full"):
        save_checkpoint(accelerator, tmp_path, 2, {}, total_limit=1)
    assert [folder.name for folder in find_checkpoints(tmp_path)] == ["checkpoint-1"]
    monkeypatch.undo()
    save_checkpoint(accelerator, tmp_path, 2, {}, total_limit=1)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint-2"]


def test_modules_trained_as_a_whole_are_resumed_from(tiny, tmp_path):
    trained, again = copy.deepcopy(tiny.transformer), copy.deepcopy(tiny.transformer)
    for model in (trained, again):
        parameters = add_lora(
            model, rank=2, alpha=2, dropout=0.0, target_modules=["attn.to_q"], modules_to_save=["x_embedder"]
        )
    before = run(trained)
    for parameter in (p for p in trained.parameters() if p.requires_grad):
        parameter.data.normal_(std=0.2)
    assert sum(p.numel() for p in parameters) > tiny.transformer.x_embedder.weight.numel()
    save_exact_lora(tmp_path / "exact.safetensors", {"transformer": trained})
    load_lora(tmp_path / "exact.safetensors", {"transformer": again})
    assert torch.equal(run(again), run(trained))
    pipeline = FluxPipeline(**tiny.components_but_image())  # reads them, too, as the files of earlier versions
    pipeline.load_lora_weights(tmp_path / "exact.safetensors")
    torch.testing.assert_close(run(pipeline.transformer), run(trained), atol=1e-5, rtol=1e-5)
    assert (run(trained) - before).abs().max() > 0.01


def test_all_weights_are_saved_as_from_pretrained_loads_them(tiny, tmp_path):
    save_model(
        Accelerator(cpu=True), tmp_path / "transformer", tiny.transformer, FluxTransformer2DModel, torch.float32
    )
    loaded = FluxTransformer2DModel.from_pretrained(tmp_path / "transformer")
    assert loaded.config["num_layers"] == tiny.transformer.config["num_layers"]
    assert torch.equal(run(loaded), run(tiny.transformer))


def test_all_weights_are_gathered_a_file_at_a_time(tiny, tmp_path, monkeypatch):
    folder = tmp_path / "transformer"
    size = sum(parameter.nbytes for parameter in tiny.transformer.parameters())
    largest = max(parameter.nbytes for parameter in tiny.transformer.parameters())
    held = []

    def count_and_save(tensors, *args, **kwargs):
        held.append(sum(tensor.nbytes for tensor in tensors.values()))
        save_file(tensors, *args, **kwargs)

    monkeypatch.setattr("train_twinflow.save_file", count_and_save)
    for max_file_size in (largest, "5GB"):
        save_model(
            Accelerator(cpu=True), folder, tiny.transformer, FluxTransformer2DModel, torch.float32, max_file_size
        )
        assert torch.equal(run(FluxTransformer2DModel.from_pretrained(folder)), run(tiny.transformer))
    assert len(held) > 3 and max(held[:-1]) <= largest and sum(held[:-1]) == held[-1] == size
    assert {path.name for path in folder.iterdir()} == {"config.json", "diffusion_pytorch_model.safetensors"}


@pytest.mark.parametrize("file_bytes", [2**30, 2**18])
def test_tensors_of_a_run_go_into_checkpoints_and_come_back_in_place(tiny, tmp_path, monkeypatch, file_bytes):
    accelerator = Accelerator(cpu=True)
    parameters = dict(tiny.transformer.named_parameters())
    average = [torch.randn_like(parameter) for parameter in parameters.values()]
    named = dict(zip(parameters, average, strict=True))
    register_tensor_checkpointing(accelerator, {"model": parameters, "teacher": named})
    before, kept = run(tiny.transformer), [tensor.clone() for tensor in average]
    monkeypatch.setattr("common.checkpoints.FILE_BYTES", file_bytes)
    checkpoint = save_checkpoint(accelerator, tmp_path, 1, {})
    files = sorted(path.name for path in checkpoint.glob("*.safetensors"))
    assert files == ["state.safetensors"] if file_bytes == 2**30 else len(files) > 2
    with pytest.raises(FileNotFoundError, match="no LoRA"):
        find_lora(checkpoint)
    for tensor in (*average, *(p.data for p in parameters.values())):
        tensor.zero_()
    accelerator.load_state(checkpoint)
    assert torch.equal(run(tiny.transformer), before)
    assert all(torch.equal(a, b) for a, b in zip(average, kept, strict=True))


def make_run(folder, *files, output_name=None):
    """A folder as a run leaves it, with one-tensor files for its weights."""
    folder.mkdir(parents=True)
    (folder / "args.json").write_text(json.dumps({"args": {"mode": "edit", "output_name": output_name}}))
    for file in files:
        (folder / file).parent.mkdir(exist_ok=True)
        save_file({"transformer.x.lora_A.weight": torch.zeros(1, 1)}, folder / file)
    return folder


LORA = "pytorch_lora_weights.safetensors"


def test_a_run_a_checkpoint_and_a_file_name_a_lora(tmp_path, monkeypatch):
    run = make_run(tmp_path / "run", LORA, f"checkpoint-4/{LORA}", "run_emb.safetensors")
    assert find_lora(run) == (run / LORA, run)
    assert find_lora(run / LORA) == (run / LORA, run)
    assert find_lora(run / "checkpoint-4") == (run / "checkpoint-4" / LORA, run)
    assert find_lora(run / "checkpoint-4" / LORA) == (run / "checkpoint-4" / LORA, run)
    monkeypatch.chdir(run)
    assert find_lora(".") == (run / LORA, run)
    (run / LORA).rename(tmp_path / "bare.safetensors")
    assert find_lora(tmp_path / "bare.safetensors") == (tmp_path / "bare.safetensors", None)

    named = make_run(tmp_path / "out" / "cat", "../cat.safetensors", "../cat-000002.safetensors", output_name="cat")
    lora = tmp_path / "out" / "cat.safetensors"
    assert find_lora(named) == find_lora(lora) == (lora, named)
    assert find_lora(tmp_path / "out" / "cat-000002.safetensors")[1] == named
    dated = make_run(tmp_path / "out" / "cat-251127", "../cat-251127.safetensors", output_name="cat-251127")
    assert find_lora(tmp_path / "out" / "cat-251127.safetensors")[1] == dated
    omini = make_run(tmp_path / "omini", "canny.safetensors")
    assert find_lora(omini) == (omini / "canny.safetensors", omini)


def test_no_lora_is_one_line_and_never_another_file(tmp_path):
    with pytest.raises(FileNotFoundError, match="absent: no such file"):
        find_lora(tmp_path / "absent")
    gone = make_run(tmp_path / "gone", f"checkpoint-4/{LORA}", "gone_emb.safetensors")
    with pytest.raises(FileNotFoundError, match=f"{LORA}.*checkpoint-4 is its last checkpoint"):
        find_lora(gone)
    named = make_run(tmp_path / "out" / "cat", LORA, output_name="cat")
    with pytest.raises(ValueError, match=r"no cat\.safetensors"):
        find_lora(named)
    two = make_run(tmp_path / "two", "canny.safetensors", "depth.safetensors")
    with pytest.raises(ValueError, match=r"canny\.safetensors, depth\.safetensors"):
        find_lora(two)
    exact = make_run(tmp_path / "exact", LORA, f"resume_{LORA}") / f"resume_{LORA}"
    with pytest.raises(ValueError, match="resumes from"):
        find_lora(exact)
    other = tmp_path / "vae.safetensors"
    save_file({"decoder.weight": torch.zeros(1)}, other)
    with pytest.raises(ValueError, match="holds no LoRA"):
        find_lora(other)
    lora = two / "canny.safetensors"
    lora.write_bytes(lora.read_bytes()[:-2])
    with pytest.raises(ValueError, match="not a readable LoRA"):
        find_lora(lora)


def test_the_flags_of_another_trainers_run_are_not_taken(tmp_path):
    run = make_run(tmp_path / "run")
    assert read_run_args(run, ["mode"])["mode"] == "edit"
    with pytest.raises(ValueError, match="another trainer.*token_abstraction"):
        read_run_args(run, ["mode", "token_abstraction"])
    (run / "args.json").write_text("{")
    with pytest.raises(ValueError, match="damaged"):
        read_run_args(run, ["mode"])


def test_blocks_are_found_by_the_class_and_a_model_without_any_is_refused():
    import tiny_backbones

    flux2 = tiny_backbones.flux2_parts(joint_attention_dim=16, guidance_embeds=False)["transformer"]
    assert repeated_blocks(flux2) == [*flux2.transformer_blocks, *flux2.single_transformer_blocks]
    sd3 = tiny_backbones.sd3().transformer  # its class names none
    assert repeated_blocks(sd3) == [*sd3.transformer_blocks]
    with pytest.raises(ValueError, match="Linear"):
        quantize_base(torch.nn.Linear(2, 2), torch.float32)


@pytest.mark.parametrize("name", BACKBONES)
def test_what_is_quantized_compiled_and_sharded_is_every_layer_of_a_list(name):
    """Also where the lists are not called blocks: Z-Image's are layers, noise_refiner and context_refiner."""
    model_class = BACKBONES[name].transformer_class
    counts = dict.fromkeys(("n_layers", "n_refiner_layers", "num_layers", "num_single_layers"), 2)
    known = inspect.signature(model_class).parameters
    with torch.device("meta"):
        model = model_class(**{key: value for key, value in counts.items() if key in known})
    lists = []
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.ModuleList) and len(module) == 2 and not re.search(r"\d", name):
            lists.append(module)
    assert lists
    blocks = repeated_blocks(model)
    assert {id(block) for block in blocks} == {id(block) for modules in lists for block in modules}
    assert len(blocks) == 2 * len(lists)
