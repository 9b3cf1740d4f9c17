"""`lq.Trainer`: `lightning.Trainer` with `quantize`."""

from __future__ import annotations

import os
from functools import wraps
from pathlib import Path
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from lightning_quant.callbacks.lora import LoRACallback
from lightning_quant.callbacks.packed_base import PackedBaseCallback
from lightning_quant.checkpoint import restore
from lightning_quant.precision import QuantPrecision
from lightning_quant.quantize import quantize
from lightning_quant.recipe import Recipe
from lightning_quant.surgery import is_packed


class Trainer(L.Trainer):
    """`lightning.Trainer`, whose `quantize` turns a trained model into a packed one.

    With `QuantPrecision` it brings `PackedBaseCallback` along.

    Example:
        >>> trainer = Trainer(max_epochs=1, logger=False, enable_checkpointing=False, enable_progress_bar=False)
        >>> hasattr(trainer, "quantize")
        True
    """

    @wraps(L.Trainer.__init__)  # type: ignore[misc]
    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        callbacks: list[L.Callback] = self.callbacks  # type: ignore[attr-defined]
        packs = any(isinstance(callback, (LoRACallback, PackedBaseCallback)) for callback in callbacks)
        if isinstance(self.precision_plugin, QuantPrecision) and not packs:
            callbacks.insert(0, PackedBaseCallback())

    def quantize(
        self,
        model: L.LightningModule | None = None,
        datamodule: L.LightningDataModule | None = None,
        dataloaders: Any = None,
        recipe: str | Recipe | dict[str, Any] | None = None,
        calibration_batches: int = 128,
        dry_run: bool = False,
        ckpt_path: str | os.PathLike[str] | None = None,
        work_dir: str | os.PathLike[str] | None = None,
        memory_budget: int | str | None = None,
        progress: bool = True,
    ) -> Any:
        """Quantize and pack a model; see `lightning_quant.quantize`, which does the same with `trainer=` in a plain Trainer.

        Args:
            model: by default the one last fitted.
            datamodule, dataloaders: calibration data for a float model, by default that of the fit.
            recipe: for a float model; a model trained with `QATCallback` has its own.
            calibration_batches: how many batches to use at most, on each rank.
            dry_run: return the `Summary` of what would be done, and do nothing.
            ckpt_path: whose weights to quantize, loaded into a copy of `model`: a float or QAT checkpoint's path, or `"best"` or
                `"last"` of this Trainer's `ModelCheckpoint`. A QAT checkpoint brings its quantizers, recipe and ranges.
            work_dir: a folder in which the recipe's algorithms keep what is done, so that a run that was killed goes on there.
            memory_budget: how many bytes of activations algorithms keep in memory, such as `"500 MB"`; the rest goes to files.
            progress: show a bar while algorithms run, where standard error is a terminal.

        Returns:
            the packed model, a new object in eval mode.

        Raises:
            MisconfigurationException: no model, or no such checkpoint of this Trainer.
            FileNotFoundError: no file at `ckpt_path`.
            ValueError: the checkpoint is packed already or another model's; or see `lightning_quant.quantize`.
        """
        model = model if model is not None else self.lightning_module
        if model is None:
            raise MisconfigurationException("trainer.quantize() needs a model: none was given, and none was fitted before")
        if ckpt_path is not None:
            model = self._restored(model, ckpt_path)
        return quantize(
            model,
            recipe,
            datamodule=datamodule,
            dataloaders=dataloaders,
            trainer=self,
            calibration_batches=calibration_batches,
            dry_run=dry_run,
            work_dir=work_dir,
            memory_budget=memory_budget,
            progress=progress,
        )

    def _restored(self, model: L.LightningModule, ckpt_path: str | os.PathLike[str]) -> L.LightningModule:
        if is_packed(model):
            raise ValueError("the model is packed already: give the float or the QAT model beside ckpt_path")
        path = self._path(ckpt_path)
        restored = restore(model, path)
        if is_packed(restored):
            raise ValueError(
                f"ckpt_path={str(path)!r} holds a packed model, which is quantized already: give a QAT or float checkpoint"
            )
        return restored

    def _path(self, ckpt_path: str | os.PathLike[str]) -> str:
        """Where a checkpoint is; a `"last"` that an earlier process wrote to the same `dirpath` counts."""
        which = str(ckpt_path)
        if which not in ("best", "last"):
            return which
        found: list[Path] = []
        for callback in self.checkpoint_callbacks:
            if not isinstance(callback, ModelCheckpoint):
                continue
            known = callback.best_model_path if which == "best" else callback.last_model_path
            found += [Path(known)] if known else []
            if which == "last" and callback.dirpath:
                pattern = f"{callback.CHECKPOINT_NAME_LAST}*{callback.FILE_EXTENSION}"
                found += Path(callback.dirpath).glob(pattern)
            if found and which == "best":
                break
        found = [path for path in found if path.exists()]
        if not found:
            raise MisconfigurationException(
                f"ckpt_path={which!r}: this Trainer's ModelCheckpoint has saved no {which} checkpoint: fit first, set "
                f"{'monitor' if which == 'best' else 'save_last=True and dirpath'}, or give a path"
            )
        return str(max(found, key=lambda path: path.stat().st_mtime))
