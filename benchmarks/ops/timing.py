"""How long calls take: on a CPU; on a GPU from cold caches, with and without the host's part."""

import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch

Times = dict[str, dict[str, list[float]]]
Call = Callable[[int], Any]
"""Takes the number of the set of inputs to use."""

MOST_SETS = 128


@dataclass(frozen=True)
class Job:
    """A call to time, in a context that is entered outside of the timed region."""

    call: Call
    context: Callable[[], AbstractContextManager[Any]] = nullcontext


def quantiles(times: list[float]) -> list[float]:
    """The 0.2, 0.5 and 0.8 quantiles."""
    found = torch.tensor(times, dtype=torch.float64)
    levels = torch.tensor([0.2, 0.5, 0.8], dtype=torch.float64)
    return [round(q, 2) for q in found.quantile(levels).tolist()]


def input_sets(device: str, set_bytes: int) -> int:
    """Sets of inputs to rotate among: on a GPU, together at least twice its second-level cache.

    There are at most ``MOST_SETS``, so inputs below a megabyte are partly warm.
    """
    if device == "cpu":
        return 1
    cache = torch.cuda.get_device_properties(0).L2_cache_size
    return max(2, min(MOST_SETS, -(-2 * cache // max(1, set_bytes))))


def interleave(measure: dict[str, Callable[[], float]], seconds: float) -> dict[str, list[float]]:
    """Measure the variants in turn for ``seconds``, at least 5 times each; their quantiles.

    Round after round, so that other load on the machine hits each of them alike.
    """
    times: dict[str, list[float]] = {name: [] for name in measure}
    end = time.perf_counter() + seconds
    while time.perf_counter() < end or min(map(len, times.values()), default=5) < 5:
        for name, once in measure.items():
            times[name].append(once())
    return {name: quantiles(values) for name, values in times.items()}


def cpu_times(jobs: dict[str, Job], sets: int, seconds: float) -> Times:
    """Quantiles of the time of a call, in microseconds, by name under "microseconds".

    With one thread it is that thread's own, which other work on the machine hardly lengthens.
    """
    clock = time.thread_time_ns if torch.get_num_threads() == 1 else time.perf_counter_ns

    def once(job: Job) -> float:
        start = clock()
        job.call(0)
        return (clock() - start) / 1e3

    for job in jobs.values():
        once(job), once(job)
    measure = {name: (lambda job=job: once(job)) for name, job in jobs.items()}
    return {"microseconds": interleave(measure, seconds)}


def cuda_times(jobs: dict[str, Job], sets: int, seconds: float) -> Times:
    """Quantiles of the time of a call, in microseconds, by name.

    "microseconds" is the GPU's own time, between events around replays of a graph of one call per
    set of inputs; for the names under "uncaptured", whose calls wait for the device and so fit into
    no graph, around the calls themselves. "wall_microseconds" is the host's clock around the calls,
    with all of Python, until the device is done. "peak_bytes" is what one call holds at most beyond
    its inputs.
    """
    on_device, on_host, peaks, uncaptured = {}, {}, {}, []
    for name, job in jobs.items():
        with job.context():
            lap = _lap(job.call, sets)
            lap(), lap()  # compile, tune, fill the allocator
            peaks[name] = _peak_bytes(job.call)
            replay = _captured(lap)
            if replay is None:
                uncaptured.append(name)
        on_device[name] = _device_clock(job, replay or lap, sets)
        on_host[name] = _host_clock(job, lap, sets)
    return {
        "microseconds": interleave(on_device, seconds / 2),
        "wall_microseconds": interleave(on_host, seconds / 2),
        "peak_bytes": peaks,
        **({"uncaptured": uncaptured} if uncaptured else {}),
    }


def _lap(call: Call, sets: int) -> Callable[[], list[Any]]:
    """One call per set; the results live together, so that their memory is not in the cache."""
    return lambda: [call(i) for i in range(sets)]


def _captured(lap: Callable[[], list[Any]]) -> Callable[[], None] | None:
    """Replays a graph of ``lap``; None where that waits for the device."""
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        lap()
    except RuntimeError:
        return None
    finally:
        torch.cuda.set_sync_debug_mode("default")
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=torch.cuda.current_stream()):
        results = lap()
    # the default holds the graph's results, and with them their memory
    return lambda results=results: graph.replay()


def _device_clock(job: Job, run: Callable[[], Any], sets: int) -> Callable[[], float]:
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))

    def microseconds(times: int) -> float:
        with job.context():
            start.record()
            for _ in range(times):
                run()
            end.record()
            end.synchronize()
        return start.elapsed_time(end) * 1e3

    # at least a millisecond between the events, against their resolution and a graph's own launch
    times = max(1, min(100, int(1e3 / max(1.0, microseconds(1)))))
    return lambda: microseconds(times) / times / sets


def _host_clock(job: Job, lap: Callable[[], Any], sets: int) -> Callable[[], float]:
    laps = max(1, 32 // sets)

    def once() -> float:
        with job.context():
            torch.cuda.synchronize()
            start = time.perf_counter_ns()
            for _ in range(laps):
                lap()
            torch.cuda.synchronize()
            return (time.perf_counter_ns() - start) / 1e3 / laps / sets

    return once


def _peak_bytes(call: Call) -> int:
    torch.cuda.synchronize()
    before = torch.cuda.memory_stats()["requested_bytes.all.current"]
    torch.cuda.reset_peak_memory_stats()
    call(0)
    return torch.cuda.memory_stats()["requested_bytes.all.peak"] - before


def copy_bandwidth(gigabytes: float = 1.0) -> float:
    """Bytes read plus bytes written per second by a large device-to-device copy."""
    source = torch.randn(int(gigabytes * 2**28), device="cuda")
    target = torch.empty_like(source)
    job = Job(lambda _: target.copy_(source))
    job.call(0)
    clock = _device_clock(job, lambda: job.call(0), 1)
    return 2 * source.nbytes / (interleave({"copy": clock}, 0.3)["copy"][1] / 1e6)


def launch_microseconds() -> float:
    """Time of a kernel that does next to nothing, as one of many in a graph."""
    x = torch.zeros(1, device="cuda")
    lap = _lap(lambda _: x.add_(1), 512)
    lap()
    replay = _captured(lap)
    assert replay is not None
    return interleave({"launch": _device_clock(Job(lap), replay, 512)}, 0.1)["launch"][1]
