"""Install torch into this interpreter: a CUDA build where an NVIDIA GPU is, a CPU build elsewhere.

No download address is named: first whatever pip is configured with, then uv's own knowledge of
where the builds live, at last plain pip.
"""

import importlib.metadata
import shutil
import subprocess
import sys

PIP = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]


def run(*command: str) -> bool:
    """Whether the command succeeded."""
    return subprocess.run(command).returncode == 0


def with_uv(backend: str, requirement: str) -> bool:
    """Let uv find the build for ``backend`` ("cpu", or "auto" for the driver's CUDA)."""
    uv = [sys.executable, "-m", "uv", "pip", "install", "--python", sys.executable]
    return run(*PIP, "uv") and run(*uv, f"--torch-backend={backend}", requirement)


def main() -> int:
    """Install the version named on the command line, unless it is there."""
    version = sys.argv[1]
    try:
        if importlib.metadata.version("torch").split("+")[0] == version:
            return 0
    except importlib.metadata.PackageNotFoundError:
        pass
    plain = f"torch=={version}"
    if shutil.which("nvidia-smi") and run("nvidia-smi", "-L"):
        done = with_uv("auto", plain) or run(*PIP, plain)
    else:  # "+cpu" matches CPU builds alone and fails at once where pip knows of none
        done = run(*PIP, f"{plain}+cpu") or with_uv("cpu", plain) or run(*PIP, plain)
    return 0 if done else 1


if __name__ == "__main__":
    raise SystemExit(main())
