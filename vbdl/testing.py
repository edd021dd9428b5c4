"""Checks for methods and likelihoods of your own: the contract that vbdl's own keep, in a test of a few lines.

    def test_my_method():
        check_posterior(MyMethod(network()), vbdl.Gaussian(), x, y)

A check raises AssertionError with what is wrong, and what the library would do with it. It takes seconds on a small
network and changes none of its arguments.
"""

import copy
import math
import pickle
import sys
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vbdl.artifact.loading import load
from vbdl.artifact.modules import is_registered
from vbdl.artifact.saving import save
from vbdl.calling.copies import copied
from vbdl.calling.likelihood_members import replicate
from vbdl.calling.traversing import state_of
from vbdl.data.rows import take
from vbdl.engine.predictor import Predictor
from vbdl.training.fit import fit
from vbdl.types import Inputs, Likelihood, Posterior, Prediction, State, before_training

_DRAWS, _ROWS = 5, 8
_ROUNDING = 1e-4  # relative to the largest number; far above the rounding of float32, far below another draw


def check_posterior(
    posterior: Posterior,
    likelihood: Likelihood,
    x: Inputs,
    y: Tensor,
    *,
    epochs: int = 20,
    lr: float = 1e-2,
    compile: bool = True,
) -> None:
    """Raise AssertionError unless a posterior keeps the contract of `vbdl.types.Posterior`.

    It checks that draws are a pure function of (numbers, seed), whatever they are drawn together with; that losses have
    gradients, and training lowers them; that compiled, uncompiled, chunked, copied, pickled and saved predictors agree;
    and that the trained state dict is all there is to know.

    posterior: untrained. likelihood: one for its outputs. x, y: at least 16 training rows that it can learn from.
    epochs, lr: of the training that must lower the loss. compile: whether to compile, which takes some seconds.

    >>> net = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 1))
    >>> x = torch.randn(64, 4)
    >>> check_posterior(vbdl.MeanField(net, n_data=64), vbdl.Gaussian(), x, x[:, :1], compile=False)
    """
    if not isinstance(posterior, Posterior):
        raise TypeError(f"check_posterior takes an instance of vbdl.types.Posterior, got {type(posterior).__name__}")
    if len(y) < 16:
        raise ValueError(f"a check trains, and needs at least 16 rows; got {len(y)}")
    q, noise = copy.deepcopy(posterior), copy.deepcopy(likelihood)
    name = type(q).__name__
    some = take(x, torch.arange(_ROWS))
    for part in q.parts:
        with torch.no_grad():
            _check_entries(name, part, part.draws(torch.arange(part.n_draws or 2), 3), part.n_draws or 2)
    _check_losses(name, q, noise, take(x, torch.arange(16)), y[:16])
    before = copy.deepcopy(q)
    history = _without_warnings(lambda: fit(q, (x, y), noise, epochs=epochs, lr=lr, compile=False, progress=False))
    losses = [sum(each) / len(each) for each in history.train_loss]
    _must(math.isfinite(losses[-1]), f"the loss of {name} became {losses[-1]} in training")
    _must(
        min(losses[len(losses) // 2 :]) < losses[0],
        f"training for {epochs} epochs did not lower the loss of {name}, from {losses[0]:.4g} to {losses[-1]:.4g}: is "
        f"the mean over rows returned, and are the parameters used? Or give another lr",
    )
    q.prepare(some)
    _check_draws(name, q)
    predict = Predictor(q, noise, q.n_draws or _DRAWS, compile=False)
    expected = predict(some)
    _check_predictions(name, predict, expected, some, compile)
    missing = before.load_state_dict(q.state_dict(), strict=False)
    if q.n_draws == before.n_draws:
        again = Predictor(before, noise, q.n_draws or _DRAWS, compile=False)(some)
        _same(
            expected,
            again,
            f"a fresh {name} with the trained one's state dict predicts other numbers: keep everything that training "
            f"changes in parameters and buffers (missing {missing.missing_keys}, unexpected {missing.unexpected_keys})",
        )
    _check_saving(name, q, predict, expected, some)


def check_likelihood(likelihood: Likelihood, outputs: Tensor, y: Tensor, *, n_members: int = 3) -> None:
    """Raise AssertionError unless a likelihood keeps the contract of `vbdl.types.Likelihood`.

    It checks that the loss is one number a row with a gradient, that running sums merge in any split, that the fields
    make a prediction whose parts add up, and that each member of an ensemble can have parameters of its own.

    outputs: (samples, batch, ...), outputs of a network for several draws. y: (batch, ...), targets.

    >>> check_likelihood(vbdl.Gaussian(), torch.randn(6, 10, 1), torch.randn(10, 1))
    """
    if not isinstance(likelihood, Likelihood):
        raise TypeError(f"check_likelihood takes an instance of vbdl.types.Likelihood, got {type(likelihood).__name__}")
    likelihood, name = copy.deepcopy(likelihood), type(likelihood).__name__
    if outputs.ndim < 2 or outputs.shape[0] < 4 or outputs.shape[1] != len(y):
        raise ValueError(f"outputs must be (samples >= 4, {len(y)} rows, ...), got {tuple(outputs.shape)}")
    each = [likelihood(o) for o in outputs.detach().requires_grad_()]
    rows = len(y)
    _must(
        each[0].shape[:1] == (rows,),
        f"forward of {name} returned {tuple(each[0].shape)} for {rows} rows: parameters begin with the batch axis",
    )
    target = likelihood.check_targets(y, tuple(each[0].shape))
    loss = likelihood.training_loss(each[0], target)
    _must(
        loss.shape == (rows,),
        f"nll of {name} returned {tuple(loss.shape)} for {rows} rows: sum over all axes but the batch, to ({rows},)",
    )
    _must(bool(loss.isfinite().all()), f"nll of {name} is not finite on these targets")
    _must(loss.requires_grad, f"nll of {name} has no gradient in the network's outputs: compute it from `parameters`")
    for parameter, p in likelihood.named_parameters():
        gradient = torch.autograd.grad(loss.sum(), p, allow_unused=True, retain_graph=True)[0] if p.requires_grad else p
        _must(
            gradient is not None and bool((gradient != 0).any()),
            f"the loss of {name} does not depend on its parameter {parameter!r}: use it in forward",
        )
    with torch.no_grad():
        parameters = torch.stack(each)
        whole = likelihood.summarize(parameters)
        fields = likelihood.finish(whole)
        for cut in (1, len(outputs) // 2):
            sums = likelihood.merge(likelihood.summarize(parameters[:cut]), likelihood.summarize(parameters[cut:]))
            _must(
                list(sums) == list(whole),
                f"merge of {name} returned {list(sums)}, summarize {list(whole)}: the same names in the same order",
            )
            merged = likelihood.finish(sums)
            for field, t in fields.items():
                if field == "standard_error":
                    continue
                _must(
                    _close(merged[field], t),
                    f"{field} of {name} depends on how draws are divided ({cut} + {len(outputs) - cut} against all at "
                    f"once): merge must give the sums of the union",
                )
        p = likelihood.prediction(fields, len(outputs), parameters)
    _must(isinstance(p, Prediction), f"prediction of {name} returned {type(p).__name__}, no vbdl.types.Prediction")
    for part in ("total", "aleatoric", "epistemic"):
        _must(
            getattr(p, part).shape[:1] == (rows,),
            f"{part} of {name} is {tuple(getattr(p, part).shape)}: its first axis is the batch, {rows} rows",
        )
    _must(
        _close(p.total, p.aleatoric + p.epistemic),
        f"total of {name} is not aleatoric + epistemic: define the parts so that they add up",
    )
    _must(
        tuple(p.parameters_shape) == tuple(parameters.shape[1:]),
        f"parameters_shape of {type(p).__name__} is {tuple(p.parameters_shape)}, and forward returns "
        f"{tuple(parameters.shape[1:])}: define the property parameters_shape",
    )
    without = likelihood.prediction(fields, len(outputs))
    _must(
        tuple(without.parameters_shape) == tuple(parameters.shape[1:]),
        f"parameters_shape of {type(p).__name__} without samples is {tuple(without.parameters_shape)}, and forward "
        f"returns {tuple(parameters.shape[1:])}: define the property parameters_shape",
    )
    names = [n for n, _ in likelihood.named_parameters()]
    replicate(likelihood, n_members)
    wrong = [n for n, t in likelihood.named_parameters() if t.shape[:1] != (n_members,)]
    _must(not wrong and names == [n for n, _ in likelihood.named_parameters()], f"{wrong} got no members axis")


def _must(kept: bool, otherwise: str) -> None:
    if not kept:
        raise AssertionError(otherwise)


def _without_warnings(call: Callable):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return call()


def _close(a: Tensor, b: Tensor, scale: float | None = None) -> bool:
    """Whether two tensors agree up to rounding. scale: the size of the numbers that they were computed from."""
    if a.shape != b.shape:
        return False
    if not (a.is_floating_point() and b.is_floating_point()):
        return torch.equal(a, b)
    if scale is None:
        scale = float(b.double().abs().nan_to_num(posinf=0.0).max()) if b.numel() else 0.0
    return torch.allclose(a.double(), b.double(), rtol=_ROUNDING, atol=_ROUNDING * scale, equal_nan=True)


def _same(a: Prediction, b: Prediction, otherwise: str) -> None:
    """Raise AssertionError if two predictions differ by more than rounding."""
    for name, t in a.values().items():
        if name == "standard_error":
            continue
        other = b.values()[name]
        # a part is a difference of sums as large as the total
        of = max(float(a.total.abs().max()), float(t.abs().max())) if t.is_floating_point() and t.numel() else None
        _must(
            _close(other, t, of), f"{otherwise} [{name}: {t.flatten()[:3].tolist()} and {other.flatten()[:3].tolist()}]"
        )


def _check_losses(name: str, q: Posterior, likelihood: Likelihood, x: Inputs, y: Tensor) -> None:
    """The losses of a batch: shape, finiteness, gradients, torch's generator."""
    q, likelihood = copy.deepcopy(q).train(), copy.deepcopy(likelihood)
    if q.by_member:
        replicate(likelihood, q.n_members)
    for part in q.parts:
        part.before_training(x, y, likelihood)
    losses = _losses(q, likelihood, x, y)
    _must(
        losses.shape == (q.n_members,),
        f"losses of {name} returned {tuple(losses.shape)}: return one loss for each member, ({q.n_members},), e.g. "
        f".mean().reshape(1)",
    )
    _must(bool(losses.isfinite().all()), f"losses of {name} are {losses.tolist()} before the first step")
    _must(losses.requires_grad, f"losses of {name} have no gradient: do not detach them")
    trained = {n: p for n, p in q.named_parameters() if p.requires_grad}
    gradients = torch.autograd.grad(losses.sum(), list(trained.values()), allow_unused=True)
    unused = [n for n, g in zip(trained, gradients, strict=True) if g is None]
    _must(
        not unused,
        f"the loss of {name} does not depend on {', '.join(unused[:5])}: use them in losses, or set "
        f"requires_grad_(False)",
    )


def _losses(q: Posterior, likelihood: Likelihood, x: Inputs, y: Tensor) -> Tensor:
    shape = _outputs_shape(q, likelihood, x)
    return q.losses(x, likelihood.check_targets(y, shape), likelihood)


def _outputs_shape(q: Posterior, likelihood: Likelihood, x: Inputs) -> tuple[int, ...]:
    """The shape of one draw's parameters of p(y | x) for these rows."""
    with before_training(), torch.no_grad():
        return Predictor(q, likelihood, 1 if q.n_draws is None else q.n_draws, compile=False)(x).parameters_shape


def _check_draws(name: str, q: Posterior) -> None:
    """The entries of draws: names, shapes, and that they are a pure function of the number and the seed."""
    for part in q.parts:
        count = part.n_draws or _DRAWS
        numbers = torch.arange(count)
        before = torch.get_rng_state()
        with torch.no_grad():
            entries, again = part.draws(numbers, 3), part.draws(numbers, 3)
        _must(
            torch.equal(before, torch.get_rng_state()),
            f"draws of {name} use torch's generator, so that a draw depends on what was drawn before: take noise from "
            f"vbdl_kernels (make_key, normal)",
        )
        _check_entries(name, part, entries, count)
        for entry, t in entries.items():
            _must(torch.equal(t, again[entry]), f"draws of {name} give another {entry!r} when they are called again")
        with torch.no_grad():
            for i in {0, count - 1}:
                alone = part.draws(torch.tensor([i]), 3)
                for entry, t in entries.items():
                    _must(
                        _close(alone[entry][0], t[i]),
                        f"draw {i} of {name} has another {entry!r} alone than with others: make it from its number "
                        f"and the seed only, or predictions would depend on how draws are divided into calls",
                    )
            if part.n_draws is None:
                other = part.draws(numbers, 4)
                _must(
                    any(not torch.equal(other[e], entries[e]) for e in entries),
                    f"draws of {name} ignore the seed: use make_key(seed, numbers)",
                )
        if count > 1:
            _must(
                any(not torch.equal(t[0], t[-1]) for t in entries.values()),
                f"all draws of {name} are the same: use make_key(seed, numbers)",
            )


def _check_entries(name: str, part: Posterior, entries: State, count: int) -> None:
    """The names and the shapes of the entries of so many draws."""
    state = state_of(part.module)
    for entry, t in entries.items():
        _must(
            entry in state,
            f"draws of {name} return {entry!r}, which is no parameter or buffer of q.module: there are "
            f"{', '.join(list(state)[:8])}",
        )
        _must(
            tuple(t.shape) == (count, *state[entry].shape),
            f"draws of {name} return {entry!r} with shape {tuple(t.shape)} for {count} draws: stack the draws on "
            f"the first axis, {(count, *state[entry].shape)}",
        )


def _check_predictions(name: str, predict: Predictor, expected: Prediction, x: Inputs, compile: bool) -> None:
    """That predictions do not depend on how they are computed."""
    ways: dict[str, dict[str, Any]] = {"draw by draw": {"chunk_size": 1}, "with other tiles": {"tiles": 3}}
    for how, options in ways.items():
        _same(expected, predict.replace(**options)(x), f"{name} predicts other numbers {how}")
    if compile:
        _same(expected, predict.replace(compile=True)(x), f"{name} predicts other numbers compiled")
    _same(expected, copy.deepcopy(predict)(x), f"a copy of the predictor of {name} predicts other numbers")
    kind = type(predict.posterior)
    if getattr(sys.modules.get(kind.__module__), kind.__qualname__, None) is kind:  # pickle imports it by its name
        restored = pickle.loads(pickle.dumps(predict))
        _same(expected, restored(x), f"a pickled predictor of {name} predicts other numbers")


def _check_saving(name: str, q: Posterior, predict: Predictor, expected: Prediction, x: Inputs) -> None:
    """That an artifact predicts the same, if the classes are registered."""
    own = [c for c in (type(predict.posterior), type(predict.likelihood)) if not c.__module__.startswith("vbdl.")]
    if not all(map(is_registered, own)):
        return  # they are not to be saved
    networks = [copied(part.user_network) for part in q.parts]
    held = not any(t.is_meta for network in networks for t in state_of(network).values())  # not those of ensembles
    given = (networks if len(networks) > 1 else networks[0]) if held else None
    trusted = tuple({c.__module__.partition(".")[0] for c in own})
    with tempfile.TemporaryDirectory() as folder:
        where = save(predict, Path(folder) / "model.vbdl")
        loaded = load(where, module=given, trust=trusted, compile=False)
        _same(expected, loaded(x), f"a saved and loaded {name} predicts other numbers: check config() and the buffers")
