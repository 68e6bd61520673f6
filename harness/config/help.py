"""What ``--help`` of a run says: the text of ``conf/hydra/help``, and the options that there are.

Hydra would compose every group for it, which takes it seconds.
"""

from __future__ import annotations

import string
from pathlib import Path

from omegaconf import OmegaConf

from harness.config.places import CONF

TEXT = CONF / "hydra" / "help" / "harness.yaml"


def run_help(config_dir: Path | None = None) -> str:
    """The text, with the options of ``conf/`` and of the user's own ``config_dir``.

    Raises:
        OSError: if ``config_dir`` cannot be read.
    """
    told = OmegaConf.create({"hydra": {"help": OmegaConf.load(TEXT)}}).hydra.help.template
    options = "\n".join(f"{group}: {', '.join(names)}" for group, names in _options(config_dir).items())
    return string.Template(told).substitute(APP_CONFIG_GROUPS=options + "\n")


def _options(config_dir: Path | None) -> dict[str, list[str]]:
    """The options of each group that is not Hydra's own."""
    places = [CONF] if config_dir is None else [CONF, config_dir]
    found: dict[str, set[str]] = {}
    for place in places:
        for path in place.rglob("*.yaml"):
            group = path.parent.relative_to(place).as_posix()
            if group.partition("/")[0] not in (".", "hydra"):
                found.setdefault(group, set()).add(path.stem)
    return {group: sorted(found[group]) for group in sorted(found)}
