"""`limner refs`: packs of K/V and stores: inspect, pack, warm, ls, rm, verify.

Owns what is printed of packs and entries. What a store does with them, `limner.store` knows.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from limner.cli.draw import prepare
from limner.cli.options import Commands, add_json, add_options, from_args, open_store
from limner.cli.output import print_result
from limner.cli.parser import add_command
from limner.errors import InvalidRequest, OutputError, RemoteError
from limner.options import ModelOptions, ReferenceOptions, StoreOptions

if TYPE_CHECKING:
    from limner.references import References
    from limner.store import ReferenceStore

__all__ = ["add_commands", "refs_inspect", "refs_ls", "refs_pack", "refs_rm", "refs_verify", "refs_warm"]


_EXAMPLES = {
    "inspect": ("limner refs inspect beach.png cat.png", "limner refs inspect cast.safetensors"),
    "pack": ("limner refs pack beach.png cat.png -o cast.safetensors",),
    "warm": ("limner refs warm beach.png cat.png --store kept --pin",),
    "ls": ("limner refs ls --store kept",),
    "rm": ("limner refs rm 3f2a9c81 --store kept",),
    "verify": ("limner refs verify cast.safetensors", "limner refs verify --store kept"),
}


def add_commands(commands: Commands) -> None:
    """Add `refs` and its commands."""
    refs = commands.add_parser("refs", help="K/V of references: packs and stores", description="K/V of references.")
    own = refs.add_subparsers(dest="refs_command", metavar="COMMAND", required=True)

    def add(name: str, summary: str, run: Callable[[argparse.Namespace], int | None]) -> argparse.ArgumentParser:
        description = f"{summary[0].upper()}{summary[1:]}."
        parser = add_command(own, name, help=summary, description=description, examples=_EXAMPLES[name])
        parser.set_defaults(run=run)
        add_json(parser)
        return parser

    parser = add(
        "inspect", "what becomes of pictures as references (in this order), or what a pack holds", refs_inspect
    )
    parser.add_argument("file", nargs="+", metavar="FILE", help="pictures, or one pack (.safetensors)")
    add_options(parser, ModelOptions, only=("model", *ReferenceOptions.__dataclass_fields__))

    parser = add("pack", "compute the K/V of pictures (in this order) and write them to a pack", refs_pack)
    parser.add_argument("file", nargs="+", metavar="FILE", help="pictures: image 1, 2, ...")
    parser.add_argument("-o", "--output", required=True, metavar="PACK", help="file to write, .safetensors")
    add_options(parser, ModelOptions)

    parser = add("warm", "compute the K/V of pictures (in this order) and keep them in a store", refs_warm)
    parser.add_argument("file", nargs="+", metavar="FILE", help="pictures: image 1, 2, ...")
    parser.add_argument("--pin", action="store_true", help="keep them from eviction")
    add_options(parser, ModelOptions, StoreOptions)

    parser = add("ls", "list what a store holds, the least recently used first", refs_ls)
    add_options(parser, StoreOptions, only=("store",))

    parser = add("rm", "remove entries of a store", refs_rm)
    parser.add_argument("key", nargs="+", metavar="KEY", help="content keys, or their first 8 or more digits")
    add_options(parser, StoreOptions, only=("store", "store_cache"))

    parser = add("verify", "read packs, or every entry of a store; exit code 1 if one is damaged", refs_verify)
    parser.add_argument("file", nargs="*", metavar="PACK", help="packs; default: those of the store")
    add_options(parser, StoreOptions, only=("store",))


def refs_inspect(args: argparse.Namespace) -> None:
    """Print what becomes of pictures as references, or what a pack holds."""
    from limner.images import printable

    if any(Path(file).suffix == ".safetensors" for file in args.file):
        found, names, reports = _inspect_pack(args)
    else:
        found, names, reports = _inspect_pictures(args)
    found["references"] = [{"name": name, **report.as_json()} for name, report in zip(names, reports, strict=True)]
    if args.json:
        print(json.dumps(found))
        return
    for name, report in zip(names, reports, strict=True):
        print(f"{printable(name)}: {report.describe()}; digest {report.digest[:16]}")
    for name, value in found.items():
        if name != "references":
            print(f"{name}: {value}")


def _inspect_pack(args: argparse.Namespace) -> tuple[dict[str, Any], list[str], tuple[Any, ...]]:
    from limner.references import References

    if len(args.file) > 1:
        raise InvalidRequest("FILE", f"{len(args.file)} files, one of them a pack; inspect packs one at a time")
    refs = References.load(args.file[0])
    found = {
        "key": refs.key,
        "weights": refs.weights,
        "dtype": str(refs.dtype).removeprefix("torch."),
        "kernel": refs.kernel,
        "quantization": refs.quantization,
        "shard": refs.shard,
        "prefill_seconds": refs.prefill_seconds,
        "num_tokens": refs.num_tokens,
        "nbytes": refs.nbytes,
    }
    return found, [f"image {i}" for i in range(1, len(refs.reports) + 1)], refs.reports


def _inspect_pictures(args: argparse.Namespace) -> tuple[dict[str, Any], list[str], tuple[Any, ...]]:
    from limner.config import TransformerConfig
    from limner.grid import num_tokens
    from limner.weights.folder import read_json, resolve_model

    reports = tuple(one.report for one in prepare(args.file, from_args(ModelOptions, args)))
    config = TransformerConfig.from_diffusers(read_json(resolve_model(args.model) / "transformer" / "config.json"))
    tokens = num_tokens(*(report.processed_size for report in reports))
    found = {"num_tokens": tokens, "nbytes_bfloat16": tokens * config.num_layers * 2 * config.width * 2}
    return found, list(args.file), reports


def refs_pack(args: argparse.Namespace) -> None:
    """Compute the K/V of pictures and write them to a pack."""
    path = Path(args.output)
    if path.suffix != ".safetensors":
        raise InvalidRequest("--output", f"{path.name} does not end in .safetensors; name the pack so")
    if not path.parent.is_dir():
        raise InvalidRequest("--output", f"{path.parent} is not a folder; make it first")
    refs = _prefill(args)
    refs.save(path)
    found = {"file": str(path), **_describe(refs)}
    print_result(args, found, f"{path}: {len(refs.reports)} references, {refs.num_tokens} tokens, {refs.nbytes} bytes")


def refs_warm(args: argparse.Namespace) -> None:
    """Compute the K/V of pictures and keep them in a store."""
    from limner.places import without_credentials

    store = open_store(from_args(StoreOptions, args))
    refs = _prefill(args, store)
    store.put(refs)
    store.flush()
    if not store.outlives(refs.key):
        if (error := store.upload_error(refs.key)) is not None:
            raise RemoteError(f"--store: {error}")
        raise OutputError(
            f"--store: {without_credentials(args.store)} did not take {refs.nbytes} bytes; free some space, unpin entries, "
            "raise --store-bytes or give another place"
        )
    if args.pin:
        store.pin(refs.key)
    print_result(args, _describe(refs), f"{refs.key}: {len(refs.reports)} references, {refs.num_tokens} tokens")


def _prefill(args: argparse.Namespace, store: ReferenceStore | None = None) -> References:
    from limner.engine.load import check_model, load_pipeline

    options = from_args(ModelOptions, args)
    prepared = prepare(args.file, options)
    check_model(options)
    return load_pipeline(options, store=store).prefill(prepared)


def _describe(refs: References) -> dict[str, Any]:
    return {
        "key": refs.key,
        "num_references": len(refs.reports),
        "num_tokens": refs.num_tokens,
        "nbytes": refs.nbytes,
        "prefill_seconds": round(refs.prefill_seconds, 4),
    }


def refs_ls(args: argparse.Namespace) -> None:
    """List what a store holds."""
    entries = list(open_store(from_args(StoreOptions, args), make=False).entries())
    if args.json:
        print(json.dumps({"entries": [asdict(entry) for entry in entries]}))
        return
    for entry in entries:
        when = time.strftime("%Y-%m-%d %H:%M", time.localtime(entry.used))
        holds = f"{entry.num_references} references  {entry.num_tokens} tokens" if not entry.problem else "damaged"
        what = "written" if entry.tier == "remote" else "used"
        print(f"{entry.key}  {holds}  {entry.nbytes} bytes  {what} {when}" + ("  pinned" if entry.pinned else ""))


def refs_rm(args: argparse.Namespace) -> None:
    """Remove entries of a store."""
    from limner.places import without_credentials

    store = open_store(from_args(StoreOptions, args), make=False)
    keys = store.keys()
    chosen = []
    for prefix in args.key:
        found = [key for key in keys if key.startswith(prefix)] if len(prefix) >= 8 else []
        if len(found) != 1:
            raise InvalidRequest(
                "KEY",
                f"{prefix!r} is the start of {len(found)} keys in {without_credentials(args.store)}; give 8 digits or more "
                "of one",
            )
        chosen += found
    for key in chosen:
        store.remove(key)
    print_result(args, {"removed": chosen}, "\n".join(f"removed {key}" for key in chosen))


def refs_verify(args: argparse.Namespace) -> int:
    """Read packs, or every entry of a store; return 1 if one is damaged."""
    from limner.references import References

    found: dict[str, str | None] = {}
    if args.file:
        for file in args.file:
            try:
                References.load(file)
                found[file] = None
            except InvalidRequest as error:
                found[file] = str(error)
    else:
        found = open_store(from_args(StoreOptions, args), make=False).verify()
    lines = [f"{name}: {'whole' if problem is None else problem}" for name, problem in found.items()]
    print_result(args, {"files": found}, "\n".join(lines) or "nothing to verify")
    return int(any(found.values()))
