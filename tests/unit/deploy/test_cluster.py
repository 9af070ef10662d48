"""Nodes of a cluster that cannot draw what this process would."""

from __future__ import annotations

from collections.abc import Mapping

import pytest

from limner.deploy.cluster import check_nodes, this_node
from limner.errors import InvalidRequest


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"torch": "1.0"}, "node 10.0.0.2 has torch 1.0, this process"),
        ({"limner": "0.0.9"}, "node 10.0.0.2 has limner 0.0.9, this process"),
        ({"python": "3.9.1"}, "node 10.0.0.2 has python 3.9.1, this process"),
        ({"folder": "missing"}, "node 10.0.0.2 does not see the folder"),
        ({"error": "ModuleNotFoundError: no limner"}, "node 10.0.0.2 cannot draw .ModuleNotFoundError"),
    ],
)
def test_nodes_that_differ_are_named_with_both_versions(change: Mapping[str, str], message: str) -> None:
    mine = this_node()
    nodes = {"10.0.0.1": {**mine, "folder": "seen"}, "10.0.0.2": {**mine, "folder": "seen", **change}}
    with pytest.raises(InvalidRequest, match=message) as raised:
        check_nodes(nodes, driver=mine)
    for name in set(change) & set(mine):
        assert mine[name] in str(raised.value)
    check_nodes({"10.0.0.1": nodes["10.0.0.1"]}, driver=mine)
