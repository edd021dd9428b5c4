"""The strategy "plain": what cannot be traced is predicted and trained as it is, with the draws of every strategy."""

import copy
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from torch import nn

import vbdl
from vbdl.calling.stacking import call
from vbdl.engine import ways
from vbdl.engine.execution import Execution
from vbdl.engine.predictor import Predictor

ROUNDING = {"rtol": 1e-5, "atol": 2e-6}


class Branching(nn.Module):
    """Chooses a layer by a value of each row."""

    def __init__(self):
        super().__init__()
        self.small, self.large = nn.Linear(6, 3), nn.Linear(6, 3)
        self.body = nn.Sequential(nn.Linear(6, 6), nn.Tanh(), nn.Dropout(0.3))

    def forward(self, x):
        x = self.body(x)
        return torch.stack([self.small(r) if float(r.detach().sum()) < 0 else self.large(r) for r in x])


class Routed(nn.Module):
    """A sparse mixture of experts: each expert gets the rows that are routed to it, by boolean indexing."""

    def __init__(self):
        super().__init__()
        self.drop = nn.Dropout(0.2)
        self.gate, self.experts = nn.Linear(6, 3), nn.ModuleList([nn.Linear(6, 3) for _ in range(3)])

    def forward(self, x):
        x = self.drop(x)
        chosen = self.gate(x).argmax(-1)
        out = x.new_zeros(len(x), 3)
        for number, expert in enumerate(self.experts):
            rows = chosen == number
            if rows.any():
                out[rows] = expert(x[rows])
        return out


class Packed(nn.Module):
    """An LSTM of two layers on a packed sequence, whose length is the number of entries other than 0."""

    def __init__(self, packed=True):
        super().__init__()
        self.packed = packed
        self.rnn, self.head = nn.LSTM(1, 5, 2, dropout=0.4, batch_first=True), nn.Linear(5, 3)

    def forward(self, x):
        lengths = (x != 0).sum(1).clamp(min=1)
        sequence = x.unsqueeze(2)
        if self.packed:
            sequence = nn.utils.rnn.pack_padded_sequence(
                sequence, lengths.cpu(), batch_first=True, enforce_sorted=False
            )
            return self.head(self.rnn(sequence)[1][0][-1])
        steps = self.rnn(sequence)[0]
        return self.head(steps[torch.arange(len(x)), lengths - 1])


class Differentiated(nn.Module):
    """The derivative of a network by its input, as in a physics-informed network."""

    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Dropout(0.2), nn.Linear(8, 3))

    def forward(self, x):
        x = x.requires_grad_()
        u = self.body(x)
        (slope,) = torch.autograd.grad(u.sum(), x, create_graph=True)
        return u + slope.mean(1, keepdim=True)


NETWORKS = [Branching, Routed, Packed, Differentiated]
METHODS = {
    "dropout": vbdl.MCDropout,
    "mean-field": lambda net: vbdl.MeanField(net, n_data=40, initial_std=0.1),
    "ensemble": lambda net: vbdl.DeepEnsemble(net, 3),
}


def rows(count, seed=0):
    x = torch.randn(count, 6, generator=torch.Generator().manual_seed(seed))
    x[:, -1] = 0.0  # a shorter sequence for `Packed`
    x[count // 2 :, -2] = 0.0
    return x


def by_hand(q, x, n_samples, seed=0):
    """The network's outputs of each draw, by a loop."""
    q.eval()
    q.prepare(x)
    state = q.draws(torch.arange(n_samples), seed)
    shared = q.shared()
    each = []
    for s in range(n_samples):
        with torch.enable_grad():
            one = {n: t[s].detach() for n, t in state.items()}
            each.append(call(q.module, {**{n: t.detach() for n, t in shared.items()}, **one}, x.clone()).detach())
    return torch.stack(each)


@pytest.mark.parametrize("kind", NETWORKS)
@pytest.mark.parametrize("method", METHODS)
def test_what_cannot_be_traced_is_trained_and_predicted(kind, method, tmp_path):
    """Through fit, prediction, draws, densities, steps of draws, and storage; against a loop over the draws."""
    x, y = rows(40), torch.arange(40) % 3
    q, likelihood = METHODS[method](kind()), vbdl.Categorical()
    vbdl.fit(q, (x, y), likelihood, epochs=2, batch_size=20, progress=False)
    n = 3
    predict = Predictor(q, likelihood, n_samples=n, tiles=(8,), joint=True)
    p = predict(x[:8], samples=True)
    torch.testing.assert_close(p.samples, by_hand(q, x[:8], n), **ROUNDING)
    torch.testing.assert_close(p.probs, p.samples.softmax(-1).mean(0), **ROUNDING)
    expected = p.samples.log_softmax(-1)[:, torch.arange(8), y[:8]].logsumexp(0) - torch.tensor(float(n)).log()
    torch.testing.assert_close(predict.log_prob(x[:8], y[:8]), expected, **ROUNDING)
    torch.testing.assert_close(predict(x[:8], deadline=1e6).probs, p.probs, **ROUNDING)
    assert "the network as it is" in predict.explain()
    with pytest.raises(ValueError, match="cannot be traced"):
        predict.export(tmp_path / "package", example=x[:8])


@pytest.mark.parametrize("kind", [Branching, Packed])
def test_the_reason_is_said(kind):
    said = Predictor(vbdl.DeepEnsemble(kind(), 2), vbdl.Categorical()).explain(rows(4))
    assert "cannot be traced" in said or "recurrent" in said


def test_a_packed_sequence_has_the_masks_of_the_padded_one():
    padded, packed = Packed(packed=False), Packed()
    packed.load_state_dict(padded.state_dict())
    for x in (rows(7), rows(1)):
        a, b = (
            Predictor(vbdl.MCDropout(net), vbdl.Categorical(), 9)(x, samples=True).samples for net in (padded, packed)
        )
        torch.testing.assert_close(a, b, **ROUNDING)


class Attends(nn.Module):
    """Dropout on elements, inside attention, where the batch is folded behind the heads, and on channels."""

    def __init__(self):
        super().__init__()
        self.drop = nn.Dropout(0.2)
        self.attention = nn.MultiheadAttention(8, 2, dropout=0.3, batch_first=True)
        self.channels, self.head = nn.Dropout1d(0.5), nn.Linear(8, 3)

    def forward(self, x):
        x = self.drop(x)
        x = x + self.attention(x, x, x)[0]
        return self.head(self.channels(x).mean(1))


class Recurrent(nn.Module):
    def __init__(self, batch_first=True):
        super().__init__()
        self.first = batch_first
        self.rnn, self.drop = nn.GRU(8, 7, 3, dropout=0.4, batch_first=batch_first), nn.AlphaDropout(0.2)
        self.head = nn.Linear(7, 3)

    def forward(self, x):
        out = self.rnn(x if self.first else x.transpose(0, 1))[0]
        return self.head(self.drop(out[:, -1] if self.first else out[-1]))


class Convolves(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Conv1d(5, 6, 3), nn.BatchNorm1d(6), nn.ReLU(), nn.Dropout1d(0.5), nn.Flatten())
        self.head = nn.Sequential(nn.Dropout(0.5), nn.Linear(36, 3))

    def forward(self, x):
        return self.head(self.body(x))


@pytest.mark.parametrize("make", [Attends, Recurrent, lambda: Recurrent(batch_first=False), Convolves])
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("count", [1, 5])
def test_the_strategies_have_the_same_draws(make, method, count, monkeypatch):
    """As a graph, as it is draw after draw, and as it is with the rows repeated for each draw."""
    x, q = torch.randn(count, 5, 8), METHODS[method](make().eval())
    n = 3 if method == "ensemble" else 11
    samples = {}
    for name, verdict in (("graph", ways.GRAPH), ("as it is", ways.PLAIN)):
        monkeypatch.setattr("vbdl.engine.execution.before_tracing", lambda *_, verdict=verdict: (verdict, "said"))
        predict = Predictor(q, vbdl.Categorical(), n, seed=7, compile=False, joint=True)
        samples[name] = predict(x, samples=True)
        torch.testing.assert_close(predict(x, samples=True).samples, samples[name].samples)  # what is kept is the same
        assert ("as it is" in predict.explain()) == (name == "as it is")
        assert ("repeated" in predict.explain()) == (name == "as it is" and method == "dropout")
    for field in ("samples", "probs", "total", "aleatoric", "epistemic", "standard_error"):
        a, b = (getattr(samples[name], field) for name in samples)
        torch.testing.assert_close(a, b, **ROUNDING)


def test_draws_that_exceed_the_budget_are_made_again(monkeypatch):
    monkeypatch.setattr("vbdl.engine.execution.before_tracing", lambda *_: (ways.PLAIN, "said"))
    q, x = vbdl.MeanField(Convolves(), n_data=10), torch.randn(2, 5, 8)
    kept, again = (Predictor(q, vbdl.Categorical(), 9, memory_budget=size) for size in (2**30, 2**12))
    for predict in (kept, again):
        predict(x)
    torch.testing.assert_close(kept(x).probs, again(x).probs, rtol=0, atol=0)
    sizes = [len(next(iter(p.executions.by_shape.values()))[0]._plain._kept) for p in (kept, again)]
    assert sizes[0] == 9 and sizes[1] < 9


class Counts(nn.Module):
    """Writes into a buffer in every forward, and reads it."""

    def __init__(self):
        super().__init__()
        self.inner = nn.Linear(6, 3)
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x):
        self.calls += 1
        if float(self.calls) < 0:
            raise AssertionError
        return self.inner(x) + self.calls


def test_what_a_forward_writes_is_undone():
    net = Counts().eval()
    predict, x = Predictor(vbdl.DeepEnsemble([net, Counts().eval()]), vbdl.Categorical()), rows(4)
    first = predict(x, samples=True).samples
    torch.testing.assert_close(predict(x, samples=True).samples, first, rtol=0, atol=0)
    torch.testing.assert_close(first[0], net.inner(x) + 1)
    assert float(net.calls) == 0


class TopOfThree(nn.Module):
    """A sparse mixture: each row goes to two of three experts, whose weighted outputs are added."""

    def __init__(self):
        super().__init__()
        self.gate, self.experts = nn.Linear(6, 3), nn.ModuleList(nn.Linear(6, 3) for _ in range(3))

    def forward(self, x):
        weights, chosen = self.gate(x).softmax(-1).topk(2)
        out = x.new_zeros(len(x), 3)
        for number, expert in enumerate(self.experts):
            row, place = self.where(chosen == number)
            if len(row):
                out = out.index_add(0, row, weights[row, place, None] * expert(x[row]))
        return out

    def where(self, flags):
        return flags.nonzero(as_tuple=True)


class TopByWhere(TopOfThree):
    def where(self, flags):
        return torch.where(flags)


class EarlyExit(nn.Module):
    """A row whose first head is sure does not run the second."""

    def __init__(self):
        super().__init__()
        self.body, self.early, self.late = nn.Linear(6, 6), nn.Linear(6, 3), nn.Linear(6, 3)

    def forward(self, x):
        h = torch.tanh(self.body(x))
        first = self.early(h)
        unsure = first.detach().softmax(-1).amax(-1) < 0.45
        return torch.stack([self.late(h[i]) if bool(unsure[i]) else first[i] for i in range(len(x))])


@pytest.mark.parametrize("compile", [False, "background"])
@pytest.mark.parametrize("make", [TopOfThree, TopByWhere, EarlyExit, Branching, Routed])
def test_a_row_has_the_same_drawn_weights_alone_and_in_any_batch(make, compile):
    torch.manual_seed(0)
    q, x = vbdl.MeanField(make(), n_data=10, initial_std=0.2).eval(), rows(9)
    predict = Predictor(q, vbdl.Categorical(), n_samples=5, compile=compile)
    whole = predict(x, samples=True).samples
    for batch in (x.split(1), x.split(2), (x.flip(0),)):
        found = torch.cat([predict(part, samples=True).samples for part in batch], 1)
        torch.testing.assert_close(found.flip(1) if len(batch) == 1 else found, whole, **ROUNDING)


class Halves(nn.Module):
    """Writes into one of its parameters whenever it runs."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(6, 8), nn.Linear(8, 3)

    def forward(self, x):
        with torch.no_grad():
            self.first.weight.mul_(0.5)
        return self.second(torch.tanh(torch.einsum("bi,oi->bo", x, self.first.weight) + self.first.bias))


@pytest.mark.parametrize("count", [1, 4])
def test_what_a_forward_writes_into_drawn_weights_is_undone(count):
    q, x = vbdl.MeanField(Halves(), n_data=10).eval(), rows(count)
    background = Predictor(q, vbdl.Categorical(), n_samples=5, compile="background")
    never = Predictor(q, vbdl.Categorical(), n_samples=5, compile=False)
    expected = never(x, samples=True).samples
    for _ in range(3):
        torch.testing.assert_close(background(x, samples=True).samples, expected, **ROUNDING)
    background.wait()


def test_inputs_get_the_gradient_of_the_loop():
    q, x = vbdl.DeepEnsemble(Branching(), 3), rows(5).requires_grad_()
    predict = Predictor(q, vbdl.Categorical())
    predict(x).probs[:, 0].sum().backward()
    given, x = x.grad, rows(5).requires_grad_()
    q.eval()
    state = q.draws(torch.arange(3), 0)
    each = [call(q.module, {n: t[s] for n, t in state.items()}, x).softmax(-1) for s in range(3)]
    torch.stack(each).mean(0)[:, 0].sum().backward()
    torch.testing.assert_close(given, x.grad)


def test_threads_get_their_own_rows():
    predict = Predictor(vbdl.MCDropout(Branching()), vbdl.Categorical(), 5)
    batches = [rows(3, seed) for seed in range(8)]
    alone = [predict(x).probs for x in batches]
    with ThreadPoolExecutor(4) as pool:
        for a, b in zip(pool.map(lambda x: predict(x).probs, batches), alone, strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=0)


@pytest.mark.parametrize("clearly, strategy", [(0.0, "plain"), (float("inf"), "stacked")])
@pytest.mark.parametrize("compile", [True, "background"])
def test_the_faster_way_is_kept_where_both_are_timed(clearly, strategy, compile, monkeypatch, traced_only):
    monkeypatch.setattr("vbdl.engine.execution._CLEARLY", clearly)
    nets, x = [Convolves().eval() for _ in range(3)], torch.randn(4, 5, 8)
    predict = Predictor(vbdl.DeepEnsemble(nets), vbdl.Categorical(), compile=compile)
    expected = torch.stack([net(x).softmax(-1) for net in nets]).mean(0)
    for _ in range(2):
        torch.testing.assert_close(predict(x).probs, expected, **ROUNDING)
        predict.wait()
    (execution,) = next(iter(predict.executions.by_shape.values()))
    assert execution.plan.strategy == strategy
    assert "so both were timed" in predict.explain() and "ms as it is" in predict.explain()


class Large(nn.Module):
    """A convolution of so many channels, 3 x 3, and a linear layer."""

    def __init__(self, channels: int):
        super().__init__()
        self.convolution = nn.Conv2d(channels, channels, 3, padding=1)
        self.last = nn.Linear(channels, 2)

    def forward(self, x):
        return self.last(self.convolution(x).mean((-1, -2)).relu())


@pytest.mark.parametrize(
    "channels, compile, plain",  # 9 and 17 MiB of weights
    [(512, False, False), (704, False, True), (704, "background", True)],
)
def test_convolutions_with_more_weights_than_a_cache_are_not_traced(channels, compile, plain, monkeypatch):
    nets = [Large(channels).eval() for _ in range(2)]
    traced, trace = [], Execution._graph
    monkeypatch.setattr(Execution, "_graph", lambda self: traced.append(self) or trace(self))
    predict = vbdl.Predictor(vbdl.DeepEnsemble(nets), vbdl.Categorical(), compile=compile, tiles=2)
    x = torch.randn(2, channels, 1, 1)
    first = predict.warm_up(2, example=x)(x).mean
    assert bool(traced) == (not plain) == ("more weights than a cache holds" not in predict.explain())
    torch.testing.assert_close(first, torch.stack([net(x).softmax(-1) for net in nets]).mean(0))


def test_one_network_is_traced_whatever_its_weights():
    predict = vbdl.Predictor(vbdl.Deterministic(Large(704).eval()), vbdl.Categorical(), compile=False)
    x = torch.randn(2, 704, 1, 1)
    predict(x)
    assert "more weights than a cache holds" not in predict.explain()


def laid_out(predict: vbdl.Predictor) -> bool:
    """Whether the large weights of all members are held with channels last."""
    return all(t.is_contiguous(memory_format=torch.channels_last) for t in held_apart(predict))


def held_apart(predict: vbdl.Predictor) -> list[torch.Tensor]:
    """The large weights of all members."""
    posterior: Any = predict.posterior
    return vars(posterior.stacked_parameters)["_parameters"].source._apart["convolution/weight"]


def large_ensemble(compile: bool | str, **settings: Any) -> tuple[vbdl.DeepEnsemble, vbdl.Predictor]:
    torch.manual_seed(0)
    q = vbdl.DeepEnsemble([Large(704).eval() for _ in range(2)])
    return q, vbdl.Predictor(q, vbdl.Categorical(), compile=compile, **settings)


@pytest.mark.parametrize("compile", [True, "background"])
def test_weights_of_convolutions_that_nobody_else_holds_are_laid_out_with_channels_last(compile):
    q, predict = large_ensemble(compile, tiles=(1, 2))
    x = torch.randn(2, 704, 1, 2)
    expected = large_ensemble(False)[1](x).mean
    sizes = [t.untyped_storage().nbytes() for t in held_apart(predict)]
    assert "with channels last" in predict.warm_up((1, 2), example=x).explain()
    assert laid_out(predict) and [t.untyped_storage().nbytes() for t in held_apart(predict)] == sizes
    for rows in (x, x[:1]):
        torch.testing.assert_close(predict(rows).mean, expected[: len(rows)])
    plains: list[Any] = [execution._plain for (execution,) in predict.executions.by_shape.values()]  # type: ignore[union-attr]
    assert len(plains) == 2 and all(plain._convolutions == ["network.convolution.weight"] for plain in plains)
    assert all(t.is_contiguous() for t in q.member(0).values())
    weight = q.stacked()["convolution.weight"]
    assert weight.is_contiguous()
    with torch.no_grad():
        weight.add_(1.0)
    torch.testing.assert_close(predict(x).mean, expected)


class LargeWithAView(Large):
    """Wants a view of its weight for some rows, which a weight with channels last does not have."""

    def forward(self, x):
        if x.max() > 50:
            return super().forward(x) + self.convolution.weight.view(-1).sum()
        return super().forward(x)


def test_a_network_that_needs_its_own_layout_later_gets_it_back():
    nets = [LargeWithAView(704).eval() for _ in range(2)]
    states = [copy.deepcopy(net) for net in nets]
    predict = vbdl.Predictor(vbdl.DeepEnsemble(nets), vbdl.Categorical(), tiles=1)
    del nets
    x = torch.randn(1, 704, 1, 2)
    predict.warm_up(1, example=x)
    assert laid_out(predict)
    with pytest.raises(ValueError, match="inputs are"):
        predict(x.double())
    assert laid_out(predict)
    for rows in (x, x + 100, x):
        expected = torch.stack([net(rows).softmax(-1) for net in states]).mean(0)
        torch.testing.assert_close(predict(rows).mean, expected, rtol=1e-4, atol=1e-5)
    assert not laid_out(predict)


def test_weights_that_a_network_lends_stay_as_they_are():
    nets = [Large(704).eval() for _ in range(2)]
    predict = vbdl.Predictor(vbdl.DeepEnsemble(nets), vbdl.Categorical(), tiles=1)
    x = torch.randn(1, 704, 1, 2)
    assert "with channels last" not in predict.warm_up(1, example=x).explain() and not laid_out(predict)
    torch.testing.assert_close(predict(x).mean, torch.stack([net(x).softmax(-1) for net in nets]).mean(0))


def test_a_predictor_that_compiles_nothing_lays_out_nothing():
    _, predict = large_ensemble(False, tiles=1)
    predict(torch.randn(1, 704, 1, 2))
    assert not laid_out(predict)


def test_weights_are_laid_out_while_others_predict():
    _, predict = large_ensemble("background", tiles=1)
    x = torch.randn(1, 704, 4, 4)
    first = predict(x).mean
    with ThreadPoolExecutor(3) as pool:
        answers = [pool.submit(lambda: predict(x).mean) for _ in range(30)]
        predict.wait()
        answers += [pool.submit(lambda: predict(x).mean) for _ in range(3)]
        for answer in answers:
            torch.testing.assert_close(answer.result(), first)
    assert laid_out(predict) and "with channels last" in predict.explain()


def test_a_laid_out_ensemble_is_saved_and_trained_further(tmp_path):
    q, predict = large_ensemble("background", tiles=1)
    x = torch.randn(3, 704, 1, 2)
    before = predict.warm_up(1, example=x)(x).mean
    predict.save(tmp_path / "saved", example=x)
    loaded = vbdl.load(tmp_path / "saved", module=Large(704))
    torch.testing.assert_close(loaded(x).mean, before)
    vbdl.fit(q, (x, torch.tensor([0, 1, 0])), vbdl.Categorical(), epochs=1, compile=False, progress=False)
    torch.testing.assert_close(predict(x).mean, before)
    assert not torch.allclose(vbdl.Predictor(q, vbdl.Categorical(), compile=False)(x).mean, before)


class Flattens(Large):
    """A network that asks for a view which outputs with channels last do not have."""

    def forward(self, x):
        outputs = self.convolution(x)
        return self.last(outputs.view(len(x), -1).view(len(x), 704, -1).mean(-1).relu())


class Swapped(Large):
    """A network whose numbers depend on how memory is laid out."""

    def forward(self, x):
        outputs = self.convolution(x)
        return self.last(outputs.as_strided((len(x), 704), (outputs[0].numel(), 1)))


@torch.no_grad()
@pytest.mark.parametrize("kind", [Flattens, Swapped])
@pytest.mark.parametrize("compile", [True, "background"])
def test_a_network_that_needs_its_layout_keeps_it(compile, kind):
    nets = [kind(704).eval() for _ in range(2)]
    x = torch.randn(2, 704, 2, 3)
    expected = torch.stack([net(x).softmax(-1) for net in nets]).mean(0)
    q = vbdl.DeepEnsemble(nets)
    del nets
    predict = vbdl.Predictor(q, vbdl.Categorical(), compile=compile, tiles=2)
    for _ in range(2):
        torch.testing.assert_close(predict(x).mean, expected)
        predict.warm_up(2, example=x)
    assert not laid_out(predict) and "channels last" not in predict.explain()


@torch.no_grad()
def test_another_shape_that_needs_its_layout_is_predicted_too():
    nets = [Flattens(704).eval() for _ in range(2)]
    small, large = torch.randn(2, 704, 1, 1), torch.randn(2, 704, 2, 3)
    expected = [torch.stack([net(x).softmax(-1) for net in nets]).mean(0) for x in (small, large)]
    q = vbdl.DeepEnsemble(nets)
    del nets
    predict = vbdl.Predictor(q, vbdl.Categorical(), compile=True, tiles=2)
    for _ in range(2):
        for x, probs in zip((small, large), expected, strict=True):
            torch.testing.assert_close(predict(x).mean, probs)
    assert predict.explain().count("channels last") == 1


class Sorted(nn.Module):
    """Packs its sequences, which torch takes by falling length unless told otherwise."""

    def __init__(self):
        super().__init__()
        self.rnn, self.head = nn.GRU(2, 5, batch_first=True), nn.Linear(5, 3)

    def forward(self, x, lengths):
        packed = nn.utils.rnn.pack_padded_sequence(x, lengths, batch_first=True)
        return self.head(self.rnn(packed)[1][0])


@pytest.mark.parametrize("compile", [False, "background"])
def test_rows_that_must_keep_their_order_are_predicted(compile):
    nets, x, lengths = [Sorted().eval(), Sorted().eval()], torch.randn(4, 6, 2), torch.tensor([6, 4, 3, 1])
    predict = Predictor(vbdl.DeepEnsemble(nets), vbdl.Categorical(), compile=compile, tiles=4)
    expected = torch.stack([net(x, lengths) for net in nets])
    torch.testing.assert_close(predict((x, lengths), samples=True).samples, expected)


class Columns(nn.Module):
    """Each column of whole numbers has an embedding of its own, and each row of shares sums to 1."""

    def __init__(self):
        super().__init__()
        self.few, self.many, self.head = nn.Embedding(3, 4), nn.Embedding(100, 4), nn.Linear(4, 3)

    def forward(self, ids, shares):
        if not torch.allclose(shares.sum(-1), torch.ones(len(shares))):
            raise ValueError("shares must sum to 1")
        return self.head(self.few(ids[:, 0]) * shares[:, :1] + self.many(ids[:, 1]) * shares[:, 1:])


@pytest.mark.parametrize("count", [1, 2, 5])
@pytest.mark.parametrize("compile", [False, "background"])
def test_networks_are_tried_on_rows_that_they_take(count, compile):
    ids = torch.stack((torch.arange(count) % 3, torch.arange(count) * 7 + 90 - 7 * (count - 1)), 1)
    shares = torch.rand(count, 2).softmax(-1)
    nets = [Columns().eval(), Columns().eval()]
    predict = Predictor(vbdl.DeepEnsemble(nets), vbdl.Categorical(), compile=compile, tiles=count)
    expected = torch.stack([net(ids, shares) for net in nets])
    for _ in range(2):
        torch.testing.assert_close(predict((ids, shares), samples=True).samples, expected)
        predict.wait()


def test_a_graph_holds_no_weights_of_the_first_run():
    q = vbdl.MeanField(nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3)), n_data=10).eval()
    predict = Predictor(q, vbdl.Categorical(), n_samples=5, compile=False, joint=True)
    predict(rows(2))
    (execution,) = predict.executions.drawing(next(predict.tiles_of(predict.check(rows(2)))))
    assert execution._plain is None and execution._first.run is None and not execution._first._kept
