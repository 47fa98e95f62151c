"""Cutting a smaller model of the same class out of a model.

`shape` says how large the student is to be, `cut` takes the parts of the teacher that are kept.
What is kept is for the methods to choose, by `importance` or otherwise. `rotate` turns the residual
stream before it is cut. `size` compares the student with LRC's.
"""
