"""The service on Ray Serve: one ingress with the HTTP dialects and the jobs, and replicas that draw.

    serve run limner.deploy.ray:app replicas=2            # or `limner deploy`, or a YAML with these as `args`

The ingress is the application of `limner serve` over a `RemoteEngine`: a job is in its folder before it is answered, and
what replica draws it is nobody's business. So a replica that dies takes nothing with it but time, and an ingress that dies
takes up its jobs when Ray has started it again. It runs once: on the head node where its jobs are in a folder, on any
node where they are in PostgreSQL.

A replica is a `Pipeline` and an `Engine`: requests that wait there and share references are one batch. Owns which
processes there are and what they are given. Imports Ray, so nothing of Limner imports it but what runs on Ray.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import math
import os
import re
import signal
import socket
import threading
import time
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any, Literal

import psutil
import ray
import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from ray import serve
from ray.exceptions import ObjectLostError, RayActorError, RayError, RayTaskError, TaskCancelledError
from ray.serve.exceptions import DeploymentUnavailableError, ReplicaUnavailableError, RequestCancelledError
from ray.serve.handle import DeploymentHandle
from starlette.types import ASGIApp

from limner.config import ReferencePolicy
from limner.deploy.cluster import check_nodes, connect, first_line, nodes, quiet, this_node
from limner.deploy.remote import LostReplica, ModelCard, RemoteEngine
from limner.engine import EditRequest, Engine, EngineStats, Event, Failed, Finished, Prefilled, load_aside
from limner.engine.model_options import ModelOptions
from limner.errors import InvalidRequest, LimnerError, OutputError, RemoteError
from limner.memory import parse_bytes
from limner.places import absolute, check_store, is_url
from limner.server.http.errors import error_body
from limner.server.http.limits import LoopbackCallers
from limner.server.jobs.storage import StorageInUse
from limner.server.run import ServeOptions, build_app, check_options, default_data, log_own
from limner.store import ReferenceStore, StoreStats
from limner.store.bucket import RemoteTier

__all__ = ["DeployOptions", "IngressApp", "Painter", "app", "deploy"]

_logger = logging.getLogger("limner.server")
NAME = "limner"
"""Of the Serve application."""
_HEAD = "node:__internal_head__"
_CONTROL_SECONDS = 5.0
_SMOOTH = 0.2
"""Share of the newest value in the means that replicas tell the router."""
_GRACE_SECONDS = 15.0
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


class Painter:
    """A replica: one pipeline and its engine. What it is asked for comes as values and goes as events."""

    def __init__(
        self,
        model: ModelOptions,
        *,
        versions: dict[str, str],
        threads: int,
        max_batch: int,
        store: str | None,
        store_bytes: int | None,
        store_memory: int,
        memory_bytes: int | None,
        store_cache: str | None = None,
    ) -> None:
        check_nodes({socket.gethostname(): this_node()}, driver=versions, option="versions")
        log_own("text")
        torch.set_num_threads(threads)
        kept = (
            ReferenceStore(memory_bytes=store_memory)
            if store is None
            else ReferenceStore.open(store, cache=store_cache, disk_bytes=store_bytes, memory_bytes=store_memory)
        )
        pipe = load_aside(lambda: model.load(store=kept))
        self._model = model
        self.engine = Engine(  # the ingress counts what waits
            pipe, max_waiting=1 << 30, max_batch=max_batch, memory_bytes=memory_bytes
        )
        self._means: dict[str, float] = {}

    def card(self) -> tuple[ModelOptions, ModelCard]:
        """What was loaded, and how."""
        return self._model, ModelCard.of(self.engine.pipe, memory_bytes=self.engine.memory_bytes)

    async def draw(
        self, request: EditRequest, *, id: str, owner: str, priority: int, timeout: float | None
    ) -> AsyncIterator[Event]:
        """The events of a request, or of a prefill where it has no seeds; whoever stops listening cancels it."""
        loop, events = asyncio.get_running_loop(), asyncio.Queue[Event]()

        def heard(event: Event) -> None:
            loop.call_soon_threadsafe(events.put_nowait, event)

        ended = False
        try:
            if request.seeds:
                self.engine.submit(
                    request, id=id, listener=heard, owner=owner, priority=priority, timeout=timeout, accepted=True
                )
            else:
                self.engine.prefill(
                    request.references, id=id, listener=heard, owner=owner, priority=priority, accepted=True
                )
            while not ended:
                event = await events.get()
                ended = isinstance(event, (Finished, Prefilled, Failed))
                self._measure(request, event)
                yield _portable(event)
        except LimnerError as error:
            ended = True
            yield Failed(error)
        finally:
            if not ended:
                self.engine.cancel(id)

    def _measure(self, request: EditRequest, event: Event) -> None:
        if not isinstance(event, Finished):
            return
        result = event.result
        was_made = result.reference_cache == "miss"
        was_brought = was_made or result.reference_cache == "remote"
        told = {
            "service_seconds": (result.ran - was_brought * result.timings.references) * len(result.seeds) / result.batch
        }
        tokens = sum(w * h for w, h in (r.report.processed_size for r in request.references)) // 256
        if tokens:
            told["kv_bytes_per_token"] = self.engine.pipe.kv_bytes(tokens) / tokens
        if was_made:
            told["prefill_seconds_per_token"] = result.timings.references / tokens
        for name, value in told.items():
            self._means[name] = self._means.get(name, value) * (1 - _SMOOTH) + value * _SMOOTH

    def record_routing_stats(self) -> dict[str, float]:
        """Ray asks for it now and then, and gives it to routers; rounded, so that little news is no news."""
        return {name: float(f"{value:.2g}") for name, value in self._means.items()}

    async def forget(self, key: str) -> bool:
        """Aside, since a remote tier may take seconds to answer."""
        return await asyncio.to_thread(self.engine.pipe.store.remove, key)

    def stats(self) -> tuple[int, EngineStats, StoreStats]:
        """The process, and the counts of its engine and store."""
        return os.getpid(), self.engine.stats(), self.engine.pipe.store.stats()

    def check_health(self) -> None:
        """Ray starts another replica in place of one that raises."""
        if not self.engine.is_alive:
            raise RuntimeError("the engine's thread has ended; its log says why")

    def __del__(self) -> None:
        if hasattr(self, "engine"):
            self.engine.close()


def _portable(event: Event) -> Event:
    """An error of a library may not survive the way; what it says does."""
    if isinstance(event, Failed) and not isinstance(event.error, LimnerError):
        return Failed(RuntimeError(f"{type(event.error).__name__}: {event.error}"))
    return event


class _Painters:
    """`Replicas` over a handle of the deployment."""

    def __init__(self, handle: DeploymentHandle) -> None:
        self._handle = handle
        self._draw = handle.options(method_name="draw", stream=True)

    @contextlib.asynccontextmanager
    async def run(self, request: EditRequest, **options: Any) -> AsyncIterator[AsyncIterator[Event]]:
        response = self._draw.remote(request, **options)
        ended = False

        async def events() -> AsyncIterator[Event]:
            nonlocal ended
            try:
                async for event in response:
                    ended = isinstance(event, (Finished, Prefilled, Failed))
                    yield event
            except RayTaskError:  # a fault of ours, and some of these are also of the kinds below
                raise
            except (
                DeploymentUnavailableError,
                ObjectLostError,
                ReplicaUnavailableError,
                RequestCancelledError,
                TaskCancelledError,
            ) as error:
                raise LostReplica(first_line(error), counts=False) from error
            except RayError as error:  # died, out of memory, its node gone
                kept = type(error) is RayActorError  # it may come back
                raise LostReplica(first_line(error), counts=not kept) from error
            except asyncio.CancelledError as error:
                task = asyncio.current_task()
                if task is not None and task.cancelling():
                    raise
                raise LostReplica("it was stopped", counts=False) from error

        try:
            yield events()
        finally:
            if not ended:
                response.cancel()

    async def forget(self, key: str) -> bool:
        try:
            return any(await self._all("forget", key))
        except Exception as error:
            raise RemoteError(
                f"replicas did not confirm that {key} is forgotten ({first_line(error)}); ask again"
            ) from error

    async def store_stats(self) -> list[StoreStats]:
        try:
            return [store for _, _, store in await self._all("stats")]
        except Exception as error:
            _logger.warning("replicas did not tell their counts: %s", first_line(error))
            return []

    async def _all(self, method: str, *args: Any) -> list[Any]:
        """What all replicas that run answer, within seconds; raises what Ray does if one of them does not."""
        return list(await self._handle.broadcast(method, *args).results_async(timeout_s=_CONTROL_SECONDS))


class IngressApp:
    """The application of `limner serve`, over the replicas."""

    def __init__(self, painters: DeploymentHandle, options: DeployOptions) -> None:
        log_own(options.log)
        self._painters, self._options = painters, options

    async def __serve_build_asgi_app__(self) -> ASGIApp:
        """What Ray asks for the application, after the constructor."""
        options = self._options
        while True:
            model, card = await self._painters.card.remote()
            if model == options.model_options():
                break
            await asyncio.sleep(0.5)  # in an update, a replica of before
        self._engine = RemoteEngine(
            _Painters(self._painters), card, max_waiting=options.max_waiting, max_batch=options.max_batch
        )
        end = time.monotonic() + 2 * options.drain + 2 * _GRACE_SECONDS
        while True:
            try:
                made = await asyncio.to_thread(
                    build_app, self._engine, options.serve_options(), model_name=options.model_name
                )
                break
            except StorageInUse:  # in an update, by the ingress before, which finishes what it has
                if time.monotonic() > end:
                    raise
            await asyncio.sleep(0.5)
        if made.state.service.keyring.is_open:
            if options.keyed:
                raise InvalidRequest(
                    "--keys",
                    "$LIMNER_KEYS is set for the command and not on the head node; give --keys FILE of that "
                    "node, or set it where Ray is started",
                )
            made.add_middleware(LoopbackCallers, error_body=error_body)
        return made

    def check_health(self) -> None:
        """Ray starts another ingress in place of one that raises; jobs are where `data` says."""
        if not self._engine.is_alive:
            raise RuntimeError("the ingress has shut down")


def app(args: DeployOptions | dict[str, Any]) -> serve.Application:
    """The application, for `serve run`, `serve deploy` and `limner deploy`. Raises what the options get wrong."""
    options = (args if isinstance(args, DeployOptions) else DeployOptions.parse(args)).checked()
    check_options(options.serve_options())
    on_gpu = options.device.startswith("cuda")
    threads = _threads(options)
    share = psutil.virtual_memory().available // _beside(options)  # the same for all, whichever loads first
    store_memory = parse_bytes(options.store_memory) if options.store_memory else share // 4
    router: dict[str, Any] = {"request_routing_stats_period_s": 2.0}
    if (path := _ROUTERS[options.router]) is not None:
        router |= {"request_router_class": path, "request_router_kwargs": {"capacity_bytes": store_memory}}
    painters = serve.deployment(
        Painter,
        name="Painter",
        max_ongoing_requests=options.max_waiting,
        ray_actor_options={"num_cpus": threads, "num_gpus": int(on_gpu)},
        request_router_config=router,
        health_check_period_s=5.0,
        health_check_timeout_s=60.0,
        graceful_shutdown_timeout_s=options.drain + _GRACE_SECONDS,
        max_constructor_retry_count=2,
        logging_config=_LOGS,
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
    return serve.deployment(
        serve.ingress()(IngressApp),
        name="Ingress",
        num_replicas=1,
        max_ongoing_requests=4096,
        ray_actor_options={"num_cpus": 0, "resources": {_HEAD: 0.001} if options.on_head else {}},
        health_check_period_s=5.0,
        health_check_timeout_s=60.0,
        graceful_shutdown_timeout_s=2 * options.drain + _GRACE_SECONDS,
        max_constructor_retry_count=2,
        logging_config=_LOGS,
    ).bind(painters, options)


def _scaling(options: DeployOptions) -> dict[str, Any]:
    """How many replicas: a number, or as many as the requests at each, drawn or waiting, ask for."""
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
    """Cores of a replica: those of this machine, shared."""
    return options.threads or max(1, _cores() // (options.max_replicas or options.replicas))


def _beside(options: DeployOptions) -> int:
    """Replicas that a machine like this one may have."""
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
    """Runs the application on a cluster until a signal stops it. Raises what is wrong with options and cluster."""
    options = options.checked()
    check_options(options.serve_options(host=host, port=port))
    options.model_options().check()
    if options.store is not None and is_url(options.store):
        RemoteTier(options.store)  # before anything starts; each replica tries it again
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
        if serve.status().proxies:
            raise InvalidRequest(
                "--address",
                f"{address}: Ray Serve runs there already, and keeps its address and its applications; end it "
                "with serve shutdown, or deploy a YAML with serve deploy",
            )
        http = {"host": host, "port": port, "ssl_certfile": certificate, "ssl_keyfile": key}
        try:
            with quiet():
                serve.start(proxy_location="HeadOnly", http_options=http, logging_config=_LOGS)
                running = True
                serve.run(app(options), name=NAME, route_prefix="/")
        except (RuntimeError, ray.exceptions.RayError) as error:
            problem = _startup_problem() or first_line(error)
            raise RemoteError(f"--address {address}: the application does not start: {problem}") from error
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
            ray.shutdown()  # and a Ray of this machine alone ends with it


def _check_cluster(options: DeployOptions, *, address: str, threads: int) -> None:
    """Raises `InvalidRequest` and `OutputError` where the nodes cannot do what is asked."""
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
    """What a replica that did not start said of it, if it is one of our errors."""
    told = serve.status().applications.get(NAME)
    for deployment in told.deployments.values() if told is not None else ():
        lines = [line.strip() for line in deployment.message.splitlines()]
        own = [line for line in lines if re.match(r"limner(\.\w+)+: ", line)]
        if own:
            return str(own[-1].partition(": ")[2])
    return ""
