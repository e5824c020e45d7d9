"""HTML pages and figures of runs, evaluations and studies."""
