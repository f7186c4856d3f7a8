"""The invariants that every member of the family keeps, each as one test over all presets."""
