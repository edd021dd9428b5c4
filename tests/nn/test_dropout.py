"""Every kind of dropout is found, has torch's own statistics, and one mask a draw that the whole batch shares."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from vbdl.calling.stacking import call, call_stacked, select
from vbdl.engine.predictor import Predictor
from vbdl.likelihoods.gaussian import Gaussian
from vbdl.nn.may_drop import may_drop
from vbdl.posteriors.mc_dropout import MCDropout
from vbdl.posteriors.mean_field import MeanField
from vbdl.posteriors.stochastic import Stochastic

P = 0.3
ROUNDING = {"rtol": 0.0, "atol": 1e-5}  # float32 sums of a few dozen terms of order 1


class Calls(nn.Module):
    """A module whose forward is this function of the module and its input."""

    def __init__(self, function, **modules):
        super().__init__()
        self.function = function
        for name, module in modules.items():
            self.add_module(name, module)

    def forward(self, *args):
        return self.function(self, *args)


def draw(module, *x, n=5, seed=0, **settings):
    """Outputs of n draws, (n, ...), one call after the other: what vmap cannot take is looked at as well."""
    q = MCDropout(module, **settings).eval()
    q.prepare(x)
    state = q.draws(torch.arange(n), seed)
    with torch.no_grad():
        return torch.stack([call(q.module, select(state, s), x) for s in range(n)])


def mapped(module, x, n, **settings):
    q = MCDropout(module, **settings).eval()
    q.prepare(x)
    with torch.no_grad():
        return call_stacked(q.module, q.draws(torch.arange(n), 0), {}, x)


functional = lambda m, x: F.dropout(x, P, m.training)
ELEMENTS = {
    "Dropout": (nn.Dropout(P), (3, 17)),
    "Dropout inplace": (nn.Dropout(P, inplace=True), (3, 17)),
    "F.dropout": (Calls(functional), (3, 17)),
    "torch.dropout": (Calls(lambda m, x: torch.dropout(x, P, m.training)), (3, 17)),
    "Dropout of an image": (nn.Dropout(P), (3, 2, 5, 7)),
    "AlphaDropout": (nn.AlphaDropout(P), (3, 17)),
}
CHANNELS = {
    "Dropout1d": (nn.Dropout1d(P), (3, 17, 5)),
    "Dropout2d": (nn.Dropout2d(P), (3, 17, 5, 2)),
    "Dropout2d inplace": (nn.Dropout2d(P, inplace=True), (3, 17, 5, 2)),
    "Dropout3d": (nn.Dropout3d(P), (3, 17, 5, 2, 1)),
    "FeatureAlphaDropout": (nn.FeatureAlphaDropout(P), (3, 17, 5, 2)),
}


@pytest.mark.parametrize("kind", [*ELEMENTS, *CHANNELS])
def test_the_values_and_the_rate_are_torchs_own(kind):
    module, shape = {**ELEMENTS, **CHANNELS}[kind]
    n = 1000
    found = mapped(module, torch.ones(shape), n)
    own = module.train()(torch.ones(5000, *shape[1:]))
    values = torch.unique(own)
    assert len(values) == 2
    torch.testing.assert_close(torch.unique(found), values, rtol=1e-6, atol=0)
    # each draw has 17 or 70 units of its own: a rate within four standard errors
    units = found[:, 0] if kind in ELEMENTS else found[:, 0].flatten(2)[..., 0]
    dropped = (units.flatten() - values[0]).abs() < 1e-5
    if not math.isclose(float(dropped.double().mean()), P, abs_tol=4 * math.sqrt(P * (1 - P) / dropped.numel())):
        raise AssertionError(f"{float(dropped.double().mean())} of the units are dropped")


@pytest.mark.parametrize("kind", [*ELEMENTS, *CHANNELS])
def test_a_mask_is_shared_by_the_batch_and_new_in_every_draw(kind):
    module, shape = {**ELEMENTS, **CHANNELS}[kind]
    found = mapped(module, torch.ones(shape), 11)
    assert torch.equal(found, found[:, :1].expand_as(found))
    assert len(torch.unique(found.flatten(1), dim=0)) == 11
    more = mapped(module, torch.ones(7, *shape[1:]), 11)
    assert torch.equal(more[:, :3], found), "masks depend on the size of the batch"


@pytest.mark.parametrize("kind", CHANNELS)
def test_channels_are_dropped_whole(kind):
    module, shape = CHANNELS[kind]
    found = mapped(module, torch.ones(shape), 11).flatten(3)
    assert torch.equal(found, found[..., :1].expand_as(found))
    assert len(torch.unique(found[..., 0])) == 2


def test_moments_of_a_dropped_sum():
    """sum_i w_i x_i m_i / (1 - p): mean sum w x, variance p / (1 - p) sum (w x)^2."""
    linear = nn.Linear(19, 1, bias=False)
    x, n = torch.randn(2, 19), 20_000
    found = mapped(nn.Sequential(nn.Dropout(P), linear), x, n).double().squeeze(-1)
    terms = (linear.weight.detach() * x).double()
    mean, variance = terms.sum(1), P / (1 - P) * terms.square().sum(1)
    # four standard errors of a mean and of a variance of nearly normal values
    assert bool(((found.mean(0) - mean).abs() < 4 * (variance / n).sqrt()).all())
    assert bool(((found.var(0) - variance).abs() < 4 * variance * math.sqrt(2 / n)).all())


# -- networks: nothing random is missed


class Attention(nn.Module):
    def __init__(self, batch_first=True, **kwargs):
        super().__init__()
        self.attention = nn.MultiheadAttention(6, 2, dropout=P, batch_first=batch_first, **kwargs)
        self.batch_first = batch_first

    def forward(self, x):
        x = x if self.batch_first else x.transpose(0, 1)
        out = self.attention(x, x, x)[0]
        return out if self.batch_first else out.transpose(0, 1)


def sdpa(m, x):
    q = x.unflatten(-1, (2, 3)).transpose(1, 2)
    return F.scaled_dot_product_attention(q, q, q, dropout_p=P if m.training else 0.0).transpose(1, 2).flatten(2)


def encoder(batch_first):
    layer = nn.TransformerEncoderLayer(6, 2, 11, dropout=P, batch_first=batch_first)
    stack = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
    return stack if batch_first else Calls(lambda m, x: m.stack(x.transpose(0, 1)).transpose(0, 1), stack=stack)


def rnn(kind, **settings):
    return Calls(lambda m, x: m.rnn(x)[0], rnn=kind(6, 5, num_layers=2, dropout=P, batch_first=True, **settings))


NETWORKS = {
    "MultiheadAttention": Attention(),
    "MultiheadAttention, length first": Attention(batch_first=False),
    "scaled_dot_product_attention": Calls(sdpa),
    "TransformerEncoder": encoder(True),
    "TransformerEncoder, length first": encoder(False),
    "LSTM": rnn(nn.LSTM),
    "LSTM, both ways": rnn(nn.LSTM, bidirectional=True),
    "LSTM, projected": rnn(nn.LSTM, proj_size=3),
    "GRU": rnn(nn.GRU),
    "RNN": rnn(nn.RNN),
    "RNN of relu": rnn(nn.RNN, nonlinearity="relu"),
    "F.dropout, length first": Calls(lambda m, x: F.dropout(x.transpose(0, 1), P, m.training).transpose(0, 1)),
    "F.dropout of flat time": Calls(lambda m, x: F.dropout(x.flatten(0, 1), P, m.training).view(x.shape)),
    "Dropout2d of flat time": Calls(
        lambda m, x: F.dropout2d(x.flatten(0, 1)[..., None, None], P, m.training).view(x.shape)
    ),
}


@pytest.mark.parametrize("name", NETWORKS)
def test_nothing_random_is_missed_and_rows_stay_apart(name):
    module, x = NETWORKS[name], torch.randn(5, 7, 6)
    found = draw(module, x)
    assert bool((found.std(0).flatten(1).amax(1) > 1e-3).all()), "a row without spread"
    alone = draw(module, x[3:4])
    torch.testing.assert_close(alone, found[:, 3:4], **ROUNDING)
    backwards = draw(module, x.flip(0))
    torch.testing.assert_close(backwards.flip(1), found, **ROUNDING)


@pytest.mark.parametrize("name", NETWORKS)
def test_rate_zero_is_the_deterministic_network(name):
    module, x = NETWORKS[name], torch.randn(5, 7, 6)
    q = MCDropout(module, p=0.0).eval()
    with torch.no_grad():
        torch.testing.assert_close(q.module(x), module.eval()(x), **ROUNDING)


# variants in layout or shape alone, whose means are their neighbors'
VARIANTS = [n for n in NETWORKS if any(part in n for part in ("flat", "RNN of", "projected"))]


@pytest.mark.parametrize("name", sorted({*NETWORKS} - {*VARIANTS, "TransformerEncoder, length first"}))
def test_the_mean_is_torchs_own(name):
    """Against torch's dropout, 1000 independent passes of each: five standard errors of every output."""
    module, x, n = NETWORKS[name], torch.randn(1, 7, 6), 1000
    ours = draw(module, x, n=n).double()
    module.train()
    with torch.no_grad():
        torchs = torch.stack([module(x) for _ in range(n)]).double()
    # where nearly always the same value comes out the standard error is no guide
    spread = ((ours.var(0) + torchs.var(0)) / n).sqrt() + 1e-4
    assert float(((ours.mean(0) - torchs.mean(0)) / spread).abs().max()) < 5
    ratio = ours.var(0).mean() / torchs.var(0).mean()
    assert 0.85 < float(ratio) < 1.15  # each mean of variances is known to about 4 %


# -- attention: the formulas are torch's own when nothing is dropped


CASES = {
    "self": dict(),
    "other widths of key and value": dict(kdim=5, vdim=11),
    "bias_k": dict(add_bias_kv=True),
    "add_zero_attn": dict(add_zero_attn=True),
    "no bias": dict(bias=False),
}


@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("masking", ["none", "bool", "float", "per head", "padding", "both", "causal"])
@pytest.mark.parametrize("case", CASES)
def test_attention_is_torchs_own(case, masking, batch_first):
    if masking == "causal" and case in ("bias_k", "add_zero_attn"):
        pytest.skip("until torch's causal shortcut knows the added source: its own answer depends on need_weights")
    module = nn.MultiheadAttention(6, 2, dropout=P, batch_first=batch_first, **CASES[case]).eval()
    batch, length, source = 3, 5, 5 if masking == "causal" else 7
    widths = (6, CASES[case].get("kdim", 6), CASES[case].get("vdim", 6))
    q, k, v = (torch.randn(batch, n, w) for n, w in zip((length, source, source), widths, strict=True))
    if not batch_first:
        q, k, v = (t.transpose(0, 1) for t in (q, k, v))
    attend = {
        "bool": torch.rand(length, source) > 0.7,
        "float": torch.randn(length, source),
        "per head": torch.rand(batch * 2, length, source) > 0.7,
        "both": torch.rand(length, source) > 0.8,
        "causal": torch.ones(length, source, dtype=torch.bool).triu(1),
    }.get(masking)
    if attend is not None and attend.dtype == torch.bool:
        attend[..., 0] = False  # something is always left to look at
    padding = torch.zeros(batch, source, dtype=torch.bool)
    padding[1, -2:] = True
    settings = dict(
        attn_mask=attend,
        key_padding_mask=padding if masking in ("padding", "both") else None,
        is_causal=masking == "causal",
    )
    for more in (dict(), dict(average_attn_weights=False), dict(need_weights=False)):
        expected, weights = module(q, k, v, **settings, **more)
        ours = MCDropout(Calls(lambda m, *x, more=more: m.a(*x, **settings, **more), a=module), p=0.0).eval()
        with torch.no_grad():
            out, own = ours.module(q, k, v)
        torch.testing.assert_close(out, expected.detach(), **ROUNDING)
        assert (own is None) == (weights is None)
        if weights is not None:
            torch.testing.assert_close(own, weights.detach(), **ROUNDING)


@pytest.mark.parametrize("masking", ["none", "bool", "float", "causal", "grouped", "scaled", "nothing left"])
def test_scaled_dot_product_attention_is_torchs_own(masking):
    q = torch.randn(3, 4, 5, 7)
    k, v = torch.randn(2, 3, 2 if masking == "grouped" else 4, 5, 7)
    allowed = torch.rand(5, 5) > 0.3
    allowed[:, 0] = True
    if masking == "nothing left":
        allowed[2] = False  # torch gives zeros to a row that may look at nothing
    settings = {
        "bool": dict(attn_mask=allowed),
        "nothing left": dict(attn_mask=allowed),
        "float": dict(attn_mask=torch.randn(5, 5)),
        "causal": dict(is_causal=True),
        "grouped": dict(enable_gqa=True),
        "scaled": dict(scale=0.2),
    }.get(masking, {})
    attend = lambda p: Calls(lambda m, *x: F.scaled_dot_product_attention(*x, dropout_p=p, **settings))
    expected = attend(0.0)(q, k, v)
    # a rate whose every mask keeps everything goes through vbdl's formulas; a rate of zero does not
    q_posterior = MCDropout(attend(1e-9)).eval()
    torch.testing.assert_close(q_posterior.module(q, k, v), expected, **ROUNDING)


def test_attention_drops_weights_of_the_softmax():
    """With one-hot values the output is the dropped attention itself: 0, or softmax / (1 - p)."""
    q, k = torch.randn(2, 3, 2, 5, 7)
    v = torch.eye(5).expand(3, 2, 5, 5)
    attend = Calls(lambda m, *x: F.scaled_dot_product_attention(*x, dropout_p=P))
    found = draw(attend, q, k, v, n=13)
    whole = F.scaled_dot_product_attention(q, k, v)
    kept = found != 0
    torch.testing.assert_close(found, kept * whole / (1 - P), **ROUNDING)
    assert torch.equal(kept, kept[:, :1].expand_as(kept)), "rows of a batch have masks of their own"
    assert 0.6 < float(kept.double().mean()) < 0.8


# -- what can be asked for


class Two(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Dropout(P), nn.Sequential(nn.Dropout(P))

    def forward(self, x):
        return torch.cat([self.first(x), self.second(x)], dim=1)


def share_dropped(found):
    return [float((part == 0).double().mean()) for part in found.chunk(2, dim=2)]


def test_rates_are_overridden_for_all_or_by_name():
    x, n = torch.ones(1, 101), 100
    near = pytest.approx  # 10100 units: four standard errors are 0.02
    assert share_dropped(mapped(Two(), x, n)) == near([P, P], abs=0.02)
    assert share_dropped(mapped(Two(), x, n, p=0.6)) == near([0.6, 0.6], abs=0.02)
    assert share_dropped(mapped(Two(), x, n, p={"second": 0.6})) == near([P, 0.6], abs=0.02)
    assert share_dropped(mapped(Two(), x, n, p={"": 0.1, "second.0": 0.6})) == near([0.1, 0.6], abs=0.02)


@pytest.mark.parametrize("p, expected", [(None, [P, P]), (0.6, [0.6, 0.6]), ({"second": 0.6}, [P, 0.6])])
def test_training_uses_the_same_rates(p, expected):
    """In training a mask is a row's own."""
    seen = []
    net = Calls(lambda m, x: seen.append(m.two(x)) or seen[-1], two=Two())
    if isinstance(p, dict):
        p = {f"two.{name}": rate for name, rate in p.items()}
    MCDropout(net, p=p).train().loss(torch.ones(100, 101), torch.zeros(100, 202), Gaussian(202))
    assert share_dropped(seen[0].unsqueeze(1)) == pytest.approx(expected, abs=0.02)
    assert not torch.equal(seen[0][0], seen[0][1])


@pytest.mark.parametrize("deterministic", [["second"], ["second.0"], [nn.Sequential, "second"]])
def test_named_modules_stay_deterministic(deterministic):
    first, second = share_dropped(mapped(Two(), torch.ones(1, 101), 100, deterministic=deterministic))
    assert first == pytest.approx(P, abs=0.02) and second == 0.0


def test_chosen_types_stay_deterministic():
    net = nn.Sequential(nn.AlphaDropout(P), nn.Dropout(P))
    found = mapped(net, torch.ones(1, 101), 7, deterministic=[nn.AlphaDropout])
    torch.testing.assert_close(found.unique(), torch.tensor([0.0, 1 / (1 - P)]))


def test_normalization_evaluates():
    """A row's output does not depend on its batch, and no running statistic moves."""
    norm = nn.BatchNorm1d(5)
    norm.running_mean.normal_()
    net = nn.Sequential(nn.Linear(3, 5), norm, nn.Dropout(P)).train()
    q = MCDropout(net).eval()
    before = q.module.inner[1].running_mean.clone()
    x = torch.randn(7, 3)
    torch.testing.assert_close(draw(net, x)[:, 2:3], draw(net, x[2:3]), **ROUNDING)
    q.prepare(x)
    q.module(x)
    assert torch.equal(q.module.inner[1].running_mean, before)
    assert torch.equal(net[1].running_mean, norm.running_mean) and net.training


@pytest.mark.parametrize("wrap", [nn.utils.spectral_norm, nn.utils.parametrizations.spectral_norm])
def test_spectral_norm_evaluates(wrap):
    net = nn.Sequential(wrap(nn.Linear(3, 5)), nn.Dropout(P))
    q = MCDropout(net).eval()
    before = {n: t.clone() for n, t in q.module.inner.state_dict().items()}
    q.prepare(torch.randn(7, 3))
    q.module(torch.randn(7, 3))
    for name, t in q.module.inner.state_dict().items():
        assert torch.equal(t, before[name]), name


# -- what cannot be handled says so, and where


@pytest.mark.parametrize(
    "random",
    [
        lambda m, x: x + torch.randn_like(x),
        lambda m, x: x + torch.rand(x.shape[-1]),
        lambda m, x: x * torch.bernoulli(torch.full_like(x, 0.5)),
        lambda m, x: x * x.new_empty(x.shape).bernoulli_(0.5),
        lambda m, x: x + torch.zeros_like(x).normal_(),
        lambda m, x: F.gumbel_softmax(x),
        lambda m, x: torch.native_dropout(x, 0.5, True)[0],
        # what torch hands to a mode as one call draws too
        lambda m, x: x + nn.init.uniform_(torch.empty(1, x.shape[-1])),
        lambda m, x: x + nn.init.kaiming_uniform_(torch.empty(1, x.shape[-1])),
        lambda m, x: x + torch.svd_lowrank(nn.Parameter(torch.eye(9)), 1)[1],
        lambda m, x: x + torch.pca_lowrank(nn.Parameter(torch.eye(9)), 1)[1],
        lambda m, x: x + torch.lobpcg(nn.Parameter(torch.eye(9)), 1)[0],
    ],
)
def test_other_randomness_raises_and_names_the_place(random):
    net = nn.Sequential(nn.Dropout(P), nn.Sequential(Calls(random)))
    for start in (lambda: MCDropout(net).prepare(torch.ones(3, 5)), lambda: predictor(net)(torch.ones(3, 5))):
        with pytest.raises((NotImplementedError, ValueError), match=r"module '1\.0'"):
            start()


def predictor(net, outputs=5, **settings):
    return Predictor(MCDropout(net, **settings), Gaussian(outputs), n_samples=3, compile=False)


def test_a_packed_sequence_is_masked_between_its_layers():
    """By the rate of the layer, or one that overrides it; with one mask for all rows, by step in time."""

    def packed(m, x):
        lengths = torch.tensor([x.shape[1]] * x.shape[0])
        return m.rnn(nn.utils.rnn.pack_padded_sequence(x, lengths, batch_first=True))[1][0][-1]

    dropping = Calls(packed, rnn=nn.LSTM(6, 5, 2, dropout=P, batch_first=True))
    overridden = Calls(packed, rnn=nn.LSTM(6, 5, 2, batch_first=True), drop=nn.Dropout(P))
    for q, rate in ((MCDropout(dropping), P), (MCDropout(overridden, p=0.2), 0.2)):
        q.prepare(torch.randn(3, 7, 6))
        assert [(site.path, site.p, site.shape, site.axis) for site in q.module.sites] == [("rnn", rate, (7, 5), None)]
    plain = Calls(
        lambda m, x: m.drop(packed(m, x)), rnn=nn.LSTM(6, 5, 2, dropout=P, batch_first=True), drop=nn.Dropout(P)
    )
    found = draw(plain, torch.randn(3, 7, 6), deterministic=["rnn"])
    assert float(found.std(0).max()) > 0.01


def test_a_module_without_dropout_is_refused_at_once():
    with pytest.raises(ValueError, match="add nn.Dropout"):
        MCDropout(nn.Sequential(nn.Linear(3, 5), nn.ReLU(), nn.LSTM(5, 7, 2)))


@pytest.mark.parametrize(
    "net, settings",
    [
        (nn.Sequential(nn.Linear(5, 5), nn.Dropout(0.0)), {}),
        (nn.Sequential(nn.Linear(5, 5), nn.Dropout(P)), {"p": 0.0}),
        (nn.Sequential(nn.Linear(5, 5), nn.Dropout(P)), {"deterministic": ["1"]}),
        (Calls(lambda m, x: x, unused=nn.Dropout(P)), {}),
        (Calls(lambda m, x: F.dropout(x, P, False)), {}),
    ],
)
def test_a_module_whose_dropout_does_nothing_is_refused_when_run(net, settings):
    with pytest.raises(ValueError, match="every sample would be the same"):
        predictor(net, **settings)(torch.randn(3, 5))


@pytest.mark.parametrize("p", [-0.1, 1.0, 1.5, float("nan"), {"0": 2.0}])
def test_a_rate_that_is_none_is_refused(p):
    with pytest.raises(ValueError, match=r"\[0, 1\)"):
        MCDropout(nn.Sequential(nn.Dropout(P)), p=p)


@pytest.mark.parametrize("settings", [{"p": {"head": 0.1}}, {"deterministic": ["head"]}])
def test_a_name_that_fits_nothing_is_refused(settings):
    with pytest.raises(ValueError, match="no module 'head'; there are \\['0'\\]"):
        MCDropout(nn.Sequential(nn.Dropout(P)), **settings)


@pytest.mark.parametrize("chosen, words", [("0", r"got '0': write \['0'\]"), (nn.Dropout, r"write \[Dropout\]")])
def test_one_name_or_type_in_place_of_a_list_is_refused(chosen, words):
    """A name that was read by its letters could fit other modules."""
    net = nn.Sequential(nn.Dropout(P), nn.Linear(3, 3))
    with pytest.raises(TypeError, match=f"deterministic must be a list.*{words}"):
        MCDropout(net, deterministic=chosen)
    with pytest.raises(TypeError, match=f"parameters must be a list.*{words}"):
        MeanField(net, 10, parameters=chosen)


class Experts(nn.Module):
    """Each row goes to one expert, whose dropout is called for its rows alone."""

    def __init__(self):
        super().__init__()
        self.experts = nn.ModuleList(nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Dropout(P)) for _ in range(3))

    def forward(self, x):
        chosen = (x[:, 0] > 0).long() + (x[:, 0] > 1).long()
        out = x.new_zeros(len(x), 8)
        for number, expert in enumerate(self.experts):
            rows = (chosen == number).nonzero().squeeze(-1)
            if len(rows):
                out = out.index_add(0, rows, expert(x[rows]))
        return out


def time_first(m, x):
    """Time folded in front of the batch, so that the masks of a row are no block."""
    return F.dropout(x.transpose(0, 1).reshape(-1, 6), P, m.training).view(7, -1, 6).transpose(0, 1)


def rows_of_experts():
    x = torch.randn(6, 6)
    x[:, 0] = torch.tensor([-1.0, 2.0, 0.5, -1.0, 2.0, 0.5])
    return x


def copies_first(count):
    """The batch repeated, with a mask for each copy, and a sum over the copies, for which the order of masks is one."""
    return lambda m, x: F.dropout(x.repeat(count, 1), P, m.training).view(count, -1, 6).sin().mean(0)


ROW_BY_ROW = {
    **{f"{n} copies": (lambda n=n: Calls(copies_first(n)), lambda: torch.randn(6, 6)) for n in (2, 3, 4, 5)},
    "experts": (Experts, rows_of_experts),
    "folded": (lambda: Calls(time_first), lambda: torch.randn(5, 7, 6)),
}


@pytest.mark.parametrize("rows", [1, 2, 3, 4])
def test_copies_of_the_batch_are_predicted_in_any_batch(rows):
    net, x = nn.Sequential(Calls(copies_first(4)), nn.Linear(6, 5)), torch.randn(7, 6)
    predict = predictor(net)
    torch.testing.assert_close(predict(x[:rows]).mean, predictor(net)(x).mean[:rows], **ROUNDING)


@pytest.mark.parametrize("name", ROW_BY_ROW)
def test_rows_that_cannot_share_masks_run_one_after_the_other(name):
    torch.manual_seed(0)
    make, inputs = ROW_BY_ROW[name]
    net, x = make(), inputs()
    q = MCDropout(net).eval()
    q.prepare(x)
    keys = q.draws(torch.arange(1000), 0)["key"]
    own = net.train()
    with torch.no_grad():
        together = torch.stack([call(q.module, {"key": key}, x) for key in keys[:4]])
        apart = torch.stack([torch.cat([call(q.module, {"key": key}, row) for row in x.split(1)]) for key in keys[:4]])
        assert torch.equal(together, apart), "a row has the same draws in any batch"
        assert not torch.equal(together[0], together[1])
        ours = torch.stack([call(q.module, {"key": key}, x[:2]) for key in keys])
        theirs = torch.stack([own(x[:2]) for _ in keys])
    error = ((ours.var(0) + theirs.var(0)) / len(keys)).sqrt()
    assert float(((ours.mean(0) - theirs.mean(0)).abs() / error.clamp_min(1e-6)).max()) < 5
    ratio = ours.std(0) / theirs.std(0).clamp_min(1e-6)
    assert float((ratio - 1).abs()[theirs.std(0) > 1e-3].max()) < 0.25  # some standard errors of a std of 1000 draws


def over_edges(x):  # the entries of a row are no block of the masked axis
    return F.dropout(x.transpose(0, 1).flatten(0, 1), 0.0).unflatten(0, (7, -1)).transpose(0, 1)


def for_some_rows(x):
    return F.dropout(x, 0.0) if bool(x[-1].sum() > 0) else x


def of_other_lengths(x):
    return x.masked_scatter(x.abs() > 0.5, F.dropout(x[x.abs() > 0.5], 0.0))


@pytest.mark.parametrize("idle", [over_edges, for_some_rows, of_other_lengths])
@pytest.mark.parametrize("method", [MCDropout, Stochastic])
def test_a_call_that_drops_nothing_is_no_reason_to_run_rows_apart(method, idle):
    x = torch.randn(5, 7, 6, generator=torch.Generator().manual_seed(0))
    x[0], x[-1] = x[0].abs() + 1, -x[-1].abs()  # the first row takes another way than the last one

    def answer(idle):
        predict = Predictor(
            method(Calls(lambda m, x: F.dropout(idle(x), P, True).sum((1, 2)).unsqueeze(1))),
            Gaussian(1),
            n_samples=5,
            compile=False,
        )
        return predict(x, samples=True).samples, predict.explain()

    found, how = answer(idle)
    assert "one after the other" not in how or "cannot be traced" in how
    torch.testing.assert_close(found, answer(lambda x: F.dropout(x, 0.0))[0], **ROUNDING)


@pytest.mark.parametrize("first", [[0], [1], [0, 1, 2, 3, 4, 5]])
def test_draws_of_experts_do_not_depend_on_the_rows_that_came_first(first):
    torch.manual_seed(0)
    net, x = Experts(), rows_of_experts()
    expected = draw(net, x)
    predict = Predictor(MCDropout(net), Gaussian(8), len(expected), compile=False)
    torch.testing.assert_close(predict(x[first]).mean, expected[:, first].mean(0))
    torch.testing.assert_close(predict(x).mean, expected.mean(0))


def test_experts_run_once_for_all_rows():
    net, x, calls = Experts(), rows_of_experts(), []
    predict = Predictor(MCDropout(net), Gaussian(8), 4, compile=False)
    expected = predict(x).mean
    hook = nn.modules.module.register_module_forward_pre_hook(lambda m, _: calls.append(type(m)))
    for rows in (6, 5):
        calls.clear()
        torch.testing.assert_close(predict(x[:rows]).mean, expected[:rows])
        assert calls.count(Experts) == 4  # one call a draw
    hook.remove()
    kept = Predictor(MCDropout(net), Gaussian(8), 4, compile=False, batch_invariant=True)
    torch.testing.assert_close(kept(x).mean, expected)


class OfCapacity(Experts):
    """Experts that take four rows at most, and answer the others with zeros."""

    def forward(self, x):
        out = x.new_zeros(len(x), 8)
        chosen = (x[:, 0] > 0).long()
        for number, expert in enumerate(self.experts[:2]):
            rows = (chosen == number).nonzero().squeeze(-1)[:4]
            if len(rows):
                out = out.index_add(0, rows, expert(x[rows]))
        return out


def test_experts_of_a_capacity_answer_each_row_as_alone():
    torch.manual_seed(0)
    x = torch.randn(8, 6)
    x[:, 0] = torch.tensor([-1.0, 1.0]).repeat(4)
    full = x.clone()
    full[:, 0] = -1.0  # all rows go to the first expert
    predict = Predictor(MCDropout(OfCapacity()), Gaussian(8), 4, compile=False, tiles=(1, 8))
    for batch in (x, full, x):
        alone = torch.cat([predict(row).mean for row in batch.split(1)])
        torch.testing.assert_close(predict(batch).mean, alone)


def of_lengths(m, x, lengths):
    """The mean of each row's first entries, which are dropped in one axis of all rows together."""
    chosen = torch.arange(x.shape[1]) < lengths.unsqueeze(1)
    dropped = F.dropout(x[chosen], P, m.training)
    row = chosen.nonzero()[:, 0]
    return x.new_zeros(len(x), x.shape[2]).index_add(0, row, dropped)


@pytest.mark.parametrize("first", [0, 1])
def test_rows_of_other_lengths_in_one_axis_have_their_own_masks(first):
    torch.manual_seed(0)
    x, lengths = torch.randn(4, 5, 3), torch.tensor([2, 4, 2, 3])
    q = MCDropout(Calls(of_lengths)).eval()
    q.prepare((x[first : first + 1], lengths[first : first + 1]))
    for key in q.draws(torch.arange(4), 0)["key"]:
        with torch.no_grad():
            together = call(q.module, {"key": key}, (x, lengths))
            for row in range(4):
                alone = call(q.module, {"key": key}, (x[row : row + 1], lengths[row : row + 1]))
                torch.testing.assert_close(alone[0], together[row])
    with torch.no_grad():
        each = torch.stack([call(q.module, {"key": key}, (x, lengths)) for key in q.draws(torch.arange(4), 0)["key"]])
    predict = Predictor(MCDropout(Calls(of_lengths)), Gaussian(3), 4, compile=False, tiles=4)
    predict((x, torch.full((4,), 1)))
    predict((x, torch.full((4,), 2)))
    assert "repeated rows" in predict.explain()
    torch.testing.assert_close(predict((x, lengths)).mean, each.mean(0))


def test_batch_norm_without_statistics_is_refused():
    net = nn.Sequential(nn.BatchNorm1d(5, track_running_stats=False), nn.Dropout(P))
    with pytest.raises(ValueError, match="module '0'.*track_running_stats"):
        MCDropout(net).prepare(torch.randn(3, 5))


def test_may_drop_reads_the_source():
    assert may_drop(nn.Sequential(nn.Linear(3, 3), nn.TransformerEncoderLayer(4, 2, 5)))
    assert not may_drop(nn.Sequential(nn.Linear(3, 3), nn.LSTM(3, 3)))
