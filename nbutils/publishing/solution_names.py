"""The proof by reading: no cell of the student edition uses a name that only a solution makes.

Running the student edition takes minutes. What makes one of its later cells fail is nearly always a name, and names can
be read off.
"""

import ast

import nbformat


def uses_of_solutions(
    master: nbformat.NotebookNode, student: nbformat.NotebookNode
) -> list[tuple[str, str, str]]:
    """Each use of a name whose value in the student edition is missing or still `...`.

    Args:
        master: the notebook with its solutions.
        student: its student edition, cell by cell.

    Returns:
        The id of the cell that uses it, the name, the id of the exercise that makes it; in the order of the cells.
    """
    found, missing = [], {}
    for solved, cell in zip(master.cells, student.cells, strict=True):
        if cell.cell_type != "code" or cell.source.startswith("%%"):
            continue
        runs = _until_it_raises(cell.source)
        made = _made(runs)
        found += [(cell.id, name, missing[name]) for name in sorted((_used(runs) - made) & missing.keys())]
        missing = {name: exercise for name, exercise in missing.items() if name not in made}
        if solved.source != cell.source:
            missing |= dict.fromkeys(_made(ast.parse(solved.source).body) - made, cell.id)
    return found


def _until_it_raises(source: str) -> list[ast.stmt]:
    statements = ast.parse(source).body
    at = next((at for at, one in enumerate(statements) if isinstance(one, ast.Raise)), len(statements))
    return statements[:at]


def _made(statements: list[ast.stmt]) -> set[str]:
    """The names that statements give a value, arguments of functions with them; `name = ...` gives none."""
    names = set()
    for node in (node for one in statements if not _is_stub(one) for node in ast.walk(one)):
        if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            names.add(node.id)
        elif isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            names.add(node.name)
        elif isinstance(node, ast.arg):
            names.add(node.arg)
        elif isinstance(node, (ast.Import, ast.ImportFrom)):
            names |= {(alias.asname or alias.name).split(".")[0] for alias in node.names}
    return names


def _is_stub(statement: ast.stmt) -> bool:
    """Whether it is `name = ...`, or a function that can only raise until it is written."""
    if isinstance(statement, ast.FunctionDef):
        return any(
            isinstance(one, ast.Raise) and "NotImplementedError" in ast.dump(one) for one in statement.body
        )
    if not isinstance(statement, ast.Assign):
        return False
    value = statement.value
    values = value.elts if isinstance(value, ast.Tuple) else [value]
    return all(isinstance(one, ast.Constant) and one.value is ... for one in values)


def _used(statements: list[ast.stmt]) -> set[str]:
    nodes = (node for one in statements if not _is_stub(one) for node in ast.walk(one))
    return {node.id for node in nodes if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Load)}
