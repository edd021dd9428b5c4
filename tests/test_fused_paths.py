"""The fused path of transformer layers is closed for the thread that traces, and for no other."""

import threading

import pytest
import torch
from torch import nn

from vbdl.calling.graphs import without_fused_attention
from vbdl.engine.program import tracing


def encoder() -> nn.Module:
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    return nn.TransformerEncoder(layer, 2).eval()


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
@pytest.mark.parametrize("context", [without_fused_attention, tracing])
def test_another_thread_keeps_nested_tensors(context):
    torch.manual_seed(0)
    net, x = encoder(), torch.randn(3, 5, 8)
    padding = torch.zeros(3, 5, dtype=torch.bool)
    padding[1, 3:] = True  # the encoder makes a nested tensor of it, which only the fused path takes
    expected, found, inside, left = [], [], threading.Event(), threading.Event()

    def call(results):
        with torch.no_grad():
            results.append(net(x, src_key_padding_mask=padding))

    def trace():
        with context():
            assert not torch.backends.mha.get_fastpath_enabled()
            inside.set()
            left.wait()

    call(expected)
    before = torch.backends.mha.get_fastpath_enabled
    thread = threading.Thread(target=trace)
    thread.start()
    inside.wait()
    try:
        assert torch.backends.mha.get_fastpath_enabled()
        call(found)
    finally:
        left.set()
        thread.join()
    assert torch.equal(found[0], expected[0])
    assert torch.backends.mha.get_fastpath_enabled is before


def test_a_setting_of_the_user_stays():
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with without_fused_attention():
            assert not torch.backends.mha.get_fastpath_enabled()
        assert not torch.backends.mha.get_fastpath_enabled()
    finally:
        torch.backends.mha.set_fastpath_enabled(True)
