"""A model's files: where they are, what they hold, and whether they fill the model they describe.

This package raises errors instead of guessing. A teacher that is read wrongly silently produces a
wrong student.
"""
