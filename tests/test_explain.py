from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import lightning_quant as lq
from lightning_quant import kernels
from lightning_quant.kernels import KERNELS, native
from lightning_quant.spec import PRESETS

X = torch.randn(4, 3, 8, 8)


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)
        self.up = nn.ConvTranspose2d(4, 4, 2)
        self.head = nn.Linear(4 * 49, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.up(self.conv(x)).flatten(1))


@pytest.mark.parametrize("preset", PRESETS)
def test_what_it_says_is_what_runs(preset: str, monkeypatch: pytest.MonkeyPatch):
    model = lq.quantize(Net(), {"scheme": preset, "edges": None}, [X])
    ran: list[str] = []

    def told(backend: str, function: Any) -> Any:
        return lambda *args, **more: ran.append(backend) or function(*args, **more)

    rows = {row.name: row for row in lq.explain(model).rows}
    assert set(rows) == {"conv", "up", "head"}
    for name, kernel in KERNELS.items():
        for op, function in list(kernel.ops.items()):
            monkeypatch.setitem(kernel.ops, op, told(name, function))
    kernels._bound.cache_clear()
    with torch.no_grad():
        model.conv(X)
    kernels._bound.cache_clear()
    assert ran[0] == rows["conv"].backend
    assert all(row.how for row in rows.values())
    assert all(why for row in rows.values() for why in row.refused.values())


def test_it_warns_where_it_is_slow(monkeypatch: pytest.MonkeyPatch):
    weights = lq.quantize(nn.Sequential(nn.Linear(64, 64)), "w4a16")
    monkeypatch.setenv("LQ_BACKEND", "reference")
    (row,) = lq.explain(weights).rows
    assert row.backend == "reference"
    assert "slower than float" in row.warning
    assert "LQ_BACKEND=reference" in str(lq.explain(weights))
    monkeypatch.delenv("LQ_BACKEND")
    if native.library() is None:
        pytest.skip("the C library is not built")
    (row,) = lq.explain(weights).rows
    assert row.backend == "cpu"
    if "bf16" in native.isa():
        assert "model.bfloat16()" in row.warning
        assert lq.explain(weights.bfloat16()).rows[0].warning == ""


def test_a_geometry_that_a_backend_lacks_is_named():
    model = lq.quantize(Net(), "w8a8", [X])
    rows = {row.name: row for row in lq.explain(model).rows}
    if rows["conv"].backend != "onednn":
        pytest.skip("no exact int8 arithmetic on this CPU")
    assert rows["up"].backend == "reference"
    assert "transposed" in rows["up"].refused["onednn"]


def test_a_float_model_has_nothing_to_explain():
    with pytest.raises(ValueError, match="no packed module"):
        lq.explain(nn.Linear(2, 2))
