"""The engine: many requests decoded side by side, each token as deep as its router sends it."""

from morex.infer.engine import Engine
from morex.infer.request import Completion, Event, LogProbs, Params

__all__ = ["Completion", "Engine", "Event", "LogProbs", "Params"]
