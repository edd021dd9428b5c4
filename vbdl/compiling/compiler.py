"""The compilation of traced graphs by torch's Inductor.

Graphs are already traced, at fixed shapes, so they go to Inductor directly and not through torch.compile: there is no
second capture, no guards are checked in every call, and predictors share no cache of limited size.
"""

import errno
import logging
import os
import threading
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, fx
from torch.utils._pytree import tree_leaves

from vbdl.compiling import instructions, kernels, stored
from vbdl.compiling.graph import operator_of
from vbdl.compiling.repeated import Joined, Part, parts
from vbdl.compiling.replay import Replayed, is_worth_replaying

if TYPE_CHECKING:
    from torch._inductor.output_code import OutputCode

logger = logging.getLogger("vbdl")
_warned = threading.Event()


def compile_graph(graph: fx.GraphModule, inputs: list[Tensor], whole: bool = False) -> Callable[..., Sequence[Tensor]]:
    """Compile a graph at the shapes of these inputs.

    Blocks that are repeated in it are compiled once (`vbdl.compiling.repeated`), and a call that another process has
    compiled is loaded (`vbdl.compiling.stored`), without importing Inductor. Returns the graph itself, with a warning,
    if there is no C++ compiler or compiled code cannot be written.

    whole: compile the graph in one piece, although blocks are repeated.
    """
    key = stored.key_of(graph, inputs) if on_cpu(inputs) else None
    if key is not None and not whole and not _writing(graph) and (found := parts(graph)):
        return _stored_parts(graph, found, key) or _compiled_parts(graph, found, inputs, key)
    return _compiled(graph, inputs, key)


def _stored_parts(graph: fx.GraphModule, found: Sequence[Part], key: str) -> Joined | None:
    """Load the parts of a graph, without running any, if another process has stored all of them; otherwise None."""
    kinds = stored.load_kinds(key)
    if len(kinds) != len(found):
        return None
    loaded: dict[str, stored.Direct | None] = {}
    calls = []
    for part, of_part in zip(found, kinds, strict=True):
        name = stored.key_of_kinds(part.region.graph, lambda of_part=of_part: of_part)
        if name is None:
            return None
        if name not in loaded:
            loaded[name] = stored.load(name)
        if (call := loaded[name]) is None:
            return None
        calls.append(_of_arguments(call, _held(part.region.graph)))
    return _joined(graph, found, calls)


def _joined(graph: fx.GraphModule, found: Sequence[Part], calls: Sequence[Callable[..., Sequence[Tensor]]]) -> Joined:
    placeholders = [n.name for n in graph.graph.find_nodes(op="placeholder")]
    own = {n.name: getattr(graph, str(n.target)) for n in graph.graph.find_nodes(op="get_attr")}
    (end,) = graph.graph.find_nodes(op="output")
    return Joined(found, calls, own, placeholders, [n.name for n in tree_leaves(end.args)])


def _compiled_parts(graph: fx.GraphModule, found: Sequence[Part], inputs: list[Tensor], key: str) -> Joined:
    """Compile the parts of a graph, each on what those before it return for these inputs; equal parts once.

    key: the name under which is stored what the parts were called with, if they are stored too.
    """
    placeholders = [n.name for n in graph.graph.find_nodes(op="placeholder")]
    own = {n.name: getattr(graph, str(n.target)) for n in graph.graph.find_nodes(op="get_attr")}
    values = {**dict(zip(placeholders, inputs, strict=True)), **own}
    compiled: dict[str, Callable[..., Sequence[Tensor]]] = {}
    calls, kinds = [], []
    with torch.no_grad():
        for part in found:
            examples = part.laid_out([values[name] for name in part.region.inputs])
            name = stored.key_of(part.region.graph, examples)
            call = None if name is None else compiled.get(name)
            if call is None:  # without a name nothing tells whether parts are equal
                call = _compiled(part.region.graph, examples, name)
                if name is not None:
                    compiled[name] = call
            calls.append(call)
            kinds.append(None if name is None else stored.kinds_of(examples))
            values.update(zip(part.region.outputs, calls[-1](*examples), strict=True))
    if None not in kinds:
        stored.store_kinds(key, kinds)
    return _joined(graph, found, calls)


# Whether Inductor keeps Triton's code with a graph's, of which a CPU has none. Its list of it is one for all threads: a
# user's own torch.compile fails while this compiles in the background.
_BUNDLING = "bundle_triton_into_fx_graph_cache"


def _compiled(graph: fx.GraphModule, inputs: list[Tensor], key: str | None) -> Callable[..., Sequence[Tensor]]:
    """Compile a graph as a whole. key: the name under which it is stored, if it may be."""
    compiled: list[OutputCode] = []
    if key is not None and (found := stored.load(key)) is not None:
        return _of_arguments(found, _held(graph))

    try:
        import torch._inductor.config
        from torch._inductor.compile_fx import compile_fx, compile_fx_inner

        def inner(*args, **kwargs) -> "OutputCode":
            compiled.append(compile_fx_inner(*args, **kwargs))
            return compiled[-1]

        # no assertions on sizes: callers check shapes once, not in every call
        changed = {"size_asserts": False, "alignment_asserts": False}
        if on_cpu(inputs) and hasattr(torch._inductor.config, _BUNDLING):
            changed[_BUNDLING] = False
        settings = torch._inductor.config.patch(changed)
        with torch.no_grad(), settings, instructions.tried_once(), kernels.compiled_together():
            wrapped: Any = (
                _from_cache(graph, inputs, inner) if on_cpu(inputs) else compile_fx(graph, list(inputs), inner)
            )
            if is_worth_replaying(graph, inputs):
                return Replayed(wrapped)
            held = _held(graph)
            if not _writes_arguments_alone(graph) or _draws(graph):
                return wrapped
            direct = _without_wrappers(wrapped, compiled, [*held, *inputs], len(held), key)
            return wrapped if direct is None else _of_arguments(direct, held)
    except Exception as error:
        if _no_compiler(error):
            _warn("no C++ compiler was found", "Install g++ (or clang++), or set CXX, and start again.")
        elif (reason := _no_place(error)) is not None:
            _warn(
                f"compiled code cannot be written ({reason})",
                "Make room, or set TORCHINDUCTOR_CACHE_DIR to a folder that can be written to, and start again.",
            )
        else:
            raise
        return graph


def _warn(reason: str, advice: str) -> None:
    """Log the first such warning of this process; later ones are dropped, whatever their reason."""
    if not _warned.is_set():
        _warned.set()
        logger.warning(
            "%s, so predictions run uncompiled: slower, with the same results up to rounding. %s", reason, advice
        )


def _from_cache(graph: fx.GraphModule, inputs: list[Tensor], inner: Callable) -> Callable:
    """Compile with Inductor's cache of graphs, which Inductor skips unless the fake tensors have a ShapeEnv."""
    import torch._functorch.config
    from torch._guards import TracingContext, tracing
    from torch._inductor.compile_fx import compile_fx
    from torch._subclasses.fake_tensor import FakeTensorMode
    from torch.fx.experimental.symbolic_shapes import ShapeEnv

    fake = FakeTensorMode(allow_non_fake_inputs=True, shape_env=ShapeEnv())
    fixed: list[Any] = [fake.from_tensor(t, static_shapes=True) for t in inputs]
    # a hit in the autograd cache would not call `inner`, which _without_wrappers relies on
    with tracing(TracingContext(fake)), torch._functorch.config.patch(enable_autograd_cache=False):
        return compile_fx(graph, fixed, inner)  # type: ignore[return-value]


def copy_as_laid_out(t: Tensor) -> Tensor:
    """A copy of a tensor with its strides, which a clone does not keep where elements are left out or repeated."""
    single = t.detach()[tuple(slice(1) if stride == 0 else slice(None) for stride in t.stride())]
    own = torch.empty_strided(single.shape, single.stride(), dtype=t.dtype, device=t.device).copy_(single)
    return own.expand(t.shape)


def on_cpu(inputs: Sequence[Tensor]) -> bool:
    """True if all inputs are on the CPU."""
    return all(t.device.type == "cpu" for t in inputs)


def _writing(graph: fx.GraphModule) -> list[fx.Node]:
    """The nodes of a graph that may write to an argument or to a tensor of the graph."""
    operators = ((node, operator_of(node)) for node in graph.graph.nodes)
    return [node for node, operator in operators if operator is not None and operator._schema.is_mutable]


def _writes_arguments_alone(graph: fx.GraphModule) -> bool:
    """Whether a graph writes to nothing but its arguments, so that it can be tried out on copies of them."""
    targets = [node.args[0] if node.args else None for node in _writing(graph)]
    return all(isinstance(target, fx.Node) and target.op == "placeholder" for target in targets)


def _draws(graph: fx.GraphModule) -> bool:
    """Whether a graph draws from torch's generators: trying it out would take numbers that others are to get."""
    operators = map(operator_of, graph.graph.nodes)
    return any(o is not None and torch.Tag.nondeterministic_seeded in o.tags for o in operators)


def _held(graph: fx.GraphModule) -> list[Tensor]:
    """The graph's own tensors, which Inductor's code takes before the arguments."""
    return [*graph.parameters(), *graph.buffers()]


def _without_wrappers(
    wrapped: Callable, compiled: "list[OutputCode]", inputs: list[Tensor], held: int, key: str | None
) -> stored.Direct | None:
    """Inductor's generated code without the wrappers for gradients and mutation, which cost as much as a small network.

    It is stored under `key` for later processes. Returns None if the wrappers are needed: on a GPU, or if the two
    return different outputs for `inputs`, of which the first `held` are the graph's own tensors.
    """
    direct = getattr(compiled[0], "current_callable", None) if len(compiled) == 1 else None
    if direct is None or not on_cpu(inputs):
        return None
    given = [copy_as_laid_out(t) for t in inputs]  # the code may write to them
    expected = [*wrapped(*given[held:]), *given]

    def is_right(call: stored.Direct) -> bool:
        given = [copy_as_laid_out(t) for t in inputs]
        outputs = [*call(list(given)), *given]
        return len(outputs) == len(expected) and all(
            isinstance(a, Tensor) and a.shape == b.shape and a.stride() == b.stride() and a.dtype == b.dtype
            and torch.equal(a.nan_to_num(), b.nan_to_num())
            for a, b in zip(outputs, expected, strict=True)
        )  # fmt: skip

    try:
        if not is_right(direct):
            return None
    except Exception:  # the wrappers change the number or the order of arguments
        return None
    if key is not None:
        stored.store(key, direct, is_right)
    return direct


def _of_arguments(direct: stored.Direct, held: list[Tensor]) -> Callable[..., Sequence[Tensor]]:
    return lambda *arguments: direct([*held, *arguments])


def can_compile() -> bool:
    """True if Inductor finds a C++ compiler."""
    from torch._inductor import cpp_builder

    try:
        cpp_builder.get_cpp_compiler()
    except Exception:
        return False
    return True


def _no_place(error: BaseException | None) -> str | None:
    """The reason why the cache of compiled code cannot be written to, or None if the error is about something else."""
    while error is not None:
        if isinstance(error, OSError) and error.errno in _CANNOT_WRITE:
            return str(error)
        for code in (errno.ENOSPC, errno.EROFS):  # the compiler is another process, whose message is all there is
            if os.strerror(code) in str(error):
                return os.strerror(code)
        error = error.__cause__ or error.__context__
    return None


_CANNOT_WRITE = frozenset(
    (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM, errno.ENOTDIR, errno.EEXIST, errno.EISDIR)
)


def _no_compiler(error: BaseException | None) -> bool:
    while error is not None:
        if type(error).__name__ == "InvalidCxxCompiler" or "InvalidCxxCompiler" in str(error):
            return True
        error = error.__cause__ or error.__context__
    return False
