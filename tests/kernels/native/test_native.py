from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from lightning_quant.kernels import native
from lightning_quant.kernels.native.build import BuildError, build
from lightning_quant.numerics import quantize
from lightning_quant.spec import QuantSpec

HERE = Path(__file__).parent
pytestmark = pytest.mark.xdist_group("native")

SANITIZERS = ("-O0", "-g", "-fsanitize=address,undefined", "-fno-sanitize-recover=all")


def in_process(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env={**os.environ, **environment})


def test_the_library_is_built():
    assert native.library() is not None
    assert native.isa().split()[0] in native.LEVELS


@pytest.fixture(scope="module")
def checked(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The library with address and undefined-behaviour sanitizers."""
    if shutil.which("gcc") is None:
        pytest.skip("no gcc for the sanitizers")
    return build(tmp_path_factory.mktemp("checked") / "liblq.so", SANITIZERS)


def test_sanitizers_find_nothing(checked: Path, tmp_path: Path):
    """Random calls with buffers of the exact size."""
    program = ["gcc", "-I", str(native.LIBRARY.parent), str(HERE / "check.c"), str(checked), "-fopenmp", *SANITIZERS, "-lm"]
    subprocess.run([*program, "-o", str(tmp_path / "check")], check=True)
    run = subprocess.run(
        [tmp_path / "check", "500"], capture_output=True, text=True, env={**os.environ, "LD_LIBRARY_PATH": str(checked.parent)}
    )
    assert run.returncode == 0, run.stdout + run.stderr
    assert "500 rounds" in run.stdout
    if native.isa() != "portable":
        assert " 0 compared" not in run.stdout


def test_sanitizers_find_nothing_in_programs_of_convolutions(checked: Path):
    # beside the first, exceptions of C++ need the second
    names = ("libasan.so", "libstdc++.so.6")
    libraries = [subprocess.run(["gcc", f"-print-file-name={name}"], capture_output=True, text=True) for name in names]
    if any(found.returncode or not Path(found.stdout.strip()).is_absolute() for found in libraries):
        pytest.skip("no address sanitizer to preload")
    code = f"""
from pathlib import Path
from lightning_quant.kernels import native
native.LIBRARY = Path({str(checked)!r})
from tests.kernels.images.test_images import check
for isa in native.LEVELS:
    native.use(isa)
    for seed in range(40):
        check(seed, (1, 2))
print("done")
"""
    preload = " ".join(found.stdout.strip() for found in libraries)
    run = in_process(code, LD_PRELOAD=preload, ASAN_OPTIONS="detect_leaks=0", OMP_NUM_THREADS="2")
    assert run.returncode == 0, run.stderr[-3000:]
    assert "done" in run.stdout


def test_the_environment_masks_instruction_sets():
    run = in_process("from lightning_quant.kernels import native; print(native.isa())", LQ_ISA="avx2")
    assert run.returncode == 0, run.stderr
    assert run.stdout.split()[0] in ("avx2", "portable")


def test_an_unknown_instruction_set_lists_the_valid_ones():
    with pytest.raises(ValueError, match="LQ_ISA='sse'") as error:
        native.use("sse")
    assert all(level in str(error.value) for level in native.LEVELS)


def test_without_a_compiler_nothing_is_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("CC", "no-such-compiler")
    with pytest.raises(BuildError, match="no-such-compiler"):
        build(tmp_path / "liblq.so")
    monkeypatch.setenv("CC", "false")
    with pytest.raises(BuildError, match="false"):
        build(tmp_path / "liblq.so")
    assert list(tmp_path.iterdir()) == []


def test_without_the_library_models_run(tmp_path: Path):
    """As on a machine without a C compiler."""
    code = """
import torch, lightning_quant as lq
from pathlib import Path
from lightning_quant.kernels import native
native.LIBRARY = Path("/nowhere/liblq.so")
model = torch.nn.Sequential(torch.nn.Linear(32, 16))
packed = lq.quantize(model, "w4a16")
x = torch.randn(3, 32)
assert native.library() is None
assert torch.allclose(packed(x), x @ packed[0].dequantized_weight().T + packed[0].bias, atol=1e-5)
text = str(lq.explain(packed))
assert "reference" in text and "no C compiler" in text, text
"""
    run = in_process(code)
    assert run.returncode == 0, run.stderr


def test_threads_are_those_of_torch():
    """OpenMP is not linked a second time: torch.set_num_threads holds, and there is one pool."""
    code = """
import os, torch
from lightning_quant.kernels import native
native.library()
torch.set_num_threads(3)
import lightning_quant as lq
packed = lq.quantize(torch.nn.Sequential(torch.nn.Linear(512, 1024)), "w4a16")
packed(torch.randn(1, 512))
torch.randn(2000, 2000) @ torch.randn(2000, 2000)
maps = open("/proc/self/maps").read()
print(len({line.split()[-1] for line in maps.splitlines() if "gomp" in line or "libomp" in line or "iomp" in line}))
print(len(os.listdir("/proc/self/task")))
"""
    if not Path("/proc/self/task").exists():
        pytest.skip("needs /proc")
    pools, threads = map(int, in_process(code, OMP_NUM_THREADS="1").stdout.split())
    assert pools == 1
    assert threads <= 4 + 2  # three workers at most, and what Python and torch start


@pytest.mark.parametrize("isa", native.LEVELS)
@pytest.mark.parametrize("dtype", native.DTYPES, ids=str)
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last], ids=str)
def test_codes_of_a_tensor(isa: str, dtype: torch.dtype, memory_format: torch.memory_format, monkeypatch: pytest.MonkeyPatch):
    before = native.LEVEL.value
    try:
        native.use(isa)
        x = (torch.randn(2, 7, 5, 3) * 3).to(dtype).to(memory_format=memory_format)
        x.flatten()[:4] = torch.tensor([float("inf"), -float("inf"), float("nan"), 0.25])  # 0.25 / 0.1 is a tie
        spec = QuantSpec(8, signed=False, symmetric=False, granularity="tensor")
        expected = quantize(x.float(), torch.tensor([0.1]), torch.tensor([31]), spec)
        codes = native.quantize(x, 0.1, 31, (0, 255))
        finite = ~x.isnan()
        assert torch.equal(codes[finite], expected[finite])
        assert codes.stride() == x.stride()
        assert native.quantize(x, 0.1, 31, (3, 40)).max() == 40
    finally:
        native.use(before)
