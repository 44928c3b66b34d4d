"""What could be added to a study's grid? Its text with one thing more: a seed, a budget, a rate, a run."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import yaml

from analysis.amendment import Key, appended, find, flow, read, repeated, scalars
from analysis.arms import Arm, envelope_table, mean_curve
from analysis.curves import Law
from analysis.fit import fit
from analysis.interval import short
from analysis.refusal import Refusal
from analysis.study import Study
from analysis.target import Kind, leader

NEAR = 0.2  # a length of one digit is taken where it is this close, one of two digits elsewhere
LAST = 3  # budgets of a local power law
OCTAVES = 4  # by which a codebook is made larger or smaller at most

Path = list[Key]


class Draft(NamedTuple):
    """A grid with one thing more."""

    kind: Kind
    words: str
    text: str
    longer: bool = False  # runs get a new last point, and evaluations of last points alone are those of another one


def drafts(text: str, held: Study, arms: Sequence[Arm], laws: dict[str, Law]) -> list[Draft]:
    """All that can be added, each alone. AmendmentError for a text that is no grid."""
    root = read(text)
    tokenizers, generators = (_sections(root, stage) for stage in ("tokenizer", "generator"))
    found = _seeds(text, tokenizers, "tokenizer seed") + _seeds(text, generators, "generator seed")
    found += _lengths(text, generators, "budgets", "FLOPs") + _lengths(text, generators, "steps", "steps")
    return found + _rates(text, tokenizers, held, arms) + _optimum(text, generators, held, arms, laws)


def _sections(root: yaml.Node, stage: str) -> list[Path]:
    """Paths of the sections of a stage: one, or a list of them."""
    node = find(root, [stage])
    if isinstance(node, yaml.SequenceNode):
        return [[stage, i] for i in range(len(node.value))]
    return [] if node is None else [[stage]]


def _all(text: str, paths: Sequence[Path], item: str, absent: str = "") -> str:
    """The text with an item in every list."""
    for path in paths:
        text = appended(text, path, item, absent)
    return text


def _seeds(text: str, sections: Sequence[Path], kind: Kind) -> list[Draft]:
    """The same new seed in every section."""
    root, paths = read(text), [[*section, "seeds"] for section in sections]
    taken = [int(seed) for path in paths for seed in scalars(find(root, path)) or ["0"]]
    if not taken:
        return []
    new = max(taken) + 1
    return [Draft(kind, f"one more {kind} ({new})", _all(text, paths, str(new), absent="0"))]


def _lengths(text: str, sections: Sequence[Path], key: str, unit: str) -> list[Draft]:
    """One more length above the largest, by the last step, and one in the middle of the widest gap."""
    root = read(text)
    paths = [[*section, key] for section in sections if find(root, [*section, key]) is not None]
    given = sorted({float(value) for path in paths for value in scalars(find(root, path))})
    if len(given) < 2:
        return []
    gap = int(np.argmax(np.diff(np.log(given))))
    wanted = {
        "above the largest": given[-1] ** 2 / given[-2],
        "in the widest gap": math.sqrt(given[gap] * given[gap + 1]),
    }
    found = []
    for words, value in wanted.items():
        item = digits(value) if key == "budgets" else str(round(value))
        words = f"one more budget {words}, {short(float(item))} {unit}"
        found.append(Draft("budget", words, _all(text, paths, item), value > given[-1] and _last_alone(root)))
    return found


def _last_alone(root: yaml.Node) -> bool:
    """Whether an evaluation of generators measures the last point of a run and no other."""
    held = find(root, ["evaluation"])
    said = [
        [getattr(find(item, [key]), "value", default) for key, default in (("of", "generator"), ("points", "last"))]
        for item in (held.value if isinstance(held, yaml.SequenceNode) else ())
    ]
    return ["generator", "last"] in said


def digits(value: float) -> str:
    """A budget as a grid writes it: 3.0e+12."""
    one = float(f"{value:.0e}")
    return f"{one if abs(math.log(one / value)) < NEAR else value:.1e}"


# --- rates -----------------------------------------------------------------------------------------------------


class Code(NamedTuple):
    """A rate by its two numbers."""

    tokens: int
    codebook: int

    @property
    def bits(self) -> float:
        return self.tokens * math.log2(self.codebook)


def _codes(held: Study, arms: Sequence[Arm]) -> dict[str, Code]:
    """The rates that have a codebook."""
    rows = held.points.select("rate", "tokens", "codebook").drop_nulls().unique(maintain_order=True)
    names = {each.rate for each in arms}
    return {rate: Code(tokens, codebook) for rate, tokens, codebook in rows.iter_rows() if rate in names}


def _rates(text: str, sections: Sequence[Path], held: Study, arms: Sequence[Arm]) -> list[Draft]:
    """Rates on either side of the one that is best at the largest budget: half-way to the next, or beyond the edge."""
    codes = _codes(held, arms)
    try:
        rated, _, place = leader([each for each in arms if each.rate in codes])
    except Refusal:
        return []
    code, best = codes[rated[place].rate], rated[place].rate
    found = []
    for side in (-1, 1):
        inside = 0 <= place + side < len(rated)
        next_to = rated[place + side if inside else place - side].rate
        gap = abs(codes[next_to].bits - code.bits)
        sizes = [code.codebook * 2.0 ** (side * k) for k in range(1, OCTAVES + 1)]
        tried = [Code(code.tokens, round(size)) for size in sizes if size >= 2]
        tried = [each for each in tried if not inside or abs(each.bits - code.bits) < gap]
        if not tried:
            continue
        ratio = code.bits / codes[next_to].bits
        goal = code.bits * (ratio**-0.5 if inside else ratio)
        new = min(tried, key=lambda each: abs(math.log(each.bits / goal)))
        made = _with_rate(text, sections, code, new)
        if new in codes.values() or made is None:
            continue
        kind: Kind = "rate" if inside else "rate beyond the edge"
        where = f"between {best} and {next_to}" if inside else f"beyond {best}, the edge"
        found.append(Draft(kind, f"one more rate {where}: {new.tokens}x{new.codebook}, {new.bits:g} bits", made))
    return found


def _with_rate(text: str, sections: Sequence[Path], like: Code, new: Code) -> str | None:
    """The text with one more rate on the axes that give ``like``; None where tokens and codebook are not axes."""
    root = read(text)
    for section in sections:
        blocks = find(root, [*section, "axes"])
        for i in range(len(blocks.value) if isinstance(blocks, yaml.SequenceNode) else 0):
            at: Path = [*section, "axes", i]
            rows = find(root, [*at, "list"])
            for row in rows.value if isinstance(rows, yaml.SequenceNode) else ():
                if scalar(row, "tokens") == like.tokens and scalar(row, "codebook") == like.codebook:
                    cells = {flow(key): flow(value) for key, value in row.value} | {"codebook": str(new.codebook)}
                    item = ", ".join(f"{name}: {value}" for name, value in cells.items())
                    return appended(text, [*at, "list"], f"{{{item}}}")
            if str(like.codebook) in scalars(find(root, path := [*at, "product", "codebook"])):
                return appended(text, path, str(new.codebook))
    return None


def scalar(node: yaml.Node, key: str) -> float | None:
    """A number in a mapping; None where there is none."""
    found = find(node, [key])
    try:
        return float(found.value) if isinstance(found, yaml.ScalarNode) else None
    except ValueError:
        return None


# --- the predicted optimum -------------------------------------------------------------------------------------


def _optimum(
    text: str, sections: Sequence[Path], held: Study, arms: Sequence[Arm], laws: dict[str, Law]
) -> list[Draft]:
    """The run that is predicted to be best at the next budget: one rate, one size, every seed.

    One draft per size, nearest first, as the grid's filters may leave a size out at that budget.
    """
    root, codes = read(text), _codes(held, arms)
    rated = [each for each in arms if each.rate in codes]
    for section in sections:
        budgets = sorted(float(value) for value in scalars(find(root, [*section, "budgets"])))
        sizes = find(root, [*section, "sizes"])
        if len(budgets) < 2 or not isinstance(sizes, yaml.SequenceNode) or not rated:
            continue
        item = digits(budgets[-1] ** 2 / budgets[-2])
        flops = float(item)
        best = min(rated, key=lambda each: predicted(each, laws.get(each.rate), flops))
        named = {_name(each): flow(each) for each in sizes.value}
        place, code = _place(best, flops), codes[best.rate]
        nearest = sorted((abs(i - place), size) for i, size in enumerate(best.sizes) if size in named)
        where = find(root, [*section, "where"])
        kept = [(flow(key), flow(value)) for key, value in where.value] if where is not None else []
        kept = [(key, value) for key, value in kept if key not in code._fields]
        kept += [(key, f"{{in: [{value}]}}") for key, value in code._asdict().items()]
        changes = {
            "name": f"optimum-{item.replace('+', '')}",
            "budgets": f"[{item}]",
            "where": f"{{{', '.join(f'{key}: {value}' for key, value in kept)}}}",
        }
        words = f"the run at the predicted optimum of {short(flops)} FLOPs: {best.rate}"
        texts = [(size, repeated(text, section, changes | {"sizes": f"[{named[size]}]"})) for _, size in nearest]
        return [Draft("optimum", f"{words}, {size}", made, _last_alone(root)) for size, made in texts]
    return []


def _name(node: yaml.Node) -> str:
    """Of a size: a rung of the family's ladder, or one that the grid spells out."""
    found = find(node, ["name"]) if isinstance(node, yaml.MappingNode) else node
    return str(found.value) if isinstance(found, yaml.ScalarNode) else ""


def predicted(arm: Arm, held: Law | None, flops: float) -> float:
    """The metric at a compute: of the law where it fits, else of a power law through the last budgets; inf of none."""
    if held is not None and held.misfit.fits:
        return float(held.fit.predict([flops])[0])
    x, y = mean_curve(arm)
    try:
        return float(fit(x[-LAST:], y[-LAST:], "power").predict([flops])[0])
    except Refusal:
        return math.inf


def _place(arm: Arm, flops: float) -> float:
    """Where among its sizes an arm is predicted to be best at a compute: a line over ln C through those that were."""
    table = envelope_table(arm)
    places = table["size"].map(arm.sizes.index)
    log = np.log(table["budget"])
    slope = float(np.polyfit(log - log.mean(), places, 1)[0]) if log.nunique() > 1 else 0.0
    return float(places.mean()) + slope * (math.log(flops) - float(log.mean()))
