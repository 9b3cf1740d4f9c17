"""Which blocks of a model form chains, and what lies before, between and behind them: seen in one batch, never known by name."""

from __future__ import annotations

import contextlib
import functools
import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils._pytree import TreeSpec, tree_leaves, tree_unflatten

from lightning_quant.activations import flatten_call, same_value
from lightning_quant.calibration import has_ranks
from lightning_quant.recipe import matches
from lightning_quant.surgery import fake_modules

Run = Callable[[], None]


def find_blocks(model: nn.Module, patterns: Sequence[str] | None = None) -> list[list[str]]:
    """The names of repeated blocks, one list for each chain of them.

    Args:
        patterns: each names the blocks of one chain; by default runs of two and more neighbours of one class, that have
            submodules, in a `ModuleList` or `Sequential`.

    Raises:
        ValueError: a pattern names fewer than two modules, or blocks of another pattern.

    Example:
        >>> layers = [nn.TransformerEncoderLayer(8, 2) for _ in range(3)]
        >>> find_blocks(nn.ModuleDict({"embed": nn.Embedding(4, 8), "layers": nn.ModuleList(layers)}))
        [['layers.0', 'layers.1', 'layers.2']]
    """
    if patterns is not None:
        return _named_blocks(model, patterns)
    found: list[list[str]] = []
    for name, module in model.named_modules():
        if not isinstance(module, (nn.ModuleList, nn.Sequential)) or any(within(name, chain) for chain in found):
            continue
        for _, group in itertools.groupby(module.named_children(), key=lambda child: type(child[1])):
            run = list(group)
            if len(run) > 1 and any(True for _ in run[0][1].children()):
                found.append([f"{name}.{child}" if name else child for child, _ in run])
    return found


def _named_blocks(model: nn.Module, patterns: Sequence[str]) -> list[list[str]]:
    chains: list[list[str]] = []
    for pattern in patterns:
        chain: list[str] = []
        for name, _ in model.named_modules():
            if name and matches(pattern, name) and not within(name, chain):  # "layers.*" names what is in a layer, too
                chain.append(name)
        if len(chain) < 2:
            raise ValueError(f"Recipe blocks: {pattern!r} names {len(chain)} modules, and a chain has two or more")
        for other in chains:
            if shared := [name for name in chain if within(name, other) or any(within(each, [name]) for each in other)]:
                raise ValueError(
                    f"Recipe blocks: {pattern!r} names {shared[0]!r}, which is in a block of another pattern, or holds one"
                )
        chains.append(chain)
    return chains


def within(name: str, blocks: Sequence[str]) -> bool:
    """Whether a module is one of some blocks, or in one."""
    return any(name == block or name.startswith(f"{block}.") for block in blocks)


@dataclass
class Chain:
    """Blocks of which each takes what the one before it returns.

    Args:
        slots: which of a call's flattened arguments that is; without any, the first tensor.
        leaf: which of the flattened outputs.
        own: whether the other arguments differ between blocks, as masks of local and global attention do.
        size: bytes of what the blocks hand on in one batch.
    """

    blocks: list[str]
    slots: tuple[int, ...] = ()
    leaf: int = 0
    own: bool = False
    size: int = 0


@contextlib.contextmanager
def calls_of(module: nn.Module, seen: Callable[[list[Any], TreeSpec], None]) -> Iterator[None]:
    """Tell of every call of a module before it runs."""
    handle = module.register_forward_pre_hook(lambda _, args, kwargs: seen(*flatten_call(args, kwargs)), with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()


def _copies(leaves: list[Any]) -> list[Any]:
    """What is called later may write into a tensor."""
    return [leaf.clone() if isinstance(leaf, Tensor) else leaf for leaf in leaves]


def autocast_of(tensor: Tensor) -> tuple[str, torch.dtype] | None:
    """The autocast that is on for a tensor's device."""
    kind = tensor.device.type
    return (kind, torch.get_autocast_dtype(kind)) if torch.is_autocast_enabled(kind) else None


# --- what one batch goes through ------------------------------------------------------------------------------------


class _Watch:
    """Whether blocks form a chain: each called once, in order, one taking what the one before it returned."""

    def __init__(self, blocks: list[str]) -> None:
        self.blocks, self.at, self.linked = blocks, 0, True
        self.first: list[Any] = []
        self.made: list[Any] | None = None
        self.links: list[set[tuple[int, int]]] = []
        self.varying: set[int] = set()
        self.differs = False

    def called(self, name: str, leaves: list[Any], spec: TreeSpec) -> None:
        if not self.linked:
            return
        if self.at == 0 and name == self.blocks[0]:
            self.first, self.spec = _copies(leaves), spec
            self.autocast = next((autocast_of(leaf) for leaf in leaves if isinstance(leaf, Tensor)), None)
        elif self.at == len(self.blocks) or name != self.blocks[self.at] or self.made is None or len(leaves) != len(self.first):
            self.linked = False
        else:
            tensors = [(slot, value) for slot, value in enumerate(leaves) if isinstance(value, Tensor)]
            self.links.append(
                {(slot, leaf) for slot, value in tensors for leaf, made in enumerate(self.made) if same_value(value, made)}
            )
            self.varying |= {slot for slot, pair in enumerate(zip(self.first, leaves, strict=True)) if not same_value(*pair)}
            self.differs = self.differs or spec != self.spec
        self.at, self.made = self.at + 1, None

    def returned(self, name: str, _: nn.Module, args: Any, output: Any) -> None:
        if self.linked and 0 < self.at <= len(self.blocks) and name == self.blocks[self.at - 1]:
            self.made = _copies([leaf if isinstance(leaf, Tensor) else None for leaf in tree_leaves(output)])

    def chain(self, model: nn.Module) -> Chain | None:
        common = set.intersection(*self.links) if self.links and self.linked and self.at == len(self.blocks) else set()
        if not common:
            return None
        leaf = min(leaf for _, leaf in common)
        slots = tuple(sorted(slot for slot, index in common if index == leaf))
        # T5's position bias comes from the first block, too; but of what depends on the blocks' input only one tensor is carried on
        more = {index for links in self.links for slot, index in links if slot in self.varying and slot not in slots}
        if more and self._depend(model, slots, more):
            return None
        hidden = self.first[slots[0]]
        if not isinstance(hidden, Tensor) or not hidden.is_floating_point():
            return None
        own = self.differs or bool(self.varying - set(slots))
        return Chain(self.blocks, slots, leaf, own, hidden.nbytes)

    def _depend(self, model: nn.Module, slots: tuple[int, ...], outputs: set[int]) -> bool:
        """Whether some of the first block's outputs change with its input."""
        block, found = model.get_submodule(self.blocks[0]), []
        home = next((value.device for value in block.parameters()), torch.device("cpu"))
        for factor in (1.0, 1.125):
            leaves = [leaf.to(home, copy=True) if isinstance(leaf, Tensor) else leaf for leaf in self.first]
            for slot in slots:
                leaves[slot] = leaves[slot] * factor
            args, kwargs = tree_unflatten(leaves, self.spec)
            with torch.autocast(*self.autocast) if self.autocast else contextlib.nullcontext():
                out = tree_leaves(block(*args, **kwargs))
            found.append([out[index].clone() for index in sorted(outputs)])
        return not all(map(same_value, *found))


def _watch(model: nn.Module, watches: list[_Watch], fakes: Sequence[str], example: Run) -> list[str]:
    """Run one batch; returns the fake modules in the order in which they were called."""
    order: list[str] = []
    with contextlib.ExitStack() as stack:
        for watch, name in [(each, name) for each in watches for name in each.blocks]:
            block = model.get_submodule(name)
            stack.enter_context(calls_of(block, functools.partial(watch.called, name)))
            stack.callback(block.register_forward_hook(functools.partial(watch.returned, name)).remove)
        for name in fakes:
            see = lambda _, args, name=name: order.append(name)  # noqa: E731
            stack.callback(model.get_submodule(name).register_forward_pre_hook(see).remove)
        example()
    return order


@dataclass
class Layout:
    """The parts of a model in the order of execution: chains of blocks, and names of the fake modules before, between, behind.

    `blocks` are those that hold fake modules.
    """

    chains: list[Chain]
    others: list[list[str]]
    blocks: int = 0

    def count(self, single: bool) -> int:
        """How many units there will be; see `units`."""
        return self.blocks + sum(len(names) if single else bool(names) for names in self.others)


def find_layout(model: nn.Module, example: Run, patterns: Sequence[str] | None = None) -> Layout:
    """See what one batch goes through. All ranks get what the first one sees.

    Args:
        example: passes one batch through `model`.
        patterns: of the recipe.

    Raises:
        ValueError: the recipe's own blocks do not feed each other.
    """
    fakes = list(fake_modules(model))
    chains: list[Chain] = []
    level = find_blocks(model, patterns)
    nested: dict[str, list[list[str]]] = {}
    watches = [_Watch(blocks) for blocks in level]
    for watch in watches if patterns is None else ():  # grows: blocks within blocks, for where the outer ones are no chain
        for name in watch.blocks:
            nested[name] = [[f"{name}.{each}" for each in inner] for inner in find_blocks(model.get_submodule(name))]
            watches += [_Watch(inner) for inner in nested[name]]
    order = _watch(model, watches, fakes, example)
    by_blocks = {tuple(watch.blocks): watch for watch in watches}
    while level:
        blocks = level.pop()
        chain = by_blocks[tuple(blocks)].chain(model)
        if chain is not None:
            chains.append(chain)
        elif patterns is not None:
            raise ValueError(
                f"Recipe blocks: {', '.join(blocks[:3])}, ... are not called once each in every pass, one taking the output of "
                f"another and all else from outside: name blocks that are, or leave blocks=None"
            )
        else:
            level += [inner for name in blocks for inner in nested[name]]
    layout = [_arrange(chains, fakes, order)]
    if has_ranks():
        dist.broadcast_object_list(layout, 0)
    return layout[0]


def _arrange(chains: list[Chain], fakes: list[str], order: list[str]) -> Layout:
    """Chains by their first call, and the fake modules outside of them where they are called; last what was not called."""
    position = {name: index for index, name in reversed(list(enumerate(order)))}
    inside = {id(chain): [name for name in fakes if within(name, chain.blocks)] for chain in chains}
    starts = {id(chain): min(position.get(name, len(order)) for name in inside[id(chain)]) for chain in chains if inside[id(chain)]}
    chains = sorted((chain for chain in chains if id(chain) in starts), key=lambda chain: starts[id(chain)])
    others: list[list[str]] = [[] for _ in range(len(chains) + 1)]
    for name in fakes:
        if not any(within(name, chain.blocks) for chain in chains):
            after = sum(starts[id(chain)] < position.get(name, len(order)) for chain in chains)
            others[after if name in position else -1].append(name)
    for names in others:
        names.sort(key=lambda name: position.get(name, len(order)))
    blocks = sum(any(within(name, [block]) for name in inside[id(chain)]) for chain in chains for block in chain.blocks)
    return Layout(chains, others, blocks)
