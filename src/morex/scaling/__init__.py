"""How a training scales: its memory and time on so many devices, from a config alone."""
