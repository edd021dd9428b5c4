"""What vision networks do beside their layers: auxiliary heads, synchronized normalization, memory formats."""

from collections import namedtuple

import pytest
import torch
from torch import nn

import vbdl

ROWS, CLASSES = 16, 3
Outputs = namedtuple("Outputs", ["logits", "auxiliary"])


class WithAuxiliaryHead(nn.Module):
    """Returns the logits of a second head in training only, as torchvision's Inception and GoogLeNet do."""

    def __init__(self):
        super().__init__()
        self.body, self.norm, self.drop = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Dropout(0.2)
        self.auxiliary, self.head = nn.Linear(8, CLASSES), nn.Linear(8, CLASSES)

    def forward(self, x):
        h = self.norm(self.body(x)).relu().mean((2, 3))
        auxiliary = self.auxiliary(h) if self.training else None
        logits = self.head(self.drop(h))
        return Outputs(logits, auxiliary) if self.training else logits


def plain(normalization=nn.BatchNorm2d):
    return nn.Sequential(
        nn.Conv2d(3, 8, 3),
        normalization(8),
        nn.ReLU(),
        nn.Conv2d(8, 8, 3),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Dropout(0.2),
        nn.Linear(8, CLASSES),
    )


METHODS = {
    "MC dropout": lambda networks: vbdl.MCDropout(networks[0]),
    "mean-field": lambda networks: vbdl.MeanField(networks[0], ROWS),
    "ensemble": lambda networks: vbdl.DeepEnsemble(networks),
}
every_method = pytest.mark.parametrize("method", METHODS)


@pytest.fixture
def data():
    generator = torch.Generator().manual_seed(0)
    return torch.randn(ROWS, 3, 8, 8, generator=generator), torch.randint(CLASSES, (ROWS,), generator=generator)


def networks(make):
    pair = []
    for seed in range(2):
        torch.manual_seed(seed)
        pair.append(make())
    return pair


def trained(method, pair, data, **options):
    q, likelihood = METHODS[method](pair), vbdl.Categorical()
    vbdl.fit(q, data, likelihood, epochs=2, batch_size=8, compile=False, **options)
    n_samples = None if method == "ensemble" else 2
    return vbdl.Predictor(q, likelihood, n_samples, compile=False, joint=True)


@every_method
def test_an_auxiliary_head_in_training_is_left_out_of_the_prediction(method, data):
    predictor = trained(method, networks(WithAuxiliaryHead), data)
    samples = predictor(data[0], samples=True).samples
    assert samples.shape == (2, ROWS, CLASSES)
    if method == "ensemble":
        for number, network in enumerate(networks(WithAuxiliaryHead)):
            network.load_state_dict(predictor.posterior.member(number))
            with torch.no_grad():
                torch.testing.assert_close(samples[number], network.eval()(data[0]), rtol=0, atol=1e-5)


@every_method
def test_synchronized_normalization_is_batch_normalization_on_one_device(method, data):
    samples = [
        trained(method, networks(lambda norm=norm: plain(norm)), data)(data[0], samples=True).samples
        for norm in (nn.BatchNorm2d, nn.SyncBatchNorm)
    ]
    assert torch.equal(*samples)


@every_method
def test_memory_formats_of_inputs_and_weights_change_no_number(method, data):
    x, y = data
    last = x.to(memory_format=torch.channels_last)
    sgd = lambda ps: torch.optim.SGD(ps, lr=0.01)  # noqa: E731  (Adam's first steps follow the sign of rounding errors)
    expected = trained(method, networks(plain), (x, y), optimizer=sgd)(x, samples=True).samples
    for weights, rows in ((torch.channels_last, x), (torch.contiguous_format, last), (torch.channels_last, last)):
        pair = [network.to(memory_format=weights) for network in networks(plain)]
        predictor = trained(method, pair, (rows, y), optimizer=sgd)
        for batch in (x, last):
            torch.testing.assert_close(predictor(batch, samples=True).samples, expected, rtol=1e-4, atol=1e-5)


def test_a_compiled_step_gives_gradients_in_the_layout_of_the_weights(data, traced_only):
    """The fused optimizer reads gradients in memory order: other layouts would be another gradient."""
    weights = []
    for compiled in (False, True):
        q = vbdl.MCDropout(networks(plain)[0].to(memory_format=torch.channels_last))
        vbdl.fit(q, data, vbdl.Categorical(), epochs=2, batch_size=ROWS, compile=compiled)
        weights.append(q.module.inner[0].weight.detach())
    torch.testing.assert_close(*weights, rtol=0, atol=1e-4)  # far below a step of 1e-3 in the wrong direction


def test_a_compiled_call_takes_either_memory_format(data):
    """A whole tile goes straight to the compiled call, which was made for contiguous rows."""
    network = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Dropout(0.2), nn.Linear(144, CLASSES))
    q = vbdl.MCDropout(network.eval())
    predictor = vbdl.Predictor(q, vbdl.Categorical(), 2, tiles=ROWS)
    expected = predictor(data[0]).probs
    for _ in range(2):
        torch.testing.assert_close(predictor(data[0]).probs, expected, rtol=0, atol=1e-6)
        last = data[0].to(memory_format=torch.channels_last)
        torch.testing.assert_close(predictor(last).probs, expected, rtol=0, atol=1e-6)
