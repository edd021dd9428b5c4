"""Rows that are not finite or of another dtype are predicted and trained on where the network takes them."""

import pytest
import torch
from torch import nn

import vbdl

NAN, INF = float("nan"), float("inf")


class Masked(nn.Module):
    """Attention with a float mask of padding, which torch adds to the scores: -inf where it may not look."""

    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Linear(1, 8), nn.Linear(8, 3)
        self.layer = nn.TransformerEncoderLayer(8, 2, 16, 0.2, batch_first=True)

    def forward(self, x, mask):
        return self.last(self.layer(self.first(x[..., None]), src_key_padding_mask=mask).mean(1))


class Missing(nn.Module):
    """NaN is a missing value, for which there is an input of its own."""

    def __init__(self):
        super().__init__()
        self.dense = nn.Sequential(nn.Linear(12, 16), nn.ReLU(), nn.Dropout(0.2), nn.Linear(16, 3))

    def forward(self, x):
        return self.dense(torch.cat([x.nan_to_num(), x.isnan().float()], dim=1))


class Converts(nn.Module):
    """The forward converts its rows."""

    def __init__(self, inside: torch.dtype = torch.float32):
        super().__init__()
        self.first, self.inside = nn.Linear(6, 16).to(inside), inside
        self.last = nn.Sequential(nn.ReLU(), nn.Dropout(0.2), nn.Linear(16, 3))

    def forward(self, x):
        return self.last(self.first(x.to(self.inside)).float())


def masked() -> tuple[torch.Tensor, torch.Tensor]:
    mask = torch.zeros(5, 6)
    mask[1, 4:] = mask[4, 2:] = -INF
    return torch.randn(5, 6), mask


def missing() -> torch.Tensor:
    x = torch.randn(5, 6)
    x[0, 1] = x[3] = NAN
    return x


CASES = {
    "a mask of -inf": (Masked, masked),
    "NaN for missing values": (Missing, missing),
    "float64 rows": (Converts, lambda: torch.randn(5, 6).double()),
    "float16 rows": (Converts, lambda: torch.randn(5, 6).half()),
    "a float64 layer": (lambda: Converts(torch.float64), lambda: torch.randn(5, 6)),
    "a bfloat16 layer": (lambda: Converts(torch.bfloat16), lambda: torch.randn(5, 6)),
}
METHODS = {
    "dropout": vbdl.MCDropout,
    "ensemble": lambda net: vbdl.DeepEnsemble([net, net]),
    "mean-field": lambda net: vbdl.MeanField(net, n_data=100),
}


def rows_of(x, which):
    return tuple(t[which] for t in x) if isinstance(x, tuple) else x[which]


@pytest.mark.parametrize("compile", ["background", False])
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("case", CASES)
def test_rows_that_the_network_takes_are_predicted(case, method, compile):
    make, rows = CASES[case]
    torch.manual_seed(0)
    net, x = make().eval(), rows()
    predict = vbdl.Predictor(METHODS[method](net), vbdl.Categorical(), 2, compile=compile)
    probs = predict(x).probs
    assert probs is not None and bool(probs.isfinite().all())
    near = 2e-3 if case == "a bfloat16 layer" else 1e-5  # a bit of bfloat16, which one batch rounds and another not
    if method == "ensemble":
        expected = net(*x) if isinstance(x, tuple) else net(x)
        torch.testing.assert_close(probs, expected.softmax(-1), rtol=0.0, atol=near)
    torch.testing.assert_close(predict(rows_of(x, slice(0, 2))).probs, probs[:2], rtol=0.0, atol=near)
    torch.testing.assert_close(predict.wait()(x).probs, probs, rtol=0.0, atol=near)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("case", CASES)
def test_rows_that_the_network_takes_are_trained_on(case, method):
    make, rows = CASES[case]
    torch.manual_seed(0)
    q, x = METHODS[method](make()), rows()
    before = [p.clone() for p in q.parameters()]
    vbdl.fit(q, (x, torch.randint(3, (5,))), vbdl.Categorical(), epochs=2, batch_size=2)
    assert all(bool(p.isfinite().all()) for p in q.parameters())
    assert any(not torch.equal(p, b) for p, b in zip(q.parameters(), before, strict=True))


def plain() -> nn.Module:
    return Converts().last[1:]  # dropout and a linear layer


@pytest.mark.parametrize("value", [NAN, INF, -INF])
@pytest.mark.parametrize("method", METHODS)
def test_rows_that_make_no_finite_numbers_are_named(method, value):
    x = torch.randn(5, 16)
    x[3, 2] = value
    predict = vbdl.Predictor(METHODS[method](plain()), vbdl.Categorical(), 2, compile=False)
    predict(x[:3])
    for call in (predict, lambda x: predict.log_prob(x, torch.zeros(5, dtype=torch.int64))):
        with pytest.raises(
            ValueError, match="1 of 5 rows are not finite, the first is row 3, and the network makes no"
        ):
            call(x)
    with pytest.raises(ValueError, match="1 input rows are not finite, the first is row 3"):
        vbdl.fit(METHODS[method](plain()), (x, torch.zeros(5, dtype=torch.int64)), vbdl.Categorical(), epochs=1)


class Replaces(nn.Module):
    """NaN is replaced, infinity is not."""

    def __init__(self):
        super().__init__()
        self.dense = plain()

    def forward(self, x):
        return self.dense(x.masked_fill(x.isnan(), 0.0))


def test_each_row_is_asked_for():
    predict = vbdl.Predictor(vbdl.MCDropout(Replaces()), vbdl.Categorical(), 2, compile=False)
    x = torch.randn(5, 16)
    x[1, 2] = NAN
    predict(x)
    x[4, 2] = INF
    with pytest.raises(ValueError, match="2 of 5 rows are not finite, the first is row 1"):
        predict(x)


class ReplacesInOneColumn(Replaces):
    """NaN is replaced in the first column alone."""

    def forward(self, x):
        return self.dense(torch.cat([x[:, :1].nan_to_num(), x[:, 1:]], dim=1))


@pytest.mark.parametrize("call", ["predict", "log_prob", "with a deadline"])
@pytest.mark.parametrize("method", METHODS)
def test_a_kind_of_row_that_was_taken_before_may_be_refused(method, call):
    predict = vbdl.Predictor(METHODS[method](ReplacesInOneColumn()), vbdl.Categorical(), 2, compile=False)
    calls = {
        "predict": predict,
        "log_prob": lambda x: predict.log_prob(x, torch.zeros(5, dtype=torch.int64)),
        "with a deadline": lambda x: predict(x, deadline=10.0),
    }
    x = torch.randn(5, 16)
    x[1, 0] = NAN
    calls[call](x)
    x[3, 1] = NAN
    with pytest.raises(ValueError, match="2 of 5 rows are not finite, the first is row 1"):
        calls[call](x)
    x[3, 1] = 0.0
    calls[call](x)


@pytest.mark.parametrize("value", [INF, -INF])
@pytest.mark.parametrize("layer", [nn.Tanh, nn.Sigmoid, nn.Hardtanh, nn.Softsign])
@pytest.mark.parametrize("method", METHODS)
def test_a_layer_that_saturates_does_not_take_infinity(method, layer, value):
    make = lambda: nn.Sequential(nn.Linear(6, 8), nn.Dropout(0.2), layer(), nn.Linear(8, 3))
    x = torch.randn(5, 6)
    x[2, 1] = value
    with pytest.raises(ValueError, match="1 of 5 rows are not finite, the first is row 2"):
        vbdl.Predictor(METHODS[method](make()), vbdl.Categorical(), 2)(x)
    with pytest.raises(ValueError, match="1 input rows are not finite, the first is row 2"):
        vbdl.fit(METHODS[method](make()), (x, torch.zeros(5, dtype=torch.int64)), vbdl.Categorical(), epochs=1)


def test_batches_of_a_loader_that_the_network_takes_are_trained_on():
    rows = torch.utils.data.TensorDataset(missing(), torch.ones(5, dtype=torch.int64))
    loader = torch.utils.data.DataLoader(rows, batch_size=2)
    vbdl.fit(vbdl.MCDropout(Missing()), loader, vbdl.Categorical(), epochs=1)


def test_another_dtype_that_the_network_does_not_take_is_named():
    predict = vbdl.Predictor(vbdl.MCDropout(plain()), vbdl.Categorical(), 2, compile=False)
    with pytest.raises(ValueError, match=r"inputs are torch.float64 and the module's parameters torch.float32"):
        predict(torch.randn(5, 16).double())
    with pytest.raises(ValueError, match=r"inputs are torch.float64 and the module's parameters torch.float32"):
        vbdl.fit(vbdl.MCDropout(plain()), (torch.randn(5, 16).double(), torch.zeros(5).long()), vbdl.Categorical())
