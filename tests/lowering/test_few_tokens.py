"""Where the two launches are taken, on graphs without a device. Their numbers: interpreted_few_tokens.py."""

from __future__ import annotations

import operator
from typing import Any

import pytest
import torch
from torch import fx
from torch._subclasses import FakeTensorMode

from mhc_compile.compat import triton_version
from mhc_compile.lowering.base import LoweringLog
from mhc_compile.ops import CoefficientSpec

pytestmark = pytest.mark.skipif(not triton_version(), reason="Triton is not installed")

SPEC = CoefficientSpec()
WIDTH = 32


class Graph:
    """Two sites behind each other, built by hand: post, coefficients, pre_norm, post. What a test changes is a flag."""

    def __init__(self, tokens: int = 6, **flags: bool) -> None:
        self.graph, self.mode, self.tokens = fx.Graph(), FakeTensorMode(), tokens
        self.flags = flags
        self.build()

    def value(self, node: fx.Node, *shape: int, dtype: torch.dtype = torch.float32) -> fx.Node:
        with self.mode:
            node.meta["val"] = torch.empty(shape, dtype=dtype)
        return node

    def given(self, name: str, *shape: int, dtype: torch.dtype = torch.float32) -> fx.Node:
        return self.value(self.graph.placeholder(name), *shape, dtype=dtype)

    def call(self, target: Any, args: tuple[Any, ...], *shape: int, dtype: torch.dtype = torch.float32) -> fx.Node:
        return self.value(self.graph.call_function(target, args), *shape, dtype=dtype)

    def pick(self, source: fx.Node, index: int) -> fx.Node:
        picked = self.graph.call_function(operator.getitem, (source, index))
        picked.meta["val"] = source.meta["val"][index]
        return picked

    def build(self) -> None:
        tokens, bf16 = self.tokens, torch.bfloat16
        x, y = self.given("x", tokens, 4, WIDTH, dtype=bf16), self.given("y", tokens, WIDTH, dtype=bf16)
        q, h = self.given("q", tokens, 4), self.given("h", tokens, 4, 4)
        phi, bias, alpha = self.given("phi", 24, 4 * WIDTH), self.given("bias", 24), self.given("alpha", 1)
        weight = self.given("weight", WIDTH)
        state = self.call(torch.ops.mhc.post.default, (x, y, q, h, False), tokens, 4, WIDTH, dtype=bf16)
        if self.flags.get("phi_late"):  # a parameter that is cast where it is used
            phi = self.call(torch.ops.aten.neg.default, (phi,), 24, 4 * WIDTH)
        if self.flags.get("phi_of_the_state"):
            total = self.call(torch.ops.aten.sum.default, (state,), dtype=bf16)
            phi = self.call(torch.ops.aten.mul.Tensor, (phi, total), 24, 4 * WIDTH)
        args = (state, phi, bias, alpha, alpha, alpha, *SPEC.op_arguments().values())
        outputs = self.graph.call_function(torch.ops.mhc.coefficients.default, args)
        with self.mode:
            sizes = ((tokens, 4), (tokens, 4), (tokens, 4, 4), (tokens, 25))
            outputs.meta["val"] = tuple(torch.empty(size) for size in sizes)
        pre, post, res = (self.pick(outputs, index) for index in range(3))
        if self.flags.get("gate_changed"):
            pre = self.call(torch.ops.aten.neg.default, (pre,), tokens, 4)
        if self.flags.get("weight_late"):
            weight = self.call(torch.ops.aten.neg.default, (weight,), WIDTH)
        mix = self.graph.call_function(
            torch.ops.mhc.pre_norm.default, (state, pre, weight, None, "rms", 1e-6, 0.0, False)
        )
        with self.mode:
            mix.meta["val"] = (torch.empty(tokens, WIDTH, dtype=bf16), torch.empty(tokens, 1))
        u = self.pick(mix, 0)
        last = self.call(torch.ops.mhc.post.default, (state, u, post, res, False), tokens, 4, WIDTH, dtype=bf16)
        kept = [self.pick(outputs, 3), pre] if self.flags.get("training") else []
        self.graph.output((state, last, *kept))

    def merged(self, refuse: str = "") -> tuple[int, list[str]]:
        """(how many sites, the calls of ours that are left)."""
        from mhc_compile.lowering import few_tokens

        count = few_tokens.merge(self.graph, LoweringLog(), lambda name, named: "no" if name == refuse else "")
        self.graph.eliminate_dead_code()
        self.graph.lint()
        names = [str(node.target).removesuffix(".default") for node in self.graph.nodes]
        return count, [name for name in names if name.startswith("mhc")]

    def keeps(self) -> list[Any]:
        """store_pre and store_projection of the call."""
        node = next(node for node in self.graph.nodes if str(node.target).startswith("mhc_kernel.activate_pre_norm"))
        return list(node.args[13:15])


BOTH = ["mhc_kernel.post_project", "mhc_kernel.activate_pre_norm", "mhc.post"]
SECOND = ["mhc.post", "mhc_kernel.project", "mhc_kernel.activate_pre_norm", "mhc.post"]
FOUR = ["mhc.post", "mhc.coefficients", "mhc.pre_norm", "mhc.post"]


def test_few_and_many() -> None:
    assert Graph(64).merged() == (1, BOTH)
    assert Graph(65).merged() == (0, FOUR)


@pytest.mark.parametrize("flag", ["phi_late", "weight_late"])
def test_what_is_computed_between_is_moved_up(flag: str) -> None:
    assert Graph(**{flag: True}).merged() == (1, BOTH)


def test_a_projection_that_needs_the_state_stays_behind_it() -> None:
    assert Graph(phi_of_the_state=True).merged() == (1, SECOND)


def test_a_gate_that_is_changed_on_its_way_is_not_ours() -> None:
    assert Graph(gate_changed=True).merged() == (0, FOUR)


@pytest.mark.parametrize(("refuse", "left"), [("coefficients", FOUR), ("pre_norm", FOUR), ("post", SECOND)])
def test_what_no_kernel_takes(refuse: str, left: list[str]) -> None:
    assert Graph().merged(refuse)[1] == left


def test_only_what_is_read_is_written() -> None:
    """Inference: neither pre nor the projection. Training: both, for the backward."""
    for training in (False, True):
        graph = Graph(training=training)
        assert graph.merged() == (1, BOTH)
        assert graph.keeps() == [training, training]


def test_a_backward_graph_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """A replayed forward keeps the kernels that the first one had."""
    from mhc_compile.lowering import fuse, kernels

    monkeypatch.setattr(kernels, "platform_refusal", lambda device: "")
    for backward in (False, True):
        made = Graph()
        if backward:
            x, gate = (node for node in made.graph.nodes if node.name in ("x", "q"))
            with made.graph.inserting_after(gate):
                args = (x, x, gate, [True, True])
                made.graph.call_function(torch.ops.mhc.pre_backward.default, args)
        fuse.run(made.graph, log := LoweringLog())
        assert log.counts()["few tokens", "fused"] == (not backward)
