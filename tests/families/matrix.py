"""Every mechanism on every family: the expected answers, and `python -m tests.families.matrix`, which writes them.

It runs each cell on the tiny hosts, writes `docs/support.json` and the table in README. The tests run the cells again
and compare with what is committed, so a cell that changes its answer is a change that somebody has to look at.
"""

import json
import re
from pathlib import Path

import torch

import linfusion as lf

from ..models import HOSTS, Tiny, forward, whole

ROOT = Path(__file__).resolve().parents[2]
TABLE, README = ROOT / "docs" / "support.json", ROOT / "README.md"
START, END = "<!-- made by python -m tests.families.matrix -->", "<!-- end -->"

CONFIGS = {
    "softmax": lf.Softmax(),
    "linfusion": lf.LinFusion(mid_dim=4),
    "clear": lf.CLEAR(2),
    "sla": lf.SLA(topk=0.4, block_q=16, block_k=16),
    "lit": lf.LiT(kernel_size=3),
    "agent": lf.Agent(agents=4, kernel_size=3),
    "agent-sd": lf.AgentSD(cell=2),
}
"""Small enough to change something on the grids of the tests."""


def answer(tiny: Tiny, config) -> str:
    """ "yes", or the reason why this host refuses the mechanism."""
    try:
        lf.apply(tiny.build(), config)
    except NotImplementedError as error:
        return re.sub(r"^\S+: ", "", str(error))  # without the layer's name
    return "yes"


def works(tiny: Tiny, config) -> None:
    """What a "yes" stands for."""
    # frozen first: where nothing needs gradients, PyTorch takes other paths, which round otherwise
    model, inputs = tiny.build().requires_grad_(False), tiny.inputs(6, 6 if tiny.square else 9)
    stock, names = forward(model, inputs), list(model.state_dict())
    lf.apply(model, config)
    changed = forward(model, inputs)
    assert changed.shape == stock.shape and changed.isfinite().all()
    assert torch.equal(changed, stock) == isinstance(config, lf.Softmax)

    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert all(".linfusion." in name for name in trained)
    if trained:
        optimizer = torch.optim.SGD(trained.values(), lr=1e-2)
        for step in range(2):  # what stands behind a zero-initialised layer learns from the second step on
            optimizer.zero_grad()
            whole(model(**inputs, return_dict=False)).square().mean().backward()
            if step == 0:
                optimizer.step()
        still = [name for name, p in trained.items() if p.grad is None or not p.grad.abs().max() > 0]
        assert not still, still
    lf.restore(model)
    assert torch.equal(forward(model, inputs), stock) and list(model.state_dict()) == names


def table() -> dict[str, dict[str, dict[str, str]]]:
    """`{family: {tiny host: {mechanism: answer}}}`, as committed."""
    return json.loads(TABLE.read_text())


def render(answers: dict[str, dict[str, dict[str, str]]]) -> str:
    """The matrix as Markdown, reasons as notes below it."""
    columns = {name: config.__name__ for name, config in lf.mechanisms().items()}
    reasons: dict[str, int] = {}
    lines = [
        f"| model | layers | {' | '.join(columns.values())} |",
        f"| --- | --- | {' | '.join('---' for _ in columns)} |",
    ]
    for model, family in lf.families().items():
        cells = []
        for name in columns:
            said = {row[name] for row in answers[model].values()}
            notes = "".join(f" ({reasons.setdefault(s, len(reasons) + 1)})" for s in sorted(said - {"yes"}))
            cells.append(("yes" if said == {"yes"} else "in part" if "yes" in said else "no") + notes)
        lines.append(f"| `{model}` | {family.about} | {' | '.join(cells)} |")
    return "\n\n".join(["\n".join(lines), *(f"({number}) {reason}" for reason, number in reasons.items())])


def main() -> None:
    answers: dict[str, dict[str, dict[str, str]]] = {}
    for host, tiny in HOSTS.items():
        row = answers.setdefault(tiny.family, {})[host] = {name: answer(tiny, c) for name, c in CONFIGS.items()}
        for name, said in row.items():
            if said == "yes":
                works(tiny, CONFIGS[name])
    TABLE.write_text(json.dumps(answers, indent=2) + "\n")
    before, rest = README.read_text().split(START)
    README.write_text(f"{before}{START}\n{render(answers)}\n{END}{rest.split(END)[1]}")


if __name__ == "__main__":
    main()
