"""``python -m fwdlib bench``: what a training step costs, in time, in memory and over a network.

For users who want to know whether a forward gradient is cheaper on their machine.
"""
