"""Modules of 0.1 that lay at the top, or that its README or docs named, by their former names; gone with 0.3.

`import mm_interleaved.document` still works, and warns. A finder at the end of `sys.meta_path` is asked only
for what nobody else has found.
"""

import sys
import warnings
from collections.abc import Sequence
from importlib import import_module
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import MappingProxyType, ModuleType
from typing import Any

MOVED = MappingProxyType(
    {
        f"mm_interleaved.{former}": f"mm_interleaved.{now}"
        for former, now in {
            "batch": "tokens.batch",
            "config": "models.config",
            "conversation": "tokens.chat_messages",
            "data.boxes": "tokens.boxes",
            "data.sources.registry": "data.registry",
            "data.sources.source": "data.source",
            "document": "documents.document",
            "document_formats": "documents.formats",
            "generation_run": "runs.generate",
            "image_references": "documents.image_references",
            "image_sources": "documents.image_sources",
            "images": "documents.images",
            "known_words": "model_files.known_words",
            "layout": "documents.layout",
            "model_source": "generation.loading",
            "placeholders": "documents.placeholders",
            "processing": "tokens.processor",
            "prompts": "tokens.conversation_format",
            "record_rules": "documents.record_rules",
            "registration": "models.registration",
            "run_folder": "runs.folder",
            "run_manifest": "runs.manifest",
            "run_results": "runs.results",
            "sequence": "tokens.sequence",
            "storage": "files",
            "story_page": "runs.page",
            "strict_json": "documents.strict_json",
            "visibility": "tokens.visibility",
            "vocabulary": "tokens.vocabulary",
        }.items()
    }
)

DIVIDED = MappingProxyType(
    {
        "mm_interleaved.conversation": ("mm_interleaved.tokens.text_prompts",),
        "mm_interleaved.document_formats": (
            "mm_interleaved.documents.document_files",
            "mm_interleaved.documents.record_parts",
            "mm_interleaved.documents.forms.obelics",
        ),
        "mm_interleaved.strict_json": ("mm_interleaved.documents.record_files",),
        "mm_interleaved.model_source": (
            "mm_interleaved.generation.defaults",
            "mm_interleaved.model_files.config",
            "mm_interleaved.model_files.hashing",
            "mm_interleaved.model_files.resolve",
        ),
    }
)
"""Where the rest of a former module went that is now several."""


class FormerNames(MetaPathFinder, Loader):
    """Finds a module by its former name and hands out what the module of today holds."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        return ModuleSpec(fullname, self) if fullname in MOVED else None

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return None

    def exec_module(self, module: ModuleType) -> None:
        now = MOVED[module.__name__]
        warnings.warn(
            f"{module.__name__} is {now} since 0.2; the old name goes with 0.3",
            DeprecationWarning,
            stacklevel=2,
        )
        found = [import_module(each) for each in (now, *DIVIDED.get(module.__name__, ()))]

        def find(name: str) -> Any:
            holder = next((each for each in found if hasattr(each, name)), found[0])
            return getattr(holder, name)

        module.__doc__ = found[0].__doc__
        module.__dict__["__getattr__"] = find
        module.__dict__["__dir__"] = lambda: sorted({name for each in found for name in dir(each)})


def keep_former_names() -> None:
    """Once a process."""
    if not any(isinstance(finder, FormerNames) for finder in sys.meta_path):
        sys.meta_path.append(FormerNames())
