"""`lq.compare`: what quantization cost and gained, on the user's own metrics."""

from __future__ import annotations

import contextlib
import statistics
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import lightning as L
import torch
from lightning.pytorch.utilities.model_helpers import is_overridden
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only
from torchmetrics import Metric

from lightning_quant.calibration import evaluating, to_device
from lightning_quant.report import model_bytes, table


@dataclass(frozen=True)
class Comparison:
    """A float model beside its quantized one. Prints as a table.

    Args:
        metrics: name -> (float, quantized), as the module's validation logged them.
        bytes: (float, quantized) bytes of parameters and buffers.
        latency: (float, quantized) median seconds of one forward pass, timed in settled blocks.
        batch: the shape of the input timed.
    """

    metrics: dict[str, tuple[float, float]]
    bytes: tuple[int, int]
    latency: tuple[float, float]
    batch: str

    def __str__(self) -> str:
        rows = [(name, f"{before:.4f}", f"{after:.4f}", f"{after - before:+.4f}") for name, (before, after) in self.metrics.items()]
        size, speed = self.bytes, self.latency
        rows.append(("bytes", f"{size[0]:,}", f"{size[1]:,}", f"x {size[1] / max(size[0], 1):.3f}"))
        name = f"latency ms, {self.batch}"
        rows.append((name, f"{speed[0] * 1e3:.2f}", f"{speed[1] * 1e3:.2f}", f"x {speed[1] / speed[0]:.2f}"))
        return table(("", "float", "quantized", "change"), rows)


def compare(
    float_model: L.LightningModule,
    qmodel: L.LightningModule,
    trainer: L.Trainer | None = None,
    datamodule: L.LightningDataModule | None = None,
    dataloaders: Any = None,
) -> Comparison:
    """Validate both models, measure both, print the table and return it.

    Args:
        float_model, qmodel: two `LightningModule`s with the same validation.
        trainer: that validates them; by default a plain one.
        datamodule, dataloaders: validation data; by default the trainer's datamodule, or the module's own.

    Raises:
        ValueError: a model has no `validation_step`, or its validation logged nothing.
    """
    for model in (float_model, qmodel):
        if not isinstance(model, L.LightningModule) or not is_overridden("validation_step", model):
            raise ValueError(
                f"compare validates both models, but {type(model).__name__} is no LightningModule with a validation_step"
            )
    if trainer is None:
        quiet: dict[str, Any] = {"logger": False, "enable_checkpointing": False, "enable_model_summary": False}
        trainer = L.Trainer(accelerator="auto", devices=1, enable_progress_bar=False, **quiet)
    if datamodule is None and dataloaders is None:
        datamodule = getattr(trainer, "datamodule", None)
    results, call = [], _FirstCall()
    for model in (float_model, qmodel):
        with call.watch(model):
            logged = trainer.validate(model, dataloaders=dataloaders, datamodule=datamodule, verbose=False)
        results.append({name: value for part in logged for name, value in part.items()})
    if not results[0]:
        raise ValueError(f"the validation of {type(float_model).__name__} logged no metric: use self.log in validation_step")
    names = [name for name in results[0] if name in results[1]]
    with evaluating(float_model), evaluating(qmodel):
        latency = _latency(call.on(float_model), call.on(qmodel))
    comparison = Comparison(
        {name: (float(results[0][name]), float(results[1][name])) for name in names},
        (model_bytes(float_model), model_bytes(qmodel)),
        latency,
        call.shape,
    )
    if trainer.is_global_zero:
        print(comparison)
    return comparison


class _FirstCall:
    """The outermost module that validation calls, and the arguments it gets first."""

    def __init__(self) -> None:
        self.name: str | None = None
        self.arguments: tuple[tuple[Any, ...], dict[str, Any]] = ((), {})

    @contextlib.contextmanager
    def watch(self, model: nn.Module) -> Iterator[None]:
        """Hook every module until the first call; a second model is not watched."""
        handles = []
        for name, module in model.named_modules() if self.name is None else ():
            if not isinstance(module, Metric):
                handles.append(module.register_forward_pre_hook(self._hook(name), with_kwargs=True))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _hook(self, name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, kwargs: Any) -> None:
            if self.name is None:
                self.name = name
                self.arguments = tree_map_only(Tensor, lambda tensor: tensor.detach().clone(), (args, kwargs))

        return hook

    @property
    def shape(self) -> str:
        tensors = [leaf for leaf in torch.utils._pytree.tree_leaves(self.arguments) if isinstance(leaf, Tensor)]
        return " x ".join(map(str, tensors[0].shape)) if tensors else "one batch"

    def on(self, model: nn.Module) -> Callable[[], Any]:
        assert self.name is not None
        target = model.get_submodule(self.name)
        args, kwargs = to_device(self.arguments, model)

        def run() -> Any:
            return target(*args, **kwargs)

        return run


def _latency(first: Callable[[], Any], second: Callable[[], Any], blocks: int = 3, seconds: float = 0.3) -> tuple[float, float]:
    """Median seconds of each, in alternating settled blocks: one runtime's spinning threads are not charged to the other."""
    times: tuple[list[float], list[float]] = ([], [])
    with torch.inference_mode(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for _ in range(blocks):
            for run, taken in zip((first, second), times, strict=True):
                run()
                start = time.perf_counter()
                while time.perf_counter() - start < seconds / blocks or len(taken) < blocks:
                    begin = time.perf_counter()
                    run()
                    taken.append(time.perf_counter() - begin)
    return statistics.median(times[0]), statistics.median(times[1])
