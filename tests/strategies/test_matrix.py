"""Strategy x precision x feature: what docs/lightning.md promises, measured by launches of `worker.py` for each strategy."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.strategies import DDPStrategy, DeepSpeedStrategy, FSDPStrategy
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor
from torch.multiprocessing import ProcessRaisedException

import lightning_quant as lq
from lightning_quant.calibration import quantizers
from lightning_quant.surgery import is_prepared, packed_modules
from tests.digits import Classifier, Digits, accuracy, trainer
from tests.strategies.models import differences
from tests.strategies.worker import FEATURES, PRECISIONS

ROOT = Path(__file__).parents[2]
STRATEGIES = {"one": "one device", "ddp": "`ddp`", "fsdp2": "FSDP2"}
COLUMNS = {
    "ste": "QAT, STE",
    "lsq": "QAT, LSQ",
    "resume": "resume QAT",
    "quantize": "quantize after QAT",
    "ptq": "PTQ",
    "validate": "validate packed",
    "save": "save packed",
    "late": "layers in `configure_model`",
}
CELLS = [(strategy, precision, feature) for strategy in STRATEGIES for precision in PRECISIONS for feature in FEATURES]
SECONDS = 300
# make test-all has the other precisions, in a launch of their own
USUAL = ("32-true", "bf16-mixed")

Cell = dict[str, Any]
Launch = Callable[..., tuple[dict[str, Cell], str]]


def group(strategy: str) -> Any:
    """With pytest-xdist and --dist loadgroup, the tests of one launch run in one process."""
    return pytest.mark.xdist_group(f"strategies-{strategy}")


def marks(strategy: str, precision: str) -> list[Any]:
    return [group(strategy)] if precision in USUAL else [group(f"{strategy}-{precision}"), pytest.mark.slow]


def run_worker(strategy: str, precisions: Sequence[str], out: Path) -> str:
    """What the processes wrote beside their results."""
    command = ["-m", "tests.strategies.worker", strategy, str(out), *precisions]
    if strategy != "one":
        command = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", *command]
    process = subprocess.Popen(
        [sys.executable, *command],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    try:
        return process.communicate(timeout=SECONDS)[0]
    except subprocess.TimeoutExpired:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)  # its ranks, too
        return process.communicate()[0] + f"\nkilled after {SECONDS} s"


@pytest.fixture(scope="module")
def launch(tmp_path_factory: pytest.TempPathFactory) -> Launch:
    """A strategy's cells in some precisions as far as they got, and what was written; launched when the first test asks for them.

    One launch serves all processes of pytest-xdist, however the tests are spread over them.
    """
    folder = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        folder = folder.parent

    @cache
    def once(strategy: str, *precisions: str) -> tuple[dict[str, Cell], str]:
        name = "-".join(["strategies", strategy, *precisions])
        out, log = folder / f"{name}.json", folder / f"{name}.log"
        with open(log.with_suffix(".lock"), "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not log.exists():
                log.write_text(run_worker(strategy, precisions, out))
        return (json.loads(out.read_text()) if out.is_file() else {}), log.read_text()

    return once


def results(launch: Launch, name: str) -> list[Cell]:
    """What each rank got in a cell."""
    strategy, _, rest = name.partition("-")
    cells, told = launch(strategy, *([other for other in PRECISIONS if rest.startswith(other) and other not in USUAL] or USUAL))
    assert name in cells, f"the launch ended before {name}:\n{told[-4000:]}"
    return cells[name]["ranks"]


# --- one check for each feature, on what one rank got ---------------------------------------------------------------


def check_qat(got: Cell, strategy: str, precision: str, lost: float) -> None:
    assert got["float accuracy"] > 0.9
    assert got["accuracy"] >= got["float accuracy"] - lost
    assert got["accuracy"] == pytest.approx(got["accuracy of one process"], abs=1e-6)
    assert got["sharded"] == (strategy == "fsdp2")
    assert got["differs on ranks"] == []
    assert got["weights kept by training"] == []
    assert got["scale dtypes"] == ["torch.float32"]
    assert got["without range"] == []


def check_ste(got: Cell, strategy: str, precision: str) -> None:
    check_qat(got, strategy, precision, 0.02)


def check_lsq(got: Cell, strategy: str, precision: str) -> None:
    check_qat(got, strategy, precision, 0.04)


def check_resume(got: Cell, strategy: str, precision: str) -> None:
    assert set(got) == ({"file", "folder"} if strategy == "fsdp2" else {"file"})
    for kind, one in got.items():
        assert one["is a folder"] == (kind == "folder")
        assert one["optimizer tensors"] >= 3 * 16  # AdamW's three for each float parameter, and more for scales
        assert one["tensors"] > one["optimizer tensors"] + 16
        assert one["differs in"] == []
        assert one["accuracy of the last checkpoint"] == pytest.approx(one["accuracy at the end"], abs=1e-6)


def check_quantize(got: Cell, strategy: str, precision: str) -> None:
    assert set(got) == {"ste", "lsq"}
    for one in got.values():
        assert one["class"] == ("Sharded" if strategy == "fsdp2" else "Model")
        assert not one["sharded"]
        assert one["differs on ranks"] == []
        assert one["trained model changed in"] == []
        if precision == "32-true":
            # a folded BatchNorm rounds differently in the last bit, which now and then moves an activation by a step
            assert one["rows close"] >= 0.95
            assert one["same predictions"] >= 0.998
        else:  # and differently by far more in bfloat16
            assert one["largest difference"] <= 0.15
            assert one["same predictions"] >= 0.98
        assert one["accuracy"] == pytest.approx(one["accuracy of the trained model"], abs=0.01)


def check_ptq(got: Cell, strategy: str, precision: str) -> None:
    assert got["float accuracy"] > 0.9
    assert got["float accuracy by the Trainer"] == pytest.approx(got["float accuracy"], abs=1e-6)
    assert got["accuracy"] >= got["float accuracy"] - 0.02
    assert got["given sharded"] == (strategy == "fsdp2")
    assert not got["sharded"]
    assert got["differs on ranks"] == []
    assert got["float model changed in"] == []
    if precision == "32-true":
        assert got["differs from one process in"] == []


def check_validate(got: Cell, strategy: str, precision: str) -> None:
    assert set(got) == {"ste", "lsq", "ptq"}
    for one in got.values():
        assert one["accuracy"] == pytest.approx(one["accuracy of one process"], abs=1e-6)
        assert one["accuracy"] > 0.9
        assert one["sharded"] == (strategy == "fsdp2")
        assert one["changed in"] == []


def check_save(got: Cell, strategy: str, precision: str) -> None:
    assert set(got) == {"ste", "lsq", "ptq"}
    for one in got.values():
        assert one["files"] == ["0/model", "0/quantization.json"]
        assert one["reloaded differs in"] == []
        assert one["checkpoint differs in"] == []
        assert one["reloaded accuracy"] == one["checkpoint accuracy"] == one["accuracy"]


def check_late(got: Cell, strategy: str, precision: str) -> None:
    """From random weights: far above chance, which is 0.1."""
    assert got["sharded"] == (strategy == "fsdp2")
    assert got["without range"] == []
    assert got["differs on ranks"] == []
    assert got["accuracy"] > 0.4
    assert got["accuracy"] == pytest.approx(got["accuracy of the trained model"], abs=0.02)


CHECKS = {
    "ste": check_ste,
    "lsq": check_lsq,
    "resume": check_resume,
    "quantize": check_quantize,
    "ptq": check_ptq,
    "validate": check_validate,
    "save": check_save,
    "late": check_late,
}


@pytest.mark.parametrize(
    ("strategy", "precision", "feature"),
    [pytest.param(*cell, id="-".join(cell), marks=marks(*cell[:2])) for cell in CELLS],
)
def test_cell(launch: Launch, strategy: str, precision: str, feature: str) -> None:
    ranks = results(launch, f"{strategy}-{precision}-{feature}")
    assert len(ranks) == (1 if strategy == "one" else 2)
    assert [rank.get("error") for rank in ranks] == [None] * len(ranks)
    for rank in ranks:
        CHECKS[feature](rank, strategy, precision)


# --- cases outside of the matrix: each returns "works" or "raises" --------------------------------------------------


class Keep(L.Callback):
    """Writes what rank 0 ends with."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if trainer.is_global_zero:
            torch.save(pl_module.state_dict(), self.path)


def spawn(model: Classifier, path: Path) -> None:
    model.hparams.lr = 5e-4
    host = trainer(1, lq.QATCallback("w4a4", method="lsq"), Keep(path), strategy="ddp_spawn", devices=2, limit_train_batches=6)
    host.fit(model, datamodule=Digits())


def spawn_unprepared(model: Classifier, launch: Launch, path: Path) -> str:
    with pytest.raises(ProcessRaisedException, match=r"MisconfigurationException: .*lq\.prepare\(model, recipe, method=\.\.\.\)"):
        spawn(model, path)
    assert not path.exists()
    assert not is_prepared(model)
    return "raises"


def spawn_prepared(model: Classifier, launch: Launch, path: Path) -> str:
    before = accuracy(model)
    lq.prepare(model, "w4a4", method="lsq")
    start: dict[str, Tensor] = {name: value.clone() for name, value in model.state_dict().items()}
    spawn(model, path)
    mine, theirs = model.state_dict(), torch.load(path, weights_only=True)
    assert differences(mine, theirs) == []  # weights, scales, and flags in the extra state
    assert {name for name in start if name.endswith("weight") and "conv" in name} <= set(differences(start, mine))
    assert all(part.quantizing and part.has_range for part in quantizers(model))
    qmodel = lq.convert(model)
    assert len(packed_modules(qmodel)) == 5
    x = torch.stack([image for image, _ in _val()])
    with torch.no_grad():
        assert (qmodel(x).argmax(1) == model.eval()(x).argmax(1)).float().mean() >= 0.998
    assert accuracy(qmodel) >= before - 4
    return "works"


def _val() -> Any:
    digits = Digits()
    digits.setup("validate")
    return digits.val


def refused_by_setup(model: Classifier, strategy: Any) -> str:
    host = trainer(1, lq.QATCallback("w8a8"), strategy=strategy, devices=1)
    assert host.strategy is strategy
    for stage in ("fit", "validate"):
        with pytest.raises(MisconfigurationException, match=r"ModelParallelStrategy \(FSDP2\) or strategy='ddp'"):
            host.callbacks[0].setup(host, model, stage)
    assert not is_prepared(model)
    return "raises"


class OffGPU(FSDPStrategy):
    """Lightning refuses FSDPStrategy itself on the CPU, but no subclass."""


class WithoutEngine(DeepSpeedStrategy):
    """DeepSpeedStrategy.__init__ wants its package; what it inherits does not."""

    def __init__(self) -> None:
        DDPStrategy.__init__(self)


def never_prepared(model: Classifier, launch: Launch, path: Path) -> str:
    for rank in results(launch, "fsdp2-never-prepared"):
        assert "call lq.prepare(self, recipe, method='ste') in configure_model" in rank["refused"]
        assert rank["steps"] == 0
    return "raises"


def scheduled(model: Classifier, launch: Launch, path: Path) -> str:
    for rank in results(launch, "fsdp2-scheduled"):
        assert (rank["without range"], rank["widths"], rank["differs on ranks"]) == ([], [4, 8], [])
        assert rank["accuracy"] == pytest.approx(rank["accuracy of the trained model"], abs=0.01)
        assert rank["accuracy"] > 0.9
    return "works"


def gathered_in_bf16(model: Classifier, launch: Launch, path: Path) -> str:
    for rank in results(launch, "fsdp2-gathered-in-bf16"):
        assert "MixedPrecisionPolicy without param_dtype, or ignored_params" in rank["error"]
    return "raises"


def gathered_ignoring_frozen(model: Classifier, launch: Launch, path: Path) -> str:
    for rank in results(launch, "fsdp2-gathered-in-bf16-ignoring-frozen"):
        assert rank["accuracy"] == pytest.approx(rank["accuracy of one process"], abs=0.01)
        assert rank["accuracy"] > 0.9
    return "works"


CASES: dict[str, tuple[str, str, Callable[[Classifier, Launch, Path], str]]] = {
    "`ddp_spawn`, model not prepared before the fit": ("ddp_spawn-unprepared", "ddp", spawn_unprepared),
    "`ddp_spawn`, model prepared before the fit with `lq.prepare`": ("ddp_spawn-prepared", "ddp", spawn_prepared),
    "FSDP2, layers made in `configure_model` without `lq.prepare`": ("fsdp2-never-prepared", "fsdp2", never_prepared),
    "FSDP2, QAT (LSQ) with `bits`, `quantize_activations_from` and `quant_noise`": ("fsdp2-scheduled", "fsdp2", scheduled),
    "FSDP2, packed model, `MixedPrecisionPolicy(param_dtype=torch.bfloat16)`": (
        "fsdp2-gathered-in-bf16",
        "fsdp2",
        gathered_in_bf16,
    ),
    "FSDP2, the same with `ignored_params`": ("fsdp2-gathered-in-bf16-ignoring-frozen", "fsdp2", gathered_ignoring_frozen),
    "`FSDPStrategy` (FSDP1)": ("fsdp1", "one", lambda model, launch, path: refused_by_setup(model, OffGPU())),
    "`DeepSpeedStrategy`": ("deepspeed", "one", lambda model, launch, path: refused_by_setup(model, WithoutEngine())),
}


@cache
def documented() -> tuple[dict[tuple[str, str, str], str], dict[str, str]]:
    """The two tables of docs/lightning.md, "Strategies and precisions"."""
    section = (ROOT / "docs/lightning.md").read_text().split("## Strategies and precisions")[1].split("\n## ")[0]
    tables = [
        [[cell.strip() for cell in line.strip("|").split("|")] for line in block.splitlines()]
        for block in re.findall(r"(?:^\|.*\n)+", section, re.MULTILINE)
    ]
    (head, _, *rows), (_, _, *cases) = tables
    strategies, features = ({title: key for key, title in titles.items()} for titles in (STRATEGIES, COLUMNS))
    cells = {
        (strategies[strategy], precision.strip("`"), features[title]): cell
        for strategy, precision, *row in rows
        for title, cell in zip(head[2:], row, strict=True)
    }
    return cells, dict(cases)


@pytest.mark.parametrize("case", [pytest.param(case, id=name, marks=group(where)) for case, (name, where, _) in CASES.items()])
def test_case(trained: Classifier, launch: Launch, tmp_path: Path, case: str) -> None:
    assert CASES[case][2](trained, launch, tmp_path / "end.pt") == documented()[1][case]


def test_docs_list_what_is_tested() -> None:
    cells, cases = documented()
    assert cells == dict.fromkeys(CELLS, "works")  # `test_cell` fails for one that raises
    assert set(cases) == set(CASES)
    assert set(cases.values()) == {"works", "raises"}
