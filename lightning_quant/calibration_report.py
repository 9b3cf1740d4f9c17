"""`lq.calibration_report`: how well the calibration set represented the validation set."""

from __future__ import annotations

import contextlib
import copy
import itertools
import random
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import lightning as L
import numpy as np
import torch
from lightning.pytorch.utilities import CombinedLoader
from lightning.pytorch.utilities.model_helpers import is_overridden
from torch import nn
from torch.utils.data import DataLoader

from lightning_quant.calibration import Forward, call_model, evaluating, has_ranks, quantizers, to_device
from lightning_quant.coverage import CalibrationReport, coverage_report
from lightning_quant.loop import _step_arguments, calibration_data, combined, find_step, run_lightning
from lightning_quant.watching import Watch, find_probes

# runs one of the two sets through the model, watched
Run = Callable[[Watch], None]


def calibration_report(
    qmodel: nn.Module,
    *,
    datamodule: L.LightningDataModule | None = None,
    calibration: Any = None,
    validation: Any = None,
    forward: Forward | None = None,
    trainer: L.Trainer | None = None,
    batches: int = 128,
) -> CalibrationReport:
    """Run both sets through a quantized model, and tell what calibration did not represent of validation.

    A layer is named if validation leaves its range (the one that is packed; where there is none, the one that calibration shows)
    or is distributed differently, and inputs if calibration has nothing like them (a class, a length, a size, tokens); each only
    if it matters, and if samples of one set and its halves do not differ as much by chance. A `LightningModule` runs in Lightning's
    evaluation loop, as in `lq.quantize`: validation through its `validation_step` where it has one. The model, its metrics, the
    trainer's state and the global random states are left as they were.

    Args:
        qmodel: what `lq.quantize` or `trainer.quantize` returned, or a model prepared for QAT.
        datamodule: with `calibration_dataloader()`, else `train_dataloader()`, and `val_dataloader()`; by default the trainer's, or
            the module's own dataloaders.
        calibration, validation: dataloaders or other iterables of batches, each in place of the datamodule's. A batch is what the
            module's step takes; for an `nn.Module`, what `forward` takes (a tensor, a tuple or a mapping).
        forward: `forward(model, batch)` instead of the module's own step.
        trainer: whose device and precision to use for a `LightningModule`.
        batches: how many batches of each set (of each of its dataloaders) to use at most.

    Returns:
        the report; it prints as a table, `.findings` holds sentences, `.rows` the layers, `.worst(n)` the worst of them.

    Raises:
        ValueError: the model is in float, a set is missing or empty, or there are several processes.

    Example:
        >>> import lightning_quant as lq
        >>> _ = torch.manual_seed(0)
        >>> net = nn.Sequential(nn.Linear(8, 4), nn.ReLU(), nn.Linear(4, 2))
        >>> small, large = torch.rand(64, 8), 5 * torch.rand(64, 8)
        >>> qnet = lq.quantize(net, "w8a8", batches=[small])
        >>> report = lq.calibration_report(qnet, calibration=[small], validation=[large])
        >>> report.worst(1)[0].name, report.worst(1)[0].outside > 0.5
        ('0', True)
        >>> lq.calibration_report(qnet, calibration=[small], validation=[torch.rand(64, 8)]).findings
        []
    """
    if isinstance(batches, bool) or not isinstance(batches, int) or batches < 1:
        raise ValueError(f"batches={batches!r}: must be a positive int")
    if has_ranks() or getattr(trainer, "world_size", 1) > 1:
        raise ValueError("the report is of one process: call it in one, with a trainer of devices=1")
    if datamodule is not None and calibration is not None and validation is not None:
        raise ValueError("datamodule, calibration and validation were given: choose the datamodule's sets or those")
    qmodel = getattr(qmodel, "_orig_mod", qmodel)  # torch.compile's wrapper
    probes = find_probes(qmodel)
    if getattr(trainer, "fast_dev_run", False):
        batches = 1
    if trainer is not None and datamodule is None:
        datamodule = getattr(trainer, "datamodule", None)
    runs = {
        "calibration": _find_run(qmodel, "calibration", calibration, datamodule, forward, trainer, batches),
        "validation": _find_run(qmodel, "validation", validation, datamodule, forward, trainer, batches),
    }
    watches: list[Watch] = []
    with _kept_rng(), _not_observing(qmodel):
        for name, run in runs.items():
            watch = Watch(probes, watches[0] if watches else None)
            with watch.hooked():
                _run_some(run, watch, name)
            watches.append(watch)
    return coverage_report(*watches)


def _run_some(run: Run, watch: Watch, name: str) -> None:
    empty = f"the {name} set gave no batch: it is empty, or an iterator that was used up before"
    try:
        run(watch)
    except ValueError as error:
        if not watch.data.sizes and "got no batch" in str(error):
            raise ValueError(empty) from None
        raise
    if not watch.data.sizes:
        raise ValueError(empty)


@contextlib.contextmanager
def _kept_rng() -> Iterator[None]:
    """Loaders shuffle and augment with the user's random states, and give them back as they were."""
    states = random.getstate(), np.random.get_state()
    try:
        with torch.random.fork_rng(devices=range(torch.cuda.device_count()) if torch.cuda.is_initialized() else []):
            yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])


@contextlib.contextmanager
def _not_observing(model: nn.Module) -> Iterator[None]:
    """A prepared model's ranges stay as they are."""
    before = [(quantizer, quantizer.observing) for quantizer in quantizers(model) if not quantizer.is_weight]
    for quantizer, _ in before:
        quantizer.observing = False
    try:
        yield
    finally:
        for quantizer, was in before:
            quantizer.observing = was


# --- where the data comes from --------------------------------------------------------------------------------------


def _find_run(
    module: nn.Module,
    name: str,
    source: Any,
    datamodule: L.LightningDataModule | None,
    forward: Forward | None,
    trainer: L.Trainer | None,
    limit: int,
) -> Run:
    """Raises ValueError if there is no such set."""
    if isinstance(source, (str, bytes, torch.Tensor, dict)):
        raise ValueError(f"{name} is a {type(source).__name__}: give an iterable of batches, such as [batch] or a DataLoader")
    lightning = isinstance(module, L.LightningModule)
    if source is None and datamodule is None and trainer is not None and lightning and not _has(module, name):
        source = combined(trainer.train_dataloader) if name == "calibration" else trainer.val_dataloaders
    owner: Any = None
    if source is None:
        owner = datamodule if datamodule is not None else module if lightning else None
        if owner is None or not _has(owner, name):
            method = "calibration_dataloader() or train_dataloader()" if name == "calibration" else "val_dataloader()"
            missing = f"{type(owner).__name__} has no {method}" if owner is not None else "no datamodule was given"
            raise ValueError(f"no {name} data: {missing}; give {name}=, a DataLoader or another iterable of batches")
    if not lightning:
        loader = source if owner is None else _Loader(owner, name)
        return lambda watch: _run_plain(module, loader, forward, limit, watch)
    assert isinstance(module, L.LightningModule)
    step = find_step(module, forward)
    if forward is None and name == "validation" and is_overridden("validation_step", module):
        step = "validation_step"
    return lambda watch: _run_watched(module, step, owner, _as_loader(source), name, trainer, limit, watch)


def _has(owner: Any, name: str) -> bool:
    if name == "calibration":
        return hasattr(owner, "calibration_dataloader") or is_overridden("train_dataloader", owner)
    return is_overridden("val_dataloader", owner)


class _Loader:
    """One set of a datamodule, for a plain `nn.Module`."""

    def __init__(self, datamodule: L.LightningDataModule, name: str) -> None:
        self.datamodule, self.name = datamodule, name

    def __iter__(self) -> Iterator[Any]:
        self.datamodule.prepare_data()
        self.datamodule.setup("fit")
        if self.name == "calibration":
            return iter(calibration_data(self.datamodule))
        found = self.datamodule.val_dataloader()
        several = found.values() if isinstance(found, dict) else found if isinstance(found, (list, tuple)) else [found]
        return itertools.chain.from_iterable(several)


class _Batches:
    """An iterable of batches as one dataloader: Lightning takes a list for several."""

    def __init__(self, batches: Iterable[Any]) -> None:
        self.batches = batches

    def __iter__(self) -> Iterator[Any]:
        return iter(self.batches)


def _as_loader(source: Any) -> Any:
    if source is None or isinstance(source, (DataLoader, CombinedLoader)):
        return source
    if isinstance(source, (list, tuple)) and source and all(isinstance(each, DataLoader) for each in source):
        return source
    return _Batches(source)


# --- running --------------------------------------------------------------------------------------------------------


def _run_plain(module: nn.Module, batches: Iterable[Any], forward: Forward | None, limit: int, watch: Watch) -> None:
    with evaluating(module):
        for index, batch in enumerate(itertools.islice(iter(batches), limit)):
            watch.start(batch, index)
            (forward or call_model)(module, to_device(batch, module))


def _run_watched(
    module: L.LightningModule,
    step: str | Forward,
    owner: Any,
    loader: Any,
    name: str,
    trainer: L.Trainer | None,
    limit: int,
    watch: Watch,
) -> None:
    """Run in Lightning's evaluation loop, with a step that tells `watch` of each batch before it runs the module's own."""
    cls = type(module)
    called = "calibration_step" if callable(step) else step

    def watched(self: Any, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        watch.start(batch, batch_idx, dataloader_idx)
        if callable(step):
            step(self, batch)
            return
        bound = getattr(super(kind, self), called)
        bound(*_step_arguments(bound, batch, batch_idx, dataloader_idx))

    members: dict[str, Any] = {called: watched}
    if owner is module and name == "validation":
        members["calibration_dataloader"] = cls.val_dataloader
    kind = type(cls.__name__, (cls,), members)
    module.__class__ = kind
    try:
        data = owner if isinstance(owner, L.LightningDataModule) else None
        run_lightning(
            module, called, _validating(data) if data is not None and name == "validation" else data, loader, trainer, limit
        )
    finally:
        module.__class__ = cls


def _validating(datamodule: L.LightningDataModule) -> L.LightningDataModule:
    """A shallow copy that serves its validation data as what calibration runs."""
    cls = type(datamodule)
    data = copy.copy(datamodule)
    data.__class__ = type(cls.__name__, (cls,), {"calibration_dataloader": lambda self: cls.val_dataloader(self)})
    return data
