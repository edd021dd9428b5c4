"""Networks of torchvision and timm, built small from their own classes, with random weights."""

from torch import nn
from zoo_case import Case, Then, numbers

WITHOUT_DROPOUT = ("mean-field", "ensemble", "fresh")


def _models():
    import torchvision.models as models

    return models


def convnext() -> nn.Module:
    """With stochastic depth."""
    from torchvision.models.convnext import CNBlockConfig, ConvNeXt

    settings = [CNBlockConfig(8, 16, 1), CNBlockConfig(16, None, 1)]
    return ConvNeXt(settings, stochastic_depth_prob=0.1, num_classes=5)


def vit() -> nn.Module:
    return _models().VisionTransformer(32, 16, 2, 2, 16, 32, dropout=0.1, attention_dropout=0.1, num_classes=5)


def swin() -> nn.Module:
    """With stochastic depth."""
    settings = {"depths": [2, 2], "num_heads": [1, 2], "window_size": [2, 2], "dropout": 0.1}
    return _models().SwinTransformer([4, 4], 16, **settings, stochastic_depth_prob=0.1, num_classes=5)


def densenet() -> nn.Module:
    return _models().DenseNet(8, (2, 2), 16, drop_rate=0.1, num_classes=5)


def googlenet() -> nn.Module:
    """In training it returns the outputs of two auxiliary heads, too."""
    return _models().GoogLeNet(num_classes=5, aux_logits=True, init_weights=False)


def fcn() -> nn.Module:
    """Segmentation, with the channels moved to where the classes are."""
    from torchvision.models._utils import IntermediateLayerGetter
    from torchvision.models.segmentation.fcn import FCN, FCNHead

    backbone = IntermediateLayerGetter(_models().resnet18(), {"layer4": "out"})
    return Then(FCN(backbone, FCNHead(512, 5)), lambda output: output["out"].movedim(1, -1))


def timm(name: str, **settings):
    """A function that builds a model of timm."""

    def make() -> nn.Module:
        import timm

        return timm.create_model(name, pretrained=False, num_classes=5, **settings)

    return make


def mixer() -> nn.Module:
    from timm.models.mlp_mixer import MlpMixer

    return MlpMixer(5, 64, patch_size=32, num_blocks=2, embed_dim=32, drop_rate=0.1)


_TORCHVISION, _TIMM = ("torchvision",), ("timm",)
_image = numbers(3, 64, 64)

CASES = {
    "torchvision resnet18": Case(
        lambda: _models().resnet18(num_classes=5), _image, needs=_TORCHVISION, methods=WITHOUT_DROPOUT
    ),
    "torchvision mobilenet_v3": Case(lambda: _models().mobilenet_v3_small(num_classes=5), _image, needs=_TORCHVISION),
    "torchvision efficientnet_b0": Case(lambda: _models().efficientnet_b0(num_classes=5), _image, needs=_TORCHVISION),
    "torchvision convnext": Case(convnext, _image, needs=_TORCHVISION, methods=WITHOUT_DROPOUT),
    "torchvision vit": Case(vit, numbers(3, 32, 32), needs=_TORCHVISION),
    "torchvision swin": Case(swin, numbers(3, 32, 32), needs=_TORCHVISION),
    "torchvision densenet": Case(densenet, numbers(3, 32, 32), needs=_TORCHVISION),
    "torchvision googlenet": Case(googlenet, _image, needs=_TORCHVISION),
    "torchvision fcn": Case(fcn, _image, needs=_TORCHVISION),
    "timm convnext": Case(
        timm("convnext_atto", depths=(1, 1, 1, 1), dims=(8, 16, 16, 16), drop_path_rate=0.1),
        _image,
        needs=_TIMM,
        methods=WITHOUT_DROPOUT,
    ),
    "timm vit_tiny": Case(
        timm("vit_tiny_patch16_224", img_size=32, depth=2, drop_path_rate=0.1, proj_drop_rate=0.1),
        numbers(3, 32, 32),
        needs=_TIMM,
    ),
    "timm mixer": Case(mixer, _image, needs=_TIMM),
}
