"""Networks that read numbers of a draw: what they do is decided for each draw, not for a batch of draws."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import vbdl

DRAWS = 600


class Net(nn.Module):
    """A network whose forward branches in one of these forms; `drop` is what it draws, if it does."""

    def __init__(self, form: Callable[[Tensor], Tensor], drop: float = 0.5, noise: float = 0.0):
        super().__init__()
        self.a, self.b, self.drop = nn.Linear(6, 8), nn.Linear(8, 3), nn.Dropout(drop)
        self.form, self.noise = form, noise

    def forward(self, x: Tensor) -> Tensor:
        weight = self.a.weight + self.noise * torch.randn_like(self.a.weight) if self.noise else self.a.weight
        return self.b(self.form(self.drop(torch.nn.functional.linear(x, weight, self.a.bias))))


def on_a_flag(h: Tensor) -> Tensor:
    return h * 2 if (h[:1] != 0)[0, 0] else h


def on_a_size(h: Tensor) -> Tensor:
    return h / 2 if h.abs().max() > 1.2 else h


def while_large(h: Tensor) -> Tensor:
    while h.norm(dim=1).max() > 1.5:
        h = h * 0.8
    return h


def of_a_count(h: Tensor) -> Tensor:
    k = max(1, int((h > 0).sum(1).max()))
    return torch.zeros_like(h).scatter(1, h.topk(k, 1).indices, 1.0) * h


def by_numpy(h: Tensor) -> Tensor:
    return torch.from_numpy(h.detach().numpy().clip(-0.5, 0.5))


FORMS = [on_a_flag, on_a_size, while_large, of_a_count, by_numpy]
MODES: list[bool | str] = [False, True, "background"]


def check(found: Tensor, passes: Tensor) -> None:
    """Compare (draws, rows, outputs) with as many passes of torch's own."""
    error = (passes.var(0) * 2 / DRAWS).sqrt()
    assert float(((found.mean(0) - passes.mean(0)) / error).square().mean()) < 6
    torch.testing.assert_close(found.var(0), passes.var(0), rtol=0.5, atol=0.0)


def draws(predict: vbdl.Predictor, x: Tensor) -> Tensor:
    samples = predict(x, samples=True).samples
    assert samples is not None
    return samples[..., 0]


@pytest.mark.parametrize("compiled", MODES)
@pytest.mark.parametrize("form", FORMS, ids=lambda form: form.__name__)
def test_dropout_decides_for_each_draw(form, compiled):
    torch.manual_seed(0)
    net, x = Net(form), torch.randn(1, 6)
    predict = vbdl.Predictor(vbdl.MCDropout(net), vbdl.Gaussian(3), n_samples=DRAWS, compile=compiled)
    with torch.no_grad():
        passes = torch.stack([net(x) for _ in range(DRAWS)])
    early = draws(predict, x)
    check(early, passes)
    predict.warm_up(1, example=x, samples=True)
    torch.testing.assert_close(draws(predict, x), early, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("method", ["mean-field", "stochastic"])
@pytest.mark.parametrize("form", FORMS, ids=lambda form: form.__name__)
def test_drawn_weights_decide_for_each_draw(form, method):
    torch.manual_seed(0)
    net, x = Net(form, drop=0.0, noise=0.3 if method == "stochastic" else 0.0).eval(), torch.randn(1, 6)
    q = vbdl.Stochastic(net) if method == "stochastic" else vbdl.MeanField(net, n_data=10, initial_std=0.2)
    predict = vbdl.Predictor(q, vbdl.Gaussian(3), n_samples=DRAWS, compile="background")
    means = {n: p.detach().clone() for n, p in net.named_parameters()}
    passes = []
    with torch.no_grad():
        for _ in range(DRAWS):
            for n, p in net.named_parameters():
                p.copy_(means[n] if method == "stochastic" else means[n] + 0.2 * torch.randn_like(p))
            passes.append(net(x))
    check(draws(predict, x), torch.stack(passes))


@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("method", ["mean-field", "stochastic"])
def test_networks_that_read_no_numbers_draw_outputs(method, rows):
    net = Net(lambda h: h.relu(), drop=0.0, noise=0.3 if method == "stochastic" else 0.0).eval()
    q = vbdl.Stochastic(net) if method == "stochastic" else vbdl.MeanField(net, n_data=10)
    predict = vbdl.Predictor(q, vbdl.Gaussian(3), n_samples=8, compile="background")
    predict(torch.randn(rows, 6))
    assert "repeated" in predict.explain()
    assert "stacked" in predict.wait().explain()


def test_masks_of_the_inputs_may_be_read():
    class Masked(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed, self.drop, self.out = nn.Embedding(9, 8), nn.Dropout(0.3), nn.Linear(8, 3)

        def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
            hidden = self.drop(self.embed(ids))
            return self.out(hidden.mean(1) if bool(mask.all()) else (hidden * mask[..., None]).sum(1))

    x = {"ids": torch.randint(0, 9, (1, 5)), "mask": torch.ones(1, 5, dtype=torch.bool)}
    predict = vbdl.Predictor(vbdl.MCDropout(Masked()), vbdl.Categorical(), compile="background")
    predict.explain(x)
    assert "repeated" in predict.explain()
