"""A linear layer kept whole and lowered again: every way of stacking, on both sides of every threshold."""

import itertools

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.func import functional_call, stack_module_state, vmap
from torch.nn.attention import SDPBackend, sdpa_kernel

import vbdl
from vbdl.compiling.graph import trace
from vbdl.compiling.rewrite.linear import DECOMPOSITIONS, LINEAR, WholeLinears, _product, lower

SHAPES = {  # samples, rows, inputs, outputs
    "tiny": (3, 5, 4, 2),
    "few rows, wide": (7, 3, 61, 83),
    "many rows, narrow": (7, 70, 61, 10),
    "rows that fill a vector worse than the outputs": (7, 31, 61, 64),
    "outputs that fill a vector worse than the rows": (7, 24, 61, 90),
    "many layers, rows that fill a vector worse": (90, 31, 30, 61),
    "many rows, more outputs than one product takes": (41, 70, 30, 130),
    "many rows, many narrow layers": (70, 20, 30, 60),
    "one row, weights that no cache holds": (4, 1, 510, 530),
}


@pytest.mark.parametrize(
    "stacked, bias",
    [
        (flags, bias)
        for flags in itertools.product([True, False], repeat=3)
        for bias in (True, False)
        if bias or not flags[2]
    ],
)
@pytest.mark.parametrize("shape", SHAPES)
def test_lowered_is_the_sum_it_stands_for(shape, stacked, bias):
    samples, rows, k, n = SHAPES[shape]
    lead = lambda flag: (samples,) if flag else ()
    x = torch.randn(*lead(stacked[0]), rows, k, dtype=torch.float64)
    w = torch.randn(*lead(stacked[1]), n, k, dtype=torch.float64)
    b = torch.randn(*lead(stacked[2]), n, dtype=torch.float64) if bias else None
    expected = torch.einsum(f"{'s' * stacked[0]}rk,{'s' * stacked[1]}nk->{'s' * any(stacked[:2])}rn", x, w)
    if b is not None:
        expected = expected + (b.unsqueeze(1) if stacked[2] else b)
    torch.testing.assert_close(lower(x, w, b, list(stacked)), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("stacked", [[True, True, True], [False, True, False], [True, False, False]])
@pytest.mark.parametrize("axes", [(), (5, 7)])
def test_none_or_more_axes_before_the_inputs(stacked, axes):
    """A network may pass one row's vector alone."""
    lead = lambda flag: (3,) if flag else ()
    x = torch.randn(*lead(stacked[0]), *axes, 11, dtype=torch.float64)
    w, b = torch.randn(*lead(stacked[1]), 13, 11, dtype=x.dtype), torch.randn(*lead(stacked[2]), 13, dtype=x.dtype)
    expected = torch.einsum(f"{'s' * stacked[0]}...k,{'s' * stacked[1]}nk->s...n", x, w)
    expected = expected + (b.view(3, *[1] * len(axes), 13) if stacked[2] else b)
    torch.testing.assert_close(lower(x, w, b, stacked), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("stacked", [[True, True, True], [False, True, False], [True, False, False]])
@pytest.mark.parametrize("shape", SHAPES)
def test_lowered_in_bfloat16(shape, stacked):
    samples, rows, k, n = SHAPES[shape]
    samples *= 4 if rows == 1 else 1  # as many bytes
    lead = lambda flag: (samples,) if flag else ()
    x, w = torch.randn(*lead(stacked[0]), rows, k), torch.randn(*lead(stacked[1]), n, k)
    b = torch.randn(*lead(stacked[2]), n)
    x, w, b = (t.bfloat16() for t in (x, w, b))
    found = lower(x, w, b, stacked)
    assert found.dtype == torch.bfloat16
    expected = lower(x.double(), w.double(), b.double(), stacked)
    torch.testing.assert_close(found.double(), expected, rtol=0.02, atol=0.02 * k**0.5)


@pytest.mark.parametrize("rows", [64, 128, 256])
@pytest.mark.parametrize("k", [1, 11, 50, 211, 512])
def test_a_row_is_summed_alike_at_every_place(rows, k):
    """Bit for bit, for any width: the same row everywhere gives the same outputs everywhere."""
    for samples, n in itertools.product((1, 5), (1, 2, 5, 10, 16, 50, 211)):
        x = torch.randn(samples, 1, k).expand(-1, rows, -1).contiguous()
        y = _product(x, torch.randn(samples, n, k))
        assert torch.equal(y, y[:, :1].expand_as(y)), (samples, n)


class Attending(torch.nn.Module):
    """Attention of every kind of argument that torch's layer has, whose batch is not the first axis."""

    def __init__(self, biases=False, apart=False):
        super().__init__()
        width = {"kdim": 6, "vdim": 7} if apart else {}
        self.layer = torch.nn.MultiheadAttention(8, 2, 0.1, True, biases, biases, **width, batch_first=True)
        self.apart = apart

    def forward(self, x):
        y = (x[..., :6], x[..., :7]) if self.apart else (x, x)
        late = torch.ones(5, 5, dtype=torch.bool).triu(1)
        one, _ = self.layer(x, *y, need_weights=False, attn_mask=late, is_causal=True)
        two, weights = self.layer(x, *y, key_padding_mask=x[..., 0].abs() > 2)
        return one, two, weights


@pytest.mark.parametrize("biases, apart", list(itertools.product([False, True], repeat=2)))
def test_layers_inside_attention_stay_whole(biases, apart):
    """Stacked members as each alone; torch's vmap would copy their weights for every token."""
    members = [Attending(biases, apart).double().eval() for _ in range(3)]
    x = torch.randn(4, 5, 8, dtype=torch.float64)
    stacked, _ = stack_module_state(members)
    run = vmap(lambda state, x: functional_call(members[0], state, (x,)), in_dims=(0, None))
    with WholeLinears(), sdpa_kernel(SDPBackend.MATH), torch.no_grad():
        whole = trace(lambda s: list(run(s, x)), stacked)
        found = run(stacked, x)
    linears = [n for n in whole.graph.nodes if n.target is LINEAR]
    assert len(linears) == (8 if apart else 4)
    expected = [torch.stack(each) for each in zip(*(m(x) for m in members), strict=True)]
    torch.testing.assert_close(list(found), expected)


def test_functions_that_a_user_replaced_run_inside_attention(monkeypatch):
    x, layer = torch.randn(4, 5, 8), torch.nn.MultiheadAttention(8, 2, batch_first=True).eval()
    own = F.scaled_dot_product_attention
    monkeypatch.setattr(F, "scaled_dot_product_attention", lambda q, *args, **kwargs: own(-3 * q, *args, **kwargs))
    with WholeLinears():
        found, _ = layer(x, x, x, need_weights=False)
    torch.testing.assert_close(found, layer(x, x, x, need_weights=False)[0])


def test_layers_stay_whole_until_they_are_lowered():
    layer, x = torch.nn.Linear(11, 7), torch.randn(3, 5, 11)
    with WholeLinears():
        whole = trace(lambda x: (torch.func.vmap(layer)(x),), x, aligned=False)
    assert [n.target for n in whole.graph.nodes if n.op == "call_function"].count(LINEAR) == 1
    lowered = trace(whole, x, decompositions=DECOMPOSITIONS)
    assert all(n.target is not LINEAR for n in lowered.graph.nodes)
    torch.testing.assert_close(lowered(x)[0], layer(x))


def test_a_module_may_map_over_something_itself():
    layer, x = torch.nn.Linear(11, 7), torch.randn(3, 5, 2, 11)
    weights = torch.randn(3, 7, 11)
    with WholeLinears():
        each = lambda x, w: torch.func.vmap(lambda row: torch.nn.functional.linear(row, w, layer.bias))(x)
        found = torch.func.vmap(each)(x, weights)
    torch.testing.assert_close(found, torch.einsum("sabk,snk->sabn", x, weights) + layer.bias)


class Windows(nn.Module):
    """Reads the memory of a convolution's output, in the layout that it has outside of a trace."""

    def __init__(self, change, strides):
        super().__init__()
        self.conv, self.drop, self.out = nn.Conv2d(3, 4, 3, padding=1), nn.Dropout(0.3), nn.Linear(64, 2)
        self.change, self.strides = change, strides

    def forward(self, x):
        h = self.change(self.conv(x))
        return self.out(self.drop(torch.as_strided(h, (len(h), 4, 4, 4), self.strides).flatten(1)))


LAYOUTS = {
    "as it comes": (lambda h: h, (256, 64, 16, 2)),
    "contiguous": (lambda h: h.contiguous(), (256, 64, 16, 2)),
    "transposed": (lambda h: h.transpose(1, 3), (256, 2, 16, 64)),
    "channels last": (lambda h: h.to(memory_format=torch.channels_last), (256, 2, 64, 8)),
    "sliced": (lambda h: h[:, 1:], (256, 32, 16, 2)),
}


@pytest.mark.parametrize("compile", [False, pytest.param(True, marks=pytest.mark.thorough)])
@pytest.mark.parametrize("name", LAYOUTS)
def test_memory_that_a_network_reads_itself_has_the_layout_of_a_loop(name, compile):
    """Under vmap a convolution puts the samples beside its channels."""
    torch.manual_seed(0)
    nets, x = [Windows(*LAYOUTS[name]).eval() for _ in range(3)], torch.randn(4, 3, 8, 8)
    loop = torch.stack([net(x).softmax(-1) for net in nets]).mean(0)
    predict = vbdl.Predictor(vbdl.DeepEnsemble(nets), vbdl.Categorical(), compile=compile)
    torch.testing.assert_close(predict(x).probs, loop, rtol=0.0, atol=1e-6)
