"""Trainers as processes of their own, forked from one that has imported them: imports take longer than a short run."""

import ctypes
import functools
import gc
import importlib
import json
import os
import select
import signal
import socket
import subprocess
import sys
import time

import psutil
from conftest import ROOT


PROGRAM = __file__
SCRIPTS = ["train_dreambooth_flux_advanced", "train_omini", "train_influxedit", "train_twinflow"]


class Runs:
    """Starts trainers, one at a time, each in a process group of its own."""

    def __init__(self, log):
        self.log = log
        self.pid = -1  # of the last run
        environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
        self.server = subprocess.Popen(
            [sys.executable, PROGRAM],
            cwd=ROOT,
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            bufsize=0,
        )

    def start(self, script, flags, fault=None, *arguments, processes=None):
        """The id of a new process, in which the function `fault` is called with the trainer before it starts.

        Without `script` there is only `fault`. With `processes` it starts so many and waits for them: they are what
        torchrun starts.
        """
        request = request_of(script, flags, fault, *arguments) | {"log": str(self.log), "processes": processes}
        self.server.stdin.write(json.dumps(request).encode() + b"\n")
        self.pid, self.started = self.answer(300), time.monotonic()
        return self.pid

    def ends_within(self, seconds):
        return bool(select.select([self.server.stdout], [], [], seconds)[0])

    def answer(self, timeout):
        assert self.ends_within(timeout), f"no end in {timeout} s: {self.output()[-3000:]}"
        return int(self.server.stdout.readline())

    def end(self, timeout=300):
        """The exit code, -N for signal N; no process of the run may be left."""
        try:
            code = self.answer(timeout)
        except AssertionError:
            os.killpg(self.pid, signal.SIGKILL)
            self.answer(60)
            raise
        self.seconds = time.monotonic() - self.started
        deadline = time.monotonic() + 60  # workers look for their parent every five seconds
        while left := self.processes():
            assert time.monotonic() < deadline, f"left behind: {left}"
            time.sleep(0.05)
        return code

    def processes(self):
        """What is alive, or dead and not waited for, of the run's group."""
        return [process for process in psutil.process_iter(["status"]) if group_of(process.pid) == self.pid]

    def run(self, *request, timeout=300, processes=None):
        self.start(*request, processes=processes)
        return self.end(timeout)

    def kill(self):
        """Ends a run that a failed test has left, and takes its exit code: the next run would take it for its own."""
        while self.processes():
            os.killpg(self.pid, signal.SIGKILL)
            time.sleep(0.05)
        while self.ends_within(1):
            self.server.stdout.readline()

    def wait_for(self, condition, timeout=300):
        deadline = time.monotonic() + timeout
        while not condition():
            assert condition() or not self.ends_within(0), self.output()[-3000:]
            assert time.monotonic() < deadline, self.output()[-3000:]
            time.sleep(0.002)

    def output(self):
        return self.log.read_text(errors="replace")


def request_of(script, flags, fault=None, *arguments):
    fault = (fault.__module__, fault.__name__) if fault else None
    return {"script": script, "flags": list(map(str, flags)), "fault": fault, "arguments": arguments}


def group_of(pid):
    try:
        return os.getpgid(pid)
    except ProcessLookupError:
        return None


def serve():
    """Forks a process for each line of JSON; says its id and, once it has ended, its exit code."""
    adopt_orphans = 36  # PR_SET_CHILD_SUBREAPER: workers whose parent was killed are to be seen, and waited for, here
    ctypes.CDLL(None).prctl(adopt_orphans, 1)
    for script in (*SCRIPTS, "matplotlib.pyplot"):
        importlib.import_module(script)
    gc.freeze()  # what is imported stays: runs need not look through it for garbage
    for line in sys.stdin:
        pid = os.fork()
        if pid == 0:
            return json.loads(line)
        print(pid, flush=True)
        code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        print(code, flush=True)
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline:
            try:
                if os.waitpid(-1, os.WNOHANG) == (0, 0):
                    time.sleep(0.05)
            except ChildProcessError:
                break
    return None


def be(request):
    """The rest of this process is a run."""
    signal.signal(signal.SIGINT, signal.default_int_handler)  # which background jobs of a shell ignore
    signal.signal(signal.SIGHUP, signal.SIG_DFL)  # which nohup ignores
    if "log" in request:
        os.setpgid(0, 0)
        log = os.open(request["log"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_APPEND)
        os.dup2(log, 1)
        os.dup2(log, 2)
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    if not request.get("processes"):
        train(request)
        return
    from torch.multiprocessing import start_processes

    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    ranks = start_processes(be_rank, (request, port), nprocs=request["processes"], start_method="fork", join=False)
    while not ranks.join(grace_period=10):  # for the others to say why, where one has failed
        pass


def be_rank(rank, request, port):
    """One of several processes, with the environment that torchrun gives it."""
    size = str(request["processes"])
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=size, LOCAL_WORLD_SIZE=size)
    os.environ.update(MASTER_ADDR="localhost", MASTER_PORT=str(port))
    train(request)


def train(request):
    sys.argv = [f"{request['script']}.py", *request["flags"]]
    trainer = importlib.import_module(request["script"]) if request["script"] else None
    draw_in_two_steps()
    if request["fault"]:
        module, name = request["fault"]
        getattr(importlib.import_module(module), name)(trainer, *request["arguments"])
    if trainer:
        trainer.main(trainer.parse_args(request["flags"]))


def draw_in_two_steps():
    """No test of a run looks at what is drawn, and 28 steps are a third of a short run."""
    import diffusers

    for pipeline in (diffusers.FluxPipeline, diffusers.FluxFillPipeline):
        pipeline.__call__ = functools.partialmethod(pipeline.__call__, num_inference_steps=2)


if __name__ == "__main__":
    request = json.loads(sys.argv[1]) if len(sys.argv) > 1 else serve()
    if request:
        be(request)
