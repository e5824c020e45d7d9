"""The README's example, run as it stands there, where nothing of the trainer is installed."""

import re
import subprocess
import sys

from test_import import ENGINES, HIDE, ROOT


def test_the_readme_trains_and_samples_somebody_elses_network():
    example = re.search(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.S)[1]
    check = """
error = jnp.abs(images - latents).max()
print(float(error))
"""
    environment = {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"}
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", HIDE.format(engines=ENGINES) + example + check],
        capture_output=True,
        text=True,
        env=environment,
    )
    assert done.returncode == 0, done.stderr
    assert float(done.stdout) < 0.1
