"""`limner serve` and `limner deploy`: the service in this process, or on Ray Serve.

Owns the arguments of both. What their options mean, `limner.options`, `limner.server` and `limner.deploy` know.
"""

from __future__ import annotations

import argparse
import sys

from limner.cli.options import Commands, add_options, from_args, open_optional_store, values_of
from limner.cli.parser import add_command
from limner.errors import InvalidRequest, MissingExtra
from limner.options import ListenOptions, ModelOptions, ReplicaOptions, ServeOptions, ServiceOptions, StoreOptions

__all__ = ["add_commands", "deploy", "serve"]


def add_commands(commands: Commands) -> None:
    """Add `serve` and `deploy`."""
    parser = add_command(
        commands,
        "serve",
        help="serve the model over HTTP: two API dialects, references as handles, a page",
        description="Serve the model over HTTP: two API dialects, references as handles, a page at /.",
        examples=(
            "limner serve",
            "limner serve --model klein-9b-kv --port 8000 --store kept",
            "limner serve --keys keys.txt --new-key alice",
            "limner serve --host 0.0.0.0 --keys keys.txt --tls-certificate chain.pem --tls-key key.pem",
        ),
    )
    parser.add_argument("--new-key", metavar="NAME", help="make a key for NAME in the --keys file, print it, and exit")
    add_options(parser, ServeOptions, ModelOptions, StoreOptions)
    parser.set_defaults(run=serve)

    parser = add_command(
        commands,
        "deploy",
        help="serve the model over HTTP by many processes, on Ray Serve",
        description="Serve the model as limner serve does, by replicas on Ray Serve. Needs limner[ray,serve].",
        examples=(
            "limner deploy --replicas 2 --threads 1",
            "limner deploy --address auto --replicas 4 --device cuda --store s3://bucket/kv --keys keys.txt",
        ),
    )
    parser.add_argument(
        "--address",
        default="local",
        metavar="ADDRESS",
        help="local (this machine), auto, or HOST:PORT of a Ray cluster (default: %(default)s)",
    )
    add_options(parser, ReplicaOptions, ListenOptions, ServiceOptions, ModelOptions, StoreOptions)
    parser.set_defaults(run=deploy)


def serve(args: argparse.Namespace) -> None:
    """Serve in this process until a signal, or make a key."""
    if args.new_key is not None:
        _make_key(args.new_key, file=args.keys)
        return
    from limner.engine.about import about_model
    from limner.engine.load import check_model, load_pipeline
    from limner.server.application import check_options
    from limner.server.run import serve

    _check_port(args.port, low=0)
    options = from_args(ServeOptions, args)
    check_options(options)
    model = from_args(ModelOptions, args)
    check_model(model)
    store = open_optional_store(from_args(StoreOptions, args))
    serve(lambda: load_pipeline(model, store=store), options, model_name=model.model_name, about=about_model(model))


def _make_key(name: str, *, file: str | None) -> None:
    from limner.server.access.key_file import add_key

    if file is None:
        raise InvalidRequest("--new-key", "needs --keys FILE, to which its hash is added")
    print(add_key(name, file=file))


def deploy(args: argparse.Namespace) -> None:
    """Serve on Ray Serve until a signal."""
    _check_port(args.port, low=1)
    try:
        from limner.deploy.options import DeployOptions
        from limner.deploy.ray import deploy
    except ImportError as error:
        package = (error.name or "ray").partition(".")[0]
        raise MissingExtra("limner deploy", package=package, extra="ray,serve") from error

    options = DeployOptions.parse(values_of(DeployOptions, args))

    def report_ready(url: str) -> None:
        print(f"limner: {options.model_name} at {url}, {options.replicas} replicas", file=sys.stderr, flush=True)

    deploy(
        options,
        address=args.address,
        host=args.host,
        port=args.port,
        certificate=args.tls_certificate,
        key=args.tls_key,
        ready=report_ready,
    )


def _check_port(port: int, *, low: int) -> None:
    if not low <= port <= 65535:
        raise InvalidRequest("--port", f"{port} is not within {low} to 65535")
