"""What pytest-benchmark's JSON says of the machine."""

from benchmarks.ops.results import about


def pytest_benchmark_update_machine_info(machine_info):
    """Add the build, the device and the commit."""
    import torch

    device = "cuda" if torch.cuda.is_available() else "cpu"
    machine_info["oneshot_fast"] = about(device, seed=0)
