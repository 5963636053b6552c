"""The comparison itself, on folders of our own model: it runs for other shapes, and finds what is damaged."""

import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from comparison import assert_equal, compared_elements, tolerance
from golden import FILES, Golden
from producers import produce, training
from safetensors.torch import load_file, save_file
from synthetic import make

from mm_interleaved.models.targets import TrainingTargets

HERE = Path(__file__).parent
CARRIED = HERE / "data" / "golden-subset"

pytestmark = pytest.mark.xdist_group("golden of our own model")


@pytest.fixture(scope="session")
def made(tmp_path_factory) -> Callable[[int], Golden]:
    """A folder of so many rows, with all that its outputs were made from."""
    folders: dict[int, Golden] = {}

    def folder(rows: int) -> Golden:
        if rows not in folders:
            folders[rows] = make(tmp_path_factory.mktemp("golden") / str(rows), rows)
        return folders[rows]

    return folder


@pytest.fixture
def one_row(made, tmp_path) -> Path:
    """A folder of one row, to be damaged."""
    return shutil.copytree(made(1).folder, tmp_path / "golden")


def verdict(golden: Golden, key: str) -> str:
    """ "equal", "differs" or "not compared", and why."""
    try:
        ours = produce(golden, key)
    except Exception as error:
        return " ".join([f"not compared: {error}", *getattr(error, "__notes__", ())])
    try:
        assert_equal(golden, key, ours)
    except AssertionError as error:
        return f"differs: {error}"
    return "equal"


def verdicts(golden: Golden) -> dict[str, str]:
    """Of all outputs that are not equal."""
    found = {key: verdict(golden, key) for key in golden.output_keys}
    return {key: words for key, words in found.items() if words != "equal"}


def rewrite(file: Path, change: Callable[[dict], None]) -> None:
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file)


def computed(made: Golden) -> Golden:
    """The same folder read again, with all steps done."""
    again = Golden(made.folder)
    again.results = made.results
    return again


def matching(golden: Golden, pattern: str) -> set[str]:
    return {key for key in golden.output_keys if re.fullmatch(pattern, key)}


# ---- Other shapes --------------------------------------------------------------------------------


def test_a_folder_of_other_widths_and_four_rows_is_equal_when_computed_from_its_files(made):
    assert verdicts(Golden(made(4).folder)) == {}


def test_a_folder_of_eight_rows_is_compared_whole(made):
    assert verdicts(computed(made(8))) == {}


def test_the_rows_have_documents_of_all_kinds(made):
    golden = made(4)
    ids, mask = golden.inputs["forward.text_ids"], golden.inputs["forward.attention_mask"]
    images = (ids == golden.tokens["soi_token_id"]).sum(1)
    documents = (ids == golden.tokens["bos_token_id"]).sum(1)
    assert images.min() == 0 and images.max() == 4
    assert documents.max() == 3
    assert set(mask[:, 0].tolist()) == {0, 1} and set(mask[:, -1].tolist()) == {0, 1}


def test_the_carried_subset_is_equal():
    assert verdicts(Golden(CARRIED)) == {}


def test_the_losses_are_those_of_one_whole_pass(made):
    golden = made(1)
    output = golden.model(
        **training.batch(golden),
        target_pixel_values=training.target_pixels(golden),
        text_target=training.counted_text(golden),
        targets=TrainingTargets(noise=training.noise(golden)),
    )
    for name, found in (
        ("loss", output.loss),
        ("loss_txt", output.text_loss),
        ("loss_img", output.image_loss),
    ):
        torch.testing.assert_close(found, golden.outputs[f"forward.{name}"])


# ---- Damage --------------------------------------------------------------------------------------


def test_each_output_that_is_wrong_in_one_number_is_found(made):
    golden = computed(made(4))
    for key in golden.output_keys:
        official = golden.outputs[key]
        place = tuple(compared_elements(golden, key).nonzero()[-1].tolist())
        golden.outputs[key] = official.clone()
        # Twice what is allowed, or one more of what is counted.
        allowed = tolerance(golden, key)
        golden.outputs[key][place] += 2 * allowed if official.is_floating_point() else 1 + int(allowed)
        assert verdict(golden, key).startswith("differs: largest difference"), key
        assert str(place) in verdict(golden, key), key
        golden.outputs[key] = official


def test_one_wrong_output_is_named_alone(made):
    golden = computed(made(4))
    golden.outputs["forward.variant.offset_of_each.loss"] += 0.1
    assert list(verdicts(golden)) == ["forward.variant.offset_of_each.loss"]


def test_an_output_of_another_shape_differs(made):
    golden = computed(made(1))
    golden.outputs["vt.vis_embed"] = golden.outputs["vt.vis_embed"][:, :-1]
    assert verdicts(golden)["vt.vis_embed"].startswith("differs: shape")


def test_padding_is_not_compared(made):
    golden = computed(made(4))
    padding = golden.inputs["forward.attention_mask"] == 0
    golden.outputs["forward.text_logits"][padding] += 1
    golden.outputs["forward.llm_hidden_states"][:, padding] = torch.nan
    assert verdicts(golden) == {}


def test_what_a_row_says_after_its_end_is_not_compared(made):
    golden = computed(made(4))
    key = "gen_text.greedy.step_logits"
    steps = compared_elements(golden, key)[..., 0].sum(0)
    num_steps = len(golden.outputs[key])
    ended = int(steps.argmin())
    assert 0 < steps[ended] < num_steps, "some row ends before the others"
    assert steps.max() == num_steps, "some row goes on"
    golden.outputs[key][steps[ended] :, ended] += 1
    assert verdicts(golden) == {}
    golden.outputs[key][steps[ended] - 1, ended] += 1
    assert list(verdicts(golden)) == [key]


def test_a_weight_that_is_off_shows_in_all_that_is_made_from_it_and_nowhere_else(one_row):
    name = "image_decoder.decoder.mmfs_module.mmfs_mid_block.conv.bias"
    rewrite(one_row / "model.safetensors", lambda weights: weights[name].add_(10))
    golden = Golden(one_row)
    found = verdicts(golden)
    assert set(found) == of_the_middle_map(golden)
    assert all(words.startswith("differs: largest difference") for words in found.values())


def of_the_middle_map(golden: Golden) -> set[str]:
    """Outputs made from the U-Net's innermost synchronizer."""
    training_pass = r"forward\.((variant\.\w+\.)?(loss|loss_img|unet_pred)|loss_img_per_image_unmasked)"
    return (
        matching(golden, training_pass)
        | matching(golden, r"gen_image\..*(final_latents.*|unet_out|latents_in|image_u8|image_first)")
        | {"forward.unet_debug.mid_mmfs_delta", "mmfs_sd.middle.block_out"}
    )


def test_a_missing_weight_is_named_by_all_that_is_made_from_it(one_row):
    name = "image_decoder.decoder.mmfs_module.mmfs_mid_block.conv.bias"
    rewrite(one_row / "model.safetensors", lambda weights: weights.pop(name))
    golden = Golden(one_row)
    found = verdicts(golden)
    assert set(found) == of_the_middle_map(golden)
    said = "lacks 1 weights, the first is image_decoder.synchronizers.middle.conv.bias"
    assert {key: words for key, words in found.items() if said not in words} == {}


def test_a_missing_input_takes_only_what_is_made_from_it(one_row):
    rewrite(one_row / "inputs.safetensors", lambda inputs: inputs.pop("gen_text.image_index"))
    golden = Golden(one_row)
    found = verdicts(golden)
    assert set(found) == matching(golden, r"gen_text\..*")
    assert all("inputs.safetensors: no tensor 'gen_text.image_index'" in words for words in found.values())


def test_a_missing_tolerance_takes_only_its_output(made):
    golden = computed(made(1))
    del golden.tolerances["vt.vis_embed"]
    with pytest.raises(LookupError, match=r"tolerances\.json: no field 'vt\.vis_embed'"):
        verdict(golden, "vt.vis_embed")
    assert verdict(golden, "vt.image_embeds") == "equal"


def test_a_step_that_fails_takes_only_what_is_made_from_it_and_is_tried_once(made, monkeypatch):
    golden = Golden(made(1).folder)
    tried = []

    def broken(*arguments, **_):
        tried.append(arguments)
        raise RuntimeError("out of paint")

    monkeypatch.setattr(golden.model, "denoising_loss", broken)
    found = verdicts(golden)
    losses = matching(golden, r"forward\.(variant\.\w+\.)?(loss|loss_img|unet_pred)")
    inside = matching(golden, r"forward\.(perceiver_out|noisy_latents|unet_.*|loss_img_.*)")
    assert set(found) == losses | inside
    # The main pass, and one a variant that paints otherwise.
    assert len(tried) == 3
    assert all("out of paint" in words for words in found.values())


# ---- Arguments -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "outputs", "words"),
    [
        (None, ".*", "says nothing of the variant 'offset_of_each'"),
        # The offset is of the text alone.
        (
            {"ignore_prompt_token_offset": [3, 5]},
            "(gt_text_ids|loss|loss_txt)",
            "2 numbers, but the batch has 1",
        ),
        ({"prompt_offset": 3}, ".*", "arguments we do not know: ['prompt_offset']"),
    ],
)
def test_a_variant_without_its_arguments_takes_only_its_own_outputs(made, arguments, outputs, words):
    golden = computed(made(1))
    given = golden.config["meta"]["forward"]["variant_arguments"]
    given["offset_of_each"] = arguments
    if arguments is None:
        del given["offset_of_each"]
    found = verdicts(golden)
    assert set(found) == matching(golden, rf"forward\.variant\.offset_of_each\.{outputs}")
    assert all(words in reason for reason in found.values())


def test_a_folder_that_names_no_arguments_says_so(made):
    golden = computed(made(1))
    del golden.config["meta"]["forward"]["variant_arguments"]
    found = verdicts(golden)
    assert found["forward.variant.offset_of_all.loss"] == (
        "not compared: config.json: no field meta.forward.variant_arguments"
    )
    assert not any(key.startswith(("vt.", "gen_", "forward.loss")) for key in found)


def test_files_that_a_folder_lacks_are_named(tmp_path):
    shutil.copy(CARRIED / "config.json", tmp_path)
    assert Golden(tmp_path).missing_files == [name for name in FILES if name != "config.json"]


# ---- The command ---------------------------------------------------------------------------------


def test_the_command_lists_what_differs_and_what_is_not_compared_by_any_process(tmp_path):
    folder = shutil.copytree(CARRIED, tmp_path / "golden")
    rewrite(folder / "inputs.safetensors", lambda inputs: inputs.pop("mmfs_sd.n1_mid.sample"))
    rewrite(folder / "outputs.safetensors", lambda outputs: outputs["schedule.betas"].add_(1))
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-n", "2"]
    test = HERE / "test_golden.py"
    run = subprocess.run(
        [*command, test, "--golden", folder], capture_output=True, text=True, cwd=HERE.parents[1]
    )
    assert run.returncode == 1, run.stdout + run.stderr
    lines = [line for line in run.stdout.splitlines() if line.startswith("golden: ")]
    assert lines == [
        "golden: not compared: mmfs_sd.n1_mid.block_out",
        "golden: differs: schedule.betas",
        "golden: compared 5 of 7 outputs",
    ]
