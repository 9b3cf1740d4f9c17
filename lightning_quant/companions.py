"""What QAT must know of a Trainer's other callbacks and of its strategy."""

from __future__ import annotations

import lightning as L
import torch
from lightning.pytorch.callbacks import (
    EarlyStopping,
    GradientAccumulationScheduler,
    ModelCheckpoint,
    StochasticWeightAveraging,
    WeightAveraging,
)
from lightning.pytorch.strategies import DeepSpeedStrategy, FSDPStrategy, ModelParallelStrategy
from lightning.pytorch.strategies.launchers import _MultiProcessingLauncher
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import nn

from lightning_quant.adapters import has_adapter
from lightning_quant.methods import get_method
from lightning_quant.nn import FakeModule, lookup
from lightning_quant.oscillation import KINDS
from lightning_quant.surgery import get_info, is_packed, is_prepared

When = int | float | None

_MADE_LATE = "made after preparation (in the module's setup?); build layers in __init__ or configure_model"


def check_when(name: str, value: When) -> When:
    """A time of QATCallback: an epoch (int), a fraction of the training (float in 0..1), or None.

    Raises:
        MisconfigurationException: none of these.
    """
    good = value is None or (isinstance(value, int) and not isinstance(value, bool) and value >= 0)
    if not good and not (isinstance(value, float) and 0.0 <= value <= 1.0):
        raise MisconfigurationException(
            f"QATCallback {name}={value!r}: give an epoch (int, from 0), a fraction of the training (float in 0..1), or None"
        )
    return value


def check_learning(method: str, scale_lr: float | None, oscillation: str | None, threshold: float, strength: float) -> None:
    """Raises MisconfigurationException for arguments of QATCallback that do not go together, or have no meaning."""
    rules = get_method(method)
    if scale_lr is not None and not (scale_lr > 0 and rules.learns):
        raise MisconfigurationException(
            f"QATCallback scale_lr={scale_lr}: a positive factor, for methods that learn scales, which {method!r} "
            f"{'does' if rules.learns else 'does not'}"
        )
    if oscillation not in (None, *KINDS):
        raise MisconfigurationException(f"QATCallback oscillation={oscillation!r}: valid are {', '.join(KINDS)}, and None")
    if oscillation is not None and rules.weight.transform is not None:
        raise MisconfigurationException(
            f"QATCallback oscillation={oscillation!r}: method {method!r} transforms weights before they are rounded; use one "
            f"that does not, such as 'lsq'"
        )
    if not 0 < threshold <= 1 or not 0 < strength < float("inf"):
        raise MisconfigurationException(
            f"QATCallback oscillation_threshold={threshold}, oscillation_strength={strength}: the threshold is in (0, 1], the "
            f"strength positive"
        )


def _callbacks(trainer: L.Trainer) -> list[L.Callback]:
    return trainer.callbacks  # type: ignore[attr-defined]


# --- callbacks ------------------------------------------------------------------------------------------------------


def check_callbacks(trainer: L.Trainer, callback: L.Callback) -> None:
    """Raises MisconfigurationException for a callback listed in front of QATCallback that must find the model prepared."""
    callbacks = _callbacks(trainer)
    for other in callbacks[: callbacks.index(callback) if callback in callbacks else 0]:
        if isinstance(other, (WeightAveraging, StochasticWeightAveraging)):
            raise MisconfigurationException(
                f"{type(other).__name__} copies the model in setup and must find it prepared: list QATCallback before it, in "
                f"Trainer(callbacks=...) (those of configure_callbacks come last)"
            )


def averaged_models(trainer: L.Trainer) -> list[nn.Module]:
    """The averaged copies of the model that callbacks keep."""
    models: list[nn.Module] = []
    for other in _callbacks(trainer):
        if isinstance(other, (WeightAveraging, StochasticWeightAveraging)) and other._average_model is not None:
            models.append(other._average_model)
    return models


def re_estimates_norms(trainer: L.Trainer) -> bool:
    """Whether this epoch is the one in which StochasticWeightAveraging finds the BatchNorm statistics of the average."""
    swa = [other for other in _callbacks(trainer) if isinstance(other, StochasticWeightAveraging)]
    return any(hasattr(other, "_max_epochs") and trainer.current_epoch > other.swa_end for other in swa)


def restart_monitors(trainer: L.Trainer) -> None:
    """Forget what EarlyStopping and ModelCheckpoint know of the float model's scores; files stay."""
    restarted = []
    for other in _callbacks(trainer):
        worst = torch.tensor(torch.inf)
        if isinstance(other, EarlyStopping) and other.best_score.isfinite():
            other.wait_count = 0
            other.best_score = worst if other.monitor_op is torch.lt else -worst
            restarted.append(f"EarlyStopping({other.monitor!r})")
        elif isinstance(other, ModelCheckpoint) and other.monitor is not None and other.best_k_models:
            other.best_k_models = {}
            other.best_model_score = other.current_score = None
            other.best_model_path = other.kth_best_model_path = ""
            other.kth_value = worst if other.mode == "min" else -worst
            restarted.append(f"ModelCheckpoint({other.monitor!r})")
    for config in trainer.lr_scheduler_configs:
        if isinstance(config.scheduler, torch.optim.lr_scheduler.ReduceLROnPlateau):
            config.scheduler._reset()
            restarted.append("ReduceLROnPlateau")
    if restarted:
        rank_zero_info(f"QATCallback: fake quantization starts, and {', '.join(restarted)} start afresh")


# --- progress -----------------------------------------------------------------------------------------------------


def _counts_steps(trainer: L.Trainer) -> bool:
    """Whether progress counts optimizer steps: not where nobody knows how many there will be."""
    if trainer.max_steps > 0:
        return True
    changes = any(isinstance(other, GradientAccumulationScheduler) for other in trainer.callbacks)  # type: ignore[attr-defined]
    return trainer.lightning_module.automatic_optimization and not changes


def total_steps(trainer: L.Trainer) -> float:
    """Optimizer steps in the whole training; batches under manual optimization, where a batch may step any number of times."""
    if _counts_steps(trainer):
        return float(trainer.estimated_stepping_batches)
    return float(trainer.num_training_batches * (trainer.max_epochs or 1))


def progress(trainer: L.Trainer, total: float) -> float:
    """How much of the training is done, 0 to 1; by whole epochs if their length is unknown."""
    if not 0 < total < float("inf"):
        return trainer.current_epoch / max(trainer.max_epochs or 1, 1)
    if _counts_steps(trainer):
        return trainer.global_step / total
    return trainer.fit_loop.epoch_loop.batch_progress.total.completed / total


# --- making layers ----------------------------------------------------------------------------------------------------


def configure(trainer: L.Trainer, module: L.LightningModule, who: str) -> None:
    """Call a module's `configure_model` in Lightning's contexts, before Lightning does.

    Raises:
        MisconfigurationException: it needs what comes later.
    """
    try:
        plugin = trainer.precision_plugin
        with trainer.strategy.tensor_init_context(), trainer.strategy.model_sharded_context(), plugin.module_init_context():
            module.configure_model()
    except Exception as error:
        raise MisconfigurationException(
            f"{who} calls {type(module).__name__}.configure_model before the module's own setup(), so that its layers can be "
            f"prepared before checkpoints are restored; there it raised {type(error).__name__}: {error}"
        ) from error


def list_late(module: nn.Module) -> None:
    """Layers that a module's own setup() made, after preparation, are in float: say so."""
    info = get_info(module)
    if info is None or is_packed(module):
        return
    late = [
        name
        for name, part in module.named_modules()
        if lookup(type(part)) is not None and not isinstance(part, FakeModule) and name not in info.skipped
        if not (has_adapter(module) and ".lora_" in name)
    ]
    for name in late:
        info.skipped[name] = _MADE_LATE
    if late:
        rank_zero_warn(f"QATCallback: {', '.join(late)} stay in float: {_MADE_LATE}")


# --- strategies -----------------------------------------------------------------------------------------------------


def check_in_place(trainer: L.Trainer, who: str) -> None:
    """Raises MisconfigurationException for a strategy under which layers that are made or packed in `setup` would be lost."""
    strategy = trainer.strategy
    name = type(strategy).__name__
    if isinstance(strategy, (FSDPStrategy, DeepSpeedStrategy, ModelParallelStrategy)):
        raise MisconfigurationException(f"{who}: {name} shards parameters, packed integers among them: use strategy='ddp'")
    if isinstance(strategy.launcher, _MultiProcessingLauncher):
        raise MisconfigurationException(
            f"{who}: {strategy.launcher._start_method!r} processes give back weights only, and the layers made in them would be "
            f"lost: use strategy='ddp'"
        )


def check_strategy(trainer: L.Trainer, module: nn.Module) -> None:
    """Raises MisconfigurationException for a strategy under which the training would go wrong, and names one that works."""
    strategy = trainer.strategy
    if isinstance(strategy, (FSDPStrategy, DeepSpeedStrategy)):
        what = "packed integers" if is_packed(module) else "modules with quantizers"
        raise MisconfigurationException(
            f"{type(strategy).__name__} flattens or partitions parameters, which {what} do not survive: use "
            f"ModelParallelStrategy (FSDP2) or strategy='ddp'"
        )
    if isinstance(strategy.launcher, _MultiProcessingLauncher) and not (is_prepared(module) or is_packed(module)):
        raise MisconfigurationException(
            f"{strategy.launcher._start_method!r} processes give back weights only, and the quantizers made in them would be lost: "
            f"use strategy='ddp', or prepare the model in the main process with lq.prepare(model, recipe, method=...)"
        )
