"""Forward-mode products through every operator of vbdl: a right tangent or an error, never a lost one."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.func import functional_call, jvp, vmap
from vbdl_kernels import (
    bayesian_mlp,
    ensemble_mlp,
    keep_mask,
    local_reparameterized_linear,
    make_key,
    masked_linear,
    normal,
    predictive_statistics,
    sample_weights,
    sampled_linear,
    words,
)
from vbdl_kernels.sample_weights import _SampleWeightsGradient
from vbdl_kernels.sampled_linear import _InputGradient, _ParameterGradient

from vbdl.compiling.rewrite.linear import WholeLinears
from vbdl.engine.predictor import Predictor
from vbdl.likelihoods.categorical import Categorical
from vbdl.nn.embedding import padding_rows
from vbdl.nn.gaussian import Diagonal, GaussianNetwork
from vbdl.nn.gaussian.operators import dense_noise, kronecker_noise, low_rank_noise
from vbdl.nn.objective import KeyedPosterior
from vbdl.nn.recurrent import WholeLayers

KEY = make_key(7, [3, 5])


def draw(*shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)), dtype=torch.float64)


X, W, B = draw(2, 3, 5), draw(4, 5), draw(4)
STD = W.abs()


def linear(x, w, b):
    with WholeLinears():
        return F.linear(x, w, b)


def recurrent(kind, biases=True, both=False, packed=False, projected=False):
    """A layer of 5 inputs and 3 units, or 2 projected ones, on 2 rows of 4 steps, or packed of 4 and 2 steps."""
    gates = {"lstm": 4, "gru": 3}.get(kind, 1)
    size, directions = (2 if projected else 3), (2 if both else 1)
    weights = [(gates * 3, 5), (gates * 3, size), *[(gates * 3,)] * (2 * biases), *[(2, 3)] * projected]
    shapes = [(6, 5) if packed else (2, 4, 5), (directions, 2, size), *weights * directions]

    def run(x, h, *weights):
        c = 0.3 * F.pad(h, (0, 3 - size), value=0.5)
        states = (h, c) if kind == "lstm" else h
        sizes, order = ((torch.tensor([2, 2, 1, 1]),), ()) if packed else ((), (True,))
        with WholeLayers():
            outputs = getattr(torch, kind)(x, *sizes, states, list(weights), biases, 1, 0.0, False, both, *order)
        return torch.cat([t.flatten() for t in outputs])

    return run, tuple(draw(*shape) for shape in shapes)


def recurrent_tangent(x, *tensors):
    """The tangent of a layer: differentiated once more, it is a forward-mode product in another."""
    run, _ = recurrent("gru")
    return jvp(lambda *t: run(x, *t), tensors, tuple(t.cos() for t in tensors))[1]


# operator -> a function of tensors that are differentiated, which calls it, and the tensors
OPERATORS = {
    "stacked_linear": (linear, (X, W, B)),
    "recurrent_layer": recurrent("gru"),
    "recurrent_layer of an LSTM": recurrent("lstm"),
    "recurrent_layer of an RNN": recurrent("rnn_tanh"),
    "recurrent_layer of a rectified RNN": recurrent("rnn_relu", biases=False),
    "recurrent_layer of both directions": recurrent("gru", both=True),
    "recurrent_layer of an LSTM without biases": recurrent("lstm", biases=False, both=True),
    "recurrent_layer with a projection": recurrent("lstm", projected=True),
    "recurrent_layer of a packed sequence": recurrent("gru", packed=True),
    "recurrent_layer of a packed sequence in both directions": recurrent("lstm", packed=True, both=True),
    "recurrent_tangent": (recurrent_tangent, recurrent("gru")[1]),
    "kronecker_noise": (lambda g, a, s: kronecker_noise(g, a, s, KEY, 1), (draw(4, 4), draw(5, 5), W)),
    "dense_noise": (lambda v, s: dense_noise(v, s, KEY, 1), (draw(4, 4), B)),
    "low_rank_noise": (lambda d: low_rank_noise(d, KEY, 1), (W,)),
    "normal": (lambda s: s * normal(KEY, 1, 0, 4, 5), (W,)),
    "words": (lambda s: s * words(KEY, 1, 0, 4, 5), (W,)),
    "keep": (lambda s: s * keep_mask(KEY, 1, 4, 5, 0.3), (W,)),
    "sample_weights": (lambda m, s: sample_weights(m, s, KEY, 1), (W, STD)),
    "sample_weights_gradient": (lambda g: _SampleWeightsGradient.apply(g, KEY, 1, 0)[0], (draw(2, 4, 5),)),
    "sampled_linear": (lambda x, m, s, b: sampled_linear(x, m, s, KEY, 1, b), (X, W, STD, B)),
    "sampled_linear_input": (lambda g, m, s: _InputGradient.apply(g, m, s, KEY, 1, ""), (draw(2, 3, 4), W, STD)),
    "sampled_linear_parameters": (lambda g, x: _ParameterGradient.apply(g, x, KEY, 1, "")[0], (draw(2, 3, 4), X)),
    "local_reparameterized_linear": (lambda x, m, s: local_reparameterized_linear(x, m, s, KEY, 1), (X, W, STD)),
    "masked_linear": (lambda x, w, b: masked_linear(x, w, KEY, 1, 0.4, b), (X, W, B)),
    "bayesian_mlp": (
        lambda x, *p: bayesian_mlp(x, p[:2], p[2:4], p[4:6], p[6:], KEY, [1, 8], "tanh"),
        (X, W, draw(2, 4), STD, draw(2, 4).abs(), B, draw(2), B.abs(), draw(2).abs()),
    ),
    "ensemble_mlp": (
        lambda x, *p: ensemble_mlp(x, list(p[:2]), list(p[2:]), "silu"),
        (X, draw(2, 4, 5), draw(2, 2, 4), draw(2, 4), draw(2, 2)),
    ),
    "predictive_statistics": (lambda x: predictive_statistics(x)[0], (draw(3, 4, 5),)),
}


def test_every_operator_is_tried():
    registered = {n.partition("::")[2] for n in torch._C._dispatch_get_all_op_names() if n.startswith("vbdl::")}
    in_finished_graphs = {"product"}  # put into graphs that are differentiated already, or compiled
    assert registered - in_finished_graphs == {name.split()[0] for name in OPERATORS}


@pytest.mark.parametrize("mapped", [False, True])
@pytest.mark.parametrize("name", OPERATORS)
def test_a_tangent_is_right_or_refused(name, mapped):
    """Each argument alone, against central differences; mapped: over tangents, as draws of a linearized network are."""
    f, tensors = OPERATORS[name]
    for i, t in enumerate(tensors):
        at = lambda v, i=i: f(*tensors[:i], v, *tensors[i + 1 :])
        directions = torch.stack([draw(*t.shape), t])
        push = lambda d, at=at, t=t: jvp(at, (t,), (d,))[1]
        try:
            found = vmap(push)(directions) if mapped else torch.stack([push(d) for d in directions])
        except (RuntimeError, NotImplementedError):
            assert name.split()[0] not in ("stacked_linear", "recurrent_layer")
            continue
        step = 1e-6
        expected = torch.stack([(at(t + step * d) - at(t - step * d)) / (2 * step) for d in directions])
        torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-7)


def test_linear_layers_in_a_vmap_of_the_network_keep_their_tangents():
    """The map is inside the forward-mode product, where the operator could not tell that there is one."""
    push = lambda: jvp(lambda w: vmap(lambda x: F.linear(x, w))(X), (W,), (STD,))[1]
    with WholeLinears():
        torch.testing.assert_close(push(), X @ STD.mT)
    forward_mode = torch.autograd.forward_ad
    with WholeLinears(), forward_mode.dual_level():  # a network that uses dual numbers itself
        y = F.linear(forward_mode.make_dual(X, X), W)
        torch.testing.assert_close(forward_mode.unpack_dual(y).tangent, X @ W.mT)


class Transformer(nn.Module):
    """torch's own layers, with layer normalization before and after."""

    def __init__(self):
        super().__init__()
        self.embed, self.norm, self.head = nn.Linear(4, 8), nn.LayerNorm(8), nn.Linear(8, 3)
        self.layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True, norm_first=True, activation="gelu")

    def forward(self, x):
        return self.head(self.norm(self.layer(self.embed(x.unflatten(1, (5, 4))))).mean(1))


class Convolutional(nn.Module):
    """Groups, in-place activations, a residual, all kinds of normalization and pooling."""

    def __init__(self):
        super().__init__()
        self.a, self.batch = nn.Conv2d(1, 4, 3, padding=1), nn.BatchNorm2d(4)
        self.b, self.group = nn.Conv2d(4, 4, 3, padding=1, groups=2), nn.GroupNorm(2, 4)
        self.c, self.head = nn.ConvTranspose2d(4, 4, 2), nn.Linear(4, 3)

    def forward(self, x):
        x = torch.relu_(self.batch(self.a(x.view(-1, 1, 4, 5))))
        x = F.max_pool2d(F.silu(self.group(self.b(x))) + x, 2)
        return self.head(F.adaptive_avg_pool2d(self.c(x), 1).flatten(1))


class Attention(nn.Module):
    """Fused attention, and a layer that is called twice."""

    def __init__(self):
        super().__init__()
        self.qkv, self.head = nn.Linear(4, 24), nn.Linear(8, 3)

    def forward(self, x):
        q, k, v = self.qkv(x.unflatten(1, (5, 4))).unsqueeze(1).chunk(3, -1)
        return self.head(F.scaled_dot_product_attention(q, k, v).mean((1, 2))).tanh() + self.head(x[:, :8])


class Memory(nn.Module):
    """Recurrent layers in both directions, of which the second reads the first."""

    def __init__(self):
        super().__init__()
        self.steps, self.head = nn.LSTM(4, 5, 2, bidirectional=True, batch_first=True), nn.Linear(10, 3)

    def forward(self, x):
        return self.head(self.steps(x.unflatten(1, (5, 4)))[0][:, -1])


class Recurrent(nn.Module):
    """A table with a padding row, and a recurrent layer."""

    def __init__(self):
        super().__init__()
        self.table, self.steps, self.head = nn.Embedding(11, 6, padding_idx=0), nn.GRU(6, 5), nn.Linear(5, 3)

    def forward(self, x):
        return self.head(self.steps(self.table(x[:, :4].long().T % 11))[0][-1])


class Posterior(KeyedPosterior):
    def __init__(self, network):
        super().__init__()
        self.module, self.seed = network, 0
        self.register_buffer("steps", torch.zeros((), dtype=torch.int64))


@pytest.mark.parametrize("make", [Transformer, Convolutional, Attention, Recurrent, Memory])
def test_predictions_of_a_linearized_network_are_its_taylor_expansion(make):
    """Each draw against central differences at the mean, in float64."""
    torch.manual_seed(0)
    net, x = make().double().eval(), draw(6, 20) * 3
    own = dict(net.named_parameters())
    factors = [Diagonal({n: p}, padding_rows(net)) for n, p in own.items()]
    q = Posterior(GaussianNetwork(net, factors, linearized=True)).eval()
    found = Predictor(q, Categorical(), 3, tiles=(64,), compile=False, joint=True)(x, samples=True).samples
    step = 1e-6
    with torch.no_grad():
        for s in range(3):
            q.module.key.copy_(make_key(0, [s])[0])
            deviations = q.module.deviations()
            at = lambda h, d=deviations: functional_call(net, {n: p + h * d[n] for n, p in own.items()}, (x,))
            torch.testing.assert_close(found[s], at(0) + (at(step) - at(-step)) / (2 * step), rtol=1e-6, atol=1e-6)
