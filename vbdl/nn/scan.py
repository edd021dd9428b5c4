"""LSTM, GRU and RNN as a loop over time in which each step is a batched product, in place, without gradients.

A step gets its products with the input, (n, batch, gates * hidden), which are computed for all steps before; w is
(n, hidden, gates * hidden); n counts samples and directions.
"""

from collections.abc import Sequence

import torch
from torch import Tensor


def _gru(
    gates: Sequence[Tensor], w: Tensor, bias: Tensor | None, projection: Tensor | None, states: Sequence[Tensor]
) -> tuple[Tensor, Tensor]:
    """h of every step, (steps, n, batch, hidden): Cho et al. 2014, with the reset gate after the product, as torch."""
    h = states[0]
    n, rows, size = h.shape
    bias = h.new_zeros(()) if bias is None else bias
    outputs = h.new_empty(len(gates), n, rows, size)
    product, gated, new = h.new_empty(n, rows, 3 * size), h.new_empty(n, rows, 2 * size), torch.empty_like(h)
    product_gated, product_new = product.split([2 * size, size], -1)
    reset, update = gated.chunk(2, -1)
    splits = [t.split([2 * size, size], -1) for t in gates]
    for (x_gated, x_new), out in zip(splits, outputs.unbind(0), strict=True):
        torch.baddbmm(bias, h, w, out=product)
        torch.add(x_gated, product_gated, out=gated)
        gated.sigmoid_()
        torch.addcmul(x_new, reset, product_new, out=new)
        new.tanh_()
        h = torch.lerp(new, h, update, out=out)
    return outputs, outputs


def _lstm(
    gates: Sequence[Tensor], w: Tensor, bias: Tensor | None, projection: Tensor | None, states: Sequence[Tensor]
) -> tuple[Tensor, Tensor]:
    """h and c of every step, (steps, n, batch, ...): Hochreiter and Schmidhuber 1997 with a forget gate."""
    h, c = states
    n, rows, size = c.shape
    outputs, cells = h.new_empty(len(gates), *h.shape), c.new_empty(len(gates), *c.shape)
    product, inner = h.new_empty(n, rows, 4 * size), torch.empty_like(c)
    enter, forget, new, leave = product.chunk(4, -1)
    both = product[..., : 2 * size]
    for x, out, cell in zip(gates, outputs.unbind(0), cells.unbind(0), strict=True):
        torch.baddbmm(x, h, w, out=product)
        both.sigmoid_()
        new.tanh_()
        leave.sigmoid_()
        c = torch.mul(forget, c, out=cell).addcmul_(enter, new)
        torch.tanh(c, out=inner)
        if projection is None:
            h = torch.mul(leave, inner, out=out)
        else:
            h = torch.bmm(inner.mul_(leave), projection, out=out)
    return outputs, cells


def _rnn(relu: bool):
    def scan(
        gates: Sequence[Tensor], w: Tensor, bias: Tensor | None, projection: Tensor | None, states: Sequence[Tensor]
    ) -> tuple[Tensor, Tensor]:
        """h of every step, (steps, n, batch, hidden): Elman 1990."""
        h = states[0]
        outputs = h.new_empty(len(gates), *h.shape)
        for x, out in zip(gates, outputs.unbind(0), strict=True):
            h = torch.baddbmm(x, h, w, out=out)
            h.relu_() if relu else h.tanh_()
        return outputs, outputs

    return scan


STEPS = {"gru": _gru, "lstm": _lstm, "rnn_tanh": _rnn(relu=False), "rnn_relu": _rnn(relu=True)}


class Packing:
    """The places of a packed sequence's entries in the padded one.

    batch_sizes: (steps,) int64, the number of rows that have each step; rows are sorted by falling length.
    """

    def __init__(self, batch_sizes: Tensor):
        self.steps, self.rows = len(batch_sizes), int(batch_sizes[0])
        row, step = torch.arange(self.rows), torch.arange(self.steps)
        self.there = there = row < batch_sizes.unsqueeze(1)  # (steps, batch)
        self.lengths = there.sum(0)
        self._entries = there.flatten().nonzero().squeeze(1)
        self._places = (there.flatten().cumsum(0) - 1).clamp_min(0)  # an entry for padding too, whatever it is
        backwards = torch.where(there, self.lengths - 1 - step.unsqueeze(1), step.unsqueeze(1))
        self._reversed = (backwards * self.rows + row).flatten()

    def pad(self, data: Tensor) -> Tensor:
        """(samples, entries, features) -> (samples, steps, batch, features), with any numbers where there is none."""
        return data.index_select(1, self._places).unflatten(1, (self.steps, self.rows))

    def pack(self, padded: Tensor) -> Tensor:
        """(samples, steps, batch, features) -> (samples, entries, features)."""
        return padded.flatten(1, 2).index_select(1, self._entries)

    def reverse(self, padded: Tensor) -> Tensor:
        """Each row's own steps in reverse order; (samples, steps, batch, features)."""
        return padded.flatten(1, 2).index_select(1, self._reversed).view(padded.shape)

    def last(self, each: Tensor) -> Tensor:
        """The value at each row's last step: (steps, n, batch, features) -> (n, batch, features)."""
        return each[self.lengths - 1, :, torch.arange(self.rows)].transpose(0, 1)
