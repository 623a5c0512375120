"""The DGX Spark playbook with train_dreambooth_flux_advanced.py: its folder in, files for ComfyUI out, offline."""

import json
import random
import re
import shlex
import socket
import sys
from pathlib import Path

import common.latents
from common import tracking
from common.lora import target_layers
from common.lora_formats import FLUX_LAYERS

import numpy as np
import pytest
import skimage.data
import torch
from conftest import ROOT
from diffusers import AutoencoderKL, FluxPipeline, FluxTransformer2DModel
from PIL import Image
from prodigyopt import Prodigy
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from test_family import parser_of
from test_lora_files import original_state_dict

import train_dreambooth_flux_advanced as dreambooth
from examples.dreambooth import generate
from examples.toy import pretrain
from examples.toy.compare import sample
from examples.toy.world import COLOR_NAMES, SUBJECTS, Scene, Shape, draw, layers, random_shape, score_subject


SCRIPT = "train_dreambooth_flux_advanced"
SPARK = ROOT / "examples" / "dgx_spark"


@pytest.fixture
def flux_data(tmp_path, monkeypatch):
    """The playbook's flux_data: two folders of photos in mixed sizes and formats, and its data.toml for 64 pixels."""
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "flux_data"
    photos = [Image.fromarray(getattr(skimage.data, name)()) for name in ("astronaut", "chelsea", "coffee")]
    files = {"tjtoy": ("1.png", "2.jpg"), "sparkgpu": ("1.jpeg", "2.JPG", "3.webp")}
    for concept, names in files.items():
        (folder / concept).mkdir(parents=True)
        for i, name in enumerate(names):
            image = photos[i].resize((150 + 40 * i, 190 - 10 * i * len(names)))
            image = image.convert("RGBA") if name.endswith("png") else image
            image.save(folder / concept / name)
    text = (SPARK / "flux_data" / "data.toml").read_text()
    (folder / "data.toml").write_text(text.replace("resolution = 1024", "resolution = 64"))
    return folder


def train_args(*extra):
    """The playbook's flags in small."""
    flags = [*shlex.split((SPARK / "train.args").read_text(), comments=True), "--report_to", "none"]
    small = ("--resolution", 64, "--network_dim", 4, "--network_alpha", 2, "--max_sequence_length", 8)
    return [*flags, *small, "--max_train_epochs", 4, "--save_every_n_epochs", 2, "--mixed_precision", "no", *extra]


SINGLE = ("--pretrained_model", "--clip_l", "--t5xxl", "--ae", "--tokenizer_dir")


def without_files(flags, model):
    kept = [flag for flag in flags if not str(flag).startswith(SINGLE)]
    return [*kept, "--pretrained_model_name_or_path", model]


def test_the_playbooks_folder_and_command_give_its_file(train, flux_data, tmp_path, tiny_model):
    train(SCRIPT, *without_files(train_args(), tiny_model))
    loras = tmp_path / "models" / "loras"
    assert sorted(p.name for p in loras.iterdir()) == [
        *("flux_dreambooth", "flux_dreambooth-000002.safetensors", "flux_dreambooth.safetensors")
    ]
    assert not (loras / "flux_dreambooth" / "pytorch_lora_weights.safetensors").exists()
    steps = [json.loads(line) for line in (loras / "flux_dreambooth" / "metrics.jsonl").open()]
    assert len(steps) == 4 * 2  # (2 x 1 + 3 x 2) pictures / 4
    state_dict = load_file(loras / "flux_dreambooth.safetensors")
    assert {key.split(".")[0] for key in state_dict} == {"transformer", "text_encoder"}
    assert sum(key.endswith(".lora_A.weight") for key in state_dict) == 14 + 6 + 6
    assert all(key.startswith(("transformer.", "text_encoder.text_model.encoder.layers.")) for key in state_dict)
    assert not any(key.endswith(".alpha") for key in state_dict)
    with safe_open(loras / "flux_dreambooth.safetensors", "pt") as file:
        header = file.metadata()
    assert header["modelspec.title"] == header["ss_output_name"] == "flux_dreambooth"
    assert header["modelspec.trigger_phrase"] == "tjtoy toy, sparkgpu gpu"
    assert json.loads(header["ss_tag_frequency"]) == {"tjtoy": {"tjtoy toy": 2}, "sparkgpu": {"sparkgpu gpu": 6}}
    snippet = (loras / "flux_dreambooth" / "README.md").read_text().split("```python\n")[1].split("```")[0]
    assert "weight_name='flux_dreambooth.safetensors'" in snippet
    pipeline = FluxPipeline.from_pretrained(tiny_model)
    pipeline.load_lora_weights(loras, weight_name="flux_dreambooth.safetensors")
    assert pipeline.transformer.transformer_blocks[0].norm1.linear.scaling["default_0"] == 1
    assert (header["ss_network_dim"], header["ss_network_alpha"]) == ("4", "2")  # the scale is in the weights


def test_prodigy_is_set_as_sd_scripts_sets_it(train, flux_data, tiny_model, monkeypatch):
    optimizers, honest = [], dreambooth.create_optimizer

    def create_optimizer(*arguments):
        optimizers.append(honest(*arguments))
        raise KeyboardInterrupt

    monkeypatch.setattr(dreambooth, "create_optimizer", create_optimizer)
    with pytest.raises(SystemExit, match="130"):
        train(SCRIPT, *without_files(train_args(), tiny_model))
    plain = Prodigy([torch.nn.Parameter(torch.zeros(1))], lr=1.0).param_groups[0]
    assert len(optimizers[0].param_groups) == 2  # of the transformer's and CLIP's adapters
    for group in optimizers[0].param_groups:
        assert {k: v for k, v in group.items() if k != "params"} == {k: v for k, v in plain.items() if k != "params"}


def test_a_second_name_in_the_same_folder_is_another_run(train, flux_data, tmp_path, tiny_model):
    flags = without_files(train_args("--max_train_steps", 2, "--save_format", "kohya"), tiny_model)
    for name in ("one", "two"):
        train(SCRIPT, *flags, "--output_name", name)
    kohya = load_file(tmp_path / "models" / "loras" / "two.safetensors")
    assert {key.split("_")[1] for key in kohya} == {"unet", "te1"}
    assert kohya["lora_unet_double_blocks_0_img_attn_qkv.alpha"] == 6


def test_a_run_does_not_replace_the_epoch_that_it_starts_from(tiny_model, tmp_path, capsys):
    loras = tmp_path / "models" / "loras"
    (loras / "cat").mkdir(parents=True)
    (loras / "cat" / "args.json").write_text("{}")
    for name in ("cat-000010", "cat-251127"):
        (loras / f"{name}.safetensors").write_bytes(b"")
    (loras / "cat-251127").mkdir()  # of a run of this name
    flags = [
        "--pretrained_model_name_or_path",
        tiny_model,
        "--instance_data_dir",
        tmp_path,
        "--save_every_n_epochs",
        1,
    ]
    flags += ["--output_dir", loras, "--output_name", "cat"]
    for name, is_refused in (("cat-000010", True), ("cat-251127", False)):
        with pytest.raises(SystemExit):
            dreambooth.parse_args([str(flag) for flag in [*flags, "--lora_path", loras / f"{name}.safetensors"]])
        assert ("would write over it" in capsys.readouterr().err) == is_refused


def test_the_file_of_an_epoch_is_there_before_the_checkpoint_and_goes_to_the_hub(
    train, flux_data, tmp_path, tiny_model, monkeypatch, capsys
):
    (flux_data / "tjtoy" / "1.caption").write_text("Toy, on a shelf")
    flags = without_files(train_args("--max_train_steps", 3, "--save_every_n_epochs", 1), tiny_model)
    flags += ["--checkpointing_steps", 2, "--skip_final_inference"]
    loras, uploads = tmp_path / "models" / "loras", []

    def killed(*args):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(SystemExit, match="130"):
        patch.setattr(dreambooth, "save_checkpoint", killed)
        train(SCRIPT, *flags)
    assert (loras / "flux_dreambooth-000001.safetensors").exists()
    assert "a step is batch 1 x accumulation 4" in capsys.readouterr().out

    class HubApi:
        def __init__(self, token=None):
            pass

        def create_repo(self, name, exist_ok):
            return type("Url", (), {"repo_id": f"me/{name}"})

        def upload_folder(self, **arguments):
            uploads.append(arguments["folder_path"])

        def upload_file(self, *, repo_id, path_or_fileobj, path_in_repo):
            uploads.append((repo_id, path_or_fileobj, path_in_repo))

    monkeypatch.setattr(tracking, "HfApi", HubApi)
    train(SCRIPT, *flags, "--push_to_hub")
    name = "flux_dreambooth.safetensors"
    relative = loras.relative_to(tmp_path)
    assert uploads == [relative / "flux_dreambooth", ("me/flux_dreambooth", relative / name, name)]
    with safe_open(loras / name, "pt") as file:
        header = file.metadata()
    tags = json.loads(header["ss_tag_frequency"])["tjtoy"]
    assert tags == {"toy": 1, "on a shelf": 1, "tjtoy toy": 1}
    assert header["modelspec.trigger_phrase"] == "tjtoy toy, sparkgpu gpu"


def test_kohya_layers_are_those_of_its_sd_scripts(tiny_model, pictures):
    flags = ["--pretrained_model_name_or_path", str(tiny_model), "--instance_data_dir", str(pictures)]
    args = dreambooth.parse_args([*flags, "--lora_layers", "kohya"])
    with torch.device("meta"):
        transformer = FluxTransformer2DModel(guidance_embeds=True)  # as large as FLUX.1-dev
    names = dreambooth.lora_targets(args, dreambooth.Flux({}), transformer)
    homes = {part: home for home, parts in FLUX_LAYERS.items() for part in parts}
    fused = {homes[re.sub(r"\.\d+\.", ".#.", name, count=1)] + name.split(".")[1] for name in names}
    assert len(fused) == 304
    layers = target_layers(transformer, names)
    assert sum(sum(module.weight.shape) for _, module in layers) == 5_369_856  # parameters for each rank
    assert "proj_out" not in names


def test_names_of_kohyas_flags_mean_ours(tiny_model, pictures, tmp_path, capsys):
    flags = ["--pretrained_model_name_or_path", str(tiny_model), "--instance_data_dir", str(pictures)]
    (tmp_path / "args").write_text("--network_dim=7 --network_alpha 3\n")
    kohya = ["--optimizer_type", "Prodigy", "--learning_rate=1", "--max_train_epochs", "9"]
    args = dreambooth.parse_args([*flags, f"@{tmp_path / 'args'}", *kohya, "--lr_scheduler_num_cycles=2"])
    found = (args.rank, args.lora_alpha, args.optimizer, args.num_train_epochs, args.lr_num_cycles)
    assert found == (7, 3, "prodigy", 9, 2)
    for extra, message in (
        (["--save_every_n_epochs", "2"], "--save_every_n_epochs and --save_format need --output_name"),
        (["--save_format", "kohya"], "--save_every_n_epochs and --save_format need --output_name"),
        (["--output_name", "a/b"], "--output_name: a/b must be the name of a file, without folders"),
    ):
        with pytest.raises(SystemExit):
            dreambooth.parse_args([*flags, *extra])
        assert message in capsys.readouterr().err


# The flags that the playbook gives to sd-scripts' flux_train_network.py, as they stand there.
LAUNCH = """
--pretrained_model_name_or_path=models/checkpoints/flux1-dev.safetensors
--clip_l=models/text_encoders/clip_l.safetensors --t5xxl=models/text_encoders/t5xxl_fp16.safetensors
--ae=models/vae/ae.safetensors --dataset_config=flux_data/data.toml --output_dir=models/loras/
--prior_loss_weight=1.0 --output_name=flux_dreambooth --save_model_as=safetensors
--network_module=networks.lora_flux --network_dim=256 --network_alpha=256 --learning_rate=1.0
--optimizer_type=Prodigy --lr_scheduler=cosine_with_restarts --gradient_accumulation_steps 4
--gradient_checkpointing --sdpa --max_train_epochs=100 --save_every_n_epochs=25 --mixed_precision=bf16
--guidance_scale=1.0 --timestep_sampling=flux_shift --model_prediction_type=raw --torch_compile
--persistent_data_loader_workers --cache_latents --cache_latents_to_disk --cache_text_encoder_outputs
--cache_text_encoder_outputs_to_disk
"""


@pytest.fixture
def playbook(flux_data, published, tmp_path):
    """The playbook's folder, with small models under its names, as the working folder."""
    _, files = published
    models = tmp_path / "models"
    places = {
        "checkpoints/flux1-dev.safetensors": "flux1-dev.safetensors",
        "text_encoders/clip_l.safetensors": "clip_l.safetensors",
        "text_encoders/t5xxl_fp16.safetensors": "t5xxl_fp16.safetensors",
        "vae/ae.safetensors": "ae.safetensors",
        "tokenizers": "tokenizers",
    }
    for place, name in places.items():
        (models / place).parent.mkdir(parents=True, exist_ok=True)
        (models / place).symlink_to(files / name)
    return tmp_path


def test_the_playbooks_own_command_means_what_train_args_says(playbook):
    theirs = dreambooth.parse_args(LAUNCH.split())
    ours = dreambooth.parse_args(shlex.split((SPARK / "train.args").read_text(), comments=True))
    different = {name for name, value in vars(theirs).items() if vars(ours)[name] != value}
    assert different == {
        *("network_module", "compile", "seed", "checkpointing_steps", "checkpoints_total_limit"),
        *("resume_from_checkpoint", "validation_prompt", "num_validation_images", "validation_epochs"),
        *("resolution", "train_batch_size"),  # data.toml has both
        "disk_cache_dir",
    }


def test_the_playbooks_own_command_runs_and_so_does_what_it_prints(train, playbook, capsys, monkeypatch):
    small = ("--max_train_steps", 1, "--network_dim", 2, "--torch_compile", "False", "--mixed_precision", "no")
    small += ("--max_sequence_length", 8, "--report_to", "none", "--disk_cache_dir", "cache")
    train(SCRIPT, *LAUNCH.split(), *small)
    state_dict = load_file("models/loras/flux_dreambooth.safetensors")
    assert sum(key.endswith(".lora_A.weight") for key in state_dict) == 2 * 14 + 6 + 2 * 6  # CLIP's too
    card = Path("models/loras/flux_dreambooth/README.md").read_text()
    assert "| train_batch_size | 1 |" in card
    assert "| resolution | 64 |" in card
    assert "- `tjtoy toy`\n- `sparkgpu gpu`" in card
    printed = capsys.readouterr().out.rpartition("dreambooth/generate.py ")[2].splitlines()[0]
    monkeypatch.setattr(sys, "argv", ["generate.py", *shlex.split(printed), "--num_inference_steps", "1"])
    generate.main()
    assert Image.open("0.png").size == (64, 64)
    monkeypatch.chdir("models")
    monkeypatch.setattr(sys, "argv", ["generate.py", "loras/flux_dreambooth", "--prompt", "tjtoy toy"])
    with pytest.raises(SystemExit) as stop:
        generate.main()
    assert stop.value.code == 2
    assert "flux1-dev.safetensors is not there" in capsys.readouterr().err


def test_kohyas_other_flags_are_each_named_with_a_remedy(playbook, capsys):
    refused = {
        "--network_args": ("train_blocks=single", "--lora_layers"),
        "--optimizer_args": ("weight_decay=0.01", "--adam_"),
        "--unet_lr": ("1e-4", "--learning_rate"),
        "--fp8_base": ("", "--quantize_base"),
        "--save_precision": ("bf16", "--upcast_before_saving"),
        "--sample_every_n_epochs": ("2", "--validation_epochs"),
        "--save_every_n_steps": ("100", "--checkpointing_steps"),
        "--network_weights": ("old.safetensors", "--lora_path"),
        "--train_data_dir": ("img", "--instance_data_dir"),
        "--enable_bucket": ("", "--dataset_config"),
        "--config_file": ("a.toml", "@file"),
        "--loss_type": ("huber", "squared error"),
        "--metadata_thumbnail": ("cat.png", "--validation_prompt"),
        "--model_prediction_type": ("sigma_scaled", "raw"),
    }
    words = [word for flag, (value, _) in refused.items() for word in (flag, value) if word]
    with pytest.raises(SystemExit) as stop:
        dreambooth.parse_args([*LAUNCH.split(), *words])
    assert stop.value.code == 2
    lines = capsys.readouterr().err.partition("error:")[2].splitlines()[1:]
    assert [line.split()[0].rstrip(":") for line in lines] == list(refused)
    for line, (value, remedy) in zip(lines, refused.values(), strict=True):
        assert value in line
        assert remedy in line
    assert not (playbook / "models" / "loras").exists()


def test_remedies_name_flags_that_exist():
    parser = parser_of(SCRIPT)
    flags = {flag for action in parser._actions for flag in action.option_strings}
    for name, (_, remedy) in dreambooth.KOHYA_FLAGS.items():
        assert {word for word in re.findall(r"--\w+", remedy) if not word.endswith("_")} <= flags, name


def test_a_command_of_sd_scripts_has_its_defaults(tiny_model, pictures):
    flags = ["--pretrained_model_name_or_path", str(tiny_model), "--instance_data_dir", str(pictures)]
    flags += ["--network_module", "networks.lora_flux", "--learning_rate", "3e-4"]
    args = dreambooth.parse_args(flags)
    found = (args.lora_layers, args.rank, args.lora_alpha, args.train_text_encoder, args.text_encoder_lr)
    assert found == ("kohya", 4, 1, True, 3e-4)
    assert (args.train_batch_size, args.lr_warmup_steps, args.adam_weight_decay) == (1, 0, 0.01)
    args = dreambooth.parse_args([*flags, "--network_train_unet_only", "--network_alpha=2", "--lr_warmup_steps=500"])
    assert (args.train_text_encoder, args.lora_alpha, args.lr_warmup_steps) == (False, 2, 500)
    assert not dreambooth.parse_args(flags[:4]).train_text_encoder


# ---------------------------------------------------------------------------------------------------------------------
# Caches
# ---------------------------------------------------------------------------------------------------------------------


@pytest.fixture
def encodings(monkeypatch):
    """What was encoded since it was last cleared: "image", or the name of a text encoder with the prompt."""
    seen = []
    image, text = common.latents.encode_moments, dreambooth.PromptEncoder.encode_with
    monkeypatch.setattr(common.latents, "encode_moments", lambda *args: seen.append("image") or image(*args))
    monkeypatch.setattr(
        dreambooth.PromptEncoder,
        "encode_with",
        lambda self, name, prompts: (
            seen.extend(dict.fromkeys(f"{name}: {prompt}" for prompt in prompts)) or text(self, name, prompts)
        ),
    )
    return seen


def test_an_edit_re_encodes_exactly_what_was_edited(train, flux_data, tmp_path, tiny_model, encodings):
    for i in (1, 2, 3):
        path = next((flux_data / "sparkgpu").glob(f"{i}.*"))
        path.with_suffix(".caption").write_text(f"sparkgpu gpu number {i}")
    flags = ["--dataset_config", "flux_data/data.toml", "--report_to", "none", "--max_sequence_length", 8]
    flags += [
        "--cache_latents_to_disk",
        "--cache_text_encoder_outputs_to_disk",
        "--disk_cache_dir",
        tmp_path / "cache",
    ]
    flags += ["--pretrained_model_name_or_path", tiny_model, "--max_train_steps", 2, "--rank", 2]
    weights = []

    def run(name, *extra):
        encodings.clear()
        train(SCRIPT, *flags, *extra, "--output_dir", tmp_path / name)
        weights.append(load_file(tmp_path / name / "pytorch_lora_weights.safetensors"))
        return sorted(encodings)

    assert len(run("first")) == 5 * 2 + 2 * 4  # five pictures, each also mirrored; four prompts in two encoders
    assert run("again") == []
    assert all(torch.equal(weights[0][key], weights[1][key]) for key in weights[0])
    (flux_data / "sparkgpu" / "2.caption").write_text("sparkgpu gpu seen from above")
    assert run("caption") == ["clip_l: sparkgpu gpu seen from above", "t5: sparkgpu gpu seen from above"]
    image = Image.open(flux_data / "tjtoy" / "1.png")
    image.putpixel((70, 80), (0, 0, 0, 255))
    image.save(flux_data / "tjtoy" / "1.png")
    assert run("picture") == ["image", "image"]
    assert len(run("length", "--max_sequence_length", 9)) == 2 * 4
    other = tmp_path / "other"
    pipeline = FluxPipeline.from_pretrained(tiny_model)
    pipeline.vae.encoder.conv_in.weight.data[0, 0, 0, 0] += 0.1
    pipeline.save_pretrained(other)
    assert run("model", "--pretrained_model_name_or_path", other) == ["image"] * 10


def test_caches_survive_a_killed_run(train, flux_data, tmp_path, tiny_model, encodings, monkeypatch):
    flags = ["--dataset_config", "flux_data/data.toml", "--report_to", "none", "--max_sequence_length", 8]
    flags += ["--cache_latents_to_disk", "--disk_cache_dir", tmp_path / "cache", "--output_dir", tmp_path / "run"]
    flags += ["--pretrained_model_name_or_path", tiny_model, "--max_train_steps", 1, "--rank", 2]
    counted, files = common.latents.encode_moments, common.latents.save_file

    def killed(*args):
        if encodings.count("image") == 4:
            raise KeyboardInterrupt
        return counted(*args)

    def half_written(tensors, path):
        files(tensors, path)
        if encodings.count("image") == 4:
            path.write_bytes(path.read_bytes()[:50])
            raise KeyboardInterrupt

    monkeypatch.setattr(common.latents, "encode_moments", killed)
    with pytest.raises(SystemExit, match="130"):
        train(SCRIPT, *flags)
    assert len(list((tmp_path / "cache").glob("*.safetensors"))) == 4
    encodings.clear()
    monkeypatch.setattr(common.latents, "encode_moments", counted)
    monkeypatch.setattr(common.latents, "save_file", half_written)
    with pytest.raises(SystemExit, match="130"):
        train(SCRIPT, *flags)
    assert len(list((tmp_path / "cache").glob("*.safetensors"))) == 7
    encodings.clear()
    monkeypatch.setattr(common.latents, "save_file", files)
    train(SCRIPT, *flags)
    assert encodings.count("image") == 3


def test_a_cache_folder_that_cannot_be_is_said_at_once(tmp_path, tiny_model, pictures, capsys):
    (tmp_path / "file").touch()
    flags = ["--pretrained_model_name_or_path", tiny_model, "--instance_data_dir", pictures, "--cache_latents_to_disk"]
    with pytest.raises(SystemExit) as stop:
        dreambooth.parse_args([str(flag) for flag in [*flags, "--disk_cache_dir", tmp_path / "file" / "cache"]])
    assert stop.value.code == 2
    assert f"{tmp_path / 'file'} is not a writable folder" in capsys.readouterr().err


# ---------------------------------------------------------------------------------------------------------------------
# Embeddings
# ---------------------------------------------------------------------------------------------------------------------


def test_new_tokens_are_written_for_diffusers_comfyui_and_forge(train, pictures, tmp_path, tiny_model):
    flags = ["--pretrained_model_name_or_path", tiny_model, "--instance_data_dir", pictures, "--report_to", "none"]
    flags += ["--resolution", 32, "--max_sequence_length", 16, "--rank", 2, "--max_train_steps", 2]
    flags += [
        "--train_text_encoder_ti",
        "--enable_t5_ti",
        "--token_abstraction",
        "circle,a red",
        "--output_name",
        "mine",
    ]
    names = [path.read_text() for path in pictures.glob("*.txt")]
    words = [word for word in ("circle", "square", "triangle", "cross", "diamond") if any(word in n for n in names)][
        :2
    ]
    flags[flags.index("circle,a red")] = ",".join(words)
    train(SCRIPT, *flags, "--output_dir", tmp_path)
    run = tmp_path / "mine"
    with safe_open(tmp_path / "mine.safetensors", "pt") as file:
        assert file.metadata()["modelspec.trigger_phrase"] == ", ".join(f"embedding:{word}" for word in words)
    whole = load_file(run / "mine_emb.safetensors")
    for i, word in enumerate(words):
        comfyui = load_file(run / "embeddings" / "comfyui" / f"{word}.safetensors")
        forge = load_file(run / "embeddings" / "forge" / f"{word}.safetensors")
        assert {key: tuple(value.shape) for key, value in comfyui.items()} == {"clip_l": (2, 32), "t5xxl": (2, 32)}
        assert list(forge) == ["clip_l"]
        rows = slice(2 * i, 2 * i + 2)
        assert torch.equal(comfyui["clip_l"], whole["clip_l"][rows])
        assert torch.equal(comfyui["t5xxl"], whole["t5"][rows])
        assert torch.equal(forge["clip_l"], whole["clip_l"][rows])


# ---------------------------------------------------------------------------------------------------------------------
# Single files
# ---------------------------------------------------------------------------------------------------------------------


def latent_diffusion_names(vae):
    """An AutoencoderKL's weights under the names of ae.safetensors."""
    renamed, levels = {}, len(vae.config.block_out_channels)
    for key, value in vae.state_dict().items():
        side, _, name = key.partition(".")
        for old, new in (
            ("mid_block.resnets.0.", "mid.block_1."),
            ("mid_block.resnets.1.", "mid.block_2."),
            ("mid_block.attentions.0.group_norm.", "mid.attn_1.norm."),
            ("mid_block.attentions.0.to_out.0.", "mid.attn_1.proj_out."),
            ("mid_block.attentions.0.to_", "mid.attn_1."),
            ("conv_norm_out.", "norm_out."),
            ("conv_shortcut", "nin_shortcut"),
        ):
            name = name.replace(old, new)
        if name.startswith(("down_blocks", "up_blocks")):
            kind, i, part, *rest = name.split(".")
            i = int(i) if kind == "down_blocks" else levels - 1 - int(i)
            sampler = "downsample" if kind == "down_blocks" else "upsample"
            middle = f"block.{rest[0]}" if part == "resnets" else sampler
            name = ".".join([kind.removesuffix("_blocks"), str(i), middle, *rest[1:]])
        if "mid.attn_1" in name and "norm" not in name and value.ndim == 2:
            value = value[:, :, None, None]
        renamed[f"{side}.{name}"] = value.contiguous()
    return renamed


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    """(folder, files): a small FLUX.1 as diffusers saves it, and as the four files that the playbook downloads."""
    folder, files = tmp_path_factory.mktemp("folder"), tmp_path_factory.mktemp("files")
    torch.manual_seed(0)
    clip_tokenizer, t5_tokenizer = pretrain.new_tokenizers()
    text_encoder, text_encoder_2 = pretrain.new_text_encoders(clip_tokenizer, t5_tokenizer, width=256, layers=2)
    transformer = FluxTransformer2DModel(
        num_layers=2,
        num_single_layers=1,
        num_attention_heads=1,
        joint_attention_dim=256,
        pooled_projection_dim=256,
        guidance_embeds=True,
    )
    vae = AutoencoderKL(
        down_block_types=["DownEncoderBlock2D"] * 4,
        up_block_types=["UpDecoderBlock2D"] * 4,
        block_out_channels=(32, 32, 64, 64),
        layers_per_block=1,
        latent_channels=16,
        use_quant_conv=False,
        use_post_quant_conv=False,
        shift_factor=0.1159,
        scaling_factor=0.3611,
    )
    pretrain.new_pipeline(
        vae=vae,
        transformer=transformer,
        text_encoder=text_encoder,
        tokenizer=clip_tokenizer,
        text_encoder_2=text_encoder_2,
        tokenizer_2=t5_tokenizer,
    ).save_pretrained(folder)
    save_file(original_state_dict(transformer), files / "flux1-dev.safetensors")
    save_file(latent_diffusion_names(vae), files / "ae.safetensors")
    clip = {key.removeprefix("text_model."): value for key, value in text_encoder.state_dict().items()}
    save_file({f"text_model.{key}": value for key, value in clip.items()}, files / "clip_l.safetensors")
    t5 = {key: value for key, value in text_encoder_2.state_dict().items() if "embed_tokens" not in key}
    save_file(t5, files / "t5xxl_fp16.safetensors")
    for name, tokenizer in (("tokenizer", clip_tokenizer), ("tokenizer_2", t5_tokenizer)):
        tokenizer.save_pretrained(files / "tokenizers" / name)
    return folder, files


def single(files, **others):
    paths = {
        "pretrained_model_name_or_path": files / "flux1-dev.safetensors",
        "clip_l": files / "clip_l.safetensors",
        "t5xxl": files / "t5xxl_fp16.safetensors",
        "ae": files / "ae.safetensors",
        "tokenizer_dir": files / "tokenizers",
    } | others
    return [word for name, path in paths.items() if path for word in (f"--{name}", path)]


def test_the_four_files_train_offline_as_the_folder_does(train, published, pictures, tmp_path, monkeypatch):
    folder, files = published

    def no_network(*args):
        raise AssertionError(f"a connection was made to {args[1:]}")

    monkeypatch.setattr(socket.socket, "connect", no_network)
    monkeypatch.setattr(socket, "getaddrinfo", no_network)
    flags = ["--instance_data_dir", pictures, "--resolution", 32, "--max_sequence_length", 16, "--rank", 2]
    flags += [
        "--report_to",
        "none",
        "--max_train_steps",
        3,
        "--lora_layers",
        "kohya",
        "--validation_prompt",
        "a circle",
    ]
    flags += ["--num_validation_images", 1, "--validation_steps", 2]
    models = {"folder": ["--pretrained_model_name_or_path", folder], "files": single(files)}
    for name, model in models.items():
        train(SCRIPT, *flags, *model, "--output_dir", tmp_path / name)
    a, b = (load_file(tmp_path / name / "pytorch_lora_weights.safetensors") for name in models)
    assert a.keys() == b.keys()
    assert all(torch.equal(a[key], b[key]) for key in a)
    assert max(value.abs().max() for key, value in a.items() if "lora_B" in key) > 0
    first, second = (np.asarray(Image.open(tmp_path / name / "validation" / "step-000003.png")) for name in models)
    assert np.array_equal(first, second)


def test_the_card_of_a_schnell_file_loads_schnell(published, pictures, tmp_path):
    weights = load_file(published[1] / "flux1-dev.safetensors")
    schnell = {key: value for key, value in weights.items() if not key.startswith("guidance_in.")}
    save_file(schnell, tmp_path / "flux1-schnell.safetensors")
    flags = single(published[1], pretrained_model_name_or_path=tmp_path / "flux1-schnell.safetensors")
    flags += ["--instance_data_dir", pictures, "--max_sequence_length", 16, "--output_dir", tmp_path / "run"]
    args = dreambooth.parse_args([str(flag) for flag in flags])
    handler = dreambooth.TokenEmbeddingsHandler()
    dreambooth.save_model_card(args, torch.float32, handler, "a dog", "none")
    card = (tmp_path / "run" / "README.md").read_text()
    assert "FLUX.1-schnell" in card and "FLUX.1-dev" not in card


def test_files_that_are_not_the_right_ones_are_named(published, tmp_path, pictures, capsys):
    folder, files = published
    (tmp_path / "cut.safetensors").write_bytes((files / "ae.safetensors").read_bytes()[:5000])
    (tmp_path / "page.safetensors").write_bytes(b"<html>sign in</html>")
    scaled = load_file(files / "t5xxl_fp16.safetensors") | {"scaled_fp8": torch.zeros(1)}
    save_file(scaled, tmp_path / "scaled.safetensors")
    chroma = load_file(files / "flux1-dev.safetensors")
    save_file({k: v for k, v in chroma.items() if "vector_in" not in k}, tmp_path / "chroma.safetensors")
    rows = [
        (single(files, pretrained_model_name_or_path=tmp_path / "chroma.safetensors"), "holds no vector_in.in_layer"),
        (single(files, clip_l=None), "--clip_l is needed with flux1-dev.safetensors"),
        (single(files, ae=tmp_path / "gone.safetensors"), "gone.safetensors: not a whole safetensors file"),
        (single(files, ae=tmp_path / "cut.safetensors"), "cut.safetensors: not a whole safetensors file"),
        (single(files, t5xxl=tmp_path / "page.safetensors"), "page.safetensors: not a whole safetensors file"),
        (single(files, clip_l=files / "ae.safetensors"), "ae.safetensors: holds no text_model.embeddings"),
        (single(files, t5xxl=tmp_path / "scaled.safetensors"), "scaled fp8 is not supported: use the 16-bit file"),
        (single(files, tokenizer_dir=None), "tokenizers: must hold the folders tokenizer and tokenizer_2"),
        (
            single(files, pretrained_model_name_or_path=folder),
            "belong to a single .safetensors file, but: --pre",
        ),
    ]
    for flags, message in rows:
        with pytest.raises(SystemExit) as stop:
            dreambooth.parse_args([*map(str, flags), "--instance_data_dir", str(pictures)])
        assert stop.value.code == 2
        assert message in capsys.readouterr().err


def changed(files, name, folder, change):
    """A copy of one of the four files in `folder`, its tensors changed in place by `change`."""
    tensors = load_file(files / name)
    change(tensors)
    save_file({key: value.contiguous() for key, value in tensors.items()}, folder / name)
    return folder / name


def test_weights_that_are_missing_unknown_or_of_another_shape_are_named(published, tmp_path, pictures, capsys):
    _, files = published
    flux, clip = "flux1-dev.safetensors", "clip_l.safetensors"

    def add_positions(tensors):
        name = "text_model.embeddings.position_embedding.weight"
        tensors[name] = torch.zeros(248, tensors[name].shape[1])

    rows = [
        ("pretrained_model_name_or_path", flux, lambda t: t.pop("final_layer.linear.bias"), "proj_out.bias"),
        (
            "pretrained_model_name_or_path",
            flux,
            lambda t: t.update({"double_blocks.0.img_attn.gate.weight": torch.zeros(1)}),
            "double_blocks.#.img_attn.gate",
        ),
        ("ae", "ae.safetensors", lambda t: t.pop("decoder.conv_out.bias"), "1 of its weights are missing"),
        ("clip_l", clip, lambda t: t.pop("text_model.final_layer_norm.weight"), "final_layer_norm.weight"),
        ("clip_l", clip, add_positions, "position_embedding.weight is [248, 256] where FLUX.1 has [77, 256]"),
        ("t5xxl", "t5xxl_fp16.safetensors", lambda t: t.pop("encoder.final_layer_norm.weight"), "final_layer_norm"),
    ]
    for i, (flag, name, change, message) in enumerate(rows):
        (tmp_path / str(i)).mkdir()
        path = changed(files, name, tmp_path / str(i), change)
        flags = single(files, **{flag: path, "tokenizer_dir": files / "tokenizers"})
        with pytest.raises(SystemExit) as stop:
            dreambooth.parse_args([*map(str, flags), "--instance_data_dir", str(pictures)])
        assert stop.value.code == 2
        error = capsys.readouterr().err
        assert f"--{flag} {path}" in error
        assert message in error


def test_names_that_differ_only_in_form_are_read(published, tmp_path, pictures):
    """The VAE of diffusers' folder, CLIP without the level text_model, T5 whose embeddings are embed_tokens."""
    folder, files = published

    def rename(tensors):
        for key in list(tensors):
            tensors[key.removeprefix("text_model.")] = tensors.pop(key)

    def embed_tokens(tensors):
        tensors["encoder.embed_tokens.weight"] = tensors.pop("shared.weight")

    others = {
        "ae": folder / "vae" / "diffusion_pytorch_model.safetensors",
        "clip_l": changed(files, "clip_l.safetensors", tmp_path, rename),
        "t5xxl": changed(files, "t5xxl_fp16.safetensors", tmp_path, embed_tokens),
    }
    flags = ["--instance_data_dir", str(pictures)]
    args = [dreambooth.parse_args([*map(str, single(files, **paths)), *flags]) for paths in ({}, others)]
    first, second = (dreambooth.load_text_encoders(each, torch.float32) for each in args)
    first_vae, second_vae = (dreambooth.load_vae(each, torch.float32) for each in args)
    for a, b in (
        (first.text_encoder, second.text_encoder),
        (first.text_encoder_2, second.text_encoder_2),
        (first_vae, second_vae),
    ):
        weights = b.state_dict()
        assert all(torch.equal(value, weights[name]) for name, value in a.state_dict().items())


# ---------------------------------------------------------------------------------------------------------------------
# Learning
# ---------------------------------------------------------------------------------------------------------------------


def concept_pictures(folder, name, count, rng):
    """Pictures of a subject with captions: every third alone, the others beside a shape that is known."""
    folder.mkdir()
    used = {color for color, _ in layers(Shape(name, "white", 0, 0, 1))}
    for i in range(count):
        background, color = rng.sample([color for color in COLOR_NAMES if color not in used], 2)
        shapes, text = [random_shape(rng, "white", size="big", kind=name)], f"a {SUBJECTS[name]}"
        if i % 3:
            own, other = ((0, 0.5), (0.5, 1))[:: 1 if i % 2 else -1]
            shapes = [
                random_shape(rng, "white", size="small", kind=name, left=own[0], right=own[1]),
                random_shape(rng, color, size="small", left=other[0], right=other[1]),
            ]
            nouns = [text, f"a {color} {shapes[1].kind}"]
            text = " and ".join(nouns if own[0] == 0 else nouns[::-1])
        draw(Scene(background, tuple(shapes))).save(folder / f"{i}.png")
        (folder / f"{i}.txt").write_text(f"{text} on a {background} background")


CONCEPTS = """
[general]
caption_extension = ".txt"
[[datasets]]
resolution = 64
batch_size = 12
  [[datasets.subsets]]
  image_dir = "glyph"
  num_repeats = 1
  [[datasets.subsets]]
  image_dir = "totem"
  num_repeats = 2
  [[datasets.subsets]]
  image_dir = "both"
  num_repeats = 2
"""


@pytest.mark.slow
@pytest.mark.learning
def test_two_concepts_of_one_file_are_learned_and_appear_in_one_picture(train, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    rng = random.Random(0)
    for name, count in (("glyph", 24), ("totem", 12)):
        concept_pictures(tmp_path / name, name, count, rng)
    (tmp_path / "both").mkdir()
    for i in range(8):
        background, lefts = ("orange", "blue", "white", "orange")[i % 4], (0, 0.5)[:: 1 if i % 2 else -1]
        names = zip(("glyph", "totem"), lefts, strict=True)
        shapes = [random_shape(rng, "white", size="small", kind=k, left=x, right=x + 0.5) for k, x in names]
        draw(Scene(background, tuple(shapes))).save(tmp_path / "both" / f"{i}.png")
        (tmp_path / "both" / f"{i}.txt").write_text(f"a sks glyph and a zwx totem on a {background} background")
    (tmp_path / "data.toml").write_text(CONCEPTS)
    train(
        SCRIPT,
        *("--pretrained_model_name_or_path", ROOT / "examples" / "toy" / "flux", "--max_sequence_length", 32),
        *(
            "--dataset_config",
            "data.toml",
            "--cache_latents",
            "--rank",
            8,
            "--lora_alpha",
            8,
            "--lora_layers",
            "kohya",
        ),
        *("--guidance_scale", 1, "--learning_rate", 3e-3, "--lr_scheduler", "cosine", "--lr_warmup_steps", 10),
        *("--max_train_steps", 1400, "--report_to", "none", "--output_dir", ".", "--output_name", "two"),
    )
    pipeline = FluxPipeline.from_pretrained(ROOT / "examples" / "toy" / "flux")
    pipeline.set_progress_bar_config(disable=True)
    asked = {  # prompt: what has to be in its pictures
        "a sks glyph and a zwx totem on a white background": ("glyph", "totem"),
        "a sks glyph on a black background": ("glyph",),
    }
    scores = {prompt: [] for prompt in asked}
    for when in ("before", "after"):
        if when == "after":
            pipeline.load_lora_weights(tmp_path, weight_name="two.safetensors")
        for prompt, names in asked.items():
            images = sample(pipeline, [prompt] * 12, seed=0)
            found = [min(score_subject(image, name) for name in names) for image in images]
            scores[prompt].append(100 * float(np.mean(found)))
    for prompt, (before, after) in scores.items():
        print(f"{prompt}: {before:.0f} -> {after:.0f} of 100 (bar {30 if ' and ' in prompt else 50})")
    assert all(before < 5 for before, _ in scores.values())
    assert all(after >= (30 if " and " in prompt else 50) for prompt, (_, after) in scores.items())
