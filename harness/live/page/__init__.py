"""The page: HTML, style and script, put together into one document that asks for nothing else."""

from __future__ import annotations

import base64
import hashlib
from dataclasses import dataclass
from importlib.resources import files

PARTS = ("page.html", "page.css", "protocol.js", "input.js", "page.js")


@dataclass(frozen=True)
class Page:
    """The document, and the headers that let it run its own style and scripts and nothing else."""

    html: str
    headers: dict[str, str]

    @classmethod
    def load(cls) -> Page:
        """Read the parts and put them together."""
        folder = files("harness.live.page")
        html, css, *scripts = ((folder / name).read_text(encoding="utf-8") for name in PARTS)
        script = "\n".join(scripts)
        html = html.replace("/*STYLE*/", css).replace("/*SCRIPT*/", script)
        policy = {
            "default-src": "'none'",
            "script-src": _hash(script),
            "style-src": _hash(css),
            "img-src": "blob: data:",
            "connect-src": "'self'",
            "base-uri": "'none'",
            "form-action": "'none'",
            "frame-ancestors": "'none'",
        }
        return cls(
            html,
            {
                "Content-Security-Policy": "; ".join(f"{name} {value}" for name, value in policy.items()),
                "Referrer-Policy": "no-referrer",  # the URL may hold a token
                "X-Content-Type-Options": "nosniff",
                "Cache-Control": "no-store",
            },
        )


def _hash(text: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"
