"""Bad input: one clear message, exit code 2, before any model is loaded, and nothing written."""

import json
import shutil

from common.arguments import Parser
from common.checkpoints import CHECKSUMS, checksums
from common.data import Size, fit

import numpy as np
import pytest
import torch
from PIL import Image

import train_dreambooth_flux_advanced as dreambooth


@pytest.fixture
def world(tiny_model, pictures, tmp_path):
    """Names that stand for paths in the table below."""
    with_picture = ("bare", "badtext", "badjson", "blank", "strange", "list", "phone")
    folders = {name: tmp_path / name for name in ("empty", "broken", *with_picture)}
    for folder in folders.values():
        folder.mkdir()
    for name in with_picture:
        Image.new("RGB", (20, 20), "red").save(folders[name] / "a.png")
    (folders["broken"] / "a.png").write_bytes(b"\x89PNG and then nothing")
    (folders["badtext"] / "a.txt").write_bytes(b"\xff\xfe\xff")
    (folders["badjson"] / "metadata.jsonl").write_text("{oops\n")
    (folders["blank"] / "a.txt").write_text("\n")
    checkpoint = tmp_path / "earlier" / "checkpoint-5"
    checkpoint.mkdir(parents=True)
    state = {"global_step": 5, "seed": "1", "train_batch_size": "4", "rank": "4", "the number of processes": 1}
    (checkpoint / "trainer_state.json").write_text(json.dumps(state))
    (checkpoint / CHECKSUMS).write_text(json.dumps(checksums(checkpoint)))
    shutil.copytree(tiny_model, tmp_path / "fill")
    config = {"_class_name": "FluxTransformer2DModel", "in_channels": 384}
    (tmp_path / "fill" / "transformer" / "config.json").write_text(json.dumps(config))
    (folders["strange"] / "metadata.jsonl").write_text(json.dumps({"file_name": "b.png", "text": "x"}) + "\n")
    (folders["list"] / "metadata.jsonl").write_text(json.dumps({"file_name": "a.png", "text": ["x"]}) + "\n")
    (folders["phone"] / "b.heic").write_bytes(b"")
    for label in ("cats", "dogs"):
        (tmp_path / "labelled" / label).mkdir(parents=True)
        Image.new("RGB", (20, 20), "red").save(tmp_path / "labelled" / label / "a.png")
    (tmp_path / "later" / "checkpoint-9").mkdir(parents=True)
    (tmp_path / "file").write_text("")
    (tmp_path / "argsfile").write_text("--rank 0  # too small\n")
    paths = {
        name: tmp_path / name
        for name in ("nowhere", "earlier", "file", "argsfile", "out", "fill", "later", "labelled")
    }
    return {**folders, **paths, "model": tiny_model, "pictures": pictures, "checkpoint": checkpoint}


# flags that follow a working command, and what the message must say
BAD = [
    ("--rank 0", "--rank/--network_dim: 0 is out of range: it must be at least 1"),
    ("--rank four", "--rank/--network_dim: invalid whole number value: 'four'"),
    ("@{argsfile}", "--rank/--network_dim: 0 is out of range"),
    ("--learning_rate -1", "--learning_rate: -1 is out of range: it must be above 0"),
    ("--learning_rate nan", "--learning_rate: nan is out of range"),
    ("--lora_alpha 0", "--lora_alpha/--network_alpha: 0 is out of range"),
    (
        "--caption_dropout 1.5",
        "--caption_dropout/--caption_dropout_rate: 1.5 is out of range: it must be at least 0 and at most 1",
    ),
    (
        "--caption_dropout 0.2 --caption_dropout_to instance_prompt",
        "--caption_dropout_to instance_prompt needs --instance_prompt",
    ),
    ("--lora_dropout 1", "--lora_dropout: 1 is out of range"),
    ("--max_sequence_length 600", "--max_sequence_length/--t5xxl_max_token_length: 600 is out of range"),
    ("--resolution 40", "--resolution 40 must be a multiple of 16, such as 32"),
    ("--seed -1", "--seed: -1 is out of range"),
    ("--num_train_epochs 0", "--num_train_epochs/--max_train_epochs: 0 is out of range"),
    ("--max_train_steps 0", "--max_train_steps: 0 is out of range"),
    ("--optimizer sgd", "--optimizer/--optimizer_type: invalid choice: 'sgd'"),
    ("--lr_scheduler linnear", "--lr_scheduler: invalid choice: 'linnear'"),
    ("--weighting_scheme best", "--weighting_scheme: invalid choice"),
    ("--timestep_sampling late", "--timestep_sampling: invalid choice"),
    ("--image_interpolation_mode cubic", "--image_interpolation_mode: invalid choice"),
    ("--report_to mlflow9", "--report_to/--log_with: invalid choice"),
    ("--mixed_precision fp8", "--mixed_precision: invalid choice"),
    ("--mixed_precision fp16", "--mixed_precision fp16 needs a GPU: use bf16 or no"),
    ("--prodigy_decouple maybe", "--prodigy_decouple maybe: expected True or False"),
    ("--learning_rat 1", "--learning_rat: no flag has this name; did you mean --learning_rate?"),
    ("--grad 1", "did you mean --gradient_checkpointing or --gradient_accumulation_steps?"),
    ("--nothing_like_it 1", "--nothing_like_it: no flag has this name; --help lists them"),
    ("--gradient_checkpointing photos", "--gradient_checkpointing photos: expected True or False, or nothing"),
    ("photos", "'photos' belongs to no flag"),
    ("--sdpa --loss_type huber --rank 2", "--loss_type huber: the loss is the squared error"),
    ("--unet_lr=1e-4", "--unet_lr 1e-4: here it is --learning_rate"),
    ("--optimizer_type AdamW8bit", "AdamW8bit: give --optimizer adamw --use_8bit_adam"),
    ("--shuffle_caption", "--shuffle_caption: write it into the file that --dataset_config names"),
    ("--optimizer prodigy --learning_rate 1 --use_8bit_adam", "--use_8bit_adam has no effect on --optimizer prodigy"),
    ("--prodigy_beta3 0.9", "--prodigy_beta3 has no effect on --optimizer adamw"),
    ("--timestep_sampling sigmoid --weighting_scheme mode", "--weighting_scheme mode has no effect without"),
    ("--validation_steps 5", "--validation_steps 5 needs --validation_prompt"),
    (
        "--dataset_name some/set",
        "exactly one of --instance_data_dir, --dataset_name, --data_files and",
    ),
    ("--dataset_config_name small", "--dataset_config_name small needs --dataset_name"),
    (
        "--pretrained_model_name_or_path {nowhere}",
        "neither a folder with a FLUX pipeline nor a Hub id",
    ),
    ("--pretrained_model_name_or_path {pictures}", "neither a folder with a FLUX pipeline nor a Hub id"),
    ("--pretrained_model_name_or_path nobody/no-such-model", "neither a folder with a FLUX pipeline nor a Hub id"),
    (
        "--pretrained_model_name_or_path {fill}",
        "holds a FluxTransformer2DModel with 384 input channels, not FLUX.1-dev",
    ),
    ("--adam_beta1 1", "--adam_beta1: 1 is out of range"),
    ("--mode_scale 3", "--mode_scale: 3 is out of range"),
    ("--learning_rate inf", "--learning_rate: inf is out of range"),
    ("--optimizer prodigy", "--learning_rate 0.0001: Prodigy finds the rate itself and wants about 1"),
    ("--lr_scheduler cosine --max_train_steps 300", "--lr_warmup_steps 500 must be less than the 300 steps"),
    ("--rank 1000000000", "less than "),
    ("--resume_from_checkpoint {checkpoint} --output_dir {later}", "holds checkpoint-9, later than {checkpoint}"),
    ("--instance_data_dir {strange} --instance_prompt x", "{strange}/metadata.jsonl: no image b.png in this folder"),
    (
        "--instance_data_dir {list} --instance_prompt x",
        "{list}/a.png: its caption must be text and not empty, not ['x']",
    ),
    ("--instance_data_dir {phone} --instance_prompt x", "{phone}/b.heic: save it as PNG or JPEG, .heic is not read"),
    ("--lora_layers attn.to_z,attn.to_q", "--lora_layers: the transformer has no linear layer attn.to_z"),
    (
        "--output_name x --save_format kohya --lora_layers attn.to_q,x_embedder,norm_out.linear",
        "--save_format kohya: neither diffusers nor sd-scripts reads x_embedder, norm_out.linear in",
    ),
    ("--output_dir {file}", "a file of this name is in the way"),
    (
        "--output_dir {earlier}",
        "holds checkpoint-5 of an earlier run: continue it with",
    ),
    ("--resume_from_checkpoint {nowhere}", "no checkpoint there; use latest, or a checkpoint-N folder"),
    ("--output_dir {earlier} --resume_from_checkpoint latest", "checkpoint-5: seed was 1 there and is 0 now"),
    (
        "--output_dir {earlier} --resume_from_checkpoint checkpoint-5 --train_batch_size 2 --seed 1",
        "checkpoint-5: train_batch_size was 4 there and is 2",
    ),
    ("--output_dir {earlier} --resume_from_checkpoint latest --seed 1 --rank 8", "rank was 4 there and is 8"),
    (
        "--with_prior_preservation --class_prompt x",
        "--with_prior_preservation needs --class_data_dir and --class_prompt",
    ),
    ("--class_prompt x", "--class_data_dir and --class_prompt have no effect without --with_prior_preservation"),
    (
        "--with_prior_preservation --class_prompt x --class_data_dir {file}",
        "--class_data_dir {file}: a file of this name is in the way",
    ),
    (
        "--with_prior_preservation --class_prompt x --class_data_dir {broken}",
        "{broken}/a.png: not a readable image",
    ),
    ("--mixed_precision bf16 --prior_generation_precision fp32", "fp32: the model is loaded in bf16"),
    ("--aspect_ratio_buckets 32;32", "--aspect_ratio_buckets 32;32: expected height,width;height,width"),
    ("--aspect_ratio_buckets 32,40", "--aspect_ratio_buckets: 32,40 must be two multiples of 16"),
    ("--train_text_encoder --train_text_encoder_ti", "exclude each other: choose one"),
    ("--enable_t5_ti", "--enable_t5_ti needs --train_text_encoder_ti"),
    ("--initializer_concept dog", "--initializer_concept needs --train_text_encoder_ti"),
    ("--train_text_encoder_ti --initializer_concept a,b,c", "names 3 concepts for 1 of --token_abstraction"),
    (
        "--train_text_encoder_ti --initializer_concept a --num_new_tokens_per_abstraction 3",
        "--num_new_tokens_per_abstraction has no effect with --initializer_concept",
    ),
    ("--train_text_encoder_ti", "--token_abstraction TOK: in no caption and not in --instance_prompt"),
    (
        "--train_text_encoder_ti --instance_prompt TOK",
        "--token_abstraction TOK: in no caption; --instance_prompt has it, but every image has a caption of its own",
    ),
    ("--train_transformer_frac 0", "leaves nothing to train without --train_text_encoder_ti"),
    (
        "--train_transformer_frac 0 --train_text_encoder_ti --train_text_encoder_ti_frac 0",
        "leaves nothing to train without --train_text_encoder_ti",
    ),
    ("--train_text_encoder_ti_frac 0.7", "--train_text_encoder_ti_frac 0.7 needs --train_text_encoder_ti"),
    ("--token_abstraction ,", "--token_abstraction ',': one word, or several different ones"),
    ("--train_text_encoder_ti --token_abstraction A,A", "--token_abstraction 'A,A': one word, or several different"),
    ("--train_text_encoder_ti --token_abstraction cir,circle", "--token_abstraction cir: in no caption"),
    ("--train_text_encoder_frac 0.5", "--train_text_encoder_frac 0.5 needs --train_text_encoder"),
    ("--train_text_encoder_ti_frac 1.5", "--train_text_encoder_ti_frac: 1.5 is out of range"),
    (
        "--final_validation_prompt x --skip_final_inference",
        "--final_validation_prompt has no effect with --skip_final_inference",
    ),
    ("--hub_model_id me/it", "--hub_token and --hub_model_id have no effect without --push_to_hub"),
    ("--instance_data_dir {nowhere}", "--instance_data_dir {nowhere}: no such folder"),
    ("--instance_data_dir {empty}", "--instance_data_dir {empty}: no images (.png, "),
    ("--instance_data_dir {bare}", "no caption for {bare}/a.png: give --instance_prompt, captions in .txt files"),
    ("--instance_data_dir {broken} --instance_prompt x", "{broken}/a.png: not a readable image"),
    ("--instance_data_dir {badtext} --instance_prompt x", "{badtext}/a.txt: not UTF-8 text"),
    ("--instance_data_dir {blank}", "{blank}/a.png: its caption must be text and not empty"),
    ("--instance_data_dir {badjson} --instance_prompt x", "{badjson}/metadata.jsonl: each line must be JSON"),
    ("--caption_column prompt", "--caption_column prompt: no {pictures}/metadata.jsonl that has columns"),
]


@pytest.fixture
def no_models(monkeypatch):
    """Loading a model is an error."""

    def load(*args, **kwargs):
        raise AssertionError("a model was loaded")

    for name in ("load_text_encoders", "load_vae", "load_transformer"):
        monkeypatch.setattr(dreambooth, name, load)


@pytest.mark.parametrize(("flags", "message"), BAD, ids=[flags for flags, _ in BAD])
def test_bad_input_is_one_clear_error(train, world, no_models, capsys, flags, message):
    command = (
        "--pretrained_model_name_or_path {model} --instance_data_dir {pictures} --output_dir {out} --report_to none"
    )
    before = sorted(world["out"].parent.rglob("*"))
    with pytest.raises(SystemExit) as stop:
        train("train_dreambooth_flux_advanced", *f"{command} {flags}".format(**world).split())
    error = capsys.readouterr().err.splitlines()[-1]
    assert stop.value.code == 2
    assert message.format(**world) in error
    assert ": error: " in error
    assert sorted(world["out"].parent.rglob("*")) == before


def test_all_problems_come_in_one_message(world, no_models, train, capsys):
    flags = "--pretrained_model_name_or_path {nowhere} --validation_steps 3 --resolution 40 --output_dir {file}"
    with pytest.raises(SystemExit):
        train("train_dreambooth_flux_advanced", *flags.format(**world).split())
    error = capsys.readouterr().err.split("error:")[1]
    for problem in ("exactly one of", "nor a Hub id", "needs --validation_prompt", "multiple of 16", "in the way"):
        assert problem in error


def test_a_missing_dataset_or_column_is_named(world, no_models, train, capsys):
    flags = "--pretrained_model_name_or_path {model} --output_dir {out} --dataset_name".format(**world).split()
    for extra, message in (
        ([world["nowhere"]], "cannot be loaded"),
        ([world["bare"], "--image_column", "photo"], "no column photo; it has image"),
        ([world["labelled"], "--image_column", "label"], "column label holds no images"),
        ([world["bare"], "--caption_column", "words"], "no column words; it has image"),
    ):
        with pytest.raises(SystemExit) as stop:
            train("train_dreambooth_flux_advanced", *flags, *extra)
        assert stop.value.code == 2
        assert message in capsys.readouterr().err


def test_switches_are_understood_in_old_and_new_spelling(world):
    command = (
        "--pretrained_model_name_or_path {model} --instance_data_dir {pictures} --optimizer prodigy --learning_rate 1"
    )
    parse = lambda flags: dreambooth.parse_args(f"{command} {flags}".format(**world).split())  # noqa: E731
    assert parse("").prodigy_decouple is True
    for flags in ("--no-prodigy_decouple", "--prodigy_decouple False", "--prodigy_decouple=false"):
        assert parse(flags).prodigy_decouple is False
    for flags in ("--prodigy_decouple", "--prodigy_decouple True"):
        assert parse(flags).prodigy_decouple is True


def test_flags_are_switched_on_and_off_as_in_diffusers(world):
    command = "--pretrained_model_name_or_path {model} --instance_data_dir {pictures} --cache_latents".format(**world)
    parse = lambda flags: dreambooth.parse_args(f"{command} {flags}".split())  # noqa: E731
    assert parse("--gradient_checkpointing True --rank 3").gradient_checkpointing is True
    args = parse("--cache_latents False --gradient_checkpointing=false")
    assert args.cache_latents is False
    assert args.gradient_checkpointing is False


def test_nearest_exact_is_torchs():
    image = Image.effect_noise((37, 37), 80).convert("RGB")
    pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1)[None].float()
    resized = torch.nn.functional.interpolate(pixels, (16, 16), mode="nearest-exact")[0].permute(1, 2, 0)
    assert np.array_equal(np.asarray(fit(image, Size(16, 16), "nearest_exact")), resized.numpy())


def test_a_file_of_flags(world, tmp_path):
    file = tmp_path / "run.args"
    file.write_text('# a comment\n--rank 8 --instance_prompt "a photo of sks dog"  # the prompt\n')
    model = ["--pretrained_model_name_or_path", str(world["model"]), "--instance_data_dir", str(world["pictures"])]
    args = dreambooth.parse_args([*model, f"@{file}", "--rank", "16"])
    assert (args.rank, args.instance_prompt) == (16, "a photo of sks dog")


def test_as_a_command_the_message_is_short(run_program, capsys):
    with pytest.raises(SystemExit) as stop:
        run_program("train_dreambooth_flux_advanced.py", "--rank", 0)
    assert stop.value.code == 2
    lines = capsys.readouterr().err.splitlines()
    assert lines
    assert len(lines) <= 3


def test_a_file_of_flags_may_begin_with_a_mark(tmp_path):
    (tmp_path / "run.args").write_text("--count 3\n", "utf-8-sig")
    parser = Parser()
    parser.add_argument("--count", type=int)
    assert parser.parse_args([f"@{tmp_path / 'run.args'}"]).count == 3
