"""`lq.Trainer`: `lightning.Trainer` with `quantize`."""

from __future__ import annotations

from typing import Any

import lightning as L
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from lightning_quant.quantize import quantize
from lightning_quant.recipe import Recipe


class Trainer(L.Trainer):
    """`lightning.Trainer`, whose `quantize` turns a trained model into a packed one.

    Example:
        >>> trainer = Trainer(max_epochs=1, logger=False, enable_checkpointing=False, enable_progress_bar=False)
        >>> hasattr(trainer, "quantize")
        True
    """

    def quantize(
        self,
        model: L.LightningModule | None = None,
        datamodule: L.LightningDataModule | None = None,
        dataloaders: Any = None,
        recipe: str | Recipe | dict[str, Any] | None = None,
        calibration_batches: int = 128,
        dry_run: bool = False,
    ) -> Any:
        """Quantize and pack a model; see `lightning_quant.quantize`, which does the same with `trainer=` in a plain Trainer.

        Args:
            model: by default the one last fitted.
            datamodule, dataloaders: calibration data for a float model, by default that of the fit.
            recipe: for a float model; a model trained with `QATCallback` has its own.
            calibration_batches: how many batches to use at most, on each rank.
            dry_run: return the `Summary` of what would be done, and do nothing.

        Returns:
            the packed model, a new object in eval mode.
        """
        model = model if model is not None else self.lightning_module
        if model is None:
            raise MisconfigurationException("trainer.quantize() needs a model: none was given, and none was fitted before")
        return quantize(
            model,
            recipe,
            datamodule=datamodule,
            dataloaders=dataloaders,
            trainer=self,
            calibration_batches=calibration_batches,
            dry_run=dry_run,
        )
