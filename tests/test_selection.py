"""What patterns name, and that all else stands still."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import lightning_quant as lq
from lightning_quant.mixed import Choice, Sensitivity
from lightning_quant.plan import plan_model
from lightning_quant.selection import RESTS, SHARE, Selection, find_modules
from lightning_quant.surgery import apply_plan, fake_modules, get_info
from tests.digits import Net


def made(rest: str = "quantized", train: Any = ("conv2",), method: str = "lsq") -> tuple[Net, Selection]:
    torch.manual_seed(0)
    model, selection = Net(), Selection(train, rest)
    plan = selection.cut(model, plan_model(model, lq.Recipe("w4a4", edges=None)))
    apply_plan(model, plan, method=method)
    selection.freeze(model)
    return model, selection


def trainable(model: nn.Module) -> set[str]:
    return {name for name, value in model.named_parameters() if value.requires_grad}


CASES: dict[str, tuple[Any, set[str]]] = {
    "a layer, and its BatchNorm": ("conv2", {"conv2", "bn2"}),
    "a container": (["stem"], {"stem.0", "stem.1"}),
    "a type": (["Linear", "shortcut.0"], {"head", "shortcut.0", "shortcut.1"}),
    "an expression": (r"re:conv\d", {"conv1", "conv2", "bn1", "bn2"}),
    "a BatchNorm": (["bn1"], {"bn1"}),
}


@pytest.mark.parametrize("case", CASES)
def test_patterns_name_what_is_trained(case: str) -> None:
    train, modules = CASES[case]
    model, selection = made(train=train)
    everything = set(dict(model.named_parameters()))
    expected = {name for name in everything if any(name.startswith(f"{module}.") for module in modules)}
    assert trainable(model) == expected
    norms = {name for name, part in model.named_modules() if isinstance(part, nn.BatchNorm2d)}
    model.train()
    selection.still()
    assert {name for name in norms if model.get_submodule(name).training} == norms & modules
    selection.release()
    assert trainable(model) == everything


def test_scales_alone() -> None:
    model, _ = made(train="scales")
    assert trainable(model) == {name for name, _ in model.named_parameters() if "fake_quant" in name}
    assert len(trainable(model)) > 10


def test_what_was_frozen_before_stays_so() -> None:
    torch.manual_seed(0)
    model = lq.prepare(Net(), "w4a4", method="lsq")
    model.conv2.bias.requires_grad_(False)
    model.bn1.weight.requires_grad_(False)
    before = trainable(model)
    for value in model.parameters():
        value.grad = torch.ones_like(value)
    selection = Selection(["conv2"])
    selection.freeze(model)
    assert "conv2.bias" not in trainable(model)
    assert {name for name, value in model.named_parameters() if value.grad is None} == before - trainable(model)
    selection.freeze(model)  # again: nothing is forgotten
    selection.release()
    assert trainable(model) == before
    # another model: the first gets back what it had
    selection.freeze(model)
    other = lq.prepare(Net(), "w4a4", method="lsq")
    selection.freeze(other)
    assert trainable(model) == before
    assert trainable(other) == {name for name in dict(other.named_parameters()) if name.startswith(("conv2.", "bn2."))}


def test_the_rest_in_float_is_not_quantized() -> None:
    model, _ = made("float", ["conv2", "head"])
    assert set(fake_modules(model)) == {"conv2", "head"}
    info = get_info(model)
    assert set(info.folded) == {"bn2"}
    assert {name for name, why in info.skipped.items() if "rest='float'" in why} == {"stem.0", "conv1", "shortcut.0"}
    assert info.skipped["bn1"] == "not folded: conv1 stays in float"


def test_modules_that_share_a_weight_are_trained_together() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4))
    model[2].weight = model[0].weight
    lq.prepare(model, "w8a16")
    Selection(["2"]).freeze(model)
    assert trainable(model) == {"0.weight", "2.bias"}


BAD: dict[str, tuple[dict[str, Any], str]] = {
    "rest": ({"train": ["a"], "rest": "int8"}, "rest='int8': valid are quantized, float"),
    "nothing": ({"train": []}, "nothing would be trained"),
    "no pattern": ({"train": 3}, "^train: 3 is no pattern"),
    "no string": ({"train": [3]}, "^train: 3 is not a string"),
    "expression": ({"train": ["re:("]}, "is not a regular expression"),
    "all in float": ({"train": None, "rest": "float"}, "leaves no rest that could be in float"),
    "scales in float": ({"train": "scales", "rest": "float"}, "leaves no rest that could be in float"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_values_raise(case: str) -> None:
    options, message = BAD[case]
    with pytest.raises(ValueError, match=message):
        Selection(**options)


@pytest.mark.parametrize("rest", RESTS)
def test_names_that_are_not_there_raise(rest: str) -> None:
    with pytest.raises(ValueError, match="'conv7' names no module of Net; it has"):
        made(rest, ["conv7"])


def test_what_cannot_be_trained_raises() -> None:
    with pytest.raises(ValueError, match="names no layer that the recipe quantizes"):
        made("float", ["bn1"])
    with pytest.raises(ValueError, match="the method learns no scales"):
        made(train="scales", method="ste")
    with pytest.raises(ValueError, match="leaves nothing to be trained: its parameters have requires_grad=False, or it has none"):
        made(train=["stem.2"])
    with pytest.raises(ValueError, match="'nothing' names no module"):
        find_modules(Net(), ["nothing"])


# --- rankings -------------------------------------------------------------------------------------------------------


def ranking(**costs: float) -> Sensitivity:
    scheme = lq.Recipe("w4a16").scheme
    choices = [
        Choice(name, "Linear", label, {name: scheme}, 1, 4, 1, 4, cost / (1 if label == "w2" else 2))
        for name, cost in costs.items()
        for label in ("w2", "w4")
    ]
    return Sensitivity("sqnr", tuple(choices), {}, 1)


def test_the_worst_layers_of_a_ranking() -> None:
    found = ranking(conv1=1.0, conv2=6.0, head=2.5, stem=0.5)
    assert found.worst(1) == ["conv2"]
    assert found.worst(3) == ["conv2", "head", "conv1"]
    assert found.worst(99) == ["conv2", "head", "conv1", "stem"]
    assert found.worst(0.6) == ["conv2"]
    assert found.worst(0.61) == ["conv2", "head"]
    assert found.worst(1.0) == ["conv2", "head", "conv1", "stem"]
    assert ranking(a=float("inf"), b=1.0, c=float("nan")).worst(0.9) == ["a", "c"]
    assert ranking(a=0.0, b=-1.0).worst(0.5) == ["a"]
    for bad in (0, 1.5, -0.5, True, "2"):
        with pytest.raises(ValueError, match="give a number of layers"):
            found.worst(bad)


def test_a_ranking_names_what_is_trained() -> None:
    found = ranking(conv1=1.0, conv2=6.0, head=2.5, **{"stem.0": 0.5})
    assert Selection(found).patterns == found.worst(SHARE) == ["conv2", "head", "conv1"]
    model, _ = made(train=found)
    assert all(name.startswith(("conv", "bn", "head")) for name in trainable(model))
