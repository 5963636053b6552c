"""The whole model: what must not matter does not, what must matter does."""

import dataclasses

import pytest
import torch

from mm_interleaved.models.denoising import DiffusionNoise
from mm_interleaved.models.interleaved import MMInterleavedForConditionalGeneration
from mm_interleaved.models.targets import TrainingTargets
from mm_interleaved.tokens.visibility import NO_IMAGE
from tiny import BOS, EOS, PAD, image_ids, tiny_config, tiny_model


@pytest.fixture(scope="module")
def model():
    return tiny_model().double()


def pixels(count, size=32, seed=0):
    return torch.rand(
        count, 3, size, size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64
    )


def row(config, *parts):
    """Token ids of parts: an int list is text, "I" an image; and where the images start."""
    ids, starts = [BOS], []
    for part in parts:
        if part == "I":
            starts.append(len(ids))
            ids += image_ids(config)
        else:
            ids += part
    return ids, starts


def batch_of(config, rows, **more):
    length, images = max(len(ids) for ids, _ in rows), max(len(starts) for _, starts in rows)
    return {
        "input_ids": torch.tensor([ids + [PAD] * (length - len(ids)) for ids, _ in rows]),
        "attention_mask": torch.tensor([[1] * len(ids) + [0] * (length - len(ids)) for ids, _ in rows]),
        "image_start": torch.tensor([starts + [NO_IMAGE] * (images - len(starts)) for _, starts in rows]),
        **more,
    }


def drawn_noise(count, seed=0):
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(2, count, 4, 8, 8, generator=generator, dtype=torch.float64)
    timestep = torch.randint(0, 1000, (count,), generator=generator)
    return DiffusionNoise(timestep, noise[0], noise[1], torch.zeros(count, dtype=torch.bool))


@torch.no_grad()
def test_a_padded_batch_equals_its_rows_alone(model):
    rows = [row(model.config, [5, 6], "I", [7, 8, 9], "I", [4]), row(model.config, [9], "I", [3])]
    images = pixels(3)
    together = model(**batch_of(model.config, rows, pixel_values=images)).logits
    for i, (chosen, own) in enumerate(zip(rows, (images[:2], images[2:]), strict=True)):
        alone = model(**batch_of(model.config, [chosen], pixel_values=own)).logits[0]
        torch.testing.assert_close(together[i, : len(alone)], alone, rtol=0, atol=1e-10)


@torch.no_grad()
def test_packed_documents_equal_the_documents_alone(model):
    documents = [
        row(model.config, [5, 6], "I", [7], "I", [4, EOS]),
        row(model.config, "I", [8, 9], "I", [EOS]),
    ]
    images, noise = pixels(4), drawn_noise(4)
    lengths = [len(ids) for ids, _ in documents]
    packed_row = (
        documents[0][0] + documents[1][0],
        documents[0][1] + [lengths[0] + s for s in documents[1][1]],
    )
    packed = model(
        **batch_of(
            model.config,
            [packed_row],
            pixel_values=images,
            target_pixel_values=images,
            targets=TrainingTargets(noise=noise),
        ),
        position_ids=torch.tensor([[*range(lengths[0]), *range(lengths[1])]]),
        document_start=torch.tensor([[0] * lengths[0] + [lengths[0]] * lengths[1]]),
    )
    losses = []
    for i, (start, document) in enumerate(zip((0, lengths[0]), documents, strict=True)):
        own = slice(2 * i, 2 * i + 2)
        own_noise = DiffusionNoise(*[value[own] for value in noise])
        alone = model(
            **batch_of(model.config, [document], pixel_values=images[own], target_pixel_values=images[own]),
            targets=TrainingTargets(noise=own_noise),
        )
        torch.testing.assert_close(
            packed.logits[0, start : start + lengths[i]], alone.logits[0], rtol=0, atol=1e-10
        )
        losses.append(
            (alone.image_loss, 2 if i == 0 else 1)
        )  # an image that opens its document does not count
    expected = sum(loss * count for loss, count in losses) / 3
    torch.testing.assert_close(packed.image_loss, expected, rtol=0, atol=1e-10)


@torch.no_grad()
def test_released_packing_lets_text_attend_across_documents():
    released = tiny_model(compat="released").double()
    first, second = row(released.config, [5, 6, EOS]), row(released.config, [8, 9])
    ids = torch.tensor([first[0] + second[0]])
    start = torch.tensor([[0] * len(first[0]) + [len(first[0])] * len(second[0])])
    packed = released(input_ids=ids, document_start=start).logits[0, len(first[0]) :]
    alone = released(input_ids=torch.tensor([second[0]])).logits[0]
    assert not torch.allclose(packed, alone)


@torch.no_grad()
def test_a_word_sees_earlier_images_and_no_later_one(model):
    document = row(model.config, "I", [7, 8], "I", [9])
    images = pixels(2)
    before = model(**batch_of(model.config, [document], pixel_values=images)).logits[0]
    other = images.clone()
    other[1] = pixels(1, seed=7)[0]
    after = model(**batch_of(model.config, [document], pixel_values=other)).logits[0]
    second_start = document[1][1]
    assert torch.equal(before[: second_start + 1], after[: second_start + 1])
    assert not torch.allclose(before[second_start + 1 :], after[second_start + 1 :])


@torch.no_grad()
@pytest.mark.parametrize("rule", ["previous", "all"])
def test_the_painter_looks_at_the_images_that_the_rule_names(rule):
    model = tiny_model(context_images=rule).double()
    document = row(model.config, [5], "I", [6], "I", [7], "I", [8])
    images, noise = pixels(3), drawn_noise(3)

    def loss_of_third(pixel_values):
        # Text hidden states change with any image, so only what reaches the U-Net directly is varied here.
        batch = batch_of(model.config, [document])
        features = model.encode_images(pixel_values)
        hidden = torch.zeros(1, len(document[0]), 32, dtype=torch.float64)
        only_third = torch.tensor([False, False, True])
        starts = torch.zeros_like(batch["input_ids"])
        return model.denoising_loss(
            hidden,
            features,
            batch["image_start"],
            TrainingTargets(
                document_start=starts, image_target=only_third, target_pixel_values=images, noise=noise
            ),
        )

    for changed in range(3):
        other = images.clone()
        other[changed] = pixels(1, seed=9)[0]
        same = torch.equal(loss_of_third(images), loss_of_third(other))
        seen = changed == 1 or (rule == "all" and changed == 0)
        assert same != seen, f"image {changed}"


@torch.no_grad()
def test_dropped_conditioning_is_the_negative_one(model):
    document = row(model.config, [5], "I", [6, 7], "I")
    images, noise = pixels(2), drawn_noise(2)
    dropped = noise._replace(drop=torch.tensor([True, True]))
    arguments = batch_of(model.config, [document], pixel_values=images, target_pixel_values=images)
    before = model(**arguments, targets=TrainingTargets(noise=dropped)).image_loss
    other_text = dict(arguments, input_ids=arguments["input_ids"].clone())
    other_text["input_ids"][0, 1] = 9
    assert torch.equal(before, model(**other_text, targets=TrainingTargets(noise=dropped)).image_loss)
    assert not torch.equal(
        model(**arguments, targets=TrainingTargets(noise=noise)).image_loss,
        model(**other_text, targets=TrainingTargets(noise=noise)).image_loss,
    )


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_every_dtype_runs_and_stays_near_float64(model, dtype):
    document = row(model.config, [5, 6], "I", [7, 8], "I", [9])
    images, noise = pixels(2), drawn_noise(2)
    arguments = batch_of(model.config, [document], target_pixel_values=images)
    exact = model(**arguments, pixel_values=images, targets=TrainingTargets(noise=noise))
    low = tiny_model().to(dtype)
    low_noise = noise._replace(noise=noise.noise.to(dtype), latent_noise=noise.latent_noise.to(dtype))
    arguments["target_pixel_values"] = images.to(dtype)
    output = low(**arguments, pixel_values=images.to(dtype), targets=TrainingTargets(noise=low_noise))
    assert output.logits.dtype == dtype
    allowed = {torch.float32: 1e-4, torch.bfloat16: 0.1, torch.float16: 0.02}[dtype]
    assert (output.logits.double() - exact.logits).abs().max() <= allowed * exact.logits.abs().max()
    assert abs(output.image_loss.double() - exact.image_loss) <= allowed * exact.image_loss


@torch.no_grad()
def test_an_autoencoder_that_leaves_the_range_of_float16_is_computed_in_float32(caplog):
    decoder = tiny_model().image_decoder
    latents = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(5))
    assert decoder.half().decode(latents).isfinite().all()
    assert "range of float16" not in caplog.text
    # What the first convolutions make of this is beyond 65504; the norms after them make all sizes alike.
    decoder.float().vae.post_quant_conv.weight.mul_(1e4)
    expected = decoder.decode(latents)
    found = decoder.half().decode(latents)
    assert "range of float16" in caplog.text
    torch.testing.assert_close(found, expected, rtol=0, atol=0.05)


@torch.no_grad()
@pytest.mark.parametrize("size", [48, 64])
def test_other_input_resolutions_run(model, size):
    features = model.encode_images(pixels(1, size))
    grid = size // 8
    assert [level.shape[-1] for level in features.pyramid] == [4 * grid, 2 * grid, grid, grid // 2]
    document = row(model.config, [5], "I", [6])
    assert torch.isfinite(
        model(**batch_of(model.config, [document], pixel_values=pixels(1, size))).logits
    ).all()


@torch.no_grad()
@pytest.mark.parametrize("height, width", [(32, 48), (40, 24), (64, 64)])
def test_other_output_sizes_and_aspect_ratios_run(model, height, width):
    document = row(model.config, [5], "I", [6], "I")
    target = torch.rand(2, 3, height, width, dtype=torch.float64)
    output = model(**batch_of(model.config, [document], pixel_values=pixels(2), target_pixel_values=target))
    assert torch.isfinite(output.image_loss)


def test_wrong_image_sizes_are_refused(model):
    with pytest.raises(ValueError, match="square with sides a multiple of 16"):
        model.encode_images(torch.zeros(1, 3, 32, 48, dtype=torch.float64))


def test_slots_are_checked_against_the_table_not_counted(model):
    ids, starts = row(model.config, [5], "I", [6, 7])
    with pytest.raises(ValueError, match="1 images need 3 slot tokens at the places of image_start"):
        model(
            input_ids=torch.tensor([ids]), image_start=torch.tensor([[starts[0] + 1]]), pixel_values=pixels(1)
        )


@pytest.mark.parametrize("without", ["text_synchronizer", "image_synchronizer"])
def test_the_twin_that_cannot_look_trains(without):
    model = tiny_model(**{without: None}).double()
    document = row(model.config, [5], "I", [6], "I")
    ids = torch.tensor([document[0]])
    output = model(
        **batch_of(model.config, [document], pixel_values=pixels(2), target_pixel_values=pixels(2)),
        text_target=ids > 4,
    )
    output.loss.backward()
    assert torch.isfinite(output.loss)


def test_documents_without_images_train_too(model):
    ids = torch.tensor([[BOS, 5, 6, EOS]])
    output = model(input_ids=ids, text_target=ids > 0)
    assert torch.isfinite(output.text_loss) and output.image_loss is None


def test_every_trainable_parameter_gets_a_gradient():
    model = tiny_model().double()
    document = row(model.config, [5, 6], "I", [7, 8], "I", [9])
    ids = torch.tensor([document[0]])
    some_dropped = drawn_noise(2)._replace(drop=torch.tensor([True, False]))
    output = model(
        **batch_of(model.config, [document], pixel_values=pixels(2), target_pixel_values=pixels(2)),
        text_target=ids > 4,
        targets=TrainingTargets(noise=some_dropped),
    )
    output.loss.backward()
    without = [name for name, p in model.named_parameters() if p.requires_grad and p.grad is None]
    assert all(name.startswith("image_decoder.vae") for name in without), without


def test_parts_that_do_not_fit_are_refused_naming_the_numbers():
    unet = tiny_config().unet_config
    with pytest.raises(ValueError, match=r"cross_attention_dim 20 must equal conditioning_resampler\.dim 16"):
        MMInterleavedForConditionalGeneration(tiny_config(unet_config={**unet, "cross_attention_dim": 20}))
    with pytest.raises(
        ValueError, match=r"num_hidden_layers 5 must be a multiple of adapter\.num_interactions 4"
    ):
        vision = tiny_config().vision_config.to_dict() | {"num_hidden_layers": 5}
        MMInterleavedForConditionalGeneration(tiny_config(vision_config=vision))


def test_a_configuration_survives_json(tmp_path):
    config = tiny_config()
    config.save_pretrained(tmp_path)
    again = type(config).from_pretrained(tmp_path)
    for name in ("adapter", "slot_resampler", "text_synchronizer", "image_synchronizer"):
        assert again.part(name) == config.part(name)
    assert dataclasses.asdict(again.part("text_synchronizer"))["levels"] == (0, 1, 2)


def test_a_new_model_starts_as_its_parts_say():
    torch.manual_seed(0)
    fresh = MMInterleavedForConditionalGeneration(tiny_config())
    for layer in fresh.language_model.synchronized_layers:
        synchronizer = fresh.language_model.layers[layer].synchronizer
        assert not synchronizer.gate.any() and not synchronizer.synchronizer.sampling_offsets.weight.any()
        assert 0 < synchronizer.synchronizer.sampling_offsets.bias.abs().max() <= 2
    assert all(not block.conv.weight.any() for block in fresh.image_decoder.synchronizers.skips)
    assert fresh.vision.mean[0, 0] == pytest.approx(0.48145466)
    assert fresh.text_head.new.bias.eq(95).all() and fresh.text_head.base.bias[-2:].eq(-100).all()


# ---- Targets ---------------------------------------------------------------------------------------


def learning(model):
    """Arguments of a pass with an image to be learned, and its noise."""
    document = row(model.config, [5, 6], "I", [7])
    images = pixels(1)
    return batch_of(model.config, [document], pixel_values=images), images, drawn_noise(1)


@torch.no_grad()
def test_targets_may_be_given_in_one_or_as_fields_of_a_batch(model):
    arguments, images, noise = learning(model)
    text = arguments["input_ids"] > 4
    whole = TrainingTargets(text_target=text, target_pixel_values=images, noise=noise)
    fields = {"text_target": text, "target_pixel_values": images, "image_target": None}
    losses = [
        model(**arguments, targets=whole).loss,
        model(**arguments, **fields, targets=TrainingTargets(noise=noise)).loss,
    ]
    assert torch.equal(*losses)
    with pytest.raises(ValueError, match="found text_target in them and beside them"):
        model(**arguments, text_target=text, targets=whole)
    with pytest.raises(TypeError, match="unexpected keyword argument 'labels'"):
        model(**arguments, labels=text)


@torch.no_grad()
def test_names_of_the_first_release_are_taken_with_a_warning(model):
    arguments, images, noise = learning(model)
    weight, hide = torch.tensor([2.0], dtype=torch.float64), torch.tensor([True])
    targets = TrainingTargets(noise=noise, image_weight=weight, hide_earlier=hide, target_pixel_values=images)
    expected = model(**arguments, targets=targets).image_loss
    with pytest.warns(DeprecationWarning, match="TrainingTargets") as warned:
        found = model(
            **arguments, target_pixel_values=images, draws=noise, image_weight=weight, hide_earlier=hide
        ).image_loss
    assert torch.equal(found, expected) and len(warned) == 3
