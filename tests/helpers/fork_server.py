"""Runs commands in forked children, with faults on order; the slow imports happen once.

Reads one JSON request per line on stdin and answers on stdout with one JSON line: the pid for what
``Forks.start`` asks, the exit status for {"wait": pid}.
"""

from __future__ import annotations

import importlib
import json
import os
import resource
import runpy
import signal
import sys
import traceback
from typing import Any

import shortcuts
import torch

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
    "oneshot_fast.report.em",
    "oneshot_fast.report.page",
    "oneshot_fast.generators.target_images",
    "oneshot_fast.embedded.classifier",
    "peft",
):  # what the commands import only once they run
    importlib.import_module(name)
shortcuts.share_networks()
# and what their first use compiles: transformers' patterns of names of weights, the page
os.environ["TOKENIZERS_PARALLELISM"] = "false"  # or tokenizers speak of the fork
sys.modules["oneshot_fast.generators.loading"].load_generator("tiny")
sys.modules["oneshot_fast.report.page"].template()

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
                os.kill(os.getpid(), signal_number)

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


def main() -> None:
    """Serve until stdin ends."""
    answers = os.fdopen(os.dup(1), "w")
    signal.signal(signal.SIGINT, signal.default_int_handler)
    for line in sys.stdin:
        request = json.loads(line)
        if "wait" in request:
            answer = os.waitstatus_to_exitcode(os.waitpid(request["wait"], 0)[1])
        else:
            answer = fork(request)
        answers.write(f"{answer}\n")
        answers.flush()


if __name__ == "__main__":
    main()
