"""Every field of a model's JSON files, damaged in many ways: the model works, or is refused in one sentence
that names file and field, before anything large is made.
"""

import json
import math
import shutil
from copy import deepcopy
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from mm_interleaved import Document, Text
from mm_interleaved.checkpoint.load import load_model, read_model_config
from mm_interleaved.cli.main import run
from mm_interleaved.documents.strict_json import FieldError
from mm_interleaved.errors import ModelFileError
from mm_interleaved.generation import InterleavedGenerator
from mm_interleaved.generation.defaults import generation_defaults
from mm_interleaved.generation.loading import load_generator
from mm_interleaved.model_files.config import read_config
from mm_interleaved.model_files.resolve import shipped_folder
from mm_interleaved.model_files.values import COUNTS, SIZES, check_object, fits
from mm_interleaved.tokens.processor import MMInterleavedProcessor
from tiny import tiny_config, tiny_model, tiny_processor

MISSING = object()
DAMAGES = {
    "null": None, "a text": "x", "a negative number": -1, "a huge number": 10**15, "a fraction": 0.5,
    "a list": [1, 2], "an object": {"a": 1}, "missing": MISSING,
}  # fmt: skip


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole")
    model = tiny_model()
    model.save_pretrained(folder)
    tiny_processor(model.config).save_pretrained(folder)
    return folder


@pytest.fixture
def folder(whole, tmp_path):
    """A copy of the model, to be damaged."""
    return Path(shutil.copytree(whole, tmp_path / "model"))


def paths(value, path=()):
    """Of every field of a JSON object, however deep."""
    for name, item in value.items():
        yield (*path, name)
        if isinstance(item, dict):
            yield from paths(item, (*path, name))


def damaged(settings, path, damage):
    settings = deepcopy(settings)
    *outer, name = path
    place = settings
    for each in outer:
        place = place[each]
    if damage is MISSING:
        del place[name]
    else:
        place[name] = damage
    return settings


def write(folder, name, settings):
    (folder / name).write_text(json.dumps(settings))


def shipped_config():
    return json.loads((shipped_folder("storyworld") / "config.json").read_text())


def is_one_sentence_about(error, name):
    return "\n" not in str(error) and name in str(error) and len(str(error)) < 2000


# ---- config.json ----


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_field_of_a_configuration_is_named_or_harmless(damage, tmp_path):
    settings = shipped_config()
    for path in paths(settings):
        if path[-1] == "_use_default_values":
            continue
        write(tmp_path, "config.json", damaged(settings, path, DAMAGES[damage]))
        for read in (read_config, read_model_config):
            try:
                read(tmp_path)
            except ModelFileError as error:
                assert is_one_sentence_about(error, "config.json"), path
                assert any(name in str(error) for name in path), (path, str(error))


WRONG = [
    ("vision_config.image_size", 1_000_000), ("vision_config.image_size", [32, 32]),
    ("vision_config.patch_size", 0), ("vision_config.hidden_act", "nothing"), ("vision_config", []),
    ("text_config.hidden_size", "192"), ("text_config.hidden_size", True), ("text_config.model_type", "gpt2"),
    ("text_config.model_type", 5), ("text_config.rms_norm_eps", -1e-6), ("text_config.vocab_size", 1e30),
    ("text_config.num_attention_heads", 5), ("text_config.num_hidden_layers", 10**6), ("text_config", None),
    ("text_config.rope_parameters", {"rope_type": "unheard"}), ("text_config.attention_dropout", 7),
    ("unet_config.block_out_channels", []), ("unet_config.block_out_channels", [8, "8", 16, 16]),
    ("unet_config.block_out_channels", [8, -8, 16, 16]), ("unet_config.down_block_types", ["Unheard"] * 4),
    ("unet_config.norm_num_groups", 3), ("unet_config.cross_attention_dim", 17), ("unet_config", "x"),
    ("unet_config.class_embed_type", "timestep"), ("vae_config", None), ("vae_config.latent_channels", 5),
    ("vae_config.scaling_factor", 0), ("vae_config.up_block_types", 3), ("scheduler_config", None),
    ("scheduler_config.beta_schedule", "unheard"), ("scheduler_config.num_train_timesteps", 10**12),
    ("scheduler_config.prediction_type", "unheard"), ("scheduler_config.beta_end", 10**6),
    ("adapter.num_interactions", 3), ("adapter.unheard", 1), ("adapter", None), ("slot_resampler.dim", 15),
    ("slot_resampler.num_heads", 0), ("slot_resampler", {}), ("conditioning_resampler", None),
    ("text_synchronizer.value_dim", 7), ("text_synchronizer.keep", "unheard"),
    ("image_synchronizer.levels", [9]), ("image_synchronizer.levels", "0"), ("image_token_id", 300),
    ("image_start_token_id", -1), ("eos_token_id", [1]), ("pad_token_id", None), ("num_new_tokens", -2),
    ("condition_dropout", 1.5), ("context_images", "none"), ("compat", "other"), ("image_loss_weight", -1),
    ("quantization_config", {"quant_method": "bitsandbytes", "load_in_4bit": True}),
]  # fmt: skip


@pytest.mark.parametrize(("field", "value"), WRONG, ids=[f"{name}={value}" for name, value in WRONG])
def test_what_is_no_model_is_refused_before_a_weight_is_read(field, value, folder, monkeypatch):
    def read(*arguments):
        raise AssertionError("weights are read")

    monkeypatch.setattr("transformers.PreTrainedModel._load_pretrained_model", read)
    path = tuple(field.split("."))
    write(folder, "config.json", damaged(json.loads((folder / "config.json").read_text()), path, value))
    with pytest.raises(ModelFileError) as raised:
        load_model(folder)
    assert is_one_sentence_about(raised.value, "config.json")
    assert path[-1] in str(raised.value) or path[0] in str(raised.value)


@pytest.mark.parametrize("command", ["info", "plan"])
@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("unet_config.block_out_channels", 5), ("vae_config.block_out_channels", ["x"]), ("vae_config", 3),
        ("image_synchronizer", {}), ("image_synchronizer.levels", [4]), ("text_synchronizer.levels", "x"),
        ("generation_settings", {"num_inference_steps": "x"}), ("text_config.hidden_size", MISSING),
        ("vision_config.patch_size", 0), ("conditioning_resampler.num_queries", None),
    ],
)  # fmt: skip
def test_a_command_that_only_reads_a_configuration_names_the_field(command, field, value, tmp_path, capsys):
    folder = Path(shutil.copytree(shipped_folder("storyworld"), tmp_path / "model"))
    path = tuple(field.split("."))
    write(folder, "config.json", damaged(shipped_config(), path, value))
    assert run([command, str(folder)]) == 4
    assert is_one_sentence_about(capsys.readouterr().err.strip(), "config.json: " + path[0])


@pytest.mark.parametrize("text", ["", "[", "[]", "null", '"x"', "{", '{"a": NaN}', "\ud800", "[" * 100_000])
@pytest.mark.parametrize("name", ["config.json", "processor_config.json", "tokenizer_config.json"])
def test_what_is_no_object_is_refused(name, text, folder):
    (folder / name).write_bytes(text.encode("utf-8", "surrogatepass"))
    with pytest.raises(ModelFileError) as raised:
        load_generator(folder)
    assert is_one_sentence_about(raised.value, name)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"guidance_scale": "much"}, "generation_settings: guidance_scale"),
        ({"num_inference_step": 3}, "generation_settings: .*num_inference_step"),
        ([1], "generation_settings"),
        ({"scheduler": 5}, "generation_settings: scheduler"),
    ],
)
def test_wrong_generation_settings_of_a_model_are_a_fault_of_its_files(settings, message, tmp_path):
    write(tmp_path, "config.json", shipped_config() | {"generation_settings": settings})
    with pytest.raises(ModelFileError, match=rf"config\.json: {message}"):
        generation_defaults(read_config(tmp_path))


# ---- The other files ----


READERS = {
    "processor_config.json": MMInterleavedProcessor.from_pretrained,
    "tokenizer_config.json": MMInterleavedProcessor.from_pretrained,
    "generation_config.json": load_model,
}


@pytest.mark.parametrize("name", READERS)
@pytest.mark.parametrize("damage", ["null", "a text", "a negative number", "a huge number", "a list"])
def test_a_damaged_field_of_the_other_files_is_named_or_harmless(name, damage, folder):
    settings = json.loads((folder / name).read_text())
    num_refused = 0
    for path in paths(settings):
        write(folder, name, damaged(settings, path, DAMAGES[damage]))
        try:
            READERS[name](folder)
        except ModelFileError as error:
            num_refused += 1
            assert is_one_sentence_about(error, name), path
            assert any(field in str(error) for field in path), (path, str(error))
    assert num_refused or damage == "null"


def test_a_whole_copy_continues_documents(folder):
    generator = load_generator(folder, device="cpu")
    document = Document(id="d", parts=[Text("ab")])
    done = generator.generate(document, layout="T I", max_new_tokens=2, num_inference_steps=1, seed=1)
    assert len(done.parts) == 3


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("image_size", 64, r"image_size: found 64, expected 32 as vision_config\.image_size"),
        ("image_size", 1_000_000, "image_size: found the number 1000000, expected a number from 1 to 16384"),
        ("target_size", 1_000_000, "target_size: found the number 1000000"),
        ("num_slots", 4, r"num_slots: found 4, expected 3 as slot_resampler\.num_queries"),
        ("resize", "other", "resize: found the string 'other', expected 'released' or 'clip'"),
        ("special_ids.image", 297, r"special_ids\.image: found 297, expected 299 as image_token_id"),
        ("special_ids.eos", 2, "the tokenizer of another model: its eos_token in tokenizer_config.json is 1"),
        ("special_ids.image", MISSING, r"special_ids\.image: missing"),
        ("special_ids.other", 5, r"special_ids\.other: no such id"),
        ("special_ids", None, "special_ids: found null"),
    ],
)
def test_a_processor_of_another_model_is_refused(folder, field, value, message):
    path = folder / "processor_config.json"
    write(folder, path.name, damaged(json.loads(path.read_text()), tuple(field.split(".")), value))
    for load in (load_generator, MMInterleavedProcessor.from_pretrained):
        with pytest.raises(ModelFileError, match=message) as raised:
            load(folder)
        assert is_one_sentence_about(raised.value, "processor_config.json")


def test_a_processor_and_a_model_that_do_not_belong_together_are_not_joined(folder):
    model = load_model(folder)
    with pytest.raises(ModelFileError, match="another model's: image_size: found 64, expected 32"):
        InterleavedGenerator(model, MMInterleavedProcessor.from_pretrained("storyworld"))
    with pytest.raises(ModelFileError, match="another model's: "):
        InterleavedGenerator(load_model(shipped_folder("storyworld")), tiny_processor())


@pytest.mark.parametrize("from_where", ["the shipped model", "the tiny model"])
def test_a_tokenizer_of_another_model_is_refused(folder, from_where, tmp_path):
    shipped = Path(shutil.copytree(shipped_folder("storyworld"), tmp_path / "shipped"))
    source, target = (shipped, folder) if from_where == "the shipped model" else (folder, shipped)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(source / name, target / name)
    with pytest.raises(ModelFileError, match="tokenizer"):
        load_generator(target)


@pytest.mark.parametrize(
    "text", ["", "{}", "[]", "null", '{"model": 5}', '{"version": "1.0"}', '{"model": {"type": "x"}}']
)
def test_a_damaged_tokenizer_is_refused(folder, text):
    (folder / "tokenizer.json").write_text(text)
    with pytest.raises(ModelFileError, match=r"tokenizer\.json") as raised:
        MMInterleavedProcessor.from_pretrained(folder)
    assert "\n" not in str(raised.value)


# ---- The rules themselves ----


@pytest.mark.parametrize(
    ("value", "hint", "expected"),
    [
        (1, int, True), (1.0, int, False), (True, int, False), (1, float, True), (True, float, False),
        ("1", int, False), (None, int, False), (None, int | None, True), ([1, 2], list[int], True),
        ([1, "2"], tuple[int, ...], False), ((1, 2), tuple[int, int], True), ([], list, True),
        ({}, dict[str, int], True), ([], dict, False), (3, int | tuple[int], True), (1, bool, False),
        ("x", str | None, True), (object(), "int", True),
    ],
)  # fmt: skip
def test_a_json_value_fits_a_type(value, hint, expected):
    assert fits(value, hint) is expected


def test_numbers_that_are_none_are_refused_wherever_they_stand():
    for value in (math.nan, math.inf, -math.inf, 10**400):
        for place in ({"a": value}, {"a": [1, value]}, {"a": {"b": [{"c": value}]}}):
            with pytest.raises(FieldError, match=r"^a.*: found the number"):
                check_object(place, {}, "")


@pytest.mark.parametrize("name", [*SIZES, *COUNTS])
def test_what_counts_something_is_neither_negative_nor_beyond_all_models(name):
    most = (SIZES | COUNTS)[name]
    check_object({name: 1}, {}, "")
    check_object({name: [1, most]}, {}, "")
    for wrong in (-1, most + 1, [1, -1], "1", True):
        with pytest.raises(FieldError, match=name):
            check_object({name: wrong}, {}, "")


def test_the_shipped_and_the_tiny_configuration_are_fine():
    read_config(shipped_folder("storyworld"))
    read_model_config(shipped_folder("storyworld"))
    tiny_config().check_complete()
    assert AutoTokenizer.from_pretrained(shipped_folder("storyworld"))
