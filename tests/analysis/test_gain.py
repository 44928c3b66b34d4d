"""Is a known saving of compute recovered, as sure as the seeds allow, and is no gain given where there is none?"""

from __future__ import annotations

import json
import math
from dataclasses import replace

import matplotlib.image
import numpy as np
import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from analysis import frontier
from analysis.arms import Arm
from analysis.gain import gains, main, reach, sentences, unanswered
from analysis.interval import Interval
from analysis.refusal import Refusal
from analysis.saving import saving, savings
from analysis.table import TableError
from analysis.valley import told

FLOPS = np.geomspace(1e16, 1e19, 7)
SAVES = 1.7


def law(flops, asymptote=1.5, amplitude=10.0, exponent=0.45):
    return asymptote + amplitude * (flops / 1e16) ** -exponent


def rows(seeds=3, seed_sd=0.0, noise=0.0, saves=SAVES, rng=None, flops=FLOPS, **shape):
    """x, y, method, group of two methods, the second of which needs 1 / ``saves`` of the compute."""
    rng = rng or np.random.default_rng(0)
    made = []
    for name, factor in (("plain", 1.0), ("better", saves)):
        for seed in range(seeds):
            shift = seed_sd * rng.standard_normal()
            y = law(factor * flops, **shape) * np.exp(shift + noise * rng.standard_normal(len(flops)))
            made += [(x, value, name, str(seed)) for x, value in zip(flops, y, strict=True)]
    x, y, methods, groups = zip(*made, strict=True)
    return np.array(x), np.array(y), list(methods), list(groups)


def one(x, y, methods, groups=None, **how):
    return gains(x, y, methods, "plain", groups=groups, **how)["better"]


def two_arms(rng, seeds=3, seed_sd=0.0, noise=0.0, saves=SAVES, sizes=1):
    """Rates of a study; with several sizes the best one at each budget is the k-th, the others lie above."""
    found = []
    for name, factor in (("plain", 1.0), ("better", saves)):
        y = np.log(law(factor * FLOPS)) + seed_sd * rng.standard_normal((seeds, 1, 1, 1))
        y = y + 0.3 * (np.arange(sizes)[:, None, None] - (np.arange(7) * sizes // 7)) ** 2
        y = y + noise * rng.standard_normal((seeds, sizes, 1, 7))
        x = np.broadcast_to(np.log(FLOPS), y.shape)
        about = (name, 8.0, "fid_a", "generator training FLOPs", tuple(range(seeds)))
        names = tuple(f"{k}k" for k in range(sizes))
        found.append(Arm(*about, names, tuple(FLOPS.tolist()), x, y, y, np.ones(y.shape, bool), False))
    return found


@pytest.mark.parametrize("form", [None, "saturating"])
def test_a_known_saving_is_recovered(form):
    found = one(*rows(), form=form)
    assert found.form == "saturating"
    assert found.gain.estimate == pytest.approx(SAVES, rel=1e-6)
    assert found.curve == pytest.approx([SAVES] * len(found.curve), rel=1e-6)
    # the best quality that both reach is what the baseline ends with, the worst what the method starts with
    assert found.at == found.quality[-1] == pytest.approx(law(FLOPS[-1]))
    assert found.quality[0] == pytest.approx(law(SAVES * FLOPS[0]))
    assert found.crosses == ()
    assert found.notes == ()
    # seeds that agree to the last digit say nothing of others
    assert found.gain.low is None
    assert "agree to the last digit" in found.gain.reason
    assert set(found.low) == {None}


def test_other_forms_recover_it_too():
    pure = one(*rows(asymptote=0.0), form="power")
    assert pure.gain.estimate == pytest.approx(SAVES, rel=1e-6)
    assert pure.curve == pytest.approx([SAVES] * len(pure.curve), rel=1e-6)
    # interpolation of a power law is the law, of a curved one nearly
    assert one(*rows(asymptote=0.0), form="monotone").curve == pytest.approx([SAVES] * 81, rel=1e-6)
    assert one(*rows(), form="monotone").curve == pytest.approx([SAVES] * 81, rel=0.06)
    few = one(*rows(flops=FLOPS[:3]))
    assert few.form == "monotone"


@settings(max_examples=25, deadline=None)
@given(
    st.floats(0.0, 3.0),
    st.floats(0.1, 20.0),
    st.floats(0.1, 20.0),
    st.floats(0.15, 0.9),
    st.floats(1e16, 1e19),
)
def test_the_effective_speed_up_of_laws_with_one_exponent(asymptote, first, second, exponent, flops):
    """((L1 - Linf) / (L2 - Linf))^(1 / alpha) at any compute is the gain at any quality."""
    if not 0.3 < (first / second) ** (1 / exponent) < 100:  # the curves share qualities
        return
    y = [law(FLOPS, asymptote, amplitude, exponent) for amplitude in (first, second)]
    found = one(np.tile(FLOPS, 2), np.concatenate(y), ["plain"] * 7 + ["better"] * 7, form="saturating")
    speed = [law(flops, asymptote, amplitude, exponent) - asymptote for amplitude in (first, second)]
    assert found.curve == pytest.approx([(speed[0] / speed[1]) ** (1 / exponent)] * 81, rel=1e-3)


@settings(max_examples=20, deadline=None)
@given(st.floats(-15, 15), st.floats(-6, 6), st.sampled_from(["saturating", "power", "monotone"]), st.integers(0, 99))
def test_units_change_nothing(x, y, form, seed):
    flops, level, methods, groups = rows(3, 0.02, 0.01, rng=np.random.default_rng(seed))
    plain = one(flops, level, methods, groups, form=form)
    scaled = one(flops * 10**x, level * 10**y, methods, groups, form=form)
    assert scaled.at == pytest.approx(plain.at * 10**y, rel=1e-6)
    assert scaled.curve == pytest.approx(plain.curve, rel=1e-5)
    for end in ("low", "estimate", "high"):
        own, other = getattr(plain.gain, end), getattr(scaled.gain, end)
        assert (own is None) == (other is None)
        assert own is None or other == pytest.approx(own, rel=1e-4)
    for own, other in zip(plain.low, scaled.low, strict=True):
        assert (own is None) == (other is None)


def covered(trials, seeds, form, paired=True, at=2.5, arms=False):
    """Share of intervals of the gain that hold it; a missing one counts as holding, and how many are missing."""
    rng, inside, missing = np.random.default_rng(7), 0, 0
    for _ in range(trials):
        if arms:
            found = saving(*two_arms(rng, seeds, 0.03, 0.015), form, at=at, draws=200)
        else:
            x, y, methods, groups = rows(seeds, 0.03, 0.015, rng=rng)
            groups = groups if paired else [f"{m} {g}" for m, g in zip(methods, groups, strict=True)]
            found = one(x, y, methods, groups, form=form, at=at)
        missing += found.gain.low is None
        inside += found.gain.low is None or found.gain.low <= SAVES <= found.gain.high
    return inside / trials, missing / trials


@pytest.mark.parametrize(("seeds", "paired", "at"), [(3, True, 6.0), (3, True, 2.5), (4, False, 2.5)])
def test_a_gain_over_seeds_is_covered(seeds, paired, at):
    share, missing = covered(120, seeds, None, paired, at)
    assert share >= 0.89
    assert missing < 0.05


@pytest.mark.slow
@pytest.mark.parametrize("arms", [False, True], ids=["table", "arms"])
@pytest.mark.parametrize("seeds", [2, 3, 5])
@pytest.mark.parametrize("form", ["saturating", "monotone"])
def test_coverage(seeds, form, arms):
    share, _ = covered(500, seeds, form, arms=arms)
    assert 0.92 <= share <= 0.99


def test_tokenizers_are_the_unit():
    """More points of the same seeds narrow nothing; taken as groups of their own they would."""
    rng = np.random.default_rng(3)
    x, y, methods, groups = rows(3, 0.05, 0.0, rng=rng)
    dense, many, all_methods, all_groups = rows(3, 0.0, 0.0, flops=np.geomspace(1e16, 1e19, 28))
    shift = {
        (m, g): y[i] / law((SAVES if m == "better" else 1) * x[i])
        for i, (m, g) in enumerate(zip(methods, groups, strict=True))
    }
    many = many * [shift[key] for key in zip(all_methods, all_groups, strict=True)]
    few, more = one(x, y, methods, groups, at=3.0), one(dense, many, all_methods, all_groups, at=3.0)
    width = [math.log(each.gain.high / each.gain.low) for each in (few, more)]
    assert width[1] == pytest.approx(width[0], rel=0.1)
    rowwise = one(dense, many, all_methods, [str(i) for i in range(len(dense))], at=3.0)
    assert math.log(rowwise.gain.high / rowwise.gain.low) < 0.5 * width[1]


def test_a_shift_that_seeds_share_cancels():
    """Paired by name: the same three seeds in both methods, each of its own level."""
    x, y, methods, groups = rows(3, 0.0, 0.002, rng=np.random.default_rng(1))
    level = np.array([{"0": 1.0, "1": 1.3, "2": 0.8}[g] for g in groups])
    apart = one(x, y * level, methods, groups, form="power", at=4.0)
    names = [f"{m}{g}" for m, g in zip(methods, groups, strict=True)]
    unpaired = one(x, y * level, methods, names, form="power", at=4.0)
    assert "paired delete-one-group jackknife over 3 groups" in apart.gain.method
    assert "jackknife over 3 and 3 groups, Welch" in unpaired.gain.method
    assert apart.gain.estimate == unpaired.gain.estimate
    ratio = [math.log(each.gain.high / each.gain.low) for each in (apart, unpaired)]
    assert ratio[0] < 0.2 * ratio[1]
    assert 2 <= unpaired.gain.dof <= 4
    # a seed that one method lacks is left out, and that is said
    keep = np.array([not (m == "better" and g == "2") for m, g in zip(methods, groups, strict=True)])
    some = one(x[keep], y[keep], np.array(methods)[keep].tolist(), np.array(groups)[keep].tolist())
    assert some.units == 2
    assert some.notes == ("groups that one of the two lacks left out: 2",)


def test_one_group_is_refused_and_none_is_said():
    x, y, methods, _ = rows(1)
    single = one(x, y, methods, ["0"] * len(x))
    assert isinstance(single, Refusal)
    assert single.code == "one_upstream_seed"
    bare = one(x, y, methods)
    assert bare.gain.estimate == pytest.approx(SAVES, rel=1e-6)
    assert bare.gain.low is None
    assert "no groups are named" in bare.gain.reason
    assert bare.units is None


def test_nothing_is_extrapolated_unless_asked():
    x, y, methods, groups = rows(3, 0.02, 0.005)
    for quality in (1.6, 40.0):
        outside = one(x, y, methods, groups, at=quality)
        assert outside.gain.estimate is outside.gain.low is None
        assert "outside the qualities that both curves reach" in outside.gain.reason
        assert not outside.extrapolated
        assert len(outside.curve) == 81
        assert "no gain at" in outside.sentence()
    asked = one(x, y, methods, groups, at=40.0, extrapolate=True)
    assert asked.extrapolated
    assert asked.gain.estimate > 0
    assert "extrapolated" in asked.sentence()
    # below the asymptote of a law there is no compute that would do
    never = one(x, y, methods, groups, at=1.0, extrapolate=True)
    assert never.gain.estimate is None
    assert never.gain.reason == "a law never gets there"
    # interpolation has nothing to follow beyond its points
    still = one(x, y, methods, groups, form="monotone", at=1.6)
    assert still.gain.estimate is None
    with pytest.raises(TableError, match="--extrapolate: got --form monotone"):
        one(x, y, methods, groups, form="monotone", at=1.6, extrapolate=True)


def test_curves_that_share_no_quality_are_refused():
    flops = np.tile(FLOPS, 2)
    y = np.concatenate([law(FLOPS) + 100, law(FLOPS)])
    apart = one(flops, y, ["plain"] * 7 + ["better"] * 7)
    assert isinstance(apart, Refusal)
    assert apart.code == "different_points"
    assert "plain 112 to 102" in apart.sentence


def test_a_crossing_is_reported():
    y = np.concatenate([law(FLOPS, 0.0, 10.0, 0.3), law(FLOPS, 0.0, 20.0, 0.45)])
    found = one(np.tile(FLOPS, 2), y, ["plain"] * 7 + ["better"] * 7, form="power")
    at = 1e16 * 2 ** (1 / 0.15)
    assert found.crosses == pytest.approx([law(at, 0.0, 10.0, 0.3)], rel=1e-3)
    assert found.curve[0] < 1 < found.curve[-1]
    assert "the curves cross at" in found.sentence()


def crossing_rows(seeds, noise, rng, flops=FLOPS):
    """A steep curve and a flat one, y = c x^-a, that meet at x = 1e17."""
    made = []
    for name, exponent in (("plain", 0.3), ("better", 0.5)):
        for seed in range(seeds):
            shift = noise * rng.standard_normal()
            y = 5 * (flops / 1e17) ** -exponent * np.exp(shift + 0.3 * noise * rng.standard_normal(len(flops)))
            made += [(x, value, name, str(seed)) for x, value in zip(flops, y, strict=True)]
    x, y, methods, groups = zip(*made, strict=True)
    return np.array(x), np.array(y), list(methods), list(groups)


def test_where_curves_cross_in_compute():
    """The compute of the crossing, its interval, and none where one method is ahead throughout."""
    rng = np.random.default_rng(0)
    found = one(*crossing_rows(4, 0.03, rng), form="power")
    assert found.meeting.low < 1e17 < found.meeting.high < 10 * found.meeting.low
    assert found.meeting.low < found.meeting.estimate < found.meeting.high
    assert found.resolved
    assert f"the curves cross at {found.meeting} x" in found.sentence()
    apart = one(*rows(4, noise=0.01))
    assert apart.meeting is None
    assert apart.resolved
    assert "no crossing in range, better needs less throughout" in apart.sentence()
    alike = one(*rows(4, noise=0.2, saves=1.02, rng=rng))
    assert alike.meeting is None or alike.meeting.low is None
    unsure = one(*crossing_rows(2, 0.5, rng), form="power")
    assert unsure.meeting is None or unsure.meeting.low is None
    bare = one(*crossing_rows(1, 0.0, rng)[:3], form="power")
    assert bare.meeting.estimate == pytest.approx(1e17, rel=1e-3)
    assert "no groups are named" in bare.meeting.reason


@pytest.mark.slow
@pytest.mark.parametrize("seeds", [3, 5])
def test_the_interval_of_a_crossing_covers_it(seeds):
    rng, held = np.random.default_rng(seeds), []
    for _ in range(400):
        found = one(*crossing_rows(seeds, 0.05, rng), form="power")
        if found.meeting is not None and found.meeting.low is not None:
            held.append(found.meeting.low <= 1e17 <= found.meeting.high)
    assert len(held) > 100
    assert np.mean(held) > 0.92


def test_points_that_rise_are_said():
    x, y, methods, groups = rows(2)
    y = np.where((x == FLOPS[3]) & (np.array(methods) == "better"), y * 1.8, y)
    for form, how in (("monotone", "isotonic"), ("saturating", "a law passes through them")):
        found = one(x, y, methods, groups, form=form)
        assert any("better is not monotone: it rises at 1 of 6 steps" in note and how in note for note in found.notes)
        assert "not monotone" in found.sentence()
    # a curve that does not fall at all has no gain
    for form in ("monotone", "power", "saturating", None):
        rising = one(x, np.where(np.array(methods) == "better", x**0.1, y), methods, groups, form=form)
        assert isinstance(rising, Refusal)
        assert rising.code == "constant"
    # seeds measured at compute of their own are curves of their own: their scatter is no rise
    own = x * np.where(np.array(groups) == "0", 1.0, 1.05)
    y = rows(2)[1] * np.where(np.array(groups) == "0", 1.0, 1.2)
    assert one(own, y, methods, groups, form="monotone").notes == ()


def test_a_monotone_curve_reaches_a_quality_first():
    x, y = np.array([[0.0, 1, 2, 3, 4]]), np.array([[4.0, 3, 3, 1, np.nan]])
    assert reach("monotone", x, y, np.array([4.0, 3.5, 3.0, 2.0, 1.0]))[0].tolist() == pytest.approx(
        [0, 0.5, 1, 2.5, 3]
    )
    # a resample that ends short counts as later, one that starts below as earlier
    assert reach("monotone", x, y, np.array([5.0, 0.0]))[0].tolist() == pytest.approx([-1.0, 3.5])
    # pooled neighbours are one level: it is reached at the first of them
    rising = np.array([[4.0, 2, 3, 1, np.nan]])
    assert reach("monotone", x, rising, np.array([2.5, 2.0]))[0].tolist() == pytest.approx([1.0, 2 + 0.5 / 1.5])
    assert np.isnan(reach("monotone", x, x, np.array([2.0]))).all()


@pytest.mark.parametrize(
    ("change", "code", "said"),
    [
        (lambda x, y: (x, np.where(y > 5, np.nan, y)), "not_finite", "leave it out"),
        (lambda x, y: (x, y - 2), "non_positive", "logarithms"),
        (lambda x, y: (-x, y), "non_positive", "logarithms"),
    ],
    ids=["missing", "negative metric", "negative compute"],
)
def test_what_has_no_logarithm_is_refused(change, code, said):
    x, y, methods, _ = rows(1)
    with pytest.raises(Refusal, match=said) as refusal:
        one(*change(x, y), methods)
    assert refusal.value.code == code


def test_a_law_without_enough_points_is_refused():
    x, y, methods, groups = rows(2, flops=FLOPS[:3])
    few = one(x, y, methods, groups, form="saturating")
    assert isinstance(few, Refusal)
    assert few.code == "too_few"
    single = one(*rows(2, flops=FLOPS[:1]))
    assert isinstance(single, Refusal)
    assert "one x" in single.sentence


def test_two_rates_of_a_study():
    rng = np.random.default_rng(0)
    plain, better = two_arms(rng, 3, 0.02, 0.004)
    found = saving(plain, better, at=2.5)
    assert found.form == "saturating"
    assert found.gain.low < SAVES < found.gain.high
    assert found.units == 3
    assert found.gain.dof == 2
    assert "paired hierarchical bootstrap" in found.gain.method
    assert found.metric == "gFID (a)"
    assert "in generator training FLOPs at 2.5" in found.sentence()
    back = saving(better, plain, at=2.5)
    assert back.gain.estimate == pytest.approx(1 / found.gain.estimate)
    assert back.gain.low == pytest.approx(1 / found.gain.high, rel=1e-6)
    # the envelope over sizes, the same in both arms
    many = saving(*two_arms(rng, 3, 0.02, 0.004, sizes=3), at=2.5)
    assert many.gain.low < SAVES < many.gain.high
    lone = better.take([0])
    with pytest.raises(Refusal, match="two tokenizer seeds"):
        saving(plain, lone)
    with pytest.raises(Refusal, match="compute of two kinds"):
        saving(plain, replace(better, axis="sampling FLOPs per image"))
    others = replace(better, sizes=("another",))
    with pytest.raises(Refusal, match="share no two tokenizer seeds"):
        saving(plain, others)
    none = savings([plain, others], "plain")
    assert "better against plain: refused (different_points)" in sentences(none, "plain")[0]
    assert unanswered(none).code == "different_points"
    with pytest.raises(Refusal, match="plain is the only rate"):
        savings([plain], "plain")


def test_a_study_says_its_gains(make_study, rate, capsys):
    pair = rate(4, 64, 3.0, 14.0, 0.6, 2.0), rate(16, 64, 3.0, 9.0, 0.6, 2.0)
    folder = str(make_study(rates=pair, seeds=(0, 1, 2), tokenizer_sd=0.01, noise_sd=0.003))
    assert frontier.main([folder, "--gain", "4x64", "--at", "6"]) == 0
    said = capsys.readouterr().out
    assert "16x64 against 4x64, gFID (digits-supervised): gain 2." in said  # (14 / 9)^(1 / 0.6) = 2.09
    assert "generator training FLOPs at 6" in said
    assert frontier.main([folder, "--gain", "4x64", "--sum", "total", "--models", "8"]) == 0
    assert "stage 1 shared by 8 generators" in capsys.readouterr().out
    assert frontier.main([folder, "--gain", "8x8"]) == 2
    assert "--gain: got '8x8'; rates: 4x64, 16x64" in capsys.readouterr().err
    assert frontier.main([folder, "--best-rate"]) == 3
    assert "2 rates; the best one needs 5" in capsys.readouterr().err


def test_a_study_without_an_answer_says_so(make_study, rate, tmp_path, capsys):
    pair = rate(4, 64, 3.0, 14.0, 0.6, 2.0), rate(16, 64, 3.0, 9.0, 0.6, 2.0)
    folder = str(make_study(rates=pair, seeds=(0, 1, 2), tokenizer_sd=0.01, noise_sd=0.003))
    out = tmp_path / "frontier.json"
    assert frontier.main([folder, "--gain", "4x64", "--at", "0.01", "--json", str(out)]) == 3
    assert "no gain at 0.01, outside the qualities" in capsys.readouterr().out
    held = json.loads(out.read_text())
    assert held["refused"] == held["gains"][0]["refused"]
    assert held["refused"]["code"] == "different_points"
    assert frontier.main([folder, "--gain", "4x64", "--json", str(out)]) == 0
    held = json.loads(out.read_text())
    assert held["refused"] is held["gains"][0]["refused"] is None
    assert "paired by tokenizer seed" in capsys.readouterr().out
    assert frontier.main([folder, "--best-rate", "--json", str(out)]) == 3
    assert json.loads(out.read_text())["refused"]["code"] == "too_few"


def test_groups_are_paired_as_asked():
    x, y, methods, groups = rows(3, 0.02, 0.002, rng=np.random.default_rng(1))
    auto, yes, no = (one(x, y, methods, groups, at=4.0, group="seed", pair=pair) for pair in ("auto", "yes", "no"))
    assert auto == yes
    assert "; paired by seed;" in auto.sentence()
    assert "; not paired by seed;" in no.sentence()
    assert "3 and 3 groups, Welch" in no.gain.method
    names = [f"{m}{g}" for m, g in zip(methods, groups, strict=True)]
    assert "not paired by seed" in one(x, y, methods, names, group="seed").sentence()
    apart = one(x, y, methods, names, group="seed", pair="yes")
    assert isinstance(apart, Refusal)
    assert "share no two groups of seed" in apart.sentence
    assert "paired" not in one(x, y, methods).sentence()


def test_a_gain_that_is_not_known_says_so_first():
    """Two seeds that lie far apart: a number before that would be read as an answer."""
    rng = np.random.default_rng(2)
    found = one(*rows(2, 0.8, 0.0, rng=rng), form="power", pair="no")
    assert found.gain.low is None
    assert "better against plain, y: gain not known to within a factor of 1,000 (estimate" in found.sentence()
    answer, *last = sentences({"better": found}, "plain")
    assert answer == found.sentence()
    assert last == []  # no interval, no level
    known = sentences({"better": one(*rows(3, 0.01, 0.005, rng=rng))}, "plain")
    assert known[1] == "95 % intervals: paired delete-one-group jackknife over 3 groups, Student-t"


def test_digits_show_how_wide_an_interval_is():
    def said(estimate, low, high):
        return told(Interval(estimate, low, high, 0.95, ""))

    assert said(3.0, 2.9996, 3.0004) == "3 [2.9996, 3.0004]"
    assert said(2.3021, 2.2991, 2.3103) == "2.302 [2.299, 2.31]"
    assert said(1.7, 1.1, 2.6) == "1.7 [1.1, 2.6]"
    assert said(123456.7, 123455.9, 123457.1) == "123,456.7 [123,455.9, 123,457.1]"
    assert said(1.27e11, 1.2698e11, 1.2702e11) == "1.27e11 [1.2698e11, 1.2702e11]"
    assert said(2.0, None, None) == "2 (no interval: None)"
    assert said(0.0, -0.1, 0.1) == "0 [-0.1, 0.1]"


@pytest.fixture
def runs(tmp_path):
    x, y, methods, groups = rows(3, 0.01, 0.005)
    third = [(a, b * 0.9, "$third$", g) for a, b, m, g in zip(x, y, methods, groups, strict=True) if m == "plain"]
    table = [*zip(x, y, methods, groups, strict=True), *third]
    path = tmp_path / "runs.csv"
    pl.DataFrame(table, schema=["train flops", "gfid", "method", "seed"], orient="row").write_csv(path)
    return path


def test_the_command_line(runs, tmp_path, capsys):
    out, figure = tmp_path / "gain.json", tmp_path / "gain.png"
    base = [str(runs), "--x", "train flops", "--y", "gfid", "--by", "method", "--baseline", "plain", "--json", str(out)]
    assert main([*base, "--group", "seed", "--at", "2.5", "--figure", str(figure)]) == 0
    assert "better against plain, gfid: gain 1." in capsys.readouterr().out
    held = json.loads(out.read_text())
    assert held["refused"] is None
    assert held["baseline"] == "plain"
    first, second = held["gains"]
    assert (first["method"], second["method"]) == ("better", "$third$")
    assert first["gain"]["low"] < SAVES < first["gain"]["high"]
    assert len(first["quality"]) == len(first["curve"]) == len(first["low"]) == 81
    assert first["quality"][0] > first["quality"][-1]
    pixels = matplotlib.image.imread(figure)
    assert pixels.shape[1] > pixels.shape[0] > 300
    words = figure.with_suffix(".txt").read_text()
    assert "better against plain" in words
    assert "paired delete-one-group jackknife over 3 groups" in words
    # without seeds there is a number, and no interval
    assert main([*base, "--where", "seed = 0"]) == 0
    assert "no groups are named" in json.loads(out.read_text())["gains"][0]["gain"]["reason"]
    # one seed is refused
    assert main([*base, "--where", "seed = 0", "--group", "seed"]) == 3
    assert json.loads(out.read_text())["gains"][0]["refused"]["code"] == "one_upstream_seed"


def test_no_gain_at_all_is_a_refusal(runs, tmp_path, capsys):
    out, figure = tmp_path / "gain.json", tmp_path / "gain.png"
    base = [str(runs), "--x", "train flops", "--y", "gfid", "--by", "method", "--baseline", "plain"]
    asked = [*base, "--group", "seed", "--json", str(out), "--figure", str(figure)]
    assert main([*asked, "--at", "0.5"]) == 3
    assert "no gain at 0.5, outside the qualities" in capsys.readouterr().out
    assert not figure.exists()
    held = json.loads(out.read_text())
    assert held["refused"]["code"] == "different_points"
    assert "better against plain: no gain at gfid 0.5" in held["refused"]["sentence"]
    assert all(row["refused"]["code"] == "different_points" for row in held["gains"])
    # the better one starts below 9.9: one of two is an answer
    assert main([*asked, "--at", "9.9"]) == 0
    held = json.loads(out.read_text())
    assert [row["refused"] is None for row in held["gains"]] == [False, True]
    assert held["refused"] is None
    assert figure.exists()


@pytest.mark.parametrize(
    ("options", "code", "said"),
    [
        (["--pair", "no"], 2, "--pair: got no; it needs --group COL"),
        (["--baseline", "none"], 2, "--baseline: got 'none'; methods: plain, better"),
        (["--where", "method = 'plain'"], 2, "a gain needs another method"),
        (["--y", "fid"], 2, "--y: got 'fid'; columns"),
        (["--at", "-1"], 2, "--at: got -1"),
        (["--figure", "gain.gif"], 2, "a figure ends in .png"),
        (["--derive", "low=gfid - 5", "--y", "low"], 3, "non_positive"),
    ],
    ids=["no group", "no baseline", "one method", "no column", "negative", "another ending", "not positive"],
)
def test_mistakes_and_refusals(runs, tmp_path, capsys, options, code, said):
    out = tmp_path / "gain.json"
    base = [str(runs), "--x", "train flops", "--y", "gfid", "--by", "method", "--baseline", "plain", "--json", str(out)]
    assert main([*base, *options]) == code
    assert said in capsys.readouterr().err
    assert out.exists() == (code == 3)
    assert not list(tmp_path.glob("*.gif"))
