"""Shared foundations: errors, files, the console, the environment."""
