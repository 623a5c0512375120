"""common/checkpoints.py: what a killed run leaves is swept, and what a program draws replaces nothing."""

from common.checkpoints import remove_partial, unused_path

import pytest


SWEPT = [".checkpoint-6.partial/state", "encoded/.a.safetensors.0123abcd.partial", ".loss.png.ffffffff.partial"]
KEPT = [
    *("checkpoint-4/state", "encoded/a.safetensors", ".notes.partial", ".checkpoint-x.partial/state"),
    *("film.partial", ".download.0123abcz.partial", "checkpoint-6.partial/state"),
]


@pytest.fixture
def killed(tmp_path):
    """A folder with what a killed run left, beside files of others with names that are almost the same."""
    for name in SWEPT + KEPT:
        path = tmp_path / "run" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("x")
    (tmp_path / ".beside.png.0123abcd.partial").write_text("x")
    return tmp_path / "run"


def test_what_a_killed_run_was_writing_is_swept_and_nothing_else(killed):
    remove_partial(killed)
    files = {path.relative_to(killed).as_posix() for path in killed.rglob("*") if path.is_file()}
    assert files == {*KEPT}
    assert not (killed / ".checkpoint-6.partial").exists()
    assert (killed.parent / ".beside.png.0123abcd.partial").exists()


def test_what_a_killed_run_was_writing_beside_its_folder_is_swept(tmp_path):
    swept = [".a.b.safetensors.0123abcd.partial", ".a.b-000010.safetensors.0123abcd.partial"]
    kept = [".a.b-2.safetensors.0123abcd.partial", ".axb.safetensors.0123abcd.partial", ".a.b.safetensors.partial"]
    for name in swept + kept:
        (tmp_path / name).write_text("x")
    remove_partial(tmp_path / "a.b", [tmp_path / "a.b.safetensors"])
    assert {path.name for path in tmp_path.iterdir()} == {*kept}


def test_a_run_sweeps_at_its_start_and_at_its_end(train, short_runs, tmp_path, monkeypatch):
    script = "train_dreambooth_flux_advanced"
    left = [tmp_path / ".checkpoint-6.partial", tmp_path / ".checkpoint-7.partial"]
    left[0].mkdir()
    seen = []

    def leave_another(*args, **kwargs):
        seen.append(left[0].exists())
        left[1].mkdir()

    monkeypatch.setattr(f"{script}.print_header", leave_another)
    train(script, *short_runs[script], "--max_train_steps", 1, "--output_dir", tmp_path)
    assert seen == [False]
    assert not left[1].exists()


def test_what_is_drawn_gets_a_name_that_no_file_has(tmp_path):
    path = tmp_path / "0.png"
    for name in ("0.png", "0-1.png", "0-2.png"):
        assert unused_path(path) == tmp_path / name
        (tmp_path / name).write_text("x")
    assert unused_path(tmp_path / "new" / "0.png") == tmp_path / "new" / "0.png"
