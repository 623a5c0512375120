"""train_dreambooth_flux_advanced.py --dataset_config: what a data.toml of kohya's sd-scripts means here."""

import json
import shutil

import numpy as np
import pytest
import torch
from conftest import ROOT
from PIL import Image
from safetensors.torch import load_file

import train_dreambooth_flux_advanced as dreambooth
from train_dreambooth_flux_advanced import (
    DATASET_OPTIONS,
    REFUSED_OPTIONS,
    ConfiguredExample,
    Size,
    bucket_sizes,
    choose_bucket,
    default_options,
)


SCRIPT = "train_dreambooth_flux_advanced"


@pytest.fixture
def data(tmp_path, monkeypatch):
    """A working folder with pictures in one/ (2), two/ (3), class/ (2, captioned) and others that have a fault."""
    monkeypatch.chdir(tmp_path)
    sizes = {"one": 2, "two": 3, "class": 2, "bare": 1, "txt": 1, "blank": 1, "utf16": 1, "phone": 1, "broken": 1}
    for folder, count in sizes.items():
        (tmp_path / folder).mkdir()
        for i in range(count):
            Image.new("RGB", (48, 32), (50 * i, 90, 120)).save(tmp_path / folder / f"{i}.png")
    for i in range(2):
        (tmp_path / "class" / f"{i}.caption").write_text(f"class {i}, x\nsecond line\n")
    (tmp_path / "txt" / "0.txt").write_text("a caption")
    (tmp_path / "blank" / "0.caption").write_text("\n")
    (tmp_path / "utf16" / "0.caption").write_bytes(b"\xff\xfe\xff")
    (tmp_path / "phone" / "1.heic").write_bytes(b"")
    (tmp_path / "broken" / "0.png").write_bytes(b"\x89PNG and then nothing")
    (tmp_path / "empty").mkdir()
    return tmp_path


@pytest.fixture
def read(data, tiny_model):
    """read(toml, *flags): (args, examples, problems)."""

    def run(text, *flags):
        (data / "data.toml").write_text(text)
        model = ("--pretrained_model_name_or_path", str(tiny_model), "--dataset_config", "data.toml")
        args = dreambooth.parse_args([*model, *map(str, flags)])
        return args, *dreambooth.find_examples(args)

    return run


def toml(general="", dataset="", *subsets):
    subsets = subsets or ("",)
    tables = [f"[general]\n{general}\n[[datasets]]\nresolution = 64\n{dataset}\n"]
    for text in subsets:
        folder = "" if "image_dir" in text else 'image_dir = "one"\n'
        words = "" if "class_tokens" in text + dataset + general else 'class_tokens = "sks thing"\n'
        tables.append(f"[[datasets.subsets]]\n{folder}{words}{text}\n")
    return "".join(tables)


# general, dataset, subset, flags, option, what counts
PRECEDENCE = [
    ("", "", "", "", "num_repeats", 1),
    ("", "", "", "--repeats 7", "num_repeats", 7),
    ("num_repeats = 2", "", "", "--repeats 7", "num_repeats", 2),
    ("num_repeats = 2", "num_repeats = 3", "", "--repeats 7", "num_repeats", 3),
    ("num_repeats = 2", "num_repeats = 3", "num_repeats = 4", "--repeats 7", "num_repeats", 4),
    ("", "", "", "--random_flip", "flip_aug", True),
    ("", "", "flip_aug = false", "--random_flip", "flip_aug", False),
    ("flip_aug = true", "flip_aug = false", "", "", "flip_aug", False),
    ("caption_dropout_rate = 0.5", "", "caption_dropout_rate = 0", "", "caption_dropout_rate", 0),
    ("", "", "", "--caption_dropout 0.3", "caption_dropout_rate", 0.3),
    ("keep_tokens = 2", "", "", "", "keep_tokens", 2),
    ("keep_tokens = 2", "", "keep_tokens = 0", "", "keep_tokens", 0),
    ("batch_size = 3", "", "", "--train_batch_size 2", "batch_size", 3),
    ("", "", "", "--train_batch_size 2", "batch_size", 2),
    ("", "", "", "", "random_crop", False),
    ("", "", "random_crop = true", "", "random_crop", True),
    ("", 'class_tokens = "a"', "", "--instance_prompt b", "class_tokens", "a"),
    ("", "", "class_tokens = 'c'", "--instance_prompt b", "class_tokens", "c"),
    ('resize_interpolation = "area"', "", "", "", "resize_interpolation", "area"),
    (
        "color_aug = false\nalpha_mask = false\ntoken_warmup_step = 0",
        "validation_split = 0",
        "",
        "",
        "flip_aug",
        False,
    ),
]


@pytest.mark.parametrize(("general", "dataset", "subset", "flags", "option", "expected"), PRECEDENCE)
def test_the_nearest_table_counts(read, general, dataset, subset, flags, option, expected):
    _, examples, problems = read(toml(general, dataset, subset), *flags.split())
    assert not problems
    assert {str(example.options[option]) for example in examples} == {str(expected)}
    assert len(examples) == 2


def test_the_playbooks_file_loads_unchanged(read, data):
    for name, files in {"tjtoy": ("1.png", "2.jpg"), "sparkgpu": ("1.jpeg", "2.jpg", "3.webp")}.items():
        (data / "flux_data" / name).mkdir(parents=True)
        for i, file in enumerate(files):
            Image.new("RGB", (70 + i, 50), "red").save(data / "flux_data" / name / file)
    text = (ROOT / "examples" / "dgx_spark" / "flux_data" / "data.toml").read_text()
    args, examples, problems = read(text)
    assert not problems
    assert [example.prompt() for example in examples] == ["tjtoy toy"] * 2 + ["sparkgpu gpu"] * 3
    assert {example.bucket for example in examples} == {(1024, 1024)}
    dataset = dreambooth.DreamBoothDataset(examples, args)
    assert len(dataset) == 2 * 1 + 3 * 2
    assert len(dataset.image_keys()) == 5 * 2  # each picture once, and mirrored
    shutil.move("data.toml", "flux_data/data.toml")  # its paths may also start beside it
    (data / "flux_data" / "data.toml").write_text(text.replace("flux_data/", ""))
    args.dataset_config = data / "flux_data" / "data.toml"
    again, problems = dreambooth.find_examples(args)
    assert (len(again), problems) == (5, [])


# caption, options, every prompt it can become
CAPTIONS = [
    ("a, b", {}, {"a, b"}),
    ("a", {"caption_prefix": "x", "caption_suffix": "y"}, {"x a y"}),
    ("a, b, c", {"shuffle_caption": True, "keep_tokens": 1}, {"a, b, c", "a, c, b"}),
    ("a,b", {"shuffle_caption": True}, {"a, b", "b, a"}),
    ("a,b", {"keep_tokens": 2}, {"a,b"}),
    ("a;b", {"shuffle_caption": True, "caption_separator": ";"}, {"a, b", "b, a"}),
    ("a|||b, c", {"shuffle_caption": True, "keep_tokens_separator": "|||"}, {"a, b, c", "a, c, b"}),
    ("a|||b, c|||d", {"shuffle_caption": True, "keep_tokens_separator": "|||"}, {"a, b, c, d", "a, c, b, d"}),
    ("a ||| b", {"keep_tokens_separator": "|||"}, {"a, b"}),
    ("a, b;;c", {"secondary_separator": ";;"}, {"a, b,c"}),
    ("a;;b, c", {"secondary_separator": ";;", "shuffle_caption": True}, {"a,b, c", "c, a,b"}),
    ("{a|b} {{c}}", {"enable_wildcard": True}, {"a {c}", "b {c}"}),
    ("one\ntwo", {"enable_wildcard": True, "caption_prefix": "x"}, {"x one", "x two"}),
    ("a, b", {"caption_tag_dropout_rate": 0.5}, {"", "a", "b", "a, b"}),
    ("a, b", {"caption_tag_dropout_rate": 0.5, "keep_tokens": 1}, {"a", "a, b"}),
    ("a, b", {"caption_tag_dropout_rate": 1.0, "keep_tokens": 1}, {"a"}),
]


@pytest.mark.parametrize(("caption", "options", "expected"), CAPTIONS)
def test_captions_become_what_the_options_say(read, caption, options, expected):
    args, *_ = read(toml())
    example = ConfiguredExample("x", None, caption, default_options(args) | options)
    drawn = {example.prompt(np.random.default_rng(seed)) for seed in range(60)}
    assert drawn == expected
    assert example.varies() or drawn == {example.prompt()}
    assert example.prompt() in expected | {"a, b"}


def test_caption_files_win_over_class_tokens_and_one_line_counts(read):
    _, examples, problems = read(toml("", "", 'image_dir = "class"'))
    assert not problems
    assert [example.prompt() for example in examples] == ["class 0, x", "class 1, x"]
    _, examples, _ = read(toml("enable_wildcard = true", "", 'image_dir = "class"'))
    assert {examples[0].prompt(np.random.default_rng(i)) for i in range(9)} == {"class 0, x", "second line"}
    _, examples, _ = read(toml("", "", 'image_dir = "txt"\ncaption_extension = "txt"'))
    assert [example.prompt() for example in examples] == ["a caption"]


def test_dropout_of_an_epoch_and_of_a_share(read):
    args, examples, _ = read(toml("", "", "caption_dropout_every_n_epochs = 2"))
    dataset = dreambooth.DreamBoothDataset(examples, args)
    prompts = [{dataset[epoch, i][0]["prompt"] for i in range(2)} for epoch in range(4)]
    assert prompts == [{"sks thing"}, {""}, {"sks thing"}, {""}]
    args, examples, _ = read(toml("", "", "caption_dropout_rate = 0.25"))
    dataset = dreambooth.DreamBoothDataset(examples, args)
    share = np.mean([dataset[epoch, 0][0]["prompt"] == "" for epoch in range(400)])
    assert 0.18 < share < 0.32


def test_a_dropped_caption_is_replaced_by_the_class_tokens_but_not_for_class_images(read):
    subsets = [
        'image_dir = "class"\nclass_tokens = "sks"\ncaption_suffix = "2024"',
        'image_dir = "one"\nis_reg = true',
    ]
    args, examples, _ = read(
        toml("caption_dropout_every_n_epochs = 2", "", *subsets), "--caption_dropout_to", "instance_prompt"
    )
    dataset = dreambooth.DreamBoothDataset(examples, args)
    prompts = [[dataset[epoch, i][0]["prompt"] for i in range(4)] for epoch in range(2)]
    assert sorted(prompts[0]) == ["class 0, x 2024", "class 1, x 2024", "sks thing", "sks thing"]
    assert sorted(prompts[1]) == ["sks 2024", "sks 2024", "sks thing", "sks thing"]


def test_a_folder_without_class_tokens_has_nothing_to_put_in_a_captions_place(read):
    subset = 'image_dir = "class"\nclass_tokens = ""'
    args, examples, problems = read(
        toml("caption_dropout_rate = 0.5", "", subset), "--caption_dropout_to", "instance_prompt"
    )
    assert len(problems) == 1 and "class_tokens" in problems[0] and "class:" in problems[0]
    _, _, problems = read(toml("caption_dropout_rate = 0.5", "", subset))
    assert problems == []


def test_bucket_lists_are_the_known_ones():
    narrow = bucket_sizes(1024**2, 256, 1024, 64)
    wide = bucket_sizes(1024**2, 256, 2048, 64)
    assert (len(narrow), len(wide)) == (25, 41)
    assert {(768, 1344), (832, 1216)} <= set(wide)
    default = bucket_sizes(1024**2, None, None, 64)
    areas = [height * width / 1024**2 for height, width in default]
    assert min(areas) > 0.8  # a side is a multiple of 64
    assert max(areas) <= 1
    assert set(map(tuple, map(reversed, default))) == set(default)
    assert {(32, 128), (128, 32)} <= set(bucket_sizes(64**2, None, None, 16))


# size of the picture, options, (height, width) of its bucket
BUCKETS = [
    ((100, 50), {}, (1024, 1024)),
    ((100, 50), {"resolution": [768, 512]}, (512, 768)),
    ((1920, 1080), {"enable_bucket": True, "max_bucket_reso": 1024}, (576, 1024)),
    ((1920, 1080), {"enable_bucket": True}, (768, 1344)),
    ((1080, 1920), {"enable_bucket": True}, (1344, 768)),
    ((1216, 832), {"enable_bucket": True}, (832, 1216)),
    ((33, 33), {"enable_bucket": True}, (1024, 1024)),
    ((500, 300), {"enable_bucket": True, "bucket_no_upscale": True}, (256, 448)),
    ((4000, 2000), {"enable_bucket": True, "bucket_no_upscale": True}, (704, 1408)),
    ((1024, 1024), {"enable_bucket": True, "bucket_no_upscale": True}, (1024, 1024)),
]


@pytest.mark.parametrize(("size", "options", "bucket"), BUCKETS)
def test_pictures_go_to_these_buckets(read, size, options, bucket):
    args, *_ = read(toml())
    width, height = size
    assert choose_bucket(Size(height, width), default_options(args) | {"resolution": 1024} | options) == bucket


def repeats(examples, folder):
    return [example.repeats for example in examples if example.name.startswith(folder)]


@pytest.mark.parametrize(
    ("own", "reg", "expected"),
    [(1, 1, [1, 1]), (2, 1, [2, 2]), (3, 1, [3, 3]), (1, 2, [2]), (1, 9, [2]), (2, 3, [3, 1])],
)
def test_class_pictures_balance_the_others(read, own, reg, expected):
    _, examples, problems = read(
        toml("", "", f"num_repeats = {own}", f'image_dir = "class"\nis_reg = true\nnum_repeats = {reg}')
    )
    assert not problems
    assert repeats(examples, "one") == [own] * 2
    assert repeats(examples, "class") == expected
    assert sum(repeats(examples, "class")) == 2 * own


def test_a_subset_repeated_zero_times_is_left_out(read):
    _, examples, problems = read(toml("", "", "", 'image_dir = "two"\nnum_repeats = 0'))
    assert (len(examples), problems) == (2, [])
    _, examples, problems = read(toml("", "", "", 'image_dir = "class"\nis_reg = true\nnum_repeats = 0'))
    assert (len(examples), problems) == (2, [])  # nor does the balance bring it back


def test_a_json_file_is_read_and_one_without_tables_is_one_error(read, data):
    args, *_ = read(toml())
    args.dataset_config = data / "data.json"
    subset = {"image_dir": "two", "class_tokens": "x"}
    args.dataset_config.write_text(json.dumps({"datasets": [{"resolution": 64, "subsets": [subset]}]}))
    examples, problems = dreambooth.find_examples(args)
    assert (len(examples), problems) == (3, [])
    args.dataset_config.write_text("[1]")
    _, problems = dreambooth.find_examples(args)
    assert problems[0].endswith("data.json: must hold general and datasets, not a list")


def test_batches_keep_to_a_dataset_and_its_size():
    groups = [(0, "a")] * 5 + [(1, "a")] * 4 + [(1, "b")] * 3
    sampler = dreambooth.StepSampler(
        groups, {group: (1, 3)[group[0]] for group in groups}, seed=0, process_index=0, num_processes=1
    )
    for epoch in range(3):
        batches = sampler.batches(epoch)
        assert sorted(index for batch in batches for index in batch) == list(range(12))
        assert all(len({groups[index] for index in batch}) == 1 for batch in batches)
        sizes = sorted((groups[batch[0]], len(batch)) for batch in batches)
        assert sizes == [((0, "a"), 1)] * 5 + [((1, "a"), 1), ((1, "a"), 3), ((1, "b"), 3)]


TWO = """
[general]
caption_dropout_rate = 0.2
[[datasets]]
resolution = 32
batch_size = 1
  [[datasets.subsets]]
  image_dir = "one"
  class_tokens = "{a|the} circle, red"
  shuffle_caption = true
  enable_wildcard = true
  num_repeats = 2
  flip_aug = true
  [[datasets.subsets]]
  image_dir = "class"
  is_reg = true
[[datasets]]
resolution = [48, 32]
batch_size = 3
enable_bucket = true
bucket_reso_steps = 16
  [[datasets.subsets]]
  image_dir = "two"
  class_tokens = "square"
"""


def test_a_run_on_two_datasets_resumes_and_caches_exactly(train, data, tiny_model, monkeypatch):
    (data / "data.toml").write_text(TWO)
    shapes, weights = [], []
    honest, loss = dreambooth.compute_loss, {}
    monkeypatch.setattr(
        dreambooth, "compute_loss", lambda t, x, *a, **k: shapes.append(tuple(x.shape)) or honest(t, x, *a, **k)
    )
    flags = [
        *("--pretrained_model_name_or_path", tiny_model, "--dataset_config", "data.toml", "--rank", 2),
        *("--max_sequence_length", 8, "--report_to", "none", "--learning_rate", 1e-3, "--max_train_steps", 9),
    ]
    for name, extra in {"a": [], "b": ["--cache_latents"], "c": ["--prior_loss_weight", 0]}.items():
        train(SCRIPT, *flags, *extra, "--output_dir", name)
        loss[name] = [json.loads(line)["loss"] for line in (data / name / "metrics.jsonl").open()]
        weights.append(load_file(data / name / "pytorch_lora_weights.safetensors"))
    assert all(torch.equal(weights[0][key], weights[1][key]) for key in weights[0])
    assert sum(value == 0 for value in loss["c"]) == 4  # of nine batches, four are a class picture
    assert sorted(shapes[:9]) == [(1, 16, 4, 4)] * 8 + [(3, 16, 4, 6)]
    train(SCRIPT, *flags, "--max_train_steps", 4, "--checkpointing_steps", 4, "--output_dir", "d")
    train(SCRIPT, *flags, "--resume_from_checkpoint", "latest", "--output_dir", "d")
    resumed = load_file(data / "d" / "pytorch_lora_weights.safetensors")
    assert all(torch.equal(weights[0][key], resumed[key]) for key in resumed)
    (data / "data.toml").write_text(TWO + "# edited\n")
    with pytest.raises(SystemExit):
        train(SCRIPT, *flags, "--max_train_steps", 12, "--resume_from_checkpoint", "latest", "--output_dir", "d")


def test_validation_images_have_the_configurations_size_unless_one_is_given(read):
    for flags, side in (((), 64), (("--resolution", 32), 32)):
        args, examples, problems = read(toml(), *flags)
        dreambooth.adopt_dataset_config(args, examples)
        assert problems == []
        assert args.resolution == side


@pytest.mark.parametrize("output", ["two", "one/run"])
def test_a_folder_of_the_configuration_is_no_output_dir(train, data, tiny_model, capsys, output):
    (data / "data.toml").write_text(TWO)
    before = sorted(data.rglob("*"))
    with pytest.raises(SystemExit) as stop:
        train(
            *(SCRIPT, "--pretrained_model_name_or_path", tiny_model, "--dataset_config", "data.toml"),
            *("--max_sequence_length", 8, "--report_to", "none", "--max_train_steps", 1, "--output_dir", output),
        )
    assert stop.value.code == 2
    message = capsys.readouterr().err
    assert f"--output_dir {output}" in message
    assert "image_dir" in message
    assert sorted(data.rglob("*")) == before


# the file, and what the one message must say; {s} stands for a table of one subset
SUBSET = '[[datasets.subsets]]\nimage_dir = "one"\nclass_tokens = "x"\n'
BAD = [
    ("[general", "data.toml: cannot be read (Expected ']'"),
    ("", "data.toml: no [[datasets]] table in it"),
    ("[datasets]\nresolution = 64", "no [[datasets]] table in it"),
    ("[[datasets]]\nresolution = 64", "[[datasets]] 1: no [[datasets.subsets]] table in it"),
    ("general = 3\n[[datasets]]\n{s}", "[general] must be a table, not 3"),
    ("[extra]\na = 1\n[[datasets]]\n{s}", "extra is neither [general] nor [[datasets]]"),
    ("[general]\nis_reg = true\n[[datasets]]\n{s}", "[general]: is_reg: it belongs in [[datasets.subsets]]"),
    ("[[datasets]]\n{s}resolution = 64", "subset 1: resolution: it belongs in [general] or [[datasets]]"),
    ("[[datasets]]\nimage_dir = 'one'\n{s}", "[[datasets]] 1: image_dir: it belongs in [[datasets.subsets]]"),
    ("[[datasets]]\n{s}num_repeat = 2", "subset 1: num_repeat: did you mean num_repeats? (allowed here: "),
    ("[[datasets]]\nresolutoin = 64\n{s}", "resolutoin: did you mean resolution?"),
    ("[[datasets]]\n{s}zzz = 1", "zzz: no option has this name (allowed here: resize_interpolation, "),
    ("[[datasets]]\nresolution = '64'\n{s}", "resolution = '64' must be a side or [width, height], multiples of 16"),
    ("[[datasets]]\nresolution = 70\n{s}", "resolution = 70 must be a side or [width, height], multiples of 16"),
    ("[[datasets]]\nresolution = [64]\n{s}", "resolution = [64] must be"),
    ("[[datasets]]\nbatch_size = 0\n{s}", "batch_size = 0 must be a whole number from 1"),
    ("[[datasets]]\nbatch_size = true\n{s}", "batch_size = True must be a whole number from 1"),
    ("[[datasets]]\n{s}flip_aug = 1", "flip_aug = 1 must be true or false"),
    ("[[datasets]]\n{s}caption_separator = ''", "caption_separator = '' must be text that is not empty"),
    ("[[datasets]]\n{s}caption_extension = '.'", "caption_extension = '.' must be an extension such as .txt"),
    ("[[datasets]]\n{s}num_repeats = -1", "num_repeats = -1 must be a whole number from 0"),
    ("[[datasets]]\n{s}caption_dropout_rate = 2", "caption_dropout_rate = 2 must be a number from 0 to 1"),
    ("[[datasets]]\n{s}resize_interpolation = 'best'", "resize_interpolation = 'best' must be lanczos, nearest"),
    ("[[datasets]]\nbucket_reso_steps = 24\n{s}", "bucket_reso_steps = 24 must be a multiple of 16"),
    ("[[datasets]]\n{s}color_aug = true", "color_aug = True is not supported: colors are kept as they are"),
    ("[[datasets]]\n{s}alpha_mask = true", "--dataset_config data.toml: all masks are white (or opaque) all over"),
    (
        "[[datasets]]\nvalidation_split = 0.1\n{s}",
        "validation_split = 0.1 is not supported: it is a flag: --validation_split",
    ),
    ("[general]\nprior_loss_weight = 0.5\n[[datasets]]\n{s}", "it is a flag: --prior_loss_weight"),
    ("[[datasets]]\n{s}metadata_file = 'm.json'", "metadata_file = 'm.json' is not supported: give image_dir"),
    ("[[datasets]]\n{s}token_warmup_step = 5", "token_warmup_step = 5 is not supported"),
    ("[[datasets]]\n[[datasets.subsets]]\nclass_tokens = 'x'", "subset 1: image_dir is missing"),
    ("[[datasets]]\n{s}{s}", "[[datasets]] 1: image_dir one twice: use num_repeats"),
    (
        '[[datasets]]\n[[datasets.subsets]]\nimage_dir = "\\u0000"\nclass_tokens = "x"',
        "image_dir '\\x00' (with an invisible character",
    ),
    ("[[datasets]]\n[[datasets.subsets]]\nimage_dir = 'gone'", "image_dir gone: no such folder here or in"),
    ("[[datasets]]\n[[datasets.subsets]]\nimage_dir = 'empty'", "image_dir empty: no images (.png, "),
    ("[[datasets]]\n[[datasets.subsets]]\nimage_dir = 'bare'", "bare/0.png: no caption: write 0.caption, or give"),
    ("[[datasets]]\n[[datasets.subsets]]\nimage_dir = 'txt'\nclass_tokens='x'", 'Set caption_extension = ".txt"'),
    ("[[datasets]]\n[[datasets.subsets]]\nimage_dir = 'blank'", "blank/0.caption: empty; delete it to use class"),
    ("[[datasets]]\n[[datasets.subsets]]\nimage_dir = 'utf16'", "utf16/0.caption: not UTF-8 text"),
    ("[[datasets]]\n[[datasets.subsets]]\nimage_dir = 'phone'\nclass_tokens='x'", "phone/1.heic: save it as PNG"),
    ("[[datasets]]\n[[datasets.subsets]]\nimage_dir = 'broken'\nclass_tokens='x'", "0.png: not a readable image"),
    ("[[datasets]]\n{s}is_reg = true", "is_reg images need a subset of others in the same dataset"),
    ("[[datasets]]\nresolution = 64\nenable_bucket = true\nmin_bucket_reso = 128\n{s}", "min_bucket_reso 128 is more"),
    ("[[datasets]]\nresolution = 64\nenable_bucket = true\nmax_bucket_reso = 32\n{s}", "max_bucket_reso 32 is less"),
    (
        "[[datasets]]\nresolution = 32\nenable_bucket = true\n{s}",
        "bucket_reso_steps 64 is more than the resolution 32",
    ),
    (
        "[[datasets]]\nresolution = 64\nenable_bucket = true\nbucket_no_upscale = true\n{s}",
        "one/0.png: at 48 x 32 pixels, a side of its bucket is less than 64 pixels",
    ),
    ("[[datasets]]\n{s}num_repeats = 0", "--dataset_config data.toml: no images (.png, "),
]


@pytest.mark.parametrize(("text", "message"), BAD, ids=range(len(BAD)))
def test_a_bad_file_is_one_readable_message(train, data, tiny_model, monkeypatch, capsys, text, message):
    (data / "data.toml").write_text(text.replace("{s}", SUBSET))
    monkeypatch.setattr(dreambooth, "load_text_encoders", None)
    with pytest.raises(SystemExit) as stop:
        train(SCRIPT, "--pretrained_model_name_or_path", tiny_model, "--dataset_config", "data.toml")
    error = capsys.readouterr().err
    assert stop.value.code == 2
    assert message in error
    assert "Traceback" not in error
    assert len(error.strip().splitlines()[-1]) < 700
    assert error.count("error: ") == 1
    assert not (data / "flux-dreambooth-lora").exists()


def test_every_option_is_honoured_or_refused_by_name():
    known = """resolution batch_size enable_bucket min_bucket_reso max_bucket_reso bucket_reso_steps bucket_no_upscale
        resize_interpolation network_multiplier validation_split validation_seed num_repeats shuffle_caption
        caption_separator keep_tokens keep_tokens_separator secondary_separator enable_wildcard caption_prefix
        caption_suffix caption_dropout_rate caption_dropout_every_n_epochs caption_tag_dropout_rate token_warmup_min
        token_warmup_step flip_aug color_aug random_crop face_crop_aug_range caption_extension class_tokens cache_info
        custom_attributes image_dir is_reg alpha_mask metadata_file conditioning_data_dir"""
    ours = DATASET_OPTIONS.keys() | REFUSED_OPTIONS.keys()
    assert not set(known.split()) - ours
    assert not DATASET_OPTIONS.keys() & REFUSED_OPTIONS.keys()
    source = (ROOT / f"{SCRIPT}.py").read_text()
    assert all(source.count(f'"{name}"') >= 2 for name in DATASET_OPTIONS)


def test_flags_that_the_file_replaces_are_refused(tiny_model, data, capsys):
    flags = ("--pretrained_model_name_or_path", str(tiny_model), "--dataset_config", "data.toml")
    for flag in ("--scale_lr", "--center_crop", "--aspect_ratio_buckets=32,32", "--caption_column=x"):
        with pytest.raises(SystemExit):
            dreambooth.parse_args([*flags, flag])
        assert f"{flag.split('=')[0]} has no effect with --dataset_config" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        dreambooth.parse_args([*flags, "--instance_data_dir", "one"])
    assert "exactly one of" in capsys.readouterr().err
