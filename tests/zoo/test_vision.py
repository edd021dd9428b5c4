"""torchvision's and timm's networks as they come, untrained and small, trained and predicted as a plain loop would."""

import pytest
import torch
from torch.func import functional_call

import vbdl

pytestmark = pytest.mark.slow

ROWS, CLASSES = 8, 3


def torchvision(make):
    def build():
        return make(pytest.importorskip("torchvision").models)

    return build


def timm(name, **options):
    def build():
        return pytest.importorskip("timm").create_model(name, num_classes=CLASSES, **options)

    return build


SMALL_VIT = {"img_size": 32, "patch_size": 8, "embed_dim": 24, "depth": 2, "num_heads": 2}
SMALL_CONVNEXT = {"depths": (1, 1, 1, 1), "dims": (8, 8, 8, 8)}

NETWORKS = {
    "resnet18": (torchvision(lambda m: m.resnet18(num_classes=CLASSES)), 32),
    "mobilenet": (torchvision(lambda m: m.mobilenet_v3_small(num_classes=CLASSES)), 32),
    "swin": (
        torchvision(lambda m: m.SwinTransformer([4, 4], 12, [1, 1], [1, 2], [2, 2], dropout=0.1, num_classes=CLASSES)),
        32,
    ),
    "vit": (torchvision(lambda m: m.VisionTransformer(32, 8, 2, 2, 24, 48, 0.1, num_classes=CLASSES)), 32),
    "googlenet": (torchvision(lambda m: m.googlenet(num_classes=CLASSES, aux_logits=True, init_weights=False)), 64),
    "timm vit": (timm("vit_tiny_patch16_224", drop_path_rate=0.3, drop_rate=0.1, **SMALL_VIT), 32),
    "timm convnext": (timm("convnext_atto", drop_path_rate=0.3, drop_rate=0.1, **SMALL_CONVNEXT), 32),
}

METHODS = {
    "MC dropout": lambda networks: vbdl.MCDropout(networks[0], p=0.1),
    "mean-field": lambda networks: vbdl.MeanField(networks[0], ROWS),
    "ensemble": lambda networks: vbdl.DeepEnsemble(networks),
}


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("method", METHODS)
def test_trained_and_predicted_as_a_plain_loop_would(method, name):
    make, size = NETWORKS[name]
    torch.manual_seed(0)
    networks = [make(), make()] if method == "ensemble" else [make()]
    if method == "MC dropout" and name == "resnet18":
        networks[0].fc = torch.nn.Sequential(torch.nn.Dropout(0.1), networks[0].fc)
    x, y = torch.randn(ROWS, 3, size, size), torch.randint(CLASSES, (ROWS,))
    q, likelihood = METHODS[method](networks), vbdl.Categorical()
    vbdl.fit(q, (x, y), likelihood, epochs=1, batch_size=4, compile=False)
    n = None if method == "ensemble" else 2
    predictor = vbdl.Predictor(q, likelihood, n, compile=False, tiles=ROWS, joint=True)
    samples = predictor(x, samples=True).samples
    model = predictor.executions.drawing(predictor.check(x))[0].traced.model
    for draw in range(len(samples)):
        entries = model.entries(torch.tensor([draw]), 0)
        with torch.no_grad():
            expected = functional_call(model, {n: t[0] for n, t in entries.items()}, (x,))
        torch.testing.assert_close(samples[draw], expected, rtol=1e-4, atol=1e-5)
    if method == "ensemble":
        for number, network in enumerate(networks):
            network.load_state_dict(q.member(number), strict=False)
            with torch.no_grad():
                torch.testing.assert_close(samples[number], network.eval()(x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", NETWORKS)
def test_fresh_members_begin_as_the_constructor_initializes_them(name):
    torch.manual_seed(0)
    network = NETWORKS[name][0]()
    q = vbdl.DeepEnsemble(network, 2)
    for n, p in network.named_parameters():
        given, (one, two) = p.detach(), q.stacked()[n].detach()
        if bool((given == given.flatten()[0]).all()):
            assert torch.equal(one, given) and torch.equal(two, given), n
            continue
        assert not torch.equal(one, two), n
        if p.numel() > 100:
            torch.testing.assert_close(one.std(), given.std(), rtol=0.3, atol=0)


@pytest.mark.parametrize("name", ["vit", "timm convnext"])
def test_trained_networks_that_offer_no_initialization_name_the_lines_to_write(name):
    network = NETWORKS[name][0]()
    for m in network.modules():
        if isinstance(m, torch.nn.LayerNorm):
            torch.nn.init.normal_(m.weight, 1.0, 0.1)
    with pytest.raises(ValueError, match=r"members = \[make_network\(\)"):
        vbdl.DeepEnsemble(network, 2)


def stochastic_depth():
    models = pytest.importorskip("torchvision.models")
    settings = [models.convnext.CNBlockConfig(8, 16, 2), models.convnext.CNBlockConfig(16, None, 2)]
    network = models.ConvNeXt(settings, stochastic_depth_prob=0.5, layer_scale=1.0, num_classes=CLASSES)
    return network, pytest.importorskip("torchvision.ops").StochasticDepth


def drop_path():
    network = timm("convnext_atto", drop_path_rate=0.5, ls_init_value=1.0, **SMALL_CONVNEXT)()
    return network, pytest.importorskip("timm.layers").DropPath


@pytest.mark.parametrize("make", [stochastic_depth, drop_path])
def test_stochastic_depth_is_drawn_on_request(make):
    torch.manual_seed(0)
    (network, kind), x, n = make(), torch.randn(3, 3, 32, 32), 400
    q = vbdl.Stochastic(network, noisy=[kind])
    samples = vbdl.Predictor(q, vbdl.Categorical(), n, tiles=3, compile=False)(x, samples=True).samples
    network.eval()
    for m in network.modules():
        m.training = isinstance(m, kind)
    with torch.no_grad():
        own = torch.stack([network(x) for _ in range(n)])
    assert len(samples[:, 0].unique(dim=0)) > 4
    error = (samples.var(0) + own.var(0)).div(n).sqrt()
    assert float(((samples.mean(0) - own.mean(0)).abs() / error).max()) < 5
