"""The rows of a data set, read when somebody looks at them; a run that finds its tokens kept does not."""

from collections.abc import Callable
from functools import cached_property
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import datasets


class Rows:
    """A table of `datasets` that need not be there yet.

    known_as: stands for its content, with everything that decides how it is read, so that equal texts mean equal rows;
    None where the content is known only by looking at it. read: gives the table; called at most once.
    """

    def __init__(self, known_as: str | None, read: "Callable[[], datasets.Dataset]") -> None:
        self.known_as, self._read = known_as, read

    @cached_property
    def table(self) -> "datasets.Dataset":
        """The table itself. Raises what reading it raises: InputError, with file and line where those are at fault."""
        return self._read()

    def part(self, name: str, choose: "Callable[[datasets.Dataset], datasets.Dataset]") -> "Rows":
        """Some of the rows; name: stands for what `choose` does, as `known_as` for the whole."""
        known_as = None if self.known_as is None else f"{self.known_as}, {name}"
        return Rows(known_as, lambda: choose(self.table))
