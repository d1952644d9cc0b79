"""Two machines, for real: two network namespaces joined by a cable, the real script and the configs for two."""

import json
import os
import re
import subprocess
import sys

import pytest
import torch
from accelerate.commands.launch import launch_command_parser
from processes import ranks_of
from safetensors.torch import load_file

from nbutils.adapters.checkpoint_folder import ADAPTER, rank_file
from nbutils.adapters.export import export_adapter
from nbutils.common.paths import ROOT
from nbutils.launching import config_files as configs
from nbutils.launching.config_files import variant
from nbutils.launching.script_file import write_script
from nbutils.models.tiny import tiny_base
from nbutils.planning.network_traffic import (
    bytes_between_machines,
    inside_a_machine,
    tokens_per_second,
)
from nbutils.planning.run_setup import Setup
from nbutils.planning.shapes import SHAPES, shape_of

pytestmark = [pytest.mark.launch, pytest.mark.ci]

TWO_MACHINES = ROOT / "configs/machines/two_machines_fsdp1.yaml"
HYBRID = TWO_MACHINES.with_name("two_machines_hybrid.yaml")
# Of their own: users, network, mounts and processes, so that no rank is left when the first of them ends.
NAMESPACES = ["unshare", "-rnmpf", "--kill-child", "--mount-proc"]
ON_CPUS = {
    "use_cpu": True,
    "fsdp_offload_params": False,
    "fsdp_sync_module_states": False,
    "fsdp_cpu_ram_efficient_loading": False,
}
SETTINGS = {
    "dataset": "data/instructions/train.jsonl", "heldout_dataset": "data/instructions/heldout.jsonl", "max_steps": 30,
    "max_length": 64, "max_cut_share": 1, "per_device_train_batch_size": 2, "learning_rate": 1e-3, "lora_r": 4,
    "logging_steps": 1, "save_steps": 2, "save_total_limit": 3, "eval_strategy": "no", "eval_on_start": "false",
    "disable_tqdm": "true",
    "ddp_timeout": 8,
}  # fmt: skip
# Two ranks a host. A larger adapter, for its gradients are what is counted; one checkpoint, at the end.
HYBRID_SETTINGS = SETTINGS | {"max_steps": 8, "lora_r": 64, "save_steps": 8, "ddp_timeout": 60}

HYBRID_CUT = SETTINGS | {"ddp_timeout": 12}


@pytest.fixture(scope="module")
def hosts(tmp_path_factory):
    """The launches: with the static rendezvous, cut in the middle; with c10d, resumed; HYBRID_SHARD, whole and cut."""
    trial = "mount -t tmpfs none /run && ip netns add a && ip link add c netns a type veth peer name d"
    tried = subprocess.run([*NAMESPACES, "sh", "-c", trial], capture_output=True, text=True, check=False)
    if tried.returncode:
        pytest.skip(f"This machine makes no network namespaces: {tried.stderr.strip()}")
    folder = tmp_path_factory.mktemp("hosts")
    write_script(folder)
    launches = {"arguments": ("out", SETTINGS), "hybrid": ("hybrid", HYBRID_SETTINGS)}
    launches["hybrid_cut"] = ("hybrid_cut", HYBRID_CUT)
    for name, (out, settings) in launches.items():
        told = {"model": tiny_base(), "output_dir": folder / out, **settings}
        words = [word for name, value in told.items() for word in (f"--{name}", str(value))]
        (folder / f"{name}.json").write_text(json.dumps(words))
    here = ON_CPUS | {"main_process_ip": "10.99.0.1"}
    both = variant(TWO_MACHINES, folder, **here, num_processes=2), variant(HYBRID, folder, **here)
    done = subprocess.run(
        [*NAMESPACES, sys.executable, str(ROOT / "tests/ranks/two_hosts.py"), *map(str, (folder, *both))],
        cwd=ROOT, env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}, capture_output=True, text=True,
        timeout=400,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    return folder, json.loads(done.stdout.splitlines()[-1])


def test_a_host_that_is_lost_ends_both_in_bounded_time(hosts):
    folder, seen = hosts
    cut = seen["static"]
    assert cut["step"] >= 5, cut["output"]
    assert all(status not in (0, -9) for status in cut["status"]), cut  # -9: it had to be killed
    assert "FSDP 1 on 2 cpu process(es)" in cut["output"][0]
    for output in cut["output"]:
        assert re.search(r"Timed out waiting 8000ms|Connection closed by peer|Connection reset", output), (
            output
        )
    assert ranks_of(folder / "fine_tuning_FSDP_QLoRA.py") == []


def test_the_run_goes_on_when_the_host_is_back(hosts):
    folder, seen = hosts
    resumed = seen["c10d"]
    assert resumed["status"] == [0, 0], resumed["output"]
    both = "".join(resumed["output"])  # c10d gives the numbers, whatever was typed: look on both
    assert (found := re.search(r"Resuming from .*/checkpoint-(\d+)\.", both)) and int(found.group(1)) >= 4
    facts = json.loads((folder / "out/run.json").read_text())
    assert (facts["training"]["world_size"], facts["training"]["distributed_type"]) == (2, "FSDP")
    assert facts["adapter"]["verified"]


def test_the_bytes_on_the_cable_are_those_of_the_plan(hosts):
    """Each host sends what the arithmetic says; the protocol's own bytes and gloo's way to reduce come on top."""
    _, seen = hosts
    shape = shape_of(tiny_base())
    counted = bytes_between_machines(
        shape, Setup(world_size=2, offload=False), machines=2, lora_r=SETTINGS["lora_r"]
    )
    print(f"counted {counted:,} bytes a step, on the cable {seen['c10d']['bytes_a_step']:,}")
    assert counted == pytest.approx(seen["c10d"]["bytes_a_step"], rel=0.2)


def test_hybrid_shards_inside_a_host_and_the_hosts_train_one_adapter(hosts):
    folder, seen = hosts
    assert seen["hybrid"]["status"] == [0, 0], seen["hybrid"]["output"]
    run = json.loads((folder / "hybrid/run.json").read_text())
    facts = run["training"]
    assert (facts["world_size"], facts["distributed_type"]) == (4, "FSDP")
    held = facts["nf4_bytes_per_rank"]
    assert held[:2] == held[2:] and held[0] + held[1] == facts["nf4_bytes_total"]
    assert held[0] == pytest.approx(held[1], rel=0.01)  # a unit is halved wherever its middle is
    assert run["adapter"]["verified"]  # by each rank: what it holds is what the file says

    # The same in the checkpoint, without the code that verifies: halves on a host, equal ones on the other.
    checkpoint = folder / "hybrid/checkpoint-8"
    pieces = [load_file(checkpoint / rank_file(number)) for number in range(4)]
    for first, second in ((0, 2), (1, 3)):
        adapter = {key for key in pieces[first] if key.startswith(ADAPTER)}
        assert len(adapter) == 2 * 7 * 4
        assert all(torch.equal(pieces[first][key], pieces[second][key]) for key in adapter)
    held = [sum(p.numel() for key, p in piece.items() if key.startswith(ADAPTER)) for piece in pieces]
    whole = shape_of(tiny_base()).adapter_parameters(HYBRID_SETTINGS["lora_r"])
    assert [2 * elements for elements in held] == [whole] * 4
    # And a machine alone makes the adapter of it.
    export_adapter(checkpoint, folder / "exported")
    exported, saved = (
        load_file(folder / name / "adapter_model.safetensors") for name in ("exported", "hybrid/adapter")
    )
    assert exported.keys() == saved.keys() and all(torch.equal(exported[key], saved[key]) for key in saved)


def test_a_host_that_is_lost_under_hybrid_shard_ends_both_as_soon(hosts):
    """FSDP makes the groups between the hosts by itself, with a time-out of half an hour under gloo."""
    cut = hosts[1]["hybrid_cut"]
    print(f"ended {cut['seconds_to_end']} s after the cable was pulled, at step {cut['step']}")
    assert cut["step"] >= 3, cut["output"]
    assert all(status not in (0, -9) for status in cut["status"]), cut
    for output in cut["output"]:
        assert re.search(r"Timed out waiting 12000ms|Connection closed by peer|Connection reset", output), (
            output
        )


def test_between_hosts_hybrid_sends_the_gradients_of_the_adapter(hosts):
    _, seen = hosts
    counted = bytes_between_machines(
        shape_of(tiny_base()), Setup(world_size=4), machines=2, lora_r=HYBRID_SETTINGS["lora_r"], hybrid=True
    )
    print(f"counted {counted:,} bytes a step, on the cable {seen['hybrid']['bytes_a_step']:,}")
    assert counted == pytest.approx(seen["hybrid"]["bytes_a_step"], rel=0.2)


def test_hybrid_sharding_costs_the_memory_of_one_machine():
    four, two = Setup(world_size=4), Setup(world_size=2)
    assert inside_a_machine(four, 2) == two
    assert Setup.read(HYBRID) == two and Setup.read(TWO_MACHINES) == four
    shape = SHAPES["llama31_70b"]
    full = bytes_between_machines(shape, four, 2)
    hybrid = bytes_between_machines(shape, four, 2, hybrid=True)
    assert bytes_between_machines(shape, four, 1) == 0
    assert 0.05e9 < hybrid < 0.5e9 < 50e9 < full < 70e9  # NF4 layers of 34 GB twice, three quarters of it
    with pytest.raises(ValueError, match="3 ranks cannot be shared out evenly among 2 machines"):
        inside_a_machine(Setup(world_size=3), 2)


def test_tokens_per_second_lies_between_hidden_and_exposed():
    slowest, fastest = tokens_per_second(tokens=1000, ranks=4, compute_seconds=1.0, sent=int(1e9), link=1e9)
    assert (slowest, fastest) == (2000.0, 4000.0)


def test_the_files_add_to_the_recipe_what_machines_need_and_nothing_else():
    recipe, two = configs.flat_keys(ROOT / configs.RECIPE), configs.flat_keys(TWO_MACHINES)
    added = {key for key in two if two[key] != recipe.get(key)}
    assert added == {"main_process_ip", "main_process_port", "num_machines", "num_processes"}
    hybrid = configs.flat_keys(HYBRID)
    assert {key for key in hybrid if hybrid[key] != two.get(key)} == {"fsdp_sharding_strategy"}


def test_slurm_types_what_accelerate_understands():
    file = TWO_MACHINES.with_name("two_machines.slurm")
    assert subprocess.run(["bash", "-n", str(file)], check=False).returncode == 0
    typed = file.read_text().split("exec accelerate launch")[1].split('launch "$@"')[0]
    options = {name for action in launch_command_parser()._actions for name in action.option_strings}
    assert len(found := set(re.findall(r"--\w+", typed))) >= 5 and found <= options
