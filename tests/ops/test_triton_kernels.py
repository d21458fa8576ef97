"""What only Triton's launchers have: options and configurations.

That the ops which they serve are right is in test_ops.py. These tests need a GPU or, in a process
of its own (test_triton.py starts it), the setting TRITON_INTERPRET=1.
"""

import os

import pytest
import torch
from op_checks import assert_as_exact, make, moved

from oneshot_fast.ops import OPS

pytest.importorskip("triton")

from oneshot_fast.kernels import patch_outer, patch_rotate, skew_exp, skew_exp_tiled
from oneshot_fast.kernels.patch_tiles import INTERPRETED

SPECS = {spec.name: spec for spec in OPS}
BACKEND = (
    "interpreter"
    if os.environ.get("TRITON_INTERPRET") == "1"
    else pytest.param("triton", marks=pytest.mark.gpu)
)
pytestmark = [
    pytest.mark.parametrize("device", [BACKEND], indirect=True),
    pytest.mark.usefixtures("poisoned_memory"),
]


def assert_value(ours, name, args, dtype, **options):
    """Compare with the reference and the float64 truth, both on the CPU."""
    here, reference = moved(args), SPECS[name].reference
    truth = reference(*moved(here, dtype=torch.float64), **options)
    assert_as_exact(ours, reference(*here, **options), truth, dtype)


def test_kernels_run_as_they_should(device):
    assert INTERPRETED.value == (device == "cpu"), "Triton was imported before its setting"


@pytest.mark.parametrize("config", patch_rotate.CONFIGS, ids=str)
@pytest.mark.parametrize("case", [((1, 4, 16, 8), 8, ()), ((1, 4, 36, 34), 2, (1,))], ids=str)
def test_patch_rotate_in_every_configuration(config, case, device, monkeypatch):
    monkeypatch.setattr(patch_rotate.patch_rotate_kernel, "configs", [config])
    args = make(SPECS["patch_rotate"], case, torch.float32, device=device)
    assert_value(patch_rotate.patch_rotate(*args), "patch_rotate", args, torch.float32)


@pytest.mark.parametrize("leading", [(), (2,), (2, 2, 3)], ids=str)
def test_patch_rotate_by_the_transpose(leading, device):
    """As an argument, as a view, and both, which cancel."""
    case = ((2, 4, 8, 12), 2, leading)
    x, q, p = make(SPECS["patch_rotate"], case, torch.float64, device=device)
    rotate = patch_rotate.patch_rotate
    for ours, matrix in (
        (rotate(x, q, p, transpose=True), q.mT),
        (rotate(x, q.mT, p), q.mT),
        (rotate(x, q.mT, p, transpose=True), q),
    ):
        assert_value(ours, "patch_rotate", [x, matrix, p], torch.float64)


def test_patch_rotate_and_patch_outer_of_512_elements(device):
    case = ((1, 8, 8, 16), 8, ())
    x, q, p = make(SPECS["patch_rotate"], case, torch.float32, device=device)
    z = patch_rotate.patch_rotate(x, q, p)
    assert_value(z, "patch_rotate", [x, q, p], torch.float32)
    assert_value(patch_outer.patch_outer(z, x, p), "patch_outer", [z, x, p], torch.float32)


def test_matrices_of_many_norms_in_one_batch(device):
    a = torch.randn(3, 16, 16, device=device)
    norms = torch.tensor([0.1, 3.0, 40.0], device=device)
    a = a * (norms / (a - a.mT).abs().sum(-1).amax(-1))[:, None, None]
    together = skew_exp.skew_exp(a)
    for b in range(3):
        assert torch.equal(together[b], skew_exp.skew_exp(a[b]))


def test_more_squarings_than_are_launched_or_nan_give_nan(device, monkeypatch):
    """And none in their batch mates."""
    monkeypatch.setattr(skew_exp_tiled, "_SQUARINGS", 2)
    a = torch.randn(3, 33, 33, dtype=torch.float64, device=device) / 33
    a[0, 1, 0] = 1e4
    a[2, 1, 0] = torch.nan
    q = skew_exp.skew_exp(a)
    da = skew_exp.d_skew_exp(torch.ones_like(a), a, q)
    assert torch.equal(q[1:2], skew_exp.skew_exp(a[1:2]))
    for result in (q, da):
        assert result[0].isnan().any() and not result[2].isfinite().all()
        assert not result[1].isnan().any()


def test_a_batch_tunes_for_those_up_to_a_power_of_two(device, monkeypatch):
    kernel, tuned = patch_rotate.patch_rotate_kernel, []
    monkeypatch.setattr(kernel, "configs", patch_rotate.CONFIGS[:2])
    monkeypatch.setattr(kernel, "early_config_prune", lambda configs, *_, **__: configs)
    monkeypatch.setattr(kernel, "_bench", lambda *_, **__: tuned.append(None) or [1.0, 1.0, 1.0])
    monkeypatch.setattr(kernel, "cache", {})
    for batch, times in ((5, 2), (8, 2), (6, 2), (9, 4)):
        x, q = torch.zeros(batch, 1, 2, 2, device=device), torch.eye(4, device=device)
        patch_rotate.patch_rotate(x, q, 2)
        assert len(tuned) == times
