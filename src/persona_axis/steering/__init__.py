"""Changing the persona: interventions, policies, and hooks that apply them to Hugging Face models."""
