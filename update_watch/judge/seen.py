"""What was seen, and what is said of it: the two values that pass between verdicts and sentences."""

from __future__ import annotations

from typing import NamedTuple


class Seen(NamedTuple):
    """What was seen of one tensor or accumulator, or on average of a group of them."""

    dtype: str = ""
    steps: int = 0  # optimizer steps the finding rests on
    efficiency: float | None = None
    displacement: float | None = None  # given when it, and not the efficiency, is the finding
    lost: float | None = None  # lost / wanted
    lr: float | None = None
    critical_lr: float | None = None
    peak_lr: float | None = None  # given when the rate has run out
    decay_rate: float | None = None  # lr * weight_decay
    state_factor: float | None = None
    accumulator: str = ""
    rate: float | None = None  # 1 - beta
    is_growth: bool = False  # the state loses its growth, not its decay
    counter: float | None = None  # where a step counter stopped
    headroom: float | None = None  # share of updates at least 4 half gaps wide
    skipped: int = 0
    net: float | None = None  # net efficiency
    written_step: int | None = None  # the last step after which something else wrote to it
    gradient: float | None = None  # the largest
    usual: float | None = None  # rms of the gradients of the run's other tensors
    looks: int = 0  # steps in which its gradient was looked at
    moved: float | None = None  # of a tensor that should be at rest: by which share of its size it moves
    mover: str = ""  # and when, and by what
    reason: str = ""
    near_one: bool = False  # the weight of a norm, around 1
    options: tuple[str, ...] = ()  # what its optimizer can be told, of `cures.OPTIONS`
    trainer: str = "torch"  # in whose words the cure is told: a key of `cures.TRAINERS`


class Advice(NamedTuple):
    """Three parts of a sentence, each without capital or full stop; `cure` and `caution` may be empty."""

    finding: str
    cure: str = ""
    caution: str = ""
