"""BatchEnsemble: members are the networks that the formula says, and train as these would with shared weights."""

import copy
import math
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.func import functional_call

import vbdl
from vbdl.export import export
from vbdl.posteriors.batch_ensemble import BatchEnsemble
from vbdl.posteriors.ensemble import DeepEnsemble
from vbdl.types import Posterior

sys.path.insert(0, str(Path(__file__).parent))
from scaled_networks import CLASSES, NETWORKS, Twice, made, predictor, state_of_member  # noqa: E402

MEMBERS = 3
each_network = pytest.mark.parametrize("name", NETWORKS)


def data(rows: int = 60):
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(rows, 4, generator=generator)
    return x, (x.prod(1) > 0).long()


def mlp(width: int = 16, p: float = 0.0) -> nn.Module:
    torch.manual_seed(2)
    return nn.Sequential(nn.Linear(4, width), nn.ReLU(), nn.Dropout(p), nn.Linear(width, 2))


# -- what a member is


@each_network
def test_factors_of_one_are_the_network(name):
    network, x = made(name)
    q = BatchEnsemble(network, MEMBERS, initial="normal", initial_std=0.0)
    samples = predictor(q)(x, samples=True).samples
    expected = network.eval()(x).detach()
    for member in samples:
        torch.testing.assert_close(member, expected, rtol=1e-5, atol=1e-6)


@each_network
def test_a_member_is_the_network_with_weights_multiplied_out(name):
    network, x = made(name)
    q = BatchEnsemble(network, MEMBERS, initial="normal")
    assert len({tuple(q.stacked()[n][:, 0].flatten().tolist()) for n in q.stacked() if n.startswith("r.")}) > 0
    samples = predictor(q)(x, samples=True).samples
    entries = {**q.shared(), **q.stacked()}
    for index, sample in enumerate(samples):
        plain = copy.deepcopy(network).eval()
        expected = functional_call(plain, state_of_member(q, network, entries, index), (x,)).detach()
        torch.testing.assert_close(sample, expected, rtol=1e-4, atol=1e-5)
        plain.load_state_dict(q.member(index), strict=False)
        torch.testing.assert_close(plain(x).detach(), expected, rtol=1e-4, atol=1e-5)
    assert float((samples[0] - samples[1]).abs().max()) > 1e-3


@each_network
def test_stacked_losses_and_gradients_are_those_of_a_loop(name):
    """Also of the weights that all members share: the sum of the members' gradients."""
    network, x = made(name)
    network.double()
    x = x.double() if x.is_floating_point() else x
    y = torch.randint(CLASSES, (len(x),))
    q = BatchEnsemble(network, MEMBERS, initial="normal").train()
    likelihood = vbdl.Categorical()
    q.before_training(x, y, likelihood)
    losses = q.losses(x, y, likelihood)
    losses.sum().backward()
    entries = {n: t.detach().clone().requires_grad_(t.requires_grad) for n, t in {**q.shared(), **q.stacked()}.items()}
    plain, total = copy.deepcopy(network).train(), 0.0
    for index in range(MEMBERS):
        state = {n: t.clone() if not t.requires_grad else t for n, t in entries.items()}
        outputs = functional_call(plain, state_of_member(q, network, state, index), (x,))
        loss = F.cross_entropy(outputs, y)
        torch.testing.assert_close(losses[index].detach(), loss.detach(), rtol=1e-9, atol=1e-12)
        total = total + loss
    total.backward()
    for n, t in {**q.shared(), **q.stacked()}.items():
        if t.requires_grad:
            expected = torch.zeros_like(t) if entries[n].grad is None else entries[n].grad
            found = torch.zeros_like(t) if t.grad is None else t.grad
            torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-10, msg=lambda m, n=n: f"{n}: {m}")


@pytest.mark.parametrize("seed", range(12))
def test_convolutions_of_any_options(seed):
    """Generated: dimensions, groups, strides, dilations, padding modes, odd widths, transposed or not."""
    generator = torch.Generator().manual_seed(seed)
    pick = lambda *options: options[int(torch.randint(len(options), (), generator=generator))]
    dims, groups = pick(1, 2, 3), pick(1, 1, 2, 3)
    inputs, outputs = groups * pick(1, 2, 3), groups * pick(1, 3, 5)
    size, bias = pick(1, 2, 3), pick(True, False)
    options = {"groups": groups, "bias": bias, "stride": pick(1, 2), "dilation": pick(1, 2)}
    if transposed := pick(True, False, False):
        kind = [nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d][dims - 1]
        options |= {"padding": pick(0, 1)} if size > 1 else {}
    else:
        kind = [nn.Conv1d, nn.Conv2d, nn.Conv3d][dims - 1]
        options |= {"padding": pick(0, 1, 2), "padding_mode": pick("zeros", "reflect", "replicate", "circular")}
    torch.manual_seed(seed)
    network = nn.Sequential(kind(inputs, outputs, size, **options), nn.Tanh(), nn.Flatten())
    x = torch.randn(5, inputs, *[pick(7, 8, 9)] * dims)
    q = BatchEnsemble(network, 2, initial="normal", seed=seed)
    samples = vbdl.Predictor(q, vbdl.Gaussian(network(x).shape[1]), compile=False)(x, samples=True).samples[..., 0]
    for index in range(2):
        state = state_of_member(q, network, {**q.shared(), **q.stacked()}, index)
        expected = functional_call(network, state, (x,)).detach()
        torch.testing.assert_close(samples[index], expected, rtol=1e-4, atol=1e-5, msg=f"{transposed} {options}")


@pytest.mark.parametrize("rows", [2, 60])
@each_network
def test_scaling_weights_or_activations_is_the_same(name, rows, monkeypatch):
    """A member alone scales what has fewer numbers: outputs and gradients do not depend on the choice."""
    network, x = made(name)
    x = x.repeat(-(-rows // len(x)), *[1] * (x.ndim - 1))[:rows]
    x = x.double() if x.is_floating_point() else x
    q = BatchEnsemble(network.double(), 1, initial="normal").eval()
    member = {n: t.detach().clone() for n, t in q.shared().items()} | {
        n: t[0].detach().clone() for n, t in q.stacked().items()
    }
    trained = [member[n].requires_grad_() for n, _ in q.module.named_parameters()]
    results = []
    for of_weights in (None, False, True):
        with monkeypatch.context() as patch:
            if of_weights is not None:
                patch.setattr("vbdl.nn.scaled._Weight._is_cheaper_scaled", lambda weight, x, way=of_weights: way)
            out = functional_call(q.module, member, (x,))
        gradients = torch.autograd.grad(out.square().sum(), trained, allow_unused=True)
        results.append([out.detach(), *(g for g in gradients if g is not None)])
    for one in results[1:]:
        assert len(one) == len(results[0]) > 2
        for found, expected in zip(one, results[0], strict=True):
            torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)


def test_members_that_hold_copies_predict_the_same():
    network, x = made("conv2d")
    q = BatchEnsemble(network, MEMBERS)
    copies = []
    for index in range(MEMBERS):
        copies.append(copy.deepcopy(network))
        copies[-1].load_state_dict(q.member(index))
    shared, held = predictor(q)(x), predictor(DeepEnsemble(copies))(x)
    torch.testing.assert_close(shared.probs, held.probs, rtol=0, atol=1e-6)
    torch.testing.assert_close(shared.epistemic, held.epistemic, rtol=0, atol=1e-6)


# -- what is held


def bytes_of(module: nn.Module) -> int:
    return sum(t.numel() * t.element_size() for t in module.state_dict().values())


def test_ten_members_take_little_more_than_one_network(tmp_path):
    network = nn.Sequential(nn.Linear(256, 512), nn.ReLU(), nn.Linear(512, 512), nn.ReLU(), nn.Linear(512, 10))
    q = BatchEnsemble(network, 10)
    assert bytes_of(q) <= 1.2 * bytes_of(network)
    x, y = torch.randn(32, 256), torch.randint(10, (32,))
    vbdl.fit(q, (x, y), vbdl.Categorical(), epochs=1, compile=False, checkpoint=tmp_path / "run.pt")
    # parameters and the two moments of Adam
    files = [f for f in (tmp_path / "run.pt").rglob("*")] if (tmp_path / "run.pt").is_dir() else [tmp_path / "run.pt"]
    assert sum(f.stat().st_size for f in files if f.is_file()) <= 3 * 1.2 * bytes_of(network)
    predictor(q).save(tmp_path / "model.vbdl")
    stored = sum(f.stat().st_size for f in (tmp_path / "model.vbdl").rglob("*.safetensors"))
    assert bytes_of(network) <= stored <= 1.2 * bytes_of(network)
    loaded = vbdl.load(tmp_path / "model.vbdl", compile=False)
    assert torch.equal(loaded(x).probs, predictor(q)(x).probs) and bytes_of(loaded.posterior) == bytes_of(q)


def test_prediction_multiplies_by_shared_weights():
    """No draw holds a weight matrix: all members are one batch for one product."""
    network = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 3))
    predict = predictor(BatchEnsemble(network, 8))
    x = torch.randn(64, 64)
    predict(x)
    (execution,) = predict.executions.drawing(next(iter(predict.tiles_of(predict.check(x)))))
    assert execution.graph_plan.draw_bytes < 4 * 128 * 3
    products = [
        n for n in execution.traced.probe()[0].regions[3].nodes if "mm" in str(n.target) or "matmul" in str(n.target)
    ]
    assert products and all(n.meta["val"].shape[0] != 8 or n.meta["val"].ndim < 3 for n in products)


def test_wrapping_copies_the_network():
    network, x = made("conv2d")
    before = copy.deepcopy(network.state_dict())
    q = BatchEnsemble(network, MEMBERS)
    with torch.no_grad():
        for p in q.parameters():
            p.add_(1.0)
    assert all(torch.equal(t, before[n]) for n, t in network.state_dict().items())
    assert sorted(q.shared()) == ["inner.0.weight", "inner.3.weight", "inner.6.weight"]
    assert "inner.1.running_mean" in q.stacked() and "inner.1.weight" in q.stacked()


def test_what_is_frozen_is_shared_and_computed_once():
    network = nn.Sequential(nn.Linear(4, 16), nn.ReLU(), nn.Linear(16, 2))
    network[0].requires_grad_(False)
    q = BatchEnsemble(network, MEMBERS)
    assert list(q.scaled) == ["2.weight"] and {"inner.0.weight", "inner.0.bias"} <= set(q.shared())
    assert "layers before the first random one run once" in predictor(q).explain(torch.randn(8, 4))
    q = BatchEnsemble(network, MEMBERS, layers=["0", "2"])
    x, y = data()
    vbdl.fit(q, (x, y), vbdl.Categorical(), epochs=2, compile=False)
    assert torch.equal(q.shared()["inner.0.weight"], network[0].weight) and "inner.0.bias" in q.shared()


# -- how it starts


def test_initial_factors():
    q = BatchEnsemble(mlp(64), 50)
    for name, t in q.stacked().items():
        if not name.startswith("inner."):
            assert set(t.unique().tolist()) == {-1.0, 1.0} and abs(float(t.detach().mean())) < 0.2
    normal = BatchEnsemble(mlp(64), 50, initial="normal", initial_std=0.25).stacked()
    assert abs(float(normal["s.0/weight"].detach().mean()) - 1) < 0.02
    assert float(normal["s.0/weight"].detach().std()) == pytest.approx(0.25, rel=0.05)
    same, other = (BatchEnsemble(mlp(64), 50, seed=s).stacked()["r.3/weight"] for s in (0, 1))
    assert torch.equal(same, q.stacked()["r.3/weight"]) and not torch.equal(same, other)


def test_tabm_starts_as_the_paper_says():
    network = nn.Sequential(nn.Linear(4, 16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 2))
    q = BatchEnsemble(network, MEMBERS, initial="tabm")
    entries = q.stacked()
    assert set(entries["r.0/weight"].unique().tolist()) == {-1.0, 1.0}
    for name in ("s.0/weight", "r.2/weight", "s.2/weight"):
        assert bool((entries[name] == 1).all())
    heads = entries["inner.4.weight"]
    assert heads.shape == (MEMBERS, 2, 16) and "r.4/weight" not in entries
    assert not torch.equal(heads[0], heads[1]) and float(heads.detach().abs().max()) <= 1 / math.sqrt(16)
    loaded = type(q)(network, **q.config())
    assert {n: t.shape for n, t in loaded.state_dict().items()} == {n: t.shape for n, t in q.state_dict().items()}


def test_from_a_trained_network_members_start_near_it():
    x, y = data()
    single = vbdl.Deterministic(mlp())
    vbdl.fit(single, (x, y), vbdl.Categorical(), epochs=30, lr=1e-2, compile=False)
    network = single.user_network
    exact = network(x).softmax(-1).detach()
    near = predictor(BatchEnsemble(network, 8, initial="normal", initial_std=0.02))(x).probs
    assert float((near - exact).abs().max()) < 0.1
    q = BatchEnsemble(network, MEMBERS, own=["3"], initial="normal", initial_std=0.0)
    assert q.stacked()["inner.3.weight"].shape == (MEMBERS, 2, 16) and list(q.scaled) == ["0.weight"]
    torch.testing.assert_close(predictor(q)(x).probs, exact, rtol=0, atol=1e-6)


# -- how it is trained


def mixture_nll(q: Posterior, x, y) -> float:
    probs = predictor(q)(x).probs
    return float(-probs[torch.arange(len(y)), y].log().mean())


def test_training_stops_by_the_mixture_and_goes_back_as_one():
    """Every member is that of the mixture's best epoch, as a training of so many epochs leaves it."""
    x, y = data(80)
    fitted = {}
    for epochs in (None, 0):
        q = BatchEnsemble(mlp(64), MEMBERS)
        if epochs is None:
            options = {"epochs": 200, "patience": 3}
        else:
            options = {"epochs": fitted["history"].best_epoch[0] + 1}
        history = vbdl.fit(
            q, (x[:40], y[:40]), vbdl.Categorical(), lr=0.02, batch_size=8, validation=(x[40:], y[40:]),
            compile=False, **options,
        )  # fmt: skip
        if epochs is None:
            fitted = {"history": history, "state": copy.deepcopy(q.state_dict())}
            best = history.best_epoch[0]
            assert history.best_epoch == [best] * MEMBERS and history.epochs == best + 4 < 200
            assert all(len(set(epoch)) == 1 for epoch in history.validation_nll)
            assert history.validation_nll[best][0] == min(e[0] for e in history.validation_nll)
            assert mixture_nll(q, x[40:], y[40:]) == pytest.approx(history.validation_nll[best][0], rel=1e-4)
        else:
            for name, t in q.state_dict().items():
                torch.testing.assert_close(t, fitted["state"][name], rtol=0, atol=0, msg=lambda m, n=name: f"{n}: {m}")


def test_members_without_shared_parameters_still_stop_by_themselves():
    x, y = data(80)
    history = vbdl.fit(
        DeepEnsemble(mlp(64), MEMBERS), (x, y), vbdl.Categorical(), epochs=3, validation=0.3, compile=False
    )
    assert all(len(set(epoch)) == MEMBERS for epoch in history.validation_nll)


def test_clipping_bounds_the_shared_gradient_once():
    x, y = data()
    q = BatchEnsemble(mlp(), MEMBERS)
    before = copy.deepcopy({**q.shared(), **q.stacked()})
    vbdl.fit(
        q, (x, y), vbdl.Categorical(), epochs=1, batch_size=len(y), clip_norm=1e-3, compile=False,
        optimizer=lambda ps: torch.optim.SGD(ps, lr=1.0),
    )  # fmt: skip
    moved = {n: (t - before[n]).detach() for n, t in {**q.shared(), **q.stacked()}.items()}
    shared = math.sqrt(sum(float(moved[n].square().sum()) for n in q.shared()))
    assert shared == pytest.approx(1e-3, rel=1e-2)
    for m in range(MEMBERS):
        own = math.sqrt(sum(float(moved[n][m].square().sum()) for n in q.stacked()))
        assert own == pytest.approx(1e-3, rel=1e-2)


def test_weight_decay_spares_the_factors():
    x, y = data()
    q = BatchEnsemble(mlp(), MEMBERS)
    before = copy.deepcopy({**q.shared(), **q.stacked()})
    vbdl.fit(q, (x, y), vbdl.Categorical(), epochs=10, batch_size=10, lr=1e-5, weight_decay=1e3, compile=False)
    for name, t in {**q.shared(), **q.stacked()}.items():
        shrunk = float((t.abs().mean() / before[name].abs().mean()).detach())
        assert shrunk == pytest.approx(0.99**60 if name.startswith("inner.") else 1.0, abs=0.02), name


@pytest.mark.parametrize("compile", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_a_resumed_training_has_the_bits_of_an_uninterrupted_one(tmp_path, compile):
    x, y = data()
    states = []
    for parts in ([6], [3, 6]):
        q = BatchEnsemble(mlp(p=0.2), MEMBERS)
        path = tmp_path / f"{len(parts)}"
        for epochs in parts:
            q = BatchEnsemble(mlp(p=0.2), MEMBERS)
            vbdl.fit(
                q, (x, y), vbdl.Categorical(), epochs=epochs, batch_size=20, validation=0.2, checkpoint=path,
                compile=compile, patience=50,
            )  # fmt: skip
        states.append(q.state_dict())
    for name, t in states[0].items():
        assert torch.equal(t, states[1][name]), name


def test_a_compiled_step_is_the_uncompiled_one():
    torch.manual_seed(0)
    network = nn.Sequential(
        nn.Conv1d(1, 6, 3, bias=False), nn.BatchNorm1d(6), nn.ReLU(), nn.Dropout(0.2), nn.Flatten(), nn.Linear(12, 2)
    )
    x, y = data(64)
    states = []
    for compile in (False, True):
        q = BatchEnsemble(network, MEMBERS, initial="normal")
        history = vbdl.fit(
            q, (x.unsqueeze(1), y), vbdl.Categorical(), epochs=2, batch_size=32, compile=compile,
            optimizer=lambda ps: torch.optim.SGD(ps, lr=0.1),
        )  # fmt: skip
        assert history.one_by_one == "" and (history.compile_seconds > 0) == compile
        states.append(q.state_dict())
    for name, t in states[0].items():
        torch.testing.assert_close(states[1][name], t, rtol=1e-4, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}")


def test_members_have_their_own_running_statistics():
    network, x = made("conv2d")
    q = BatchEnsemble(network, MEMBERS)
    history = vbdl.fit(q, (x, torch.randint(CLASSES, (8,))), vbdl.Categorical(), epochs=2, compile=False)
    means = q.stacked()["inner.1.running_mean"]
    assert history.one_by_one == "" and float((means[0] - means[1]).abs().max()) > 1e-3
    assert q.stacked()["inner.1.num_batches_tracked"].tolist() == [2, 2, 2]


def test_members_that_share_rows_train_too():
    """A DataLoader gives all members the same batches."""
    x, y = data()
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(x, y), batch_size=20)
    q = BatchEnsemble(mlp(), MEMBERS)
    history = vbdl.fit(q, loader, vbdl.Categorical(), epochs=40, lr=0.02, compile=False)
    assert sum(history.train_loss[-1]) < 0.7 * sum(history.train_loss[0])


def test_each_member_learns_its_own_noise():
    x, _ = data()
    likelihood = vbdl.Gaussian()
    network = nn.Sequential(nn.Linear(4, 16), nn.ReLU(), nn.Linear(16, 1))
    q = BatchEnsemble(network, MEMBERS)
    vbdl.fit(q, (x, x[:, :1].clone()), likelihood, epochs=20, lr=1e-2, bootstrap=True, compile=False)
    assert likelihood.n_members == MEMBERS
    p = vbdl.Predictor(q, likelihood, compile=False)(x)
    assert bool((p.aleatoric > 0).all()) and bool((p.epistemic > 0).all())


# -- what it is used for


def test_several_processes_hold_the_weights_once(tmp_path):
    import torch.distributed as dist

    from vbdl.distributed import ShardedPredictor

    x, _ = data()
    dist.init_process_group("gloo", store=dist.FileStore(str(tmp_path / "store"), 1), rank=0, world_size=1)
    try:
        q = BatchEnsemble(mlp(), MEMBERS)
        sharded = ShardedPredictor(q, vbdl.Categorical(), compile=False)
        torch.testing.assert_close(sharded(x).probs, predictor(q)(x).probs, rtol=0, atol=1e-6)
        assert bytes_of(sharded.posterior) == bytes_of(q)
    finally:
        dist.destroy_process_group()


def test_an_exported_package_holds_the_weights_once(tmp_path):
    pytest.importorskip("onnxruntime")
    network = nn.Sequential(nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, 2))
    q, x = BatchEnsemble(network, 8), torch.randn(16, 64)
    predict = predictor(q, tiles=(16,))
    package = export(predict, tmp_path / "package", backend="onnx", example=x)
    torch.testing.assert_close(package(x)["probs"], predict(x).probs, rtol=0, atol=1e-5)
    stored = sum(f.stat().st_size for f in (tmp_path / "package").rglob("*") if f.is_file())
    assert stored < 2 * bytes_of(network)


# -- what it refuses


@pytest.mark.parametrize(
    "arguments, error, words",
    [
        ({"n_members": 0}, ValueError, "n_members must be at least 1"),
        ({"initial": "ones"}, ValueError, "initial must be one of 'signs', 'normal', 'tabm', got 'ones'"),
        ({"initial_std": -1.0}, ValueError, "initial_std must be a standard deviation"),
        ({"own": "head"}, TypeError, r"write \['head'\]"),
        ({"own": ["body"]}, ValueError, "own='body' is no module, parameter or buffer"),
        ({"layers": ["body"]}, ValueError, "there is no module 'body'"),
        ({"layers": [nn.LSTM]}, ValueError, "layers=LSTM names no linear or convolutional layer"),
        ({"layers": "first"}, TypeError, r"layers must be a list"),
        ({"own": ["first", "layer", "head"]}, ValueError, "own= names every layer.*DeepEnsemble"),
        ({"initial": "tabm", "layers": ["head"]}, ValueError, "needs at least two layers"),
    ],
)
def test_arguments_that_cannot_be(arguments, error, words):
    with pytest.raises(error, match=words):
        BatchEnsemble(Twice(), **arguments)


def test_networks_that_cannot_be():
    normed = nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(4, 2)))
    with pytest.raises(ValueError, match=r"module '0' has a parametrized weight.*remove_parametrizations"):
        BatchEnsemble(normed)
    with pytest.raises(ValueError, match="no linear or convolutional layer that is trained"):
        BatchEnsemble(nn.Sequential(nn.BatchNorm1d(4)))
    with pytest.raises(TypeError, match="got the posterior MCDropout"):
        BatchEnsemble(vbdl.MCDropout(mlp(p=0.1)))
    mixed = nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(4, 8)), nn.ReLU(), nn.Linear(8, 2))
    assert list(BatchEnsemble(mixed).scaled) == ["2.weight"]  # the other layer is shared
