"""Draws the groups of a batch on many processes or machines, by Ray Data.

Owns how groups reach workers and results come back. A worker draws and writes with the code of `limner.batch`, as one
process does, so images are equal bit for bit where the number of threads and the kind of CPU or GPU are. Knows no manifest.

A block of the data set is one group, so that each list of references is prefilled once, by one worker. A worker writes
each row to a journal of its own when it ends; the driver gets the results when the group ends. If the driver is killed,
the next run reads the journals. All nodes have to share the folder of results, and see the references under the same
names.
"""

from __future__ import annotations

import json
import logging
import secrets
import socket
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from typing import Any

import torch

from limner.batch import Batch, BatchOptions, Drawer, Group, Result, Task, done_before, finished_rows
from limner.deploy.cluster import check_nodes, connect, nodes, quiet, this_node
from limner.engine.load import load_pipeline
from limner.errors import InvalidRequest, LimnerError, MissingExtra, OutputError, RemoteError, first_line
from limner.options import ModelOptions

__all__ = ["Cluster"]

_RESTARTS = 2
"""How often a worker that dies is started again; it goes on with its group."""
Ask = Callable[[str], Mapping[str, Mapping[str, str]]]
"""Gives the versions of each node, and whether it sees a file."""


class Cluster:
    """A connection to Ray for one batch. `address`: "local" (this machine alone), "auto" or "HOST:PORT".

    Raises `MissingExtra`, `InvalidRequest`, and `RemoteError` where there is no cluster. Sends no usage statistics,
    starts no dashboard.
    """

    def __init__(self, address: str = "local", *, workers: int | None = None) -> None:
        if workers is not None and workers < 1:
            raise InvalidRequest("--workers", f"{workers} is not a number of workers; use 1 or more")
        self.address, self.workers = address, workers
        try:
            with quiet():
                import ray.data  # noqa: F401
        except ImportError as error:
            raise MissingExtra("--ray", package="ray", extra="ray") from error
        connect(address, option="--ray", num_cpus=workers)

    def __enter__(self) -> Cluster:
        return self

    def __exit__(self, *_: object) -> None:
        import ray

        ray.shutdown()

    def nodes(self, token: str) -> dict[str, dict[str, str]]:
        """Return the versions of each node by its address, and whether it sees the file `token`."""
        return nodes(self.address, option="--ray", token=token)

    def check(self, options: BatchOptions, *, ask: Ask | None = None) -> None:
        """Raise `InvalidRequest` unless all nodes can draw what this process would. `ask` stands in for `nodes`."""
        token = options.hidden / f"seen-{secrets.token_hex(8)}"
        try:
            token.touch()
        except OSError as error:
            raise OutputError(f"output: {token} cannot be written ({error.strerror or error})") from error
        try:
            check_nodes((ask or self.nodes)(str(token)), driver=this_node())
        finally:
            token.unlink(missing_ok=True)

    def draw(self, batch: Batch, groups: Sequence[Group], model: ModelOptions) -> None:
        """Draw all groups and record their results as the groups end. Raises `OutputError` and `RemoteError`."""
        import ray
        import ray.data

        if not groups:
            return
        workers, threads = self.share(model)
        largest_first = sorted(groups, key=lambda group: len(group.tasks), reverse=True)  # one worker draws all of one
        blocks = [{"group": json.dumps(asdict(group))} for group in largest_first]
        with quiet(), ray.data.DataContext.current(_quiet_context()):
            results = ray.data.from_items(blocks, override_num_blocks=len(blocks)).map_batches(
                _Worker,
                batch_size=None,
                compute=ray.data.ActorPoolStrategy(size=min(workers, len(blocks)), max_tasks_in_flight_per_actor=1),
                fn_constructor_kwargs={
                    "model": model,
                    "options": batch.options,
                    "digest": batch.model,
                    "threads": threads,
                },
                num_cpus=threads,
                num_gpus=1 if model.device.startswith("cuda") else 0,
                ray_remote_args_fn=lambda: {"max_restarts": _RESTARTS, "max_task_retries": _RESTARTS},
            )
            try:
                for item in results.iter_rows():
                    self._take(batch, json.loads(item["result"]))
            except ray.exceptions.RayError as error:
                raise RemoteError(f"--ray: a worker ended ({first_line(error)})") from error

    def _take(self, batch: Batch, result: Result) -> None:
        """Record a result of a worker. Raises `RemoteError` if it stopped, `OutputError` if its file is not here."""
        if "stop" in result:
            raise RemoteError(f"--ray: a worker on {result['node']} cannot go on: {result['stop']}")
        if result["status"] == "ok" and not (batch.options.folder / result["file"]).is_file():
            raise OutputError(
                f"output: {result['file']} was drawn and is not in {batch.options.folder}; all nodes have to share it"
            )
        batch.record(result)

    def share(self, model: ModelOptions) -> tuple[int, int]:
        """Return how many workers fit the nodes, and how many threads each has. Raises `InvalidRequest`."""
        import ray

        nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
        kind = "GPU" if model.device.startswith("cuda") else "CPU"
        most = int(sum(node.get(kind, 0) for node in nodes))
        workers = self.workers or most
        if not 1 <= workers <= most:
            raise InvalidRequest("--workers", f"{workers} workers need a {kind} each; the cluster has {most}")
        cores = [int(node.get("CPU", 0)) for node in nodes if node.get(kind, 0) >= 1]
        threads = max(cores, default=1)
        while threads > 1 and sum(n // threads for n in cores) < workers:
            threads -= 1
        return workers, threads


def _quiet_context() -> Any:
    """Ray Data's context, without progress bars and messages, where blocks end in any order."""
    import ray.data

    logging.getLogger("ray.data").setLevel(logging.ERROR)
    with quiet():
        context = ray.data.DataContext.get_current().copy()
        context.enable_progress_bars = False
        context.print_on_execution_start = False
        context.execution_options.preserve_order = False
    return context


class _Worker:
    """One process of the pool: a pipeline and its drawer."""

    def __init__(self, *, model: ModelOptions, options: BatchOptions, digest: str, threads: int) -> None:
        self.options, self.problem = options, ""
        torch.set_num_threads(threads)
        try:
            pipe = load_pipeline(model, store=options.open_store())
            if pipe.digest != digest:
                raise InvalidRequest("--model", f"weights {pipe.digest[:16]} are not the driver's {digest[:16]}")
            self.drawer = Drawer(pipe, options, keep_rows=True)
        except LimnerError as error:  # returned as a result: Ray would start the worker again if it were raised here
            self.problem = " ".join(str(error).split())

    def __call__(self, block: dict[str, Any]) -> Iterator[dict[str, list[str]]]:
        for text in block["group"]:
            for result in self._draw(_group(json.loads(str(text)))):
                yield {"result": [json.dumps(result)]}

    def _draw(self, group: Group) -> Iterator[Result]:
        if self.problem:
            yield {"stop": self.problem, "node": socket.gethostname()}
            return
        try:
            finished = finished_rows(self.options)  # a worker that died may have drawn a part of the group
            left = []
            for task in group.tasks:
                done = done_before(finished, task, folder=self.options.folder)
                if done is None:
                    left.append(task)
                else:
                    yield done
            if left:
                yield from self.drawer.draw(replace(group, tasks=tuple(left)))
                self.drawer.pipe.store.flush()
        except LimnerError as error:
            yield {"stop": " ".join(str(error).split()), "node": socket.gethostname()}


def _group(values: dict[str, Any]) -> Group:
    """Return a group from values of JSON, which knows no tuples."""
    lists = ("references", "shape")
    tasks = tuple(Task(**{**task, **{name: tuple(task[name]) for name in lists}}) for task in values["tasks"])
    return Group(files=tuple(values["files"]), digests=tuple(values["digests"]), tasks=tasks, fit=values["fit"])
