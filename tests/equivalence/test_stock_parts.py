"""Our parts switched off equal the stock parts: the tests that fail when a library moves."""

import pytest
import torch
from diffusers import UNet2DConditionModel
from transformers import (
    CLIPVisionConfig,
    CLIPVisionModel,
    LlamaConfig,
    MistralConfig,
    Qwen2Config,
    Qwen3Config,
)
from transformers.models.llama.modeling_llama import LlamaModel
from transformers.models.mistral.modeling_mistral import MistralModel
from transformers.models.qwen2.modeling_qwen2 import Qwen2Model
from transformers.models.qwen3.modeling_qwen3 import Qwen3Model

from mm_interleaved.models.gated_synchronizer import GatedSynchronizer
from mm_interleaved.models.language import ImageView, language_family
from mm_interleaved.models.synchronizer import FeatureSynchronizer
from mm_interleaved.models.unet import check_unet, skip_channels, unet_forward
from mm_interleaved.models.vision import ClipBackbone

FAMILIES = {
    "llama": (LlamaConfig, LlamaModel),
    "mistral": (MistralConfig, MistralModel),
    "qwen2": (Qwen2Config, Qwen2Model),
    "qwen3": (Qwen3Config, Qwen3Model),
}


def gated(dim=32):
    return GatedSynchronizer(
        FeatureSynchronizer(
            dim, 16, value_dim=16, num_heads=2, num_levels=1, num_points=2, max_images=5, base_size=4
        ),
        dim,
        16,
    )


def language_pair(family):
    config_class, stock_class = FAMILIES[family]
    config = config_class(
        vocab_size=50,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        max_position_embeddings=64,
    )
    torch.manual_seed(0)
    stock = stock_class(config).eval()
    ours = language_family(family)(config, {0: gated(), 2: gated()}).eval()
    missing = ours.load_state_dict(stock.state_dict(), strict=False).missing_keys
    assert all("synchronizer" in key for key in missing), "stock parameters keep their names"
    return stock, ours


@pytest.mark.parametrize("family", FAMILIES)
def test_language_model_without_images_equals_the_stock_model_to_the_bit(family):
    stock, ours = language_pair(family)
    ids = torch.randint(0, 50, (2, 9), generator=torch.Generator().manual_seed(1))
    mask = torch.tensor([[1] * 9, [0, 0] + [1] * 7])
    expected = stock(input_ids=ids, attention_mask=mask).last_hidden_state
    assert torch.equal(ours(input_ids=ids, attention_mask=mask).last_hidden_state, expected)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_closed_gate_changes_nothing_and_an_open_one_does(family):
    stock, ours = language_pair(family)
    ids = torch.randint(0, 50, (1, 7), generator=torch.Generator().manual_seed(1))
    cells = torch.randn(1, 2, 16, 16, generator=torch.Generator().manual_seed(2))
    view = ImageView(ours.project_images(cells, (4,)), torch.tensor([2, 1]).expand(1, 7, 2))
    expected = stock(input_ids=ids).last_hidden_state
    torch.testing.assert_close(
        ours(input_ids=ids, image_view=view).last_hidden_state, expected, rtol=0, atol=0
    )
    with torch.no_grad():
        ours.layers[2].synchronizer.gate.fill_(0.5)
    assert not torch.allclose(ours(input_ids=ids, image_view=view).last_hidden_state, expected)


def test_an_unfit_language_family_is_refused_in_one_sentence():
    with pytest.raises(ValueError, match="'gpt2' does not fit: expected one of"):
        language_family("gpt2")


def tiny_unet(**changes):
    settings = {
        "sample_size": 16,
        "in_channels": 4,
        "out_channels": 4,
        "block_out_channels": (8, 8, 16, 16),
        "layers_per_block": 2,
        "attention_head_dim": (1, 1, 2, 2),
        "cross_attention_dim": 12,
        "norm_num_groups": 4,
        "use_linear_projection": True,
    } | changes
    torch.manual_seed(0)
    return UNet2DConditionModel(**settings).eval()


@pytest.mark.parametrize("size", [(16, 16), (12, 20), (9, 13)])
@pytest.mark.parametrize(
    "sd", [{}, {"use_linear_projection": False, "attention_head_dim": 2}], ids=["sd2", "sd1"]
)
def test_unet_without_callback_equals_the_stock_unet_to_the_bit(size, sd):
    unet = tiny_unet(**sd)
    generator = torch.Generator().manual_seed(1)
    latents = torch.randn(2, 4, *size, generator=generator)
    conditioning = torch.randn(2, 5, 12, generator=generator)
    timesteps = torch.tensor([3, 700])
    expected = unet(latents, timesteps, conditioning).sample
    assert torch.equal(unet_forward(unet, latents, timesteps, conditioning), expected)


def test_unet_callback_sees_twelve_skips_and_the_middle():
    unet = tiny_unet()
    seen = {}

    def between(middle, skips):
        seen["skips"], seen["middle"] = [skip.shape for skip in skips], middle.shape
        return middle, skips

    unet_forward(unet, torch.zeros(1, 4, 16, 16), torch.tensor(1), torch.zeros(1, 5, 12), between)
    assert [(shape[1], 16 // shape[2]) for shape in seen["skips"]] == [
        (c, 2**d) for c, d in skip_channels(unet)
    ]
    assert len(seen["skips"]) == 12 and seen["middle"] == seen["skips"][-1]


def test_an_unfit_unet_is_refused_in_one_sentence():
    unet = tiny_unet(class_embed_type="timestep")
    with pytest.raises(ValueError, match="expected no class_embed_type, got 'timestep'"):
        check_unet(unet)


@pytest.mark.parametrize("size", [32, 48])
def test_clip_backbone_equals_the_stock_model(size):
    config = CLIPVisionConfig(
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=3,
        num_attention_heads=2,
        image_size=32,
        patch_size=8,
        attn_implementation="sdpa",
    )
    torch.manual_seed(0)
    stock = CLIPVisionModel(config).eval()
    ours = ClipBackbone(config).eval()
    names = {"pre_norm": "pre_layrnorm", "layers": "encoder.layers"}
    theirs = {key.removeprefix("vision_model."): value for key, value in stock.state_dict().items()}
    ours.load_state_dict(
        {
            k: theirs[k.replace(k.split(".")[0], names.get(k.split(".")[0], k.split(".")[0]), 1)]
            for k in ours.state_dict()
        }
    )
    pixels = torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(1))
    expected = stock(pixels, interpolate_pos_encoding=size != 32).last_hidden_state
    token = ours.embed(pixels)
    for layer in ours.layers:
        token = layer(token, attention_mask=None)
    torch.testing.assert_close(token, expected, rtol=0, atol=1e-6)
