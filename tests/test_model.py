"""Network and likelihood as one module, and in the dtype that was asked for."""

import pytest
import torch
from torch import nn

from vbdl import Categorical
from vbdl.calling.each import call_each
from vbdl.calling.stacking import call_stacked
from vbdl.calling.traversing import state_of
from vbdl.compiling.graph import trace
from vbdl.model import Model
from vbdl.types import Posterior

NETWORKS = {
    "1d": (lambda: nn.Sequential(nn.Conv1d(3, 8, 3), nn.GroupNorm(2, 8), nn.ReLU(), nn.ConvTranspose1d(8, 4, 3)), (5,)),
    "2d": (lambda: nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 4, 3)), (5, 5)),
    "3d": (lambda: nn.Sequential(nn.Conv3d(3, 8, 3), nn.InstanceNorm3d(8, affine=True), nn.Conv3d(8, 4, 1)), (4, 4, 4)),
}


@pytest.mark.parametrize("own", ["all", "first"])
@pytest.mark.parametrize("name", NETWORKS)
def test_autocast_reaches_layers_that_are_mapped(name, own):
    """Convolutions and what follows them in bfloat16, as one draw after the other has them; weights of all layers or
    of the first are each draw's own."""
    make, size = NETWORKS[name]
    q = Posterior()
    q.module = nn.Sequential(make(), nn.Flatten()).eval()
    network = Model(q, Categorical(), autocast=torch.bfloat16)
    state = {n: t.detach() for n, t in state_of(network).items()}
    stacked = {
        n: torch.randn(2, *t.shape) if t.is_floating_point() and "running" not in n else torch.stack([t, t])
        for n, t in state.items()
        if own == "all" or ".0.0." in n
    }
    shared = {n: t for n, t in state.items() if n not in stacked}
    x = torch.randn(3, 3, *size)
    traced = trace(lambda x: (call_stacked(network, stacked, shared, x),), x)
    products = [n for n in traced.graph.nodes if n.target is torch.ops.aten.convolution.default]
    assert products
    assert {a.meta["val"].dtype for n in products for a in (n, *n.all_input_nodes)} == {torch.bfloat16}
    found, each = call_stacked(network, stacked, shared, x), call_each(network, stacked, shared, x)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, each, rtol=0.05, atol=0.05 * float(each.abs().max()))
