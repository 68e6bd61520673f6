"""The command line of a run: Hydra's options, and what is wrong with them and with the words, before Hydra runs."""

from __future__ import annotations

import argparse
import re
import shlex
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

from hydra._internal.utils import get_args_parser
from hydra.errors import CompactHydraException
from hydra.types import RunMode
from omegaconf import DictConfig

from harness.config.compose import is_sweep, load, use
from harness.config.extras import missing_launcher
from harness.config.problems import ConfigError, nearest


class UserError(CompactHydraException):
    """An error of a job that the user can put right: shown as it is, without a traceback."""


@dataclass(frozen=True)
class Command:
    """What was typed: ``words`` for the config, and Hydra's own options.

    ``composes``: whether its words are for a config in ``conf/``; ``runs``: whether it then runs it, and does not only
    print; ``helps``: whether it prints its help.
    """

    words: list[str]
    multirun: bool
    composes: bool
    runs: bool
    helps: bool
    name: str = "run"
    config_dir: Path | None = None


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise ConfigError(f"{message}; see --help")


def read_command(arguments: Sequence[str]) -> Command:
    """The command line, its options checked.

    Raises:
        ConfigError: naming an option that does not exist, and how to write what was likely meant.
    """
    parser = _Parser(parents=[get_args_parser()], add_help=False, allow_abbrev=False, conflict_handler="resolve")
    known = [option for action in parser._actions for option in action.option_strings]
    for index, word in enumerate(arguments):
        if re.match(r"--?[a-zA-Z]", word) and word.partition("=")[0] not in known:
            raise ConfigError(_no_option(word, arguments[index + 1 :], known))
    options, rest = parser.parse_known_intermixed_args(list(arguments))
    printing = (options.help, options.hydra_help, options.cfg, options.info, options.shell_completion)
    folder = options.config_dir
    return Command(
        words=[*options.overrides, *rest],
        multirun=options.multirun,
        composes=options.config_path is None and options.experimental_rerun is None and not options.shell_completion,
        runs=not any(printing),
        helps=options.help,
        name=options.config_name or "run",
        config_dir=None if folder is None else Path(folder),
    )


def in_hydras_order(arguments: Sequence[str], command: Command) -> list[str]:
    """Options before words: Hydra's parser takes no words behind an option that has some before it."""
    words, options = list(command.words), []
    for word in arguments:
        if word in words:
            words.remove(word)
        else:
            options.append(word)
    return [*options, *command.words]


def _no_option(word: str, rest: Sequence[str], known: Sequence[str]) -> str:
    name, equals, value = word.partition("=")
    plain = name.lstrip("-").replace("-", "_")
    like = nearest(name, known, 0.8)
    if like is not None:
        return f"{word}: no such option; did you mean {like}?"
    if not equals and rest and not rest[0].startswith("-") and "=" not in rest[0]:
        word, value = f"{word} {rest[0]}", rest[0]
    return f"{word}: no such option; groups and fields are words of their own: {shlex.quote(f'{plain}={value}')}"


def check_command(command: Command) -> DictConfig:
    """The config that a command composes (of a sweep: what its jobs have in common), every word of it checked.

    Raises:
        ConfigError: listing what is wrong with the words, files and options; or a folder for the outputs that
            cannot be made.
    """
    if (missing := missing_launcher(command.words)) is not None:
        raise ConfigError(missing)
    cfg = load(command.words, command.name, command.config_dir, sweep=True)
    multirun = command.multirun or cfg.hydra.mode is RunMode.MULTIRUN
    if not multirun and any(map(is_sweep, command.words)):
        cfg = load(command.words, command.name, command.config_dir)  # which refuses it
    use(cfg)
    if not command.runs:
        return cfg
    if multirun:
        check_folder("hydra.sweep.dir", Path(cfg.hydra.sweep.dir))
    else:
        check_folder("hydra.run.dir", Path(cfg.hydra.runtime.output_dir))
    return cfg


def check_folder(name: str, folder: Path) -> None:
    """Whether outputs can be written to ``folder``, which need not be there yet.

    Raises:
        ConfigError: if it, or what it would lie in, is a file or cannot be written.
    """
    there = folder
    while not there.exists() and there != there.parent:
        there = there.parent
    if not there.is_dir():
        raise ConfigError(f"{name}={folder}: {there} is a file; name a folder")
    try:
        tempfile.TemporaryFile(dir=there).close()  # rights do not tell: some file systems refuse whom they let in
    except OSError as error:
        problem = f"{name}={folder}: cannot write to {there} ({error.strerror}); name another folder"
        raise ConfigError(problem) from error
