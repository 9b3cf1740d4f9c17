"""`PackedBaseCallback`: packs the base of `QuantPrecision` before checkpoints are restored."""

from __future__ import annotations

import lightning as L
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.model_helpers import is_overridden

from lightning_quant.companions import check_in_place, configure
from lightning_quant.precision import QuantPrecision


class PackedBaseCallback(L.Callback):
    """Packs a module in `setup`, before Lightning restores a checkpoint, where `QuantPrecision` itself comes after it.

    `lq.Trainer` and `LoRACallback` bring it along; list it in a plain `Trainer` that fits or evaluates a packed checkpoint.

    Example:
        >>> trainer = L.Trainer(plugins=[QuantPrecision("int8")], callbacks=[PackedBaseCallback()], accelerator="cpu", logger=False,
        ...                     enable_checkpointing=False)
    """

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        plugin = trainer.precision_plugin
        if not isinstance(plugin, QuantPrecision):
            raise MisconfigurationException(
                f"{type(self).__name__} packs for QuantPrecision, and this Trainer has {type(plugin).__name__}: give "
                f"Trainer(plugins=[lq.QuantPrecision(...)]), or leave the callback out"
            )
        pack_base(trainer, pl_module, type(self).__name__)


def pack_base(trainer: L.Trainer, module: L.LightningModule, who: str) -> None:
    """Make all of a module's layers, and pack them if the Trainer's precision is `QuantPrecision`."""
    check_in_place(trainer, who)
    if is_overridden("configure_model", module):
        # its layers must exist before they can be packed; Lightning calls it again, which it has to allow
        configure(trainer, module, who)
    plugin = trainer.precision_plugin
    if isinstance(plugin, QuantPrecision):
        plugin.convert_module(module)
