"""Which implementation runs: Triton on an accelerator (or in its interpreter), the torch reference elsewhere.

The kernel of operator `x` lives in `x_kernel.py`, which needs triton and is imported at the first launch. Without
triton, on a device it does not know or for a dtype it does not take, the reference runs: slower, the same draws.
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


_WITH_DERIVATIVE: dict[Callable, Callable] = {}  # bare operator -> the function that takes its arguments


def kept_whole(name: str) -> Callable[[Callable], Callable]:
    """Decorates what calls operator `name`, with a derivative where one is asked for: the compiler writes the call
    into the graph without tracing into it.

    Traced into, an `autograd.Function` is refused or loses its vmap rule (pytorch#129845). This imports the compiler,
    a second and a half, which torch itself does for the first optimizer made and the first graph traced.
    """

    def decorate(function: Callable) -> Callable:
        _WITH_DERIVATIVE[getattr(torch.ops.vbdl, name).default] = function
        return torch.compiler.allow_in_graph(function)

    return decorate


def with_derivative(operator: Callable) -> Callable:
    """For graphs, which hold bare operators: the function in the operator's place that has its derivative."""
    return _WITH_DERIVATIVE.get(operator, operator)


def call_of(function: type[torch.autograd.Function], name: str, *arguments) -> Callable:
    """`function.apply` where a derivative may be asked for, the bare operator elsewhere.

    Tracers (export, `make_fx`, `functionalize`) refuse a mapped `autograd.Function`, and prediction needs none.
    """
    return function.apply if wants_derivative(*arguments) else getattr(torch.ops.vbdl, name)


def wants_derivative(*arguments) -> bool:
    """Whether a derivative by one of these may be asked for. Not for code that the compiler traces into."""
    functorch = torch._C._functorch
    if torch.compiler.is_exporting():
        return False
    stack = functorch.get_interpreter_stack()
    if stack and any(i.key() in (functorch.TransformType.Grad, functorch.TransformType.Jvp) for i in stack):
        return True
    return torch.is_grad_enabled() and any(_requires_grad(a) for a in arguments)


def _requires_grad(argument: object) -> bool:
    """Of a tensor, a mapped one too, which does not say that its inside does; or of any in a list."""
    if isinstance(argument, Tensor):
        while torch._C._functorch.is_functorch_wrapped_tensor(argument):
            argument = torch._C._functorch.get_unwrapped(argument)
        return argument.requires_grad
    return isinstance(argument, list | tuple) and any(_requires_grad(a) for a in argument)


def only_gradients() -> bool:
    """Whether nothing but differentiation is going on: no `vmap`, forward mode or `functionalize` around the call.

    `functionalize` refuses an `autograd.Function`, and a map over parameters has no kernel.
    """
    stack = torch._C._functorch.get_interpreter_stack() or ()
    forward_mode = torch.autograd.forward_ad._current_level >= 0
    return not forward_mode and all(i.key() == torch._C._functorch.TransformType.Grad for i in stack)


def leading(tensor: Tensor, dim: int | None, size: int) -> Tensor:
    """A mapped tensor with its mapped axis first; an unmapped one repeated along it, without a copy."""
    return tensor.expand(size, *tensor.shape) if dim is None else tensor.movedim(dim, 0)


def split_batch(y: Tensor, sizes: torch.Size) -> Tensor:
    """(samples, mapped * batch, out) -> (mapped, samples, batch, out). Export loses a mapped axis that is not first."""
    return y.unflatten(1, sizes).movedim(1, 0)


def map_draws(
    call: Callable, size: int, x: Tensor, x_dim: int | None, key: Tensor, key_dim: int | None
) -> tuple[Tensor, int]:
    """The vmap rule of call(x, key) -> (samples, batch, out): one call with every draw of the mapped axis.

    x: (batch, in) shared or (samples, batch, in);  key: (samples, 2), each with its mapped axis or without
    """
    if key_dim is None:  # the same draws: the mapped axis is more batch
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
    """The vmap rule of last resort: one call for each entry of the mapped axis.

    For what has no batched kernel (parameters per ensemble member, gradients per draw), where a formula in plain
    torch would hold the weights of all draws at once.
    """
    entry = lambda i: tree_map(lambda a, d: a if d is None else a.select(d, i), arguments, tuple(in_dims))
    outputs = [call(*entry(i)) for i in range(info.batch_size)]
    if isinstance(outputs[0], tuple):
        return tuple(torch.stack(column) for column in zip(*outputs, strict=True)), (0,) * len(outputs[0])
    return torch.stack(outputs), 0
