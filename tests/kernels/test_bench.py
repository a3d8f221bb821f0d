"""The measurements' own machinery: what counts as right, what is written, what is drawn. No GPU, nothing timed."""

import sys
from dataclasses import replace

import pytest
import torch

import linfusion as lf
from linfusion.cli import main
from linfusion.kernels import backend, reference
from linfusion.kernels.bench import checks, command, ops, pages, peers, plots, report, runner, table, timing, window
from linfusion.kernels.bench.models import Model, random_model
from linfusion.kernels.bench.op import DIRECTIONS, WHOLE, Case, Missing, Provider
from linfusion.kernels.bench.table import Row, Shape

from ..models import HOSTS, TINY

CPU = torch.device("cpu")
CASES = [case for op in ops.KERNELS.values() for case in op.cases]


def row(op="linear", provider="linfusion", direction="forward", shape="B1-H2-S64-D16", ms=1.0, **changes):
    values = Row(
        op,
        provider,
        direction,
        shape,
        "bfloat16",
        ms,
        ms * 0.9,
        ms * 1.1,
        12.5,
        "a, GPU",
        "2",
        "3",
        "abc",
        "2026-01-01",
    )
    return values._replace(**changes)


# the table


def test_columns():
    names = "op, provider, direction, shape, dtype, ms_p50, ms_p20, ms_p80, peak_mib, gpu, torch, triton, git, date"
    assert ", ".join(table.COLUMNS) == names


def test_rows_come_back(tmp_path):
    file, rows = tmp_path / "r.csv", [row(), row(direction="backward", ms=0.125)]
    for r in rows:
        table.append(file, r)
    assert table.read(file) == rows
    assert file.read_text().splitlines()[0] == ",".join(table.COLUMNS)
    assert len(file.read_text().splitlines()) == 3


def test_other_files_are_left_alone(tmp_path):
    file = tmp_path / "r.csv"
    file.write_text("a,b\n1,2\n")
    for use in (lambda: table.append(file, row()), lambda: table.read(file)):
        with pytest.raises(ValueError, match="has the columns a, b"):
            use()
    assert file.read_text() == "a,b\n1,2\n"
    file.unlink()
    table.append(file, row())
    file.write_text(file.read_text().replace(",1,0.9,", ",fast,0.9,"))
    with pytest.raises(ValueError, match="line 2: .*fast"):
        table.read(file)


@pytest.mark.parametrize(
    "text", ["B1-H24-S16896-D128-g128x128-t512-r16", "B2-H10-S64-D40", "B1-H1-S4-D8-k0.05", "B1-H2-S3-D4-c5-across"]
)
def test_shapes_come_back(text):
    assert str(Shape.parse(text)) == text


def test_shapes():
    shape = Shape.parse("B1-H24-S16896-D128-g128x64-k0.05-across")
    assert shape[:4] == (1, 24, 16896, 128) and shape.elements == 24 * 16896 * 128
    assert (shape.get("g"), shape.get("k"), shape.get("across"), shape.get("t", 7)) == ((128, 64), 0.05, True, 7)
    with pytest.raises(ValueError, match="no shape such as"):
        Shape.parse("1GiB")
    for case in CASES:
        assert Shape.parse(str(case.shape)) == case.shape


def test_quantiles():
    assert timing.quantiles([5, 1, 2, 3, 4, 9, 7, 8, 6, 10.0]) == (5.5, 3, 8)
    assert timing.quantiles([2.0]) == (2, 2, 2)


# correctness comes first


NOT_HERE = ("torch.compile", "fbi-la", "official-", *window.FLEX)  # need a GPU, or take long


def little(case):
    """A few tokens of a case, in fp32, which the CPU computes as well as any."""
    return replace(ops.KERNELS[case.op].cut(case, 40), dtype=torch.float32, directions=DIRECTIONS)


@pytest.mark.parametrize("case", CASES, ids=lambda c: f"{c.op}-{c.shape}")
def test_everybody_computes_the_op(case):
    """Ours, the formula it is held to, and the peers in their own layouts: outputs and gradients in float64's eyes."""
    op, case = ops.KERNELS[case.op], little(case)
    inputs = op.inputs(case, CPU)
    upstream = op.upstream(case, inputs)
    findings, _ = checks.compare(op, case, inputs, upstream, [WHOLE, *op.views(case)])
    assert findings and all(f.passed for f in findings), findings
    leaves = sum(x.requires_grad for x in inputs.values())
    assert sum(" of " not in f.what for f in findings) == len(op.outputs(case.shape)) + leaves

    want = checks.in_float64(op, case, op.oracle(case), inputs, upstream).results(True)
    for name, make in op.peers(case).items():
        providers = [] if name.startswith(NOT_HERE) else make()
        for provider in (p for p in providers if not p.other):
            got = checks.Bound(op, case, provider, inputs, upstream).results(True)
            assert got.keys() == want.keys()
            for tensor, exact in want.items():
                assert got[tensor].shape == exact.shape
                assert checks.relative_error(got[tensor], exact) < 1e-5, (name, tensor)


@pytest.mark.parametrize("tile", [None, (8, 16)], ids=str)
@pytest.mark.parametrize("words", [(), ("box",)], ids=str)
def test_flex_attention_has_the_window(words, tile):
    """Forward alone: it has no gradients on a CPU."""
    op = ops.KERNELS["window"]
    case = little(window._case(2048, 8, *words))
    inputs = {n: x.detach() for n, x in op.inputs(case, CPU).items()}
    want = op.oracle(case)(**inputs)
    provider = window.flex(case.shape, tile, "cpu")
    got = checks.Bound(op, case, provider, inputs, {"out": want}).results(gradients=False)
    assert checks.relative_error(got["out"], want.double()) < 1e-5
    mask = reference.window_mask(
        case.shape.get("g"), (case.shape.get("r"),) * 2, shape=words[0] if words else "ellipsoid"
    )
    text = case.shape.get("t")
    assert window.pairs(case.shape) == mask.sum() + text * (2 * len(mask) + text)


def test_a_view_sees_the_last_of_the_memory():
    """Full-size checks look at parts; the last token of the last head of the last sample is among them."""
    for case in map(little, CASES):
        op = ops.KERNELS[case.op]
        inputs = op.inputs(case, CPU)
        out = torch.zeros_like(op.upstream(case, inputs)[op.outputs(case.shape)[0]])
        out[-1, -1, -1, -1] = 1
        name = op.outputs(case.shape)[0]
        assert any(view.take(name, out).any() for view in op.views(case)), case


@pytest.fixture
def session(tmp_path, monkeypatch):
    """One that writes to a file, on a machine whose clock always says one millisecond."""
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "no GPU")
    monkeypatch.setattr(timing, "each", lambda fn: (fn(), (1.0, 1.0, 1.0))[1])
    monkeypatch.setattr(timing, "graph", lambda ready: (ready()(), (0.5, 0.5, 0.5))[1])
    monkeypatch.setattr(timing, "peak_mib", lambda call, held: 1.0)
    lines = []
    made = runner.Session(CPU, lines.append, tmp_path / "r.csv", git="abc", copy_gbs=3000.0)
    made.lines = lines
    return made


@pytest.fixture
def linear(monkeypatch):
    """An op with one small case, without the peers that compile."""
    op = type(ops.KERNELS["linear"])()
    eager = op.peers
    op.peers = lambda case: {"torch": eager(case)["torch"]}
    op.case = Case("linear", Shape(2, 3, 40, 16), torch.float32)
    return op


def written(session):
    return [(r.provider, r.direction) for r in table.read(session.file)] if session.file.exists() else []


def test_a_right_kernel_is_written(session, linear):
    runner.measure(linear, linear.case, session)
    both = [(p, d) for p in ("linfusion", "torch") for d in ("forward", "backward")]
    assert written(session) == both and not session.refused
    assert table.read(session.file)[0]._replace(date="") == session.rows[0]._replace(date="")
    assert any("1.00 x torch" in line for line in session.lines)


def test_a_peer_with_other_maths(session, linear):
    """It may leave inputs alone, and nobody says how far off it is."""
    linear.peers = lambda case: {"exact": lambda: [Provider(lambda q, k, v: 2 * q, other=True)]}
    runner.measure(linear, linear.case, session)
    assert [(p, d) for p, d in written(session) if p == "exact"] == [("exact", "forward"), ("exact", "backward")]
    assert not any("exact" in line and "error" in line for line in session.lines)
    assert any("linfusion" in line and "error" in line for line in session.lines)


def shifted(out, by):
    return out + by


WRONG = {
    "an output is off": lambda q, k, v, right: right(q, k, v) * 1.001,
    "NaN": lambda q, k, v, right: right(q, k, v) * float("nan"),
    "one row of one head": lambda q, k, v, right: right(q, k, v).index_fill(1, torch.tensor([39]), 0.0),
    "a gradient is off": lambda q, k, v, right: right(q, k + (k.detach() - k) * 0.01, v),
    "it raises": lambda q, k, v, right: 1 / 0,
}


@pytest.mark.parametrize("wrong", WRONG)
def test_a_wrong_kernel_is_not_written(session, linear, wrong):
    right = linear.ours(linear.case).call
    linear.ours = lambda case: Provider(lambda q, k, v: WRONG[wrong](q, k, v, right))
    runner.measure(linear, linear.case, session)
    assert written(session) == [("torch", "forward"), ("torch", "backward")]
    assert session.refused and session.lines[0].startswith("REFUSED linear B2-H3-S40-D16: ")


def test_wrong_at_full_size_alone_is_not_written(session, linear):
    """Such as an index that overflows: the check on a cut cannot see it."""
    right, case = linear.ours(linear.case).call, replace(linear.case, shape=Shape(2, 3, 1200, 16))

    def late(q, k, v):
        out = right(q, k, v)
        return out if q.shape[1] < 1200 else out.index_fill(1, torch.tensor([1199]), 0.0)

    linear.ours = lambda case: Provider(late)
    runner.measure(linear, case, session)
    assert [p for p, _ in written(session)] == ["torch", "torch"]
    assert "head 2 of sample 1" in session.lines[0]


def test_a_peer_that_fails_costs_one_line(session, linear):
    def missing():
        raise Missing("get it there")

    def broken(q, k, v):
        raise RuntimeError("no such\nkernel")

    linear.peers = lambda case: {"absent": missing, "broken": lambda: [Provider(broken)]}
    runner.measure(linear, linear.case, session)
    assert written(session) == [("linfusion", "forward"), ("linfusion", "backward")] and not session.refused
    assert sum("absent left out, get it there" in line for line in session.lines) == 1
    assert sum("broken failed, RuntimeError: no such kernel" in line for line in session.lines) == 2


def test_small_cases_are_timed_in_three_ways(session, linear, monkeypatch):
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    session.directions = ("forward",)
    runner.measure(linear, replace(linear.case, small=True), session)
    names = [p + suffix for p in ("linfusion", "torch") for suffix in ("", "+graph", "+loop")]
    assert [p for p, _ in written(session)] == names
    found = list(report.compare(table.read(session.file)))
    assert [(c.ours.provider, *c.peers) for c in found] == [
        ("linfusion", "torch"), ("linfusion+graph", "torch+graph"), ("linfusion+loop", "torch+loop")
    ]  # fmt: skip


def test_the_fastest_layout_counts(session, linear, monkeypatch):
    taken = iter([3.0, 2.0])
    monkeypatch.setattr(timing, "each", lambda fn: (next(taken),) * 3)
    session.providers, session.directions = frozenset({"torch"}), ("forward",)
    linear.peers = lambda case: {"torch": lambda: [linear.formula(case)] * 2}
    runner.measure(linear, linear.case, session)
    assert [(r.provider, r.ms_p50) for r in session.rows] == [("torch", 2.0)]


def test_memory_is_counted_once():
    x = torch.zeros(4, 5)
    assert timing.storage_bytes([x, x.T, x[1:], torch.zeros(3, dtype=torch.bfloat16)]) == 80 + 6


def test_published_kernels_are_left_out_where_absent(monkeypatch, tmp_path):
    monkeypatch.setenv("PEERS", str(tmp_path))
    with pytest.raises(Missing, match="no absent_la in"):
        peers._published("absent_la.ops", "linear_attention")
    (tmp_path / "absent_la.py").write_text("def linear_attention(q): return q")
    assert peers._published("absent_la", "linear_attention")(3) == 3
    assert str(tmp_path) not in sys.path


# whole models


class TinyFlux(Model):
    name, stock, cases = "tiny", ("sdpa", None), ()

    def build(self, device, few=False):
        return random_model(type(TINY["flux"].build()), device, **TINY["flux"].build().config)

    def inputs(self, px, device):
        tensors = TINY["flux"].inputs(6, 9)
        # a thousandfold of these is a number in bf16
        tensors |= {"timestep": torch.tensor([0.5, 0.25]), "guidance": torch.tensor([4.0, 2.0])}
        return {n: x.bfloat16() if torch.is_tensor(x) and x.is_floating_point() else x for n, x in tensors.items()}

    def mechanisms(self):
        return {"softmax": lf.Softmax(), "linfusion": lf.LinFusion(), "lit": lf.LiT()}


@pytest.mark.parametrize("mechanism", ["softmax", "linfusion", "lit"])
def test_models_are_checked(mechanism, session):
    model = TinyFlux()
    assert model._right(mechanism, model.mechanisms()[mechanism], session)
    error, allowed = model.check(model.mechanisms()[mechanism], CPU)
    assert 0 < error < allowed < 0.1


def test_a_model_with_a_wrong_kernel_is_refused(session, monkeypatch):
    from linfusion.mechanisms import joint

    right = joint.linear_attention
    monkeypatch.setattr(joint, "linear_attention", lambda *a, **k: right(*a, **k) * (1.5 if backend._enabled else 1.0))
    assert not TinyFlux()._right("lit", lf.LiT(), session)
    assert session.refused == ["tiny lit"]


# plots


@pytest.fixture
def made_up(tmp_path):
    """A gibibyte copied in a millisecond: 2147 GB/s."""
    file = tmp_path / "r.csv"
    table.append(file, row("ceiling", "copy", shape="1GiB", dtype="uint8"))
    for provider, slow in (("linfusion", 1), ("torch", 4)):
        for tokens in (1024, 2048):
            for direction in ("forward", "backward"):
                ms = slow * tokens / 1000
                table.append(file, row(provider=provider, direction=direction, shape=f"B1-H2-S{tokens}-D64", ms=ms))
    table.append(file, row(provider="linfusion+graph", shape="B1-H2-S1024-D64", ms=0.5))
    table.append(file, row("model-flux", "sdpa-cudnn", shape="B1-H24-S4608-D128-px1024", ms=190))
    return file


def test_series_and_shares(made_up):
    rows = [r for r in table.read(made_up) if r.op == "linear" and r.provider != "linfusion+graph"]
    assert plots.series(rows, "forward") == {
        ("linfusion", "B1-H2-D64"): [(1024, 1.024), (2048, 2.048)],
        ("torch", "B1-H2-D64"): [(1024, 4.096), (2048, 8.192)],
    }
    bandwidth = plots.copy_bandwidth(table.read(made_up))
    assert bandwidth == pytest.approx(2 * 2**30 / 1e6)
    share = {(where, who): s for where, who, s in plots.shares(rows, bandwidth)}
    floor = 4 * 2 * 1024 * 64 * 2 / bandwidth / 1e6  # four passes over [1, 1024, 2, 64] in bf16
    assert share["forward B1-H2-S1024-D64", "linfusion"] == pytest.approx(floor / 1.024)
    assert share["backward B1-H2-S1024-D64", "torch"] == pytest.approx(7 / 4 * floor / 4.096)


def test_latest_row_counts():
    rows = [row(ms=3), row(ms=2, provider="torch"), row(ms=1)]
    assert [(r.provider, r.ms_p50) for r in report.latest(rows)] == [("linfusion", 1), ("torch", 2)]


def test_plots_are_drawn(made_up, tmp_path):
    pytest.importorskip("matplotlib")
    drawn = plots.draw(made_up, tmp_path / "docs")
    assert [p.name for p in drawn] == ["bench-linear.png", "bench-linear-floor.png", "bench-model-flux.png"]
    assert all(p.read_bytes().startswith(b"\x89PNG") and p.stat().st_size > 5000 for p in drawn)


def test_pages_are_filled(made_up, tmp_path):
    """Between the marks alone, as often as one likes."""
    page, other = tmp_path / "linear.md", tmp_path / "other.md"
    marks = ("<!-- rows of {}, made by linfusion bench --plots -->", "<!-- end -->\n")
    page.write_text(
        "before\n" + "\nbetween\n".join(f"{marks[0].format(op)}\nold\n{marks[1]}" for op in ("linear", "lit"))
    )
    other.write_text("old\n")
    for _ in range(2):
        assert pages.fill(made_up, tmp_path) == [page]
    first, second = page.read_text().split("\nbetween\n")
    rows = first.splitlines()[2:-1]
    assert first.startswith("before\n<!-- rows of linear") and second.splitlines()[1:-1] == ["Not measured yet."]
    assert rows[0].startswith("| shape | direction | ms |") and "old" not in first + second
    ours = [r for r in report.latest(table.read(made_up)) if r.op == "linear" and r.provider == "linfusion"]
    assert len(rows) - 2 == len(ours) > 0 and f"| {ours[0].shape} | {ours[0].direction} |" in rows[2]
    assert other.read_text() == "old\n"


# the command


@pytest.fixture
def say(capsys):
    def call(*arguments):
        code = main(["bench", *map(str, arguments)])
        out, err = capsys.readouterr()
        return code, out, err

    return call


def test_plots_without_matplotlib(made_up, tmp_path, monkeypatch, say):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    code, _, err = say("--csv", made_up, "--plots", tmp_path)
    assert code == 2 and err.strip() == 'linfusion: error: Plots need matplotlib: pip install "linfusion[bench]".'


def test_no_gpu_is_one_line(monkeypatch, say, tmp_path):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    code, out, err = say("--csv", tmp_path / "r.csv")
    assert code == 2 and not out and len(err.splitlines()) == 1 and "needs a CUDA GPU" in err
    assert not (tmp_path / "r.csv").exists()


def test_list(say):
    code, out, _ = say("--list")
    assert code == 0 and all(name in out for name in ops.OPS) and "B1-H10-S1048576-D64" in out
    code, out, _ = say("--list", "--op", "linear", "--shape", "D40", "--shape", "S1024-")
    assert code == 0 and "S16384-D40" in out and "S1024-D64" in out and "D128" not in out and "prologue" not in out


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--op", "nope"), "--op nope is unknown; there are linear, "),
        (("--op", "linear", "--shape", "D99"), "--shape D99 fits no case"),
    ],
)
def test_mistakes_are_one_line(say, arguments, said):
    code, _, err = say(*arguments)
    assert code == 2 and len(err.splitlines()) == 1 and said in err


def test_parts():
    assert command._part("3/8") == (3, 8)
    for wrong in ("8/8", "3", "-1/8", "a/b"):
        with pytest.raises(ValueError, match="must be I/N"):
            command._part(wrong)


def test_names():
    assert all(case.op == name for name, op in ops.OPS.items() for case in op.cases)
    assert len({(c.op, c.shape) for c in CASES}) == len(CASES)


def test_only_self_attention_is_replaced():
    """By the others' in a whole model: with the values as they are, and with the host's own."""
    from diffusers.models.transformers import transformer_wan as host

    from linfusion.kernels.bench.denoisers import self_attention_by

    model, inputs, stock = HOSTS["wan"].build(), HOSTS["wan"].inputs(2, 3), host.dispatch_attention_fn
    with torch.no_grad():
        want, lengths = model(**inputs)[0], []

        def same(q, k, v):
            lengths.append(q.shape[1])
            return stock(q, k, v)

        with self_attention_by(lambda: same):
            assert torch.equal(model(**inputs)[0], want)
        with self_attention_by(lambda: lambda q, k, v: v):
            assert not torch.allclose(model(**inputs)[0], want)
        assert torch.equal(model(**inputs)[0], want) and lengths == [12] * 2
