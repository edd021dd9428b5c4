"""A predictor reads its posterior's parameters where they lie, and no later change of the posterior reaches it."""

import copy
import gc
import itertools
import pickle
import threading
import weakref
from collections.abc import Callable
from concurrent.futures import Future

import pytest
import torch
import torch.utils.dlpack
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

import vbdl
from vbdl.calling.apart import Apart
from vbdl.engine import background
from vbdl.types import Posterior

WIDE = 600  # 600 x 600 numbers are more than a MiB


def network() -> nn.Sequential:
    return nn.Sequential(nn.Linear(WIDE, WIDE), nn.BatchNorm1d(WIDE), nn.Tanh(), nn.Dropout(), nn.Linear(WIDE, 3))


POSTERIORS: dict[str, Callable[[], Posterior]] = {
    "ensemble": lambda: vbdl.DeepEnsemble(network(), 2),
    "dropout": lambda: vbdl.MCDropout(network()),
    "mean-field": lambda: vbdl.MeanField(network(), n_data=10),
    "ensemble of dropout": lambda: vbdl.DeepEnsemble([vbdl.MCDropout(network()) for _ in range(2)]),
}


def make(method: str) -> Posterior:
    torch.manual_seed(3)
    return POSTERIORS[method]()


def predictor(q: Posterior) -> vbdl.Predictor:
    return vbdl.Predictor(q, vbdl.Categorical(), n_samples=q.n_draws or 2, compile=False)


def stored(module: nn.Module) -> dict[int, int]:
    """The bytes of every large parameter by its address, without asking the module for it."""
    tables = [vars(m)["_parameters"] for m in module.modules()]
    values = [p for table in tables for p in dict.values(table) if p is not None]
    for table in tables:
        if isinstance(table, Apart) and table._own is None:
            values += [*itertools.chain(*table.source._apart.values()), *table.source._stacked.values()]
    return {p.data_ptr(): p.numel() * p.itemsize for p in values if p.numel() >= WIDE * WIDE}


@pytest.mark.parametrize("method", POSTERIORS)
def test_large_parameters_are_held_once(method):
    q = POSTERIORS[method]()
    predict = predictor(q)
    again = predictor(q)
    assert stored(q) and stored(q) == stored(predict.posterior) == stored(again.posterior)
    predict(torch.randn(2, WIDE))
    assert stored(q) == stored(predict.posterior)
    list(q.parameters())
    assert not stored(q).keys() & stored(predict.posterior).keys()
    assert all(type(vars(m)["_parameters"]) is dict for m in q.modules())


def test_a_posterior_without_predictors_keeps_its_parameters():
    q = POSTERIORS["ensemble"]()
    list(q.parameters())
    before = stored(q)
    predict = predictor(q)
    del predict
    list(q.parameters())
    assert stored(q) == before


def add(tensors: "list[Tensor]") -> None:
    with torch.no_grad():
        for t in tensors:
            t.add_(1.0)


def loaded(q: Posterior) -> None:
    q.load_state_dict({name: t + 1 for name, t in q.state_dict().items()})


def trained(q: Posterior) -> None:
    x = torch.randn(6, WIDE)
    vbdl.fit(q, (x, torch.tensor([0, 1, 2] * 2)), vbdl.Categorical(), epochs=1, compile=False, progress=False)


def largest_owner(q: nn.Module) -> tuple[nn.Module, str]:
    for m in q.modules():
        table = vars(m)["_parameters"]
        for name, p in dict.items(table):
            if p.numel() >= WIDE * WIDE if p is not None else isinstance(table, Apart) and table.is_apart(name):
                return m, name
    raise AssertionError("no large parameter")


def through_an_attribute(q: Posterior) -> None:
    owner, name = largest_owner(q)
    add([getattr(owner, name)])


def through_the_dict(q: Posterior) -> None:
    owner, name = largest_owner(q)
    parameters = vars(owner)["_parameters"]
    add([{**parameters}[name]])
    add([dict(parameters)[name]])
    assert parameters[name] is getattr(owner, name)
    parameters[name].data.add_(1.0)


CHANGES: dict[str, Callable[[Posterior], object]] = {
    "parameters": lambda q: add(list(q.parameters())),
    "data": lambda q: [p.data.add_(1.0) for p in q.parameters()],
    "state_dict": lambda q: add([t for t in q.state_dict().values() if t.is_floating_point()]),
    "load_state_dict": loaded,
    "numpy": lambda q: [p.detach().numpy().fill(2.0) for p in q.parameters()],
    "an attribute": through_an_attribute,
    "the dict": through_the_dict,
    "fit": trained,
    "double": lambda q: q.double(),
    "a copy": lambda q: add(list(copy.deepcopy(q).parameters())),
    "a shallow copy": lambda q: add(list(copy.copy(q).parameters())),
    "a pickle": lambda q: add(list(pickle.loads(pickle.dumps(q)).parameters())),
}


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("method", ["ensemble", "dropout"])
def test_no_change_of_the_posterior_reaches_the_predictor(method, change):
    x = torch.randn(4, WIDE)
    q, same = (make(method) for _ in range(2))
    predict, expected = predictor(q), predictor(same)(x).probs
    lent = stored(q)
    assert lent == stored(predict.posterior)
    CHANGES[change](q)
    assert stored(predict.posterior) == lent
    torch.testing.assert_close(predict(x).probs, expected, rtol=0, atol=0)
    torch.testing.assert_close(predict.replace(tiles=4)(x).probs, expected, rtol=0, atol=1e-6)


HOLDERS: dict[str, Callable[[nn.Parameter], object]] = {
    "the parameter": lambda p: p,
    "a view": lambda p: p.detach()[0],
    "data": lambda p: p.data,
    "an array": lambda p: p.detach().numpy(),
    "its storage": lambda p: p.untyped_storage(),
    "an optimizer": lambda p: torch.optim.SGD([p], lr=1.0),
    "dlpack": lambda p: torch.utils.dlpack.to_dlpack(p.detach()),
}


@pytest.mark.parametrize("holder", HOLDERS)
def test_what_somebody_holds_is_copied(holder):
    q = POSTERIORS["ensemble"]()
    held = HOLDERS[holder](next(p for p in q.parameters() if p.numel() > WIDE * WIDE))
    assert not stored(q).keys() & stored(predictor(q).posterior).keys(), held
    del held
    assert ("an array" in holder) or stored(q).keys() & stored(predictor(q).posterior).keys()


def test_networks_of_a_generator_are_freed_as_they_are_stacked():
    """At no time is there more than the networks and one stack of a layer."""
    sizes = []
    made = []

    def networks():
        for _ in range(4):
            net = network()
            made.extend(torch.multiprocessing.reductions.StorageWeakRef(p.untyped_storage()) for p in net.parameters())
            yield net

    stack = torch.stack

    def counted(tensors, *args, **kwargs):
        sizes.append(sum(not ref.expired() for ref in made))
        return stack(tensors, *args, **kwargs)

    torch.stack = counted
    try:
        q = vbdl.DeepEnsemble(networks())
        assert q.n_members == 4 and q.stacked()["0.weight"].shape == (4, WIDE, WIDE)
    finally:
        torch.stack = stack
    assert sizes == sorted(sizes, reverse=True) and sizes[-1] == 4, sizes
    assert all(ref.expired() for ref in made)


def test_networks_of_a_list_stay_as_they_are():
    nets = [network() for _ in range(2)]
    q = vbdl.DeepEnsemble(nets)
    predictor(q)
    for m, net in enumerate(nets):
        torch.testing.assert_close(q.member(m)["0.weight"], net.state_dict()["0.weight"], rtol=0, atol=0)
        assert type(vars(net[0])["_parameters"]) is dict


def ensemble_of(nets: list[nn.Sequential]) -> tuple[vbdl.DeepEnsemble, vbdl.Predictor]:
    q = vbdl.DeepEnsemble(nets)
    return q, predictor(q)


def lent_by(nets: list[nn.Sequential]) -> dict[int, int]:
    return {address: size for net in nets for address, size in stored(net).items()}


def test_an_ensemble_reads_the_networks_it_was_given(monkeypatch):
    nets = [network().eval() for _ in range(3)]
    stacked = []
    stack = torch.stack
    monkeypatch.setattr(
        torch, "stack", lambda tensors, *args: stacked.append(tensors[0].numel()) or stack(tensors, *args)
    )
    monkeypatch.setattr(background, "submit", lambda *args: Future())
    q = vbdl.DeepEnsemble(nets)
    predict = vbdl.Predictor(q, vbdl.Categorical(), compile="background")
    x = torch.randn(2, WIDE)
    probs = predict(x).mean
    assert lent_by(nets) == stored(q) == stored(predict.posterior)
    assert max(stacked) < WIDE * WIDE
    torch.testing.assert_close(probs, stack([net(x).softmax(-1) for net in nets]).mean(0))
    assert not lent_by(nets).keys() & stored(q).keys()  # the networks were asked for their weights


def test_the_stack_is_shared_until_the_ensemble_is_asked_for_it():
    q, predict = ensemble_of([network().eval() for _ in range(2)])
    x = torch.randn(2, WIDE)
    expected = predict(x, samples=True).mean
    graphs = vbdl.Predictor(q, vbdl.Categorical(), compile=False, tiles=2)
    graphs(x)
    assert graphs.executions.by_shape and stored(q) == stored(graphs.posterior) == stored(predict.posterior)
    assert [size for size in stored(q).values()] == [2 * 4 * WIDE * WIDE]
    add(list(q.parameters()))
    assert not stored(q).keys() & stored(predict.posterior).keys()
    for each in (predict, graphs, graphs.replace(seed=1)):
        torch.testing.assert_close(each(x).mean, expected, rtol=0, atol=1e-6)
    assert not torch.allclose(predictor(q)(x).mean, expected)


@pytest.mark.parametrize("change", [change for change in CHANGES if change != "fit"])
def test_no_change_of_the_networks_reaches_an_ensemble(change):
    nets = [network().eval() for _ in range(2)]
    x = torch.randn(4, WIDE)
    expected = torch.stack([copy.deepcopy(net)(x).softmax(-1) for net in nets]).mean(0)
    q, predict = ensemble_of(nets)
    assert lent_by(nets) == stored(q)
    CHANGES[change](nets[0])  # type: ignore[arg-type]
    later = predictor(q)
    list(q.parameters())
    for each in (predict, later, predictor(q)):
        torch.testing.assert_close(each(x).mean, expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("holder", HOLDERS)
def test_what_somebody_holds_of_a_network_is_copied(holder):
    nets = [network() for _ in range(2)]
    held = HOLDERS[holder](nets[1].get_parameter("0.weight"))
    q = vbdl.DeepEnsemble(nets)
    assert not stored(q).keys() & lent_by(nets).keys(), held


def test_a_lent_parameter_stays_the_same_object():
    nets = [network() for _ in range(2)]
    nets[0](torch.randn(3, WIDE)).sum().backward()
    grads = []
    nets[0].get_parameter("0.weight").register_hook(grads.append)
    before, gradient = id(nets[0].get_parameter("0.weight")), nets[0].get_parameter("0.weight").grad
    q = vbdl.DeepEnsemble(nets)
    assert lent_by(nets).keys() & stored(q).keys()
    after = nets[0].get_parameter("0.weight")
    assert id(after) == before and after.grad is gradient and after.requires_grad
    after.sum().backward()
    assert len(grads) == 1
    assert not lent_by(nets[:1]).keys() & stored(q).keys()


def test_networks_may_be_trained_further_and_given_again():
    nets = [network() for _ in range(2)]
    x, y = torch.randn(6, WIDE), torch.tensor([0, 1, 2] * 2)
    q, predict = ensemble_of(nets)
    first = predict(x).mean
    optimizer = torch.optim.SGD([p for net in nets for p in net.parameters()], lr=0.1)
    for net in nets:
        nn.functional.cross_entropy(net.train()(x), y).backward()
    optimizer.step()
    del optimizer
    again, trained = ensemble_of([net.eval() for net in nets])
    torch.testing.assert_close(predict(x).mean, first, rtol=0, atol=0)
    assert not torch.allclose(trained(x).mean, first)
    third = vbdl.DeepEnsemble(nets)  # which still lend their weights to the second
    assert stored(again) == stored(trained.posterior)
    torch.testing.assert_close(predictor(third)(x).mean, trained(x).mean, rtol=0, atol=0)


def test_networks_of_several_dtypes_are_stacked_at_once():
    nets = [nn.Sequential(nn.Linear(WIDE, WIDE), nn.Linear(WIDE, 3).double()) for _ in range(2)]
    q = vbdl.DeepEnsemble(nets)
    assert not any(isinstance(vars(m)["_parameters"], Apart) for m in q.modules())


def test_a_network_that_lends_is_freed_without_the_garbage_collector():
    nets = [network() for _ in range(2)]
    q, alive = vbdl.DeepEnsemble(nets), [weakref.ref(net[0]) for net in nets]
    assert lent_by(nets) == stored(q)
    gc.disable()
    try:
        nets.clear()
        assert [ref() for ref in alive] == [None, None]
    finally:
        gc.enable()


def test_a_network_without_small_parameters_has_a_dtype_and_a_device():
    nets = [nn.Linear(WIDE, WIDE, bias=False) for _ in range(2)]
    predict = vbdl.Predictor(vbdl.DeepEnsemble(nets), vbdl.Categorical(), compile=False)
    with pytest.raises(ValueError, match="inputs are"):
        predict(torch.randn(2, WIDE).double())
    assert predict(torch.randn(2, WIDE)).mean.shape == (2, WIDE)


def test_threads_get_one_stack():
    q, predict = ensemble_of([network().eval() for _ in range(2)])
    found, begin = [], threading.Barrier(4)

    def ask() -> None:
        begin.wait()
        found.append([id(p) for p in q.parameters()])
        predict(torch.randn(2, WIDE))

    threads = [threading.Thread(target=ask) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 4 and all(each == found[0] for each in found)


def test_a_saved_ensemble_and_its_copies_predict_the_same(tmp_path):
    q, predict = ensemble_of([network().eval() for _ in range(2)])
    x = torch.randn(3, WIDE)
    expected = predict(x).mean
    vbdl.save(predict, tmp_path / "artifact", example=x)
    torch.testing.assert_close(vbdl.load(tmp_path / "artifact")(x).mean, expected)
    assert stored(q) == stored(predict.posterior) == stored(copy.deepcopy(q))  # saving asks for no tensors to keep
    for other in (copy.deepcopy(q), pickle.loads(pickle.dumps(q)), copy.copy(q)):
        torch.testing.assert_close(predictor(other)(x).mean, expected, rtol=0, atol=0)
    torch.testing.assert_close(predictor(copy.deepcopy(q).double())(x.double()).mean.float(), expected)


class Copies(TorchFunctionMode):
    """A context that counts, whenever a large tensor is copied, how many of the memories are still there."""

    def __init__(self, memories: list):
        super().__init__()
        self.memories, self.alive = memories, []

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is Tensor.copy_ and args[0].numel() >= WIDE * WIDE:
            self.alive.append(sum(not ref.expired() for ref in self.memories))
        return func(*args, **(kwargs or {}))


def test_each_member_is_freed_when_it_is_stacked():
    nets = [network() for _ in range(4)]
    weak = torch.multiprocessing.reductions.StorageWeakRef
    memories = [weak(net.get_parameter("0.weight").untyped_storage()) for net in nets]
    expected = [net.get_parameter("0.weight").detach().clone() for net in nets]
    q = vbdl.DeepEnsemble(nets)
    nets.clear()
    with Copies(memories) as copies:
        stack = q.stacked()["0.weight"]
    assert copies.alive == [4, 3, 2, 1] and all(ref.expired() for ref in memories)
    torch.testing.assert_close(stack, torch.stack(expected), rtol=0, atol=0)


def test_a_weak_reference_to_a_parameter_reaches_no_ensemble():
    nets = [network().eval() for _ in range(2)]
    references = [weakref.ref(p) for net in nets for p in net.parameters()]  # as moving averages of weights hold them
    x = torch.randn(3, WIDE)
    expected = torch.stack([net(x).softmax(-1) for net in nets]).mean(0).detach()
    predict = vbdl.Predictor(vbdl.DeepEnsemble(nets), vbdl.Categorical(), compile=False)
    with torch.no_grad():
        for reference in references:
            reference().mul_(2)
    torch.testing.assert_close(predict(x).probs, expected)


@pytest.mark.parametrize("ask", ["parameters", "state_dict", "predict", "member"])
def test_an_ensemble_that_was_asked_in_inference_mode_can_still_be_trained(ask):
    q, x, y = vbdl.DeepEnsemble([network() for _ in range(2)]), torch.randn(4, WIDE), torch.zeros(4, dtype=torch.int64)
    with torch.inference_mode():
        predict = vbdl.Predictor(q, vbdl.Categorical(), tiles=(8,), compile=False)
        {
            "parameters": lambda: list(q.parameters()),
            "state_dict": q.state_dict,
            "predict": lambda: predict(x),
            "member": lambda: (q.member(0), q.state_dict()),
        }[ask]()
    rows = x.clone().requires_grad_()
    vbdl.Predictor(q, vbdl.Categorical(), compile=False)(rows).total.sum().backward()
    assert rows.grad is not None
    vbdl.fit(q, (x, y), vbdl.Categorical(), epochs=1, compile=False, progress=False)


def test_networks_made_in_inference_mode_stay_as_they_are():
    with torch.inference_mode():
        nets = [network().eval() for _ in range(2)]
        x = torch.randn(3, WIDE)
        expected = torch.stack([net(x).softmax(-1) for net in nets]).mean(0)
        q = vbdl.DeepEnsemble(nets)
        nets[0](x)
        torch.testing.assert_close(vbdl.Predictor(q, vbdl.Categorical(), compile=False)(x).probs, expected)


class Clamped(nn.Module):
    """Its forward writes to a parameter."""

    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Linear(WIDE, WIDE), nn.Linear(WIDE, 3)

    def forward(self, x):
        with torch.no_grad():
            self.first.weight.clamp_(min=0)
        return self.last(self.first(x).tanh())


class Renormalized(nn.Module):
    def __init__(self):
        super().__init__()
        self.words, self.drop, self.last = nn.Embedding(WIDE, WIDE, max_norm=1.0), nn.Dropout(0.2), nn.Linear(WIDE, 3)

    def forward(self, x):
        return self.last(self.drop(self.words((x[:, :5].abs() * 100).long() % WIDE).mean(1)))


@pytest.mark.parametrize("make", [Clamped, Renormalized])
@pytest.mark.parametrize(
    "posterior",
    [
        lambda nets: vbdl.DeepEnsemble(nets),
        lambda nets: vbdl.MCDropout(nets[0]),
        lambda nets: vbdl.Deterministic(nets[0]),
    ],
    ids=["ensemble", "dropout", "deterministic"],
)
@pytest.mark.parametrize("compile", [False, "background"])
def test_a_forward_that_writes_to_a_parameter_changes_no_network(compile, posterior, make):
    if make is Clamped and posterior([make(), make()]).n_draws is None:
        pytest.skip("it has no dropout")
    nets = [make().eval() for _ in range(2)]
    before = [{n: t.clone() for n, t in net.state_dict().items()} for net in nets]
    q = posterior(nets)
    entries = {n: t.clone() for n, t in copy.deepcopy(q).state_dict().items()}
    x = torch.randn(3, WIDE)
    predict = vbdl.Predictor(q, vbdl.Categorical(), n_samples=q.n_draws or 3, compile=compile)
    first = predict(x).probs
    torch.testing.assert_close(predict(x).probs, first)
    if compile == "background":
        predict.wait()
    for net, state in zip(nets, before, strict=True):
        assert all(torch.equal(t, state[n]) for n, t in net.state_dict().items())
    assert all(torch.equal(t, entries[n]) for n, t in q.state_dict().items())
    if q.n_draws == 2:
        torch.testing.assert_close(first, torch.stack([net(x).softmax(-1) for net in nets]).mean(0))
