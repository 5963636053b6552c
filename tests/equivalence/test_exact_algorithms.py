"""Whatever the synchronizers fold, share or leave out: results and gradients stay those of the definition.

Letters as in `models/synchronizer.py`.
"""

import copy

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from mm_interleaved.generation.session import InterleavedSession
from mm_interleaved.models.gated_synchronizer import GatedSynchronizer
from mm_interleaved.models.norms import normalize
from mm_interleaved.models.positions import resize_grid_table
from mm_interleaved.models.prefix_cache import PrefixCache
from mm_interleaved.models.synchronizer import FeatureSynchronizer
from mm_interleaved.models.unet import MapSynchronizer
from mm_interleaved.ops import sampling_plan
from mm_interleaved.ops.reference import sample_reference
from mm_interleaved.tokens.visibility import relative_image_index
from tiny import BOS, tiny_model

LEVELS = (4, 2)
CELLS, D, C, V, H, P = 20, 12, 10, 8, 2, 2
NUM_TERMS = H * (2 * P + len(LEVELS) * P)


def fill(module, seed=0):
    """Every parameter matters, in evaluation mode and float64."""
    generator = torch.Generator().manual_seed(seed)
    module = module.double().eval()
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * parameter[0].numel() ** -0.5)
    return module


def core(keep="values"):
    return FeatureSynchronizer(
        D, C, value_dim=V, num_heads=H, num_levels=2, num_points=P, max_images=6, base_size=4, keep=keep
    )


def make(form, keep="values"):
    if form == "core":
        return fill(core(keep))
    if form == "gated":
        return fill(GatedSynchronizer(core(keep), D, C))
    return fill(MapSynchronizer(core(keep), D, C, grid_size=3))


def by_definition(module, x, cells, index):
    """The released order: one query an image, each through all layers; nothing folded, nothing shared."""
    if isinstance(module, FeatureSynchronizer):
        return _core_by_definition(module, x, cells, index, torch.full((1, 1, 2), 0.5, dtype=torch.float64))
    features = module.feature_norm(cells)
    if isinstance(module, GatedSynchronizer):
        centre = torch.full((1, 1, 2), 0.5, dtype=torch.float64)
        seen = _core_by_definition(module.synchronizer, module.query_norm(x), features, index, centre)
        return module.gate.tanh() * seen
    height, width = x.shape[-2:]
    query = module.query_norm(x.flatten(2).mT) + resize_grid_table(module.position_table, (height, width))
    y, column = torch.arange(height).double() + 0.5, torch.arange(width).double() + 0.5
    centres = torch.stack([(column / width).repeat(height), (y / height).repeat_interleave(width)], dim=-1)[
        None
    ]
    index = index[:, None].expand(-1, height * width, -1)
    seen = _core_by_definition(module.synchronizer, query, features, index, centres)
    return module.conv(seen.mT.unflatten(2, (height, width)))


def _core_by_definition(module, query, features, index, reference):
    B, Q, N = index.shape
    value = module.value_projection(features).unflatten(-1, (H, -1))
    z = module.query_projection(query)[:, :, None] + module.relative_index_embedding.weight[index]
    offset = module.sampling_offsets(z).unflatten(-1, (H, 2 * P))
    logit = module.attention_logits(z).unflatten(-1, (H, 2, P + 1))[..., :P].flatten(-2)
    term = torch.cat([offset, logit], dim=-1)
    # As one query an image; then the images of a query side by side again.
    plans = [
        sampling_plan(
            term[:, :, n], term.new_zeros(6, *term.shape[3:]), index[:, :, n : n + 1], reference,
            num_levels=2, num_points=P, base_size=module.base_size,
        )
        for n in range(N)
    ]  # fmt: skip
    hidden = (index == 0)[:, :, None, :, None]
    logits = logit.transpose(2, 3).masked_fill(hidden, -torch.inf).flatten(3)
    weight = torch.cat([logits, logits.new_zeros(B, Q, H, 1)], dim=-1).softmax(-1)
    location = torch.cat([plan.location for plan in plans], dim=3)
    seen = sample_reference(
        value.flatten(1, 2), LEVELS * N, location, weight[..., :-1].unflatten(-1, (2 * N, P))
    )
    seen = seen + weight[..., -1:] * module.ignore_value.view(H, -1)
    return module.output_projection(seen.flatten(2))


def inputs(form, num_queries=5, num_images=3):
    generator = torch.Generator().manual_seed(1)
    shape = (2, D, 2, num_queries) if form == "map" else (2, num_queries, D)
    x = torch.randn(shape, generator=generator, dtype=torch.float64)
    cells = torch.randn(2, num_images, CELLS, C, generator=generator, dtype=torch.float64)
    visible = torch.rand(2, num_queries, num_images, generator=generator) < 0.6
    visible[0, 0] = False
    return x, cells, relative_image_index(visible[:, 1] if form == "map" else visible)


def compute(module, x, cells, index):
    return module(x, module.project_cells(cells, LEVELS), index)


FORMS = ("core", "gated", "map")


@torch.no_grad()
@pytest.mark.parametrize("keep", ["values", "features"])
@pytest.mark.parametrize("form", FORMS)
def test_folded_tables_change_nothing(form, keep):
    module = make(form, keep)
    x, cells, index = inputs(form)
    values = module.project_cells(cells, LEVELS)
    assert values.is_projected == (keep == "values")
    expected = by_definition(module, x, cells, index)
    torch.testing.assert_close(module(x, values, index), expected, rtol=0, atol=1e-12)
    assert values.folded._kept, "nothing was folded"
    torch.testing.assert_close(module(x, values, index), expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("num_queries", [3, 20], ids=["few queries", "many queries"])
@pytest.mark.parametrize("keep", ["values", "features"])
@pytest.mark.parametrize("form", FORMS)
def test_all_gradients_are_those_of_the_definition(form, keep, num_queries):
    module = make(form, keep).train()
    x, cells, index = inputs(form, num_queries)
    outcomes = []
    for function in (by_definition, compute):
        leaves = [x.clone().requires_grad_(), cells.clone().requires_grad_()]
        out = function(module, *leaves, index)
        learned = [parameter for parameter in module.parameters() if parameter.requires_grad]
        outcomes.append((out, *torch.autograd.grad(out.square().sum(), [*leaves, *learned])))
    for expected, found in zip(*outcomes, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-11)


@torch.no_grad()
@pytest.mark.parametrize("form", FORMS)
def test_modules_with_hooks_are_called_and_compute_the_same(form):
    module = make(form, "features")
    x, cells, index = inputs(form)
    parts = {name: part for name, part in module.named_modules() if isinstance(part, nn.Linear)}
    calls = []
    for name, part in parts.items():
        part.register_forward_hook(lambda *_, name=name: calls.append(name))
    found = compute(module, x, cells, index)
    assert set(calls) == set(parts)
    torch.testing.assert_close(found, by_definition(module, x, cells, index), rtol=0, atol=1e-12)


@torch.no_grad()
@pytest.mark.parametrize("form", FORMS)
def test_no_image_at_all_is_a_constant_without_any_query_work(form):
    module = make(form)
    x, cells, index = inputs(form, num_images=0)
    values = module.project_cells(cells, LEVELS)
    counter = FlopCounterMode(display=False)
    with counter:
        found = module(x, values, index)
    hidden_x, hidden_cells, hidden_index = inputs(form)
    expected = by_definition(module, hidden_x, hidden_cells, torch.zeros_like(hidden_index))
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)
    assert counter.get_total_flops() <= 2 * V * D + 2 * D * D  # of one vector, whatever the queries


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("norm", [nn.RMSNorm(6, eps=1e-3), nn.LayerNorm(6)], ids=["rms", "layer"])
def test_a_norm_without_its_affine_part_is_that_norm(norm, dtype):
    generator = torch.Generator().manual_seed(5)
    x = torch.randn(2, 3, 6, generator=generator, dtype=torch.float64).requires_grad_()
    norm = copy.deepcopy(norm).double()
    outcomes = []
    for function, at in ((norm, x), (lambda x: normalize(norm, x), x.detach().to(dtype).requires_grad_())):
        out = function(at)
        weights = torch.arange(36.0, dtype=torch.float64).view(2, 3, 6).sin().to(out.dtype)
        outcomes.append((out, torch.autograd.grad((out * weights).sum(), at)[0]))
    allowed = 1e-13 if dtype == torch.float64 else 0.05
    for expected, found in zip(*outcomes, strict=True):
        assert found.dtype == dtype
        torch.testing.assert_close(found.double(), expected, rtol=0, atol=allowed)


# ---- Weights that change ---------------------------------------------------------------------------


def add_in_place(module):
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(0.1)


def load(module):
    module.load_state_dict({name: tensor + 0.1 for name, tensor in module.state_dict().items()})


def assign(module):
    state = {name: tensor + 0.1 for name, tensor in module.state_dict().items()}
    module.load_state_dict(state, assign=True)


def step(module):
    learned = [parameter for parameter in module.parameters() if parameter.requires_grad]
    for parameter in learned:
        parameter.grad = torch.ones_like(parameter)
    torch.optim.AdamW(learned, lr=0.1).step()


@pytest.mark.parametrize("change", [add_in_place, load, assign, step])
@pytest.mark.parametrize("form", FORMS)
def test_a_change_of_weights_shows_at_once(form, change):
    module = make(form)
    x, cells, index = inputs(form)
    with torch.no_grad():
        values = module.project_cells(cells, LEVELS)
        before = module(x, values, index)
    change(module)
    with torch.no_grad():
        # With the values kept, and with new ones.
        again = module(x, values, index)
        expected = _with_old_values(module, x, values, index)
        torch.testing.assert_close(again, expected, rtol=0, atol=1e-12)
        assert not torch.allclose(again, before)
        torch.testing.assert_close(
            compute(module, x, cells, index), by_definition(module, x, cells, index), rtol=0, atol=1e-12
        )


def _with_old_values(module, x, values, index):
    return module(x, values._replace(folded=None), index)


@pytest.mark.parametrize("change", ["fused optimizer", "data"])
def test_what_no_version_tells_shows_with_the_next_images(change):
    module = make("gated")
    x, cells, index = inputs("gated")
    with torch.no_grad():
        compute(module, x, cells, index)
    if change == "data":
        for parameter in module.parameters():
            parameter.data += 0.1
    else:
        learned = [parameter for parameter in module.parameters() if parameter.requires_grad]
        for parameter in learned:
            parameter.grad = torch.ones_like(parameter)
        torch.optim.AdamW(learned, lr=0.1, fused=True).step()
    with torch.no_grad():
        expected = by_definition(module, x, cells, index)
        torch.testing.assert_close(compute(module, x, cells, index), expected, rtol=0, atol=1e-12)


@torch.no_grad()
@pytest.mark.parametrize("form", FORMS)
def test_another_precision_is_computed_in_that_precision(form):
    module = make(form)
    x, cells, index = inputs(form)
    expected = compute(module, x, cells, index)
    module.float()
    found = compute(module, x.float(), cells.float(), index)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), expected, rtol=0, atol=1e-4)
    module.bfloat16()
    assert compute(module, x.bfloat16(), cells.bfloat16(), index).dtype == torch.bfloat16


def test_lora_on_a_projection_is_honoured_while_on_and_after_merging():
    peft = pytest.importorskip("peft")
    module = make("gated")
    x, cells, index = inputs("gated")
    with torch.no_grad():
        before = compute(module, x, cells, index)
    names = ["query_projection", "output_projection", "sampling_offsets", "value_projection"]
    tuned = peft.get_peft_model(nn.Sequential(module), peft.LoraConfig(r=2, target_modules=names)).double()
    with torch.no_grad():
        for name, parameter in tuned.named_parameters():
            if "lora" in name:
                parameter.add_(0.3)
        on = compute(module, x, cells, index)
        assert not torch.allclose(on, before)
        module.requires_grad_(False)
        merged = tuned.merge_and_unload()[0]
        found = compute(merged, x, cells, index)
        torch.testing.assert_close(found, by_definition(merged, x, cells, index), rtol=0, atol=1e-12)
        torch.testing.assert_close(found, on, rtol=0, atol=1e-10)


def test_folded_tables_let_gradients_through_to_what_is_not_frozen():
    module = make("gated").requires_grad_(False)
    x, cells, index = inputs("gated")
    gradients = []
    for function in (by_definition, compute):
        leaf = x.clone().requires_grad_()
        gradients.append(torch.autograd.grad(function(module, leaf, cells, index).square().sum(), leaf)[0])
    torch.testing.assert_close(*gradients, rtol=0, atol=1e-12)


def test_folded_tables_made_in_inference_mode_serve_outside_of_it():
    module = make("gated").requires_grad_(False)
    x, cells, index = inputs("gated")
    values = module.project_cells(cells, LEVELS)
    with torch.inference_mode():
        module(x, values, index)
    leaf = x.clone().requires_grad_()
    module(leaf, values, index).sum().backward()
    assert leaf.grad.any()


def test_a_synchronizer_can_be_copied_and_refuses_other_words():
    with torch.no_grad():
        copied = copy.deepcopy(make("gated"))
        x, cells, index = inputs("gated")
        assert torch.equal(compute(copied, x, cells, index), compute(make("gated"), x, cells, index))
    with pytest.raises(ValueError, match="keep must be one of"):
        core("pyramids")


# ---- How much is computed --------------------------------------------------------------------------


def flops(function):
    counter = FlopCounterMode(display=False)
    with counter:
        function()
    return counter.get_total_flops()


@torch.no_grad()
def test_the_flops_of_a_new_word_do_not_grow_with_the_images():
    module = make("gated")
    counts = []
    for num_images in (1, 5):
        x, cells, _ = inputs("gated", num_queries=1, num_images=num_images)
        index = torch.arange(num_images, 0, -1).expand(2, 1, num_images)
        values = module.project_cells(cells, LEVELS)
        module(x, values, index)
        counts.append(flops(lambda: module(x, values, index)))  # noqa: B023
    # One matrix before sampling and one after it, of two rows.
    assert counts == [2 * 2 * (D * NUM_TERMS + V * D)] * 2


def test_training_computes_no_logits_that_nothing_reads():
    module = make("gated").train()
    x, cells, index = inputs("gated", num_queries=3)
    values = module.project_cells(cells, LEVELS)
    rows = 2 * 3
    expected = 2 * rows * (D * D + D * NUM_TERMS + V * D) + 2 * (index.shape[-1] + 1) * D * NUM_TERMS
    assert flops(lambda: module(x, values, index)) == expected


@pytest.fixture(scope="module")
def model():
    return tiny_model().double()


def keeping(model, keep):
    """The same model, which keeps values or features of images."""
    config = copy.deepcopy(model.config)
    for side in ("text_synchronizer", "image_synchronizer"):
        setattr(config, side, {**getattr(config, side), "keep": keep})
    other = type(model)(config).double().eval()
    other.load_state_dict(model.state_dict())
    return other


def session_with(model, num_images):
    session = InterleavedSession(model)
    session.append_text([BOS, 5])
    generator = torch.Generator().manual_seed(2)
    for _ in range(num_images):
        session.append_image(torch.rand(1, 3, 32, 32, generator=generator))
        session.append_text([7])
    session.read()
    return session


@torch.no_grad()
def test_a_word_of_a_session_costs_the_same_with_any_number_of_images(model):
    counts = []
    for num_images in (1, 4):
        session = session_with(model, num_images)
        length = session.cache.get_seq_length()
        counter = FlopCounterMode(display=False)
        with counter:
            session.append_text([9])
            session.read()
        # Self-attention grows with the tokens, whatever they are; nothing else may.
        attention = sum(
            count for op, count in counter.get_flop_counts()["Global"].items() if "attention" in str(op)
        )
        counts.append((counter.get_total_flops() - attention, length))
    assert counts[0][0] == counts[1][0] and counts[0][1] < counts[1][1]


@torch.no_grad()
def test_values_are_projected_once_an_image_and_layer(model, monkeypatch):
    rows = []
    projected = FeatureSynchronizer.projected

    def counted(self, value, level_sizes):
        rows.append(value.shape[:-1].numel())
        return projected(self, value, level_sizes)

    monkeypatch.setattr(FeatureSynchronizer, "projected", counted)
    session = session_with(model, 3)
    session.append_text([9, 8])
    session.read()
    layers, cells = len(model.language_model.synchronized_layers), 16**2 + 8**2 + 4**2
    assert sum(rows) == 3 * layers * cells

    rows.clear()
    session.start_image()
    earlier = session.earlier_images("previous").repeat(2)
    noise = torch.randn(2, 4, 8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    conditioning = session.conditioning().expand(2, -1, -1)
    for timestep in (700, 300, 1):
        model.image_decoder.predict(noise, torch.tensor(timestep), conditioning, earlier)
    assert sum(rows) == 13 * (cells + 2**2)


@torch.no_grad()
@pytest.mark.parametrize("keep", ["values", "features"])
def test_the_painter_projects_each_image_once_over_many_pictures(model, monkeypatch, keep):
    painter = keeping(model, keep)
    seen, look_at = [], painter.image_decoder.project_earlier_images

    def counted(pyramid, index):
        seen.append(len(pyramid[0]))
        return look_at(pyramid, index)

    monkeypatch.setattr(painter.image_decoder, "project_earlier_images", counted)
    session = session_with(painter, 2)
    noise = torch.randn(1, 4, 8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    for rule, projected in (("all", 2), ("all", 1), ((1,), 0), ("previous", 1), ((0, 4), 1)):
        seen.clear()
        session.start_image()
        earlier, conditioning = session.earlier_images(rule), session.conditioning()
        assert sum(seen) == projected
        # 1. The picture is that of a document which was never painted in before.
        found = painter.image_decoder.predict(noise, torch.tensor(300), conditioning, earlier)
        fresh = InterleavedSession(painter)
        fresh.ids, fresh.image_starts, fresh.images = session.ids, session.image_starts, session.images
        afresh = fresh.earlier_images(rule)
        expected = painter.image_decoder.predict(noise, torch.tensor(300), conditioning, afresh)
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)
        # 2. Features stand there once for all maps.
        assert len({v.value.data_ptr() for v in earlier.values}) == (13 if keep == "values" else 1)
        session.finish_image(torch.rand(1, 3, 32, 32, generator=torch.Generator().manual_seed(len(seen))))


def take_a_training_step(model):
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    ids = torch.tensor([[BOS, 5, 6]])
    with torch.enable_grad():
        model(input_ids=ids, text_target=torch.ones_like(ids, dtype=torch.bool)).loss.backward()
    optimizer.step()


def change_the_eyes(model):
    model.vision.resampler.queries.neg_()


def load_other_weights(model):
    model.load_state_dict({name: 0.9 * weight for name, weight in model.state_dict().items()})


def add_low_rank_matrices(model):
    from peft import LoraConfig, inject_adapter_in_model

    inject_adapter_in_model(
        LoraConfig(r=2, target_modules=["q_proj", "value_projection"], init_lora_weights=False), model
    )
    model.double().eval()


@torch.no_grad()
@pytest.mark.parametrize("is_painting", [False, True])
@pytest.mark.parametrize(
    "change", [take_a_training_step, change_the_eyes, load_other_weights, add_low_rank_matrices]
)
def test_a_session_forgets_what_other_weights_computed(model, change, is_painting):
    changing = copy.deepcopy(model)
    session = session_with(changing, 2)
    session.start_image()
    session.earlier_images("all")
    if not is_painting:
        session.finish_image(torch.zeros(1, 3, 32, 32))
        session.append_text([9, 8])
    before = session.read().clone()
    change(changing)
    found = session.read()
    assert (found - before).abs().max() > 1e-4

    fresh = session_with(changing, 2)
    fresh.start_image()
    if not is_painting:
        fresh.finish_image(torch.zeros(1, 3, 32, 32))
        fresh.append_text([9, 8])
    assert (session.ids, session.image_starts) == (fresh.ids, fresh.image_starts)
    torch.testing.assert_close(found, fresh.read(), rtol=0, atol=1e-12)
    both = zip(session.earlier_images("all").values, fresh.earlier_images("all").values, strict=True)
    for ours, theirs in both:
        torch.testing.assert_close(
            ours.value[ours.image_BN], theirs.value[theirs.image_BN], rtol=0, atol=1e-12
        )
    # Nothing is read again as long as the weights stay.
    cache = session.cache
    session.read()
    assert session.cache is cache


@torch.no_grad()
def test_guidance_and_beams_share_values_without_a_copy(model):
    session = session_with(model, 2)
    session.start_image()
    earlier = session.earlier_images("all")
    repeated = earlier.repeat(3)
    for one, many in zip(earlier.values, repeated.values, strict=True):
        assert many.value is one.value and len(many.image_BN) == 3 * len(one.image_BN)
    kept = {layer: values.value for layer, values in session.cache.image_values.items()}
    session.cache.batch_repeat_interleave(4)
    start, by_row = session.cache.images_of_rows()
    assert len(start) == 4
    assert all(values.value is kept[layer] for layer, values in by_row.items())


@torch.no_grad()
def test_images_by_row_and_images_by_index_are_remembered_alike(model):
    generator = torch.Generator().manual_seed(6)
    pixels = torch.rand(4, 3, 32, 32, generator=generator).double()
    start = torch.tensor([[1, 9], [2, 8]])
    by_index = model.values_by_row(model.encode_images(pixels).pyramid, start)
    caches = []
    for is_by_row in (False, True):
        cache = PrefixCache(model.config.text_config, batch_size=2)
        for first in (0, 1):  # one image a row at a time
            part = {}
            for layer, values in by_index.items():
                chosen = values.image_BN[:, first : first + 1]
                by_row = values._replace(value=values.value[chosen], image_BN=None)
                part[layer] = by_row if is_by_row else values._replace(image_BN=chosen)
            cache.append_images(start[:, first : first + 1], part)
        caches.append(cache)
    for cache in caches:
        starts, remembered = cache.images_of_rows()
        assert torch.equal(starts, start)
        for layer, values in remembered.items():
            expected = by_index[layer].value[by_index[layer].image_BN]
            assert torch.equal(values.value[values.image_BN], expected)


@torch.no_grad()
def test_a_model_that_keeps_features_computes_the_same_from_one_copy(model):
    frugal = keeping(model, "features")
    found, expected = session_with(frugal, 3), session_with(model, 3)
    torch.testing.assert_close(found.read(), expected.read(), rtol=0, atol=1e-12)
    assert len({values.value.data_ptr() for values in found.cache.image_values.values()}) == 1
    noise = torch.randn(1, 4, 8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    predictions = []
    for session in (found, expected):
        session.start_image()
        decoder, earlier = session.model.image_decoder, session.earlier_images("all")
        predictions.append(decoder.predict(noise, torch.tensor(300), session.conditioning(), earlier))
    torch.testing.assert_close(*predictions, rtol=0, atol=1e-12)


def test_pictures_without_earlier_ones_get_their_constant_in_a_mixed_batch(model):
    decoder = model.image_decoder
    generator = torch.Generator().manual_seed(4)
    pyramid = model.encode_images(torch.rand(2, 3, 32, 32, generator=generator).double()).pyramid
    noise = torch.randn(3, 4, 8, 8, dtype=torch.float64, generator=generator)
    conditioning = torch.randn(3, 4, 16, dtype=torch.float64, generator=generator)
    index = torch.tensor([[-1, -1], [0, -1], [0, 1]])

    def predict(rows):
        earlier = model.project_earlier_images(pyramid, index[rows])
        return decoder.predict(noise[rows], torch.tensor(300), conditioning[rows], earlier)

    together = predict([0, 1, 2])  # with gradients: the first is left out of the query's work
    alone = torch.cat([predict([i]) for i in range(3)])
    with torch.no_grad():
        folded = predict([0, 1, 2])
    torch.testing.assert_close(together, alone, rtol=0, atol=1e-12)
    torch.testing.assert_close(together, folded, rtol=0, atol=1e-12)
