"""Everything that is written goes through base/files.py: by rename, on the disk before it has its name, with the umask's mode."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

PACKAGE = Path(__file__).parents[2] / "fixres_dist"
# Calls that write, by the last word of what is called. An `open` counts with a mode that writes anew.
WRITERS = {
    *("open", "fdopen", "FileIO", "open_memmap", "memmap", "write_text", "write_bytes", "tofile", "dump", "saveas"),
    *("save", "savez", "savez_compressed", "savetxt", "save_file", "savefig", "save_config_for_hf", "export"),
    *("copy", "copy2", "copyfile", "copytree", "copyfileobj", "move", "rename", "renames", "replace", "link"),
    *("mkstemp", "NamedTemporaryFile", "SummaryWriter"),
}
OF_MODULES = {"copy": "shutil", "move": "shutil", "dump": "json", "export": "onnx", "link": "os"}
PERMITTED = {
    ("base.files", "open"): "it is the one way",
    ("base.files", "replace"): "it is the one way",
    ("base.small_files", "open"): "appends a line, and readers leave out a torn one",
    ("base.small_files", "replace"): "puts a damaged file aside, under another name",
    ("runs.checkpoint", "replace"): "keeps stage one's last checkpoint under another name",
    ("runs.snapshots", "replace"): "keeps an earlier snapshot under another name",
    ("base.locks", "open"): "a lock file, empty or read as stale",
    ("base.locks", "rename"): "a stale lock file is put aside",
    ("base.owners", "NamedTemporaryFile"): "an empty file, to see whose it is",
    ("cluster.jobs", "NamedTemporaryFile"): "a batch script that sbatch reads once",
    ("data.demo", "replace"): "a folder of pictures, each of which is written whole",
    ("evaluation.extract", "open_memmap"): "a folder that all ranks write into and rank 0 publishes",
    ("evaluation.extract", "open"): "the same",
    ("evaluation.extract", "save"): "the same",
    ("evaluation.extract", "write_bytes"): "the same",
    ("models.tensor_files", "open"): "the same",
    ("models.tensor_files", "save_file"): "to a temporary path that its callers publish",
    ("runs.event_file", "open"): "TensorBoard's own files, which it reads torn too",
    ("training.ranks", "save"): "to memory, for the other ranks",
    ("training.compiled_code", "open"): "an empty lock file",
}
MEASURING = "bench."  # writes in scratch folders of its own, which it deletes


def called(node: ast.Call) -> tuple[str, str]:
    """(what it is called on, name)."""
    function = node.func
    if isinstance(function, ast.Attribute):
        return ast.unparse(function.value), function.attr
    return "", function.id if isinstance(function, ast.Name) else ""


def writes(node: ast.Call) -> bool:
    on, name = called(node)
    if name not in WRITERS or (name == "write_text" and not on):  # ours
        return False
    texts = [a.value for a in (*node.args, *(k.value for k in node.keywords)) if isinstance(a, ast.Constant)]
    if name in ("open", "FileIO", "fdopen", "open_memmap", "memmap"):
        return any(isinstance(text, str) and len(text) < 4 and set(text) & set("wx+") for text in texts)
    if name == "replace":  # of a path: a text's takes two, dataclasses' and ours take keywords
        return on == "os" or (len(node.args) == 1 and not node.keywords and on not in ("", "dataclasses"))
    if name in OF_MODULES:
        return on.split(".")[-1] == OF_MODULES[name]
    if name == "save":
        return (
            on in ("np", "numpy", "torch", "onnx") or "fromarray" in on or "draw(" in on or on in ("image", "picture")
        )
    return True


def outside(node: ast.AST, safe: bool = False) -> Iterator[ast.Call]:
    """The calls that write and stand in no block of `with whole(...) as part`."""
    if isinstance(node, ast.With):
        for k, item in enumerate(node.items):
            before = safe or any(is_whole(other.context_expr) for other in node.items[:k])
            yield from outside(item.context_expr, before)
        safe = safe or any(is_whole(item.context_expr) for item in node.items)
        for child in node.body:
            yield from outside(child, safe)
        return
    if isinstance(node, ast.Call) and not safe and writes(node):
        yield node
    for child in ast.iter_child_nodes(node):
        yield from outside(child, safe)


def is_whole(node: ast.expr) -> bool:
    return isinstance(node, ast.Call) and called(node)[1] == "whole"


def test_nothing_else_writes_files() -> None:
    found = set()
    for file in sorted(PACKAGE.rglob("*.py")):
        module = ".".join(file.relative_to(PACKAGE).with_suffix("").parts)
        for node in outside(ast.parse(file.read_text())):
            key = module, called(node)[1]
            found.add(key)
            assert key in PERMITTED or module.startswith(MEASURING), (
                f"{file}:{node.lineno}: {ast.unparse(node)} writes under the final name. Next: base/files.py's whole or write_text"
            )
    assert not PERMITTED.keys() - found, "permitted, and no longer there"


def test_the_test_sees_writers() -> None:
    lines = {
        "open(p, 'w')": 1,
        "open(p)": 0,
        "p.open('ab')": 0,  # a line more, and readers leave out a torn one
        "p.write_text(t)": 1,
        "np.save(p, a)": 1,
        "shutil.copy(a, b)": 1,
        "a.rename(b)": 1,
        "write_text(p, t)": 0,
        "a.replace(b)": 1,
        "text.replace('a', 'b')": 0,
        "replace(a, b=c)": 0,
        "with whole(p) as part, open(part, 'wb') as f: np.save(f, a)": 0,
        "with whole(p) as part: part.write_text(t)": 0,
    }
    for code, expected in lines.items():
        assert len(list(outside(ast.parse(code)))) == expected, code
