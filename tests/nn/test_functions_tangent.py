"""Linearized networks of all layers of torch, some of them frozen, are traced and mapped, and are torch's own."""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.func import jacrev, jvp, vmap
from vbdl_kernels.philox import make_key

import vbdl
from vbdl.nn.functions_tangent import TraceableTangents

WIDTH = 8
VECTORS: dict[str, Callable[[], nn.Module]] = {
    **{
        name: getattr(nn, name)
        for name in (
            "GELU", "ELU", "SELU", "CELU", "SiLU", "Mish", "Softplus", "Softsign", "Tanh", "Sigmoid", "Hardtanh",
            "ReLU", "Hardswish", "Hardsigmoid", "ReLU6", "LeakyReLU", "PReLU", "LogSigmoid", "Tanhshrink", "Softshrink",
            "Hardshrink", "Identity",
        )
    },
    "GELU of tanh": lambda: nn.GELU("tanh"),
    "Threshold": lambda: nn.Threshold(0.1, 0.0),
    "Softmax": lambda: nn.Softmax(-1),
    "Softmin": lambda: nn.Softmin(-1),
    "LogSoftmax": lambda: nn.LogSoftmax(-1),
    "GLU": lambda: nn.Sequential(nn.Linear(WIDTH, 2 * WIDTH), nn.GLU()),
    "LayerNorm": lambda: nn.LayerNorm(WIDTH),
    "LayerNorm without shift": lambda: nn.LayerNorm(WIDTH, bias=False),
    "RMSNorm": lambda: nn.RMSNorm(WIDTH),
    "GroupNorm": lambda: nn.GroupNorm(2, WIDTH),
    "BatchNorm1d": lambda: nn.BatchNorm1d(WIDTH),
    "normalize": lambda: Of(F.normalize),
    "Linear": lambda: nn.Linear(WIDTH, WIDTH),
}  # fmt: skip
IMAGES: dict[str, Callable[[], nn.Module]] = {
    "Conv2d": lambda: nn.Conv2d(WIDTH, WIDTH, 3, padding=1),
    "ConvTranspose2d": lambda: nn.ConvTranspose2d(WIDTH, WIDTH, 3),
    "BatchNorm2d": lambda: nn.BatchNorm2d(WIDTH),
    "GroupNorm": lambda: nn.GroupNorm(4, WIDTH),
    "InstanceNorm2d": lambda: nn.InstanceNorm2d(WIDTH, affine=True),
    "LayerNorm": lambda: nn.LayerNorm([WIDTH, 6, 6]),
    "AvgPool2d": lambda: nn.AvgPool2d(2),
    "MaxPool2d": lambda: nn.MaxPool2d(2),
    "AdaptiveAvgPool2d": lambda: nn.AdaptiveAvgPool2d(3),
    "Upsample": lambda: nn.Upsample(scale_factor=2, mode="bilinear"),
    "PixelShuffle": lambda: nn.PixelShuffle(2),
    "Mish": nn.Mish,
}


class Of(nn.Module):
    def __init__(self, function: Callable):
        super().__init__()
        self.function = function

    def forward(self, x):
        return self.function(x)


def vectors(layer: nn.Module) -> tuple[nn.Module, torch.Tensor]:
    """A network with this layer inside, and rows for it."""
    return nn.Sequential(nn.Linear(5, WIDTH), layer, nn.Linear(WIDTH, 3)).eval(), torch.randn(6, 5)


def images(layer: nn.Module) -> tuple[nn.Module, torch.Tensor]:
    head = [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.LazyLinear(3)]
    net, x = nn.Sequential(nn.Conv2d(2, WIDTH, 3, padding=1), layer, *head).eval(), torch.randn(4, 2, 6, 6)
    net(x)  # for the lazy layer
    return net, x


LAYERS = [(f"vector, {n}", vectors, make) for n, make in VECTORS.items()]
LAYERS += [(f"image, {n}", images, make) for n, make in IMAGES.items()]
CASES = [(*layer, False) for layer in LAYERS]
CASES += [(f"{n}, frozen", build, make, True) for n, build, make in LAYERS if list(make().parameters())]


@pytest.mark.parametrize("build, make, frozen", [case[1:] for case in CASES], ids=[case[0] for case in CASES])
def test_linearized_networks_are_traced_and_mapped(build, make, frozen):
    torch.manual_seed(0)
    layer = make()
    if frozen:
        layer.requires_grad_(False)
    for p in layer.parameters():
        p.data.add_(0.1 * torch.randn_like(p))
    net, x = build(layer)
    q = vbdl.Laplace(net, parameters="all", structure="diagonal", prior_precision=10.0)
    vbdl.fit(q, (x, torch.randint(0, 3, (len(x),))), vbdl.Categorical(), epochs=0, progress=False)
    predict = vbdl.Predictor(q, vbdl.Categorical(), n_samples=3, compile=False, tiles=(len(x),), joint=True)
    found = predict(x, samples=True).samples
    assert "strategy       stacked" in predict.explain()
    state = {n: p.detach() for n, p in net.named_parameters()}
    for number, outputs in enumerate(found):
        drawn = predict.posterior.module
        drawn.key.copy_(make_key(0, [number])[0])
        moved = {n: state[n] + d for n, d in drawn.deviations().items()}
        assert moved.keys() == {n for n, p in net.named_parameters() if p.requires_grad}
        f = lambda w: torch.func.functional_call(net, {**state, **w}, (x,))
        at_mean, tangent = jvp(f, ({n: state[n] for n in moved},), ({n: moved[n] - state[n] for n in moved},))
        torch.testing.assert_close(outputs, at_mean + tangent, rtol=1e-4, atol=1e-5)


NORMALIZATIONS = {
    "layer": lambda x, w, b: F.layer_norm(x, (6,), w, b),
    "layer, by name": lambda x, w, b: F.layer_norm(input=x, normalized_shape=(6,), weight=w, bias=b),
    "group": lambda x, w, b: F.group_norm(x, 3, w, b),
    "instance": lambda x, w, b: F.instance_norm(x, None, None, w, b),
    "batch": lambda x, w, b: F.batch_norm(x, torch.zeros(6), torch.ones(6), w, b),
}


@pytest.mark.parametrize("moving", ["x", "xw", "xb", "w", "b", "wb", "xwb", ""])
@pytest.mark.parametrize("given", ["wb", "w", "b", ""])
@pytest.mark.parametrize("name", NORMALIZATIONS)
def test_normalizations_are_torchs_own(name, given, moving):
    values = {"x": torch.randn(2, 6, 6), "w": torch.randn(6), "b": torch.randn(6)}
    names = [n for n in moving if n in "x" + given]
    tangents = {n: torch.randn(3, *values[n].shape) for n in names}

    def outputs(moved):
        now = {**values, **moved}
        return NORMALIZATIONS[name](now["x"], *(now[n] if n in given else None for n in "wb"))

    def pushed(tangent):
        if not names:
            return outputs({}), torch.zeros(())
        return jvp(outputs, ({n: values[n] for n in names},), (tangent,))

    expected = [pushed({n: t[i] for n, t in tangents.items()}) for i in range(3)]
    with TraceableTangents():
        found = [pushed({n: t[i] for n, t in tangents.items()}) for i in range(3)]
        mapped = vmap(pushed)(tangents) if names else None
    for i in range(3):
        torch.testing.assert_close(found[i], expected[i], rtol=1e-4, atol=1e-5)
        if mapped is not None:
            torch.testing.assert_close((mapped[0][i], mapped[1][i]), expected[i], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("shape, dim", [((5, 4), 0), ((5, 4), 1), ((5, 4), -1), ((3, 2, 4, 4), 0), ((3, 2, 4, 4), 1)])
@pytest.mark.parametrize("moving", ["v", "g", "vg"])
def test_weight_normalization_has_the_tangent_of_its_jacobian(shape, dim, moving):
    values = {"v": torch.randn(shape)}
    values["g"] = 1 + torch.rand_like(torch.norm_except_dim(values["v"], 2, dim))
    tangents = {n: torch.randn(3, *values[n].shape) for n in moving}
    outputs = lambda moved: torch._weight_norm({**values, **moved}["v"], {**values, **moved}["g"], dim)
    jacobians = jacrev(outputs, chunk_size=1)({n: values[n] for n in moving})
    expected = sum(
        torch.einsum("...i,si->s...", jacobians[n].reshape(*shape, -1), t.reshape(3, -1)) for n, t in tangents.items()
    )
    with TraceableTangents():
        at_mean, found = vmap(lambda t: jvp(outputs, ({n: values[n] for n in moving},), (t,)))(tangents)
    torch.testing.assert_close(at_mean[0], outputs({}))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_networks_with_weight_normalization_are_linearized():
    net, x = vectors(nn.utils.parametrizations.weight_norm(nn.Linear(WIDTH, WIDTH)))
    q = vbdl.Laplace(net, parameters="all", structure="full", prior_precision=10.0)
    vbdl.fit(q, (x, torch.randint(0, 3, (len(x),))), vbdl.Categorical(), epochs=0, progress=False)
    predict = vbdl.Predictor(q, vbdl.Categorical(), n_samples=3, compile=False, tiles=(len(x),), joint=True)
    found = predict(x, samples=True).samples
    assert "strategy       stacked" in predict.explain()
    state = {n: p.detach() for n, p in net.named_parameters()}
    f = lambda w: torch.func.functional_call(net, w, (x,))
    jacobians = jacrev(f, chunk_size=1)(state)
    for number, outputs in enumerate(found):
        drawn = predict.posterior.module
        drawn.key.copy_(make_key(0, [number])[0])
        moved = drawn.deviations()
        assert moved.keys() == state.keys()
        tangent = sum(torch.einsum("ijk,k->ij", jacobians[n].flatten(2), t.flatten()) for n, t in moved.items())
        torch.testing.assert_close(outputs, f(state) + tangent, rtol=1e-4, atol=1e-5)
