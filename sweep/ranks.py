"""How do several processes train one run together? Rank 0 leads: it claims runs, and calls the others to each attempt.

A call is a file in the folder of this start of the job: which run, under which attempt, and where to meet. The others
train along, write nothing, and wait for the next one. A process of an older attempt meets nobody: the name of the
meeting holds run and attempt, and the port is a new one. What goes wrong on another rank is told to rank 0 in a file,
as rank 0 may sit in an exchange that never ends.
"""

from __future__ import annotations

import json
import os
import sys
import threading
import time
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from models.config import Runtime
from sweep import rundir, worker
from sweep.attempt import Attempt, Ended, Stop

TICK_S = 0.1
MEET_S = 300.0  # for all ranks to come; imports and data are behind them by then
GRACE_S = 10.0  # for rank 0 to notice by itself that another one is gone


class Ranks:
    """The processes of one job, seen from one of them; ``scratch`` is a folder that all see, of this start of the job.

    ``stop`` makes what a process at work looks at. ``address`` is where rank 0 can be reached.
    """

    def __init__(
        self, study: Path, scratch: Path, rank: int, size: int, local_rank: int, stop: Callable[[], Stop], address: str
    ) -> None:
        self.study, self.scratch, self.stop, self.address = study, scratch, stop, address
        self.rank, self.size, self.local_rank = rank, size, local_rank
        self.number = 0  # of the next call
        self.current: Attempt | None = None

    def _call(self, number: int) -> Path:
        return self.scratch / f"call-{number:04d}.json"

    def _errors(self) -> list[Path]:
        return sorted(self.scratch.glob("error-*.json"))

    # --- rank 0 ---

    def lead(
        self, pack: Sequence[Sequence[str]], notes: Path | None, tick: Callable[[], None], give_up: Callable[[], int]
    ) -> bool:
        """Work off runs with the others; False when one is left to another job.

        ``tick`` is called now and then beside the work. ``give_up`` ends the job where rank 0 cannot go on; it returns
        the exit code.
        """
        over = threading.Event()

        def mind() -> None:
            seen: float | None = None
            while not over.wait(TICK_S):
                tick()
                if self.current is None or not self._errors():
                    continue
                seen = seen or time.monotonic()
                if time.monotonic() - seen > GRACE_S:  # it sits in an exchange with one that is gone
                    ended = self.blame() or Ended("failed", "comms: another rank failed")
                    _, fields = self.current.retry(ended)
                    self.current.end(ended, (self._told() or {}).get("trace"), **fields)
                    os._exit(give_up())

        minder = threading.Thread(target=mind, daemon=True)
        minder.start()
        try:
            return worker.serve(self.study, pack, self.stop(), notes=notes, team=self)
        finally:
            over.set()
            minder.join()
            rundir.atomic_write(self.study, self._call(self.number), {"over": True}, sync=False)

    def gather(self, attempt: Attempt) -> None:
        """Let the others train this attempt too; returns when all have met."""
        from models import training

        self.current = attempt
        store, port = training.meet(self.address, self.size, MEET_S)
        call = {
            "run_id": attempt.run_id,
            "attempt": attempt.claim.attempt,
            "runtime": attempt.runtime.model_dump(mode="json"),
            "address": self.address,
            "port": port,
            "leader": rundir.myself(),
        }
        rundir.atomic_write(self.study, self._call(self.number), call, sync=False)
        self.number += 1
        training.join(attempt.runtime, store, self._name(call), 0, self.size, self.local_rank)

    def dismiss(self) -> None:
        """Let the others wait for the next one."""
        from models import training

        self.current = None
        training.leave()

    def blame(self) -> Ended | None:
        """How another rank failed, if one did: all that rank 0 sees of it is an exchange that breaks off."""
        deadline = time.monotonic() + GRACE_S / 2  # connections close a moment before the reason is written
        while not self._errors() and time.monotonic() < deadline:
            time.sleep(TICK_S)
        told = self._told()
        return Ended("failed", f"{told['reason']} (rank {told['rank']})") if told else None

    def _told(self) -> dict[str, Any] | None:
        """What the rank says that failed first; the others, as rank 0, only miss it."""
        told: list[dict[str, Any]] = [json.loads(path.read_text()) for path in self._errors()]
        return min(told, key=lambda error: str(error["reason"]).startswith("comms:"), default=None)

    @staticmethod
    def _name(call: dict[str, Any]) -> str:
        return f"{call['run_id']}/{call['attempt']}"

    # --- the others ---

    def follow(self) -> int:
        """Train along until rank 0 says that it is over, or is gone; the exit code."""
        leader: dict[str, Any] | None = None
        while True:
            while not self._call(self.number).exists():
                if leader and rundir.alive(leader["host"], leader["pid"], leader["born"]) is False:
                    return 1
                time.sleep(TICK_S)
            call = json.loads(self._call(self.number).read_text())
            self.number += 1
            if call.get("over"):
                return 0
            leader = call["leader"]
            try:
                self._along(call)
            except Exception as error:
                trace = traceback.format_exc()
                print(trace, file=sys.stderr)
                told = {"reason": worker.failed(error).reason, "trace": trace, "rank": self.rank}
                rundir.atomic_write(self.study, self.scratch / f"error-{self.rank}.json", told, sync=False)
                time.sleep(3 * GRACE_S)  # rank 0 ends the job; an exit code of ours would do so before it has written
                return 1

    def _along(self, call: dict[str, Any]) -> None:
        from models import training

        run_id = call["run_id"]
        claims = rundir.run_folder(self.study, run_id) / "claim"
        claim = rundir.Claim(self.study, claims, call["attempt"], run_id)  # rank 0's; it is looked at, never written to
        config, runtime = rundir.config(self.study, run_id), Runtime(**call["runtime"])
        attempt = Attempt(self.study, config, claim, self.stop(), runtime)
        worker.limit_threads(runtime)
        checkpoints = worker.checkpoints_of(attempt)  # before the meeting: it clears up what an older attempt left
        store, _ = training.meet(call["address"], self.size, MEET_S, call["port"])
        training.join(runtime, store, self._name(call), self.rank, self.size, self.local_rank)
        try:
            worker.fit(attempt, checkpoints, lambda *_: None)
        finally:
            training.leave()
