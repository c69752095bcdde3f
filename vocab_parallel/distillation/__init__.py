"""The loss of a student that learns from a teacher's distribution, both over sharded rows.

loss -> call -> autograd -> passes -> teacher, labels -> divergences, columns
"""
