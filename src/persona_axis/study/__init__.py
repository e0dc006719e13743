"""What runs models to measure them: calibration sweeps, drift, evaluations."""
