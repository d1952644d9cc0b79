"""What nvidia-smi says of the GPUs; CUDA is not initialised in this process."""

import os
import re
import subprocess


def every_gpu() -> list[dict]:
    """The GPUs of this machine, shown to programs or not; empty without nvidia-smi.

    Returns:
        For each its `index` in nvidia-smi's table, `name`, memory in `gib`, compute `capability`, `uuid` and `driver`.
        Memory and capability are None where nvidia-smi gives no number: the GPU shares the host's memory, or a
        container may not ask.
    """
    asked = "--query-gpu=name,memory.total,compute_cap,uuid,driver_version"
    gpus = []
    for line in _nvidia_smi(asked, "--format=csv,noheader,nounits").splitlines():
        if "," not in line:  # "No devices were found" is no row
            continue
        cells = [cell.strip() for cell in line.split(",")]
        name, memory, capability, uuid, driver = (cells + 5 * [""])[:5]
        mib = _number(memory)
        gib = None if mib is None else mib / 1024
        gpu = {"index": len(gpus), "name": name, "gib": gib, "capability": _number(capability)}
        gpus.append(gpu | {"uuid": uuid, "driver": driver})
    return gpus


def find_gpus() -> list[dict]:
    """The GPUs that a program started here would see: `every_gpu`, as far as CUDA_VISIBLE_DEVICES leaves them."""
    gpus = every_gpu()
    chosen = os.environ.get("CUDA_VISIBLE_DEVICES")
    if chosen is None:
        return gpus
    if chosen.startswith("MIG-"):  # a slice of a card; CUDA shows one, and the table has whole cards only
        return [gpus[0] | {"name": f"a MIG slice of {gpus[0]['name']}", "gib": None}] if gpus else []
    return [gpus[index] for index in _visible(chosen, [gpu["uuid"] for gpu in gpus])]


def _visible(chosen: str, uuids: list[str]) -> list[int]:
    """The GPUs that CUDA_VISIBLE_DEVICES leaves, read as CUDA reads it.

    The list ends at the first entry that names no GPU, so -1 and the empty string leave none, and so does a list that
    names one twice. CUDA numbers the cards from the fastest on, and nvidia-smi by their slots: if they are not all
    alike, CUDA_DEVICE_ORDER=PCI_BUS_ID makes both say the same.
    """
    seen = []
    for word in chosen.split(","):
        word = word.strip()
        if word.isdigit():
            named = [int(word)] if int(word) < len(uuids) else []
        else:
            named = [index for index, uuid in enumerate(uuids) if word and uuid.startswith(word)]
        if len(named) != 1:  # none, or the beginning of several UUIDs
            break
        if named[0] in seen:
            return []
        seen += named
    return seen


def _number(text: str) -> float | None:
    """What nvidia-smi prints, or None where it prints words: `[N/A]`, `[Insufficient Permissions]`."""
    try:
        return float(text)
    except ValueError:
        return None


def how_linked(first: int = 0, second: int = 1) -> str:
    """How one GPU reaches another: NVLink, or a PCIe path, in the words of `nvidia-smi topo`.

    Args:
        first, second: indices in nvidia-smi's table.
    """
    words = {
        "NV": "NVLink",
        "PIX": "one PCIe switch",
        "PXB": "several PCIe switches",
        "PHB": "PCIe through the host bridge",
        "NODE": "PCIe within a NUMA node",
        "SYS": "PCIe between two CPU sockets",
    }
    # The row of a GPU has its own name, and then a word for each GPU; X stands for itself.
    row = re.search(rf"^GPU{first}((?:\s+\S+){{{second + 1}}})", _nvidia_smi("topo", "-m"), re.MULTILINE)
    link = row.group(1).split()[-1] if row else ""
    return next((f"{text} ({link})" for code, text in words.items() if link.startswith(code)), "link unknown")


def _nvidia_smi(*arguments: str) -> str:
    try:
        done = subprocess.run(
            ["nvidia-smi", *arguments], capture_output=True, text=True, timeout=30, check=False
        )
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout if done.returncode == 0 else ""
