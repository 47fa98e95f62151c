"""Students with fewer layers, key/value heads, FFN neurons and experts than their teacher.

The projections of the paper shorten only the axis of the hidden size. Here the teacher itself is
pruned first (`prune`): layers (`layers`), then heads and neurons (`units`) and experts (`experts`),
chosen by what their loss costs in the teacher's predictions. The writers of kept heads and neurons
take over what the others wrote: their weights W_T become W_T C. The student's weights are then
W_S = W_T[kept] P and W_S = P^T W_T C. It is a clone of the pruned teacher (`pruned_teacher`), and
learns from the whole one.
"""
