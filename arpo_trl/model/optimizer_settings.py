"""The settings of an optimizer and its schedule, which stay the recipe's when a checkpoint's state is loaded."""

from typing import Any

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

NOT_SETTINGS = ("params", "k", "train_mode", "weight_sum", "lr_max", "scheduled_lr")
"""What a group of weights has besides settings: the weights, and the state of schedule-free optimizers."""

Settings = list[dict[str, Any]]
"""Of each group of weights."""


def read_settings(optimizer: Optimizer) -> Settings:
    """Return the settings of each group: learning rate, weight decay, betas and others."""
    return [
        {name: value for name, value in group.items() if name not in NOT_SETTINGS} for group in optimizer.param_groups
    ]


def restore_settings(optimizer: Optimizer, scheduler: object, settings: Settings) -> None:
    """Replace the settings that a checkpoint has brought. The rate is that of the schedule at its current step.

    A schedule with a state (reduce_lr_on_plateau) keeps its rate. With unchanged settings nothing changes, bit for bit.
    `settings`: from `read_settings`, before `load_state_dict` of optimizer and scheduler.
    """
    scheduler = getattr(scheduler, "scheduler", scheduler)  # accelerate's wrapper
    for group, fresh in zip(optimizer.param_groups, settings, strict=True):
        group.update({name: value for name, value in fresh.items() if name not in ("lr", "initial_lr")})
    if not isinstance(scheduler, LambdaLR):
        return
    bases: list[Any] = [fresh.get("initial_lr", fresh["lr"]) for fresh in settings]
    factors: list[Any] = scheduler.lr_lambdas
    rates = [base * factor(scheduler.last_epoch) for base, factor in zip(bases, factors)]
    scheduler.base_lrs, scheduler._last_lr = [*bases], [*rates]
    for group, base, rate in zip(optimizer.param_groups, bases, rates):
        group.update(initial_lr=base, lr=rate)
