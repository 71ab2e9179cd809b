"""Give figures of notebooks the alternative text that is stored with them.

A stored picture carries its text as metadata ("alt"), which myst-nb passes over: pages would read
out file names instead.
"""

import base64
import hashlib
import json
from pathlib import Path

from docutils import nodes


def texts_of(notebook: Path) -> dict[str, str]:
    """The alternative text of each stored PNG that has one, by the SHA-256 of its bytes."""
    cells = json.loads(notebook.read_text(encoding="utf-8"))["cells"]
    found = {}
    for output in (output for cell in cells for output in cell.get("outputs", [])):
        picture = output.get("data", {}).get("image/png")
        text = output.get("metadata", {}).get("image/png", {}).get("alt")
        if picture and text:
            data = base64.b64decode("".join(picture))
            found[hashlib.sha256(data).hexdigest()] = text
    return found


def describe(app, doctree) -> None:
    """Set `alt` on the pictures of a page that was a notebook."""
    source = Path(app.env.doc2path(app.env.docname))
    if source.suffix != ".ipynb":
        return
    texts = texts_of(source)
    for picture in doctree.findall(nodes.image):
        file = Path(app.srcdir, picture["uri"])
        if file.is_file():
            text = texts.get(hashlib.sha256(file.read_bytes()).hexdigest())
            if text is not None:
                picture["alt"] = text


def setup(app) -> dict:
    """Wait until pictures have been found on disk."""
    app.connect("doctree-read", describe, priority=900)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
