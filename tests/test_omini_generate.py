"""Drawing with train_omini.py's adapters: the pipeline, examples/omini/generate.py, and agreement with training."""

import json
import random
from pathlib import Path

from common.latents import mean_latents
from common.lora import add_lora, save_lora

import numpy as np
import pytest
import torch
from diffusers import FluxPipeline
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import train_omini as omini
from examples.omini import generate
from examples.toy.world import draw, random_scene
from train_omini import ConditionSpec, OminiTransformer2DModel


@pytest.fixture
def adapter(tiny_model, tmp_path):
    """adapter(*types, **fields of args): files with random weights as the trainer writes them, by name."""
    from diffusers import FluxTransformer2DModel

    def make(*types, folder="adapters", **changes):
        flags = ["--pretrained_model_name_or_path", tiny_model, "--instance_data_dir", tmp_path, "--target_size", "32"]
        flags += ["--max_sequence_length", 8, "--condition_type", *types]
        args = omini.parse_args([str(flag) for flag in flags])
        for name, value in changes.items():
            setattr(args, name, value)
        conditions = omini.condition_specs(args)
        torch.manual_seed(3)
        transformer = FluxTransformer2DModel.from_pretrained(tiny_model, subfolder="transformer").requires_grad_(False)
        paths = {}
        for name in omini.adapter_names(conditions):
            for parameter in add_lora(
                transformer, rank=2, alpha=4, dropout=0.0, target_modules=omini.TARGET_MODULES, adapter_name=name
            ):
                parameter.data.normal_(std=0.2)
            metadata = omini.adapter_metadata(args, conditions, name)
            paths[name] = tmp_path / folder / f"{name}.safetensors"
            save_lora(
                tmp_path / folder,
                {"transformer": transformer},
                adapter_name=name,
                weight_name=f"{name}.safetensors",
                header=metadata,
            )
        return paths

    return make


def omini_pipeline(model):
    transformer = OminiTransformer2DModel.from_pretrained(model, subfolder="transformer")
    return omini.OminiPipeline.from_pretrained(model, transformer=transformer)


def load(model, paths):
    pipeline = omini_pipeline(model)
    pipeline.set_progress_bar_config(disable=True)
    _, specs = generate.read_metadata(list(paths.values()))
    for name, path in paths.items():
        pipeline.load_lora_weights(path.parent, weight_name=path.name, adapter_name=name)
    return pipeline, specs


def picture(height=32, width=32):
    rng = np.random.default_rng(0)
    return Image.fromarray(rng.integers(0, 255, (height, width, 3), dtype=np.uint8))


SETTINGS = {"height": 32, "width": 48, "num_inference_steps": 3, "max_sequence_length": 8, "output_type": "latent"}


def seeded():
    return torch.Generator().manual_seed(0)


def test_without_conditions_it_is_flux_pipeline(tiny_model):
    settings = {**SETTINGS, "output_type": "np", "guidance_scale": 2.0}
    images = [
        pipeline("a circle", **settings, generator=seeded()).images
        for pipeline in (FluxPipeline.from_pretrained(tiny_model), omini_pipeline(tiny_model))
    ]
    assert np.abs(images[0] - images[1]).max() <= 1e-5


def test_the_stock_pipeline_generates_with_conditions_and_cache(tiny_model, adapter):
    """FluxPipeline hands joint_attention_kwargs to the transformer: conditions and cache need no pipeline of ours."""
    paths = adapter("canny", independent_condition=True)
    pipeline, specs = load(tiny_model, paths)
    call = {**SETTINGS, "prompt": ["a circle"], "specs": specs, "condition_images": [picture()]}
    expected = pipeline(**call, independent_condition=True, kv_cache=True, generator=seeded()).images

    stock = FluxPipeline(**pipeline.components)
    stock.set_progress_bar_config(disable=True)
    moments = omini.encode_moments(pipeline.vae, omini.to_tensor(picture())[None])
    latents = mean_latents(moments, pipeline.vae.config)
    joint_attention_kwargs = {
        "conditions": omini.pack_conditions([latents], specs),
        "independent_condition": True,
        "cache": omini.KVCache(),
    }
    images = stock(
        "a circle", **SETTINGS, joint_attention_kwargs=joint_attention_kwargs, generator=seeded()
    ).images  # packed
    assert torch.equal(images, omini.pack_latents(expected))


def test_kv_cache_draws_the_same_and_is_refused_for_dependent_adapters(tiny_model, adapter, tmp_path, capsys):
    paths = adapter("canny", "coloring", adapter_per_condition=True, independent_condition=True)
    pipeline, specs = load(tiny_model, paths)
    call = {
        **SETTINGS,
        "prompt": ["a circle"],
        "specs": specs,
        "condition_images": [picture(), picture()],
        "independent_condition": True,
        "image_guidance_scale": 1.5,
    }
    plain, cached = (pipeline(**call, kv_cache=on, generator=seeded()).images for on in (False, True))
    difference = (plain - cached).abs().max().item()
    print(
        f"latents with and without the cache differ by {difference:.1e} (bar 1e-4), they reach {plain.abs().max():.1f}"
    )
    assert difference <= 1e-4
    without = pipeline(
        **{**call, "specs": [], "condition_images": [], "image_guidance_scale": 1.0}, generator=seeded()
    )
    assert (plain - without.images).abs().max() > 0.05

    dependent = adapter("canny", folder="dependent")["canny"]
    picture().save(tmp_path / "a.png")
    flags = [dependent, "--prompt", "x", "--image", tmp_path / "a.png", "--kv_cache", "--output", tmp_path / "out.png"]
    flags = [str(flag) for flag in flags]
    with pytest.raises(SystemExit) as stop:
        generate.main(flags)
    assert stop.value.code == 2
    assert "--kv_cache needs adapters trained with --independent_condition" in capsys.readouterr().err
    generate.main([*flags, "--force", "--num_inference_steps", "2"])
    assert Image.open(tmp_path / "out.png").size == (32, 32)


def test_both_passes_of_image_guidance_obey_the_same_rule(tiny_model, adapter, monkeypatch):
    pipeline, specs = load(tiny_model, adapter("canny", independent_condition=True))
    seen, honest = [], OminiTransformer2DModel.transformer_forward
    monkeypatch.setattr(
        OminiTransformer2DModel, "transformer_forward", lambda self, **k: seen.append(k) or honest(self, **k)
    )
    call = {**SETTINGS, "prompt": ["a circle"], "specs": specs, "condition_images": [picture()]}
    pipeline(**{**call, "num_inference_steps": 1}, independent_condition=True, image_guidance_scale=2.0)
    first, second = seen
    assert first["independent_condition"] is second["independent_condition"] is True
    assert torch.equal(first["conditions"][0].ids, second["conditions"][0].ids)
    assert first["conditions"][0].adapter == second["conditions"][0].adapter
    assert not torch.equal(first["conditions"][0].hidden_states, second["conditions"][0].hidden_states)


def test_training_validation_and_generation_put_conditions_in_the_same_place(
    train, tiny_model, pictures, tmp_path, monkeypatch
):
    """Scale and delta at once, a condition that is not square: the ids that reach the transformer."""
    seen, honest = [], OminiTransformer2DModel.transformer_forward
    monkeypatch.setattr(
        OminiTransformer2DModel,
        "transformer_forward",
        lambda self, **k: seen.append(k["conditions"][0].ids) or honest(self, **k),
    )
    train(
        "train_omini",
        *("--pretrained_model_name_or_path", tiny_model, "--instance_data_dir", pictures, "--target_size", "96x64"),
        *("--condition_type", "canny", "--condition_size", "48x32", "--position_scale", 2, "--position_delta", "1,-3"),
        *("--max_sequence_length", 8, "--max_train_steps", 1, "--rank", 2, "--report_to", "none"),
        *("--train_batch_size", 2, "--output_dir", tmp_path / "run", "--drop_image_prob", 0),
        *("--validation_prompt", "x", "--validation_image", pictures / "1.png", "--num_validation_images", 1),
    )
    generate.main(
        [
            *(str(tmp_path / "run" / "canny.safetensors"), "--prompt", "x", "--image", str(pictures / "1.png")),
            *("--num_inference_steps", "1", "--output", str(tmp_path / "x.png")),
        ]
    )
    assert len(seen) == 28 + 1 + 28 + 1  # validation, a step, validation, generation
    expected = [[0, 2 * row + 0.5 + 1, 2 * column + 0.5 - 3] for row in range(2) for column in range(3)]
    assert all(ids.tolist() == expected for ids in seen)


def test_token_integration_with_masks_of_any_shape(tiny_model, adapter, tmp_path):
    """Not square; what is outside the mask stays, what is inside depends on the seed; a batch is its samples."""
    pipeline, _ = load(tiny_model, adapter("token_integration"))
    specs = [ConditionSpec("token_integration", (48, 64), adapter="token_integration")]
    masks = np.zeros((4, 48, 64), dtype=bool)
    masks[0, 3:9, 3:40] = masks[1, :, 20:25] = masks[2, 40, 60] = True
    masks[3] = np.hypot(*np.mgrid[-24:24, -32:32]) < 15
    images = [
        omini.convert_to_condition(
            "token_integration", picture(48, 64), mask=omini.to_pixel_mask(omini.to_latent_mask(mask))
        )
        for mask in masks
    ]
    call = {**SETTINGS, "height": 48, "width": 64, "specs": specs}

    def draw(rows, seeds):
        return pipeline(
            **call,
            prompt=["a circle"] * len(rows),
            condition_images=[[images[i] for i in rows]],
            mask=masks[rows],
            generator=[torch.Generator().manual_seed(seed) for seed in seeds],
        ).images

    together = draw([0, 1, 2, 3], [0, 1, 2, 3])
    again = draw([0, 1, 2, 3], [4, 5, 6, 7])
    clean = omini.encode_moments(pipeline.vae, torch.stack([omini.to_tensor(image) for image in images]))
    clean = mean_latents(clean, pipeline.vae.config)
    for i in range(4):
        assert (together[i] - draw([i], [i])[0]).abs().max() <= 1e-4
        inside = torch.from_numpy(omini.to_latent_mask(masks[i])).repeat_interleave(2, 0).repeat_interleave(2, 1)
        assert torch.equal(together[i][:, ~inside], clean[i][:, ~inside])
        assert not (together[i] - again[i])[:, inside].eq(0).all(dim=0).any()

    with pytest.raises(ValueError, match="must contain some and leave some"):
        pipeline(**call, prompt=["x"], condition_images=[images[0]], mask=np.ones((48, 64), dtype=bool))

    picture(30, 50).save(tmp_path / "a.png")
    mask = Image.new("L", (50, 30))
    mask.paste(255, (7, 9, 33, 20))
    mask.save(tmp_path / "mask.png")
    lying, about = picture(30, 50).transpose(Image.Transpose.ROTATE_90), Image.Exif()
    about[0x0112] = 6  # a camera held upright: to be turned by 270 degrees
    lying.save(tmp_path / "camera.png", exif=about)
    (path,) = adapter("token_integration").values()
    flags = [path, "--prompt", "x", "y", "--image", tmp_path / "a.png", "--mask", tmp_path / "mask.png"]
    flags += ["--size", 80, 48, "--num_inference_steps", 2, "--output", tmp_path / "out.png"]
    generate.main([str(flag) for flag in flags])
    assert [Image.open(tmp_path / f"out-{i}.png").size for i in (0, 1)] == [(80, 48)] * 2
    flags[flags.index(tmp_path / "a.png")] = tmp_path / "camera.png"
    assert generate.parse_args([str(flag) for flag in flags]).pixel_mask.any()  # the mask is of the upright picture


def test_images_of_conditions_on_one_image_have_one_shape(adapter, tmp_path, capsys):
    picture(32, 32).save(tmp_path / "square.png")
    picture(32, 48).save(tmp_path / "wide.png")
    picture(64, 97).save(tmp_path / "large.png")
    paths = list(adapter("canny", "subject", "coloring", adapter_per_condition=True).values())
    square, wide, large = (tmp_path / f"{name}.png" for name in ("square", "wide", "large"))

    def parse(flag, *images):
        return generate.parse_args([str(word) for word in [*paths, "--prompt", "x", flag, *images]])

    for flag in ("--image", "--condition"):
        parse(flag, wide, square, large)  # the subject lies beside the image
        with pytest.raises(SystemExit) as stop:
            parse(flag, wide, wide, square)
        assert stop.value.code == 2
        assert f"{square} is 32 x 32 pixels, {wide} 48 x 32" in capsys.readouterr().err
    parse("--image", wide)


def test_a_style_beside_a_control_adapter(tiny_model, adapter, tmp_path):
    from diffusers import FluxTransformer2DModel

    transformer = FluxTransformer2DModel.from_pretrained(tiny_model, subfolder="transformer").requires_grad_(False)
    for parameter in add_lora(transformer, rank=2, alpha=2, dropout=0.0, target_modules=["attn.to_q", "ff.net.2"]):
        parameter.data.normal_(std=0.3)
    save_lora(tmp_path / "style", {"transformer": transformer})
    (path,) = adapter("canny").values()
    picture().save(tmp_path / "a.png")
    flags = [path, "--prompt", "x", "--image", tmp_path / "a.png", "--num_inference_steps", 2, "--output"]
    generate.main([str(flag) for flag in [*flags, tmp_path / "plain.png"]])
    style = tmp_path / "style" / "pytorch_lora_weights.safetensors"
    generate.main([str(flag) for flag in [*flags, tmp_path / "styled.png", "--style_lora", style]])
    plain, styled = (np.asarray(Image.open(tmp_path / f"{name}.png")).astype(int) for name in ("plain", "styled"))
    assert np.abs(plain - styled).max() > 2


@pytest.mark.parametrize("kind", [{}, {"lokr_factor": -1}], ids=["LoRA", "LoKr"])
def test_a_style_of_what_conditions_share_is_refused(tiny_model, adapter, tmp_path, capsys, kind):
    from diffusers import FluxTransformer2DModel

    transformer = FluxTransformer2DModel.from_pretrained(tiny_model, subfolder="transformer").requires_grad_(False)
    layer = "time_text_embed.timestep_embedder.linear_1"
    add_lora(transformer, rank=2, alpha=2, dropout=0.0, target_modules=[layer], **kind)
    save_lora(tmp_path / "style", {"transformer": transformer})
    (path,) = adapter("canny").values()
    picture().save(tmp_path / "a.png")
    style = tmp_path / "style" / "pytorch_lora_weights.safetensors"
    flags = [path, "--prompt", "x", "--image", tmp_path / "a.png", "--style_lora", style, "--num_inference_steps", 1]
    with pytest.raises(SystemExit) as stop:
        generate.main([str(flag) for flag in [*flags, "--output", tmp_path / "styled.png"]])
    assert stop.value.code == 2
    assert layer in capsys.readouterr().err


def test_adapters_of_different_target_sizes_cover_the_same_image(adapter):
    (canny,) = adapter("canny").values()
    (large,) = adapter("subject", folder="large", target_size=(64, 64)).values()
    beside = generate.read_metadata([canny, large])[1][1]
    assert (beside.size, beside.position_delta, beside.position_scale) == ((32, 32), (0, -2), 1)


def test_files_of_the_authors_code_draw_as_ours(tiny_model, adapter, tmp_path):
    """Their save_lora gives diffusers' names and no header: flags say what the adapter is for."""
    (ours,) = adapter("subject", folder="ours").values()
    with safe_open(ours, "pt") as file:
        settings = json.loads(file.metadata()["lora_adapter_metadata"])
    scale = settings["transformer.lora_alpha"] / settings["transformer.r"]  # their files have alpha = rank
    theirs = tmp_path / "theirs" / "default.safetensors"
    layers = {key.removeprefix("transformer."): value for key, value in load_file(ours).items()}
    layers = {key: value * scale if "lora_B" in key else value for key, value in layers.items()}
    FluxPipeline.save_lora_weights(theirs.parent, transformer_lora_layers=layers, weight_name=theirs.name)
    picture(48, 64).save(tmp_path / "a.png")
    shared = ["--prompt", "x", "--image", tmp_path / "a.png", "--num_inference_steps", 2, "--max_sequence_length", 8]
    generate.main([str(flag) for flag in [ours, *shared, "--output", tmp_path / "ours.png"]])
    say = ["--pretrained_model_name_or_path", tiny_model, "--size", 32, 32, "--condition_type", "subject"]
    generate.main([str(flag) for flag in [theirs, *shared, *say, "--output", tmp_path / "theirs.png"]])
    images = [np.asarray(Image.open(tmp_path / f"{name}.png")) for name in ("ours", "theirs")]
    assert np.array_equal(*images)

    say = ["--condition_type", "canny", "deblurring", "--position_delta", "0,0", "0,-3", "--independent_condition"]
    args = generate.parse_args([str(flag) for flag in [theirs, *shared, *say, "--size", 48, 32]])
    assert [(spec.type, spec.size, spec.position_delta) for spec in args.specs] == [
        ("canny", (32, 48), (0, 0)),
        ("deblurring", (32, 48), (0, -3)),
    ]
    assert args.run_info["independent_condition"]
    assert args.run_info["base_model"] == "black-forest-labs/FLUX.1-dev"


def test_adapters_of_one_name_are_combined(tiny_model, adapter, tmp_path):
    first, second = (adapter("canny", folder=name)["canny"] for name in ("first", "second"))
    _, specs = generate.read_metadata([first, second, first])
    assert len({spec.adapter for spec in specs}) == 3
    picture().save(tmp_path / "a.png")
    flags = [first.parent, second, "--prompt", "x", "--image", tmp_path / "a.png", "--num_inference_steps", 1]
    generate.main([str(flag) for flag in [*flags, "--output", tmp_path / "out.png"]])
    assert (tmp_path / "out.png").exists()


def test_the_folder_of_a_run_with_several_adapters(adapter):
    paths = adapter("coloring", "canny", adapter_per_condition=True)
    in_order = [paths["coloring"], paths["canny"]]  # as --condition_type names them
    assert generate.lora_files(paths["canny"].parent) == in_order
    named = paths["canny"].parents[1] / "named"  # as with --output_name named
    named.mkdir()
    (named / "args.json").write_text("{}")
    beside = [path.rename(named.with_name(f"named-{path.name}")) for path in in_order]
    assert generate.lora_files(named) == beside
    assert generate.lora_files(beside[0]) == [beside[0]]


def test_the_folder_of_a_run_never_means_another_runs_file(adapter, tmp_path):
    """--output_name canny and canny-subject in one output_dir."""
    runs = tmp_path / "runs"
    for name in ("canny", "canny-subject"):
        (runs / name).mkdir(parents=True)
        (runs / name / "args.json").write_text(json.dumps({"args": {"output_name": name}}))
    canny = adapter("canny")["canny"].rename(runs / "canny.safetensors")
    adapter("subject", folder="subject")["subject"].rename(runs / "canny-subject.safetensors")
    assert generate.lora_files(runs / "canny") == [canny]
    canny.unlink()
    with pytest.raises(FileNotFoundError, match="no LoRA"):
        generate.lora_files(runs / "canny")
    pair = adapter("canny", "coloring", folder="pair", adapter_per_condition=True)
    pair = [path.rename(runs / f"canny-{path.name}") for path in pair.values()]
    adapter("fill", folder="fill")["fill"].rename(runs / "canny-old.safetensors")
    assert generate.lora_files(runs / "canny") == sorted(pair)


def test_a_lora_with_no_layer_of_the_model_does_not_draw(tiny_model, adapter, tmp_path, capsys):
    canny = adapter("canny")["canny"]
    other = tmp_path / "other" / "clip.safetensors"
    other.parent.mkdir()
    save_file({"text_model.encoder.x.lora_A.weight": torch.zeros(1, 1)}, other)
    picture().save(tmp_path / "a.png")
    flags = ["--prompt", "x", "--image", tmp_path / "a.png", "--pretrained_model_name_or_path", tiny_model]
    for words in ([other, "--condition_type", "canny"], [canny, "--style_lora", other.parent]):
        args = generate.parse_args([str(flag) for flag in [*words, *flags]])
        with pytest.raises(SystemExit) as stop:
            generate.load_pipeline(args)
        assert stop.value.code == 2
        assert "clip.safetensors cannot be loaded: it holds no layer" in capsys.readouterr().err

    for style in ("absent", "a.png"):
        with pytest.raises(SystemExit) as stop:
            generate.parse_args([str(flag) for flag in [canny, *flags, "--style_lora", tmp_path / style]])
        assert stop.value.code == 2
        assert style in capsys.readouterr().err


def test_the_mask_belongs_to_the_masked_conditions_image(adapter, tmp_path):
    canny, fill = adapter("canny")["canny"], adapter("fill", folder="fill")["fill"]
    for name, side in (("large", 64), ("small", 16)):
        picture(side, side).save(tmp_path / f"{name}.png")
    mask = Image.new("L", (16, 16))
    mask.paste(255, (0, 0, 8, 8))
    mask.save(tmp_path / "mask.png")
    flags = [canny, fill, "--prompt", "x", "--image", tmp_path / "large.png", tmp_path / "small.png"]
    args = generate.parse_args([str(flag) for flag in [*flags, "--mask", tmp_path / "mask.png"]])
    assert args.pixel_mask.mean() == 0.25


def test_what_is_kept_are_the_images_own_tokens():
    """Not those of the condition, whose black hole the VAE spreads into its surroundings."""
    pipeline = omini_pipeline(Path(generate.__file__).parents[1] / "toy" / "flux")
    pipeline.set_progress_bar_config(disable=True)
    image = draw(random_scene(random.Random(3)), 64, 64)
    mask = np.zeros((64, 64), dtype=bool)
    mask[:, 32:] = True
    with_hole = omini.convert_to_condition("token_integration", image, mask=mask)
    results = {}
    for name, given in (("image", image), ("with its hole", with_hole)):
        call = {
            "prompt": ["a red circle"],
            "specs": [ConditionSpec("token_integration", (64, 64), adapter=None)],
            "condition_images": [given],
            "mask": mask,
        }
        sizes = {"height": 64, "width": 64, "num_inference_steps": 2, "max_sequence_length": 8}
        results[name] = pipeline(**call, **sizes, output_type="latent", generator=seeded()).images
    own = mean_latents(omini.encode_moments(pipeline.vae, omini.to_tensor(image)[None]), pipeline.vae.config)
    assert torch.equal(results["image"][..., :4], own[..., :4])
    assert torch.equal(results["image"][..., 4:], results["with its hole"][..., 4:])  # the condition is the same

    errors = {}
    for name, latents in (results | {"the VAE alone": own}).items():
        decoded = omini.decode_latents(pipeline.vae, latents).detach()
        (pixels,) = pipeline.image_processor.postprocess(decoded, output_type="np")
        errors[name] = np.abs(255 * pixels - np.asarray(image))[~mask].mean()
    print("kept pixels differ, in grey levels:", {name: f"{error:.2f}" for name, error in errors.items()})
    assert errors["image"] < errors["with its hole"]


def test_what_cannot_be_drawn_is_said(adapter, tmp_path, capsys):
    canny = str(adapter("canny")["canny"])
    fill = str(adapter("fill", folder="fill")["fill"])
    other = str(adapter("coloring", folder="other", independent_condition=True)["coloring"])
    image, mask, white = (str(tmp_path / name) for name in ("a.png", "mask.png", "white.png"))
    picture().save(image)
    Image.new("L", (16, 16), 255).save(mask)
    Image.new("L", (32, 32), 255).save(white)
    plain = tmp_path / "plain.safetensors"
    with safe_open(canny, "pt") as file:
        assert json.loads(file.metadata()["omini"])["base_model"]
    from safetensors.torch import save_file

    save_file({"transformer.x_embedder.lora_A.weight": torch.zeros(1, 1)}, plain)
    for flags, message in (
        ([canny], "exactly one of --image and --condition is needed"),
        ([canny, "--image", image, image], "2 images for 1 conditions: canny"),
        ([canny, "--image", str(tmp_path / "no.png")], "no.png: not a readable image"),
        ([str(plain), "--image", image], "its header names no conditions"),
        ([canny, other, "--image", image], "trained with another --independent_condition"),
        ([canny, "--image", image, "--condition_type", "canny"], "--condition_type has no effect"),
        ([canny, "--image", image, "--position_delta", "0,1"], "--position_delta has no effect"),
        (
            [str(plain), "--image", image, "--condition_type", "canny", "--position_delta", "0,0", "0,0"],
            "has 2 values",
        ),
        ([str(plain), str(plain), "--condition_type", "canny", "--image", image], "1 types for 2 files"),
        ([str(tmp_path / "nowhere"), "--image", image], "no such file or folder"),
        ([canny, "--image", image, "--mask", mask], "--mask has no effect"),
        ([fill, "--image", image], "--mask is needed"),
        ([fill, "--image", image, "--mask", mask], "is 16 x 16 pixels"),
        ([fill, "--image", image, "--mask", white], "is all white"),
        ([canny, "--image", image, "--size", "40", "32"], "--size 40 32: both must be multiples of 16"),
    ):
        with pytest.raises(SystemExit) as stop:
            generate.main([*flags, "--prompt", "x"])
        assert stop.value.code == 2
        assert message in capsys.readouterr().err
