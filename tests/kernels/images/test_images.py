from __future__ import annotations

import os
import random
import threading

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import lightning_quant as lq
from lightning_quant.kernels import images, native
from lightning_quant.kernels.images.compiler import compile_graph
from lightning_quant.kernels.images.graph import INFINITY, ConvWeight, Graph, Grid
from lightning_quant.spec import QuantSpec
from tests.helpers import assert_close

ISAS = [isa for isa in native.LEVELS if native.library() is not None]


@pytest.fixture(params=ISAS)
def isa(request):
    """Each instruction set that this machine has."""
    if native.use(request.param) != request.param:
        native.use(os.environ.get("LQ_ISA", native.LEVELS[-1]))
        pytest.skip(f"no {request.param} here")
    yield request.param
    native.use(os.environ.get("LQ_ISA", native.LEVELS[-1]))


def weight(rng: random.Random, inputs: int, kernel: tuple[int, int] | None = None, outputs: int | None = None) -> ConvWeight:
    """A random convolution that keeps the size if its kernel is given."""
    outputs = outputs or rng.choice([1, 4, 5, 16, 20, 33, 48])
    kernel, same = kernel or rng.choice([(1, 1), (3, 3), (2, 5), (3, 1)]), kernel is not None
    low, high = rng.choice([(0, 255), (1, 255), (100, 160)])
    return ConvWeight(
        torch.randint(-127, 128, (outputs, inputs, *kernel), dtype=torch.int8),
        torch.rand(outputs) * 0.01,
        torch.randn(outputs) if rng.random() < 0.5 else None,
        Grid(rng.choice([0.02, 0.05]), rng.randint(low, high), low, high),
        (1, 1) if same else rng.choice([(1, 1), (2, 2), (1, 3)]),
        (kernel[0] // 2, kernel[1] // 2) if same else rng.choice([(0, 0), (1, 1), (2, 0)]),
        (1, 1) if same else rng.choice([(1, 1), (1, 2)]),
    )


def convolve(x: Tensor, weight: ConvWeight) -> Tensor:
    """What a packed convolution computes, with exact sums."""
    grid = weight.grid
    codes = ((x * (1 / torch.tensor(grid.scale))).round() + grid.zero_point).clamp(grid.low, grid.high) - grid.zero_point
    sums = F.conv2d(codes.double(), weight.codes.double(), None, weight.stride, weight.padding, weight.dilation)
    out = sums.float() * (weight.scale * grid.scale).view(-1, 1, 1)
    return out if weight.bias is None else out + weight.bias.view(-1, 1, 1)


def evaluate(graph: Graph, inputs: list[Tensor]) -> list[Tensor]:
    """A graph in torch's operators."""
    values: list[Tensor] = []
    given = iter(inputs)
    for value in graph.values:
        args = [values[index] for index in value.inputs]
        numbers = value.numbers
        match value.op:
            case "input":
                values.append(next(given))
            case "conv":
                assert value.conv is not None
                values.append(convolve(args[0], value.conv))
            case "add":
                values.append(args[0] + args[1])
            case "clamp":
                values.append(args[0].clamp(*numbers))
            case "slice":
                values.append(args[0][:, :, :: numbers[0], :: numbers[1]])
            case "pad":
                after = value.shape[0] - args[0].shape[1] - numbers[0]
                values.append(F.pad(args[0], (0, 0, 0, 0, numbers[0], after)))
            case "max_pool":
                values.append(F.max_pool2d(args[0], *numbers))
            case "mean":
                values.append(args[0].mean((2, 3), keepdim=True))
    return [values[index] for index in graph.outputs]


def random_graph(seed: int) -> Graph:
    """Convolutions, additions, clamps and pools in a random order; some values are used twice, some returned."""
    rng = random.Random(seed)
    torch.manual_seed(seed)
    graph = Graph()
    size = rng.choice([(9, 9), (5, 12), (16, 33)])
    for _ in range(rng.randint(1, 2)):
        graph.add("input", (), (rng.choice([1, 3, 16]), *size), channels_last=rng.random() < 0.5)
    for _ in range(rng.randint(1, 9)):
        index = rng.choice(range(len(graph.values))[-3:])
        if graph.values[index].op == "mean":
            continue
        channels, height, width = shape = graph.values[index].shape
        twins = [other for other, value in enumerate(graph.values) if value.shape == shape and value.op != "mean"]
        match rng.choice(["conv", "conv", "same", "add", "clamp", "slice", "pad", "max_pool", "mean"]):
            case "conv":
                chosen = weight(rng, channels)
                if (chosen.codes.shape[2] - 1) < height and (chosen.codes.shape[3] - 1) * chosen.dilation[1] < width:
                    graph.conv(index, chosen)
            case "same":
                graph.conv(index, weight(rng, channels, (3, 3), channels))
            case "add":
                graph.add("add", (index, rng.choice(twins)), shape)
            case "clamp":
                graph.add("clamp", (index,), shape, numbers=rng.choice([(0.0, INFINITY), (0.0, 6.0), (-0.5, 0.5)]))
            case "slice":
                graph.add("slice", (index,), (channels, -(-height // 2), width), numbers=(2, 1))
            case "pad":
                graph.add("pad", (index,), (channels + 3, height, width), numbers=(2,))
            case "max_pool" if min(height, width) >= 3:
                pooled = (channels, (height + 2 - 3) // 2 + 1, (width + 2 - 3) // 2 + 1)
                graph.add("max_pool", (index,), pooled, numbers=((3, 3), (2, 2), (1, 1)))
            case "mean":
                graph.add("mean", (index,), (channels, 1, 1))
    read = {given for value in graph.values for given in value.inputs}
    graph.outputs = [index for index, value in enumerate(graph.values) if index not in read or rng.random() < 0.2]
    graph.channels_last = [graph.values[index].op != "mean" and rng.random() < 0.5 for index in graph.outputs]
    return graph


def given(graph: Graph, count: int) -> list[Tensor]:
    return [torch.randn(count, *value.shape) for value in graph.values if value.op == "input"]


def check(seed: int, counts: tuple[int, ...] = (1, 3)) -> None:
    graph = random_graph(seed)
    program = compile_graph(graph)
    for count in counts:
        inputs = given(graph, count)
        found = program.run(inputs)
        for out, wanted, last in zip(found, evaluate(graph, inputs), graph.channels_last, strict=True):
            assert out.shape == wanted.shape, seed
            assert out.is_contiguous(memory_format=torch.channels_last if last else torch.contiguous_format)
            # single codes next to a tie may be their neighbours; all others agree
            wrong = ~torch.isclose(out, wanted, rtol=1e-4, atol=1e-4 * float(wanted.abs().max()) + 1e-6)
            assert wrong.float().mean() < 0.02, (seed, wrong.float().mean())


@pytest.mark.parametrize("start", range(0, 120, 30))
def test_random_graphs_equal_torchs_operators(isa, start):
    for seed in range(start, start + 30):
        check(seed)


def test_a_single_convolution_is_exact(isa):
    rng = random.Random(0)
    for seed in range(60):
        torch.manual_seed(seed)
        graph = Graph()
        x = graph.add("input", (), (rng.choice([1, 3, 4, 16, 17]), 8, 19), channels_last=seed % 3 == 0)
        graph.outputs, graph.channels_last = [graph.conv(x, weight(rng, graph.values[x].shape[0]))], [seed % 4 == 0]
        inputs = given(graph, 2)
        assert_close(compile_graph(graph).run(inputs)[0], evaluate(graph, inputs)[0], 1e-6)


def test_threads_compute_the_same_bits():
    graph = random_graph(7)
    program, inputs = compile_graph(graph), given(graph, 5)
    before = torch.get_num_threads()
    try:
        found = []
        for threads in (1, 2):
            torch.set_num_threads(threads)
            for count in (1, 5):  # threads share one image, or each has its own
                found.append(program.run([x[:count] for x in inputs]))
        for first, second in zip(found[:2], found[2:], strict=True):
            assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
        assert all(torch.equal(a[:1], b) for a, b in zip(found[1], found[0], strict=True))
    finally:
        torch.set_num_threads(before)


def test_python_threads_may_call_one_program():
    graph = random_graph(11)
    program, inputs = compile_graph(graph), given(graph, 4)
    wanted, wrong = program.run(inputs), []

    def work() -> None:
        for _ in range(20):
            wrong.extend(a for a, b in zip(program.run(inputs), wanted, strict=True) if not torch.equal(a, b))

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_an_empty_batch():
    graph = random_graph(3)
    for out, wanted in zip(compile_graph(graph).run(given(graph, 0)), evaluate(graph, given(graph, 1)), strict=True):
        assert out.shape == (0, *wanted.shape[1:])


def test_a_window_larger_than_the_image_is_an_error():
    graph = Graph()
    x = graph.add("input", (), (3, 2, 2))
    with pytest.raises(ValueError, match=r"\(3, 3\) does not fit into \(2, 2\)"):
        graph.conv(x, ConvWeight(torch.ones(4, 3, 3, 3, dtype=torch.int8), torch.ones(4), None, Grid(1.0, 0)))


def test_layers_share_what_was_arranged_and_forget_old_sizes(monkeypatch):
    monkeypatch.setattr(images, "_SIZES", 2)
    model = lq.quantize(nn.Conv2d(3, 8, 3), "w8a8", [torch.randn(2, 3, 9, 9)])
    if images.refuses(torch.empty(0), model.scheme.weight, model.scheme.input):
        pytest.skip("other kernels convolve here")
    wanted = model(torch.ones(1, 3, 7, 7))
    for size in (8, 9, 10, 7):
        out = model(torch.ones(1, 3, size, size))
    assert torch.equal(out, wanted)


@pytest.mark.parametrize(
    ("reason", "args"),
    [
        ("", (torch.float32, QuantSpec(8), QuantSpec(8, granularity="tensor"))),
        ("float32", (torch.bfloat16, QuantSpec(8), QuantSpec(8, granularity="tensor"))),
        ("static", (torch.float32, QuantSpec(8), QuantSpec(8, granularity="token", dynamic=True))),
        ("groups", (torch.float32, QuantSpec(4, granularity="group", group_size=32), QuantSpec(8, granularity="tensor"))),
    ],
)
def test_what_is_refused(reason, args):
    dtype, *specs = args
    found = images.refuses(torch.empty(0, dtype=dtype), *specs)
    if reason or (native.LEVEL.value == "avx512" and not native.LEVEL.amx):
        assert (reason in found) if reason else (found == "")
