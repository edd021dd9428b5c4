"""Random changes of inputs that leave the target as it is, for `vbdl.TestTimeAugmentation` and for training.

Images:  RandomHorizontalFlip, RandomVerticalFlip, RandomShift, RandomRotation, GaussianNoise
Series:  Jitter, Scaling, TimeShift
Both:    Compose

Each is a module, (batch, ...) to (batch, ...), that draws with torch's random functions, so it works anywhere in a
network; inside a posterior its draws come from counters. In training every row has its own draw; a sample of a
prediction changes all rows in the same way, so a row's prediction does not depend on the rows beside it.
"""

from vbdl.augmentations.compose import Compose
from vbdl.augmentations.images import (
    GaussianNoise,
    RandomHorizontalFlip,
    RandomRotation,
    RandomShift,
    RandomVerticalFlip,
)
from vbdl.augmentations.series import Jitter, Scaling, TimeShift

__all__ = [
    "Compose",
    "GaussianNoise",
    "Jitter",
    "RandomHorizontalFlip",
    "RandomRotation",
    "RandomShift",
    "RandomVerticalFlip",
    "Scaling",
    "TimeShift",
]
