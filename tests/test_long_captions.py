"""Captions that are longer than what an encoder reads: new tokens out of reach, and what is cut."""

import re

from common.text_encoders import describe_long_prompts

import pytest
from PIL import Image

import train_dreambooth_flux_advanced as dreambooth


FILLER = "a red circle above a blue square "


def problems_of(short_runs, folder, caption, *flags):
    (folder / "a.txt").write_text(caption)
    Image.new("RGB", (32, 32)).save(folder / "a.png")
    words = [*short_runs["train_dreambooth_flux_advanced"], "--train_text_encoder_ti", "--instance_data_dir", folder]
    words += ["--output_dir", folder.parent / "out", *flags]
    return dreambooth.find_examples(dreambooth.parse_args([str(word) for word in words]))[1]


@pytest.mark.parametrize(
    ("caption", "flags", "message"),
    [
        ("a TOK " + 12 * FILLER, (), None),
        (12 * FILLER + "of TOK", (), "CLIP reads 77 tokens of a caption, and 0 of its 2"),
        ("a TOK", ("--num_new_tokens_per_abstraction", 80), "80 new tokens for it, and CLIP has room for 75"),
        ("a circle and a square and TOK", ("--enable_t5_ti",), "T5 with --max_sequence_length reads 8 .* of its 2"),
        ("TOK", ("--enable_t5_ti",), None),
    ],
)
def test_new_tokens_out_of_reach_are_refused(short_runs, tmp_path, caption, flags, message):
    problems = problems_of(short_runs, tmp_path, caption, *flags)
    if message is None:
        assert not problems
    else:
        (problem,) = problems
        assert "--token_abstraction TOK: " in problem
        assert re.search(message, problem), problem


def test_one_caption_within_reach_is_enough(short_runs, tmp_path):
    (tmp_path / "b.txt").write_text("TOK")
    Image.new("RGB", (32, 32)).save(tmp_path / "b.png")
    assert not problems_of(short_runs, tmp_path, 12 * FILLER + "of TOK")


def test_the_header_counts_captions_that_are_cut(tiny_pipeline):
    clip, t5 = tiny_pipeline.tokenizer, tiny_pipeline.tokenizer_2
    captions = {"a.png": "a red circle", "b.png": 30 * FILLER, "c.png": ""}
    assert not describe_long_prompts({}, t5, 512, clip)
    assert not describe_long_prompts({"a.png": "a red circle"}, t5, 512, clip)
    (text,) = describe_long_prompts(captions, t5, 512, clip).values()
    assert text.startswith("1 of 3 read by T5 alone after 77")
    assert "b.png" in text
    (text,) = describe_long_prompts(captions, t5, 3, clip).values()
    assert text.startswith("2 of 3 cut at 3 tokens")
    assert not describe_long_prompts(captions, t5, 512)
