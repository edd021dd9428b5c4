"""Compiled code of a traced step, made in the background, which takes the graph's place at a step fixed beforehand.

That step does not depend on a clock, so a training that is repeated or resumed runs the same code at the same steps.
"""

import copy
import logging
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future

from torch import Tensor, fx

from vbdl.calling.graphs import in_words
from vbdl.compiling.compiler import compile_graph, copy_as_laid_out
from vbdl.engine import background
from vbdl.engine.program import compiling

logger = logging.getLogger("vbdl")

Call = Callable[..., Sequence[Tensor]]


class Takeover:
    """A graph, and from the step `first` on its compiled code; a step that is reached before the compiler ends waits.

    like: arguments of the graph, which are copied. seconds: that the compiler took; 0 until it ends.
    """

    def __init__(self, graph: fx.GraphModule, like: Sequence[Tensor], first: int):
        self.first, self.seconds = first, 0.0
        self._graph = graph
        # the compiler runs the code on them to try it out, while training changes the parameters
        self._like = [copy_as_laid_out(t) for t in like]
        self._compiled: Call | None = None
        self._job: Future[None] | None = background.submit(self, Takeover._compile)

    def of_step(self, number: int) -> Call:
        """The code that runs the step of this number, counted from the beginning of the training."""
        if number < self.first:
            return self._graph
        if self._job is not None:
            try:
                self._job.result()
            except Exception as error:  # Inductor raises many types of errors
                logger.warning(
                    "the training step cannot be compiled and runs uncompiled, which is slower: %s", in_words(error)
                )
            self._job = None
        return self._compiled or self._graph

    def cancel(self) -> None:
        """Leave the compiler out if it has not begun."""
        if self._job is not None:
            self._job.cancel()

    def _compile(self) -> None:
        begun = time.perf_counter()
        with compiling:
            # of a copy, whose constants Inductor replaces while it traces
            self._compiled = compile_graph(copy.deepcopy(self._graph), self._like, whole=True)
        self._like = []
        self.seconds = time.perf_counter() - begun
