"""LoftQ (Li et al. 2023, arXiv:2310.08659, algorithm 1): a quantized weight and a low-rank term that makes up for its error."""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_quant.double_quant import stored_scale
from lightning_quant.numerics import calc_qparams, dequantize_rows, from_groups, quantize_rows, to_groups
from lightning_quant.spec import QuantSpec


def round_to_grid(weight: Tensor, spec: QuantSpec) -> Tensor:
    """A float32 weight `[channels, columns]` as it is after packing: rounded to nearest, each range from end to end."""
    rows = to_groups(weight, spec)
    scale, zero_point = calc_qparams(rows.amin(1), rows.amax(1), spec)
    values = dequantize_rows(quantize_rows(rows, scale, zero_point, spec), stored_scale(scale, spec), zero_point, spec)
    return from_groups(values, weight.shape, spec)


def loftq(weight: Tensor, spec: QuantSpec, rank: int, iterations: int = 1) -> tuple[Tensor, Tensor, Tensor]:
    """Alternate between quantizing what the low-rank term leaves, and the best low-rank term for what quantizing leaves.

    Args:
        weight: `[channels, columns]`.
        spec: its grid.
        rank: of the term.
        iterations: of both steps; 1 leaves the weight as it is.

    Returns:
        the float weight to quantize, float32 `[channels, columns]`; A `[rank, columns]`, B `[channels, rank]`: `weight` is about
        `round_to_grid(first, spec) + B @ A`.

    Example:
        >>> weight, spec = torch.randn(64, 128), QuantSpec(4, "nf4", granularity="group", group_size=64)
        >>> rest, down, up = loftq(weight, spec, rank=8)
        >>> better = (weight - round_to_grid(rest, spec) - up @ down).norm() < (weight - round_to_grid(weight, spec)).norm()
        >>> bool(better), down.shape, up.shape
        (True, torch.Size([8, 128]), torch.Size([64, 8]))
    """
    weight = weight.float()
    rest, down, up = weight, weight.new_zeros(rank, weight.shape[1]), weight.new_zeros(weight.shape[0], rank)
    for _ in range(iterations):
        rest = weight - up @ down
        left, values, right = _largest(weight - round_to_grid(rest, spec), rank)
        root = values.sqrt()
        kept = len(root)  # fewer than `rank` in a small weight
        up, down = torch.zeros_like(up), torch.zeros_like(down)
        up[:, :kept], down[:kept] = left * root, root[:, None] * right.t()
    return rest, down, up


def _largest(matrix: Tensor, rank: int) -> tuple[Tensor, Tensor, Tensor]:
    """The largest singular values and their vectors, by subspace iteration (Halko et al. 2011, arXiv:0909.4061, algorithm 4.4)."""
    size = min(rank + 16, *matrix.shape)
    with torch.random.fork_rng([matrix.device] if matrix.is_cuda else []):
        torch.manual_seed(0)  # a run that is resumed starts from the same base
        left, values, right = torch.svd_lowrank(matrix, size, niter=6)
    return left[:, :rank], values[:rank], right[:, :rank]
