"""One line of the table: a comparison, whether its result is right, and the verdict."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np

# What a ratio is of: ours over the other, but for the time, where it is theirs over ours.
SPEED = "time"
MEMORY = "peak memory"
EVALUATIONS = "evaluations"
ERROR = "relative error"
PER_STEP = "time per step"


@dataclass(frozen=True)
class Target:
    """What a ratio must reach, or must not exceed."""

    bound: float
    at_most: bool = False

    def met(self, ratio: float) -> bool:
        """Whether a ratio is on the right side; a NaN is not."""
        return ratio <= self.bound if self.at_most else ratio >= self.bound

    def __str__(self) -> str:
        return f"{'<=' if self.at_most else '>='} {self.bound:.4g}"


@dataclass(frozen=True)
class Check:
    """An error and the limit beyond which the result is wrong; an error that is NaN is beyond."""

    what: str
    error: float
    limit: float

    @property
    def right(self) -> bool:
        """Whether the error is within its limit."""
        return self.error <= self.limit

    def __str__(self) -> str:
        return f"{self.what} {self.error:.1e}" + ("" if self.right else f" > {self.limit:.0e}")


@dataclass(frozen=True)
class Line:
    """What one comparison gave.

    Attributes:
        row: the number of the target, or "record" for what is written down without one.
        workload, against, quantity: what was done, the reference, and what the ratio is of.
        ratios: one per round, or a single one where nothing is timed; empty when it did not come to that.
        target: None for the record.
        checks: whether our result is right, looked at before anything is timed.
        errors: of ours and of the reference against a third, where the target asks that ours be no larger.
        skipped: why it was not run. failed: what ended it.
        numbers: what else was measured, by name with unit.
        note: what else there is to know.
    """

    row: str
    workload: str
    against: str
    quantity: str = SPEED
    ratios: tuple[float, ...] = ()
    target: Target | None = None
    checks: tuple[Check, ...] = ()
    errors: tuple[float, float] | None = None
    skipped: str = ""
    failed: str = ""
    numbers: Mapping[str, float] = field(default_factory=dict)
    note: str = ""

    @property
    def quartiles(self) -> tuple[float, float, float]:
        """The lower quartile, the median and the upper quartile of the ratios; NaN without any."""
        if not self.ratios:
            return np.nan, np.nan, np.nan
        low, median, high = np.percentile(self.ratios, [25.0, 50.0, 75.0]).tolist()
        return low, median, high

    @property
    def wrong(self) -> bool:
        """Whether our result is wrong or the comparison broke down, which no speed makes good."""
        return bool(self.failed) or not all(check.right for check in self.checks)

    @property
    def verdict(self) -> str:
        """``meets``, ``below`` or ``above`` the target, ``wrong``, ``not run``, or ``for the record``."""
        if self.skipped:
            return f"not run: {self.skipped}"
        if self.failed:
            return f"failed: {self.failed}"
        if self.wrong:
            return "wrong: " + ", ".join(str(check) for check in self.checks if not check.right)
        if self.target is None:
            return "for the record"
        if not self.target.met(self.quartiles[1]):
            return "above" if self.target.at_most else "below"
        if self.errors is not None and not self.errors[0] <= self.errors[1]:
            return "below: our error is larger"
        return "meets"

    def to_dict(self) -> dict[str, Any]:
        """The line as JSON takes it, with verdict and quartiles."""
        low, median, high = self.quartiles
        return asdict(self) | {"median": median, "quartiles": [low, high], "verdict": self.verdict}

    @classmethod
    def from_dict(cls, stored: Mapping[str, Any]) -> "Line":
        """The line of :meth:`to_dict`."""
        parts = {name: stored[name] for name in cls.__dataclass_fields__}
        target, errors = parts["target"], parts["errors"]
        return cls(
            **parts
            | {
                "ratios": tuple(parts["ratios"]),
                "target": None if target is None else Target(**target),
                "checks": tuple(Check(**check) for check in parts["checks"]),
                "errors": None if errors is None else (errors[0], errors[1]),
            }
        )
