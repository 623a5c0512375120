"""Bad input to train_twinflow.py: one clear message, exit code 2, before any model is loaded, and nothing written."""

import json
import shutil

from common.checkpoints import CHECKSUMS, checksums

import pytest
from PIL import Image

import train_twinflow
from train_twinflow import Backbone


@pytest.fixture
def world(tiny_model, pictures, tmp_path):
    """Names that stand for paths in the table below."""
    names = (
        "empty",
        "bare",
        "blank",
        "badtext",
        "broken",
        "phone",
        "parquet",
        "remote",
        "blockless",
        "fill",
        "authors",
    )
    folders = {name: tmp_path / name for name in names}
    for name, folder in folders.items():
        folder.mkdir()
        if name in ("bare", "blank", "badtext", "phone"):
            Image.new("RGB", (20, 20), "red").save(folder / "a.png")
    (folders["blank"] / "a.txt").write_text("\n \n")
    (folders["badtext"] / "a.txt").write_bytes(b"\xff\xfe\xff")
    (folders["broken"] / "a.png").write_bytes(b"\x89PNG and then nothing")
    (folders["broken"] / "a.txt").write_text("a caption")
    (folders["phone"] / "b.heic").write_bytes(b"")
    (folders["remote"] / "config.json").write_text('{"model_type": "internvl_chat"}')  # InternVL3-2B's own form
    (folders["parquet"] / "a.parquet").write_bytes(b"PAR1 not really")
    config = {
        "_class_name": "FluxTransformer2DModel",
        "num_layers": 0,
        "num_single_layers": 0,
        "guidance_embeds": True,
    }
    (folders["blockless"] / "transformer").mkdir()
    (folders["blockless"] / "transformer" / "config.json").write_text(json.dumps(config))
    shutil.copytree(folders["blockless"] / "transformer", folders["fill"] / "transformer")
    (folders["fill"] / "model_index.json").write_text('{"_class_name": "FluxFillPipeline"}')
    (folders["authors"] / "transformer").mkdir()
    config = '{"_class_name": "ZImageTransformer2DModelWrapper"}'
    (folders["authors"] / "transformer" / "config.json").write_text(config)
    (tmp_path / "prompts").write_text("a red circle\n")
    (tmp_path / "noprompts").write_text("\n")
    (tmp_path / "file").write_text("")
    checkpoint = tmp_path / "earlier" / "checkpoint-5"
    checkpoint.mkdir(parents=True)
    state = {"global_step": 5, "enhanced_ratio": "0.5", "the number of processes": 1}
    (checkpoint / "trainer_state.json").write_text(json.dumps(state))
    (checkpoint / CHECKSUMS).write_text(json.dumps(checksums(checkpoint)))
    paths = {name: tmp_path / name for name in ("nowhere", "prompts", "noprompts", "file", "earlier", "out")}
    return {**folders, **paths, "model": tiny_model, "pictures": pictures}


PICTURES, PROMPTS = "--train_data_dir {pictures}", "--image_free --recipe image-free --prompts_file {prompts}"
# flags, and what the message must say
BAD = [
    ("--train_batch_size 3", "--train_batch_size 3: each batch holds all sample types of --probs, at least 4"),
    (
        "--probs e2e=1,mul=1,any=1,adv=1,one=1",
        "--train_batch_size 4: each batch holds all sample types of --probs, at least 5",
    ),
    ("--probs e2e=1,two=1", "--probs: 'two' is none of e2e, mul, any, adv, one"),
    ("--probs e2e=-1", "--probs: -1 is out of range"),
    ("--probs e2e=0", "--probs: e2e=0 leaves no share above 0"),
    ("--enhanced_ratio 1", "--enhanced_ratio 1 with --ema_decay_rate 0.99: a teacher that learns its own guidance"),
    ("--enhanced_ratio 1.5 --ema_decay_rate 0", "or --ema_decay_rate 1"),
    ("--enhanced_range 0.8 0.2", "--enhanced_range 0.8 0.2: give the smaller time first"),
    ("--estimate_order 1", "--estimate_order 1 jumps to the end in one step, which only one in --probs trains"),
    ("--probs e2e=1,mul=1,adv=1", "--estimate_order 2 takes steps between any times: --probs needs any=1"),
    ("--estimate_order 0", "--estimate_order 0 trains nothing on e2e, any of --probs"),
    ("--recipe flow-matching --estimate_order 2 --probs any=1", "--consistc_ratio 0 is flow matching"),
    ("--estimate_order 9", "--estimate_order: 9 is out of range"),
    ("--ema_decay_rate 1.1", "--ema_decay_rate: 1.1 is out of range"),
    ("--time_dist_ctrl 1 1 1.5", "--time_dist_ctrl: c, the largest time, must be at most 1, not 1.5"),
    ("--image_free", "--image_free needs --prompts_file and no images, not --train_data_dir"),
    ("--image_free", "--image_free needs --ema_decay_rate 1 and --enhanced_ratio above 0"),
    ("--prompts_file {prompts}", "exactly one of --train_data_dir, --dataset_name and --data_files is needed"),
    ("--dataset_name x", "exactly one of --train_data_dir, --dataset_name and --data_files is needed"),
    ("--dataset_name x --instance_data_dir {pictures}", "is needed, to which --instance_data_dir adds a subject"),
    ("--dataset_config_name x", "--dataset_config_name x needs --dataset_name"),
    ("--model_type dalle", "--model_type: invalid choice: 'dalle'"),
    (
        "--model_type sd3",
        "holds a FluxTransformer2DModel, --model_type sd3 a SD3Transformer2DModel: set --model_type flux",
    ),
    (
        "--pretrained_model_name_or_path {fill}",
        "{fill}: its model_index.json names a FluxFillPipeline, --model_type flux is a FluxPipeline",
    ),
    (
        "--pretrained_model_name_or_path {authors} --model_type z-image",
        "holds a ZImageTransformer2DModelWrapper, --model_type z-image a ZImageTransformer2DModel",
    ),
    ("--model_type openuni", "--openuni_checkpoint is needed for --model_type openuni"),
    ("--openuni_llm x", "--openuni_llm is only for --model_type openuni"),
    ("--model_type openuni --openuni_llm x --openuni_checkpoint {nowhere}", "{nowhere}: no such file"),
    ("--model_type openuni --openuni_llm {nowhere}", "--openuni_llm {nowhere}: no model there"),
    (
        "--model_type openuni --openuni_llm {remote}",
        "of type internvl_chat; transformers reads OpenGVLab/InternVL3-2B-hf",
    ),
    ("--max_sequence_length 513", "--max_sequence_length 513: flux takes at most 512"),
    ("--model_type qwenimage-edit", "--model_type qwenimage-edit needs --reference_data_dir"),
    (
        "--model_type qwenimage-edit --reference_data_dir {pictures} --train_data_dir {pictures} {bare}",
        "--train_data_dir: qwenimage-edit takes one folder",
    ),
    ("--model_type qwenimage-edit --train_data_dir {parquet}", "--model_type qwenimage-edit needs --reference_column"),
    ("--reference_data_dir {pictures}", "--reference_data_dir has no effect here: leave it out"),
    (
        "--model_type qwenimage-edit --reference_data_dir {pictures}/../{pictures.name}",
        "--reference_data_dir {pictures}/../{pictures.name} is --train_data_dir, too",
    ),
    (
        "--dataset_name x --model_type qwenimage-edit --reference_column image",
        "--reference_column image is --image_column, too",
    ),
    ("--resolution 40", "--resolution 40 must be a multiple of 16, such as 32"),
    (
        "--lora_layers attn.to_q",
        "--lora_layers, --lora_dropout and --use_dora have no effect on --training full",
    ),
    ("--training lora --lora_layers attn.to_z", "--lora_layers: the transformer has no linear layer attn.to_z"),
    ("--model_type flux3 --target_time_init copy", "--target_time_init copy: FLUX.3 adds the second embedding"),
    ("--training lora --target_time_init copy", "--target_time_init copy has no effect on --training lora"),
    ("--fsdp --optimizer prodigy --learning_rate 1", "--optimizer prodigy does not work with --fsdp"),
    ("--fsdp --use_8bit_adam", "--use_8bit_adam does not work with --fsdp"),
    ("--training lora --fsdp --quantize_base nf4", "--quantize_base nf4 does not work with --fsdp"),
    ("--quantize_base int8", "--quantize_base int8 is for --training lora"),
    ("--compile --pretrained_model_name_or_path {blockless}", "{blockless}: FluxTransformer2DModel has no repeated"),
    ("--fsdp", "--fsdp needs more than one process: accelerate launch --num_processes N"),
    ("--validation_samplers few", "--validation_samplers: few: expected style:steps with a style of few, any, mul"),
    ("--validation_steps 5", "--validation_steps 5 needs --validation_prompt"),
    ("--lr_scheduler cosine --max_train_steps 300", "--lr_warmup_steps 500 must be less than the 300 steps"),
    ("--optimizer prodigy", "--learning_rate 0.0001: Prodigy finds the rate itself"),
    ("--mixed_precision fp16", "--mixed_precision fp16 needs a GPU"),
    ("--mixed_precision fp16 --model_type qwenimage", "fp16 does not work with qwenimage"),
    ("--rank 1000000000 --training lora", "less than "),
    ("--output_dir {file}", "a file of this name is in the way"),
    ("--output_dir {earlier}", "holds checkpoint-5 of an earlier run: continue it with"),
    ("--output_dir {earlier} --resume_from_checkpoint latest", "enhanced_ratio was 0.5 there and is 0.8 now"),
    ("--pretrained_model_name_or_path {nowhere}", "neither a folder with a pipeline nor a Hub id like black-forest"),
    ("--train_data_dir {nowhere}", "--train_data_dir {nowhere}: no such folder"),
    ("--train_data_dir {empty}", "--train_data_dir {empty}: no images"),
    ("--train_data_dir {pictures} {empty}", "--train_data_dir {empty}: no images"),
    ("--train_data_dir {bare}", "no caption for {bare}/a.png: write it in a .txt file beside the image"),
    ("--aspect_ratio_buckets 32;32", "--aspect_ratio_buckets 32;32: expected height,width;height,width"),
    ("--aspect_ratio_buckets 32,40", "--aspect_ratio_buckets: 32,40 must be two multiples of 16"),
    ("--aspect_ratio_buckets 160000,32", "at most 8192"),
    ("--validation_width 40 --validation_prompt x", "--validation_width 40 must be a multiple of 16, such as 32"),
    ("--validation_height 64", "--validation_height 64 needs --validation_prompt"),
    ("--train_data_dir {blank}", "{blank}/a.png: its caption must be text and not empty"),
    ("--train_data_dir {badtext}", "{badtext}/a.txt: not UTF-8 text"),
    ("--train_data_dir {broken}", "{broken}/a.png: not a readable image"),
    ("--train_data_dir {phone}", "{phone}/b.heic: save it as PNG or JPEG, .heic is not read"),
    ("--train_data_dir {parquet}", "--train_data_dir {parquet}: cannot be loaded"),
    ("--instance_data_dir {nowhere}", "--instance_data_dir {nowhere}: no such folder"),
    ("--instance_data_dir {empty}", "--instance_data_dir {empty}: no images"),
    ("--instance_data_dir {bare}", "no caption for {bare}/a.png: give --instance_prompt"),
    ("--instance_data_dir {broken} --instance_prompt x", "{broken}/a.png: not a readable image"),
    ("--instance_data_dir {pictures}", "--instance_data_dir {pictures} is --train_data_dir, too"),
    ("--instance_data_dir {bare} --instance_share 1", "--instance_share: 1 is out of range"),
    (f"{PROMPTS} --instance_data_dir {{bare}}", "--image_free trains on the model's own images"),
    (
        "--streaming --max_train_steps 5 --instance_data_dir {bare}",
        "--instance_data_dir {bare} does not go with --streaming",
    ),
    (
        "--model_type qwenimage-edit --instance_data_dir {bare}",
        "--instance_data_dir {bare}: qwenimage-edit needs images to edit",
    ),
    (f"{PROMPTS} --prompts_file {{nowhere}}", "--prompts_file {nowhere}: no such file"),
    (f"{PROMPTS} --prompts_file {{noprompts}}", "{noprompts}: no prompts in it"),
]


@pytest.mark.parametrize(("flags", "message"), BAD, ids=[f"{i} {flags}" for i, (flags, _) in enumerate(BAD)])
def test_bad_input_is_one_clear_error(train, world, monkeypatch, capsys, flags, message):
    def load(*args, **kwargs):
        raise AssertionError("a model was loaded")

    monkeypatch.setattr(train_twinflow, "load_model", load)
    monkeypatch.setattr(Backbone, "load_prompt_encoder", load)
    source = "" if PROMPTS in flags else PICTURES
    command = f"--pretrained_model_name_or_path {{model}} {source} --output_dir {{out}} --report_to none {flags}"
    before = sorted(world["out"].parent.rglob("*"))
    with pytest.raises(SystemExit) as stop:
        train("train_twinflow", *command.format(**world).split())
    error = capsys.readouterr().err.split("error:")[-1]
    assert stop.value.code == 2
    assert message.format(**world) in error
    assert sorted(world["out"].parent.rglob("*")) == before
