"""The one error that a user's mistake raises."""

from __future__ import annotations


class Invalid(ValueError):
    """A value that elegans refuses, said in one line: the field, the value, and what is allowed.

    `field` grows leftwards as the error travels out of nested specs, so that the user reads the
    dotted path that they wrote (`optim.lr`), not the class that noticed.
    """

    def __init__(self, field: str, value: object, allowed: str):
        self.field, self.value, self.allowed = field, value, allowed
        super().__init__(field, value, allowed)

    def __str__(self) -> str:
        shown = repr(self.value)
        shown = shown if len(shown) <= 80 else f"{shown[:37]}...{shown[-40:]}"  # of a path, the end says most
        return " ".join(f"{self.field}: {shown} is not allowed; {self.allowed}".split())

    def inside(self, path: str) -> Invalid:
        """The same error seen from one level further out."""
        return type(self)(f"{path}.{self.field}" if self.field else path, self.value, self.allowed)


class StoreError(ValueError):
    """A store that cannot be used as asked, said in one line."""
