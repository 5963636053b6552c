"""What variants score is counted right: badges generated and handed on, a result each, its documents."""

import json
from dataclasses import replace

import pytest
import torch

from mm_interleaved.cli.main import run
from mm_interleaved.documents.document_files import write_documents
from mm_interleaved.errors import UsageError
from mm_interleaved.files import make_folder
from mm_interleaved.generation import InterleavedGenerator
from mm_interleaved.recipes.storyworld.attribute_embedding import AttributeEmbedding
from mm_interleaved.recipes.storyworld.attribute_supervision import known_labels
from studies.__main__ import create_app
from studies.ablation.badges import conditioned_badges, generated_badges
from studies.ablation.recipe import chosen_variants, variant_folder
from studies.ablation.scores import (
    DATA_NAME,
    ablation_documents,
    generated_images,
    read_results,
    score_variants,
)


@pytest.mark.parametrize("count", [3, 27, 60, 400])
def test_a_run_has_as_many_documents_as_were_wanted(count):
    tasks = [document.meta["task"] for document in ablation_documents(count)]
    assert len(tasks) == count and set(tasks) == {"vqa", "edit", "story_last"}


def test_the_truth_keeps_all_badges_and_what_was_given_keeps_fewer():
    gold = [truth for truth in ablation_documents(60) if truth.meta["task"] != "vqa"]
    truth = [replace(document, parts=document.target, target=()) for document in gold]
    found = generated_badges(truth, gold)
    assert found == {"edit.drawn_badge": 1.0, "story_last.drawn_badge": 1.0}
    repeated = [replace(document, parts=document.images[-1:], target=()) for document in gold]
    assert generated_badges(repeated, gold)["story_last.drawn_badge"] < 0.8
    assert generated_badges([], gold) == {"edit.drawn_badge": 0.0, "story_last.drawn_badge": 0.0}


def test_badges_handed_on_are_read_off_the_conditioning(model, processor, monkeypatch):
    gold = [truth for truth in ablation_documents(20) if truth.meta["task"] == "edit"]
    generator = InterleavedGenerator(model, processor)
    assert set(conditioned_badges(generator, gold)) == {"edit.told_badge"}
    # A language model that hands on the truth hands on every badge.
    embedding = AttributeEmbedding(*model.image_decoder.resampler.queries.shape[1:])
    pending = [known_labels([replace(truth, parts=(*truth.parts, *truth.target))])[-1:] for truth in gold]
    conditionings = iter([embedding.encode(labels) for labels in pending])
    monkeypatch.setattr(
        type(model), "condition", lambda self, hidden, row, start, end: (next(conditionings), None)
    )
    assert conditioned_badges(generator, gold) == {"edit.told_badge": 1.0}


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_badges_are_handed_on_by_a_model_on_a_gpu(model, processor):
    gold = [truth for truth in ablation_documents(20) if truth.meta["task"] == "edit"]
    on_cpu = conditioned_badges(InterleavedGenerator(model.eval(), processor), gold)
    assert conditioned_badges(InterleavedGenerator(model.cuda(), processor), gold) == pytest.approx(
        on_cpu, abs=0.5
    )


def test_a_variant_that_is_trained_is_scored_once(tmp_path, model, processor):
    [variant, missing] = chosen_variants(("both-1", "neither-1"))
    model.config.generation_settings = {"num_inference_steps": 1, "max_new_tokens": 4}
    folder = variant_folder(tmp_path, variant)
    model.eval().save_pretrained(folder)
    processor.save_pretrained(folder)
    make_folder(tmp_path / variant.image_decoder.name)
    (tmp_path / variant.image_decoder.name / "cost.json").write_text(json.dumps({"steps": 7}))
    events = []
    score_variants(
        tmp_path, [variant, missing], 3, lambda document, event: events.append((document.id, event))
    )
    gold = ablation_documents(3)
    assert sum(event in ("finished", "failed") for _, event in events) == len(gold)
    [result] = read_results(tmp_path, [variant, missing])
    assert (result["twin"], result["arm"], result["slots"], result["documents"]) == ("both-1", "both", 4, 3)
    assert result["cost"] == {"slots": {}, "reader": {}, "painter": {"steps": 7}}
    assert {"vqa.accuracy", "story_last.drawn_badge", "story_last.told_badge"} <= set(result["scores"])
    assert "cores" in result["scored_by"]["machine"] and result["scored_by"]["commit"]
    generated = generated_images(tmp_path, variant, gold)
    finished = {identity for identity, event in events if event == "finished"}
    assert set(generated) == finished & {truth.id for truth in gold if truth.meta["task"] != "vqa"}
    events.clear()
    score_variants(tmp_path, [variant], 3, lambda document, event: events.append(event))
    assert events == []


def test_another_number_of_documents_is_refused(tmp_path, capsys):
    make_folder((tmp_path / DATA_NAME).parent)
    write_documents(tmp_path / DATA_NAME, ablation_documents(20))
    with pytest.raises(UsageError, match=r"has 20 documents, found --documents 21; give --documents 20"):
        score_variants(tmp_path, (), 21, lambda document, event: None)
    score_variants(tmp_path, (), 20, lambda document, event: None)
    # The command says so before it trains anything.
    assert run(["ablation", "-o", str(tmp_path), "--documents", "40"], create_app) == 2
    assert "found --documents 40" in capsys.readouterr().err
    assert not list(tmp_path.glob("*/cost.json"))
