"""Do all commands say in the same words what was dropped, and that all was refused?"""

from __future__ import annotations

import numpy as np
import polars as pl
import pytest

from analysis.refusal import Refusal
from analysis.table import TableError
from analysis.tally import counted, dropped, protocol, refused


def test_one_is_no_plural():
    assert [counted(n, "cut-offs") for n in (0, 1, 2)] == ["0 cut-offs", "1 cut-off", "2 cut-offs"]


def test_dropped_rows_are_counted_once():
    x, y = np.array([True, True, False, False]), np.array([True, False, True, False])
    assert dropped({"x": x, "y": y, "z": np.zeros(4, bool)}) == "3 rows dropped: no value of x, y"
    assert dropped({"y": y[:2]}, "units") == "1 unit dropped: no value of y"
    assert dropped({"z": np.zeros(4, bool)}) == dropped({}) == ""


def test_one_protocol_or_a_refusal():
    frame = pl.DataFrame({"samples": [5e4, 5e4], "cfg": [1.5, 4.0], "seed": [0, 1], "note": ["a", None]})
    assert protocol(frame, ["samples"], []) == {"samples": "50000"}
    assert protocol(frame, ["none"], []) == {}
    for names, code in ((["samples", "cfg"], "mixed_protocols"), (["note"], "no_protocol"), ([], "mixed_protocols")):
        with pytest.raises(Refusal) as refusal:
            protocol(frame, names, ["seed"])
        assert refusal.value.code == code
    assert protocol(frame, [], ["cfg"]) == {}  # an axis of the question
    with pytest.raises(TableError, match="--protocol: got 'nope'"):
        protocol(frame, ["nope"], [])


def test_a_command_is_refused_where_every_answer_is():
    one, other = {"code": "too_few", "sentence": "one"}, {"code": "constant", "sentence": "other"}
    assert refused([]) is None
    assert refused([one, None]) is None
    assert refused([one, dict(one)]) == one
    assert refused([one, other]) == {"code": "too_few", "sentence": "all 2 answers; the first: one"}
