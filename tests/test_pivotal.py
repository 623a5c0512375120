"""train_dreambooth_flux_advanced.py: text encoders, new tokens, prior preservation, buckets."""

import itertools
import json
import os
import random
import shlex
import shutil
import subprocess
import sys
from operator import methodcaller
from pathlib import Path

from common import tracking, validation
from common.data import Size, nearest_bucket

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from conftest import ROOT
from diffusers import FluxPipeline
from PIL import Image
from safetensors.torch import load_file, save_file
from test_train_dreambooth import LORA, SCRIPT, assert_equal, quickstart_flags, run_snippet, score_before, toy_pipeline

import train_dreambooth_flux_advanced as dreambooth
from examples.dreambooth.generate import load_pipeline
from examples.toy.compare import HERE, evaluate, evaluate_other_words, sample
from examples.toy.world import COLOR_NAMES, Scene, all_right, draw, random_shape, score_subject


MODES = {
    "CLIP LoRA": ["--train_text_encoder", "--train_text_encoder_frac", "0.5", "--text_encoder_lr", "1e-3"],
    "pivotal CLIP": ["--train_text_encoder_ti", "--text_encoder_lr", "1e-2"],
    "pivotal CLIP+T5": ["--train_text_encoder_ti", "--enable_t5_ti", "--text_encoder_lr", "1e-2"],
    "pivotal, Prodigy": ["--train_text_encoder_ti", "--optimizer", "prodigy", "--learning_rate", "1"],
    "transformer first": [
        "--train_text_encoder_ti",
        "--train_text_encoder_ti_frac",
        "1",
        "--train_transformer_frac",
        "0.5",
    ],
    "textual inversion": [
        *("--train_text_encoder_ti", "--enable_t5_ti", "--train_transformer_frac", "0"),
        *("--train_text_encoder_ti_frac", "1", "--text_encoder_lr", "1e-2"),
    ],
}


@pytest.fixture
def flags(tiny_model, pictures):
    return [
        *("--pretrained_model_name_or_path", tiny_model, "--instance_data_dir", pictures, "--resolution", 32),
        *("--max_sequence_length", 16, "--train_batch_size", 2, "--rank", 2, "--learning_rate", 1e-3),
        *("--report_to", "none", "--max_train_steps", 6, "--cache_latents", "--token_abstraction", "circle"),
    ]


def results(folder):
    """All tensors a run saved."""
    files = [file for file in (folder / LORA, folder / f"{folder.name}_emb.safetensors") if file.exists()]
    return {f"{file.name[-16:]}/{key}": value for file in files for key, value in load_file(file).items()}


def new_prompt_encoder(args):
    """(prompt encoder, embedding handler) with new tokens in training, as `main` makes them."""
    pipeline = dreambooth.load_text_encoders(args, torch.float32)
    embedding_handler = dreambooth.add_new_tokens(pipeline, args)
    encoder = dreambooth.PromptEncoder(
        Accelerator(cpu=True),
        pipeline,
        torch.float32,
        max_sequence_length=args.max_sequence_length,
        folder=args.output_dir / "encoded",
        trained=set(embedding_handler.embeddings),
        rewrite_prompt=embedding_handler.replace_abstractions,
    )
    return encoder, embedding_handler


class Killed(Exception):
    pass


STOPS = {"before": 2, "at": 3, "after": 4}
QUICK_STOPS = [("pivotal CLIP+T5", "at"), ("textual inversion", "before"), ("transformer first", "after")]
SLOW_STOPS = [case for case in itertools.product(MODES, STOPS) if case not in QUICK_STOPS]


@pytest.mark.parametrize(
    ("mode", "when"), QUICK_STOPS + [pytest.param(*case, marks=pytest.mark.slow) for case in SLOW_STOPS]
)
def test_resume_around_the_pivot_is_exact(train, flags, tmp_path, monkeypatch, mode, when):
    stop = STOPS[when]
    flags = [*flags, *MODES[mode], "--checkpointing_steps", 1]
    train(SCRIPT, *flags, "--output_dir", tmp_path / "a" / "run")
    honest = dreambooth.log_step

    def killed(accelerator, progress_bar, metrics, step, logs):
        honest(accelerator, progress_bar, metrics, step, logs)
        if step == stop + 1:
            raise Killed

    monkeypatch.setattr(dreambooth, "log_step", killed)
    with pytest.raises(Killed):
        train(SCRIPT, *flags, "--output_dir", tmp_path / "b" / "run")
    monkeypatch.setattr(dreambooth, "log_step", honest)
    assert (tmp_path / "b" / "run" / f"checkpoint-{stop}").is_dir()
    checkpoint = tmp_path / "b" / "run" / f"checkpoint-{stop}"
    train(SCRIPT, *flags, "--output_dir", tmp_path / "b" / "elsewhere", "--resume_from_checkpoint", checkpoint)
    assert_equal(results(tmp_path / "a" / "run"), results(tmp_path / "b" / "elsewhere"))


@pytest.mark.parametrize("mode", MODES)
def test_what_is_trained_and_saved(train, flags, tmp_path, mode):
    train(SCRIPT, *flags, *MODES[mode], "--output_dir", tmp_path / "run")
    saved = results(tmp_path / "run")
    lora = (
        {key.split(".")[0] for key in load_file(tmp_path / "run" / LORA)}
        if (tmp_path / "run" / LORA).exists()
        else set()
    )
    assert lora == {
        "CLIP LoRA": {"transformer", "text_encoder"},
        "textual inversion": set(),
    }.get(mode, {"transformer"})
    rows = {key.split("/")[1]: value.shape for key, value in saved.items() if "_emb" in key}
    assert set(rows) == {"CLIP LoRA": set()}.get(
        mode, {"clip_l", "t5"} if "--enable_t5_ti" in MODES[mode] else {"clip_l"}
    )
    assert all(shape == (2, 32) for shape in rows.values())


def test_frozen_encoders_never_run_in_a_step(train, flags, tmp_path, monkeypatch):
    calls = []
    honest = dreambooth.PromptEncoder.encode_with
    monkeypatch.setattr(
        dreambooth.PromptEncoder,
        "encode_with",
        lambda self, encoder_name, prompts: calls.append(encoder_name) or honest(self, encoder_name, prompts),
    )
    train(SCRIPT, *flags, *MODES["pivotal CLIP"], "--output_dir", tmp_path)
    prompts = calls.count("t5")
    assert calls[:prompts] == ["t5"] * prompts
    assert calls[prompts:].count("clip_l") == 3 + prompts  # three steps, then once per prompt at the pivot


def test_the_pivot_comes_within_one_epoch_and_ends_all_training_of_the_rows(train, flags, tmp_path, monkeypatch):
    rows, clipped, reduced, unsynced = [], [], [], []
    handler, clip = dreambooth.TokenEmbeddingsHandler, Accelerator.clip_grad_norm_
    retract = handler.retract_embeddings
    reduce, no_sync = dreambooth.average_gradients, Accelerator.no_sync
    monkeypatch.setattr(
        handler,
        "retract_embeddings",
        lambda self, taken: retract(self, taken) or rows.append(self.parameters()[0].detach().clone()),
    )
    monkeypatch.setattr(
        Accelerator,
        "clip_grad_norm_",
        lambda self, params, limit: (
            clipped.append(sum(p.grad is not None for p in params)) or clip(self, params, limit)
        ),
    )
    monkeypatch.setattr(dreambooth, "average_gradients", lambda *args: reduced.append(len(rows)) or reduce(*args))
    monkeypatch.setattr(Accelerator, "no_sync", lambda self, model: unsynced.append(model) or no_sync(self, model))
    steps = ("--repeats", 4, "--train_batch_size", 1, "--gradient_accumulation_steps", 2, "--max_train_steps", 6)
    run = tmp_path / "run"
    train(SCRIPT, *flags, *steps, *MODES["pivotal CLIP"], "--output_dir", run)
    assert len(rows) == 3  # half of the steps of what is less than one epoch
    assert not torch.equal(rows[0], rows[2])
    assert torch.equal(rows[2], results(run)["_emb.safetensors/clip_l"])  # neither trained nor rescaled since
    assert clipped == [clipped[-1] + 1] * 3 + [clipped[-1]] * 3  # the rows' last gradient is gone from the norm
    assert len(reduced) == 6  # once per update, though there are two micro-steps
    assert len(unsynced) == 6


def test_prompts_keep_their_marks_and_the_encoders_have_no_dropout(tiny_model, tmp_path, pictures, monkeypatch):
    args = dreambooth.parse_args(
        [
            *("--pretrained_model_name_or_path", str(tiny_model), "--instance_data_dir", str(pictures)),
            *("--resolution", "32", "--max_sequence_length", "16", "--output_dir", str(tmp_path / "run")),
            *("--train_text_encoder_ti", "--enable_t5_ti", "--token_abstraction", "circle"),
        ]
    )
    encoder, _ = new_prompt_encoder(args)
    seen = {}
    for name, model in encoder.encoders.items():
        model.register_forward_pre_hook(lambda _, inputs, name=name: seen.update({name: inputs[0][0].tolist()}))
    encoder.encode_prompts(["a red circle"])
    clip, t5 = encoder.pipeline.tokenizer, encoder.pipeline.tokenizer_2
    assert seen["clip_l"][0] == clip.bos_token_id
    assert clip.eos_token_id in seen["clip_l"]
    assert t5.eos_token_id in seen["t5"]
    modules = [module for model in encoder.encoders.values() for module in model.modules()]
    assert not any(module.training for module in modules if not isinstance(module, dreambooth.ExtendedEmbedding))


def test_only_new_rows_change(train, flags, tmp_path, monkeypatch, tiny_pipeline):
    encoders = []
    honest = dreambooth.PromptEncoder.freeze

    def freeze(self, prompts, **keep):
        extended = {name: encoder.get_input_embeddings() for name, encoder in self.encoders.items()}
        encoders.append({k: (e.embedding.weight.clone(), e.new_rows.clone()) for k, e in extended.items()})
        honest(self, prompts, **keep)

    monkeypatch.setattr(dreambooth.PromptEncoder, "freeze", freeze)
    train(SCRIPT, *flags, *MODES["pivotal CLIP+T5"], "--output_dir", tmp_path)
    tables = {"clip_l": tiny_pipeline.text_encoder, "t5": tiny_pipeline.text_encoder_2}
    for kind, (table, rows) in encoders[0].items():
        assert torch.equal(table, tables[kind].get_input_embeddings().weight)
        assert torch.equal(rows, results(tmp_path)[f"_emb.safetensors/{kind}"])


@pytest.mark.parametrize("average", [[], pytest.param(["--use_ema"], marks=pytest.mark.slow)])
def test_the_files_alone_draw_the_last_validation_image(train, flags, tmp_path, monkeypatch, tiny_model, average):
    import numpy as np

    drawn = []
    honest = validation.image_grid
    monkeypatch.setattr(validation, "image_grid", lambda a, *b, **c: drawn.append(a) or honest(a, *b, **c))
    for mode in ("pivotal CLIP+T5", "textual inversion", "CLIP LoRA"):
        run = tmp_path / mode.replace(" ", "_")
        shown = ("--validation_prompt", "a circle on the left", "--num_validation_images", 1)
        train(SCRIPT, *flags, *MODES[mode], *shown, *average, "--output_dir", run)
        pipe = FluxPipeline.from_pretrained(tiny_model)
        if (run / LORA).exists():
            pipe.load_lora_weights(run, weight_name=LORA)
        prompt = "a circle on the left"
        if mode != "CLIP LoRA":
            pipe.text_encoder.eos_token_id = pipe.tokenizer.eos_token_id
            state_dict = load_file(run / f"{run.name}_emb.safetensors")
            tokens = ["<s0>", "<s1>"]
            pipe.load_textual_inversion(
                state_dict["clip_l"], token=tokens, text_encoder=pipe.text_encoder, tokenizer=pipe.tokenizer
            )
            pipe.load_textual_inversion(
                state_dict["t5"], token=tokens, text_encoder=pipe.text_encoder_2, tokenizer=pipe.tokenizer_2
            )
            prompt = prompt.replace("circle", "<s0><s1>")
        image = pipe(
            prompt, height=32, width=32, max_sequence_length=16, generator=torch.Generator().manual_seed(0)
        ).images[0]
        difference = np.abs(np.asarray(image, int) - np.asarray(drawn[-1][0], int)).max()
        assert difference <= 2, mode


def test_clip_pools_in_the_cards_snippet_as_in_training(tiny_model, tmp_path, pictures):
    flags = ["--pretrained_model_name_or_path", tiny_model, "--instance_data_dir", pictures, "--output_dir", tmp_path]
    flags += ["--train_text_encoder_ti", "--token_abstraction", "circle"]
    args = dreambooth.parse_args([str(flag) for flag in flags])
    encoder, embedding_handler = new_prompt_encoder(args)
    pooled = []
    clip, line = encoder.encoders["clip_l"], "pipeline.text_encoder.eos_token_id = pipeline.tokenizer.eos_token_id"
    end = encoder.pipeline.tokenizer.eos_token_id
    assert clip.config.eos_token_id == 2
    assert clip.eos_token_id == end
    for args.pool_at_eos, clip.eos_token_id in ((False, 2), (True, end)):  # an older run that goes on, and a new one
        dreambooth.save_model_card(args, torch.float32, embedding_handler, "a circle", "run_emb.safetensors")
        assert (line in (tmp_path / "README.md").read_text()) == args.pool_at_eos
        pooled.append(encoder.encode_with("clip_l", ["a circle", "a circle on the left"]))
    last_new_token, end_of_prompt = ((a - b).abs().max() for a, b in pooled)
    assert last_new_token < 1e-6
    assert end_of_prompt > 1e-3


@pytest.mark.parametrize("key", [{}, {"pool_at_eos": True}])
def test_an_older_run_is_drawn_and_continued_with_the_pooling_it_was_trained_with(tiny_model, tmp_path, pictures, key):
    flags = ["--pretrained_model_name_or_path", tiny_model, "--instance_data_dir", pictures, "--output_dir", tmp_path]
    flags += ["--train_text_encoder_ti", "--token_abstraction", "circle", "--train_transformer_frac", 0]
    args = dreambooth.parse_args([str(flag) for flag in flags])
    new_prompt_encoder(args)[1].save_embeddings(tmp_path / "run_emb.safetensors")
    record = {name: value for name, value in vars(args).items() if name != "pool_at_eos"}
    (tmp_path / "args.json").write_text(json.dumps({"args": record | key}, default=str))
    pipeline, abstractions = load_pipeline(tmp_path)
    assert abstractions == {"circle": "<s0><s1>"}
    assert pipeline.text_encoder.eos_token_id == (pipeline.tokenizer.eos_token_id if key else 2)
    (tmp_path / "checkpoint-1").mkdir()
    state = {"global_step": 1} | {name: str(value) for name, value in key.items()}
    (tmp_path / "checkpoint-1" / "trainer_state.json").write_text(json.dumps(state))
    assert dreambooth.pools_at_eos(args, tmp_path / "checkpoint-1") == bool(key)


def test_words_are_replaced_where_they_stand_alone(tiny_model, pictures):
    replace = dreambooth.replace_words
    assert replace("TOK in TOKYO, TOK's TOKs", {"TOK": "<s0>"}) == "<s0> in TOKYO, <s0>'s TOKs"
    assert replace("a man, a woman, mañana", {"man": "<s0>", "ma": "<s1>"}) == "a <s0>, a woman, mañana"
    assert replace("一张TOK的照片", {"TOK": "<s0>"}) == "一张<s0>的照片"
    assert replace("x<dog>y", {"<dog>": "<s0>"}) == "x<s0>y"


def test_a_word_within_others_or_in_another_case_is_no_abstraction(tiny_model, tmp_path, pictures, capsys):
    folder = shutil.copytree(pictures, tmp_path / "data")
    flags = ["--pretrained_model_name_or_path", tiny_model, "--instance_data_dir", folder, "--train_text_encoder_ti"]
    flags += ["--output_dir", tmp_path / "run"]
    args = dreambooth.parse_args([str(flag) for flag in flags])
    for caption in ("a street in TOKYO", "a tok icon"):
        for path in folder.glob("*.txt"):
            path.write_text(caption)
        (problem,) = dreambooth.find_examples(args)[1]
        assert "--token_abstraction TOK: in no caption" in problem
        assert caption in problem
    (folder / "0.txt").write_text("a TOK icon")
    examples, problems = dreambooth.find_examples(args)
    assert not problems
    _, embedding_handler = new_prompt_encoder(args)
    told = dreambooth.describe_run(args, examples, [], [], embedding_handler, [], 1)
    assert "tok" in told["no tokens"]
    assert "4 times" in told["no tokens"]


BAD_DRAWING = [
    ("nowhere", "nowhere: no such file"),
    ("gone", "pytorch_lora_weights.safetensors: no such file"),
    ("influxedit", "a run of another trainer"),
    ("bare.safetensors", "--pretrained_model_name_or_path is needed"),
    ("cut.safetensors", "not a readable LoRA file"),
    ("run --size 0 0", "0 is out of range"),
    ("run --size 24 32", "must be multiples of 16"),
    ("run --seed -1", "-1 is out of range"),
    ("tokens", "which has the new tokens"),
    ("single", "give --pretrained_model_name_or_path, such as"),
]


@pytest.fixture
def runs(tmp_path, monkeypatch):
    """Folders of runs in the working folder, without models."""
    from examples.dreambooth.generate import WITHOUT_RUN

    monkeypatch.chdir(tmp_path)
    tensors = {"transformer.x.lora_A.weight": torch.zeros(1, 1)}
    record = WITHOUT_RUN | {"pretrained_model_name_or_path": "nothing/here", "token_abstraction": "TOK"}
    records = {
        "gone": record,
        "run": record,
        "tokens": record | {"train_text_encoder_ti": True},
        "single": record | {"pretrained_model_name_or_path": "flux1-dev.safetensors"},
        "influxedit": {"mode": "edit"},
    }
    for name, flags in records.items():
        Path(name).mkdir()
        Path(name, "args.json").write_text(json.dumps({"args": flags}))
        if name != "gone":
            save_file(tensors, Path(name, LORA))
    save_file(tensors, "bare.safetensors")
    Path("cut.safetensors").write_bytes(Path("bare.safetensors").read_bytes()[:-1])


@pytest.mark.parametrize(("words", "message"), BAD_DRAWING, ids=[words for words, _ in BAD_DRAWING])
def test_wrong_input_of_the_generator_is_one_line(runs, capsys, words, message):
    from examples.dreambooth.generate import main

    with pytest.raises(SystemExit) as stop:
        main([*words.split(), "--prompt", "x"])
    error = capsys.readouterr().err.split("error: ")[1]
    assert stop.value.code == 2
    assert message in error
    assert error.count("\n") == 1


def test_a_checkpoint_is_drawn_with_its_own_tokens(runs):
    from examples.dreambooth.generate import WITHOUT_RUN, find_files

    for name, flags in (("both", {}), ("tokens alone", {"train_transformer_frac": 0})):
        run = Path(name).absolute()
        (run / "checkpoint-4").mkdir(parents=True)
        record = WITHOUT_RUN | {"train_text_encoder_ti": True, "output_name": None} | flags
        (run / "args.json").write_text(json.dumps({"args": record}))
        folders = {
            run: run / "run_emb.safetensors",
            run / "checkpoint-4": run / "checkpoint-4" / "learned_emb.safetensors",
        }
        for folder, embeddings in folders.items():
            save_file({"clip_l": torch.zeros(1, 1)}, embeddings)
            if name == "both":
                save_file({"transformer.x.lora_A.weight": torch.zeros(1, 1)}, folder / LORA)
            lora = folder / LORA if name == "both" else None
            assert find_files(folder)[:2] == (lora, embeddings)
            assert find_files(Path(os.path.relpath(folder)))[1] == embeddings
            if lora:
                assert find_files(lora)[:2] == (lora, embeddings)


def test_a_model_that_was_moved_is_one_line(runs, capsys):
    from examples.dreambooth.generate import main

    with pytest.raises(SystemExit) as stop:
        main(["run", "--prompt", "x", "--output", "drawn"])
    assert stop.value.code == 2
    error = capsys.readouterr().err
    assert "nothing/here" in error
    assert "cannot be loaded" in error
    assert not Path("drawn").exists()


def test_two_abstractions_start_as_they_are_told(tiny_model, tmp_path, pictures):
    flags = ["--pretrained_model_name_or_path", tiny_model, "--instance_data_dir", pictures, "--enable_t5_ti"]
    flags += ["--train_text_encoder_ti", "--token_abstraction", "AA,BB", "--initializer_concept", "red circle,blue"]
    args = dreambooth.parse_args([str(flag) for flag in flags])
    encoder, embedding_handler = new_prompt_encoder(args)
    assert embedding_handler.replace_abstractions("an AA beside a BB") == "an <s0><s1> beside a <s2>"
    for name, tokenizer in (("clip_l", encoder.pipeline.tokenizer), ("t5", encoder.pipeline.tokenizer_2)):
        extended = embedding_handler.embeddings[name]
        ids = tokenizer("red circle blue", add_special_tokens=False).input_ids
        assert torch.equal(extended.new_rows.detach(), extended.embedding.weight[ids])
        first = extended.first_new_id
        assert tokenizer.convert_tokens_to_ids(["<s0>", "<s1>", "<s2>"]) == [first, first + 1, first + 2]


def test_a_word_within_another_keeps_its_own_tokens(tiny_model, tmp_path, pictures):
    flags = ["--pretrained_model_name_or_path", tiny_model, "--instance_data_dir", pictures]
    flags += ["--train_text_encoder_ti", "--token_abstraction", "TOK,TOK2", "--num_new_tokens_per_abstraction", 1]
    args = dreambooth.parse_args([str(flag) for flag in flags])
    _, embedding_handler = new_prompt_encoder(args)
    assert embedding_handler.replace_abstractions("TOK2 and TOK") == "<s1> and <s0>"


@pytest.mark.parametrize("mode", ["pivotal CLIP", "transformer first"])
def test_a_longer_resumed_run_does_not_go_back_behind_the_pivot(train, flags, tmp_path, mode):
    run = tmp_path / "run"
    flags = [*flags, *MODES[mode], "--checkpointing_steps", 4, "--output_dir", run]
    train(SCRIPT, *flags, "--max_train_steps", 5)
    first = results(run)
    train(SCRIPT, *flags, "--max_train_steps", 20, "--resume_from_checkpoint", "latest")
    second = results(run)
    ended = {key: ("_emb" in key) == (mode == "pivotal CLIP") for key in first}
    assert {key: torch.equal(first[key], second[key]) for key in first} == ended


def test_one_step_is_enough_to_train_new_tokens(train, flags, tmp_path):
    train(SCRIPT, *flags, *MODES["pivotal CLIP"], "--max_train_steps", 1, "--output_dir", tmp_path / "one")
    train(SCRIPT, *flags, *MODES["pivotal CLIP"], "--max_train_steps", 2, "--output_dir", tmp_path / "two")
    rows = [results(tmp_path / run)["_emb.safetensors/clip_l"] for run in ("one", "two")]
    assert torch.equal(*rows)


PRIOR = ("--with_prior_preservation", "--class_prompt", "a square", "--num_class_images", 5, "--sample_batch_size", 2)


def test_class_images_are_drawn_once_and_the_rest_after_an_interruption(train, flags, tmp_path):
    folder = tmp_path / "class"
    prior = (*PRIOR, "--class_data_dir", folder)
    train(SCRIPT, *flags, *prior, "--output_dir", tmp_path / "a")
    first = {path.name: path.read_bytes() for path in folder.iterdir()}
    assert len(first) == 5
    (folder / "class-00001.png").unlink()
    (folder / "class-00004.png").unlink()
    train(SCRIPT, *flags, *prior, "--output_dir", tmp_path / "b")
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == first
    assert_equal(results(tmp_path / "a"), results(tmp_path / "b"))


def test_class_images_of_another_run_are_refused_and_counted(train, flags, pictures, tmp_path, capsys):
    flags = [*flags, *PRIOR, "--class_data_dir", tmp_path / "class", "--max_train_steps", 1, "--output_dir"]
    (tmp_path / "class").mkdir()
    shutil.copy(pictures / "0.png", tmp_path / "class" / "a photo of mine.png")
    train(SCRIPT, *flags, tmp_path / "run")
    assert "5 (1 of your own)" in capsys.readouterr().out
    with pytest.raises(SystemExit) as ended:
        train(SCRIPT, *flags, tmp_path / "other", "--class_prompt", "a dog", "--resolution", 48)
    assert ended.value.code == 2
    error = capsys.readouterr().err
    assert "4 of its images" in error and "'a square'" in error and "not 48 x 48" in error
    assert not (tmp_path / "other").exists()


@pytest.mark.parametrize(
    "mode", [None, *(pytest.param(m, marks=pytest.mark.slow) for m in ("pivotal CLIP", "CLIP LoRA"))]
)
def test_the_prior_loss_counts_as_it_is_weighted(train, flags, tmp_path, mode):
    losses = {}
    prior = (*PRIOR, "--class_data_dir", tmp_path / "class", "--max_train_steps", 1, *MODES.get(mode, []))
    for weight in (0, 1, 2):
        run = tmp_path / str(weight)
        train(SCRIPT, *flags, *prior, "--prior_loss_weight", weight, "--output_dir", run)
        losses[weight] = json.loads((run / "metrics.jsonl").read_text())["loss"]
    assert losses[1] - losses[0] > 1e-3
    assert losses[2] - losses[1] == pytest.approx(losses[1] - losses[0], rel=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["pivotal CLIP+T5", "CLIP LoRA"])
def test_two_processes_are_one_with_two_batches_a_step(train, flags, tmp_path, monkeypatch, mode):
    honest = dreambooth.step_generator
    monkeypatch.setattr(
        dreambooth, "step_generator", lambda seed, step, batch=0, rank=0: honest(seed, step, batch + rank)
    )
    prior = (*PRIOR, "--class_data_dir", tmp_path / "class", "--prior_loss_weight", 3, "--random_flip")
    preserve = ("--preserve_outputs", 2, "--preserve_prompts", "a red shape")
    flags = [*flags, *MODES[mode], *prior, *preserve, "--repeats", 4, "--caption_dropout", 0.3, "--output_dir"]
    one, two = tmp_path / "one" / "run", tmp_path / "two" / "run"
    train(SCRIPT, *flags, one, "--gradient_accumulation_steps", 2)
    script = tmp_path / "same_noise.py"
    script.write_text(
        f"""import gc, sys
sys.path.insert(0, {str(ROOT)!r})
import {SCRIPT} as trainer
from accelerate import Accelerator
honest, end_training = trainer.step_generator, Accelerator.end_training
trainer.step_generator = lambda seed, step, batch=0, rank=0: honest(seed, step, batch + rank)
def end(accelerator):
    kinds = {{type(thing).__name__ for thing in gc.get_objects()}}
    assert "DistributedDataParallel" not in kinds, "gloo hangs if the process group is freed with it"
    end_training(accelerator)
Accelerator.end_training = end
trainer.main(trainer.parse_args())
"""
    )
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", 2, script]
    result = subprocess.run([str(part) for part in (*command, *flags, two)], cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    losses = [[json.loads(line)["loss"] for line in (run / "metrics.jsonl").open()] for run in (one, two)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)
    a, b = results(one), results(two)
    assert a.keys() == b.keys()
    for key in a:
        torch.testing.assert_close(a[key], b[key], rtol=1e-3, atol=1e-4)


def test_batches_keep_to_one_bucket_and_pictures_to_the_nearest(train, flags, tmp_path, monkeypatch):
    shapes = []
    honest = dreambooth.compute_loss
    monkeypatch.setattr(
        dreambooth,
        "compute_loss",
        lambda t, latents, *a, **k: shapes.append(tuple(latents.shape)) or honest(t, latents, *a, **k),
    )
    buckets = ("--aspect_ratio_buckets", "32,48;32,32;48,32", "--max_train_steps", 9)
    train(SCRIPT, *flags, *buckets, *PRIOR, "--class_data_dir", tmp_path / "class", "--output_dir", tmp_path / "run")
    assert {shape[2:] for shape in shapes} == {(4, 6), (4, 4), (6, 4)}
    for size, bucket in {(48, 32): (32, 48), (40, 64): (48, 32), (33, 37): (32, 32), (1000, 10): (32, 48)}.items():
        width, height = size
        buckets = [Size(32, 48), Size(32, 32), Size(48, 32)]
        assert nearest_bucket(Size(height, width), buckets) == bucket
    squares = [Size(512, 512), Size(1024, 1024)]
    assert nearest_bucket(Size(height=1010, width=1000), squares) == (1024, 1024)


def test_the_hub_gets_results_and_no_file_the_token(train, flags, tmp_path, monkeypatch):
    calls = []

    class HubApi:
        def __init__(self, token):
            assert token == "hf_secret"

        def create_repo(self, name, exist_ok):
            calls.append(("create", name, exist_ok))
            return type("Repo", (), {"repo_id": f"me/{name}"})

        def upload_folder(self, repo_id, folder_path, ignore_patterns):
            calls.append(("upload", repo_id, folder_path))

        def upload_file(self, repo_id, path_or_fileobj, path_in_repo):
            calls.append(("upload", path_in_repo, path_or_fileobj))

    monkeypatch.setattr(tracking, "HfApi", HubApi)
    flags = [*flags, *MODES["pivotal CLIP"]]
    hub = ("--push_to_hub", "--hub_token", "hf_secret", "--max_train_steps", 2, "--checkpointing_steps", 1)
    train(SCRIPT, *flags, *hub, "--report_to", "tensorboard", "--output_dir", tmp_path / "run")
    assert calls == [("create", "run", True), ("upload", "me/run", tmp_path / "run")]
    assert not [path for path in tmp_path.rglob("*") if path.is_file() and b"hf_secret" in path.read_bytes()]
    card = (tmp_path / "run" / "README.md").read_text()
    assert "load_lora_weights('me/run', weight_name='pytorch_lora_weights.safetensors')" in card
    assert "load_file(hf_hub_download('me/run', 'run_emb.safetensors'))" in card
    assert str(tmp_path) not in card
    assert "base_model" not in card  # a folder, which the hub refuses
    train(SCRIPT, *flags, *hub, "--output_name", "dog", "--output_dir", tmp_path / "named")
    assert calls[3:] == [
        ("upload", "me/dog", tmp_path / "named" / "dog"),
        ("upload", "dog.safetensors", tmp_path / "named" / "dog.safetensors"),
    ]


def test_a_failed_upload_says_where_the_results_are(train, flags, tmp_path, monkeypatch):
    class HubApi:
        def __init__(self, token):
            pass

        def create_repo(self, name, exist_ok):
            return type("Repo", (), {"repo_id": "me/run"})

        def upload_folder(self, **arguments):
            raise OSError("no network")

    monkeypatch.setattr(tracking, "HfApi", HubApi)
    with pytest.raises(SystemExit, match="no network\nNothing is lost.*hf upload me/run"):
        train(SCRIPT, *flags, "--push_to_hub", "--max_train_steps", 1, "--output_dir", tmp_path / "run")
    assert (tmp_path / "run" / LORA).exists()


@pytest.mark.slow
def test_generate_and_the_model_cards_snippet_run_as_they_stand(train, flags, tmp_path, monkeypatch):
    import numpy as np

    drawn = []
    honest = validation.image_grid
    monkeypatch.setattr(validation, "image_grid", lambda a, *b, **c: drawn.append(a) or honest(a, *b, **c))
    shown = ("--validation_prompt", "a circle on the left", "--num_validation_images", 1)
    train(SCRIPT, *flags, *MODES["textual inversion"], *shown, "--output_dir", tmp_path / "run")
    prompt = ("--prompt", "a circle on the left")
    generate = [sys.executable, ROOT / "examples" / "dreambooth" / "generate.py"]
    subprocess.run([*generate, "run", *prompt, "--output", "drawn"], cwd=tmp_path, check=True)
    card = (tmp_path / "run" / "README.md").read_text()
    assert "the new tokens: `<s0><s1>` for circle" in card
    assert run_snippet(card.split("```python\n")[1].split("```")[0], tmp_path).size == (32, 32)
    image = Image.open(tmp_path / "drawn" / "0.png")
    assert np.abs(np.asarray(image, int) - np.asarray(drawn[-1][0], int)).max() <= 2
    result = subprocess.run([*generate, "nowhere", *prompt], cwd=tmp_path, capture_output=True, text=True)
    assert result.returncode == 2
    assert "nowhere: no such file" in result.stderr


def test_a_refused_token_ends_the_run_before_a_model_is_loaded(train, flags, tmp_path, monkeypatch, capsys):
    class HubApi:
        def __init__(self, token):
            pass

        def create_repo(self, name, exist_ok):
            raise OSError("Invalid user token")

    monkeypatch.setattr(tracking, "HfApi", HubApi)
    monkeypatch.setattr(dreambooth, "load_text_encoders", None)
    with pytest.raises(SystemExit) as stop:
        train(SCRIPT, *flags, "--push_to_hub", "--output_dir", tmp_path / "run")
    assert stop.value.code == 2
    assert "--push_to_hub: Invalid user token" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


# Flags beside the quickstart's; the least score of the subject, and the least share of the ordinary prompts' score
# before training that must be left.
LEARNING = {
    "plain": ([], 50, 0),
    "4-bit base": (["--quantize_base", "nf4"], 50, 0),
    "8-bit base": (["--quantize_base", "fp8"], 50, 0),
    "CLIP LoRA": (["--train_text_encoder", "--text_encoder_lr", "1e-3"], 50, 0),
    "pivotal CLIP": (["--train_text_encoder_ti", "--text_encoder_lr", "3e-3"], 60, 0),
    "pivotal CLIP+T5": (["--train_text_encoder_ti", "--enable_t5_ti", "--text_encoder_lr", "3e-3"], 60, 0),
    "prior preservation": (  # of the images themselves; the quickstart holds them to the base
        [
            *("--with_prior_preservation", "--class_data_dir", "class images", "--num_class_images", "240"),
            *("--class_prompt", HERE / "prompts.txt", "--sample_batch_size", "40", "--prior_loss_weight", "0.25"),
        ],
        50,
        0.75,  # seen: 0.92 in one process, 0.84 in two
    ),
}


def run_on_toy(pictures, output_dir, flags, processes):
    """Trains on the toy FLUX as the quickstart does, but for `flags`: (pipeline, the subject's words or tokens)."""
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"] if processes == 2 else []
    shared = [
        *("--pretrained_model_name_or_path", HERE / "flux", "--max_sequence_length", 32, "--report_to", "none"),
        *("--instance_data_dir", pictures, "--resolution", 64, "--cache_latents", "--output_dir", output_dir),
        *quickstart_flags(),
        *("--train_batch_size", 6 // processes, "--max_train_steps", 1000, "--token_abstraction", "sks glyph"),
    ]
    command = [sys.executable, *launcher, ROOT / f"{SCRIPT}.py", *shared, *flags]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    result = subprocess.run([str(part) for part in command], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    pipeline, abstractions = load_pipeline(output_dir)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline, abstractions.get("sks glyph", "sks glyph")


@pytest.fixture(scope="module")
def ordinary_before():
    """The score of ordinary prompts before training."""
    return evaluate(toy_pipeline(), "glyph", count=64)[1]


SEED = """
  --instance_prompt="3d icon in the style of TOK" --caption_column="prompt" --mixed_precision="bf16"
  --train_batch_size=1 --repeats=1 --report_to="wandb" --gradient_accumulation_steps=1 --gradient_checkpointing
  --learning_rate=1.0 --text_encoder_lr=1.0 --optimizer="prodigy" --train_text_encoder_ti
  --train_text_encoder_ti_frac=0.5 --lr_scheduler="constant" --lr_warmup_steps=0 --rank=8 --checkpointing_steps=2000
  --seed="0" --push_to_hub
"""


@pytest.mark.parametrize("extra", ["", "--enable_t5_ti", "--enable_t5_ti --train_transformer_frac=0"])
def test_the_published_commands_run(train, tiny_model, pictures, tmp_path, monkeypatch, wandb_dir, extra):
    uploads = []

    class HubApi:
        def __init__(self, token):
            pass

        def create_repo(self, name, exist_ok):
            return type("Repo", (), {"repo_id": f"me/{name}"})

        def upload_folder(self, **arguments):
            uploads.append(arguments["repo_id"])

    monkeypatch.setattr(tracking, "HfApi", HubApi)
    data, run = tmp_path / "3d_icon", tmp_path / "3d-icon-Flux-LoRA"
    data.mkdir()
    names = [Path(shutil.copy(path, data)).name for path in sorted(pictures.glob("*.png"))]
    rows = [{"file_name": name, "prompt": f"a TOK icon of number {i}"} for i, name in enumerate(names)]
    (data / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    small = ("--max_train_steps", 4, "--resolution", 32, "--max_sequence_length", 16)
    flags = ["--pretrained_model_name_or_path", tiny_model, "--dataset_name", data, "--output_dir", run, *small]
    train(SCRIPT, *flags, *shlex.split(SEED), *extra.split())
    assert uploads == ["me/3d-icon-Flux-LoRA"]
    rows = load_file(run / "3d-icon-Flux-LoRA_emb.safetensors")
    assert set(rows) == ({"clip_l", "t5"} if extra else {"clip_l"})
    assert (run / LORA).exists() == ("frac=0" not in extra)


def test_the_optimizer_holds_rows_not_tables(train, flags, tmp_path, monkeypatch):
    optimizers = []
    honest = dreambooth.create_optimizer
    monkeypatch.setattr(
        dreambooth, "create_optimizer", lambda *args: optimizers.append(honest(*args)) or optimizers[0]
    )
    train(SCRIPT, *flags, *MODES["textual inversion"], "--output_dir", tmp_path)
    moments = [value for state in optimizers[0].state.values() for value in state.values() if value.ndim]
    assert sum(moment.numel() for moment in moments) == 2 * 2 * (2 * 32)  # encoders, moments, rows x width


@pytest.mark.slow
@pytest.mark.learning
@pytest.mark.parametrize("processes", [1, 2])
@pytest.mark.parametrize("mode", LEARNING)
def test_every_mode_learns_the_subject(glyph_pictures, ordinary_before, tmp_path, mode, processes):
    flags, least_subject, least_share = LEARNING[mode]
    flags = [tmp_path / flag if flag == "class images" else flag for flag in flags]
    pipeline, words = run_on_toy(glyph_pictures, tmp_path / "run", flags, processes)
    subject, ordinary, _ = evaluate(
        pipeline, "glyph", count=64, replace=lambda prompt: prompt.replace("sks glyph", words)
    )
    print(f"{mode}, {processes}: subject 0 -> {subject:.0f} (bar {least_subject})", end=", ")
    least_ordinary = ordinary_before * least_share
    print(f"ordinary {ordinary_before:.0f} -> {ordinary:.0f} (bar {least_ordinary:.0f})")
    assert subject >= least_subject
    assert ordinary >= least_ordinary


@pytest.mark.slow
@pytest.mark.learning
def test_pivotal_tuning_teaches_a_subject_and_keeps_the_rest(glyph_pictures, tmp_path):
    """Means over three seeds, with the quickstart's flags and new tokens in CLIP, of 256 images of each kind."""
    ordinary_before, reworded_before = score_before("glyph")
    rows = []
    for seed in range(3):
        tokens = ("--train_text_encoder_ti", "--text_encoder_lr", "3e-3", "--seed", seed)
        flags = [*quickstart_flags(tmp_path), *tokens]
        pipeline, words = run_on_toy(glyph_pictures, tmp_path / f"{seed}", flags, processes=1)
        replace = methodcaller("replace", "sks glyph", words)
        subject, ordinary, _ = evaluate(pipeline, "glyph", count=256, replace=replace)
        bare = 100 * np.mean([score_subject(image, "glyph") for image in sample(pipeline, [words] * 64, 0)])
        rows.append((subject, bare, ordinary, evaluate_other_words(pipeline, count=256)))
        print("seed {}: subject {:.0f}, bare {:.0f}, ordinary {:.0f}, reworded {:.0f}".format(seed, *rows[-1]))
    means = np.mean(rows, axis=0)
    print("mean: subject {:.1f}, bare {:.1f}, ordinary {:.1f}, reworded {:.1f}".format(*means))
    assert means[0] >= 70
    assert means[1] >= 35
    assert means[2] >= ordinary_before - 4
    assert means[3] >= reworded_before - 3


@pytest.mark.slow
@pytest.mark.learning
@pytest.mark.parametrize("processes", [1, 2])
def test_textual_inversion_finds_words_for_what_the_model_can_draw(tmp_path, processes):
    """The subject is a big orange cross: the frozen transformer cannot draw what it has never seen, such as a ring."""
    rng = random.Random(0)
    backgrounds = [color for color in COLOR_NAMES if color != "orange"]

    def scene():
        return Scene(rng.choice(backgrounds), (random_shape(rng, "orange", kind="cross", size="big"),))

    crosses = tmp_path / "crosses"
    crosses.mkdir()
    for i in range(6):
        example = scene()
        draw(example).save(crosses / f"{i}.png")
        (crosses / f"{i}.txt").write_text(f"sks glyph on a {example.background} background")
    tokens = ("--train_text_encoder_ti", "--enable_t5_ti", "--train_text_encoder_ti_frac", 1)
    only_tokens = ("--train_transformer_frac", 0, "--text_encoder_lr", 1e-2, "--lr_scheduler", "constant")
    flags = (*tokens, *only_tokens, "--num_new_tokens_per_abstraction", 1)
    pipeline, words = run_on_toy(crosses, tmp_path / "run", flags, processes)
    scenes = [scene() for _ in range(64)]
    scores = {}
    for when, subject in (("before", "sks glyph"), ("after", words)):
        images = sample(pipeline, [f"{subject} on a {scene.background} background" for scene in scenes], 0)
        scores[when] = all_right(images, scenes)
    print(f"textual inversion, {processes}: all right {scores['before']:.0f} -> {scores['after']:.0f} (bar 50)")
    assert scores["before"] < 10
    assert scores["after"] >= 50
