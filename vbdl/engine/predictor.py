"""The predictor: a posterior and a likelihood as one compiled function of the input.

A batch is cut into tiles of a few sizes and padded (`tiling.py`). With a single tile size, 1 or a multiple of 64, a
row's result on a CPU is identical bit for bit in every batch.
"""

import contextlib
import functools
import math
import pickle
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future
from numbers import Real
from pathlib import Path
from typing import TYPE_CHECKING, Any, Concatenate, ParamSpec, SupportsIndex, TypeVar

import torch
from torch import Tensor, nn

from vbdl.calling.apart import read_only
from vbdl.calling.autograd import is_transformed
from vbdl.calling.checks import check_values
from vbdl.calling.inputs import TENSOR, Flat, flatten
from vbdl.calling.lending import lent_copy, only_reading
from vbdl.calling.traversing import state_of
from vbdl.data.rows import floating_dtype, outside_range
from vbdl.data.tiles import check_inputs, kinds_not_finite, of_not_finite, pad
from vbdl.engine import background, stepwise
from vbdl.engine.adaptive import Rule, as_rule
from vbdl.engine.execution import Execution
from vbdl.engine.executions import Executions, Key, outside_autocast
from vbdl.engine.precision import PrecisionError, against_float32
from vbdl.engine.predictive_module import PredictiveModule
from vbdl.engine.program import Ready
from vbdl.engine.settings import PredictorSettings
from vbdl.engine.streaming import StreamState
from vbdl.engine.taken import takes
from vbdl.engine.tiling import Tiling
from vbdl.types import Inputs, Likelihood, Posterior, Prediction, State, check_likelihood, check_ready, is_posterior

if TYPE_CHECKING:
    from vbdl.artifact.manifest import Manifest
    from vbdl.export.package import Package

P = ParamSpec("P")
R = TypeVar("R")
M = TypeVar("M", bound=nn.Module)


def _ids_in_words(
    method: "Callable[Concatenate[Predictor, Inputs, P], R]",
) -> "Callable[Concatenate[Predictor, Inputs, P], R]":
    """Wrap a method that takes inputs, so that an index error names the ids that are out of an embedding's range.

    In torch's inference mode it runs outside of that, without gradients: what a predictor keeps outlives the mode, and
    no gradient could be taken of it afterwards.
    """

    @functools.wraps(method)
    def call(self: "Predictor", x: Inputs, *args: P.args, **options: P.kwargs) -> R:
        if torch.is_inference_mode_enabled():
            with torch.inference_mode(False), torch.no_grad():
                return call(self, x, *args, **options)
        try:
            return method(self, x, *args, **options)
        except (IndexError, RuntimeError) as error:
            modules = (part.module for part in self.posterior.parts)
            if (explained := outside_range(flatten(x).tensors, error, modules)) is None:
                raise
            raise explained from error

    return call


class Predictor:
    """The posterior predictive p(y | x), averaged over n_samples draws of the posterior.

    posterior, likelihood: a pair trained by `vbdl.fit`. Training them further does not change this predictor: both are
        copied, large parameters when the posterior is next asked for them (`vbdl.calling.lending`).
    n_samples: the number of draws. Default: every member of an ensemble, 32 for other posteriors.
    seed: the seed of the draws. Draw s is the same whatever n_samples is: 32 draws are the first 32 of 100.
    tiles: the batch sizes to compile for, each when it is first needed. A batch is padded to the smallest tile that
        holds it; a batch larger than every tile is cut into tiles of the largest size. Default 1, 8, 32 and 64, and
        sizes of their own for up to four batch sizes that come often, compiled in the background and kept if they are
        faster: a single row costs one row, and its result is the same in every batch up to float rounding.
    batch_invariant: guarantee that a row's result is identical bit for bit in every batch and at every place in it
        (on a CPU). Needs a single tile size, 1 or a multiple of 64, by default 64; a single row then costs 64 rows.
    compile: "background", the default, answers at once with the network as it is, compiles beside it, and goes on with
        the compiled graph, whose results are equal up to rounding; `warm_up` waits for it. True compiles before the
        first answer. False compiles nothing. The environment variable VBDL_COMPILE (background, first, never) sets the
        default.
    memory_budget: bytes; half is for draws kept between calls, half for activations.
    chunk_size: the number of draws in one call, by default chosen from the memory budget. Results do not depend on it.
    autocast: the dtype to run the network in, torch.bfloat16 or torch.float16; statistics stay float32.
    joint: draw the weights of mean-field layers, so that a sample is one network for all rows. By default layer
        outputs are drawn instead (local reparameterization) if that is faster and leaves the distribution of each row
        exactly the same: means, variances, quantiles and covariances within a row agree, covariances between rows
        do not.
    estimator: "sampling", or "moments" for one deterministic pass that propagates means and variances. "moments" is an
        approximation (see `vbdl.engine.moments`): `explain` measures its error against n_samples draws, and its
        predictions have n_samples 0.
    device: the device to run on, by default the posterior's.

    Thread-safe. Raises ValueError for input that the module cannot take, with the reason.

    >>> net = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 3))
    >>> predict = vbdl.Predictor(vbdl.DeepEnsemble(net, 4), vbdl.Categorical(), compile=False)
    >>> p = predict(torch.randn(5, 4))
    >>> p.probs.shape, p.n_samples
    (torch.Size([5, 3]), 4)
    >>> torch.allclose(p.total, p.aleatoric + p.epistemic)
    True
    """

    def __init__(
        self,
        posterior: Posterior,
        likelihood: Likelihood,
        n_samples: int | None = None,
        seed: int = 0,
        *,
        tiles: int | Sequence[int] | None = None,
        batch_invariant: bool = False,
        compile: bool | str | None = None,
        memory_budget: int = 2**30,
        chunk_size: int | None = None,
        autocast: torch.dtype | None = None,
        joint: bool = False,
        estimator: str = "sampling",
        device: torch.device | str | None = None,
    ):
        if not is_posterior(posterior):
            raise TypeError(
                f"Predictor needs a posterior, got {type(posterior).__name__}: wrap the network in vbdl.MCDropout, "
                f"vbdl.MeanField or vbdl.DeepEnsemble"
            )
        check_likelihood(likelihood)
        with only_reading():
            check_values(posterior)
            check_ready(posterior)
            own = next(iter(state_of(posterior).values())).device
            self._floating = floating_dtype(posterior)
        self.settings = PredictorSettings.checked(
            posterior,
            n_samples=n_samples,
            seed=seed,
            tiles=tiles,
            batch_invariant=batch_invariant,
            compile=compile,
            memory_budget=memory_budget,
            chunk_size=chunk_size,
            autocast=autocast,
            joint=joint,
            estimator=estimator,
        )
        n_members = likelihood.n_members
        if n_members is not None and n_members != posterior.n_members:
            raise ValueError(
                f"the likelihood was trained with {n_members} members, the posterior has {posterior.n_members}: pass "
                f"the likelihood that was trained with this posterior"
            )
        self.device = own if device is None else torch.empty(0, device=device).device  # "cuda" gets its index
        self.posterior = _frozen(posterior, self.device)
        self.likelihood = _frozen(likelihood, self.device)
        self.likelihood.for_draws(self.settings.n_samples)
        self.n_samples, self.seed, self.tiles = self.settings.n_samples, self.settings.seed, self.settings.tiles
        self.estimator = estimator
        self._counted = self.n_samples if estimator == "sampling" else 0
        self.executions = Executions(self.posterior, self.likelihood, self.settings, self.device)
        self._tiling = Tiling(self.settings, self.posterior)
        self._learning: list[Future[None]] = []  # of tiles for batch sizes that come often
        self._ready: dict[
            tuple[torch.Size, torch.dtype, torch.device], Ready
        ] = {}  # (shape, dtype, device) of a full tile -> its compiled call
        self._taken: set[object] = set()  # kinds of rows that are not finite or of other dtypes, and are taken
        self.clock = time.perf_counter  # seconds; deadlines are measured with it
        self.precision: PrecisionError | None = None  # the error of autocast, once measured
        self.known_inputs: Key | None = None  # the inputs of the predictor that this one was made from
        self.manifest: Manifest | None = None  # the manifest of the artifact that vbdl.load read this predictor from

    @property
    def sealed(self) -> bool:
        """True after `warm_up`: from then on nothing is compiled."""
        return self.executions.sealed

    # -- predicting

    @_ids_in_words
    def __call__(
        self,
        x: Inputs,
        samples: bool = False,
        *,
        tolerance: "float | Rule | None" = None,
        deadline: float | None = None,
    ) -> Prediction:
        """Predict each row: (batch, ...) inputs -> the likelihood's kind of prediction.

        samples: also keep the parameters of p(y | x) of each draw, (samples, batch, ...), which mixture quantiles and
            densities need; memory grows with the number of draws.
        tolerance: stop drawing for each row once its answer is settled: a number is the largest standard error of the
            mean, in the mean's unit; or a rule (`LabelDecided`, `ThresholdDecided`, `StandardError` of
            `vbdl.adaptive`). n_samples is then the largest number of draws of a row.
        deadline: seconds; stop drawing when the time is up, but not before the first step of draws.

        With a tolerance or a deadline, draws are made in steps, and `prediction.n_samples` is the number of draws
        behind each row, (batch,) if rows differ. A row's answer equals that of a predictor with as many samples, up
        to rounding. Inputs with requires_grad receive a gradient, computed by the same graph uncompiled, unless there
        is a tolerance or a deadline. Forward mode and the transforms of torch.func are refused.
        """
        # reading it applies torch.set_num_threads to this thread, so all threads give identical bits
        torch.get_num_threads()
        if tolerance is not None or deadline is not None:
            return self._until(x, samples, tolerance, deadline)
        if type(x) is Tensor and not samples and not x.requires_grad and not x.is_nested and not is_transformed(x):
            ready = self._ready.get((x.shape, x.dtype, x.device))
            if ready is not None and (fields := ready(x)) is not None:
                return self.likelihood.prediction(fields, self._counted)
        flat = self.check(x)
        rows, sizes = flat.rows, self._sizes(flat)
        parts = [self._tile(tile, samples, n) for tile, n in self._tiling.tiles(flat, sizes)]
        if len(parts) == 1:
            fields = parts[0][0] if rows == sizes[0] else {n: t[:rows] for n, t in parts[0][0].items()}
        else:
            fields = {n: torch.cat([p[0][n] for p in parts])[:rows] for n in parts[0][0]}
        check_answer(flat, *fields.values())
        if flat.structure == TENSOR and rows >= sizes[0]:
            self._remember(flat.tensors[0], sizes[0])
        if not self.sealed and self.settings.compile == "background" and self._tiling.comes_often(flat, sizes):
            own = flat.map(lambda t: t.detach().clone())
            self._learning.append(background.submit(self, lambda self: self._learn(own)))
        kept = torch.cat([p[1] for p in parts if p[1] is not None], dim=1)[:, :rows] if samples else None
        return self.likelihood.prediction(fields, self._counted, kept)

    def stream(self, batches: Iterable[Inputs]) -> Iterator[Prediction]:
        """Yield a prediction for each batch; only one batch is in memory at a time."""
        for x in batches:
            yield self(x)

    def stream_state(self) -> StreamState:
        """Begin streams: sequences that come in parts, with the state of every draw carried from part to part.

        See `vbdl.engine.streaming.StreamState`; it is for networks with nn.LSTM, nn.GRU or nn.RNN.
        """
        return StreamState(self)

    @_ids_in_words
    def log_prob(self, x: Inputs, y: Tensor) -> Tensor:
        """The log predictive density (or probability) of each target in nats: log mean over draws of p(y | x, draw).

        x: (batch, ...). y: (batch, ...) targets. Returns (batch,).
        """
        flat = self.check(x)
        rows = flat.rows
        y = torch.as_tensor(y, device=self.device)
        if y.shape[:1] != (rows,):
            raise ValueError(f"there are {rows} rows and targets {tuple(y.shape)}: pass one target for each row")
        parts, start = [], 0
        for tile, n in self._tiling.tiles(flat, self._sizes(flat)):
            parameters = self._samples(tile)[:, :n]
            if start == 0:
                y = self.likelihood.check_targets(y, (rows, *parameters.shape[2:]))
            each = torch.stack([-self.likelihood.nll(p, y[start : start + n]) for p in parameters])
            parts.append(torch.logsumexp(each, dim=0) - math.log(self.n_samples))
            start += n
        log_prob = torch.cat(parts)
        check_answer(flat, log_prob)
        return log_prob

    def warm_up(
        self,
        batch_sizes: int | Sequence[int] | None = None,
        *,
        example: Inputs,
        samples: bool = False,
        adaptive: bool = False,
    ) -> "Predictor":
        """Compile everything that batches of these sizes need, and return the predictor.

        batch_sizes: one or several; default: a single row, and as many rows as the example has.
        example: inputs of at least one row; later rows must have the same shapes and dtypes.
        samples: also compile calls with samples=True.
        adaptive: also compile calls with a tolerance or a deadline.

        Afterwards nothing is compiled: an input whose shape was not warmed up raises RuntimeError. With autocast,
        `precision` then holds the error against float32 on the example, which `explain` prints.
        """
        flat = self.check(example)
        if flat.rows < 1:
            raise ValueError("warm_up needs an example of at least one row")
        if batch_sizes is None:
            batch_sizes = (1, flat.rows)
        elif isinstance(batch_sizes, int):
            batch_sizes = (batch_sizes,)
        self.executions.sealed = False
        self.executions.waiting = True
        self._wait_for_learning()
        sizes = {n: self._tiling.cut(pad(flat, 0, n)) if n else [self.tiles[0]] for n in batch_sizes}
        for size in sorted({size for of_batch in sizes.values() for size in of_batch}):
            tile = pad(flat, 0, size)
            if samples or not all(isinstance(e, Execution) and e.is_warm for e in self.executions.of(tile)):
                self._tile(tile, samples)
        for n in sorted(sizes):
            if self._tiling.could_be_faster(n, sizes[n]):
                self._learn(pad(flat, 0, n))
        for size in self._tiling.own(flat):
            self._tile(pad(flat, 0, size), samples)
        if adaptive:
            stepwise.warm_up(self.executions, flat)
        if self.settings.autocast is not None and batch_sizes:
            tile = pad(flat, 0, self._sizes(pad(flat, 0, min(batch_sizes)))[0])
            self.precision = against_float32(self, tile.nested)
        self.executions.sealed = True
        return self

    def wait(self) -> "Predictor":
        """Wait until what was predicted so far is compiled in the background, and return the predictor."""
        for executions in list(self.executions.by_shape.values()):
            for execution in executions:
                execution.check(wait=True)
        self._wait_for_learning()
        return self

    def explain(self, example: Inputs | None = None) -> str:
        """Describe how the draws are executed, and why.

        example: a batch of inputs; not needed if something was predicted before.
        """
        if example is not None:
            self.executions.of(next(self.tiles_of(self.check(example))))
        if not self.executions.by_shape:
            raise ValueError("nothing was predicted yet: call explain(example) with one batch of inputs")
        blocks = []
        for key, executions in list(self.executions.by_shape.items()):
            shapes = ", ".join(f"{list(shape)} {str(dtype).removeprefix('torch.')}" for shape, dtype in key[1])
            for index, execution in enumerate(executions):
                part = f", part {index + 1} of {len(executions)}" if len(executions) > 1 else ""
                blocks.append(f"input          {shapes}{part}\n{execution.explain()}")
        if self.settings.autocast is not None and example is not None:
            self.precision = against_float32(self, example)
        if self.precision is not None:
            blocks.append(str(self.precision))
        return "\n\n".join(blocks)

    def as_module(self) -> nn.Module:
        """This predictor as an nn.Module to use in place of the network: model(x) -> probabilities, or the mean."""
        return PredictiveModule(self)

    def replace(self, likelihood: Likelihood | None = None, **settings: Any) -> "Predictor":
        """A new predictor of the same posterior with another likelihood or other settings (seed, n_samples, ...)."""
        options = {**vars(self.settings), "device": self.device, **settings}
        replaced = Predictor(self.posterior, likelihood or self.likelihood, **options)
        replaced.manifest = self.manifest  # the manifest describes the posterior, which both predictors share
        replaced.known_inputs = next(iter(self.executions.by_shape), self.known_inputs)
        return replaced

    def __getstate__(self) -> dict[str, object]:
        """The state to copy or pickle, without compiled calls: a copy compiles again, even after `warm_up`."""
        return {**vars(self), "_ready": {}, "_tiling": Tiling(self.settings, self.posterior), "_learning": []}

    def __reduce_ex__(self, protocol: SupportsIndex) -> str | tuple:
        """Pickle with cloudpickle, if installed, if a module's class was defined in a function: pickle cannot."""
        networks = [part.module for part in self.posterior.parts]
        modules = [m for one in (self.posterior, self.likelihood, *networks) for m in one.modules()]
        if any("<locals>" in type(m).__qualname__ for m in modules):
            with contextlib.suppress(ImportError):
                import cloudpickle

                return _unpickled, (type(self), cloudpickle.dumps(self.__getstate__()))
        return super().__reduce_ex__(protocol)

    def save(self, folder: str | Path, **options: Any) -> Path:
        """Save this predictor as an artifact that `vbdl.load` reads: calls `vbdl.save(self, folder, **options)`."""
        from vbdl.artifact.saving import save

        return save(self, folder, **options)

    def export(self, folder: str | Path, **options: Any) -> "Package":
        """Compile the whole prediction ahead of time, for Python without a compiler, C++ or ONNX.

        options: backend, example, rebuild; see `vbdl.export.building.export`. Returns the package, loaded.
        """
        from vbdl.export.building import export

        return export(self, folder, **options)

    # -- step by step

    def _until(self, x: Inputs, samples: bool, tolerance: "float | Rule | None", deadline: float | None) -> Prediction:
        """Predict with a tolerance or a deadline."""
        if samples or self.estimator != "sampling":
            raise ValueError(
                "a tolerance or a deadline works neither with samples=True nor with estimator='moments': leave one out"
            )
        if deadline is not None and not (isinstance(deadline, Real) and deadline > 0):
            raise ValueError(f"deadline must be a positive number of seconds, got {deadline!r}")
        rule = None if tolerance is None else as_rule(tolerance)
        flat = self.check(x)
        fields, counts = stepwise.predict(self.executions, flat, rule, deadline, self.clock)
        check_answer(flat, *fields.values())
        same = len(counts) == 0 or bool((counts == counts[0]).all())
        n_samples = (int(counts[0]) if len(counts) else 0) if same else counts.to(self.device)
        return self.likelihood.prediction(fields, n_samples)

    # -- inputs and tiles

    def check(self, x: Inputs) -> Flat:
        """Flatten the inputs and move them to the device. Raises TypeError or ValueError if they cannot be inputs."""
        return check_inputs(x, self.device, self._floating, self._takes)

    def _takes(self, rows: Flat) -> bool:
        """Whether the network takes rows that are not finite, or of another dtype; it is asked once for each kind."""
        dtypes = tuple((t.shape[1:], t.dtype) for t in rows.tensors)
        kind = (rows.structure, dtypes, kinds_not_finite(rows))
        if kind not in self._taken:
            with outside_autocast(self.device):
                if not takes(self.posterior, self.likelihood, rows, self.settings.autocast):
                    return False
            self._taken.add(kind)
        return True

    def tiles_of(self, flat: Flat) -> Iterator[Flat]:
        """Cut the inputs into tiles and pad the last one; a batch of no rows gives one tile of padding."""
        return (tile for tile, _ in self._tiling.tiles(flat, self._sizes(flat)))

    def _sizes(self, flat: Flat) -> list[int]:
        """The sizes of the tiles that these inputs are cut into."""
        return self._tiling.cut(flat, self.executions.sizes(flat) if self.sealed else None)

    def _learn(self, flat: Flat) -> None:
        self._tiling.learn(flat, self.executions, lambda tile: self._tile(tile, False))

    def _wait_for_learning(self) -> None:
        while self._learning:
            self._learning.pop().exception()

    def _tile(self, tile: Flat, samples: bool, rows: int | None = None) -> tuple[State, Tensor | None]:
        """The prediction's fields for one tile; with `samples`, each draw's parameters too, (samples, rows, ...).

        rows: the number of rows that count; those that pad the tile may be left out.
        """
        if tile.structure == TENSOR and not samples and not (x := tile.tensors[0]).requires_grad:
            ready = self._ready.get((x.shape, x.dtype, x.device))
            if ready is not None:
                return ready.checked(x), None
        executions = self.executions.of(tile)
        with self.executions.compiling(executions, "sums", *(["parameters"] if samples else [])):
            if len(executions) == 1 and isinstance(execution := executions[0], Execution):
                kept = execution.parameters(tile, rows) if samples else None
                execution.settle(tile)
                return execution.fields(tile, rows), kept
            kept = torch.cat([e.parameters(tile) for e in executions], dim=0) if samples else None
            if len(executions) == 1:
                return executions[0].fields(tile), kept
            drawing = [e for e in executions if isinstance(e, Execution)]
            sums = drawing[0].empty_sums()
            for execution in drawing:
                execution.settle(tile)
                sums = execution.sums(tile, sums)
            return self.likelihood.finish(sums), kept

    def _remember(self, x: Tensor, rows: int) -> None:
        """Send full tiles of so many rows like these straight to the compiled call from now on."""
        key = (torch.Size((rows, *x.shape[1:])), x.dtype, x.device)
        if key in self._ready or x.device != self.device:
            return
        executions = self.executions.of(Flat((x if len(x) == rows else x[:rows],), TENSOR))
        if len(executions) == 1 and executions[0].one_call and (ready := executions[0].ready()) is not None:
            self._ready[key] = ready

    def _samples(self, tile: Flat) -> Tensor:
        """The parameters of p(y | x) of each draw for one tile, (samples, rows, ...)."""
        executions = self.executions.of(tile)
        with self.executions.compiling(executions, "parameters"):
            return torch.cat([e.parameters(tile) for e in executions], dim=0)


def check_answer(flat: Flat, *answers: Tensor) -> None:
    """Raise ValueError if what was computed from rows that are not finite has NaN; answers: (rows, ...) each."""
    if (bad := flat.not_finite) is None:
        return
    for t in answers:
        if t.is_floating_point() and bool(t.detach()[bad.to(t.device)].isnan().any()):
            raise of_not_finite(bad, flat.rows)


def _unpickled(kind: type, state: bytes) -> object:
    """Restore an object of this class from the state that cloudpickle wrote."""
    restored = object.__new__(kind)
    vars(restored).update(pickle.loads(state))
    return restored


def _frozen(module: M, device: torch.device) -> M:
    """A copy of the module on the device, in evaluation mode, whose parameters require no gradient.

    On the module's own device it reads the module's large tensors, as long as the module is not asked for them.
    """
    copy = lent_copy(module)
    read_only(copy)
    with only_reading():
        elsewhere = any(t.device != device for t in state_of(copy).values())
    if elsewhere:
        copy = copy.to(device)
    with only_reading():
        return copy.eval().requires_grad_(False)
