"""Who is on the way through the model, between passes."""

from collections.abc import Sequence

from morex.infer.passes import Arrived, Flight, Passes, Segment, join


class Traffic:
    """Segments in the core, by where they are, and those that wait for coda and head."""

    def __init__(self, passes: Passes) -> None:
        self.passes = passes
        self.flights: dict[tuple[int, bool, int, int], Flight] = {}
        self.arrived: list[Arrived] = []
        self.in_hand: Sequence[Segment] = ()
        """Who takes part in the pass of the moment, or took part in the last."""

    @property
    def waiting(self) -> int:
        """Segments that are done with the core."""
        return sum(len(part.segments) for part in self.arrived)

    def enter(self, segments: Sequence[Segment]) -> None:
        """Sends segments through the prelude."""
        self.in_hand = segments
        self._keep(*self.passes.enter(segments))

    def core(self) -> None:
        """Takes everybody in the core through a recursion."""
        for group in range(len(self.passes.groups)):
            flights = [self.flights.pop(key) for key, own in list(self.flights.items()) if own.group == group]
            if flights:
                self.in_hand = [segment for flight in flights for segment in flight.segments]
                self._keep(*self.passes.core(group, flights))

    def pick_up(self) -> list[Arrived]:
        """Those that are done with the core, in as few parts as can leave together."""
        parts, self.arrived = self.passes.together(self.arrived), []
        return parts

    def forget(self, owner: object) -> None:
        """Takes the segments of one owner off the way."""
        for key, flight in list(self.flights.items()):
            kept = _others(flight.segments, owner)
            if not kept:
                del self.flights[key]
            elif len(kept) < len(flight.segments):
                self.flights[key] = flight.select(kept)
        arrived, self.arrived = self.arrived, []
        for part in arrived:
            kept = _others(part.segments, owner)
            if kept:
                self.arrived.append(part if len(kept) == len(part.segments) else part.select(kept))

    def clear(self) -> None:
        """Takes everybody off the way."""
        self.flights.clear()
        self.arrived.clear()

    def _keep(self, going: list[Flight], arrived: list[Arrived]) -> None:
        for flight in going:
            there = self.flights.get(flight.key)
            self.flights[flight.key] = flight if there is None else join([there, flight])
        self.arrived += arrived


def _others(segments: Sequence[Segment], owner: object) -> list[int]:
    return [i for i, segment in enumerate(segments) if segment.owner is not owner]
