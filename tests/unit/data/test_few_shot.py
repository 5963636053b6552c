"""Few-shot documents: several of one task in one prompt."""

import pytest

from corpora import pair, picture
from mm_interleaved.data.few_shot import FewShot, group_documents, merge_documents
from mm_interleaved.documents.document import Document, Image, Text
from mm_interleaved.seeded_random import SeededRandom
from mm_interleaved.tokens.sequence import encode_document


def question(name, words, answer, role=None):
    answering = "assistant" if role else None
    return Document(
        id=name,
        parts=(picture(), Text(words, role=role)),
        target=(Text(answer, role=answering),),
        meta={"task": "vqa"},
    )


def counted(document, vocabulary):
    sequence = encode_document(document, vocabulary, eos=True, include_target=True)
    return vocabulary.decode(sequence.input_ids[sequence.text_is_target]), sequence


def test_merged_pairs_are_one_document_with_one_end_and_all_their_words_count(byte_level_vocabulary):
    merged = merge_documents([pair("a", "one"), pair("b", "two"), pair("c", "three")])
    assert [type(part) for part in merged.parts] == [Image, Text] * 3
    assert merged.id == "a+b+c"
    text, sequence = counted(merged, byte_level_vocabulary)
    assert text == "one\ntwo\nthree"
    assert (sequence.input_ids == byte_level_vocabulary.bos).sum() == 1
    assert (sequence.input_ids == byte_level_vocabulary.eos).sum() == 1
    # The second picture is announced by the first pair, so it counts; the first is not.
    assert sequence.image_is_target.tolist() == [False, True, True]


def test_of_merged_questions_the_examples_are_answered_and_the_last_answer_alone_counts(
    byte_level_vocabulary,
):
    merged = merge_documents([question("a", "How many?", "seven"), question("b", "Where?", "here")])
    assert [part.text for part in merged.parts if isinstance(part, Text)] == [
        "How many?",
        "seven\n",
        "Where?",
    ]
    text, sequence = counted(merged, byte_level_vocabulary)
    assert text == "here" and not sequence.image_is_target.any()


def test_merged_conversations_keep_their_turns_and_say_the_system_sentence_once(byte_level_vocabulary):
    system = Text("Be kind.", role="system")
    talks = [question(name, "What?", answer, role="user") for name, answer in (("a", "7"), ("b", "8"))]
    talks = [Document(id=t.id, parts=(system, *t.parts), target=t.target) for t in talks]
    merged = merge_documents(talks)
    roles = [part.role for part in merged.parts]
    assert roles == ["system", None, "user", "assistant", None, "user"]
    assert counted(merged, byte_level_vocabulary)[0] == "8"


def test_groups_lose_no_document_and_hold_one_task_each():
    documents = [
        Document(id=str(i), parts=(Text("x"),), meta={"task": "abc"[i % 3] if i % 5 else "d"})
        for i in range(97)
    ]
    groups = group_documents(documents, FewShot(share=0.5), SeededRandom(1))
    assert sorted(d.id for group in groups for d in group) == sorted(d.id for d in documents)
    assert all(len({d.meta["task"] for d in group}) == 1 for group in groups)
    sizes = {len(group) for group in groups}
    assert {1, 2, 8} <= sizes and max(sizes) == 8
    assert group_documents(documents, FewShot(share=0.5), SeededRandom(1)) == groups
    assert group_documents(documents, None, SeededRandom(1)) == [(d,) for d in documents]


def test_documents_with_and_without_target_or_roles_are_not_merged():
    kinds = [question("q", "What?", "7"), question("t", "What?", "7", role="user"), pair("p")]
    kinds = [Document(id=k.id, parts=k.parts, target=k.target) for k in kinds]
    groups = group_documents(kinds * 2, FewShot(share=1.0, max_documents=2), SeededRandom(1))
    assert sorted([d.id for d in group] for group in groups) == [["p", "p"], ["q", "q"], ["t", "t"]]


def test_a_quarter_of_the_documents_begins_a_group():
    groups = group_documents([pair(str(i)) for i in range(6000)], FewShot(), SeededRandom(3))
    assert sum(len(group) > 1 for group in groups) / len(groups) == pytest.approx(0.25, abs=0.03)


@pytest.mark.parametrize("wrong", [{"share": 1.5}, {"min_documents": 1}, {"min_documents": 9}])
def test_impossible_groups_are_refused(wrong):
    with pytest.raises(ValueError, match="expected"):
        FewShot(**wrong)
