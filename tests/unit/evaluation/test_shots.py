"""Few-shot prompts of an evaluation: which examples, and how they stand before the question."""

import json
from dataclasses import replace

import numpy as np
import pytest
from echo_generator import EchoGenerator
from echo_runs import echo_model, nothing

from mm_interleaved.documents.document import Image, Text
from mm_interleaved.errors import InputError
from mm_interleaved.evaluation.registry import make_task
from mm_interleaved.evaluation.runner import evaluate_model
from mm_interleaved.evaluation.shots import Shots, choose_examples, with_examples
from mm_interleaved.evaluation.tasks.storyworld import STORYWORLD
from mm_interleaved.runs.generate import ModelChoice, RunRequest
from mm_interleaved.storyworld.exports import write_storyworld


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("shots")
    for name, seed in (("asked", 1), ("pool", 2)):
        write_storyworld(folder / name, 12, seed, "test", "vqav2")
    write_storyworld(folder / "world", 60, 1, "test")
    return folder


def gold_of(data, name):
    return make_task("vqav2").read_gold(data / name)


def by_brightness(images):
    """An embedding in which images of like brightness are near."""
    angles = [np.asarray(image.load(), float).mean() / 255 for image in images]
    return np.array([[np.cos(angle), np.sin(angle)] for angle in angles])


def test_random_examples_are_a_function_of_seed_and_question_and_never_its_own_image(data):
    pool = gold_of(data, "pool")
    shots = Shots(count=3, source=data / "pool", seed=4)
    chosen = choose_examples(pool, pool, shots)
    pixels = {document.id: document.images[0].load().tobytes() for document in pool}
    for asked, names in chosen.items():
        assert len(set(names)) == 3
        assert all(pixels[name] != pixels[asked] for name in names)
    assert choose_examples(pool[5:6], pool, shots) == {pool[5].id: chosen[pool[5].id]}
    assert choose_examples(pool, pool, replace(shots, seed=5)) != chosen
    # The same picture in another file, under another id, is still the question's own.
    twin = replace(pool[0], id="twin", parts=tuple(
        Image(part.load()) if isinstance(part, Image) else part for part in pool[0].parts))  # fmt: skip
    few = Shots(count=len(pool) - 1, source=data / "pool")
    with pytest.raises(InputError, match=r"found \d+ examples for document 'twin', expected \d+ of its kind"):
        choose_examples([twin], [pool[0], twin], few)


def test_nearest_examples_stand_next_to_the_question(data):
    asked, pool = gold_of(data, "asked"), gold_of(data, "pool")
    shots = Shots(count=4, source=data / "pool", choice="nearest")
    chosen = choose_examples(asked, pool, shots, by_brightness)
    own = {d.id: np.asarray(d.images[0].load(), float).mean() for d in asked}
    names = {d.id: np.asarray(d.images[0].load(), float).mean() for d in pool}
    for key, found in chosen.items():
        distances = [abs(names[name] - own[key]) for name in found]
        assert distances == sorted(distances, reverse=True)
        others = [abs(value - own[key]) for name, value in names.items() if name not in found]
        assert min(others) >= distances[0]


def test_a_prompt_is_the_examples_with_their_answers_and_the_question(data):
    asked, pool = gold_of(data, "asked"), gold_of(data, "pool")
    questions = [replace(document, target=()) for document in asked]
    [prompt] = with_examples(questions[:1], pool, {questions[0].id: [pool[2].id, pool[1].id]})
    assert prompt.id == questions[0].id and prompt.target == () and prompt.layout == "T"
    answers = [pool[2].target[0].text + "\n", pool[1].target[0].text + "\n"]
    texts = [part.text for part in prompt.parts if isinstance(part, Text)]
    assert texts[2] == answers[0] and texts[5] == answers[1] and len(prompt.images) == 3
    assert prompt.parts[-len(questions[0].parts) :] == questions[0].parts
    assert prompt.meta == questions[0].meta


def test_examples_are_of_the_questions_task(data):
    documents = STORYWORLD.read_gold(data / "world")
    kind = {document.id: document.meta["task"] for document in documents}
    vqa = [document for document in documents if kind[document.id] == "vqa"]
    chosen = choose_examples(vqa, documents, Shots(count=2, source=data / "world"))
    assert {kind[name] for names in chosen.values() for name in names} == {"vqa"}


def test_an_evaluation_asks_after_examples_and_says_which(data, tmp_path):
    asked = []

    class Listening(EchoGenerator):
        def stream_batch(self, documents, settings):
            asked.extend(documents)
            yield from super().stream_batch(documents, settings)

    model = ModelChoice(name=str(echo_model(tmp_path)), device="cpu")
    request = RunRequest(documents=(), output=tmp_path / "out", model=model)
    shots = Shots(count=2, source=data / "pool", seed=7)
    task = make_task("vqav2")
    scores, failed = evaluate_model(
        task, data / "asked", request, nothing, load=lambda *_, **__: Listening(), shots=shots
    )
    assert failed == 0 and set(scores) == {"vqav2.accuracy"}
    assert len(asked) == 12 and all(len(document.images) == 3 for document in asked)
    record = json.loads((tmp_path / "out" / "evaluation.json").read_text())
    assert record["shots"]["count"] == 2 and record["shots"]["choice"] == "random"
    assert set(record["shots"]["examples"]) == {document.id for document in asked}
    assert record["prompt"].count("<image>") == 3
