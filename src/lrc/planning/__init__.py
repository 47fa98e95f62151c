"""Which shape to choose: candidates of one size, what each costs, and which is probably best.

`shapes` finds the candidates, `figures` computes what they cost, `expected` says what is known of
their losses, `probe` measures them, and `plan` puts these together. Only the teacher's
configuration is needed, except by `probe`.
"""
