"""LSTM, GRU and RNN with dropout between layers drawn from counters: one mask per draw, (time, features)."""

from collections.abc import Callable

import torch
from torch import Tensor

from vbdl.nn.masks import Masks


def recurrent(masks: Masks, func: Callable[..., tuple[Tensor, ...]], input: Tensor, *args) -> tuple[Tensor, ...]:
    """`torch.lstm`, `gru`, `rnn_tanh` or `rnn_relu`, run layer by layer if there is dropout between the layers."""
    if isinstance(args[0], Tensor) and args[0].dtype == torch.int64 and args[0].ndim == 1:
        return _packed(masks, func, input, *args)
    hidden, weights, has_biases, layers, dropout, training, bidirectional, batch_first = args
    if not training or layers == 1 or masks.p(dropout, masks.place()) == 0.0:
        return func(input, hidden, weights, has_biases, layers, 0.0, False, bidirectional, batch_first)
    directions = 2 if bidirectional else 1
    per_layer = len(weights) // layers
    states = hidden if isinstance(hidden, tuple | list) else (hidden,)
    finals = []
    for layer in range(layers):
        if layer:
            input = masks.drop(input, dropout, func.__name__, axis=0 if batch_first else 1)
        part = [s[layer * directions : (layer + 1) * directions] for s in states]
        layer_weights = list(weights[layer * per_layer : (layer + 1) * per_layer])
        start = tuple(part) if len(part) > 1 else part[0]
        input, *final = func(input, start, layer_weights, has_biases, 1, 0.0, False, bidirectional, batch_first)
        finals.append(final)
    return (input, *(torch.cat(parts) for parts in zip(*finals, strict=True)))


def _packed(
    masks: Masks,
    func: Callable[..., tuple[Tensor, ...]],
    data: Tensor,  # (steps of all rows, features), step by step
    batch_sizes: Tensor,  # (time,) int64, the number of rows that have each step
    hidden: Tensor | tuple[Tensor, ...],
    weights: list[Tensor],
    has_biases: bool,
    layers: int,
    dropout: float,
    training: bool,
    bidirectional: bool,
) -> tuple[Tensor, ...]:
    """A recurrent function of a packed sequence; the masks between layers are those of the padded sequence."""
    if not training or layers == 1 or masks.p(dropout, masks.place()) == 0.0:
        # rate 0: torch would draw dropout from its own generator
        return func(data, batch_sizes, hidden, weights, has_biases, layers, 0.0, False, bidirectional)
    directions = 2 if bidirectional else 1
    per_layer = len(weights) // layers
    step_of = torch.repeat_interleave(torch.arange(len(batch_sizes)), batch_sizes).to(data.device)
    states = hidden if isinstance(hidden, tuple | list) else (hidden,)
    finals = []
    for layer in range(layers):
        if layer:
            data = masks.drop_steps(data, step_of, len(batch_sizes), dropout, func.__name__)
        part = [s[layer * directions : (layer + 1) * directions] for s in states]
        layer_weights = list(weights[layer * per_layer : (layer + 1) * per_layer])
        start = tuple(part) if len(part) > 1 else part[0]
        data, *final = func(data, batch_sizes, start, layer_weights, has_biases, 1, 0.0, False, bidirectional)
        finals.append(final)
    return (data, *(torch.cat(parts) for parts in zip(*finals, strict=True)))
