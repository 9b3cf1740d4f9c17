"""What can be known before algorithms run: what they will take, and what cannot work."""

from __future__ import annotations

import contextlib
import inspect
import math
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, fields
from typing import Any

from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from lightning_quant.activations import available_memory, format_bytes
from lightning_quant.algorithms import Algorithm, get_algorithms
from lightning_quant.algorithms.base import suited
from lightning_quant.blocks import Unit
from lightning_quant.layout import Layout, find_layout
from lightning_quant.nn import FakeModule
from lightning_quant.plan import Plan, tensor_bytes
from lightning_quant.recipe import Recipe
from lightning_quant.report import Summary
from lightning_quant.sequential import Options, has_transforms, input_path, statistics_kinds
from lightning_quant.statistics import SAMPLES, why_no_rows
from lightning_quant.surgery import fake_modules

# of all else: code, buffers of the libraries that multiply, and what the allocator does not give back
_CONSTANT, _SPARE = 10_000_000, 1.4


@dataclass(frozen=True)
class Estimate:
    """What a run will take, from one batch in float.

    Args:
        batches: at most.
        batch_seconds: of one batch.
        seconds: of all, on this machine; mostly within a factor of two.
        memory: bytes added to what the process uses now, at the peak; mostly within a factor of 1.5.
        activations: bytes of these that are activations between passes, within the memory budget.
        in_files: bytes of activations beyond it.
        available: bytes that can be had now; None: unknown.
    """

    batches: int
    batch_seconds: float
    seconds: float
    memory: int
    activations: int
    in_files: int
    available: int | None

    def __str__(self) -> str:
        files = f", {format_bytes(self.in_files)} more in files" if self.in_files else ""
        there = "" if self.available is None else f"; {format_bytes(self.available)} are available"
        return (
            f"estimate, from one batch in float: {self.batches} batches of {_duration(self.batch_seconds)}, about "
            f"{_duration(self.seconds)} in all; about {format_bytes(self.memory)} of memory at the peak "
            f"({format_bytes(self.activations)} of activations{files}){there}"
        )


def _duration(seconds: float) -> str:
    if seconds < 1:
        return f"{seconds * 1000:.3g} ms"
    return f"{seconds:.3g} s" if seconds < 100 else f"{seconds / 60:.0f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"


@dataclass(frozen=True)
class Forecast(Summary):
    """The `Summary` of what would be done, and an estimate of what that takes; None: no data were run."""

    estimate: Estimate | None = None

    def __str__(self) -> str:
        return "\n".join([super().__str__(), *([str(self.estimate)] if self.estimate else [])])


def forecast(told: Summary, estimate: Estimate) -> Forecast:
    """A summary with an estimate."""
    return Forecast(**{each.name: getattr(told, each.name) for each in fields(Summary)}, estimate=estimate)


# --- what one batch shows -------------------------------------------------------------------------------------------


@dataclass
class _Seen:
    """Times are of `time.perf_counter`; outputs are in bytes, and operations those of the fake modules' matrix products."""

    starts: dict[str, float] = field(default_factory=dict)
    ends: dict[str, float] = field(default_factory=dict)
    outputs: dict[str, int] = field(default_factory=dict)
    operations: dict[str, float] = field(default_factory=dict)

    def seconds(self, first: str, last: str) -> float:
        return max(self.ends.get(last, 0.0) - self.starts.get(first, self.ends.get(last, 0.0)), 0.0)

    @property
    def whole(self) -> float:
        return max(self.ends.values(), default=0.0) - min(self.starts.values(), default=0.0)


@contextlib.contextmanager
def _watching(model: nn.Module) -> Iterator[_Seen]:
    seen, handles = _Seen(), []

    def start(name: str, module: nn.Module, args: Any) -> None:
        seen.starts.setdefault(name, time.perf_counter())

    def end(name: str, module: nn.Module, args: Any, output: Any) -> None:
        tensors = [leaf for leaf in tree_leaves(output) if isinstance(leaf, Tensor)]
        seen.outputs[name] = sum(leaf.nbytes for leaf in tensors)
        if isinstance(module, FakeModule) and tensors and not why_no_rows(module):
            _, columns = _shape(module)
            seen.operations[name] = 2.0 * tensors[0].numel() * columns
        seen.ends[name] = time.perf_counter()

    for name, module in model.named_modules():
        handles.append(module.register_forward_pre_hook(lambda module, args, name=name: start(name, module, args)))
        handles.append(module.register_forward_hook(lambda module, args, output, name=name: end(name, module, args, output)))
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


# --- the estimate ---------------------------------------------------------------------------------------------------


def survey(model: nn.Module, recipe: Recipe, example: Callable[[], Any]) -> tuple[Layout, _Seen]:
    """The layout of a prepared model, and what one batch showed on the way."""
    with _watching(model) as seen:
        layout = find_layout(model, example, recipe.blocks)
    return layout, seen


def measure(model: nn.Module, recipe: Recipe, example: Callable[[], Any], batches: int, options: Options) -> Estimate:
    """What `run_algorithms` will take; two batches are run, the second one is timed."""
    layout, _ = survey(model, recipe, example)
    with _watching(model) as seen:
        example()
    return estimate(model, recipe, layout, seen, batches, options)


def estimate(model: nn.Module, recipe: Recipe, layout: Layout, seen: _Seen, batches: int, options: Options) -> Estimate:
    """What `run_algorithms` will take, from what was seen of one batch."""
    algorithms, available = get_algorithms(recipe), available_memory()
    limit = options.memory_budget if options.memory_budget is not None else (available or 2**62) // 4
    path = input_path(algorithms)
    sizes = [batches * chain.size for chain in layout.chains] or [0]
    kept = max(sizes) * (1 if path == "quantized" else 2) + (sum(sizes) - max(sizes) if path == "both" else 0)
    memory = _working_memory(model, algorithms, layout, seen) + min(kept, limit)
    return Estimate(
        batches,
        seen.whole,
        _seconds(model, recipe, algorithms, layout, seen, batches),
        int(memory),
        min(kept, limit),
        max(kept - limit, 0),
        available,
    )


def _shape(module: FakeModule) -> tuple[int, int]:
    """Rows and columns of a layer's weight matrix."""
    weight = module.get_weight("weight")
    rows = weight.shape[module.weight_axes(module)["weight"]]
    return rows, weight.numel() // rows


def _matrices(modules: Mapping[str, FakeModule]) -> list[tuple[int, int]]:
    return [_shape(module) for module in modules.values() if not why_no_rows(module)]


def _units(model: nn.Module, layout: Layout, single: bool) -> list[dict[str, FakeModule]]:
    """The modules of each unit."""
    fakes = fake_modules(model)
    groups = [[name] for names in layout.others for name in names] if single else [names for names in layout.others if names]
    for chain in layout.chains:
        groups += [[name for name in fakes if name == block or name.startswith(f"{block}.")] for block in chain.blocks]
    return [{name: fakes[name] for name in group} for group in groups if group]


def _working_memory(model: nn.Module, algorithms: Mapping[str, Algorithm], layout: Layout, seen: _Seen) -> float:
    """Packed weights, and of the largest unit its float copy, its statistics, and what algorithms hold."""
    kinds, single, largest = statistics_kinds(algorithms), input_path(algorithms) == "both", 0.0
    for modules in _units(model, layout, single):
        matrices = _matrices(modules)
        held = sum(4.0 * rows * columns for rows, columns in matrices)
        held += sum(4.0 * columns**2 for _, columns in matrices) if "hessian" in kinds else 0
        held += sum(4.0 * SAMPLES * columns for _, columns in matrices) if "rows" in kinds else 0
        for algorithm in algorithms.values():
            each = [algorithm.cost.memory(*matrix) for matrix in matrices] or [0.0]
            held += sum(each) if algorithm.cost.together else max(each)
        # autograd keeps what passes through a unit, and so does the search for what can be rescaled together
        passing = sum(seen.outputs.get(name, 0) for name in modules)
        held += 4 * passing if has_transforms(algorithms) or single else 0
        largest = max(largest, held)
    fakes = fake_modules(model).values()
    packed = sum(tensor_bytes(list(module.packed_type.empty(module, module.scheme, "meta").parameters())) for module in fakes)
    return packed + _SPARE * largest + 3.0 * max(seen.outputs.values(), default=0) + _CONSTANT


def _settings(recipe: Recipe, algorithms: Mapping[str, Algorithm]) -> dict[str, dict[str, Any]]:
    """Each algorithm's options, defaults among them."""
    found = {}
    for name, algorithm in algorithms.items():
        defaults = inspect.signature(algorithm.apply).parameters
        found[name] = {key: value.default for key, value in defaults.items()} | recipe.algorithm_options.get(name, {})
    return found


def _seconds(
    model: nn.Module, recipe: Recipe, algorithms: Mapping[str, Algorithm], layout: Layout, seen: _Seen, batches: int
) -> float:
    """Passes of data, and what algorithms compute at the rate of this model's own matrix products."""
    fakes, settings = fake_modules(model), _settings(recipe, algorithms)
    known = {name: algorithm.cost for name, algorithm in algorithms.items()}
    positions = max((seen.operations[name] / (2 * math.prod(_shape(fakes[name]))) for name in seen.operations), default=1)
    layers = len(fakes) / max(layout.count(input_path(algorithms) == "both"), 1)
    passes = 1.0 if input_path(algorithms) == "float" else 2.0
    passes += sum(cost.passes(settings[name], batches, int(positions), layers) for name, cost in known.items())
    blocks = sum(seen.seconds(chain.blocks[0], chain.blocks[-1]) for chain in layout.chains)
    static = any(module.scheme.needs_data for module in fakes.values()) and not has_transforms(algorithms)
    full = sum(bool(names) for names in layout.others) + static
    data = batches * (passes * blocks + len(layout.chains) * 0.5 * (seen.whole - blocks) + full * seen.whole)
    if not layout.chains:
        data = batches * (passes + static) * seen.whole
    rate = max(sum(seen.operations.values()) / max(seen.whole, 1e-9), 1e9)
    return data + sum(cost.work(*matrix, settings[name]) for name, cost in known.items() for matrix in _matrices(fakes)) / rate


# --- refusals -------------------------------------------------------------------------------------------------------


def check_memory(found: Estimate) -> None:
    """Refuse what does not fit.

    Raises:
        ValueError: more memory will be needed than is available; the message has the numbers and the ways out.
    """
    if found.available is None or found.memory <= found.available:
        return
    rest = found.memory - found.activations
    ways = []
    if found.activations:
        ways.append(
            f'a smaller memory_budget (activations take {format_bytes(found.activations)}; "100 MB" puts the rest in files)'
        )
        ways.append(f"fewer calibration_batches (now {found.batches}), or smaller ones")
    if rest > found.available:
        ways = ["smaller batches, an algorithm that needs less (gptq needs less than awq and autoround), or a larger machine"]
    raise ValueError(
        f"not enough memory: about {format_bytes(found.memory)} will be needed beside the model, of which "
        f"{format_bytes(rest)} are weights and statistics, and {format_bytes(found.available)} are available. "
        f"Way out: {'; or '.join(ways)}"
    )


def check_layers(model: nn.Module, algorithms: Mapping[str, Algorithm]) -> None:
    """Refuse algorithms that would have nothing to do.

    Args:
        model: prepared.

    Raises:
        ValueError: they are for none of the layers; the message has the reasons.
    """
    unit = Unit("", model, fake_modules(model), lambda: None)
    if not suited(unit, ""):
        told = [f"{name}: {note.removeprefix(', ')}" for name, note in unit.notes.items()]
        raise ValueError(
            f"the recipe's algorithms ({', '.join(algorithms)}) are for none of the layers it quantizes: {'; '.join(told[:4])}"
            f"{'; ...' * (len(told) > 4)}. Leave algorithms out, or give these layers integer weights"
        )


def note_large_groups(plan: Plan) -> None:
    """Note layers whose weights have fewer columns than a group: each channel is one group then."""
    for match in plan.matches:
        size = match.scheme.weight.group_size if match.scheme.weight else None
        if not size or match.scheme.weight is None or match.scheme.weight.flat_groups:
            continue
        for name, axis in match.entry.fake.weight_axes(match.module).items():
            weight = match.module._parameters.get(name)
            columns = weight.numel() // weight.shape[axis] if weight is not None and weight.dim() > 1 else size
            if columns < size:
                note = f"a group of {size} is larger than its {columns} columns: one a channel"
                match.note = "; ".join(filter(None, [match.note, note]))


__all__ = ["Estimate", "Forecast", "check_layers", "check_memory", "forecast", "measure", "note_large_groups"]
