"""Recipes: every one resolves, its small version trains, its result is a model, its settings run again."""

import json
import shutil
from dataclasses import asdict, replace
from importlib.util import find_spec

import pytest
import torch
from safetensors import SafetensorError

from mm_interleaved.checkpoint.load import load_model
from mm_interleaved.errors import InputError, ModelFileError, StorageError, UsageError
from mm_interleaved.models.interleaved import MMInterleavedForConditionalGeneration
from mm_interleaved.recipes.documents import train_documents
from mm_interleaved.recipes.registry import RECIPES
from mm_interleaved.recipes.run import export, run_recipe
from mm_interleaved.recipes.tasks import task_recipes
from mm_interleaved.training.adaptation import (
    add_low_rank,
    checkpoint_activations,
    compile_layers,
    quantization_settings,
)
from mm_interleaved.training.checkpoints import newest_checkpoint
from mm_interleaved.training.config import CorpusConfig, LoraConfig, TrainConfig
from mm_interleaved.training.documents import build_loader, build_mixture
from mm_interleaved.training.objectives import Objective
from mm_interleaved.typed_settings import from_record, override, to_record
from tiny import tiny_model

FULL_SIZE = sorted(name for name in task_recipes() if not name.endswith(("-lora", "-storyworld")))
CORPORA = task_recipes()["grounding"]().corpora
QUICK = [
    "training.steps=1", "training.log_every=1", "max_length=192", "global_batch_size=1", "micro_batch_size=1",
    "num_threads=1",
]  # fmt: skip


@pytest.fixture(scope="module")
def folder(make_model, processor, tmp_path_factory):
    """A tiny model as `save_pretrained` leaves it."""
    folder = tmp_path_factory.mktemp("models") / "tiny"
    make_model().save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


def weights(folder):
    return {name: tensor.clone() for name, tensor in load_model(folder).state_dict().items()}


def changed_parts(before, after):
    return {
        ".".join(name.split(".")[: 2 if name.startswith(("image_decoder", "vision")) else 1])
        for name in before
        if not torch.equal(before[name], after[name])
    }


@pytest.mark.parametrize("name", sorted(RECIPES))
def test_settings_of_every_recipe_come_back_from_json(name):
    settings = RECIPES[name].settings()
    record = json.loads(json.dumps(to_record(settings)))
    assert from_record(type(settings), record) == settings


@pytest.mark.parametrize("name", FULL_SIZE)
def test_the_small_version_trains_the_parts_that_its_recipe_trains(name):
    recipes = task_recipes()
    full, small, low_rank = (recipes[f"{name}{end}"]() for end in ("", "-storyworld", "-storyworld-lora"))
    assert not full.start_from and small.start_from == "storyworld"

    def trained(config):
        return {part for part, how in asdict(config.parts).items() if how["train"]}

    assert trained(full) == trained(small)
    assert not trained(low_rank) & {"language", "unet", "text_head"} and low_rank.lora.rank > 0


@pytest.mark.parametrize("name", FULL_SIZE)
def test_every_small_version_has_rows_in_which_something_counts(name, processor):
    config = replace(task_recipes()[f"{name}-storyworld"](), max_length=192, global_batch_size=4)
    rows = next(iter(build_loader(config, processor)))
    batches = [micro_batch.batch for micro_batch in rows.micro_batches]
    paints = RECIPES[name].settings().objective.image_loss_weight != 0.0
    counted = sum(int((batch.image_target if paints else batch.text_target).sum()) for batch in batches)
    assert counted and not rows.skips


@pytest.mark.parametrize(("cores", "workers"), [(1, 1), (2, 2), (8, 3)])
def test_no_more_workers_are_started_than_there_are_cores(processor, monkeypatch, cores, workers):
    monkeypatch.setattr("mm_interleaved.training.documents.usable_cores", lambda: cores)
    config = replace(task_recipes()["caption-vqa-storyworld"](), num_workers=3, global_batch_size=4)
    assert build_loader(config, processor).num_workers == workers


@pytest.mark.parametrize("name", ["pretrain", "caption-vqa"])
def test_a_small_version_trains(name, folder, tmp_path):
    out = run_recipe(f"{name}-storyworld", [f"start_from={folder}", *QUICK], out=tmp_path / "run")
    line = json.loads((tmp_path / "run" / "documents" / "log.jsonl").read_text())
    assert line["tokens/s"] > 0 and line["memory_gb"] > 0
    parts = changed_parts(weights(folder), weights(out))
    paints = RECIPES[name].settings().objective.image_loss_weight != 0.0
    assert ("image_decoder.unet" in parts) == paints
    assert not parts & {"image_decoder.vae", "vision.clip"}


def test_a_run_is_run_again_from_its_settings_and_exported_to_the_same_bits(folder, tmp_path):
    pytest.importorskip("tensorboard")
    more = [
        "frozen_type=bfloat16", "training.ema_decay=0.5", "samples.every=1", "samples.count=1",
        "samples.num_inference_steps=1", "samples.max_new_tokens=4", "tensorboard=true", "measure_mfu=true",
    ]  # fmt: skip
    assignments = [f"start_from={folder}", *QUICK, *more]
    first = run_recipe("instructions-storyworld-lora", assignments, out=tmp_path / "first")
    again = run_recipe(str(tmp_path / "first" / "settings.json"), out=tmp_path / "again")
    run_recipe("instructions-storyworld-lora", resume=True, out=tmp_path / "first")  # nothing is left to do
    steps = export(tmp_path / "first", tmp_path / "exported")
    assert steps == 1
    wanted = weights(first)
    for other in (weights(again), weights(tmp_path / "exported")):
        assert all(torch.equal(tensor, other[name]) for name, tensor in wanted.items())
    assert "language_model" in changed_parts(weights(folder), wanted)

    # Additions to a language model in four bits go into the one in full; no bitsandbytes is needed for that.
    settings = tmp_path / "again" / "settings.json"
    settings.write_text(settings.read_text().replace('"quantize": ""', '"quantize": "nf4"'))
    export(tmp_path / "again", tmp_path / "merged")
    merged = weights(tmp_path / "merged")
    assert all(torch.equal(tensor, merged[name]) for name, tensor in wanted.items())

    # What is left beside the model: additions alone, curves, samples, what the device did.
    run = tmp_path / "first"
    assert (run / "model-lora" / "adapter_model.safetensors").is_file()
    page = (run / "documents" / "curves.html").read_text()
    assert "<svg" in page and "loss:" in page and "<script" not in page
    assert "Samples after 1 steps" in (run / "documents" / "samples" / "step-00000001.html").read_text()
    assert list((run / "documents" / "tensorboard").iterdir())
    lines = [json.loads(line) for line in (run / "documents" / "log.jsonl").read_text().splitlines()]
    assert all(0 < line["mfu"] < 1 for line in lines)
    with pytest.raises(UsageError, match="global_batch_size was 1 and is 2 now"):
        run_recipe(
            "instructions-storyworld-lora", ["global_batch_size=2", "training.steps=2"], resume=True, out=run
        )
    assert json.loads((run / "settings.json").read_text())["settings"]["global_batch_size"] == 1
    with pytest.raises(UsageError, match="holds a run of instructions-storyworld-lora"):
        run_recipe("grounding", resume=True, out=run)
    with pytest.raises(UsageError, match="holds no run"):
        export(tmp_path, tmp_path / "nothing")


def test_what_cannot_be_trained_is_refused_in_one_sentence(folder, tmp_path):
    def run(*assignments, name="grounding"):
        run_recipe(name, assignments, out=tmp_path / "run")

    for assignments, message in (
        ([], "start_from: empty"),
        # Found out before the model is loaded.
        (["start_from=nowhere", *QUICK], r"corpora\.refcoco\.paths: empty.*corpora\.refcoco\.weight=0"),
        (["start_from=nowhere", "device=banana"], "device: expected auto, cpu, cuda or mps, found 'banana'"),
        (["start_from=nowhere", *(f"corpora.{name}.weight=0" for name in CORPORA)], "are all 0"),
        (["corpora.refcocoo.paths=x"], r"did you mean corpora\.refcoco"),
        (["parts.languages.train=true"], r"did you mean parts\.language\.train"),
        (["lora.quantize=nf4"], r"set lora\.rank above 0"),
        (["parallel.strategy=zero"], "strategy must be ddp or fsdp"),
        (["training.use_float16=true", "training.use_bfloat16=true"], "exclude each other"),
    ):
        with pytest.raises(UsageError, match=message):
            run(*assignments)
    with pytest.raises(ModelFileError, match="no such folder"):
        run("start_from=nowhere", name="grounding-storyworld")
    if find_spec("wandb") is None:
        with pytest.raises(UsageError, match="wandb is not installed"):
            run(f"start_from={folder}", "wandb=true", *QUICK, name="grounding-storyworld")
    with pytest.raises(UsageError, match="start the run with torchrun"):
        run(f"start_from={folder}", "parallel.strategy=fsdp", *QUICK, name="grounding-storyworld")


def test_the_mixture_of_pretraining_is_the_published_one(tmp_path):
    (tmp_path / "a.txt").write_text("")
    files = {name: str(tmp_path / "a.txt") for name in ("blip2", "laion_en", "laion_coco", "mmc4")}
    assignments = [f"corpora.{name}.paths={path}" for name, path in files.items()]
    config = override(task_recipes()["pretrain"](), assignments)
    mixed = build_mixture(config)
    total = sum(entry.weight for entry in mixed.sources)
    shares = [round(100 * entry.weight / total, 1) for entry in mixed.sources]
    assert shares == [14.3, 14.3, 14.3, 57.1] and mixed.max_length == 2048
    assert [entry.max_images for entry in mixed.sources] == [30, 30, 30, 15]
    assert [entry.learn.text for entry in mixed.sources] == ["all", "after_image", "after_image", "all"]
    assert [entry.few_shot is not None for entry in mixed.sources] == [True, True, True, False]
    # As published, pairs are never merged, and move as a whole where their image would be cut.
    released = build_mixture(override(config, ["released_packing=true", "corpora.mmc4.weight=0"]))
    assert [entry.name for entry in released.sources] == ["blip2", "laion_en", "laion_coco"]
    assert all(entry.few_shot is None and released.row_rule(entry).keep_pairs for entry in released.sources)


def test_what_is_left_out_is_listed_beside_the_log_and_once_when_done_again(folder, tmp_path, caplog):
    image = "data:image/png;base64,iVBORw0KGgo="
    contents = [[{"type": "text", "text": f"Pip {n}."}] for n in range(6)]
    contents[2].append({"type": "image", "image": image})
    lines = [json.dumps({"id": f"d{n}", "content": content}) for n, content in enumerate(contents)]
    (tmp_path / "a.jsonl").write_text("\n".join([*lines, '{"id": "torn']))
    more = [
        "corpora.documents.shuffle_block=1", f"corpora.documents.paths={tmp_path / 'a.jsonl'}",
        "training.save_every=1", "training.keep_checkpoints=3", "max_length=24",
    ]  # fmt: skip
    run, place = tmp_path / "run", tmp_path / "run" / "documents"
    assignments = [f"start_from={folder}", *QUICK, *more, "training.steps=4", "num_workers=1"]
    run_recipe("interleaved-instructions", assignments, out=run)

    def listed(name="bad_samples.jsonl"):
        return [json.loads(line) for line in (place / name).read_text().splitlines()]

    whole = listed()
    places = {(line["source"], line["kind"], line["place"].rpartition("/")[2]) for line in whole}
    assert places == {("documents", "broken", "a.jsonl:7"), ("documents", "image", "d2")}
    assert all(line["reason"] and 1 <= line["step"] <= 4 for line in whole)
    assert "left out of the data: " in caplog.text and "of documents (broken " in caplog.text

    # The run died after its second step was saved, and another time with a second rank.
    for step in (3, 4):
        shutil.rmtree(place / f"step-0000000{step}")
    (place / "bad_samples-1.jsonl").write_text(
        "".join(json.dumps({**whole[0], "step": n}) + "\n" for n in (1, 3))
    )
    run_recipe("interleaved-instructions", resume=True, out=run)
    assert listed() == whole and [line["step"] for line in listed("bad_samples-1.jsonl")] == [1]


def test_a_disk_that_is_full_at_the_end_ends_with_a_sentence_and_resuming_writes_the_model(
    folder, tmp_path, monkeypatch
):
    def full(model, place, **settings):
        raise SafetensorError("I/O error: No space left on device (os error 28)")

    assignments = [f"start_from={folder}", *QUICK]
    with monkeypatch.context() as disk:
        disk.setattr(MMInterleavedForConditionalGeneration, "save_pretrained", full)
        with pytest.raises(StorageError, match=r"run/model: cannot be written .*No space left") as failed:
            run_recipe("grounding-storyworld", assignments, out=tmp_path / "run")
    assert failed.value.exit_code == 6
    assert not [path for path in (tmp_path / "run").iterdir() if "model" in path.name]
    out = run_recipe("grounding-storyworld", resume=True, out=tmp_path / "run")
    assert "language_model" in changed_parts(weights(folder), weights(out))


def test_weights_that_are_no_numbers_are_refused_by_name(make_model, processor, tmp_path):
    model = make_model()
    with torch.no_grad():
        model.language_model.norm.weight[0] = float("nan")
    model.save_pretrained(tmp_path / "poisoned")
    processor.save_pretrained(tmp_path / "poisoned")
    with pytest.raises(
        ModelFileError, match=r"language_model\.norm\.weight holds numbers that are not finite"
    ):
        run_recipe(
            "grounding-storyworld", [f"start_from={tmp_path / 'poisoned'}", *QUICK], out=tmp_path / "run"
        )


@pytest.mark.quantize
def test_four_bits_are_refused_clearly_where_bitsandbytes_is_missing(monkeypatch):
    config = LoraConfig(rank=4, quantize="nf4")
    settings = quantization_settings(config, torch.float32)["quantization_config"]
    assert settings.bnb_4bit_compute_dtype is torch.float32
    assert settings.load_in_4bit and "image_decoder" in settings.llm_int8_skip_modules
    monkeypatch.setattr("mm_interleaved.models.quantization.find_spec", lambda name: None)
    with pytest.raises(UsageError, match="needs bitsandbytes, which is not installed"):
        quantization_settings(config, torch.float32)


@pytest.mark.quantize
def test_additions_to_four_bits_train_and_are_merged_into_the_whole_model(folder, tmp_path):
    more = ["lora.quantize=nf4", "training.use_bfloat16=false"]
    out = run_recipe(
        "grounding-storyworld-lora", [f"start_from={folder}", *QUICK, *more], out=tmp_path / "run"
    )
    before, after = weights(folder), weights(out)
    assert {tensor.dtype for tensor in after.values()} == {torch.float32}
    assert "language_model" in changed_parts(before, after)


def gradients(model, config, processor):
    loader = build_loader(config, processor)
    objective = Objective(model, config.objective)
    [micro] = next(iter(loader)).micro_batches
    loss = objective(micro.batch, micro.row_numbers, objective.totals([micro.batch])).total
    model.zero_grad()
    loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.fixture(scope="module")
def config():
    small = task_recipes()["storytelling-storyworld"]()
    return replace(small, max_length=192, global_batch_size=1, micro_batch_size=1)


def assert_same_gradients(found, wanted):
    assert found.keys() == wanted.keys()
    for name, gradient in wanted.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-4, atol=1e-6, msg=name)


def test_activations_computed_again_give_the_same_gradients(make_model, config, processor):
    wanted = gradients(make_model(), config, processor)
    model = make_model()
    checkpoint_activations(model)
    assert_same_gradients(gradients(model, config, processor), wanted)


def test_compiled_layers_keep_their_names_and_give_the_same_gradients():
    def language_gradients(change):
        # A language model that has nothing to look at: tracing the synchronizers takes a minute.
        model = tiny_model(text_synchronizer=None, unet_config=None, vae_config=None, image_synchronizer=None,
                           conditioning_resampler=None)  # fmt: skip
        change(model)
        ids = torch.arange(3, 15)[None]
        model(input_ids=ids, text_target=torch.ones_like(ids, dtype=torch.bool)).loss.backward()
        return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}

    compiled = language_gradients(lambda model: compile_layers(model, "eager"))
    assert_same_gradients(compiled, language_gradients(lambda model: None))
    with pytest.raises(UsageError, match=r"compile_backend: .*'inductr'"):
        language_gradients(lambda model: compile_layers(model, "inductr"))


def test_low_rank_additions_start_as_nothing_and_merge_into_a_stock_model(make_model):
    model = make_model()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    handle = add_low_rank(model, LoraConfig(rank=2))
    layers = [m for m in model.modules() if hasattr(m, "lora_A")]
    assert len(layers) > 20
    merged = handle.merge_and_unload().state_dict()
    assert merged.keys() == before.keys()
    assert all(torch.allclose(merged[name], tensor) for name, tensor in before.items())


def test_a_config_without_corpora_is_refused(folder, tmp_path):
    with pytest.raises(UsageError, match="mixture is empty"):
        train_documents(TrainConfig(start_from=str(folder), num_threads=1), tmp_path)


def test_a_run_does_not_go_on_with_data_that_was_edited(folder, tmp_path):
    content = [{"type": "text", "text": "Pip finds a lamp. " * 9}]
    lines = [{"id": str(number), "content": content} for number in range(4)]
    corpus = tmp_path / "corpus.jsonl"
    corpus.write_text("".join(json.dumps(line) + "\n" for line in lines))
    config = override(
        replace(
            task_recipes()["instructions-storyworld"](),
            start_from=str(folder),
            corpora={"ours": CorpusConfig(kind="documents", paths=(str(corpus),))},
        ),
        [*QUICK, "training.steps=1"],
    )
    train_documents(config, tmp_path / "run")
    longer = override(config, ["training.steps=2"])
    corpus.write_text(corpus.read_text().replace("lamp", "lump", 1))
    with pytest.raises(InputError, match=r"corpus\.jsonl: changed since the run began: found sha256"):
        train_documents(longer, tmp_path / "run")
    corpus.write_text(corpus.read_text().replace("lump", "lamp", 1))
    train_documents(longer, tmp_path / "run")
    assert newest_checkpoint(tmp_path / "run" / "documents").step == 2


def test_the_help_of_train_names_every_recipe():
    from mm_interleaved.cli.train import _RECIPE_HELP

    suffixes = ("-storyworld-lora", "-storyworld", "-lora")
    for name in RECIPES:
        for suffix in suffixes:
            name = name.removesuffix(suffix)
        assert name in _RECIPE_HELP, name
