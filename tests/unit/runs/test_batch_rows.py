"""What travels between machines is the same when it arrives: documents, settings, results and errors."""

import json
from dataclasses import replace

import pytest
from PIL import Image as PILImage

from mm_interleaved.documents.document import Document, Image, Text
from mm_interleaved.documents.images import to_png
from mm_interleaved.errors import ImageError, NumericalError, StorageError, TooLongError, UsageError
from mm_interleaved.generation.settings import GenerationSettings, settings_for
from mm_interleaved.runs.batch_rows import (
    BatchOutcome,
    batch_id,
    batch_of_row,
    outcome_of_row,
    row_of_batch,
    row_of_outcome,
)
from mm_interleaved.runs.engine import Batch, Work
from mm_interleaved.runs.ray_engine import RayEngine


@pytest.fixture
def picture(tmp_path):
    path = tmp_path / "given.jpg"
    PILImage.new("RGB", (9, 7), (200, 30, 40)).save(path)
    return path


@pytest.fixture
def documents(picture, tmp_path):
    return [
        Document(id="a", parts=[Text("Ä <image> \x00 text"), Image(picture, name="given.jpg")], layout="T I"),
        Document(
            id="b/ü",
            parts=[Text("hi", role="user"), Image(PILImage.new("RGB", (2, 2)), role="user", seed=3)],
            generation={"seed": 5, "max_new_tokens": 7},
        ),
        Document(id="c", parts=[Image(tmp_path / "not there.png", name="c.png"), Image(to_png(red()))]),
    ]


def red(size=(3, 3)):
    return PILImage.new("RGB", size, (255, 0, 0))


def through_json(row):
    """As Parquet would give it back, which keeps text and bytes."""
    assert {type(row["id"]), type(row["content"])} == {str} and all(type(i) is bytes for i in row["images"])
    return {**json.loads(json.dumps({"id": row["id"], "content": row["content"]})), "images": row["images"]}


def pixels(document):
    return [image.load().tobytes() for image in document.images]


def test_a_batch_arrives_as_it_was(documents):
    settings = [settings_for(document, {"num_inference_steps": 4}, {"seed": 1}) for document in documents]
    row = row_of_batch(Batch(8, documents, settings))
    assert row["id"] == batch_id(Batch(8, documents, settings)) == "000000000008"
    found, found_settings = batch_of_row(through_json(row))
    assert found_settings == settings and all(each.is_complete for each in found_settings)
    for given, arrived in zip(documents, found, strict=True):
        same = {"parts": arrived.parts}
        assert replace(given, **same) == arrived
        for part, other in zip(given.parts, arrived.parts, strict=True):
            hidden = {} if isinstance(part, Text) else {"source": b"", "name": None}
            assert replace(part, **hidden) == replace(other, **hidden)
    assert [pixels(each) for each in found[:2]] == [pixels(each) for each in documents[:2]]
    # The files themselves, not what was decoded of them.
    assert found[0].images[0].source == documents[0].images[0].source.read_bytes()


def test_an_image_that_is_not_there_fails_with_the_same_sentence(documents):
    row = row_of_batch(Batch(0, documents, [GenerationSettings.combine()] * 3))
    [*_, arrived], _ = batch_of_row(through_json(row))
    for document in (documents[2], arrived):
        with pytest.raises(ImageError, match=r"^image 'c\.png': there is no such file$"):
            document.images[0].load()


def test_what_became_of_a_batch_arrives_beside_the_documents(documents):
    generated = Image(red((4, 4)), generated=True, seed=9, pixel_error=1 / 3)
    completed = documents[0].extended(Text("more", generated=True, seed=8), generated)
    outcomes = [completed, TooLongError("too long", field="content"), NumericalError("not finite")]
    found = BatchOutcome("000000000000", outcomes, warnings=["words"])
    arrived = outcome_of_row(documents, through_json(row_of_outcome(documents, found)))
    assert arrived.warnings == ["words"] and arrived.error is None
    first, too_long, numerical = arrived.outcomes
    assert first.parts[:-1] == completed.parts[:-1] and pixels(first) == pixels(completed)
    assert replace(first.images[-1], source=b"") == replace(generated, source=b"")
    # Given images are not sent back.
    assert len(row_of_outcome(documents, found)["images"]) == 1
    assert (type(too_long), str(too_long), too_long.field) == (TooLongError, "too long", "content")
    assert type(numerical) is NumericalError


def test_an_error_of_all_documents_arrives_by_its_kind(documents):
    found = BatchOutcome("0", [], StorageError("full"))
    arrived = outcome_of_row(documents, through_json(row_of_outcome(documents, found)))
    assert not arrived.outcomes and type(arrived.error) is StorageError and arrived.error.exit_code == 6


def test_a_row_of_other_documents_is_no_outcome(documents):
    row = row_of_outcome(documents[:1], BatchOutcome("0", [TooLongError("x")]))
    with pytest.raises(ValueError, match=r"shorter|longer"):
        outcome_of_row(documents, row)
    with pytest.raises(ValueError):
        outcome_of_row(documents, {**row, "content": row["content"][:-3]})


# ---- What is refused before Ray is started ----


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"address": "ray://host:10001"}, r"address: found 'ray://host:10001', a Ray client"),
        ({"num_actors": 0}, r"num_actors: found 0, expected 1 or more"),
        ({"gpus_per_actor": -1.0}, r"gpus_per_actor: found -1.0, expected 0 or more"),
        ({"gpus_per_actor": float("nan")}, r"gpus_per_actor: found nan"),
    ],
)
def test_what_no_cluster_could_be_is_refused(settings, sentence):
    with pytest.raises(UsageError, match=sentence):
        RayEngine(**settings)


def test_a_missing_ray_is_named_with_what_to_install(monkeypatch):
    monkeypatch.setattr("mm_interleaved.runs.ray_engine.find_spec", lambda name: None)
    nothing = dict.fromkeys(("run", "model", "folder", "load", "answer", "on_event"))
    work = Work(**nothing, batches=[], finished=(), to_be_read=(), weights="")
    with pytest.raises(UsageError, match=r"needs Ray.*pip install 'mm-interleaved\[ray\]'"):
        RayEngine()(work)
