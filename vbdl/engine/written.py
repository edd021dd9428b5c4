"""A prediction gives a forward copies of the parameters that it writes to, as embeddings with `max_norm` do.

The parameters of a predictor may lie in the memory of its posterior and of the networks that the user gave, which no
prediction may change. So an operation that would write to one is stopped before it does.
"""

from collections.abc import Callable, Collection, Sequence
from typing import TypeVar

import torch
from torch import Tensor, nn
from torch._ops import OpOverload
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from vbdl.calling.traversing import modules_of
from vbdl.nn.may_drop import READING_LAYERS, has_only_its_forward
from vbdl.types import Arguments, Keywords, State

T = TypeVar("T")

_SMALL = 2**20  # bytes
_OWN = ("vbdl.model", "vbdl.nn.dropout", "vbdl.likelihoods.")  # the homes of modules that run no function of the user's


class _Writes(BaseException):
    """Ends a run that is about to write to a parameter; no `except Exception` of a network catches it."""

    def __init__(self, name: str):
        super().__init__(name)
        self.name = name


class _Guard(TorchDispatchMode):
    """A context in which no operation of this thread writes to the memory of these tensors."""

    def __init__(self, tensors: State):
        super().__init__()
        self._are_mutable: dict[OpOverload, bool] = {}
        self._names = {t.untyped_storage().data_ptr(): name for name, t in tensors.items() if t.numel()}

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # which would import torch's compiler, and take as long as a small operation

    def __torch_dispatch__(
        self, func: OpOverload, types: Sequence[type], args: Arguments = (), kwargs: Keywords | None = None
    ) -> object:
        kwargs = kwargs or {}
        if (is_mutable := self._are_mutable.get(func)) is None:
            is_mutable = self._are_mutable[func] = func._schema.is_mutable
        if is_mutable:
            for argument, value in zip(func._schema.arguments, args, strict=False):
                self._check(argument, value)
            for argument in func._schema.arguments:
                self._check(argument, kwargs.get(argument.name))
        return func(*args, **kwargs)

    def _check(self, argument: torch.Argument, value: object) -> None:
        if argument.alias_info is None or not argument.alias_info.is_write:
            return
        for t in tree_leaves(value):
            if isinstance(t, Tensor) and t.layout == torch.strided:
                name = self._names.get(t.untyped_storage().data_ptr())
                if name is not None:
                    raise _Writes(name)


def without_writing(run: Callable[[State], T], state: State, parameters: Collection[str]) -> tuple[T, frozenset[str]]:
    """Run a function of a state that must not change it; copies take the place of the parameters it writes to.

    parameters: names of the state's entries. Returns what the function returns, and the names of those it writes to.
    Small parameters are all copied and compared afterwards, which takes less time than to watch every operation.
    """
    if are_copied(state, parameters):
        copies = {n: t.detach().clone() for n, t in state.items() if n in parameters}
        returned = run({**state, **copies})
        return returned, frozenset(n for n, t in copies.items() if t._version or not _equal(t, state[n]))
    written: set[str] = set()
    while True:
        guarded = {n: t for n, t in state.items() if n in parameters and n not in written}
        given = {n: t.detach().clone() if n in written else t for n, t in state.items()}
        try:
            with _Guard(guarded):
                return run(given), frozenset(written)
        except _Writes as error:
            written.add(error.name)


def only_reads(module: nn.Module) -> bool:
    """Whether it is clear that no forward of a module writes to parameters: that of a model, or of its network.

    All layers are torch's own that are known to read them, inside of modules of this library, and there are no hooks.
    """
    return all(
        (type(m) in READING_LAYERS or type(m).__module__.startswith(_OWN)) and has_only_its_forward(m)
        for _, m in modules_of(module)
    )


def are_copied(state: State, parameters: Collection[str]) -> bool:
    """Whether `without_writing` copies all of these parameters."""
    return sum(state[n].nbytes for n in parameters if n in state) <= _SMALL


def _equal(a: Tensor, b: Tensor) -> bool:
    return torch.equal(a, b) or torch.allclose(a, b, rtol=0.0, atol=0.0, equal_nan=True)
