"""Runs without a model: their request, and what two of them must agree in."""

import json
from pathlib import Path

from echo_generator import load_echo
from PIL import Image as PILImage

from mm_interleaved.documents.document import Document, Image, Text
from mm_interleaved.runs.engine import ModelChoice
from mm_interleaved.runs.generate import RunRequest, run_documents
from mm_interleaved.runs.manifest import read_manifest
from tiny import tiny_config


def nothing(document, event):
    pass


def echo_model(tmp_path: Path) -> Path:
    """A folder that passes for a model's, without weights."""
    folder = tmp_path / "model"
    folder.mkdir()
    config = json.loads(tiny_config().to_json_string(use_diff=False))
    config["generation_settings"] = {"num_inference_steps": 4}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def echo_request(tmp_path: Path, model: Path) -> RunRequest:
    """Four documents: an image that is given, one that is generated, one that fails, one with a target."""
    picture = tmp_path / "given.png"
    PILImage.new("RGB", (9, 7), (200, 30, 40)).save(picture)
    documents = [
        Document(id="a", parts=(Text("A story."), Image(picture)), layout="T I"),
        Document(id="b/ü", parts=(Text("Another."),), layout="I"),
        Document(id="c", parts=(Text("too long"),)),
        Document(id="d", parts=(Text("Last."),), target=(Image(picture),), layout="T"),
    ]
    return RunRequest(
        documents=documents, output=tmp_path / "out", model=ModelChoice(name=str(model), device="cpu")
    )


def run(request: RunRequest):
    return run_documents(request, nothing, load=load_echo)


def contents(folder: Path) -> dict[str, bytes]:
    """Everything that two runs of the same request must agree in."""
    # What a damaged file held is kept beside it, by one of the two only.
    names = [
        path for path in folder.rglob("*") if path.is_file() and not path.name.startswith((".", "damaged-"))
    ]
    return {
        str(path.relative_to(folder)): path.read_bytes() for path in names if path.name != "manifest.json"
    } | {"outputs": json.dumps(read_manifest(folder / "manifest.json")["outputs"]).encode()}
