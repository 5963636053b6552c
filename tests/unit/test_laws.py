"""Rules of the whole code base, read off its syntax trees, so that no file can break them unnoticed."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[2] / "src" / "mm_interleaved"
FILES = {path.relative_to(PACKAGE).as_posix(): path for path in sorted(PACKAGE.rglob("*.py"))}
TREES = {name: ast.parse(path.read_text(encoding="utf-8")) for name, path in FILES.items()}

ROOMS = (
    "documents",
    "ops",
    "model_files",
    "tokens",
    "storyworld",
    "models",
    "checkpoint",
    "data",
    "generation",
    "runs",
    "training",
    "recipes",
    "evaluation",
    "serving",
    "studio",
    "cli",
)
"""The folders from the ground up, a storey each: a file imports from its own and from those below."""
GROUND = {"errors", "spelling", "versions", "devices", "files", "seeded_random", "typed_settings"}
"""Files below all folders: what everything uses. Nothing else is loose."""
DOORS = {"__init__", "__main__", "former_names"}
"""Files that lead into the house: the lazy public names, `python -m`, and the names of earlier releases."""
UNWANTED = (
    "torchvision",
    "timm",
    "open_clip",
    "xformers",
    "flash_attn",
    "mmcv",
    "pickle",
    "dill",
    "joblib",
    "shelve",
)


# Published annotations that are pickles are read by this one file, once, through an allow-list; and only the
# command that writes them as JSON may ask it to.
UNPICKLER = "data/pickled_annotations.py"
UNPICKLER_USERS = {"cli/data.py"}


def module_of(name):
    """Dotted name of a file, without the package's."""
    dotted = name.removesuffix(".py").replace("/", ".")
    return dotted.removesuffix(".__init__") if dotted != "__init__" else dotted


def nodes(kind):
    """(file, node) of every node of a kind."""
    return [(name, node) for name, tree in TREES.items() for node in ast.walk(tree) if isinstance(node, kind)]


def imports():
    """(file, line, imported module) of all imports, also those inside functions and those for types alone."""
    found = []
    for name, tree in TREES.items():
        for node in ast.walk(tree):
            if isinstance(node, ast.Import):
                found += [(name, node.lineno, alias.name) for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                assert node.level == 0, f"{name}:{node.lineno} imports relatively"
                found += [(name, node.lineno, f"{node.module}.{alias.name}") for alias in node.names]
    return found


def storey(module):
    """How high a module stands: 0 is the ground, then the folders."""
    room = module.split(".")[0]
    if room in DOORS:
        return len(ROOMS) + 1
    return 0 if room in GROUND else ROOMS.index(room) + 1


def called(node):
    """The dotted name of what a call calls, as far as it is one."""
    parts, target = [], node.func
    while isinstance(target, ast.Attribute):
        parts.append(target.attr)
        target = target.value
    # Of what another call returned (`f().eval()`), the root has no name.
    return ".".join([target.id if isinstance(target, ast.Name) else "?", *reversed(parts)])


def test_nothing_is_loose_but_what_everything_uses():
    assert {name.removesuffix(".py") for name in FILES if "/" not in name} == GROUND | DOORS
    assert {name.split("/")[0] for name in FILES if "/" in name} <= set(ROOMS)


def own_imports():
    """(file, line, importing module, imported module) within the package; its lazy top is looked through."""
    import mm_interleaved

    for name, line, imported in imports():
        if imported.startswith("mm_interleaved."):
            target = imported.removeprefix("mm_interleaved.")
            public = mm_interleaved._PUBLIC.get(target)
            yield name, line, module_of(name), public.removeprefix("mm_interleaved.") if public else target


def test_imports_point_down():
    """All of them: also those inside functions, and those for types alone."""
    wrong = [
        f"{name}:{line} imports {target}"
        for name, line, module, target in own_imports()
        if storey(target) > storey(module)
    ]
    assert wrong == []


def itself(module):
    return module


def folder_in_a_room(module):
    """The folder within a room that a module lies in, taken as one; of other modules itself."""
    return ".".join(module.split(".")[:2])


@pytest.mark.parametrize("node", [itself, folder_in_a_room])
def test_files_and_folders_import_each_other_in_no_circle(node):
    """Rooms have storeys; within them, neither files nor folders go round."""
    modules = {module_of(name) for name in FILES}
    below = {node(module): set() for module in modules}
    for _, _, module, target in own_imports():
        parts = target.split(".")
        found = [".".join(parts[:n]) for n in range(len(parts), 0, -1) if ".".join(parts[:n]) in modules]
        below[node(module)] |= {*map(node, found[:1])} - {node(module)}
    while ground := {module for module, needed in below.items() if not needed & below.keys()}:
        below = {module: needed for module, needed in below.items() if module not in ground}
    assert below == {}


WORLD_USERS = {
    "data/sources/storyworld.py",
    "evaluation/tasks/storyworld.py",
    # `data storyworld`, what needs no model in `evaluate`, and an opening for who gives `story` none.
    "cli/data.py",
    "cli/evaluate.py",
    "cli/shortcuts.py",
}


def test_the_general_library_knows_no_world():
    """StoryWorld enters through its source, its task, its recipes, and the commands that are about it."""
    users = {
        name
        for name, _, module, target in own_imports()
        if target.split(".")[0] == "storyworld" and module.split(".")[0] not in ("storyworld", "recipes")
    }
    assert users == WORLD_USERS


def test_unwanted_packages_are_imported_nowhere():
    unwanted = [(name, module) for name, _, module in imports() if module.split(".")[0] in UNWANTED]
    assert unwanted == [(UNPICKLER, "pickle")]


def test_no_loader_reads_a_pickle():
    module = module_of(UNPICKLER)
    users = {name for name, _, _, imported in own_imports() if imported.startswith(module)}
    assert users == UNPICKLER_USERS
    calls = {called(node) for name, node in nodes(ast.Call) if name == UNPICKLER}
    assert not {"pickle.load", "pickle.loads", "pickle.Unpickler"} & calls
    allowing = [k for _, node in nodes(ast.Call) for k in node.keywords if k.arg == "allow_pickle"]
    assert all(isinstance(k.value, ast.Constant) and k.value.value is False for k in allowing)


def test_pickles_are_read_with_weights_only():
    loads = [(name, node) for name, node in nodes(ast.Call) if called(node) == "torch.load"]
    assert loads  # the official checkpoint
    for name, node in loads:
        safe = [
            k.value.value
            for k in node.keywords
            if k.arg == "weights_only" and isinstance(k.value, ast.Constant)
        ]
        assert safe == [True], f"{name}:{node.lineno}"
    assert "load" not in [
        alias.name for _, node in nodes(ast.ImportFrom) if node.module == "torch" for alias in node.names
    ]


def test_nothing_runs_code_out_of_data():
    forbidden = {"eval", "exec", "compile", "__import__", "yaml.load", "yaml.unsafe_load", "yaml.full_load"}
    forbidden |= {"os.system", "pickle.load", "pickle.loads"}
    assert [f"{name}:{node.lineno}" for name, node in nodes(ast.Call) if called(node) in forbidden] == []
    # Not even named: code of others is never trusted.
    assert [name for name, path in FILES.items() if "trust_remote" in path.read_text(encoding="utf-8")] == []
    assert [
        f"{name}:{node.lineno}"
        for name, node in nodes(ast.keyword)
        if node.arg == "shell" and not (isinstance(node.value, ast.Constant) and node.value.value is False)
    ] == []


def test_only_the_command_line_prints():
    assert [
        f"{name}:{node.lineno}"
        for name, node in nodes(ast.Call)
        if called(node) == "print" and not name.startswith("cli/")
    ] == []


def test_every_test_that_the_porting_notes_name_exists():
    notes = (PACKAGE.parents[1] / "docs" / "porting.md").read_text(encoding="utf-8")
    named = set(re.findall(r"`((?:\w+/)+test_\w+\.py)::(\w+)`", notes))
    assert len(named) > 30
    tests = PACKAGE.parents[1] / "tests"
    texts = {file: (tests / file).read_text("utf-8") for file, _ in named if (tests / file).is_file()}
    wrong = [f"{file}::{name}" for file, name in named if f"def {name}(" not in texts.get(file, "")]
    assert wrong == []


def test_errors_are_never_swallowed_by_a_bare_except():
    assert [f"{name}:{node.lineno}" for name, node in nodes(ast.ExceptHandler) if node.type is None] == []


def test_no_file_is_called_by_a_word_that_says_nothing():
    words = {"utils", "util", "helpers", "helper", "misc", "common", "base", "custom", "tmp"}
    assert [name for name in FILES if words & set(Path(name).with_suffix("").parts)] == []


def test_no_foreign_class_or_module_is_patched():
    """No assignment to an attribute of an imported name."""
    wrong = []
    for name, tree in TREES.items():
        imported = {
            (alias.asname or alias.name).split(".")[0]
            for node in ast.walk(tree)
            if isinstance(node, ast.Import | ast.ImportFrom)
            for alias in node.names
        }
        for node in ast.walk(tree):
            for target in node.targets if isinstance(node, ast.Assign) else []:
                root = target
                while isinstance(root, ast.Attribute):
                    root = root.value
                is_foreign = isinstance(root, ast.Name) and root.id in imported and root is not target
                # Standard streams are given to programs to set.
                if is_foreign and ast.unparse(target) not in ("sys.stdout", "sys.stderr"):
                    wrong.append(f"{name}:{node.lineno} sets {ast.unparse(target)}")
    assert wrong == []


@pytest.mark.parametrize(
    "program",
    [
        "import mm_interleaved",
        "import mm_interleaved.documents.document_files, mm_interleaved.model_files.headers",
        "from mm_interleaved.cli.main import run; run(['--help'])",
        "from mm_interleaved.cli.main import run; run(['generate', '--help'])",
        "from mm_interleaved.cli.main import run; run(['convert', '--help'])",
    ],
)
def test_nothing_heavy_is_loaded_before_it_is_needed(program):
    heavy = "{'torch', 'transformers', 'diffusers', 'scipy', 'pandas', 'matplotlib'}"
    check = f"import sys\n{program}\nfound = sorted({heavy} & set(sys.modules))\nassert not found, found"
    result = subprocess.run([sys.executable, "-c", check], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
