"""DDP with two gloo processes on the CPU, launched for real once for all tests here."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.callbacks.ddp_worker import LEARNED, OBSERVERS, SCHEDULED, single
from tests.launching import launch

pytestmark = pytest.mark.xdist_group("ddp")
ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    return launch("tests.callbacks.ddp_worker", tmp_path_factory.mktemp("ddp"), weights_only=False)


@pytest.fixture(scope="module")
def alone() -> dict[str, Any]:
    return single()


def unequal(one: dict[str, Tensor], two: dict[str, Tensor], tolerance: float = 0.0) -> list[str]:
    assert one.keys() == two.keys()
    assert len(one) > 10
    close = {name: torch.allclose(one[name].double(), two[name].double(), rtol=tolerance, atol=tolerance) for name in one}
    return [name for name, same in close.items() if not same]


@pytest.mark.parametrize("recipe", ["w8a8", "w4a4"])
@pytest.mark.parametrize("observer", OBSERVERS)
def test_ddp_observers_see_what_one_process_sees(ranks: Any, alone: Any, observer: str, recipe: str) -> None:
    first, second = (rank["observed"][observer, recipe] for rank in ranks)
    assert unequal(first, second) == []
    # to the last bit of a matrix product over other batch sizes
    assert unequal(first, alone["observed"][observer, recipe], 1e-5) == []
    inputs = [name for name in first if name.startswith("net.0.input_fake_quant")]
    assert len(inputs) >= 4
    assert all(torch.equal(first[name], alone["observed"][observer, recipe][name]) for name in inputs)


@pytest.mark.parametrize("quantize_from", [0, 1])
@pytest.mark.parametrize("method", LEARNED)
def test_ddp_learned_scales_train_alike(ranks: Any, alone: Any, method: str, quantize_from: int) -> None:
    first, second = (rank["learned"][method, quantize_from] for rank in ranks)
    expected = alone["learned"][method, quantize_from]
    assert unequal(first["state"], second["state"]) == []
    # ewgs' gradient has |g|, and a mean of ranks' |g| is not the |g| of their mean
    assert unequal(first["state"], expected["state"], {"ewgs": 5e-3, "pact": 1e-6}.get(method, 2e-3)) == []
    assert unequal(first["packed"], second["packed"]) == []
    # while nothing was quantized no optimizer has counted a step for a scale, and later every one has
    assert first["momentum"] == expected["momentum"]
    assert all(first["momentum"])
    scales = [name for name in first["state"] if name.endswith("_fake_quant.scale")]
    start = ranks[0]["observed"]["moving_average", "w4a4"]
    assert all(not torch.equal(first["state"][name], start[name]) for name in scales)


@pytest.mark.parametrize("method", SCHEDULED)
def test_ddp_schedules_train_alike(ranks: Any, alone: Any, method: str) -> None:
    first, second = (rank["scheduled"][method] for rank in ranks)
    expected = alone["scheduled"][method]
    assert unequal(first["state"], second["state"]) == []
    assert unequal(first["packed"], second["packed"]) == []
    assert unequal(first["state"], expected["state"], 2e-3) == []
    assert first["momentum"] == expected["momentum"]
    assert all(first["momentum"])


@pytest.mark.parametrize("observer", [name for name in OBSERVERS if name != "moving_average"])
def test_ddp_sharded_calibration_is_that_of_one_process(ranks: Any, alone: Any, observer: str) -> None:
    first, second = (rank["calibrated"][observer] for rank in ranks)
    assert unequal(first, second) == []
    assert unequal(first, alone["calibrated"][observer], 1e-5) == []


def test_ddp_ranks_end_with_the_same_batchnorms_and_pack_the_same(ranks: Any) -> None:
    first, second = (rank["normed"] for rank in ranks)
    assert unequal(first["state"], second["state"]) == []
    assert unequal(first["packed"], second["packed"]) == []


@pytest.mark.parametrize("epoch", [0, 1, 2])
def test_ddp_resume_ends_where_the_unbroken_run_ends(ranks: Any, epoch: int) -> None:
    for rank in ranks:
        assert unequal(rank["resumed"]["whole"], rank["resumed"]["parts"][epoch]) == []
    assert unequal(ranks[0]["resumed"]["whole"], ranks[1]["resumed"]["whole"]) == []


def test_ddp_all_ranks_save_and_one_writes(ranks: Any) -> None:
    assert [rank["saved"] for rank in ranks] == [[], []]


def test_ddp_nan_on_one_rank_stops_all_of_them(ranks: Any) -> None:
    here, there = ranks[1]["poisoned"], ranks[0]["poisoned"]
    assert "net.0.input: 48 of 48 values are nan or inf" in here
    assert "net.0.input: 0 of 48 values are nan or inf (they are on another rank)" in there


def test_ddp_ranks_that_run_different_modules_are_told(ranks: Any) -> None:
    for rank in ranks:
        assert "ranks ran different modules in one step" in rank["split"]
        assert rank["split"].startswith("RuntimeError")
