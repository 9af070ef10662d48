"""Every option that more than one layer reads: its name, type, default, allowed values and meaning, declared once.

The command line makes its arguments from these fields (`limner.cli.options`), a deployment the keys of its YAML
(`limner.deploy.options`), docs/cli.md its tables; `limner.engine.load` and `limner.server.run` read the values. A field
has the same name in all of them. Knows no parser, no pydantic and no torch.
"""

from __future__ import annotations

import os
import types
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, fields, is_dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from limner.config import BUNDLED_MODEL, Fit, ReferencePolicy
from limner.kinds import ReferencesAttention

__all__ = [
    "MAX_MODEL_NAME",
    "Dtype",
    "KVCacheDtype",
    "ListenOptions",
    "ModelOptions",
    "Option",
    "Quantization",
    "ReferenceOptions",
    "ReplicaOptions",
    "ServeOptions",
    "ServiceOptions",
    "StoreOptions",
    "default_data",
    "option",
    "options_of",
    "select",
]

T = TypeVar("T")
Dtype = Literal["float32", "bfloat16", "float16"]
Quantization = Literal["int8"]
KVCacheDtype = Literal["int8", "fp8"]
MAX_MODEL_NAME = 200
"""Most characters of a name that callers give as `model`."""


@dataclass(frozen=True, kw_only=True, slots=True)
class _About:
    """What a field says of its option beyond name, type and default."""

    help: str
    flag: str | None
    metavar: str | None
    group: str | None
    env: str | None
    path: Literal["read", "written"] | None
    minimum: float | None
    above: float | None


def option(
    default: T,
    *,
    help: str,  # noqa: A002
    flag: str | None = "",
    metavar: str | None = None,
    group: str | None = None,
    env: str | None = None,
    path: Literal["read", "written"] | None = None,
    minimum: float | None = None,
    above: float | None = None,
) -> T:
    """Declare a field of an options class.

    `flag` is the name on the command line, where it is not the field's with "-" for "_"; None keeps the option off the
    command line. `group` is the title it stands under in `--help`. `env` names the variable that gives the command line's
    default. `path` marks a place on disk: "read" may also be a hub id, "written" is made if it is not there.
    `minimum` and `above` bound numbers of a deployment (>= and >).
    """
    about = _About(help=help, flag=flag, metavar=metavar, group=group, env=env, path=path, minimum=minimum, above=above)
    return field(default=default, metadata={"about": about})


@dataclass(frozen=True, kw_only=True, slots=True)
class Option(_About):
    """One option as its users need it. `annotation` is the field's type; `flag` None: not on the command line."""

    name: str
    annotation: Any
    default: object

    @property
    def is_list(self) -> bool:
        """True where the option is given several times, a value each time."""
        return get_origin(self.annotation) is tuple

    @property
    def value_type(self) -> Any:
        """The type of one value: of an item of a list, and without None."""
        if self.is_list:
            return get_args(self.annotation)[0]
        if get_origin(self.annotation) in (Union, types.UnionType):
            (kind,) = (kind for kind in get_args(self.annotation) if kind is not types.NoneType)
            return kind
        return self.annotation

    @property
    def choices(self) -> tuple[str, ...]:
        """The values that are allowed; empty where any value of the type is."""
        return get_args(self.value_type) if get_origin(self.value_type) is Literal else ()


def options_of(kind: type) -> Iterator[Option]:
    """Yield the options that a class of this module declares, bases first."""
    hints = get_type_hints(kind)
    for one in fields(kind):
        about = asdict(one.metadata["about"])
        if about["flag"] == "":
            about["flag"] = "--" + one.name.replace("_", "-")
        yield Option(name=one.name, annotation=hints[one.name], default=one.default, **about)


def select(kind: type[T], options: object, **changes: object) -> T:
    """Return the options of class `kind` out of those of a class that has all of them, with changes."""
    assert is_dataclass(kind)
    return kind(**{one.name: getattr(options, one.name) for one in fields(kind)} | changes)


@dataclass(frozen=True, kw_only=True)
class ReferenceOptions:
    """What happens to reference pictures before they are encoded (`limner.config.ReferencePolicy`)."""

    background: str | None = option(
        None,
        help="what stands behind transparent references, as white or #fff; default: they are refused",
        metavar="COLOUR",
        group="references",
    )
    max_pixels: int | None = option(
        None,
        help="scale larger references down to N pixels; default: what the model says, else 1048576",
        metavar="N",
        group="references",
    )

    fit: Fit | None = option(
        None,
        help="how sides of references become multiples of 16, or a size that the model has learned: cut around the middle "
        "(crop, the default), pad with the pixels at the edges, or resize",
        group="references",
    )

    @property
    def policy(self) -> ReferencePolicy:
        """Raises `InvalidRequest`."""
        return ReferencePolicy(background=self.background, max_pixels=self.max_pixels, fit=self.fit or "crop")


@dataclass(frozen=True, kw_only=True)
class ModelOptions(ReferenceOptions):
    """What a pipeline is loaded from and how it computes, as plain values that can be sent to other processes."""

    model: str | None = option(
        None,
        help="folder, hub id, or a short name as klein-9b-kv; default: the bundled model",
        metavar="MODEL",
        group="model",
        path="read",
    )
    transformer: str | None = option(
        None, help="file or folder to take the transformer from instead", metavar="FILE", group="model", path="read"
    )
    vae: str | None = option(
        None, help="file or folder to take the autoencoder from instead", metavar="FILE", group="model", path="read"
    )
    text_encoder: str | None = option(
        None, help="file or folder to take the text encoder from instead", metavar="FILE", group="model", path="read"
    )
    preview_decoder: str | None = option(
        None, help="file of a small decoder for previews, as TAEF2", metavar="FILE", group="model", path="read"
    )
    variant: str | None = option(
        None,
        help="which weights of the folders are read, as fp16: those named *.fp16.safetensors",
        metavar="NAME",
        group="model",
    )
    revision: str | None = option(
        None, help="branch, tag or commit of the model's hub id", metavar="REVISION", group="model"
    )
    dtype: Dtype | None = option(None, help="dtype of the arithmetic; default: that of the files", group="model")
    quantize: Quantization | None = option(
        None, help="make the transformer's weights and activations int8", group="model"
    )
    quantize_text: bool = option(
        False, help="make the text encoder's weights and activations int8, with --quantize or alone", group="model"
    )
    loras: tuple[tuple[str, float], ...] = option(
        (),
        help="a LoRA: file, folder or hub id, and its strength (default: 1); again for more",
        flag="--lora",
        metavar="FILE[:STRENGTH]",
        group="model",
    )
    device: str = option("cpu", help="cpu, cuda, cuda:1 or mps", metavar="DEVICE", group="model")
    memory_limit: str | None = option(
        None,
        help="what may be resident, as 20GiB: weights are in memory by turns (CPU under Linux, CUDA; see limner plan)",
        metavar="SIZE",
        group="model",
    )
    references_attention: ReferencesAttention | None = option(
        None,
        help="what references attend to: isolated (K/V are kept) or joint (standard and base klein); default: what the "
        "model's files say",
        group="model",
    )
    kv_cache_dtype: KVCacheDtype | None = option(
        None, help="keep K/V of references in half the bytes of bfloat16", group="references"
    )

    @property
    def model_name(self) -> str:
        """What the model is called in answers of the service."""
        return BUNDLED_MODEL if self.model is None else Path(self.model).name

    @property
    def lora_names(self) -> tuple[str, ...]:
        """What requests and results call the LoRAs: the last part of a hub id, or of a path without ".safetensors".

        Of several with one name the second has "-2" behind it.
        """
        found: list[str] = []
        for source, _ in self.loras:
            name = base = Path(source).name.removesuffix(".safetensors") or source
            number = 1
            while name in found:
                number += 1
                name = f"{base}-{number}"
            found.append(name)
        return tuple(found)


@dataclass(frozen=True, kw_only=True)
class StoreOptions:
    """Where K/V of references are kept beyond a process."""

    store: str | None = option(
        None,
        help="where K/V of references are kept for later: a folder, or a URL such as s3://bucket/prefix",
        metavar="STORE",
        group="store",
        env="LIMNER_STORE",
        path="written",
    )
    store_cache: str | None = option(
        None,
        help="with a URL as the store: a folder of each machine for copies of what was fetched and made",
        metavar="DIR",
        group="store",
        path="written",
    )
    store_bytes: int | None = option(
        None,
        help="remove what was used least recently from the folder when it has more bytes; default: remove nothing",
        metavar="N",
        group="store",
    )


@dataclass(frozen=True, kw_only=True)
class ListenOptions:
    """Where the service listens."""

    host: str = option("127.0.0.1", help="address to listen on", metavar="HOST", group="reach")
    port: int = option(8731, help="port to listen on", metavar="N", group="reach")
    tls_certificate: str | None = option(None, help="PEM chain; serves https", metavar="FILE", group="reach")
    tls_key: str | None = option(None, help="PEM key", metavar="FILE", group="reach")


@dataclass(frozen=True, kw_only=True)
class ServiceOptions:
    """How the service works, wherever it runs."""

    data: str | None = option(
        None,
        help="folder of jobs and results, or postgresql://HOST/DATABASE; default: ~/.local/share/limner/serve",
        metavar="DIR|URL",
        path="written",
    )
    keys: str | None = option(
        None, help="API keys, hashed; or $LIMNER_KEYS; without keys: loopback only", metavar="FILE", path="read"
    )
    log: Literal["auto", "json", "text"] = option(
        "auto", help="form of the log on stderr; auto: text on a terminal, else json"
    )
    max_waiting: int = option(256, help="requests that may wait", metavar="N", group="limits", minimum=1)
    max_batch: int = option(10, help="images drawn at once", metavar="N", group="limits", minimum=1)
    images_per_key: int | None = option(
        None, help="images a key may have in all; default: any number", metavar="N", group="limits"
    )
    requests_per_minute: float = option(600, help="requests of one key, a minute", metavar="N", group="limits")
    concurrent: int = option(24, help="unfinished jobs of one key", metavar="N", group="limits")
    keep_results: float | None = option(
        None,
        help="seconds for which results are kept; default: 600 with keys, and without keys for good, as far as "
        "--keep-bytes lets them",
        metavar="S",
        group="limits",
        minimum=0,
    )
    keep_bytes: int | None = option(
        None,
        help="remove the oldest jobs when results and pictures of jobs have more bytes; default: any number with keys, "
        "2 GiB without",
        metavar="N",
        group="limits",
        minimum=0,
    )
    drain: float = option(30, help="seconds a shutdown waits for jobs", metavar="S", group="limits", minimum=0)
    served_model_names: tuple[str, ...] = option(
        (),
        help="the model's name to callers; again for more names. Default: that of its folder, and OpenAI's names of "
        "image models (gpt-image-..., dall-e-..., chatgpt-image-...), which clients have built in",
        flag="--served-model-name",
        metavar="NAME",
        group="reach",
    )
    public_url: str | None = option(
        None, help="what callers reach the server under, for URLs in answers", metavar="URL", group="reach"
    )
    fetch_urls: bool = option(False, help="fetch pictures that are named by https URL", group="reach")
    shared_references: bool = option(
        False, help="with keys: tell each of hits on references that only others used", group="reach"
    )
    allow_origins: tuple[str, ...] = option(
        (),
        help="an origin that webhooks and fetches may reach although it is not public, as http://127.0.0.1:9000; "
        "again for more",
        flag="--allow-origin",
        metavar="ORIGIN",
        group="reach",
    )
    allow_browser_origins: tuple[str, ...] = option(
        (),
        help="an origin whose pages may call this server from a browser (CORS), as https://app.example; again for more. "
        "Cookies and other credentials of the browser are never taken",
        flag="--allow-browser-origin",
        metavar="ORIGIN",
        group="reach",
    )
    unsafe_no_checks: bool = option(False, help="check neither prompts nor pictures", group="safety and provenance")
    terms: str | None = option(
        None,
        help="more terms that prompts may not have, one a line",
        metavar="FILE",
        group="safety and provenance",
        path="read",
    )
    c2pa_certificate: str | None = option(
        None, help="sign results: PEM chain", metavar="FILE", group="safety and provenance", path="read"
    )
    c2pa_key: str | None = option(
        None, help="sign results: PEM key", metavar="FILE", group="safety and provenance", path="read"
    )
    c2pa_development: bool = option(
        False, help="sign with a certificate made here, marked as such", group="safety and provenance"
    )

    @property
    def storage(self) -> str:
        """Where jobs and results are: `data`, or the default folder."""
        return self.data or default_data()


@dataclass(frozen=True, kw_only=True)
class ServeOptions(ServiceOptions, ListenOptions):
    """Options of `limner serve`, but those of its model and store."""

    standby: bool = option(False, help="wait with the model loaded while another server has the jobs of --data")


@dataclass(frozen=True, kw_only=True)
class ReplicaOptions:
    """How many processes of a deployment draw, and which of them draws what."""

    replicas: int = option(1, help="processes that draw", metavar="N", group="replicas", minimum=1)
    max_replicas: int | None = option(
        None, help="start more while requests wait, up to N", metavar="N", group="replicas"
    )
    queue: float = option(
        4, help="requests of a replica, drawn or waiting, to scale for", metavar="N", group="replicas", above=0
    )
    threads: int | None = option(
        None, help="cores of a replica; default: this machine's, shared", metavar="N", group="replicas", minimum=1
    )
    router: Literal["affine", "ray"] = option(
        "affine",
        help="affine: to a replica that holds the references, unless waiting costs more than a prefill; ray: Ray's own",
        group="replicas",
    )
    store_memory: str | None = option(
        None,
        help="K/V that a replica keeps in memory, as 8GiB; default: a quarter of what is free, shared",
        metavar="SIZE",
        group="replicas",
    )
    head: bool | None = option(
        None,
        help="whether the ingress runs on the head node and nowhere else; default: if its jobs are in a folder",
        flag=None,
    )
    keyed: bool = option(
        False,
        help="the ingress does not start without keys; set where the command that deploys has $LIMNER_KEYS",
        flag=None,
    )


def default_data() -> str:
    """Return `$XDG_DATA_HOME/limner/serve`, as the base directory specification says."""
    home = os.environ.get("XDG_DATA_HOME") or str(Path.home() / ".local" / "share")
    return str(Path(home) / "limner" / "serve")
