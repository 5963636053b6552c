"""A saved model comes back as it was, in every way that transformers loads; a damaged one does not."""

import json
import shutil
import struct
import time
from copy import deepcopy
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModel, AutoProcessor

from mm_interleaved import devices, register
from mm_interleaved.checkpoint.load import load_model
from mm_interleaved.errors import ModelFileError, UsageError
from mm_interleaved.generation.loading import load_generator
from mm_interleaved.model_files.headers import tensor_headers
from mm_interleaved.model_files.resolve import find_model
from mm_interleaved.models.build import build_vision_tower
from mm_interleaved.models.config import MMInterleavedConfig
from mm_interleaved.models.denoising import DiffusionNoise
from mm_interleaved.models.interleaved import MMInterleavedForConditionalGeneration
from mm_interleaved.models.targets import TrainingTargets
from mm_interleaved.models.transformers_versions import checkpointing_enable
from mm_interleaved.tokens.processor import MMInterleavedProcessor
from tiny import BOS, image_ids, tiny_config, tiny_model, tiny_processor

PARTLY_ON_DISK = {
    "vision": "cpu", "language_model": "disk", "text_head": "cpu", "image_start_embedding": "cpu",
    "context_projection": "disk", "image_decoder.resampler": "cpu", "image_decoder.vae": "cpu",
    "image_decoder.unet": "disk", "image_decoder.synchronizers": "disk",
    "image_decoder.negative_conditioning": "cpu",
}  # fmt: skip


@pytest.fixture(scope="module")
def model():
    return tiny_model()


@pytest.fixture(scope="module")
def saved(model, tmp_path_factory):
    folder = tmp_path_factory.mktemp("saved") / "model"
    model.save_pretrained(folder)
    return folder


@pytest.fixture
def damaged(saved, tmp_path):
    """A copy of the folder, to be damaged."""
    return Path(shutil.copytree(saved, tmp_path / "damaged"))


def one_batch(model):
    """Inputs of one row with one image to be seen and painted, all randomness fixed."""
    ids = [BOS, 7, 8, *image_ids(model.config), 9, 10]
    generator = torch.Generator().manual_seed(3)
    noise = torch.randn(2, 1, 4, 8, 8, generator=generator, dtype=torch.float32).to(model.dtype)
    pixels = torch.rand(1, 3, 32, 32, generator=generator)
    is_text = torch.tensor([[id < 298 for id in ids]])
    return {
        "input_ids": torch.tensor([ids]),
        "image_start": torch.tensor([[3]]),
        "pixel_values": pixels,
        "target_pixel_values": pixels,
        "text_target": is_text,
        "targets": TrainingTargets(
            noise=DiffusionNoise(torch.tensor([40]), noise[0], noise[1], torch.zeros(1, dtype=torch.bool))
        ),
    }


def same_tensors(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


# ---- Whole models ----


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_what_was_saved_is_what_is_loaded(model, dtype, tmp_path):
    kind = getattr(torch, dtype)
    expected = {name: tensor.to(kind) for name, tensor in model.state_dict().items()}
    deepcopy(model).to(kind).save_pretrained(tmp_path)
    assert same_tensors(load_file(tmp_path / "model.safetensors"), expected)
    assert same_tensors(load_model(tmp_path).state_dict(), expected)


def test_buffers_that_no_file_holds_are_right_after_loading(model, saved):
    loaded = dict(load_model(saved).named_buffers())
    for name, buffer in model.named_buffers():
        torch.testing.assert_close(loaded[name], buffer, rtol=0, atol=0, msg=name)


@torch.no_grad()
@pytest.mark.parametrize(
    "device_map",
    ["auto", "cpu", PARTLY_ON_DISK],
    ids=["auto", "one device", "partly on disk"],
)
def test_a_model_spread_over_devices_computes_the_same(model, saved, device_map, tmp_path):
    loaded = load_model(saved, dtype="float32", device_map=device_map, offload_folder=str(tmp_path))
    batch = one_batch(model)
    expected, found = model(**batch), loaded(**batch)
    torch.testing.assert_close(found.logits, expected.logits, rtol=0, atol=1e-5)
    torch.testing.assert_close(found.image_loss, expected.image_loss, rtol=0, atol=1e-5)


def test_a_model_in_many_shards_is_the_same_model(model, tmp_path):
    model.save_pretrained(tmp_path, max_shard_size="100KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 3
    assert same_tensors(load_model(tmp_path).state_dict(), model.state_dict())


def test_a_configuration_is_the_same_after_loading(model, saved):
    loaded = MMInterleavedConfig.from_pretrained(saved)
    assert loaded.to_json_string() == model.config.to_json_string()


def test_the_auto_classes_know_the_model(model, saved, tmp_path):
    register()
    folder = Path(shutil.copytree(saved, tmp_path / "model"))
    tiny_processor(model.config).save_pretrained(folder)
    assert isinstance(AutoConfig.from_pretrained(folder), MMInterleavedConfig)
    assert isinstance(AutoModel.from_pretrained(folder), MMInterleavedForConditionalGeneration)
    assert isinstance(AutoProcessor.from_pretrained(folder), MMInterleavedProcessor)
    register()  # any number of times


def test_a_pass_leaves_its_inputs_alone(model):
    batch = one_batch(model)
    before = {name: value.clone() for name, value in batch.items() if isinstance(value, torch.Tensor)}
    model(**batch).loss.backward()
    model.zero_grad()
    assert all(torch.equal(batch[name], value) for name, value in before.items())


# ---- Number formats and names ----


@pytest.fixture
def half(model, tmp_path):
    """A folder of the model in float16, as shipped models are."""
    deepcopy(model).half().save_pretrained(tmp_path / "half")
    return tmp_path / "half"


def has_units(monkeypatch, *names):
    monkeypatch.delenv("ONEDNN_MAX_CPU_ISA", raising=False)
    monkeypatch.setattr(devices, "cpu_capabilities", lambda: dict.fromkeys(names, True))


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is fast in float16")
@pytest.mark.parametrize("asked", [{}, {"dtype": "auto"}, {"torch_dtype": "auto"}, {"device_map": "cpu"}])
@pytest.mark.parametrize("load", [MMInterleavedForConditionalGeneration, AutoModel])
def test_from_pretrained_takes_what_the_device_is_fast_in_and_says_so(half, asked, load, monkeypatch, caplog):
    has_units(monkeypatch)
    assert load.from_pretrained(half, **asked).dtype == torch.float32
    [record] = [r for r in caplog.records if r.name.startswith("mm_interleaved")]
    assert "weights saved in float16 are kept in float32" in record.message
    caplog.clear()
    has_units(monkeypatch, "avx512_fp16")
    assert load.from_pretrained(half, **asked).dtype == torch.float16
    assert not [r for r in caplog.records if r.name.startswith("mm_interleaved")]


@pytest.mark.parametrize("dtype", ["float16", torch.float16, "bfloat16", torch.float32, "float64"])
def test_a_dtype_that_is_named_is_used_with_a_word_where_it_is_slow(half, dtype, monkeypatch, caplog):
    has_units(monkeypatch)
    name = str(dtype).removeprefix("torch.")
    loaded = MMInterleavedForConditionalGeneration.from_pretrained(half, dtype=dtype, device_map="cpu")
    assert loaded.dtype == getattr(torch, name)
    slow = [r.message for r in caplog.records if "is slow here" in r.message]
    assert len(slow) == (name in ("float16", "bfloat16"))


def test_what_is_no_dtype_is_refused(half):
    for wrong in ("float17", "Tensor", 7):
        with pytest.raises(UsageError, match="dtype: expected a floating-point type of torch"):
            MMInterleavedForConditionalGeneration.from_pretrained(half, dtype=wrong)
    with pytest.raises(UsageError, match="dtype: expected auto, float32, bfloat16, float16, found 'fp16'"):
        load_generator("storyworld", dtype="fp16")


def test_a_shipped_model_has_a_name_wherever_a_folder_is_taken(tmp_path, monkeypatch):
    shipped = find_model("storyworld")
    monkeypatch.chdir(tmp_path)
    loaded = MMInterleavedForConditionalGeneration.from_pretrained("storyworld", device_map="cpu")
    assert same_tensors(loaded.state_dict(), load_model(shipped, dtype=loaded.dtype).state_dict())
    processor = MMInterleavedProcessor.from_pretrained("storyworld")
    assert processor.to_dict() == MMInterleavedProcessor.from_pretrained(shipped).to_dict()
    config = MMInterleavedConfig.from_pretrained("storyworld")
    assert config.to_dict() == MMInterleavedConfig.from_pretrained(shipped).to_dict()
    assert load_generator("storyworld").model.num_parameters() == loaded.num_parameters()
    # A path is a path, also where it is spelt like a name.
    for load in (load_generator, MMInterleavedForConditionalGeneration.from_pretrained):
        with pytest.raises(ModelFileError, match=r"model 'storyworld': no config\.json"):
            load(Path("storyworld"))


def offline(*arguments, **settings):
    raise ConnectionError("no network")


@pytest.mark.parametrize(
    "load",
    [
        MMInterleavedForConditionalGeneration.from_pretrained,
        MMInterleavedProcessor.from_pretrained,
        MMInterleavedConfig.from_pretrained,
        load_generator,
        find_model,
    ],
)
@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("storyworl", "no such folder.*did you mean 'storyworld'.*not a hub id"),
        ("somebody/something", "not in the hub cache .*, and huggingface.co gave ConnectionError"),
        ("", "not a hub id"),
        ("a\0b", "not a hub id"),
        ("x" * 5000, "not a hub id"),
    ],
)
def test_a_name_of_nothing_is_refused_at_once(load, name, message, monkeypatch):
    monkeypatch.setattr("huggingface_hub.HfApi.model_info", offline)
    begun = time.monotonic()
    with pytest.raises(ModelFileError, match=message) as raised:
        load(name)
    assert "\n" not in str(raised.value) and time.monotonic() - begun < 5


# ---- Training aids of the libraries ----


def gradients(model):
    model.zero_grad()
    model(**one_batch(model)).loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def test_gradient_checkpointing_changes_no_gradient():
    model = tiny_model().train()
    expected = gradients(model)
    checkpointing_enable(model)({"use_reentrant": False})
    name = "is_activation_checkpointing"
    assert getattr(model, name if hasattr(type(model), name) else "is_gradient_checkpointing")
    found = gradients(model)
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-5, atol=1e-6, msg=name)
    # Through the features, which the layers get as an argument on the side.
    assert any(g.any() for name, g in found.items() if name.startswith("vision.adapter"))


def test_gradient_checkpointing_runs_the_layers_again():
    model = tiny_model().train()
    checkpointing_enable(model)({"use_reentrant": False})
    layer, calls = model.language_model.layers[0], []
    layer.self_attn.register_forward_hook(lambda *_: calls.append(1))
    gradients(model)
    assert len(calls) == 2


def test_lora_trains_the_language_model_alone_and_merges_into_it(saved, tmp_path):
    peft = pytest.importorskip("peft")
    model = load_model(saved)
    batch = one_batch(model)
    with torch.no_grad():
        before = model(**batch).logits
    settings = peft.LoraConfig(r=2, target_modules=r"language_model\.layers\.\d+\.self_attn\.(q|v)_proj")
    tuned = peft.get_peft_model(model, settings)
    with torch.no_grad():
        assert torch.equal(tuned(**batch).logits, before)  # it starts as no change
    trained = [name for name, p in tuned.named_parameters() if p.requires_grad]
    assert trained and all("language_model" in name and "lora" in name for name in trained)
    tuned(**batch).loss.backward()
    with torch.no_grad():
        for name, parameter in tuned.named_parameters():
            if parameter.requires_grad:
                assert parameter.grad is not None, name
                parameter += 0.1
        after = tuned(**batch).logits
    assert not torch.allclose(after, before)
    tuned.save_pretrained(tmp_path)
    again = peft.PeftModel.from_pretrained(load_model(saved), tmp_path)
    with torch.no_grad():
        torch.testing.assert_close(again(**batch).logits, after, rtol=0, atol=1e-6)
        torch.testing.assert_close(again.merge_and_unload()(**batch).logits, after, rtol=0, atol=1e-5)


@pytest.mark.quantize
def test_an_int8_model_runs(saved):
    from torchao.quantization import Int8WeightOnlyConfig
    from transformers import TorchAoConfig

    settings = TorchAoConfig(
        Int8WeightOnlyConfig(), modules_to_not_convert=[r".*synchronizer.*", "text_head"]
    )
    model = load_model(saved, quantization_config=settings)
    with torch.no_grad():
        assert model(**one_batch(model)).logits.isfinite().all()


# ---- Fresh weights where a file has none ----


def test_what_a_file_lacks_starts_as_new_and_the_rest_stays(damaged, model):
    weights = load_file(damaged / "model.safetensors")
    fresh = ("synchronizer", "spatial_prior", "injector.attention", "resampler.layers.0", "text_head",
             "negative_conditioning")  # fmt: skip
    kept = {name: tensor for name, tensor in weights.items() if not any(part in name for part in fresh)}
    save_file(kept, damaged / "model.safetensors", metadata={"format": "pt"})
    patterns = [f"*{part}*" for part in fresh]
    loaded = load_model(damaged, allow_missing=patterns).state_dict()
    assert same_tensors({name: loaded[name] for name in kept}, kept)
    assert all(tensor.isfinite().all() for tensor in loaded.values())

    torch.manual_seed(0)
    new = MMInterleavedForConditionalGeneration(model.config).state_dict()
    for name, tensor in loaded.items():
        if name in kept:
            continue
        # A new model's constants are the loaded one's; its random numbers are of the same size.
        on_rays = "injector" in name and name.endswith("sampling_offsets.bias")
        if new[name].unique().numel() == 1 or "position_table" in name or on_rays:
            assert torch.equal(tensor, new[name]), name
        else:
            assert tensor.abs().max() <= 3 * new[name].abs().max() + 1e-3, name
    gates = [tensor for name, tensor in loaded.items() if name.endswith(".gate")]
    assert gates and not any(gate.any() for gate in gates)
    assert (loaded["text_head.base.bias"][-2:] == -100).all() and (loaded["text_head.new.bias"] == 95).all()


# ---- Damaged folders ----


def refused(folder, message):
    with pytest.raises(ModelFileError, match=message) as raised:
        load_model(folder)
    assert "\n" not in str(raised.value)


def test_missing_left_over_and_misshapen_tensors_are_named(damaged):
    weights = load_file(damaged / "model.safetensors")
    weights["another.name"] = weights.pop("image_start_embedding")
    weights["text_head.new.bias"] = torch.zeros(3)
    save_file(weights, damaged / "model.safetensors", metadata={"format": "pt"})
    refused(
        damaged,
        r"1 missing tensors: image_start_embedding; 1 unexpected tensors: another\.name; "
        r"1 misshapen tensors: text_head\.new\.bias \(expected \(2,\), found \(3,\)\)",
    )


def test_a_model_is_built_once_and_refused_before_a_weight_is_read(damaged, monkeypatch):
    built = []

    def build(config):
        built.append(torch.empty(0).device.type)
        return build_vision_tower(config)

    monkeypatch.setattr("mm_interleaved.models.interleaved.build_vision_tower", build)
    load_model(damaged)
    assert built == ["meta"]
    weights = load_file(damaged / "model.safetensors")
    weights["another.name"] = weights.pop("image_start_embedding")
    save_file(weights, damaged / "model.safetensors", metadata={"format": "pt"})

    def read(*arguments):
        raise AssertionError("weights are read")

    monkeypatch.setattr(MMInterleavedForConditionalGeneration, "_load_pretrained_model", read)
    refused(damaged, "1 missing tensors: image_start_embedding")


def test_a_vocabulary_of_another_size_is_named(damaged):
    config = json.loads((damaged / "config.json").read_text())
    config["text_config"]["vocab_size"] += 2
    (damaged / "config.json").write_text(json.dumps(config))
    refused(damaged, r"embed_tokens\.weight \(expected \(302, 32\), found \(300, 32\)\)")


def test_a_cut_file_is_refused_with_its_name_at_any_length(damaged):
    path = damaged / "model.safetensors"
    whole = path.read_bytes()
    header = 8 + struct.unpack("<Q", whole[:8])[0]
    for length in (0, 1, 7, 8, 9, header - 1, header, header + 1, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:length])
        with pytest.raises(ModelFileError, match=r"model\.safetensors: "):
            tensor_headers(damaged)
    refused(damaged, r"model\.safetensors: \d+ bytes, its header states \d+")


def test_a_header_that_lies_is_refused(damaged):
    path = damaged / "model.safetensors"
    entry = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}
    for header, data in (
        ({"a": entry, "b": entry}, b"\0" * 8),  # overlapping
        ({"a": entry | {"data_offsets": [4, 12]}}, b"\0" * 12),  # a hole
        ({"a": entry | {"shape": [3]}}, b"\0" * 8),
        ({"a": entry | {"shape": "x"}}, b"\0" * 8),
        ({"a": {"dtype": "F32"}}, b"\0" * 8),
        (["a"], b""),
        ({}, b"trailing"),
    ):
        text = json.dumps(header).encode()
        path.write_bytes(struct.pack("<Q", len(text)) + text + data)
        with pytest.raises(ModelFileError, match=r"model\.safetensors: "):
            tensor_headers(damaged)
    path.write_bytes(struct.pack("<Q", 2**60) + b"{}")
    with pytest.raises(ModelFileError, match="it is cut or damaged"):
        tensor_headers(damaged)
    empty = b'"a":{"dtype":"F32","shape":[0],"data_offsets":[0,0]}'
    twice = b"{" + empty + b"," + empty + b"}"
    path.write_bytes(struct.pack("<Q", len(twice)) + twice)
    with pytest.raises(ModelFileError, match="its header is damaged"):
        tensor_headers(damaged)


def test_a_missing_shard_or_one_elsewhere_is_refused(model, tmp_path):
    model.save_pretrained(tmp_path / "model", max_shard_size="100KB")
    index = tmp_path / "model" / "model.safetensors.index.json"
    shard = sorted((tmp_path / "model").glob("*.safetensors"))[1]
    shard.rename(tmp_path / shard.name)
    refused(tmp_path / "model", f"{shard.name}: cannot be read")
    index.write_text(index.read_text().replace(f'"{shard.name}"', f'"../{shard.name}"'))
    refused(tmp_path / "model", "expected a file in the same folder")


def test_what_is_no_model_of_ours_is_refused(damaged, tmp_path):
    refused(tmp_path / "nowhere", r"config\.json: cannot be read")
    config = json.loads((damaged / "config.json").read_text())
    for settings, message in (
        (config | {"model_type": "llama"}, "model_type 'llama', expected 'mm_interleaved'"),
        (config | {"auto_map": {"AutoModel": "code.Model"}}, "code of its own"),
        (config | {"context_images": "none"}, "context_images must be one of"),
        (config | {"text_config": {"model_type": "gpt2"}}, "'gpt2' does not fit"),
    ):
        (damaged / "config.json").write_text(json.dumps(settings))
        refused(damaged, message)
    (damaged / "config.json").write_text("{")
    refused(damaged, "not JSON")
    (damaged / "config.json").write_text(json.dumps(config))
    (damaged / "model.safetensors").unlink()
    refused(damaged, r"holds no \*\.safetensors")


def test_a_pickle_beside_the_weights_is_never_read(damaged):
    (damaged / "pytorch_model.bin").write_bytes(b"cos\nsystem\n(S'exit'\ntR.")
    load_model(damaged)
    (damaged / "model.safetensors").unlink()
    refused(damaged, r"holds no \*\.safetensors")


def test_a_tied_language_model_is_untied_here(tmp_path):
    text = tiny_config().text_config.to_dict() | {"tie_word_embeddings": True}
    model = tiny_model(text_config=text)
    model.save_pretrained(tmp_path)
    assert same_tensors(load_model(tmp_path).state_dict(), model.state_dict())
