"""Captions against reference captions: BLEU, METEOR, ROUGE-L, CIDEr and SPICE, by pycocoevalcap.

That package (extra `eval`) is the evaluator of the COCO caption server in Python. Its tokenizer and METEOR
are Java programs in its wheel; SPICE needs models that the wheel has not, and counts where they are.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path
from typing import Any

from mm_interleaved.errors import UsageError

METRICS = ("BLEU-1", "BLEU-2", "BLEU-3", "BLEU-4", "METEOR", "ROUGE-L", "CIDEr")
"""By default; `SPICE` may be asked for besides."""
_SPICE_MODELS = ("stanford-corenlp-3.6.0.jar", "stanford-corenlp-3.6.0-models.jar")


def caption_scores(
    captions: Mapping[str, str], references: Mapping[str, Sequence[str]], metrics: Sequence[str] = METRICS
) -> dict[str, float]:
    """The official scores, as the server gives them: 0 to 1, CIDEr 0 to 10.

    Args:
        captions: one of each image, by the image's id; an empty one scores nothing.
        references: of each image, at least one.
        metrics: which of them; METEOR takes most of the time.

    Raises:
        ValueError: ids that do not match, or an image without references.
        UsageError: pycocoevalcap or Java is not installed; an unknown metric.
    """
    _check(captions, references)
    unknown = [name for name in metrics if name not in (*METRICS, "SPICE")]
    if unknown:
        raise UsageError(f"metrics: found {unknown[0]!r}, expected some of {', '.join((*METRICS, 'SPICE'))}")
    if "SPICE" in metrics and not spice_is_here():
        raise UsageError(
            "SPICE: pycocoevalcap has not got its models, expected Stanford CoreNLP 3.6.0 in its spice/lib"
        )
    truth, found = tokenized(references), tokenized({key: [text] for key, text in captions.items()})
    # pycocoevalcap prints while it computes.
    with redirect_stdout(StringIO()):
        scores: dict[str, float] = dict(zip(METRICS, _bleu(truth, found), strict=False))
        for name, (module, scorer) in _SCORERS.items():
            if name in metrics:
                scores[name] = float(_scorer(module, scorer).compute_score(truth, found)[0])
    return {name: scores[name] for name in metrics}


def spice_is_here() -> bool:
    """Whether pycocoevalcap has the models of SPICE (`python -m pycocoevalcap.spice.get_stanford_models`);
    without them it would begin to fetch them.
    """
    from importlib.util import find_spec

    package = find_spec("pycocoevalcap")
    folders = (
        []
        if package is None
        else [Path(place, "spice", "lib") for place in package.submodule_search_locations or ()]
    )
    return any(all((folder / name).is_file() for name in _SPICE_MODELS) for folder in folders)


def tokenized(texts: Mapping[str, Sequence[str]]) -> dict[str, list[str]]:
    """Texts as the Penn Treebank tokenizer splits them: lower case, without punctuation."""
    if shutil.which("java") is None:
        raise UsageError(
            "caption metrics: Java is not installed; their tokenizer and METEOR are Java programs"
        )
    tokenizer = _scorer("tokenizer.ptbtokenizer", "PTBTokenizer")
    # Line breaks would count as the border of a text.
    lines = {key: [{"caption": " ".join(text.split())} for text in some] for key, some in texts.items()}
    return tokenizer.tokenize(lines)


_SCORERS = {
    "METEOR": ("meteor.meteor", "Meteor"),
    "ROUGE-L": ("rouge.rouge", "Rouge"),
    "CIDEr": ("cider.cider", "Cider"),
    "SPICE": ("spice.spice", "Spice"),
}


def _bleu(truth: Mapping[str, list[str]], found: Mapping[str, list[str]]) -> list[float]:
    return [float(value) for value in _scorer("bleu.bleu", "Bleu", 4).compute_score(truth, found)[0]]


def _scorer(module: str, name: str, *arguments: Any) -> Any:
    from importlib import import_module

    try:
        return getattr(import_module(f"pycocoevalcap.{module}"), name)(*arguments)
    except ImportError as error:
        raise UsageError(
            "caption metrics need pycocoevalcap: pip install 'mm-interleaved[eval]' (or the package alone)"
        ) from error


def _check(captions: Mapping[str, str], references: Mapping[str, Sequence[str]]) -> None:
    differing = sorted(captions.keys() ^ references.keys())
    if differing:
        raise ValueError(f"ids: {differing[0]!r} is on one side alone ({len(differing)} such ids)")
    bare = [key for key, texts in references.items() if not texts]
    if bare or not captions:
        raise ValueError(
            f"references: found none of {bare[0] if bare else 'any image'!r}, expected one or more"
        )
