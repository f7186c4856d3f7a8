"""What the run folders below a folder are about, and how their trainings are."""

from dataclasses import dataclass
from pathlib import Path

from morex.loading import ConfigError
from morex.train.runs import RunFolder
from morex.train.watchdog import read_heartbeat

SILENT_AFTER = 60.0
"""Seconds without a heartbeat after which a training is taken for dead or hanging."""


@dataclass(frozen=True)
class RunStatus:
    """How a run is."""

    path: str
    status: str
    """`finished`, `training`, `silent` (no sign of life: killed, or it hangs), `stopped` or `damaged`."""
    step: int | None = None
    """Of the last line of its metrics."""
    steps: int | None = None
    """Planned."""
    loss: float | None = None
    val_loss: float | None = None
    tokens_per_s: float | None = None
    anomalies: int = 0
    """Steps whose loss or gradient was not finite, or a spike."""
    heartbeat_age: float | None = None
    """Seconds since the last sign of life of a training that has not ended by itself."""
    host: str | None = None
    ranks: int | None = None


def list_runs(folder: Path) -> list[RunStatus]:
    """The runs in and below a folder, by path.

    Raises:
        ConfigError: there is no such folder.
    """
    if not folder.is_dir():
        raise ConfigError(f"'{folder}' is not a folder; name one that holds runs")
    return [status_of(RunFolder(path.parent)) for path in sorted(folder.rglob("config.yaml"))]


def status_of(run: RunFolder) -> RunStatus:
    """How a run is."""
    try:
        config, summary, heartbeat = run.config(), run.summary(), read_heartbeat(run)
        lines = run.metrics()
    except ConfigError:
        return RunStatus(str(run.path), "damaged")
    last = {kind: line for line in lines for kind in [line["kind"]]}
    train, evaluation = last.get("train", {}), last.get("eval", {})
    age = None if heartbeat is None else heartbeat["age"]
    if age is not None:
        status = "training" if age < SILENT_AFTER else "silent"
    else:
        status = "stopped" if summary is None else "finished"
    return RunStatus(
        str(run.path),
        status,
        step=max((line["step"] for line in lines), default=0),
        steps=config.train.steps,
        loss=train.get("loss"),
        val_loss=evaluation.get("val_loss"),
        tokens_per_s=train.get("tokens_per_s"),
        anomalies=sum(line["kind"] == "anomaly" for line in lines),
        heartbeat_age=age,
        host=None if heartbeat is None else heartbeat["host"],
        ranks=None if heartbeat is None else heartbeat["ranks"],
    )
