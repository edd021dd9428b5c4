"""Torch functions replaced while a network runs: each that drops units gets the masks of a draw.

They are replaced wherever they are called: `nn.Dropout*`, `F.dropout` in a forward, attention, recurrent layers. Any
other random operation raises an error that names the module, so that nothing random is missed or shared by accident.
"""

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from vbdl.calling.graphs import FunctionMode
from vbdl.nn.attention import multi_head_attention_forward, scaled_dot_product_attention
from vbdl.nn.dropout_functions import alpha_dropout, channel_dropout, dropout
from vbdl.nn.embedding import embedding
from vbdl.nn.masks import Masks, described
from vbdl.nn.normalization import batch_norm, rrelu
from vbdl.nn.recurrent import recurrent

_RANDOM = frozenset(
    """rand rand_like randn randn_like randint randint_like randperm bernoulli bernoulli_ normal normal_ uniform_
    exponential_ cauchy_ geometric_ log_normal_ random_ kaiming_uniform_ multinomial poisson binomial gumbel_softmax
    fractional_max_pool2d fractional_max_pool2d_with_indices fractional_max_pool3d
    fractional_max_pool3d_with_indices native_dropout _fused_dropout""".split()
)

# functions of torch by name; each replacement takes the masks, the function and its arguments
_REPLACEMENTS: dict[str, Callable[..., object]] = {
    "dropout": dropout,
    "dropout_": dropout,
    "dropout1d": channel_dropout,
    "dropout2d": channel_dropout,
    "dropout3d": channel_dropout,
    "feature_dropout": channel_dropout,
    "feature_dropout_": channel_dropout,
    "alpha_dropout": alpha_dropout,
    "alpha_dropout_": alpha_dropout,
    "feature_alpha_dropout": alpha_dropout,
    "feature_alpha_dropout_": alpha_dropout,
    "batch_norm": batch_norm,
    "embedding": embedding,
    "rrelu": rrelu,
    "rrelu_": rrelu,
    "scaled_dot_product_attention": scaled_dot_product_attention,
    "multi_head_attention_forward": multi_head_attention_forward,
    "lstm": recurrent,
    "gru": recurrent,
    "rnn_tanh": recurrent,
    "rnn_relu": recurrent,
}

# attributes, such as the shape, and methods that read none of a tensor's numbers, if they return no tensor
_OF_NO_NUMBERS = frozenset("__get__ size dim numel stride storage_offset is_contiguous element_size __len__".split())
# functions in Python that draw, and that a mode gets as one call for a parameter, although not for another tensor
_OF_PARAMETERS = frozenset("svd_lowrank pca_lowrank lobpcg".split())
_WATCHED = _RANDOM | _REPLACEMENTS.keys() | _OF_PARAMETERS


class CounterDropout(FunctionMode):
    """A context in which every dropout uses these masks.

    With masks of the kind `per_row`, for training, normalization and other random operations stay unchanged.
    """

    def __init__(self, masks: Masks):
        super().__init__()
        self._masks = masks

    def returned(self, outputs: Any) -> Any:
        """What the network returned, in which a tensor may have been dropped in place."""
        return self._masks.returned(outputs)

    def __torch_function__(
        self,
        func: Callable[..., object],
        types: Sequence[type],
        args: Any = (),
        kwargs: Any = None,
    ) -> object:
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        if self._masks.written:
            if name in _OF_NO_NUMBERS and not isinstance(output := func(*args, **kwargs), Tensor):
                return output
            now, refused = (args, kwargs), None
            try:
                now = self._masks.now(tuple(args)), self._masks.now(dict(kwargs))
            except ValueError as error:  # parts of the tensor were dropped, of which this may take another part
                refused = error
            if refused is not None:
                output = func(*args, **kwargs)
                parts = output if isinstance(output, tuple | list) else [output]
                if (name.endswith("_") and name != "__getitem__") or not all(_is_view(t) for t in parts):
                    raise refused
                return output
            args, kwargs = now
        if not self._masks.silent and name not in _WATCHED:
            return func(*args, **kwargs)
        if name in _OF_PARAMETERS:
            args, kwargs = tree_map_only(nn.Parameter, lambda p: p.as_subclass(Tensor), (args, kwargs))
            with self:  # inside of a mode's function it is off
                return func(*args, **kwargs)
        if self._masks.followed is not None:
            before = len(self._masks.calls)
            output = _REPLACEMENTS.get(name, _without_masks)(self._masks, func, *args, **kwargs)
            if isinstance(output, Tensor):
                self._masks.sizes.append(output.nbytes)
            if any(site.p > 0 for site in self._masks.calls[before:]):
                self._masks.followed.begin(output)
            self._masks.followed.go_on(name, args, kwargs, output)
            return output
        if (replacement := _REPLACEMENTS.get(name)) is not None:
            return replacement(self._masks, func, *args, **kwargs)
        return _without_masks(self._masks, func, *args, **kwargs)


def _is_view(value: object) -> bool:
    return isinstance(value, Tensor) and value._is_view()


def _without_masks(masks: Masks, func: Callable[..., object], *args: object, **kwargs: object) -> object:
    """Call a function that drops nothing. Raises NotImplementedError in prediction if it draws otherwise."""
    name = getattr(func, "__name__", "")
    if name in _RANDOM and not masks.per_row:
        raise NotImplementedError(
            f"{name} is called in {described(masks.place())}: only dropout can be drawn from counters "
            f"here. Use vbdl.Stochastic(module), which draws a network's own noise, or name that module in "
            f"deterministic= to keep it in evaluation mode"
        )
    return func(*args, **kwargs)
