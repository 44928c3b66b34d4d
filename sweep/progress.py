"""How far is a stage? A bar on a terminal, a plain line now and then elsewhere."""

from __future__ import annotations

import sys
import time
from types import TracebackType
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.progress import Progress as Bar

PLAIN_S = 20.0  # between two plain lines


class Progress:
    """Shows done runs, running runs, and the time left at the rate of FLOPs since the start.

    ``total`` and ``done`` count runs, ``work`` is the planned FLOPs of those that are to do.
    """

    def __init__(self, title: str, total: int, done: int, work: float) -> None:
        self.title, self.total, self.work = title, total, max(work, 1.0)
        self.began = self.said = time.monotonic()
        self.first: float | None = None
        self.bar: Bar | None = None
        if sys.stdout.isatty():
            from rich.progress import BarColumn, TextColumn, TimeElapsedColumn
            from rich.progress import Progress as Bar

            columns = (
                TextColumn("{task.description}"),
                BarColumn(),
                TimeElapsedColumn(),
                TextColumn("{task.fields[left]}"),
            )
            self.bar = Bar(*columns)
            self.task = self.bar.add_task(self._text(done, 0, 0, 0), total=self.work, left="")

    def __enter__(self) -> Progress:
        if self.bar is not None:
            self.bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.bar is not None:
            self.bar.stop()

    def show(self, done: int, running: int, failed: int, worked: float, queued: int = 0) -> None:
        """``worked`` is the part of ``work`` that is behind, FLOPs of runs in progress included."""
        left = self._left(worked)
        if self.bar is not None:
            self.bar.update(
                self.task, description=self._text(done, running, failed, queued), completed=worked, left=left
            )
        elif time.monotonic() - self.said >= PLAIN_S:
            self.said = time.monotonic()
            line = self._text(done, running, failed, queued), f"{worked / self.work:.0%} of FLOPs", left
            print(", ".join(part for part in line if part), flush=True)

    def say(self, text: str) -> None:
        """One line that stays."""
        if self.bar is not None:
            self.bar.console.print(text, highlight=False, markup=False)
        else:
            print(text, flush=True)

    def _text(self, done: int, running: int, failed: int, queued: int) -> str:
        more = ((queued, "queued"), (failed, "failed"))
        also = "".join(f", {number} {state}" for number, state in more if number)
        return f"{self.title}: {done} of {self.total} done, {running} running{also}"

    def _left(self, worked: float) -> str:
        """Time left at the rate since work was first seen to be done (start-up and resumed work do not count)."""
        if self.first is None:
            self.first, self.began = worked, time.monotonic()
        rate = (worked - self.first) / max(time.monotonic() - self.began, 1e-9)
        if not rate:
            return ""
        minutes, seconds = divmod(round((self.work - worked) / rate), 60)
        return f"{minutes // 60}:{minutes % 60:02}:{seconds:02} left"
