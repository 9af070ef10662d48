"""`limner mcp`: the model as tools of an assistant, over stdin and stdout or HTTP on this machine.

Owns its arguments. What the tools are, `limner.mcp` knows.
"""

from __future__ import annotations

import argparse

from limner.cli.options import Commands, add_options, from_args, open_optional_store
from limner.cli.parser import add_command
from limner.errors import InvalidRequest, MissingExtra
from limner.options import ModelOptions, ServiceOptions, StoreOptions

__all__ = ["add_commands", "mcp"]


def add_commands(commands: Commands) -> None:
    """Add `mcp`."""
    parser = add_command(
        commands,
        "mcp",
        help="serve the model as tools of an assistant (Model Context Protocol)",
        description="Serve the model as tools of an assistant, over the Model Context Protocol. Needs limner[mcp].",
        examples=("limner mcp --folder ~/Pictures", "limner mcp --folder ~/Pictures --http 8732"),
    )
    parser.add_argument(
        "--folder", metavar="DIR", help="the folder whose pictures may be named and written; default: none may"
    )
    parser.add_argument(
        "--http", type=int, metavar="PORT", help="serve at http://127.0.0.1:PORT/mcp instead of stdin and stdout"
    )
    add_options(parser, ServiceOptions, only=("fetch_urls",))
    add_options(parser, ModelOptions, StoreOptions)
    parser.set_defaults(run=mcp)


def mcp(args: argparse.Namespace) -> None:
    """Serve until stdin ends, or until a signal."""
    if args.http is not None and not 0 <= args.http <= 65535:
        raise InvalidRequest("--http", f"{args.http} is not within 0 to 65535")
    try:
        from limner.mcp import run
    except ModuleNotFoundError as error:
        raise MissingExtra("limner mcp", package=str(error.name), extra="mcp") from error
    from limner.engine.load import check_model, load_pipeline

    model = from_args(ModelOptions, args)
    check_model(model)
    store = open_optional_store(from_args(StoreOptions, args))
    run(lambda: load_pipeline(model, store=store), folder=args.folder, fetch_urls=args.fetch_urls, port=args.http)
