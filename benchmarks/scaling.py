"""One launch on one GPU, on two, and on two machines of one GPU each; beside it what notebook 07 counts.

Run as: python benchmarks/scaling.py --folder runs/weights --out benchmarks/results/scaling.json --commit SHA

The two machines are one: two `accelerate launch`, each with a rank number and a GPU of its own, and configs/machines'
own file. NCCL_HOSTID tells NCCL that they are two hosts, so it goes through TCP, here over the loopback device, whose
counter says what was sent. Without a GPU the same runs on CPU processes and gloo.
"""

import argparse
import json
import os
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
import torch.distributed as dist

from nbutils.configs import variant
from nbutils.course import go_to_root
from nbutils.dryrun import describe, dry_run, measured, prepare, settings_for, write_script
from nbutils.launch import no_accelerator
from nbutils.machines import bytes_between_machines, tokens_per_second
from nbutils.shapes import Setup, Shape, shape_of

RECIPE, TWO_MACHINES = "configs/accelerate/config_fsdp.yaml", "configs/machines/two_machines_fsdp1.yaml"
REHEARSAL = "configs/accelerate/rehearsal_fsdp1.yaml"
ON_CPUS = {"use_cpu": True, "fsdp_sync_module_states": False, "fsdp_cpu_ram_efficient_loading": False}


class Loopback:
    """Samples of the bytes that the loopback device has carried, twenty a second."""

    def __enter__(self):
        self.samples: list[tuple[float, int]] = []
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_):
        self._stop.set()
        self._thread.join()

    def _run(self) -> None:
        while not self._stop.wait(0.05):
            line = next(line for line in Path("/proc/net/dev").read_text().splitlines() if "lo:" in line)
            sent = int(line.split()[9])  # what loopback sends it receives
            self.samples.append((time.time(), sent))

    def between(self, begin: float, end: float) -> int:
        """Bytes from one moment to another, both ways together."""
        inside = [count for moment, count in self.samples if begin <= moment <= end]
        return inside[-1] - inside[0]


def start_on_two_machines(folder: Path, port: int, module: str, *words: str) -> list[subprocess.Popen]:
    """What is typed on each machine, with what keeps the two apart on one."""
    changes = {"num_processes": 2, "main_process_ip": "127.0.0.1", "main_process_port": port}
    changes |= {"fsdp_offload_params": False} | (ON_CPUS if no_accelerator() else {})
    config = variant(TWO_MACHINES, folder, **changes)
    hosts = []
    for host in ("0", "1"):
        apart = {
            "CUDA_VISIBLE_DEVICES": host if not no_accelerator() else "",
            "NCCL_HOSTID": f"host{host}",
            "NCCL_SOCKET_IFNAME": "lo",
            "NCCL_IB_DISABLE": "1",
            "NCCL_DEBUG": "INFO",
            "NCCL_DEBUG_FILE": str(folder / f"nccl{host}.log"),
            "GLOO_SOCKET_IFNAME": "lo",
            "PYTHONUNBUFFERED": "1",
        }
        launcher = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(config)]
        with (folder / f"host{host}.log").open("w") as log:
            hosts.append(
                subprocess.Popen(
                    [*launcher, "--machine_rank", host, "-m", module, *words],
                    env=os.environ | apart,
                    stdout=log,
                    stderr=subprocess.STDOUT,
                )
            )
    return hosts


def wait(hosts: list[subprocess.Popen], folder: Path, seconds: float) -> None:
    """Raise with the end of the logs if a host failed or the time was up; none is left behind."""
    try:
        for host in hosts:
            host.wait(timeout=seconds)
    finally:
        for host in hosts:
            host.terminate()
    if any(host.returncode for host in hosts):
        raise RuntimeError("\n".join((folder / f"host{n}.log").read_text()[-3000:] for n in (0, 1)))


def link_speed(out: Path, megabytes: int = 256) -> None:
    """Run on two ranks: what NCCL, or gloo, carries in one direction while it gathers; bytes a second, into a file."""
    on_gpu = torch.cuda.is_available()
    dist.init_process_group("nccl" if on_gpu else "gloo")
    device = "cuda" if on_gpu else "cpu"
    piece = torch.ones(megabytes * 2**20, dtype=torch.uint8, device=device)
    pieces = [torch.empty_like(piece) for _ in range(2)]
    for repeat in range(6):
        if repeat == 1:  # the first one makes the connections
            begin = time.monotonic()
        dist.all_gather(pieces, piece)
        if on_gpu:
            torch.cuda.synchronize()
    speed = 5 * piece.numel() / (time.monotonic() - begin)
    if dist.get_rank() == 0:
        out.write_text(json.dumps(speed))
    dist.destroy_process_group()


def two_machines(shape: Shape, weights: Path, folder: Path, batch: int, length: int, steps: int) -> dict:
    """The script on two machines of one rank each: speed, what was sent in a step, and the link."""
    folder.mkdir(parents=True, exist_ok=True)
    wait(
        start_on_two_machines(folder, 29611, "benchmarks.scaling", "--link", str(folder / "link.json")),
        folder,
        120,
    )
    script = write_script(folder)
    settings = settings_for(folder, weights, batch, length, steps, lora_r=16, world_size=2)
    os.environ["NBUTILS_MEASURE_DIR"] = str(folder / "ranks")
    with Loopback() as loopback:
        wait(
            start_on_two_machines(folder, 29612, "nbutils.measure", str(script), "--config", str(settings)),
            folder,
            240,
        )
    seen = measured(folder, None, 2 * batch * length)
    lines = [json.loads(line) for line in (folder / "ranks/rank0.jsonl").read_text().splitlines()]
    ends = [line["time"] for line in lines if line["phase"] == "step"][1:]
    logs = "".join(path.read_text() for path in folder.glob("nccl*.log"))
    return {
        "measured": seen,
        "sent_bytes_a_step": loopback.between(ends[0], ends[-1]) // 2 // (len(ends) - 1),
        "counted_bytes_a_step": bytes_between_machines(shape, Setup(world_size=2, offload=False), 2),
        "link_bytes_a_second": json.loads((folder / "link.json").read_text()),
        "nccl_channels": {how: logs.count(how) for how in ("via NET/Socket", "via P2P", "via SHM")},
    }


def main() -> int:
    """Run the three, and print a table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="llama31_70b", help="a shape, or a local config.json")
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--length", type=int, default=2048)
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--folder", type=Path, help="where the random weights are kept")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/scaling.json"))
    parser.add_argument("--commit", default="", help="left out: as git says")
    parser.add_argument("--link", type=Path, help="measure the link only, as one of two ranks")
    options = parser.parse_args()
    if options.link:
        link_speed(options.link)
        return 0
    go_to_root()
    shape = replace(shape_of(options.model), layers=options.layers)
    weights, runs = prepare(shape, options.folder), Path("runs/scaling")
    result = {}
    for ranks in (1, 2):
        record = dry_run(
            shape,
            REHEARSAL if no_accelerator() else RECIPE,
            batch=options.batch,
            length=options.length,
            steps=options.steps,
            world_size=ranks,
            folder=options.folder,
            run_dir=runs / f"{ranks}_ranks",
            commit=options.commit,
            changes=() if no_accelerator() else ("fsdp_offload_params=false",),
        )
        print(describe(record), flush=True)
        if record["outcome"] != "ok":
            return 1
        result = {key: record[key] for key in ("machine", "versions", "commit", "date", "config")} | result
        result[f"{ranks}_ranks"] = {"measured": record["measured"]}
    result["config"].pop("world_size")  # it differs
    result["config"]["accelerate_config"] = f"{RECIPE}, and {TWO_MACHINES} for two machines"
    result["2_machines"] = two_machines(
        shape, weights, runs / "2_machines", options.batch, options.length, options.steps
    )
    result["expected_tokens_per_second"] = tokens_per_second(
        options.batch * options.length,
        2,
        result["1_ranks"]["measured"]["step_seconds"],
        result["2_machines"]["counted_bytes_a_step"],
        result["2_machines"]["link_bytes_a_second"],
    )
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(result, indent=1) + "\n")
    print(table(result))
    return 0


def table(result: dict) -> str:
    """Tokens a second of the three, and what the two machines sent beside what was counted."""
    first = result["1_ranks"]["measured"]["tokens_per_second"]
    rows = [
        f"{name:12}{result[name]['measured']['tokens_per_second']:10,.1f} tokens/s"
        f"{result[name]['measured']['tokens_per_second'] / first:7.2f} x"
        for name in ("1_ranks", "2_ranks", "2_machines")
    ]
    two = result["2_machines"]
    slowest, fastest = result["expected_tokens_per_second"]
    rows += [
        f"a step sends {two['sent_bytes_a_step'] / 1e6:,.1f} MB from a machine; "
        f"counted {two['counted_bytes_a_step'] / 1e6:,.1f} MB",
        f"the link carries {two['link_bytes_a_second'] / 1e9:.2f} GB/s; expected {slowest:,.1f} tokens/s if no sending "
        f"hides, {fastest:,.1f} if all of it does",
        f"NCCL's channels: {two['nccl_channels']}",
    ]
    return "\n".join(rows)


if __name__ == "__main__":
    sys.exit(main())
