"""The predictor: a posterior and a likelihood as one compiled function of the input.

It knows no method and no likelihood by name. Rows go through in tiles of a few sizes, padded, so that nothing is
compiled for a new batch size; with one size, on a CPU, a row's result is the same bit for bit in whatever batch it
comes.
"""

import contextlib
import functools
import math
import pickle
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from numbers import Real
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from vbdl.calling.inputs import TENSOR, Flat, flatten
from vbdl.calling.stacking import copied
from vbdl.data.rows import floating_dtype, outside_range
from vbdl.data.tiles import check_inputs, pad
from vbdl.engine import stepwise
from vbdl.engine.adaptive import Rule, as_rule
from vbdl.engine.executions import Executions
from vbdl.engine.precision import PrecisionError, against_float32
from vbdl.engine.predictive_module import PredictiveModule
from vbdl.engine.program import Ready
from vbdl.engine.settings import PredictorSettings
from vbdl.types import Inputs, Likelihood, Posterior, State, check_likelihood, is_posterior


def _ids_in_words(method: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap a method that takes inputs: an index error then names the ids and the embeddings."""

    @functools.wraps(method)
    def call(self: "Predictor", x: Inputs, *args: Any, **options: Any) -> Any:
        try:
            return method(self, x, *args, **options)
        except (IndexError, RuntimeError) as error:
            modules = (part.module for part in self.posterior.parts)
            if (said := outside_range(flatten(x).tensors, error, modules)) is None:
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
        are drawn where that has exactly the same distribution of every row (local reparameterization), which is
        faster: means, variances, quantiles and covariances within a row agree, covariances across rows do not.
    estimator: "sampling", or "moments": one pass with means and variances in place of draws, an approximation (see
        `vbdl.engine.moments`) whose error against n_samples draws `explain` measures; its predictions count 0 samples.
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
        own = likelihood.n_members
        if own is not None and own != posterior.n_members:
            raise ValueError(f"the likelihood was trained with {own} members, the posterior has {posterior.n_members}")
        first = next(iter([*posterior.parameters(), *posterior.buffers()]))
        self.device = first.device if device is None else torch.empty(0, device=device).device  # "cuda" with its number
        self.posterior: Any = _frozen(posterior, self.device)
        self.likelihood: Any = _frozen(likelihood, self.device)
        self.likelihood.for_draws(self.settings.n_samples)
        self.n_samples, self.seed, self.tiles = self.settings.n_samples, self.settings.seed, self.settings.tiles
        self.estimator = estimator
        self._counted = self.n_samples if estimator == "sampling" else 0
        self._floating = floating_dtype(self.posterior)
        self.executions = Executions(self.posterior, self.likelihood, self.settings, self.device)
        self._ready: dict[Any, Ready] = {}  # whole tiles by shape: the compiled call and nothing else
        self.clock = time.perf_counter  # of deadlines, seconds
        self.precision: PrecisionError | None = None  # of autocast, once measured
        self.manifest: Any = None  # set by vbdl.load: what the artifact says beside the tensors

    @property
    def sealed(self) -> bool:
        """True after `warm_up`: nothing is compiled any more."""
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
        # reading it applies torch.set_num_threads to this thread, so all threads give identical bits
        torch.get_num_threads()
        if tolerance is not None or deadline is not None:
            return self._until(x, samples, tolerance, deadline)
        if type(x) is Tensor and not samples and not x.requires_grad:
            ready = self._ready.get((x.shape, x.dtype, x.device))
            if ready is not None and (fields := ready(x)) is not None:
                return self.likelihood.prediction(fields, self._counted)
        flat = self.check(x)
        rows, size = flat.rows, self.settings.tile_for(flat.rows)
        parts = [self._tile(tile, samples) for tile in self.tiles_of(flat)]
        if len(parts) == 1:
            fields = parts[0][0] if rows == size else {n: t[:rows] for n, t in parts[0][0].items()}
        else:
            fields = {n: torch.cat([p[0][n] for p in parts])[:rows] for n in parts[0][0]}
        if flat.structure == TENSOR and rows >= size:
            self._remember(flat.tensors[0][:size])
        kept = torch.cat([p[1] for p in parts if p[1] is not None], dim=1)[:, :rows] if samples else None
        return self.likelihood.prediction(fields, self._counted, kept)

    def stream(self, batches: Iterable[Inputs]) -> Iterator[Any]:
        """A prediction for each batch, in memory of one batch."""
        for x in batches:
            yield self(x)

    @_ids_in_words
    def log_prob(self, x: Inputs, y: Tensor) -> Tensor:
        """(batch,) log p(y | x) in nats under the whole mixture: log mean over draws of p(y | x, draw)."""
        flat = self.check(x)
        rows, size = flat.rows, self.settings.tile_for(flat.rows)
        y = torch.as_tensor(y, device=self.device)
        if y.shape[:1] != (rows,):
            raise ValueError(f"there are {rows} rows and targets {tuple(y.shape)}")
        parts = []
        for number, tile in enumerate(self.tiles_of(flat)):
            start = number * size
            parameters = self._samples(tile)[:, : min(size, rows - start)]
            if start == 0:
                y = self.likelihood.check_targets(y, (rows, *parameters.shape[2:]))
            target = y[start : start + parameters.shape[1]]
            each = torch.stack([-self.likelihood.nll(p, target) for p in parameters])
            parts.append(torch.logsumexp(each, dim=0) - math.log(self.n_samples))
        return torch.cat(parts)

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
        flat = self.check(example)
        if flat.rows < 1:
            raise ValueError("warm_up needs an example of at least one row")
        self.executions.sealed = False
        for size in sorted({self.settings.tile_for(n) for n in batch_sizes}):
            self._tile(pad(flat, 0, size), False)
            if samples:
                self._tile(pad(flat, 0, size), True)
        if adaptive:
            stepwise.warm_up(self.executions, flat)
        if self.settings.autocast is not None and batch_sizes:
            tile = pad(flat, 0, self.settings.tile_for(min(batch_sizes)))
            self.precision = against_float32(self, tile.nested)
        self.executions.sealed = True
        return self

    def explain(self, example: Inputs | None = None) -> str:
        """The plan: how the draws are executed and why. Needs one example unless something was predicted before."""
        if example is not None:
            self.executions.of(next(self.tiles_of(self.check(example))))
        if not self.executions.by_shape:
            raise ValueError("nothing was predicted yet: explain(example) with one batch")
        blocks = []
        for key, executions in self.executions.by_shape.items():
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
        options = {**vars(self.settings), "device": self.device, **settings}
        made = Predictor(self.posterior, likelihood or self.likelihood, **options)
        made.manifest = self.manifest  # of the same posterior: how its network is made, and what belongs to it
        return made

    def __getstate__(self) -> dict[str, Any]:
        """What is copied and pickled: all but the compiled calls, which are made again, also after `warm_up`."""
        return {**vars(self), "_ready": {}}

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Pickle with cloudpickle, if installed, where a class was made in a function and has no name for pickle."""
        networks = [part.module for part in self.posterior.parts]
        modules = [m for one in (self.posterior, self.likelihood, *networks) for m in one.modules()]
        if any("<locals>" in type(m).__qualname__ for m in modules):
            with contextlib.suppress(ImportError):
                import cloudpickle

                return _unpickled, (type(self), cloudpickle.dumps(self.__getstate__()))
        return super().__reduce_ex__(protocol)

    def save(self, folder: str | Path, **options: Any) -> Path:
        """Write this predictor as an artifact, which `vbdl.load` reads: `vbdl.save(self, folder, **options)`."""
        from vbdl.artifact.saving import save

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
        rule = None if tolerance is None else as_rule(tolerance)
        fields, counts = stepwise.predict(self.executions, self.check(x), rule, deadline, self.clock)
        same = len(counts) == 0 or bool((counts == counts[0]).all())
        n_samples: Any = (int(counts[0]) if len(counts) else 0) if same else counts.to(self.device)
        return self.likelihood.prediction(fields, n_samples)

    # -- inputs and tiles

    def check(self, x: Inputs) -> Flat:
        """The inputs of any call, flat and on the device. Raises TypeError or ValueError with what to do."""
        return check_inputs(x, self.device, self._floating)

    def tiles_of(self, flat: Flat) -> Iterator[Flat]:
        """The inputs in tiles of one size, the last one padded; one tile of padding where there are no rows."""
        size = self.settings.tile_for(flat.rows)
        for start in range(0, max(flat.rows, 1), size):
            yield pad(flat, start, size)

    def _tile(self, tile: Flat, samples: bool) -> tuple[State, Tensor | None]:
        """The fields of one tile, and the parameters of each draw where they are asked for."""
        if tile.structure == TENSOR and not samples and not (x := tile.tensors[0]).requires_grad:
            ready = self._ready.get((x.shape, x.dtype, x.device))
            if ready is not None:
                return ready.checked(x), None
        executions = self.executions.of(tile)
        with self.executions.compiling(executions, "sums", *(["parameters"] if samples else [])):
            kept = torch.cat([e.parameters(tile) for e in executions], dim=0) if samples else None
            if len(executions) == 1 and executions[0].one_call:
                return executions[0].fields(tile), kept
            sums = executions[0].empty_sums()
            for execution in executions:
                sums = execution.sums(tile, sums)
            return self.likelihood.finish(sums), kept

    def _remember(self, x: Tensor) -> None:
        """Let whole tiles of this shape go straight to the compiled call from now on."""
        key = (x.shape, x.dtype, x.device)
        if key in self._ready or x.device != self.device:
            return
        executions = self.executions.of(Flat((x,), TENSOR))
        if len(executions) == 1 and executions[0].one_call and (ready := executions[0].ready()) is not None:
            self._ready[key] = ready

    def _samples(self, tile: Flat) -> Tensor:
        """(samples, rows, ...) the parameters of each draw, for one tile."""
        executions = self.executions.of(tile)
        with self.executions.compiling(executions, "parameters"):
            return torch.cat([e.parameters(tile) for e in executions], dim=0)


def _unpickled(kind: type, state: bytes) -> Any:
    """An object of this class from its state as cloudpickle wrote it."""
    made = object.__new__(kind)
    vars(made).update(pickle.loads(state))
    return made


def _frozen(module: nn.Module, device: torch.device) -> nn.Module:
    """A copy of the module on the device, in evaluation mode, whose parameters require no gradient."""
    return copied(module).to(device).eval().requires_grad_(False)
