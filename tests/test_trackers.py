"""What TensorBoard and wandb have of a run is what metrics.jsonl and validation/ say."""

import base64
import io
import json
import re
import shutil

import numpy as np
import pytest
from PIL import Image
from safetensors import safe_open
from test_family import SCRIPTS
from wandb.sdk.data_types._private import MEDIA_TMP


PROMPT = "a red circle on the left of <b>a blue square</b> at 100 %"
STEPS = [1, 2, 3, 4]


def metrics_of(run):
    return [json.loads(line) for line in (run / "metrics.jsonl").open()]


def events_of(run):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    (folder,) = [path for path in (run / "logs").iterdir() if path.is_dir() and path.name != "wandb"]
    return EventAccumulator(str(folder), size_guidance={"images": 0}).Reload()


def history_of(folder):
    """The history of an offline run of wandb: [{key: value}], read from its log of records.

    The format is LevelDB's: blocks of 32 KiB after 7 bytes of header; a record in a block has a checksum (4 bytes), a
    length (2), a kind (1; 1 is whole, 2 first part, 3 middle, 4 last) and data, here a protobuf.
    """
    from wandb.proto.wandb_internal_pb2 import Record

    (path,) = folder.glob("wandb/offline-run-*/*.wandb")
    data, at, parts, rows = path.read_bytes(), 7, b"", []
    while at + 7 <= len(data):
        if 2**15 - at % 2**15 < 7:  # no room for a record's header: zeros
            at += 2**15 - at % 2**15
            continue
        length, kind = int.from_bytes(data[at + 4 : at + 6], "little"), data[at + 6]
        parts = (b"" if kind in (1, 2) else parts) + data[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):
            record = Record.FromString(parts)
            if record.WhichOneof("record_type") == "history":
                items = record.history.item
                rows.append({i.key or "/".join(i.nested_key): json.loads(i.value_json) for i in items})
    return rows


@pytest.mark.parametrize("script", SCRIPTS)
def test_trackers_show_the_curves_and_the_pictures_of_the_run(
    script, train, short_runs, pictures, tmp_path, wandb_dir
):
    run = tmp_path / "run"
    extra = ["--validation_prompt", PROMPT, "--validation_steps", 2, "--num_validation_images", 2]
    extra += ["--optimizer", "prodigy", "--learning_rate", 1] if script == SCRIPTS[0] else []
    extra += ["--validation_image", pictures / "1.png"] if script in ("train_omini", "train_influxedit") else []
    extra += ["--validation_width", 32, "--validation_height", 32] if script == "train_influxedit" else []
    shutil.rmtree(MEDIA_TMP.name, ignore_errors=True)  # the system's temporary folder may be full, or swept
    train(script, *short_runs[script], "--report_to", "all", "--max_train_steps", 4, *extra, "--output_dir", run)
    rows = metrics_of(run)
    assert [row["step"] for row in rows] == STEPS
    assert {"loss", "lr", "grad_norm", "images_per_second", "peak_memory_gb"} <= rows[0].keys()
    assert ("prodigy_d" in rows[0]) == (script == SCRIPTS[0])

    events = events_of(run)
    history = history_of(wandb_dir)
    for name in rows[0].keys() - {"step"}:
        expected = [(row["step"], row[name]) for row in rows]
        scalars = [(event.step, event.value) for event in events.Scalars(name)]
        assert scalars == [(step, pytest.approx(value, rel=1e-6)) for step, value in expected]  # float32
        assert [(row["_step"], row[name]) for row in history if name in row] == expected

    drawn = {int(path.stem[5:]): path for path in (run / "validation").iterdir()}
    assert sorted(drawn) == [0, 2, 4]
    for event in events.Images("validation"):
        (run / "shown.png").write_bytes(event.encoded_image_string)
        assert np.array_equal(np.asarray(Image.open(run / "shown.png")), np.asarray(Image.open(drawn.pop(event.step))))
    assert not drawn
    texts = {e.step: e.tensor_proto.string_val[0].decode() for e in events.Tensors("validation/text_summary")}
    shown = {row["_step"]: row for row in history if "validation/captions" in row}
    assert sorted(texts) == sorted(shown) == [0, 2, 4]
    for step, row in shown.items():
        captions = row["validation/captions"]
        assert all(PROMPT in caption and caption.endswith(f"step {step}") for caption in captions)
        assert {0, 1} == {int(seed) for caption in captions for seed in re.findall(r"seed (\d+)", caption)}
        assert texts[step].splitlines() == [f"1. {caption}" for caption in captions]
        assert len(row["validation/filenames"]) == len(captions)
        for name in row["validation/filenames"]:
            (file,) = wandb_dir.glob(f"wandb/offline-run-*/files/{name}")
            assert Image.open(file).size == (32, 32)

    (lora,) = run.glob("*.safetensors")
    with safe_open(lora, "pt") as opened:
        thumbnail = opened.metadata()["modelspec.thumbnail"]
    last = io.BytesIO()
    Image.open(file).save(last, format="JPEG")
    assert thumbnail == f"data:image/jpeg;base64,{base64.b64encode(last.getvalue()).decode()}"


def test_a_resumed_run_shows_no_step_twice(train, short_runs, tmp_path):
    """Four steps, then again from the checkpoint of the second: TensorBoard forgets the third and fourth."""
    script = SCRIPTS[0]
    flags = [*short_runs[script], "--report_to", "tensorboard", "--checkpointing_steps", 2, "--output_dir", tmp_path]
    train(script, *flags, "--max_train_steps", 4)
    first = metrics_of(tmp_path)
    shutil.rmtree(tmp_path / "checkpoint-4")  # as if killed before it was written
    train(script, *flags, "--max_train_steps", 4, "--resume_from_checkpoint", "latest")
    rows = metrics_of(tmp_path)
    for name in ("loss", "images_per_second"):
        scalars = [(event.step, event.value) for event in events_of(tmp_path).Scalars(name)]
        assert scalars == [(row["step"], pytest.approx(row[name], rel=1e-6)) for row in rows]
    assert rows[:2] == first[:2]
    assert rows[2]["images_per_second"] != first[2]["images_per_second"]


def test_a_resumed_run_goes_on_with_its_run_of_wandb(train, short_runs, tmp_path, wandb_dir):
    script = SCRIPTS[0]
    flags = [*short_runs[script], "--report_to", "wandb", "--checkpointing_steps", 1, "--output_dir", tmp_path / "run"]
    train(script, *flags, "--max_train_steps", 1)
    train(script, *flags, "--max_train_steps", 2, "--resume_from_checkpoint", "latest")
    ids = {path.name.split("-")[3] for path in wandb_dir.glob("wandb/offline-run-*")}  # -1 follows within a second
    assert len(ids) == 1
