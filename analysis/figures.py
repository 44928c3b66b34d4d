"""What does a study look like? Every figure of a results folder, as PNG and SVG, with captions, tables and a report.

    python -m analysis.figures results/digits [--out DIR] [--only NAME]
    python -m analysis.figures results/published

A figure is made in three steps: data (``analysis.study``, ``analysis.report``), drawing (``analysis.scaling``,
``pictures``, ``checks``) in one theme (``analysis.theme``), and files, written here. What has not been measured yet is
left out and said. Figures from the literature are those of ``analysis.literature``.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import matplotlib
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.colors import to_hex
from matplotlib.figure import Figure
from matplotlib.image import AxesImage
from matplotlib.lines import Line2D
from matplotlib.patches import Rectangle
from numpy.typing import NDArray

from analysis import checks, literature, pictures, published, report, scaling, study
from analysis.load import StudyError
from analysis.report import Results
from analysis.table import TableError
from analysis.theme import Caption, Missing, theme

DPI = 200
Drawing = Callable[[Results], tuple[Figure, Caption]]


def drawings(held: study.Study) -> dict[str, Drawing]:
    """Every figure by file name; those by gFID once more for each further extractor."""
    found: dict[str, Drawing] = {}
    for i, extractor in enumerate(held.extractors or ("",)):
        suffix = f"_{extractor}" if i else ""
        found[f"fig1_generation{suffix}"] = partial(scaling.generation, extractor=extractor)
        found[f"fig3_best_rate{suffix}"] = partial(scaling.best_rate, extractor=extractor)
        found[f"fig2_rate_distortion{suffix}"] = partial(scaling.rate_distortion, extractor=extractor)
    found["fig4_samples"] = pictures.samples
    found["fig5_reconstructions"] = pictures.reconstructions
    found["fig6_gate"] = checks.gate
    found["fig7_extractors"] = checks.extractors
    found["fig8_prediction"] = checks.prediction
    return dict(sorted(found.items()))


def _short(values: Iterable[Any]) -> list[float | None]:
    """Numbers to five digits, null where nothing is drawn: no file format has a NaN."""
    found = [float(value) for value in np.ma.filled(np.ma.asarray(values, np.float64), np.nan)]
    return [float(f"{value:.5g}") if math.isfinite(value) else None for value in found]


def contents(figure: Figure) -> list[dict[str, Any]]:
    """What each panel of a figure shows, as numbers and words: labels, lines, rectangles, texts, hashes of pictures."""
    panels = []
    for axes in figure.axes:
        panel: dict[str, Any] = {
            "title": axes.get_title("left") or axes.get_title(),
            "x": {"label": axes.get_xlabel(), "limits": _short(axes.get_xlim())},
            "y": {"label": axes.get_ylabel(), "limits": _short(axes.get_ylim())},
            "lines": [
                {
                    "colour": to_hex(line.get_color()),
                    "marker": str(line.get_marker()),
                    "fill": line.get_fillstyle(),
                    "x": _short(np.asarray(line.get_xdata())[:: _stride(line)]),
                    "y": _short(np.asarray(line.get_ydata())[:: _stride(line)]),
                }
                for line in axes.lines
            ],
            "rectangles": [
                {"colour": to_hex(each.get_facecolor(), keep_alpha=True), "at": _short(each.get_xy())}
                for each in axes.patches
                if isinstance(each, Rectangle)
            ],
            "texts": [each.get_text() for each in axes.texts],
            "pictures": [hashlib.sha256(_pixels(each).tobytes()).hexdigest()[:12] for each in axes.images],
        }
        panels.append({name: value for name, value in panel.items() if value != []})
    return panels


def _stride(line: Line2D) -> int:
    """Every point of a line with markers; of a curve, which is smooth, about thirty."""
    return 1 if line.get_marker() not in ("None", "none", "", None) else max(len(np.asarray(line.get_xdata())) // 30, 1)


def _pixels(picture: AxesImage) -> NDArray[Any]:
    array = picture.get_array()
    assert array is not None
    return np.ascontiguousarray(array)


def save(figure: Figure, caption: Caption, out: Path, name: str) -> None:
    """One figure as PNG and SVG, its caption as text, caption and contents as JSON."""
    out.mkdir(parents=True, exist_ok=True)
    figure.savefig(out / f"{name}.png", dpi=DPI)
    panels = contents(figure)
    figure.set_layout_engine("none")  # placed once; both files agree
    figure.savefig(out / f"{name}.svg", metadata={"Date": None})
    plt.close(figure)
    (out / f"{name}.txt").write_text(f"{caption.title}. {caption.text}\n")
    (out / f"{name}.json").write_text(json.dumps({**asdict(caption), "panels": panels}) + "\n")


def draw(held: study.Study, out: Path, only: str | None = None) -> tuple[list[str], dict[str, str]]:
    """Draw what can be drawn: names of the figures, and why each of the others is missing."""
    results = Results(held)
    found = _draw({name: partial(each, results) for name, each in drawings(held).items()}, out, only)
    if only is None and not held.points.is_empty():
        report.write(results, out)
    return found


def _draw(
    wanted: Mapping[str, Callable[[], tuple[Figure, Caption]]], out: Path, only: str | None
) -> tuple[list[str], dict[str, str]]:
    theme()
    if only is not None and only not in wanted:
        raise StudyError(f"--only: got {only!r}; allowed: {', '.join(wanted)}")
    drawn: list[str] = []
    missing: dict[str, str] = {}
    for name, drawing in wanted.items():
        if only not in (None, name):
            continue
        try:
            figure, caption = drawing()
        except Missing as reason:
            missing[name] = str(reason)
            continue
        save(figure, caption, out, name)
        drawn.append(name)
    return drawn, missing


def _literature(folder: Path, out: Path | None, only: str | None) -> int:
    try:
        drawn, _ = _draw(
            {name: partial(each, folder) for name, each in literature.FIGURES.items()}, out or folder / "figures", only
        )
    except (StudyError, TableError) as error:
        print(error, file=sys.stderr)
        return 2
    print(f"{out or folder / 'figures'}: {', '.join(drawn)}")
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m analysis.figures", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("study", help="results folder, for example results/digits")
    parser.add_argument("--out", type=Path, help="folder for the figures (default: STUDY/figures)")
    parser.add_argument("--only", help="draw one figure, for example fig1_generation")
    arguments = parser.parse_args(argv)
    matplotlib.use("Agg")
    if published.holds(Path(arguments.study)):
        return _literature(Path(arguments.study), arguments.out, arguments.only)
    try:
        held = study.read(arguments.study)
        out = arguments.out or held.folder / "figures"
        drawn, missing = draw(held, out, arguments.only)
    except StudyError as error:
        print(error, file=sys.stderr)
        return 2
    for line in held.damaged:
        print(line, file=sys.stderr)
    if drawn:
        print(f"{out}: {', '.join(drawn)}")
    # the headline, or the one that was asked for, is what a caller waits for; the rest is only said
    needed = arguments.only or "fig1_generation"
    for name, reason in missing.items():
        print(f"{name}: not drawn, {reason}", file=sys.stderr if name == needed else sys.stdout)
    return 2 if needed in missing else 0


if __name__ == "__main__":
    sys.exit(main())
