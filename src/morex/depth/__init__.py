"""Depth: the schedule, and the routers that decide which tokens take recursion r.

A router is one file with its module and closed-form costs, one config class, and one entry in `routers.ROUTERS`.
"""
