"""The download command against a small hub on this machine: HF_ENDPOINT points there."""

from __future__ import annotations

import hashlib
import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from huggingface_hub import constants
from huggingface_hub.utils import close_session

from oneshot_fast.errors import ModelError
from oneshot_fast.runtime import hub as client
from oneshot_fast.runtime.hub import _remote_file

COMMIT = "0123456789abcdef0123456789abcdef01234567"
WEIGHTS = "HPS_v2.1_compressed.pt"
# the hub's client writes 10 MiB at a time
LARGE = bytes(range(256)) * (21 << 12)
STOP = 15 << 20
HEAD = "sac+logos+ava1-l14-linearMSE.pth"
FILES = {
    "xswu/HPSv2": {"HPS_v2_compressed.pt": b"version 2.0", WEIGHTS: LARGE, "README.md": b"read me"},
    "openai/clip-vit-large-patch14": {"vocab.json": b"{}", "merges.txt": b"#version: 0.2\n"},
    "camenduru/improved-aesthetic-predictor": {HEAD: b"not the published head"},
}


@dataclass
class Hub:
    """Serves FILES as the hub does; the fields say what goes wrong, once each.

    Attributes:
        url: Its address.
        stop_at: A transfer of WEIGHTS stops after so many bytes.
        hang: The stopped connection is held open instead of closed.
        corrupt: One byte of WEIGHTS is another.
        fault: What it always does with WEIGHTS: stall, drip or endless.
        gets: Name and Range header of each file that was asked for.
        stopped: Set when a transfer was stopped.
    """

    url: str = ""
    stop_at: int | None = None
    hang: bool = False
    corrupt: bool = False
    fault: str = ""
    gets: list[tuple[str, str | None]] = field(default_factory=list)
    stopped: threading.Event = field(default_factory=threading.Event)
    released: threading.Event = field(default_factory=threading.Event)


def info_of(repository: str) -> bytes:
    """The hub's answer about a repository: small files by git's hash, large ones by SHA-256."""
    siblings = []
    for name, data in FILES[repository].items():
        entry: dict[str, object] = {"rfilename": name, "size": len(data)}
        entry["blobId"] = hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()
        if name.endswith((".pt", ".pth")):
            sha256 = hashlib.sha256(data).hexdigest()
            entry["lfs"] = {"sha256": sha256, "size": len(data), "pointerSize": 130}
        siblings.append(entry)
    info = {"id": repository, "sha": COMMIT, "siblings": siblings, "tags": [], "private": False}
    return json.dumps({**info, "cardData": {"license": "apache-2.0\x1b[31m"}}).encode()


def handler(hub: Hub) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *args: object) -> None:
            pass

        def answer(self, code: int, data: bytes, sent: int | None = None) -> None:
            self.send_response(code)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(memoryview(data)[:sent])
            if sent is not None:
                self.wfile.flush()
                hub.stopped.set()
                if hub.hang:
                    hub.released.wait(60)
                self.close_connection = True

        def do_GET(self) -> None:
            path = self.path.partition("?")[0].strip("/").replace("%2B", "+")
            if path.startswith("api/models/"):
                repository = path.removeprefix("api/models/").partition("/revision")[0]
                known = repository in FILES
                self.answer(200 if known else 404, info_of(repository) if known else b"{}")
                return
            repository, _, name = path.partition(f"/resolve/{COMMIT}/")
            wanted = self.headers.get("Range")
            if repository not in FILES:  # the client asks for more than files
                self.answer(404, b"{}")
                return
            hub.gets.append((name, wanted))
            data = FILES[repository][name]
            first = int(wanted.removeprefix("bytes=").rstrip("-")) if wanted else 0
            sent = None
            if name == WEIGHTS and hub.fault:
                self.send_response(200)
                self.end_headers()
                while hub.fault != "stall" and not hub.released.wait(0.2 * (hub.fault == "drip")):
                    self.wfile.write(b"x" * (1 if hub.fault == "drip" else 1 << 20))
                    self.wfile.flush()
                hub.released.wait(60)
                return
            if name == WEIGHTS:
                if hub.corrupt:
                    data, hub.corrupt = b"\xff" + data[1:], False
                sent, hub.stop_at = hub.stop_at, None
            self.answer(206 if wanted else 200, data[first:], sent)

    return Handler


@pytest.fixture
def hub() -> Iterator[Hub]:
    hub = Hub()
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler(hub))
    server.handle_error = lambda *_: None  # type: ignore[method-assign]  # the client may hang up
    hub.url = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, args=(0.05,))
    thread.start()
    yield hub
    hub.released.set()
    server.shutdown()
    thread.join()
    server.server_close()


Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def run(hub: Hub, call: Any, monkeypatch: pytest.MonkeyPatch) -> Iterator[Run]:
    """Runs the command in this process, told of the hub as the environment would have told it."""
    template = constants.HUGGINGFACE_CO_URL_TEMPLATE.replace(constants.ENDPOINT, hub.url)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr(constants, "ENDPOINT", hub.url)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    close_session()

    def run(folder: Path, *flags: str) -> tuple[int, str, str]:
        ended = call("download", "--models_dir", folder, *flags)
        return ended.code, ended.out, ended.err

    yield run
    close_session()


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def wanted() -> dict[str, bytes]:
    files = FILES["xswu/HPSv2"] | FILES["openai/clip-vit-large-patch14"]
    return {name: data for name, data in files.items() if name != "README.md"}


def test_download_says_licence_and_bytes_first_and_keeps_what_is_whole(
    hub: Hub, run: Run, tmp_path: Path
) -> None:
    code, out, err = run(tmp_path / "models", "--only", "HPSv2", "--dry_run")
    assert (code, err) == (0, "")
    assert "HPSv2: 22,020,107 bytes of xswu/HPSv2, licence apache-2.0\\x1b[31m" in out
    assert "to download: 22,020,123 bytes of 22,020,123" in out
    assert not hub.gets and not (tmp_path / "models").exists()

    code, _, err = run(tmp_path / "models", "--only", "HPSv2")
    assert (code, err) == (0, "")
    assert contents(tmp_path / "models" / "HPSv2") == wanted()

    (tmp_path / "models" / "HPSv2" / WEIGHTS).write_bytes(b"\xff" + LARGE[1:])
    hub.gets.clear()
    code, out, _ = run(tmp_path / "models", "--only", "HPSv2")
    assert code == 0 and "to download: 0 bytes" in out
    assert hub.gets == [(WEIGHTS, None)]  # the size alone does not tell that it is damaged
    assert contents(tmp_path / "models" / "HPSv2") == wanted()


def test_a_broken_connection_is_resumed_by_the_same_run(hub: Hub, run: Run, tmp_path: Path) -> None:
    hub.stop_at = STOP
    code, _, err = run(tmp_path, "--only", "HPSv2")
    assert (code, err) == (0, "")
    assert contents(tmp_path) == wanted()
    first, second = (asked for name, asked in hub.gets if name == WEIGHTS)
    assert first is None and second is not None
    assert 10 << 20 <= int(second.removeprefix("bytes=").rstrip("-")) <= STOP


def test_a_killed_download_goes_on_where_it_stopped(hub: Hub, run: Run, tmp_path: Path) -> None:
    hub.stop_at, hub.hang = STOP, True
    command = ["-m", "oneshot_fast.download", "--models_dir", str(tmp_path), "--only", "HPSv2"]
    env = {**os.environ, "HF_ENDPOINT": hub.url, "HF_HUB_OFFLINE": "0", "NO_PROXY": "127.0.0.1"}
    process = subprocess.Popen([sys.executable, *command], env=env)
    assert hub.stopped.wait(60)
    part = next(iter(wait_for_bytes(tmp_path)))
    process.send_signal(signal.SIGKILL)
    process.wait(60)
    kept = part.stat().st_size
    assert 0 < kept <= STOP
    assert not (tmp_path / "HPSv2" / WEIGHTS).exists()

    hub.gets.clear()
    code, _, err = run(tmp_path, "--only", "HPSv2")
    assert (code, err) == (0, "")
    assert contents(tmp_path) == wanted()
    assert [asked for name, asked in hub.gets if name == WEIGHTS] == [f"bytes={kept}-"]


def wait_for_bytes(folder: Path) -> list[Path]:
    """The partial file, once it has bytes."""
    for _ in range(600):
        parts = [path for path in folder.rglob(".tmp-*") if path.stat().st_size > 0]
        if parts:
            return parts
        threading.Event().wait(0.05)
    raise AssertionError("no partial file appeared")


def test_a_corrupted_file_is_refused_and_comes_right_the_next_time(
    hub: Hub, run: Run, tmp_path: Path
) -> None:
    hub.corrupt = True
    code, _, err = run(tmp_path, "--only", "HPSv2")
    assert code == 2 and len(err.splitlines()) == 1
    assert f"{WEIGHTS} of xswu/HPSv2 came corrupted" in err
    assert not any(path.name.endswith(WEIGHTS) for path in tmp_path.rglob("*"))
    assert run(tmp_path, "--only", "HPSv2")[0] == 0
    assert contents(tmp_path) == wanted()


def test_the_aesthetic_head_must_be_the_published_one(hub: Hub, run: Run, tmp_path: Path) -> None:
    code, _, err = run(tmp_path, "--only", "Aesthetic")
    assert code == 2 and "is not the published one" in err and not contents(tmp_path)


def test_what_the_hub_does_not_have_is_one_line(hub: Hub, run: Run, tmp_path: Path) -> None:
    code, _, err = run(tmp_path, "--only", "ImageReward")
    assert code == 2 and len(err.splitlines()) == 1 and "THUDM/ImageReward" in err
    code, _, err = run(tmp_path, "--only", "nothing")
    assert code == 2 and len(err.splitlines()) == 1 and "PickScore_v1" in err


@pytest.mark.parametrize(
    ("fault", "said"),
    [
        ("stall", "broke off"),
        ("drip", "hardly comes"),
        ("endless", "is longer than the 22,020,096 bytes expected"),
    ],
)
def test_a_server_that_never_ends_is_one_line(
    hub: Hub,
    run: Run,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    fault: str,
    said: str,
) -> None:
    monkeypatch.setattr(client, "_PATIENCE", 2.0)
    monkeypatch.setattr(client, "_READ", 1.0)
    hub.fault = fault
    code, _, err = run(tmp_path, "--only", "HPSv2")
    assert code == 2 and said in err and len(err.splitlines()) == 1
    assert sum(path.stat().st_size for path in tmp_path.rglob("*")) < 2 * len(LARGE)


@pytest.mark.parametrize(
    ("name", "size", "digest"),
    [
        ("../a", 1, "0" * 40),
        ("/a", 1, "0" * 40),
        ("a\\b", 1, "0" * 40),
        ("C:a", 1, "0" * 40),
        ("a\x1b[31m", 1, "0" * 40),
        ("a", 1, "../" + "0" * 37),
        ("a", -1, "0" * 40),
        ("a", None, "0" * 40),
        ("a", 1, None),
    ],
)
def test_names_sizes_and_hashes_are_checked(
    tmp_path: Path, name: str, size: int | None, digest: str | None
) -> None:
    sibling = SimpleNamespace(rfilename=name, size=size, blob_id=digest, lfs=None)
    with pytest.raises(ModelError, match="not taken") as caught:
        _remote_file("owner/name", COMMIT, sibling, tmp_path)
    assert str(caught.value).isprintable()
