"""What the model looks at: all of the weight is there, where it belongs, and watching changes nothing."""

import numpy as np
import pytest
import torch
from PIL import Image as PILImage

from mm_interleaved.documents.document import Document, Image, Text
from mm_interleaved.errors import UsageError
from mm_interleaved.generation import InterleavedGenerator
from mm_interleaved.generation.explanation import text_heat
from mm_interleaved.models.attention_maps import record_calls, side_shares, watch_calls
from tiny import tiny_model, tiny_processor

FEW = {"num_inference_steps": 2, "guidance_scale": 2.0, "max_new_tokens": 12, "seed": 5}


def make(model=None):
    model = model or tiny_model()
    processor = tiny_processor(model.config)
    with torch.no_grad():
        model.text_head.base.bias.fill_(-50)
        model.text_head.base.bias[processor.vocabulary.encode_text("abcdefghij ")] = 0
    return InterleavedGenerator(model, processor)


def square(colour):
    return Image(PILImage.new("RGB", (32, 32), colour))


@pytest.fixture(scope="module")
def generator():
    return make()


@pytest.fixture(scope="module")
def story(generator):
    given = Document(id="s", parts=[Text("Pip."), square((200, 30, 40)), Text("Lu."), square((0, 90, 0))])
    return generator.generate(given, layout="T I T", **FEW)


@pytest.fixture(scope="module")
def explanation(generator, story):
    return generator.explain(story, regions=4, grid=8, **FEW)


def test_every_text_token_is_there_and_all_of_its_weight(explanation, story):
    text = explanation.text
    for place, part in enumerate(story.parts):
        if isinstance(part, Text):
            written = "".join(t for t, p in zip(text.tokens, text.parts, strict=True) if p == place)
            assert written == part.text
    num = len(text.tokens), len(text.places), 2, 3
    assert text.location_TYHNP2.shape == (*num, 2, 2) and text.weight_TYHNLP.shape == (*num, 3, 2)
    assert text.images == (1, 3, 5) and text.places == ("layer 0", "layer 2")
    total = text.weight_TYHNLP.sum((-3, -2, -1)) + text.ignore_TYH
    torch.testing.assert_close(total, torch.ones_like(total))


def test_no_token_looks_at_an_image_that_comes_after_it(explanation):
    text = explanation.text
    for token, part in enumerate(text.parts):
        weight_N = text.weight_TYHNLP[token].sum((0, 1, 3, 4))
        for number, image in enumerate(text.images):
            assert (weight_N[number] > 0) == (image < part)


def test_every_region_of_a_generated_image_is_there_and_all_of_its_weight(explanation, story):
    [image] = explanation.images
    assert image.part == 5 and image.images == (1, 3) and image.pixel_error == 0
    assert image.places[0] == "skip 0" and image.places[-1] == "middle"
    assert image.heat_RYHNLGG.shape == (16, len(image.places), 2, 2, 4, 8, 8)
    total = image.heat_RYHNLGG.sum((-4, -3, -2, -1)) + image.ignore_RYH + image.outside_RYH
    torch.testing.assert_close(total, torch.ones_like(total))
    for shares in (image.heat_RYHNLGG, image.ignore_RYH, image.outside_RYH):
        assert float(shares.min()) >= -1e-6 and float(shares.max()) > 0.01


def test_what_is_heard_of_an_image_is_what_its_calls_say(generator, story, explanation):
    """The sums of the heat maps against the recorded weights themselves, for samples inside the images."""
    with record_calls(generator.model) as calls:
        generator.redo(story, 5, layout="T I T", **FEW)
    [image] = explanation.images
    for place in ("skip 0", "middle"):
        own = [call for call in calls if call.place == place]
        assert len(own) == FEW["num_inference_steps"]
        ignore = sum(call.plan.ignore[-1].mean(0) for call in own) / len(own)
        found = image.ignore_RYH[:, image.places.index(place)].mean(0)
        torch.testing.assert_close(found, ignore.float(), atol=1e-5, rtol=0)


def test_watching_changes_nothing_to_the_bit_and_leaves_nothing(generator, story):
    plain = generator.generate(story.branched(4), layout="T I", **FEW)
    seen = []
    with watch_calls(generator.model, seen.append):
        watched = generator.generate(story.branched(4), layout="T I", **FEW)
    after = generator.generate(story.branched(4), layout="T I", **FEW)
    count = len(seen)
    assert count > 0
    for other in (watched, after):
        assert other.parts[4] == plain.parts[4]
        assert np.array_equal(np.asarray(other.parts[5].load()), np.asarray(plain.parts[5].load()))
    generator.generate(story.branched(4), layout="I", **FEW)
    assert len(seen) == count
    hooks = torch.nn.modules.module._global_forward_pre_hooks
    assert not hooks


def test_the_shortcuts_are_taken_while_it_is_watched(generator):
    """The hidden states, which show the last bits, with shortcuts and while watched."""
    model = generator.model
    batch = generator.processor.collate(
        [generator.processor.encode(Document(parts=[square((9, 9, 9)), Text("a")]))]
    )

    def hidden():
        given = {"pixel_values": batch.pixel_values, "image_start": batch.image_start}
        with torch.no_grad():
            return model(input_ids=batch.input_ids, **given).hidden

    plain = hidden()
    with record_calls(model) as calls:
        watched = hidden()
    assert calls and torch.equal(plain, watched)


def test_with_weights_set_by_hand_the_map_peaks_where_it_must():
    """Every synchronizer looks with all its weight at one point right below the middle."""
    model = tiny_model()
    with torch.no_grad():
        for module in model.modules():
            if hasattr(module, "sampling_offsets") and hasattr(module, "base_size"):
                module.sampling_offsets.weight.zero_()
                module.attention_logits.weight.zero_()
                offset = torch.tensor([0.25, 0.125]) * module.base_size
                module.sampling_offsets.bias.copy_(offset.repeat(len(module.sampling_offsets.bias) // 2))
                logits = module.attention_logits.bias.view(module.num_heads, module.num_levels, -1)
                logits.fill_(-40)
                logits[:, 0] = 30
    generator = make(model)
    given = Document(id="s", parts=[square((200, 30, 40)), Text("Lu.")])
    found = generator.explain(generator.generate(given, layout="I T", **FEW), grid=8, regions=4, **FEW)
    text, [image] = found.text, found.images
    token = text.parts.index(1)
    expected = torch.tensor([0.75, 0.625]).expand_as(text.location_TYHNP2[token, :, :, 0])
    torch.testing.assert_close(text.location_TYHNP2[token, :, :, 0], expected)
    torch.testing.assert_close(text.weight_TYHNLP[token, :, :, 0, 0].sum(-1), torch.ones(2, 2))
    # The U-Net looks from each region's own place: that of the upper left, 0.125, sees 0.375 and 0.25.
    heat = image.heat_RYHNLGG[0, 0, 0, 0, 0]
    row, column = divmod(int(heat.argmax()), 8)
    assert (column, row) in ((2, 1), (3, 2), (2, 2), (3, 1))
    assert float(image.heat_RYHNLGG[0, 0, 0].sum()) == pytest.approx(1, abs=1e-4)
    assert float(heat[:4, :6].sum()) == pytest.approx(1, abs=1e-4)


@pytest.mark.parametrize(("cells", "size"), [(16, 8), (8, 16), (7, 5), (1, 4), (32, 32)])
def test_no_weight_is_lost_between_grids(cells, size):
    inside = torch.rand(50) * (1 - 1 / cells) + 0.5 / cells
    shares = side_shares(inside, cells, size)
    torch.testing.assert_close(shares.sum(-1), torch.ones(50))
    # Its centre of mass is the sample, to within a part and a cell.
    centre = shares @ ((torch.arange(size) + 0.5) / size)
    assert float((centre - inside).abs().max()) <= 0.5 / cells + 0.5 / size
    assert float(side_shares(torch.tensor([-1.0, 2.0]), cells, size).abs().sum()) == 0


def test_a_conversation_and_a_document_without_images_can_be_explained(generator):
    talk = Document(parts=[square((1, 2, 3)), Text("Who?", role="user")]).edited(0, square((1, 2, 3)))
    talk = Document(parts=[Text("Who?", role="user"), Image(talk.parts[0].source, role="user")])
    talk = generator.generate(talk, layout="T", **FEW)
    text = generator.explain(talk, **FEW).text
    assert "".join(t for t, p in zip(text.tokens, text.parts, strict=True) if p == 2) == talk.parts[2].text
    nothing = generator.explain(Document(parts=[Text("no image")]), **FEW)
    assert nothing.text is None and nothing.images == () and nothing.arrays() == {}


def test_arrays_are_named_by_their_axes(explanation):
    arrays = explanation.arrays()
    assert set(arrays) == {
        "text.location_TYHNP2",
        "text.weight_TYHNLP",
        "text.ignore_TYH",
        "part5.heat_RYHNLGG",
        "part5.ignore_RYH",
        "part5.outside_RYH",
    }
    for name, array in arrays.items():
        letters = name.rpartition("_")[2]
        assert array.ndim == len(letters), name


def test_the_heat_of_a_text_is_that_of_its_samples(explanation):
    text = explanation.text
    tokens = [token for token, part in enumerate(text.parts) if part == 6]
    heat_YNGG = text_heat(text, tokens)
    weight_YN = text.weight_TYHNLP[tokens].sum((-2, -1)).mean((0, 2))
    assert bool((heat_YNGG.sum((-2, -1)) <= weight_YN + 1e-6).all())
    inside = side_shares(text.location_TYHNP2[tokens], 16, 1)[..., 0].prod(-1)
    expected = (text.weight_TYHNLP[tokens, :, :, :, 0] * inside).sum(-1).mean((0, 2))
    assert bool((heat_YNGG.sum((-2, -1)) >= expected - 1e-5).all())
    assert float(heat_YNGG.sum()) > 0


def test_a_model_without_synchronizers_looks_at_nothing():
    blind = make(tiny_model(text_synchronizer=None, image_synchronizer=None))
    with pytest.raises(UsageError, match="has no synchronizers"):
        blind.explain(Document(parts=[Text("a")]), **FEW)
