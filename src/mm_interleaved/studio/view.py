"""What the page shows of a session, as JSON values. Text stays text: nothing here is markup."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from mm_interleaved.documents.document import Image, Part, Text
from mm_interleaved.documents.part_tree import Node, PartTree
from mm_interleaved.documents.session import Session
from mm_interleaved.studio.actions import title_of

MAX_BRANCHES = 200
"""Hidden branches that are listed; the newest."""

ImageAddress = Callable[[int, Image], str]
"""Where the page finds the image of a node."""


def session_view(session: Session, address: ImageAddress) -> dict[str, Any]:
    """The shown parts with their alternatives, the hidden branches, and what can be done."""
    tree, head = session.tree, session.head
    path = tree.path
    return {
        "title": title_of(session),
        "layout": head.get("layout", "auto"),
        "settings": dict(head.get("generation") or {}),
        "parts": [_part(tree, place, node, address) for place, node in enumerate(path)],
        "onwards": _alternatives(tree, len(path), address),
        "branches": _branches(tree, address),
        "hidden": len(tree.hidden),
        "can_undo": bool(tree.past),
        "can_redo": bool(tree.future),
    }


def _part(tree: PartTree, place: int, node: int, address: ImageAddress) -> dict[str, Any]:
    return _shown(tree.nodes[node], node, address) | {
        "place": place,
        "alternatives": _alternatives(tree, place, address),
    }


def _alternatives(tree: PartTree, place: int, address: ImageAddress) -> dict[str, Any]:
    """What may stand at a place; `place` is None behind the last part."""
    nodes, shown = tree.alternatives(place)
    several = nodes if len(nodes) > 1 or shown is None else ()
    return {
        "count": len(nodes),
        "place": shown,
        "nodes": [
            _shown(tree.nodes[number], number, address) | {"below": tree.below(number)} for number in several
        ],
    }


def _branches(tree: PartTree, address: ImageAddress) -> list[dict[str, Any]]:
    """The hidden ends: how many parts lead there, and the first of them that is not shown."""
    shown = set(tree.path)
    found: list[dict[str, Any]] = []
    for tip in [tip for tip in tree.tips if tip not in shown][-MAX_BRANCHES:]:
        path = tree.path_to(tip)
        first = next(place for place, node in enumerate(path) if node not in shown)
        begins = [_shown(tree.nodes[node], node, address) for node in path[first : first + 2]]
        found.append({"tip": tip, "from": first, "parts": len(path), "begins": begins})
    return found


def _shown(node: Node, number: int, address: ImageAddress) -> dict[str, Any]:
    part = node.part
    record: dict[str, Any] = {
        "node": number,
        "generated": part.generated,
        "seed": part.seed,
        "role": part.role,
        "settings": _settings(node.settings) if part.generated else {},
    }
    return record | _content(part, number, address)


def _content(part: Part, number: int, address: ImageAddress) -> dict[str, Any]:
    if isinstance(part, Text):
        return {"type": "text", "text": part.text}
    return {"type": "image", "src": address(number, part)}


def _settings(settings: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in settings.items() if isinstance(value, str | int | float)}
