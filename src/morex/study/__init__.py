"""Studies: models trained side by side under one budget, compared with their dense twins, and speed benchmarks."""
