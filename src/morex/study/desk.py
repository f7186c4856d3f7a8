"""Where the cells of a study that run elsewhere say how far they are. It imports nothing that takes time."""

from dataclasses import dataclass, field


@dataclass
class Desk:
    """Where errands say how far they are, and hear whether to stop. An actor, beside whoever asked for the cells."""

    stopping: bool = False
    machines: dict[str, str] = field(default_factory=dict)
    archives: list[tuple[str, bytes]] = field(default_factory=list)

    def report(self, cell: str, machine: str, archive: bytes | None) -> bool:
        """Takes word of a cell, and what has changed in its files; returns whether it shall save and stop."""
        self.machines[cell] = machine
        if archive is not None:
            self.archives.append((cell, archive))
        return self.stopping

    def news(self) -> tuple[dict[str, str], list[tuple[str, bytes]]]:
        """The machine of each cell that has begun, and (cell, archive) of what has come since the last call."""
        archives, self.archives = self.archives, []
        return dict(self.machines), archives

    def forget(self, cell: str) -> None:
        """A cell is over, or starts again elsewhere."""
        self.machines.pop(cell, None)

    def stop(self) -> None:
        """Every errand saves and stops."""
        self.stopping = True
