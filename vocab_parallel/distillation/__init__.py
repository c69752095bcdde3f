"""The loss of a student that learns from a teacher's distribution, both over sharded rows.

loss -> arguments -> hidden_teacher, top_k_teacher -> comparison -> labels, divergences
"""
