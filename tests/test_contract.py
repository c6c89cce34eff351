"""The op contract: every line of the core's schema list has all that makes it an op."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path

import pytest
import torch

from bad_inputs import BAD_INPUTS
from partune import _native, ops
from partune.ops._contract import OPS

ROOT = Path(__file__).parent.parent
SCHEMAS = _native.require().schemas()
NAMES = [re.match(r"\w+", schema)[0] for _, schema in SCHEMAS]
FAMILIES = dict(zip(NAMES, (family for family, _ in SCHEMAS), strict=True))


def has_kernel(name: str, key: str) -> bool:
    return torch._C._dispatch_has_kernel_for_dispatch_key(f"partune::{name}", key)


def test_the_schema_list_and_the_registry_name_the_same_ops() -> None:
    assert set(NAMES) == set(OPS)
    assert {name: op.family for name, op in OPS.items()} == FAMILIES


@pytest.mark.parametrize("name", NAMES)
def test_python_parts(name: str) -> None:
    op = OPS[name]
    assert getattr(ops, name) is op.function, "the wrapper is public"
    for part in ("Args:", "Raises:", "Example:", ">>> "):
        assert part in op.function.__doc__, f"{name}'s docstring lacks {part}"
    assert has_kernel(name, "CompositeExplicitAutograd"), "the reference is registered"
    assert (
        has_kernel(name, "Meta")
        or torch._library.simple_registry.singleton.find(f"partune::{name}").fake_impl.kernel
    ), "the fake kernel is registered"


@pytest.mark.parametrize("name", NAMES)
def test_kernels(name: str) -> None:
    assert has_kernel(name, "CPU")
    assert f'impl("{name}"' in (ROOT / "csrc/cuda/bindings.h").read_text()


@pytest.mark.parametrize("name", NAMES)
def test_mutation_is_declared_and_seen_by_autograd(name: str) -> None:
    schema = OPS[name].overload._schema
    assert schema.is_mutable is name.endswith("_")
    assert has_kernel(name, "ADInplaceOrView") is schema.is_mutable


@pytest.mark.parametrize("name", NAMES)
def test_tested_and_measured(name: str) -> None:
    family = FAMILIES[name]
    tests = (ROOT / f"tests/test_ops_{family}.py").read_text()
    assert re.search(rf"\bops\.{name}\(|\brun\((backend\.)?ops\.{name}\)", tests), (
        "on every backend"
    )
    assert f"opcheck(ops.{name}.default" in tests
    benchmarks = (ROOT / f"benchmarks/bench_{family}.py").read_text()
    assert f"torch.ops.partune.{name}." in benchmarks
    assert BAD_INPUTS[name], "one table of bad inputs is fed to the wrapper, the fake and C++"


@pytest.mark.parametrize("family", sorted(set(FAMILIES.values())))
def test_a_family_has_one_name_on_every_floor(family: str) -> None:
    assert importlib.util.find_spec(f"partune.ops.{family}")
    for path in ("csrc/kernels/{}.h", "csrc/kernels/{}_cpu.cpp", "csrc/cpu/{}.cpp"):
        assert (ROOT / path.format(family)).exists()


def test_kernels_know_no_torch() -> None:
    for path in (ROOT / "csrc/kernels").iterdir():
        assert not re.search(
            r"#include *<(torch|ATen|c10|string|vector|algorithm)", path.read_text()
        )
