"""The page of the server: one HTML file, which uses its API."""

from __future__ import annotations

import base64
import functools
import hashlib
import re
from importlib import resources

from starlette.requests import Request
from starlette.responses import HTMLResponse


async def page_response(request: Request) -> HTMLResponse:
    """Returns the page. Its policy allows only its own script and style."""
    html, policy = _page()
    headers = {
        "Content-Security-Policy": policy,
        "Cache-Control": "no-cache",
        "Referrer-Policy": "no-referrer",
        "X-Content-Type-Options": "nosniff",
    }
    return HTMLResponse(html, headers=headers)


@functools.cache
def _page():
    html = resources.files(__package__).joinpath("page.html").read_text("utf-8")
    return html, content_security_policy(html)


def content_security_policy(html: str) -> str:
    """Returns a policy that allows the inline script and style of a page, by hash.

    Example:
        >>> policy = content_security_policy("<style>a{}</style><script>1</script>")
        >>> policy.startswith("default-src 'none'; script-src 'sha256-")
        True

    Source: https://www.w3.org/TR/CSP3/
    """
    hashes = {}
    for tag in ("script", "style"):
        (content,) = re.findall(rf"<{tag}>(.*?)</{tag}>", html, re.DOTALL)
        digest = hashlib.sha256(content.encode()).digest()
        hashes[tag] = f"'sha256-{base64.b64encode(digest).decode()}'"
    return (
        f"default-src 'none'; script-src {hashes['script']}; "
        f"style-src {hashes['style']}; connect-src 'self'; img-src data:; "
        "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    )
