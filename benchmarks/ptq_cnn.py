"""Post-training quantization of a ResNet-20 on CIFAR-10: accuracy, time and memory of each algorithm.

    OMP_NUM_THREADS=1 python benchmarks/ptq_cnn.py --data DATA
    OMP_NUM_THREADS=1 python benchmarks/ptq_cnn.py --data DATA --checkpoint mine.safetensors  # trained, if there is no such file

DATA holds what `examples/cifar10.py` needs. All layers are quantized, the first and the last ones, too. Weights have one scale a
channel (where a row says so, one a tensor), activations one static asymmetric range a tensor. Calibration: 512 random training
images in batches of 32. "seconds" are those of the CPU, so that what else runs on the machine does not count; without evaluation.
"""

from __future__ import annotations

import argparse
import re
import sys
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import lightning as L
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

sys.path[:0] = [str(Path(__file__).resolve().parents[1] / "examples"), str(Path(__file__).resolve().parent)]

from cifar10 import CIFAR10, Batches, ResNet20  # noqa: E402
from ptq_llm import forget_peak, status  # noqa: E402

import lightning_quant as lq  # noqa: E402
from lightning_quant.report import table  # noqa: E402

IMAGES, BATCH = 512, 32
LEARNED = {"autoround": {"iterations": 300, "batches": 1}}  # as many steps, of as many images, as adaround's defaults
CHOICES: dict[str, list[list[str]]] = {
    "w8a8": [[], ["equalization"], ["bias_correction"], ["gptq"], ["adaround"]],
    "w4a8": [
        *([], ["equalization"], ["bias_correction"], ["equalization", "bias_correction"]),
        *(["gptq"], ["gptq", "bias_correction"], ["adaround"], ["adaround", "bias_correction"], ["autoround"]),
    ],
    "w4a4": [
        *([], ["equalization"], ["bias_correction"], ["equalization", "bias_correction"]),
        *(["gptq"], ["gptq", "bias_correction"], ["adaround"], ["adaround", "bias_correction"]),
        *(["autoround"], ["autoround", "bias_correction"]),
    ],
    "w4a8, weights per tensor": [
        *([], ["equalization"], ["equalization", "bias_correction"], ["equalization", "adaround", "bias_correction"]),
    ],
}


def recipe(scheme: str, algorithms: list[str]) -> lq.Recipe:
    """A row's recipe."""
    bits = re.findall("[0-9]", scheme)
    weight = lq.QuantSpec(int(bits[0]), granularity="tensor" if "per tensor" in scheme else "channel")
    activation = lq.QuantSpec(int(bits[1]), symmetric=False, granularity="tensor")
    options = {name: LEARNED[name] for name in algorithms if name in LEARNED}
    return lq.Recipe(lq.QuantScheme(weight, activation), algorithms=algorithms, algorithm_options=options)


def float_model(data: CIFAR10, checkpoint: Path, epochs: int) -> ResNet20:
    """Loaded, or else trained and saved."""
    model = ResNet20()
    if checkpoint.exists():
        model.load_state_dict(load_file(checkpoint))
    else:
        begin = time.perf_counter()
        quiet: dict[str, Any] = {"logger": False, "enable_checkpointing": False, "enable_model_summary": False}
        L.Trainer(max_epochs=epochs, enable_progress_bar=False, **quiet).fit(model, data.train_dataloader())
        save_file(model.state_dict(), checkpoint)
        print(f"trained for {epochs} epochs in {time.perf_counter() - begin:.0f} s: {checkpoint}", flush=True)
    return model.eval()


def batches(images: Tensor, labels: Tensor, count: int, size: int) -> Iterator[tuple[Tensor, Tensor]]:
    data = Batches(images, labels)
    for start in range(0, count, size):
        yield data[list(range(start, min(start + size, count)))]


@torch.inference_mode()
def accuracy(model: nn.Module, images: Tensor, labels: Tensor) -> float:
    """On the test images, percent."""
    correct = sum(int((model(x).argmax(dim=1) == y).sum()) for x, y in batches(images, labels, len(labels), 500))
    return 100 * correct / len(labels)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--checkpoint", type=Path, help="float weights; default: DATA/cifar10/resnet20-float.safetensors")
    parser.add_argument("--epochs", type=int, default=2, help="of training, if the checkpoint does not exist")
    parser.add_argument("--only", default="", help="rows whose name this regular expression is in")
    args = parser.parse_args()
    warnings.filterwarnings("ignore")
    checkpoint = args.checkpoint or args.data / "cifar10" / "resnet20-float.safetensors"
    torch.manual_seed(0)
    data = CIFAR10(args.data / "cifar10", limit_train=IMAGES if checkpoint.exists() else None)
    data.setup("fit")
    model, test = float_model(data, checkpoint, args.epochs), data.images["test"]
    calibration = [images for images, _ in batches(*data.images["train"], IMAGES, BATCH)]
    exact = accuracy(model, *test)
    print(f"float accuracy {exact:.2f}", flush=True)
    rows: list[tuple[Any, ...]] = [("float", "", f"{exact:.2f}", "", "", "")]
    for scheme, choices in CHOICES.items():
        for algorithms in choices:
            told = ", ".join(algorithms) or "nearest"
            if not re.search(args.only, f"{scheme}, {told}"):
                continue
            before, begin = forget_peak(), time.process_time()
            qmodel = lq.quantize(model, recipe(scheme, algorithms), calibration, calibration_batches=len(calibration))
            seconds, added = time.process_time() - begin, status("VmHWM") - before
            found = accuracy(qmodel, *test)
            rows.append((scheme, told, f"{found:.2f}", f"{found - exact:+.2f}", f"{seconds:.0f}", f"{added:.0f}"))
            print("  ".join(rows[-1]), flush=True)
            del qmodel
    print(f"\n{table(('scheme', 'algorithms', 'accuracy %', 'to float', 'seconds', 'MB added to the peak'), rows)}")


if __name__ == "__main__":
    main()
