"""From a plan to rollouts, verdicts and a fit, on a run folder that survives kill -9."""
