"""Does one group reach its goal sooner than another? Kaplan-Meier medians and the log-rank test, with censoring.

A unit (a training curve) has a time and says whether it reached the goal then (an event) or had not reached it by then
(right-censored). Leaving the censored ones out would favour the group that fails more often. Both come from
``statsmodels.duration.survfunc``. The test looks at the order of times alone, so it does not depend on their unit; its
chi-squared distribution is an approximation, a poor one with fewer than about ten events.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from analysis.refusal import Refusal

LEAST = 2  # units per group that are compared; one says nothing about another


@dataclass(frozen=True)
class Group:
    """Units of one group: how many, how many reached the goal, and when half of them had."""

    name: str
    n: int
    events: int
    median: float | None  # in the unit of the times
    reason: str | None = None  # why there is no median


@dataclass(frozen=True)
class LogRank:
    """Test of one survival curve for all groups: chi-squared with ``dof`` = groups - 1."""

    chi2: float
    dof: int
    p: float


def medians(time: ArrayLike, event: ArrayLike, group: Sequence[str]) -> tuple[Group, ...]:
    """Kaplan-Meier medians by group, in order of their names. ``time`` [n] in any unit, ``event`` [n] 0 or 1.

    The median is the first time at which fewer than half have not reached the goal (SAS's convention, and that of
    ``SurvfuncRight.quantile``); None where that is not seen.
    """
    from statsmodels.duration.survfunc import SurvfuncRight  # a second to import, and only --compare needs it

    times, events, names = _arrays(time, event, group)
    found = []
    for name in sorted(set(group)):
        here = names == name
        median = float(SurvfuncRight(times[here], events[here]).quantile(0.5))
        reached, n = int(events[here].sum()), int(here.sum())
        reason = (
            None if np.isfinite(median) else f"{n - reached} of {n} are not seen to reach it, so half is not passed"
        )
        found.append(Group(name, n, reached, None if reason else median, reason))
    return tuple(found)


def logrank(time: ArrayLike, event: ArrayLike, group: Sequence[str]) -> LogRank:
    """Log-rank test over all groups; raises ``Refusal`` (too_few) where there is nothing to compare."""
    from statsmodels.duration.survfunc import survdiff

    times, events, names = _arrays(time, event, group)
    sizes = {name: int((names == name).sum()) for name in sorted(set(group))}
    if len(sizes) < 2 or min(sizes.values()) < LEAST:
        told = ", ".join(f"{name} {n}" for name, n in sizes.items())
        raise Refusal("too_few", f"a comparison needs two groups of at least {LEAST}: got {told}")
    try:
        chi2, p = survdiff(times, events, names)
    except np.linalg.LinAlgError:  # no event happens while members of every group could still have one
        raise Refusal("too_few", "no event happens while members of every group could still have one") from None
    return LogRank(float(chi2), len(sizes) - 1, float(p))


def _arrays(
    time: ArrayLike, event: ArrayLike, group: Sequence[str]
) -> tuple[NDArray[np.float64], NDArray[np.int64], NDArray[np.str_]]:
    times, events = np.asarray(time, np.float64), np.asarray(event, np.int64)
    assert len(times) == len(events) == len(group) > 0
    assert np.isfinite(times).all()
    return times, events, np.asarray(group, np.str_)
