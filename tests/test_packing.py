from __future__ import annotations

import pytest
import torch

from lightning_quant.packing import pack, pack_zero_point, packed_words, unpack, unpack_zero_point
from lightning_quant.spec import QuantSpec
from tests.helpers import limits, read_words

BITS = range(2, 9)
COLUMNS = (1, 7, 31, 32, 33, 50, 64, 97)


def codes(spec: QuantSpec, rows: int, columns: int) -> torch.Tensor:
    low, high = limits(spec)
    found = torch.randint(low, high + 1, (rows, columns))
    found.view(-1)[:2] = torch.tensor([low, high])[: found.numel()]
    return found.to(torch.int8 if spec.signed else torch.uint8)


@pytest.mark.parametrize("signed", [True, False], ids=["signed", "unsigned"])
@pytest.mark.parametrize("bits", BITS)
def test_unpack_undoes_pack(bits, signed):
    spec = QuantSpec(bits, signed=signed)
    for columns in COLUMNS:
        q = codes(spec, 3, columns)
        words = pack(q, spec)
        assert words.dtype == torch.int32
        assert words.shape == (3, packed_words(columns, bits))
        back = unpack(words, spec, columns)
        assert back.dtype == q.dtype
        assert torch.equal(back, q)
        assert (read_words(words, bits, columns) + limits(spec)[0] == q.numpy()).all()


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("columns", COLUMNS)
def test_words_are_as_few_as_the_bits_need(bits, columns):
    words = packed_words(columns, bits)
    assert 32 * (words - 1) < columns * bits <= 32 * words


@pytest.mark.parametrize("dtype", ["nf4", "fp4"])
def test_codebook_indices(dtype):
    spec = QuantSpec(4, dtype, granularity="group", group_size=64)
    q = torch.randint(0, 15, (3, 37), dtype=torch.uint8)
    assert torch.equal(unpack(pack(q, spec), spec, 37), q)


@pytest.mark.parametrize("dtype", ["float8_e4m3fn", "float8_e5m2"])
def test_float8_bytes(dtype):
    spec = QuantSpec(8, dtype)
    q = torch.randn(5, 13).to(getattr(torch, dtype))
    back = unpack(pack(q, spec), spec, 13)
    assert back.dtype == q.dtype
    assert torch.equal(back.view(torch.uint8), q.view(torch.uint8))
    assert pack(q, spec).shape == (5, 4)


@pytest.mark.parametrize("bits", BITS)
def test_zero_points_are_packed_along_the_channels(bits):
    spec = QuantSpec(bits, symmetric=False, granularity="group", group_size=4)
    low, high = limits(spec)
    for channels, groups in ((1, 1), (11, 3), (64, 2)):
        zero_point = torch.randint(low, high + 1, (channels, groups), dtype=torch.int32)
        words = pack_zero_point(zero_point, spec)
        assert words.shape == (packed_words(channels, bits), groups)
        back = unpack_zero_point(words, spec, channels)
        assert back.dtype == torch.int32
        assert torch.equal(back, zero_point)


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("columns", [16, 33, 50])
def test_layout_is_that_of_compressed_tensors(bits, columns):
    helpers = pytest.importorskip("compressed_tensors.compressors.pack_quantized.helpers")
    spec = QuantSpec(bits, symmetric=False)
    q = codes(spec, 5, columns)
    theirs = helpers.pack_to_int32(q, bits)
    assert torch.equal(pack(q, spec), theirs)
    assert torch.equal(helpers.unpack_from_int32(pack(q, spec), bits, q.shape), q)

    zero_point = codes(spec, columns, 3)
    theirs = helpers.pack_to_int32(zero_point, bits, packed_dim=0)
    assert torch.equal(pack_zero_point(zero_point.int(), spec), theirs)
    assert torch.equal(unpack_zero_point(theirs, spec, columns), zero_point.int())


def test_wrong_shapes_raise():
    spec = QuantSpec(4)
    with pytest.raises(ValueError, match=r"\[rows, columns\].*\(8,\)"):
        pack(torch.zeros(8, dtype=torch.int8), spec)
    with pytest.raises(ValueError, match="9 codes of 4 bits take"):
        unpack(torch.zeros(2, 1, dtype=torch.int32), spec, 9)
