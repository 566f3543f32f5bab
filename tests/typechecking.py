"""The checker that watches the annotations of elegans' functions while tests run."""

from collections.abc import Callable
from typing import Any

from beartype import BeartypeConf, beartype

_check = beartype(conf=BeartypeConf(is_pep484_tower=True))  # where a float is asked for, an int will do


def check(function: Callable[..., Any]) -> Callable[..., Any]:
    """Watch a function. Constructors are let be: specs check their own fields, and transformations build pytrees of placeholders."""
    return function if function.__name__ == "__init__" else _check(function)
