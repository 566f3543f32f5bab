"""Studies that ship: one file per question, named after it. `elegans run NAME` runs one, `NAME.PART` a part of it."""

from __future__ import annotations

import functools
import inspect
import pkgutil
from collections.abc import Callable, Sequence

from elegans.figures import Drawing
from elegans.instruments import Instrument
from elegans.study import Study
from elegans.training import Run

Made = tuple[Sequence[Run], Sequence[Instrument]]


def names() -> list[str]:
    """Names of the studies that ship."""
    return sorted(m.name for m in pkgutil.iter_modules(__path__))


class Parts(dict[str, Callable[[bool], Study]]):
    """The parts of a study, by name: each is a question, made when it is asked for, whole or small. A study's file names them `PARTS`."""

    def __init__(self, study: str, sized: Callable[[Callable[..., Made], bool], Made]):
        """`sized` makes the runs and instruments of a part from its function, whole or small."""
        super().__init__()
        self._study, self._sized = study, sized

    def part(self, figures: Drawing | None = None) -> Callable[[Callable[..., Made]], Callable[[bool], Study]]:
        """Decorates a function that makes a part: its name is the part's, its docstring's first line the question."""

        def of(make: Callable[..., Made]) -> Callable[[bool], Study]:
            @functools.wraps(make)
            def study(small: bool = False) -> Study:
                question = (inspect.getdoc(make) or "").splitlines()[0]
                return Study(*self._sized(make, small), f"{self._study}.{make.__name__}{'_small' * small}", question, figures=figures)

            self[make.__name__] = study
            return study

        return of
