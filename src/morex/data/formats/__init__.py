"""File formats: one short file for each family, and one dict of what reads which suffix."""
