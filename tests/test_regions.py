from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import lightning_quant as lq
from lightning_quant.captured import read
from lightning_quant.compiling import freeze
from lightning_quant.kernels import native
from lightning_quant.regions import fuse_regions
from tests.helpers import assert_close

pytestmark = [
    pytest.mark.skipif(native.LEVEL.amx or native.isa().split()[0] != "avx512", reason="oneDNN's fusions are taken here"),
    pytest.mark.xdist_group("compile"),
]

X = torch.randn(3, 3, 12, 10)


class Net(nn.Module):
    """Some of four layers, and what a test puts between and after them."""

    layers = "ab"

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        made = {"a": nn.Conv2d(3, 16, 3, padding=1), "b": nn.Conv2d(16, 16, 3, padding=1), "c": nn.Conv2d(16, 8, 1, stride=2)}
        for name, layer in (made | {"h": nn.Linear(16, 4)}).items():
            if name in self.layers:
                self.add_module(name, layer)


class Residual(Net):
    layers = "abh"

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.a(x))
        x = F.relu(self.b(x) + x)
        return self.h(F.relu6(self.b(x)).mean((2, 3)))


class Stem(Net):
    """A pool, in-place ReLU and addition, a value that is returned and used, a shortcut that is subsampled and widened."""

    layers = "abc"

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        x = F.max_pool2d(F.relu(self.a(x), inplace=True), 3, 2, 1)
        y = self.b(x)
        y += x
        z = F.pad(self.c(y), (0, 0, 0, 0, 4, 4))
        return y, F.hardtanh(z, 0.0, 6.0) + y[:, :, ::2, ::2]


class Outside(Net):
    """Something that no region has, between two convolutions: two regions."""

    layers = "abc"

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.a(x))
        return self.c(torch.sigmoid(x) * self.b(x))


class Late(Net):
    """What follows the first convolution comes before the second one, which needs it not."""

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        first = self.a(x)
        outside = torch.sigmoid(first).mean((2, 3))
        return outside, F.relu(self.b(first))


class Squeeze(Net):
    """Means weigh channels: they leave the region and come back."""

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.a(x))
        return self.b(x * torch.sigmoid(F.adaptive_avg_pool2d(x, 1)))


# networks, and how many regions each has
NETS = {Residual: 1, Stem: 1, Outside: 2, Late: 1, Squeeze: 2}


def captured(model: nn.Module, x: Tensor) -> tuple[torch.fx.GraphModule, list, list]:
    """The graph that torch.compile captures, with constants, the inputs it has left, and the programs of its regions."""
    found: list = []

    def backend(graph: torch.fx.GraphModule, inputs: list[Tensor]):
        frozen, kept = freeze(graph, inputs)
        found.extend((frozen, kept, fuse_regions(frozen)))
        return lambda *args: frozen(*[args[index] for index in kept])

    torch._dynamo.reset()
    with torch.no_grad():
        torch.compile(model, backend=backend)(x)
    return found[0], found[1], found[2]


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last], ids=str)
@pytest.mark.parametrize("net", NETS, ids=lambda net: net.__name__)
def test_a_graph_computes_the_same(net, memory_format):
    model = lq.quantize(net(), "w8a8", [X]).to(memory_format=memory_format)
    x = X.contiguous(memory_format=memory_format)
    graph, _, programs = captured(model, x)
    calls = [str(node.target) for node in graph.graph.nodes if "lightning_quant" in str(node.target)]
    assert len(programs) == sum("images" in call for call in calls) == NETS[net]
    assert not any("conv" in call for call in calls)
    with torch.no_grad():
        wanted = model(x)
        found = torch.compile(model, backend=lambda g, i: run_fused(g, i))(x)
    for out, expected in zip(*[(value,) if isinstance(value, Tensor) else value for value in (found, wanted)], strict=True):
        assert_close(out, expected, 2e-2)  # the code of a value next to a tie may be its neighbour's
        assert out.stride() == expected.stride()


def run_fused(graph: torch.fx.GraphModule, inputs: list[Tensor]):
    frozen, kept = freeze(graph, inputs)
    programs = fuse_regions(frozen)
    return lambda *args: (programs, frozen(*[args[index] for index in kept]))[1]


@pytest.mark.parametrize("net", NETS, ids=lambda net: net.__name__)
@torch.no_grad()
def test_lq_compile(net):
    model = lq.quantize(net(), "w8a8", [X])
    torch._dynamo.reset()
    fast = lq.compile(model, fullgraph=True)
    for x in (X, X[:1]):
        for out, wanted in zip(*[(y,) if isinstance(y, Tensor) else y for y in (fast(x), model(x))], strict=True):
            assert_close(out, wanted, 2e-2)


def test_what_a_region_returns_is_its_own():
    """Results of one call are not overwritten by the next."""
    model = lq.quantize(Stem(), "w8a8", [X])
    torch._dynamo.reset()
    with torch.no_grad():
        fast = lq.compile(model)
        first = fast(X)
        kept = [y.clone() for y in first]
        fast(-X)
    assert all(torch.equal(a, b) for a, b in zip(first, kept, strict=True))


def test_groups_are_left_to_onednn():
    class Grouped(Net):
        layers = "ac"

        def __init__(self) -> None:
            super().__init__()
            self.b = nn.Conv2d(16, 16, 3, padding=1, groups=4)

        def forward(self, x: Tensor) -> Tensor:
            return self.c(F.relu(self.b(F.relu(self.a(x)))))

    graph, _, programs = captured(lq.quantize(Grouped(), "w8a8", [X]), X)
    assert not programs
    assert sum(read(node, graph, "onednn") is not None for node in graph.graph.nodes) == 3


def test_tensors_that_change_in_place_elsewhere_are_left_alone():
    class Changed(Net):
        def forward(self, x: Tensor) -> Tensor:
            y = self.a(x)
            x.mul_(2)
            return self.b(F.relu(y)).mean() + self.a(x).sum()

    model = lq.quantize(Changed(), "w8a8", [X.clone()])
    assert not captured(model, X.clone())[2]


@torch.no_grad()
def test_other_backends_are_respected(monkeypatch):
    model = lq.quantize(Residual(), "w8a8", [X])
    monkeypatch.setenv("LQ_BACKEND", "reference")
    assert not captured(model, X)[2]
    monkeypatch.setenv("LQ_BACKEND", "cpu")
    assert captured(model, X)[2]
    monkeypatch.setenv("LQ_BACKEND", "onednn")
    assert not captured(model, X)[2]


class InPlace(Net):
    """ReLU6 in place, as `nn.ReLU6(inplace=True)` calls it, on a value that is read again."""

    def forward(self, x: Tensor) -> Tensor:
        y = self.a(x)
        z = F.hardtanh(y, 0.0, 1.0, True)
        return self.b(F.relu(z)) + y


def test_what_is_changed_in_place_and_read_again_is_left_alone():
    model = lq.quantize(InPlace(), "w8a8", [X])
    assert not captured(model, X)[2]
    torch._dynamo.reset()
    with torch.no_grad():
        assert_close(lq.compile(model)(X), model(X), 2e-2)


def test_arguments_may_be_given_by_name():
    class Named(Net):
        def forward(self, x: Tensor) -> Tensor:
            y = F.max_pool2d(input=F.relu(input=self.a(x)), kernel_size=2)
            return torch.mean(input=torch.add(input=self.b(y), other=y), dim=(2, 3))

    model = lq.quantize(Named(), "w8a8", [X])
    graph, _, programs = captured(model, X)
    assert len(programs) == 1
    assert not any("relu" in str(node.target) for node in graph.graph.nodes)
    with torch.no_grad():
        assert_close(lq.compile(model)(X), model(X), 2e-2)
