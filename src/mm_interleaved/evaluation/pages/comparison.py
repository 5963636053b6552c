"""The page that compares evaluations: scores with intervals, what each loses, the same prompts side by side.

Its filters are plain form fields and rules of style, so that the page needs no script.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from mm_interleaved.documents.document import Document
from mm_interleaved.evaluation.answers import parts_of
from mm_interleaved.evaluation.cases import document_score, group_of, is_lower_better
from mm_interleaved.evaluation.comparison import RESAMPLES, Comparison, Row, Run, differ
from mm_interleaved.evaluation.metrics.confidence import Interval
from mm_interleaved.evaluation.metrics.confusion import Confusion
from mm_interleaved.evaluation.pages.markup import (
    NONE,
    cell,
    name_text,
    number_text,
    page,
    parts_markup,
    percent,
    side,
    table,
    text_of,
    words_of_name,
)
from mm_interleaved.evaluation.pages.plots import is_plotted, mark, plot

MAX_SHOWN = 96
"""Documents on the page, over all groups."""
_MIN_SHOWN = 4
_HELD_OUT = "held_out."
_UP, _DOWN = "\N{BLACK UP-POINTING TRIANGLE}", "\N{BLACK DOWN-POINTING TRIANGLE}"


def comparison_page(comparison: Comparison) -> bytes:
    """The page, UTF-8."""
    names = ", ".join(run.name for run in comparison.runs)
    groups = _groups(comparison)
    sections = (
        ("runs", "Runs", _runs(comparison)),
        ("scores", "Scores", _scores(comparison)),
        ("lost", "What is lost", _lost(comparison.runs)),
        ("documents", "The same prompts", _documents(comparison, groups)),
    )
    made_by = f"{comparison.task.name}, {len(comparison.gold)} documents: {names}"
    return page("Comparison of evaluations", made_by, sections, _filter_rules(len(groups)))


# ---- Runs and scores ----


def _runs(comparison: Comparison) -> str:
    heads = ["run", "model", "settings", "answered", "seconds"]
    rows = []
    for k, run in enumerate(comparison.runs):
        settings = ", ".join(f"{name} = {value}" for name, value in run.record.settings.items())
        seconds = run.record.seconds
        cells = [
            cell(text_of(run.record.model or "none: answers that were there")),
            cell(text_of(settings or "the model's own")) if run.record.model else NONE,
            cell(f"{len(run.predictions)} of {len(comparison.gold)}"),
            NONE if seconds is None else cell(f"{seconds:.0f}"),
        ]
        rows.append((_run_name(k, run), cells))
    return table("What is compared", heads, rows)


def _run_name(k: int, run: Run) -> str:
    return f"{mark(k)} {name_text(run.name)}"


def _scores(comparison: Comparison) -> str:
    main = [row for row in comparison.rows if not row.metric.startswith(_HELD_OUT)]
    held_out = [row for row in comparison.rows if row not in main]
    first = comparison.runs[0].name
    note = (
        f"In brackets: 95 % of {RESAMPLES:,} bootstrap resamples of the documents; differences are of the "
        f"same resamples (paired). {_UP} better and {_DOWN} worse than {first}: the interval of the "
        "difference leaves 0 out. No bracket: a score of the set as a whole, or of one document."
    )
    names = [run.name for run in comparison.runs]
    plotted = [(row.metric, row.values, row.intervals) for row in main if is_plotted(row.values)]
    drawn = plot(plotted, names) if plotted else ""
    more = ""
    if held_out:
        inner = _score_table("Held-out combinations", held_out, comparison.runs)
        more = f"<details><summary>Held-out: what training never shows</summary>{inner}</details>"
    return f'{drawn}<p class="note">{text_of(note)}</p>{_score_table("Metrics", main, comparison.runs)}{more}'


def _score_table(caption: str, rows: Sequence[Row], runs: Sequence[Run]) -> str:
    heads = ["metric", "documents", *(_run_name(k, run) for k, run in enumerate(runs))]
    heads += [f"{name_text(run.name)}<br>less {name_text(runs[0].name)}" for run in runs[1:]]
    lines = []
    for row in rows:
        metric = row.metric.removeprefix(_HELD_OUT)
        documents = NONE if row.num_documents is None else cell(str(row.num_documents))
        values = [_value_cell(*pair) for pair in zip(row.values, row.intervals, strict=True)]
        differences = [
            _difference_cell(row.metric, value, row.values[0], difference)
            for value, difference in zip(row.values[1:], row.differences[1:], strict=True)
        ]
        lines.append((text_of(metric), [documents, *values, *differences]))
    return table(caption, heads, lines)


def _value_cell(value: float | None, interval: Interval | None) -> str:
    if value is None:
        return NONE
    return cell(number_text(value) + ("" if interval is None else _bounds(interval)))


def _bounds(interval: Interval) -> str:
    return f" <small>[{_signed(interval.low)}, {_signed(interval.high)}]</small>"


def _signed(value: float) -> str:
    return number_text(value).replace("-", "\N{MINUS SIGN}")


def _difference_cell(metric: str, value: float | None, first: float | None, found: Interval | None) -> str:
    if value is None or first is None:
        return NONE
    text = _signed(value - first)
    if found is None:
        return cell(text)
    is_sure = found.low > 0 or found.high < 0
    if not is_sure:
        return cell(text + _bounds(found))
    is_better = (found.mean > 0) != is_lower_better(metric)
    word, sign = ("better", _UP) if is_better else ("worse", _DOWN)
    said = f'<span role="img" aria-label="{word}">{sign}</span>'
    return cell(f'<span class="{word}">{said} {text}</span>{_bounds(found)}')


# ---- What is lost ----


def _lost(runs: Sequence[Run]) -> str:
    """Shares by task and attribute, a column a run; where runs lose most otherwise comes first."""
    shares: dict[tuple[str, str], list[Confusion | None]] = {}
    for k, run in enumerate(runs):
        for each in run.confusions:
            shares.setdefault((each.task, each.attribute), [None] * len(runs))[k] = each
    if not shares:
        return ""

    def spread(key: tuple[str, str]) -> float:
        found = [each for each in shares[key] if each is not None and each.cases]
        shares_of = [each.lost for each in found]
        return (max(shares_of) - min(shares_of)) * max(each.cases for each in found) if found else 0.0

    lines = []
    for key in sorted(shares, key=lambda key: (-spread(key), key)):
        cells = [
            NONE
            if each is None or not each.cases
            else cell(f"{percent(each.lost)} <small>of {each.cases}</small>", share=each.lost)
            for each in shares[key]
        ]
        if any(each is not None and each.lost for each in shares[key]):
            lines.append((f"{words_of_name(key[0])}: {words_of_name(key[1])}", cells))
    if not lines:
        return '<p class="note">Nothing is lost in any run.</p>'
    heads = ["task: attribute", *(_run_name(k, run) for k, run in enumerate(runs))]
    note = "Share of cases that were read otherwise than they should be; what no run loses is left out."
    return f'<p class="note">{note}</p>' + table("Which attribute is lost, by run", heads, lines)


# ---- The same prompts ----


def _groups(comparison: Comparison) -> Mapping[str, list[int]]:
    """Places of the gold documents of each group: first those on which runs differ most."""
    groups: dict[str, list[int]] = {}
    for place, document in enumerate(comparison.gold):
        groups.setdefault(group_of(comparison.task, document), []).append(place)

    def spread(place: int) -> float:
        scores = [document_score(run.cases[place]) for run in comparison.runs]
        known = [score for score in scores if score is not None]
        return max(known) - min(known) if known else 0.0

    number = max(_MIN_SHOWN, MAX_SHOWN // len(groups)) if groups else 0
    return {
        name: sorted(places, key=lambda place: (-spread(place), place))[:number]
        for name, places in sorted(groups.items())
    }


def _documents(comparison: Comparison, groups: Mapping[str, Sequence[int]]) -> str:
    shown = sum(map(len, groups.values()))
    note = f"{shown} of {len(comparison.gold)} documents, of each task first those on which runs differ most."
    cards = "".join(
        _card(comparison, place, number) for number, places in enumerate(groups.values()) for place in places
    )
    return f'{_filters(list(groups))}<p class="note">{note}</p>{cards}'


def _filters(names: Sequence[str]) -> str:
    box = '<label><input type="checkbox" id="only-differing"> only documents on which runs differ</label>'
    if len(names) < 2:
        return f'<form class="filters">{box}</form>'
    choices = [("group-all", "all", " checked"), *((f"group-{n}", name, "") for n, name in enumerate(names))]
    radios = "".join(
        f'<label><input type="radio" name="group" id="{key}"{checked}> {words_of_name(name)}</label>'
        for key, name, checked in choices
    )
    return f'<form class="filters">{box}<fieldset><legend>Task</legend>{radios}</fieldset></form>'


def _filter_rules(num_groups: int) -> str:
    """Rules that hide what the fields above leave out; names, which may be a user's, are no part of them."""
    rules = ["body:has(#only-differing:checked) .case.same { display: none; }"]
    rules += [
        f"body:has(#group-{n}:checked) .case:not(.of-{n}) {{ display: none; }}" for n in range(num_groups)
    ]
    return "\n".join(rules)


def _card(comparison: Comparison, place: int, group: int) -> str:
    truth = comparison.gold[place]
    kind = "differing" if differ(comparison, place) else "same"
    sides = [side("asked", parts_markup(truth.parts, "what was asked"))]
    if truth.target:
        sides.append(side("truth", parts_markup(truth.target, "the truth")))
    sides += [_run_side(k, run, place) for k, run in enumerate(comparison.runs)]
    name = words_of_name(group_of(comparison.task, truth))
    return (
        f'<article class="case {kind} of-{group}"><header><h4>{name_text(truth.id)}</h4><small>{name}</small>'
        f'</header><div class="sides">{"".join(sides)}</div></article>'
    )


def _run_side(k: int, run: Run, place: int) -> str:
    score = document_score(run.cases[place])
    value = "" if score is None else f" {number_text(score)}"
    answer: Document | None = run.answers[place]
    body = (
        '<p class="nothing">no answer</p>'
        if answer is None
        else parts_markup(parts_of(answer), f"the answer of {run.name}")
    )
    return f'<div class="side run"><b>{_run_name(k, run)}{value}</b>{body}</div>'
