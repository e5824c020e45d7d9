"""Scores: `features` on the mesh, `result` in NumPy f64 on the host, with an interval."""
