"""The choice of a method for a network and its data: by rule of thumb, and by measuring small versions of each."""

import contextlib
import copy
import math
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from vbdl.calling.checks import check_network, unwrapped
from vbdl.calling.copies import copied
from vbdl.calling.inputs import flatten, map_inputs, tensors
from vbdl.data.rows import check_finite, check_sizes, take, whole
from vbdl.data.splitting import split
from vbdl.engine.predictor import Predictor
from vbdl.engine.taken import takes
from vbdl.likelihoods.categorical import Categorical
from vbdl.likelihoods.gaussian import Gaussian
from vbdl.methods import METHODS, Method
from vbdl.metrics.estimate import Interval, compare, mean_estimate
from vbdl.nn.may_drop import may_drop
from vbdl.nn.stochastic import draws_noise
from vbdl.posteriors.deterministic import Deterministic
from vbdl.training.fit import fit
from vbdl.types import Inputs, Keywords, Likelihood, Posterior

SHARES = {"train": 0.7, "validation": 0.1, "test": 0.2}  # of the rows, unless the caller divides them
_MAX_EPOCHS = 300
_LATENCY_CALLS = 20
_N_MEMBERS = 3  # of an ensemble
_LEAST = 0.75  # of the budget, for the training that is compared, however long finding the paces took


@dataclass(frozen=True)
class Measured:
    """The scores of one method on the held-out rows."""

    method: str  # the name of its class
    nll: Interval | None  # nats per row, mean and 95 % interval; None if the method could not be tried
    worse_by: Interval | None  # nll minus that of the best method, paired over rows, 95 %; None for the best
    latency: float  # median seconds for one row
    training: float  # seconds
    epochs: int
    note: str  # why the method could not be tried, or is too slow


@dataclass(frozen=True)
class Recommendation:
    """The recommended method, the reason for it, and the measurements of all methods."""

    method: str  # the name of its class
    reason: str
    rule: str  # the method by rule of thumb, and why
    table: tuple[Measured, ...]
    n_train: int
    n_test: int

    def __str__(self) -> str:
        columns = (
            f"{'NLL per row (95 %)':>32s} {'worse by (95 %)':>32s} {'one row':>9s} {'training':>9s} {'epochs':>6s}"
        )
        lines = [f"{'method':12s} {columns}"]
        for m in self.table:
            if m.nll is None:
                lines.append(f"{m.method:12s} not tried: {m.note}")
                continue
            if m.note:
                lines.append(f"{m.method:12s} too slow: {m.note}")
                continue
            worse = "-" if m.worse_by is None else str(m.worse_by)
            lines.append(
                f"{m.method:12s} {str(m.nll):>32s} {worse:>32s} {1000 * m.latency:7.2f}ms {m.training:8.1f}s "
                f"{m.epochs:6d}"
            )
        lines.append(f"trained on {self.n_train} rows, scored on {self.n_test}")
        lines.append(f"rule of thumb, before measuring: {self.rule}")
        lines.append(f"recommend: {self.method}. {self.reason}")
        return "\n".join(lines)


def recommend(
    module: nn.Module,
    data: object,
    likelihood: Likelihood | None = None,
    *,
    budget: float = 60.0,
    trained: bool = False,
    train: bool | None = None,
    latency: float | None = None,
    rows: Mapping[str, Tensor] | None = None,
    seed: int = 0,
    compile: bool = False,
) -> Recommendation:
    """Train a small version of every method of `vbdl.methods`, and compare them on held-out rows.

    Args:
        module: the network; it is copied and not changed.
        data: (inputs, targets), or a Dataset. A fifth of the rows is held out for the comparison, a tenth for early
            stopping, both at random unless `rows` says which.
        likelihood: by default Categorical for integer targets and Gaussian for others.
        budget: approximate seconds for all training together; the last epoch of each method is completed.
        trained: whether the module is trained already. What a trained network can be used for as it is (MC dropout, a
            Laplace approximation, the network alone) is then not trained.
        train: whether the module may be trained, or trained further; by default if it is not trained. A trained one is
            the start of methods that go on training (SWAG, snapshots, mean-field, BatchEnsemble).
        latency: the most seconds that the prediction of one row may take; slower methods are not recommended.
        rows: row numbers of the parts "train", "validation" (for early stopping) and "test" (for the comparison), as
            `vbdl.split` returns them; for rows of one patient, or in time, which must not be divided at random.
        seed: of the split, the training and the draws.
        compile: whether to compile the predictors before measuring their latency, which takes about ten seconds each.

    The score is the negative log-likelihood of the mixture of all draws, in nats per row. Among the methods that are
    not significantly worse than the best (paired 95 % interval), the one with the lowest latency is recommended; the
    network alone, which knows no epistemic uncertainty, only if no other is as good. The small versions are trained for
    a short time: repeat with a larger budget if the choice matters.

    >>> net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Dropout(0.1), nn.Linear(8, 2))
    >>> x, y = torch.randn(200, 4), torch.randint(2, (200,))
    >>> found = vbdl.recommend(net, (x, y), budget=1.0)
    >>> len(found.table) > 2
    True
    """
    if not budget > 0:
        raise ValueError(f"budget must be a positive number of seconds, got {budget}")
    if latency is not None and not latency > 0:
        raise ValueError(f"latency must be a positive number of seconds for one row, got {latency}")
    train = not trained if train is None else train
    if not trained and not train:
        raise ValueError("a network that is not trained must be trained: give trained=True or train=True")
    module = unwrapped(module)
    check_network(module)
    x, y = whole(data)
    check_sizes(x, y)
    n = len(y)
    if n < 20:
        raise ValueError(f"a comparison needs rows to hold out: give at least 20, got {n}")
    if likelihood is None:
        outputs = 1 if y.ndim == 1 else y.shape[1]
        likelihood = Gaussian(outputs) if y.is_floating_point() else Categorical()
    check_finite(x, takes=lambda rows: takes(Deterministic(module), likelihood, flatten(rows)))
    rows = split(n, SHARES, seed=seed) if rows is None else _check_parts(rows, n)
    parts = {name: (take(x, r), y[r]) for name, r in rows.items()}
    n_train = len(parts["train"][1])
    n_weights = sum(p.numel() for p in module.parameters())
    rule = _rule(n_train, n_weights, budget, trained, train, may_drop(module))
    candidates = [m for m in METHODS.values() if not m.needs_augmentation and (m.takes_trained or train)]
    if not draws_noise(module, take(x, rows["test"])):
        candidates = [method for method in candidates if not method.needs_own_noise]
    as_they_are = {method.name for method in candidates if trained and method.takes_trained}
    known: Keywords = {"n_data": n_train, "n_members": _N_MEMBERS, "seed": seed}
    measured, scores = {}, {}
    paces: dict[str, _Pace | None] = {}
    begun = time.perf_counter()
    for method in candidates:
        with _noted(measured, method):
            posterior = method.make(copied(module), trained, **known)
            if method.name in as_they_are:
                paces[method.name] = None
            else:
                share = budget / (len(candidates) - len(as_they_are))
                paces[method.name] = _pace(method, posterior, likelihood, parts, share, seed)
    # what finding the paces took is everybody's, so that all methods train for the same time
    n_trained = sum(pace is not None for pace in paces.values())
    share = max(budget - (time.perf_counter() - begun), _LEAST * budget) / max(1, n_trained)
    for method in candidates:
        name = method.class_name
        if method.name not in paces:
            continue
        with _noted(measured, method):
            posterior, pace = method.make(copied(module), trained, **known), paces[method.name]
            epochs = 0 if pace is None else pace.epochs(share)
            measured[name], scores[name] = _measure(
                method, posterior, likelihood, parts, epochs, seed, compile, trained
            )
    measured = {m.class_name: measured[m.class_name] for m in candidates}
    if not scores:
        notes = "; ".join(f"{m.method}: {m.note}" for m in measured.values())
        raise ValueError(f"no method could be tried on this module. {notes}")
    return _decide(measured, scores, rule, n_train, len(parts["test"][1]), latency)


def _check_parts(rows: Mapping[str, Tensor], n: int) -> Mapping[str, Tensor]:
    """The row numbers of each part. Raises ValueError for other parts, empty ones, or rows in two of them."""
    if rows.keys() != SHARES.keys():
        raise ValueError(f"rows must have the parts {', '.join(SHARES)}, got {', '.join(rows) or 'none'}")
    numbers = {name: torch.as_tensor(chosen).flatten() for name, chosen in rows.items()}
    for name, chosen in numbers.items():
        if not len(chosen) or chosen.is_floating_point() or int(chosen.min()) < 0 or int(chosen.max()) >= n:
            raise ValueError(f"rows[{name!r}] must be row numbers from 0 to {n - 1}, at least one")
    every = torch.cat(list(numbers.values()))
    if len(every.unique()) < len(every):
        raise ValueError("a row is in two parts of rows, or twice in one: give each row once, as vbdl.split does")
    return numbers


def _rule(n_train: int, n_weights: int, budget: float, trained: bool, train: bool, drops: bool) -> str:
    """The method by rule of thumb, and why, as text."""
    if trained and train:
        return "SWAG, since a trained network may be trained for some epochs more"
    if trained and drops:
        return "MCDropout, since a trained network with dropout can be used as it is"
    if trained:
        return "Laplace, since a trained network without dropout can be used as it is, after one pass over the rows"
    if n_train < 1000 or n_train * 10 < n_weights:
        return f"MeanField, since {n_train} rows are few for {n_weights} weights and its prior counts"
    if budget >= 60:
        return f"DeepEnsemble, since there are {n_train} rows and {budget:.0f} s to train several members"
    return f"MCDropout, since {budget:.0f} s are little for more than one network"


@contextlib.contextmanager
def _noted(measured: dict[str, Measured], method: Method) -> Iterator[None]:
    """A context that notes why a method cannot be tried: the others can still be compared.

    For instance a network has no dropout, or a loss diverges.
    """
    try:
        yield
    except (ValueError, TypeError, RuntimeError, FloatingPointError) as error:
        name = method.class_name
        measured[name] = Measured(name, None, None, math.nan, 0.0, 0, (str(error) or repr(error)).splitlines()[0])


def _options(parts: Mapping[str, tuple[Inputs, Tensor]], seed: int) -> Keywords:
    """The arguments of `fit` that all methods share."""
    batch_size = max(16, min(128, len(parts["train"][1]) // 10))
    return {
        "validation": parts["validation"],
        "batch_size": batch_size,
        "seed": seed,
        "progress": False,
        "compile": False,
    }


@dataclass(frozen=True)
class _Pace:
    """How long a method trains."""

    epoch: float  # seconds for one epoch
    setup: float  # seconds for a training beside its epochs
    few: int  # the fewest epochs it takes

    def epochs(self, seconds: float) -> int:
        """The number of epochs in so many seconds."""
        return max(self.few, min(_MAX_EPOCHS, round((seconds - self.setup) / max(self.epoch, 1e-4))))


def _pace(
    method: Method,
    posterior: Posterior,
    likelihood: Likelihood,
    parts: Mapping[str, tuple[Inputs, Tensor]],
    share: float,
    seed: int,
) -> _Pace:
    """Train a posterior for a few epochs to find out how long one takes; share: seconds, of which this takes a part."""
    few = max(4, _N_MEMBERS) if method.collects else 1  # epochs to collect
    likelihood, options = copy.deepcopy(likelihood), _options(parts, seed)

    def seconds(epochs: int) -> float:
        begun = time.perf_counter()
        fit(posterior, parts["train"], likelihood, epochs=epochs, **options)
        return time.perf_counter() - begun

    seconds(few)  # includes what happens once in a process
    short = seconds(few)
    if short > share / 3:
        return _Pace(short / few, 0.0, few)
    epoch = max(0.0, seconds(4 * few) - short) / (3 * few)
    return _Pace(epoch, max(0.0, short - few * epoch), few)


def _measure(
    method: Method,
    posterior: Posterior,
    likelihood: Likelihood,
    parts: Mapping[str, tuple[Inputs, Tensor]],
    epochs: int,
    seed: int,
    compile: bool,
    trained: bool,
) -> tuple[Measured, Tensor]:
    """Train one method for so many epochs; return its Measured and its NLL per test row."""
    likelihood, training = copy.deepcopy(likelihood), 0.0
    if epochs > 0:
        options = _options(parts, seed)
        # a trained network is collected from the first epoch on, so no epoch is the best one
        stops = method.stops_early and not (trained and method.collects)
        patience = max(5, epochs // 5) if stops else None
        history = fit(posterior, parts["train"], likelihood, epochs=epochs, patience=patience, **options)
        epochs, training = history.epochs, history.seconds
    elif posterior.fits_trained:
        training = fit(posterior, parts["train"], likelihood, epochs=0, progress=False).seconds
    predictor = Predictor(posterior, likelihood, seed=seed, compile=compile, tiles=(1, 64))
    x, y = parts["test"]
    scores = -predictor.log_prob(x, y).double().cpu()
    one = map_inputs(lambda t: t[:1], x)
    predictor(one)
    times = []
    for _ in range(_LATENCY_CALLS):
        begun = time.perf_counter()
        predictor(one)
        if tensors(one)[0].is_cuda:
            torch.cuda.synchronize()
        times.append(time.perf_counter() - begun)
    latency = sorted(times)[_LATENCY_CALLS // 2]
    interval = mean_estimate(scores).interval()
    return Measured(method.class_name, interval, None, latency, training, epochs, ""), scores


def _decide(
    measured: dict[str, Measured],
    scores: dict[str, Tensor],
    rule: str,
    n_train: int,
    n_test: int,
    latency: float | None,
) -> Recommendation:
    """Recommend the fastest of the methods that are not significantly worse than the best. scores: NLL per test row."""
    if latency is not None:
        fast = {name: s for name, s in scores.items() if measured[name].latency <= latency}
        if not fast:
            least = min(measured[name].latency for name in scores)
            raise ValueError(
                f"no method predicts a row within {1000 * latency:g} ms, the fastest takes {1000 * least:.2f} ms: give "
                f"compile=True, a larger latency, or a smaller network"
            )
        for name in scores.keys() - fast.keys():
            slow = f"its {1000 * measured[name].latency:.2f} ms for one row are more than {1000 * latency:g} ms"
            measured[name] = Measured(**{**vars(measured[name]), "note": slow})
        scores = fast
    best = min(scores, key=lambda name: float(scores[name].mean()))
    table, close = [], [best]
    for name, row in measured.items():
        if name in scores and name != best:
            c = compare(scores[name], scores[best])
            worse = Interval(c.difference, c.lower, c.upper, c.level)
            row = Measured(**{**vars(row), "worse_by": worse})
            if not c.lower > 0:
                close.append(name)
        table.append(row)
    single = {method.class_name for method in METHODS.values() if method.is_one_network}
    # a network alone is fastest always, and knows no epistemic uncertainty: the others are measured against it
    chosen = min([n for n in close if n not in single] or close, key=lambda name: measured[name].latency)
    others = [name for name in scores if name != chosen]
    if not others:
        reason = "It is the only method that could be tried."
    elif len(close) == 1:
        reason = "Its held-out likelihood is significantly better than that of every other method."
    else:
        rest = [name for name in close if name != chosen]
        alone = [name for name in rest if name in single and chosen not in single]
        milliseconds = f"{1000 * measured[chosen].latency:.2f} ms for one row"
        if len(rest) == len(alone):
            why = f"it alone of them knows epistemic uncertainty ({milliseconds})"
        else:
            which = "those of them that know epistemic uncertainty" if alone else "them"
            why = f"of {which} it predicts fastest: {milliseconds}"
        same = " and ".join(rest)
        reason = f"On {n_test} rows its likelihood does not differ significantly from that of {same}, and {why}."
    return Recommendation(chosen, reason, rule, tuple(table), n_train, n_test)
