"""The parameters of a converted model: where they live, how they start, how they travel.

``HyperConnection`` holds one site's parameters; ``SiteParameters`` gives them to the rewrite and registers them on the
modules that own the adds; ``adopt`` lets optimizers know of them; ``PlainRunGuard`` refuses to run the model without
them; ``state`` moves them through checkpoints.
"""

from mhc_compile.model.guard import plain
from mhc_compile.model.hyper_connection import HyperConnection, hyper_connections
from mhc_compile.model.optimizers import adopt
from mhc_compile.model.parameters import SiteParameters
from mhc_compile.model.state import load_state_dict, state_dict, to_plain

__all__ = [
    "HyperConnection",
    "SiteParameters",
    "adopt",
    "hyper_connections",
    "load_state_dict",
    "plain",
    "state_dict",
    "to_plain",
]
