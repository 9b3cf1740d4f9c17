"""Other libraries' quantized models, each made of a float32 module as that library's documentation has it.

Functions of a whole model return a call without arguments that runs it on the inputs given; those of one kind of layer return the
module. All raise what the libraries raise: an `ImportError` if one is not installed.
"""

from __future__ import annotations

import contextlib
import copy
import io
import logging
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

Inputs = tuple[Tensor, ...]
Run = Callable[[], Any]


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Without progress bars and advice of converters."""
    before = logging.root.manager.disable
    logging.disable(logging.ERROR)
    try:
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            yield
    finally:
        logging.disable(before)


def linears(model: nn.Module, head: str) -> list[str]:
    """Names of the linear layers, without the output head of that name."""
    return [name for name, module in model.named_modules() if type(module) is nn.Linear and name != head]


def openvino(model: nn.Module, inputs: Inputs, threads: int, precision: str) -> Run:
    """In `"f32"` or `"bf16"`."""
    import openvino as ov

    with quiet():
        converted = ov.convert_model(torch.export.export(model, inputs))
    return _openvino(converted, inputs, threads, precision)


def openvino_int8(model: nn.Module, inputs: Inputs, threads: int, batches: Sequence[Inputs], transformer: bool) -> Run:
    """By nncf's post-training quantization; layers that stay in float run in bfloat16.

    Args:
        batches: calibration, of the shapes of `inputs`.
    """
    import nncf
    import openvino as ov

    with quiet():
        converted = ov.convert_model(torch.export.export(model, inputs))
        data = nncf.Dataset([[tensor.numpy() for tensor in batch] for batch in batches])
        kind = nncf.ModelType.TRANSFORMER if transformer else None
        quantized = nncf.quantize(converted, data, model_type=kind, subset_size=len(batches))
    return _openvino(quantized, inputs, threads, "bf16")


def _openvino(converted: Any, inputs: Inputs, threads: int, precision: str) -> Run:
    import openvino as ov

    config = {"INFERENCE_PRECISION_HINT": precision, "INFERENCE_NUM_THREADS": threads, "PERFORMANCE_HINT": "LATENCY"}
    request = ov.Core().compile_model(converted, "CPU", config).create_infer_request()
    arrays = [tensor.numpy() for tensor in inputs]
    return lambda: next(iter(request.infer(arrays, share_inputs=True, share_outputs=True).values()))


def _onnx(model: nn.Module, inputs: Inputs, folder: str) -> str:
    from onnxruntime.quantization.shape_inference import quant_pre_process

    torch.onnx.export(model, inputs, f"{folder}/float.onnx", dynamo=True, external_data=False, verbose=False)
    quant_pre_process(f"{folder}/float.onnx", f"{folder}/ready.onnx", skip_symbolic_shape=True)
    return f"{folder}/ready.onnx"


def _session(path: str, inputs: Inputs, threads: int) -> Run:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(Path(path).read_bytes(), options, providers=["CPUExecutionProvider"])
    given = {place.name: tensor.numpy() for place, tensor in zip(session.get_inputs(), inputs, strict=True)}
    return lambda: session.run(None, given)[0]


def onnxruntime_dynamic(model: nn.Module, inputs: Inputs, threads: int) -> Run:
    """int8 matrix products, weights by channel."""
    from onnxruntime.quantization import QuantType, quantize_dynamic

    with tempfile.TemporaryDirectory() as folder:
        with quiet():
            path = f"{folder}/int8.onnx"
            ready = _onnx(model, inputs, folder)
            quantize_dynamic(ready, path, ["MatMul", "Gemm"], per_channel=True, weight_type=QuantType.QInt8)
        return _session(path, inputs, threads)


def onnxruntime_static(model: nn.Module, inputs: Inputs, threads: int, batches: Sequence[Inputs]) -> Run:
    """QDQ: int8 weights by channel, uint8 activations; for a model of one input."""
    from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static

    class Reader(CalibrationDataReader):  # type: ignore[misc]
        left = iter([{"x": batch[0].numpy()} for batch in batches])

        def get_next(self) -> Any:
            return next(self.left, None)

    types = {"activation_type": QuantType.QUInt8, "weight_type": QuantType.QInt8}
    with tempfile.TemporaryDirectory() as folder:
        with quiet():
            path, ready = f"{folder}/int8.onnx", _onnx(model, inputs, folder)
            quantize_static(ready, path, Reader(), quant_format=QuantFormat.QDQ, per_channel=True, **types)
        return _session(path, inputs, threads)


def ao_dynamic(model: nn.Module, head: str = "") -> nn.Module:
    """torch.ao's dynamic int8, on oneDNN; not of the layer `head`."""
    torch.backends.quantized.engine = "onednn"
    return torch.ao.quantization.quantize_dynamic(model, set(linears(model, head)))


def ao_static(model: nn.Module, batches: Sequence[Inputs]) -> nn.Module:
    """torch.ao's FX graph mode with its defaults for x86."""
    from torch.ao.quantization import get_default_qconfig_mapping
    from torch.ao.quantization.quantize_fx import convert_fx, prepare_fx

    torch.backends.quantized.engine = "x86"
    observed = prepare_fx(copy.deepcopy(model), get_default_qconfig_mapping("x86"), batches[0])
    with torch.no_grad():
        for batch in batches:
            observed(*batch)
    return convert_fx(observed)


def _torchao(model: nn.Module, config: Any, head: str) -> nn.Module:
    from torchao.quantization import quantize_

    quantized, names = copy.deepcopy(model), set(linears(model, head))
    with quiet():
        quantize_(quantized, config, filter_fn=lambda module, name: name in names)
    return quantized


def torchao_int8(model: nn.Module, head: str = "") -> nn.Module:
    """torchao's int8 weights by channel and dynamic int8 activations by token."""
    from torchao.quantization import Int8DynamicActivationInt8WeightConfig

    return _torchao(model, Int8DynamicActivationInt8WeightConfig(), head)


def torchao_int4(model: nn.Module, group_size: int, head: str = "") -> nn.Module:
    """torchao's int4 weights for CPUs, which torchao 0.18 keeps among its prototypes; `model` in bfloat16."""
    from torchao.prototype.quantization.int4.inference_workflow import PrototypeInt4WeightOnlyConfig

    return _torchao(model, PrototypeInt4WeightOnlyConfig(group_size=group_size), head)


def bitsandbytes_nf4(model: nn.Module, head: str = "") -> nn.Module:
    """bitsandbytes' nf4 layers in a copy of a bfloat16 model."""
    import bitsandbytes as bnb

    quantized = copy.deepcopy(model)
    for name in linears(model, head):
        old = quantized.get_submodule(name)
        bias = old.bias is not None
        new = bnb.nn.Linear4bit(old.in_features, old.out_features, bias, torch.bfloat16, quant_type="nf4")
        new.weight = bnb.nn.Params4bit(old.weight.data, requires_grad=False, quant_type="nf4")
        if bias:
            new.bias = old.bias
        quantized.set_submodule(name, new.to("cpu"))
    return quantized.eval()
