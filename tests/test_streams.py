"""Streams: every sample once per epoch, the same sequence after an interruption, bad samples named."""

import io
import json
import os
import pickle
import random
import shutil
import signal
import subprocess
import sys
import tarfile
from collections import Counter

from common.checkpoints import file_changes
from common.data import SkippedSamples, StreamedBatches, check_captions, open_stream

import datasets
import pytest
import torch
from conftest import ROOT
from PIL import Image
from safetensors.torch import load_file
from torch.utils.data import DataLoader

from examples.toy.world import caption, draw, random_scene


SCRIPTS = ["train_dreambooth_flux_advanced", "train_influxedit", "train_omini", "train_twinflow"]


def png(image):
    buffer = io.BytesIO()
    image.save(buffer, format="PNG")
    return buffer.getvalue()


def write_part(path, samples):
    """A tar or a parquet file of [(key, {ending or column: bytes})]."""
    if path.suffix == ".tar":
        with tarfile.open(path, "w") as tar:
            for key, files in samples:
                for ending, data in files.items():
                    member = tarfile.TarInfo(f"{key}.{ending}")
                    member.size = len(data)
                    tar.addfile(member, io.BytesIO(data))
        return
    rows = [
        {"image": {"bytes": files["png"], "path": None}, "text": json.loads(files["json"])["prompt"]}
        for _, files in samples
    ]
    datasets.Dataset.from_list(rows).to_parquet(path)


def sample_of(i, image=None):
    image = image or Image.new("RGB", (16, 16), (i % 256, i // 256, 0))
    return f"{i:04d}", {"png": png(image), "json": json.dumps({"prompt": str(i)}).encode()}


def write_parts(folder, kind, lengths):
    """The paths of parts with so many samples each, whose captions are counted through."""
    folder.mkdir()
    paths = []
    start = 0
    for number, length in enumerate(lengths):
        path = folder / f"{number:03d}.{kind}"
        write_part(path, [sample_of(start + i) for i in range(length)])
        paths.append(path)
        start += length
    return paths


def stream_of(paths):
    stream, problems = open_stream(
        "parquet" if paths[0].suffix == ".parquet" else "webdataset",
        source="--data_files",
        image_columns={"image": ("image", "png")},
        data_files=[str(path) for path in paths],
    )
    assert stream and not problems, problems
    return stream


def sample(example, epoch, index):
    return {"id": int(example.caption), "epoch": epoch, "index": index}


def batches_of(stream, sample=sample, *, rank=0, processes=1, begun_with=None, start=0, stop=0, places=None, **more):
    settings = {"batch_size": 2, "shuffle_buffer": 4, "seed": 0} | more
    batches = StreamedBatches(stream, sample, process_index=rank, num_processes=processes, **settings)
    batches.begun_with = begun_with or processes
    batches.start, batches.stop, batches.places = start, stop, places or {}
    return batches


def seen_by(batches):
    return [list(zip(*(batch[name].tolist() for name in ("epoch", "index", "id")), strict=True)) for batch in batches]


PARTS = [("tar", [5, 3, 4, 2]), ("parquet", [5, 3, 4]), ("tar", [9])]


@pytest.mark.parametrize(("kind", "lengths"), PARTS)
@pytest.mark.parametrize("workers", [0, 2])
def test_two_processes_see_every_sample_once_per_epoch(tmp_path, kind, lengths, workers):
    stream = stream_of(write_parts(tmp_path / "data", kind, lengths))
    seen = []
    for rank in range(2):
        batches = batches_of(stream, rank=rank, processes=2, stop=sum(lengths) * 2, num_threads=workers)
        loader = DataLoader(batches, batch_size=None, num_workers=min(1, workers))
        own = [each for batch in seen_by(loader) for each in batch]
        assert max(epoch for epoch, *_ in own) >= 2
        seen += own
    for epoch in (0, 1):
        assert Counter(i for e, _, i in seen if e == epoch) == Counter(range(sum(lengths)))
        indices = [index for e, index, _ in seen if e == epoch]
        assert len(set(indices)) == len(indices)  # which crops and mirroring are drawn by
    orders = [[i for e, _, i in seen if e == epoch] for epoch in (0, 1)]
    assert orders[0] != orders[1]


@pytest.mark.parametrize(("kind", "lengths"), PARTS)
def test_a_stream_goes_on_where_it_was(tmp_path, kind, lengths):
    """After every micro-step, in the numbers of a checkpoint, also read by threads: the same samples in batches."""
    stream = stream_of(write_parts(tmp_path / "data", kind, lengths))
    for rank in range(2):
        whole = list(batches_of(stream, rank=rank, processes=2, stop=9))
        expected = seen_by(whole)
        for step in range(1, 9):
            places = json.loads(json.dumps(whole[step - 1]["stream"]))
            go_on = {"rank": rank, "processes": 2, "start": step, "stop": 9, "places": places}
            assert seen_by(batches_of(stream, **go_on)) == expected[step:]
        assert seen_by(batches_of(stream, **go_on | {"start": 8}, num_threads=2)) == expected[8:]
        assert seen_by(batches_of(stream, rank=rank, processes=2, stop=9, num_threads=3)) == expected


@pytest.mark.parametrize("processes", [1, 4])
def test_another_number_of_processes_goes_on_with_the_same_batches(tmp_path, processes):
    stream = stream_of(write_parts(tmp_path / "data", "tar", [5, 3, 4, 2]))
    whole = {}
    places = {}
    for rank in range(2):
        for step, batch in enumerate(batches_of(stream, rank=rank, processes=2, stop=12)):
            whole[2 * step + rank] = seen_by([batch])[0]
            if step == 3:
                places |= batch["stream"]
    assert set(places) == {"0", "1"}
    steps = range(8 // processes, 24 // processes)
    for rank in range(processes):
        go_on = {"start": steps.start, "stop": steps.stop, "places": places}
        seen = seen_by(batches_of(stream, rank=rank, processes=processes, begun_with=2, **go_on))
        assert seen == [whole[step * processes + rank] for step in steps]


def test_reading_goes_on_without_decoding_what_was_seen(tmp_path):
    stream = stream_of(write_parts(tmp_path / "data", "tar", [40]))
    made = []

    def count(example, epoch, index):
        made.append(index)
        return sample(example, epoch, index)

    *_, last = batches_of(stream, stop=15)
    assert len(list(batches_of(stream, count, start=15, stop=16, places=last["stream"]))) == 1
    assert len(made) == 2


@pytest.mark.parametrize("workers", [0, 2])
def test_bad_samples_are_left_out_and_named(tmp_path, workers):
    good = [sample_of(i) for i in range(12)]
    no_json = ("bad-json", {"png": good[0][1]["png"], "json": b"{"})
    no_image = ("bad-image", {"png": b"no image", "json": good[0][1]["json"]})
    first, second = tmp_path / "0.tar", tmp_path / "1.tar"
    write_part(first, [*good[:3], no_json, good[3], no_image, *good[4:6]])
    write_part(second, good[6:12])
    whole = second.read_bytes()
    second.write_bytes(whole[: whole.index(b"0009.png") + 512 + 20])  # within the tenth sample's image
    stream = stream_of([first, second])

    def decode(example, epoch, index):
        example.image()
        return sample(example, epoch, index)

    found = list(batches_of(stream, decode, stop=10, num_threads=workers))
    seen = Counter((epoch, i) for batch in seen_by(found) for epoch, _, i in batch)
    assert {i: seen[0, i] for i in range(9)} == dict.fromkeys(range(9), 1)
    assert not {i for epoch, i in seen if epoch == 0} - set(range(9))
    left_out = [text for batch in found for text in batch["left_out"]]
    once = [text for text in left_out if "bad-json" in text]
    assert once and "bad-json" in once[0] and str(first) in once[0]
    assert any("bad-image" in text and str(first) in text for text in left_out)
    assert any(str(second) in text and "all that follow" in text for text in left_out)
    for step in range(1, 10):
        rest = list(batches_of(stream, decode, start=step, stop=10, places=found[step - 1]["stream"]))
        assert seen_by(rest) == seen_by(found)[step:]
        assert [batch["left_out"] for batch in rest] == [batch["left_out"] for batch in found[step:]]


def test_text_that_is_none_leaves_out_one_sample(tmp_path):
    samples = [(f"{i:04d}", {"png": sample_of(i)[1]["png"], "txt": str(i).encode()}) for i in range(9)]
    samples[6][1]["txt"] = "sch\xf6n".encode("latin-1")
    write_part(tmp_path / "0.tar", samples)

    def check(example, epoch, index):
        assert not check_captions([example], default="a default"), "refused"
        return sample(example, epoch, index)

    (batch,) = batches_of(stream_of([tmp_path / "0.tar"]), check, batch_size=9, shuffle_buffer=9, stop=1)
    assert sorted(batch["id"].tolist()) == [0, 1, 2, 3, 4, 5, 7, 8]
    assert ["0006 of" in text and "refused" in text for text in batch["left_out"]] == [True]


def test_a_stream_goes_on_among_many_bad_samples(tmp_path):
    """What ends a run at its beginning, a hundred samples of which none can be used, ends none that is resumed."""
    stream = stream_of(write_parts(tmp_path / "data", "tar", [2, 120]))

    def fail(example, epoch, index):
        if int(example.caption) >= 2:
            raise OSError("damaged")
        return sample(example, epoch, index)

    found = list(batches_of(stream, fail, stop=2, seed=2))
    assert len(found[1]["left_out"]) > 100
    (resumed,) = batches_of(stream, fail, start=1, stop=2, seed=2, places=found[0]["stream"])
    assert seen_by([resumed]) == seen_by(found[1:])


def test_a_stream_can_be_read_by_a_process_that_is_not_forked(tmp_path):
    batches = batches_of(stream_of(write_parts(tmp_path / "data", "tar", [5])), stop=3)
    assert seen_by(pickle.loads(pickle.dumps(batches))) == seen_by(batches)


def test_a_stream_of_which_nothing_can_be_used_ends(tmp_path):
    def fail(example, epoch, index):
        raise OSError("damaged")

    stream = stream_of(write_parts(tmp_path / "data", "tar", [30]))
    with pytest.raises(ValueError, match="none of .* can be used.*damaged"):
        list(batches_of(stream, fail, stop=1))
    with pytest.raises(ValueError, match="fewer processes"):
        list(batches_of(stream, examples_of=lambda row, name: [], stop=1))


def test_a_batch_has_one_group_and_may_be_filled_up(tmp_path):
    stream = stream_of(write_parts(tmp_path / "data", "tar", [11]))

    def group(example, epoch, index):
        if example.caption == "3":
            raise ValueError("too small")
        return int(example.caption) % 2

    settings = {"group_of": group, "batch_size": 4, "shuffle_buffer": 100, "stop": 3}
    found = list(batches_of(stream, **settings))
    assert all(len({i % 2 for i in batch["id"].tolist()}) == 1 for batch in found)
    assert sorted(i for batch in found for i in batch["id"].tolist()) == [0, 1, 2, 4, 5, 6, 7, 8, 9, 10]
    assert [text for batch in found for text in batch["left_out"] if "too small" in text]
    filled = list(batches_of(stream, fills_batches=True, **settings))
    assert [len(batch["id"]) for batch in filled] == [4, 4, 4]
    for batch, short in zip(filled, found, strict=True):
        assert set(batch["id"].tolist()) == set(short["id"].tolist())


def test_skipped_samples_of_steps_that_are_taken_again_are_written_again(tmp_path):
    skipped = SkippedSamples(tmp_path, 0, is_first=True)
    for step in (1, 2, 3):
        assert skipped.add(step, [f"sample {step}: bad"]) == [f"sample {step}: bad"]
    resumed = SkippedSamples(tmp_path, 2, is_first=True)
    resumed.add(3, ["sample 3: bad"])
    lines = [json.loads(line) for line in (tmp_path / "skipped_samples.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2, 3]
    assert "3" in skipped.summary()
    assert len(skipped.add(4, ["x"] * 100)) == 7  # ten are told, the others written and counted
    assert SkippedSamples(tmp_path / "none", 0, is_first=True).summary() == ""


def test_other_files_are_another_run(tmp_path):
    paths = write_parts(tmp_path / "data", "tar", [3, 2])
    record = stream_of(paths).record()
    moved = shutil.copytree(tmp_path / "data", tmp_path / "moved")
    assert not file_changes(record, stream_of(sorted(moved.iterdir())).record())
    write_part(moved / "001.tar", [sample_of(7), sample_of(8)])
    assert "001.tar" in file_changes(record, stream_of(sorted(moved.iterdir())).record())[0]
    assert "001.tar" in file_changes(record, stream_of(paths[:1]).record())[0]


# ---------------------------------------------------------------------------------------------------------------------
# Trainers
# ---------------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def scenes(tmp_path_factory):
    """Three tars of 4, 3 and 4 pictures of two shapes with a target and a caption each; one picture is damaged."""
    folder = tmp_path_factory.mktemp("scenes")
    rng = random.Random(0)
    for number, count in enumerate((4, 3, 4)):
        samples = []
        for i in range(count):
            before, after = random_scene(rng), random_scene(rng)
            size = (32, 32) if i % 2 else (48, 32)
            image = b"damaged" if (number, i) == (1, 1) else png(draw(before, *size))
            files = {"png": image, "target.png": png(draw(after, *size))}
            samples.append((f"{number}{i}", files | {"json": json.dumps({"prompt": caption(after)}).encode()}))
        write_part(folder / f"{number}.tar", samples)
    return folder


@pytest.fixture
def stream_flags(short_runs, scenes):
    """{trainer: flags of a run over the tars}."""
    found = {}
    for script, flags in short_runs.items():
        flags = list(flags)
        for flag in ("--instance_data_dir", "--train_data_dir", "--target_data_dir", "--caption_data_dir"):
            if flag in flags:
                place = flags.index(flag)
                del flags[place : place + 2]
        flags += ["--data_files", scenes / "*.tar", "--streaming", "--image_column", "png", "--shuffle_buffer", 3]
        found[script] = [*flags, "--seed", 0, "--checkpointing_steps", 2]
    found["train_influxedit"] += ["--target_column", "target.png", "--random_flip"]
    found["train_dreambooth_flux_advanced"] += ["--aspect_ratio_buckets", "32,48;32,32"]
    return found


def results(folder):
    return {name: value for path in folder.glob("*.safetensors") for name, value in load_file(path).items()}


def assert_same_results(folder, other):
    expected = results(folder)
    found = results(other)
    assert expected and expected.keys() == found.keys()
    assert all(torch.equal(expected[name], found[name]) for name in expected)


def skipped_in(folder):
    return sorted((folder / "skipped_samples.jsonl").read_text().splitlines())


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_trainer_streams_skips_and_goes_on(train, stream_flags, scenes, tmp_path, script, capfd):
    flags = [*stream_flags[script], "--max_train_steps", 10]
    train(script, *flags, "--output_dir", tmp_path / "whole")
    out = capfd.readouterr().out
    assert "a stream of 3 files" in out and "skipped_samples.jsonl" in out
    assert any("11 of" in line and "1.tar" in line for line in skipped_in(tmp_path / "whole"))
    shutil.copytree(tmp_path / "whole" / "checkpoint-2", tmp_path / "parts" / "checkpoint-2")
    again = [*flags, "--output_dir", tmp_path / "parts", "--resume_from_checkpoint", "latest"]
    train(script, *again, "--dataloader_num_workers", 2)
    assert_same_results(tmp_path / "whole", tmp_path / "parts")


def test_a_resumed_stream_has_the_same_files(train, stream_flags, scenes, tmp_path, capfd):
    script = "train_dreambooth_flux_advanced"
    moved = shutil.copytree(scenes, tmp_path / "moved")
    flags = [*stream_flags[script], "--data_files", moved / "*.tar", "--output_dir", tmp_path / "run"]
    train(script, *flags)
    write_part(moved / "2.tar", [sample_of(0), sample_of(1)])
    with pytest.raises(SystemExit):
        train(script, *flags, "--max_train_steps", 4, "--resume_from_checkpoint", "latest")
    assert "1 of 3 files of data (2.tar)" in capfd.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize("script", SCRIPTS)
def test_two_processes_killed_while_they_stream_end_with_the_same_weights(runs, stream_flags, tmp_path, script):
    flags = [*stream_flags[script], "--max_train_steps", 10, "--dataloader_num_workers", 2]
    assert runs.run(script, [*flags, "--output_dir", tmp_path / "whole"], processes=2) == 0, runs.output()[-3000:]
    parts = [*flags, "--output_dir", tmp_path / "parts"]
    for step in (2, 6):
        more = ["--resume_from_checkpoint", "latest"] if step > 2 else []
        runs.start(script, [*parts, *more], processes=2)
        runs.wait_for(lambda step=step: (tmp_path / "parts" / f"checkpoint-{step}").is_dir())
        os.killpg(runs.pid, signal.SIGKILL)
        runs.end()
    again = [*parts, "--resume_from_checkpoint", "latest"]
    assert runs.run(script, again, processes=2) == 0, runs.output()[-3000:]
    assert_same_results(tmp_path / "whole", tmp_path / "parts")
    assert skipped_in(tmp_path / "whole") == skipped_in(tmp_path / "parts")


@pytest.mark.slow
@pytest.mark.parametrize("script", SCRIPTS)
def test_an_epoch_of_5000_samples_is_seen_once_in_flat_memory_and_after_a_kill_ends_alike(script):
    program = ROOT / "tests" / "benchmarks" / "streamed_training.py"
    command = [sys.executable, program, script, "--samples", "5000", "--tars", "5", "--timed_steps", "0"]
    done = subprocess.run(command, capture_output=True, text=True)
    print(done.stdout)
    assert done.returncode == 0, done.stdout + done.stderr[-3000:]
