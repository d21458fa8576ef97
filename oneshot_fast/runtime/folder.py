"""Run folders: one writer, resumed only with equal settings."""

import contextlib
import json
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import filelock

from oneshot_fast.errors import DamagedError, RunError
from oneshot_fast.runtime.files import TEMPORARY, delete, read_json, remove, replacing, write_json
from oneshot_fast.runtime.ledger import NAME, Ledger, ledger_of, listing, say, set_aside

# outputs that are written after the run, or by a tracker
_BY_OTHERS = {"logs", "report.html", "curves.png", "diagnostics.json"}
# settings that folders of before lack, and the value that computes what theirs do
_SINCE = {"lr_unit": "radians", "lr_num_cycles": 1, "lr_power": 1.0}


class RunFolder:
    """Exclusive use of one output folder, bound to one set of settings.

    ``run.json`` keeps the settings. Entering locks the folder (the lock dies with the process) and
    compares; a finished or interrupted run goes on only with equal settings. What is written
    meanwhile is noted in the folder's list, see ``ledger``.
    """

    def __init__(
        self,
        path: Path,
        settings: Mapping[str, Any],
        outputs: Sequence[str],
        overwrite: bool = False,
        verify: bool = False,
    ) -> None:
        """Describe the run; nothing is touched before ``with``.

        Args:
            path: The folder; made if absent.
            settings: Whatever a result depends on; JSON values.
            outputs: Names inside ``path`` that the run writes.
            overwrite: Start anew instead of resuming.
            verify: Compare every file's hash with the one noted, not only sizes.
        """
        self.path = Path(path)
        self._settings = json.loads(json.dumps(settings))
        self._outputs = (*outputs, "run.json")
        self._overwrite, self._verify = overwrite, verify
        self.damaged: list[str] = []  # what was found so and set aside, below the folder
        self.is_writable = True
        self._lock = filelock.FileLock(self.path / ".lock")

    def __enter__(self) -> "RunFolder":
        """Lock the folder, compare settings, and set aside what is damaged.

        Raises:
            RunError: If the folder is in use or holds other files or a different run.
            OSError: If it cannot be written.
        """
        with contextlib.ExitStack() as held:
            try:
                self.path.mkdir(parents=True, exist_ok=True)
                held.enter_context(self._lock.acquire(timeout=0))
            except filelock.Timeout:
                raise RunError(
                    f"{self.path} is in use by another process; choose another"
                ) from None
            except OSError:
                if self._overwrite or not (self.path / "run.json").is_file():
                    raise
                self.is_writable = False  # such as a finished run on a read-only drive
            self._prepare()
            held.enter_context(listing(self.ledger))
            if not (self.path / "run.json").exists():
                write_json(self.path / "run.json", self._settings)
                self.ledger.note(self.path / "run.json", with_text=True)
                for name in _BY_OTHERS.intersection(self._outputs):
                    self.ledger.put({"path": name, "by_others": True})
            self._held = held.pop_all()
        return self

    def __exit__(self, kind: object, *error: object) -> None:
        """Complete the list after a run to its end, and release the lock."""
        if kind is None and self.is_writable:
            self.ledger.seal()
        self._held.close()

    def reopen(self, name: str, vital: Callable[[str], bool] = bool) -> None:
        """Remove the summary ``name`` unless the run wrote it, and all ``vital`` files are whole.

        Without it the run counts as unfinished, in every process.
        """
        path = self.path / name
        if not path.exists() or (self.ledger.is_sealed(name) and not any(map(vital, self.damaged))):
            return
        self.ledger.claim(path)
        remove(path)

    def is_other(self) -> bool:
        """Whether the folder holds a run with other settings."""
        path = self.path / "run.json"
        with contextlib.suppress(DamagedError):  # restored when the run begins
            return path.exists() and bool(_differences(read_json(path), self._settings))
        return False

    def _prepare(self) -> None:
        """Make the folder ready for this run: empty, or as an earlier one left it."""
        outer, self.ledger = ledger_of(self.path / NAME), Ledger(self.path)
        run_json = self.path / "run.json"
        present = [name for name in self._outputs if os.path.lexists(self.path / name)]
        if present and not run_json.exists() and "run.json" not in self.ledger.entries:
            raise RunError(
                f"{self.path} holds {', '.join(present)}, which no run of ours wrote; choose "
                "another folder"
            )
        if outer is not None and not outer.owns(outer.key(self.ledger.path)):
            outer.put({"path": outer.key(self.ledger.path)})
        if not present and not self.ledger.entries:
            return
        if self.is_writable:
            self._remove_leftovers()
        if self._overwrite:
            if not self.ledger.is_ours:
                raise RunError(
                    f"{self.ledger.path}, the list of what the run wrote, is damaged or of an "
                    f"older version; remove {self.path} yourself, and repeat"
                )
            self.ledger.delete()
            self.ledger = Ledger(self.path)
            self.path.mkdir(exist_ok=True)
            return
        self._restore(run_json.name)
        try:
            changes = _differences(read_json(run_json), self._settings)
        except DamagedError:
            raise RunError(
                f"{run_json} is damaged, and so is {NAME}, which has it, too: restore one from a "
                "copy, or choose another folder"
            ) from None
        if changes:
            raise RunError(
                f"{self.path} holds a run with other settings ({'; '.join(changes)}); "
                "repeat the old ones to resume, or start anew with --overwrite"
            )
        self._check()

    def _remove_leftovers(self) -> None:
        """Remove what a kill left half written."""
        for name in self._outputs:
            for leftover in (
                *self.path.glob(f"{TEMPORARY}*{name}"), *(self.path / name).glob(TEMPORARY + "*")
            ):  # fmt: skip
                delete(leftover)
        delete(self.path / (TEMPORARY + "run.json"))

    def _check(self) -> None:
        """Restore damaged texts; set aside what else is damaged, so that it is made again."""
        if not self.ledger.is_whole and NAME not in self.ledger.entries:
            say(
                f"{self.ledger.path} is damaged or not there; the other files are taken as they are"
            )
            for name in sorted({*self._outputs} - _BY_OTHERS):
                for file in (self.path / name, *(self.path / name).rglob("*")):
                    inner = any((p / NAME).exists() for p in file.parents if self.path in p.parents)
                    if file.is_file() and not inner and not self.ledger.owns(self.ledger.key(file)):
                        self.ledger.note(file)
            self.ledger.put({"path": NAME, "damaged": True})
        found = self.ledger.damaged(self._verify)
        self.damaged = [key for key in found if not self._restore(key)]
        for key in dict.fromkeys(map(self.ledger.whole, self.damaged)):
            if (self.path / key).exists():
                set_aside(self.path / key, "damaged")
            self.ledger.forget(key)
        if self.damaged:
            more = f" and {len(self.damaged) - 3} more" if len(self.damaged) > 3 else ""
            say(
                f"{self.path}: not as this run wrote them, set aside, and what is needed is made "
                f"again: {', '.join(self.damaged[:3])}{more}"
            )

    def _restore(self, key: str) -> bool:
        """Write a small text as it was, if it is not, and the list has it."""
        row, path = self.ledger.entries.get(key, {}), self.path / key
        text = row.get("text")
        if text is None:
            return False
        if not path.is_file() or path.read_bytes() != text.encode():
            if path.exists():
                set_aside(path, "damaged")
            with replacing(path) as temporary:
                temporary.write_bytes(text.encode())
            say(f"{path} was damaged or gone; restored from {NAME}")
        return True


def list_settings(
    folder: Path | None, failed: Sequence[int], identity: Callable[[Sequence[int]], str]
) -> dict[str, Any]:
    """Settings of a run that depends on a list whose broken lines may be mended.

    Args:
        folder: of the run, which may have begun: the lines that failed then do not count. None if
            it begins anew.
        failed: lines that fail now.
        identity: of the list without such lines.
    """
    with contextlib.suppress(DamagedError, OSError):
        then = {} if folder is None else read_json(folder / "run.json")
        lines = then.get("failed_lines")
        if isinstance(lines, list) and identity(lines) == then.get("data"):
            failed = lines
    return {"data": identity(failed), "failed_lines": [*failed]}


def _differences(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    old = {**{key: value for key, value in _SINCE.items() if key in new}, **old}
    keys = [key for key in {**old, **new} if old.get(key) != new.get(key)]
    return [f"{key}: {old.get(key)} then, {new.get(key)} now" for key in keys]
