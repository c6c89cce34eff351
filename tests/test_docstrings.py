"""The examples of the docstrings: every module's are run, and every public name has one."""

import doctest
import importlib
import inspect
import pkgutil

import pytest

import partune
from partune.nn import MergeReport
from partune.selection import HalfReset

# What functions return; their examples show it.
RETURNED = (MergeReport, HalfReset)
PUBLIC = (
    "partune.integrations.peft",
    "partune.integrations.transformers",
    "partune.nn",
    "partune.ops",
    "partune.optim",
    "partune.selection",
)


def modules():
    found = pkgutil.walk_packages(partune.__path__, "partune.")
    return [module.name for module in found if not module.name.endswith(("._C", ".__main__"))]


def public_names():
    for package in map(importlib.import_module, PUBLIC):
        for name in getattr(package, "__all__", ()):
            yield pytest.param(getattr(package, name), id=f"{package.__name__}.{name}")


@pytest.mark.parametrize("name", modules())
def test_examples(name):
    assert doctest.testmod(importlib.import_module(name)).failed == 0


@pytest.mark.parametrize("documented", list(public_names()))
def test_public_names_have_an_example(documented):
    callable_by_users = inspect.isclass(documented) or inspect.isfunction(documented)
    if callable_by_users and documented not in RETURNED:
        assert ">>> " in (inspect.getdoc(documented) or "")
