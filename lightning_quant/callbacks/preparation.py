"""What `QATCallback` does to a model, and asks of it, before the training."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass

import lightning as L
from lightning.pytorch.strategies import ModelParallelStrategy
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.model_helpers import is_overridden
from torch import nn

from lightning_quant.adapters import has_adapter
from lightning_quant.callbacks.schedule import Schedule
from lightning_quant.companions import check_callbacks, check_strategy, configure
from lightning_quant.loop import example_call
from lightning_quant.nn import lookup
from lightning_quant.plan import Plan, plan_model
from lightning_quant.recipe import Recipe
from lightning_quant.selection import Selection
from lightning_quant.sharding import is_sharded
from lightning_quant.surgery import apply_plan, fake_modules, get_info, is_packed, is_prepared


@contextlib.contextmanager
def told() -> Iterator[None]:
    """What is wrong with an argument of QATCallback is said as Lightning does."""
    try:
        yield
    except ValueError as error:
        raise MisconfigurationException(f"QATCallback {error}") from None


@dataclass(frozen=True)
class Preparation:
    """Gives a model its quantizers, once, and checks a model that has them; see `QATCallback` for the fields."""

    recipe: Recipe
    method: str
    method_options: dict[str, float]
    schedule: Schedule
    selection: Selection
    oscillation: str | None

    def freeze(self, module: L.LightningModule) -> None:
        """Freeze what is not trained."""
        if is_prepared(module) or (self.selection.scales and is_packed(module)):
            with told():
                self.selection.freeze(module)

    def prepare(self, trainer: L.Trainer, module: L.LightningModule, stage: str, callback: L.Callback) -> bool:
        """Give the model its quantizers, if it has none yet; returns whether that was done.

        Raises:
            MisconfigurationException: Trainer, model and callbacks do not go together.
        """
        check_strategy(trainer, module)
        if self.oscillation is not None and isinstance(trainer.strategy, ModelParallelStrategy):
            raise MisconfigurationException(
                f"QATCallback oscillation={self.oscillation!r}: under {type(trainer.strategy).__name__} no rank has whole weights: "
                f"leave it out, or use strategy='ddp'"
            )
        if is_packed(module):
            if self.selection.scales and isinstance(trainer.strategy, ModelParallelStrategy):
                raise MisconfigurationException(
                    "QATCallback train='scales': packed scales do not train where they are sharded: use strategy='ddp'"
                )
            return False
        if stage == "fit":
            self.schedule.check_trainer(trainer)
        if is_prepared(module):
            self._check_same(module)
            return False
        if has_adapter(module):
            raise MisconfigurationException("adapters are made on layers with quantizers: list QATCallback before LoRACallback")
        if stage == "fit":
            check_callbacks(trainer, callback)
        if isinstance(trainer.strategy, ModelParallelStrategy):
            if is_sharded(module) or not any(lookup(type(part)) for part in module.modules()):
                return False  # configure_model makes the layers, prepares and shards them: `check_prepared` comes after it
        elif is_overridden("configure_model", module):
            # its layers must exist before they can be prepared; Lightning calls it again, which it has to allow
            configure(trainer, module, type(callback).__name__)
        plan = plan_model(module, self.recipe, example_call(trainer, module, stage))
        with told():
            plan = self.selection.cut(module, plan)
        self._check_plan(plan)
        apply_plan(module, plan, method=self.method, method_options=self.method_options)
        return True

    def check_prepared(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        """Check a model after a configure_model that `prepare` has left to Lightning."""
        if not isinstance(trainer.strategy, ModelParallelStrategy) or is_packed(module):
            return
        if not is_prepared(module):
            raise MisconfigurationException(
                f"{type(module).__name__}.configure_model has made layers without quantizers. Make them in __init__, "
                f"where QATCallback finds them, or call lq.prepare(self, recipe, method={self.method!r}) in configure_model, "
                f"after the layers are made and before fully_shard"
            )
        self._check_same(module)

    def _check_plan(self, plan: Plan) -> None:
        self.schedule.check_schemes(match.scheme for match in plan.matches)
        freeze_at = self.schedule.freeze_observers_at
        # a range that is frozen before it was ever observed would stop the training at its first batch
        if freeze_at == 0 and any(match.scheme.needs_data for match in plan.matches):
            raise MisconfigurationException(
                f"QATCallback freeze_observers_at={freeze_at}: the recipe has static activations, whose ranges "
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
        self.schedule.check_schemes(fake.scheme for fake in fake_modules(module).values())
