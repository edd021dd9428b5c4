"""The predictor: a posterior and a likelihood as one compiled function of the input.

It knows no method and no likelihood by name. Rows go through in tiles of a few sizes, padded, so that nothing is
compiled for a new batch size; with one size, on a CPU, a row's result is the same bit for bit in whatever batch it
comes.
"""

import contextlib
import functools
import math
import pickle
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from numbers import Real
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from vbdl import adaptive
from vbdl.adaptive import Rule
from vbdl.data import cannot_take, floating_dtype, outside_range
from vbdl.execution import Execution, Settings
from vbdl.model import Model
from vbdl.moments import MomentExecution
from vbdl.precision import PrecisionError, against_float32
from vbdl.program import Ready
from vbdl.stacking import copied, forget, map_inputs, tensors
from vbdl.tiles import check_inputs, pad
from vbdl.types import Inputs, Likelihood, Posterior, State, check_likelihood, is_posterior

DEFAULT_SAMPLES = 32
DEFAULT_TILES = (1, 8, 64)
INVARIANT_TILES = (64,)


def _ids_in_words(method: Callable[..., Any]) -> Callable[..., Any]:
    """A method that takes inputs, and says which ids no embedding holds, also where compiled code raises."""

    @functools.wraps(method)
    def call(self: "Predictor", x: Inputs, *args: Any, **options: Any) -> Any:
        try:
            return method(self, x, *args, **options)
        except (IndexError, RuntimeError) as error:
            if (said := outside_range(x, error, (part.module for part in self.posterior.parts))) is None:
                raise
            raise said from error

    return call


class Predictor:
    """The posterior predictive p(y | x), averaged over n_samples draws of the posterior.

    posterior, likelihood: what `vbdl.fit` has trained. Both are copied: training them further changes nothing here.
    n_samples: draws; every member of an ensemble, and 32 otherwise, unless given.
    seed: the draws are those of this seed, the first 32 of 100 being the 32.
    tiles: batch sizes to compile for, each when it is first needed; a batch is padded to the smallest that holds it or
        cut into the largest. 1, 8 and 64 unless given: a row costs one row, and its result is the same in any batch
        to float rounding.
    batch_invariant: a row's result is the same bit for bit in whatever batch and place it comes (on a CPU), with one
        size of tiles, 64 unless given, or 1 or another multiple of 64; a single row then costs 64.
    compile: with False the same graph is run operation by operation.
    memory_budget: bytes for kept draws and for activations, half each.
    chunk_size: draws in one call; chosen from the memory budget unless given. Results do not depend on it.
    autocast: run the network in this dtype (torch.bfloat16); statistics stay float32.
    joint: draw the weights of mean-field layers, so that a sample is one network on all rows. Otherwise their outputs
        are drawn where that has exactly the same distribution of every row (local reparameterisation), which is
        faster: means, variances, quantiles and covariances within a row agree, covariances across rows do not.
    estimator: "sampling", or "moments": one pass with means and variances in place of draws, an approximation (see
        `vbdl.moments`) whose error against n_samples draws `explain` measures; its predictions count 0 samples.
    device: where to run; the posterior's unless given.

    Thread-safe. Raises ValueError for input that the module cannot take, with the reason.
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
        compile: bool = True,
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
        available = posterior.n_draws
        if n_samples is None:
            n_samples = DEFAULT_SAMPLES if available is None else available
        n_samples, seed = _whole("n_samples", n_samples, 1), _whole("seed", seed)
        if available is not None and n_samples > available:
            raise ValueError(f"n_samples is {n_samples}, but this posterior has only {available} different draws")
        if tiles is None:
            tiles = INVARIANT_TILES if batch_invariant else DEFAULT_TILES
        sizes = tiles if isinstance(tiles, Iterable) and not isinstance(tiles, str) else [tiles]
        tiles = tuple(_whole("each size in tiles", size, 1) for size in sizes)
        if not tiles:
            raise ValueError("tiles are batch sizes of at least 1, got none")
        if batch_invariant and not is_invariant(tiles):
            raise ValueError(f"batch_invariant=True needs one size of tiles, 1 or a multiple of 64, got {tiles}")
        memory_budget = _whole("memory_budget", memory_budget)
        if chunk_size is not None:
            chunk_size = _whole("chunk_size", chunk_size, 1)
        if autocast not in (None, torch.bfloat16, torch.float16):
            raise ValueError(f"autocast is torch.bfloat16, torch.float16 or None, got {autocast!r}")
        if estimator not in ("sampling", "moments"):
            raise ValueError(f"estimator is 'sampling' or 'moments', got {estimator!r}")
        own = likelihood.n_members
        if own is not None and own != posterior.n_members:
            raise ValueError(f"the likelihood was trained with {own} members, the posterior has {posterior.n_members}")
        first = next(iter([*posterior.parameters(), *posterior.buffers()]))
        self.device = first.device if device is None else torch.empty(0, device=device).device  # "cuda" with its number
        self.posterior: Any = _frozen(posterior, self.device)
        self.likelihood: Any = _frozen(likelihood, self.device)
        self.likelihood.for_draws(n_samples)
        self.n_samples, self.seed, self.estimator = n_samples, seed, estimator
        self._counted = n_samples if estimator == "sampling" else 0
        self.tiles = tuple(sorted(set(tiles)))
        self.settings = Settings(seed, memory_budget, chunk_size, compile, autocast, joint, self.tiles[-1])
        self._floating = floating_dtype(self.posterior)
        self._executions: dict[Any, list[Execution]] = {}
        self._ready: dict[Any, Ready] = {}  # whole tiles by shape: the compiled call and nothing else
        self._small: Predictor | None = None  # the same in small chunks, for tolerances and deadlines
        self.clock = time.perf_counter  # of deadlines, seconds
        self._lock = threading.RLock()
        self.sealed = False  # set by warm_up: nothing is compiled any more
        self.precision: PrecisionError | None = None  # of autocast, once measured
        self.manifest: Any = None  # set by vbdl.load: what the artefact says beside the tensors

    # -- predicting

    @_ids_in_words
    def __call__(
        self,
        x: Inputs,
        samples: bool = False,
        *,
        tolerance: "float | Rule | None" = None,
        deadline: float | None = None,
    ) -> Any:
        """The prediction of each row: (batch, ...) inputs -> a prediction of the likelihood's kind.

        samples: keep each draw's parameters of p(y | x) too, (samples, batch, ...), which mixture quantiles and
        densities need; memory grows with the number of draws.
        tolerance: draw on only for rows that are not settled: a standard error of the mean in its unit, or a rule
        (`LabelDecided`, `ThresholdDecided`, `StandardError` of `vbdl.adaptive`). n_samples is then the most a row gets.
        deadline: seconds; the best answer in that time, of at least one step of draws.
        With either, `prediction.n_samples` says how many draws each row is based on, (batch,) where they differ, and
        the answer is that of a predictor of as many samples, to rounding: sums are merged step by step.
        Inputs that require a gradient get it, from the same graph uncompiled; without a tolerance or a deadline.
        """
        torch.get_num_threads()  # asking makes `torch.set_num_threads` hold on this thread too: the same last bits
        if tolerance is not None or deadline is not None:
            return self._until(x, samples, tolerance, deadline)
        if type(x) is Tensor and not samples and not x.requires_grad:
            ready = self._ready.get((x.shape, x.dtype, x.device))
            if ready is not None and (fields := ready(x)) is not None:
                return self.likelihood.prediction(fields, self._counted)
        given = x
        x, rows = self._check(x)
        parts = [self._tile(tile, samples) for tile in self._tiles(x, rows)]
        if len(parts) == 1:
            fields = parts[0][0] if rows == self._size(rows) else {n: t[:rows] for n, t in parts[0][0].items()}
            self._remember(given, rows)
        else:
            fields = {n: torch.cat([p[0][n] for p in parts])[:rows] for n in parts[0][0]}
            if type(x) is Tensor:
                self._remember(x[: self._size(rows)], self._size(rows))
        kept = torch.cat([p[1] for p in parts if p[1] is not None], dim=1)[:, :rows] if samples else None
        return self.likelihood.prediction(fields, self._counted, kept)

    def stream(self, batches: Iterable[Inputs]) -> Iterator[Any]:
        """A prediction for each batch, in memory of one batch."""
        for x in batches:
            yield self(x)

    @_ids_in_words
    def log_prob(self, x: Inputs, y: Tensor) -> Tensor:
        """(batch,) log p(y | x) in nats under the whole mixture: log mean over draws of p(y | x, draw)."""
        x, rows = self._check(x)
        y = torch.as_tensor(y, device=self.device)
        if y.shape[:1] != (rows,):
            raise ValueError(f"there are {rows} rows and targets {tuple(y.shape)}")
        found = []
        for start, tile in zip(range(0, max(rows, 1), self._size(rows)), self._tiles(x, rows), strict=True):
            parameters = self._samples(tile)[:, : min(self._size(rows), rows - start)]
            if start == 0:
                y = self.likelihood.check_targets(y, (rows, *parameters.shape[2:]))
            target = y[start : start + parameters.shape[1]]
            each = torch.stack([-self.likelihood.nll(p, target) for p in parameters])
            found.append(torch.logsumexp(each, dim=0) - math.log(self.n_samples))
        return torch.cat(found)

    def warm_up(
        self,
        batch_sizes: Sequence[int] = (1,),
        *,
        example: Inputs,
        samples: bool = False,
        adaptive: bool = False,
    ) -> "Predictor":
        """Compile all that batches of these sizes need, for rows like the example's.

        samples, adaptive: also what predictions with samples, or with a tolerance or deadline, need.
        With autocast, `precision` then holds the error against float32 on the example, which `explain` prints.
        Nothing is compiled afterwards: a batch of a shape that was not warmed up raises. Returns the predictor.
        """
        example, rows = self._check(example)
        if rows < 1:
            raise ValueError("warm_up needs an example of at least one row")
        self.sealed = False
        for size in sorted({self._size(n) for n in batch_sizes}):
            self._tile(pad(example, 0, size), False)
            if samples:
                self._tile(pad(example, 0, size), True)
        if adaptive:
            self._stepwise().warm_up_steps(example)
        if self.settings.autocast is not None and batch_sizes:
            self.precision = against_float32(self, pad(example, 0, self._size(min(batch_sizes))))
        self.sealed = True
        return self

    def explain(self, example: Inputs | None = None) -> str:
        """The plan: how the draws are executed and why. Needs one example unless something was predicted before."""
        if example is not None:
            checked, rows = self._check(example)
            self._execution(pad(checked, 0, self._size(rows)))
        if not self._executions:
            raise ValueError("nothing was predicted yet: explain(example) with one batch")
        blocks = []
        for key, executions in self._executions.items():
            shapes = ", ".join(f"{list(shape)} {str(dtype).removeprefix('torch.')}" for shape, dtype in key[1])
            for index, execution in enumerate(executions):
                part = f", part {index + 1} of {len(executions)}" if len(executions) > 1 else ""
                blocks.append(f"input          {shapes}{part}\n{execution.plan.explain()}")
        if self.settings.autocast is not None and example is not None:
            self.precision = against_float32(self, example)
        if self.precision is not None:
            blocks.append(str(self.precision))
        return "\n\n".join(blocks)

    def as_module(self) -> nn.Module:
        """A drop-in for the network it came from: model(x) -> probabilities, or the mean."""
        return PredictiveModule(self)

    def replace(self, likelihood: Likelihood | None = None, **settings: Any) -> "Predictor":
        """A predictor with the same draws and another likelihood or other settings (seed, n_samples, tiles, ...)."""
        given = {
            "n_samples": self.n_samples,
            "seed": self.seed,
            "tiles": self.tiles,
            "compile": self.settings.compile,
            "memory_budget": self.settings.memory_budget,
            "chunk_size": self.settings.chunk_size,
            "autocast": self.settings.autocast,
            "joint": self.settings.joint,
            "estimator": self.estimator,
            "device": self.device,
        }
        made = Predictor(self.posterior, likelihood or self.likelihood, **{**given, **settings})
        made.manifest = self.manifest  # of the same posterior: how its network is made, and what belongs to it
        return made

    def __getstate__(self) -> dict[str, Any]:
        """For copies and pickle: without locks and compiled calls, which are made again, also where it was sealed."""
        return {**vars(self), "_executions": {}, "_ready": {}, "_small": None, "_lock": None, "sealed": False}

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Pickled by value where a class was made in a function, which pickle cannot name: with cloudpickle, if that
        is installed."""
        networks = [part.module for part in self.posterior.parts]
        modules = [m for one in (self.posterior, self.likelihood, *networks) for m in one.modules()]
        if any("<locals>" in type(m).__qualname__ for m in modules):
            with contextlib.suppress(ImportError):
                import cloudpickle

                return _unpickled, (type(self), cloudpickle.dumps(self.__getstate__()))
        return super().__reduce_ex__(protocol)

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update({**state, "_lock": threading.RLock()})

    def save(self, folder: str | Path, **options: Any) -> Path:
        """Write this predictor as an artefact, which `vbdl.load` reads: `vbdl.save(self, folder, **options)`."""
        from vbdl.artefact.saving import save

        return save(self, folder, **options)

    def export(self, folder: str | Path, **options: Any) -> Any:
        """Compile ahead of time, draws to decision, for Python without a compiler, C++ or ONNX; the loaded package.

        options: backend, example, rebuild; see `vbdl.export.package.export`.
        """
        from vbdl.export.package import export

        return export(self, folder, **options)

    # -- step by step

    def _until(self, x: Any, samples: bool, tolerance: "float | Rule | None", deadline: float | None) -> Any:
        """A prediction with a tolerance or a deadline."""
        if samples or self.estimator != "sampling":
            raise ValueError("a tolerance or a deadline is for statistics of draws: no samples=True, no moments")
        if deadline is not None and not (isinstance(deadline, Real) and deadline > 0):
            raise ValueError(f"a deadline is a positive number of seconds, got {deadline!r}")
        rule = None if tolerance is None else adaptive.as_rule(tolerance)
        x, rows = self._check(x)
        small = self._stepwise()
        if self.sealed and not small.sealed:
            raise RuntimeError(
                "a tolerance or a deadline was not warmed up, and compiling after warm_up is refused: "
                "warm_up(..., adaptive=True)"
            )
        fields, counts = adaptive.predict(x, rows, small.steps(), rule, deadline, self.clock)
        same = rows == 0 or bool((counts == counts[0]).all())
        n_samples: Any = (int(counts[0]) if rows else 0) if same else counts.to(self.device)
        return self.likelihood.prediction(fields, n_samples)

    def _stepwise(self) -> "Predictor":
        """This predictor with its draws in small chunks, which are steps."""
        if self.settings.chunk_size is not None:
            return self
        with self._lock:
            if self._small is None:
                self._small = self.replace(chunk_size=adaptive.step_size(self.n_samples))
        return self._small

    def steps(self) -> adaptive.Steps:
        """What `vbdl.adaptive` runs."""

        def run(executions: list[Execution], end: str, call: Any) -> State:
            with self._first(executions, end):
                return call()

        return adaptive.Steps(self.likelihood, self._size, self._execution, run)

    def warm_up_steps(self, example: Inputs) -> None:
        """Every step on every size of tile: rows are packed into any of them."""
        self.sealed = False
        for size in self.tiles:
            tile, rows = pad(example, 0, size), size
            for rule in (None, adaptive.NeverSettled()):
                adaptive.predict(tile, rows, self.steps(), rule)
        self.sealed = True

    # -- tiles

    def _check(self, x: Any) -> tuple[Inputs, int]:
        return check_inputs(x, self.device, self._floating)

    def _size(self, rows: int) -> int:
        return next((size for size in self.tiles if size >= rows), self.tiles[-1])

    def _tiles(self, x: Inputs, rows: int) -> Iterator[Inputs]:
        size = self._size(rows)
        for start in range(0, max(rows, 1), size):
            yield pad(x, start, size)

    def _execution(self, tile: Inputs) -> list[Execution]:
        names = tuple(tile) if isinstance(tile, dict) else None
        key = (names, tuple((tuple(t.shape), t.dtype) for t in tensors(tile)))
        found = self._executions.get(key)
        if found is None:
            if self.sealed:
                shapes = [(list(t.shape[1:]), str(t.dtype)) for t in tensors(tile)]
                raise RuntimeError(
                    f"rows of shape {shapes} in tiles of {tensors(tile)[0].shape[0]} were not warmed up, and compiling "
                    f"after warm_up is refused: warm_up with such an example and batch size"
                )
            with self._lock:
                found = self._executions.get(key)
                if found is None:
                    found = self.build(tile)
                    self._executions[key] = found
        return found

    def build(self, tile: Inputs) -> list[Any]:
        """An execution for each architecture in the posterior, with its share of the draws."""
        executions: list[Any] = []
        start = 0
        tile = map_inputs(Tensor.detach, tile)
        for part in self.posterior.parts:
            count = min(part.n_draws or self.n_samples, self.n_samples - start)
            if count <= 0:
                break
            model = Model(part, self.likelihood, self.settings.autocast, first_member=start)
            execution = MomentExecution if self.estimator == "moments" else Execution
            try:
                with _outside_autocast(self.device):
                    executions.append(execution(model, tile, self.settings, count))
            except (RuntimeError, IndexError, AssertionError) as error:
                raise cannot_take(tile, error, part.module) from error
            start += count
            forget(part.module)
        if len(shapes := {e.parameter_shape for e in executions}) > 1:
            raise ValueError(f"members return different shapes for a tile of rows: {sorted(map(tuple, shapes))}")
        return executions

    def _tile(self, tile: Inputs, samples: bool) -> tuple[State, Tensor | None]:
        if type(tile) is Tensor and not samples and not tile.requires_grad:
            ready = self._ready.get((tile.shape, tile.dtype, tile.device))
            if ready is not None:
                return ready.checked(tile), None
        executions = self._execution(tile)
        with self._first(executions, "sums", *(["parameters"] if samples else [])):
            kept = torch.cat([e.parameters(tile) for e in executions], dim=0) if samples else None
            if len(executions) == 1 and executions[0].one_call:
                return executions[0].fields(tile), kept
            sums = executions[0].empty_sums()
            for execution in executions:
                sums = execution.sums(tile, sums)
            return self.likelihood.finish(sums), kept

    def _remember(self, x: Any, rows: int) -> None:
        """Whole tiles of this shape can go straight to the compiled call."""
        if type(x) is not Tensor or rows != self._size(rows) or x.device != self.device:
            return
        if (x.shape, x.dtype, x.device) in self._ready:
            return
        executions = self._execution(x)
        if len(executions) == 1 and executions[0].one_call and (ready := executions[0].ready()) is not None:
            self._ready[(x.shape, x.dtype, x.device)] = ready

    def _samples(self, tile: Inputs) -> Tensor:
        executions = self._execution(tile)
        with self._first(executions, "parameters"):
            return torch.cat([e.parameters(tile) for e in executions], dim=0)

    @contextlib.contextmanager
    def _first(self, executions: list[Execution], *ends: str) -> Iterator[None]:
        """Lets one thread at a time through a call that compiles; calls after it share nothing they write to."""
        warm = executions[0].warm
        if warm.issuperset(ends):
            with _outside_autocast(self.device):
                yield
            return
        if self.sealed:
            raise RuntimeError(
                "each draw's parameters were asked for, or steps of draws, which was not warmed up, and compiling "
                "after warm_up is refused: warm_up(..., samples=True), or adaptive=True"
            )
        with self._lock, _outside_autocast(self.device):
            yield
        warm.update(ends)


def _unpickled(kind: type, state: bytes) -> Any:
    made = object.__new__(kind)
    made.__setstate__(pickle.loads(state))
    return made


def is_invariant(tiles: Sequence[int]) -> bool:
    """Whether a row has the same bits in any batch that is cut into tiles of these sizes."""
    return len(set(tiles)) == 1 and (tiles[0] == 1 or tiles[0] % 64 == 0)


class PredictiveModule(nn.Module):
    """model(x) -> probabilities or the mean: takes the network's place where a Tensor is expected."""

    def __init__(self, predictor: Predictor):
        super().__init__()
        self.predictor = predictor

    def forward(self, *args, **kwargs) -> Tensor:
        x = kwargs if kwargs else (args[0] if len(args) == 1 else args)
        return self.predictor(x).mean


def _outside_autocast(device: torch.device) -> contextlib.AbstractContextManager:
    """A predictor has an autocast of its own: around a call it would be compiled in by whoever calls first."""
    if not torch.is_autocast_enabled(device.type):
        return contextlib.nullcontext()  # entering one takes 10 us
    return torch.autocast(device.type, enabled=False)


def _whole(name: str, value: Any, least: int | None = None) -> int:
    """This setting as an int; TypeError for what is no whole number, ValueError for one below the least."""
    if isinstance(value, bool) or not hasattr(value, "__index__"):
        raise TypeError(f"{name} is a whole number, got {value!r}")
    if least is not None and value < least:
        raise ValueError(f"{name} is at least {least}, got {value}")
    return int(value)


def _frozen(module: nn.Module, device: torch.device) -> nn.Module:
    """A copy on the device, in evaluation mode, that no optimiser reaches."""
    return copied(module).to(device).eval().requires_grad_(False)
