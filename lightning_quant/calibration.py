"""Calibration: run data through a prepared model while its observers watch, in evaluation mode and without gradients."""

from __future__ import annotations

import contextlib
import inspect
import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils._pytree import tree_map_only

from lightning_quant.fake_quant import FakeQuantize
from lightning_quant.kernels.kept import Kept
from lightning_quant.sharding import is_managed, reshard
from lightning_quant.surgery import fake_modules


class Enough(Exception):
    """Ends a calibration batch, all that was wanted of it having been seen."""


Forward = Callable[[nn.Module, Any], Any]


def quantizers(model: nn.Module) -> Iterator[FakeQuantize]:
    """All quantizers of a prepared model, weights' and activations'."""
    for module in fake_modules(model).values():
        for _, quantizer in module.quantizers():
            yield quantizer


def set_flags(
    model: nn.Module,
    *,
    observing: bool | None = None,
    following: bool | None = None,
    quantizing: bool | None = None,
    activations: bool | None = None,
) -> None:
    """Switch observers and fake quantization on or off; None leaves a flag as it is. The structure stays.

    Args:
        observing: whether activations' observers watch.
        following: whether ranges of weights follow the weights; when it ends they stay as they are then.
        quantizing: fake quantization; when it starts, learned scales of weights start from the weights as they are then.
        activations: fake quantization of activations; by default as `quantizing`.
    """
    activations = quantizing if activations is None else activations
    reshard(model)
    for module in fake_modules(model).values():
        parts = [quantizer for _, quantizer in module.quantizers()]
        starts = quantizing is True and not all(part.quantizing for part in parts if part.is_weight)
        freezes = following is False and any(part.observing for part in parts if part.is_weight)
        if starts or freezes:
            module.follow_weights()
        if activations is not None:
            module.quantizes_activations = activations
        for part in parts:
            observed = following if part.is_weight else observing
            if observed is not None and part.observing != observed:
                part.observing = observed
            quantized = quantizing if part.is_weight else activations
            if quantized is not None and part.quantizing != quantized:
                part.quantizing = quantized


def set_bits(model: nn.Module, bits: int) -> bool:
    """Give every integer of a prepared model at least so many bits, with new ranges; says whether this changed anything.

    Ranges of weights are found anew from the weights, as when they were first quantized, and so are those of activations whose
    scales learn, from the next batch: the best range of a narrower grid is smaller than that of a wider one.
    """
    reshard(model)
    changed = [module.widen(bits) for module in fake_modules(model).values()]
    return any(changed)


def set_share(model: nn.Module, share: float) -> None:
    """In training steps quantize only so many of each weight's elements, chosen anew each time; 1: all."""
    for quantizer in quantizers(model):
        if quantizer.is_weight:
            quantizer.share = share


def keep_weights(model: nn.Module, keep: bool) -> None:
    """Whether weights that are used several times before they change are quantized once; `drop_weights` ends each such time."""
    for quantizer in quantizers(model):
        if quantizer.is_weight:
            quantizer.kept = Kept() if keep and not is_managed(quantizer) else None


def drop_weights(model: nn.Module) -> None:
    """Forget quantized weights, since the weights are about to change."""
    for quantizer in quantizers(model):
        if quantizer.kept is not None:
            quantizer.kept.drop()


def measure_weights(model: nn.Module) -> None:
    """Bring the ranges of weights that follow them up to date."""
    reshard(model)
    for module in fake_modules(model).values():
        if any(part.is_weight and part.observing and part.quantizing for _, part in module.quantizers()):
            module.follow_weights()


def finish_observing(model: nn.Module) -> None:
    """Turn what was observed since the last time into scales and zero points."""
    reshard(model)
    for quantizer in quantizers(model):
        quantizer.update_qparams()


def has_ranks() -> bool:
    """Whether several processes work together."""
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def all_reduce(tensor: Tensor, op: str) -> None:
    """Merge a tensor over ranks in place; `op` is one of min, max, sum."""
    operations = {"min": dist.ReduceOp.MIN, "max": dist.ReduceOp.MAX, "sum": dist.ReduceOp.SUM}
    dist.all_reduce(tensor, operations[op])


def _observed(model: nn.Module) -> list[FakeQuantize]:
    return [quantizer for quantizer in quantizers(model) if not quantizer.is_weight and not quantizer.spec.dynamic]


def all_reduce_observers(model: nn.Module) -> None:
    """Give every rank the statistics of all ranks, as each observer's `reductions` say. Without a process group: nothing."""
    if not has_ranks():
        return
    for quantizer in _observed(model):
        quantizer.observer.all_reduce(all_reduce)
        quantizer._stale = True


@dataclass(frozen=True)
class _StepReduce:
    """Merges what one observer sees in a step over ranks, and notices if ranks are at different observers."""

    index: int
    name: str

    def __call__(self, tensor: Tensor, op: str) -> None:
        if op != "max":
            all_reduce(tensor, op)
            return
        mine = tensor.new_tensor([self.index, -self.index])
        both = torch.cat([tensor, mine])
        all_reduce(both, op)
        if not torch.equal(both[-2:], mine):
            raise RuntimeError(
                f"{self.name}: ranks ran different modules in one step, so its range cannot be merged. Let every rank run the same "
                f"modules, or give the modules that only some batches reach dynamic or no activation quantization"
            )
        tensor.copy_(both[:-2])


def link_ranks(model: nn.Module, linked: bool) -> None:
    """While linked, every observer sees the batches of all ranks, as one process would, and learned parameters are always used."""
    for index, quantizer in enumerate(_observed(model)):
        quantizer.observer.reduce = _StepReduce(index, quantizer.name) if linked else None
    for quantizer in quantizers(model):
        quantizer.linked = linked


@torch.no_grad()
def share_buffers(model: nn.Module) -> None:
    """Give every rank the buffers of rank 0, as DDP does at its next forward pass: BatchNorm statistics differ until then."""
    for buffer in model.buffers():
        dist.broadcast(buffer, 0)


@torch.no_grad()
def share_norms(model: nn.Module) -> None:
    """Give every rank the BatchNorm statistics of rank 0, in one message."""
    norms = [part for part in model.modules() if isinstance(part, _BatchNorm)]
    buffers = [buffer for norm in norms for buffer in norm.buffers() if buffer.is_floating_point()]
    if not buffers or not has_ranks():
        return
    flat = torch.cat([buffer.flatten().double() for buffer in buffers])
    dist.broadcast(flat, 0)
    for buffer, value in zip(buffers, flat.split([buffer.numel() for buffer in buffers]), strict=True):
        buffer.copy_(value.view_as(buffer))


def drop_linked_gradients(model: nn.Module) -> None:
    """Take away the zero gradients of learned parameters that are only linked, so that no optimizer counts a step for them."""
    for quantizer in quantizers(model):
        if quantizer.linked and quantizer.learned and not quantizer.quantizing:
            for parameter in quantizer.parameters():
                parameter.grad = None


def share_ranges(model: nn.Module, others: Iterable[nn.Module], weights: bool = True) -> None:
    """Give copies of a prepared model its quantizers' state, or only that of activations'."""
    for other in others:
        for mine, theirs in zip(quantizers(model), quantizers(other), strict=True):
            if weights or not mine.is_weight:
                theirs.load_state_dict(mine.state_dict())


@torch.no_grad()
def follow_ranges(model: nn.Module, averages: Iterable[nn.Module]) -> None:
    """Give averaged copies the ranges that were observed: an average of zero points, or of histograms, is none."""
    for other in averages:
        for mine, theirs in zip(quantizers(model), quantizers(other), strict=True):
            if not mine.spec.dynamic and not (theirs.scale != 0).all():  # a learned scale of which no average was taken yet
                theirs.load_state_dict(mine.state_dict())
            for buffer, value in zip(theirs.buffers(), mine.buffers(), strict=True):
                buffer.copy_(value)


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
        with contextlib.suppress(Enough):
            (forward or call_model)(model, to_device(batch, model))
        count += 1
    if not count:
        raise ValueError("calibration got no batch: the data is empty, or was used up by an earlier pass over an iterator")
    return count
