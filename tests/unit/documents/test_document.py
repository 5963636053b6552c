"""The document types and the record they are written as."""

import json
import pickle
import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image as PILImage

from mm_interleaved.documents.document import Document, Image, Text, document_to_record
from records import document_from_record

texts = st.text(st.characters(exclude_categories=["Cs"]), max_size=8)
roles = st.sampled_from([None, "user", "assistant"])
seeds = st.one_of(st.none(), st.integers(0, 2**63 - 1))
values = st.one_of(
    st.none(), st.booleans(), st.integers(-9, 9), texts, st.lists(st.integers(0, 3), max_size=2)
)


@st.composite
def parts(draw, roles=roles):
    common = {"role": draw(roles), "generated": draw(st.booleans()), "seed": draw(seeds)}
    if draw(st.booleans()):
        return Text(draw(texts), **common)
    return Image(draw(st.binary(max_size=6)), **common)


@st.composite
def documents(draw):
    role = draw(st.sampled_from([st.none(), st.sampled_from(["user", "assistant", "system"]), roles]))
    return Document(
        id=draw(st.text(st.characters(categories=["L", "N"]), min_size=1, max_size=5)),
        parts=[Text("Pip", role=draw(role)), *draw(st.lists(parts(role), max_size=4))],
        target=draw(st.lists(parts(), max_size=2)),
        layout=draw(st.sampled_from([None, "auto", "T I T"])),
        generation=draw(st.dictionaries(texts, values, max_size=2)),
        meta=draw(st.dictionaries(texts, values, max_size=2)),
    )


def as_data_url(image, index):
    import base64

    return f"data:image/png;base64,{base64.b64encode(image.source).decode()}"


@given(document=documents())
def test_a_record_read_back_is_the_same_document(document):
    record = json.loads(json.dumps(document_to_record(document, as_data_url)))
    again = document_from_record(record)
    assert again == document
    assert document_to_record(again, as_data_url) == record


def test_a_conversation_is_written_as_messages_and_anything_else_as_content():
    talk = [Text("a", role="user"), Text("b", role="user"), Text("c", role="assistant")]
    record = document_to_record(Document(id="1", parts=talk), as_data_url)
    assert [(message["role"], len(message["content"])) for message in record["messages"]] == [
        ("user", 2),
        ("assistant", 1),
    ]
    story = Document(id="2", parts=[Text("a"), Image(b"x")])
    assert document_to_record(story, lambda image, index: f"images/{index}.png") == {
        "id": "2",
        "content": [{"type": "text", "text": "a"}, {"type": "image", "image": "images/0.png"}],
    }


def test_images_are_numbered_over_parts_and_target():
    document = Document(id="1", parts=[Image(b""), Image(b"")], target=[Image(b"")])
    record = document_to_record(document, lambda image, index: str(index))
    assert [part["image"] for part in record["content"] + record["target"]] == ["0", "1", "2"]


def test_parts_of_another_type_are_refused():
    with pytest.raises(TypeError, match=r"parts\[1\]: expected Text or Image, found str"):
        Document(id="1", parts=[Text("a"), "b"])


@pytest.mark.parametrize(
    ("parts", "sentence"),
    [
        (["text"], r"parts\[0\]: expected Text or Image, found str; write Text"),
        ([PILImage.new("RGB", (1, 1))], r"parts\[0\]: expected Text or Image, found Image; write Image"),
        ("text", "parts: expected a list of Text and Image, found str"),
        (Text("a"), "parts: expected a list of Text and Image, found Text"),
        ({"type": "text"}, "parts: expected a list of Text and Image, found dict"),
        (7, "parts: expected a list of Text and Image, found int"),
    ],
)
def test_what_is_no_list_of_parts_is_refused_in_a_sentence(parts, sentence):
    for name in ("parts", "target"):
        with pytest.raises(TypeError, match=sentence.replace("parts", name)):
            Document(**{name: parts})


def test_a_document_in_python_needs_no_id():
    assert Document(parts=[Text("a")]) == Document(id="document", parts=(Text("a"),))


def test_documents_travel_between_processes():
    document = Document(id="1", parts=[Text("a"), Image(PILImage.new("RGB", (2, 2)))], meta={"k": [1]})
    assert pickle.loads(pickle.dumps(document)) == document


def test_a_document_grows_without_changing():
    document = Document(id="1", parts=[Text("a")])
    longer = document.extended(Image(b"x", generated=True), Text("b"))
    assert len(document.parts) == 1 and len(longer.parts) == 3
    assert longer.text == "a b" and longer.images == (longer.parts[1],)


def test_documents_and_their_files_are_read_without_torch_and_transformers():
    code = (
        "import sys, mm_interleaved.documents.document_files; "
        "sys.exit(any(name in sys.modules for name in ('torch', 'transformers')))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
