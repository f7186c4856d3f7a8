"""Key/value caches, addressed by the schedule's slots."""
