"""Lists of modules and tensors, compared with what torch's generators yield."""

import pytest
import torch
from torch import nn

from vbdl.calling.traversing import buffers_of, device_of, modules_of, parameters_of, state_of


class Listed(nn.Module):
    """Lists other modules than it holds."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(2, 2), nn.Linear(2, 2)

    def named_modules(self, memo=None, prefix="", remove_duplicate=True):
        yield prefix, self
        yield f"{prefix}.a".removeprefix("."), self.a


def shared():
    layer = nn.Linear(3, 3)
    other = nn.Linear(3, 3)
    other.weight = layer.weight
    return nn.Sequential(layer, nn.ModuleDict({"again": layer, "other": other}), nn.BatchNorm1d(3))


def absent():
    network = nn.Sequential(nn.Linear(2, 2))
    network.register_module("none", None)
    network.register_parameter("nothing", None)
    network.register_buffer("number", torch.zeros(()))
    return network


NETWORKS = {
    "shared": shared,
    "absent": absent,
    "deep": lambda: nn.Sequential(
        nn.Sequential(nn.Sequential(nn.LSTM(2, 3)), nn.ReLU()), nn.TransformerEncoderLayer(8, 2)
    ),
    "listed": lambda: nn.Sequential(nn.ReLU(), Listed()),
    "script": lambda: torch.jit.script(nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, 2))),
}


@pytest.mark.parametrize("network", NETWORKS)
def test_a_list_has_what_the_generators_yield(network):
    module = NETWORKS[network]()
    expected = list(module.named_modules())
    assert [(name, id(m)) for name, m in modules_of(module)] == [(name, id(m)) for name, m in expected]
    if network == "listed":  # torch's generators of tensors have no order of modules that are not listed
        return
    parameters, buffers = dict(module.named_parameters()), dict(module.named_buffers())
    if network == "script":  # whose attributes make a new tensor object every time
        assert list(parameters_of(module)) == list(parameters)
        assert list(buffers_of(module)) == list(buffers)
        return
    assert [(n, id(t)) for n, t in parameters_of(module).items()] == [(n, id(t)) for n, t in parameters.items()]
    assert [(n, id(t)) for n, t in buffers_of(module).items()] == [(n, id(t)) for n, t in buffers.items()]
    assert [(n, id(t)) for n, t in state_of(module).items()] == [(n, id(t)) for n, t in (parameters | buffers).items()]


@pytest.mark.parametrize("network", NETWORKS)
def test_a_network_is_on_the_device_of_its_tensors(network):
    assert device_of(NETWORKS[network]()) == torch.device("cpu")
    assert device_of(nn.Sequential(nn.ReLU(), nn.Linear(2, 2, device="meta"))) == torch.device("meta")
