"""Faster painting: what is exact stays so, what is not says how far off it is."""

import json
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
from diffusers import UNet2DConditionModel
from PIL import Image as PILImage

from mm_interleaved.documents.document import Document, Image, Text, document_to_record
from mm_interleaved.documents.document_files import read_documents
from mm_interleaved.errors import InputError, ModelFileError, UsageError
from mm_interleaved.generation import diffusion, schedulers
from mm_interleaved.generation.engine import InterleavedGenerator
from mm_interleaved.generation.events import ImageDone
from mm_interleaved.generation.loading import Acceleration
from mm_interleaved.models.acceleration import compile_image_decoder, load_adapter, use_channels_last
from mm_interleaved.models.compilation import compile_each
from mm_interleaved.models.unet import DeepFeatures, unet_blocks, unet_forward
from mm_interleaved.training.adaptation import add_low_rank
from mm_interleaved.training.config import LoraConfig
from tiny import tiny_model, tiny_processor

DRAW = {"layout": "I", "num_inference_steps": 4, "scheduler": "ddim", "guidance_scale": 4.0}


@pytest.fixture(scope="module")
def painter():
    """A decoder that looks at an earlier image, and what its U-Net is asked."""
    model = tiny_model().double()
    decoder = model.image_decoder
    features = model.encode_images(torch.rand(1, 3, 32, 32, generator=seeded(1)).double())
    with torch.no_grad():
        earlier = decoder.project_earlier_images(features.pyramid, torch.zeros(1, 1, dtype=torch.int64))
    width = decoder.unet.config.cross_attention_dim
    conditioning = torch.randn(1, 4, width, generator=seeded(2)).double()
    latents = torch.randn(1, 4, 8, 8, generator=seeded(3)).double()
    return model, latents, conditioning, earlier


def seeded(seed):
    return torch.Generator().manual_seed(seed)


@torch.no_grad()
def predict(painter, timestep=500, shift=0.0, **more):
    model, latents, conditioning, earlier = painter
    return model.image_decoder.predict(latents + shift, torch.tensor(timestep), conditioning, earlier, **more)


@torch.no_grad()
def paint(painter, **more):
    model, latents, conditioning, earlier = painter
    scheduler = schedulers.build_scheduler("ddim", model.config.scheduler_config)
    steps = diffusion.denoise(
        model.image_decoder, scheduler, latents, conditioning, earlier,
        num_inference_steps=5, guidance_scale=3.0, **more,
    )  # fmt: skip
    return [step.latents for step in steps]


def test_painting_keeps_nothing_for_gradients(painter):
    model, latents, conditioning, earlier = painter
    parameter = next(model.image_decoder.unet.parameters())
    assert parameter.requires_grad
    assert all(step.is_inference() for step in paint(painter))
    # What painting left with the earlier images serves training afterwards.
    assert earlier is not None
    out = model.image_decoder.predict(latents, torch.tensor(500), conditioning, earlier)
    out.sum().backward()
    assert parameter.grad is not None
    model.zero_grad()


@pytest.fixture
def rows(painter):
    """How many rows the first and the middle block of the U-Net have seen, call by call."""
    unet = painter[0].image_decoder.unet
    seen = {"first": [], "middle": []}
    hooks = [
        unet.conv_in.register_forward_hook(lambda _, args, out: seen["first"].append(len(out))),
        unet.mid_block.register_forward_hook(lambda _, args, out: seen["middle"].append(len(out))),
    ]
    yield seen
    for hook in hooks:
        hook.remove()


def test_a_step_from_its_own_deep_features_is_the_same_step(painter):
    deep = DeepFeatures()
    whole = predict(painter, deep=deep)
    assert torch.equal(whole, predict(painter))
    assert torch.equal(predict(painter, deep=deep), whole)
    # From those of another step it is another one, and still follows what it is given.
    stale = predict(painter, timestep=400, shift=0.1, deep=deep)
    assert not torch.allclose(stale, whole) and not torch.allclose(stale, predict(painter, 400, 0.1))


def test_a_shallow_step_still_looks_at_earlier_images(painter):
    deep = DeepFeatures()
    predict(painter, deep=deep)
    blind = predict(painter, deep=deep, context_strength=0.0)
    assert not torch.allclose(predict(painter, deep=deep), blind)


def test_deep_features_serve_the_last_of_their_images_until_they_are_stale():
    deep = DeepFeatures(torch.arange(4.0)[:, None])
    deep.keep_for(2, is_fresh=True)
    assert deep.hidden.flatten().tolist() == [2, 3]
    deep.keep_for(3, is_fresh=True)
    assert deep.hidden is None
    deep = DeepFeatures(torch.ones(2, 1))
    deep.keep_for(2, is_fresh=False)
    assert deep.hidden is None


@pytest.mark.parametrize(
    ("caches", "first", "middle"),
    [
        ({}, [2, 2, 2, 2, 2], [2, 2, 2, 2, 2]),
        ({"step_cache": 2}, [2, 2, 2, 2, 2], [2, 2, 2]),
        ({"guidance_cache": 3}, [2, 1, 1, 2, 1], [2, 1, 1, 2, 1]),
        # The unguided half needs deep features of its own, so its step computes them whenever it comes.
        ({"step_cache": 3, "guidance_cache": 2}, [2, 1, 2, 1, 2], [2, 2, 1, 2]),
    ],
)
def test_what_is_left_out_is_not_computed(painter, rows, caches, first, middle):
    paint(painter, **caches)
    assert (rows["first"], rows["middle"]) == (first, middle)


def test_caches_of_one_step_are_exact_and_longer_ones_are_near(painter):
    exact = paint(painter)
    assert all(map(torch.equal, paint(painter, step_cache=1, guidance_cache=1), exact))
    for caches in ({"step_cache": 2}, {"guidance_cache": 2}, {"step_cache": 2, "guidance_cache": 2}):
        lossy = paint(painter, **caches)
        assert torch.equal(lossy[0], exact[0])
        off = (lossy[-1] - exact[-1]).norm() / exact[-1].norm()
        assert 0 < off < 0.5, caches


def test_guidance_that_does_not_change_may_be_used_again(painter):
    """Where the unguided half does not depend on the step, leaving it out is exact."""
    model, latents, conditioning, _ = painter
    outputs = []

    class Still:
        negative_conditioning = model.image_decoder.negative_conditioning

        def learned_negative(self, like):
            return self.negative_conditioning

        def predict(self, latents, timestep, conditioning, earlier, **_):
            outputs.append(len(latents))
            is_negative = (conditioning == self.negative_conditioning).all(-1).all(-1)
            return torch.where(is_negative[:, None, None, None], 0.3, 0.5).expand_as(latents).double()

    def run(**caches):
        scheduler = schedulers.build_scheduler("ddim", model.config.scheduler_config)
        return list(
            diffusion.denoise(
                Still(), scheduler, latents, conditioning, None,
                num_inference_steps=4, guidance_scale=3.0, **caches,
            )
        )[-1].latents  # fmt: skip

    torch.testing.assert_close(run(guidance_cache=4), run(), rtol=1e-12, atol=1e-12)
    assert outputs == [2, 1, 1, 1, 2, 2, 2, 2]


# ---- The error that is reported ----------------------------------------------------------------


@pytest.fixture(scope="module")
def generator():
    model = tiny_model(generation_settings={"num_inference_steps": 3, "scheduler": "ddim"})
    return InterleavedGenerator(model, tiny_processor(model.config))


def drawn(generator, **settings):
    events = list(generator.stream(Document(id="d", parts=[Text("Hi")]), **{**DRAW, **settings}))
    [done] = [event for event in events if isinstance(event, ImageDone)]
    assert events[-1].document.images[-1].pixel_error == done.pixel_error
    return np.asarray(done.image, np.float64), done.pixel_error


def test_the_reported_error_is_that_of_the_two_pictures(generator):
    exact, nothing = drawn(generator)
    assert nothing is None
    lossy, error = drawn(generator, guidance_cache=4, step_cache=4, report_error=True)
    assert error == pytest.approx(np.abs(lossy - exact).mean()) and error > 0
    # Measuring changes nothing, and without such a switch a picture is compared with the model's own sampler.
    assert np.array_equal(drawn(generator, guidance_cache=4, step_cache=4)[0], lossy)
    own = drawn(generator, num_inference_steps=3)[0]
    assert drawn(generator, report_error=True)[1] == pytest.approx(np.abs(exact - own).mean())
    assert drawn(generator, num_inference_steps=3, report_error=True)[1] == 0


def test_an_error_stands_in_the_record_and_is_read_back(tmp_path):
    picture = tmp_path / "a.png"
    PILImage.new("RGB", (4, 4)).save(picture)
    document = Document(id="d", parts=[Image(picture, generated=True, seed=3, pixel_error=1.25)])
    record = document_to_record(document, lambda image, _: "a.png")
    assert record["content"][0]["pixel_error"] == 1.25
    lines = tmp_path / "d.jsonl"
    lines.write_text(json.dumps(record))
    assert read_documents(lines)[0].images[0].pixel_error == 1.25
    record["content"][0]["pixel_error"] = "much"
    lines.write_text(json.dumps(record))
    with pytest.raises(InputError, match="a number from 0 to 255"):
        read_documents(lines)


# ---- Exact but for rounding ---------------------------------------------------------------------


def test_channels_last_changes_no_picture(painter):
    model, latents, *_ = painter
    expected, pixels = predict(painter), model.image_decoder.decode(latents)
    use_channels_last(model.image_decoder)
    assert model.image_decoder.unet.conv_in.weight.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(predict(painter), expected, rtol=1e-11, atol=1e-11)
    torch.testing.assert_close(model.image_decoder.decode(latents), pixels, rtol=1e-11, atol=1e-11)
    model.image_decoder.to(memory_format=torch.contiguous_format)


def test_compiled_blocks_compute_the_same_and_keep_their_names():
    torch.manual_seed(0)
    unet = UNet2DConditionModel(
        sample_size=8, block_out_channels=(8,), layers_per_block=1, cross_attention_dim=8, norm_num_groups=4,
        attention_head_dim=8, down_block_types=("CrossAttnDownBlock2D",),
        up_block_types=("CrossAttnUpBlock2D",),
    ).eval()  # fmt: skip
    inputs = torch.randn(1, 4, 8, 8), torch.tensor(3), torch.randn(1, 2, 8)
    with torch.no_grad():
        expected, names = unet_forward(unet, *inputs), list(unet.state_dict())
        graphs = []

        def counting(graph, example):
            graphs.append(graph)
            return graph.forward

        compile_each(unet_blocks(unet), counting)
        torch.testing.assert_close(unet_forward(unet, *inputs), expected)
    assert graphs and list(unet.state_dict()) == names


def test_an_unknown_back_end_is_refused(painter):
    with pytest.raises(UsageError, match=r"expected one of .*found 'fast'"):
        compile_image_decoder(painter[0].image_decoder, "fast")


# ---- Adapters -----------------------------------------------------------------------------------


@torch.no_grad()
def random_additions(model):
    for index, (name, weight) in enumerate(model.named_parameters()):
        if "lora_B" in name:
            weight.normal_(std=0.5, generator=seeded(index))


def one_step(model, decoder=None):
    width = model.image_decoder.unet.config.cross_attention_dim
    with torch.no_grad():
        return (decoder or model.image_decoder).predict(
            torch.ones(1, 4, 8, 8), torch.tensor(9), torch.ones(1, 4, width), None
        )


def test_an_adapter_of_peft_adds_to_the_model_and_can_be_left_out(tmp_path):
    trained = tiny_model()
    handle = add_low_rank(trained, LoraConfig(rank=2, alpha=8, parts=("unet",)))
    random_additions(trained)
    handle.save_pretrained(tmp_path)
    expected = one_step(handle.merge_and_unload())

    model = tiny_model()
    before = one_step(model)
    adapter = load_adapter(model, tmp_path)
    torch.testing.assert_close(one_step(model), expected, rtol=1e-4, atol=1e-5)
    assert torch.equal(one_step(model, adapter.without), before)
    torch.testing.assert_close(one_step(model), expected, rtol=1e-4, atol=1e-5)

    # Its error is that against the model itself, drawn in the model's own way.
    own = {"num_inference_steps": 3, "scheduler": "ddim", "guidance_scale": 2}
    plain = tiny_model(generation_settings=own)
    with_adapter = InterleavedGenerator(
        plain, tiny_processor(plain.config), adapter=load_adapter(plain, tmp_path)
    )
    few = {"scheduler": "lcm", "num_inference_steps": 2, "guidance_scale": 1.0}
    picture, error = drawn(with_adapter, **few, report_error=True)
    untouched = tiny_model(generation_settings=own)
    expected, _ = drawn(InterleavedGenerator(untouched, tiny_processor(untouched.config)), **own)
    assert error == pytest.approx(np.abs(picture - expected).mean()) and error > 0


def test_an_adapter_of_diffusers_goes_into_the_unet(tmp_path):
    from diffusers import StableDiffusionPipeline
    from peft import LoraConfig as PeftConfig
    from peft import get_peft_model_state_dict

    trained = tiny_model()
    unet = trained.image_decoder.unet
    unet.add_adapter(PeftConfig(r=2, lora_alpha=2, target_modules=["to_q", "to_v"]))
    random_additions(trained)
    expected = one_step(trained)
    StableDiffusionPipeline.save_lora_weights(tmp_path, unet_lora_layers=get_peft_model_state_dict(unet))

    model = tiny_model()
    assert not torch.allclose(one_step(model), expected)
    load_adapter(model, tmp_path)
    torch.testing.assert_close(one_step(model), expected, rtol=1e-4, atol=1e-5)


def test_what_is_no_adapter_is_refused_in_one_sentence(tmp_path):
    with pytest.raises(ModelFileError, match=r"expected adapter_config\.json with .*found neither"):
        load_adapter(tiny_model(), tmp_path)
    with pytest.raises(ModelFileError, match="there is no such folder"):
        Acceleration(adapter=tmp_path / "nowhere").record()


def test_a_manifest_tells_an_adapter_by_its_content(tmp_path):
    (tmp_path / "adapter_config.json").write_text("{}")
    chosen = Acceleration(channels_last=True, adapter=tmp_path)
    told = json.loads(json.dumps(chosen.record()))
    assert Acceleration.of_record(told) == chosen and Acceleration.of_record({}) == Acceleration()
    assert replace(chosen, adapter=None).record() == {"channels_last": True}
    (tmp_path / "adapter_config.json").write_text("{ }")
    with pytest.raises(ModelFileError, match="not those of the run"):
        Acceleration.of_record(told)


# ---- Start-up -----------------------------------------------------------------------------------


def test_a_sampler_loads_no_library_that_only_others_need():
    code = (
        "import sys; from mm_interleaved.generation.schedulers import build_scheduler; "
        "build_scheduler('ddim', {}); print('diffusers.schedulers.scheduling_unipc_multistep' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "False\n"
