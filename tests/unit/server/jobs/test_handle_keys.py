"""Keys of K/V beside that of a handle: found in jobs that are listed and noted of those that are not, while any handle is for
them."""

from __future__ import annotations

from typing import Any

import pytest
from tests.support.jobs import Clock, job, reference

from limner.images import PreparedReference
from limner.server.jobs.records import Handle, Webhook
from limner.server.jobs.store import JobStore

FIRST, SECOND = reference(1), reference(2)


def keep(store: JobStore, *pictures: PreparedReference, key: str = "h", owner: str = "anna") -> None:
    handle = Handle(owner=owner, key=key, references=tuple(p.report for p in pictures), num_tokens=1)
    store.add_handle(handle, pictures, max_handles=9)


def done(store: JobStore, *pictures: PreparedReference, key: str | None, **values: Any) -> str:
    """A ready job, whose K/V have a key."""
    made, _ = store.add(job(*pictures, **values), pictures)
    store.end(made.id, "ready", result={"reference_key": key}, keep_seconds=0)
    return made.id


def notes(store: JobStore) -> int:
    return len(store._storage.rows("SELECT * FROM handle_keys"))


def test_keys_are_those_of_the_same_pictures_whoever_used_them(store: JobStore) -> None:
    keep(store, FIRST, SECOND)
    done(store, FIRST, SECOND, key="k1", owner="bob")
    done(store, SECOND, FIRST, key="k2")
    done(store, FIRST, SECOND, key="h")
    done(store, FIRST, key="k3")
    done(store, key=None)
    store.add(job(FIRST, SECOND), [FIRST, SECOND])
    assert store.keys_of_handle("anna", "h") == {"h": True, "k1": True, "k2": True}
    assert store.remove_handle("anna", "h", keys=["h", "k1", "k2"]) == ["h", "k1", "k2"]


@pytest.mark.parametrize("how", ["forget", "forget_all", "clean", "webhook"])
def test_those_of_removed_jobs_are_noted_while_there_is_a_handle(store: JobStore, clock: Clock, how: str) -> None:
    keep(store, FIRST)
    told = Webhook(url="u") if how == "webhook" else None  # its row stays until it is delivered, its pictures do not
    id_ = done(store, FIRST, key="k", webhook=told)
    done(store, SECOND, key="other", webhook=told)
    if how == "clean":
        clock.now += 1
        store.clean(forget_seconds=0)
    elif how == "forget_all":
        store.forget_all("anna")
    else:
        assert store.forget(id_)
    assert store.get(id_) is None
    assert store.keys_of_handle("anna", "h") == {"h": True, "k": True}
    assert notes(store) == 1
    keep(store, FIRST, owner="bob")
    assert store.remove_handle("anna", "h", keys=["h", "k"]) == []
    assert store.keys_of_handle("bob", "h") == {"h": True, "k": True}
    assert store.remove_handle("bob", "h", keys=["h", "k"]) == ["h", "k"]
    assert notes(store) == 0
    done(store, FIRST, key="k")
    store.forget_all("anna")
    assert notes(store) == 0


def test_what_another_handle_is_for_stays(store: JobStore) -> None:
    """Of that key, as one of a picture that a job cropped; or of the same pictures, as one made with other weights."""
    keep(store, FIRST)
    done(store, FIRST, key="crop")
    done(store, FIRST, key="k")
    keep(store, SECOND, key="crop", owner="bob")
    assert store.keys_of_handle("anna", "h") == {"h": True, "crop": False, "k": True}
    keep(store, FIRST, key="later")
    assert store.keys_of_handle("anna", "h") == {"h": True, "crop": False, "k": False}
    store.forget_all("anna")
    assert store.remove_handle("anna", "h", keys=["h", "crop", "k"]) == ["h"]
    assert store.keys_of_handle("anna", "later") == {"later": True, "crop": False, "k": True}


def test_data_of_before_get_the_notes(store: JobStore, data: str) -> None:
    with store._storage.transaction() as db:
        db.execute("DROP TABLE handle_keys")
    store.close()
    after = JobStore(data)
    keep(after, FIRST)
    done(after, FIRST, key="k")
    after.forget_all("anna")
    assert after.keys_of_handle("anna", "h") == {"h": True, "k": True}
    after.close()


def test_a_handle_of_more_pictures_is_for_other_keys(store: JobStore) -> None:
    keep(store, FIRST, SECOND, key="both")
    for picture, name in ((FIRST, "one"), (SECOND, "two")):
        keep(store, picture, key=name)
        done(store, picture, key=f"of {name}")
        assert store.keys_of_handle("anna", name) == {name: True, f"of {name}": True}
    assert store.keys_of_handle("anna", "both") == {"both": True}
