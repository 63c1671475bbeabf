"""``python -m fwdlib run``: notebooks x parameters through papermill, on this machine or on a Dask cluster.

For users who repeat a notebook with many values or seeds, and for the report, which is made from such runs.
"""
