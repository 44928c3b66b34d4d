"""Does the figure of a fit show its points, its law, its intervals and what it does not know, and nothing cut off?"""

from __future__ import annotations

import itertools
import math

import matplotlib
import matplotlib.pyplot as plt
import numpy as np
import polars as pl
import pytest
from matplotlib.colors import to_hex
from matplotlib.mathtext import MathTextParser
from matplotlib.text import Text

from analysis.fit import fit
from analysis.forms import FORMS
from analysis.portrait import FEW, GRID, caption, draw, formula, number, residuals, write
from analysis.published import table
from analysis.result import Fit
from analysis.table import TableError
from analysis.theme import GREY

SIX = np.geomspace(1e18, 1e20, 6)


def noise(n, size, seed=0):
    return np.exp(size * np.random.default_rng(seed).standard_normal(n))


def saturating(seed=0, **options):
    """Six points of y = 2 + 10 x^-0.5 with 3 % noise."""
    y = (2 + 10 * (SIX / 1e18) ** -0.5) * noise(6, 0.03, seed)
    return fit(SIX, y, "saturating", inputs=("C",), output="gFID", **options)


def grouped(count):
    x = np.tile(np.geomspace(1e9, 1e11, 6), count)
    names = np.repeat([f"run_{i}" for i in range(count)], 6)
    y = (3 + 20 * (x / 1e9) ** -0.6) * np.repeat(noise(count, 0.1), 6) * noise(6 * count, 0.02, 1)
    return fit(x, y, "saturating", groups=names)


def bounded():
    """Falls faster at the end than any asymptote of 0 or more allows."""
    x = np.geomspace(1, 100, 7)
    return fit(x, 9 * x**-0.5 * np.exp(-0.01 * np.log(x) ** 2), "saturating")


def vague():
    """LlamaGen's unguided gFID over five sizes: no asymptote can be told."""
    params = np.array([111.0, 343, 775, 1400, 3100]) * 1e6
    return fit(params, [31.352, 21.812, 19.417, 16.822, 13.581], "saturating", inputs=("N",), output="gFID")


def rates():
    """A law over rate and compute, five rates."""
    rate, compute = (each.ravel() for each in np.meshgrid([24.0, 96, 128, 256, 1024], np.geomspace(1e9, 1e12, 8)))
    y = (30 * rate**-0.5 + 60 * rate**0.2 * (compute / 1e9) ** -0.4) * noise(len(rate), 0.03)
    return fit(np.c_[rate, compute], y, "tradeoff", inputs=("R", "C"), output="gFID")


def cube():
    """A law over rate, size and data."""
    grid = np.meshgrid([24.0, 256, 1024], np.geomspace(1e6, 1e8, 5), np.geomspace(1e9, 1e11, 5))
    rate, size, data = (each.ravel() for each in grid)
    y = 30 * rate**-0.5 + 20 * rate**0.2 * (size / 1e6) ** -0.4 + 20 * rate**0.1 * (data / 1e9) ** -0.3
    return fit(np.c_[rate, size, data], y * noise(len(rate), 0.03), "tradeoff_nd", output="gFID")


def chinchilla():
    rows = table("chinchilla").filter(pl.col("loss") < 3.446995430227908)
    size = rows["model_size"].to_numpy()
    return fit(np.c_[size, rows["flops"].to_numpy() / 6 / size], rows["loss"], "chinchilla", output="loss")


def parabola():
    x = np.geomspace(1e6, 1e8, 7)
    return fit(x, (2 + 0.05 * np.log(x / 1.2e7) ** 2) * noise(7, 0.005), "parabola", inputs=("N",), output="loss")


def strange():
    """Small units over half a decade, and names that are no mathematics."""
    x = np.geomspace(1e-9, 3e-9, 6)
    names = ("a very long name of an input column, as tables have them ($)",)
    y = 1e-7 * (1 + x / 1e-9) ** -0.5 * noise(6, 0.001)
    return fit(x, y, "power", groups=["_one $x$"] * 3 + ["two $x_1$"] * 3, inputs=names, output="fid_50k $a_b$ %")


def huge():
    x = np.geomspace(1e22, 1e27, 12)
    return fit(x, 1e12 * (0.1 + (x / 1e22) ** -0.3) * noise(12, 0.2), "saturating")


def absolute():
    """A loss without intervals at this n."""
    return saturating(loss="absolute")


LOOKS = {
    "saturating": (saturating, [1e21]),
    "three groups": (lambda: grouped(3), [3e11, 1e12]),
    "eight groups": (lambda: grouped(8), None),
    "twelve groups": (lambda: grouped(12), None),
    "at its bound": (bounded, [1000.0]),
    "not identified": (vague, [1e11]),
    "rates": (rates, [[96.0, 1e13]]),
    "cube": (cube, [[96.0, 1e9, 1e12]]),
    "chinchilla": (chinchilla, [[70e9, 1.4e12]]),
    "parabola": (parabola, None),
    "strange names": (strange, [2e-9]),
    "huge": (huge, None),
    "absolute": (absolute, [1e21]),
}


def lines(axes, label):
    return [line for line in axes.lines if line.get_label() == label]


def heights(axes, label):
    """Of the bands with a label: x, low and high."""
    found = []
    for band in axes.collections:
        if band.get_label() == label:
            corners = np.concatenate([path.vertices for path in band.get_paths()])
            x = np.unique(corners[:, 0])
            sides = [corners[corners[:, 0] == place, 1] for place in x]
            found.append((x, np.array([side.min() for side in sides]), np.array([side.max() for side in sides])))
    return found


def drawn(axes):
    """The law as drawn: x and y over all of its pieces."""
    pieces = [np.column_stack(line.get_data()) for line in axes.lines if line.get_label().startswith("law")]
    rows = np.unique(np.concatenate(pieces), axis=0)
    return rows[:, 0], rows[:, 1]


# --- one input -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("made", [saturating, lambda: grouped(3), vague, parabola, huge, bounded])
def test_bands_hold_the_law_and_that_of_an_observation_is_wider(made):
    top = draw(made()).axes[0]
    x, y = drawn(top)
    ((across, low, high),) = heights(top, "law, 95 %")
    ((_, lower, higher),) = heights(top, "new observation, 95 %")
    level = np.interp(np.log(across), np.log(x), y)
    assert (low <= level * (1 + 1e-9)).all()
    assert (high >= level * (1 - 1e-9)).all()
    assert (lower <= low).all()
    assert (higher >= high).all()
    assert (higher > high * (1 + 1e-6)).any()


def test_bands_are_those_of_the_fit():
    found = saturating()
    ((across, low, high),) = heights(draw(found).axes[0], "law, 95 %")
    frame = found.get_prediction(across).summary_frame()
    assert low == pytest.approx(frame["mean_ci_lower"].to_numpy())
    assert high == pytest.approx(frame["mean_ci_upper"].to_numpy())


@pytest.mark.parametrize("at", [None, [1e21], [1e16, 1e19]])
def test_a_law_is_dashed_beyond_the_data_and_nowhere_else(at):
    found = saturating()
    top = draw(found, at=at).axes[0]
    (inside,) = lines(top, "law")
    assert inside.get_linestyle() == "-"
    assert inside.get_xdata()[[0, -1]] == pytest.approx([1e18, 1e20])
    assert inside.get_ydata() == pytest.approx(found.predict(inside.get_xdata()))
    below, above = lines(top, "law beyond the data")
    assert (below.get_linestyle(), above.get_linestyle()) == ("--", "--")
    assert below.get_xdata().max() == pytest.approx(1e18)
    assert above.get_xdata().min() == pytest.approx(1e20)
    assert below.get_xdata().min() < 1e18 < 1e20 < above.get_xdata().max()
    low, high = top.get_xlim()
    for place in at or []:
        assert low <= place <= high


def test_every_point_is_drawn_once_above_and_below():
    found = saturating()
    top, bottom = draw(found).axes
    (above,), (below,) = lines(top, "points"), lines(bottom, "points")
    assert above.get_xdata().tolist() == below.get_xdata().tolist() == [row[0] for row in found.x]
    assert above.get_ydata().tolist() == list(found.y)
    assert below.get_ydata() == pytest.approx(np.log(np.array(found.y) / found.predict(SIX)))
    assert below.get_ydata() == pytest.approx(residuals(found))


def test_residuals_are_logarithms_whatever_the_estimator():
    found = saturating(residuals="raw")
    (below,) = lines(draw(found).axes[1], "points")
    assert below.get_ydata() == pytest.approx(np.log(np.array(found.y) / found.predict(SIX)))


@pytest.mark.parametrize("count", [1, 3, FEW, FEW + 1])
def test_groups_are_told_apart_where_they_are_few(count):
    found = grouped(count)
    dots = lines(draw(found).axes[0], "points")
    looks = {(to_hex(line.get_color()), line.get_marker()) for line in dots}
    if count <= FEW:
        assert [len(line.get_xdata()) for line in dots] == [6] * count
        assert len(looks) == count
        assert to_hex(GREY) not in {colour for colour, _ in looks}
    else:
        assert [len(line.get_xdata()) for line in dots] == [found.n]
        assert {colour for colour, _ in looks} == {to_hex(GREY)}
    assert ("too many to be told apart" in caption(found).text) == (count > FEW)


@pytest.mark.parametrize(("size", "shown"), [(0.001, 0.1), (0.02, 2), (0.1, 10), (0.5, 50)])
def test_residuals_have_per_cent_ticks(size, shown):
    x = np.geomspace(1, 1000, 8)
    signs = np.array([1, -1, -1, 1, 1, -1, -1, 1])
    bottom = draw(fit(x, x**-0.3 * np.exp(size * signs), "power")).axes[1]
    bottom.figure.draw_without_rendering()
    places, names = bottom.get_yticks(), [label.get_text() for label in bottom.get_yticklabels()]
    shares = [float(name.removesuffix(" %").replace("−", "-").replace(",", "")) for name in names]
    assert 100 * np.expm1(places) == pytest.approx(shares, abs=0.5)
    assert shares[1] == 0
    assert shown / 3 <= shares[2] <= 2 * shown
    low, high = bottom.get_ylim()
    assert low < min(places) < max(places) < high


def test_the_asymptote_has_its_interval_beside_the_axes():
    found = saturating()
    figure = draw(found)
    (level,) = lines(figure.axes[0], "asymptote")
    assert set(level.get_ydata()) == {found.params["E"]}
    (bar,) = lines(figure.axes[0], "asymptote, 95 %")
    assert bar.get_ydata() == pytest.approx(found.conf_int().loc["E"].to_numpy())
    assert min(bar.get_xdata()) > 1
    low, high = figure.axes[0].get_ylim()
    assert low < min(bar.get_ydata())
    assert max(bar.get_ydata()) < high


def test_an_interval_that_leaves_the_axes_ends_in_an_arrow():
    top = draw(vague()).axes[0]
    assert vague().conf_int().loc["E", "lower"] == 0
    (bar,) = lines(top, "asymptote, 95 %")
    assert min(bar.get_ydata()) == top.get_ylim()[0]
    assert [line.get_ydata()[0] for line in top.lines if line.get_marker() == "v"] == [top.get_ylim()[0]]


def test_an_asymptote_at_its_bound_is_said_and_not_drawn():
    found = bounded()
    top = draw(found).axes[0]
    assert found.params["E"] == 0
    assert not lines(top, "asymptote")
    assert "E is at its lower bound." in caption(found).text
    assert "at its lower bound" in top.figure.get_suptitle()


@pytest.mark.parametrize(
    ("made", "why"),
    [
        (lambda: grouped(1), "one group says nothing about another, and its points are not independent"),
        (absolute, "an interval of this loss is a bootstrap's"),
        (lambda: fit(SIX, 2 + 8 * (SIX / 1e18) ** -0.5), "the points lie on the law to the last digit"),
        (lambda: saturating(interval="profile"), "the intervals of profile are of parameters alone"),
    ],
)
def test_no_interval_no_band(made, why):
    found = made()
    top = draw(found, at=[1e21]).axes[0]
    assert not top.collections
    assert f"No band is drawn: {why}" in caption(found).text
    assert "without an interval" in caption(found, at=[1e21]).text
    if found.reason:
        assert "[" not in top.figure.get_suptitle()


def test_what_is_not_identified_is_hatched_and_said():
    found = vague()
    top = draw(found, at=[1e11]).axes[0]
    (hatched,) = [band for band in top.collections if band.get_label() == "not identified"]
    assert hatched.get_hatch()
    assert "Not identified: E (known to no better than half the lowest value" in caption(found).text
    assert caption(found, at=[1e11]).text.endswith("for a new observation, not identified.")
    full, open_ = lines(top, "asked")
    assert (len(full.get_xdata()), len(open_.get_xdata())) == (0, 1)
    assert open_.get_markerfacecolor() == "white"
    assert not [band for band in draw(saturating()).axes[0].collections if band.get_label() == "not identified"]


def test_predictions_are_marked_with_their_intervals():
    found, at = saturating(), [1e21, 5e18]
    top = draw(found, at=at).axes[0]
    (marks,) = [line for line in lines(top, "asked") if len(line.get_xdata())]
    assert marks.get_xdata().tolist() == at
    assert marks.get_ydata() == pytest.approx(found.predict(at))
    frame = found.get_prediction(at).summary_frame()
    for name, label in (("mean", "law"), ("obs", "new observation")):
        bars = [line.get_ydata() for line in lines(top, f"asked: {label}, 95 %")]
        assert np.array(bars) == pytest.approx(frame[[f"{name}_ci_lower", f"{name}_ci_upper"]].to_numpy())
    words = caption(found, at=at).text
    assert f"At C = 1e21, 10 times beyond the data: {number(found.predict(at)[0])}, [" in words
    assert "At C = 5e18, within the data: " in words


# --- several inputs ------------------------------------------------------------------------------------------------


def test_a_law_of_two_inputs_has_one_line_per_value_of_the_first():
    found = rates()
    left, *panels = draw(found, at=[[96.0, 1e13]]).axes
    x, y = np.array(found.x), np.array(found.y)
    curves, dots = lines(left, "law"), lines(left, "points")
    assert len(curves) == len(dots) == len(heights(left, "law, 95 %")) == 5
    for value, curve, points in zip(np.unique(x[:, 0]), curves, dots, strict=True):
        own = x[:, 0] == value
        assert points.get_ydata() == pytest.approx(y[own])
        assert to_hex(points.get_color()) == to_hex(curve.get_color())
        at = np.column_stack([np.full(GRID, value), curve.get_xdata()])
        assert curve.get_ydata() == pytest.approx(found.predict(at))
        assert curve.get_xdata()[[0, -1]] == pytest.approx([x[own, 1].min(), x[own, 1].max()])
    assert len({to_hex(curve.get_color()) for curve in curves}) == 5
    assert len(panels) == 2
    for i, panel in enumerate(panels):
        places = np.concatenate([line.get_xydata() for line in lines(panel, "points")])
        assert sorted(map(tuple, places)) == sorted(zip(x[:, i], residuals(found), strict=True))
    assert [line.get_xdata()[0] for line in lines(left, "asked") if len(line.get_xdata())] == [1e13]


def test_a_law_of_three_inputs_is_observed_against_fitted():
    found = cube()
    left, *panels = draw(found).axes
    (equal,) = lines(left, "observed = fitted")
    assert (equal.get_xdata() == equal.get_ydata()).all()
    places = np.concatenate([line.get_xydata() for line in lines(left, "points")])
    assert sorted(map(tuple, places)) == sorted(zip(found.predict(found.x), found.y, strict=True))
    assert len(panels) == 3
    assert not left.collections


def test_many_values_of_the_first_input_have_a_colour_bar():
    found = chinchilla()
    left, first, second, bar = draw(found, at=[[70e9, 1.4e12]], labels={"N": "parameters", "D": "tokens"}).axes
    x = np.array(found.x)
    for panel, across, up in (
        (left, found.predict(x), found.y),
        *((p, x[:, i], residuals(found)) for i, p in enumerate((first, second))),
    ):
        (cloud,) = panel.collections
        assert np.asarray(cloud.get_offsets()) == pytest.approx(np.column_stack([across, up]))
    assert bar.get_ylim() == pytest.approx((x[:, 0].min(), x[:, 0].max()))
    assert bar.get_ylabel() == "parameters ($N$)"
    assert second.get_xlabel() == "tokens ($D$)"
    (mark,) = [line for line in lines(left, "asked") if len(line.get_xdata())]
    assert mark.get_xdata() == pytest.approx(mark.get_ydata())


# --- words and files -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", LOOKS)
def test_nothing_is_cut_off_and_nothing_lies_over_the_panels(name):
    made, at = LOOKS[name]
    figure = draw(made(), at=at)
    figure.draw_without_rendering()
    whole = figure.bbox.padded(1)
    for text in figure.findobj(Text):
        if text.get_visible() and text.get_text().strip():
            box = text.get_window_extent()
            inside = whole.x0 <= box.x0 and box.x1 <= whole.x1 and whole.y0 <= box.y0 and box.y1 <= whole.y1
            # ticks beyond the limits of an axis are not drawn
            assert inside or text in {
                t for axes in figure.axes for t in (*axes.get_xticklabels(), *axes.get_yticklabels())
            }
    headline, legend = figure._suptitle.get_window_extent(), figure.legends[0].get_window_extent()
    assert headline.y0 >= max(axes.bbox.y1 for axes in figure.axes)
    for axes in figure.axes:
        assert legend.y1 <= axes.get_tightbbox().y0 + 1
    for axes in figure.axes:
        for side in ("x", "y"):
            axis = getattr(axes, f"{side}axis")
            boxes = [tick.get_window_extent() for tick in axis.get_ticklabels() if tick.get_text()]
            boxes = [box for box in boxes if box.width]
            low, high = ("x0", "x1") if side == "x" else ("y0", "y1")
            boxes.sort(key=lambda box, low=low: getattr(box, low))
            for one, other in itertools.pairwise(boxes):
                assert getattr(one, high) <= getattr(other, low) + 1, (name, side)


def test_a_caption_says_what_has_to_be_known():
    found = grouped(3)
    words = caption(found)
    assert words.title == "y by x, saturating law"
    assert words.n == 18
    for part in (
        f"y = E + A x^-a with E = {number(found.params['E'])} [",
        "n = 18 in 3 groups, dof = 2; points: all points given.",
        f"Estimator: {found.estimator}; residual standard deviation of ln y: ",
        f"Intervals: {found.interval_method}.",
        "Dark band: 95 % of the law; light: of a new observation; dashed: beyond the data.",
    ):
        assert part in words.text
    assert "Band: 95 % of the law; dashed: beyond the data." in caption(rates()).text
    assert "Observed against fitted has no bands." in caption(cube()).text
    weighted = saturating(weights=[1, 1, 1, 1, 2, 2])
    assert ", weighted; residual" in caption(weighted).text
    assert "weighted" not in caption(saturating()).text


def test_a_figure_is_made_from_a_fit_alone(tmp_path):
    found = rates()
    write(found, tmp_path / "one.svg", at=[[96.0, 1e13]])
    write(Fit.from_json(found.to_json()), tmp_path / "other.svg", at=[[96.0, 1e13]])
    assert (tmp_path / "one.svg").read_bytes() == (tmp_path / "other.svg").read_bytes()


@pytest.mark.parametrize(
    ("end", "first"), [(".png", b"\x89PNG"), (".svg", b"<?xml"), (".pdf", b"%PDF"), (".PNG", b"\x89PNG")]
)
def test_a_figure_is_the_same_file_twice_with_its_caption(tmp_path, end, first):
    found, before = saturating(), dict(matplotlib.rcParams)
    places = [tmp_path / name / f"law{end}" for name in ("a", "b")]
    for place in places:
        write(found, place, at=[1e21], labels={"C": "training compute (FLOPs)"})
        words = caption(found, at=[1e21])
        assert place.with_suffix(".txt").read_text() == f"{words.title}. {words.text}\n"
        assert sorted(file.name for file in place.parent.iterdir()) == sorted(["law.txt", place.name])
    one, other = (place.read_bytes() for place in places)
    assert one.startswith(first)
    assert one == other
    assert dict(matplotlib.rcParams) == before
    assert not plt.get_fignums()


@pytest.mark.parametrize("name", ["law.jpg", "law", "law.txt", "law.png.gz"])
def test_another_ending_is_bad_input(tmp_path, name):
    with pytest.raises(TableError, match=rf"--figure: got '.*{name}'; a figure ends in .png, .svg, .pdf$"):
        write(saturating(), tmp_path / name)
    assert not list(tmp_path.iterdir())


def test_a_place_that_cannot_be_written_to_is_bad_input(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(TableError, match=r"--figure: .*law\.png: "):
        write(saturating(), tmp_path / "file" / "law.png")
    (tmp_path / "law.txt").mkdir()
    with pytest.raises(TableError, match=r"--figure: .*law\.png: is a folder"):
        write(saturating(), tmp_path / "law.png")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "law.txt"]


def test_every_law_can_be_typeset():
    parser = MathTextParser("path")
    for form in FORMS.values():
        parser.parse(f"${formula(form.formula)}$")
    assert formula("y = E + A x^-a") == r"y = E + A\,x^{-a}"
    assert formula("y = F R^-f + A R^r C^-(a + s ln R)") == r"y = F\,R^{-f} + A\,R^{r}\,C^{-(a + s\,\ln\,R)}"


@pytest.mark.parametrize(
    ("value", "text"),
    [(0.54123, "0.541"), (4876.2, "4876"), (340360.0, "3.4e5"), (1.27e11, "1.27e11"), (1.57e-16, "1.57e-16"), (0, "0")],
)
def test_numbers_have_no_commas(value, text):
    assert number(value) == text
    assert math.isclose(float(text), value, rel_tol=0.005)
