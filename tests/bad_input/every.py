"""All rows that the script must refuse."""

from bad_input import config, data, machine, model

BAD = {**config.CASES, **model.CASES, **data.CASES, **machine.CASES}
