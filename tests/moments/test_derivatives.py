"""A network with one hidden layer, linear in its weights, by moments: the variance J C J^T of its output is exact."""

import pytest
import torch
from torch import nn
from torch.func import functional_call, jacrev

import vbdl

ACTIVATIONS = {
    name: getattr(nn, name)
    for name in "ReLU Tanh Sigmoid GELU SiLU ELU LeakyReLU Hardtanh Softplus Hardswish Hardsigmoid Mish ReLU6".split()
}


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_the_variance_of_a_linearized_network_is_exact(name):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(6, 16), ACTIVATIONS[name](), nn.Linear(16, 1)).double()
    x, y = torch.randn(40, 6).double(), torch.randn(40, 1).double()
    q, likelihood = vbdl.Laplace(net, parameters="all", structure="diagonal", prior_precision=1.0), vbdl.Gaussian()
    vbdl.fit(q, (x, y), likelihood.double(), epochs=0, progress=False)
    p = vbdl.Predictor(q, likelihood, estimator="moments", compile=False)(x[:7])
    weights = {n: w.detach() for n, w in q.user_network.named_parameters()}
    jacobian = jacrev(lambda w: functional_call(net, w, (x[:7],))[:, 0])(weights)
    variance = sum((jacobian[n].square() * v).flatten(1).sum(1) for n, v in q.module.variances().items())
    # 1e-6: the float32 points that the likelihood averages over have the variance 1 to rounding
    torch.testing.assert_close(p.epistemic[:, 0].double(), variance.detach(), rtol=1e-5, atol=1e-7)


def test_a_derivative_at_a_random_point_is_refused():
    net = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Dropout(0.5), nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 1))

    class Gradient(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = net

        def forward(self, x):
            return torch.ops.aten.threshold_backward(self.net(x), self.net[:4](x).sum(-1, keepdim=True), 0.0)

    predict = vbdl.Predictor(vbdl.MCDropout(Gradient()), vbdl.Gaussian(), estimator="moments", compile=False)
    with pytest.raises(ValueError, match="at a random point"):
        predict(torch.randn(5, 3))
