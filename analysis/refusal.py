"""When would an answer mislead? Refusals with a code for programs and a sentence for people.

A command that refuses says so with exit code 3 and writes the code into its JSON; bad input is exit code 2.
"""

from __future__ import annotations

EXIT_REFUSED = 3

CODES = {
    "collinear": "the design cannot tell the parameters apart",
    "constant": "a column that does not vary, where variation is the question",
    "different_points": "forms, arms or curves that were not measured on the same points",
    "duplicate_run": "a run stands twice, so it would count twice",
    "misfit": "a law that the points do not follow",
    "mixed_designs": "runs of several designs in one cell of a curve",
    "mixed_protocols": "metrics of different protocols or sample counts on one axis",
    "mixed_references": "distances to different reference sets on one axis",
    "no_compute": "points whose compute is not known",
    "no_interior_minimum": "the best value lies at an edge of what was tried, or the curve opens downwards",
    "no_protocol": "columns that say how a metric was measured are missing",
    "non_positive": "a metric or input that has to be positive is not",
    "not_finite": "a value is missing",
    "overflow": "a value or a parameter too large for a float",
    "one_upstream_seed": "a contrast needs more than one seed of what differs",
    "guided": "guided points for a quantity that is unguided by definition",
    "grouped": "a method that takes points as independent, on points that are not",
    "too_few": "fewer points, rates or budgets than the question needs",
    "unsuited": "a method that does not suit the loss or the points",
    "wide_bracket": "a threshold is passed between two points too far apart to interpolate",
}


class Refusal(ValueError):
    """A question that the data cannot answer: ``code`` (of ``CODES``) for programs, ``sentence`` for people."""

    def __init__(self, code: str, sentence: str) -> None:
        assert code in CODES, code
        super().__init__(f"{sentence} ({code})")
        self.code = code
        self.sentence = sentence

    @property
    def told(self) -> dict[str, str]:
        """Code and sentence, as JSON holds them."""
        return {"code": self.code, "sentence": self.sentence}
