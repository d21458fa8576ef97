"""Beside a job's main line: work in threads, and Ctrl-C that waits for a step to end."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from types import FrameType, TracebackType
from typing import Any, TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")


def ahead(
    executor: Executor, function: Callable[[Item], Result], items: Iterable[Item]
) -> Iterator[Result]:
    """Results of ``function`` in order, the next one computed while the caller uses the last."""
    pending: Future[Result] | None = None
    for item in items:
        started = executor.submit(function, item)
        if pending is not None:
            yield pending.result()
        pending = started
    if pending is not None:
        yield pending.result()


class Background:
    """Calls of one function, in order, one at a time, in a thread.

    An error of a call is raised by the next ``submit`` or at the end of the ``with`` block, which
    waits for the last call, after Ctrl-C, too.
    """

    def __init__(self, function: Callable[..., object]) -> None:
        """Bind the function."""
        self._function = function
        self._executor = ThreadPoolExecutor(1)
        self._last: Future[object] | None = None

    def submit(self, *arguments: Any) -> None:
        """Wait for the last call, then start the next one."""
        last, self._last = self._last, None
        if last is not None:
            last.result()
        self._last = self._executor.submit(self._function, *arguments)

    def __enter__(self) -> Background:
        """Use the thread."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Wait for the last call; its error is raised unless the block ended with one."""
        self._executor.shutdown(wait=True)
        if error is None and self._last is not None:
            self._last.result()


class Interrupts:
    """Holds the first Ctrl-C back until ``check``; a second one interrupts at once."""

    def __init__(self) -> None:
        """Nothing is changed before ``with``."""
        self.pending = False
        self._old: Any = None

    def __enter__(self) -> Interrupts:
        """Take over SIGINT; Python allows it in the main thread only."""
        if threading.current_thread() is threading.main_thread():
            self._old = signal.signal(signal.SIGINT, self._hold)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Give SIGINT back."""
        if self._old is not None:
            signal.signal(signal.SIGINT, self._old)

    def _hold(self, number: int, frame: FrameType | None) -> None:
        self.pending = True
        signal.signal(signal.SIGINT, self._old)

    def check(self) -> None:
        """Raise the interrupt that was held back.

        Raises:
            KeyboardInterrupt: If there was a Ctrl-C.
        """
        if self.pending:
            raise KeyboardInterrupt
