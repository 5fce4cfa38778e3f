"""The paper's figures and tables, drawn from recorded runs alone.

Every ``*_figure`` function takes data and returns a ``matplotlib.figure.Figure``; none of them
touches pyplot's state, so scripts, notebooks and tests can call them alike. ``style.save`` writes
one to disk, the same bytes each time.
"""
