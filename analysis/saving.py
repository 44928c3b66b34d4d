"""How much compute does one rate of a study save over another? Gains of ``analysis.gain`` between two arms.

    python -m analysis.frontier results/digits --gain 16x64 [--sum total --models 8]

Curves are lower envelopes over generator sizes (``analysis.arms``) under one named sum of compute. The band is that of
``analysis.frontier``: the same tokenizer seeds resampled in both arms, generator runs within them, the search over
sizes repeated; not narrower than the scatter about the laws allows.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from scipy import stats

from analysis.arms import Arm, Envelope, candidates, identity, mean_curve, resampled, words
from analysis.curves import mean_fit, saturates
from analysis.forms import FORMS
from analysis.gain import Form, Gain, Half, Side, Spread, between, half_width, reach, rises
from analysis.interval import LEVEL
from analysis.laws import Array
from analysis.load import StudyError
from analysis.refusal import Refusal
from analysis.uncertainty import DRAWS, inflation, resample_units

LOST = 0.025  # share of resamples without an answer that an interval can bear


def saving(
    base: Arm,
    method: Arm,
    form: Form | None = None,
    *,
    at: float | None = None,
    extrapolate: bool = False,
    draws: int = DRAWS,
    seed: int = 0,
) -> Gain:
    """The gain of one rate over another, both under the same sum of compute.

    Raises ``Refusal``: different_points (nothing measured in both), one_upstream_seed, and those of ``gain.between``.
    """
    if base.axis != method.axis:
        raise Refusal("different_points", f"compute of two kinds: {base.axis}, and {method.axis}")
    if len(set(base.seeds) & set(method.seeds)) < 2:
        raise Refusal("one_upstream_seed", "a contrast between tokenizers needs two tokenizer seeds in both")
    fair = candidates((base, method))
    if not fair or len(fair[0].seeds) < 2:
        raise Refusal("different_points", "the two rates share no two tokenizer seeds with a size and budget in both")
    base, method = fair
    chosen = form or ("saturating" if all(saturates(each) for each in fair) else "monotone")
    sides, notes = [], []
    for each in fair:
        x, y = (values[0] for values in Envelope(each, identity(each)).flat())
        there = np.isfinite(x) & np.isfinite(y)
        if len(np.unique(x[there])) < 2:
            raise Refusal("too_few", f"{each.rate}: one compute; a curve needs two")
        sides.append(Side(each.rate, x[there], y[there]))
        flops, level = mean_curve(each)
        notes += rises(each.rate, np.log(flops), np.log(level), None, chosen)
    return between(
        sides[0],
        sides[1],
        chosen,
        _resampled(base, method, draws, seed),
        at=at,
        extrapolate=extrapolate,
        metric=words(base.metric),
        axis=base.axis,
        units=len(base.seeds),
        pairing="paired by tokenizer seed",
        notes=notes,
    )


def _resampled(base: Arm, method: Arm, draws: int, seed: int) -> Spread:
    """The hierarchical bootstrap of two arms, the same tokenizer seeds in both."""
    count = len(base.seeds)

    def spread(form: str, levels: Array) -> Half:
        rng = np.random.default_rng(seed)
        picked = resample_units(count, draws, rng)
        replicates = []
        for each in (base, method):
            x, y, row = resampled(each, picked, rng)
            replicates.append(reach(form, x, y, levels)[row])
        with np.errstate(invalid="ignore"):
            difference = replicates[0] - replicates[1]
        known = np.isfinite(difference)
        variance = np.array(
            [each[there].var() if there.any() else np.nan for each, there in zip(difference.T, known.T, strict=True)]
        )
        variance = np.where(known.mean(0) >= 1 - LOST, variance * inflation(count) ** 2, np.nan)
        told = f"paired hierarchical bootstrap (tokenizer seed > generator run), {draws} draws, Student-t"
        lost = f"in more than {LOST:.1%} of resamples a curve never gets there"
        floor = _given(base, method, form, levels)
        return half_width(variance, np.full(len(levels), count - 1.0), told, lost, floor)

    return spread


def _given(base: Arm, method: Arm, form: str, levels: Array) -> Array:
    """Half-widths [m] of ln gain given these tokenizers, from the scatter about the laws; 0 where it is not known."""
    fits = [mean_fit(each, form)[0] if form in FORMS else None for each in (base, method)]
    variances, dofs = [], []
    for found in fits:
        if found is None or found.reason is not None:
            return np.zeros(len(levels))
        gap = np.exp(levels) - found.params.get("E", 0.0)
        with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
            place = np.exp((math.log(found.params["A"]) - np.log(gap)) / found.params["a"])
            slope = found.params["a"] * gap / np.exp(levels)
        known = np.isfinite(place)
        error = np.full(len(levels), np.nan)
        error[known] = found.get_prediction(place[known]).se_log / slope[known]
        variances.append(np.where(np.isfinite(error), error, 0.0) ** 2)
        dofs.append(found.dof)
    total = np.sum(variances, axis=0)
    # degrees of freedom of a sum of variances, after Satterthwaite
    dof = total**2 / np.maximum(sum(v**2 / d for v, d in zip(variances, dofs, strict=True)), 1e-300)
    return np.asarray(np.where(total > 0, stats.t.ppf(0.5 + LEVEL / 2, np.maximum(dof, 1.0)) * np.sqrt(total), 0.0))


def savings(arms: Sequence[Arm], baseline: str, at: float | None = None) -> dict[str, Gain | Refusal]:
    """The gain of every other rate over one.

    Raises ``StudyError`` for a baseline that is no rate, ``Refusal`` (too_few) where there is no other.
    """
    base = next((each for each in arms if each.rate == baseline), None)
    if base is None:
        raise StudyError(f"--gain: got {baseline!r}; rates: {', '.join(each.rate for each in arms) or 'none'}")
    if len(arms) < 2:
        raise Refusal("too_few", f"{baseline} is the only rate; a gain needs another")
    found: dict[str, Gain | Refusal] = {}
    for each in arms:
        if each is not base:
            try:
                found[each.rate] = saving(base, each, at=at)
            except Refusal as refusal:
                found[each.rate] = refusal
    return found
