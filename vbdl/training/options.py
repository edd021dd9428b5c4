"""The arguments of `vbdl.fit`, checked in one place."""

import math
import platform
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from numbers import Real
from pathlib import Path
from typing import TypeGuard

import numpy as np
import torch
from torch import Tensor, nn
from torch.distributed import ProcessGroup
from torch.distributed.device_mesh import DeviceMesh
from torch.optim.lr_scheduler import LRScheduler

from vbdl.data.rows import Data
from vbdl.nn.objective import StepOptions


def is_of_each_member(value: object) -> TypeGuard[Sequence[float]]:
    """Whether an option is a sequence, one value for each member, and not one number."""
    return isinstance(value, Sequence | Tensor | np.ndarray) and not isinstance(value, str)


def has_bfloat16(device: torch.device) -> bool:
    """Whether a device multiplies matrices of bfloat16 by instructions of its own."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    if device.type == "cpu":
        # true for every processor with AVX-512, most of which only emulate it
        supported = torch.ops.mkldnn._is_mkldnn_bf16_supported()
        return supported and (platform.machine() in ("arm64", "aarch64") or torch.cpu._is_avx512_bf16_supported())
    return False


@dataclass(frozen=True, kw_only=True)
class TrainingOptions:
    """The arguments of `vbdl.fit` with their defaults. Raises ValueError or TypeError for an invalid value."""

    epochs: int = 100
    batch_size: int = 128
    lr: float | Sequence[float] | None = None  # None: `Posterior.learning_rate`
    weight_decay: float | Sequence[float] = 0.0
    optimizer: Callable[[list[nn.Parameter]], torch.optim.Optimizer] | None = None
    schedule: Callable[[torch.optim.Optimizer], LRScheduler] | str | None = None
    validation: float | Data | None = None
    patience: int | None = None
    clip_norm: float | None = None
    kl_warmup: int = 0
    bootstrap: bool = False
    member_rows: Tensor | None = None
    seed: int = 0
    accumulate: int = 1
    precision: str = "float32"
    auxiliary: Mapping[str | int, float] | None = None
    compile: bool | None = None
    checkpoint: str | Path | None = None
    checkpoint_every: int = 10
    progress: bool | None = None
    processes: "ProcessGroup | DeviceMesh | bool | None" = None
    holdout_seed: int | None = None  # selects the validation rows; `seed` if None

    def __post_init__(self) -> None:
        if self.epochs < 0:
            raise ValueError(
                f"epochs must be at least 1, or 0 to fit a posterior to a trained network, got {self.epochs}"
            )
        if self.batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, got {self.batch_size}")
        if self.optimizer is not None and not callable(self.optimizer):
            raise TypeError(
                f"optimizer must be a function of the parameters, e.g. lambda ps: torch.optim.SGD(ps, lr=0.1); got an "
                f"instance of {type(self.optimizer).__name__}"
            )
        for name in ("lr", "weight_decay"):
            given = getattr(self, name)
            if is_of_each_member(given) and not all(math.isfinite(value) and value >= 0 for value in given):
                raise ValueError(f"{name} must be a positive number for each member, got {list(given)}")
        if self.optimizer is not None and (is_of_each_member(self.lr) or is_of_each_member(self.weight_decay)):
            raise ValueError(
                "lr and weight_decay of each member belong to fit's AdamW, and an optimizer of your own has its own: "
                "leave optimizer= out, or the sequences"
            )
        if not (self.schedule is None or self.schedule == "cosine" or callable(self.schedule)):
            raise ValueError(f"schedule must be 'cosine' or a function of the optimizer, got {self.schedule!r}")
        if self.holds_out and not 0 < self.validation < 1:  # type: ignore[operator]
            raise ValueError(
                f"validation must be a share of the rows between 0 and 1, or (inputs, targets); got {self.validation}"
            )
        if self.patience is not None and self.patience < 1:
            raise ValueError(f"patience must be at least 1 epoch, got {self.patience}")
        if self.patience is not None and self.validation is None:
            raise ValueError("patience counts epochs without improvement on validation rows: give validation= too")
        if self.clip_norm is not None and not self.clip_norm > 0:
            raise ValueError(f"clip_norm must be a positive gradient norm, got {self.clip_norm}")
        if self.accumulate < 1:
            raise ValueError(
                f"accumulate must be a number of batches for each update, at least 1, got {self.accumulate}"
            )
        if self.precision not in ("float32", "bfloat16"):
            raise ValueError(f"precision must be 'float32' or 'bfloat16', got {self.precision!r}")
        self._check_auxiliary()
        if self.kl_warmup < 0:
            raise ValueError(f"kl_warmup must be a number of epochs, 0 for none, got {self.kl_warmup}")
        if self.checkpoint_every < 1:
            raise ValueError(f"checkpoint_every must be at least 1 epoch, got {self.checkpoint_every}")

    def _check_auxiliary(self) -> None:
        if self.auxiliary is None:
            return
        if not isinstance(self.auxiliary, Mapping):
            raise TypeError(
                f"auxiliary must map outputs to the weights of their losses, like {{'aux_logits': 0.4}}, got "
                f"{type(self.auxiliary).__name__}"
            )
        for name, weight in self.auxiliary.items():
            if isinstance(name, bool) or not isinstance(name, str | int):
                raise TypeError(f"auxiliary names an output by its name or index, got {name!r}")
            if isinstance(weight, bool) or not isinstance(weight, Real) or not 0 <= weight < math.inf:
                raise ValueError(f"auxiliary[{name!r}] must be a weight, a number of at least 0, got {weight!r}")

    def of_steps(self, device: torch.device) -> StepOptions | None:
        """How networks run in a step on this device; None for simply as they are.

        Raises ValueError if the device has no instructions for the precision.
        """
        dtype = self._autocast(device)
        return StepOptions(dtype, dict(self.auxiliary or {})) if dtype or self.auxiliary else None

    def _autocast(self, device: torch.device) -> torch.dtype | None:
        if self.precision == "float32":
            return None
        if not has_bfloat16(device):
            raise ValueError(
                f"precision='bfloat16' needs bfloat16 instructions, which this {device.type} does not have, and would "
                f"train more slowly without them: leave precision out"
            )
        return torch.bfloat16

    @property
    def holds_out(self) -> bool:
        """Whether validation is a share of the rows, to be held out from training."""
        return isinstance(self.validation, Real)
