"""Run folders: one writer, resumed only with equal settings."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import filelock

from oneshot_fast.errors import RunError
from oneshot_fast.runtime.files import TEMPORARY, read_json, write_json


class RunFolder:
    """Exclusive use of one output folder, bound to one set of settings.

    ``run.json`` keeps the settings. Entering locks the folder (the lock dies with the process) and
    compares; a finished or interrupted run goes on only with equal settings.
    """

    def __init__(
        self,
        path: Path,
        settings: Mapping[str, Any],
        outputs: Sequence[str],
        overwrite: bool = False,
    ) -> None:
        """Describe the run; nothing is touched before ``with``.

        Args:
            path: The folder; made if absent.
            settings: Whatever a result depends on; JSON values.
            outputs: Names inside ``path`` that the run owns and ``overwrite`` removes.
            overwrite: Start anew instead of resuming.
        """
        self.path = Path(path)
        self._settings = json.loads(json.dumps(settings))
        self._outputs = (*outputs, "run.json")
        self._overwrite = overwrite
        self._lock = filelock.FileLock(self.path / ".lock")

    def __enter__(self) -> RunFolder:
        """Lock the folder and compare settings.

        Raises:
            RunError: If the folder is in use or holds other files or a different run.
            OSError: If it cannot be written.
        """
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            self._lock.acquire(timeout=0)
        except filelock.Timeout:
            raise RunError(f"{self.path} is in use by another process; choose another") from None
        try:
            self._prepare()
        except BaseException:
            self._lock.release()
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Release the lock."""
        self._lock.release()

    def is_other(self) -> bool:
        """Whether the folder holds a run with other settings."""
        path = self.path / "run.json"
        return path.exists() and bool(_differences(read_json(path), self._settings))

    def _prepare(self) -> None:
        run_json = self.path / "run.json"
        present = [name for name in self._outputs if os.path.lexists(self.path / name)]
        if present and not run_json.exists():
            raise RunError(
                f"{self.path} holds {', '.join(present)}, which no run of ours wrote; choose "
                "another folder"
            )
        for name in self._outputs:
            path, doomed = self.path / name, self.path / (TEMPORARY + name)
            for leftover in (*self.path.glob(f"{TEMPORARY}*{name}"), *path.glob(TEMPORARY + "*")):
                _remove(leftover)
            if self._overwrite and os.path.lexists(path):
                path.rename(doomed)  # a kill leaves nothing half removed
                _remove(doomed)
        if not run_json.exists():
            write_json(run_json, self._settings)
            return
        changes = _differences(read_json(run_json), self._settings)
        if changes:
            raise RunError(
                f"{self.path} holds a run with other settings ({'; '.join(changes)}); "
                "repeat the old ones to resume, or start anew with --overwrite"
            )


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _differences(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    keys = [key for key in {**old, **new} if old.get(key) != new.get(key)]
    return [f"{key}: {old.get(key)} then, {new.get(key)} now" for key in keys]
