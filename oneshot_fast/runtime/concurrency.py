"""Beside a job's main line: work in threads, and signals that wait for a step to end."""

import contextlib
import signal
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from types import FrameType
from typing import Any, NoReturn, TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")


def ahead(
    executor: Executor, function: Callable[[Item], Result], items: Iterable[Item]
) -> Iterator[Result]:
    """Results of ``function`` in order, the next one computed while the caller uses the last."""
    pending = deque[Future[Result]]()
    for item in items:
        pending.append(executor.submit(function, item))
        if len(pending) == 2:
            yield pending.popleft().result()
    if pending:
        yield pending.pop().result()


@contextlib.contextmanager
def in_background(function: Callable[..., object]) -> Iterator[Callable[..., None]]:
    """Yield what calls ``function`` in a thread: in order, one call at a time.

    An error of a call is raised by the next one or at the end of the block, which waits for the
    last call, after Ctrl-C, too.
    """
    running: list[Future[object]] = []

    def call(*arguments: Any) -> None:
        if running:
            running.pop().result()
        running.append(executor.submit(function, *arguments))

    with ThreadPoolExecutor(1) as executor:
        yield call
    if running:
        running.pop().result()


def stop(number: int, frame: FrameType | None = None) -> NoReturn:
    """End a run as Ctrl-C does: schedulers and closed terminals send SIGTERM and SIGHUP.

    Raises:
        KeyboardInterrupt: Always, with the signal's number.
    """
    raise KeyboardInterrupt(number)


@contextlib.contextmanager
def handling(handler: Callable[[int, FrameType | None], object], *names: str) -> Iterator[None]:
    """Let ``handler`` have the signals ``names``, as far as this system has them.

    Those that are ignored stay so (nohup), and Python allows it in the main thread only.
    """
    numbers = [getattr(signal, name) for name in names if hasattr(signal, name)]
    if threading.current_thread() is not threading.main_thread():
        numbers = []
    old = {number: signal.getsignal(number) for number in numbers}
    taken = {n: one for n, one in old.items() if one is not None and one != signal.SIG_IGN}
    try:
        for number in taken:
            signal.signal(number, handler)
        yield
    finally:
        for number, one in taken.items():
            signal.signal(number, one)


class Interrupts(contextlib.ExitStack):
    """Holds the first Ctrl-C, SIGTERM or SIGHUP back; a second one ends at once.

    Attributes:
        pending: number of the signal that came, for ``stop`` at a good moment; 0 before.
    """

    pending = 0

    def __enter__(self) -> "Interrupts":
        """Take over the signals."""
        self.enter_context(handling(self._hold, "SIGINT", "SIGTERM", "SIGHUP"))
        return self

    def _hold(self, number: int, frame: FrameType | None) -> None:
        self.pending = number
        self.close()
