"""Tables of the pages in `docs/kernels`, from the CSV alone: how near each kernel is to its floor, whom it beats."""

from __future__ import annotations

import re
from pathlib import Path

from .ops import OPS
from .plots import copy_bandwidth
from .report import latest, summary, timer
from .table import read

COLUMNS = ("shape", "direction", "ms", "of the copy's bandwidth", "faster than")
MARKED = re.compile(r"(<!-- rows of ([\w -]+), made by linfusion bench --plots -->\n).*?(<!-- end -->)", re.DOTALL)


def fill(file: Path, folder: Path) -> list[Path]:
    """Write anew what stands between the marks of each page in `folder`, of the GPU that was measured last; the pages.

    A mark names ops: `<!-- rows of linear, made by linfusion bench --plots -->`, up to `<!-- end -->`.
    """
    rows = read(file)
    gpu = next((r.gpu for r in reversed(rows)), None)
    rows = [r for r in latest(r for r in rows if r.gpu == gpu) if not timer(r)]
    lines = summary(rows, OPS, copy_bandwidth(rows))

    def table(found: re.Match[str]) -> str:
        cells = [(shape, way, *rest) for op, shape, way, _, *rest in lines if op in found[2].split()]
        body = [COLUMNS, tuple("---" for _ in COLUMNS), *cells] if cells else []
        made = "".join(f"| {' | '.join(row)} |\n" for row in body) or "Not measured yet.\n"
        return found[1] + made + found[3]

    filled = []
    for page in sorted(folder.glob("*.md")):
        text = page.read_text(encoding="utf-8")
        if MARKED.search(text):
            page.write_text(MARKED.sub(table, text), encoding="utf-8")
            filled.append(page)
    return filled
