"""Are tables of any format read alike, and is a mistake in an expression one line?"""

from __future__ import annotations

import numpy as np
import polars as pl
import pytest

from analysis.refusal import Refusal
from analysis.table import TableError, alike, column, derive, labels, numbers, read, where, write_json

ROWS = pl.DataFrame({"Model Size": [410_000_000, 4_100_000_000], "tokens": [4_100_000_000, 4_100_000_000]})


@pytest.fixture
def rows(tmp_path):
    ROWS.write_parquet(tmp_path / "t.parquet")
    return read(tmp_path / "t.parquet")


@pytest.mark.parametrize("suffix", [".csv", ".tsv", ".parquet", ".jsonl"])
def test_formats_read_alike(tmp_path, suffix):
    path = tmp_path / f"table{suffix}"
    held = ROWS.with_columns(name=pl.Series(["a", None]))
    writers = {
        ".csv": held.write_csv,
        ".tsv": lambda to: held.write_csv(to, separator="\t"),
        ".parquet": held.write_parquet,
        ".jsonl": held.write_ndjson,
    }
    writers[suffix](path)
    assert read(path).equals(held.with_columns(pl.col("Model Size", "tokens").cast(pl.Float64)))


def test_a_product_of_integers_does_not_overflow(rows):
    """6 N D = 1.0e19 lies beyond int64; polars would wrap it to a negative number."""
    made = derive(rows, ['C = 6 * "Model Size" * tokens', "M = tokens / C"])
    assert made["C"].to_list() == pytest.approx([6 * 4.1e8 * 4.1e9, 6 * 4.1e9 * 4.1e9])
    assert made["M"].to_list()[0] == pytest.approx(1 / (6 * 4.1e8))


def test_rows_are_kept_by_every_condition(rows):
    assert len(where(rows, ['"Model Size" > 1e9'])) == 1
    with pytest.raises(TableError, match="leaves none of 1 rows"):
        where(rows, ['"Model Size" > 1e9', "tokens < 1"])


@pytest.mark.parametrize(
    ("use", "said"),
    [
        (lambda t: derive(t, ["D"]), 'write "NAME=expression"'),
        (lambda t: derive(t, ["D=flops/6"]), "no such column; columns: Model Size, tokens"),
        (lambda t: derive(t, ["D=__import__('os')"]), "--derive"),
        (lambda t: where(t, ["tokens <"]), "unable to parse"),
        (lambda t: column(t, "loss", "--y"), "--y: got 'loss'; columns: Model Size, tokens"),
        (lambda t: numbers(t.with_columns(kind=pl.lit("a")), "kind", "--x"), "not numbers"),
        (lambda t: read("table.xlsx"), "ends in .csv"),
        (lambda t: read("nowhere.csv"), "no such file"),
    ],
)
def test_mistakes_are_one_line(rows, use, said):
    with pytest.raises(TableError, match=said) as error:
        use(rows)
    assert "\n" not in str(error.value)


def test_a_damaged_file_is_named(tmp_path):
    (tmp_path / "t.parquet").write_text("no parquet")
    with pytest.raises(TableError, match=r"t\.parquet: not readable"):
        read(tmp_path / "t.parquet")


def test_labels_of_large_numbers_and_of_fractions():
    held = pl.DataFrame({"flops": [1e19, 9.3e18, None], "share": [0.5, 2.0, 1.0], "seed": [0.0, None, 2.0]})
    assert labels(held, ["flops"], "--by") == ["1e+19", "9.3e+18", "none"]
    assert labels(held, ["share"], "--by") == ["0.5", "2.0", "1.0"]
    assert labels(held, ["seed"], "--by") == ["0", "none", "2"]


def test_labels_and_missing_numbers(rows):
    held = rows.with_columns(seed=pl.Series([None, 1]), score=pl.Series(["1.5", None]))
    assert labels(held, ["seed", "tokens"], "--group") == ["none / 4100000000", "1 / 4100000000"]
    assert np.isnan(numbers(held, "score", "--y")).tolist() == [False, True]


def test_json_is_written_whole(tmp_path):
    write_json(tmp_path / "out" / "a.json", {"x": None})
    assert (tmp_path / "out" / "a.json").read_text() == '{\n "x": null\n}\n'
    with pytest.raises(ValueError, match="JSON"):
        write_json(tmp_path / "b.json", {"x": float("nan")})
    assert not list(tmp_path.glob("*b.json*"))


def test_columns_that_say_how_rows_were_measured_are_not_pooled_unasked():
    held = pl.DataFrame({"fid": [3.0, 2.0], "cfg": [1.0, 1.5], "Samples": [5e4, 1e4], "depth": [1.0, 2.0]})
    for names, used, told in (([], [], "cfg: 2 values"), ([], ["cfg"], "Samples: 2 values"), (["depth"], [], "depth")):
        with pytest.raises(Refusal, match=told) as refusal:
            alike(held, names, used)
        assert refusal.value.code == "mixed_protocols"
    alike(held, ["none"], [])
    alike(held, [], ["cfg", "Samples"])
    alike(held, [])
    alike(held[:1], ["cfg", "depth"], [])
