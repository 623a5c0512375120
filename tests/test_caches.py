"""What frozen encoders make lies on the disk, once, for all processes: nothing of it travels or fills the memory."""

import copy
import ctypes
import functools
import gc
import importlib
import json
import os
import random
import resource
import shutil
from pathlib import Path
from types import SimpleNamespace

import common.latents
from common.checkpoints import LostFileError
from common.data import Size
from common.latents import TensorCache, encode_by_size, encode_moments, images_per_batch
from common.models import OBJECTS_PER_MESSAGE, gather_objects
from common.text_encoders import (
    PROMPTS_PER_BATCH,
    PROMPTS_PER_PASS,
    PromptEncoder,
    is_quantized,
    offload_options,
    place_encoders,
    prompts_per_batch,
    quantize_text_encoders,
)

import numpy as np
import pytest
import tiny_backbones
import torch
from accelerate import Accelerator
from safetensors.torch import load_file

from examples.toy.world import caption, draw, random_scene


SCRIPTS = ["train_dreambooth_flux_advanced", "train_omini", "train_influxedit", "train_twinflow"]
ONE_QUICK = [SCRIPTS[0], *(pytest.param(script, marks=pytest.mark.slow) for script in SCRIPTS[1:])]
CPU = torch.device("cpu")
GPU = torch.device("cuda")


def results(folder):
    files = sorted(folder.glob("*.safetensors"))
    return {f"{file.name}/{key}": value for file in files for key, value in load_file(file).items()}


def assert_equal(found, expected):
    assert found.keys() == expected.keys()
    assert found
    assert all(torch.equal(found[key], expected[key]) for key in found)


# ---- several processes ----


COLLECTIVES = (
    "all_gather",
    "all_gather_into_tensor",
    "all_reduce",
    "broadcast",
    "gather",
    "reduce",
    "scatter",
    "send",
)


def num_bytes(value):
    """Of the tensors in the arguments of a collective."""
    if isinstance(value, torch.Tensor):
        return value.nbytes
    if isinstance(value, list | tuple):
        return sum(num_bytes(part) for part in value)
    return 0


def watch(trainer, folder):
    """Writes what the largest collective of this process carried and the peak of its memory, once it is done."""
    from torch import distributed
    from torch.distributed import distributed_c10d

    # large blocks return to the system when they are freed: what the C library keeps of an encoder's passes comes to
    # 30 MiB after 500 prompts, and no more after 2,000
    M_MMAP_THRESHOLD = -3
    ctypes.CDLL(None).mallopt(M_MMAP_THRESHOLD, 2**16)
    main, sizes = trainer.main, [0]

    def watched(honest, *args, **kwargs):
        sizes.append(num_bytes(args) + num_bytes(list(kwargs.values())))
        return honest(*args, **kwargs)

    for name in COLLECTIVES:
        wrapped = functools.partial(watched, getattr(distributed, name))
        setattr(distributed, name, wrapped)
        setattr(distributed_c10d, name, wrapped)

    def watched_main(args):
        rank = os.environ["RANK"]
        main(args)
        gc.collect()
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        found = {"largest": max(sizes), "count": len(sizes), "peak": peak}
        Path(folder, f"{rank}.json").write_text(json.dumps(found))

    trainer.main = watched_main


def captioned_pictures(folder, count):
    """So many small pictures, each with a caption of its own."""
    folder.mkdir(parents=True)
    rng = random.Random(0)
    for i in range(count):
        scene = random_scene(rng)
        draw(scene, 32, 32).save(folder / f"{i:04}.png")
        (folder / f"{i:04}.txt").write_text(f"{caption(scene)}, number {i}")
    return folder


def flags_with(script, short_runs, pictures):
    data = "--train_data_dir" if "twinflow" in script else "--instance_data_dir"
    flags = [*short_runs[script], data, pictures, "--cache_latents", "--max_sequence_length", 512]
    if script == "train_influxedit":
        targets = shutil.copytree(pictures, pictures.with_name("targets"))
        flags += ["--target_data_dir", targets, "--caption_data_dir", targets]
    return flags


def watched_run(runs, script, flags, folder):
    """What `watch` wrote of each of two processes."""
    folder.mkdir()
    flags = [*flags, "--output_dir", folder / "run"]
    assert runs.run(script, flags, watch, str(folder), processes=2, timeout=1500) == 0, runs.output()[-3000:]
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(2)]


@pytest.mark.slow
@pytest.mark.parametrize("script", SCRIPTS)
def test_nothing_that_is_encoded_passes_between_processes(train, runs, short_runs, tmp_path, script):
    """A single embedding has 64 KiB here, and there are twelve."""
    flags = flags_with(script, short_runs, captioned_pictures(tmp_path / "pictures", 12))
    found = watched_run(runs, script, flags, tmp_path / "two")
    largest = max(process["largest"] for process in found)
    print(f"{script}: the largest of {found[0]['count']} collectives carries {largest / 1024:.1f} KiB")
    assert found[0]["count"] > 3
    assert largest < 512 * 32 * 4


@pytest.mark.slow
@pytest.mark.parametrize("script", SCRIPTS)
def test_the_memory_of_a_process_does_not_grow_with_what_is_cached(train, runs, short_runs, tmp_path, script):
    peaks = {}
    for count in (20, 2000):
        folder = tmp_path / str(count)
        flags = flags_with(script, short_runs, captioned_pictures(folder / "pictures", count))
        found = watched_run(runs, script, flags, folder / "two")
        peaks[count] = [process["peak"] for process in found]
        largest = max(process["largest"] for process in found)
        text = ", ".join(f"{peak / 1024:.0f} MiB" for peak in peaks[count])
        print(f"{script}, {count} prompts and pictures: peaks of {text}; largest collective {largest / 1024:.0f} KiB")
        assert largest <= 2**20
    for small, large in zip(peaks[20], peaks[2000], strict=True):
        assert large <= 1.1 * small


def test_gathered_objects_keep_their_order_in_messages_of_a_bounded_size(runs, tmp_path):
    assert runs.run(None, [], gather_many, str(tmp_path), processes=2) == 0, runs.output()[-3000:]
    found = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(2)]
    expected = [[0, i] for i in range(2500)] + [[1, i] for i in range(40)]
    assert [gathered for gathered, _ in found] == [expected, expected]
    assert max(largest for _, largest in found) <= OBJECTS_PER_MESSAGE


def gather_many(trainer, folder):
    from torch import distributed

    distributed.init_process_group("gloo")
    rank = distributed.get_rank()
    honest, counts = distributed.all_gather_object, [0]

    def counted(parts, value, **kwargs):
        counts.append(len(value) if isinstance(value, list) else 0)
        honest(parts, value, **kwargs)

    distributed.all_gather_object = counted
    gathered = gather_objects([(rank, i) for i in range((2500, 40)[rank])])
    Path(folder, f"{rank}.json").write_text(json.dumps([gathered, max(counts)]))
    distributed.destroy_process_group()


def test_a_folder_that_machines_do_not_share_is_one_message(tmp_path):
    cache = TensorCache(tmp_path, b"a model")
    cache.save({"value": torch.ones(2)}, b"here")
    two = SimpleNamespace(num_processes=2)
    cache.check_shared(two, [cache.digest(b"here")])
    with pytest.raises(SystemExit, match="a disk that all machines share"):
        cache.check_shared(two, [cache.digest(b"here"), cache.digest(b"of another machine")])


# ---- what stays on the disk, and how long ----


@pytest.mark.parametrize("script", [SCRIPTS[0], *(pytest.param(s, marks=pytest.mark.slow) for s in SCRIPTS[1:3])])
def test_a_run_deletes_what_it_encoded_and_an_interrupted_one_finds_it(
    train, short_runs, tmp_path, script, monkeypatch
):
    flags = [*short_runs[script], "--cache_latents", "--mixed_precision", "bf16", "--output_dir", tmp_path / "run"]
    trainer = importlib.import_module(script)
    with monkeypatch.context() as patch:
        patch.setattr(trainer, "load_noise_scheduler" if "dreambooth" in script else "load_scheduler", stop_here)
        with pytest.raises(Stopped):
            train(script, *flags)
    encoded = tmp_path / "run" / "encoded"
    dtypes = {value.dtype for file in encoded.iterdir() for value in load_file(file).values()}
    assert dtypes == {torch.bfloat16, torch.uint8}  # uint8: what `EncodedIndex` notes
    seen = []
    honest = PromptEncoder.encode_with
    monkeypatch.setattr(PromptEncoder, "encode_with", lambda self, *call: seen.append(call) or honest(self, *call))
    train(script, *flags)
    assert not seen
    assert not encoded.exists()


class Stopped(Exception):
    pass


def stop_here(*args):
    raise Stopped


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_disk_without_room_for_what_is_encoded_is_refused(train, short_runs, tmp_path, script, monkeypatch, capsys):
    room = SimpleNamespace(disk_usage=lambda folder: SimpleNamespace(free=20_000))
    monkeypatch.setattr(common.latents, "shutil", room)
    flags = [*short_runs[script], "--cache_latents", "--max_sequence_length", 256, "--output_dir", tmp_path / "run"]
    with pytest.raises(SystemExit) as stop:
        train(script, *flags)
    assert stop.value.code == 2
    message = capsys.readouterr().err
    assert "--output_dir" in message
    assert "GiB are free: choose another disk" in message
    assert not (tmp_path / "run").exists()


def test_a_file_that_is_gone_or_damaged_is_named_and_what_is_in_use_stays_mapped(tmp_path):
    cache = TensorCache(tmp_path, b"a model")
    for key in (b"used", b"gone", b"damaged"):
        cache.save({"value": torch.ones(2)}, key)
    assert torch.equal(cache.load(b"used")["value"], torch.ones(2))
    cache.path(b"used").unlink()
    cache.path(b"gone").unlink()
    cache.path(b"damaged").write_bytes(b"no tensors")
    assert torch.equal(cache.load(b"used")["value"], torch.ones(2))
    for key, state in ((b"gone", "was deleted or moved"), (b"damaged", "is damaged")):
        with pytest.raises(LostFileError, match=f"{cache.path(key)}.*{state}"):
            cache.load(key)


def test_embeddings_of_a_trained_encoder_are_of_its_weights_at_that_time(tiny_pipeline, tmp_path):
    """Also of two moments between which only what no fingerprint looks at has changed."""

    def frozen():
        encoder = PromptEncoder(
            Accelerator(cpu=True),
            pipeline,
            torch.float32,
            max_sequence_length=8,
            folder=tmp_path,
            trained={"clip_l"},
            keep_encoders=True,
        )
        encoder.freeze(["red"], keep=True)
        return encoder.cached["clip_l"]["red"], encoder.encode_with("clip_l", ["red"])

    pipeline = copy.deepcopy(tiny_pipeline)
    with torch.no_grad():
        first, _ = frozen()
        pipeline.text_encoder.get_input_embeddings().weight[1:].mul_(1.5)
        second, expected = frozen()
    assert torch.equal(second, expected)
    assert not torch.equal(first, second)


# ---- in batches ----


def test_images_of_a_size_are_encoded_together_on_an_accelerator(tiny):
    """Whatever else is there: each has the numbers of its place in a batch of the same shape."""
    shapes = [(32, 48), (48, 32), (32, 48), (32, 48), (48, 32)]
    images = [torch.rand(3, *shape) * 2 - 1 for shape in shapes]
    counts = []

    def encode(batch, batch_size):
        counts.append((len(batch), batch_size, tuple(batch.shape[-2:])))
        return encode_moments(tiny.vae, batch, batch_size)

    together = encode_by_size(encode, images, GPU)
    assert counts == [(8, 8, (32, 48)), (8, 8, (48, 32))]
    one_by_one = encode_by_size(encode, images, CPU)
    assert counts[2:] == [(1, 1, shapes[i]) for i in (0, 2, 3, 1, 4)]
    for image, batched, alone in zip(images, together, one_by_one, strict=True):
        expected = encode_moments(tiny.vae, image[None])[0]
        assert torch.equal(alone, expected)
        torch.testing.assert_close(batched, expected, atol=1e-4, rtol=1e-4)


def test_a_batch_has_at_most_the_pixels_of_one_large_image():
    assert [images_per_batch(GPU, Size(side, side)) for side in (256, 512, 1024, 2048)] == [8, 4, 1, 1]
    assert images_per_batch(GPU) == 8
    assert images_per_batch(CPU) == images_per_batch(CPU, Size(256, 256)) == 1


# ---- large text encoders ----


def test_offloaded_layers_are_copied_for_many_prompts_and_ahead_of_their_use():
    assert prompts_per_batch(GPU, True) == PROMPTS_PER_PASS > PROMPTS_PER_BATCH
    assert prompts_per_batch(GPU, False) == prompts_per_batch(CPU, True) == PROMPTS_PER_BATCH
    assert offload_options(CPU, 1, 10) == {}  # a CPU has no streams
    options = offload_options(GPU, 9, 20)
    assert options["use_stream"]
    assert not options["low_cpu_mem_usage"]
    assert offload_options(GPU, 9, 17)["low_cpu_mem_usage"]  # pinning all takes it twice


@torch.no_grad()
@pytest.mark.parametrize(("kind", "bar"), [("nf4", 0.5), ("int8", 0.05)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_quantized_text_encoders_compute_nearly_the_same(kind, bar, dtype):
    pipeline = tiny_backbones.sd3().to(dtype)
    call = {"prompt_2": None, "prompt_3": None, "do_classifier_free_guidance": False, "max_sequence_length": 16}
    plain, _, pooled, _ = pipeline.encode_prompt(["a red circle"], **call)
    quantize_text_encoders(pipeline, dtype, kind)
    place_encoders(pipeline, CPU, offload=True)
    quantized = [
        name for name in pipeline.components if name.startswith("text") and is_quantized(getattr(pipeline, name))
    ]
    assert quantized == ["text_encoder_3"]
    embeds, _, same_pooled, _ = pipeline.encode_prompt(["a red circle"], **call)
    assert torch.equal(same_pooled, pooled)
    difference = ((embeds - plain).norm() / plain.norm()).item()
    print(f"{kind}, {dtype}: embeddings differ by {difference:.3f} (bar {bar})")
    assert 0 < difference < bar


@pytest.mark.parametrize("script", ONE_QUICK)
def test_a_quantized_text_encoder_trains_near_the_plain_one(train, short_runs, script, tmp_path):
    for name, extra in (
        ("plain", ()),
        ("nf4", ("--quantize_text_encoders", "nf4")),
        ("again", ("--quantize_text_encoders", "nf4", "--offload")),
        ("int8", ("--quantize_text_encoders", "int8", "--quantize_base", "nf4")),
    ):
        train(script, *short_runs[script], *extra, "--output_dir", tmp_path / name)
    plain, nf4, int8 = (losses(tmp_path / name) for name in ("plain", "nf4", "int8"))
    for name, found in (("nf4", nf4), ("int8", int8)):
        difference = np.abs(found / plain - 1).max()
        print(f"{name}: losses differ by {difference:.1e} (bar 0.2)")
        assert 0 < difference < 0.2
    assert_equal(results(tmp_path / "again"), results(tmp_path / "nf4"))


def losses(folder):
    return np.array([json.loads(line)["loss"] for line in (folder / "metrics.jsonl").open()])


def test_a_trained_t5_is_not_quantized(short_runs, tmp_path, capsys):
    flags = [*short_runs[SCRIPTS[0]], "--instance_prompt", "a TOK", "--train_text_encoder_ti", "--enable_t5_ti"]
    flags += ["--quantize_text_encoders", "nf4", "--output_dir", tmp_path]
    with pytest.raises(SystemExit) as stop:
        importlib.import_module(SCRIPTS[0]).parse_args([str(flag) for flag in flags])
    assert stop.value.code == 2
    message = capsys.readouterr().err
    assert "--quantize_text_encoders nf4" in message
    assert "--enable_t5_ti" in message
