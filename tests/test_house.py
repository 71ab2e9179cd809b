"""The house keeps its own promises: one address, honest sizes, tidy imports, true tables."""

import ast
import base64
import importlib.metadata
import io
import json
import os
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import nbformat
import pytest
import yaml
from nbformat.v4 import new_code_cell, new_notebook
from PIL import Image

import results_tables
import run_notebooks
import sync_address
from t2ilearn import systems

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "t2ilearn"
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
MIB = 2**20
# A module imports from its own layer and from those before it.
LAYERS = (
    {"models"},
    {"weights"},
    {"data"},
    {"judging"},
    {"training"},
    {"pretrained", "systems"},
    {"drawing"},
    {"figures", "diagrams", "studio", "widgets", "lessons", "cli"},
)
# A package's own __init__ re-exports from within.
PACKAGES_THEMSELVES = {f"t2ilearn.{room}" for layer in LAYERS for room in layer} - {
    "t2ilearn.drawing",
    "t2ilearn.figures",
    "t2ilearn.diagrams",
    "t2ilearn.studio",
    "t2ilearn.cli",
}
# Colab's own versions in August 2026 (Python 3.12): installing must not replace any of them.
COLAB = {
    "torch": "2.11",
    "torchvision": "0.26",
    "numpy": "2.1",
    "ipywidgets": "7.7.1",
    "anywidget": "0.9.21",
}


def own_files() -> list[Path]:
    """What a clone would hold: tracked files, and new ones that git does not ignore."""
    if not (ROOT / ".git").exists() or shutil.which("git") is None:
        pytest.skip("not a git checkout")
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    listed = subprocess.run(command, cwd=ROOT, capture_output=True, check=True).stdout
    paths = [ROOT / name for name in listed.decode().split("\0") if name]
    return [path for path in paths if path.is_file()]


def mebibytes(paths) -> float:
    """Their size together, in MiB."""
    return sum(path.stat().st_size for path in paths) / MIB


def requirement(text: str) -> tuple[str, str]:
    """'numpy>=1.26' → ('numpy', '>=1.26')."""
    name, bounds = re.fullmatch(r"([A-Za-z0-9_.-]+)(?:\[[^\]]*\])?(.*)", text).groups()
    return name, bounds.strip()


def imports_of(path: Path) -> set[str]:
    """Dotted names that a file imports; a relative import is spelt out."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            parents = path.relative_to(ROOT).parent.parts
            base = ".".join(parents[: len(parents) - node.level + 1]) if node.level else ""
            module = ".".join(part for part in (base, node.module) if part)
            names |= {module} | {f"{module}.{alias.name}" for alias in node.names}
    return names


# ---------------------------------------------------------------- installing


def test_core_only_sets_lower_bounds_that_colab_meets():
    for text in PROJECT["dependencies"]:
        name, bounds = requirement(text)
        assert re.fullmatch(r">=[\d.]+", bounds), f"{text}: the core sets lower bounds only"
        if name in COLAB:
            wanted, there = (tuple(map(int, v.split("."))) for v in (bounds[2:], COLAB[name]))
            assert wanted <= there, f"{text} would replace Colab's {COLAB[name]}"


def test_extras_are_the_promised_ones():
    assert set(PROJECT["optional-dependencies"]) == {
        *("lab", "book", "train", "test", "peers", "dev"),
    }
    assert "sphinx-book-theme<1.3" in PROJECT["optional-dependencies"]["book"]


FILES_WITH_COMMANDS = ("README.md", "Makefile", "environment.yml")


def test_environment_yml_installs_what_the_readme_promises():
    environment = yaml.safe_load((ROOT / "environment.yml").read_text(encoding="utf-8"))
    assert environment["name"] == PROJECT["name"]
    assert environment["channels"][0] == "conda-forge"
    conda = [entry for entry in environment["dependencies"] if isinstance(entry, str)]
    (pip,) = (entry["pip"] for entry in environment["dependencies"] if isinstance(entry, dict))
    assert {re.split("[=<>]", entry)[0] for entry in conda} == {"python", "pip"}
    (python,) = (entry for entry in conda if entry.startswith("python"))
    least = re.fullmatch(r">=(\d+)\.(\d+)", PROJECT["requires-python"]).groups()
    assert tuple(map(int, python.split("=")[1].split("."))) >= tuple(map(int, least))
    assert f"Programming Language :: Python :: {python.split('=')[1]}" in PROJECT["classifiers"]
    # Everything else comes from pyproject.toml, so that nothing is listed twice.
    assert len(pip) == 1
    extras = re.fullmatch(r"-e \.\[([\w,]+)\]", pip[0]).group(1).split(",")
    assert set(extras) <= set(PROJECT["optional-dependencies"])
    installed = {
        requirement(line)[0]
        for lines in (PROJECT["dependencies"], *map(PROJECT["optional-dependencies"].get, extras))
        for line in lines
    }
    # What README, its make targets and the file's own comments tell a reader to run: command,
    # the distribution that provides it, and the entry point by which it does.
    promises = (
        ("jupyter lab", "jupyterlab", "jupyter-lab"),
        ("jupyter-book build", "jupyter-book", "jupyter-book"),
        ("pytest", "pytest", "pytest"),
        ("--nbval", "nbval", "nbval"),
    )
    told = {name: (ROOT / name).read_text(encoding="utf-8") for name in FILES_WITH_COMMANDS}
    for command, distribution, entry_point in promises:
        assert command in told["environment.yml"]
        assert command in told["README.md"] + told["Makefile"]
        assert distribution in installed, f"{command} needs {distribution}: add its extra"
        try:
            provided = importlib.metadata.distribution(distribution).entry_points
        except importlib.metadata.PackageNotFoundError:
            continue  # a test environment without this extra
        assert entry_point in provided.names


def test_version_is_the_same_everywhere():
    version = re.search(
        r'__version__ = "([^"]+)"', (PACKAGE / "__init__.py").read_text(encoding="utf-8")
    ).group(1)
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert citation["version"] == version
    assert f"## {version}" in (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")


@pytest.mark.skipif(shutil.which("make") is None, reason="no make here")
@pytest.mark.parametrize(
    ("fails_on", "said"),
    [("ensurepip", "sudo apt install python3-venv"), ("version_info", "Python 3.11 or newer")],
)
def test_make_says_what_python_lacks(tmp_path, fails_on, said):
    fake = tmp_path / "python"
    fake.write_text(f'#!/bin/sh\ncase "$2" in *{fails_on}*) exit 1;; esac\n', encoding="utf-8")
    fake.chmod(0o755)
    command = ["make", "lab", f"PYTHON={fake}", f"VENV={tmp_path / 'venv'}"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode != 0 and said in done.stderr


@pytest.mark.skipif(shutil.which("make") is None, reason="no make here")
def test_make_draw_without_a_caption_says_how(tmp_path):
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "python").touch()
    (tmp_path / ".has-core").touch()
    environment = {k: v for k, v in os.environ.items() if k != "CAPTION"}
    done = subprocess.run(
        ["make", "draw", f"VENV={tmp_path}"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        env=environment,
    )
    assert done.returncode != 0 and 'make draw CAPTION="' in done.stderr


# ---------------------------------------------------------------- one address


def test_the_address_agrees_everywhere():
    url = sync_address.address()
    assert PROJECT["urls"]["Repository"] == url
    for path in sync_address.derived_files():
        text = path.read_text(encoding="utf-8")
        assert sync_address.derive(text, url) == text, (
            f"{path.relative_to(ROOT)} has another address: run python tools/sync_address.py"
        )


def test_a_new_address_reaches_every_derived_place():
    new = "https://github.com/someone/pictures-from-words"
    old = sync_address.address().removeprefix("https://github.com/")
    for path in sync_address.derived_files():
        moved = sync_address.derive(path.read_text(encoding="utf-8"), new)
        assert old not in moved, f"{path.relative_to(ROOT)} keeps the old address somewhere"
    for name in ("README.md", "_config.yml", "CITATION.cff"):
        moved = sync_address.derive((ROOT / name).read_text(encoding="utf-8"), new)
        assert "someone/pictures-from-words" in moved


# ---------------------------------------------------------------- sizes


def test_a_clone_is_small():
    files = own_files()
    assert mebibytes(files) < 80
    assert mebibytes(PACKAGE.glob("assets/**/*")) < 48
    assert mebibytes(path for path in files if "tiny" in path.stem and ".safe" in path.name) <= 2
    assert mebibytes(path for path in files if path.suffix == ".ipynb") < 8
    assert mebibytes(path for path in files if "vendor" in path.parts) < 6


# ---------------------------------------------------------------- imports and files


def test_the_package_imports_only_what_the_core_declares():
    declared = {requirement(text)[0] for text in PROJECT["dependencies"]}
    names = {"pillow": "PIL"}
    allowed = {names.get(name, name) for name in declared} | set(sys.stdlib_module_names)
    for path in PACKAGE.rglob("*.py"):
        foreign = {name.split(".")[0] for name in imports_of(path)} - allowed - {"t2ilearn"}
        # click is typer's own parser; IPython and traitlets come with ipywidgets.
        assert foreign <= {"click", "IPython", "traitlets"}, f"{path.name} imports {foreign}"


def layer_of(module: str) -> int:
    """The layer that a module of the package belongs to, from the lowest up."""
    room = module.split(".")[1] if "." in module else ""
    return next(i for i, rooms in enumerate(LAYERS) if room in rooms)


def own_imports() -> dict[str, set[str]]:
    """What each module of the package imports of the package, by dotted names."""
    modules = {
        ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path
        for path in PACKAGE.rglob("*.py")
    }
    return {
        name: {target for target in imports_of(path) if target in modules} - {name, "t2ilearn"}
        for name, path in modules.items()
        if name not in ("t2ilearn", "t2ilearn.__main__")  # the front door opens on every room
    }


def test_every_module_belongs_to_a_layer_and_imports_downwards_only():
    for name, targets in own_imports().items():
        upwards = {target for target in targets if layer_of(target) > layer_of(name)}
        assert not upwards, f"{name} imports {', '.join(sorted(upwards))} from a layer above it"


def test_readers_of_released_models_and_systems_do_not_import_each_other():
    for name, targets in own_imports().items():
        room = name.split(".")[1]
        other = {"pretrained": "systems", "systems": "pretrained"}.get(room)
        assert not any(target.split(".")[1] == other for target in targets), name


def test_models_import_torch_and_each_other_only():
    for path in (PACKAGE / "models").glob("*.py"):
        for name in imports_of(path):
            top = name.split(".")[0]
            inside = name.startswith("t2ilearn.models")
            allowed = {"torch", "torchvision", "jaxtyping", *sys.stdlib_module_names}
            assert inside or top in allowed, f"models/{path.name} imports {name}"


def test_no_two_modules_import_each_other_in_a_circle():
    arrows, done = own_imports(), set()

    def walk(name: str, trail: tuple[str, ...]) -> None:
        assert name not in trail, f"imports in a circle: {' → '.join((*trail, name))}"
        if name not in done:
            for target in sorted(arrows.get(name, set()) - PACKAGES_THEMSELVES):
                walk(target, (*trail, name))
            done.add(name)

    for name in arrows:
        walk(name, ())


def test_systems_are_listed_in_the_registry_alone():
    """No other file of package and tools names a system, but for those that define one."""
    names = set(systems.SYSTEMS)
    for path in [*PACKAGE.rglob("*.py"), *(ROOT / "tools").glob("*.py")]:
        if {"systems", "lessons", "models", "widgets"} & set(path.parts):
            continue
        tree = ast.parse(path.read_text(encoding="utf-8"))
        found = {n.value for n in ast.walk(tree) if isinstance(n, ast.Constant)} & names
        assert not found, f"{path.relative_to(ROOT)} names {found}: ask systems.registry"


def test_no_pickle_and_every_open_names_its_encoding():
    for path in [*PACKAGE.rglob("*.py"), *(ROOT / "tools").glob("*.py")]:
        assert not imports_of(path) & {"pickle", "dill", "cloudpickle"}
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if not isinstance(node, ast.Call):
                continue
            name = getattr(node.func, "attr", getattr(node.func, "id", ""))
            binary = any(
                isinstance(arg, ast.Constant) and isinstance(arg.value, str) and "b" in arg.value
                for arg in [*node.args[:2], *(k.value for k in node.keywords if k.arg == "mode")]
            )
            is_open = isinstance(node.func, ast.Name) and name == "open" and not binary
            if is_open or name in ("read_text", "write_text"):
                assert any(k.arg == "encoding" for k in node.keywords), f"{path}:{node.lineno}"


def test_no_paths_of_one_machine():
    home = re.compile(r"(?<![\w.])/(?:work|root|home/\w+|Users/\w+|opt/\w+|tmp/\w+)/")
    for path in own_files():
        if path.suffix in {".py", ".md", ".yml", ".toml", ".cff", ".ipynb", ".json", ".cfg", ""}:
            if "vendor" in path.parts or path == Path(__file__).resolve():
                continue
            found = home.search(path.read_text(encoding="utf-8"))
            assert not found, f"{path.relative_to(ROOT)} holds {found[0]}"


# ---------------------------------------------------------------- what the README says


def test_readme_shows_the_two_commands_and_links_to_what_exists():
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert "git clone --depth 1 " in readme and "make lab" in readme and "make test" in readme
    for target in re.findall(r"\]\(((?!https?:|#)[^)\s]+)\)", readme):
        assert (ROOT / target.split("#")[0]).exists(), f"README links to a missing {target}"


def test_tables_of_results_are_what_the_cards_say():
    for path, text in results_tables.written().items():
        assert path.read_text(encoding="utf-8") == text, "run python tools/results_tables.py"


def test_chapters_carry_outputs_and_no_errors():
    toc = yaml.safe_load((ROOT / "_toc.yml").read_text(encoding="utf-8"))
    entries = [entry for part in toc["parts"] for entry in part["chapters"]]
    entries += [section for entry in entries for section in entry.get("sections", [])]
    for name in (entry["file"] for entry in entries):
        if (ROOT / f"{name}.md").exists():
            continue
        path = ROOT / f"{name}.ipynb"
        assert path.exists(), f"_toc.yml names {name}, which does not exist"
        cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
        code = [c for c in cells if c["cell_type"] == "code" and "".join(c["source"]).strip()]
        outputs = [output for cell in code for output in cell["outputs"]]
        assert outputs, f"{path.name} has no stored outputs: run make notebooks"
        assert not any(output["output_type"] == "error" for output in outputs), path.name


def test_notebooks_are_stored_with_the_same_bytes_twice(tmp_path, monkeypatch):
    cells = [
        "import ipywidgets\nipywidgets.IntSlider()",
        "import matplotlib.pyplot as plt\nplt.plot([1, 2]);",
        "import tqdm\nprint(sum(tqdm.tqdm(range(9))), hash('words'), object())",
    ]
    for name, value in run_notebooks.PINNED.items():
        monkeypatch.setenv(name, value)
    path, seen = tmp_path / "toy.ipynb", []
    notebook = new_notebook(cells=[new_code_cell(cell) for cell in cells])
    for number, cell in enumerate(notebook.cells):
        cell.id = f"toy-{number}"
    for _ in range(2):
        path.write_text(nbformat.writes(notebook), encoding="utf-8")
        run_notebooks.execute(path)
        seen.append(path.read_bytes())
    assert seen[0] == seen[1]
    stored = nbformat.reads(seen[0].decode(), as_version=4)
    assert stored.metadata.widgets and not any(
        "stderr" == o.get("name") for c in stored.cells for o in c.outputs
    )


def test_heavy_figures_are_stored_lighter_and_light_ones_as_they_are():
    noise = Image.effect_noise((400, 400), 80).convert("RGB")
    output = {"data": {"image/png": png(noise)}}
    heavy = len(output["data"]["image/png"])
    run_notebooks.lighten(output)
    lighter = output["data"]["image/png"]
    assert len(lighter) < 0.8 * heavy
    assert Image.open(io.BytesIO(base64.b64decode(lighter))).size == (400, 400)
    small = {"data": {"image/png": png(Image.new("RGB", (40, 40), "red"))}}
    before = small["data"]["image/png"]
    run_notebooks.lighten(small)
    assert small["data"]["image/png"] == before


def png(image):
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return base64.b64encode(buffer.getvalue()).decode("ascii")
