"""Measuring models: held-out loss and agreement with the teacher."""
