"""Block-sequential passes: a model's repeated blocks one after the other, each with the inputs that quantized blocks produce."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_map

from lightning_quant.calibration import Enough, set_flags
from lightning_quant.nn import FakeModule
from lightning_quant.surgery import fake_modules

# the arguments of one call: positional, keyword
Call = tuple[tuple[Any, ...], dict[str, Any]]
# visit(modules, replay): replay() passes all calibration data through the fake modules given, by their names in the model
Visit = Callable[[dict[str, FakeModule], Callable[[], None]], None]


def find_blocks(model: nn.Module) -> list[str]:
    """The names of the repeated blocks: the children of the `ModuleList` or `Sequential` of one class that holds most parameters.

    Returns:
        names in the order of execution, or none if there are fewer than two such blocks.

    Example:
        >>> layers = [nn.TransformerEncoderLayer(8, 2) for _ in range(3)]
        >>> find_blocks(nn.ModuleDict({"embed": nn.Embedding(4, 8), "layers": nn.ModuleList(layers)}))
        ['layers.0', 'layers.1', 'layers.2']
    """
    best: list[str] = []
    most = 0
    for name, module in model.named_modules():
        children = list(module.named_children())
        if not isinstance(module, (nn.ModuleList, nn.Sequential)) or len(children) < 2:
            continue
        if len({type(child) for _, child in children}) > 1 or not any(True for _ in children[0][1].children()):
            continue
        size = sum(parameter.numel() for parameter in module.parameters())
        if size > most:
            best, most = [f"{name}.{child}" if name else child for child, _ in children], size
    return best


def _without_cache(value: Any) -> Any:
    """A key-value cache would grow with every replay; a whole sequence needs none."""
    return None if any(cls.__name__ == "Cache" for cls in type(value).__mro__) else value


@contextlib.contextmanager
def _calls(module: nn.Module, seen: Callable[[Call], None]) -> Iterator[None]:
    """Tell of every call of a module before it runs."""

    def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        seen((tuple(_without_cache(value) for value in args), {key: _without_cache(value) for key, value in kwargs.items()}))

    handle = module.register_forward_pre_hook(hook, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()


def _first_calls(model: nn.Module, names: list[str], run: Callable[[], None]) -> list[list[Call]]:
    """How each block is called for the first batch."""
    found: list[list[Call]] = [[] for _ in names]

    def see(index: int, call: Call) -> None:
        if index == 0 and found[0]:
            raise Enough
        found[index].append(call)

    with contextlib.ExitStack() as stack:
        for index, name in enumerate(names):
            stack.enter_context(_calls(model.get_submodule(name), lambda call, index=index: see(index, call)))  # type: ignore[misc]
        run()
    return found


def _same(one: Any, two: Any) -> bool:
    if isinstance(one, Tensor) and isinstance(two, Tensor):
        return one is two or (one.shape == two.shape and one.dtype == two.dtype and torch.equal(one, two))
    try:
        return one is two or bool(one == two)
    except (TypeError, ValueError, RuntimeError):
        return False


def _chained(calls: list[list[Call]]) -> bool:
    """Whether blocks differ in their first positional argument only: then one's output is the next one's input."""
    if any(len(block) != 1 or not block[0][0] or not isinstance(block[0][0][0], Tensor) for block in calls):
        return False
    rest = [tree_flatten((args[1:], kwargs)) for ((args, kwargs),) in calls]
    first, spec = rest[0]
    return all(
        other == spec
        and len(leaves) == len(first)
        and all(map(_same, leaves, first))
        and calls[index][0][0][0].shape == calls[0][0][0][0].shape
        for index, (leaves, other) in enumerate(rest)
    )


def walk(model: nn.Module, run: Callable[[], None], visit: Visit) -> None:
    """Visit every repeated block, then what lies outside of them, quantized parts feeding those that follow.

    The model must be prepared and in eval mode. A model without blocks, or whose blocks take from each other more than one
    tensor, is visited as a whole.

    Args:
        run: passes the calibration data through `model`, batch by batch, and ends a batch at `Enough`.
        visit: quantizes the fake modules that it is given, each once. After it they run with fake quantization on.
    """
    names, modules = find_blocks(model), fake_modules(model)
    if not names or not _chained(_first_calls(model, names, run)):
        visit(modules, run)
        return
    calls: list[Call] = []

    def capture(call: Call) -> None:
        calls.append(tree_map(lambda value: value.detach() if isinstance(value, Tensor) else value, call))
        raise Enough

    with _calls(model.get_submodule(names[0]), capture):
        run()
    for name in names:
        block = model.get_submodule(name)

        def replay(block: nn.Module = block) -> None:
            for args, kwargs in calls:
                block(*args, **kwargs)

        inside = {full: modules.pop(full) for full in list(modules) if full == name or full.startswith(f"{name}.")}
        if inside:
            visit(inside, replay)
        set_flags(block, quantizing=True)
        if name != names[-1]:
            for index, (args, kwargs) in enumerate(calls):
                leaves, _ = tree_flatten(block(*args, **kwargs))
                calls[index] = ((leaves[0], *args[1:]), kwargs)
    calls.clear()
    if modules:
        visit(modules, run)
    set_flags(model, quantizing=False)
