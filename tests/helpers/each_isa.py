"""Plugin of pytest: what was collected once runs once for each instruction set of ISAS, in a fork.

The extension chooses its instruction set at the first use, which collecting is not.
"""

from __future__ import annotations

import os
import sys

import pytest
import torch._dynamo  # noqa: F401  # once, or every fork would load it for tensors without data

from oneshot_fast import _C


@pytest.hookimpl(tryfirst=True)
def pytest_runtestloop(session: pytest.Session) -> bool | None:
    """Whether the tests have run: true in the process that forks, of the usual loop in a fork."""
    for isa in os.environ["ISAS"].split():
        sys.stdout.flush()
        pid = os.fork()
        if not pid:
            os.environ["OSF_CPU"] = isa
            try:
                print(f"\ntested: {_C.isa()}", flush=True)
            except RuntimeError as error:
                print(f"\n{error}", flush=True)
                os._exit(0)
            return None
        if os.waitpid(pid, 0)[1]:
            session.testsfailed += 1
    return True
