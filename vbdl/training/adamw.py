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
        for group, (averages, squares, steps), of_group in zip(self.param_groups, self._lists, gradients, strict=True):
            steps[0] += 1  # one tensor, the counter of all
            beta1, beta2 = group["betas"]
            torch._fused_adamw_(
                group["params"], cast(list[Tensor], of_group), averages, squares, [], steps,
                amsgrad=False, lr=group["lr"], beta1=beta1, beta2=beta2, weight_decay=group["weight_decay"],
                eps=group["eps"], maximize=False,
            )  # fmt: skip
        return None

    step.hooked = True  # type: ignore[attr-defined]  # torch would wrap it for its profiler, at a third of its cost

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict(state_dict)
        self._lists, self._apart = None, False

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
