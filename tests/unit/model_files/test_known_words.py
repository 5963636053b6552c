"""What a model was not trained on is told, once; a model without a list knows everything."""

from __future__ import annotations

import logging

import pytest

from mm_interleaved.documents.document import Document, Text
from mm_interleaved.errors import ModelFileError
from mm_interleaved.generation.engine import InterleavedGenerator
from mm_interleaved.model_files.hashing import hash_model
from mm_interleaved.model_files.known_words import FILE_NAME, KnownWords
from mm_interleaved.model_files.resolve import find_model
from mm_interleaved.storyworld.tasks import TASKS, document
from tiny import tiny_model, tiny_processor


@pytest.mark.parametrize(
    ("text", "unknown"),
    [
        ("Gus, a red dog.", []),
        ("gus", ["gus"]),
        ("a dragon and a dragon", ["dragon", "and"]),
        ("red-dog", ["-"]),
        ("dog7", ["7"]),
        ("a_dog", ["_"]),
        ("Katze \N{CAT} 猫", ["Katze", "\N{CAT}", "猫"]),
        ("", []),
        (" \n\t", []),
    ],
)
def test_words_digits_and_marks_are_known_one_by_one(text, unknown):
    assert KnownWords.of_texts(["Gus is", "a red dog,", "Gus."]).unknown([text]) == unknown


def test_a_list_survives_the_disk(tmp_path):
    assert KnownWords.of_folder(tmp_path) is None
    words = KnownWords.of_texts(["Où est l'été? 7 \N{CAT}"])
    words.save(tmp_path)
    found = KnownWords.of_folder(tmp_path)
    assert found is not None and found.words == words.words
    (tmp_path / FILE_NAME).write_bytes(b"\xff\xfe")
    with pytest.raises(ModelFileError, match=FILE_NAME):
        KnownWords.of_folder(tmp_path)


def test_the_shipped_model_knows_its_world_and_nothing_else():
    words = KnownWords.of_folder(find_model("storyworld"))
    assert words is not None
    made = [document(split, 5, i, task) for split in ("train", "test") for task in TASKS for i in range(20)]
    texts = [part.text for each in made for part in (*each.parts, *each.target) if isinstance(part, Text)]
    assert words.unknown(texts) == []
    assert words.unknown(["Here is Gus, a tall unicorn."]) == ["tall", "unicorn"]


def test_the_list_is_no_part_of_what_decides_the_output(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    before = hash_model(tmp_path)
    KnownWords.of_texts(["a"]).save(tmp_path)
    assert hash_model(tmp_path) == before


def told(caplog) -> list[str]:
    """What we warned of; a library may warn of its own things."""
    ours = [record for record in caplog.records if record.name.startswith("mm_interleaved")]
    return [record.getMessage() for record in ours]


def test_each_word_and_size_is_warned_of_once(caplog):
    model = tiny_model()
    processor = tiny_processor(model.config)
    processor.known_words = KnownWords.of_texts(["a red dog"])
    generator = InterleavedGenerator(model, processor)
    fast = {"num_inference_steps": 1, "max_new_tokens": 1}
    with caplog.at_level(logging.WARNING):
        for text in ("a red fox", "a fox", "a red cat and a fox", "a red dog"):
            generator.generate(Document(id="a", parts=[Text(text)]), layout="I", height=64, **fast)
        generator.generate(Document(id="a", parts=[]), layout="I", negative_prompt="ugly dog", **fast)
    words = told(caplog)
    assert len(words) == 4
    assert "32 by 64 pixels" in words[0] and "32 by 32" in words[0]
    assert ": fox; it knows 3 words" in words[1] and ": cat, and;" in words[2] and ": ugly;" in words[3]


def test_a_model_without_a_list_says_nothing(caplog):
    model = tiny_model()
    generator = InterleavedGenerator(model, tiny_processor(model.config))
    generator.generate(Document(id="a", parts=[Text("a fox")]), layout="T", max_new_tokens=1)
    assert not told(caplog)
