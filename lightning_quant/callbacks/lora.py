"""`LoRACallback`: adapters in any LightningModule, hooks only."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import lightning as L
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning_utilities.core.imports import RequirementCache

from lightning_quant.adapters import (
    adapter_config,
    adapter_root,
    has_adapter,
    inject,
    leave_out_base,
    put_adapter,
    save_adapter,
    start_loftq,
)
from lightning_quant.callbacks.packed_base import pack_base
from lightning_quant.companions import check_in_place
from lightning_quant.precision import QuantPrecision
from lightning_quant.recipe import Recipe

_PEFT = RequirementCache("peft>=0.18")


class LoRACallback(L.Callback):
    """Fine-tunes low-rank adapters (Hu et al. 2021, arXiv:2106.09685, section 4) on a frozen model, float or packed, by PEFT.

    In `setup`, before checkpoints are restored and optimizers made, the model is packed (with `QuantPrecision`), gets its adapters,
    and all else is frozen. `configure_optimizers` may take `self.parameters()`: what is frozen has no gradient. Checkpoints
    hold the adapter, and its optimizer, without the base; they resume exactly, and refuse another base.

    Args:
        r: rank of the adapters.
        alpha: the adapter's output is scaled by `alpha / r` (`alpha / sqrt(r)` with `options={"use_rslora": True}`).
        dropout: of the adapter's input.
        target_modules: `"all-linear"` (output heads are left out), a list of names or of their last parts, or a regular expression.
        init: `"default"` (B is 0), `"loftq"` (Li et al. 2023, arXiv:2310.08659, section 3: the adapter starts at what packing has
            cost), or a value of PEFT's `init_lora_weights`, such as `"gaussian"`; `"pissa"` and its like for a float base only.
        modules_to_save: names (or last parts) of modules that are trained whole.
        save: what checkpoints hold: `"adapter"`, or `"all"` for the base, too.
        adapter_dir: where PEFT's adapter folder is written when the fit ends; by default `adapter` in the logger's folder, or
            in `default_root_dir`. `lq.save_adapter` writes one at any time.
        gradient_checkpointing: of a transformers model, which computes activations again in the backward pass.
        options: further arguments of PEFT's `LoraConfig`, such as `{"use_dora": True}`.

    Raises:
        MisconfigurationException: a bad value, or PEFT is not installed.

    Example:
        >>> callback = LoRACallback(r=8, alpha=16, target_modules=["q_proj", "v_proj"])
        >>> trainer = L.Trainer(max_epochs=1, callbacks=[callback], logger=False, enable_checkpointing=False, accelerator="cpu")
    """

    def __init__(
        self,
        r: int = 16,
        alpha: float | None = None,
        dropout: float = 0.0,
        target_modules: str | Sequence[str] = "all-linear",
        init: str = "default",
        modules_to_save: Sequence[str] = (),
        save: Literal["adapter", "all"] = "adapter",
        adapter_dir: str | None = None,
        gradient_checkpointing: bool = False,
        options: dict[str, Any] | None = None,
    ) -> None:
        super().__init__()
        if not _PEFT:
            raise MisconfigurationException(f"LoRACallback needs PEFT: {_PEFT}")
        if isinstance(r, bool) or not isinstance(r, int) or r < 1:
            raise MisconfigurationException(f"LoRACallback r={r!r}: the rank is an int from 1 on")
        if not 0.0 <= dropout < 1.0:
            raise MisconfigurationException(f"LoRACallback dropout={dropout!r}: a probability in [0, 1)")
        if alpha is not None and not alpha > 0:
            raise MisconfigurationException(f"LoRACallback alpha={alpha!r}: must be positive")
        if save not in ("adapter", "all"):
            raise MisconfigurationException(f"LoRACallback save={save!r}: valid are adapter, all")
        taken = {"r", "lora_alpha", "lora_dropout", "target_modules", "init_lora_weights", "modules_to_save"} & set(options or {})
        if taken:
            raise MisconfigurationException(f"LoRACallback options: {', '.join(sorted(taken))} has an argument of its own")
        self._check_options(options or {})
        self.r, self.alpha, self.dropout, self.init = r, 2.0 * r if alpha is None else alpha, dropout, init
        self.target_modules = target_modules if isinstance(target_modules, str) else list(target_modules)
        self.modules_to_save = [modules_to_save] if isinstance(modules_to_save, str) else list(modules_to_save)
        self.save, self.adapter_dir, self.gradient_checkpointing = save, adapter_dir, gradient_checkpointing
        self.options = dict(options or {})

    @staticmethod
    def _check_options(options: dict[str, Any]) -> None:
        from dataclasses import fields

        from peft import LoraConfig

        valid = [field.name for field in fields(LoraConfig)]
        unknown = [name for name in options if name not in valid]
        if unknown:
            raise MisconfigurationException(
                f"LoRACallback options: LoraConfig has no {', '.join(unknown)}; it has {', '.join(valid)}"
            )

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        if has_adapter(pl_module):
            self._check_same(pl_module)
            return
        check_in_place(trainer, type(self).__name__)
        start = {}
        try:
            if self.init == "loftq":
                start = start_loftq(pl_module, self._base_recipe(trainer), self.r, self.target_modules)
            pack_base(trainer, pl_module, type(self).__name__)
            inject(
                pl_module,
                r=self.r,
                alpha=self.alpha,
                dropout=self.dropout,
                target_modules=self.target_modules,
                init=self.init,
                modules_to_save=self.modules_to_save,
                options=self.options,
            )
        except ValueError as error:
            raise MisconfigurationException(f"LoRACallback: {error}") from error
        put_adapter(pl_module, start)
        self._check_same(pl_module)
        if self.gradient_checkpointing:
            self._checkpoint_gradients(pl_module)
        if self.save == "adapter":
            leave_out_base(pl_module)
        trained = sum(value.numel() for value in pl_module.parameters() if value.requires_grad)
        layers = len(adapter_config(pl_module).target_modules)
        rank_zero_info(f"LoRACallback: {trained:,} parameters are trained, {layers} layers adapted")

    @staticmethod
    def _base_recipe(trainer: L.Trainer) -> Recipe:
        plugin = trainer.precision_plugin
        if not isinstance(plugin, QuantPrecision):
            raise ValueError(
                "init='loftq' makes up for packing, and nothing is packed: give Trainer(plugins=[lq.QuantPrecision(...)])"
            )
        return plugin.recipe

    def _check_same(self, module: L.LightningModule) -> None:
        config = adapter_config(module)
        theirs = {"r": config.r, "alpha": config.lora_alpha, "dropout": config.lora_dropout}
        mine = {"r": self.r, "alpha": self.alpha, "dropout": self.dropout}
        if theirs != mine:
            raise MisconfigurationException(f"the model has an adapter of {theirs} already, and this LoRACallback is for {mine}")

    @staticmethod
    def _checkpoint_gradients(module: L.LightningModule) -> None:
        root = adapter_root(module)
        if not hasattr(root, "gradient_checkpointing_enable"):
            raise MisconfigurationException(
                f"LoRACallback gradient_checkpointing=True: {type(root).__name__} is no transformers model; checkpoint in its "
                f"forward with torch.utils.checkpoint, or leave it off"
            )
        root.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})  # type: ignore[operator]
        root.enable_input_require_grads()  # type: ignore[operator]

    def on_fit_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if not trainer.is_global_zero or trainer.fast_dev_run:  # type: ignore[attr-defined]
            return
        folder = self.adapter_dir or str(Path(trainer.log_dir or trainer.default_root_dir) / "adapter")
        try:
            rank_zero_info(f"LoRACallback: the adapter is in {save_adapter(pl_module, folder)}")
        except OSError as error:  # the training is over and must not fail for this
            rank_zero_warn(f"LoRACallback: the adapter was not written ({error}): write it with lq.save_adapter(module, folder)")
