"""Figures, the one-file HTML report and the terminal summary of a run; reads a ``Fit``, computes nothing."""
