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
from typing import Any

import ray
from ray import serve

from limner.cores import num_cores
from limner.deploy.cluster import check_nodes, connect, nodes, quiet, this_node
from limner.deploy.ingress import GRACE_SECONDS, IngressApp
from limner.deploy.options import DeployOptions
from limner.deploy.replica import Replica
from limner.engine.load import check_model
from limner.errors import InvalidRequest, OutputError, RemoteError, first_line
from limner.memory import parse_bytes
from limner.memory.free import free_bytes
from limner.places import is_url
from limner.server.application import check_options
from limner.store import RemoteTier

__all__ = ["DeployOptions", "IngressApp", "app", "deploy"]

NAME = "limner"
"""Of the Serve application."""
_HEAD = "node:__internal_head__"
"""Ray's resource of the head node."""
_LOGS = {"log_level": "WARNING", "enable_access_log": False}
_ROUTERS = {"affine": "limner.deploy.ray_router:AffinityRequestRouter", "ray": None}


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
    share = free_bytes() // _replicas_here(options)  # the same for all, whichever loads first
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


def _threads(options: DeployOptions) -> int:
    """Threads of a replica: by default its share of the cores of this machine."""
    return options.threads or max(1, num_cores() // (options.max_replicas or options.replicas))


def _replicas_here(options: DeployOptions) -> int:
    """How many replicas a machine with the cores of this one may have."""
    return max(1, min(options.max_replicas or options.replicas, num_cores() // _threads(options)))


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
    check_model(options)
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
