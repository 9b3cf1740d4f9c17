"""What learned rounding shares: gradients of the error of a unit's output in its layers' rounded weights."""

from __future__ import annotations

import contextlib
import zlib
from collections.abc import Callable, Iterator
from typing import Protocol, TypeVar

import torch
from torch import Tensor, nn

from lightning_quant.algorithms.base import Settings, suited, weight_quantizer
from lightning_quant.blocks import Unit
from lightning_quant.calibration import all_reduce, has_ranks
from lightning_quant.nn import FakeModule
from lightning_quant.statistics import put_weight_matrix


@contextlib.contextmanager
def trainable(unit: Unit, modules: dict[str, FakeModule]) -> Iterator[dict[str, nn.Parameter]]:
    """The weights of these modules take gradients, and are given from outside; all else in the unit is quantized."""
    before = [(value, value.requires_grad) for value in unit.root.parameters()]
    weights = {}
    for value, _ in before:
        value.requires_grad = False
    for name, module in unit.modules.items():
        if name in modules:
            weight = module.get_weight("weight")
            assert isinstance(weight, nn.Parameter)
            weight.requires_grad = True
            weights[name] = weight
        for _, part in module.quantizers():
            part.quantizing = not (part.is_weight and name in modules)
    try:
        yield weights
    finally:
        for value, required in before:
            value.requires_grad_(required).grad = None


def autocast_dtype(name: str | None, device: torch.device) -> torch.dtype | None:
    """The dtype of that name for autocast; of `"auto"` bfloat16 where the device multiplies it natively, else none.

    Raises:
        ValueError: not the name of a floating dtype.
    """
    if name == "auto":
        if device.type == "cuda":
            return torch.bfloat16 if torch.cuda.is_bf16_supported() else None
        able: dict[str, bool] = getattr(torch.cpu, "get_capabilities", dict)()
        return torch.bfloat16 if device.type == "cpu" and (able.get("avx512_bf16") or able.get("amx_bf16")) else None
    found = None if name is None else getattr(torch, name, None)
    if name is not None and (not isinstance(found, torch.dtype) or not found.is_floating_point):
        raise ValueError(f"dtype {name!r} is no floating dtype; valid: 'auto', 'bfloat16', 'float16', None")
    return found


def enough_batches(unit: Unit, positions: int = 512) -> int:
    """How many batches hold so many tokens, pixels, or whatever a unit's layers are applied to."""
    assert unit.calls is not None
    hidden = unit.calls.hidden[0]
    channels = hidden.shape[1 if hidden.dim() > 3 else -1]
    return max(-(-positions * channels // max(hidden.numel(), 1)), 1)


def learning_passes(options: Settings, batches: int, positions: int, layers: float) -> float:
    """Passes over the data that learned rounding takes: a step is a forward and a backward pass, by default over 512 positions."""
    chosen = options["batches"] or -(-512 // max(positions, 1))
    return 3.0 * options["iterations"] * min(chosen, batches) / batches + 1


def choose_batches(unit: Unit, samples: int, iterations: int) -> Iterator[list[int]]:
    """Which batches each iteration sees: all in a random order, then all anew. The same in every run."""
    assert unit.calls is not None
    generator = torch.Generator().manual_seed(zlib.crc32(unit.name.encode()))
    order: list[int] = []
    for _ in range(iterations):
        while len(order) < min(samples, len(unit.calls)):
            order += torch.randperm(len(unit.calls), generator=generator).tolist()
        yield order[:samples]
        order = order[samples:]


def distance(output: Tensor, target: Tensor) -> Tensor:
    """The mean squared error; of sequences `[samples, tokens, features]` relative to each token's mean square.

    A few tokens of a language model are hundreds of times larger than the rest (Sun et al. 2024, arXiv:2402.17762, section 2) and
    would be all that counts, though the norm that follows brings every token to one size.
    """
    error, target = (output.float() - target.float()).square(), target.float()
    if target.dim() != 3:
        return error.mean()
    size = target.square().mean(-1, keepdim=True)
    return (error / size.clamp(min=0.01 * size.median().clamp(min=1e-30))).mean()


def gradients(unit: Unit, weights: dict[str, nn.Parameter], batches: list[int], dtype: torch.dtype | None) -> float:
    """Leave the gradients of the error of the unit's output (`distance`) in the weights, over all ranks; returns the error."""
    assert unit.targets is not None
    total = 0.0
    for weight in weights.values():
        weight.grad = None
    for index in batches:
        target = unit.targets[index]
        context = torch.autocast(target.device.type, dtype) if dtype is not None else contextlib.nullcontext()
        with torch.enable_grad(), context:
            loss = distance(unit.output(index), target) / len(batches)
        loss.backward()
        total += loss.item()
    if has_ranks():
        for weight in weights.values():
            if weight.grad is None:
                weight.grad = torch.zeros_like(weight)
            all_reduce(weight.grad, "sum")
        shared = torch.tensor(total)
        all_reduce(shared, "sum")
        total = shared.item()
    return total


def output_distance(unit: Unit, batches: list[int], dtype: torch.dtype | None) -> float:
    """The error of the unit's output (`distance`) as it is now, over all ranks."""
    assert unit.targets is not None
    total = torch.zeros(())
    with torch.no_grad():
        for index in batches:
            target = unit.targets[index]
            with torch.autocast(target.device.type, dtype) if dtype is not None else contextlib.nullcontext():
                total += distance(unit.output(index), target).cpu() / len(batches)
    if has_ranks():
        all_reduce(total, "sum")
    return total.item()


def as_matrix(module: FakeModule, grad: Tensor) -> Tensor:
    return grad.float().movedim(module.weight_axes(module)["weight"], 0).flatten(1)


def finish(modules: dict[str, FakeModule], results: dict[str, tuple[Tensor, Tensor, Tensor]]) -> None:
    for name, module in modules.items():
        rounded, scale, zero_point = results[name]
        quantizer = weight_quantizer(module)
        quantizer.set_qparams(scale, zero_point.to(torch.int32))
        put_weight_matrix(module, rounded)


class Learned(Protocol):
    """A weight matrix that is learned."""

    def __call__(self) -> Tensor:
        """The weight as it is rounded now, `[channels, columns]`."""
        ...

    def keep(self) -> None:
        """Remember what is learned so far."""
        ...

    def restore(self, state: int) -> None:
        """0: what was learned last, 1: what was kept, 2: where it began."""
        ...

    def result(self) -> tuple[Tensor, Tensor, Tensor]:
        """The rounded weight, its scale and zero point."""
        ...


OneLearned = TypeVar("OneLearned", bound=Learned)


def learn(
    unit: Unit,
    modules: dict[str, FakeModule],
    learned: dict[str, OneLearned],
    step: Callable[[OneLearned, Tensor, float], None],
    iterations: int,
    batches: int | None,
    dtype: str | None,
) -> None:
    """Bring a unit's output close to what it was in float, and put what was learned into its layers.

    Kept is the best of three, on other data than a step sees: what came out last, what did best on the data of its step, and where
    it began.

    Args:
        modules, learned: by name.
        step: changes one, by its gradient, a matrix, and by what is left of the first rate, 1 at first and falling to 0 linearly.
        batches: that each step sees; None: `enough_batches`.
        dtype: as in `autocast_dtype`.
    """
    kind = autocast_dtype(dtype, next(iter(modules.values())).get_weight("weight").device)
    size = batches or enough_batches(unit)
    least = float("inf")

    def put() -> None:
        for name, module in modules.items():
            put_weight_matrix(module, learned[name]())

    with trainable(unit, modules) as weights:
        for index, chosen in enumerate(choose_batches(unit, size, iterations)):
            put()
            error = gradients(unit, weights, chosen, kind)
            if error < least:
                least = error
                for each in learned.values():
                    each.keep()
            for name, module in modules.items():
                grad = weights[name].grad
                if grad is not None:
                    step(learned[name], as_matrix(module, grad), 1 - index / iterations)
        checked = next(choose_batches(unit, 4 * size, 1))
        errors = []
        for state in range(3):
            for each in learned.values():
                each.restore(state)
            put()
            errors.append(output_distance(unit, checked, kind))
    for each in learned.values():
        each.restore(errors.index(min(errors)))
    finish(modules, {name: each.result() for name, each in learned.items()})


def reached(unit: Unit, what: str) -> dict[str, FakeModule]:
    """The layers to learn: those that are a matrix of integer codes and get a gradient."""
    modules = suited(unit, what)
    if unit.calls is None or not len(unit.calls):
        for name in modules:
            unit.note(name, f"{what}, calibration has not reached it")
        return {}
    return modules
