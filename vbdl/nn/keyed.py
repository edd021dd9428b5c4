"""Networks that draw from a key: what MC dropout and mean-field inference put around a user's network."""

from collections.abc import Mapping

from torch import Tensor, nn


class KeyedNetwork(nn.Module):
    """A network whose forward is a pure function of its inputs, its parameters and its `key`.

    inner: the user's network.
    key: (2,) int64 buffer, (seed, draw): everything random is drawn from it.
    rate: overrides the rates of dropout inside, for all or by module name.
    """

    inner: nn.Module
    key: Tensor
    rate: float | Mapping[str, float] | None = None

    def regularization(self, key: Tensor) -> Tensor | None:
        """The term that a draw adds to the loss of a row, in nats (the KL of mean-field inference), or None."""
        return None

    def adopt(self, other: "KeyedNetwork") -> None:
        """Take over what another network of the same modules has found by running."""
