"""examples/influxedit: the data set tool against hostile archives, interruptions and broken connections."""

import http.server
import json
import stat
import threading
import zipfile

import numpy as np
import pytest
from PIL import Image

from examples.influxedit import combine_images
from examples.influxedit import prepare_fill_circles as tool
from examples.influxedit.toy_circles import write_archive


@pytest.fixture
def archive(tmp_path):
    write_archive(tmp_path / "circles.zip", count=4)
    return tmp_path / "circles.zip"


def run(monkeypatch, *flags):
    """Exit code of the command."""
    monkeypatch.setattr("sys.argv", ["prepare_fill_circles.py", *map(str, flags)])
    return tool.main()


def test_folders_hold_pairs_collages_and_prompts(archive, tmp_path, monkeypatch, capsys):
    output = tmp_path / "data"
    assert run(monkeypatch, "--zip", archive, "--output", output, "--prefix", "both: ") == 0
    assert "4 samples" in capsys.readouterr().out
    with zipfile.ZipFile(archive) as file:
        rows = [json.loads(line) for line in file.read("fill50k/prompt.json").decode().splitlines()]
        for i, row in enumerate(rows):
            assert (output / "prompts" / f"{i}.txt").read_text() == row["prompt"]
            assert (output / "prompts_combined" / f"{i}.txt").read_text() == "both: " + row["prompt"]
            pair = [np.asarray(Image.open(file.open(f"fill50k/{row[key]}"))) for key in ("source", "target")]
            for name, expected in (("A", pair[0]), ("B", pair[1]), ("combined", np.concatenate(pair, axis=1))):
                assert np.array_equal(np.asarray(Image.open(output / f"train_{name}" / f"{i}.png")), expected)
    assert not list(output.rglob("*.partial"))


def test_the_last_samples_can_be_held_out(archive, tmp_path, monkeypatch):
    assert run(monkeypatch, "--zip", archive, "--output", tmp_path / "data", "--test_count", 1) == 0
    for folder in ("train_A", "train_B", "train_combined", "prompts", "prompts_combined"):
        assert {path.stem for path in (tmp_path / "data" / folder).iterdir()} == {"0", "1", "2"}
    for folder in ("test_A", "test_B", "test_combined", "test_prompts", "test_prompts_combined"):
        assert {path.stem for path in (tmp_path / "data" / folder).iterdir()} == {"3"}


def write_pairs_archive(archive, path, lists):
    """The pictures of a ControlNet archive in the layout of my_fill50k.zip: 0 and 1 to train, 2 and 3 to test."""
    with zipfile.ZipFile(archive) as source, zipfile.ZipFile(path, "w") as target:
        for i in range(4):
            split = "train" if i < 2 else "test"
            for folder, letter in (("source", "A"), ("target", "B")):
                target.writestr(f"my_fill50k/{split}_{letter}/{i}.png", source.read(f"fill50k/{folder}/{i}.png"))
        for name, prompts in lists.items():
            target.writestr(f"my_fill50k/{name}", prompts if isinstance(prompts, str) else json.dumps(prompts))


def test_an_archive_of_folders_a_and_b_is_read_with_its_test_images(archive, tmp_path, monkeypatch):
    lists = {"train_prompts.json": {"0.png": "zero", "1.png": "one"}, "test_prompts.json": {"2.png": "two"}}
    write_pairs_archive(archive, tmp_path / "my_fill50k.zip", lists)
    output = tmp_path / "data"
    assert run(monkeypatch, "--zip", tmp_path / "my_fill50k.zip", "--output", output, "--prefix", "both: ") == 0
    assert (output / "prompts" / "1.txt").read_text() == "one"
    assert (output / "test_prompts_combined" / "2.txt").read_text() == "both: two"
    with zipfile.ZipFile(archive) as file:
        pair = [np.asarray(Image.open(file.open(f"fill50k/{folder}/2.png"))) for folder in ("source", "target")]
    assert np.array_equal(np.asarray(Image.open(output / "test_combined" / "2.png")), np.concatenate(pair, axis=1))
    assert {path.name for path in (output / "train_A").iterdir()} == {"0.png", "1.png"}


@pytest.mark.parametrize(
    ("lists", "message"),
    [
        ({"train_prompts.json": "[1]"}, "train_prompts.json: not JSON"),
        ({"train_prompts.json": {"7.png": "x"}}, "no my_fill50k/train_A/7.png"),
        ({"test_prompts.json": {"2.png": "x"}}, "files prompt.json or train_prompts.json"),
    ],
)
def test_wrong_lists_of_such_an_archive_are_refused(archive, tmp_path, monkeypatch, capsys, lists, message):
    write_pairs_archive(archive, tmp_path / "a.zip", lists)
    assert run(monkeypatch, "--zip", tmp_path / "a.zip", "--output", tmp_path / "data") == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "data").exists()


def test_two_folders_are_joined_side_by_side(pairs, tmp_path, capsys):
    flags = ["--dir_a", pairs / "images", "--dir_b", pairs / "targets", "--output_dir", tmp_path / "joined"]
    (tmp_path / "after").mkdir()
    for path in (pairs / "targets").iterdir():
        (tmp_path / "after" / path.name).write_bytes(path.read_bytes())
        (tmp_path / "after" / f"{path.stem}.txt").write_text(f"caption {path.stem}")
    flags[3] = tmp_path / "after"
    combine_images.main([*map(str, flags), "--prefix", "both: "])
    for left in (pairs / "images").iterdir():
        right = next((pairs / "targets").glob(f"{left.stem}.*"))
        halves = [np.asarray(Image.open(path).convert("RGB")) for path in (left, right)]
        joined = np.asarray(Image.open(tmp_path / "joined" / f"{left.stem}.png"))
        assert np.array_equal(joined, np.concatenate(halves, axis=1))
        assert (tmp_path / "joined" / f"{left.stem}.txt").read_text() == f"both: caption {left.stem}"
    before = {path: path.read_bytes() for path in (tmp_path / "joined").iterdir()}
    with pytest.raises(SystemExit) as stop:
        combine_images.main([str(flag) for flag in flags])
    assert stop.value.code == 2
    assert "exists and is not empty" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        combine_images.main(
            [str(flag) for flag in [*flags[:2], "--dir_b", flags[1], "--output_dir", tmp_path / "new"]]
        )
    assert f"--dir_b {flags[1]} is --dir_a, too" in capsys.readouterr().err
    assert not (tmp_path / "new").exists()
    assert before == {path: path.read_bytes() for path in (tmp_path / "joined").iterdir()}


def test_folders_that_do_not_pair_are_refused_in_one_message(pairs, tmp_path, capsys):
    (tmp_path / "after").mkdir()
    Image.new("RGB", (16, 16)).save(tmp_path / "after" / "0.png")
    (tmp_path / "after" / "1.png").write_text("no image")
    flags = ["--dir_a", pairs / "images", "--dir_b", tmp_path / "after", "--output_dir", tmp_path / "joined"]
    with pytest.raises(SystemExit) as stop:
        combine_images.main([str(flag) for flag in flags])
    error = capsys.readouterr().err
    assert stop.value.code == 2
    for problem in ("0.png: is 16 x 16 pixels", "1.png: not a readable image", "needs one image", "2.*"):
        assert problem in error
    assert not (tmp_path / "joined").exists()


def test_an_interrupted_preparation_continues(archive, tmp_path, monkeypatch):
    output, honest, written = tmp_path / "data", tool.write, []

    def interrupted(path, save):
        if len(written) == 12:
            raise KeyboardInterrupt
        written.append(path)
        honest(path, save)

    monkeypatch.setattr(tool, "write", interrupted)
    with pytest.raises(KeyboardInterrupt):
        tool.prepare(archive, output)
    monkeypatch.setattr(tool, "write", lambda path, save: written.append(path) or honest(path, save))
    written.clear()
    assert tool.prepare(archive, output) == 4
    assert {path.stem for path in written} == {"2", "3"}
    assert len(list((output / "train_combined").iterdir())) == 4


def link(name):
    """A member that would become a symbolic link."""
    member = zipfile.ZipInfo(name)
    member.external_attr = (stat.S_IFLNK | 0o777) << 16
    return member


HOSTILE = {
    "traversal": ("fill50k/../../outside.txt", "a path outside of the archive"),
    "absolute": ("/tmp/outside.txt", "a path outside of the archive"),
    "drive": ("C:/outside.txt", "a path outside of the archive"),
    "backslashes": ("fill50k\\..\\..\\outside.txt", "a path outside of the archive"),
    "link": (link("fill50k/source/link.png"), "neither a file nor a folder"),
}


@pytest.mark.parametrize("kind", HOSTILE)
def test_a_hostile_archive_is_refused(archive, tmp_path, monkeypatch, capsys, kind):
    member, message = HOSTILE[kind]
    with zipfile.ZipFile(archive, "a") as file:
        file.writestr(member, "../../outside.txt")
    before = sorted(tmp_path.rglob("*"))
    assert run(monkeypatch, "--zip", archive, "--output", tmp_path / "data") == 2
    assert message in capsys.readouterr().err
    assert sorted(tmp_path.rglob("*")) == before


def test_a_bomb_is_refused(archive, tmp_path, monkeypatch, capsys):
    with zipfile.ZipFile(archive, "a", zipfile.ZIP_DEFLATED) as file:
        file.writestr("fill50k/zeros.bin", bytes(20 * 2**20))
    assert archive.stat().st_size < 2**20
    flags = ("--zip", archive, "--output", tmp_path / "data", "--max_gigabytes", "0.01")
    assert run(monkeypatch, *flags) == 2
    assert "more than the 10,737,418 of --max_gigabytes" in capsys.readouterr().err
    assert not (tmp_path / "data").exists()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{oops", "line 1: not JSON with source, target and prompt"),
        ('{"source": "source/0.png"}', "line 1: not JSON with source, target and prompt"),
        ('{"source": "a.png", "target": "b.png", "prompt": "x"}', "the archive has no fill50k/a.png"),
        (None, "holds 0 files prompt.json"),
        (b"\xff\xfe", "prompt.json: not readable"),
    ],
)
def test_a_wrong_archive_is_refused(tmp_path, monkeypatch, capsys, content, message):
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as file:
        file.writestr("fill50k/prompt.json" if content else "readme.txt", content or "")
    assert run(monkeypatch, "--zip", tmp_path / "a.zip", "--output", tmp_path / "data") == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "data").exists()


def test_a_damaged_list_is_refused(archive, tmp_path, monkeypatch, capsys):
    data = archive.read_bytes()
    start = data.index(b'{"source"')  # stored, not compressed
    archive.write_bytes(data[:start] + b"[" + data[start + 1 :])
    assert run(monkeypatch, "--zip", archive, "--output", tmp_path / "data") == 2
    assert "prompt.json: not readable (Bad CRC-32" in capsys.readouterr().err


def test_a_damaged_archive_is_refused(archive, tmp_path, monkeypatch, capsys):
    archive.write_bytes(archive.read_bytes()[:-100])
    assert run(monkeypatch, "--zip", archive, "--output", tmp_path / "data") == 2
    assert "damaged, or no zip file" in capsys.readouterr().err


@pytest.fixture
def server(archive):
    """(address, [range header of each request]) of a server that hangs up halfway through the first answer."""
    data, requests = archive.read_bytes(), []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):  # noqa: N802
            asked = self.headers["Range"]
            start = int(asked.removeprefix("bytes=").removesuffix("-")) if asked else 0
            requests.append(asked)
            self.send_response(206 if asked else 200)
            self.send_header("Content-Length", str(len(data) - start))
            self.end_headers()
            self.wfile.write(data[start : len(data) // 2] if len(requests) == 1 else data[start:])

        def log_message(self, *args):
            pass

    with http.server.HTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}/fill50k.zip", requests
        server.shutdown()


def test_an_interrupted_download_continues(archive, server, tmp_path, monkeypatch, capsys):
    (address, requests), output = server, tmp_path / "data"
    flags = ("--url", address, "--output", output)
    half = archive.stat().st_size // 2
    assert run(monkeypatch, *flags) == 2
    assert "the connection ended" in capsys.readouterr().err
    assert [path.name for path in output.iterdir()] == ["fill50k.zip.partial"]
    assert run(monkeypatch, *flags) == 0
    assert requests == [None, f"bytes={half}-"]
    assert (output / "fill50k.zip").read_bytes() == archive.read_bytes()
    assert len(list((output / "train_A").iterdir())) == 4


def test_a_dead_server_is_a_sentence(tmp_path, monkeypatch, capsys):
    assert run(monkeypatch, "--url", "http://127.0.0.1:9/fill50k.zip", "--output", tmp_path / "data") == 2
    assert "error: " in capsys.readouterr().err
