from __future__ import annotations

import pytest
import torch
from torch import nn

import lightning_quant as lq
from lightning_quant.report import model_bytes, tensor_bytes
from lightning_quant.surgery import packed_modules
from tests.digits import Classifier, Digits


@pytest.mark.parametrize(
    ("recipe", "most"), [("w4a16", 0.14), ("w8a16", 0.26), ("w8a8", 0.26), ("w4a8-dynamic", 0.14), ("nf4", 0.16)]
)
@pytest.mark.parametrize("features", [128, 200, 576, 1000])
def test_bytes_at_real_width(recipe: str, most: float, features: int) -> None:
    model = nn.Sequential(nn.Linear(features, 128, bias=False))
    qmodel = lq.quantize(model, recipe, [torch.randn(4, features)])
    found = lq.summary(qmodel)
    assert found.rows[0].bytes_before == 4 * features * 128
    assert found.bytes_after == tensor_bytes(qmodel.parameters())
    groups = -(-features // 128) * 128 / features  # a ragged last group has a scale, too
    assert found.bytes_after / found.bytes_before <= most * groups


@pytest.mark.parametrize("recipe", ["w8a8", "w4a4", "w4a16", "nf4"])
def test_prepared_model_tells_the_bytes_to_come(trained: Classifier, recipe: str) -> None:
    float_bytes = model_bytes(trained)
    plan = lq.quantize(trained, recipe, datamodule=Digits(), dry_run=True)
    qmodel = lq.quantize(trained, recipe, datamodule=Digits())
    done = lq.summary(qmodel)
    before = lq.summary(lq.prepare(trained, recipe))
    for one in (plan, before):
        assert [(row.name, row.type, row.scheme, row.bytes_before) for row in one.rows] == [
            (row.name, row.type, row.scheme, row.bytes_before) for row in done.rows
        ]
        assert [row.bits for row in one.rows] == pytest.approx([row.bits for row in done.rows], rel=0.03)
        assert one.bytes_before == done.bytes_before == float_bytes
        assert one.bytes_after == done.bytes_after
    assert done.bytes_after == model_bytes(qmodel)


def test_skipped_modules_are_listed_with_their_reason() -> None:
    class Odd(nn.Linear):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return super().forward(x) + 1

    model = nn.Sequential(
        nn.Embedding(10, 24), Odd(24, 24), nn.Bilinear(4, 4, 24), nn.Linear(24, 24), nn.BatchNorm1d(24), nn.LayerNorm(24)
    )
    with pytest.warns(UserWarning, match="'re:never' matches no module"):
        found = lq.summary(lq.quantize(model, lq.Recipe("w8a16", ignore=["re:never"])))
    assert [row.name for row in found.rows] == ["3"]
    assert "unless a pattern of the recipe names it" in found.skipped["0"]
    assert "overrides the forward of Linear" in found.skipped["1"]
    assert "no quantized Bilinear" in found.skipped["2"]
    text = str(found)
    assert "not folded: follows a linear layer" in text
    assert "whole model" in text


def test_attention_rows(trained: Classifier) -> None:
    model = nn.Sequential(nn.MultiheadAttention(32, 4))
    qmodel = lq.quantize(model, "w8a16")
    assert {row.name for row in lq.summary(qmodel).rows} == {"0.out_proj", "0.q_proj", "0.k_proj", "0.v_proj"}
    prepared = lq.summary(lq.prepare(model, "w8a16"))
    assert sum(row.bytes_after for row in prepared.rows) == sum(row.bytes_after for row in lq.summary(qmodel).rows)
    assert packed_modules(qmodel)


def test_float_model_raises() -> None:
    with pytest.raises(ValueError, match="not quantized"):
        lq.summary(nn.Linear(2, 2))
