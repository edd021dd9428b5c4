"""Test-time augmentation: exact flips and shifts, draws that are the eager ones, and artifacts."""

import pytest
import torch
from torch import nn
from torch.func import functional_call

import vbdl
from vbdl import augmentations as A

CLASSES = 3


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(2, 4, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 35, CLASSES))


def images(rows=6):
    return torch.randn(rows, 2, 5, 7, generator=torch.Generator().manual_seed(1))


def predictor(augment, n_samples=12, net=None, **settings):
    q = vbdl.TestTimeAugmentation(net or network(), augment)
    return vbdl.Predictor(q, vbdl.Categorical(), n_samples, **{"compile": False, **settings})


AUGMENTATIONS = {
    "flip": lambda: A.RandomHorizontalFlip(),
    "vertical flip": lambda: A.RandomVerticalFlip(0.3),
    "shift": lambda: A.RandomShift(2),
    "edge": lambda: A.RandomShift(1, padding="edge"),
    "wrap": lambda: A.RandomShift(2, padding="wrap"),
    "rotation": lambda: A.RandomRotation(15.0),
    "noise": lambda: A.GaussianNoise(0.3),
    "composed": lambda: A.Compose([A.RandomHorizontalFlip(), A.RandomShift(1), A.GaussianNoise(0.1)]),
    "jitter": lambda: A.Jitter(0.2),
    "scaling": lambda: A.Scaling(0.2),
    "time": lambda: A.TimeShift(2, axis=-1),
}
every = pytest.mark.parametrize("augment", [pytest.param(f, id=name) for name, f in AUGMENTATIONS.items()])


@every
def test_draws_are_those_of_the_network_called_draw_by_draw(augment):
    predict, x = predictor(augment()), images()
    samples = predict(x, samples=True).samples
    model = predict.executions.drawing(predict.check(x))[0].traced.model
    for draw in range(12):
        state = {n: t[0] for n, t in model.entries(torch.tensor([draw]), predict.seed).items()}
        with torch.no_grad():
            expected = functional_call(model, state, (x,))
        torch.testing.assert_close(samples[draw], expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(samples[0], network()(x).detach(), rtol=1e-5, atol=1e-5)
    assert float((samples[1:] - samples[0]).abs().amax(dim=(1, 2)).max()) > 1e-3


@every
def test_samples_depend_on_no_other_row(augment):
    predict, x = predictor(augment()), images(9)
    whole = predict(x, samples=True).samples
    for rows in ([4], [8, 0, 3], torch.randperm(9).tolist()):
        part = predict(x[rows], samples=True).samples
        torch.testing.assert_close(part, whole[:, rows], rtol=0, atol=2e-6)


@every
def test_rows_are_augmented_each_in_its_own_way_outside_of_a_prediction(augment):
    torch.manual_seed(0)
    x = images(1).expand(200, -1, -1, -1)
    out = augment()(x)
    assert out.shape == x.shape and len(out.flatten(1).unique(dim=0)) > 1
    assert (
        len(out.flatten(1).unique(dim=0)) == (2 if isinstance(augment(), A.RandomHorizontalFlip) else 200)
        or len(out.flatten(1).unique(dim=0)) <= 25
    )


def test_flips_are_exact():
    predict, x = predictor(A.RandomHorizontalFlip(), 64), images()
    samples = predict(x, samples=True).samples
    with torch.no_grad():
        plain, flipped = network()(x), network()(x.flip(-1))
    is_plain, is_flipped = ((samples - t).abs().amax((1, 2)) < 1e-5 for t in (plain, flipped))
    assert bool((is_plain ^ is_flipped).all()) and 16 < int(is_flipped.sum()) < 48


@pytest.mark.parametrize("padding", ["zeros", "edge", "wrap"])
def test_shifts_are_exact(padding):
    torch.manual_seed(0)
    mode = {"zeros": "constant", "edge": "replicate", "wrap": "circular"}[padding]
    x = images(1).expand(300, -1, -1, -1)
    padded = nn.functional.pad(x[:1], (2, 2, 2, 2), mode=mode)[0]
    crops = {(i, j): padded[:, i : i + 5, j : j + 7] for i in range(5) for j in range(5)}
    found = [[where for where, crop in crops.items() if torch.equal(row, crop)] for row in A.RandomShift(2, padding)(x)]
    assert all(found), "every row is a crop of the padded image"
    assert {where for each in found for where in each} == set(crops), "each crop occurs"


def test_series_are_shifted_along_the_time():
    torch.manual_seed(0)
    x = torch.arange(1.0, 6.0).view(1, 5, 1).expand(100, -1, 2)
    rows = {tuple(row[:, 0].int().tolist()) for row in A.TimeShift(1)(x)}
    assert rows == {(1, 2, 3, 4, 5), (2, 3, 4, 5, 5), (1, 1, 2, 3, 4)}
    assert {tuple(r.int().tolist()) for r in A.TimeShift(1, "zeros")(x[..., 0])} == {
        (1, 2, 3, 4, 5), (2, 3, 4, 5, 0), (0, 1, 2, 3, 4),
    }  # fmt: skip


def test_rotations_are_about_the_center_whatever_the_sides():
    x = torch.zeros(400, 1, 9, 15)
    x[:, :, 4, 10] = 1.0  # three pixels to the right of the center
    torch.manual_seed(0)
    turned = A.RandomRotation(90.0)(x)
    weight = turned.sum((1, 2, 3))
    rows, columns = torch.arange(9.0).view(-1, 1) - 4, torch.arange(15.0) - 7
    down, right = ((turned * t).sum((1, 2, 3)) / weight for t in (rows, columns))
    # interpolation spreads the pixel, so its center of mass is at 3 up to a fraction of a pixel
    torch.testing.assert_close((down**2 + right**2).sqrt(), torch.full((400,), 3.0), rtol=0, atol=0.25)
    assert float(down.min()) < -2.7 and float(down.max()) > 2.7 and float(right.min()) < 0.5


class Invariant(nn.Module):
    def __init__(self):
        super().__init__()
        self.head = nn.Linear(2, CLASSES)

    def forward(self, x):
        return self.head(x.mean((-1, -2)))


def test_an_invariant_network_knows_no_epistemic_uncertainty():
    for augment in (A.RandomHorizontalFlip(), A.RandomShift(2, padding="wrap")):
        p = predictor(augment, net=Invariant())(images())
        assert float(p.epistemic.abs().max()) < 1e-6
    assert float(predictor(A.RandomShift(2), net=Invariant())(images()).epistemic.max()) > 1e-6


@pytest.mark.parametrize("augment", [AUGMENTATIONS["composed"], AUGMENTATIONS["rotation"]])
def test_compiling_changes_nothing(augment):
    x = images()
    eager, compiled = (predictor(augment(), compile=c)(x) for c in (False, True))
    torch.testing.assert_close(compiled.probs, eager.probs, rtol=0, atol=1e-6)
    torch.testing.assert_close(compiled.epistemic, eager.epistemic, rtol=0, atol=1e-6)


def test_plain_first_is_an_option():
    q = vbdl.TestTimeAugmentation(network(), A.GaussianNoise(1.0), plain_first=False)
    samples = vbdl.Predictor(q, vbdl.Categorical(), 4, compile=False)(images(), samples=True).samples
    assert float((samples[0] - network()(images()).detach()).abs().max()) > 1e-2


class Users(nn.Module):
    """An augmentation of a user's own: the channels in another order."""

    def forward(self, x):
        return x[:, torch.randperm(2)] * torch.empty(1).uniform_(0.9, 1.1)


def test_an_augmentation_of_ones_own():
    both = predictor(Users()), predictor(lambda x: Users()(x))
    p, same = (predict(images()) for predict in both)
    assert float(p.epistemic.max()) > 1e-4 and torch.equal(p.probs, same.probs)


def test_several_inputs_by_place_and_by_name():
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(4, CLASSES), nn.Embedding(5, CLASSES)

        def forward(self, numbers, kind):
            return self.a(numbers) + self.b(kind)

    x = {"numbers": torch.randn(6, 4), "kind": torch.randint(5, (6,))}
    named = lambda numbers, kind: {"numbers": numbers + 0.3 * torch.randn_like(numbers), "kind": kind}
    placed = lambda numbers, kind: (numbers + 0.3 * torch.randn_like(numbers), kind)
    torch.manual_seed(0)
    net = Two()
    by_name, by_place = predictor(named, net=net)(x), predictor(placed, net=net)(tuple(x.values()))
    torch.testing.assert_close(by_name.probs, by_place.probs)
    assert float(by_name.epistemic.max()) > 1e-5
    with pytest.raises(TypeError, match="structure"):
        predictor(placed, net=net)(x)


def test_fit_trains_the_network_on_augmented_rows_and_resumes():
    x, y = images(40), torch.randint(CLASSES, (40,), generator=torch.Generator().manual_seed(2))
    q, likelihood = vbdl.TestTimeAugmentation(network(), AUGMENTATIONS["composed"]()), vbdl.Categorical()
    before = [p.clone() for p in q.parameters()]
    history = vbdl.fit(q, (x, y), likelihood, epochs=20, lr=1e-2, compile=False, progress=False)
    assert history.train_loss[-1] < history.train_loss[0]
    assert not any(torch.equal(a, b) for a, b in zip(before, q.parameters(), strict=True))
    again = vbdl.TestTimeAugmentation(network(), AUGMENTATIONS["composed"]())
    vbdl.fit(again, (x, y), vbdl.Categorical(), epochs=20, lr=1e-2, compile=False, progress=False)
    for a, b in zip(again.parameters(), q.parameters(), strict=True):
        assert torch.equal(a, b), "augmentations of training are from counters"


@pytest.mark.parametrize("augment", [AUGMENTATIONS["composed"], AUGMENTATIONS["time"]])
def test_saved_and_loaded(augment, tmp_path):
    predict, x = predictor(augment()), images()
    p = predict(x)
    predict.save(tmp_path / "a")
    loaded = vbdl.load(tmp_path / "a")
    assert type(loaded.posterior) is vbdl.TestTimeAugmentation
    torch.testing.assert_close(loaded(x).probs, p.probs, rtol=0, atol=1e-6)


def test_a_function_is_not_saved(tmp_path):
    predict = predictor(lambda x: x + torch.randn_like(x))
    predict(images())
    with pytest.raises(ValueError, match="augmentation is a function, which is not saved"):
        predict.save(tmp_path / "a")


@pytest.mark.parametrize(
    "augment, error, message",
    [
        (lambda x: x * 2, ValueError, "the augmentation draws nothing"),
        (lambda x: x[:, :1] + torch.rand(1), ValueError, "must keep shape and dtype"),
        ([A.RandomHorizontalFlip()], TypeError, "Compose"),
    ],
)
def test_augmentations_that_cannot_be_are_refused(augment, error, message):
    with pytest.raises(error, match=message):
        predictor(augment)(images())


@pytest.mark.parametrize(
    "make",
    [
        lambda: A.RandomHorizontalFlip(1.5), lambda: A.RandomShift(0), lambda: A.RandomShift(1, "reflect"),
        lambda: A.RandomRotation(0.0), lambda: A.GaussianNoise(-1.0), lambda: A.Scaling(0.0), lambda: A.TimeShift(0),
        lambda: A.TimeShift(1, axis=0), lambda: A.Compose([]), lambda: A.RandomVerticalFlip(-0.1),
    ],
)  # fmt: skip
def test_arguments_are_checked(make):
    with pytest.raises(ValueError):
        make()


def test_an_ensemble_of_augmented_networks():
    q = vbdl.DeepEnsemble([vbdl.TestTimeAugmentation(network(), A.RandomShift(1)) for _ in range(2)])
    assert vbdl.Predictor(q, vbdl.Categorical(), 8, compile=False)(images()).probs.shape == (6, CLASSES)
