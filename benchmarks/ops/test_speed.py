"""Every op of ``OPS`` by pytest-benchmark, in groups of variants that do the same.

``pytest benchmarks/ops --benchmark-only`` prints a table per op, case and pass; its own flags
select (``-k skew_exp``), keep (``--benchmark-json``, ``--benchmark-autosave``) and compare
(``--benchmark-compare``). The time is the host's, on a GPU until the device is done; ``bench.py``
has ratios of calls in turn, the GPU's own time and cold caches.
"""

from itertools import product

import pytest
import torch

from benchmarks.ops.bench import TARGETS, arguments, jobs_of, leaf, variants
from oneshot_fast.ops import OPS

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def cases(spec):
    """A small and a middle size on a CPU, those that matter most on a GPU."""
    return (
        TARGETS[spec.name]
        if DEVICE == "cuda"
        else [spec.large[0], spec.large[len(spec.large) // 2]]
    )


RUNS = [
    pytest.param(spec, case, step, name, variant, id=f"{spec.name}-{case}-{step}-{name}")
    for spec in OPS
    for case, step in product(cases(spec), ("forward", "backward", "both"))
    for name, variant in variants(spec, DEVICE, compiled=True).items()
]


@pytest.mark.parametrize(("spec", "case", "step", "name", "variant"), RUNS)
def test_speed(benchmark, spec, case, step, name, variant):
    args = arguments(spec, case, "float32", DEVICE, seed=0)
    with torch.no_grad():
        cotangent = torch.randn_like(spec.reference(*args))
    leaves = [leaf(a, i < spec.trained) for i, a in enumerate(args)]
    torch.compiler.reset()
    job = jobs_of(step, {name: variant}, [(leaves, cotangent)], spec.trained)[name]

    def call():
        job.call(0)
        if DEVICE == "cuda":
            torch.cuda.synchronize()

    benchmark.group = f"{spec.name} {case} {step}"
    benchmark.extra_info |= {"device": DEVICE, "threads": torch.get_num_threads()}
    with job.context():
        call()  # compiles, fills the allocator
        benchmark(call)
