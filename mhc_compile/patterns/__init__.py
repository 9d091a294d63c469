"""The patterns: hand-written hyper-connections in any spelling, each as *pattern · check · replace*.

    reading       one canonical meaning for every spelling of a node
    axes          named axes: which axis of one tensor is which of another
    region        what lies between the inputs and outputs of a match, and what forbids to take it out
    judge         the float64 comparison that has the last word
    sinkhorn      unrolled row and column normalisations
    mix           post-apply and pre-apply: where the sites are
    coefficients  norm, projection, activation and Sinkhorn of a site (stream_norm reads the norm)
    stream_norm   the norm of each stream on its own
    channel_pre   pre-apply with a gate for every channel
    collapse      expansion to n streams, mean and sum over them

``passes.raise_chains`` runs them in this order. ``pre_norm`` finds the norm that a branch begins with, for
``passes.fold_norms``.
"""

from mhc_compile.patterns.base import MAX_STREAMS, Candidate, Refused
from mhc_compile.patterns.judge import Judge
from mhc_compile.patterns.region import GraphFacts, Region

__all__ = ["MAX_STREAMS", "Candidate", "GraphFacts", "Judge", "Refused", "Region"]
