"""Every method, on every kind of module: it trains, what was trained is what is packed, and its state comes back."""

from __future__ import annotations

import copy
import pickle
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_quant.calibration import quantizers, set_flags
from lightning_quant.methods import METHODS, check_schemes, get_method, resolve_options
from lightning_quant.oscillation import advance, start_track
from lightning_quant.recipe import Recipe
from lightning_quant.spec import QuantScheme, QuantSpec
from lightning_quant.surgery import convert, fake_modules, is_prepared, packed_modules, prepare
from tests.helpers import assert_close, assert_same_state

SIGNED = QuantSpec(4, granularity="tensor")
UNSIGNED = QuantSpec(4, symmetric=False, granularity="tensor")


class Recurrent(nn.LSTM):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x)[0]


MODELS: dict[str, tuple[Callable[[], nn.Module], Callable[[], Tensor]]] = {
    "linear": (lambda: nn.Linear(24, 7), lambda: torch.randn(16, 24)),
    "conv": (lambda: nn.Conv2d(5, 6, 3, padding=1), lambda: torch.rand(8, 5, 6, 6)),
    "conv-bn": (lambda: nn.Sequential(nn.Conv2d(5, 6, 3, bias=False), nn.BatchNorm2d(6)), lambda: torch.randn(8, 5, 6, 6)),
    "lstm": (lambda: nn.LSTM(12, 9, batch_first=True), lambda: torch.randn(4, 5, 12)),
    "embedding": (lambda: nn.Embedding(20, 24), lambda: torch.randint(0, 20, (16,))),
    "attention": (lambda: nn.TransformerEncoderLayer(12, 2, 16, 0.0, batch_first=True), lambda: torch.randn(4, 5, 12)),
}
INPUTS = {"signed": SIGNED, "asymmetric": UNSIGNED, "token": QuantSpec(8, granularity="token", dynamic=True), "float": None}
# the codes of methods that leave some out
FEW = {name: method.weight.levels(QuantSpec(2)) for name, method in METHODS.items() if method.weight.levels(QuantSpec(2))}
every_method = pytest.mark.parametrize("method", METHODS)
every_model = pytest.mark.parametrize("name", MODELS)


def recipe(method: str, activation: QuantSpec | None = UNSIGNED, granularity: Any = "channel") -> Recipe:
    scheme = QuantScheme(QuantSpec(METHODS[method].bits or 3, granularity=granularity), activation)
    return Recipe(None, schemes={"*": scheme})


def output(model: nn.Module, x: Tensor) -> Tensor:
    out = model(x)
    return out[0] if isinstance(out, tuple) else out


def trained(model: nn.Module, x: Tensor, steps: int = 4, rate: float = 0.02) -> nn.Module:
    """A few steps of SGD towards noise, ranges observed."""
    set_flags(model.train(), observing=True, following=True, quantizing=True)
    optimizer = torch.optim.SGD(model.parameters(), rate)
    target = torch.randn_like(output(model, x))
    for _ in range(steps):
        optimizer.zero_grad()
        nn.functional.mse_loss(output(model, x), target).backward()
        optimizer.step()
    set_flags(model, observing=False)
    return model.eval()


def made(method: str, name: str, activation: QuantSpec | None = UNSIGNED, granularity: Any = "channel") -> tuple[nn.Module, Tensor]:
    build, example = MODELS[name]
    model, x = nn.Sequential(build()), example()
    prepare(model, recipe(method, activation, granularity), method=method, call=lambda: model(x))
    return trained(model, x), x


@every_method
@every_model
@pytest.mark.parametrize("kind", INPUTS)
def test_what_was_trained_is_what_is_packed(method: str, name: str, kind: str) -> None:
    model, x = made(method, name, INPUTS[kind] if name != "attention" else None)  # rounding noise would move inner activations
    packed = convert(model)
    assert packed_modules(packed)
    with torch.no_grad():
        assert_close(output(packed, x), output(model, x))


@every_method
@pytest.mark.parametrize("granularity", ["tensor", "group"])
def test_other_granularities(method: str, granularity: str) -> None:
    bits = METHODS[method].bits or 3
    weight = QuantSpec(bits, granularity=granularity, group_size=16 if granularity == "group" else None)
    for name in ("linear", "conv-bn"):
        build, example = MODELS[name]
        model, x = nn.Sequential(build()), example()
        prepare(model, Recipe(QuantScheme(weight, SIGNED)), method=method, call=lambda model=model, x=x: model(x))
        trained(model, x)
        with torch.no_grad():
            assert_close(convert(model)(x), model(x))


@every_method
@every_model
def test_everything_that_should_learn_does(method: str, name: str) -> None:
    build, example = MODELS[name]
    model, x = nn.Sequential(build()), example()
    prepare(model, recipe(method), method=method, call=lambda: model(x))
    before = {key: value.clone() for key, value in trained(model, x, 1).named_parameters()}
    trained(model, x)
    for key, value in model.named_parameters():
        # a zero point learns from what is clipped, which may be nothing
        assert not torch.equal(value, before[key]) or (key.endswith("zero_point") and name != "linear"), key
    rules = METHODS[method]
    for fake in fake_modules(model).values():
        for part, quantizer in fake.quantizers():
            rule = rules.weight if quantizer.is_weight else rules.activation
            assert quantizer.learned == (rule.fake is not None), part
            learned = quantizer.learned and rule.learns_zero_point and not quantizer.spec.symmetric
            assert [key for key, _ in quantizer.named_parameters()] == ["scale"] * quantizer.learned + ["zero_point"] * learned


@every_method
@every_model
def test_state_and_copies(method: str, name: str) -> None:
    model, x = made(method, name)
    again = nn.Sequential(MODELS[name][0]())
    prepare(again, recipe(method), method=method, call=lambda: again(x))
    again.load_state_dict(model.state_dict())
    assert_same_state(again.state_dict(), model.state_dict())
    with torch.no_grad():
        want = output(model, x)
        for other in (again.eval(), copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            assert torch.equal(output(other, x), want)
    torch.manual_seed(1)
    trained(model, x)
    torch.manual_seed(1)
    trained(again, x)
    assert_same_state(again.state_dict(), model.state_dict())


@pytest.mark.parametrize("name", ["linear", "conv-bn", "embedding"])
@pytest.mark.parametrize("method", FEW)
def test_only_some_codes_are_in_use(method: str, name: str) -> None:
    model, _ = made(method, name)
    for module in packed_modules(convert(model)).values():
        weight, scale = module.dequantized_weight(), module.weight_scale
        levels = (weight.flatten(1) / scale).round()
        assert tuple(levels.unique().tolist()) == FEW[method]


@pytest.mark.parametrize("method", FEW)
def test_a_wide_weight_stays_within_the_codes(method: str) -> None:
    model, x = made(method, "linear")
    with torch.no_grad():
        model[0].weight[0, 0] = -100.0
        assert_close(convert(model)(x), model(x))
        assert convert(model)[0].dequantized_weight()[0, 0].item() == -model[0].weight_fake_quant.scale[0].abs().item()


@pytest.mark.parametrize("method", FEW)
def test_what_is_zero_stays_zero(method: str) -> None:
    """Heads that start at 0, and channels that were pruned."""
    model = nn.Sequential(nn.Linear(24, 7))
    with torch.no_grad():
        model[0].weight[:3] = 0
        model[0].bias.zero_()
    prepare(model, recipe(method, None), method=method)
    set_flags(model, quantizing=True)
    x = torch.randn(5, 24)
    for found in (model(x), convert(model)(x)):
        assert found[:, :3].abs().max() < 1e-4
        assert found[:, 3:].abs().min() > 1e-4


@pytest.mark.parametrize("method", FEW)
def test_scales_of_ragged_groups_are_those_of_what_is_in_them(method: str) -> None:
    model = nn.Sequential(nn.Linear(48, 8))
    with torch.no_grad():
        model[0].weight.copy_(torch.where(torch.rand(8, 48) < 0.5, -0.25, 0.25))
    prepare(model, Recipe(QuantScheme(QuantSpec(2, granularity="group", group_size=32))), method=method)
    set_flags(model, quantizing=True)
    torch.testing.assert_close(model[0].weight_fake_quant.scale, torch.full((8, 2), 0.25))


@pytest.mark.parametrize("method", FEW)
def test_oscillating_weights_are_held_at_a_code_in_use(method: str) -> None:
    levels = FEW[method]
    track = start_track(torch.zeros(4, dtype=torch.int8))
    for step in range(20):
        advance(track, torch.tensor([levels[-1 * (step % 2)]] * 4, dtype=torch.int8), 0.03, levels)
    assert track["frozen"].all()
    assert set(track["codes"].tolist()) <= set(levels)


@pytest.mark.parametrize("method", FEW)
def test_layers_of_more_bits_learn_as_lsq(method: str) -> None:
    model = nn.Sequential(nn.Linear(24, 8), nn.Linear(8, 8), nn.Linear(8, 7))
    prepare(model, "w2a2", method=method)
    assert [part.levels for part in quantizers(model) if part.is_weight] == [None, FEW[method], None]
    x, results = torch.randn(16, 24), []
    for learning in (method, "lsq"):
        part = METHODS[learning].weight
        leaves = [value.requires_grad_() for value in (x.clone(), torch.full((16, 1), 0.02))]
        part.fake(*leaves, torch.zeros(16, 1), QuantSpec(8), 0, None).sum().backward()
        results.append([leaf.grad for leaf in leaves])
    assert all(torch.equal(one, two) for one, two in zip(*results))


@pytest.mark.parametrize(
    ("method", "scheme", "message"),
    [
        ("lsq", QuantScheme(QuantSpec(4, "nf4", granularity="group", group_size=16)), r"0: .*'lsq'.*nf4.*'ste'"),
        ("pact", QuantScheme(QuantSpec(8), QuantSpec(8, "float8_e4m3fn", granularity="tensor")), r"0: .*'pact'.*float8"),
        ("ternary", QuantScheme(QuantSpec(2, symmetric=False)), r"0: .*symmetric"),
        ("ternary", QuantScheme(QuantSpec(4)), r"2-bit.*bits=2"),
    ],
)
def test_what_a_method_cannot_train_is_named_and_nothing_is_touched(method: str, scheme: QuantScheme, message: str) -> None:
    model = nn.Sequential(nn.Linear(24, 7))
    with pytest.raises(ValueError, match=message):
        prepare(model, Recipe(scheme), method=method)
    assert not is_prepared(model)


@every_method
def test_dynamic_inputs_and_8_bit_edges_fit_every_method(method: str) -> None:
    bits = METHODS[method].bits or 4
    schemes = {name: QuantScheme(QuantSpec(bits), spec) for name, spec in INPUTS.items()}
    check_schemes(method, {**schemes, "edge": QuantScheme(QuantSpec(8), QuantSpec(8, symmetric=False, granularity="tensor"))})
    model = nn.Sequential(*(nn.Linear(8, 8) for _ in range(4)))
    prepare(model, Recipe(QuantScheme(QuantSpec(bits), UNSIGNED), edges="w8a8"), method=method)
    assert [fake.scheme.weight.bits for fake in fake_modules(model).values()] == [8, bits, bits, 8]


def test_options() -> None:
    for name, method in METHODS.items():
        assert resolve_options(name) == method.options
        for option in method.options:
            assert resolve_options(name, {option: 3})[option] == 3.0
        with pytest.raises(ValueError, match=re.escape(f"'{name}' has no option 'nothing'; valid: ")):
            resolve_options(name, {"nothing": 1.0})
        for option in method.options:
            for value in (-1, True, float("nan"), float("inf"), "1"):
                with pytest.raises(ValueError, match=f"{option}=.*finite number"):
                    resolve_options(name, {option: value})  # type: ignore[dict-item]
    with pytest.raises(ValueError, match=r"'median'.*ste, lsq"):
        get_method("median")


@pytest.mark.parametrize(("method", "option"), [(name, option) for name, method in METHODS.items() for option in method.options])
def test_every_option_reaches_the_quantizers(method: str, option: str) -> None:
    x, grads = torch.randn(16, 24), []
    for value in (0.0, 1.0):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(24, 7))
        prepare(model, recipe(method), method=method, method_options={option: value})
        set_flags(model, observing=True, quantizing=True)
        model(x).square().sum().backward()
        rules = [(part.rule.regularization, part.learned) for part in quantizers(model)]
        grads.append((model[0].weight.grad, rules))
    assert not torch.equal(grads[0][0], grads[1][0]) or grads[0][1] != grads[1][1]
