"""Every cell of the support matrix does what the committed table says."""

import pytest

import linfusion as lf

from ..models import HOSTS, forward, gap
from .matrix import CONFIGS, END, README, START, answer, render, table, works


def test_the_table_is_whole():
    assert set(CONFIGS) == set(lf.mechanisms())
    assert set(table()) == set(lf.families())
    rows = {host: row for hosts in table().values() for host, row in hosts.items()}
    assert set(HOSTS) <= set(rows)  # the oldest diffusers lacks some
    assert all(set(row) == set(CONFIGS) for row in rows.values())


def test_readme_shows_the_table():
    assert README.read_text().split(START)[1].split(END)[0].strip() == render(table())


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("host", HOSTS)
def test_cell(host, name):
    tiny = HOSTS[host]
    said = table()[tiny.family][host][name]
    assert answer(tiny, CONFIGS[name]) == said
    if said == "yes":
        works(tiny, CONFIGS[name])
    else:
        assert len(said) > 40, "a refusal gives its reason"


@pytest.mark.parametrize("config", [lf.CLEAR(1000), lf.SLA(topk=1.0, linear="complement")], ids=str)
def test_what_covers_everything_is_stock(tiny, model, inputs, config):
    """The step-0 rule: added branches start at zero, and what is left is exact."""
    stock = forward(model, inputs)
    lf.apply(model, config)
    assert gap(forward(model, inputs), stock) < 1e-5
