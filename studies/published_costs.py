"""What the published studies took, out of their raw results: a part that several variants share counts once.

DOCS/ablation_results.json, DOCS/scaling_results.json -> rows of a table in DOCS/learning_curves.md
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

STUDIES = {
    "ablation_results.json": (
        "twins",
        "`python -m studies ablation`, [ablation_results.md](ablation_results.md)",
    ),
    "scaling_results.json": ("sizes", "`python -m studies scaling`, [ablation.md](ablation.md#more-compute)"),
}
"""Each file, its key of the members (of the first release), and what of the docs rests on it."""


@dataclass(frozen=True, slots=True)
class StudyCost:
    """What the training of a study took; its scoring is not counted."""

    name: str
    parts: int
    flops: float
    core_hours: float
    hours: float
    machines: Sequence[str]


def study_costs(docs: Path) -> list[StudyCost]:
    """Those of the studies whose results lie in `docs`."""
    paths = {docs / name: study for name, study in STUDIES.items()}
    return [
        _cost_of(json.loads(path.read_text()), members, name)
        for path, (members, name) in paths.items()
        if path.exists()
    ]


def _cost_of(results: Mapping[str, Any], members: str, name: str) -> StudyCost:
    costs = [(part, cost) for one in results[members] for part, cost in one.get("cost", {}).items() if cost]
    distinct = {json.dumps(cost, sort_keys=True): cost for cost in costs}
    parts = [cost for _, cost in distinct.values()]
    return StudyCost(
        name=name,
        parts=len(parts),
        flops=sum(cost["flops"] for cost in parts),
        core_hours=sum(cost["core_hours"] for cost in parts),
        hours=sum(cost["wall_hours"] for cost in parts),
        machines=results.get("machines", ()),
    )


def costs_text(costs: Sequence[StudyCost]) -> str:
    """A section of Markdown; empty without any."""
    if not costs:
        return ""
    rows = [
        f"| {cost.name} | {cost.parts} | {cost.flops:.2e} | {cost.core_hours:.2f} | {cost.hours:.2f} | "
        f"{' and '.join(cost.machines) or 'not recorded'} |"
        for cost in costs
    ]
    return f"""
## What the studies took

Training alone; a part that several variants share counts once. Hours are the clock's, parts one after
another. Costs of scoring and generating stand in [ablation.md](ablation.md#what-the-figures-cost).

| study | parts | FLOPs | core hours | hours | hardware |
| --- | --- | --- | --- | --- | --- |
{chr(10).join(rows)}
"""
