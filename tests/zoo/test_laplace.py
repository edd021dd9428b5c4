"""The last layers of torchvision's, timm's and Hugging Face's networks are found, and their posterior predicts."""

import importlib.util

import pytest
import torch

import vbdl

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore"),
    pytest.mark.skipif(
        any(importlib.util.find_spec(name) is None for name in ("torchvision", "timm", "transformers")),
        reason="needs torchvision, timm and transformers, which are not installed",
    ),
]
ROWS, CLASSES, SMALL = 12, 3, {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}


def resnet():
    import torchvision

    return torchvision.models.resnet18(num_classes=CLASSES), torch.randn(ROWS, 3, 32, 32)


def timm_vit():
    import timm

    net = timm.create_model("vit_tiny_patch16_224", img_size=32, patch_size=8, depth=2, num_classes=CLASSES)
    return net, torch.randn(ROWS, 3, 32, 32)


def timm_convnext():
    import timm

    net = timm.create_model("convnext_atto", num_classes=CLASSES, depths=(1, 1, 1, 1), dims=(8, 16, 24, 32))
    return net, torch.randn(ROWS, 3, 32, 32)


def ids(**more):
    tokens = torch.randint(1, 100, (ROWS, 9))
    return {"input_ids": tokens, **{name: torch.ones_like(tokens) for name in more}}


def bert():
    from transformers import BertConfig, BertForSequenceClassification

    config = BertConfig(vocab_size=100, intermediate_size=48, num_labels=CLASSES, **SMALL)
    return BertForSequenceClassification(config), ids(attention_mask=True)


def hugging_face_vit():
    from transformers import ViTConfig, ViTForImageClassification

    config = ViTConfig(image_size=32, patch_size=8, intermediate_size=48, num_labels=CLASSES, **SMALL)
    return ViTForImageClassification(config), {"pixel_values": torch.randn(ROWS, 3, 32, 32)}


def gpt2():
    from transformers import GPT2Config, GPT2ForSequenceClassification

    config = GPT2Config(vocab_size=100, n_embd=32, n_layer=2, n_head=2, num_labels=CLASSES, pad_token_id=0)
    return GPT2ForSequenceClassification(config), ids()


HEADS = {
    resnet: ("fc.weight", "fc.bias"),
    timm_vit: ("head.weight", "head.bias"),
    timm_convnext: ("head.fc.weight", "head.fc.bias"),
    bert: ("classifier.weight", "classifier.bias"),
    hugging_face_vit: ("classifier.weight", "classifier.bias"),
    gpt2: ("score.weight",),
}


@pytest.mark.parametrize("make", HEADS, ids=lambda make: make.__name__)
def test_the_last_layer_is_found(make):
    torch.manual_seed(0)
    net, x = make()
    y = torch.arange(ROWS) % CLASSES
    q, likelihood = vbdl.Laplace(net.eval()), vbdl.Categorical()
    assert q.module.chosen == HEADS[make]
    vbdl.fit(q, (x, y), likelihood, epochs=0, batch_size=5, progress=False)
    p = vbdl.Predictor(q, likelihood, 8, compile=False, tiles=(ROWS,))(x)
    assert bool((p.epistemic > 0).all())


@pytest.mark.parametrize("make", [timm_vit, bert], ids=lambda make: make.__name__)
@pytest.mark.parametrize("structure", ["kronecker", "diagonal"])
def test_all_parameters_have_a_curvature(make, structure):
    """Class tokens and tables of positions among them, whose curvature is taken row by row."""
    torch.manual_seed(0)
    net, x = make()
    y = torch.arange(ROWS) % CLASSES
    q, likelihood = vbdl.Laplace(net.eval(), parameters="all", structure=structure), vbdl.Categorical()
    vbdl.fit(q, (x, y), likelihood, epochs=0, batch_size=5, progress=False)
    assert set(q.module.chosen) == {name for name, _ in net.named_parameters()}
    p = vbdl.Predictor(q, likelihood, 4, compile=False, tiles=(ROWS,))(x)
    assert bool((p.epistemic > 0).all())
