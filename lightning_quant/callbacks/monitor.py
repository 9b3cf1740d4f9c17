"""`QuantizationMonitor`: what quantization costs each tensor, measured while the model trains."""

from __future__ import annotations

import math
from typing import Any

import lightning as L
import torch
from lightning.pytorch.utilities import rank_zero_warn
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn

from lightning_quant.fake_quant import FakeQuantize
from lightning_quant.numerics import CODEBOOKS, FLOAT8, MIN_SCALE, qrange, to_groups
from lightning_quant.report import Summary, summary
from lightning_quant.spec import QuantSpec
from lightning_quant.surgery import fake_modules, is_prepared

# half a step, and a little for float32 rounding: an observed scale puts its largest value on half a step exactly
_TOLERANCE = 0.5001
# elements that are in float64 at a time: on a CPU they stay in its cache
_CPU_CHUNK, _CHUNK = 1 << 18, 1 << 24

_SATURATES_OBSERVED = (
    "Let its range be observed longer (freeze_observers_at), or with observer='minmax', give it more bits, or leave the layer in "
    "float with Recipe(ignore=[...])"
)
_SATURATES_LEARNED = (
    "Give its scales a lower rate (lq.param_groups(module, scale_lr=...)) or it more bits, or leave the layer in float with "
    "Recipe(ignore=[...])"
)
_COLLAPSES_OBSERVED = (
    "Look for outliers or constant data in front of it; use observer='percentile' or 'mse', a finer granularity or more bits, or "
    "leave the layer in float with Recipe(ignore=[...])"
)
_COLLAPSES_LEARNED = (
    "Give its scales a lower rate (lq.param_groups(module, scale_lr=...)) and start again from a checkpoint from before, or leave "
    "the layer in float with Recipe(ignore=[...])"
)


def clip_limits(spec: QuantSpec) -> tuple[float, float]:
    """Where clipping starts, in steps of the scale from the zero point's code 0: half a step outside the grid's ends.

    A value within half a step of an end is rounded to it, with no more error than anywhere on the grid.

    Example:
        >>> clip_limits(QuantSpec(4))
        (-8.5001, 7.5001)
    """
    if spec.dtype in FLOAT8:
        info = torch.finfo(FLOAT8[spec.dtype])
        high = info.max + _TOLERANCE * info.eps * 2.0 ** math.floor(math.log2(info.max))
        return -high, high
    if spec.dtype in CODEBOOKS:
        first, second, *_, before, last = CODEBOOKS[spec.dtype]
        return first - _TOLERANCE * (second - first), last + _TOLERANCE * (last - before)
    qmin, qmax = qrange(spec)
    return qmin - _TOLERANCE, qmax + _TOLERANCE


def sqnr_db(signal: float, noise: float) -> float | None:
    """`10 log10(signal / noise)`, of sums of squares; None where either is 0, as in a tensor that is on the grid already.

    Example:
        >>> sqnr_db(100.0, 1.0), sqnr_db(100.0, 0.0)
        (20.0, None)
    """
    return None if signal == 0 or noise == 0 else 10 * (math.log10(signal) - math.log10(noise))


def _energies(x: Tensor, y: Tensor) -> Tensor:
    """`sum x^2` and `sum (x - y)^2`, float64 `[2]` (float32 where there is no float64)."""
    size = _CPU_CHUNK if x.device.type == "cpu" else _CHUNK
    dtype = torch.float32 if x.device.type == "mps" else torch.float64
    total = torch.zeros(2, dtype=dtype, device=x.device)
    for one, other in zip(x.reshape(-1).split(size), y.reshape(-1).split(size), strict=True):
        signal, noise = one.to(dtype), other.to(dtype)
        noise = noise - signal
        total += torch.stack([signal.dot(signal), noise.dot(noise)])
    return total


def _row_ranges(rows: Tensor) -> tuple[Tensor, Tensor]:
    if len(rows) > 1:
        return torch.aminmax(rows, dim=1)
    low, high = torch.aminmax(rows)  # on a CPU ten times as fast as along a dimension
    return low[None], high[None]


class Meter:
    """A forward hook that sums up what one `FakeQuantize` does over its calls in one batch. It keeps results, no activations.

    Dynamic quantizers have the range of their input: nothing is clipped, and no scale can collapse.
    """

    def __init__(self, learned: bool) -> None:
        self.learned = learned
        self.elements = 0
        self.energies: Tensor | None = None
        self.outside: Tensor | None = None
        self.scale: Tensor | None = None
        # smallest and largest input and output of each scale's elements: [4, n_scales]
        self.ranges: Tensor | None = None

    @torch.no_grad()
    def __call__(self, quantizer: FakeQuantize, args: tuple[Any, ...], output: Tensor) -> None:
        if torch.compiler.is_compiling():  # else the hook would be compiled in, and stay when it is removed
            return
        x, y = args[0].detach(), output.detach()
        # in a backward pass a checkpointed block runs a second time; sums of a DTensor are collectives, and this is rank zero
        if not quantizer.quantizing or x.numel() == 0 or torch._C._current_graph_task_id() != -1 or hasattr(x, "full_tensor"):
            return
        self.elements += x.numel()
        energies = _energies(x, y)
        self.energies = energies if self.energies is None else self.energies + energies
        if not quantizer.spec.dynamic:
            self._compare_range(quantizer, x.float(), y.float())

    def _compare_range(self, quantizer: FakeQuantize, x: Tensor, y: Tensor) -> None:
        spec, axis = quantizer.spec, quantizer.axis
        scale, zero_point = (value.reshape(-1, 1) for value in quantizer.qparams())
        low, high = clip_limits(spec)
        rows, out = to_groups(x, spec, axis), to_groups(y, spec, axis)
        (x_min, x_max), (y_min, y_max) = _row_ranges(rows), _row_ranges(out)
        outside = torch.count_nonzero((rows < (low - zero_point) * scale) | (rows > (high - zero_point) * scale))
        ranges = torch.stack([x_min, -x_max, y_min, -y_max])
        self.scale = scale.flatten()
        self.outside = outside if self.outside is None else self.outside + outside
        self.ranges = ranges if self.ranges is None else torch.minimum(self.ranges, ranges)

    def sqnr_db(self) -> float | None:
        assert self.energies is not None
        return sqnr_db(*self.energies.tolist())

    def clipped(self) -> float:
        """The fraction of elements outside the grid."""
        return 0.0 if self.outside is None else self.outside.item() / self.elements

    def collapsed(self) -> tuple[int, int]:
        """How many scales are at the floor or put values that differ on one code, of how many."""
        if self.scale is None or self.ranges is None:
            return 0, 0
        low, high, out_low, out_high = self.ranges
        bad = (self.scale <= MIN_SCALE) | ((low < -high) & (out_low == -out_high))
        return int(bad.sum()), bad.numel()


class QuantizationMonitor(L.Callback):
    """Logs how well quantization fits each tensor of a model that trains with `QATCallback`, and warns where it does not.

    At the optimizer steps 0, n, 2n, ... (the first batch of each, under gradient accumulation), for each weight and activation that
    is quantized, summed over the calls of its module in the batch:

    - `quant/sqnr_db/<module>.<tensor>`: `10 log10(sum x^2 / sum (x - q(x))^2)` in dB. Left out where a sum is 0.
    - `quant/clipped/<module>.<tensor>`: the fraction (0..1) of elements more than half a step (0.5001) outside the grid's ends
      `(qmin - zero_point) * scale` and `(qmax - zero_point) * scale`; 0 if dynamic.
    - `quant/sqnr_db/min`, `quant/sqnr_db/mean`, `quant/clipped/max`, `quant/clipped/mean`: over these tensors.

    When the fit ends: `quant/bits_per_weight` (scales included, over quantized weights), `quant/packed_bytes`, `quant/float_bytes`
    (of the whole model) and `quant/ratio` of the two. All go to every logger of the Trainer, at the step of `LearningRateMonitor`.

    It warns, once in a fit for each layer and kind, of a layer that saturates, or whose scale collapses: it is at the smallest
    there is (`MIN_SCALE`), or puts all of an input that varies on one code.

    Training is the same to the bit with and without it. Forward hooks exist during measured batches only. With several ranks, rank
    zero measures its own share of the batch; nothing is communicated. Evaluation is not measured, nor are the hidden states of
    LSTM and GRU, sharded tensors (DTensor), and modules inside `torch.compile`, which leaves such hooks out.

    Args:
        every_n_steps: optimizer steps from one measurement to the next.
        saturation: the clipped fraction (0..1) above which a layer is said to saturate.
        per_layer: log each tensor; else only what is over all of them.

    Raises:
        MisconfigurationException: a bad argument.

    Example:
        >>> from lightning_quant.callbacks import QATCallback
        >>> callbacks = [QATCallback("w8a8"), QuantizationMonitor(every_n_steps=50)]
        >>> trainer = L.Trainer(max_epochs=5, callbacks=callbacks, logger=False, enable_checkpointing=False)
    """

    def __init__(self, every_n_steps: int = 100, saturation: float = 0.5, per_layer: bool = True) -> None:
        super().__init__()
        if isinstance(every_n_steps, bool) or not isinstance(every_n_steps, int) or every_n_steps < 1:
            raise MisconfigurationException(f"QuantizationMonitor every_n_steps={every_n_steps!r}: give a positive int")
        if isinstance(saturation, bool) or not isinstance(saturation, (int, float)) or not 0 <= saturation <= 1:
            raise MisconfigurationException(f"QuantizationMonitor saturation={saturation!r}: give a fraction in 0..1")
        if not isinstance(per_layer, bool):
            raise MisconfigurationException(f"QuantizationMonitor per_layer={per_layer!r}: give True or False")
        self.every_n_steps, self.saturation, self.per_layer = every_n_steps, saturation, per_layer
        self._window = -1  # which multiple of every_n_steps was measured last
        self._measuring: int | None = None  # the one that is being measured
        self._meters: dict[tuple[str, str], Meter] = {}
        self._handles: list[Any] = []
        self._warned: set[tuple[str | None, str]] = set()

    # --- when ---

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._detach()
        self._warned = set()
        if not is_prepared(pl_module):
            rank_zero_warn(
                "QuantizationMonitor has nothing to measure: the model has no quantizers. Add a QATCallback to the Trainer, or "
                "prepare the model with lq.prepare"
            )

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._window = (trainer.global_step - 1) // self.every_n_steps

    def on_train_batch_start(self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int) -> None:
        window = trainer.global_step // self.every_n_steps
        if window == self._window or not trainer.is_global_zero:
            return
        self._detach()
        self._measuring = window
        for name, module in fake_modules(pl_module).items():
            for tensor, quantizer in module.quantizers():
                meter = self._meters[name, tensor] = Meter(quantizer.learned)
                self._handles.append(quantizer.register_forward_hook(meter))

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if self._measuring is None:
            return
        self._window, meters = self._measuring, self._meters
        self._detach()
        self._report(trainer, pl_module, meters)

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._detach()  # a module that skips an epoch in its on_train_batch_start gets no on_train_batch_end

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._detach()
        if trainer.is_global_zero and is_prepared(pl_module):
            _log(trainer, _sizes(summary(pl_module)))

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        self._detach()

    def _detach(self) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles, self._meters, self._measuring = [], {}, None

    # --- what ---

    def _report(self, trainer: L.Trainer, module: nn.Module, meters: dict[tuple[str, str], Meter]) -> None:
        ran = {key: meter for key, meter in meters.items() if meter.elements}
        if not ran:
            fakes = fake_modules(module).values()
            if any(quantizer.quantizing for fake in fakes for _, quantizer in fake.quantizers()):
                self._warn(None, "unseen", "no quantizer ran in a measured batch (modules inside torch.compile cannot be measured)")
            return
        noise = {f"{layer}.{tensor}".lstrip("."): meter.sqnr_db() for (layer, tensor), meter in ran.items()}
        clipped = {f"{layer}.{tensor}".lstrip("."): meter.clipped() for (layer, tensor), meter in ran.items()}
        metrics = {"clipped/max": max(clipped.values()), "clipped/mean": sum(clipped.values()) / len(clipped)}
        finite = {name: value for name, value in noise.items() if value is not None}
        if finite:
            values = torch.tensor(list(finite.values()), dtype=torch.float64)  # whose minimum is nan if any is
            metrics.update({"sqnr_db/min": values.min().item(), "sqnr_db/mean": values.mean().item()})
        if self.per_layer:
            metrics.update({f"sqnr_db/{name}": value for name, value in finite.items()})
            metrics.update({f"clipped/{name}": value for name, value in clipped.items()})
        _log(trainer, {f"quant/{name}": value for name, value in metrics.items()})
        for layer in dict.fromkeys(layer for layer, _ in ran):
            mine = {tensor: meter for (other, tensor), meter in ran.items() if other == layer}
            self._check_saturation(layer, mine, trainer.global_step)
            self._check_collapse(layer, mine, trainer.global_step)

    def _check_saturation(self, layer: str, meters: dict[str, Meter], step: int) -> None:
        bad = {tensor: clipped for tensor, meter in meters.items() if (clipped := meter.clipped()) > self.saturation}
        if bad:
            told = " and ".join(f"{clipped:.1%} of its {tensor}" for tensor, clipped in bad.items())
            advice = _SATURATES_LEARNED if any(meters[tensor].learned for tensor in bad) else _SATURATES_OBSERVED
            self._warn(layer, "saturates", f"saturates: {told} lies outside the quantized range (step {step}). {advice}")

    def _check_collapse(self, layer: str, meters: dict[str, Meter], step: int) -> None:
        bad = {tensor: counts for tensor, meter in meters.items() if (counts := meter.collapsed())[0]}
        if bad:
            told = " and ".join(f"{count} of the {total} of its {tensor}" for tensor, (count, total) in bad.items())
            advice = _COLLAPSES_LEARNED if any(meters[tensor].learned for tensor in bad) else _COLLAPSES_OBSERVED
            where = f"at the floor ({MIN_SCALE:.2g}) or with all values on one code (step {step})"
            self._warn(layer, "collapses", f"has scales that collapsed, {told}: {where}. {advice}")

    def _warn(self, layer: str | None, kind: str, text: str) -> None:
        if (layer, kind) not in self._warned:
            self._warned.add((layer, kind))
            rank_zero_warn(f"QuantizationMonitor: {text}" if layer is None else f"QuantizationMonitor: {layer or '(root)'} {text}")


def _sizes(found: Summary) -> dict[str, float]:
    rows = [row for row in found.rows if row.bits]
    weights = sum(8 * row.bytes_after / row.bits for row in rows)
    return {
        "quant/bits_per_weight": 8 * sum(row.bytes_after for row in rows) / max(weights, 1.0),
        "quant/packed_bytes": float(found.bytes_after),
        "quant/float_bytes": float(found.bytes_before),
        "quant/ratio": found.bytes_after / max(found.bytes_before, 1),
    }


def _log(trainer: L.Trainer, metrics: dict[str, float]) -> None:
    """To every logger, at the step that `LearningRateMonitor` uses: batches that ended in an optimizer step."""
    for logger in trainer.loggers:
        logger.log_metrics(metrics, step=trainer.fit_loop.epoch_loop._batches_that_stepped)
