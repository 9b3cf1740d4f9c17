"""The launch configurations: one table by kernel and class of shapes. Chosen on paper; they have not been timed on a GPU."""

from __future__ import annotations

from dataclasses import dataclass, replace


@dataclass(frozen=True)
class Config:
    """How a kernel is cut into programs.

    Args:
        block_m, block_n, block_k: elements of a tile: rows of the input, output channels, input features. For the kernels that are
            no matrix products `block_m` is rows (or scales) and `block_k` elements of each.
        split_k: at most so many programs share the features of one tile; their partial sums are added in a fixed order.
        num_warps, num_stages: of Triton.
    """

    block_m: int
    block_n: int
    block_k: int
    split_k: int = 1
    num_warps: int = 4
    num_stages: int = 3

    def options(self) -> dict[str, int | bool]:
        """What a launch takes; a fused multiply-add would round once where the reference rounds twice."""
        return {"num_warps": self.num_warps, "num_stages": self.num_stages, "enable_fp_fusion": False}


# rows of the input up to which a class holds; groups in which no tile fits are a class of their own
ROWS = {"small": 16, "medium": 64, "large": None}
SMALLEST = 32

CONFIGS: dict[tuple[str, str], Config] = {
    ("weights", "small"): Config(16, 64, 128, split_k=8, num_warps=4, num_stages=4),
    ("weights", "medium"): Config(64, 64, 64, num_warps=4, num_stages=3),
    ("weights", "large"): Config(128, 128, 64, num_warps=8, num_stages=3),
    ("weights", "ragged"): Config(64, 64, 32, num_warps=4, num_stages=1),
    ("weights-fp32", "small"): Config(16, 64, 32, split_k=8, num_warps=4, num_stages=3),
    ("weights-fp32", "medium"): Config(32, 64, 32, num_warps=4, num_stages=3),
    ("weights-fp32", "large"): Config(64, 64, 32, num_warps=8, num_stages=3),
    ("weights-fp32", "ragged"): Config(32, 64, 32, num_warps=4, num_stages=1),
    ("grad", "small"): Config(16, 64, 64, num_warps=4, num_stages=3),
    ("grad", "medium"): Config(64, 64, 64, num_warps=4, num_stages=3),
    ("grad", "large"): Config(128, 64, 128, num_warps=8, num_stages=3),
    ("grad", "ragged"): Config(64, 64, 32, num_warps=4, num_stages=1),
    ("grad-fp32", "small"): Config(16, 32, 64, num_warps=4, num_stages=3),
    ("grad-fp32", "medium"): Config(32, 32, 64, num_warps=4, num_stages=3),
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
        Config(block_m=16, block_n=64, block_k=64, split_k=5, num_warps=4, num_stages=4)
    """
    kind = shape_class(kernel, rows, group)
    config = CONFIGS[kernel, kind]
    while kind != "ragged" and group % config.block_k:
        config = replace(config, block_k=config.block_k // 2)
    return replace(config, split_k=max(min(config.split_k, -(-columns // config.block_k)), 1))
