"""Token ids, table of images and pixels: read off each other, or refused in one sentence, at every entry."""

import copy
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from transformers import DynamicCache, GenerationConfig

from mm_interleaved.models.prefix_cache import PrefixCache
from mm_interleaved.models.transformers_versions import CACHE
from mm_interleaved.tokens.visibility import NO_IMAGE
from tiny import BOS, PAD, image_ids, tiny_model

GREEDY = {"do_sample": False, "eos_token_id": None, "suppress_tokens": [298, 299]}


@pytest.fixture(scope="module")
def model():
    return tiny_model()


def ids_of(config, *parts):
    """One row: lists are words, "I" is an image."""
    row = [BOS]
    for part in parts:
        row += image_ids(config) if part == "I" else part
    return torch.tensor([row])


def pixels(count, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(count, 3, 32, 32, generator=generator, dtype=torch.float32)


# ---- What can be read off the ids is read off them -------------------------------------------------


@torch.no_grad()
def test_the_table_of_images_is_read_off_the_ids(model):
    rows = [ids_of(model.config, [5, 6], "I", [7, 8], "I")[0], ids_of(model.config, "I", [7])[0]]
    ids = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=PAD)
    table = torch.tensor([[3, 9], [1, NO_IMAGE]])
    told = model(input_ids=ids, image_start=table, pixel_values=pixels(3))
    read = model(input_ids=ids, pixel_values=pixels(3))
    assert torch.equal(told.logits, read.logits)
    other = model(input_ids=ids, pixel_values=pixels(3, seed=1))
    assert not torch.equal(read.logits, other.logits)
    features = model.encode_images(pixels(3))
    assert torch.equal(model.embed(ids, table, features.slots), model.embed(ids, None, features.slots))


@torch.no_grad()
def test_an_image_start_that_only_announces_is_no_image(model):
    announced = torch.cat([ids_of(model.config, [5], "I", [7]), torch.tensor([[298]])], dim=1)
    assert model(input_ids=announced, pixel_values=pixels(1)).logits.shape[1] == announced.shape[1]


@torch.no_grad()
@pytest.mark.parametrize("cached", [0, 3, 8, 12, 17])
def test_forward_with_a_cache_reads_images_where_the_row_goes_on(model, cached):
    ids = ids_of(model.config, [5, 6], "I", [7, 8, 9, 4, 5], "I", [6, 7])
    images = pixels(2)
    whole = model(input_ids=ids, pixel_values=images)
    cache = PrefixCache(model.config.text_config)
    num_before = int((ids[0, :cached] == 298).sum())
    if cached:
        before = images[:num_before] if num_before else None
        model(input_ids=ids[:, :cached], pixel_values=before, cache=cache)
    rest = model(input_ids=ids[:, cached:], pixel_values=images[num_before:], cache=cache)
    torch.testing.assert_close(rest.logits, whole.logits[:, cached:], rtol=0, atol=1e-5)
    assert cache.num_tokens == ids.shape[1]


@torch.no_grad()
def test_use_cache_makes_a_cache_that_knows_the_images(model):
    ids = ids_of(model.config, [5], "I", [6, 7, 8])
    whole = model(input_ids=ids, pixel_values=pixels(1)).logits[:, -2:]
    first = model(input_ids=ids[:, :-2], pixel_values=pixels(1), use_cache=True)
    rest = model(input_ids=ids[:, -2:], cache=first.cache).logits
    torch.testing.assert_close(rest, whole, rtol=0, atol=1e-5)


# ---- Further turns ---------------------------------------------------------------------------------


def next_turn(model, sequences, *parts):
    return torch.cat([sequences, *(ids_of(model.config, part)[:, 1:] for part in parts)], dim=1)


@pytest.mark.parametrize("options", [{}, {"cache_implementation": "static", "max_new_tokens": 40}])
@pytest.mark.parametrize("gives", ["new images", "all images"])
def test_an_image_in_a_second_and_third_turn_is_seen(model, options, gives):
    images = pixels(3)
    output = model.generate(
        ids_of(model.config, [5, 6], "I", [9]),
        pixel_values=images[:1],
        return_dict_in_generate=True,
        **{"max_new_tokens": 3, **options},
        **GREEDY,
    )
    sequences, cache = output.sequences[:, :10], output[CACHE]
    cache.crop(9 - cache.num_tokens)
    for turn in (1, 2):
        sequences = next_turn(model, sequences, [20], "I", [21])
        given = images[turn : turn + 1] if gives == "new images" else images[: turn + 1]
        right = model.generate(sequences, pixel_values=images[: turn + 1], max_new_tokens=4, **GREEDY)
        found = model.generate(sequences, pixel_values=given, cache=cache, max_new_tokens=4, **GREEDY)
        assert torch.equal(found, right)
        other = model.generate(
            sequences,
            pixel_values=pixels(turn + 1, seed=7),
            max_new_tokens=4,
            **GREEDY,
        )
        assert not torch.equal(found, other)
        sequences = found


@pytest.mark.parametrize("options", [{"num_beams": 3}, {"num_beams": 2, "num_return_sequences": 2}])
def test_beams_in_a_second_turn_see_its_image(model, options):
    images = pixels(2)
    prompt = ids_of(model.config, [5], "I", [9])
    first = model.generate(
        prompt, pixel_values=images[:1], max_new_tokens=3, return_dict_in_generate=True, **GREEDY
    )
    ids = next_turn(model, first.sequences, [20], "I", [21])
    right = model.generate(ids, pixel_values=images, max_new_tokens=4, **options, **GREEDY)
    found = model.generate(
        ids, pixel_values=images[1:], cache=first[CACHE], max_new_tokens=4, **options, **GREEDY
    )
    assert torch.equal(found, right)


def test_rows_of_one_source_may_go_on_with_images_of_their_own(model):
    images = pixels(3)
    prompt = ids_of(model.config, [5], "I", [9])
    torch.manual_seed(0)
    first = model.generate(
        prompt,
        pixel_values=images[:1],
        do_sample=True,
        num_return_sequences=2,
        max_new_tokens=3,
        return_dict_in_generate=True,
        eos_token_id=None,
        suppress_tokens=[298, 299],
    )
    turn = ids_of(model.config, [20], "I", [21])[:, 1:].expand(2, -1)
    ids = torch.cat([first.sequences, turn], dim=1)
    found = model.generate(ids, pixel_values=images[1:], cache=first[CACHE], max_new_tokens=3, **GREEDY)
    alone = [
        model.generate(ids[i : i + 1], pixel_values=images[[0, 1 + i]], max_new_tokens=3, **GREEDY)
        for i in range(2)
    ]
    assert torch.equal(found, torch.cat(alone))


def test_guessed_words_that_spell_an_image_are_words(model):
    # The guesses are looked up in the prompt, where an image follows the same words.
    ids = ids_of(model.config, [5, 6], "I", [9, 5, 6])
    plain = model.generate(ids, pixel_values=pixels(1), max_new_tokens=8, **GREEDY)
    guessed = model.generate(
        ids, pixel_values=pixels(1), max_new_tokens=8, prompt_lookup_num_tokens=4, **GREEDY
    )
    assert torch.equal(plain, guessed)


def test_left_padded_rows_with_and_without_images_equal_each_alone(model):
    rows = [ids_of(model.config, [5, 6], "I", [7, 8])[0], ids_of(model.config, [9])[0]]
    width = max(map(len, rows))
    padded = [torch.nn.functional.pad(row, (width - len(row), 0), value=PAD) for row in rows]
    mask = torch.stack([torch.arange(width) >= width - len(row) for row in rows]).long()
    together = model.generate(
        torch.stack(padded), attention_mask=mask, pixel_values=pixels(1), max_new_tokens=4, **GREEDY
    )
    alone = [
        model.generate(row[None], pixel_values=given, max_new_tokens=4, **GREEDY)[0, -4:]
        for row, given in zip(rows, (pixels(1), None), strict=True)
    ]
    assert torch.equal(together[:, -4:], torch.stack(alone))


def test_no_images_at_all_may_be_said_in_any_way(model):
    ids = ids_of(model.config, [5, 6, 7])
    plain = model.generate(ids, max_new_tokens=3, **GREEDY)
    for given in ({"pixel_values": pixels(0)}, {"image_start": torch.empty(1, 0, dtype=torch.int64)}):
        assert torch.equal(plain, model.generate(ids, max_new_tokens=3, **given, **GREEDY))
    assert torch.equal(plain, model.generate(ids, max_new_tokens=3, use_cache=False, **GREEDY))
    config = GenerationConfig(max_new_tokens=3, use_cache=False, **GREEDY)
    assert torch.equal(plain, model.generate(ids, generation_config=config))
    assert config.use_cache is False, "a configuration belongs to whoever made it"


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_pixels_and_tables_of_other_dtypes_are_taken(dtype):
    model = tiny_model().to(dtype)
    ids = ids_of(model.config, [5], "I", [6])
    table = torch.tensor([[2]])
    right = model(input_ids=ids, image_start=table, pixel_values=pixels(1).to(dtype))
    found = model(input_ids=ids.int(), image_start=table.int(), pixel_values=pixels(1))
    assert torch.equal(found.logits, right.logits) and right.logits.dtype == dtype


def test_threads_that_share_a_model_do_not_see_each_others_images(model):
    ids = ids_of(model.config, [5, 6], "I", [9])

    def call(seed):
        return model.generate(ids, pixel_values=pixels(1, seed), max_new_tokens=6, **GREEDY)

    right = [call(seed) for seed in range(3)]
    with ThreadPoolExecutor(3) as pool:
        found = list(pool.map(call, [0, 1, 2] * 3))
    assert all(torch.equal(one, right[i % 3]) for i, one in enumerate(found))


# ---- What does not agree is refused ----------------------------------------------------------------

WRONG = {
    "pixels are missing": ((["5"], "I"), 0, None, "found 0 images, expected the 1"),
    "too few pixels": ((["5"], "I", ["6"], "I"), 1, None, "found 1 images, expected the 2"),
    "too many pixels": ((["5"], "I"), 2, None, "found 2 images, expected the 1"),
    "pixels without an image": ((["5", "6"],), 1, None, "found 1 images, expected the 0"),
    "a table of another place": ((["5"], "I", ["6"]), 1, [[1]], "at the places of image_start"),
    "a table with too few": ((["5"], "I", ["6"], "I"), 2, [[2]], "at the places of image_start"),
    "a table with too many": ((["5"], "I", ["6"]), 2, [[2, 6]], "at the places of image_start"),
    "a table of another number of rows": ((["5"], "I"), 1, [[2], [2]], "at the places of image_start"),
    "a slot too few": ((["5", "298", "299", "299", "7"],), 1, None, "row 0, token 5: found no slot"),
    "a slot too many": ((["5"], "I", ["299", "7"]), 1, None, "row 0, token 6: found a slot"),
    "an image that is cut off": ((["5", "298", "299", "299"],), 1, None, "row 0, token 5: found no slot"),
    "slots without a start": ((["5", "299", "299", "299"],), 1, None, "row 0, token 2: found a slot"),
}
ENTRIES = {
    "forward": lambda model, ids, **given: model(input_ids=ids, **given),
    "forward with a cache": lambda model, ids, **given: model(
        input_ids=ids, cache=PrefixCache(model.config.text_config), **given
    ),
    "generate": lambda model, ids, **given: model.generate(ids, max_new_tokens=2, **given),
    "generate with a cache": lambda model, ids, **given: model.generate(
        ids, max_new_tokens=2, cache=PrefixCache(model.config.text_config), **given
    ),
    "embed": lambda model, ids, image_start, pixel_values: model.embed(
        ids, image_start, None if pixel_values is None else model.encode_images(pixel_values).slots
    ),
}


@torch.no_grad()
@pytest.mark.parametrize("wrong", WRONG)
@pytest.mark.parametrize("entry", ENTRIES)
def test_what_does_not_agree_is_refused_at_every_entry(model, entry, wrong):
    parts, count, table, message = WRONG[wrong]
    ids = ids_of(model.config, *(part if part == "I" else [int(word) for word in part] for part in parts))
    given = {
        "pixel_values": pixels(count) if count else None,
        "image_start": None if table is None else torch.tensor(table),
    }
    with pytest.raises(ValueError, match=message):
        ENTRIES[entry](model, ids, **given)


@torch.no_grad()
@pytest.mark.parametrize(
    "wrong",
    [
        torch.zeros(1, 3, 32, 32, dtype=torch.uint8),
        torch.zeros(1, 32, 32, 3),
        torch.zeros(1, 1, 3, 32, 32),
        torch.zeros(1, 1, 32, 32),
    ],
    ids=["bytes", "channels last", "one axis too many", "grey"],
)
def test_pixels_of_another_kind_are_refused(model, wrong):
    ids = ids_of(model.config, [5], "I")
    with pytest.raises(ValueError, match="pixel_values: expected floating-point RGB"):
        model(input_ids=ids, pixel_values=wrong)
    with pytest.raises(ValueError, match="pixel_values: expected floating-point RGB"):
        model.generate(ids, pixel_values=wrong, max_new_tokens=1)


def test_a_turn_whose_image_is_not_given_is_refused(model):
    prompt = ids_of(model.config, [5], "I", [9])
    first = model.generate(
        prompt, pixel_values=pixels(1), max_new_tokens=3, return_dict_in_generate=True, **GREEDY
    )
    ids = next_turn(model, first.sequences, [20], "I", [21])
    for given in (None, pixels(3)):
        with pytest.raises(ValueError, match="expected the 1 that input_ids behind the cache hold"):
            model.generate(ids, pixel_values=given, cache=copy.deepcopy(first[CACHE]), max_new_tokens=2)


@torch.no_grad()
def test_a_cache_that_knows_no_images_is_refused_with_images(model):
    ids = ids_of(model.config, [5], "I", [9])
    cache = DynamicCache(config=model.config.text_config)
    for call in (
        lambda: model(input_ids=ids, pixel_values=pixels(1), cache=cache),
        lambda: model.generate(ids, pixel_values=pixels(1), cache=cache, max_new_tokens=2),
    ):
        with pytest.raises(ValueError, match="images need a PrefixCache, found DynamicCache"):
            call()
    words = ids_of(model.config, [5, 6])
    plain = model.generate(words, max_new_tokens=3, **GREEDY)
    assert torch.equal(plain, model.generate(words, cache=cache, max_new_tokens=3, **GREEDY))


@torch.no_grad()
def test_a_cache_that_ends_inside_an_image_is_refused(model):
    ids = ids_of(model.config, [5], "I", [9, 7])
    cache = model(input_ids=ids, pixel_values=pixels(1), use_cache=True).cache
    cache.crop(-3)
    with pytest.raises(ValueError, match="its 5 tokens end inside an image"):
        model.generate(ids, pixel_values=pixels(1), cache=cache, max_new_tokens=2)


def test_rows_padded_on_the_right_are_refused(model):
    ids = torch.tensor([[BOS, 5, 6], [BOS, 7, PAD]])
    with pytest.raises(ValueError, match="row 1 is padded on the right"):
        model.generate(ids, attention_mask=torch.tensor([[1, 1, 1], [1, 1, 0]]), max_new_tokens=2)


def test_targets_without_what_they_are_learned_from_are_refused(model):
    ids = ids_of(model.config, [5], "I", [6], "I")
    images, text = pixels(2), ids[:, :2]
    whole = {"input_ids": ids, "pixel_values": images}
    for given, message in (
        (whole | {"target_pixel_values": pixels(1)}, "target_pixel_values: found 1 images"),
        (whole | {"target_pixel_values": images, "use_cache": True}, "needs whole rows"),
        ({"input_ids": text, "target_pixel_values": images}, "target_pixel_values needs pixel_values"),
        ({"inputs_embeds": model.embed(text), "text_target": text > 4}, "text_target needs input_ids"),
    ):
        with pytest.raises(ValueError, match=message):
            model(**given)


def test_packed_rows_are_not_continued(model):
    ids = torch.tensor([[BOS, 5, BOS, 6]])
    start = torch.tensor([[0, 0, 2, 2]])
    for call in (
        lambda: model.generate(ids, document_start=start, max_new_tokens=2),
        lambda: model(input_ids=ids, document_start=start, use_cache=True),
    ):
        with pytest.raises(ValueError, match="several documents in a row"):
            call()


# ---- Caches that are not the beginning of the ids --------------------------------------------------


def after_a_turn(model, **options):
    """Ids and cache of a first turn with one image."""
    ids = ids_of(model.config, [5], "I", [9])
    output = model.generate(
        ids,
        pixel_values=pixels(1),
        max_new_tokens=3,
        return_dict_in_generate=True,
        **options,
        **GREEDY,
    )
    return output.sequences, output[CACHE]


@pytest.mark.parametrize("options", [{}, {"num_beams": 2}])
def test_a_cache_that_beams_leave_behind_is_refused(model, options):
    ids, cache = after_a_turn(model, num_beams=2)
    ids = next_turn(model, ids, [20, 21])
    with pytest.raises(ValueError, match=r"cache: found 2 rows, expected the 1 of input_ids"):
        model.generate(ids, cache=cache, max_new_tokens=2, **options, **GREEDY)


@pytest.mark.parametrize("length", [1, 5, 8])
def test_a_cache_as_long_as_the_ids_is_refused(model, length):
    ids, cache = after_a_turn(model)
    cache.crop(8 - cache.num_tokens)
    with pytest.raises(ValueError, match=rf"cache: found 8 tokens, expected fewer than the {length}"):
        model.generate(ids[:, :length], cache=cache, max_new_tokens=2, **GREEDY)


def test_a_static_cache_without_room_is_refused_and_with_it_goes_on(model):
    ids, cache = after_a_turn(model, cache_implementation="static")
    ids = next_turn(model, ids, [20, 21, 22])
    with pytest.raises(ValueError, match=r"cache: found room for \d+ tokens, expected room for 15"):
        model.generate(ids, cache=cache, max_new_tokens=3, **GREEDY)
    _, cache = after_a_turn(model, cache_implementation="static", max_cache_len=15)
    found = model.generate(ids, cache=cache, max_new_tokens=3, **GREEDY)
    right = model.generate(ids, pixel_values=pixels(1), max_new_tokens=3, **GREEDY)
    assert torch.equal(found, right)


@pytest.mark.parametrize("options", [{}, {"cache_implementation": "static", "max_cache_len": 40}])
@pytest.mark.parametrize("left", [1, 2, 8])
def test_a_cropped_cache_forgets_the_images_that_begin_behind_its_end(model, options, left):
    images, other = pixels(2), pixels(2, seed=5)
    ids, cache = after_a_turn(model, **options)
    ids = next_turn(model, ids[:, :8], [20], "I", [21])
    model.generate(ids, pixel_values=other[1:], cache=cache, max_new_tokens=2, **GREEDY)
    cache.crop(left - cache.num_tokens)
    assert cache.image_start.shape[1] == cache.image_index.shape[1] == int(left == 8)
    right = model.generate(ids, pixel_values=images, max_new_tokens=4, **GREEDY)
    found = model.generate(ids, pixel_values=images, cache=cache, max_new_tokens=4, **GREEDY)
    assert torch.equal(found, right)


@pytest.mark.parametrize("chunk", [1, 3, 100])
@pytest.mark.parametrize("parts", [([5, 6, 7],), ([5], "I", [9])])
def test_a_prompt_that_shall_be_read_in_chunks_is_refused(model, parts, chunk):
    ids, images = ids_of(model.config, *parts), pixels(parts.count("I"))
    config = GenerationConfig(prefill_chunk_size=chunk, max_new_tokens=3)
    for options in ({"prefill_chunk_size": chunk}, {"generation_config": config}):
        with pytest.raises(ValueError, match=f"prefill_chunk_size: found {chunk}, expected none"):
            model.generate(ids, pixel_values=images, **options)


# ---- Other forms than tables of whole numbers ------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("input_ids", lambda ids: ids[0]),
        ("input_ids", lambda ids: ids[None]),
        ("input_ids", lambda ids: ids.float()),
        ("input_ids", lambda ids: ids.bool()),
        ("input_ids", lambda ids: ids[:, :0]),
        ("input_ids", lambda ids: ids[:0]),
        ("image_start", lambda ids: torch.tensor([2])),
        ("image_start", lambda ids: torch.tensor(2)),
        ("image_start", lambda ids: torch.tensor([[2.5]])),
    ],
)
@pytest.mark.parametrize("entry", ["forward", "generate", "embed"])
def test_ids_and_tables_of_another_form_are_refused(model, name, change, entry):
    ids = ids_of(model.config, [5], "I", [9])
    given = {"input_ids": ids, name: change(ids)}
    with pytest.raises(ValueError, match=rf"{name}: (expected whole numbers of shape|found no token)"):
        if entry == "embed":
            model.embed(**given, slots=torch.zeros(1, 3, 32))
        else:
            getattr(model, entry)(**given, pixel_values=pixels(1))


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"input_ids": torch.full((1, 7), 5)}, "inputs_embeds: found embeddings of 1 x 5 tokens"),
        ({"image_start": torch.tensor([[2]])}, "image_start: an image ends at token 5"),
        ({"image_start": torch.tensor([[1], [1]])}, "image_start: expected whole numbers"),
    ],
)
def test_embeddings_that_hold_no_such_tokens_are_refused(model, given, message):
    images = pixels(given["image_start"].numel()) if "image_start" in given else None
    with pytest.raises(ValueError, match=message):
        model(inputs_embeds=torch.zeros(1, 5, 32), pixel_values=images, **given)
