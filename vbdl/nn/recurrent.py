"""LSTM, GRU and RNN with dropout between layers drawn from counters: one mask per draw, (time, features)."""

from collections.abc import Callable

import torch
from torch import Tensor

from vbdl.nn.masks import Masks


def recurrent(masks: Masks, func: Callable[..., tuple[Tensor, ...]], input: Tensor, *args) -> tuple[Tensor, ...]:
    """`torch.lstm`, `gru`, `rnn_tanh` or `rnn_relu`, run layer by layer if there is dropout between the layers."""
    if isinstance(args[0], Tensor) and args[0].dtype == torch.int64 and args[0].ndim == 1:
        batch_sizes, *rest = args
        _, _, _, layers, dropout, training, _ = rest
        if training and layers > 1 and masks.p(dropout, masks.place()) > 0:
            raise NotImplementedError(
                f"module '{masks.place()}' has dropout between recurrent layers and got a packed sequence: pass a "
                f"padded sequence"
            )
        # rate 0: torch would draw dropout from its own generator
        return func(input, batch_sizes, *rest[:4], 0.0, False, rest[6])
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
