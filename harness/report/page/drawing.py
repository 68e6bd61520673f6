"""Pages drawn section by section: one that cannot be drawn says why in its place, and the others are there."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from importlib import resources
from typing import Any, TypeVar

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from harness.entries import entry
from harness.report.page.figures import number, sentence, shown, significant, size, times, typed
from harness.report.sections.formats import spoken

T = TypeVar("T")
SAID = 300
"""Characters of a reason that a page shows."""


@dataclass(frozen=True)
class Section:
    """A part of a page.

    Attributes:
        id: its anchor, and the name of its macro in the page's template.
        title: what a reader calls it.
        view: makes the macro's arguments.
    """

    id: str
    title: str
    view: Callable[[], Mapping[str, Any]]


def draw_page(
    template: str,
    title: str,
    header: Section,
    sections: Sequence[Section],
    nav: Mapping[str, str] | None = None,
) -> str:
    """A whole page, style and script inside, of macros in ``templates/<template>``.

    Args:
        template: file of the macros; one called ``footer`` among them.
        title: of the browser's tab.
        header: what stands above the sections.
        sections: in order.
        nav: links to sections by id, with their names; none if not given.
    """
    macros: Any = _environment().get_template(template).module
    return (
        _environment()
        .get_template("page.html.j2")
        .render(
            title=title,
            header=_drawn(macros, header),
            sections=[_drawn(macros, section) for section in sections],
            footer=macros.footer(),
            nav=list((nav or {}).items()),
            css=_asset("page.css"),
            js=_asset("page.js") + _asset("player.js"),
        )
    )


def _drawn(macros: Any, section: Section) -> Markup:
    try:
        return Markup(getattr(macros, section.id)(**section.view()))
    except Exception as error:  # whatever is wrong with one part of a record, the others are wanted
        return Markup('<section class="card" id="{}"><h2>{}</h2>{}</section>').format(
            section.id, section.title, undrawn("This part", error)
        )


def attempt(what: str, draw: Callable[[], Markup]) -> Markup:
    """What ``draw`` draws, or in its place why it could not be drawn."""
    try:
        return draw()
    except Exception as error:
        return undrawn(what, error)


def each(
    items: Iterable[T], name: Callable[[T], Any], make: Callable[[T], dict[str, Any]]
) -> tuple[list[dict[str, Any]], list[str]]:
    """What ``make`` makes of each item, and what could not be made, by ``name`` and with its reason."""
    made, failed = [], []
    for item in items:
        try:
            made.append(make(item))
        except Exception as error:
            failed.append(f"{name(item)} ({reason(error)})")
    return made, failed


def undrawn(what: str, error: Exception) -> Markup:
    """A note in the place of what could not be drawn."""
    return Markup('<p class="warn undrawn">{} could not be drawn: {}.</p>').format(what, reason(error))


def reason(error: Exception) -> str:
    """An error in a line."""
    said = " ".join(str(error).split())
    return f"{type(error).__name__}: {said[:SAID]}" if said else type(error).__name__


@cache
def _environment() -> Environment:
    environment = Environment(
        loader=PackageLoader("harness.report.page"),
        autoescape=True,  # clip ids, errors and paths are other people's text
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"number": number, "significant": significant, "size": size, "times": times, "shown": shown}
    environment.filters |= {"sentence": sentence, "typed": typed, "spoken": spoken}
    environment.globals["entry"] = entry
    return environment


def _asset(name: str) -> Markup:
    return Markup((resources.files("harness.report.page") / "templates" / name).read_text(encoding="utf-8"))
