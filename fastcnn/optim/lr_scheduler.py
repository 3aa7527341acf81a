"""Learning rates that follow the number of epochs, or of steps: call ``step()`` after each.

All are closed formulas of that number, so that a resumed run follows the same rates to the last bit.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from ..kernels import checks
from .optimizer import Optimizer, check_range


class LRScheduler:
    """Base class: sets 'lr' of every parameter group to `_rate` of the number of steps and the group's
    first rate.

    The group's 'initial_lr', where it has one, else its 'lr', is where the schedule starts.
    """

    def __init__(self, optimizer: Optimizer):
        if not isinstance(optimizer, Optimizer):
            raise TypeError(f"optimizer: expected an Optimizer, got {type(optimizer).__name__}")
        self.optimizer = optimizer
        self.base_lrs = [group.setdefault("initial_lr", group["lr"]) for group in optimizer.param_groups]
        self.last_epoch = 0
        self._set()

    def _rate(self, base: float) -> float:
        raise NotImplementedError

    def _set(self) -> None:
        self._last_lr = [self._rate(base) for base in self.base_lrs]
        for group, rate in zip(self.optimizer.param_groups, self._last_lr, strict=True):
            group["lr"] = rate

    def step(self) -> None:
        """Count one more epoch or step, and set the learning rates."""
        self.last_epoch += 1
        self._set()

    def get_last_lr(self) -> list[float]:
        """The learning rate of each group."""
        return list(self._last_lr)

    def state_dict(self) -> dict[str, Any]:
        """All attributes but the optimiser, as numbers and lists."""
        return {name: value for name, value in self.__dict__.items() if name != "optimizer"}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Go on where `state_dict` was made. The optimiser's own state_dict holds the rate in use.

        Raises
        ------
        ValueError
            If it is another scheduler's, or has another number of groups.
        """
        own = set(self.state_dict())
        if set(state_dict) != own:
            raise ValueError(f"state_dict: entries {sorted(state_dict)} are not {sorted(own)}")
        groups = len(state_dict["base_lrs"])
        if groups != len(self.base_lrs):
            raise ValueError(f"state_dict: {groups} groups are not the optimiser's {len(self.base_lrs)}")
        self.__dict__.update(state_dict)


class StepLR(LRScheduler):
    """lr * gamma^(t // step_size)."""

    def __init__(self, optimizer: Optimizer, step_size: int, gamma: float = 0.1):
        self.step_size = checks.integer("step_size", step_size, 1)
        check_range("gamma", gamma, 0.0)
        self.gamma = gamma
        super().__init__(optimizer)

    def _rate(self, base: float) -> float:
        return base * self.gamma ** (self.last_epoch // self.step_size)


class CosineAnnealingLR(LRScheduler):
    """eta_min + (lr - eta_min) * (1 + cos(pi * t / T_max)) / 2: Loshchilov & Hutter (2017), equation 5."""

    def __init__(self, optimizer: Optimizer, T_max: int, eta_min: float = 0.0):
        self.T_max = checks.integer("T_max", T_max, 1)
        check_range("eta_min", eta_min, 0.0)
        self.eta_min = eta_min
        super().__init__(optimizer)

    def _rate(self, base: float) -> float:
        share = (1 + math.cos(math.pi * self.last_epoch / self.T_max)) / 2
        return self.eta_min + (base - self.eta_min) * share


class CosineWarmupLR(LRScheduler):
    """A straight climb to lr over `warmup_steps`, then half a cosine down to `min_lr` at `total_steps`.

    t < warmup_steps: lr * (t + 1) / warmup_steps;
    then min_lr + (lr - min_lr) * (1 + cos(pi * (t - warmup_steps) / (total_steps - warmup_steps))) / 2.
    """

    def __init__(self, optimizer: Optimizer, total_steps: int, warmup_steps: int, min_lr: float = 0.0):
        self.total_steps = checks.integer("total_steps", total_steps, 1)
        self.warmup_steps = checks.integer("warmup_steps", warmup_steps)
        if warmup_steps > total_steps:
            raise ValueError(f"warmup_steps: {warmup_steps} is more than total_steps {total_steps}")
        check_range("min_lr", min_lr, 0.0)
        self.min_lr = min_lr
        super().__init__(optimizer)

    def _rate(self, base: float) -> float:
        if self.last_epoch < self.warmup_steps:
            return base * (self.last_epoch + 1) / self.warmup_steps
        rest = max(self.total_steps - self.warmup_steps, 1)
        share = min((self.last_epoch - self.warmup_steps) / rest, 1.0)
        return self.min_lr + (base - self.min_lr) * (1 + math.cos(math.pi * share)) / 2
