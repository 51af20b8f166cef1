"""No pickle is read or written: nothing in the tree, scripts or notebooks, asks for it, openly or by a default."""

import ast
import json
import re

import pytest

from circuit_breaking.runs.files import ROOT

MODULES = {"pickle", "cPickle", "_pickle", "dill", "cloudpickle", "joblib", "shelve", "marshal"}
CALLS = {  # by the name under which a library is imported
    ("torch", "load"), ("torch", "save"), ("serialization", "load"), ("hub", "load"), ("jit", "load"),
    ("np", "save"), ("np", "savez"), ("np", "fromfile"), ("pd", "read_pickle"), ("pd", "to_pickle"),
    ("datasets", "load_from_disk"),
}  # fmt: skip
ALIASES = {"numpy": "np", "pandas": "pd"}
ARRAYS = {("np", "load")}  # reads no pickle only with allow_pickle=False
LOADERS = re.compile(r"AutoModel|\w+For[A-Z]\w+$|\w+(Model|LM)$")  # classes that read weights


def python_of(path):
    """The code of a script, or of all cells of a notebook, without the lines that are magic."""
    text = path.read_text(encoding="utf-8")
    if path.suffix != ".ipynb":
        return text
    cells = [cell for cell in json.loads(text)["cells"] if cell["cell_type"] == "code"]
    lines = "\n".join("".join(cell["source"]) for cell in cells).splitlines()
    return "\n".join(line for line in lines if not line.lstrip().startswith(("%", "!")))


FILES = [
    path
    for pattern in ("*.py", "*.ipynb")
    for path in sorted(ROOT.rglob(pattern))
    if not {part for part in path.relative_to(ROOT).parts if part.startswith(".")} and "site-packages" not in path.parts
]


def complaints(code):
    """What in some code reads or writes pickle, or might: line and why."""
    found = []
    for node in ast.walk(ast.parse(code)):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = [node.module or ""]
            whole = ALIASES.get(node.module or "", (node.module or "").rpartition(".")[2])
            names += ["pickle" for alias in node.names if (whole, alias.name) in CALLS | ARRAYS]
        if {name.partition(".")[0] for name in names} & MODULES:
            found.append((node.lineno, "import"))
        if not isinstance(node, ast.Call):
            continue
        method = node.func.attr if isinstance(node.func, ast.Attribute) else ""
        of = getattr(node.func, "value", None)
        of = of.id if isinstance(of, ast.Name) else of.attr if isinstance(of, ast.Attribute) else ""
        call = (ALIASES.get(of, of), method)
        told = {keyword.arg: getattr(keyword.value, "value", None) for keyword in node.keywords}
        if call in CALLS or (call in ARRAYS and told.get("allow_pickle") is not False):
            found.append((node.lineno, ".".join(call)))
        if told.get("allow_pickle", False) is not False or told.get("weights_only", True) is not True:
            found.append((node.lineno, "allowed by a keyword"))
        if method == "from_pretrained" and LOADERS.match(of) and told.get("use_safetensors") is not True:
            found.append((node.lineno, "from_pretrained"))
        if told.get("trust_remote_code", False) is not False:
            found.append((node.lineno, "trust_remote_code"))
    return found


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_nothing_pickles(path):
    assert complaints(python_of(path)) == []


BAD = [
    "import pickle", "from pickle import loads", "import joblib.memory", "import torch\ntorch.load('x')",
    "from torch import load", "import numpy\nnumpy.load('x')", "import numpy as np\nnp.load('x', allow_pickle=True)",
    "np.load('x', allow_pickle=yes)", "from numpy import load", "torch.serialization.load('x')",
    "AutoModelForCausalLM.from_pretrained('x')", "AutoModel.from_pretrained('x', use_safetensors=False)",
    "datasets.load_from_disk('x')", "f(weights_only=False)", "f(trust_remote_code=True)",
]  # fmt: skip
GOOD = [
    "import numpy as np\nnp.load('x', allow_pickle=False)", "import json\njson.load(file)", "import multiprocessing",
    "AutoModelForCausalLM.from_pretrained('x', use_safetensors=True)", "f(trust_remote_code=False)",
]  # fmt: skip


@pytest.mark.parametrize("code", BAD)
def test_what_unpickles_is_seen(code):
    assert complaints(code)


@pytest.mark.parametrize("code", GOOD)
def test_code_that_does_not_is_accepted(code):
    assert not complaints(code)


def test_the_one_loader_of_models_asks_for_safetensors():
    """`models.load._from_pretrained` is handed the class, so that the rule above does not see it: its call does."""
    tree = ast.parse((ROOT / "circuit_breaking" / "models" / "load.py").read_text(encoding="utf-8"))
    calls = [
        node
        for node in ast.walk(tree)
        if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "_from_pretrained"
    ]
    weights = [node for node in calls if node.args[0].id.startswith("AutoModel")]
    assert len(weights) == 1 and len(calls) == 3
    asked = 'if not extra:\n        keywords["use_safetensors"] = True\n'  # extra: the name of a GGUF file
    assert asked in ast.unparse(tree).replace("'", '"')
    assert any(keyword.arg is None and keyword.value.id == "keywords" for keyword in weights[0].keywords)


def test_there_are_files_to_look_at():
    assert len(FILES) > 100 and {path.suffix for path in FILES} == {".py", ".ipynb"}
