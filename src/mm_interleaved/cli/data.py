"""`data`: check documents, rewrite them, make StoryWorld data."""

from __future__ import annotations

import atexit
import json
import os
import shutil
import tempfile
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mm_interleaved.cli.command import CommandGroup, command
from mm_interleaved.cli.output import progress, say, say_error
from mm_interleaved.cli.report import SOME_FAILED
from mm_interleaved.documents.record_files import STANDARD_INPUT, is_lines, standard_input
from mm_interleaved.errors import InputError, StorageError, UsageError, escape
from mm_interleaved.spelling import counted, hint

if TYPE_CHECKING:
    from mm_interleaved.data.check import CountTokens, Inspection
    from mm_interleaved.data.check_report import Report
    from mm_interleaved.data.source import Shard, Source
    from mm_interleaved.tokens.processor import MMInterleavedProcessor

Form = Annotated[
    str | None,
    typer.Option("--format", help="mmc4, webdataset, captions, vqa ... (default: found from the file)."),
]
ImageRoot = Annotated[
    str | None,
    typer.Option(help="Images may lie here and below; also an address, or .tar files.", metavar="DIR"),
]
Settings = Annotated[
    list[str] | None,
    typer.Option("--set", help="A setting of the format, such as min_similarity=0.3.", metavar="NAME=VALUE"),
]


def add_to(app: typer.Typer):
    """Register the commands of this file."""
    data = typer.Typer(cls=CommandGroup, help="Check, convert and make documents.", no_args_is_help=True)
    for name, function in (("check", check), ("convert", convert), ("storyworld", storyworld)):
        command(data, name)(function)
    app.add_typer(data, name="data", rich_help_panel="Data, training, evaluation")


def check(
    paths: Annotated[
        list[str],
        typer.Argument(metavar="FILE...", help="Files, globs, addresses; each is reported by itself."),
    ],
    form: Form = None,
    image_root: ImageRoot = None,
    settings: Settings = None,
    page: Annotated[
        Path | None, typer.Option(help="Write a contact sheet with the histograms.", metavar="HTML")
    ] = None,
    model: Annotated[
        str, typer.Option(help="Whose tokens are counted; none counts no tokens.")
    ] = "storyworld",
    limit: Annotated[int | None, typer.Option(min=1, help="Read so many items of each shard.")] = None,
    opens_images: Annotated[
        bool, typer.Option("--open-images/--no-open-images", help="Open each image.")
    ] = True,
    writes_manifest: Annotated[
        bool,
        typer.Option("--write-manifest", help="Write shards.json: sizes and hashes that readers then check."),
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="The figures as JSON, a line a FILE.")] = False,
) -> int:
    """Check data of any format, open every image; report what is there and what is wrong.

    Every file is read. Ends with 3 if one of them is no file of documents or has a broken item, else
    with 7 if an image cannot be opened, else with 0; with 6 if a storage failed. What is broken is named,
    equal faults once with their number; fields that nothing uses and markup for images that matches none
    are counted by name. FILE may be - for what is piped in.
    """
    from mm_interleaved.data.check import Inspection
    from mm_interleaved.data.check_page import render_contact_sheet
    from mm_interleaved.files import make_folder, write_file

    count_tokens = None if model == "none" else _token_counter(model)
    inspections = [
        Inspection(path, count_tokens=count_tokens, opens_images=opens_images, max_items=limit)
        for path in paths
    ]
    endings: set[int] = set()
    for inspection in inspections:
        try:
            shards = _inspect(inspection, form, image_root, settings)
        except (InputError, StorageError) as error:
            say_error(str(error))
            endings.add(error.exit_code)
            continue
        if writes_manifest and not inspection.report.broken:
            _write_manifests([shard.name for shard in shards])
        endings.add(_ending(inspection.report))
        report = inspection.report
        say(json.dumps(report.to_json(), ensure_ascii=False) if as_json else _report_text(report))
    seen = [inspection.report for inspection in inspections if inspection.is_finished]
    if page is not None and seen:
        make_folder(page.parent)
        write_file(page, render_contact_sheet(seen))
        say(f"{page}: contact sheet")
    worst_first = (StorageError.exit_code, InputError.exit_code, SOME_FAILED, 0)
    return next(code for code in worst_first if code in endings)


def _ending(report: Report) -> int:
    """The exit code for one FILE."""
    if not (report.num_documents or report.num_broken or report.filtered):
        say_error(f"{report.name}: found no document, expected at least one")
        return InputError.exit_code
    if report.num_broken:
        return InputError.exit_code
    return SOME_FAILED if report.num_broken_images else 0


def convert(
    source: Annotated[
        str, typer.Argument(metavar="INPUT", help="A file, glob or address of any format; - is piped in.")
    ],
    out: Annotated[Path, typer.Argument(metavar="OUT", help="The canonical .jsonl to write.")],
    form: Form = None,
    image_root: ImageRoot = None,
    settings: Settings = None,
    refers_to_images: Annotated[
        bool,
        typer.Option(
            "--refer-to-images", help="Name images where they are; otherwise they are copied beside OUT."
        ),
    ] = False,
    skips_broken: Annotated[
        bool, typer.Option("--skip-broken", help="Leave out what is broken, naming it, and end with 7.")
    ] = False,
) -> int:
    """Rewrite data in the canonical form, one document a line.

    Formats pororosv-pickles, flintstonessv-pickles and refcoco-pickles take the folder of the published,
    pickled annotations and write lines for the formats pororosv, flintstonessv and refcoco; of RefCOCO's
    two files of references --set split_by=unc (google, umd) takes one.
    """
    from mm_interleaved.data.check_report import Faults
    from mm_interleaved.data.convert import convert_source, write_lines
    from mm_interleaved.data.pickled_annotations import PICKLED, unpickled_records
    from mm_interleaved.data.source import BrokenItem, shards_of

    if form is not None and form in PICKLED:
        records = unpickled_records(form, Path(source), _settings(settings))
        say(f"{out}: {write_lines(out, records)} lines")
        return 0
    made = _source(source, form, image_root, settings)
    shards = shards_of(made)
    if os.path.realpath(out) in {os.path.realpath(shard.name) for shard in shards}:
        raise UsageError(f"{out}: is what is read, expected another file to write", field="out")
    faults = Faults()
    with progress(_num_items(shards, None), source) as bar:

        def report(item: Any):
            if isinstance(item, BrokenItem):
                faults.add(item)
            bar.advance(source)

        done = convert_source(
            made, out, shards, copies_images=not refers_to_images, skips_broken=skips_broken, report=report
        )
    for fault in faults:
        say_error(str(fault))
    figures = [f"{out}: {counted(done.num_documents, 'document')}"]
    figures += [f"{count} left out ({rule})" for rule, count in sorted(done.filtered.items())]
    figures += [f"{done.num_renamed} with an id that was taken"] if done.num_renamed else []
    figures += [f"{done.num_broken} broken"] if done.num_broken else []
    say(", ".join(figures))
    return SOME_FAILED if done.num_broken else 0


def storyworld(
    out: Annotated[Path, typer.Argument(metavar="OUT", help="New folder.")],
    documents: Annotated[int, typer.Option(min=1, help="How many.")] = 120,
    seed: Annotated[int, typer.Option(min=0, help="Another seed, other documents.")] = 0,
    split: Annotated[str, typer.Option(help="train, validation or test; they share no image.")] = "test",
    form: Annotated[
        str, typer.Option("--format", help="jsonl, mmc4, obelics, llava, coco, vqav2, annt, webdataset ...")
    ] = "jsonl",
    task: Annotated[
        list[str] | None,
        typer.Option(help="Only these, in turn; may be repeated. detail_...: boards of random cells."),
    ] = None,
    image_size: Annotated[int, typer.Option(help="64; or 128 where all tasks are detail_....")] = 64,
):
    """Make fresh StoryWorld documents over all tasks."""
    from mm_interleaved.storyworld.catalogue import ALL_TASKS, document_of
    from mm_interleaved.storyworld.exports import EXPORTS, write_storyworld
    from mm_interleaved.storyworld.world import SPLITS

    if form not in EXPORTS:
        raise UsageError(f"--format: found {escape(form)!r}, {hint(form, EXPORTS)}", field="format")
    if split not in SPLITS:
        raise UsageError(f"--split: found {escape(split)!r}, {hint(split, SPLITS)}", field="split")
    for name in task or ():
        if name not in ALL_TASKS:
            raise UsageError(f"--task: found {escape(name)!r}, {hint(name, ALL_TASKS)}", field="task")
    if task and form != "jsonl":
        raise UsageError(f"--task: the format {form} says itself which tasks it holds", field="task")
    try:
        for name in task or (None,):
            document_of(split, seed, 0, name, image_size)
    except ValueError as error:
        raise UsageError(f"--image-size: {error}", field="image_size") from error
    path = write_storyworld(out, documents, seed, split, form, task or (), image_size)
    say(f"{path}: {counted(documents, 'document')} of the {split} split")


def _source(path: str, form: str | None, image_root: str | None, settings: list[str] | None) -> Source:
    """The source of files; where no format is given, the one that the first file is for."""
    from mm_interleaved.data.registry import make_source, source_name_of
    from mm_interleaved.data.storage.files import found_files

    if path == STANDARD_INPUT:
        # Sources read their files more than once.
        path, image_root = _spooled(), image_root or os.curdir
    given: dict[str, Any] = {"paths": path, **_settings(settings)}
    name = form or source_name_of(found_files(path)[0])
    if image_root is not None and name != "webdataset":
        given["images"] = image_root
    return make_source(name, given)


@cache
def _spooled() -> str:
    """What is piped in, as a file that is there as long as this process."""
    data = standard_input()
    folder = tempfile.mkdtemp(prefix="mm-interleaved-input-")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    path = Path(folder, "stdin.jsonl" if is_lines(data) else "stdin.json")
    path.write_bytes(data)
    _write_manifest(folder, [str(path)])
    return str(path)


def _settings(settings: list[str] | None) -> dict[str, Any]:
    """What --set gives, by name."""
    given: dict[str, Any] = {}
    for setting in settings or ():
        name, equals, value = setting.partition("=")
        if not equals:
            raise UsageError(f"--set: found {setting!r}, expected NAME=VALUE", field="set")
        given[name.replace("-", "_")] = _value(value)
    return given


def _value(text: str) -> Any:
    """A value of JSON, or a string."""
    try:
        return json.loads(text)
    except ValueError:
        return text


def _inspect(
    inspection: Inspection, form: str | None, image_root: str | None, settings: list[str] | None
) -> list[Shard]:
    """All items of a FILE; then what is broken is named, equal faults once. Returns its shards."""
    from mm_interleaved.data.source import shards_of

    source = _source(inspection.report.name, form, image_root, settings)
    shards = shards_of(source)
    try:
        with progress(_num_items(shards, inspection.max_items), inspection.report.name) as bar:
            for _ in inspection.items(source, shards):
                documents = counted(inspection.report.num_documents, "document")
                bar.advance(f"{inspection.report.name}: {documents}")
    finally:
        for fault in inspection.report.faults:
            say_error(str(fault))
    return shards


def _num_items(shards: list[Shard], limit: int | None) -> int | None:
    counts = [shard.num_items for shard in shards]
    known = [count if limit is None else min(count, limit) for count in counts if count is not None]
    return sum(known) if len(known) == len(counts) else None


def _token_counter(model: str) -> CountTokens:
    """Counts the tokens that a model makes of a document, its target and end included.

    The tokenizer is loaded when the first document is there.
    """

    @cache
    def processor() -> MMInterleavedProcessor:
        from transformers.utils import logging as transformers_logging

        from mm_interleaved.model_files.resolve import find_model
        from mm_interleaved.tokens.processor import MMInterleavedProcessor

        # It warns of a model type that it need not know, to find the tokenizer.
        transformers_logging.set_verbosity_error()
        return MMInterleavedProcessor.from_pretrained(find_model(model))

    return lambda document: len(processor().encode(document, eos=True, include_target=True))


def _report_text(report: Report) -> str:
    from mm_interleaved.data.distributions import summary

    totals = (
        counted(report.num_documents, "document"),
        counted(report.num_texts, "text"),
        counted(report.num_images, "image"),
    )
    counts = (
        (report.num_broken, "broken item", ""),
        (report.num_broken_images, "image", " that cannot be opened"),
        (report.num_missing_images, "missing image", ""),
        (report.num_repeated_images, "image", " repeated under other names"),
    )
    lines = [
        f"{report.name}: {', '.join(totals)}",
        *(f"  {count:>9,} {noun}{'' if count == 1 else 's'}{rest}" for count, noun, rest in counts if count),
        *(f"  {count:>9,} left out ({rule})" for rule, count in sorted(report.filtered.items()) if count),
        *(
            f"  {found.count:>9,} with {remark} (first: {found.first})"
            for remark, found in report.remarks.items()
        ),
    ]
    histograms = (
        (report.tokens, "tokens a document"),
        (report.images_a_document, "images a document"),
        (report.shorter_sides, "pixels of the shorter side"),
    )
    for distribution, words in histograms:
        if figures := summary(distribution):
            numbers = ", ".join(f"{name} {value:,.0f}" for name, value in figures.items())
            lines.append(f"  {words}: {numbers}")
    return "\n".join(lines)


def _write_manifests(paths: list[str]):
    """A `shards.json` into each folder of local files, all of them sound."""
    from mm_interleaved.data.storage.files import folder_of, is_address
    from mm_interleaved.data.storage.manifests import MANIFEST

    for folder in dict.fromkeys(map(folder_of, paths)):
        if is_address(folder):
            raise UsageError(f"--write-manifest: {folder} is no local folder", field="write_manifest")
        inside = [path for path in paths if folder_of(path) == folder]
        _write_manifest(folder, inside)
        say(f"{Path(folder, MANIFEST)}: {len(inside)} files")


def _write_manifest(folder: str, paths: list[str]):
    from mm_interleaved.data.storage.manifests import MANIFEST, manifest_bytes, manifest_of
    from mm_interleaved.files import write_file

    write_file(Path(folder, MANIFEST), manifest_bytes(manifest_of(folder, paths)))
