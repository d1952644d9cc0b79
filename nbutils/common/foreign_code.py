"""Foreign code that this project leans on: is it there, as it was when we read it?"""

import inspect
from importlib.metadata import PackageNotFoundError, version
from typing import Any


class UnknownCode(RuntimeError):
    """A library no longer has what a patch of it was written for."""


def expect(owner: Any, name: str, parameters: tuple[str, ...], patch: str) -> None:
    """Refuse a function of a library that is gone or takes other parameters.

    Args:
        owner: the module or class that has it.
        name: of the function.
        parameters: their names, in order, as the patch knows them. What a patch has put in the place of the function is
            looked through (`__wrapped__`).
        patch: the patch's file in `nbutils/patches`, without `.py`.

    Raises:
        UnknownCode: with what was found and what was wanted.
    """
    wanted = f"{name}({', '.join(parameters)})"
    target = getattr(owner, name, None)
    found = "nothing of that name" if target is None else "something that takes no parameters"
    if callable(target):
        names = tuple(inspect.signature(target).parameters)
        if names == parameters:
            return
        found = f"{name}({', '.join(names)})"
    raise UnknownCode(f"{_place(owner)}: found {found}, wanted {wanted}. {_advice(patch)}")


def expect_source(function: Any, text: str, patch: str) -> None:
    """Refuse a function of a library whose source no longer holds what a patch was written for.

    Args:
        function: a function or a module.
        text: that must stand in its source.
        patch: as for `expect`.

    Raises:
        UnknownCode: with what was wanted.
    """
    if text not in source(function):
        raise UnknownCode(
            f"{_place(function)}: wanted `{text}` in its source, and it is gone. {_advice(patch)}"
        )


def source(function: Any) -> str:
    """The source of a library's function or module, as it is without a patch around it.

    Args:
        function: what a patch has put around it is looked through (`__wrapped__`).
    """
    return inspect.getsource(inspect.unwrap(function) if callable(function) else function)


def _place(owner: Any) -> str:
    module = getattr(owner, "__module__", None) or owner.__name__
    package = module.split(".")[0]
    try:
        release = version(package)
    except PackageNotFoundError:
        release = "of an unknown version"
    name = getattr(owner, "__qualname__", "")
    return f"{module}{'.' * bool(name)}{name} of {package} {release}"


def _advice(patch: str) -> str:
    return (
        f"nbutils/patches/{patch}.py was written for other code: install the versions in requirements.lock, or look "
        "there whether it is still needed and what takes its place."
    )
