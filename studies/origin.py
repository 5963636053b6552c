"""Where published results come from, out of the costs of the parts that they rest on."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from studies.provenance import UNKNOWN

Costs = Sequence[Mapping[str, Any]]


def origin_of(costs: Costs) -> dict[str, list[Any]]:
    """Commits, machines, days, threads and first weights of all parts; "unknown" where a part does not tell.

    Args:
        costs: of the parts, as `studies.provenance` writes them; an empty one is no part.
    """
    parts = [cost for cost in costs if cost]
    goes = [go for cost in parts for go in cost.get("made_by") or [{}]]
    return {
        **_told(goes),
        "starts": _distinct(go.get("start", UNKNOWN) for go in goes),
        "threads": _distinct(cost.get("threads", UNKNOWN) for cost in parts),
    }


def scoring_of(results: Costs) -> dict[str, list[Any]]:
    """Commits, machines and days of the scoring."""
    return _told([result.get("scored_by") or {} for result in results])


def _told(goes: Costs) -> dict[str, list[Any]]:
    return {
        "commits": _distinct(go.get("commit", UNKNOWN) for go in goes),
        "machines": _distinct(go.get("machine", UNKNOWN) for go in goes),
        "dates": _distinct(go.get("date", UNKNOWN) for go in goes),
    }


def _distinct(values: Iterable[Any]) -> list[Any]:
    return sorted(set(values), key=str)


def origin_text(origin: Mapping[str, Sequence[Any]], done: str) -> str:
    """One sentence of it, e.g. `done` "Trained" on which machines, by which commits, when."""
    commits = origin["commits"]
    known = [commit for commit in commits if commit != UNKNOWN]
    told = f"by {'commits' if len(known) > 1 else 'commit'} {', '.join(known)}" if known else ""
    if len(known) < len(commits):
        told += ", of some parts the commit was not recorded" if known else "the commit was not recorded"
    machines, dates = (" and ".join(map(str, origin[name])) for name in ("machines", "dates"))
    return f"{done} on {machines} ({dates}); {told}."
