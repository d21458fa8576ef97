"""Runs commands in forked children, with faults on order; the slow imports happen once.

Listens at the socket in its argument until stdin ends, and has a fork of itself for each process
that connects. A request is a line of JSON, and so is its answer: the pid for what ``Forks.start``
asks, the exit status for {"wait": pid}, 0 for {"load": model}, once its networks are at hand.
"""

from __future__ import annotations

import contextlib
import importlib
import io
import json
import os
import resource
import runpy
import select
import signal
import socket
import sys
import traceback
from typing import Any

import tqdm.std

# a lock that all forks share: one that is killed while it draws a bar would stop the others
tqdm.std.TqdmDefaultWriteLock.mp_lock = None
import shortcuts  # noqa: E402
import torch  # noqa: E402

COMMANDS = {
    name: importlib.import_module(f"oneshot_fast.{name}")
    for name in ("assign", "distill", "sft", "em", "optimize", "prefer", "reinforce", "scale")
}
for name in (
    "accelerate",
    "diffusers.guiders",
    "diffusers.pipelines.stable_diffusion_xl.pipeline_stable_diffusion_xl",
    "matplotlib.pyplot",
    "oneshot_fast.evaluation.measures",
    "oneshot_fast.generators.loading",
    "oneshot_fast.noise.checks",
    "oneshot_fast.report.em",
    "oneshot_fast.report.page",
    "oneshot_fast.generators.target_images",
    "oneshot_fast.embedded.classifier",
    "peft",
):  # what the commands import only once they run
    importlib.import_module(name)
shortcuts.share_networks()
# and what their first use makes: patterns of names of weights, the page, laws, flags
os.environ["TOKENIZERS_PARALLELISM"] = "false"  # or tokenizers speak of the fork
load_generator = sys.modules["oneshot_fast.generators.loading"].load_generator
load_generator("tiny")
sys.modules["oneshot_fast.report.page"].template()
for patches in (64, 96):  # of 4 and of 6 noises
    sys.modules["oneshot_fast.noise.checks"].eigenvalue_band(patches, 16)
with contextlib.redirect_stderr(io.StringIO()):
    assert {command.main(["--none"]) for command in COMMANDS.values()} == {2}

CHANGES = {"os.rename", "os.mkdir", "os.remove", "os.rmdir", "os.symlink", "os.link", "os.truncate"}


def watch(folder: str, at: int | str | None, signal_number: int) -> list[int]:
    """Count the changes to files under ``folder``; just before number ``at``, send the signal.

    ``at`` may also be a part of a path, or of "os.rename PATH": the first such change.
    """
    seen = [0]

    def hook(event: str, args: tuple[Any, ...]) -> None:
        writes = event == "open" and isinstance(args[2], int) and args[2] & os.O_ACCMODE
        if (writes or event in CHANGES) and folder in str(args[0]):
            seen[0] += 1
            if seen[0] == at or (isinstance(at, str) and at in f"{event} {args[0]}"):
                signal.raise_signal(signal_number)  # to this thread, as abort() does

    sys.addaudithook(hook)
    return seen


def run_child(request: dict[str, Any]) -> int:
    """Run the command with its fault and return its exit code; output goes to files in ``log``."""
    os.setsid()
    os.environ.update(request["environment"])
    for descriptor, name in ((1, "out"), (2, "err")):
        path = os.path.join(request["log"], name)
        os.dup2(os.open(path, os.O_CREAT | os.O_TRUNC | os.O_WRONLY), descriptor)
    torch.set_num_threads(1)
    if request["limit"] is not None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (request["limit"], resource.RLIM_INFINITY))
    seen = watch(request["watch"], request["at"], request["signal"])
    if request["command"] in COMMANDS:
        code = COMMANDS[request["command"]].main(request["argv"])
    else:
        sys.argv = [request["command"], *request["argv"]]
        runpy.run_path(request["command"], run_name="__main__")
        code = 0
    resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY,) * 2)
    with open(os.path.join(request["log"], "changes"), "w", encoding="ascii") as file:
        file.write(str(seen[0]))
    return int(code)


def fork(request: dict[str, Any]) -> int:
    """Start a child and return its pid."""
    pid = os.fork()
    if pid:
        return pid
    code = 70
    try:
        code = run_child(request)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def serve(client: socket.socket) -> None:
    """Answer until the client goes."""
    with client.makefile("rw") as lines:
        for line in lines:
            request = json.loads(line)
            answer = 0
            if "load" in request:
                load_generator(request["load"])
            elif "wait" in request:
                answer = os.waitstatus_to_exitcode(os.waitpid(request["wait"], 0)[1])
            else:
                answer = fork(request)
            lines.write(f"{answer}\n")
            lines.flush()


def main() -> None:
    """Serve until stdin ends."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(sys.argv[1])
        server.listen()
        print("listening", flush=True)
        while server in select.select([server, sys.stdin], [], [])[0]:
            client, _ = server.accept()
            if not os.fork():
                try:
                    serve(client)
                except BaseException:
                    traceback.print_exc()
                finally:
                    os._exit(0)
            client.close()
    os.unlink(sys.argv[1])


if __name__ == "__main__":
    main()
