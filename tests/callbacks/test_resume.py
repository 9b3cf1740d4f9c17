"""Runs that die and go on: the end state is, bit for bit, that of the run that never died."""

from __future__ import annotations

import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.callbacks.resume_worker import ACCUMULATE, BATCHES, fit
from tests.forking import run_forked

SETTINGS: dict[str, dict[str, Any]] = {
    "ste": {"method": "ste", "recipe": "w8a8"},
    "lsq": {"method": "lsq", "recipe": "w4a4"},
    "histogram": {"method": "ste", "recipe": {"scheme": "w4a4", "observer": "mse", "edges": None}},
    "freeze": {
        "method": "ewgs",
        "recipe": "w3a3",
        "options": {"scale_lr": 0.1, "oscillation": "freeze", "oscillation_threshold": 1e-3},
    },
    "dampen": {
        "method": "lsq+",
        "recipe": "w3a3",
        "options": {"scale_lr": 0.1, "oscillation": "dampen", "oscillation_strength": 0.1},
    },
    "widths": {
        "method": "lsq",
        "recipe": "w2a2",
        "options": {"bits": {0: 8, 1: 4, 0.6: 2}, "quantize_activations_from": 0.4, "quant_noise": 0.5},
    },
    "widths-observed": {
        "method": "ste",
        "recipe": {"scheme": "w3a3", "edges": None},
        "options": {"bits": {0: 8, 0.4: 3}, "quantize_activations_from": 2, "quant_noise": 0.8, "oscillation": "freeze"},
    },
    "pact": {"method": "pact", "recipe": "w4a4", "options": {"scale_lr": 0.5, "method_options": {"regularization": 0.1}}},
}
# (epoch, batch, place): float in epoch 0, quantizing from 1, observers frozen from 2, BatchNorm from 0.8 of it all, in epoch 3
KILLS: dict[str, tuple[str, tuple[int, int, str]]] = {
    "float-mid-epoch": ("step", (0, 5, "start")),
    "float-before-first-checkpoint": ("step", (0, 1, "backward")),
    "first-quantized-batch": ("epoch", (1, 0, "backward")),
    "quantizing-mid-epoch": ("step", (1, 3, "start")),
    "quantizing-while-saving": ("step", (1, 1, "save")),
    "quantizing-in-validation": ("epoch", (1, 1, "validation")),
    "observers-frozen-mid-epoch": ("step", (2, 4, "backward")),
    "observers-frozen-next-epoch": ("epoch", (3, 1, "start")),
    "norms-frozen-mid-epoch": ("step", (3, 5, "start")),
    "norms-frozen-in-validation": ("epoch", (3, 0, "validation")),
}
QUICK = {
    ("freeze", "observers-frozen-mid-epoch"),
    ("dampen", "quantizing-mid-epoch"),
    ("lsq", "quantizing-mid-epoch"),
    ("widths", "quantizing-mid-epoch"),
    ("widths", "observers-frozen-mid-epoch"),
    ("widths-observed", "observers-frozen-mid-epoch"),
    ("ste", "norms-frozen-mid-epoch"),
    ("histogram", "first-quantized-batch"),
}


def run(**options: Any) -> int:
    return run_forked(fit, **options)


def load(path: Path) -> dict[str, Any]:
    return torch.load(path, weights_only=True)


def differences(one: Any, two: Any, where: str = "") -> list[str]:
    """Where two nested states differ in a single bit."""
    if isinstance(one, Tensor):
        same = isinstance(two, Tensor) and one.dtype == two.dtype and one.shape == two.shape
        return [] if same and one.numpy().tobytes() == two.numpy().tobytes() else [where]
    if isinstance(one, dict):
        if one.keys() != two.keys():
            return [f"{where}: keys {set(one) ^ set(two)}"]
        return [found for key in one for found in differences(one[key], two[key], f"{where}.{key}")]
    if isinstance(one, (list, tuple)):
        pairs = enumerate(zip(one, two, strict=True))
        return [found for index, (a, b) in pairs for found in differences(a, b, f"{where}[{index}]")]
    return [] if one == two else [f"{where}: {one} {two}"]


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The end state of the run that never died, made once for each setting."""
    made: dict[tuple[str, str], dict[str, Any]] = {}

    def get(setting: str, mode: str) -> dict[str, Any]:
        if (setting, mode) not in made:
            folder = tmp_path_factory.mktemp(f"{setting}-{mode}")
            assert run(folder=str(folder), mode=mode, **SETTINGS[setting]) == 0
            made[setting, mode] = load(folder / "final.ckpt")
        return made[setting, mode]

    return get


def cases() -> list[Any]:
    marks = {True: (), False: (pytest.mark.slow,)}
    return [
        pytest.param(setting, point, marks=marks[(setting, point) in QUICK], id=f"{setting}-{point}")
        for setting in SETTINGS
        for point in KILLS
    ]


@pytest.mark.parametrize(("setting", "point"), cases())
def test_a_killed_run_ends_like_the_one_that_lived(setting: str, point: str, unbroken: Any, tmp_path: Path) -> None:
    mode, kill = KILLS[point]
    options = {"folder": str(tmp_path), "mode": mode, **SETTINGS[setting]}
    assert run(**options, kill=kill) == -signal.SIGKILL
    assert not (tmp_path / "final.ckpt").exists()
    saved = sorted(tmp_path.glob("step=*.ckpt"), key=lambda path: int(path.stem.partition("=")[2]))
    per_epoch = BATCHES // ACCUMULATE
    # what must be on disk by then: a checkpoint that is being written when the process dies does not count
    steps = kill[0] * per_epoch + (kill[1] // ACCUMULATE if kill[2] != "validation" else per_epoch)
    expected = steps // 2 if mode == "step" else kill[0]
    assert len(saved) == expected
    # another seed: nothing may come from the start
    assert run(**options, resume=str(saved[-1]) if saved else None, seed=1 if saved else 0) == 0
    end, expected_end = load(tmp_path / "final.ckpt"), unbroken(setting, mode)
    for part in ("state_dict", "optimizer_states", "lr_schedulers", "global_step", "epoch"):
        assert differences(end[part], expected_end[part]) == []
    for name, state in expected_end["callbacks"].items():
        if not name.startswith("ModelCheckpoint"):
            assert differences(end["callbacks"][name], state) == [], name
    assert len(expected_end["state_dict"]) > 20
    tracks = end["callbacks"]["QATCallback"]["tracks"].values()
    assert bool(tracks) == (setting in ("freeze", "widths-observed"))
    assert setting != "freeze" or sum(int(track["frozen"].sum()) for track in tracks) > 0
