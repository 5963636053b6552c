"""The provenance of published results, out of the records of the parts that they rest on."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from mm_interleaved.runs.provenance import UNKNOWN

Costs = Sequence[Mapping[str, Any]]


def provenance_of(costs: Costs) -> dict[str, list[Any]]:
    """Commits, machines, days, threads and first weights of all parts; "unknown" where not recorded.

    Args:
        costs: of the parts, as `studies.cost` writes them; an empty one is no part.
    """
    parts = [cost for cost in costs if cost]
    goes = [go for cost in parts for go in cost.get("made_by") or [{}]]
    return {
        **_who_and_when(goes),
        "starts": _distinct(go.get("start", UNKNOWN) for go in goes),
        "threads": _distinct(cost.get("threads", UNKNOWN) for cost in parts),
    }


def scoring_of(results: Costs) -> dict[str, list[Any]]:
    """Commits, machines and days of the scoring."""
    return _who_and_when([result.get("scored_by") or {} for result in results])


def _who_and_when(goes: Costs) -> dict[str, list[Any]]:
    return {
        "commits": _distinct(go.get("commit", UNKNOWN) for go in goes),
        "machines": _distinct(go.get("machine", UNKNOWN) for go in goes),
        "dates": _distinct(go.get("date", UNKNOWN) for go in goes),
    }


def _distinct(values: Iterable[Any]) -> list[Any]:
    return sorted(set(values), key=str)


def provenance_text(provenance: Mapping[str, Sequence[Any]], done: str) -> str:
    """One sentence of it, e.g. `done` "Trained" on which machines, by which commits, when."""
    commits = provenance["commits"]
    known = [commit for commit in commits if commit != UNKNOWN]
    by = f"by {'commits' if len(known) > 1 else 'commit'} {', '.join(known)}" if known else ""
    if len(known) < len(commits):
        by += ", of some parts the commit was not recorded" if known else "the commit was not recorded"
    machines, dates = (" and ".join(map(str, provenance[name])) for name in ("machines", "dates"))
    return f"{done} on {machines} ({dates}); {by}."
