"""Keep of a record of the config's keys what lessons 01 and 01b read from it, a variant a line.

`measure_config_keys.py` writes this form of itself on GPUs; on a CPU it writes everything, for the lesson that runs it.
Run as: python benchmarks/slim_config_keys.py benchmarks/results/config_keys_2gpu.json    (a record in the long form)
"""

import argparse
import json
from pathlib import Path

# Whose units a lesson counts, adds up, or asks for their device.
WITH_UNITS = (
    *("FULL_SHARD", "HYBRID_SHARD", "NO_PREFETCH", "BACKWARD_POST", "forward_prefetch", "file policy, orig"),
    *("fsdp2 reshard", "offload", "fsdp2 offload", "sync"),
)
OF_A_UNIT = ("full", "device")


def slim(report: dict) -> dict:
    """A report without the events of its steps, and with two facts of each unit.

    Args:
        report: of `measure_config_keys.py`; one that is slim already stays as it is.

    Returns:
        A new report; all other figures are those of the long one.
    """
    ranks = [rank | {"variants": {}} for rank in report["ranks"]]
    for rank, long in zip(ranks, report["ranks"], strict=True):
        for name, variant in long["variants"].items():
            kept = {key: value for key, value in variant.items() if key not in ("events", "units")}
            if "units" in variant and name in WITH_UNITS:
                units = variant["units"].items()
                kept["units"] = {unit: {key: seen[key] for key in OF_A_UNIT} for unit, seen in units}
            rank["variants"][name] = kept
    return report | {"ranks": ranks}


def as_text(report: dict) -> str:
    """JSON with one line a fact, and one line a variant."""
    head = json.dumps({key: value for key, value in report.items() if key != "ranks"}, indent=1)
    ranks = []
    for rank in report["ranks"]:
        parts = [
            f"   {json.dumps(name)}: {json.dumps(variant)}" for name, variant in rank["variants"].items()
        ]
        lines = ['  "variants": {\n' + ",\n".join(parts) + "\n  }"]
        lines += [
            f"  {json.dumps(key)}: {json.dumps(value)}" for key, value in rank.items() if key != "variants"
        ]
        ranks.append(" {\n" + ",\n".join(lines) + "\n }")
    return head.removesuffix("\n}") + ',\n "ranks": [\n' + ",\n".join(ranks) + "\n ]\n}\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("files", type=Path, nargs="+", help="records in the long form; each is replaced")
    for file in parser.parse_args().files:
        report = json.loads(file.read_text(encoding="utf-8"))
        file.write_text(as_text(slim(report)), encoding="utf-8")


if __name__ == "__main__":
    main()
