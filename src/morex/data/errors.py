"""The one fault of this package."""

from morex.loading import ConfigError


class DataError(ConfigError):
    """A corpus, file, tokenizer or cache that cannot be used; the message is one sentence that says what would work."""
