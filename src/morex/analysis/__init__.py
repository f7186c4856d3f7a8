"""Analysis of what the routers of a trained model do: `analyze` a run, `analyze_trace` a file, `write` the result."""

from morex.analysis.analyze import analyze, analyze_trace, to_dict, write
from morex.analysis.records import Analysis, Missing, Spread
from morex.analysis.trace import Decisions, load_trace, save_trace

__all__ = [
    "Analysis",
    "Decisions",
    "Missing",
    "Spread",
    "analyze",
    "analyze_trace",
    "load_trace",
    "save_trace",
    "to_dict",
    "write",
]
