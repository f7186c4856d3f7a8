"""Tests of morex.eval."""
