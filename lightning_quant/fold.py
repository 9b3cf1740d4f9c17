"""Which BatchNorm follows which convolution or linear layer, and in what order modules run. Found by tracing, never by name."""

from __future__ import annotations

import contextlib
import sys
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.fx
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd
from torch.overrides import TorchFunctionMode

from lightning_quant.nn.folding import fold_bias, norm_scale

Pair = tuple[str, str]


@dataclass
class Flow:
    """What tracing found.

    Args:
        pairs: (module, BatchNorm) by qualified name, the BatchNorm reading the module's output and nothing else doing so.
        order: names of the leaf modules in the order in which they first run; empty if nothing could be traced or run.
        reasons: BatchNorm without a pair -> why.
    """

    pairs: list[Pair] = field(default_factory=list)
    order: list[str] = field(default_factory=list)
    reasons: dict[str, str] = field(default_factory=dict)


def _fits(producer: nn.Module, norm: nn.Module) -> bool:
    if not isinstance(norm, _BatchNorm) or norm.running_var is None:
        return False
    if type(norm).forward not in (_BatchNorm.forward, nn.SyncBatchNorm.forward):
        return False  # does more than normalise
    if norm._forward_hooks or norm._forward_pre_hooks or producer._forward_hooks:
        return False  # a hook may change, or keep, what folding does away with
    if isinstance(producer, _ConvNd):
        return producer.out_channels == norm.num_features
    return isinstance(producer, nn.Linear) and producer.out_features == norm.num_features


def _norms(model: nn.Module) -> dict[str, nn.Module]:
    return {name: module for name, module in model.named_modules() if isinstance(module, _BatchNorm)}


@contextlib.contextmanager
def _restored(model: nn.Module) -> Iterator[None]:
    """Undo what a forward pass writes into modules: a traced one may leave proxies in attributes."""
    before = [(module, dict(module.__dict__)) for module in model.modules()]
    try:
        yield
    finally:
        for module, attributes in before:
            module.__dict__.clear()
            module.__dict__.update(attributes)


class _Tracer(torch.fx.Tracer):
    """Traces through compiled modules as they were written."""

    def call_module(self, m: nn.Module, forward: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        inner = getattr(m, "_orig_mod", None)
        if isinstance(inner, nn.Module):
            return inner(*args, **kwargs)
        return super().call_module(m, m._call_impl if m._compiled_call_impl is not None else forward, args, kwargs)


def _trace(model: nn.Module, prefix: str, flow: Flow) -> bool:
    """Read pairs and order off the graph of `model`, or of the largest submodules that trace. False if `model` did not."""
    try:
        with _restored(model):
            model.eval()
            graph = _Tracer().trace(model)
    except Exception:  # any code may run in a user's forward; the caller tries the next way
        for name, child in model.named_children():
            if any(child.children()):
                _trace(child, f"{prefix}{name}.", flow)
        return False
    modules = dict(model.named_modules())
    calls = Counter(node.target for node in graph.nodes if node.op == "call_module")
    read = {node.target for node in graph.nodes if node.op == "get_attr"}  # parameters used beside their module
    for node in graph.nodes:
        if node.op != "call_module":
            continue
        name = prefix + node.target
        if name not in flow.order:
            flow.order.append(name)
        norm = modules[node.target]
        source = node.args[0] if node.args else None
        if not isinstance(norm, _BatchNorm) or not isinstance(source, torch.fx.Node) or source.op != "call_module":
            continue
        alone = len(source.users) == 1 and calls[source.target] == calls[node.target] == 1
        alone = alone and f"{source.target}.weight" not in read
        if alone and _fits(modules[source.target], norm):
            flow.pairs.append((f"{prefix}{source.target}", name))
    return True


class _Uses(TorchFunctionMode):
    """Counts the torch functions that read each watched tensor. Holds the tensors, so that ids stay unique."""

    def __init__(self) -> None:
        self.watched: dict[int, Tensor] = {}
        self.counts: Counter[int] = Counter()

    def watch(self, tensor: Tensor) -> None:
        self.watched[id(tensor)] = tensor

    def __torch_function__(self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = getattr(func, "__name__", "")
        if name not in ("__get__", "dim", "size"):  # reading a shape is no use of the values
            flat = torch.utils._pytree.tree_leaves((args, kwargs or {}))
            for value in {id(value): value for value in flat if isinstance(value, Tensor)}.values():
                if id(value) in self.watched:
                    self.counts[id(value)] += 1
        return func(*args, **(kwargs or {}))


@torch.no_grad()
def _run(model: nn.Module, call: Callable[[], Any]) -> Flow:
    """Match outputs to inputs in a real forward pass."""
    names = {module: name for name, module in model.named_modules()}
    flow, uses = Flow(), _Uses()
    produced: dict[int, nn.Module] = {}
    found: list[tuple[nn.Module, nn.Module, int]] = []
    calls: Counter[nn.Module] = Counter()

    def before(module: nn.Module, args: tuple[Any, ...]) -> None:
        calls[module] += 1
        if names[module] not in flow.order:
            flow.order.append(names[module])
        if isinstance(module, _BatchNorm) and args and id(args[0]) in produced:
            found.append((produced[id(args[0])], module, id(args[0])))

    def after(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        if isinstance(module, (_ConvNd, nn.Linear)) and isinstance(output, Tensor):
            uses.watch(output)
            produced[id(output)] = module

    leaves = [
        module
        for module in model.modules()
        if not any(True for _ in module.children()) or isinstance(module, nn.MultiheadAttention)
    ]
    handles = [module.register_forward_pre_hook(before) for module in leaves]
    handles += [module.register_forward_hook(after) for module in leaves]
    modes = [(module, module.training) for module in model.modules()]
    for module in leaves:
        if isinstance(module, (_ConvNd, nn.Linear)):
            uses.watch(module.weight)
    try:
        model.eval()
        with uses:
            returned = call()
    finally:
        for handle in handles:
            handle.remove()
        for module, training in modes:
            module.training = training
    for leaf in torch.utils._pytree.tree_leaves(returned):
        uses.counts[id(leaf)] += 1
    for producer, norm, key in found:
        once = calls[producer] == calls[norm] == 1 and uses.counts[key] == 1 and uses.counts[id(producer.weight)] <= 1
        # BatchNorm1d normalises dimension 1: a linear layer's features only if its output has two
        flat = not isinstance(producer, nn.Linear) or uses.watched[key].dim() == 2
        if once and flat and _fits(producer, norm):
            flow.pairs.append((names[producer], names[norm]))
    return flow


def _try_run(model: nn.Module, call: Callable[[], Any]) -> Flow | None:
    """`_run`, or None with a warning: an example is a convenience and must not end a training."""
    try:
        with _restored(model):
            return _run(model, call)
    except Exception as error:
        warnings.warn(
            f"no example could be run to find which BatchNorms can be folded and in what order layers run "
            f"({type(error).__name__}: {error}); set example_input_array, or Recipe(fold=[...])",
            stacklevel=3,
        )
        return None


def _check_pairs(model: nn.Module, pairs: Iterable[Sequence[str]]) -> list[Pair]:
    modules = dict(model.named_modules())
    checked: list[Pair] = []
    for pair in pairs:
        if len(pair) != 2 or any(name not in modules for name in pair):
            missing = [name for name in pair if name not in modules]
            raise ValueError(f"fold pair {tuple(pair)!r}: needs the names of a module and of its BatchNorm; unknown: {missing}")
        producer, norm = pair
        if not _fits(modules[producer], modules[norm]):
            raise ValueError(
                f"fold pair ({producer!r}, {norm!r}): {type(modules[producer]).__name__} and {type(modules[norm]).__name__} do "
                f"not fit; it takes a convolution or linear layer and a BatchNorm of as many channels with running statistics"
            )
        checked.append((producer, norm))
    return checked


def find_flow(model: nn.Module, call: Callable[[], Any] | None = None, pairs: Iterable[Sequence[str]] | None = None) -> Flow:
    """Find the BatchNorms that can be folded, and the order of execution.

    The module is traced symbolically (its largest submodules that trace, if it does not as a whole); where BatchNorms are
    left over, or follow a linear layer, `call` runs it for real and outputs are matched to inputs.

    Args:
        model: a float model; it is left as it was.
        call: runs one forward pass of `model` on an example, in eval and without gradients.
        pairs: (module, BatchNorm) names that override what would be found.

    Raises:
        ValueError: a pair of `pairs` does not exist or does not fit.

    Example:
        >>> find_flow(nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.ReLU())).pairs
        [('0', '1')]
    """
    with eagerly():
        return _find_flow(model, call, pairs)


def eagerly() -> contextlib.AbstractContextManager[Any]:
    """Compiled modules run as they were written: then they can be traced, and what calls them can be watched."""
    # where nothing was compiled, the compiler is not even imported
    return torch.compiler.set_stance("force_eager") if "torch._dynamo" in sys.modules else contextlib.nullcontext()


def _find_flow(model: nn.Module, call: Callable[[], Any] | None, pairs: Iterable[Sequence[str]] | None) -> Flow:
    norms = _norms(model)
    flow = Flow()
    traced = _trace(model, "", flow)
    modules = dict(model.named_modules())
    left = [name for name in norms if name not in {norm for _, norm in flow.pairs}]
    # a graph does not tell whether a linear layer's features are the dimension that BatchNorm1d normalises
    flat = {norm for producer, norm in flow.pairs if isinstance(modules[producer], nn.Linear)}
    ran = _try_run(model, call) if (left or flat or not traced) and call is not None else None
    if ran is not None:
        # a real run sees every use of a tensor; where it saw the module it has the last word
        flow.pairs = ran.pairs + [pair for pair in flow.pairs if traced and not set(pair) & set(ran.order)]
        flow.order = ran.order or flow.order
    else:
        # of a part that traces alone nobody knows whether its parent calls it as a whole
        unsure = flat if traced else set(norms)
        flow.pairs = [pair for pair in flow.pairs if pair[1] not in unsure]
    if pairs is not None:
        flow.pairs = _check_pairs(model, pairs)
    paired = {norm for _, norm in flow.pairs}
    for name, norm in norms.items():
        if name not in paired:
            flow.reasons[name] = _NEEDS_EXAMPLE if name in flat and ran is None else _why_not(name, norm, flow, pairs is not None)
    return flow


_NEEDS_EXAMPLE = (
    "follows a linear layer, and only an example shows whether it normalises that layer's features; give data, set "
    "example_input_array, or pass the pair"
)


def _why_not(name: str, norm: nn.Module, flow: Flow, listed: bool) -> str:
    if listed:
        return "not in the list of pairs given"
    if norm.running_var is None:
        return "tracks no running statistics"
    if flow.order and name in flow.order:
        return "does not follow a convolution or linear layer that feeds it alone"
    return "not reached by tracing or by an example; set example_input_array, or pass the pairs"


@torch.no_grad()
def fold_norm(module: nn.Module, norm: nn.Module) -> None:
    """Fold a BatchNorm's running statistics into the float weight and bias of the layer before it, in place.

    Args:
        module: a convolution, transposed convolution or linear layer.
        norm: the BatchNorm; the caller takes it out of the model.
    """
    assert isinstance(norm, _BatchNorm)
    scale = norm_scale(norm)
    weight = module.weight
    assert isinstance(weight, nn.Parameter)
    if isinstance(module, _ConvTransposeNd):
        split = weight.unflatten(0, (module.groups, -1)).float()
        folded = (split * scale.view(module.groups, 1, -1, *[1] * (weight.dim() - 2))).flatten(0, 1)
    else:
        folded = weight.float() * scale.view(-1, *[1] * (weight.dim() - 1))
    bias = fold_bias(norm, module.bias)  # type: ignore[arg-type]
    weight.data = folded.to(weight.dtype)  # another model may share the storage
    if module.bias is None:
        module.register_parameter("bias", nn.Parameter(bias.to(weight.dtype)))
    else:
        module.bias.data = bias.to(weight.dtype)
