"""Tensor maths of the axis: persona vectors, axis, persona space, held-out figures. No model, no run folder."""
