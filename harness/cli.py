"""The command ``mx-world``: one sub-command per entry point, imported when it is called.

``mx-world quant=mxfp8_all`` is ``mx-world run quant=mxfp8_all``.
"""

from __future__ import annotations

import sys

from harness import __version__
from harness.start import call, hush, ready, require
from harness.streams import complain, patient

COMMANDS = {
    "run": (
        "harness.run:cli",
        "roll clips out in BF16 and in MX and compare; the default",
    ),
    "ladder": ("harness.ladder.command:cli", "climb to the most aggressive configuration that ships"),
    "gates": ("harness.judge:main", "judge a finished run again, from its record alone"),
    "report": ("harness.commands.report:main", "write a run's or a sweep's page again, from records alone"),
    "export": ("harness.commands.export:main", "write what a run judged as one file to take away"),
    "play": ("harness.play:main", "play a world model live in a browser"),
    "fields": ("harness.config.reference:main", "every field of the config: type, default, allowed values, meaning"),
    "schema": ("harness.report.schema:main", "the JSON schema of a run's record"),
    "bench": ("harness.bench.rollout:main", "rollouts side by side: formats, attention, batch sizes; random weights"),
    "microbench": ("harness.bench.micro:main", "time kernels and attention by themselves"),
    "profile": ("harness.bench.profile:main", "where one frame's time goes, kernel by kernel"),
    "tune": ("harness.bench.tune_layer:main", "search launch shapes of the CUDA kernel for your GPU"),
    "parity": ("harness.bench.parity:main", "compare this package's numbers with outputs of your own code"),
    "world-model": ("harness.bench.world_model:main", "does a checkpoint obey its actions, and beat a repeated frame?"),
}
"""Where each sub-command is, and what it does. It reads its arguments from ``sys.argv`` and may return an exit code."""

WITH_WORDS = ("play",)
"""Sub-commands whose function takes the arguments."""


def usage() -> str:
    """What ``--help`` shows."""
    lines = [f"  {name:12}{text}" for name, (_, text) in COMMANDS.items()]
    return "\n".join(
        [
            "May this world model run in MX formats?",
            "",
            "mx-world COMMAND --help tells more; words such as quant=mxfp8_all alone start a run.",
            "",
            *lines,
            "",
            "  --version   of the product",
        ]
    )


def main() -> None:
    """Call the sub-command that was named."""
    hush()
    arguments = sys.argv[1:]
    if not arguments or arguments[0] in ("-h", "--help"):
        patient(print)(usage())
        return
    if "--version" in arguments:
        print(f"mx-world {__version__}")
        return
    require()
    name = arguments[0] if arguments[0] in COMMANDS else "run"
    if name == "run" and arguments[0].isidentifier() and arguments[0] != "run":
        from harness.config.problems import unknown

        complain(f"{arguments[0]}: {unknown('command', arguments[0], list(COMMANDS))}")
        sys.exit(2)
    # A run in several processes repeats this command in each, so it must mean the same without the sub-command.
    program = sys.argv[0] if name == "run" else f"mx-world {name}"  # as usage lines begin
    sys.argv[:] = [program, *arguments[arguments[0] == name :]]
    sys.exit(call(ready(COMMANDS[name][0]), *([sys.argv[1:]] if name in WITH_WORDS else [])))
