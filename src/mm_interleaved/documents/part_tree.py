"""All that a document has been: each part with its alternatives, as a tree of which one path is shown.

Nothing is ever taken out of the tree. An edit, a part made again, an insertion, a deletion is another path,
which shares with the others what comes before it; `showing` finds what is shared. What is not on the path is
hidden, and can be shown again: by stepping through the alternatives of a part, by going back in time, or by
choosing a node.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

from mm_interleaved.documents.parts import Part
from mm_interleaved.errors import UsageError

ROOT = -1
"""Stands before the first part, where nodes are named by their index."""


@dataclass(frozen=True, slots=True)
class Node:
    """One part, as it once stood after another."""

    part: Part
    parent: int
    """Index of the node before it, ROOT for the first; always less than its own."""
    settings: Mapping[str, Any] = field(default_factory=dict)
    """Generation settings that it was made with, by name, where somebody recorded them."""


class Alternatives(NamedTuple):
    """What may stand at one place of the document, oldest first: `< place + 1 / len(nodes) >`."""

    nodes: tuple[int, ...]
    place: int | None
    """Which of them is shown; None where the document ends before them."""


@dataclass(frozen=True, slots=True)
class PartTree:
    """An immutable tree; what changes it returns another one, which shares its nodes.

    >>> from mm_interleaved.documents.parts import Text
    >>> tree = PartTree().showing([Text("Pip finds a lamp."), Text("It is old.")])
    >>> tree = tree.showing([Text("Pip finds a lamp."), Text("It is new.")])
    >>> tree.alternatives(1)
    Alternatives(nodes=(1, 2), place=1)
    >>> [part.text for part in tree.stepped(1, -1).parts]
    ['Pip finds a lamp.', 'It is old.']
    >>> tree.hidden
    (1,)
    """

    nodes: tuple[Node, ...] = ()
    chosen: Mapping[int, int] = field(default_factory=dict)
    """The node shown after each node (or ROOT), also of those that are hidden now; one that is missing ends
    the document where it is shown."""
    past: tuple[int, ...] = ()
    """What `undone` goes back to, the newest last: the last node of a path that was shown."""
    future: tuple[int, ...] = ()
    """What `redone` goes on to, the next one last."""

    # ---- What is shown ---------------------------------------------------------------------------

    @property
    def path(self) -> tuple[int, ...]:
        """The nodes that are shown, in order."""
        return tuple(self._onwards(ROOT))

    @property
    def parts(self) -> tuple[Part, ...]:
        """The parts that are shown, in order."""
        return tuple(self.nodes[node].part for node in self.path)

    @property
    def hidden(self) -> tuple[int, ...]:
        """The nodes that are not shown."""
        shown = set(self.path)
        return tuple(node for node in range(len(self.nodes)) if node not in shown)

    @property
    def tips(self) -> tuple[int, ...]:
        """The last node of each path that nothing continues."""
        inner = {node.parent for node in self.nodes}
        return tuple(node for node in range(len(self.nodes)) if node not in inner)

    def path_to(self, node: int) -> tuple[int, ...]:
        """The nodes from the first part to this one, it included."""
        found: list[int] = []
        while node != ROOT:
            found.append(node)
            node = self.nodes[node].parent
        return tuple(reversed(found))

    def alternatives(self, index: int) -> Alternatives:
        """What may stand as part `index`; for the index after the last part, what once continued it.

        Raises UsageError: there is no such place.
        """
        path = self.path
        if not 0 <= index <= len(path):
            raise UsageError(f"part: found {index}, expected 0 to {len(path)}", field="part")
        before = path[index - 1] if index else ROOT
        nodes = tuple(number for number, node in enumerate(self.nodes) if node.parent == before)
        return Alternatives(nodes, nodes.index(path[index]) if index < len(path) else None)

    def below(self, node: int) -> int:
        """How many parts hang on a node, on all paths together."""
        hanging = {node}
        for number in range(node + 1, len(self.nodes)):
            if self.nodes[number].parent in hanging:
                hanging.add(number)
        return len(hanging) - 1

    # ---- Another path ----------------------------------------------------------------------------

    def showing(self, parts: Sequence[Part], settings: Mapping[str, Any] | None = None) -> PartTree:
        """The tree in which exactly these parts are shown: those that a path has already are shared, others
        are added beside what there is.

        Args:
            settings: with which the parts that are new were made.
        """
        nodes, chosen, at = list(self.nodes), dict(self.chosen), ROOT
        children: dict[int, list[int]] = {}
        for number, node in enumerate(nodes):
            children.setdefault(node.parent, []).append(number)
        for part in parts:
            child = next((each for each in children.get(at, ()) if nodes[each].part == part), None)
            if child is None:
                child = len(nodes)
                nodes.append(Node(part, at, dict(settings or {})))
            chosen[at] = child
            at = child
        chosen.pop(at, None)
        return self._with_past(replace(self, nodes=tuple(nodes), chosen=chosen))

    def stepped(self, index: int, by: int) -> PartTree:
        """The tree with another alternative of part `index`, and what was last shown behind it; from the
        first and from the last alternative it goes no further.
        """
        nodes, place = self.alternatives(index)
        if not nodes:
            return self
        first = -1 if place is None else place
        return self.choosing(nodes[min(max(0, first + by), len(nodes) - 1)])

    def choosing(self, node: int) -> PartTree:
        """The tree whose path leads through a node, on to what was last shown behind it.

        Raises UsageError: there is no such node.
        """
        if not 0 <= node < len(self.nodes):
            raise UsageError(f"node: found {node}, expected 0 to {len(self.nodes) - 1}", field="node")
        return self._with_past(replace(self, chosen=self._chosen_to(node)))

    # ---- Back and forth in time ------------------------------------------------------------------

    def undone(self) -> PartTree:
        """The tree as it was shown before its path last changed; itself where it never did."""
        if not self.past:
            return self
        *past, tip = self.past
        return replace(
            self, chosen=self._chosen_up_to(tip), past=tuple(past), future=(*self.future, self._tip)
        )

    def redone(self) -> PartTree:
        """Takes back `undone`."""
        if not self.future:
            return self
        *future, tip = self.future
        return replace(
            self, chosen=self._chosen_up_to(tip), past=(*self.past, self._tip), future=tuple(future)
        )

    # ---- How it is done --------------------------------------------------------------------------

    @property
    def _tip(self) -> int:
        return self.path[-1] if self.path else ROOT

    def _onwards(self, node: int) -> list[int]:
        found: list[int] = []
        while (next_node := self.chosen.get(node)) is not None:
            found.append(next_node)
            node = next_node
        return found

    def _chosen_to(self, node: int) -> dict[int, int]:
        path = self.path_to(node)
        return {**self.chosen, **dict(zip((ROOT, *path[:-1]), path, strict=True))}

    def _chosen_up_to(self, tip: int) -> dict[int, int]:
        """What is chosen where the document ends with this node."""
        chosen = dict(self.chosen) if tip == ROOT else self._chosen_to(tip)
        chosen.pop(tip, None)
        return chosen

    def _with_past(self, changed: PartTree) -> PartTree:
        if changed.path == self.path:
            return replace(changed, past=self.past, future=self.future)
        return replace(changed, past=(*self.past, self._tip), future=())
