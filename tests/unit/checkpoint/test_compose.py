"""A model composed of pretrained parts behaves as they do until it is trained."""

import json
import shutil
from functools import partial

import pytest
import torch
from diffusers import AutoencoderKL, DDPMScheduler, UNet2DConditionModel
from PIL import Image as PILImage
from transformers import (
    AutoModelForCausalLM,
    CLIPConfig,
    CLIPModel,
    CLIPTextConfig,
    CLIPTextModel,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from mm_interleaved import MMInterleavedForConditionalGeneration, MMInterleavedProcessor
from mm_interleaved.checkpoint.compose import JointSettings, compose
from mm_interleaved.documents.document import Document, Text
from mm_interleaved.errors import ModelFileError, UsageError
from mm_interleaved.models.config import AdapterConfig, ResamplerConfig, SynchronizerConfig
from mm_interleaved.models.unet import unet_forward
from mm_interleaved.recipes.run import run_recipe

FAMILIES = {
    "llama": (LlamaConfig, LlamaForCausalLM),
    "mistral": (MistralConfig, MistralForCausalLM),
    "qwen2": (Qwen2Config, Qwen2ForCausalLM),
    "qwen3": (Qwen3Config, Qwen3ForCausalLM),
}
VOCAB_SIZE = 330  # ten rows more than the tokenizer has, as Qwen's
JOINTS = JointSettings(
    adapter=AdapterConfig(stem_dim=4),
    slot_resampler=ResamplerConfig(dim=16, num_queries=3, num_layers=2, num_heads=2, mlp_dim=24),
    conditioning_resampler=ResamplerConfig(dim=16, num_queries=77, num_layers=1, num_heads=2, mlp_dim=24),
    text_synchronizer=SynchronizerConfig(
        value_dim=8,
        levels=(0, 1, 2),
        num_heads=2,
        num_points=2,
        max_images=12,
        base_size=4,
        offset_spread=2.0,
    ),
    image_synchronizer=SynchronizerConfig(
        value_dim=8,
        levels=(0, 1, 2, 3),
        num_heads=2,
        num_points=2,
        max_images=6,
        base_size=8,
        offset_spread=1.0,
    ),
)


@pytest.fixture(scope="module")
def save_llm(tmp_path_factory, byte_level_tokenizer):
    """Write a tiny language model of a family: (folder)."""

    def save(family, **changes):
        folder = tmp_path_factory.mktemp(family)
        config_class, model_class = FAMILIES[family]
        settings = {
            "vocab_size": VOCAB_SIZE, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
            "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 64,
        }  # fmt: skip
        torch.manual_seed(0)
        model_class(config_class(**(settings | changes))).save_pretrained(folder)
        tokenizer = byte_level_tokenizer
        if family.startswith("qwen"):  # these know an end of text and nothing else
            tokenizer = PreTrainedTokenizerFast(
                tokenizer_object=byte_level_tokenizer.backend_tokenizer, eos_token="</s>", pad_token="</s>"
            )
        tokenizer.save_pretrained(folder)
        return folder

    return save


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    folder = tmp_path_factory.mktemp("clip")
    sides = {
        "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 4, "num_attention_heads": 2,
    }  # fmt: skip
    torch.manual_seed(1)
    config = CLIPConfig(
        text_config={**sides, "vocab_size": 40}, vision_config={**sides, "image_size": 32, "patch_size": 8}
    )
    CLIPModel(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def diffusion(tmp_path_factory):
    folder = tmp_path_factory.mktemp("diffusion")
    torch.manual_seed(2)
    UNet2DConditionModel(
        sample_size=8, block_out_channels=(8, 8, 16, 16), attention_head_dim=(1, 1, 2, 2),
        cross_attention_dim=16, norm_num_groups=4, use_linear_projection=True,
    ).save_pretrained(folder / "unet")  # fmt: skip
    AutoencoderKL(
        block_out_channels=(4, 8, 8), norm_num_groups=4, down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3, sample_size=32,
    ).save_pretrained(folder / "vae")  # fmt: skip
    DDPMScheduler(prediction_type="v_prediction").save_pretrained(folder / "scheduler")
    text = CLIPTextConfig(
        vocab_size=6, hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2,
        bos_token_id=0, eos_token_id=1,
    )  # fmt: skip
    CLIPTextModel(text).save_pretrained(folder / "text_encoder")
    words = {"<|startoftext|>": 0, "<|endoftext|>": 1, "a</w>": 2, "b</w>": 3, "a": 4, "b": 5}
    (folder / "tokenizer").mkdir()
    (folder / "tokenizer" / "vocab.json").write_text(json.dumps(words))
    (folder / "tokenizer" / "merges.txt").write_text("#version: 0.2\n")
    (folder / "tokenizer" / "tokenizer_config.json").write_text('{"tokenizer_class": "CLIPTokenizer"}')
    return folder


@pytest.fixture(scope="module")
def composed(tmp_path_factory, save_llm, clip, diffusion):
    """Folder of a composed model, folder of its language model."""
    llm, out = save_llm("llama"), tmp_path_factory.mktemp("out") / "model"
    compose(out, llm=str(llm), vision=str(clip), diffusion=str(diffusion), joints=JOINTS)
    return out, llm


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_text_of_a_composed_model_is_that_of_its_language_model(family, tmp_path, save_llm, clip, diffusion):
    tied = family.startswith("qwen")
    llm = save_llm(family, tie_word_embeddings=tied)
    model = compose(tmp_path / "out", llm=str(llm), vision=str(clip), diffusion=str(diffusion), joints=JOINTS)
    stock = AutoModelForCausalLM.from_pretrained(llm).eval()
    ids = torch.randint(5, 320, (2, 9), generator=torch.Generator().manual_seed(0))
    expected = stock(ids).logits
    logits = model(ids).logits
    torch.testing.assert_close(logits[..., :VOCAB_SIZE], expected, rtol=0, atol=1e-6)
    assert (logits[..., VOCAB_SIZE:] == -5).all()  # new tokens are not said before they are learnt
    assert model.config.num_new_tokens == (4 if tied else 2)


@torch.no_grad()
def test_what_is_written_is_what_is_returned_and_has_a_processor(tmp_path, save_llm, clip, diffusion):
    # A family without beginning and padding: those ids are new, and begin as the end-of-text token.
    llm = save_llm("qwen2")
    model = compose(tmp_path / "out", llm=str(llm), vision=str(clip), diffusion=str(diffusion), joints=JOINTS)
    again = MMInterleavedForConditionalGeneration.from_pretrained(tmp_path / "out").eval()
    read = again.state_dict()
    assert all(torch.equal(tensor, read[name]) for name, tensor in model.state_dict().items())
    processor = MMInterleavedProcessor.from_pretrained(tmp_path / "out")
    assert processor.vocabulary.special_ids() == {
        "image_start": VOCAB_SIZE, "image": VOCAB_SIZE + 1, "bos": VOCAB_SIZE + 2, "eos": 2, "pad": VOCAB_SIZE
        + 3,
    }  # fmt: skip
    table = again.language_model.embed_tokens.weight
    assert torch.equal(table[VOCAB_SIZE + 2], table[2]) and torch.equal(table[VOCAB_SIZE + 3], table[2])
    batch = processor([Document(id="a", parts=(Text("Pip finds a lamp."),))])
    assert again(batch.input_ids).logits.isfinite().all()
    assert processor.target_pixels.size == 32 and processor.encoder_pixels.size == 32


@torch.no_grad()
def test_pictures_of_a_composed_model_are_those_of_its_diffusion_model(composed, diffusion, clip):
    model = MMInterleavedForConditionalGeneration.from_pretrained(composed[0]).eval()
    unet = UNet2DConditionModel.from_pretrained(diffusion, subfolder="unet").eval()
    vae = AutoencoderKL.from_pretrained(diffusion, subfolder="vae").eval()
    latents, conditioning = torch.randn(2, 4, 8, 8), torch.randn(2, 77, 16)
    timesteps = torch.tensor([3, 700])
    expected = unet(latents, timesteps, conditioning).sample
    close = partial(torch.testing.assert_close, rtol=0, atol=1e-5)
    close(unet_forward(model.image_decoder.unet, latents, timesteps, conditioning), expected)
    features = model.encode_images(torch.rand(2, 3, 32, 32))
    earlier = model.project_earlier_images(features.pyramid, torch.tensor([[0, 1], [-1, 1]]))
    # Through the synchronizers, whose convolutions start at zero.
    close(model.image_decoder.predict(latents, timesteps, conditioning, earlier), expected)
    close(model.image_decoder.vae.decode(latents).sample, vae.decode(latents).sample)
    assert model.training_scheduler.config.prediction_type == "v_prediction"
    tower = CLIPModel.from_pretrained(clip).vision_model.eval()
    pixels = torch.rand(2, 3, 32, 32)
    tokens = model.vision.clip.embed(pixels)
    for layer in model.vision.clip.layers:
        tokens = layer(tokens, attention_mask=None)
    close(tokens, tower(pixels).last_hidden_state)


@torch.no_grad()
def test_guidance_starts_from_the_text_encoders_empty_string(composed, diffusion):
    model = MMInterleavedForConditionalGeneration.from_pretrained(composed[0])
    encoder = CLIPTextModel.from_pretrained(diffusion, subfolder="text_encoder")
    expected = encoder(torch.tensor([[0] + [1] * 76])).last_hidden_state
    torch.testing.assert_close(model.image_decoder.negative_conditioning.data, expected, rtol=0, atol=1e-6)


def test_a_seed_makes_the_same_new_parts_and_leaves_the_callers_randomness_alone(
    composed, tmp_path, clip, diffusion
):
    folder, llm = composed
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    compose(tmp_path / "a", llm=str(llm), vision=str(clip), diffusion=str(diffusion), joints=JOINTS)
    assert torch.equal(torch.rand(3), expected)
    assert (tmp_path / "a" / "model.safetensors").read_bytes() == (folder / "model.safetensors").read_bytes()


def test_a_composed_model_may_be_half_precision(tmp_path, composed, clip, diffusion):
    model = compose(
        tmp_path / "a", llm=str(composed[1]), vision=str(clip), diffusion=str(diffusion), joints=JOINTS,
        dtype="bfloat16",
    )  # fmt: skip
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}


def _change(folder, name, tmp_path, **changes):
    """A copy of one configuration, changed: folder."""
    copy = tmp_path / "changed"
    shutil.copytree(folder, copy)
    settings = json.loads((copy / name).read_text())
    settings.update(changes)
    (copy / name).write_text(json.dumps(settings))
    return str(copy)


@pytest.mark.parametrize(
    ("part", "name", "changes", "message"),
    [
        ("llm", "config.json", {"model_type": "gpt2"}, "'gpt2' does not fit"),
        ("vision", "config.json", {"model_type": "vit"}, "'vit', expected CLIP"),
        ("vision", "config.json", {"vision_config": {"image_size": [32, 64]}}, "square grid"),
        ("vision", "config.json", {"vision_config": {"image_size": 24, "patch_size": 8}}, "two patches"),
        (
            "diffusion",
            "unet/config.json",
            {"class_embed_type": "timestep"},
            "SD 1.x/2.x: expected no class_embed",
        ),
        ("diffusion", "unet/config.json", {"in_channels": 9}, "in_channels 9 must equal"),
    ],
)
def test_a_part_that_does_not_fit_is_refused_in_one_sentence(
    part, name, changes, message, tmp_path, composed, clip, diffusion
):
    parts = {"llm": str(composed[1]), "vision": str(clip), "diffusion": str(diffusion)}
    parts[part] = _change(parts[part], name, tmp_path, **changes)
    with pytest.raises(ModelFileError) as error:
        compose(tmp_path / "out", **parts, joints=JOINTS)
    assert message in str(error.value) and "\n" not in str(error.value)
    assert not (tmp_path / "out").exists()


def test_a_missing_part_a_wrong_dtype_and_a_full_folder_are_refused(tmp_path, composed, clip, diffusion):
    parts = {"llm": str(composed[1]), "vision": str(clip), "diffusion": str(diffusion)}
    with pytest.raises(ModelFileError, match=r"llm .*nowhere"):
        compose(tmp_path / "out", **(parts | {"llm": str(tmp_path / "nowhere")}))
    with pytest.raises(UsageError, match="float8"):
        compose(tmp_path / "out", **parts, dtype="float8")
    with pytest.raises(UsageError, match="there already"):
        compose(composed[0], **parts, joints=JOINTS)


def test_a_composed_model_is_trained_by_a_recipe(tmp_path, composed):
    PILImage.new("RGB", (20, 20), (200, 30, 40)).save(tmp_path / "lamp.png")
    parts = [{"type": "text", "text": "A lamp."}, {"type": "image", "image": "lamp.png"}]
    (tmp_path / "lamps.jsonl").write_text(json.dumps({"id": "lamp", "content": parts}))
    settings = {
        "start_from": composed[0], "corpora.pairs.kind": "documents", "max_length": 64, "num_threads": 1,
        "corpora.pairs.paths": tmp_path / "lamps.jsonl", "corpora.stories.weight": 0, "training.steps": 2,
        "global_batch_size": 2, "micro_batch_size": 1, "training.log_every": 1,
    }  # fmt: skip
    assignments = [f"{name}={value}" for name, value in settings.items()]
    trained = run_recipe("pretrain-storyworld", assignments, out=tmp_path / "run")
    before, after = (
        MMInterleavedForConditionalGeneration.from_pretrained(folder).state_dict()
        for folder in (composed[0], trained)
    )
    changed = {name.split(".")[0] for name in before if not torch.equal(before[name], after[name])}
    assert {"vision", "text_head", "image_decoder", "language_model"} <= changed
    assert not any(
        "self_attn" in name and not torch.equal(before[name], after[name])
        for name in before
        if name.startswith("language_model.")
    )
