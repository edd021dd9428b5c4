"""Several augmentations, one after the other."""

from collections.abc import Sequence

from torch import Tensor, nn


class Compose(nn.Module):
    """Augmentations that are applied in their order.

    >>> augment = vbdl.augmentations.Compose(
    ...     [vbdl.augmentations.RandomHorizontalFlip(), vbdl.augmentations.RandomShift(4)]
    ... )
    >>> augment(torch.randn(8, 3, 32, 32)).shape
    torch.Size([8, 3, 32, 32])
    """

    def __init__(self, augmentations: Sequence[nn.Module]):
        super().__init__()
        if not augmentations:
            raise ValueError("Compose needs at least one augmentation, got none")
        self.augmentations = nn.ModuleList(augmentations)

    def forward(self, x: Tensor) -> Tensor:
        for augmentation in self.augmentations:
            x = augmentation(x)
        return x
