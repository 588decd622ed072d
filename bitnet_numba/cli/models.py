"""`bitnet-numba models`: what was downloaded by name, and converted."""

import argparse
import json
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from bitnet_numba.checkpoint.packed import open_packed
from bitnet_numba.checkpoint.progress import size_text
from bitnet_numba.commands import complain, make_parser, output
from bitnet_numba.errors import BitNetError, CheckpointError, RequestError, printable
from bitnet_numba.hub import store
from bitnet_numba.hub.fetch import downloaded_gguf, gguf_model, is_gguf
from bitnet_numba.hub.names import KNOWN, HubModel, hub_model
from bitnet_numba.hub.store import StoredModel

NAME_HELP = "a hub id, a short name, or a GGUF file that was converted"
DOWNLOADS = "what was downloaded for it stays in the Hugging Face cache; the command  hf cache  manages that"


def build_parser(prog: str) -> argparse.ArgumentParser:
    """The command line."""
    parser = make_parser(
        prog,
        description="Models that were named by hub id: downloaded, converted and kept in a cache folder, which is "
        "$BITNET_NUMBA_MODELS or, without that, bitnet-numba/models in your cache folder.",
    )
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    listing = commands.add_parser("list", help="all models with size and last use")
    listing.add_argument("--known", action="store_true", help="well-known models of the hub and their short names")
    showing = commands.add_parser("show", help="where a model came from, and what it is")
    removing = commands.add_parser("rm", help="delete models")
    removing.add_argument("names", nargs="+", metavar="NAME", help=NAME_HELP)
    path = commands.add_parser("path", help="print the folder of a model; without NAME, of all models")
    path.add_argument("name", nargs="?", metavar="NAME", help=NAME_HELP)
    showing.add_argument("name", metavar="NAME", help=NAME_HELP)
    for command in (showing, removing, path):
        meaning = "only this revision (default: all)" if command is removing else "its revision (default: main)"
        command.add_argument("--revision", metavar="R", help=meaning)
    for command in (listing, showing):
        command.add_argument("--json", action="store_true", help="print JSON")
    return parser


def run(argv: list[str] | None = None, prog: str = "bitnet-numba models") -> int:
    """The command line; returns the exit code: 0, or 2 for a user's mistake."""
    args = build_parser(prog).parse_args(argv)
    try:
        if args.command == "list":
            return output(prog, _known(args.json) if args.known else _list(args.json))
        if args.command == "show":
            return output(prog, _show(args.name, args.revision, args.json))
        if args.command == "path":
            return output(prog, _path(args.name, args.revision))
        models = [_model(name, args.revision) for name in args.names]
        found = [store.find(model, any_revision=args.revision is None) for model in dict.fromkeys(models)]
        for stored in [stored for of_model in found for stored in of_model]:
            store.remove(stored)
            output(prog, f"deleted {stored.model}, {size_text(stored.nbytes)}\n")
        complain(prog, DOWNLOADS)
    except BitNetError as error:
        complain(prog, str(error))
        return 2
    return 0


def _list(as_json: bool) -> str:
    found = store.stored_models()
    if as_json:
        return json.dumps([_as_json(stored) for stored in found], indent=2) + "\n"
    if not found:
        return f"no models in {printable(str(store.cache_folder()), 400)}; see  bitnet-numba models list --known\n"
    names = {name: short for short, (name, _) in KNOWN.items()}
    rows = [
        (
            stored.model.name,
            stored.model.revision,
            names.get(stored.model.name, ""),
            size_text(stored.nbytes),
            _date(stored.last_used) if stored.complete else "unfinished",
        )
        for stored in found
    ]
    total = size_text(sum(stored.nbytes for stored in found))
    return _table(("MODEL", "REVISION", "SHORT NAME", "SIZE", "LAST USED"), rows) + f"{total} in all\n"


def _known(as_json: bool) -> str:
    if as_json:
        return json.dumps({short: name for short, (name, _) in KNOWN.items()}, indent=2) + "\n"
    rows = [(short, name, f"about {size}") for short, (name, size) in KNOWN.items()]
    return _table(("SHORT NAME", "MODEL", "CONVERTED"), rows)


def _show(name: str, revision: str | None, as_json: bool) -> str:
    stored = _only(name, revision)
    facts = _as_json(stored)
    try:
        checkpoint = open_packed(stored.path)
    except BitNetError as error:
        facts["problem"] = str(error)
    else:
        config = checkpoint.config
        facts |= {
            "layers": config.num_layers,
            "hidden_size": config.hidden_size,
            "vocabulary": config.vocab_size,
            "context": config.max_context,
            "head": checkpoint.head,
        }
    if as_json:
        return json.dumps(facts, indent=2) + "\n"
    facts["nbytes"], facts["last_used"] = size_text(stored.nbytes), _date(stored.last_used)
    facts.pop("notes")
    titles = {"nbytes": "size", "commit": "made from" if stored.model.name.startswith("gguf/") else "commit"}
    lines = [f"{titles.get(key, key).replace('_', ' '):12} {value}" for key, value in facts.items()]
    lines += [f"{'note':12} {note}" for note in stored.notes]
    return "\n".join(lines) + "\n"


def _path(name: str | None, revision: str | None) -> str:
    if name is None:
        return f"{store.cache_folder()}\n"
    return f"{_only(name, revision).path}\n"


def _model(name: str, revision: str | None) -> HubModel:
    """What the cache folder calls the model of that name. Raises BitNetError if it has no name."""
    if not is_gguf(name):
        return hub_model(name, revision)
    found = downloaded_gguf(name, revision)
    if found is None and revision is not None:
        raise RequestError("a revision needs a hub id, not a file")
    return gguf_model(found or Path(name))


def _only(name: str, revision: str | None) -> StoredModel:
    model = _model(name, revision)
    stored = store.find(model)[0]
    if not stored.complete:
        raise CheckpointError(f"{model} is not complete: its conversion was interrupted; using it starts it again")
    return stored


def _as_json(stored: StoredModel) -> dict[str, Any]:
    facts = asdict(stored)
    name, revision = facts.pop("model")
    return {"name": name, "revision": revision, **facts, "path": str(stored.path)}


def _date(seconds: float | None) -> str:
    return "unknown" if seconds is None else time.strftime("%Y-%m-%d %H:%M", time.localtime(seconds))


def _table(titles: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> str:
    widths = [max(len(row[i]) for row in [titles, *rows]) for i in range(len(titles))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in [titles, *rows]]
    return "".join(line.rstrip() + "\n" for line in lines)
