"""The official checkpoint: read from any of its forms, converted, written back; anything odd is refused."""

import copy
import errno
import json
import shutil
from collections import OrderedDict
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from by_ids import document_starts
from mm_interleaved.checkpoint import convert as conversion
from mm_interleaved.checkpoint import shard_writer
from mm_interleaved.checkpoint.convert import convert_checkpoint, dry_run, export_official, refuse_misfit
from mm_interleaved.checkpoint.key_map import DERIVED_POSITION_IDS, our_key
from mm_interleaved.checkpoint.load import load_model
from mm_interleaved.checkpoint.official_files import HASHES, open_checkpoint
from mm_interleaved.checkpoint.released_config import RELEASED, official_settings, released_config
from mm_interleaved.errors import ModelFileError, StorageError, UsageError
from mm_interleaved.models.config import MMInterleavedConfig
from mm_interleaved.models.interleaved import MMInterleavedForConditionalGeneration
from mm_interleaved.tokens.processor import MMInterleavedProcessor
from tiny import image_ids

MANIFEST = Path(__file__).parents[4] / "shared" / "reference" / "manifest.json"
VOCAB_SIZE = 340  # of the tokenizer in conftest


def tiny_settings():
    """The released numbers with tiny parts."""
    settings = copy.deepcopy(RELEASED)
    settings["llm"] |= {
        "vocab_size": VOCAB_SIZE, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
        "num_attention_heads": 4, "max_position_embeddings": 64,
    }  # fmt: skip
    settings["clip"] |= {
        "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 4, "num_attention_heads": 2,
        "image_size": 32, "patch_size": 8,
    }  # fmt: skip
    settings["unet"] |= {
        "sample_size": 8, "block_out_channels": [8, 8, 8, 8], "attention_head_dim": [1, 1, 1, 1],
        "cross_attention_dim": 16, "norm_num_groups": 4, "layers_per_block": 1,
    }  # fmt: skip
    settings["vae"] |= {
        "sample_size": 64, "block_out_channels": [4, 4, 4, 4], "norm_num_groups": 2, "layers_per_block": 1,
    }  # fmt: skip
    model = settings["model"]
    model |= {"num_img_token": 3, "txt_vocab_size": VOCAB_SIZE + 2, "image_embed_dim": 16}
    model["special_token_dict"] |= {
        "pad_token_id": VOCAB_SIZE - 1, "soi_token_id": VOCAB_SIZE, "image_token_id": VOCAB_SIZE + 1,
    }  # fmt: skip
    perceiver = {"num_queries": 3, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    model["visual_tokenizer_config"]["perceiver_config"] |= perceiver | {"intermediate_size": 24}
    decoder = model["image_decoder_config"]
    decoder |= {"image_size": 64, "seq_len": 4}
    decoder["perceiver_config"] |= perceiver | {
        "num_queries": 4,
        "num_hidden_layers": 1,
        "intermediate_size": 24,
    }
    return settings


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    model = MMInterleavedForConditionalGeneration(released_config(**tiny_settings())).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if not parameter.any():
                parameter.normal_(std=0.2)
    return model


@pytest.fixture(scope="module")
def ours(model, tmp_path_factory):
    """Our folder."""
    folder = tmp_path_factory.mktemp("ours") / "model"
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def official(ours, tmp_path_factory):
    """The official folder: one file, with its settings."""
    folder = tmp_path_factory.mktemp("official") / "released"
    export_official(ours, folder)
    return folder


@pytest.fixture
def damaged(official, tmp_path):
    """A copy of the official folder, to be damaged."""
    return Path(shutil.copytree(official, tmp_path / "damaged"))


@pytest.fixture(scope="module")
def components(tmp_path_factory, llama_tokenizer):
    """The stock parts, under the names of the Hugging Face hub."""
    root, settings = tmp_path_factory.mktemp("components"), tiny_settings()

    def write(path, content):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(content))

    vicuna = root / "lmsys" / "vicuna-13b-v1.3"
    write(vicuna / "config.json", settings["llm"] | {
        "model_type": "llama", "architectures": ["LlamaForCausalLM"], "torch_dtype": "float16",
        "transformers_version": "4.28.1", "use_cache": True, "_name_or_path": "x",
    })  # fmt: skip
    llama_tokenizer.save_pretrained(vicuna)
    clip = {
        "model_type": "clip",
        "vision_config": settings["clip"] | {"model_type": "clip_vision_model", "top_k": 50},
    }
    write(root / "openai" / "clip-vit-large-patch14" / "config.json", clip)
    pipeline = root / "stabilityai" / "stable-diffusion-2-1-base"
    write(pipeline / "model_index.json", {"_class_name": "StableDiffusionPipeline"})
    write(pipeline / "unet" / "config.json", settings["unet"] | {"_class_name": "UNet2DConditionModel"})
    write(pipeline / "vae" / "config.json", settings["vae"] | {"_class_name": "AutoencoderKL"})
    write(pipeline / "safety_checker" / "config.json", {"model_type": "clip", "vision_config": {}})
    write(
        pipeline / "scheduler" / "scheduler_config.json",
        settings["scheduler"] | {"_class_name": "PNDMScheduler", "skip_prk_steps": True},
    )
    return root


def equal(a, b):
    return a.keys() == b.keys() and all(a[k].dtype == b[k].dtype and torch.equal(a[k], b[k]) for k in a)


# ---- Names ----


@pytest.mark.skipif(not MANIFEST.is_file(), reason="needs the manifest of the full-size model")
def test_every_key_of_the_full_size_model_is_mapped():
    report = dry_run(MANIFEST)
    assert str(report) == f"mapped {report.total} of {report.total}" and report.fits
    assert report.total == json.loads(MANIFEST.read_text())["num_keys"]


@pytest.mark.skipif(not MANIFEST.is_file(), reason="needs the manifest of the full-size model")
def test_without_components_the_released_numbers_are_those_of_the_manifest():
    manifest = json.loads(MANIFEST.read_text())
    assert (
        conversion._config_of_manifest(MANIFEST, manifest).to_dict() == released_config(**RELEASED).to_dict()
    )


def test_a_dry_run_reads_files_folders_and_indices(official, ours, tmp_path, components):
    count = len(load_file(official / "model.safetensors"))
    assert (
        str(dry_run(official)) == str(dry_run(official / "model.safetensors")) == f"mapped {count} of {count}"
    )
    names = load_file(official / "model.safetensors").keys()
    index = tmp_path / "pytorch_model.bin.index.json"
    index.write_text(json.dumps({"weight_map": dict.fromkeys(names, "pytorch_model-00001-of-00002.bin")}))
    shutil.copy(official / "config.json", tmp_path)
    assert dry_run(index).mapped == count  # names alone: the shards are not here


def test_a_dry_run_names_what_does_not_fit(damaged):
    weights = load_file(damaged / "model.safetensors")
    weights["a.new.key"] = weights.pop("soi_token")
    weights["text_decoder.head.bias"] = torch.zeros(7)
    save_file(weights, damaged / "model.safetensors")
    report = dry_run(damaged)
    assert str(report).splitlines() == [
        "missing: soi_token",
        "unexpected: a.new.key",
        f"misshapen: text_decoder.head.bias: expected ({VOCAB_SIZE + 2},), found (7,)",
        f"mapped {len(weights) - 2} of {len(weights)}",
    ]
    with pytest.raises(
        ModelFileError, match=r"1 missing tensors: soi_token; 1 unexpected tensors: a\.new\.key"
    ):
        refuse_misfit(report, damaged)


def test_settings_lead_to_the_same_model_and_back(model):
    again = released_config(**official_settings(model.config))
    assert again.to_dict() == model.config.to_dict() | {"dtype": None, "architectures": None}


# ---- There and back ----


def test_both_directions_round_trip_to_the_bit(model, official, tmp_path):
    convert_checkpoint(official, tmp_path / "ours")
    assert equal(load_model(tmp_path / "ours").state_dict(), model.state_dict())
    export_official(tmp_path / "ours", tmp_path / "back")
    weights = load_file(official / "model.safetensors")
    assert equal(load_file(tmp_path / "back" / "model.safetensors"), weights)
    assert DERIVED_POSITION_IDS in weights


@pytest.mark.parametrize("kind", ["bin", "safetensors"])
@pytest.mark.parametrize("has_index", [True, False])
def test_shards_of_both_kinds_with_and_without_index(model, ours, tmp_path, kind, has_index):
    export_official(ours, tmp_path / "official", kind=kind, max_shard_bytes=700_000)
    shards = sorted((tmp_path / "official").glob(f"*.{kind}"))
    assert len(shards) > 2
    if not has_index:
        next((tmp_path / "official").glob("*.index.json")).unlink()
    (tmp_path / "official" / "training_args.bin").write_bytes(b"no weights")
    convert_checkpoint(tmp_path / "official", tmp_path / "ours", max_shard_bytes=500_000)
    written = sorted((tmp_path / "ours").glob("*.safetensors"))
    assert len(written) > len(shards)
    assert equal(load_model(tmp_path / "ours").state_dict(), model.state_dict())


@torch.no_grad()
def test_a_converted_model_computes_the_same(model, official, tmp_path):
    convert_checkpoint(official, tmp_path / "ours", max_shard_bytes=500_000)
    converted = MMInterleavedForConditionalGeneration.from_pretrained(
        tmp_path / "ours", dtype=torch.float32, device_map="auto"
    ).eval()
    ids = torch.tensor([[1, 5, *image_ids(model.config), 6, 7]])
    inputs = {"pixel_values": torch.rand(1, 3, 32, 32), "image_start": torch.tensor([[2]])}
    expected = model(ids, **inputs).logits
    torch.testing.assert_close(converted(ids, **inputs).logits, expected, rtol=0, atol=1e-5)


@torch.no_grad()
def test_a_golden_checkpoint_gives_the_golden_logits(tmp_path):
    golden = (
        MANIFEST.parent / "golden-a"
    )  # the subset that the project carries holds only some of the weights
    if not golden.is_dir():
        pytest.skip(f"needs {golden}")
    convert_checkpoint(golden, tmp_path / "ours", max_shard_bytes=3_000_000)
    converted = load_model(tmp_path / "ours")
    inputs, outputs = load_file(golden / "inputs.safetensors"), load_file(golden / "outputs.safetensors")
    ids, mask = inputs["forward.text_ids"], inputs["forward.attention_mask"]
    starts = [(row == converted.config.image_start_token_id).nonzero()[:, 0] for row in ids]
    result = converted(
        ids,
        attention_mask=mask,
        document_start=document_starts(ids, converted.config.bos_token_id),
        image_start=torch.nn.utils.rnn.pad_sequence(starts, batch_first=True, padding_value=-1),
        pixel_values=inputs["forward.image_tensors_u8"].float() / 255,
    )
    expected, valid = outputs["forward.text_logits"], mask.bool()
    tolerance = json.loads((golden / "tolerances.json").read_text())["forward.text_logits"]["suggested_atol"]
    torch.testing.assert_close(result.logits[valid], expected[valid], rtol=0, atol=tolerance)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_weights_may_be_stored_in_another_dtype(official, tmp_path, dtype):
    convert_checkpoint(official, tmp_path / "ours", dtype=dtype)
    weights = load_file(tmp_path / "ours" / "model.safetensors")
    assert {tensor.dtype for tensor in weights.values()} == {getattr(torch, dtype)}
    assert load_model(tmp_path / "ours").dtype == getattr(torch, dtype)  # "auto": as saved
    assert load_model(tmp_path / "ours", dtype="float32").dtype == torch.float32


@torch.no_grad()
def test_another_input_resolution_equals_resizing_at_run_time(model, official, tmp_path):
    convert_checkpoint(official, tmp_path / "ours", image_size=64)
    converted = load_model(tmp_path / "ours")
    assert converted.config.vision_config.image_size == 64
    pixels = torch.rand(1, 3, 64, 64)
    for found, expected in zip(
        [converted.encode_images(pixels).slots, *converted.encode_images(pixels).pyramid],
        [model.encode_images(pixels).slots, *model.encode_images(pixels).pyramid],
        strict=True,
    ):
        torch.testing.assert_close(found, expected, rtol=0, atol=2e-5)
    with pytest.raises(UsageError, match="multiple of 16"):
        convert_checkpoint(official, tmp_path / "other", image_size=40)


def test_components_bring_the_sizes_and_the_tokenizer(model, official, components, tmp_path):
    # Only what no component says stands beside the weights: the arguments of the official model.
    folder = tmp_path / "official"
    folder.mkdir()
    shutil.copy(official / "model.safetensors", folder)
    (folder / "config.json").write_text(json.dumps({"model": tiny_settings()["model"]}))
    convert_checkpoint(folder, tmp_path / "ours", components=components)
    converted = load_model(tmp_path / "ours")
    assert equal(converted.state_dict(), model.state_dict())
    processor = MMInterleavedProcessor.from_pretrained(tmp_path / "ours")
    assert processor.vocabulary.special_ids() == {
        "image_start": VOCAB_SIZE, "image": VOCAB_SIZE + 1, "bos": 1, "eos": 2, "pad": VOCAB_SIZE - 1,
    }  # fmt: skip
    assert (processor.encoder_pixels.size, processor.target_pixels.size) == (32, 64)
    assert (
        processor.vocabulary.decode(processor.vocabulary.encode_text("Pip finds a lamp."))
        == "Pip finds a lamp."
    )


def test_a_tokenizer_of_another_vocabulary_is_refused_with_both_ids(official, components, tmp_path):
    with pytest.raises(ModelFileError, match="the tokenizer has the ids"):
        other = Path(shutil.copytree(components, tmp_path / "components"))
        path = other / "lmsys" / "vicuna-13b-v1.3" / "config.json"
        settings = json.loads(path.read_text()) | {"vocab_size": VOCAB_SIZE + 5}
        path.write_text(json.dumps(settings))
        parts = conversion.find_components(other)
        conversion._processor(conversion._official_config(tmp_path, parts), parts)


def test_components_that_are_missing_or_double_are_refused(components, tmp_path):
    with pytest.raises(ModelFileError, match="there is no such folder"):
        conversion.find_components(tmp_path / "nowhere")
    with pytest.raises(ModelFileError, match=r"holds no config\.json"):
        conversion.find_components(tmp_path)
    both = Path(shutil.copytree(components, tmp_path / "both"))
    shutil.copytree(both / "lmsys", both / "again")
    with pytest.raises(ModelFileError, match="two parts of the kind llm"):
        conversion.find_components(both)


# ---- Refusals ----


def refused(folder, tmp_path, message, error=ModelFileError, **settings):
    """Converting is refused with that message, in one line, and leaves nothing behind."""
    out = tmp_path / "out"
    with pytest.raises(error, match=message) as raised:
        convert_checkpoint(folder, out, **settings)
    assert "\n" not in str(raised.value)
    assert not out.exists() and not [path for path in tmp_path.iterdir() if path.name.startswith(".tmp")]


class Payload:
    """Code that a pickle would run."""

    def __init__(self, canary):
        self.canary = canary

    def __reduce__(self):
        return (Path.touch, (self.canary,))


@pytest.mark.parametrize("wrap", [dict, OrderedDict, list])
def test_pickled_code_is_refused_and_never_run(tmp_path, wrap):
    folder, canary = tmp_path / "official", tmp_path / "canary"
    folder.mkdir()
    items = [("soi_token", torch.zeros(1, 32)), ("x", Payload(canary))]
    torch.save(wrap(items), folder / "pytorch_model.bin")
    refused(folder, tmp_path, "pytorch_model.bin: refused, since it holds pickled objects")
    with pytest.raises(ModelFileError, match="refused"):
        dry_run(folder)
    assert not canary.exists()


def test_a_pickle_of_something_else_is_refused(tmp_path):
    for content, message in (([1, 2], "holds list"), ({"module": {"a": torch.zeros(1)}}, "'module' is dict")):
        folder = tmp_path / message.split()[-1]
        folder.mkdir()
        torch.save(content, folder / "pytorch_model.bin")
        refused(folder, tmp_path, message)


@pytest.mark.parametrize("kind", ["bin", "safetensors"])
def test_a_cut_file_is_refused_with_its_name(ours, tmp_path, kind):
    folder = tmp_path / "official"
    export_official(ours, folder, kind=kind)
    [path] = folder.glob(f"*.{kind}")
    whole = path.read_bytes()
    for length in (0, 5, 100, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:length])
        refused(folder, tmp_path, path.name)
    path.write_bytes(whole + b"x" * 9)
    if kind == "safetensors":
        refused(folder, tmp_path, "the file is cut or damaged")


def test_an_index_may_not_lead_elsewhere_nor_lie(ours, tmp_path):
    folder = tmp_path / "official"
    export_official(ours, folder, max_shard_bytes=700_000)
    path = folder / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    name, shard = next(iter(index["weight_map"].items()))
    for wrong, message in (
        ("../model.safetensors", "expected a file in the same folder"),
        ("/etc/passwd", "expected a file in the same folder"),
        ("..\\\\a.safetensors", "expected a file in the same folder"),
        ("..", "expected a file in the same folder"),
        ("a\\u0000b", "expected a file in the same folder"),
        ("gone.safetensors", "there is no such shard"),
    ):
        path.write_text(json.dumps(index).replace(f'"{shard}"', f'"{wrong}"'))
        refused(folder, tmp_path, message)
    other = next(s for s in index["weight_map"].values() if s != shard)
    path.write_text(json.dumps({"weight_map": index["weight_map"] | {name: other}}))
    refused(folder, tmp_path, "expected in")
    path.write_text('{"weight_map": {}}')
    refused(folder, tmp_path, "no field weight_map")
    path.write_text('{"weight_map": {"a": "b", "a": "c"}}')
    refused(folder, tmp_path, "twice")
    path.unlink()
    (folder / shard).unlink()
    refused(folder, tmp_path, "shards, .* states")


def test_a_tensor_in_two_shards_is_refused(damaged, tmp_path):
    shutil.copy(damaged / "model.safetensors", damaged / "model-00001-of-00002.safetensors")
    shutil.move(damaged / "model.safetensors", damaged / "model-00002-of-00002.safetensors")
    refused(damaged, tmp_path, "which another shard holds")


def test_a_list_of_hashes_is_checked(damaged, tmp_path):
    import hashlib

    path = damaged / "model.safetensors"
    good = hashlib.sha256(path.read_bytes()).hexdigest()
    (damaged / HASHES).write_text(f"{good}  model.safetensors\n")
    assert len(open_checkpoint(damaged)) == 1
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    refused(damaged, tmp_path, "SHA-256")


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_no_numbers_are_refused_unless_allowed(damaged, tmp_path, value):
    weights = load_file(damaged / "model.safetensors")
    weights["mm_decoder.norm.weight"][3] = value
    save_file(weights, damaged / "model.safetensors")
    refused(damaged, tmp_path, r"mm_decoder\.norm\.weight holds NaN or infinite")
    convert_checkpoint(damaged, tmp_path / "out", allow_non_finite=True)


def test_a_matrix_of_zeros_is_named(damaged, tmp_path, caplog):
    weights = load_file(damaged / "model.safetensors")
    weights["mm_decoder.layers.1.mlp.up_proj.weight"].zero_()
    save_file(weights, damaged / "model.safetensors")
    convert_checkpoint(damaged, tmp_path / "out")
    assert "mm_decoder.layers.1.mlp.up_proj.weight is zero throughout" in caplog.text


def test_missing_and_left_over_weights_are_refused_by_name(damaged, tmp_path):
    weights = load_file(damaged / "model.safetensors")
    for name in [name for name in weights if ".llama_cross_attn." in name]:
        weights["renamed." + name] = weights.pop(name)
    save_file(weights, damaged / "model.safetensors")
    refused(
        damaged,
        tmp_path,
        r"missing tensors: mm_decoder\.layers\.0.* and \d+ more; .* unexpected tensors: ren",
    )


def test_what_is_no_checkpoint_is_refused(tmp_path):
    refused(tmp_path / "nowhere", tmp_path, "there is no such file or folder")
    empty = tmp_path / "empty"
    empty.mkdir()
    refused(empty, tmp_path, "holds neither")
    (tmp_path / "weights.pt").write_bytes(b"x")
    refused(tmp_path / "weights.pt", tmp_path, "is of type .pt")
    (empty / "config.json").write_text("{")
    with pytest.raises(ModelFileError, match="not JSON"):
        dry_run(empty / "config.json")


def test_wrong_settings_and_an_occupied_folder_are_refused(official, ours, tmp_path):
    with pytest.raises(UsageError, match="float8"):
        convert_checkpoint(official, tmp_path / "out", dtype="float8")
    with pytest.raises(UsageError, match="there already"):
        convert_checkpoint(official, ours)
    with pytest.raises(UsageError, match="expected safetensors or bin"):
        export_official(ours, tmp_path / "out", kind="pt")


def test_a_full_disk_leaves_nothing_behind(official, tmp_path, monkeypatch):
    calls = []

    def failing(tensors, path, metadata):
        calls.append(path)
        if len(calls) == 2:
            raise OSError(errno.ENOSPC, "No space left on device")
        save_file(tensors, path, metadata=metadata)

    monkeypatch.setattr(shard_writer, "save_file", failing)
    refused(official, tmp_path, "cannot be written", StorageError, max_shard_bytes=500_000)
    usage = shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr(conversion.shutil, "disk_usage", lambda path: usage)
    refused(official, tmp_path, "the disk is full", StorageError)


def test_a_model_of_another_shape_has_no_official_names(tmp_path):
    from tiny import tiny_model

    tiny_model().save_pretrained(tmp_path / "tiny")
    with pytest.raises(ModelFileError, match="not of the released shape"):
        export_official(tmp_path / "tiny", tmp_path / "out")


def test_memory_stays_near_one_shard(official, tmp_path, monkeypatch):
    held = []
    write = shard_writer.ShardWriter._write

    def watched(writer):
        held.append(sum(t.numel() * t.element_size() for t in writer._pending.values()))
        write(writer)

    monkeypatch.setattr(shard_writer.ShardWriter, "_write", watched)
    convert_checkpoint(official, tmp_path / "ours", max_shard_bytes=400_000)
    weights = load_file(official / "model.safetensors")
    largest = max(t.numel() * t.element_size() for t in weights.values())
    assert len(held) > 3 and max(held) <= max(400_000, largest)


def test_no_name_has_two_meanings(official):
    names = list(load_file(official / "model.safetensors"))
    mapped = [our_key(name) for name in names if name != DERIVED_POSITION_IDS]
    assert len(set(mapped)) == len(mapped)
    assert isinstance(released_config(**RELEASED), MMInterleavedConfig)
