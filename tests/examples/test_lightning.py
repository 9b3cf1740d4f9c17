"""Every script and every config of `examples/lightning` runs, and does what it says."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import lightning_quant as lq
from lightning_quant.cli import main
from lightning_quant.surgery import is_packed

EXAMPLES = Path(__file__).parents[2] / "examples" / "lightning"
COMMAND = Path(sys.executable).with_name("lightning-quant")
# one process of each fits on one core; more threads would only wait for each other
ENV = {**os.environ, "OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE"}
SMALL = "--data.init_args.limit 320 --trainer.enable_progress_bar false --trainer.enable_model_summary false"


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A copy of the examples as the current folder, whose modules can be imported as in a fresh process."""
    here = tmp_path / "lightning"
    shutil.copytree(EXAMPLES, here, ignore=shutil.ignore_patterns("__pycache__"))
    monkeypatch.chdir(here)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setattr(sys, "argv", ["lightning-quant"])
    yield here
    sys.modules.pop("digits_net", None)


def run(*command: Any, cwd: Path) -> str:
    done = subprocess.run([*map(str, command)], cwd=cwd, env=ENV, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stderr
    return done.stdout


def script(name: str, *args: Any, cwd: Path) -> str:
    return run(sys.executable, EXAMPLES / name, *args, cwd=cwd)


def accuracies(out: str) -> list[float]:
    """The float and the quantized accuracy of each table that `lq.compare` printed."""
    return [float(cell) for row in re.findall(r"^accuracy +([\d.]+) +([\d.]+) ", out, re.M) for cell in row]


def net(folder: Path) -> Any:
    sys.path.insert(0, str(folder))
    from digits_net import DigitsNet  # type: ignore[import-not-found]

    return DigitsNet()


# --- scripts, from another folder -----------------------------------------------------------------------------------


def test_qat_script(tmp_path: Path) -> None:
    out = script("qat.py", "--epochs", 3, "--recipe", "w8a8", "--output", "out", cwd=tmp_path)
    packed, reloaded = re.findall(r"([\d.]+) %", out)
    assert packed == reloaded
    assert float(packed) > 85
    assert "BatchNorm folded into net.3" in out
    assert (tmp_path / "out" / "quantization.json").is_file()


def test_ptq_script(tmp_path: Path) -> None:
    out = script("ptq.py", "--epochs", 3, "--recipes", "w8a8", "w4a16", cwd=tmp_path)
    before, w8a8, again, w4a16 = accuracies(out)
    assert before == again > 0.85
    assert abs(w8a8 - before) <= 0.02
    assert abs(w4a16 - before) <= 0.1


def test_resume_script(tmp_path: Path) -> None:
    out = script("resume.py", "--limit", 320, cwd=tmp_path)
    (stopped, of), (resumed, total) = re.findall(r": (\d+) of (\d+) tensors equal", out)
    assert resumed == total == of
    assert int(stopped) < int(of)  # the comparison can tell


def test_ddp_script(tmp_path: Path) -> None:
    out = script("ddp.py", "--epochs", 1, "--output", "packed", cwd=tmp_path)
    assert out.count("whole model:") == 1
    assert float(re.findall(r"2 processes, accuracy ([\d.]+) %", out)[0]) > 50
    assert (tmp_path / "packed" / "quantization.json").is_file()


def test_cli_script(tmp_path: Path) -> None:
    script("cli.py", "--config", EXAMPLES / "cli.yaml", "fit", *shlex.split(SMALL), "--trainer.max_epochs", 1, cwd=tmp_path)
    assert (tmp_path / "checkpoints/cli/last.ckpt").is_file()


# --- configs, in their own folder -----------------------------------------------------------------------------------


def test_qat_config(folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    main(shlex.split("fit --config qat.yaml --trainer.enable_progress_bar false"))
    capfd.readouterr()
    main(shlex.split("quantize --config qat.yaml --ckpt_path last --output packed/qat"))
    _, quantized = accuracies(capfd.readouterr().out)
    main(shlex.split("validate --config qat.yaml --ckpt_path packed/qat"))
    shown = float(re.findall(r"accuracy\s+│\s+([\d.]+)", capfd.readouterr().out)[0])
    assert shown == pytest.approx(quantized, abs=1e-4)
    assert shown > 0.9
    assert not (folder / "lightning_logs").exists()


def test_ptq_config(folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    main(shlex.split("--config ptq.yaml fit --trainer.enable_progress_bar false"))
    capfd.readouterr()
    main(shlex.split("--config ptq.yaml summary"))
    planned = capfd.readouterr().out
    main(shlex.split("--config ptq.yaml quantize"))
    done = capfd.readouterr().out
    size = re.compile(r"whole model: .*")
    assert size.findall(planned) == size.findall(done)
    assert "int4 group32" in planned
    before, after = accuracies(done)
    assert before > 0.9
    assert abs(after - before) <= 0.05
    assert is_packed(lq.load_quantized(net(folder), folder / "packed/ptq"))


def test_resume_config(folder: Path) -> None:
    def final(*parts: str) -> dict[str, torch.Tensor]:
        for part in parts:
            main(shlex.split(f"fit --config resume.yaml {SMALL} {part}"))
        state = torch.load(folder / "checkpoints/resume/last.ckpt", weights_only=True)["state_dict"]
        shutil.rmtree(folder / "checkpoints/resume")
        return state

    whole, half = final(""), final("--trainer.max_epochs 2")
    resumed = final("--trainer.max_epochs 2", "--ckpt_path last")
    assert [name for name in whole if not torch.equal(whole[name], resumed[name])] == []
    assert [name for name in whole if not torch.equal(whole[name], half[name])] != []


def test_ddp_config(folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    run(COMMAND, "fit", "--config", "ddp.yaml", *shlex.split(SMALL), "--trainer.max_epochs", 1, cwd=folder)
    assert torch.load("checkpoints/ddp/last.ckpt", weights_only=True)["global_step"] == 3  # 320 digits, 2 x 64 a step
    # one process does for what two have trained; test_ddp_script packs on two
    main(shlex.split("quantize --config ddp.yaml --ckpt_path last --output packed/ddp --trainer.strategy auto --trainer.devices 1"))
    before, after = accuracies(capfd.readouterr().out)
    assert abs(after - before) <= 0.05
    assert is_packed(lq.load_quantized(net(folder), folder / "packed/ddp"))


def test_cli_config(folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    main(shlex.split("--config cli.yaml fit --trainer.enable_progress_bar false"))
    capfd.readouterr()
    main(shlex.split("--config cli.yaml quantize"))
    _, quantized = accuracies(capfd.readouterr().out)
    for subcommand in ("validate", "test"):
        main(shlex.split(f"--config cli.yaml {subcommand}"))
        shown = float(re.findall(r"accuracy\s+│\s+([\d.]+)", capfd.readouterr().out)[0])
        assert shown == pytest.approx(quantized, abs=1e-4)
    main(shlex.split("--config cli.yaml predict"))
    capfd.readouterr()
    main(shlex.split("--config cli.yaml summary"))
    rows = {line.split()[0]: line for line in capfd.readouterr().out.splitlines() if line.startswith("net.")}
    assert "int4" in rows["net.3"]
    assert "int8" in rows["net.7"]
