"""An execution: one model at one shape of input, traced, planned and ready to be called in chunks of draws.

Calls share no data that they write to, so several threads may use an execution at once after each call is compiled.
"""

import torch
from torch import Tensor

from vbdl.calling.inputs import Flat
from vbdl.calling.stacking import select
from vbdl.engine.chunking import Chunking
from vbdl.engine.plan import Plan, choose
from vbdl.engine.program import Ready, tracing
from vbdl.engine.settings import PredictorSettings
from vbdl.engine.traced import Traced
from vbdl.engine.trial import check_apart, run_plainly
from vbdl.model import Model
from vbdl.types import State


class Execution:
    """The execution of draws 0, 1, ..., n_samples - 1 of one model on tiles of one shape.

    traced: the model as graphs. plan: how the draws are executed, and why. Raises ValueError, with the reason, if the
    module cannot be executed.
    """

    def __init__(
        self,
        model: Model,
        tile: Flat,  # (rows, ...) each
        settings: PredictorSettings,
        n_samples: int,
    ):
        self.likelihood, self.n_samples = model.likelihood, n_samples
        self.compiled: set[str] = set()  # names of the calls that are compiled: these need no lock
        with torch.no_grad(), tracing():
            model.posterior.prepare(tile.nested)
            self.traced = Traced(model, tile, settings, n_samples)
            self.plan, self._whole = self._planned()
        self._chunkings = {self.plan.chunk: self._whole}  # number of draws in a call -> chunking
        self.parameter_shape, self._dtype = self._whole.parameters_like()

    def _planned(self) -> tuple[Plan, Chunking]:
        """Check the module and trace a draw or two; return the plan chosen from that graph, and its chunking."""
        traced, model = self.traced, self.traced.model
        first = {**traced.shared, **select(traced.entries(torch.arange(1)), 0)}
        outputs = run_plainly(model, first, traced.tile)
        few, n_few, reasons = traced.probe()
        if few.random:
            raise NotImplementedError(
                f"the module calls {few.random} in prediction, which draws from torch's generator and ignores the "
                f"predictor's seed. Wrap the module in vbdl.MCDropout if it is dropout, or remove the call"
            )
        check_apart(outputs, model, first, traced.tile)
        if not few.output_depends_on_draw:
            raise ValueError(
                f"nothing random reaches the output of this {type(model.posterior).__name__}: every sample would be "
                f"the same. See vbdl.inspect(module, example) for the stochastic sites"
            )
        plan = choose(
            few,
            traced.strategy,
            traced_draws=n_few,
            n_samples=self.n_samples,
            tile=traced.rows,
            memory_budget=traced.settings.memory_budget,
            chunk_size=traced.settings.chunk_size,
            reasons=(*reasons, *traced.rewrites),
        )
        return plan, Chunking(traced, plan.chunk, plan.keep_draws, few if n_few == plan.chunk else None)

    def chunking(self, draws: int) -> Chunking:
        """The chunking of all draws into calls of at most `draws` each; made once for each number."""
        draws = min(draws, self.n_samples)
        return self._chunkings.setdefault(draws, Chunking(self.traced, draws, self.plan.keep_draws))

    @property
    def one_call(self) -> bool:
        """True if one call executes all draws."""
        return len(self._whole) == 1

    def empty_sums(self) -> State:
        """Running sums of zero draws for one tile, in the shapes and dtypes that the "sums" calls are compiled for."""
        device = self.traced.device
        zeros = torch.zeros((1, *self.parameter_shape), dtype=self._dtype, device=device)
        return {n: torch.zeros_like(t) for n, t in self.likelihood.summarize(zeros).items()}

    def fields(self, tile: Flat) -> State:
        """The prediction's fields for a tile; only if `one_call`."""
        return self._whole.run(0, "fields", self._whole.inputs(tile))

    def ready(self) -> Ready | None:
        """The compiled call as a function of the tile alone, or None before it is compiled or if draws are not kept."""
        return self._whole.ready()

    def sums(self, tile: Flat, carried: State) -> State:
        """Add all draws of this execution to a tile's running sums, and return the new sums."""
        inputs = self._whole.inputs(tile)
        for index in range(len(self._whole)):
            carried = self._whole.run(index, "sums", inputs, carried)
        return carried

    def parameters(self, tile: Flat) -> Tensor:
        """The parameters of p(y | x) of each draw, (samples, rows, ...)."""
        inputs = self._whole.inputs(tile)
        each = [self._whole.run(index, "parameters", inputs)["parameters"] for index in range(len(self._whole))]
        return torch.cat(each)
