"""Many processes train what one trains: DDP, FSDP2, other numbers of ranks on resuming."""

import json
import os
import shutil
import signal
import socket
from dataclasses import replace

import pytest
import torch
from ranks import run_ranks
from torch import nn

from mm_interleaved.checkpoint.load import load_model
from mm_interleaved.errors import MMInterleavedError, UsageError
from mm_interleaved.recipes.run import run_recipe
from mm_interleaved.runs.ranks import ALONE
from mm_interleaved.training.checkpoints import newest_checkpoint
from mm_interleaved.training.config import CorpusConfig, TrainConfig
from mm_interleaved.training.documents import DocumentsStage, build_loader
from mm_interleaved.training.loop import train_stage
from mm_interleaved.training.objectives import Objective, ObjectiveConfig
from mm_interleaved.training.parallel import ParallelConfig, spread, training_ranks
from mm_interleaved.training.parameter_groups import PART_NAMES, PartConfig, PartsConfig, choose_trained
from mm_interleaved.training.settings import StageConfig
from mm_interleaved.training.stage import Losses

CONFIG = TrainConfig(
    corpora={"world": CorpusConfig(kind="storyworld", paths=("draw", "caption"), learn_prompts=True)},
    max_length=192,
    global_batch_size=4,
    micro_batch_size=1,
    training=StageConfig(
        steps=4, learning_rate=1e-3, epsilon=1e-4, warmup_steps=1, save_every=2, log_every=1, ema_decay=0.9
    ),
)
# Of few tensors, since reading thousands of small ones in shares takes seconds.
STILL = PartConfig()
FEW_PARTS = PartsConfig(
    adapter=STILL, slot_resampler=STILL, conditioning_resampler=STILL, offsets=STILL,
    image_synchronizers=STILL, unet=STILL, language=PartConfig(train=True, learning_rate=5e-4),
)  # fmt: skip
FEW = replace(CONFIG, parts=FEW_PARTS)
SHARDED = replace(FEW, parallel=ParallelConfig(strategy="fsdp"))


def train(model, processor, folder, config, ranks, steps=4):
    rules = choose_trained(model, config.parts)
    objective = Objective(model, config.objective)
    paints = model.config.image_loss_weight > 0
    wrapped = spread(model, ranks, config.parallel, has_unused=not paints)
    loader = build_loader(config, processor, ranks=ranks, target_pixels=paints)
    stage = DocumentsStage(model, loader, objective, wrapped=wrapped, ranks=ranks)
    named = {f"model.{name}": rule for name, rule in rules.items()}
    training = replace(config.training, steps=steps, decay_fraction=0.0)
    train_stage(stage, training, folder, seed=0, rules=named, ranks=ranks)


def result(folder):
    """Losses by step, and every saved tensor by group and name."""
    lines = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    checkpoint = newest_checkpoint(folder)
    tensors = {
        f"{group}/{name}": tensor
        for group in sorted(checkpoint.groups)
        for name, tensor in checkpoint.read(group).items()
    }
    assert checkpoint.step == lines[-1]["step"] == 4
    return {line["step"]: (line["text"], line["image"]) for line in lines}, tensors


def assert_same(folder, other):
    (losses, tensors), (other_losses, other_tensors) = result(folder), result(other)
    assert set(other_losses) <= set(losses)
    for step, values in other_losses.items():
        assert values == pytest.approx(losses[step], abs=2e-6), step
    assert tensors.keys() == other_tensors.keys()
    differences = {
        name: float((tensors[name].reshape(tensor.shape) - tensor).abs().max())
        for name, tensor in other_tensors.items()
    }
    worst = max(differences, key=differences.__getitem__)
    assert differences[worst] < 1e-6, f"{worst}: {differences[worst]}"


def with_words(config, folder):
    """Every second row is text alone: a rank may have images where the other has none."""
    lines = [
        {"id": f"words-{n}", "content": [{"type": "text", "text": "Pip and Mo. " * n}]} for n in range(1, 9)
    ]
    file = folder / "words.jsonl"
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    words = CorpusConfig(kind="documents", paths=(str(file),), learn_prompts=True)
    return replace(config, corpora={**config.corpora, "words": words})


def alone(make_model, processor, config, tmp_path):
    """What one process makes of the run."""
    train(make_model(), processor, tmp_path / "alone", with_words(config, tmp_path), ALONE)
    return tmp_path / "alone"


def test_two_processes_train_what_one_trains(make_model, processor, tmp_path):
    reference = alone(make_model, processor, CONFIG, tmp_path)
    config = with_words(CONFIG, tmp_path)
    assert run_ranks(2, tmp_path, lambda r: train(make_model(), processor, tmp_path / "ddp", config, r)) == [
        0,
        0,
    ]
    assert_same(reference, tmp_path / "ddp")


def test_two_processes_that_paint_nothing_train_what_one_trains(make_model, processor, tmp_path):
    """What only the image decoder reads gets no gradient then, which DDP must not wait for."""
    reads = replace(CONFIG, objective=ObjectiveConfig(image_loss_weight=0.0))
    reference = alone(make_model, processor, reads, tmp_path)
    config, run = with_words(reads, tmp_path), tmp_path / "ddp"
    assert run_ranks(2, tmp_path, lambda ranks: train(make_model(), processor, run, config, ranks)) == [0, 0]
    assert_same(reference, run)


def test_a_run_on_documents_goes_on_to_the_same_bits(make_model, processor, tmp_path):
    reference = alone(make_model, processor, FEW, tmp_path)
    run = tmp_path / "again"
    shutil.copytree(reference / "step-00000002", run / "step-00000002")
    train(make_model(), processor, run, with_words(FEW, tmp_path), ALONE)
    (_, wanted), (_, found) = result(reference), result(run)
    assert all(torch.equal(tensor, found[name]) for name, tensor in wanted.items())


def test_shares_of_weights_train_what_whole_weights_do_with_any_number_of_ranks(
    make_model, processor, tmp_path
):
    reference = alone(make_model, processor, FEW, tmp_path)
    config, run = with_words(SHARDED, tmp_path), tmp_path / "fsdp"

    def go(ranks):
        train(make_model(), processor, run, config, ranks)

    assert run_ranks(2, tmp_path, go) == [0, 0]
    sizes = [path.stat().st_size for path in (run / "step-00000004" / "weights").glob("*.safetensors")]
    assert len(sizes) == 2 and max(sizes) < 0.7 * sum(sizes), "a rank holds a share"
    assert_same(reference, run)

    # Two ranks stop half-way; one goes on; then a single process with whole weights does.
    for ranks in (1, 0):
        shutil.rmtree(run / "step-00000004")
        if ranks:
            assert run_ranks(1, tmp_path, go) == [0]
        else:
            train(make_model(), processor, run, with_words(FEW, tmp_path), ALONE)
        assert_same(reference, run)

    # And two ranks go on with shares of what one process saved whole.
    shutil.copytree(reference / "step-00000002", tmp_path / "back" / "step-00000002")
    run = tmp_path / "back"
    assert run_ranks(2, tmp_path, go) == [0, 0]
    assert_same(reference, run)


def test_shares_within_a_node_and_copies_between_nodes_train_what_one_process_does(
    make_model, processor, tmp_path
):
    """Hybrid sharding: four ranks stand for two nodes of two."""
    only = PartsConfig(**{name: STILL for name in PART_NAMES} | {"language": FEW_PARTS.language})
    config = replace(CONFIG, parts=only, training=replace(CONFIG.training, ema_decay=0.0, save_every=4))
    train(make_model(), processor, tmp_path / "alone", config, ALONE)
    hybrid = replace(config, parallel=ParallelConfig(strategy="fsdp", shard_ranks=2))
    run = tmp_path / "hybrid"
    assert run_ranks(4, tmp_path, lambda ranks: train(make_model(), processor, run, hybrid, ranks)) == [0] * 4
    assert_same(tmp_path / "alone", run)


def test_a_recipe_run_on_shares_leaves_the_model_that_one_process_leaves(make_model, processor, tmp_path):
    make_model().save_pretrained(tmp_path / "start")
    processor.save_pretrained(tmp_path / "start")
    others = set(PART_NAMES) - {"language"}
    assignments = [f"start_from={tmp_path / 'start'}", *(f"parts.{name}.train=false" for name in others)]
    assignments += ["training.steps=1", "global_batch_size=2", "micro_batch_size=1", "max_length=192"]
    assignments += ["training.use_bfloat16=false", "training.epsilon=1e-4", "num_threads=1"]
    run_recipe("grounding-storyworld", assignments, out=tmp_path / "one")

    def work(ranks):
        os.environ["RANK"] = str(ranks.rank)
        run_recipe("grounding-storyworld", [*assignments, "parallel.strategy=fsdp"], out=tmp_path / "two")

    assert run_ranks(2, tmp_path, work) == [0, 0]
    one, two, start = (
        load_model(tmp_path / name).state_dict() for name in ("one/model", "two/model", "start")
    )
    assert all((two[name] - tensor).abs().max() < 1e-6 for name, tensor in one.items())
    assert any(not torch.equal(two[name], tensor) for name, tensor in start.items())
    ends = [json.loads((tmp_path / "two" / f"exit_status-{rank}.json").read_text()) for rank in (0, 1)]
    assert [end["code"] for end in ends] == [0, 0]


def test_ranks_that_do_not_find_each_other_or_lose_one_say_so(tmp_path, monkeypatch):
    config = ParallelConfig(timeout_seconds=2)
    for name in ("MASTER_ADDR", "MASTER_PORT", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("RANK", "1")
    with (
        pytest.raises(UsageError, match=r"rank 1 does not find the others \(.*WORLD_SIZE"),
        training_ranks(config),
    ):
        pass
    for name, value in (("MASTER_ADDR", "127.0.0.1"), ("MASTER_PORT", free_port()), ("WORLD_SIZE", "2")):
        monkeypatch.setenv(name, value)
    children = []
    for rank in (0, 1):
        child = os.fork()
        if child == 0:
            os._exit(lose_a_rank(str(rank), config))
        children.append(child)
    assert [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children] == [6, 9]


def free_port():
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return str(one.getsockname()[1])


def lose_a_rank(rank, config):
    os.environ.update(RANK=rank, GLOO_SOCKET_IFNAME="lo")
    try:
        with training_ranks(config, "cpu") as ranks:
            ranks.sum([1.0])
            if rank == "1":
                os._exit(9)
            ranks.sum([1.0])
        return 0
    except MMInterleavedError as error:
        return error.exit_code if "rank 0: another rank ended or did not answer" in str(error) else 1


class Apart:
    """A stage of which the second rank fails, or is asked to stop, at step 2."""

    name = "apart"

    def __init__(self, ranks, *, fails):
        self.part, self.ranks, self.fails = nn.Linear(2, 1), ranks, fails

    def trained_parts(self):
        return {"part": self.part}

    def make_batch(self, step):
        is_it = step == 2 and self.ranks.rank == 1
        if is_it and not self.fails:
            os.kill(os.getpid(), signal.SIGTERM)
        return float("nan") if is_it and self.fails else 1.0

    def compute_losses(self, batch):
        loss = self.part(torch.ones(1, 2)).sum() * batch
        return Losses(loss, {"loss": loss}, {"rows": 1}, document_ids=(f"of-rank-{self.ranks.rank}",))


@pytest.mark.parametrize(("fails", "code"), [(True, 5), (False, 75)], ids=["not a number", "stop signal"])
def test_what_one_rank_meets_ends_all_ranks_alike(tmp_path, fails, code):
    config = StageConfig(steps=5, learning_rate=1e-2, log_every=1)

    def work(ranks):
        try:
            train_stage(Apart(ranks, fails=fails), config, tmp_path / "run", seed=0, ranks=ranks)
        except MMInterleavedError as error:
            (tmp_path / f"end-{ranks.rank}").write_text(str(error))
            raise

    assert run_ranks(2, tmp_path, work) == [code, code]
    ends = [(tmp_path / f"end-{rank}").read_text() for rank in (0, 1)]
    if fails:
        assert all("step 2: loss nan" in end and end.endswith("documents of-rank-1") for end in ends), ends
        assert newest_checkpoint(tmp_path / "run") is None
    else:
        assert all("after step 3" in end for end in ends), ends
        assert newest_checkpoint(tmp_path / "run").step == 3
    assert all("rows/s" in json.loads(line) for line in (tmp_path / "run" / "log.jsonl").open())
