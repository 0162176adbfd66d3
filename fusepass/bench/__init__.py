"""Measure whole models under each compiler and mode: what `python -m fusepass bench` runs.

rows.py says what there is to measure, measure.py measures one row in a process of its own, run.py goes through the
rows, results.py keeps them as JSON; table.py and picture.py show them.
"""
