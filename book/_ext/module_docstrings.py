"""Show a module's opening docstring as it stands in the file.

Modules open with a paper, a table from symbol to name, and what differs from the paper, laid out
for someone who reads the file. Set as a literal block, the API page shows the same layout.
"""


def keep_layout(app, what, name, obj, options, lines) -> None:
    """Turn a module's docstring (lines, changed in place as Sphinx asks) into a literal block.

    Fields of NamedTuples lose Python's own "Alias for field number 0", which says nothing.
    """
    if what == "module" and any(lines):
        title, *rest = lines
        lines[:] = [title, ""]
        if any(rest):
            lines += [".. code-block:: none", "   :class: module-docstring", ""]
            lines += [f"   {line}" for line in rest] + [""]
    elif lines and lines[0].startswith("Alias for field number"):
        lines.clear()


def setup(app) -> dict:
    """Connect to autodoc before napoleon rewrites docstrings."""
    app.setup_extension("sphinx.ext.autodoc")
    app.connect("autodoc-process-docstring", keep_layout, priority=100)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
