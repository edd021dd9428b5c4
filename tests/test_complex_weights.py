"""Every method trains complex weights with the others; those that draw real ones alone say so, or refuse by name."""

import pytest
import torch
from torch import nn

import vbdl
from vbdl.methods import METHODS

DRAWN = {"mean-field", "ivon", "swag", "laplace"}  # weights from a normal distribution, of real numbers
X = torch.randn(24, 6, generator=torch.Generator().manual_seed(0))
Y = (X[:, 0] > 0).long()
WORDS = r"'body.weight' is complex.*requires_grad_\(False\).*view_as_complex.*DeepEnsemble or vbdl.MCDropout"


class Complex(nn.Module):
    """A complex linear layer, then dropout, noise and a real one."""

    def __init__(self, last=False):
        super().__init__()
        self.body, self.drop, self.noisy = nn.Linear(6, 4, dtype=torch.cfloat), nn.Dropout(0.2), False
        self.head = nn.Identity() if last else nn.Linear(4, 2)

    def forward(self, x):
        h = self.drop(self.body(x.to(torch.cfloat)).abs())
        return self.head(h + 0.1 * torch.randn(4, device=h.device) if self.noisy else h)


class Parts(Complex):
    """The same weights as one real parameter of their real and imaginary parts."""

    def __init__(self):
        super().__init__()
        del self.body
        self.parts = nn.Parameter(torch.randn(4, 6, 2) * 0.3)

    def body(self, x):
        return x @ torch.view_as_complex(self.parts).mT


def posterior(name, network, **options):
    network.noisy = name == "stochastic"
    options |= {"augment": lambda x: x + 0.1 * torch.randn_like(x)} if name == "tta" else {}
    options |= {"parameters": "all"} if name == "laplace" and "parameters" not in options else {}
    known = {"n_data": len(X), "n_members": 2, "collect_from": 0.0}
    arguments = {n: v for n, v in known.items() if n in METHODS[name].arguments}
    return METHODS[name].load()(network, **arguments, **options)


def fitted(q, **options):
    vbdl.fit(q, (X, Y), vbdl.Categorical(), batch_size=8, compile=False, progress=False, **options)
    return q


@pytest.mark.parametrize("name", METHODS)
def test_complex_weights_are_trained(name):
    torch.manual_seed(0)
    network = Complex()
    if name in DRAWN:
        with pytest.warns(UserWarning, match=r"complex parameters are trained and not drawn.*body.weight, body.bias"):
            q = posterior(name, network)
        assert set(q.module.chosen) == {"head.weight", "head.bias"}
        for p in (*network.head.parameters(), *network.parameters()):  # nothing else to draw
            p.requires_grad_(p.is_complex())
        with pytest.raises(ValueError, match=WORDS):
            posterior(name, network)
        if name == "laplace":  # of a network that is trained
            return
    else:
        q = posterior(name, network)
    fitted(q, epochs=2, lr=0.05)
    found = [t for t in q.state_dict().values() if t.shape[-2:] == (4, 6) and t.is_complex()]
    assert found and all(bool((t != network.body.weight).all()) for t in found)
    assert vbdl.Predictor(q, vbdl.Categorical(), compile=False)(X).probs.isfinite().all()


@pytest.mark.parametrize("name", sorted(DRAWN))
@pytest.mark.parametrize("how", ["frozen", "parts"])
def test_what_the_refusal_says_is_taken(name, how):
    """Frozen complex weights stay as they are; real and imaginary parts are drawn as other weights are."""
    torch.manual_seed(0)
    network = Complex() if how == "frozen" else Parts()
    if how == "frozen":
        network.body.requires_grad_(False)
    q = fitted(posterior(name, network), epochs=0 if name == "laplace" else 2)
    assert ("parts" in q.module.chosen) == (how == "parts")
    predicted = vbdl.Predictor(q, vbdl.Categorical(), 4, compile=False, joint=True)(X, samples=True)
    assert (predicted.samples.std(0) > 0).all()


@pytest.mark.parametrize("name", ["mean-field", "ivon", "laplace"])
def test_weights_that_are_chosen_are_checked_alone(name):
    q = posterior(name, Complex(), parameters=["head"])
    assert set(q.module.chosen) == {"head.weight", "head.bias"}
    with pytest.raises(ValueError, match=WORDS):
        posterior(name, Complex(), parameters=["body"])


def test_a_complex_last_layer_is_refused():
    with pytest.raises(ValueError, match=WORDS):
        vbdl.Laplace(Complex(last=True))
