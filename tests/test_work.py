from __future__ import annotations

import copy
import json
import random
import re
import signal
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lightning_quant as lq
from lightning_quant import work
from lightning_quant.sequential import packable, tied, untie_floats
from lightning_quant.surgery import fake_modules, prepare
from tests.chains import make
from tests.forking import run_forked
from tests.helpers import assert_same_state
from tests.work_worker import BLOCKS, batches, llama, main, quantize, recipe, result

ROOT = Path(__file__).parent.parent


def run(name: str, folder: Path, out: Path, *kill: int) -> int:
    return run_forked(main, name, folder, out, *kill)


def killed(name: str, folder: Path, kills: list[int]) -> set[str]:
    """Runs that are killed after so many units each; the names of the files of those that were finished."""
    for count in kills:
        assert run(name, folder, folder / "never.pt", count) == -signal.SIGKILL
    assert not (folder / "never.pt").exists()
    assert any(folder.glob("*.tmp"))  # it was killed while it wrote
    finished = {path.name for path in folder.glob("*.safetensors")}
    assert len(finished) == sum(kills)
    return finished


def test_a_killed_run_goes_on_where_it_was(tmp_path: Path) -> None:
    finished = killed("awq+gptq", tmp_path, [3])
    times = {name: (tmp_path / name).stat().st_mtime_ns for name in finished}
    again, plain = result(quantize("awq+gptq", tmp_path)), result(quantize("awq+gptq", None))
    assert_same_state(again["state"], plain["state"])
    assert again["summary"] == plain["summary"]
    assert {name: (tmp_path / name).stat().st_mtime_ns for name in finished} == times
    assert len(list(tmp_path.glob("[!.]*"))) == BLOCKS + 1  # and run.json: what was half written is gone


@pytest.mark.slow
@pytest.mark.parametrize("name", ["gptq", "awq+gptq", "autoround", "block_ap", "adaround-head", "smoothquant", "static-gptq"])
def test_killed_at_three_blocks(name: str, tmp_path: Path) -> None:
    """Each run does a few units more and is killed; the last one finishes."""
    stops, folder, out = sorted(random.Random(name).sample(range(1, BLOCKS), 3)), tmp_path / "work", tmp_path / "out.pt"
    killed(name, folder, [stops[0], stops[1] - stops[0], stops[2] - stops[1]])
    assert run(name, folder, out) == 0
    again, plain = torch.load(out, weights_only=True), result(quantize(name, None))
    assert_same_state(again["state"], plain["state"])
    assert again["summary"] == plain["summary"]


class Stop(Exception):
    pass


def interrupted(monkeypatch: pytest.MonkeyPatch, count: int, call: Any) -> None:
    """Call, and raise once `count` units are written."""
    write, done = work.save_file, [0]

    def save_file(*args: Any, **kwargs: Any) -> None:
        if done[0] == count:
            raise Stop
        done[0] += 1
        write(*args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(work, "save_file", save_file)
        with pytest.raises(Stop):
            call()


def tied_llama() -> nn.Module:
    model = llama(2)
    model.config.tie_word_embeddings = True
    model.lm_head.weight = model.model.embed_tokens.weight
    return model


BOTH = {"lm_head": "w8a16", "*embed_tokens": "w8a16"}
# what is not packed as it is done: attention that holds another module, a weight that two modules share; experts; folded norms
CASES: dict[str, tuple[Any, lq.Recipe]] = {
    "attention": (lambda: make("encoder"), lq.Recipe("w4a16", group_size=8, algorithms=["awq", "gptq"])),
    "attention static": (lambda: make("encoder"), lq.Recipe("w8a8", algorithms=["smoothquant"])),
    "tied": (lambda: (tied_llama(), batches()), lq.Recipe("w4a16", group_size=8, schemes=BOTH, algorithms=["awq", "gptq"])),
    "biases": (  # of layers that had none
        lambda: (llama(3), batches()),
        lq.Recipe("w4a16", group_size=8, algorithms=["equalization", "gptq", "bias_correction"]),
    ),
    "experts": (lambda: make("mixtral"), lq.Recipe("w4a4", edges=None, algorithms=["smoothquant", "gptq"])),
    "experts static": (lambda: make("mixtral"), lq.Recipe("w4a4", edges=None, algorithms=["gptq"])),
    "resnet": (lambda: make("resnet"), lq.Recipe("w4a4", algorithms=["gptq"])),
    "two chains": (
        lambda: make("t5"),
        lq.Recipe("w4a16", group_size=8, algorithms=["autoround"], algorithm_options={"autoround": {"iterations": 2}}),
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_every_kind_of_module_resumes(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    build, chosen = CASES[name]
    model, data = build()
    before = copy.deepcopy(model.state_dict())
    plain = result(lq.quantize(model, chosen, data))
    interrupted(monkeypatch, 1, lambda: lq.quantize(model, chosen, data, work_dir=tmp_path))
    again = result(lq.quantize(model, chosen, data, work_dir=tmp_path))
    assert_same_state(again["state"], plain["state"])
    assert again["summary"] == plain["summary"]
    finished = result(lq.quantize(model, chosen, data, work_dir=tmp_path))  # all units are there
    assert_same_state(finished["state"], plain["state"])
    assert_same_state(model.state_dict(), before)


def test_what_is_damaged_is_done_anew(tmp_path: Path) -> None:
    plain = result(quantize("gptq", tmp_path))
    files = sorted(tmp_path.glob("*.safetensors"))
    whole = [path.read_bytes() for path in files]
    flipped = bytearray(whole[1])
    flipped[-5] ^= 1
    for path, content in ((files[0], whole[0][:-7]), (files[1], bytes(flipped)), (files[2], b""), (files[3], b"nonsense" * 9)):
        path.write_bytes(content)
    with pytest.warns(UserWarning, match="is damaged") as caught:
        again = result(quantize("gptq", tmp_path))
    assert sum("is damaged" in str(each.message) for each in caught) == 4
    assert_same_state(again["state"], plain["state"])
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # they are whole again
        assert_same_state(result(quantize("gptq", tmp_path))["state"], plain["state"])


def test_a_folder_of_another_run_is_refused(tmp_path: Path) -> None:
    quantize("gptq", tmp_path)

    def refused(what: str, model: nn.Module, chosen: lq.Recipe, data: Any, **options: Any) -> None:
        with pytest.raises(ValueError, match=rf"another run \(it differs in: {what}\).*another folder, or delete") as error:
            lq.quantize(model, chosen, data, work_dir=tmp_path, **options)
        assert str(tmp_path) in str(error.value)

    chosen, changed = recipe("gptq"), llama()
    refused("recipe", llama(), lq.Recipe("w4a16", algorithms=["gptq"], group_size=16), batches())
    refused("model", llama(seed=1), chosen, batches())
    changed.model.norm.weight.data[0] += 1e-6
    refused("model", changed, chosen, batches())
    refused("calibration batches, calibration data", llama(), chosen, batches(), calibration_batches=5)
    refused("calibration data", llama(), chosen, batches(seed=5))
    refused("model, dtypes", llama().bfloat16(), chosen, batches())
    head = json.loads((tmp_path / "run.json").read_text())
    (tmp_path / "run.json").write_text(json.dumps({**head, "torch": "1.0"}))
    refused("torch", llama(), chosen, batches())
    (tmp_path / "run.json").write_text("{")
    refused(".*model.*", llama(), chosen, batches())
    (tmp_path / "run.json").unlink()
    with pytest.raises(ValueError, match="holds other files"):
        quantize("gptq", tmp_path)
    with pytest.raises(ValueError, match="is a file"):
        quantize("gptq", next(tmp_path.glob("*.safetensors")))


HOLD = """
import fcntl, sys
held = open(sys.argv[1], "w")
fcntl.lockf(held, fcntl.LOCK_EX)
print("held", flush=True)
sys.stdin.read()
"""


def test_two_runs_do_not_share_a_folder(tmp_path: Path) -> None:
    pytest.importorskip("fcntl")
    command = [sys.executable, "-c", HOLD, str(tmp_path / ".lock")]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == "held\n"
        with pytest.raises(ValueError, match="another run is at work there"):
            quantize("gptq", tmp_path)
        other.kill()
    quantize("gptq", tmp_path)


def test_names_of_units_may_be_anything(tmp_path: Path) -> None:
    """Names that differ only in what file systems do not tell apart, or do not take."""
    torch.manual_seed(0)
    names = ["a b", "a_b", "A_B", "a/b", "ä|:0", "x" * 300]
    model = nn.Sequential()
    for name in names:
        model.add_module(name, nn.Linear(16, 16))
    chosen = lq.Recipe("w4a16", group_size=8, algorithms=["autoround"], algorithm_options={"autoround": {"iterations": 2}})
    data = [torch.randn(4, 16)]
    plain = lq.quantize(model, chosen, data)
    lq.quantize(model, chosen, data, work_dir=tmp_path)
    files = [path.name for path in tmp_path.glob("*.safetensors")]
    assert len({name.lower() for name in files}) == len(names)
    assert all(re.fullmatch(r"[\w.%~-]+", name, re.ASCII) and len(name) < 120 for name in files)
    assert_same_state(lq.quantize(model, chosen, data, work_dir=tmp_path).state_dict(), plain.state_dict())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"work_dir": 5}, "work_dir=5: give a folder"),
        ({"work_dir": ""}, "work_dir=''"),
        ({"memory_budget": "much"}, "memory_budget='much': give bytes.*\"500 MB\""),
        ({"memory_budget": -1}, "memory_budget=-1"),
        ({"memory_budget": True}, "memory_budget=True"),
        ({"memory_budget": "5 XB"}, "memory_budget='5 XB'"),
        ({"progress": "no"}, "progress='no'"),
    ],
)
def test_bad_options(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        lq.quantize(llama(1), recipe("gptq"), batches(), **options)


def test_options_that_nothing_would_use_are_refused(tmp_path: Path) -> None:
    for option in ({"work_dir": tmp_path / "new"}, {"memory_budget": "1 MB"}):
        with pytest.raises(ValueError, match=f"{next(iter(option))}: only algorithms use it, and the recipe has no algorithms"):
            lq.quantize(llama(1), "w4a16", batches(), **option)
        with pytest.raises(ValueError, match="QATCallback is only converted"):
            lq.quantize(prepare(llama(1), "w4a16"), **option)
    assert not (tmp_path / "new").exists()


def test_nothing_is_printed_where_stderr_is_no_terminal(capfd: pytest.CaptureFixture[str]) -> None:
    quantize("gptq", None)
    quantize("gptq", None, progress=False)
    told = capfd.readouterr()
    assert (told.out, told.err) == ("", "")


def test_the_bar_counts_blocks(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    quantize("gptq", None)
    told = capfd.readouterr().err
    assert f" {BLOCKS - 1}/{BLOCKS} [" in told
    assert "model.layers.6]" in told
    quantize("gptq", None, progress=False)
    assert capfd.readouterr().err == ""


# --- modules that share a weight ------------------------------------------------------------------------------------


def test_a_weight_that_a_float_module_shares_is_left_to_it() -> None:
    """GPTQ of the head must not put the embedding, which stays in float, on the head's grid."""
    model = tied_llama()
    before = model.lm_head.weight.detach().clone()
    chosen = lq.Recipe("w4a16", group_size=8, schemes={"lm_head": "w4a16"}, algorithms=["awq", "gptq"])
    qmodel = lq.quantize(model, chosen, batches())
    assert torch.equal(qmodel.model.embed_tokens.weight, before)
    assert torch.equal(model.lm_head.weight, before)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert (qmodel.lm_head.dequantized_weight() - before).abs().max() > 0


def test_a_weight_that_two_quantized_modules_share_is_not_rescaled() -> None:
    model = tied_llama()
    qmodel = lq.quantize(model, CASES["tied"][1], batches())
    assert qmodel.lm_head.weight_packed is qmodel.model.embed_tokens.weight_packed
    note = {row.name: row.note for row in lq.summary(qmodel).rows}["lm_head"]
    assert "not rescaled, its weight is also that of model.embed_tokens" in note


def test_what_can_be_packed_on_its_own() -> None:
    model = prepare(make("encoder")[0], "w4a16", training=False)
    fakes = fake_modules(model)
    assert set(fakes) - set(packable(fakes, model)) == {
        f"layers.{index}.self_attn{part}" for index in range(3) for part in ("", ".out_proj")
    }
    model = prepare(tied_llama(), CASES["tied"][1], training=False)
    assert tied(fake_modules(model), model) == {"model.embed_tokens": "lm_head", "lm_head": "model.embed_tokens"}
    untie_floats(model)
    assert model.lm_head.weight is model.model.embed_tokens.weight


def test_ranges_of_what_makes_up_for_a_rescaled_layer_are_found_again() -> None:
    """A depthwise convolution is not for SmoothQuant, but is divided to make up for the one behind it."""
    torch.manual_seed(0)

    class Separable(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.depth, self.point = nn.Conv2d(8, 8, 3, groups=8, padding=1), nn.Conv2d(8, 8, 1)

        def forward(self, x: Tensor) -> Tensor:
            return x + self.point(self.depth(x).relu())

    model = nn.Sequential(Separable(), Separable())
    with torch.no_grad():
        model[0].depth.weight[3] *= 50
    data = [torch.randn(2, 8, 6, 6) for _ in range(2)]
    chosen = lq.Recipe("w8a8", algorithms=["smoothquant"], algorithm_options={"smoothquant": {"alpha": 0.5}})
    qmodel = lq.quantize(model, chosen, data)
    weight = qmodel[0].depth.dequantized_weight().flatten(1)
    ratio = weight.abs().amax(1) / model[0].depth.weight.flatten(1).abs().amax(1)
    assert ratio.max() / ratio.min() > 1.5  # it was divided
    for channel, scale in zip(weight, qmodel[0].depth.weight_scale.flatten()):
        assert 127 <= (channel.abs().max() / scale).round() <= 128  # and its range is that of what it is now
