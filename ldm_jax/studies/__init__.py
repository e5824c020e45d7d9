"""Studies: grids of runs, their records, and what records say of a finding."""
