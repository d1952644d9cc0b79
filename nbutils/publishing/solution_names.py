"""The proof by reading: no cell of the student edition uses a name that only a solution makes.

Running the student edition takes minutes. What makes one of its later cells fail is nearly always a name, and names can
be read off.
"""

import ast
import symtable

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
        made, used = _names(_until_it_raises(cell.source))
        found += [(cell.id, name, missing[name]) for name in sorted((used - made) & missing.keys())]
        missing = {name: exercise for name, exercise in missing.items() if name not in made}
        if solved.source != cell.source:
            missing |= dict.fromkeys(_names(ast.parse(solved.source).body)[0] - made, cell.id)
    return found


def _until_it_raises(source: str) -> list[ast.stmt]:
    statements = ast.parse(source).body
    at = next((at for at, one in enumerate(statements) if isinstance(one, ast.Raise)), len(statements))
    return statements[:at]


def _names(statements: list[ast.stmt]) -> tuple[set[str], set[str]]:
    """The names of the notebook that statements give a value, and those that they use; a stub does neither."""
    body = [one for one in statements if not _is_stub(one)]
    top = symtable.symtable(ast.unparse(ast.Module(body, [])), "cell", "exec")
    made = {s.get_name() for s in top.get_symbols() if s.is_assigned() or s.is_imported()}
    return made, {s.get_name() for s in top.get_symbols() if s.is_referenced()} | _used_within(top)


def _used_within(table: symtable.SymbolTable) -> set[str]:
    """The names of the notebook that functions and comprehensions use; their own are not among them."""
    within = [s.get_name() for child in table.get_children() for s in child.get_symbols() if s.is_global()]
    return set(within).union(*map(_used_within, table.get_children()))


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
