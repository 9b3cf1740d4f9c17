from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lightning_quant as lq
from lightning_quant import preflight
from lightning_quant.algorithms import ALGORITHMS
from lightning_quant.algorithms.base import Cost
from lightning_quant.preflight import Estimate, Forecast, check_memory
from tests.chains import Block, Data, Lit, Loop, make, plain
from tests.digits import trainer
from tests.helpers import assert_same_state

GPTQ = lq.Recipe("w4a16", group_size=8, algorithms=["gptq"])


def dry(model: nn.Module, recipe: Any, batches: Any = None, **options: Any) -> Any:
    return lq.quantize(model, recipe, batches, dry_run=True, **options)


def test_every_algorithm_has_a_cost() -> None:
    assert all(entry.cost != Cost() for entry in ALGORITHMS.values())


def test_a_dry_run_with_algorithms_estimates_and_changes_nothing() -> None:
    model, batches = make("llama")
    before = {name: value.clone() for name, value in model.state_dict().items()}
    kinds = [type(part) for part in model.modules()]
    hooks = sum(len(part._forward_hooks) + len(part._forward_pre_hooks) for part in model.modules())
    told = dry(model, GPTQ, batches)
    assert isinstance(told, Forecast)
    assert told.estimate is not None
    assert told.estimate.batches == 3
    assert told.estimate.activations == sum(batch["input_ids"].numel() for batch in batches) * 16 * 4  # 16 float32 a token
    assert told.estimate.in_files == 0
    assert 0 < told.estimate.batch_seconds < told.estimate.seconds < 60
    assert [row.name for row in told.rows] == [row.name for row in lq.summary(lq.quantize(model, GPTQ, batches)).rows]
    text = str(told)
    assert "whole model:" in text
    assert text.splitlines()[-1] == str(told.estimate)
    assert "3 batches of" in text
    assert "of activations" in text
    assert_same_state(model.state_dict(), before)
    assert [type(part) for part in model.modules()] == kinds
    assert sum(len(part._forward_hooks) + len(part._forward_pre_hooks) for part in model.modules()) == hooks


def test_the_budget_decides_what_goes_to_files() -> None:
    model, batches = make("llama")
    whole, small = dry(model, GPTQ, batches).estimate, dry(model, GPTQ, batches, memory_budget=1000).estimate
    assert (small.activations, small.in_files) == (1000, whole.activations - 1000)
    assert "more in files" in str(small)
    both = lq.Recipe("w4a16", group_size=8, algorithms=["autoround"])
    assert dry(model, both, batches).estimate.activations == 2 * whole.activations  # float targets, too


def test_without_algorithms_no_data_are_run() -> None:
    def batches() -> Iterator[Tensor]:
        raise AssertionError("data were read")
        yield

    for recipe in ("w8a8", "w4a16"):
        told = dry(nn.Sequential(nn.Linear(8, 8)), recipe, batches())
        assert not isinstance(told, Forecast)
    told = dry(nn.Sequential(nn.Linear(8, 8)), GPTQ, batches())  # an iterator's first batch would be lost
    assert not isinstance(told, Forecast)


def test_one_batch_is_run_whatever_the_data_are() -> None:
    seen: list[int] = []

    class Told(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = Loop(Block, plain)

        def forward(self, x: Tensor) -> Tensor:
            seen.append(int(x[0, 0]))
            return self.net(x)

    batches = [torch.full((2, 16), float(index)) for index in range(5)]
    dry(Told(), GPTQ, batches)
    assert set(seen) == {0}
    assert len(seen) <= 3
    told = trainer().quantize(Lit(), datamodule=Data(), recipe=GPTQ, dry_run=True)
    assert told.estimate.batches == 128  # a datamodule does not tell
    assert told.estimate.batch_seconds > 0


def test_estimates_grow_with_the_work() -> None:
    torch.manual_seed(0)
    model, batches = Loop(Block, plain, count=6), [torch.randn(300, 16) for _ in range(8)]

    def seconds(iterations: int) -> float:
        options = {"autoround": {"iterations": iterations}}
        recipe = lq.Recipe("w4a16", group_size=8, algorithms=["autoround"], algorithm_options=options)
        found = dry(model, recipe, batches).estimate
        return found.seconds / found.batch_seconds  # in units of what one batch took, which differs from run to run

    few, many = seconds(10), seconds(10_000)
    assert few > 0
    assert many > 20 * few


# --- refusals -------------------------------------------------------------------------------------------------------


def test_too_little_memory_is_refused_with_the_way_out(monkeypatch: pytest.MonkeyPatch) -> None:
    model, batches = make("llama")
    monkeypatch.setattr(preflight, "available_memory", lambda: 12_000_000)
    ran: list[str] = []
    monkeypatch.setitem(ALGORITHMS, "gptq", replace(ALGORITHMS["gptq"], cost=Cost(memory=lambda *_: 1e9)))
    for dry_run in (True, False):
        with pytest.raises(ValueError, match=r"about 1\.\d GB will be needed.*12\.0 MB are available.*smaller batches"):
            lq.quantize(model, GPTQ, batches, dry_run=dry_run)
    assert not ran
    monkeypatch.undo()
    lq.quantize(model, GPTQ, batches)


def test_the_way_out_is_one_that_helps() -> None:
    found = Estimate(64, 0.1, 10.0, memory=900_000_000, activations=600_000_000, in_files=0, available=500_000_000)
    with pytest.raises(ValueError, match=r"900\.0 MB.*300\.0 MB are weights.*memory_budget.*fewer calibration_batches \(now 64"):
        check_memory(found)
    for fits in (None, 900_000_000):
        check_memory(Estimate(64, 0.1, 10.0, 900_000_000, 600_000_000, 0, fits))


def test_algorithms_that_are_for_no_layer_are_refused() -> None:
    model = nn.Sequential(nn.Conv2d(4, 4, 3, groups=2), nn.Flatten(), nn.Linear(16, 4))
    data = [torch.randn(2, 4, 4, 4)]
    message = r"\(gptq\) are for none of the layers.*0: not for grouped convolutions"
    recipe = lq.Recipe("w4a16", group_size=8, algorithms=["gptq"], ignore=["2"])
    for dry_run in (True, False):
        with pytest.raises(ValueError, match=message):
            lq.quantize(model, recipe, data, dry_run=dry_run)
        with pytest.raises(ValueError, match="none of the layers.*2: not for nf4"):
            lq.quantize(model, lq.Recipe("nf4", algorithms=["gptq"]), data, dry_run=dry_run)
    lq.quantize(model, lq.Recipe("w4a16", group_size=8, algorithms=["gptq"]), data)


def test_missing_data_are_refused() -> None:
    for dry_run in (True, False):
        with pytest.raises(ValueError, match="gptq.* need data"):
            lq.quantize(nn.Sequential(nn.Linear(8, 8)), GPTQ, dry_run=dry_run)
        with pytest.raises(ValueError, match="got no batch"):
            lq.quantize(nn.Sequential(nn.Linear(8, 8)), GPTQ, [], dry_run=dry_run)


def test_groups_larger_than_a_layer_are_noted() -> None:
    model = nn.Sequential(nn.Linear(100, 8), nn.ReLU(), nn.Linear(8, 4), nn.Unflatten(1, (4, 1)), nn.Conv1d(4, 2, 1))
    data, note = [torch.randn(4, 100)], "a group of 64 is larger than its {} columns: one a channel"
    for recipe in (lq.Recipe("w4a16", group_size=64), lq.Recipe("w4a16", group_size=64, algorithms=["gptq"])):
        for told in (dry(model, recipe, data), lq.summary(lq.quantize(model, recipe, data))):
            notes = {row.name: row.note for row in told.rows}
            assert notes == {"0": "", "2": note.format(8), "4": note.format(4)}  # a ragged last group is no matter
    assert all(row.note == "" for row in dry(model, "nf4").rows)
