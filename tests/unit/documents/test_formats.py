"""Every form of record that is read, and what is refused, with file, line and field."""

import base64
import copy
import gzip
import io
import json
import os
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image as PILImage

from mm_interleaved.documents.document import Document, Image, Text
from mm_interleaved.documents.document_files import read_documents, write_documents
from mm_interleaved.documents.record_rules import AS_TEXT
from mm_interleaved.errors import ImageError, InputError
from records import document_from_record


def png(colour="red"):
    buffer = io.BytesIO()
    PILImage.new("RGB", (2, 2), colour).save(buffer, format="PNG")
    return buffer.getvalue()


@pytest.fixture
def folder(tmp_path):
    """A folder with the images a.png, b.png and images/c.png."""
    (tmp_path / "images").mkdir()
    for name in ("a.png", "b.png", "images/c.png"):
        (tmp_path / name).write_bytes(png())
    return tmp_path


def read(folder, record, **settings):
    """The one document of a file with one record."""
    path = folder / "in.jsonl"
    path.write_text(json.dumps(record), encoding="utf-8")
    [document] = read_documents(path, **settings)
    return document


def shown(parts):
    """Parts in short: texts as they are, images as `<name>`, `role:` before them."""
    return [
        (f"{part.role}:" if part.role else "") + (part.text if isinstance(part, Text) else f"<{part.name}>")
        for part in parts
    ]


def refusal(folder, content, name="in.jsonl", **settings):
    """The message of the error that a file's content raises."""
    path = folder / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(InputError) as caught:
        read_documents(path, **settings)
    assert caught.value.exit_code == 3 and "\n" not in str(caught.value)
    return str(caught.value).replace(str(folder), "DIR")


TEXT, A = {"type": "text", "text": "Pip"}, {"type": "image", "image": "a.png"}


# Forms


def test_the_canonical_content_form(folder):
    record = {
        "id": "s1",
        "content": [TEXT, A, TEXT],
        "layout": "T I",
        "generation": {"seed": 3},
        "meta": {"k": 1},
    }
    document = read(folder, record)
    assert (document.id, document.layout, document.generation, document.meta) == (
        "s1",
        "T I",
        {"seed": 3},
        {"k": 1},
    )
    assert shown(document.parts) == ["Pip", "<a.png>", "Pip"]
    assert document.images[0].source == (folder / "a.png").resolve()
    assert document.images[0].load().getpixel((0, 0)) == (255, 0, 0)


def test_messages_with_openai_and_transformers_parts(folder):
    url = "data:image/png;base64," + base64.b64encode(png("blue")).decode()
    content = [
        {"type": "image_url", "image_url": {"url": url}},
        {"type": "image_url", "image_url": "a.png"},
        {"type": "image", "url": "a.png"},
        {"type": "image", "path": "b.png"},
        {"type": "image", "base64": base64.b64encode(png("lime")).decode()},
        {"type": "text", "text": "What?"},
    ]
    messages = [{"role": "system", "content": "Be kind."}, {"role": "user", "content": content}]
    document = read(folder, {"messages": messages, "target": "seven"})
    colours = [image.load().getpixel((0, 0)) for image in document.images]
    assert colours == [(0, 0, 255), (255, 0, 0), (255, 0, 0), (255, 0, 0), (0, 255, 0)]
    assert [part.role for part in document.parts] == ["system"] + ["user"] * 6
    assert document.target == (Text("seven"),)


def test_pairs_keep_the_order_of_their_fields(folder):
    assert shown(read(folder, {"text": "Pip", "image": "a.png"}).parts) == ["Pip", "<a.png>"]
    assert shown(read(folder, {"image": "a.png", "caption": ["a", "b"]}).parts) == ["<a.png>", "a b"]
    assert shown(read(folder, {"text": "Pip", "image": None}).parts) == ["Pip"]
    pairs = {"content": [{"text": "one", "image": "a.png"}, {"image": "b.png", "text": "two"}]}
    assert shown(read(folder, pairs).parts) == ["one", "<a.png>", "<b.png>", "two"]
    captions = {"images": ["a.png", "b.png"], "captions": ["one", "two"]}
    assert shown(read(folder, captions).parts) == ["<a.png>", "one", "<b.png>", "two"]


def test_llava_conversations_with_placeholders(folder):
    turns = [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "A lamp."}]
    document = read(folder, {"id": 7, "image": "a.png", "conversations": turns})
    assert document.id == "7"
    assert shown(document.parts) == ["user:<a.png>", "user:What?", "assistant:A lamp."]
    several = [{"from": "human", "value": "Is <image> like <image>?"}]
    document = read(folder, {"images": ["a.png", "b.png"], "conversations": several})
    assert shown(document.parts) == ["user:Is", "user:<a.png>", "user:like", "user:<b.png>", "user:?"]
    messages = {"messages": [{"role": "user", "content": "See <image>"}], "images": ["a.png"]}
    assert shown(read(folder, messages).parts) == ["user:See", "user:<a.png>"]


def test_a_placeholder_is_text_where_the_numbers_differ_and_outside_such_records(folder):
    turns = [{"from": "system", "value": "Hi."}, {"from": "human", "value": "Write <image> twice: <image>"}]
    document = read(folder, {"image": "a.png", "conversations": turns})
    assert shown(document.parts) == ["system:Hi.", "user:<a.png>", "user:Write <image> twice: <image>"]
    document = read(folder, {"content": [{"type": "text", "text": "<image>"}, A]})
    assert shown(document.parts) == ["<image>", "<a.png>"]
    document = read(folder, {"conversations": [{"from": "human", "value": "no image, no <image"}]})
    assert shown(document.parts) == ["user:no image, no <image"]


def test_mmc4_images_stand_before_their_sentences(folder):
    info = [
        {"image_name": "b.png", "matched_text_index": 1, "matched_sim": 0.3, "raw_url": "http://x/y"},
        {"image_name": "a.png", "matched_text_index": 0, "matched_sim": 0.3},
    ]
    record = {
        "text_list": ["One.", "Two.", "Three."],
        "image_info": info,
        "similarity_matrix": [[0.1, 0.3, 0.1], [0.3, 0.1, 0.1]],
        "url": "http://x",
    }
    document = read(folder, record)
    assert shown(document.parts) == ["<a.png>", "One.", "<b.png>", "Two. Three."]
    assert document.meta == {"url": "http://x"}


def test_obelics_texts_and_images_in_turn(folder):
    record = {"images": [None, "a.png", None], "texts": ["One.", None, "Two."], "metadata": "[]"}
    assert shown(read(folder, record).parts) == ["One.", "<a.png>", "Two."]


def test_comm_has_input_and_gold_answer(folder):
    record = {
        "model_input": "How? (1) <IMAGE>(2) Go on.",
        "model_output": "(3) Stir. <IMAGE>",
        "input_image_list": ["a.png"],
        "output_gt_image_list": ["b.png"],
        "prediction_image_list": ["never_looked_at.png"],
    }
    document = read(folder, record)
    assert shown(document.parts) == ["How? (1)", "<a.png>", "(2) Go on."]
    assert shown(document.target) == ["(3) Stir.", "<b.png>"]


def annotation(**changes):
    record = {
        "sentences": ["One.", "Two.", "Three."],
        "images": ["a.png", "dummy/that/is/not/there.jpg"],
        "sentence_ixs": [0, 2],
        "image_first": [True, False],
        "generate_mode": "generate_images",
        "num_iter": 1,
    }
    return {**record, **changes}


def test_the_official_annotation_asks_for_its_last_image(folder):
    path = folder / "annt.json"
    path.write_text(
        json.dumps([annotation(), annotation(num_iter=3, sentences=["A.", "B.", "C."])], indent=4)
    )
    first, second = read_documents(path)
    assert shown(first.parts) == ["<a.png>", "One. Two. Three."] and first.layout == "I"
    assert second.layout == "I T I"
    assert first.id != second.id


def test_the_official_annotation_asks_for_text(folder):
    record = annotation(images=["a.png", "b.png"], image_first=[False, True], generate_mode="generate_texts")
    document = read(folder, {**record, "multiround_context": ["x"]})
    assert shown(document.parts) == ["One.", "<a.png>", "Two.", "<b.png>", "Three."]
    assert document.layout == "T" and document.meta == {"multiround_context": ["x"]}
    no_image = annotation(
        images=[], sentence_ixs=[], image_first=[], generate_mode="generate_texts", num_iter=2
    )
    assert read(folder, no_image).layout == "T I"


def test_two_images_of_one_sentence_keep_their_order(folder):
    record = annotation(
        images=["a.png", "b.png", "x"], sentence_ixs=[0, 0, 1], image_first=[True, True, False]
    )
    assert shown(read(folder, record).parts) == ["<a.png>", "<b.png>", "One. Two."]


def test_a_documents_file_of_one_object_or_of_a_list(folder):
    (folder / "one.json").write_text(json.dumps({"content": [TEXT]}, indent=2))
    (folder / "list.json").write_text(json.dumps([{"content": [TEXT]}, {"content": [TEXT, TEXT]}]))
    assert [len(d.parts) for d in read_documents(folder / "one.json")] == [1]
    assert [len(d.parts) for d in read_documents(folder / "list.json")] == [1, 2]


def test_a_mark_at_the_start_windows_line_ends_blank_lines_and_no_last_line_end(folder):
    lines = [json.dumps({"content": [{"type": "text", "text": text}]}) for text in ("é", "b", "c")]
    content = b"\xef\xbb\xbf" + "\r\n\r\n".join(lines).encode()
    (folder / "in.jsonl").write_bytes(content)
    assert [d.text for d in read_documents(folder / "in.jsonl")] == ["é", "b", "c"]
    assert refusal(folder, content + b"\r\n{").startswith("DIR/in.jsonl:6:2: not JSON")


def test_ids_are_made_from_line_and_content_where_missing(folder):
    content = json.dumps({"content": [TEXT]})
    (folder / "in.jsonl").write_text(f"{content}\n{content}\n")
    first, second = (document.id for document in read_documents(folder / "in.jsonl"))
    assert first.startswith("line1-") and second.startswith("line2-") and first[6:] == second[6:]


def test_other_fields_are_carried_along(folder):
    assert read(folder, {"content": [TEXT], "source": "web", "meta": {"k": 1}}).meta == {
        "source": "web",
        "k": 1,
    }


def test_absent_images_may_be_left_out_without_moving_the_others(folder):
    info = [
        {"image_name": name, "matched_text_index": i} for i, name in enumerate(["x.png", "a.png", "b.png"])
    ]
    record = {"text_list": ["One.", "Two.", "Three."], "image_info": info}
    document = read(folder, record, skip_missing_images=True)
    assert shown(document.parts) == ["One.", "<a.png>", "Two.", "<b.png>", "Three."]
    turns = [{"from": "human", "value": "<image> and <image>"}]
    record = {"images": ["x.png", "a.png"], "conversations": turns}
    assert shown(read(folder, record, skip_missing_images=True).parts) == ["user:and", "user:<a.png>"]


def test_what_is_written_is_read_back_and_files_in_the_folder_are_not_copied(folder):
    documents = [
        Document(id="a", parts=[Text("<image> </s> \u2028 é"), Image(folder / "images" / "c.png")]),
        Document(id="b", parts=[Image(PILImage.new("RGB", (2, 2), "blue")), Image(png("lime"))]),
    ]
    write_documents(folder / "out.jsonl", documents)
    first, second = read_documents(folder / "out.jsonl")
    assert first.parts[0] == documents[0].parts[0] and first.images[0].name == "images/c.png"
    assert [image.name for image in second.images] == ["images/out_0.png", "images/out_1.png"]
    assert [image.load().getpixel((0, 0)) for image in second.images] == [(0, 0, 255), (0, 255, 0)]
    before = (folder / "out.jsonl").read_bytes()
    write_documents(folder / "again.jsonl", [first, second])
    assert (folder / "again.jsonl").read_bytes() == before


# Images beside the texts

Q, ASK = {"type": "text", "text": "Q"}, {"type": "image"}


def asked(content, answer="A"):
    return [{"role": "user", "content": content}, {"role": "assistant", "content": answer}]


@pytest.mark.parametrize(
    "prompt",
    [asked([ASK, Q])[:1], asked("Q")[:1], asked("<image>Q")[:1], "Q", "<image>Q"],
)
@pytest.mark.parametrize("completion", ["A", asked("", "A")[1:]])
def test_a_completion_is_the_target(folder, prompt, completion):
    document = read(folder, {"images": ["a.png"], "prompt": prompt, "completion": completion})
    assert [text.partition(":")[2] or text for text in shown(document.parts)] == ["<a.png>", "Q"]
    assert [part.text for part in document.target] == ["A"]
    assert {part.role for part in document.parts} == {None if isinstance(prompt, str) else "user"}
    assert not document.remarks


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({"prompt": 3, "completion": "A"}, "prompt: found the number 3, expected a list"),
        ({"prompt": "Q", "completion": asked([ASK])}, "no image is named beside the texts"),
        ({"prompt": asked([ASK])[:1], "completion": "A"}, "no image is named beside the texts"),
    ],
)
def test_a_wrong_completion_is_refused_with_its_field(folder, record, message):
    with pytest.raises(InputError, match=message):
        read(folder, record)


@pytest.mark.parametrize(
    ("record", "parts"),
    [
        ({"image": ["a.png"], "messages": asked("<image>Q")}, ["<a.png>", "Q", "A"]),
        ({"image": "a.png", "messages": asked("<image>Q")}, ["<a.png>", "Q", "A"]),
        ({"images": ["a.png"], "messages": asked([Q])}, ["<a.png>", "Q", "A"]),
        ({"images": ["a.png"], "messages": asked("<image> Q", [Q])}, ["<a.png>", "Q", "Q"]),
        (
            {"images": ["a.png"], "messages": asked([{"type": "text", "text": "See <image>"}])},
            ["See", "<a.png>", "A"],
        ),
        ({"images": ["a.png"], "messages": asked([ASK, Q])}, ["<a.png>", "Q", "A"]),
        (
            {"images": ["a.png", "b.png"], "messages": [*asked([ASK, Q]), *asked([Q, ASK])]},
            ["<a.png>", "Q", "A", "Q", "<b.png>", "A"],
        ),
        (
            {
                "images": ["a.png", "b.png"],
                "messages": asked([ASK, {"type": "text", "text": "and <image>?"}]),
            },
            ["<a.png>", "and", "<b.png>", "?", "A"],
        ),
        ({"images": [{"path": "a.png"}], "messages": asked([ASK, Q])}, ["<a.png>", "Q", "A"]),
        (
            {"images": ["a.png"], "messages": asked([ASK | {"text": None, "index": 0}, Q | {"index": None}])},
            ["<a.png>", "Q", "A"],
        ),
        (
            {"images": ["a.png", "b.png"], "messages": asked([ASK | {"index": 1}, ASK | {"index": 0}])},
            ["<b.png>", "<a.png>", "A"],
        ),
        (
            {"images": ["a.png"], "messages": [{"role": "system", "content": "S"}, *asked("Q")]},
            ["S", "<a.png>", "Q", "A"],
        ),
        ({"images": None, "messages": asked("Q")}, ["Q", "A"]),
        ({"images": ["a.png"], "messages": asked([A, Q])}, ["<a.png>", "Q", "A"]),
        ({"images": ["a.png"], "content": [Q, ASK]}, ["Q", "<a.png>"]),
        ({"file_name": "a.png", "text": "A dog."}, ["<a.png>", "A dog."]),
        (
            {"images": ["a.png", "b.png"], "messages": asked([A, Q, A | {"image": "b.png"}])},
            ["<a.png>", "Q", "<b.png>", "A"],
        ),
        ({"file_name": "a.png", "caption": "A dog."}, ["<a.png>", "A dog."]),
    ],
)
def test_images_that_are_named_beside_the_texts(folder, record, parts):
    document = read(folder, record)
    assert [text.partition(":")[2] or text for text in shown(document.parts)] == parts
    assert not document.remarks


@pytest.mark.parametrize(
    ("record", "message"),
    [
        (
            {"images": ["a.png"], "messages": asked([ASK, ASK])},
            "messages[0].content[1]: found 2 parts for images, expected 1 as in images",
        ),
        (
            {"images": ["a.png", "b.png"], "messages": asked([ASK, Q])},
            "found 1 parts for images, expected 2 as in images",
        ),
        ({"images": [], "messages": asked([ASK, Q])}, "found 1 parts for images, expected 0"),
        ({"messages": asked([ASK, Q])}, "messages[0].content[0].image: missing"),
        (
            {"images": ["a.png", "b.png"], "messages": asked([ASK | {"index": 0}] * 2)},
            "found the indices [0, 0], expected each below 2 once",
        ),
        (
            {"images": ["a.png"], "image": "b.png", "messages": asked("<image>Q")},
            "image: found the string 'b.png', which has no place",
        ),
        (
            {"video": "v.mp4", "conversations": [{"from": "human", "value": "<video> What?"}]},
            "video: found the string 'v.mp4'",
        ),
        (
            {"conversations": [{"from": "human", "value": "Q", "image": "a.png"}]},
            "conversations[0].image: found the string",
        ),
        ({"messages": asked("Q"), "system": "Be kind."}, "system: found the string 'Be kind.'"),
        (
            {"messages": asked([{"type": "text", "text": "Q", "image": "a.png"}])},
            "messages[0].content[0].image: found",
        ),
        (
            {"messages": [{"role": "user", "content": "Q", "images": ["a.png"]}]},
            "messages[0].images: found a list",
        ),
        ({"text": "Q", "images": ["a.png"]}, "images: found a list, which has no place"),
        ({"content": [Q], "answers": ["A"]}, "answers: found a list"),
        ({"images": ["b.png"], "messages": asked([A, Q])}, "images: found 1 images beside others"),
        ({"content": [Q, {"type": "image_url", "image_url": None}]}, "content[1].image: missing"),
        ({"image": "a.png", "question": "Q", "answer": "A"}, "question: found the string 'Q'"),
        ({"text_list": ["a"], "image_info": [], "videos": ["v.mp4"]}, "videos: found a list"),
        ({"text": "Q", "input_file_name": "a.png"}, "input_file_name: found the string"),
    ],
)
def test_no_image_and_no_answer_is_lost(folder, record, message):
    found = refusal(folder, json.dumps(record))
    assert found.startswith("DIR/in.jsonl:1: ") and message in found


SPELLINGS = (
    "<image>", "<IMAGE>", "<image></image>", "<image/>", "<img>", "<img/>", "[IMG]", "[image]", "<|image|>",
    "<|image_pad|>", "<ImageHere>", "<image-placeholder>", "<image_placeholder>", "{image}", "{{image}}",
    "<start_of_image>", "<__media__>", "<|vision_start|><|image_pad|><|vision_end|>",
)  # fmt: skip


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_the_spellings_of_placeholders(folder, spelling):
    turns = [{"from": "human", "value": f"Is {spelling} like\n{spelling}?"}]
    document = read(folder, {"images": ["a.png", "b.png"], "conversations": turns})
    assert shown(document.parts) == ["user:Is", "user:<a.png>", "user:like", "user:<b.png>", "user:?"]
    assert document.remarks == ()
    # Of another number it is text, in a record of another form too; and both are told.
    for images in (["a.png"], []):
        document = read(folder, {"images": images, "conversations": turns})
        assert shown(document.parts)[-1] == f"user:{turns[0]['value']}" and len(document.images) == len(
            images
        )
        assert document.remarks == (AS_TEXT,) and document.place == f"{folder / 'in.jsonl'}:1"
    # In our own form a user may type what he likes.
    document = read(folder, {"content": [{"type": "text", "text": spelling}, A]})
    assert shown(document.parts) == [spelling, "<a.png>"] and document.remarks == ()


@pytest.mark.parametrize(
    "spelling", ["<image_{}>", "<image {}>", "<image{}>", "<|image_{}|>", "[image {}]", "<img{}>"]
)
def test_numbered_placeholders_say_which_image_they_mean(folder, spelling):
    for first in (0, 1):
        words = f"{spelling.format(first + 1)} then {spelling.format(first)}"
        record = {"images": ["a.png", "b.png"], "conversations": [{"from": "human", "value": words}]}
        assert shown(read(folder, record).parts) == ["user:<b.png>", "user:then", "user:<a.png>"]
    twice = spelling.format(1) * 2
    record = {"images": ["a.png", "b.png"], "conversations": [{"from": "human", "value": twice}]}
    assert read(folder, record).remarks == (AS_TEXT,)


def test_what_is_doubtful_is_told_once_for_a_file_with_its_first_place(folder, caplog):
    line = json.dumps({"image": "a.png", "conversations": [{"from": "human", "value": "<image> <image>"}]})
    (folder / "in.jsonl").write_text(f"{line}\n{line}\n")
    read_documents(folder / "in.jsonl")
    [message] = [record.getMessage() for record in caplog.records]
    assert f"{folder / 'in.jsonl'}:1: document 'line1-" in message and "(2 of 2 documents)" in message


def test_a_field_that_says_again_what_others_say_loses_nothing(folder):
    record = {"prompt": " q ", "messages": asked([A, Q]), "image_path": "a.png", "answers": ["A", "a"]}
    document = read(folder, record)
    assert document.remarks == tuple(f"unused field {name!r}" for name in ("prompt", "image_path", "answers"))
    for name, value in (("prompt", "Q?"), ("answers", ["A", "B"]), ("image_path", "b.png")):
        assert f"{name}: found" in refusal(folder, json.dumps({**record, name: value}))


def test_fields_that_are_carried_along_are_told_by_name(folder):
    document = read(folder, {"content": [TEXT | {"lang": "en"}], "source": "web", "meta": {"image": "x"}})
    assert document.meta == {"source": "web", "image": "x"}
    assert document.remarks == ("unused field 'content[].lang'", "unused field 'source'")


def test_a_file_may_be_compressed_or_piped_in(folder, monkeypatch):
    lines = "".join(json.dumps({"content": [TEXT, A], "id": name}) + "\n" for name in "ab").encode()
    (folder / "in.jsonl.gz").write_bytes(gzip.compress(lines))
    assert [one.id for one in read_documents(folder / "in.jsonl.gz")] == ["a", "b"]
    whole = json.dumps([{"content": [TEXT, A], "id": name} for name in "ab"], indent=1).encode()
    (folder / "in.json.gz").write_bytes(gzip.compress(whole))
    assert [one.id for one in read_documents(folder / "in.json.gz")] == ["a", "b"]
    for data in (gzip.compress(lines)[:-9], b"\x1f\x8bnothing", lines):
        assert "damaged" in refusal(folder, data, name="bad.jsonl.gz")
    assert "found gzip data" in refusal(folder, gzip.compress(lines))
    monkeypatch.chdir(folder)
    for data in (lines, whole, gzip.compress(lines)):
        monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(data)))
        assert [one.images[0].name for one in read_documents("-")] == ["a.png", "a.png"]


def test_a_folder_in_place_of_a_file_names_what_lies_in_it(folder):
    for name in ("x.jsonl", "y.jsonl", "z.parquet"):
        (folder / name).write_text("{}")
    with pytest.raises(InputError) as caught:
        read_documents(folder)
    assert str(caught.value).endswith(f"such as {folder}/*.jsonl or {folder}/z.parquet")


# Refusals


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "DIR/in.jsonl:1:2: not JSON (Expecting property name"),
        ('{"content": []} {"content": []}', "DIR/in.jsonl:1:17: not JSON (Extra data)"),
        ('{"id": NaN}', "DIR/in.jsonl:1: found NaN, which is not JSON"),
        ('{"id": -Infinity}', "DIR/in.jsonl:1: found -Infinity, which is not JSON"),
        ('{"id": 1e999}', "DIR/in.jsonl:1: found the number 1e999, expected a finite one"),
        ('{"id": 1, "id": 2}', "DIR/in.jsonl:1: found the field 'id' twice"),
        (
            '{"content": [{"type": "text", "text": "\\ud800"}]}',
            "content[0].text: found the lone surrogate U+D800",
        ),
        ("[1]", "DIR/in.jsonl:1: found a list, expected an object"),
        ('"text"', "DIR/in.jsonl:1: found the string 'text', expected an object"),
        ("{}", "found the fields none, expected those of a document (messages, content"),
        ('{"parts": [], "name": 1}', "found the fields parts, name, expected those of a document"),
        ('{"content": null}', "DIR/in.jsonl:1: content: found null, expected a list"),
        ('{"content": []}', "found an empty document, expected at least one text or image"),
        ('{"content": [{"type": "text", "text": ""}]}', "found an empty document"),
        ('{"content": [3]}', "content[0]: found the number 3, expected an object"),
        ('{"content": [{}]}', "content[0]: found an object, expected a part with a type"),
        (
            '{"content": [{"type": "video"}]}',
            "content[0].type: found the string 'video', expected \"text\" or",
        ),
        ('{"content": [{"type": "text", "txt": "a"}]}', "content[0].text: missing, found type, txt"),
        (
            '{"content": [{"type": "text", "text": 5}]}',
            "content[0].text: found the number 5, expected a string",
        ),
        (
            '{"content": [{"type": "image", "image": null}]}',
            "content[0].image: found null, expected a string",
        ),
        ('{"content": [{"type": "image"}]}', "content[0].image: missing"),
        ('{"content": "a", "layuot": "T"}', "layuot: there is no such field, did you mean 'layout'?"),
        (
            '{"content": "a", "layout": "TXT"}',
            "layout: found the string 'TXT', expected \"auto\", or T and I",
        ),
        ('{"content": "a", "generation": 3}', "generation: found the number 3, expected an object"),
        ('{"content": "a", "id": ""}', "id: found the string '', expected 1 to 200 printable characters"),
        ('{"content": "a", "id": "a\\nb"}', "id: found the string"),
        ('{"content": "a", "id": true}', "id: found true or false, expected a string"),
        ('{"content": "a", "target": [7]}', "target[0]: found the number 7"),
        ('{"messages": [{"content": "a"}]}', "messages[0].role: missing, found content"),
        ('{"messages": [{"role": "", "content": "a"}]}', "messages[0].role: found the string ''"),
        (
            '{"conversations": [{"from": "cat", "value": "a"}]}',
            "conversations[0].from: found the string 'cat'",
        ),
        ('{"texts": ["a"], "images": []}', "texts: found 1 items, expected 0 as in images"),
        ('{"texts": ["a"], "images": ["a.png"]}', "texts[0]: found both a text and an image at one index"),
        ('{"texts": [null], "images": [null]}', "texts[0]: found neither a text and an image"),
    ],
)
def test_a_wrong_line_is_refused_with_its_place(folder, line, message):
    assert message in refusal(folder, line)


@pytest.mark.parametrize("index", [-1, 3, 1.5, "0", None, True])
def test_a_wrong_matched_text_index_is_named(folder, index):
    info = [{"image_name": "a.png", "matched_text_index": index}]
    record = {"text_list": ["a", "b", "c"], "image_info": info}
    message = refusal(folder, json.dumps(record))
    assert "DIR/in.jsonl:1: image_info[0].matched_text_index: found" in message
    assert "expected a whole number from 0 to 2" in message


def test_a_similarity_matrix_of_another_shape_is_refused_with_both(folder):
    record = {"text_list": ["a", "b"], "image_info": [], "similarity_matrix": [[1, 2]]}
    assert "found 1 x [2], expected 0 images x 2 texts" in refusal(folder, json.dumps(record))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"sentence_ixs": [0]}, "sentence_ixs: found 1 items, expected 2 as in images"),
        ({"image_first": [True, "no"]}, "image_first[1]: found the string 'no', expected true or false"),
        (
            {"sentence_ixs": [0, 3]},
            "sentence_ixs[1]: found the number 3, expected a whole number from 0 to 2",
        ),
        ({"generate_mode": "paint"}, "generate_mode: found the string 'paint', expected \"generate_images\""),
        ({"num_iter": 0}, "num_iter: found the number 0, expected a whole number from 1"),
        ({"sentences": None}, "sentences: found null, expected a list"),
        ({"sentence_ixs": [2, 0]}, "sentence_ixs: found a list, expected the image to generate"),
        ({"images": ["missing.png", "x"]}, "images[0]: there is no file 'missing.png'"),
    ],
)
def test_a_wrong_annotation_is_refused_with_its_field(folder, changes, message):
    text = json.dumps([annotation(), annotation(**changes)])
    found = refusal(folder, text, name="annt.json")
    assert found.startswith("DIR/annt.json: [1].") and message in found


def test_an_annotation_that_asks_for_an_image_needs_a_dummy(folder):
    record = annotation(images=[], sentence_ixs=[], image_first=[])
    assert "images: found a list, expected a dummy" in refusal(folder, json.dumps(record))


def test_the_line_and_column_of_a_json_file(folder):
    assert refusal(folder, '[\n  {"content": "a"},\n  {]\n]', name="in.json").startswith(
        "DIR/in.json:3:4: not JSON"
    )


def test_equal_ids_are_refused_with_both_lines(folder):
    lines = '{"id": "a", "content": "x"}\n\n{"id": "b", "content": "x"}\n{"id": "a", "content": "y"}\n'
    assert refusal(folder, lines) == "DIR/in.jsonl:4: id: found 'a', which DIR/in.jsonl:1 already has"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "found no document"),
        (b"\n \r\n", "found no document"),
        ('{"content": "é"}'.encode("utf-16"), "found UTF-16, expected UTF-8"),
        (b'{"content": "x"}\n{"content": "\xff"}', "in.jsonl:2: byte 13 is 0xff, which is not UTF-8"),
    ],
)
def test_a_file_that_is_no_utf8_or_empty_is_refused(folder, content, message):
    assert message in refusal(folder, content)


@pytest.mark.parametrize(
    "content",
    ["[" * 100_000, '{"content": ' * 100_000, '{"meta": ' + "[" * 100 + "]" * 100 + ', "content": "a"}'],
)
def test_deep_nesting_is_refused_at_once(folder, content):
    begin = time.process_time()
    assert "nested more than 64 levels deep" in refusal(folder, content)
    assert time.process_time() - begin < 1


def test_very_long_numbers_and_texts_are_refused_at_once(folder):
    begin = time.process_time()
    assert "a number of 50000 digits" in refusal(folder, '{"id": ' + "1" * 50_000 + "}")
    long = json.dumps({"content": [{"type": "text", "text": "a" * 10_000_000}]})
    assert "content[0].text: found 10000000 characters, expected at most" in refusal(folder, long)
    assert time.process_time() - begin < 2


@pytest.mark.parametrize(
    "reference",
    [
        "http://host/a.png",
        "https://host/a.png",
        "file:///etc/passwd",
        "FILE:/etc/passwd",
        "s3://bucket/a",
        "ftp://h/a",
    ],
)
def test_addresses_are_never_fetched(folder, reference):
    message = refusal(folder, json.dumps({"content": [{"type": "image", "image": reference}]}))
    assert "DIR/in.jsonl:1: content[0].image: found the address" in message and "never fetched" in message


def test_no_path_leads_out_of_the_allowed_folder(folder, tmp_path_factory):
    outside = tmp_path_factory.mktemp("outside") / "secret.png"
    outside.write_bytes(png())
    (folder / "link.png").symlink_to(outside)
    (folder / "up").symlink_to(folder.parent)
    (folder.parent / (folder.name + "b")).mkdir()
    beside = folder.parent / (folder.name + "b") / "a.png"
    beside.write_bytes(png())
    for reference in (
        str(outside),
        "/etc/passwd",
        "../" + outside.parent.name + "/secret.png",
        "images/../../" + folder.name + "b/a.png",
        str(beside),
        "link.png",
        f"up/{folder.name}b/a.png",
        "images/../link.png",
    ):
        message = refusal(folder, json.dumps({"content": [{"type": "image", "image": reference}]}))
        assert "lies outside the allowed folder" in message, reference
    wider = {"content": [{"type": "image", "image": "link.png"}]}
    assert read(folder, wider, image_root=folder.parent).images[0].load().size == (2, 2)


def test_an_absolute_path_or_a_link_inside_the_folder_is_fine(folder):
    (folder / "link.png").symlink_to(folder / "images" / "c.png")
    for reference in (str(folder / "a.png"), "./images/../a.png", "link.png"):
        assert read(folder, {"content": [{"type": "image", "image": reference}]}).images[0].load().size == (
            2,
            2,
        )


def test_images_are_looked_up_beside_the_file_and_then_under_the_root(folder, tmp_path_factory):
    elsewhere = tmp_path_factory.mktemp("records")
    record = {"content": [{"type": "image", "image": "images/c.png"}]}
    assert (
        read(elsewhere, record, image_root=folder).images[0].source == (folder / "images" / "c.png").resolve()
    )


def test_what_is_no_regular_file_is_refused_without_waiting(folder):
    os.mkfifo(folder / "pipe.png")
    for reference, word in (
        ("pipe.png", "is a pipe"),
        ("images", "is a folder"),
        ("none.png", "there is no file"),
    ):
        assert word in refusal(folder, json.dumps({"content": [{"type": "image", "image": reference}]}))
    for reference in ("", "a\0.png"):
        assert "expected a path" in refusal(
            folder, json.dumps({"content": [{"type": "image", "image": reference}]})
        )
    with pytest.raises(InputError, match="found a pipe"):
        read_documents(folder / "pipe.png")
    with pytest.raises(InputError, match="there is no such file"):
        read_documents(folder / "none.jsonl")
    with pytest.raises(InputError, match="there is no such folder"):
        read_documents(folder / "pipe.png", image_root=folder / "none")


@pytest.mark.parametrize(
    "url", ["data:image/png,abc", "data:image/png;base64,%%%", "data:image/png;base64", "data:"]
)
def test_a_damaged_data_url_is_refused(folder, url):
    message = refusal(folder, json.dumps({"content": [{"type": "image", "image": url}]}))
    assert "content[0].image: " in message and "base64" in message


def test_control_characters_do_not_reach_a_message(folder):
    message = refusal(folder, json.dumps({"content": [{"type": "image", "image": "a\x1b[31m\n.png"}]}))
    assert "\x1b" not in message


VALID = [
    {"id": "s", "content": [TEXT, A], "layout": "T", "generation": {"seed": 1}, "target": [TEXT]},
    {"messages": [{"role": "user", "content": [A, TEXT]}, {"role": "assistant", "content": "a"}]},
    {"content": [{"type": "image_url", "image_url": {"url": "a.png"}}, {"type": "image", "base64": "AAAA"}]},
    {"image": "a.png", "caption": ["a", "b"]},
    {"images": ["a.png"], "captions": ["a"]},
    {"images": ["a.png"], "conversations": [{"from": "human", "value": "<image> a"}]},
    {
        "text_list": ["a"],
        "image_info": [{"image_name": "a.png", "matched_text_index": 0}],
        "similarity_matrix": [[1]],
    },
    {"images": ["a.png", None], "texts": [None, "a"]},
    {
        "model_input": "<IMAGE>",
        "input_image_list": ["a.png"],
        "model_output": "a",
        "output_gt_image_list": [],
    },
    annotation(),
]
names = st.sampled_from(
    sorted({name for record in VALID for name in record} | {"type", "role", "url", "value"})
)
anything = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(-2, 3), st.floats(allow_nan=False), st.text(max_size=4)),
    lambda inner: st.one_of(st.lists(inner, max_size=2), st.dictionaries(names, inner, max_size=2)),
    max_leaves=4,
)


def places_of(value, place=()):
    """Where the values inside a JSON value stand."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [place, *(deeper for key, item in items for deeper in places_of(item, (*place, key)))]


@settings(max_examples=400)
@given(data=st.data())
def test_a_record_with_any_value_changed_is_a_document_or_one_kind_of_error(folder, data):
    record = copy.deepcopy(data.draw(st.sampled_from(VALID)))
    *above, last = data.draw(st.sampled_from(places_of(record)[1:]))
    parent = record
    for key in above:
        parent = parent[key]
    if data.draw(st.booleans()):
        parent[last] = data.draw(anything)
    else:
        del parent[last]
    try:
        assert isinstance(document_from_record(record, folder), Document)
    except InputError as error:
        assert str(error).startswith("record: ") and "\n" not in str(error)


@pytest.mark.parametrize("record", VALID)
def test_the_records_that_are_changed_there_are_valid_to_begin_with(folder, record):
    assert document_from_record(record, folder).parts


def picture_document(name, colour):
    return Document(id=name, parts=(Image(PILImage.new("RGB", (4, 4), colour)),))


def test_written_images_replace_no_other_and_keep_their_names(tmp_path):
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "out_0.png").write_bytes(b"mine")
    for _ in range(2):
        write_documents(tmp_path / "out.jsonl", [picture_document("a", "red"), picture_document("b", "blue")])
        assert (tmp_path / "images" / "out_0.png").read_bytes() == b"mine"
        names = sorted(path.name for path in (tmp_path / "images").iterdir())
        assert names == ["out_0.png", "out_1.png", "out_2.png"]
    assert [d.images[0].load().getpixel((0, 0)) for d in read_documents(tmp_path / "out.jsonl")] == [
        (255, 0, 0),
        (0, 0, 255),
    ]


def test_a_conversion_that_fails_leaves_no_image_behind(tmp_path):
    broken = Document(id="b", parts=(Image(b"no image"),))
    with pytest.raises(ImageError):
        write_documents(tmp_path / "out.jsonl", [picture_document("a", "red"), broken])
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]
