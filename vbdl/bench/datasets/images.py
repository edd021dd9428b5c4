"""Data sets of images: Fashion-MNIST with its rotations, chest X-rays, traffic signs split by track."""

import dataclasses
import math
from functools import partial

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from vbdl.bench.datasets.bundled import noise
from vbdl.bench.networks import convolutional, residual
from vbdl.bench.registry import dataset
from vbdl.bench.source import Source
from vbdl.bench.task import Task

_FASHION = ("T-shirt", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot")

# classes of traffic signs held out from training, from every group of signs
_UNKNOWN = (0, 6, 14, 17, 22, 27, 33, 40)


def rotated(images: Tensor, degrees: float) -> Tensor:
    """Rotate images (rows, channels, side, side) about their center, bilinearly, with black (the minimum) outside."""
    angle = math.radians(degrees)
    turn = torch.tensor([[math.cos(angle), -math.sin(angle), 0.0], [math.sin(angle), math.cos(angle), 0.0]])
    grid = F.affine_grid(turn.expand(len(images), 2, 3), list(images.shape), align_corners=False)
    low = images.amin()
    return F.grid_sample(images - low, grid, align_corners=False) + low


@dataset("fashion-mnist", suite="images")
def fashion_mnist(source: Source, protocol: str = "") -> Task:
    """clothes, 60,000 + 10,000 images of 28 x 28; turned by 15 to 90 degrees, and noise"""
    arrays = source.arrays("fashion_mnist/fashion_mnist.npz")
    if arrays is None:
        x, y = source.openml("fashion-mnist", "Fashion-MNIST", (70_000, 784), "fashion_mnist/fashion_mnist.npz")
        images = np.asarray(x, np.uint8).reshape(-1, 28, 28)
        labels = np.asarray(y).astype(np.int64)
    else:
        images = np.concatenate([arrays["x_train"], arrays["x_test"]])
        labels = np.concatenate([arrays["y_train"], arrays["y_test"]]).astype(np.int64)
    x = torch.from_numpy(images).float().unsqueeze(1) / 255
    test = x[60_000:]
    ood = {f"turned by {d} degrees": rotated(test, d).unsqueeze(0) for d in (15, 30, 60, 90)}
    return Task(
        name="fashion-mnist",
        x=x.unsqueeze(0),
        y=torch.from_numpy(labels).unsqueeze(0),
        n_train=60_000,
        network=partial(convolutional, 1, 28),
        classes=_FASHION,
        recipe={"epochs": 5, "lr": 1e-3, "batch_size": 128},
        ood=ood | {"noise": noise(test[:2000]).unsqueeze(0)},
        image=(255.0, 0.0),
    )


@dataset("fashion-resnet", suite="trained")
def fashion_resnet(source: Source, protocol: str = "") -> Task:
    """clothes of fashion-mnist by a residual network with batch normalization; turned by 90 degrees, and noise"""
    task = fashion_mnist(source, protocol)
    return dataclasses.replace(
        task,
        name="fashion-resnet",
        network=partial(residual, 1, 28),
        recipe={"epochs": 8, "lr": 3e-3, "batch_size": 64},
        ood={name: task.ood[name] for name in ("turned by 90 degrees", "noise")},
    )


@dataset("pneumonia", suite="medical")
def pneumonia(source: Source, protocol: str = "") -> Task:
    """chest X-rays of 28 x 28, 5,232 + 624 images; the test set is from another source (62 % pneumonia against 74 %)"""
    path = "pneumoniamnist/pneumoniamnist.npz"
    arrays = source.arrays(path)
    if arrays is None:
        raise source.missing("pneumonia", path)
    parts = ("train", "val", "test")
    x = torch.from_numpy(np.concatenate([arrays[f"x_{p}"] for p in parts])).float().unsqueeze(1) / 255
    y = torch.from_numpy(np.concatenate([arrays[f"y_{p}"] for p in parts]).reshape(-1).astype(np.int64))
    n_train = len(x) - len(arrays["x_test"])
    test = x[n_train:]
    return Task(
        name="pneumonia",
        x=x.unsqueeze(0),
        y=y.unsqueeze(0),
        n_train=n_train,
        network=partial(convolutional, 1, 28),
        classes=("normal", "pneumonia"),
        recipe={"epochs": 10, "lr": 1e-3, "batch_size": 64},
        ood={"turned by 90 degrees": test.rot90(1, (2, 3)).unsqueeze(0).contiguous(), "noise": noise(test[None])},
        image=(255.0, 0.0),
        notes=("8 validation images are also training images, in the original set too",),
    )


@dataset("gtsrb", suite="images")
def gtsrb(source: Source, protocol: str = "") -> Task:
    """traffic signs of 32 x 32 in 35 classes, test images of other tracks; 8 classes held out from training"""
    path = "gtsrb_small/gtsrb_small.npz"
    arrays = source.arrays(path)
    if arrays is None:
        raise source.missing("gtsrb", path)
    known = [k for k in range(43) if k not in _UNKNOWN]
    number = np.full(43, -1)
    number[known] = np.arange(len(known))
    train, test = np.isin(arrays["y_train"], known), np.isin(arrays["y_test"], known)
    # methods may validate on the last fifth, so order by whole tracks, and tracks at random
    tracks = arrays["track_train"][train]
    place = np.random.RandomState(0).permutation(int(tracks.max()) + 1)[tracks]
    order = np.argsort(place, kind="stable")
    pixels = np.concatenate([arrays["x_train"][train][order], arrays["x_test"][test]])
    labels = np.concatenate([arrays["y_train"][train][order], arrays["y_test"][test]])
    ready = lambda a: torch.from_numpy(a).float().permute(0, 3, 1, 2).contiguous() / 255
    return Task(
        name="gtsrb",
        x=ready(pixels).unsqueeze(0),
        y=torch.from_numpy(number[labels].astype(np.int64)).unsqueeze(0),
        n_train=int(train.sum()),
        network=partial(convolutional, 3, 32),
        classes=tuple(f"sign {k}" for k in known),
        recipe={"epochs": 15, "lr": 1e-3, "batch_size": 64},
        ood={"unknown signs": ready(arrays["x_test"][~test]).unsqueeze(0)},
        image=(255.0, 0.0),
        notes=("a tenth of the official training images and 40 % of the test images, stratified",),
    )
