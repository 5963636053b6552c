"""The command line of the studies: arguments in, results said; what they do stands in their own files."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from mm_interleaved.cli.command import command
from mm_interleaved.cli.options import Device, Dtype, Model
from mm_interleaved.cli.output import progress, say
from mm_interleaved.cli.places import folder_to_write, image_to_write
from mm_interleaved.documents.document import Document
from mm_interleaved.errors import UsageError, escape
from mm_interleaved.generation.events import Event
from mm_interleaved.spelling import hint

_PANEL = "Studies"

Settings = Annotated[
    list[str] | None, typer.Option("--set", metavar="A.B=C", help="Change a setting; may be repeated.")
]
Docs = Annotated[
    Path | None,
    typer.Option(help="Folder for page, plots and raw results. Default: RUN/page.", metavar="DIR"),
]


def add_to(app: typer.Typer):
    """Register the commands of this file."""
    for function in (
        ablation, scaling, curves, attention_maps, gallery, oracle, census, judge_free,
        disabled_synchronizers, image_detail,
    ):  # fmt: skip
        command(app, panel=_PANEL)(function)
    # The name that it had while it was a command of the package.
    app.command("sight", hidden=True)(attention_maps)


def ablation(
    output: Annotated[
        Path,
        typer.Option(
            "-o", "--output", help="Folder of the run, RUN.", metavar="DIR", callback=folder_to_write
        ),
    ] = Path("runs/ablation"),
    assignments: Settings = None,
    documents: Annotated[int, typer.Option(help="Test documents that each variant answers.", min=20)] = 400,
    docs: Docs = None,
):
    """Train the variants that are missing, score them, and write the page about all that are there.

    Run again, it goes on where it was stopped; `--set variants=both-1,neither-1` does some of them alone.
    """
    from mm_interleaved.recipes.run import SETTINGS_NAME, present_assignments, run_recipe
    from mm_interleaved.typed_settings import override
    from studies.ablation.page import write_page
    from studies.ablation.recipe import AblationConfig, chosen_variants
    from studies.ablation.scores import check_documents, score_variants
    from studies.recipes import STUDY_RECIPES

    asked = present_assignments(assignments or (), STUDY_RECIPES["ablation"].former_names)
    names = override(AblationConfig(), asked).variants
    wanted = chosen_variants(names)
    check_documents(output, documents)
    # A run that is resumed keeps its settings; which variants are wanted is stated anew each time.
    overrides = [*asked, f"variants={','.join(names)}"]
    is_begun = (output / SETTINGS_NAME).exists()
    run_recipe("ablation", overrides, resume=is_begun, out=output, show_progress=True, recipes=STUDY_RECIPES)
    with progress(documents * len(wanted), "reading the models") as bar:

        def on_event(document: Document, event: Event | str):
            if event in ("finished", "failed"):
                bar.advance("")

        score_variants(output, wanted, documents, on_event)
    say(f"page: {write_page(output, chosen_variants(()), docs or output / 'page')}")


def scaling(
    output: Annotated[
        Path,
        typer.Option(
            "-o", "--output", help="Folder of the run, RUN.", metavar="DIR", callback=folder_to_write
        ),
    ] = Path("runs/scaling"),
    assignments: Settings = None,
    docs: Docs = None,
):
    """Train a language model in three sizes, and plot the loss that more compute should give."""
    from mm_interleaved.recipes.run import SETTINGS_NAME, run_recipe
    from studies.recipes import STUDY_RECIPES
    from studies.scaling.page import write_scaling

    is_begun = (output / SETTINGS_NAME).exists()
    run_recipe(
        "scaling", assignments or (), resume=is_begun, out=output, show_progress=True, recipes=STUDY_RECIPES
    )
    docs = docs or output / "page"
    results = write_scaling(output, docs)
    if results["law"]:
        law = results["law"]
        say(f"loss = {law['factor']:.3g} * FLOPs ** -{law['exponent']:.3f}")
    for factor, loss in results["expected_at_times"].items():
        say(f"expected at {factor} times the largest compute: {loss}")
    say(f"plot: {docs / 'images' / 'scaling.png'}")


def curves(
    logs: Annotated[
        list[Path] | None,
        typer.Argument(metavar="[LOG]...", help="log.jsonl of stages. Default: the shipped model's."),
    ] = None,
    output: Annotated[
        Path,
        typer.Option(
            "-o", "--output", help="Folder for page and plots.", metavar="DIR", callback=folder_to_write
        ),
    ] = Path("out/curves"),
    cost: Annotated[
        bool, typer.Option(help="Count what a step of each stage of `train storyworld` takes.")
    ] = True,
):
    """Plot how the shipped model learned, and count the multiplications that it took."""
    from mm_interleaved.recipes.storyworld.recipe import StoryWorldConfig
    from studies.learning_curves import costs_of, flops_a_step, read_stages, write_curves

    lines = [line for path in logs or [None] for line in read_stages(path)]
    flops = flops_a_step("storyworld", StoryWorldConfig()) if cost else {}
    for part in costs_of(lines, flops):
        counted = f", {part.flops_a_step:.2e} FLOPs a step, {part.flops:.2e} in all" if part.flops else ""
        hours = "" if part.hours is None else f", {part.hours:.2f} hours"
        say(f"{part.stage}, {part.run}: {part.steps} steps{counted}{hours}")
    say(f"page: {write_curves(lines, flops, output, is_shipped=not logs)}")


def census(
    stories: Annotated[int, typer.Option(help="Stories to compare with each other.", min=1)] = 20000,
    images: Annotated[
        int, typer.Option("--images", "--pictures", help="Images to render against the clock.", min=1)
    ] = 20000,
):
    """Count StoryWorld: how many stories, rendered how fast, and whether they are the same everywhere."""
    from mm_interleaved.storyworld.world import SPLITS
    from studies import census as counting

    for split in SPLITS:
        characters, stories_of_one = counting.count_appearances(split), counting.count_hero_stories(split)
        say(
            f"{split}: {characters:,} appearances; at least {stories_of_one:.2e} stories (one hero, no props)"
        )
    found = counting.variety(counting.drawn_stories(stories, seed=0))
    say(
        f"of {found.stories:,} stories of train: {found.scenes_and_texts:,} different, "
        f"{found.texts:,} different in text alone, {found.casts:,} different casts; "
        f"{found.images:,} different of {found.all_images:,} images"
    )
    rate = counting.images_per_core_second(images, seed=0)
    say(f"images a second: {rate:,.0f} a core, {16 * rate:,.0f} on sixteen")
    say(f"SHA-256 of 5 documents of each split and task, seed 0: {counting.fingerprint(5, seed=0)}")


def attention_maps(
    output: Annotated[
        Path,
        typer.Option("-o", "--output", help="Folder for the maps.", metavar="DIR", callback=folder_to_write),
    ],
    story: Annotated[int, typer.Option(help="Which story of StoryWorld's test split.", min=0)] = 0,
    seed: Annotated[int, typer.Option(help="Seed of the stories.", min=0)] = 0,
    model: Model = "storyworld",
    device: Device = "auto",
    dtype: Dtype = "auto",
):
    """Show where the model attends in earlier images while it names a badge, and while it denoises it."""
    from mm_interleaved.cli.process import load_quietly
    from mm_interleaved.model_files.resolve import find_model
    from studies.attention_pages import write_attention_maps

    numbers = write_attention_maps(
        load_quietly(find_model(model), device=device, dtype=dtype), seed, story, output
    )
    word = numbers["word"]
    say(f"{word['question']} {word['answer']} (truth: {word['truth']})")
    for name in ("word", "badge"):
        for number, image in enumerate(numbers[name]["images"], start=1):
            shares = ", ".join(f"{key.replace('_', ' ')} {value:.1%}" for key, value in image.items())
            say(f"{name}, image {number}: {shares}")
    say(f"maps: {output / 'word.png'}, {output / 'badge.png'}")


def gallery(
    output: Annotated[
        Path,
        typer.Option("-o", "--output", help="File for the sheet.", metavar="PNG", callback=image_to_write),
    ],
    count: Annotated[
        int, typer.Option(help="How many prompts of the test split, the first ones.", min=1)
    ] = 50,
    columns: Annotated[int, typer.Option(help="Images in a row.", min=1)] = 10,
    seed: Annotated[int, typer.Option(help="Seed of the prompts.", min=0)] = 0,
    model: Model = "storyworld",
    device: Device = "auto",
    dtype: Dtype = "auto",
):
    """Generate the first prompts of StoryWorld's test split, and show every image on one sheet."""
    from mm_interleaved.cli.process import load_quietly
    from mm_interleaved.model_files.resolve import find_model
    from studies.gallery import write_gallery

    generator = load_quietly(find_model(model), device=device, dtype=dtype)
    with progress(count, "reading the model") as bar:
        scores = write_gallery(
            generator, seed, count, columns, output, lambda document: bar.advance(document.id)
        )
    for name, value in scores.items():
        say(f"{name}: {value:.3f}")
    say(f"images: {output}")


def oracle(
    images: Annotated[
        int, typer.Option("--images", "--pictures", help="Images, half of train and half of test.", min=2)
    ] = 2000,
    seed: Annotated[int, typer.Option(help="Seed of the images.", min=0)] = 11,
    boards: Annotated[bool, typer.Option(help="Of scenes with boards of random cells.")] = False,
    image_size: Annotated[int, typer.Option(help="Of scenes with boards: 64 or 128.")] = 64,
    model: Model = "storyworld",
    device: Device = "auto",
    dtype: Dtype = "auto",
):
    """Measure how often the oracle errs: on clean images, and on those out of the model's VAE."""
    from mm_interleaved.cli.process import load_quietly
    from mm_interleaved.model_files.resolve import find_model
    from studies.oracle_error import board_errors, oracle_errors

    generator = load_quietly(find_model(model), device=device, dtype=dtype)
    found = (
        board_errors(generator, images, seed, image_size)
        if boards
        else oracle_errors(generator, images, seed)
    )
    for kind, error in found.items():
        say(
            f"{kind}: {error.share_right:.3%} of {error.total.total():,} attributes right; "
            f"{error.images - error.wrong_images:,} of {error.images:,} images wholly"
        )
        for name, number in error.wrong.most_common():
            say(f"  {name}: {number:,} of {error.total[name]:,} wrong")


def judge_free(
    stories: Annotated[
        int, typer.Option(help="Stories of the test split, spoilt to five degrees.", min=10)
    ] = 60,
    seed: Annotated[int, typer.Option(help="Seed of the stories.", min=0)] = 0,
    model: Model = "storyworld",
    device: Device = "auto",
    dtype: Dtype = "auto",
):
    """Rank spoilt stories by the judge-free scores of `evaluate`, and compare with the truth."""
    from mm_interleaved.cli.process import load_quietly
    from mm_interleaved.evaluation.readers import GeneratorReader
    from mm_interleaved.model_files.resolve import find_model
    from studies.judge_free import ENOUGH, SPOILT, agreements

    reader = GeneratorReader(load_quietly(find_model(model), device=device, dtype=dtype))
    with progress(len(SPOILT), "reading the model") as bar:
        for found in agreements(reader, stories, seed):
            bar.advance(found.score)
            verdict = "" if found.correlation >= ENOUGH else f", below {ENOUGH}: no measure of it"
            say(f"{found.score}: {found.correlation:.3f} over {found.num_cases} stories{verdict}")


def disabled_synchronizers(
    output: Annotated[
        Path,
        typer.Option("-o", "--output", help="Folder of the model.", metavar="DIR", callback=folder_to_write),
    ],
    side: Annotated[
        list[str] | None,
        typer.Option(help="language or unet; may be repeated. Default: both.", metavar="SIDE"),
    ] = None,
    model: Model = "storyworld",
):
    """Write a model without its synchronizers, to be evaluated beside the whole one."""
    from mm_interleaved.model_files.resolve import find_model
    from studies.disabled_synchronizers import SIDES, write_without_synchronizers

    sides = tuple(side or SIDES)
    for found in sides:
        if found not in SIDES:
            raise UsageError(f"--side: found {escape(found)!r}, {hint(found, SIDES)}")
    number = write_without_synchronizers(find_model(model), sides, output)
    say(f"{output}: {model} without {number:,} parameters of its synchronizers ({', '.join(sides)})")


def image_detail(
    output: Annotated[
        Path,
        typer.Option(
            "-o", "--output", help="Folder of the trials, RUN.", metavar="DIR", callback=folder_to_write
        ),
    ] = Path("runs/image-detail"),
    trials: Annotated[
        list[str] | None,
        typer.Option("--trial", metavar="NAME", help="Only these; may be repeated. Default: all of the log."),
    ] = None,
    assignments: Settings = None,
    every: Annotated[int, typer.Option(help="Steps between measurements.", min=1)] = 50,
    pairs: Annotated[
        int, typer.Option(help="Held-out pairs of images that each is measured on.", min=3)
    ] = 48,
):
    """Train a small U-Net for some minutes a trial, and measure what it keeps of earlier images.

    Trials that have ended are not run again; `--set` changes numbers of all that are run.
    """
    from mm_interleaved.typed_settings import override
    from studies.image_detail.results import finished, run_in, write_table
    from studies.image_detail.settings import chosen_trials

    for name, settings in chosen_trials(trials or (), output).items():
        if finished(output / name) is not None:
            say(f"{name}: done before, {output / name}")
            continue
        settings = override(settings, assignments or ())
        run_in(
            output / name,
            settings,
            lambda found, name=name: say(f"{name}: {found.line()}"),
            every=every,
            count=pairs,
        )
    say(f"table: {write_table(output, list(chosen_trials((), output)))}")
