"""Does the 1/n line give the true distance where FIDs of finite samples do not, and with an honest interval?"""

from __future__ import annotations

import json
import shlex

import numpy as np
import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from analysis.fid_inf import EXAMPLES, extrapolate, groups, line, main, subset_sizes
from analysis.intercept import draw, write
from analysis.refusal import Refusal
from analysis.table import TableError

# Gaussian features of 64 dimensions with a power-law spectrum and an exact reference N(0, SPECTRUM); mean and variances
# of three models at true distances 0, 1.73 and 6.88.
DIMENSIONS = 64
SPECTRUM = np.arange(1, DIMENSIONS + 1) ** -1.0
SPECTRUM *= 50 / SPECTRUM.sum()
MODELS = {
    "equal": (np.zeros(DIMENSIONS), SPECTRUM),
    "near": (np.full(DIMENSIONS, 0.9 * np.sqrt(2 / DIMENSIONS)), SPECTRUM * np.linspace(1, 1.3, DIMENSIONS)),
    "far": (np.full(DIMENSIONS, np.sqrt(6 / DIMENSIONS)), SPECTRUM * np.linspace(0.9, 0.4, DIMENSIONS)),
}
TRUTH = {
    name: float(mean @ mean + ((np.sqrt(variances) - np.sqrt(SPECTRUM)) ** 2).sum())
    for name, (mean, variances) in MODELS.items()
}


def frechet(means, covariances):
    """Fréchet distance of N(means, covariances), [trials, d] and [trials, d, d], to the reference."""
    root = np.sqrt(SPECTRUM)
    values = np.linalg.eigvalsh(root[:, None] * covariances * root)
    traces = np.trace(covariances, axis1=-2, axis2=-1) + SPECTRUM.sum()
    return (means**2).sum(-1) + traces - 2 * np.sqrt(values.clip(0)).sum(-1)


def samples(model, n, trials, rng):
    """Sample mean [trials, d] and scatter matrix [trials, d, d] of n features, from their exact laws (Bartlett)."""
    mean, variances = MODELS[model]
    root = np.tril(rng.standard_normal((trials, DIMENSIONS, DIMENSIONS)), -1)
    diagonal = np.arange(DIMENSIONS)
    root[:, diagonal, diagonal] = np.sqrt(rng.chisquare(n - 1 - diagonal, (trials, DIMENSIONS)))
    root *= np.sqrt(variances)[:, None]
    means = mean + rng.standard_normal((trials, DIMENSIONS)) * np.sqrt(variances / n)
    return means, root @ root.swapaxes(1, 2)


def disjoint(model, sizes, trials, seed=0):
    """FIDs [trials, sizes] of subsets that share no sample."""
    rng = np.random.default_rng(seed)
    drawn = [(n, *samples(model, n, trials, rng)) for n in sizes]
    return np.array([frechet(means, scatter / (n - 1)) for n, means, scatter in drawn]).T


def nested(model, sizes, trials, seed=0):
    """FIDs [trials, sizes] of the first n of one pool of samples."""
    rng, found = np.random.default_rng(seed), []
    means, scatter = samples(model, sizes[0], trials, rng)
    for before, n in zip([0, *sizes], sizes, strict=False):
        if before:
            more, also = samples(model, n - before, trials, rng)
            apart = more - means
            scatter = scatter + also + apart[:, :, None] * apart[:, None] * (before * (n - before) / n)
            means = means + apart * ((n - before) / n)
        found.append(frechet(means, scatter / (n - 1)))
    return np.array(found).T


def covered(found, truth):
    return float(np.mean([each.low <= truth <= each.high for each in found]))


def test_frechet_distances_of_the_simulation():
    """Against SciPy's matrix square root on features, and the drawn moments against the features' own."""
    from scipy.linalg import sqrtm

    rng = np.random.default_rng(1)
    mean, variances = MODELS["far"]
    features = mean + rng.standard_normal((500, DIMENSIONS)) * np.sqrt(variances)
    covariance = np.cov(features.T)
    direct = (features.mean(0) ** 2).sum() + np.trace(covariance) + SPECTRUM.sum()
    direct -= 2 * np.trace(sqrtm(covariance @ np.diag(SPECTRUM))).real
    assert frechet(features.mean(0)[None], covariance[None])[0] == pytest.approx(direct, rel=1e-6)
    drawn = disjoint("far", [500], 200)[:, 0]
    assert abs(direct - drawn.mean()) < 4 * drawn.std()
    assert frechet(mean[None], np.diag(variances)[None])[0] == pytest.approx(TRUTH["far"])


@pytest.mark.parametrize(
    ("fids", "expected"),
    [((3.64, 1.78, 0.35), -0.03), ((5.40, 3.70, 2.43), 2.07), ((10.22, 8.73, 7.62), 7.32)],
)
def test_line_through_three_sizes(fids, expected):
    """2,048 dimensions, true distances 0, 2.115 and 7.331: FIDs of 5k, 10k and 50k samples, printed to two digits."""
    found, slope = line([5_000, 10_000, 50_000], fids, [1, 1, 1])
    assert found == pytest.approx(expected, abs=0.012)
    assert slope == pytest.approx(np.polyfit([1 / 5e3, 1 / 1e4, 1 / 5e4], fids, 1)[0])


@pytest.mark.parametrize("model", list(MODELS))
def test_line_covers_the_truth_and_raw_fid_does_not(model):
    sizes, trials = subset_sizes(20_000, 1_000, disjoint=True), 400
    fids = disjoint(model, sizes, trials)
    found = [extrapolate(sizes, row) for row in fids]
    assert 0.93 < covered(found, TRUTH[model]) <= 1
    estimates = np.array([each.estimate for each in found])

    def away(values):
        """The mean error in its own standard errors."""
        return (values.mean() - TRUTH[model]) / (values.std() / np.sqrt(trials))

    assert abs(away(estimates)) < 3.5
    assert away(fids[:, -1]) > 15
    # as sure of itself as the line is, the raw FID of a small subset is wrong
    halves = np.array([(each.high - each.low) / 2 for each in found])
    assert (np.abs(fids[:, 0] - TRUTH[model]) > halves).mean() > 0.95
    # one in twenty is said to be curved; none is
    assert np.mean([any("no 1/n line" in said for said in each.warnings) for each in found]) < 0.09
    below = [each for each in found if each.estimate < 0]
    assert all("below 0" in each.warnings[0] for each in below)
    assert 0.2 < len(below) / len(found) < 0.8 or model != "equal"  # a true distance of 0


def test_bias_differs_by_model():
    """At one n the difference of two models is off by (k1 - k2) / n; between the lines it is not."""
    sizes, trials = subset_sizes(20_000, 1_000, disjoint=True), 400
    near, far = disjoint("near", sizes, trials, 1), disjoint("far", sizes, trials, 2)
    truth = TRUTH["far"] - TRUTH["near"]

    def away(values):
        return (values.mean() - truth) / (values.std() / np.sqrt(trials))

    lines = [[extrapolate(sizes, row) for row in rows] for rows in (near, far)]
    slopes = [np.mean([each.slope for each in made]) for made in lines]
    assert slopes[0] > 1.15 * slopes[1]
    raw = far[:, 0] - near[:, 0]
    assert away(raw) < -10
    assert raw.mean() - truth == pytest.approx((slopes[1] - slopes[0]) / sizes[0], abs=0.02)
    assert abs(away(np.array([b.estimate - a.estimate for a, b in zip(*lines, strict=True)]))) < 3.5


@pytest.mark.parametrize("model", ["near", "far"])
def test_subsets_of_one_pool_need_draws(model):
    """Twelve overlapping subsets of one pool look surer than they are; a line per pool, over four pools, is honest."""
    sizes, pools = subset_sizes(20_000, 1_000, 12), 4
    fids = nested(model, sizes, 320)
    alone = [extrapolate(sizes, row) for row in fids]
    assert covered(alone, TRUTH[model]) < 0.75
    names = np.repeat(list("abcd"), len(sizes)).tolist()
    over = [extrapolate(sizes * pools, rows.ravel(), draws=names) for rows in fids.reshape(-1, pools, len(sizes))]
    assert covered(over, TRUTH[model]) > 0.88
    assert over[0].n_groups == pools
    assert over[0].dof == pools - 1
    lines = [each.estimate for each in alone[:pools]]
    limits = stats.t.interval(0.95, pools - 1, np.mean(lines), stats.sem(lines))
    assert (over[0].estimate, over[0].low, over[0].high) == pytest.approx((np.mean(lines), *limits))


def test_curvature_is_said():
    sizes = np.array(subset_sizes(20_000, 1_000, 6))
    rng = np.random.default_rng(0)
    bent = 2 + 500 / sizes + 2e5 / sizes**2 + 0.002 * rng.standard_normal(6)
    found = extrapolate(sizes, bent)
    assert found.curvature < 0.01
    assert found.estimate + found.shift == pytest.approx(2, abs=0.02)
    assert found.warnings[0].startswith("no 1/n line (p = ")
    draws = np.repeat(["a", "b", "c"], 6).tolist()
    repeated = np.concatenate([bent + 0.002 * rng.standard_normal(6) for _ in range(3)])
    assert "1/n^2" in extrapolate(np.tile(sizes, 3), repeated, draws=draws).warnings[0]


def test_extrapolation_distance():
    far = extrapolate([1000, 1100, 1200, 1300], [1.5, 1.46, 1.42, 1.39])
    assert far.reach == pytest.approx((1 / 1300) / (1 / 1000 - 1 / 1300))
    assert any(warning.startswith("far: 3.3 times") for warning in far.warnings)
    assert extrapolate([1000, 2000, 4000, 8000], [1.5, 1.26, 1.12, 1.07]).reach == pytest.approx(1 / 7)


@settings(max_examples=40, deadline=None)
@given(
    st.floats(-1, 50),
    st.floats(1, 1e5),
    st.lists(st.integers(100, 100_000), min_size=4, max_size=8, unique=True),
    st.integers(0, 1000),
)
def test_line_is_exact_and_moves_with_the_data(limit, slope, sizes, seed):
    n = np.array(sizes, float)
    assert line(n, limit + slope / n) == pytest.approx((limit, slope), rel=1e-6, abs=1e-6 * slope / n.min())
    noise = 0.01 * np.random.default_rng(seed).standard_normal(len(n))
    one, other = extrapolate(n, limit + noise), extrapolate(n, 3 * (limit + noise) + 7)
    assert other.estimate == pytest.approx(3 * one.estimate + 7)
    assert other.slope == pytest.approx(3 * one.slope, abs=1e-6)
    assert (other.low, other.high) == pytest.approx((3 * one.low + 7, 3 * one.high + 7))
    assert one.curvature == pytest.approx(other.curvature, abs=1e-6)


def test_errors_weigh():
    sizes, fids = [1000, 2000, 4000, 8000, 1500], np.array([2.5, 2.251, 2.124, 2.0626, 99.0])
    found = extrapolate(sizes, fids, errors=[0.01, 0.01, 0.01, 0.01, 1e6])
    assert found.estimate == pytest.approx(2, abs=0.01)
    scaled = extrapolate(sizes, fids, errors=[0.1, 0.1, 0.1, 0.1, 1e7])
    assert (scaled.low, scaled.high) == pytest.approx((found.low, found.high))
    assert "1/error^2" in found.method


def test_default_weights_are_those_of_a_variance_as_one_over_n():
    sizes, fids = np.array([1000, 2000, 4000, 8000]), [2.52, 2.24, 2.13, 2.06]
    one, other = extrapolate(sizes, fids), extrapolate(sizes, fids, errors=sizes**-0.5)
    assert (one.low, one.estimate, one.high) == pytest.approx((other.low, other.estimate, other.high))
    assert one.bias == pytest.approx(one.slope / 8000)


N4 = [1000.0, 2000, 4000, 8000]


@pytest.mark.parametrize(
    ("sizes", "fids", "how", "code", "said"),
    [
        (N4[:3] * 2, [2.5, 2.2, 2.1] * 2, {}, "too_few", "3 distinct subset sizes"),
        ([*N4[:3], np.nan], [2.5, 2.2, 2.1, 2.0], {}, "too_few", "3 distinct"),
        ([np.nan], [2.5], {}, "too_few", "0 distinct"),
        (N4 * 2, [2.5, 2.2, 2.1, 2.0] * 2, {"draws": list("aaaabbba")}, "too_few", "3 distinct subset sizes in draw b"),
        (N4, [2.5, 2.2, 2.1, np.inf], {}, "not_finite", "infinite"),
        ([0, *N4], [2.5] * 5, {}, "non_positive", "2 or more"),
        (N4, [2.5] * 4, {"errors": [1, 1, 1, 0]}, "non_positive", "errors positive"),
    ],
    ids=["sizes", "missing", "nothing", "draw", "infinite", "zero", "error"],
)
def test_refusals(sizes, fids, how, code, said):
    with pytest.raises(Refusal, match=said) as refusal:
        extrapolate(sizes, fids, **how)
    assert refusal.value.code == code


@pytest.mark.parametrize(
    ("sizes", "draws", "said"),
    [
        (N4, None, "no scatter"),
        (N4, ["a"] * 4, "one draw"),
        (N4 * 2, ["a"] * 4 + ["b"] * 4, "all draws agree"),
    ],
    ids=["line", "one", "alike"],
)
def test_no_interval_has_a_reason(sizes, draws, said):
    found = extrapolate(sizes, 2 + 500 / np.array(sizes), draws=draws)
    assert found.estimate == pytest.approx(2)
    assert (found.low, found.high, found.curvature) == (None, None, None)
    assert said in found.reason


def test_subset_sizes_lie_evenly_in_one_over_n():
    sizes = subset_sizes(50_000, 5_000, 5)
    assert (sizes[0], sizes[-1]) == (5_000, 50_000)
    assert np.diff(1 / np.array(sizes)) == pytest.approx([-4.5e-5] * 4, rel=1e-3)
    apart = subset_sizes(50_000, 5_000, 5, disjoint=True)
    assert apart[0] == 5_000
    assert 49_990 < sum(apart) <= 50_000
    assert len({round(step, 7) for step in np.diff(1 / np.array(apart))}) == 1
    for arguments in ((50_000, 5_000, 3), (5_000, 5_000, 4), (5_003, 5_000, 5)):
        with pytest.raises(Refusal, match="too_few"):
            subset_sizes(*arguments)
    with pytest.raises(Refusal, match="disjoint subsets"):
        subset_sizes(20_000, 5_000, 5, disjoint=True)


@pytest.fixture
def subsets(tmp_path):
    """Two models in three evaluation seeds, k of 500 and 900."""
    rng = np.random.default_rng(0)
    rows = [
        {"model": model, "seed": seed, "samples": n, "fid": 2 + k / n + 0.3 * rng.standard_normal() / n**0.5}
        for model, k in (("a", 500), ("b", 900))
        for seed in range(3)
        for n in (1000, 1500, 3000, 6000, 12000)
    ]
    path = tmp_path / "subsets.csv"
    pl.DataFrame(rows).with_columns(se=0.3 / pl.col("samples").sqrt(), protocol=pl.lit("inception")).write_csv(path)
    return path


def test_a_line_per_group(subsets, tmp_path, capsys):
    out = tmp_path / "out.json"
    arguments = [str(subsets), "--n", "samples", "--fid", "fid", "--by", "model", "--json", str(out)]
    assert main([*arguments, "--draw", "seed", "--protocol", "protocol"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [text.split(":")[0] for text in lines] == ["a", "b", "95% intervals"]
    assert lines[2] == "95% intervals: 1/n line, weights n, Student-t; a line per draw"
    assert "15 FIDs in 3 draws at 5 sizes from 1000" in lines[0]
    groups = json.loads(out.read_text())["groups"]
    for group, k in zip(groups, (500, 900), strict=True):
        assert group["low"] < 2 < group["high"]
        assert group["slope"] == pytest.approx(k, rel=0.1)
        assert group["bias"] == pytest.approx(group["slope"] / 12000)
        assert (group["n"], group["n_groups"], group["dof"], group["protocol"]) == (15, 3, 2, {"protocol": "inception"})
    assert main(arguments) == 0
    assert json.loads(out.read_text())["groups"][0]["dof"] == 13
    assert json.loads(out.read_text())["refused"] is None


@pytest.mark.parametrize(
    ("limit", "noise", "said"),
    [(-0.05, 3e-4, "below 0: not extrapolable"), (-0.005, 0.07, "below 0, within its error")],
)
def test_a_negative_distance_is_said(limit, noise, said):
    sizes = np.array(subset_sizes(20_000, 1_000, 6))
    signs = np.array([1, -1, 1, -1, 1, -1])
    found = extrapolate(sizes, limit + 500 / sizes + noise * signs)
    assert found.estimate < 0
    assert found.warnings[0] == said


def test_groups_of_mixed_protocols_are_refused(subsets, tmp_path, capsys):
    out = tmp_path / "out.json"
    frame = pl.read_csv(subsets)
    clip = (pl.col("model") == "b") & (pl.col("seed") == 2)
    frame.with_columns(protocol=pl.when(clip).then(pl.lit("clip")).otherwise("protocol")).write_csv(subsets)
    arguments = [str(subsets), "--n", "samples", "--fid", "fid", "--json", str(out), "--protocol", "protocol"]
    assert main([*arguments, "--by", "model"]) == 0
    assert "b: refused (mixed_protocols): protocol: 2 values among rows that are compared: clip, inception" in (
        capsys.readouterr().out
    )
    assert json.loads(out.read_text())["refused"] is None
    assert [group["refused"] for group in json.loads(out.read_text())["groups"]] == [None, "mixed_protocols"]
    assert main(arguments) == 3
    assert json.loads(out.read_text())["groups"][0]["refused"] == "mixed_protocols"
    assert json.loads(out.read_text())["refused"]["code"] == "mixed_protocols"
    assert main([*arguments[:-1], "model,protocol", "--by", "model"]) == 0
    gaps = frame.with_columns(protocol=pl.when(clip).then(None).otherwise("protocol"))
    gaps.write_csv(subsets)
    assert main(arguments) == 3
    assert "no_protocol" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--n", "n", "--fid", "fid"], "--n: got 'n'; columns: model, seed"),
        (["--n", "samples", "--fid", "protocol"], "--fid: 'protocol' holds String"),
        (["--n", "samples", "--fid", "fid", "--by", "size"], "--by: got 'size'"),
        (["--n", "samples", "--fid", "fid", "--draw", "draw"], "--draw: got 'draw'"),
        (["--n", "samples", "--fid", "fid", "--where", "fid < 0"], "leaves none of 30 rows"),
        (["--n", "half", "--fid", "fid", "--derive", "half=samples/7"], "--n: 'half' holds 142.857; allowed: whole"),
        (["--n", "samples", "--fid", "fid", "--by", "model", "--figure", "out.tif"], "a figure ends in .png, .svg"),
    ],
)
def test_mistakes_are_one_line(subsets, tmp_path, capsys, arguments, said):
    out = tmp_path / "out.json"
    assert main([str(subsets), *arguments, "--json", str(out)]) == 2
    error = capsys.readouterr().err
    assert said in error
    assert error.count("\n") == 1
    assert not out.exists()


def test_dropped_rows_are_said(subsets, capsys):
    frame = pl.read_csv(subsets)
    frame.with_columns(fid=pl.when(pl.col("samples") > 10000).then(None).otherwise("fid")).write_csv(subsets)
    assert main([str(subsets), "--n", "samples", "--fid", "fid", "--by", "model"]) == 0
    assert "3 rows dropped: no value of fid" in capsys.readouterr().out


def test_examples_of_the_help_run(subsets, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    commands = [line.strip() for line in EXAMPLES.splitlines() if "python -m" in line]
    assert len(commands) == 3
    for command in commands:
        assert main(shlex.split(command)[3:]) == 0
    with pytest.raises(SystemExit):
        main(["--help"])
    assert EXAMPLES.splitlines()[0] in capsys.readouterr().out


# Figure


def test_the_figure_shows_points_line_and_interval(subsets, tmp_path):
    made = groups(pl.read_csv(subsets), "samples", "fid", by=["model"], draw="seed")
    for panel, group in zip(draw(made, "samples", "fid").axes, made, strict=False):
        lines = {line.get_label(): line for line in panel.lines}
        dots = next(line for line in panel.lines if line.get_marker() == "o")
        assert dots.get_xdata() == pytest.approx(1 / group.sizes)
        (bar,) = [line for line in panel.lines if line.get_marker() == "_"]
        assert bar.get_ydata() == pytest.approx((group.row["low"], group.row["high"]))
        assert set(bar.get_xdata()) == {0}
        ends = next(line for line in lines.values() if line.get_linestyle() == "--")
        assert ends.get_ydata()[0] == pytest.approx(group.row["estimate"])
        assert f"{group.row['estimate']:.4g}" in (panel.get_title() or panel.get_title(loc="left"))
    assert (
        main([str(subsets), "--n", "samples", "--fid", "fid", "--by", "model", "--figure", str(tmp_path / "f.svg")])
        == 0
    )
    assert (tmp_path / "f.svg").exists()
    assert "every row a disjoint subset; 95% intervals" in (tmp_path / "f.txt").read_text()
    with pytest.raises(TableError, match="14 groups; a figure holds 12"):
        write(made * 7, tmp_path / "many.png", n="samples", fid="fid")


def test_nothing_is_drawn_where_all_is_refused(subsets, tmp_path):
    path = tmp_path / "f.png"
    few = ["--where", "samples < 4000", "--figure", str(path)]
    assert main([str(subsets), "--n", "samples", "--fid", "fid", *few]) == 3
    assert not path.exists()
