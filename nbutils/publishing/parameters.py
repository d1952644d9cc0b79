"""One contract for the parameters of notebooks, checked as a whole before anything is executed.

Each notebook has exactly one cell with the tag `parameters`. It holds lines `name: type = value  # help`, the values
literals; so the cell can be read without being run.
"""

import ast
import difflib
import importlib.util
import types
import typing
from dataclasses import dataclass
from pathlib import Path

import nbformat
import yaml

TYPES = {
    "str": str,
    "int": int,
    "float": float,
    "bool": bool,
    "list": list,
    "dict": dict,
    "None": types.NoneType,
}
FILE_ENDINGS = (".json", ".jsonl", ".parquet", ".yaml", ".yml", ".safetensors")
# What no run can be meant to have: name -> (test, the sentence).
LIMITS = {
    "fsdp_version": (lambda value: value in (1, 2), "it must be 1 or 2"),
    "num_processes": (lambda value: value >= 1, "it must be at least 1"),
    "batch_size": (lambda value: value >= 1, "it must be at least 1"),
    "lora_r": (lambda value: value >= 1, "it must be at least 1"),
    "max_length": (lambda value: value >= 8, "it must be at least 8 tokens"),
    "max_steps": (lambda value: value >= 1 or value == -1, "it must be at least 1, or -1 for whole epochs"),
    "epochs": (lambda value: value > 0, "it must be above 0"),
    "gradient_accumulation_steps": (lambda value: value >= 1, "it must be at least 1"),
    "save_steps": (lambda value: value >= 0, "it must be at least 1, or 0 for no checkpoints"),
    "save_total_limit": (lambda value: value >= 1, "it must be at least 1"),
    "eval_steps": (lambda value: value >= 0, "it must be at least 1, or 0 for three times in the run"),
    "eval_rows": (lambda value: value >= 0, "it must be at least 1, or 0 for all"),
    "time_limit": (lambda value: value >= 60, "it must be at least 60 seconds"),
    "learning_rate": (lambda value: 0 < value < 1, "it must lie between 0 and 1"),
    "report_to": (lambda value: value in ("none", "tensorboard"), "it must be none or tensorboard"),
}


class BadParameters(ValueError):
    """Parameters that no notebook would understand; the message names each of them."""


@dataclass(frozen=True)
class Parameter:
    """One line of a parameters cell."""

    name: str
    type: object  # what `ast` made of the annotation: a class, or a union of classes
    default: object
    help: str
    notebook: str


def read_contract(notebook: Path) -> dict[str, Parameter]:
    """Read the parameters that a notebook declares.

    Args:
        notebook: path of the .ipynb file.

    Returns:
        Name -> parameter, in the order of the cell.

    Raises:
        BadParameters: there is not exactly one such cell, or a line is not `name: type = literal`.
    """
    cells = nbformat.read(notebook, as_version=4).cells
    tagged = [cell for cell in cells if "parameters" in cell.metadata.get("tags", [])]
    if len(tagged) != 1 or tagged[0].cell_type != "code":
        raise BadParameters(
            f"{notebook.name} has {len(tagged)} code cells with the tag `parameters`; it must have one."
        )
    return parse_cell(tagged[0].source, notebook.name)


def parse_cell(source: str, notebook: str) -> dict[str, Parameter]:
    """Read the text of a parameters cell; see `read_contract`."""
    found, lines = {}, source.splitlines()
    for statement in ast.parse(source).body:
        text = lines[statement.lineno - 1]
        try:
            assert isinstance(statement, ast.AnnAssign) and isinstance(statement.target, ast.Name)
            name, default = statement.target.id, ast.literal_eval(statement.value)
            kind = _type_of(statement.annotation)
        except (AssertionError, ValueError, KeyError, TypeError):
            raise BadParameters(
                f"{notebook}, parameters cell: found `{text.strip()}`, wanted `name: type = literal  # help` "
                f"with a type made of {', '.join(TYPES)}."
            ) from None
        if not _fits(default, kind):
            raise BadParameters(
                f"{notebook}, parameters cell: the default of {name} is no {_spell(kind)}: {text}"
            )
        comment = lines[statement.end_lineno - 1].partition("#")[2].strip()
        found[name] = Parameter(name, kind, default, comment, notebook)
    return found


def _type_of(annotation: ast.expr):
    """`int`, `str | None`, `list[str]` as types, without running anything."""
    if isinstance(annotation, ast.BinOp) and isinstance(annotation.op, ast.BitOr):
        return _type_of(annotation.left) | _type_of(annotation.right)
    if isinstance(annotation, ast.Subscript):
        annotation = annotation.value
    if isinstance(annotation, ast.Constant) and annotation.value is None:
        return types.NoneType
    return TYPES[annotation.id]


def _fits(value, kind) -> bool:
    if isinstance(kind, types.UnionType):
        return any(_fits(value, part) for part in typing.get_args(kind))
    if kind is float:
        return isinstance(value, int | float) and not isinstance(value, bool)
    if kind is int:
        return isinstance(value, int) and not isinstance(value, bool)  # bool is a kind of int in Python
    return isinstance(value, kind)


def _spell(kind) -> str:
    if isinstance(kind, types.UnionType):
        return " | ".join(_spell(part) for part in typing.get_args(kind))
    return "None" if kind is types.NoneType else kind.__name__


def read_params_file(path: str | Path) -> dict:
    """Read a YAML file of parameters.

    Args:
        path: the file.

    Returns:
        Name -> value, as YAML understands it.

    Raises:
        BadParameters: no such file, no YAML, no mapping of names to values, or a name given twice.
    """
    path = Path(path)
    if not path.is_file():
        near = difflib.get_close_matches(path.name, [other.name for other in path.parent.glob("*.yaml")], n=1)
        hint = f" Did you mean {path.parent / near[0]}?" if near else ""
        raise BadParameters(f"There is no parameters file {path}.{hint}")
    try:
        values = yaml.load(path.read_text(encoding="utf-8"), Loader=_NoDuplicates)
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise BadParameters(f"{path} cannot be read as YAML: {' '.join(str(error).split())}") from None
    if values is None:
        return {}
    if not isinstance(values, dict) or not all(isinstance(name, str) for name in values):
        raise BadParameters(f"{path} must hold lines `name: value`; found {type(values).__name__}.")
    return values


class _NoDuplicates(yaml.SafeLoader):
    """YAML keeps the last of two equal names in silence."""

    def construct_mapping(self, node, deep=False):
        names = [self.construct_object(key, deep=True) for key, _ in node.value]
        twice = sorted({str(name) for name in names if names.count(name) > 1})
        if twice:
            raise yaml.YAMLError(f"{', '.join(twice)} is given twice")
        return super().construct_mapping(node, deep)


def from_command_line(name: str, text: str, contracts: list[dict[str, Parameter]]):
    """What a word on the command line means for a parameter: a shell has no types.

    Args:
        name: of the parameter.
        text: as typed.
        contracts: of the notebooks that will run.

    Returns:
        `true`/`false`, a number, `null` or a list where the declared type wants one; else the text.
    """
    kinds = [contract[name].type for contract in contracts if name in contract]
    if kinds and _fits(text, kinds[0]) and text != "null":
        return text
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError:
        return text
    if kinds and not _fits(value, kinds[0]) and _fits(0.5, kinds[0]):
        try:
            return float(text)  # 1e-4, which YAML takes for a string
        except ValueError:
            return text
    return value


def check(values: dict, contracts: list[dict[str, Parameter]]) -> None:
    """Refuse what the notebooks would misunderstand; every fault is named at once.

    Args:
        values: name -> value for the whole series.
        contracts: of every notebook that will run.

    Raises:
        BadParameters: an unknown name, a wrong type, a value outside its limits, a file that is missing; or
            two notebooks declare one name with two types.
    """
    declared, faults = {}, []
    for contract in contracts:
        for name, parameter in contract.items():
            first = declared.setdefault(name, parameter)
            if first.type != parameter.type:
                faults.append(
                    f"{name}: {first.notebook} declares it as {_spell(first.type)}, "
                    f"{parameter.notebook} as {_spell(parameter.type)}. One name, one type."
                )
    faults += [fault for name, value in values.items() if (fault := _fault(name, value, declared))]
    if faults:
        raise BadParameters("\n".join(faults))


def _fault(name: str, value, declared: dict[str, Parameter]) -> str | None:
    if name not in declared:
        near = difflib.get_close_matches(name, declared, n=1)
        hint = f"Did you mean {near[0]}?" if near else f"Known: {', '.join(sorted(declared))}."
        return f"{name}: no notebook has a parameter of this name. {hint}"
    parameter = declared[name]
    if not _fits(value, parameter.type):
        found = f"{name}: found {value!r} ({type(value).__name__}), wanted {_spell(parameter.type)}."
        return found + _hint(value, parameter)
    if name in LIMITS and value is not None and not LIMITS[name][0](value):
        return f"{name}: found {value!r}, and {LIMITS[name][1]}."
    if name == "report_to" and value == "tensorboard" and not importlib.util.find_spec("tensorboard"):
        return f"{name}: tensorboard is not installed in this environment. Type: pip install tensorboard"
    if _names_a_missing_file(name, value):
        return f"{name}: there is no file or folder {value}. Paths begin at the root of the repository."
    return None


def _hint(value, parameter: Parameter) -> str:
    """The two traps of YAML that look right: a quoted word, and an exponent without a point."""
    if (
        isinstance(value, str)
        and _fits(True, parameter.type)
        and value.lower() in ("true", "false", "yes", "no")
    ):
        return f" Write {'true' if value.lower() in ('true', 'yes') else 'false'} without quotes."
    if isinstance(value, str) and _fits(0.5, parameter.type):
        try:
            float(value)
        except ValueError:
            return ""
        head, _, tail = value.lower().partition("e")
        return f" YAML reads {value} as text; write {head if '.' in head else head + '.0'}{'e' + tail if tail else ''}."
    return ""


def _names_a_missing_file(name: str, value) -> bool:
    """A value that looks like a path must exist, unless the name ends in `_dir`: such a folder is made by the run."""
    if not isinstance(value, str) or name.endswith("_dir"):
        return False
    looks_like_a_path = value.startswith(("/", "./", "../", "~")) or value.endswith(FILE_ENDINGS)
    return looks_like_a_path and not Path(value).expanduser().exists()
