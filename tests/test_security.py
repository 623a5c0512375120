"""What a run reads is never executed, and what is secret is never written; the hub gets the results alone."""

import base64
import hashlib
import importlib
import json
import os
import pickle
import shutil
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from common.checkpoints import CHECKSUMS, checksums, load_checkpoint
from common.data import open_image

import pytest
import torch
from huggingface_hub import constants
from PIL import Image, UnidentifiedImageError
from safetensors.torch import load_file, save_file
from test_family import SCRIPTS
from test_fuzz import adapter, encoded, run_flags, saved  # noqa: F401  fixtures among them


DREAMBOOTH, INFLUX, OMINI, TWINFLOW = SCRIPTS


class Bomb:
    """Makes a folder when it is unpickled."""

    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return os.mkdir, (str(self.marker),)


def refused(train, capsys, script, *flags):
    """What a run says that ends with exit code 2."""
    with pytest.raises(SystemExit) as stop:
        train(script, *flags)
    assert stop.value.code == 2
    return capsys.readouterr().err


@pytest.fixture
def marker(tmp_path):
    """What appears if a bomb goes off."""
    return tmp_path / "executed"


@pytest.fixture
def plant(marker):
    """plant(path, how): writes a file that executes code when it is read as torch.load or pickle once did."""

    def write(path, how="torch"):
        path.unlink(missing_ok=True)
        path.parent.mkdir(parents=True, exist_ok=True)
        bomb = {"state_dict": Bomb(marker), "weight": torch.zeros(2)}
        if how == "torch":
            torch.save(bomb, path)
        elif how == "legacy":
            torch.save(bomb, path, _use_new_zipfile_serialization=False)
        else:
            path.write_bytes(pickle.dumps(bomb))
        return path

    return write


# ---------------------------------------------------------------------------------------------------------------------
# Nothing that is read is executed
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["torch", "legacy", "pickle"])
def test_the_bombs_do_go_off(plant, marker, how):
    path = plant(marker.parent / "bomb", how)
    if how == "pickle":
        pickle.loads(path.read_bytes())
    else:
        torch.load(path, weights_only=False)
    assert marker.exists()


@pytest.mark.parametrize("script", [SCRIPTS[0], *(pytest.param(s, marks=pytest.mark.slow) for s in SCRIPTS[1:])])
def test_bombs_in_a_checkpoint(train, run_flags, plant, marker, script, tmp_path):  # noqa: F811
    """In every file that is there and in those that accelerate would look for, with checksums that are right."""
    flags = [*run_flags[script], "--output_dir", tmp_path / "run"]
    train(script, *flags, "--max_train_steps", 1)
    checkpoint = tmp_path / "run" / "checkpoint-1"
    others = ["pytorch_model.bin", "scaler.pt", "custom_checkpoint_0.pkl", "dl_state_dict.bin", "sampler.bin"]
    names = [path.name for path in checkpoint.iterdir() if path.is_file() and path.suffix != ".json"]
    assert {"optimizer.bin", "scheduler.bin", "random_states_0.pkl"} < set(names)
    shutil.copytree(tmp_path / "run", tmp_path / "whole")
    for planted in [*([name] for name in names), others]:
        shutil.rmtree(tmp_path / "run")
        shutil.copytree(tmp_path / "whole", tmp_path / "run")
        for name in planted:
            plant(checkpoint / name, "pickle" if name.endswith(".pkl") else "torch")
        (checkpoint / CHECKSUMS).unlink()
        (checkpoint / CHECKSUMS).write_text(json.dumps(checksums(checkpoint)))
        try:
            train(script, *flags, "--resume_from_checkpoint", "latest")
        except SystemExit as stop:
            assert stop.code == 2
        assert not marker.exists(), planted


@pytest.mark.parametrize("how", ["torch", "legacy", "pickle"])
def test_a_bomb_as_gradient_scaler(saved, plant, marker, tmp_path, how):  # noqa: F811
    accelerator, schedule, folder = saved
    shutil.copytree(folder / "checkpoint-2", tmp_path / "checkpoint-2")
    plant(tmp_path / "checkpoint-2" / "scaler.pt", how)
    accelerator.scaler = torch.amp.GradScaler("cpu")
    try:
        with pytest.raises(SystemExit):
            load_checkpoint(accelerator, tmp_path / "checkpoint-2", schedule)
    finally:
        accelerator.scaler = None
    assert not marker.exists()


@pytest.mark.parametrize("suffix", [".pth", ".bin", ".ckpt", ".safetensors"])
def test_a_bomb_as_lora_or_embedding(train, run_flags, tiny, plant, marker, suffix, tmp_path, capsys):  # noqa: F811
    from diffusers import FluxPipeline

    from examples import convert_lora

    path = plant(tmp_path / f"bomb{suffix}")
    with pytest.raises(SystemExit) as stop:
        train(OMINI, *run_flags[OMINI], "--lora_path", path)
    assert stop.value.code == 2
    assert f"--lora_path {path}: not a readable LoRA file" in capsys.readouterr().err
    with pytest.raises(SystemExit) as stop:
        convert_lora.main([str(path), str(tmp_path / "out.safetensors")])
    assert stop.value.code == 2
    assert str(path) in capsys.readouterr().err
    pipeline = FluxPipeline(
        scheduler=None, **{k: v for k, v in tiny.components_but_image().items() if k != "scheduler"}
    )
    for load in (pipeline.load_lora_weights, pipeline.load_textual_inversion):
        with pytest.raises(Exception):  # noqa: B017  what the library raises is its own
            load(str(tmp_path), weight_name=path.name)
    assert not marker.exists()


@pytest.mark.parametrize("how", ["torch", "legacy", "pickle"])
def test_a_bomb_as_openuni_checkpoint(train, tiny_model, pictures, plant, marker, how, tmp_path, capsys):
    path = plant(tmp_path / "openuni.pth", how)
    flags = ["--model_type", "openuni", "--openuni_checkpoint", path, "--openuni_llm", tmp_path]
    with pytest.raises(SystemExit) as stop:
        train(TWINFLOW, "--pretrained_model_name_or_path", tiny_model, "--train_data_dir", pictures, *flags)
    assert stop.value.code == 2
    assert f"--openuni_checkpoint {path}: not a file of weights" in capsys.readouterr().err
    assert not marker.exists()


PARTS = {
    "text_encoder": "pytorch_model",
    "text_encoder_2": "pytorch_model",
    "vae": "diffusion_pytorch_model",
    "transformer": "diffusion_pytorch_model",
}


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_bomb_as_weights_of_the_model(train, run_flags, plant, marker, script, tmp_path, capsys):  # noqa: F811
    flags = run_flags[script]
    for part, name in PARTS.items():
        model = shutil.copytree(flags[1], tmp_path / part)
        for path in (model / part).glob("*.safetensors"):
            path.unlink()
        for suffix in (".bin", ".pt", ".pth", ".ckpt"):
            plant(model / part / f"{name}{suffix}")
        error = refused(train, capsys, script, flags[0], model, *flags[2:], "--output_dir", tmp_path / "run")
        assert f"--pretrained_model_name_or_path {model}: {model / part} holds no .safetensors" in error
        assert not marker.exists() and not (tmp_path / "run").exists(), part


@pytest.mark.parametrize("script", SCRIPTS)
def test_weights_that_are_none_are_named_before_anything_is_written(train, run_flags, plant, script, tmp_path, capsys):  # noqa: F811
    """All in one message: what is no such file, what was cut off, a shard that is not there."""
    flags, model, run = run_flags[script], tmp_path / "model", tmp_path / "run"
    shutil.copytree(flags[1], model)
    plant(next((model / "vae").glob("*.safetensors")), "pickle")
    file = next((model / "text_encoder").glob("*.safetensors"))
    file.write_bytes(file.read_bytes()[:-100])
    index = model / "transformer" / "diffusion_pytorch_model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"x_embedder.weight": "part-2.safetensors"}}))
    (model / "text_encoder_2" / "model.safetensors.index.json").write_text("[")
    error = refused(train, capsys, script, flags[0], model, *flags[2:], "--output_dir", run)
    assert error.count(f"--pretrained_model_name_or_path {model}: ") == error.count("copy or download it again") == 4
    for name in ("vae/diff", "text_encoder/model", "text_encoder_2/model", "transformer/part-2.safetensors"):
        assert f"{model / name}" in error, name
    assert not run.exists()


@pytest.mark.parametrize("script", SCRIPTS)
@pytest.mark.parametrize("part", ["transformer", "vae", "text_encoder"])
def test_weights_of_another_model_are_refused(train, run_flags, script, part, tmp_path, capsys):  # noqa: F811
    flags, model = run_flags[script], tmp_path / "model"
    shutil.copytree(flags[1], model)
    file = next((model / part).glob("*.safetensors"))
    weights = load_file(file)
    name = max(weights, key=lambda name: weights[name].numel())
    weights[name] = torch.zeros(3, 3)
    if part != "text_encoder":
        weights["another"] = weights.pop(name)  # libraries would put random numbers in its place
    save_file(weights, file, {"format": "pt"})
    error = refused(train, capsys, script, flags[0], model, *flags[2:], "--output_dir", tmp_path / "run")
    assert (
        f"--pretrained_model_name_or_path {model}: its {part.split('_')[0]}" in error and "cannot be loaded: " in error
    )
    if part != "text_encoder":
        assert f"lacks {name}" in error


CODE = "import os\nos.makedirs({marker!r}, exist_ok=True)\nclass Evil:\n    pass\n"


@pytest.mark.parametrize("script", SCRIPTS)
def test_code_in_a_model_is_not_run(train, run_flags, marker, script, tmp_path, monkeypatch):  # noqa: F811
    """Not even if the question whether it should be is answered."""
    monkeypatch.setattr("builtins.input", lambda *args: "y")
    flags = run_flags[script]
    model = shutil.copytree(flags[1], tmp_path / "model")
    for part in [path for path in model.iterdir() if path.is_dir()]:
        (part / "evil.py").write_text(CODE.format(marker=str(marker)))
        for path in part.glob("*config.json"):
            names = ("AutoConfig", "AutoModel", "AutoTokenizer", "AutoModelForTextEncoding")
            auto_map = {name: ["evil.Evil", "evil.Evil"] if name == "AutoTokenizer" else "evil.Evil" for name in names}
            path.write_text(json.dumps(json.loads(path.read_text()) | {"auto_map": auto_map}))
    (model / "pipeline.py").write_text(CODE.format(marker=str(marker)))
    train(script, flags[0], model, *flags[2:], "--max_train_steps", 1, "--output_dir", tmp_path / "run")
    assert not marker.exists()


def test_code_in_a_depth_model_is_not_run(train, run_flags, marker, tmp_path, monkeypatch, capsys):  # noqa: F811
    monkeypatch.setattr("builtins.input", lambda *args: "y")
    (tmp_path / "evil.py").write_text(CODE.format(marker=str(marker)))
    config = {
        "model_type": "evil",
        "auto_map": {"AutoConfig": "evil.Evil", "AutoModelForDepthEstimation": "evil.Evil"},
    }
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(SystemExit) as stop:
        train(OMINI, *run_flags[OMINI][:-1], "depth", "--depth_model", tmp_path, "--output_dir", tmp_path / "run")
    assert stop.value.code == 2
    assert f"--depth_model {tmp_path}: cannot be loaded" in capsys.readouterr().err
    assert not marker.exists()


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_dataset_s_script_is_not_run(train, run_flags, marker, script, tmp_path, monkeypatch, capsys):  # noqa: F811
    monkeypatch.setattr("builtins.input", lambda *args: "y")
    data = tmp_path / "evil"
    data.mkdir()
    (data / "evil.py").write_text(CODE.format(marker=str(marker)))
    flags = list(run_flags[script])
    place = next(i for i, flag in enumerate(flags) if flag in ("--instance_data_dir", "--train_data_dir"))
    flags = [*flags[:place], *flags[place + 2 :]]
    if script == INFLUX:
        place = flags.index("--caption_data_dir")
        flags = [*flags[:place], *flags[place + 2 :], "--instance_prompt", "a circle"]
    for name in (data, data / "evil.py"):
        with pytest.raises(SystemExit) as stop:
            train(script, *flags, "--dataset_name", name, "--output_dir", tmp_path / "run")
        assert stop.value.code == 2
        assert f"--dataset_name {name}" in capsys.readouterr().err
    assert not marker.exists()


def test_no_program_draws_a_picture(marker, tmp_path, monkeypatch):
    """PostScript under the name of a picture, which PIL hands to Ghostscript."""

    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "gs").write_text(f"#!/bin/sh\nmkdir {marker}\n")
    (tmp_path / "bin" / "gs").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:{os.environ['PATH']}")
    path = tmp_path / "picture.png"
    path.write_bytes(encoded(format="EPS"))
    with pytest.raises(UnidentifiedImageError):
        open_image(path)
    assert not marker.exists()
    with pytest.raises(subprocess.CalledProcessError):  # it drew nothing
        Image.open(path).load()
    assert marker.exists()


# ---------------------------------------------------------------------------------------------------------------------
# The hub, and what is secret
# ---------------------------------------------------------------------------------------------------------------------


class Hub(ThreadingHTTPServer):
    """What huggingface_hub asks of the hub to make a repository and upload a folder; `files` is what arrived."""

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Request)
        self.url = f"http://127.0.0.1:{self.server_port}"
        self.requests, self.large, self.files, self.refuse = [], {}, {}, {}


class Request(BaseHTTPRequestHandler):
    def log_message(self, *args):
        pass

    def reply(self, code, content=None):
        body = json.dumps(content or {}).encode()
        self.send_response(code)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def do_GET(self):
        self.server.requests.append((self.command, self.path, self.headers.get("Authorization")))
        self.reply(404)

    do_HEAD = do_GET  # noqa: N815

    def do_PUT(self):
        body = self.rfile.read(int(self.headers["Content-Length"]))
        self.server.large[self.path.rpartition("/")[2]] = body
        self.reply(200)

    def do_POST(self):
        if self.headers.get("Transfer-Encoding") == "chunked":
            body = b""
            while size := int(self.rfile.readline(), 16):
                body += self.rfile.read(size)
                self.rfile.readline()
            self.rfile.readline()
        else:
            body = self.rfile.read(int(self.headers["Content-Length"]))
        hub, url = self.server, self.server.url
        hub.requests.append((self.command, self.path, self.headers.get("Authorization")))
        refused = [code for part, code in hub.refuse.items() if part in self.path]
        if refused:
            self.reply(refused[0], {"error": "refused"})
        elif self.path == "/api/repos/create":
            asked = json.loads(body)
            name = f"{asked['organization'] or 'me'}/{asked['name']}"
            self.reply(200, {"url": f"{url}/{name}", "name": name})
        elif self.path == "/api/validate-yaml":
            self.reply(200, {"errors": [], "warnings": []})
        elif "/preupload/" in self.path:
            large = (".safetensors", ".png")
            names = [file["path"] for file in json.loads(body)["files"]]
            modes = {name: "lfs" if name.endswith(large) else "regular" for name in names}
            files = [{"path": path, "uploadMode": mode, "shouldIgnore": False} for path, mode in modes.items()]
            self.reply(200, {"files": files})
        elif self.path.endswith("/info/lfs/objects/batch"):
            asked = json.loads(body)["objects"]
            objects = [{**one, "actions": {"upload": {"href": f"{url}/large/{one['oid']}"}}} for one in asked]
            self.reply(200, {"transfer": "basic", "objects": objects})
        elif "/commit/" in self.path:
            for line in body.splitlines():
                entry = json.loads(line)
                value = entry["value"]
                if entry["key"] == "file":
                    hub.files[value["path"]] = base64.b64decode(value["content"])
                elif entry["key"] == "lfsFile":
                    content = hub.large[value["oid"]]
                    assert hashlib.sha256(content).hexdigest() == value["oid"]
                    hub.files[value["path"]] = content
            commit = {"commitOid": "0" * 40, "commitUrl": f"{url}/me/run/commit/{'0' * 40}", "hookOutput": ""}
            self.reply(200, {"success": True, **commit})
        else:
            self.reply(404)


SECRETS = {"flag": "hf_" + "Flag" * 8, "HF_TOKEN": "hf_" + "Environment" * 3, "WANDB_API_KEY": "5ecre7" * 6 + "abcd"}


@pytest.fixture
def hub(monkeypatch):
    """A hub on this machine, which huggingface_hub takes for the real one."""
    server = Hub()
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setattr(constants, "ENDPOINT", server.url)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setenv("HF_TOKEN", SECRETS["HF_TOKEN"])
    yield server
    server.shutdown()
    server.server_close()


def secrets_in(folder):
    """{file: name of the secret} of all files that hold one."""
    files = [path for path in folder.rglob("*") if path.is_file()]
    return {
        path.relative_to(folder): name
        for path in files
        for name, secret in SECRETS.items()
        if secret.encode() in path.read_bytes()
    }


@pytest.mark.parametrize("script", SCRIPTS)
def test_no_secret_is_written_and_the_hub_gets_the_results(
    train,
    run_flags,  # noqa: F811
    hub,
    wandb_dir,
    script,
    tmp_path,
    monkeypatch,
    capfd,
):
    """A run with all trackers, all tokens, checkpoints and pictures, and one that goes on from there."""
    monkeypatch.setenv("WANDB_API_KEY", SECRETS["WANDB_API_KEY"])
    monkeypatch.delenv("WANDB_SILENT")
    for name in ("WANDB_CACHE_DIR", "WANDB_CONFIG_DIR", "WANDB_DATA_DIR"):
        monkeypatch.setenv(name, str(tmp_path / name))
    monkeypatch.chdir(tmp_path)
    push = ["--push_to_hub", "--hub_token", SECRETS["flag"]]
    flags = [*run_flags[script], "--output_dir", tmp_path / "run", "--report_to", "all", *push]
    for more in (["--max_train_steps", 1], ["--resume_from_checkpoint", "latest"]):
        monkeypatch.setattr(sys, "argv", [f"{script}.py", *map(str, [*flags, *more])])
        train(script, *flags, *more)
        (tmp_path / "run" / ".checkpoint-9.partial").mkdir(exist_ok=True)
        (tmp_path / "run" / ".checkpoint-9.partial" / "optimizer.bin").touch()
    assert any((tmp_path / "wandb").rglob("*.wandb"))
    assert any((tmp_path / "run" / "logs").rglob("events.out.*"))
    assert secrets_in(tmp_path) == {}
    out, err = capfd.readouterr()
    assert not [name for name, secret in SECRETS.items() if secret in out + err]
    asked = [request for request in hub.requests if request[1] != "/api/agent-harnesses"]  # the library's own question
    assert {token for _, _, token in asked} == {f"Bearer {SECRETS['flag']}"}
    others = {path for _, path, _ in asked if "me/run" not in path}
    assert others == {"/api/repos/create", "/api/validate-yaml"}
    kept = ("checkpoint-", "step-", ".", "logs/", "encoded/")
    files = [path for path in (tmp_path / "run").rglob("*") if path.is_file()]
    local = {path.relative_to(tmp_path / "run").as_posix(): path for path in files}
    assert hub.files.keys() == {name for name in local if not name.startswith(kept)}
    assert {"README.md", "args.json", "loss.png", "metrics.jsonl"} < hub.files.keys()
    assert any(name.endswith(".safetensors") for name in hub.files)
    assert all(content == local[name].read_bytes() for name, content in hub.files.items())


def test_a_named_lora_reaches_the_hub(train, run_flags, hub, tmp_path):  # noqa: F811
    flags = [*run_flags[DREAMBOOTH], "--output_dir", tmp_path, "--output_name", "name", "--push_to_hub"]
    train(DREAMBOOTH, *flags, "--hub_model_id", "us/it")
    assert hub.files["name.safetensors"] == (tmp_path / "name.safetensors").read_bytes()
    assert {token for _, _, token in hub.requests if token} == {f"Bearer {SECRETS['HF_TOKEN']}"}
    assert [path for _, path, _ in hub.requests if "commit" in path] == ["/api/models/us/it/commit/main"] * 2


@pytest.mark.parametrize("script", SCRIPTS)
@pytest.mark.parametrize("fault", ["401", "403", "500", "no hub", "bad name", "bad token"])
def test_a_hub_that_refuses_ends_the_run_before_it_begins(
    train,
    run_flags,  # noqa: F811
    hub,
    script,
    fault,
    tmp_path,
    monkeypatch,
    capfd,
):
    flags = [*run_flags[script], "--output_dir", tmp_path / "run", "--push_to_hub"]
    secret = SECRETS["flag"] + ("\nmore" if fault == "bad token" else "")
    flags += ["--hub_model_id", "a/b/c"] if fault == "bad name" else []
    if fault.isdecimal():
        hub.refuse = {"/repos/create": int(fault)}
    if fault == "no hub":
        hub.shutdown()
        hub.server_close()
    loads_text = "encode_prompts" if script == TWINFLOW else "PromptEncoder"
    monkeypatch.setattr(importlib.import_module(script), loads_text, None)
    with pytest.raises(SystemExit) as stop:
        train(script, *flags, "--hub_token", secret)
    out, err = capfd.readouterr()
    assert stop.value.code == 2
    assert err.count("error: --hub_token: " if fault == "bad token" else "error: --push_to_hub: ") == 1
    assert "Traceback" not in err
    assert SECRETS["flag"] not in out + err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_hub_that_fails_in_the_end_costs_nothing(train, run_flags, hub, script, tmp_path, capfd):  # noqa: F811
    hub.refuse = {"/preupload/": 403}
    flags = [*run_flags[script], "--output_dir", tmp_path / "run", "--push_to_hub", "--max_train_steps", 1]
    with pytest.raises(SystemExit) as stop:
        train(script, *flags)
    assert str(stop.value).startswith("--push_to_hub: ")
    assert f"Try again: hf upload me/run {tmp_path / 'run'}" in str(stop.value)
    assert "Trained 1 steps" in capfd.readouterr().out
    assert load_file(next((tmp_path / "run").glob("**/*.safetensors")))


@pytest.mark.slow
def test_a_hub_that_refuses_ends_both_of_two_processes(runs, short_runs, tmp_path):
    flags = [*short_runs[DREAMBOOTH], "--output_dir", tmp_path / "run", "--push_to_hub"]
    assert runs.run(DREAMBOOTH, flags, refuses, processes=2, timeout=120) != 0
    assert runs.output().count("--push_to_hub: the token is refused") == 1
    assert runs.output().count("ended with 2\n") == 2
    assert "Traceback" not in runs.output().partition("--push_to_hub")[0]


def refuses(trainer):
    """The hub refuses the token; each process says how it ends."""

    def create_repo(*args, **kwargs):
        raise ValueError("the token is refused")

    def fail(*args):
        try:
            honest_fail(*args)
        except SystemExit as stop:
            sys.stdout.write(f"ended with {stop.code}\n")
            sys.stdout.flush()
            raise

    tracking = importlib.import_module("common.tracking")
    honest_fail, tracking.fail = tracking.fail, fail
    tracking.HfApi.create_repo = create_repo
