"""Training: stacked equals separate, compiled equals eager, resumed equals uninterrupted, bad data is named."""

import copy
import dataclasses
import inspect
import pickle

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, IterableDataset, Subset, TensorDataset

import vbdl
from vbdl.data.rows import holdout
from vbdl.training import fit as train
from vbdl.training.options import TrainingOptions

N, FEATURES, OUTPUTS = 71, 5, 2


class Stream(IterableDataset):
    """Rows one after the other, nobody knows how many."""

    def __init__(self, *columns):
        self.columns = columns

    def __iter__(self):
        yield from zip(*self.columns, strict=True)


def plain(norm: bool = False) -> nn.Sequential:
    # no bias before a normalization: its gradient is pure rounding, which Adam scales to a whole step
    return nn.Sequential(
        nn.Linear(FEATURES, 7, bias=not norm),
        nn.BatchNorm1d(7) if norm else nn.Identity(),
        nn.Tanh(),
        nn.Linear(7, OUTPUTS),
    )


def dropping() -> nn.Sequential:
    return nn.Sequential(nn.Linear(FEATURES, 7), nn.Tanh(), nn.Dropout(0.2), nn.Linear(7, OUTPUTS))


@pytest.fixture
def data() -> tuple[torch.Tensor, torch.Tensor]:
    x = torch.randn(N, FEATURES)
    return x, torch.stack([x[:, 0].sin(), x[:, 1] * x[:, 2]], dim=1) + 0.1 * torch.randn(N, OUTPUTS)


def state(module: nn.Module) -> dict[str, torch.Tensor]:
    return {n: t.detach().clone() for n, t in module.state_dict().items()}


def assert_same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor], **tolerance) -> None:
    assert a.keys() == b.keys()
    for name in a:
        torch.testing.assert_close(a[name], b[name], **tolerance, msg=lambda m, name=name: f"{name}: {m}")


# an ensemble's member is trained in other matrix products than alone: rounding, grown by a hundred steps of Adam
ROUNDING = {"rtol": 2e-4, "atol": 2e-5}

BASES = {
    "plain": lambda seed: plain(),
    "batch-norm": lambda seed: plain(norm=True),
    "dropout": lambda seed: vbdl.MCDropout(dropping(), seed=seed),
    "mean-field": lambda seed: vbdl.MeanField(plain(), N, seed=seed),
}


# stopping early adds to the training and takes nothing from it: without it, networks alone
@pytest.mark.parametrize("name", BASES)
@pytest.mark.parametrize("validation", [None, 0.2])
@pytest.mark.slow_where(cell=lambda p: p["validation"] is None and p["name"] in ("dropout", "mean-field"))
def test_stacked_training_is_training_one_by_one(name, validation, data):
    """Own initialization, order, noise, gradient norm and early stopping: member m is what it would be alone."""
    options = {"epochs": 12, "batch_size": 17, "lr": 1e-2, "clip_norm": 1.0, "compile": False}
    if validation is not None:
        options |= {"validation": (data[0][:20], data[1][:20]), "patience": 2}
    ensemble, likelihood = vbdl.DeepEnsemble(BASES[name](0), 3), vbdl.Gaussian(OUTPUTS)
    history = vbdl.fit(ensemble, data, likelihood, **options)
    for m in range(3):
        alone, own = vbdl.DeepEnsemble(BASES[name](m), 1, seed=m), vbdl.Gaussian(OUTPUTS)
        one = vbdl.fit(alone, data, own, **options, seed=m)
        assert_same(ensemble.member(m), alone.member(0), **ROUNDING)
        torch.testing.assert_close(likelihood.noise_std[m], own.noise_std[0], **ROUNDING)
        if validation is not None:
            assert history.best_epoch[m] == one.best_epoch[0]


@pytest.mark.parametrize("name", ["batch-norm", pytest.param("dropout", marks=pytest.mark.slow), "mean-field"])
def test_compiled_training_is_eager_training(name, data):
    results = []
    for compile in (False, True):
        q, likelihood = vbdl.DeepEnsemble(BASES[name](0), 2), vbdl.Gaussian(OUTPUTS)
        history = vbdl.fit(q, data, likelihood, epochs=4, batch_size=71, lr=1e-2, compile=compile)
        results.append((state(q), state(likelihood), history.train_loss))
    assert history.compile_seconds > 0
    assert_same(results[0][0], results[1][0], **ROUNDING)
    assert_same(results[0][1], results[1][1], **ROUNDING)
    np.testing.assert_allclose(results[0][2], results[1][2], rtol=1e-5)


def test_compiled_gradients_reach_a_fused_optimizer_in_order():
    """A gradient of other strides than its parameter is read in the wrong order by a fused step."""
    x, y = torch.randn(64, 3), torch.randn(64, 2)
    ends = []
    for compile in (False, True):
        q = vbdl.DeepEnsemble(nn.Linear(3, 2, bias=False), 2)
        vbdl.fit(q, (x, y), vbdl.Gaussian(2), epochs=5, batch_size=64, lr=0.1, compile=compile)
        ends.append(q.stacked()["weight"].detach().clone())
    torch.testing.assert_close(*ends, **ROUNDING)


@pytest.mark.parametrize("name", BASES)
def test_a_resumed_run_is_the_uninterrupted_one(name, data, tmp_path):
    options = {
        "batch_size": 17,
        "lr": 1e-2,
        "schedule": "cosine",
        "validation": 0.25,
        "patience": 50,
        "kl_warmup": 5,
        "compile": False,
        "checkpoint_every": 2,
    }
    whole, likelihood = vbdl.DeepEnsemble(BASES[name](0), 2), vbdl.Gaussian(OUTPUTS)
    history = vbdl.fit(whole, data, likelihood, epochs=7, **options)

    path = tmp_path / "run.safetensors"
    first, own = vbdl.DeepEnsemble(BASES[name](0), 2), vbdl.Gaussian(OUTPUTS)

    class Stop(Exception):
        pass

    count, original = 0, train.TrainingRun._epoch

    def interrupted(run, epoch):
        nonlocal count
        count += 1
        if count == 6:  # after the fifth, when the fourth was the last to be saved
            raise Stop
        original(run, epoch)

    train.TrainingRun._epoch = interrupted
    try:
        with pytest.raises(Stop):
            vbdl.fit(first, data, own, epochs=7, checkpoint=path, **options)
    finally:
        train.TrainingRun._epoch = original
    second, again = vbdl.DeepEnsemble(BASES[name](0), 2), vbdl.Gaussian(OUTPUTS)
    resumed = vbdl.fit(second, data, again, epochs=7, checkpoint=path, **options)
    assert_same(state(whole), state(second), rtol=0, atol=0)
    assert_same(state(likelihood), state(again), rtol=0, atol=0)
    assert resumed.train_loss == history.train_loss
    assert resumed.best_epoch == history.best_epoch


def test_a_checkpoint_of_another_model_is_refused(data, tmp_path):
    path = tmp_path / "run.safetensors"
    vbdl.fit(vbdl.DeepEnsemble(plain(), 2), data, vbdl.Gaussian(OUTPUTS), epochs=1, checkpoint=path)
    with pytest.raises(ValueError, match="another model|size"):
        vbdl.fit(vbdl.DeepEnsemble(plain(), 3), data, vbdl.Gaussian(OUTPUTS), epochs=2, checkpoint=path)


def test_a_checkpoint_of_another_optimizer_and_another_file_are_refused(data, tmp_path):
    options = {"epochs": 1, "compile": False, "checkpoint": tmp_path / "run.safetensors"}
    make = lambda: (vbdl.DeepEnsemble(plain(), 2), data, vbdl.Gaussian(OUTPUTS))
    vbdl.fit(*make(), **options)
    with pytest.raises(ValueError, match="another optimizer"):
        vbdl.fit(*make(), **options, optimizer=lambda ps: torch.optim.SGD(ps, lr=0.1))
    options["checkpoint"].write_text("epoch,loss")
    with pytest.raises(ValueError, match="not a checkpoint of vbdl"):
        vbdl.fit(*make(), **options)


def test_members_have_orders_of_their_own(data):
    q = vbdl.DeepEnsemble([net := plain(), copy.deepcopy(net)])  # one start: only the order can part them
    vbdl.fit(q, data, vbdl.Gaussian(OUTPUTS), epochs=1, batch_size=17, compile=False)
    assert not torch.equal(q.stacked()["0.weight"][0], q.stacked()["0.weight"][1])


def test_bootstrap_and_member_rows_choose_the_rows(data):
    seen: list[torch.Tensor] = []

    class Spy(nn.Linear):
        def forward(self, x):
            seen.append(x)
            return super().forward(x)

    rows = torch.tensor([[0, 1, 2], [3, 4, 4]])
    marked = torch.arange(N, dtype=torch.float32).unsqueeze(1)
    q = vbdl.DeepEnsemble(Spy(1, OUTPUTS), 2)
    run = train.TrainingRun(q, (marked, data[1]), vbdl.Gaussian(OUTPUTS), _options(member_rows=rows, batch_size=3))
    x, _ = next(iter(run.data.epoch(0)))
    assert [sorted(m.flatten().tolist()) for m in x] == [[0, 1, 2], [3, 4, 4]]
    run = train.TrainingRun(q, (marked, data[1]), vbdl.Gaussian(OUTPUTS), _options(bootstrap=True, batch_size=N))
    x, _ = next(iter(run.data.epoch(0)))
    drawn = [set(m.flatten().tolist()) for m in x]
    assert drawn[0] != drawn[1] and all(0.5 * N < len(d) < 0.75 * N for d in drawn)  # 1 - 1/e of the rows


def _options(**options):
    return TrainingOptions(compile=False, **options)


def test_options_are_the_arguments_of_fit_with_its_defaults():
    arguments = inspect.signature(vbdl.fit).parameters.values()
    expected = {p.name: p.default for p in arguments if p.kind is p.KEYWORD_ONLY}
    fields = {f.name: f.default for f in dataclasses.fields(TrainingOptions)}
    assert fields.pop("holdout_seed") is None
    assert fields == expected
    with pytest.raises(dataclasses.FrozenInstanceError):
        TrainingOptions().epochs = 3  # type: ignore[misc]


def test_validation_rows_are_not_trained_on(data):
    kept, held = holdout(N, 0.25, seed=3)
    assert not set(kept.tolist()) & set(held.tolist()) and len(kept) + len(held) == N
    run = train.TrainingRun(
        vbdl.DeepEnsemble(nn.Linear(1, OUTPUTS), 2),
        (torch.arange(N, dtype=torch.float32).unsqueeze(1), data[1]),
        vbdl.Gaussian(OUTPUTS),
        _options(validation=0.25),
    )
    assert run.data.validation is not None
    trained = {float(v) for x, _ in run.data.epoch(0) for v in x.flatten()}
    assert trained.isdisjoint(float(v) for v in run.data.validation.all()[0].flatten())


def test_early_stopping_keeps_the_best_epoch(data):
    q, likelihood = vbdl.DeepEnsemble(plain(), 2), vbdl.Gaussian(OUTPUTS)
    held = (torch.randn(40, FEATURES), 5 * torch.randn(40, OUTPUTS))  # noise: training makes it worse
    history = vbdl.fit(q, data, likelihood, epochs=60, lr=3e-2, validation=held, patience=3, compile=False)
    assert history.epochs < 60
    nll = np.array(history.validation_nll)
    assert history.best_epoch == nll.argmin(0).tolist()
    predict = vbdl.Predictor(q, likelihood, compile=False)
    members = predict(held[0], samples=True).samples
    found = [float(likelihood.nll(m, held[1]).mean()) for m in members]
    np.testing.assert_allclose(found, nll.min(0), rtol=1e-5)


def test_kl_warmup_rises_and_ends_where_it_was(data):
    weights = []

    class Watched(vbdl.MeanField):
        def losses(self, *args, **kwargs):
            weights.append(self.kl_weight)
            return super().losses(*args, **kwargs)

    q = Watched(plain(), N)
    q.kl_weight = 0.5
    vbdl.fit(q, data, vbdl.Gaussian(OUTPUTS), epochs=5, batch_size=N, kl_warmup=4, compile=False)
    assert weights == pytest.approx([0.0, 0.125, 0.25, 0.375, 0.5])
    assert q.kl_weight == 0.5


@pytest.mark.parametrize("make", [vbdl.MCDropout, lambda net: vbdl.MeanField(net, N)])
def test_a_loop_of_ones_own_trains_as_fit_does(make, data):
    """q.loss is all that training needs: the same steps by hand."""
    net = dropping()
    q, likelihood = make(net), vbdl.Gaussian(OUTPUTS)
    vbdl.fit(q, data, likelihood, epochs=3, batch_size=N, lr=1e-2, compile=False)
    own, noise = make(net), vbdl.Gaussian(OUTPUTS)
    optimizer = torch.optim.AdamW([*own.parameters(), *noise.parameters()], lr=1e-2, weight_decay=0.0, fused=True)
    own.train()
    for epoch in range(3):
        order = torch.randperm(N, generator=torch.Generator().manual_seed(epoch))
        optimizer.zero_grad()
        own.loss(data[0][order], data[1][order], noise).backward()
        optimizer.step()
    assert_same(state(q), state(own), rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("form", ["arrays", "dataset", "loader", "loader of a stream", "float64 targets", "one column"])
def test_data_in_the_forms_people_have_it(form, data):
    x, y = data
    given, outputs = {
        "arrays": ((x.numpy(), y.numpy()), OUTPUTS),
        "dataset": (TensorDataset(x, y), OUTPUTS),
        "loader": (DataLoader(TensorDataset(x, y), batch_size=17), OUTPUTS),
        "loader of a stream": (DataLoader(Stream(x, y), batch_size=17), OUTPUTS),
        "float64 targets": ((x, y.double()), OUTPUTS),
        "one column": ((x, y[:, 0]), 1),
    }[form]
    net = nn.Sequential(nn.Linear(FEATURES, 7), nn.Tanh(), nn.Linear(7, outputs))
    history = vbdl.fit(vbdl.DeepEnsemble(net, 2), given, vbdl.Gaussian(outputs), epochs=30, lr=1e-2, compile=False)
    assert np.mean(history.train_loss[-1]) < np.mean(history.train_loss[0])


def test_several_inputs_by_position_and_by_name(data, traced_only):
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(2, OUTPUTS), nn.Linear(3, OUTPUTS)

        def forward(self, left, right):
            return self.a(left) + self.b(right)

    x, y = data
    ends = []
    for inputs in ((x[:, :2], x[:, 2:]), {"left": x[:, :2], "right": x[:, 2:]}):
        q, likelihood = vbdl.DeepEnsemble(Two(), 2), vbdl.Gaussian(OUTPUTS)
        vbdl.fit(q, (inputs, y), likelihood, epochs=2, batch_size=17, compile=True)
        ends.append(vbdl.Predictor(q, likelihood, compile=False)(inputs).mean)
    torch.testing.assert_close(*ends, rtol=1e-6, atol=1e-7)


def test_members_of_different_architectures_are_trained(data):
    q, likelihood = vbdl.DeepEnsemble([plain(), nn.Linear(FEATURES, OUTPUTS)]), vbdl.Gaussian(OUTPUTS)
    history = vbdl.fit(q, data, likelihood, epochs=40, lr=1e-2, compile=False)
    assert likelihood.noise_std.shape == (2, OUTPUTS)
    assert len(history.train_loss[-1]) == 2
    assert all(last < first for first, last in zip(history.train_loss[0], history.train_loss[-1], strict=True))
    assert vbdl.Predictor(q, likelihood, compile=False)(data[0]).mean.shape == (N, OUTPUTS)


def test_members_of_different_architectures_hold_out_the_same_rows(data):
    q = vbdl.DeepEnsemble([plain(), nn.Linear(FEATURES, OUTPUTS)])
    vbdl.fit(q, data, vbdl.Gaussian(OUTPUTS), epochs=1, validation=0.2, compile=False)
    assert len(torch.cat([part.training_rows for part in q.parts]).unique()) == N - round(0.2 * N)


def test_torchs_generator_is_left_as_it_was(data):
    net = dropping()
    before = torch.get_rng_state()
    vbdl.fit(vbdl.DeepEnsemble(vbdl.MCDropout(net), 2), data, vbdl.Gaussian(OUTPUTS), epochs=2, compile=False)
    assert torch.equal(before, torch.get_rng_state())


def test_bad_data_is_named(data):
    x, y = data
    q, likelihood = vbdl.DeepEnsemble(plain(), 2), vbdl.Gaussian(OUTPUTS)
    holed = x.clone()
    holed[3, 1] = float("nan")
    late = y.clone()
    late[7] = float("inf")
    for given, words in (
        ((holed, y), "1 input rows are not finite, the first is row 3"),
        ((x, late), "target of row 7 is not finite"),
        ((x, y[:-1]), "disagree on the number of rows"),
        ((x[:0], y[:0]), "no rows"),
        ((x, y[:, :1]), "do not fit outputs"),
        ((x.double(), y), "float64 and the module's parameters torch.float32: convert"),
        (((x * 9).long(), y), r"cannot take rows of .5,. torch.int64.*convert integers .*with x.to.torch.float32"),
        ((x[:, :3], y), r"cannot take rows of .3,. torch.float32: "),
        (DataLoader(TensorDataset(x.double(), y)), "float64 and the module's parameters torch.float32: convert"),
        ("data.csv", "inputs, targets"),
        (DataLoader(TensorDataset(holed, y), batch_size=16), "1 input rows are not finite"),
        (DataLoader(TensorDataset(x, late), batch_size=4), "target of row 3 is not finite"),  # of the second batch
        (DataLoader(TensorDataset(x, x, y)), "must yield .inputs, targets., got a sequence of 3: put several inputs"),
        ([{"x": x, "y": y}, 1, 2], "inputs, targets"),
        (DataLoader([{"x": a, "y": b} for a, b in zip(x, y, strict=True)]), "got a dict of .'x', 'y'"),
        (Subset([{"x": a, "y": b} for a, b in zip(x, y, strict=True)], [0, 1]), "a Dataset must have .*got a dict of"),
        (Stream(x, y), "a DataLoader of it"),
    ):
        with pytest.raises((ValueError, TypeError), match=words):
            vbdl.fit(q, given, likelihood, epochs=1)
    for options, words in (
        ({"epochs": 0}, "epochs"),
        ({"patience": 3}, "validation"),
        ({"patience": 0, "validation": 0.2}, "patience must be at least 1"),
        ({"validation": 1.5}, "between 0 and 1"),
        ({"validation": 1}, "between 0 and 1"),
        ({"clip_norm": -1.0}, "clip_norm must be a positive"),
        ({"kl_warmup": -2}, "kl_warmup must be a number of epochs"),
        ({"checkpoint_every": 0}, "checkpoint_every must be at least 1"),
        ({"batch_size": 0}, "batch_size"),
        ({"schedule": "linear"}, "cosine"),
        ({"schedule": 3}, "cosine"),
        ({"schedule": torch.optim.lr_scheduler.ReduceLROnPlateau}, "ReduceLROnPlateau needs.*StepLR"),
        ({"optimizer": torch.optim.LBFGS}, "LBFGS evaluates.*AdamW or SGD"),
        ({"optimizer": torch.optim.Adafactor}, "Adafactor updates a number by the gradients of others"),
        ({"optimizer": lambda ps: torch.optim.Adafactor(ps, 1e-5)}, "Adafactor updates a number"),
        ({"optimizer": lambda ps: None}, "must return a torch.optim.Optimizer, got NoneType"),
        ({"validation": (x.double(), y)}, "float64 and the module's parameters torch.float32: convert"),
        ({"validation": DataLoader(TensorDataset(x, y))}, "as for validation"),
        ({"member_rows": torch.zeros(3, 2, dtype=torch.int64)}, "member_rows"),
    ):
        with pytest.raises((ValueError, TypeError), match=words):
            vbdl.fit(q, data, likelihood, **{"epochs": 1, **options})
    with pytest.raises(TypeError, match="wrap the network"):
        vbdl.fit(plain(), data, likelihood)
    for wrong, words in ((vbdl.Gaussian, "got the class Gaussian"), (nn.MSELoss(), "got MSELoss")):
        with pytest.raises(TypeError, match=words):
            vbdl.fit(q, data, wrong)
        with pytest.raises(TypeError, match=words):
            vbdl.Predictor(q, wrong)
    with pytest.raises(TypeError, match="function of the parameters.*got an instance of SGD"):
        vbdl.fit(q, data, likelihood, optimizer=torch.optim.SGD(q.parameters()))


@pytest.mark.parametrize(
    "make", [lambda n: vbdl.DeepEnsemble(n, 2), lambda n: vbdl.MeanField(n, N), lambda n: vbdl.DeepEnsemble([n, n])]
)
def test_a_last_batch_of_one_row_is_named_where_it_cannot_be_normalized(make, data):
    q, likelihood = make(plain(norm=True)), vbdl.Gaussian(OUTPUTS)
    with pytest.raises(ValueError, match="module '1' got one row to train on.*batch_size"):
        vbdl.fit(q, data, likelihood, batch_size=N - 1, epochs=1, compile=False)
    vbdl.fit(q, data, likelihood, batch_size=N - 2, epochs=1, compile=False)


def test_a_loss_that_stops_being_finite_is_named(data):
    q = vbdl.DeepEnsemble(plain(), 2)
    with torch.no_grad():
        q.stacked()["0.weight"][1].fill_(float("inf"))
    with pytest.raises(FloatingPointError, match="member 1 .* epoch 0 .*lower lr"):
        vbdl.fit(q, data, vbdl.Gaussian(OUTPUTS), epochs=3, compile=False)


@pytest.mark.parametrize("wrap", [lambda q: q, lambda q: vbdl.DeepEnsemble(q, 2)])
def test_an_interrupted_training_knows_its_rows_and_leaves_the_posterior_usable(data, wrap):
    q, likelihood = wrap(vbdl.MeanField(plain(), N)), vbdl.Gaussian(OUTPUTS)

    def interrupted():
        yield from TensorDataset(*data)
        raise KeyboardInterrupt

    class Once(torch.utils.data.IterableDataset):
        def __iter__(self):
            return interrupted()

        def __len__(self):
            return N

    with pytest.raises(KeyboardInterrupt):
        vbdl.fit(q, DataLoader(Once(), batch_size=16), likelihood, epochs=3, kl_warmup=5, compile=False)
    assert q.kl_weight == 1.0 and not q.training and all(p.grad is None for p in q.parameters())
    with pytest.raises(ValueError, match=r"64 of 71 calibration rows were trained on"):
        vbdl.calibrate(vbdl.Predictor(q, likelihood, compile=False), data, vbdl.StdScaling())


@pytest.mark.parametrize(
    "make", [lambda net: vbdl.DeepEnsemble(net, 2), lambda net: vbdl.DeepEnsemble(vbdl.MCDropout(net), 2)]
)
def test_recurrent_networks_train_one_after_the_other(make):
    """vmap has no rule for recurrent layers: members are looped over, with the same result type."""

    class Last(nn.Module):
        def __init__(self):
            super().__init__()
            self.lstm, self.head = nn.LSTM(3, 5, 2, dropout=0.2, batch_first=True), nn.Linear(5, OUTPUTS)

        def forward(self, x):
            return self.head(self.lstm(x)[0][:, -1])

    x, y = torch.randn(31, 4, 3), torch.randn(31, OUTPUTS)
    q, likelihood = make(Last()), vbdl.Gaussian(OUTPUTS)
    history = vbdl.fit(q, (x, y), likelihood, epochs=20, lr=1e-2, validation=(x, y), compile=False)
    assert np.mean(history.train_loss[-1]) < np.mean(history.train_loss[0])
    assert vbdl.Predictor(q, likelihood, compile=False)(x).mean.shape == (31, OUTPUTS)


@pytest.mark.parametrize("compile", [False, True])
@pytest.mark.parametrize("old", [False, True])
def test_spectral_norms_train_one_after_the_other(old, compile, data, traced_only):
    spectral_norm = nn.utils.spectral_norm if old else nn.utils.parametrizations.spectral_norm
    vector = "0.weight_u" if old else "0.parametrizations.weight.0._u"
    members = [nn.Sequential(spectral_norm(nn.Linear(FEATURES, 7)), nn.Linear(7, OUTPUTS)) for _ in range(2)]
    together = vbdl.DeepEnsemble(members)
    vbdl.fit(together, data, vbdl.Gaussian(OUTPUTS), epochs=5, compile=compile)
    for index, member in enumerate(members):
        alone = vbdl.DeepEnsemble([member])
        vbdl.fit(alone, data, vbdl.Gaussian(OUTPUTS), epochs=5, seed=index, compile=False)
        assert_same(together.member(index), alone.member(0), **ROUNDING)
        assert not torch.equal(together.member(index)[vector], member.state_dict()[vector])


class Centring(nn.Linear):
    """Takes off a running mean, which its forward writes to or assigns."""

    mean: torch.Tensor

    def __init__(self, assigns: bool):
        super().__init__(FEATURES, OUTPUTS)
        self.assigns = assigns
        self.register_buffer("mean", torch.zeros(FEATURES))

    def forward(self, x):
        if self.training:
            new = 0.9 * self.mean + 0.1 * x.mean(0)
            if self.assigns:
                self.mean = new
            else:
                self.mean.copy_(new)
        return super().forward(x - self.mean)


@pytest.mark.parametrize("compile", [False, True])
@pytest.mark.parametrize("wrap", [lambda n: vbdl.MeanField(n, N), lambda n: vbdl.DeepEnsemble(n, 2)])
def test_a_buffer_that_is_assigned_is_kept_as_one_that_is_written_to(wrap, compile, data, traced_only):
    x, y = data
    states = []
    for assigns in (True, False):
        torch.manual_seed(1)
        q = wrap(Centring(assigns))
        vbdl.fit(q, (x + 3, y), vbdl.Gaussian(OUTPUTS), epochs=5, compile=compile)
        states.append(state(q))
    assert_same(*states, rtol=1e-6, atol=1e-6)
    assert any("mean" in n and "log" not in n and float(t.mean()) > 1 for n, t in states[0].items())


def test_a_finished_run_goes_on_to_nothing(data, tmp_path):
    options = {"epochs": 3, "validation": 0.2, "checkpoint": tmp_path / "run.safetensors", "compile": False}
    q, likelihood = vbdl.DeepEnsemble(plain(), 2), vbdl.Gaussian(OUTPUTS)
    history = vbdl.fit(q, data, likelihood, **options)
    again, noise = vbdl.DeepEnsemble(plain(), 2), vbdl.Gaussian(OUTPUTS)
    assert vbdl.fit(again, data, noise, **options).train_loss == history.train_loss
    assert_same(state(q), state(again), rtol=0, atol=0)


def test_a_finished_run_still_knows_the_rows_of_its_loader(data, tmp_path):
    options = {"epochs": 2, "checkpoint": tmp_path / "run.safetensors", "compile": False}
    for _ in range(2):
        q, likelihood = vbdl.DeepEnsemble(plain(), 2), vbdl.Gaussian(OUTPUTS)
        vbdl.fit(q, DataLoader(TensorDataset(*data), batch_size=16), likelihood, **options)
    with pytest.raises(ValueError, match="71 of 71 calibration rows were trained on"):
        vbdl.calibrate(vbdl.Predictor(q, likelihood, compile=False), data, vbdl.StdScaling())


@pytest.mark.parametrize("turned_off", [torch.no_grad, torch.inference_mode])
def test_gradients_are_the_trainings_own(turned_off, data):
    """On where the caller has turned them off, and not those of the inputs."""
    x, y = data
    usual, other = vbdl.DeepEnsemble(plain(), 2), vbdl.DeepEnsemble(plain(), 2)
    vbdl.fit(usual, data, vbdl.Gaussian(OUTPUTS), epochs=3, compile=False)
    features = x.clone().requires_grad_() * 1.0
    with turned_off():
        vbdl.fit(other, (features, y), vbdl.Gaussian(OUTPUTS), epochs=3, compile=False)
    assert_same(state(usual), state(other), rtol=0, atol=0)


@pytest.mark.parametrize("wrap", [vbdl.MCDropout, lambda n: vbdl.MeanField(n, N), lambda n: vbdl.DeepEnsemble(n, 2)])
def test_an_embedding_with_sparse_gradients_is_refused_unless_it_is_frozen(wrap):
    net = nn.Sequential(nn.Embedding(10, 4, sparse=True), nn.Flatten(), nn.Dropout(0.1), nn.Linear(4, 2))
    x, y = torch.randint(10, (N, 1)), torch.randint(2, (N,))
    with pytest.raises(ValueError, match="0' .*has sparse gradients.*sparse=False"):
        vbdl.fit(wrap(net), (x, y), vbdl.Categorical(), epochs=1, compile=False)
    net[0].weight.requires_grad_(False)
    vbdl.fit(wrap(net), (x, y), vbdl.Categorical(), epochs=1, compile=False)


class Keeping(nn.Module):
    """A network that keeps what it computes on the way, as attention maps and features are kept to be looked at."""

    def __init__(self):
        super().__init__()
        self.first, self.drop, self.last = nn.Linear(FEATURES, 7), nn.Dropout(0.2), nn.Linear(7, OUTPUTS)
        self.hidden, self.all = None, {}

    def forward(self, x):
        self.hidden = self.first(x).tanh()
        self.all["hidden"] = self.hidden
        return self.last(self.drop(self.hidden))


# a compiled step keeps what the step keeps: with one method
@pytest.mark.slow_where(cell=lambda p: p["compile"] and p["wrap"] is not vbdl.MCDropout)
@pytest.mark.parametrize("compile", [False, True])
@pytest.mark.parametrize(
    "wrap",
    [
        vbdl.MCDropout,
        lambda n: vbdl.MeanField(n, N),
        lambda n: vbdl.DeepEnsemble(n, 2),
        lambda n: vbdl.DeepEnsemble(vbdl.MCDropout(n), 2),
        lambda n: vbdl.DeepEnsemble([n, plain()]),
    ],
)
def test_a_network_that_keeps_activations_is_copied_before_and_after_training(wrap, compile, data, traced_only):
    net, likelihood = Keeping(), vbdl.Gaussian(OUTPUTS)
    net(data[0])
    q = wrap(net)
    vbdl.fit(q, data, likelihood, epochs=1, batch_size=N, compile=compile)
    predict = vbdl.Predictor(copy.deepcopy(q), likelihood, compile=False)
    expected = predict(data[0]).mean
    for one in (predict.replace(), copy.deepcopy(predict), pickle.loads(pickle.dumps(predict))):
        assert torch.equal(one(data[0]).mean, expected)
    assert net.hidden.grad_fn is not None  # the caller's own is left as it is


@pytest.mark.parametrize("wrap", [vbdl.MCDropout, lambda n: vbdl.MeanField(n, N)])
def test_a_network_that_keeps_activations_predicts_after_a_loop_of_ones_own(wrap, data):
    q, likelihood = wrap(Keeping()), vbdl.Gaussian(OUTPUTS)
    q.loss(*data, likelihood).backward()
    assert vbdl.Predictor(q, likelihood, compile=False)(data[0]).mean.isfinite().all()


class Counted(nn.Linear):
    """Counts its calls; every copy adds to the same count."""

    calls = 0

    def forward(self, x):
        Counted.calls += 1
        return super().forward(x)


@pytest.mark.parametrize("wrap", [vbdl.MCDropout, lambda n: vbdl.MeanField(n, N), lambda n: vbdl.DeepEnsemble(n, 2)])
def test_the_network_runs_once_a_step_and_a_few_times_before(wrap, data):
    loader = DataLoader(TensorDataset(*data), batch_size=17)
    calls = {}
    for epochs in (1, 5):
        q = wrap(nn.Sequential(Counted(FEATURES, 7), nn.Dropout(0.2), nn.Linear(7, OUTPUTS)))
        Counted.calls = 0
        vbdl.fit(q, loader, vbdl.Gaussian(OUTPUTS), epochs=epochs, compile=False)
        calls[epochs] = Counted.calls
    assert calls[5] - calls[1] == 4 * len(loader)
    assert calls[1] - len(loader) <= 25  # to find dropout and the output's shape, and to see that it can be predicted


def test_batches_of_several_shapes_have_their_targets_checked_by_their_own():
    def loader(*lengths):
        return DataLoader([(torch.randn(8, n, FEATURES), torch.randn(8, m, 2)) for n, m in lengths], batch_size=None)

    make = lambda: vbdl.DeepEnsemble(nn.Linear(FEATURES, 2), 2)
    vbdl.fit(make(), loader((3, 3), (4, 4), (3, 3)), vbdl.Gaussian(2), epochs=2, compile=False)
    with pytest.raises(ValueError, match="do not fit outputs"):
        vbdl.fit(make(), loader((3, 3), (4, 3)), vbdl.Gaussian(2), epochs=2, compile=False)


class Doing(nn.Module):
    """A network that does something to what it hands on."""

    def __init__(self, something):
        super().__init__()
        self.inside, self.something = dropping(), something

    def forward(self, x):
        return self.something(self, x)


NOT_PREDICTED = {
    "noise of torch": (
        lambda: vbdl.DeepEnsemble(Doing(lambda net, x: net.inside(x) + torch.randn(len(x), 1)), 2),
        "draws from torch's generator",
    ),
    "dropout beside the output": (
        lambda: vbdl.MCDropout(Doing(lambda net, x: (net.inside(x), net.inside[0](x))[1][:, :OUTPUTS])),
        "nothing random reaches the output",
    ),
    "two outputs": (lambda: vbdl.MCDropout(Doing(lambda net, x: (net.inside(x), x))), "returned tuple"),
    "mixed rows": (
        lambda: vbdl.DeepEnsemble(Doing(lambda net, x: net.inside(x) - net.inside(x).mean(0)), 2),
        "depends on the other rows",
    ),
    "one mixing of two architectures": (
        lambda: vbdl.DeepEnsemble([plain(), Doing(lambda net, x: net.inside(x) - net.inside(x).mean(0))]),
        "depends on the other rows",
    ),
}


@pytest.mark.parametrize("loaded", [False, True])
@pytest.mark.parametrize("name", NOT_PREDICTED)
def test_what_could_not_be_predicted_is_refused_before_it_is_trained(name, loaded, data):
    make, words = NOT_PREDICTED[name]
    q, likelihood = make(), vbdl.Gaussian(OUTPUTS)
    with pytest.raises((ValueError, TypeError), match=words) as in_prediction:
        vbdl.Predictor(q, likelihood, compile=False)(data[0])
    before = state(q)
    with pytest.raises((ValueError, TypeError), match=words) as in_training:
        given = DataLoader(TensorDataset(*data), batch_size=16) if loaded else data
        vbdl.fit(q, given, likelihood, epochs=1, compile=False)
    assert type(in_training.value) is type(in_prediction.value)
    assert str(in_training.value) == str(in_prediction.value)
    if not (loaded and len(q.parts) > 1):  # a loader's rows are not known before the first of them is trained on
        assert_same(before, state(q), rtol=0, atol=0)


def test_what_is_random_in_training_alone_is_trained(data):
    net = Doing(lambda net, x: net.inside(x + torch.randn_like(x) if net.training else x))
    for q in (vbdl.MCDropout(net), vbdl.DeepEnsemble(net, 2)):
        before = torch.get_rng_state()
        vbdl.fit(q, data, likelihood := vbdl.Gaussian(OUTPUTS), epochs=1, compile=False)
        assert torch.equal(before, torch.get_rng_state())
        assert vbdl.Predictor(q, likelihood, compile=False)(data[0]).mean.shape == (N, OUTPUTS)
