"""The fused kernel on a GPU at the published sizes, against the reference."""

import pytest
import torch

pytest.importorskip("triton")

from cases import assert_equal, case, causal, in_float64, outcome

from mm_interleaved.ops import multi_image_deformable_attention

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
LLM = {"levels": (32, 16, 8), "heads": 16, "channels": 64, "points": 8, "base_size": 16.0}
UNET = {"levels": (64, 32, 16, 8), "heads": 16, "channels": 64, "points": 8, "base_size": 64.0}
CASES = {
    "prefill of 2048 tokens and 8 images": (causal(2048, list(range(0, 2048, 256))), LLM),
    "packed rows": (causal(512, [0, 100, 300, 400], documents=[0] * 256 + [1] * 256), LLM),
    "decoding with 32 images": (torch.ones(2, 1, 32, dtype=torch.bool), LLM),
    "u-net, 64 x 64": (torch.ones(2, 4096, 1, dtype=torch.bool), UNET | {"reference_queries": 4096}),
    "u-net, 8 x 8": (
        torch.ones(2, 64, 1, dtype=torch.bool),
        UNET | {"base_size": 8.0, "reference_queries": 64},
    ),
}


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 2e-5), (torch.bfloat16, 1e-2)])
def test_result_and_gradients_at_published_sizes(name, dtype, tolerance):
    """Of the offsets' gradient, which jumps where a point crosses a cell's centre, a few in a million may
    fall on the other side.
    """
    visible, sizes = CASES[name]
    arguments = case(visible, dtype=torch.float32, value_dtype=dtype, **sizes)
    actual = outcome(arguments, "triton")
    expected = outcome(in_float64(arguments), "gather")
    jumping = {"query_term_BQHE", "index_term_KHE", "reference_BQ2"}
    assert_equal(actual, {n: x for n, x in expected.items() if n not in jumping}, tolerance)
    for leaf in jumping:
        difference = (actual[leaf].double() - expected[leaf]).abs() / expected[leaf].abs().max()
        assert (difference > tolerance).double().mean() < 1e-4, leaf
        assert difference.max() < 0.1, leaf


def test_gather_the_oracle_above_equals_the_reference():
    visible, sizes = CASES["packed rows"]
    arguments = case(visible, **sizes)
    assert_equal(outcome(arguments, "gather"), outcome(arguments, "reference"), 1e-12)


def test_auto_is_the_kernel():
    visible, sizes = CASES["packed rows"]
    arguments = case(visible, dtype=torch.float32, value_dtype=torch.bfloat16, **sizes)
    assert torch.equal(
        multi_image_deformable_attention(**arguments),
        multi_image_deformable_attention(**arguments, implementation="triton"),
    )


def test_decoding_runs_in_a_cuda_graph():
    visible, sizes = CASES["decoding with 32 images"]
    arguments = case(visible, dtype=torch.float32, value_dtype=torch.bfloat16, **sizes)
    expected = multi_image_deformable_attention(**arguments)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = multi_image_deformable_attention(**arguments)
    out.zero_()
    graph.replay()
    assert torch.equal(out, expected)


def test_it_compiles_with_inductor():
    visible, sizes = CASES["packed rows"]
    arguments = case(visible, dtype=torch.float32, value_dtype=torch.bfloat16, **sizes)
    attend = torch.compile(multi_image_deformable_attention, fullgraph=True)
    assert_equal(
        {"out": attend(**arguments)}, {"out": multi_image_deformable_attention(**arguments)}, tolerance=1e-2
    )
