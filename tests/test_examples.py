"""Every example in a docstring and in docs runs; the README's has a test of its own, without the trainer."""

import ast
import doctest
import importlib
import re
import textwrap

from test_import import ROOT
from test_layers import modules

BLOCK = re.compile(r"(?<=\n\n)(?: {4}.*\n?|\n)+")


def source_of(module):
    path = ROOT.joinpath(*module.split("."))
    return (path / "__init__.py" if path.is_dir() else path.with_suffix(".py")).read_text()


def blocks(module):
    """The indented blocks of a module's docstring that are Python."""
    for block in BLOCK.findall(ast.get_docstring(ast.parse(source_of(module))) or ""):
        try:
            yield ast.unparse(ast.parse(textwrap.dedent(block)))
        except SyntaxError:
            continue


def test_examples_of_docstrings_give_what_they_show():
    names = [module for module in modules() if ">>>" in source_of(module)]
    results = [doctest.testmod(importlib.import_module(name)) for name in names]
    assert sum(result.attempted for result in results) > 5
    assert [name for name, result in zip(names, results, strict=True) if result.failed] == []


def test_code_in_docstrings_of_modules_runs_where_it_stands():
    found = {module: list(blocks(module)) for module in modules()}
    assert found["ldm_jax.parallel.rules"]
    for module, codes in found.items():
        for code in codes:
            exec(code, dict(vars(importlib.import_module(module))))


def test_python_of_the_docs_runs():
    for path in sorted((ROOT / "docs").rglob("*.md")):
        for code in re.findall(r"```python\n(.*?)```", path.read_text(), re.DOTALL):
            exec(compile(code, str(path), "exec"), {})
