"""What trains is said by part: every parameter has one, and learns as its part is told to."""

from dataclasses import replace

import pytest
import torch

from mm_interleaved.errors import UsageError
from mm_interleaved.training.optimizer import MuonWithAdamW
from mm_interleaved.training.parameter_groups import (
    PART_NAMES,
    PartConfig,
    PartsConfig,
    choose_trained,
    parameters_by_part,
)
from mm_interleaved.training.settings import StageConfig
from mm_interleaved.typed_settings import from_record, override, to_record
from tiny import tiny_model

NOTHING = PartsConfig(**dict.fromkeys(PART_NAMES, PartConfig()))


@pytest.fixture(scope="module")
def model():
    return tiny_model()


def test_every_parameter_belongs_to_one_part(model):
    parts = parameters_by_part(model)
    names = [name for parameters in parts.values() for name in parameters]
    assert len(names) == len(set(names))
    assert set(names) == {name for name, _ in model.named_parameters()}
    assert [part for part, parameters in parts.items() if not parameters] == ["lora"]
    # Offsets are taken out of the synchronizers of both sides and of the adapter.
    assert {name.split(".")[0] for name in parts["offsets"]} == {"vision", "language_model", "image_decoder"}
    assert len(parts["gates"]) == len(model.language_model.synchronized_layers)


def test_only_the_chosen_parts_change_each_at_its_own_rate(model):
    parts = replace(
        NOTHING,
        unet=PartConfig(train=True, learning_rate=1e-5),
        gates=PartConfig(train=True, weight_decay=0.0),
    )
    rules = choose_trained(model, parts)
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert trained.keys() == rules.keys()
    assert {rule.part for rule in rules.values()} == {"unet", "gates"}
    config = StageConfig(steps=10, learning_rate=1e-3, weight_decay=0.05, warmup_steps=0, decay_fraction=0.0)
    optimizer = MuonWithAdamW(trained, frozenset(), config, rules)
    before = {name: parameter.detach().clone() for name, parameter in trained.items()}
    for parameter in trained.values():
        parameter.grad = torch.ones_like(parameter)
    optimizer.set_learning_rates(0, config)
    optimizer.step()
    for name, parameter in trained.items():
        # AdamW's first step is the learning rate itself; decay takes the rate times 0.05 of a matrix.
        rate = 1e-5 if rules[name].part == "unet" else 1e-3
        kept = 1 - rate * (0.05 if parameter.ndim >= 2 and rules[name].part == "unet" else 0.0)
        torch.testing.assert_close(parameter.detach(), before[name] * kept - rate, rtol=0, atol=1e-7)


def test_training_nothing_is_refused(model):
    with pytest.raises(UsageError, match="none is trained"):
        choose_trained(model, NOTHING)
    with pytest.raises(UsageError, match="learning_rate must be 0 or more"):
        PartConfig(learning_rate=-1.0)


def test_parts_are_settings_that_come_back_from_json():
    config = override(PartsConfig(), ["unet.learning_rate=1e-5", "language.train=true", "vae.train=false"])
    assert (config.unet.learning_rate, config.language.train) == (1e-5, True)
    assert from_record(PartsConfig, to_record(config)) == config
    with pytest.raises(UsageError, match=r"did you mean unet\.learning_rate"):
        override(config, ["unet.learning_rat=1"])
    with pytest.raises(UsageError, match=r"settings\.unet\.train: expected bool, found 'yes'"):
        from_record(PartsConfig, {"unet": {"train": "yes"}})
