"""Inspection of a module: its dropout, other randomness, normalization, size, cost, and how vbdl would run it."""

from dataclasses import dataclass, field

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from vbdl import former
from vbdl.calling.adapters import described_adapters
from vbdl.calling.checks import check_network, unwrapped
from vbdl.calling.copies import copied
from vbdl.calling.inputs import arguments, flatten, tensors
from vbdl.calling.outputs import pick
from vbdl.engine.predictor import Predictor
from vbdl.likelihoods.categorical import Categorical
from vbdl.likelihoods.gaussian import Gaussian
from vbdl.methods import METHODS, building
from vbdl.nn.dropout import DropoutNetwork
from vbdl.nn.masks import Site
from vbdl.nn.may_drop import DROPOUT_LAYERS
from vbdl.nn.noise import RandomCall
from vbdl.nn.normalization import NORMALIZATION_LAYERS
from vbdl.nn.stochastic import StochasticNetwork
from vbdl.posteriors.mc_dropout import MCDropout
from vbdl.posteriors.stochastic import Stochastic
from vbdl.types import Inputs, Output


@dataclass
class ModuleReport:
    """The result of `vbdl.inspect`, readable with `print`."""

    type: str
    parameters: int
    trainable: int
    buffers: int
    layers: dict[str, int]  # number of modules with parameters, by type
    stochastic: list[str] = field(default_factory=list)  # dropout calls that MCDropout would draw, one per line
    noise: list[str] = field(default_factory=list)  # random calls that Stochastic would draw, one per line
    deterministic: list[str] = field(default_factory=list)  # what looks random but would not be drawn, and why
    normalization: list[str] = field(default_factory=list)  # batch and instance normalization, and their state
    adapters: list[str] = field(default_factory=list)  # LoRA adapters of peft: rank, layers, and numbers
    tied: list[str] = field(default_factory=list)  # names that refer to the same parameter
    flops: int | None = None  # floating-point operations per row; None without an example
    plan: str | None = None  # how a predictor of `planned` would run; None without an example
    planned: str = "MCDropout"  # the method of the plan: MCDropout, or Stochastic for a network that draws by itself
    notes: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        operations = "" if self.flops is None else f", {self.flops:,} operations per row"
        counts = ", ".join(f"{n} {kind}" for kind, n in self.layers.items())
        lines = [
            f"{self.type}: {self.parameters:,} parameters ({self.trainable:,} trainable), "
            f"{self.buffers:,} in buffers{operations}",
            f"  layers: {counts or 'none with parameters'}",
        ]
        for title, entries in (
            ("stochastic", self.stochastic),
            ("draws by itself, as vbdl.Stochastic does from counters", self.noise),
            ("stays deterministic", self.deterministic),
            ("normalization", self.normalization),
            ("adapters", self.adapters),
            ("tied parameters", self.tied),
            ("notes", self.notes),
        ):
            if entries:
                lines.append(f"  {title}:")
                lines += [f"    {entry}" for entry in entries]
        if not self.stochastic and not self.noise:
            without = [METHODS[n] for n in building() if not METHODS[n].needs_dropout and not METHODS[n].is_one_network]
            others = " or ".join(sorted(method.class_name for method in without))
            lines.append(f"  nothing in it drops units: use {others}, or add dropout and train")
        lines.append("  methods, and when to choose them:")
        lines += [f"    {m.class_name}: {m.when}" for m in METHODS.values()]
        if self.plan is not None:
            lines.append(f"  plan for {self.planned}:")
            lines += [f"    {line}" for line in self.plan.splitlines()]
        return "\n".join(lines)

    __repr__ = __str__


def inspect(module: nn.Module, example: Inputs | None = None, *, output: Output = None) -> ModuleReport:
    """Report the dropout and noise of a module, what stays deterministic, normalization, size and plan.

    example: one batch, (batch, ...), on which a copy of the module runs without gradients. Only this finds dropout
    called inside a forward, counts operations and gives a plan; without an example only layers are listed.
    output: as for `MCDropout`, the output to predict from if the module returns several.
    The module is not changed.

    >>> net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Dropout(0.1), nn.Linear(8, 2))
    >>> print(str(vbdl.inspect(net, torch.randn(8, 4))).splitlines()[0])
    Sequential: 58 parameters (58 trainable), 0 in buffers, 96 operations per row
    """
    module = unwrapped(module)
    check_network(module)
    report = ModuleReport(
        type=type(module).__name__,
        parameters=sum(p.numel() for p in module.parameters()),
        trainable=sum(p.numel() for p in module.parameters() if p.requires_grad),
        buffers=sum(b.numel() for b in module.buffers()),
        layers=_layers(module),
        adapters=described_adapters(module),
    )
    _normalization(module, report)
    _tied(module, report)
    if example is None:
        _without_running(module, report)
    else:
        _by_running(module, flatten(example).nested, output, report)
    return report


def _layers(module: nn.Module) -> dict[str, int]:
    counts: dict[str, int] = {}
    for m in module.modules():
        if any(True for _ in m.parameters(recurse=False)):
            counts[type(m).__name__] = counts.get(type(m).__name__, 0) + 1
    return counts


def _normalization(module: nn.Module, report: ModuleReport) -> None:
    for name, m in module.named_modules():
        if isinstance(m, NORMALIZATION_LAYERS):
            if m.running_mean is None:
                state = "keeps no running statistics: a row would depend on its batch, so MCDropout refuses it"
            elif m.num_batches_tracked is not None and int(m.num_batches_tracked) == 0:
                state = "has seen no batch yet: train it before predicting"
            else:
                state = f"evaluates with statistics of {int(m.num_batches_tracked)} batches"  # type: ignore[arg-type]
            report.normalization.append(f"{name or 'the module'} ({type(m).__name__}): {state}")


def _tied(module: nn.Module, report: ModuleReport) -> None:
    names: dict[int, list[str]] = {}
    for name, p in module.named_parameters(remove_duplicate=False):
        names.setdefault(id(p), []).append(name)
    report.tied += [" = ".join(shared) for shared in names.values() if len(shared) > 1]


def _without_running(module: nn.Module, report: ModuleReport) -> None:
    for name, m in module.named_modules():
        label = f"{name or 'the module'} ({type(m).__name__})"
        if isinstance(m, DROPOUT_LAYERS):
            (report.stochastic if m.p > 0 else report.deterministic).append(
                f"{label}: p={m.p}" + ("" if m.p > 0 else ", so it drops nothing")
            )
        elif isinstance(m, nn.MultiheadAttention) and m.dropout > 0:
            report.stochastic.append(f"{label}: p={m.dropout} on the attention weights")
        elif isinstance(m, nn.RNNBase) and m.dropout > 0:
            if m.num_layers > 1:
                report.stochastic.append(f"{label}: p={m.dropout} between its {m.num_layers} layers")
            else:
                report.deterministic.append(f"{label}: p={m.dropout} acts between layers, but it has one")
        elif isinstance(m, nn.RReLU):
            report.deterministic.append(f"{label}: random in training only, predictions use the mean slope")
    report.notes.append("to find dropout called inside a forward, run the module: inspect(module, example)")


def _by_running(module: nn.Module, example: Inputs, output: Output, report: ModuleReport) -> None:
    network, calls, sites = DropoutNetwork(copied(module)).eval(), (), ()
    try:
        sites = network.locate(example)
    except NotImplementedError as error:  # it draws other noise than dropout
        report.notes.append(str(error))
        try:
            calls = StochasticNetwork(copied(module), None, None, (), False).eval().locate(example)
        except (NotImplementedError, RuntimeError, ValueError) as reason:
            report.notes.append(str(reason))
            return
    report.noise += [_describe_call(call) for call in calls]
    report.deterministic += [f"{where}: on in training only, off in prediction" for where in network.off or ()]
    for site in sites:
        (report.stochastic if site.p > 0 else report.deterministic).append(_describe(site))
    called = {site.path for site in sites}
    for name, m in module.named_modules():
        if isinstance(m, DROPOUT_LAYERS) and name not in called:
            report.deterministic.append(f"{name} ({type(m).__name__}): not called for this example")
        elif isinstance(m, nn.RNNBase) and m.dropout > 0 and m.num_layers == 1:
            label = f"{name} ({type(m).__name__})"
            report.deterministic.append(f"{label}: p={m.dropout} acts between layers, but it has one")
    args, kwargs = arguments(example)
    plain = copied(module).eval()
    with torch.no_grad(), torch.random.fork_rng(devices=[]), FlopCounterMode(display=False) as counter:
        outputs = plain(*args, **kwargs)
    rows = tensors(example)[0].shape[0]
    report.flops = counter.get_total_flops() // max(rows, 1)
    try:
        outputs = pick(outputs, output)
    except TypeError as error:
        report.notes.append(str(error))
        return
    if calls or any(site.p > 0 for site in sites):
        # any likelihood gives the same plan, which depends on the cost of the network
        width = outputs.shape[-1] if outputs.ndim > 1 else 1
        likelihood = Categorical() if outputs.ndim > 1 and width > 1 else Gaussian(width)
        posterior = Stochastic(module) if calls else MCDropout(module, output=output)
        report.planned = type(posterior).__name__
        report.plan = Predictor(posterior, likelihood, compile=False).explain(example)


def _describe_call(call: RandomCall) -> str:
    shape = list(call.shape)
    if call.axis is not None:
        shape[call.axis] = call.multiple
    numbers = "x".join(str(n) for n in shape) or "one number"
    batch = "one draw for all rows" if call.axis is None else f"batch on axis {call.axis}, shared by the rows of a draw"
    return f"{call.path or 'the module'} ({call.kind}): {numbers}, {batch}"


def _describe(site: Site) -> str:
    shape = list(site.shape)
    if site.axis is not None:
        shape[site.axis] = site.multiple
    units = "x".join(str(n) for n in shape)
    batch = "not on the batch" if site.axis is None else f"batch on axis {site.axis}"
    call = f"{site.path or 'the module'} ({site.kind}): p={site.p}"
    return f"{call}, a mask of {units} per draw, {batch}" if site.p > 0 else f"{call}, so it drops nothing"


__getattr__ = former.names(__name__, {"Report": "ModuleReport"})
