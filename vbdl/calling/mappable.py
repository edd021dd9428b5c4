"""Functions of torch that `vmap` has no rule for, as operations that it has rules for.

Without a rule, torch runs such a function for one sample after the other, or raises an error. The results here are the
same up to rounding. Products are no calls of `F.linear`, so that the cells of recurrent networks draw their weights in
every way to run them.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._C._functorch import is_batchedtensor

from vbdl.calling.graphs import FunctionMode
from vbdl.types import Arguments, Keywords


class Mappable(FunctionMode):
    """A torch function mode in which functions without a rule for `vmap` run as operations that have one."""

    def __torch_function__(
        self, func: Callable[..., object], types: Sequence[type], args: Arguments = (), kwargs: Keywords | None = None
    ) -> object:
        replacement = _FUNCTIONS.get(getattr(func, "__name__", ""))
        return func(*args, **(kwargs or {})) if replacement is None else replacement(func, *args, **(kwargs or {}))


def _product(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    y = torch.matmul(x, weight.mT)
    return y if bias is None else y + bias


def _gru_cell(
    func: Any, input: Tensor, hx: Tensor, w_ih: Tensor, w_hh: Tensor, b_ih: Any = None, b_hh: Any = None
) -> Tensor:
    """`torch.gru_cell`."""
    of_input, of_state = _product(input, w_ih, b_ih).chunk(3, -1), _product(hx, w_hh, b_hh).chunk(3, -1)
    reset, update = (torch.sigmoid(a + b) for a, b in zip(of_input[:2], of_state[:2], strict=True))
    new = torch.tanh(of_input[2] + reset * of_state[2])
    return (hx - new) * update + new


def _lstm_cell(
    func: Any, input: Tensor, hx: Sequence[Tensor], w_ih: Tensor, w_hh: Tensor, b_ih: Any = None, b_hh: Any = None
) -> tuple[Tensor, Tensor]:
    """`torch.lstm_cell`."""
    h, c = hx
    enter, forget, new, leave = (_product(input, w_ih, b_ih) + _product(h, w_hh, b_hh)).chunk(4, -1)
    c = torch.sigmoid(forget) * c + torch.sigmoid(enter) * torch.tanh(new)
    return torch.sigmoid(leave) * torch.tanh(c), c


def _rnn_cell(
    func: Any, input: Tensor, hx: Tensor, w_ih: Tensor, w_hh: Tensor, b_ih: Any = None, b_hh: Any = None
) -> Tensor:
    """`torch.rnn_tanh_cell` and `torch.rnn_relu_cell`."""
    activation = torch.tanh if func.__name__ == "rnn_tanh_cell" else torch.relu
    return activation(_product(input, w_ih, b_ih) + _product(hx, w_hh, b_hh))


def _bilinear(func: Any, input1: Tensor, input2: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """`F.bilinear`: y[..., o] = sum_ij x1[..., i] weight[o, i, j] x2[..., j] + bias[o]."""
    outputs, of_1, of_2 = weight.shape
    by_1 = torch.matmul(input1, weight.transpose(0, 1).reshape(of_1, outputs * of_2))
    y = (by_1.unflatten(-1, (outputs, of_2)) * input2.unsqueeze(-2)).sum(-1)
    return y if bias is None else y + bias


def _embedding_bag(func: Callable[..., Tensor], *args: Any, **kwargs: Any) -> Tensor:
    """`F.embedding_bag`; torch.embedding_bag, which it calls, takes its arguments in another order."""
    bags = _bags(*args, **kwargs) if func is F.embedding_bag else None
    return func(*args, **kwargs) if bags is None else bags


def _bags(
    input: Tensor,
    weight: Tensor,
    offsets: Tensor | None = None,
    max_norm: float | None = None,
    norm_type: float = 2.0,
    scale_grad_by_freq: bool = False,
    mode: str = "mean",
    sparse: bool = False,
    per_sample_weights: Tensor | None = None,
    include_last_offset: bool = False,
    padding_idx: int | None = None,
) -> Tensor | None:
    """`F.embedding_bag` of bags with one number of ids, (bags, ids); None for other bags, or if it changes weights."""
    if input.ndim != 2 or max_norm is not None:
        return None
    values = F.embedding(input, weight)
    if per_sample_weights is not None:
        values = values * per_sample_weights.unsqueeze(-1)
    counts: Any = input.shape[1]
    if padding_idx is not None:
        there = (input != padding_idx % weight.shape[0]).unsqueeze(-1)
        values, counts = torch.where(there, values, 0.0 if mode != "max" else -torch.inf), there.sum(1).clamp_min(1)
    if mode == "max":
        largest = values.amax(1)
        return torch.where(largest == -torch.inf, 0.0, largest)  # a bag of padding alone
    return values.sum(1) / counts if mode == "mean" else values.sum(1)


def _global_average(func: Callable[..., Tensor], input: Tensor, output_size: Any) -> Tensor:
    """`F.adaptive_avg_pool2d` and `3d`: to one number for each channel, torch adds a write of strides."""
    sizes = output_size if isinstance(output_size, Sequence) else (output_size,)
    axes = (-2, -1) if func.__name__ == "adaptive_avg_pool2d" else (-3, -2, -1)
    return input.mean(axes, keepdim=True) if all(size == 1 for size in sizes) else func(input, output_size)


def _group_norm(func: Callable[..., Tensor], input: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """`F.group_norm`, which asks for the layout of its input."""
    return func(input.contiguous() if is_batchedtensor(input) else input, *args, **kwargs)


def _laid_out(func: Callable[..., Any], input: Tensor, *args: Any, **kwargs: Any) -> Any:
    """`x.to`, `x.clone`, `x.contiguous` or `x.is_contiguous` of channels last, which `vmap` does not know.

    Channels become the last axis of a copy. torch's strides for this format, of one sample, are those of the result.
    """
    given = [a for a in (*args, *kwargs.values()) if a in _CHANNELS_LAST and isinstance(a, torch.memory_format)]
    if not given or not is_batchedtensor(input):
        return func(input, *args, **kwargs)
    args = tuple(a for a in args if a is not given[0])
    kwargs = {name: a for name, a in kwargs.items() if a is not given[0]}
    if input.ndim != _CHANNELS_LAST[given[0]]:
        raise ValueError(f"{given[0]} is a layout of {_CHANNELS_LAST[given[0]]} axes, not of {input.ndim}")
    if func.__name__ == "is_contiguous":
        return input.movedim(1, -1).is_contiguous()
    return func(input, *args, **kwargs).movedim(1, -1).contiguous().movedim(-1, 1)


_CHANNELS_LAST = {torch.channels_last: 4, torch.channels_last_3d: 5}
_FUNCTIONS: dict[str, Callable[..., object]] = {
    "gru_cell": _gru_cell,
    "lstm_cell": _lstm_cell,
    "rnn_tanh_cell": _rnn_cell,
    "rnn_relu_cell": _rnn_cell,
    "bilinear": _bilinear,
    "embedding_bag": _embedding_bag,
    "adaptive_avg_pool2d": _global_average,
    "adaptive_avg_pool3d": _global_average,
    "group_norm": _group_norm,
    "to": _laid_out,
    "clone": _laid_out,
    "contiguous": _laid_out,
    "is_contiguous": _laid_out,
}
