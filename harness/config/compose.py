"""The one place that composes a config from words, as they are typed on the command line.

The command, sweeps, the ladder, benchmarks, play and Python all come through here, so that all refuse the same.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cache, lru_cache
from pathlib import Path
from typing import Any

import yaml
from hydra._internal.config_loader_impl import ConfigLoaderImpl
from hydra._internal.config_repository import ConfigRepository, IConfigRepository
from hydra._internal.utils import create_config_search_path
from hydra.core.config_search_path import ConfigSearchPath
from hydra.core.config_store import ConfigStore
from hydra.core.default_element import ResultDefault
from hydra.core.hydra_config import HydraConfig
from hydra.core.object_type import ObjectType
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import ValueType
from hydra.core.utils import JobRuntime, setup_globals
from hydra.errors import ConfigCompositionException, HydraException
from hydra.plugins.config_source import ConfigResult, ConfigSource
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf, open_dict
from omegaconf.errors import OmegaConfBaseException

from harness.config.effects import fields_in, told, typed_fields, without_effect
from harness.config.fields import Field, fields_of
from harness.config.places import CONF
from harness.config.problems import LONGEST, ConfigError
from harness.config.schema import SCHEMAS, register
from harness.config.values import unknown_keys
from harness.config.words import Vocabulary, file_problems, word_problems
from harness.files.text import FileError, check_yaml


class ComposedConfig(DictConfig):
    """A composed config that knows what it was composed from: :attr:`hydra` is Hydra's own part of it."""

    def __init__(self, content: Any, hydra: DictConfig) -> None:
        super().__init__(content)
        self.__dict__["hydra_part"] = hydra

    def __deepcopy__(self, memo: dict[int, Any]) -> ComposedConfig:
        plain = super().__deepcopy__(memo)
        return ComposedConfig(plain, self.__dict__["hydra_part"])


def compose(
    *words: str, name: str = "run", folder: str | Path | None = None, config_dir: str | Path | None = None
) -> ComposedConfig:
    """Compose ``conf/<name>.yaml`` with ``words`` such as ``quant=mxfp8_all`` or ``data.limit=2``.

    The config can be changed afterwards (``cfg.data.limit = 1``). Until another one is composed, its
    interpolations of the output folder resolve to this one's.

    Args:
        words: as on the command line.
        name: of the config: ``run`` or ``play``.
        folder: for the outputs; by default what ``hydra.run.dir`` says.
        config_dir: a folder with further options of the groups.

    Raises:
        ConfigError: listing every word, and every line of a YAML file, that names nothing or has a value of
            another type.
    """
    cfg = load(list(words), name, config_dir)
    try:
        use(cfg, folder)
    except OmegaConfBaseException as error:  # an interpolation that leads nowhere, in what names the folder
        raise ConfigError(one_line(error)) from error
    hydra = cfg.hydra
    with open_dict(cfg):
        del cfg["hydra"]
    return ComposedConfig(cfg, hydra)


def choices_of(cfg: DictConfig) -> dict[str, str]:
    """The chosen option of each group, of a config that :func:`compose` made; of any other nothing is known."""
    part = cfg.__dict__.get("hydra_part")
    found = {} if part is None else part.runtime.choices
    return {str(group): str(option) for group, option in found.items() if "hydra/" not in str(group)}


def use(cfg: DictConfig, folder: str | Path | None = None) -> None:
    """Make ``cfg``, a config with Hydra's part, the one that ``${hydra:…}`` refers to, its outputs in ``folder``."""
    instance = HydraConfig.instance()
    OmegaConf.set_readonly(cfg.hydra, False)
    with open_dict(cfg.hydra):
        cfg.hydra.mode = cfg.hydra.mode or RunMode.RUN
        instance.set_config(cfg)  # the folder's name is made of it
        OmegaConf.set_readonly(cfg.hydra, False)
        cfg.hydra.runtime.output_dir = str(Path(folder or cfg.hydra.run.dir).absolute())
    instance.set_config(cfg)


@contextmanager
def in_folder(cfg: DictConfig, folder: Path) -> Iterator[DictConfig]:
    """Hydra's part of ``cfg`` while it runs in ``folder``; before and after, what was in use stays in use."""
    before = HydraConfig.instance().cfg
    part = cfg.__dict__.get("hydra_part")
    whole = DictConfig({})
    if part is None:  # composed by Hydra's own compose(), which keeps nothing of it
        part = load([], "run", None).hydra
        with open_dict(part):
            part.runtime.choices = {}
    whole._set_item_impl("hydra", copy.deepcopy(part))
    try:
        use(whole, folder)
        yield whole.hydra
    finally:
        HydraConfig.instance().cfg = before


def load(words: Sequence[str], name: str, config_dir: str | Path | None = None, sweep: bool = False) -> DictConfig:
    """The composed config with Hydra's part, every word and file checked; ``sweep``: of a multirun's common part.

    A word that changes nothing is refused too, see :mod:`harness.config.effects`.

    Raises:
        ConfigError: see :func:`compose`.
    """
    register()
    setup_globals()
    JobRuntime.instance().set("name", name)
    if config_dir is not None:
        _check_files(Path(config_dir))
    loader = _loader(config_dir)
    try:
        vocabulary = _vocabulary(loader, words, name)
        problems = word_problems(words, vocabulary, sweep)
        if problems:
            raise ConfigError("\n".join(problems))
        single = [word for word in words if not is_sweep(word)]
        for word in _swept(words, vocabulary):
            loader.problems += _problems_with(loader, [*single, word], name, vocabulary)
        loader.vocabulary = vocabulary
        cfg = loader.load_configuration(name, single, RunMode.RUN, from_shell=True)
    except ConfigError:
        raise
    except ConfigCompositionException as error:
        raise ConfigError(_not_set(error, vocabulary)) from error
    except RecursionError as error:
        raise ConfigError("options lead to one another in their defaults without end") from error
    except (HydraException, OmegaConfBaseException, yaml.YAMLError, OSError, ValueError, TypeError) as error:
        raise ConfigError(one_line(error)) from error
    # Hydra itself has one key that its own type has not.
    problems = [problem for problem in unknown_keys(cfg.hydra, "hydra") if not problem.startswith("hydra.env:")]
    if problems:
        raise ConfigError("\n".join(problems))
    if problems := _effect_problems(loader, words, name, cfg):
        raise ConfigError("\n".join([*([] if sweep else _plan_problems(cfg)), *problems]))
    return cfg


def _plan_problems(cfg: DictConfig) -> list[str]:
    """What else is wrong with a composed config: all is told at once."""
    from harness.config.plan import plan_run  # torch, which composing does without

    before, plain = HydraConfig.instance().cfg, copy.deepcopy(cfg)
    try:
        use(copy.deepcopy(cfg), "run")
        with open_dict(plain):
            del plain["hydra"]
        plan_run(plain)
    except ConfigError as error:
        return str(error).splitlines()
    finally:
        HydraConfig.instance().cfg = before
    return []


def _effect_problems(loader: ConfigLoaderImpl, words: Sequence[str], name: str, cfg: DictConfig) -> list[str]:
    """Fields of words, and of experiments, that change nothing: of a sweep, in none of its jobs.

    Each value of a sweep is looked at beside the first ones of the others: what one word turns on, one word shows.
    """
    fields = list(typed_fields(words))
    params = cfg.hydra.sweeper.get("params") or {}
    swept = [word for word in words if is_sweep(word)]
    keys = {word.partition("=")[0].lstrip("+") for word in words}
    swept += [f"{key}={value}" for key, value in params.items() if key not in keys and is_sweep(f"{key}={value}")]
    single = [word for word in words if not is_sweep(word)]
    found: dict[str, str] | None = None
    for picked in _jobs(swept):
        job = [*single, *picked]
        composed = loader.load_configuration(name, job, RunMode.RUN, from_shell=True) if picked else cfg
        chosen = composed.hydra.runtime.choices.get("experiment")
        own = _experiment_fields(loader, job, name) if chosen else ()
        told_here = without_effect([*fields, *own], composed, name)
        found = told_here if found is None else {field: found[field] for field in found if field in told_here}
        if not found:
            return []
    return list(told(found or {}))


def _jobs(swept: Sequence[str]) -> Iterator[list[str]]:
    """The first values of all ``swept`` words, then each further value of one beside the first ones of the others."""
    parser, values = OverridesParser.create(), []
    for word in swept:
        override = parser.parse_override(word)
        if not override.is_discrete_sweep() or override.value_type is ValueType.GLOB_CHOICE_SWEEP:
            return  # its values are not known here
        name = word.partition("=")[0]
        values.append([f"{name}={value}" for value in override.sweep_string_iterator()])
    first = [each[0] for each in values]
    yield first
    for index, each in enumerate(values):
        for word in each[1:]:
            yield [*first[:index], word, *first[index + 1 :]]


def _experiment_fields(loader: ConfigLoaderImpl, words: Sequence[str], name: str) -> Iterator[str]:
    """The fields that the chosen experiment sets itself."""
    _, repo = loader._parse_overrides_and_create_caching_repo(name, list(words))
    for part in loader.compute_defaults_list(name, list(words), RunMode.RUN).defaults:
        path = part.config_path
        if path is not None and path.startswith("experiment/") and (found := repo.load_config(path)) is not None:
            content = OmegaConf.to_container(found.config, resolve=False)
            yield from (field for field in fields_in(content, "") if not field.startswith("hydra."))


def _check_files(folder: Path) -> None:
    """Bound each YAML file of a folder of configs, of which Hydra would build whatever it stands for."""
    problems = []
    for path in sorted(folder.rglob("*.yaml")):
        try:
            check_yaml(path, "a config")
        except FileError as error:
            problems.append(str(error))
    if problems:
        raise ConfigError("\n".join(problems))


def _not_set(error: ConfigCompositionException, vocabulary: Vocabulary) -> str:
    """Of a field in a mapping that the chosen options leave out: it has to be added."""
    added = re.search(r"An item is already at '([^']+)'", str(error))
    if added is not None:
        return f"{added[1]}: it is there already; set it without +: {added[1]}=…"
    found = re.match(r"Could not (?:override|delete) '([^']+)'", str(error))
    if found is None or not vocabulary.known(found[1]):
        return one_line(error)
    return f"{found[1]}: not set by the chosen options, so it has to be added: +{found[1]}=…"


def _swept(words: Sequence[str], vocabulary: Vocabulary) -> Iterator[str]:
    """``group=option`` for each option that a sweep names."""
    for word in filter(is_sweep, words):
        group, _, options = word.partition("=")
        if group in vocabulary.groups:
            yield from (f"{group}={option.strip()}" for option in options.split(",") if option.strip().isidentifier())


@lru_cache(4096)
def is_sweep(word: str) -> bool:
    """Whether ``word``, which is of Hydra's grammar, has several values."""
    return OverridesParser.create().parse_override(word).is_sweep_override()


class _Loader(ConfigLoaderImpl):
    """Checks the files that words choose before they are merged, and copies what merging changes."""

    def __init__(self, path: ConfigSearchPath) -> None:
        super().__init__(path)
        self.repository = _NamingRepository(path)
        self.vocabulary: Vocabulary | None = None
        self.problems: list[str] = []

    def _compose_config_from_defaults_list(self, defaults: list[ResultDefault], repo: IConfigRepository) -> DictConfig:
        if self.vocabulary is not None:
            problems = [*_file_problems(defaults, repo, self.vocabulary), *self.problems]
            if problems:
                raise ConfigError("\n".join(dict.fromkeys(problems)))
        return super()._compose_config_from_defaults_list(defaults, repo)

    def _load_single_config(self, default: ResultDefault, repo: IConfigRepository) -> ConfigResult:
        found = repo.load_config(str(default.config_path))
        if found is not None:
            package = found.header["package"] if default.package is None else default.package
            if default.primary or not package:  # in a package of its own Hydra itself copies it
                found.config = copy.deepcopy(found.config)
        return super()._load_single_config(default, repo)


def _loader(config_dir: str | Path | None) -> _Loader:
    path = create_config_search_path(str(CONF))
    if config_dir is not None:
        if not Path(config_dir).is_dir():
            raise ConfigError(f"{config_dir}: no such folder of configs")
        path.prepend("command-line", f"file://{Path(config_dir).absolute()}")
    return _Loader(path)


_STAMPED: dict[tuple[str, str, str], tuple[Any, ConfigResult]] = {}
"""What this process read, by provider, place and name of a config, and the stamp it had: a sweep, a ladder and a
notebook compose the same files again and again."""


def _stamp(source: ConfigSource, config_path: str) -> Any:
    """What is another once a config is: of a file its time and size, of a schema the schema; Hydra's own stay."""
    name = source._normalize_file_name(config_path)
    if source.scheme() == "structured":
        return ConfigStore.instance()._load(name)
    if source.scheme() != "file":
        return None
    found = Path(source.path, name).stat()
    return (found.st_mtime_ns, found.st_ctime_ns, found.st_size, found.st_ino)


class _NamingRepository(ConfigRepository):
    """Says which file cannot be read, and reads each once, where Hydra begins anew for each of its own passes."""

    def __init__(self, config_search_path: ConfigSearchPath) -> None:
        super().__init__(config_search_path)
        self._read: dict[tuple[str, ...], ConfigResult | None] = {}

    def __deepcopy__(self, memo: dict[int, Any]) -> _NamingRepository:
        made = copy.copy(self)  # with what was read; Hydra copies a repository to give it other places to search
        made.sources = list(self.sources)
        return made

    def load_config(self, config_path: str) -> ConfigResult | None:
        """What was read, shared by all who compose: :class:`_Loader` copies what composing changes."""
        key = (config_path, *(source.path for source in self.sources))
        if key not in self._read:
            self._read[key] = self._stamped(config_path)
        found = copy.copy(self._read[key])
        if found is not None:  # which Hydra fills in
            found.defaults_list = [copy.copy(default) for default in found.defaults_list or ()]
        return found

    def _stamped(self, config_path: str) -> ConfigResult | None:
        source = self._find_object_source(config_path, ObjectType.CONFIG)
        if source is None:
            return None
        key = (source.provider, source.full_path(), config_path)
        stamp = _stamp(source, config_path)
        known = _STAMPED.get(key)
        if known is not None and (known[0] is stamp or known[0] == stamp):
            return known[1]
        read = self._loaded(config_path)
        if read is not None:
            _STAMPED[key] = (stamp, read)
        return read

    def _loaded(self, config_path: str) -> ConfigResult | None:
        try:
            return super().load_config(config_path)
        except yaml.YAMLError as error:
            mark = getattr(error, "problem_mark", None)
            line = "" if mark is None else f", line {mark.line + 1}"
            problem = getattr(error, "problem", None) or one_line(error)
            raise ConfigError(f"{config_path}.yaml{line}: not YAML: {problem}") from error
        except (ValueError, UnicodeDecodeError) as error:
            hint = "; YAML reads on, off, yes and no as true and false: put them in quotes" * ("bool" in str(error))
            raise ConfigError(f"{config_path}.yaml: {one_line(error)}{hint}") from error


def _vocabulary(loader: ConfigLoaderImpl, words: Sequence[str], name: str) -> Vocabulary:
    searched = [word for word in words if word.startswith("hydra.searchpath=")]
    _, repo = loader._parse_overrides_and_create_caching_repo(name, searched)

    def groups(parent: str) -> Iterator[str]:
        for group in repo.get_group_options(parent, ObjectType.GROUP):
            path = f"{parent}/{group}" if parent else group
            yield path
            yield from groups(path)

    options = {group: repo.get_group_options(group, ObjectType.CONFIG) for group in groups("")}
    fields = _fields_by_path(SCHEMAS.get(name, SCHEMAS["run"]))
    return Vocabulary({group: names for group, names in options.items() if names}, fields)


@cache
def _fields_by_path(schema: type) -> dict[str, Field]:
    return {field.path: field for field in fields_of(schema)}


def _problems_with(loader: ConfigLoaderImpl, words: Sequence[str], name: str, vocabulary: Vocabulary) -> list[str]:
    """What is wrong with the config files that these words choose."""
    _, repo = loader._parse_overrides_and_create_caching_repo(name, list(words))
    return _file_problems(loader.compute_defaults_list(name, list(words), RunMode.RUN).defaults, repo, vocabulary)


def _file_problems(defaults: Sequence[ResultDefault], repo: IConfigRepository, vocabulary: Vocabulary) -> list[str]:
    problems = []
    for part in defaults:
        path = part.config_path
        if path is None or path.startswith("hydra") or part.parent is None:
            continue
        found = repo.load_config(path)
        if found is None or found.provider in ("hydra", "schema") or path.endswith("_schema"):
            continue
        if isinstance(found.config, DictConfig):
            problems += file_problems(f"{path}.yaml", part.package or "", found.config, vocabulary)
    return problems


def one_line(error: BaseException) -> str:
    """An error of Hydra's or OmegaConf's without its advice, search path and frames."""
    texts: list[str] = []
    inner: BaseException | None = error
    while inner is not None and len(texts) < 3:
        first = next((line for line in str(inner).splitlines() if line.strip()), "")
        if first and first not in texts:
            texts.append(first)
        inner = inner.__cause__
    told = ": ".join(texts) or type(error).__name__
    if "integer string conversion" in told:  # Python's own words, with advice to a programmer
        return f"a number of thousands of digits; {LONGEST}"
    return told
