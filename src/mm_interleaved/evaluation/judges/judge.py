"""What a judge is asked, what counts as its verdict, and a memory of all verdicts.

A judge sees a question and an answer as one list of texts and images, and returns text; a verdict is the
JSON object in it, with a whole number for every axis. Texts without a valid one are asked for again. Each
verdict is kept by what it was given to (judge, prompt, images by content), so that a run that was stopped
goes on, and the same answer is never paid for twice.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from mm_interleaved.documents.document import Document, Image, Part, Text
from mm_interleaved.documents.images import to_png
from mm_interleaved.errors import InputError, MMInterleavedError, escape
from mm_interleaved.evaluation.answers import parts_of
from mm_interleaved.files import append_line, make_folder, repair_tail

AXES: Mapping[str, str] = {
    "correctness": "whether text and images are right, and do what was asked",
    "coherency": "whether each image shows what its text says",
    "consistency": "whether people, things and style stay the same over the steps",
    "quality": "how good the texts read and the images look",
    "completeness": "whether every step that was asked for is there",
    "richness": "how much there is to learn from it",
    "preference": "how much a person would like to get this answer",
}
"""OpenING's seven axes (arXiv 2411.18499), each from 0 to 10."""
HIGHEST = 10
MAX_ATTEMPTS = 3
_OBJECT = re.compile(r"\{[^{}]*\}")


class Judge(Protocol):
    """Whoever reads texts and images and answers in text."""

    @property
    def name(self) -> str:
        """Which judge in which version, for the record and for the memory."""
        ...

    def reply(self, parts: Sequence[Part], attempt: int) -> str:
        """The judge's text about these parts; `attempt` counts from 0, a later one may be asked otherwise."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """What a judge said of an answer."""

    scores: Mapping[str, int]
    """0 to 10 by axis."""
    judge: str


class InvalidVerdictError(MMInterleavedError):
    """A judge whose answer holds no verdict, after all attempts."""

    exit_code = 3
    code = "judge"


def prompt_parts(question: Document, answer: Document | None, axes: Mapping[str, str] = AXES) -> list[Part]:
    """What a judge is shown: the task, the question, the answer, and how to reply."""
    asked = "\n".join(f"- {name}: {what}" for name, what in axes.items())
    names = ", ".join(f'"{name}": 0' for name in axes)
    return [
        Text("You judge an answer of texts and images. The question was:"),
        *question.parts,
        Text("The answer is:"),
        *(parts_of(answer) or (Text("(there is no answer)"),)),
        Text(
            f"Rate the answer with whole numbers from 0 (worst) to {HIGHEST} (best) on these axes:\n{asked}\n"
            f"Reply with one JSON object and nothing else: {{{names}}}"
        ),
    ]


def read_verdict(text: str, axes: Sequence[str]) -> dict[str, int] | None:
    """The scores in a judge's reply; None where it holds no valid ones."""
    for found in reversed(_OBJECT.findall(text)):
        try:
            record = json.loads(found)
        except ValueError:
            continue
        scores = {name: record.get(name) for name in axes}
        if all(type(value) is int and 0 <= value <= HIGHEST for value in scores.values()):
            return scores
    return None


class RememberingJudge:
    """Asks a judge, again where its verdict is invalid, and keeps what came out.

    Args:
        judge: who is asked.
        path: a file of JSON lines, one a verdict; read first, written after each verdict.

    Raises:
        InputError: the file is no such file.
    """

    def __init__(self, judge: Judge, path: Path, axes: Mapping[str, str] = AXES):
        self.judge, self.path, self.axes = judge, path, axes
        self._known = _read_memory(path)

    def __call__(self, question: Document, answer: Document | None) -> Verdict:
        """The verdict about an answer.

        Raises:
            InvalidVerdictError: no valid verdict in several attempts.
        """
        parts = prompt_parts(question, answer, self.axes)
        key = _key(self.judge.name, parts)
        if key not in self._known:
            self._known[key] = self._ask(question.id, parts)
            self._keep(key)
        return Verdict(scores=self._known[key], judge=self.judge.name)

    def _ask(self, name: str, parts: Sequence[Part]) -> dict[str, int]:
        reply = ""
        for attempt in range(MAX_ATTEMPTS):
            reply = self.judge.reply(parts, attempt)
            scores = read_verdict(reply, list(self.axes))
            if scores is not None:
                return scores
        raise InvalidVerdictError(
            f"judge {self.judge.name}: no verdict about {escape(name)!r} in {MAX_ATTEMPTS} attempts, "
            f"expected a JSON object of whole numbers, found {escape(reply, 200)!r}"
        )

    def _keep(self, key: str) -> None:
        make_folder(self.path.parent)
        append_line(self.path, json.dumps({"key": key, "scores": self._known[key]}).encode())


def _key(judge: str, parts: Sequence[Part]) -> str:
    digest = hashlib.sha256(judge.encode())
    for part in parts:
        content = to_png(part.load()) if isinstance(part, Image) else part.text.encode("utf-8", "replace")
        digest.update(type(part).__name__.encode() + len(content).to_bytes(8, "big") + content)
    return digest.hexdigest()


def _read_memory(path: Path) -> dict[str, dict[str, int]]:
    if not path.exists():
        return {}
    # What a run that was killed had begun to write.
    repair_tail(path)
    known: dict[str, dict[str, int]] = {}
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        try:
            record: Any = json.loads(line)
            known[record["key"]] = dict(record["scores"])
        except (ValueError, KeyError, TypeError) as error:
            raise InputError(f"{path}:{number}: no verdict of a judge ({error})") from error
    return known
