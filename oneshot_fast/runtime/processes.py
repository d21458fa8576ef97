"""Several processes on one job, as ``accelerate launch`` or ``torchrun`` start them, or just one.

The main process keeps a run's folder: it locks it, compares settings and writes what there is once.
The others do their part of the work, write only their own shards, and wait for it where they must.
"""

import contextlib
import itertools
import os
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from datetime import timedelta
from typing import TYPE_CHECKING, TypeVar

import torch
from torch import Tensor

from oneshot_fast.errors import RunError, UserError, one_line, require
from oneshot_fast.runtime.folder import RunFolder
from oneshot_fast.runtime.ledger import Ledger, listing

if TYPE_CHECKING:
    from accelerate import PartialState

S = TypeVar("S")
T = TypeVar("T")
_NETWORK = "the network"
_NOTICE = 60.0  # seconds after which a process says whom it waits for
_DEEPSPEED = "ACCELERATE_USE_DEEPSPEED"  # read by training/engines.py
_UNUSED = {
    "ACCELERATE_USE_MEGATRON_LM": "Megatron-LM",
    "ACCELERATE_MIXED_PRECISION": "mixed precision (see --dtype)",
    "ACCELERATE_DYNAMO_BACKEND": "TorchDynamo (see --compile)",
    "ACCELERATE_USE_PARALLELISM_CONFIG": "the parallelism config",
    "ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "gradient accumulation (see the flag of that name)",
}
_timeout = timedelta(hours=12)  # how long a process waits for a slower one
_AT_ONCE = 64  # results per process that are exchanged together, in memory of the device


def processes() -> "PartialState":
    """This process among the others: ``is_main_process``, ``num_processes``, ``device``, ...

    Raises:
        UserError: If accelerate cannot start them as its config says.
    """
    from accelerate import PartialState
    from accelerate.utils import parse_flag_from_env

    if PartialState._shared_state:
        return PartialState()
    names = (_DEEPSPEED, *_UNUSED)
    set_aside = {name: os.environ.pop(name) for name in names if name in os.environ}
    off = ("", "no", "false", "1")
    unused = [said for name, said in _UNUSED.items() if set_aside.get(name, "").lower() not in off]
    if unused and os.environ.get("RANK", "0") == "0":
        said = ", ".join(unused)
        print(f"note: of accelerate's config this is not used here: {said}", file=sys.stderr)
    try:  # accelerate would look for the packages
        on_cpu = parse_flag_from_env("ACCELERATE_USE_CPU") or not torch.accelerator.is_available()
        return PartialState(cpu=on_cpu, timeout=_timeout)
    except (ImportError, ValueError, RuntimeError) as error:
        raise UserError(
            f"accelerate cannot start as its config or the launcher says: {one_line(error)}"
        ) from None
    finally:
        os.environ.update(set_aside)


def set_timeout(minutes: float) -> None:
    """Set how long a process waits for another; before the first use of the others.

    Raises:
        UserError: If that is no time.
    """
    global _timeout
    require(0 < minutes <= 1e6, f"timeout_minutes is {minutes}; give a positive number")
    _timeout = timedelta(minutes=minutes)


def is_main() -> bool:
    """Whether this process keeps the folder."""
    return bool(processes().is_main_process)


def barrier() -> None:
    """Wait until every process has come here."""
    with meeting():
        processes().wait_for_everyone()


@contextlib.contextmanager
def meeting() -> Iterator[None]:
    """What all processes do together; after a minute those that came name those that did not.

    Raises:
        RunError: If they did not come in time.
    """
    here = processes()
    if here.num_processes == 1:
        yield
        return
    from torch.distributed.distributed_c10d import _get_default_store

    store, me = _get_default_store(), here.process_index
    number = store.add(f"oneshot_fast/meetings/{me}", 1)

    def absent() -> str:
        others = (k for k in range(here.num_processes) if k != me)
        late = [k for k in others if store.add(f"oneshot_fast/meetings/{k}", 0) < number]
        return "process " + ", ".join(map(str, late)) if late else _NETWORK

    def notice() -> None:
        if (late := absent()) != _NETWORK:
            print(f"process {me} waits for {late}", file=sys.stderr, flush=True)

    timer, started = threading.Timer(_NOTICE, notice), time.monotonic()
    timer.daemon = True
    timer.start()
    try:
        yield
    except RuntimeError:
        if time.monotonic() - started < 0.9 * _timeout.total_seconds():
            raise
        raise RunError(
            f"process {me} waited {_timeout.total_seconds() / 60:g} minutes for {absent()}; end "
            "all and repeat the command to go on (--timeout_minutes waits longer)"
        ) from None
    finally:
        timer.cancel()


def largest(number: int) -> int:
    """The largest number that any process gives; all wait for each other."""
    if processes().num_processes == 1:
        return number
    tensor = torch.tensor(number, device=processes().device)
    with meeting():
        torch.distributed.all_reduce(tensor, torch.distributed.ReduceOp.MAX)
        return int(tensor)


@contextlib.contextmanager
def kept_by_main(folder: RunFolder) -> Iterator[None]:
    """Enter ``folder`` in the main process, and let all begin and end together."""
    with folder if is_main() else contextlib.nullcontext():
        barrier()
        with contextlib.nullcontext() if is_main() else listing(Ledger(folder.path)):
            yield
        barrier()


def main_first(work: Callable[[], T]) -> T:
    """Let the main process do ``work`` first, so that the others find its files."""
    if is_main():
        result = work()
        barrier()
        return result
    barrier()
    return work()


def gather_objects(items: Sequence[T]) -> list[T]:
    """The items of all processes, in the order of the processes."""
    if processes().num_processes == 1:
        return list(items)
    from accelerate.utils import gather_object

    with meeting():
        return list(gather_object(list(items)))


def map_over_processes(work: Callable[[S], T], items: Iterable[S]) -> Iterator[T]:
    """``work`` of each of the items, done by one process and known to all, in their order.

    Only some are in memory at once. All processes go through all of them.

    Args:
        work: Gives the same in every process; pickled on its way to the others.
        items: The same in every process.
    """
    here, left = processes(), iter(items)
    n = here.num_processes
    while these := [*itertools.islice(left, _AT_ONCE * n)]:
        parts = gather_objects([[work(item) for item in these[here.process_index :: n]]])
        yield from (parts[k % n][k // n] for k in range(len(these)))


def all_reduce(tensor: Tensor) -> None:
    """Replace ``tensor`` by its sum over the processes, the same bits everywhere."""
    if processes().num_processes > 1:
        with meeting():
            torch.distributed.all_reduce(tensor)


def claims(job: str) -> Iterator[int]:
    """Numbers 0, 1, 2, ... of pieces of work; each number goes to one process only.

    They are handed out on demand, by a counter of the process group's store, so that a slow process
    does not hold up the others.

    Args:
        job: Name of the counter, new for every job.
    """
    if processes().num_processes == 1:
        yield from itertools.count()
    from torch.distributed.distributed_c10d import _get_default_store

    store = _get_default_store()
    while True:
        yield store.add(f"oneshot_fast/{job}", 1) - 1


def lost_another(error: RuntimeError) -> bool:
    """Whether torch raised ``error`` because another process has ended."""
    signs = ("by peer", "Broken pipe", "remote process exited")  # gloo, the store, NCCL
    return any(sign in str(error) for sign in signs) and processes().num_processes > 1


def leave() -> None:
    """Leave the others at the end of a command; a process that just exits can abort them."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        barrier()
        torch.distributed.destroy_process_group()
