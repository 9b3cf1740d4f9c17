"""A fine-tune that was killed ends as one that was not, to the bit."""

from __future__ import annotations

import signal
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.callbacks.lora_resume_worker import BATCHES, EPOCHS, run
from tests.forking import run_forked


def fit(folder: Path, step: int) -> int:
    folder.mkdir(exist_ok=True)
    return run_forked(run, folder, step)


def equal(one: Any, two: Any) -> bool:
    if isinstance(one, torch.Tensor):
        return torch.equal(one, two)
    if isinstance(one, dict):
        return one.keys() == two.keys() and all(equal(one[key], two[key]) for key in one)
    if isinstance(one, (list, tuple)):
        return len(one) == len(two) and all(map(equal, one, two))
    return bool(one == two)


@pytest.mark.parametrize("steps", [(BATCHES + 2,), pytest.param((BATCHES + 2, 2 * BATCHES + 3), marks=pytest.mark.slow)])
def test_killed_and_resumed(steps: tuple[int, ...], tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes")
    assert fit(tmp_path / "whole", -1) == 0
    for step in steps:
        assert fit(tmp_path / "killed", step) == -signal.SIGKILL
    assert fit(tmp_path / "killed", -1) == 0
    whole, killed = (torch.load(tmp_path / name / "last.ckpt", weights_only=True) for name in ("whole", "killed"))
    assert whole["global_step"] == killed["global_step"] == EPOCHS * BATCHES
    for part in ("state_dict", "optimizer_states", "lr_schedulers"):
        assert equal(whole[part], killed[part])
    first = torch.load(tmp_path / "whole" / "epoch=0.ckpt", weights_only=True)
    assert not equal(first["state_dict"], whole["state_dict"])
    states = str(whole["optimizer_states"])
    assert "uint8" in states
    folders = [(tmp_path / name / "adapter" / "adapter_model.safetensors").read_bytes() for name in ("whole", "killed")]
    assert folders[0] == folders[1]
