"""GET /: the page, put together from the files in page/ into one document that needs nothing else."""

import base64
import functools
import hashlib
from pathlib import Path

from bitnet_numba.server.exchange import Exchange
from bitnet_numba.server.service import Service

FOLDER = Path(__file__).parent / "page"
STYLES = ("page.css",)
# In the order in which they need one another.
VENDORED = ("vendor/marked.umd.js", "vendor/purify.min.js")
SCRIPTS = (*VENDORED, "store.js", "client.js", "view.js", "embed.js", "chat.js", "page.js")


async def page(service: Service, exchange: Exchange) -> None:
    """The page to talk to the model; needs no key itself."""
    body, policy = assembled()
    headers = {
        "content-security-policy": policy,
        "cache-control": "no-cache",
        "referrer-policy": "no-referrer",
        "x-content-type-options": "nosniff",
        "x-frame-options": "DENY",
    }
    await exchange.respond(body, b"text/html; charset=utf-8", headers=headers)


@functools.cache
def assembled() -> tuple[bytes, str]:
    """The document and its content security policy, which allows exactly the scripts and styles in it."""
    html = _read("index.html")
    hashes: dict[str, list[str]] = {"style": [], "script": []}
    for kind, names in (("style", STYLES), ("script", SCRIPTS)):
        blocks = []
        for name in names:
            text = _read(name)
            if f"</{kind}" in text.lower():
                raise ValueError(f"{name} would end its own block")
            digest = base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
            hashes[kind].append(f"'sha256-{digest}'")
            blocks.append(f"<{kind}>{text}</{kind}>")
        html = html.replace(f"<!-- {kind}s -->", "\n".join(blocks))
    policy = (
        f"default-src 'none'; script-src {' '.join(hashes['script'])}; style-src {' '.join(hashes['style'])}; "
        "connect-src 'self'; img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    )
    return html.encode(), policy


def _read(name: str) -> str:
    return (FOLDER / name).read_text(encoding="utf-8")
