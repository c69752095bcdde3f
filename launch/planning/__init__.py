"""How much a data x pipeline x vocab mesh holds and how long its step takes, before it is rented.

balance -> shape, orders -> timeline -> estimate -> meshes; timing, estimate -> calibrate
"""
