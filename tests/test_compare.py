from __future__ import annotations

from typing import Any

import lightning as L
import pytest
import torch
from torch import nn

import lightning_quant as lq
from lightning_quant.report import model_bytes
from tests.digits import Classifier, Digits, accuracy, trainer


def test_compare_measures_both(trained: Classifier, capsys: pytest.CaptureFixture[str]) -> None:
    trained.train()
    qmodel = lq.quantize(trained, "w2a2", datamodule=Digits())
    state = {name: value.clone() for name, value in trained.state_dict().items()}
    found = lq.compare(trained, qmodel, trainer=trainer(), datamodule=Digits())
    before, after = found.metrics["accuracy"]
    assert 100 * before == pytest.approx(accuracy(trained))
    assert 100 * after == pytest.approx(accuracy(qmodel))
    assert found.bytes == (model_bytes(trained), model_bytes(qmodel))
    assert all(0 < seconds < 5 for seconds in found.latency)
    assert found.batch == "250 x 1 x 8 x 8"
    printed = capsys.readouterr().out
    assert "accuracy" in printed
    assert "bytes" in printed
    assert "latency ms, 250 x 1 x 8 x 8" in printed
    assert trained.training
    assert all(torch.equal(value, state[name]) for name, value in trained.state_dict().items())  # timing ran in eval


def test_compare_without_a_trainer_and_with_keyword_calls(capsys: pytest.CaptureFixture[str]) -> None:
    class Keyword(L.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.net = nn.ModuleDict({"a": nn.Linear(64, 10)})

        def validation_step(self, batch: Any, batch_idx: int) -> None:
            loss = nn.functional.cross_entropy(self.net["a"](input=batch[0].flatten(1)), batch[1])
            self.log_dict({"loss": loss, "twice": 2 * loss})

    model = Keyword()
    found = lq.compare(model, lq.quantize(model, "w8a16"), datamodule=Digits())
    assert set(found.metrics) == {"loss", "twice"}
    assert found.metrics["twice"][0] == pytest.approx(2 * found.metrics["loss"][0])


def test_compare_needs_a_validation() -> None:
    with pytest.raises(ValueError, match="no LightningModule with a validation_step"):
        lq.compare(nn.Linear(2, 2), nn.Linear(2, 2))  # type: ignore[arg-type]

    class Silent(Classifier):
        def validation_step(self, batch: Any, batch_idx: int) -> None:
            self(batch[0])

    model = Silent()
    with pytest.raises(ValueError, match="logged no metric"):
        lq.compare(model, model, trainer=trainer(), datamodule=Digits())
