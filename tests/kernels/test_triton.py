"""The fused kernel against the reference: results and every gradient, in Triton's interpreter or on a GPU."""

from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("triton")

from cases import DEVICE, assert_equal, case, causal, in_float64, outcome

from mm_interleaved import FeatureSynchronizer
from mm_interleaved.ops import attention, multi_image_deformable_attention
from mm_interleaved.ops import triton_op as triton_attention
from mm_interleaved.ops.triton_op import Tile, attend_images, attend_images_backward, choose_tile

EXACT = 1e-12
LINE_TILE = 64  # of sixteen channels or fewer


def with_gaps(num_queries, num_images):
    generator = torch.Generator().manual_seed(3)
    return torch.rand(1, num_queries, num_images, generator=generator) < 0.5


VISIBILITY = {
    "causal": causal(LINE_TILE + 6, [0, 50]),
    "packed documents": causal(12, [0, 2, 7, 9], documents=[0] * 5 + [1] * 7),
    "images in any gaps": with_gaps(9, 3),
    "all hidden": torch.zeros(1, 5, 2, dtype=torch.bool),
    "some rows hidden": torch.tensor([[[True]] * 5, [[False]] * 5]),
    "decoding, split over images": torch.ones(1, 1, 5, dtype=torch.bool),
    "decoding a batch of unequal length": torch.tensor([[[1, 0, 0, 0]], [[1, 1, 1, 1]], [[0] * 4]]).bool(),
}


@pytest.mark.parametrize("name", VISIBILITY)
def test_result_and_all_gradients_equal_the_reference(name):
    heads, points = (1, 2) if name.startswith(("causal", "decoding")) else (2, 1)
    arguments = case(VISIBILITY[name], heads=heads, points=points)
    assert_equal(outcome(arguments, "triton"), outcome(arguments, "reference"), EXACT)


def test_a_grid_of_queries_with_places_of_their_own_equals_the_reference():
    arguments = case(torch.ones(1, 81, 1, dtype=torch.bool), reference_queries=81, heads=1, levels=(6, 3, 1))
    assert_equal(outcome(arguments, "triton"), outcome(arguments, "reference"), EXACT)


@pytest.mark.parametrize(
    ("value_dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 6e-3), (torch.float16, 1e-3)]
)
def test_low_precision_is_as_near_to_float64_as_its_rounding(value_dtype, tolerance):
    """Half precision rounds the result and its gradient once; coordinates and weights stay in float32."""
    visible = causal(12, [0, 2, 7], documents=[0] * 5 + [1] * 7)
    arguments = case(visible, dtype=torch.float32, value_dtype=value_dtype, channels=16, heads=1)
    actual = outcome(arguments, "triton")
    assert actual["out"].dtype == actual["value_BNSHD"].dtype == value_dtype
    assert actual["query_term_BQHE"].dtype == torch.float32
    assert_equal(actual, outcome(in_float64(arguments), "reference"), tolerance)


def test_terms_in_half_precision_are_computed_in_single_precision():
    arguments = case(VISIBILITY["packed documents"], dtype=torch.bfloat16)
    out = multi_image_deformable_attention(**arguments, implementation="triton")
    expected = multi_image_deformable_attention(**in_float64(arguments), implementation="reference")
    assert_equal({"out": out}, {"out": expected}, 6e-3)


def test_hidden_images_change_nothing_even_if_they_are_not_numbers():
    arguments = case(torch.tensor([[[1, 0, 1], [1, 0, 0], [0, 0, 0]] * 2]).bool(), heads=1)
    before = outcome(arguments, "triton")
    arguments["value_BNSHD"] = arguments["value_BNSHD"].clone()
    arguments["value_BNSHD"][:, 1] = float("nan")
    after = outcome(arguments, "triton")
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert not after["value_BNSHD"][:, 1].any()


def test_a_query_without_images_gets_the_ignore_value_to_the_bit():
    arguments = case(VISIBILITY["all hidden"])
    out = multi_image_deformable_attention(**arguments, implementation="triton")
    assert torch.equal(out, arguments["ignore_HD"].expand_as(out))


def test_no_images_at_all():
    arguments = case(torch.zeros(1, 5, 0, dtype=torch.bool))
    out = multi_image_deformable_attention(**arguments, implementation="triton")
    assert torch.equal(out, arguments["ignore_HD"].expand_as(out))


def test_points_far_off_the_map_see_nothing_and_have_no_gradient():
    arguments = case(torch.ones(1, 6, 1, dtype=torch.bool), dtype=torch.float32)
    arguments["query_term_BQHE"][..., :2] = 1e30
    arguments["query_term_BQHE"][..., 2:4] = -3e9
    arguments["ignore_HD"].zero_()
    found = outcome(arguments, "triton")
    assert not found["out"].any()
    assert not found["value_BNSHD"].any() and not found["query_term_BQHE"].any()


def test_images_are_shared_without_copies_and_by_all_heads():
    """Rows name their images; one map serves all heads; a view with strides is read where it lies."""
    arguments = case(VISIBILITY["decoding a batch of unequal length"], channels=4)
    arguments["image_BN"] = torch.tensor([[1, 0, 0, 0], [1, 0, 1, 1], [0, 0, 0, 0]], device=DEVICE)
    wide = arguments["value_BNSHD"]
    arguments["value_BNSHD"] = wide[:2, 0, :, :1]
    expected = outcome(arguments, "reference")
    assert_equal(outcome(arguments, "triton"), expected, EXACT)
    strided = wide[:2, 0].transpose(1, 2).contiguous().transpose(1, 2)[:, :, :1]
    assert not strided.is_contiguous()
    out = multi_image_deformable_attention(**{**arguments, "value_BNSHD": strided}, implementation="triton")
    assert_equal({"out": out}, {"out": expected["out"]}, EXACT)


def test_heads_of_many_channels_are_cut_into_blocks():
    """As those of features that are sampled before they are projected."""
    arguments = case(torch.ones(1, 5, 1, dtype=torch.bool), heads=1, points=1, channels=150)
    assert_equal(outcome(arguments, "triton"), outcome(arguments, "reference"), EXACT)


def test_nothing_is_kept_for_backward_but_arguments_result_and_one_number_a_query_and_head():
    arguments = case(VISIBILITY["packed documents"], heads=1, points=1)
    value, term = (arguments[name].requires_grad_() for name in ("value_BNSHD", "query_term_BQHE"))
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x) or x, lambda x: x):
        out = multi_image_deformable_attention(**arguments, implementation="triton")
    known = {x.data_ptr() for x in (value, term, out, *arguments.values()) if isinstance(x, torch.Tensor)}
    new = sorted(tuple(x.shape) for x in kept if x.data_ptr() not in known)
    B, Q, H, _ = term.shape
    N = value.shape[1]
    assert new == [(B, N), (B, Q, H)]  # which image stands where, and the logarithm of the sum


@pytest.mark.parametrize("leaf", ["value_BNSHD", "query_term_BQHE", "index_term_KHE", "ignore_HD"])
def test_only_the_gradients_that_are_needed_are_computed(leaf):
    arguments = case(torch.ones(1, 5, 1, dtype=torch.bool), heads=1)
    actual = outcome(arguments, "triton", (leaf,))
    assert_equal(actual, outcome(arguments, "reference", (leaf,)), EXACT)


@pytest.mark.parametrize("keep", ["values", "features"])
def test_the_synchronizer_gives_the_same_whatever_its_implementation(keep):
    torch.manual_seed(0)
    synchronizer = FeatureSynchronizer(
        8, 6, value_dim=4, num_heads=2, num_levels=2, num_points=1, max_images=4, base_size=4, keep=keep
    ).to(DEVICE, torch.float64)
    torch.nn.init.normal_(synchronizer.sampling_offsets.weight)
    maps = [torch.randn(1, 2, 6, size, size, dtype=torch.float64, device=DEVICE) for size in (4, 2)]
    query = torch.randn(1, 6, 8, dtype=torch.float64, device=DEVICE)
    found = {}
    for implementation in ("reference", "triton"):
        synchronizer.implementation = implementation
        out = synchronizer(query, synchronizer.project_values(maps), causal(6, [0, 3]).to(DEVICE))
        weights = [p for p in synchronizer.parameters() if p.requires_grad]
        found[implementation] = [out, *torch.autograd.grad(out.square().sum(), weights)]
    for fast, expected in zip(found["triton"], found["reference"], strict=True):
        torch.testing.assert_close(fast, expected, rtol=0, atol=1e-11)


def operator_arguments():
    arguments = case(torch.ones(1, 5, 1, dtype=torch.bool), heads=1, points=1, dtype=torch.float32)
    tensors = [
        arguments["value_BNSHD"][0],
        torch.zeros(1, 1, dtype=torch.int64, device=DEVICE),
        arguments["query_term_BQHE"],
        arguments["index_term_KHE"],
        arguments["relative_index_BQN"],
        arguments["reference_BQ2"],
        arguments["ignore_HD"],
    ]
    return tensors, ([4, 2], 1, 4.0)


def test_the_operators_keep_pytorchs_rules():
    """Schema, fake implementation, registration of the gradient, tracing with fixed and free shapes."""
    tensors, sizes = operator_arguments()
    leaves = [x.requires_grad_(x.is_floating_point()) for x in tensors]
    torch.library.opcheck(attend_images, (*leaves, *sizes))
    out, lse = attend_images(*(x.detach() for x in tensors), *sizes)
    arguments = [x.detach() for x in tensors[:-1]]
    torch.library.opcheck(
        attend_images_backward, (torch.ones_like(out), *arguments, out, lse, *sizes, True, True, False)
    )


@pytest.mark.parametrize("dynamic", [False, True])
def test_it_compiles_as_one_graph_with_equal_results_and_gradients(dynamic):
    arguments = case(torch.ones(1, 5, 1, dtype=torch.bool), heads=1, points=1)
    torch.compiler.reset()
    attend = torch.compile(
        multi_image_deformable_attention, backend="aot_eager", fullgraph=True, dynamic=dynamic
    )
    found = []
    for function in (multi_image_deformable_attention, attend):
        value = arguments["value_BNSHD"].clone().requires_grad_()
        term = arguments["query_term_BQHE"].clone().requires_grad_()
        changed = {**arguments, "value_BNSHD": value, "query_term_BQHE": term}
        out = function(**changed, implementation="triton")
        found.append((out, *torch.autograd.grad(out.square().sum(), (value, term))))
    for eager, compiled in zip(*found, strict=True):
        torch.testing.assert_close(compiled, eager, rtol=0, atol=EXACT)


def test_tiles_are_rectangles_on_a_grid_and_lines_elsewhere():
    assert choose_tile(4096, 64, block_d=64, block_size=2048) == Tile(8, 4)
    assert choose_tile(4096, 64, block_d=64, block_size=4096) == Tile(8, 8)
    assert choose_tile(2048, 2048, block_d=64, block_size=2048) == Tile(32, 1)
    assert choose_tile(2048, 2048, block_d=4096, block_size=2048) == Tile(1, 1)


def test_auto_takes_the_kernel_on_cuda_if_triton_is_there(monkeypatch):
    on_cuda = SimpleNamespace(device=torch.device("cuda"))
    assert attention.choose_implementation("auto", on_cuda) == "triton"
    assert attention.choose_implementation("auto", torch.empty(0)) == "gather"
    with monkeypatch.context() as patch:
        patch.setattr(torch, "are_deterministic_algorithms_enabled", lambda: True)
        assert attention.choose_implementation("auto", on_cuda) == "gather"
    monkeypatch.setattr(attention, "HAS_TRITON", False)
    assert attention.choose_implementation("auto", on_cuda) == "gather"
    with pytest.raises(ValueError, match=r"needs Triton, which is not installed.*mm-interleaved\[kernels\]"):
        attention.choose_implementation("triton", on_cuda)


@pytest.mark.skipif(DEVICE != "cpu", reason="about a machine without a GPU")
def test_on_a_cpu_the_kernel_says_what_it_needs(monkeypatch):
    monkeypatch.setattr(triton_attention, "IS_INTERPRETED", False)
    with pytest.raises(ValueError, match="needs a GPU, but the values are on the CPU"):
        multi_image_deformable_attention(**case(VISIBILITY["all hidden"]), implementation="triton")
