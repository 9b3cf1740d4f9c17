"""The launch configurations: one table by kernel and class of shapes. Chosen on paper; they have not been timed on a GPU."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any


@dataclass(frozen=True)
class Config:
    """How a kernel is cut into programs.

    Args:
        block_m, block_n, block_k: elements of a tile: rows of the input, output channels, input features. For the kernels that are
            no matrix products `block_m` is rows (or scales) and `block_k` elements of each.
        split_k: at most so many programs share the features of one tile; their partial sums are added in a fixed order.
        num_warps, num_stages: of Triton.
        max_registers: of a thread; None: ptxas, which for some of these kernels would rather spill a few than use more of them.
    """

    block_m: int
    block_n: int
    block_k: int
    split_k: int = 1
    num_warps: int = 4
    num_stages: int = 3
    max_registers: int | None = None

    def options(self) -> dict[str, Any]:
        """What a launch takes; a fused multiply-add would round once where the reference rounds twice."""
        limit = {"maxnreg": self.max_registers} if self.max_registers else {}
        return {"num_warps": self.num_warps, "num_stages": self.num_stages, "enable_fp_fusion": False, **limit}


# rows of the input up to which a class holds; groups in which no tile fits are a class of their own
ROWS = {"small": 16, "medium": 64, "large": None}
SMALLEST = 32

# with more rows than this a weight is decoded once and multiplied by torch: a fused product decodes it anew for each 128 rows,
# which from here on should take longer than to write and read it (arithmetic, not timed)
FUSED_ROWS = 1024

CONFIGS: dict[tuple[str, str], Config] = {
    ("weights", "small"): Config(16, 64, 128, split_k=8, num_warps=4, num_stages=4),
    ("weights", "medium"): Config(64, 64, 64, num_warps=4, num_stages=3),
    ("weights", "large"): Config(128, 128, 64, num_warps=8, num_stages=3),
    ("weights", "ragged"): Config(64, 64, 32, num_warps=4, num_stages=1),
    ("weights-fp32", "small"): Config(16, 64, 32, split_k=8, num_warps=4, num_stages=3, max_registers=255),
    ("weights-fp32", "medium"): Config(32, 64, 32, num_warps=4, num_stages=3, max_registers=128),
    ("weights-fp32", "large"): Config(64, 64, 32, num_warps=8, num_stages=3, max_registers=255),
    ("weights-fp32", "ragged"): Config(32, 64, 32, num_warps=4, num_stages=1, max_registers=255),
    ("grad", "small"): Config(16, 64, 64, num_warps=4, num_stages=3, max_registers=255),
    ("grad", "medium"): Config(64, 64, 64, num_warps=4, num_stages=3, max_registers=255),
    ("grad", "large"): Config(128, 64, 128, num_warps=8, num_stages=3, max_registers=255),
    ("grad", "ragged"): Config(64, 64, 32, num_warps=4, num_stages=1, max_registers=255),
    ("grad-fp32", "small"): Config(16, 32, 32, num_warps=4, num_stages=3),
    ("grad-fp32", "medium"): Config(32, 32, 32, num_warps=4, num_stages=3),
    ("grad-fp32", "large"): Config(64, 32, 64, num_warps=8, num_stages=3),
    ("grad-fp32", "ragged"): Config(32, 32, 32, num_warps=4, num_stages=1),
    ("int8", "small"): Config(16, 64, 128, split_k=8, num_warps=4, num_stages=4),
    ("int8", "medium"): Config(64, 64, 128, num_warps=4, num_stages=3),
    ("int8", "large"): Config(128, 128, 64, num_warps=8, num_stages=3),
    ("dequantize", "large"): Config(16, 1, 128, num_warps=4, num_stages=1),
    ("dequantize", "ragged"): Config(16, 1, 128, num_warps=4, num_stages=1),
    ("reduce", "large"): Config(1, 1, 256, num_warps=4, num_stages=1),
    ("quantize", "large"): Config(1, 1, 2048, num_warps=8, num_stages=1),
    ("fake-quant", "large"): Config(1, 1, 2048, num_warps=8, num_stages=1),
}


def shape_class(kernel: str, rows: int, group: int = 0) -> str:
    """The class of a call: of its rows, or of its groups if no tile of `SMALLEST` features divides them.

    Example:
        >>> [shape_class("weights", rows) for rows in (0, 16, 17, 4096)], shape_class("weights", 1, group=48)
        (['small', 'small', 'medium', 'large'], 'ragged')
    """
    if group % SMALLEST and (kernel, "ragged") in CONFIGS:
        return "ragged"
    return next(name for name, most in ROWS.items() if (most is None or rows <= most) and (kernel, name) in CONFIGS)


def pick(kernel: str, rows: int = 1 << 30, columns: int = 1 << 30, group: int = 0) -> Config:
    """The configuration of a call.

    Args:
        kernel: the first part of a key of `CONFIGS`.
        rows: of the input.
        columns: input features, which bound `split_k`.
        group: features that share a scale, which `block_k` divides unless the class is "ragged"; 0: all of them.

    Example:
        >>> pick("int8", rows=4, columns=300, group=64)
        Config(block_m=16, block_n=64, block_k=64, split_k=5, num_warps=4, num_stages=4, max_registers=None)
    """
    kind = shape_class(kernel, rows, group)
    config = CONFIGS[kernel, kind]
    while kind != "ragged" and group % config.block_k:
        config = replace(config, block_k=config.block_k // 2)
    return replace(config, split_k=max(min(config.split_k, -(-columns // config.block_k)), 1))
