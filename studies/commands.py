"""What stands behind the claims of the docs, one command each."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from mm_interleaved.cli.command import command
from mm_interleaved.cli.options import Device, Dtype, Model
from mm_interleaved.cli.output import progress, say
from mm_interleaved.cli.places import folder_to_write, image_to_write
from mm_interleaved.documents.document import Document
from mm_interleaved.generation.events import Event

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
    for function in (ablation, scaling, curves, attention_maps, gallery, oracle, census):
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
    documents: Annotated[int, typer.Option(help="Test documents that each twin answers.", min=20)] = 400,
    docs: Docs = None,
):
    """Train the twins that are missing, score them, and write the page about all that are there.

    Run again, it goes on where it was stopped; `--set twins=both-1,neither-1` does some of them alone.
    """
    from mm_interleaved.recipes.run import SETTINGS_NAME, run_recipe
    from mm_interleaved.typed_settings import override
    from studies.ablation.page import write_page
    from studies.ablation.recipe import AblationConfig, chosen_twins
    from studies.ablation.scores import check_documents, score_twins
    from studies.recipes import STUDY_RECIPES

    names = override(AblationConfig(), assignments or ()).twins
    wanted = chosen_twins(names)
    check_documents(output, documents)
    # A run that is resumed keeps its settings; which twins are wanted is told anew each time.
    overrides = [*(assignments or ()), f"twins={','.join(names)}"]
    is_begun = (output / SETTINGS_NAME).exists()
    run_recipe("ablation", overrides, resume=is_begun, out=output, show_progress=True, recipes=STUDY_RECIPES)
    with progress(documents * len(wanted), "reading the models") as bar:

        def on_event(document: Document, event: Event | str):
            if event in ("finished", "failed"):
                bar.advance("")

        score_twins(output, wanted, documents, on_event)
    say(f"page: {write_page(output, chosen_twins(()), docs or output / 'page')}")


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
    """Train three sizes of the same reader, and draw what more compute should give."""
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
    """Draw how the shipped model learned, and count the multiplications that it took."""
    from mm_interleaved.recipes.storyworld.recipe import StoryWorldConfig
    from studies.learning_curves import costs_of, flops_a_step, read_stages, write_curves

    lines = [line for path in logs or [None] for line in read_stages(path)]
    flops = flops_a_step("storyworld", StoryWorldConfig()) if cost else {}
    for part in costs_of(lines, flops):
        took = f", {part.flops_a_step:.2e} FLOPs a step, {part.flops:.2e} in all" if part.flops else ""
        hours = "" if part.hours is None else f", {part.hours:.2f} hours"
        say(f"{part.stage}, {part.run}: {part.steps} steps{took}{hours}")
    say(f"page: {write_curves(lines, flops, output, is_shipped=not logs)}")


def census(
    stories: Annotated[int, typer.Option(help="Stories to compare with each other.", min=1)] = 20000,
    pictures: Annotated[int, typer.Option(help="Pictures to draw against the clock.", min=1)] = 20000,
):
    """Count the world: how many stories it has, how fast it is drawn, whether it is the same everywhere."""
    from mm_interleaved.storyworld.world import SPLITS
    from studies import census as counting

    for split in SPLITS:
        looks, told = counting.count_appearances(split), counting.count_hero_stories(split)
        say(f"{split}: {looks:,} appearances; at least {told:.2e} stories (one hero, nothing on the ground)")
    found = counting.variety(counting.drawn_stories(stories, seed=0))
    say(
        f"of {found.stories:,} stories of train: {found.scenes_and_texts:,} different, "
        f"{found.texts:,} different in words alone, {found.casts:,} different casts; "
        f"{found.pictures:,} different of {found.all_pictures:,} pictures"
    )
    rate = counting.pictures_per_core_second(pictures, seed=0)
    say(f"pictures a second: {rate:,.0f} a core, {16 * rate:,.0f} on sixteen")
    say(f"SHA-256 of 5 documents of each split and task, seed 0: {counting.fingerprint(5, seed=0)}")


def attention_maps(
    output: Annotated[
        Path,
        typer.Option(
            "-o", "--output", help="Folder for the pictures.", metavar="DIR", callback=folder_to_write
        ),
    ],
    story: Annotated[int, typer.Option(help="Which story of StoryWorld's test split.", min=0)] = 0,
    seed: Annotated[int, typer.Option(help="Seed of the stories.", min=0)] = 0,
    model: Model = "storyworld",
    device: Device = "auto",
    dtype: Dtype = "auto",
):
    """Show where the model looks in earlier pictures while it names a badge, and while it paints it."""
    from mm_interleaved.cli.process import load_quietly
    from mm_interleaved.model_files.resolve import find_model
    from studies.attention_pages import show_sight

    numbers = show_sight(load_quietly(find_model(model), device=device, dtype=dtype), seed, story, output)
    word = numbers["word"]
    say(f"{word['question']} {word['answer']} (truth: {word['truth']})")
    for name in ("word", "badge"):
        for number, image in enumerate(numbers[name]["images"], start=1):
            told = ", ".join(f"{key.replace('_', ' ')} {value:.1%}" for key, value in image.items())
            say(f"{name}, image {number}: {told}")
    say(f"pictures: {output / 'word.png'}, {output / 'badge.png'}")


def gallery(
    output: Annotated[
        Path,
        typer.Option("-o", "--output", help="File for the sheet.", metavar="PNG", callback=image_to_write),
    ],
    count: Annotated[
        int, typer.Option(help="How many prompts of the test split, the first ones.", min=1)
    ] = 50,
    columns: Annotated[int, typer.Option(help="Pictures in a row.", min=1)] = 10,
    seed: Annotated[int, typer.Option(help="Seed of the prompts.", min=0)] = 0,
    model: Model = "storyworld",
    device: Device = "auto",
    dtype: Dtype = "auto",
):
    """Paint the first prompts of StoryWorld's test split, and show every picture on one sheet."""
    from mm_interleaved.cli.process import load_quietly
    from mm_interleaved.model_files.resolve import find_model
    from studies.gallery import show_gallery

    generator = load_quietly(find_model(model), device=device, dtype=dtype)
    with progress(count, "reading the model") as bar:
        scores = show_gallery(
            generator, seed, count, columns, output, lambda document: bar.advance(document.id)
        )
    for name, value in scores.items():
        say(f"{name}: {value:.3f}")
    say(f"pictures: {output}")


def oracle(
    pictures: Annotated[int, typer.Option(help="Pictures, half of train and half of test.", min=2)] = 2000,
    seed: Annotated[int, typer.Option(help="Seed of the pictures.", min=0)] = 11,
    model: Model = "storyworld",
    device: Device = "auto",
    dtype: Dtype = "auto",
):
    """Measure how often the oracle errs: on clean pictures, and on those out of the model's VAE."""
    from mm_interleaved.cli.process import load_quietly
    from mm_interleaved.model_files.resolve import find_model
    from studies.oracle_error import oracle_errors

    generator = load_quietly(find_model(model), device=device, dtype=dtype)
    for kind, error in oracle_errors(generator, pictures, seed).items():
        say(
            f"{kind}: {error.share_right:.3%} of {error.total.total():,} attributes right; "
            f"{error.pictures - error.wrong_pictures:,} of {error.pictures:,} pictures wholly"
        )
        for name, number in error.wrong.most_common():
            say(f"  {name}: {number:,} of {error.total[name]:,} wrong")
