"""The peers, each used as its own documentation says. Optional: one that is not installed is skipped with a line."""

import importlib.util
from collections.abc import Callable
from typing import Any

from torch import Tensor

PEERS = {
    "torch-uncertainty": "torch_uncertainty",
    "bayesian-torch": "bayesian_torch",
    "laplace-torch": "laplace",
    "posteriors": "posteriors",
    "blitz": "blitz",
    "baal": "baal",
    "lightning-uq-box": "lightning_uq_box",
}


class NotAvailable(Exception):
    """This peer cannot take part, and why."""


def absent() -> dict[str, str]:
    """Peers that are not installed here."""
    return {name: "not installed" for name, module in PEERS.items() if importlib.util.find_spec(module) is None}


def contenders(q: Any, x: Tensor, n_samples: int) -> dict[str, Callable[[], Callable[[], Tensor]]]:
    """name -> what builds it and gives its outputs, (samples, batch, outputs), for this posterior."""
    return {}
