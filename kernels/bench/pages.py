"""Tables and figures of the pages in `docs/kernels`, from the CSV alone: how near a kernel is to its floor."""

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

    That is a table, and the figures which `plots.draw` has put there.

    A mark names ops: `<!-- rows of linear, made by linfusion bench --plots -->`, up to `<!-- end -->`.
    """
    rows = read(file)
    gpu = next((r.gpu for r in reversed(rows)), None)
    rows = [r for r in latest(r for r in rows if r.gpu == gpu) if not timer(r)]
    lines = summary(rows, OPS, copy_bandwidth(rows))

    def table(found: re.Match[str]) -> str:
        ops = found[2].split()
        cells = [(shape, way, *rest) for op, shape, way, _, *rest in lines if op in ops]
        if not cells:
            return f"{found[1]}Not measured yet.\n{found[3]}"
        body = "".join(f"| {' | '.join(row)} |\n" for row in (COLUMNS, ("---",) * len(COLUMNS), *cells))
        figures = (f"bench-{op}{kind}.png" for op in ops for kind in ("", "-floor"))
        drawn = "".join(f"\n![{name}]({name})\n" for name in figures if (folder / name).exists())
        return found[1] + body + drawn + found[3]

    filled = []
    for page in sorted(folder.glob("*.md")):
        text = page.read_text(encoding="utf-8")
        if MARKED.search(text):
            page.write_text(MARKED.sub(table, text), encoding="utf-8")
            filled.append(page)
    return filled
