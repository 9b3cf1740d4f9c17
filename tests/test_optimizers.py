"""Optimizers by name, and how they resume."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import nn

import lightning_quant as lq
from lightning_quant.optimizers import BITSANDBYTES, TORCH
from tests.lora_cases import QUIET, Plain

CPU = [name for name in (*TORCH, *BITSANDBYTES) if not name.startswith("paged")]


class Model(Plain):
    def __init__(self, name: str) -> None:
        super().__init__()
        self.name = name

    def configure_optimizers(self) -> Any:
        return lq.make_optimizer(self, self.name, lr=1e-3)


def fit(folder: Path, name: str, epochs: int, path: str | None = None) -> Model:
    model = Model(name)
    saved = ModelCheckpoint(folder, filename="{epoch}", save_top_k=-1)
    trainer = L.Trainer(max_epochs=epochs, callbacks=[saved], default_root_dir=folder, **QUIET)
    trainer.fit(model, Plain.data(), ckpt_path=path)
    return model


@pytest.mark.parametrize("name", CPU)
def test_it_trains_and_resumes_exactly(tmp_path: Path, name: str) -> None:
    if name in BITSANDBYTES:
        pytest.importorskip("bitsandbytes")
    whole = fit(tmp_path, name, 3)
    resumed = fit(tmp_path, name, 3, str(tmp_path / "epoch=0.ckpt"))
    assert not torch.equal(whole.net[0].weight, Plain().net[0].weight)
    assert all(torch.equal(value, resumed.state_dict()[key]) for key, value in whole.state_dict().items())
    if name.endswith("8bit"):
        states = torch.load(tmp_path / "epoch=2.ckpt", weights_only=True)["optimizer_states"][0]["state"].values()
        held = [state.get("__bnb_optimizer_quant_state__", {}).get("state1") for state in states]
        assert any(value is not None and value.dtype == torch.uint8 for value in held)


@pytest.mark.parametrize("name", [name for name in BITSANDBYTES if name.startswith("paged")])
def test_paged_states_need_a_gpu(name: str) -> None:
    with pytest.raises(ValueError, match=f"parameters are on cpu: use '{name.removeprefix('paged_')}'"):
        lq.make_optimizer(nn.Linear(4, 4), name, lr=1e-3)


def test_bad_arguments() -> None:
    with pytest.raises(ValueError, match="unknown optimizer 'adamx'; valid: adamw, adam, sgd, adamw8bit"):
        lq.make_optimizer(nn.Linear(4, 4), "adamx")
    frozen = nn.Linear(4, 4).requires_grad_(False)
    with pytest.raises(ValueError, match=r"no parameter requires a gradient.*LoRACallback"):
        lq.make_optimizer(frozen, "adamw")


def test_groups() -> None:
    net = nn.Linear(4, 4)
    made = lq.make_optimizer([{"params": [net.weight], "lr": 1e-2}, {"params": [net.bias]}], "adamw", lr=1e-3)
    assert [group["lr"] for group in made.param_groups] == [1e-2, 1e-3]
