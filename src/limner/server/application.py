"""From the options of a service to its application: keys, checks, limits and the signer that they name.

Owns what each option means to `create_app`, and which combinations are refused. Knows no sockets, signals or models.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from limner.engine.about import ModelAbout
from limner.errors import InvalidRequest, MissingExtra
from limner.options import MAX_MODEL_NAME, ServeOptions, ServiceOptions, default_data
from limner.outbound.policy import OutboundPolicy
from limner.outbound.urls import Origin
from limner.places import is_url
from limner.server.access.keys import KeyRing, check_bind
from limner.server.access.limits import LimitPolicy
from limner.server.jobs.open import check_data
from limner.trust import provenance, safety

if TYPE_CHECKING:
    from fastapi import FastAPI

    from limner.engine.protocol import Backend
    from limner.server.jobs.store import JobStore

__all__ = ["build_app", "check_options", "keyring", "needs_extra"]


@contextlib.contextmanager
def needs_extra(what: str) -> Iterator[None]:
    """Turn a failed import in the block into a `MissingExtra` that says how to install it."""
    try:
        yield
    except ModuleNotFoundError as error:
        raise MissingExtra(what, package=str(error.name), extra="serve") from error


def check_options(options: ServeOptions) -> None:
    """Raise `InvalidRequest` and `MissingExtra` for what is wrong whatever the model; nothing is loaded or connected."""
    check_bind(options.host, keyring(options))
    check_data(options.storage)
    _origins("--allow-origin", options.allow_origins)
    _origins("--allow-browser-origin", options.allow_browser_origins)
    _served_names(options)


def build_app(
    engine: Backend,
    options: ServiceOptions,
    *,
    model_name: str,
    about: ModelAbout | None = None,
    jobs: JobStore | None = None,
) -> FastAPI:
    """Return the application over an engine. `about` is what people may read of its model.

    Raises `LimnerError` for what the options get wrong.
    """
    with needs_extra("limner serve"):
        from limner.server.app import create_app
        from limner.server.http.settings import ServeSettings
        from limner.server.jobs.settings import RunnerSettings

    keys = keyring(options)
    return create_app(
        engine=engine,
        keyring=keys,
        checks=safety.no_checks() if options.unsafe_no_checks else safety.default_checks(terms=options.terms),
        settings=ServeSettings(
            data=options.storage,
            public_url=options.public_url,
            fetch_urls=options.fetch_urls,
            shared_references=options.shared_references,
            outbound=OutboundPolicy(allowed=_origins("--allow-origin", options.allow_origins)),
            limits=LimitPolicy(
                requests_per_minute=options.requests_per_minute,
                burst=max(1, round(options.requests_per_minute)),
                concurrent=options.concurrent,
            ),
            runner=RunnerSettings.of(options, is_open=keys.is_open),
            model_name=(names := _served_names(options) or (model_name,))[0],
            about=about or ModelAbout(),
            served_names=names if options.served_model_names else (),
            browser_origins=_origins("--allow-browser-origin", options.allow_browser_origins),
        ),
        signer=_signer(options),
        jobs=jobs,
    )


def keyring(options: ServiceOptions) -> KeyRing:
    """Return the keys of the file, else those of $LIMNER_KEYS, else a ring that is open. Raises `InvalidRequest`."""
    if options.keys is not None:
        return KeyRing.from_file(options.keys)
    value = os.environ.get("LIMNER_KEYS")
    return KeyRing.from_environment(value) if value else KeyRing.open()


def _origins(flag: str, values: tuple[str, ...]) -> frozenset[Origin]:
    try:
        return frozenset(Origin.parse(text) for text in values)
    except InvalidRequest as error:
        raise InvalidRequest(flag, error.problem) from None


def _served_names(options: ServiceOptions) -> tuple[str, ...]:
    for name in options.served_model_names:
        if not (1 <= len(name) <= MAX_MODEL_NAME and name.isprintable()):
            raise InvalidRequest(
                "--served-model-name", f"{name[:80]!r} is no name; give 1 to {MAX_MODEL_NAME} printable characters"
            )
    return tuple(dict.fromkeys(options.served_model_names))


def _signer(options: ServiceOptions) -> provenance.Signer | None:
    if options.c2pa_development:
        if options.c2pa_certificate:
            raise InvalidRequest("--c2pa-development", "a certificate is given as well; give one of them")
        folder = default_data() if is_url(options.storage) else options.storage
        return provenance.development_credentials(Path(folder) / "c2pa-development")
    if (options.c2pa_certificate is None) != (options.c2pa_key is None):
        raise InvalidRequest("--c2pa-certificate", "needs --c2pa-key, and the other way round")
    if options.c2pa_certificate is None or options.c2pa_key is None:
        return None
    return provenance.Signer.from_files(options.c2pa_certificate, options.c2pa_key)
