"""Fixtures of all tests: the embedded model, small data, runs of the commands, faults on order."""

from __future__ import annotations

import functools
import importlib
import json
import os
import shutil
import signal
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

if "PYTEST_XDIST_WORKER" in os.environ:  # as many processes as cores: one thread each
    os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # idle threads leave the cores to the others
os.environ.setdefault("DIFFUSERS_VERBOSITY", "error")  # as the commands do, but before imports
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ["HF_HUB_OFFLINE"] = "1"  # no test asks the network

import pytest
import torch

for number, usual in (
    (signal.SIGINT, signal.default_int_handler), (signal.SIGHUP, signal.SIG_DFL),
):  # fmt: skip
    if signal.getsignal(number) == signal.SIG_IGN:  # nohup, a job in the background
        signal.signal(number, usual)

SMALL = 6  # pairs of the small data set

# Triton reads this setting when it is first imported, so its interpreter has a process of its own
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
ON_GPU = [pytest.param(backend, marks=pytest.mark.gpu) for backend in ("cuda", "triton")]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


@pytest.fixture(autouse=True)
def same_start() -> Iterator[None]:
    """Every test starts with seed 0 and the same number of threads."""
    threads = torch.get_num_threads()
    torch.manual_seed(0)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def one_thread() -> None:
    """As many threads as processes that a test starts have, for the same bits."""
    torch.set_num_threads(1)


@pytest.fixture(params=["interpreter"] if INTERPRETED else ["cpu", *ON_GPU])
def device(request: pytest.FixtureRequest) -> Iterator[str]:
    """Device of an op's tensors: the CPU, or a GPU with one of the backends that can serve it.

    The interpreter runs the launchers that serve CUDA tensors, Triton's, on CPU tensors.
    """
    from oneshot_fast import ops

    if request.param == "cpu":
        yield "cpu"
    elif request.param == "interpreter":
        with interpreted_ops():
            yield "cpu"
    elif request.param not in ops.backends():
        pytest.skip(f"{request.param} is not among the backends here: {ops.backends()}")
    else:
        with ops.use_backend(request.param):
            yield "cuda"


@contextmanager
def interpreted_ops() -> Iterator[None]:
    """Serve CPU tensors by what serves CUDA tensors, in few squarings: the interpreter is slow."""
    from oneshot_fast import ops
    from oneshot_fast.kernels import skew_exp_tiled

    on_cuda = torch._C.DispatchKeySet(torch._C.DispatchKey.CUDA)
    library = torch.library.Library("oneshot_fast", "IMPL")
    names = [n for n in torch._C._dispatch_get_all_op_names() if n.startswith("oneshot_fast::")]
    with (
        ops.use_backend("triton"),
        pytest.MonkeyPatch.context() as patch,
        warnings.catch_warnings(),
    ):
        warnings.simplefilter("ignore")  # torch's, of kernels that are replaced
        for name in names:
            op = getattr(torch.ops.oneshot_fast, name.split("::")[1]).default
            library.impl(name, functools.partial(op.redispatch, on_cuda), "CPU")
        patch.setattr(skew_exp_tiled, "_SQUARINGS", 7)
        yield
    library._destroy()


@pytest.fixture
def poisoned_memory() -> Iterator[None]:
    """Fill new tensors with NaN, which shows every output element that a kernel leaves out."""
    # some torch ops in references and in second derivatives can only warn
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    """The file of two prompts."""
    from samples import PROMPTS

    path = tmp_path / "prompts.txt"
    path.write_text("\n".join(PROMPTS), encoding="utf-8")
    return path


@dataclass(frozen=True)
class Ended:
    """How a command ended; a negative code is the signal that killed it."""

    code: int
    out: str
    err: str

    @property
    def error(self) -> str:
        """The one line on stderr that a user error is."""
        lines = self.err.splitlines()
        assert len(lines) == 1 and lines[0].startswith("error: "), self.err
        return lines[0]


@pytest.fixture(scope="session")
def tiny() -> Any:
    """The embedded generator; its weights must be left as they are."""
    from oneshot_fast.generators.loading import load_generator

    return load_generator("tiny")


@pytest.fixture(scope="session")
def small_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The first pairs of the default data set; for a test to change there is ``data``."""
    from oneshot_fast.embedded.digits import write_default_dataset

    root = tmp_path_factory.mktemp("default")
    write_default_dataset(root)
    source, small = root / "train", root / "small"
    (small / "images").mkdir(parents=True)
    lines = (source / "pairs.jsonl").read_text(encoding="utf-8").splitlines()[:SMALL]
    for line in lines:
        shutil.copy(source / json.loads(line)["image"], small / "images")
    (small / "pairs.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return small


@pytest.fixture(scope="session")
def targets(tiny: Any, small_data: Path) -> list[Any]:
    """The small data set's targets, as the search takes them."""
    from oneshot_fast.data.pairs import read_pairs
    from oneshot_fast.generators.target_images import TargetImages
    from oneshot_fast.jobs.assign.options import AssignOptions
    from oneshot_fast.jobs.assign.targets import Preparer

    options = AssignOptions()
    preparer = Preparer(tiny, TargetImages(tiny), options, seed=0, resize_mode="crop")
    return preparer.prepare([*enumerate(read_pairs(small_data)[0])])[0]


@pytest.fixture
def data(tmp_path: Path, small_data: Path) -> Path:
    """A copy of the small data set."""
    return shutil.copytree(small_data, tmp_path / "data")


@pytest.fixture(scope="session")
def assigned(tmp_path_factory: pytest.TempPathFactory, small_data: Path) -> Path:
    """A finished assignment of the small data set, in batches of 4."""
    from oneshot_fast.assign import main

    folder = tmp_path_factory.mktemp("assigned") / "run"
    flags = f"--data_root {small_data} --output_root {folder} --model_id tiny --num_images 2"
    flags += " --assign_method rotation --lr 0.15 --steps 3 --batch_size 4"
    assert main(flags.split()) == 0
    return folder


@pytest.fixture
def call(capfd: pytest.CaptureFixture[str]) -> Callable[..., Ended]:
    """Run a command in this process: ``call("assign", "--steps", 3, ...)``."""

    def run(command: str, *argv: object) -> Ended:
        main = importlib.import_module(f"oneshot_fast.{command}").main
        capfd.readouterr()
        code = main([str(value) for value in argv])
        return Ended(code, *capfd.readouterr())

    return run


class Forks:
    """Commands in children that die, are interrupted or find the disk full when told to."""

    def __init__(self, logs: Path) -> None:
        """Start the server; ``logs`` takes the children's output."""
        self._server = subprocess.Popen(
            [sys.executable, str(Path(__file__).with_name("helpers") / "fork_server.py")],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )
        self._logs, self._count = logs, 0

    def start(
        self,
        command: str,
        argv: Sequence[object],
        watch: Path,
        *,
        at: int | str | None = None,
        signal_number: int = signal.SIGKILL,
        limit: int | None = None,
    ) -> tuple[int, Path]:
        """Start a command and return its pid, which is its process group, and its output's folder.

        Args:
            command: assign, sft or em.
            argv: Its flags.
            watch: Folder in which changes to the file system are counted.
            at: Just before this change (from 1, or the first to a path with this part), the child
                gets ``signal_number``.
            signal_number: The signal.
            limit: Bytes beyond which the child can write no file, as on a full disk.
        """
        self._count += 1
        log = self._logs / str(self._count)
        log.mkdir()
        request = {
            "command": command,
            "argv": [str(value) for value in argv],
            "watch": str(watch),
            "log": str(log),
            "at": at,
            "signal": int(signal_number),
            "limit": limit,
        }
        return self._ask(request), log

    def wait(self, started: tuple[int, Path]) -> Ended:
        """Wait for the end of a command."""
        code = self._ask({"wait": started[0]})
        return Ended(code, *((started[1] / name).read_text() for name in ("out", "err")))

    def run(self, command: str, argv: Sequence[object], watch: Path, **fault: Any) -> Ended:
        """Start a command and wait for its end; arguments as in ``start``."""
        return self.wait(self.start(command, argv, watch, **fault))

    def changes(self, command: str, argv: Sequence[object], watch: Path) -> int:
        """Run a command to its end without fault and return how many changes it made."""
        started = self.start(command, argv, watch)
        ended = self.wait(started)
        assert ended.code == 0, ended.err
        return int((started[1] / "changes").read_text())

    def close(self) -> None:
        """End the server."""
        assert self._server.stdin is not None
        self._server.stdin.close()
        self._server.wait()

    def _ask(self, request: dict[str, Any]) -> int:
        assert self._server.stdin is not None and self._server.stdout is not None
        self._server.stdin.write(json.dumps(request) + "\n")
        self._server.stdin.flush()
        return int(self._server.stdout.readline())


@pytest.fixture(scope="session")
def forks(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Forks]:
    """The server of commands in children."""
    server = Forks(tmp_path_factory.mktemp("forks"))
    yield server
    server.close()
