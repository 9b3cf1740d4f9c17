"""What of a model is quantized at once: repeated blocks one after the other, and what lies before, between and behind them.

`units` walks through a prepared model in the order of execution. Each unit gets the inputs that the quantized units before it
produce, and its own float outputs where an algorithm wants them.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils._pytree import TreeSpec, tree_leaves

from lightning_quant.activations import Activations, Budget, Calls, Pool
from lightning_quant.calibration import Enough
from lightning_quant.layout import Chain, Layout, Run, autocast_of, calls_of, find_blocks, find_layout, within
from lightning_quant.nn import FakeModule
from lightning_quant.surgery import fake_modules

__all__ = ["Chain", "Layout", "Path", "Unit", "find_blocks", "find_layout", "units"]


@dataclass
class Unit:
    """A part of a model that is quantized at once.

    Args:
        name: of the block, or of what it consists of.
        root: the module that `calls` are made to; the whole model if there are none.
        modules: the fake modules to quantize, by their names in the model.
        run: passes all calibration data through the unit.
        calls: how the unit is called in each batch, None where only `run` is known.
        targets: the float outputs for the float inputs, one a batch.
        leaf: which of the flattened outputs counts.
        example: passes one batch through the model; None where `calls` tell how the unit is called.
    """

    name: str
    root: nn.Module
    modules: dict[str, FakeModule]
    run: Run
    calls: Calls | None = None
    targets: Activations | None = None
    leaf: int = 0
    example: Run | None = None
    statistics: dict[str, dict[str, Tensor]] = field(default_factory=dict)
    notes: dict[str, str] = field(default_factory=dict)
    # what algorithms remember from unit to unit
    shared: dict[Any, Any] = field(default_factory=dict)
    # whether a rounder is among the recipe's algorithms
    rounds: bool = False

    def note(self, name: str, text: str) -> None:
        """Something about a module that its user should know; shown by `lq.summary`."""
        self.notes[name] = "; ".join(filter(None, (self.notes.get(name), text)))

    def output(self, index: int, hidden: Tensor | None = None, calls: Calls | None = None) -> Tensor:
        """What the unit returns for a batch, or for another input in that batch's place.

        Args:
            calls: with the other arguments of these.
        """
        calls = calls or self.calls
        assert calls is not None
        args, kwargs = calls[index] if hidden is None else calls.with_hidden(index, hidden)
        with calls.context():
            out: Tensor = tree_leaves(self.root(*args, **kwargs))[self.leaf]
        return out

    def replay(self) -> None:
        """Pass all calibration data through the unit."""
        if self.calls is None:
            self.run()
        else:
            for index in range(len(self.calls)):
                self.output(index)


class _Captured:
    """Calls of a chain's blocks while calibration data passes."""

    def __init__(self, chain: Chain, budget: Budget, home: torch.device) -> None:
        self.chain, self.hidden, self.pool, self.home = chain, Activations(budget), Pool(budget), home
        self.slots = chain.slots
        self.rest: dict[str, list[list[Any]]] = {}
        self.specs: dict[str, list[TreeSpec]] = {}
        self.autocast: tuple[str, torch.dtype] | None = None

    def see(self, name: str, leaves: list[Any], spec: TreeSpec) -> None:
        if not self.slots:
            self.slots = tuple(slot for slot, leaf in enumerate(leaves) if isinstance(leaf, Tensor))[:1]
        if not self.slots or max(self.slots) >= len(leaves) or not isinstance(leaves[self.slots[0]], Tensor):
            raise ValueError(
                f"{name} is called with other arguments in a later batch than in the first: give batches of one form, or make "
                f"Recipe(blocks=[...]) name other modules"
            )
        # where a Trainer had moved the model elsewhere, replays run where it is in between
        leaves = [leaf.to(self.home) if isinstance(leaf, Tensor) else leaf for leaf in leaves]
        if name == self.chain.blocks[0]:
            hidden = leaves[self.slots[0]]
            self.hidden.append(hidden.clone())
            self.autocast = autocast_of(hidden)
        kept = [
            self.pool.put(leaf) if isinstance(leaf, Tensor) and slot not in self.slots else leaf for slot, leaf in enumerate(leaves)
        ]
        for slot in self.slots:
            kept[slot] = None
        self.rest.setdefault(name, []).append(kept)
        self.specs.setdefault(name, []).append(spec)

    def calls(self, name: str) -> Calls:
        source = name if self.chain.own else self.chain.blocks[0]
        rest = self.rest.get(source, [])
        if len(rest) != len(self.hidden):
            raise ValueError(
                f"{source} is called {len(rest)} times in {len(self.hidden)} batches, and once in the first: give batches that all "
                f"take one way through the model, or make Recipe(blocks=[...]) name other modules"
            )
        return Calls(self.hidden, rest, self.specs.get(source, []), self.slots, self.pool, self.autocast)

    def clear(self) -> None:
        self.hidden.clear()
        self.pool.clear()


def _capture(model: nn.Module, chains: list[Chain], run: Run, budget: Budget) -> list[_Captured]:
    """The inputs of chains, of the first block or, where they differ, of all; a batch ends with the last one wanted."""
    home = next(model.parameters()).device
    captured = [_Captured(chain, budget, home) for chain in chains]
    wanted = [(each, name) for each in captured for name in (each.chain.blocks if each.chain.own else each.chain.blocks[:1])]
    with contextlib.ExitStack() as stack:
        for each, name in wanted:

            def see(leaves: list[Any], spec: TreeSpec, each: _Captured = each, name: str = name) -> None:
                each.see(name, leaves, spec)
                if name == wanted[-1][1]:
                    raise Enough

            stack.enter_context(calls_of(model.get_submodule(name), see))
        run()
    return captured


def _until(model: nn.Module, name: str | None, run: Run) -> Run:
    """`run`, but a batch ends where the module of that name starts."""
    if name is None:
        return run

    def short() -> None:
        def stop(*_: Any) -> None:
            raise Enough

        handle = model.get_submodule(name).register_forward_pre_hook(stop)
        try:
            run()
        finally:
            handle.remove()

    return short


# entered while data passes through a unit; None: no data need pass
Collect = Callable[[Unit], contextlib.AbstractContextManager[Any] | None]
# which inputs a unit is replayed with: those that quantized units produce, float ones, or both
Path = Literal["quantized", "float", "both"]


def units(
    model: nn.Module, run: Run, layout: Layout, budget: Budget, *, path: Path, collect: Collect, example: Run | None = None
) -> Iterator[Unit]:
    """The parts of a prepared model in the order of execution.

    Args:
        model: prepared, in eval mode, not quantizing.
        run: passes all calibration data through `model`, the same in every pass.
        path: `"quantized"`: a unit's calls have what the quantized ones before it produce; `"float"`: what float ones do, which
            takes one pass less; `"both"`: quantized inputs, and targets from float ones. Then modules outside of blocks come
            one by one, with calls and targets.
        collect: called with each unit before data passes through it, and entered while they do for the first time, with float
            inputs if there are any.
        example: passes one batch through `model`, for units without calls.

    Yields:
        units; when the next one is asked for, the weights of the last one must be on their grids.
    """
    fakes, single = fake_modules(model), path == "both"
    floats: list[_Captured | None] = [None] * len(layout.chains)
    if path == "both" and layout.chains and (len(layout.chains) > 1 or layout.others[0]):
        floats = list(_capture(model, layout.chains, run, budget))
    for index, names in enumerate(layout.others):
        chain = layout.chains[index] if index < len(layout.chains) else None
        short = _until(model, chain.blocks[0] if chain else None, run)
        for group in [[name] for name in names] if single else [names] if names else []:
            inside = {name: fakes.pop(name) for name in group}
            if single:
                unit, captured = _single(model, group[0], inside[group[0]], short, budget)
            else:
                unit, captured = Unit(_outside(chain), model, inside, short, example=example), None
            if (context := collect(unit)) is not None:
                with context:
                    unit.replay()
            yield unit
            for kept in (captured, unit.targets):
                if kept is not None:
                    kept.clear()
            _start_quantizing(inside, path)
        if chain is not None:
            yield from _blocks(model, chain, fakes, run, budget, path, collect, floats[index])


def _outside(chain: Chain | None) -> str:
    """The name of what lies before a chain, or behind all."""
    return f"before {chain.blocks[0]}" if chain else "the rest"


def _start_quantizing(modules: dict[str, FakeModule], path: Path) -> None:
    """From here on these run quantized."""
    for module in modules.values():
        for _, part in module.quantizers():
            part.quantizing = path != "float" and not (part.is_weight and module.settled)


def _single(model: nn.Module, name: str, module: FakeModule, run: Run, budget: Budget) -> tuple[Unit, _Captured]:
    """A module on its own, with its calls and what it returns in float."""
    captured = _capture(model, [Chain([name])], run, budget)[0]
    calls, targets = captured.calls(name), Activations(budget)
    unit = Unit(name, module, {name: module}, run, calls, targets)
    for index in range(len(calls)):
        targets.append(unit.output(index))
    return unit, captured


def _blocks(
    model: nn.Module,
    chain: Chain,
    fakes: dict[str, FakeModule],
    run: Run,
    budget: Budget,
    path: Path,
    collect: Collect,
    floats: _Captured | None,
) -> Iterator[Unit]:
    captured = _capture(model, [chain], run, budget)[0]
    hidden, targets = captured.hidden, None
    if path != "quantized":
        targets = Activations(budget) if floats is None else floats.hidden
        for value in hidden if floats is None else ():
            targets.append(value)
    for name in chain.blocks:
        inside = {full: fake for full, fake in fakes.items() if within(full, [name])}
        unit = Unit(name, model.get_submodule(name), inside, run, captured.calls(name), targets, chain.leaf)
        context = collect(unit) if inside else None
        with context or contextlib.nullcontext():
            if targets is not None:
                float_calls = (floats or captured).calls(name)
                for index in range(len(targets)):
                    targets[index] = unit.output(index, targets[index], float_calls)
            elif context is not None:
                unit.replay()
        if inside:
            yield unit
        _start_quantizing(inside, path)
        for full in inside:
            del fakes[full]
        if name != chain.blocks[-1]:
            for index in range(len(hidden)):
                hidden[index] = unit.output(index) if path != "float" or targets is None else targets[index]
    for kept in (captured, targets, floats):
        if kept is not None:
            kept.clear()
