"""--precompute_only fills the disk cache, and a later run of the same command maps it: no encoder, no image."""

import importlib
import json
import os
import shutil
import time
from types import SimpleNamespace

import common.latents
import common.text_encoders
from common.latents import CachedTensors, EncodedIndex, TensorCache
from common.models import hub_commit

import psutil
import pytest
import torch
from accelerate import Accelerator
from diffusers import AutoencoderKL
from safetensors.torch import load_file
from transformers import CLIPTextModel, T5EncoderModel


SCRIPTS = ["train_dreambooth_flux_advanced", "train_omini", "train_influxedit", "train_twinflow"]
ONE_QUICK = [SCRIPTS[0], *(pytest.param(script, marks=pytest.mark.slow) for script in SCRIPTS[1:])]


def results(folder):
    return {path.name: load_file(path) for path in sorted(folder.glob("*.safetensors"))}


@pytest.fixture
def loaded(monkeypatch):
    """The classes of the encoders that were loaded since it was last cleared."""
    names = []
    for kind in (AutoencoderKL, CLIPTextModel, T5EncoderModel):
        honest = kind.from_pretrained.__func__

        def load(cls, *args, honest=honest, **kwargs):
            names.append(cls.__name__)
            return honest(cls, *args, **kwargs)

        monkeypatch.setattr(kind, "from_pretrained", classmethod(load))
    return names


@pytest.fixture
def cached_flags(short_runs, tmp_path):
    keep = ["--cache_latents_to_disk", "--cache_text_encoder_outputs_to_disk", "--disk_cache_dir", tmp_path / "cache"]
    own = {"train_omini": ["--validation_split", 0.2], "train_dreambooth_flux_advanced": ["--validation_split", 0.2]}
    return {script: [*flags, *keep, *own.get(script, [])] for script, flags in short_runs.items()}


@pytest.mark.parametrize("script", ONE_QUICK)
def test_a_run_after_precomputing_loads_no_encoder_and_ends_in_the_same_weights(
    train, cached_flags, tmp_path, loaded, capsys, script
):
    flags = cached_flags[script]
    train(script, *flags, "--disk_cache_dir", tmp_path / "other", "--output_dir", tmp_path / "plain")
    loaded.clear()
    train(script, *flags, "--precompute_only", "--output_dir", tmp_path / "run")
    assert sorted(loaded) == ["AutoencoderKL", "CLIPTextModel", "T5EncoderModel"]
    said = capsys.readouterr().out
    assert str(tmp_path / "cache") in said
    assert "The same command without --precompute_only" in said
    assert not results(tmp_path / "run")
    loaded.clear()
    train(script, *flags, "--output_dir", tmp_path / "run")
    assert loaded == []
    trained, plain = results(tmp_path / "run"), results(tmp_path / "plain")
    assert trained.keys() == plain.keys()
    for name, tensors in plain.items():
        for key, value in tensors.items():
            assert value.equal(trained[name][key])


def test_what_another_learning_rate_needs_is_there_and_what_another_image_needs_is_not(
    train, cached_flags, pictures, tmp_path, loaded
):
    script = SCRIPTS[0]
    images = shutil.copytree(pictures, tmp_path / "images")
    flags = [
        *cached_flags[script],
        "--instance_data_dir",
        images,
        "--precompute_only",
        "--output_dir",
        tmp_path / "run",
    ]
    train(script, *flags)
    count = len(list((tmp_path / "cache").iterdir()))
    loaded.clear()
    train(script, *flags, "--learning_rate", 0.1, "--rank", 1, "--train_batch_size", 1)
    assert loaded == []
    assert len(list((tmp_path / "cache").iterdir())) == count
    shutil.copy(images / "1.png", images / "0.png")
    train(script, *flags)
    assert "AutoencoderKL" in loaded
    loaded.clear()
    train(script, *flags, "--resolution", 48)
    assert "AutoencoderKL" in loaded


def test_missing_files_and_pixels_that_are_made_otherwise_are_noticed(
    train, cached_flags, tmp_path, loaded, monkeypatch
):
    script = SCRIPTS[0]
    flags = [*cached_flags[script], "--precompute_only", "--output_dir", tmp_path / "run"]
    train(script, *flags)
    whole = {path.name for path in (tmp_path / "cache").iterdir()}
    for path in sorted((tmp_path / "cache").iterdir()):
        content = load_file(path)
        if set(content) == {"value"}:  # of an image or a prompt
            path.unlink()
    train(script, *flags)
    assert {path.name for path in (tmp_path / "cache").iterdir()} == whole
    loaded.clear()
    dataset = importlib.import_module(script).DreamBoothDataset
    honest = dataset.pixel_values
    monkeypatch.setattr(dataset, "pixel_values", lambda self, key: honest(self, key) / 2)  # another version's
    train(script, *flags)
    assert loaded == ["AutoencoderKL"]


@pytest.mark.slow
@pytest.mark.parametrize("script", SCRIPTS)
def test_two_processes_precompute_what_one_maps_and_a_killed_one_goes_on(runs, train, cached_flags, tmp_path, script):
    flags = [*cached_flags[script], "--output_dir", tmp_path / "run"]
    assert runs.run(script, [*flags, "--precompute_only"], die_at_third_file, processes=2) != 0
    begun = {path.name for path in (tmp_path / "cache").glob("*.safetensors")}
    assert begun
    assert runs.run(script, [*flags, "--precompute_only"], processes=2) == 0, runs.output()[-3000:]
    filled = {path.name for path in (tmp_path / "cache").glob("*.safetensors")}
    assert begun < filled
    train(script, *flags)
    assert {path.name for path in (tmp_path / "cache").glob("*.safetensors")} == filled


def die_at_third_file(trainer):
    import os
    import signal

    honest, count = common.latents.TensorCache.write, [0]

    def write(self, *args):
        honest(self, *args)
        count[0] += 1
        if count[0] == 3:
            os.kill(os.getpid(), signal.SIGKILL)

    common.latents.TensorCache.write = write


@pytest.mark.slow
def test_a_cache_of_20_000_images_is_found_in_seconds_and_not_read(tmp_path):
    """20 GB as their names say: each entry is another name of one file of a megabyte."""
    settings = {"data": [["a.png", "stamp", "hash"]]}
    flags = SimpleNamespace(pretrained_model_name_or_path=str(tmp_path), revision=None, cache_dir=None)
    index = EncodedIndex(tmp_path, flags, settings)
    cache = TensorCache(tmp_path, b"weights of a VAE")
    keys = list(range(20_000))
    pixels = {key: torch.tensor([float(key)]) for key in keys}
    digests = {key: cache.content_digest(value) for key, value in pixels.items()}
    moments = torch.arange(2**18, dtype=torch.float32)
    cache.write({"value": moments}, cache.path_of(digests[0]))
    for key in keys[1:]:
        os.link(cache.path_of(digests[0]), cache.path_of(digests[key]))
    accelerator = Accelerator(cpu=True)
    index.record(accelerator, "latents", CachedTensors(cache, digests))
    read = []

    def pixels_of(key):
        read.append(key)
        return pixels[key]

    before = psutil.Process().memory_info().rss
    started = time.perf_counter()
    found = index.find(accelerator, "latents", keys, pixels_of)
    seconds = time.perf_counter() - started
    megabytes = (psutil.Process().memory_info().rss - before) / 2**20
    print(f"{len(keys):,} entries found in {seconds:.1f} s (bar 20), {megabytes:.0f} MiB more in memory (bar 100)")
    assert found is not None
    assert list(found) == keys
    assert len(read) == 8
    assert seconds < 20
    assert megabytes < 100
    started = time.perf_counter()
    assert found[12_345].equal(moments)
    assert time.perf_counter() - started < 1


@pytest.mark.parametrize("script", SCRIPTS)
def test_precomputing_nothing_is_refused(short_runs, tmp_path, capsys, script):
    flags = [*short_runs[script], "--precompute_only", "--output_dir", tmp_path]
    with pytest.raises(SystemExit) as stop:
        importlib.import_module(script).parse_args([str(flag) for flag in flags])
    assert stop.value.code == 2
    assert "--cache_latents_to_disk" in capsys.readouterr().err


def test_the_commit_of_a_name_on_the_hub_is_that_of_the_local_cache(tmp_path):
    commit = "0123456789" * 4
    folder = tmp_path / "models--owner--name"
    (folder / "refs").mkdir(parents=True)
    (folder / "refs" / "main").write_text(commit)
    (folder / "snapshots" / commit).mkdir(parents=True)
    (folder / "snapshots" / commit / "model_index.json").write_text(json.dumps({}))
    args = SimpleNamespace(pretrained_model_name_or_path="owner/name", revision=None, cache_dir=tmp_path)
    assert hub_commit(args) == commit
    args.pretrained_model_name_or_path = str(tmp_path)
    assert hub_commit(args) is None
