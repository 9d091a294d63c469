from __future__ import annotations

import operator

from torch import nn

from mhc_compile.passes.sites import ResidualChain, ResidualSite
from tests.capture.test_graph import captured
from tests.tiny import ids, tiny


def test_a_site_says_its_line_and_owner_a_chain_its_ends() -> None:
    model = tiny(layers=1)
    gm = captured(model, ids())
    adds = [node for node in gm.graph.nodes if node.target is operator.add]
    sites = [ResidualSite(add, add.args[0], add.args[0], [(add.args[1], 1.0)], set(), []) for add in adds]
    chain = ResidualChain(sites)
    assert chain.head is adds[0].args[0]
    assert chain.end is adds[-1]
    assert [site.module for site in sites] == ["layers.0", "layers.0"]
    sites[0].owner = (nn.Module(), ("a", "b"))
    assert sites[0].module == "a.b"
    assert all("tests/tiny.py:" in site.where for site in sites)
