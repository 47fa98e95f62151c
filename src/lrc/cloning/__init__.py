"""The paper: projection, activation clone, objective and method, and how projections start."""
