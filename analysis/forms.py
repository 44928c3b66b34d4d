"""Which laws are there by name? One-input laws, size and data, and the compression-generation laws over the rate.

The compression-generation law is y = F(R) + A(R) C^-a(R), or y = F(R) + A(R) N^-a + B(R) D^-b: a floor F that falls
with the rate (a finer code can be decoded better) and amplitudes that rise with it (a finer code is harder to model).
The rate enters as bits per image R, or as tokens T and bits per token k = log2 K apart. Which of them holds is decided
by prediction of held-out rates and budgets (``analysis.backtest``), never by the fit alone.
"""

from __future__ import annotations

from analysis.laws import Form, Power, Sum, Term
from analysis.shapes import CHINCHILLA, SATURATING, Broken, Interaction, Parabola

RISE = (0.0, 5.0)  # a floor that does not fall, or an amplitude that does not rise, with the rate is at its bound
TURN = (-1.0, 1.0)  # change of an exponent per e-fold of the rate


def _floor(*rates: int) -> Term:
    return Term("F", tuple(Power(name, -1, (i,)) for name, i in zip("fg", rates, strict=False)))


def _term(amplitude: str, exponent: str, at: int, *rises: tuple[str, int]) -> Term:
    """amplitude x prod rate^rise x input^-exponent."""
    return Term(amplitude, (*(Power(name, 1, (i,)) for name, i in rises), Power(exponent, -1, (at,))))


def _rise(*names: str) -> tuple[tuple[str, tuple[float, float]], ...]:
    return tuple((name, RISE) for name in names)


_SLOPE = Term("A", (Power("r", 1, (0,)), Power("a", -1, (1,)), Power("s", -1, (0, 1))))
_BITS, _APART = ("R", "C"), ("T", "k", "C")

LAWS: tuple[Form, ...] = (
    SATURATING,
    Parabola(),
    Broken(),
    CHINCHILLA,
    Interaction(),
    # equal exponents, in size and tokens per parameter M = D / N (Gadre et al., arXiv 2403.08540, there in C and M)
    Sum(
        "overtraining",
        "y = E + (A + B M^-a) N^-a",
        ("N", "M"),
        (Term("A", (Power("a", -1, (0,)),)), Term("B", (Power("a", -1, (0,)), Power("a", -1, (1,))))),
        "E",
    ),
    Sum(
        "tradeoff", "y = F R^-f + A R^r C^-a", _BITS, (_floor(0), _term("A", "a", 1, ("r", 0))), bounds=_rise("f", "r")
    ),
    Sum("tradeoff_offset", "y = E + A R^r C^-a", _BITS, (_term("A", "a", 1, ("r", 0)),), "E", _rise("r")),
    Sum(
        "tradeoff_slope",
        "y = F R^-f + A R^r C^-(a + s ln R)",
        _BITS,
        (_floor(0), _SLOPE),
        bounds=(*_rise("f", "r"), ("s", TURN)),
    ),
    Sum(
        "tradeoff_tokens",
        "y = F T^-f k^-g + A T^r k^q C^-a",
        _APART,
        (_floor(0, 1), _term("A", "a", 2, ("r", 0), ("q", 1))),
        bounds=_rise("f", "g", "r", "q"),
        tied=(("f", "g"), ("r", "q")),
    ),
    Sum(
        "tradeoff_nd",
        "y = F R^-f + A R^r N^-a + B R^s D^-b",
        ("R", "N", "D"),
        (_floor(0), _term("A", "a", 1, ("r", 0)), _term("B", "b", 2, ("s", 0))),
        bounds=_rise("f", "r", "s"),
    ),
    Sum(
        "tradeoff_nd_tokens",
        "y = F T^-f k^-g + A T^r k^q N^-a + B T^s k^u D^-b",
        ("T", "k", "N", "D"),
        (_floor(0, 1), _term("A", "a", 2, ("r", 0), ("q", 1)), _term("B", "b", 3, ("s", 0), ("u", 1))),
        bounds=_rise("f", "g", "r", "q", "s", "u"),
        tied=(("f", "g"), ("r", "q"), ("s", "u")),
    ),
)


def _bare(law: Sum, name: str) -> Sum:
    """A law without its asymptote or floor."""
    terms = law.terms if law.offset else law.terms[1:]
    left = {power.exponent for term in terms for power in term.powers}
    return Sum(
        name,
        f"y = {law.formula.split(' + ', 1)[1]}",
        law.inputs,
        terms,
        bounds=tuple((exponent, limits) for exponent, limits in law.bounds if exponent in left),
        tied=tuple(group for group in law.tied if group[0] in left),
    )


# The form that each law is without its asymptote, floor or extra exponent, to be fitted beside it: the first three are
# laws themselves or those of other names.
WITHOUT = {
    "saturating": "power",
    "broken": "saturating",
    "interaction": "chinchilla",
    "tradeoff_offset": "tradeoff_power",
} | {
    law.name: f"{law.name}_power"
    for law in LAWS
    if isinstance(law, Sum) and law.name not in ("saturating", "tradeoff_offset")
}
FORMS: dict[str, Form] = {law.name: law for law in LAWS}
for _law in LAWS:
    if isinstance(_law, Sum) and WITHOUT[_law.name] not in FORMS:
        FORMS[WITHOUT[_law.name]] = _bare(_law, WITHOUT[_law.name])
