"""A posterior and a likelihood as one model: what each draw has of its own, what all share, and p(y | x) of one draw.

name              held                                  comes from
network.*         (samples, ...), one entry a draw      Posterior.draws
likelihood.*      (samples, ...), its member's          parameters of a likelihood that has members
everything else   once                                  the module and the likelihood themselves
"""

from collections.abc import Collection
from itertools import chain

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from vbdl.calling.inputs import tensors
from vbdl.calling.stacking import state_of
from vbdl.types import Likelihood, Posterior, State


class Model(nn.Module):
    """The module that is stacked and traced: inputs -> parameters of p(y | x), of one draw.

    autocast: the dtype that the network runs in; the likelihood stays in float32.
    first_member: the place of the posterior's members among the likelihood's, where the posterior is a part of an
        ensemble of several architectures.
    """

    def __init__(
        self,
        posterior: Posterior,
        likelihood: Likelihood,
        autocast: torch.dtype | None = None,
        first_member: int = 0,
    ):
        super().__init__()
        self.network, self.likelihood = posterior.module, likelihood
        self._autocast, self._first_member = autocast, first_member
        self._hidden = (posterior,)  # no submodule: its tensors are not called, they are what draws are made of

    @property
    def posterior(self) -> Posterior:
        return self._hidden[0]

    @property
    def device(self) -> torch.device:
        """Where the posterior's tensors are."""
        return next(chain(self.posterior.parameters(), self.posterior.buffers())).device

    # -- which entries are whose

    def entries(self, numbers: Tensor, seed: int) -> State:
        """What the draws of these numbers have of their own: (samples,) int64 -> (samples, ...) each, detached."""
        state = {f"network.{name}": t for name, t in self.posterior.draws(numbers, seed).items()}
        if self.likelihood.n_members is not None:
            member = self._first_member + self.posterior.member_of(numbers)
            for name, p in self.likelihood.named_parameters():
                state[f"likelihood.{name}"] = p.index_select(0, member.to(p.device))
        device = self.device
        return {name: t.detach().to(device) for name, t in state.items()}

    def member_entries(self) -> State:
        """What each member has of its own, (members, ...) each: the tensors that are trained, not copies."""
        state = {f"network.{name}": t for name, t in self.posterior.stacked().items()}
        if self.likelihood.n_members is not None:
            state |= {f"likelihood.{name}": p for name, p in self.likelihood.named_parameters()}
        return state

    def shared(self, own: Collection[str]) -> State:
        """The entries of network and likelihood that all draws share, held once. own: names that each draw has."""
        state = {f"network.{name}": t for name, t in self.posterior.shared().items()}
        state |= {f"likelihood.{name}": t for name, t in state_of(self.likelihood).items()}
        return {name: t for name, t in state.items() if name not in own}

    @property
    def by_member(self) -> frozenset[str]:
        """Names of the trained tensors with a leading members axis: `posterior.<name>` and `likelihood.<name>`."""
        names = {f"posterior.{name}" for name in self.posterior.by_member}
        if self.likelihood.n_members is not None:
            names |= {f"likelihood.{name}" for name, _ in self.likelihood.named_parameters()}
        return frozenset(names)

    # -- one draw

    def forward(self, *args, **kwargs) -> Tensor:
        """(batch, ...) inputs -> (batch, ...) parameters of p(y | x)"""
        if self._autocast is None:
            outputs = self.network(*args, **kwargs)
        else:
            device = tensors([*args, *kwargs.values()])[0].device.type
            with torch.autocast(device, dtype=self._autocast, cache_enabled=False), MappedAutocast(self._autocast):
                outputs = self.network(*args, **kwargs)
        if not isinstance(outputs, Tensor):
            raise TypeError(
                f"the module returned {type(outputs).__name__}, vbdl needs one Tensor (batch, ...): "
                f"wrap it in a module that picks the output to predict from"
            )
        if outputs.dtype in (torch.bfloat16, torch.float16):
            outputs = outputs.float()  # statistics are float32 or better
        return self.likelihood(outputs)


_CONVOLUTIONS = {F.conv1d, F.conv2d, F.conv3d, F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d}
_NORMALIZATIONS = {F.batch_norm, F.instance_norm, F.group_norm, F.layer_norm}


class MappedAutocast(TorchFunctionMode):
    """Applies autocast to convolutions and normalization under `vmap`, whose batching rules pass autocast by.

    Without it a convolution would stay in float32, and the float32 scale of a normalization would make everything
    after it float32 again.
    """

    def __init__(self, dtype: torch.dtype):
        super().__init__()
        self._dtype = dtype

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func in _CONVOLUTIONS:
            low = lambda a: a.to(self._dtype) if isinstance(a, Tensor) and a.is_floating_point() else a
            return func(*map(low, args), **{k: low(a) for k, a in kwargs.items()})
        if func in _NORMALIZATIONS and args and args[0].dtype == self._dtype:
            return func(args[0].float(), *args[1:], **kwargs).to(self._dtype)  # float32 inside, as unmapped
        return func(*args, **kwargs)
