from pathlib import Path

from morex.analysis.records import Analysis


def write_pictures(analysis: Analysis, folder: Path) -> list[Path]:
    return []
