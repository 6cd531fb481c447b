"""The benchmark of the cost model, which compares ``model.memory.cost`` with what is known.

``calibration`` has the times that its rates were checked against, ``paper`` the figures that the paper reports, and
``tables`` the rows to print. All seconds are predicted unless they are named measured or published.
"""
