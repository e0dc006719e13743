"""Roles, questions and default prompts: data files, validation, selection.

Everything a caller needs is in ``persona_axis.catalog.catalog``; the texts are under ``data``.
"""
