"""The synchronizer's arithmetic against loops written from the definition, in float64."""

import math

import pytest
import torch

from mm_interleaved.ops import attention, deformable_sampling, multi_image_deformable_attention, sampling_plan
from mm_interleaved.ops import cpu_op as gather

LEVELS = (4, 2)


def bilinear(map_yxD, x, y):
    """One sample at (x, y) in [0, 1], pixel centres at (i + 0.5) / size, zero outside: by hand, corner by
    corner.
    """
    size = map_yxD.shape[0]
    px, py = x * size - 0.5, y * size - 0.5
    left, top = math.floor(px), math.floor(py)
    out = torch.zeros(map_yxD.shape[-1], dtype=map_yxD.dtype)
    for row, share_y in ((top, 1 - (py - top)), (top + 1, py - top)):
        for column, share_x in ((left, 1 - (px - left)), (left + 1, px - left)):
            if 0 <= row < size and 0 <= column < size:
                out = out + share_x * share_y * map_yxD[row, column]
    return out


def by_hand(value, query_term, index_term, relative_index, reference, num_points, base_size, ignore):
    """The definition (paper, section 3.2; facts sheet 1.3): softmax over all samples and one logit of
    zero.
    """
    B, N, _, H, D = value.shape
    Q, P, L = query_term.shape[1], num_points, len(LEVELS)
    out = torch.zeros(B, Q, H, D, dtype=value.dtype)
    for b in range(B):
        for q in range(Q):
            for h in range(H):
                mass, total = 1.0, ignore[h].clone()
                for n in range(N):
                    k = int(relative_index[b, q, n])
                    if k == 0:
                        continue
                    term = query_term[b, q, h] + index_term[k, h]
                    start = 0
                    for level, size in enumerate(LEVELS):
                        cells = value[b, n, start : start + size * size, h].view(size, size, D)
                        start += size * size
                        for p in range(P):
                            x, y = reference[0, 0] + term[2 * p : 2 * p + 2] / base_size
                            weight = math.exp(term[2 * P + level * P + p])
                            mass += weight
                            total += weight * bilinear(cells, float(x), float(y))
                assert query_term.shape[-1] == L * P + 2 * P
                out[b, q, h] = total / mass
    return out


@pytest.fixture
def case():
    generator = torch.Generator().manual_seed(0)
    B, N, Q, H, D, P, K = 2, 3, 4, 2, 3, 2, 5
    S, E = sum(s * s for s in LEVELS), 2 * P + len(LEVELS) * P

    def normal(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    relative_index = torch.tensor(
        [[[2, 1, 0], [1, 0, 0], [0, 0, 0], [3, 2, 1]], [[0, 1, 0], [4, 3, 2], [2, 0, 1], [0, 0, 1]]]
    )
    return {
        "value_BNSHD": normal(B, N, S, H, D),
        "query_term_BQHE": 2 * normal(B, Q, H, E),
        "index_term_KHE": normal(K, H, E),
        "relative_index_BQN": relative_index,
        "reference_BQ2": torch.tensor([[[0.5, 0.4]]], dtype=torch.float64),
        "level_sizes": LEVELS,
        "num_points": P,
        "base_size": 4.0,
        "ignore_HD": normal(H, D),
    }


@pytest.mark.parametrize("implementation", ["reference", "gather"])
def test_every_implementation_equals_the_definition(case, implementation):
    expected = by_hand(
        case["value_BNSHD"], case["query_term_BQHE"], case["index_term_KHE"], case["relative_index_BQN"],
        case["reference_BQ2"], case["num_points"], case["base_size"], case["ignore_HD"],
    )  # fmt: skip
    actual = multi_image_deformable_attention(**case, implementation=implementation)
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-12)


INPUTS = ("value_BNSHD", "query_term_BQHE", "index_term_KHE", "reference_BQ2", "ignore_HD")


def outcome(arguments, implementation):
    """Result and all gradients of a product with fixed random numbers."""
    leaves = {name: arguments[name].clone().requires_grad_() for name in INPUTS}
    out = multi_image_deformable_attention(**{**arguments, **leaves}, implementation=implementation)
    weights = torch.randn(out.shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    gradients = torch.autograd.grad((out * weights).sum(), leaves.values())
    return dict(zip(("out", *INPUTS), (out, *gradients), strict=True))


def assert_as_the_reference(arguments):
    reference, fast = outcome(arguments, "reference"), outcome(arguments, "gather")
    for name, expected in reference.items():
        torch.testing.assert_close(fast[name], expected, rtol=0, atol=1e-12, msg=name)
    return reference


def with_shared_images(case):
    """Both rows look into the same three images out of five, one twice, in orders of their own."""
    value = torch.cat([case["value_BNSHD"][0], case["value_BNSHD"][1, :2]])
    return case | {"value_BNSHD": value, "image_BN": torch.tensor([[4, 0, 4], [2, 4, 0]])}


def with_levels_of(sizes):
    def change(case):
        cells = sum(size * size for size in sizes)
        value = case["value_BNSHD"].repeat(1, 1, 3, 1, 1)[:, :, :cells]
        terms = 4 + 2 * len(sizes)
        return case | {
            "value_BNSHD": value,
            "level_sizes": sizes,
            "query_term_BQHE": case["query_term_BQHE"].repeat(1, 1, 1, 2)[..., :terms],
            "index_term_KHE": case["index_term_KHE"].repeat(1, 1, 2)[..., :terms],
        }

    return change


def with_references(*shape):
    generator = torch.Generator().manual_seed(3)
    return lambda case: (
        case | {"reference_BQ2": torch.rand(*shape, 2, generator=generator, dtype=torch.float64)}
    )


def at_cell_centres(case):
    """Every place is a whole number of cells, where the slope of a sample jumps."""
    case = case | {
        "reference_BQ2": torch.tensor([[[0.375, 0.625]]], dtype=torch.float64),
        "level_sizes": (4,),
    }
    whole = case["query_term_BQHE"][..., :6].clone()
    whole[..., :4] = (whole[..., :4] * 2).round()
    index = case["index_term_KHE"][..., :6].clone()
    index[..., :4] = 0
    value = case["value_BNSHD"][:, :, :16]
    return case | {"query_term_BQHE": whole, "index_term_KHE": index, "value_BNSHD": value}


def with_one_image(relative_index):
    """Each query with one image or none, and a reference of its own: the pairs may be the queries."""
    index = torch.tensor(relative_index)[..., None]
    return lambda case: with_references(2, 4)(
        case | {"value_BNSHD": case["value_BNSHD"][:, :1], "relative_index_BQN": index}
    )


VARIANTS = {
    "as it is": lambda case: case,
    "shared images": with_shared_images,
    "shared heads": lambda case: case | {"value_BNSHD": case["value_BNSHD"][..., :1, :]},
    "all hidden": lambda case: case | {"relative_index_BQN": torch.zeros_like(case["relative_index_BQN"])},
    "a level of one cell": with_levels_of((4, 1)),
    "one level": with_levels_of((5,)),
    "reference a query": with_references(1, 4),
    "reference a row": with_references(2, 1),
    "reference each": with_references(2, 4),
    "far out": lambda case: case | {"query_term_BQHE": 2 * case["query_term_BQHE"]},
    "at cell centres": at_cell_centres,
    "one image": with_one_image([[1, 1, 2, 1], [3, 3, 3, 4]]),
    "one image, the same index for a row": lambda case: (
        with_references(2, 4)(case)
        | {
            "value_BNSHD": case["value_BNSHD"][:, :1],
            "relative_index_BQN": torch.tensor([1, 3])[:, None, None].expand(-1, 4, -1),
        }
    ),
    "one image, hidden from some": with_one_image([[1, 0, 2, 1], [0, 3, 3, 4]]),
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_fast_path_and_all_its_gradients_equal_the_reference(case, variant):
    reference = assert_as_the_reference(VARIANTS[variant](case))
    if variant != "all hidden":
        assert all(tensor.any() for tensor in reference.values())


@pytest.mark.parametrize("rows_at_once", [1, 100])
def test_portions_change_nothing(case, rows_at_once, monkeypatch):
    monkeypatch.setattr(gather, "PORTION_ON_CPU", rows_at_once)
    assert_as_the_reference(with_shared_images(case))
    assert_as_the_reference(VARIANTS["one image"](case))


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("needed", [INPUTS, ("value_BNSHD",), ("query_term_BQHE", "ignore_HD")])
def test_it_compiles_as_one_graph_with_equal_results_and_gradients(case, dynamic, needed):
    def attend(leaves):
        return multi_image_deformable_attention(**(case | leaves), implementation="gather")

    leaves = {name: case[name].clone().requires_grad_() for name in needed}
    torch.compiler.reset()
    compiled = torch.compile(attend, backend="aot_eager", fullgraph=True, dynamic=dynamic)
    expected, found = attend(leaves), compiled(leaves)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-13)
    both = (torch.autograd.grad(out.square().sum(), leaves.values()) for out in (found, expected))
    for ours, theirs in zip(*both, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-13)


def test_the_operator_of_compiled_code_keeps_pytorchs_rules(case):
    value = case["value_BNSHD"].flatten(0, 1)
    image = torch.arange(6).view(2, 3)
    tensors = [
        value, case["query_term_BQHE"], case["index_term_KHE"], case["reference_BQ2"], case["ignore_HD"]
    ]  # fmt: skip
    who = image, case["relative_index_BQN"]
    sizes = [list(LEVELS), case["num_points"], case["base_size"]]
    results = gather.attend_visible_pairs(*tensors, *who, *sizes)
    needs = [True, False, True, True, False]
    torch.library.opcheck(
        gather.attend_visible_pairs_backward,
        (torch.ones_like(results[0]), *tensors, *who, *results, *sizes, needs),
    )
    leaves = [tensor.clone().requires_grad_() for tensor in tensors]
    torch.library.opcheck(gather.attend_visible_pairs, (*leaves, *who, *sizes))


def test_64_bit_rows_change_nothing(case, monkeypatch):
    expected = outcome(case, "gather")
    monkeypatch.setattr(gather, "ROWS_IN_32_BITS", 10)
    for name, tensor in outcome(case, "gather").items():
        torch.testing.assert_close(tensor, expected[name], rtol=0, atol=1e-13, msg=name)


@pytest.mark.parametrize("level_sizes", [(4, 2), (4, 1), (3,)])
def test_given_places_and_all_gradients_equal_the_reference(level_sizes):
    generator = torch.Generator().manual_seed(4)
    cells, L = sum(size * size for size in level_sizes), len(level_sizes)

    def inputs(*shape):
        return torch.rand(*shape, generator=generator, dtype=torch.float64).requires_grad_()

    leaves = [inputs(2, cells, 2, 3), inputs(2, 5, 2, L, 3, 2), inputs(2, 5, 2, L, 3)]
    results = []
    for implementation in ("reference", "gather"):
        value, location, weight = leaves
        out = deformable_sampling(
            value, level_sizes, 1.6 * location - 0.3, weight, implementation=implementation
        )
        results.append((out, *torch.autograd.grad(out.square().sum(), leaves)))
    for reference, fast in zip(*results, strict=True):
        torch.testing.assert_close(fast, reference, rtol=0, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_values_in_half_precision_are_summed_in_single(case, dtype):
    exact = outcome(case, "reference")
    low = {name: case[name].to(dtype if name == "value_BNSHD" else torch.float32) for name in INPUTS}
    leaves = {name: tensor.requires_grad_() for name, tensor in low.items()}
    out = multi_image_deformable_attention(**{**case, **leaves})
    assert out.dtype == dtype
    weights = torch.randn(out.shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    gradients = torch.autograd.grad((out.double() * weights).sum(), leaves.values())
    for name, found in zip(INPUTS, gradients, strict=True):
        assert found.dtype == low[name].dtype
        assert (found.double() - exact[name]).abs().max() <= 0.03 * exact[name].abs().max(), name
    assert (out.double() - exact["out"]).abs().max() <= 0.01 * exact["out"].abs().max()


def test_terms_in_half_precision_still_find_their_cells():
    """More cells than half precision can tell apart: each query looks at the centre of the last one."""
    size = 64
    value = torch.arange(float(size * size)).view(1, 1, -1, 1, 1) / size**2
    terms = torch.zeros(1, 2, 1, 3, dtype=torch.float16)
    reference = torch.tensor([[[1 - 0.5 / size, 1 - 0.5 / size]]])
    seen = torch.tensor([[[1], [1]]])
    out = multi_image_deformable_attention(
        value, terms, terms[0, :2], seen, reference.half(), (size,), num_points=1, base_size=size
    )
    torch.testing.assert_close(out, torch.full_like(out, 0.5 * (1 - size**-2)), rtol=0, atol=1e-5)


def test_backward_keeps_the_arguments_and_little_more(case):
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda x: x):
        leaves = {name: case[name].clone().requires_grad_() for name in INPUTS}
        out = multi_image_deformable_attention(**{**case, **leaves})
    own = {tensor.data_ptr() for tensor in (*leaves.values(), case["relative_index_BQN"], out)}
    beyond = sum(tensor.numel() for tensor in kept if tensor.data_ptr() not in own)
    B, Q, H, _ = case["query_term_BQHE"].shape
    N = case["relative_index_BQN"].shape[2]
    assert beyond <= B * Q * H + B * N  # a normalizer a query and head; which image stands where


def test_numbers_that_are_none_come_out_as_none(case):
    case["query_term_BQHE"][0, 0, 0, 0] = math.nan
    out = multi_image_deformable_attention(**case)
    assert out[0, 0, 0].isnan().all() and out[0, 1:].isfinite().all()


def test_gradients_equal_finite_differences(case):
    value = case["value_BNSHD"][:1].requires_grad_()
    terms = case["query_term_BQHE"][:1].requires_grad_()

    def attend(value, terms):
        arguments = {**case, "value_BNSHD": value, "query_term_BQHE": terms}
        return multi_image_deformable_attention(
            **{**arguments, "relative_index_BQN": case["relative_index_BQN"][:1]}
        )

    assert torch.autograd.gradcheck(attend, (value, terms))


@pytest.mark.parametrize("implementation", ["reference", "gather"])
def test_hidden_images_change_nothing_to_the_bit(case, implementation):
    changed = dict(case, value_BNSHD=case["value_BNSHD"].clone())
    changed["value_BNSHD"][0, 2] = 1e6  # row 0: image 2 is seen by query 3 alone
    before = multi_image_deformable_attention(**case, implementation=implementation)
    after = multi_image_deformable_attention(**changed, implementation=implementation)
    assert torch.equal(before[0, :3], after[0, :3])
    assert not torch.equal(before[0, 3], after[0, 3])


def test_padding_images_change_nothing(case):
    B, N = case["value_BNSHD"].shape[:2]
    padded = dict(case)
    padded["value_BNSHD"] = torch.cat([case["value_BNSHD"], torch.ones_like(case["value_BNSHD"])], dim=1)
    zeros = torch.zeros(B, 4, N, dtype=torch.int64)
    padded["relative_index_BQN"] = torch.cat([case["relative_index_BQN"], zeros], dim=2)
    torch.testing.assert_close(
        multi_image_deformable_attention(**case),
        multi_image_deformable_attention(**padded),
        rtol=0,
        atol=1e-14,
    )


@pytest.mark.parametrize("implementation", ["reference", "gather"])
def test_a_query_without_images_gets_the_ignore_value(case, implementation):
    hidden = dict(case, relative_index_BQN=torch.zeros_like(case["relative_index_BQN"]))
    out = multi_image_deformable_attention(**hidden, implementation=implementation)
    assert torch.equal(out, case["ignore_HD"].expand_as(out))


def test_no_images_at_all_is_the_same_as_hidden_ones(case):
    none = dict(
        case, value_BNSHD=case["value_BNSHD"][:, :0], relative_index_BQN=case["relative_index_BQN"][..., :0]
    )
    out = multi_image_deformable_attention(**none)
    assert torch.equal(out, case["ignore_HD"].expand_as(out))


def test_weights_and_the_weight_of_looking_nowhere_sum_to_one(case):
    plan = sampling_plan(
        case["query_term_BQHE"], case["index_term_KHE"], case["relative_index_BQN"], case["reference_BQ2"],
        num_levels=len(LEVELS), num_points=case["num_points"], base_size=case["base_size"],
    )  # fmt: skip
    torch.testing.assert_close(plan.weight.sum((-1, -2)) + plan.ignore, torch.ones_like(plan.ignore))


def test_sampling_equals_transformers_deformable_detr():
    """An independent implementation of the sampling alone."""
    from transformers.models.deformable_detr.modeling_deformable_detr import MultiScaleDeformableAttention

    generator = torch.Generator().manual_seed(1)
    value = torch.randn(2, 20, 2, 3, generator=generator, dtype=torch.float64)
    location = torch.rand(2, 5, 2, 2, 4, 2, generator=generator, dtype=torch.float64) * 1.4 - 0.2
    weight = torch.rand(2, 5, 2, 2, 4, generator=generator, dtype=torch.float64)
    shapes = [(size, size) for size in LEVELS]
    theirs = MultiScaleDeformableAttention()(
        value, torch.tensor(shapes), shapes, torch.tensor([0, 16]), location, weight, 64
    )
    for implementation in ("reference", "gather"):
        ours = deformable_sampling(value, LEVELS, location, weight, implementation=implementation)
        torch.testing.assert_close(ours.flatten(2), theirs, rtol=0, atol=1e-12)


def test_far_off_offsets_sample_nothing_and_stay_finite(case):
    far = dict(case, query_term_BQHE=case["query_term_BQHE"].clone())
    far["query_term_BQHE"][..., :4] = 1e30
    far["ignore_HD"] = None
    for implementation in ("gather",):
        assert not multi_image_deformable_attention(**far, implementation=implementation).any()


def test_the_choice_for_given_places_changes_no_result():
    generator = torch.Generator().manual_seed(5)
    value = torch.randn(1, 20, 2, attention.FEW_CHANNELS, generator=generator, dtype=torch.float64)
    location = torch.rand(1, 5, 2, 2, 3, 2, generator=generator, dtype=torch.float64)
    weight = torch.rand(1, 5, 2, 2, 3, generator=generator, dtype=torch.float64)
    trained = deformable_sampling(value.clone().requires_grad_(), LEVELS, location, weight)
    assert trained.grad_fn.name() != "_SampleBackward"
    torch.testing.assert_close(
        trained, deformable_sampling(value, LEVELS, location, weight), atol=1e-12, rtol=0
    )
    wider = torch.cat([value, value], dim=-1).requires_grad_()
    assert deformable_sampling(wider, LEVELS, location, weight).grad_fn.name() == "_SampleBackward"


def test_wrong_sizes_and_names_are_refused():
    value = torch.zeros(1, 5, 1, 2)
    location, weight = torch.zeros(1, 1, 1, 1, 1, 2), torch.zeros(1, 1, 1, 1, 1)
    with pytest.raises(ValueError, match="hold 4 cells, found 5"):
        deformable_sampling(value, (2,), location, weight)
    with pytest.raises(ValueError, match="implementation must be one of"):
        deformable_sampling(value[:, :4], (2,), location, weight, implementation="cuda")
