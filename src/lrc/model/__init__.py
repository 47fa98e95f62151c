"""A model's files: where they are, what they hold, and whether they fill the model they describe.

Everything here refuses rather than guesses: a teacher that is read wrongly gives a wrong student
without a word.
"""
