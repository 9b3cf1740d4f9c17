"""`lq.quantize`: finds the data and the step to run on it, and hands both to the pipeline."""

from __future__ import annotations

import contextlib
import copy
import inspect
import itertools
import warnings
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import ProgressBar
from lightning.pytorch.loggers.logger import DummyLogger
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.model_helpers import is_overridden
from torch import nn
from torchmetrics import Metric

from lightning_quant.calibration import Forward, run_batches
from lightning_quant.fake_quant import FakeQuantize
from lightning_quant.pipeline import check, quantize_model
from lightning_quant.recipe import Recipe, as_recipe
from lightning_quant.report import plan_summary, summary
from lightning_quant.spec import PRESETS
from lightning_quant.surgery import convert, get_info, is_packed, is_prepared

# runs up to n batches through the model to be calibrated
Runner = Callable[[nn.Module, int], None]


def quantize(
    module: nn.Module,
    recipe: str | Recipe | dict[str, Any] | None = None,
    batches: Iterable[Any] | None = None,
    *,
    forward: Forward | None = None,
    datamodule: L.LightningDataModule | None = None,
    dataloaders: Any = None,
    trainer: L.Trainer | None = None,
    calibration_batches: int = 128,
    dry_run: bool = False,
) -> Any:
    """Quantize a trained model and pack it. The model given is not changed.

    A float model is calibrated if its recipe has static activations: on `batches`, or in Lightning's own evaluation loop on
    `dataloaders` or a datamodule's `calibration_dataloader()`, else `train_dataloader()`. There a batch goes through the
    module's `calibration_step(batch, batch_idx)`, else `validation_step`, `predict_step`, or `training_step` under automatic
    optimization; in eval mode, without gradients, and what the step leaves in metrics and attributes is undone. A model that
    was trained with `QATCallback` is converted as it is.

    Args:
        module: any `nn.Module`; a `LightningModule` where data comes from dataloaders and steps.
        recipe: a preset's name, a YAML path, a dict or a Recipe; None for a model trained with `QATCallback`.
        batches: yields what `module.forward` takes: a tensor, a tuple of positional or a mapping of keyword arguments.
        forward: `forward(model, batch)` instead of the module's own step.
        datamodule, dataloaders: the data, for Lightning's loop.
        trainer: whose device, precision and strategy calibration uses; its callbacks, loggers and state are left as they were.
        calibration_batches: how many batches to use at most.
        dry_run: change and calibrate nothing, return the `Summary` of what would be done.

    Returns:
        the packed model in eval mode, of `module`'s class; a `Summary` if `dry_run`.

    Raises:
        ValueError: the recipe does not fit the model, or a static recipe has no data; raised before work starts.

    Example:
        >>> import lightning_quant as lq
        >>> net = nn.Sequential(nn.Linear(32, 16), nn.ReLU(), nn.Linear(16, 4))
        >>> qnet = lq.quantize(net, "w8a8", batches=[torch.randn(8, 32)])
        >>> type(qnet[0]).__name__, type(net[0]).__name__
        ('PackedLinear', 'Linear')
    """
    if isinstance(calibration_batches, bool) or not isinstance(calibration_batches, int) or calibration_batches < 1:
        raise ValueError(f"calibration_batches={calibration_batches!r}: must be a positive int")
    if is_packed(module):
        raise ValueError("the model is packed already")
    if is_prepared(module):
        return _convert_trained(module, recipe, dry_run)
    if recipe is None:
        raise ValueError(f"a float model needs a recipe: a preset ({', '.join(PRESETS)}), a .yaml path, a dict or a Recipe")
    recipe = as_recipe(recipe)
    if trainer is not None and getattr(trainer, "fast_dev_run", False):
        calibration_batches = 1
    runner = _find_runner(module, batches, forward, datamodule, dataloaders, trainer)
    plan = check(module, recipe, runner is not None)
    if dry_run:
        return plan_summary(module, plan)
    model = copy.deepcopy(module)
    with _kept_rng():
        if runner is None:
            return quantize_model(model, recipe)
        return quantize_model(
            model,
            recipe,
            run=lambda: runner(model, calibration_batches),
            example=lambda: runner(model, 1),
        )


def _convert_trained(module: nn.Module, recipe: Any, dry_run: bool) -> Any:
    info = get_info(module)
    if recipe is not None and (info is None or as_recipe(recipe) != info.recipe):
        raise ValueError(
            "the model was prepared with another recipe: leave recipe out to convert what was trained, or give the float model"
        )
    if dry_run:
        return summary(module)
    converted = convert(module)
    quantizers = [part for part in module.modules() if isinstance(part, FakeQuantize)]
    if not all(part.quantizing for part in quantizers):
        warnings.warn(
            "fake quantization never started in this model's training (see QATCallback's quantize_from), so the weights never "
            "adapted to it; they are rounded with the ranges observed so far",
            stacklevel=3,
        )
    return converted


@contextlib.contextmanager
def _kept_rng() -> Iterator[None]:
    """Calibration draws from the user's random state (shuffling) and gives it back as it was."""
    with torch.random.fork_rng(devices=range(torch.cuda.device_count()) if torch.cuda.is_initialized() else []):
        yield


# --- where the data comes from --------------------------------------------------------------------------------------


def _find_runner(
    module: nn.Module,
    batches: Iterable[Any] | None,
    forward: Forward | None,
    datamodule: L.LightningDataModule | None,
    dataloaders: Any,
    trainer: L.Trainer | None,
) -> Runner | None:
    given = [
        name
        for name, value in (("batches", batches), ("datamodule", datamodule), ("dataloaders", dataloaders))
        if value is not None
    ]
    if len(given) > 1:
        raise ValueError(f"{' and '.join(given)} were given: choose one source of calibration data")
    if batches is not None:
        return _plain_runner(batches, forward)
    if not isinstance(module, L.LightningModule):
        if datamodule is not None:
            return _plain_runner(_Loader(datamodule), forward)
        return None if dataloaders is None else _plain_runner(dataloaders, forward)
    if datamodule is None and dataloaders is None and trainer is not None:
        datamodule = getattr(trainer, "datamodule", None)
        if datamodule is None and not is_overridden("train_dataloader", module):
            dataloaders = trainer.train_dataloader
    has_own = is_overridden("train_dataloader", module) or hasattr(module, "calibration_dataloader")
    if datamodule is None and dataloaders is None and not has_own:
        return None
    step = _find_step(module, forward)
    return lambda model, limit: _run_lightning(model, step, datamodule, dataloaders, trainer, limit)  # type: ignore[arg-type]


class _Loader:
    """A datamodule's calibration batches, for a plain `nn.Module`."""

    def __init__(self, datamodule: L.LightningDataModule) -> None:
        self.datamodule = datamodule

    def __iter__(self) -> Iterator[Any]:
        self.datamodule.prepare_data()
        self.datamodule.setup("fit")
        return iter(_calibration_data(self.datamodule))


def _calibration_data(source: Any) -> Any:
    return source.calibration_dataloader() if hasattr(source, "calibration_dataloader") else source.train_dataloader()


def _plain_runner(batches: Iterable[Any], forward: Forward | None) -> Runner:
    if isinstance(batches, (str, bytes, torch.Tensor, dict)):
        raise ValueError(f"batches is a {type(batches).__name__}: give an iterable of batches, such as [batch] or a DataLoader")
    source = [batches]

    def run(model: nn.Module, limit: int) -> None:
        if iter(source[0]) is source[0]:
            # an iterator can be read only once: put back what an example took
            taken = list(itertools.islice(source[0], limit))
            source[0] = itertools.chain(taken, source[0])
            run_batches(model, taken, limit, forward)
        else:
            run_batches(model, source[0], limit, forward)

    return run


# --- Lightning's loop -----------------------------------------------------------------------------------------------


def _find_step(module: L.LightningModule, forward: Forward | None) -> str | Forward:
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
        if callable(step):
            step(self, batch)
            return
        bound = getattr(super(calibration, self) if step == "validation_step" else self, step)
        bound(*_step_arguments(bound, batch, batch_idx, dataloader_idx))

    members: dict[str, Any] = {
        "validation_step": validation_step,
        "configure_callbacks": lambda self: [],
        "configure_model": lambda self: None,
        "val_dataloader": lambda self: _calibration_data(self),
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
        "val_dataloader": lambda self: _calibration_data(self),
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
    trainer.loggers = [DummyLogger()] if trainer.loggers else []
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
    plain = (bool, int, float, str, list, dict, set, tuple, type(None))
    attributes = {
        key: copy.deepcopy(value)
        for key, value in model.__dict__.items()
        if isinstance(value, plain) and not key.startswith("_") and not _holds_modules(value)
    }
    known = set(model.__dict__)
    ours = {id(buffer) for part in model.modules() if isinstance(part, FakeQuantize) for buffer in part.buffers()}
    buffers = [(buffer, buffer.detach().clone()) for buffer in model.buffers() if id(buffer) not in ours]
    try:
        yield
    finally:
        for part, state in metrics:
            for name, value in state.items():
                setattr(part, name, value)
        for name in [key for key in model.__dict__ if key not in known and not key.startswith("_")]:
            del model.__dict__[name]
        model.__dict__.update(attributes)
        with torch.no_grad():
            for buffer, value in buffers:
                buffer.copy_(value)


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


def _run_lightning(
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
