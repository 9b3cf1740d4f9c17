"""The table of QAT methods: what each does to weights and to activations."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from lightning_quant.functional import lsq_fake_quantize
from lightning_quant.gradients import (
    PLAIN,
    Rule,
    binary_fake_quantize,
    binary_levels,
    pact_fake_quantize,
    scale_elementwise,
    tanh_weight,
    ternary_fake_quantize,
    ternary_levels,
)
from lightning_quant.spec import QuantScheme, QuantSpec


@dataclass(frozen=True)
class Method:
    """How a model learns to be quantized.

    Args:
        weight, activation: what happens to weights and to static activations of integers.
        options: name -> default, not negative: a field of `Rule`, or a keyword of its `fake`, for what learns and has it.
        bits: a width of weights that the method is for: one of the layers must have it, and symmetric.
    """

    weight: Rule = PLAIN
    activation: Rule = PLAIN
    options: Mapping[str, float] = field(default_factory=dict)
    bits: int | None = None

    @property
    def learns(self) -> bool:
        """Whether any scale is a parameter."""
        return self.weight.fake is not None or self.activation.fake is not None

    def rule(self, is_weight: bool, options: Mapping[str, float]) -> Rule:
        """What happens to weights, or else to activations, with resolved options."""
        rule = self.weight if is_weight else self.activation
        if rule.fake is None:
            return rule
        own = {name: value for name, value in options.items() if name in {f.name for f in fields(Rule)}}
        taken = inspect.signature(rule.fake).parameters
        rest = {name: value for name, value in options.items() if name in taken}
        return replace(rule, fake=partial(rule.fake, **rest) if rest else rule.fake, **own)  # type: ignore[arg-type]


def ewgs_fake_quantize(
    x: Tensor, scale: Tensor, zero_point: Tensor, spec: QuantSpec, axis: int = 0, elements: int | None = None, *, delta: float
) -> Tensor:
    """LSQ with element-wise gradient scaling (Lee et al. 2021, arXiv:2104.00903, section 3.2); see `scale_elementwise`."""
    return lsq_fake_quantize(scale_elementwise(x, scale, spec, axis, delta=delta), scale, zero_point, spec, axis, elements)


class _Offset(torch.autograd.Function):
    """The identity of scale and zero point; its backward gives gradients of scale and offset, `-zero_point * scale`."""

    @staticmethod
    def forward(ctx: Any, scale: Tensor, zero_point: Tensor) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(scale, zero_point)
        return scale.view_as(scale), zero_point.view_as(zero_point)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor]:
        scale, zero_point = ctx.saved_tensors
        by_scale = grads[0] - grads[1] * zero_point / scale
        return by_scale, (grads[1] / scale - by_scale * zero_point) / scale


def offset_fake_quantize(
    x: Tensor, scale: Tensor, zero_point: Tensor, spec: QuantSpec, axis: int = 0, elements: int | None = None
) -> Tensor:
    """LSQ with a learned offset (Bhalgat et al. 2020, arXiv:2004.09576, section 3.1).

    What learns is the offset beta in units of x; it is kept as a zero point, `-beta / scale`, whose gradient is such that a (small)
    step of SGD moves scale and beta as if they were the parameters. On the grid it is a whole code, so that 0 is exact.
    """
    if not spec.symmetric:
        scale, zero_point = _Offset.apply(scale, zero_point)
    return lsq_fake_quantize(x, scale, zero_point, spec, axis, elements)


def few_levels_fake_quantize(
    few: Callable[..., Tensor],
    x: Tensor,
    scale: Tensor,
    zero_point: Tensor,
    spec: QuantSpec,
    axis: int = 0,
    elements: int | None = None,
) -> Tensor:
    """`few`, which is `ternary_fake_quantize` or `binary_fake_quantize`, of 2 bits; of more, LSQ."""
    if spec.bits > 2:
        return lsq_fake_quantize(x, scale, zero_point, spec, axis, elements)
    return few(x, scale, spec, axis, elements)


_LSQ = Rule(lsq_fake_quantize)
# its weights only: the paper clips activations to [0, 1], as its networks bound them
_DOREFA = Rule(transform=tanh_weight, observer="minmax")

METHODS: dict[str, Method] = {
    # Jacob et al. 2018, arXiv:1712.05877
    "ste": Method(),
    # Esser et al. 2020, arXiv:1902.08153
    "lsq": Method(_LSQ, _LSQ),
    # Bhalgat et al. 2020, arXiv:2004.09576: initialisation in section 3.2
    "lsq+": Method(replace(_LSQ, observer="sigma"), Rule(offset_fake_quantize)),
    # Lee et al. 2021, arXiv:2104.00903; weights only: in the gradient by activations, `delta * |g| * e` has the sign of the
    # rounding error, whatever the loss says, and w2a2 of ResNet-20 on CIFAR-10 lost 4 points to it
    "ewgs": Method(Rule(ewgs_fake_quantize), _LSQ, options={"delta": 0.2}),
    # Choi et al. 2018, arXiv:1805.06085: weights are DoReFa's in the paper, too
    "pact": Method(_DOREFA, Rule(pact_fake_quantize, learns_zero_point=False), options={"regularization": 2e-4}),
    # Zhou et al. 2016, arXiv:1606.06160
    "dorefa": Method(_DOREFA),
    # Liu et al. 2025, arXiv:2502.02631
    "ternary": Method(Rule(partial(few_levels_fake_quantize, ternary_fake_quantize), levels=ternary_levels), _LSQ, bits=2),
    # Liu et al. 2022, arXiv:2205.13016
    "binary": Method(Rule(partial(few_levels_fake_quantize, binary_fake_quantize), levels=binary_levels), _LSQ, bits=2),
}


def get_method(name: str) -> Method:
    """The method of that name; a wrong name lists the valid ones.

    Raises:
        ValueError: no such method.
    """
    if name not in METHODS:
        raise ValueError(f"method={name!r}: valid are {', '.join(METHODS)}")
    return METHODS[name]


def resolve_options(name: str, options: Mapping[str, float] | None = None) -> dict[str, float]:
    """All options of a method, the given ones and defaults.

    Raises:
        ValueError: an unknown method or option, or a value that is not a finite number from 0 on.

    Example:
        >>> resolve_options("ewgs"), resolve_options("ewgs", {"delta": 1})
        ({'delta': 0.2}, {'delta': 1.0})
    """
    valid = get_method(name).options
    for option, value in (options or {}).items():
        if option not in valid:
            raise ValueError(f"method_options: {name!r} has no option {option!r}; valid: {', '.join(valid) or 'none'}")
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value < math.inf:
            raise ValueError(f"method_options: {option}={value!r} of {name!r} must be a finite number, 0 or more")
    return {**valid, **{option: float(value) for option, value in (options or {}).items()}}


def check_schemes(name: str, schemes: Mapping[str, QuantScheme]) -> None:
    """Raises ValueError naming the module whose scheme a method cannot train.

    Args:
        schemes: module name -> scheme, of a whole model.
    """
    method = get_method(name)
    for module, scheme in schemes.items():
        for spec, rule in ((scheme.weight, method.weight), (scheme.input, method.activation), (scheme.output, method.activation)):
            if spec is None or spec.dynamic or rule.fake is None or spec.is_int:
                continue
            raise ValueError(
                f"{module}: method {name!r} learns the scales of integers, and the recipe gives {spec.label}: use method='ste'"
            )
        weight = scheme.weight
        if (
            method.bits is not None
            and weight is not None
            and weight.bits == method.bits
            and not (weight.symmetric and weight.signed)
        ):
            raise ValueError(
                f"{module}: method {name!r} needs signed symmetric weights, and the recipe gives {weight.label}: use "
                f"Recipe(..., symmetric=True), or method='lsq'"
            )
    if method.bits is not None and schemes and all(s.weight is None or s.weight.bits != method.bits for s in schemes.values()):
        raise ValueError(
            f"method {name!r} is for {method.bits}-bit weights, and the recipe gives {next(iter(schemes))} and all others another "
            f"width: use a recipe with bits={method.bits}, or method='lsq'"
        )
