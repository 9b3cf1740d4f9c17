from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import torch

from lightning_quant.functional import fake_quantize
from lightning_quant.kernels import triton
from lightning_quant.spec import QuantSpec
from tests.kernels.triton import only_compiled

only_compiled()
FOLDER = Path(__file__).parent
ROOT = FOLDER.parents[2]


def test_kernels_in_the_interpreter():
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--durations=5", str(FOLDER)]
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    environment = {key: value for key, value in environment.items() if not key.startswith(("PYTEST_", "LQ_"))}
    run = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=600)
    assert run.returncode == 0, run.stdout[-6000:] + run.stderr[-2000:]
    assert int(re.search(r"(\d+) passed", run.stdout)[1]) > 100


def test_a_cpu_without_the_interpreter_is_refused():
    x = torch.ones(2, 32)
    assert triton.refuses("linear", x, QuantSpec(8), None).startswith("needs CUDA tensors")
    assert triton.refuses("linear", x.to("meta"), QuantSpec(8), None) == "needs CUDA tensors, not meta"


def test_the_interpreter_is_not_entered_late(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.setenv("LQ_BACKEND", "triton")
    assert "before Triton is imported" in triton.refuses("dequantize", torch.ones(2, 2), QuantSpec(8), None)
    x = torch.tensor([0.4, 1.6, 100.0])
    out = fake_quantize(x, torch.tensor([1.0]), torch.tensor([0], dtype=torch.int32), QuantSpec(4, granularity="tensor"))
    assert out.tolist() == [0.0, 2.0, 7.0]
