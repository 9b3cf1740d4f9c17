from __future__ import annotations

import inspect
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lightning_quant as lq
from lightning_quant.algorithms import ALGORITHMS, get_algorithms
from lightning_quant.algorithms.base import Algorithm
from lightning_quant.blocks import Unit
from lightning_quant.sequential import input_path, statistics_kinds
from lightning_quant.statistics import KINDS
from lightning_quant.surgery import packed_modules
from tests.chains import Block, Loop, plain


@pytest.mark.parametrize(
    ("names", "options", "message"),
    [
        (["nope"], {}, "unknown algorithm 'nope'; valid: .*gptq"),
        (["gptq", "awq"], {}, r"gptq \(rounder\), awq \(transform\). Transforms come first"),
        (["gptq", "autoround"], {}, "one rounder at most; gptq and autoround"),
        (["awq", "awq"], {}, "each once"),
        (["gptq"], {"awq": {}}, "algorithm_options for 'awq', which is not among the algorithms: gptq"),
        (["gptq"], {"gptq": {"damping": 1}}, "'gptq' has no option 'damping'; valid: damp"),
    ],
)
def test_what_cannot_work_is_refused_before_work(names: list[str], options: dict[str, Any], message: str) -> None:
    recipe = lq.Recipe("w4a16", algorithms=names, algorithm_options=options)
    with pytest.raises(ValueError, match=message):
        get_algorithms(recipe)
    with pytest.raises(ValueError, match=message):
        lq.quantize(nn.Sequential(nn.Linear(8, 8)), recipe, [torch.randn(2, 8)])


def test_what_algorithms_ask_for_is_collected() -> None:
    for algorithm in ALGORITHMS.values():
        assert set(algorithm.statistics) <= {*KINDS, "outputs"}
    kinds = {name: statistics_kinds(get_algorithms(lq.Recipe("w4a16", algorithms=[name]))) for name in ALGORITHMS}
    assert kinds["gptq"] == {"hessian"}
    assert {"low", "high"} <= kinds["awq"]  # ranges of activations are found after it
    paths = {
        names: input_path(get_algorithms(lq.Recipe("w4a16", algorithms=names)))
        for names in (("gptq",), ("awq",), ("awq", "gptq"), ("awq", "autoround"))
    }
    assert list(paths.values()) == ["quantized", "float", "quantized", "both"]


def added(monkeypatch: pytest.MonkeyPatch, name: str, apply: Any, *more: Any) -> None:
    monkeypatch.setitem(ALGORITHMS, name, Algorithm(apply, *more))


def test_an_algorithm_in_the_table_runs_on_calibrated_ranges(monkeypatch: pytest.MonkeyPatch) -> None:
    def halve(unit: Unit) -> None:
        for module in unit.modules.values():
            assert module.input_fake_quant.has_range
            module.weight.data = module.weight.data * 0.5
            module.observe_weights()

    added(monkeypatch, "halve", halve, "rounder")
    net = nn.Sequential(nn.Linear(4, 4))
    before = net[0].weight.detach().clone()
    plain, halved = (lq.quantize(net, lq.Recipe("w8a8", algorithms=names), [torch.randn(3, 4)]) for names in ([], ["halve"]))
    assert torch.equal(halved[0].weight_packed, plain[0].weight_packed)
    assert torch.allclose(halved[0].weight_scale, plain[0].weight_scale / 2)
    assert torch.equal(net[0].weight, before)


def test_ranges_are_those_after_transforms(monkeypatch: pytest.MonkeyPatch) -> None:
    def double(unit: Unit) -> None:
        for name, module in unit.modules.items():
            assert not module.input_fake_quant.has_range
            module.weight.data = module.weight.data / 2
            module.scale_input(torch.full((4,), 2.0))
            for kind in ("low", "high"):
                unit.statistics[kind][name] = unit.statistics[kind][name] * 2

    added(monkeypatch, "double", double, "transform", ("low", "high"))
    data = [torch.randn(3, 4) for _ in range(4)]
    net = nn.Sequential(nn.Linear(4, 4))
    for observer in (None, "mse"):  # from the ends that are known, and from a pass of its own
        plain, doubled = (
            lq.quantize(net, lq.Recipe("w8a8", algorithms=names, observer=observer), data) for names in ([], ["double"])
        )
        assert torch.allclose(doubled[0].input_scale, 2 * plain[0].input_scale)
        assert torch.equal(doubled[0].input_zero_point, plain[0].input_zero_point)
        assert torch.equal(doubled[0].weight_packed, plain[0].weight_packed)  # and of weights that an algorithm has left
        assert torch.allclose(doubled(data[0]), plain(data[0]), atol=1e-5)


def test_kinds_run_in_order_unit_by_unit(monkeypatch: pytest.MonkeyPatch) -> None:
    ran: list[tuple[str, str]] = []

    def note(name: str) -> Any:
        def apply(unit: Unit, *, option: int = 0) -> None:
            ran.append((name, unit.name))
            unit.shared.setdefault("count", 0)
            unit.shared["count"] += 1
            unit.note(next(iter(unit.modules)), f"{name} {option} {unit.shared['count']}")
            assert (unit.targets is None) == (name != "fix" and "fix" not in ALGORITHMS)

        return apply

    for name, kind in (("move", "transform"), ("round", "rounder"), ("fix", "correction")):
        added(monkeypatch, name, note(name), kind, (), name == "fix")
    recipe = lq.Recipe("w4a16", group_size=8, algorithms=["move", "round", "fix"], algorithm_options={"fix": {"option": 7}})
    qmodel = lq.quantize(Loop(Block, plain, count=2), recipe, [torch.randn(3, 16)])
    units = ["stem", "blocks.0", "blocks.1", "head"]
    assert ran == [(name, unit) for unit in units for name in ("move", "round", "fix")]
    notes = {row.name: row.note for row in lq.summary(qmodel).rows}
    assert notes["blocks.1.up"] == "move 0 7; round 0 8; fix 7 9"


def test_targets_are_float_and_inputs_quantized(monkeypatch: pytest.MonkeyPatch) -> None:
    model, data = Loop(Block, plain), [torch.randn(3, 16) for _ in range(2)]
    wanted: dict[str, list[Tensor]] = {}
    for name in ("blocks.1", "blocks.2"):
        model.get_submodule(name).register_forward_hook(
            lambda _, args, out, name=name: wanted.setdefault(name, []).append((args[0].clone(), out.clone()))  # type: ignore[func-returns-value]
        )
    with torch.no_grad():
        for batch in data:
            model(batch)
    float_calls = {name: list(values) for name, values in wanted.items()}
    checked: list[str] = []

    def look(unit: Unit) -> None:
        for index, (hidden, out) in enumerate(float_calls.get(unit.name, [])):  # type: ignore[misc]
            assert torch.allclose(unit.targets[index], out, atol=1e-6)  # type: ignore[index]
            difference = (unit.calls[index][0][0] - hidden).abs().max()  # type: ignore[index]
            assert 1e-3 < difference < 1.0
            checked.append(unit.name)

    added(monkeypatch, "look", look, "rounder", (), True)
    lq.quantize(model, lq.Recipe("w4a16", group_size=8, algorithms=["look"]), data)
    assert checked == ["blocks.1"] * 2 + ["blocks.2"] * 2


def test_finished_units_are_packed_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Their float weights are not kept until the end."""
    from lightning_quant.nn import PackedModule

    model = Loop(Block, plain, count=4)
    packed: list[int] = []
    roots: list[nn.Module] = []

    def look(unit: Unit) -> None:
        if unit.calls is None:
            roots.append(unit.root)
        packed.append(sum(isinstance(part, PackedModule) for part in roots[0].modules()))

    added(monkeypatch, "look", look, "rounder")
    lq.quantize(model, lq.Recipe("w4a16", group_size=8, algorithms=["look"]), [torch.randn(3, 16)])
    assert packed == [0, 1, 3, 5, 7, 9]


@torch.no_grad()
@pytest.mark.parametrize("names", [["equalization"], ["equalization", "gptq"], ["smoothquant"], ["awq", "gptq", "bias_correction"]])
def test_static_ranges_are_those_of_what_layers_get_in_the_end(names: list[str]) -> None:
    """Whatever was moved between layers: the range of an input is that of what the layer is given."""
    torch.manual_seed(0)
    model, data = Loop(Block, plain), [torch.randn(64, 16) for _ in range(2)]
    model.blocks[1].up.weight[:4] *= 20  # the block's hidden channels have uneven ranges
    seen: dict[str, list[Tensor]] = {}
    qmodel = lq.quantize(model, lq.Recipe("w8a8", algorithms=names), data)
    for name, module in packed_modules(qmodel).items():
        module.register_forward_pre_hook(lambda _, args, name=name: seen.setdefault(name, []).append(args[0]))  # type: ignore[misc]
    for batch in data:
        qmodel(batch)
    for name, module in packed_modules(qmodel).items():
        x = torch.cat(seen[name]) * (module.pre_scale if module._parameters.get("pre_scale") is not None else 1.0)
        spread = (x.max().clamp(min=0) - x.min().clamp(max=0)) / 255
        assert 0.95 < module.input_scale.item() / spread.item() < 1.05, name
    error = sum((qmodel(batch) - model(batch)).square().sum() for batch in data)
    assert error < 2e-3 * sum(model(batch).square().sum() for batch in data)


BAD_VALUES: list[tuple[str, str, object, str]] = [
    ("gptq", "damp", -1, "from 1e-06 to 1"),
    ("gptq", "damp", float("nan"), "from 1e-06 to 1"),
    ("gptq", "search", 3, "bool or None"),
    ("gptq", "block_size", True, "must be int"),
    ("awq", "steps", 0, "at least 1"),
    ("smoothquant", "alpha", 1.5, "from 0 to 1"),
    ("autoround", "iterations", 0, "at least 1"),
    ("autoround", "batches", -2, "at least 1"),
    ("autoround", "dtype", "int8", "'auto' or 'bfloat16' or 'float16' or None"),
    ("block_ap", "rate", 2, "from 1e-06 to 1"),
    ("block_ap", "scale_rate", "slow", "must be float or None"),
    ("adaround", "iterations", 2.5, "must be int"),
    ("adaround", "warmup", 1.0, "from 0 to 0.99"),
    ("equalization", "sweeps", "many", "must be int"),
]


@pytest.mark.parametrize(("name", "option", "value", "told"), BAD_VALUES, ids=lambda value: str(value).replace(" ", "-"))
def test_wrong_values_of_options_are_refused_before_work(name: str, option: str, value: object, told: str) -> None:
    recipe = lq.Recipe("w8a8", algorithms=[name], algorithm_options={name: {option: value}})
    with pytest.raises(ValueError, match=f"algorithm '{name}': {option}=.*{told}"):
        get_algorithms(recipe)


@pytest.mark.parametrize("name", ALGORITHMS)
def test_the_defaults_of_every_option_are_valid(name: str) -> None:
    parameters = inspect.signature(ALGORITHMS[name].apply).parameters
    options = {key: value.default for key, value in parameters.items() if key != "unit"}
    assert get_algorithms(lq.Recipe("w8a8", algorithms=[name], algorithm_options={name: options}))


def test_options_that_are_no_mapping_are_refused() -> None:
    with pytest.raises(ValueError, match="'gptq' has 5, which is no mapping"):
        lq.Recipe("w8a8", algorithms=["gptq"], algorithm_options={"gptq": 5})  # type: ignore[dict-item]
