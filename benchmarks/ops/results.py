"""What the op benchmarks print and write."""

from typing import Any

import oneshot_fast
from benchmarks.common import environment, slug

OURS = ("ours", "cuda", "triton")
OTHERS = ("eager", "compile", "bmm", "clone")


def about(device: str, seed: int) -> dict[str, Any]:
    """What the numbers hold for, the name of the files they go to and, on a GPU, what serves."""
    found = environment(device, seed)
    if device == "cuda":
        return found | {"name": slug(found["device"]), "ours": ours_by_default()}
    return found | {"name": f"ops-{found['build']['cpu_isa']}"}


def ours_by_default() -> dict[str, str]:
    """Backend that serves each op on a GPU."""
    from oneshot_fast.ops._backends import backend

    specs = oneshot_fast.ops.OPS
    return {spec.name: backend(spec.name) for spec in specs if has_kernels(spec)}


def has_kernels(spec: Any) -> bool:
    """Whether an op has GPU kernels of its own, in the package of any commit."""
    return bool(getattr(spec, "gpu_kernels", getattr(spec, "native", True)))


def medians(record: dict[str, Any], clock: str = "microseconds") -> dict[str, float]:
    """Median time of each variant in microseconds."""
    return {name: quantiles[1] for name, quantiles in record[clock].items()}


def ours(record: dict[str, Any], results: dict[str, Any]) -> str:
    """Name of the variant that is ours: the one that serves by default."""
    found = [name for name in OURS if name in record["microseconds"]]
    served = results.get("ours", {}).get(record["op"])
    return served if served in found else found[0]


def columns(record: dict[str, Any], results: dict[str, Any]) -> dict[str, str]:
    """The numbers of a record: times of ours, and the others as multiples of the default one."""
    median = medians(record)
    mine = median[ours(record, results)]
    ratios = {n: f"{median[n] / mine:.2f}" if n in median else "-" for n in OTHERS}
    if "wall_microseconds" not in record:
        return {"ours, us": f"{mine:.1f}", **ratios}
    wall = medians(record, "wall_microseconds")
    moved, peak = record["bytes"], record["peak_bytes"]
    bound = max(moved / results["copy_bandwidth"] * 1e6, results["launch"])
    own = ours(record, results)
    return {
        **{f"{n}, us": f"{median[n]:.2f}" if n in median else "-" for n in ("cuda", "triton")},
        **ratios,
        "wall, us": f"{wall[own]:.1f}",
        "eager wall": f"{wall['eager'] / wall[own]:.2f}",
        "of copy": f"{moved / (mine / 1e6) / results['copy_bandwidth']:.0%}",
        "of floor": f"{bound / mine:.0%}",
        "MiB": f"{peak[own] / 2**20:.1f}",
        "eager MiB": f"{peak['eager'] / 2**20:.1f}",
    }


def labels(record: dict[str, Any]) -> dict[str, str]:
    """What a record is about."""
    where = {"threads": str(record["threads"])} if "threads" in record else {}
    return {**where, "dtype": record["dtype"], "pass": record["pass"]}


GPU_COLUMNS = "cuda, us|triton, us|eager|compile|bmm|clone|wall, us|eager wall|of copy|of floor|MiB"


def header(results: dict[str, Any]) -> str:
    """Head of the printed table."""
    names = ["ours, us", *OTHERS]
    first = f"{'threads':>8}"
    if "copy_bandwidth" in results:
        names, first = [*GPU_COLUMNS.split("|"), "eager MiB"], ""
    return f"{'case':<50}{first} {'dtype':<9}{'pass':<9}" + "".join(f"{n:>11}" for n in names)


def row(record: dict[str, Any], results: dict[str, Any]) -> str:
    """One line of the printed table."""
    case = f"{record['op']} {record['case']}"
    first = f"{record['threads']:>8}" if "threads" in record else ""
    values = "".join(f"{value:>11}" for value in columns(record, results).values())
    return f"{case:<50}{first} {record['dtype']:<9}{record['pass']:<9}{values}"


def markdown(results: dict[str, Any]) -> str:
    """The whole table, with what it holds for."""
    build, records = results["build"], results["records"]
    on_gpu = "copy_bandwidth" in results
    text = (
        f"{'`make gpu`' if on_gpu else '`make bench`'} on {results['device']}, "
        f"{'driver ' + str(results['driver']) if on_gpu else build['cpu_isa']}, "
        f"torch {build['torch_running']}, Triton {build['triton']}, commit {results['commit']}, "
        f"{results['date'][:10]}, seed {results['seed']}. Median time of ours; as multiples of it "
        "those of the reference in eager mode, of torch.compile of the reference, of `torch.bmm` "
        "of patches that lie ready as matrices, and of `torch.clone` of the first input."
    )
    if on_gpu:
        text += (
            " Time is the GPU's, from cold caches, by replays of a graph (eager and compiled calls "
            "that wait for the device, and so fit into none, by events around them; the JSON file "
            "names them); wall is the host's clock around the same calls with all of Python. "
            f"Ratios are to what serves by default: {results['ours']}. A copy moves "
            f"{results['copy_bandwidth'] / 1e12:.2f} TB/s, a launch takes {results['launch']:.2f} "
            "us: `of copy` is the bytes of inputs and outputs, each once, per time, as a part of "
            "the former, `of floor` the time that either allows at best, as a part of ours. MiB: "
            "the most that a call holds beyond its inputs."
        )
    if not records:
        return text + "\n"
    heads = ["op and case", *labels(records[0]), *columns(records[0], results)]
    lines = [text, "", f"| {' | '.join(heads)} |", "|" + " --- |" * len(heads)]
    for record in records:
        cells = [f"{record['op']} `{record['case']}`", *labels(record).values()]
        lines.append(f"| {' | '.join([*cells, *columns(record, results).values()])} |")
    return "\n".join(lines) + "\n"
