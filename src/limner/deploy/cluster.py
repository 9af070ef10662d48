"""The connection to a Ray cluster, and whether its nodes can draw what this process would.

Owns addresses, versions, and the errors for a cluster that is not there. Knows neither batches nor services.
"""

from __future__ import annotations

import contextlib
import logging
import os
import platform
import re
import socket
import warnings
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch

from limner.cores import num_cores
from limner.errors import InvalidRequest, MissingExtra, OutputError, RemoteError, first_line
from limner.version import __version__

__all__ = ["check_nodes", "connect", "nodes", "quiet", "this_node"]

_CONNECT_SECONDS = 5.0
_LOCAL_OBJECT_BYTES = 128 << 20
"""Shared memory of a Ray of one machine: only text and images pass through it."""


def this_node() -> dict[str, str]:
    """Return the versions that have to be equal wherever images of one run are drawn."""
    return {"limner": __version__, "torch": torch.__version__, "python": platform.python_version()}


def check_nodes(nodes: Mapping[str, Mapping[str, str]], *, driver: Mapping[str, str], option: str = "--ray") -> None:
    """Raise `InvalidRequest` or `OutputError` unless every node of `nodes` has the driver's versions, files and folder."""
    for node, found in nodes.items():
        if "error" in found:
            raise InvalidRequest(option, f"node {node} cannot draw ({found['error']}); install this Limner there")
        for name, mine in driver.items():
            if found.get(name) != mine:
                raise InvalidRequest(
                    option,
                    f"node {node} has {name} {found.get(name)}, this process {mine}; pictures would differ: install the "
                    "same versions everywhere",
                )
        if found.get("folder") == "missing":
            raise InvalidRequest(
                "--output", f"node {node} does not see the folder of results; give one that all nodes share"
            )
        if "lacks" in found:
            raise InvalidRequest(option, f"node {node} has no {found['lacks']}; put it there under the same path")
        if "unwritable" in found:
            raise OutputError(
                f"store: {found['unwritable']} on node {node}; give a folder that all nodes share and may write"
            )


def connect(address: str, *, option: str, num_cpus: int | None = None, log_to_driver: bool = False) -> None:
    """Connect this process to "local" (a Ray of this machine alone), "auto" or "HOST:PORT".

    A local Ray offers at least `num_cpus`. Raises `MissingExtra`, `InvalidRequest`, and `RemoteError` where there is no
    cluster. Sends no usage statistics, starts no dashboard.
    """
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    if not log_to_driver:
        # else Ray's core prints errors to this terminal that it may yet recover from
        os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")
    try:
        with quiet():
            import ray
    except ImportError as error:
        raise MissingExtra(option, package="ray", extra="ray") from error
    options: dict[str, Any] = {"log_to_driver": log_to_driver, "logging_level": logging.ERROR}
    if address == "local":
        options |= {
            "num_cpus": max(num_cores(), num_cpus or 1),
            "include_dashboard": False,
            "object_store_memory": _LOCAL_OBJECT_BYTES,
        }
    else:
        _check_reachable(address, option=option)
    try:
        with quiet():
            ray.init(address=address, **options)
    except ConnectionError as error:
        remedy = "start one with `ray start --head`, or give HOST:PORT of its head"
        if address != "auto" and not os.environ.get("RAY_AUTH_MODE"):  # Ray shows its token to no address it is given
            remedy += "; if it asks for a token, as it does where ~/.ray/auth_token is, set RAY_AUTH_MODE=token"
        raise RemoteError(f"{option} {address}: no cluster is there that answers; {remedy}") from error
    except Exception as error:  # Ray raises all kinds, `Exception` itself among them
        remedy = (
            "try again when the machine is less busy" if address == "local" else "start one with `ray start --head`"
        )
        raise RemoteError(f"{option} {address}: {first_line(error)}; {remedy}") from error


def nodes(
    address: str, *, option: str, token: str = "", folder: str = "", files: Sequence[str] = ()
) -> dict[str, dict[str, str]]:
    """Return the versions of each node by its address, as `check_nodes` reads them.

    Where they are given: also whether it sees the file `token`, may write in `folder`, and has all `files`. Raises
    `InvalidRequest` and `RemoteError`.
    """
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    def probe() -> dict[str, str]:  # sent as code: a node without Limner has to be able to say so
        try:
            from limner.deploy.cluster import this_node
        except Exception as error:
            return {"error": f"{type(error).__name__}: {error}"}
        found = this_node()
        if token:
            found["folder"] = "seen" if os.path.exists(token) else "missing"
        lacking = [file for file in files if not os.path.exists(file)]
        if lacking:
            found["lacks"] = lacking[0]
        if folder:
            try:
                os.makedirs(folder, exist_ok=True)
            except OSError as error:
                found["unwritable"] = f"{folder} cannot be made ({error.strerror or error})"
            else:
                if not os.access(folder, os.W_OK | os.X_OK):
                    found["unwritable"] = f"{folder} cannot be written"
        return found

    alive = [node for node in ray.nodes() if node["Alive"] and node["Resources"].get("CPU")]
    answers = {
        node["NodeManagerAddress"]: ray.remote(probe)
        .options(num_cpus=0, scheduling_strategy=NodeAffinitySchedulingStrategy(node["NodeID"], soft=False))
        .remote()
        for node in alive
    }
    if not answers:
        raise InvalidRequest(option, f"{address}: the cluster has no node with a CPU; start one with `ray start`")
    try:
        return dict(zip(answers, ray.get(list(answers.values())), strict=True))
    except ray.exceptions.RayError as error:
        raise RemoteError(f"{option}: a node of {address} does not answer ({first_line(error)})") from error


def _check_reachable(address: str, *, option: str) -> None:
    """Connect to the address first: where nothing listens, Ray would wait for long, or end the process."""
    host_port = os.environ.get("RAY_ADDRESS", "") if address == "auto" else address
    if not host_port:
        return
    match = re.fullmatch(r"([^\s:/]+|\[[0-9a-fA-F:]+\]):([0-9]{1,5})", host_port)
    if match is None:
        raise InvalidRequest(option, f"{host_port!r} is not local, auto or HOST:PORT of the head node")
    try:
        socket.create_connection((match[1].strip("[]"), int(match[2])), timeout=_CONNECT_SECONDS).close()
    except (OSError, OverflowError) as error:
        raise RemoteError(
            f"{option} {address}: no cluster at {host_port} ({error}); start one with `ray start --head`"
        ) from error


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Ignore warnings that Ray 2.60 gives of its own defaults."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        warnings.simplefilter("ignore", FutureWarning)
        yield
