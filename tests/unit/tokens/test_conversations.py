"""The processor as users of transformers know it: texts and images in, prompts out; text stays text."""

import base64
import io

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image as PILImage
from transformers import AutoProcessor, BatchFeature

from mm_interleaved import Document, Image, Text, register
from mm_interleaved.errors import ImageError
from mm_interleaved.tokens.processor import MMInterleavedProcessor
from mm_interleaved.tokens.text_prompts import RenderedPrompt
from tiny import BOS, EOS, image_ids, tiny_config, tiny_model, tiny_processor

SPELLINGS = ["<s>", "</s>", "<pad>", "<|image|>", "<|beginofimage|>", "<image>", "USER:", "ASSISTANT:"]
IMAGE_IDS = image_ids(tiny_config())


def picture(seed=0):
    pixels = np.random.default_rng(seed).integers(0, 255, (32, 32, 3), dtype=np.uint8)
    return PILImage.fromarray(pixels)


def png(image):
    file = io.BytesIO()
    image.save(file, "PNG")
    return file.getvalue()


@pytest.fixture(scope="module")
def processor():
    return tiny_processor()


@pytest.fixture(scope="module", params=["tiny", "byte_level", "llama"])
def any_processor(request):
    if request.param == "tiny":
        return tiny_processor()
    vocabulary = request.getfixturevalue(f"{request.param}_vocabulary")
    return MMInterleavedProcessor(
        vocabulary.tokenizer, 32, 32, vocabulary.num_slots, special_ids=vocabulary.special_ids()
    )


def user(*content):
    return {"role": "user", "content": list(content)}


def text(words):
    return {"type": "text", "text": words}


def image(seed=0):
    return {"type": "image", "image": picture(seed)}


# ---- Texts with images -----------------------------------------------------------------------------


def test_a_text_with_its_image_is_the_same_document(any_processor):
    found = any_processor(text="ab<|image|>cd", images=picture(), return_tensors="pt")
    expected = any_processor(Document(id="d", parts=[Text("ab"), Image(picture()), Text("cd")]))
    assert isinstance(found, BatchFeature)
    assert set(found) == {"input_ids", "attention_mask", "pixel_values", "image_start"}
    for name in ("input_ids", "pixel_values", "image_start"):
        assert torch.equal(found[name], expected[name])


def test_images_of_a_text_without_places_stand_before_it(processor):
    found = processor(text="ab", images=[picture(0), picture(1)], return_tensors="pt")
    parts = [Image(picture(0)), Image(picture(1)), Text("ab")]
    expected = processor(Document(id="d", parts=parts))
    assert torch.equal(found["input_ids"], expected.input_ids)
    assert torch.equal(found["pixel_values"], expected.pixel_values)


@pytest.mark.parametrize(
    "images",
    [
        [[picture(0)], [], [picture(1), picture(2)]],
        [picture(0), picture(1), picture(2)],
    ],
    ids=["nested", "flat"],
)
def test_a_batch_is_padded_on_the_left_and_equals_its_rows(processor, images):
    texts = ["a<|image|>b", "cd", "e<|image|>f<|image|>"]
    found = processor(text=texts, images=images, return_tensors="pt", padding=True)
    alone = [
        processor(text=texts[0], images=[picture(0)], return_tensors="pt"),
        processor(text=texts[1], return_tensors="pt"),
        processor(text=texts[2], images=[picture(1), picture(2)], return_tensors="pt"),
    ]
    for row, mask, one in zip(found["input_ids"], found["attention_mask"], alone, strict=True):
        assert torch.equal(row[mask.bool()], one["input_ids"][0]) and mask[-1] == 1
    assert torch.equal(found["pixel_values"], torch.cat([alone[0]["pixel_values"], alone[2]["pixel_values"]]))
    right = processor(text=texts, images=images, return_tensors="pt", padding_side="right")
    assert right["attention_mask"][:, 0].all()


def test_one_image_a_text_may_be_a_flat_list(processor):
    found = processor(text=["a", "bc"], images=[picture(0), picture(1)], return_tensors="pt")
    assert found["pixel_values"].shape[0] == 2 and (found["image_start"][:, 0] >= 1).all()


def test_every_kind_of_image_is_read(processor, tmp_path):
    file = tmp_path / "a.png"
    picture().save(file)
    expected = processor(text="a", images=picture(), return_tensors="pt")["pixel_values"]
    url = "data:image/png;base64," + base64.b64encode(png(picture())).decode()
    for source in (file, str(file), png(picture()), np.asarray(picture()), Image(picture()), url):
        found = processor(text="a", images=source, return_tensors="pt")["pixel_values"]
        assert torch.equal(found, expected)


def test_lists_and_arrays_are_returned_where_they_are_asked_for(processor):
    tensors = processor(text=["a", "bc"], return_tensors="pt")
    arrays = processor(text=["a", "bc"], return_tensors="np")
    lists = processor(text=["a", "bc"])
    assert isinstance(arrays["input_ids"], np.ndarray)
    assert arrays["input_ids"].tolist() == lists["input_ids"] == tensors["input_ids"].tolist()
    assert "pixel_values" not in tensors


@pytest.mark.parametrize(
    "arguments, message",
    [
        (
            {"text": "a<|image|>", "images": [picture(), picture()]},
            "found 1 times .* one for each of 2 images",
        ),
        ({"text": "<|image|><|image|>", "images": picture()}, "found 2 times .* one for each of 1 images"),
        ({"text": ["a", "b"], "images": [picture()]}, "images: found 1, expected 0"),
        ({"text": ["a", "b"], "images": [[picture()]]}, "images: found 1 entries, expected 2 lists"),
        ({"text": "a", "images": "https://x.org/a.png"}, r"images\[0\]: found the address"),
        ({"text": "a", "images": 7}, r"images\[0\]: found int, expected a PIL image"),
        ({"text": "a", "images": np.zeros((4, 4, 3))}, r"images\[0\]: found ndarray of float64 with shape"),
        ({"text": "a", "videos": [1]}, "videos: found"),
        ({"text": "a", "truncation": True}, "truncation: found True"),
        ({"text": "a", "return_tensors": "tf"}, "return_tensors: expected 'pt', 'np' or None, found 'tf'"),
        ({}, "expected either documents or text="),
    ],
)
def test_what_does_not_fit_is_refused(processor, arguments, message):
    with pytest.raises(ValueError, match=message):
        processor(**arguments)


def test_an_empty_image_is_no_image_that_is_yet_to_come(processor):
    with pytest.raises(ImageError, match="the file is empty"):
        processor(text="a", images=b"")


# ---- Text stays text -------------------------------------------------------------------------------


@given(st.lists(st.sampled_from([*SPELLINGS, "a", " ", "\n", "é", "<|"]), max_size=6).map("".join))
def test_no_text_becomes_a_special_token(any_processor, words):
    vocabulary = any_processor.vocabulary
    special = {vocabulary.image_start, vocabulary.image, vocabulary.bos, vocabulary.eos}
    [ids] = any_processor(text=words)["input_ids"]
    assert not special & set(ids[1:])
    asked = {"tokenize": True, "return_dict": True, "add_generation_prompt": True}
    messages = [user(text(words), image(), words), {"role": "assistant", "content": words}, user(words)]
    [ids] = any_processor.apply_chat_template(messages, **asked)["input_ids"]
    assert [token for token in ids if token in special] == [
        vocabulary.bos, *vocabulary.image_ids(), vocabulary.eos
    ]  # fmt: skip
    # Also on the way through text.
    prompt = any_processor.apply_chat_template(messages, add_generation_prompt=True)
    assert any_processor(text=[prompt])["input_ids"] == [ids]


def test_a_prompt_that_was_changed_is_plain_text(processor):
    prompt = processor.apply_chat_template([user(text("a"))], add_generation_prompt=True)
    assert isinstance(prompt, RenderedPrompt) and prompt == "<s>USER: a ASSISTANT:"
    [ids] = processor(text=prompt + "")["input_ids"]
    assert ids[1:].count(BOS) == 0


# ---- Conversations ---------------------------------------------------------------------------------


def test_a_conversation_is_the_prompt_of_its_document(any_processor):
    messages = [
        {"role": "system", "content": "Be kind."},
        user(text("What"), image(0), text("is this?")),
        {"role": "assistant", "content": [text("A lamp.")]},
        user(text("And"), image(1)),
    ]
    parts = [
        Text("Be kind.", role="system"),
        Text("What", role="user"), Image(picture(0), role="user"), Text("is this?", role="user"),
        Text("A lamp.", role="assistant"),
        Text("And", role="user"), Image(picture(1), role="user"),
    ]  # fmt: skip
    expected = any_processor(Document(id="c", parts=parts))
    found = any_processor.apply_chat_template(
        messages, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
    )
    for name in ("input_ids", "pixel_values", "image_start"):
        assert torch.equal(found[name], expected[name])
    ids = any_processor.apply_chat_template(messages, add_generation_prompt=True, tokenize=True)
    assert ids == expected.input_ids.tolist()


def test_a_prompt_ends_as_it_is_asked_to(processor):
    said = [user("Hi"), {"role": "assistant", "content": "Yes"}]

    def ending(messages, **asked):
        return processor.apply_chat_template(messages, **asked)

    assert ending(said[:1]) == "<s>USER: Hi"
    assert ending(said[:1], add_generation_prompt=True) == "<s>USER: Hi ASSISTANT:"
    assert ending(said) == "<s>USER: Hi ASSISTANT:Yes</s>"
    assert ending(said, continue_final_message=True) == "<s>USER: Hi ASSISTANT:Yes"
    assert ending(said, add_generation_prompt=True) == "<s>USER: Hi ASSISTANT:Yes</s>ASSISTANT:"
    ids = processor.apply_chat_template(said, tokenize=True)
    assert ids[0][-1] == EOS


def test_several_conversations_are_a_batch(processor):
    chats = [[user("Hi")], [user("Look", image(0), "and", image(1))]]
    asked = {"add_generation_prompt": True}
    texts = processor.apply_chat_template(chats, **asked)
    assert texts == [processor.apply_chat_template(chat, **asked) for chat in chats]
    found = processor.apply_chat_template(
        chats, tokenize=True, return_dict=True, return_tensors="pt", **asked
    )
    assert found["attention_mask"].shape[0] == 2 and len(found["pixel_values"]) == 2
    assert found["attention_mask"][:, -1].all()


def test_images_may_be_given_beside_the_conversation(processor):
    named = [user("a", image(0), "b", image(1))]
    unnamed = [user("a", {"type": "image"}, "b", {"type": "image"})]
    asked = {"tokenize": True, "return_dict": True, "return_tensors": "pt"}
    expected = processor.apply_chat_template(named, **asked)
    beside = processor.apply_chat_template(unnamed, images=[picture(0), picture(1)], **asked)
    prompt = processor.apply_chat_template(unnamed)
    later = processor(text=prompt, images=[picture(0), picture(1)], return_tensors="pt")
    mixed = processor.apply_chat_template(
        [user("a", image(0), "b", {"type": "image"})], images=[picture(1)], **asked
    )
    for found in (beside, later, mixed):
        assert all(torch.equal(found[name], expected[name]) for name in expected)
    with pytest.raises(ValueError, match="images: found 0, expected the 2 of the prompt"):
        processor.apply_chat_template(unnamed, **asked)


def test_paths_in_messages_are_bounded_by_a_folder(processor, tmp_path):
    (tmp_path / "inside").mkdir()
    for name in ("inside/a.png", "b.png"):
        picture().save(tmp_path / name)
    part = {"type": "image", "path": "a.png"}
    root = tmp_path / "inside"
    found = processor.apply_chat_template([user(part)], tokenize=True, return_dict=True, image_root=root)
    assert len(found["pixel_values"]) == 1
    for outside in ("../b.png", str(tmp_path / "b.png")):
        with pytest.raises(ValueError, match=r"messages\[0\]\.content\[0\]\.path: .* lies outside"):
            processor.apply_chat_template([user({"type": "image", "path": outside})], image_root=root)


@pytest.mark.parametrize(
    "message, found",
    [
        ({"content": "a"}, r"messages\[0\]\.role: found None"),
        ({"role": "user"}, r"messages\[0\]\.content: found NoneType"),
        (user({"type": "video", "video": "a.mp4"}), r"content\[0\]: found 'video'"),
        (user({"type": "text"}), r"content\[0\]\.text: found None"),
        (user({"type": "image_url", "image_url": {"url": "https://x.org/a.png"}}), "never fetched"),
    ],
)
def test_a_wrong_message_is_named(processor, message, found):
    with pytest.raises(ValueError, match=found):
        processor.apply_chat_template([message])


@pytest.mark.parametrize(
    "asked", [{"chat_template": "x"}, {"tools": [1]}, {"documents": [1]}, {"enable_x": 1}]
)
def test_what_templates_could_do_is_refused(processor, asked):
    with pytest.raises(ValueError, match=f"{next(iter(asked))}: found"):
        processor.apply_chat_template([user("a")], **asked)


def test_what_the_assistant_says_is_marked(processor):
    messages = [user("Hi"), {"role": "assistant", "content": "Yes"}, user("So")]
    found = processor.apply_chat_template(
        messages, tokenize=True, return_dict=True, return_assistant_tokens_mask=True, return_tensors="pt"
    )
    said = found["input_ids"][found["assistant_masks"].bool()]
    assert processor.decode(said) == "Yes</s>"


# ---- Back to text ----------------------------------------------------------------------------------


def test_ids_become_text_with_and_without_special_tokens(processor):
    ids = processor(text=["a<|image|>b", "c"], images=[[picture()], []], return_tensors="pt")["input_ids"]
    assert processor.batch_decode(ids, skip_special_tokens=True) == ["ab", "c"]
    spelled = processor.batch_decode(ids)
    assert spelled[0] == "<s>a<|image|>b" and spelled[1].endswith("<s>c")
    assert processor.decode(ids[0], skip_special_tokens=True) == "ab"
    assert processor.decode(ids) == spelled
    assert processor.decode(ids[0].tolist()) == spelled[0]
    assert processor.decode(IMAGE_IDS * 2) == "<|image|><|image|>"
    assert processor.post_process_image_text_to_text(ids) == ["ab", "c"]


# ---- With the model --------------------------------------------------------------------------------


def test_a_batch_goes_into_forward_and_generate(processor):
    model = tiny_model()
    documents = [
        Document(id="a", parts=[Text("hello"), Image(picture())]),
        Document(id="b", parts=[Text("x")]),
    ]
    batch = processor(documents, target_pixels=True).to("cpu")
    assert dict(batch).keys() == set(batch) and batch["input_ids"] is batch.input_ids and len(batch) == 9
    with pytest.raises(KeyError):
        batch["num_images"]
    output = model(**batch)
    assert output.text_loss is not None and output.image_loss is not None
    prompts = processor(documents, padding_side="left")
    texts = processor(text=["hello<|image|>", "x"], images=[[picture()], []], return_tensors="pt")
    options = {"max_new_tokens": 4, "suppress_tokens": [298, 299], "eos_token_id": None}
    found = model.generate(**prompts, **options)
    assert torch.equal(found, model.generate(**texts, **options))
    for i, document in enumerate(documents):
        alone = model.generate(**processor(document), **options)
        assert torch.equal(found[i, -4:], alone[0, -4:])


def test_a_processor_comes_back_through_auto_processor(processor, tmp_path):
    processor.save_pretrained(tmp_path)
    register()
    again = AutoProcessor.from_pretrained(tmp_path)
    assert type(again) is MMInterleavedProcessor and again.to_dict() == processor.to_dict()
    asked = {"text": "a<|image|>b", "images": picture()}
    assert again(**asked)["input_ids"] == processor(**asked)["input_ids"]
