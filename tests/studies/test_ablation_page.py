"""The page about the variants holds their numbers, their images, and what was predicted and what was not."""

import json
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image as PILImage

from mm_interleaved.documents.document import Document
from mm_interleaved.documents.document_files import write_documents
from mm_interleaved.errors import UsageError
from mm_interleaved.files import make_folder
from mm_interleaved.storyworld.tasks import part_pixels
from studies.ablation.page import cases_of, page_text, plot_slots, side_by_side, write_page
from studies.ablation.recipe import chosen_variants
from studies.ablation.scores import DATA_NAME, ablation_documents


def result(kind, slots, seed, value, **changes):
    scores = {"vqa.fine_detail": value, "edit.drawn_badge": value, "story_last.drawn_badge": value}
    return {
        "twin": f"{kind.replace(' ', '-')}-{seed}", "arm": kind, "slots": slots, "seed": seed, "documents": 8,
        "scores": scores, "cost": {},
    } | changes  # fmt: skip


COST = {"steps": 12, "flops": 3.5e12, "wall_hours": 0.25, "core_hours": 0.5, "threads": 2}
RESULTS = [
    result("both", 4, 1, 0.8), result("both", 4, 2, 0.6), result("neither", 4, 1, 0.6),
    result("neither 16 slots", 16, 1, 0.4),
]  # fmt: skip


def test_only_the_predicted_pair_is_judged():
    page = page_text(RESULTS, {})
    assert "| both | 4 | 2 |  | 0.700 ± 0.141 |" in page
    verdicts = [line for line in page.splitlines() if line.startswith("- ")]
    assert verdicts == [
        "- fine detail: 4 slots with synchronizers against 16 without: +0.300 "
        "(predicted: at least +0.20; holds)",
        "- fine detail: 4 slots with synchronizers against 4 without: +0.100",
        "- badges generated, stories: 4 slots with synchronizers against 16 without: +0.300 "
        "(predicted: at least +0.20; holds)",
        "- badges generated, stories: 4 slots with synchronizers against 4 without: +0.100",
    ]
    close = [*RESULTS[:3], result("neither 16 slots", 16, 1, 0.6)]
    assert "16 without: +0.100 (predicted: at least +0.20; does not hold)" in page_text(close, {})


@pytest.fixture
def scored_run(tmp_path):
    """A run of two variants by hand: one generated the truth, the other nothing."""
    run, gold = tmp_path / "run", ablation_documents(8)
    make_folder((run / DATA_NAME).parent)
    write_documents(run / DATA_NAME, gold)
    for variant, value in zip(chosen_variants(("both-1", "neither-1")), (0.875, 0.125), strict=True):
        scored = {"commit": "def5678", "machine": "A chip, 2 cores", "date": "2026-11-23"}
        made = result(variant.kind, 4, 1, value, scored_by=scored)
        goes = [scored | {"commit": "abc1234", "date": "2026-11-22", "start": "first"}]
        made["cost"] = {"slots": {}, "painter": COST | {"made_by": goes}}
        folder = run / "scored" / variant.name
        make_folder(folder)
        (folder / "result.json").write_text(json.dumps(made))
        answers = [
            Document(
                id=truth.id, parts=tuple(replace(part, role=None, generated=True) for part in truth.target)
            )
            for truth in gold
            if variant.kind == "both"
        ]
        write_documents(folder / "predictions.jsonl", answers)
    settings = {"recipe": "ablation", "settings": {"twins": ["both-1"], "seed": 5}}
    (run / "settings.json").write_text(json.dumps(settings))
    return run, gold


def test_what_was_not_recorded_is_said_to_be_unknown():
    page = page_text([result("both", 4, 1, 0.5, cost={"painter": COST})], {})
    assert "Trained on unknown (unknown); the commit was not recorded." in page
    assert "Scored on unknown (unknown); the commit was not recorded." in page


def test_unets_that_began_otherwise_are_named():
    def begun(kind, start):
        return result(kind, 4, 1, 0.5, cost={"painter": COST | {"made_by": [{"start": start}]}})

    page = page_text([begun("both", "old"), begun("neither", "new")], {})
    assert "**Not all U-Nets began with the same weights** (old: both-1; new: neither-1)." in page
    assert "Not all U-Nets" not in page_text([begun("both", "old"), begun("neither", "old")], {})


def test_coarse_slots_are_compared_with_each_other():
    coarse = [result("both coarse slots", 4, 1, 0.9), result("neither coarse slots", 4, 1, 0.2)]
    page = page_text([*RESULTS, *coarse], {})
    assert "- fine detail: 4 coarse slots with synchronizers against 4 without: +0.700" in page


def test_cases_are_those_of_the_documents():
    gold = ablation_documents(40)
    cases = cases_of(gold)
    assert cases["vqa.accuracy"] == sum(truth.meta["task"] == "vqa" for truth in gold)
    assert 0 < cases["vqa.fine_detail"] < cases["vqa.accuracy"]
    # Of each edit at least one figure stood in the image before; of last panels there may be nobody.
    assert cases["edit.told_badge"] == cases["edit.drawn_badge"] >= 4


def test_the_page_is_written_with_its_numbers_and_images(scored_run, tmp_path):
    pytest.importorskip("matplotlib")
    run, _ = scored_run
    docs = tmp_path / "docs"
    path = write_page(run, chosen_variants(()), docs)
    page = path.read_text()
    assert path == docs / "ablation_results.md" and page.startswith("# What the variants scored")
    for row in (
        "| both | 4 | 1 |  | 0.875 |  |  | 0.875 | 0.875 |  |",
        "| neither | 4 | 1 |  | 0.125 |  |  | 0.125 | 0.125 |  |",
        "| both-1 | painter | 12 | 3.50e+12 | 0.25 | 0.50 | 2 |",
        "8 documents of the test split",
        "Seeds are the language models': all variants of a kind share one image decoder, of seed 1.",
        "| *cases* |  |  | 6 |",
        "Trained on A chip, 2 cores (2026-11-22); by commit abc1234.",
        "Scored on A chip, 2 cores (2026-11-23); by commit def5678.",
    ):
        assert row in page, row
    record = json.loads((docs / "ablation_results.json").read_text())
    provenance = {name: record[name] for name in ("commits", "machines", "dates", "starts", "threads")}
    assert provenance == {
        "commits": ["abc1234"], "machines": ["A chip, 2 cores"], "dates": ["2026-11-22"], "starts": ["first"],
        "threads": [2],
    }  # fmt: skip
    assert record["scored"]["commits"] == ["def5678"]
    assert record["settings"] == {"seed": 5}, "of the run, without the variants of its last call"
    assert [variant["twin"] for variant in record["twins"]] == [
        "both-1",
        "neither-1",
    ]
    for name in ("ablation_slots.png", "ablation_drawings.png"):
        assert f"](images/{name})" in page
        assert min(PILImage.open(docs / "images" / name).size) > 100


def test_a_run_without_scores_has_no_page(tmp_path):
    with pytest.raises(UsageError, match="no variant has been scored yet"):
        write_page(tmp_path, chosen_variants(()), tmp_path / "docs")


def test_images_stand_under_their_prompts(scored_run):
    run, gold = scored_run
    prompts = [truth for truth in gold if truth.meta["task"] != "vqa"]
    sheet = np.asarray(side_by_side(run, chosen_variants(("both-1", "neither-1")), gold))
    assert sheet.shape == (22 + 4 * 100, 215 + len(prompts) * 100, 3)

    def cell(row, column):
        top, left = 22 + row * 100, 215 + column * 100
        return sheet[top : top + 96, left : left + 96]

    for column, truth in enumerate(prompts):
        given, wanted = part_pixels(truth.images[-1]), part_pixels(truth.target[-1])
        for row, pixels in enumerate((given, wanted, wanted)):
            enlarged = PILImage.fromarray(pixels).resize((96, 96), PILImage.Resampling.NEAREST)
            assert np.array_equal(cell(row, column), np.asarray(enlarged)), (row, column)
        # An image that was not generated is left white, and its place is not taken by another.
        assert (cell(3, column) == 255).all()


def test_the_plot_distinguishes_kinds_and_is_the_same_each_time(tmp_path):
    pytest.importorskip("matplotlib")

    def drawn(results):
        plot_slots(results, tmp_path / "plot.png")
        return (tmp_path / "plot.png").read_bytes()

    plot = drawn(RESULTS)
    assert drawn(RESULTS) == plot
    assert drawn([*RESULTS[:3], result("neither 16 slots", 16, 1, 0.9)]) != plot
