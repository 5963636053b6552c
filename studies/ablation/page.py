"""What the ablation found, as a page: a table with spread, plots against slots, images side by side.

DOCS/ablation_results.json   raw results, one record a variant
DOCS/ablation_results.md     the page
DOCS/images/ablation_*.png   its figures
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from PIL import Image as PILImage
from PIL import ImageDraw, ImageFont

from mm_interleaved.documents.document import Document
from mm_interleaved.documents.images import to_png
from mm_interleaved.errors import UsageError
from mm_interleaved.evaluation.tasks.storyworld import STORYWORLD
from mm_interleaved.files import make_folder, write_file
from mm_interleaved.recipes.run import SETTINGS_NAME
from mm_interleaved.storyworld.renderer import render_scene
from studies.ablation.badges import count_known_figures
from studies.ablation.scores import generated_images, last_scenes, read_results
from studies.ablation.variants import SLOT_COUNTS, WITH, WITHOUT, Variant, kind_with
from studies.plots import load_pyplot, plain_axes, save_figure
from studies.provenance import provenance_of, provenance_text, scoring_of

METRICS = {
    "vqa.accuracy": "questions",
    "vqa.fine_detail": "fine detail",
    "edit.told_badge": "badges handed on, edits",
    "story_last.told_badge": "badges handed on, stories",
    "edit.drawn_badge": "badges generated, edits",
    "story_last.drawn_badge": "badges generated, stories",
    "story.character_kept": "characters kept",
}
"""Metrics of the table and their headings."""
PLOTTED = ("vqa.accuracy", "vqa.fine_detail", "story_last.told_badge", "story_last.drawn_badge")
JUDGED = ("vqa.fine_detail", "story_last.drawn_badge")
"""Details, and badges kept over the images of a story."""
PREDICTED_PAIR = (4, 16)
"""Slots with synchronizers, and without: what docs/ablation.md predicted before any variant was trained."""
OTHER_PAIRS = ((1, 16), (4, 4))
COARSE = "{} coarse slots"
"""Kinds at four slots that learn all attributes but badges and patterns."""
WANTED_GAIN = 0.20
"""What was predicted of that pair, of each metric that is judged."""
_SIDE, _NAME_WIDTH, _HEAD_HEIGHT, _NUM_PROMPTS = 96, 215, 22, 8
_WITH_COLOUR, _WITHOUT_COLOUR = "#2b6a99", "#b0483a"

Results = Sequence[Mapping[str, Any]]


def write_page(run: Path, variants: Sequence[Variant], docs: Path) -> Path:
    """Writes the page of all variants that are scored; returns its path.

    Raises:
        UsageError: none is scored, or matplotlib is missing.
    """
    results = read_results(run, variants)
    if not results:
        raise UsageError(f"{run}: no variant has been scored yet")
    make_folder(docs / "images")
    record = {
        "documents": results[0]["documents"],
        **provenance_of(_costs(results)),
        "scored": scoring_of(results),
        "settings": _settings(run),
        "twins": results,
    }
    write_file(docs / "ablation_results.json", (json.dumps(record, indent=1) + "\n").encode())
    plot_slots(results, docs / "images" / "ablation_slots.png")
    gold = STORYWORLD.read_gold(run / "data" / "documents.jsonl")
    scored = [variant for variant in variants if variant.name in {result["twin"] for result in results}]
    write_file(
        docs / "images" / "ablation_drawings.png", to_png(_few_colours(side_by_side(run, scored, gold)))
    )
    path = docs / "ablation_results.md"
    write_file(path, page_text(results, cases_of(gold)).encode())
    return path


def _few_colours(sheet: PILImage.Image) -> PILImage.Image:
    """With 256 colours, a third of the file and the same to the eye."""
    return sheet.quantize(256, dither=PILImage.Dither.NONE)


def _costs(results: Results) -> list[Mapping[str, Any]]:
    return [cost for result in results for cost in result["cost"].values()]


def _settings(run: Path) -> dict[str, Any]:
    """Those of the run, but which variants its last call was about; empty where there are none."""
    path = run / SETTINGS_NAME
    settings = json.loads(path.read_text())["settings"] if path.exists() else {}
    return {name: value for name, value in settings.items() if name not in ("variants", "twins")}


def cases_of(gold: Sequence[Document]) -> dict[str, int]:
    """How many cases each metric of the table rests on."""
    questions = [truth for truth in gold if truth.meta["task"] == "vqa"]
    figures = count_known_figures(gold)
    badges = {f"{task}.{how}_badge": count for task, count in figures.items() for how in ("told", "drawn")}
    return {
        "vqa.accuracy": len(questions),
        "vqa.fine_detail": sum(truth.meta["is_fine_detail"] for truth in questions),
        **badges,
        "story.character_kept": figures.get("story_last", 0),
    }


def page_text(results: Results, cases: Mapping[str, int]) -> str:
    """The page as Markdown.

    Args:
        cases: how many each metric rests on.
    """
    lines = [
        "# What the variants scored",
        "",
        "Written by `python -m studies ablation`; what is compared stands in [ablation.md](ablation.md).",
        f"{results[0]['documents']} documents of the test split; mean, and standard deviation over seeds "
        "where there are several.",
        "Seeds are the language models': all variants of a kind share one image decoder, of seed 1.",
        "",
        provenance_text(provenance_of(_costs(results)), "Trained"),
        provenance_text(scoring_of(results), "Scored"),
        *_starts(results),
        "",
        *_table(results, cases),
        "",
        "A score of one seed over n cases is uncertain by sqrt(p (1 - p) / n): by 0.07 at 0.4 of 52.",
        "",
        "![Scores against slots](images/ablation_slots.png)",
        "",
        *_verdicts(results),
        "",
        "The same prompts by each variant; above, the newest image that is given and the truth:",
        "",
        "![Generated images](images/ablation_drawings.png)",
        "",
        *_cost_table(results),
    ]
    return "\n".join(lines) + "\n"


def by_kind(results: Results) -> dict[str, list[Mapping[str, Any]]]:
    """Results of the same kind together, in the order in which kinds come."""
    kinds: dict[str, list[Mapping[str, Any]]] = {}
    for result in results:
        kinds.setdefault(result["arm"], []).append(result)
    return kinds


def values_of(results: Results, metric: str) -> list[float]:
    """A metric of each result that has it."""
    return [result["scores"][metric] for result in results if metric in result["scores"]]


def _table(results: Results, cases: Mapping[str, int]) -> list[str]:
    heads = ["synchronizers", "slots", "seeds", *METRICS.values()]
    lines = [f"| {' | '.join(heads)} |", f"| {' | '.join('---' for _ in heads)} |"]
    for kind, members in by_kind(results).items():
        cells = [_spread(values_of(members, metric)) for metric in METRICS]
        lines.append(f"| {kind} | {members[0]['slots']} | {len(members)} | {' | '.join(cells)} |")
    counts = [str(cases.get(metric, "")) for metric in METRICS]
    lines.append(f"| *cases* |  |  | {' | '.join(counts)} |")
    return lines


def _spread(values: Sequence[float]) -> str:
    if not values:
        return ""
    spread = f" ± {stdev(values):.3f}" if len(values) > 1 else ""
    return f"{mean(values):.3f}{spread}"


def _verdicts(results: Results) -> list[str]:
    """What was predicted, and beside it what was not, each with its number."""
    kinds = by_kind(results)
    pairs = [
        (
            kind_with(few, has_synchronizers=True),
            kind_with(many, has_synchronizers=False),
            _pair_name(few, many),
        )
        for few, many in (PREDICTED_PAIR, *OTHER_PAIRS)
    ]
    pairs.append((COARSE.format(WITH), COARSE.format(WITHOUT), "4 coarse slots with synchronizers against 4"))
    lines = []
    for metric in JUDGED:
        for with_kind, without_kind, name in pairs:
            ours, theirs = (values_of(kinds.get(kind, ()), metric) for kind in (with_kind, without_kind))
            if ours and theirs:
                gain = mean(ours) - mean(theirs)
                line = f"- {METRICS[metric]}: {name} without: {gain:+.3f}"
                if name == _pair_name(*PREDICTED_PAIR):
                    verdict = "holds" if gain >= WANTED_GAIN else "does not hold"
                    line += f" (predicted: at least +{WANTED_GAIN:.2f}; {verdict})"
                lines.append(line)
    return lines


def _pair_name(few: int, many: int) -> str:
    return f"{few} {'slot' if few == 1 else 'slots'} with synchronizers against {many}"


def _starts(results: Results) -> list[str]:
    """Which variants' U-Nets did not begin with the same weights: their images do not compare."""
    begun: dict[str, list[str]] = {}
    for result in results:
        for start in provenance_of([result["cost"].get("painter", {})])["starts"]:
            begun.setdefault(start, []).append(result["twin"])
    if len(begun) < 2:
        return []
    named = "; ".join(f"{start}: {', '.join(names)}" for start, names in begun.items())
    return ["", f"**Not all U-Nets began with the same weights** ({named})."]


def _cost_table(results: Results) -> list[str]:
    lines = [
        "| variant | part | steps | FLOPs | hours | core hours | threads |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    listed = set()
    for result in results:
        for part, cost in result["cost"].items():
            name = (part, json.dumps(cost, sort_keys=True))
            if cost and name not in listed:
                listed.add(name)
                lines.append(
                    f"| {result['twin']} | {part} | {cost['steps']} | {cost['flops']:.2e} | "
                    f"{cost['wall_hours']:.2f} | {cost['core_hours']:.2f} | {cost['threads']} |"
                )
    return lines


def plot_slots(results: Results, path: Path) -> None:
    """Scores against slots, with and without synchronizers; seeds as dots, coarse slots hollow."""
    pyplot = load_pyplot()
    kinds = by_kind(results)
    figure, axes = pyplot.subplots(1, len(PLOTTED), figsize=(3.1 * len(PLOTTED), 3.6), layout="constrained")
    for axis, metric in zip(axes, PLOTTED, strict=True):
        # The lower line comes first and is wider, so that equal lines are both visible.
        for kind, colour, width in ((WITH, _WITH_COLOUR, 4.0), (WITHOUT, _WITHOUT_COLOUR, 1.4)):
            by_slots = {n: kinds.get(kind_with(n, has_synchronizers=kind == WITH), ()) for n in SLOT_COUNTS}
            points = [
                (num_slots, values)
                for num_slots, members in by_slots.items()
                if (values := values_of(members, metric))
            ]
            line = [(num_slots, mean(values)) for num_slots, values in points]
            if line:
                axis.plot(*zip(*line, strict=True), color=colour, label=kind, linewidth=width, alpha=0.75)
            for num_slots, values in points:
                axis.plot([num_slots] * len(values), values, "o", color=colour, markersize=2 + width)
            coarse = values_of(kinds.get(COARSE.format(kind), ()), metric)
            # Beside the others of four slots, which they would hide.
            axis.plot(
                [4.6] * len(coarse), coarse, "D", color=colour, fillstyle="none", markersize=7,
                label=COARSE.format(kind) if coarse else None,
            )  # fmt: skip
        axis.set(xscale="log", xlabel="slots an image", title=METRICS[metric], ylim=(-0.03, 1.05))
        axis.set_xticks(SLOT_COUNTS, [str(count) for count in SLOT_COUNTS])
        axis.minorticks_off()
        plain_axes(axis)
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, title="synchronizers", loc="outside lower center", ncols=4, frameon=False)
    save_figure(figure, path)


def side_by_side(run: Path, variants: Sequence[Variant], gold: Sequence[Document]) -> PILImage.Image:
    """Rows: what is given last, the truth, then each variant; columns: prompts, under their task's name."""
    prompts = [truth for truth in gold if "I" in (truth.layout or "") and len(truth.meta["scenes"]) > 1]
    stories = [truth for truth in prompts if truth.meta["task"] == "story_last"]
    edits = [truth for truth in prompts if truth.meta["task"] == "edit"]
    prompts = [*edits[: _NUM_PROMPTS // 2], *stories[: _NUM_PROMPTS // 2]]
    given, truths = zip(*(last_scenes(truth) for truth in prompts), strict=True)
    rows: list[tuple[str, list[PILImage.Image | None]]] = [
        ("given", [PILImage.fromarray(render_scene(scene)) for scene in given]),
        ("truth", [PILImage.fromarray(render_scene(scene)) for scene in truths]),
    ]
    for variant in variants:
        generated = generated_images(run, variant, prompts)
        row = [generated[truth.id].load() if truth.id in generated else None for truth in prompts]
        rows.append((f"{variant.kind}, seed {variant.language.seed}", row))
    size = _NAME_WIDTH + len(prompts) * (_SIDE + 4), _HEAD_HEIGHT + len(rows) * (_SIDE + 4)
    sheet = PILImage.new("RGB", size, "white")
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(15)
    for column, truth in enumerate(prompts):
        task = "edit" if truth.meta["task"] == "edit" else "last panel"
        draw.text((_NAME_WIDTH + column * (_SIDE + 4) + 4, 2), task, fill=(30, 30, 36), font=font)
    for number, (name, images) in enumerate(rows):
        top = _HEAD_HEIGHT + number * (_SIDE + 4)
        draw.text((4, top + _SIDE // 2 - 8), name, fill=(30, 30, 36), font=font)
        for column, image in enumerate(images):
            if image is not None:
                enlarged = image.convert("RGB").resize((_SIDE, _SIDE), PILImage.Resampling.NEAREST)
                sheet.paste(enlarged, (_NAME_WIDTH + column * (_SIDE + 4), top))
    return sheet
