"""Test-time augmentation: a trained network predicts random changes of its inputs, and the answers are averaged.

Ayhan and Berens, Test-time Data Augmentation for Estimation of Heteroscedastic Aleatoric Uncertainty in Deep Neural
Networks, MIDL 2018; Wang et al., Aleatoric uncertainty estimation with test-time augmentation for medical image
segmentation with convolutional neural networks, Neurocomputing 338, 2019, https://arxiv.org/abs/1807.07356
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from vbdl.augmentations import GaussianNoise
from vbdl.calling.copies import copied
from vbdl.nn.objective import KeyedPosterior, take_network
from vbdl.nn.stochastic import StochasticNetwork
from vbdl.types import Inputs, Output, State

Augment = Callable[..., Any]  # inputs -> inputs of the same structure, shapes and dtypes


class Augmented(nn.Module):
    """A network behind an augmentation of its inputs.

    plain: () bool buffer, whether the inputs stay as they are.
    """

    plain: Tensor

    def __init__(self, augment: Augment, network: nn.Module):
        super().__init__()
        if isinstance(augment, nn.Module):
            self.augment = augment
        else:
            self._function = (augment,)  # in a tuple, so that it is not bound as a method
        self.network = network
        device = next((p.device for p in network.parameters()), None)
        self.register_buffer("plain", torch.zeros((), dtype=torch.bool, device=device), persistent=False)

    def forward(self, *args, **kwargs):
        augment = self._function[0] if hasattr(self, "_function") else self.augment
        if kwargs:
            return self.network(**self._chosen(kwargs, augment(**kwargs)))
        if len(args) == 1:
            return self.network(self._chosen(args[0], augment(args[0])))
        return self.network(*self._chosen(args, augment(*args)))

    def _chosen(self, inputs: Any, augmented: Any) -> Any:
        """The augmented inputs or, if `plain` is true, the inputs."""
        try:
            return tree_map(self._one, inputs, augmented)
        except ValueError as error:
            if "Node" not in str(error):
                raise
            raise TypeError(
                f"augment must return inputs of the structure that it takes ({type(inputs).__name__}), got "
                f"{type(augmented).__name__}"
            ) from None

    def _one(self, x: Any, augmented: Any) -> Any:
        if not isinstance(x, Tensor):
            return augmented
        if not isinstance(augmented, Tensor) or augmented.shape != x.shape or augmented.dtype != x.dtype:
            got = f"{tuple(augmented.shape)} {augmented.dtype}" if isinstance(augmented, Tensor) else type(augmented)
            raise ValueError(f"augment must keep shape and dtype of inputs, {tuple(x.shape)} {x.dtype}, got {got}")
        return torch.where(self.plain, x, augmented)


class AugmentedNetwork(StochasticNetwork):
    """A stochastic network whose noise is an augmentation; draw 0 of a prediction is the network on plain inputs."""

    inner: Augmented

    def __init__(self, inner: Augmented, plain_first: bool):
        super().__init__(inner, None, None, (), False)
        self.plain_first = plain_first

    def _buffers_of_draw(self) -> State:
        state = super()._buffers_of_draw()
        return {**state, "plain": self.key[1] == 0} if self.plain_first else state


class TestTimeAugmentation(KeyedPosterior):
    """A trained network whose draws are random augmentations of its inputs: flips, shifts, noise.

        augment = vbdl.augmentations.Compose([RandomHorizontalFlip(), RandomShift(4)])
        predict = vbdl.Predictor(vbdl.TestTimeAugmentation(network, augment), vbdl.Categorical(), n_samples=16)

    The weights are one point: `epistemic` is how much the answer depends on the augmentation, which is 0 for a network
    that is invariant to it, and says nothing about weights that data leave open. In a sample all rows are changed in
    the same way, so a row's prediction does not depend on its batch. `fit` trains the network on augmented rows, each
    changed in its own way; a network that is trained already needs no `fit`.

    module: the network, trained or not. It is copied. What it draws by itself is drawn as in `Stochastic`.
    augment: a module of `vbdl.augmentations` or of your own, or a function: inputs (batch, ...) to inputs of the same
        shape and dtype, for several inputs a tuple or, called by name, a dict of them. It draws with torch's random
        functions (not numpy's, nor random's). By default `GaussianNoise(0.1)`, for standardized numbers. A function is
        not saved in artifacts: make it a module, under @vbdl.register.
    plain_first: whether sample 0 is the network on the inputs as they are.
    seed: of the augmentations in training; those of a prediction are by the predictor's seed.
    output: name or index of the module's output to predict from, or a function that returns it, if it returns several;
        `logits` are found.

    Raises ValueError when it first runs if the augmentation draws nothing, or changes shapes.

    >>> net = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 36, 3))
    >>> q = vbdl.TestTimeAugmentation(net, vbdl.augmentations.RandomShift(2))
    >>> predict = vbdl.Predictor(q, vbdl.Categorical(), n_samples=16, compile=False)
    >>> predict(torch.randn(5, 1, 8, 8)).epistemic.shape
    torch.Size([5])
    """

    __test__ = False  # not a test, whatever pytest reads in its name
    module: AugmentedNetwork

    def __init__(
        self,
        module: nn.Module,
        augment: Augment | None = None,
        plain_first: bool = True,
        seed: int = 0,
        *,
        output: Output = None,
    ):
        super().__init__()
        network = take_network(self, module, output)
        if augment is None:
            augment = GaussianNoise(0.1)
        if not callable(augment):
            raise TypeError(
                f"augment must be a module of vbdl.augmentations or a function of the inputs, got "
                f"{type(augment).__name__}: several are vbdl.augmentations.Compose([...])"
            )
        self.module = AugmentedNetwork(copied(Augmented(augment, network)), plain_first)
        self.seed = seed
        self.register_buffer("steps", torch.zeros((), dtype=torch.int64, device=self.module.key.device))

    @property
    def user_network(self) -> nn.Module:
        return self.module.inner.network

    def config(self) -> dict[str, Any]:
        """The arguments that make it again, given its network. Raises ValueError if `augment` is a function."""
        inner = self.module.inner
        if not isinstance(inner._modules.get("augment"), nn.Module):
            raise ValueError(
                "the augmentation is a function, which is not saved: make it an nn.Module under @vbdl.register, or use "
                "vbdl.augmentations"
            )
        arguments = {"augment": inner.augment, "plain_first": self.module.plain_first, "seed": self.seed}
        return arguments if self.output is None else arguments | {"output": self.output}

    def prepare(self, inputs: Inputs) -> None:
        """Run the network to find every random call and its batch axis. Raises ValueError if it makes none."""
        was_training = self.module.training
        self.module.eval()
        try:
            found = self.module.locate(inputs)
        finally:
            self.module.train(was_training)
        if not found and not any(site.p > 0 for site in self.module.sites or ()):
            raise ValueError(
                "the augmentation draws nothing, so every sample would be the same: draw with torch's random "
                "functions, e.g. torch.rand, in its forward; numpy's and Python's random numbers are not seen"
            )
