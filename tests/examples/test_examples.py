"""The examples run on a little data where there is some, and say in one line what is missing where there is none."""

from __future__ import annotations

import importlib.util
import os
import re
from pathlib import Path
from typing import Any

import pytest

EXAMPLES = Path(__file__).parents[2] / "examples"


def load(name: str) -> Any:
    spec = importlib.util.spec_from_file_location(f"example_{name}", EXAMPLES / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("name", ["cifar10", "llm", "qlora"])
@pytest.mark.parametrize("given", [False, True])
def test_without_data_the_exit_code_is_2_and_one_line_says_why(
    name: str, given: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.delenv("LQ_DATA", raising=False)
    with pytest.raises(SystemExit) as stopped:
        load(name).main(["--data", str(tmp_path)] if given else [])
    told = capsys.readouterr()
    assert stopped.value.code == 2
    assert told.out == ""
    assert told.err.count("\n") == 1
    assert told.err.startswith("no data: ")
    assert "LQ_DATA" in told.err
    assert (str(tmp_path) in told.err) == given


def test_option_a_shortcuts_have_no_parameters() -> None:
    model = load("cifar10").ResNet20()
    assert sum(parameter.numel() for parameter in model.parameters()) == 269722


def test_cifar10_prints_every_scheme(capsys: pytest.CaptureFixture[str]) -> None:
    if not os.environ.get("LQ_DATA"):
        pytest.skip("set LQ_DATA to the folder that holds cifar10/train.npz")
    load("cifar10").main(["--limit-train", "512", "--limit-test", "500", "--qat-epochs", "1"])
    out, _ = capsys.readouterr()
    rows = {line[:18].strip(): line[18:].split() for line in out.splitlines()[1:]}
    assert list(rows) == [
        "float",
        *[f"{name} PTQ" for name in ("w8a8", "w8a8-dynamic", "w4a16", "w4a8", "w4a4")],
        "w4a4 QAT",
        "w2a2 QAT",
    ]
    assert all(re.fullmatch(r"[\d,]+", size) and 0 < float(ratio) <= 1 for _, size, ratio, _ in rows.values())
    accuracy = {name: float(cells[0]) for name, cells in rows.items()}
    assert accuracy["float"] > 85
    assert abs(accuracy["w8a8 PTQ"] - accuracy["float"]) <= 1.0
    assert accuracy["w4a4 PTQ"] > 70
