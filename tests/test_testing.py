"""`vbdl.testing`: what keeps the contract passes, and each way to break it is found and said."""

import copy
import importlib.util
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor
from vbdl_kernels import make_key, normal

import vbdl
from vbdl.testing import check_likelihood, check_posterior
from vbdl.types import Posterior

spec = importlib.util.spec_from_file_location("own_for_testing", Path(__file__).with_name("test_own_methods.py"))
own = sys.modules["own_for_testing"] = importlib.util.module_from_spec(spec)
spec.loader.exec_module(own)


@pytest.mark.parametrize("likelihood", own.LIKELIHOODS)
@pytest.mark.parametrize("posterior", own.OWN)
def test_methods_that_keep_the_contract_pass(posterior, likelihood):
    x, y = own.rows()
    check_posterior(own.OWN[posterior](own.network()), own.LIKELIHOODS[likelihood](), x, y, compile=False)


VBDL = {
    "mean-field": lambda net: vbdl.MeanField(net, n_data=own.N),
    "dropout": lambda net: vbdl.MCDropout(torch.nn.Sequential(torch.nn.Dropout(0.2), net)),
    "ensemble": lambda net: vbdl.DeepEnsemble(net, 3),
    "snapshots": lambda net: vbdl.Snapshots(net, 3),
    "swag": lambda net: vbdl.SWAG(net),
}


@pytest.mark.parametrize("method", VBDL)
def test_those_of_vbdl_pass(method):
    x, y = own.rows()
    check_posterior(VBDL[method](own.network()), vbdl.Gaussian(2), x, y, compile=False)


class Good(Posterior):
    """Weights with noise of one size."""

    def __init__(self, network):
        super().__init__()
        self.module = copy.deepcopy(network)

    def noise(self, numbers, seed, i, p):
        return normal(make_key(seed, numbers), i, 0, 1, p.numel()).view(-1, *p.shape)

    def draws(self, numbers, seed):
        parameters = self.module.named_parameters()
        return {n: p + 0.1 * self.noise(numbers, seed, i, p) for i, (n, p) in enumerate(parameters)}

    def losses(self, x, y, likelihood, own_rows=False):
        return likelihood.training_loss(likelihood(self.module(x)), y).mean().reshape(1)


class TorchsGenerator(Good):
    def noise(self, numbers, seed, i, p):
        return torch.randn(len(numbers), *p.shape)


class NoSeed(Good):
    def noise(self, numbers, seed, i, p):
        return super().noise(numbers, 0, i, p)


class OneDraw(Good):
    def noise(self, numbers, seed, i, p):
        return super().noise(numbers * 0, seed, i, p)


class ByPlace(Good):
    def noise(self, numbers, seed, i, p):
        return super().noise(torch.arange(len(numbers)), seed, i, p)


class OtherNames(Good):
    def draws(self, numbers, seed):
        return {f"module.{n}": t for n, t in super().draws(numbers, seed).items()}


class NotStacked(Good):
    def draws(self, numbers, seed):
        return {n: t[:1] for n, t in super().draws(numbers, seed).items()}


class NoMember(Good):
    def losses(self, x, y, likelihood, own_rows=False):
        return super().losses(x, y, likelihood).sum()


class Detached(Good):
    def losses(self, x, y, likelihood, own_rows=False):
        return super().losses(x, y, likelihood).detach()


class Unused(Good):
    def __init__(self, network):
        super().__init__(network)
        self.spare = torch.nn.Parameter(torch.zeros(()))


class Flat(Good):
    def losses(self, x, y, likelihood, own_rows=False):
        return 0 * super().losses(x, y, likelihood) + 1


class Learned(Good):
    """What training found is in an attribute, which no state dict holds."""

    scale = 0.0

    def after_epoch(self, epoch):
        self.scale += 0.1

    def draws(self, numbers, seed):
        return {n: (1 + self.scale) * t for n, t in super().draws(numbers, seed).items()}


BROKEN = {
    TorchsGenerator: "use torch's generator",
    NoSeed: "ignore the seed",
    OneDraw: "all draws of OneDraw are the same|ignore the seed",
    ByPlace: "alone than with others",
    OtherNames: "no parameter or buffer of q.module",
    NotStacked: "stack the draws on the first axis",
    NoMember: "one loss for each member",
    Detached: "have no gradient",
    Unused: "does not depend on spare",
    Flat: "did not lower the loss of Flat",
    Learned: "keep everything that training changes in parameters and buffers",
}


def test_the_good_one_passes():
    x, y = own.rows()
    check_posterior(Good(own.network()), vbdl.Gaussian(2), x, y, compile=False)


@pytest.mark.parametrize("cls", BROKEN)
def test_what_breaks_the_contract_is_said(cls):
    x, y = own.rows()
    with pytest.raises(AssertionError, match=BROKEN[cls]):
        check_posterior(cls(own.network()), vbdl.Gaussian(2, learned=False), x, y, compile=False, epochs=3)


class Noise(own.LaplaceNoise):
    """Keeps the contract."""


class WrongMerge(Noise):
    def merge(self, a, b):
        return {name: a[name] + b[name] for name in a}


class Unordered(Noise):
    def merge(self, a, b):
        return dict(reversed(super().merge(a, b).items()))


class DoesNotAddUp(Noise):
    def finish(self, summary):
        fields = super().finish(summary)
        return {**fields, "total": 2 * fields["total"]}


class NotSummed(Noise):
    def nll(self, parameters: Tensor, y: Tensor) -> Tensor:
        mean, log_scale = parameters.unbind(-1)
        return (y - mean).abs() * (-log_scale).exp() + log_scale


class Untrained(Noise):
    def nll(self, parameters: Tensor, y: Tensor) -> Tensor:
        return super().nll(torch.stack((parameters[..., 0], torch.zeros_like(parameters[..., 1])), -1), y)


class OtherShape(Noise):
    def prediction(self, fields, n_samples, samples=None):
        class Flat(own.LaplacePrediction):
            parameters_shape = property(lambda self: tuple(self.mean.shape))

        return Flat(**fields, n_samples=n_samples, samples=samples)


WRONG = {
    WrongMerge: "depends on how draws are divided",
    Unordered: "the same names in the same order",
    DoesNotAddUp: "not aleatoric \\+ epistemic",
    NotSummed: "sum over all axes but the batch",
    Untrained: "does not depend on its parameter 'log_scale'",
    OtherShape: "define the property parameters_shape",
}
OUTPUTS = torch.randn(6, 10, 2, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("make", [lambda: Noise(2), lambda: vbdl.Gaussian(2), lambda: vbdl.Bernoulli()])
def test_likelihoods_that_keep_the_contract_pass(make):
    y = torch.randint(2, (10, 2)).float()
    check_likelihood(make(), OUTPUTS, y)


@pytest.mark.parametrize("cls", WRONG)
def test_what_breaks_the_contract_of_likelihoods_is_said(cls):
    with pytest.raises(AssertionError, match=WRONG[cls]):
        check_likelihood(cls(2), OUTPUTS, torch.randn(10, 2))
