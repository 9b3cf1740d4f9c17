"""Calibration in Lightning's evaluation loop: any LightningModule, without a hand-written loop, and nothing trains."""

from __future__ import annotations

import contextlib
import copy
import inspect
import random
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import lightning as L
import numpy as np
import torch
from lightning.pytorch.callbacks import ProgressBar
from lightning.pytorch.loggers.logger import DummyLogger
from lightning.pytorch.utilities import CombinedLoader
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.model_helpers import is_overridden
from torch import nn
from torch.utils._pytree import tree_map
from torch.utils.data import DataLoader, IterableDataset
from torchmetrics import Metric

from lightning_quant.calibration import Enough, Forward, to_device
from lightning_quant.fake_quant import FakeQuantize
from lightning_quant.nn.base import QuantizedModule
from lightning_quant.observers import Observer


def calibration_data(source: Any) -> Any:
    """A datamodule's, or module's, calibration data: `calibration_dataloader()`, else `train_dataloader()` as a fit iterates it."""
    return source.calibration_dataloader() if hasattr(source, "calibration_dataloader") else combined(source.train_dataloader())


def combined(loaders: Any) -> Any:
    """Several training dataloaders as the one whose batches a training step gets."""
    return CombinedLoader(loaders, "max_size_cycle") if isinstance(loaders, (dict, list, tuple)) else loaders


def find_step(module: L.LightningModule, forward: Forward | None) -> str | Forward:
    """The name of the module's step that calibration runs, or the user's own function."""
    if forward is not None:
        return forward
    if callable(getattr(module, "calibration_step", None)):
        return "calibration_step"
    for name in ("validation_step", "predict_step"):
        if is_overridden(name, module):
            return name
    if is_overridden("training_step", module) and module.automatic_optimization:
        return "training_step"
    if type(module).forward is not L.LightningModule.forward:
        return "predict_step"
    raise MisconfigurationException(
        f"{type(module).__name__} has no step that calibration can run: define calibration_step(batch, batch_idx), validation_step "
        f"or predict_step (training_step only under automatic optimization), or pass forward=lambda model, batch: ..."
    )


def _step_arguments(step: Callable[..., Any], *known: Any) -> tuple[Any, ...]:
    """As many of (batch, batch_idx, dataloader_idx) as a step has positional parameters, whatever they are called."""
    kinds = [parameter.kind for parameter in inspect.signature(step).parameters.values()]
    if inspect.Parameter.VAR_POSITIONAL in kinds:
        return known
    return known[: sum(kind in (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD) for kind in kinds)]


def _calibration_class(cls: type, step: str | Forward) -> type:
    """The module's class with a `validation_step` that runs `step`, and hooks of other steps' loops left out."""

    def validation_step(self: Any, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        with contextlib.suppress(Enough):
            if callable(step):
                step(self, batch)
                return
            bound = getattr(super(calibration, self) if step == "validation_step" else self, step)
            bound(*_step_arguments(bound, batch, batch_idx, dataloader_idx))

    members: dict[str, Any] = {
        "validation_step": validation_step,
        "configure_callbacks": lambda self: [],
        "configure_model": lambda self: None,
        "val_dataloader": lambda self: calibration_data(self),
    }
    if step != "validation_step":  # its own epoch-end hooks expect what a validation step collects
        for hook in ("start", "epoch_start", "batch_start", "batch_end", "epoch_end", "end"):
            members[f"on_validation_{hook}"] = lambda self, *args, **kwargs: None
    calibration = type(f"Calibration{cls.__name__}", (cls,), members)
    return calibration


def _calibration_datamodule(datamodule: L.LightningDataModule) -> L.LightningDataModule:
    """A shallow copy that serves the calibration data to the evaluation loop; the user's own stays as it is."""
    cls = type(datamodule)
    members = {
        "val_dataloader": lambda self: calibration_data(self),
        "setup": lambda self, stage: cls.setup(self, "fit"),
        "teardown": lambda self, stage: cls.teardown(self, "fit"),
    }
    data = copy.copy(datamodule)
    data.__class__ = type(f"Calibration{cls.__name__}", (cls,), members)
    return data


@contextlib.contextmanager
def _borrowed(trainer: L.Trainer, limit: int) -> Iterator[None]:
    """Swap a trainer's callbacks, loggers, limits and results, and put all of them back."""
    strategy, connector, loop = trainer.strategy, trainer._logger_connector, trainer.validate_loop
    fit, fit_val = trainer.fit_loop, trainer.fit_loop.epoch_loop.val_loop
    places: list[tuple[Any, str]] = [
        (trainer, "callbacks"),
        (trainer, "loggers"),
        (trainer, "limit_val_batches"),
        (trainer, "datamodule"),
        (trainer.state, "fn"),
        (trainer.state, "status"),
        (trainer.state, "stage"),
        (strategy, "_lightning_module"),
        (strategy, "model"),
        (strategy, "_device_mesh"),
        (connector, "_callback_metrics"),
        (connector, "_logged_metrics"),
        (connector, "_progress_bar_metrics"),
        (loop, "inference_mode"),
        (loop, "_results"),  # holds the metrics of the model validated last, and resets them
        (loop, "verbose"),
        (trainer._data_connector, "_datahook_selector"),
        *((each, "_combined_loader") for each in (fit, fit_val, loop, trainer.test_loop, trainer.predict_loop)),
        *((each._data_source, "instance") for each in (fit, fit_val, loop, trainer.test_loop, trainer.predict_loop)),
    ]
    before = [(owner, name, getattr(owner, name)) for owner, name in places if hasattr(owner, name)]
    kept = [callback for callback in trainer.callbacks if isinstance(callback, ProgressBar)]  # type: ignore[attr-defined]
    trainer.callbacks = kept  # type: ignore[attr-defined]
    trainer.loggers = [DummyLogger()]  # steps may use self.logger.experiment
    trainer.limit_val_batches = limit
    loop.inference_mode = False
    loop._results = type(loop._results)(training=False)
    try:
        yield
    finally:
        for owner, name, value in before:
            setattr(owner, name, value)


@contextlib.contextmanager
def _undone(model: nn.Module) -> Iterator[None]:
    """Undo what steps write: metrics, plain attributes and buffers, but not quantizers."""
    metrics = [
        (
            part,
            copy.deepcopy(
                {name: getattr(part, name) for name in (*part._defaults, "_update_count", "_computed", "_forward_cache")}
            ),
        )
        for part in model.modules()
        if isinstance(part, Metric)
    ]
    not_theirs = (FakeQuantize, QuantizedModule, Observer, Metric)
    attributes = [
        (part, _plain_attributes(part), set(part.__dict__)) for part in model.modules() if not isinstance(part, not_theirs)
    ]
    for part, values, _ in attributes:
        part.__dict__.update(copy.deepcopy(values))  # steps write into copies, and the originals come back
    ours = {id(buffer) for part in model.modules() if isinstance(part, FakeQuantize) for buffer in part.buffers()}
    buffers = [(buffer, buffer.detach().clone()) for buffer in model.buffers() if id(buffer) not in ours]
    try:
        yield
    finally:
        for metric, state in metrics:
            for name, value in state.items():
                setattr(metric, name, value)
        for part, values, known in attributes:
            for name in [key for key in part.__dict__ if key not in known and not key.startswith("_")]:
                del part.__dict__[name]
            part.__dict__.update(values)
        with torch.no_grad():
            for buffer, value in buffers:
                buffer.copy_(value)


def _plain_attributes(part: nn.Module) -> dict[str, Any]:
    plain = (bool, int, float, str, list, dict, set, tuple, type(None))
    return {
        key: value
        for key, value in part.__dict__.items()
        if isinstance(value, plain) and not key.startswith("_") and key != "training" and not _holds_modules(value)
    }


def _holds_modules(value: Any) -> bool:
    leaves = torch.utils._pytree.tree_leaves(value)
    return any(isinstance(leaf, nn.Module) for leaf in leaves)


def _quiet_trainer() -> L.Trainer:
    return L.Trainer(
        accelerator="auto",
        devices=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )


def run_lightning(
    model: L.LightningModule,
    step: str | Forward,
    datamodule: L.LightningDataModule | None,
    dataloaders: Any,
    trainer: L.Trainer | None,
    limit: int,
) -> None:
    trainer = trainer or _quiet_trainer()
    cls = type(model)
    data = None if datamodule is None else _calibration_datamodule(datamodule)
    device = next((parameter.device for parameter in model.parameters()), torch.device("cpu"))
    model.__class__ = _calibration_class(cls, step)
    with _borrowed(trainer, limit), _undone(model), warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*sampler has shuffling enabled.*")
        try:
            if data is not None:
                trainer.validate(model, datamodule=data, verbose=False)
            else:
                trainer.validate(model, dataloaders=dataloaders, verbose=False)
            seen = trainer.validate_loop.batch_progress.current.ready
        finally:
            model.__class__ = cls
            model.to(device)
    if not seen:
        raise ValueError("calibration got no batch: the dataloader is empty")


# --- an example from within a fit -----------------------------------------------------------------------------------


def example_call(trainer: L.Trainer, module: L.LightningModule, stage: str) -> Callable[[], Any]:
    """Runs a module on `example_input_array`, or on the first batch of the running stage through its own step.

    Leaves the module, its metrics and the random state as they were, and logs nothing. It may raise: a user's step need not
    run this early.
    """

    def forward() -> Any:
        example = to_device(module.example_input_array, module)
        if isinstance(example, tuple):
            return module(*example)
        return module(**example) if isinstance(example, dict) else module(example)

    def step() -> Any:
        name, batch = _first_batch(trainer, module, stage)
        cls = type(module)
        silent = {method: lambda self, *args, **kwargs: None for method in ("log", "log_dict")}
        module.__class__ = type(f"Example{cls.__name__}", (cls,), silent)
        try:
            bound = getattr(module, name)
            return bound(*_step_arguments(bound, batch, 0, 0))
        finally:
            module.__class__ = cls

    def run() -> Any:
        loggers, states = trainer.loggers, (random.getstate(), np.random.get_state())
        trainer.loggers = [DummyLogger()] if loggers else []
        try:
            with _undone(module), torch.random.fork_rng(devices=[]):
                return forward() if module.example_input_array is not None else step()
        finally:
            trainer.loggers = loggers
            random.setstate(states[0])
            np.random.set_state(states[1])

    return run


def _first(loader: Any) -> Any:
    """A loader's batch of the dataset's first samples, without a draw from its sampler, generator or workers."""
    if not isinstance(loader, DataLoader):
        return next(iter(loader))
    if isinstance(loader.dataset, IterableDataset):
        raise ValueError("the data is a stream, whose first batch might be lost")
    if loader.batch_size is None and loader.batch_sampler is None:
        return loader.collate_fn(loader.dataset[0])
    count = min(getattr(loader.batch_sampler, "batch_size", 2), len(loader.dataset))  # type: ignore[arg-type]
    return loader.collate_fn([loader.dataset[index] for index in range(count)])


def _first_batch(trainer: L.Trainer, module: L.LightningModule, stage: str) -> tuple[str, Any]:
    """The step to run and its batch. Raises ValueError if there is none that can be had without taking it from the run."""
    loops: dict[str, tuple[Any, str]] = {
        "fit": (trainer.fit_loop, "training_step"),
        "validate": (trainer.validate_loop, "validation_step"),
        "test": (trainer.test_loop, "test_step"),
        "predict": (trainer.predict_loop, "predict_step"),
    }
    loop, name = loops[stage]
    if name == "training_step" and not module.automatic_optimization:
        loop, name = trainer.fit_loop.epoch_loop.val_loop, "validation_step"
    if not loop._data_source.is_defined() or not is_overridden(name, module):
        raise ValueError(f"{type(module).__name__} has no {name} with data that could serve as an example")
    loaders = loop._data_source.dataloader()
    if not isinstance(loaders, CombinedLoader):
        loaders = CombinedLoader(loaders, "max_size_cycle" if name == "training_step" else "sequential")
    if any(isinstance(loader, Iterator) for loader in loaders.flattened):
        raise ValueError("the data is an iterator, whose first batch would be lost")
    batch = tree_map(_first, loaders.iterables, is_leaf=lambda value: hasattr(value, "dataset"))
    if loaders._mode == "sequential":
        batch = torch.utils._pytree.tree_leaves(loaders.iterables, is_leaf=lambda value: hasattr(value, "dataset"))[0]
        batch = _first(batch)
    device = next((parameter.device for parameter in module.parameters()), torch.device("cpu"))
    return name, module._apply_batch_transfer_handler(batch, device=device, dataloader_idx=0)
