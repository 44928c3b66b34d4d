"""Do the processes of one run on several devices start, stop, fail and go on together, on a real Slurm?"""

from __future__ import annotations

import json
import threading
from pathlib import Path

import pytest

from sweep import ranks, rundir, tables
from sweep.attempt import Stop
from tests.faults import Launcher, element, events, planned, preempts, rows, runs, trains


def told(folder: Path, rank: int, reason: str) -> None:
    (folder / f"error-{rank}.json").write_text(json.dumps({"reason": reason, "trace": "Traceback ...", "rank": rank}))


def test_the_rank_that_failed_is_blamed_and_not_those_that_miss_it(tmp_path):
    held = ranks.Ranks(tmp_path, tmp_path, rank=0, size=4, local_rank=0, stop=Stop, address="127.0.0.1")
    told(tmp_path, 1, "comms: RuntimeError: Connection closed by peer")
    told(tmp_path, 2, "oom_gpu: OutOfMemoryError: out of memory")
    told(tmp_path, 3, "comms: RuntimeError: Connection closed by peer")
    assert held.blame() == ("failed", "oom_gpu: OutOfMemoryError: out of memory (rank 2)")


def test_a_reason_that_is_written_a_moment_late_is_waited_for_and_one_that_never_comes_is_not(tmp_path, monkeypatch):
    monkeypatch.setattr(ranks, "GRACE_S", 2.0)
    held = ranks.Ranks(tmp_path, tmp_path, rank=0, size=2, local_rank=0, stop=Stop, address="127.0.0.1")
    assert held.blame() is None
    late = threading.Timer(0.3, told, (tmp_path, 1, "node: RuntimeError: uncorrectable ECC error"))
    late.start()
    assert held.blame() == ("failed", "node: RuntimeError: uncorrectable ECC error (rank 1)")


@pytest.mark.timeout(600)
@pytest.mark.parametrize("shard", ["false", "true"])
def test_a_run_on_two_devices_is_two_tasks_that_stop_and_go_on_together(stormy, tmp_path, shard):
    study = planned(tmp_path, points="[500]", run=f"devices: 2, shard: {shard}")
    (run,) = runs(study)
    launcher = Launcher(stormy, study)
    attempt = trains(study, run)
    assert stormy.call("squeue", "-h", "-o", "%C").split() == ["2"]
    stormy.call("scontrol", "requeue", element(study, run))
    attempt = trains(study, run, attempt)
    preempts(stormy, study, run)
    code, output = launcher.ended()
    assert code == 0, output
    *before, last = [row["status"] for row in rows(study, "runs")]  # with the operator's, who is as good as a warning
    assert (set(before), last) == ({"interrupted"}, "done")
    assert not tables.verify(study)


@pytest.mark.timeout(600)
def test_a_rank_that_does_not_fit_its_device_is_no_hang_and_has_its_retry(stormy, tmp_path):
    study = planned(tmp_path, run="devices: 2")
    (run,) = runs(study)
    patched = tmp_path / "patched"
    patched.mkdir()
    text = """
import os
from models import training
trained = training.train
def train(*given, runtime, **more):
    import torch
    if os.environ.get("SLURM_PROCID") == "1" and (runtime.micro_batch or 4) > 2:
        raise torch.OutOfMemoryError("out of memory")
    return trained(*given, runtime=runtime, **more)
training.train = train
"""
    (patched / "sitecustomize.py").write_text(text)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(patched))
        launcher = Launcher(stormy, study)
        code, output = launcher.ended()
    assert code == 0, output
    assert rundir.status(study, run)["micro_batch"] == 2
    (retry,) = (event for event in events(study, run) if event["event"] == "retry")
    assert retry["reason"] == "oom_gpu: OutOfMemoryError: out of memory (rank 1)"
