"""The commands of this room: doctor, links."""

from nbutils.common.command import Command


def _doctor(arguments: list[str]) -> int:
    from nbutils.planning.doctor import main as doctor

    return doctor(arguments)


def _links(arguments: list[str]) -> int:
    from nbutils.planning.links import main as links

    return links(arguments)


COMMANDS = {
    "doctor": Command("look at this machine: can it run the course?", _doctor),
    "links": Command("measure this machine's links and bf16 rate; find GPUs that hang", _links),
}
