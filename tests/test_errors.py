"""Every error says what happened, where and what to do, and survives pickling (it crosses process borders in DDP)."""

from __future__ import annotations

import pickle
import subprocess
import sys
import warnings

import pytest

from mhc_compile import errors

CLASSES = [getattr(errors, name) for name in errors.__all__]


def test_parts_and_text() -> None:
    error = errors.LayoutError("the state is [B, C, H, W]", where="model.py:12", cure="permute it")
    assert (error.what, error.where, error.cure) == ("the state is [B, C, H, W]", "model.py:12", "permute it")
    assert str(error) == "the state is [B, C, H, W]\n  where: model.py:12\n  cure:  permute it"
    assert str(errors.LayoutError("just this")) == "just this"


def test_default_cure_is_used_unless_one_is_given() -> None:
    assert "prepare" in str(errors.WrappedModelError("DDP"))
    assert errors.WrappedModelError("DDP", cure="other").cure == "other"


@pytest.mark.parametrize("cls", CLASSES, ids=lambda cls: cls.__name__)
def test_every_class(cls: type[errors.MhcError]) -> None:
    assert cls.__doc__
    assert issubclass(cls, errors.MhcWarning if cls.__name__.endswith("Warning") else errors.MhcError)
    error = cls("what", where="f.py:1", cure="cure")
    again = pickle.loads(pickle.dumps(error))
    assert type(again) is cls
    assert (again.what, again.where, again.cure, str(again)) == (error.what, error.where, error.cure, str(error))


def test_all_names_every_class() -> None:
    public = {n for n, value in vars(errors).items() if isinstance(value, type) and not n.startswith("_")}
    assert public - {"Any"} == set(errors.__all__)


def test_standard_bases() -> None:
    assert issubclass(errors.OptionError, ValueError)
    assert issubclass(errors.MissingDependencyError, ImportError)
    with warnings.catch_warnings():
        warnings.simplefilter("error", errors.MhcWarning)
        with pytest.raises(errors.NotLoweredWarning, match="no kernel"):
            warnings.warn(errors.NotLoweredWarning("no kernel", cure="none"), stacklevel=1)


def test_needs_nothing() -> None:
    """The file itself imports no torch: it is read by everything, also by what must be quick."""
    code = "import runpy, sys; runpy.run_path(sys.argv[1]); assert 'torch' not in sys.modules"
    assert errors.__file__ is not None
    subprocess.run([sys.executable, "-c", code, errors.__file__], check=True)
