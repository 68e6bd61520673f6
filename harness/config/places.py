"""Where things are: in a clone beside the package, in an installed wheel within it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

PACKAGE = Path(__file__).resolve().parents[1]
"""The package ``harness``."""

ROOT = PACKAGE.parent
"""The clone; of an installed wheel, the folder that packages are installed in."""

CONF = PACKAGE / "conf" if (PACKAGE / "conf").is_dir() else ROOT / "conf"
"""The configs. A wheel carries them in the package."""

ASSETS = ROOT / "assets"
"""The demo: a model and its clips. In a clone alone: they are no part of the package."""


def asset(path: str) -> str:
    """``${repo:path}`` in a config: ``path`` below the clone. Other relative paths start where the user is."""
    return str(ROOT / path)


def of_demo(path: str | None) -> bool:
    """Whether ``path`` is a file or folder of the demo."""
    return path is not None and Path(path).is_relative_to(ASSETS)


HINTS = {
    "decoder.encoder": " (null: decoder.checkpoint has it)",
    "data.paths": " (data=owl_cache or clips)",
}
"""What to know about a field of one's own files."""


def without_demo(paths: Mapping[str, str | None]) -> str | None:
    """What to do about ``paths``, by field, of the demo, which is not here; ``None`` where nothing has to be done."""
    if ASSETS.is_dir():
        return None
    missing = [field for field, path in paths.items() if of_demo(path)]
    if not missing:
        return None
    return (
        "the demo model is not part of the installed package: run in a clone of the repository, or choose model=smoke, "
        f"or your own {', '.join(field + HINTS.get(field, '') for field in missing)}"
    )
