from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor, nn

import lightning_quant as lq
from lightning_quant.calibration import call_model, evaluating, observing, quantizers, run_batches, set_flags
from lightning_quant.observers import OBSERVERS


def mlp(recipe: lq.Recipe | str = "w8a8", training: bool = False) -> nn.Module:
    torch.manual_seed(0)
    return lq.prepare(nn.Sequential(nn.Linear(6, 8), nn.Dropout(0.5), nn.Linear(8, 3)), recipe, training=training)


def data(count: int = 4) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(5, 6, generator=generator) * (1 + index) for index in range(count)]


def test_flags_switch_without_changing_state() -> None:
    model = mlp(training=True)
    keys = list(model.state_dict())
    set_flags(model, observing=True, quantizing=True)
    assert all(part.observing and part.quantizing for part in quantizers(model))
    set_flags(model, observing=False)
    assert all(part.observing == part.is_weight and part.quantizing for part in quantizers(model))
    set_flags(model, following=False, quantizing=False)
    assert not any(part.observing or part.quantizing for part in quantizers(model))
    assert list(model.state_dict()) == keys


def test_observing_restores_flags_and_sets_ranges() -> None:
    model = mlp()
    with evaluating(model), observing(model):
        assert run_batches(model, data(), 3) == 3
    assert not any(part.observing or part.quantizing for part in quantizers(model))
    seen = torch.cat(data()[:3])
    assert model[0].input_fake_quant.scale.item() == pytest.approx((seen.max() - seen.min()).item() / 255)
    assert model.training


def test_an_error_restores_flags_and_modes() -> None:
    model = mlp()
    model[1].eval()
    with pytest.raises(ValueError, match=r"0\.input"), evaluating(model), observing(model):
        run_batches(model, [torch.full((2, 6), float("inf"))], 1)
    assert not any(part.observing for part in quantizers(model))
    assert model.training
    assert not model[1].training


def test_no_batch_raises() -> None:
    with pytest.raises(ValueError, match="no batch"):
        run_batches(mlp(), iter(()), 3)


def test_call_model_refuses_what_does_not_fit() -> None:
    with pytest.raises(ValueError, match=r"2 positional arguments does not fit Sequential\.forward"):
        call_model(mlp(), (torch.zeros(2, 6), torch.zeros(2)))
    with pytest.raises(ValueError, match=r"keywords \['y'\]"):
        call_model(mlp(), {"y": torch.zeros(2, 6)})


SHARDED = [name for name in OBSERVERS if name != "moving_average"]  # its result depends on the batches' order


def _calibrate_on_rank(rank: int, folder: str) -> None:
    dist.init_process_group("gloo", init_method=f"file://{folder}/group", rank=rank, world_size=2)
    batches = data()[rank::2]
    for observer in SHARDED:
        qmodel = lq.quantize(_net(), lq.Recipe("w8a8", observer=observer), batches)
        torch.save(qmodel.state_dict(), f"{folder}/{observer}-{rank}.pt")
        lq.save_quantized(qmodel, f"{folder}/{observer}")
    dist.destroy_process_group()


def _net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3))


@pytest.fixture(scope="module")
def calibrated(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("ranks")
    mp.spawn(_calibrate_on_rank, args=(str(folder),), nprocs=2)
    return folder


@pytest.mark.xdist_group("ddp-calibration")
@pytest.mark.parametrize("observer", SHARDED)
def test_ddp_two_processes_calibrate_like_one(calibrated: Path, observer: str) -> None:
    single = lq.quantize(_net(), lq.Recipe("w8a8", observer=observer), data()).state_dict()
    for rank in range(2):
        state = torch.load(calibrated / f"{observer}-{rank}.pt", weights_only=True)
        assert all(torch.equal(value, single[name]) for name, value in state.items())
    assert torch.equal(lq.load_quantized(_net(), calibrated / observer)[0].input_scale, single["0.input_scale"])
