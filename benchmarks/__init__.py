"""One file per claim of the performance table, each a ratio measured side by side: ``make bench``."""
