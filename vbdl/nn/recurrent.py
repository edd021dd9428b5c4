"""LSTM, GRU and RNN with dropout between layers drawn from counters: one mask per draw, (time, features)."""

from collections.abc import Callable

import torch
from torch import Tensor

from vbdl.nn.masks import Masks


def recurrent(masks: Masks, func: Callable[..., tuple[Tensor, ...]], input: Tensor, *args) -> tuple[Tensor, ...]:
    """`torch.lstm`, `gru`, `rnn_tanh` or `rnn_relu`, run layer by layer if there is dropout between the layers.

    The masks between layers of a packed sequence, (entries, features), are those of the padded one.
    """
    is_packed = isinstance(args[0], Tensor) and args[0].dtype == torch.int64 and args[0].ndim == 1
    sizes: tuple[Tensor, ...] = args[:1] if is_packed else ()  # the number of rows that have each step
    args = args[len(sizes) :]
    hidden, weights, has_biases, layers, dropout, training, bidirectional, *order = args  # order: batch_first if padded
    if not training or layers == 1 or masks.p(dropout, masks.place()) == 0.0:
        # rate 0: torch would draw dropout from its own generator
        return func(input, *sizes, hidden, weights, has_biases, layers, 0.0, False, bidirectional, *order)
    directions = 2 if bidirectional else 1
    per_layer = len(weights) // layers
    states = hidden if isinstance(hidden, tuple | list) else (hidden,)
    finals = []
    for layer in range(layers):
        if layer and sizes:
            input = masks.drop_steps(input, sizes[0], dropout, func.__name__)
        elif layer:
            input = masks.drop(input, dropout, func.__name__, axis=0 if order[0] else 1)
        part = [s[layer * directions : (layer + 1) * directions] for s in states]
        layer_weights = list(weights[layer * per_layer : (layer + 1) * per_layer])
        start = tuple(part) if len(part) > 1 else part[0]
        input, *final = func(input, *sizes, start, layer_weights, has_biases, 1, 0.0, False, bidirectional, *order)
        finals.append(final)
    return (input, *(torch.cat(parts) for parts in zip(*finals, strict=True)))
