"""Calibration: run data through a prepared model while its observers watch, in evaluation mode and without gradients."""

from __future__ import annotations

import contextlib
import inspect
import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from lightning_quant.fake_quant import FakeQuantize
from lightning_quant.surgery import fake_modules

Forward = Callable[[nn.Module, Any], Any]


def quantizers(model: nn.Module) -> Iterator[FakeQuantize]:
    """All quantizers of a prepared model, weights' and activations'."""
    for module in fake_modules(model).values():
        for _, quantizer in module.quantizers():
            yield quantizer


def set_flags(model: nn.Module, *, observing: bool | None = None, quantizing: bool | None = None) -> None:
    """Switch observers and fake quantization on or off; None leaves a flag as it is. Structure and state do not change."""
    for quantizer in quantizers(model):
        if observing is not None and quantizer.observing != observing:
            quantizer.observing = observing
        if quantizing is not None and quantizer.quantizing != quantizing:
            quantizer.quantizing = quantizing


def finish_observing(model: nn.Module) -> None:
    """Turn what was observed since the last time into scales and zero points."""
    for quantizer in quantizers(model):
        quantizer.update_qparams()


def all_reduce_observers(model: nn.Module) -> None:
    """Give every rank the statistics of all ranks, as each observer's `reductions` say. Without a process group: nothing."""
    if not (dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1):
        return
    operations = {"min": dist.ReduceOp.MIN, "max": dist.ReduceOp.MAX, "sum": dist.ReduceOp.SUM}

    def reduce(tensor: Tensor, op: str) -> None:
        dist.all_reduce(tensor, operations[op])

    for quantizer in quantizers(model):
        if not quantizer.is_weight and not quantizer.spec.dynamic:
            quantizer.observer.all_reduce(reduce)
            quantizer._stale = True


@contextlib.contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Every module in eval mode, restored afterwards, and no gradients."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module, training in modes:
            module.training = training


@contextlib.contextmanager
def observing(model: nn.Module) -> Iterator[None]:
    """Watch activations in float, then merge ranks and set the ranges; on an error the flags are restored, too."""
    before = [(quantizer, quantizer.observing, quantizer.quantizing) for quantizer in quantizers(model)]
    for quantizer, _, _ in before:
        quantizer.observing, quantizer.quantizing = not quantizer.is_weight, False
    try:
        yield
        all_reduce_observers(model)
        finish_observing(model)
    finally:
        for quantizer, was_observing, was_quantizing in before:
            quantizer.observing, quantizer.quantizing = was_observing, was_quantizing


def call_model(model: nn.Module, batch: Any) -> Any:
    """`model(batch)`: a tuple or list is positional arguments, a mapping keyword arguments, anything else the one argument.

    Raises:
        ValueError: the model's `forward` does not take them.
    """
    args: tuple[Any, ...] = (batch,)
    kwargs: dict[str, Any] = {}
    if isinstance(batch, Mapping):
        args, kwargs = (), dict(batch)
    elif isinstance(batch, (tuple, list)) and not hasattr(batch, "_fields"):
        args = tuple(batch)
    try:
        inspect.signature(model.forward).bind(*args, **kwargs)
    except TypeError as error:
        told = f"keywords {list(kwargs)}" if kwargs else f"{len(args)} positional arguments"
        raise ValueError(
            f"a batch of {told} does not fit {type(model).__name__}.forward: {error}. Batches hold what forward takes; "
            f"pass forward=lambda model, batch: ... to pick from them"
        ) from None
    return model(*args, **kwargs)


def to_device(batch: Any, model: nn.Module) -> Any:
    """The batch with its tensors on the device of the model's first parameter."""
    parameter = next(model.parameters(), None)
    return batch if parameter is None else tree_map_only(Tensor, lambda tensor: tensor.to(parameter.device), batch)


def run_batches(model: nn.Module, batches: Iterable[Any], limit: int, forward: Forward | None = None) -> int:
    """Run up to `limit` batches; returns how many there were. Raises ValueError if there was none."""
    count = 0
    for batch in itertools.islice(iter(batches), limit):
        (forward or call_model)(model, to_device(batch, model))
        count += 1
    if not count:
        raise ValueError("calibration got no batch: the data is empty, or was used up by an earlier pass over an iterator")
    return count
