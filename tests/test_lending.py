"""A predictor reads its posterior's parameters where they lie, and no later change of the posterior reaches it."""

import copy
import pickle
from collections.abc import Callable

import pytest
import torch
import torch.utils.dlpack
from torch import Tensor, nn

import vbdl
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
    values = [p for m in module.modules() for p in dict.values(vars(m)["_parameters"]) if p is not None]
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
    return next((m, n) for m in q.modules() for n, p in dict.items(vars(m)["_parameters"])
                if p is not None and p.numel() >= WIDE * WIDE)  # fmt: skip


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
    finally:
        torch.stack = stack
    assert q.n_members == 4 and q.stacked()["0.weight"].shape == (4, WIDE, WIDE)
    alive = sizes[: len(list(network().parameters()))]
    assert alive == sorted(alive, reverse=True) and alive[-1] == 4, alive
    assert all(ref.expired() for ref in made)


def test_networks_of_a_list_stay_as_they_are():
    nets = [network() for _ in range(2)]
    q = vbdl.DeepEnsemble(nets)
    predictor(q)
    for m, net in enumerate(nets):
        torch.testing.assert_close(q.member(m)["0.weight"], net.state_dict()["0.weight"], rtol=0, atol=0)
        assert type(vars(net[0])["_parameters"]) is dict
