"""Ctrl-C that waits for a step to end."""

from __future__ import annotations

import signal
import threading
from types import FrameType, TracebackType
from typing import Any


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
