"""Accuracy of short answers to questions about images, as the official evaluators of each data set define it.

VQAv2, OK-VQA and TextVQA: ten people answered each question; an answer scores min(1, matches / 3) against
nine of them, averaged over the ten ways to leave one out (Antol et al., arXiv 1505.00468, section 3.4).
Before that both sides are normalised; `normalise` follows the evaluator that the authors published, whose
oddities are part of the numbers that papers report. VizWiz's own normalises the answer alone, and always; GQA
asks for the one answer.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from statistics import fmean

_PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'
_COMMA_IN_NUMBER = re.compile(r"\d,\d")
_PERIOD = re.compile(r"\.(?!\d)")
_MAX_PERIODS = 32
"""The published evaluator passes a flag of the value 32 where the number of replacements is asked for."""
_ARTICLES = frozenset({"a", "an", "the"})
_NUMBERS = {
    word: str(number)
    for number, word in enumerate(
        ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
    )
} | {"none": "0"}
_CONTRACTIONS = """
ain't aren't can't could've couldn't couldn't've didn't doesn't don't hadn't hadn't've hasn't
haven't he'd he'd've he's how'd how'll how's isn't it'd it'd've it'll ma'am mightn't mightn't've
might've mustn't must've needn't not've o'clock oughtn't 'ow's'at shan't she'd've should've
shouldn't shouldn't've somebody'd've somebody'll somebody's someone'd someone'd've someone'll
someone's something'd something'd've something'll that's there'd there'd've there're there's
they'd they'd've they'll they're they've 'twas wasn't we'd've we've weren't what'll what're what's
what've when's where'd where's where've who'd who'd've who'll who's who've why'll why're why's
won't would've wouldn't wouldn't've y'all y'all'll y'all'd've you'd you'd've you'll you're you've
""".split()  # noqa: SIM905


def _without_one_apostrophe(word: str) -> list[str]:
    return [word[:i] + word[i + 1 :] for i, letter in enumerate(word) if letter == "'"]


# A contraction that lacks one apostrophe gets it back. Those that would be another word ("shed", "well",
# "id") are left alone by the evaluator, so they are missing above; "somebody'd" loses its apostrophe there.
_MENDED = {short: word for word in _CONTRACTIONS for short in _without_one_apostrophe(word)}
_MENDED["somebody'd"] = "somebodyd"


def normalise(answer: str) -> str:
    """An answer in the form in which answers are compared: lower case, no articles, numbers as digits."""
    return _words_normalised(_without_punctuation(_one_line(answer)))


def vqa_accuracy(answer: str, human_answers: Sequence[str]) -> float:
    """The official accuracy of one answer, from 0 to 1.

    Where all people agree, the published evaluator compares answers as they are; else it normalises both
    sides.

    Args:
        human_answers: of all people who were asked, ten in the published sets.

    Raises:
        ValueError: nobody was asked.
    """
    truth, found = [_one_line(text) for text in human_answers], _one_line(answer)
    if len(set(truth)) > 1:
        truth, found = [normalise(text) for text in truth], normalise(found)
    return _share_of_people(found, truth)


def vizwiz_accuracy(answer: str, human_answers: Sequence[str]) -> float:
    """`vqa_accuracy` as VizWiz's evaluator has it: the answer is normalised in any case, and compared with
    what people said as it stands in the file.
    """
    return _share_of_people(normalise(answer), human_answers)


def _share_of_people(found: str, truth: Sequence[str]) -> float:
    if not truth:
        raise ValueError("human_answers: found none, expected the answers of all people who were asked")
    matches = sum(text == found for text in truth)
    # Left out in turn: where a match is left out there is one match less.
    without_match, without_other = min(1.0, (matches - 1) / 3), min(1.0, matches / 3)
    return (matches * without_match + (len(truth) - matches) * without_other) / len(truth)


def mean_vqa_accuracy(
    answers: Sequence[str],
    human_answers: Sequence[Sequence[str]],
    accuracy: Callable[[str, Sequence[str]], float] = vqa_accuracy,
) -> float:
    """`vqa_accuracy`, or another, averaged over questions."""
    pairs = zip(answers, human_answers, strict=True)
    found = [accuracy(answer, people) for answer, people in pairs]
    return fmean(found) if found else 0.0


def exact_accuracy(answers: Sequence[str], truths: Sequence[str]) -> float:
    """Share of answers that are the truth, case and spaces at the ends aside (GQA)."""
    pairs = zip(answers, truths, strict=True)
    return (
        fmean(answer.strip().lower() == truth.strip().lower() for answer, truth in pairs) if answers else 0.0
    )


def released_clean_up(answer: str) -> str:
    """What the released code makes of a generated answer before it is normalised.

    It cuts at substrings, so "tennis racket" becomes "racket": only for numbers that were published with it.
    """
    answer = answer.replace('"', "").strip().split("\n")[0]
    answer = re.split(r"[.,!]", answer)[0].lower()
    for begin in ("is ", "are ", "a ", "an ", "the "):
        if begin in answer:
            answer = answer.split(begin)[1]
    for end in (" of", " or ", " and "):
        answer = answer.split(end)[0]
    return answer.strip()


def _one_line(text: str) -> str:
    return text.replace("\n", " ").replace("\t", " ").strip()


def _without_punctuation(text: str) -> str:
    """A sign is dropped where a space stands beside any of its kind, else it becomes a space."""
    has_number = _COMMA_IN_NUMBER.search(text) is not None
    found = text
    for sign in _PUNCTUATION:
        is_dropped = sign + " " in text or " " + sign in text or has_number
        found = found.replace(sign, "" if is_dropped else " ")
    return _PERIOD.sub("", found, count=_MAX_PERIODS)


def _words_normalised(text: str) -> str:
    words = (_NUMBERS.get(word, word) for word in text.lower().split())
    return " ".join(_MENDED.get(word, word) for word in words if word not in _ARTICLES)
