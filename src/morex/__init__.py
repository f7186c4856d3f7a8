"""morex: language models with adaptive depth, mixtures of recursions and mixtures of recursive experts."""

from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from typing import Any

try:
    __version__ = version("morex")
except PackageNotFoundError:
    __version__ = "0.0.0"

_PUBLIC = {
    "load_config": "morex.loading",
    "presets": "morex.loading",
    "ConfigError": "morex.loading",
    "Config": "morex.config",
    "build_model": "morex.model.lm",
    "count": "morex.model.count",
    "load": "morex.train.checkpoint",
}
__all__ = ["Config", "ConfigError", "__version__", "build_model", "count", "load", "load_config", "presets"]


def __getattr__(name: str) -> Any:
    # Public names load their module on first use, so that a command that needs no torch starts at once.
    if name in _PUBLIC:
        return getattr(import_module(_PUBLIC[name]), name)
    raise AttributeError(f"module 'morex' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
