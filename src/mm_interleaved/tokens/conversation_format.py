"""How a conversation is written as plain text.

The format is the one of the language model that the released checkpoint is built on: `USER: … ASSISTANT: …`,
a system sentence before it, the end-of-text token after each answer. The markers are ordinary text.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import groupby

from mm_interleaved.documents.document import Part, Text

ANSWERING_ROLE = "assistant"
_MARKERS = {"system": "", "user": "USER:", ANSWERING_ROLE: "ASSISTANT:"}


@dataclass(frozen=True, slots=True)
class PromptPiece:
    """A part as it will be encoded: each text piece is tokenized by itself."""

    part: Part
    is_target: bool
    """Counts in the loss."""
    ends_turn: bool = False
    """An eos follows."""


def conversation_pieces(parts: Sequence[Part], target: Sequence[Part] = ()) -> list[PromptPiece]:
    """The pieces of a conversation; where the last word is not the assistant's, its marker ends them.

    Only what the assistant says is a target; where the document has a `target`, only what it says there. An
    answer begins a piece of its own, as it does when it is generated.
    """
    turns = [(part, part.role or "", not target) for part in parts]
    turns += [(part, part.role or ANSWERING_ROLE, True) for part in target]
    pieces, last_role = _pieces_of_turns(turns)
    if last_role != ANSWERING_ROLE:
        _append_text(pieces, _MARKERS[ANSWERING_ROLE])
    return pieces


def chat_pieces(parts: Sequence[Part], *, asks: bool, goes_on: bool) -> list[PromptPiece]:
    """The pieces of a conversation as transformers' chat templates end it.

    Args:
        asks: the assistant's marker ends them.
        goes_on: the last answer stays open; else it is ended, as all others are.
    """
    pieces, last_role = _pieces_of_turns([(part, part.role or "", True) for part in parts])
    if last_role == ANSWERING_ROLE and not goes_on:
        pieces[-1] = replace(pieces[-1], ends_turn=True)
    if asks:
        _append_text(pieces, _MARKERS[ANSWERING_ROLE])
    return pieces


def _pieces_of_turns(parts: Sequence[tuple[Part, str, bool]]) -> tuple[list[PromptPiece], str]:
    """Pieces of (part, role, whether it may count), and who spoke last."""
    pieces: list[PromptPiece] = []
    role = ""
    for next_role, turn in groupby(parts, key=lambda item: item[1]):
        if role == ANSWERING_ROLE:
            pieces[-1] = replace(pieces[-1], ends_turn=True)
        role, is_answer = next_role, next_role == ANSWERING_ROLE
        _append_text(pieces, _MARKERS.get(role, f"{role.upper()}:" if role else ""))
        for index, (part, _, may_be_target) in enumerate(turn):
            if index == 0 and not is_answer and isinstance(part, Text):
                _append_text(pieces, part.text)
            else:
                pieces.append(PromptPiece(part, is_target=is_answer and may_be_target))
    return pieces, role


def _append_text(pieces: list[PromptPiece], text: str):
    """Continues the prompt's last piece of text, after a space, or begins one."""
    if not text:
        return
    last = pieces[-1] if pieces else None
    if last is not None and isinstance(last.part, Text) and not last.is_target and not last.ends_turn:
        pieces[-1] = PromptPiece(Text(f"{last.part.text} {text}"), is_target=False)
    else:
        pieces.append(PromptPiece(Text(text), is_target=False))
