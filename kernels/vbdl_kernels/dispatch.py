"""The dispatch of operators: a Triton kernel on an accelerator (or in Triton's interpreter), otherwise torch code.

The kernel of operator `x` is in `x_kernel.py`, which needs triton and is imported at the first launch. Without triton,
or on a device or for a dtype that has no kernel, the operator's reference runs: slower, with the same draws.
"""

import contextlib
import functools
import importlib
import importlib.util
import os
from collections.abc import Callable

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

KERNEL_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
library = torch.library.Library("vbdl", "FRAGMENT")


@functools.cache
def has_triton() -> bool:
    """True if triton is installed."""
    return importlib.util.find_spec("triton") is not None


def interpreting() -> bool:
    """True if kernels run in Triton's interpreter, on CPU tensors, which is slow and for tests only."""
    return os.environ.get("TRITON_INTERPRET") == "1" and has_triton()


def takes_kernel(tensor: Tensor) -> bool:
    """True if a kernel runs on tensors of this device and dtype."""
    if tensor.dtype not in KERNEL_DTYPES:
        return False
    return interpreting() if tensor.device.type == "cpu" else has_triton()


def fast_math(tensor: Tensor) -> bool:
    """True if a kernel may use PTX (NVIDIA) for the hardware's fast log2, square root, sine and cosine."""
    return tensor.is_cuda and torch.version.hip is None and not interpreting()


def on_device(tensor: Tensor) -> contextlib.AbstractContextManager:
    """A context that makes the tensor's device the current one, on which Triton launches whatever its arguments say."""
    return torch.cuda.device_of(tensor) if tensor.is_cuda else contextlib.nullcontext()


def define(name: str, schema: str, reference: Callable, shape: Callable) -> None:
    """Register the operator `vbdl::name` with its reference and the kernel of that name, if `kernels_in` enters one.

    schema: the operator's arguments and results, as torch writes them. shape: a function of the arguments that returns
    empty outputs, for tracing. The device and dtype of the first argument decide whether the kernel runs.

    Operators have no autograd formula of their own; a `torch.autograd.Function` of each has it, because
    `torch.func.grad` refuses `register_autograd` (pytorch#168393) and gives silent zeros in forward mode.
    """
    library.define(f"{name}{schema}")

    def run(*arguments):
        device = arguments[0].device.type
        if torch.is_autocast_enabled(device):  # the inputs are cast already, and sums must stay in a wide dtype
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
    """Register a vmap rule for the bare operator, which runs if no derivative is needed (see `call_of`).

    rule: rule(call, info, in_dims, *arguments), where call is the operator itself.
    """

    @torch.library.register_vmap(f"vbdl::{name}", lib=library)
    def mapped(info, in_dims, *arguments):
        return rule(getattr(torch.ops.vbdl, name), info, in_dims, *arguments)


_MODULES = {}  # operator -> the module that launches its kernel


def kernels_in(module: str, *names: str) -> None:
    """Enter the module that has the kernels of these operators."""
    _MODULES.update(dict.fromkeys(names, module))


@functools.cache
def kernel_of(name: str) -> Callable:
    """The function that launches an operator's kernel; imports its module."""
    return getattr(importlib.import_module(f"vbdl_kernels.{_MODULES[name]}"), name)


def autocast(x: Tensor, *parameters: Tensor | None) -> tuple[Tensor | None, ...]:
    """Cast the tensors to autocast's dtype if autocast is on, as `F.linear` does; otherwise return them unchanged."""
    kind = x.device.type
    if not torch.is_autocast_enabled(kind):
        return x, *parameters
    dtype = torch.get_autocast_dtype(kind)
    # like torch, leave float64 as it is
    return tuple(t if t is None or t.dtype == torch.float64 else t.to(dtype) for t in (x, *parameters))


_WITH_DERIVATIVE: dict[Callable, Callable] = {}  # bare operator -> the function that takes its arguments


def kept_whole(name: str) -> Callable[[Callable], Callable]:
    """A decorator for the function that calls operator `name`, with its derivative if one is needed.

    torch.compile writes a call of the function into the graph without tracing into it: traced into, an
    `autograd.Function` is refused or loses its vmap rule (pytorch#129845). The decorator imports torch's compiler,
    which takes 1.5 s; torch itself imports it for the first optimizer and the first traced graph.
    """

    def decorate(function: Callable) -> Callable:
        _WITH_DERIVATIVE[getattr(torch.ops.vbdl, name).default] = function
        return torch.compiler.allow_in_graph(function)

    return decorate


def with_derivative(operator: Callable) -> Callable:
    """The function that calls a bare operator, as graphs hold it, with its derivative; other operators unchanged."""
    return _WITH_DERIVATIVE.get(operator, operator)


def call_of(function: type[torch.autograd.Function], name: str, *arguments) -> Callable:
    """`function.apply` if a derivative may be needed, otherwise the bare operator.

    Tracers (export, `make_fx`, `functionalize`) refuse an `autograd.Function` under vmap, and predictions need none.
    """
    return function.apply if wants_derivative(*arguments) else getattr(torch.ops.vbdl, name)


def wants_derivative(*arguments) -> bool:
    """True if a derivative with respect to one of these may be needed. Not for code that torch.compile traces into."""
    functorch = torch._C._functorch
    if torch.compiler.is_exporting():
        return False
    stack = functorch.get_interpreter_stack()
    if stack and any(i.key() in (functorch.TransformType.Grad, functorch.TransformType.Jvp) for i in stack):
        return True
    return torch.is_grad_enabled() and any(_requires_grad(a) for a in arguments)


def _requires_grad(argument: object) -> bool:
    """True if a tensor, or any in a list, requires a gradient, also inside vmap, whose wrapper tensors do not tell."""
    if isinstance(argument, Tensor):
        while torch._C._functorch.is_functorch_wrapped_tensor(argument):
            argument = torch._C._functorch.get_unwrapped(argument)
        return argument.requires_grad
    return isinstance(argument, list | tuple) and any(_requires_grad(a) for a in argument)


def only_gradients() -> bool:
    """True if the call is inside no transform but torch.func.grad: not in `vmap`, forward mode or `functionalize`.

    `functionalize` refuses an `autograd.Function`, and there is no kernel for vmap over parameters.
    """
    stack = torch._C._functorch.get_interpreter_stack() or ()
    forward_mode = torch.autograd.forward_ad._current_level >= 0
    return not forward_mode and all(i.key() == torch._C._functorch.TransformType.Grad for i in stack)


def leading(tensor: Tensor, dim: int | None, size: int) -> Tensor:
    """The tensor with the axis that vmap maps first; if vmap maps none (dim None), expanded along it without a copy."""
    return tensor.expand(size, *tensor.shape) if dim is None else tensor.movedim(dim, 0)


def split_batch(y: Tensor, sizes: torch.Size) -> Tensor:
    """Split the batch axis again: (samples, mapped * batch, out) -> (mapped, samples, batch, out).

    sizes: (mapped, batch). The mapped axis comes first because torch.export loses it anywhere else.
    """
    return y.unflatten(1, sizes).movedim(1, 0)


def map_draws(
    call: Callable, size: int, x: Tensor, x_dim: int | None, key: Tensor, key_dim: int | None
) -> tuple[Tensor, int]:
    """The vmap rule of call(x, key) -> (samples, batch, out): one call for the whole mapped axis.

    x: (batch, in) shared or (samples, batch, in); key: (samples, 2); each with or without the mapped axis. If key has
    it, its entries become more samples, otherwise more batch.
    """
    if key_dim is None:  # the draws are the same: the mapped axis is more batch
        x = x.movedim(x_dim or 0, -3)
        return split_batch(call(x.flatten(-3, -2), key), x.shape[-3:-1]), 0
    key = key.movedim(key_dim, 0)  # (mapped, samples, 2)
    if x_dim is not None or x.ndim == 3:
        x = leading(x, x_dim, size)
        if x.ndim == 3:
            x = x[:, None].expand(-1, key.shape[1], -1, -1)
        x = x.flatten(0, 1)
    return call(x, key.flatten(0, 1)).unflatten(0, key.shape[:2]), 0


def one_by_one(call: Callable, info, in_dims, *arguments):
    """The vmap rule without a batched kernel: one call for each entry of the mapped axis.

    It is for parameters per ensemble member and gradients per draw, for which plain torch would hold the weights of all
    draws at once.
    """
    entry = lambda i: tree_map(lambda a, d: a if d is None else a.select(d, i), arguments, tuple(in_dims))
    outputs = [call(*entry(i)) for i in range(info.batch_size)]
    if isinstance(outputs[0], tuple):
        return tuple(torch.stack(column) for column in zip(*outputs, strict=True)), (0,) * len(outputs[0])
    return torch.stack(outputs), 0
