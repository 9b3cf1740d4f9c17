"""`QuantPrecision`: a frozen low-bit base and mixed precision, as a precision plugin."""

from __future__ import annotations

from collections.abc import Generator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, Literal

import torch
from lightning.pytorch.plugins.precision import MixedPrecision
from lightning.pytorch.utilities import rank_zero_info
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning_utilities.core.imports import RequirementCache
from torch import nn

from lightning_quant.kernels import KERNELS, choose
from lightning_quant.plan import tensor_bytes
from lightning_quant.qlora import base_recipe, pack_in_place, packing_as_built
from lightning_quant.recipe import Recipe
from lightning_quant.surgery import get_info, packed_modules

_BITSANDBYTES = RequirementCache("bitsandbytes>=0.49")
_DTYPES: dict[str, tuple[torch.dtype, Literal["16-mixed", "bf16-mixed", "32-true"]]] = {
    "bf16": (torch.bfloat16, "bf16-mixed"),
    "fp16": (torch.float16, "16-mixed"),
    "fp32": (torch.float32, "32-true"),
}


class QuantPrecision(MixedPrecision):
    """Keeps a model's linear layers (and what else a recipe names) in packed low-bit weights while the rest is trained.

    QLoRA (Dettmers et al. 2023, arXiv:2305.14314, section 3) is this and `LoRACallback`. Weights are dequantized in each forward
    and backward pass and get no gradient; everything else computes in autocast, with a gradient scaler for fp16. Scales, and
    weights of one dimension such as norms', are kept in float32.

    Layers are packed in place, once: while `configure_model` makes them, else in `LoRACallback`'s (or `lq.Trainer`'s own) setup or
    just before optimizers are made. A checkpoint of the packed model restores into a float module and a float one's into a packed.

    Args:
        mode: `"nf4"`, `"fp4"` (blocks of 64), `"int8"` (per channel), `"int4"` (groups of 64), `"fp8"` (e4m3, per channel), all of
            weights alone; or any recipe that needs no calibration data.
        compute_dtype: of matrix products: `"bf16"`, `"fp16"` or `"fp32"`.
        ignore: patterns of layers that stay in float; output heads do in any case, unless a recipe names them.
        double_quant: keep the scales of nf4 and fp4 in 8 bits, too: 0.52 instead of 0.56 bytes a weight.
        backend: `"bitsandbytes"`, `"native"` (this package's kernels), or `"auto"`: the first in `kernels.KERNELS` that can,
            which on GPUs is bitsandbytes where it is installed and has a kernel for the layer.

    Raises:
        MisconfigurationException: an unknown mode, dtype or backend, or a backend that cannot run the mode.

    Example:
        >>> import lightning as L
        >>> plugin = QuantPrecision("nf4", compute_dtype="bf16")
        >>> trainer = L.Trainer(plugins=[plugin], accelerator="cpu", logger=False, enable_checkpointing=False)
        >>> trainer.precision
        'bf16-mixed'
    """

    def __init__(
        self,
        mode: str | Recipe | dict[str, Any] = "nf4",
        *,
        compute_dtype: Literal["bf16", "fp16", "fp32"] = "bf16",
        ignore: str | Sequence[str] = ("lm_head",),
        double_quant: bool = False,
        backend: Literal["auto", "bitsandbytes", "native"] = "auto",
    ) -> None:
        patterns = (ignore,) if isinstance(ignore, str) else tuple(ignore)
        try:
            self.recipe = base_recipe(mode, patterns, double_quant)
        except ValueError as error:
            raise MisconfigurationException(f"QuantPrecision mode={mode!r}: {error}") from None
        if compute_dtype not in _DTYPES:
            raise MisconfigurationException(f"QuantPrecision compute_dtype={compute_dtype!r}: valid are {', '.join(_DTYPES)}")
        if backend not in ("auto", "bitsandbytes", "native"):
            raise MisconfigurationException(f"QuantPrecision backend={backend!r}: valid are auto, bitsandbytes, native")
        self.compute_dtype, precision = _DTYPES[compute_dtype]
        self.backend = "" if backend == "auto" else backend
        if backend == "bitsandbytes":
            self._check_bitsandbytes(mode)
        self.device = "cuda" if torch.cuda.is_available() else "cpu"
        self.scaler = None
        self.precision = precision
        self._scaler_state: dict[str, Any] | None = None

    def _check_bitsandbytes(self, mode: Any) -> None:
        if not _BITSANDBYTES:
            raise MisconfigurationException(f"QuantPrecision backend='bitsandbytes': {_BITSANDBYTES}")
        scheme, refuses = self.recipe.scheme, KERNELS["bitsandbytes"].refuses
        if scheme is None or scheme.weight is None or refuses("linear", torch.empty(1), scheme.weight, scheme.input):
            raise MisconfigurationException(
                f"QuantPrecision backend='bitsandbytes': it has kernels for nf4 and fp4, not for mode={mode!r}: use backend='auto'"
            )

    # --- the base ---

    def module_init_context(self) -> AbstractContextManager:
        """Linear layers made in here are packed one by one as they are made."""
        return packing_as_built(self.recipe, self.backend)

    def convert_module(self, module: nn.Module) -> nn.Module:
        """Pack a float module in place; one that is packed already stays as it is.

        Raises:
            MisconfigurationException: it is packed otherwise, prepared for QAT, or has nothing to pack.
        """
        first = get_info(module) is None
        try:
            pack_in_place(module, self.recipe, self.backend)
        except ValueError as error:
            raise MisconfigurationException(f"QuantPrecision: {error}") from error
        if first:
            self._keep_norms(module)
            self._tell(module)
        return module

    @staticmethod
    def _keep_norms(module: nn.Module) -> None:
        for part in module.modules():
            for value in part.parameters(recurse=False):
                if value.dim() == 1 and value.dtype in (torch.float16, torch.bfloat16):
                    value.data = value.data.float()

    def _tell(self, module: nn.Module) -> None:
        info, packed = get_info(module), packed_modules(module)
        assert info is not None
        kept = [
            value
            for part in packed.values()
            for name, value in part.named_parameters(recurse=False)
            if name not in (*part.optional_float, "pre_scale")
        ]
        numel = sum(torch.Size(part.packed_shape(name)).numel() for part in packed.values() for name in part.weight_axes(part))
        used = {self.backend or self._automatic(part) for part in packed.values()}
        names = list(info.skipped)
        floats = f"; in float: {', '.join(names[:5])}{', ...' if len(names) > 5 else ''}" if names else ""
        rank_zero_info(
            f"QuantPrecision: {len(packed)} layers packed ({next(iter(packed.values())).scheme.label}), "
            f"{tensor_bytes(kept) / numel:.4f} bytes a weight, backend {' and '.join(sorted(used))}{floats}"
        )

    @staticmethod
    def _automatic(part: Any) -> str:
        weight = part.weight_packed if "weight_packed" in part._parameters else next(part.parameters())
        x = torch.empty(0, dtype=part._float_dtype, device=weight.device)
        return choose("linear", x, part.scheme.weight, part.scheme.input)[0]

    # --- mixed precision ---

    def connect(self, model: nn.Module, optimizers: list[Any], lr_schedulers: list[Any]) -> Any:
        """The device is known now."""
        device = next((value.device.type for value in model.parameters()), self.device)
        if self.precision == "16-mixed" and (self.scaler is None or device != self.device):
            self.scaler = torch.amp.GradScaler(device=device)
            if self._scaler_state is not None:
                self.scaler.load_state_dict(self._scaler_state)
        self.device = device
        return super().connect(model, optimizers, lr_schedulers)

    def autocast_context_manager(self) -> torch.autocast:
        return torch.autocast(self.device, dtype=self.compute_dtype, cache_enabled=False)

    @contextmanager
    def forward_context(self) -> Generator[None, None, None]:
        with self.autocast_context_manager() if self.precision != "32-true" else nullcontext():
            yield

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        self._scaler_state = dict(state_dict)
        super().load_state_dict(self._scaler_state)
