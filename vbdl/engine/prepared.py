"""The model of one execution: of a posterior of its own, which has learned from running on its inputs."""

from vbdl.calling.lending import only_reading
from vbdl.calling.stacking import holding, state_of
from vbdl.model import Model
from vbdl.nn.keyed import KeyedNetwork
from vbdl.types import Inputs


def prepared(model: Model, inputs: Inputs) -> Model:
    """A model of a copy of the posterior, with the same tensors, whose `prepare` has run on these inputs.

    `prepare` calls the module, and other threads may read draws of the given posterior meanwhile: it is never called.
    It gets what the copy found.
    """
    given = model.posterior
    with only_reading():
        posterior = holding(given, state_of(given), () if given.training_rows is None else (given.training_rows,))
    posterior.prepare(inputs)
    if isinstance(given.module, KeyedNetwork) and isinstance(posterior.module, KeyedNetwork):
        given.module.adopt(posterior.module)
    return model.of(posterior)
