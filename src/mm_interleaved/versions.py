"""Which versions of the libraries are installed, and which were tried.

What was tried stands in one place, the bounds of pyproject.toml, which installed metadata repeats.
"""

import logging
from functools import cache
from importlib import metadata

from packaging.requirements import Requirement
from packaging.version import Version

__version__ = "0.2.0"
"""Of this package; pyproject.toml says the same."""

PACKAGE = "mm-interleaved"

logger = logging.getLogger(__name__)


def installed_version(package: str) -> str | None:
    """The version of an installed distribution, or None; of this package that of the code that runs."""
    if package == PACKAGE:
        return __version__
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def requirements() -> list[Requirement]:
    """What this package asks for, without its extras; nothing where it runs uninstalled."""
    try:
        lines = metadata.requires(PACKAGE) or []
    except metadata.PackageNotFoundError:
        lines = []
    asked = [Requirement(line) for line in lines]
    return [each for each in asked if each.marker is None or each.marker.evaluate({"extra": ""})]


def untried(asked: list[Requirement] | None = None) -> list[str]:
    """A sentence for each installed library that is older or newer than any that was tried."""
    sentences = []
    for requirement in sorted(requirements() if asked is None else asked, key=lambda each: each.name):
        version = installed_version(requirement.name)
        if version is None or requirement.specifier.contains(Version(version).base_version):
            continue
        sentences.append(
            f"{requirement.name} {version} is not among the versions that were tried "
            f"({requirement.specifier}); if something fails, install {PACKAGE} with its constraints.txt"
        )
    return sentences


@cache
def warn_of_untried() -> None:
    """Logs the sentences of `untried`, once a process."""
    for sentence in untried():
        logger.warning("%s", sentence)
