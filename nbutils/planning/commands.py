"""The commands of this room: doctor."""

from nbutils.common.command import Command


def _doctor(arguments: list[str]) -> int:
    from nbutils.planning.doctor import main as doctor

    return doctor(arguments)


COMMANDS = {
    "doctor": Command("look at this machine: can it run the course?", _doctor),
}
