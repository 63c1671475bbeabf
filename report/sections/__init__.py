"""What the report says: each section reads JSON files, draws, and fills the template beside it. Imports no study.

A section has ``load``, from the folder of the results to what was measured; ``context``, from that to what the template
prints; and ``figures``, from that to the figures by the names of their files.
"""
