"""The one model: assembled in `lm`, looped in `stack`."""
