"""How Inductor calls the operator `linear`: as a plain function, as torch's dispatcher takes longer than a small product."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import torch

# the name in `torch._inductor.select_algorithm.extern_kernels`, which generated code imports
_NAME = "lightning_quant_linear"
_registered = False


def register(op: Any, function: Callable[..., torch.Tensor]) -> None:
    """Lower `op` to a call of `function`, once Inductor is loaded; where its internals differ, the operator is called."""
    global _registered
    if _registered or "torch._inductor.lowering" not in sys.modules:
        return
    _registered = True
    try:
        from torch._inductor import config, ir
        from torch._inductor.lowering import fallback_handler, register_lowering
        from torch._inductor.select_algorithm import extern_kernels
    except ImportError:
        return
    setattr(extern_kernels, _NAME, function)
    fallback = fallback_handler(op, add_to_fallback_set=False)

    @register_lowering(op, type_promotion_kind=None)
    def lower(x: Any, weight_packed: Any, *rest: Any) -> Any:
        if config.cpp_wrapper:
            return fallback(x, weight_packed, *rest)
        given: Any = ir.ExternKernel.require_contiguous(ir.ExternKernel.realize_input(x))
        others = [None if value is None else ir.ExternKernel.realize_input(value) for value in (weight_packed, *rest[:5])]
        layout = ir.FixedLayout(given.get_device(), given.get_dtype(), [*given.get_size()[:-1], weight_packed.get_size()[0]])
        return ir.TensorBox.create(_Call(layout, [given, *others], rest[5:]))

    class _Call(ir.ExternKernelAlloc):
        """`extern_kernels.<name>(tensors and Nones, constants)`."""

        def __init__(self, layout: Any, tensors: list[Any], constants: tuple[Any, ...]) -> None:
            self.places = [value is not None for value in tensors]
            given: Any = self.unwrap_storage([value for value in tensors if value is not None])
            super().__init__(layout, given, constants, python_kernel_name=f"extern_kernels.{_NAME}")

        def codegen_args(self) -> list[str]:
            inputs: Any = self.inputs
            given = iter(value.codegen_reference() for value in inputs)
            return [*(next(given) if present else "None" for present in self.places), *map(repr, self.constant_args)]
