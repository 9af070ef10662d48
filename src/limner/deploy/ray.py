"""The service on Ray Serve: which processes there are, and what they are given.

    serve run limner.deploy.ray:app replicas=2            # or `limner deploy`, or a YAML with these as `args`

One ingress (`limner.deploy.ingress`) has the HTTP dialects and the jobs; replicas (`limner.deploy.replica`) draw. A job is
written down before it is answered, and any replica may draw it: a replica that dies costs time and nothing else, and an
ingress that dies takes up its jobs when Ray has started it again. There is one ingress: on the head node where its jobs
are in a folder, on any node where they are in PostgreSQL.

Owns the application, its processes and their start on a cluster. Knows no wire schemas. Imports Ray, so nothing of Limner
imports it but what runs on Ray.
"""

from __future__ import annotations

import contextlib
import math
import os
import re
import signal
import socket
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import psutil
import ray
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from ray import serve

from limner.config import ReferencePolicy
from limner.deploy.cluster import check_nodes, connect, nodes, quiet, this_node
from limner.deploy.ingress import GRACE_SECONDS, IngressApp
from limner.deploy.replica import Replica
from limner.engine.model_options import ModelOptions
from limner.errors import InvalidRequest, OutputError, RemoteError, first_line
from limner.memory import parse_bytes
from limner.places import absolute, check_store, is_url
from limner.server.run import ServeOptions, check_options, default_data
from limner.store import RemoteTier

__all__ = ["DeployOptions", "IngressApp", "app", "deploy"]

NAME = "limner"
"""Of the Serve application."""
_HEAD = "node:__internal_head__"
"""Ray's resource of the head node."""
_LOGS = {"log_level": "WARNING", "enable_access_log": False}
_ROUTERS = {"affine": "limner.deploy.ray_router:AffinityRequestRouter", "ray": None}


class DeployOptions(BaseModel):
    """What is deployed: the `args` of a YAML, with the meanings of the options of `limner deploy` and `limner serve`.

    Paths are those of the nodes: `data`, `keys`, `terms` and C2PA files of the head node, others of all.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=())

    model: str | None = None
    transformer: str | None = None
    vae: str | None = None
    text_encoder: str | None = None
    dtype: Literal["float32", "bfloat16", "float16"] | None = None
    quantize: Literal["int8"] | None = None
    device: str = "cpu"
    kv_cache_dtype: Literal["int8", "fp8"] | None = None
    memory_limit: str | None = None
    loras: tuple[tuple[str, float], ...] = ()
    background: str | None = None
    max_pixels: int | None = None

    replicas: int = Field(1, ge=1)
    max_replicas: int | None = None
    queue: float = Field(4.0, gt=0)
    threads: int | None = Field(None, ge=1)
    router: Literal["affine", "ray"] = "affine"
    store: str | None = None
    store_cache: str | None = None
    store_bytes: int | None = None
    store_memory: str | None = None
    head: bool | None = None
    """Whether the ingress runs on the head node and nowhere else; None: where its jobs are in a folder."""

    data: str | None = None
    keys: str | None = None
    keyed: bool = False
    """The ingress does not start without keys. Set where the command that deploys has $LIMNER_KEYS."""
    max_waiting: int = Field(256, ge=1)
    max_batch: int = Field(10, ge=1)
    images_per_key: int | None = None
    requests_per_minute: float = 600.0
    concurrent: int = 24
    keep_results: float = 600.0
    drain: float = Field(30.0, ge=0)
    public_url: str | None = None
    fetch_urls: bool = False
    allow_origins: tuple[str, ...] = ()
    unsafe_no_checks: bool = False
    terms: str | None = None
    c2pa_certificate: str | None = None
    c2pa_key: str | None = None
    c2pa_development: bool = False
    log: Literal["json", "text"] = "json"

    @classmethod
    def parse(cls, values: dict[str, Any]) -> DeployOptions:
        """Raises `InvalidRequest` that names the first option that is wrong."""
        try:
            return cls(**values)
        except ValidationError as error:
            first = error.errors()[0]
            name = str(first["loc"][0]).replace("_", "-")
            raise InvalidRequest(f"--{name}", f"{first.get('input')!r}: {first['msg']}") from None

    def checked(self) -> DeployOptions:
        """With paths that do not depend on a process's folder. Raises `InvalidRequest` and what the options get wrong."""
        if self.max_replicas is not None and self.max_replicas < self.replicas:
            raise InvalidRequest(
                "--max-replicas", f"{self.max_replicas} is less than the {self.replicas} of --replicas"
            )
        if self.store_memory is not None:
            parse_bytes(self.store_memory, field="--store-memory")
        check_store(self.store, cache=self.store_cache, disk_bytes=self.store_bytes)
        names = (
            "model",
            "transformer",
            "vae",
            "text_encoder",
            "store_cache",
            "data",
            "keys",
            "terms",
            "c2pa_certificate",
            "c2pa_key",
        )
        made = {
            name: os.path.abspath(value)
            for name in names
            if (value := getattr(self, name)) is not None
            and (name in ("store_cache", "data") or os.path.exists(value))
            and not is_url(value)
        }
        keyed = self.keyed or bool(os.environ.get("LIMNER_KEYS"))
        if self.store is not None:
            made["store"] = absolute(self.store)
        return self.model_copy(update={"data": self.data or default_data(), "keyed": keyed, **made})

    @property
    def store_folder(self) -> str:
        """The folder of K/V that nodes write in; "" if there is none."""
        return (self.store_cache if is_url(self.store) else self.store) or ""

    def model_options(self) -> ModelOptions:
        policy = {"background": self.background, "max_pixels": self.max_pixels}
        return ModelOptions(
            model=self.model,
            transformer=self.transformer,
            vae=self.vae,
            text_encoder=self.text_encoder,
            dtype=self.dtype,
            quantize=self.quantize,
            device=self.device,
            kv_cache_dtype=self.kv_cache_dtype,
            memory_limit=self.memory_limit,
            policy=ReferencePolicy(**{name: value for name, value in policy.items() if value is not None}),  # type: ignore[arg-type]
            loras=self.loras,
        )

    def serve_options(self, *, host: str = "127.0.0.1", port: int = 0) -> ServeOptions:
        assert self.data is not None
        return ServeOptions(
            host=host,
            port=port,
            data=self.data,
            keys=self.keys,
            unsafe=self.unsafe_no_checks,
            terms=self.terms,
            certificate=self.c2pa_certificate,
            private_key=self.c2pa_key,
            development_certificate=self.c2pa_development,
            fetch_urls=self.fetch_urls,
            allow_origins=self.allow_origins,
            requests_per_minute=self.requests_per_minute,
            concurrent=self.concurrent,
            max_waiting=self.max_waiting,
            max_batch=self.max_batch,
            images_per_key=self.images_per_key,
            keep_results=self.keep_results,
            drain=self.drain,
            public_url=self.public_url,
            log=self.log,
        )

    @property
    def on_head(self) -> bool:
        return not is_url(self.data) if self.head is None else self.head

    @property
    def model_name(self) -> str:
        return "limner-stickers" if self.model is None else Path(self.model).name


def app(args: DeployOptions | dict[str, Any]) -> serve.Application:
    """Return the application, for `serve run`, `serve deploy` and `limner deploy`. Raises what the options get wrong."""
    options = (args if isinstance(args, DeployOptions) else DeployOptions.parse(args)).checked()
    check_options(options.serve_options())
    return serve.deployment(
        serve.ingress()(IngressApp),
        name="Ingress",
        num_replicas=1,
        max_ongoing_requests=4096,
        ray_actor_options={"num_cpus": 0, "resources": {_HEAD: 0.001} if options.on_head else {}},
        graceful_shutdown_timeout_s=2 * options.drain + GRACE_SECONDS,
        **_common(),
    ).bind(_replicas(options), options)


def _replicas(options: DeployOptions) -> serve.Application:
    """The deployment of the replicas, bound to what they load."""
    on_gpu = options.device.startswith("cuda")
    threads = _threads(options)
    share = psutil.virtual_memory().available // _replicas_here(options)  # the same for all, whichever loads first
    store_memory = parse_bytes(options.store_memory) if options.store_memory else share // 4
    router: dict[str, Any] = {"request_routing_stats_period_s": 2.0}
    if (path := _ROUTERS[options.router]) is not None:
        router |= {"request_router_class": path, "request_router_kwargs": {"capacity_bytes": store_memory}}
    return serve.deployment(
        Replica,
        name="Replica",
        max_ongoing_requests=options.max_waiting,
        ray_actor_options={"num_cpus": threads, "num_gpus": int(on_gpu)},
        request_router_config=router,
        graceful_shutdown_timeout_s=options.drain + GRACE_SECONDS,
        **_common(),
        **_scaling(options),
    ).bind(
        options.model_options(),
        versions=this_node(),
        threads=threads,
        max_batch=options.max_batch,
        store=options.store,
        store_cache=options.store_cache,
        store_bytes=options.store_bytes,
        store_memory=store_memory,
        memory_bytes=None if on_gpu else share,
    )


def _common() -> dict[str, Any]:
    """What Ray is told of both deployments."""
    return {
        "health_check_period_s": 5.0,
        "health_check_timeout_s": 60.0,
        "max_constructor_retry_count": 2,
        "logging_config": _LOGS,
    }


def _scaling(options: DeployOptions) -> dict[str, Any]:
    """A number of replicas, or bounds and the requests at each, drawn or waiting, over which Ray starts more."""
    if options.max_replicas is None or options.max_replicas == options.replicas:
        return {"num_replicas": options.replicas}
    return {
        "autoscaling_config": {
            "min_replicas": options.replicas,
            "max_replicas": options.max_replicas,
            "target_ongoing_requests": options.queue,
        }
    }


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _threads(options: DeployOptions) -> int:
    """Threads of a replica: by default its share of the cores of this machine."""
    return options.threads or max(1, _cores() // (options.max_replicas or options.replicas))


def _replicas_here(options: DeployOptions) -> int:
    """How many replicas a machine with the cores of this one may have."""
    return max(1, min(options.max_replicas or options.replicas, _cores() // _threads(options)))


def deploy(
    options: DeployOptions,
    *,
    address: str = "local",
    host: str = "127.0.0.1",
    port: int = 8731,
    certificate: str | None = None,
    key: str | None = None,
    ready: Callable[[str], None] = lambda url: None,
) -> None:
    """Run the application on a cluster until a signal stops it. Raises what is wrong with the options or the cluster."""
    options = options.checked()
    check_options(options.serve_options(host=host, port=port))
    options.model_options().check()
    if options.store is not None and is_url(options.store):
        RemoteTier(options.store)  # before anything starts; each replica opens it again
    if (certificate is None) != (key is None):
        raise InvalidRequest("--tls-certificate", "needs --tls-key, and the other way round")
    if address == "local":
        _check_port(host, port)
    threads, most = _threads(options), options.max_replicas or options.replicas
    running = False
    connect(address, option="--address", num_cpus=threads * most, log_to_driver=True)
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        _check_cluster(options, address=address, threads=threads)
        running = True
        _start(options, address, {"host": host, "port": port, "ssl_certfile": certificate, "ssl_keyfile": key})
        shown = f"[{host}]" if ":" in host else host
        ready(f"{'https' if certificate else 'http'}://{shown}:{port}")
        with contextlib.suppress(KeyboardInterrupt):
            threading.Event().wait()
        with quiet():
            serve.delete(NAME)  # waits for what runs
            serve.shutdown()
        running = False
    finally:
        signal.signal(signal.SIGTERM, before)
        with quiet(), contextlib.suppress(ray.exceptions.RayError, RuntimeError):
            if running and address != "local":
                serve.shutdown()
            ray.shutdown()  # which ends a Ray of this machine alone


def _start(options: DeployOptions, address: str, http: dict[str, Any]) -> None:
    """Start Ray Serve and the application. Raises `RemoteError` with what a replica said, if one did."""
    try:
        with quiet():
            serve.start(proxy_location="HeadOnly", http_options=http, logging_config=_LOGS)
            serve.run(app(options), name=NAME, route_prefix="/")
    except (RuntimeError, ray.exceptions.RayError) as error:
        problem = _startup_problem() or first_line(error)
        raise RemoteError(f"--address {address}: the application does not start: {problem}") from error


def _check_cluster(options: DeployOptions, *, address: str, threads: int) -> None:
    """Raise `InvalidRequest` or `OutputError` where the nodes cannot do what the options ask, or run Serve already."""
    files = [
        f for f in (options.model, options.transformer, options.vae, options.text_encoder) if f and os.path.isabs(f)
    ]
    found = nodes(address, option="--address", folder=options.store_folder, files=files)
    check_nodes(found, driver=this_node(), option="--address")
    on_gpu = options.device.startswith("cuda")
    room = [
        min(node.get("CPU", 0) // threads, node.get("GPU", 0) if on_gpu else math.inf)
        for node in (n["Resources"] for n in ray.nodes() if n["Alive"])
    ]
    if options.replicas > sum(room):
        needs = f"{threads} CPU" + " and a GPU" * on_gpu
        raise InvalidRequest(
            "--replicas",
            f"{options.replicas} replicas of {needs} do not fit, only {int(sum(room))} do; use fewer, or --threads",
        )
    if serve.status().proxies:
        raise InvalidRequest(
            "--address",
            f"{address}: Ray Serve runs there already, and keeps its address and its applications; end it "
            "with serve shutdown, or deploy a YAML with serve deploy",
        )


def _check_port(host: str, port: int) -> None:
    try:
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        with socket.socket(family) as tried:
            tried.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            tried.bind((host, port))
    except OSError as error:
        raise OutputError(
            f"port: {host}:{port} cannot be used ({error.strerror or error}); give another --port"
        ) from error


def _startup_problem() -> str:
    """The message of an error of Limner's own that kept a deployment from starting; "" if there is none."""
    status = serve.status().applications.get(NAME)
    for deployment in status.deployments.values() if status is not None else ():
        lines = [line.strip() for line in deployment.message.splitlines()]
        own = [line for line in lines if re.match(r"limner(\.\w+)+: ", line)]
        if own:
            return str(own[-1].partition(": ")[2])
    return ""
