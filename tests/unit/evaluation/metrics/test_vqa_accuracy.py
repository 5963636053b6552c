"""Accuracies of short answers, against cases counted by hand."""

import pytest

from mm_interleaved.evaluation.metrics.vqa import (
    exact_accuracy,
    mean_vqa_accuracy,
    normalise,
    released_clean_up,
    vizwiz_accuracy,
    vqa_accuracy,
)


@pytest.mark.parametrize(
    ("matches", "accuracy"),
    # (matches * min(1, (matches - 1) / 3) + (10 - matches) * min(1, matches / 3)) / 10
    [(0, 0.0), (1, 0.3), (2, 0.6), (3, 0.9), (4, 1.0), (10, 1.0)],
)
def test_each_person_is_left_out_once(matches, accuracy):
    people = ["red"] * matches + [f"colour {number}" for number in range(10 - matches)]
    assert vqa_accuracy("red", people) == pytest.approx(accuracy)


def test_answers_are_normalised_where_people_differ():
    people = ["2", "2", "2.", "two", *["a dog"] * 6]
    # Both sides are normalised, so four people said 2.
    assert vqa_accuracy("Two.", people) == 1.0
    assert vqa_accuracy("the 2", people) == 1.0
    assert vqa_accuracy("dog", people) == 1.0
    assert vqa_accuracy("the dog", ["A dog"] * 2 + ["cat"] * 8) == pytest.approx(0.6)
    # Where all agree, nothing is normalised.
    assert vqa_accuracy("Yes", ["yes"] * 10) == 0.0
    assert vqa_accuracy("yes\n", ["yes"] * 10) == 1.0


def test_vizwiz_normalises_the_answer_alone_and_always():
    assert vizwiz_accuracy("Unanswerable.", ["unanswerable"] * 10) == 1.0
    assert vizwiz_accuracy("unanswerable", ["Unanswerable"] * 10) == 0.0
    assert vizwiz_accuracy("two", ["2"] * 2 + ["two"] * 8) == pytest.approx(0.6)


@pytest.mark.parametrize(
    ("answer", "normal"),
    [
        ("The Dog", "dog"),
        ("an  apple a day", "apple day"),
        ("none", "0"),
        ("TEN men", "10 men"),
        ("dont", "don't"),
        ("couldn'tve", "couldn't've"),
        ("its", "its"),
        ("shed", "shed"),
        ("somebody'd", "somebodyd"),
        ("1,000", "1000"),
        ("red/blue", "red blue"),
        ("red / blue", "red blue"),
        ("red / blue/green", "red bluegreen"),
        ("2.5", "2.5"),
        ("U.S.", "us"),
        ("what?", "what"),
        ("a\tb\nc", "b c"),
        ("", ""),
    ],
)
def test_normal_form(answer, normal):
    assert normalise(answer) == normal


@pytest.mark.parametrize(
    ("answer", "cleaned"),
    [
        ('"A cat."', "cat"),
        ("tennis racket", "racket"),
        ("a glass of water", "glass"),
        ("red and blue", "red"),
        ("yes, it is", "yes"),
        ("dog\ncat", "dog"),
        # A space before the sign at which it is cut makes "a " of the end of a word.
        ("sofa .", ""),
        ("there are  some", "some"),
    ],
)
def test_the_released_clean_up_cuts_at_substrings(answer, cleaned):
    assert released_clean_up(answer) == cleaned


def test_means_over_questions():
    people = [["red"] * 10, ["1"] * 3 + ["2"] * 7]
    assert mean_vqa_accuracy(["red", "1"], people) == pytest.approx((1 + 0.9) / 2)
    assert mean_vqa_accuracy([], []) == 0.0
    with pytest.raises(ValueError, match="expected the answers of all people"):
        vqa_accuracy("red", [])
    assert exact_accuracy([" Red ", "no"], ["red", "yes"]) == 0.5
