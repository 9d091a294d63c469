"""The passes over the captured graph, in their order; see ``base`` for what a pass is."""

from mhc_compile.passes.base import Pass, PassContext, PassResult, Refusal, run_pass
from mhc_compile.passes.find_sites import find_sites
from mhc_compile.passes.fold_norms import fold_norms
from mhc_compile.passes.fragment import check_fragment
from mhc_compile.passes.raise_chains import raise_chains
from mhc_compile.passes.recompute import recompute
from mhc_compile.passes.respell import respell
from mhc_compile.passes.widen import widen

ORDER: tuple[Pass, ...] = (raise_chains, respell, find_sites, check_fragment, widen, fold_norms, recompute)
"""THE ORDER. Hand-written hyper-connections first (a model that has them is not widened), then the plain adds;
then what one kernel does of what is there; and last, what is kept of all of it for the backward."""

__all__ = ["ORDER", "Pass", "PassContext", "PassResult", "Refusal", "run_pass"]
