"""The files of the page. All of them come from the package; nothing is loaded from elsewhere."""

from __future__ import annotations

import hashlib
from pathlib import Path

from starlette.requests import Request
from starlette.responses import Response

from edgemoe.errors import shortened
from edgemoe.serve.problems import Problem

__all__ = ["page_file"]

_TYPES = {"html": "text/html", "css": "text/css", "js": "text/javascript", "svg": "image/svg+xml"}


_ROOT = Path(__file__).parent / "page"
_FILES = {
    path.relative_to(_ROOT).as_posix(): path
    for path in _ROOT.rglob("*.*")
    if path.suffix[1:] in _TYPES
}
"""The files, by what follows /page/ in their URLs. No other file is ever read."""


def page_file(request: Request, name: str) -> Response:
    """Returns a file; 304 if the browser has it already.

    Raises:
        Problem: there is no such file.
    """
    path = _FILES.get(name)
    if path is None:
        raise Problem(404, f"there is no {shortened(request.url.path)}")
    content = path.read_bytes()
    headers = {
        "ETag": f'"{hashlib.sha256(content).hexdigest()[:24]}"',
        "Cache-Control": "no-cache",  # checked each time, so that the page fits the server's version
    }
    if request.headers.get("if-none-match") == headers["ETag"]:
        return Response(status_code=304, headers=headers)
    return Response(content, headers=headers, media_type=_TYPES[name.rpartition(".")[2]])
