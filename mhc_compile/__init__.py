"""Hyper-connections by compiler: ``torch.compile(model, backend="mhc")``.

The backend needs no import; this module has what goes with it. See README.md.
"""

from mhc_compile import errors
from mhc_compile.api import explain, prepare
from mhc_compile.config import Options
from mhc_compile.model import load_state_dict, plain, state_dict, to_plain
from mhc_compile.standalone import standalone

__version__ = "0.1.0"

__all__ = [
    "Options",
    "__version__",
    "errors",
    "explain",
    "load_state_dict",
    "plain",
    "prepare",
    "standalone",
    "state_dict",
    "to_plain",
]
