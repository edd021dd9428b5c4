"""What the first prediction does before it answers: how often the network runs, what is imported, what is held."""

import importlib.util
import json
import platform
import subprocess
import sys
import textwrap
import weakref
from concurrent.futures import Future
from pathlib import Path

import pytest
import torch
from torch import nn

import vbdl.calling.apart
import vbdl.engine.first_run
import vbdl.engine.prepared
import vbdl.engine.trial
import vbdl.engine.written
import vbdl.nn.drawn
import vbdl.nn.masks
from vbdl.calling.freed import give_back
from vbdl.engine import background
from vbdl.engine.predictor import Predictor
from vbdl.likelihoods.categorical import Categorical
from vbdl.nn.sampled import StdFactor
from vbdl.posteriors.ensemble import DeepEnsemble
from vbdl.posteriors.mc_dropout import MCDropout
from vbdl.posteriors.mean_field import MeanField

_spec = importlib.util.spec_from_file_location(
    "contract_of_first_answers", Path(__file__).with_name("test_contract.py")
)
assert _spec is not None and _spec.loader is not None
contract = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(contract)
NETWORKS, POSTERIORS = contract.NETWORKS, contract.POSTERIORS

SAMPLES = 7
# rows that a network runs on beyond those of the draws: draw 0 on its rows and on others, two rows and one that drop
# nothing; networks that draw by themselves run on two and on three rows, and with their noise held at constants
EXTRA, EXTRA_OF_NOISE = 5, 11
TRACED = ("laplace",)  # linear in its weights: as a graph it answers with one pass


@pytest.fixture
def later(monkeypatch):
    """Nothing is done in the background."""
    monkeypatch.setattr(background, "submit", lambda owner, job: Future())


@pytest.fixture
def rows_run():
    """The numbers of rows of each call of a ReLU, of which the networks here have one."""
    seen: list[int] = []

    def see(module, inputs):
        if isinstance(module, nn.ReLU):
            seen.append(len(inputs[0]))

    hook = nn.modules.module.register_module_forward_pre_hook(see)
    yield seen
    hook.remove()


@pytest.mark.parametrize("posterior", POSTERIORS)
def test_a_network_runs_on_few_rows_more_than_its_draws_have(posterior, later, rows_run):
    torch.manual_seed(0)
    q = POSTERIORS[posterior](NETWORKS["mlp"][0])
    predict = Predictor(q, Categorical(), min(q.n_draws or SAMPLES, SAMPLES), compile="background")
    rows_run.clear()
    predict(torch.randn(1, 11))
    extra = EXTRA_OF_NOISE if "stochastic" in posterior or "augmentation" in posterior else EXTRA
    least = 1 if posterior in TRACED else predict.n_samples
    assert least <= sum(rows_run) <= predict.n_samples + extra


def test_members_of_an_ensemble_answer_a_row_with_one_pass_each(later, rows_run):
    predict = Predictor(DeepEnsemble([NETWORKS["mlp"][0]() for _ in range(3)]), Categorical(), compile="background")
    predict(torch.randn(1, 11))
    assert rows_run == [1, 1, 1]


def test_draws_of_dropout_answer_a_row_in_one_pass(later, rows_run):
    q = MCDropout(NETWORKS["mlp"][0]())
    predict = Predictor(q, Categorical(), SAMPLES, compile="background")
    predict(torch.randn(1, 11))
    assert rows_run == [2, 1, SAMPLES]


@pytest.fixture
def masks_made(monkeypatch):
    """The numbers of rows of the masks that were drawn."""
    seen: list[int] = []
    of = vbdl.nn.masks.keep_mask

    def see(key, *args, **options):
        seen.append(len(key))
        return of(key, *args, **options)

    monkeypatch.setattr(vbdl.nn.masks, "keep_mask", see)
    return seen


def test_masks_of_the_first_answer_are_those_of_the_next(later, masks_made):
    predict = Predictor(MCDropout(NETWORKS["mlp"][0]()), Categorical(), SAMPLES, compile="background")
    x = torch.randn(1, 11)
    first, second = predict(x), predict(x)
    assert masks_made == [SAMPLES]
    assert torch.equal(first.probs, second.probs)


@pytest.fixture
def parameters_copied(monkeypatch):
    """The numbers of parameters that were copied for a run, to see whether the run writes to them."""
    seen: list[int] = []
    of = vbdl.engine.written.without_writing

    def see(run, state, parameters):
        seen.append(len(parameters))
        return of(run, state, parameters)

    for module in (vbdl.engine.first_run, vbdl.engine.prepared):
        monkeypatch.setattr(module, "without_writing", see)
    return seen


class Clipping(nn.Sequential):
    """Writes to its weights in prediction."""

    def forward(self, x):
        self[0].weight.data.clamp_(-0.1, 0.1)
        return super().forward(x)


def dense(kind=nn.Sequential):
    return kind(nn.Linear(11, 19), nn.ReLU(), nn.Dropout(0.3), nn.Linear(19, 5))


def hooked():
    def clip(module, x):
        module.weight.data.clamp_(-0.1, 0.1)

    network = dense()
    network[0].register_forward_pre_hook(clip)
    return network


WRITING = {"forward": lambda: dense(Clipping), "hook": hooked}
WRITING["max_norm"] = lambda: nn.Sequential(nn.Unflatten(1, (1, 11)), nn.Flatten(), *dense(), Bounded())


class Bounded(nn.Module):
    """Adds an embedding that torch rescales when it is read."""

    def __init__(self):
        super().__init__()
        self.table = nn.Embedding(3, 5, max_norm=0.1)

    def forward(self, x):
        return x + self.table((x[:, 0] > 0).long())


@pytest.mark.parametrize("method", ["ensemble", "dropout"])
def test_parameters_that_no_layer_writes_to_are_not_copied(method, later, parameters_copied):
    q = DeepEnsemble([dense(), dense()]) if method == "ensemble" else MCDropout(dense())
    Predictor(q, Categorical(), 2, compile="background")(torch.randn(1, 11))
    assert parameters_copied and set(parameters_copied) == {0}


@pytest.mark.parametrize("method", ["ensemble", "dropout"])
def test_layers_that_can_neither_draw_nor_keep_anything_are_not_watched(method, later, monkeypatch):
    watched = []
    monkeypatch.setattr(vbdl.engine.trial, "kept_by", lambda model: watched.append(model) or [])
    for make in (dense, hooked):
        q = DeepEnsemble([make(), make()]) if method == "ensemble" else MCDropout(make())
        Predictor(q, Categorical(), 2, compile="background")(torch.randn(1, 11))
        assert bool(watched) == (make is hooked)


@pytest.mark.parametrize("method", ["ensemble", "dropout"])
def test_layers_that_write_into_the_inputs_are_refused_all_the_same(method, later):
    make = lambda: nn.Sequential(nn.LeakyReLU(0.5, inplace=True), *dense())
    q = DeepEnsemble([make(), make()]) if method == "ensemble" else MCDropout(make())
    with pytest.raises(ValueError, match="writes into its inputs"):
        Predictor(q, Categorical(), 2, compile="background")(-torch.ones(1, 11))


@pytest.mark.parametrize("method", ["ensemble", "dropout"])
@pytest.mark.parametrize("name", WRITING)
def test_parameters_that_a_forward_may_write_to_are(name, method, later, parameters_copied):
    make = WRITING[name]
    q = DeepEnsemble([make(), make()]) if method == "ensemble" else MCDropout(make())
    before = {n: t.clone() for n, t in q.state_dict().items()}
    Predictor(q, Categorical(), 2, compile="background")(torch.randn(1, 11))
    assert parameters_copied and min(parameters_copied) > 0
    assert all(torch.equal(t, before[n]) for n, t in q.state_dict().items())


class Mixing(nn.Module):
    """Subtracts the mean of the batch, so that a row's output depends on the others."""

    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Linear(11, 19), nn.ReLU(), nn.Dropout(0.3), nn.Linear(19, 5))

    def forward(self, x):
        return self.body(x - 0.5 * x.mean(0))


def test_weights_of_a_draw_and_stds_are_made_once_for_an_answer(later, monkeypatch):
    q = MeanField(nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3)), n_data=10).eval()
    drawn, stds = [], []
    normal, masked = vbdl.nn.drawn.normal, StdFactor.masked
    monkeypatch.setattr(vbdl.nn.drawn, "normal", lambda *a: drawn.append(a[1:3]) or normal(*a))
    monkeypatch.setattr(StdFactor, "masked", lambda self, name, std: stds.append(name) or masked(self, name, std))
    # joint predictions draw weights, and no layer its outputs
    Predictor(q, Categorical(), SAMPLES, joint=True, compile="background")(torch.randn(1, 6))
    assert len(drawn) == 4 * SAMPLES  # draw 0, with which the network is checked on two tiles, is not drawn again
    assert len(stds) == 4 + 4  # for draw 0, and for all others


def test_dropout_that_mixes_rows_is_refused_at_its_first_row(later):
    with pytest.raises(ValueError, match="depends on the other rows"):
        Predictor(MCDropout(Mixing()), Categorical(), SAMPLES, compile="background")(torch.randn(1, 11))


def test_the_first_row_and_later_ones_have_the_draws_of_a_loop(later):
    q = MCDropout(NETWORKS["mlp"][0]())
    x = torch.randn(1, 11)
    plain = Predictor(q, Categorical(), SAMPLES, compile=False)(x, samples=True)
    predict = Predictor(q, Categorical(), SAMPLES, compile="background")
    for _ in range(2):
        torch.testing.assert_close(predict(x).probs, plain.probs, rtol=0.0, atol=1e-6)


class Wide(nn.Module):
    """A network whose values of a row take 1 MiB."""

    def __init__(self):
        super().__init__()
        self.drop, self.head = nn.Dropout(0.3), nn.Linear(2**18, 5)

    def forward(self, x):
        return self.head(self.drop(x.repeat(1, 2**14).relu_()))


def test_draws_share_a_call_only_as_long_as_their_values_fit_into_a_cache(later, monkeypatch):
    q, x = MCDropout(Wide()), torch.randn(1, 16)
    seen: list[int] = []
    monkeypatch.setattr(Wide, "forward", _seeing(Wide.forward, seen))
    predict = Predictor(q, Categorical(), SAMPLES, compile="background")
    p = predict(x)
    assert max(seen) == 2  # 2 MiB
    reasons = next(iter(predict.executions.by_shape.values()))[0].plan.reasons
    assert "at most 2 draws run at once, so that a cache holds their largest value" in reasons
    with torch.no_grad():
        one_by_one = Predictor(q, Categorical(), SAMPLES, chunk_size=1, compile=False)(x)
    torch.testing.assert_close(p.probs, one_by_one.probs, rtol=0.0, atol=1e-6)


class Deep(nn.Sequential):
    """Ten blocks, of which each needs the values of the one before it alone."""

    def __init__(self):
        block = lambda: (nn.Linear(11, 11), nn.ReLU(), nn.Dropout(0.2))
        super().__init__(*(m for _ in range(10) for m in block()), nn.Linear(11, 3))


@pytest.mark.parametrize("posterior", [name for name in POSTERIORS if name not in TRACED])
def test_values_of_earlier_layers_are_held_by_nobody(posterior, later, monkeypatch):
    held: list[int] = []
    values: list[weakref.ref] = []

    def see(self, x):
        output = nn.functional.relu(x)
        values.append(weakref.ref(output))
        held.append(sum(value() is not None for value in values))
        return output

    q = POSTERIORS[posterior](Deep)
    monkeypatch.setattr(nn.ReLU, "forward", see)
    Predictor(q, Categorical(), min(q.n_draws or SAMPLES, SAMPLES), compile="background")(torch.randn(1, 11))
    assert len(held) >= 10
    assert max(held) <= 3  # that of this layer, of the one before, and one that a pass has just returned


def _seeing(forward, seen):
    def see(self, x):
        seen.append(len(x))
        return forward(self, x)

    return see


COMPILER = ("torch._inductor", "torch._dynamo", "torch._functorch._aot_autograd", "sympy", "triton")
FIRST_ANSWERS = """
    import json, sys
    from concurrent.futures import Future
    import torch
    from test_contract import NETWORKS, POSTERIORS
    from vbdl.engine import background
    from vbdl.engine.predictor import Predictor
    from vbdl.likelihoods.categorical import Categorical

    background.submit = lambda owner, job: Future()
    imported = {}
    for name, make in POSTERIORS.items():
        q = make(NETWORKS["mlp"][0])
        before = set(sys.modules)
        predict = Predictor(q, Categorical(), min(q.n_draws or 7, 7), compile="background")
        predict(torch.randn(1, 11))
        imported[name] = sorted(set(sys.modules) - before)
    print(json.dumps(imported))
"""


def test_no_compiler_is_imported_before_the_first_answer():
    command = [sys.executable, "-c", textwrap.dedent(FIRST_ANSWERS)]
    run = subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True, timeout=300)
    assert run.returncode == 0, run.stderr
    imported = json.loads(run.stdout.splitlines()[-1])
    assert list(imported) == list(POSTERIORS)
    of_compiler = {name: [m for m in new if m.startswith(COMPILER)] for name, new in imported.items()}
    assert {name: new for name, new in of_compiler.items() if new and name not in TRACED} == {}


def test_a_stack_takes_the_place_of_what_it_is_made_of(monkeypatch):
    calls: list[None] = []
    monkeypatch.setattr(vbdl.calling.apart, "give_back", lambda: calls.append(None))
    networks = [nn.Sequential(*(nn.Linear(1024, 1024, bias=i == 0) for i in range(6))) for _ in range(3)]
    q = DeepEnsemble(networks)
    networks.clear()
    members = vars(q.stacked_parameters)["_parameters"].source._apart
    assert sum(t.nbytes for of_all in members.values() for t in of_all) == 3 * 6 * 1024 * 1024 * 4
    stacks = q.stacked()
    assert members == {}
    assert sum(t.nbytes for t in stacks.values()) == 3 * (6 * 1024 * 1024 + 1024) * 4
    assert len(calls) == 3  # each stack has 12 MiB, and from 16 MiB on it is worth while


@pytest.mark.skipif(sys.platform != "linux" or platform.libc_ver()[0] != "glibc", reason="needs glibc")
def test_freed_memory_is_given_back():
    resident = lambda: int(Path("/proc/self/statm").read_text().split()[1]) * 4096
    tensors = [torch.ones(2**12) for _ in range(2**12)]  # 16 KiB each, which the system gets back only if asked
    last = torch.ones(2**12)  # which keeps the heap from shrinking
    before = resident()
    tensors.clear()
    give_back()
    assert resident() < before - 2**25, last.sum()
