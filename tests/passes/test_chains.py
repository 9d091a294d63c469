"""Chains from sites made by hand: nothing but their parents, streams and branches decides."""

from __future__ import annotations

from torch import fx

from mhc_compile.config import Options
from mhc_compile.passes.base import PassContext
from mhc_compile.passes.chains import assemble
from mhc_compile.passes.sites import ResidualChain, ResidualSite

GRAPH = fx.Graph()


def node(name: str) -> fx.Node:
    return GRAPH.placeholder(name)


def site(
    name: str, stream: fx.Node, parent: ResidualSite | None = None, branch: set[fx.Node] | None = None
) -> ResidualSite:
    add = node(name)
    output = node(f"{name}_branch")
    return ResidualSite(add, stream, stream, [(output, 1.0)], (branch or set()) | {output}, [], parent=parent)


def line(name: str, count: int, head: fx.Node | None = None) -> list[ResidualSite]:
    """Sites one after the other on one stream."""
    sites: list[ResidualSite] = []
    stream, parent = head if head is not None else node(f"{name}_head"), None
    for index in range(count):
        sites.append(site(f"{name}{index}", stream, parent))
        stream, parent = sites[-1].add, sites[-1]
    return sites


def chains(sites: list[ResidualSite]) -> tuple[list[ResidualChain], list[str]]:
    found, refusals = assemble(sites, PassContext(Options()))
    return found, [refusal.reason for refusal in refusals]


def test_a_line_is_one_chain_in_order() -> None:
    sites = line("line", 4)
    found, reasons = chains(sites)
    assert [chain.sites for chain in found] == [sites]
    assert reasons == []


def test_two_heads_are_two_chains() -> None:
    first, second = line("encoder", 3), line("decoder", 2)
    found, _ = chains(first + second)
    assert [chain.sites for chain in found] == [first, second]
    assert [chain.index for chain in found] == [0, 1]


def test_a_fork_of_one_site_gives_way_and_a_longer_one_is_kept() -> None:
    trunk = line("trunk", 4)
    lone = site("lone", trunk[1].add, trunk[1])
    found, reasons = chains([*trunk, lone])
    assert [chain.sites for chain in found] == [trunk]
    assert len(reasons) == 1
    assert "long skip" in reasons[0]
    fork = [site("fork0", trunk[1].add, trunk[1])]
    fork.append(site("fork1", fork[0].add, fork[0]))
    found, reasons = chains([*trunk, *fork])
    assert [chain.sites for chain in found] == [trunk, fork]
    assert reasons == []


def test_inside_a_branch_is_left_alone() -> None:
    inner = line("inner", 1)
    outer = line("outer", 3)
    outer[1].branch |= {inner[0].add}
    found, reasons = chains([*inner, *outer])
    assert [chain.sites for chain in found] == [outer]
    assert len(reasons) == 1
    assert "inside the branch" in reasons[0]


def test_pieces_between_norms_are_post_norm_and_long_ones_are_not() -> None:
    pieces = [line("a", 1), line("b", 1)]
    norm = node("layer_norm")
    pieces[1][0].after_norm, pieces[1][0].norm_parent = norm, pieces[0][0]
    found, reasons = chains([*pieces[0], *pieces[1]])
    assert found == []
    assert len(reasons) == 2
    long = [line("c", 4), line("d", 3)]
    long[1][0].after_norm, long[1][0].norm_parent = norm, long[0][-1]
    found, _ = chains([*long[0], *long[1]])
    assert [chain.sites for chain in found] == long


def test_an_add_around_a_stream_that_begins_in_its_own_image_is_a_long_skip() -> None:
    """``z + f(z + y)`` with two adds or more in f: z goes through them."""
    image = node("image")
    inner = line("inner", 2, image)
    outer = site("outer", node("z"), branch={image, *(s.add for s in inner)})
    outer.images = frozenset([image])
    found, reasons = chains([*inner, outer])
    assert [chain.sites for chain in found] == [inner]
    assert reasons == ["long skip around 2 residual adds of its own stream"]


def test_one_add_to_something_learned_is_no_chain() -> None:
    alone, first = site("alone", node("position")), line("queries", 2)
    alone.from_constant = first[0].from_constant = True
    found, reasons = chains([alone, *first])
    assert [chain.sites for chain in found] == [first]
    assert len(reasons) == 1
    assert "learned queries" in reasons[0]


def test_of_two_adds_to_one_state_the_inner_one_gives_way() -> None:
    """A learned position is added to what the attention reads: the stream goes on behind the attention."""
    head = node("state")
    inner = site("position", head)
    outer = site("attention", head, branch={inner.add})
    found, reasons = chains([inner, outer])
    assert [chain.sites for chain in found] == [[outer]]
    assert len(reasons) == 1
    assert "inside the branch" in reasons[0]


def test_one_add_that_no_layer_reads_as_channels_is_no_chain() -> None:
    alone = site("bias", node("scores"))
    alone.channels_known = False
    found, reasons = chains([alone])
    assert found == []
    assert ["attention scores" in reason for reason in reasons] == [True]
