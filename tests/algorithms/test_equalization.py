from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import lightning_quant as lq
from lightning_quant.algorithms.equalization import apply_equalization, channel_ranges
from lightning_quant.blocks import Unit
from lightning_quant.spec import QuantScheme, QuantSpec
from lightning_quant.surgery import fake_modules, prepare

W8 = QuantScheme(QuantSpec(8, granularity="tensor"))


def vgg() -> nn.Module:
    return nn.Sequential(
        *(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 12, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Conv2d(12, 8, 3, bias=False), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 5)),
    )


def mobile() -> nn.Module:
    """Expansion, depthwise convolution, projection, with BatchNorms to fold."""
    return nn.Sequential(
        *(nn.Conv2d(3, 8, 1, bias=False), nn.BatchNorm2d(8), nn.ReLU()),
        *(nn.Conv2d(8, 8, 3, padding=1, groups=8, bias=False), nn.BatchNorm2d(8), nn.ReLU()),
        *(nn.Conv2d(8, 6, 1, bias=False), nn.BatchNorm2d(6)),
    )


class Blocks(nn.Module):
    """Residual blocks, in each of which one convolution feeds another, and a step that goes around `forward`."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 6, 1)
        self.blocks = nn.Sequential(*(Block() for _ in range(2)))

    def forward(self, x: Tensor) -> Tensor:
        return self.blocks(self.stem(x))


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(6, 10, 3, padding=1), nn.Conv2d(10, 6, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(x + self.conv2(torch.relu(self.conv1(x))))


# the pairs to equalize: what the layers of each model feed
MODELS: dict[str, tuple[Callable[[], nn.Module], list[tuple[str, str]]]] = {
    "vgg": (vgg, [("0", "2"), ("2", "5"), ("5", "9")]),
    "mobile": (mobile, [("0", "3"), ("3", "6")]),
    "blocks": (Blocks, [("blocks.0.conv1", "blocks.0.conv2"), ("blocks.1.conv1", "blocks.1.conv2")]),
}


def spoil(model: nn.Module, pairs: list[tuple[str, str]]) -> None:
    """Scale channels apart, by factors of up to 1000, without changing the function."""
    modules = dict(model.named_modules())
    for first, second in pairs:
        one, two = modules[first], modules[second]
        factor = torch.logspace(-1.5, 1.5, len(one.weight))[torch.randperm(len(one.weight))]
        norm = modules.get(str(int(first) + 1)) if first.isdigit() else None
        target = norm if isinstance(norm, nn.BatchNorm2d) else one
        target.weight.data *= factor.view(-1, *[1] * (target.weight.dim() - 1))
        if target.bias is not None:
            target.bias.data *= factor
        depthwise = two.weight.shape[1] == 1
        two.weight.data /= factor.view((-1, 1, 1, 1) if depthwise else (1, -1, 1, 1)[: two.weight.dim()])


def make(name: str) -> tuple[nn.Module, list[tuple[str, str]], list[Tensor]]:
    build, pairs = MODELS[name]
    model, batches = build(), [torch.randn(8, 3, 8, 8) for _ in range(2)]
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.running_var.uniform_(0.5, 2.0)
                module.bias.uniform_(-0.3, 0.3)
    model.eval()
    spoil(model, pairs)
    return model, pairs, batches


def whole(model: nn.Module, batch: Tensor) -> Unit:
    prepare(model, W8, training=False)
    return Unit("", model, fake_modules(model), lambda: None, example=lambda: model(batch))


@pytest.mark.parametrize("name", MODELS)
def test_ranges_are_equal_and_the_function_is_the_same(name: str) -> None:
    model, pairs, (batch, other) = make(name)
    with torch.no_grad():
        before = model(other)
    shared = {key: (value.data, value.detach().clone()) for key, value in model.named_parameters()}
    unit = whole(model, batch)
    apply_equalization(unit)
    for first, second in pairs:
        one, two = channel_ranges(unit.modules[first], outputs=True), channel_ranges(unit.modules[second], outputs=False)
        assert torch.allclose(one, two, rtol=5e-3)
        assert torch.equal(
            unit.modules[first].weight_fake_quant.qparams()[0],
            unit.modules[first].weight_fake_quant.measure(unit.modules[first].weight)[0],
        )
    with torch.no_grad():
        assert (model(other) - before).abs().max() <= 1e-4 * before.abs().max()
    touched = {name for pair in pairs for name in pair}
    assert {key for key in unit.notes if "equalization: not rescaled" in unit.notes[key]} == set(unit.modules) - touched
    assert all(torch.equal(*values) for key, values in shared.items() if key in dict(model.named_parameters()))


@pytest.mark.parametrize("name", MODELS)
def test_weights_with_one_scale_a_tensor_gain(name: str) -> None:
    model, _, batches = make(name)
    errors = {}
    for algorithms in ([], ["equalization"]):
        qmodel = lq.quantize(model, lq.Recipe(W8, algorithms=algorithms), batches)
        with torch.no_grad():
            errors[bool(algorithms)] = sum((qmodel(batch) - model(batch)).square().sum().item() for batch in batches)
    assert errors[True] < 0.05 * errors[False]


def test_with_static_activations_and_a_rounder() -> None:
    model, pairs, batches = make("vgg")
    scheme = QuantScheme(QuantSpec(8, granularity="tensor"), QuantSpec(8, symmetric=False, granularity="tensor"))
    errors = {}
    for algorithms in ([], ["gptq"], ["equalization", "gptq"]):
        qmodel = lq.quantize(model, lq.Recipe(scheme, algorithms=algorithms), batches)
        with torch.no_grad():
            errors[len(algorithms)] = sum((qmodel(batch) - model(batch)).square().sum().item() for batch in batches)
    assert errors[2] < 0.1 * min(errors[0], errors[1])
    notes = {row.name: row.note for row in lq.summary(qmodel).rows}
    assert not any("equalization" in notes[name] for pair in pairs for name in pair)


@pytest.mark.parametrize("after", ["adaround", "bias_correction"])
def test_layers_that_are_done_one_by_one_are_equalized_too(after: str) -> None:
    model, pairs, batches = make("vgg")
    errors = {}
    for algorithms in ([after], ["equalization", after]):
        options = {"adaround": {"iterations": 30}} if after == "adaround" else {}
        qmodel = lq.quantize(model, lq.Recipe(W8, algorithms=algorithms, algorithm_options=options), batches)
        with torch.no_grad():
            errors[len(algorithms)] = sum((qmodel(batch) - model(batch)).square().sum().item() for batch in batches)
    assert errors[2] < 0.1 * errors[1]
    notes = {row.name: row.note for row in lq.summary(qmodel).rows}
    assert not any("equalization" in notes[name] for pair in pairs for name in pair)


def test_without_an_example_it_is_noted() -> None:
    model = prepare(vgg(), W8, training=False)
    unit = Unit("the rest", model, fake_modules(model), lambda: None)
    apply_equalization(unit)
    assert all("equalization: not rescaled, no example" in note for note in unit.notes.values())
    assert set(unit.notes) == set(unit.modules)


def test_channels_without_weights_are_left_alone() -> None:
    model = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 3)).eval()
    with torch.no_grad():
        model[0].weight[2] = 0  # its output is a constant
        model[2].weight[:, 4] = 0  # nobody reads it
    x = torch.randn(16, 4)
    before = model(x).detach()
    apply_equalization(whole(model, x))
    assert all(value.isfinite().all() for value in model.parameters())
    assert torch.allclose(model(x), before, atol=1e-5)
