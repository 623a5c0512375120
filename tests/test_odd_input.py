"""Data as disks and downloads have it: pipes, files of the system, names listed twice, images that show nothing."""

import json
import os

from common.arguments import MOST_OF_A_KIND, join_problems
from common.checkpoints import names_in_the_way
from common.data import (
    MAX_CAPTION,
    Size,
    check_num_samples,
    describe_data,
    image_files,
    open_image,
    read_folder,
    read_sizes,
    read_text,
)

import numpy as np
import pytest
from PIL import Image
from test_fuzz import within

import train_dreambooth_flux_advanced as dreambooth
import train_influxedit as influxedit


@pytest.fixture
def folder(tmp_path):
    """A folder of two captioned images."""
    data = tmp_path / "data"
    data.mkdir()
    for i in range(2):
        Image.new("RGB", (32, 32), "red").save(data / f"{i}.png")
        (data / f"{i}.txt").write_text("a red square")
    return data


def test_pipes_are_not_read(folder):
    os.mkfifo(folder / "x.png")
    os.mkfifo(folder / "2.txt")
    Image.new("RGB", (32, 32)).save(folder / "2.png")
    with within(20):
        examples, problems = read_folder(folder)
        sizes, unreadable = read_sizes(examples)
        with pytest.raises(ValueError, match="2.txt"):
            read_text(folder / "2.txt")
        with pytest.raises(OSError, match="a pipe or a device"):
            open_image(folder / "x.png")
    assert sizes == [Size(32, 32), Size(32, 32), None]
    assert "2.txt" in problems[0]
    assert "x.png" in unreadable[0]


def test_files_of_systems_are_skipped(folder):
    for name in ("._0.png", "._0.txt", ".DS_Store", "Thumbs.db"):
        (folder / name).write_bytes(b"\0\5\x16\7")
    examples, problems = read_folder(folder)
    assert problems == []
    assert [example.name for example in examples] == [str(folder / "0.png"), str(folder / "1.png")]
    assert image_files(folder)[0] == [folder / "0.png", folder / "1.png"]
    assert "not read" not in describe_data(examples, [folder], "--instance_prompt")


def test_a_file_listed_twice_is_said_once_with_ten_names(folder):
    rows = [{"file_name": f"{i % 20}.png", "text": str(i)} for i in range(60)]
    (folder / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    for i in range(20):
        Image.new("RGB", (32, 32)).save(folder / f"{i}.png")
    _, (problem,) = read_folder(folder)
    assert "20 files twice" in problem
    assert "and 10 more" in problem
    assert problem.count(".png") == 10


def test_two_spellings_of_a_folder_are_the_same(folder, tiny_model, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    subsets = [{"image_dir": name, "class_tokens": "x"} for name in ("data", "./data/", str(folder))]
    config = {"datasets": [{"resolution": 32, "subsets": subsets}]}
    (tmp_path / "data.json").write_text(json.dumps(config))
    words = ["--pretrained_model_name_or_path", tiny_model, "--dataset_config", tmp_path / "data.json"]
    args = dreambooth.parse_args([str(word) for word in words])
    problems = [problem for problem in dreambooth.find_examples(args)[1] if "twice" in problem]
    assert len(problems) == 2
    assert all("twice (data is the same folder)" in problem for problem in problems)


def test_numbers_that_are_no_colours_are_refused(folder):
    Image.fromarray(np.ones((32, 32), np.float32)).save(folder / "0.png", "TIFF")
    examples, _ = read_folder(folder)
    (problem,) = read_sizes(examples)[1]
    assert "0.png: not a readable image (its pixels are floating-point numbers" in problem


def test_images_of_a_pixel_are_said(folder):
    for i in range(30):
        Image.new("RGB", (1, 1)).save(folder / f"{i}.png")
        (folder / f"{i}.txt").write_text("x")
    examples, _ = read_folder(folder)
    for example, size in zip(examples, read_sizes(examples)[0], strict=True):
        example.size = size
    said = describe_data(examples, [folder], "--instance_prompt")["tiny images"]
    assert said.startswith("30 of less than 16 pixels")
    assert said.count("(1 x 1)") == 10


def test_thousands_of_problems_of_a_kind_are_ten_lines_and_a_count():
    problems = [f"/data/{i}.png: not a readable image (cannot identify '/data/{i}.png')" for i in range(3000)]
    lines = join_problems([*problems, "--rank 0 is wrong", "/data/x.txt: not UTF-8 text"]).splitlines()[1:]
    assert len(lines) == MOST_OF_A_KIND + 3
    assert "and 2990 more of this kind" in lines[10]
    assert lines[-2:] == ["  --rank 0 is wrong", "  /data/x.txt: not UTF-8 text"]


def test_a_caption_of_a_megabyte_is_cut(folder):
    (folder / "0.txt").write_text("a red square " * 100_000)
    (folder / "1.txt").write_text("one\n" * 300_000)
    examples, problems = read_folder(folder, caption_per_line=True)
    assert problems == []
    assert [MAX_CAPTION - 20 < len(caption) <= MAX_CAPTION for caption in examples[0].captions] == [True]
    assert sum(map(len, examples[1].captions)) < MAX_CAPTION


def test_black_masks_are_named(folder, tmp_path):
    (tmp_path / "masks").mkdir()
    Image.new("L", (32, 32)).save(tmp_path / "masks" / "0.png")
    Image.new("L", (32, 32), 255).save(tmp_path / "masks" / "1.png")
    examples, _ = read_folder(folder, partner_dirs={"mask": tmp_path / "masks"})
    assert influxedit.black_masks(examples) == [str(tmp_path / "masks" / "0.png")]


def test_more_samples_than_memory_holds_are_refused():
    assert check_num_samples(10_000_000) == []
    assert "give fewer repeats" in check_num_samples(10_000_001)[0]


def test_names_in_the_way_in_the_output_folder(tmp_path):
    (tmp_path / "metrics.jsonl").mkdir()
    (tmp_path / "encoded").write_text("")
    problems = names_in_the_way(tmp_path, "logs")
    assert len(problems) == 2
    assert "metrics.jsonl" in problems[0]
    assert "encoded" in problems[1]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--train_text_encoder_ti_frac 0", "--train_text_encoder_ti_frac 0 leaves the new tokens as noise"),
        ("--num_new_tokens_per_abstraction 80", "80 new tokens for it, and CLIP has room for 75 in all"),
        ("--enable_t5_ti --max_sequence_length 8 --num_new_tokens_per_abstraction 20", "room for 7 in all"),
    ],
)
def test_new_tokens_that_cannot_be_learned_are_refused(folder, tiny_model, capsys, flags, message):
    words = ["--pretrained_model_name_or_path", tiny_model, "--instance_data_dir", folder, "--train_text_encoder_ti"]
    for path in folder.glob("*.txt"):
        path.write_text("a TOK square")
    try:
        args = dreambooth.parse_args([*map(str, words), *flags.split()])
        said = "\n".join(dreambooth.find_examples(args)[1])
    except SystemExit as stop:
        assert stop.code == 2
        said = capsys.readouterr().err
    assert message in said
