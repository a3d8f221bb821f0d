"""What launches remember, and by what they tell calls apart."""

import threading

import pytest
import torch

from linfusion.kernels import launch as launching
from linfusion.kernels.backend import interpreted, without_triton
from linfusion.kernels.launch import Launch, Remembered, forget


@pytest.fixture
def remembered():
    made = []

    @Remembered
    def make(*arguments):
        made.append(arguments)
        return len(made)

    yield make, made
    Remembered.everything.remove(make)


def test_alike_is_made_once(remembered):
    make, made = remembered
    x = torch.zeros(2, 3)
    assert make(x, 1, "a", None) == make(torch.ones(2, 3), 1, "a", None) == 1
    assert len(made) == 1


@pytest.mark.parametrize(
    "other",
    [torch.zeros(3, 2), torch.zeros(3, 2).T, torch.zeros(2, 3).half(), torch.zeros(2, 3, device="meta"), 1.5, None],
    ids=["shape", "strides", "dtype", "device", "number", "none"],
)
def test_what_differs_is_made_anew(remembered, other):
    make, _ = remembered
    assert make(torch.zeros(2, 3)) == 1
    assert make(other) == 2
    assert make(torch.zeros(2, 3)) == 1


@pytest.mark.skipif(not torch.cuda.is_available(), reason="alignment counts on a GPU")
def test_alignment(remembered):
    make, _ = remembered
    x = torch.zeros(10, device="cuda")
    assert make(x[:4]) == make(x[4:8]) == 1
    assert make(x[1:5]) == 2


def test_switches_and_forgetting(remembered):
    make, _ = remembered
    assert make(1) == 1
    with without_triton():
        assert make(1) == 2
    with interpreted():
        assert make(1) == 3
    assert make(1) == 1
    forget()
    assert make(1) == 4


def test_none_and_errors_are_not_remembered():
    answers = iter([None, ValueError("no"), 3])

    def make():
        answer = next(answers)
        if isinstance(answer, Exception):
            raise answer
        return answer

    once = Remembered(make)
    assert once() is None
    with pytest.raises(ValueError, match="no"):
        once()
    assert once() == once() == 3
    Remembered.everything.remove(once)


def test_not_without_end(remembered, monkeypatch):
    make, _ = remembered
    monkeypatch.setattr(launching, "MOST", 3)
    for n in range(10):
        make(n)
    assert len(make.known) <= 3


class Kernel:
    """As Triton's: launched by grid and arguments, and so is what it compiles to, with constants in its order."""

    arg_names = ("X", "Y", "n", "B", "A")

    def __init__(self):
        self.first, self.later = [], []

    def __getitem__(self, grid):
        class Compiled:
            def __getitem__(_, again):
                return lambda *arguments: self.later.append((again, arguments))

        def run(*arguments, **settings):
            self.first.append((grid, arguments, settings))
            return Compiled()

        return run


def test_later_launches_go_to_the_compiled_kernel(monkeypatch):
    monkeypatch.setattr(launching, "_DIRECT", True, raising=False)
    kernel, x, y = Kernel(), torch.zeros(1), torch.ones(1)
    settings = {"A": 1, "B": 2, "num_warps": 4}
    run = Launch(kernel, (5, 1, 1), (7,), settings)
    run(x, y)
    run(y, x)
    assert kernel.first == [((5, 1, 1), (x, y, 7), settings)]
    assert kernel.later == [((5, 1, 1), (y, x, 7, 2, 1))]


def test_a_launch_serves_many_threads(monkeypatch):
    monkeypatch.setattr(launching, "_DIRECT", True, raising=False)
    kernel, x = Kernel(), torch.zeros(1)
    run, start = Launch(kernel, (1, 1, 1), (7,), {"A": 1, "B": 2}), threading.Barrier(8)

    def work():
        start.wait()
        for _ in range(50):
            run(x, x)

    threads = [threading.Thread(target=work) for _ in range(8)]
    [t.start() for t in threads]
    [t.join() for t in threads]
    assert len(kernel.first) + len(kernel.later) == 400
    assert all(arguments == (x, x, 7) for _, arguments, _ in kernel.first)
    assert all(arguments == (x, x, 7, 2, 1) for _, arguments in kernel.later)
