"""Layers with the interface of peft's: their adapters are initialized as configured, idle ones are refused."""

import copy
import math
import types

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import vbdl
from vbdl.nn import initialization


class Adapted(nn.Module):
    """A linear layer with one LoRA adapter, as peft's lora.Linear holds and calls it."""

    def __init__(self, base, rank=2, how=True):
        super().__init__()
        self.base_layer, self.merged_adapters, self._disable_adapters = base.requires_grad_(False), [], False
        self.lora_A = nn.ModuleDict({"default": nn.Linear(base.in_features, rank, bias=False)})
        self.lora_B = nn.ModuleDict({"default": nn.Linear(rank, base.out_features, bias=False)})
        self.lora_embedding_A, self.lora_embedding_B = nn.ParameterDict(), nn.ParameterDict()
        self.peft_config = {"default": types.SimpleNamespace(init_lora_weights=how)}
        nn.init.zeros_(self.lora_B["default"].weight)

    def reset_lora_parameters(self, adapter, init_lora_weights):
        if init_lora_weights == "gaussian":
            nn.init.normal_(self.lora_A[adapter].weight, std=100.0)
        else:
            assert init_lora_weights is True
            nn.init.kaiming_uniform_(self.lora_A[adapter].weight, a=math.sqrt(5))
        nn.init.zeros_(self.lora_B[adapter].weight)

    def orthogonal_init(self, adapter):
        self.lora_A[adapter].weight = nn.Parameter(torch.randn_like(self.lora_A[adapter].weight) + 7)
        self.lora_B[adapter].weight = nn.Parameter(torch.randn_like(self.lora_B[adapter].weight) - 7)

    def forward(self, x):
        return self.base_layer(x) + self.lora_B["default"](self.lora_A["default"](x))


def network(**how):
    torch.manual_seed(0)
    return nn.Sequential(Adapted(nn.Linear(3, 8), **how), nn.Tanh(), Adapted(nn.Linear(8, 2), **how))


def test_members_start_as_the_base_differ_in_a_and_training_drives_them_apart():
    net = network()
    q = vbdl.DeepEnsemble(net, 3)
    x, y = torch.randn(20, 3), torch.randint(2, (20,))
    predict = lambda: vbdl.Predictor(q, vbdl.Categorical(), compile=False)(x)
    torch.testing.assert_close(predict().probs, net(x).softmax(-1).detach())
    assert float(predict().epistemic.abs().max()) < 1e-6
    first = q.stacked()["0.lora_A.default.weight"]
    assert not any(torch.equal(first[a], first[b]) for a, b in ((0, 1), (0, 2), (1, 2)))
    vbdl.fit(q, (x, y), vbdl.Categorical(), epochs=5, lr=0.05, compile=False, progress=False)
    assert float(predict().epistemic.max()) > 1e-4
    assert all(torch.equal(q.shared()[n], p) for n, p in net.named_parameters() if not p.requires_grad)


@pytest.mark.parametrize("how", ["gaussian", "orthogonal", False])
def test_adapters_are_initialized_as_their_configuration_says(how):
    q = vbdl.DeepEnsemble(network(how=how), 2)
    a, b = q.stacked()["0.lora_A.default.weight"].detach(), q.stacked()["0.lora_B.default.weight"].detach()
    assert not torch.equal(a[0], a[1])
    if how == "gaussian":
        assert float(a.std()) > 20 and not b.any()
    elif how == "orthogonal":
        assert float(a.mean()) > 5 and float(b.mean()) < -5
    else:
        assert b.all() and not torch.equal(b[0], b[1])


def test_an_initialization_by_the_base_weights_is_refused():
    with pytest.raises(ValueError, match="init_lora_weights='pissa'.*all members would start equal"):
        vbdl.DeepEnsemble(network(how="pissa"), 2)


def test_making_members_copies_the_base_once():
    """At any time one copy of the frozen base besides the user's, however many members."""
    net = nn.Sequential(Adapted(nn.Linear(64, 64)), Adapted(nn.Linear(64, 2)))
    members = [initialization.fresh(net, seed, initialization.reset_parameters) for seed in range(3)]
    for member in members:
        assert member[0].base_layer.weight is net[0].base_layer.weight
        assert member[0].lora_A["default"].weight is not net[0].lora_A["default"].weight
    q = vbdl.DeepEnsemble(net, 3)
    assert q.shared()["0.base_layer.weight"].data_ptr() != net[0].base_layer.weight.data_ptr()
    changed = initialization.fresh(net, 0, lambda m: nn.init.ones_(m[0].base_layer.weight))
    assert bool(changed[0].base_layer.weight.eq(1).all()) and not net[0].base_layer.weight.eq(1).any()


@pytest.mark.parametrize("idle", ["merged", "disabled"])
@pytest.mark.parametrize("method", [lambda n: vbdl.DeepEnsemble(n, 2), lambda n: vbdl.MeanField(n, 9), vbdl.Laplace])
def test_idle_adapters_are_refused(method, idle):
    net = network()
    if idle == "merged":
        net[0].merged_adapters.append("default")
    else:
        net[0]._disable_adapters = True
    with pytest.raises(ValueError, match=f"the adapters of layer '0' are {idle}"):
        method(net)


@pytest.mark.parametrize("method", [lambda n: vbdl.DeepEnsemble(n, 2), lambda n: vbdl.MeanField(n, 9), vbdl.Laplace])
def test_frozen_adapters_are_refused_with_what_to_do(method):
    with pytest.raises(ValueError, match="is_trainable=True"):
        method(network().requires_grad_(False))


def test_parameters_are_chosen_by_pattern():
    q = vbdl.MeanField(network(), 9, parameters=["*.lora_A.*"], prior={"": 1.0, "2.*": 0.5})
    assert q.module.chosen == ("0.lora_A.default.weight", "2.lora_A.default.weight")
    assert [q.module.prior_0.item(), q.module.prior_1.item()] == [1.0, 0.5]
    assert set(vbdl.Laplace(network(), parameters=["[02].lora_B"]).module.chosen) == {
        "0.lora_B.default.weight", "2.lora_B.default.weight",
    }  # fmt: skip
    with pytest.raises(ValueError, match="no trainable parameter belongs to"):
        vbdl.MeanField(network(), 9, parameters=["*.lora_C.*"])


def test_laplace_of_a_frozen_last_layer_says_what_to_choose():
    net = nn.Sequential(Adapted(nn.Linear(3, 8)), nn.Linear(8, 2).requires_grad_(False))
    rows = torch.randn(9, 3), torch.randint(2, (9,))
    with pytest.raises(ValueError, match="computed by '1'.*parameters='all'.*if that layer is frozen"):
        vbdl.fit(vbdl.Laplace(net), rows, vbdl.Categorical(), epochs=0, compile=False, progress=False)
    q = vbdl.Laplace(net, parameters="all")
    vbdl.fit(q, rows, vbdl.Categorical(), epochs=0, compile=False, progress=False)
    assert float(vbdl.Predictor(q, vbdl.Categorical(), 8, compile=False)(rows[0]).epistemic.min()) > 0


class Saved(nn.Module):
    """A module of which peft trains a copy."""

    def __init__(self, module):
        super().__init__()
        self.original_module = module.requires_grad_(False)
        self.modules_to_save = nn.ModuleDict({"default": copy.deepcopy(module).requires_grad_(True)})

    def forward(self, x):
        return self.modules_to_save["default"](x)


def test_pretrained_embeddings_to_save_start_as_the_base_and_heads_are_fresh():
    net = nn.Sequential(Saved(nn.Embedding(5, 3)), Adapted(nn.Linear(3, 8)), Saved(nn.Linear(8, 2)))
    with torch.no_grad():
        net[0].modules_to_save["default"].weight.fill_(9.0)  # trained since
    q = vbdl.DeepEnsemble(net, 2)
    table, head = (q.stacked()[f"{i}.modules_to_save.default.weight"].detach() for i in (0, 2))
    assert torch.equal(table, net[0].original_module.weight.expand_as(table))
    assert not torch.equal(head[0], head[1])


def test_inspect_lists_adapters():
    report = vbdl.inspect(network())
    assert report.adapters == ["default: LoRA of rank 2 on 2 layers, 42 parameters, trainable"]
    assert "adapters:" in str(report)
    assert vbdl.inspect(nn.Linear(2, 2)).adapters == []


class Products(TorchDispatchMode):
    """Counts products with a matrix of this shape, by the number of rows that it is applied to."""

    def __init__(self, shape):
        super().__init__()
        self.shape, self.rows = set(shape), []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func in (torch.ops.aten.mm.default, torch.ops.aten.bmm.default):
            left, right = (a.shape for a in args)
            if left[-1] in self.shape and self.shape <= {*left, *right}:
                self.rows.append(max({*left, *right} - self.shape))
        return func(*args, **(kwargs or {}))


def test_the_base_is_one_product_on_all_members_rows():
    torch.manual_seed(0)
    net = nn.Sequential(Adapted(nn.Linear(31, 37), how=False), nn.Tanh(), Adapted(nn.Linear(37, 41), how=False))
    predict = vbdl.Predictor(vbdl.DeepEnsemble(net, 6), vbdl.Categorical(), compile=False, tiles=(16,))
    x = torch.randn(16, 31)
    predict(x)
    for shape, rows in (((31, 37), 16), ((37, 41), 6 * 16)):
        with Products(shape) as products:
            predict(x)
        assert products.rows == [rows], "the first layer's base has the same inputs in all members"
