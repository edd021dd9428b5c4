"""AdamW as `fit` uses it unless another optimizer is given: torch's fused kernel, called with little Python around it.

Loshchilov and Hutter, Decoupled Weight Decay Regularization, ICLR 2019, https://arxiv.org/abs/1711.05101
"""

from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

_Gradients = list[list[Tensor | None]]  # of the parameters of each group


class FusedAdamW(torch.optim.AdamW):
    """torch's AdamW(fused=True), bit for bit, whose step costs less for small networks.

    torch sorts the parameters by device, reads options and counts steps for each parameter in every step, which takes
    longer than the update of a small network. Here the lists are kept, and the parameters of a group share one counter.

    groups: param groups as torch takes them; all parameters are on one device and of one dtype.
    """

    def __init__(self, groups: Sequence[dict[str, Any]], lr: float, weight_decay: float):
        super().__init__(groups, lr=lr, weight_decay=weight_decay, fused=True)
        self._lists: list[tuple[list[Tensor], list[Tensor], list[Tensor]]] | None = None
        self._turns: list[Turn] = []
        self._apart = False  # whether parameters have counters of their own, because some had no gradient in a step

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Update the parameters by the gradients in their `grad`; a closure is refused."""
        if closure is not None:
            raise ValueError("step takes no closure here: put the gradients in the parameters' grad, and leave it out")
        gradients = self._gradients()
        if self._lists is None and not self._apart:
            self._share_counters()
        if self._apart or any(g is None for of_group in gradients for g in of_group):
            self._step_apart(gradients)
            return None
        assert self._lists is not None
        for group, lists, of_group in zip(self.param_groups, self._lists, gradients, strict=True):
            _update(group, group["params"], cast(list[Tensor], of_group), *lists)
        return None

    step.hooked = True  # type: ignore[attr-defined]  # torch would wrap it for its profiler, at a third of its cost

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict(state_dict)
        self._lists, self._turns, self._apart = None, [], False

    def turns(self, members: int) -> "list[Turn] | None":
        """The updates of each member of stacked parameters, to be done one member after the other, then `counted`.

        None if some parameters have counters of their own.
        """
        if self._lists is None and not self._apart:
            self._share_counters()
        if self._lists is None:
            return None
        if not self._turns or not self._turns[0].is_of(self.param_groups):
            groups = list(zip(self.param_groups, self._lists, strict=True))
            self._turns = [Turn([_Part(group, *lists, m) for group, lists in groups]) for m in range(members)]
        return self._turns

    def counted(self, turn: "Turn") -> None:
        """Count the updates of a turn, of which all members have the same number."""
        assert self._lists is not None
        for (_, _, steps), part in zip(self._lists, turn.parts, strict=True):
            steps[0].copy_(part.steps[0])
        self._opt_called = True  # schedules of torch warn otherwise

    def _gradients(self) -> _Gradients:
        return [[p.grad for p in group["params"]] for group in self.param_groups]

    def _share_counters(self) -> None:
        """Make the lists of the averages of gradients, of those of their squares, and of the counters of steps."""
        lists = []
        for group in self.param_groups:
            states = [self.state[p] for p in group["params"]]
            counters = [s["step"] for s in states if "step" in s]
            if len({float(counter) for counter in counters}) + (0 < len(counters) < len(states)) > 1:
                self._apart = True
                return
            start = torch.zeros((), dtype=torch.float32, device=group["params"][0].device)
            counter = counters[0] if counters else start
            for p, state in zip(group["params"], states, strict=True):
                state["step"] = counter
                for name in ("exp_avg", "exp_avg_sq"):
                    state.setdefault(name, torch.zeros_like(p))
            lists.append(([s["exp_avg"] for s in states], [s["exp_avg_sq"] for s in states], [counter] * len(states)))
        self._lists = lists

    def _step_apart(self, gradients: _Gradients) -> None:
        """Do torch's own step, which leaves out parameters without a gradient and counts their steps apart."""
        if not self._apart:
            self._apart, self._lists = True, None
            for state in self.state.values():
                state["step"] = state["step"].clone()
        for group, of_group in zip(self.param_groups, gradients, strict=True):
            for p, g in zip(group["params"], of_group, strict=True):
                p.grad = g
        super().step()


class _Part:
    """The tensors of one member in a group of stacked parameters."""

    def __init__(
        self, group: dict[str, Any], averages: list[Tensor], squares: list[Tensor], steps: list[Tensor], member: int
    ):
        self.group, self.ids = group, [id(p) for p in group["params"]]
        self.places = [p.data_ptr() for p in group["params"]]
        self.parameters, self.averages, self.squares = (
            [t.detach()[member] for t in tensors] for tensors in (group["params"], averages, squares)
        )
        self.steps = [steps[0].clone()] * len(steps)


class Turn:
    """The updates of one member of stacked parameters."""

    def __init__(self, parts: list[_Part]):
        self.parts = parts

    def is_of(self, groups: Sequence[dict[str, Any]]) -> bool:
        """Whether the parameters of these groups still lie where they did."""
        return all(
            p.data_ptr() == place for part, group in zip(self.parts, groups, strict=True)
            for p, place in zip(group["params"], part.places, strict=True)
        )  # fmt: skip

    def step(self, gradients: dict[int, Tensor]) -> None:
        """Update the member by its gradients, which have the ids of the stacked parameters."""
        for part in self.parts:
            _update(
                part.group, part.parameters, [gradients[i] for i in part.ids], part.averages, part.squares, part.steps
            )


def _update(
    group: dict[str, Any],
    parameters: list[Tensor],
    gradients: list[Tensor],
    averages: list[Tensor],
    squares: list[Tensor],
    steps: list[Tensor],
) -> None:
    """Count a step, in the one tensor that is the counter of all parameters, and update them."""
    steps[0] += 1
    beta1, beta2 = group["betas"]
    torch._fused_adamw_(
        parameters, gradients, averages, squares, [], steps,
        amsgrad=False, lr=group["lr"], beta1=beta1, beta2=beta2, weight_decay=group["weight_decay"],
        eps=group["eps"], maximize=False,
    )  # fmt: skip


class MembersAdamW(FusedAdamW):
    """AdamW with a learning rate and a weight decay for each member of stacked parameters.

    Each member is a group of parameters, which are views of its part of the stacked ones, so that schedules see every
    member's learning rate. The gradients are read from the stacked parameters.

    parameters: (members, ...) each. undecayed: like them, without weight decay. lr, weight_decay: (members,) each.
    """

    def __init__(
        self,
        parameters: Sequence[nn.Parameter],
        undecayed: Sequence[nn.Parameter],
        lr: Sequence[float],
        weight_decay: Sequence[float],
    ):
        groups = []
        self._parts: list[tuple[Sequence[nn.Parameter], int]] = []  # the stacked parameters and the member of a group
        for member, (rate, decay) in enumerate(zip(lr, weight_decay, strict=True)):
            for stacked, of_these in ((parameters, decay), (undecayed, 0.0)):
                if stacked:
                    views = [nn.Parameter(p.detach()[member]) for p in stacked]
                    groups.append({"params": views, "lr": rate, "weight_decay": of_these})
                    self._parts.append((stacked, member))
        super().__init__(groups, lr=lr[0], weight_decay=weight_decay[0])

    def _gradients(self) -> _Gradients:
        stacked = {id(p): p for part, _ in self._parts for p in part}
        each = {key: None if p.grad is None else p.grad.unbind(0) for key, p in stacked.items()}
        none: list[None] = [None] * len(self._parts)
        return [[(each[id(p)] or none)[member] for p in part] for part, member in self._parts]
