"""Fresh members: initialized by what the network's own classes offer, or refused with the lines to write instead."""

import math

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, parametrize
from torch.nn.utils import spectral_norm as old_spectral_norm

import vbdl
from vbdl.nn.constructed import again
from vbdl.nn.initialization import reset_parameters


class Scale(nn.Module):
    """A layer with a bare parameter and no reset_parameters()."""

    def __init__(self, value):
        super().__init__()
        self.scale = nn.Parameter(value)

    def forward(self, x):
        return x * self.scale


class HuggingFaceLike(nn.Module):
    """Initializes any module inside it by one method; its own bare parameter included."""

    def __init__(self):
        super().__init__()
        self.body, self.scale, self.kept = nn.Linear(3, 4), Scale(torch.randn(4)), Scale(torch.full((4,), 0.1))
        self.token = nn.Parameter(torch.randn(4))

    def init_weights(self):
        """Nothing: the constructor has initialized it once."""

    def _init_weights(self, module):
        if isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, std=0.02)
            nn.init.zeros_(module.bias)
        elif isinstance(module, HuggingFaceLike):
            nn.init.normal_(module.token, std=5.0)
        elif isinstance(module, Scale) and module is not self.kept:
            nn.init.uniform_(module.scale)

    def forward(self, x):
        return self.kept(self.scale(self.body(x) + self.token))


class TimmLike(nn.Module):
    """Initializes itself by a method with optional arguments."""

    def __init__(self):
        super().__init__()
        self.body, self.token = nn.Linear(3, 4), nn.Parameter(torch.randn(4))

    def init_weights(self, mode=""):
        nn.init.trunc_normal_(self.token, std=0.02)
        nn.init.trunc_normal_(self.body.weight, std=0.02)
        nn.init.zeros_(self.body.bias)

    def _init_weights(self, module):
        raise AssertionError("init_weights() has set every parameter")

    def forward(self, x):
        return self.body(x) + self.token


def looking_trained(network):
    for p in network.parameters():
        if p.requires_grad:
            nn.init.uniform_(p, 3.0, 4.0)
    return network


def members(network, n=2):
    q = vbdl.DeepEnsemble(network, n)
    assert torch.isfinite(q.draws(torch.arange(n), 0)[next(iter(q.stacked()))]).all()
    return [q.member(m) for m in range(n)]


def test_a_model_initializes_all_modules_inside_it_as_hugging_face_does():
    network = HuggingFaceLike()
    kept = network.kept.scale.detach().clone()
    nn.init.uniform_(network.body.weight, 3.0, 4.0)
    one, two = members(nn.Sequential(network, nn.Linear(4, 2)))
    for name in ("0.body.weight", "0.token", "0.scale.scale", "1.weight"):
        assert not torch.equal(one[name], two[name]), name
    assert float(one["0.body.weight"].abs().max()) < 0.2 and not one["0.body.bias"].any()
    assert float(torch.stack([one["0.token"], two["0.token"]]).std()) > 1.0
    assert torch.equal(one["0.kept.scale"], kept), "a constant that the class leaves is as its constructor made it"


def test_a_constant_that_training_changed_is_not_taken_for_an_initialization():
    with pytest.raises(ValueError, match=r"(?s)'0.kept'.*Scale.*members = \[make_network\(\)"):
        vbdl.DeepEnsemble(nn.Sequential(looking_trained(HuggingFaceLike())), 2)


def test_init_weights_is_called():
    one, two = members(looking_trained(TimmLike()))
    assert not torch.equal(one["token"], two["token"])
    assert max(float(t.abs().max()) for t in (one["token"], one["body.weight"])) < 0.2


def test_a_bare_parameter_without_an_offer_is_refused_with_the_lines_to_write():
    with pytest.raises(ValueError, match="has no reset_parameters") as error:
        vbdl.DeepEnsemble(nn.Sequential(nn.Linear(3, 3), Scale(torch.randn(3))), 2)
    for line in ("members = [make_network() for _ in range(n_members)]", "q = vbdl.DeepEnsemble(members)"):
        assert line in str(error.value)


def test_a_network_that_is_refused_is_unchanged():
    network = nn.Sequential(nn.Linear(3, 3), Scale(torch.randn(3)))
    before = {n: t.clone() for n, t in network.state_dict().items()}
    with pytest.raises(ValueError):
        vbdl.DeepEnsemble(network, 2)
    assert all(torch.equal(before[n], t) for n, t in network.state_dict().items())


PARAMETRIZED = {
    "weight_norm": parametrizations.weight_norm,
    "spectral_norm": parametrizations.spectral_norm,
    "orthogonal": parametrizations.orthogonal,
}


@pytest.mark.parametrize("name", PARAMETRIZED)
@pytest.mark.parametrize("layer", [lambda: nn.Linear(5, 5), lambda: nn.Conv1d(4, 4, 1)])
def test_a_parametrized_layer_is_initialized_as_the_layer_is(name, layer):
    network = nn.Sequential(layer())
    PARAMETRIZED[name](network[0])
    looking_trained(network)
    one, two = members(network)
    for key in network.state_dict():
        assert torch.isfinite(one[key]).all(), key
    network.load_state_dict(one)
    first = network.eval()[0].weight.detach()
    network.load_state_dict(two)
    assert not torch.equal(first, network[0].weight)
    bound = 1 / math.sqrt(first[0].numel())
    if name == "weight_norm":
        assert float(first.abs().max()) <= bound + 1e-6  # the layer's own distribution, not the trained weights'
    elif name == "spectral_norm" or first.ndim == 2:  # the others are of batches of matrices
        largest = torch.linalg.matrix_norm(first.flatten(1), ord=2)
        torch.testing.assert_close(largest, torch.tensor(1.0), rtol=0.05, atol=0)


def test_a_parametrization_without_an_inverse_sets_its_original():
    class Symmetric(nn.Module):
        def forward(self, w):
            return w.triu() + w.triu(1).mT

    network = nn.Sequential(nn.Linear(4, 4))
    parametrize.register_parametrization(network[0], "weight", Symmetric())
    looking_trained(network)
    one, two = members(network)
    original = "0.parametrizations.weight.original"
    assert not torch.equal(one[original], two[original]) and float(one[original].abs().max()) <= 0.5


def test_the_old_spectral_norm_is_initialized_too():
    network = nn.Sequential(old_spectral_norm(nn.Linear(5, 5)))
    looking_trained(network)
    one, two = members(network)
    assert not torch.equal(one["0.weight_orig"], two["0.weight_orig"])
    assert float(one["0.weight_orig"].abs().max()) <= 1 / math.sqrt(5)


class Adapted(nn.Module):
    """A frozen layer with a low-rank adapter, as peft's: its product is zero at first."""

    def __init__(self, inner, rank=2):
        super().__init__()
        self.inner = inner.requires_grad_(False)
        self.lora_A = nn.ModuleDict({"default": nn.Linear(inner.in_features, rank, bias=False)})
        self.lora_B = nn.ModuleDict({"default": nn.Linear(rank, inner.out_features, bias=False)})
        self.lora_embedding_A, self.lora_embedding_B = nn.ParameterDict(), nn.ParameterDict()

    def reset_lora_parameters(self, adapter, init_lora_weights):
        nn.init.kaiming_uniform_(self.lora_A[adapter].weight, a=math.sqrt(5))
        nn.init.zeros_(self.lora_B[adapter].weight)

    def forward(self, x):
        return self.inner(x) + self.lora_B["default"](self.lora_A["default"](x))


def test_adapters_are_fresh_and_the_frozen_base_is_shared():
    base = looking_trained(nn.Linear(3, 4))
    weight = base.weight.detach().clone()
    network = looking_trained(nn.Sequential(Adapted(base), nn.Linear(4, 2)))
    q = vbdl.DeepEnsemble(network, 3)
    assert set(q.shared()) == {"0.inner.weight", "0.inner.bias"}
    assert torch.equal(q.shared()["0.inner.weight"], weight)
    down, up = q.stacked()["0.lora_A.default.weight"], q.stacked()["0.lora_B.default.weight"]
    assert not up.any() and not torch.equal(down[0], down[1]) and float(down.detach().abs().max()) < 3


def test_a_posterior_is_initialized_in_place_of_its_network():
    q = vbdl.MCDropout(nn.Sequential(TimmLike(), nn.Dropout(0.1)))
    before = q.module.inner[0].token.detach().clone()
    reset_parameters(q)
    assert not torch.equal(before, q.module.inner[0].token)


class OnlyConstructed(nn.Module):
    """Sets numbers in its constructor alone, as torchvision's networks do."""

    def __init__(self, spread=0.02, table=None):
        super().__init__()
        self.token = nn.Parameter(torch.zeros(8))
        self.positions = nn.Parameter(torch.empty(12, 8).normal_(std=spread) if table is None else table)
        self.scale, self.norm, self.body = nn.Parameter(torch.full((8,), 1e-6)), nn.LayerNorm(8), nn.Linear(8, 32)
        nn.init.trunc_normal_(self.body.weight, std=spread)
        nn.init.zeros_(self.body.bias)

    def forward(self, x):
        return self.body(self.norm(x + self.token + self.positions.sum(0)) * self.scale)


def test_an_untrained_networks_numbers_are_a_draw_of_its_constructors_initialization(caplog):
    torch.manual_seed(0)
    network = OnlyConstructed()
    with caplog.at_level("INFO", logger="vbdl"):
        one, two = members(network)
    for name in ("token", "scale", "body.bias"):
        assert torch.equal(one[name], network.get_parameter(name)) and torch.equal(two[name], one[name]), name
    for name in ("positions", "body.weight"):
        given = network.get_parameter(name).detach().flatten()
        assert not torch.equal(one[name], two[name]) and not torch.equal(one[name].flatten(), given), name
        assert torch.equal(one[name].flatten().sort().values, given.sort().values), name
    assert "OnlyConstructed gets token, positions, scale, body.weight, body.bias" in caplog.text


def test_numbers_of_a_trained_network_are_not_taken_for_an_initialization():
    network = OnlyConstructed()
    nn.init.normal_(network.norm.weight, 1.0, 1e-3)
    with pytest.raises(ValueError, match="holds the parameter 'token' and has no reset_parameters"):
        vbdl.DeepEnsemble(network, 2)


@pytest.mark.parametrize(
    "table",
    [
        torch.arange(96.0).view(12, 8).mul(0.3).sin(),
        torch.linspace(0, 1, 8),
        nn.init.orthogonal_(torch.empty(32, 32)),
        torch.eye(16),
        torch.cat([torch.randn(16, 16), 5 * torch.randn(16, 16)]),
    ],
)
def test_numbers_with_an_order_are_not_reordered(table):
    with pytest.raises(ValueError, match="holds the parameter 'positions' and has no reset_parameters"):
        vbdl.DeepEnsemble(OnlyConstructed(table=table), 2)


def test_a_layer_whose_constructor_set_it_as_it_resets_itself_is_reset():
    torch.manual_seed(5)
    network = nn.Sequential(nn.Linear(32, 32), nn.LayerNorm(32))
    one, _ = members(network)
    assert not torch.equal(one["0.weight"].flatten().sort().values, network[0].weight.flatten().sort().values)


def test_independent_numbers_pass_for_ordered_ones_rarely():
    generator = torch.Generator().manual_seed(0)
    shapes = [(8,), (3, 3), (64, 2), (2, 64), (16, 3, 3, 3), (40, 40)]
    draws = [torch.randn(shape, generator=generator) for shape in shapes for _ in range(50)]
    draws += [torch.rand(shape, generator=generator) for shape in shapes for _ in range(50)]
    assert all(again(t) is not None for t in draws)
