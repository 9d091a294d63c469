from __future__ import annotations

import pytest
import torch
from torch import fx

from mhc_compile.config import Options
from mhc_compile.passes import ORDER, PassContext, PassResult, Refusal, run_pass


def graph() -> fx.GraphModule:
    built = fx.Graph()
    x = built.placeholder("x")
    built.output(built.call_function(torch.sin, (x,)))
    return fx.GraphModule(torch.nn.Module(), built)


def test_a_refusal_reads_as_one_line() -> None:
    assert str(Refusal("residual add", "because", "a.py:3", "layers.0")) == "residual add layers.0 (a.py:3): because"
    assert str(Refusal("sinkhorn", "because")) == "sinkhorn: because"


def test_a_pass_is_timed_and_its_graph_checked() -> None:
    def breaks(gm: fx.GraphModule, ctx: PassContext) -> PassResult:
        nodes = list(gm.graph.nodes)
        nodes[1].prepend(nodes[2])  # the output before what it returns
        return PassResult("breaks", changed=1)

    with pytest.raises(RuntimeError, match="used before"):
        run_pass(breaks, graph(), PassContext(Options()))
    result = run_pass(lambda gm, ctx: PassResult("nothing"), graph(), PassContext(Options()))
    assert (result.name, result.changed) == ("nothing", 0)
    assert result.seconds > 0


def test_the_order() -> None:
    names = ["raise_chains", "respell", "find_sites", "check_fragment", "widen", "fold_norms", "recompute"]
    assert [step.__name__ for step in ORDER] == names
