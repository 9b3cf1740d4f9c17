from __future__ import annotations

import inspect

import pytest
from torch import nn

from lightning_quant.nn import OPTIONAL, QMODULES, lookup


def float_types() -> list[type[nn.Module]]:
    pytest.importorskip("transformers")
    from transformers.pytorch_utils import Conv1D

    assert f"{Conv1D.__module__}.{Conv1D.__qualname__}" in OPTIONAL
    assert lookup(Conv1D)
    return list(QMODULES)


@pytest.mark.parametrize("float_type", float_types())
def test_forward_takes_the_same_keywords(float_type: type[nn.Module]) -> None:
    entry = QMODULES[float_type]
    wanted = list(inspect.signature(float_type.forward).parameters)
    for cls in (entry.fake, entry.packed):
        assert list(inspect.signature(cls.forward).parameters) == wanted
        assert issubclass(cls, float_type)
