"""The model card of an adapter, from what training and evaluation left in its folder."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from .data.store import write_text

FACTS, FIGURES, SHEET, CARD = "training.json", "figures.json", "sheet.png", "README.md"


def write(folder: Path) -> None:
    """`README.md` from `training.json`, `figures.json` and `sheet.png`, as far as they are there."""
    facts, figures = read(folder / FACTS), read(folder / FIGURES)
    settings = facts.get("settings", {})
    base = facts.get("base_model", "")
    lines = [
        "---",
        "library_name: diffusers",
        "tags: [linfusion]",
        "---",
        "",
        f"# {facts.get('mechanism')} for {base}",
        "",
    ]
    lines += ["```python", "import linfusion as lf", "", 'lf.load(pipe, "THIS_FOLDER")', "```", ""]
    if (folder / SHEET).is_file():
        lines += [f"![teacher and student]({SHEET})", ""]
    loss = (facts.get("losses") or [{}])[-1]
    rows = {
        "base model": f"{base} ({facts.get('pipeline')})",
        "attention": f"{facts.get('mechanism')} in {facts.get('layers')} layers",
        "trained": f"{settings.get('trainable')}, {facts.get('parameters', 0):,} parameters",
        "data": f"{facts.get('samples', 0):,} {_SOURCES.get(str(facts.get('source')), '')}",
        "arguments of the pipeline": ", ".join(f"{k} {v}" for k, v in facts.get("teacher_arguments", {}).items()),
        "training": f"stage {settings.get('stage')}, {facts.get('steps')} steps of {facts.get('batch')} samples, "
        f"learning rate {settings.get('learning_rate')}, seed {settings.get('seed')}",
        "losses at the end": ", ".join(f"{k} {v:.4g}" for k, v in loss.items() if isinstance(v, float) and k != "lr"),
    }
    lines += ["| | |", "| --- | --- |", *(f"| {name} | {text} |" for name, text in rows.items()), ""]
    for name, measured in figures.get("sizes", {}).items():
        lines += [f"At {name} pixels, {figures['prompts']} prompts, same noise for teacher and student:", ""]
        lines += ["| | |", "| --- | --- |", *(f"| {k} | {_number(v)} |" for k, v in measured.items()), ""]
    write_text(folder / CARD, "\n".join(lines))


_SOURCES = {"samples": "samples drawn by the base model itself", "pictures": "pictures with captions"}


def _number(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def read(path: Path) -> dict[str, Any]:
    """A file of figures, empty where there is none."""
    try:
        return json.loads(path.read_text())
    except (OSError, json.JSONDecodeError):
        return {}
