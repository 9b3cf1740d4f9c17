"""`torch.compile` for packed models: int8 layers with static inputs keep int8 between them (oneDNN, CPU).

In the graph that torch.compile captures, the packed operators of such layers are replaced by quantize and dequantize operators
around a float layer, with the weights as constants. Those are what Inductor's oneDNN passes know: a layer becomes one int8
operator that applies ReLU and the next layer's quantization to what it sums, and no float tensor is written between the two. A
residual addition, whose other operand stays in float32, is done by that operator, too. What cannot be replaced runs as it is.
"""

from __future__ import annotations

import copy
import importlib
import operator
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch._subclasses import FakeTensor

from lightning_quant.captured import Layer, read
from lightning_quant.kernels import run_linear
from lightning_quant.kernels.images import run_images
from lightning_quant.regions import fuse_regions

M = TypeVar("M", bound=nn.Module)

# realize_reads_threshold: what a residual addition reads is written once, instead of read again by every later one
DEFAULTS: dict[str, Any] = {"freezing": True, "realize_reads_threshold": 1}
_CONVS = {3: F.conv1d, 4: F.conv2d}


def compile(module: M, *, dynamic: bool | None = None, fullgraph: bool = False, **options: Any) -> M:
    """`torch.compile` with what makes packed models fast: constant weights, and int8 from one static int8 layer to the next.

    That takes the place of the layers' own kernels under `torch.no_grad()` or `torch.inference_mode()`; with gradients, the layers
    run as they do in a plain `torch.compile`. Weights are constants of the compiled code: compile again after changing them.

    Args:
        module: packed, by `lq.quantize` or `lq.load_quantized`; stays as it is.
        dynamic, fullgraph: as `torch.compile` has them.
        options: Inductor's (`torch._inductor.config`), such as `max_autotune=True` or `cpp_wrapper=True`, over the defaults
            `freezing=True`, `realize_reads_threshold=1`.

    Returns:
        what `torch.compile` returns; the first call for each input shape takes seconds.

    Raises:
        ValueError: an option that Inductor does not have.

    Example:
        >>> import lightning_quant as lq
        >>> net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3))
        >>> fast = lq.compile(lq.quantize(net, "w8a8", [torch.randn(2, 3, 8, 8)]))  # compiles at the first call
        >>> isinstance(fast, nn.Module)
        True
    """
    import torch._inductor.config as inductor

    known = inductor.get_config_copy()
    unknown = [name for name in options if name not in known]
    if unknown:
        raise ValueError(f"torch._inductor.config has no option {', '.join(map(repr, unknown))}")
    return torch.compile(module, backend=_Backend({**DEFAULTS, **options}), dynamic=dynamic, fullgraph=fullgraph)  # type: ignore[return-value]


class _Backend:
    """A backend for `torch.compile`: lowers packed layers, and hands the graph to Inductor."""

    def __init__(self, options: dict[str, Any]) -> None:
        self.options = options

    def __call__(self, graph: fx.GraphModule, inputs: Sequence[Any]) -> Callable[..., Any]:
        import torch._inductor.config as inductor
        from torch._inductor.compile_fx import compile_fx

        run: Any = compile_fx  # its type also tells of what it returns for ahead-of-time compilation

        if torch.is_grad_enabled() or not self.options["freezing"]:
            return run(graph, inputs, config_patches={**self.options, "freezing": False})
        frozen, kept = freeze(graph, inputs)
        programs = fuse_regions(frozen)
        if programs and call_kernels(frozen):
            compiled: Callable[..., Any] = frozen.forward  # nothing is left to generate code for
        else:
            options = dict(self.options)
            if lower(frozen):
                given = inductor.post_grad_custom_pre_pass
                options.setdefault("post_grad_custom_pre_pass", _in_place_additions() if given is None else given)
            compiled = run(frozen, [inputs[index] for index in kept], config_patches=options)

        def call(*args: Any) -> Any:
            assert programs is not None  # the operators find them as long as they are held here
            return compiled(*[args[index] for index in kept])

        return call


def call_kernels(graph: fx.GraphModule) -> bool:
    """Call the kernels past torch's dispatcher, in place, if the graph has little else.

    Returns:
        whether it has.
    """
    direct = {torch.ops.lightning_quant.images.default: run_images, torch.ops.lightning_quant.linear.default: run_linear}
    calls = [node for node in graph.graph.nodes if node.op in ("call_function", "call_method", "call_module")]
    if not all(node.target in direct or node.target in (operator.getitem, "flatten", torch.flatten) for node in calls):
        return False
    for node in calls:
        node.target = direct.get(node.target, node.target)
    graph.recompile()
    return True


def freeze(graph: fx.GraphModule, inputs: Sequence[Any]) -> tuple[fx.GraphModule, list[int]]:
    """A copy whose parameters are attributes: Inductor takes those for constants, not the inputs that torch.compile makes of them.

    Args:
        inputs: the values of the placeholders.

    Returns:
        the copy, and the indices of the inputs that it still has.
    """
    frozen, kept = fx.GraphModule(graph, copy.deepcopy(graph.graph)), []
    places = [node for node in frozen.graph.nodes if node.op == "placeholder"]
    for index, (node, value) in enumerate(zip(places, inputs, strict=True)):
        if not isinstance(value, nn.Parameter) or isinstance(value, FakeTensor):
            kept.append(index)
            continue
        name = f"_frozen_{node.name}"
        frozen.register_parameter(name, value)
        with frozen.graph.inserting_before(node):
            constant = frozen.graph.get_attr(name)
        constant.meta.update(node.meta)
        node.replace_all_uses_with(constant)
        frozen.graph.erase_node(node)
    frozen.recompile()
    return frozen, kept


# --- packed operators -> quantize, dequantize, float layer ------------------------------------------------------------


def lower(graph: fx.GraphModule) -> int:
    """Replace the packed operators whose parameters are attributes of the graph, in place, where a float layer can stand for them.

    Returns:
        how many were replaced.
    """
    importlib.import_module("torch.ao.quantization.fx._decomposed")  # registers the operators
    layers = [(node, read(node, graph, "onednn")) for node in graph.graph.nodes if node.op == "call_function"]
    found = [(node, layer) for node, layer in layers if layer is not None]
    for node, layer in found:
        _replace(graph, node, layer)
    graph.graph.lint()
    graph.recompile()
    return len(found)


def _replace(module: fx.GraphModule, node: fx.Node, layer: Layer) -> None:
    """Put quantize, dequantize and the float layer in the node's place."""
    graph, args, ops = module.graph, layer.args, torch.ops.quantized_decomposed
    call = graph.call_function
    names = [f"_{kind}_of_{node.name}" for kind in ("codes", "scale", "zero_point")]
    for name, value in zip(names, layer.weight, strict=True):
        module.register_buffer(name, value)
    x, bias, dtype = args["x"], args["bias"], args["x"].meta["example_value"].dtype
    grid = (layer.step, layer.zero_point, 0, 255, torch.uint8)
    low, high = layer.limits
    with graph.inserting_before(node):
        if dtype != torch.float32:
            x = graph.call_method("to", (x, torch.float32))
        codes = call(ops.quantize_per_tensor.default, (x, *grid))
        if (low, high) != (0, 255):
            # on the codes: Inductor's fused quantization knows no narrower range, and takes a clamp of codes for one of floats
            for kind, bound, name in ((torch.maximum, low, "low"), (torch.minimum, high, "high")):
                module.register_buffer(f"_{name}_of_{node.name}", torch.tensor(bound, dtype=torch.uint8))
                codes = call(kind, (codes, graph.get_attr(f"_{name}_of_{node.name}")))
        x = call(ops.dequantize_per_tensor.default, (codes, *grid))
        weight = call(ops.dequantize_per_channel.default, (*map(graph.get_attr, names), 0, -128, 127, torch.int8))
        if bias is not None:
            bias = graph.call_method("to", (bias, torch.float32))
        if layer.op == "linear":
            out = call(F.linear, (x, weight, bias))
        else:
            geometry = (args[name] for name in ("stride", "padding", "dilation", "groups"))
            out = call(_CONVS[len(layer.shape)], (x, weight, bias, *geometry))
        if dtype != torch.float32:
            out = graph.call_method("to", (out, dtype))
    out.meta.update(node.meta)
    node.replace_all_uses_with(out)
    graph.erase_node(node)


# --- int8 convolution + residual ------------------------------------------------------------------------------------


def _in_place_additions() -> Any:
    """Inductor's pass of ours; the class is made here, as its base is imported with Inductor."""
    from torch._inductor.custom_graph_pass import CustomGraphPass, get_hash_for_files

    class InPlaceAdditions(CustomGraphPass):
        def __call__(self, graph: fx.Graph) -> None:
            fuse_additions(graph)

        def uuid(self) -> Any:
            return get_hash_for_files((__file__,))

    return InPlaceAdditions()


def fuse_additions(graph: fx.Graph) -> int:
    """`relu(qconv(...) + y)` and `qconv(...) + y` in float32 -> an operator that adds to `y`, in place, if nobody reads `y` later.

    Inductor does so itself only where `y` was int8 before.

    Args:
        graph: of ATen operators, after Inductor's own fusions.

    Returns:
        how many additions were fused.
    """
    aten, onednn_ops = torch.ops.aten, torch.ops.onednn
    owners = (onednn_ops.qconv_pointwise.default, onednn_ops.qconv2d_pointwise.binary, aten.relu.default, aten.add.Tensor)
    order = {node: index for index, node in enumerate(graph.nodes)}
    fused = 0
    for node in [node for node in graph.nodes if node.target is aten.add.Tensor]:
        pair = _operands(node)  # read now: the operand may have been replaced
        if pair is None:
            continue
        conv, other = pair
        if other.target not in owners or any(user is not node and order[user] > order[node] for user in other.users):
            continue
        users = list(node.users)
        last = users[0] if len(users) == 1 and users[0].target is aten.relu.default else node
        x, weight, bias, geometry = conv.args[:3], conv.args[3:6], conv.args[6], conv.args[7:11]
        post: Any = (1.0, 0, torch.float32, 1.0, 0, "sum", 1.0, "none" if last is node else "relu", [], "")
        with graph.inserting_before(node):
            new = graph.call_function(onednn_ops.qconv2d_pointwise.binary, (*x, *weight, other, bias, *geometry, *post))
        new.meta.update(last.meta)
        order[new] = order[node]
        last.replace_all_uses_with(new)
        for old in dict.fromkeys((last, node, conv)):
            graph.erase_node(old)
        fused += 1
    return fused


def _operands(node: fx.Node) -> tuple[fx.Node, fx.Node] | None:
    """The int8 convolution with float32 output, read nowhere else, and the other tensor like it that a sum is of."""
    if node.kwargs or len(node.args) != 2:
        return None
    for conv, other in (node.args, node.args[::-1]):
        if not isinstance(conv, fx.Node) or not isinstance(other, fx.Node) or conv is other or len(conv.users) != 1:
            continue
        if conv.target is not torch.ops.onednn.qconv_pointwise.default or conv.args[13:15] != (torch.float32, "none"):
            continue
        mine, its = conv.meta.get("val"), other.meta.get("val")
        if not isinstance(mine, Tensor) or not isinstance(its, Tensor) or its.dtype != torch.float32:
            continue
        if mine.dim() == 4 and mine.shape == its.shape:
            return conv, other
    return None
