"""What `lq.sensitivity` measures a model by: its output's noise, its loss, or a metric that validation logs."""

from __future__ import annotations

import contextlib
import copy
import functools
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

import lightning as L
import torch
from lightning.pytorch.callbacks import ProgressBar
from lightning.pytorch.utilities.model_helpers import is_overridden
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.data import DataLoader

from lightning_quant.calibration import Forward, all_reduce, call_model, evaluating, has_ranks
from lightning_quant.loop import _borrowed, _step_arguments, _undone, find_step, run_lightning
from lightning_quant.surgery import fake_modules

# measures the model as it is now: what it has lost against the float one
Score = Callable[[], float]


class Probe(Protocol):
    """One way to measure a model; `baseline` is what the float one has, if that is a number.

    `session` takes a model whose quantizers are off, measures it, and calls its second argument with what measures it again.
    """

    baseline: float | None

    def session(self, model: nn.Module, measure: Callable[[Score], None]) -> None: ...


@contextlib.contextmanager
def same_draws() -> Iterator[None]:
    """Every pass draws the same random numbers: a step's noise is none of the quantization's."""
    with torch.random.fork_rng(devices=range(torch.cuda.device_count()) if torch.cuda.is_initialized() else []):
        yield


@contextlib.contextmanager
def _without_bars(trainer: L.Trainer) -> Iterator[None]:
    callbacks = trainer.callbacks  # type: ignore[attr-defined]
    trainer.callbacks = [each for each in callbacks if not isinstance(each, ProgressBar)]  # type: ignore[attr-defined]
    try:
        yield
    finally:
        trainer.callbacks = callbacks  # type: ignore[attr-defined]


@contextlib.contextmanager
def _extended(model: nn.Module, **members: Any) -> Iterator[None]:
    """The model's class with members replaced, for a while; the class itself is then its `_own_type`."""
    cls = type(model)
    model.__class__ = type(f"Measured{cls.__name__}", (cls,), {**members, "_own_type": cls})
    try:
        yield
    finally:
        model.__class__ = cls


def _over_ranks(total: float, count: float, model: nn.Module) -> tuple[float, float]:
    """Sums over all ranks, so that each comes to the same numbers."""
    if not has_ranks():
        return total, count
    device = next((parameter.device for parameter in model.parameters()), None)
    both = torch.tensor([total, count], dtype=torch.float32 if device and device.type == "mps" else torch.float64, device=device)
    all_reduce(both, "sum")
    return both[0].item(), both[1].item()


@dataclass
class Batches:
    """Batches that were fetched once, and how a model runs them.

    Args:
        forward: the user's own function, instead of a step or `model(batch)`.
        trainer: runs a LightningModule's steps in its evaluation loop; None: the model is called directly.
        kept: (batch, index of its dataloader).
    """

    forward: Forward | None
    trainer: L.Trainer | None
    kept: list[tuple[Any, int]] = field(default_factory=list)

    def keep(self, model: nn.Module, batch: Any) -> None:
        trainer: Any = self.trainer
        results = None if trainer is None else trainer._results
        self.kept.append((batch, getattr(results, "dataloader_idx", None) or 0))

    def inside(self, model: nn.Module, body: Callable[[], None]) -> None:
        """Call `body` where steps can run: in eval mode, without gradients, attached to the trainer if there is one."""
        if self.trainer is None:
            with evaluating(model):
                body()
            return
        same = {  # the batches went through these already
            "on_before_batch_transfer": lambda self, batch, dataloader_idx: batch,
            "transfer_batch_to_device": lambda self, batch, device, dataloader_idx: batch,
            "on_after_batch_transfer": lambda self, batch, dataloader_idx: batch,
        }
        with _extended(model, **same), _without_bars(self.trainer):
            run_lightning(model, lambda *_: body(), None, DataLoader([0]), self.trainer, 1)  # type: ignore[arg-type]

    def run(self, model: nn.Module, step: str | None = None) -> Iterator[Any]:
        """What each batch's step returns; `step` is the name of one, by default that of calibration. Only `inside`."""
        call = self._step(model, step)
        with same_draws():
            for index, (batch, loader) in enumerate(self.kept):
                # a step may write into its batch
                own = tree_map(lambda leaf: leaf.clone() if isinstance(leaf, Tensor) else copy.copy(leaf), batch)
                yield call(own, index, loader)

    def _step(self, model: nn.Module, step: str | None) -> Callable[[Any, int, int], Any]:
        if self.forward is not None or self.trainer is None:
            forward = self.forward or call_model
            return lambda batch, index, loader: forward(model, batch)
        name = step or find_step(model, None)  # type: ignore[arg-type]
        if name == "validation_step":  # the evaluation loop's own is another one now
            own: Any = model._own_type
            bound = functools.partial(getattr(own, name), model)
            for hook in ("on_validation_start", "on_validation_epoch_start"):
                getattr(own, hook)(model)
        else:
            bound = getattr(model, str(name))
        return lambda batch, index, loader: bound(*_step_arguments(bound, batch, index, loader))


# --- the output's noise ---------------------------------------------------------------------------------------------


class _Outermost:
    """What the last outermost call of a part with quantized layers returned: a step may return nothing."""

    def __init__(self) -> None:
        self.depth, self.found = 0, False
        self.output: Any = None

    @contextlib.contextmanager
    def watch(self, model: nn.Module) -> Iterator[None]:
        parts = {name.rsplit(".", depth)[0] for name in fake_modules(model) for depth in range(name.count(".") + 1)}
        handles = []
        for name in {"", *parts}:
            part = model.get_submodule(name)
            handles.append(part.register_forward_pre_hook(self._enter))
            handles.append(part.register_forward_hook(self._leave))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _enter(self, *_: Any) -> None:
        self.depth += 1

    def _leave(self, module: nn.Module, args: Any, output: Any) -> None:
        self.depth -= 1
        if self.depth == 0:
            self.output, self.found = output, True

    def take(self) -> Any:
        if not self.found:
            raise ValueError(
                "the module's step calls no part that has quantized layers, so its output is unknown: pass "
                "forward=lambda model, batch: ... that returns the output"
            )
        output, self.output, self.found, self.depth = self.output, None, False, 0
        return output


def main_output(output: Any) -> Tensor:
    """The float tensor of an output that is compared: `logits` if it has them, else the largest one.

    Raises:
        ValueError: it holds no float tensor.
    """
    logits = output.get("logits") if isinstance(output, Mapping) else getattr(output, "logits", None)
    if isinstance(logits, Tensor) and logits.is_floating_point():
        return logits
    found = [leaf for leaf in tree_leaves(output) if isinstance(leaf, Tensor) and leaf.is_floating_point()]
    if isinstance(output, Mapping):  # one that is no node of torch's trees
        found += [value for value in output.values() if isinstance(value, Tensor) and value.is_floating_point()]
    if not found:
        raise ValueError(
            f"the model's output ({type(output).__name__}) holds no float tensor to compare: pass forward=lambda model, batch: ... "
            f"that returns one, or measure by='loss'"
        )
    return max(found, key=Tensor.numel)


def noise_power(got: Tensor, want: Tensor) -> tuple[float, float]:
    """Sums of squares of the error and of the signal, where the signal is finite (masked logits are not)."""
    if got.shape != want.shape:
        raise ValueError(
            f"the quantized model's output has shape {list(got.shape)}, the float one's {list(want.shape)}: pass "
            f"forward=lambda model, batch: ... that returns an output of fixed shape, or measure by='loss'"
        )
    got, want = got.float(), want.float()
    finite = want.isfinite()
    if not finite.all():
        got, want = got[finite], want[finite]
    return (got - want).square().sum(dtype=torch.float64).item(), want.square().sum(dtype=torch.float64).item()


class OutputProbe:
    """Noise power over signal power of the model's final output."""

    def __init__(self, batches: Batches) -> None:
        self.batches = batches
        self.baseline: float | None = None

    def session(self, model: nn.Module, measure: Callable[[Score], None]) -> None:
        def body() -> None:
            want = list(self._outputs(model))

            def score() -> float:
                pairs = [noise_power(output, float_) for output, float_ in zip(self._outputs(model), want, strict=True)]
                noise, signal = _over_ranks(sum(pair[0] for pair in pairs), sum(pair[1] for pair in pairs), model)
                if not signal > 0:
                    raise ValueError("the float model's output is zero or not finite everywhere, so it has no noise ratio")
                return noise / signal if math.isfinite(noise) else math.inf

            measure(score)

        self.batches.inside(model, body)

    def _outputs(self, model: nn.Module) -> Iterator[Tensor]:
        if self.batches.forward is not None or self.batches.trainer is None:
            yield from (main_output(output).detach().clone() for output in self.batches.run(model))
            return
        outermost = _Outermost()
        with outermost.watch(model):
            for _ in self.batches.run(model):
                yield main_output(outermost.take()).detach().clone()


# --- the loss -------------------------------------------------------------------------------------------------------


def find_loss(output: Any) -> float | None:
    """A loss in what a step or model returned: a scalar, `["loss"]` or `.loss`."""
    if isinstance(output, Mapping):
        output = output.get("loss")
    elif not isinstance(output, (Tensor, float, int)):
        output = getattr(output, "loss", None)
    if isinstance(output, Tensor):
        return output.item() if output.numel() == 1 else None
    return float(output) if isinstance(output, (float, int)) and not isinstance(output, bool) else None


class LossProbe:
    """The increase of the loss, a mean over batches."""

    def __init__(self, batches: Batches) -> None:
        self.batches = batches
        self.baseline: float | None = None
        self.step: str | None = None

    def session(self, model: nn.Module, measure: Callable[[Score], None]) -> None:
        def body() -> None:
            self.step = self._find_step(model)
            start = self._loss(model)
            if not math.isfinite(start):
                raise ValueError(f"the float model's loss is {start}: nothing can be measured by it")
            if self.baseline is None:
                self.baseline = start

            def score() -> float:
                loss = self._loss(model)
                return loss - start if math.isfinite(loss) else math.inf

            measure(score)

        self.batches.inside(model, body)

    def _find_step(self, model: nn.Module) -> str | None:
        """The first step that returns a loss."""
        if self.step is not None or self.batches.forward is not None or self.batches.trainer is None:
            return self.step
        assert isinstance(model, L.LightningModule)
        own: Any = type(model)._own_type  # type: ignore[attr-defined]
        names = ["validation_step"] if own.validation_step is not L.LightningModule.validation_step else []
        if is_overridden("training_step", model) and model.automatic_optimization:
            names.append("training_step")
        for name in names:
            if find_loss(next(self.batches.run(model, name))) is not None:
                return name
        raise ValueError(
            f"{' and '.join(names) or 'no step'} of {own.__name__} return no loss: return a scalar or {{'loss': ...}} from "
            f"validation_step, or pass forward=lambda model, batch: ... that returns the loss"
        )

    def _loss(self, model: nn.Module) -> float:
        losses = []
        for output in self.batches.run(model, self.step):
            loss = find_loss(output)
            if loss is None:
                raise ValueError(
                    f"by='loss': {type(output).__name__} holds no loss. Batches need labels and the model to return .loss, or pass "
                    f"forward=lambda model, batch: ... that returns a scalar"
                )
            losses.append(loss)
        total, count = _over_ranks(math.fsum(losses), len(losses), model)
        return total / count


# --- a metric -------------------------------------------------------------------------------------------------------


@dataclass
class MetricProbe:
    """How much worse a metric gets that `trainer.validate` logs, on the first `limit` batches of each validation dataloader."""

    name: str
    mode: str
    trainer: L.Trainer
    datamodule: L.LightningDataModule | None
    dataloaders: Any
    limit: int
    baseline: float | None = None

    def session(self, model: nn.Module, measure: Callable[[Score], None]) -> None:
        # the model is built, and its own callbacks are for training
        with _extended(model, configure_callbacks=lambda self: [], configure_model=lambda self: None):
            start = self._validate(model)
            if not math.isfinite(start):
                raise ValueError(f"the float model's {self.name} is {start}: nothing can be measured by it")
            if self.baseline is None:
                self.baseline = start

            def score() -> float:
                value = self._validate(model)
                worse = start - value if self.mode == "max" else value - start
                return worse if math.isfinite(value) else math.inf

            measure(score)

    def _validate(self, model: nn.Module) -> float:
        assert isinstance(model, L.LightningModule)
        device = next((parameter.device for parameter in model.parameters()), torch.device("cpu"))
        with _without_bars(self.trainer), _borrowed(self.trainer, self.limit), _undone(model), same_draws():
            data = {"dataloaders": self.dataloaders, "datamodule": self.datamodule}
            logged = self.trainer.validate(model, verbose=False, **data)
            model.to(device)
        values = {name: value for part in logged for name, value in part.items()}
        if self.name not in values:
            raise ValueError(f"by={self.name!r}: validation logs no such metric; it logs {', '.join(values) or 'none'}")
        total, count = _over_ranks(float(values[self.name]), 1, model)
        return total / count
