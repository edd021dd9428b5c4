"""A posterior and a likelihood as one model: the entries of each draw, the shared entries, and p(y | x) of one draw.

entries           shape                                        source
network.*         (samples, ...), one entry per draw           Posterior.draws
likelihood.*      (samples, ...), those of the draw's member   parameters of a likelihood with members
features.*        no samples axis, shared                      the first member, if a decision reads features
all others        no samples axis, shared                      the module and the likelihood themselves
"""

import contextlib
import copy
from collections.abc import Collection, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vbdl.calling.copies import holding
from vbdl.calling.graphs import FunctionMode
from vbdl.calling.inputs import tensors
from vbdl.calling.layer_inputs import LayerInputs
from vbdl.calling.lending import only_reading
from vbdl.calling.outputs import pick
from vbdl.calling.traversing import device_of, parameters_of, state_of
from vbdl.types import Inputs, Likelihood, Posterior, State


class Model(nn.Module):
    """The module that is stacked and traced: it maps inputs to parameters of p(y | x) for one draw.

    autocast: the dtype that the network runs in; the likelihood stays in float32.
    first_member: the likelihood's number of the posterior's first member, if the posterior is a part of an ensemble of
        several architectures.
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
        layer = likelihood.reads_layer
        self.features = None if layer is None else LayerInputs(first_network(posterior), layer)
        self.precision, self._first_member = autocast, first_member
        self._hidden = (posterior,)  # not a submodule: draws are computed from its tensors, calls do not use them

    @property
    def posterior(self) -> Posterior:
        return self._hidden[0]

    @property
    def device(self) -> torch.device:
        """The device of the posterior's tensors."""
        with only_reading():
            return device_of(self.posterior)

    # -- the entries of draws and members

    def entries(self, numbers: Tensor, seed: int) -> State:
        """The entries that differ between draws, (samples, ...) each, detached; numbers: (samples,) int64 draws."""
        return self.entries_of(self.posterior.draws(numbers, seed), numbers)

    def entries_of(self, drawn: State, numbers: Tensor) -> State:
        """Add the likelihood's entries of these draws to those of the posterior, (samples, ...) each."""
        return self._detached({f"network.{name}": t for name, t in drawn.items()} | self._of_likelihood(numbers))

    def one_draw(self, number: int, seed: int) -> State:
        """Find the entries of one draw, (...) each, without gradients."""
        q = self.posterior
        # a class of the user's may define `draws` alone, of which the shortcut of its base knows nothing
        last = next(c for c in type(q).__mro__ if "draws" in vars(c) or "one_draw" in vars(c))
        own = q.one_draw(number, seed) if "one_draw" in vars(last) else Posterior.one_draw(q, number, seed)
        return self.with_likelihood(own, number)

    def with_likelihood(self, drawn: State, number: int) -> State:
        """Add the likelihood's entries of one draw to those of the posterior, (...) each."""
        state = {f"network.{name}": t for name, t in drawn.items()}
        if self.likelihood.n_members is not None:
            state |= {name: t[0] for name, t in self._of_likelihood(torch.tensor([number])).items()}
        return self._detached(state)

    def _of_likelihood(self, numbers: Tensor) -> State:
        """The likelihood's entries of these draws, (samples, ...) each."""
        if self.likelihood.n_members is None:
            return {}
        member = self._first_member + self.posterior.member_of(numbers)
        named = parameters_of(self.likelihood).items()
        return {f"likelihood.{name}": p.index_select(0, member.to(p.device)) for name, p in named}

    def _detached(self, state: State) -> State:
        device = self.device
        return {name: t.detach() if t.device == device else t.detach().to(device) for name, t in state.items()}

    def member_entries(self) -> State:
        """The entries that differ between members, (members, ...) each: the trained tensors, not copies."""
        state = {f"network.{name}": t for name, t in self.posterior.stacked().items()}
        if self.likelihood.n_members is not None:
            state |= {f"likelihood.{name}": p for name, p in self.likelihood.named_parameters()}
        return state

    def shared(self, own: Collection[str]) -> State:
        """The entries of network and likelihood that all draws share. own: names of the entries that differ."""
        state = {f"network.{name}": t for name, t in self.posterior.shared().items()}
        state |= {f"likelihood.{name}": t for name, t in state_of(self.likelihood).items()}
        if self.features is not None:
            state |= {f"features.{name}": t for name, t in state_of(self.features).items()}
        return {name: t for name, t in state.items() if name not in own}

    @property
    def by_member(self) -> frozenset[str]:
        """The names of the trained tensors with a leading members axis: `posterior.<name>` and `likelihood.<name>`."""
        names = {f"posterior.{name}" for name in self.posterior.by_member}
        if self.likelihood.n_members is not None:
            names |= {f"likelihood.{name}" for name, _ in self.likelihood.named_parameters()}
        return frozenset(names)

    def of(self, posterior: Posterior) -> "Model":
        """This model with another posterior of the same network."""
        return Model(posterior, self.likelihood, self.precision, self._first_member)

    def twin(self) -> "Model":
        """A model of copies of the modules that hold the same tensors, to run or to trace.

        A call with replaced weights puts them into the modules for as long as it lasts, and a trace puts tensors there
        that exist only inside it. So every thread calls modules of its own, and reads entries from a model that is
        never called: `entries` and `shared` of a twin are for the thread that owns it.
        """
        twin = copy.copy(self)
        twin._modules = {
            "network": holding(self.network, state_of(self.network)),
            "likelihood": holding(self.likelihood, state_of(self.likelihood)),
        }
        if self.features is not None:
            twin._modules["features"] = holding(self.features, state_of(self.features))
        return twin

    # -- one draw

    def forward(self, *args, **kwargs) -> Tensor:
        """The parameters of p(y | x), (batch, ...); the arguments are the network's inputs, (batch, ...) each."""
        with autocast(self.precision, [*args, *kwargs.values()]):
            outputs = self.network(*args, **kwargs)
        outputs = pick(outputs, self.posterior.output)
        if outputs.dtype in (torch.bfloat16, torch.float16):
            outputs = outputs.float()  # statistics are float32 or better
        parameters = self.likelihood(outputs)
        if self.features is None:
            return parameters
        return self.likelihood.with_features(parameters, self.features(*args, **kwargs))


def first_network(posterior: Posterior) -> nn.Module:
    """A copy of the user's network with the tensors of the first member; weights that are drawn have their means.

    Raises ValueError for an ensemble of several architectures.
    """
    if len(posterior.parts) > 1:
        raise ValueError(
            "the features of an ensemble of several architectures are not comparable: use an ensemble of one"
        )
    network = posterior.user_network
    first = {name: t[0] for name, t in posterior.stacked().items()}
    copied = holding(posterior.module, {**posterior.shared(), **first}).requires_grad_(False)
    (path,) = [name for name, m in posterior.module.named_modules() if m is network][:1]
    return copied.get_submodule(path).eval()


@contextlib.contextmanager
def autocast(dtype: torch.dtype | None, inputs: Inputs) -> Iterator[None]:
    """A context in which a network runs in this dtype, also under `vmap`; float32 if it is None."""
    if dtype is None:
        yield
        return
    device = tensors(inputs)[0].device.type
    with torch.autocast(device, dtype=dtype, cache_enabled=False), MappedAutocast(dtype):
        yield


_PRODUCTS = {
    F.linear,
    F.bilinear,
    F.conv1d,
    F.conv2d,
    F.conv3d,
    F.conv_transpose1d,
    F.conv_transpose2d,
    F.conv_transpose3d,
}
_NORMALIZATIONS = {F.batch_norm, F.instance_norm, F.group_norm, F.layer_norm}


class MappedAutocast(FunctionMode):
    """A context that applies autocast to layers and normalization under `vmap`, whose rules bypass autocast.

    Otherwise a layer would stay in float32, and the float32 scale of a normalization would turn everything after
    it into float32 again.
    """

    def __init__(self, dtype: torch.dtype):
        super().__init__()
        self._dtype = dtype

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func in _PRODUCTS:
            low = lambda a: a.to(self._dtype) if isinstance(a, Tensor) and a.is_floating_point() else a
            return func(*map(low, args), **{k: low(a) for k, a in kwargs.items()})
        if func in _NORMALIZATIONS and args and args[0].dtype == self._dtype:
            return func(args[0].float(), *args[1:], **kwargs).to(
                self._dtype
            )  # float32 inside, as autocast does without vmap
        return func(*args, **kwargs)
