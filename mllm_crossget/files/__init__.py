"""Files: written whole or not at all, found on the hub, named by a user, and the records of a data file.

In: a path or a text. Out: checked values, or one error that names the path. No model is involved. To be read in this
order: ``atomic_files`` (what this library writes), ``hub_files`` (local folder or hub), ``user_files`` (pictures, YAML,
outputs), ``records`` and ``record_columns`` (data files for training and comparisons), ``quiet`` (what other packages
print).
"""
