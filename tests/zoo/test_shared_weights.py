"""torch-uncertainty's layers of shared weights compute what BatchEnsemble and Masksembles do."""

import importlib.util

import pytest
import torch
from torch import nn

import vbdl

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore"),
    pytest.mark.skipif(
        importlib.util.find_spec("torch_uncertainty") is None, reason="needs torch-uncertainty, which is not installed"
    ),
]
MEMBERS, ROWS, CLASSES = 4, 6, 3


def batch_ensemble(kind: str):
    from torch_uncertainty.layers import BatchConv1d, BatchConv2d, BatchLinear

    torch.manual_seed(0)
    if kind == "linear":
        ours = nn.Sequential(nn.Linear(7, 13), nn.Tanh(), nn.Linear(13, CLASSES))
        theirs = nn.Sequential(BatchLinear(7, 13, MEMBERS), nn.Tanh(), BatchLinear(13, CLASSES, MEMBERS))
        x = torch.randn(ROWS, 7)
    else:
        conv, batch_conv = (nn.Conv1d, BatchConv1d) if kind == "conv1d" else (nn.Conv2d, BatchConv2d)
        shape = (9,) if kind == "conv1d" else (9, 8)
        options = dict(kernel_size=3, groups=2, padding=1, stride=2) if kind == "conv1d" else dict(kernel_size=3)
        ours = nn.Sequential(conv(4, 6, **options), nn.ReLU(), nn.Flatten())
        width = ours(torch.zeros(1, 4, *shape)).shape[1]
        ours.append(nn.Linear(width, CLASSES))
        theirs = nn.Sequential(
            batch_conv(4, 6, num_estimators=MEMBERS, **options), nn.ReLU(), nn.Flatten(),
            BatchLinear(width, CLASSES, MEMBERS),
        )  # fmt: skip
        x = torch.randn(ROWS, 4, *shape)
    return ours, theirs, x


@pytest.mark.parametrize("kind", ["linear", "conv1d", "conv2d"])
def test_batch_ensemble_is_theirs(kind):
    network, theirs, x = batch_ensemble(kind)
    q = vbdl.BatchEnsemble(network, MEMBERS, initial="normal")
    entries = {**q.shared(), **q.stacked()}
    with torch.no_grad():
        for path, layer in theirs.named_children():
            if hasattr(layer, "r_group"):
                product = layer.linear if hasattr(layer, "linear") else layer.conv
                product.weight.copy_(entries[f"inner.{path}.weight"])
                layer.r_group.copy_(entries[f"r.{path}/weight"])
                layer.s_group.copy_(entries[f"s.{path}/weight"])
                entries[f"inner.{path}.bias"].normal_()
                layer.bias.copy_(entries[f"inner.{path}.bias"])
    samples = vbdl.Predictor(q, vbdl.Categorical(), compile=False)(x, samples=True).samples
    outputs = theirs(x.repeat(MEMBERS, *[1] * (x.ndim - 1))).view(MEMBERS, ROWS, CLASSES)
    torch.testing.assert_close(samples, outputs.detach(), rtol=1e-5, atol=1e-5)
    # the same gradients of the same loss: theirs is the mean over members, ours the sum
    y = torch.arange(ROWS) % CLASSES
    repeated = theirs(x.repeat(MEMBERS, *[1] * (x.ndim - 1)))
    (MEMBERS * nn.functional.cross_entropy(repeated, y.repeat(MEMBERS))).backward()
    q.losses(x, y, vbdl.Categorical()).sum().backward()
    for path, layer in theirs.named_children():
        if hasattr(layer, "r_group"):
            product = layer.linear if hasattr(layer, "linear") else layer.conv
            for ours, their in (
                (f"inner.{path}.weight", product.weight), (f"r.{path}/weight", layer.r_group),
                (f"s.{path}/weight", layer.s_group), (f"inner.{path}.bias", layer.bias),
            ):  # fmt: skip
                torch.testing.assert_close(entries[ours].grad, their.grad, rtol=1e-4, atol=1e-5)


def test_masksembles_is_theirs():
    from torch_uncertainty.layers import MaskedConv2d, MaskedLinear

    torch.manual_seed(0)
    network = nn.Sequential(
        nn.Conv2d(2, 12, 3), nn.ReLU(), nn.Conv2d(12, 16, 3), nn.ReLU(), nn.Flatten(), nn.Linear(16 * 9, CLASSES)
    )
    q = vbdl.Masksembles(network, MEMBERS, scale=2.0)
    theirs = nn.Sequential(
        nn.Conv2d(2, 12, 3), nn.ReLU(), MaskedConv2d(12, 16, 3, MEMBERS, 2.0), nn.ReLU(), nn.Flatten(),
        MaskedLinear(16 * 9, CLASSES, MEMBERS, 2.0),
    )  # fmt: skip
    for path in ("2", "5"):
        layer = theirs.get_submodule(path)
        mask = layer.mask if hasattr(layer.mask, "masks") else layer.mask[0]
        masks = q.masks(path)
        # as many units as theirs keep, which draw theirs at random
        assert int(mask.masks[0].sum()) == int(masks[0].sum()) and mask.masks.shape == masks.shape
        mask.masks.data.copy_(masks)
        product = layer.linear if hasattr(layer, "linear") else layer.conv
        product.load_state_dict(network.get_submodule(path).state_dict())
    theirs[0].load_state_dict(network[0].state_dict())
    x = torch.randn(ROWS, 2, 7, 7)
    samples = vbdl.Predictor(q, vbdl.Categorical(), compile=False)(x, samples=True).samples
    outputs = theirs(x.repeat(MEMBERS, 1, 1, 1)).view(MEMBERS, ROWS, CLASSES)
    torch.testing.assert_close(samples, outputs.detach(), rtol=1e-5, atol=1e-5)


def resnet():
    import torchvision

    return torchvision.models.resnet18(num_classes=CLASSES), torch.randn(ROWS, 3, 32, 32)


def vision_transformer():
    import timm

    net = timm.create_model("vit_tiny_patch16_224", img_size=32, patch_size=8, depth=2, num_classes=CLASSES)
    return net, torch.randn(ROWS, 3, 32, 32)


def torchvision_transformer():
    import torchvision

    net = torchvision.models.VisionTransformer(32, 8, 2, 2, 32, 48, num_classes=CLASSES)
    return net, torch.randn(ROWS, 3, 32, 32)


def bert():
    from transformers import BertConfig, BertForSequenceClassification

    config = BertConfig(
        vocab_size=100, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=48,
        num_labels=CLASSES,
    )  # fmt: skip
    tokens = torch.randint(1, 100, (ROWS, 9))
    return BertForSequenceClassification(config), {"input_ids": tokens, "attention_mask": torch.ones_like(tokens)}


@pytest.mark.parametrize("method", ["BatchEnsemble", "Masksembles"])
@pytest.mark.parametrize("make", [resnet, vision_transformer, torchvision_transformer, bert])
def test_members_of_known_networks_are_these_networks(make, method):
    """Predicted together, and trained for an epoch: together, unless torch's fused attention cannot be mapped."""
    for package in ("torchvision", "timm", "transformers"):
        pytest.importorskip(package)
    torch.manual_seed(0)
    network, x = make()
    network.eval()
    q = getattr(vbdl, method)(network, 3)
    assert len(q.scaled) > 5
    samples = vbdl.Predictor(q, vbdl.Categorical(), compile=False)(x, samples=True).samples
    for index in range(3):
        network.load_state_dict(q.member(index), strict=False)
        with torch.no_grad():
            outputs = network(**x) if isinstance(x, dict) else network(x)
        outputs = outputs if isinstance(outputs, torch.Tensor) else outputs.logits
        scale = float(outputs.abs().max())
        torch.testing.assert_close(samples[index], outputs, rtol=1e-3, atol=1e-4 * scale)
    history = vbdl.fit(q, (x, torch.arange(ROWS) % CLASSES), vbdl.Categorical(), epochs=1, compile=False)
    assert history.one_by_one == "" or (make is vision_transformer and "scaled_dot" in history.one_by_one)
