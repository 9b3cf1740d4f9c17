"""The two invariants, over every scheme, module and backend: packing loses nothing, and what was calibrated is what runs."""

from __future__ import annotations

import pytest
import torch

from lightning_quant.kernels import KERNELS
from lightning_quant.nn.fake import FakeModule
from lightning_quant.numerics import quantize
from lightning_quant.packing import pack, unpack
from lightning_quant.spec import PRESETS
from lightning_quant.surgery import packed_modules
from tests.helpers import assert_close
from tests.nn.cases import FIRST
from tests.nn.test_modules import made

every_case = pytest.mark.parametrize("case_id", [case.id for case in FIRST])
every_preset = pytest.mark.parametrize("preset", PRESETS)


@every_case
@every_preset
def test_unpack_of_pack_is_the_codes(case_id: str, preset: str) -> None:
    found = made(case_id, preset)
    fake = found.prepared.get_submodule("0")
    assert isinstance(fake, FakeModule)
    spec = fake.scheme.weight
    for name, axis in fake.weight_axes(fake).items():
        scale, zero_point = getattr(fake, f"{name}_fake_quant").qparams()
        codes = quantize(fake.get_weight(name), scale, zero_point, spec, axis).movedim(axis, 0).contiguous().flatten(1)
        again = unpack(pack(codes, spec), spec, codes.shape[1])
        assert again.dtype == codes.dtype
        assert torch.equal(again.float(), codes.float())


def runs(backend: str, preset: str) -> bool:
    scheme = PRESETS[preset].scheme
    kernel = KERNELS[backend]
    return any(not kernel.refuses(op, torch.ones(1), scheme.weight, scheme.input) for op in kernel.ops)


@every_case
@pytest.mark.parametrize(
    ("backend", "preset"), [(backend, preset) for backend in KERNELS for preset in PRESETS if runs(backend, preset)]
)
def test_what_was_calibrated_is_what_runs(case_id: str, preset: str, backend: str) -> None:
    found = made(case_id, preset)
    packed = packed_modules(found.packed)
    for module in packed.values():
        module.use_backend(backend)  # what it has not, the next one runs
    try:
        assert_close(found.run(found.packed), found.run(found.prepared))
    finally:
        for module in packed.values():
            module.use_backend("")
