"""Sections of the config tree, by what they describe; `morex.config` puts them together. No torch import."""
