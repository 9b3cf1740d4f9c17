"""`lq.quantize`: finds the data and the step to run on it, and hands both to the pipeline."""

from __future__ import annotations

import contextlib
import copy
import itertools
import os
import random
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import torch
from lightning.pytorch.utilities.model_helpers import is_overridden
from torch import nn
from torch.utils._pytree import tree_leaves
from torch.utils.data import DataLoader

from lightning_quant.activations import parse_bytes
from lightning_quant.adapters import has_adapter
from lightning_quant.calibration import Forward, has_ranks, run_batches, share_buffers
from lightning_quant.fake_quant import FakeQuantize
from lightning_quant.loop import calibration_data, combined, find_step, run_lightning
from lightning_quant.pipeline import check, estimate_model, quantize_model
from lightning_quant.preflight import forecast
from lightning_quant.recipe import Recipe, as_recipe
from lightning_quant.report import plan_summary, summary
from lightning_quant.sequential import Options
from lightning_quant.sharding import is_sharded, plain_copy
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
    work_dir: str | os.PathLike[str] | None = None,
    memory_budget: int | str | None = None,
    progress: bool = True,
) -> Any:
    """Quantize a trained model and pack it. The model given is not changed.

    A float model is calibrated if its recipe has static activations: on `batches`, or in Lightning's own evaluation loop on
    `dataloaders` or a datamodule's `calibration_dataloader()`, else `train_dataloader()`. There a batch goes through the
    module's `calibration_step(batch, batch_idx)`, else `validation_step`, `predict_step`, or `training_step` under automatic
    optimization; in eval mode, without gradients, and what the step leaves in metrics and attributes is undone. A model that
    was trained with `QATCallback` is converted as it is.

    Args:
        module: any `nn.Module`; a `LightningModule` where data comes from dataloaders and steps. If FSDP2 has sharded it, all
            ranks call this together, and each gets the same whole model.
        recipe: a preset's name, a YAML path, a dict or a Recipe; None for a model trained with `QATCallback`.
        batches: yields what `module.forward` takes: a tensor, a tuple of positional or a mapping of keyword arguments.
        forward: `forward(model, batch)` instead of the module's own step.
        datamodule, dataloaders: the data, for Lightning's loop.
        trainer: whose device, precision and strategy calibration uses; its callbacks, loggers and state are left as they were.
        calibration_batches: how many batches to use at most.
        dry_run: change and calibrate nothing, return the `Summary` of what would be done. If the recipe has algorithms, one batch
            is run in float (twice), and the summary has an estimate of memory and time, too; not where the data come from an
            iterator, whose first batch would be lost.
        work_dir: a folder, made if it does not exist, in which algorithms keep what is done of the model: a run that was killed
            goes on there when it is started again with the same model, recipe and data, and comes to the same result, bit by
            bit. Data that are shuffled need a seed. Delete it when done: the packed model is not in it.
        memory_budget: how many bytes of activations algorithms keep in memory between passes, as a number or as text such as
            "500 MB"; the rest goes to files, in `work_dir` or a temporary folder, and the result is the same. By default a
            quarter of the memory that is available.
        progress: show a bar, and the time left, while algorithms run; only where standard error is a terminal.

    Returns:
        the packed model in eval mode, of `module`'s class; a `Summary` if `dry_run`.

    Raises:
        ValueError: the recipe does not fit the model, there are no data for it, the algorithms are for none of its layers, or
            there is too little memory; `work_dir` holds the work of another run, or the recipe has no algorithms for it; all
            raised before work starts.

    Example:
        >>> import lightning_quant as lq
        >>> net = nn.Sequential(nn.Linear(32, 16), nn.ReLU(), nn.Linear(16, 4))
        >>> qnet = lq.quantize(net, "w8a8", batches=[torch.randn(8, 32)])
        >>> type(qnet[0]).__name__, type(net[0]).__name__
        ('PackedLinear', 'Linear')
    """
    if isinstance(calibration_batches, bool) or not isinstance(calibration_batches, int) or calibration_batches < 1:
        raise ValueError(f"calibration_batches={calibration_batches!r}: must be a positive int")
    options = _options(work_dir, memory_budget, progress)
    module = getattr(module, "_orig_mod", module)  # torch.compile's wrapper
    if has_adapter(module):
        raise ValueError("the model has an adapter: merge it first, lq.merge_adapter(model).model")
    if is_packed(module):
        raise ValueError("the model is packed already: give the float or the QAT model (a Trainer's own is the one that ran last)")
    sharded = is_sharded(module)
    if sharded:
        module = plain_copy(module)
        if has_ranks():
            share_buffers(module)
    if is_prepared(module):
        _check_used(options, (), "a model that was trained with QATCallback is only converted")
        return _convert_trained(module, recipe, dry_run)
    if recipe is None:
        raise ValueError(f"a float model needs a recipe: a preset ({', '.join(PRESETS)}), a .yaml path, a dict or a Recipe")
    recipe = as_recipe(recipe)
    if trainer is not None and getattr(trainer, "fast_dev_run", False):
        calibration_batches = 1
    _check_used(options, recipe.algorithms, "the recipe has no algorithms")
    runner = _find_runner(module, batches, forward, datamodule, dataloaders, trainer)
    plan = check(module, recipe, runner is not None)
    _check_copyable(module)
    if dry_run:
        told = plan_summary(module, plan)
        if not recipe.algorithms or runner is None or isinstance(batches, Iterator) or isinstance(dataloaders, Iterator):
            return told
        copied, found = _uncompiled(module if sharded else _copy(module)), runner
        count = _batch_count(calibration_batches, batches, dataloaders)
        with _kept_rng():
            return forecast(told, estimate_model(copied, recipe, lambda: found(copied, 1), count, options))
    model = _uncompiled(module if sharded else _copy(module))
    with _kept_rng():
        if runner is None:
            return quantize_model(model, recipe)
        return quantize_model(
            model,
            recipe,
            run=_repeatable(lambda: runner(model, calibration_batches), batches, dataloaders),
            example=_repeatable(lambda: runner(model, 1), batches, dataloaders),
            options=options,
            batches=_batch_count(calibration_batches, batches, dataloaders),
        )


def _options(work_dir: str | os.PathLike[str] | None, memory_budget: int | str | None, progress: bool) -> Options:
    if work_dir is not None and (not isinstance(work_dir, (str, os.PathLike)) or not os.fspath(work_dir)):
        raise ValueError(f"work_dir={work_dir!r}: give a folder's path, or None")
    if not isinstance(progress, bool):
        raise ValueError(f"progress={progress!r}: must be True or False")
    return Options(None if work_dir is None else Path(work_dir), parse_bytes(memory_budget), progress)


def _check_used(options: Options, algorithms: Sequence[str], why: str) -> None:
    """Options of algorithms are refused where none run."""
    given = [name for name in ("work_dir", "memory_budget") if getattr(options, name) is not None]
    if given and not algorithms:
        raise ValueError(
            f"{' and '.join(given)}: only algorithms use it, and {why}: leave it out, or name algorithms in the recipe"
        )


def _batch_count(limit: int, *sources: Any) -> int:
    """How many batches there are, as far as can be known without reading them."""
    for source in sources:
        if hasattr(source, "__len__"):
            with contextlib.suppress(TypeError, NotImplementedError):  # a DataLoader of a stream has no length
                return max(min(limit, len(source)), 1)
    return limit


def _copy(module: nn.Module) -> nn.Module:
    """A deep copy whose parameters share the storage of the original's: what changes gets storage of its own."""
    shared = {
        id(value): nn.Parameter(value.detach(), value.requires_grad) for value in module.parameters() if type(value) is nn.Parameter
    }
    return copy.deepcopy(module, shared)


def _uncompiled(model: nn.Module) -> nn.Module:
    """A copy of a LightningModule that was compiled as a whole still has the original's compiled methods: take them away."""
    if model.__dict__.get("_compiler_ctx") is not None:
        model.__dict__["_compiler_ctx"] = None
        for method in ("forward", "training_step", "validation_step", "test_step", "predict_step"):
            model.__dict__.pop(method, None)
    return model


def _check_copyable(module: nn.Module) -> None:
    """Weights that a hook computes in every forward are no leaves, and cannot be copied."""
    for name, part in module.named_modules():
        for key, value in part.__dict__.items():
            if isinstance(value, torch.Tensor) and not value.is_leaf:
                raise ValueError(
                    f"{name or 'the model'}.{key} is computed by a hook (pruning, weight_norm, spectral_norm), and such a model "
                    f"cannot be copied: make it permanent first (prune.remove, remove_weight_norm, remove_spectral_norm)"
                )


def _convert_trained(module: nn.Module, recipe: Any, dry_run: bool) -> Any:
    info = get_info(module)
    if recipe is not None and (info is None or as_recipe(recipe) != info.recipe):
        raise ValueError(
            "the model was prepared with another recipe: leave recipe out to convert what was trained, or give the float model"
        )
    if dry_run:
        return summary(module)
    converted = _uncompiled(convert(module))
    quantizers = [part for part in module.modules() if isinstance(part, FakeQuantize)]
    if not all(part.quantizing for part in quantizers):
        weights = all(part.quantizing for part in quantizers if part.is_weight)
        what, when = ("activations", "quantize_activations_from") if weights else ("weights", "quantize_from")
        warnings.warn(
            f"fake quantization{' of activations' * weights} never started in this model's training (see QATCallback's {when}), so "
            f"it never adapted to it; {what} are rounded with the ranges observed so far",
            stacklevel=3,
        )
    return converted


def _random_states(*sources: Any) -> list[tuple[Callable[[Any], Any], Any]]:
    """What shuffling and augmentation draw from in this process, each with the function that sets it and its state."""
    states: list[tuple[Callable[[Any], Any], Any]] = [
        (torch.random.set_rng_state, torch.random.get_rng_state()),
        (random.setstate, random.getstate()),
        (np.random.set_state, np.random.get_state()),
    ]
    for loader in tree_leaves(sources, is_leaf=lambda value: isinstance(value, DataLoader)):
        for owner in (loader, getattr(loader, "sampler", None), getattr(getattr(loader, "batch_sampler", None), "sampler", None)):
            generator = getattr(owner, "generator", None)
            if isinstance(generator, torch.Generator):
                states.append((generator.set_state, generator.get_state()))
    return states


def _repeatable(run: Callable[[], None], *sources: Any) -> Callable[[], None]:
    """Every call starts from the random state of now, so every pass shuffles alike."""
    states = _random_states(*sources)

    def again() -> None:
        for put, state in states:
            put(state)
        run()

    return again


@contextlib.contextmanager
def _kept_rng() -> Iterator[None]:
    """Calibration draws from the user's random state (shuffling) and gives it back as it was."""
    states = _random_states()
    with torch.random.fork_rng(devices=range(torch.cuda.device_count()) if torch.cuda.is_initialized() else []):
        try:
            yield
        finally:
            for put, state in states:
                put(state)


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
            dataloaders = combined(trainer.train_dataloader)
    has_own = is_overridden("train_dataloader", module) or hasattr(module, "calibration_dataloader")
    if datamodule is None and dataloaders is None and not has_own:
        return None
    step = find_step(module, forward)
    return lambda model, limit: run_lightning(model, step, datamodule, dataloaders, trainer, limit)  # type: ignore[arg-type]


class _Loader:
    """A datamodule's calibration batches, for a plain `nn.Module`."""

    def __init__(self, datamodule: L.LightningDataModule) -> None:
        self.datamodule = datamodule

    def __iter__(self) -> Iterator[Any]:
        self.datamodule.prepare_data()
        self.datamodule.setup("fit")
        return iter(calibration_data(self.datamodule))


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
