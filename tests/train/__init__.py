"""Tests of morex.train."""
