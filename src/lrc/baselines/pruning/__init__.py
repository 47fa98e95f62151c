"""Cutting a smaller model of the same class out of a model.

`shape` defines the size of the student, and `cut` copies the parts of the teacher that are kept.
The methods choose which parts to keep, by `importance` or otherwise. `rotate` rotates the residual
stream before it is cut. `size` compares the student with LRC's.
"""
