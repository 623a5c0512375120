"""Prompts of validation from a file: --validation_prompts."""

import importlib
import json

from common.lora import scaled_adapters
from common.validation import (
    PROMPT_OPTION_TYPES,
    ValidationPrompt,
    image_grid,
    read_validation_prompts,
    texts_of,
)

import pytest
import torch
from peft import LoraConfig, inject_adapter_in_model
from PIL import Image
from safetensors.torch import load_file


ALL = set(PROMPT_OPTION_TYPES)
LINES = """\
# of a dog
a dog, 2 -- 3 years old --w 512 --h 768 --d 7 --s 20 --l 2.5 --g 3 --n blurry, dark

  a cat  --AM 0.6 --d 9223372036854775807
plain
a {red} house #1 --n bad --l 1.5 --cn {image} --ci {image} --mask {image}
"""


@pytest.fixture
def image(tmp_path):
    path = tmp_path / "an image.png"
    Image.new("RGB", (8, 8)).save(path)
    return path


def read(path, text, options=ALL):
    path.write_text(text)
    return read_validation_prompts("--validation_prompts", path, options=options)


def test_lines_are_read_as_sd_scripts_write_them(tmp_path, image):
    prompts, problems = read(tmp_path / "prompts.txt", LINES.replace("{image}", str(image)))
    assert problems == []
    assert prompts == [
        ValidationPrompt("a dog, 2 -- 3 years old", 512, 768, 7, 20, 3.0, 2.5, "blurry, dark"),
        ValidationPrompt("a cat", lora_scale=0.6, seed=2**63 - 1),
        ValidationPrompt("plain"),
        ValidationPrompt(
            "a {red} house #1", true_cfg_scale=1.5, negative_prompt="bad", image=(image, image), mask=image
        ),
    ]
    assert texts_of(prompts) == {prompt.prompt for prompt in prompts} | {"blurry, dark", "bad"}
    assert (
        prompts[0].described(seed=0)
        == "seed 7, width 512, height 768, 20 steps, guidance 3, CFG 2.5 from 'blurry, dark'"
    )
    assert prompts[2].described(seed=4) == "seed 4"
    assert read_validation_prompts("--x", None, options=ALL) == ([], [])


def test_json_and_toml_mean_the_same(tmp_path):
    expected = [
        ValidationPrompt("a dog", 512, 512, 1, 20, 3.0, lora_scale=0.5),
        ValidationPrompt("a cat", 512, 256, seed=2),
    ]
    rows = [
        {"prompt": "a dog", "width": 512, "height": 512, "seed": 1, "num_inference_steps": 20}
        | {"guidance_scale": 3, "lora_scale": 0.5, "negative_prompt": None},
        "a cat --w 512 --h 256 --d 2",
    ]
    assert read(tmp_path / "prompts.json", json.dumps(rows)) == (expected, [])
    toml = """
[prompt]
width = 512
height = 512
[[prompt.subset]]
prompt = "a dog"
seed = 1
sample_steps = 20
guidance_scale = 3.0
lora_scale = 0.5
[[prompt.subset]]
prompt = "a cat"
height = 256
seed = 2
"""
    assert read(tmp_path / "prompts.toml", toml) == (expected, [])


def test_all_wrong_lines_are_named_with_line_value_and_remedy(tmp_path):
    text = """\
a dog --w 500
--d 1
a cat --h tall --d -1 --s 0
a cow --ss euler
a hen --d 1 --d 2
a fox --n blurry
an owl --cn nowhere.png --g 2
a bat --mask x.png
"""
    path = tmp_path / "prompts.txt"
    _, problems = read(path, text, ALL - {"mask"})
    expected = [
        ("line 1: ", "--w 500", "multiple of 16, such as 496"),
        ("line 2: ", "no prompt"),
        ("line 3: ", "--h tall"),
        ("line 3: ", "--d -1", "at least 0"),
        ("line 3: ", "--s 0", "at least 1"),
        ("line 4: ", "--ss euler", "--w, --h, --d"),
        ("line 5: ", "--d 2", "twice"),
        ("line 6: ", "--n", "--l"),
        ("line 7: ", "nowhere.png", "no such file"),
        ("line 8: ", "--mask x.png", "leave it out"),
    ]
    assert len(problems) == len(expected)
    for problem, words in zip(problems, expected, strict=True):
        assert all(word in problem for word in (str(path), *words)), problem


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("p.txt", "# nothing\n\n", "no prompts in it"),
        ("p.txt", b"\xff\xfe\xff", "UTF-8"),
        ("p.json", "{", "Expecting"),
        ("p.json", '{"a": 1}', "a list of prompts"),
        ("p.json", '[{"prompt": 3}]', "prompt 1: no prompt"),
        ("p.json", "[3]", "prompt 1 must be an object"),
        ("p.json", '[{"prompt": "a", "width": true}]', "width True"),
        ("p.json", '[{"prompt": "a", "widht": 64}]', "widht 64"),
        ("p.json", "[" * 100000, "p.json"),
        ("p.toml", "a = 1", "no table [prompt]"),
        ("p.toml", "a = ", "p.toml"),
    ],
)
def test_a_file_of_another_form_is_one_problem(tmp_path, name, content, words):
    path = tmp_path / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    prompts, problems = read_validation_prompts("--validation_prompts", path, options=ALL)
    assert len(problems) == 1 and words in problems[0] and str(path) in problems[0]
    assert "no such file" in read_validation_prompts("--x", tmp_path / "no.txt", options=ALL)[1][0]


def test_adapters_count_as_much_as_asked_and_then_as_before():
    model = torch.nn.Sequential(torch.nn.Linear(4, 4))
    inputs = torch.randn(2, 4)
    base = model(inputs)
    inject_adapter_in_model(LoraConfig(r=2, lora_alpha=4, target_modules=["0"], init_lora_weights=False), model)
    whole = model(inputs)
    for scale in (0.0, 0.5, 1.0, -2.0):
        with scaled_adapters(model, scale):
            torch.testing.assert_close(model(inputs), base + scale * (whole - base))
    assert torch.equal(model(inputs), whole)


def test_a_grid_holds_images_of_different_sizes():
    sizes = [(64, 32), (192, 96), (32, 128)]
    colors = ["red", "green", "blue"]
    images = [Image.new("RGB", size, color) for size, color in zip(sizes, colors, strict=True)]
    grid = image_grid(images, ["a", "b", "c"], columns=2, title="step 1")
    counts = dict.fromkeys(colors, 0)
    for count, color in grid.getcolors(maxcolors=1 << 20):
        for name, value in (("red", (255, 0, 0)), ("green", (0, 128, 0)), ("blue", (0, 0, 255))):
            if color == value:
                counts[name] = count
    assert [counts[color] for color in colors] == [width * height for width, height in sizes]


DREAMBOOTH, OMINI, INFLUX, TWINFLOW = (
    "train_dreambooth_flux_advanced",
    "train_omini",
    "train_influxedit",
    "train_twinflow",
)
# {trainer: (lines, sizes of the images, words of their captions)}
RUNS = {
    DREAMBOOTH: (
        ["a circle --w 48 --d 5 --s 1 --am 0.5", "red --s 2 --l 2 --n blue"],
        [(48, 32), (32, 32)],
        ["a circle", "seed 5", "LoRA scale 0.5", "red", "seed 3", "from 'blue'"],
    ),
    OMINI: (
        ["a circle --d 5 --s 1 --am 0.5 --cn {image}", "red --s 1 --l 2"],
        [(32, 32)] * 4,
        ["condition: canny", "a circle | seed 5", "red | seed 3"],
    ),
    INFLUX: (
        ["a circle --w 48 --h 32 --d 5 --s 1 --am 0.5 --cn {image}", "red --w 32 --h 32 --s 1"],
        [(48, 32), (32, 32)],
        ["a circle | seed 5", "LoRA scale 0.5", "red | seed 3"],
    ),
    TWINFLOW: (
        ["a circle --w 48 --d 5 --am 0.5", "red"],
        [(48, 32)] * 2 + [(32, 32)] * 2,
        ["a circle | few:1, seed 5", "a circle | any:2", "red | few:1, seed 3"],
    ),
}
EXTRA = {
    OMINI: ["--validation_image", "{image}"],
    TWINFLOW: ["--validation_samplers", "few:1", "any:2"],
}


@pytest.mark.parametrize(
    "script", [DREAMBOOTH, *(pytest.param(name, marks=pytest.mark.slow) for name in (OMINI, INFLUX, TWINFLOW))]
)
def test_a_run_draws_the_prompts_of_a_file_and_is_otherwise_the_same(
    train, short_runs, pictures, tmp_path, monkeypatch, script
):
    module = importlib.import_module(script)
    flags = [*short_runs[script], "--seed", 3, "--cache_latents"]
    train(script, *flags, "--output_dir", tmp_path / "plain")
    lines, sizes, words = RUNS[script]
    file = tmp_path / "prompts.txt"
    file.write_text("\n".join(lines).format(image=pictures / "0.png"))
    extra = [text.format(image=pictures / "1.png") for text in EXTRA.get(script, [])]
    shown = []

    def save_images(accelerator, args, images, captions, **rest):
        file.unlink(missing_ok=True)  # a file that changes while the run goes on does not matter
        shown.append((rest["step"], [image.size for image in images], " ".join(captions), images))
        honest(accelerator, args, images, captions, **rest)

    honest = module.save_images
    monkeypatch.setattr(module, "save_images", save_images)
    run = tmp_path / "shown"
    train(script, *flags, "--validation_prompts", file, "--validation_steps", 1, *extra, "--output_dir", run)
    assert [step for step, *_ in shown] == [0, 1, 2]
    for _, found_sizes, captions, _ in shown:
        assert found_sizes == sizes
        assert all(word in captions for word in words), captions
    assert len(list((run / "validation").glob("step-*.png"))) == 3
    (before,), (after,) = (map(load_file, (tmp_path / name).glob("*.safetensors")) for name in ("plain", "shown"))
    assert before.keys() == after.keys() and all(torch.equal(before[key], after[key]) for key in before)


WRONG = [
    (DREAMBOOTH, "a --w 40\nb --d x\nc --cn a.png\n", ["line 1", "--w 40", "line 2", "--d x", "line 3", "no effect"]),
    (OMINI, "a --w 64\nb\n", ["line 1", "--w 64", "no effect", "'b' has 0 images"]),
    (INFLUX, "a --l 2 --n b\n", ["line 1", "--l 2", "no effect"]),
    (TWINFLOW, "a --s 4\nb --h 40\n", ["line 1", "--s 4", "no effect", "--h 40", "multiple of 16"]),
]


@pytest.mark.parametrize(("script", "text", "words"), WRONG)
def test_wrong_lines_end_a_run_before_it_writes(train, short_runs, tmp_path, capsys, script, text, words):
    file = tmp_path / "prompts.txt"
    file.write_text(text)
    flags = [*short_runs[script], "--validation_prompts", file, "--output_dir", tmp_path / "run"]
    with pytest.raises(SystemExit) as ended:
        train(script, *flags)
    assert ended.value.code == 2
    said = capsys.readouterr().err
    assert all(word in said for word in words), said
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("script", [DREAMBOOTH, OMINI, INFLUX, TWINFLOW])
def test_a_prompt_and_a_file_exclude_each_other(short_runs, pictures, tmp_path, capsys, script):
    module = importlib.import_module(script)
    file = tmp_path / "prompts.txt"
    file.write_text("a")
    words = [
        *short_runs[script],
        "--sample_prompts",
        file,
        "--validation_prompt",
        "x",
        "--output_dir",
        tmp_path / "run",
    ]
    if script == OMINI:
        words += ["--validation_image", pictures / "0.png"]
    with pytest.raises(SystemExit):
        module.parse_args([str(word) for word in words])
    assert "--validation_prompt and --validation_prompts exclude each other" in capsys.readouterr().err


def test_a_scale_of_0_is_the_model_without_its_lora_and_prompts_have_defaults(
    train, short_runs, tmp_path, monkeypatch
):
    module = importlib.import_module(DREAMBOOTH)
    shown = []
    honest = module.generate_images

    def generate_images(accelerator, pipeline, calls, **rest):
        images = honest(accelerator, pipeline, calls, **rest)
        shown.append((calls, images))
        return images

    monkeypatch.setattr(module, "generate_images", generate_images)
    file = tmp_path / "prompts.json"
    file.write_text(json.dumps([{"prompt": "red", "lora_scale": 0}, {"prompt": "red"}, "red --s 1 --g 2"]))
    flags = [*short_runs[DREAMBOOTH], "--learning_rate", 0.1, "--validation_prompts", file]
    flags += ["--validation_num_inference_steps", 2, "--validation_guidance_scale", 1.5]
    train(DREAMBOOTH, *flags, "--output_dir", tmp_path / "run")
    (calls, before), (_, after) = shown
    settings = [(call["num_inference_steps"], call["guidance_scale"]) for call in calls]
    assert settings == [(2, 1.5), (2, 1.5), (1, 2.0)]
    assert before[0].tobytes() == before[1].tobytes() == after[0].tobytes()
    assert after[1].tobytes() != after[0].tobytes()
