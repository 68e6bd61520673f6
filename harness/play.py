"""Play a world model live in a browser, in BF16 and in the candidate formats.

python harness/play.py model=doom quant=mxfp4_mlp
"""

from __future__ import annotations

import importlib.util
import logging
import sys
from collections.abc import Sequence
from pathlib import Path

if __name__ == "__main__":
    # Started as a file, Python looks for modules beside it first, where our rooms would pass for top-level packages.
    sys.path[0] = str(Path(__file__).resolve().parents[1])
    from harness.start import call, hush, require

    hush()
    require()

from harness.imports import import_lightning
from harness.streams import complain
from harness.threads import share_arenas

NEEDED = ("starlette", "uvicorn", "wsproto", "simplejpeg")
HELP = """\
Play a world model live in a browser, in BF16 and in the candidate formats side by side.

  python harness/play.py model=doom quant=mxfp4_mlp

Words are those of a run: model, quant, kv, attention, compile, data, trainer and their fields. They are listed by

  python harness/run.py --help

And those of play, with their defaults (harness/config/play.py says what each is):

{fields}

Ctrl-C ends it. docs/play.md describes the page, the protocol and the API for programs."""


def missing_packages() -> str | None:
    """What to install before anything can be served; None if nothing."""
    missing = [name for name in NEEDED if importlib.util.find_spec(name) is None]
    if not missing:
        return None
    return f"play needs {', '.join(missing)}; install the extra [play], such as pip install -e '.[play]'"


def describe() -> str:
    """The help text."""
    from dataclasses import fields

    from harness.config.play import PlayConf
    from harness.entries import spelt

    rows = [f"  play.{item.name}={_word(getattr(PlayConf(), item.name))}" for item in fields(PlayConf)]
    return spelt(HELP.format(fields="\n".join(rows)))


def _word(value: object) -> str:
    value = getattr(value, "value", value)
    return "null" if value is None else str(value)


def main(words: Sequence[str]) -> int:
    """Load the model and serve it until Ctrl-C.

    Returns:
        Exit code: 0 after Ctrl-C, 2 if something in the command, the config or the files is wrong.
    """
    if {"-h", "--help"} & set(words):
        print(describe())
        return 0
    if (problem := missing_packages()) is not None:
        complain(problem)
        return 2
    from hydra.errors import HydraException

    from harness.config.compose import compose
    from harness.config.play import register_play

    try:
        register_play()
        compose(*words, name="play")  # a misspelt word is told before torch is imported
    except ValueError as error:
        complain(error)
        return 2
    share_arenas()
    import_lightning()
    from harness.live.process import settle_threads
    from harness.live.server import Game, run_server
    from harness.session.open import load_play

    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    try:
        engine, conf, labels = load_play(words)
        settle_threads(engine)
        game = Game.of(engine, conf, labels, words)
        for name, arm in engine.arms.items():
            print(
                f"{labels[name]}: {arm.summary.numeric_path}" + (f"; {arm.kept.note}" if arm.summary.emulated else "")
            )
        run_server(game)
    except (ValueError, OSError, HydraException) as error:
        complain(error)
        return 2
    except KeyboardInterrupt:
        pass
    return 0


if __name__ == "__main__":
    sys.exit(call(main, sys.argv[1:]))
