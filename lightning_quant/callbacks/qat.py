"""`QATCallback`: quantization-aware training, hooks only."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from functools import partial
from typing import Any, Literal

import lightning as L
from lightning.pytorch.strategies import ModelParallelStrategy
from lightning.pytorch.utilities import rank_zero_warn
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.model_helpers import is_overridden
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.hooks import RemovableHandle

from lightning_quant.adapters import has_adapter
from lightning_quant.calibration import (
    drop_linked_gradients,
    finish_observing,
    follow_ranges,
    has_ranks,
    link_ranks,
    measure_weights,
    quantizers,
    set_flags,
    share_buffers,
    share_norms,
    share_ranges,
)
from lightning_quant.companions import (
    When,
    averaged_models,
    check_callbacks,
    check_learning,
    check_strategy,
    check_when,
    configure,
    list_late,
    progress,
    re_estimates_norms,
    restart_monitors,
    total_steps,
)
from lightning_quant.loop import example_call
from lightning_quant.methods import get_method, resolve_options
from lightning_quant.mixed import Sensitivity
from lightning_quant.nn import lookup
from lightning_quant.nn.base import described_modules
from lightning_quant.oscillation import Freezing, add_terms, rising
from lightning_quant.plan import Plan, plan_model
from lightning_quant.recipe import Recipe, as_recipe
from lightning_quant.scale_groups import ScaleGroups
from lightning_quant.selection import Selection
from lightning_quant.sharding import is_sharded
from lightning_quant.surgery import apply_plan, get_info, is_packed, is_prepared, relink_norms, widen_optimizer_state


@contextlib.contextmanager
def _told() -> Iterator[None]:
    """What is wrong with `train` and `rest` is said as Lightning does."""
    try:
        yield
    except ValueError as error:
        raise MisconfigurationException(f"QATCallback {error}") from None


class QATCallback(L.Callback):
    """Quantization-aware training (Jacob et al. 2018, arXiv:1712.05877, section 3) in any `Trainer`.

    The model gets its quantizers in `setup`, before checkpoints are restored and optimizers made; from then on only flags
    change. After the fit, `trainer.quantize()` packs it; the fitted model itself stays as it is, and can be tested, resumed and
    fitted again. Observers see training batches only.

    Args:
        recipe: what to quantize: a preset's name, a YAML path, a dict or a Recipe.
        method: `"ste"`: ranges are observed. `"lsq"`, `"lsq+"`, `"ewgs"`, `"ternary"`: scales (and zero points) learn, initialised
            from the observer; `"pact"`: those of activations; `"dorefa"`: weights pass a tanh. See docs/qat.md.
        method_options: the method's own: `delta` of `"ewgs"`, `regularization` of `"pact"`.
        quantize_from: when fake quantization starts; before, observers watch the float model.
        freeze_observers_at: when ranges stop moving (learned scales go on learning).
        freeze_bn_at: when BatchNorm statistics stop moving.
        scale_lr: the rate of learned scales and zero points, as a factor of their optimizer group's; they get groups of their own,
            without weight decay, after `configure_optimizers`. None: no such groups. Adam undoes LSQ's gradient scale: try 0.1.
        oscillation: for weights that jump between two codes (arXiv:2203.11086): `"freeze"` holds those that do it often, `"dampen"`
            draws all weights to the middle of their codes.
        oscillation_threshold: of `"freeze"`: the share of steps that jump back, at the end of the training; 4 times that at first.
        oscillation_strength: of `"dampen"`: the factor of the squared distances in the loss, at the end; 0 at first.
        restart_monitors: when fake quantization starts, the patience and best score of `EarlyStopping`, and the best scores and
            paths of a `ModelCheckpoint(monitor=...)`, start afresh, and so does `ReduceLROnPlateau`: the float model's would never
            be reached again. Files already written stay.
        train: patterns, as in a `Recipe`, of the modules that are trained, with all that is in them; or what `lq.sensitivity`
            found: the fewest layers that together make up 90 % of the costs; `"scales"`: only what quantizers learn, or of a
            packed model, whatever the recipe here, the scales of its weights (EfficientQAT's E2E-QP, arXiv:2407.11062, section
            3.3). The rest is frozen for the fit, BatchNorm statistics included. None: everything.
        rest: `"quantized"`, or `"float"`: what of the rest the recipe would quantize stays in float.

    Times are epochs (int) or fractions of the training (float in 0..1). Logs `quant/quantizing`, `quant/observing` and
    `quant/bn_frozen` at each epoch, if the Trainer has a logger.

    Raises:
        MisconfigurationException: a bad method or time.
        ValueError: a bad recipe.

    Example:
        >>> callback = QATCallback("w8a8", quantize_from=1, freeze_observers_at=0.6, freeze_bn_at=0.8)
        >>> trainer = L.Trainer(max_epochs=5, callbacks=[callback], logger=False, enable_checkpointing=False)
    """

    def __init__(
        self,
        recipe: str | dict[str, Any] | Recipe = "w8a8",
        *,
        method: Literal["ste", "lsq", "lsq+", "ewgs", "pact", "dorefa", "ternary"] = "ste",
        method_options: dict[str, float] | None = None,
        quantize_from: int | float = 0,
        freeze_observers_at: int | float | None = None,
        freeze_bn_at: int | float | None = None,
        scale_lr: float | None = None,
        oscillation: Literal["freeze", "dampen"] | None = None,
        oscillation_threshold: float = 0.01,
        oscillation_strength: float = 1e-3,
        restart_monitors: bool = True,
        train: str | list[str] | Sensitivity | None = None,
        rest: Literal["quantized", "float"] = "quantized",
    ) -> None:
        super().__init__()
        try:
            self.method_options = resolve_options(method, method_options)
        except ValueError as error:
            raise MisconfigurationException(f"QATCallback {error}") from None
        self.recipe = as_recipe(recipe)
        if self.recipe.algorithms:
            raise MisconfigurationException(
                f"QATCallback algorithms={list(self.recipe.algorithms)}: PTQ algorithms do not run in training; take them out, or "
                f"use the recipe with lq.quantize"
            )
        self.method = method
        self.quantize_from = check_when("quantize_from", quantize_from)
        if quantize_from is None:
            raise MisconfigurationException("QATCallback quantize_from=None: then nothing would be quantized; 0 starts at once")
        self.freeze_observers_at = check_when("freeze_observers_at", freeze_observers_at)
        self.freeze_bn_at = check_when("freeze_bn_at", freeze_bn_at)
        check_learning(method, scale_lr, oscillation, oscillation_threshold, oscillation_strength)
        self.scale_lr, self.oscillation, self.oscillation_strength = scale_lr, oscillation, oscillation_strength
        self.restart_monitors = restart_monitors
        with _told():
            self.selection = Selection(train, rest)
        self._started = False  # whether fake quantization has started; a resumed run must know
        self._following = True  # whether ranges of weights still follow the weights
        self._waits = False  # whether learned scales still wait for their first range
        self._phase: tuple[bool, bool, bool] | None = None
        self._frozen: list[nn.Module] = []
        self._float_checkpoint = False  # whether a float run is resumed
        self._handles: list[RemovableHandle] = []
        self._unreached: set[str] = set()  # activations that a warning has named
        self._total_steps = 0.0
        self._groups: ScaleGroups | None = None
        self._freezing = Freezing(oscillation_threshold)
        self._counted = 0  # optimizer steps whose oscillations were counted

    # --- preparation ---

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        self._prepare(trainer, pl_module, stage)
        if self.selection.scales and is_packed(pl_module) and isinstance(trainer.strategy, ModelParallelStrategy):
            raise MisconfigurationException(
                "QATCallback train='scales': packed scales do not train where they are sharded: use strategy='ddp'"
            )
        if stage == "fit":
            self._freeze(pl_module)  # before optimizers are made and DDP takes its parameters

    def _freeze(self, module: L.LightningModule) -> None:
        if is_prepared(module) or (self.selection.scales and is_packed(module)):
            with _told():
                self.selection.freeze(module)

    def _prepare(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        check_strategy(trainer, pl_module)
        if self.oscillation is not None and isinstance(trainer.strategy, ModelParallelStrategy):
            raise MisconfigurationException(
                f"QATCallback oscillation={self.oscillation!r}: under {type(trainer.strategy).__name__} no rank has whole weights: "
                f"leave it out, or use strategy='ddp'"
            )
        if is_packed(pl_module):
            return
        if stage == "fit":
            self._check_times(trainer)
        if is_prepared(pl_module):
            self._check_same(pl_module)
            return
        if has_adapter(pl_module):
            raise MisconfigurationException("adapters are made on layers with quantizers: list QATCallback before LoRACallback")
        if stage == "fit":
            check_callbacks(trainer, self)
        if isinstance(trainer.strategy, ModelParallelStrategy):
            if is_sharded(pl_module) or not any(lookup(type(part)) for part in pl_module.modules()):
                return  # configure_model makes the layers, prepares and shards them: `_check_prepared` comes after it
        elif is_overridden("configure_model", pl_module):
            # its layers must exist before they can be prepared; Lightning calls it again, which it has to allow
            configure(trainer, pl_module, type(self).__name__)
        plan = plan_model(pl_module, self.recipe, example_call(trainer, pl_module, stage))
        with _told():
            plan = self.selection.cut(pl_module, plan)
        self._check_observed(plan)
        apply_plan(pl_module, plan, method=self.method, method_options=self.method_options)
        self._started, self._freezing.tracks = False, {}  # another model's training may have set them

    def _check_prepared(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        """After a configure_model that this callback has left to Lightning."""
        if not isinstance(trainer.strategy, ModelParallelStrategy) or is_packed(module):
            return
        if not is_prepared(module):
            raise MisconfigurationException(
                f"{type(module).__name__}.configure_model has made layers without quantizers. Make them in __init__, "
                f"where QATCallback finds them, or call lq.prepare(self, recipe, method={self.method!r}) in configure_model, "
                f"after the layers are made and before fully_shard"
            )
        self._check_same(module)

    def _check_observed(self, plan: Plan) -> None:
        """A range that is frozen before it was ever observed would stop the training at its first batch."""
        if self.freeze_observers_at in (0, 0.0) and any(match.scheme.needs_data for match in plan.matches):
            raise MisconfigurationException(
                f"QATCallback freeze_observers_at={self.freeze_observers_at}: the recipe has static activations, whose ranges "
                f"would never be observed; give a later time"
            )

    def _check_same(self, module: nn.Module) -> None:
        info = get_info(module)
        mine = (self.recipe, self.method, self.method_options)
        if info is not None and (info.recipe, info.method, info.method_options) != mine:
            raise MisconfigurationException(
                "the model was prepared with another recipe or method than this QATCallback's: use that one again, or start from "
                f"the float model. Prepared: {info.method} {info.method_options}, {info.recipe}; this callback: {self.method} "
                f"{self.method_options}, {self.recipe}"
            )

    def _check_times(self, trainer: L.Trainer) -> None:
        for name in ("quantize_from", "freeze_observers_at", "freeze_bn_at"):
            if isinstance(getattr(self, name), float) and trainer.max_epochs == -1 and trainer.max_steps == -1:
                raise MisconfigurationException(
                    f"QATCallback {name}={getattr(self, name)} is a fraction of the training, but this training "
                    f"has no end: set max_epochs or max_steps, or give an epoch (int)"
                )

    # --- schedule ---

    def _reached(self, when: When, trainer: L.Trainer) -> bool:
        if when is None:
            return False
        if isinstance(when, float):
            return progress(trainer, self._total_steps) >= when
        return trainer.current_epoch >= when

    def _apply(self, trainer: L.Trainer, module: L.LightningModule, *, force: bool = False) -> None:
        """Bring the flags to where the training is; the whole schedule is derived anew, so any resume is right."""
        if self._waits:
            finish_observing(module)
            self._waits = any(quantizer.waits for quantizer in quantizers(module))
        quantizing = self._reached(self.quantize_from, trainer)
        observing = not self._reached(self.freeze_observers_at, trainer)
        frozen = self._reached(self.freeze_bn_at, trainer) and not re_estimates_norms(trainer)
        if not force and (quantizing, observing, frozen) == self._phase:
            return
        self._phase = (quantizing, observing, frozen)
        self._following = observing
        finish_observing(module)
        averages = averaged_models(trainer)
        for model in (module, *averages):
            set_flags(model, following=observing, quantizing=quantizing)
        set_flags(module, observing=observing)
        for quantizer in () if observing else quantizers(module):
            # a part that training reaches for the first time has no range that could be frozen
            quantizer.observing |= not (quantizer.is_weight or quantizer.has_range)
        starts, self._started = quantizing and not self._started, quantizing
        if starts:
            share_ranges(module, averages)
            if self.restart_monitors:
                restart_monitors(trainer)
        if not frozen:
            self._thaw()
        if frozen:
            for part in module.modules():
                if isinstance(part, _BatchNorm) and part.training:
                    part.eval()
                    self._frozen.append(part)
        self._frozen += self.selection.still()

    def _pause(self, module: L.LightningModule) -> None:
        """Observers off: what runs next is no training batch."""
        finish_observing(module)
        measure_weights(module)
        set_flags(module, observing=False)

    def _follow(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        """Before averaging callbacks swap, take over or save their models."""
        if self._started:
            follow_ranges(module, averaged_models(trainer))

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._check_prepared(trainer, pl_module)
        self._freeze(pl_module)
        list_late(pl_module)
        if self.scale_lr is not None and not is_packed(pl_module):
            schedulers = [config.scheduler for config in trainer.lr_scheduler_configs]
            try:
                self._groups = ScaleGroups(pl_module, trainer.optimizers, schedulers, self.scale_lr)
            except ValueError as error:
                raise MisconfigurationException(f"QATCallback {error}") from None
        if self._float_checkpoint:
            # their states are restored after this hook
            for optimizer in trainer.optimizers:
                self._handles.append(optimizer.register_load_state_dict_pre_hook(partial(widen_optimizer_state, pl_module)))

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        relink_norms(pl_module)
        link_ranks(pl_module, has_ranks())
        for handle in self._handles:
            handle.remove()
        if self._groups is not None and self._float_checkpoint:
            self._groups.restore()
        self._groups, self._counted = None, trainer.global_step
        self._handles, self._float_checkpoint = [], False
        self._frozen = []
        self._waits = is_sharded(pl_module)
        self._total_steps = total_steps(trainer)
        self._apply(trainer, pl_module, force=True)

    def on_train_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._apply(trainer, pl_module, force=True)
        assert self._phase is not None
        names = ("quantizing", "observing", "bn_frozen")
        values = {f"quant/{name}": float(value) for name, value in zip(names, self._phase, strict=True)}
        pl_module.log_dict(values, on_step=False, on_epoch=True, batch_size=1, sync_dist=True)

    def on_train_batch_start(self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int) -> None:
        self._apply(trainer, pl_module)  # also after a validation inside the epoch

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *args: Any) -> None:
        if isinstance(trainer.strategy, ModelParallelStrategy):
            share_norms(pl_module)  # DDP does; quantized weights depend on them, and checkpoints hold one rank's
        if self.oscillation == "freeze" and self._started and trainer.global_step != self._counted:
            self._counted = trainer.global_step
            self._freezing.step(pl_module, progress(trainer, self._total_steps))

    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._check_prepared(trainer, pl_module)
        self._pause(pl_module)
        self._follow(trainer, pl_module)  # averaging callbacks swap models next

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._phase = None  # modules are still in eval here: the next training batch brings flags and BatchNorms back
        parts = [part for part in quantizers(pl_module) if part.quantizing and not part.has_range and not part.is_weight]
        names = sorted({part.name for part in parts} - self._unreached)
        if names and self._started and not trainer.sanity_checking:
            self._unreached.update(names)
            rank_zero_warn(
                f"QATCallback: no training batch has reached {', '.join(names[:5])}{', ...' * (len(names) > 5)} yet: evaluated "
                f"in float there, and the model cannot be packed. Leave such modules in float with Recipe(ignore=[...])"
            )

    def on_test_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._check_prepared(trainer, pl_module)
        self._pause(pl_module)

    def on_predict_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._check_prepared(trainer, pl_module)
        self._pause(pl_module)

    def on_before_optimizer_step(self, trainer: L.Trainer, pl_module: L.LightningModule, optimizer: Any) -> None:
        if has_ranks() and self._phase is not None and not self._phase[0]:
            drop_linked_gradients(pl_module)
        done = progress(trainer, self._total_steps)
        add_terms(pl_module, optimizer, rising(self.oscillation_strength, done) if self.oscillation == "dampen" else 0.0)

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._pause(pl_module)
        if has_ranks():
            share_buffers(pl_module)
        self._follow(trainer, pl_module)
        self._leave(pl_module)

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        set_flags(pl_module, observing=False)
        self._leave(pl_module)

    def _leave(self, module: L.LightningModule) -> None:
        link_ranks(module, False)
        self._thaw()
        self.selection.release()
        self._phase = None

    def _thaw(self) -> None:
        """Lightning keeps the modes it finds: a second fit would start frozen."""
        for part in self._frozen:
            part.train()
        self._frozen = []

    # --- checkpoints ---

    def state_dict(self) -> dict[str, Any]:
        """What the run was made with: primitives only, for `weights_only` loading."""
        times = {name: getattr(self, name) for name in ("quantize_from", "freeze_observers_at", "freeze_bn_at")}
        flags = {"started": self._started, "following": self._following}
        training = {"scale_lr": self.scale_lr, "oscillation": self.oscillation, "tracks": self._freezing.state_dict()}
        made = {"recipe": self.recipe.to_dict(), "method": self.method, "method_options": self.method_options}
        return {**made, **flags, **times, **training}

    def on_save_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        self._follow(trainer, pl_module)  # an averaging callback's own hook comes next

    def on_load_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        """A float run's optimizers know no learned scales; and `ModelParallelStrategy` reads no flags from a single file."""
        self._float_checkpoint = not described_modules(checkpoint.get("state_dict", {}), "fake") and get_method(self.method).learns
        state = checkpoint.get("callbacks", {}).get(self.state_key)
        if state is not None and not self._float_checkpoint and (state["scale_lr"] is None) != (self.scale_lr is None):
            raise MisconfigurationException(
                f"QATCallback scale_lr={self.scale_lr}: the checkpoint was made with {state['scale_lr']}, its optimizers have "
                f"other groups; take the same, or load weights only (lq.load_from_checkpoint)"
            )
        if state is None or not isinstance(trainer.strategy, ModelParallelStrategy):
            return
        for quantizer in quantizers(pl_module):
            quantizer.quantizing = state.get("started", False)
            if quantizer.is_weight:
                quantizer.observing = state.get("following", True)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._started = state_dict["started"]
        self._freezing.load_state_dict(state_dict["tracks"])
