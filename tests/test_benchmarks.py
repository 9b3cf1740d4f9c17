"""The benchmarks: what they run is right, what is wrong is not timed, and what was measured is not measured again."""

from __future__ import annotations

import doctest
import importlib.util
import io
import json
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from tests.examples.test_qlora import folder  # noqa: F401

FOLDER = Path(__file__).resolve().parents[1] / "benchmarks"


def load(name: str, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """A script as a module; not by the import statement, as `kernels` is a package of others, too."""
    monkeypatch.setattr(sys, "path", list(sys.path))
    spec = importlib.util.spec_from_file_location(f"benchmark_{name}", FOLDER / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, spec.name, module)
    spec.loader.exec_module(module)
    assert str(FOLDER) not in sys.path
    return module


def test_blocks_take_turns_in_both_orders(monkeypatch):
    timing = load("timing", monkeypatch)
    assert doctest.testmod(timing).failed == 0
    order: list[str] = []
    calls = {name: lambda name=name: order.append(name) or {"a": 2.0, "b": 0.5}[name] for name in "ab"}
    times = timing.measure(calls, timing.Settings(rounds=3, block=0.0, settle=0.0))
    assert order == list("abbaab")
    assert times == {"a": [2.0] * 3, "b": [0.5] * 3}  # calls that time themselves
    assert timing.ratios(times, "a") == {"a": 1.0, "b": 4.0}


def test_linear_kernels(tmp_path, monkeypatch, capsys):
    kernels, file = load("kernels", monkeypatch), tmp_path / "out.json"
    given = ["--quick", "--threads", "1", "--block", "0.001", "--shape", "96x256", "--rows", "1", "9", "--json", str(file)]
    kernels.main([*given, "--plot", str(tmp_path / "out.png")])
    (result,) = json.loads(file.read_text())["results"]
    own = {f"ours {name}" for name in kernels.OURS}
    measured, skipped = set(result["errors"]), set(result["skipped"])
    assert own | {kernels.BASE, "bf16 F.linear"} <= measured
    assert not measured & skipped
    assert all(set(result["ratios"][rows]) == measured for rows in ("1", "9"))
    # a scheme's error is its own: none is float32 in disguise, and fewer bits have larger ones
    errors = [result["errors"][f"ours {bits}a16 bf16"] for bits in ("w8", "w4", "w3", "w2")]
    assert 0.003 < errors[0] < errors[1] < errors[2] < errors[3]
    assert (tmp_path / "out.png").stat().st_size > 1000
    assert "times as fast" in capsys.readouterr().out


@pytest.mark.parametrize("wrong", [lambda out: out * 1.05, lambda out: torch.full_like(out, torch.nan)])
def test_a_wrong_kernel_is_not_timed(wrong, monkeypatch):
    kernels = load("kernels", monkeypatch)
    weight, x = torch.randn(64, 128), torch.randn(4, 128)
    method = kernels.Weights(weight, x, 0).ours(kernels.OURS["w4a16 float32"])
    built = kernels.timing.Built()
    built["ours w4a16 float32"] = method
    right = method.runs[0]
    method.runs = [lambda given: wrong(right(given))]
    with pytest.raises(SystemExit, match="at 4 rows is wrong"):
        kernels.check(built, weight, x, [4])


@pytest.mark.parametrize("method", ["ste", "lsq"])
def test_steps_of_qat(method, tmp_path, monkeypatch, capsys):
    steps, file = load("qat_step", monkeypatch), tmp_path / "out.json"
    pytest.importorskip("transformers")
    steps.main(["--quick", "--threads", "1", "--no-memory", "--method", method, "--json", str(file)])
    results = json.loads(file.read_text())["results"]
    assert [result["part"] for result in results] == ["resnet", "lm"]
    for result in results:
        assert all(len(values) == 2 for clock in ("CPU", "wall") for values in result["all"][clock].values())
        assert result["ratios"]["CPU"]["median"] > 0
    assert "ratio" in capsys.readouterr().out


def test_the_memory_of_a_step(monkeypatch):
    steps = load("qat_step", monkeypatch)
    args = steps.parser().parse_args(["--quick", "--batch", "4"])
    plain, quantized = (steps.peak_memory("resnet", kind, args) for kind in ("float", "QAT"))
    # weights, gradients and what a batch leaves: the kernels save no second copy of it
    assert 1e6 < plain["tensors"] <= quantized["tensors"] < 1.35 * plain["tensors"]


def test_decoding_along_a_path(monkeypatch):
    transformers = pytest.importorskip("transformers")
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2, "vocab_size": 50}
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes, num_key_value_heads=1)).eval()
    models = load("models", monkeypatch)
    prompt, path = torch.randint(50, (1, 6)), list[Tensor]()
    with torch.inference_mode():
        found = models.Decoder(model, prompt, 5, path).output()
        whole = model(input_ids=torch.cat([prompt, *path], 1)).logits[0, -6:]
        static = models.Decoder(model, prompt, 5, path, step=torch.compile(model, backend="eager"))
        again = [static.output() for _ in range(2)]  # the second time with a cache that is reset
        seconds = static()
    torch.testing.assert_close(found, whole)
    assert torch.equal(torch.cat(path, 1)[0], whole[:-1].argmax(-1))
    for out in again:
        torch.testing.assert_close(out, whole)
    assert 0 < seconds < 60


def test_a_part_without_its_files_is_skipped(tmp_path, monkeypatch, capsys):
    models, file = load("models", monkeypatch), tmp_path / "out.json"
    models.main(["--quick", "--threads", "1", "--only", "decode|resnet 1$", "--data", str(tmp_path), "--json", str(file)])
    results = json.loads(file.read_text())["results"]
    assert [result["title"] for result in results] == ["decode", "resnet 1"]
    assert all("names no folder" in result["missing"] for result in results)
    assert capsys.readouterr().out.count("skipped: ") == 2


def small_cifar(where: Path, count: int) -> None:
    """Two classes of images, dark and light, as `examples/cifar10.py` reads them, and a float start."""
    image = pytest.importorskip("PIL.Image")
    (where / "cifar10").mkdir()
    for name in ("train", "test"):
        label = np.arange(count) % 2
        pixels = (60 + 120 * label)[:, None, None, None] + np.random.default_rng(0).integers(-40, 40, (count, 32, 32, 3))
        files = []
        for one in pixels.astype(np.uint8):
            buffer = io.BytesIO()
            image.fromarray(one).save(buffer, "JPEG")
            files.append(buffer.getvalue())
        offset = np.cumsum([0, *map(len, files)])
        jpeg = np.frombuffer(b"".join(files), np.uint8)
        np.savez(where / "cifar10" / f"{name}.npz", jpeg=jpeg, offset=offset, label=label.astype(np.uint8))


def test_qat_of_images(tmp_path, monkeypatch, capsys):
    small_cifar(tmp_path, 512)
    qat, file = load("qat_cifar", monkeypatch), tmp_path / "out.json"
    save_file(qat.ResNet20().state_dict(), tmp_path / "cifar10" / "resnet20-float.safetensors")
    given = ["--data", str(tmp_path), "--epochs", "2", "--long-epochs", "1", "--threads", "1", "--json", str(file)]
    given += ["--checkpoints", str(tmp_path / "runs")]
    qat.main([*given, "--only", "w2a2 (PTQ|LSQ, distilled|best)", "--plot", str(tmp_path / "out.png")])
    rows = json.loads(file.read_text())["rows"]
    assert [(row["method"], row["epochs"]) for row in rows] == [
        *(("start", 0), ("PTQ, mse ranges", 0), ("LSQ, distilled", 2), ("best", 1))
    ]
    assert all(0 <= row["accuracy"] <= 100 for row in rows)
    assert (tmp_path / "out.png").stat().st_size > 1000
    capsys.readouterr()
    qat.main([*given, "--only", "w2a2 (PTQ|LSQ, distilled)"])  # nothing is run again
    assert json.loads(file.read_text())["rows"] == rows
    assert "epochs" in capsys.readouterr().out


def test_qat_of_a_language_model(folder, monkeypatch, capsys):  # noqa: F811
    qat, file = load("qat_llm", monkeypatch), folder / "out.json"
    monkeypatch.setattr(qat, "TRAIN_FROM", 4096)
    given = ["--data", str(folder), "--model", str(folder / "m"), "--threads", "1", "--windows", "2", "--calibration", "2"]
    given += ["--length", "64", "--lr", "3e-3", "--json", str(file), "--starts", str(folder / "starts")]
    qat.main([*given, "--steps", "12", "--only", "w4a16", "--from", "nearest"])
    qat.main([*given, "--steps", "12", "--only", "w2a16|float", "--plot", str(folder / "out.png")])
    rows = {(row["scheme"], row["kind"]): row for row in json.loads(file.read_text())["rows"]}
    assert set(rows) == {
        *(("float", kind) for kind in ("float", "float, trained on")),
        *((scheme, kind) for scheme in ("w4a16", "w2a16") for kind in ("nearest", "QAT")),
        ("w2a16", "start"),
    }
    found = {key: row["perplexity"] for key, row in rows.items()}
    assert found["float", "float, trained on"] < found["float", "float"]  # it has learned
    assert {key: rows["w2a16", "QAT"][key] for key in ("steps", "batch", "length")} == {"steps": 12, "batch": 2, "length": 64}
    assert (folder / "out.png").stat().st_size > 1000
    shown = capsys.readouterr().out
    share = (found["w2a16", "nearest"] - found["w2a16", "QAT"]) / (found["w2a16", "nearest"] - found["float", "float"])
    assert f"{share:.1%}" in shown

    # a second run measures only what depends on what has changed
    kept = {path: path.stat().st_mtime_ns for path in (folder / "starts").rglob("*.safetensors")}
    qat.main([*given, "--steps", "4", "--only", "w2a16|float"])
    again = json.loads(file.read_text())["rows"]
    assert [(row["scheme"], row["kind"]) for row in again[len(rows) :]] == [("w2a16", "QAT"), ("float", "float, trained on")]
    assert len(kept) == 1
    assert kept == {path: path.stat().st_mtime_ns for path in (folder / "starts").rglob("*.safetensors")}
