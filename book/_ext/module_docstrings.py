"""Show a module's opening docstring as it stands in the file.

Modules open with a paper, a table from symbol to name, and what differs from the paper, laid out
for someone who reads the file. Set as a literal block, the API page shows the same layout.
"""


def keep_layout(app, what, name, obj, options, lines) -> None:
    """Turn a module's docstring (lines, changed in place as Sphinx asks) into a literal block."""
    if what == "module" and any(lines):
        title, *rest = lines
        lines[:] = [title, ""]
        if any(rest):
            lines += ["::", "", *(f"    {line}" for line in rest), ""]


def setup(app) -> dict:
    """Connect to autodoc before napoleon rewrites docstrings."""
    app.setup_extension("sphinx.ext.autodoc")
    app.connect("autodoc-process-docstring", keep_layout, priority=100)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
