"""How many residual adds a Hugging Face model executes, read from the source of its layers and not from a graph.

The rule is layers x sublayers, with the sublayers counted in the text of the layers and the layers counted by running:
a statement is a residual add if it adds a variable that bears one of the names that are used for the carrier
(``residual``, ``shortcut``, ``identity``, ``input_tensor``, ``inputs``), or if it adds something to a stream and stores
it under the stream's own name. Chained adds are one (``x + attn + mlp``). A sum that goes straight into a norm, and is
read by nothing else, is post-norm. A line tracer counts how often each such statement is executed in one forward pass,
so that conditions, loops, shared layers and unused branches count as they should.
"""

from __future__ import annotations

import ast
import functools
import re
import sys
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

import torch

from tests.zoo.base import Example

CARRIER = re.compile(r"(?!D_).*(residual|shortcut|short_cut).*|identity|input_tensor|skip_connection")
STREAM = re.compile(
    r"(hidden_states?|hidden|x|h|output|out|encoder_states|src|tgt|queries|features?|outputs?|image_embeds)"
)
NO_BRANCH = re.compile(
    r".*(D_residual|pos|mask|bias|token_type|type_emb|time_emb|deepstack|per_layer_input|scale_shift|shared_expert).*"
)
BRANCH = re.compile(
    r"(attn|attention|mlp|ffn|ff|feed_forward|feedforward|layer|self_attn|cross_attn\w*)_?(output|outputs|out)\w*"
)


@dataclass(frozen=True)
class Add:
    """A residual add in a source file: the lines of its statement, and whether a norm sits on the sum."""

    first: int
    last: int
    post_norm: bool


@dataclass(frozen=True)
class Count:
    """Executed residual adds of one forward pass. where: "file:line" -> times."""

    pre_norm: int
    post_norm: int
    where: dict[str, int]


def _leaves(node: ast.expr) -> list[ast.expr]:
    """The summands of a chain of adds."""
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
        return _leaves(node.left) + _leaves(node.right)
    return [node]


def _names(node: ast.AST) -> set[str]:
    return {n.id for n in ast.walk(node) if isinstance(n, ast.Name)} | {
        n.attr for n in ast.walk(node) if isinstance(n, ast.Attribute)
    }


def _core(node: ast.expr) -> str:
    """The variable behind a summand: through a product with a scale and through casts and views of it."""
    if isinstance(node, ast.Name):
        return node.id
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
        return _core(node.func.value) if node.func.attr in ("to", "float", "view", "reshape", "type_as", "type") else ""
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Mult):
        return _core(node.left) or _core(node.right)
    if isinstance(node, ast.Subscript):
        return _core(node.value)
    return ""


def _is_residual(node: ast.BinOp, target: str) -> bool:
    """Whether this outermost chain of adds has a carrier among its summands."""
    summands = _leaves(node)
    cores = [_core(summand) for summand in summands]
    if any(isinstance(summand, ast.Tuple) for summand in summands):
        return False  # a tuple of outputs grows by one
    if any(CARRIER.fullmatch(core) for core in cores):
        return True
    if any(NO_BRANCH.fullmatch(name) for name in _names(node)) or any(isinstance(s, ast.Constant) for s in summands):
        return False
    if any(BRANCH.fullmatch(core) for core in cores) and any(
        STREAM.fullmatch(core) or core == "attn_output" for core in cores
    ):
        return True
    if "hidden_states" in cores and any(isinstance(s, ast.Call) and "self" in _names(s.func) for s in summands):
        return True
    if target not in cores or not STREAM.fullmatch(target):
        return False
    return not {"eps", "epsilon"} & _names(node)


def _norm_call(node: ast.expr) -> bool:
    """A call of something with norm in its name."""
    return isinstance(node, ast.Call) and any(
        "norm" in name.lower() or name.lower().startswith("ln") for name in _names(node.func)
    )


def _body_adds(body: list[ast.stmt]) -> list[Add]:
    found: list[Add] = []
    for index, statement in enumerate(body):
        for block in ("body", "orelse", "finalbody"):
            if isinstance(statement, (ast.If, ast.For, ast.While, ast.With, ast.Try)):
                found += _body_adds(getattr(statement, block, []))
        if isinstance(statement, (ast.FunctionDef, ast.ClassDef)):
            found += _body_adds(statement.body)
            continue
        if not isinstance(statement, (ast.Assign, ast.AugAssign, ast.AnnAssign, ast.Return)) or statement.value is None:
            continue
        targets = statement.targets if isinstance(statement, ast.Assign) else [getattr(statement, "target", None)]
        target = targets[0].id if len(targets) == 1 and isinstance(targets[0], ast.Name) else ""
        value: ast.expr = statement.value
        if isinstance(statement, ast.AugAssign):
            if not isinstance(statement.op, ast.Add) or not target:
                continue
            value = ast.BinOp(ast.Name(target), ast.Add(), statement.value)
        # The outermost chain of adds anywhere in the value (it may be wrapped in a norm, a dropout or a tuple).
        chains = [n for n in ast.walk(value) if isinstance(n, ast.BinOp) and isinstance(n.op, ast.Add)]
        inner = {id(part) for chain in chains for part in (chain.left, chain.right)}
        sums = [chain for chain in chains if id(chain) not in inner and _is_residual(chain, target)]
        if not sums:
            continue
        wrapped = _norm_call(value)
        following = body[index + 1] if index + 1 < len(body) else None
        overwritten = (
            isinstance(following, ast.Assign)
            and isinstance(following.targets[0], ast.Name)
            and following.targets[0].id == target
            and _norm_call(following.value)
            and target in _names(following.value)
        )
        found.append(Add(statement.lineno, statement.end_lineno or statement.lineno, wrapped or overwritten))
    return found


@functools.cache
def adds_of(path: str) -> dict[int, Add]:
    """Line -> the residual add whose statement covers it."""
    tree = ast.parse(Path(path).read_text())
    return {line: add for add in _body_adds(tree.body) for line in range(add.first, add.last + 1)}


def count(example: Example) -> Count:
    """Run the model once without gradients and count the executed residual adds of the Hugging Face model files."""
    seen: Counter[tuple[str, Add]] = Counter()

    def tracer(frame: FrameType, event: str, _argument: Any) -> Any:
        path = frame.f_code.co_filename
        if "/transformers/models/" not in path:
            return None
        table = adds_of(path)
        inside: list[Add | None] = [None]

        def lines(frame: FrameType, event: str, _argument: Any) -> Any:
            if event == "line":
                add = table.get(frame.f_lineno)
                if add is not None and add is not inside[0]:
                    seen[path, add] += 1
                inside[0] = add
            return lines

        return lines

    before = sys.gettrace()
    sys.settrace(tracer)
    try:
        with torch.no_grad():
            example.model(**example.inputs)
    finally:
        sys.settrace(before)
    where = {
        f"{Path(path).name}:{add.first}": times
        for (path, add), times in sorted(seen.items(), key=lambda item: (item[0][0], item[0][1].first))
    }
    return Count(
        pre_norm=sum(times for (_, add), times in seen.items() if not add.post_norm),
        post_norm=sum(times for (_, add), times in seen.items() if add.post_norm),
        where=where,
    )
