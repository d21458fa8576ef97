"""The Ray engine gives what one process gives, and loses nothing when an actor is killed."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import os
import pickle
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from samples import FULL, PATIENT, same_results

from oneshot_fast.data.pairs import read_pairs
from oneshot_fast.data.records import Failure, Record
from oneshot_fast.data.sources import pending
from oneshot_fast.errors import ModelError, UserError
from oneshot_fast.generators.options import ModelOptions
from oneshot_fast.jobs.assign.ray_worker import Actor, Job
from oneshot_fast.jobs.assign.run import AssignRun

needs_ray = pytest.mark.skipif(
    importlib.util.find_spec("ray") is None, reason='needs Ray Data: pip install "ray[data]"'
)
ENVIRONMENT = os.environ | {
    "CUDA_VISIBLE_DEVICES": "",
    "OMP_NUM_THREADS": "1",
    "RAY_USAGE_STATS_ENABLED": "0",
}


def local(generator: Any, folder: Path, records: list[Record], **more: Any) -> Path:
    options = {"options": FULL, "batch_size": 2, "num_images": 1} | more
    AssignRun(generator, records, folder, **options).run()
    return folder


def job_of(folder: Path, model_id: str = "tiny", **more: Any) -> Job:
    arguments = {"folder": folder, "options": FULL, "batch_size": 2, "num_images": 1, **more}
    return Job(ModelOptions(device="cpu"), model_id, arguments)


def same_files(folder: Path, other: Path, *names: str) -> None:
    files = [path for name in names for path in other.glob(name)]
    assert len(files) >= len(names)
    for path in files:
        twin = folder / path.relative_to(other)
        assert twin.read_bytes() == path.read_bytes(), path.name


def descendants(pid: int) -> dict[int, str]:
    """Command lines of the processes that ``pid`` started, and of those that these started."""
    listed = subprocess.run(["ps", "-eo", "pid=,ppid=,args="], capture_output=True, text=True)
    rows = [line.split(maxsplit=2) for line in listed.stdout.splitlines()]
    found, parents = {}, {pid}
    while parents:
        children = {int(row[0]): row[2] for row in rows if int(row[1]) in parents}
        found |= children
        parents = set(children)
    return found


@needs_ray
@pytest.mark.slow
def test_a_killed_actor_loses_nothing(
    tiny: Any, small_data: Path, tmp_path: Path, one_thread: None, call: Any
) -> None:
    folder, log = tmp_path / "ray", tmp_path / "log"
    options = dataclasses.replace(FULL, steps=20)
    flags = (
        f"--data_root {small_data} --model_id tiny --output_root {folder} --batch_size 1 "
        "--num_images 1 --steps 20 --assign_method rotation --rotation_optimizer raw_adam "
        "--lr 0.155"
    ).split()
    command = [sys.executable, "-m", "oneshot_fast.assign", *flags, "--engine", "ray"]
    with log.open("w") as out:
        process = subprocess.Popen(
            [*command, "--ray_actors", "2"], env=ENVIRONMENT, stdout=out, stderr=out
        )
    try:
        deadline = time.monotonic() + 120
        while not list(folder.glob("noises/*.safetensors")) and time.monotonic() < deadline:
            time.sleep(0.02)
        actors = [k for k, args in descendants(process.pid).items() if "ray::MapWorker" in args]
        assert len(actors) == 2, log.read_text()
        os.kill(actors[0], signal.SIGKILL)
        assert len(list(folder.glob("noises/*.safetensors"))) < 6
        assert process.wait(timeout=120) == 0, log.read_text()
    finally:
        process.terminate()  # where it still runs; Ray's processes follow
    assert "assigned 6 of 6 targets" in log.read_text()

    expected = local(
        tiny, tmp_path / "local", read_pairs(small_data)[0], options=options, batch_size=1
    )
    same_files(folder, expected, "noises/*", "images/*", "manifest.jsonl", "failures.jsonl")
    summaries = [json.loads((path / "summary.json").read_text()) for path in (folder, expected)]
    for summary in summaries:
        assert summary.pop("seconds") > 0 and summary.pop("images_per_second") > 0
    assert summaries[0] == summaries[1]
    assert (folder / "report.html").exists()
    last = sorted(folder.glob("noises/*"))[-1]
    last.unlink()
    assert call("assign", *flags).code == 0  # without Ray, it is the same run
    same_files(folder, expected, "noises/*", "manifest.jsonl")


def test_a_worker_writes_what_a_run_writes(
    tiny: Any, data: Path, tmp_path: Path, one_thread: None
) -> None:
    records = read_pairs(data)[0]
    records[3].image_path.write_bytes(b"not an image")  # type: ignore[union-attr]
    expected = local(tiny, tmp_path / "local", records)
    worker = Actor(job_of(tmp_path / "ray"))
    batches = [*pending(Stream(records), (), 2)]
    first = [worker.match([batch]) for batch in batches]
    same_files(tmp_path / "ray", expected, "noises/*", "images/*")
    (failure,) = [failure for result in first for failure in result.failures]
    assert failure["id"] == records[3].id
    # as after a kill between the file and the answer
    again = worker.match(batches)
    assert again.shards == [rows for result in first for rows in result.shards]
    assert again.failures == [failure]
    same_files(tmp_path / "ray", expected, "noises/*")


def test_a_worker_refills_its_places_from_the_batches_of_a_call(
    tiny: Any, small_data: Path, tmp_path: Path
) -> None:
    records = read_pairs(small_data)[0]
    expected = local(tiny, tmp_path / "local", records, options=PATIENT)
    worker = Actor(job_of(tmp_path / "ray", options=PATIENT))
    result = worker.match([*pending(Stream(records), (), 2)])
    rows = sorted((row for rows in result.shards for row in rows), key=lambda row: row["index"])
    lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    (tmp_path / "ray" / "manifest.jsonl").write_text(lines)
    same_results(expected, tmp_path / "ray")


def test_an_actor_answers_with_the_error_that_ends_the_command(tmp_path: Path) -> None:
    job = job_of(tmp_path / "run", model_id=str(tmp_path / "nothing"))
    for work, kind in ((UserError("no data"), UserError), ([[]], ModelError)):
        (answer,) = Actor(job)({"work": [pickle.dumps(work)]})["result"]
        result = pickle.loads(answer)
        assert type(result.error) is kind and result.shards == [] and result.failures == []


def test_a_missing_ray_is_one_line(
    small_data: Path, tmp_path: Path, call: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    ended = call(
        "assign", "--data_root", small_data, "--output_root", tmp_path / "run",
        "--model_id", "tiny", "--engine", "ray",
    )  # fmt: skip
    assert ended.code == 2 and 'pip install "ray[data]"' in ended.error
    assert not (tmp_path / "run").exists()


class Stream:
    """Records as a source."""

    identity, total = "stream", None

    def __init__(self, records: list[Record]) -> None:
        """Bind them."""
        self._records = records

    def __iter__(self) -> Iterator[Record | Failure]:
        """One after another."""
        yield from self._records
