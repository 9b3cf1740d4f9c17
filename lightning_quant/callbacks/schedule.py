"""When what of a quantization-aware training happens."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import lightning as L
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from lightning_quant.companions import When, check_when, progress, re_estimates_norms
from lightning_quant.fake_quant import NARROWEST
from lightning_quant.spec import QuantScheme

_TIMES = ("quantize_from", "quantize_activations_from", "freeze_observers_at", "freeze_bn_at")


@dataclass(frozen=True)
class Phase:
    """What holds at one moment.

    Args:
        quantizing, activations: whether weights are quantized, and activations.
        observing: whether ranges move.
        bn_frozen: whether BatchNorm statistics stand still.
        bits: the width that narrower integers have for now; `NARROWEST`: their own.
    """

    quantizing: bool
    activations: bool
    observing: bool
    bn_frozen: bool
    bits: int

    @property
    def stage(self) -> list[int]:
        """What changes the model's function: at each change of it, scores from before are out of reach."""
        return [int(self.quantizing), int(self.activations), self.bits]


# before fake quantization starts
FLOAT_STAGE = [0, 0, NARROWEST]


@dataclass(frozen=True)
class Schedule:
    """The times of `QATCallback`: epochs (int), fractions of the training (float in 0..1), or None for never.

    Args:
        quantize_from, quantize_activations_from, freeze_observers_at, freeze_bn_at: see `QATCallback`.
        bits: time -> width; the first at 0, and each narrower than the one before.

    Raises:
        MisconfigurationException: a value that is none of these.

    Example:
        >>> Schedule(bits={0: 8, 2: 4, 0.6: 2}).final_bits
        2
    """

    quantize_from: When = 0
    quantize_activations_from: When = 0
    freeze_observers_at: When = None
    freeze_bn_at: When = None
    bits: Mapping[int | float, int] | None = None

    def __post_init__(self) -> None:
        for name in _TIMES:
            check_when(name, getattr(self, name))
        for name in _TIMES[:2]:
            if getattr(self, name) is None:
                raise MisconfigurationException(f"QATCallback {name}=None: then it would never be quantized; 0 starts at once")
        if self.bits is not None:
            self._check_bits(self.bits)

    def _check_bits(self, bits: Mapping[int | float, int]) -> None:
        if not isinstance(bits, Mapping) or 0 not in bits:
            raise MisconfigurationException(f"QATCallback bits={bits!r}: a dict of times and widths, from 0 on: {{0: 8, 0.5: 4}}")
        for when, width in bits.items():
            check_when(f"bits={bits}: time", when)
            if isinstance(width, bool) or not isinstance(width, int) or not NARROWEST <= width <= 8:
                raise MisconfigurationException(f"QATCallback bits={bits}: {width!r} is no width; integers have 2 to 8 bits")
        for kind in (int, float):  # which of an epoch and a fraction comes first depends on the Trainer
            _check_falling(bits, {float(when): width for when, width in bits.items() if isinstance(when, kind) or when == 0})

    @property
    def final_bits(self) -> int:
        """The width at the end, `NARROWEST` where none is given."""
        return min(self.bits.values()) if self.bits else NARROWEST

    def to_dict(self) -> dict[str, Any]:
        """Primitives only."""
        return {**{name: getattr(self, name) for name in _TIMES}, "bits": None if self.bits is None else dict(self.bits)}

    def check_trainer(self, trainer: L.Trainer) -> None:
        """Raises MisconfigurationException for a fraction of a training without end, and for widths in another order there."""
        times = {name: getattr(self, name) for name in _TIMES} | {f"bits at {when}": when for when in self.bits or ()}
        for name, when in times.items():
            if isinstance(when, float) and trainer.max_epochs == -1 and trainer.max_steps == -1:
                raise MisconfigurationException(
                    f"QATCallback {name}={when} is a fraction of the training, but this training "
                    f"has no end: set max_epochs or max_steps, or give an epoch (int)"
                )
        if self.bits and trainer.max_epochs and trainer.max_epochs > 0 and trainer.max_steps == -1 and not trainer.fast_dev_run:  # type: ignore[attr-defined]
            epochs = trainer.max_epochs
            _check_falling(
                self.bits, {when if isinstance(when, float) else when / epochs: width for when, width in self.bits.items()}
            )

    def check_schemes(self, schemes: Iterable[QuantScheme]) -> None:
        """Raises MisconfigurationException if the width at the end is not the recipe's.

        Args:
            schemes: of all modules that are quantized.
        """
        if self.bits is None:
            return
        specs = [spec for scheme in schemes for spec in (scheme.weight, scheme.input, scheme.output) if spec is not None]
        widths = sorted({spec.bits for spec in specs if spec.is_int})
        if not widths or widths[0] != self.final_bits:
            has = f"the recipe's narrowest integers have {widths[0]}" if widths else "the recipe has no integers"
            raise MisconfigurationException(
                f"QATCallback bits={dict(self.bits)}: ends at {self.final_bits} bits, and {has}: "
                f"{f'end with {widths[0]}' if widths else 'leave bits out'}, or use another recipe"
            )

    def phase(self, trainer: L.Trainer, total_steps: float) -> Phase:
        """What holds now, derived from the Trainer's counters alone, so that any resume is right.

        Args:
            total_steps: as `companions.total_steps` counts them.
        """

        def reached(when: When) -> bool:
            if when is None:
                return False
            return progress(trainer, total_steps) >= when if isinstance(when, float) else trainer.current_epoch >= when

        quantizing = reached(self.quantize_from)
        return Phase(
            quantizing,
            quantizing and reached(self.quantize_activations_from),
            not reached(self.freeze_observers_at),
            reached(self.freeze_bn_at) and not re_estimates_norms(trainer),
            min([width for when, width in (self.bits or {}).items() if reached(when)], default=NARROWEST),
        )


def _check_falling(bits: Mapping[int | float, int], times: Mapping[float, int]) -> None:
    widths = [times[when] for when in sorted(times)]
    if any(later >= earlier for earlier, later in pairwise(widths)):
        raise MisconfigurationException(
            f"QATCallback bits={dict(bits)}: widths must fall; in the order of their times they are {', '.join(map(str, widths))}"
        )
