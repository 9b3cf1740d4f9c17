"""The lesson on a model that it trains itself: what it prints is true, and training repairs what it was asked to."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

from tests.examples.test_examples import load

pytest.importorskip("transformers")

OWN = ["--width", "64", "--layers", "2", "--float-steps", "300", "--limit-text", "300000", "--test-windows", "64"]
SMALL = [*OWN, "--window", "64", "--batch", "16", "--prompts", "64", "--steps", "40", "--answer", "2"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("lesson")


def cells(out: str) -> dict[str, list[float]]:
    """Model -> perplexity, exact match and bytes, of the table."""
    rows = [re.split(r" {2,}", line) for line in out.split("\nmodel ")[1].splitlines()[2:]]
    rows = rows[: rows.index([""])]
    return {row[0]: [float(row[1])] + [float(cell.replace(",", "")) for cell in row[-3:] if not cell.endswith("%")] for row in rows}


def test_what_lost_too_much_is_repaired(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lesson = load("lesson")
    lesson.main([*SMALL, "--cache", str(folder / "model"), "--tolerance", "0"])
    out = capsys.readouterr().out
    found = cells(out)
    count, whole = map(int, re.search(r"to blame: (\d+) of (\d+) layers", out).groups())  # type: ignore[union-attr]
    repaired = [f"w2a16, {name}, QAT of {count} layers" for name in ("GPTQ", "AWQ")]
    assert list(found) == ["float", "w2a16, nearest", "w2a16, GPTQ", "w2a16, AWQ", *repaired]
    assert (whole, 0 < count < whole) == (14, True)
    perplexity = {name: row[0] for name, row in found.items()}
    assert perplexity["float"] < 40
    for name in ("GPTQ", "AWQ"):
        before, after = perplexity[f"w2a16, {name}"], perplexity[f"w2a16, {name}, QAT of {count} layers"]
        assert before < perplexity["w2a16, nearest"]
        assert after < before
        assert f"{name} lost more than 0 %" in out
    sizes = {row[-1] for name, row in found.items() if name != "float"}
    assert len(sizes) == 1
    assert sizes.pop() < 0.5 * found["float"][-1]

    # the model is made once, and where nothing has lost too much, nothing is trained
    lesson.main([*SMALL, "--cache", str(folder / "model"), "--scheme", "w8a16", "--test-windows", "16", "--prompts", "16"])
    again = capsys.readouterr().out
    assert "trained " not in again
    assert "nothing to train" in again
    assert list(cells(again)) == ["float", "w8a16, nearest", "w8a16, GPTQ", "w8a16, AWQ"]


def test_only_the_blamed_layers_are_trained(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lesson = load("lesson")
    made = lesson.Lesson(lesson.parse([*SMALL, "--steps", "3", "--cache", str(folder / "model")]))
    model = made.float()
    packed = made.quantize(model, "GPTQ")
    layers = ["model.model.layers.1.mlp.down_proj"]
    after, before = made.repair(model, packed, layers).state_dict(), packed.state_dict()
    moved = {
        name.rpartition(".")[0]
        for name, value in before.items()
        if isinstance(value, torch.Tensor) and not torch.equal(value, after[name])
    }
    assert moved == set(layers)


def test_exact_match_is_greedy_decoding(folder: Path) -> None:
    lesson = load("lesson")
    made = lesson.Lesson(lesson.parse([*SMALL, "--test-windows", "4", "--cache", str(folder / "model")]))
    model = made.float().eval()
    row = made.measure("float", model)
    windows = made.data.test_dataloader().dataset.ids
    hits = []
    for window in windows:
        for start in range(32, 63):
            given = window[None, :start]
            added = model.model.generate(given, max_new_tokens=2, do_sample=False, eos_token_id=None, pad_token_id=0)[0, start:]
            hits.append(torch.equal(added, window[start : start + 2]))
    assert row.exact_match == pytest.approx(100 * sum(hits) / len(hits), abs=1.0)  # a near tie may fall otherwise


@pytest.mark.parametrize(("given", "told"), [(["--model", "."], "no model: "), (["--text", "nowhere.txt"], "no text: ")])
def test_what_is_missing_is_said_in_one_line(given: list[str], told: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        load("lesson").main(given)
    err = capsys.readouterr().err
    assert stopped.value.code == 2
    assert err.startswith(told)
    assert err.count("\n") == 1
