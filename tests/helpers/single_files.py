"""What tests of single files share."""

from __future__ import annotations

import types

import pytest
from diffusers.loaders.single_file_model import SINGLE_FILE_LOADABLE_CLASSES
from family_samples import WIDTH

_RELEASED = 3072  # FLUX's width, a constant in diffusers' converter


def narrow_flux(patch: pytest.MonkeyPatch) -> None:
    """Let diffusers' converter of FLUX's transformer take the tiny one's width."""
    mapping = SINGLE_FILE_LOADABLE_CLASSES["FluxTransformer2DModel"]
    convert = mapping["checkpoint_mapping_fn"]
    code = convert.__code__
    assert _RELEASED in code.co_consts
    consts = tuple(WIDTH if value == _RELEASED else value for value in code.co_consts)
    narrow = types.FunctionType(code.replace(co_consts=consts), convert.__globals__)
    patch.setitem(mapping, "checkpoint_mapping_fn", narrow)
