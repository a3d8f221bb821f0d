"""The queue: one at a time, in turn, bounded, and stopped when asked."""

import threading
import time
from types import SimpleNamespace

import pytest

from linfusion.demos.page import jobs
from linfusion.demos.page.jobs import Busy, Runner


@pytest.fixture
def runner():
    runner = Runner(places=6, each=3)
    yield runner
    runner.close()


class Gate:
    """Work that goes on step by step, as it is let."""

    def __init__(self, order=None, name=""):
        self.order, self.name = order, name
        self.started, self.go = threading.Event(), threading.Semaphore(0)

    def __call__(self, job):
        self.started.set()
        if self.order is not None:
            self.order.append(self.name)
        for step in range(1000):
            while not self.go.acquire(timeout=0.01):
                job.check()
            job.report(step + 1, f"step {step + 1}", partial=step)
        return "drawn"


def until(true, seconds=10):
    for _ in range(int(seconds * 200)):
        if true():
            return
        time.sleep(0.005)
    raise AssertionError("it did not come")


def wait(job):
    until(lambda: job.finished)
    return job


def test_a_job(runner):
    job = wait(runner.submit("a", lambda job: job.report(2, "half") or 7, total=4))
    assert (job.state, job.result, job.done, job.total, job.note, job.error) == ("done", 7, 2, 4, "half", "")
    assert 0 <= job.seconds < 5


def test_visitors_take_turns(runner):
    """a came first with three; b and c wait for one of a's, not for all."""
    order, gate = [], Gate()
    first = runner.submit("x", gate)
    assert gate.started.wait(5)
    names = ["a1", "a2", "a3", "b1", "c1", "b2"]
    asked = {n: runner.submit(n[0], lambda job, n=n: order.append(n)) for n in names}
    wanted = ["a1", "b1", "c1", "a2", "b2", "a3"]
    assert [runner.ahead(asked[n]) for n in wanted] == [1, 2, 3, 4, 5, 6] and runner.ahead(first) == 0
    runner.cancel(first)
    gate.go.release()
    for job in asked.values():
        wait(job)
    assert order == wanted


def test_bounds(runner):
    gate = Gate()
    runner.submit("a", gate)
    assert gate.started.wait(5)
    for _ in range(2):
        runner.submit("a", gate)
    with pytest.raises(Busy, match="You have 3 jobs here already"):
        runner.submit("a", gate)
    for visitor in "bcde":
        runner.submit(visitor, gate)
    with pytest.raises(Busy, match="6 pictures are waiting already"):
        runner.submit("f", gate)
    runner.leave("a")
    until(lambda: runner.running is not None and runner.running.visitor != "a")
    runner.submit("f", gate)


def test_cancel(runner):
    """A running job ends at its next report, and what waits behind it comes next; a waiting one ends at once."""
    gate, second = Gate(), Gate()
    running = runner.submit("a", gate)
    waiting = runner.submit("a", Gate())
    last = runner.submit("b", second)
    assert gate.started.wait(5)
    gate.go.release()
    runner.cancel(waiting)
    assert waiting.state == "cancelled" and runner.ahead(last) == 1
    until(lambda: running.done == 1)
    runner.cancel(running)
    assert running.state == "running"
    gate.go.release()
    assert wait(running).state == "cancelled" and running.done == 1 and running.partial is None
    assert second.started.wait(5) and last.state == "running" and runner.ahead(last) == 0
    runner.cancel(running)
    assert running.state == "cancelled"
    runner.cancel(last)
    second.go.release()


@pytest.mark.parametrize(
    ("error", "says"),
    [
        (ValueError("size must be\n  smaller"), "size must be smaller"),
        (NotImplementedError(""), "NotImplementedError"),
        (RuntimeError("CUDA out of memory. Tried"), "Out of memory: try a smaller size."),
        (KeyError("/secret/path"), "It failed with KeyError; the server's log has the details."),
    ],
)
def test_a_failure_is_one_line_and_frees_the_queue(runner, error, says):
    def fail(job):
        raise error

    job = wait(runner.submit("a", fail))
    assert (job.state, job.error) == ("failed", says)
    assert wait(runner.submit("a", lambda job: "next")).result == "next"


def test_closing_ends_everything():
    runner, gate = Runner(), Gate()
    running, waiting = runner.submit("a", gate), runner.submit("b", gate)
    assert gate.started.wait(5)
    gate.go.release()
    runner.close()
    assert {running.state, waiting.state} == {"cancelled"}
    with pytest.raises(Busy, match="closing"):
        runner.submit("a", gate)


def test_time_left(runner, monkeypatch):
    clock = SimpleNamespace(now=1.0)
    monkeypatch.setattr(jobs, "time", SimpleNamespace(monotonic=lambda: clock.now))
    seen = []

    def work(job):
        seen.append(job.seconds_left)
        clock.now += 6
        job.report(3)
        seen.append(job.seconds_left)

    wait(runner.submit("a", work, total=10))
    assert seen == [None, 14.0]
