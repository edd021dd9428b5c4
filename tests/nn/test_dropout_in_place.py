"""Dropout that writes into its input: what is read of that afterwards has been dropped, as in torch."""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import vbdl

DRAWS = 4000


class Net(nn.Module):
    """A network that drops in one of these forms; b is its last layer."""

    def __init__(self, form: Callable[["Net", Tensor], Tensor], noise: bool = False):
        super().__init__()
        self.a, self.b = nn.Linear(6, 8), nn.Linear(8, 3)
        self.dropout, self.again = nn.Dropout(0.5, inplace=True), nn.Dropout(0.2)
        self.alpha, self.form, self.noise = nn.AlphaDropout(0.5, inplace=True), form, noise

    def forward(self, x: Tensor) -> Tensor:
        y = self.form(self, self.a(x))
        return y * (1 + 0.1 * torch.randn(3)) if self.noise else y


def ignored(net: Net, y: Tensor) -> Tensor:
    net.dropout(y)
    return net.b(y)


def ignored_function(net: Net, y: Tensor) -> Tensor:
    F.dropout(y, 0.5, True, inplace=True)
    return net.b(y)


def ignored_operator(net: Net, y: Tensor) -> Tensor:
    torch.dropout_(y, 0.5, True)
    return net.b(y)


def ignored_twice(net: Net, y: Tensor) -> Tensor:
    net.dropout(y)
    net.dropout(y)
    return net.b(net.again(y))


def ignored_alpha(net: Net, y: Tensor) -> Tensor:
    torch.alpha_dropout_(y, 0.5, True)
    return net.b(y)


def skipped(net: Net, y: Tensor) -> Tensor:
    dropped = net.dropout(y)
    return net.b(dropped) + y[:, :3]


def in_a_list(net: Net, y: Tensor) -> Tensor:
    net.dropout(y)
    return net.b(torch.stack([y, y]).mean(0))


def channels(net: Net, y: Tensor) -> Tensor:
    images = y.view(-1, 2, 2, 2).clone()
    F.dropout2d(images, 0.5, True, inplace=True)
    return net.b(images.flatten(1))


def flattened(net: Net, y: Tensor) -> Tensor:
    y = y.view(-1, 2, 4).flatten(1)
    net.dropout(y)
    return net.b(y)


def gated(net: Net, y: Tensor) -> Tensor:
    value, gate = y.chunk(2, -1)
    value = net.dropout(value)
    return net.b(torch.cat([value * gate.sigmoid(), gate], -1))


def in_two_parts(net: Net, y: Tensor) -> Tensor:
    return net.b(torch.cat([net.dropout(y[:, :3]), net.dropout(y[:, 3:])], -1))


def shaped(net: Net, y: Tensor) -> Tensor:
    return net.b(net.dropout(y.view(-1, 2, 4).flatten(1)).view(y.shape))


def returned(net: Net, y: Tensor) -> Tensor:
    y = net.b(y)
    net.dropout(y)
    return y


def used(net: Net, y: Tensor) -> Tensor:
    return net.b(net.dropout(y))


FORMS = [
    ignored, ignored_function, ignored_operator, ignored_twice, ignored_alpha, skipped, in_a_list, channels, flattened,
    returned, used, gated, in_two_parts, shaped,
]  # fmt: skip


def moments(net: nn.Module, x: Tensor) -> tuple[Tensor, Tensor]:
    """The mean and variance of the outputs over passes of torch's own."""
    torch.manual_seed(1)
    with torch.no_grad():
        outputs = torch.stack([net(x) for _ in range(DRAWS)])
    return outputs.mean(0), outputs.var(0)


def draws(predict: vbdl.Predictor, x: Tensor) -> Tensor:
    """The outputs of each draw, (draws, rows, outputs)."""
    samples = predict(x, samples=True).samples
    assert samples is not None
    return samples[..., 0]


def check(found: Tensor, expected: tuple[Tensor, Tensor]) -> None:
    mean, variance = expected
    error = (variance * 2 / DRAWS).sqrt()
    assert float(((found.mean(0) - mean) / error).square().mean()) < 6
    torch.testing.assert_close(found.var(0), variance, rtol=0.25, atol=0.0)


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("form", FORMS, ids=lambda form: form.__name__)
def test_what_is_read_afterwards_is_dropped(form, compiled):
    torch.manual_seed(0)
    net, x = Net(form), torch.randn(3, 6)
    predict = vbdl.Predictor(vbdl.MCDropout(net), vbdl.Gaussian(3), n_samples=DRAWS, compile=compiled)
    check(draws(predict, x), moments(net, x))
    assert "stacked" in predict.explain()


@pytest.mark.parametrize("form", FORMS, ids=lambda form: form.__name__)
def test_networks_that_draw_besides_drop_in_place(form):
    torch.manual_seed(0)
    net, x = Net(form, noise=True), torch.randn(3, 6)
    q = vbdl.Stochastic(net, noisy=[nn.Dropout])
    check(draws(vbdl.Predictor(q, vbdl.Gaussian(3), DRAWS, compile=False), x), moments(net, x))


@pytest.mark.parametrize("form", [ignored, skipped, returned], ids=lambda form: form.__name__)
def test_training_drops_in_place(form):
    """With all units dropped, layers before get no gradient."""
    torch.manual_seed(0)
    net, x = Net(form), torch.randn(32, 6)
    net.dropout.p = 1.0
    before = {n: p.clone() for n, p in net.named_parameters()}
    q = vbdl.MCDropout(net)
    vbdl.fit(q, (x, torch.randn(32, 3)), vbdl.Gaussian(3), epochs=2, weight_decay=0.0, progress=False)
    after = dict(q.module.inner.named_parameters())
    assert torch.equal(after["a.weight"], before["a.weight"])
    assert torch.equal(after["b.bias"], before["b.bias"]) == (form is returned)


def test_a_view_that_is_read_afterwards_is_refused():
    def viewed(net: Net, y: Tensor) -> Tensor:
        F.dropout(y[:, :4], 0.5, True, inplace=True)
        return net.b(y)

    predict = vbdl.Predictor(vbdl.MCDropout(Net(viewed)), vbdl.Gaussian(3), compile=False)
    with pytest.raises(ValueError, match="go on with the tensor that dropout returns"):
        predict(torch.randn(3, 6))
