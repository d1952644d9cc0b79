"""Can this machine do it? One line a check: OK, WARN or FAIL, and what to do about it.

Run as: `python -m nbutils doctor`
"""

import argparse
import os
import platform
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

from nbutils.common import host_memory
from nbutils.common.command import also_as
from nbutils.common.nvidia_smi import find_gpus, how_linked
from nbutils.common.versions import (
    RECORDED_ON_GPUS,
    UNTESTED,
    allowed_versions,
    goes_on_untested,
    installed_versions,
    is_outside,
    locked_versions,
)
from nbutils.planning.check import FAIL, OK, WARN, Check
from nbutils.planning.link_checks import check_links
from nbutils.planning.links import FILE
from nbutils.planning.memory_items import GIB
from nbutils.planning.memory_plan import DRIVER, left_gib
from nbutils.planning.model_needs import (
    MODELS,
    Model,
    gpu_gib,
    has_room,
    host_gib,
    host_gib_resident,
    resident_has_room,
)

PYTHONS = ((3, 11), (3, 14))  # from the first to below the second


def examine(model: str = "tiny", processes: int | None = None) -> list[Check]:
    """Look at this machine with the needs of one model in mind. CUDA is not initialised in this process.

    Args:
        model: a name in nbutils.planning.model_needs.MODELS.
        processes: ranks that will run; the number of GPUs if not given, or 2 without any.

    Returns:
        The checks, in the order in which a reader would fix them.
    """
    sizes = MODELS[model]
    gpus = find_gpus()
    ranks = processes or len(gpus) or 2
    return [
        check_python(sys.version_info[:2]),
        *check_packages(locked_versions(), installed_versions(), bool(gpus)),
        *check_gpus(sizes, gpus),
        *check_links(sizes, gpus, FILE),
        check_host_memory(sizes, ranks, host_memory.total() / GIB, gpus),
        check_disk(sizes, hub_cache()),
        check_shared_memory(ranks, Path("/dev/shm")),
        check_token(sizes),
    ]


# ---------------------------------------------------------------- software


def check_python(found: tuple[int, int]) -> Check:
    """Python must be one for which the pinned packages exist."""
    text = f"{found[0]}.{found[1]}"
    if PYTHONS[0] <= found < PYTHONS[1]:
        return Check("Python", text)
    return Check("Python", text, FAIL, "Use Python 3.11, 3.12 or 3.13: make tutorial PYTHON=python3.11")


def check_packages(
    locked: dict[str, str], found: dict[str, str | None], on_gpus: bool = False
) -> list[Check]:
    """The stack beside the lock, on GPUs beside the records too; a version weighs here what it weighs in the script.

    A missing package fails. One outside its range fails, or warns if `NBUTILS_UNTESTED` says to go on; any other
    version than the tested one warns.
    """
    checks, allowed = [], allowed_versions()
    for name, installed in found.items():
        wanted, recorded = locked.get(name, ""), RECORDED_ON_GPUS.get(name) if on_gpus else None
        if installed is None:
            checks.append(Check(name, "not installed", FAIL, f"pip install {name}=={wanted}"))
        elif is_outside(name, installed, allowed):
            works = f"This code works with {name}{allowed[name]} only: pip install {name}=={wanted}, or {UNTESTED}=1"
            checks.append(Check(name, installed, WARN if goes_on_untested() else FAIL, works))
        elif recorded:
            checks.append(_check_on_gpus(name, installed, wanted, recorded))
        elif installed != wanted:
            fix = f"The course was tested with {wanted}: pip install {name}=={wanted}"
            checks.append(Check(name, installed, WARN, fix))
        else:
            checks.append(Check(name, installed))
    return checks


def _check_on_gpus(name: str, installed: str, wanted: str, recorded: str) -> Check:
    if installed in (wanted, recorded):
        which = "newer" if installed == wanted else "older"
        return Check(name, f"{installed}; as in the {which} records on GPUs")
    found = f"{installed}; records on GPUs are of {wanted} and {recorded}"
    return Check(name, found, WARN, f"The course was tested with {wanted}: pip install {name}=={wanted}")


# ---------------------------------------------------------------- GPUs


def check_gpus(model: Model, gpus: list[dict]) -> list[Check]:
    """Number, memory, bf16 and link of the GPUs, against what the model needs."""
    if not gpus:
        if model.gpu_needed:
            fix = f"{model.name} needs NVIDIA GPUs. Without them, run the course with the tiny model: make tutorial"
            return [Check("GPUs", "none", FAIL, fix)]
        fix = f"None is needed for the {model.name} model: the same script is rehearsed on two CPU processes."
        return [Check("GPUs", "none", WARN, fix)]
    sizes = [gpu["gib"] for gpu in gpus]
    smallest = None if None in sizes else min(sizes)
    size = "memory unknown" if smallest is None else f"{smallest:.1f} GiB"
    checks = [Check("GPUs", f"{len(gpus)} x {gpus[0]['name']}, {size}")]
    if len(gpus) == 1:
        no_need = "FSDP shards over two or more GPUs; one needs no FSDP."
        rehearse = "The course shards over two. Rehearse it on the CPU: CUDA_VISIBLE_DEVICES= make tutorial"
        checks[0].verdict, checks[0].fix = WARN, no_need if model.gpu_needed else rehearse
    checks.append(_check_bf16([gpu["capability"] for gpu in gpus]))
    if len(gpus) > 1:
        checks.append(Check("GPU link", how_linked(gpus[0]["index"], gpus[1]["index"])))
    if model.gpu_needed:
        checks.append(_check_gpu_memory(model, len(gpus), smallest))
    return checks


def _check_bf16(capabilities: list[float | None]) -> Check:
    if any(found is not None and found < 8.0 for found in capabilities):
        least = min(found for found in capabilities if found is not None)
        fix = "The recipe computes in bf16, which needs compute capability 8.0 (RTX 30, A100 or newer)."
        return Check("bf16", f"compute capability {least}", FAIL, fix)
    if None in capabilities:
        fix = "nvidia-smi does not tell it here. bf16 needs 8.0 (RTX 30, A100 or newer)."
        return Check("bf16", "compute capability unknown", WARN, fix)
    return Check("bf16", "supported")


def _check_gpu_memory(model: Model, gpus: int, smallest: float | None) -> Check:
    plain, offloaded = gpu_gib(model, gpus, False), gpu_gib(model, gpus, True)
    size = "unknown" if smallest is None else f"{smallest:.1f} GiB"
    if offloaded < plain:
        found = f"{size}; needs {plain:.1f}, or {offloaded:.1f} with offload (predicted)"
    else:  # one rank of FSDP 1 keeps the whole model on the GPU, offload or not
        found = f"{size}; needs {plain:.1f} (predicted)"
    if smallest is None:
        fix = "nvidia-smi does not tell it here. A GPU that shares the host's memory has what the host can spare."
        return Check("GPU memory", found, WARN, fix)
    card = smallest - DRIVER
    found += f"; leaves {left_gib(card):.1f} to PyTorch"
    if has_room(model, gpus, False, card):
        return Check("GPU memory", found)
    if has_room(model, gpus, True, card):
        return Check("GPU memory", found, WARN, "Keep fsdp_offload_params: true.")
    return Check("GPU memory", found, FAIL, "Take a smaller model or larger GPUs.")


# ---------------------------------------------------------------- memory, disk, account


def check_host_memory(model: Model, ranks: int, found_gib: float, gpus: Sequence[dict] = ()) -> Check:
    """What all ranks hold there, with offload; a large model's checkpoint is mapped beside it.

    Where that is too much, and `gpus` can hold all weights, the settings without offload are named.
    """
    least, comfortable = host_gib(model, ranks)
    found = f"{found_gib:.0f} GiB; {ranks} ranks need {least:.0f}, better {comfortable:.0f}"
    if found_gib >= comfortable:
        return Check("host memory", found)
    if found_gib >= least:
        return Check("host memory", found, WARN, "Add swap on an NVMe disk, or close other programs.")
    resident = host_gib_resident(model, ranks)
    smallest = min((gpu["gib"] or 0 for gpu in gpus), default=0) - DRIVER
    if model.mapped and found_gib >= resident and resident_has_room(model, ranks, smallest):
        found = f"{found_gib:.0f} GiB; {ranks} ranks need {least:.0f} with offload, {resident:.0f} without"
        cure = "Train without offload, with configs/goals/resident_2x24gb.yaml: the cards hold all weights."
        return Check("host memory", found, WARN, cure)
    return Check(
        "host memory",
        found,
        FAIL,
        "Too little for the ranks together: add RAM or swap, or take a smaller model.",
    )


def hub_home() -> Path:
    """The hub client's folder, as huggingface_hub.constants finds it; the doctor also runs where that is missing."""
    cache = Path(os.environ.get("XDG_CACHE_HOME", "~/.cache"))
    return Path(os.environ.get("HF_HOME", cache / "huggingface")).expanduser()


def hub_cache() -> Path:
    """The folder into which models are downloaded, or its nearest existing parent."""
    folder = Path(os.environ.get("HF_HUB_CACHE", hub_home() / "hub")).expanduser()
    while not folder.exists():
        folder = folder.parent
    return folder


def check_disk(model: Model, folder: Path) -> Check:
    """Room for what `Model.disk_gib` counts; a merge of a large model is counted, and not asked for."""
    free, wanted = shutil.disk_usage(folder).free / GIB, model.disk_gib()
    found = f"{free:.0f} GiB free; model and runs need {wanted:.0f}"
    if model.mapped:
        found += f", and {model.disk_gib(merge=True):.0f} to merge as well"
    if free >= wanted:
        return Check("disk", found)
    return Check("disk", found, FAIL, "Free some space, or set HF_HOME to a folder on a larger disk.")


def check_shared_memory(ranks: int, folder: Path) -> Check:
    """NCCL and data-loader workers pass data through /dev/shm; containers often give it 64 MiB."""
    if not folder.exists():
        return Check("shared memory", "no /dev/shm", WARN, "Fine outside Linux; in a container, mount one.")
    size, wanted = shutil.disk_usage(folder).total / GIB, 0.25 * ranks
    found = f"{size:.2f} GiB in /dev/shm"
    if size >= wanted:
        return Check("shared memory", found)
    return Check("shared memory", found, WARN, "Start the container with --shm-size=2g (or --ipc=host).")


def check_token(model: Model) -> Check:
    """Whether a hub token is there; its value is never read into the table."""
    file = Path(os.environ.get("HF_TOKEN_PATH", hub_home() / "token")).expanduser()
    present = bool(os.environ.get("HF_TOKEN")) or file.is_file()
    if present:
        return Check("hub token", "present")
    if not model.gpu_needed:
        return Check("hub token", f"absent; not needed for the {model.name} model")
    return Check(
        "hub token", "absent", WARN, "Llama is gated: accept its licence on the hub, then run: hf auth login"
    )


# ---------------------------------------------------------------- the table


def as_text(checks: list[Check]) -> str:
    """The checks as aligned lines, each fix beneath its line."""
    wide = max(len(check.what) for check in checks)
    lines = []
    for check in checks:
        lines.append(f"{check.verdict:<5}{check.what:<{wide + 2}}{check.found}")
        if check.fix:
            lines.append(" " * (wide + 7) + check.fix)
    count = {verdict: sum(check.verdict == verdict for check in checks) for verdict in (OK, WARN, FAIL)}
    lines.append(
        f"{count[OK]} OK, {count[WARN]} WARN, {count[FAIL]} FAIL on {platform.system()} {platform.machine()}"
    )
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> int:
    """Print the table.

    Args:
        arguments: `--model NAME` and `--num-processes N`; none means the tiny model.

    Returns:
        1 if a check failed, 0 otherwise.
    """
    parser = argparse.ArgumentParser(prog="python -m nbutils doctor", description="Can this machine do it?")
    parser.add_argument("--model", choices=sorted(MODELS), default="tiny")
    parser.add_argument("--num-processes", type=int, help="ranks; left out: the number of GPUs")
    also_as(parser, "--num-processes", "--processes", int)
    options = parser.parse_args(arguments or [])
    checks = examine(options.model, options.num_processes)
    print(as_text(checks))
    return int(any(check.verdict == FAIL for check in checks))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
