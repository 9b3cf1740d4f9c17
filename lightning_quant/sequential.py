"""Run a recipe's algorithms on one unit of a model after the other, each packed as soon as it is done."""

from __future__ import annotations

import contextlib
import gc
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from tqdm import tqdm

from lightning_quant.activations import Budget
from lightning_quant.algorithms import Algorithm, get_algorithms
from lightning_quant.algorithms.ranges import find_ranges
from lightning_quant.blocks import Path as InputPath
from lightning_quant.blocks import Unit, units
from lightning_quant.calibration import has_ranks
from lightning_quant.fitting import add_notes
from lightning_quant.layout import Layout
from lightning_quant.nn import FakeModule, PackedModule
from lightning_quant.nn.experts import make_unreached_dynamic
from lightning_quant.outputs import summing_outputs
from lightning_quant.recipe import Recipe
from lightning_quant.scaling import find_groups
from lightning_quant.statistics import collecting
from lightning_quant.surgery import fake_modules, replace_modules
from lightning_quant.work import Work

Packed = dict[str, tuple[FakeModule, PackedModule]]


@dataclass(frozen=True)
class Options:
    """How algorithms run.

    Args:
        work_dir: where each unit's result is written, and read by a later run that was interrupted.
        memory_budget: bytes of activations that stay in memory; the rest goes to files. None: a quarter of what is available.
        progress: show a bar with the time left, where standard error is a terminal.
    """

    work_dir: Path | None = None
    memory_budget: int | None = None
    progress: bool = True


def input_path(algorithms: Mapping[str, Algorithm]) -> InputPath:
    """What units are replayed with: the errors of earlier ones matter to rounders and corrections, not to transforms."""
    if any(algorithm.reconstructs for algorithm in algorithms.values()):
        return "both"
    return "float" if all(algorithm.kind == "transform" for algorithm in algorithms.values()) else "quantized"


def has_transforms(algorithms: Mapping[str, Algorithm]) -> bool:
    """Whether weights change before ranges of activations can be found."""
    return any(algorithm.kind == "transform" and not algorithm.whole for algorithm in algorithms.values())


def statistics_kinds(algorithms: Mapping[str, Algorithm]) -> set[str]:
    """What is to be collected of layers' inputs."""
    kinds = {kind for algorithm in algorithms.values() for kind in algorithm.statistics}
    return kinds | {"low", "high"} if has_transforms(algorithms) else kinds


# --- modules that share a weight ------------------------------------------------------------------------------------


def _owners(model: nn.Module) -> dict[int, list[str]]:
    """Parameter, by id -> the modules that hold it."""
    owners: dict[int, list[str]] = {}
    for name, module in model.named_modules():
        for value in module._parameters.values():
            if value is not None:
                owners.setdefault(id(value), []).append(name)
    return owners


def untie_floats(model: nn.Module) -> None:
    """Give quantized modules that share a weight with one that stays in float a parameter of their own: it would change, too.

    The storage stays shared until one of them changes.
    """
    fakes, owners = fake_modules(model), _owners(model)
    own: dict[int, nn.Parameter] = {}
    for fake in fakes.values():
        for key, value in fake._parameters.items():
            if value is not None and any(name not in fakes for name in owners[id(value)]):
                fake._parameters[key] = own.setdefault(id(value), nn.Parameter(value.detach(), value.requires_grad))


def tied(modules: dict[str, FakeModule], model: nn.Module) -> dict[str, str]:
    """Those that share a parameter with another module -> the name of one of these."""
    owners, found = _owners(model), {}
    for name, module in modules.items():
        others = [other for value in module._parameters.values() if value is not None for other in owners[id(value)]]
        if other := next((other for other in others if other != name), None):
            found[name] = other
    return found


def packable(modules: dict[str, FakeModule], model: nn.Module) -> dict[str, FakeModule]:
    """Those that can be packed on their own: not a part of another quantized module, nor the whole of one, nor tied to one."""
    nested: set[int] = set()
    for module in fake_modules(model).values():
        parts = [id(part) for part in module.modules() if isinstance(part, FakeModule)]
        nested.update(parts if len(parts) > 1 else ())
    shared = tied(modules, model)
    return {name: module for name, module in modules.items() if id(module) not in nested and name not in shared}


def transform_whole(model: nn.Module, recipe: Recipe, run: Callable[[], None], example: Callable[[], Any]) -> None:
    """Run the recipe's algorithms that take the whole model at once.

    Args:
        model: prepared, in eval mode; in float.
        run: passes the calibration data through `model`.
        example: passes one batch through it.
    """
    for name, algorithm in get_algorithms(recipe).items():
        if algorithm.whole:
            unit = Unit("", model, fake_modules(model), run, example=example)
            algorithm.apply(unit, **recipe.algorithm_options.get(name, {}))
            add_notes(model, unit.notes)


# --- the walk -------------------------------------------------------------------------------------------------------


def run_algorithms(
    model: nn.Module,
    recipe: Recipe,
    run: Callable[[], None],
    example: Callable[[], Any],
    layout: Layout,
    work: Work,
    options: Options,
) -> None:
    """Quantize a prepared model's units in the order of execution; their modules are packed ones afterwards.

    Args:
        model: prepared with `training=False`, in eval mode.
        run: passes the calibration data through `model`, the same in every pass; a batch ends at `calibration.Enough`.
        example: passes one batch through it.
        layout: of `model`.
        work: keeps finished units, and knows those of an earlier run.
    """
    algorithms = {name: algorithm for name, algorithm in get_algorithms(recipe).items() if not algorithm.whole}
    path, shared, steps, pending = input_path(algorithms), {}, {}, {}  # type: InputPath, dict[Any, Any], dict[str, _Step], Packed

    def collect(unit: Unit) -> contextlib.AbstractContextManager[Any] | None:
        unit.shared, unit.rounds = shared, any(algorithm.kind == "rounder" for algorithm in algorithms.values())
        step = _Step(unit, model, algorithms, recipe)  # also of a finished unit: float targets are those of rescaled weights
        if work.has(unit.name):
            return None
        steps[unit.name] = step
        return step.collecting()

    with Budget(options.memory_budget, options.work_dir) as budget, _bar(layout.count(path == "both"), options) as bar:
        for unit in units(model, run, layout, budget, path=path, collect=collect, example=example):
            bar.set_postfix_str(unit.name)
            _swap(model, pending)
            ready = packable(unit.modules, model)
            step = steps.pop(unit.name, None)
            if step is None:
                if has_transforms(algorithms):
                    _remember(unit)
                pending = work.load(unit, ready, model)
            else:
                step.apply()
                pending = {name: (module, module.to_packed()) for name, module in ready.items()}
                work.save(unit, pending, model, step.before)
                step.before.clear()
            for fake, packed in pending.values():
                fake.settle(packed)
            add_notes(model, unit.notes)
            unit.statistics.clear()
            gc.collect()  # what a unit leaves behind is large, and too few objects for the collector to come by itself
            bar.update()
            if step is None:  # took no time: nothing to extrapolate from
                bar.initial = bar.n
                bar.unpause()
        _swap(model, pending)


class _Step:
    """All that algorithms do to one unit.

    Transforms that need no statistics, and come first, run before data pass: what is learned of layers' inputs is then of what
    the others find.
    """

    def __init__(self, unit: Unit, model: nn.Module, algorithms: dict[str, Algorithm], recipe: Recipe) -> None:
        self.unit, self.algorithms, self.options = unit, algorithms, recipe.algorithm_options
        # tensors are kept alive: no address comes up again
        self.before = {name: value.detach() for name, value in model.named_parameters()}
        self.scales = {name: _weights(module) for name, module in unit.modules.items()}
        self.transforms = [name for name, algorithm in algorithms.items() if algorithm.kind == "transform"]
        self.tied = tied(unit.modules, model) if self.transforms else {}
        if self.transforms and has_ranks():
            _remember(unit)
        for name, other in self.tied.items():
            unit.note(name, f"{' and '.join(self.transforms)}: not rescaled, its weight is also that of {other}")
        early = list(itertools.takewhile(lambda name: not algorithms[name].statistics, self.transforms))
        self.late = self.transforms[len(early) :]
        self._transform(early)

    def collecting(self) -> contextlib.AbstractContextManager[Any] | None:
        """To be entered while data pass; None: nothing is to be learned of them."""
        kinds = statistics_kinds(self.algorithms)
        return _filled(self.unit, kinds, quantized=not self.transforms) if kinds else None

    def apply(self) -> None:
        """Run the algorithms on what was collected."""
        unit = self.unit
        self._transform(self.late)
        if self.late and "outputs" in statistics_kinds(self.algorithms):  # of layers that now feed others less, or more
            with summing_outputs(unit.modules) as unit.statistics["outputs"]:
                unit.replay()
        if self.transforms:
            for name, module in unit.modules.items():
                pairs = zip(self.scales[name], _weights(module), strict=True)
                if any(one[0] != two[0] and torch.equal(one[1], two[1]) for one, two in pairs):
                    module.observe_weights()  # divided to make up for others: an algorithm sees to the ranges of what it is for
            find_ranges(unit)
            for name, note in make_unreached_dynamic(unit.modules).items():
                unit.note(name, note)
        for kind in ("rounder", "correction"):
            for name, algorithm in self.algorithms.items():
                if algorithm.kind == kind:
                    algorithm.apply(unit, **self.options.get(name, {}))

    def _transform(self, names: Sequence[str]) -> None:
        modules = self.unit.modules
        self.unit.modules = {name: module for name, module in modules.items() if name not in self.tied}
        for name in names:
            self.algorithms[name].apply(self.unit, **self.options.get(name, {}))
        self.unit.modules = modules


def _remember(unit: Unit) -> None:
    """Find what layers of a unit can be rescaled together, for later units to start from; on ranks, as the first one finds it."""
    find_groups(unit, {}, explicit=False)
    if has_ranks():
        values = list(unit.shared.values())
        dist.broadcast_object_list(values, 0)
        unit.shared.update(zip(unit.shared, values, strict=True))


def _weights(module: FakeModule) -> list[tuple[int, Tensor]]:
    """Where each weight is, and its scale."""
    names = module.weight_axes(module)
    return [(module.get_weight(name).data_ptr(), getattr(module, f"{name}_fake_quant").scale.clone()) for name in names]


def _bar(total: int, options: Options) -> Any:
    shown = options.progress and not (has_ranks() and dist.get_rank() > 0)
    return tqdm(total=total, desc="quantizing", unit="block", disable=None if shown else True, leave=False)


@contextlib.contextmanager
def _filled(unit: Unit, kinds: set[str], quantized: bool) -> Iterator[None]:
    modules = unit.modules if "outputs" in kinds else {}
    with collecting(unit.modules, kinds, quantized) as found, summing_outputs(modules) as sums:
        yield
    unit.statistics = {**found, "outputs": sums}


def _swap(model: nn.Module, pending: Packed) -> None:
    """Put packed modules in the place of fake ones."""
    replace_modules(model, {id(fake): packed for fake, packed in pending.values()})
    for fake, _ in pending.values():
        for part in fake.modules():  # whoever still holds the module shall not keep its weights in memory
            part._parameters.clear()
            part._buffers.clear()
    pending.clear()
