"""Reading float models from disk into packed ones."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

import lightning_quant as lq
from lightning_quant.pretrained import parameters_on_meta
from lightning_quant.surgery import packed_modules
from tests.lora_cases import MODES, llama

IDS = torch.randint(0, 50, (2, 7), generator=torch.Generator().manual_seed(0))


def saved(folder: Path, shard: str = "50GB", **options: Any) -> nn.Module:
    torch.manual_seed(0)
    model = llama(**options).eval()
    model.save_pretrained(folder, max_shard_size=shard)
    return model


@pytest.mark.parametrize("shard", ["50GB", "60KB"])
@pytest.mark.parametrize("mode", MODES)
def test_it_equals_packing_the_float_model(tmp_path: Path, mode: str, shard: str) -> None:
    model = saved(tmp_path, shard)
    assert (len(list(tmp_path.glob("*.safetensors"))) > 3) == (shard == "60KB")
    packed = lq.load_pretrained(tmp_path, mode)
    wanted = lq.QuantPrecision(mode).convert_module(model)
    assert packed.state_dict().keys() == wanted.state_dict().keys()
    assert all(torch.equal(value, packed.state_dict()[name]) for name, value in wanted.state_dict().items())
    assert torch.equal(packed(input_ids=IDS).logits, wanted(input_ids=IDS).logits)
    assert not packed.training
    assert type(packed.lm_head) is nn.Linear


@pytest.mark.parametrize("tied", [False, True])
def test_tied_weights_stay_tied(tmp_path: Path, tied: bool) -> None:
    model = saved(tmp_path, tie_word_embeddings=tied)
    packed = lq.load_pretrained(tmp_path, "int8")
    assert (packed.lm_head.weight is packed.model.embed_tokens.weight) == tied
    wanted = lq.QuantPrecision("int8").convert_module(model)
    assert torch.equal(packed(input_ids=IDS).logits, wanted(input_ids=IDS).logits)


def test_dtype_and_double_quantization(tmp_path: Path) -> None:
    saved(tmp_path)
    packed = lq.load_pretrained(tmp_path, "nf4", double_quant=True, dtype="bfloat16")
    assert packed.model.embed_tokens.weight.dtype == torch.bfloat16
    layer = packed.model.layers[0].self_attn.q_proj
    assert layer.weight_scale_packed.dtype == torch.uint8
    assert layer.weight_scale_absmax.dtype == torch.float32
    summary = lq.summary(packed)
    assert summary.bytes_before > summary.bytes_after


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8)
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.head = nn.Linear(8, 4)
        self.register_buffer("offset", torch.arange(4.0), persistent=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = torch.relu(self.norm(self.conv(x))).flatten(2).transpose(1, 2)
        return self.head(self.attention(h, h, h, need_weights=False)[0].mean(1)) + self.offset


def test_any_module(tmp_path: Path) -> None:
    net = Net().eval()
    net.norm.running_mean.uniform_()
    save_file(net.state_dict(), tmp_path / "net.safetensors")
    x = torch.randn(2, 3, 6, 6)
    packed = lq.load_pretrained(tmp_path / "net.safetensors", "int8", build=Net)
    wanted = lq.QuantPrecision("int8").convert_module(net)
    assert torch.equal(packed(x), wanted(x))
    with parameters_on_meta():
        skeleton = Net()
    assert torch.equal(lq.load_pretrained(tmp_path, "int8", build=skeleton)(x), wanted(x))


def test_refusals(tmp_path: Path) -> None:
    net = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 2))
    save_file(net.state_dict(), tmp_path / "net.safetensors")
    with pytest.raises(FileNotFoundError, match=r"no\.safetensors does not exist|holds no .safetensors file"):
        lq.load_pretrained(tmp_path / "no.safetensors", build=lambda: net)
    with pytest.raises(ValueError, match=r"has no config.json.*give build="):
        lq.load_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"the file has no '2.weight'"):
        lq.load_pretrained(tmp_path, build=lambda: nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 2), nn.Linear(2, 2)))
    with pytest.raises(ValueError, match=r"'1.weight' is \(3, 8\), in the file \(2, 8\)"):
        lq.load_pretrained(tmp_path, build=lambda: nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 3)))
    with pytest.raises(ValueError, match=r"a model with weights \(0.weight"):
        lq.load_pretrained(tmp_path, build=net)
    with pytest.raises(ValueError, match="dtype='bf17' is no floating dtype"):
        lq.load_pretrained(tmp_path, dtype="bf17", build=lambda: net)
    with pytest.raises(ValueError, match="needs calibration data"):
        lq.load_pretrained(tmp_path, "w8a8", build=lambda: net)
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"0.weight": "gone.safetensors"}}))
    with pytest.raises(FileNotFoundError, match=r"gone.safetensors does not exist"):
        lq.load_pretrained(tmp_path, build=lambda: nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 2)))


MEASURE = """
import gc, sys, torch, transformers
import lightning_quant as lq
from pathlib import Path
torch.set_num_threads(1)
def status(key):
    return next(int(line.split()[1]) * 1024 for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(key))
lq.quantize(torch.nn.Sequential(torch.nn.Linear(64, 64)), "nf4")  # what is imported late
transformers.AutoModelForCausalLM
gc.collect()
before = status("VmRSS")
model = lq.load_pretrained(sys.argv[1], "nf4", dtype="bfloat16")
numel = sum(p.in_features * p.out_features for p in model.modules() if hasattr(p, "weight_packed"))
numel += sum(p.numel() for p in model.parameters() if p.is_floating_point() and p.dtype == torch.bfloat16)
print(status("VmHWM") - before, numel)
"""


def peak(folder: Path) -> tuple[int, int]:
    """Bytes that loading adds to a process at its peak, and the model's parameters."""
    run = subprocess.run([sys.executable, "-c", MEASURE, str(folder)], capture_output=True, text=True, timeout=900)
    assert run.returncode == 0, run.stderr[-3000:]
    added, numel = map(int, run.stdout.split()[-2:])
    return added, numel


def sharded(folder: Path, layers: int, **options: Any) -> None:
    """Random weights of a Llama, written shard by shard: the float model is never whole in this process either."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(num_hidden_layers=layers, tie_word_embeddings=True, **options)
    with parameters_on_meta():
        model = LlamaForCausalLM(config)
    config.save_pretrained(folder)
    index: dict[str, str] = {}
    shapes = {name: value.shape for name, value in model.named_parameters()}
    for number, part in enumerate(["model.embed_tokens", *(f"model.layers.{layer}." for layer in range(layers)), "model.norm"]):
        file = f"model-{number:05d}.safetensors"
        tensors = {name: torch.randn(shape) * 0.02 for name, shape in shapes.items() if name.startswith(part)}
        save_file(tensors, folder / file)
        index |= dict.fromkeys(tensors, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="memory is read from /proc")
def test_peak_memory(tmp_path: Path) -> None:
    sharded(tmp_path, 6, vocab_size=2000, hidden_size=1024, intermediate_size=2816, num_attention_heads=8, num_key_value_heads=8)
    added, numel = peak(tmp_path)
    assert numel > 78e6
    assert added < 0.45 * 4 * numel + 60e6  # what a process of any size adds


@pytest.mark.slow
def test_peak_memory_of_500_million_parameters(tmp_path: Path) -> None:
    sharded(
        tmp_path, 24, vocab_size=32000, hidden_size=1280, intermediate_size=3456, num_attention_heads=10, num_key_value_heads=10
    )
    added, numel = peak(tmp_path)
    print(f"{numel / 1e6:.0f} M parameters: {added / 1e6:.0f} MB added, {added / (4 * numel):.3f} of float32")
    assert numel > 490e6
    assert added < 0.45 * 4 * numel


def test_packed_modules_are_frozen_and_what_is_left_is_not(tmp_path: Path) -> None:
    saved(tmp_path)
    packed = lq.load_pretrained(tmp_path, "nf4")
    assert all(not value.requires_grad for part in packed_modules(packed).values() for value in part.parameters())
    assert packed.model.norm.weight.requires_grad
