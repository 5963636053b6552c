"""The README.md of a saved model, as the Hugging Face hub reads it; and how a folder gets onto the hub."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mm_interleaved.files import write_file

CARD = "README.md"
TAGS = ("mm-interleaved", "multimodal", "interleaved", "text-to-image", "image-to-text")
UNKNOWN_LICENSE = "unknown"
PUBLISH_ARGUMENTS = (
    "repo_id", "tags", "api", "private", "token", "commit_message", "commit_description", "revision",
    "create_pr",
)  # fmt: skip
"""What transformers' `save_pretrained` takes for an upload, and ours beside it."""

_USAGE = """\
```
pip install mm-interleaved
mm-interleaved generate --text "A story." --layout "I T I" --model {name} -o out
```

```python
from mm_interleaved import Document, Text
from mm_interleaved.generation.loading import load_generator

generator = load_generator("{name}")
story = generator.generate(Document(id="story", parts=[Text("A story.")]), layout="I T I")
```
"""
_SENTENCE = (
    "A model that reads and writes documents of text and images (MM-Interleaved, arXiv 2401.10208): a "
    "document goes in, a longer one comes out.{only_text}"
)


def model_card(
    config: Mapping[str, Any],
    *,
    name: str | None = None,
    license: str = UNKNOWN_LICENSE,
    tags: Sequence[str] = (),
) -> str:
    """What a folder with a model says of itself.

    Args:
        name: its id on the hub, where it has one.
        config: its configuration, as JSON.
        license: by the hub's name for it; of the weights, which only their owner knows.
        tags: beside `TAGS`.
    """
    from huggingface_hub import ModelCardData

    has_images = config.get("unet_config") is not None
    found = TAGS if has_images else [tag for tag in TAGS if tag != "text-to-image"]
    data = ModelCardData(
        library_name="mm-interleaved",
        license=license,
        pipeline_tag="any-to-any" if has_images else "image-text-to-text",
        tags=list(dict.fromkeys([*found, *tags])),
    )
    sentence = _SENTENCE.format(only_text="" if has_images else " This one writes text only.")
    rows = "\n".join(f"| {what} | {number} |" for what, number in _sizes(config).items())
    return (
        f"---\n{data.to_yaml()}\n---\n\n# {name or 'MM-Interleaved'}\n\n{sentence}\n\n"
        f"| | |\n| --- | --- |\n{rows}\n\n## Use\n\n{_USAGE.format(name=name or 'FOLDER')}"
    )


def write_model_card(
    folder: Path,
    config: Mapping[str, Any],
    *,
    name: str | None = None,
    license: str | None = None,
    tags: Sequence[str] = (),
    source: str = "",
) -> None:
    """Writes a card into a folder that has none.

    Args:
        source: the folder that the model was loaded from; its license is taken over where none is given.
    """
    if (folder / CARD).exists():
        return
    license = license or _license_of(Path(source) / CARD) or UNKNOWN_LICENSE
    text = model_card(config, name=name, license=license, tags=tags)
    write_file(folder / CARD, text.encode())


def publish(
    folder: Path, repo_id: str, *, api: Any = None, private: bool | None = None, **settings: Any
) -> Any:
    """Uploads a folder as a model of the hub, which is made if it is not there.

    Args:
        api: a `huggingface_hub.HfApi`, or what stands for it.
        settings: further arguments of its `upload_folder`: `token`, `commit_message`, `create_pr`, ...

    Returns:
        What `upload_folder` gives: the commit.
    """
    from huggingface_hub import HfApi

    api = api or HfApi(library_name="mm-interleaved")
    token = settings.get("token")
    repo_id = api.create_repo(repo_id, private=private, token=token, exist_ok=True).repo_id
    return api.upload_folder(repo_id=repo_id, folder_path=folder, **settings)


def _sizes(config: Mapping[str, Any]) -> dict[str, Any]:
    text, vision = config.get("text_config") or {}, config.get("vision_config") or {}
    slots = (config.get("slot_resampler") or {}).get("num_queries")
    found = {
        "language model": text.get("model_type"),
        "context, tokens": text.get("max_position_embeddings"),
        "tokens an image": slots,
        "pixels a side, read": vision.get("image_size"),
        "number format": str(config.get("dtype") or "").removeprefix("torch.") or None,
    }
    return {what: number for what, number in found.items() if number is not None}


def _license_of(card: Path) -> str | None:
    from huggingface_hub import ModelCard

    if not card.is_file():
        return None
    try:
        return ModelCard.load(card).data.license
    except ValueError:  # a README without a header, or with one that is no YAML
        return None
