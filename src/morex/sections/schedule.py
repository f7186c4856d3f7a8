"""How blocks are shared over depth."""

from typing import Annotated, Self

from pydantic import Field, PositiveInt, model_validator

from morex.depth.schedule import Schedule, Sharing, from_layers
from morex.sections.base import Section


class ScheduleConfig(Section):
    """How blocks are shared over depth: a named strategy for `layers`, or any `prelude`, `core` and `coda`."""

    sharing: Sharing = "none"
    """`cycle` ABCABC, `sequence` AABBCC, `middle_` forms keep a unique first and last block, `none` shares nothing."""
    layers: PositiveInt | None = None
    """Unrolled depth L; give either this or `core`."""
    recursions: PositiveInt = 1
    """Recursions R."""
    prelude: Annotated[int, Field(ge=0)] | None = None
    """Unshared first blocks; only with `core`. Default 0, and 1 in the `middle_` forms."""
    core: PositiveInt | None = None
    """Shared blocks that recur."""
    coda: Annotated[int, Field(ge=0)] | None = None
    """Unshared last blocks; only with `core`. Default as for `prelude`."""

    @property
    def resolved(self) -> Schedule:
        """The schedule. Raises ValueError where the depths do not work out."""
        if (self.layers is None) == (self.core is None):
            raise ValueError("schedule needs either layers (unrolled depth) or core (shared blocks), and not both")
        if self.layers is not None:
            if self.prelude is not None or self.coda is not None:
                raise ValueError(
                    "schedule.prelude and schedule.coda go with schedule.core; with schedule.layers they follow from "
                    f"sharing {self.sharing!r}"
                )
            return from_layers(self.sharing, self.layers, self.recursions)
        assert self.core is not None
        if self.sharing == "none":
            raise ValueError("schedule.sharing 'none' needs schedule.layers; with core use cycle or sequence")
        if self.sharing in ("cycle", "sequence"):
            return Schedule(self.prelude or 0, self.core, self.coda or 0, self.recursions, self.sharing)
        for end, blocks in (("prelude", self.prelude), ("coda", self.coda)):
            if blocks not in (None, 1):
                raise ValueError(
                    f"schedule.sharing {self.sharing!r} has a {end} of 1 block, and schedule.{end} is {blocks}; use "
                    f"{self.sharing.removeprefix('middle_')!r}"
                )
        return from_layers(self.sharing, 2 + self.core * self.recursions, self.recursions)

    @model_validator(mode="after")
    def _resolves(self) -> Self:
        _ = self.resolved
        return self
