"""examples/dgx_spark: scripts, containers and workflows that need no GPU and no hub to be shown right or wrong."""

import hashlib
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import threading
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from itertools import pairwise
from pathlib import Path

from common import tracking

import pytest
from conftest import ROOT


SPARK = ROOT / "examples" / "dgx_spark"

# ---------------------------------------------------------------------------------------------------------------------
# Workflows
# ---------------------------------------------------------------------------------------------------------------------

# ComfyUI's nodes: types of the inputs that need a link, of the outputs, and how many widgets
NODES = {
    "UNETLoader": ({}, ["MODEL"], 2),
    "DualCLIPLoader": ({}, ["CLIP"], 4),
    "VAELoader": ({}, ["VAE"], 1),
    "LoraLoader": ({"model": "MODEL", "clip": "CLIP"}, ["MODEL", "CLIP"], 3),
    "CLIPTextEncode": ({"clip": "CLIP"}, ["CONDITIONING"], 1),
    "FluxGuidance": ({"conditioning": "CONDITIONING"}, ["CONDITIONING"], 1),
    "ModelSamplingFlux": ({"model": "MODEL"}, ["MODEL"], 4),
    "BasicScheduler": ({"model": "MODEL"}, ["SIGMAS"], 3),
    "KSamplerSelect": ({}, ["SAMPLER"], 1),
    "RandomNoise": ({}, ["NOISE"], 2),
    "EmptySD3LatentImage": ({}, ["LATENT"], 3),
    "BasicGuider": ({"model": "MODEL", "conditioning": "CONDITIONING"}, ["GUIDER"], 0),
    "SamplerCustomAdvanced": (
        {"noise": "NOISE", "guider": "GUIDER", "sampler": "SAMPLER", "sigmas": "SIGMAS", "latent_image": "LATENT"},
        ["LATENT", "LATENT"],
        0,
    ),
    "VAEDecode": ({"samples": "LATENT", "vae": "VAE"}, ["IMAGE"], 0),
    "SaveImage": ({"images": "IMAGE"}, [], 1),
}
SETTINGS = {  # the playbook's
    "UNETLoader": ["flux1-dev.safetensors", "default"],
    "DualCLIPLoader": ["t5xxl_fp16.safetensors", "clip_l.safetensors", "flux", "default"],
    "VAELoader": ["ae.safetensors"],
    "FluxGuidance": [3.5],
    "ModelSamplingFlux": [1.15, 0.5, 1024, 1024],
    "BasicScheduler": ["sgm_uniform", 50, 1],
    "KSamplerSelect": ["dpmpp_2m"],
    "RandomNoise": [25, "fixed"],
    "EmptySD3LatentImage": [1024, 1024, 1],
}


def faults(workflow):
    """What is wrong with a workflow as a graph."""
    nodes, links, found = {node["id"]: node for node in workflow["nodes"]}, {}, []
    for link, source, output, target, slot, kind in workflow["links"]:
        links[link] = (source, output, target, slot)
        ends = nodes[source]["outputs"][output], nodes[target]["inputs"][slot]
        if not ends[0]["type"] == ends[1]["type"] == kind:
            found.append(f"link {link} joins {ends[0]['type']} and {ends[1]['type']} as {kind}")
        if link not in ends[0]["links"] or ends[1]["link"] != link:
            found.append(f"link {link} is unknown to its nodes")
    for node in nodes.values():
        inputs, outputs, widgets = NODES[node["type"]]
        if {entry["name"]: entry["type"] for entry in node["inputs"]} != inputs:
            found.append(f"{node['type']}: inputs")
        if [entry["type"] for entry in node["outputs"]] != outputs or len(node["widgets_values"]) != widgets:
            found.append(f"{node['type']}: outputs or widgets")
        found += [f"{node['type']}: {e['name']} is not linked" for e in node["inputs"] if e["link"] not in links]
    reached, todo = set(), [node["id"] for node in nodes.values() if node["type"] == "SaveImage"]
    while todo:
        reached.add(node := todo.pop())
        todo += [source for source, _, target, _ in links.values() if target == node]
        if len(todo) > 1000:
            return [*found, "the links go round in a circle"]
    return found + [f"{nodes[id]['type']} leads to no picture" for id in nodes.keys() - reached]


@pytest.mark.parametrize("name", ["base_flux", "finetuned_flux"])
def test_the_workflows_are_whole_graphs_with_the_playbooks_settings(name):
    workflow = json.loads((SPARK / "workflows" / f"{name}.json").read_text())
    assert not faults(workflow)
    nodes = {node["type"]: node for node in workflow["nodes"]}
    assert len(nodes) == len(workflow["nodes"])
    assert {kind: nodes[kind]["widgets_values"] for kind in SETTINGS} == SETTINGS
    tuned = name == "finetuned_flux"
    assert ("LoraLoader" in nodes) == tuned
    prompt = nodes["CLIPTextEncode"]["widgets_values"][0]
    if tuned:
        assert nodes["LoraLoader"]["widgets_values"] == ["flux_dreambooth.safetensors", 1, 1]
        assert prompt == "tjtoy toy holding sparkgpu gpu in a datacenter"
        feeds = {link[1] for link in workflow["links"] if link[3] in (nodes[k]["id"] for k in ("ModelSamplingFlux",))}
        assert feeds == {nodes["LoraLoader"]["id"]}  # not past the LoRA
    assert workflow["version"] == 0.4
    assert workflow["last_link_id"] == max(link[0] for link in workflow["links"])


def test_a_broken_graph_is_noticed():
    workflow = json.loads((SPARK / "workflows" / "finetuned_flux.json").read_text())
    workflow["links"][0][5] = "CLIP"
    workflow["nodes"][-1]["inputs"][0]["link"] = 99
    assert len(faults(workflow)) >= 3


# ---------------------------------------------------------------------------------------------------------------------
# Scripts and containers
# ---------------------------------------------------------------------------------------------------------------------


def test_shell_scripts_pass_shellcheck():
    scripts = sorted(SPARK.glob("*.sh"))
    assert len(scripts) == 3
    checker = Path(sys.executable).with_name("shellcheck")
    result = subprocess.run([checker, *scripts], capture_output=True, text=True)
    assert result.returncode == 0, result.stdout
    assert all(os.access(script, os.X_OK) for script in scripts)


def test_containers_are_pinned_and_run_as_the_user():
    for name in ("train", "inference"):
        text = (SPARK / f"Dockerfile.{name}").read_text()
        (base,) = re.findall(r"^FROM (\S+)$", text, re.MULTILINE)
        assert re.fullmatch(r"nvcr\.io/nvidia/pytorch:\d\d\.\d\d-py3", base)
        assert text.count("git clone") == len(re.findall(r"checkout --detach [0-9a-f]{7,40}\b", text))
        for copied in re.findall(r"^COPY (\S+) ", text, re.MULTILINE):
            assert (ROOT / copied).exists()
    for name in ("launch_train.sh", "launch_comfyui.sh"):
        assert '--user "$(id -u):$(id -g)"' in (SPARK / name).read_text()
    requirements = [line for line in (ROOT / "requirements.txt").read_text().splitlines() if line[0] != "#"]
    assert all("==" in line for line in requirements)
    comfyui = (SPARK / "launch_comfyui.sh").read_text()
    assert all(f"models/{kind}:" in comfyui for kind in ("loras", "embeddings", "vae", "text_encoders"))
    mounted = set(re.findall(r"\$PWD/([\w.]+)", (SPARK / "launch_train.sh").read_text()))
    named = re.findall(r"=((?:models|flux_data)[^\s]*)", (SPARK / "train.args").read_text())
    assert {path.split("/")[0] for path in named} | {"train.args"} == mounted


@pytest.mark.parametrize("name", ["launch_train.sh", "launch_comfyui.sh"])
def test_launching_mounts_only_folders_that_exist_and_passes_failure_on(tmp_path, name):
    spark, fake = tmp_path / "spark", tmp_path / "bin"
    shutil.copytree(SPARK, spark, ignore=shutil.ignore_patterns("models", "output"))
    fake.mkdir()
    (fake / "docker").write_text('#!/bin/sh\nprintf "%s\\n" "$@" > "$0.args"\nexit 7\n')
    (fake / "docker").chmod(0o755)

    def launch(*flags):
        environment = os.environ | {"PATH": f"{fake}:{os.environ['PATH']}"}
        command = ["sh", str(spark / name), *flags]
        return subprocess.run(command, env=environment, capture_output=True, text=True)

    result = launch()
    assert (result.returncode, result.stderr.count("run download.sh first")) == (2, 1)
    assert not (spark / "models").exists()
    for folder in ("checkpoints", "text_encoders", "vae", "tokenizers"):
        (spark / "models" / folder).mkdir(parents=True)
    (spark / FLUX).touch()
    assert launch("--seed", "1 2").returncode == 7
    arguments = (fake / "docker.args").read_text().splitlines()
    assert arguments[-2:] == ["--seed", "1 2"]
    assert arguments[arguments.index("--user") + 1] == f"{os.getuid()}:{os.getgid()}"
    mounted = [value.split(":")[0] for flag, value in pairwise(arguments) if flag == "--volume"]
    assert len(mounted) >= 3
    assert all(Path(path).exists() for path in mounted)


def test_what_the_training_prints_at_its_end_runs_in_the_container(tmp_path, monkeypatch):
    """launch_train.sh tells the container how it is called from outside, and passes python commands on."""
    spark = tmp_path / "a folder" / "spark"
    shutil.copytree(SPARK, spark, ignore=shutil.ignore_patterns("models", "output"))
    (spark / "models" / "checkpoints").mkdir(parents=True)
    (spark / FLUX).touch()
    (tmp_path / "docker").write_text('#!/bin/sh\nprintf "%s\\n" "$@" > "$0.args"\n')
    (tmp_path / "docker").chmod(0o755)
    environment = os.environ | {"PATH": f"{tmp_path}:{os.environ['PATH']}"}

    def arguments_of(command):
        subprocess.run(command, env=environment, check=True, shell=True)
        return (tmp_path / "docker.args").read_text().splitlines()

    arguments = arguments_of(shlex.quote(str(spark / "launch_train.sh")))
    assert arguments[-3:] == ["flux-train", "train_dreambooth_flux_advanced.py", "@train.args"]
    (setting,) = [word for word in arguments if word.startswith("PYTHON_COMMAND=")]
    monkeypatch.setenv(*setting.split("=", 1))
    command = f"{tracking.python()} examples/dreambooth/generate.py models/loras/flux_dreambooth --prompt 'a b'"
    assert arguments_of(command)[-5:] == [
        *("flux-train", "examples/dreambooth/generate.py", "models/loras/flux_dreambooth", "--prompt", "a b")
    ]
    copied = set()
    for line in re.findall(r"^COPY (.+)$", (SPARK / "Dockerfile.train").read_text(), re.MULTILINE):
        *sources, target = line.split()
        assert target in (*sources, ".", "examples/")
        copied.update(sources)
    for script in ("report.py", "dreambooth/generate.py"):
        assert f"examples/{script}" in copied or f"examples/{Path(script).parent}" in copied


# ---------------------------------------------------------------------------------------------------------------------
# download.sh, against a small hub
# ---------------------------------------------------------------------------------------------------------------------


class Hub(BaseHTTPRequestHandler):
    """Serves `files` {name: bytes} as the hub does: sizes and hashes on HEAD, ranges, tokens; `fault` goes wrong."""

    def __init__(self, state, *args):
        self.state = state
        super().__init__(*args)

    def log_message(self, *args):
        pass

    def do_HEAD(self):  # noqa: N802
        self.do_GET()

    def do_GET(self):  # noqa: N802
        state, repository = self.state, self.path[1:].split("/resolve/main/")
        state.requests.append((self.command, self.path, self.headers.get("Range")))
        if self.headers.get("Authorization") != "Bearer hf_right":
            return self.answer(401, b"<html>sign in</html>")
        name = repository[1].replace("/", "_")
        data = state.files.get(name)
        if data is None:
            return self.answer(404, b"not here")
        model = name.endswith(".safetensors")
        headers = {"X-Linked-Size": str(len(data)), "X-Linked-ETag": f'"{hashlib.sha256(data).hexdigest()}"'}
        headers = headers if model and state.fault != "no hash" else {}
        if state.fault == "error page" and model and self.command == "GET":
            return self.answer(200, b"<html>come back later</html>", headers)
        start = int((self.headers.get("Range") or "bytes=0-")[6:].split("-")[0])
        status = 206 if start else 200
        if start:
            headers["Content-Range"] = f"bytes {start}-{len(data) - 1}/{len(data)}"
        return self.answer(status, data[start:], headers, cut=state.fault == "cut" and self.command == "GET")

    def answer(self, status, body, headers=(), cut=False):
        self.send_response(status)
        for name, value in dict(headers).items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body[: len(body) // 2] if cut else body)
        if cut:
            self.close_connection = True


class State:
    def __init__(self):
        names = ["flux1-dev.safetensors", "ae.safetensors", "clip_l.safetensors", "t5xxl_fp16.safetensors"]
        names += [f"tokenizer_{n}" for n in ("vocab.json", "merges.txt")]
        names += [f"tokenizer_2_{n}" for n in ("spiece.model", "tokenizer.json")]
        names += [
            f"{t}_{n}.json" for t in ("tokenizer", "tokenizer_2") for n in ("special_tokens_map", "tokenizer_config")
        ]
        self.files = {name: hashlib.sha256(name.encode()).digest() * 500 for name in names}
        self.requests, self.fault = [], None


@pytest.fixture
def hub(tmp_path):
    """download(token): runs download.sh into tmp_path against a local hub whose `state` the test may change."""
    state = State()
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Hub, state))
    threading.Thread(target=server.serve_forever, daemon=True).start()

    def download(token="hf_right"):
        state.requests.clear()
        environment = {k: v for k, v in os.environ.items() if k != "HF_TOKEN" and "proxy" not in k.lower()}
        environment |= {"HF_ENDPOINT": f"http://127.0.0.1:{server.server_port}"} | (
            {"HF_TOKEN": token} if token else {}
        )
        command = ["sh", str(SPARK / "download.sh"), str(tmp_path)]
        return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)

    yield state, download
    server.shutdown()


FLUX = Path("models/checkpoints/flux1-dev.safetensors")


def test_everything_is_fetched_once(hub, tmp_path):
    state, download = hub
    result = download()
    assert result.returncode == 0, result.stderr
    saved = {"_".join(p.parts[-2:]) if "tokenizer" in p.parts[-2] else p.name: p for p in tmp_path.rglob("*.*")}
    assert saved.keys() == state.files.keys()
    assert all(path.read_bytes() == state.files[name] for name, path in saved.items())
    assert "hf_right" not in result.stdout + result.stderr
    assert download().returncode == 0
    assert {kind for kind, *_ in state.requests} == {"HEAD"}


def test_a_broken_download_goes_on_where_it_was(hub, tmp_path):
    state, download = hub
    state.fault = "cut"
    result = download()
    assert result.returncode == 1
    assert "start again to go on" in result.stderr
    assert not (tmp_path / FLUX).exists()
    part = (tmp_path / f"{FLUX}.partial").stat().st_size
    assert 0 < part < len(state.files[FLUX.name])
    state.fault = None
    assert download().returncode == 0
    assert ("GET", f"/black-forest-labs/FLUX.1-dev/resolve/main/{FLUX.name}", f"bytes={part}-") in state.requests
    assert (tmp_path / FLUX).read_bytes() == state.files[FLUX.name]


def test_a_truncated_and_a_changed_file_are_not_taken_for_the_model(hub, tmp_path):
    state, download = hub
    whole = state.files[FLUX.name]
    for wrong in (whole[:5000], b"x" * len(whole), whole + b"more", b"<html>no</html>"):
        (tmp_path / FLUX).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / FLUX).write_bytes(wrong)
        assert download().returncode == 0
        assert (tmp_path / FLUX).read_bytes() == whole


@pytest.mark.parametrize(
    ("fault", "token", "code", "message"),
    [
        ("error page", "hf_right", 1, "flux1-dev.safetensors"),
        ("no hash", "hf_right", 1, "names no size and SHA-256"),
        (None, "", 2, "HF_TOKEN is not set: accept the licence at"),
        (None, "hf_wrong", 1, "refused (401). Is HF_TOKEN valid"),
    ],
)
def test_what_cannot_be_fetched_is_said_and_leaves_no_model(hub, tmp_path, fault, token, code, message):
    state, download = hub
    state.fault = fault
    result = download(token)
    assert result.returncode == code
    assert message in result.stderr
    assert not list(tmp_path.rglob("*.safetensors"))
    assert "hf_wrong" not in result.stdout + result.stderr
