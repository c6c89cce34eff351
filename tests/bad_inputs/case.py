"""One bad input, and how it is made of good ones."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

Arguments = dict[str, Any]


@dataclass(frozen=True)
class Bad:
    name: str
    spoil: Callable[[Arguments], None]
    error: type[Exception]
    message: str
    native: bool = True


def csr(*columns_per_row):
    counts = torch.tensor([0, *map(len, columns_per_row)])
    columns = [column for row in columns_per_row for column in row]
    return counts.cumsum(0), torch.tensor(columns, dtype=torch.int32)


def put(name: str, value: Any, index: int | None = None) -> Callable[[Arguments], None]:
    """Replace an argument, or one entry of a list."""

    def spoil(arguments: Arguments) -> None:
        if index is None:
            arguments[name] = value
        else:
            arguments[name][index] = value

    return spoil


def drop(name: str) -> Callable[[Arguments], None]:
    """Shorten a list by one."""

    def spoil(arguments: Arguments) -> None:
        arguments[name] = arguments[name][:-1]

    return spoil


def both(*spoils: Callable[[Arguments], None]) -> Callable[[Arguments], None]:
    def spoil(arguments: Arguments) -> None:
        for one in spoils:
            one(arguments)

    return spoil
