"""How much a data x pipeline x vocab mesh holds and how long its step takes, before it is rented.

published, balance -> shape; schedules -> orders; shape, orders, hardware -> loss_time, estimate;
estimate -> step, rank_work -> spanning -> meshes, unpiped -> table, picture -> command;
layers, loss_time -> calibrate -> hardware
"""
