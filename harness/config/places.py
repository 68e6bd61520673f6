"""Where things are: in a clone beside the package, in an installed wheel within it."""

from __future__ import annotations

from collections.abc import Iterable
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


NO_DEMO = (
    "the demo model is not part of the installed package: run in a clone of the repository, or choose model=smoke, or "
    "your own model.config_file, model.checkpoint, decoder.config_file, decoder.checkpoint, data=owl_cache or clips "
    "and data.paths"
)


def lacks_demo(paths: Iterable[str | None]) -> bool:
    """Whether any of ``paths`` is of the demo, which is not here."""
    return not ASSETS.is_dir() and any(Path(path).is_relative_to(ASSETS) for path in paths if path is not None)
