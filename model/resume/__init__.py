"""Runs that go on from any end.

state         the folder of a run; ``files`` its tensors, ``fingerprint`` what tells inputs apart
changes       whether a run may go on with what it is given
clip          a clip, kept as it is made
"""
