"""How much a data x pipeline x vocab mesh holds and how long its step takes, before it is rented.

published, balance -> shape; orders -> timeline; shape, timeline, hardware -> estimate -> meshes;
meshes -> table, picture -> command; layers, estimate -> calibrate -> hardware
"""
