"""From Dynamo's graph to our own copy: what the passes may edit, and whose line each node is.

Dynamo reads its own graph again after the backend has returned, so it is never edited in place: ``copy_graph`` gives
a private copy, ``inline_checkpoints`` opens the bodies of activation checkpoints in it, ``functionalize`` turns the
in-place writes that touch a residual stream into values, and ``ModuleMap`` says which module owns which parameter.
"""

from mhc_compile.capture.checkpoints import inline_checkpoints
from mhc_compile.capture.graph import Builder, copy_graph, meta_value, qualified_module, user_line
from mhc_compile.capture.modules import ModuleMap, ParameterRef
from mhc_compile.capture.mutation import functionalize

__all__ = [
    "Builder",
    "ModuleMap",
    "ParameterRef",
    "copy_graph",
    "functionalize",
    "inline_checkpoints",
    "meta_value",
    "qualified_module",
    "user_line",
]
