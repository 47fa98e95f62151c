"""The closed-form start, solved from calibration tokens."""
