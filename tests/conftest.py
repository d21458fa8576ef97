"""Fixtures of all tests: the embedded model, small data, runs of the commands, faults on order."""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import functools
import importlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import unittest.mock
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

if "PYTEST_XDIST_WORKER" in os.environ:  # as many processes as cores: one thread each
    os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # idle threads leave the cores to the others
os.environ.setdefault("DIFFUSERS_VERBOSITY", "error")  # as the commands do, but before imports
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
# what torch.compile makes is not optimised, nor by other processes: most of a compiler's time
os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")
os.environ.setdefault("TORCHINDUCTOR_VEC_ISA_OK", "0")
os.environ.setdefault("TORCHINDUCTOR_DEBUG_COMPILE", "1")
os.environ["HF_HUB_OFFLINE"] = "1"  # no test asks the network

with contextlib.suppress(ImportError):  # the tests on a GPU do without matplotlib
    import shortcuts
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
# where there is no GPU the variants on it are not even collected; test_gpu.py's tests say so
BACKENDS = ("cuda", "triton") if torch.cuda.is_available() else ()
ON_GPU = [pytest.param(backend, marks=pytest.mark.gpu) for backend in BACKENDS]


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_auto_num_workers() -> int:
    """One more than cores, as some tests wait for processes or clocks."""
    cores = (
        os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else range(os.cpu_count() or 1)
    )
    return len(cores) + 1


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    # the longest first, or one of them would be alone at the end, with the other cores idle
    items.sort(key=lambda item: item.get_closest_marker("slow") is None)
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


@pytest.fixture(autouse=True)
def same_start() -> Iterator[None]:
    """Every test starts with seed 0 and the same number of threads."""
    if "shortcuts" in sys.modules:
        shortcuts.share_networks()
    threads = torch.get_num_threads()
    # without a GPU, torch.manual_seed keeps for it the stack, which takes longer than most tests
    (torch.manual_seed if BACKENDS else torch.default_generator.manual_seed)(0)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def drawn() -> Callable[[], AbstractContextManager[object]]:
    """In its context figures are drawn, which are blank elsewhere."""
    return lambda: unittest.mock.patch.object(shortcuts.Figure, "savefig", shortcuts.DRAW)


@pytest.fixture
def plots(drawn: Callable[[], AbstractContextManager[object]]) -> Iterator[None]:
    """For a test which looks at what is drawn."""
    with drawn():
        yield


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
        patch_interpreter(patch)
        yield
    library._destroy()


def patch_interpreter(patch: pytest.MonkeyPatch) -> None:
    """Leave out what Triton's interpreter does in vain, which is most of its time.

    It patches its language again for every function that a kernel calls, and computes every sum
    and product of integers a second time, for an assertion that it makes only where it debugs.
    """
    import triton.language as tl
    from triton.runtime import interpreter

    patch_language = interpreter._patch_lang

    def patch_unless_done(fn: Any) -> Any:
        modules = [value for value in fn.__globals__.values() if value is tl or value is tl.core]
        todo = any(tl.core.is_builtin(module.load) for module in modules)
        return patch_language(fn) if todo else interpreter._LangPatchScope()

    patch.setattr(interpreter, "_patch_lang", patch_unless_done)
    builder = interpreter.interpreter_builder
    unchecked = dataclasses.replace(builder.options, sanitize_overflow=False)
    patch.setattr(builder, "options", unchecked)


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
def small_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model for what needs no digits: the embedded one with a smaller UNet, of random weights."""
    from oneshot_fast.generators.loading import load_generator

    pipe, folder = load_generator("tiny").pipe, tmp_path_factory.mktemp("small") / "model"
    less = {"block_out_channels": (32,), "mid_block_type": None, "attention_head_dim": (2,)}
    less |= {"down_block_types": ("CrossAttnDownBlock2D",), "up_block_types": ("UpBlock2D",)}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        pipe.unet = type(pipe.unet).from_config({**pipe.unet.config, **less})
    pipe.save_pretrained(folder)
    return folder


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


def assign(model: object, data: Path, folder: Path) -> Path:
    """A finished assignment in ``folder``, in batches of 4."""
    from oneshot_fast.assign import main

    flags = f"--data_root {data} --output_root {folder} --model_id {model} --num_images 2"
    flags += " --assign_method rotation --lr 0.15 --steps 3 --batch_size 4"
    assert main(flags.split()) == 0
    return folder


@pytest.fixture(scope="session")
def assigned(tmp_path_factory: pytest.TempPathFactory, small_data: Path) -> Path:
    """A finished assignment of the small data set."""
    return assign("tiny", small_data, tmp_path_factory.mktemp("assigned") / "run")


@pytest.fixture(scope="session")
def small_assigned(
    tmp_path_factory: pytest.TempPathFactory, small_data: Path, small_model: Path
) -> Path:
    """The same with the small model."""
    return assign(small_model, small_data, tmp_path_factory.mktemp("small-assigned") / "run")


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

    def __init__(self, logs: Path, address: Path) -> None:
        """Connect to the server at ``address``, or start it; ``logs`` takes children's output."""
        self._logs, self._count, self._address = logs, 0, address
        self._server: subprocess.Popen[str] | None = None
        self._socket = socket.socket(socket.AF_UNIX)
        with self._alone():
            if not address.exists():
                script = Path(__file__).with_name("helpers") / "fork_server.py"
                self._server = subprocess.Popen(
                    [sys.executable, script, address],
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    text=True,
                    # hashes are other ones than here, so that no result may depend on them
                    env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONHASHSEED": "1"},
                )
                assert self._server.stdout is not None and self._server.stdout.readline()
            self._socket.connect(str(address))
        self._lines = self._socket.makefile("rw")

    def start(
        self,
        command: str,
        argv: Sequence[object],
        watch: Path,
        *,
        at: int | str | None = None,
        signal_number: int = signal.SIGKILL,
        limit: int | None = None,
        environment: dict[str, str] | None = None,
    ) -> tuple[int, Path]:
        """Start a command and return its pid, which is its process group, and its output's folder.

        Args:
            command: Such as assign, or a script's path.
            argv: Its flags.
            watch: Folder in which changes to the file system are counted.
            at: Just before this change (from 1, or the first to a path with this part, or with a
                part of "os.rename PATH"), the child gets ``signal_number``.
            signal_number: The signal.
            limit: Bytes beyond which the child can write no file, as on a full disk.
            environment: Variables that the child has besides.
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
            "environment": environment or {},
        }
        return self._ask(request), log

    def start_two(
        self, command: str, argv: Sequence[object], watch: Path, **environment: str
    ) -> list[tuple[int, Path]]:
        """Start two processes on one job, with what a launcher tells them; as ``start``."""
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = str(free.getsockname()[1])
        environment |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": "2"}
        environment |= {"LOCAL_WORLD_SIZE": "2", "CUDA_VISIBLE_DEVICES": ""}
        return [
            self.start(command, argv, watch, environment=environment | {"RANK": k, "LOCAL_RANK": k})
            for k in "01"
        ]

    def run_two(self, *job: Any, **environment: str) -> list[Ended]:
        """Start two processes on one job and wait for their ends; arguments as in ``start_two``."""
        return [self.wait(started) for started in self.start_two(*job, **environment)]

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

    def load(self, model: Path) -> None:
        """Have a model's networks at hand in every child."""
        self._ask({"load": str(model)})

    def close(self) -> None:
        """End the server, if it was started here; who is connected keeps its fork."""
        self._lines.close()
        self._socket.close()
        if self._server is not None:
            assert self._server.stdin is not None
            with self._alone():
                self._server.stdin.close()
                self._server.wait()

    @contextmanager
    def _alone(self) -> Iterator[None]:
        """While no other process starts or ends the server."""
        with open(self._address.with_suffix(".lock"), "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield

    def _ask(self, request: dict[str, Any]) -> int:
        self._lines.write(json.dumps(request) + "\n")
        self._lines.flush()
        return int(self._lines.readline())


@pytest.fixture(scope="session")
def forks(tmp_path_factory: pytest.TempPathFactory, small_model: Path) -> Iterator[Forks]:
    """The server of commands in children, one for all processes of xdist."""
    home = tmp_path_factory.getbasetemp()
    home = home.parent if "PYTEST_XDIST_WORKER" in os.environ else home
    server = Forks(tmp_path_factory.mktemp("forks"), home / "fork-server")
    server.load(small_model)
    yield server
    server.close()
