"""Serving engines that hold, watch and read a persona while they generate."""
