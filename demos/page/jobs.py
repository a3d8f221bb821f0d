"""One job at a time, visitors in turn: the queue behind the page. Knows neither gradio nor models."""

from __future__ import annotations

import logging
import threading
import time
from collections import OrderedDict, deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

log = logging.getLogger(__name__)


class Cancelled(Exception):
    """Raised inside a job's work, by `Job.report`, once it is to end."""


class Busy(ValueError):
    """The queue has no place left; the text says so to the visitor."""


@dataclass(eq=False)
class Job:
    """One visitor's request. `state` goes from waiting to running to done, failed or cancelled.

    Attributes:
        work: called with the job in the runner's thread; what it returns becomes `result`.
        done, total: of the work, in steps; `note` is what is being done, `seconds` how long it has been running.
        partial: what there is to see so far, of whatever kind `work` reports.
        version: grows with every change, so that a page knows whether to draw again.
        error: the reason of a failure in one line.
    """

    visitor: str
    work: Callable[[Job], Any]
    state: str = "waiting"
    done: int = 0
    total: int = 0
    note: str = ""
    partial: Any = None
    result: Any = None
    error: str = ""
    version: int = 0
    started: float = 0.0
    ended: float = 0.0
    stop: threading.Event = field(default_factory=threading.Event)

    @property
    def finished(self) -> bool:
        return self.state not in ("waiting", "running")

    @property
    def seconds(self) -> float:
        return (self.ended or time.monotonic()) - self.started if self.started else 0.0

    @property
    def seconds_left(self) -> float | None:
        """At the pace so far; None before there is one, and once all steps are done."""
        left = self.total - self.done
        return self.seconds / self.done * left if self.done and left > 0 else None

    def check(self) -> None:
        """Raise `Cancelled` if somebody asked for it."""
        if self.stop.is_set():
            raise Cancelled

    def report(self, done: int | None = None, note: str | None = None, partial: Any = None) -> None:
        """Tell how far the work is. Work that calls this often can be stopped soon."""
        self.check()
        self.done = self.done if done is None else done
        self.note = self.note if note is None else note
        self.partial = self.partial if partial is None else partial
        self.version += 1


class Runner:
    """Runs jobs in one thread of its own, taking turns among visitors, each visitor's jobs in order.

    Args:
        places: jobs that may wait, in all.
        each: jobs that one visitor may have, running or waiting.
    """

    def __init__(self, places: int = 64, each: int = 2) -> None:
        self.places, self.each = places, each
        self.waiting: OrderedDict[str, deque[Job]] = OrderedDict()
        self.running: Job | None = None
        self.change = threading.Condition()
        self.open = True
        self.thread = threading.Thread(target=self._run, name="linfusion-jobs", daemon=True)
        self.thread.start()

    def submit(self, visitor: str, work: Callable[[Job], Any], total: int = 0) -> Job:
        """Queue `work` for `visitor`.

        Raises:
            Busy: too many jobs wait, or this visitor has as many as one may have.
        """
        with self.change:
            if not self.open:
                raise Busy("The page is closing.")
            if sum(map(len, self.waiting.values())) >= self.places:
                raise Busy(f"{self.places} pictures are waiting already. Please try again in a minute.")
            own = len(self.waiting.get(visitor, ())) + (self.running is not None and self.running.visitor == visitor)
            if own >= self.each:
                raise Busy(f"You have {own} jobs here already. Wait for one, or cancel it.")
            job = Job(visitor, work, total=total)
            self.waiting.setdefault(visitor, deque()).append(job)
            self.change.notify_all()
            return job

    def ahead(self, job: Job) -> int:
        """How many jobs come before a waiting one, the running one included."""
        with self.change:
            own = self.waiting.get(job.visitor, deque())
            if job not in own:
                return 0
            turn, visitors = own.index(job), list(self.waiting)
            earlier = visitors[: visitors.index(job.visitor)]
            # in the rounds before its own everyone has a turn, in its own round only who stands before its visitor
            before = sum(min(len(jobs), turn) for jobs in self.waiting.values())
            before += sum(len(self.waiting[v]) > turn for v in earlier)
            return before + (self.running is not None)

    def cancel(self, job: Job) -> None:
        """End a job: at once where it waits, at its next report where it runs. Does nothing to a finished one."""
        with self.change:
            job.stop.set()
            own = self.waiting.get(job.visitor, deque())
            if job in own:
                own.remove(job)
                if not own:
                    del self.waiting[job.visitor]
                self._end(job, "cancelled")

    def leave(self, visitor: str) -> None:
        """End all jobs of a visitor who has gone."""
        with self.change:
            jobs = list(self.waiting.get(visitor, ()))
            if self.running is not None and self.running.visitor == visitor:
                jobs.append(self.running)
            for job in jobs:
                self.cancel(job)

    def close(self) -> None:
        """End everything, and wait for the thread."""
        with self.change:
            self.open = False
            for visitor in [*self.waiting, *([self.running.visitor] if self.running else [])]:
                self.leave(visitor)
            self.change.notify_all()
        self.thread.join()

    def _next(self) -> Job | None:
        """Wait for a job; its visitor goes to the end of the line."""
        with self.change:
            while self.open and not self.waiting:
                self.change.wait()
            if not self.waiting:
                return None
            visitor, jobs = self.waiting.popitem(last=False)
            job = self.running = jobs.popleft()
            if jobs:
                self.waiting[visitor] = jobs
            job.state, job.started = "running", time.monotonic()
            job.version += 1
            return job

    def _run(self) -> None:
        while (job := self._next()) is not None:
            state = "done"
            try:
                job.check()
                job.result = job.work(job)
            except Cancelled:
                state = "cancelled"
            except BaseException as error:  # whatever it is, the next visitor's job has to run
                state, job.error = "failed", reason(error)
            with self.change:
                self.running = None
                self._end(job, state)

    def _end(self, job: Job, state: str) -> None:
        job.ended = time.monotonic()
        job.partial, job.state = None, state
        job.version += 1


def reason(error: BaseException) -> str:
    """One line for the visitor. Only errors that are meant to be read are shown; others go to the log in full."""
    if isinstance(error, (ValueError, NotImplementedError)):
        return " ".join(str(error).split()) or type(error).__name__
    if isinstance(error, MemoryError) or "out of memory" in str(error).lower():
        return "Out of memory: try a smaller size."
    log.exception("a job failed", exc_info=error)
    return f"It failed with {type(error).__name__}; the server's log has the details."
