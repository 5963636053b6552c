"""The joint with pycocoevalcap: its own scores, and what is said where it is not installed."""

import importlib
import importlib.util
import shutil

import pytest

from mm_interleaved.errors import UsageError
from mm_interleaved.evaluation.metrics.captions import METRICS, caption_scores

REFERENCES = {
    "a": ["A red dog stands on the left.", "The dog, which is red, stands."],
    "b": ["A green duck waves.", "A duck in green waves at us."],
}
needs_package = pytest.mark.skipif(
    shutil.which("java") is None or not importlib.util.find_spec("pycocoevalcap"),
    reason="pycocoevalcap and Java are not installed",
)


@needs_package
def test_scores_are_those_of_the_package():
    from pycocoevalcap.bleu.bleu import Bleu
    from pycocoevalcap.cider.cider import Cider
    from pycocoevalcap.rouge.rouge import Rouge

    captions = {"a": "A red dog stands.", "b": "A green DUCK waves!"}
    found = caption_scores(captions, REFERENCES)
    words = {"a": ["a red dog stands"], "b": ["a green duck waves"]}
    truth = {
        "a": ["a red dog stands on the left", "the dog which is red stands"],
        "b": ["a green duck waves", "a duck in green waves at us"],
    }
    assert list(found) == list(METRICS)
    assert [found[f"BLEU-{n}"] for n in (1, 2, 3, 4)] == pytest.approx(Bleu(4).compute_score(truth, words)[0])
    assert found["CIDEr"] == pytest.approx(Cider().compute_score(truth, words)[0])
    assert found["ROUGE-L"] == pytest.approx(Rouge().compute_score(truth, words)[0])
    assert 0 < found["METEOR"] <= 1


@needs_package
def test_perfect_and_empty_captions():
    perfect = {key: texts[0] for key, texts in REFERENCES.items()}
    scores = caption_scores(perfect, REFERENCES, ["BLEU-4", "ROUGE-L"])
    assert scores == pytest.approx({"BLEU-4": 1.0, "ROUGE-L": 1.0})
    scores = caption_scores({"a": "", "b": ""}, REFERENCES, ["ROUGE-L", "CIDEr"])
    assert scores == {"ROUGE-L": 0.0, "CIDEr": 0.0}


def test_what_is_missing_is_named(monkeypatch):
    with pytest.raises(ValueError, match="'b' is on one side alone"):
        caption_scores({"a": "x"}, REFERENCES)
    with pytest.raises(ValueError, match="references: found none of 'a'"):
        caption_scores({"a": "x"}, {"a": []})
    with pytest.raises(UsageError, match="metrics: found 'BLUE'"):
        caption_scores({"a": "x"}, {"a": ["x"]}, ["BLUE"])

    def is_not_there(name):
        raise ImportError(name)

    monkeypatch.setattr(importlib, "import_module", is_not_there)
    monkeypatch.setattr(shutil, "which", lambda name: "/usr/bin/java")
    with pytest.raises(UsageError, match=r"mm-interleaved\[eval\]"):
        caption_scores({"a": "x"}, {"a": ["x"]})
    monkeypatch.setattr(shutil, "which", lambda name: None)
    with pytest.raises(UsageError, match="Java is not installed"):
        caption_scores({"a": "x"}, {"a": ["x"]})
