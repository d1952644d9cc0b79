"""Two hosts made of this machine: network namespaces joined by a cable, `accelerate launch` in each.

Run by tests/whole/test_two_hosts.py:
unshare -rnmpf --kill-child --mount-proc python tests/ranks/two_hosts.py FOLDER CONFIG HYBRID

FOLDER holds the script and its arguments (arguments.json), and is the file system that both see. First a launch with
the static rendezvous, in which the cable is pulled in the middle; then one with c10d, which resumes; last two of the
config HYBRID with two ranks a host (hybrid.json), one whole and one cut (hybrid_cut.json). What came of them is printed
as JSON.
"""

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil

ADDRESS = "10.99.0.{}"
BOUND = 120  # seconds for a launch


def make_network() -> None:
    """Two namespaces, one cable, and a name for each host. /run and /etc/hosts are this process's own."""
    ip = ["mount -t tmpfs none /run", "ip netns add host0", "ip netns add host1"]
    ip += ["ip link add cable netns host0 type veth peer name cable netns host1"]
    for host in (0, 1):
        ip += [f"ip -n host{host} addr add {ADDRESS.format(host + 1)}/24 dev cable"]
        ip += [f"ip -n host{host} link set {device} up" for device in ("cable", "lo")]
    for command in ip:
        subprocess.run(command.split(), check=True)
    names = Path("/run/hosts")  # c10d sends the ranks to host 0 by its name
    names.write_text("127.0.0.1 localhost\n10.99.0.1 host0\n10.99.0.2 host1\n")
    subprocess.run(["mount", "--bind", str(names), "/etc/hosts"], check=True)


def start(
    host: int,
    folder: Path,
    config: str,
    *more: str,
    arguments: str = "arguments.json",
    fault: dict | None = None,
) -> subprocess.Popen:
    """What is typed on a machine, in the host's network; with a fault, as tests/ranks/faults.py knows them."""
    words = ["accelerate", "launch", "--config_file", config, "--machine_rank", str(host), *more]
    words += [
        "-m",
        "faults" if fault else "nbutils.launching.rehearsal",
        str(folder / "fine_tuning_FSDP_QLoRA.py"),
    ]
    words += json.loads((folder / arguments).read_text())
    enter = [
        "nsenter",
        f"--net=/run/netns/host{host}",
        "unshare",
        "-u",
        "sh",
        "-c",
        'hostname "$0" && exec "$@"',
    ]
    enter += [f"host{host}", sys.executable, "-m", "accelerate.commands.launch"]
    log = (folder / f"host{host}.log").open("w")
    environment = os.environ | {"GLOO_SOCKET_IFNAME": "cable", "PYTHONUNBUFFERED": "1"}
    if fault:
        paths = os.pathsep.join([str(Path(__file__).parent), os.environ["PYTHONPATH"]])
        environment |= {"FAULT": json.dumps(fault), "PYTHONPATH": paths}
    return subprocess.Popen(
        enter + words[2:], stdout=log, stderr=subprocess.STDOUT, env=environment, start_new_session=True
    )


def steps_of(out: Path) -> int:
    file = out / "progress.jsonl"
    lines = (
        [json.loads(line) for line in file.read_text().splitlines(True) if line.endswith("\n")]
        if file.exists()
        else []
    )
    return max((line["step"] for line in lines), default=0)


def count_bytes(out: Path, hosts: list[subprocess.Popen], begin: int, end: int) -> int:
    """What host 0 puts on the cable in a step, on average over the steps from `begin` to `end`."""
    seen = []
    for goal in (begin, end):
        until = time.monotonic() + BOUND
        while steps_of(out) < goal and time.monotonic() < until and hosts[0].poll() is None:
            time.sleep(0.02)
        told = subprocess.run("ip -n host0 -j -s link show cable".split(), check=True, capture_output=True)  # noqa: SIM905
        seen.append((steps_of(out), json.loads(told.stdout)[0]["stats64"]["tx"]["bytes"]))
    (first, before), (last, after) = seen
    return (after - before) // max(1, last - first)


def wait(hosts: list[subprocess.Popen]) -> float:
    started = time.monotonic()
    for host in hosts:
        try:
            host.wait(timeout=max(1.0, BOUND - (time.monotonic() - started)))
        except subprocess.TimeoutExpired:
            for process in [*psutil.Process(host.pid).children(recursive=True), host]:
                process.kill()
            host.wait()
    return round(time.monotonic() - started, 1)


def told(hosts: list[subprocess.Popen], folder: Path) -> dict:
    return {
        "status": [host.returncode for host in hosts],
        "output": [(folder / f"host{number}.log").read_text() for number in (0, 1)],
    }


def cut(hosts: list[subprocess.Popen], folder: Path, out: Path, now: Callable[[], bool]) -> dict:
    """Pull the cable when the moment has come, wait for both hosts to end, and put it back."""
    end = time.monotonic() + BOUND
    while not now() and time.monotonic() < end and all(host.poll() is None for host in hosts):
        time.sleep(0.02)
    subprocess.run(["ip", "-n", "host1", "link", "set", "cable", "down"], check=True)
    (folder / "answered").touch()
    seconds = wait(hosts)
    subprocess.run(["ip", "-n", "host1", "link", "set", "cable", "up"], check=True)
    return told(hosts, folder) | {"seconds_to_end": seconds, "step": steps_of(out)}


def main(folder: Path, config: str, hybrid: str) -> None:
    make_network()
    out = folder / "out"
    hosts = [start(host, folder, config) for host in (0, 1)]
    first = cut(hosts, folder, out, lambda: steps_of(out) >= 5)
    (folder / "arguments.json").write_text(
        json.dumps([*json.loads((folder / "arguments.json").read_text()), "--resume", "true"])
    )
    c10d = ("--rdzv_backend", "c10d")
    hosts = [start(host, folder, config, *c10d) for host in (0, 1)]
    sent = count_bytes(out, hosts, first["step"] + 2, 28)
    wait(hosts)
    second = told(hosts, folder) | {"bytes_a_step": sent}

    hosts = [start(host, folder, hybrid, arguments="hybrid.json") for host in (0, 1)]
    sent = count_bytes(folder / "hybrid", hosts, 2, 8)
    wait(hosts)
    third = told(hosts, folder) | {"bytes_a_step": sent}

    # Before a backward pass: what comes next over the cable are the gradients, in the groups that FSDP made. Before the
    # forward pass it would be TRL's metrics, in the group of all ranks.
    (folder / "answered").unlink()
    fault = {"stage": "backward", "rank": 0, "what": "wait", "count": 4}
    hosts = [start(host, folder, hybrid, arguments="hybrid_cut.json", fault=fault) for host in (0, 1)]
    fourth = cut(hosts, folder, folder / "hybrid_cut", (folder / "asked").exists)
    print(json.dumps({"static": first, "c10d": second, "hybrid": third, "hybrid_cut": fourth}))


if __name__ == "__main__":
    main(Path(sys.argv[1]), *sys.argv[2:])
