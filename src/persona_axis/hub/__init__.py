"""Sharing an axis and its policy on the Hugging Face Hub."""
