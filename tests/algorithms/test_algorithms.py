from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn

import lightning_quant as lq
from lightning_quant.algorithms import ALGORITHMS, get_algorithms


def test_unknown_names_are_refused_before_work() -> None:
    with pytest.raises(ValueError, match="unknown algorithm 'nope'"):
        get_algorithms(["nope"])


def test_an_algorithm_in_the_table_runs_on_calibrated_ranges(monkeypatch: pytest.MonkeyPatch) -> None:
    def halve(model: nn.Module, run: Callable[[], None] | None) -> None:
        assert run is not None
        assert model[0].input_fake_quant.has_range
        model[0].weight.data.mul_(0.5)
        model[0].observe_weights()

    monkeypatch.setitem(ALGORITHMS, "halve", halve)
    net = nn.Sequential(nn.Linear(4, 4))
    plain, halved = (lq.quantize(net, lq.Recipe("w8a8", algorithms=names), [torch.randn(3, 4)]) for names in ([], ["halve"]))
    assert torch.equal(halved[0].weight_packed, plain[0].weight_packed)
    assert torch.allclose(halved[0].weight_scale, plain[0].weight_scale / 2)
