"""One launch on one GPU, on two or more, and on two machines; beside it what notebook 07b counts.

Run as: python benchmarks/scaling.py --folder runs/weights --out benchmarks/results/scaling.json --commit SHA

The two machines are one: two `accelerate launch`, each with a rank number and GPUs of its own, and configs/machines'
own files. NCCL_HOSTID tells NCCL that they are two hosts, so it goes through TCP, here over the loopback device, whose
counter says what was sent. Without a GPU the same runs on CPU processes and gloo.

Two machines of two ranks need four GPUs. With two, both machines show the same two: what is sent and what is trained
stay true, the speed does not (`gpus_of_each_machine` says so).
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
import torch.distributed as dist

from nbutils.common.devices import no_accelerator
from nbutils.common.paths import go_to_root
from nbutils.common.provenance import provenance
from nbutils.launching.config_files import variant
from nbutils.launching.dry_run import dry_run
from nbutils.launching.dry_run_record import describe
from nbutils.launching.dry_run_settings import DryRun, write_settings
from nbutils.launching.measurements import measured
from nbutils.launching.random_weights import prepare
from nbutils.launching.script_file import write_script
from nbutils.planning.network_traffic import bytes_between_machines, tokens_per_second
from nbutils.planning.run_setup import Setup
from nbutils.planning.shapes import Shape, shape_of

RECIPE, TWO_MACHINES = "configs/accelerate/config_fsdp.yaml", "configs/machines/two_machines_fsdp1.yaml"
HYBRID = "configs/machines/two_machines_hybrid.yaml"
REHEARSAL = "configs/accelerate/rehearsal_fsdp1.yaml"
ON_CPUS = {"use_cpu": True, "fsdp_sync_module_states": False, "fsdp_cpu_ram_efficient_loading": False}
ONE_MACHINE = {"1_ranks": 1, "2_ranks": 2, "4_ranks": 4}
MACHINES = {  # config file, and ranks of each of the two machines
    "2_machines": (TWO_MACHINES, 1),
    "2x2_full_shard": (TWO_MACHINES, 2),
    "2x2_hybrid": (HYBRID, 2),
}


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


def gpus_of(ranks: int) -> list[str]:
    """The GPUs that each of two machines shows, as CUDA_VISIBLE_DEVICES wants them: its own, or the same ones."""
    there = torch.cuda.device_count()
    if there < ranks:
        return ["", ""]
    second = ranks if there >= 2 * ranks else 0
    return [",".join(str(first + n) for n in range(ranks)) for first in (0, second)]


def start_on_two_machines(
    config: str, ranks: int, folder: Path, port: int, module: str, *words: str
) -> list[subprocess.Popen]:
    """What is typed on each machine, with what keeps the two apart on one."""
    changes = {"num_processes": 2 * ranks, "main_process_ip": "127.0.0.1", "main_process_port": port}
    changes |= {"fsdp_offload_params": False} | (ON_CPUS if no_accelerator() else {})
    config = variant(config, folder, **changes)
    hosts = []
    for host, gpus in enumerate(gpus_of(ranks)):
        apart = {
            "CUDA_VISIBLE_DEVICES": gpus,
            "NCCL_HOSTID": f"host{host}",
            "NCCL_SOCKET_IFNAME": "lo",
            "NCCL_IB_DISABLE": "1",
            "NCCL_DEBUG": "INFO",
            "NCCL_DEBUG_FILE": str(folder / f"nccl{host}_%p.log"),  # a file a rank
            "GLOO_SOCKET_IFNAME": "lo",
            "PYTHONUNBUFFERED": "1",
        }
        launcher = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(config)]
        with (folder / f"host{host}.log").open("w") as log:
            hosts.append(
                subprocess.Popen(
                    [*launcher, "--machine_rank", str(host), "-m", module, *words],
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


def two_machines(
    config: str, ranks: int, shape: Shape, weights: Path, folder: Path, batch: int, length: int, steps: int
) -> dict:
    """The script on two machines of some ranks each: speed, what was sent in a step, and the link between two ranks."""
    folder.mkdir(parents=True, exist_ok=True)
    world_size, hybrid = 2 * ranks, config == HYBRID
    script = write_script(folder)
    shutil.rmtree(folder / "train", ignore_errors=True)
    write_settings(DryRun(shape, batch=batch, length=length, steps=steps), folder, weights, world_size)
    os.environ["NBUTILS_MEASURE_DIR"] = str(folder / "ranks")
    words = ("nbutils.launching.measured_run", str(script), "--config", str(folder / "train.yaml"))
    with Loopback() as loopback:
        wait(start_on_two_machines(config, ranks, folder, 29612, *words), folder, 240)
    seen = measured(folder, None, world_size * batch * length)
    lines = [json.loads(line) for line in (folder / "ranks/rank0.jsonl").read_text().splitlines()]
    ends = [line["time"] for line in lines if line["phase"] == "step"][1:]
    all_on_loopback = no_accelerator() and ranks > 1  # gloo sends between the ranks of one machine there too
    logs = "".join(path.read_text() for path in folder.glob("nccl*.log"))
    result = {
        "accelerate_config": config,
        "ranks_of_each_machine": ranks,
        "gpus_of_each_machine": gpus_of(ranks),
        "measured": seen,
        "sent_bytes_a_step": None
        if all_on_loopback
        else loopback.between(ends[0], ends[-1]) // 2 // (len(ends) - 1),
        "counted_bytes_a_step": bytes_between_machines(
            shape, Setup(world_size=world_size, offload=False), 2, hybrid=hybrid
        ),
        "nccl_channels": {how: logs.count(how) for how in ("via NET/Socket", "via P2P", "via SHM")},
    }
    if ranks == 1:  # both machines have a GPU of their own, so the link's speed means something
        words = ("benchmarks.scaling", "--link", str(folder / "link.json"))
        wait(start_on_two_machines(config, ranks, folder, 29611, *words), folder, 120)
        result["link_bytes_a_second"] = json.loads((folder / "link.json").read_text())
    return result


def one_machine(ranks: int, shape: Shape, options: argparse.Namespace, folder: Path) -> dict:
    """A dry run without offload on one machine of some ranks."""
    asked = DryRun(
        shape,
        REHEARSAL if no_accelerator() else RECIPE,
        batch=options.batch,
        length=options.length,
        steps=options.steps,
        world_size=ranks,
        folder=options.folder,
        run_dir=folder,
        commit=options.commit,
        changes=() if no_accelerator() else ("fsdp_offload_params=false",),
    )
    record = dry_run(asked)
    print(describe(record), flush=True)
    if record["outcome"] != "ok":
        raise SystemExit(
            f"The run on {ranks} ranks ended as {record['outcome']!r}; its log lies in {folder}."
        )
    return {"measured": record["measured"]}


def main() -> int:
    """Run the cases, keep each as soon as it is there, and print a table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--cases", default="1_ranks,2_ranks,2_machines", help=f"of {', '.join([*ONE_MACHINE, *MACHINES])}"
    )
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
    result = {
        "what": "the same launch on more GPUs and machines; random weights, LoRA r=16, FSDP 1, no offload, no cap",
        **provenance("python benchmarks/scaling.py --cases CASES --commit COMMIT --out FILE", options.commit),
        "config": {
            "model": options.model,
            "num_layers": options.layers,
            "batch_size": options.batch,
            "seq_len": options.length,
            "accelerate_config": REHEARSAL if no_accelerator() else RECIPE,
        },
    }
    options.out.parent.mkdir(parents=True, exist_ok=True)
    for name in options.cases.split(","):
        if name in ONE_MACHINE:
            result[name] = one_machine(ONE_MACHINE[name], shape, options, runs / name)
        else:
            size = (options.batch, options.length, options.steps)
            result[name] = two_machines(*MACHINES[name], shape, weights, runs / name, *size)
        if {"1_ranks", "2_machines"} <= result.keys():
            result["expected_tokens_per_second"] = tokens_per_second(
                options.batch * options.length,
                2,
                result["1_ranks"]["measured"]["step_seconds"],
                result["2_machines"]["counted_bytes_a_step"],
                result["2_machines"]["link_bytes_a_second"],
            )
        options.out.write_text(json.dumps(result, indent=1) + "\n")
    print(table(result))
    return 0


def table(result: dict) -> str:
    """A line a case: tokens a second and the last loss; and what two machines sent beside what was counted."""
    rows = []
    for name in (name for name in (*ONE_MACHINE, *MACHINES) if name in result):
        case = result[name]
        seen = case["measured"]
        rows.append(
            f"{name:16}{seen['tokens_per_second']:10,.1f} tokens/s   peak {seen['gpu_peak_bytes'] / 2**30:6.2f} GiB   "
            f"last loss {seen['losses'][-1]:.4f}"
        )
        if name in MACHINES:
            sent = case["sent_bytes_a_step"]
            rows.append(
                f"    MB a step from a machine: sent {'?' if sent is None else f'{sent / 1e6:,.1f}'}, counted "
                f"{case['counted_bytes_a_step'] / 1e6:,.1f}; {case['nccl_channels']}"
            )
    if "expected_tokens_per_second" in result:
        slowest, fastest = result["expected_tokens_per_second"]
        link = result["2_machines"]["link_bytes_a_second"]
        rows.append(
            f"the link carries {link / 1e9:.2f} GB/s; expected {slowest:,.1f} tokens/s if no sending "
            f"hides, {fastest:,.1f} if all of it does"
        )
    return "\n".join(rows)


if __name__ == "__main__":
    sys.exit(main())
