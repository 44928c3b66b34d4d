"""What is an interval? An estimate with two ends, or with the reason why one or both are missing.

An interval that cannot be had is null with a reason, never of zero width. ``identified`` says whether it is narrow
enough to be quoted: an interval by linearisation covers what it says only where it is (``analysis.coverage``).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from scipy import stats

LEVEL = 0.95
WIDE_RATIO = 3.0  # an interval of compute whose ends are further apart than this is "not identified"
WIDE_SHARE = 0.30  # so is one of an exponent that is wider than this share of it


def short(value: float) -> str:
    """Three digits for a sentence: 0.541, 12.6, 3e9, 1.27e11."""
    text = f"{value:.3g}"
    return f"{value:,.0f}" if 1000 <= abs(value) < 1e6 else text.replace("e+0", "e").replace("e+", "e")


@dataclass(frozen=True)
class Interval:
    """An estimate with its interval; ``low`` and ``high`` are None, with a reason, where there is none.

    Of a quantity that has no estimate (a median of censored curves) ``estimate`` is None too.
    """

    estimate: float | None
    low: float | None
    high: float | None
    level: float
    method: str
    dof: float | None = None
    reason: str | None = None

    def identified(self, kind: Literal["ratio", "share"]) -> bool:
        """Narrow enough to be drawn: within a factor (compute), or within a share of the estimate (exponents)."""
        if self.low is None or self.high is None or self.estimate is None:
            return False
        if kind == "ratio":
            return self.low > 0 and self.high / self.low <= WIDE_RATIO
        return self.high - self.low <= WIDE_SHARE * abs(self.estimate)

    def __str__(self) -> str:
        estimate = "none" if self.estimate is None else short(self.estimate)
        if self.low is None or self.high is None:
            return f"{estimate} (no interval: {self.reason})"
        return f"{estimate} [{short(self.low)}, {short(self.high)}]"


def student(
    estimate: float, error: float | None, dof: float, method: str, *, level: float = LEVEL, floor: float | None = None
) -> Interval:
    """estimate +- t(dof) x error; ``floor`` is the least value that makes sense."""
    if error is None or not math.isfinite(error):
        return Interval(estimate, None, None, level, method, dof, "no standard error")
    if dof < 1:
        return Interval(estimate, None, None, level, method, dof, "no degree of freedom is left")
    if error <= 1e-12 * max(abs(estimate), 1e-300):
        return Interval(estimate, None, None, level, method, dof, "all replicates agree, which says nothing")
    half = float(stats.t.ppf(0.5 + level / 2, dof)) * error
    low = estimate - half
    return Interval(estimate, low if floor is None else max(low, floor), estimate + half, level, method, dof)
