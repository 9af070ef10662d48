"""Ray Serve's request router interface over `limner.deploy.routing`: a request goes where its References are.

Owns what the routing needs to know of Ray: which replicas there are, how many requests each has, and what requests and
prefills cost there. Requests are counted here, since all of them come through the one ingress; costs are reported by the
replicas (`Replica.record_routing_stats`). Another handle of the deployment has a router of its own that does not share
placements with this one: that costs prefills and never a wrong image. Knows nothing of HTTP or jobs.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Any

from ray.serve.request_router import PendingRequest, ReplicaID, RequestRouter, RunningReplica

from limner.deploy.routing import AffinityRouter, RoutingPolicy
from limner.grid import num_tokens
from limner.requests import EditRequest, PrefillRequest, read_loras

__all__ = ["AffinityRequestRouter"]

_UNMEASURED = {"service_seconds": 1.0, "prefill_seconds_per_token": 1.0 / 1024, "kv_bytes_per_token": 1.0}
"""Costs until a replica has reported its own: a prefill of 1024 tokens counts as much as a request."""


class AffinityRequestRouter(RequestRouter):  # type: ignore[misc]  # Ray's classes are not typed
    """Sends a request to a replica that holds its References, unless its queue costs more than a prefill elsewhere.

    Requests without references go to the least busy replica. `initialize_state` takes `capacity_bytes`, what the store of
    one replica keeps in memory, and the fields of `RoutingPolicy`.
    """

    queue_len_response_deadline_s = 5.0  # a replica that draws is slow to answer, and still the right one

    def initialize_state(self, *, capacity_bytes: int, **policy: Any) -> None:
        self._affinity = AffinityRouter(capacity_bytes=capacity_bytes, policy=RoutingPolicy(**policy))
        self._ongoing: Counter[str] = Counter()

    # what Ray reports

    def update_replicas(self, replicas: list[RunningReplica]) -> None:
        super().update_replicas(replicas)
        self._join()

    def on_replica_actor_died(self, replica_id: ReplicaID) -> None:
        super().on_replica_actor_died(replica_id)
        self._leave(replica_id.unique_id)

    def on_send_request(self, replica_id: ReplicaID) -> None:
        super().on_send_request(replica_id)
        self._ongoing[replica_id.unique_id] += 1

    def on_request_completed(self, replica_id: ReplicaID, internal_request_id: str) -> None:
        super().on_request_completed(replica_id, internal_request_id)
        if self._ongoing[replica_id.unique_id] > 0:  # a request that could not be sent is reported here only
            self._ongoing[replica_id.unique_id] -= 1

    def _join(self) -> None:
        there = {replica_id.unique_id for replica_id in self.curr_replicas}
        for name in [name for name in self._affinity.homes if name not in there]:
            self._leave(name)
        for name in there:
            self._affinity.join(name)

    def _leave(self, name: str) -> None:
        self._affinity.leave(name)
        del self._ongoing[name]

    # choosing

    async def choose_replicas(
        self, candidate_replicas: list[RunningReplica], pending_request: PendingRequest | None = None
    ) -> list[list[RunningReplica]]:
        """Rank replicas: the one that the routing chose, then the others, least busy first, in case it refuses."""
        if not candidate_replicas:
            return []
        busy = sorted(candidate_replicas, key=lambda replica: self._ongoing[replica.replica_id.unique_id])
        request = _request(pending_request)
        if pending_request is None or request is None:
            return [busy]
        context = pending_request.routing_context
        tried_before = context.should_backoff
        context.should_backoff = True  # Ray pauses before it tries a second time, and longer each time
        if tried_before or not request.references:
            return [[replica] for replica in busy]
        by_name = {replica.replica_id.unique_id: replica for replica in candidate_replicas}
        if not all(name in self._affinity.homes for name in by_name):
            self._join()
        costs = _costs(candidate_replicas)
        tokens = num_tokens(*(r.report.processed_size for r in request.references))
        seconds = costs["service_seconds"]
        chosen = self._affinity.route(
            _key(request),
            nbytes=max(1, round(tokens * costs["kv_bytes_per_token"])),
            wait=lambda name: self._ongoing[name] * seconds,
            mean_wait=seconds * sum(self._ongoing[name] for name in by_name) / len(by_name),
            service_seconds=seconds,
            fetch_seconds=tokens * costs["prefill_seconds_per_token"],
            avoid=[name for name in self._affinity.homes if name not in by_name],
        )
        return [[by_name[chosen.replica]], *([other] for other in busy if other is not by_name[chosen.replica])]


def _key(request: EditRequest | PrefillRequest) -> str:
    """What stands for the K/V of a request here: its references, and LoRAs of its own."""
    loras = read_loras(request.control.get("loras")) if isinstance(request, EditRequest) else None
    return "/".join([*(r.report.digest for r in request.references), *([] if loras is None else [repr(loras)])])


def _request(pending: PendingRequest | None) -> EditRequest | PrefillRequest | None:
    """The request of a call of `Replica.draw`; None for other calls."""
    found = pending.args[0] if pending is not None and pending.args else None
    return found if isinstance(found, (EditRequest, PrefillRequest)) else None


def _costs(replicas: list[RunningReplica]) -> Mapping[str, float]:
    """Means of what the replicas have reported."""
    reported = [replica.routing_stats for replica in replicas]
    return {
        name: sum(known) / len(known) if (known := [stats[name] for stats in reported if stats.get(name)]) else default
        for name, default in _UNMEASURED.items()
    }
