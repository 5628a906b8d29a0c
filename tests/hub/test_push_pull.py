"""Push and pull over real HTTP: what goes up, what comes down, who may."""

import torch

import pytest

from hub_mpq import HubMPQ
from hub_mpq.errors import HubMPQError, InvalidArgument
from hub_mpq.hub.folder import PACKED
from hub_mpq.hub.publish import FLOAT_COPY, publish
from hub_mpq.hub.pull import fetch, pull

pytestmark = pytest.mark.hub
NAME = "me/toy"


def test_push_and_pull_give_the_same_model(hub, mpq, net, x):
    done = mpq.push_to_hub(NAME, token="write-token")
    there = hub.store.content(NAME)
    assert {"config.json", PACKED, "README.md", "policy.png"} <= set(there)
    assert FLOAT_COPY not in there, "a network of one's own has no plain loader to serve"
    assert hub.store.repos[NAME].refs["main"] == done.oid
    assert len(hub.store.repos[NAME].commits) == 2, "one commit after the first"
    again = HubMPQ.from_pretrained(NAME, module=net)
    assert torch.equal(again(x), mpq(x))
    assert again.policy == mpq.policy
