"""Which implementation runs: Triton on an accelerator (or in its interpreter), the torch reference elsewhere.

The kernel of operator `x` lives in `x_kernel.py`, which needs triton and is imported at the first launch. Without
triton, on a device it does not know or for a dtype it does not take, the reference runs: slower, the same draws.
"""

import contextlib
import functools
import importlib
import importlib.abc
import importlib.util
import os
import sys
from collections.abc import Callable

import torch
from torch import Tensor

KERNEL_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
library = torch.library.Library("vbdl", "FRAGMENT")


@functools.cache
def has_triton() -> bool:
    return importlib.util.find_spec("triton") is not None


def interpreting() -> bool:
    """Whether kernels run in Triton's interpreter, on CPU tensors: a test of the kernel, never a fast path."""
    return os.environ.get("TRITON_INTERPRET") == "1" and has_triton()


def takes_kernel(tensor: Tensor) -> bool:
    if tensor.dtype not in KERNEL_DTYPES:
        return False
    return interpreting() if tensor.device.type == "cpu" else has_triton()


def fast_math(tensor: Tensor) -> bool:
    """Whether the kernel may use PTX: the hardware's own log2, square root, sine and cosine."""
    return tensor.is_cuda and torch.version.hip is None and not interpreting()


def on_device(tensor: Tensor) -> contextlib.AbstractContextManager:
    """Triton launches on the current device, whatever device its arguments are on."""
    return torch.cuda.device_of(tensor) if tensor.is_cuda else contextlib.nullcontext()


def define(name: str, schema: str, reference: Callable, shape: Callable) -> None:
    """Register `vbdl::name`: the reference, and the function `name` of the kernel module that has one.

    The first tensor argument decides. The operators carry no autograd formula; each operator's
    `torch.autograd.Function` does, because `torch.func.grad` refuses `register_autograd` (pytorch#168393) and gives
    silent zeros in forward mode.
    """
    library.define(f"{name}{schema}")

    def run(*arguments):
        device = arguments[0].device.type
        if torch.is_autocast_enabled(device):  # the operator's inputs have been cast; its own sums stay wide
            with torch.autocast(device, enabled=False):
                return run(*arguments)
        if takes_kernel(arguments[0]):
            return kernel_of(name)(*arguments)
        return reference(*arguments)

    for device in ("CPU", "CUDA", "XPU"):
        library.impl(name, run, device)
    library.impl(name, reference, "MPS")
    torch.library.register_fake(f"vbdl::{name}", shape, lib=library)


def batching(name: str, rule: Callable) -> None:
    """The vmap rule of the bare operator. rule(call, info, in_dims, *arguments), call: the operator itself.

    For calls without a derivative, see `call_of`.
    """

    @torch.library.register_vmap(f"vbdl::{name}", lib=library)
    def mapped(info, in_dims, *arguments):
        return rule(getattr(torch.ops.vbdl, name), info, in_dims, *arguments)


_MODULES = {}  # operator -> the module that launches its kernel


def kernels_in(module: str, *names: str) -> None:
    _MODULES.update(dict.fromkeys(names, module))


@functools.cache
def kernel_of(name: str) -> Callable:
    return getattr(importlib.import_module(f"vbdl_kernels.{_MODULES[name]}"), name)


def autocast(x: Tensor, *parameters: Tensor | None) -> tuple[Tensor | None, ...]:
    """The tensors in autocast's dtype where autocast is on, as `F.linear` has it; unchanged where it is off."""
    kind = x.device.type
    if not torch.is_autocast_enabled(kind):
        return x, *parameters
    dtype = torch.get_autocast_dtype(kind)
    # float64 is left alone, as torch does
    return tuple(t if t is None or t.dtype == torch.float64 else t.to(dtype) for t in (x, *parameters))


class _AfterDynamo(importlib.abc.MetaPathFinder):
    """Does what waits for `torch._dynamo` once somebody imports it: it costs more than a second and brings triton."""

    def __init__(self):
        self.functions = []

    def find_spec(self, name, path=None, target=None):
        if name != "torch._dynamo":
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        if spec is not None and spec.loader is not None:
            execute = spec.loader.exec_module

            def then_allow(module):
                execute(module)
                for function in self.functions:
                    module.allow_in_graph(function)

            spec.loader.exec_module = then_allow
        return spec


_after_dynamo = _AfterDynamo()
if "torch._dynamo" not in sys.modules:
    sys.meta_path.insert(0, _after_dynamo)


def kept_whole(function: Callable) -> Callable:
    """`torch.compiler.allow_in_graph`, without importing the compiler.

    Where the compiler traces into an `autograd.Function`, it refuses or loses its vmap rule (pytorch#129845).
    """
    if "torch._dynamo" in sys.modules:
        torch.compiler.allow_in_graph(function)
    else:
        _after_dynamo.functions.append(function)
    return function


def call_of(function: type[torch.autograd.Function], name: str, *arguments) -> Callable:
    """`function.apply` where a derivative may be asked for, the bare operator elsewhere.

    Tracers (export, `make_fx`, `functionalize`) refuse a mapped `autograd.Function`, and prediction needs none.
    """
    functorch = torch._C._functorch
    bare = getattr(torch.ops.vbdl, name)
    if torch.compiler.is_exporting():
        return bare
    stack = functorch.get_interpreter_stack() or ()
    if any(i.key() in (functorch.TransformType.Grad, functorch.TransformType.Jvp) for i in stack):
        return function.apply
    if torch.is_grad_enabled():
        for tensor in arguments:
            while isinstance(tensor, Tensor) and functorch.is_functorch_wrapped_tensor(tensor):
                tensor = functorch.get_unwrapped(tensor)  # a mapped tensor does not say that its inside requires grad
            if isinstance(tensor, Tensor) and tensor.requires_grad:
                return function.apply
    return bare


def leading(tensor: Tensor, dim: int | None, size: int) -> Tensor:
    """A mapped tensor with its mapped axis first; an unmapped one repeated along it, without a copy."""
    return tensor.expand(size, *tensor.shape) if dim is None else tensor.movedim(dim, 0)


def one_by_one(call: Callable, info, in_dims, *arguments):
    """The vmap rule of last resort: one call for each entry of the mapped axis.

    For what has no batched kernel (parameters per ensemble member, gradients per draw), where a formula in plain
    torch would hold the weights of all draws at once.
    """
    outputs = [
        call(*(a if d is None else a.select(d, i) for a, d in zip(arguments, in_dims, strict=True)))
        for i in range(info.batch_size)
    ]
    if isinstance(outputs[0], tuple):
        return tuple(torch.stack(column) for column in zip(*outputs, strict=True)), (0,) * len(outputs[0])
    return torch.stack(outputs), 0
