"""The engine: many requests decoded side by side, each token as deep as its router sends it."""
