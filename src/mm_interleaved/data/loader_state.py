"""The state of a loader as JSON: how far each row stream has been read, and what rows depend on."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from mm_interleaved.errors import UsageError

STATE_VERSION = 2
_NAMES_OF_VERSION_1 = {"lanes": "row_streams"}
"""Keys by their former names; the first release wrote them."""


def current_state(state: Mapping[str, Any]) -> dict[str, Any]:
    """A state of this or of an earlier release, in the form that `TrainingLoader.state_dict` gives.

    Raises:
        UsageError: another version.
        ValueError: some part is missing or is something else.
    """
    version = state.get("version")
    if version == 1:
        state = {_NAMES_OF_VERSION_1.get(name, name): value for name, value in state.items()}
    elif version != STATE_VERSION:
        raise UsageError(f"data state: expected version {STATE_VERSION}, found {version!r}")
    _check_form(state)
    return {**state, "version": STATE_VERSION}


def _check_form(state: Mapping[str, Any]) -> None:
    """Refuses a state of which some part is missing or is something else."""
    # A state that was edited or cut would otherwise be read as another place in the data, silently.
    numbers = [state["step"]]
    for index, own in state["row_streams"].items():
        numbers += [int(index), own["rows"]]
        for source in own["sources"].values():
            block, *rest = source["cursor"]
            if (len(block), len(rest)) != (3, 4):
                raise ValueError(f"cursor: expected three numbers and four, found {source['cursor']}")
            numbers += [*block, *rest, *source["counts"].values()]
    wrong = [number for number in numbers if type(number) is not int or number < 0]
    if wrong or not isinstance(state["settings"], Mapping):
        raise ValueError(f"data state: expected whole numbers from 0, found {wrong[:1] or state['settings']}")


def merge_states(states: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The states of all ranks as one, for any number of ranks.

    Raises:
        ValueError: they do not belong to one step of one run.
    """
    first = states[0]
    for state in states:
        if any(state[name] != first[name] for name in ("version", "step", "settings")):
            raise ValueError(f"ranks are at different steps: {[state['step'] for state in states]}")
    streams = {index: own for state in states for index, own in state["row_streams"].items()}
    return {**first, "row_streams": dict(sorted(streams.items(), key=lambda item: int(item[0])))}


def state_counts(state: Mapping[str, Any]) -> dict[str, dict[str, int]]:
    """The counts in a state, summed over its row streams: {source: {counter: number}}."""
    totals: dict[str, Counter[str]] = {}
    for stream in state["row_streams"].values():
        for name, source in stream["sources"].items():
            totals.setdefault(name, Counter()).update(source["counts"])
    return {name: dict(counts) for name, counts in totals.items()}
