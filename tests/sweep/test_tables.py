"""Is every row that was written read again, once, and is every damage named?"""

from __future__ import annotations

import subprocess
import sys
from datetime import UTC, datetime
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from sweep import rundir, tables

RUN, OTHER, MEASURED = "g0123456789ab", "g00000000000e", "v5e1000000000"
ROOT = Path(tables.__file__).parents[1]


@pytest.fixture
def study(tmp_path: Path) -> Path:
    study = tmp_path / "digits"
    rundir.atomic_write(study, rundir.lock_file(study), {"version": tables.VERSION})
    plan = pa.Table.from_pylist([{"run_id": RUN, "points": [10, 20]}, {"run_id": OTHER}], tables.schema("plan"))
    tables.write(study, rundir.plan_file(study), plan)
    return study


def losses(steps: range, value: float) -> list[dict[str, object]]:
    return [{"step": step, "split": "train", "metric": "loss", "value": value} for step in steps]


def written(
    study: Path, run_id: str, attempt: int, *batches: list[dict[str, object]], table: str = "curves"
) -> list[Path]:
    writer = tables.Writer(study, table, run_id, attempt)
    paths = []
    for rows in batches:
        writer.append(rows)
        paths.append(writer.flush())
    return [path for path in paths if path]


def values(study: Path, table: str = "curves") -> list[tuple[object, ...]]:
    held = pq.read_table(rundir.compact_file(study, table)).to_pylist()
    return [(row["run_id"], row["attempt"], row["step"], row["value"]) for row in held]


# --- writing ---------------------------------------------------------------------------------------------------------


def test_a_part_has_the_whole_schema_and_says_whose_it_is(study):
    moment = datetime(2026, 1, 2, 3, 4, 5, 678901, tzinfo=UTC)
    row = {"status": "done", "steps": 5, "wall_s": 1.5, "dirty": False, "started": moment, "host": "näme"}
    (path,) = written(study, RUN, 2, [row, {"status": None}], table="runs")
    assert path.relative_to(study) == Path("tables/runs/study=digits") / f"run={RUN}" / "2-0000.parquet"
    assert pq.read_schema(path).remove_metadata() == tables.schema("runs")
    first, second = pq.ParquetFile(path).read().to_pylist()
    assert first.items() >= {**row, "study": "digits", "run_id": RUN, "attempt": 2}.items()
    assert {key for key, value in second.items() if value is not None} == {"study", "run_id", "attempt"}
    footer = pq.read_metadata(path).metadata
    assert footer[b"version"] == str(tables.VERSION).encode()
    assert footer[b"run_id"] == RUN.encode()
    assert b"commit" in footer
    assert not list(rundir.staging(study).iterdir())


def test_pixels_come_back_as_they_were(study):
    pixels = bytes(range(256))
    written(study, RUN, 1, [{"kind": "sample", "pixels": pixels}, {"kind": "sample", "pixels": None}], table="images")
    tables.compact(study)
    assert pq.read_table(rundir.compact_file(study, "images"))["pixels"].to_pylist() == [pixels, None]


def test_parts_are_numbered_and_empty_ones_are_not_written(study):
    paths = written(study, RUN, 1, losses(range(2), 1.0), [], losses(range(2, 4), 1.0))
    assert [path.name for path in paths] == ["1-0000.parquet", "1-0001.parquet"]


def test_a_superseded_attempt_writes_no_part(study):
    def superseded() -> None:
        raise rundir.Superseded

    writer = tables.Writer(study, "curves", RUN, 1, superseded)
    writer.append(losses(range(3), 1.0))
    with pytest.raises(rundir.Superseded):
        writer.flush()
    assert not tables.parts(study, "curves")


def test_an_unknown_column_is_a_mistake_of_ours(study):
    with pytest.raises(AssertionError, match="vlaue"):
        tables.Writer(study, "curves", RUN, 1).append([{"vlaue": 1.0}])


def test_neither_pandas_nor_polars_is_needed(study):
    code = f"""
import sys
from pathlib import Path
from sweep import tables
writer = tables.Writer(Path({str(study)!r}), "runs", "{RUN}", 1)
writer.append([{{"status": "done", "dirty": True, "wall_s": 1}}])
writer.flush()
assert not tables.verify(Path({str(study)!r})) and not tables.compact(Path({str(study)!r}))
assert tables.plan(Path({str(study)!r}), ["run_id", "points"], ["{RUN}"])
print([name for name in ("pandas", "polars", "torch") if name in sys.modules])
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


# --- what is current -------------------------------------------------------------------------------------------------


def test_a_resumed_run_keeps_the_rows_before_its_resume_and_the_new_ones_after(study):
    written(study, RUN, 1, losses(range(6), 1.0))
    written(study, RUN, 2, losses(range(4, 9), 2.0))
    written(study, OTHER, 10, losses(range(1), 3.0))
    assert not tables.compact(study)
    old, new = [(RUN, 1, step, 1.0) for step in range(4)], [(RUN, 2, step, 2.0) for step in range(4, 9)]
    assert values(study) == [(OTHER, 10, 0, 3.0), *old, *new]


def test_the_tenth_attempt_is_later_than_the_ninth(study):
    for attempt in (9, 10):
        written(study, RUN, attempt, losses(range(1), float(attempt)))
    tables.compact(study)
    assert values(study) == [(RUN, 10, 0, 10.0)]


def test_a_measurement_repeated_in_full_replaces_the_first_whatever_scale_it_chose(study):
    for attempt, scale in ((1, 2.0), (2, 1.5)):
        rows = [{"step": 5, "metric": "fid", "guidance": guidance, "value": guidance} for guidance in (1.0, scale)]
        written(study, MEASURED, attempt, rows)
    tables.compact(study)
    assert [value for *_, value in values(study)] == [1.0, 1.5]


def test_compaction_is_skipped_when_nothing_changed_and_sources_stay(study):
    paths = written(study, RUN, 1, losses(range(3), 1.0))
    tables.compact(study)
    compact = rundir.compact_file(study, "curves")
    before = compact.stat().st_ino
    tables.compact(study)
    assert compact.stat().st_ino == before
    paths += written(study, RUN, 2, losses(range(3), 2.0))
    tables.compact(study)
    assert compact.stat().st_ino != before
    assert all(path.exists() for path in paths)


def test_a_column_that_came_later_is_null_in_older_parts(study):
    kind = pa.schema([field for field in tables.schema("curves") if field.name not in ("error", "labels")])
    old = pa.Table.from_pylist([{"run_id": RUN, "attempt": 1, "step": 1, "metric": "loss", "value": 1.0}], kind)
    path = rundir.part_file(study, "curves", RUN, 1, 0)
    tables.write(study, path, old, run_id=RUN)
    row = tables.read(path, "curves").to_pylist()[0]
    assert row["value"] == 1.0
    assert row["error"] is None
    assert not tables.verify(study)


# --- damage ----------------------------------------------------------------------------------------------------------


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-40])


def flip(path: Path) -> None:
    held = bytearray(path.read_bytes())
    held[4:60] = bytes(56)
    path.write_bytes(held)


def age(path: Path) -> None:
    held = pq.ParquetFile(path).read()
    pq.write_table(held.replace_schema_metadata({"version": "0", "run_id": RUN}), path)


def move(path: Path) -> None:
    target = path.parent.with_name(f"run={OTHER}")
    target.mkdir()
    path.rename(target / path.name)


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (truncate, "cannot be read"),
        (flip, "cannot be read"),
        (age, "schema version: got 0; allowed: 1"),
        (move, f"holds rows of run {RUN}"),
    ],
)
def test_a_damaged_part_is_named_and_left_out(study, damage, says, capsys):
    written(study, MEASURED, 1, losses(range(2), 5.0))
    first, second = written(study, RUN, 1, losses(range(2), 1.0), losses(range(2, 4), 1.0))
    damage(second)
    (problem,) = tables.verify(study)
    assert problem.path.name == second.name
    assert says in problem.what
    (again,) = tables.compact(study)
    assert again == problem
    assert [step for run, _, step, _ in values(study) if run == RUN] == [0, 1]
    assert tables.main(["verify", str(study)]) == 1
    captured = capsys.readouterr()
    assert says in captured.err
    assert second.name in captured.err
    assert captured.out.count("\n") == 1
    assert first.exists()


def test_quarantine_moves_damage_away_and_opens_the_run_again(study):
    written(study, RUN, 1, losses(range(2), 1.0))
    rundir.mark(study, RUN, "done", points=[10, 20])
    (path,) = written(study, RUN, 1, [{"status": "done"}], table="runs")
    truncate(path)
    assert tables.main(["verify", str(study), "--quarantine"]) == 1
    assert not path.exists()
    assert [found.name for found in (study / "damaged").rglob("*.damaged")] == ["1-0000.parquet.damaged"]
    assert not list((study / "tables").rglob("*.damaged"))
    assert tables.main(["verify", str(study)]) == 0
    assert rundir.status(study, RUN)["state"] == "planned"
    assert rundir.status(study, RUN)["points"] == [10, 20]


def test_what_cannot_be_made_again_is_said(study, capsys):
    run = "g0123456789ab"
    (path,) = written(study, run, 1, losses(range(2), 1.0))
    (other,) = written(study, MEASURED, 1, losses(range(2), 1.0))
    for run_id in (run, MEASURED):
        rundir.mark(study, run_id, "done", points=[10, 20])
        written(study, run_id, 1, [{"status": "done"}], table="runs")
    truncate(path)
    truncate(other)
    assert tables.main(["verify", str(study), "--quarantine"]) == 1
    error = capsys.readouterr().err
    assert f"{run}: some of its training curve is gone" in error
    assert f"{MEASURED}: the next launch writes its rows again" in error
    assert rundir.status(study, run)["state"] == "done"
    assert rundir.status(study, MEASURED)["state"] == "planned"


def test_damage_is_said_every_time(study, capsys):
    (path,) = written(study, RUN, 1, losses(range(2), 1.0))
    (whole,) = written(study, OTHER, 1, losses(range(2), 1.0))
    truncate(path)
    for _ in range(2):
        assert tables.main(["compact", str(study)]) == 1
        assert path.name in capsys.readouterr().err
    assert {run_id for run_id, *_ in values(study)} == {OTHER}
    assert whole.exists()


def test_what_is_no_run_is_passed_over(study):
    (study / "runs" / "backup of g0123").mkdir(parents=True)
    (study / "runs" / ".DS_Store").write_text("")
    assert tables.main(["verify", str(study)]) == 0


def test_a_row_that_is_there_twice_is_found(study):
    (path,) = written(study, RUN, 1, losses(range(3), 1.0))
    path.with_name("1-0007.parquet").write_bytes(path.read_bytes())
    (problem,) = tables.verify(study)
    assert problem.what == f"3 rows of run {RUN} are there twice, among 2 parts"


def test_a_finished_run_without_rows_is_found(study):
    rundir.mark(study, MEASURED, "done")
    written(study, MEASURED, 1, [{"status": "done"}], table="runs")
    (problem,) = tables.verify(study)
    assert "marked done but has no rows" in problem.what
    assert problem.path.parts[-3:] == ("curves", "study=digits", f"run={MEASURED}")


def test_the_commands_refuse_a_folder_of_another_version_in_one_line(study, capsys):
    rundir.atomic_write(study, rundir.lock_file(study), {"version": 2})
    for command in ("verify", "compact"):
        assert tables.main([command, str(study)]) == 2
        assert capsys.readouterr().err.count("\n") == 1
    assert not rundir.compact_file(study, "runs").exists()


def test_a_damaged_plan_is_named(study):
    truncate(rundir.plan_file(study))
    with pytest.raises(ValueError, match=r"plan\.parquet: cannot be read .*plan the study again"):
        tables.plan(study, ["run_id"])


def test_some_rows_of_the_plan(study):
    assert tables.plan(study, ["run_id", "points"], [RUN]) == [{"run_id": RUN, "points": [10, 20]}]
    assert len(tables.plan(study)) == 2


@pytest.mark.parametrize("table", tables.TABLES)
def test_every_column_is_described(table):
    text = (ROOT / "results" / "README.md").read_text()
    section = text.split(f"## `{table}`")[1].split("\n## ")[0]
    for name in tables.TABLES[table]:
        assert f"| `{name}` |" in section, f"{table}.{name}"
