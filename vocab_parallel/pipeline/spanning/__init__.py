"""The vocabulary on all stages of a pipeline: its passes, their order, and the schedule.

order (pure Python), owners -> passes, embedding -> schedule, validation
"""
