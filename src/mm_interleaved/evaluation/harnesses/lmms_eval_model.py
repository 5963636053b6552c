"""Our models for lmms-eval 0.7: `lmms-eval --model mm_interleaved --tasks ...`.

lmms-eval's requests -> documents -> answers -> the strings that its tasks read

Imported by lmms-eval alone, which names it from `lmms_eval_manifest`.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from lmms_eval.api.instance import GenerationResult, Instance
from lmms_eval.api.model import lmms
from tqdm import tqdm

from mm_interleaved.documents.document import Document, Image
from mm_interleaved.errors import InputError, MMInterleavedError, UsageError
from mm_interleaved.evaluation.harnesses.answers import Asked, named
from mm_interleaved.evaluation.harnesses.documents import document_of_context, document_of_messages
from mm_interleaved.evaluation.harnesses.harness_model import HarnessModel
from mm_interleaved.evaluation.harnesses.settings import (
    generation_settings,
    layout_of_task,
    stop_texts,
)

MAX_ROUNDS = 64
"""After so many rounds a task that says no end is taken for one that has none."""
_TAGGED = re.compile(r"\[GEN_PROMPT\](.*?)\[/GEN_PROMPT\].*?\[QUESTION\](.*?)\[/QUESTION\]", re.DOTALL)


class Request(NamedTuple):
    """What one request of lmms-eval says, whichever form it has."""

    task: str
    split: str
    doc_id: int
    repetition: int
    """How often the same was asked before in this call: each time is sampled anew."""
    record: Any
    """The record of the task's data."""
    context: str
    given: dict[str, Any]
    """The task's generation settings, in lmms-eval's words."""
    ask: Callable[..., Any]
    """The task's function of the record: its visuals, or its messages."""
    text_of_round: Callable[..., Any] | None = None
    """The task's function of record and round, in tasks of several rounds."""

    @property
    def key(self) -> str:
        repeated = f", repetition {self.repetition}" if self.repetition else ""
        return f"task {self.task}, document {self.doc_id}{repeated}"


class Weighed(tuple[float, bool], GenerationResult):  # pyright: ignore[reportUntypedBaseClass]
    """(loss, whether it is what is written greedily), as a pair and as a result whose `text` is the pair.

    lmms-eval 0.7 makes text of every plain pair that a model returns, and its metrics, which want the pair
    back, fail; of a result it takes the `text` as it is.
    """

    def __new__(cls, pair: tuple[float, bool]):
        return super().__new__(cls, pair)

    def __init__(self, pair: tuple[float, bool]):
        GenerationResult.__init__(self, text=pair)


class _MMInterleaved(lmms):  # pyright: ignore[reportUntypedBaseClass]
    """What both forms have in common.

    Args:
        pretrained, device, dtype, batch_size, conversation, settings: see `HarnessModel`.
        output_image_dir: folder for generated images.
        max_batch_size: lmms-eval's; `auto` here is a fixed size.
    """

    def __init__(
        self,
        pretrained: str = "storyworld",
        device: str | None = None,
        dtype: str = "auto",
        batch_size: int | str = 1,
        max_batch_size: int | None = None,
        output_image_dir: str = "logs/mm_interleaved_images",
        conversation: bool | None = None,
        **settings: Any,
    ) -> None:
        super().__init__()
        self.ours = HarnessModel(
            pretrained,
            device=device,
            dtype=dtype,
            batch_size=batch_size,
            images=output_image_dir,
            conversation=conversation,
            settings=settings,
        )
        self.device = self.ours.generator.model.device

    def clean(self):
        """Called when all is answered, before judges are asked."""
        self.ours.unload()
        super().clean()

    # ---- What the two forms differ in ------------------------------------------------------------

    def _read(self, instance: Instance, repetition: int) -> Request:
        raise NotImplementedError

    def _document(self, request: Request, is_conversation: bool) -> Document:
        raise NotImplementedError

    def _next_round(self, request: Request, number: int, said: list[str], info: Any) -> tuple[Any, ...]:
        """(the next question or None, whether the task has ended, the answers so far, the task's notes)."""
        raise NotImplementedError

    # ---- lmms-eval's interface -------------------------------------------------------------------

    def generate_until(self, requests: Sequence[Instance]) -> list[str]:
        """An answer each: its text, or `{"text", "images"}` as JSON where the layout has images."""
        read = self._read_all(requests)
        return self._answers(read, [self._asked(request) for request in read])

    def generate_until_multi_round(self, requests: Sequence[Instance]) -> list[list[str]]:
        """The answers of all rounds, for each; what the task makes of an answer is the next question."""
        read = self._read_all(requests)
        said: list[list[str]] = [[] for _ in read]
        infos: list[Any] = [None] * len(read)
        waiting = {place: self._asked(request) for place, request in enumerate(read)}
        for number in range(1, MAX_ROUNDS + 1):
            answers = self._answers([read[place] for place in waiting], list(waiting.values()))
            for place, answer in zip(waiting, answers, strict=True):
                said[place] = [*said[place], answer]
            still: dict[int, Asked] = {}
            for place in waiting:
                request = read[place]
                question, has_ended, so_far, infos[place] = self._next_round(
                    request, number, said[place], infos[place]
                )
                said[place] = said[place] if so_far is None else list(so_far)
                if not has_ended:
                    still[place] = self._asked(question)
            if not still:
                return said
            waiting = still
        raise InputError(f"{read[min(waiting)].key}: its task asked on after {MAX_ROUNDS} rounds")

    def loglikelihood(self, requests: Sequence[Instance]) -> list[Weighed]:
        """(loss, whether it is what is written greedily) of each continuation."""
        raise UsageError(
            "this task weighs continuations, which lmms-eval asks of simple models alone: add --force_simple"
        )

    # ---- How ------------------------------------------------------------------------------------

    def _read_all(self, requests: Sequence[Instance]) -> list[Request]:
        seen: Counter[int] = Counter()
        read = []
        for instance in requests:
            # `--repeats` hands over the same object several times.
            read.append(self._read(instance, seen[id(instance)]))
            seen[id(instance)] += 1
        return read

    def _settings(self, request: Request) -> dict[str, Any]:
        asked = generation_settings(request.given)
        return {"layout": layout_of_task(request.task), **self.ours.settings, **asked}

    def _asked(self, request: Request) -> Asked:
        settings = self._settings(request)
        document = self._document(request, self.ours.is_conversation(settings["layout"]))
        return Asked(document=document, settings=settings, until=stop_texts(request.given))

    def _answers(self, read: Sequence[Request], asked: Sequence[Asked]) -> list[str]:
        answers = self.ours.answer(asked, quiet=self.rank != 0)
        return [
            self.ours.written(parts, each.settings["layout"], request.task, str(request.doc_id))
            for parts, each, request in zip(answers, asked, read, strict=True)
        ]


class MMInterleavedChat(_MMInterleaved):
    """Asked by messages, whose order of texts and images is kept."""

    is_simple = False

    def _read(self, instance: Instance, repetition: int) -> Request:
        context, ask, given, doc_id, task, split = instance.args
        record = self.task_dict[task][split][doc_id]
        return Request(task, split, doc_id, repetition, record, context, given, ask)

    def _document(self, request: Request, is_conversation: bool) -> Document:
        return document_of_messages(request.ask(request.record), request.key, is_conversation=is_conversation)

    def _next_round(self, request: Request, number: int, said: list[str], info: Any) -> tuple[Any, ...]:
        messages, has_ended, so_far, info = request.ask(
            request.record, round_idx=number, previous_output=said, previous_round_info=info
        )
        return request._replace(ask=lambda _: messages), has_ended, so_far, info


class MMInterleavedSimple(_MMInterleaved):
    """Asked by a context and its visuals; the only form of tasks that weigh continuations."""

    is_simple = True

    def _read(self, instance: Instance, repetition: int) -> Request:
        context, given, ask, *rounds, doc_id, task, split = instance.args
        record = self.task_dict[task][split][doc_id]
        return Request(task, split, doc_id, repetition, record, context, given, ask, *rounds)

    def _document(self, request: Request, is_conversation: bool) -> Document:
        visuals = request.ask(request.record) if request.ask is not None else None
        return document_of_context(request.context, visuals, request.key, is_conversation=is_conversation)

    def _next_round(self, request: Request, number: int, said: list[str], info: Any) -> tuple[Any, ...]:
        assert request.text_of_round is not None, "tasks of several rounds hand it over"
        visuals, context, has_ended, so_far, info = request.text_of_round(
            request.record, round_idx=number, previous_output=said, previous_round_info=info
        )
        return request._replace(ask=lambda _: visuals, context=context), has_ended, so_far, info

    def loglikelihood(self, requests: Sequence[Instance]) -> list[Weighed]:
        """(loss, whether it is what is written greedily) of each continuation.

        The loss is the mean of the negative log-probabilities of its tokens. lmms-eval's text asks for the
        log-probability itself, but its metrics choose the smallest, and its own models return this.

        Continuations of one context are weighed together, its images read once. The blank before one is left
        out where it begins an assistant's turn.
        """
        groups: dict[tuple[Any, ...], list[int]] = {}
        for place, instance in enumerate(requests):
            context, *_, doc_id, task, split = instance.args if len(instance.args) > 2 else ("", "", "", "")
            groups.setdefault((task, split, doc_id, context), []).append(place)
        found: dict[int, Weighed] = {}
        for places in tqdm(groups.values(), desc="mm-interleaved", unit="context", disable=self.rank != 0):
            weighed = self._weighed([requests[place] for place in places])
            found |= zip(places, weighed, strict=True)
        return [found[place] for place in range(len(requests))]

    def _weighed(self, together: Sequence[Instance]) -> list[Weighed]:
        is_conversation = self.ours.is_conversation("T")
        if len(together[0].args) == 2:  # how likely choices are without any question
            document, key, is_conversation = Document(id="no question"), "a choice alone", False
            texts = [instance.args[1] for instance in together]
        else:
            context, _, ask, doc_id, task, split = together[0].args
            record = self.task_dict[task][split][doc_id]
            key = f"task {task}, document {doc_id}"
            visuals = None if ask is None else ask(record)
            document = document_of_context(context, visuals, key, is_conversation=is_conversation)
            given = (instance.args[1] for instance in together)
            texts = [str(each(record)) if callable(each) else each for each in given]
        if is_conversation:
            texts = [text.lstrip(" ") for text in texts]
        generator = self.ours.generator
        try:
            found = generator.likelihoods(document, texts)
        except MMInterleavedError as error:
            raise named(error, key) from error
        lengths = [len(generator.processor.vocabulary.encode_text(text)) for text in texts]
        return [
            Weighed((-score / max(1, length), is_greedy))
            for (score, is_greedy), length in zip(found, lengths, strict=True)
        ]

    def generate_visual_cot(self, requests: Sequence[Instance]) -> list[str]:
        """An image that helps to answer, then the answer by the given images and this one."""
        drawn, answered = [], []
        for request in self._read_all(requests):
            tagged = _TAGGED.search(request.context)
            prompt, question = tagged.groups() if tagged else (request.context, request.context)
            drawn.append(request._replace(context=prompt.replace("{question}", question).strip()))
            answered.append(request._replace(context=question.strip()))
        wanted = [self._settings(request) | {"layout": "I"} for request in drawn]
        asked = [
            Asked(document=self._document(request, self.ours.is_conversation("I")), settings=settings)
            for request, settings in zip(drawn, wanted, strict=True)
        ]
        answers = self.ours.answer(asked, quiet=self.rank != 0)
        for place, parts in enumerate(answers):
            self.ours.written(parts, "I", drawn[place].task, f"{drawn[place].doc_id}_aid")
            aids = [part.source for part in parts if isinstance(part, Image)]
            answered[place] = answered[place]._replace(
                ask=lambda record, own=drawn[place], aids=aids: [*_listed(own, record), *aids]
            )
        return self._answers(answered, [self._asked(request) for request in answered])


def _listed(request: Request, record: Any) -> list[Any]:
    visuals = None if request.ask is None else request.ask(record)
    return list(visuals) if isinstance(visuals, list | tuple) else [] if visuals is None else [visuals]
