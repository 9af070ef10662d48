"""What is deployed: the `args` of a Ray Serve YAML, checked, and the parts of them that processes are given.

Owns the parsing of values that are text or come from YAML, and paths that hold on any node. The options themselves are
declared in `limner.options`. Knows nothing of Ray.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError, create_model

from limner.errors import InvalidRequest
from limner.memory import parse_bytes
from limner.options import ModelOptions, ReplicaOptions, ServeOptions, ServiceOptions, StoreOptions, options_of, select
from limner.places import check_store, is_url

__all__ = ["DeployOptions"]


@dataclass(frozen=True, kw_only=True)
class DeployOptions(ModelOptions, StoreOptions, ReplicaOptions, ServiceOptions):
    """What is deployed, with the meanings of the options of `limner deploy` and `limner serve`.

    Paths are those of the nodes: `data`, `keys`, `terms` and C2PA files of the head node, others of all.
    """

    @classmethod
    def parse(cls, values: Mapping[str, object]) -> DeployOptions:
        """Return the options that values stand for, text included ("2", "true").

        Raises `InvalidRequest` that names the first option that is wrong or unknown.
        """
        try:
            return cls(**_Values.model_validate(dict(values)).model_dump())
        except ValidationError as error:
            first = error.errors()[0]
            name = str(first["loc"][0]).replace("_", "-")
            raise InvalidRequest(f"--{name}", f"{first.get('input')!r}: {first['msg']}") from None

    def checked(self) -> DeployOptions:
        """Return them with paths that do not depend on a process's folder. Raises `InvalidRequest`."""
        if self.max_replicas is not None and self.max_replicas < self.replicas:
            raise InvalidRequest(
                "--max-replicas", f"{self.max_replicas} is less than the {self.replicas} of --replicas"
            )
        if self.store_memory is not None:
            parse_bytes(self.store_memory, field="--store-memory")
        check_store(self.store, cache=self.store_cache, disk_bytes=self.store_bytes)
        paths = {
            one.name: os.path.abspath(place)
            for one in options_of(DeployOptions)
            if one.path is not None
            and (place := getattr(self, one.name)) is not None
            and not is_url(place)
            and (one.path == "written" or os.path.exists(place))  # else a hub id, or an error when it is read
        }
        keyed = self.keyed or bool(os.environ.get("LIMNER_KEYS"))
        return replace(self, **{"data": self.storage, **paths}, keyed=keyed)

    def model_options(self) -> ModelOptions:
        """Return what each replica loads."""
        return select(ModelOptions, self)

    def serve_options(self, *, host: str = "127.0.0.1", port: int = 0) -> ServeOptions:
        """Return what the ingress serves."""
        return ServeOptions(**vars(select(ServiceOptions, self)), host=host, port=port)

    @property
    def store_folder(self) -> str:
        """The folder of K/V that nodes write in; "" if there is none."""
        return (self.store_cache if is_url(self.store) else self.store) or ""

    @property
    def on_head(self) -> bool:
        """Whether the ingress runs on the head node and nowhere else."""
        return not is_url(self.data) if self.head is None else self.head


def _values() -> type[BaseModel]:
    """Return the pydantic model of the fields of `DeployOptions`."""
    definitions: dict[str, Any] = {
        one.name: (one.annotation, Field(one.default, ge=one.minimum, gt=one.above))
        for one in options_of(DeployOptions)
    }
    return create_model("DeployOptions", __config__=ConfigDict(extra="forbid", protected_namespaces=()), **definitions)


_Values = _values()
