"""Where things are: in a clone beside the package, in an installed wheel within it."""

from __future__ import annotations

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


def missing_file(path: str | Path) -> str:
    """What to say of a file or folder that is not there, and what to do about it."""
    if not ASSETS.is_dir() and Path(path).is_relative_to(ASSETS):
        return (
            "the demo model is not part of the installed package; get a clone of the repository and run there, or "
            "choose model=smoke, or your own model.checkpoint, decoder.checkpoint and data.paths"
        )
    return "no such file" if not Path(path).exists() else "not a file"
