"""Codes of 2 to 8 bits <-> int32 words: a dense little-endian bit stream for each row, compressed-tensors' pack-quantized.

nf4 and fp4 are stored as bitsandbytes stores them: its own 4-bit codes, the first of two in a byte's high half.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_quant.numerics import CODEBOOKS, FLOAT8, code_dtype, qrange
from lightning_quant.spec import QuantSpec

# index of an ascending codebook -> bitsandbytes' code: a sign bit, and its own order of the magnitudes
_BNB_CODES = {"nf4": tuple(range(16)), "fp4": (11, 10, 13, 12, 15, 14, 9, 0, 1, 6, 7, 4, 5, 2, 3)}

# codes that are packed at once
_CHUNK = 1 << 20


def packed_words(columns: int, bits: int) -> int:
    """Words that a row of `columns` codes takes.

    Example:
        >>> packed_words(576, 3), packed_words(10, 4)
        (54, 2)
    """
    return -(-columns * bits // 32)


def _pack_unsigned(codes: Tensor, bits: int) -> Tensor:
    """`[rows, columns]` of integers in [0, 2^bits) -> int32 `[rows, words]`."""
    rows, columns = codes.shape
    # 32 codes fill exactly `bits` words, so every run of 32 is packed alike
    runs = F.pad(codes.to(torch.int64), (0, -columns % 32)).reshape(rows, -1, 32)
    words = runs.new_zeros(rows, runs.shape[1], bits + 1)
    start = torch.arange(32, device=codes.device) * bits
    shifted = runs << (start % 32)  # up to 39 bits: the low word and what spills into the next
    words.scatter_add_(2, (start // 32).expand_as(runs), shifted & 0xFFFFFFFF)
    words.scatter_add_(2, (start // 32 + 1).expand_as(runs), shifted >> 32)
    words = words[..., :bits].reshape(rows, -1)[:, : packed_words(columns, bits)]
    return torch.where(words >= 2**31, words - 2**32, words).to(torch.int32).contiguous()


def _unpack_unsigned(words: Tensor, bits: int, columns: int) -> Tensor:
    """int32 `[rows, words]` -> integers in [0, 2^bits), `[rows, columns]`."""
    rows = words.shape[0]
    if 32 % bits == 0:
        shifts = torch.arange(0, 32, bits, device=words.device, dtype=torch.int32)
        codes = (words[..., None] >> shifts) & (2**bits - 1)
        return codes.reshape(rows, -1)[:, :columns]
    runs = F.pad(words, (0, -words.shape[1] % bits)).reshape(rows, -1, bits).to(torch.int64) & 0xFFFFFFFF
    runs = F.pad(runs, (0, 1))
    start = torch.arange(32, device=words.device) * bits
    pairs = runs[..., start // 32] | (runs[..., start // 32 + 1] << 32)
    codes = (pairs >> (start % 32)) & (2**bits - 1)
    return codes.reshape(rows, -1)[:, :columns].to(torch.int32)


def _swap_halves(words: Tensor) -> Tensor:
    """The two codes of every byte exchanged."""
    return ((words & 0x0F0F0F0F) << 4) | ((words >> 4) & 0x0F0F0F0F)


def _table(values: tuple[int, ...], device: torch.device) -> Tensor:
    return torch.tensor(values, dtype=torch.uint8, device=device)


def _indices(dtype: str) -> tuple[int, ...]:
    """bitsandbytes' code -> index; its negative zero is zero."""
    codes = _BNB_CODES[dtype]
    return tuple(codes.index(code) if code in codes else codes.index(0) for code in range(16))


def stored_values(dtype: str) -> tuple[float, ...]:
    """The value of each of the 16 codes of nf4 or fp4 as they are stored.

    Example:
        >>> stored_values("nf4")[:2], stored_values("fp4")[3] == 1.0
        ((-1.0, -0.6961928009986877), True)
    """
    return tuple(CODEBOOKS[dtype][index] for index in _indices(dtype))


def pack(codes: Tensor, spec: QuantSpec) -> Tensor:
    """Pack codes at their real width.

    Signed codes are stored with an offset of 2^(bits-1), float8 codes as their bytes, nf4 and fp4 as bitsandbytes has them.

    Args:
        codes: `[rows, columns]`, of `code_dtype(spec)`.

    Returns:
        int32 `[rows, ceil(columns * bits / 32)]`.

    Example:
        >>> spec = QuantSpec(4)
        >>> q = torch.tensor([[-8, 7, 0, 1, 2]], dtype=torch.int8)
        >>> pack(q, spec).shape, torch.equal(unpack(pack(q, spec), spec, 5), q)
        (torch.Size([1, 1]), True)
    """
    if codes.dim() != 2:
        raise ValueError(f"pack takes [rows, columns], not {tuple(codes.shape)}")
    rows = max(_CHUNK // max(codes.shape[1], 1), 1)
    if len(codes) > rows and type(codes) is Tensor:  # eight-byte integers of a whole weight would be ten times its own size
        return torch.cat([pack(part, spec) for part in codes.split(rows)])
    if spec.dtype in FLOAT8:
        return _pack_unsigned(codes.view(torch.uint8), 8)
    if spec.dtype in CODEBOOKS:
        return _swap_halves(_pack_unsigned(_table(_BNB_CODES[spec.dtype], codes.device)[codes.long()], 4))
    offset = qrange(spec)[0]
    return _pack_unsigned(codes.to(torch.int32) - offset, spec.bits)


def unpack(words: Tensor, spec: QuantSpec, columns: int) -> Tensor:
    """Undo `pack`: int32 `[rows, words]` -> codes `[rows, columns]` of `code_dtype(spec)`."""
    if words.dim() != 2 or words.shape[1] != packed_words(columns, spec.bits):
        raise ValueError(
            f"{columns} codes of {spec.bits} bits take [rows, {packed_words(columns, spec.bits)}] words, not {tuple(words.shape)}"
        )
    if spec.dtype in CODEBOOKS:
        return _table(_indices(spec.dtype), words.device)[_unpack_unsigned(_swap_halves(words), 4, columns).long()]
    codes = _unpack_unsigned(words, spec.bits, columns)
    if spec.dtype in FLOAT8:
        return codes.to(torch.uint8).view(FLOAT8[spec.dtype])
    return (codes + qrange(spec)[0]).to(code_dtype(spec))


def pack_zero_point(zero_point: Tensor, spec: QuantSpec) -> Tensor:
    """`[channels, groups]` zero points, packed along the channels: int32 `[ceil(channels * bits / 32), groups]`."""
    return pack(zero_point.t().to(code_dtype(spec)), spec).t().contiguous()


def unpack_zero_point(words: Tensor, spec: QuantSpec, channels: int) -> Tensor:
    """Undo `pack_zero_point`: int32 zero points `[channels, groups]`."""
    return unpack(words.t().contiguous(), spec, channels).t().to(torch.int32)
