"""`QATCallback`: quantization-aware training, hooks only."""

from __future__ import annotations

from functools import partial
from typing import Any, Literal

import lightning as L
from lightning.pytorch.strategies import ModelParallelStrategy
from lightning.pytorch.utilities import rank_zero_warn
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.hooks import RemovableHandle

from lightning_quant.calibration import (
    drop_linked_gradients,
    drop_weights,
    finish_observing,
    follow_ranges,
    has_ranks,
    keep_weights,
    link_ranks,
    measure_weights,
    quantizers,
    set_bits,
    set_flags,
    set_share,
    share_buffers,
    share_norms,
    share_ranges,
)
from lightning_quant.callbacks.preparation import Preparation, told
from lightning_quant.callbacks.schedule import FLOAT_STAGE, Phase, Schedule
from lightning_quant.companions import (
    averaged_models,
    check_learning,
    list_late,
    progress,
    restart_monitors,
    total_steps,
)
from lightning_quant.kernels.native import buffers
from lightning_quant.methods import get_method, resolve_options
from lightning_quant.mixed import Sensitivity
from lightning_quant.nn.base import described_modules
from lightning_quant.oscillation import Freezing, add_terms, rising
from lightning_quant.recipe import Recipe, as_recipe
from lightning_quant.scale_groups import ScaleGroups
from lightning_quant.selection import Selection
from lightning_quant.sharding import is_sharded
from lightning_quant.surgery import fake_modules, is_packed, relink_norms, widen_optimizer_state


class QATCallback(L.Callback):
    """Quantization-aware training (Jacob et al. 2018, arXiv:1712.05877, section 3) in any `Trainer`.

    The model gets its quantizers in `setup`, before checkpoints are restored and optimizers made; from then on only flags
    change. After the fit, `trainer.quantize()` packs it; the fitted model itself stays as it is, and can be tested, resumed and
    fitted again. Observers see training batches only.

    Args:
        recipe: what to quantize: a preset's name, a YAML path, a dict or a Recipe.
        method: `"ste"`: ranges are observed. `"lsq"`, `"lsq+"`, `"ewgs"`, `"ternary"`, `"binary"`: scales (and zero points) learn,
            initialised from the observer; `"pact"`: those of activations; `"dorefa"`: weights pass a tanh. See docs/qat.md.
        method_options: the method's own: `delta` of `"ewgs"`, `regularization` of `"pact"`.
        quantize_from: when fake quantization starts; before, observers watch the float model.
        quantize_activations_from: when activations follow, if later; until then observers watch them.
        bits: progressive widths, time -> bits (`{0: 8, 2: 4, 0.6: 2}`): integers that are narrower in the recipe have that width
            until the next time. The last one is the recipe's narrowest. Before it the model is evaluated as it is, and cannot be
            packed. At each change ranges are found anew.
        quant_noise: in training steps only this share of each weight's elements is quantized, chosen anew each time (Fan et al.
            2020, arXiv:2004.07320, section 4); None: all. Drawn from torch's generator: `RandomStateCallback` resumes it.
        freeze_observers_at: when ranges stop moving (learned scales go on learning).
        freeze_bn_at: when BatchNorm statistics stop moving.
        scale_lr: the rate of learned scales and zero points, as a factor of their optimizer group's; they get groups of their own,
            without weight decay, after `configure_optimizers`. None: no such groups. Adam undoes LSQ's gradient scale: try 0.1.
        oscillation: for weights that jump between two codes (arXiv:2203.11086): `"freeze"` holds those that do it often, `"dampen"`
            draws all weights to the middle of their codes.
        oscillation_threshold: of `"freeze"`: the share of steps that jump back, at the end of the training; 4 times that at first.
        oscillation_strength: of `"dampen"`: the factor of the squared distances in the loss, at the end; 0 at first.
        restart_monitors: when fake quantization starts, of weights or activations, and when `bits` change, the patience and best
            score of `EarlyStopping`, and the best scores and paths of a `ModelCheckpoint(monitor=...)`, start afresh, and so does
            `ReduceLROnPlateau`: the float model's would never be reached again. Files already written stay.
        train: patterns, as in a `Recipe`, of the modules that are trained, with all that is in them; or what `lq.sensitivity`
            found: the fewest layers that together make up 90 % of the costs; `"scales"`: only what quantizers learn, or of a
            packed model, whatever the recipe here, the scales of its weights (EfficientQAT's E2E-QP, arXiv:2407.11062, section
            3.3). The rest is frozen for the fit, BatchNorm statistics included. None: everything.
        rest: `"quantized"`, or `"float"`: what of the rest the recipe would quantize stays in float.

    Times are epochs (int) or fractions of the training (float in 0..1). Logs `quant/quantizing`, `quant/observing` and
    `quant/bn_frozen` at each epoch, if the Trainer has a logger, and with their arguments `quant/activations` and `quant/bits`.

    Raises:
        MisconfigurationException: a bad method, time, width or share.
        ValueError: a bad recipe.

    Example:
        >>> callback = QATCallback("w8a8", quantize_from=1, freeze_observers_at=0.6, freeze_bn_at=0.8)
        >>> trainer = L.Trainer(max_epochs=5, callbacks=[callback], logger=False, enable_checkpointing=False)
    """

    def __init__(
        self,
        recipe: str | dict[str, Any] | Recipe = "w8a8",
        *,
        method: Literal["ste", "lsq", "lsq+", "ewgs", "pact", "dorefa", "ternary", "binary"] = "ste",
        method_options: dict[str, float] | None = None,
        quantize_from: int | float = 0,
        freeze_observers_at: int | float | None = None,
        freeze_bn_at: int | float | None = None,
        quantize_activations_from: int | float = 0,
        bits: dict[int | float, int] | None = None,
        quant_noise: float | None = None,
        scale_lr: float | None = None,
        oscillation: Literal["freeze", "dampen"] | None = None,
        oscillation_threshold: float = 0.01,
        oscillation_strength: float = 1e-3,
        restart_monitors: bool = True,
        train: str | list[str] | Sensitivity | None = None,
        rest: Literal["quantized", "float"] = "quantized",
    ) -> None:
        super().__init__()
        with told():
            self.method_options = resolve_options(method, method_options)
        self.recipe = as_recipe(recipe)
        if self.recipe.algorithms:
            raise MisconfigurationException(
                f"QATCallback algorithms={list(self.recipe.algorithms)}: PTQ algorithms do not run in training; take them out, or "
                f"use the recipe with lq.quantize"
            )
        self.method = method
        self.schedule = Schedule(quantize_from, quantize_activations_from, freeze_observers_at, freeze_bn_at, bits)
        if quant_noise is not None and not 0 < quant_noise <= 1:
            raise MisconfigurationException(
                f"QATCallback quant_noise={quant_noise}: the share that is quantized, above 0 and up to 1"
            )
        self.quant_noise = quant_noise
        check_learning(method, scale_lr, oscillation, oscillation_threshold, oscillation_strength)
        self.scale_lr, self.oscillation, self.oscillation_strength = scale_lr, oscillation, oscillation_strength
        self.restart_monitors = restart_monitors
        with told():
            self.selection = Selection(train, rest)
            self.selection.check_method(method)
        self.preparation = Preparation(self.recipe, method, self.method_options, self.schedule, self.selection, oscillation)
        self._stage = FLOAT_STAGE  # what is quantized; a resumed run must know
        self._following = True  # whether ranges of weights still follow the weights
        self._waits = False  # whether learned scales still wait for their first range
        self._renewed = False  # whether averaged copies still wait for ranges that were found anew
        self._phase: Phase | None = None
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
        if self.preparation.prepare(trainer, pl_module, stage, self):
            self._stage, self._freezing.tracks = FLOAT_STAGE, {}  # another model's training may have set them
        if stage == "fit":
            self.preparation.freeze(pl_module)  # before optimizers are made and DDP takes its parameters

    @property
    def _started(self) -> bool:
        """Whether fake quantization of weights has started."""
        return bool(self._stage[0])

    # --- schedule ---

    def _apply(self, trainer: L.Trainer, module: L.LightningModule, *, force: bool = False) -> None:
        """Bring the flags to where the training is; the whole schedule is derived anew, so any resume is right."""
        if self._waits:
            finish_observing(module)
            self._waits = any(quantizer.waits for quantizer in quantizers(module))
        phase = self.schedule.phase(trainer, self._total_steps)
        if not force and phase == self._phase:
            return
        self._phase, self._following = phase, phase.observing
        finish_observing(module)
        averages = averaged_models(trainer)
        if set_bits(module, phase.bits):
            self._renewed, self._waits, self._freezing.tracks = True, is_sharded(module), {}
        for model in averages:
            set_bits(model, phase.bits)
        for model in (module, *averages):
            set_flags(model, following=phase.observing, quantizing=phase.quantizing, activations=phase.activations)
        set_flags(module, observing=phase.observing)
        for quantizer in () if phase.observing else quantizers(module):
            # a part that training reaches for the first time has no range that could be frozen
            quantizer.observing |= not (quantizer.is_weight or quantizer.has_range)
        before, self._stage = self._stage, phase.stage
        if phase.quantizing and phase.stage != before:
            share_ranges(module, averages, weights=phase.stage[::2] != before[::2])
            if self.restart_monitors:
                restart_monitors(trainer)
        if not phase.bn_frozen:
            self._thaw()
        else:
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
        self.preparation.check_prepared(trainer, pl_module)
        self.preparation.freeze(pl_module)
        list_late(pl_module)
        if self.scale_lr is not None and not is_packed(pl_module):
            schedulers = [config.scheduler for config in trainer.lr_scheduler_configs]
            with told():
                self._groups = ScaleGroups(pl_module, trainer.optimizers, schedulers, self.scale_lr)
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
        set_share(pl_module, self.quant_noise or 1.0)
        keep_weights(pl_module, True)
        self._total_steps = total_steps(trainer)
        self._apply(trainer, pl_module, force=True)

    def on_train_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._apply(trainer, pl_module, force=True)
        assert self._phase is not None
        names = ["quantizing", "observing", "bn_frozen"]
        names += ["activations"] * (self.schedule.quantize_activations_from != 0) + ["bits"] * (self.schedule.bits is not None)
        values = {f"quant/{name}": float(getattr(self._phase, name)) for name in names}
        pl_module.log_dict(values, on_step=False, on_epoch=True, batch_size=1, sync_dist=True)

    def on_train_batch_start(self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int) -> None:
        self._apply(trainer, pl_module)  # also after a validation inside the epoch

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *args: Any) -> None:
        if isinstance(trainer.strategy, ModelParallelStrategy):
            share_norms(pl_module)  # DDP does; quantized weights depend on them, and checkpoints hold one rank's
        if self._renewed:
            self._renewed = False
            share_ranges(pl_module, averaged_models(trainer))  # which take in their first step of this width next
        if self.oscillation == "freeze" and self._started and trainer.global_step != self._counted:
            self._counted = trainer.global_step
            self._freezing.step(pl_module, progress(trainer, self._total_steps))

    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.preparation.check_prepared(trainer, pl_module)
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
        self.preparation.check_prepared(trainer, pl_module)
        self._pause(pl_module)

    def on_predict_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.preparation.check_prepared(trainer, pl_module)
        self._pause(pl_module)

    def on_before_optimizer_step(self, trainer: L.Trainer, pl_module: L.LightningModule, optimizer: Any) -> None:
        if has_ranks() and self._phase is not None and not self._phase.activations:
            drop_linked_gradients(pl_module)
        drop_weights(pl_module)
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
        set_share(module, 1.0)
        keep_weights(module, False)
        buffers.clear()
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
        times = {**self.schedule.to_dict(), "quant_noise": self.quant_noise}
        flags = {"stage": self._stage, "following": self._following}
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
        for fake in fake_modules(pl_module).values():
            fake.restore_flags(*state["stage"], following=state["following"])

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._stage = state_dict["stage"]
        self._freezing.load_state_dict(state_dict["tracks"])
