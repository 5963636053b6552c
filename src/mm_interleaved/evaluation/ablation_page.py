"""What the ablation found, as a page: a table with spread, plots against slots, pictures side by side.

DOCS/ablation_results.json   raw results, one record a twin
DOCS/ablation_results.md     the page
DOCS/images/ablation_*.png   its pictures
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from PIL import Image as PILImage
from PIL import ImageDraw, ImageFont

from mm_interleaved.document import Document
from mm_interleaved.errors import UsageError
from mm_interleaved.evaluation.ablation import last_scenes, painted_pictures, read_results
from mm_interleaved.evaluation.machine import machine_name
from mm_interleaved.evaluation.plots import load_pyplot, plain_axes, save_figure
from mm_interleaved.evaluation.tasks import TASKS
from mm_interleaved.images import to_png
from mm_interleaved.recipes.ablation_twins import SLOT_COUNTS, WITH, WITHOUT, Twin, arm_with
from mm_interleaved.storage import make_folder, write_file
from mm_interleaved.storyworld.renderer import render_scene
from mm_interleaved.training.run import SETTINGS_NAME

METRICS = {
    "vqa.accuracy": "questions",
    "vqa.fine_detail": "fine detail",
    "edit.told_badge": "badges told, edits",
    "story_last.told_badge": "badges told, stories",
    "edit.drawn_badge": "badges drawn, edits",
    "story_last.drawn_badge": "badges drawn, stories",
    "story.character_kept": "characters kept",
}
"""Metrics of the table and their headings."""
PLOTTED = ("vqa.accuracy", "vqa.fine_detail", "story_last.told_badge", "story_last.drawn_badge")
JUDGED = ("vqa.fine_detail", "story_last.drawn_badge")
"""Details, and badges kept over the pictures of a story."""
PREDICTED_PAIR = (4, 16)
"""Slots with synchronizers, and without: what docs/ablation.md predicted before any twin was trained."""
OTHER_PAIRS = ((1, 16), (4, 4))
WANTED_GAIN = 0.20
"""What was predicted of that pair, of each metric that is judged."""
_SIDE, _NAME_WIDTH, _NUM_PROMPTS = 96, 170, 8
_WITH_COLOUR, _WITHOUT_COLOUR = "#2b6a99", "#b0483a"

Results = Sequence[Mapping[str, Any]]


def write_page(run: Path, twins: Sequence[Twin], docs: Path) -> Path:
    """Writes the page of all twins that are scored; returns its path.

    Raises:
        UsageError: none is scored, or matplotlib is missing.
    """
    results = read_results(run, twins)
    if not results:
        raise UsageError(f"{run}: no twin has been scored yet")
    make_folder(docs / "images")
    commits = commits_of(run, results)
    # Results of earlier versions do not tell their machine: it is most likely the one that writes the page.
    machines = sorted({result.get("machine", machine_name()) for result in results})
    record = {"documents": results[0]["documents"], "commits": commits, "twins": results}
    write_file(docs / "ablation_results.json", (json.dumps(record, indent=1) + "\n").encode())
    plot_slots(results, docs / "images" / "ablation_slots.png")
    gold = TASKS["storyworld"].read_gold(run / "data" / "documents.jsonl")
    scored = [twin for twin in twins if twin.name in {result["twin"] for result in results}]
    write_file(docs / "images" / "ablation_drawings.png", to_png(side_by_side(run, scored, gold)))
    path = docs / "ablation_results.md"
    write_file(path, page_text(results, machines, commits).encode())
    return path


def commits_of(run: Path, results: Results) -> list[str]:
    """Which commits of the code trained the twins, as far as the run's settings and costs tell."""
    path = run / SETTINGS_NAME
    told = [json.loads(path.read_text())] if path.exists() else []
    told += [cost for result in results for cost in result["cost"].values()]
    return sorted({record["commit"] for record in told if record.get("commit")})


def page_text(results: Results, machines: Sequence[str] = (), commits: Sequence[str] = ()) -> str:
    """The page as Markdown.

    Args:
        machines: which ones scored the twins, as far as it is known.
        commits: of the code that trained them.
    """
    lines = [
        "# What the twins scored",
        "",
        "Written by `mm-interleaved ablation`; what is compared stands in [ablation.md](ablation.md).",
        f"{results[0]['documents']} documents of the test split; mean, and standard deviation over seeds "
        "where there are several.",
        "Seeds are the readers': all twins of an arm share one painter, of seed 1.",
        *_made_by(machines, commits),
        "",
        *_table(results),
        "",
        "![Scores against slots](images/ablation_slots.png)",
        "",
        *_verdicts(results),
        "",
        "The same prompts drawn by each twin; above, the newest picture that is given and the truth:",
        "",
        "![Drawings](images/ablation_drawings.png)",
        "",
        *_cost_table(results),
    ]
    return "\n".join(lines) + "\n"


def by_arm(results: Results) -> dict[str, list[Mapping[str, Any]]]:
    """Results of the same arm together, in the order in which arms come."""
    arms: dict[str, list[Mapping[str, Any]]] = {}
    for result in results:
        arms.setdefault(result["arm"], []).append(result)
    return arms


def values_of(results: Results, metric: str) -> list[float]:
    """A metric of each result that has it."""
    return [result["scores"][metric] for result in results if metric in result["scores"]]


def _table(results: Results) -> list[str]:
    heads = ["synchronizers", "slots", "seeds", *METRICS.values()]
    lines = [f"| {' | '.join(heads)} |", f"| {' | '.join('---' for _ in heads)} |"]
    for arm, members in by_arm(results).items():
        cells = [_spread(values_of(members, metric)) for metric in METRICS]
        lines.append(f"| {arm} | {members[0]['slots']} | {len(members)} | {' | '.join(cells)} |")
    return lines


def _spread(values: Sequence[float]) -> str:
    if not values:
        return ""
    spread = f" ± {stdev(values):.3f}" if len(values) > 1 else ""
    return f"{mean(values):.3f}{spread}"


def _verdicts(results: Results) -> list[str]:
    """What was predicted, and beside it what was not, each with its number."""
    arms = by_arm(results)
    lines = []
    for metric in JUDGED:
        for few, many in (PREDICTED_PAIR, *OTHER_PAIRS):
            ours = values_of(arms.get(arm_with(few, is_looking=True), ()), metric)
            theirs = values_of(arms.get(arm_with(many, is_looking=False), ()), metric)
            if ours and theirs:
                gain = mean(ours) - mean(theirs)
                slots = f"{few} {'slot' if few == 1 else 'slots'}"
                line = f"- {METRICS[metric]}: {slots} with synchronizers against {many} without: {gain:+.3f}"
                if (few, many) == PREDICTED_PAIR:
                    verdict = "holds" if gain >= WANTED_GAIN else "does not hold"
                    line += f" (predicted: at least +{WANTED_GAIN:.2f}; {verdict})"
                lines.append(line)
    return lines


def _made_by(machines: Sequence[str], commits: Sequence[str]) -> list[str]:
    """The machines and the code, where they are known."""
    lines = [f"Scored on {' and on '.join(machines)}."] if machines else []
    if commits:
        lines.append(f"Trained by {'commits' if len(commits) > 1 else 'commit'} {', '.join(commits)}.")
    return lines


def _cost_table(results: Results) -> list[str]:
    lines = [
        "| twin | part | steps | FLOPs | hours | core hours | threads |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    told = set()
    for result in results:
        for part, cost in result["cost"].items():
            name = (part, json.dumps(cost, sort_keys=True))
            if cost and name not in told:
                told.add(name)
                lines.append(
                    f"| {result['twin']} | {part} | {cost['steps']} | {cost['flops']:.2e} | "
                    f"{cost['wall_hours']:.2f} | {cost['core_hours']:.2f} | {cost['threads']} |"
                )
    return lines


def plot_slots(results: Results, path: Path) -> None:
    """Scores against slots, with and without synchronizers; the main pair's seeds as dots."""
    pyplot = load_pyplot()
    arms = by_arm(results)
    figure, axes = pyplot.subplots(1, len(PLOTTED), figsize=(3.1 * len(PLOTTED), 3.0), layout="constrained")
    for axis, metric in zip(axes, PLOTTED, strict=True):
        for is_looking, colour, label in ((True, _WITH_COLOUR, WITH), (False, _WITHOUT_COLOUR, WITHOUT)):
            points = [
                (num_slots, values)
                for num_slots in SLOT_COUNTS
                if (values := values_of(arms.get(arm_with(num_slots, is_looking=is_looking), ()), metric))
            ]
            axis.plot(
                [x for x, _ in points], [mean(values) for _, values in points], color=colour, label=label
            )
            for num_slots, values in points:
                axis.plot([num_slots] * len(values), values, "o", color=colour, markersize=4)
        axis.set(xscale="log", xlabel="slots an image", title=METRICS[metric], ylim=(-0.03, 1.03))
        axis.set_xticks(SLOT_COUNTS, [str(count) for count in SLOT_COUNTS])
        axis.minorticks_off()
        plain_axes(axis)
    axes[0].legend(title="synchronizers", frameon=False)
    save_figure(figure, path)


def side_by_side(run: Path, twins: Sequence[Twin], gold: Sequence[Document]) -> PILImage.Image:
    """Rows: what is given last, the truth, then each twin; columns: prompts."""
    prompts = [truth for truth in gold if "I" in (truth.layout or "") and len(truth.meta["scenes"]) > 1]
    stories = [truth for truth in prompts if truth.meta["task"] == "story_last"]
    edits = [truth for truth in prompts if truth.meta["task"] == "edit"]
    prompts = [*edits[: _NUM_PROMPTS // 2], *stories[: _NUM_PROMPTS // 2]]
    given, truths = zip(*(last_scenes(truth) for truth in prompts), strict=True)
    rows: list[tuple[str, list[PILImage.Image | None]]] = [
        ("given", [PILImage.fromarray(render_scene(scene)) for scene in given]),
        ("truth", [PILImage.fromarray(render_scene(scene)) for scene in truths]),
    ]
    for twin in twins:
        painted = painted_pictures(run, twin, prompts)
        row = [painted[truth.id].load() if truth.id in painted else None for truth in prompts]
        rows.append((f"{twin.arm}, seed {twin.reader.seed}", row))
    sheet = PILImage.new("RGB", (_NAME_WIDTH + len(prompts) * (_SIDE + 4), len(rows) * (_SIDE + 4)), "white")
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(13)
    for number, (name, images) in enumerate(rows):
        top = number * (_SIDE + 4)
        draw.text((4, top + _SIDE // 2 - 8), name, fill=(30, 30, 36), font=font)
        for column, image in enumerate(images):
            if image is not None:
                enlarged = image.convert("RGB").resize((_SIDE, _SIDE), PILImage.Resampling.NEAREST)
                sheet.paste(enlarged, (_NAME_WIDTH + column * (_SIDE + 4), top))
    return sheet
