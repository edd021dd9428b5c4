"""The model of one execution: of a posterior of its own, which has learned from running on its inputs."""

import torch
from torch import nn

from vbdl.calling.copies import holding
from vbdl.calling.lending import only_reading
from vbdl.calling.traversing import state_of
from vbdl.engine.written import are_copied, only_reads, without_writing
from vbdl.model import Model
from vbdl.nn.keyed import KeyedNetwork
from vbdl.types import Inputs, Posterior, State


def prepared(model: Model, inputs: Inputs) -> Model:
    """A model of a copy of the posterior, with the same tensors, whose `prepare` has run on these inputs.

    `prepare` calls the module, and other threads may read draws of the given posterior meanwhile: it is never called.
    It gets what the copy found. A posterior that learns nothing is the model's as it is.
    """
    given = model.posterior
    if not given.prepares:
        return model

    def make(state: State) -> Posterior:
        with only_reading():
            posterior = holding(given, state, () if given.training_rows is None else (given.training_rows,))
        posterior.prepare(inputs)
        return posterior

    with only_reading():
        state = state_of(given)
    reads = type(given).__module__.startswith("vbdl.posteriors.") and only_reads(given.module)
    parameters = set() if reads else {n for n, t in state.items() if isinstance(t, nn.Parameter)}
    posterior, written = without_writing(make, state, parameters)
    changed = parameters if are_copied(state, parameters) else written
    if changed:
        own = state_of(posterior)
        with torch.no_grad():
            for name in changed:
                if name in written:  # `prepare` has changed its copy
                    own[name].copy_(state[name])
                else:  # it holds the copy that was made to compare
                    own[name].data = state[name].detach()
    if isinstance(given.module, KeyedNetwork) and isinstance(posterior.module, KeyedNetwork):
        given.module.adopt(posterior.module)
    return model.of(posterior)
