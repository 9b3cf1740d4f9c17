"""Parts of a captured graph that run image by image: int8 convolutions and what lies between them (CPU).

A region grows from a convolution along the graph: additions, ReLU, pools and further convolutions join it as long as nothing
outside of it lies between. Each becomes one call of `kernels.images`.
"""

from __future__ import annotations

import inspect
import operator
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx
from torch.fx.passes.tools_common import legalize_graph

from lightning_quant.captured import Layer, read
from lightning_quant.kernels import images, native, onednn
from lightning_quant.kernels.images.graph import INFINITY, ConvWeight, Graph, Grid
from lightning_quant.kernels.images.program import Program

_IN_PLACE = (operator.iadd, operator.isub, operator.imul, operator.itruediv, operator.ifloordiv, operator.ipow, operator.setitem)
# what a node of a region computes: operation, the nodes it is of, its numbers
Reading = tuple[str, tuple[fx.Node, ...], tuple[Any, ...]]


def fuse_regions(graph: fx.GraphModule) -> list[Program]:
    """Replace the regions of a graph, in place.

    Nothing is replaced where oneDNN does better (AMX), where a convolution has to be left to it (groups), or where the graph
    changes tensors in place.

    Returns:
        their programs, which the graph's operators need as long as it runs.
    """
    if native.library() is None or native.LEVEL.amx or (native.LEVEL.value != "avx512" and onednn.is_exact()):
        return []
    layers = {node: layer for node in graph.graph.nodes if (layer := read(node, graph, "cpu")) is not None and layer.op == "conv"}
    if not all(_fits(node, layer) for node, layer in layers.items()):
        return []
    regions = _find(graph, layers)
    if regions is None:
        return []
    replaced: dict[fx.Node, fx.Node] = {}
    programs = [_replace(graph, region, layers, replaced) for region in regions]
    if programs:
        legalize_graph(graph)
        graph.graph.lint()
        graph.recompile()
    return programs


def _fits(node: fx.Node, layer: Layer) -> bool:
    x = layer.args["x"]
    return _image(x) is not None and _image(node) is not None and layer.args["groups"] == 1


def _image(node: Any) -> tuple[int, int, int] | None:
    """Channels, height and width of a node's float32 images `[N, C, H, W]`, if it has such."""
    value = node.meta.get("example_value") if isinstance(node, fx.Node) else None
    if not isinstance(value, Tensor) or value.dtype != torch.float32 or value.dim() != 4 or value.device.type != "cpu":
        return None
    shape = tuple(value.shape[1:])
    return shape if all(isinstance(size, int) for size in shape) else None  # type: ignore[return-value]


# --- what nodes compute ---------------------------------------------------------------------------------------------


def _arguments(node: fx.Node, *names: str) -> dict[str, Any]:
    return dict(zip(names, node.args, strict=False)) | dict(node.kwargs)


def _is_in_place(node: fx.Node) -> bool:
    """Whether a node changes one of its arguments."""
    name = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")
    if name.endswith("_") and not name.endswith("__"):
        return True
    return bool(_by_name(node).get("inplace")) or node.kwargs.get("out") is not None or node.target in _IN_PLACE


def _by_name(node: fx.Node) -> dict[str, Any]:
    """Arguments by name, of a function in Python; else those that were given by name."""
    if not inspect.isfunction(node.target):
        return dict(node.kwargs)
    try:
        return inspect.signature(node.target).bind(*node.args, **node.kwargs).arguments
    except TypeError:
        return dict(node.kwargs)


def _given(node: fx.Node) -> Any:
    """What a node computes with: its first argument."""
    return node.args[0] if node.args else node.kwargs.get("input")


def _relu(node: fx.Node) -> Reading | None:
    return "clamp", (_given(node),), (0.0, INFINITY)


def _hardtanh(node: fx.Node) -> Reading | None:
    given = _arguments(node, "input", "min_val", "max_val")
    return "clamp", (given["input"],), (float(given.get("min_val", -1.0)), float(given.get("max_val", 1.0)))


def _relu6(node: fx.Node) -> Reading | None:
    return "clamp", (_given(node),), (0.0, 6.0)


def _add(node: fx.Node) -> Reading | None:
    given = _arguments(node, "input", "other")
    if set(given) != {"input", "other"}:  # alpha
        return None
    first, second = given["input"], given["other"]
    return ("add", (first, second), ()) if _image(first) is not None and _image(first) == _image(second) else None


def _slice(node: fx.Node) -> Reading | None:
    """`x[:, :, ::2, ::2]`."""
    x, index = _given(node), node.args[1]
    whole = slice(None)
    if not isinstance(index, tuple) or len(index) != 4 or index[:2] != (whole, whole):
        return None
    rest = index[2:]
    steps = [part.step or 1 for part in rest if isinstance(part, slice) and part.start in (None, 0) and part.stop is None]
    return ("slice", (x,), tuple(steps)) if len(steps) == 2 and all(isinstance(step, int) for step in steps) else None


def _pad(node: fx.Node) -> Reading | None:
    """Channels of zeros."""
    given = _arguments(node, "input", "pad", "mode", "value")
    pad = tuple(given["pad"])
    zeros = given.get("mode", "constant") == "constant" and not given.get("value")
    if not zeros or len(pad) != 6 or not all(isinstance(size, int) for size in pad) or any(pad[:4]) or min(pad) < 0:
        return None
    return "pad", (given["input"],), (pad[4],)


def _max_pool(node: fx.Node) -> Reading | None:
    names = ("input", "kernel_size", "stride", "padding", "dilation", "ceil_mode", "return_indices")
    given = _arguments(node, *names)
    window = _pair(given["kernel_size"])
    stride, padding = _pair(given.get("stride") or window), _pair(given.get("padding", 0))
    if _pair(given.get("dilation", 1)) != (1, 1) or given.get("ceil_mode") or given.get("return_indices"):
        return None
    return "max_pool", (given["input"],), (window, stride, padding)


def _pair(value: Any) -> tuple[int, int]:
    return (value, value) if isinstance(value, int) else tuple(value) * (2 if len(value) == 1 else 1)


def _mean(node: fx.Node) -> Reading | None:
    given = _arguments(node, "input", "dim", "keepdim")
    dims = given.get("dim")
    if given.get("dtype") is not None or not isinstance(dims, (tuple, list)) or {dim % 4 for dim in dims} != {2, 3}:
        return None
    return "mean", (given["input"],), ()


def _global_pool(node: fx.Node) -> Reading | None:
    given = _arguments(node, "input", "output_size")
    return ("mean", (given["input"],), ()) if given["output_size"] in (1, (1, 1), [1, 1], (1,), [1]) else None


def _contiguous(node: fx.Node) -> Reading | None:
    """The same values in another layout, which counts only where they are returned."""
    return "layout", (_given(node),), ()


READERS: dict[Any, Callable[[fx.Node], Reading | None]] = {
    **dict.fromkeys((F.relu, torch.relu, torch.relu_, "relu", "relu_"), _relu),
    F.relu6: _relu6,
    F.hardtanh: _hardtanh,
    **dict.fromkeys((operator.add, operator.iadd, torch.add, "add", "add_"), _add),
    operator.getitem: _slice,
    **dict.fromkeys((F.pad, torch._C._nn.pad), _pad),
    **dict.fromkeys((F.max_pool2d, torch.max_pool2d), _max_pool),
    **dict.fromkeys((torch.mean, "mean"), _mean),
    F.adaptive_avg_pool2d: _global_pool,
    "contiguous": _contiguous,
}


# --- regions --------------------------------------------------------------------------------------------------------

Region = dict[fx.Node, Reading]


def _find(graph: fx.GraphModule, layers: dict[fx.Node, Layer]) -> list[Region] | None:
    """The regions of a graph; None if it changes tensors in place outside of them."""
    regions: list[Region] = []
    after: set[fx.Node] = set()  # what depends on the last region, outside of it
    for node in graph.graph.nodes:
        reading = _read(node, layers)
        current = regions[-1] if regions else {}
        if reading is not None and reading[0] != "conv" and not any(_continues(value, current) for value in reading[1]):
            reading = None
        if reading is not None and _is_in_place(node) and not _is_spare(reading[1][0], current):
            reading = None
        if reading is None:
            if node.op in ("call_function", "call_method") and _is_in_place(node):
                return None
            if any(value in after or value in current for value in node.all_input_nodes):
                after.add(node)
            continue
        if not current or any(value in after or (value in current and not _continues(value, current)) for value in reading[1]):
            if reading[0] != "conv":
                after.add(node)
                continue
            regions.append({})
            after = set()
        regions[-1][node] = reading
    return regions


def _is_spare(node: fx.Node, region: Region) -> bool:
    """Whether a value of a region may be changed: it is no view of another, and nothing else reads it."""
    return _continues(node, region) and region[node][0] not in ("slice", "layout") and len(node.users) == 1


def _continues(node: Any, region: Region) -> bool:
    """Whether a node's value is in a region and can be used there: a mean is only returned."""
    return node in region and region[node][0] != "mean"


def _read(node: fx.Node, layers: dict[fx.Node, Layer]) -> Reading | None:
    if node in layers:
        return "conv", (layers[node].args["x"],), ()
    reader = READERS.get(node.target) if node.op in ("call_function", "call_method") else None
    found = reader(node) if reader is not None and _image(_given(node)) is not None else None
    if found is None or any(_image(value) is None for value in found[1]):
        return None
    return found if found[0] == "mean" or _image(node) is not None else None


def _replace(module: fx.GraphModule, region: Region, layers: dict[fx.Node, Layer], replaced: dict[fx.Node, fx.Node]) -> Program:
    graph, numbers = Graph(), dict[fx.Node, int]()
    inputs = list(dict.fromkeys(value for _, values, _ in region.values() for value in values if value not in region))
    for node in inputs:
        shape = _image(node)
        assert shape is not None
        last = onednn.is_channels_last(node.meta["example_value"])
        numbers[node] = graph.add("input", (), shape, channels_last=last)
    for node, (op, values, rest) in region.items():
        given = [numbers[value] for value in values]
        if op == "conv":
            numbers[node] = graph.conv(given[0], _weight(layers[node]))
            continue
        if op == "layout":
            numbers[node] = given[0]
            continue
        shape = (graph.values[given[0]].shape[0], 1, 1) if op == "mean" else _image(node)
        assert shape is not None
        numbers[node] = graph.add(op, given, shape, numbers=rest)
    outputs = [node for node in region if any(user not in region for user in node.users)]
    for node in outputs:
        graph.outputs.append(numbers[node])
        value = node.meta["example_value"]
        graph.channels_last.append(value.dim() == 4 and onednn.is_channels_last(value))
    key, program = images.register(graph)
    replaced |= _rewire(module.graph, region, [replaced.get(node, node) for node in inputs], outputs, key)
    return program


def _weight(layer: Layer) -> ConvWeight:
    codes, scale, _ = layer.weight
    low, high = layer.limits
    geometry = (tuple(layer.args[name]) for name in ("stride", "padding", "dilation"))
    return ConvWeight(codes, scale, layer.bias, Grid(layer.step, layer.zero_point, low, high), *geometry)


def _rewire(graph: fx.Graph, region: Region, inputs: list[fx.Node], outputs: list[fx.Node], key: str) -> dict[fx.Node, fx.Node]:
    """One call in the place of a region, nodes may then be out of order; returns what its outputs became."""
    replaced = {}
    with graph.inserting_after(max(inputs)):
        call = graph.call_function(torch.ops.lightning_quant.images.default, (inputs, key))
    for index, node in reversed(list(enumerate(outputs))):
        with graph.inserting_after(call):
            found = graph.call_function(operator.getitem, (call, index))
        last = found
        if node.meta["example_value"].dim() == 2:
            with graph.inserting_after(found):
                last = graph.call_method("flatten", (found, 1))
        last.meta.update(node.meta)
        replaced[node] = last
        node.replace_all_uses_with(last, delete_user_cb=lambda user: user not in region)
    for node in reversed(region):
        graph.erase_node(node)
    return replaced
