"""The cost model of ``model.memory.cost`` against what is known.

``calibration`` (against which times its rates were checked), ``paper`` (what the paper reports), ``tables`` (rows to
print). Everything in seconds is predicted unless it is named measured or published.
"""
